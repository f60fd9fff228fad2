# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A rule that somebody adds or removes by hand shows: the watch as its unit starts it, against the real kernel."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess

import pytest
from ansible_collections.ctsync.ha_firewall.plugins.module_utils import _rollback, _ruleset_watch
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import service
from integration.netns import wait_for
from integration.test_ruleset import FOREIGN, FULL, PAGE, files

pytestmark = pytest.mark.netns

RUN, STORED = _ruleset_watch.FINGERPRINT_PATH, "/etc/ctsync/ruleset.fingerprint"
DRIFT = "the rules that run here are not those that were applied"


class Watch:
    """Starts the watch of a machine by hand, as systemd would, and knows what the daemon makes of its file."""

    def __init__(self, machine, folder):
        self.machine, self.copy = machine, folder / "fingerprint"

    def command(self):
        unit = self.machine.run("cat", _ruleset_watch.SERVICE_PATH)
        return shlex.split(re.search(r"^ExecStart=(.*)$", unit, re.MULTILINE)[1])

    def look(self, rc=0):
        """One look; what the watch said."""
        inside = self.machine._inside(*self.command())
        done = subprocess.run(inside, text=True, capture_output=True, stdin=subprocess.DEVNULL, check=False)
        assert done.returncode == rc, done.stderr
        assert done.stdout == ""
        return done.stderr

    def daemon(self):
        """Fingerprint and problem, as the daemon reads them."""
        self.copy.write_text(self.machine.run("cat", RUN))
        return service.read_fingerprint(str(self.copy))

    def inode(self):
        return self.machine.run("stat", "-c", "%i", RUN)


@pytest.fixture
def watch(machine, tmp_path):
    return Watch(machine, tmp_path)


@pytest.mark.parametrize(
    ("change", "back"),
    [
        (["-t", "filter", "-D", "CTSYNC-FORWARD", "1"], None),
        (
            ["-A", "CTSYNC-FORWARD", "-i", "by-hand", "-j", "ACCEPT"],
            ["-D", "CTSYNC-FORWARD", "-i", "by-hand", "-j", "ACCEPT"],
        ),
        (["-t", "nat", "-F", "CTSYNC-POSTROUTING"], None),
        (["-P", "FORWARD", "ACCEPT"], ["-P", "FORWARD", "DROP"]),
        (["-F", "FORWARD"], None),  # our jump with it
    ],
)
def test_a_change_by_hand_shows_and_what_is_put_back_too(machine, backend, watch, change, back):
    done = machine.module("ruleset", backend=backend, **FULL)
    assert watch.look() == ""
    assert watch.daemon() == (done["fingerprint"], "")

    machine.run(f"iptables-{backend}", *change)
    assert watch.daemon() == (done["fingerprint"], "")  # the control: without a look nobody notices
    assert "<4>the rules that run are not those that were applied" in watch.look()
    running, problem = watch.daemon()
    assert running not in ("", done["fingerprint"])
    assert problem.startswith(f"{DRIFT} ({running[:12]} runs, {done['fingerprint'][:12]} was applied)")
    inode = watch.inode()
    assert watch.look() == ""  # said once, written once
    assert watch.inode() == inode

    if back:
        machine.run(f"iptables-{backend}", *back)
    else:
        repaired = machine.module("ruleset", backend=backend, take_over_forward_policy=True, **FULL)
        assert repaired["changed"]
        assert repaired["fingerprint"] == done["fingerprint"]
        assert watch.daemon() == (done["fingerprint"], "")  # the module says it at once
    watch.look()
    assert watch.daemon() == (done["fingerprint"], "")
    assert not machine.module("ruleset", backend=backend, **FULL)["changed"]


