# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What ha_facts says of a host where parts are missing, and how it reads what others say."""

from __future__ import annotations

import base64
import json
import os
import random

import pytest
from ansible_collections.ctsync.ha_firewall.plugins.module_utils import _facts as f
from ansible_collections.ctsync.ha_firewall.plugins.module_utils import _keepalived, _preflight
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.errors import NetlinkError
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.flow import Flow, Tuple

ADDRESSES = {f.Address("eth1", "192.168.0.100"), f.Address("eth1", "192.168.0.1"), f.Address("eth0", "fd00::100")}
CONFIG = """\
vrrp_instance VI_eth1 {
    interface eth1
    virtual_router_id 51
    priority 150
    virtual_ipaddress {
        192.168.0.100/24 dev eth1
    }
}
vrrp_instance VI_eth0 {
    interface eth0
    virtual_router_id 52
    priority 150
    virtual_ipaddress {
        192.168.1.100/24 dev eth0
    }
}
"""


def runner(answers):
    """A command's answer by its last words."""

    def run(command):
        for words, answer in answers.items():
            if " ".join(command).endswith(words):
                return answer
        raise AssertionError(command)

    return run


def script(path, text="#!/bin/sh\n"):
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("wanted", "result"),
    [
        ({"interface": "eth1", "address": "192.168.0.100/24"}, ("eth1", "192.168.0.100", True)),
        ({"interface": "eth0", "address": "192.168.0.100"}, ("eth0", "192.168.0.100", False)),
        ("192.168.0.100/24", ("eth1", "192.168.0.100", True)),
        ("192.168.1.100", ("", "192.168.1.100", False)),
        ({"interface": "eth0", "address": "FD00:0::100/64"}, ("eth0", "fd00::100", True)),
    ],
)
def test_who_has_a_virtual_ip(wanted, result):
    assert [tuple(vip.values()) for vip in f.virtual_ips_held([wanted], ADDRESSES)] == [result]


@pytest.mark.parametrize(
    ("held", "role"),
    [([True, True], "active"), ([False, False], "backup"), ([True, False], "unknown"), ([], "unknown")],
)
def test_the_role(held, role):
    assert f.role_of([{"held": one} for one in held]) == role


def test_the_virtual_ips_come_from_the_daemon_or_else_from_keepalived(tmp_path):
    daemon, keepalived = tmp_path / "ctsyncd.conf", tmp_path / "keepalived.conf"
    assert f.wanted_virtual_ips(str(daemon), str(keepalived)) == []
    keepalived.write_text(CONFIG, encoding="utf-8")
    both = [{"interface": "eth1", "address": "192.168.0.100"}, {"interface": "eth0", "address": "192.168.1.100"}]
    assert f.wanted_virtual_ips(str(daemon), str(keepalived)) == both
    daemon.write_text("{broken", encoding="utf-8")
    assert f.wanted_virtual_ips(str(daemon), str(keepalived)) == both
    daemon.write_text(json.dumps({"virtual_ips": both[:1]}), encoding="utf-8")
    assert f.wanted_virtual_ips(str(daemon), str(keepalived)) == both[:1]


def test_without_a_dump_the_state_follows_from_the_addresses(tmp_path):
    config = tmp_path / "keepalived.conf"
    config.write_text(CONFIG, encoding="utf-8")
    found = f.vrrp_facts(runner({}), None, str(config), str(tmp_path / "pid"), ADDRESSES)
    assert found["running"] is False and [i["state"] for i in found["instances"]] == ["INIT", "INIT"]
    states = [i["state"] for i in f.instances_from_config(CONFIG, ADDRESSES, running=True)]
    assert states == ["MASTER", "BACKUP"]


def test_a_process_of_another_name_is_not_keepalived(tmp_path):
    pid = tmp_path / "pid"
    pid.write_text(f"{os.getpid()}\n", encoding="ascii")
    assert f.keepalived_pid(str(pid)) == 0
    pid.write_text("999999999\n", encoding="ascii")
    assert f.keepalived_pid(str(pid)) == 0


def test_a_keepalived_without_json_is_never_signalled(monkeypatch):
    monkeypatch.setattr(f.os, "kill", lambda *_args: pytest.fail("it was signalled"))
    assert (
        f.keepalived_dump(runner({"--signum=JSON": (1, "", "Unknown sigfunc JSON\n")}), "/usr/sbin/keepalived", 1)
        is None
    )
    # and neither is one that is not the program on the disk
    assert f.keepalived_dump(runner({"--signum=JSON": (0, "36\n", "")}), "/bin/sh", os.getpid()) is None


def test_the_dump_in_our_words():
    data = {
        "iname": "VI_1",
        "ifp_ifname": "eth1",
        "vrid": 51,
        "state": 2,
        "base_priority": 150,
        "effective_priority": 90,
    }
    found = f.instances_from_dump(
        [{"data": {**data, "vips": ["192.168.0.100/24 dev eth1 scope global"]}, "stats": {"advert_sent": 5}}]
    )
    assert found[0]["state"] == "MASTER" and found[0]["effective_priority"] == 90
    assert found[0]["virtual_ips"] == ["192.168.0.100/24"] and found[0]["statistics"] == {"advert_sent": 5}
    assert f.instances_from_dump([{"data": {"state": 9}}])[0]["state"] == "UNKNOWN"


