# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""An operator's question, whether the tables are equal, and its answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .digest import Differences

PATIENCE_S = 60.0  # without any progress


def together(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The object of ``ctsyncd verify --json`` (schema 1) out of what was found of each backup.

    A difference is worse than an answer that is none, and that worse than equality.
    """
    answers = [one["equal"] for one in found]
    several = len(found) > 1
    return {
        "schema": 1,
        "equal": False if False in answers else None if None in answers else True,
        "reason": "; ".join(
            f"{one['backup']}: {one['reason']}" if several else one["reason"] for one in found if one["reason"]
        ),
        "active": found[0]["active"],
        "backup": ", ".join(one["backup"] for one in found),
        "flows": next((one["flows"] for one in found if one["flows"] is not None), None),
        "differences": [difference for one in found for difference in one["differences"]],
        "backups": list(found),
    }


class Verification:
    """``found``: the answer.  ``reason``: why there is none."""

    def __init__(self, now: float) -> None:
        self.number = 0
        self.found: Differences | None = None
        self.reason = ""
        self._progress_at = now

    @property
    def done(self) -> bool:
        return self.found is not None or bool(self.reason)

    def goes_on(self, now: float) -> None:
        """Something of it came in."""
        self._progress_at = now

    def give_up(self, reason: str) -> None:
        if not self.done:
            self.reason = reason

    def finish(self, found: Differences) -> None:
        if not self.done:
            self.found = found

    def look(self, now: float) -> bool:
        """Is it done?  It is, too, if nothing comes any more."""
        if not self.done and now - self._progress_at > PATIENCE_S:
            self.reason = f"nothing came for {PATIENCE_S:g} s"
        return self.done
