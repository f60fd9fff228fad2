# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The report: Markdown with the table and the sizing guide, and the plots.  Pure: texts out of a result."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, Sequence

from . import svg
from .daemons import VARIANTS
from .goals import MEMORY, NOTES, ROWS, WIRE
from .results import Outcome, Row, Sample, Source, curve, evaluate, found, from_json, median

LABEL = 58  # characters that fit beside the bars

HEADER = """\
<!--
Copyright: (c) 2026, The ctsync authors
GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
SPDX-License-Identifier: GPL-3.0-or-later

Written by "make bench DOCS=yes" (tests/bench/report.py): change it there.
-->
"""


def _page(name: str) -> str:
    """A part of the page that no run changes, without its comment at the top."""
    return (Path(__file__).resolve().parent / name).read_text(encoding="utf-8").split("-->\n", 1)[1]


class Result(NamedTuple):
    """A run: what it ran on, and what it measured."""

    about: dict[str, Any]
    samples: list[Sample]

    @classmethod
    def parse(cls, document: dict[str, Any]) -> Result:
        """Out of a result file."""
        return cls(document["about"], from_json(document["samples"]))


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) >= 100:
        return f"{value:.0f}"
    text = f"{value:.3g}"
    return text if "e" not in text else f"{value:.6f}".rstrip("0")


def fraction(limit: float | None, above: bool) -> str:
    """A limit as it is asked for: ≤ 1/3, ≥ 90 %."""
    if limit is None:
        return ""
    if above:
        return f"≥ {limit * 100:.0f} %"
    inverse = 1 / limit if limit else 0
    if inverse > 1.9 and abs(inverse - round(inverse)) < 1e-6:
        return f"≤ 1/{round(inverse)}"
    return f"≤ {limit:g}"


def _yes(met: bool | None) -> str:
    return "" if met is None else "met" if met else "**missed**"


