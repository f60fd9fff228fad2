# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""keepalived.conf as text: check the options, render one sync group, read such a file back, explain exit codes.

This module is private to the collection. It reads no file and runs no command.

What the rendered file relies on, tried with keepalived 2.2.7 in two network namespaces (tests/integration):

* All instances are ``state BACKUP``; with ``nopreempt`` a node that comes back stays BACKUP whatever its priority.
* The sync group tracks the readiness file with a negative weight (``sync_group_tracking_weight``): a node that is not
  ready has a lower priority, never FAULT, so that two nodes that are not ready still elect one. The ``track_file``
  block stands before the group, or the group does not find it.
* ``init_file 1`` makes the file as "not ready" only when it is missing; it never touches an existing one.
* A sync group needs two members: with fewer the config test fails. One instance is rendered without a group.
* ``tmp_config_directory`` must stay away: with it a reload of 2.2.7 reads nothing, drops all instances and their VIPs.

Sources: keepalived.conf(5), keepalived(8) of 2.2.7.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

from . import _vrrp_tracking as tracking

CONFIG_PATH = "/etc/keepalived/keepalived.conf"
DROPIN_PATH = "/etc/systemd/system/keepalived.service.d/ctsync.conf"
PROTOCOL_NOTE = "/etc/iproute2/rt_addrprotos.d/keepalived.conf"
PROTOCOL_NOTE_MARK = "# added by keepalived"
NOTIFY_FIFO = "/run/ctsync/notify.fifo"
TRACK_FILE = "/run/ctsync/not-ready"
MARKER_START = "# Managed by Ansible: ctsync.ha_firewall.keepalived"
MARKER = MARKER_START + ". Changes in this file get lost."
BEFORE_PREFIX = "# Before: "
TRACK_NAME = "ctsync_not_ready"
DEFAULT_WEIGHT = -60

# Releases before this one do not know the keywords that are rendered only for it and later ones.
SINCE_HARDENING = (2, 2, 7)
MAX_NAME = 63
MAX_ADVERT_S = 40.95  # RFC 5798 5.2.7: 12 bits of centiseconds

# keepalived's own enum (lib/bitops.h, lib/scheduler.h), as seen from --config-test
EXIT_MEANINGS = {
    1: "keepalived ran out of memory or could not start",
    2: "keepalived could not start",
    3: "keepalived could not start",
    4: "keepalived could not run with this configuration",
    5: "the configuration has errors: an unknown keyword, a missing interface, or something keepalived would ignore",
    6: "scripts are configured without enable_script_security, or a script may be changed by others than root",
}

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
_INTERFACE = re.compile(r"[^\s/:%{}\"'#!\x00-\x1f\x7f]{1,15}")  # IFNAMSIZ is 16 with the final NUL
_PATH = re.compile(r"/[^\s{}\"'#!\x00-\x1f\x7f]+")

Interface = Union[ipaddress.IPv4Interface, ipaddress.IPv6Interface]


