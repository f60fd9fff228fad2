# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""An older daemon and this one work together on what both know: two versions, built from two commits."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Callable

import pytest
from integration.cluster import PACKAGE, Daemon
from integration.load import Load
from integration.netns import wait_for

pytestmark = pytest.mark.netns

ROOT = Path(__file__).resolve().parents[2]
OLDER = "d7ac7042b91d"  # protocol version 2, before nodes told more than flows
SESSIONS = 60


@pytest.fixture
def older(tmp_path: Path) -> Path:
    """The package of the older commit, in a directory of its own."""
    if not (ROOT / ".git").exists():
        pytest.skip("no history here: run this in a clone")
    done = subprocess.run(
        ["git", "-C", str(ROOT), "archive", OLDER, "plugins/module_utils/ctsyncd"], capture_output=True, check=False
    )
    assert done.returncode == 0, f"{done.stderr.decode()}: the clone must be a full one (git fetch --unshallow)"
    subprocess.run(["tar", "-x", "-C", str(tmp_path)], input=done.stdout, check=True)
    return tmp_path / "plugins" / "module_utils"


def run_version(daemon: Daemon, package: Path) -> None:
    daemon.environment = {**daemon.environment, "PYTHONPATH": str(package)}
    daemon.package = package


@pytest.mark.parametrize("which", ["fw1", "fw2"])
def test_sessions_survive_between_an_older_and_this_version(load: Callable[..., Load], older: Path, which: str) -> None:
    """Either is active first; then the active node is cut, comes back with an empty table, and the other is cut."""
    lab = load(SESSIONS)
    old = getattr(lab, which)
    new = lab.fw2 if old is lab.fw1 else lab.fw1
    run_version(old, older)
    lab.up()
    assert "fit" in new.status() and "fit" not in old.status()  # they are two versions indeed
    lab.open()
    lab.replicated_all()
    skipped = old.status()["counters"]["skipped_unknown_record"]
    assert skipped >= 1
    assert new.status()["differences"] == []
    lab.seal()
    for dummy in range(2):
        lab.cut()
        found = lab.prove(60.0)
        assert (found["proved"], found["lost"], found["resets"]) == (SESSIONS, {}, 0)
        lab.come_back("restarted", "empty")
        lab.replicated_all()
    for daemon in (old, new):
        counters = daemon.status()["counters"]
        assert not {name: n for name, n in counters.items() if n and name.endswith("_malformed")}
        assert "Traceback" not in daemon.log()
    run_version(old, PACKAGE)  # it is upgraded: the version before could not tell whether the tables are equal
    old.kill()
    old.start()
    lab.replicated_all()
    lab.verified()


def test_without_replication_between_them_everything_dies(load: Callable[..., Load], older: Path) -> None:
    """The negative control."""
    lab = load(SESSIONS, replicate=False)
    run_version(lab.fw1, older)
    lab.pair.activate(lab.pair.fw1)
    lab.fw1.start()
    lab.fw2.start()
    wait_for(lambda: lab.fw2.status()["role"] == "backup" and lab.fw1.status()["role"] == "active", "both to run")
    lab.open()
    lab.seal()
    lab.cut()
    assert lab.prove(3.0)["proved"] == 0
