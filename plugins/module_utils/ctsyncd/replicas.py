# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The replicas of a peer's flows: the external cache, the kernel's copies of it, and all that is asked of the kernel.

In hot standby the kernel holds each replica at once with a *parked* (long) timer, because a flow that is refreshed by
traffic makes no events.  Replicas are handled many at a time.  Flow by flow goes what has extras, what the kernel
refuses, and what changed in more than its state.
"""

from __future__ import annotations

import errno
import operator
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from .constants import IPPROTO_TCP, IPS_ASSURED, IPS_SEEN_REPLY
from .ctnetlink import FALLBACK_TIMEOUT
from .dumps import Dumps
from .flow import Flow, flow_key
from .jobs import CREATE, DELETE, LOOSEN, TIMER, UPDATE, Job, JobQueue, Request, Work, size_of
from .rows import (
    MARK_FROM_END,
    NO_TIMEOUT,
    SCALE_FROM_END,
    STATE_FROM_END,
    TAIL_BYTES,
    TIMEOUT_FROM_END,
    Changes,
    merge_extras,
    merge_value,
    pack,
    unpack,
)
from .situation import DUMP_ROOM, SORTED_PER_TURN, Question, Situation
from .tables import SINCE_BYTES, Copies, ExternalCache
from .takeover import TakeOver, is_open

FEW_ROWS = 16  # up to which they are compared one by one
RETRY_REFUSED_S = 10.0  # at first; the wait doubles from one vain attempt to the next
RETRY_REFUSED_MAX_S = 600.0

UNKNOWN_HELPERS = 16  # names that are kept

ADOPTING = 1  # attempt of an update whose success means: the kernel holds the replica

_DONE = {
    **{CREATE: "kernel_created", UPDATE: "kernel_updated", TIMER: "kernel_timers_set", DELETE: "kernel_deleted"},
    LOOSEN: "kernel_loosened",
}

_KEPT_BITS = IPS_SEEN_REPLY | IPS_ASSURED
_KEPT_FIELDS = ("mark", "labels", "seqadj", "tcp_wscale", "sctp_vtags")


class Replicas:
    """Flows of a peer on this node.  ``adopting``: an entry that is in the kernel already is one of its earlier life.

    ``excluded``: flows of the peer's last bulk, and since, that this node's filter excludes.  ``refused_at``: when what
    the kernel refuses is tried again (monotonic seconds).
    """

    def __init__(self, situation: Situation, dumps: Dumps, now: float) -> None:
        self.cache = ExternalCache(situation.settings.table_limit, now)
        self.copies = Copies(situation.hot)
        self.takeover = TakeOver(situation, self.cache, self.copies)
        self.jobs = JobQueue()
        self.adopting = False
        self.excluded = 0
        self.refused_at: float | None = None
        self._situation = situation
        self._counters = situation.counters
        self._dumps = dumps
        self._asked = 0  # flows handed out whose result is not here yet
        self._orphans: dict[bytes, list[Request]] = {}  # by the key of the master that they wait for
        self._refused_wait_s = RETRY_REFUSED_S

    def clear(self) -> None:
        """There are none, and the kernel is asked nothing any more."""
        self.takeover.stop()
        self.jobs.clear()
        self.forget_all()
        self._orphans.clear()
        self._situation.unknown_helpers.clear()
        self.excluded = 0

    def forget_all(self) -> None:
        """Empty the external cache; the kernel keeps its entries."""
        self.cache.clear()
        self.copies.clear()

    def flows(self) -> Iterator[tuple[Flow, float]]:
        """Flows and when their replication began (monotonic seconds)."""
        for key, value, extras, since in self.cache.items():
            yield unpack(key, value, extras), since

    # --- what the peer says ------------------------------------------------------------------------------------------

    def store_rows(self, rows: Mapping[bytes, bytes], now: float) -> None:
        table = self.cache.table
        fresh = rows
        if not table.keys().isdisjoint(rows):
            fresh = {key: value for key, value in rows.items() if key not in table}
            known = {key: value for key, value in rows.items() if key in table} if fresh else rows
            self._store_known(known)
        if not fresh:
            return
        stored = self.cache.add_rows(fresh, now)
        self._counters["external_cache_full"] += len(fresh) - len(stored)
        if self._situation.hot:
            self._make(list(stored))

    def _store_known(self, rows: Mapping[bytes, bytes]) -> None:
        """Newer states of replicas.  The kernel's copies follow only where that matters before a take-over."""
        table, extras, copies = self.cache.table, self.cache.extras, self.copies
        changed = []
        for key, value in _changed_copies(rows, [table[key] for key in rows]):
            changed.append((key, value, extras.get(key, b"")))
            if extras and rows[key][:-TAIL_BYTES] != value[:-TAIL_BYTES]:
                extras.pop(key, None)  # it is another flow
        self.cache.replace_rows(rows, [(key, value) for key, value, _extras in changed])
        if not self._situation.hot:
            return
        for key, value, old_extras in changed:
            if key in copies.asked:
                copies.outdated.setdefault(key, (value, old_extras))
            elif copies.held(key):
                self._refresh(key, value, old_extras)
        if not copies.settled:
            self._make([key for key in rows if key not in copies.asked and not copies.held(key)])

    def store_flow(self, key: bytes, value: bytes, extras: bytes, now: float) -> None:
        before = self.cache.get(key)
        if before is not None and before.value[:-TAIL_BYTES] == value[:-TAIL_BYTES]:
            value = merge_value(before.value, value)  # the kernel's events leave out what did not change
            extras = merge_extras(before.extras, extras)
        if not self.cache.put(key, value, extras, now):
            self._counters["external_cache_full"] += 1
        elif not self._situation.hot:
            return
        elif before is None:
            self._make((key,))
        elif key in self.copies.asked:
            self.copies.outdated.setdefault(key, (before.value, before.extras))
        elif self.copies.held(key):
            self._refresh(key, before.value, before.extras)
        else:
            self._make((key,))

    def delete(self, keys: Iterable[bytes]) -> None:
        known = self.cache.take(keys)
        self.copies.forget(known)
        if self._situation.hot:
            self.jobs.work(DELETE, known)

    def exclude(self, keys: Sequence[bytes]) -> None:
        """The peer replicates what this node's filter excludes: the filters are different."""
        self._counters["refused_by_filter"] += len(keys)
        if not self._situation.active:
            self.excluded += len(keys)
            self.delete(keys)

    def refilter(self) -> None:
        """The filter is another one: what it excludes goes (nobody else would remove it)."""
        excluded = []
        for key, value, extras, _since in self.cache.items():
            if not self._situation.filter.concerns(unpack(key, value, extras)):
                self._counters["excluded_removed"] += 1
                excluded.append(key)
        self.delete(excluded)

    def begin_bulk(self) -> None:
        self.cache.begin_bulk()
        self.excluded = 0
        self.adopting = self._situation.hot

    def end_bulk(self) -> None:
        """What the bulk did not name is stale and goes."""
        stale = self.cache.end_bulk()
        self._counters["stale_removed"] += len(stale)
        self.delete(stale)

    def take_late_rows(self, rows: Mapping[bytes, bytes]) -> None:
        """Flows that this active node may lack."""
        keys, values = list(rows), list(rows.values())
        self.jobs.work(CREATE, keys, values, list(map(self.takeover.lifetime, keys, values)))

    def take_late_flow(self, key: bytes, value: bytes, flow: Flow) -> None:
        self.jobs.ask(CREATE, key, flow, self.takeover.lifetime(key, value))

    # --- what the kernel does by itself ------------------------------------------------------------------------------

    def vanished(self, keys: Iterable[bytes]) -> None:
        """Somebody (an operator, the kernel's timer) removed entries that the peer still has."""
        table, held = self.cache.table, self.copies.held
        vanished = [key for key in keys if key in table and held(key)]
        self._counters["replicas_restored"] += len(vanished)
        self._make(vanished)

    def forget_ended(self, changes: Changes) -> None:
        """While replicas get their true states: what ends here already the kernel knows better."""
        table = self.cache.table
        ended = [key for key in changes.gone if key in table]
        for rows in changes.rows.values():
            ended.extend(
                key for key, value in rows.items() if key in table and not is_open(key[0], value[-STATE_FROM_END])
            )
        ended.extend(flow.key for flow in changes.flows if not is_open(flow.proto, flow.state))
        self.cache.take(ended)
        self.copies.forget(ended)

    # --- dumps -------------------------------------------------------------------------------------------------------

    def reconcile_rows(self, key_len: int, rows: Mapping[bytes, bytes]) -> None:
        """Compare entries of this backup's kernel with the external cache; the cache is right.

        What the cache does not know and the filter excludes is not this daemon's to remove.
        """
        table = self.cache.table
        known = [key for key in rows if key in table]
        if len(known) != len(rows):
            unknown = {key: value for key, value in rows.items() if key not in table}
            stale = list(self._situation.filter.concerned_rows(key_len, unknown))
            self._counters["stale_removed"] += len(stale)
            self.jobs.work(DELETE, stale)
        if not known:
            return
        self._dumps.seen.update(known)
        end = len(rows[known[0]]) - TAIL_BYTES
        replaced = [key for key in known if rows[key][:end] != table[key][:end]]
        if replaced:
            self._replace(replaced)
        if not self.copies.settled:
            self._park([key for key in known if key not in self.copies.asked and not self.copies.held(key)])

    def reconcile_flow(self, flow: Flow) -> None:
        key, value, _extras = pack(flow)
        self.reconcile_rows(len(key), {key: value})

    def reconciled(self) -> None:
        """All of the kernel's table was seen: make what is missing."""
        seen, asked = self._dumps.seen, self.copies.asked
        missing = [key for key in self.cache.table if key not in seen and key not in asked]
        self._counters["replicas_restored"] += len(missing)
        self._make(missing)
        self.adopting = False

    def mend(self, translated: Sequence[bytes], others: Sequence[bytes]) -> None:
        """The kernel holds replicas with another translation, or in another state than it must."""
        if translated:
            self._replace(translated)
        self._hold(UPDATE, others, ADOPTING)

    def make_again(self, keys: Sequence[bytes]) -> None:
        """The kernel lost replicas, and said nothing."""
        self._make(keys)

    def remove_ghosts(self, keys: Sequence[bytes]) -> None:
        """The kernel has entries that are no replicas."""
        self.jobs.work(DELETE, keys)

    def flush_rows(self, key_len: int, rows: Mapping[bytes, bytes]) -> None:
        doomed = list(self._situation.filter.concerned_rows(key_len, rows))
        self.copies.lose([key for key in doomed if key in self.cache])
        self.jobs.work(DELETE, doomed)

    def flush_flow(self, flow: Flow) -> None:
        key, value, _extras = pack(flow)
        self.flush_rows(len(key), {key: value})

    def loosen_rows(self, key_len: int, rows: Mapping[bytes, bytes]) -> None:
        """Packets of these flows may have passed through the peer, and this active node's kernel has not seen them.

        To it what acknowledges their data is INVALID for ever (nf_conntrack_proto_tcp.c, tcp_in_window), unless it is
        liberal about the connection.
        """
        tcp = {key: value for key, value in rows.items() if key[0] == IPPROTO_TCP}
        if tcp:
            self.jobs.work(LOOSEN, list(self._situation.filter.concerned_rows(key_len, tcp)))

    def loosen_flow(self, flow: Flow) -> None:
        key, value, _extras = pack(flow)
        self.loosen_rows(len(key), {key: value})

    # --- work for the kernel -----------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Something is under way towards the kernel, or is to be."""
        waiting = self._orphans and not self.cache.bulk_running
        return bool(self.jobs or self._asked or self.takeover.running or waiting)

    @property
    def overloaded(self) -> bool:
        """The kernel is behind."""
        return self.jobs.waiting > DUMP_ROOM

    def kernel_work(self, limit: int) -> list[Job]:
        """Requests for at most ``limit`` flows, see :meth:`engine.Engine.kernel_work`."""
        out = self.jobs.take(limit)
        # only when the kernel has what it was asked for before: a replica under way still gets a parked timer
        if not (self._asked or out):
            out = self.takeover.work(limit)
            if not out and self._orphans and not self.takeover.running and not self.cache.bulk_running:
                self._adopt_orphans(list(self._orphans))  # no master comes any more
                out = self.jobs.take(limit)
        self._asked += sum(map(size_of, out))
        return out

    def results(self, job: Job, failures: Collection[tuple[int, int]]) -> Sequence[bytes]:
        """What a piece of work came to: index in it and errno of what failed.

        Returns keys of what was made for an active node and is no replica: late flows.
        """
        self._asked -= size_of(job)
        if isinstance(job, Request):
            if not failures:
                return self._accepted(job, [job.key])
            self._failed(job, next(iter(failures))[1])
            return ()
        failed = dict(failures)
        done = [key for index, key in enumerate(job.keys) if index not in failed] if failed else job.keys
        late = self._accepted(job, done)
        if failed and job.operation == CREATE and job.attempt == 0:
            failed = self._exist(job, failed)
        for index, error in failed.items():
            self._failed(job.request(index), error)
        return late

    def _exist(self, job: Work, failed: dict[int, int]) -> dict[int, int]:
        """Many entries that are there already: kept as a node's own, or adopted.  Returns the other failures."""
        active = self._situation.active
        if not (active or self.adopting):
            return failed
        there = [job.keys[index] for index, error in failed.items() if error == errno.EEXIST]
        if active:
            self._counters["kept_own"] += len(there)  # the flows passed here already: this node knows them better
        else:
            table, held = self.cache.table, self.copies.held
            self._park([key for key in there if key in table and not held(key)])
        return {index: error for index, error in failed.items() if error != errno.EEXIST}

    def _make(self, keys: Sequence[bytes], attempt: int = 0) -> None:
        """Have the kernel make the entries of replicas, as the peer described them last, with parked timers."""
        self._hold(CREATE, keys, attempt)

    def _park(self, keys: Sequence[bytes]) -> None:
        """The kernel has the entries already (an earlier life of this node): adopt them."""
        self._counters["adopted"] += len(keys)
        self._hold(UPDATE, keys, ADOPTING)

    def _hold(self, operation: str, keys: Sequence[bytes], attempt: int) -> None:
        if not keys:
            return
        self.copies.ask(keys)
        extras = self.cache.extras
        if extras:
            for key in keys:
                if key in extras:
                    replica = self.cache.get(key)
                    if replica is not None:
                        flow = unpack(key, replica.value, replica.extras)
                        self.jobs.ask(operation, key, flow, self._parked([replica.value])[0], attempt)
            keys = [key for key in keys if key not in extras]
        stored = self.cache.stored(keys)
        self.jobs.work(operation, keys, stored, self._parked(stored, SINCE_BYTES), attempt)

    def _parked(self, values: Sequence[bytes], behind: int = 0) -> list[int]:
        """Timers of replicas: long, because a flow that is refreshed by traffic makes no events.

        ``behind``: bytes that stand behind each value.  The same number is the same object, so that a long queue is not
        full of them.
        """
        first, end = -TIMEOUT_FROM_END - behind, -STATE_FROM_END - behind
        raw = list(map(operator.itemgetter(slice(first, end)), values))
        return list(map({told: self._timer(int.from_bytes(told, "big")) for told in set(raw)}.__getitem__, raw))

    def _timer(self, told: int) -> int:
        """Of a replica of which the peer told this timeout or NO_TIMEOUT."""
        if not self._situation.hot:
            return FALLBACK_TIMEOUT if told == NO_TIMEOUT else told
        parked = self._situation.settings.park_timeout_s
        return parked if told < parked or told == NO_TIMEOUT else told

    def _replace(self, keys: Sequence[bytes]) -> None:
        """The kernel holds earlier incarnations of replicas, with other translations."""
        self._counters["replaced"] += len(keys)
        self.jobs.work(DELETE, keys)
        self._make(keys)

    def _refresh(self, key: bytes, value: bytes, extras: bytes) -> None:
        """Bring the kernel's entry of a replica from this older state to the newest, as far as that matters before a
        take-over."""
        replica = self.cache.get(key)
        if replica is None:
            return
        end = len(value) - TAIL_BYTES
        if value[:end] != replica.value[:end]:
            self.jobs.work(DELETE, [key])
            self._make([key])
            return
        old, new = unpack(key, value, extras), unpack(key, replica.value, replica.extras)
        if new.status & ~old.status & _KEPT_BITS or any(
            getattr(old, name) != getattr(new, name) for name in _KEPT_FIELDS
        ):
            timeout = self._parked([replica.value])
            if replica.extras:
                self.jobs.ask(UPDATE, key, new, timeout[0])
            else:
                self.jobs.work(UPDATE, [key], [replica.value], timeout)

    # --- what the kernel said ----------------------------------------------------------------------------------------

    def _accepted(self, job: Job, keys: Sequence[bytes]) -> Sequence[bytes]:
        self._counters[_DONE[job.operation]] += len(keys)
        if (job.operation != CREATE and job.attempt != ADOPTING) or not keys:
            return ()
        table, active = self.cache.table, self._situation.active
        known = list(filter(table.__contains__, keys))
        if self._orphans:
            self._adopt_orphans(known)
        late = [key for key in keys if key not in table] if active and len(known) != len(keys) else ()
        if self._dumps.current is not None:
            self._dumps.seen.update(known)  # a running dump may have passed its place already
        self.copies.hold(known)
        if self.copies.outdated and not active:  # some changed meanwhile
            for key in known:
                before = self.copies.outdated.pop(key, None)
                if before is not None:
                    self._refresh(key, *before)
        return late

    def _failed(self, request: Request, error: int) -> None:
        operation, key, flow, timeout, attempt = request
        active, known = self._situation.active, key in self.cache
        if operation in (DELETE, LOOSEN):
            if error != errno.ENOENT:
                self._refuse(request, error)
        elif operation in (UPDATE, TIMER):
            if error == errno.ENOENT and known and operation == UPDATE and active:
                self.jobs.ask(CREATE, key, flow, timeout, 1)
            elif error == errno.ENOENT and active:
                pass  # it ended meanwhile
            elif error == errno.ENOENT and known and (attempt == ADOPTING or key not in self.copies.asked):
                self._make((key,), 1)
            elif error == errno.EBUSY and operation == UPDATE:
                self._counters["status_kept"] += 1  # the entry has status bits that the peer's has not
                self.jobs.ask(TIMER, key, flow, timeout, attempt)
            elif error != errno.ENOENT:
                self._refuse(request, error)
        elif not known and not active:
            pass  # the peer removed it meanwhile
        elif error == errno.EEXIST and active:
            self._counters["kept_own"] += 1  # the flow passed here already: this node knows it better
        elif error == errno.EEXIST and known and self.copies.held(key):
            pass  # another request was faster
        elif error == errno.EEXIST and attempt == 0 and known:
            if self.adopting:
                self._park((key,))
            else:
                self.jobs.work(DELETE, [key])
                self._make((key,), 1)
        elif error == errno.ENOENT and flow.master is not None and attempt < 2:
            if attempt == 0 and self._waits_for_master(request):
                return
            self._counters["degraded_without_master"] += 1
            self.jobs.ask(CREATE, key, flow._replace(master=None, master_proto=0), timeout, 2)
        elif error != errno.EEXIST and flow.helper is not None and attempt < 3:
            self._counters["degraded_without_helper"] += 1
            if len(self._situation.unknown_helpers) < UNKNOWN_HELPERS:
                self._situation.unknown_helpers.add(flow.helper)
            self.jobs.ask(CREATE, key, flow._replace(helper=None), timeout, 3)
        else:
            self._refuse(request, error)

    def _waits_for_master(self, request: Request) -> bool:
        """A related flow came before the flow that it is related to: may that one still come?"""
        flow, master = request.flow, request.flow.master
        if master is None:
            return False
        key = flow_key(flow.master_proto or flow.proto, flow.zone, master, flow.zone_dir)
        if not self.cache.bulk_running and (key not in self.cache or self.copies.held(key)):
            return False
        self._orphans.setdefault(key, []).append(request._replace(attempt=1))
        return True

    def _adopt_orphans(self, masters: Iterable[bytes]) -> None:
        """The kernel has these flows now, or will never have them."""
        for key in masters:
            for request in self._orphans.pop(key, ()):
                self.jobs.push(request)

    def _refuse(self, request: Request, error: int) -> None:
        name = errno.errorcode.get(error, str(error)).lower()
        self._counters[f"kernel_refused_{request.operation}_{name}"] += 1
        if request.key in self.cache and (request.operation == CREATE or request.attempt == ADOPTING):
            self.copies.refuse(request.key, error)
            if self.refused_at is None:
                self.refused_at = self._situation.now + self._refused_wait_s

    def retry_refused(self, now: float) -> None:
        """What stood in the way may be gone; if not, what is stale of it goes."""
        self.refused_at = None
        refused = self.copies.refused
        if self._situation.active or not refused:
            self._refused_wait_s = RETRY_REFUSED_S
            return
        self._counters["refused_tried_again"] += len(refused)
        self._refused_wait_s = min(self._refused_wait_s * 2, RETRY_REFUSED_MAX_S)
        self.refused_at = now + self._refused_wait_s
        taken = [key for key, error in refused.items() if error == errno.EEXIST]
        for replica in map(self.cache.get, taken[:SORTED_PER_TURN]):
            if replica is not None:
                flow = unpack(replica.key, replica.value)
                self._situation.questions.append(Question(flow._replace(orig=flow.reply), replica.key))
        self._make([key for key, error in refused.items() if error != errno.EEXIST])

    def in_the_way(self, replica: bytes, found: Flow | None) -> None:
        """What uses the tuple of this refused replica: if it is stale, it goes; then the replica is made."""
        if replica not in self.cache:
            return
        if found is not None and found.key not in self.cache and self._situation.filter.concerns(found):
            self._counters["stale_removed"] += 1
            self.jobs.work(DELETE, [found.key])
        self._make((replica,), 1)


def _changed_copies(rows: Mapping[bytes, bytes], before: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """Which flows changed in more than timer, state and flags, and their values before.

    ``before``: what is stored (value and 4 bytes) of each of the rows, which have one shape.  Usually nothing changed:
    so columns are compared first.
    """
    size = len(next(iter(rows.values())))
    told = size - TIMEOUT_FROM_END  # reply tuple and status
    scale, mark = size - SCALE_FROM_END, size - MARK_FROM_END
    if len(rows) > FEW_ROWS:
        new, old = b"".join(rows.values()), b"".join(before)
        places = (*range(told), scale, *range(mark, size))
        if all(new[place::size] == old[place :: len(before[0])] for place in places):
            return []
    return [
        (key, stored[:size])
        for (key, value), stored in zip(rows.items(), before)
        if value[:told] != stored[:told] or value[scale] != stored[scale] or value[mark:] != stored[mark:size]
    ]
