# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Three firewalls by the playbooks: handed over from the first to the second to the third, and given another key.

A dry run (``--check``) must change nothing.  An SSH session counts aloud
all the time, and not a line of it may be missing.
"""

from __future__ import annotations

import base64
import json
import os
import pathlib
import re
import subprocess
import time

import pytest
import testinfra

ROOT = pathlib.Path(os.environ["MOLECULE_PROJECT_DIRECTORY"])
LOOK = ROOT / "molecule/default/files/look.sh"
PREFIX = os.environ["CTSYNC_LAB_PREFIX"]
FIREWALLS = ("fw1", "fw2", "fw3")
DEADLINE = 60  # seconds; generous, it is a condition that is waited for
NEW_KEY = base64.b64encode(os.urandom(32)).decode()


def node(name):
    return testinfra.get_host(f"docker://{PREFIX}{name}")


def play(name, variables=None, *, options=(), succeeds=True):
    """Run a playbook of the collection as a user would; its output."""
    done = subprocess.run(
        [
            "ansible-playbook",
            *("--inventory", str(ROOT / "inventories/lab/hosts.yml")),
            *("--inventory", str(ROOT / "inventories/lab3/hosts.yml")),
            *("--extra-vars", json.dumps(variables or {})),
            *options,
            f"ctsync.ha_firewall.{name}",
        ],
        env={
            **os.environ,
            "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
            "ANSIBLE_COLLECTIONS_PATH": f"{ROOT / 'collections'}:{ROOT / '.vendor'}",
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


def changes(said):
    """What Ansible counts of each firewall."""
    return {name: int(count) for name, count in re.findall(r"(?m)^(fw\d) .* changed=(\d+) ", said)}


NOTHING = dict.fromkeys(FIREWALLS, 0)


def traces(name):
    """What no dry run may touch: files, packages, rules, sysctls, addresses, processes.

    Left out is what the nodes write by themselves: the counters of chains, and the flight recorder's stories, the
    last of which is written ten seconds after a daemon was started.
    """
    found = node(name).check_output("sh -c %s", LOOK.read_text(encoding="utf-8")).splitlines()
    units = node(name).check_output("systemctl show -P MainPID,ActiveState,UnitFileState ctsyncd keepalived")
    own = re.compile(r":|/var/lib/ctsyncd/\S+\.jsonl ")
    return {*(line for line in found if not own.match(line)), *units.splitlines()}


def all_traces():
    return {name: traces(name) for name in FIREWALLS}


def status(name):
    said = node(name).run("ctsyncd status --json").stdout
    return json.loads(said) if said else {}


def roles():
    return {name: status(name).get("role") for name in FIREWALLS}


def all_ready():
    deadline = time.monotonic() + DEADLINE
    while any(status(name).get("verdict") != "READY" for name in FIREWALLS):
        assert time.monotonic() < deadline, [status(name) for name in FIREWALLS]
        time.sleep(0.5)


def lines():
    return node("a").file("/root/three.log").content_string.splitlines()


@pytest.fixture(scope="module")
def session():
    """A session that counts aloud, from a to b, for as long as this module takes."""
    all_ready()
    node("a").check_output(
        "systemd-run --collect --unit=three --property=StandardOutput=truncate:/root/three.log"
        " ssh -oServerAliveInterval=1 -oServerAliveCountMax=10 b"
        " 'n=0; while sleep 0.1; do echo $n; n=$((n + 1)); done'"
    )
    deadline = time.monotonic() + DEADLINE
    while len(lines()) < 10:
        assert time.monotonic() < deadline, "the session does not begin"
        time.sleep(0.2)
    yield
    node("a").run("systemctl stop three")


@pytest.fixture(autouse=True)
def goes_on(session):
    """The session is the same afterwards: it counts on, and not a line is missing."""
    before = len(lines())
    yield
    assert node("a").check_output("systemctl is-active three") == "active"
    said = lines()
    assert len(said) > before
    assert said == [str(number) for number in range(len(said))]


def test_one_is_active_and_all_are_ready():
    assert sorted(roles().values()) == ["active", "backup", "backup"]
    said = play("status")
    for name in FIREWALLS:
        assert re.search(rf"- {name} .*READY", said), said
    active = next(name for name, role in roles().items() if role == "active")
    result = json.loads(node(active).check_output("ctsyncd verify --json"))
    assert {one["backup"]: one["equal"] for one in result["backups"]} == dict.fromkeys(set(FIREWALLS) - {active}, True)


def test_status_fails_when_a_node_is_missing_unless_it_shall_only_tell():
    standby = next(name for name, role in roles().items() if role == "backup")
    node(standby).check_output("systemctl stop ctsyncd")
    try:
        failed = " ".join(play("status", succeeds=False).split())
        assert re.search(r"The pair is (DEGRADED|NOT READY): ", failed), failed
        told = play("status", {"status_fail": False})
        assert re.search(rf"- {standby} ", told), told
        assert "The pair is" not in told
        assert changes(told) == NOTHING
    finally:
        node(standby).check_output("systemctl start ctsyncd")
    all_ready()
    assert changes(play("status")) == NOTHING


@pytest.mark.parametrize(
    ("name", "variables", "says"),
    [
        ("switchover", {}, "would hand the virtual IPs over to"),
        ("rotate_key", {"ha_firewall_key": NEW_KEY, "ha_firewall_key_id": 2}, "accepts 1 and 2, sends with 1"),
        ("uninstall", {}, "PLAY RECAP"),
    ],
    ids=["switchover", "rotate_key", "uninstall"],
)
def test_a_dry_run_touches_nothing(name, variables, says):
    all_ready()
    before, was = all_traces(), roles()
    said = play(name, variables, options=["--check", "--diff"])
    assert says in said, said[-3000:]
    if name in ("rotate_key", "uninstall"):
        assert min(changes(said)[each] for each in FIREWALLS) > 0, "it says what would be changed"
    assert {name: found ^ before[name] for name, found in all_traces().items() if found != before[name]} == {}
    assert roles() == was
    all_ready()


@pytest.mark.parametrize("turn", [1, 2, 3])
def test_the_session_is_handed_over_to_the_next(turn):
    active = next(name for name, role in roles().items() if role == "active")
    heir = FIREWALLS[(FIREWALLS.index(active) + 1) % len(FIREWALLS)]
    said = play("switchover", {"switchover_to": heir})
    all_ready()
    assert roles() == {name: "active" if name == heir else "backup" for name in FIREWALLS}
    assert re.search(r"- ([1-9]\d*) of \1 established TCP sessions kept", said), said


def test_another_key_for_three_without_a_gap():
    def runs(name):
        return node(name).check_output("systemctl show -P MainPID ctsyncd"), status(name)["counters"]["sessions"]

    before = {name: runs(name) for name in FIREWALLS}
    active = next(name for name, role in roles().items() if role == "active")
    one, two = (name for name in FIREWALLS if name != active)
    said = play("rotate_key", {"ha_firewall_key": NEW_KEY, "ha_firewall_key_id": 2})
    assert re.findall(r"msg: (fw\d accepts .*)", said) == [
        f"{one} accepts 1 and 2, sends with 1",
        f"{two} accepts 1 and 2, sends with 1",
        f"{active} accepts 1 and 2, sends with 2",
        f"{one} accepts 1 and 2, sends with 2",
        f"{two} accepts 2, sends with 2",
        f"{active} accepts 2, sends with 2",
        f"{one} accepts 2, sends with 2",
    ]
    for name in FIREWALLS:
        found = status(name)
        assert (found["verdict"], found["keys"]) == ("READY", {"accepts": [2], "sends": 2})
        assert [peer["keys"]["sends"] for peer in found["peers"]] == [2, 2]
        assert runs(name) == before[name]  # neither a daemon nor a session between two of them began anew
        assert node(name).check_output("ls /etc/ctsyncd/keys") == "2.key"
        assert NEW_KEY not in node(name).check_output("journalctl --no-pager")
