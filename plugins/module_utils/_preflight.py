# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What can be wrong with a pair before anything is done to it: inventory, addresses, hosts. Pure functions.

This module is private to the collection. It runs on the controller (filters) and never shows a key.
Every problem is one sentence: host, option, what is wrong, what to do.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import ipaddress
import re
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

from . import _conntrack_settings, _keepalived, _options, _ruleset, _vrrp_numbers

MINIMUM_PYTHON = (3, 9)
MINIMUM_KEY_BYTES = 32
REBUILDS = ("RedHat", "AlmaLinux", "CentOS", "OracleLinux", "Rocky")
# fact of the distribution -> the releases that are supported: whole versions, or major ones
PLATFORMS: Dict[str, Tuple[str, ...]] = {
    "Debian": ("11", "12", "13"),
    "Ubuntu": ("22.04", "24.04"),
    **dict.fromkeys(REBUILDS, ("9",)),
}
PLATFORM_NAMES = "Debian 11, 12 and 13, Ubuntu 22.04 and 24.04, and Red Hat Enterprise Linux 9 and its rebuilds"
NODES = range(2, 9)  # how many the daemon replicates between
CLOCK_SKEW_S = 30.0
# set by the role kernel on both nodes, whatever they are now
ROLE_SYSCTLS = (
    "net.ipv4.ip_forward",
    "net.ipv6.conf.all.forwarding",
    "net.netfilter.nf_conntrack_events",
    "net.netfilter.nf_conntrack_tcp_loose",
    "net.netfilter.nf_conntrack_timestamp",
)

Interface = Union[ipaddress.IPv4Interface, ipaddress.IPv6Interface]

# option of a node -> the inventory's variable, for messages and for hosts that take no part in this run
VARIABLES: Dict[str, str] = {
    "virtual_ips": "ha_firewall_virtual_ips",
    "priority": "ha_firewall_priority",
    "sync_links": "ha_firewall_sync_links",
    "sync_interface": "ha_firewall_sync_interface",
    "sync_address": "ha_firewall_sync_address",
    "sync_port": "ha_firewall_sync_port",
    "key": "ha_firewall_key",
    "key_id": "ha_firewall_key_id",
    "rules": "ruleset_rules",
    "rules6": "ruleset_rules6",
    "address_sets": "ruleset_address_sets",
    "filter_rules": "ruleset_filter_rules",
    "nat_rules": "ruleset_nat_rules",
    "forward_policy": "ruleset_forward_policy",
}
# options of the module ruleset, as its messages name them
RULESET_OPTIONS = (
    *("rules", "rules6", "address_sets", "filter_rules", "nat_rules", "forward_policy", "services"),
    *("rollback_timeout", "canary", "nflog_group"),
)
DEFAULTS: Dict[str, Any] = {"sync_port": 3781, "key_id": 1, "rules": [], "rules6": [], "virtual_ips": [], "key": ""}


# of these, `alike` has a fingerprint
SECRET = ("keepalived_authentication",)
VIRTUAL_IP_KEYS = ("interface", "address", "router_id")


class _Link(NamedTuple):
    """A node's end of a sync link as the inventory has it, and what the options are called."""

    interface: Any
    address: Any
    port: Any
    interface_option: str
    address_option: str
    port_option: str


class VirtualIp(NamedTuple):
    """One entry of the list of virtual IPs that has no fault of its own."""

    interface: str
    address: Interface
    router_id: int


def summarize_key(key: Any) -> Dict[str, Any]:
    """What may be said of a key: ``given``, ``valid`` (base64), ``bytes``, and a ``fingerprint`` of long keys.

    The fingerprint is half of a SHA-256; a key shorter than 32 bytes has none, because it could be guessed from one.
    """
    text = "" if key is None else str(key).strip()
    if not text:
        return {"given": False, "valid": False, "bytes": 0, "fingerprint": ""}
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return {"given": True, "valid": False, "bytes": 0, "fingerprint": ""}
    strong = len(raw) >= MINIMUM_KEY_BYTES
    fingerprint = hashlib.sha256(b"ctsync preflight\0" + raw).hexdigest()[:32] if strong else ""
    return {"given": True, "valid": True, "bytes": len(raw), "fingerprint": fingerprint}


def supported(facts: Mapping[str, Any]) -> bool:
    """Whether the platform in ``ansible_facts`` (subset distribution) is supported; true where they do not tell."""
    name = facts.get("distribution")
    if not name:
        return True
    releases = {str(facts.get(key) or "") for key in ("distribution_version", "distribution_major_version")}
    return not releases.isdisjoint(PLATFORMS.get(str(name), ()))


def facts_key(interface: str) -> str:
    """The key that Ansible's facts have for an interface."""
    return interface.replace("-", "_")


def interface_addresses(facts: Mapping[str, Any]) -> Dict[str, List[Interface]]:
    """Interfaces and their addresses with prefix length, out of ``ansible_facts`` (subset network); in their order."""
    found: Dict[str, List[Interface]] = {}
    for name in facts.get("interfaces") or ():
        entry = facts.get(facts_key(str(name))) or {}
        ipv4 = entry.get("ipv4") or {}
        rows = [*(ipv4 if isinstance(ipv4, (list, tuple)) else [ipv4]), *(entry.get("ipv4_secondaries") or ())]
        rows += list(entry.get("ipv6") or ())
        addresses = []
        for row in rows:
            parsed = _fact_address(row)
            if parsed is not None:
                addresses.append(parsed)
        found[str(name)] = addresses
    return found


