# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import flights, recorder
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.flights import Flights
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.recorder import Recorder


def read(kept: Recorder, offset: float = 0.0) -> list[dict[str, Any]]:
    head, *rest = [json.loads(line) for line in kept.lines(offset, node="fw1")]
    assert head == {"recorder": recorder.SCHEMA, "node": "fw1"}
    return rest


def test_notes_and_samples_come_out_in_the_order_in_which_they_happened() -> None:
    kept = Recorder()
    kept.sample(1.0, [{"events": 0}])
    kept.note(1.5, "verdict", verdict="READY")
    kept.sample(2.0, [{"events": 7, "overruns": 1}], lag_s=0.25)
    kept.note(2.0, "peer", state="silent")
    assert read(kept, 1000.0) == [
        {"at": 1001.5, "note": "verdict", "verdict": "READY"},
        {"at": 1002.0, "sample_s": 1.0, "lag_s": 0.25, "counted": {"events": 7, "overruns": 1}},
        {"at": 1002.0, "note": "peer", "state": "silent"},
    ]


def test_a_quiet_second_makes_no_sample_and_is_not_counted_again() -> None:
    kept = Recorder()
    kept.sample(1.0, [{"events": 3, "datagrams_sent": 1}])
    kept.sample(2.0, [{"events": 3, "datagrams_sent": 3, "bytes_sent": 200}])  # signs of life
    kept.sample(3.0, [{"events": 3, "datagrams_sent": 3, "bytes_sent": 200}])
    assert read(kept) == []
    kept.sample(4.0, [{"events": 4, "datagrams_sent": 5, "bytes_sent": 300}])
    assert [line["counted"] for line in read(kept)] == [{"events": 1, "datagrams_sent": 2, "bytes_sent": 100}]


def test_counters_of_several_places() -> None:
    kept = Recorder()
    kept.sample(1.0, [{"events": 3}, {"datagrams_sent": 1, "refused": 1}, {"refused": 5}])
    kept.sample(2.0, [{"events": 3}, {"datagrams_sent": 2, "refused": 1}, {"refused": 5}])
    assert read(kept) == []
    kept.sample(3.0, [{"events": 3}, {"datagrams_sent": 3, "refused": 2}, {"refused": 7, "bytes_sent": 1}])
    assert [line["counted"] for line in read(kept)] == [{"bytes_sent": 1, "datagrams_sent": 1, "refused": 3}]


def test_memory_is_bounded_whatever_happens() -> None:
    kept = Recorder()
    for number in range(5000):
        kept.note(float(number), "verdict", reasons=["x" * 500] * 100)
        kept.sample(float(number), [{f"counter_{n}": number for n in range(50)}])
    lines = list(kept.lines(0.0))
    assert len(kept) == recorder.NOTES + recorder.SAMPLES == len(lines) - 1
    assert max(map(len, lines)) < recorder.NOTE_BYTES + 200
    assert json.loads(lines[-1])["at"] == 4999.0  # the newest are kept


def test_a_story_is_complete_some_time_after_the_last_transition_and_told_once() -> None:
    kept = Recorder()
    kept.transition(5.0, "active")
    kept.transition(9.0, "backup")
    assert kept.finished(9.0 + recorder.FOLLOWED_S - 0.1) == ""
    assert kept.finished(9.0 + recorder.FOLLOWED_S) == "backup"
    assert kept.finished(100.0) == ""
    kept.transition(200.0, "active")
    assert kept.finished(200.0, at_once=True) == "active"


def stories(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


def test_stories_are_kept_and_the_oldest_go(tmp_path: Path) -> None:
    kept = Flights(str(tmp_path))
    for number in range(flights.KEPT + 3):
        kept.keep("active", lambda number=number: [f'{{"number": {number}}}'])  # type: ignore[misc]
        kept.finish(30)
    assert (kept.written, kept.problem) == (flights.KEPT + 3, "")
    numbers = {json.loads((tmp_path / name).read_text())["number"] for name in stories(tmp_path)}
    assert numbers == set(range(3, flights.KEPT + 3))
    assert all(name.endswith(".jsonl") and "-active" in name for name in stories(tmp_path))


def test_a_full_disk_is_a_problem_until_it_is_not(tmp_path: Path) -> None:
    directory = tmp_path / "state"
    kept = Flights(str(directory))
    kept.keep("active", lambda: ["{}"])
    kept.finish(30)
    assert kept.problem == f"flight recorder: cannot write to {directory}: No such file or directory"
    directory.mkdir()
    kept.keep("active", lambda: ["{}"])
    kept.finish(30)
    assert (kept.problem, len(stories(directory))) == ("", 1)


def test_a_disk_that_hangs_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    back = threading.Event()
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: (back.wait(60), replace(*paths)))
    kept = Flights(str(tmp_path))
    kept.keep("active", lambda: ["{}"])
    kept.keep("backup", lambda: ["{}"])  # does not wait
    kept.finish(0.0)
    assert kept.problem == f"flight recorder: {tmp_path} does not answer: a story was not kept"
    back.set()
    kept.finish(30)
    assert (kept.problem, len(stories(tmp_path))) == ("", 1)


def test_without_a_directory_nothing_is_kept() -> None:
    kept = Flights("")
    kept.keep("active", lambda: pytest.fail("nobody wants it"))
    assert kept.problem == ""
