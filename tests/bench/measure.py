# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""CPU, bytes and time of a pair of daemons between two moments."""

from __future__ import annotations

import time
from typing import Callable, NamedTuple

from .daemons import Pair

SAMPLE_S = 0.01
QUIET_S = 0.7
BUSY_CPU = 0.2  # of a core: what idle daemons and slow background work stay below
BUSY_BYTES = 4000  # per sample: what heartbeats stay below


class Moment(NamedTuple):
    """What had been used up to ``time`` (seconds): CPU in nanoseconds, sync link in bytes and packets."""

    time: float
    active_ns: int
    backup_ns: int
    bytes: int
    packets: int


def moment(pair: Pair) -> Moment:
    """Now."""
    active, backup = pair.active.usage, pair.backup.usage
    total, packets = active.link()
    return Moment(time.monotonic(), active.cpu_ns(), backup.cpu_ns(), total, packets)


def settled(pair: Pair, timeout: float, link_only: bool = False) -> tuple[Moment, float]:
    """Wait until both daemons have worked off what they had.  The moment after, and when they were last busy.

    ``link_only``: busy they are while the sync link is.  In large tables ctsyncd's audit may read the kernel meanwhile,
    in small pieces over minutes, and has nothing to do with what is measured.

    Only counters of the kernel are looked at: asking the daemons would be work for them.  TimeoutError after
    ``timeout`` seconds.
    """
    before = moment(pair)
    began = busy_at = before.time
    while True:
        time.sleep(SAMPLE_S)
        now = moment(pair)
        passed = (now.time - before.time) * 1e9
        cpu = max(now.active_ns - before.active_ns, now.backup_ns - before.backup_ns) / passed
        waits = pair.active.usage.runnable() or pair.backup.usage.runnable()  # on a crowded machine
        if (not link_only and (waits or cpu > BUSY_CPU)) or now.bytes - before.bytes > BUSY_BYTES:
            busy_at = now.time
        elif now.time - busy_at > QUIET_S:
            return now, busy_at
        if now.time - began > timeout:
            raise TimeoutError(f"{pair.variant} was still busy after {timeout:.0f} s")
        before = now


def per(before: Moment, after: Moment, count: float) -> dict[str, float]:
    """Cost of one of ``count`` things: CPU in microseconds, sync link in bytes and packets."""
    return {
        "active_us": (after.active_ns - before.active_ns) / 1000 / count,
        "backup_us": (after.backup_ns - before.backup_ns) / 1000 / count,
        "bytes": (after.bytes - before.bytes) / count,
        "packets": (after.packets - before.packets) / count,
    }


def worked(pair: Pair, work: Callable[[], float], timeout: float) -> dict[str, float]:
    """Do ``work``, which returns how many things it did, wait until it has sunk in, and give the cost of one.

    ``settle_s`` is the time from the beginning of the work to the daemons' last activity.
    """
    before = moment(pair)
    count = work()
    after, busy_at = settled(pair, timeout)
    return {**per(before, after, count), "settle_s": busy_at - before.time}
