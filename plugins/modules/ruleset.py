#!/usr/bin/python
# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: ruleset
short_description: Firewall rules of a highly available pair, in chains of their own
version_added: 0.1.0
author: The ctsync authors (@ctsync)
description:
  - Takes iptables rules as they are written on a command line and realises them in chains of its own
    (C(CTSYNC-FORWARD) for C(FORWARD) and so on), each reached by one jump from the built-in chain.
    Rules and chains of others stay as they are.
  - Adds what a pair of firewalls needs, computed from typed options. VRRP and state replication are accepted from the
    peers only and are not tracked, and stray packets to a virtual address are dropped, never rejected, so that a node
    which takes over does not reset sessions.
  - One C(iptables-restore --noflush) per address family applies all of it. Whether anything differs is decided by the
    kernel. The wanted rules are loaded into an empty network namespace that exists only for this moment, and what
    iptables-save prints there is compared with what it prints for the machine.
  - A rule that iptables does not accept is reported before anything is changed.
  - Every minute the node itself compares the rules that run with those that were applied (O(watch)).
  - New rules are on probation. A process on the node puts the old ones back, unless the controller confirms the new
    ones over a new connection within O(rollback_timeout) seconds. The playbook needs nothing for this, and no C(async).
extends_documentation_fragment:
  - ctsync.ha_firewall.attributes
attributes:
  idempotent:
    details: A run that changes nothing also keeps the counters of all rules.
  async:
    description: Supports being used with the C(async) keyword.
    support: none
    details: The module waits for nothing but its own confirmation, at most O(rollback_timeout) seconds.
  platform:
    details: >-
      Needs iptables 1.6.2 or newer (nf_tables or legacy), unshare of util-linux, and systemd for O(persist) and
      O(watch).
