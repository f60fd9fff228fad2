# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Locked out and back in: the module ruleset as a user runs it, by ansible-playbook over a real sshd."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from integration.netns import wait_for
from integration.sealed import ROOT, Machine

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(not (shutil.which("sshd") and shutil.which("ssh")), reason="needs openssh-server"),
]

ADDRESS = "10.77.0.1"
GOOD = "-A INPUT -p tcp --dport 4444 -j DROP"
SSH_IN = "-A INPUT -p tcp --dport 22 -j DROP"
SSH_OUT = "-A OUTPUT -p tcp --sport 22 -j DROP"
SSHD = """\
Port 22
ListenAddress {address}
HostKey {folder}/host
AuthorizedKeysFile {folder}/user.pub
PidFile none
StrictModes no
UsePAM no
PermitRootLogin yes
LogLevel VERBOSE
Subsystem sftp internal-sftp
"""


class Site:
    """A node with an sshd, and a controller on the other end of a wire."""

    def __init__(self, folder: Path, node: Machine) -> None:
        self.folder, self.node = folder, node
        self.controller = f"ctsync-t-{secrets.token_hex(4)}"
        self.log = folder / "sshd.log"
        self._sshd: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Site:
        wire = self.controller[-8:]
        for command in (
            f"ip netns add {self.controller}",
            f"ip link add {wire}c netns {self.controller} type veth peer name {wire}n netns {self.node.name}",
            f"ip -n {self.controller} addr add 10.77.0.2/24 dev {wire}c",
            f"ip -n {self.controller} link set {wire}c up",
            f"ip -n {self.node.name} addr add {ADDRESS}/24 dev {wire}n",
            f"ip -n {self.node.name} link set {wire}n up",
            f"ip -n {self.node.name} link set lo up",
            f"ssh-keygen -q -t ed25519 -N '' -f {self.folder}/host",
            f"ssh-keygen -q -t ed25519 -N '' -f {self.folder}/user",
        ):
            subprocess.run(command, shell=True, check=True)
        (self.folder / "sshd_config").write_text(SSHD.format(address=ADDRESS, folder=self.folder))
        (self.folder / "hosts.yml").write_text(json.dumps(self.inventory()))
        self.node.run("sh", "-ec", "mkdir -p /run/sshd; usermod -p '*' root")
        self._sshd = self.node.start(
            shutil.which("sshd"), "-D", "-f", f"{self.folder}/sshd_config", "-E", str(self.log)
        )
        wait_for(lambda: self.log.exists() and "listening" in self.log.read_text(), "sshd")
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._sshd:
            self._sshd.kill()
            self._sshd.wait()
        subprocess.run(["ip", "netns", "del", self.controller], check=False)

    def inventory(self) -> dict:
        """The node as a user would have it."""
        ssh = f"-i {self.folder}/user -o UserKnownHostsFile=/dev/null -o StrictHostKeyChecking=no"
        variables = {
            "ansible_host": ADDRESS,
            "ansible_user": "root",
            "ansible_python_interpreter": sys.executable,
            "ansible_ssh_common_args": ssh,
        }
        return {"all": {"hosts": {"node": variables}}}

    def start(self, tasks: list) -> subprocess.Popen:
        """ansible-playbook with these tasks for the node."""
        play = [{"name": "Test", "hosts": "node", "gather_facts": False, "tasks": tasks}]
        path = self.folder / f"play-{secrets.token_hex(4)}.yml"
        path.write_text(json.dumps(play))
        environment = {
            **os.environ,
            "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
            "ANSIBLE_STDOUT_CALLBACK": "minimal",
            "ANSIBLE_TIMEOUT": "4",
            "ANSIBLE_SSH_CONTROL_PATH_DIR": str(self.folder / "cp"),
        }
        program = Path(sys.executable).parent / "ansible-playbook"
        command = [
            "ip",
            "netns",
            "exec",
            self.controller,
            str(program),
            "-i",
            str(self.folder / "hosts.yml"),
            str(path),
        ]
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def play(self, *tasks: dict) -> tuple[int, str]:
        """The exit code of ansible-playbook and what it printed."""
        running = self.start(list(tasks))
        try:
            out, _none = running.communicate(timeout=200)
        finally:
            if running.poll() is None:
                os.killpg(running.pid, signal.SIGKILL)
        return running.returncode, out

    def can_log_in(self) -> bool:
        """Whether a connection of its own gets in."""
        ssh = ["ssh", "-F", "none", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5", "-o", "StrictHostKeyChecking=no"]
        ssh += ["-o", "UserKnownHostsFile=/dev/null", "-i", f"{self.folder}/user", f"root@{ADDRESS}", "true"]
        done = subprocess.run(["ip", "netns", "exec", self.controller, *ssh], capture_output=True, check=False)
        return done.returncode == 0

    def apply(self, *rules: str, **options: object) -> tuple[int, str]:
        """Run the module, and nothing else, with these rules."""
        return self.play(self.task(*rules, **options))

    @staticmethod
    def task(*rules: str, **options: object) -> dict:
        """A task with the module."""
        return {"name": "Rules", "ctsync.ha_firewall.ruleset": {"rules": list(rules), "persist": False, **options}}

    def rules(self) -> list[str]:
        """iptables-save of the node, without what changes by itself."""
        lines = self.node.run("iptables-save").splitlines()
        return [line.split(" [")[0] for line in lines if not line.startswith("#")]

    def logins(self) -> int:
        """How many connections were opened so far."""
        return self.log.read_text().count("Accepted publickey")


@pytest.fixture
def site(tmp_path):
    with contextlib.ExitStack() as stack:
        yield stack.enter_context(Site(tmp_path, stack.enter_context(Machine())))


def test_good_rules_are_confirmed_over_a_new_connection_and_stay(site):
    rc, out = site.apply(GOOD, rollback_timeout=60)
    assert rc == 0, out
    assert "outcome: confirmed" in out
    assert site.logins() >= 2
    assert "-A CTSYNC-INPUT -p tcp -m tcp --dport 4444 -j DROP" in site.rules()
    before = site.logins()
    rc, out = site.apply(GOOD, rollback_timeout=60)
    assert rc == 0, out
    assert "changed: false" in out
    assert "rollback:" not in out
    assert site.logins() <= before + 1  # nothing to confirm
    wait_for(lambda: not guards(site), "the guard to end")


def guards(site):
    """The rollbacks on the node that are not decided."""
    undecided = "for d in /run/ctsync-ruleset/*/; do [ -e $d/outcome.json ] || echo $d; done"
    return site.node.run("sh", "-c", undecided)


@pytest.mark.parametrize("rule", [SSH_IN, pytest.param(SSH_OUT, marks=pytest.mark.long)])
def test_a_controller_that_locks_itself_out_gets_back_in(site, rule):
    rc, out = site.apply(GOOD)
    assert rc == 0, out
    before = site.rules()
    rc, out = site.apply(GOOD, rule, rollback_timeout=8)
    assert rc == 2, out
    assert "FAILED!" in out
    assert "The new rules cut this controller off" in out or "The connection broke while the new rules" in out, out
    assert "put the old rules back" in out
    assert "outcome: rolled back" in out
    assert site.rules() == before
    assert site.can_log_in()


def test_without_rollback_the_controller_stays_locked_out(site):
    """The negative control: it is the rollback that let us back in."""
    assert site.can_log_in()
    _rc, out = site.apply(SSH_IN, rollback_timeout=0)
    assert "rolled back" not in out
    time.sleep(10)  # longer than the rollback in the tests above
    assert "-A CTSYNC-INPUT -p tcp -m tcp --dport 22 -j DROP" in site.rules()
    assert not site.can_log_in()


def test_a_failed_canary_puts_the_old_rules_back_at_once(site):
    before = site.rules()
    rc, out = site.apply(GOOD, canary="ls /mnt/no-such-file", rollback_timeout=300)
    assert rc == 2, out
    assert "The canary 'ls /mnt/no-such-file' ended with 2: ls: cannot access" in out
    assert "put the old rules back at once" in out
    assert [line for line in site.rules() if "CTSYNC" in line] == [line for line in before if "CTSYNC" in line] == []
    rc, out = site.apply(GOOD, canary="ls /mnt", rollback_timeout=60)
    assert rc == 0, out


def test_the_old_rules_come_back_when_the_controller_dies_before_it_confirms(site):
    rc, out = site.apply(GOOD)
    assert rc == 0, out
    before = site.rules()
    running = site.start([site.task("-A INPUT -p tcp --dport 5555 -j DROP", canary="sleep 100", rollback_timeout=8)])
    wait_for(lambda: any("5555" in line for line in site.rules()), "the new rules")
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    wait_for(lambda: site.rules() == before, "the old rules")


@pytest.mark.long
def test_a_second_run_waits_until_the_first_is_decided(site):
    running = site.start([site.task(SSH_IN, rollback_timeout=10)])
    wait_for(lambda: any("--dport 22 " in line for line in site.rules()), "the new rules")
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    again = site.node.module("ruleset", rules=[GOOD], persist=False, rollback_timeout=0)
    assert again["changed"]
    rules = site.rules()
    assert "-A CTSYNC-INPUT -p tcp -m tcp --dport 4444 -j DROP" in rules
    assert not [line for line in rules if "--dport 22 " in line]


def test_async_is_refused_because_it_would_only_get_in_the_way(site):
    rc, out = site.play({**site.task(GOOD), "async": 60, "poll": 5})
    assert rc == 2, out
    assert "async" in out
    assert not [line for line in site.rules() if "CTSYNC" in line]


PROBATION = {"rules": [GOOD], "rollback_id": "0123456789abcdef"}


def test_a_guard_that_is_told_to_stop_puts_the_old_rules_back(machine):
    machine.module("ruleset", rollback_timeout=3000, **PROBATION)
    assert "CTSYNC-INPUT" in machine.run("iptables-save")
    assert not machine.run("find", "/etc/ctsync", check=False)  # boot would restore the old rules
    os.kill(int(machine.run("cat", "/run/ctsync-ruleset/0123456789abcdef/pid")), signal.SIGTERM)
    wait_for(lambda: "CTSYNC" not in machine.run("iptables-save"), "the old rules")
    # the guard puts the rules back first
    wait_for(lambda: not machine.run("find", "/run/ctsync/ruleset.fingerprint", check=False), "no fingerprint")


@pytest.mark.long
def test_a_confirmation_that_comes_too_late_or_has_no_guard_is_refused(machine):
    machine.module("ruleset", rollback_timeout=5, **PROBATION)
    wait_for(lambda: "CTSYNC" not in machine.run("iptables-save"), "the old rules")
    late = machine.module("ruleset", rollback_timeout=5, rollback_step="confirm", **PROBATION)
    assert late["failed"]
    assert late["rollback"]["outcome"] == "rolled back"
    machine.run("rm", "-r", "/run/ctsync-ruleset")
    lost = machine.module("ruleset", rollback_timeout=5, rollback_step="confirm", **PROBATION)
    assert lost["failed"]
    assert lost["rollback"]["outcome"] == "unknown"
    assert "CTSYNC" not in machine.run("iptables-save")


def test_removal_is_on_probation_too_and_leaves_no_empty_folder(machine):
    machine.module("ruleset", rules=[GOOD])
    machine.module("ruleset", rules=[GOOD], persist=False)  # leaves the folder
    gone = {"state": "absent", "rollback_id": "0123456789abcdef", "rollback_timeout": 3000}
    assert machine.module("ruleset", **gone)["rollback"]["outcome"] == "armed"
    assert machine.module("ruleset", rollback_step="confirm", **gone)["rollback"]["outcome"] == "confirmed"
    assert "CTSYNC" not in machine.run("iptables-save")
    assert not machine.run("find", "/etc/ctsync", "/var/lib/ctsync", check=False)


def test_the_policy_and_what_is_remembered_of_it_come_back(machine):
    rules = ["-P FORWARD DROP", "-A FORWARD -j LOG"]
    machine.module("ruleset", rules=rules, rules6=rules, rollback_timeout=5, rollback_id="0123456789abcdef")
    assert ":FORWARD DROP" in machine.run("iptables-save")
    assert ":FORWARD DROP" in machine.run("ip6tables-save")
    wait_for(lambda: "DROP" not in machine.run("iptables-save") + machine.run("ip6tables-save"), "the old policies")
    wait_for(lambda: not machine.run("find", "/var/lib/ctsync/ruleset.json", check=False), "nothing to be remembered")


def test_nothing_is_changed_when_the_guard_cannot_be_started(machine):
    folder = "/run/ctsync-ruleset"
    machine.run("sh", "-ec", f"mkdir {folder}; mount --bind {folder} {folder}; mount -o remount,bind,ro {folder}")
    refused = machine.module("ruleset", rollback_timeout=30, **PROBATION)
    assert refused["failed"]
    assert "The process that would put the old rules back cannot be started: " in refused["msg"]
    assert refused["msg"].endswith("Nothing was changed.")
    assert "CTSYNC" not in machine.run("iptables-save")


def test_nothing_is_changed_without_the_lock(machine):
    machine.run("mount", "-o", "remount,ro", "/run")
    refused = machine.module("ruleset", rollback_timeout=30, **PROBATION)
    assert refused["failed"]
    assert refused["msg"].startswith("The lock of the rules cannot be had: /run/ctsync-ruleset: Read-only file system.")
    assert refused["msg"].endswith("Nothing was changed.")
    assert "CTSYNC" not in machine.run("iptables-save")
