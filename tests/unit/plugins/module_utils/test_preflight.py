# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What can be wrong with a pair: each fault alone, in an otherwise right pair."""

from __future__ import annotations

import base64
import copy

import pytest
from ansible_collections.ctsync.ha_firewall.plugins.module_utils import _preflight as p

KEY = base64.b64encode(bytes(range(32))).decode()
FINGERPRINT = p.summarize_key(KEY)["fingerprint"]


def node(number, **more):
    return {
        "virtual_ips": [
            {"interface": "eth1", "address": "192.168.0.100/24", "router_id": 51},
            {"interface": "eth0", "address": "192.168.1.100/24", "router_id": 52},
        ],
        "priority": {1: 150, 2: 100}[number],
        "sync_interface": "eth2",
        "sync_address": f"192.168.100.{number}",
        "key": p.summarize_key(KEY),
        "rules": ["-P FORWARD DROP", "-A FORWARD -i eth0 -m state --state ESTABLISHED,RELATED -j ACCEPT"],
        "host": {"conntrack": True, "systemd": True, "conntrackd": {"pids": [], "active": False, "enabled": False}},
        **more,
    }


def interface(*addresses):
    rows = [{"address": a.split("/")[0], "prefix": a.split("/")[1]} for a in addresses]
    v4 = [row for row in rows if ":" not in row["address"]]
    found = {"ipv6": [row for row in rows if ":" in row["address"]]}
    if v4:
        found["ipv4"] = v4[0]
    if v4[1:]:
        found["ipv4_secondaries"] = v4[1:]
    return found


def facts(number, **more):
    return {
        "interfaces": ["lo", "eth0", "eth1", "eth2"],
        "lo": interface("127.0.0.1/8", "::1/128"),
        "eth0": interface(f"192.168.1.{number}/24", f"fd00:c0de:1::{number}/64"),
        "eth1": interface(f"192.168.0.{number}/24", f"fd00:c0de::{number}/64", f"fe80::{number}/64"),
        "eth2": interface(f"192.168.100.{number}/24"),
        "python": {"version": {"major": 3, "minor": 11}},
        "service_mgr": "systemd",
        **more,
    }


def pair(one=None, two=None, both=None):
    both = both or {}
    return {"fw1": node(1, **{**both, **(one or {})}), "fw2": node(2, **{**both, **(two or {})})}


def all_facts(one=None, two=None):
    return {"fw1": facts(1, **(one or {})), "fw2": facts(2, **(two or {}))}


def test_a_right_pair_has_no_problem():
    assert p.group_problems(pair(), all_facts()) == []
    assert p.group_problems(pair(), {}) == []  # nothing is known of the hosts yet


def test_a_node_that_holds_the_virtual_ips_is_right_too():
    holder = {
        "eth1": interface("192.168.0.100/24", "192.168.0.1/24"),
        "eth0": interface("192.168.1.1/24", "192.168.1.100/24"),
    }
    assert p.group_problems(pair(), all_facts(one=holder)) == []