@pytest.mark.parametrize(
    ("answer", "verdict", "reason"),
    [
        ((2, '{"verdict": "NOT READY", "reasons": ["a"], "node": "fw1"}\n', ""), "NOT READY", "a"),
        ((0, '{"verdict": "READY", "reasons": []}\n', ""), "READY", None),
        (
            (1, "", "ctsyncd: cannot connect\nmore\n"),
            "NOT READY",
            "the daemon does not answer: ctsyncd: cannot connect",
        ),
        ((3, "[]", ""), "NOT READY", "the daemon does not answer: []"),
        ((3, "", ""), "NOT READY", "the daemon does not answer: exit code 3"),
    ],
)
def test_the_verdict_of_the_daemon(tmp_path, answer, verdict, reason):
    program = script(tmp_path / "ctsyncd")
    found = f.sync_facts(runner({"-C /c status --json": answer}), program, "/c")
    assert found["verdict"] == verdict and found["reasons"] == ([reason] if reason else [])


def test_a_missing_daemon_is_not_ready(tmp_path):
    found = f.sync_facts(runner({}), str(tmp_path / "none"), "/c")
    assert found == {"verdict": "NOT READY", "reasons": ["the daemon is not installed"], "running": False}


def test_flows_are_counted_beyond_the_limit(tmp_path, monkeypatch):
    program = script(tmp_path / "ctsyncd")
    flow = Flow(
        2, 6, 0, Tuple(b"\x0a\0\0\1", b"\x0a\0\0\2", b"\0\1\0\2"), Tuple(b"\x0a\0\0\2", b"\x0a\0\0\1", b"\0\2\0\1"), 14
    )
    dumps = iter([NetlinkError("interrupted", 4), [[flow, flow], [flow]]])

    def dump_flows():
        found = next(dumps)
        if isinstance(found, Exception):
            raise found
        yield from found

    monkeypatch.setattr(f.netlink, "dump_flows", dump_flows)
    one, two, three = ({"protonum": number} for number in (1, 2, 3))
    lines = "".join(json.dumps(each) + "\n" for each in (two, one, three))
    answers = {"-i --json": (0, lines, ""), "-e --json": (2, "", "no daemon\n")}
    found = f.flow_facts(runner(answers), program, "/c", 2)
    assert found["internal"] == [one, two] and found["external"] == []
    assert found["counts"] == {"internal": 3, "external": 0, "kernel": 3}
    assert found["truncated"] == ["internal", "kernel"] and found["errors"] == {"external": "no daemon"}
    assert found["kernel"][0]["orig"] == {"src": "10.0.0.1", "dst": "10.0.0.2", "sport": 1, "dport": 2}


def test_flows_are_in_one_order_whatever_the_kernel_s_is():
    def flow(src, sport, dst="10.0.0.9", dport=22, **more):
        side = {"src": src, "dst": dst, "sport": sport, "dport": dport}
        return {"family": "ipv6" if ":" in src else "ipv4", "protonum": 6, "zone": 0, "orig": side, **more}

    ordered = [
        {
            "family": "ipv4",
            "protonum": 1,
            "zone": 0,
            "orig": {"src": "10.0.0.9", "dst": "10.0.0.1", "type": 8, "id": 4},
        },
        {
            "family": "ipv4",
            "protonum": 1,
            "zone": 0,
            "orig": {"src": "10.0.0.9", "dst": "10.0.0.1", "type": 8, "id": 5},
        },
        flow("10.0.0.2", 9),
        flow("10.0.0.2", 80),
        flow("10.0.0.2", 80, zone=7),
        flow("10.0.0.10", 1),
        flow("10.0.0.10", 1, dport=443),
        flow("10.0.0.2", 1, protonum=17),
        flow("fd00::2", 5),
        flow("fd00::10", 1),
    ]
    for seed in range(20):
        shuffled = random.Random(seed).sample(ordered, len(ordered))
        assert sorted(shuffled, key=f.flow_order) == ordered


def test_processes_are_found_by_name_in_this_network_namespace():
    with open("/proc/self/comm", encoding="utf-8") as stream:
        name = stream.read().strip()
    assert os.getpid() in f.processes_named(name)
    assert f.processes_named("no such name") == []


def test_keys_are_told_by_fingerprint_only(tmp_path):
    secret = base64.b64encode(bytes(range(32))).decode()
    keys = tmp_path / "keys"
    keys.mkdir()
    (keys / "2.key").write_text(secret + "\n", encoding="utf-8")
    config = tmp_path / "ctsyncd.conf"
    config.write_text(json.dumps({"keys": {"1": "key-1", "2": "key-2"}, "send_key": 2}), encoding="utf-8")
    found = f.key_facts(str(config), str(keys))
    assert found == {"keys": {"1": "", "2": _preflight.summarize_key(secret)["fingerprint"]}, "send_key": 2}
    config.write_text(json.dumps({"keys": {"7": "key-7"}}), encoding="utf-8")
    assert f.key_facts(str(config), str(keys)) == {"keys": {"7": ""}, "send_key": 7}
    assert f.key_facts(str(tmp_path / "none"), str(keys)) == {"keys": {}, "send_key": None}


def test_sysctls_that_the_kernel_does_not_have_are_none(tmp_path):
    folder = tmp_path / "net" / "netfilter"
    folder.mkdir(parents=True)
    (folder / "nf_conntrack_max").write_text("262144\n", encoding="utf-8")
    found = f.sysctl_facts(str(tmp_path))
    assert found.pop("net.netfilter.nf_conntrack_max") == "262144"
    assert set(found.values()) == {None}


def test_a_configuration_of_keepalived_is_ours_or_not(tmp_path):
    path = tmp_path / "keepalived.conf"
    assert f.keepalived_facts(str(path)) == {"configured": False, "ours": False}
    path.write_text("vrrp_instance x {\n}\n", encoding="utf-8")
    assert f.keepalived_facts(str(path)) == {"configured": True, "ours": False}
    path.write_text(_keepalived.MARKER + "\n", encoding="utf-8")
    assert f.keepalived_facts(str(path)) == {"configured": True, "ours": True}
