# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Firewall rules as text: parse iptables arguments, render iptables-restore input, compare iptables-save output.

This module is private to the collection. It runs no command by itself; `read_live` runs one through its argument.

Three forms of a ruleset occur:

* the operator's: a list of iptables argument strings (`parse_rules` gives `Rule` values),
* ours: a `Plan`, the same rules moved into chains of our own plus the pair's protection (`build_plan`),
* the kernel's: `Tables`, what iptables-save prints (`parse_save`). Only this form is ever compared, so that the kernel
  and not this code decides whether two rules mean the same.

Sources: iptables(8), iptables-restore(8), iptables-extensions(8) of iptables 1.8.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import ipaddress
import os
import re
import shlex
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

PREFIX = "CTSYNC-"
VIP_CHAIN = PREFIX + "VIP"
JUMP_COMMENT = "ctsync: own rules"
RESETS_COMMENT = "ctsync resets"
NODE_COMMENT = "ctsync: node"  # a rule whose comment begins so has addresses that differ from node to node
STRAY_COMMENT = "ctsync stray to a virtual address"
MAX_CHAIN_NAME = 28  # XT_EXTENSION_MAXNAMELEN in <linux/netfilter/x_tables.h> less the terminating zero
VRRP = "112"  # IANA protocol number; the name needs /etc/protocols, which small images lack

BUILTIN_CHAINS: Dict[str, Tuple[str, ...]] = {
    "filter": ("INPUT", "FORWARD", "OUTPUT"),
    "nat": ("PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"),
    "mangle": ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"),
    "raw": ("PREROUTING", "OUTPUT"),
    "security": ("INPUT", "FORWARD", "OUTPUT"),
}
FAMILIES = ("ipv4", "ipv6")

_COMMANDS = {
    "-A": "append",
    "--append": "append",
    "-I": "insert",
    "--insert": "insert",
    "-P": "policy",
    "--policy": "policy",
    "-N": "new",
    "--new-chain": "new",
    "--new": "new",
}
_REMEDY_DELETE = "leave the rule out of the list instead: what is not in the list is removed from the module's chains"
_REFUSED = {
    "-D": _REMEDY_DELETE,
    "--delete": _REMEDY_DELETE,
    "-F": "the module replaces its own chains as a whole and never flushes those of others; leave this line out",
    "--flush": "the module replaces its own chains as a whole and never flushes those of others; leave this line out",
    "-X": "a chain that is no longer declared with -N is removed by itself; leave this line out",
    "--delete-chain": "a chain that is no longer declared with -N is removed by itself; leave this line out",
    "-R": "write the new rule in the place of the old one in the list",
    "--replace": "write the new rule in the place of the old one in the list",
    "-E": "declare the chain under its new name with -N",
    "--rename-chain": "declare the chain under its new name with -N",
    "-Z": "counters are not part of a ruleset; leave this line out",
    "--zero": "counters are not part of a ruleset; leave this line out",
    "-C": "the module compares by itself; leave this line out",
    "--check": "the module compares by itself; leave this line out",
    "-L": "use the ha_facts module to look at the rules; leave this line out",
    "--list": "use the ha_facts module to look at the rules; leave this line out",
    "-S": "use the ha_facts module to look at the rules; leave this line out",
    "--list-rules": "use the ha_facts module to look at the rules; leave this line out",
    "-4": "IPv4 rules belong into 'rules', IPv6 rules into 'rules6'; leave the flag out",
    "--ipv4": "IPv4 rules belong into 'rules', IPv6 rules into 'rules6'; leave the flag out",
    "-6": "IPv4 rules belong into 'rules', IPv6 rules into 'rules6'; leave the flag out",
    "--ipv6": "IPv4 rules belong into 'rules', IPv6 rules into 'rules6'; leave the flag out",
    "-w": "the module waits for the lock by itself; leave the flag out",
    "--wait": "the module waits for the lock by itself; leave the flag out",
    "-M": "kernel modules are the kernel_settings module's task; leave the option out",
    "--modprobe": "kernel modules are the kernel_settings module's task; leave the option out",
}
_FREE_TEXT = ("--comment", "--log-prefix", "--nflog-prefix", "--string", "--hex-string")