def _fact_address(row: Mapping[str, Any]) -> Optional[Interface]:
    """An address of the facts; older releases give a netmask and no prefix."""
    address = row.get("address")
    if not address:
        return None
    length = row.get("prefix") or row.get("netmask") or (128 if ":" in str(address) else 32)
    try:
        return ipaddress.ip_interface(f"{address}/{length}")
    except ValueError:
        return None


def as_int(value: Any) -> Optional[int]:
    """An integer, also if it is written as text (INI inventories); ``None`` for everything else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    text = str(value).strip()
    return int(text) if text.lstrip("-").isdigit() and text.count("-") <= 1 else None


def own_address(
    interface: str, vip: Interface, addresses: Mapping[str, Sequence[Interface]], vips: Sequence[Any]
) -> str:
    """The node's own address in the virtual IP's network on that interface; empty when there is none.

    A node that holds virtual IPs shows them among its addresses: ``vips`` are left out.
    """
    virtual = {str(address) for address in vips}
    for own in addresses.get(interface, ()):
        if own.version == vip.version and str(own.ip) not in virtual and own.ip in vip.network:
            return str(own.ip)
    return ""


class _Group:
    """Collects the problems of one group of nodes."""

    def __init__(
        self, nodes: Mapping[str, Mapping[str, Any]], facts: Mapping[str, Mapping[str, Any]], track_weight: int
    ) -> None:
        self.nodes = {host: {**DEFAULTS, **node} for host, node in nodes.items()}
        self.facts = facts
        self.track_weight = track_weight
        self.addresses = {host: interface_addresses(known) for host, known in facts.items() if known.get("interfaces")}
        self.problems: List[Tuple[str, str]] = []  # host ("" for the group), sentence
        self.vips: Dict[str, List[VirtualIp]] = {}

    def add(self, host: str, option: str, text: str) -> None:
        self.say(host, f"{VARIABLES.get(option, option)}: {text}")

    def say(self, host: str, sentence: str) -> None:
        if (host, sentence) not in self.problems:
            self.problems.append((host, sentence))

    def lines(self) -> List[str]:
        """One line for each problem; hosts that share one are named together."""
        hosts: Dict[str, List[str]] = {}
        for host, sentence in self.problems:
            hosts.setdefault(sentence, []).append(host)
        return [f"{', '.join(names)}: {sentence}" if names[0] else sentence for sentence, names in hosts.items()]

    def check(self) -> List[str]:
        if len(self.nodes) not in NODES:
            names = ", ".join(self.nodes) or "no host"
            self.say(
                "",
                f"the group of firewalls has {len(self.nodes)} hosts ({names}), and ctsyncd replicates between"
                f" {NODES.start} to {NODES.stop - 1}: list the nodes that share the virtual IPs in it",
            )
        for host in self.nodes:
            self.vips[host] = self._virtual_ips(host)
        self._same_virtual_ips()
        for host in self.nodes:
            self._vip_interfaces(host)
            self._keepalived(host)
            self._priority(host)
            self._sync(host)
            self._key(host)
            self._rules(host)
            self._host(host)
        self._priorities()
        self._sync_group()
        self._alike()
        self._keys()
        self._sysctls()
        self._clocks()
        self._duplicate_addresses()
        return self.lines()

    # --- virtual IPs ---

    def _virtual_ips(self, host: str) -> List[VirtualIp]:
        listed = self.nodes[host]["virtual_ips"]
        if not listed:
            self.add(
                host, "virtual_ips", "is missing or empty: list each virtual IP with interface, address and router_id"
            )
            return []
        if not isinstance(listed, (list, tuple)):
            self.add(host, "virtual_ips", "is not a list: list each virtual IP with interface, address and router_id")
            return []
        good: List[VirtualIp] = []
        routers: Dict[Tuple[int, int], str] = {}
        seen: Dict[str, int] = {}
        for number, entry in enumerate(_vrrp_numbers.with_router_ids(listed)):
            vip = self._virtual_ip(host, number, entry)
            if vip is None:
                continue
            plain = str(vip.address.ip)
            if plain in seen:
                self.add(
                    host, "virtual_ips", f"entry {number + 1} repeats {plain} of entry {seen[plain] + 1}: remove one"
                )
                continue
            seen[plain] = number
            key = (vip.router_id, vip.address.version)
            if routers.setdefault(key, vip.interface) != vip.interface:
                self.add(
                    host,
                    "virtual_ips",
                    f"entry {number + 1} ({plain}) has router_id {vip.router_id} of {routers[key]} again: give each"
                    " interface a router_id of its own",
                )
            good.append(vip)
        return good

    def _virtual_ip(self, host: str, number: int, entry: Any) -> Optional[VirtualIp]:
        where = f"entry {number + 1}"
        if not isinstance(entry, Mapping):
            self.add(host, "virtual_ips", f"{where} is not a mapping: write interface, address and router_id")
            return None
        unknown = [str(key) for key in entry if key not in VIRTUAL_IP_KEYS]
        for key in unknown:
            guess = _options.meant(key, VIRTUAL_IP_KEYS) or f": an entry has {', '.join(VIRTUAL_IP_KEYS)}"
            self.add(host, "virtual_ips", f"{where}: {key} is not known{guess}")
        missing = [key for key in VIRTUAL_IP_KEYS if entry.get(key) in (None, "")]
        if missing:
            if not unknown:  # a misspelt key is the likelier mistake, and was named
                self.add(host, "virtual_ips", f"{where} has no {' and no '.join(missing)}: add it")
            return None
        text = str(entry["address"])
        problem = ""
        try:
            address = ipaddress.ip_interface(text)
        except ValueError:
            self.add(
                host, "virtual_ips", f"{where}: {text!r} is not an address with prefix length, such as 192.168.0.100/24"
            )
            return None
        length = address.network.prefixlen
        if "/" not in text:
            problem = f"{text} has no prefix length: write the one of the network, such as {text}/24"
        elif length < address.max_prefixlen - 1 and address.ip == address.network.network_address:
            problem = f"{text} is the address of the network itself: choose a host's"
        elif address.version == 4 and length < 31 and address.ip == address.network.broadcast_address:
            problem = f"{text} is the broadcast address of the network: choose a host's"
        elif address.ip.is_multicast or address.ip.is_loopback or address.ip.is_unspecified:
            problem = f"{text} cannot be given to an interface: choose a unicast address"
        if problem:
            self.add(host, "virtual_ips", f"{where}: {problem}")
            return None
        router = as_int(entry["router_id"])
        if router is None or not 1 <= router <= 255:
            self.add(
                host, "virtual_ips", f"{where}: router_id {entry['router_id']!r} is not 1 to 255: choose one of these"
            )
            return None
        return VirtualIp(str(entry["interface"]), address, router)

    def _same_virtual_ips(self) -> None:
        """Interfaces may be named differently on each node; addresses and router ids may not differ."""
        hosts = list(self.nodes)
        if len(hosts) < 2 or any(not self.vips[host] for host in hosts):
            return
        first = {(str(vip.address), vip.router_id) for vip in self.vips[hosts[0]]}
        for host in hosts[1:]:
            if {(str(vip.address), vip.router_id) for vip in self.vips[host]} != first:
                self.add(
                    host,
                    "virtual_ips",
                    f"differs from {hosts[0]}'s in addresses or router ids: set it once for the whole group",
                )

    def _vip_interfaces(self, host: str) -> None:
        addresses = self.addresses.get(host)
        if addresses is None:
            return
        virtual = [vip.address.ip for vip in self.vips[host]]
        for vip in self.vips[host]:
            if vip.interface not in addresses:
                self.add(host, "virtual_ips", self._no_interface(vip.interface, addresses, f"of {vip.address.ip} "))
            elif not own_address(vip.interface, vip.address, addresses, virtual):
                listed = ", ".join(str(own) for own in addresses[vip.interface] if own.ip not in virtual) or "none"
                self.add(
                    host,
                    "virtual_ips",
                    f"{vip.address} is on {vip.interface}, where this node has no address of its own in"
                    f" {vip.address.network} (it has: {listed}): give it one, or correct the entry",
                )

    def _keepalived(self, host: str) -> None:
        """What keepalived's own test would find, and only after the other roles have worked."""
        node, addresses = self.nodes[host], self.addresses.get(host)
        for entry in node.get("track_interfaces") or ():
            name = str(entry.get("interface") or "") if isinstance(entry, Mapping) else ""
            if name and addresses is not None and name not in addresses:
                self.say(host, f"keepalived_track_interfaces: {self._no_interface(name, addresses)}")
        if node.get("authenticated"):
            version = str(((node.get("host") or {}).get("keepalived") or {}).get("version") or "")
            parts = tuple(int(part) for part in version.split(".") if part.isdigit())
            problem = _keepalived.tracking.hmac_problem(parts)
            if problem:
                self.say(host, f"keepalived_{problem}")

    @staticmethod
    def _no_interface(name: str, addresses: Mapping[str, Any], of: str = "") -> str:
        known = ", ".join(sorted(known for known in addresses if known != "lo")) or "none"
        return f"interface {name} {of}does not exist on this node: correct the name (it has: {known})"

    # --- priority ---

    def _priority(self, host: str) -> None:
        value = self.nodes[host].get("priority")
        lowest = 1 - self.track_weight
        if value in (None, ""):
            if any(node.get("priority") not in (None, "") for node in self.nodes.values()):
                self.add(
                    host,
                    "priority",
                    f"is missing: choose {lowest} to 254, different on each node, or leave it out on all of them",
                )
            return  # of none of them: they are made by vrrp_priority
        number = as_int(value)
        if number is None or not lowest <= number <= 254:
            self.add(
                host,
                "priority",
                f"{value!r} is not {lowest} to 254: choose one of these ({-self.track_weight} is taken off a node"
                " that is not ready)",
            )

    def _priorities(self) -> None:
        known: Dict[int, str] = {}
        for host, node in self.nodes.items():
            number = as_int(node.get("priority")) if node.get("priority") is not None else None
            if number is None:
                continue
            if number in known:
                self.add(
                    host,
                    "priority",
                    f"{number} is also the priority of {known[number]}: give each node a different one",
                )
            known.setdefault(number, host)
        in_range = [number for number in known if 1 - self.track_weight <= number <= 254]
        if len(in_range) > 1 and max(in_range) - min(in_range) >= -self.track_weight:
            high, low = max(in_range), min(in_range)
            self.add(
                known[high],
                "priority",
                f"{high} is {high - low} above {known[low]}'s {low}: keep the difference below {-self.track_weight}, or"
                f" {known[high]} would win against a better informed {known[low]} even when it is not ready",
            )

    # --- sync link ---

    def _links(self, host: str) -> List[_Link]:
        """The sync links of a node; what is no list of dictionaries is none."""
        node = self.nodes[host]
        listed = node.get("sync_links")
        if not listed:
            names = ("sync_interface", "sync_address", "sync_port")
            return [_Link(*(node.get(name) for name in names), *names)]
        if isinstance(listed, (str, bytes, Mapping)) or not isinstance(listed, Sequence):
            return []
        found = []
        for index, link in enumerate(listed):
            if isinstance(link, Mapping):
                keys = ("interface", "address", "port")
                port = node.get("sync_port") if link.get("port") is None else link["port"]
                option = f"{VARIABLES['sync_links']}[{index}]"
                names = (*(f"{option}.{key}" for key in keys),)
                found.append(_Link(link.get("interface"), link.get("address"), port, *names))
        return found

    def _sync(self, host: str) -> None:
        node = self.nodes[host]
        listed = node.get("sync_links")
        links = self._links(host)
        if listed and (isinstance(listed, (str, Mapping)) or len(links) != len(listed)):
            self.add(host, "sync_links", "is not a list of dictionaries: write interface and address of each link")
        if listed and (node.get("sync_interface") or node.get("sync_address")):
            self.add(
                host,
                "sync_links",
                f"stands beside {VARIABLES['sync_interface']} or {VARIABLES['sync_address']}: keep one of the two ways",
            )
        for link in links:
            self._sync_link(host, link)
        for index, link in enumerate(links):
            for other in links[:index]:
                if link.interface and link.interface == other.interface:
                    text = f"{link.interface} stands twice: one failure would take both links away, name another one"
                    self.add(host, link.interface_option, text)
                if link.address and link.address == other.address:
                    self.add(host, link.address_option, f"{link.address} stands twice: each link has its own address")

    def _sync_link(self, host: str, link: _Link) -> None:
        addresses = self.addresses.get(host)
        name = str(link.interface or "")
        if not name:
            self.add(host, link.interface_option, "is missing: name the interface of the link between the firewalls")
        elif addresses is not None and name not in addresses:
            self.add(host, link.interface_option, self._no_interface(name, addresses))
        port = as_int(link.port)
        if port is None or not 1 <= port <= 65535:
            self.add(host, link.port_option, f"{link.port!r} is not a UDP port: choose 1 to 65535")
        text = str(link.address or "")
        if not text:
            self.add(host, link.address_option, "is missing: name this node's own address on the sync interface")
            return
        try:
            address = ipaddress.ip_address(text)
        except ValueError:
            self.add(host, link.address_option, f"{text!r} is not an IP address (write it without a prefix length)")
            return
        if addresses is None or name not in addresses:
            return
        if address not in [own.ip for own in addresses[name]]:
            shown = ", ".join(str(own) for own in addresses[name]) or "none"
            text = f"{text} is not configured on {name} (it has: {shown}): configure or correct it"
            self.add(host, link.address_option, text)

    def _sync_group(self) -> None:
        links = {host: self._links(host) for host in self.nodes}
        if len({len(listed) for listed in links.values()}) > 1:
            shown = ", ".join(f"{host}: {len(listed)}" for host, listed in links.items())
            self.say(
                "",
                f"{VARIABLES['sync_links']}: the nodes have different numbers of sync links ({shown}): name the same"
                " links on all nodes, in the same order",
            )
            return
        known: Dict[str, str] = {}
        networks: List[Dict[str, Any]] = []
        for host, listed in links.items():
            for link in listed:
                text = str(link.address or "")
                if text and known.get(text, host) != host:
                    text = f"{text} is also the sync address of {known[text]}: each node has its own"
                    self.add(host, link.address_option, text)
                known.setdefault(text, host)
        for number in range(min((len(listed) for listed in links.values()), default=0)):
            networks.append(self._sync_position({host: listed[number] for host, listed in links.items()}))
        for number, found in enumerate(networks):
            for before in networks[:number]:
                for host, network in found.items():
                    if network == before.get(host):
                        text = f"is in {network} as an earlier link is: give each link a network of its own"
                        self.add(host, links[host][number].address_option, text)

    def _sync_position(self, links: Mapping[str, _Link]) -> Dict[str, Any]:
        """The ends of one link; the network of each, as far as it is known."""
        option = next(iter(links.values()))
        ports = {as_int(link.port) for link in links.values()}
        if len(ports) > 1:
            shown = ", ".join(str(link.port) for link in links.values())
            name = VARIABLES.get(option.port_option, option.port_option)
            self.say("", f"{name}: differs between the nodes ({shown}): set it once for all")
        networks: Dict[str, Any] = {}
        for host, link in links.items():
            for own in self.addresses.get(host, {}).get(str(link.interface), ()):
                if str(own.ip) == str(link.address):
                    networks[host] = own.network
        if len(set(networks.values())) > 1:
            shown = ", ".join(f"{host}: {network}" for host, network in networks.items())
            name = VARIABLES.get(option.address_option, option.address_option)
            self.say(
                "",
                f"{name}: the sync addresses are not in one network ({shown}): connect the sync interfaces directly or"
                " by a switch, with addresses of one network",
            )
        return networks

    def _alike(self) -> None:
        """What belongs to the group as a whole: ``alike`` of each node has the variables by name."""
        first: Dict[str, Tuple[str, Any]] = {}
        for host, node in self.nodes.items():
            for name, value in (node.get("alike") or {}).items():
                other, wanted = first.setdefault(name, (host, value))
                if str(value) != str(wanted):
                    shown = "" if name in SECRET else f" ({other}: {wanted}, {host}: {value})"
                    self.say("", f"{name}: differs between the nodes{shown}: set it once for the whole group")

    # --- key ---

    def _key(self, host: str) -> None:
        node = self.nodes[host]
        key = self._key_summary(host)
        remedy = "make one with: openssl rand -base64 32"
        if not key["given"]:
            self.add(host, "key", f"is missing: {remedy}, and keep it in Ansible Vault")
        elif not key["valid"]:
            self.add(host, "key", f"is not base64: {remedy}")
        elif key["bytes"] < MINIMUM_KEY_BYTES:
            self.add(host, "key", f"is too short: {key['bytes']} bytes, and {MINIMUM_KEY_BYTES} are needed: {remedy}")
        number = as_int(node.get("key_id"))
        if number is None or not 1 <= number <= 255:
            self.add(host, "key_id", f"{node.get('key_id')!r} is not 1 to 255: choose one of these")
        elif not node.get("rotation"):
            self._key_change(host, number, str(key.get("fingerprint") or ""))

    def _key_change(self, host: str, number: int, fingerprint: str) -> None:
        """A running pair gets another key step by step only: at once, the nodes would not understand each other."""
        node = self.nodes[host]
        held = ((node.get("host") or {}).get("ctsyncd") or {}).get("keys") or {}
        if not held:
            return
        listed = {as_int(entry) for entry in node.get("key_ids") or ()} | {number}
        ids = " and ".join(sorted(held, key=int))
        if str(number) not in held:
            self.add(
                host,
                "key_id",
                f"{number} is not among the keys that this node runs with ({ids}), and a change at once would cut the"
                " replication: run the playbook rotate_key",
            )
        elif fingerprint and held[str(number)] not in ("", fingerprint):
            self.add(
                host,
                "key",
                f"is not the key that this node runs with under the id {number}: give a new key an id of its own"
                " (ha_firewall_key_id) and run the playbook rotate_key",
            )
        elif any(as_int(known) not in listed for known in held):
            self.add(
                host,
                "key_id",
                f"a key rotation is half done, this node accepts the keys {ids}: complete it by the playbook"
                " rotate_key",
            )

    def _key_summary(self, host: str) -> Mapping[str, Any]:
        key = self.nodes[host].get("key")
        return key if isinstance(key, Mapping) else summarize_key(key)

    def _keys(self) -> None:
        hosts = list(self.nodes)
        prints = {host: self._key_summary(host)["fingerprint"] for host in hosts}
        known = [host for host in hosts if prints[host]]
        for host in known[1:]:
            if prints[host] != prints[known[0]]:
                self.add(host, "key", f"is not the key of {known[0]}: set it once for the whole group")
        ids = {host: as_int(self.nodes[host].get("key_id")) for host in hosts}
        for host in hosts[1:]:
            if ids[host] != ids[hosts[0]]:
                self.add(
                    host, "key_id", f"{ids[host]} differs from {hosts[0]}'s {ids[hosts[0]]}: set it once for the group"
                )

    # --- rules and host ---

    def _rules(self, host: str) -> None:
        node = self.nodes[host]
        for sentence in node.get("option_problems") or ():
            self.say(host, str(sentence))
        for option, family in (("rules", "ipv4"), ("rules6", "ipv6")):
            rules = node.get(option) or []
            if not isinstance(rules, (list, tuple)) or any(not isinstance(rule, str) for rule in rules):
                self.add(host, option, "is not a list of rules: write each as one text, the arguments of iptables")
                continue
            for problem in _ruleset.lint_rules(list(rules), family, VARIABLES[option]):
                self.say(host, problem)
        for words in node.get("rules_errors") or ():
            self._rules_error(host, str(words), str(node.get("services_variable") or "ruleset_services"))
        for words in node.get("kernel_errors") or ():
            words = _without_outcome(re.sub(r"^sysctls\[\d+\]\.(name|value): ", "", words))
            option = "kernel_modules" if words.startswith("The kernel has no module") else _option_of(words)
            self.say(host, f"{option}: {words}")

    def _rules_error(self, host: str, words: str, services: str) -> None:
        """One mistake as the ruleset module says it, whose options are called otherwise; its lines may be many."""
        words = _without_outcome(words)
        option = re.match(r"[a-z_0-9]+", words)
        name = option[0] if option and words[option.end() : option.end() + 1] in (":", "[") else ""
        if name == "services":
            self.say(host, services + words[len(name) :])
        elif name in RULESET_OPTIONS:
            self.say(host, f"{VARIABLES.get(name, 'ruleset_' + name)}{words[len(name) :]}")
        else:
            self.add(host, "rules", words)

    def _host(self, host: str) -> None:
        facts = self.facts.get(host) or {}
        version = ((facts.get("python") or {}).get("version")) or {}
        if version and (version.get("major", 0), version.get("minor", 0)) < MINIMUM_PYTHON:
            self.add(
                host,
                "ansible_python_interpreter",
                f"is Python {version.get('major')}.{version.get('minor')}, and the daemon needs 3.9: install a newer"
                " one and name it here",
            )
        if not self.nodes[host].get("any_platform") and not supported(facts):
            release = " ".join(str(facts.get(key) or "") for key in ("distribution", "distribution_version")).strip()
            self.add(
                host,
                "platform",
                f"is {release}; supported are {PLATFORM_NAMES}: use one of those, or say"
                " preflight_any_platform: true and try it first on hosts that nobody needs",
            )
        probe = self.nodes[host].get("host") or {}
        if not probe.get("systemd", facts.get("service_mgr") in (None, "systemd")):
            name = facts.get("service_mgr") or "another"
            self.add(host, "systemd", f"is not the running init ({name} is): this collection needs systemd")
        if probe and not probe.get("conntrack", True):
            self.add(
                host,
                "kernel",
                "has no connection tracking (/proc/sys/net/netfilter/nf_conntrack_max is missing and the module"
                " nf_conntrack_netlink cannot be loaded): install the kernel's netfilter modules",
            )
        held = probe.get("sysctls") or {}
        if held.get("net.netfilter.nf_conntrack_max") and not held.get("net.netfilter.nf_conntrack_events"):
            self.add(
                host,
                "kernel",
                "tells nobody of connections (net.netfilter.nf_conntrack_events is missing): boot a kernel that was"
                " built with CONFIG_NF_CONNTRACK_EVENTS, as those of the distributions are",
            )
        if not self.nodes[host].get("migrate"):
            self._conntrackd(host, probe)

    def _conntrackd(self, host: str, probe: Mapping[str, Any]) -> None:
        daemon = probe.get("conntrackd") or {}
        remedy = "take over from it with -e migrate=true, or systemctl disable --now conntrackd"
        if daemon.get("pids") or daemon.get("active"):
            pids = f" (process {', '.join(map(str, daemon['pids']))})" if daemon.get("pids") else ""
            self.add(
                host,
                "conntrackd",
                f"is active{pids}; two daemons must not write into one table: {remedy}",
            )
        elif daemon.get("enabled"):
            self.add(
                host,
                "conntrackd",
                f"is not active, but would start at the next boot; two daemons must not write into one table: {remedy}",
            )

    # --- what both hosts must have in common ---

    def _sysctls(self) -> None:
        """What decides how a kernel keeps a flow: as it will be when the role kernel has run."""
        values: Dict[str, Dict[str, Any]] = {}
        for host, node in self.nodes.items():
            held = (node.get("host") or {}).get("sysctls") or {}
            rows = [row for row in node.get("sysctls") or () if isinstance(row, Mapping)]
            rows = [row for row in rows if {"name", "value"} <= set(row)]
            wanted = {str(row["name"]): " ".join(str(row["value"]).split()) for row in rows}
            names = [name for name in held if name not in ROLE_SYSCTLS]
            values[host] = {name: wanted.get(name, held.get(name)) for name in {*names, *(wanted if held else ())}}
        for sentence in sysctl_differences(values):
            self.say("", sentence)

    def _clocks(self) -> None:
        """Ages of sessions and the nodes' logs are compared by their clocks. Nothing else depends on them."""
        ahead = {}
        for host, node in self.nodes.items():
            told, asked = (node.get("host") or {}).get("time"), node.get("asked_at")
            if told and asked:
                ahead[host] = float(told) - float(asked)
        if len(ahead) < 2:
            return
        first, last = min(ahead, key=lambda host: ahead[host]), max(ahead, key=lambda host: ahead[host])
        limit = max(float(node.get("clock_skew_s") or CLOCK_SKEW_S) for node in self.nodes.values())
        skew = ahead[last] - ahead[first]
        if skew > limit:
            self.say(
                last,
                f"clock: is {skew:.0f} s ahead of {first}'s, and more than {limit:.0f} s make the ages of sessions and"
                " the logs of the nodes useless: let both follow one time server",
            )

    def _duplicate_addresses(self) -> None:
        """An address that two nodes show, or a virtual IP that is a node's fixed address, is an address conflict."""
        virtual = {str(vip.address.ip) for vips in self.vips.values() for vip in vips}
        holders: Dict[str, Tuple[str, str]] = {}
        for host, interfaces in self.addresses.items():
            for name, addresses in interfaces.items():
                for own in addresses:
                    plain = str(own.ip)
                    if own.ip.is_loopback or own.ip.is_link_local or plain in virtual:
                        continue
                    other, where = holders.setdefault(plain, (host, name))
                    if other != host and host in self.nodes and other in self.nodes:
                        if self._is_shared_bridge(name, where):
                            continue
                        self.say(host, f"{name}: has the address {plain} of {other}'s {where}: give each node its own")
        for host in self.nodes:
            for link in self._links(host):
                if str(link.address or "") in virtual:
                    self.add(host, link.address_option, f"{link.address} is a virtual IP: name the node's own address")

    @staticmethod
    def _is_shared_bridge(*names: str) -> bool:
        """Container engines give their host bridges the same address on every machine; these never meet."""
        return all(name.startswith(("docker", "br-", "virbr", "podman", "cni", "lxcbr", "lxdbr")) for name in names)


