# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the daemon makes of the engine's requests, and when it reads events."""

from __future__ import annotations

import errno
import logging
import selectors
import types
from typing import Any

import pytest
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import constants as k
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import ctnetlink, daemon, dumps, readiness
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.client import ControlError
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.errors import NetlinkError
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.flow import Flow
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.jobs import (
    CREATE,
    TIMER,
    UPDATE,
    Request,
    Work,
)
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.newcomers import Newcomers
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.rows import Changes, pack
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.service import LimitedLog
from unit.simulation import tcp


def meant(operation: str, attempt: int = 0) -> dict[int, bytes]:
    """The attributes of the message for a request."""
    flow = tcp(1001, 2001, mark=7)
    message = daemon._message(Request(operation, flow.key, flow, 55, attempt))
    return ctnetlink.attributes(message, ctnetlink.HEADER_LEN + 4)


def test_timer_request_says_nothing_but_the_timer() -> None:
    """At a take-over packets may have changed everything else meanwhile."""
    said = meant(TIMER)
    assert set(said) == {ctnetlink.CTA_TUPLE_ORIG, ctnetlink.CTA_TIMEOUT}
    assert said[ctnetlink.CTA_TIMEOUT] == b"\0\0\0\x37"


@pytest.mark.parametrize(("operation", "attempt"), [(TIMER, 1), (UPDATE, 0), (UPDATE, 1)])
def test_update_makes_window_tracking_liberal_even_where_the_status_stays(operation: str, attempt: int) -> None:
    """An adopted entry has the sequence numbers of the past: without this the kernel drops its packets as invalid."""
    said = meant(operation, attempt)
    state, _scale, flags, _tags = ctnetlink._decode_protoinfo(said[ctnetlink.CTA_PROTOINFO])
    assert state == k.TCP_ESTABLISHED
    assert flags is not None
    assert all(one & k.TCP_FLAG_BE_LIBERAL for one in flags)
    assert (ctnetlink.CTA_STATUS in said) == (operation == UPDATE)
    assert said[ctnetlink.CTA_MARK] == b"\0\0\0\7"


# --- the window ------------------------------------------------------------------------------------------------------


def reads(rate: float, longest: float, share: float = 1.0) -> int:
    """How often in a second events are read that come at a steady rate (per second), once the rate is known.

    ``share``: how many of them are of flows that the peer does not know.
    """
    window = daemon.Window()
    count, now, interval = 0, 100.0, 1 / rate
    while now < 103.0:
        moment = now + window.opens(now, longest)
        events = int((moment - now) / interval) + 1
        window.read(events, int(events * share), moment)
        count += now >= 102.0
        now += events * interval
    return count


def test_first_event_after_a_quiet_spell_is_read_at_once() -> None:
    window = daemon.Window()
    assert window.opens(100.0, 0.02) == 0.0
    window.read(100, 100, 100.001)  # a burst: more may follow
    assert window.opens(100.002, 0.02) > 0.0
    window.read(100, 100, 100.022)
    assert window.opens(100.023, 0.02) == 0.02
    window.read(3, 3, 100.043)
    assert window.opens(100.094, 0.02) == 0.0


@pytest.mark.parametrize(
    ("rate", "longest", "fewest", "most"),
    [
        (10, 0.02, 9, 11),  # every one is the first after a quiet spell
        (100, 0.02, 99, 101),  # a window would gather two: each is read at once
        (300, 0.02, 40, 50),
        (1000, 0.02, 45, 50),
        (9000, 0.02, 48, 50),
        (20_000, 0.02, 480, 500),  # 2 ms
        (24_000, 0.02, 480, 500),
        (50_000, 0.02, 48, 52),  # 20 ms: the machine has enough to do
        (200_000, 0.02, 48, 52),
        (1000, 0.0, 999, 1001),  # switched off
        (1000, 0.001, 450, 1001),  # shorter than the shortest: as it is configured
        (50_000, 0.001, 900, 1001),
    ],
)
def test_window_follows_the_rate(rate: float, longest: float, fewest: int, most: int) -> None:
    assert fewest <= reads(rate, longest) <= most


def test_window_stays_long_where_little_is_new_to_the_peer() -> None:
    """Ends of flows, changes of flows that it knows, connections that are over before they are told."""
    assert 48 <= reads(40_000, 0.02, share=0.2) <= 50
    assert reads(40_000, 0.02, share=0.5) > 400
    assert 48 <= reads(40_000, 0.02, share=0.25) <= 50


