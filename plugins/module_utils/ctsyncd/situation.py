# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What all rooms of the engine share: settings, the side that this node is on, questions to the kernel, counters."""

from __future__ import annotations

import collections
from typing import NamedTuple

from . import conditions, config, readiness
from .filters import Filter
from .flow import Flow

HOT_STANDBY = "hot-standby"
EXTERNAL_CACHE = "external-cache"

DUMP_ROOM = 20_000  # changes or requests that may wait before a dump, or the link, is read on
SORTED_PER_TURN = 5_000  # replicas looked at in search of closing flows, or given to a peer


class Settings(NamedTuple):
    """What the configuration decides about the engine.

    ``park_timeout_s``: timer of a replica in the kernel.  ``lag_limit_s``: older changes without acknowledgement show
    in the verdict.  ``filter``, ``ignore`` and ``unreplied``: see :class:`filters.Filter`.  ``table_limit``: flows
    for which the external cache has room at least, and changes that may wait for a peer; with a larger kernel more.
    """

    mode: str = HOT_STANDBY
    replicate: bool = True
    unreplied: bool = False  # replicate flows without a reply (not TCP, SCTP) too
    park_timeout_s: int = 86_400
    ignore: tuple[str, ...] = ()  # networks whose flows are never replicated
    filter: config.Filter = config.EVERYTHING
    lag_limit_s: float = 2.0
    commit_at_takeover: bool = True
    compare: bool = True  # digests are compared, and what differs is repaired
    table_limit: int = 1_048_576
    same_conditions: tuple[str, ...] = conditions.KINDS  # what the nodes must have alike
    max_expectations: int = 4096

    @property
    def takes_over(self) -> bool:
        """What the external cache holds is put into the kernel at take-over, at the latest."""
        return self.mode == HOT_STANDBY or self.commit_at_takeover


class Question(NamedTuple):
    """The caller looks up the kernel's entry with this original tuple, in any direction, for the engine.

    ``replica``: the key of the replica that the entry stands in the way of.  ``adjustment``: the entry may have got a
    sequence adjustment, of which the kernel makes no event.
    """

    flow: Flow
    replica: bytes = b""
    adjustment: bool = False


class Situation:
    """One object for all rooms of one engine.  ``now``: of the last poll (monotonic seconds).  ``alarms``: what an
    operator should find in the log."""

    def __init__(self, settings: Settings, now: float) -> None:
        self.settings = settings
        self.filter = filter_of(settings)
        self.side = ""  # ACTIVE or BACKUP: the last role that was not a transition
        self.active = False
        self.now = now
        self.conditions = conditions.UNKNOWN  # of this node
        self.parameters: tuple[str, ...] = ()  # their names
        self.bulks_from = now  # no bulk begins before: roles change too often
        self.counters: collections.Counter[str] = collections.Counter()
        self.questions: list[Question] = []
        self.unknown_helpers: set[str] = set()  # some of those that replicas have and this kernel has not
        self.alarms: list[str] = []

    def take_side(self, side: str) -> None:
        self.side = side
        self.active = side == readiness.ACTIVE

    @property
    def hot(self) -> bool:
        return self.settings.mode == HOT_STANDBY


def filtering(settings: Settings) -> tuple[object, ...]:
    """What a filter is made of."""
    return settings.filter, settings.ignore, settings.unreplied


def filter_of(settings: Settings) -> Filter:
    return Filter(settings.filter, settings.ignore, settings.unreplied)