def _option_of(words: str) -> str:
    """The variable that a message of the module kernel_settings is about, by the key that it names."""
    key = re.search(r"\bnet[./]netfilter[./]\w+", words)
    return _conntrack_settings.option_of(key[0] if key else "")


def _without_outcome(words: str) -> str:
    """A module's message without what it says of its own run."""
    return words.replace(" Nothing was changed.", "").strip()


def sysctl_differences(values: Mapping[str, Mapping[str, Any]]) -> List[str]:
    """One sentence for each sysctl that the nodes have, but not with the same value; ``values`` by host."""
    reasons = []
    for name in sorted({name for held in values.values() for name in held}):
        found = {host: held.get(name) for host, held in values.items()}
        if None in found.values() or len(set(found.values())) < 2:
            continue
        each = ", ".join(f"{host}: {value}" for host, value in found.items())
        option = _conntrack_settings.option_of(name)
        reasons.append(f"{name} differs ({each}): set it once for the group in {option}")
    return reasons


def group_problems(
    nodes: Mapping[str, Mapping[str, Any]],
    facts: Optional[Mapping[str, Mapping[str, Any]]] = None,
    track_weight: int = _keepalived.DEFAULT_WEIGHT,
    absent: Sequence[str] = (),
) -> List[str]:
    """Everything that is wrong with a pair of firewalls, one sentence each; empty when all is well.

    ``nodes``: host name to options (keys of :data:`VARIABLES`; ``key`` may be a key or :func:`summarize_key`'s result;
    ``host`` is the probe of ha_facts' subset ``host``, ``asked_at`` the controller's clock when it was made;
    ``rules_errors`` and ``kernel_errors`` what the modules ruleset and kernel_settings said, ``option_problems`` whole
    sentences of :func:`_options.judge`; ``sysctls`` what will be set; ``key_ids`` more keys that are wanted;
    ``alike`` variables that all nodes must have in common; ``rotation`` and ``migrate`` allow what these playbooks
    are for).
    ``facts``: host name to ``ansible_facts``; what needs facts is not checked for a host without.
    ``absent``: nodes that the present run leaves out.
    """
    group = _Group(nodes, facts or {}, track_weight)
    for host in absent:
        group.say(
            host,
            "takes no part in this run, and half a pair is not deployed: run it for the whole group, without --limit"
            " (where it is dead, and the other node has to be changed alone: -e preflight_without_standby=true)",
        )
    return group.check()


