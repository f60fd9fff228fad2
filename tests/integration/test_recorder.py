# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The flight recorder of a real node: what led to a take-over and what followed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable

import pytest
from integration.cluster import Cluster, Daemon
from integration.netns import wait_for

pytestmark = pytest.mark.netns


def recorded(daemon: Daemon) -> list[dict[str, Any]]:
    return [json.loads(line) for line in daemon.ask("recorder").splitlines()]


def test_a_take_over_leaves_its_story(cluster: Callable[..., Cluster], tmp_path: Path) -> None:
    lab = cluster()
    kept = tmp_path / "state"
    kept.mkdir()
    lab.fw2.environment = {**lab.fw2.environment, "STATE_DIRECTORY": str(kept)}
    lab.up()
    session = lab.session()
    session.talk()
    lab.replicated(lab.fw1, lab.fw2)
    wait_for(lambda: any("kernel_created" in line.get("counted", ()) for line in recorded(lab.fw2)), "a sample")
    lab.power_cut(lab.fw1, lab.fw2)
    session.talk()
    wait_for(lambda: list(kept.glob("*-active.jsonl")), "the story", 60)
    head, *lines = [json.loads(line) for line in next(kept.glob("*-active.jsonl")).read_text().splitlines()]
    assert (head["recorder"], head["node"], head["role"]) == (1, "fw2", "active")
    notes = [
        (line["note"], line.get("state") or line.get("role") or line.get("verdict")) for line in lines if "note" in line
    ]
    taken = notes.index(("role", "active"))
    assert notes.index(("role", "backup")) < notes.index(("verdict", "READY")) < taken
    assert notes.index(("peer", "up")) < taken
    assert ("peer", "silent") in notes
    assert [line["at"] for line in lines] == sorted(line["at"] for line in lines)


def test_without_a_state_directory_the_story_is_in_memory_only(cluster: Callable[..., Cluster]) -> None:
    lab = cluster().up()
    assert any(line.get("note") == "verdict" for line in recorded(lab.fw1))
    lab.fw1.stop()
    assert not list(lab.fw1.home.glob("*.jsonl"))
