# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The daemon: one event loop that carries bytes and requests between the edges and the engine."""

from __future__ import annotations

import collections
import errno
import gc
import hashlib
import json
import logging
import os
import selectors
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from . import (
    __version__,
    control,
    ctnetlink,
    engine,
    expectation_render,
    expectation_sockets,
    jobs,
    netlink,
    readiness,
    render,
    service,
    situation,
    verification,
    vrrp,
)
from .client import ControlError
from .config import Config, parse, read
from .crypto import LibraryCrypto
from .errors import ConfigError, NetlinkError
from .flights import Flights
from .flow import Flow
from .helper_edge import HelperEdge
from .link import Link
from .paths import Paths
from .recorder import Recorder
from .session import Session
from .watch import READ, WRITE, Watch

LOG = logging.getLogger(__name__)

EVENTS_PER_TURN = 4096
DATAGRAMS_PER_TURN = 128
REQUESTS_PER_TURN = 1024
DUMP_SLICES_PER_TURN = 8
PACED_REST = 4.0  # a paced dump rests so many times as long as a slice of it took
MAX_EVENT_BUFFER = 256 << 20
LAST_S = 0.5  # for the events that wait, when the daemon stops
STORY_PATIENCE_S = 2.0  # for the disk, when the daemon stops
RULESET_CHECK_S = 3.0  # the fingerprint of the ruleset is read so often
VERDICT_S = 10.0  # a verdict of a ready node that nothing seems to change is made anew so often
PARAMETERS_CHECK_S = 10.0  # sysctls change while the daemon runs
ADDRESS_CHECK_S = 10.0  # the virtual IPs are looked up at every change, and this often in case a change was missed
IDLE_S = 2.0  # while nothing happens and all is well, what a second brings comes so often
EARLY_S = 0.05  # what a second brings is done so much earlier, if the daemon is awake
SLACK_S = 0.3  # what is not urgent waits so long for a wake-up that is needed anyway
REPORT_S = 0.1  # between two verdicts, on average
CROWD_S = 0.002  # after a link was read: what comes so soon seldom comes alone
HELD_S = 0.1  # a link that is held back, because the kernel is behind, is read so often
QUIET_S = 0.05  # without events: the next one is read at once
SPARSE_S = 0.0066  # between two events: a window would gather a few at most, so each is read at once
AVERAGED_EVENTS = 64
CROWDED = (10_000.0, 15_000.0)  # flows per second that the peer does not know: from here to there the window shrinks
CROWDED_WINDOW_S = 0.002  # ... to this ...
FLOOD = (25_000.0, 35_000.0)  # ... and from here to there it grows again: CPU time counts for more then
AVERAGED_S = 0.25  # over which they are counted ...
SURGE_S = 0.05  # ... and where they may be a flood: at its beginning each short window costs as much as a long one

NANOSECONDS = 1_000_000_000


class Window:
    """How long changes are gathered before they are read: the fewer wake-ups, the less it costs.

    Read at once is the first one after a quiet spell, and all of them while they are few.  Where a window pays it has
    its full length.  It is shorter where many flows come up that the peer has to learn of: it gathers plenty anyway,
    and these are what a loss of this node would lose.  In a flood it has its full length again.  Connections that end
    as fast as they come up shorten nothing: the longer the window, the more of them are over before they are told.
    Times in seconds.
    """

    def __init__(self) -> None:
        self._gap = QUIET_S  # between two events, on average
        self._fresh = 0.0  # flows per second that the peer does not know, on average ...
        self._surge = 0.0  # ... and lately
        self._last = float("-inf")  # when events were read last

    def opens(self, now: float, longest: float) -> float:
        """There is an event: how long may it wait for others?"""
        if self._gap >= SPARSE_S or now - self._last >= QUIET_S:
            return 0.0
        fresh, (lowest, highest), (above, flood) = self._fresh, CROWDED, FLOOD
        if fresh <= lowest:
            return longest
        most = max(fresh, self._surge)
        share = max(0.0, (highest - fresh) / (highest - lowest), (most - above) / (flood - above))
        if share >= 1.0:
            return longest
        length = CROWDED_WINDOW_S + share * max(0.0, longest - CROWDED_WINDOW_S)
        return min(longest, max(0.0, self._last + length - now))  # events wait since they were read last

    def alone(self, now: float) -> bool:
        """Is an event that is there now likely to be the only one?"""
        return self._gap >= SPARSE_S and now - self._last >= CROWD_S

    def read(self, events: int, fresh: int, now: float) -> None:
        """So many events were read, with so many flows that the peer does not know."""
        if not events:
            return
        since = now - self._last
        self._last = now
        rate = fresh / max(since, CROWDED_WINDOW_S)
        self._fresh += (rate - self._fresh) * min(1.0, since / AVERAGED_S)
        self._surge += (rate - self._surge) * min(1.0, since / SURGE_S)
        elapsed = min(since, QUIET_S)
        if events >= AVERAGED_EVENTS:
            self._gap = elapsed / events
        else:
            self._gap += (elapsed / events - self._gap) * events / AVERAGED_EVENTS


def pace(watchdog_s: float | None) -> tuple[float, float]:
    """Seconds from one look around to the next, while something happens and while nothing does.

    ``watchdog_s``: systemd wants to hear of the daemon this often, and stops it after twice that.
    """
    if watchdog_s is None:
        return 1.0, IDLE_S
    second_s = min(1.0, watchdog_s)
    return second_s, max(second_s, min(IDLE_S, watchdog_s / 2))