options:
  address_sets:
    description:
      - Named sets of addresses for O(filter_rules) and O(nat_rules), which refer to them as C(@name).
      - Each is a list of addresses, networks and ranges (C(a-b)) of either family, of sets named before (C(@name)),
        and of exclusions (C(!) before any of these). A set is what it names less what it excludes.
    type: dict
    default: {}
  backend:
    description:
      - Which iptables programs to use. V(auto) takes C(iptables) as the machine's alternatives have it.
    type: str
    choices: [auto, nft, legacy]
    default: auto
  canary:
    description:
      - A command that must succeed on the node before new rules are confirmed, for example
        C(ping -c 1 -W 2 192.0.2.1). If it fails, the old rules are put back at once.
      - It is run without a shell, and has the rest of O(rollback_timeout) for itself.
    type: str
  check_flows:
    description:
      - Before rules change, also in check mode, find out which established flows the new ones would cut, and warn.
      - A packet of each flow is sent through the present rules and through the new ones, in network namespaces that end
        with it. Nothing is sent to the network.
    type: bool
    default: true
  config_directory:
    description:
      - Directory for C(ruleset.v4) and C(ruleset.v6), which are restored at boot.
    type: path
    default: /etc/ctsync
  count_resets:
    description:
      - Count TCP resets that the node itself sends, by a rule without target in C(CTSYNC-OUTPUT).
    type: bool
    default: false
  filter_rules:
    description:
      - Rules of the table C(filter) as data. One rule does for both IPv4 and IPv6, as far as its addresses allow.
      - In each chain they come before O(rules) and O(rules6), in their order.
      - Every mistake is named with the number of the rule and the key.
    type: list
    elements: dict
    default: []
    suboptions:
      action:
        description: What becomes of a packet that matches, one of V(accept), V(drop), V(reject), V(log) and V(return).
        type: str
        required: true
      chain:
        description: C(INPUT), C(FORWARD) or C(OUTPUT).
        type: str
        default: FORWARD
      comment:
        description: Shown with the rule in the kernel's listings.
        type: str
      ctstate:
        description:
          - States of the connection, C(NEW), C(ESTABLISHED), C(RELATED), C(INVALID), C(UNTRACKED), C(SNAT), C(DNAT).
        type: list
        elements: str
      destination_ports:
        description: Ports and ranges (C(8000-8010)); needs O(filter_rules[].protocols).
        type: list
        elements: str
      destinations:
        description: As O(filter_rules[].sources).
        type: list
        elements: str
      families:
        description: C(ipv4), C(ipv6) or both. Default are those that the addresses leave.
        type: list
        elements: str
      icmp_types:
        description: Types of ICMP, by name or number.
        type: list
        elements: str
      in_interfaces:
        description: Interfaces by which the packet came, C(eth+) for all that begin so, or a single C(!eth0).
        type: list
        elements: str
      limit:
        description: Match no more often than this, for example C(10/minute).
        type: str
      log_prefix:
        description: Begins the line of V(log).
        type: str
      out_interfaces:
        description: Interfaces by which the packet goes.
        type: list
        elements: str
      protocols:
        description:
          - Names (C(tcp), C(udp), C(sctp), C(icmp), C(esp), C(gre) and so on) or numbers. C(icmp) is ICMPv6 in IPv6.
        type: list
        elements: str
      reject_with:
        description: What V(reject) answers, for example C(tcp-reset).
        type: str
      source_ports:
        description: As O(filter_rules[].destination_ports).
        type: list
        elements: str
      sources:
        description:
          - Addresses, networks, ranges (C(a-b)) and sets (C(@name)); with a C(!) before it, one that does not match.
          - Only exclusions mean all addresses but these.
        type: list
        elements: str
      syn:
        description: Only the first packet of a TCP connection.
        type: bool
  forward_policy:
    description:
      - The policy of C(FORWARD) in both families, as C(-P FORWARD) sets it in O(rules).
    type: str
    choices: [ACCEPT, DROP]
  nat_rules:
    description:
      - Rules of the table C(nat) as data, the same way as O(filter_rules). Without any address they are for IPv4 only.
    type: list
    elements: dict
    default: []
    suboptions:
      action:
        description:
          - V(snat), V(dnat), V(masquerade) and V(redirect), or V(accept) to leave packets as they are.
        type: str
        required: true
      chain:
        description:
          - V(snat) and V(masquerade) use C(POSTROUTING), V(dnat) and V(redirect) use C(PREROUTING) or, if you say so,
            C(OUTPUT). V(accept) needs it said.
        type: str
      comment:
        description: Shown with the rule in the kernel's listings.
        type: str
      ctstate:
        description: States of the connection.
        type: list
        elements: str
      destination_ports:
        description: Ports and ranges; needs O(nat_rules[].protocols).
        type: list
        elements: str
      destinations:
        description: As O(filter_rules[].sources).
        type: list
        elements: str
      families:
        description: C(ipv4), C(ipv6) or both.
        type: list
        elements: str
      in_interfaces:
        description: Interfaces by which the packet came.
        type: list
        elements: str
      out_interfaces:
        description: Interfaces by which the packet goes.
        type: list
        elements: str
      persistent:
        description: Give a client the same address each time, where there are several.
        type: bool
      protocols:
        description: Names or numbers.
        type: list
        elements: str
      source_ports:
        description: Ports and ranges.
        type: list
        elements: str
      sources:
        description: As O(filter_rules[].sources), for example C(!10.8.0.0/16) for what shall not be translated.
        type: list
        elements: str
      to_destination:
        description: The address or range (C(a-b)) to which V(dnat) sends.
        type: str
      to_ports:
        description: The port or range to translate to.
        type: str
      to_source:
        description: The address or range from which V(snat) sends, a virtual address as a rule.
        type: str
  nflog_group:
    description:
      - Give every rule with C(-j LOG) a twin before it with C(-j NFLOG) and this group, because LOG is silent in
        containers unless the host allows it.
    type: int
  persist:
    description:
      - Restore the rules at boot, by the systemd unit C(ctsync-ruleset.service).
      - If V(false), files and unit of an earlier run are removed.
    type: bool
    default: true
  position:
    description:
      - Where the jump stands in the built-in chain, before or after the rules of others.
    type: str
    choices: [first, last]
    default: first
  protect_vips:
    description:
      - Drop packets to an address of O(virtual_ips) that belong to no known connection, to none of O(services) and are
        no echo request. TCP, UDP and ICMP errors alike are dropped and never rejected.
    type: bool
    default: true
  rollback_id:
    description:
      - Name of the rollback, given by the module's own action plugin. Leave it out.
    type: str
  rollback_step:
    description:
      - Which half of the work is asked for, given by the module's own action plugin. Leave it out.
    type: str
    choices: [apply, confirm, abort, status]
    default: apply
  rollback_timeout:
    description:
      - Seconds in which the controller must confirm new rules over a new connection before the node puts the old ones
        back. V(0) for none, and then a mistake in a rule can lock you out.
      - The rules are only stored for boot after the confirmation, so a reboot brings the old ones back, too.
      - With a connection that does not pass the network (V(local), V(docker)) the confirmation proves less.
    type: int
    default: 30
  rules:
    description:
      - IPv4 rules as iptables arguments, verbatim and in order, for example C(-A FORWARD -i eth0 -j ACCEPT).
      - Commands are C(-A), C(-I), C(-P) for C(FORWARD), and C(-N) for chains of your own.
    type: list
    elements: str
    default: []
  rules6:
    description:
      - IPv6 rules as ip6tables arguments; the same as O(rules).
    type: list
    elements: str
    default: []
  services:
    description:
      - What the firewalls themselves offer on O(virtual_ips). Name the port of SSH here if you connect to a virtual
        address. Other addresses of the node are not restricted.
    type: list
    elements: dict
    default: []
    suboptions:
      protocol:
        description: Transport protocol.
        type: str
        choices: [tcp, udp, sctp]
        default: tcp
      port:
        description: Port, or a range such as V(8000:8010).
        type: str
        required: true
      interface:
        description: Only from this interface.
        type: str
      sources:
        description: Only from these addresses or networks.
        type: list
        elements: str
        default: []
  state:
    description:
      - V(present) makes the rules so. V(absent) removes chains, jumps, files and unit, and restores the policy that was
        replaced.
    type: str
    choices: [present, absent]
    default: present
  state_directory:
    description:
      - Directory for C(ruleset.json), which remembers the replaced policies.
    type: path
    default: /var/lib/ctsync
  sync:
    description:
      - The links on which the pair replicates its connections.
      - The UDP port of each is accepted from the peers on its interface only, and that traffic is not tracked.
    type: list
    elements: dict
    default: []
    suboptions:
      interface:
        description: Interface of the link.
        type: str
        required: true
      address:
        description: The node's own address on the link.
        type: str
        required: true
      peers:
        description: Addresses of the other nodes on the link.
        type: list
        elements: str
        required: true
      port:
        description: UDP port.
        type: int
        default: 3781
  take_over_forward_policy:
    description:
      - The module refuses to set the policy of C(FORWARD) to C(DROP) on a machine that forwards for others, that is
        where C(FORWARD) has other rules and forwarding is on (Docker is an example). V(true) allows it.
    type: bool
    default: false
  validate_only:
    description:
      - Only test the rules, by the kernel where iptables is installed and by their form elsewhere. Changes nothing.
    type: bool
    default: false
  virtual_ips:
    description:
      - Virtual addresses of the pair, with or without prefix length.
    type: list
    elements: str
    default: []
  vrrp_peers:
    description:
      - Who may send VRRP. On each interface named here VRRP is accepted from these addresses, dropped from others, and
        not tracked.
    type: list
    elements: dict
    default: []
    suboptions:
      interface:
        description: Interface of the VRRP instance.
        type: str
        required: true
      addresses:
        description: Addresses of the other nodes on this interface.
        type: list
        elements: str
        required: true
  watch:
    description:
      - Compare the rules that run with those that were applied every minute, by the systemd timer
        C(ctsync-ruleset-watch.timer), and keep C(/run/ctsync/ruleset.fingerprint) up to date, so that the daemon's
        verdict shows a rule that somebody has added to or removed from the module's chains by hand.
      - If V(false), what an earlier run has installed for that is removed.
    type: bool
    default: true
  will_forward:
    description:
      - Address families (C(ipv4), C(ipv6)) for which forwarding will be turned on after this, as the role C(kernel)
        does. For a preflight, with O(validate_only=true). What others have in C(FORWARD) of a machine that does not
        forward has no effect yet. The module judges it as it will be, and warns of it.
    type: list
    elements: str
    choices: [ipv4, ipv6]
    default: []
seealso:
  - module: ansible.builtin.iptables
  - module: community.general.iptables_state
"""

EXAMPLES = r"""
- name: The rules of a simple primary/backup pair
  ctsync.ha_firewall.ruleset:
    rules:
      - -P FORWARD DROP
      - -A FORWARD -i eth0 -m state --state ESTABLISHED,RELATED -j ACCEPT
      - -A FORWARD -i eth1 -p tcp --syn -m state --state NEW -j ACCEPT
      - -A FORWARD -i eth1 -p tcp -m state --state ESTABLISHED -j ACCEPT
      - -A FORWARD -m state --state INVALID -j LOG
      - -I POSTROUTING -t nat -s 192.168.0.3 -j SNAT --to 192.168.1.100
    virtual_ips: [192.168.0.100/24, 192.168.1.100/24]
    services:
      - protocol: tcp
        port: "22"
    vrrp_peers:
      - interface: eth1
        addresses: [192.168.0.2]
      - interface: eth0
        addresses: [192.168.1.2]
    sync:
      - interface: eth2
        address: 192.168.100.1
        peers: [192.168.100.2]

