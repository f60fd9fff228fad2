# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The module ruleset against the real kernel, with both kinds of iptables."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess

import pytest
from ansible_collections.ctsync.ha_firewall.plugins.module_utils import _ruleset
from integration.sealed import Machine

pytestmark = pytest.mark.netns

PAGE = [
    "-P FORWARD DROP",
    "-A FORWARD -i eth0 -m state --state ESTABLISHED,RELATED -j ACCEPT",
    "-A FORWARD -i eth1 -p tcp --syn -m state --state NEW -j ACCEPT",
    "-A FORWARD -i eth1 -p tcp -m state --state ESTABLISHED -j ACCEPT",
    "-A FORWARD -m state --state INVALID -j LOG",
    "-I POSTROUTING -t nat -s 192.168.0.3 -j SNAT --to 192.168.1.100",
]
FULL = {
    "rules": PAGE,
    "virtual_ips": ["10.9.8.100/24", "fd00::100/64"],
    "services": [{"protocol": "tcp", "port": "22"}],
    "vrrp_peers": [{"interface": "eth1", "addresses": ["192.168.0.2"]}],
    "sync": [{"interface": "eth2", "address": "192.168.100.1", "peers": ["192.168.100.2"]}],
    "count_resets": True,
    "nflog_group": 5,
}
FILES = [
    "/etc/ctsync/ruleset.v4",
    "/etc/ctsync/ruleset.v6",
    "/etc/ctsync/ruleset.fingerprint",
    "/etc/systemd/system/ctsync-ruleset.service",
    "/etc/systemd/system/multi-user.target.wants/ctsync-ruleset.service",
    "/var/lib/ctsync/ruleset.json",
    "/usr/lib/ctsync/ruleset-watch.pyz",
    "/etc/systemd/system/ctsync-ruleset-watch.service",
    "/etc/systemd/system/ctsync-ruleset-watch.timer",
    "/etc/systemd/system/timers.target.wants/ctsync-ruleset-watch.timer",
    "/run/ctsync/ruleset.fingerprint",
]
UNIT = FILES[3]
PEER = {
    "vrrp_peers": [{"interface": "eth1", "addresses": ["192.168.0.1"]}],
    "sync": [{"interface": "eth2", "address": "192.168.100.2", "peers": ["192.168.100.1"]}],
}


def saved(machine, backend, family="ipv4", counters=False):
    """iptables-save without its comments, which hold the time."""
    command = [_ruleset.program_name(family, backend, "-save"), *(["-c"] if counters else [])]
    return [line for line in machine.run(*command).splitlines() if not line.startswith("#")]


def files(machine):
    return [path for path in FILES if machine.run("find", path, check=False)]


def test_present_twice_and_absent(machine, backend):
    machine.run(f"iptables-{backend}", "-t", "mangle", "-A", "FORWARD", "-j", "MARK", "--set-mark", "7")
    before = saved(machine, backend)

    predicted = machine.module("ruleset", check=True, backend=backend, **FULL)
    assert predicted["changed"]
    assert saved(machine, backend) == before
    assert files(machine) == []

    done = machine.module("ruleset", backend=backend, **FULL)
    assert done["changed"]
    assert done["diff"] == predicted["diff"]
    assert done["fingerprint"] == predicted["fingerprint"]
    rules = saved(machine, backend)
    assert ":FORWARD DROP [0:0]" in rules
    assert "-A CTSYNC-POSTROUTING -s 192.168.0.3/32 -j SNAT --to-source 192.168.1.100" in rules
    assert "-A FORWARD -j MARK --set-xmark 0x7/0xffffffff" in rules
    assert "-A CTSYNC-FORWARD -m state --state INVALID -j NFLOG --nflog-group 5" in rules
    assert "-A CTSYNC-INPUT -d fd00::100/128 -j CTSYNC-VIP" in saved(machine, backend, "ipv6")
    assert files(machine) == FILES
    shown = {entry["after_header"]: entry["after"].splitlines() for entry in done["diff"]}
    plain = [line.split(" [")[0] for line in rules]
    assert [line for line in shown["iptables-save"] if line not in plain] == []

    again = machine.module("ruleset", backend=backend, **FULL)
    assert not again["changed"]
    assert "diff" not in again
    assert again["fingerprint"] == done["fingerprint"]

    gone = machine.module("ruleset", backend=backend, state="absent")
    assert gone["changed"]
    builtin = [line for line in saved(machine, backend) if line.startswith((":", "-"))]
    assert not [line for line in builtin if "CTSYNC" in line or " DROP" in line]
    assert "-A FORWARD -j MARK --set-xmark 0x7/0xffffffff" in builtin
    assert files(machine) == []
    assert not machine.module("ruleset", backend=backend, state="absent")["changed"]