def test_window_is_not_moved_by_a_moment() -> None:
    """Events that come unevenly, a few milliseconds of silence or a burst, leave it as it is."""
    window = daemon.Window()
    now = 100.0
    for dummy in range(500):
        now += 0.002
        window.read(40, 40, now)
    window.read(40, 40, now + 0.012)
    assert window.opens(now + 0.012, 0.02) <= daemon.CROWDED_WINDOW_S
    for dummy in range(500):
        now += 0.02
        window.read(80, 80, now)
    window.read(400, 400, now + 0.02)
    assert window.opens(now + 0.021, 0.02) == 0.02


def test_time_since_the_last_reading_counts_where_many_flows_come_up() -> None:
    window = daemon.Window()
    now = 100.0
    for dummy in range(500):
        now += 0.002
        window.read(40, 40, now)
    assert window.opens(now + 0.0015, 0.02) == pytest.approx(0.0005)
    assert window.opens(now + 0.004, 0.02) == 0.0


def windows(window: daemon.Window, rate: float, seconds: float, now: float) -> tuple[list[float], float]:
    """The windows (seconds) in which new flows are read that come at this rate, each begun by the reading before, and
    when the last of them ends."""
    found = []
    end = now + seconds
    while now < end:
        found.append(max(0.0003, window.opens(now, 0.02)))  # what a turn takes
        now += found[-1]
        window.read(int(found[-1] * rate), int(found[-1] * rate), now)
    return found, now


@pytest.mark.parametrize("rate", [45_000, 100_000, 300_000])
def test_flood_is_known_from_its_beginning_on(rate: float) -> None:
    """At no rate that it is taken for on the way has it short windows for long."""
    window = daemon.Window()
    window.read(1, 1, 100.0)
    found, _now = windows(window, rate, 1.0, 100.001)
    assert len(found) <= 60


def test_flood_goes_on_after_a_pause() -> None:
    """What it was on average counts beside what it was lately."""
    window = daemon.Window()
    _found, now = windows(window, 60_000, 1.0, 100.0)
    window.read(50, 50, now + 0.06)
    found, _now = windows(window, 60_000, 0.3, now + 0.06)
    assert len(found) <= 20


@pytest.mark.parametrize("pause", [0.005, 0.02])
def test_no_pause_makes_a_flood(pause: float) -> None:
    """A load of 20,000 a second hesitates, and then what it owes comes at five times the rate."""
    window = daemon.Window()
    _found, now = windows(window, 20_000, 1.0, 100.0)
    window.read(20, 20, now + pause)
    found, now = windows(window, 100_000, pause / 4, now + pause)
    assert max(found) == pytest.approx(daemon.CROWDED_WINDOW_S)
    found, now = windows(window, 20_000, 0.1, now)
    assert max(found) == pytest.approx(daemon.CROWDED_WINDOW_S)