def vips(**change):
    entries = copy.deepcopy(node(1)["virtual_ips"])
    entries[0].update(change)
    return {"virtual_ips": entries}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"virtual_ips": []}, "ha_firewall_virtual_ips: is missing or empty"),
        ({"virtual_ips": "192.168.0.100"}, "ha_firewall_virtual_ips: is not a list"),
        ({"virtual_ips": ["192.168.0.100"]}, "ha_firewall_virtual_ips: entry 1 is not a mapping"),
        (
            vips(address=None, interface=""),
            "ha_firewall_virtual_ips: entry 1 has no interface and no address: add it",
        ),
        (
            vips(address="192.168.0.300/24"),
            "ha_firewall_virtual_ips: entry 1: '192.168.0.300/24' is not an address with",
        ),
        (vips(address="192.168.0.100"), "ha_firewall_virtual_ips: entry 1: 192.168.0.100 has no prefix length"),
        (
            vips(address="192.168.0.0/24"),
            "ha_firewall_virtual_ips: entry 1: 192.168.0.0/24 is the address of the network",
        ),
        (
            vips(address="192.168.0.255/24"),
            "ha_firewall_virtual_ips: entry 1: 192.168.0.255/24 is the broadcast address",
        ),
        (
            vips(address="224.0.0.1/24"),
            "ha_firewall_virtual_ips: entry 1: 224.0.0.1/24 cannot be given to an interface",
        ),
        (vips(address="192.168.1.100/24"), "ha_firewall_virtual_ips: entry 2 repeats 192.168.1.100 of entry 1"),
        (vips(router_id=256), "ha_firewall_virtual_ips: entry 1: router_id 256 is not 1 to 255"),
        (vips(router_id=True), "ha_firewall_virtual_ips: entry 1: router_id True is not 1 to 255"),
        (vips(router_id=52), "ha_firewall_virtual_ips: entry 2 (192.168.1.100) has router_id 52 of eth1 again"),
        (
            vips(interface="eth7"),
            "ha_firewall_virtual_ips: interface eth7 of 192.168.0.100 does not exist on this node",
        ),
        (
            vips(address="192.168.9.100/24"),
            "ha_firewall_virtual_ips: 192.168.9.100/24 is on eth1, where this node has no",
        ),
        ({"priority": None}, "ha_firewall_priority: is missing: choose 61 to 254"),
        ({"priority": 300}, "ha_firewall_priority: 300 is not 61 to 254"),
        ({"priority": 60}, "ha_firewall_priority: 60 is not 61 to 254"),
        ({"priority": "high"}, "ha_firewall_priority: 'high' is not 61 to 254"),
        ({"priority": 100}, "ha_firewall_priority: 100 is also the priority of"),
        ({"priority": "100"}, "ha_firewall_priority: 100 is also the priority of"),
        ({"priority": 170}, "ha_firewall_priority: 170 is 70 above fw2's 100: keep the difference below 60"),
        ({"sync_interface": ""}, "ha_firewall_sync_interface: is missing"),
        ({"sync_interface": "eth9"}, "ha_firewall_sync_interface: interface eth9 does not exist on this node"),
        ({"sync_address": None}, "ha_firewall_sync_address: is missing"),
        ({"sync_address": "192.168.100.1/24"}, "ha_firewall_sync_address: '192.168.100.1/24' is not an IP address"),
        ({"sync_address": "192.168.100.9"}, "ha_firewall_sync_address: 192.168.100.9 is not configured on eth2"),
        ({"sync_address": "192.168.100.2"}, "ha_firewall_sync_address: 192.168.100.2 is also the sync address of"),
        ({"sync_address": "192.168.0.100"}, "ha_firewall_sync_address: 192.168.0.100 is a virtual IP"),
        ({"sync_port": 0}, "ha_firewall_sync_port: 0 is not a UDP port"),
        ({"key": ""}, "ha_firewall_key: is missing: make one with: openssl rand -base64 32"),
        ({"key": "not base64!"}, "ha_firewall_key: is not base64"),
        ({"key": base64.b64encode(b"short").decode()}, "ha_firewall_key: is too short: 5 bytes, and 32 are needed"),
        ({"key": base64.b64encode(bytes(32)).decode()}, "ha_firewall_key: is not the key of fw1"),
        ({"key_id": 0}, "ha_firewall_key_id: 0 is not 1 to 255"),
        ({"key_id": 7}, "ha_firewall_key_id: 1 differs from fw1's 7"),
        ({"rules": "-P FORWARD DROP"}, "ruleset_rules: is not a list of rules"),
        ({"rules": ["-A FORWARD -i eth0 -j"]}, "ruleset_rules: rule 1"),
        ({"rules6": ["-D FORWARD 1"]}, "ruleset_rules6: rule 1"),
        ({"rules_errors": ["rules: rule 1 'x': refused. Nothing was changed."]}, "ruleset_rules: rule 1 'x': refused."),
        ({"rules_errors": ["filter_rules: rule 2, key 'x': wrong."]}, "ruleset_filter_rules: rule 2, key 'x': wrong."),
        ({"rules_errors": ["rollback_timeout: 5 is out of range."]}, "ruleset_rollback_timeout: 5 is out of range."),
        (
            {"rules_errors": ["services[1].port: 'x' is no port."], "services_variable": "ha_firewall_services"},
            "ha_firewall_services[1].port: 'x' is no port.",
        ),
        ({"rules_errors": ["The kernel speaks."]}, "ruleset_rules: The kernel speaks."),
        (
            {"kernel_errors": ["The kernel has no key a.b. Nothing was changed."]},
            "kernel_extra_sysctls: The kernel has",
        ),
        ({"kernel_errors": ["sysctls[5].name: a.b is given more than once."]}, "kernel_extra_sysctls: a.b is given"),
        (
            {
                "kernel_errors": [
                    "net.netfilter.nf_conntrack_max cannot be set to '5': the kernel holds '9', and so on."
                ]
            },
            "kernel_conntrack_max: net.netfilter.nf_conntrack_max cannot be set to '5'",
        ),
        ({"kernel_errors": ["The kernel has no module x."]}, "kernel_modules: The kernel has no module x."),
        ({"track_interfaces": [{"interface": "eth9"}]}, "keepalived_track_interfaces: interface eth9 does not exist"),
        (
            {"authenticated": True, "host": {"keepalived": {"version": "2.2.7"}}},
            "keepalived_authentication: keepalived 2.2.7 has none for VRRPv3",
        ),
        ({"option_problems": ["ruleset_rule: is not an option"]}, "ruleset_rule: is not an option"),
        (
            {"virtual_ips": [{"iface": "eth1", "address": "192.168.0.100/24", "router_id": 51}]},
            "ha_firewall_virtual_ips: entry 1: iface is not known; did you mean interface?",
        ),
        ({"host": {"conntrackd": {"pids": [77], "active": True}}}, "conntrackd: is active (process 77)"),
        ({"host": {"conntrackd": {"pids": [], "active": True}}}, "conntrackd: is active; two daemons"),
        ({"host": {"conntrackd": {"pids": [], "enabled": True}}}, "conntrackd: is not active, but would start"),
        ({"host": {"conntrack": False}}, "kernel: has no connection tracking"),
        ({"host": {"systemd": False}}, "systemd: is not the running init"),
        (
            {"host": {"sysctls": {"net.netfilter.nf_conntrack_max": "9", "net.netfilter.nf_conntrack_events": None}}},
            "kernel: tells nobody of connections",
        ),
        (
            {"host": {"ctsyncd": {"keys": {"2": "x"}, "send_key": 2}}},
            "ha_firewall_key_id: 1 is not among the keys that this node runs with (2)",
        ),
        (
            {"host": {"ctsyncd": {"keys": {"1": "x"}, "send_key": 1}}},
            "ha_firewall_key: is not the key that this node runs with under the id 1",
        ),
        (
            {"host": {"ctsyncd": {"keys": {"1": FINGERPRINT, "2": "x"}, "send_key": 1}}},
            "ha_firewall_key_id: a key rotation is half done, this node accepts the keys 1 and 2",
        ),
    ],
)
def test_each_fault_is_one_sentence_with_host_and_option(change, said):
    found = p.group_problems(pair(one=change), all_facts())
    hits = [line for line in found if line.split(": ", 1)[1].startswith(said)]
    assert len(hits) == 1, found
    assert hits[0].startswith(("fw1: ", "fw2: "))


