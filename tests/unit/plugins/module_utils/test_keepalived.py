# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Options to keepalived.conf and back. What keepalived makes of it is tested in tests/integration."""

from __future__ import annotations

import dataclasses

import pytest
from ansible_collections.ctsync.ha_firewall.plugins.module_utils import _keepalived as k


def options(**more):
    return {
        "node": "fw1",
        "priority": 150,
        "instances": [
            {
                "interface": "eth1",
                "router_id": 51,
                "virtual_ips": ["192.168.0.100/24"],
                "unicast_src_ip": "192.168.0.1",
                "unicast_peers": ["192.168.0.2"],
            },
            {"interface": "eth0", "router_id": 52, "virtual_ips": ["192.168.1.100/24"]},
        ],
        "notify_fifo": k.NOTIFY_FIFO,
        "track_file": k.TRACK_FILE,
        **more,
    }


def problems_of(**more):
    with pytest.raises(k.ConfigProblem) as caught:
        k.build_config(options(**more))
    return caught.value.problems


def test_the_whole_file():
    assert k.render_config(k.build_config(options()), before=k.Before(active=False, enabled=True)) == (
        """\
# Managed by Ansible: ctsync.ha_firewall.keepalived. Changes in this file get lost.
# Before: active=no enabled=yes

global_defs {
    router_id fw1
    vrrp_version 3
    vrrp_notify_fifo /run/ctsync/notify.fifo root
    fifo_write_vrrp_states_on_reload
    vrrp_higher_prio_send_advert true
    vrrp_garp_master_delay 1
    vrrp_garp_master_repeat 5
    vrrp_garp_master_refresh 2
    vrrp_garp_lower_prio_delay 1
    vrrp_garp_lower_prio_repeat 5
}

track_file ctsync_not_ready {
    file "/run/ctsync/not-ready"
    init_file 1
}

vrrp_sync_group ha_firewall {
    group {
        VI_eth1
        VI_eth0
    }
    track_file {
        ctsync_not_ready weight -60
    }
    sync_group_tracking_weight
}

vrrp_instance VI_eth1 {
    state BACKUP
    interface eth1
    virtual_router_id 51
    priority 150
    advert_int 0.1
    nopreempt
    unicast_src_ip 192.168.0.1
    check_unicast_src
    unicast_ttl 255
    unicast_peer {
        192.168.0.2 min_ttl 255 max_ttl 255
    }
    virtual_ipaddress {
        192.168.0.100/24 dev eth1
    }
}

vrrp_instance VI_eth0 {
    state BACKUP
    interface eth0
    virtual_router_id 52
    priority 150
    advert_int 0.1
    nopreempt
    virtual_ipaddress {
        192.168.1.100/24 dev eth0
    }
}
"""
    )


def test_options_that_are_off_leave_no_trace():
    text = k.render_config(
        k.build_config(options(notify_fifo="", track_file="", nopreempt=False, preempt_delay=30, startup_delay=2.5))
    )
    assert "fifo" not in text and "track" not in text and "nopreempt" not in text
    assert text.count("    preempt_delay 30\n") == 2
    assert "    vrrp_startup_delay 2.5\n" in text


def test_an_older_keepalived_gets_no_keyword_that_it_does_not_know():
    text = k.render_config(k.build_config(options()), (2, 1, 5))
    for keyword in ("fifo_write_vrrp_states_on_reload", "check_unicast_src", "unicast_ttl", "min_ttl"):
        assert keyword not in text
    assert "        192.168.0.2\n" in text


def test_a_single_instance_tracks_by_itself():
    wanted = options()
    del wanted["instances"][1]
    text = k.render_config(k.build_config(wanted))
    assert "vrrp_sync_group" not in text and "sync_group_tracking_weight" not in text
    assert text.index("track_file ctsync_not_ready {") < text.index("ctsync_not_ready weight -60")