def test_both_nodes_have_one_fingerprint_and_a_different_rule_or_policy_another(machine, backend):
    done = machine.module("ruleset", backend=backend, **FULL)
    assert machine.run("cat", FILES[-1]) == done["fingerprint"] + "\n"
    with Machine() as peer:
        other = peer.module("ruleset", backend=backend, **{**FULL, **PEER})
        assert other["fingerprint"] == done["fingerprint"]
        assert other["chains"] != done["chains"]
        peer.run(f"iptables-{backend}", "-I", "FORWARD", "-i", "foreign", "-j", "ACCEPT")
        peer.run(f"iptables-{backend}", "-A", "CTSYNC-INPUT", "-i", "never", "-j", "DROP", "--set-counters", "7", "9")

        def live():
            return _ruleset.read_live(lambda command: (0, peer.run(*command), ""), backend)["fingerprint"]

        assert live() != done["fingerprint"]  # a rule in a chain of ours
        peer.run(f"iptables-{backend}", "-D", "CTSYNC-INPUT", "-i", "never", "-j", "DROP")
        assert live() == done["fingerprint"]  # neither counters nor rules of others
        peer.run(f"iptables-{backend}", "-P", "FORWARD", "ACCEPT")
        assert live() != done["fingerprint"]
        peer.run(f"iptables-{backend}", "-P", "FORWARD", "DROP")
        peer.run(f"iptables-{backend}", "-t", "nat", "-F", "CTSYNC-POSTROUTING")
        peer.run(
            f"iptables-{backend}", "-t", "nat", "-A", "CTSYNC-POSTROUTING", "-s", "192.168.0.3", "-j", "MASQUERADE"
        )
        assert live() != done["fingerprint"]  # another NAT pool
    machine.run("rm", FILES[-1])
    repaired = machine.module("ruleset", backend=backend, **FULL)
    assert repaired["changed"]
    assert files(machine) == FILES


def test_facts_read_the_same_fingerprint_and_the_counters(machine, backend):
    done = machine.module("ruleset", backend=backend, **FULL)
    machine.run("ip", "link", "set", "lo", "up")
    machine.run("ip", "address", "add", "10.9.8.100/32", "dev", "lo")
    machine.run("python3", "-c", _CONNECT, "10.9.8.100", "5555")

    def inside(command):
        return 0, machine.run(*command), ""

    facts = _ruleset.read_live(inside, backend)
    assert facts["fingerprint"] == done["fingerprint"]
    assert facts["policies"]["FORWARD"]["policy"] == "DROP"
    stray = facts["chains"]["filter"]["CTSYNC-VIP"]["rules"][-1]
    assert "ctsync stray" in stray["rule"]
    assert stray["packets"] > 0