# Options of the common matches and targets, so that a slip of the pen is found on a machine without iptables as well.
# A rule with a match or target that is not listed is not judged here, only by iptables itself.
_CORE_OPTIONS = [
    *("protocol", "proto", "source", "src", "destination", "dst", "in-interface", "out-interface"),
    *("fragment", "match", "jump", "goto", "table", "set-counters"),
]
_CORE_SHORT = ("-p", "-s", "-d", "-i", "-o", "-f", "-m", "-j", "-g", "-t", "-c")
_MATCH_OPTIONS: Dict[str, str] = {
    "addrtype": "src-type dst-type limit-iface-in limit-iface-out",
    "ah": "ahspi",
    "comment": "comment",
    "connlimit": "connlimit-upto connlimit-above connlimit-mask connlimit-saddr connlimit-daddr",
    "connmark": "mark",
    "conntrack": "ctstate ctproto ctorigsrc ctorigdst ctreplsrc ctrepldst ctorigsrcport ctorigdstport ctreplsrcport"
    " ctrepldstport ctstatus ctexpire ctdir",
    "dscp": "dscp dscp-class",
    "ecn": "ecn-tcp-cwr ecn-tcp-ece ecn-ip-ect",
    "esp": "espspi",
    "hl": "hl-eq hl-lt hl-gt",
    "helper": "helper",
    "icmp": "icmp-type",
    "icmp6": "icmpv6-type",
    "icmpv6": "icmpv6-type",
    "ipv6-icmp": "icmpv6-type",
    "iprange": "src-range dst-range",
    "length": "length",
    "limit": "limit limit-burst",
    "mac": "mac-source",
    "mark": "mark",
    "multiport": "source-ports sports destination-ports dports ports",
    "owner": "uid-owner gid-owner socket-exists suppl-groups",
    "physdev": "physdev-in physdev-out physdev-is-in physdev-is-out physdev-is-bridged",
    "pkttype": "pkt-type",
    "sctp": "source-port sport destination-port dport chunk-types",
    "set": "match-set return-nomatch update-counters update-subcounters packets-eq packets-lt packets-gt bytes-eq"
    " bytes-lt bytes-gt",
    "state": "state",
    "statistic": "mode probability every packet",
    "tcp": "source-port sport destination-port dport tcp-flags syn tcp-option",
    "tcpmss": "mss",
    "ttl": "ttl-eq ttl-gt ttl-lt",
    "udp": "source-port sport destination-port dport",
}
_TARGET_OPTIONS: Dict[str, str] = {
    "ACCEPT": "",
    "DROP": "",
    "RETURN": "",
    "CONNMARK": "set-xmark save-mark restore-mark and-mark or-mark xor-mark set-mark nfmask ctmask mask",
    "CT": "notrack helper ctevents expevents zone zone-orig zone-reply timeout",
    "DNAT": "to-destination random persistent",
    "LOG": "log-level log-prefix log-tcp-sequence log-tcp-options log-ip-options log-uid log-macdecode",
    "MARK": "set-xmark set-mark and-mark or-mark xor-mark",
    "MASQUERADE": "to-ports random random-fully",
    "NETMAP": "to",
    "NFLOG": "nflog-group nflog-prefix nflog-range nflog-size nflog-threshold",
    "NOTRACK": "",
    "REDIRECT": "to-ports random",
    "REJECT": "reject-with",
    "SET": "add-set del-set map-set timeout exist map-mark map-prio map-queue",
    "SNAT": "to-source random random-fully persistent",
    "TCPMSS": "set-mss clamp-mss-to-pmtu",
}


