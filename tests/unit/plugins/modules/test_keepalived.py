# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The module keepalived with its files in a folder of its own; the test plays systemd and keepalived."""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path

import pytest
import yaml
from ansible.module_utils.testing import patch_module_args
from ansible_collections.ctsync.ha_firewall.plugins.module_utils import _facts, _systemd
from ansible_collections.ctsync.ha_firewall.plugins.module_utils import _keepalived as layout
from ansible_collections.ctsync.ha_firewall.plugins.modules import ha_facts
from ansible_collections.ctsync.ha_firewall.plugins.modules import keepalived as module_under_test

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="gives files to root: run the tests as root")
FOREIGN = "vrrp_instance OLD {\n    interface eth9\n}\n"


class Systemd:
    """keepalived.service as systemd would show it; ``calls`` are what was done to it."""

    def __init__(self):
        self.active = False
        self.enabled = True
        self.masked = False
        self.pid = 100
        self.calls = []
        self.fail = set()  # calls that fail
        self.dies_on_reload = False

    def __call__(self, _module, name):
        assert name == "keepalived.service"
        return self

    def state(self):
        text = "active (running)" if self.active else "inactive (dead)"
        return _systemd.State(True, self.active, self.enabled, False, self.pid if self.active else 0, text, self.masked)

    def _do(self, name):
        self.calls.append(name)
        if name in self.fail:
            raise _systemd.SystemdError(f"systemctl {name}: no", rc=1)

    def daemon_reload(self):
        self._do("daemon-reload")

    def restart(self):
        self._do("restart")
        self.active = True
        self.pid += 1

    def reload(self):
        self._do("reload")
        if self.dies_on_reload:
            self.active = self.dies_on_reload = False

    def stop(self):
        self._do("stop")
        self.active = False

    def enable(self):
        self._do("enable")
        self.enabled = True

    def disable(self):
        self._do("disable")
        self.enabled = False

    def reset_failed(self):
        self._do("reset-failed")

    def journal(self, _lines=20):
        return "the last words"


class Host:
    """A host with a folder for /etc and a keepalived that is a script."""

    def __init__(self, directory, monkeypatch, capsys):
        self.capsys = capsys
        self.systemd = Systemd()
        self.config = directory / "etc" / "keepalived" / "keepalived.conf"
        self.saved = Path(str(self.config) + ".before-ctsync")
        self.dropin = directory / "etc" / "systemd" / "keepalived.service.d" / "ctsync.conf"
        self.note = directory / "etc" / "iproute2" / "rt_addrprotos.d" / "keepalived.conf"
        self.pending = directory / "pending"
        self.program = directory / "bin" / "keepalived"
        self.program.parent.mkdir()
        self.play_keepalived()
        (directory / "etc").mkdir()
        monkeypatch.setattr(layout, "CONFIG_PATH", str(self.config))
        monkeypatch.setattr(layout, "DROPIN_PATH", str(self.dropin))
        monkeypatch.setattr(layout, "PROTOCOL_NOTE", str(self.note))
        monkeypatch.setattr(module_under_test, "PENDING", str(self.pending))
        monkeypatch.setattr(module_under_test, "SETTLE_S", 0)
        monkeypatch.setattr(_systemd, "booted", lambda: True)
        monkeypatch.setattr(_systemd, "Service", self.systemd)
        monkeypatch.setenv("PATH", f"{self.program.parent}:{os.environ['PATH']}")

    def play_keepalived(self, rc=0, said="", version="2.2.7"):
        self.program.write_text(
            f'#!/bin/sh\n[ "$1" = --version ] && {{ echo "Keepalived v{version} (x)" >&2; exit 0; }}\n'
            f'for last; do :; done\necho "{said}" | sed "s,FILE,$last," >&2\nexit {rc}\n',
            encoding="utf-8",
        )
        self.program.chmod(0o755)

    def run(self, check=False, **options):
        base = {
            "node": "fw1",
            "priority": 150,
            "instances": [
                {"interface": "eth1", "router_id": 51, "virtual_ips": ["192.168.0.100/24"]},
                {"interface": "eth0", "router_id": 52, "virtual_ips": ["192.168.1.100/24"]},
            ],
        }
        if options.get("state") == "absent":
            base = {}
        self.systemd.calls.clear()
        arguments = {**base, **options, "_ansible_check_mode": check, "_ansible_diff": True}
        with patch_module_args(arguments), pytest.raises(SystemExit):
            module_under_test.main()
        return json.loads(self.capsys.readouterr().out)

    def files(self):
        """Everything that is there now: path to mode and content."""
        top = self.config.parents[1]
        return {
            str(path.relative_to(top)): (stat.S_IMODE(path.stat().st_mode), path.read_text(encoding="utf-8"))
            for path in sorted(top.rglob("*"))
            if path.is_file()
        }