TYPED = {
    "forward_policy": "DROP",
    "address_sets": {
        "office": ["10.9.0.0/16", "!10.9.1.0/24", "fd00:9::/64"],
        "more": ["@office", "10.8.0.1-10.8.0.6"],
    },
    "filter_rules": [
        {"action": "accept", "ctstate": ["ESTABLISHED", "RELATED"], "in_interfaces": "eth0"},
        {
            "action": "accept",
            "comment": "web and more",
            "protocols": ["tcp", "udp", "sctp"],
            "sources": ["@more", "!10.9.0.66", "!fd00:9::66"],
            "destinations": ["!10.7.0.0/16"],
            "destination_ports": [80, 443, "8000-8010"],
            "in_interfaces": ["eth1", "wg+"],
        },
        {"action": "accept", "protocols": "icmp", "icmp_types": ["echo-request"], "limit": "50/second"},
        {"action": "log", "log_prefix": "a b", "ctstate": "INVALID"},
        {"action": "reject", "protocols": "tcp", "reject_with": "tcp-reset", "out_interfaces": "!eth0", "syn": True},
        {"action": "accept", "chain": "INPUT", "protocols": ["esp", "gre", 88], "source_ports": []},
    ],
    "nat_rules": [
        {"action": "accept", "chain": "POSTROUTING", "destinations": ["10.6.0.0/16"]},
        {
            "action": "snat",
            "out_interfaces": "eth0",
            "sources": ["@office", "!10.9.0.66"],
            "protocols": ["tcp", "udp"],
            "to_source": "192.0.2.1-192.0.2.4",
            "to_ports": "1024-65535",
            "persistent": True,
        },
        {
            "action": "snat",
            "sources": "fd00:9::/64",
            "protocols": "tcp",
            "to_source": "fd00::1",
            "to_ports": "1024-65535",
        },
        {"action": "masquerade", "out_interfaces": "eth3", "protocols": "udp", "to_ports": "4000-5000"},
        {
            "action": "dnat",
            "protocols": "tcp",
            "destinations": "fd00::1",
            "destination_ports": 80,
            "to_destination": "fd00::2",
        },
        {"action": "redirect", "protocols": "tcp", "destination_ports": 3128, "to_ports": 3129},
    ],
}


def test_typed_rules_beside_verbatim_ones(machine, backend):
    verbatim = ["-A FORWARD -i last -j DROP", "-I FORWARD -i first -j DROP"]
    done = machine.module("ruleset", backend=backend, rules=verbatim, **TYPED)
    assert done.get("changed"), done.get("msg")
    for family in ("ipv4", "ipv6"):
        chain = done["chains"][family]["filter"]["CTSYNC-FORWARD"]
        assert "RELATED,ESTABLISHED -j ACCEPT" in chain[0]
        assert "-A CTSYNC-FORWARD -m limit --limit 50/sec" not in chain  # the match for ICMP is there, too
        assert ":FORWARD DROP [0:0]" in saved(machine, backend, family)
    chain = done["chains"]["ipv4"]["filter"]["CTSYNC-FORWARD"]
    assert chain[-2:] == ["-A CTSYNC-FORWARD -i first -j DROP", "-A CTSYNC-FORWARD -i last -j DROP"]
    assert done["chains"]["ipv4"]["filter"]["CTSYNC-FILTER-2"] == [
        "-A CTSYNC-FILTER-2 -s 10.9.0.66/32 -j RETURN",
        "-A CTSYNC-FILTER-2 -d 10.7.0.0/16 -j RETURN",
        "-A CTSYNC-FILTER-2 -j ACCEPT",
    ]
    assert done["chains"]["ipv6"]["nat"]["CTSYNC-POSTROUTING"] == [
        "-A CTSYNC-POSTROUTING -s fd00:9::/64 -p tcp -j SNAT --to-source [fd00::1]:1024-65535"
    ]
    again = machine.module("ruleset", backend=backend, rules=verbatim, **TYPED)
    assert not again["changed"]
    wrong = {"filter_rules": [*TYPED["filter_rules"], {"action": "reject", "reject_with": "a-smile"}]}
    refused = machine.module("ruleset", backend=backend, rules=verbatim, **{**TYPED, **wrong})
    assert refused["msg"].startswith("filter_rules: rule 7 'action: reject; reject_with: a-smile': refused by iptables")
    refused = machine.module("ruleset", backend=backend, rules=["-P FORWARD DROP"], **TYPED)
    assert "forward_policy: DROP and rules: rule 1 '-P FORWARD DROP' say it twice" in refused["msg"]
    assert machine.module("ruleset", backend=backend, state="absent")["changed"]
    assert not [line for line in saved(machine, backend) if "CTSYNC" in line or " DROP " in line]


