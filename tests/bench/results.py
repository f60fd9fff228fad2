# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Measured values to ratios and verdicts.  Pure: no clock, no files."""

from __future__ import annotations

import math
from typing import Any, Iterable, NamedTuple, Sequence


class Sample(NamedTuple):
    """What one step on one variant gave in one round."""

    step: str
    variant: str
    round: int
    values: dict[str, float]


class Source(NamedTuple):
    """Where a number is found: a variant, a step, one of the step's values."""

    variant: str
    step: str
    value: str


class Row(NamedTuple):
    """A line of the table.  Without ``theirs`` the number itself is judged, else ours ÷ theirs of the same round.

    ``must`` and ``aim`` are limits (None: nothing was asked); ``above``: to be reached, not to be kept to.
    ``scale`` multiplies a number before it is judged and shown, ``unit`` is what it is in then.
    """

    name: str
    group: str
    what: str
    unit: str
    ours: Source
    theirs: Source | None = None
    must: float | None = None
    aim: float | None = None
    above: bool = False
    scale: float = 1.0


class Outcome(NamedTuple):
    """A row with its numbers: medians of both sides; of what is judged the median, least and greatest of all rounds."""

    row: Row
    ours: float
    theirs: float | None
    median: float
    low: float
    high: float
    rounds: int

    @property
    def must_met(self) -> bool | None:
        """The median keeps to what must be; None if nothing must."""
        return keeps(self.median, self.row.must, self.row.above)

    @property
    def always_met(self) -> bool | None:
        """The worst round does, too."""
        return keeps(self.low if self.row.above else self.high, self.row.must, self.row.above)

    @property
    def aim_met(self) -> bool | None:
        """The median keeps to what was aimed at."""
        return keeps(self.median, self.row.aim, self.row.above)


def keeps(value: float, limit: float | None, above: bool) -> bool | None:
    """Is a value within its limit?  None without a limit."""
    if limit is None:
        return None
    return value >= limit if above else value <= limit


def median(values: Iterable[float]) -> float:
    """The middle one, or the mean of the two in the middle; ValueError without any."""
    return quantile(values, 0.5)


def quantile(values: Iterable[float], part: float) -> float:
    """The value below which ``part`` of the values lie, interpolated; ValueError without any."""
    ordered = sorted(values)
    if not ordered:
        raise ValueError("no values")
    place = part * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def found(samples: Sequence[Sample], source: Source) -> dict[int, float]:
    """A source's numbers by round; the median where a round measured it several times."""
    by_round: dict[int, list[float]] = {}
    for sample in samples:
        if (sample.variant, sample.step) == (source.variant, source.step) and source.value in sample.values:
            by_round.setdefault(sample.round, []).append(sample.values[source.value])
    return {number: median(values) for number, values in by_round.items()}


def evaluate(rows: Iterable[Row], samples: Sequence[Sample]) -> list[Outcome]:
    """The rows that were measured.  Ratios are formed within a round, of runs that stood next to each other."""
    outcomes = []
    for row in rows:
        ours = {number: value * row.scale for number, value in found(samples, row.ours).items()}
        if row.theirs is None:
            judged = ours
            theirs: dict[int, float] = {}
        else:
            theirs = {number: value * row.scale for number, value in found(samples, row.theirs).items()}
            judged = {n: ours[n] / theirs[n] for n in ours.keys() & theirs.keys() if theirs[n] > 0}
        if not judged:
            continue
        values = list(judged.values())
        outcomes.append(
            Outcome(
                row,
                median(ours.values()),
                median(theirs.values()) if theirs else None,
                median(values),
                min(values),
                max(values),
                len(values),
            )
        )
    return outcomes


def as_json(outcomes: Iterable[Outcome]) -> list[dict[str, Any]]:
    """The outcomes as plain objects."""
    return [
        {
            "name": o.row.name,
            "what": o.row.what,
            "judged": "ratio" if o.row.theirs else o.row.unit,
            "ours": o.ours,
            "theirs": o.theirs,
            "unit": o.row.unit,
            "median": o.median,
            "min": o.low,
            "max": o.high,
            "rounds": o.rounds,
            "must": o.row.must,
            "aim": o.row.aim,
            "must_met": o.must_met,
            "must_met_in_every_round": o.always_met,
            "aim_met": o.aim_met,
        }
        for o in outcomes
    ]


def from_json(objects: Iterable[dict[str, Any]]) -> list[Sample]:
    """Samples out of a result file."""
    return [Sample(o["step"], o["variant"], o["round"], dict(o["values"])) for o in objects]


def curve(samples: Sequence[Sample], variant: str, prefix: str, value: str) -> list[tuple[float, float]]:
    """Points (table size, median) out of the steps ``PREFIX-SIZE``, by size."""
    points: dict[float, list[float]] = {}
    for sample in samples:
        name, _dash, size = sample.step.rpartition("-")
        if sample.variant == variant and name == prefix and size.isdigit() and value in sample.values:
            points.setdefault(float(size), []).append(sample.values[value])
    return sorted((size, median(values)) for size, values in points.items())