class Daemon:
    """Edges, engine and loop of one running daemon."""

    def __init__(self, config: Config, secrets: dict[int, bytes], path: str = "", digest: str = "") -> None:
        """``path``: the configuration's file, for reloads; ``digest``: SHA-256 of its text."""
        now = time.monotonic()
        self.config = config
        self._path = path
        self._digest = digest
        self._ruleset_problem = ""
        self._recorder = Recorder()
        self._recorder.note(now, "start", version=__version__, mode=config.mode, replicate=config.replicate)
        self._peer_said: dict[str, Any] = {}
        self._flights = Flights(os.environ.get("STATE_DIRECTORY", ""))
        self._not_reloaded = ""  # why the file's newest text is not in use
        self.started = now
        self.stopping = False
        self._virtual_ips = [(vip.interface, vip.address, vip.packed) for vip in config.virtual_ips]
        self._held: set[bytes] = set()
        self._sessions = [self._make_session(config, peer.node, secrets, now) for peer in config.peers]
        self._engine = engine.Engine(_settings(config), self._sessions, now)
        self._verdict = readiness.Verdict(readiness.NOT_READY, ("starting",), True)
        self._log = service.LimitedLog(LOG)
        self._notifier = service.Notifier()
        self._signals = service.Signals(signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        self._selector = selectors.DefaultSelector()
        self._requests = netlink.RequestSocket()
        self._events = netlink.EventSocket(
            config.netlink_buffer_bytes, (self._requests.portid,), self._engine.filter.events
        )
        self._helpers = HelperEdge(self._engine.helpers, self._requests, self._log)
        self._event_buffer = config.netlink_buffer_bytes
        self._follows = True
        self._window = Window()
        self._deadline = now  # the engine's
        self._rested = False  # the last turn left nothing to be done before that
        self._noted = False  # the recorder knows of the peers what the latest poll came to
        self._served = True  # something else than events and datagrams came in this turn
        self._events_at: float | None = None  # events wait; the window ends then
        self._events_fd = self._events.fileno()
        self._watch = Watch(self._events_fd, self._selector.fileno())
        self._addresses = netlink.AddressMonitor()
        self._addresses_at = now
        self._addresses_said: list[bytes] | None = None  # by the kernel
        self._conditions: tuple[str | None, dict[str, int]] = (
            None,
            {},
        )  # the ruleset's fingerprint, the kernel's sysctls
        self._parameters_at = now
        self._ruleset_at = now
        self._links = [
            Link(link.interface, link.address, link.port, [peer.addresses[number] for peer in config.peers])
            for number, link in enumerate(config.links)
        ]
        self._fifo = vrrp.FifoReader(config.notify_fifo)
        self._track = vrrp.TrackFile(config.track_file)
        self._control = control.ControlServer(config.control_socket, self._command, privileged=("keys",))
        self._dump: netlink.TableDump | None = None
        self._dump_number = 0
        self._dump_at = now  # when a paced one is read on
        self._second_at = now
        self._second_s, self._idle_s = pace(self._notifier.watchdog_interval_s)
        self._watchdog_at = now
        self._report_at = now  # no verdict before
        self._report_due = True
        self._verdict_at = now
        self._condition: tuple[object, ...] = ()
        self._summary: tuple[str, readiness.Verdict] | None = None  # role and verdict, as systemd knows them
        self._chosen = [0] * len(config.peers)  # the link that carries each session, as far as is logged

    @staticmethod
    def _make_session(config: Config, peer: str, secrets: dict[int, bytes], now: float) -> Session:
        return Session(
            config.node,
            peer,
            crypto=LibraryCrypto(),
            secrets=secrets,
            send_key=config.send_key,
            random=os.urandom,
            version=__version__,
            payload=config.datagram_bytes,
            hello_interval_s=config.hello_interval_ms / 1000,
            dead_after_s=config.dead_after_ms / 1000,
            now=now,
            paths=Paths(
                [(link.interface, 6 if ":" in link.address else 4) for link in config.links],
                payload=config.datagram_bytes,
            ),
        )

    # --- life --------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until a signal or ``-k`` ends it."""
        now = time.monotonic()
        self._control.open()  # first: a second daemon stops here and touches nothing
        # "ready" outlives a daemon on a node that is active, and no reboot (systemd-tmpfiles writes it anew)
        self._engine.cold_start = self._track.read() is not False
        self._read_addresses(now)
        self._read_conditions(now)
        self._write_gate(now)
        self._control.register(self._selector)
        self._fifo.register(self._selector)
        self._fifo.open(now)
        self._selector.register(self._signals.fileno(), selectors.EVENT_READ, self._signals)
        self._selector.register(self._addresses, selectors.EVENT_READ, self._addresses)
        if self._helpers.events is not None:
            self._selector.register(self._helpers.events, selectors.EVENT_READ, self._helpers)
        for link in self._links:
            self._open_link(link, now)
        gc.collect()
        gc.freeze()
        self._notifier.ready(self._status_line())
        LOG.info(
            "ctsyncd %s: node %s, peers %s, role %s",
            __version__,
            self.config.node,
            ", ".join(peer.node for peer in self.config.peers),
            self._engine.role,
        )
        while not self.stopping:
            self._turn()
        self._stop()

    def _stop(self) -> None:
        now = time.monotonic()
        self._notifier.stopping("stopping")
        self._recorder.note(now, "stop")
        self._keep_story(self._recorder.finished(now, at_once=True), now)
        now = time.monotonic()
        if self._engine.active:
            self._tell_the_last(now)
        for session in self._sessions:
            session.say_bye()
        self._send([session.poll(now) for session in self._sessions], now)
        if not self._engine.active:
            self._track.write(readiness.KNOWS_NOTHING)
        self._flights.finish(STORY_PATIENCE_S)
        self.close()

    def _tell_the_last(self, now: float) -> None:
        """What the kernel has said and nobody was told yet: it would be lost if this node loses its addresses, too."""
        until = now + LAST_S
        more = True
        while more and now < until:
            changes = self._events.read(EVENTS_PER_TURN)
            more = changes.more
            self._engine.kernel_changes(changes, now)
            now = time.monotonic()
        self._engine.release_newcomers(now)
        self._send(self._engine.tell(now), now)

    def close(self) -> None:
        """Release every descriptor and remove the control socket."""
        self._control.close()
        self._fifo.close()
        for link in self._links:
            link.close()
        for edge in (self._dump, self._events, self._helpers, self._addresses, self._requests):
            if edge is not None:
                edge.close()
        self._watch.close()
        self._selector.close()
        self._signals.close()

    # --- one turn ----------------------------------------------------------------------------------------------------

    def _turn(self) -> None:
        now = time.monotonic()
        engine_ = self._engine
        wait = self._wait(now)
        told = self._served = False
        if self._events_at is None:
            ready = self._watch.all(wait)
            now = time.monotonic()
            if self._events_fd in ready:
                ready.remove(self._events_fd)
                window = self._window.opens(now, self.config.window_ms / 1000)
                self._events_at = now + window
                if window and not ready:
                    ready = self._gather(min(window, self._wait(now)))
                    now = time.monotonic()
        else:
            ready = self._gather(wait)
            now = time.monotonic()
        worked = False
        if ready:
            self._serve(ready, now)
            worked = engine_.hurried
            if worked:
                self._work_for_kernel()  # before an acknowledgement, which is less urgent, and all else
            now = time.monotonic()
        if self._events_at is not None and now >= self._events_at:
            told = self._read_events(now)
        second = now >= self._second_at
        if second:
            self._look_around(now)
        same = self._rested and not (ready or told or second)
        if same:  # what is not the engine's is as it was
            self._rested = engine_.resting(now)
        else:
            self._rested = self._rests(now) and (not second or engine_.sleeps(now))
        if self._rested:
            if not same:
                self._deadline = engine_.rests_until()
            if self._deadline <= now or not engine_.nothing_to_tell:
                self._send(engine_.talk(now), now)
                self._deadline = engine_.rests_until()
            if second:
                self._every_second(now)
            return
        self._second_at = min(self._second_at, now + self._second_s)
        self._noted = False
        if self._control.busy:
            self._control.tick(now)
        if engine_.follows != self._follows:  # before a dump begins: what it does not tell any more, events do
            self._follows = not self._follows
            self._events.follow(self._follows)
        if engine_.dump is not None or self._dump is not None:
            self._feed_dump(now)
        if not worked:
            self._work_for_kernel()
        self._helpers.turn(now)
        self._send(engine_.poll(now), now)
        self._answer_questions(now)
        for link in self._links:
            self._watch_link(link, now)
        if second:
            self._every_second(now)
        else:
            self._look_for_news(now)
        self._deadline = engine_.next_deadline()

    def _gather(self, wait: float) -> list[int]:
        """Let events come up for so long (seconds); what else is ready then, or earlier if it may be urgent."""
        engine_ = self._engine
        # what the peer says meanwhile is not, unless it is being sent a table, or somebody waits for an answer
        if wait and engine_.active and engine_.nothing_to_tell and engine_.calm and not self._control.busy:
            time.sleep(wait)
            wait = 0.0
        return self._watch.others(wait)

    def _rests(self, now: float) -> bool:
        """Is there nothing to be done in this turn but what sessions have to say?  So it is in most turns."""
        if self._served or self._report_due or self._dump is not None or self._control.busy:
            return False
        for link in self._links:
            if link.watched != READ or link.waiting:
                return False
        return self._engine.resting(now)

    def _serve(self, ready: list[int], now: float) -> None:
        """Links first, which are what is ready nearly always."""
        links = self._watch.links
        others = False
        for fd in ready:
            if fd in links:
                self._read_link(links[fd], now)
            else:
                others = True
        if others:
            self._served = True
            for key, mask in self._selector.select(0):
                self._serve_other(key, mask, time.monotonic())

    def _serve_other(self, key: selectors.SelectorKey, mask: int, now: float) -> None:
        edge = key.data
        if edge is self._control:
            edge.handle(key, mask, now)
        elif edge is self._fifo:
            self._read_fifo(now)
        elif edge is self._helpers:
            self._helpers.read_events(now)
        elif edge is self._addresses:
            self._addresses.drain()
            self._read_addresses(now)
        elif edge is self._signals:
            self._read_signals(now)

    def _wait(self, now: float) -> float:
        """How long the loop may sleep, in seconds."""
        engine_ = self._engine
        deadline = min(self._deadline, self._second_at + SLACK_S)
        if self._rested and self._events_at is None:  # nothing else is waited for
            return max(0.0, deadline - now)
        if engine_.dump is not None and (self._dump is None or engine_.dump_room):
            if self._dump is None or not engine_.dump_paced:
                return 0.0
            deadline = min(deadline, self._dump_at)
        if (self._dump is None and not engine_.idle) or self._helpers.busy:
            return 0.0
        if self._events_at is not None:
            deadline = min(deadline, self._events_at)
        if self._report_due:
            deadline = min(deadline, self._report_at + SLACK_S)
        next_control = self._control.next_deadline()
        if next_control is not None:
            deadline = min(deadline, next_control)
        return max(0.0, deadline - now)

    def _look_for_news(self, now: float) -> None:
        """A verdict costs more than a wake-up: it is made where something changed, and every second."""
        self._report_due = now < self._report_at
        if self._report_due:
            return
        # two at once may be: a sign of life and its answer leave nothing over for which to wake up
        self._report_at = max(self._report_at, now - REPORT_S) + REPORT_S
        self._look_at_links(now)
        condition = self._engine.condition(now)
        if condition != self._condition:
            self._condition = condition
            self._report(now)

    def _look_around(self, now: float) -> None:
        """Every second, or a little later, when the daemon is awake: no wake-up for this alone."""
        self._second_at = now + self._second_s - EARLY_S
        if now >= self._addresses_at:
            self._read_addresses(now)
        self._read_conditions(now)
        self._fifo.tick(now)
        for link in self._links:
            if not link.is_open and now >= link.retry_at:
                self._open_link(link, now)
            link.look()
            if link.payload != link.told or link.usable != link.told_usable:
                self._tell_paths(link, now)

    def _every_second(self, now: float) -> None:
        """After :meth:`_look_around` and what came of it."""
        self._report_if_changed(now)
        self._record(now)
        summary = self._engine.role, self._verdict
        if summary != self._summary:
            self._summary = summary
            self._notifier.status(self._status_line())
        if self._rested and len(self._links) == 1 and not self._verdict.reasons:
            self._second_at += self._idle_s - self._second_s
        if self._notifier.watchdog_interval_s is not None and now >= self._watchdog_at - SLACK_S:
            self._watchdog_at = now + self._notifier.watchdog_interval_s
            self._notifier.watchdog()

    # --- edges -------------------------------------------------------------------------------------------------------

    def _open_link(self, link: Link, now: float) -> None:
        self._watch.watch(link, 0)  # the socket that was lost
        if link.open(now):
            self._watch.watch(link, READ)
        self._tell_paths(link, now)

    def _send(self, datagrams: list[list[bytes]], now: float) -> None:
        """To each peer its own, over the link that each belongs to."""
        for peer, (session, some) in enumerate(zip(self._sessions, datagrams)):
            if not some and len(session.paths) == 1:
                continue  # with more links there may be a probe of another one
            for number, part in session.route(some):
                link = self._links[number]
                link.send(peer, part)
                if link.payload != link.told or not link.usable:
                    self._tell_paths(link, now)
        for link in self._links:
            if link.waiting:
                link.flush()

    def _tell_paths(self, link: Link, now: float) -> None:
        """What the kernel says of a link."""
        number = self._links.index(link)
        longer = link.payload and link.payload != link.told
        for session in self._sessions:
            session.paths.set_usable(number, link.usable, now)
            if longer:
                session.paths.set_ceiling(number, link.payload, now)
        link.told, link.told_usable = link.payload or link.told, link.usable
        if not link.usable:
            self._second_at = min(self._second_at, now + self._second_s)

    def _look_at_links(self, now: float) -> None:
        """What is wrong with them, for the verdict."""
        closed = [link.problem for link in self._links if not link.is_open]
        self._engine.problem = "; ".join(closed) if len(closed) == len(self._links) else ""
        for number, session in enumerate(self._sessions):
            before, chosen = self._chosen[number], session.paths.chosen
            if before != chosen:
                LOG.warning(
                    "the session with %s goes over %s now, not over %s",
                    session.peer,
                    self._links[chosen].interface,
                    self._links[before].interface,
                )
                self._chosen[number] = chosen

    def _broken_links(self, now: float) -> list[str]:
        if len(self._links) == 1:
            return []
        return [
            f"link {name} to {session.peer} is down (using {session.paths.carrier})"
            for session in self._sessions
            if session.alive(now)
            for name in session.paths.down
        ]

    def _watch_link(self, link: Link, now: float) -> None:
        """Keep the link registered as it is: open or not, read or held back, with datagrams waiting or not.

        One that is held back is read all the same, now and then: a peer that nobody listens to would count as dead.
        """
        held = self._engine.overloaded
        if held and link.is_open and now - link.read_at >= HELD_S:
            self._take_datagrams(link, 1, now)
        self._watch.watch(link, (0 if held else READ) | (WRITE if link.waiting else 0))

    def _read_link(self, link: Link, now: float) -> None:
        # to look for another one costs as much as to read one
        crowded = link.several or now - link.read_at < CROWD_S or not self._rested  # more may have come in a long turn
        self._take_datagrams(link, DATAGRAMS_PER_TURN if crowded else 1, now)

    def _take_datagrams(self, link: Link, limit: int, now: float) -> None:
        link.read_at = now
        number = self._links.index(link)
        found = link.receive(limit)
        link.several = len(found) > 1
        for peer, datagram in found:
            self._engine.receive(peer, datagram, now, number)

    def _read_fifo(self, now: float) -> None:
        """keepalived tells of a change; the kernel is asked what is true."""
        for transition in self._fifo.read():
            LOG.info("keepalived: %s %s is %s", transition.kind, transition.name, transition.state)
            self._recorder.note(now, "keepalived", kind=transition.kind, name=transition.name, state=transition.state)
        self._read_addresses(now)

    def _read_addresses(self, now: float) -> None:
        self._addresses_at = now + ADDRESS_CHECK_S
        try:
            said = netlink.address_dump()
            if said == self._addresses_said:
                return
            own = netlink.local_addresses(said)
        except (OSError, NetlinkError) as error:
            self._log.warning("addresses", now, "cannot list the addresses of this node: %s", error)
            return
        self._addresses_said = said
        virtual = {packed for _interface, _address, packed in self._virtual_ips}
        self._held = own & virtual
        self._engine.set_addresses(own | virtual)
        role = readiness.ACTIVE if self._held == virtual else readiness.TRANSITION if self._held else readiness.BACKUP
        if role != self._engine.role:
            LOG.info("role %s: holds %d of %d virtual IPs", role, len(self._held), len(virtual))
            self._parameters_at = now  # a node that becomes active gives flows the timers as they are now
            self._read_conditions(now)
            self._engine.set_role(role, now)
            self._write_gate(now)
            self._recorder.transition(now, role)

    def _read_conditions(self, now: float) -> None:
        if now < min(self._ruleset_at, self._parameters_at):
            return
        self._ruleset_at = now + RULESET_CHECK_S
        ruleset, self._ruleset_problem = service.read_fingerprint(self.config.ruleset_fingerprint)
        before = self._conditions
        parameters = before[1]
        if now >= self._parameters_at:
            self._parameters_at = now + PARAMETERS_CHECK_S
            parameters = netlink.conntrack_parameters()
        if (ruleset, parameters) != before:
            self._conditions = ruleset, parameters
            self._engine.set_conditions(ruleset, parameters, now)

    def _read_signals(self, now: float) -> None:
        for number in self._signals.read():
            if number == signal.SIGHUP:
                self._notifier.reloading()
                self._reload(now)
                self._notifier.ready(self._status_line())
            else:
                LOG.info("stopping on signal %d", number)
                self.stopping = True

    def _reload(self, now: float) -> None:
        """Read the configuration again; what is wrong, or needs a restart, leaves everything as it is."""
        try:
            text = read(self._path)
            new = parse(text, source=self._path)
        except ConfigError as error:
            for problem in error.problems:
                LOG.error("SIGHUP: %s", problem)
            more = f" (and {len(error.problems) - 1} more)" if len(error.problems) > 1 else ""
            self._not_reloaded = f"the configuration was not reloaded: {error.problems[0]}{more}"
            return
        changed = self.config.differences(new)
        fixed = [option.key for option in changed if not option.live]
        if fixed:
            names = ", ".join(fixed)
            needed = (
                "ctsyncd keys" if all(option.live or option.handed for option in changed) else "a restart of ctsyncd"
            )
            self._not_reloaded = f"the configuration was not reloaded: changes of {names} need {needed}"
            LOG.error("SIGHUP: %s", self._not_reloaded)
            return
        self._not_reloaded = ""
        self._digest = fingerprint(text)
        self._apply(new, now)
        self._recorder.note(now, "reload", changed=[option.key for option in changed])
        LOG.info("SIGHUP: configuration reloaded: %s", ", ".join(option.key for option in changed) or "no change")

    def _apply(self, new: Config, now: float) -> None:
        """Use a configuration that differs from the present one in live options only."""
        self._verdict_at = now
        old, self.config = self.config, new
        logging.getLogger().setLevel(new.log_level.upper())
        for session in self._sessions:
            session.set_timers(new.hello_interval_ms / 1000, new.dead_after_ms / 1000)
        if new.netlink_buffer_bytes != old.netlink_buffer_bytes:
            self._event_buffer = new.netlink_buffer_bytes
            self._events.grow(new.netlink_buffer_bytes)
        self._engine.reconfigure(_settings(new), now)
        # before the table is read again, which closes the gap between the two filters
        self._events.set_filter((self._requests.portid,), self._engine.filter.events)

    def _read_events(self, now: float) -> bool:
        """Have the engine take what happened, and the peers be told of it if this node is the one to do that."""
        engine_ = self._engine
        alone = self._rested and self._window.alone(now)  # in a long turn others may have come
        changes = self._events.read(1 if alone else EVENTS_PER_TURN)
        known = engine_.source.told
        engine_.kernel_changes(changes, now)
        telling = engine_.active
        if telling:
            self._send(engine_.tell(now), now)  # at once: all else can wait
        self._window.read(changes.events, engine_.source.told - known, now)
        if changes.lost:
            self._overrun(now)
        self._events_at = now if changes.more and not alone else None  # if it was not alone the next wait says so
        if self._events_at is None and engine_.newcomers.waiting:
            self._events_at = now + self.config.window_ms / 1000
        elif self._events_at is None and changes.events:
            now = time.monotonic()  # what waits came after the reading
            window = self._window.opens(now, self.config.window_ms / 1000)
            if window:  # more will come: no wake-up for the first of them
                self._events_at = now + window
        return telling

    def _answer_questions(self, now: float) -> None:
        """Give the engine the kernel's entries that it asks for."""
        for question in self._engine.take_questions():
            found = None
            try:
                found = self._requests.lookup(question.flow)
            except NetlinkError as error:
                self._log.warning("lookup", now, "looking up a flow: %s", error)
            self._engine.answer(question, found, now)

    def _overrun(self, now: float) -> None:
        size = min(self._event_buffer * 2, MAX_EVENT_BUFFER)
        self._log.warning("overrun", now, "kernel events were lost (receive buffer full); the table is read again")
        if size > self._event_buffer:
            self._event_buffer = size
            self._events.grow(size)

    # --- kernel ------------------------------------------------------------------------------------------------------

    def _feed_dump(self, now: float) -> None:
        wanted = self._engine.dump
        if wanted is None:
            self._close_dump()
            return
        began = time.thread_time()
        paced = self._engine.dump_paced
        if self._dump is None or self._dump_number != wanted.number:
            self._close_dump()
            if paced and _kernel_count() == 0:  # the walk through an empty hash of a million buckets takes 80 ms
                self._engine.dump_finished(True, now)
                return
            self._dump, self._dump_number = netlink.TableDump(), wanted.number
            if paced:  # the kernel looked through its hash for the first entry, or through all of it
                spent = time.thread_time() - began
                self._engine.dump_cost(spent)
                self._dump_at = now + PACED_REST * spent
        if not self._engine.dump_room or (paced and now < self._dump_at):
            return
        began = time.thread_time()
        try:
            self._engine.dump_slice(self._dump.read(1 if paced else DUMP_SLICES_PER_TURN), now)
            if paced:
                spent = time.thread_time() - began
                self._engine.dump_cost(spent)
                self._dump_at = now + PACED_REST * spent
            if not self._dump.done:
                return
            consistent = not self._dump.interrupted
        except (OSError, NetlinkError) as error:
            self._log.warning("dump", now, "reading the kernel's table: %s", error)
            consistent = False
        self._close_dump()
        self._engine.dump_finished(consistent, now)

    def _close_dump(self) -> None:
        if self._dump is not None:
            self._dump.close()
            self._dump = None

    def _work_for_kernel(self) -> None:
        for job in self._engine.kernel_work(REQUESTS_PER_TURN):
            self._engine.kernel_results(job, self._carry_out(job))

    def _carry_out(self, job: jobs.Job) -> list[tuple[int, int]]:
        """Index and errno of what failed."""
        if isinstance(job, jobs.Work):
            try:
                return self._carry_out_many(job)
            except NetlinkError as error:
                if error.errno == errno.EPERM:
                    raise
            requests = [job.request(index) for index in range(len(job.keys))]
        else:
            requests = [job]
        failures, messages, places = [], [], []
        for place, request in enumerate(requests):
            try:
                messages.append(_message(request))
                places.append(place)
            except NetlinkError as error:  # the peer sent what this kernel's interface cannot express
                failures.append((place, error.errno or errno.EINVAL))
        return failures + [(places[index], number) for index, number in self._requests.inject(messages)]

    def _carry_out_many(self, work: jobs.Work) -> list[tuple[int, int]]:
        """Raises NetlinkError, with nothing done, where the interface to the kernel cannot express one of them."""
        if work.operation == jobs.CREATE:
            return self._requests.create_rows(work.key_len, work.keys, work.values, work.timeouts)
        if work.operation == jobs.UPDATE:
            return self._requests.update_rows(work.key_len, work.keys, work.values, work.timeouts)
        if work.operation == jobs.TIMER:
            return self._requests.set_timers(work.key_len, work.keys, work.timeouts)
        if work.operation == jobs.LOOSEN:
            return self._requests.loosen_keys(work.key_len, work.keys)
        return self._requests.delete_keys(work.key_len, work.keys)

    # --- reports -----------------------------------------------------------------------------------------------------

    def _report_if_changed(self, now: float) -> None:
        """A verdict with reasons may have numbers that grow; else it depends on the condition alone."""
        self._report_at, self._report_due = max(self._report_at, now - REPORT_S) + REPORT_S, False
        engine_ = self._engine
        before = engine_.problem, engine_.impaired
        self._find_impairments(now)
        same = self._rested and before == (engine_.problem, engine_.impaired)
        condition = self._condition if same else engine_.condition(now)
        if condition != self._condition or self._verdict.reasons or now >= self._verdict_at:
            self._condition = condition
            self._report(now)
        else:
            self._set_gate(self._verdict.gate, now)  # the file may have been touched

    def _find_impairments(self, now: float) -> None:
        self._look_at_links(now)
        problems = [self._not_reloaded, self._ruleset_problem, self._fifo.problem, self._track.problem]
        problems.append(self._flights.problem)
        for session in self._sessions:
            problems += session.key_problems()
        self._engine.impaired = (*self._broken_links(now), *filter(None, problems))

    def _report(self, now: float) -> None:
        self._verdict_at = now + VERDICT_S
        self._find_impairments(now)
        for alarm in self._engine.take_alarms():
            LOG.warning("%s", alarm)
        verdict = self._engine.verdict(now)
        if verdict != self._verdict:
            if verdict[0] != self._verdict.verdict:
                LOG.info("%s", render.verdict_line(verdict._asdict()))
            self._recorder.note(now, "verdict", **verdict._asdict())
            self._verdict = verdict
        self._set_gate(verdict.gate, now)

    def _record(self, now: float) -> None:
        events, age = 0, 0.0
        if not (self._rested and self._noted):
            self._noted = True
            events, age = self._engine.lag(now)
            for said in self._engine.peer_notes(now):
                if said != self._peer_said.get(said["node"]):
                    self._peer_said[said["node"]] = said
                    self._recorder.note(now, "peer", **said)
        self._recorder.sample(now, self._counter_sources(), lag_events=events, lag_s=round(age, 3))
        self._keep_story(self._recorder.finished(now), now)

    def _keep_story(self, role: str, now: float) -> None:
        if role:
            self._flights.keep(role, lambda: self._story(now))

    def _story(self, now: float) -> Iterator[str]:
        wall_offset = time.time() - now
        return self._recorder.lines(wall_offset, node=self.config.node, version=__version__, role=self._engine.role)

    def _write_gate(self, now: float) -> None:
        self._set_gate(self._engine.verdict(now).gate, now)

    def _set_gate(self, gate: int, now: float) -> None:
        if not self._track.write(gate):
            self._log.warning("track", now, "%s", self._track.problem)

    def _status_line(self) -> str:
        return f"{self._engine.role}, {render.verdict_line(self._verdict._asdict())}"

    def status(self) -> dict[str, Any]:
        """The object of ``ctsyncd status --json`` (schema 1)."""
        now = time.monotonic()
        verdict = self._engine.verdict(now)
        return {
            "schema": 1,
            "version": __version__,
            "node": self.config.node,
            "verdict": verdict.verdict,
            "reasons": list(verdict.reasons),
            "role": self._engine.role,
            "virtual_ips": [
                {"interface": interface, "address": address, "held": packed in self._held}
                for interface, address, packed in self._virtual_ips
            ],
            "configuration": {"path": self._path, "digest": self._digest, "problem": self._not_reloaded},
            "fit": verdict.fit,
            "differences": list(self._engine.differences()),
            "replicate": self.config.replicate,
            "mode": self.config.mode,
            "keys": {"accepts": sorted(self.config.keys), "sends": self.config.send_key},
            "peers": self._peers(now),
            "flows": {"kernel": _kernel_count(), "external": len(self._engine.cache)},
            "expectations": self._engine.helpers.describe(),
            "counters": self._counters(),
            "last_transition": {
                "to": self._engine.role,
                "ago_s": round(now - self._engine.role_since, 3),
                "at": round(time.time() - (now - self._engine.role_since), 3),
            },
        }

    def _peers(self, now: float) -> list[dict[str, Any]]:
        out = []
        for found, peer, session in zip(self._engine.peer_status(now), self.config.peers, self._sessions):
            rows = zip(session.paths.status(now), peer.addresses)
            links = [{**row, "address": address} for row, address in rows]
            out.append({**found, "address": peer.addresses[0], "links": links, "keys": session.keys()})
        return out

    def _counters(self) -> dict[str, int]:
        counters: collections.Counter[str] = collections.Counter()
        for source in self._counter_sources():
            counters.update(source)
        return dict(sorted(counters.items()))

    def _counter_sources(self) -> list[Mapping[str, int]]:
        """Where all is counted."""
        sources: list[Mapping[str, int]] = [self._engine.counters, self._helpers.counters]
        for session in self._sessions:
            sources += (session.counters, session.paths.counters)
        sources += [link.counters for link in self._links]
        sources.append({"events_malformed": self._events.malformed, "fifo_garbage": self._fifo.garbage})
        return sources

    def _statistics(self, section: str) -> dict[str, Any]:
        now = time.monotonic()
        peers = self._engine.peers
        cache = {
            "external": {"entries": len(self._engine.cache)},
            "waiting to be sent": {"changes": sum(len(peer.pending) for peer in peers)},
        }
        sessions = {
            "session" if len(peers) == 1 else f"session with {peer.name}": dict(sorted(peer.session.counters.items()))
            for peer in peers
        }
        network = {**sessions, **self._sockets()}
        runtime = {
            "uptime s": int(now - self.started),
            "netlink buffer bytes": self._event_buffer,
            **dict(sorted(self._engine.counters.items())),
        }
        sections: dict[str, dict[str, Any]] = {
            "cache": cache,
            "network": network,
            "runtime": {"runtime": runtime},
            "link": self._link_statistics(now),
            "queue": {
                "queue" if len(peers) == 1 else f"queue to {peer.name}": {
                    "unacknowledged changes": peer.lag(now)[0],
                    "pending": len(peer.pending),
                }
                for peer in peers
            },
            "process": {"process": {"pid": os.getpid()}},
            "expect": {"expectations": {**self._engine.helpers.describe(), **self._helpers.statistics()}},
        }
        return sections.get(section) or {**cache, **network, **sections["link"]}

    def _sockets(self) -> dict[str, Any]:
        if len(self._links) == 1:
            return {"socket": dict(self._links[0].counters)}
        return {f"socket {link.interface}": dict(link.counters) for link in self._links}

    def _link_statistics(self, now: float) -> dict[str, Any]:
        sections: dict[str, Any] = {}
        for described, session in zip(self._engine.peer_status(now), self._sessions):
            to = "" if len(self._sessions) == 1 else f" to {session.peer}"
            sections["link" + to] = described
            sections["links" + to] = dict(session.paths.counters)
            for link, row in zip(self._links, session.paths.status(now)):
                sections[f"link {link.interface}{to}"] = {"open": link.is_open, "refused": link.refused, **row}
        return sections

    # --- control socket ----------------------------------------------------------------------------------------------

    def _command(self, request: dict[str, Any]) -> control.Response:
        name = request.get("command")
        handler = getattr(self, "_command_" + str(name).replace("-", "_"), None) if isinstance(name, str) else None
        if handler is None:
            raise ControlError(f"unknown command {name!r}: client and daemon are of different versions?", 2)
        response: control.Response = handler(request)
        return response

    def _command_status(self, _request: dict[str, Any]) -> control.Response:
        return self.status()

    def _command_stats(self, request: dict[str, Any]) -> control.Response:
        return self._statistics(str(request.get("section", "summary")))

    def _command_recorder(self, _request: dict[str, Any]) -> control.Response:
        return ((line + "\n").encode() for line in self._story(time.monotonic()))

    def _command_internal(self, request: dict[str, Any]) -> control.Response:
        if request.get("table") == "expect":
            return self._internal_expectations(_renderer(request, expectations=True))
        return self._internal(_renderer(request))

    def _command_external(self, request: dict[str, Any]) -> control.Response:
        if request.get("table") == "expect":
            return self._external_expectations(_renderer(request, expectations=True))
        return self._external(_renderer(request))

    def _internal(self, line: Any) -> Iterator[bytes | None]:
        """The internal cache is the kernel's table, through the filters, less what belongs to the peer."""
        wall = time.time_ns()
        with netlink.TableDump() as walk:
            while not walk.done:
                lines = []
                for flow in walk.read_flows():
                    if self._engine.internal(flow):
                        age = None if flow.start is None else max(0, (wall - flow.start) // NANOSECONDS)
                        lines.append(line(flow, age))
                yield "".join(text + "\n" for text in lines).encode() or None
            if walk.interrupted:
                raise ControlError(
                    "the kernel's table was resized meanwhile: flows may be missing or doubled, ask again"
                )

    def _external(self, line: Any) -> Iterator[bytes]:
        now = time.monotonic()
        lines = []
        for flow, since in self._engine.external_flows():
            lines.append(line(flow, int(now - since)))
            if len(lines) >= 100:
                yield "".join(text + "\n" for text in lines).encode()
                lines = []
        yield "".join(text + "\n" for text in lines).encode()

    def _internal_expectations(self, line: Any) -> Iterator[bytes | None]:
        """The kernel's, of flows that are replicated, less those of the peer."""
        with expectation_sockets.Walk() as walk:
            while not walk.done:
                listed = [one for one in walk.read() if self._engine.helpers.internal(one)]
                yield "".join(line(one, None) + "\n" for one in listed).encode() or None

    def _external_expectations(self, line: Any) -> Iterator[bytes]:
        now = time.monotonic()
        for one, since in self._engine.helpers.replicas.items():
            yield (line(one, int(now - since)) + "\n").encode()

    def _command_commit(self, _request: dict[str, Any]) -> control.Response:
        before = self._engine.refusals()
        count = self._engine.commit()
        return self._when_idle(lambda: self._commit_report(count, before))

    def _commit_report(self, count: int, before: int) -> str:
        failed = self._engine.refusals() - before
        if failed:
            raise ControlError(
                f"{count - failed} of {count} flows committed; the kernel refused {failed}: see -s runtime"
            )
        return f"{count} flows committed"

    def _command_flush(self, request: dict[str, Any]) -> control.Response:
        which = request.get("which", "all")
        if which not in ("all", "internal", "external"):
            raise ControlError(f"flush: {which!r} is not one of all, internal, external", 2)
        if which == "internal":
            return _say("the internal cache is the kernel's table: nothing to flush (-F removes flows from the kernel)")
        return _say(f"{self._engine.flush_external()} flows forgotten")

    def _command_flush_kernel(self, _request: dict[str, Any]) -> control.Response:
        self._engine.flush_kernel()
        return self._when_idle(lambda: "the kernel's table is flushed")

    def _command_resync(self, _request: dict[str, Any]) -> control.Response:
        self._engine.resync()
        return _say("the kernel's table is read again")

    def _command_bulk(self, _request: dict[str, Any]) -> control.Response:
        if not self._engine.active:
            raise ControlError("this node is not active: only the active node has a table to send")
        if not any(session.established for session in self._sessions):
            raise ControlError(f"no session with {' or '.join(session.peer for session in self._sessions)}")
        self._engine.resync()
        return _say("the whole table is sent")

    def _command_request(self, _request: dict[str, Any]) -> control.Response:
        if self._engine.active:
            raise ControlError("this node is active: its own table is the one that counts")
        leader = self._engine.leader
        if leader is None:
            raise ControlError("no other node is known to be active: nobody has a table to give")
        if not leader.established:
            raise ControlError(f"no session with {leader.name}")
        self._engine.request_bulk(time.monotonic())
        return _say(f"{leader.name} is asked for its whole table")

    def _command_purge(self, _request: dict[str, Any]) -> control.Response:
        if self._engine.active:
            raise ControlError("this node is active: its flows are in use")
        self._engine.purge_later(time.monotonic())
        return _say(f"in {engine.PURGE_AFTER_S:.0f} s flows that the peer does not have leave the kernel")

    def _command_verify(self, _request: dict[str, Any]) -> control.Response:
        return self._verified()

    def _verified(self) -> Iterator[bytes]:
        """Nothing (the server asks again) until all flows have been compared, with one backup after the other, then an
        object of JSON."""
        engine_, found = self._engine, []
        for number in range(len(engine_.peers)) if engine_.active else (0,):
            names = (self.config.node, (engine_.leader or engine_.peers[number]).name)
            active, backup = names if engine_.active else names[::-1]
            asked = engine_.verify(time.monotonic(), number)
            try:
                while not asked.look(time.monotonic()):
                    yield b""
            finally:
                asked.give_up("nobody waits for the answer any more")
            found.append(_verified(asked, active, backup))
        yield json.dumps(verification.together(found)).encode() + b"\n"

    def _command_keys(self, request: dict[str, Any]) -> control.Response:
        """Other pre-shared keys, which the configuration names by now.  What would cut a session is refused, and what
        is refused changes nothing."""
        now = time.monotonic()
        try:
            text = read(self._path)
            new = parse(text, source=self._path)
            secrets = service.handed_over(request.get("keys"), new)
        except ConfigError as error:
            raise ControlError(f"the keys stay as they are: {'; '.join(error.problems)}", 2) from None
        changed = self.config.differences(new)
        fixed = [option.key for option in changed if not option.live and not option.handed]
        if fixed:
            raise ControlError(f"the keys stay as they are: changes of {', '.join(fixed)} need a restart of ctsyncd", 2)
        obstacles = list(filter(None, [session.obstacle(secrets, now) for session in self._sessions]))
        if obstacles:
            raise ControlError(f"the keys stay as they are: {'; '.join(obstacles)}")
        for session in self._sessions:
            session.set_keys(secrets, new.send_key, now)
        self._not_reloaded = ""
        self._digest = fingerprint(text)
        self._apply(new, now)
        self._recorder.note(now, "keys", accepts=sorted(new.keys), sends=new.send_key)
        said = f"accepts {' and '.join(map(str, sorted(new.keys)))}, sends with {new.send_key}"
        LOG.info("keys: %s", said)
        self._report(now)  # who asks next finds what is wrong with them
        return _say(said)

    def _command_kill(self, _request: dict[str, Any]) -> control.Response:
        self.stopping = True
        return _say("stopping")

    def _when_idle(self, report: Any) -> Iterator[bytes]:
        """Nothing (the server asks again) until the engine's work for the kernel is done, then the report."""
        while not self._engine.idle:
            yield b""
        yield str(report()).encode() + b"\n"


def _kernel_count() -> int | None:
    """Entries of this namespace's conntrack table; None where the kernel does not tell."""
    try:
        with open("/proc/sys/net/netfilter/nf_conntrack_count", encoding="ascii") as stream:
            return int(stream.read())
    except (OSError, ValueError):
        return None


def _verified(asked: verification.Verification, active: str, backup: str) -> dict[str, Any]:
    """What ``ctsyncd verify --json`` says of one backup."""
    found = asked.found
    differences = []
    if found is not None:
        for kind, count in found.counts.items():
            if count:
                flows = [render.key_dict(ctnetlink.flow_of_key(key)) for one, key in found.keys if one == kind]
                differences.append({"kind": kind, "backup": backup, "count": count, "flows": flows})
    return {
        "equal": None if found is None else not differences,
        "reason": asked.reason if found is None else "",
        "active": active,
        "backup": backup,
        "flows": None if found is None else found.flows,
        "differences": differences,
    }


def _say(text: str) -> control.Response:
    return [text.encode() + b"\n"]


def _renderer(request: dict[str, Any], expectations: bool = False) -> Any:
    room: Any = expectation_render if expectations else render
    renderers = {"text": room.line, "json": room.json_line, "xml": lambda entry, _age: room.xml(entry)}
    chosen = renderers.get(str(request.get("format", "text")))
    if chosen is None:
        raise ControlError(f"format {request.get('format')!r} is not one of text, json, xml", 2)
    return chosen


def _message(request: jobs.Request) -> bytes:
    flow: Flow = request.flow
    if request.operation == jobs.CREATE:
        return ctnetlink.create(flow, timeout=request.timeout)
    if request.operation == jobs.UPDATE:
        return ctnetlink.update(flow, timeout=request.timeout)
    if request.operation == jobs.TIMER and request.attempt:  # an update that could not set the status
        return ctnetlink.update(flow, timeout=request.timeout, status=False)
    if request.operation == jobs.TIMER:
        bare = flow._replace(status=0, state=None, sctp_vtags=None, mark=None, labels=None, seqadj=None)
        return ctnetlink.update(bare, timeout=request.timeout, status=False)
    if request.operation == jobs.LOOSEN:
        return ctnetlink.loosen(flow)
    return ctnetlink.delete(flow)


def _settings(config: Config) -> situation.Settings:
    return situation.Settings(
        mode=config.mode,
        replicate=config.replicate,
        compare=config.compare,
        unreplied=config.udp == "all",
        park_timeout_s=config.park_timeout_s,
        ignore=tuple(str(network) for network in config.ignore_addresses),
        filter=config.filter,
        lag_limit_s=config.lag_limit_ms / 1000,
        same_conditions=config.same_conditions,
        max_expectations=config.max_expectations,
    )


def fingerprint(text: str) -> str:
    """SHA-256 of a configuration's text, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def run(path: str) -> int:
    """Be the daemon until it is told to stop; returns the exit status.  Raises ConfigError, NetlinkError."""
    text = read(path)
    config = parse(text, source=path)
    service.setup_logging(config.log_level, sys.stderr)
    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    secrets = {key_id: service.read_key(config, key_id, directory) for key_id in config.keys}
    Daemon(config, secrets, path, fingerprint(text)).run()
    return 0