def test_exclusions_in_typed_rules_hold_for_real_packets(machine, backend):
    machine.run("ip", "link", "set", "lo", "up")
    for address in ("10.9.0.1", "10.9.0.2", "10.9.0.3"):
        machine.run("ip", "address", "add", f"{address}/32", "dev", "lo")
    rule = {"action": "drop", "chain": "INPUT", "protocols": "tcp", "destination_ports": "5000-6000"}
    rule["destinations"] = ["10.9.0.0/24", "!10.9.0.2"]
    machine.module("ruleset", backend=backend, filter_rules=[rule])

    def knock(address, port):
        return machine.run("python3", "-c", _CONNECT, address, port).strip()

    assert knock("10.9.0.1", "5555") == "silence"
    assert knock("10.9.0.2", "5555") == "reset"
    assert knock("10.9.0.3", "4999") == "reset"


_CONNECT = """
import socket, sys
sock = socket.socket()
sock.settimeout(1.5)
try:
    sock.connect((sys.argv[1], int(sys.argv[2])))
    print("connected")
except ConnectionRefusedError:
    print("reset")
except TimeoutError:
    print("silence")
"""


def test_a_stray_to_a_virtual_address_gets_silence_and_without_the_drop_a_reset(machine, backend):
    machine.run("ip", "link", "set", "lo", "up")
    for address in ("10.9.8.100/32", "10.9.8.1/32"):
        machine.run("ip", "address", "add", address, "dev", "lo")

    def knock(address, port):
        return machine.run("python3", "-c", _CONNECT, address, port).strip()

    def resets():
        facts = _ruleset.read_live(lambda command: (0, machine.run(*command), ""), backend)
        return facts["chains"]["filter"]["CTSYNC-OUTPUT"]["rules"][0]["packets"]

    machine.module("ruleset", backend=backend, **FULL)
    assert knock("10.9.8.100", "5555") == "silence"
    assert resets() == 0
    assert knock("10.9.8.100", "22") == "reset"  # a declared service, nobody listens
    assert knock("10.9.8.1", "5555") == "reset"  # not a virtual address: none of our business
    assert resets() == 2
    machine.module("ruleset", backend=backend, **{**FULL, "protect_vips": False})
    assert knock("10.9.8.100", "5555") == "reset"
    assert resets() == 3  # an unchanged chain keeps its counters


def test_what_others_changed_is_repaired_and_their_rules_are_kept(machine, backend):
    iptables = f"iptables-{backend}"
    done = machine.module("ruleset", backend=backend, **FULL)
    machine.run(iptables, "-I", "FORWARD", "-i", "foreign", "-j", "ACCEPT")
    machine.run(iptables, "-A", "CTSYNC-FORWARD", "-j", "ACCEPT")
    machine.run(iptables, "-t", "nat", "-F", "POSTROUTING")
    machine.run(iptables, "-P", "FORWARD", "ACCEPT")
    machine.run(iptables, "-N", "CTSYNC-LEFT")
    machine.run("rm", "/etc/ctsync/ruleset.v4")
    repaired = machine.module("ruleset", backend=backend, take_over_forward_policy=True, **FULL)
    assert repaired["changed"]
    assert repaired["fingerprint"] == done["fingerprint"]
    rules = saved(machine, backend)
    assert ":FORWARD DROP [0:0]" in rules
    assert ":CTSYNC-LEFT - [0:0]" not in rules
    forward = [line for line in rules if line.startswith("-A FORWARD")]
    assert forward[1] == "-A FORWARD -i foreign -j ACCEPT"
    assert forward[0].endswith("-j CTSYNC-FORWARD")
    assert not machine.module("ruleset", backend=backend, **FULL)["changed"]
    last = machine.module("ruleset", backend=backend, position="last", **FULL)
    assert last["changed"]
    forward = [line for line in saved(machine, backend) if line.startswith("-A FORWARD")]
    assert forward[0] == "-A FORWARD -i foreign -j ACCEPT"