@pytest.fixture
def host(tmp_path, monkeypatch, capsys):
    return Host(tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("module", [module_under_test, ha_facts])
def test_documentation_and_argument_spec_agree(module):
    def compare(documented, spec, where):
        assert set(documented) == set(spec), where
        for name, entry in documented.items():
            path = f"{where}.{name}"
            assert entry["type"] == spec[name]["type"], path
            assert entry.get("elements") == spec[name].get("elements"), path
            assert entry.get("default") == spec[name].get("default"), path
            assert entry.get("choices") == spec[name].get("choices"), path
            assert bool(entry.get("required")) == bool(spec[name].get("required")), path
            compare(entry.get("suboptions", {}), spec[name].get("options", {}), path)

    compare(yaml.safe_load(module.DOCUMENTATION)["options"], module.argument_spec(), "options")


@needs_root
def test_first_run_starts_second_does_nothing(host):
    predicted = host.run(check=True)
    assert predicted["changed"] and host.files() == {} and host.systemd.calls == []
    done = host.run()
    assert (done["changes"], done["action"], done["diff"]) == (predicted["changes"], "started", predicted["diff"])
    assert host.systemd.calls == ["daemon-reload", "restart"]
    assert host.config.read_text(encoding="utf-8").startswith(layout.MARKER + "\n# Before: active=no enabled=yes\n")
    assert "After=ctsyncd.service" in host.dropin.read_text(encoding="utf-8")
    again = host.run()
    assert (again["changed"], again["action"], again["diff"], host.systemd.calls) == (False, "none", [], [])
    assert not host.pending.exists()


@needs_root
def test_a_change_reloads_and_never_restarts(host):
    host.run()
    done = host.run(priority=160, backup=True)
    assert done["action"] == "reloaded" and host.systemd.calls == ["reload"]
    assert "priority 150" in Path(done["backup_file"]).read_text(encoding="utf-8")
    host.config.write_text(host.config.read_text(encoding="utf-8").replace("160", "170"), encoding="utf-8")
    repaired = host.run(priority=160)
    assert repaired["changed"] and "priority 160" in host.config.read_text(encoding="utf-8")


@needs_root
def test_a_reload_that_was_interrupted_is_done_by_the_next_run(host):
    host.run()
    host.pending.touch()
    assert host.run()["action"] == "reloaded" and host.systemd.calls == ["reload"]
    assert host.run()["changed"] is False


@needs_root
def test_a_refused_candidate_changes_nothing_and_is_explained_by_keepalived(host):
    host.run()
    before = host.files()
    host.play_keepalived(rc=5, said="(FILE: Line 7) WARNING - interface eth1 doesn't exist")
    for check in (True, False):
        failed = host.run(check=check, priority=160)
        assert failed["failed"] and host.systemd.calls == []
        assert f"({host.config}: Line 7) WARNING - interface eth1 doesn't exist" in failed["msg"]
        assert "missing interface" in failed["msg"] and "priority 160" in failed["candidate"]
    assert host.files() == before


@needs_root
def test_a_keepalived_that_does_not_survive_the_reload_gets_its_old_configuration_back(host):
    host.run()
    before = host.files()
    host.systemd.dies_on_reload = True
    failed = host.run(priority=160)
    assert failed["failed"] and failed["rolled_back"] and failed["changed"] is False
    assert "did not survive the reload" in failed["msg"] and failed["journal"] == "the last words"
    assert host.systemd.calls == ["reload", "daemon-reload", "restart"] and host.systemd.active
    assert host.files() == before and not host.pending.exists()


@needs_root
def test_a_failed_first_start_leaves_nothing_behind(host):
    host.systemd.enabled = False
    host.systemd.fail = {"restart"}
    failed = host.run()
    assert failed["failed"] and failed["rolled_back"]
    assert host.files() == {} and host.systemd.enabled is False and host.systemd.active is False


@needs_root
def test_a_configuration_of_others_is_kept_and_given_back_with_the_service_as_it_was(host):
    host.config.parent.mkdir()
    host.config.write_text(FOREIGN, encoding="utf-8")
    host.config.chmod(0o640)
    host.systemd.active, host.systemd.enabled = True, False
    taken = host.run()
    assert taken["action"] == "reloaded" and taken["backup_file"] == str(host.saved) and host.systemd.enabled
    assert host.files()["keepalived/keepalived.conf.before-ctsync"] == (0o640, FOREIGN)
    host.run(priority=160)
    assert host.saved.read_text(encoding="utf-8") == FOREIGN
    predicted = host.run(check=True, state="absent")
    done = host.run(state="absent")
    assert done["changed"] and done["action"] == "restarted" and done["changes"] == predicted["changes"]
    assert host.systemd.calls == ["stop", "daemon-reload", "disable", "restart"]
    assert host.files() == {"keepalived/keepalived.conf": (0o640, FOREIGN)}
    assert not host.dropin.parent.exists()
    assert host.run(state="absent")["changed"] is False


@needs_root
def test_absent_leaves_a_host_that_had_no_keepalived_stopped(host):
    host.run()
    done = host.run(state="absent")
    assert done["action"] == "stopped" and host.systemd.calls == ["stop", "daemon-reload"]
    assert host.files() == {}


def leave_note(host, text="18\tkeepalived\t# added by keepalived\n"):
    """As keepalived 2.3 does at its start."""
    host.note.parent.mkdir(parents=True)
    host.note.write_text(text, encoding="utf-8")


@needs_root
def test_absent_removes_what_keepalived_has_told_ip(host):
    host.run()
    leave_note(host)
    predicted = host.run(check=True, state="absent")
    assert host.note.exists()
    done = host.run(state="absent")
    assert done["changes"] == predicted["changes"] and str(host.note) in done["changes"]
    assert host.files() == {} and not host.note.parents[1].exists()


@needs_root
@pytest.mark.parametrize("whose", ["keepalived of others", "edited", "beside others"])
def test_absent_leaves_what_others_have_told_ip(host, whose):
    if whose == "keepalived of others":
        host.config.parent.mkdir()
        host.config.write_text(FOREIGN, encoding="utf-8")
        host.systemd.active = True
    host.run()
    leave_note(host, *(["18\tkeepalived\t# added by keepalived\n19\tmine\n"] if whose == "edited" else []))
    other = host.note.parent / "bird.conf"
    if whose == "beside others":
        other.write_text("186\tbird\n", encoding="utf-8")
    host.run(state="absent")
    assert host.note.exists() is (whose != "beside others")
    assert other.exists() is (whose == "beside others")


@needs_root
def test_absent_does_not_touch_what_is_not_ours(host):
    host.config.parent.mkdir()
    host.config.write_text(FOREIGN, encoding="utf-8")
    host.systemd.active = True
    assert host.run(state="absent")["changed"] is False
    assert host.files() == {"keepalived/keepalived.conf": (0o644, FOREIGN)} and host.systemd.active


@needs_root
def test_the_service_can_be_kept_down(host):
    host.run()
    done = host.run(running=False, enabled=False)
    assert done["action"] == "stopped" and host.systemd.calls == ["disable", "stop"]
    assert host.run(running=False, enabled=False)["changed"] is False


@needs_root
def test_a_path_that_is_no_file_is_refused(host):
    host.config.parent.mkdir()
    host.config.symlink_to("/dev/null")
    failed = host.run()
    assert "is not a regular file" in failed["msg"] and "Nothing was changed" in failed["msg"]


def test_what_cannot_be_is_refused_before_anything_is_done(host, monkeypatch):
    assert "2.0.10 is too old" in (host.play_keepalived(version="2.0.10") or host.run())["msg"]
    host.play_keepalived()
    assert "leave path out or set manage_service to false" in host.run(path="/etc/other.conf")["msg"]
    assert "name at least one VRRP instance" in host.run(instances=[])["msg"]
    failed = host.run(priority=20)
    assert failed["problems"] == [
        "priority: 20 with track_weight -60 is below 1 when the node is not ready: choose at least 61"
    ]
    host.systemd.masked = True
    assert "systemctl unmask keepalived.service" in host.run()["msg"]
    host.systemd.masked = False
    monkeypatch.setattr(_systemd, "booted", lambda: False)
    assert "systemd is not the running init" in host.run()["msg"]
    assert host.files() == {} and host.systemd.calls == []


@needs_root
def test_a_missing_package_is_an_error_but_not_in_check_mode(host, monkeypatch):
    host.program.unlink()
    monkeypatch.setattr(module_under_test.AnsibleModule, "get_bin_path", lambda self, *_args, **_kwargs: None)
    warned = []
    monkeypatch.setattr(module_under_test.AnsibleModule, "warn", lambda self, text, **_kwargs: warned.append(text))
    assert host.run(check=True)["changed"]
    assert warned == ["keepalived is not installed yet: its configuration was not tested"]
    assert "install the package keepalived first" in host.run()["msg"]
    assert host.files() == {}


@needs_root
def test_keys_are_in_a_file_of_root_alone_and_in_no_output(host):
    key = "ab" * 32
    sealed = {"keys": [{"id": 1, "key": key}]}
    host.play_keepalived(version="2.4.0")
    host.run()
    done = host.run(authentication=sealed)
    assert done["changed"] and done["action"] == "reloaded"
    assert key not in json.dumps(done)
    assert f"hex:{key}" in host.config.read_text(encoding="utf-8")
    assert stat.S_IMODE(host.config.stat().st_mode) == 0o600
    assert not host.run(authentication=sealed)["changed"]
    host.play_keepalived(rc=5, said="no", version="2.4.0")
    assert key not in json.dumps(host.run(authentication={"keys": [{"id": 2, "key": key}]}))

    host.play_keepalived(version="2.2.7")
    before = host.files()
    refused = host.run(authentication=sealed)
    assert refused["failed"] and "keepalived 2.2.7 has none for VRRPv3" in refused["msg"]
    assert host.files() == before and host.systemd.calls == []
    assert stat.S_IMODE(host.config.stat().st_mode) == 0o600
    host.run()
    assert stat.S_IMODE(host.config.stat().st_mode) == 0o644


@needs_root
def test_a_replaced_program_is_the_one_reason_for_a_restart_and_the_standby_comes_first(host, monkeypatch):
    host.run()
    host.systemd.pid = os.getpid()  # runs another program than the installed one
    held = {_facts.Address("eth0", "192.168.1.100")}
    monkeypatch.setattr(_facts, "read_addresses", lambda: held)
    warnings = []
    monkeypatch.setattr(module_under_test.AnsibleModule, "warn", lambda _module, text: warnings.append(text))
    for restart in ("never", "backup"):
        warnings.clear()
        done = host.run(restart=restart)
        assert not done["changed"] and host.systemd.calls == []
        assert done["restart_reason"] == "the program was replaced since keepalived started"
        assert len(warnings) == 1 and "hand over first (playbook switchover)" in warnings[0]
    # a change of the configuration is still reloaded there
    assert host.run(advert_interval=0.2)["action"] == "reloaded"

    held.clear()
    assert not host.run(advert_interval=0.2, restart="never")["changed"]
    predicted = host.run(check=True, advert_interval=0.2)
    assert predicted["action"] == "restarted" and host.systemd.calls == []
    assert host.run(advert_interval=0.2)["action"] == "restarted"
    assert host.systemd.calls == ["restart"]
    held.add(_facts.Address("eth0", "192.168.1.100"))
    host.systemd.pid = os.getpid()
    assert host.run(advert_interval=0.2, restart="always")["action"] == "restarted"


def test_what_a_process_runs_is_compared_by_file(tmp_path):
    assert not module_under_test.replaced(os.path.realpath(sys.executable), os.getpid())
    assert module_under_test.replaced("/bin/sh", os.getpid())
    assert not module_under_test.replaced("/bin/sh", 0)
    assert not module_under_test.replaced(str(tmp_path / "none"), os.getpid())