def test_platform_that_is_not_supported_is_refused_with_a_way_on():
    old = {"distribution": "Debian", "distribution_version": "10.13", "distribution_major_version": "10"}
    (said,) = p.group_problems(pair(), all_facts(one=old))
    assert said.startswith("fw1: platform: is Debian 10.13; supported are Debian 11, 12 and 13, Ubuntu 22.04")
    assert "preflight_any_platform: true" in said
    assert p.group_problems(pair(one={"any_platform": True}), all_facts(one=old)) == []


@pytest.mark.parametrize(
    "change", [{"host": {"conntrackd": {"pids": [77]}}}, {"host": {"conntrackd": {"enabled": True}}}]
)
def test_the_remedy_for_conntrackd_is_a_command(change):
    assert p.group_problems(pair(two=change), all_facts())[0].endswith("systemctl disable --now conntrackd")


@pytest.mark.parametrize(
    "node_has",
    [
        {"host": {"ctsyncd": {"keys": {"1": FINGERPRINT}}}},
        {"host": {"ctsyncd": {"keys": {}}}},
        {"host": {"ctsyncd": {"keys": {"1": FINGERPRINT, "2": "x"}}}, "key_ids": [1, 2]},
        {"host": {"ctsyncd": {"keys": {"2": "x"}}}, "rotation": True},
        {"host": {"conntrackd": {"pids": [77], "active": True}}, "migrate": True},
    ],
)
def test_what_is_meant_to_be_so_is_no_fault(node_has):
    assert p.group_problems(pair(two=node_has), all_facts()) == []


