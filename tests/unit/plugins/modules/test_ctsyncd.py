# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The installer of the daemon: the real module in a folder of its own; the test plays systemd and the accounts."""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ansible.executor.module_common import ModuleDepFinder
from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.testing import patch_module_args
from ansible_collections.ctsync.ha_firewall.plugins.module_utils import _ctsyncd_files as layout
from ansible_collections.ctsync.ha_firewall.plugins.module_utils import _files, _systemd, _zipapp
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import config as daemon_config
from ansible_collections.ctsync.ha_firewall.plugins.modules import ctsyncd as module_under_test

ROOT = Path(__file__).resolve().parents[4]
PREFIX = "ansible_collections.ctsync.ha_firewall."
SECRET = base64.b64encode(b"a secret of exactly 32 bytes ...").decode()
SECRET2 = base64.b64encode(b"another secret of even more bytes").decode()
UID = GID = 12345
PATHS = (
    "LIBRARY",
    "COMMAND",
    "CONFIG_DIRECTORY",
    "CONFIG",
    "KEY_DIRECTORY",
    "UNIT_FILE",
    "TMPFILES",
    "SHARED_DIRECTORY",
    "STATE_DIRECTORY",
    "TRACK_FILE",
    "NOTIFY_FIFO",
)
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="gives files to other owners: run the tests as root")


# --- the pieces agree with each other ---


def options_of(table, spec):
    """Rows of the daemon's option table that the module has under the same name."""
    return {row.key: (row, spec[row.key]) for row in table if row.key in spec}


def test_every_option_of_the_daemon_is_an_option_of_the_module_with_the_same_default():
    spec = module_under_test.argument_spec()
    fixed = {
        "control_socket": layout.CONTROL_SOCKET,
        "notify_fifo": layout.NOTIFY_FIFO,
        "track_file": layout.TRACK_FILE,
    }
    for row in daemon_config.OPTIONS:
        if row.key in fixed:  # the unit and tmpfiles.d are written for these
            assert row.default == fixed[row.key]
            continue
        given = spec[row.key]
        default = None if row.default is daemon_config.REQUIRED else row.default
        if row.key == "netlink_buffer_bytes":
            default = 0  # made for the host
        if default == daemon_config.EVERYTHING:
            default = {}
        assert given.get("default") == (list(default) if isinstance(default, tuple) else default), row.key
        assert tuple(given.get("choices", ())) == row.choices, row.key
    for name, table in (
        ("peers", daemon_config.PEER_OPTIONS),
        ("link", daemon_config.LINK_OPTIONS),
        ("links", daemon_config.LINK_OPTIONS),
        ("virtual_ips", daemon_config.VIRTUAL_IP_OPTIONS),
        ("filter", daemon_config.FILTER_OPTIONS),
    ):
        assert set(spec[name]["options"]) == {row.key for row in table}, name
    selection = spec["filter"]["options"]
    marks = selection["marks"]["options"]
    assert {name: option.get("default") for name, option in marks.items()} == {
        row.key: None if row.default is daemon_config.REQUIRED else row.default for row in daemon_config.MARK_OPTIONS
    }
    assert tuple(selection["tcp_states"]["choices"]) == daemon_config.FILTER_TCP_STATES


def test_documentation_and_argument_spec_are_the_same():
    def strip(options):
        kept = {}
        for name, option in options.items():
            entry = {
                key: option[key] for key in ("type", "default", "choices", "elements", "required") if key in option
            }
            inner = option.get("suboptions") or option.get("options")
            kept[name] = {**entry, **({"options": strip(inner)} if inner else {})}
        return kept

    documented = yaml.safe_load(module_under_test.DOCUMENTATION)["options"]
    assert strip(documented) == strip(module_under_test.argument_spec())


