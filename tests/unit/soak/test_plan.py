# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The plan of a run: the seed alone decides, and no two faults together rightly lose a session."""

from __future__ import annotations

import itertools
import json

import pytest
from soak import faults, plan


def first(seed: int, count: int, minutes: float = 60.0) -> list[plan.Step]:
    return list(itertools.islice(plan.steps(seed, minutes), count))


def test_the_same_seed_gives_the_same_plan() -> None:
    assert first(7, 300) == first(7, 300)
    assert first(7, 300) != first(8, 300)


def test_a_plan_can_be_recorded_and_read_back() -> None:
    for step in first(3, 200):
        assert plan.Step(**json.loads(json.dumps(step._asdict()))) == step
        assert step.fault in str(step) and (step.link == "calm" or step.link in str(step))


def test_every_fault_and_every_link_comes_up() -> None:
    steps = first(1, 163)  # of an hour
    assert {step.fault for step in steps} == set(plan.BY_NAME)
    assert {step.link for step in steps} == {link.name for link in plan.LINKS}


@pytest.mark.parametrize("seed", range(20))
def test_processes_live_through_the_second_part(seed: int) -> None:
    """Otherwise nothing could be said of their growth."""
    minutes = 30.0
    steps = first(seed, 200, minutes)
    last = max(step.number for step in steps if plan.BY_NAME[step.fault].restarts)
    share = last * plan.NOMINAL_STEP_S / (minutes * 60)
    assert share <= plan.RESTARTS_PART + 0.02
    later = {step.fault for step in steps if step.number > last}
    assert later == {fault.name for fault in plan.FAULTS if not fault.restarts}


@pytest.mark.parametrize("seed", range(20))
def test_a_fault_that_stops_the_link_comes_on_a_calm_one(seed: int) -> None:
    """It sets the link's condition itself, and puts it back to calm."""
    for step in first(seed, 300):
        if plan.BY_NAME[step.fault].blind:
            assert (step.link, step.link_values) == ("calm", {})


def test_every_fault_can_be_done() -> None:
    assert set(faults.ACTS) == set(plan.BY_NAME)


def test_no_link_stops_everything() -> None:
    """The pair has to become READY on each of them."""
    for step in first(5, 2000):
        values = step.link_values
        assert values.get("loss", 0) <= 0.3 and values.get("corrupt", 0) <= 0.1
        assert "deaf" not in values and "frame_bytes" not in values