def sysctl(value, **more):
    return {"host": {"sysctls": {"net.netfilter.nf_conntrack_udp_timeout": value}}, **more}


def test_limits_and_timeouts_of_the_kernels_are_the_same_or_will_be():
    said = "net.netfilter.nf_conntrack_udp_timeout differs (fw1: 30, fw2: 60): set it once for the group"
    found = p.group_problems(pair(one=sysctl("30"), two=sysctl("60")), all_facts())
    assert len(found) == 1 and found[0].startswith(said)
    wanted = {"sysctls": [{"name": "net.netfilter.nf_conntrack_udp_timeout", "value": 45}]}
    assert p.group_problems(pair(one=sysctl("30", **wanted), two=sysctl("60", **wanted)), all_facts()) == []
    found = p.group_problems(pair(one=sysctl("30", **wanted), two=sysctl("30")), all_facts())
    assert len(found) == 1 and "(fw1: 45, fw2: 30)" in found[0]
    ours = {"host": {"sysctls": {"net.netfilter.nf_conntrack_tcp_loose": "1"}}}
    other = {"host": {"sysctls": {"net.netfilter.nf_conntrack_tcp_loose": "0"}}}
    assert p.group_problems(pair(one=ours, two=other), all_facts()) == []


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("net.core.rmem_max", "kernel_extra_sysctls"),
        ("net.netfilter.nf_conntrack_buckets", "kernel_conntrack_buckets"),
        ("net.netfilter.nf_conntrack_udp_timeout", "kernel_conntrack_timeouts"),
    ],
)
def test_a_sysctl_that_no_probe_knows_is_none_to_compare(name, option):
    setting = {"sysctls": [{"name": name, "value": 268435456}, {"name": "without a value"}, "no dictionary"]}
    nodes = pair(both={"host": {"sysctls": {"net.netfilter.nf_conntrack_events": "1"}}, **setting})
    assert p.group_problems(nodes, all_facts()) == []
    nodes["fw2"]["sysctls"] = [{"name": name, "value": 5}]
    assert p.group_problems(nodes, all_facts()) == [
        f"{name} differs (fw1: 268435456, fw2: 5): set it once for the group in {option}"
    ]


def test_a_sysctl_of_several_numbers_is_compared_without_its_white_space():
    setting = {"sysctls": [{"name": "net.ipv4.tcp_rmem", "value": "1 2\t3"}]}
    nodes = pair(one={"host": {"sysctls": {"net.ipv4.tcp_rmem": "1 2 3"}}}, both=setting)
    nodes["fw2"]["host"]["sysctls"] = {"net.ipv4.tcp_rmem": "9 9 9"}
    assert p.group_problems(nodes, all_facts()) == []


def test_a_node_that_takes_no_part_is_named():
    found = p.group_problems(pair(), all_facts(), absent=["fw2"])
    assert len(found) == 1
    assert found[0].startswith("fw2: takes no part in this run")
    assert "without --limit" in found[0]


def test_mistakes_of_both_forms_of_rules_are_told_together():
    said = [
        "rules: rule 1 '-A FORWARD --sny': unknown option '--sny'; did you mean '--syn'?",
        "nat_rules: rule 1: bad.",
    ]
    node_has = {"rules": ["-A FORWARD -p tcp --sny -j DROP"], "rules_errors": said[1:]}
    found = p.group_problems(pair(both=node_has), all_facts())
    assert len(found) == 2
    assert "did you mean '--syn'?" in found[0]
    assert "ruleset_nat_rules: rule 1: bad." in found[1]


@pytest.mark.parametrize(("ahead", "limit", "problems"), [(29, None, 0), (95, None, 1), (95, 120, 0), (-95, None, 1)])
def test_clocks_are_compared_by_the_controllers(ahead, limit, problems):
    one = {"host": {"time": 1000.0}, "asked_at": 1002.0, "clock_skew_s": limit}
    two = {"host": {"time": 1010.0 + ahead}, "asked_at": 1012.0, "clock_skew_s": limit}
    found = p.group_problems(pair(one=one, two=two), all_facts())
    assert len(found) == problems, found
    if problems:
        assert found[0].startswith(("fw2: clock: is 95 s ahead of fw1's", "fw1: clock: is 95 s ahead of fw2's"))