def test_check_mode_shows_what_drifted(machine, backend, watch):
    machine.module("ruleset", backend=backend, **FULL)
    machine.run(f"iptables-{backend}", "-A", "CTSYNC-FORWARD", "-i", "by-hand", "-j", "ACCEPT")
    watch.look()
    shown = machine.module("ruleset", check=True, backend=backend, **FULL)
    assert shown["changed"]
    before = {entry["before_header"]: entry["before"] for entry in shown["diff"]}
    after = {entry["after_header"]: entry["after"] for entry in shown["diff"]}
    assert set(before) == {"iptables-save", RUN}
    assert "-A CTSYNC-FORWARD -i by-hand -j ACCEPT\n" in before["iptables-save"]
    assert "by-hand" not in after["iptables-save"]
    assert watch.daemon()[1].startswith(DRIFT)  # and it has changed nothing


def test_counters_and_the_rules_of_others_do_not_count(machine, backend, watch):
    machine.run(f"iptables-{backend}-restore", text=FOREIGN)
    done = machine.module("ruleset", backend=backend, **FULL)
    inode = watch.inode()
    iptables = f"iptables-{backend}"
    for command in (
        "-I f2b-sshd 1 -s 198.51.100.7 -j REJECT --reject-with icmp-port-unreachable",
        "-A DOCKER -d 172.17.0.3/32 ! -i docker0 -o docker0 -p tcp -m tcp --dport 81 -j ACCEPT",
        "-t nat -A DOCKER ! -i docker0 -p tcp -m tcp --dport 8081 -j DNAT --to-destination 172.17.0.3:81",
        "-Z",
    ):
        machine.run(iptables, *command.split())
    machine.run("ip", "link", "set", "lo", "up")
    machine.run("ping", "-c", "2", "-i", "0.2", "127.0.0.1", check=False)
    assert watch.look() == ""
    assert watch.inode() == inode
    assert watch.daemon() == (done["fingerprint"], "")


def test_while_rules_are_changed_or_on_probation_the_watch_looks_away(machine, backend, watch):
    old = machine.module("ruleset", backend=backend, rules=PAGE[1:3])
    step = {"backend": backend, "rollback_id": "0123456789abcdef", "rollback_timeout": 300, "rules": PAGE[1:4]}
    new = machine.module("ruleset", **step)
    assert new["rollback"]["outcome"] == "armed"
    machine.run("rm", RUN)  # what a look would repair
    assert watch.look() == ""
    assert machine.run("find", RUN, check=False) == ""
    machine.module("ruleset", rollback_step="abort", **step)
    assert watch.look() == ""
    assert watch.daemon() == (old["fingerprint"], "")


@pytest.mark.long
def test_there_is_one_lock(machine, watch):
    old = machine.module("ruleset", rules=PAGE[1:3])
    machine.run("rm", RUN)
    holder = machine.start("sh", "-c", f"exec 9<{_rollback.FOLDER}; flock -x 9; exec sleep 300")
    try:
        wait_for(lambda: not machine.run("sh", "-c", f"flock -n -x {_rollback.FOLDER} echo free || :"), "the lock")
        assert watch.look() == ""
        assert machine.run("find", RUN, check=False) == ""
        refused = machine.module("ruleset", rules=PAGE[1:4])
        assert refused["failed"]
        assert "has held the lock of the rules" in refused["msg"]
        assert refused["msg"].endswith("Nothing was changed.")
    finally:
        holder.kill()
        holder.wait()
    watch.look()
    assert watch.daemon() == (old["fingerprint"], "")


def test_a_confirmed_change_is_what_was_applied(machine, backend, watch):
    machine.module("ruleset", backend=backend, rules=PAGE[1:3])
    step = {"backend": backend, "rollback_id": "0123456789abcdef", "rollback_timeout": 300, "rules": PAGE[1:4]}
    new = machine.module("ruleset", **step)
    confirmed = machine.module("ruleset", rollback_step="confirm", **step)
    assert confirmed["rollback"]["outcome"] == "confirmed"
    assert watch.look() == ""
    assert watch.daemon() == (new["fingerprint"], "")


