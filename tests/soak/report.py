# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A recorded run as Markdown.  Pure."""

from __future__ import annotations

import collections
from typing import Any, Mapping, Sequence

from . import judge


def markdown(records: Sequence[Mapping[str, Any]]) -> str:
    """What was done how often and what came out, in a form that fits into docs/results.md."""
    begin = next(record for record in records if record["what"] == "begin")
    steps = [record for record in records if record["what"] == "step"]
    bad = judge.verdict(records) if steps else [c for record in records for c in record.get("complaints", ())]
    end_s = max(record["at_s"] for record in records)
    lines = [
        f"Seed {begin['seed']}, {end_s / 60:.0f} minutes, commit {begin['commit']}, Linux {begin.get('kernel', '')}: "
        + ("**failed**" if bad else "passed")
        + ".",
        "",
    ]
    lines += [f"- {complaint}" for complaint in bad] + [""] * bool(bad)
    if steps:
        lines += [*_faults(steps), "", *_lives(steps)]
    cost = next((record for record in records if record["what"] == "cost"), None)
    if cost:
        lines += ["", f"Everything together used {cost['cores']:.0%} of one core."]
    return "\n".join(lines) + "\n"


def _faults(steps: Sequence[Mapping[str, Any]]) -> list[str]:
    """A row for each fault: how often, on which links, how long until the pair was READY again."""
    rows: dict[str, list[Mapping[str, Any]]] = collections.defaultdict(list)
    for step in steps:
        rows[step["fault"]].append(step)
    lines = ["| fault | times | on a link with | seconds, fault included | wrong |", "|---|---|---|---|---|"]
    for name, mine in sorted(rows.items()):
        links = sorted({step["link"] for step in mine} - {"calm"})
        took = sorted(step["took_s"] for step in mine)
        wrong = sum(bool(step["complaints"]) for step in mine)
        span = f"{took[0]:.0f}" if took[0] == took[-1] else f"{took[0]:.0f} to {took[-1]:.0f}"
        lines.append(f"| {name} | {len(mine)} | {', '.join(links) or 'nothing'} | {span} | {wrong} |")
    return [*lines, f"| together | {len(steps)} | | | {sum(bool(step['complaints']) for step in steps)} |"]


def _lives(steps: Sequence[Mapping[str, Any]]) -> list[str]:
    """A row for each life of a daemon that was long enough to be judged, and the longest otherwise."""
    lives = judge.growth(judge.Sample(**sample) for step in steps for sample in step["samples"])
    shown = [life for life in lives if life.judged] or sorted(lives, key=lambda life: life.seconds)[-2:]
    lines = ["| life of ctsyncd on | minutes | memory at the end | growth | descriptors, first and last |"]
    lines.append("|---|---|---|---|---|")
    for life in shown:
        growth = f"{life.slope_kib_per_h:+.0f} KiB/h" if life.judged else "too short to be judged"
        lines.append(
            f"| {life.node} | {life.seconds / 60:.0f} | {life.rss_kib} KiB | {growth} |"
            f" {life.descriptors[0]}, {life.descriptors[1]} |"
        )
    return [*lines, "", f"{len(lives)} lives in all."]
