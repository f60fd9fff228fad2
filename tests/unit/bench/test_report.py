# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The benchmark's page and plots."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from bench import __main__ as command
from bench import report, svg
from bench.goals import NOTES
from bench.results import Sample

ABOUT = {
    "cpu": "A processor",
    "cores": 2,
    "memory_mib": 4096,
    "kernel": "6.1",
    "ctsyncd": "ctsyncd 0.1.0",
    "commit": "abc",
    "python": "Python 3.11",
    "conntrackd": "conntrackd 1.4.7",
    "mode": "quick",
    "rounds": 2,
    "date": "2026-01-01",
    "minutes": 3.0,
    "disturbance": [0.01, 0.02],
    "other_listeners": 0,
    "entry_bytes": 256,
}
COST = {"active_us": 10.0, "backup_us": 5.0, "bytes": 20.0}
SAMPLES = [
    *(Sample(f"real-{rate}", "ctsyncd", n, COST) for n in (0, 1) for rate in ("200", "2000", "2000-snat")),
    *(Sample("real-2000", "conntrackd", n, {"active_us": 100.0, "bytes": 400.0}) for n in (0, 1)),
    *(Sample("real-200", "conntrackd", n, {"active_us": 4.0 + 8 * n}) for n in (0, 1)),
    *(
        Sample(
            "flood-transit",
            variant,
            0,
            {f"{node}_{name}": size for node in ("active", "backup") for name, size in sizes.items()},
        )
        for variant, sizes in (
            ("ctsyncd", {"rss": 20 << 20, "rss_per_flow": 100.0}),
            ("conntrackd", {"rss": 8 << 20, "rss_per_flow": 500.0}),
        )
    ),
    *(Sample(f"growth-{size}", "ctsyncd", 0, {"active_rss": 20e6 + 100 * size}) for size in (0, 100_000)),
]
DOCUMENT = {"about": ABOUT, "samples": [one._asdict() for one in SAMPLES]}


def rows(text: str) -> dict[str, list[str]]:
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:2] == "| "]
    return {cell[0]: cell[1:] for cell in cells}


def test_the_table_says_what_is_met_and_what_not() -> None:
    table = rows(report.markdown(report.Result.parse(DOCUMENT)))
    assert table["active, 2000/s"] == [
        "10",
        "100",
        "µs/connection",
        "**0.1**",
        "0.1 … 0.1",
        "≤ 1/3",
        "met",
        "≤ 1/6",
        "met",
    ]
    assert table["active, 200/s, SNAT"][3:7] == ["**1.67**", "0.833 … 2.5", "≤ 1", "**missed**"]
    assert table["per connection, 2000/s"][5:] == ["≤ 1/10", "met", "≤ 1/15", "met"]


def test_what_was_not_measured_is_not_passed_over() -> None:
    text = report.markdown(report.Result.parse(DOCUMENT)).split("not measured in this run:")[1].split("## ")[0]
    assert "Sync link, per random new flow, snat" in text
    assert "active, 2000/s\n" not in text


def test_losses_are_said() -> None:
    text = report.markdown(report.Result.parse(DOCUMENT)).split("## Where we lose")[1].split("## ")[0]
    assert "active, 200/s, SNAT: 10 against 8 µs/connection (times 1.67)" in text
    assert "active, 2000/s:" not in text


def test_a_missed_aim_shows_what_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NOTES, "active-200", "A longer window was tried.")
    assert "aim ≤ 1/3. A longer window was tried." in report.markdown(report.Result.parse(DOCUMENT))


def test_the_sizing_guide_is_computed_from_what_was_measured() -> None:
    table = rows(report.sizing(report.Result.parse(DOCUMENT)))
    assert table["2,000"] == ["2 %", "1 %", "320 kbit/s", "measured"]
    assert table["1,000,000"] == ["115 MiB", "115 MiB"]


def test_a_run_of_one_step_makes_a_page(tmp_path: Path) -> None:
    only = {"about": ABOUT, "samples": [SAMPLES[0]._asdict()]}
    (tmp_path / "performance").mkdir()
    (tmp_path / "performance" / "old.svg").write_text("", encoding="utf-8")
    command.write_report(only, tmp_path)
    assert "# Performance" in (tmp_path / "performance.md").read_text(encoding="utf-8")
    assert [path.name for path in (tmp_path / "performance").iterdir()] == ["result.json"]


def test_a_report_can_be_written_again_from_its_numbers(tmp_path: Path) -> None:
    command.write_report(DOCUMENT, tmp_path)
    first = (tmp_path / "performance.md").read_text(encoding="utf-8")
    kept = tmp_path / "performance" / "result.json"
    assert command.main(["--render", str(kept), "--output", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "performance.md").read_text(encoding="utf-8") == first
    assert json.loads(kept.read_text(encoding="utf-8"))["samples"] == DOCUMENT["samples"]
    for name in re.findall(r"\]\((performance/[^)]*)\)", first):
        assert (tmp_path / name).exists(), name


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.00012, "0.00012"), (0.3333, "0.333"), (12.34, "12.3"), (123.4, "123"), (1234567.8, "1,234,568")],
)
def test_numbers_are_written_without_exponents(value: float, text: str) -> None:
    assert report.number(value) == text


@pytest.mark.parametrize(
    ("limit", "above", "text"),
    [(1 / 3, False, "≤ 1/3"), (0.6, False, "≤ 0.6"), (2, False, "≤ 2"), (0.9, True, "≥ 90 %"), (None, False, "")],
)
def test_limits_are_written_as_they_were_asked(limit: float | None, above: bool, text: str) -> None:
    assert report.fraction(limit, above) == text


@pytest.mark.parametrize(
    ("top", "expected"),
    [(100_000, [0, 20_000, 40_000, 60_000, 80_000, 100_000]), (0, [0, 1]), (7, [0, 2, 4, 6, 8])],
)
def test_axes_have_round_numbers(top: float, expected: list[float]) -> None:
    assert svg.ticks(top) == expected


def test_plots_are_well_formed_and_true_to_scale() -> None:
    text = svg.lines("a < b", "x & y", "y", [svg.Line("one", [(0, 0), (50, 10), (100, 20)])])
    root = ElementTree.fromstring(text)
    places = root.find("{*}polyline").get("points").split()
    (x0, y0), (x1, y1), (x2, y2) = (tuple(map(float, place.split(","))) for place in places)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    assert root.find("{*}title").text == "a < b"


def test_bars_grow_away_from_one() -> None:
    text = svg.bars("ratios", [svg.Bar("better", 0.1, 0.05, 0.2, 0.5, 0.2), svg.Bar("worse", 2, 1, 4)])
    better, worse = [one for one in ElementTree.fromstring(text).iter("{http://www.w3.org/2000/svg}rect")][1:]
    even = float(better.get("x")) + float(better.get("width"))
    assert float(worse.get("x")) == pytest.approx(even, abs=0.2)
    assert better.get("fill") != worse.get("fill")


def test_a_plot_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing"):
        svg.lines("t", "x", "y", [svg.Line("none", [])])
    with pytest.raises(ValueError, match="nothing"):
        svg.bars("t", [])
