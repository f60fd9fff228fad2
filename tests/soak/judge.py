# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is wrong with what was seen.  Pure: figures and listings in, complaints out."""

from __future__ import annotations

import itertools
import statistics
from typing import Any, Iterable, Mapping, NamedTuple, Sequence

from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import recorder

# Of a process: imports, first bulks, the largest table so far; and the flight recorder takes that long to be full.
WARM_UP_S = 120.0 + recorder.SAMPLES
SHORTEST_LIFE_S = 600.0  # after the warm-up: memory of a shorter life is not judged
GROWTH_KIB_PER_H = 4096.0
GROWTH_KIB = 1024.0
FEWEST_SAMPLES = 6
POINTS = 200  # of a slope: pairs grow with the square

Value = Any


class Sample(NamedTuple):
    """A daemon between two faults.  ``at_s``: since the run began; a life is (``node``, ``pid``)."""

    at_s: float
    node: str
    pid: int
    rss_kib: int
    descriptors: int
    cpu_s: float


class Growth(NamedTuple):
    """What a life used in the end, what it grew by (the lesser slope of its halves), and what is wrong with that."""

    node: str
    pid: int
    seconds: float
    judged: bool  # long enough for its memory
    rss_kib: int
    slope_kib_per_h: float
    descriptors: tuple[int, int]
    complaints: tuple[str, ...]


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Theil and Sen: the median of the slopes of all pairs.  An outlier does not tilt it."""
    step = max(1, -(-len(points) // POINTS))
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.combinations(points[::step], 2) if b[0] > a[0]]
    return statistics.median(slopes) if slopes else 0.0


def growth(samples: Iterable[Sample]) -> list[Growth]:
    """One for each life, in the order of their beginnings."""
    lives: dict[tuple[str, int], list[Sample]] = {}
    for sample in samples:
        lives.setdefault((sample.node, sample.pid), []).append(sample)
    return [_life(life) for life in lives.values()]


def _life(life: list[Sample]) -> Growth:
    start = life[0].at_s
    warm = [sample for sample in life if sample.at_s - start >= WARM_UP_S]
    span = warm[-1].at_s - warm[0].at_s if warm else 0.0
    judged = span >= SHORTEST_LIFE_S and len(warm) >= FEWEST_SAMPLES
    points = [(sample.at_s, float(sample.rss_kib)) for sample in warm]
    middle = len(points) // 2
    # what leaks does so in both halves; what one large table leaves behind does not
    per_h = min(slope(points[:middle]), slope(points[middle:])) * 3600 if judged else 0.0
    complaints = []
    if judged and per_h > GROWTH_KIB_PER_H and per_h * span / 3600 > GROWTH_KIB:
        complaints.append(f"its memory grows by {per_h:.0f} KiB/h")
    third = len(life) // 3
    few = [sample.descriptors for sample in life[:third]] or [life[0].descriptors]
    late = [sample.descriptors for sample in life[-third:]] if third else [life[-1].descriptors]
    if len(life) >= FEWEST_SAMPLES and min(late) > max(few):
        complaints.append(f"its descriptors grow from {max(few)} to {min(late)}")
    return Growth(
        *(life[0].node, life[0].pid, life[-1].at_s - start, judged, life[-1].rss_kib, round(per_h, 1)),
        *((life[0].descriptors, life[-1].descriptors), tuple(complaints)),
    )


# --- tables ----------------------------------------------------------------------------------------------------------

_PARTS = frozenset(("src", "dst", "sport", "dport", "type", "code", "id", "srckey", "dstkey"))


def flow_key(flow: Mapping[str, Any]) -> str:
    """A flow of ``ctsyncd -i --json`` as conntrack(8) names it: protocol, addresses as it began, and of the answers."""
    ends = (f"{name}={value}" for end in ("orig", "reply") for name, value in flow[end].items())
    return " ".join((str(flow["protonum"]), *ends))


def flows(records: Iterable[Mapping[str, Any]]) -> dict[str, Value]:
    """Lines of ``ctsyncd -i --json`` or ``-e --json``: what both nodes have to agree on."""
    return {flow_key(flow): (flow["state"], flow["assured"], flow.get("mark")) for flow in records}


def kernel_entries(listing: str) -> dict[str, Value]:
    """Lines of conntrack(8): whether the entry is assured, and its mark."""
    found = {}
    for line in listing.splitlines():
        words = line.split()
        if len(words) < 4 or "src=" not in line:
            continue
        ends = (word for word in words[2:] if word.partition("=")[0] in _PARTS)
        mark = next((word[5:] for word in words if word.startswith("mark=")), "0")
        found[" ".join((words[1], *ends))] = ("[ASSURED]" in words, mark)
    return found


def differences(before: Mapping[str, Value], copy: Mapping[str, Value], after: Mapping[str, Value]) -> list[str]:
    """How the backup's table differs from the active node's, which was listed before and after it: only what stood
    still meanwhile can be compared."""
    out = []
    for key, value in before.items():
        if after.get(key) != value:
            continue
        if key not in copy:
            out.append(f"lacks {key}")
        elif copy[key] != value:
            out.append(f"differs ({copy[key]}, not {value}) {key}")
    out += [f"should not have {key}" for key in copy if key not in before and key not in after]
    return sorted(out)


# --- a run -----------------------------------------------------------------------------------------------------------


def log_complaints(text: str) -> list[str]:
    """What no daemon may ever log."""
    bad = ("Traceback (most recent call last)", "internal error", "MemoryError")
    return [line for line in text.splitlines() if any(word in line for word in bad)]


def verdict(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Everything that is wrong with a recorded run (its JSON lines); empty: passed."""
    out = [f"step {r['number']} ({r['fault']}): {c}" for r in records if r["what"] == "step" for c in r["complaints"]]
    end = [record for record in records if record["what"] == "end"]
    if not end:
        return [*out, "the run did not come to its end"]
    if not any(record["what"] == "step" for record in records):
        out.append("no fault was tried")
    return out + [complaint for record in end for complaint in record["complaints"]]
