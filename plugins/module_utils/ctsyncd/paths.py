# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The links to one peer: which of them work, which one carries the session, how long a datagram each of them takes.

Sans-I/O, as the session, which seals what is said here and hands over what comes in.  Times are seconds of a monotonic
clock.  A link is known by its place in the lists of both nodes; the first one is preferred.  A link works if probes on
it come back: neither carrier nor routes nor ICMP are believed.  The length that it takes is found the same way
(RFC 8899, packetization layer path MTU discovery for datagram transports).
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any, NamedTuple

from . import wire

SMALLEST_PAYLOAD = 512  # bytes; a link that takes no more is of no use
STANDBY_S = 1.0  # between two probes of a link that does not carry the session, or is down
URGENT_S = 0.1  # an answer that must come at once is overdue after it ...
URGENT_ROUND_TRIPS = 3  # ... or after so many round-trip times, if that is longer
SILENCE = 0.6  # of ``dead_after``: so long without an answer means that a link is down
LATE = 1 / 4  # of the interval between heartbeats: so much later goes by itself what should ride on one
FIRST_S = 0.02  # after a session began its links are probed
SETTLE_S = 0.3  # a new session gives each link so long to prove that it works
CONFIRM_S = 10.0  # between two probes that are as long as the longest datagram
RAISE_S = 30.0  # between two attempts with longer ones
DOUBTS = 2  # long probes lost, short ones not: then every length is tried ...
SEARCHES = 3  # ... so often
HOLD_S = 5.0  # a link that was left must work for so long before it is used again; twice as long each time ...
HOLD_MAX_S = 60.0  # ... up to this
CALM_S = 600.0  # without a failure: the next one counts as the first one
_OUTSTANDING = 16  # short probes that are remembered
_LONG = 64  # long ones
_RECENT = 64  # probes over which the share of lost ones is taken
_NEVER = float("inf")

# Usual lengths of packets on the way between two nodes: jumbo frames, FDDI, Ethernet, PPPoE, GRE, VXLAN, WireGuard,
# IPsec, the least of IPv6, the least that IPv4 networks give
PACKETS = (9000, 8192, 4352, 2002, 1500, 1492, 1480, 1476, 1450, 1420, 1400, 1380, 1350, 1300, 1280, 1006, 576)
IPV4_BYTES = 28  # headers of IPv4 and UDP
IPV6_BYTES = 48

UNKNOWN, UP, DOWN = "unknown", "up", "down"


class Sending(NamedTuple):
    """Frames that go over this very link, in a datagram of their own."""

    link: int
    frames: bytes