def table(outcomes: Sequence[Outcome]) -> str:
    """The rows by groups."""
    out = []
    for group in dict.fromkeys(outcome.row.group for outcome in outcomes):
        out += [
            f"### {group}\n",
            "| what | ours | theirs | unit | judged | min … max | must | | aim | |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for o in outcomes:
            row = o.row
            if row.group != group:
                continue
            asked = row.theirs is not None and not row.above
            limits = [
                f"≤ {number(limit)}" if limit is not None and row.theirs is None else fraction(limit, row.above)
                for limit in (row.must, row.aim)
            ]
            once = " (not in every round)" if o.must_met and not o.always_met else ""
            cells = [
                row.what,
                number(o.ours),
                number(o.theirs) if o.theirs is not None else "",
                row.unit,
                f"**{number(o.median)}**" if asked or row.above else number(o.median),
                f"{number(o.low)} … {number(o.high)}",
                limits[0],
                _yes(o.must_met) + once,
                limits[1],
                _yes(o.aim_met),
            ]
            out.append("| " + " | ".join(cells) + " |")
        out.append("")
    return "\n".join(out)


def _label(row: Row) -> str:
    text = f"{row.group}: {row.what}" if row.group in (WIRE, MEMORY) else row.what
    return text if len(text) <= LABEL else text[: LABEL - 1] + "…"


def plots(result: Result) -> dict[str, str]:
    """File names and contents of the plots that the result has numbers for."""
    samples = result.samples
    outcomes = evaluate(ROWS, samples)
    out: dict[str, str] = {}
    ratios = [
        svg.Bar(_label(o.row), o.median, o.low, o.high, o.row.must, o.row.aim)
        for o in outcomes
        if o.row.theirs is not None and o.row.must is not None and not o.row.above and o.median > 0
    ]
    if ratios:
        out["ratios.svg"] = svg.bars("ctsyncd ÷ conntrackd", ratios)
    names = {"conntrackd": "conntrackd", "ctsyncd": "ctsyncd, hot standby", "ctsyncd-cache": "ctsyncd, external cache"}
    mib = 1 / (1 << 20)

    def draw(file: str, title: str, y: str, source: tuple[str, str], *, scale: float = 1.0, skip: str = "") -> None:
        found_curves = [
            svg.Line(name, [(x, v * scale) for x, v in curve(samples, variant, *source)])
            for variant, name in names.items()
            if variant != skip
        ]
        drawn = [one for one in found_curves if one.points]
        if drawn:
            out[file] = svg.lines(title, "flows in the table", y, drawn)

    draw("memory-active.svg", "Resident memory of the active daemon", "MiB", ("growth", "active_rss"), scale=mib)
    draw("memory-backup.svg", "Resident memory of the backup daemon", "MiB", ("growth", "backup_rss"), scale=mib)
    event = "one new or deleted flow in a table of that size"
    draw("event-active.svg", f"Active: {event}", "µs", ("growth", "event_active_us"))
    draw("event-backup.svg", f"Backup: {event}", "µs", ("growth", "event_backup_us"))
    draw("fill-active.svg", "Active: one of the new flows that filled the table", "µs", ("growth", "active_us"))
    draw("commit.svg", "Commit of the external cache", "seconds", ("commit", "seconds"), skip="ctsyncd")
    draw("resync.svg", "Full resync into an empty backup", "seconds", ("resync", "seconds"), skip="ctsyncd")
    return out


def losses(outcomes: Sequence[Outcome]) -> str:
    """Where conntrackd is better, and what was asked and not reached."""
    out = ["## Where we lose\n"]
    worse = [
        o for o in outcomes if o.row.theirs and not o.row.above and o.row.theirs.variant != "none" and o.median > 1
    ]
    if worse:
        out.append("Ours costs more than conntrackd's:\n")
        out += [
            f"- {o.row.group.lower()}, {o.row.what}: {number(o.ours)} against {number(o.theirs or 0)} {o.row.unit}"
            f" (times {number(o.median)})"
            for o in worse
        ]
        out.append("")
    missed = [o for o in outcomes if o.must_met is False]
    if missed:
        out.append("Required and missed:\n")
        out += [f"- {o.row.group}, {o.row.what}: {number(o.median)}" for o in missed]
        out.append("")
    if not worse and not missed:
        out.append("In no row of this run.\n")
    out.append(
        "And in what the rows do not show: ctsyncd starts in a few hundred milliseconds where conntrackd takes a few;"
        " its commands pay for the start of a Python, too; and on tables of some thousand flows its memory is mostly"
        " Python.\n"
    )
    short_of = [o for o in outcomes if o.aim_met is False]
    if short_of:
        out.append("### Aims that were not reached\n")
        for o in short_of:
            limit = fraction(o.row.aim, o.row.above) if o.row.theirs else f"≤ {number(o.row.aim or 0)}"
            said = f"**{o.row.group}, {o.row.what}**: {number(o.median)}, aim {limit}. {NOTES.get(o.row.name, '')}"
            out.append(said.rstrip() + "\n")
    return "\n".join(out)


def unmeasured(outcomes: Sequence[Outcome]) -> str:
    """The rows with a requirement that a run has no number for: what is not there is not met."""
    measured = {outcome.row.name for outcome in outcomes}
    left = [row for row in ROWS if row.must is not None and row.name not in measured]
    if not left:
        return ""
    return "Required and not measured in this run:\n\n" + "".join(f"- {row.group}, {row.what}\n" for row in left)


def _value(samples: Sequence[Sample], variant: str, step: str, value: str) -> float | None:
    values = found(samples, Source(variant, step, value)).values()
    return median(values) if values else None


def sizing(result: Result) -> str:
    """What a pair needs for a number of flows and a rate."""
    samples = result.samples
    slow = {k: _value(samples, "ctsyncd", "real-200", k) for k in ("active_us", "backup_us", "bytes")}
    fast = {k: _value(samples, "ctsyncd", "real-2000-snat", k) for k in ("active_us", "backup_us", "bytes")}
    start = [_value(samples, "ctsyncd", "flood-transit", f"{node}_rss") for node in ("active", "backup")]
    each = [_value(samples, "ctsyncd", "flood-transit", f"{node}_rss_per_flow") for node in ("active", "backup")]
    out = ["## Sizing\n", "Of one core like this machine's, with the shipped defaults, connections through SNAT:\n"]
    if None not in (*slow.values(), *fast.values()):
        out += [
            "| connections per second | active | backup | sync link | |",
            "|---|---|---|---|---|",
        ]
        for rate, cost, said in (
            (200, slow, "measured"),
            (2000, fast, "measured"),
            (5000, fast, "at the cost of 2000/s"),
            (10_000, fast, "at the cost of 2000/s"),
        ):
            active, backup, wire = (cost[k] or 0.0 for k in ("active_us", "backup_us", "bytes"))
            out.append(
                f"| {rate:,} | {number(active * rate / 1e4)} % | {number(backup * rate / 1e4)} % |"
                f" {number(wire * rate * 8 / 1000)} kbit/s | {said} |"
            )
        out.append("")
    if None not in (*start, *each):
        kernel = result.about.get("entry_bytes")
        entry = (
            f" A flow's entry takes {kernel} bytes plus its extensions in the kernel of either node (hot standby), and"
            " `nf_conntrack_buckets` should be at least the number of flows."
            if kernel
            else ""
        )
        out += [
            "| flows | active | backup |",
            "|---|---|---|",
            *(
                f"| {flows:,} | "
                + " | ".join(f"{number(((s or 0) + (e or 0) * flows) / (1 << 20))} MiB" for s, e in zip(start, each))
                + " |"
                for flows in (10_000, 100_000, 1_000_000, 4_000_000)
            ),
            "",
            f"Measured is {number(start[0] or 0)} and {number(start[1] or 0)} bytes at the start and"
            f" {number(each[0] or 0)} and {number(each[1] or 0)} bytes per flow; the table is computed from that."
            f"{entry}",
            "",
        ]
    out.append(
        "The conntrack table must have room for all flows on either node (`nf_conntrack_max`). Leave the sync link ten"
        " times its mean: a full resync sends the whole table.\n"
    )
    return "\n".join(out)


def about(result: Result) -> str:
    """What it ran on."""
    a = result.about
    return (
        f"- Machine: {a['cpu']}, {a['cores']} cores, {number(a['memory_mib'] / 1024)} GiB, Linux {a['kernel']}\n"
        f"- ctsyncd: {a['ctsyncd']}, commit {a['commit']}, {a['python']}\n"
        f"- conntrackd: {a['conntrackd']}\n"
        f"- Run: {a['mode']}, {a['rounds']} rounds, {a['date']}, {number(a['minutes'])} minutes;"
        f" other programs used {number(max(a['disturbance'], default=0) * 100)} % of the processors at most before a"
        f" round; {a['other_listeners']} other conntrack listeners\n"
    )


def markdown(result: Result) -> str:
    """The whole page."""
    outcomes = evaluate(ROWS, result.samples)
    judged = [o for o in outcomes if o.must_met is not None]
    aims = [o for o in outcomes if o.aim_met is not None]
    drawn = plots(result)
    parts = [
        HEADER,
        "# Performance: ctsyncd and conntrackd side by side\n",
        "One run of `make bench`, whose numbers are in [performance/result.json](performance/result.json)."
        " **Read the ratios**: the same work on the same machine, one after the other;"
        " microseconds elsewhere are others.\n",
        about(result),
        f"Of {len(judged)} rows with a requirement {sum(bool(o.must_met) for o in judged)} meet it,"
        f" {sum(bool(o.always_met) for o in judged)} of them in every round;"
        f" of {len(aims)} with an aim {sum(bool(o.aim_met) for o in aims)} reach it.\n",
        "## Results\n",
        "*judged* is the ratio ours ÷ theirs (bold), or the number itself where a limit stands for itself.\n",
        table(outcomes),
        unmeasured(outcomes),
        "\n".join(f"- `{name}`: {what}" for name, what in VARIANTS.items() if name != "none") + "\n",
    ]
    if drawn:
        parts.append("## Curves\n")
        parts += [f"![{name.removesuffix('.svg')}](performance/{name})\n" for name in drawn]
    parts += [losses(outcomes), sizing(result), _page("method.md"), _page("usage.md")]
    return "\n".join(filter(None, parts)).rstrip() + "\n"