- name: The same as data, and more
  ctsync.ha_firewall.ruleset:
    forward_policy: DROP
    address_sets:
      inside: [192.168.0.0/24, "fd00:c0de::/64"]
      servers: ["@inside", "!192.168.0.3"]
    filter_rules:
      - {action: accept, in_interfaces: [eth0], ctstate: [ESTABLISHED, RELATED]}
      - {action: accept, in_interfaces: [eth1], sources: ["@inside"], protocols: [tcp, udp]}
      - action: accept
        comment: web servers
        in_interfaces: [eth0]
        destinations: ["@servers"]
        protocols: [tcp]
        destination_ports: [80, 443, 8000-8010]
        ctstate: [NEW]
    nat_rules:
      - action: snat
        out_interfaces: [eth0]
        sources: [192.168.0.0/24, "!192.168.0.9"]
        protocols: [tcp, udp]
        to_source: 192.168.1.100
        to_ports: 1024-65535

- name: Test rules on the machine before anything is changed
  ctsync.ha_firewall.ruleset:
    rules: "{{ ruleset_rules }}"
    validate_only: true

- name: Give the machine back as it was
  ctsync.ha_firewall.ruleset:
    state: absent
"""

RETURN = r"""
chains:
  description: The rules of the module's chains and the jumps to them as the kernel prints them, by family and table.
  returned: always
  type: dict
  sample:
    ipv4:
      filter:
        CTSYNC-FORWARD: [-A CTSYNC-FORWARD -m state --state INVALID -j LOG]
        FORWARD: ['-A FORWARD -m comment --comment "ctsync: own rules" -j CTSYNC-FORWARD']
fingerprint:
  description:
    - SHA-256 over RV(chains) and the policy of C(FORWARD) as the kernel prints them, without counters, and without the
      addresses in the rules for VRRP and replication, so that it is the same on all nodes of a pair. Empty when there
      are no rules, or when iptables is not installed.
    - It also stands in C(/run/ctsync/ruleset.fingerprint). The M(ctsync.ha_firewall.ha_facts) module reports the same
      number for what the kernel holds at that time.
  returned: always
  type: str
  sample: 0b0cbf6bd0c9e5f1d3f94f1a3f1d0a1d5c3ad0d8ab9a3d2a51a4bd7a6f7c0e11
policies:
  description: Policies set or restored by the module, by family.
  returned: always
  type: dict
  sample: {"ipv4": {"filter FORWARD": "DROP"}}
rollback:
  description:
    - The probation of the rules. C(armed) is true, C(id) its name, C(deadline_s) the seconds in which the rules had to
      be confirmed, and C(outcome) is V(confirmed), V(rolled back), V(failed) or V(unknown).
  returned: when the rules were changed
  type: dict
  sample: {"armed": true, "id": "5f0c1d8e9a7b3c42", "outcome": "confirmed", "deadline_s": 30}
validated_by:
  description: Who tested the rules, V(kernel) or (without iptables on the machine) V(syntax).
  returned: when O(state=present)
  type: str
  sample: kernel
would_cut:
  description:
    - Established flows that the new rules cut (C(count), and the first of them in C(flows)), of those C(checked).
    - Nothing is said of C(unknown) flows, which do not pass a trial of the present rules either, and of C(not_checked)
      ones, which are neither TCP nor UDP or more than 2000. C(reason) says why nothing was checked, if so.
  returned: when the rules change and O(check_flows=true)
  type: dict
  sample:
    checked: 812
    count: 1
    flows: ["tcp 192.168.0.3:51356 -> 192.168.1.3:22"]
    not_checked: 4
    reason: ""
    unknown: 0