def test_foreign_forwarding_is_not_cut_unless_told_to(machine, backend):
    machine.run("sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
    machine.run(f"iptables-{backend}", "-N", "DOCKER-USER")
    machine.run(f"iptables-{backend}", "-A", "FORWARD", "-j", "DOCKER-USER")
    before = saved(machine, backend)
    for check, options in ((True, {}), (False, {}), (False, {"validate_only": True})):
        refused = machine.module("ruleset", backend=backend, check=check, rules=PAGE, **options)
        assert refused["failed"]
        assert "take_over_forward_policy: true" in refused["msg"]
        assert "-A FORWARD -j DOCKER-USER" in refused["msg"]
    assert saved(machine, backend) == before
    assert files(machine) == []
    assert machine.module("ruleset", backend=backend, rules=PAGE[1:])["changed"]
    assert machine.module("ruleset", backend=backend, rules=PAGE, take_over_forward_policy=True)["changed"]
    assert ":FORWARD DROP [0:0]" in saved(machine, backend)
    assert not machine.module("ruleset", backend=backend, rules=PAGE)["changed"]
    machine.module("ruleset", backend=backend, rules=PAGE[1:])  # the policy is no longer wanted
    assert ":FORWARD ACCEPT [0:0]" in saved(machine, backend)


def test_rules_of_others_that_do_nothing_yet_are_judged_as_they_will_be(machine, backend):
    """Forwarding is off, and the deployment turns it on: the preflight says what that means."""
    machine.run("sh", "-c", "echo 0 > /proc/sys/net/ipv4/ip_forward")
    machine.run(f"iptables-{backend}", "-A", "FORWARD", "-i", "leftover", "-j", "ACCEPT")
    preflight = {"backend": backend, "validate_only": True, "will_forward": ["ipv4", "ipv6"]}
    refused = machine.module("ruleset", rules=PAGE, **preflight)
    assert refused["failed"]
    assert "with 1 other rule(s) in FORWARD of the ipv4 table filter, the first is" in refused["msg"]
    assert "'-A FORWARD -i leftover -j ACCEPT'" in refused["msg"]
    assert "kernel_forward_ipv4" in refused["msg"]
    assert "take_over_forward_policy: true" in refused["msg"]

    def warnings(**options):
        done = machine.module("ruleset", **{**preflight, **options})
        assert not done.get("failed"), done
        said = [entry if isinstance(entry, str) else entry["event"]["msg"] for entry in done.get("warnings", [])]
        return [text for text in said if "does not forward" in text]

    (said,) = warnings(rules=PAGE[1:])
    assert said.startswith(
        "The machine does not forward ipv4 yet, and the deployment turns it on (kernel_forward_ipv4)."
    )
    assert said.endswith("What no rule decides will be forwarded.")
    (said,) = warnings(rules=PAGE, take_over_forward_policy=True)
    assert said.endswith("What no rule decides will be dropped.")
    assert warnings(rules=PAGE[1:], will_forward=["ipv6"]) == []
    assert warnings(rules=PAGE, will_forward=[]) == []  # nobody will turn it on: as before
    machine.run(f"iptables-{backend}", "-F", "FORWARD")
    assert warnings(rules=PAGE) == []
    # what the preflight keeps from happening: refused only when the kernel has been changed already
    machine.run(f"iptables-{backend}", "-A", "FORWARD", "-i", "leftover", "-j", "ACCEPT")
    machine.run("sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
    assert "would cut forwarding" in machine.module("ruleset", backend=backend, rules=PAGE)["msg"]


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("-A FORWARD -m nobody-knows -j DROP", "Couldn't load match"),
        ("-A FORWARD -p tcp --dport 99999 -j DROP", "99999"),
        ("-A FORWARD -p tcp -j NOWHERE", "NOWHERE"),
        ("-A FORWARD -p tcp -j SNAT --to 192.168.1.100", ""),
    ],
)
@pytest.mark.parametrize("validate_only", [True, False])
def test_a_rule_that_iptables_refuses_is_named_before_any_change(machine, backend, rule, words, validate_only):
    before = saved(machine, backend)
    refused = machine.module("ruleset", backend=backend, rules=[*PAGE, rule, PAGE[1]], validate_only=validate_only)
    assert refused["failed"]
    assert refused["msg"].startswith(f"rules: rule 7 '{rule}': refused by iptables")
    assert words in refused["msg"]
    assert refused["msg"].endswith("Nothing was changed.")
    assert saved(machine, backend) == before
    assert files(machine) == []


