# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import ipaddress
import itertools

import pytest
from ansible_collections.ctsync.ha_firewall.plugins.module_utils import _ruleset, _typed_rules
from hypothesis import given
from hypothesis import strategies as st

SETS = {"office": ["10.0.0.0/24", "!10.0.0.128/25", "fd00::/64"], "all": ["@office", "192.0.2.5-192.0.2.7"]}


def compiled(filter_rules=(), nat_rules=(), family="ipv4", sets=None):
    rules = _typed_rules.compile_rules(list(filter_rules), list(nat_rules), SETS if sets is None else sets)
    return [(rule.chain, " ".join(rule.args)) for rule in rules[family] if rule.command == "append"]


def problems(filter_rules=(), nat_rules=(), sets=None):
    with pytest.raises(_ruleset.RulesetError) as caught:
        compiled(filter_rules, nat_rules, sets=sets)
    return caught.value.problems


def test_one_rule_for_both_families():
    rule = {"action": "accept", "protocols": ["icmp"], "sources": ["@all"], "icmp_types": ["echo-request"]}
    assert compiled([rule]) == [
        (
            "FORWARD",
            "-s 10.0.0.0/25,192.0.2.5/32,192.0.2.6/31 -p icmp -m icmp --icmp-type echo-request -j ACCEPT",
        )
    ]
    assert compiled([rule], family="ipv6") == [
        ("FORWARD", "-s fd00::/64 -p ipv6-icmp -m icmp6 --icmpv6-type echo-request -j ACCEPT")
    ]


def test_lists_become_every_combination():
    rule = {
        "action": "drop",
        "chain": "input",
        "in_interfaces": ["eth1", "eth2"],
        "protocols": ["tcp", "udp"],
        "destination_ports": [22, "8000-8010"],
        "families": "ipv4",
    }
    lines = compiled([rule])
    assert len(lines) == 4
    assert lines[0] == ("INPUT", "-i eth1 -p tcp -m multiport --destination-ports 22,8000:8010 -j DROP")
    assert compiled([rule], family="ipv6") == []


def test_more_ports_than_the_kernel_takes_at_once_become_several_rules():
    lines = compiled([{"action": "accept", "protocols": "tcp", "destination_ports": [*range(1, 15), "20-30", 40]}])
    assert [line.split("ports ")[1].split(" ")[0] for _chain, line in lines] == [
        ",".join(str(port) for port in range(1, 15)),
        "20:30,40",
    ]


def test_exclusions_get_a_chain_that_returns_for_them():
    snat = {
        "action": "snat",
        "out_interfaces": "eth0",
        "sources": ["10.0.0.0/8", "!10.9.0.0/16", "!192.0.2.1"],
        "protocols": "tcp",
        "to_source": "198.51.100.1-198.51.100.4",
        "to_ports": "1024-65535",
        "persistent": True,
    }
    assert compiled(nat_rules=[snat]) == [
        ("NAT-1", "-s 10.9.0.0/16 -j RETURN"),
        ("NAT-1", "-p tcp -j SNAT --to-source 198.51.100.1-198.51.100.4:1024-65535 --persistent"),
        ("POSTROUTING", "-o eth0 -s 10.0.0.0/8 -p tcp -j NAT-1"),
    ]
    assert compiled(nat_rules=[snat], family="ipv6") == []


def test_nat_without_addresses_is_for_ipv4_and_its_own_chain():
    nat = [
        {"action": "masquerade", "out_interfaces": ["eth0"]},
        {"action": "redirect", "protocols": "tcp", "destination_ports": 80, "to_ports": 8080},
        {"action": "accept", "chain": "postrouting", "destinations": "10.8.0.0/16"},
    ]
    assert compiled(nat_rules=nat) == [
        ("POSTROUTING", "-o eth0 -j MASQUERADE"),
        ("PREROUTING", "-p tcp --destination-port 80 -j REDIRECT --to-ports 8080"),
        ("POSTROUTING", "-d 10.8.0.0/16 -j ACCEPT"),
    ]
    assert compiled(nat_rules=nat, family="ipv6") == []
    nat6 = {
        "action": "dnat",
        "protocols": "udp",
        "to_destination": "fd00::2",
        "to_ports": 5353,
        "in_interfaces": "!eth1",
    }
    assert compiled(nat_rules=[nat6], family="ipv6") == [
        ("PREROUTING", "! -i eth1 -p udp -j DNAT --to-destination [fd00::2]:5353")
    ]