"""

import contextlib
import hashlib
import json
import os
import secrets
import shlex
import sys
import tempfile

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.ctsync.ha_firewall.plugins.module_utils import (
    _flow_trial,
    _rollback,
    _ruleset,
    _ruleset_watch,
    _systemd,
    _typed_rules,
)
from ansible_collections.ctsync.ha_firewall.plugins.module_utils._iptables import (
    Iptables,
    ScratchError,
    blamed_rule,
    without_line,
)

UNIT = "ctsync-ruleset.service"
UNIT_PATH = "/etc/systemd/system/" + UNIT
FORWARDING = {"ipv4": "/proc/sys/net/ipv4/ip_forward", "ipv6": "/proc/sys/net/ipv6/conf/all/forwarding"}
KERNEL_VARIABLES = {"ipv4": "kernel_forward_ipv4", "ipv6": "kernel_forward_ipv6"}  # of the role kernel
SILENTLY = """/bin/sh -c 'exec "$$0" "$$@" 2>/dev/null'"""  # in a unit: a jump that is not there is no news
FINGERPRINT_PATH = _ruleset_watch.FINGERPRINT_PATH
WATCH_FILES = (_ruleset_watch.PROGRAM_PATH, _ruleset_watch.SERVICE_PATH, _ruleset_watch.TIMER_PATH)
UNITS = {
    UNIT_PATH: UNIT,
    _ruleset_watch.SERVICE_PATH: _ruleset_watch.SERVICE,
    _ruleset_watch.TIMER_PATH: _ruleset_watch.TIMER,
}
FILES = {"ipv4": "ruleset.v4", "ipv6": "ruleset.v6"}
LONGEST_WAIT = 120  # seconds, for the probation of an earlier run to end
LOCK_PATIENCE = 20  # seconds for the watch, or another run, to end what it does now
PYTHON = "/usr/bin/python3"  # that of the platform, for what stays on the node
SHORTEST_ROLLBACK = 5  # seconds; a new connection takes one or two
LONGEST_ROLLBACK = 3600  # seconds
HEADER = "Firewall rules of ctsync, restored at boot by ctsync-ruleset.service. Written by Ansible: changes are lost."

SERVICE_SPEC = {
    "protocol": {"type": "str", "choices": ["tcp", "udp", "sctp"], "default": "tcp"},
    "port": {"type": "str", "required": True},
    "interface": {"type": "str"},
    "sources": {"type": "list", "elements": "str", "default": []},
}
VRRP_SPEC = {
    "interface": {"type": "str", "required": True},
    "addresses": {"type": "list", "elements": "str", "required": True},
}
SYNC_SPEC = {
    "interface": {"type": "str", "required": True},
    "address": {"type": "str", "required": True},
    "peers": {"type": "list", "elements": "str", "required": True},
    "port": {"type": "int", "default": 3781},
}
ARGUMENT_SPEC = {
    "address_sets": {"type": "dict", "default": {}},
    "backend": {"type": "str", "choices": ["auto", "nft", "legacy"], "default": "auto"},
    "canary": {"type": "str"},
    "check_flows": {"type": "bool", "default": True},
    "config_directory": {"type": "path", "default": "/etc/ctsync"},
    "count_resets": {"type": "bool", "default": False},
    "filter_rules": {"type": "list", "elements": "dict", "default": []},
    "forward_policy": {"type": "str", "choices": ["ACCEPT", "DROP"]},
    "nat_rules": {"type": "list", "elements": "dict", "default": []},
    "nflog_group": {"type": "int"},
    "persist": {"type": "bool", "default": True},
    "position": {"type": "str", "choices": ["first", "last"], "default": "first"},
    "protect_vips": {"type": "bool", "default": True},
    "rollback_id": {"type": "str"},
    "rollback_step": {"type": "str", "choices": ["apply", "confirm", "abort", "status"], "default": "apply"},
    "rollback_timeout": {"type": "int", "default": 30},
    "rules": {"type": "list", "elements": "str", "default": []},
    "rules6": {"type": "list", "elements": "str", "default": []},
    "services": {"type": "list", "elements": "dict", "default": [], "options": SERVICE_SPEC},
    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
    "state_directory": {"type": "path", "default": "/var/lib/ctsync"},
    "sync": {"type": "list", "elements": "dict", "options": SYNC_SPEC, "default": []},
    "take_over_forward_policy": {"type": "bool", "default": False},
    "validate_only": {"type": "bool", "default": False},
    "virtual_ips": {"type": "list", "elements": "str", "default": []},
    "vrrp_peers": {"type": "list", "elements": "dict", "default": [], "options": VRRP_SPEC},
    "watch": {"type": "bool", "default": True},
    "will_forward": {"type": "list", "elements": "str", "choices": ["ipv4", "ipv6"], "default": []},
}


def pair_from(params: dict) -> _ruleset.Pair:
    """The typed options as a value; raises RulesetError with every wrong address or port."""
    problems = []

    def address(text: str, option: str) -> str:
        try:
            return _ruleset.plain_address(text, option)
        except _ruleset.RulesetError as exc:
            problems.extend(exc.problems)
            return "0.0.0.0"

    services = []
    for number, service in enumerate(params["services"], 1):
        option = f"services[{number}]"
        if not _ruleset.is_port(service["port"]):
            problems.append(f"{option}.port: '{service['port']}' is no port; write 1-65535, or a range as 8000:8010.")
        for source in service["sources"]:
            if not _ruleset.is_network(source):
                problems.append(f"{option}.sources: '{source}' is no address or network; write it as 192.0.2.0/24.")
        services.append(
            _ruleset.Service(
                service["protocol"], service["port"], service["interface"] or "", tuple(service["sources"])
            )
        )
    vrrp = tuple(
        (peer["interface"], tuple(address(a, f"vrrp_peers[{number}].addresses") for a in peer["addresses"]))
        for number, peer in enumerate(params["vrrp_peers"], 1)
    )
    links = []
    for number, link in enumerate(params["sync"] or [], 1):
        option = f"sync[{number}]"
        if not _ruleset.is_port(str(link["port"])):
            problems.append(f"{option}.port: {link['port']} is no port; write 1-65535.")
        own = address(link["address"], f"{option}.address")
        peers = tuple(address(peer, f"{option}.peers") for peer in link["peers"])
        if any(_ruleset.family_of(peer) != _ruleset.family_of(own) for peer in peers):
            problems.append(
                f"{option}: address and peers are of different IP versions; give all as IPv4 or all as IPv6."
            )
        links.append(_ruleset.Sync(link["interface"], own, peers, link["port"]))
    pair = _ruleset.Pair(
        virtual_ips=tuple(address(a, "virtual_ips") for a in params["virtual_ips"]),
        services=tuple(services),
        vrrp_peers=vrrp,
        sync=tuple(links),
        protect_vips=params["protect_vips"],
    )
    if problems:
        raise _ruleset.RulesetError(problems)
    return pair


def plans_from(params: dict) -> dict:
    """One plan for each family in use; raises RulesetError with every problem of every option."""
    problems = []
    rules, pair = {}, _ruleset.Pair()
    for family, option in (("ipv4", "rules"), ("ipv6", "rules6")):
        try:
            rules[family] = _ruleset.parse_rules(params[option], family, option)
        except _ruleset.RulesetError as exc:
            problems += exc.problems
    try:
        pair = pair_from(params)
    except _ruleset.RulesetError as exc:
        problems += exc.problems
    typed: dict = {}
    try:
        typed = _typed_rules.compile_rules(params["filter_rules"], params["nat_rules"], params["address_sets"])
    except _ruleset.RulesetError as exc:
        problems += exc.problems
    problems += probation_problems(params)
    policy = params["forward_policy"] or ""
    for rule in [rule for family in rules for rule in rules[family] if rule.command == "policy" and policy]:
        problems.append(f"forward_policy: {policy} and {rule.origin} say it twice; leave one of them out.")
    group = params["nflog_group"]
    if group is not None and not 0 <= group <= 65535:
        problems.append(f"nflog_group: {group} is out of range; write 0-65535.")
    if problems:
        raise _ruleset.RulesetError(problems)
    families = ["ipv4"]
    if (
        params["rules6"]
        or typed["ipv6"]
        or policy
        or any(_ruleset.family_of(address) == "ipv6" for address in pair.addresses())
    ):
        families.append("ipv6")
    return {
        family: _ruleset.build_plan(
            family,
            rules[family],
            pair,
            typed=typed[family],
            forward_policy=policy,
            count_resets=params["count_resets"],
            nflog_group=group,
        )
        for family in families
    }


def probation_problems(params: dict) -> list:
    """What is wrong with the options of the rollback."""
    problems = []
    timeout, canary = params["rollback_timeout"], params["canary"]
    if timeout and not SHORTEST_ROLLBACK <= timeout <= LONGEST_ROLLBACK:
        problems.append(
            f"rollback_timeout: {timeout} is out of range; write {SHORTEST_ROLLBACK}-{LONGEST_ROLLBACK}, or 0 for none."
        )
    if canary is not None:
        try:
            words = shlex.split(canary)
        except ValueError as exc:
            problems.append(f"canary: '{canary}' cannot be split into words ({str(exc).lower()}).")
        else:
            if not words:
                problems.append("canary: is empty; leave the option out, or write a command.")
        if not timeout:
            problems.append("canary: needs a rollback_timeout; with 0 its failure would change nothing.")
    if params["rollback_id"] is not None and not _rollback.is_ident(params["rollback_id"]):
        problems.append("rollback_id: is given by the action plugin; leave it out.")
    return problems


def locked_out(pair: _ruleset.Pair, connection: str) -> str:
    """Why the SSH connection (value of SSH_CONNECTION) could not be opened again; empty if it could."""
    words = connection.split()
    if len(words) != 4 or not pair.protect_vips or words[2] not in pair.virtual_ips:
        return ""
    port = int(words[3])
    for service in pair.services:
        low, _colon, high = service.port.partition(":")
        if service.protocol == "tcp" and int(low) <= port <= int(high or low):
            return ""
    return (
        f"You are connected to the virtual address {words[2]} port {port}, which is not among the services, so nobody"
        f" could connect there again. Add {{protocol: tcp, port: {port}}} to 'services', or connect to an address of"
        " the node itself."
    )


class Run:
    """One run of the module: look, decide, and only then change."""

    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.params = module.params
        self.present = module.params["state"] == "present"
        self.tools = {family: Iptables(module, family, module.params["backend"]) for family in _ruleset.FAMILIES}
        self.state_file = os.path.join(self.params["state_directory"], "ruleset.json")
        self.live: dict = {}
        self.saved: dict = {}
        self.after: dict = {}
        self.policies: dict = {}
        self.remembered: dict = {}
        self.validated_by = "kernel"
        self.rollback: dict = {}
        self.would_cut: dict = {}
        self.lock = _ruleset_watch.Lock()

    def be_alone(self) -> None:
        """Wait until nobody else changes the rules or compares them, and keep it so; fail when it takes too long."""
        deadline = _rollback.now() + LONGEST_WAIT
        while True:
            armed = _rollback.settle(max(0.0, deadline - _rollback.now()))
            if armed:
                self.module.fail_json(
                    msg=f"The rules of another run are still on probation ({', '.join(armed)}). Run again when they are"
                    " confirmed or rolled back. Nothing was changed."
                )
            try:
                taken = self.lock.take(LOCK_PATIENCE)
            except OSError as exc:
                self.module.fail_json(
                    msg=f"The lock of the rules cannot be had: {exc.filename}: {exc.strerror}. The module needs to"
                    " write below /run. Nothing was changed."
                )
            if not taken:
                self.module.fail_json(
                    msg=f"Another run of this module, or the watch ({_ruleset_watch.SERVICE}), has held the lock of"
                    f" the rules for {LOCK_PATIENCE} s (flock of {_rollback.FOLDER}). Run again when it has ended."
                    " Nothing was changed."
                )
            if not _rollback.armed_now():
                return
            self.lock.give_back()  # somebody was faster, and needs it for the confirmation

    # -- look

    def read_live(self, families: list) -> None:
        """Read what the kernel holds; an unused family that cannot be read is left alone."""
        for family, tool in self.tools.items():
            if not tool.available:
                continue
            outcome = tool.save()
            if outcome.rc != 0:
                if family in families:
                    self.fail_command(f"The present {family} rules cannot be read: {outcome.words}.", outcome)
                continue
            self.live[family] = _ruleset.parse_save(outcome.out)
            self.saved[family] = outcome.out

    def load_state(self) -> dict:
        """The policies that earlier runs replaced: {family: {'filter FORWARD': {replaced, set}}}."""
        text = read_text(self.state_file)
        if text is None:
            return {}
        try:
            content = json.loads(text)
            return dict(content["policies"])
        except (ValueError, KeyError, TypeError):
            return self.module.fail_json(
                msg=f"{self.state_file} does not hold what this module wrote there. It remembers the chain policies to"
                " restore; repair it, or remove it if the present policies are to be kept for good."
            )

    def normalise(self, family: str, plan: dict) -> dict:
        """What the kernel makes of a plan. Fails with rule number, rule and iptables' words if it refuses it."""
        if not plan:
            return {}
        tool, position = self.tools[family], self.params["position"]
        rendered = _ruleset.render_plan(plan, position)
        sets = _ruleset.used_sets(plan)
        try:
            outcome = tool.scratch(rendered.text, sets)
            if outcome.rc == 0:
                return _ruleset.parse_save(outcome.out)
            origin, words = blamed_rule(outcome.words, rendered.origins)
            if not origin:
                origin, words = self.find_culprit(tool, plan, sets) or (f"The {family} rules", words)
        except ScratchError as exc:
            return self.module.fail_json(
                msg=f"The rules cannot be tested, because no network namespace can be made here ({exc}). Run the module"
                " as root, and in a container give it the capability SYS_ADMIN. Nothing was changed."
            )
        return self.module.fail_json(
            msg=f"{origin}: refused by {os.path.basename(tool.program)}: {words}. Nothing was changed.",
            cmd=outcome.command,
            rc=outcome.rc,
            stderr=outcome.words,
            rendered=rendered.text,
        )

    @staticmethod
    def find_culprit(tool: Iptables, plan: dict, sets: list):
        """The first rule that the kernel refuses on its own, for errors that name no line."""
        for name, table in plan.items():
            for chain, lines in table.chains.items():
                for line in lines:
                    outcome = tool.scratch(_ruleset.render_single(name, plan, chain, line), sets)
                    if outcome.rc != 0:
                        return line.origin or f"The module's own rule '{' '.join(line.args)}'", without_line(
                            outcome.words
                        )
        return None

    # -- decide

    def decide(self, plans: dict, wanted: dict) -> None:
        """Compute what the tables become, the policies to set and those to remember."""
        remembered = self.load_state()
        for family, live in self.live.items():
            plan = plans.get(family, {})
            policies, keep = {}, {}
            for name, table in plan.items():
                for chain, policy in table.policies.items():
                    key = f"{name} {chain}"
                    now = live.get(name, _ruleset.Table()).policies.get(chain, ("ACCEPT", 0, 0))[0]
                    replaced = remembered.get(family, {}).get(key, {}).get("replaced", now)
                    keep[key] = {"replaced": replaced, "set": policy}
                    policies[(name, chain)] = policy
                    self.guard_forwarding(family, name, chain, now, policy)
            for key, entry in remembered.get(family, {}).items():
                name, chain = key.split()
                now = live.get(name, _ruleset.Table()).policies.get(chain, ("ACCEPT", 0, 0))[0]
                if key not in keep and now == entry["set"]:
                    policies[(name, chain)] = entry["replaced"]
            self.policies[family] = policies
            if keep:
                self.remembered[family] = keep
            self.after[family] = _ruleset.predict(live, wanted.get(family, {}), policies, self.params["position"])

    def check_flows(self) -> None:
        """Warn of established flows that the new rules cut."""
        programs = [
            [
                _flow_trial.Program(self.tools[family].restore_program, _flow_trial.render_tables(tables))
                for family, tables in states.items()
            ]
            for states in (self.live, self.after)
        ]
        self.would_cut = _flow_trial.would_cut(*programs)
        words = _flow_trial.sentence(self.would_cut)
        if words:
            self.module.warn(words)

    def guard_forwarding(self, family: str, table: str, chain: str, now: str, policy: str) -> None:
        """Fail if a new DROP policy would cut what others forward."""
        if policy != "DROP" or now == "DROP" or self.params["take_over_forward_policy"]:
            return
        foreign = _ruleset.foreign_rules(self.live[family], table, chain)
        if foreign and not forwards(family) and family in self.params["will_forward"]:
            self.module.fail_json(
                msg=f"'-P {chain} DROP' would be in force with {len(foreign)} other rule(s) in {chain} of the {family}"
                f" table {table}, the first is '{foreign[0]}'. They have no effect so far, because the machine does not"
                f" forward; the deployment turns that on ({KERNEL_VARIABLES[family]}), and from then on they act beside"
                " yours, and the policy drops what neither accepts. Remove them if they are leftovers; if all of that"
                " is meant, set 'take_over_forward_policy: true' (role variable ruleset_take_over_forward_policy)."
                " Nothing was changed.",
                foreign_rules=foreign,
            )
        if foreign and forwards(family):
            self.module.fail_json(
                msg=f"'-P {chain} DROP' would cut forwarding that is not this module's: {chain} of the {family} table"
                f" {table} has {len(foreign)} other rule(s), the first is '{foreign[0]}', and the machine forwards."
                " Add rules that accept this traffic and set 'take_over_forward_policy: true' (role variable"
                " ruleset_take_over_forward_policy), or leave the policy out and end your rules with"
                " '-A FORWARD ... -j DROP' for your own interfaces. Nothing was changed.",
                foreign_rules=foreign,
            )

    def warn_of_forwarding(self) -> None:
        """Say what turning forwarding on will bring into effect."""
        for family in [f for f in self.params["will_forward"] if f in self.live and not forwards(f)]:
            foreign = _ruleset.foreign_rules(self.live[family], "filter", "FORWARD")
            if foreign:
                policy = self.after[family].get("filter", _ruleset.Table()).policies.get("FORWARD", ("ACCEPT", 0, 0))[0]
                rest = "dropped" if policy == "DROP" else "forwarded"
                self.module.warn(
                    f"The machine does not forward {family} yet, and the deployment turns it on"
                    f" ({KERNEL_VARIABLES[family]}). From then on {len(foreign)} rule(s) of others in FORWARD act, too,"
                    f" which have no effect so far; the first is '{foreign[0]}'. What no rule decides will be {rest}."
                )

    def wanted_files(self, plans: dict) -> dict:
        """Path to (text or None for 'must not exist', mode) of each file the module owns."""
        files: dict = {}
        keep = self.present and self.params["persist"]
        position = self.params["position"]
        starts = []
        for family, name in FILES.items():
            path = os.path.join(self.params["config_directory"], name)
            plan = plans.get(family) if keep else None
            files[path] = (None, 0o640)
            if plan:
                tool = self.tools[family]
                files[path] = (_ruleset.render_plan(plan, position, HEADER).text, 0o640)
                for args in _ruleset.jump_deletions(plan):
                    words = " ".join(_ruleset.quote(a) for a in [tool.program, "-w", "10", *args])
                    starts.append(f"ExecStartPre=-{SILENTLY} {words}")
                # before the restore, so that nothing is forwarded if that fails: an ipset may be missing
                for name, table in plan.items():
                    for chain, policy in table.policies.items():
                        if policy == "DROP":
                            starts.append(f"ExecStartPre={tool.program} -w 10 -t {name} -P {chain} {policy}")
                starts.append(f"ExecStart={tool.restore_program} -w 10 --noflush {path}")
        # every deletion runs before the first restore
        starts.sort(key=lambda line: not line.startswith("ExecStartPre"))
        fingerprint = _ruleset.fingerprint(self.after)
        files[FINGERPRINT_PATH] = (fingerprint + "\n" if self.present and fingerprint else None, 0o644)
        stored = os.path.join(self.params["config_directory"], "ruleset.fingerprint")
        watch = self.present and self.params["watch"] and bool(fingerprint)
        files[stored] = (files[FINGERPRINT_PATH][0] if starts or watch else None, 0o644)
        if starts:
            starts.append(f"ExecStartPost=/bin/mkdir -p -m 0755 {os.path.dirname(FINGERPRINT_PATH)}")
            starts.append(f"ExecStartPost=/bin/cp {stored} {FINGERPRINT_PATH}")
        files[UNIT_PATH] = (unit_text(starts) if starts else None, 0o644)
        files.update(self.watch_files(stored, plans) if watch else dict.fromkeys(WATCH_FILES, (None, 0o644)))
        text = {"version": 1, "policies": self.remembered}
        files[self.state_file] = (json.dumps(text, indent=1, sort_keys=True) + "\n" if self.remembered else None, 0o600)
        return files

    def watch_files(self, stored: str, plans: dict) -> dict:
        """The watch: its program and its units. A family without rules of ours may be missing."""
        programs = [
            f"{family}{'' if plans.get(family) else '?'}={tool.save_program}"
            for family, tool in self.tools.items()
            if tool.available
        ]
        interpreter = PYTHON if os.access(PYTHON, os.X_OK) else sys.executable
        return {
            _ruleset_watch.PROGRAM_PATH: (_ruleset_watch.archive(), 0o644),
            _ruleset_watch.SERVICE_PATH: (_ruleset_watch.service_text(interpreter, stored, programs), 0o644),
            _ruleset_watch.TIMER_PATH: (_ruleset_watch.timer_text(), 0o644),
        }

    # -- change

    def fail_command(self, message: str, outcome, **more) -> None:
        self.module.fail_json(msg=message, cmd=outcome.command, rc=outcome.rc, stderr=outcome.words, **more)

    def write(self, path: str, text, mode: int) -> None:
        """Make one file so: written beside its place and moved, or removed."""
        if text is None:
            if os.path.lexists(path):
                os.unlink(path)
            return
        os.makedirs(os.path.dirname(path), 0o755, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix="ctsync-", dir=self.module.tmpdir)
        with os.fdopen(handle, "wb" if isinstance(text, bytes) else "w") as stream:
            stream.write(text)
        os.chmod(temporary, mode)
        self.module.atomic_move(temporary, path)

    def apply(self) -> None:
        """Change the kernel's tables; on a failure put our part back and say so."""
        changes = {family: _ruleset.render_change(live, self.after[family]) for family, live in self.live.items()}
        changes = {family: text for family, text in changes.items() if text}
        for family, text in changes.items():
            outcome = self.tools[family].restore(text, test=True)
            if outcome.rc != 0:
                self.call_off()
                self.fail_command(
                    f"iptables refuses the {family} change: {outcome.words}. Nothing was changed.",
                    outcome,
                    rendered=text,
                )
        for family, text in changes.items():
            outcome = self.tools[family].restore(text)
            if outcome.rc != 0:
                undone = self.undo(list(changes))
                self.fail_command(
                    f"The {family} rules could not be applied: {outcome.words}. {undone}", outcome, rendered=text
                )
            held = _ruleset.parse_save(self.tools[family].save().out)
            rest = _ruleset.render_change(held, self.after[family])
            if rest:
                undone = self.undo(list(changes))
                self.module.fail_json(
                    msg=f"The kernel does not hold the {family} rules that were applied; another program may change"
                    f" them at the same time. {undone}",
                    missing=rest,
                )

    def undo(self, families: list) -> str:
        """Put our part of the tables back; says in a sentence how that went."""
        if self.rollback:
            outcome = self.call_off()
            if outcome["outcome"] == _rollback.ROLLED_BACK:
                return "The rules of before are in place again."
        for family in families:
            now = _ruleset.parse_save(self.tools[family].save().out)
            back = _ruleset.render_change(now, self.live[family])
            outcome = self.tools[family].restore(back) if back else None
            if outcome and outcome.rc != 0:
                return f"Putting the old {family} rules back failed as well: {outcome.words}."
        return "The rules of before are in place again."

    # -- probation

    def arm(self, files: dict) -> None:
        """Start the process that puts things back; nothing has been changed until here."""
        timeout, ident = self.params["rollback_timeout"], self.params["rollback_id"] or secrets.token_hex(8)
        parts = {}
        for family, live in self.live.items():
            tool = self.tools[family]
            parts[family] = {
                "before": self.saved[family],
                "policies": {
                    f"{name} {chain}": live.get(name, _ruleset.Table()).policies.get(chain, ("ACCEPT", 0, 0))[0]
                    for name, chain in self.policies.get(family, {})
                },
                "save": tool.save_command,
                "restore": tool.restore_command,
            }
        old = {path: [read_text(path), files[path][1]] for path in (self.state_file, FINGERPRINT_PATH)}
        job = {"timeout": timeout, "position": self.params["position"], "families": parts, "files": old}
        try:
            _rollback.arm(ident, job)
        except _rollback.GuardError as exc:
            self.module.fail_json(
                msg=f"The process that would put the old rules back cannot be started: {exc}. Set 'rollback_timeout: 0'"
                " (role variable ruleset_rollback_timeout) to go without it. Nothing was changed."
            )
        self.rollback = {"armed": True, "id": ident, "deadline_s": timeout, "outcome": _rollback.ARMED}

    def call_off(self) -> dict:
        """Applying failed: let the guard put everything back and end."""
        if not self.rollback:
            return {"outcome": _rollback.UNKNOWN}
        outcome = _rollback.ask(self.rollback["id"], "abort", "they could not be applied")
        self.rollback["outcome"] = outcome["outcome"]
        return outcome

    def conclude(self, step: str) -> None:
        """The second half: confirm, abort or look. Returns only if the new rules are confirmed."""
        ident, words = self.params["rollback_id"] or "", ""
        if not _rollback.is_ident(ident):
            self.module.fail_json(msg="rollback_step is given by the action plugin, with a rollback_id; leave it out.")
        outcome = _rollback.ask(ident, "status")
        if step == "confirm" and self.params["canary"] and outcome["outcome"] == _rollback.ARMED:
            words = _rollback.run_canary(shlex.split(self.params["canary"]), outcome["left_s"])
            if words:
                words = f"The canary '{self.params['canary']}' {words}."
                outcome = _rollback.ask(ident, "abort", words)
        if not words and step != "status":
            outcome = _rollback.ask(ident, step, "the connection broke while they were applied")
        self.rollback = {
            "armed": True,
            "id": ident,
            "deadline_s": self.params["rollback_timeout"],
            "outcome": outcome["outcome"],
        }
        if outcome["outcome"] != _rollback.CONFIRMED or step != "confirm":
            problems = outcome.get("problems", [])
            self.module.fail_json(
                msg=" ".join(w for w in (words, *problems) if w) or f"The new rules are {outcome['outcome']}.",
                rollback=self.rollback,
                canary_failed=bool(words),
                problems=problems,
            )

    # -- boot

    def is_so(self, question: str, unit: str) -> bool:
        """What systemctl answers: is-enabled or is-active."""
        systemctl = _ruleset.find_program("systemctl")
        return bool(systemctl) and self.module.run_command([systemctl, question, unit])[0] == 0

    def idle_units(self, files: dict) -> list:
        """Units that are wanted, but not enabled; the timer has to run, too, where systemd does."""
        idle = []
        if files[UNIT_PATH][0] is not None and not self.is_so("is-enabled", UNIT):
            idle.append(UNIT)
        if files[_ruleset_watch.TIMER_PATH][0] is not None:
            timer = _ruleset_watch.TIMER
            if not self.is_so("is-enabled", timer) or (_systemd.booted() and not self.is_so("is-active", timer)):
                idle.append(timer)
        return idle

    def systemctl(self, *args: str) -> None:
        command = [_ruleset.find_program("systemctl"), *args]
        rc, out, err = self.module.run_command(command, environ_update={"LC_ALL": "C"})
        if rc != 0:
            self.module.fail_json(
                msg=f"The rules are in place, but their unit {args[-1]} is not: {err.strip()}.",
                cmd=command,
                rc=rc,
                stdout=out,
                stderr=err,
            )

    def change_files(self, files: dict, stale: dict, idle: list) -> None:
        units = {path: unit for path, unit in UNITS.items() if path in stale}
        booted = _systemd.booted()
        now = ["--now"] if booted else []
        for path, unit in units.items():
            if files[path][0] is None and _ruleset.find_program("systemctl") and unit != _ruleset_watch.SERVICE:
                self.systemctl("disable", *now, unit)
        if _ruleset_watch.SERVICE_PATH in units and booted and self.is_so("is-active", _ruleset_watch.SERVICE):
            self.systemctl("stop", _ruleset_watch.SERVICE)
        for path in stale:
            self.write(path, *files[path])
        if units and booted:
            self.systemctl("daemon-reload")
        for unit in idle:
            self.systemctl("enable", *(now if unit == _ruleset_watch.TIMER else []), unit)
        again = _ruleset_watch.TIMER_PATH in units and _ruleset_watch.TIMER not in idle
        if again and files[_ruleset_watch.TIMER_PATH][0] is not None and booted:
            self.systemctl("restart", _ruleset_watch.TIMER)
        folders = [os.path.dirname(_ruleset_watch.PROGRAM_PATH)]
        if not self.present:
            folders += [self.params["config_directory"], self.params["state_directory"]]
        for folder in folders:
            if os.path.isdir(folder) and not os.listdir(folder):
                os.rmdir(folder)

    # -- the whole

    def run(self) -> dict:
        params, module = self.params, self.module
        plans: dict = {}
        if params["rollback_step"] != "apply":
            with contextlib.suppress(OSError):  # or go on without it: a confirmation must not come too late
                self.lock.take(LOCK_PATIENCE)
            self.conclude(params["rollback_step"])
        if self.present:
            try:
                plans = plans_from(params)
                danger = locked_out(pair_from(params), os.environ.get("SSH_CONNECTION", ""))
            except _ruleset.RulesetError as exc:
                module.fail_json(msg=f"{exc} Nothing was changed.", problems=exc.problems)
            if danger:
                module.fail_json(msg=f"{danger} Nothing was changed.")
        elif probation_problems(params):
            module.fail_json(msg=" ".join([*probation_problems(params), "Nothing was changed."]))
        if not module.check_mode and not params["validate_only"] and not self.rollback:
            self.be_alone()
        missing = [family for family in plans if plans[family] and not self.tools[family].available]
        if missing:
            return self.without_iptables(plans, missing)
        try:
            self.read_live(list(plans))
            wanted = {family: self.normalise(family, plan) for family, plan in plans.items()}
        except _ruleset.RulesetError as exc:
            module.fail_json(msg=f"{exc} Nothing was changed.")
        self.decide(plans, wanted)
        self.warn_of_forwarding()
        if params["validate_only"]:
            return self.result(False, [], wanted)
        files = self.wanted_files(plans)
        found = {path: read_bytes(path) if path in WATCH_FILES[:1] else read_text(path) for path in files}
        stale = {path: found[path] for path, (content, _mode) in files.items() if found[path] != content}
        idle = self.idle_units(files)
        if not _ruleset.find_program("systemctl"):
            self.refuse_units(files)
        diffs = self.diffs(files, stale)
        rules_differ = any(_ruleset.render_change(live, self.after[family]) for family, live in self.live.items())
        changed = bool(rules_differ or stale or idle)
        if rules_differ and not self.rollback and params["check_flows"]:
            self.check_flows()
        if module.check_mode or not (changed or self.rollback):
            return self.result(changed, diffs, self.after)
        if self.rollback and rules_differ:
            module.warn("Another program changed the rules while they were on probation. Run again to repair them.")
        elif rules_differ:
            if params["rollback_timeout"]:
                self.arm(files)
            if self.remembered and self.state_file in stale:  # before the policy it remembers is replaced
                self.write(self.state_file, *files[self.state_file])
            self.apply()
            self.write(FINGERPRINT_PATH, *files[FINGERPRINT_PATH])
            if self.rollback:
                self.rollback["outcome"] = _rollback.ask(self.rollback["id"], "start")["outcome"]
                return self.result(changed, diffs, self.after)
        self.change_files(files, stale, idle)
        return self.result(changed, diffs, self.after)

    def refuse_units(self, files: dict) -> None:
        """Fail when units are wanted where there is no systemd."""
        words = {
            UNIT_PATH: "persist: true needs systemd, and there is no systemctl on this machine. Set 'persist: false'"
            " and restore the rules at boot in your own way.",
            _ruleset_watch.TIMER_PATH: "watch: true needs systemd, and there is no systemctl on this machine. Set"
            " 'watch: false' and compare the rules with ha_facts.",
        }
        problems = [text for path, text in words.items() if files[path][0] is not None]
        if problems:
            self.module.fail_json(msg=" ".join([*problems, "Nothing was changed."]))

    def without_iptables(self, plans: dict, missing: list) -> dict:
        """iptables is not installed: fine while only asked for a prediction."""
        names = ", ".join(_ruleset.program_name(family, self.params["backend"], "") for family in missing)
        if not (self.module.check_mode or self.params["validate_only"]):
            self.module.fail_json(
                msg=f"{names} is not installed. Install the package iptables (role ruleset does), then run again."
                " Nothing was changed."
            )
        self.validated_by = "syntax"
        self.module.warn(f"{names} is not installed yet: the rules were tested for their form only.")
        if self.params["validate_only"]:
            return self.result(False, [], {})
        rendered = "".join(_ruleset.render_plan(plan, self.params["position"]).text for plan in plans.values())
        return self.result(
            True, [{"before": "", "after": rendered, "before_header": "rules", "after_header": "rules"}], {}
        )

    def diffs(self, files: dict, stale: dict) -> list:
        """What differs, like iptables-save prints it, and the files."""
        found = []
        for family, live in self.live.items():
            shown = _ruleset.concerned_chains(live, self.after[family])
            for name, chain in self.policies.get(family, {}):
                shown.setdefault(name, []).append(chain)
            before = _ruleset.render_view(live, shown)
            after = _ruleset.render_view(self.after[family], shown)
            if before != after:
                title = _ruleset.program_name(family, "auto", "-save")
                found.append({"before": before, "after": after, "before_header": title, "after_header": title})
        for path, present in stale.items():
            found.append(
                {
                    "before": shown_content(present),
                    "after": shown_content(files[path][0]),
                    "before_header": path,
                    "after_header": path,
                }
            )
        return found

    def result(self, changed: bool, diffs: list, tables: dict) -> dict:
        result = {
            "changed": changed,
            "chains": {family: _ruleset.own_rules(state) for family, state in tables.items()},
            "fingerprint": _ruleset.fingerprint(tables),
            "policies": {
                family: {f"{table} {chain}": policy for (table, chain), policy in policies.items()}
                for family, policies in self.policies.items()
            },
        }
        if self.present:
            result["validated_by"] = self.validated_by
        if self.rollback:
            result["rollback"] = self.rollback
        if self.would_cut:
            result["would_cut"] = self.would_cut
        if self.module._diff and diffs:
            result["diff"] = diffs
        return result