class _Path:
    """What is known of one link."""

    def __init__(self, name: str, headers: int, ceiling: int) -> None:
        self.name = name
        self.headers = headers  # bytes of IP and UDP in front of a datagram
        self.ceiling = ceiling  # longest datagram that may be sent, by configuration and interface
        self.limit = ceiling  # longest one that is believed to arrive
        self.usable = True  # there is a socket, and the kernel takes datagrams
        self.state = UNKNOWN
        self.since = 0.0
        self.contrast: float | None = None  # since when another link is heard of and this one is not
        self.hold = 0.0
        self.left_at = -_NEVER
        # the peer's probes
        self.heard: tuple[int, float] | None = None  # number and time of the latest one that may wait for a heartbeat
        self.asked: list[tuple[int, float]] = []  # those that must be answered at once
        # own probes
        self.number = 0
        self.probe_at = _NEVER
        self.probed_at = -_NEVER
        self.short: dict[int, float] = {}  # sent and not answered, oldest first
        self.long: dict[int, int] = {}  # the same; their length
        self.arrived_at = -_NEVER  # when the peer last said that something came
        self.rtt: float | None = None
        self.recent: collections.deque[bool] = collections.deque(maxlen=_RECENT)  # was it answered?
        # length
        self.doubt = True  # is the limit still right?
        self.doubts = 0  # rounds in which a short probe was answered and a long one was not
        self.answered = False  # a short probe, in this round
        self.longest = 0  # that arrived since the doubt began
        self.confirm_at = _NEVER
        self.confirmed_by: float | None = None  # an answer to a long probe is waited for until then
        self.raise_at = _NEVER

    def reset(self, now: float) -> None:
        """Nothing is known any more."""
        self.state, self.since = UNKNOWN, now
        self.heard = None
        for unanswered in (self.asked, self.short, self.long, self.recent):
            unanswered.clear()
        self.arrived_at = -_NEVER
        self.contrast = None
        self.rtt = None
        self.limit = self.ceiling
        self.confirm_at, self.confirmed_by, self.raise_at = now + CONFIRM_S, None, now + RAISE_S
        self.begin_doubt(now + FIRST_S)

    def begin_doubt(self, now: float) -> None:
        self.doubt = True
        self.doubts = self.longest = 0
        self.answered = False
        self.confirmed_by = None
        self.probe_at = now

    def begin_confirmation(self, now: float, patience: float) -> None:
        """A probe as long as the limit leaves; its answer may take so many seconds."""
        self.confirm_at = now + CONFIRM_S
        self.confirmed_by = now + patience

    def end_doubt(self, now: float) -> None:
        self.doubt = False
        self.confirmed_by = None
        self.confirm_at = now + CONFIRM_S

    def lengths(self, above: int, most: int) -> list[int]:
        """Of datagrams that are worth a try, ``most`` the longest of them."""
        usual = {most, *(packet - self.headers for packet in PACKETS)}
        return sorted((length for length in usual if max(above, SMALLEST_PAYLOAD - 1) < length <= most), reverse=True)

    def oldest(self, otherwise: float) -> float:
        """When the first probe was sent that is not answered."""
        return next(iter(self.short.values())) if self.short else otherwise

    @property
    def patience(self) -> float:
        """So long an answer may take that must come at once."""
        return max(URGENT_S, URGENT_ROUND_TRIPS * (self.rtt or 0.0))