class ConfigProblem(Exception):
    """The options do not make a configuration; ``problems`` has every reason, each naming option and remedy."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = list(problems)


@dataclass(frozen=True)
class Garp:
    """Gratuitous ARP and unsolicited neighbour advertisement; delays in seconds, repeats in packets.

    ``interval``: least time between two packets on one interface, in seconds; 0 for none.
    """

    master_delay: int = 1
    master_repeat: int = 5
    refresh: int = 2
    lower_prio_delay: int = 1
    lower_prio_repeat: int = 5
    refresh_repeat: int = 1
    interval: float = 0.0


@dataclass(frozen=True)
class Instance:
    """One VRRP instance. ``advert_interval`` in seconds."""

    name: str
    interface: str
    router_id: int
    priority: int
    virtual_ips: Tuple[str, ...]
    advert_interval: float
    unicast_src_ip: str = ""
    unicast_peers: Tuple[str, ...] = ()

    @property
    def version(self) -> int:
        """IP version of the virtual addresses: 4 or 6."""
        return ipaddress.ip_interface(self.virtual_ips[0]).version


@dataclass(frozen=True)
class Config:
    """Everything that is rendered. ``startup_delay`` and ``preempt_delay`` in seconds."""

    node: str
    group: str
    instances: Tuple[Instance, ...]
    nopreempt: bool = True
    preempt_delay: float = 0.0
    startup_delay: float = 0.0
    garp: Garp = field(default_factory=Garp)
    notify_fifo: str = NOTIFY_FIFO
    track_file: str = TRACK_FILE
    track_weight: int = DEFAULT_WEIGHT
    realtime_priority: int = 0
    track_interfaces: Tuple[tracking.TrackedInterface, ...] = ()
    bfd: Tuple[tracking.Neighbour, ...] = ()
    authentication: Optional[tracking.Authentication] = None

    @property
    def weighs(self) -> bool:
        """Whether anything lowers the priority of the group."""
        return bool(self.track_file) or any(entry.weight for entry in (*self.track_interfaces, *self.bfd))


class Before(NamedTuple):
    """What the service was before this collection took it over; kept as a comment in the file."""

    active: bool
    enabled: bool


def default_instance_name(interface: str, version: int) -> str:
    """The name of an instance that was given none: VI_eth1, or VI_eth1_6 for IPv6."""
    return f"VI_{interface}" + ("_6" if version == 6 else "")


def _check_address(text: Any, option: str, problems: List[str]) -> Optional[Interface]:
    try:
        parsed = ipaddress.ip_interface(str(text))
    except ValueError:
        problems.append(f"{option}: {text!r} is not an IP address with prefix length, such as 192.168.0.100/24")
        return None
    if "/" not in str(text):
        problems.append(
            f"{option}: {text} has no prefix length: write for example {text}/{24 if parsed.version == 4 else 64}"
        )
        return None
    return parsed


def _check_plain(text: str, option: str, problems: List[str]) -> Optional[int]:
    try:
        return ipaddress.ip_address(text).version
    except ValueError:
        problems.append(f"{option}: {text!r} is not an IP address (write it without a prefix length)")
        return None


def _check_range(value: float, low: float, high: float, option: str, problems: List[str]) -> None:
    if not low <= value <= high:
        problems.append(f"{option}: {value:g} is out of range: choose {low:g} to {high:g}")


def _check_interval(value: float, option: str, problems: List[str]) -> None:
    _check_range(value, 0.01, MAX_ADVERT_S, option, problems)
    if abs(value * 100 - round(value * 100)) > 1e-6:
        problems.append(f"{option}: {value:g} is not a multiple of 0.01 seconds, the unit of VRRPv3: round it")


def _build_instance(
    number: int, raw: Mapping[str, Any], params: Mapping[str, Any], problems: List[str]
) -> Optional[Instance]:
    where = f"instances[{number}]"
    interface = str(raw.get("interface") or "")
    before = len(problems)
    if not _INTERFACE.fullmatch(interface):
        problems.append(f"{where}.interface: {interface!r} is not an interface name (1 to 15 characters)")
    addresses = list(raw.get("virtual_ips") or ())
    if not addresses:
        problems.append(f"{where}.virtual_ips: is empty: name at least one address with its prefix length")
    versions = set()
    for position, address in enumerate(addresses):
        parsed = _check_address(address, f"{where}.virtual_ips[{position}]", problems)
        if parsed is not None:
            versions.add(parsed.version)
    if len(versions) > 1:
        problems.append(f"{where}.virtual_ips: mixes IPv4 and IPv6: give each family an instance of its own")
    priority = raw.get("priority")
    if priority is None:
        priority = params.get("priority")
    if priority is None:
        problems.append(f"{where}.priority: is missing: set it here or set the option priority for all instances")
        priority = 0
    else:
        # 255 is the address owner's, whose priority no weight may change
        _check_range(priority, 1, 254, f"{where}.priority", problems)
    router_id = raw.get("router_id")
    if router_id is None:
        problems.append(f"{where}.router_id: is missing: choose 1 to 255, the same on all nodes")
        router_id = 0
    else:
        _check_range(router_id, 1, 255, f"{where}.router_id", problems)
    interval = raw.get("advert_interval")
    if interval is None:
        interval = params.get("advert_interval", 0.1)
    _check_interval(interval, f"{where}.advert_interval", problems)
    source = str(raw.get("unicast_src_ip") or "")
    peers = tuple(str(peer) for peer in raw.get("unicast_peers") or ())
    if source:
        found = _check_plain(source, f"{where}.unicast_src_ip", problems)
        if found and len(versions) == 1 and found not in versions:
            problems.append(f"{where}.unicast_src_ip: {source} is not of the family of the virtual addresses")
    for position, peer in enumerate(peers):
        found = _check_plain(peer, f"{where}.unicast_peers[{position}]", problems)
        if found and len(versions) == 1 and found not in versions:
            problems.append(f"{where}.unicast_peers[{position}]: {peer} is not of the family of the virtual addresses")
    if peers and not source:
        problems.append(
            f"{where}.unicast_src_ip: is missing: unicast_peers need this node's own address on {interface}"
        )
    if source and not peers:
        problems.append(
            f"{where}.unicast_peers: is empty: keepalived would silently use multicast; name the peers or leave"
            " unicast_src_ip out"
        )
    if source and source in peers:
        problems.append(f"{where}.unicast_peers: {source} is this node's own address: name the other nodes only")
    plain = {address.split("/")[0] for address in map(str, addresses)}
    for option, values in (("unicast_src_ip", (source,)), ("unicast_peers", peers)):
        for value in values:
            if value and value in plain:
                problems.append(f"{where}.{option}: {value} is a virtual address: use the node's own, fixed address")
    version = 6 if versions == {6} else 4
    name = str(raw.get("name") or default_instance_name(interface, version))
    if not _NAME.fullmatch(name):
        problems.append(f"{where}.name: {name!r}: use letters, digits, '.', '_' and '-', at most {MAX_NAME}")
    if len(problems) > before:
        return None
    return Instance(name, interface, router_id, priority, tuple(map(str, addresses)), float(interval), source, peers)


def _check_uniqueness(instances: Sequence[Instance], problems: List[str]) -> None:
    names: Dict[str, int] = {}
    routers: Dict[Tuple[str, int, int], str] = {}
    addresses: Dict[str, str] = {}
    for number, instance in enumerate(instances):
        if instance.name in names:
            problems.append(
                f"instances[{number}].name: {instance.name} is also the name of instances[{names[instance.name]}]:"
                " names must differ"
            )
        names.setdefault(instance.name, number)
        key = (instance.interface, instance.router_id, instance.version)
        if key in routers:
            problems.append(
                f"instances[{number}].router_id: {instance.router_id} is used twice on {instance.interface}"
                f" ({routers[key]}, {instance.name}): choose different ones"
            )
        routers.setdefault(key, instance.name)
        for address in instance.virtual_ips:
            plain = str(ipaddress.ip_interface(address).ip)
            if plain in addresses:
                problems.append(
                    f"instances[{number}].virtual_ips: {plain} is also in {addresses[plain]}: an address belongs to"
                    " one instance"
                )
            addresses.setdefault(plain, instance.name)


def build_config(params: Mapping[str, Any]) -> Config:
    """Check the module's options and make a :class:`Config` of them.

    Raises :class:`ConfigProblem` with every problem at once.
    """
    problems: List[str] = []
    raw_instances = list(params.get("instances") or ())
    if not raw_instances:
        problems.append("instances: is empty: name at least one VRRP instance")
    built = [_build_instance(number, raw, params, problems) for number, raw in enumerate(raw_instances)]
    instances = tuple(instance for instance in built if instance is not None)
    _check_uniqueness(instances, problems)
    group = str(params.get("group") or "ha_firewall")
    if not _NAME.fullmatch(group):
        problems.append(f"group: {group!r}: use letters, digits, '.', '_' and '-', at most {MAX_NAME}")
    node = str(params.get("node") or "")
    if not _NAME.fullmatch(node):
        problems.append(f"node: {node!r}: use letters, digits, '.', '_' and '-', at most {MAX_NAME}")
    priorities = sorted({instance.priority for instance in instances})
    if len(priorities) > 1:
        problems.append(
            f"instances: priorities {priorities} differ within one sync group, which fails over as a whole:"
            " set the option priority once"
        )
    weight = params.get("track_weight", DEFAULT_WEIGHT)
    track_file = str(params.get("track_file") or "")
    fifo = str(params.get("notify_fifo") or "")
    for option, value in (("track_file", track_file), ("notify_fifo", fifo)):
        if value and not _PATH.fullmatch(value):
            problems.append(f"{option}: {value!r} is not an absolute path without blanks and quotes")
    if track_file:
        _check_range(weight, -253, -1, "track_weight", problems)
        low = [priority for priority in priorities if priority + weight < 1]
        if low and -253 <= weight < 0:
            problems.append(
                f"priority: {low[0]} with track_weight {weight} is below 1 when the node is not ready:"
                f" choose at least {1 - weight}"
            )
    startup_delay = float(params.get("startup_delay") or 0)
    preempt_delay = float(params.get("preempt_delay") or 0)
    nopreempt = bool(params.get("nopreempt", True))
    _check_range(startup_delay, 0, 1000, "startup_delay", problems)
    _check_range(preempt_delay, 0, 1000, "preempt_delay", problems)
    if preempt_delay and nopreempt:
        problems.append("preempt_delay: has no effect with nopreempt: leave it out or set nopreempt to false")
    realtime = int(params.get("realtime_priority") or 0)
    _check_range(realtime, 0, 99, "realtime_priority", problems)
    garp_options = {key: value for key, value in (params.get("garp") or {}).items() if value is not None}
    garp = Garp(**garp_options)
    for key, low_limit, high_limit in (
        ("master_delay", 0, 86400),
        ("master_repeat", 1, 1000),
        ("refresh", 0, 86400),
        # 0 switches the repetition off, and half of the healed splits then leave ARP at the loser
        ("lower_prio_delay", 1, 86400),
        ("lower_prio_repeat", 1, 1000),
        ("refresh_repeat", 1, 1000),
        ("interval", 0, 1),
    ):
        _check_range(getattr(garp, key), low_limit, high_limit, f"garp.{key}", problems)
    carriers = [instance.interface for instance in instances]
    tracked = tracking.build_interfaces(params.get("track_interfaces") or (), carriers, problems)
    neighbours = tracking.build_neighbours(params.get("bfd") or (), problems)
    authentication = tracking.build_authentication(params.get("authentication"), problems)
    if problems:
        raise ConfigProblem(problems)
    return Config(
        node=node,
        group=group,
        instances=instances,
        nopreempt=nopreempt,
        preempt_delay=preempt_delay,
        startup_delay=startup_delay,
        garp=garp,
        notify_fifo=fifo,
        track_file=track_file,
        track_weight=weight,
        realtime_priority=realtime,
        track_interfaces=tracked,
        bfd=neighbours,
        authentication=authentication,
    )


class _Writer:
    """Collects indented lines; ``block`` opens a brace, ``end`` closes it."""

    def __init__(self) -> None:
        self.lines: List[str] = []
        self.depth = 0

    def add(self, *words: Any) -> None:
        self.lines.append("    " * self.depth + " ".join(str(word) for word in words))

    def block(self, *words: Any) -> None:
        self.add(*words, "{")
        self.depth += 1

    def end(self) -> None:
        self.depth -= 1
        self.add("}")

    def text(self) -> str:
        return "\n".join(self.lines) + "\n"


def render_config(config: Config, version: Tuple[int, ...] = SINCE_HARDENING, before: Optional[Before] = None) -> str:
    """The text of keepalived.conf for a keepalived of this version; ends with a newline."""
    modern = version >= SINCE_HARDENING
    out = _Writer()
    out.add(MARKER)
    if before is not None:
        out.add(
            BEFORE_PREFIX + f"active={'yes' if before.active else 'no'} enabled={'yes' if before.enabled else 'no'}"
        )
    out.add("")
    out.block("global_defs")
    out.add("router_id", config.node)
    out.add("vrrp_version 3")
    if config.notify_fifo:
        out.add("vrrp_notify_fifo", config.notify_fifo, "root")
        if modern:
            out.add("fifo_write_vrrp_states_on_reload")
    if config.startup_delay:
        out.add("vrrp_startup_delay", f"{config.startup_delay:g}")
    if config.realtime_priority:
        out.add("vrrp_rt_priority", config.realtime_priority)
    # after a healed split the loser says a last word, which makes the winner repeat its gratuitous ARP
    out.add("vrrp_higher_prio_send_advert true")
    out.add("vrrp_garp_master_delay", config.garp.master_delay)
    out.add("vrrp_garp_master_repeat", config.garp.master_repeat)
    out.add("vrrp_garp_master_refresh", config.garp.refresh)
    if config.garp.refresh_repeat != 1:
        out.add("vrrp_garp_master_refresh_repeat", config.garp.refresh_repeat)
    if config.garp.interval:
        out.add("vrrp_garp_interval", f"{config.garp.interval:g}")
        out.add("vrrp_gna_interval", f"{config.garp.interval:g}")
    out.add("vrrp_garp_lower_prio_delay", config.garp.lower_prio_delay)
    out.add("vrrp_garp_lower_prio_repeat", config.garp.lower_prio_repeat)
    out.end()
    grouped = len(config.instances) > 1
    if config.track_file:
        # before the group that names it
        out.add("")
        out.block("track_file", TRACK_NAME)
        out.add(f'file "{config.track_file}"')
        out.add("init_file 1")
        out.end()
    for neighbour in config.bfd:
        out.add("")
        out.block("bfd_instance", neighbour.name)
        out.lines += [f"    {line}" for line in tracking.render_neighbour(neighbour)]
        out.end()
    if grouped:
        out.add("")
        out.block("vrrp_sync_group", config.group)
        out.block("group")
        for instance in config.instances:
            out.add(instance.name)
        out.end()
        _add_tracking(out, config)
        if config.weighs:
            out.add("sync_group_tracking_weight")
        out.end()
    for instance in config.instances:
        out.add("")
        _add_instance(out, config, instance, modern, grouped)
    return out.text()


def _add_tracking(out: _Writer, config: Config) -> None:
    if config.track_file:
        out.block("track_file")
        out.add(TRACK_NAME, "weight", config.track_weight)
        out.end()
    for block, entries in (
        ("track_interface", [(entry.interface, entry.weight) for entry in config.track_interfaces]),
        ("track_bfd", [(entry.name, entry.weight) for entry in config.bfd]),
    ):
        if entries:
            out.block(block)
            for name, weight in entries:
                out.add(tracking.weighted(name, weight))
            out.end()


def _add_instance(out: _Writer, config: Config, instance: Instance, modern: bool, grouped: bool) -> None:
    out.block("vrrp_instance", instance.name)
    out.add("state BACKUP")
    out.add("interface", instance.interface)
    out.add("virtual_router_id", instance.router_id)
    out.add("priority", instance.priority)
    out.add("advert_int", f"{instance.advert_interval:g}")
    if config.nopreempt:
        out.add("nopreempt")
    elif config.preempt_delay:
        out.add("preempt_delay", f"{config.preempt_delay:g}")
    if config.authentication:
        out.block("auth_hmac")
        for line in tracking.render_authentication(config.authentication):
            out.add(line)
        out.end()
    if instance.unicast_peers:
        out.add("unicast_src_ip", instance.unicast_src_ip)
        if modern:
            out.add("check_unicast_src")
            out.add("unicast_ttl 255")  # over IPv6 keepalived 2.2.7 would send with the kernel's hop limit, 64
        out.block("unicast_peer")
        for peer in instance.unicast_peers:
            # routers lower the TTL: 255 proves a sender on this very link
            out.add(peer, *(("min_ttl 255 max_ttl 255",) if modern else ()))
        out.end()
    out.block("virtual_ipaddress")
    for address in instance.virtual_ips:
        out.add(address, "dev", instance.interface)
    out.end()
    if not grouped:
        _add_tracking(out, config)
    out.end()


def render_dropin(path: str = CONFIG_PATH) -> str:
    """The systemd drop-in for keepalived.service. Debian's unit restarts nothing and knows nothing of the daemon."""
    return (
        f"{MARKER}\n"
        "[Unit]\n"
        "# The daemon opens the FIFO first. It is no requirement: alone, keepalived serves.\n"
        "After=ctsyncd.service systemd-tmpfiles-setup.service\n"
        f"ConditionFileNotEmpty={path}\n"
        "# A firewall without VRRP is of no use: try for ever.\n"
        "StartLimitIntervalSec=0\n"
        "\n"
        "[Service]\n"
        "# A killed keepalived leaves its virtual IPs behind: start again at once, which removes them as BACKUP.\n"
        "Restart=on-failure\n"
        "RestartSec=1\n"
    )