def test_role_hands_every_option_to_the_module():
    role = ROOT / "roles" / "ctsyncd"
    tasks = yaml.safe_load((role / "tasks" / "main.yml").read_text())
    calls = [task["ctsync.ha_firewall.ctsyncd"] for task in tasks if "ctsync.ha_firewall.ctsyncd" in task]
    assert set().union(*calls) == set(module_under_test.argument_spec())
    defaults = yaml.safe_load((role / "defaults" / "main.yml").read_text())
    specs = yaml.safe_load((role / "meta" / "argument_specs.yml").read_text())["argument_specs"]["main"]["options"]
    assert set(defaults) == set(specs)
    assert {name: spec["default"] for name, spec in specs.items() if "default" in spec} == {
        name: value for name, value in defaults.items() if "default" in specs[name]
    }


def shipped_files() -> set[Path]:
    """What Ansible ships with the module: the files that its own finder of imports leads to."""
    found: set[Path] = set()
    todo = [ROOT / "plugins" / "modules" / "ctsyncd.py"]
    while todo:
        path = todo.pop()
        if path in found or not path.is_file():
            continue
        found.add(path)
        parts = path.relative_to(ROOT).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        name = PREFIX + ".".join(parts[:-1] if is_package else parts)
        for wanted in ModuleDepFinder(name, ast.parse(path.read_text()), is_package).submodules:
            relative = ".".join(wanted).removeprefix(PREFIX).split(".")
            for length in range(len(relative), 2, -1):
                base = ROOT.joinpath(*relative[:length])
                todo += [base.with_suffix(".py"), base / "__init__.py"]
    return found


def test_ansible_ships_every_file_of_the_daemon():
    package = ROOT / "plugins" / "module_utils" / "ctsyncd"
    assert {path for path in shipped_files() if package in path.parents} == set(package.rglob("*.py"))


def test_unit_keeps_its_promises():
    unit = layout.render_unit([2, 1], ["192.168.100.2"])
    lines = unit.splitlines()
    assert [line for line in lines if line.startswith("LoadCredential=")] == [
        "LoadCredential=key-1:/etc/ctsyncd/keys/1.key",
        "LoadCredential=key-2:/etc/ctsyncd/keys/2.key",
    ]
    for line in (
        "Before=keepalived.service",
        "ExecStartPre=/usr/sbin/ctsyncd -C /etc/ctsyncd/ctsyncd.conf gate --not-ready",
        "ExecStopPost=/usr/sbin/ctsyncd -C /etc/ctsyncd/ctsyncd.conf gate --not-ready",
        "ExecStartPost=-+/usr/bin/chrt --rr --pid 1 $MAINPID",  # where it is refused the service runs nevertheless
        "Restart=always",
        "StartLimitIntervalSec=0",
        "User=ctsyncd",
        "CapabilityBoundingSet=CAP_NET_ADMIN",
        "ReadWritePaths=/run/ctsync",
        "IPAddressAllow=192.168.100.2",
    ):
        assert line in lines, line
    assert "PrivateUsers" not in unit  # it would take the right to change the conntrack table away
    assert "network-online" not in unit


def test_old_systemd_runs_nothing_of_the_unit_before_its_credentials_are_there():
    """systemd 247 fails any ExecStartPre= of a sandboxed unit with LoadCredential= (226/NAMESPACE)."""
    old = layout.render_unit([1], ["192.168.100.2"], 247).splitlines()
    new = layout.render_unit([1], ["192.168.100.2"], 252).splitlines()
    together = (
        "ExecStart=/bin/sh -c '/usr/sbin/ctsyncd -C /etc/ctsyncd/ctsyncd.conf gate --not-ready"
        " && exec /usr/sbin/ctsyncd -C /etc/ctsyncd/ctsyncd.conf'"
    )
    assert [line for line in old if line not in new] == [together]
    assert [line.split("=")[0] for line in new if line not in old] == ["ExecStartPre", "ExecStart"]
    assert new == layout.render_unit([1], ["192.168.100.2"]).splitlines()


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("c2hvcnQ=", "has 5 bytes, less than 32"),
        ("not base64 at all, and long enough to be a key!", "is not base64"),
        ("", "has 0 bytes"),
        ("é" * 44, "is not base64"),
    ],
)
def test_bad_key_is_named_and_never_shown(key, words):
    (problem,) = layout.check_keys([{"id": 7, "key": key}])
    assert words in problem
    assert "keys[0] (id 7)" in problem
    assert "openssl rand -base64 32" in problem
    assert not key or key not in problem