def test_router_ids_and_priorities_may_be_left_out_on_all_nodes():
    entries = [{"interface": name, "address": f"192.168.{net}.100/24"} for net, name in ((0, "eth1"), (1, "eth0"))]
    assert p.group_problems(pair(both={"virtual_ips": entries, "priority": None}), all_facts()) == []
    made = p.vrrp_instances(entries, all_facts(), "fw1")
    assert [(instance["interface"], instance["router_id"]) for instance in made] == [("eth1", 51), ("eth0", 52)]


def test_what_belongs_to_the_group_is_the_same_on_all_nodes():
    nodes = pair(both={"alike": {"keepalived_advert_interval": 0.1, "keepalived_authentication": "aa"}})
    assert p.group_problems(nodes, all_facts()) == []
    nodes["fw2"]["alike"] = {"keepalived_advert_interval": 0.2, "keepalived_authentication": "bb"}
    assert p.group_problems(nodes, all_facts()) == [
        "keepalived_advert_interval: differs between the nodes (fw1: 0.1, fw2: 0.2): set it once for the whole group",
        "keepalived_authentication: differs between the nodes: set it once for the whole group",
    ]


def test_a_fault_of_both_is_said_once():
    assert p.group_problems(pair(both={"key": ""}), all_facts()) == [
        "fw1, fw2: ha_firewall_key: is missing: make one with: openssl rand -base64 32, and keep it in Ansible Vault"
    ]


def test_the_nodes_must_agree_on_the_virtual_ips_but_not_on_interface_names():
    other = {"virtual_ips": [{**entry, "interface": "en" + entry["interface"]} for entry in node(1)["virtual_ips"]]}
    there = {"interfaces": ["eneth0", "eneth1", "eth2"], "eneth0": facts(2)["eth0"], "eneth1": facts(2)["eth1"]}
    assert p.group_problems(pair(two=other), all_facts(two=there)) == []
    found = p.group_problems(pair(two=vips(router_id=60)), all_facts())
    assert found == [
        "fw2: ha_firewall_virtual_ips: differs from fw1's in addresses or router ids: set it once for the whole group"
    ]


def test_a_shared_address_is_a_conflict_unless_it_is_a_container_bridge():
    same = facts(1)["eth0"]
    assert any(
        "has the address 192.168.1.1 of fw1's eth0" in line
        for line in p.group_problems(pair(), all_facts(two={"eth0": same}))
    )
    bridge = {"interfaces": [*facts(1)["interfaces"], "docker0"], "docker0": interface("172.17.0.1/16")}
    assert p.group_problems(pair(), all_facts(one=bridge, two=bridge)) == []


def test_sync_addresses_must_be_in_one_network():
    found = p.group_problems(pair(two={"sync_address": "10.9.9.2"}), all_facts(two={"eth2": interface("10.9.9.2/24")}))
    assert len(found) == 1 and found[0].startswith(
        "ha_firewall_sync_address: the sync addresses are not in one network"
    )


@pytest.mark.parametrize(("count", "right"), [(0, False), (1, False), (2, True), (3, True), (8, True), (9, False)])
def test_two_to_eight_nodes(count, right):
    nodes = {
        f"n{number}": node(1, priority=100 + number, sync_address=f"192.168.100.{number}") for number in range(count)
    }
    found = p.group_problems(nodes, {})
    assert right == (not found), found
    assert right or f"has {count} hosts" in found[0]


def test_an_old_python_is_named():
    found = p.group_problems(pair(), all_facts(one={"python": {"version": {"major": 3, "minor": 8}}}))
    assert len(found) == 1 and "is Python 3.8, and the daemon needs 3.9" in found[0]


def test_no_key_ever_shows():
    weak, strong = (
        base64.b64encode(b"a weak secret").decode(),
        base64.b64encode(b"another secret of even more bytes").decode(),
    )
    found = "\n".join(p.group_problems(pair(one={"key": weak}, two={"key": strong}), all_facts()))
    assert weak not in found and strong not in found and "secret" not in found
    assert p.summarize_key(weak)["fingerprint"] == ""
    assert len(p.summarize_key(strong)["fingerprint"]) == 32