class Readings:
    """A daemon's edges and engine: events come in, so many at each reading."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events = 0
        self.active = self.nothing_to_tell = self.calm = True
        self.busy = False
        self.did: list[tuple[str, float]] = []
        self.limits: list[int] = []
        self.newcomers = Newcomers()
        self.source = types.SimpleNamespace(told=0)
        self.daemon = one = object.__new__(daemon.Daemon)
        one._window, one._rested = daemon.Window(), True
        monkeypatch.setattr(one, "config", types.SimpleNamespace(window_ms=20), raising=False)
        monkeypatch.setattr(one, "_engine", self, raising=False)
        monkeypatch.setattr(one, "_events", self, raising=False)
        monkeypatch.setattr(one, "_watch", self, raising=False)
        monkeypatch.setattr(one, "_control", self, raising=False)
        monkeypatch.setattr(one, "_send", lambda _datagrams, _now: self.did.append(("sent", 0.0)))
        self.now = 100.0
        monkeypatch.setattr(daemon.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(daemon.time, "sleep", lambda wait: self.did.append(("sleep", wait)))

    def read(self, limit: int) -> Changes:
        self.limits.append(limit)
        return Changes({}, [], [], min(limit, self.events), more=self.events >= limit)

    def kernel_changes(self, changes: Changes, _now: float) -> None:
        self.source.told += changes.events
        self.did.append(("judged", float(changes.events)))

    def tell(self, _now: float) -> list[list[bytes]]:
        self.did.append(("told", 0.0))
        return [[b"datagram"]]

    def others(self, wait: float) -> list[int]:
        self.did.append(("others", wait))
        return [5]


@pytest.mark.parametrize("hurried", [True, False])
def test_kernel_is_asked_for_what_a_datagram_brought_before_anything_else(
    monkeypatch: pytest.MonkeyPatch, hurried: bool
) -> None:
    did: list[str] = []

    def looked(_now: float) -> bool:
        did.append("looked")
        return True

    parts = {
        "_engine": types.SimpleNamespace(hurried=hurried, rests_until=lambda: float("inf"), nothing_to_tell=True),
        "_watch": types.SimpleNamespace(all=lambda _wait: [7]),
        "_events_at": None,
        "_events_fd": 3,
        "_second_at": float("inf"),
        "_rested": False,
        "_wait": lambda _now: 0.0,
        "_serve": lambda _ready, _now: did.append("served"),
        "_work_for_kernel": lambda: did.append("worked"),
        "_rests": looked,
    }
    one = object.__new__(daemon.Daemon)
    for name, part in parts.items():
        monkeypatch.setattr(one, name, part, raising=False)
    one._turn()
    assert did == (["served", "worked", "looked"] if hurried else ["served", "looked"])


def test_event_after_a_pause_is_read_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """And if others came with it they are read together, at once."""
    edges = Readings(monkeypatch)
    edges.events, many = 500, daemon.EVENTS_PER_TURN
    for moment in (100.0, 100.0002, 100.02, 101.0):
        edges.now = moment
        edges.daemon._read_events(moment)
    assert edges.limits == [1, many, many, many]  # by now they are no longer few
    edges.events = 1
    for number in range(400):
        edges.now = 102.0 + number / 20
        edges.daemon._read_events(edges.now)
    assert edges.limits[-100:] == [1] * 100
    assert edges.daemon._events_at is None


def test_events_that_came_in_a_long_turn_are_read_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the turn that lies between two readings then, and says nothing of how many came."""
    edges = Readings(monkeypatch)
    edges.events, edges.daemon._rested = 500, False
    for turn in range(200):
        edges.now = 100.0 + 0.008 * turn
        edges.daemon._read_events(edges.now)
    assert edges.limits == [daemon.EVENTS_PER_TURN] * 200


class Datagrams:
    """A link on which so many wait, and the engine that takes them."""

    is_open, waiting, watched, several = True, False, daemon.READ, False

    def __init__(self, waiting: int) -> None:
        self.left, self.read_at = waiting, 0.0
        self.taken: list[int] = []

    def receive(self, limit: int) -> list[tuple[int, bytes]]:
        count = min(limit, self.left)
        self.left -= count
        self.taken.append(count)
        return [(0, b"datagram")] * count

    def watch(self, _link: object, wanted: int) -> None:
        self.watched = wanted

    def of_daemon(self, monkeypatch: pytest.MonkeyPatch, rested: bool) -> Any:
        one = object.__new__(daemon.Daemon)
        engine = types.SimpleNamespace(receive=lambda *_datagram: None, overloaded=False)
        for name, part in {"_links": [self], "_rested": rested, "_engine": engine, "_watch": self}.items():
            monkeypatch.setattr(one, name, part, raising=False)
        return one


@pytest.mark.parametrize(("rested", "taken"), [(True, [1] * 50), (False, [50] + [0] * 49)])
def test_datagrams_that_came_in_a_long_turn_are_read_together(
    monkeypatch: pytest.MonkeyPatch, rested: bool, taken: list[int]
) -> None:
    link = Datagrams(50)
    one = link.of_daemon(monkeypatch, rested)
    for turn in range(50):
        one._read_link(link, 100.0 + 0.008 * turn)
    assert link.taken == taken