def test_validation_changes_nothing(machine, backend):
    result = machine.module("ruleset", backend=backend, validate_only=True, **FULL)
    assert not result["changed"]
    assert result["validated_by"] == "kernel"
    assert not [line for line in saved(machine, backend) if "CTSYNC" in line]
    assert files(machine) == []


def test_boot_restores_the_rules_and_starting_the_unit_twice_is_harmless(machine, backend):
    done = machine.module("ruleset", backend=backend, **FULL)
    unit = machine.run("cat", UNIT).splitlines()
    machine.run("rm", "-r", "/run/ctsync")
    for family in ("", "6"):
        for table in ("filter", "nat", "raw"):
            machine.run(f"ip{family}tables-{backend}", "-t", table, "-F")
            machine.run(f"ip{family}tables-{backend}", "-t", table, "-X")
    machine.run(f"iptables-{backend}", "-P", "FORWARD", "ACCEPT")
    for _start in range(2):
        for line in unit:
            key, _equals, command = line.partition("=")
            if key in ("ExecStartPre", "ExecStart", "ExecStartPost"):
                machine.run(*shlex.split(command.lstrip("-").replace("$$", "$")), check=not command.startswith("-"))
    again = machine.module("ruleset", backend=backend, **FULL)
    assert not again["changed"]
    assert again["fingerprint"] == done["fingerprint"]
    assert ":FORWARD DROP [0:0]" in saved(machine, backend)
    verify = subprocess.run(["systemd-analyze", "--version"], capture_output=True, check=False)
    if verify.returncode == 0:
        said = machine.run("sh", "-c", f"systemd-analyze verify {UNIT} 2>&1", check=False)
        assert "ctsync-ruleset" not in said


def test_rules_that_cannot_be_restored_at_boot_leave_nothing_forwarded(machine, backend):
    """The restore fails half-way, for a set that is missing at boot, say; the policy is there nevertheless."""
    rule = {"action": "accept", "ctstate": ["ESTABLISHED"]}
    assert machine.module("ruleset", backend=backend, forward_policy="DROP", filter_rules=[rule])["changed"]
    unit = machine.run("cat", UNIT).splitlines()
    for family in ("", "6"):
        machine.run(f"ip{family}tables-{backend}", "-P", "FORWARD", "ACCEPT")
        machine.run(f"ip{family}tables-{backend}", "-t", "filter", "-F")
        machine.run(f"ip{family}tables-{backend}", "-t", "filter", "-X")
    machine.run("sh", "-c", "echo '-A CTSYNC-FORWARD -m set --match-set gone src -j ACCEPT' > /etc/ctsync/ruleset.v4")
    failed = []
    for line in unit:
        key, _equals, command = line.partition("=")
        if key in ("ExecStartPre", "ExecStart"):
            words = shlex.split(command.lstrip("-").replace("$$", "$"))
            rc = machine.run("sh", "-c", f"{shlex.join(words)} >/dev/null 2>&1; echo $?").strip()
            if rc != "0" and not command.startswith("-"):
                failed.append(key)
                break  # systemd does not go on either
    assert failed == ["ExecStart"]
    for family in ("ipv4", "ipv6"):
        held = saved(machine, backend, family)
        assert any(line.startswith(":FORWARD DROP") for line in held), held
        assert not any("CTSYNC-FORWARD" in line for line in held if line.startswith("-A"))