def test_the_instances_of_a_pair_by_unicast():
    listed = [
        *node(1)["virtual_ips"],
        {"interface": "eth1", "address": "fd00:c0de::100/64", "router_id": 51},
        {"interface": "eth1", "address": "192.168.0.101/24", "router_id": 51},
        {"interface": "eth1", "address": "192.168.0.102/24", "router_id": 53},
    ]
    holder = {
        "eth1": interface("192.168.0.100/24", "192.168.0.2/24", "fe80::2/64", "fd00:c0de::100/64", "fd00:c0de::2/64")
    }
    assert p.vrrp_instances(listed, all_facts(two=holder), "fw1") == [
        {
            "name": "VI_eth1",
            "interface": "eth1",
            "router_id": 51,
            "virtual_ips": ["192.168.0.100/24", "192.168.0.101/24"],
            "unicast_src_ip": "192.168.0.1",
            "unicast_peers": ["192.168.0.2"],
        },
        {
            "name": "VI_eth0",
            "interface": "eth0",
            "router_id": 52,
            "virtual_ips": ["192.168.1.100/24"],
            "unicast_src_ip": "192.168.1.1",
            "unicast_peers": ["192.168.1.2"],
        },
        {
            "name": "VI_eth1_6",
            "interface": "eth1",
            "router_id": 51,
            "virtual_ips": ["fd00:c0de::100/64"],
            "unicast_src_ip": "fd00:c0de::1",
            "unicast_peers": ["fd00:c0de::2"],
        },
        {
            "name": "VI_eth1_53",
            "interface": "eth1",
            "router_id": 53,
            "virtual_ips": ["192.168.0.102/24"],
            "unicast_src_ip": "192.168.0.1",
            "unicast_peers": ["192.168.0.2"],
        },
    ]


def test_the_instances_of_a_pair_by_multicast_need_no_facts():
    assert p.vrrp_instances(node(1)["virtual_ips"][:1], {}, "fw1", unicast=False) == [
        {"name": "VI_eth1", "interface": "eth1", "router_id": 51, "virtual_ips": ["192.168.0.100/24"]}
    ]


def test_a_peer_without_an_address_is_named():
    with pytest.raises(
        ValueError, match=r"^fw2: no own address in 192\.168\.0\.0/24 of the virtual IP 192\.168\.0\.100"
    ):
        p.vrrp_instances(node(1)["virtual_ips"], all_facts(two={"eth1": interface("192.168.0.100/24")}), "fw1")


def test_facts_name_interfaces_with_a_dash_otherwise():
    known = {"interfaces": ["br-lan"], "br_lan": {"ipv4": {"address": "10.0.0.1", "netmask": "255.255.255.0"}}}
    assert {name: list(map(str, found)) for name, found in p.interface_addresses(known).items()} == {
        "br-lan": ["10.0.0.1/24"]
    }


def test_vrrp_is_taken_from_every_own_address_of_a_peer_on_that_wire_and_no_virtual_one():
    entries = [
        {"interface": "eth1", "address": "192.168.0.100/24", "router_id": 51},
        {"interface": "eth1", "address": "fd00:c0de::100/64", "router_id": 51},
        {"interface": "eth0", "address": "192.168.1.100/24", "router_id": 52},
    ]
    holder = {
        "eth1": interface("192.168.0.2/24", "192.168.0.100/24", "fd00:c0de::2/64", "fd00:c0de::100/64", "fe80::2/64")
    }
    found = p.vrrp_peers(entries, {"fw2": facts(2, **holder)})
    assert found == [
        {"interface": "eth1", "addresses": ["192.168.0.2", "fd00:c0de::2", "fe80::2"]},
        {"interface": "eth0", "addresses": ["192.168.1.2"]},
    ]
    # what keepalived sends with is among them
    for instance in p.vrrp_instances(entries, {"fw1": facts(1), "fw2": facts(2, **holder)}, "fw2"):
        (row,) = [row for row in found if row["interface"] == instance["interface"]]
        assert instance["unicast_src_ip"] in row["addresses"]