def vrrp_instances(
    virtual_ips: Sequence[Mapping[str, Any]], facts: Mapping[str, Mapping[str, Any]], node: str, unicast: bool = True
) -> List[Dict[str, Any]]:
    """The ``instances`` of the keepalived module for one node of the group.

    One instance for each interface, router id and family, in the order of the list. ``facts`` are the
    ``ansible_facts`` of all nodes, ``node`` included. Raises ValueError naming host and remedy when a node has no own
    address in the virtual IP's network; then there is nobody to send the advertisements to.
    """
    entries = _vrrp_numbers.with_router_ids(virtual_ips)
    parsed = [(entry, ipaddress.ip_interface(str(entry["address"]))) for entry in entries]
    virtual = [address.ip for dummy, address in parsed]
    addresses = {host: interface_addresses(known) for host, known in facts.items()}
    instances: Dict[Tuple[str, int, int], Dict[str, Any]] = {}
    names: List[str] = []
    for entry, address in parsed:
        interface, router = str(entry["interface"]), int(entry["router_id"])
        key = (interface, router, address.version)
        if key in instances:
            instances[key]["virtual_ips"].append(str(address))
            continue
        name = _keepalived.default_instance_name(interface, address.version)
        if name in names:
            name = f"{name}_{router}"
        names.append(name)
        instance: Dict[str, Any] = {
            "name": name,
            "interface": interface,
            "router_id": router,
            "virtual_ips": [str(address)],
        }
        if unicast:
            found = {host: _address_in(known, interface, address, virtual) for host, known in addresses.items()}
            found[node] = own_address(interface, address, addresses.get(node, {}), virtual)
            missing = [host for host, own in found.items() if not own]
            if missing:
                raise ValueError(
                    f"{', '.join(missing)}: no own address in {address.network} of the virtual IP {address.ip}:"
                    " configure one, gather facts of all nodes, or set keepalived_unicast to false"
                )
            instance["unicast_src_ip"] = found[node]
            instance["unicast_peers"] = [own for host, own in found.items() if host != node]
        instances[key] = instance
    return list(instances.values())


