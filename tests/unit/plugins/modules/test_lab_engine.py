# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The engine's life with stand-ins for docker and dockerd: real processes, a real pid file, no engine."""

from __future__ import annotations

import os
import signal

import pytest
from ansible_collections.ctsync.ha_firewall.plugins.module_utils import _lab
from ansible_collections.ctsync.ha_firewall.plugins.modules import lab_engine

# Runs until SIGTERM; "answers" from the moment its socket (here: a file) is there.
DOCKERD = """#!/bin/sh
echo "$*" >{folder}/arguments
for option; do case $option in --pidfile=*) echo $$ >"${{option#*=}}" ;; esac; done
trap 'rm -f {folder}/up; exit 0' TERM
[ -e {folder}/broken ] && {{ echo "no space left on device"; exit 1; }}
: >{folder}/up
while :; do sleep 0.05; done
"""
DOCKER = """#!/bin/sh
[ -e {folder}/up ] || exit 1
[ "$1" = ps ] && cat {folder}/containers
exit 0
"""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with Debian's engine installed, not running, and no systemd."""
    (tmp_path / "bin").mkdir()
    for name, text in (("dockerd", DOCKERD), ("docker", DOCKER)):
        program = tmp_path / "bin" / name
        program.write_text(text.format(folder=tmp_path), encoding="ascii")
        program.chmod(0o755)
    (tmp_path / "containers").write_text("", encoding="ascii")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setattr(_lab, "STATE_DIRECTORY", str(tmp_path / "state"))
    monkeypatch.setattr(_lab, "RUN_DIRECTORY", str(tmp_path / "run"))
    monkeypatch.setattr(lab_engine, "ENGINE_PATHS", (str(tmp_path / "run-docker"),))
    real = os.path.isdir
    monkeypatch.setattr(os.path, "isdir", lambda path: path != "/run/systemd/system" and real(path))
    yield tmp_path
    pid = _lab.background_pid()
    if pid is not None:
        os.kill(pid, signal.SIGKILL)


def test_an_engine_is_started_once_and_stopped_again(machine):
    assert lab_engine.present(True, 20) == (True, "it would be started")
    assert not (machine / "up").exists()

    changed, how = lab_engine.present(False, 20)
    assert changed
    assert "in the background" in how
    assert "--bridge=none" in (machine / "arguments").read_text(encoding="ascii")
    assert _lab.background_pid() is not None
    assert lab_engine.present(False, 20) == (False, "it was running")

    assert lab_engine.absent(False, 20) == (True, "stopped")
    assert _lab.background_pid() is None
    assert not (machine / "run").exists()
    assert lab_engine.absent(False, 20)[0] is False


def test_what_the_engine_made_outside_of_its_data_goes_with_it(machine):
    lab_engine.present(False, 20)
    (machine / "run-docker").mkdir()
    lab_engine.absent(False, 20)
    assert not (machine / "run-docker").exists()


def test_the_packages_stay_known_and_without_any_nothing_stays(machine):
    _lab.write_record({"packages": ["docker.io"], "started": "systemd"})
    (machine / "state/packages").write_text("python3.11-venv\ndocker.io\n", encoding="ascii")
    for _again in range(2):
        assert _lab.read_record()["packages"] == ["docker.io", "python3.11-venv"]
        lab_engine.forget(_lab.read_record()["packages"])
        assert _lab.read_record()["started"] == ""
    (machine / "state/packages").unlink()
    _lab.write_record({"packages": []})
    lab_engine.forget([])
    assert not (machine / "state").exists()


def test_an_engine_that_somebody_else_uses_is_left_running(machine):
    lab_engine.present(False, 20)
    (machine / "containers").write_text("0123456789ab\n", encoding="ascii")
    changed, how = lab_engine.absent(False, 20)
    assert not changed
    assert "1 other containers" in how
    assert _lab.background_pid() is not None


def test_an_engine_of_somebody_else_is_never_stopped(machine):
    (machine / "up").touch()
    assert lab_engine.present(False, 20) == (False, "it was running")
    changed, how = lab_engine.absent(False, 20)
    assert not changed
    assert "not started for the lab" in how


def test_an_engine_that_does_not_start_says_why(machine):
    (machine / "broken").touch()
    with pytest.raises(_lab.LabError, match="no space left on device"):
        lab_engine.present(False, 1)
