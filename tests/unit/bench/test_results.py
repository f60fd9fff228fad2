# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The benchmark's arithmetic: ratios within rounds, medians, verdicts."""

from __future__ import annotations

import pytest
from bench import goals, results, scenarios
from bench.daemons import VARIANTS
from bench.results import Row, Sample, Source


def sample(variant: str, number: int, value: float, step: str = "real", name: str = "cpu") -> Sample:
    return Sample(step, variant, number, {name: value})


RATIO = Row("r", "g", "w", "µs", Source("ours", "real", "cpu"), Source("theirs", "real", "cpu"), must=0.5, aim=0.2)


@pytest.mark.parametrize(
    ("values", "part", "expected"),
    [((3, 1, 2), 0.5, 2), ((1, 2, 3, 10), 0.5, 2.5), ((7,), 0.99, 7), ((0, 100), 0.99, 99), ((5, 4, 9), 1.0, 9)],
)
def test_quantiles_are_interpolated(values: tuple[float, ...], part: float, expected: float) -> None:
    assert results.quantile(values, part) == pytest.approx(expected)


def test_nothing_has_no_median() -> None:
    with pytest.raises(ValueError, match="no values"):
        results.median([])


def test_ratios_are_formed_within_a_round() -> None:
    """A noisy round, twice as slow for both, does not show."""
    samples = [sample("ours", 0, 1), sample("theirs", 0, 4), sample("ours", 1, 2), sample("theirs", 1, 8)]
    samples += [sample("ours", 2, 3), sample("theirs", 2, 6), sample("ours", 3, 99)]  # round 3: theirs failed
    (one,) = results.evaluate([RATIO], samples)
    assert (one.median, one.low, one.high, one.rounds) == (0.25, 0.25, 0.5, 3)
    assert (one.ours, one.theirs) == (2.5, 6)


def test_runs_of_the_same_round_count_once() -> None:
    samples = [sample("ours", 0, value) for value in (1, 2, 9)] + [sample("theirs", 0, 4)]
    assert results.evaluate([RATIO], samples)[0].median == 0.5


def test_a_row_without_numbers_is_left_out_and_never_met() -> None:
    assert results.evaluate([RATIO], [sample("ours", 0, 1)]) == []
    assert results.evaluate([RATIO], [sample("ours", 0, 1), sample("theirs", 0, 0)]) == []


@pytest.mark.parametrize(("ours", "must", "aim"), [(5, True, False), (5.01, False, False), (2, True, True)])
def test_limits_are_inclusive(ours: float, must: bool, aim: bool) -> None:
    (one,) = results.evaluate([RATIO], [sample("ours", 0, ours), sample("theirs", 0, 10)])
    assert (one.must_met, one.aim_met) == (must, aim)


def test_the_worst_round_tells_whether_a_limit_always_holds() -> None:
    samples = [sample("theirs", n, 10) for n in range(3)] + [sample("ours", n, v) for n, v in enumerate((1, 2, 6))]
    (one,) = results.evaluate([RATIO], samples)
    assert (one.must_met, one.always_met) == (True, False)
    more = RATIO._replace(must=0.15, aim=None, above=True)
    (one,) = results.evaluate([more], samples)
    assert (one.must_met, one.always_met, one.aim_met) == (True, False, None)


def test_a_number_can_stand_for_itself() -> None:
    row = Row("r", "g", "w", "MiB", Source("ours", "real", "cpu"), must=40, scale=1 / 1024)
    (one,) = results.evaluate([row], [sample("ours", 0, 40960)])
    assert (one.median, one.theirs, one.must_met) == (40, None, True)


def test_curves_are_ordered_by_size_not_by_name() -> None:
    samples = [sample("ours", n, size + n, f"growth-{size}") for n in (0, 2) for size in (900, 25000, 100000)]
    samples.append(sample("ours", 0, 1, "growth-other"))
    assert results.curve(samples, "ours", "growth", "cpu") == [(900, 901), (25000, 25001), (100000, 100001)]


def test_samples_survive_a_file() -> None:
    one = sample("ours", 2, 1.5)
    assert results.from_json([one._asdict()]) == [one]


def test_every_row_asks_for_something_that_is_measured() -> None:
    """A misspelt step would silently be a row that is never judged."""
    measured = {(session.variant, step) for session in scenarios.SESSIONS for step in session.steps}
    sizes = {size for one in scenarios.SIZES.values() for size in (*one.growth, *one.growth_first)}
    for variant, step in list(measured):
        if step == "growth":
            measured |= {(variant, f"{name}-{size}") for name in ("growth", "commit", "resync") for size in sizes}
    for row in goals.ROWS:
        for source in filter(None, (row.ours, row.theirs)):
            assert (source.variant, source.step) in measured, row.name
            assert source.variant in VARIANTS
    names = [row.name for row in goals.ROWS]
    assert len(names) == len(set(names))
    assert set(goals.NOTES) <= set(names)


def test_odd_rounds_go_the_other_way_round() -> None:
    there, back = (scenarios.sessions((), number) for number in (0, 1))
    assert back == there[::-1]
    assert "real-2000-held" in {step for session in there for step in session.steps}
    assert scenarios.sessions(("idle",), 0) == [
        scenarios.Session("conntrackd", ("idle",)),
        scenarios.Session("ctsyncd", ("idle",)),
    ]