def test_link_that_is_held_back_is_read_ten_times_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peer would count as dead else, for as long as the kernel is behind."""
    link = Datagrams(1000)
    one = link.of_daemon(monkeypatch, rested=False)
    one._engine.overloaded = True
    for turn in range(1000):
        one._watch_link(link, 100.0 + turn / 100)
        assert link.watched == 0
    assert 90 <= len(link.taken) <= 101
    assert set(link.taken) == {1}
    one._engine.overloaded = False
    one._watch_link(link, 120.0)
    assert link.watched == daemon.READ
    assert len(link.taken) <= 101


@pytest.mark.parametrize("active", [True, False])
def test_what_was_read_is_told_before_anything_else(monkeypatch: pytest.MonkeyPatch, active: bool) -> None:
    edges = Readings(monkeypatch)
    edges.active, edges.events = active, 3
    edges.daemon._window.read(1, 0, 99.999)
    count = edges.daemon._window.read
    monkeypatch.setattr(
        edges.daemon._window, "read", lambda *told: (edges.did.append(("counted", float(told[1]))), count(*told))
    )
    assert edges.daemon._read_events(100.0) is active
    told = [("told", 0.0), ("sent", 0.0)] if active else []
    assert edges.did == [("judged", 3.0), *told, ("counted", 3.0)]


def test_where_events_are_many_none_of_them_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next reading is a window after this one; where nothing came the next event wakes the daemon."""
    edges = Readings(monkeypatch)
    one, now = edges.daemon, 100.0
    for events, then in ((1, None), (100, 0.02), (40, 0.02), (0, None), (1, 0.02)):
        now += 0.02
        edges.events, edges.now = events, now + 0.004
        one._read_events(now)
        if edges.limits[-1] == 1 < events:  # it was not alone
            one._read_events(now + 0.001)
        assert one._events_at == (None if then is None else pytest.approx(now + 0.004 + then))
    edges.events = 1
    for number in range(200):  # ten a second
        edges.now = now + 0.1 * (number + 1)
        one._read_events(edges.now)
    assert one._events_at is None


@pytest.mark.parametrize(("rate", "then"), [(60_000, 0.024), (20_000, None)])
def test_window_of_a_flood_begins_behind_the_reading(
    monkeypatch: pytest.MonkeyPatch, rate: int, then: float | None
) -> None:
    """A reading of 4 ms leaves nothing waiting.  A short window counts from the reading before: it is over by then."""
    edges = Readings(monkeypatch)
    now = 100.0
    for _reading in range(300):
        edges.events, edges.now = rate // 500, now
        edges.daemon._read_events(now)
        now += 0.002
    edges.events, edges.now = rate // 500, now + 0.004
    edges.daemon._read_events(now)
    assert edges.daemon._events_at == (None if then is None else pytest.approx(now + then))


@pytest.mark.parametrize(
    ("but", "wait", "did"),
    [
        ("", 0.02, [("sleep", 0.02), ("others", 0.0)]),
        ("nothing_to_tell", 0.02, [("others", 0.02)]),  # an acknowledgement lets go what waits
        ("calm", 0.02, [("others", 0.02)]),  # ... or what is told again
        ("active", 0.02, [("others", 0.02)]),  # a backup lives on what its peer says
        ("busy", 0.02, [("others", 0.02)]),  # a client reads a long answer
        ("", 0.0, [("others", 0.0)]),
    ],
)
def test_peer_does_not_wake_an_active_node_that_gathers_events(
    monkeypatch: pytest.MonkeyPatch, but: str, wait: float, did: list[tuple[str, float]]
) -> None:
    edges = Readings(monkeypatch)
    if but:
        setattr(edges, but, not getattr(edges, but))
    assert edges.daemon._gather(wait) == [5]
    assert edges.did == did


def test_news_are_looked_for_twice_at_once_and_ten_times_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sign of life and its answer leave nothing to wake up for; a busy node does not judge in each turn."""
    looked: list[float] = []
    monkeypatch.setattr(daemon.Daemon, "_look_at_links", lambda _self, now: looked.append(now))
    one = object.__new__(daemon.Daemon)
    one._engine = type("Same", (), {"condition": lambda _self, _now: ()})()
    one._condition, one._report_at, one._report_due = (), 90.0, True

    def look(now: float) -> bool:
        one._look_for_news(now)
        return one._report_due

    assert [look(100.0), look(100.001)] == [False, False]
    assert look(100.002)
    assert [look(100.5), look(100.501)] == [False, False]
    looked.clear()
    for turn in range(1000):
        look(101.0 + turn / 1000)
    assert len(looked) <= 12


# --- work for the kernel ---------------------------------------------------------------------------------------------


class Requests:
    """A request socket that cannot express a row whose protocol is not TCP."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def create_rows(self, _key_len: int, keys: list[bytes], *_rest: object) -> list[tuple[int, int]]:
        if any(key[0] != k.IPPROTO_TCP for key in keys):
            raise NetlinkError("no such protocol here", errno.EINVAL)
        return [(index, errno.EEXIST) for index in range(len(keys))]

    def inject(self, messages: list[bytes]) -> list[tuple[int, int]]:
        self.sent += messages
        return [(1, errno.ENOMEM)]