def vrrp_peers(
    virtual_ips: Sequence[Mapping[str, Any]], facts: Mapping[str, Mapping[str, Any]]
) -> List[Dict[str, Any]]:
    """Who may send VRRP on which interface: the own addresses of the other nodes, whose ``facts`` these are.

    Unicast goes out with the address in the virtual IP's network, multicast with the first (IPv4) or the link-local one
    (IPv6): all of the family on that interface are taken.  Raises ValueError naming host and remedy when there is none.
    """
    parsed = [(str(entry["interface"]), ipaddress.ip_interface(str(entry["address"]))) for entry in virtual_ips]
    virtual = {address.ip for _interface, address in parsed}
    found: Dict[str, List[str]] = {}
    for host, known in facts.items():
        interfaces = interface_addresses(known)
        for interface, vip in parsed:
            there = _interface_for(interfaces, interface, vip, virtual)
            own = [
                each.ip for each in interfaces.get(there, ()) if each.version == vip.version and each.ip not in virtual
            ]
            if not own:
                raise ValueError(
                    f"The address of {host} on {interface} is not known. Run without --limit, gather the facts of all"
                    " firewalls first, or give ruleset_vrrp_peers."
                )
            listed = found.setdefault(interface, [])
            listed += [str(address) for address in own if str(address) not in listed]
    return [{"interface": interface, "addresses": addresses} for interface, addresses in found.items()]