def read_text(path: str):
    """Content of a small text file; None if it does not exist."""
    try:
        with open(path) as stream:
            return stream.read()
    except FileNotFoundError:
        return None


def read_bytes(path: str):
    """Content of a file; None if it does not exist."""
    try:
        with open(path, "rb") as stream:
            return stream.read()
    except FileNotFoundError:
        return None


def shown_content(content) -> str:
    """A file's content in a diff; of a program only what tells two of them apart."""
    if isinstance(content, bytes):
        return f"{len(content)} bytes, SHA-256 {hashlib.sha256(content).hexdigest()}\n"
    return content or ""


def forwards(family: str) -> bool:
    """Whether the machine forwards now."""
    return (read_text(FORWARDING[family]) or "0").strip() not in ("", "0")


def unit_text(starts: list) -> str:
    """The systemd unit: early in boot, before any network comes up, after those who might flush everything.

    The daemons are named, too, because no target stands between them where nothing manages the network.
    """
    flushers = "nftables.service netfilter-persistent.service iptables.service ip6tables.service"
    flushers += " firewalld.service ufw.service"
    return "\n".join(
        [
            "# Written by Ansible (ctsync.ha_firewall.ruleset): changes are lost.",
            "[Unit]",
            "Description=Firewall rules of ctsync",
            "DefaultDependencies=no",
            "Wants=network-pre.target",
            "Before=network-pre.target ctsyncd.service keepalived.service shutdown.target",
            f"After=local-fs.target systemd-modules-load.service {flushers}",
            "Conflicts=shutdown.target",
            "",
            "[Service]",
            "Type=oneshot",
            "RemainAfterExit=yes",
            *starts,
            "",
            "[Install]",
            "WantedBy=multi-user.target",
            "",
        ]
    )


def main() -> None:
    module = AnsibleModule(argument_spec=ARGUMENT_SPEC, supports_check_mode=True)
    module.exit_json(**Run(module).run())


if __name__ == "__main__":
    main()