def test_work_with_a_row_that_cannot_be_expressed_is_carried_out_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, values, _extras = zip(*(pack(tcp(port)) for port in (1001, 1002, 1003)))
    one = daemon.Daemon.__new__(daemon.Daemon)
    requests = Requests()
    one._requests = requests  # type: ignore[assignment]
    good = Work(CREATE, 13, list(keys), list(values), [55] * 3)
    assert one._carry_out(good) == [(0, errno.EEXIST), (1, errno.EEXIST), (2, errno.EEXIST)]
    assert requests.sent == []
    bad = good._replace(keys=[keys[0], b"\x11" + keys[1][1:], keys[2]])

    def refuse(flow: Flow, **_options: object) -> bytes:
        if flow.proto != k.IPPROTO_TCP:
            raise NetlinkError("no such protocol here")
        return b"message %d" % flow.orig.l4[1]

    monkeypatch.setattr(ctnetlink, "create", refuse)
    assert sorted(one._carry_out(bad)) == [(1, errno.EINVAL), (2, errno.ENOMEM)]
    assert len(requests.sent) == 2


@pytest.mark.parametrize("interrupted", [False, True])
def test_dump_for_people_says_when_it_may_not_be_whole(monkeypatch: pytest.MonkeyPatch, interrupted: bool) -> None:
    class Dump:
        done = False

        def __init__(self) -> None:
            self.interrupted = interrupted

        def __enter__(self) -> Dump:
            return self

        def __exit__(self, *_exc: object) -> None:
            pass

        def read_flows(self) -> list[Flow]:
            self.done = True
            return [tcp(1001)]

    class Everything:
        @staticmethod
        def internal(_flow: Flow) -> bool:
            return True

    monkeypatch.setattr(daemon.netlink, "TableDump", Dump)
    one = daemon.Daemon.__new__(daemon.Daemon)
    one._engine = Everything()  # type: ignore[assignment]
    answer = one._internal(lambda _flow, _age: "line")
    assert next(answer) == b"line\n"
    if interrupted:
        with pytest.raises(ControlError, match="ask again"):
            next(answer)
    else:
        assert list(answer) == []


@pytest.mark.parametrize(
    ("configured", "asked"),
    [
        (1 << 20, [2 << 20, 4 << 20, 5 << 20]),  # doubled each time, and no further than the bound
        (5 << 20, []),
        (6 << 20, []),  # what is configured is never made smaller
    ],
)
def test_every_overrun_doubles_the_event_buffer_up_to_its_bound(
    monkeypatch: pytest.MonkeyPatch, configured: int, asked: list[int]
) -> None:
    grown: list[int] = []
    lost = True

    class Events:
        grow = staticmethod(grown.append)

        @staticmethod
        def read(_limit: int) -> Changes:
            return Changes({}, [], [], lost=lost)

    class Source:
        told = 0

    class Engine:
        source = Source
        active = False
        newcomers = Newcomers()

        @staticmethod
        def kernel_changes(changes: Changes, _now: float) -> None:
            assert changes.lost == lost

    monkeypatch.setattr(daemon, "MAX_EVENT_BUFFER", 5 << 20)
    one = daemon.Daemon.__new__(daemon.Daemon)
    one._rested = False
    one._engine = Engine()  # type: ignore[assignment]
    one._events = Events()  # type: ignore[assignment]
    one._event_buffer = configured
    one._window = daemon.Window()
    one._log = LimitedLog(logging.getLogger("test"))
    for moment in range(6):
        one._read_events(float(moment))
    assert grown == asked
    lost = False
    one._event_buffer = 1 << 20
    one._read_events(6.0)
    assert grown == asked  # nothing was lost