def is_ours(text: str) -> bool:
    """Whether this collection wrote the file."""
    return text.startswith(MARKER_START)


def parse_before(text: str) -> Optional[Before]:
    """The :class:`Before` comment of a file of ours, or ``None``."""
    for line in text.splitlines()[:5]:
        if line.startswith(BEFORE_PREFIX):
            words = dict(word.split("=", 1) for word in line[len(BEFORE_PREFIX) :].split() if "=" in word)
            return Before(words.get("active") == "yes", words.get("enabled") == "yes")
    return None


def parse_version(text: str) -> Tuple[int, ...]:
    """The version out of ``keepalived --version`` ("Keepalived v2.2.7 (01/16,2022)"); () when there is none."""
    match = re.search(r"[Kk]eepalived v(\d+)\.(\d+)\.(\d+)", text)
    return tuple(int(part) for part in match.groups()) if match else ()


def explain_exit(code: int) -> str:
    """What an exit code of ``keepalived --config-test`` means."""
    return EXIT_MEANINGS.get(code, f"keepalived ended with exit code {code}")


def clean_test_output(text: str, candidate: str, shown: str) -> str:
    """keepalived's own words, each once, with the candidate's path replaced by the path it stands for."""
    seen = []
    for line in text.replace(candidate, shown).splitlines():
        line = line.strip()
        if line and line not in seen:
            seen.append(line)
    return "\n".join(seen)