class RulesetError(Exception):
    """The wanted rules cannot be used; `problems` holds every reason, each a complete sentence with its remedy."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__(" ".join(problems))
        self.problems = list(problems)


# ---------------------------------------------------------------------------------------------------------------------
# The operator's form


@dataclass(frozen=True)
class Rule:
    """One iptables argument string, taken apart.

    `number` counts from 1 in the list `option`. `chain` is the name as the operator wrote it. `args` are the matches
    and the target without table and command. `index` is the place of an insertion, from 1.
    """

    number: int
    text: str
    option: str
    table: str
    command: str
    chain: str
    index: int = 1
    policy: str = ""
    args: Tuple[str, ...] = ()

    @property
    def origin(self) -> str:
        """How messages name this rule."""
        return describe_rule(self.option, self.number, self.text)


def describe_rule(option: str, number: int, text: str) -> str:
    """Name a rule in a message: the list, its number from 1, its words."""
    return f"{option}: rule {number} '{text}'"


def own_chain(name: str) -> str:
    """Name of our chain for a built-in chain or for a chain the operator declared."""
    return name if name.startswith(PREFIX) else PREFIX + name


def _split(text: str) -> List[str]:
    tokens: List[str] = []
    free = False
    for token in shlex.split(text):
        if free:
            tokens.append(token)
            free = False
            continue
        free = token in _FREE_TEXT
        long, equals, value = token.partition("=")
        if equals and long.startswith("--"):
            tokens += [long, value]
        elif re.match(r"-[tjgAIPNpsdiom]\S", token) and not token.startswith("--"):
            tokens += [token[:2], token[2:]]
        else:
            tokens.append(token)
    return tokens


def _parse_rule(text: str, number: int, option: str, family: str, declared: Dict[str, set]) -> Rule:
    """Take one argument string apart; raise RulesetError naming number, text and remedy."""

    def refuse(why: str) -> RulesetError:
        return RulesetError([f"{describe_rule(option, number, text)}: {why}{'' if why.endswith('?') else '.'}"])

    if not isinstance(text, str) or not text.strip():
        raise refuse("is empty; remove the entry or write iptables arguments such as '-A FORWARD -j DROP'")
    if any(ord(char) < 32 and char != "\t" for char in text):
        raise refuse("contains a line break or control character; write one rule per list entry")
    try:
        tokens = _split(text)
    except ValueError as exc:
        raise refuse(f"cannot be split into words ({str(exc).lower()}); check the quotation marks") from exc
    program = "iptables" if family == "ipv4" else "ip6tables"
    if tokens[0] in ("iptables", "ip6tables"):
        if tokens[0] != program:
            raise refuse(f"is for {tokens[0]} but stands among the {program} rules; move it to the other list")
        tokens = tokens[1:]
    table, command, chain, policy, index = "filter", "", "", "", 1
    args: List[str] = []
    position = 0

    def value(flag: str) -> str:
        nonlocal position
        position += 1
        if position >= len(tokens):
            raise refuse(f"has nothing after {flag}")
        return tokens[position]

    while position < len(tokens):
        token = tokens[position]
        if token in _FREE_TEXT:
            args += [token, value(token)]
        elif token in ("-t", "--table"):
            table = value(token)
        elif token in _COMMANDS:
            if command:
                raise refuse("has more than one command; write one command per list entry")
            command, chain = _COMMANDS[token], value(token)
            following = tokens[position + 1] if position + 1 < len(tokens) else ""
            if command == "insert" and following.isdigit():
                index = int(value(token))
            elif command == "policy":
                policy = value(token)
        elif token in _REFUSED:
            raise refuse(f"{token} is not supported; {_REFUSED[token]}")
        else:
            args.append(token)
        position += 1

    if table not in BUILTIN_CHAINS:
        raise refuse(f"there is no table '{table}'; the tables are {', '.join(BUILTIN_CHAINS)}")
    if not command:
        raise refuse("has no command; begin it with -A CHAIN, -I CHAIN, -P CHAIN or -N CHAIN")
    builtin = BUILTIN_CHAINS[table]
    if command == "policy":
        if args:
            raise refuse(f"a policy takes no further arguments, here '{' '.join(args)}'")
        if chain not in builtin:
            raise refuse(f"a policy needs a built-in chain of table {table} ({', '.join(builtin)})")
        if chain != "FORWARD":
            raise refuse(
                f"the policy of {chain} is left alone, because a mistake there cuts off the operator; accept what you"
                f" need and end with '-A {chain} -j DROP' instead"
            )
        if policy not in ("ACCEPT", "DROP"):
            raise refuse(f"a policy is ACCEPT or DROP, not '{policy}'")
    elif command == "new":
        if args:
            raise refuse(f"-N takes only a name, here '{' '.join(args)}' follows")
        if chain in builtin:
            raise refuse(f"{chain} is a built-in chain of table {table} and needs no -N")
        if not re.fullmatch(r"[A-Za-z0-9_.:+][A-Za-z0-9_.:+-]*", chain):
            raise refuse(f"'{chain}' is no name for a chain; use letters, digits, '_', '-', '.'")
        if len(own_chain(chain)) > MAX_CHAIN_NAME:
            raise refuse(f"the chain name is longer than {MAX_CHAIN_NAME - len(PREFIX)} characters")
        if own_chain(chain) == VIP_CHAIN or chain.upper() in _TARGET_OPTIONS or chain.startswith(PREFIX):
            raise refuse(f"the name '{chain}' is reserved; choose another")
        if any(own_chain(chain) == own_chain(name) for name in builtin):
            raise refuse(f"the name '{chain}' is reserved; choose another")
        if re.fullmatch(r"(FILTER|NAT)-\d+", chain):
            raise refuse(f"the name '{chain}' is reserved for typed rules; choose another")
        if chain in declared.setdefault(table, set()):
            raise refuse(f"chain {chain} of table {table} is declared twice")
        declared[table].add(chain)
    else:
        if chain not in builtin and chain not in declared.get(table, set()):
            raise refuse(
                f"table {table} has no chain '{chain}'; it has {', '.join(builtin)}, and others must be declared first"
                f" with '-t {table} -N {chain}'"
            )
        if index < 1:
            raise refuse("a place to insert counts from 1")
        problem = _judge_arguments(args, family, table, declared)
        if problem:
            raise refuse(problem)
    return Rule(number, text, option, table, command, chain, index, policy, tuple(args))


def target_of(args: Sequence[str]) -> str:
    """The target or chain of -j or -g; empty for a rule that only counts."""
    for position, token in enumerate(args[:-1]):
        if token in _FREE_TEXT:
            continue
        if token in ("-j", "--jump", "-g", "--goto"):
            return args[position + 1]
    return ""


def _judge_arguments(args: Sequence[str], family: str, table: str, declared: Dict[str, set]) -> str:
    """Find slips that need no kernel: a target twice, an unknown option, an address of the other family."""
    if sum(token in ("-j", "--jump", "-g", "--goto") for token in args) > 1:
        return "has more than one target (-j)"
    if args and args[-1] in ("-j", "--jump", "-g", "--goto"):
        return f"has nothing after {args[-1]}"
    target = target_of(args)
    if target in BUILTIN_CHAINS[table]:
        return f"a built-in chain such as {target} cannot be a target"
    version = 4 if family == "ipv4" else 6
    for position, token in enumerate(args[:-1]):
        if token in ("-s", "--source", "--src", "-d", "--destination", "--dst"):
            for address in args[position + 1].split(","):
                try:
                    network = ipaddress.ip_network(address, strict=False)
                except ValueError:
                    return (
                        f"'{address}' after {token} is no address or network; names are not resolved, write the address"
                    )
                if network.version != version:
                    return (
                        f"'{address}' is no IPv{version} address; IPv4 rules belong into rules, IPv6 rules into rules6"
                    )
    known: List[str] = list(_CORE_OPTIONS)
    if target in declared.get(table, set()) or not target:
        pass
    elif target in _TARGET_OPTIONS:
        known += _TARGET_OPTIONS[target].split()
    else:
        return ""
    for position, token in enumerate(args[:-1]):
        if token in ("-m", "--match", "-p", "--protocol"):
            name = args[position + 1].lower()
            if name in _MATCH_OPTIONS:
                known += _MATCH_OPTIONS[name].split()
            elif token in ("-m", "--match"):
                return ""
    position = 0
    while position < len(args):
        token = args[position]
        if token in _FREE_TEXT:
            position += 1
        elif token.startswith("--"):
            if not any(option.startswith(token[2:]) for option in known):  # getopt_long takes abbreviations
                # a transposition in a short word ("sny") leaves two letters of three alike
                hint = difflib.get_close_matches(token[2:], known, 1, 0.6)
                return f"unknown option '{token}'" + (f"; did you mean '--{hint[0]}'?" if hint else "")
        elif re.fullmatch(r"-[A-Za-z]", token) and token not in _CORE_SHORT:
            return f"unknown option '{token}'"
        position += 1
    return ""


def parse_rules(rules: Sequence[str], family: str = "ipv4", option: str = "rules") -> List[Rule]:
    """Take all argument strings apart; raise RulesetError with every problem found."""
    parsed: List[Rule] = []
    problems: List[str] = []
    declared: Dict[str, set] = {}
    for number, text in enumerate(rules, 1):
        try:
            parsed.append(_parse_rule(text, number, option, family, declared))
        except RulesetError as exc:
            problems += exc.problems
    if problems:
        raise RulesetError(problems)
    return parsed


def lint_rules(rules: Sequence[str], family: str = "ipv4", option: str = "rules") -> List[str]:
    """Problems in a list of iptables argument strings that can be seen without iptables; empty when there are none."""
    try:
        _place(parse_rules(rules, family, option), {})
    except RulesetError as exc:
        return exc.problems
    return []


# ---------------------------------------------------------------------------------------------------------------------
# Our form


class Line(NamedTuple):
    """One rule of a chain of ours: its arguments and where it came from (empty: from the pair's typed options)."""

    args: Tuple[str, ...]
    origin: str = ""


@dataclass
class TablePlan:
    """One table of a Plan: our chains by name, the built-in chains that jump to them, the wanted policies."""

    chains: Dict[str, List[Line]] = field(default_factory=dict)
    hooks: Dict[str, str] = field(default_factory=dict)
    policies: Dict[str, str] = field(default_factory=dict)


Plan = Dict[str, TablePlan]


@dataclass(frozen=True)
class Service:
    """What the firewalls themselves offer: protocol (tcp, udp, sctp), port or range a:b, and where it may come from."""

    protocol: str
    port: str
    interface: str = ""
    sources: Tuple[str, ...] = ()


class Sync(NamedTuple):
    """A node's end of a sync link, and the other nodes' addresses on it."""

    interface: str
    address: str
    peers: Tuple[str, ...]
    port: int


@dataclass(frozen=True)
class Pair:
    """What must be known of the pair to protect it. Addresses are plain, without prefix length."""

    virtual_ips: Tuple[str, ...] = ()
    services: Tuple[Service, ...] = ()
    vrrp_peers: Tuple[Tuple[str, Tuple[str, ...]], ...] = ()
    sync: Tuple[Sync, ...] = ()
    protect_vips: bool = True

    def addresses(self) -> List[str]:
        """Every address that decides which families are in use."""
        found = list(self.virtual_ips) + [peer for link in self.sync for peer in link.peers]
        for _interface, peers in self.vrrp_peers:
            found += peers
        return found


def plain_address(text: str, option: str) -> str:
    """Cut a prefix length off an address; raise RulesetError naming the option when it is none."""
    try:
        return str(ipaddress.ip_interface(str(text)).ip)
    except ValueError:
        raise RulesetError(
            [f"{option}: '{text}' is no IP address; write it as 192.168.0.100 or fd00::100, with or without /prefix."]
        ) from None


def is_port(text: str) -> bool:
    """Whether the text is a port from 1 to 65535 or a rising range a:b."""
    found = re.fullmatch(r"(\d{1,5})(?::(\d{1,5}))?", text)
    return bool(found) and 1 <= int(found[1]) <= int(found[2] or found[1]) <= 65535


def is_network(text: str) -> bool:
    """Whether the text is an address or a network."""
    try:
        ipaddress.ip_network(text, strict=False)
    except ValueError:
        return False
    return True


def family_of(address: str) -> str:
    """Either ipv4 or ipv6."""
    return "ipv4" if ipaddress.ip_network(address, strict=False).version == 4 else "ipv6"


def _comment(text: str) -> Tuple[str, ...]:
    return ("-m", "comment", "--comment", text)


def _pair_lines(family: str, pair: Pair) -> Dict[Tuple[str, str], List[Line]]:
    """The pair's own rules by (table, chain): what they mean is told in docs/ruleset.md."""
    lines: Dict[Tuple[str, str], List[Line]] = {}

    def add(table: str, chain: str, *args: str) -> None:
        lines.setdefault((table, chain), []).append(Line(args))

    for interface, peers in pair.vrrp_peers:
        mine = [peer for peer in peers if family_of(peer) == family]
        if not mine:
            continue
        for peer in mine:
            who = ("-i", interface, "-s", peer, "-p", VRRP)
            add("filter", "INPUT", *who, *_comment(f"{NODE_COMMENT}, VRRP of a peer"), "-j", "ACCEPT")
        add("filter", "INPUT", "-i", interface, "-p", VRRP, *_comment("ctsync VRRP from a stranger"), "-j", "DROP")
        add("raw", "PREROUTING", "-i", interface, "-p", VRRP, "-j", "CT", "--notrack")
        add("raw", "OUTPUT", "-o", interface, "-p", VRRP, "-j", "CT", "--notrack")
    links = [link for link in pair.sync if family_of(link.address) == family]
    said = _comment(f"{NODE_COMMENT}, sync of a peer")
    for link in links:
        port = ("-p", "udp", "-m", "udp", "--dport", str(link.port))
        for peer in link.peers:  # the interface may be one that others use too: only the nodes' own traffic is meant
            come = ("-i", link.interface, "-s", peer, "-d", link.address, *port, *said)
            go = ("-o", link.interface, "-s", link.address, "-d", peer, *port, *said)
            add("filter", "INPUT", *come, "-j", "ACCEPT")
            add("raw", "PREROUTING", *come, "-j", "CT", "--notrack")
            add("raw", "OUTPUT", *go, "-j", "CT", "--notrack")
    for number in dict.fromkeys(link.port for link in links):
        port = ("-p", "udp", "-m", "udp", "--dport", str(number))
        add("filter", "INPUT", *port, *_comment("ctsync sync from a stranger"), "-j", "DROP")
    return lines


def _vip_lines(family: str, pair: Pair) -> List[Line]:
    """The chain for packets to a virtual address: declared things are accepted, strays dropped, nothing is rejected."""
    lines = [Line(("-m", "conntrack", "--ctstate", "RELATED,ESTABLISHED", "-j", "ACCEPT"))]
    for service in pair.services:
        sources = [source for source in service.sources if family_of(source) == family]
        if service.sources and not sources:
            continue
        where = ("-i", service.interface) if service.interface else ()
        match = ("-p", service.protocol, "-m", service.protocol, "--dport", str(service.port))
        for source in [("-s", address) for address in sources] or [()]:
            lines.append(Line((*where, *source, *match, "-j", "ACCEPT")))
    if family == "ipv4":
        lines.append(Line(("-p", "icmp", "-m", "icmp", "--icmp-type", "echo-request", "-j", "ACCEPT")))
    else:
        for kind in ("echo-request", "neighbour-solicitation", "neighbour-advertisement"):
            lines.append(Line(("-p", "ipv6-icmp", "-m", "icmp6", "--icmpv6-type", kind, "-j", "ACCEPT")))
    lines.append(Line((*_comment(STRAY_COMMENT), "-j", "DROP")))
    return lines


def nflog_twin(args: Sequence[str], group: int) -> Optional[Tuple[str, ...]]:
    """The NFLOG rule with the matches of a LOG rule; None for a rule with another target.

    The kernel's LOG is silent outside the first network namespace unless the host allows it; NFLOG is not.
    """
    if target_of(args) != "LOG":
        return None
    twin: List[str] = []
    prefix: List[str] = []
    position = 0
    while position < len(args):
        token = args[position]
        if token in ("-j", "--jump"):
            position += 1
        elif "--log-prefix".startswith(token) and token.startswith("--log-p"):
            position += 1
            prefix = ["--nflog-prefix", args[position]]
        elif "--log-level".startswith(token) and token.startswith("--log-l"):
            position += 1
        elif not token.startswith("--log-"):
            twin.append(token)
        position += 1
    return (*twin, "-j", "NFLOG", "--nflog-group", str(group), *prefix)


def _place(rules: Sequence[Rule], plan: Plan) -> None:
    """Put parsed rules into our chains, in the order in which iptables would have left them."""
    user_chains = {(rule.table, rule.chain) for rule in rules if rule.command == "new"}
    for rule in rules:
        table = plan.setdefault(rule.table, TablePlan())
        if rule.command == "policy":
            table.policies[rule.chain] = rule.policy
            continue
        lines = table.chains.setdefault(own_chain(rule.chain), [])
        if rule.command == "new":
            continue
        args = list(rule.args)
        for position, token in enumerate(args[:-1]):
            if token in ("-j", "--jump", "-g", "--goto") and (rule.table, args[position + 1]) in user_chains:
                args[position + 1] = own_chain(args[position + 1])
        line = Line(tuple(args), rule.origin)
        if rule.command == "append":
            lines.append(line)
        elif rule.index > len(lines) + 1:
            raise RulesetError(
                [f"{rule.origin}: the chain has only {len(lines)} rules before it; use -A, or a place that exists."]
            )
        else:
            lines.insert(rule.index - 1, line)


def build_plan(
    family: str,
    rules: Sequence[Rule],
    pair: Optional[Pair] = None,
    *,
    typed: Sequence[Rule] = (),
    forward_policy: str = "",
    count_resets: bool = False,
    nflog_group: Optional[int] = None,
) -> Plan:
    """Our chains for one family: the pair's VRRP and sync rules, the typed, the verbatim, and the drop of strays."""
    pair = pair or Pair()
    plan: Plan = {}
    _place(typed, plan)
    verbatim: Plan = {}
    _place(rules, verbatim)
    for name, table in verbatim.items():
        merged = plan.setdefault(name, TablePlan())
        merged.policies.update(table.policies)
        for chain, lines in table.chains.items():
            merged.chains.setdefault(chain, []).extend(lines)
    if forward_policy:
        plan.setdefault("filter", TablePlan()).policies["FORWARD"] = forward_policy
    for table in plan.values():
        for name, lines in table.chains.items():
            doubled: List[Line] = []
            for line in lines:
                twin = nflog_twin(line.args, nflog_group) if nflog_group is not None else None
                doubled += [Line(twin, line.origin), line] if twin else [line]
            table.chains[name] = doubled
    for (table_name, chain), lines in _pair_lines(family, pair).items():
        chains = plan.setdefault(table_name, TablePlan()).chains
        chains[own_chain(chain)] = lines + chains.get(own_chain(chain), [])
    vips = [address for address in pair.virtual_ips if family_of(address) == family]
    if pair.protect_vips and vips:
        chains = plan.setdefault("filter", TablePlan()).chains
        chains.setdefault(own_chain("INPUT"), []).extend(Line(("-d", address, "-j", VIP_CHAIN)) for address in vips)
        chains[VIP_CHAIN] = _vip_lines(family, pair)
    if count_resets:
        counter = ("-p", "tcp", "-m", "tcp", "--tcp-flags", "RST", "RST", *_comment(RESETS_COMMENT))
        chains = plan.setdefault("filter", TablePlan()).chains
        chains.setdefault(own_chain("OUTPUT"), []).insert(0, Line(counter))
    for table_name, table in plan.items():
        for builtin in BUILTIN_CHAINS[table_name]:
            if table.chains.get(own_chain(builtin)):
                table.hooks[builtin] = own_chain(builtin)
    return plan


def quote(token: str) -> str:
    """Quote one argument the way iptables-restore reads it: double quotes, backslash before quote and backslash."""
    if token and not re.search(r"[\s\"'\\#]", token):
        return token
    return '"' + token.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _jump(command: str, chain: str, own: str) -> str:
    return " ".join([*command.format(chain).split(), *(quote(t) for t in _comment(JUMP_COMMENT)), "-j", own])


class Rendered(NamedTuple):
    """iptables-restore input, and for each of its lines (from 1) the rule it came from."""

    text: str
    origins: Dict[int, str]


def render_plan(plan: Plan, position: str = "first", header: str = "") -> Rendered:
    """iptables-restore --noflush input that makes the whole plan where none of it exists (at boot, in a scratch)."""
    lines: List[str] = [f"# {line}" for line in header.splitlines()]
    origins: Dict[int, str] = {}
    for table_name in [name for name in BUILTIN_CHAINS if name in plan]:
        table = plan[table_name]
        lines.append(f"*{table_name}")
        lines += [f":{chain} - [0:0]" for chain in table.chains]
        lines += [f"-P {chain} {policy}" for chain, policy in table.policies.items()]
        for chain, rules in table.chains.items():
            for rule in rules:
                lines.append(" ".join(["-A", chain, *(quote(token) for token in rule.args)]))
                if rule.origin:
                    origins[len(lines)] = rule.origin
        for builtin, own in table.hooks.items():
            lines.append(_jump("-I {0} 1" if position == "first" else "-A {0}", builtin, own))
        lines.append("COMMIT")
    return Rendered("\n".join(lines) + "\n" if plan else "", origins)


def render_single(table_name: str, plan: Plan, chain: str, line: Line) -> str:
    """iptables-restore input with one rule of the plan only, to find out which one the kernel refuses."""
    chains = "".join(f":{name} - [0:0]\n" for name in plan[table_name].chains)
    rule = " ".join(["-A", chain, *(quote(token) for token in line.args)])
    return f"*{table_name}\n{chains}{rule}\nCOMMIT\n"


def jump_deletions(plan: Plan) -> List[List[str]]:
    """iptables arguments that delete each jump of the plan: starting the unit twice is then harmless."""
    return [
        ["-t", name, "-D", builtin, *_comment(JUMP_COMMENT), "-j", own]
        for name, table in plan.items()
        for builtin, own in table.hooks.items()
    ]


def used_sets(plan: Plan) -> List[str]:
    """Names of the ipsets that the plan refers to."""
    names: List[str] = []
    for table in plan.values():
        for lines in table.chains.values():
            for line in lines:
                for position, token in enumerate(line.args[:-1]):
                    if token in ("--match-set", "--add-set", "--del-set", "--map-set"):
                        names.append(line.args[position + 1])
    return sorted(set(names))


# ---------------------------------------------------------------------------------------------------------------------
# The kernel's form


class SavedRule(NamedTuple):
    """One rule as iptables-save prints it ('-A CHAIN ...') with its counters (0 when they were not asked for)."""

    rule: str
    packets: int = 0
    bytes: int = 0


@dataclass
class Table:
    """One table as iptables-save prints it: policies of built-in chains with packets and bytes, rules by chain."""

    policies: Dict[str, Tuple[str, int, int]] = field(default_factory=dict)
    chains: Dict[str, List[SavedRule]] = field(default_factory=dict)


Tables = Dict[str, Table]

_CHAIN = re.compile(r":(\S+) (\S+)(?: \[(\d+):(\d+)\])?")
_RULE = re.compile(r"(?:\[(\d+):(\d+)\] )?(-A (\S+).*)")
_OWN_TARGET = re.compile(rf"-[jg] {PREFIX}\S+$")


def parse_save(text: str) -> Tables:
    """Read iptables-save output, with or without -c. Raises RulesetError on a line it does not know."""
    tables: Tables = {}
    table: Optional[Table] = None
    for line in text.splitlines():
        line = line.rstrip()
        if not line or line.startswith("#"):
            continue
        if line.startswith("*"):
            table = tables.setdefault(line[1:], Table())
            continue
        if line == "COMMIT":
            table = None
            continue
        chain = _CHAIN.fullmatch(line)
        rule = _RULE.fullmatch(line)
        if table is not None and chain:
            table.chains.setdefault(chain[1], [])
            if chain[2] != "-":
                table.policies[chain[1]] = (chain[2], int(chain[3] or 0), int(chain[4] or 0))
        elif table is not None and rule:
            table.chains.setdefault(rule[4], []).append(SavedRule(rule[3], int(rule[1] or 0), int(rule[2] or 0)))
        else:
            raise RulesetError([f"iptables-save printed a line that cannot be understood: '{line}'."])
    return tables


def is_own_chain(name: str) -> bool:
    """Whether a chain belongs to the module."""
    return name.startswith(PREFIX)


def is_own_jump(rule: str) -> bool:
    """Whether a rule, as iptables-save prints it, jumps to one of our chains."""
    return _OWN_TARGET.search(rule) is not None


def foreign_rules(tables: Tables, table: str, chain: str) -> List[str]:
    """The rules of a built-in chain that are not ours."""
    rules = tables.get(table, Table()).chains.get(chain, [])
    return [saved.rule for saved in rules if not is_own_jump(saved.rule)]


def predict(live: Tables, wanted: Tables, policies: Dict[Tuple[str, str], str], position: str = "first") -> Tables:
    """What the live tables become: our chains, jumps and the given policies as wanted, all else as it is.

    `wanted` is what the kernel made of our plan in an empty namespace. Counters of what stays are kept.
    """
    after: Tables = copy.deepcopy(live)
    for name in wanted:
        after.setdefault(name, Table())
    for name, table in after.items():
        if name not in BUILTIN_CHAINS:
            continue
        goal = wanted.get(name, Table())
        for chain in [chain for chain in table.chains if is_own_chain(chain)]:
            if chain not in goal.chains:
                del table.chains[chain]
        for chain, rules in goal.chains.items():
            if is_own_chain(chain):
                if [r.rule for r in table.chains.get(chain, [])] != [
                    r.rule for r in rules
                ] or chain not in table.chains:
                    table.chains[chain] = list(rules)
                continue
            table.chains.setdefault(chain, [])
            if chain in goal.policies:
                table.policies.setdefault(chain, ("ACCEPT", 0, 0))
        for chain in [c for c in BUILTIN_CHAINS[name] if c in table.chains]:
            rules = table.chains[chain]
            foreign = [r for r in rules if not is_own_jump(r.rule)]
            jumps = [r for r in goal.chains.get(chain, []) if is_own_jump(r.rule)]
            table.chains[chain] = jumps + foreign if position == "first" else foreign + jumps
    for (name, chain), policy in policies.items():
        table = after.setdefault(name, Table())
        table.chains.setdefault(chain, [])
        before = table.policies.get(chain, ("ACCEPT", 0, 0))
        table.policies[chain] = (policy, before[1], before[2])
    return after


def put_back(live: Tables, before: Tables, policies: Dict[Tuple[str, str], str], position: str = "first") -> Tables:
    """The live tables with our chains and jumps as they were `before`, and the given policies.

    Where the rules of others are the same as before, our jumps return to exactly their old places, otherwise to the
    declared position.
    """
    after: Tables = copy.deepcopy(live)
    for name in [n for n in BUILTIN_CHAINS if n in live or n in before]:
        table, old = after.setdefault(name, Table()), before.get(name, Table())
        for chain in [c for c in table.chains if is_own_chain(c)]:
            if chain not in old.chains:
                del table.chains[chain]
        for chain, rules in old.chains.items():
            if is_own_chain(chain):
                table.chains[chain] = list(rules)
        for chain in BUILTIN_CHAINS[name]:
            now, then = table.chains.get(chain, []), old.chains.get(chain, [])
            foreign = [r for r in now if not is_own_jump(r.rule)]
            jumps = [r for r in then if is_own_jump(r.rule)]
            if _text(foreign) == [r.rule for r in then if not is_own_jump(r.rule)]:
                table.chains[chain] = list(then)
            else:
                table.chains[chain] = jumps + foreign if position == "first" else foreign + jumps
    for (name, chain), policy in policies.items():
        _policy, packets, size = after.setdefault(name, Table()).policies.get(chain, (policy, 0, 0))
        after[name].policies[chain] = (policy, packets, size)
    return after


def _text(rules: Sequence[SavedRule]) -> List[str]:
    return [saved.rule for saved in rules]


def render_change(current: Tables, target: Tables) -> str:
    """iptables-restore --noflush input that turns our part of `current` into our part of `target`; empty if equal.

    Chains that do not differ are not touched, so their counters stay. Rules of others are never named.
    """
    out: List[str] = []
    for name in [n for n in BUILTIN_CHAINS if n in current or n in target]:
        now, then = current.get(name, Table()), target.get(name, Table())
        declare: List[str] = []
        work: List[str] = []
        remove: List[str] = []
        for chain in [c for c in then.chains if is_own_chain(c)]:
            if chain not in now.chains or _text(now.chains[chain]) != _text(then.chains[chain]):
                declare.append(f":{chain} - [0:0]")
                work += _text(then.chains[chain])
        for chain in [c for c in now.chains if is_own_chain(c) and c not in then.chains]:
            declare.append(f":{chain} - [0:0]")
            remove.append(f"-X {chain}")
        for chain, (policy, _packets, _bytes) in then.policies.items():
            if policy != now.policies.get(chain, ("ACCEPT", 0, 0))[0]:
                work.insert(0, f"-P {chain} {policy}")
        for chain in BUILTIN_CHAINS[name]:
            before, after = _text(now.chains.get(chain, [])), _text(then.chains.get(chain, []))
            if _jump_places(before) != _jump_places(after):
                work += ["-D" + rule[2:] for rule in before if is_own_jump(rule)]
                for index, rule in enumerate(after, 1):
                    if is_own_jump(rule):
                        work.append(rule.replace(f"-A {chain}", f"-I {chain} {index}", 1))
        if declare or work or remove:
            out += [f"*{name}", *declare, *work, *remove, "COMMIT"]
    return "\n".join(out) + "\n" if out else ""


def _jump_places(rules: Sequence[str]) -> List[Tuple[int, str]]:
    return [(index, rule) for index, rule in enumerate(rules) if is_own_jump(rule)]


def render_view(tables: Tables, shown: Dict[str, List[str]]) -> str:
    """The part of the tables that concerns us, like iptables-save prints it, without counters (for --diff).

    `shown` names by table the built-in chains to show as a whole: those that jump to us or whose policy we set.
    """
    out: List[str] = []
    for name in [n for n in BUILTIN_CHAINS if n in tables]:
        table = tables[name]
        builtin = [c for c in BUILTIN_CHAINS[name] if c in shown.get(name, ())]
        own = sorted(c for c in table.chains if is_own_chain(c))
        if not builtin and not own:
            continue
        out.append(f"*{name}")
        out += [f":{chain} {table.policies.get(chain, ('ACCEPT', 0, 0))[0]}" for chain in builtin]
        out += [f":{chain} -" for chain in own]
        for chain in builtin + own:
            out += _text(table.chains.get(chain, []))
        out.append("COMMIT")
    return "\n".join(out) + "\n" if out else ""


def concerned_chains(*states: Tables) -> Dict[str, List[str]]:
    """Built-in chains, by table, that jump to one of our chains in any of the given states."""
    shown: Dict[str, List[str]] = {}
    for tables in states:
        for name, table in tables.items():
            for chain in BUILTIN_CHAINS.get(name, ()):
                if any(is_own_jump(saved.rule) for saved in table.chains.get(chain, [])):
                    shown.setdefault(name, []).append(chain)
    return shown


def own_rules(tables: Tables) -> Dict[str, Dict[str, List[str]]]:
    """Rules of our chains and the jumps to them, by table and chain, without counters."""
    found: Dict[str, Dict[str, List[str]]] = {}
    for name in sorted(tables):
        for chain in sorted(tables[name].chains):
            rules = _text(tables[name].chains[chain])
            if is_own_chain(chain):
                found.setdefault(name, {})[chain] = rules
            elif chain in BUILTIN_CHAINS.get(name, ()) and any(is_own_jump(rule) for rule in rules):
                found.setdefault(name, {})[chain] = [rule for rule in rules if is_own_jump(rule)]
    return found


def fingerprint_text(states: Dict[str, Tables]) -> str:
    """What the fingerprint is taken of: our chains of all tables, the jumps to them, and the policy of FORWARD.

    No counters, quotas among them, and no addresses in rules that differ from node to node by their nature
    (:data:`NODE_COMMENT`), so that the nodes of a pair have the same text. A family in which there is nothing of ours
    is left out.
    """
    lines: List[str] = []
    for family in sorted(states):
        tables = own_rules(states[family])
        if not tables:
            continue
        for table, chains in tables.items():
            for chain, rules in chains.items():
                lines += [f"{family} {table} {chain}", *(_lasting(rule) for rule in rules)]
        policies = states[family].get("filter", Table()).policies
        lines.append(f"{family} filter FORWARD policy {policies.get('FORWARD', ('ACCEPT', 0, 0))[0]}")
    return "\n".join(["ctsync ruleset 1", *lines, ""]) if lines else ""


def fingerprint(states: Dict[str, Tables]) -> str:
    """SHA-256 of `fingerprint_text`; empty where there is nothing of ours."""
    text = fingerprint_text(states)
    return hashlib.sha256(text.encode()).hexdigest() if text else ""


def _lasting(rule: str) -> str:
    """A rule without what differs from node to node by its nature, and what counts down (the rest of a quota)."""
    rule = re.sub(r"(?<= )--quota \d+", "--quota *", rule)
    if f'--comment "{NODE_COMMENT}' not in rule:
        return rule
    return re.sub(r"(?<= )(-[sd]) \S+", r"\1 *", rule)


def find_program(name: str) -> str:
    """Path of a program, the administrator's folders included; empty when there is none."""
    folders = [*os.environ.get("PATH", "").split(os.pathsep), "/usr/local/sbin", "/usr/sbin", "/sbin"]
    for folder in [f for f in folders if f]:
        path = os.path.join(folder, name)
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return path
    return ""


def program_name(family: str, backend: str, action: str) -> str:
    """Name of a program of iptables: action is '', '-save' or '-restore'; backend is auto, nft or legacy."""
    base = "iptables" if family == "ipv4" else "ip6tables"
    return base + ("" if backend == "auto" else f"-{backend}") + action


def read_live(run_command: Callable[..., Tuple[int, str, str]], backend: str = "auto") -> Dict[str, Any]:
    """What the kernel holds of us now, with counters, for facts. Changes nothing.

    `run_command` is AnsibleModule.run_command or a function like it: a list in, (rc, stdout, stderr) out. Result:
    `fingerprint` (as the ruleset module returns it), `chains` and `policies` of IPv4, the same two under `ipv6`, and
    `error` (iptables' words, or empty). A machine without iptables gives empty values.
    """
    states: Dict[str, Tables] = {}
    errors: List[str] = []
    for family in FAMILIES:
        path = find_program(program_name(family, backend, "-save"))
        if not path:
            continue
        rc, out, err = run_command([path, "-c"])
        if rc == 0:
            states[family] = parse_save(out)
        elif family == "ipv4":
            errors.append(err.strip())

    def part(tables: Tables) -> Dict[str, Any]:
        chains: Dict[str, Any] = {}
        for name, table in tables.items():
            for chain, rules in table.chains.items():
                if is_own_chain(chain):
                    listed = [{"rule": r.rule, "packets": r.packets, "bytes": r.bytes} for r in rules]
                    chains.setdefault(name, {})[chain] = {"rules": listed}
        policies = {
            chain: {"policy": policy, "packets": packets, "bytes": size}
            for chain, (policy, packets, size) in tables.get("filter", Table()).policies.items()
        }
        return {"chains": chains, "policies": policies}

    return {
        "fingerprint": fingerprint(states),
        **part(states.get("ipv4", {})),
        "ipv6": part(states.get("ipv6", {})),
        "error": "; ".join(errors),
    }