def test_key_ids_are_checked():
    good = {"key": SECRET}
    assert layout.check_keys([{"id": 1, **good}, {"id": 255, **good}]) == []
    assert "out of range" in layout.check_keys([{"id": 256, **good}])[0]
    assert "stands twice" in layout.check_keys([{"id": 1, **good}, {"id": 1, **good}])[0]
    assert "is empty" in layout.check_keys([])[0]


# --- the module at work ---


class Exit(Exception):
    """exit_json or fail_json."""

    def __init__(self, result):
        super().__init__(json.dumps(result, default=str))
        self.result = result


class Host:
    """A host in a folder: the module's paths lead there, and this object plays systemd and the account files."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.account = False
        self.systemd = 252
        self.active = self.enabled = False
        self.read_unit = ""  # what systemd has read of the unit
        self.calls: list[str] = []
        self.held: dict[str, str] = {}  # keys that it was given while it ran
        self.running: dict[str, str] = {}  # what the daemon read when it started
        self.deaf = False  # does not react to a reload
        self.keeps_keys = False  # refuses other keys
        self.refuse = ""  # a daemon does not start whose configuration has this word
        for folder in ("usr/lib", "usr/sbin", "etc/systemd/system", "etc/tmpfiles.d", "run"):
            (root / folder).mkdir(parents=True)

    def path(self, name: str) -> str:
        return str(self.root / name.lstrip("/"))

    # systemd

    def start(self) -> None:
        config = Path(self.path("/etc/ctsyncd/ctsyncd.conf")).read_text()
        if self.read_unit != self.unit():
            raise AssertionError("systemd was not told of the new unit")
        self.active = not (self.refuse and self.refuse in config)
        if not self.active:
            raise _systemd.SystemdError("systemctl restart: Job failed", rc=1)
        self.running = {"config": config, "program": os.readlink(self.path("/usr/sbin/ctsyncd"))}

    def keys(self) -> None:
        """ctsyncd keys."""
        self.calls.append("keys")
        if self.read_unit != self.unit():
            raise AssertionError("systemd was not told of the new unit: a restart would not find the keys")
        if self.keeps_keys:
            raise _systemd.SystemdError("ctsyncd: the keys stay as they are: fw2 sends with key 1", rc=1)
        config = Path(layout.CONFIG).read_text()
        for number in json.loads(config)["keys"]:
            self.held[number] = Path(layout.key_file(int(number))).read_text().strip()
        self.held = {number: self.held[number] for number in json.loads(config)["keys"]}
        self.running["config"] = config

    def unit(self) -> str:
        path = Path(self.path("/etc/systemd/system/ctsyncd.service"))
        return path.read_text() if path.exists() else ""

    def tmpfiles(self, path: str) -> None:
        """systemd-tmpfiles --create, for the three kinds of line that we use."""
        owners = {"root": 0, "ctsyncd": UID}
        for line in Path(path).read_text().splitlines():
            if line.startswith("#"):
                continue
            kind, target, mode, user, group = line.split()[:5]
            if not os.path.exists(target):
                if kind == "d":
                    os.mkdir(target)
                elif kind == "p":
                    os.mkfifo(target)
                else:
                    Path(target).write_text(line.split()[6])
            os.chown(target, owners[user], owners[group])
            os.chmod(target, int(mode, 8))

    def command(self, program: str, *arguments: str) -> None:
        self.calls.append(program)
        if program in ("useradd", "groupadd"):
            self.account = True
        elif program == "userdel":
            self.account = False
        elif program == "systemd-tmpfiles":
            self.tmpfiles(arguments[-1])
        else:
            raise AssertionError(program)

    def tree(self) -> dict[str, tuple]:
        found = {}
        for path in sorted(self.root.rglob("*")):
            status = path.lstat()
            kind = stat.S_IFMT(status.st_mode)
            content = path.read_bytes() if kind == stat.S_IFREG else os.readlink(path) if path.is_symlink() else None
            found[str(path.relative_to(self.root))] = (kind, stat.S_IMODE(status.st_mode), status.st_uid, content)
        return found


class PlayedService:
    def __init__(self, host: Host) -> None:
        self.host = host

    def version(self):
        return self.host.systemd

    def state(self):
        host = self.host
        stale = host.read_unit != host.unit()
        return _systemd.State(bool(host.unit()), host.active, host.enabled, stale, 0, "")

    def daemon_reload(self):
        self.host.calls.append("daemon-reload")
        self.host.read_unit = self.host.unit()

    def restart(self):
        self.host.calls.append("restart")
        self.host.start()

    def reload(self):
        self.host.calls.append("reload")
        if not self.host.deaf:
            self.host.running["config"] = Path(layout.CONFIG).read_text()

    def stop(self):
        self.host.calls.append("stop")
        self.host.active = False

    def enable(self):
        self.host.enabled = True

    def disable(self):
        self.host.enabled = False

    def reset_failed(self):
        pass

    def journal(self, since):
        return ["systemd: Starting", "ctsyncd: key 1: is wrong", "systemd: Failed"]


@pytest.fixture
def host(tmp_path, monkeypatch):
    played = Host(tmp_path)
    for name in PATHS:
        monkeypatch.setattr(layout, name, played.path(getattr(layout, name)))
    monkeypatch.setattr(module_under_test, "RESTART_PENDING", played.path("/run/ctsyncd.restart-pending"))
    monkeypatch.setattr(
        module_under_test.Installation,
        "_digest_in_use",
        lambda installation: hashlib.sha256(played.running["config"].encode()).hexdigest(),
    )
    monkeypatch.setattr(module_under_test.Installation, "_hand_over_keys", lambda installation: played.keys())
    monkeypatch.setattr(_systemd, "booted", lambda: True)
    monkeypatch.setattr(_systemd, "Service", lambda module, name: PlayedService(played))

    def refresh(account):
        account.uid, account.gid = (UID, GID) if played.account else (None, None)

    monkeypatch.setattr(module_under_test.Account, "refresh", refresh)
    monkeypatch.setattr(module_under_test.Installation, "_command", lambda installation, *words: played.command(*words))
    return played


def run(check=False, diff=True, **changes):
    arguments = {
        "node": "fw1",
        "peers": [{"node": "fw2", "address": "192.168.100.2"}],
        "link": {"interface": "eth2", "address": "192.168.100.1"},
        "virtual_ips": [{"interface": "eth1", "address": "192.168.0.100/24"}],
        "keys": [{"id": 1, "key": SECRET}],
        "interpreter": sys.executable,
        **changes,
        "_ansible_check_mode": check,
        "_ansible_diff": diff,
    }

    def leave(module, **result):
        raise Exit(result)

    with patch_module_args(arguments), pytest.MonkeyPatch.context() as patch:
        patch.setattr(AnsibleModule, "exit_json", leave)
        patch.setattr(
            AnsibleModule, "fail_json", lambda module, msg, **more: leave(module, msg=msg, failed=True, **more)
        )
        with pytest.raises(Exit) as caught:
            module_under_test.main()
    return caught.value.result


def predicted_and_done(host, **changes):
    """Run in check mode, then in earnest, then again; the three must agree."""
    before, calls = host.tree(), list(host.calls)
    prediction = run(check=True, **changes)
    assert host.tree() == before
    assert host.calls == calls
    result = run(**changes)
    assert prediction == result
    again = run(**changes)
    assert (again.get("failed"), again["changed"], again["action"], again["changes"]) == (None, False, "none", [])
    return result


@needs_root
def test_first_run_installs_everything_and_the_second_nothing(host):
    result = predicted_and_done(host)
    assert (result["changed"], result["action"]) == (True, "started")
    assert host.enabled
    tree = host.tree()
    assert tree["etc/ctsyncd/keys/1.key"] == (stat.S_IFREG, 0o600, 0, SECRET.encode() + b"\n")
    assert tree["etc/ctsyncd/keys"][1] == 0o700
    assert tree["etc/ctsyncd/ctsyncd.conf"][:3] == (stat.S_IFREG, 0o640, 0)
    assert os.stat(layout.CONFIG).st_gid == GID
    assert tree["run/ctsync/not-ready"] == (stat.S_IFREG, 0o644, UID, b"1")
    assert tree["run/ctsync/notify.fifo"][:3] == (stat.S_IFIFO, 0o640, 0)
    settings = daemon_config.parse(Path(layout.CONFIG).read_text())
    assert (settings.node, settings.virtual_ips[0].address, dict(settings.keys)) == (
        "fw1",
        "192.168.0.100",
        {1: "key-1"},
    )
    shown = subprocess.run([layout.COMMAND, "-v"], check=True, capture_output=True, text=True).stdout
    assert shown == f"ctsyncd {result['version']}\n"
    assert _zipapp.read_build(layout.COMMAND)["digest"] == result["digest"]
    assert not [name for name in tree if "ctsync-" in os.path.basename(name)]  # no temporary file is left


@needs_root
def test_event_buffer_is_made_for_the_host_unless_it_is_given(host, monkeypatch):
    found = {"table": 262_144, "memory": 8 << 30}
    monkeypatch.setattr(module_under_test._buffers, "read_table_size", lambda: found["table"])
    monkeypatch.setattr(module_under_test._buffers, "read_memory", lambda: found["memory"])
    assert predicted_and_done(host)["config"]["netlink_buffer_bytes"] == 128 << 20
    found["table"] = 65_536
    result = predicted_and_done(host)
    assert (result["config"]["netlink_buffer_bytes"], result["action"]) == (32 << 20, "reloaded")
    assert predicted_and_done(host, table_size=262_144)["config"]["netlink_buffer_bytes"] == 128 << 20
    assert predicted_and_done(host, netlink_buffer_bytes=1 << 20)["config"]["netlink_buffer_bytes"] == 1 << 20
    assert "table_size: -1 is negative" in run(table_size=-1)["msg"]


@needs_root
def test_unit_suits_the_systemd_of_the_host(host):
    host.systemd = 247
    assert run()["changed"]
    assert "ExecStartPre=" not in host.unit()
    assert not run()["changed"]
    host.systemd = 257
    assert run()["changed"]
    assert "ExecStartPre=" in host.unit()


@needs_root
def test_no_key_is_ever_in_a_result(host):
    run()
    result = run(keys=[{"id": 1, "key": SECRET2}, {"id": 2, "key": SECRET}], send_key=2)
    assert result["changed"]
    assert SECRET not in json.dumps(result)
    assert SECRET2 not in json.dumps(result)


@needs_root
def test_changed_option_restarts_and_shows_the_difference(host):
    run()
    result = predicted_and_done(host, replicate=False)
    assert (result["action"], result["changes"]) == ("restarted", [layout.CONFIG])
    (diff,) = result["diff"]
    assert '"replicate": true' in diff["before"]
    assert '"replicate": false' in diff["after"]
    assert '"replicate": false' in host.running["config"]


LIVE = {"window_ms": 9, "filter": {"protocols": ["tcp"]}, "log_level": "debug"}


@needs_root
def test_options_that_may_change_while_it_runs_are_reloaded(host, tmp_path):
    run()
    host.calls.clear()
    result = predicted_and_done(host, **LIVE)
    assert (result["action"], result["changes"]) == ("reloaded", [layout.CONFIG])
    assert host.calls == ["reload"]
    assert '"window_ms": 9' in host.running["config"]
    assert daemon_config.parse(host.running["config"]).filter.protocols == (6,)
    assert predicted_and_done(host, **LIVE, mode="external-cache")["action"] == "restarted"
    other = tmp_path / "python"
    other.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n', encoding="utf-8")
    other.chmod(0o755)
    assert predicted_and_done(host, **{**LIVE, "interpreter": str(other)})["action"] == "restarted"
    assert predicted_and_done(host, **LIVE, running=False)["action"] == "stopped"
    assert not os.path.exists(module_under_test.RESTART_PENDING)


@needs_root
def test_daemon_that_does_not_reload_is_restarted(host, monkeypatch):
    run()
    host.deaf = True
    monkeypatch.setattr(module_under_test, "RELOAD_TIMEOUT_S", 0.0)
    assert run(window_ms=9)["action"] == "restarted"
    assert host.calls[-2:] == ["reload", "restart"]
    assert '"window_ms": 9' in host.running["config"]


@needs_root
def test_module_killed_between_configuration_and_reload_is_completed_by_the_next_run(host, monkeypatch):
    run()

    class Killed(BaseException):
        pass

    def die(service):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(PlayedService, "reload", die)
        with pytest.raises(Killed):
            run(window_ms=9)
    assert '"window_ms": 9' not in host.running["config"]
    assert run(window_ms=9)["action"] == "restarted"
    assert '"window_ms": 9' in host.running["config"]


@needs_root
def test_keys_rotate_in_three_steps(host):
    run()
    both = [{"id": 1, "key": SECRET}, {"id": 2, "key": SECRET2}]
    result = predicted_and_done(host, keys=both, send_key=1)
    assert {layout.key_file(2), layout.UNIT_FILE, layout.CONFIG} <= set(result["changes"])
    assert host.held == {"1": SECRET, "2": SECRET2}
    assert predicted_and_done(host, keys=both, send_key=2)["changes"] == [layout.CONFIG]
    result = predicted_and_done(host, keys=both[1:], send_key=2)
    assert layout.key_file(1) in result["changes"]
    assert host.held == {"2": SECRET2}
    assert host.calls.count("restart") == 1  # the start
    assert host.calls[-1] == "keys"
    assert os.listdir(layout.KEY_DIRECTORY) == ["2.key"]
    assert "key-1" not in host.unit()


@needs_root
@pytest.mark.parametrize("keys", [[{"id": 1, "key": SECRET2}], [{"id": 2, "key": SECRET2}]])
def test_keys_that_the_daemon_does_not_take_leave_everything_as_it_was(host, keys):
    run()
    good, running, restarts = host.tree(), dict(host.running), host.calls.count("restart")
    host.keeps_keys = True
    result = run(keys=keys)
    assert (result["failed"], result["rolled_back"]) == (True, True)
    assert "fw2 sends with key 1" in result["msg"]
    assert SECRET2 not in json.dumps(result)
    assert (host.tree(), host.running, host.calls.count("restart")) == (good, running, restarts)
    assert run()["changed"] is False


@needs_root
def test_keys_and_what_needs_a_restart_are_one_restart(host):
    run()
    result = predicted_and_done(host, keys=[{"id": 1, "key": SECRET2}], replicate=False)
    assert result["action"] == "restarted"
    assert "keys" not in host.calls


@needs_root
def test_key_file_that_the_daemon_has_not_read_is_handed_over_by_the_next_run(host):
    """Killed after the files were written: nothing is left to write, and a step of the rotation is not skipped."""
    run()

    class Killed(BaseException):
        pass

    def die():
        raise Killed

    both = {"keys": [{"id": 1, "key": SECRET}, {"id": 2, "key": SECRET2}], "send_key": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "keys", die)
        with pytest.raises(Killed):
            run(**both)
    assert host.held == {}
    result = predicted_and_done(host, **both)
    assert (result["changed"], result["action"], result["changes"]) == (True, "rekeyed", [])
    assert host.held == {"1": SECRET, "2": SECRET2}
    host.keeps_keys = True
    Path(module_under_test.RESTART_PENDING).write_bytes(module_under_test.KEYS_PENDING)
    assert "the daemon goes on as it was" in run(**both)["msg"]


@needs_root
@pytest.mark.parametrize(
    ("damage", "repaired"),
    [
        (lambda: Path(layout.CONFIG).write_text("{}\n"), "CONFIG"),
        (lambda: os.chmod(layout.CONFIG, 0o644), "CONFIG"),
        (lambda: os.remove(layout.UNIT_FILE), "UNIT_FILE"),
        (lambda: os.chown(layout.KEY_DIRECTORY, UID, 0), "KEY_DIRECTORY"),
        (lambda: _files.link(layout.COMMAND, "/bin/true"), "COMMAND"),
        (lambda: os.remove(layout.TMPFILES), "TMPFILES"),
    ],
)
def test_edit_from_outside_is_repaired(host, damage, repaired):
    run()
    good = host.tree()
    damage()
    assert predicted_and_done(host)["changes"] == [getattr(layout, repaired)]
    assert host.tree() == good


@needs_root
def test_archive_with_the_right_name_and_wrong_bytes_is_replaced(host):
    program = run()["program"]
    data = Path(program).read_bytes()
    Path(program).write_bytes(data.replace(b"keepalived", b"keepaliveD"))
    assert predicted_and_done(host)["changes"] == [program]
    assert Path(program).read_bytes() == data


@needs_root
def test_lost_fifo_is_made_again_with_its_owner(host):
    run()
    os.remove(layout.NOTIFY_FIFO)
    result = predicted_and_done(host)
    assert result["action"] == "restarted"
    assert (os.stat(layout.NOTIFY_FIFO).st_gid, stat.S_IMODE(os.stat(layout.NOTIFY_FIFO).st_mode)) == (GID, 0o640)


@needs_root
def test_upgrade_keeps_the_former_version_and_no_more(host, monkeypatch):
    programs = [run()["program"]]
    for version in ("0.2.0", "0.3.0"):
        monkeypatch.setattr(module_under_test.daemon, "__version__", version)
        sources = {**_zipapp.package_sources(module_under_test.daemon), "ctsyncd/extra.py": version.encode() + b"\n"}
        sources["ctsyncd/extra.py"] = f"V = {version!r}\n".encode()
        monkeypatch.setattr(_zipapp, "package_sources", lambda package, sources=sources: sources)
        result = predicted_and_done(host)
        assert result["action"] == "restarted"
        programs.append(result["program"])
        assert host.running["program"] == result["program"]
    left = sorted(os.path.join(layout.LIBRARY, name) for name in os.listdir(layout.LIBRARY))
    assert left == sorted(programs[1:])


@needs_root
def test_daemon_that_does_not_start_is_rolled_back(host):
    run()
    good, running = host.tree(), dict(host.running)
    host.refuse = '"replicate": false'
    result = run(replicate=False, keys=[{"id": 1, "key": SECRET2}, {"id": 3, "key": SECRET}], send_key=1)
    assert result["failed"]
    assert result["rolled_back"] is True
    assert "ctsyncd: key 1: is wrong" in result["msg"]
    assert host.active
    assert host.running == running
    assert host.tree() == good


@needs_root
def test_first_start_that_fails_says_so_and_is_tried_again(host):
    host.refuse = "fw1"
    result = run()
    assert (result["failed"], result["rolled_back"]) == (True, False)
    host.refuse = ""
    result = run()
    assert (result["changed"], result["action"], result["changes"]) == (True, "started", [])


@needs_root
@pytest.mark.parametrize("after", range(3))
def test_module_killed_in_the_middle_is_completed_by_the_next_run(host, monkeypatch, after):
    """Whatever was written, the running daemon learns of it in the end."""
    run()
    done = []
    real_write = _files.write

    class Killed(BaseException):
        pass

    def write(path, *arguments, **more):
        if len(done) == after:
            raise Killed
        done.append(path)
        real_write(path, *arguments, **more)

    changes = {"log_level": "debug", "keys": [{"id": 1, "key": SECRET2}]}
    with (
        monkeypatch.context() as patch,
        patch_module_args(
            {
                "node": "fw1",
                "peers": [{"node": "fw2", "address": "192.168.100.2"}],
                "link": {"interface": "eth2", "address": "192.168.100.1"},
                "virtual_ips": [{"interface": "eth1", "address": "192.168.0.100/24"}],
                "interpreter": sys.executable,
                **changes,
            }
        ),
    ):
        patch.setattr(_files, "write", write)
        with pytest.raises(Killed):
            module_under_test.main()
    assert "debug" not in host.running["config"]
    assert run(**changes)["action"] == "rekeyed"
    assert "debug" in host.running["config"]
    assert host.held == {"1": SECRET2}
    assert run(**changes)["changed"] is False


@needs_root
def test_absent_leaves_nothing_behind(host):
    Path(layout.STATE_DIRECTORY).parent.mkdir(parents=True, exist_ok=True)
    empty = host.tree()
    run()
    Path(layout.LIBRARY, "ctsyncd-0123456789ab.pyz").write_bytes(b"an old one")
    Path(layout.STATE_DIRECTORY).mkdir()
    Path(layout.STATE_DIRECTORY, "2026-11-23T08-00-00Z-active.jsonl").write_bytes(b"{}")
    before = host.tree()
    prediction = run(check=True, state="absent", remove_user=True)
    assert host.tree() == before
    result = run(state="absent", remove_user=True)
    assert result == prediction
    assert (result["changed"], result["action"]) == (True, "stopped")
    assert host.tree() == empty
    assert (host.active, host.enabled, host.account, host.read_unit) == (False, False, False, "")
    result = run(state="absent", remove_user=True)
    assert (result["changed"], result["action"], result["changes"]) == (False, "none", [])


@needs_root
def test_absent_leaves_what_is_not_ours(host):
    run()
    mine = Path(layout.CONFIG_DIRECTORY, "notes.txt")
    mine.write_text("remember\n")
    os.remove(layout.COMMAND)
    os.symlink("/bin/true", layout.COMMAND)
    run(state="absent")
    assert mine.read_text() == "remember\n"
    assert os.readlink(layout.COMMAND) == "/bin/true"
    assert host.account


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"keys": [{"id": 1, "key": "c2hvcnQ="}]}, ["keys[0] (id 1)", "less than 32"]),
        ({"interpreter": "/nonexistent/python3"}, ["interpreter", "/nonexistent/python3 is not there"]),
        ({"interpreter": "/bin/true"}, ["interpreter", "does not run Python"]),
        ({"interpreter": "python3 -B"}, ["interpreter", "absolute path"]),
        ({"dead_after_ms": 200, "window_ms": 4000}, ["dead_after_ms", "window_ms"]),
        ({"send_key": 9}, ["send_key", "not in keys"]),
        ({"peers": [{"node": "fw1", "address": "192.168.100.2"}]}, ["peers[0].node", "own name"]),
        ({"virtual_ips": [{"interface": "eth1", "address": "192.168.0.300"}]}, ["virtual_ips[0].address"]),
        ({"keys": None}, ["missing", "keys"]),
    ],
)
def test_bad_option_is_refused_before_anything_changes(host, changes, words):
    before = host.tree()
    for check in (True, False):
        result = run(check=check, **changes)
        assert result["failed"]
        for word in words:
            assert word in result["msg"]
        assert "Traceback" not in result["msg"]
    assert host.tree() == before
    assert host.calls == []


def test_missing_library_is_a_warning_in_check_mode_and_an_error_in_earnest(host, monkeypatch):
    monkeypatch.setattr(module_under_test, "PROBE", module_under_test.PROBE.replace("cryptography.hazmat", "nowhere"))
    warnings = []
    monkeypatch.setattr(AnsibleModule, "warn", lambda module, text, **more: warnings.append(text))
    assert run(check=True)["changed"]
    assert "python3-cryptography" in warnings[0]
    assert "python3-cryptography" in run()["msg"]
    assert not os.path.exists(layout.CONFIG_DIRECTORY)


def test_payload_that_ansible_did_not_complete_is_refused(host, monkeypatch):
    sources = _zipapp.package_sources(module_under_test.daemon)
    del sources["ctsyncd/wire.py"]
    monkeypatch.setattr(_zipapp, "package_sources", lambda package: sources)
    result = run()
    assert "payload incomplete" in result["msg"]
    assert result["missing"] == ["ctsyncd/wire.py"]
    assert host.calls == []
