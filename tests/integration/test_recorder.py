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
from integration.netns import Namespace, Pair, wait_for

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
    lab.back_and_equal(lab.fw1, lab.fw2)


def story(kept: Path, role: str) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """What a file about a transition to this role begins with, and its roles and verdicts in their order."""
    (path,) = kept.glob(f"*-{role}.jsonl")
    head, *lines = [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]
    assert [line["at"] for line in lines] == sorted(line["at"] for line in lines)
    return head, [
        (line["note"], str(line.get("role") or line.get("verdict")))
        for line in lines
        if line.get("note") in ("role", "verdict", "stop")
    ]


@pytest.mark.long
def test_the_node_that_gives_its_addresses_away_leaves_its_story_as_well(
    cluster: Callable[..., Cluster], tmp_path: Path
) -> None:
    """In the middle of a hand-over that stands still, and at its end; there the daemon is stopped before ten seconds
    have passed."""
    lab = cluster()
    kept = tmp_path / "state"
    kept.mkdir()
    lab.fw1.environment = {**lab.fw1.environment, "STATE_DIRECTORY": str(kept)}
    lab.up()
    inside, outside = ((interface, both) for interface, *both in Pair.VIPS)
    give_away(lab.pair.fw1, *inside)
    wait_for(lambda: list(kept.glob("*-transition.jsonl")), "the story of a node with half of its addresses", 60)
    head, notes = story(kept, "transition")
    assert (head["node"], head["role"]) == ("fw1", "transition")
    assert notes.index(("role", "active")) < notes.index(("role", "transition"))
    assert not list(kept.glob("*-active.jsonl")), "a story goes on into the next one"

    give_away(lab.pair.fw1, *outside)
    lab.pair.activate(lab.pair.fw2)
    lab.ready(lab.fw2, lab.fw1)
    lab.verified()
    lab.fw1.stop()
    head, notes = story(kept, "backup")
    assert (head["node"], head["role"]) == ("fw1", "backup")
    yielded = notes.index(("role", "backup"), notes.index(("role", "transition")))
    # Noted are changes: where the other node's table is here at once, it never was anything but READY.
    verdicts = [note for note in notes[yielded:] if note[0] == "verdict"]
    assert verdicts[-1:] in ([], [("verdict", "READY")])
    assert notes[-1][0] == "stop"


def give_away(firewall: Namespace, interface: str, addresses: list[str]) -> None:
    for address in addresses:
        firewall.ip("address", "del", address, "dev", interface)


def test_without_a_state_directory_the_story_is_in_memory_only(cluster: Callable[..., Cluster]) -> None:
    lab = cluster().up()
    assert any(line.get("note") == "verdict" for line in recorded(lab.fw1))
    lab.fw1.stop()
    assert not list(lab.fw1.home.glob("*.jsonl"))