def test_what_is_rendered_can_be_read_back():
    six = {"interface": "eth1", "router_id": 51, "virtual_ips": ["fd00::100/64", "fd00::101/64"]}
    config = k.build_config(options(instances=[*options()["instances"], six]))
    text = k.render_config(config, before=k.Before(active=True, enabled=False))
    assert [tuple(parsed) for parsed in k.parse_instances(text)] == [
        (i.name, i.interface, i.priority, i.router_id, i.virtual_ips) for i in config.instances
    ]
    assert [i.name for i in config.instances] == ["VI_eth1", "VI_eth0", "VI_eth1_6"]
    assert k.is_ours(text) and k.parse_before(text) == k.Before(active=True, enabled=False)


def test_a_file_of_others_can_be_read():
    text = """\
! a comment { with a brace
vrrp_script check { script "/bin/true" }
vrrp_instance "X"
{
    interface eth0 # not eth1
    priority 7
    virtual_ipaddress { 192.0.2.1/24 dev eth0 }
    virtual_ipaddress_excluded {
        192.0.2.9
    }
}
vrrp_instance Y { interface eth1
  virtual_ipaddress {
    192.0.2.2
    192.0.2.3/32
}}
"""
    assert not k.is_ours(text) and k.parse_before(text) is None
    assert k.parse_instances(text) == [
        k.ParsedInstance("X", "eth0", 7, 0, ("192.0.2.1/24",)),
        k.ParsedInstance("Y", "eth1", 100, 0, ("192.0.2.2", "192.0.2.3/32")),
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"instances": []}, "instances: is empty"),
        ({"priority": None}, "instances[0].priority: is missing"),
        ({"priority": 255}, "instances[0].priority: 255 is out of range: choose 1 to 254"),
        (
            {"priority": 60},
            "priority: 60 with track_weight -60 is below 1 when the node is not ready: choose at least 61",
        ),
        ({"track_weight": 10}, "track_weight: 10 is out of range: choose -253 to -1"),
        ({"advert_interval": 0.015}, "instances[0].advert_interval: 0.015 is not a multiple of 0.01"),
        ({"advert_interval": 41}, "instances[0].advert_interval: 41 is out of range"),
        ({"preempt_delay": 5}, "preempt_delay: has no effect with nopreempt"),
        ({"notify_fifo": "run/x"}, "notify_fifo: 'run/x' is not an absolute path"),
        ({"track_file": '/run/"x'}, "track_file: '/run/\"x' is not an absolute path"),
        ({"group": "a b"}, "group: 'a b': use letters"),
        ({"node": "fw1\n}"}, "node: 'fw1\\n}': use letters"),
        ({"garp": {"lower_prio_delay": 0}}, "garp.lower_prio_delay: 0 is out of range"),
        ({"realtime_priority": 100}, "realtime_priority: 100 is out of range"),
    ],
)
def test_each_wrong_option_is_named_with_its_remedy(change, said):
    assert any(problem.startswith(said) for problem in problems_of(**change)), problems_of(**change)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"interface": "eth1 {"}, "instances[0].interface: 'eth1 {' is not an interface name"),
        ({"router_id": 0}, "instances[0].router_id: 0 is out of range: choose 1 to 255"),
        ({"virtual_ips": []}, "instances[0].virtual_ips: is empty"),
        ({"virtual_ips": ["192.168.0.100"]}, "instances[0].virtual_ips[0]: 192.168.0.100 has no prefix length"),
        ({"virtual_ips": ["192.168.0.300/24"]}, "instances[0].virtual_ips[0]: '192.168.0.300/24' is not an IP address"),
        ({"virtual_ips": ["192.168.0.100/24", "fd00::1/64"]}, "instances[0].virtual_ips: mixes IPv4 and IPv6"),
        ({"virtual_ips": ["192.168.1.100/24"]}, "instances[1].virtual_ips: 192.168.1.100 is also in VI_eth1"),
        ({"unicast_src_ip": None}, "instances[0].unicast_src_ip: is missing"),
        ({"unicast_src_ip": "fd00::1"}, "instances[0].unicast_src_ip: fd00::1 is not of the family"),
        ({"unicast_src_ip": "192.168.0.100"}, "instances[0].unicast_src_ip: 192.168.0.100 is a virtual address"),
        ({"unicast_peers": []}, "instances[0].unicast_peers: is empty: keepalived would silently use multicast"),
        ({"unicast_peers": ["192.168.0.1"]}, "instances[0].unicast_peers: 192.168.0.1 is this node's own address"),
        ({"unicast_peers": ["192.168.0.2/24"]}, "instances[0].unicast_peers[0]: '192.168.0.2/24' is not an IP address"),
        ({"name": "VI_eth0"}, "instances[1].name: VI_eth0 is also the name of instances[0]"),
        ({"interface": "eth0", "router_id": 52}, "instances[1].router_id: 52 is used twice on eth0"),
        ({"priority": 140}, "instances: priorities [140, 150] differ within one sync group"),
    ],
)
def test_each_wrong_instance_is_named_with_its_remedy(change, said):
    instances = options()["instances"]
    instances[0].update(change)
    found = problems_of(instances=instances)
    assert any(problem.startswith(said) for problem in found), found


