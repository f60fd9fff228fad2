# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The flight recorder: what happened in the last minutes, in bounded memory.

Notes are single happenings (roles, verdicts, peers, reloads).  Samples are what was counted in a second in which more
happened than signs of life; of a quiet night there are none.  Both are kept as JSON texts.  Times are monotonic seconds
given by the caller; only on the way out they become wall-clock time, with the clock as it is then: a clock that was set
meanwhile mixes nothing up.
"""

from __future__ import annotations

import collections
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

SCHEMA = 1
NOTES = 400
SAMPLES = 600  # seconds in which something happened: ten minutes of a busy node
NOTE_BYTES = 2048  # a longer one is cut: a verdict has as many reasons as there are
FOLLOWED_S = 10.0  # how long after a transition its story goes on

# Counted by every sign of life: alone they make no sample
_ROUTINE = ("datagrams_", "bytes_", "hellos_")


class Recorder:
    def __init__(self) -> None:
        self._notes: collections.deque[tuple[float, int, str]] = collections.deque(maxlen=NOTES)
        self._samples: collections.deque[tuple[float, int, str]] = collections.deque(maxlen=SAMPLES)
        self._number = 0  # order of what happened at one moment
        self._counted: list[dict[str, int]] = []
        self._sampled_at: float | None = None
        self._due: tuple[float, str] | None = None

    def __len__(self) -> int:
        return len(self._notes) + len(self._samples)

    def note(self, now: float, what: str, **facts: Any) -> None:
        text = json.dumps({"note": what, **facts}, ensure_ascii=True)
        if len(text) > NOTE_BYTES:
            text = json.dumps({"note": what, "cut": text[: NOTE_BYTES - 100]}, ensure_ascii=True)
        self._number += 1
        self._notes.append((now, self._number, text))

    def transition(self, now: float, role: str) -> None:
        """The node changed sides: a story ends ``FOLLOWED_S`` later, and another one begun before goes on into it."""
        self.note(now, "role", role=role)
        self._due = (now + FOLLOWED_S, role)

    def sample(self, now: float, sources: Sequence[Mapping[str, int]], **state: Any) -> None:
        """Once a second: what was counted since the last call, and ``state`` (lag, flows) beside it.

        ``sources``: counters, always in this order; what has one name in several of them is one number.  That they
        have not moved, as most of them have not in most seconds, is seen without looking at each name.
        """
        before = self._counted
        since, self._sampled_at = self._sampled_at, now
        if since is None or len(before) != len(sources):
            self._counted = [dict(source) for source in sources]
            return
        counted: dict[str, int] = {}
        for place, source in enumerate(sources):
            old = before[place]
            if source.items() != old.items():
                before[place] = dict(source)
                for name, value in source.items() - old.items():
                    counted[name] = counted.get(name, 0) + value - old.get(name, 0)
        if not [name for name in counted if not name.startswith(_ROUTINE)]:
            return
        counted = {name: counted[name] for name in sorted(counted)}
        text = json.dumps({"sample_s": round(now - since, 3), **state, "counted": counted}, ensure_ascii=True)
        self._number += 1
        self._samples.append((now, self._number, text))

    def finished(self, now: float, at_once: bool = False) -> str:
        """The role of the transition whose story is complete now (``at_once``: or would be later); once."""
        if self._due is None or (now < self._due[0] and not at_once):
            return ""
        role, self._due = self._due[1], None
        return role

    def lines(self, wall_offset: float, **about: Any) -> Iterator[str]:
        """JSON lines, the first one about the node, then the oldest first.  ``wall_offset``: seconds since the epoch
        less monotonic seconds."""
        yield json.dumps({"recorder": SCHEMA, **about})
        for when, _number, text in sorted([*self._notes, *self._samples]):
            yield f'{{"at": {when + wall_offset:.3f}, {text[1:]}'