MISTAKES = [
    ({"acton": "drop", "action": "drop"}, "key 'acton': is not known; did you mean 'action'?"),
    ({}, "key 'action': is missing; write one of accept, drop, reject, log, return."),
    ({"action": "acept"}, "key 'action': 'acept' is not known; did you mean 'accept'?"),
    ({"action": "drop", "chain": "POSTROUTING"}, "key 'chain': 'POSTROUTING' cannot be used;"),
    ({"action": "drop", "protocols": "tpc"}, "key 'protocols': 'tpc' is no protocol; did you mean 'tcp'?"),
    ({"action": "drop", "sources": "@ofice"}, "key 'sources': there is no set 'ofice' in address_sets; did you mean"),
    (
        {"action": "drop", "sources": "10.0.0.1/8"},
        "key 'sources': '10.0.0.1/8' has bits set beyond its prefix; write 10.",
    ),
    ({"action": "drop", "sources": "www.example.com"}, "key 'sources': 'www.example.com' is no address"),
    (
        {"action": "drop", "sources": ["10.0.0.1", "!10.0.0.0/8"]},
        "key 'sources': excludes every address that it names.",
    ),
    ({"action": "return", "sources": ["!10.0.0.1"]}, "key 'sources': cannot have exclusions (!)"),
    ({"action": "drop", "destination_ports": 22}, "key 'destination_ports': needs protocols that have ports"),
    ({"action": "drop", "protocols": "tcp", "source_ports": "9-2"}, "key 'source_ports': '9-2' is no port;"),
    ({"action": "drop", "ctstate": "NWE"}, "key 'ctstate': 'NWE' is not known; did you mean 'NEW'?"),
    (
        {"action": "drop", "chain": "INPUT", "out_interfaces": "eth0"},
        "key 'out_interfaces': cannot be used in chain INPUT",
    ),
    ({"action": "drop", "in_interfaces": ["!eth0", "eth1"]}, "key 'in_interfaces': '!eth0' stands beside others"),
    (
        {"action": "drop", "in_interfaces": "an-interface-too-long"},
        "key 'in_interfaces': 'an-interface-too-long' is no name",
    ),
    (
        {"action": "drop", "sources": "10.0.0.1", "destinations": "fd00::1"},
        "key 'destinations': is of another IP version",
    ),
    (
        {"action": "drop", "sources": "10.0.0.1", "families": "ipv6"},
        "key 'families': ipv6 is asked for, but sources leave",
    ),
    ({"action": "drop", "syn": "maybe"}, "key 'syn': 'maybe' is neither true nor false."),
    ({"action": "drop", "syn": True}, "key 'syn': needs 'protocols: [tcp]'."),
    ({"action": "drop", "limit": "often"}, "key 'limit': 'often' is no rate;"),
    ({"action": "drop", "log_prefix": "x"}, "key 'log_prefix': belongs to 'action: log'"),
    ({"action": "drop", "comment": "a\nb"}, "key 'comment': contains a line break"),
    ({"action": "drop", "icmp_types": "0", "protocols": "tcp"}, "key 'icmp_types': needs 'protocols: [icmp]'."),
    ("-j DROP", "is no dictionary"),
]
NAT_MISTAKES = [
    ({"action": "snat"}, "key 'to_source': is missing;"),
    ({"action": "snat", "to_source": "eth0"}, "key 'to_source': 'eth0' is no address or rising range;"),
    (
        {"action": "snat", "to_source": "10.0.0.9-10.0.0.1"},
        "key 'to_source': '10.0.0.9-10.0.0.1' is no address or rising",
    ),
    ({"action": "masquerade", "to_source": "10.0.0.1"}, "key 'to_source': does not belong to 'action: masquerade'."),
    ({"action": "masquerade", "to_ports": "1-2"}, "key 'to_ports': needs protocols that have ports"),
    (
        {"action": "masquerade", "chain": "PREROUTING"},
        "key 'chain': 'PREROUTING' cannot be used with 'action: masquerade'",
    ),
    ({"action": "accept"}, "key 'chain': is missing;"),
    ({"action": "drop"}, "key 'action': 'drop' is not known;"),
    (
        {"action": "dnat", "to_destination": "fd00::1", "destinations": "10.0.0.1"},
        "key 'to_destination': is of another IP",
    ),
]


@pytest.mark.parametrize(
    ("option", "rule", "words"),
    [("filter_rules", *case) for case in MISTAKES] + [("nat_rules", *case) for case in NAT_MISTAKES],
)
def test_a_mistake_is_named_with_rule_and_key(option, rule, words):
    good = {"action": "accept", "chain": "OUTPUT"}
    (problem,) = problems(**{option: [good, rule]})
    assert problem.startswith(f"{option}: rule 2{',' if words.startswith('key') else ':'} {words}")


def test_all_mistakes_are_named_at_once():
    found = problems([{"action": "dorp", "protocols": "x"}], [{"action": "snat"}], {"a": ["!10.0.0.1"], "b": ["@c"]})
    assert [problem.split(":")[0] for problem in found] == ["address_sets"] * 2 + ["filter_rules"] * 2 + ["nat_rules"]


def test_a_rule_that_would_explode_is_refused():
    many = [f"10.0.{n // 256}.{n % 256 // 2 * 2}" for n in range(0, 512, 4)]
    (problem,) = problems([{"action": "drop", "sources": many, "destinations": many}])
    assert "more than 4096 rules" in problem


ENTRIES = st.tuples(st.booleans(), st.integers(0, 15), st.integers(0, 15))


@given(st.lists(ENTRIES, min_size=1, max_size=8))
def test_a_set_holds_exactly_what_it_names_less_what_it_excludes(entries):
    base = int(ipaddress.ip_address("192.0.2.0"))
    text, inside, outside = [], set(), set()
    for excluded, one, other in entries:
        low, high = sorted((one, other))
        text.append(f"{'!' * excluded}{ipaddress.ip_address(base + low)}-{ipaddress.ip_address(base + high)}")
        (outside if excluded else inside).update(range(base + low, base + high + 1))
    mistakes = []
    networks = _typed_rules.address_sets({"s": text}, mistakes)["s"]
    held = [int(address) for address in itertools.chain.from_iterable(networks)]
    assert sorted(held) == sorted(inside - outside)
    assert bool(mistakes) is not bool(held)