def test_a_failure_in_the_second_family_takes_the_first_back(machine, backend):
    """A program that fails at the real restore of IPv6 only: the IPv4 rules, applied before, go away again."""
    machine.module("ruleset", backend=backend, rules=PAGE[1:3])
    before = saved(machine, backend)
    real = shutil.which(f"ip6tables-{backend}-restore")
    name = f"ip6tables-{backend}-restore"
    script = f'#!/bin/sh\ncase "$*" in *--test*|*"-w 10") exec {real} "$@";; esac\n'
    script += 'cat > /dev/null\necho "no memory" >&2\nexit 4\n'
    machine.run("sh", "-c", f"mkdir /mnt/bin; cat > /mnt/bin/{name}; chmod +x /mnt/bin/{name}", text=script)
    path = {"PATH": "/mnt/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
    failed = machine.module("ruleset", backend=backend, env=path, **FULL)
    assert failed["failed"]
    assert "no memory" in failed["msg"]
    assert "The rules of before are in place again." in failed["msg"]
    own = [line for line in saved(machine, backend) if "CTSYNC" in line or "FORWARD" in line]
    assert own == [line for line in before if "CTSYNC" in line or "FORWARD" in line]
    assert machine.module("ruleset", backend=backend, **FULL)["changed"]


def test_ipsets_and_declared_chains_can_be_used(machine, backend):
    rules = [
        "-N web",
        "-A web -p tcp --dport 443 -j ACCEPT",
        "-A FORWARD -i eth1 -j web",
        '-A FORWARD -j LOG --log-prefix "a b"',
    ]
    if shutil.which("ipset"):
        machine.run("ipset", "create", "ctsync-friends", "hash:ip")
        rules.append("-A web -m set --match-set ctsync-friends src -j ACCEPT")
    done = machine.module("ruleset", backend=backend, rules=rules)
    assert done["chains"]["ipv4"]["filter"]["CTSYNC-FORWARD"][0] == "-A CTSYNC-FORWARD -i eth1 -j CTSYNC-web"
    assert '--log-prefix "a b"' in done["chains"]["ipv4"]["filter"]["CTSYNC-FORWARD"][1]
    assert not machine.module("ruleset", backend=backend, rules=rules)["changed"]
    fewer = machine.module("ruleset", backend=backend, rules=rules[3:4])
    assert "CTSYNC-web" not in json.dumps(fewer["chains"])
    assert not [line for line in saved(machine, backend) if "web" in line]


def test_without_iptables_only_a_prediction_is_possible(machine):
    path = {"PATH": "/nowhere"}
    hide = "for f in /usr/sbin /usr/local/sbin; do mount -t tmpfs tmpfs $f; done"
    machine.run("sh", "-ec", hide)
    predicted = machine.module("ruleset", check=True, env=path, rules=PAGE)
    assert predicted["changed"]
    assert predicted["validated_by"] == "syntax"
    assert "-P FORWARD DROP" in predicted["diff"][0]["after"]
    assert not machine.module("ruleset", env=path, rules=PAGE, validate_only=True)["changed"]
    failed = machine.module("ruleset", env=path, rules=PAGE)
    assert "Install the package iptables" in failed["msg"]


# Modelled on what Docker, fail2ban and an operator leave behind; none of them runs here.
FOREIGN = """\
*filter
:INPUT DROP [0:0]
:FORWARD DROP [0:0]
:OUTPUT ACCEPT [0:0]
:DOCKER - [0:0]
:DOCKER-ISOLATION-STAGE-1 - [0:0]
:DOCKER-ISOLATION-STAGE-2 - [0:0]
:DOCKER-USER - [0:0]
:f2b-sshd - [0:0]
-A INPUT -p tcp -m multiport --dports 22 -j f2b-sshd
-A INPUT -i lo -j ACCEPT
-A INPUT -m state --state RELATED,ESTABLISHED -j ACCEPT
-A INPUT -p tcp -m tcp --dport 22 -m comment --comment "the operator's own -j CTSYNC-INPUT" -j ACCEPT
-A FORWARD -j DOCKER-USER
-A FORWARD -j DOCKER-ISOLATION-STAGE-1
-A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A FORWARD -o docker0 -j DOCKER
-A FORWARD -i docker0 ! -o docker0 -j ACCEPT
-A FORWARD -i docker0 -o docker0 -j ACCEPT
-A DOCKER -d 172.17.0.2/32 ! -i docker0 -o docker0 -p tcp -m tcp --dport 80 -j ACCEPT
-A DOCKER-ISOLATION-STAGE-1 -i docker0 ! -o docker0 -j DOCKER-ISOLATION-STAGE-2
-A DOCKER-ISOLATION-STAGE-1 -j RETURN
-A DOCKER-ISOLATION-STAGE-2 -o docker0 -j DROP
-A DOCKER-ISOLATION-STAGE-2 -j RETURN
-A DOCKER-USER -j RETURN
-A f2b-sshd -s 203.0.113.9/32 -j REJECT --reject-with icmp-port-unreachable
-A f2b-sshd -j RETURN
COMMIT
*nat
:PREROUTING ACCEPT [0:0]
:INPUT ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
-A POSTROUTING -s 172.17.0.2/32 -d 172.17.0.2/32 -p tcp -m tcp --dport 80 -j MASQUERADE
-A DOCKER -i docker0 -j RETURN
-A DOCKER ! -i docker0 -p tcp -m tcp --dport 8080 -j DNAT --to-destination 172.17.0.2:80
COMMIT
*raw
:PREROUTING ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
-A PREROUTING -p udp -m udp --dport 5004 -j CT --notrack
COMMIT
"""


def foreign(machine, backend):
    """All that is not ours: chains, policies, rules in their order."""
    lines = [line.split(" [")[0] for line in saved(machine, backend)]
    return [line for line in lines if not (line.startswith((":CTSYNC-", "-A CTSYNC-")) or _ruleset.is_own_jump(line))]


@pytest.mark.parametrize("position", ["first", "last"])
def test_rules_of_docker_fail2ban_and_the_operator_are_left_alone(machine, backend, position):
    machine.run("sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
    machine.run(f"iptables-{backend}-restore", text=FOREIGN)
    before = [line.split(" [")[0] for line in saved(machine, backend)]
    assert sum(line.startswith("-A") for line in before) == sum(line.startswith("-A") for line in FOREIGN.splitlines())
    everything = {**FULL, **{key: TYPED[key] for key in ("address_sets", "filter_rules", "nat_rules")}}

    machine.module("ruleset", backend=backend, position=position, **everything)
    assert any("CTSYNC-POSTROUTING" in line for line in saved(machine, backend))
    assert foreign(machine, backend) == before

    # fail2ban bans and frees, Docker makes its rules anew in front of everybody's
    for command in (
        "-I f2b-sshd 1 -s 198.51.100.7 -j REJECT --reject-with icmp-port-unreachable",
        "-D f2b-sshd -s 203.0.113.9 -j REJECT --reject-with icmp-port-unreachable",
        "-D FORWARD -j DOCKER-USER",
        "-I FORWARD -j DOCKER-USER",
    ):
        machine.run(f"iptables-{backend}", *command.split())
    changed = foreign(machine, backend)
    machine.module("ruleset", backend=backend, position=position, **{**everything, "rules": PAGE[1:]})
    assert foreign(machine, backend) == changed
    assert not machine.module("ruleset", backend=backend, position=position, **{**everything, "rules": PAGE[1:]})[
        "changed"
    ]

    # a change that nobody confirms goes away without touching them, and what they did meanwhile stays
    done = machine.module(
        "ruleset", backend=backend, rollback_timeout=300, rollback_id="0123456789abcdef", rules=PAGE[2:3]
    )
    assert done["rollback"]["outcome"] == "armed", done
    machine.run(f"iptables-{backend}", "-I", "f2b-sshd", "1", "-s", "198.51.100.8", "-j", "DROP")
    machine.module("ruleset", backend=backend, rollback_id="0123456789abcdef", rollback_step="abort", rules=PAGE[2:3])
    now = foreign(machine, backend)
    assert "-A f2b-sshd -s 198.51.100.8/32 -j DROP" in now
    assert [line for line in now if "198.51.100.8" not in line] == changed
    assert any("CTSYNC-POSTROUTING" in line for line in saved(machine, backend))

    gone = machine.module("ruleset", backend=backend, state="absent")
    assert gone["changed"]
    assert [line.split(" [")[0] for line in saved(machine, backend)] == now
    assert files(machine) == []