def test_flushed_rules_and_a_boot_that_restored_nothing(machine, backend, watch):
    done = machine.module("ruleset", backend=backend, **{**FULL, "virtual_ips": ["10.9.8.100/24"]})
    for table in ("filter", "nat", "raw"):
        machine.run(f"iptables-{backend}", "-t", table, "-F")
        machine.run(f"iptables-{backend}", "-t", table, "-X")
    wanted = ("", f"{DRIFT} (nothing runs, {done['fingerprint'][:12]} was applied)")
    watch.look()
    assert watch.daemon() == wanted
    machine.run("rm", "-r", "/run/ctsync")  # a new boot, whose restore fails
    watch.look()
    assert watch.daemon() == wanted


def test_without_a_program_the_daemon_is_told(machine, backend, watch):
    done = machine.module("ruleset", backend=backend, **FULL)
    program = next(word for word in watch.command() if word.startswith("ipv4=")).partition("=")[2]
    machine.run("sh", "-c", "printf '#!/bin/sh\\necho broken >&2\\nexit 3\\n' > /run/broken; chmod +x /run/broken")
    machine.run("mount", "--bind", "/run/broken", program)
    assert watch.look(rc=1) == f"<4>the rules that run cannot be read: {program}: broken\n"
    assert watch.daemon() == (done["fingerprint"], f"the rules that run here cannot be read: {program}: broken")
    assert watch.look(rc=1) == ""
    machine.run("umount", program)
    watch.look()
    assert watch.daemon() == (done["fingerprint"], "")


def test_the_watch_comes_and_goes(machine, backend, watch):
    options = {"backend": backend, **FULL}
    machine.module("ruleset", watch=False, **options)
    present = [path for path in files(machine) if "watch" in path]
    assert present == []
    predicted = machine.module("ruleset", check=True, **options)
    assert predicted["changed"]
    (program,) = [entry["after"] for entry in predicted["diff"] if entry["after_header"].endswith(".pyz")]
    assert re.fullmatch(r"\d+ bytes, SHA-256 [0-9a-f]{64}\n", program)
    done = machine.module("ruleset", **options)
    assert done["diff"] == predicted["diff"]
    assert len([path for path in files(machine) if "watch" in path]) == 4
    assert not machine.module("ruleset", **options)["changed"]
    machine.run("rm", "/etc/systemd/system/timers.target.wants/ctsync-ruleset-watch.timer")
    assert machine.module("ruleset", **options)["changed"]
    for option in ({"watch": False}, {"state": "absent"}):
        machine.module("ruleset", **options)
        assert machine.module("ruleset", **{**options, **option})["changed"]
        assert [path for path in files(machine) if "watch" in path] == []
        assert machine.run("find", "/usr/lib/ctsync", check=False) == ""
        assert not machine.module("ruleset", **{**options, **option})["changed"]


def test_without_persistence_the_watch_still_knows_what_was_applied(machine, backend, watch):
    done = machine.module("ruleset", backend=backend, persist=False, **FULL)
    assert [path for path in files(machine) if path.endswith(("ruleset.v4", "ctsync-ruleset.service"))] == []
    machine.run("rm", "-r", "/run/ctsync")  # a new boot; somebody else has restored the rules
    watch.look()
    assert watch.daemon() == (done["fingerprint"], "")
    machine.run(f"iptables-{backend}", "-F", "CTSYNC-FORWARD")
    watch.look()
    assert watch.daemon()[1].startswith(DRIFT)


def test_systemd_takes_the_units(machine):
    if not shutil.which("systemd-analyze"):
        pytest.skip("needs systemd-analyze")
    machine.module("ruleset", **FULL)
    units = [_ruleset_watch.SERVICE_PATH, _ruleset_watch.TIMER_PATH]
    said = machine.run("sh", "-c", f"systemd-analyze verify {' '.join(units)} 2>&1", check=False)
    assert "ctsync-ruleset" not in said