@pytest.mark.parametrize(("paced", "count", "read"), [(True, 0, 0), (True, 1, 1), (True, None, 1), (False, 0, 1)])
def test_empty_table_that_nobody_waits_for_is_not_walked_through(
    monkeypatch: pytest.MonkeyPatch, paced: bool, count: int | None, read: int
) -> None:
    opened: list[object] = []
    finished: list[bool] = []

    class Engine:
        dump = dumps.Dump(1, dumps.AUDIT if paced else dumps.BULK)
        dump_paced = paced
        dump_room = False

        @staticmethod
        def dump_cost(seconds: float) -> None:
            assert seconds >= 0.0

        @staticmethod
        def dump_finished(consistent: bool, _now: float) -> None:
            finished.append(consistent)

    monkeypatch.setattr(daemon.netlink, "TableDump", lambda: opened.append(None))
    monkeypatch.setattr(daemon, "_kernel_count", lambda: count)
    one = daemon.Daemon.__new__(daemon.Daemon)
    one._engine = Engine()  # type: ignore[assignment]
    one._dump = None
    one._dump_number = 0
    one._feed_dump(5.0)
    assert len(opened) == read
    assert finished == ([] if read else [True])


@pytest.mark.parametrize(
    ("attribute", "value"),
    [("_served", True), ("_report_due", True), ("_dump", object()), ("link", "waiting"), ("link", "held back")],
)
def test_a_turn_ends_early_only_where_nothing_else_is_to_be_done(attribute: str, value: object) -> None:
    one = object.__new__(daemon.Daemon)
    one._engine = type("Resting", (), {"resting": lambda _self, _now: True})()
    one._control = type("Quiet", (), {"busy": False})()
    link = type("Open", (), {"watched": selectors.EVENT_READ, "waiting": False})()
    one._dump, one._served, one._report_due, one._links = None, False, False, [link]
    assert one._rests(100.0)
    if value == "waiting":
        link.waiting = True
    elif value == "held back":
        link.watched = 0
    else:
        setattr(one, attribute, value)
    assert not one._rests(100.0)


@pytest.mark.parametrize(
    ("watchdog_s", "pace"),
    [(None, (1.0, 2.0)), (30.0, (1.0, 2.0)), (3.0, (1.0, 1.5)), (1.5, (1.0, 1.0)), (0.5, (0.5, 0.5))],
)
def test_an_idle_daemon_looks_around_less_often_but_tells_systemd_in_time(
    watchdog_s: float | None, pace: tuple[float, float]
) -> None:
    assert daemon.pace(watchdog_s) == pace


@pytest.mark.parametrize(
    ("rested", "links", "reasons", "waits"),
    [(True, 1, (), 2.0), (False, 1, (), 1.0), (True, 2, (), 1.0), (True, 1, ("something",), 1.0)],
)
def test_only_where_nothing_happens_and_all_is_well_the_next_look_around_is_later(
    monkeypatch: pytest.MonkeyPatch, rested: bool, links: int, reasons: tuple[str, ...], waits: float
) -> None:
    for name in ("_report_if_changed", "_record"):
        monkeypatch.setattr(daemon.Daemon, name, lambda _self, _now: None)
    one = object.__new__(daemon.Daemon)
    one._engine = type("Idle", (), {"role": "active"})()
    one._notifier = type("Silent", (), {"watchdog_interval_s": None, "status": lambda _self, _text: None})()
    one._verdict = readiness.Verdict(readiness.READY, reasons, 0)
    monkeypatch.setattr(one, "_links", [object()] * links, raising=False)
    one._summary = None
    one._second_s, one._idle_s = daemon.pace(None)
    one._rested = rested
    one._second_at = 100.0 + one._second_s
    one._every_second(100.0)
    assert one._second_at == 100.0 + waits


def test_what_a_poll_came_to_is_noted_by_the_next_second_though_the_node_rests_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[float] = []
    noted: list[dict[str, Any]] = []

    def peer_notes(now: float) -> list[dict[str, str]]:
        asked.append(now)
        return [{"node": "fw2", "state": "silent"}]

    recorder = types.SimpleNamespace(
        note=lambda _now, _kind, **said: noted.append(said),
        sample=lambda *_args, **_said: None,
        finished=lambda _now: None,
    )
    one = object.__new__(daemon.Daemon)
    engine = types.SimpleNamespace(lag=lambda _now: (0, 0.0), peer_notes=peer_notes)
    monkeypatch.setattr(one, "_engine", engine, raising=False)
    monkeypatch.setattr(one, "_recorder", recorder, raising=False)
    for name in ("_counter_sources", "_keep_story"):
        monkeypatch.setattr(one, name, lambda *_args: ())
    one._peer_said = {}
    one._rested, one._noted = True, False  # a poll came before
    for now in (5.0, 6.0):
        one._record(now)
    assert (asked, noted) == ([5.0], [{"node": "fw2", "state": "silent"}])