class ParsedInstance(NamedTuple):
    """One instance as read from a configuration file."""

    name: str
    interface: str
    priority: int
    router_id: int
    virtual_ips: Tuple[str, ...]


def parse_instances(text: str) -> List[ParsedInstance]:
    """The VRRP instances of a keepalived.conf, ours or another's (no includes, no variables)."""
    found: List[ParsedInstance] = []
    blocks: List[List[str]] = []  # the words in front of each open brace
    values: Dict[str, str] = {}
    addresses: List[str] = []
    last: List[str] = []
    for line in text.splitlines():
        words = re.split(r"[#!]", line, maxsplit=1)[0].replace("{", " { ").replace("}", " } ").split()
        phrase: List[str] = []
        for word in (*words, "\n"):
            if word == "{":
                blocks.append(phrase or last)
                if len(blocks) == 1:
                    values, addresses = {}, []
                phrase = []
            elif word in ("}", "\n"):
                if phrase and len(blocks) == 1:
                    values[phrase[0]] = phrase[-1]
                elif phrase and len(blocks) == 2 and blocks[1][:1] == ["virtual_ipaddress"]:
                    addresses.append(phrase[0])
                last, phrase = phrase or last, []
                if word == "}" and blocks:
                    head = blocks.pop()
                    if not blocks and head[:1] == ["vrrp_instance"] and len(head) > 1:
                        found.append(_parsed(head[1].strip('"'), values, addresses))
            else:
                phrase.append(word)
    return found


def _parsed(name: str, values: Mapping[str, str], addresses: Sequence[str]) -> ParsedInstance:
    def number(key: str, default: int) -> int:
        text = values.get(key, "")
        return int(text) if text.isdigit() else default

    return ParsedInstance(
        name, values.get("interface", ""), number("priority", 100), number("virtual_router_id", 0), tuple(addresses)
    )
