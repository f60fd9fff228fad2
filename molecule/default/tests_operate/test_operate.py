# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A live pair is upgraded, gets another key, is removed and made from conntrackd, by the playbooks for that.

The session that was open when the power was cut is still open, and must be until the removal.
"""

from __future__ import annotations

import base64
import json
import os
import pathlib
import re
import shutil
import subprocess
import time

import pytest
import testinfra

ROOT = pathlib.Path(os.environ["MOLECULE_PROJECT_DIRECTORY"])
COLLECTIONS = ROOT / os.environ["CTSYNC_COLLECTIONS"]
EPHEMERAL = pathlib.Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"])
PREFIX = os.environ["CTSYNC_LAB_PREFIX"]
LOOK = pathlib.Path(__file__).parents[1] / "files" / "look.sh"
FIREWALLS = ("fw1", "fw2")
NEXT = "99.0.0"
DEADLINE = 60  # seconds; generous, it is a condition that is waited for
NEW_KEY = base64.b64encode(os.urandom(32)).decode()


def node(name):
    return testinfra.get_host(f"docker://{PREFIX}{name}")


def play(name, variables=None, collections=None, options=(), succeeds=True):
    """Run a playbook of the collection on the molecule lab as a user would; its output."""
    done = subprocess.run(
        [
            "ansible-playbook",
            "--inventory",
            str(ROOT / "inventories/lab/hosts.yml"),
            "--extra-vars",
            json.dumps(variables or {}),
            *options,
            f"ctsync.ha_firewall.{name}",
        ],
        env={
            **os.environ,
            "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
            "ANSIBLE_COLLECTIONS_PATH": f"{collections or COLLECTIONS}:{ROOT / '.vendor'}",
            "ANSIBLE_FORCE_COLOR": "0",  # molecule forces it
            "ANSIBLE_NOCOLOR": "1",
        },
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert (done.returncode == 0) == succeeds, done.stdout[-6000:] + done.stderr[-2000:]
    assert NEW_KEY not in done.stdout + done.stderr, "the key was printed"
    return done.stdout


def status(name):
    said = node(name).run("ctsyncd status --json").stdout
    return json.loads(said) if said else {}


def runs(name):
    """The daemon's process, and how many sessions it has had."""
    return node(name).check_output("systemctl show -P MainPID ctsyncd"), status(name)["counters"]["sessions"]


def lines():
    return node("a").file("/root/operate.log").content_string.splitlines()


@pytest.fixture(scope="module")
def session():
    """A session that counts aloud, from a to b, for as long as this module takes."""
    play("lab")  # gives power back to the node that lost it
    deadline = time.monotonic() + DEADLINE
    while any(status(name).get("verdict") != "READY" for name in FIREWALLS):
        assert time.monotonic() < deadline, [status(name) for name in FIREWALLS]
        time.sleep(0.5)
    node("a").check_output(
        "systemd-run --collect --unit=operate /bin/sh -c %s",
        "exec ssh -oServerAliveInterval=1 -oServerAliveCountMax=10 b"
        " 'n=0; while sleep 0.1; do echo $n; n=$((n + 1)); done' >/root/operate.log",
    )
    yield
    node("a").run("systemctl stop operate")


@pytest.fixture
def goes_on(session):
    """The session is the same afterwards: it counts on, and not a line is missing."""
    before = len(lines())
    yield
    assert node("a").check_output("systemctl is-active operate") == "active"
    said = lines()
    assert len(said) > before
    assert said == [str(number) for number in range(len(said))]