def test_a_peer_may_call_its_interface_otherwise_and_have_several_networks_on_it():
    renamed = {
        "interfaces": ["ens19"],
        "ens19": interface("10.0.0.2/24", "192.168.0.2/24"),
    }
    entries = [{"interface": "eth1", "address": "192.168.0.100/24"}]
    assert p.vrrp_peers(entries, {"fw2": renamed}) == [{"interface": "eth1", "addresses": ["10.0.0.2", "192.168.0.2"]}]
    with pytest.raises(ValueError, match="The address of fw2 on eth1 is not known"):
        p.vrrp_peers(entries, {"fw2": {}})


# --- several sync links ---


def two_links(number, **more):
    links = [
        {"interface": "eth2", "address": f"192.168.100.{number}"},
        {"interface": "eth1", "address": f"fd00:c0de::{number}", "port": 4000},
    ]
    for path, value in more.items():
        index, key = path.split("_")
        links[int(index[1:])][key] = value
    return {"sync_links": links, "sync_interface": "", "sync_address": ""}


def test_several_sync_links_are_right():
    assert p.group_problems(pair(two_links(1), two_links(2)), all_facts()) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"l1_interface": "eth9"}, "ha_firewall_sync_links[1].interface: interface eth9 does not exist on this node"),
        ({"l1_interface": ""}, "ha_firewall_sync_links[1].interface: is missing"),
        ({"l1_interface": "eth2"}, "ha_firewall_sync_links[1].interface: eth2 stands twice"),
        ({"l1_address": "192.168.100.2"}, "ha_firewall_sync_links[1].address: 192.168.100.2 stands twice"),
        ({"l1_address": None}, "ha_firewall_sync_links[1].address: is missing"),
        ({"l1_address": "fd00::/64"}, "ha_firewall_sync_links[1].address: 'fd00::/64' is not an IP address"),
        ({"l1_address": "fd00:c0de::9"}, "ha_firewall_sync_links[1].address: fd00:c0de::9 is not configured on eth1"),
        ({"l1_address": "fd00:c0de::1"}, "ha_firewall_sync_links[1].address: fd00:c0de::1 is also the sync address"),
        ({"l0_address": "192.168.0.100"}, "ha_firewall_sync_links[0].address: 192.168.0.100 is a virtual IP"),
        ({"l1_port": 70000}, "ha_firewall_sync_links[1].port: 70000 is not a UDP port"),
    ],
)
def test_a_fault_of_one_of_several_sync_links_is_named(change, says):
    found = p.group_problems(pair(two_links(1), two_links(2, **change)), all_facts())
    assert any(line.startswith(f"fw2: {says}") for line in found), found


def test_sync_links_of_the_group():
    one, two = two_links(1), two_links(2)
    (found,) = p.group_problems(pair(one, {**two, "sync_links": two["sync_links"][:1]}), all_facts())
    assert found.startswith("ha_firewall_sync_links: the nodes have different numbers of sync links (fw1: 2, fw2: 1)")
    found = p.group_problems(pair(one, two_links(2, l1_port=4001)), all_facts())
    assert found == ["ha_firewall_sync_links[1].port: differs between the nodes (4000, 4001): set it once for all"]
    found = p.group_problems(pair(one, {**two, "sync_links": two["sync_links"][::-1]}), all_facts())
    assert any("[0].address: the sync addresses are not in one network" in line for line in found), found
    assert any("[1].address: the sync addresses are not in one network" in line for line in found), found
    (found,) = p.group_problems(pair({**one, "sync_interface": "eth2"}, two), all_facts())
    assert found.startswith("fw1: ha_firewall_sync_links: stands beside ha_firewall_sync_interface")
    found = p.group_problems(pair({**one, "sync_links": {"interface": "eth2"}}, two), all_facts())
    assert any("fw1: ha_firewall_sync_links: is not a list of dictionaries" in line for line in found), found


def test_each_sync_link_has_a_network_of_its_own():
    both = {"eth3": interface("192.168.100.11/24"), "interfaces": ["lo", "eth0", "eth1", "eth2", "eth3"]}
    other = {**both, "eth3": interface("192.168.100.12/24")}
    nodes = pair(
        two_links(1, l1_interface="eth3", l1_address="192.168.100.11"),
        two_links(2, l1_interface="eth3", l1_address="192.168.100.12"),
    )
    (found,) = p.group_problems(nodes, all_facts(one=both, two=other))
    assert found.startswith("fw1, fw2: ha_firewall_sync_links[1].address: is in 192.168.100.0/24 as an earlier link is")