class Paths:
    """The links to one peer, in the order of preference.

    ``links``: name and IP version of each; ``payload``: longest datagram (bytes of UDP payload) that may be sent.
    ``chosen`` carries the session; ``payload`` is what it takes; ``generation`` goes up when either changes;
    ``failed_over``, which the session takes back, tells that what is on its way is lost; :meth:`examine` and
    :meth:`poll` are due at ``due``.
    """

    def __init__(
        self,
        links: Sequence[tuple[str, int]] = (("", 4),),
        *,
        payload: int,
        interval_s: float = 0.2,
        dead_after_s: float = 1.0,
    ) -> None:
        self.counters: collections.Counter[str] = collections.Counter()
        self.chosen = 0
        self.payload = payload
        self.generation = 0
        self.failed_over = False
        self.due = _NEVER
        self.heard_at = [-_NEVER] * len(links)  # a datagram of the session, on each link
        self._most = payload
        self._paths = [_Path(name, IPV6_BYTES if version == 6 else IPV4_BYTES, payload) for name, version in links]
        self._several = len(links) > 1
        self._interval = interval_s
        self._dead_after = dead_after_s
        self._began = -_NEVER
        self._woke = _NEVER
        self._running = False

    def __len__(self) -> int:
        return len(self._paths)

    def set_timers(self, interval_s: float, dead_after_s: float) -> None:
        self._interval = interval_s
        self._dead_after = dead_after_s

    # --- what the edge knows -----------------------------------------------------------------------------------------

    def set_usable(self, link: int, usable: bool, now: float) -> None:
        """Can anything be sent?  There is a socket, and the kernel did not refuse the last datagram."""
        path = self._paths[link]
        if usable == path.usable:
            return
        path.usable = usable
        if not usable:
            self._fall(path, now)
        elif self._running:
            path.probe_at = now
        self._choose(now)

    def set_ceiling(self, link: int, payload: int, now: float) -> None:
        """The interface takes datagrams of so many bytes, whatever the way beyond it does."""
        path = self._paths[link]
        ceiling = max(SMALLEST_PAYLOAD, min(payload, self._most))
        if ceiling == path.ceiling:
            return
        path.ceiling = ceiling
        if ceiling < path.limit:
            self._lower(path, ceiling, now)
        elif self._running:
            path.raise_at = now
        else:
            path.limit = ceiling
            self._follow()
        self._choose(now)

    # --- what the session tells --------------------------------------------------------------------------------------

    def begin(self, now: float) -> None:
        """A new session: what was known of the links is old."""
        self._running = True
        self._began = self._woke = now
        self.heard_at = [now] * len(self._paths)
        for path in self._paths:
            path.reset(now)
        self._use(next((link for link, path in enumerate(self._paths) if path.usable), 0))
        self.failed_over = False
        self._plan(now)

    def end(self) -> None:
        """The session is over: there is nothing to seal probes with."""
        self._running = False
        self.due = _NEVER

    def wake(self, now: float) -> None:
        """The node looks after its session, as with each heartbeat.  If it did not, the links were not silent."""
        if now - self._woke > self._interval * (1 + 2 * LATE):
            self.heard_at = [now] * len(self._paths)
            for path in self._paths:
                path.contrast = None
                if path.short:
                    path.short.clear()
                    path.probe_at = now
            self._plan(now)
        self._woke = now

    def suspect(self, now: float) -> None:
        """What was sent over the chosen link is not acknowledged."""
        path = self._paths[self.chosen]
        if self._running and path.state == UP and not path.doubt:
            path.begin_doubt(now)
            self._plan(now)

    def receive_probe(self, probe: wire.Probe, link: int, now: float) -> bool:
        """False where it was sent over another link: the lists of the two nodes differ."""
        if probe.link != link:
            return False
        path = self._paths[link]
        if not probe.at_once:
            path.heard = (probe.number, now)
        elif len(path.asked) < _LONG:
            path.asked.append((probe.number, now))
        if path.short and not path.doubt and now - path.oldest(now) >= path.patience:
            path.probe_at = now  # the peer speaks, and says nothing of this node's probe
        self._plan(now)
        return True

    def receive_echo(self, echo: wire.Echo, link: int, now: float) -> bool:
        """False for an answer to what was never asked."""
        if echo.link >= len(self._paths) or echo.number >= self._paths[echo.link].number:
            return False
        path = self._paths[echo.link]
        path.arrived_at = now
        path.contrast = None
        chosen = self._paths[self.chosen]
        if chosen is not path and chosen.contrast is None and (chosen.short or chosen.state == DOWN):
            chosen.contrast = now
        sent = path.short.pop(echo.number, None)
        if sent is not None:
            path.answered = True
            path.recent.append(True)
            for number in [number for number in path.short if number < echo.number]:
                del path.short[number]
                path.recent.append(False)
            if echo.link == link:
                sample = max(0.0, now - sent - echo.delay / 1_000_000)
                path.rtt = sample if path.rtt is None else 0.875 * path.rtt + 0.125 * sample
        length = path.long.pop(echo.number, 0)
        if length:
            self._passed(path, length, now)
        if echo.link == link and path.state != UP and path.usable:
            path.state, path.since = UP, now
            if path.doubt:
                path.probe_at = min(path.probe_at, path.probed_at + path.patience)
            if chosen.state == DOWN:
                chosen.probe_at = now
        if not path.short and not path.doubt and path.state == UP:
            path.probe_at = path.probed_at + self._regular(echo.link)
        self._choose(now)
        return True

    def _passed(self, path: _Path, length: int, now: float) -> None:
        """A datagram of this length reached the peer."""
        path.longest = max(path.longest, length)
        if length < path.limit:
            return
        path.end_doubt(now)
        if path.limit < min(length, path.ceiling):
            path.limit = min(length, path.ceiling)
            self.counters["links_longer"] += 1
            self._follow()

    # --- what comes of it --------------------------------------------------------------------------------------------

    def _regular(self, link: int) -> float:
        """From one probe to the next one where nothing is wrong.  A single link needs none: heartbeats do."""
        if not self._several:
            return _NEVER
        return self._interval * (1 + LATE) if link == self.chosen else max(STANDBY_S, self._interval)

    @property
    def _deaf_after(self) -> float:
        """So long without a datagram on a link means that nothing comes through: it is probed more often than that."""
        return self._dead_after + (max(STANDBY_S, self._interval) if self._several else 0.0)

    def _deaf(self, link: int, path: _Path, now: float) -> bool:
        return path.state != DOWN and now - self.heard_at[link] > self._deaf_after

    def _silence(self, path: _Path) -> float:
        """Before the peer takes this node for dead; but an answer may wait for a heartbeat."""
        return max(SILENCE * self._dead_after, self._interval * (1 + 2 * LATE), URGENT_ROUND_TRIPS * (path.rtt or 0.0))

    def _fall(self, path: _Path, now: float) -> None:
        if path.state == UP:
            self.counters["links_failed"] += 1
        if path.state != DOWN:
            path.state, path.since = DOWN, now
            path.probe_at = max(path.probed_at + STANDBY_S, now)
            path.confirmed_by = None
            path.doubt, path.doubts, path.answered = True, 0, False

    def _lower(self, path: _Path, limit: int, now: float) -> None:
        path.limit = max(SMALLEST_PAYLOAD, limit)
        path.raise_at = now + RAISE_S
        self.counters["links_shorter"] += 1
        if self._running and path.state != DOWN:
            path.begin_doubt(now)
        self._follow()

    def _rank(self, path: _Path, now: float) -> int:
        """The lower, the better."""
        if not path.usable:
            return 4
        if path.state == UP or (path.state == UNKNOWN and now - self._began < SETTLE_S):
            return 0
        if now - path.arrived_at < self._deaf_after:  # one direction works, the one that is needed here
            return 1
        return 2 if path.state == UNKNOWN else 3

    def _choose(self, now: float) -> None:
        """Fail over at once, fail back to a link that has worked for a while."""
        if self._several and self._running:
            ranks = [self._rank(path, now) for path in self._paths]
            lowest = min(ranks)
            left = self._paths[self.chosen]
            if lowest < ranks[self.chosen]:
                better = (link for link, rank in enumerate(ranks) if rank == lowest)
                found = next((link for link in better if self._proved_better(self._paths[link], left, now)), None)
                if found is not None:
                    self.counters["failovers"] += 1
                    left.hold = min(2 * left.hold, HOLD_MAX_S) if now - left.left_at < CALM_S else HOLD_S
                    left.left_at = now
                    self._use(found)
                    self.failed_over = True
            for link, path in enumerate(self._paths[: self.chosen]):
                if path.state == UP and now >= self._returns_at(path):
                    self.counters["failbacks"] += 1
                    self._use(link)
                    break
        self._plan(now)

    @staticmethod
    def _proved_better(path: _Path, than: _Path, now: float) -> bool:
        """Was something heard of it while the other one was silent?  A busy peer answers on none of them, and then on
        one a moment before the other."""
        if not than.usable or than.state == UNKNOWN:
            return True
        return than.contrast is not None and path.arrived_at >= than.contrast and now >= than.contrast + URGENT_S

    @staticmethod
    def _returns_at(path: _Path) -> float:
        return path.since + path.hold

    def _confirms_at(self, path: _Path) -> float:
        """Where no heartbeat took the long probe along, because each status rode on a block."""
        return path.confirm_at + self._interval * (1 + LATE)

    def _use(self, link: int) -> None:
        self.chosen = link
        self._paths[link].contrast = None
        self.generation += 1
        self._follow()

    def _follow(self) -> None:
        limit = self._paths[self.chosen].limit
        if limit != self.payload:
            self.payload = limit
            self.generation += 1

    def _plan(self, now: float) -> None:
        """When is anything due?"""
        if not self._running:
            return
        due = _NEVER
        for link, path in enumerate(self._paths):
            if path.asked:
                due = now
            due = min(due, path.probe_at)
            if path.state != DOWN:
                due = min(due, path.oldest(_NEVER) + self._silence(path))
            if path.heard is not None:
                due = min(due, path.heard[1] + self._interval * (1 + LATE))
            if path.confirmed_by is not None:
                due = min(due, path.confirmed_by)
            if path.state == UP and not path.doubt:
                if path.limit < path.ceiling:
                    due = min(due, path.raise_at)
                if link == self.chosen:
                    due = min(due, self._confirms_at(path))
            if link < self.chosen and path.state == UP:
                due = min(due, self._returns_at(path))
        chosen = self._paths[self.chosen]
        if chosen.state == DOWN and chosen.contrast is not None and now < chosen.contrast + URGENT_S:
            due = min(due, chosen.contrast + URGENT_S)
        if self._several and now < self._began + SETTLE_S:
            due = min(due, self._began + SETTLE_S)
        self.due = due

    # --- output ------------------------------------------------------------------------------------------------------

    def riding(self, now: float, room: int) -> bytes:
        """What a heartbeat over the chosen link, with room for so many bytes, takes along."""
        frames = b""
        path = self._paths[self.chosen]
        if not (self._several or path.asked or path.heard) and now < path.confirm_at and not self._deaf(0, path, now):
            return frames  # as nearly always
        answers = bool(path.asked)  # the peer beats at the same time, its next answer comes with its next heartbeat
        while path.asked and len(frames) + wire.ECHO_BYTES <= room:
            frames += self._echo(self.chosen, path.asked.pop(), now)
        for link, other in enumerate(self._paths):
            if other.heard is not None and len(frames) + wire.ECHO_BYTES <= room:
                frames += self._echo(link, other.heard, now)
                other.heard = None
        if path.state == UP and not path.doubt and len(frames) + wire.PROBE_BYTES <= room:
            patience = path.patience + (self._interval * (1 + LATE) if answers else 0.0)
            if now >= path.confirm_at:
                path.begin_confirmation(now, patience)
                frames += self._long_probe(self.chosen, path.limit, room - len(frames), at_once=not answers)
            elif self._several and now - path.probed_at >= self._interval / 2:
                frames += self._short_probe(self.chosen, now, at_once=not answers)
                path.probe_at = now + patience
        if frames:
            self._plan(now)
        if any(self._deaf(link, path, now) for link, path in enumerate(self._paths)):
            self.due = now  # looked at here, with each heartbeat: no wake-up for it alone
        return frames

    def examine(self, now: float) -> None:
        """Which links have fallen silent?  To be called before :meth:`riding` and :meth:`poll`, when they are due."""
        for link, path in enumerate(self._paths):
            silent = now - path.oldest(now) >= self._silence(path)
            if path.state != DOWN and (silent or self._deaf(link, path, now)):
                self._fall(path, now)
        self._choose(now)

    def poll(self, now: float) -> list[Sending]:
        """What goes over each link now, besides what rides on heartbeats."""
        out: list[Sending] = []
        if not self._running:
            return out
        for link, path in enumerate(self._paths):
            frames = self._answers(link, path, out, now)
            if path.confirmed_by is not None and now >= path.confirmed_by:
                path.begin_doubt(now)
            if path.state == UP and not path.doubt:
                if path.limit < path.ceiling and now >= path.raise_at:
                    path.raise_at = now + RAISE_S
                    self._try_lengths(link, path.lengths(path.limit, path.ceiling), out)
                if link == self.chosen and now >= self._confirms_at(path):
                    path.begin_confirmation(now, path.patience)
                    self._try_lengths(link, [path.limit], out)
            early = path.state == UP and now - path.probed_at >= self._regular(link) / 2  # the peer is answered anyway
            if now >= path.probe_at or (frames and early):
                frames += self._probe(link, path, out, now)
            if frames:
                out.append(Sending(link, frames))
        self._plan(now)
        return out

    def _answers(self, link: int, path: _Path, out: list[Sending], now: float) -> bytes:
        """To the probes that came over this link."""
        frames = b"".join([self._echo(link, asked, now) for asked in path.asked])
        path.asked.clear()
        if frames and path.state != UP and link != self.chosen:
            out.append(Sending(self.chosen, frames))  # over the link itself it may not arrive
        if path.heard is not None and now >= path.heard[1] + self._interval * (1 + LATE):
            out.append(Sending(self.chosen, self._echo(link, path.heard, now)))
            path.heard = None
        return frames

    def _probe(self, link: int, path: _Path, out: list[Sending], now: float) -> bytes:
        """A short probe, and long ones where the limit is in doubt."""
        if link == self.chosen and path.short:
            for other in self._paths:  # is it the link or the peer?
                if other is not path and other.state == UP and not other.short:
                    other.probe_at = min(other.probe_at, now)
        if path.doubt and path.state != DOWN:
            path.doubts += path.answered
            path.answered = False
            if path.doubts >= DOUBTS + SEARCHES:
                if path.limit > SMALLEST_PAYLOAD:
                    self._lower(path, path.longest, now)
                else:
                    path.end_doubt(now)
            self._try_lengths(link, path.lengths(0, path.limit) if path.doubts >= DOUBTS else [path.limit], out)
        frames = self._short_probe(link, now, at_once=True)
        path.probe_at = now + (STANDBY_S if path.state == DOWN else path.patience)
        return frames

    def _try_lengths(self, link: int, lengths: Sequence[int], out: list[Sending]) -> None:
        for length in lengths:
            frames = length - wire.DATA_OVERHEAD_BYTES
            out.append(Sending(link, self._long_probe(link, length, frames, at_once=True)))

    def _short_probe(self, link: int, now: float, *, at_once: bool) -> bytes:
        path = self._paths[link]
        while len(path.short) >= _OUTSTANDING:
            del path.short[next(iter(path.short))]
            path.recent.append(False)
        path.short[path.number] = path.probed_at = now
        self.counters["probes_sent"] += 1
        return self._numbered(link, at_once)

    def _long_probe(self, link: int, datagram: int, frame: int, *, at_once: bool) -> bytes:
        """``datagram``: bytes of the whole; ``frame``: of the probe in it."""
        path = self._paths[link]
        while len(path.long) >= _LONG:
            del path.long[next(iter(path.long))]
        path.long[path.number] = datagram
        self.counters["long_probes_sent"] += 1
        return self._numbered(link, at_once, frame)

    def _numbered(self, link: int, at_once: bool, length: int = 0) -> bytes:
        path = self._paths[link]
        path.number += 1
        return wire.encode_probe(wire.Probe(link, at_once, path.number - 1), length)

    @staticmethod
    def _echo(link: int, heard: tuple[int, float], now: float) -> bytes:
        number, at = heard
        return wire.encode_echo(wire.Echo(link, number, int((now - at) * 1_000_000)))

    # --- reports -----------------------------------------------------------------------------------------------------

    @property
    def down(self) -> list[str]:
        """Names of the links that do not work, in order, while another one does."""
        if not self._running or not any(path.state == UP for path in self._paths):
            return []
        return [path.name for path in self._paths if path.state == DOWN or not path.usable]

    @property
    def carrier(self) -> str:
        """Name of the link that carries the session."""
        return self._paths[self.chosen].name

    def status(self, now: float) -> list[dict[str, Any]]:
        """The links' part of ``status --json``: ``mtu`` in bytes of an IP packet, ``loss`` as a share of the probes."""
        return [
            {
                "interface": path.name,
                "state": path.state if self._running and path.usable else DOWN if self._running else UNKNOWN,
                "since_s": round(max(0.0, now - path.since), 3) if self._running else None,
                "carries": self._running and link == self.chosen,
                "rtt_ms": None if path.rtt is None else round(path.rtt * 1000, 3),
                "mtu": path.limit + path.headers,
                "loss": round(path.recent.count(False) / len(path.recent), 3) if path.recent else None,
            }
            for link, path in enumerate(self._paths)
        ]