@pytest.fixture(scope="module")
def next_version(tmp_path_factory):
    """The collection as its next version would be installed."""
    path = tmp_path_factory.mktemp("next")
    target = path / "ansible_collections/ctsync/ha_firewall"
    target.mkdir(parents=True)
    installed = COLLECTIONS / "ansible_collections/ctsync/ha_firewall"
    for name in ("playbooks", "plugins", "roles", "meta"):
        shutil.copytree(installed / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    package = target / "plugins/module_utils/ctsyncd/__init__.py"
    text = package.read_text(encoding="utf-8")
    package.write_text(re.sub('__version__ = ".*"', f'__version__ = "{NEXT}"', text), encoding="utf-8")
    return path


def started(host, unit, what="ActiveEnterTimestampMonotonic"):
    """Microseconds of the machine's clock at which systemd had the unit up, or began to start it."""
    found = int(host.check_output("systemctl show --property=%s --value %s", what, unit))
    assert found > 0, f"{unit} was never started"
    return found


def test_the_node_that_booted_had_sysctls_and_rules_before_its_network_and_daemons(session):
    failover = json.loads((EPHEMERAL / "failover.json").read_text(encoding="utf-8"))
    host = node(failover["was_active"])
    assert host.sysctl("net.netfilter.nf_conntrack_events") == 1
    assert host.sysctl("net.ipv4.ip_forward") == 1
    assert "CTSYNC-POSTROUTING -s 192.168.0.3/32" in host.check_output("iptables-save")
    rules = started(host, "ctsync-ruleset")
    assert rules < started(host, "network-pre.target")
    for daemon in ("ctsyncd", "keepalived"):
        assert rules < started(host, daemon, "ExecMainStartTimestampMonotonic")


def sides():
    """The standby and the active node."""
    return sorted(FIREWALLS, key=lambda name: status(name)["role"] == "active")


def wait_for_verdict(name, ready):
    """Until the daemon of the node says READY, or something else."""
    deadline = time.monotonic() + DEADLINE
    while (status(name).get("verdict") == "READY") != ready:
        assert time.monotonic() < deadline, status(name)
        time.sleep(0.5)


def wait_for_equal_tables():
    """Until ``ctsyncd verify`` says so on both nodes."""
    deadline = time.monotonic() + DEADLINE
    for name in FIREWALLS:
        while (said := node(name).run("ctsyncd verify")).rc != 0:
            assert time.monotonic() < deadline, f"{name}: {said.stdout}{said.stderr}"
            time.sleep(0.5)


def test_nothing_touches_the_active_node_while_the_other_cannot_take_over(goes_on):
    standby, active = sides()
    key = "net.ipv4.conf.all.send_redirects"
    before = {name: node(name).sysctl(key) for name in FIREWALLS}
    changed = {"kernel_extra_sysctls": [{"name": key, "value": str(1 - before[active])}]}
    wait_for_verdict(standby, ready=True)  # it may have booted a moment ago
    node(standby).check_output("ip link set eth2 down")
    try:
        wait_for_verdict(standby, ready=False)
        # only the sysctls: with all of it the standby's own gate would stop it first
        said = play("site", changed, options=["--tags", "kernel"], succeeds=False)
        assert f"{standby} cannot take over (DEGRADED: {active} is silent for " in " ".join(said.split())
        assert f"so the active node {active} is left as it is" in " ".join(said.split())
        assert node(active).sysctl(key) == before[active]
        assert node(standby).sysctl(key) == 1 - before[standby], "the standby goes first"
        said = play("switchover", succeeds=False)
        assert "Nothing was done, because the pair is not fit for a hand-over" in " ".join(said.split())
        assert status(active)["role"] == "active"
    finally:
        node(standby).check_output("ip link set eth2 up")
    for name in FIREWALLS:
        wait_for_verdict(name, ready=True)
    play("site", changed, options=["--tags", "kernel"])
    assert node(active).sysctl(key) == 1 - before[active], "with a standby that is READY it is changed"
    play("site", options=["--tags", "kernel"])
    assert {name: node(name).sysctl(key) for name in FIREWALLS} == before, "left out, it is as it was"


def test_the_active_node_alone_is_changed_when_that_is_said(goes_on):
    """The other is not to be had: what is needed of its addresses is in the rules of the one that lives."""
    standby, active = sides()
    key = "net.ipv4.conf.all.send_redirects"
    before = node(active).sysctl(key)
    changed = {"kernel_extra_sysctls": [{"name": key, "value": str(1 - before)}]}
    alone = {"preflight_without_standby": True}
    node(standby).check_output("systemctl stop ctsyncd")
    try:
        wait_for_verdict(active, ready=False)
        half = {**changed, "preflight_whole_group": False}
        said = " ".join(play("site", half, options=["--limit", active], succeeds=False).split())
        assert f"--limit {active} -e preflight_without_standby=true; a mistake is an outage then" in said
        assert node(active).sysctl(key) == before
        said = play("site", {**changed, **alone}, options=["--limit", active])  # all roles
        assert f"The active node {active} is changed nevertheless" in " ".join(said.split())
        assert re.search(rf"{active} +: ok=\d+ +changed=1 ", said), "the sysctl, and nothing else"
        assert node(active).sysctl(key) == 1 - before
        play("site", alone, options=["--limit", active, "--tags", "kernel"])
        assert node(active).sysctl(key) == before
    finally:
        node(standby).check_output("systemctl start ctsyncd")
    for name in FIREWALLS:
        wait_for_verdict(name, ready=True)


def test_a_rule_that_is_removed_by_hand_shows_until_it_is_put_back(goes_on):
    standby, _active = sides()
    host = node(standby)
    rule = host.check_output("iptables -S CTSYNC-FORWARD 1")
    host.check_output("iptables -D CTSYNC-FORWARD 1")
    deadline = time.monotonic() + 3 * DEADLINE  # the node looks every minute
    while "are not those that were applied" not in " ".join(status(standby).get("reasons", [])):
        assert time.monotonic() < deadline, status(standby)
        time.sleep(0.5)
    assert status(standby)["verdict"] == "NOT READY"
    said = play("site", options=["--check", "--diff", "--tags", "ruleset"])
    assert f"+{rule}\n" in said, "the diff shows what is missing"
    assert rule not in host.check_output("iptables -S CTSYNC-FORWARD")
    host.check_output(rule.replace("-A CTSYNC-FORWARD", "iptables -I CTSYNC-FORWARD 1"))
    host.check_output("systemctl start ctsync-ruleset-watch.service")
    for name in FIREWALLS:
        wait_for_verdict(name, ready=True)


def test_a_planned_hand_over_keeps_the_session_and_is_not_repeated(goes_on):
    standby, active = sides()
    said = play("switchover", {"switchover_to": standby})
    assert re.search(r"- ([1-9]\d*) of \1 established TCP sessions kept", said)
    assert sides() == [active, standby]
    said = play("switchover", {"switchover_to": standby})
    assert f"{standby} is active already - nothing was done" in said
    assert sides() == [active, standby]
    wait_for_equal_tables()


def test_upgrade_hands_over_and_keeps_the_session(goes_on, next_version):
    was = {name: status(name)["version"] for name in FIREWALLS}
    assert NEXT not in was.values()
    said = play("upgrade", collections=next_version)
    now = {name: status(name) for name in FIREWALLS}
    assert {name: (found["version"], found["verdict"]) for name, found in now.items()} == dict.fromkeys(
        FIREWALLS, (NEXT, "READY")
    )
    assert re.search(r"- ([1-9]\d*) of \1 established TCP sessions kept", said)
    assert re.search(r"neither node answered for the virtual IPs for \d+ ms", said)
    wait_for_equal_tables()


def test_another_key_without_a_gap(goes_on, next_version):
    standby, active = sorted(FIREWALLS, key=lambda name: status(name)["role"] == "active")
    before = {name: runs(name) for name in FIREWALLS}
    old_key = node(active).check_output("cat /etc/ctsyncd/keys/1.key").strip()
    said = play("rotate_key", {"ha_firewall_key": NEW_KEY, "ha_firewall_key_id": 2}, next_version)
    assert re.findall(r"msg: (fw\d accepts .*)", said) == [
        f"{standby} accepts 1 and 2, sends with 1",
        f"{active} accepts 1 and 2, sends with 2",
        f"{standby} accepts 2, sends with 2",
        f"{active} accepts 2, sends with 2",
    ]
    for name in FIREWALLS:
        assert node(name).check_output("ls /etc/ctsyncd/keys") == "2.key"
        assert status(name)["verdict"] == "READY"
        assert status(name)["keys"] == {"accepts": [2], "sends": 2}
        assert runs(name) == before[name]  # neither the daemon nor the session with the other one began anew
        journal = node(name).check_output("journalctl --no-pager")
        # Ansible logs there what each module is called with.
        assert re.search(r"ansible-\S*ctsyncd\[\d+\]: Invoked with", journal)
        assert [key for key in (old_key, NEW_KEY) if key in journal] == [], f"a key is in the journal of {name}"
    wait_for_equal_tables()


def test_uninstall_leaves_the_hosts_as_they_were_found(session):
    node("a").run("systemctl stop operate")
    play("uninstall", {"uninstall_confirm": True, "uninstall_packages": True})
    for name in FIREWALLS:
        found = node(name).check_output("sh -c %s", LOOK.read_text(encoding="utf-8")).splitlines()
        before = (EPHEMERAL / f"bare-{name}.txt").read_text(encoding="utf-8").splitlines()
        assert sorted(set(found) ^ set(before)) == []


CONNTRACKD = """\
[Unit]
Description=conntrackd, asleep
[Service]
ExecStart=/usr/local/sbin/conntrackd infinity
[Install]
WantedBy=multi-user.target
"""


def test_a_conntrackd_that_is_active_is_replaced_and_never_runs_beside_ctsyncd():
    """On the machines that are bare again. What counts is a process and a unit of that name: it only sleeps."""
    for name in FIREWALLS:
        node(name).check_output("cp /bin/sleep /usr/local/sbin/conntrackd")
        node(name).check_output("printf %s > /etc/systemd/system/conntrackd.service", CONNTRACKD)
        node(name).check_output("systemctl daemon-reload && systemctl enable --now conntrackd")

    play("site", {"migrate": True}, options=["--check", "--diff"])
    for name in FIREWALLS:
        assert node(name).check_output("systemctl is-active conntrackd") == "active"
        assert not node(name).file("/usr/sbin/ctsyncd").exists

    play("site", {"migrate": True})
    for name in FIREWALLS:
        assert node(name).run("systemctl is-active conntrackd").stdout.strip() == "inactive"
        assert node(name).run("systemctl is-enabled conntrackd").stdout.strip() == "disabled"
        assert node(name).run("pidof conntrackd").rc != 0
        told = node(name).check_output("journalctl --no-pager --boot --unit=conntrackd --unit=ctsyncd --output=cat")
        told = told.splitlines()
        stopped = [number for number, line in enumerate(told) if line.startswith("Stopped ") and "asleep" in line]
        starting = [number for number, line in enumerate(told) if re.match("Starting .*state replication", line)]
        assert stopped and starting, told
        assert stopped[-1] < starting[-1], told
        assert status(name)["verdict"] == "READY"
    again = play("site")  # there is nothing left to be refused or done
    assert len(re.findall(r"(?m)^fw\d .* changed=0 ", again)) == len(FIREWALLS), again[-2000:]