def test_all_problems_come_at_once():
    instances = options()["instances"]
    instances[0]["router_id"] = 0
    instances[1]["virtual_ips"] = []
    assert len(problems_of(instances=instances, group="a b", node="")) == 4


def test_the_reasons_of_the_config_test_are_shown_once_with_the_live_path():
    said = "(/tmp/x.conf: Line 3) Unknown keyword 'a'\n(/tmp/x.conf: Line 3) Unknown keyword 'a'\n\nend\n"
    assert k.clean_test_output(said, "/tmp/x.conf", "/etc/k.conf") == "(/etc/k.conf: Line 3) Unknown keyword 'a'\nend"
    assert "enable_script_security" in k.explain_exit(6) and "missing interface" in k.explain_exit(5)
    assert k.explain_exit(77) == "keepalived ended with exit code 77"


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("Keepalived v2.2.7 (01/16,2022)\n\nCopyright", (2, 2, 7)),
        ("Keepalived v2.3.3 (03/30,2025), git", (2, 3, 3)),
        ("", ()),
    ],
)
def test_the_version(text, version):
    assert k.parse_version(text) == version


def test_the_drop_in_waits_for_the_daemon_without_needing_it():
    text = k.render_dropin("/etc/keepalived/keepalived.conf")
    assert "After=ctsyncd.service" in text and "Restart=on-failure" in text
    assert "ConditionFileNotEmpty=/etc/keepalived/keepalived.conf" in text
    assert "Requires=" not in text and "Wants=" not in text  # a stopped daemon stays stopped
    assert k.is_ours(text)


def test_values_cannot_be_changed_after_the_check():
    config = k.build_config(options())
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.node = "other"


KEY = "00" * 32


def test_what_else_is_tracked_and_sealed():
    config = k.build_config(
        options(
            track_file="",
            track_interfaces=[{"interface": "eth2"}, {"interface": "eth3", "weight": -20}],
            bfd=[
                {"neighbour": "192.168.1.3", "source": "192.168.1.1"},
                {
                    "name": "v6",
                    "neighbour": "fd00::3",
                    "source": "fd00::1",
                    "passive": True,
                    "weight": -5,
                    "min_tx_ms": 9.5,
                },
            ],
            garp={"refresh_repeat": 2, "interval": 0.05},
            authentication={"keys": [{"id": 7, "key": KEY}], "time_window_s": 9},
        )
    )
    text = k.render_config(config)
    for part in (
        "    vrrp_garp_master_refresh_repeat 2\n    vrrp_garp_interval 0.05\n    vrrp_gna_interval 0.05\n",
        "bfd_instance bfd_1 {\n    neighbor_ip 192.168.1.3\n    source_ip 192.168.1.1\n    min_rx 50\n    min_tx 50\n"
        "    idle_tx 1000\n    multiplier 5\n    ttl 255\n}\n",
        "    min_tx 9.5\n    idle_tx 1000\n    multiplier 5\n    hoplimit 255\n    passive\n}\n",
        "    track_interface {\n        eth2\n        eth3 weight -20\n    }\n"
        "    track_bfd {\n        bfd_1\n        v6 weight -5\n    }\n    sync_group_tracking_weight\n",
        f"    auth_hmac {{\n        key 7 hex:{KEY}\n        active_key 7\n        mode enforce\n"
        "        anti_replay time\n        time_window 9\n    }\n",
    ):
        assert part in text
    assert text.count("auth_hmac {") == 2
    assert KEY not in k.tracking.hide_keys(text) and "key 7 (not shown)" in k.tracking.hide_keys(text)
    assert [instance.virtual_ips for instance in k.parse_instances(text)] == [
        ("192.168.0.100/24",),
        ("192.168.1.100/24",),
    ]


