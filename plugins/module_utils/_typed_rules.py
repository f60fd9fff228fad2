# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Rules as typed data: check them, and turn each into iptables arguments for IPv4, IPv6 or both.

This module is private to the collection. It runs nothing. `compile_rules` gives `_ruleset.Rule` values, the same that
verbatim rules become, so that everything after it is the same for both. Every mistake is one sentence that names the
list, the number of the rule from 1, and the key.

Addresses are sets here and are computed as such: a named set less its exclusions is a list of networks. Exclusions in a
rule (`!192.0.2.1`) become a chain of their own that returns for them before it acts, so that the rule does not match.

Sources: iptables-extensions(8) of iptables 1.8; names of keys as ansible.builtin.iptables has them, in the plural.
"""

from __future__ import annotations

import difflib
import ipaddress
import itertools
import re
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple, Union

from . import _ruleset

Network = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]

FAMILIES = _ruleset.FAMILIES
STATES = ("NEW", "ESTABLISHED", "RELATED", "INVALID", "UNTRACKED", "SNAT", "DNAT")
PORT_PROTOCOLS = ("tcp", "udp", "sctp")
# Numbers where the name needs /etc/protocols, which small images lack.
PROTOCOLS = {
    **{"tcp": "tcp", "udp": "udp", "sctp": "sctp", "icmp": "icmp", "icmpv6": "ipv6-icmp", "ipv6-icmp": "ipv6-icmp"},
    **{"esp": "50", "ah": "51", "gre": "47", "igmp": "2", "ipip": "4", "ospf": "89", "vrrp": "112"},
}
_FILTER_ACTIONS = {"accept": "ACCEPT", "drop": "DROP", "reject": "REJECT", "log": "LOG", "return": "RETURN"}
_NAT_ACTIONS = {"snat": "SNAT", "dnat": "DNAT", "masquerade": "MASQUERADE", "redirect": "REDIRECT", "accept": "ACCEPT"}
_NAT_CHAINS = {
    "snat": ("POSTROUTING",),
    "masquerade": ("POSTROUTING",),
    "dnat": ("PREROUTING", "OUTPUT"),
    "redirect": ("PREROUTING", "OUTPUT"),
    "accept": ("PREROUTING", "OUTPUT", "POSTROUTING"),
}
_COMMON_KEYS = {
    **{"action": "word", "chain": "word", "comment": "text", "ctstate": "list", "families": "list"},
    **{"in_interfaces": "list", "out_interfaces": "list", "protocols": "list", "sources": "list"},
    **{"destinations": "list", "source_ports": "list", "destination_ports": "list"},
}
KEYS: Dict[str, Dict[str, str]] = {
    "filter_rules": {
        **_COMMON_KEYS,
        **{"icmp_types": "list", "syn": "bool", "limit": "text", "log_prefix": "text", "reject_with": "text"},
    },
    "nat_rules": {
        **_COMMON_KEYS,
        **{"to_source": "text", "to_destination": "text", "to_ports": "text", "persistent": "bool"},
    },
}
MAX_PORTS = 15  # XT_MULTI_PORTS in <linux/netfilter/xt_multiport.h>; a range counts twice
MAX_LINES = 4096  # of one rule, which is far beyond what anybody means
MAX_COMMENT = 255  # XT_MAX_COMMENT_LEN less the terminating zero
MAX_LOG_PREFIX = 29  # iptables-extensions(8), LOG
_NO_CHAIN = {"in_interfaces": ("OUTPUT", "POSTROUTING"), "out_interfaces": ("INPUT", "PREROUTING")}


class _Mistake(Exception):
    """What is wrong with one key."""


class Addresses(NamedTuple):
    """Which addresses: `inside` (empty for all of them) less `outside`."""

    inside: Tuple[Network, ...] = ()
    outside: Tuple[Network, ...] = ()

    def of(self, family: str) -> Addresses:
        """Those of one family."""
        version = 4 if family == "ipv4" else 6
        return Addresses(*(tuple(net for net in part if net.version == version) for part in self))


def _near(word: str, words: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(words), 1, 0.6)
    return f"; did you mean '{close[0]}'?" if close else ""


def _one_of(word: str, words: Iterable[str]) -> str:
    known = list(words)
    return _near(word, known) or f"; write one of {', '.join(known)}"


def _networks(text: str) -> List[Network]:
    """An address, a network or a range a-b as networks."""
    first, dash, last = text.partition("-")
    try:
        if dash:
            return list(
                ipaddress.summarize_address_range(
                    ipaddress.ip_address(first.strip()),
                    ipaddress.ip_address(last.strip()),
                )
            )
        return [ipaddress.ip_network(text, strict=True)]
    except (ValueError, TypeError) as exc:
        why = str(exc)
        if "host bits" in why:
            network = ipaddress.ip_network(text, strict=False)
            raise _Mistake(f"'{text}' has bits set beyond its prefix; write {network}, or the address alone") from None
        raise _Mistake(
            f"'{text}' is no address, network or range; write it as 192.0.2.1, 192.0.2.0/24 or 192.0.2.1-192.0.2.9"
        ) from None


def _collapse(networks: Iterable[Network]) -> List[Network]:
    found: List[Network] = []
    for version in (4, 6):
        found += ipaddress.collapse_addresses([n for n in networks if n.version == version])  # type: ignore[type-var]
    return found


def _less(networks: Iterable[Network], outside: Iterable[Network]) -> List[Network]:
    """Set difference: the networks less those outside."""
    rest = _collapse(networks)
    for hole in outside:
        kept: List[Network] = []
        for network in rest:
            if network.version != hole.version or not network.overlaps(hole):
                kept.append(network)
            elif not network.subnet_of(hole):  # type: ignore[arg-type]
                kept += network.address_exclude(hole)  # type: ignore[arg-type]
        rest = kept
    return _collapse(rest)


def address_sets(given: Any, problems: List[str]) -> Dict[str, List[Network]]:
    """The named sets as networks; adds a sentence to `problems` for each mistake."""
    found: Dict[str, List[Network]] = {}
    for name, entries in (given or {}).items():
        where = f"address_sets: set '{name}'"
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", str(name)):
            problems.append(f"{where}: is no name for a set; use letters, digits, '_', '-', '.'.")
        inside: List[Network] = []
        outside: List[Network] = []
        mistakes = len(problems)
        for entry in entries if isinstance(entries, (list, tuple)) else [entries]:
            text = str(entry).strip()
            excluded = text.startswith("!")
            text = text.lstrip("! ")
            try:
                if text.startswith("@"):
                    if text[1:] not in found:
                        raise _Mistake(f"there is no set '{text[1:]}' before it{_near(text[1:], found)}")
                    part = found[text[1:]]
                else:
                    part = _networks(text)
                (outside if excluded else inside).extend(part)
            except _Mistake as exc:
                problems.append(f"{where}: {exc}.")
        found[str(name)] = _less(inside, outside)
        if not found[str(name)] and mistakes == len(problems):
            why = "everything in it is excluded" if inside else "has no addresses but those it excludes"
            problems.append(f"{where}: {why}; a set needs at least one address.")
    return found


class _Checker:
    """Checks one rule key by key and keeps what it means."""

    def __init__(self, option: str, number: int, given: Any, sets: Dict[str, List[Network]]) -> None:
        self.option, self.number, self.sets = option, number, sets
        self.table = option.partition("_")[0]
        self.problems: List[str] = []
        self.values: Dict[str, Any] = {}
        if not isinstance(given, dict):
            self.problems.append(f"{option}: rule {number}: is no dictionary; write keys such as 'action: accept'.")
            return
        keys = KEYS[option]
        for key, value in given.items():
            if key not in keys:
                self.wrong(key, f"is not known{_one_of(str(key), keys)}")
            elif value is not None and value != []:
                try:
                    self.values[key] = self._shape(keys[key], value)
                except _Mistake as exc:
                    self.wrong(key, str(exc))
        self.check()

    def wrong(self, key: Any, why: str) -> None:
        end = "" if why.endswith("?") else "."
        self.problems.append(f"{self.option}: rule {self.number}, key '{key}': {why}{end}")

    @staticmethod
    def _shape(shape: str, value: Any) -> Any:
        if shape == "bool":
            if isinstance(value, bool):
                return value
            if str(value).lower() in ("true", "yes", "on", "1", "false", "no", "off", "0"):
                return str(value).lower() in ("true", "yes", "on", "1")
            raise _Mistake(f"'{value}' is neither true nor false")
        if shape == "list":
            entries = list(value) if isinstance(value, (list, tuple)) else str(value).split(",")
            if any(isinstance(entry, (dict, list, tuple)) for entry in entries):
                raise _Mistake("is no list of words")
            return [str(entry).strip() for entry in entries]
        if isinstance(value, (dict, list, tuple)):
            raise _Mistake("takes one value")
        text = str(value).strip()
        if not text:
            raise _Mistake("is empty; leave it out or write a value")
        if any(ord(char) < 32 for char in text):
            raise _Mistake("contains a line break or control character")
        return text

    # -- keys

    def check(self) -> None:
        """Check what was given; every problem is noted, not only the first."""
        self.action = self._action()
        self.chain = self._chain()
        self.families = self._words("families", FAMILIES)
        self.ctstate = self._words("ctstate", STATES, upper=True)
        self.protocols = self._protocols()
        self.in_interfaces = self._interfaces("in_interfaces")
        self.out_interfaces = self._interfaces("out_interfaces")
        self.sources = self._addresses("sources")
        self.destinations = self._addresses("destinations")
        self.source_ports = self._ports("source_ports")
        self.destination_ports = self._ports("destination_ports")
        for key, addresses in (("sources", self.sources), ("destinations", self.destinations)):
            if addresses.outside and self.action == "return":
                self.wrong(
                    key, "cannot have exclusions (!) with 'action: return'; write a rule for them before this one"
                )
        comment = self.values.get("comment", "")
        if len(comment.encode()) > MAX_COMMENT:
            self.wrong("comment", f"is longer than {MAX_COMMENT} bytes")
        if self.values.get("syn") and self.protocols != ["tcp"]:
            self.wrong("syn", "needs 'protocols: [tcp]'")
        kinds = self.values.get("icmp_types")
        if kinds and (not self.protocols or set(self.protocols) - {"icmp", "ipv6-icmp"}):
            self.wrong("icmp_types", "needs 'protocols: [icmp]'")
        limit = self.values.get("limit")
        if limit and not re.fullmatch(r"[1-9]\d*/(s|sec|second|m|min|minute|h|hour|d|day)", limit):
            self.wrong("limit", f"'{limit}' is no rate; write it as 10/minute")
        prefix = self.values.get("log_prefix")
        if prefix and self.action != "log":
            self.wrong("log_prefix", "belongs to 'action: log'; write a rule that logs before this one")
        if prefix and len(prefix.encode()) > MAX_LOG_PREFIX:
            self.wrong("log_prefix", f"is longer than {MAX_LOG_PREFIX} bytes")
        if self.values.get("reject_with") and self.action != "reject":
            self.wrong("reject_with", "belongs to 'action: reject'")
        if self.option == "nat_rules":
            self._translation()
        if not self.problems:
            self.chosen = self._chosen()

    def _action(self) -> str:
        actions = _FILTER_ACTIONS if self.table == "filter" else _NAT_ACTIONS
        action: str = self.values.get("action", "").lower()
        named = any("key 'action'" in problem or "did you mean 'action'?" in problem for problem in self.problems)
        if not action and not named:
            self.wrong("action", f"is missing; write one of {', '.join(actions)}")
        elif action and action not in actions:
            self.wrong("action", f"'{action}' is not known{_one_of(action, actions)}")
        return action

    def _chain(self) -> str:
        chain = self.values.get("chain", "").upper()
        if self.table == "filter":
            chains: Sequence[str] = _ruleset.BUILTIN_CHAINS["filter"]
            default = "FORWARD"
        else:
            chains = _NAT_CHAINS.get(self.action, _NAT_CHAINS["accept"])
            default = "" if self.action == "accept" else chains[0]
        if chain and chain not in chains:
            why = f" with 'action: {self.action}'" if self.table == "nat" else ""
            self.wrong("chain", f"'{chain}' cannot be used{why}; write one of {', '.join(chains)}")
        elif not chain and not default:
            self.wrong("chain", f"is missing; 'action: accept' needs one of {', '.join(chains)}")
        return chain or default

    def _words(self, key: str, known: Sequence[str], upper: bool = False) -> List[str]:
        found = [word.upper() if upper else word.lower() for word in self.values.get(key, [])]
        for word in found:
            if word not in known:
                self.wrong(key, f"'{word}' is not known{_one_of(word, known)}")
        return found

    def _protocols(self) -> List[str]:
        found: List[str] = []
        for word in self.values.get("protocols", []):
            name = word.lower()
            if name.isdigit() and int(name) < 256:
                found.append(name)
            elif name in PROTOCOLS:
                found.append("ipv6-icmp" if name == "icmpv6" else name)
            else:
                self.wrong("protocols", f"'{word}' is no protocol{_near(name, PROTOCOLS) or '; write its number'}")
        return found

    def _interfaces(self, key: str) -> List[str]:
        names: List[str] = self.values.get(key, [])
        if names and self.chain in _NO_CHAIN[key]:
            self.wrong(key, f"cannot be used in chain {self.chain}, where it is not known")
        for name in names:
            if not re.fullmatch(r"(! ?)?[^\s/!+]{1,15}\+?", name):
                self.wrong(key, f"'{name}' is no name of an interface; write it as eth0, eth+ or !eth0")
            elif name.startswith("!") and len(names) > 1:
                self.wrong(key, f"'{name}' stands beside others, which says nothing; write it alone")
        return names

    def _addresses(self, key: str) -> Addresses:
        inside: List[Network] = []
        outside: List[Network] = []
        for entry in self.values.get(key, []):
            text = entry.lstrip("! ")
            try:
                if text.startswith("@"):
                    if text[1:] not in self.sets:
                        raise _Mistake(f"there is no set '{text[1:]}' in address_sets{_near(text[1:], self.sets)}")
                    part = self.sets[text[1:]]
                else:
                    part = _networks(text)
                (outside if entry.startswith("!") else inside).extend(part)
            except _Mistake as exc:
                self.wrong(key, str(exc))
        holes = _collapse(outside)
        rest = _collapse(inside)
        if inside and not _less(rest, holes):
            self.wrong(key, "excludes every address that it names")
        # holes that touch nothing would only be noise among the rules
        return Addresses(tuple(rest), tuple(h for h in holes if not rest or _touches(h, rest)))

    def _ports(self, key: str) -> List[str]:
        found: List[str] = []
        for entry in self.values.get(key, []):
            port = entry.replace("-", ":")
            if not _ruleset.is_port(port):
                self.wrong(key, f"'{entry}' is no port; write 1-65535, or a rising range such as 8000-8010")
            found.append(port)
        if found and (not self.protocols or set(self.protocols) - set(PORT_PROTOCOLS)):
            self.wrong(key, f"needs protocols that have ports ({', '.join(PORT_PROTOCOLS)}), for example [tcp]")
        return found

    def _translation(self) -> None:
        """The target of a NAT rule: which keys belong to which action, and their form."""
        needs = {"snat": "to_source", "dnat": "to_destination"}
        for key in ("to_source", "to_destination"):
            if key in self.values and needs.get(self.action) != key:
                self.wrong(key, f"does not belong to 'action: {self.action}'")
        key = needs.get(self.action, "")
        self.target: List[Network] = []
        if key and key not in self.values:
            self.wrong(key, f"is missing; 'action: {self.action}' needs the address to write into packets")
        elif key:
            try:
                first, dash, last = self.values[key].partition("-")
                ends = [ipaddress.ip_address(part.strip()) for part in ((first, last) if dash else (first,))]
                if dash and (ends[0].version != ends[1].version or int(ends[0]) > int(ends[1])):
                    raise ValueError
                self.target = [ipaddress.ip_network(end) for end in ends]
            except ValueError:
                self.wrong(key, f"'{self.values[key]}' is no address or rising range; write 192.0.2.1 or a-b")
        ports = self.values.get("to_ports")
        if ports:
            if self.action == "accept":
                self.wrong("to_ports", "does not belong to 'action: accept'")
            if not _ruleset.is_port(ports.replace("-", ":")):
                self.wrong("to_ports", f"'{ports}' is no port; write 1-65535, or a rising range such as 1024-65535")
            if not self.protocols or set(self.protocols) - set(PORT_PROTOCOLS):
                self.wrong("to_ports", f"needs protocols that have ports ({', '.join(PORT_PROTOCOLS)})")
        if self.values.get("persistent") and self.action not in needs:
            self.wrong("persistent", "belongs to snat and dnat")

    def _chosen(self) -> List[str]:
        """The families this rule exists in."""
        possible = list(FAMILIES)
        reasons = []
        for key, nets in [("sources", self.sources.inside), ("destinations", self.destinations.inside)]:
            if nets:
                has = {"ipv4" if net.version == 4 else "ipv6" for net in nets}
                possible = [family for family in possible if family in has]
                reasons.append(key)
        if self.table == "nat" and self.target:
            family = "ipv4" if self.target[0].version == 4 else "ipv6"
            possible = [f for f in possible if f == family]
            reasons.append("to_source" if self.action == "snat" else "to_destination")
        elif self.table == "nat" and not reasons and not self.families:
            possible = ["ipv4"]  # nobody means IPv6 when he writes masquerade and no address
        if self.protocols == ["ipv6-icmp"]:
            possible = [f for f in possible if f == "ipv6"]
            reasons.append("protocols")
        if self.families:
            for family in self.families:
                if family not in possible:
                    self.wrong("families", f"{family} is asked for, but {' and '.join(reasons)} leave nothing of it")
            possible = [f for f in possible if f in self.families]
        elif not possible:
            self.wrong(reasons[-1], f"is of another IP version than {' and '.join(reasons[:-1])}, so nothing can match")
        return possible

    # -- iptables

    def text(self) -> str:
        """The rule in a few words, for messages."""
        shown = [f"{key}: {', '.join(v) if isinstance(v, list) else v}" for key, v in self.values.items()]
        text = "; ".join(shown)
        return text if len(text) <= 120 else text[:117] + "..."

    def rules(self, family: str) -> List[_ruleset.Rule]:
        """This rule as iptables rules of one family; none if it does not exist there."""
        if family not in self.chosen:
            return []
        sources, destinations = self.sources.of(family), self.destinations.of(family)
        act = self._act(family)
        own = f"{self.table.upper()}-{self.number}"
        holes = [("-s", net) for net in sources.outside] + [("-d", net) for net in destinations.outside]
        lines = self._lines(family, sources, destinations, ("-j", own) if holes else act)
        inner: List[Tuple[str, ...]] = [(flag, str(net), "-j", "RETURN") for flag, net in holes]
        if holes and (self.values.get("to_ports") or self.values.get("reject_with")):
            # such a target wants the protocol said in its own rule
            inner += dict.fromkeys((*args[:2], *act) for args in self._protocol_args(family))
        elif holes:
            inner.append(act)
        made = [self._rule("append", self.chain, line) for line in lines]
        if not holes:
            return made
        return [self._rule("new", own), *(self._rule("append", own, line) for line in inner), *made]

    def _rule(self, command: str, chain: str, args: Tuple[str, ...] = ()) -> _ruleset.Rule:
        return _ruleset.Rule(self.number, self.text(), self.option, self.table, command, chain, args=args)

    def _act(self, family: str) -> Tuple[str, ...]:
        values = self.values
        actions = _FILTER_ACTIONS if self.table == "filter" else _NAT_ACTIONS
        act = ["-j", actions[self.action]]
        if values.get("log_prefix"):
            act += ["--log-prefix", values["log_prefix"] + " "]
        if values.get("reject_with"):
            act += ["--reject-with", values["reject_with"]]
        ports = values.get("to_ports", "").replace(":", "-")
        if self.action in ("snat", "dnat"):
            addresses = "-".join(str(net.network_address) for net in self.target)
            if ports:
                addresses = (addresses if family == "ipv4" else f"[{addresses}]") + f":{ports}"
            act += ["--to-source" if self.action == "snat" else "--to-destination", addresses]
        elif ports:
            act += ["--to-ports", ports]
        if values.get("persistent"):
            act.append("--persistent")
        return tuple(act)

    def _lines(
        self, family: str, sources: Addresses, destinations: Addresses, act: Tuple[str, ...]
    ) -> List[Tuple[str, ...]]:
        """Every combination that one iptables rule cannot say at once."""
        lines = []
        for proto, source, target, came, goes in itertools.product(
            self._protocol_args(family),
            _port_args("source", self.source_ports),
            _port_args("destination", self.destination_ports),
            _interface_args("-i", self.in_interfaces),
            _interface_args("-o", self.out_interfaces),
        ):
            where = [*came, *goes]
            if sources.inside:
                where += ["-s", ",".join(str(net) for net in sources.inside)]
            if destinations.inside:
                where += ["-d", ",".join(str(net) for net in destinations.inside)]
            more: List[str] = []
            if self.ctstate:
                more += ["-m", "conntrack", "--ctstate", ",".join(self.ctstate)]
            if self.values.get("limit"):
                more += ["-m", "limit", "--limit", self.values["limit"]]
            if self.values.get("comment"):
                more += ["-m", "comment", "--comment", self.values["comment"]]
            lines.append((*where, *proto, *source, *target, *more, *act))
        return lines

    def _protocol_args(self, family: str) -> List[Tuple[str, ...]]:
        found: List[Tuple[str, ...]] = []
        for name in self.protocols:
            if name == "icmp" and family == "ipv6":
                name = "ipv6-icmp"
            elif name == "ipv6-icmp" and family == "ipv4":
                continue
            args: Tuple[str, ...] = ("-p", PROTOCOLS.get(name, name))
            if self.values.get("syn"):
                args += ("-m", "tcp", "--syn")
            kinds = self.values.get("icmp_types", [])
            option = ("-m", "icmp", "--icmp-type") if family == "ipv4" else ("-m", "icmp6", "--icmpv6-type")
            found += [(*args, *option, kind) for kind in kinds] or [args]
        return list(dict.fromkeys(found)) or [()]

    def size(self) -> int:
        """How many rules of the kernel this one becomes, at most."""
        sizes = [self.protocols, self.in_interfaces, self.out_interfaces, self.sources.inside, self.destinations.inside]
        total = 1
        for part in sizes:
            total *= max(1, len(part))
        return total * (1 + len(self.source_ports) // 7) * (1 + len(self.destination_ports) // 7)


def _touches(hole: Network, networks: Iterable[Network]) -> bool:
    return any(net.version == hole.version and net.overlaps(hole) for net in networks)


def _interface_args(flag: str, names: Sequence[str]) -> List[Tuple[str, ...]]:
    return [("!", flag, n.lstrip("! ")) if n.startswith("!") else (flag, n) for n in names] or [()]


def _port_args(which: str, ports: Sequence[str]) -> List[Tuple[str, ...]]:
    """Matches for any number of ports: one port by itself, more as lists that the kernel can hold."""
    if not ports:
        return [()]
    if len(ports) == 1:
        return [(f"--{which}-port", ports[0])]
    groups: List[List[str]] = [[]]
    room = MAX_PORTS
    for port in ports:
        need = 2 if ":" in port else 1
        if need > room:
            groups.append([])
            room = MAX_PORTS
        groups[-1].append(port)
        room -= need
    return [("-m", "multiport", f"--{which}-ports", ",".join(group)) for group in groups]


def compile_rules(
    filter_rules: Optional[Sequence[Any]], nat_rules: Optional[Sequence[Any]], sets: Any = None
) -> Dict[str, List[_ruleset.Rule]]:
    """Typed rules as iptables rules by family; RulesetError with every mistake of every rule."""
    problems: List[str] = []
    found: Dict[str, List[_ruleset.Rule]] = {family: [] for family in FAMILIES}
    if sets is not None and not isinstance(sets, dict):
        problems.append("address_sets: is no dictionary; write 'name: [addresses]'.")
        sets = {}
    networks = address_sets(sets, problems)
    for option, rules in (("filter_rules", filter_rules), ("nat_rules", nat_rules)):
        for number, given in enumerate(rules or [], 1):
            checker = _Checker(option, number, given, networks)
            if not checker.problems and checker.size() > MAX_LINES:
                checker.wrong("sources", f"make more than {MAX_LINES} rules of it; name networks, not single addresses")
            problems += checker.problems
            if checker.problems:
                continue
            for family in FAMILIES:
                found[family] += checker.rules(family)
    if problems:
        raise _ruleset.RulesetError(problems)
    return found
