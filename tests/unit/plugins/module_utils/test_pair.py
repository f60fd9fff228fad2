# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The pair as a whole: verdict, obstacles to a hand-over, lost sessions, steps of a key rotation."""

from __future__ import annotations

import itertools

import pytest
from ansible_collections.ctsync.ha_firewall.plugins.filter import key_rotation, pair_status
from ansible_collections.ctsync.ha_firewall.plugins.module_utils import _pair


def node(role, verdict="READY", reasons=(), **more):
    held = role == "active"
    state = "MASTER" if held else "BACKUP"
    return {
        "role": role,
        "virtual_ips": [{"interface": "eth1", "address": "192.168.0.100", "held": held}],
        "sync": {
            "verdict": verdict,
            "reasons": list(reasons),
            "version": "0.1.0",
            "flows": {"kernel": 12, "external": 0 if held else 12},
            "peers": [{"lag": {"events": 0, "age_s": 0.0}}],
        },
        "vrrp": {
            "running": True,
            "instances": [{"name": "VI_eth1", "state": state, "priority": 150 if held else 100, "nopreempt": True}],
        },
        "host": {
            "ctsyncd": {"keys": {"1": "print"}, "send_key": 1},
            "keepalived": {"version": "2.2.7"},
            "sysctls": {"net.netfilter.nf_conntrack_max": "262144", "net.netfilter.nf_conntrack_udp_timeout": "30"},
        },
        **more,
    }


def pair(active=None, standby=None):
    return {"fw1": {**node("active"), **(active or {})}, "fw2": {**node("backup"), **(standby or {})}}


def test_a_good_pair_is_ready_and_may_hand_over():
    found = _pair.judge(pair())
    assert (found["verdict"], found["reasons"], found["obstacles"]) == ("READY", [], [])
    assert (found["active"], found["standby"]) == ("fw1", "fw2")
    assert found["lines"][0] == "READY - fw2 could take over from fw1 now"
    assert found["lines"][2].split() == ["fw1", "active", "READY", "1/1", "MASTER", "none", "12", "0", "1"]
    assert found["lines"][-1] == "versions  ctsyncd 0.1.0, keepalived 2.2.7"


@pytest.mark.parametrize(
    ("active", "standby", "reason"),
    [
        ({}, {"problem": "timed out"}, "fw2: could not be asked (timed out)"),
        ({}, {"sync": {"verdict": "NOT READY", "reasons": ["no session with fw1"]}}, "fw2: no session with fw1"),
        ({}, {"vrrp": {"running": False, "instances": []}}, "fw2: keepalived does not run"),
        (
            {},
            {"vrrp": {"running": True, "instances": [{"name": "VI_eth1", "state": "FAULT"}]}},
            "fw2: keepalived is in FAULT state (VI_eth1)",
        ),
        ({}, {"role": "active"}, "fw1 and fw2 hold the virtual IPs at the same time"),
        ({"role": "backup"}, {}, "no node holds the virtual IPs"),
        ({"role": "unknown"}, {}, "fw1: holds only some of the virtual IPs (192.168.0.100)"),
    ],
)
def test_what_would_be_an_outage_is_not_ready_and_an_obstacle(active, standby, reason):
    found = _pair.judge(pair(active, standby))
    assert found["verdict"] == "NOT READY"
    assert any(line.startswith(reason) for line in found["reasons"]), found["reasons"]
    assert any(line.startswith(reason) for line in found["obstacles"])
    assert any(line.startswith(reason) for line in found["lines"])


@pytest.mark.parametrize(
    ("standby", "reason", "obstacle"),
    [
        (node("backup", "DEGRADED", ["3 flows wait for the kernel"]), "fw2: 3 flows wait for the kernel", True),
        (
            {"host": {**node("backup")["host"], "ctsyncd": {"keys": {"1": "x", "2": "y"}, "send_key": 1}}},
            "a key rotation is half done (fw1: accepts 1, sends 1, fw2: accepts 1 and 2, sends 1)",
            False,
        ),
        (
            {"sync": {**node("backup")["sync"], "keys": {"accepts": [1, 3], "sends": 3}}},
            "fw2: the daemon does not have the keys of its files yet (it accepts 1 and 3, sends 3)",
            False,
        ),
        (
            {"host": {**node("backup")["host"], "sysctls": {"net.netfilter.nf_conntrack_max": "65536"}}},
            "net.netfilter.nf_conntrack_max differs (fw1: 262144, fw2: 65536)",
            False,
        ),
        (
            {"sync": {**node("backup")["sync"], "version": "0.2.0"}},
            "versions of ctsyncd differ (fw1: 0.1.0, fw2: 0.2.0): run the playbook upgrade",
            False,
        ),
    ],
)
def test_what_should_be_mended_is_degraded(standby, reason, obstacle):
    found = _pair.judge(pair(standby=standby))
    assert found["verdict"] == "DEGRADED"
    assert [line for line in found["reasons"] if line.startswith(reason)], found["reasons"]
    assert bool(found["obstacles"]) is obstacle


def test_preemption_by_the_better_node_is_an_obstacle():
    preempting = [{"name": "VI_eth1", "state": "MASTER", "priority": 150, "nopreempt": False}]
    worse = [{"name": "VI_eth1", "state": "MASTER", "priority": 90, "nopreempt": False}]
    assert (
        "keepalived_nopreempt"
        in _pair.judge(pair({"vrrp": {"running": True, "instances": preempting}}))["obstacles"][0]
    )
    assert _pair.judge(pair({"vrrp": {"running": True, "instances": worse}}))["obstacles"] == []


