# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The active side: which changes of this kernel's flows are worth replicating, and what the peers are told of them."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence

from .announced import Announced
from .digest import States
from .dumps import BULK, Dumps
from .expectation_source import ExpectationSource
from .flow import Flow
from .jobs import Job, Request
from .peer import Peer
from .rows import SHAPES, Changes, Sheet, merge_extras, pack, pack_extras
from .situation import Question, Situation

EARLY_FLOWS = 16_384  # not replicated yet, of which extras are kept (some 200 bytes each)


class Source:
    """``early``: extras of flows that are not announced yet, the oldest first: the kernel tells most of them only once.
    ``states``: must be told of all that the peer is told of.  ``touched``: keys of flows that events name, if wanted.
    """

    def __init__(
        self, situation: Situation, dumps: Dumps, peers: Sequence[Peer], expectations: ExpectationSource
    ) -> None:
        self._announced = Announced()
        self._told_of = 0
        self._unnoted: list[tuple[int, Mapping[bytes, bytes]]] = []  # flows that are being told of, by length of key
        self.early: collections.OrderedDict[bytes, bytes] = collections.OrderedDict()
        self.states: States | None = None
        self.touched: set[bytes] | None = None
        self._situation = situation
        self._dumps = dumps
        self._peers = peers
        self._expectations = expectations
        self._whole = False  # the dump that runs makes announced complete

    @property
    def announced(self) -> Announced:
        """The flows that the peers were told of."""
        if self._unnoted:
            self._settle()
        return self._announced

    @property
    def told(self) -> int:
        """Flows that the peers were told of so far."""
        if self._unnoted:
            self._settle()
        return self._told_of

    def _settle(self) -> None:
        """Note what is told.  That takes as long as to tell it, so it is not done before somebody asks for it."""
        unnoted, self._unnoted, announced = self._unnoted, [], self._announced
        known = len(announced)
        for key_len, rows in unnoted:
            announced.add(rows, SHAPES[key_len].reply)
        self._told_of += len(announced) - known

    @property
    def _keeping(self) -> bool:
        """What happens is noted, whether or not anybody is told."""
        return self._announced.complete or self._whole

    @property
    def telling(self) -> bool:
        """Do changes matter?  There is somebody to be told, or there will be, and all that he must be told is known."""
        return self._situation.settings.replicate and (self._keeping or any(peer.established for peer in self._peers))

    @property
    def remembers(self) -> bool:
        """Can a bulk do without the kernel's table?  Only where mistakes would be found: where tables are compared."""
        return self.announced.complete and self._situation.settings.compare

    def doubt(self) -> None:
        """What was told may not be all, or not be as it is now: the next bulk comes out of the kernel."""
        self.announced.complete = self._whole = False

    def _with_room(self, changes: int) -> list[Peer]:
        """The peers that can be told so many changes."""
        return [peer for peer in self._peers if peer.established and not peer.behind and peer.fits(changes)]

    def forget(self) -> None:
        """Nothing was told."""
        self._whole = False
        self.announced.clear()
        self.early.clear()

    # --- events ------------------------------------------------------------------------------------------------------

    def changed(self, changes: Changes, now: float) -> None:
        """What happened to this kernel's flows.  Only while :attr:`telling`."""
        bulk = self._dumps.runs(BULK)
        if changes.sheets:
            if bulk or self.touched is not None or self.early:
                changes = changes.settled()
            for sheet in changes.sheets:
                if not self._put_sheet(sheet, now):
                    self._judge_rows(sheet.key_len, sheet.rows(), now)
        gone = changes.gone
        if bulk:  # what the dump says of them may be older
            self._dumps.seen.update(gone, *changes.rows.values())
        if self.touched is not None:
            self.touched.update(gone, *changes.rows.values(), (flow.key for flow in changes.flows))
        if gone:
            if self.early:
                for key in gone:
                    self.early.pop(key, None)
            if not bulk:
                gone = list(filter(self.announced.table.__contains__, gone))
            self.end(gone, now)
        for key_len, rows in changes.rows.items():
            self._judge_rows(key_len, rows, now)
        for flow in changes.flows:
            self.judge(flow, now)

    def _put_sheet(self, sheet: Sheet, now: float) -> bool:
        """Tell of many flows at once; False, with nothing done, where they are not all new and worth replicating."""
        told = self._with_room(len(sheet))
        if not told and not self._keeping:
            return True
        if not self._situation.filter.matches_all(sheet) or not self.announced.add_sheet(sheet):
            return False
        self._told_of += len(sheet)
        if self.states is not None:
            self.states.touch(sheet.keys)
        for peer in told:
            peer.pending.put_sheet(sheet, now)
        return True

    def _judge_rows(self, key_len: int, rows: Mapping[bytes, bytes], now: float) -> None:
        chosen = self._situation.filter.select_rows(key_len, rows)
        if len(chosen) != len(rows):
            announced = self.announced
            others = {key: value for key, value in rows.items() if key in announced and key not in chosen}
            if others:
                kept = self._situation.filter.keep_rows(key_len, others)
                self.end([key for key in others if key not in kept], now)
                chosen = {**chosen, **kept}
        if chosen:
            self._put_rows(key_len, chosen, now)

    def _put_rows(self, key_len: int, rows: Mapping[bytes, bytes], now: float) -> None:
        told = self._with_room(len(rows))
        if not told and not self._keeping:
            return
        self._told(key_len, rows)
        early = self.early.keys() & rows.keys() if self.early else ()
        if early:
            for key in early:
                extras = self.early.pop(key)
                self.announced.put(key, rows[key], extras)
                for peer in told:
                    peer.pending.put_flow(key, rows[key], extras, now)
            rows = {key: value for key, value in rows.items() if key not in early}
        for peer in told:
            peer.pending.put_rows(key_len, rows, now)

    def judge(self, flow: Flow, now: float) -> None:
        """The flow is so now: tell it, its end, or keep its extras."""
        key, chosen = flow.key, self._situation.filter
        if key in self.announced:
            if chosen.keeps(flow):
                self._announce(flow, now)
            else:
                self.end((key,), now)
        elif chosen.matches(flow):
            self._announce(flow, now)
        else:
            self._remember(flow)
            if chosen.is_unclear(flow) and chosen.concerns(flow):
                self._situation.questions.append(Question(flow))

    def _remember(self, flow: Flow) -> None:
        """Keep the extras of a flow that is not replicated yet, until it is or ends; the oldest go first."""
        extras = pack_extras(flow._replace(sctp_vtags=None))  # these come with every state
        if not extras or not self._situation.filter.passes_through(flow):
            return
        early, key = self.early, flow.key
        early[key] = merge_extras(early.get(key, b""), extras)
        if len(early) > EARLY_FLOWS:
            early.popitem(last=False)
            self._situation.counters["early_extras_dropped"] += 1

    def _announce(self, flow: Flow, now: float) -> None:
        if flow.helper is not None:
            self._expectations.master(flow)
        told = self._with_room(1)
        if told or self._keeping:
            key, value, extras = pack(flow)
            if self.early:
                extras = merge_extras(self.early.pop(key, b""), extras)
            self._told_one(key, value, extras)
            for peer in told:
                peer.pending.put_flow(key, value, extras, now)

    def _told(self, key_len: int, rows: Mapping[bytes, bytes]) -> None:
        self._unnoted.append((key_len, rows))
        if self.states is not None:
            self.states.touch(rows)

    def _told_one(self, key: bytes, value: bytes, extras: bytes) -> None:
        self._told_of += key not in self.announced
        self.announced.put(key, value, extras)
        if self.states is not None:
            self.states.touch((key,))

    def end(self, keys: Sequence[bytes], now: float) -> None:
        """Tell of the end of these flows."""
        if self._expectations.masters:
            self._expectations.ended(keys)
        told = self._with_room(len(keys)) if keys else ()
        if told or self._keeping:
            self.announced.discard(keys)
            if self.states is not None:
                self.states.touch(keys)
            for peer in told:
                peer.pending.remove(keys, now)

    def announce_late(self, keys: Sequence[bytes], job: Job, now: float) -> None:
        """Late flows of the former active node; this node's bulk may have gone out without them."""
        if not self._situation.settings.replicate:
            return
        told = [peer for peer in self._with_room(len(keys)) if not peer.bulk_due]
        if not told and not self._keeping:
            return
        if isinstance(job, Request):
            key, value, extras = pack(job.flow)
            self._told_one(key, value, extras)
            for peer in told:
                peer.pending.put_flow(key, value, extras, now)
        else:
            late = set(keys)
            rows = {key: value for key, value in zip(job.keys, job.values) if key in late}
            self._told(job.key_len, rows)
            for peer in told:
                peer.pending.put_rows(job.key_len, rows, now)

    # --- bulk --------------------------------------------------------------------------------------------------------

    def begin_bulk(self, peers: Sequence[Peer], now: float) -> None:
        """A dump of this kernel's table begins, for these peers.

        If they are all there are: what the bulk does not name, and no event does, is gone.
        """
        self._whole = all(peer in peers for peer in self._peers if peer.established)
        if self._whole:
            self.announced.clear()
        for peer in peers:
            peer.begin_bulk(now)

    def bulk_read(self) -> None:
        """The dump came to its end: what no event was missed of is known."""
        self.announced.complete = self.announced.complete or self._whole
        self._whole = False

    def bulk_rows(self, key_len: int, rows: Mapping[bytes, bytes], now: float) -> None:
        chosen, seen = self._situation.filter.select_rows(key_len, rows), self._dumps.seen
        if seen:
            chosen = {key: value for key, value in chosen.items() if key not in seen}
        if not chosen:
            return
        peers = self._bulking()
        for peer in peers:
            peer.count_bulk(len(chosen))
        if all(peer.bulking for peer in self._peers if peer.established):
            self._put_rows(key_len, chosen, now)
            return
        announced = self.announced
        fresh = {key: value for key, value in chosen.items() if key not in announced}
        if fresh:  # to the others, too: they do not know them
            self._put_rows(key_len, fresh, now)
            chosen = {key: value for key, value in chosen.items() if key not in fresh}
        announced.add(chosen, SHAPES[key_len].reply)
        for peer in peers:
            if peer.fits(len(chosen)):
                peer.pending.put_rows(key_len, chosen, now)

    def _bulking(self) -> list[Peer]:
        return [peer for peer in self._peers if peer.bulking]

    def bulk_flow(self, flow: Flow, now: float) -> None:
        if flow.key in self._dumps.seen:
            if flow.key in self.announced:
                # its event is newer, but may have left out the extras
                self._situation.questions.append(Question(flow))
            return
        if not self._situation.filter.matches(flow):
            self._remember(flow)
            return
        for peer in self._bulking():
            peer.count_bulk(1)
        self._announce(flow, now)

    # --- comparisons -------------------------------------------------------------------------------------------------

    def chosen(self, key_len: int, rows: Mapping[bytes, bytes]) -> Mapping[bytes, bytes]:
        """Which of these entries of the kernel the peer must know of."""
        chosen = self._situation.filter.select_rows(key_len, rows)
        if len(chosen) == len(rows):
            return chosen
        others = {key: value for key, value in rows.items() if key in self.announced and key not in chosen}
        return {**chosen, **self._situation.filter.keep_rows(key_len, others)} if others else chosen

    def keeps(self, flow: Flow) -> bool:
        """Must the peer know of this entry of the kernel?"""
        chosen = self._situation.filter
        return chosen.keeps(flow) if flow.key in self.announced else chosen.matches(flow)

    def tell_untold(self, key_len: int, rows: Mapping[bytes, bytes], now: float) -> None:
        """The kernel has these flows, of one shape: tell of the untold ones, and those with another translation."""
        strangers = self.announced.strangers(rows, SHAPES[key_len].reply)
        if strangers:
            self._situation.counters["untold_told"] += len(strangers)
            self.announced.discard(strangers)
            self._put_rows(key_len, {key: rows[key] for key in strangers}, now)