def facts_from_rules(
    ruleset: Mapping[str, Any], virtual_ips: Sequence[Mapping[str, Any]], facts: Mapping[str, Mapping[str, Any]]
) -> Dict[str, Dict[str, Any]]:
    """What :func:`vrrp_peers` and :func:`vrrp_instances` need of nodes that cannot be asked: their addresses.

    ``ruleset`` is what ha_facts has read on a node that lives: its rules accept VRRP from each address of each peer, in
    the order of the group.  ``facts``: ``ansible_facts`` of all other nodes, in the order of the group, empty for those
    that cannot be asked.  Of several such nodes an address is told only where each has exactly one of its kind.
    """
    absent = [host for host, known in facts.items() if not known.get("interfaces")]
    if not absent:
        return {}
    present = {str(own.ip) for known in facts.values() for rows in interface_addresses(known).values() for own in rows}
    networks = [
        (str(entry["interface"]), ipaddress.ip_interface(str(entry["address"])).network) for entry in virtual_ips
    ]
    kinds: Dict[Tuple[str, Any], List[Any]] = {}
    for name, address in _vrrp_sources(ruleset):
        if str(address) in present:
            continue
        here = [network for interface, network in networks if interface == name and address in network]
        network = (
            here[0]
            if here
            else ipaddress.ip_network(f"{address}/{64 if address.is_link_local else address.max_prefixlen}", False)
        )
        kinds.setdefault((name, network), []).append(address)
    found: Dict[str, Dict[str, Any]] = {}
    for (name, network), addresses in kinds.items():
        if len(absent) > 1 and len(addresses) != len(absent):
            continue
        for number, address in enumerate(addresses):
            known = found.setdefault(absent[number if len(absent) > 1 else 0], {"interfaces": []})
            if name not in known["interfaces"]:
                known["interfaces"].append(name)
            entry = known.setdefault(facts_key(name), {"ipv4": {}, "ipv4_secondaries": [], "ipv6": []})
            row = {"address": str(address), "prefix": str(network.prefixlen)}
            if address.version == 6:
                entry["ipv6"].append(row)
            elif entry["ipv4"]:
                entry["ipv4_secondaries"].append(row)
            else:
                entry["ipv4"] = row
    return found