def test_without_a_weight_the_group_weighs_nothing():
    text = k.render_config(k.build_config(options(track_file="", track_interfaces=[{"interface": "eth2"}])))
    assert "sync_group_tracking_weight" not in text and "eth2\n" in text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"track_interfaces": [{"interface": "eth1"}]}, "track_interfaces[0].interface: eth1 carries an instance"),
        ({"track_interfaces": [{"interface": "a b"}]}, "track_interfaces[0].interface: 'a b' is not an interface name"),
        ({"track_interfaces": [{"interface": "x"}] * 2}, "track_interfaces[1].interface: x stands twice"),
        ({"track_interfaces": [{"interface": "x", "weight": 5}]}, "track_interfaces[0].weight: 5 is out of range"),
        ({"bfd": [{"neighbour": "router", "source": "192.0.2.1"}]}, "bfd[0].neighbour: 'router' is not an IP address"),
        ({"bfd": [{"neighbour": "fd00::3", "source": "192.0.2.1"}]}, "bfd[0].source: 192.0.2.1 is not of the family"),
        ({"bfd": [{"neighbour": "192.0.2.1", "source": "192.0.2.1"}]}, "bfd[0].neighbour: 192.0.2.1 is the source"),
        ({"bfd": [{"neighbour": "192.0.2.1", "source": "192.0.2.2", "min_rx_ms": 0}]}, "bfd[0].min_rx_ms: 0 is out of"),
        ({"bfd": [{"neighbour": "192.0.2.1", "source": "192.0.2.2", "multiplier": 0}]}, "bfd[0].multiplier: 0 is out"),
        ({"bfd": [{"neighbour": "192.0.2.1", "source": "192.0.2.2", "name": "a b"}]}, "bfd[0].name: 'a b': use"),
        ({"bfd": [{"neighbour": "192.0.2.1", "source": "192.0.2.2", "name": "a"}] * 2}, "bfd[1].name: a stands twice"),
        ({"garp": {"interval": 2}}, "garp.interval: 2 is out of range"),
        ({"garp": {"refresh_repeat": 0}}, "garp.refresh_repeat: 0 is out of range"),
        ({"authentication": {"keys": []}}, "authentication.keys: is empty"),
        ({"authentication": {"keys": [{"id": 0, "key": KEY}]}}, "authentication.keys[0].id: 0 is out of range"),
        ({"authentication": {"keys": [{"id": 1, "key": "zz"}]}}, "authentication.keys[0].key: is not 64 to 128 hex"),
        (
            {"authentication": {"keys": [{"id": 1, "key": KEY}] * 2, "send_key": 1}},
            "authentication.keys[1].id: 1 stands",
        ),
        (
            {"authentication": {"keys": [{"id": 1, "key": KEY}, {"id": 2, "key": KEY}]}},
            "authentication.send_key: is missing",
        ),
        (
            {"authentication": {"keys": [{"id": 1, "key": KEY}], "send_key": 3}},
            "authentication.send_key: there is no key 3",
        ),
        (
            {"authentication": {"keys": [{"id": 1, "key": KEY}], "time_window_s": 301}},
            "authentication.time_window_s: 301",
        ),
        (
            {"authentication": {"keys": [{"id": 1, "key": KEY}], "time_window_s": 9, "anti_replay": "monotonic"}},
            "authentication.time_window_s: has no effect",
        ),
    ],
)
def test_each_wrong_thing_to_track_or_seal_is_named_with_its_remedy(change, said):
    found = problems_of(**change)
    assert len(found) == 1, found
    assert found[0].startswith(said)
    assert KEY not in found[0]


def test_a_keepalived_without_hmac_is_refused_by_name():
    assert k.tracking.hmac_problem((2, 4, 0)) == "" and k.tracking.hmac_problem(()) == ""
    assert k.tracking.hmac_problem((2, 2, 7)).startswith("authentication: keepalived 2.2.7 has none for VRRPv3")