def test_the_filter_takes_the_facts_even_of_a_task_that_waited_in_vain():
    hostvars = {
        "fw1": {"ctsync_asked": {"failed": True, "msg": "no", "ansible_facts": {"ha_firewall": node("active")}}},
        "fw2": {"ctsync_asked": {"unreachable": True, "msg": "Connection refused\nmore"}},
        "fw3": {},
    }
    found = pair_status.pair_status(list(hostvars), hostvars)
    assert found["reasons"] == [
        "fw2: could not be asked (Connection refused)",
        "fw3: could not be asked (it took no part in this run; run it for the whole pair, without --limit)",
    ]


def flow(sport, state="ESTABLISHED", **more):
    orig = {"src": "192.168.0.3", "dst": "192.168.1.3", "sport": sport, "dport": 22}
    return {"protocol": "tcp", "protonum": 6, "zone": 0, "state": state, "orig": orig, **more}


def test_a_session_is_lost_only_when_no_state_of_it_is_left():
    before = [flow(1), flow(2), flow(3), flow(4, "TIME_WAIT"), {**flow(5), "protocol": "udp"}]
    after = [flow(1), flow(2, "TIME_WAIT"), flow(3, zone=7)]
    assert _pair.lost_sessions(before, after) == ["192.168.0.3:3 -> 192.168.1.3:22"]


# --- key rotation ---

STATES = [_pair.KeyState(ids, send) for ids in ((1,), (2,), (1, 2)) for send in (1, 2) if send in ids]


def understood(one, other):
    """Whether each accepts what the other sends."""
    return one.send in other.ids and other.send in one.ids


@pytest.mark.parametrize(("first", "second"), itertools.product(STATES, STATES))
def test_four_turns_lead_from_any_state_to_the_new_key_alone(first, second):
    states = [first, second]
    heard = understood(*states)
    for turn in range(4):
        own, peer = states[turn % 2], states[1 - turn % 2]
        states[turn % 2] = _pair.rotation_step(own, [peer], 2)
        # once the nodes understand each other they do so for good, and a turn of each is enough for that
        heard = heard or turn > 0
        assert understood(*states) or not heard, (first, second, states)
    assert states == [_pair.KeyState((2,), 2)] * 2


@pytest.mark.parametrize("states", itertools.product(STATES, repeat=3))
def test_three_turns_of_three_nodes_lead_from_any_state_to_the_new_key_alone(states):
    states = list(states)
    heard = all(understood(one, other) for one, other in itertools.combinations(states, 2))
    for turn in range(9):
        others = [state for number, state in enumerate(states) if number != turn % 3]
        states[turn % 3] = _pair.rotation_step(states[turn % 3], others, 2)
        heard = heard or turn > 1
        now = all(understood(one, other) for one, other in itertools.combinations(states, 2))
        assert now or not heard, (turn, states)
    assert states == [_pair.KeyState((2,), 2)] * 3


def trio(**changes):
    nodes = {**pair(), "fw3": node("backup")}
    for host, priority in (("fw1", 150), ("fw2", 140), ("fw3", 130)):
        nodes[host]["vrrp"]["instances"][0]["priority"] = priority
        nodes[host] = {**nodes[host], **changes.get(host, {})}
    return nodes


def test_a_good_group_of_three_is_ready_and_names_who_would_be_elected():
    found = _pair.judge(trio())
    assert (found["verdict"], found["obstacles"]) == ("READY", [])
    assert (found["active"], found["standby"], found["standbys"]) == ("fw1", "fw2", ["fw2", "fw3"])
    assert found["lines"][0] == "READY - fw2 or fw3 could take over from fw1 now"
    assert _pair.judge(trio(), "fw3")["standby"] == "fw3"


def test_of_three_the_one_that_is_not_ready_is_not_the_standby_and_is_named():
    found = _pair.judge(trio(fw2={"sync": {"verdict": "NOT READY", "reasons": ["no session with fw1"]}}))
    assert (found["verdict"], found["standby"]) == ("NOT READY", "fw3")
    assert found["reasons"] == ["fw2: no session with fw1"]
    found = _pair.judge(trio(fw2={"problem": "timed out", "role": None}))
    assert (found["verdict"], found["standby"]) == ("NOT READY", "")
    found = _pair.judge(trio(fw1={"sync": {"verdict": "DEGRADED", "reasons": ["no session with fw3"]}}))
    assert found["lines"][0] == "DEGRADED - the group works, but this should be mended"
    assert found["obstacles"] == ["fw1: no session with fw3"]


def test_of_three_any_better_node_that_preempts_is_an_obstacle():
    preempting = [{"name": "VI_eth1", "state": "BACKUP", "priority": 140, "nopreempt": False}]
    nodes = trio(fw2={"vrrp": {"running": True, "instances": preempting}})
    assert _pair.judge(nodes)["obstacles"] == []  # fw2 itself is elected
    (obstacle,) = _pair.judge(nodes, "fw3")["obstacles"]
    assert obstacle.startswith("fw2 has the higher priority and keepalived_nopreempt is false")


def test_the_usual_rotation_step_by_step():
    steps = []
    states = [_pair.KeyState((1,), 1), _pair.KeyState((1,), 1)]
    for turn in range(4):
        states[turn % 2] = _pair.rotation_step(states[turn % 2], [states[1 - turn % 2]], 2)
        steps.append(states[turn % 2])
    assert steps == [((1, 2), 1), ((1, 2), 2), ((2,), 2), ((2,), 2)]


def test_the_filter_speaks_the_words_of_the_facts():
    now = {"keys": {"1": "print"}, "send_key": 1}
    assert key_rotation.key_rotation(now, now, "2") == {"ids": [1, 2], "send_key": 1}
    assert key_rotation.key_rotation(now, [now, now], "2") == {"ids": [1, 2], "send_key": 1}