_VRRP_SOURCE = re.compile(rf'-s (\S+?)/\d+ -i (\S+) .*--comment "{_ruleset.NODE_COMMENT}, VRRP of a peer" -j ACCEPT')


def _vrrp_sources(ruleset: Mapping[str, Any]) -> List[Tuple[str, Any]]:
    """Interface and address of each rule of :mod:`_ruleset` that accepts VRRP, as ha_facts has read them."""
    found = []
    for part in (ruleset, ruleset.get("ipv6") or {}):
        chain = ((part.get("chains") or {}).get("filter") or {}).get(_ruleset.own_chain("INPUT")) or {}
        for entry in chain.get("rules") or ():
            rule = _VRRP_SOURCE.search(str(entry.get("rule")))
            if rule:
                found.append((rule[2], ipaddress.ip_address(rule[1])))
    return found


def _interface_for(interfaces: Mapping[str, Sequence[Interface]], name: str, vip: Interface, virtual: Any) -> str:
    """How a node calls the interface of a virtual IP: by the same name, or it is the one in that network."""
    for candidate in (name, *interfaces):
        if own_address(candidate, vip, interfaces, virtual):
            return candidate
    return name


def _address_in(
    addresses: Mapping[str, Sequence[Interface]], interface: str, vip: Interface, virtual: Sequence[Any]
) -> str:
    """The own address on that interface; a peer may name the interface differently, so then anywhere in the network."""
    found = own_address(interface, vip, addresses, virtual)
    if found:
        return found
    for name in addresses:
        found = own_address(name, vip, addresses, virtual)
        if found:
            return found
    return ""
