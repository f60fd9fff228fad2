# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Connections that are over soon after they came up: which wait, for how long, and that nothing else is left out."""

from __future__ import annotations

import random
import types
from typing import Any

import pytest
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import constants as k
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import daemon, readiness
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.flow import Flow
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.newcomers import FEW, Newcomers
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.rows import Changes, pack, unpack
from unit.simulation import Simulation, in_sheets, tcp, udp


def rows_of(*flows: Flow) -> dict[int, dict[bytes, bytes]]:
    rows: dict[int, dict[bytes, bytes]] = {}
    for flow in flows:
        key, value, _extras = pack(flow)
        rows.setdefault(len(key), {})[key] = value
    return rows


def changes_of(*flows: Flow, gone: tuple[Flow, ...] = (), **said: Any) -> Changes:
    return Changes(rows_of(*flows), [], [flow.key for flow in gone], len(flows), **said)


def over(flow: Flow) -> Flow:
    return flow._replace(state=k.TCP_TIME_WAIT, timeout=120)


class Told:
    """What the source would tell of changes: the flows that are alive, and those that were."""

    def __init__(self) -> None:
        self.table: dict[bytes, Any] = {}
        self.ever: set[bytes] = set()

    def take(self, changes: Changes) -> None:
        for key in changes.gone:
            self.table.pop(key, None)
        for table in changes.settled().rows.values():
            for key, value in table.items():
                state = unpack(key, value).state
                if key in self.table or key[0] != k.IPPROTO_TCP or state in range(k.TCP_ESTABLISHED, k.TCP_TIME_WAIT):
                    self.table[key] = value
                    self.ever.add(key)
        for flow in changes.flows:
            self.table[flow.key] = flow
            self.ever.add(flow.key)


def churn(newcomers: Newcomers, told: Told, turns: int, first: int = 1, count: int = 40) -> list[Flow]:
    """So many turns in which connections come up, and those of the turn before are over; the last that came up."""
    last: list[Flow] = []
    for turn in range(turns):
        now = [tcp(first + turn * count + number) for number in range(count)]
        told.take(newcomers.sift(changes_of(*map(over, last), *now), told.table))
        last = now
    return last


def test_short_connections_are_not_told_and_others_one_reading_later() -> None:
    newcomers, told = Newcomers(), Told()
    last = churn(newcomers, told, 20)
    assert 4 * 40 <= len(told.ever) < 10 * 40  # until it was seen
    before = set(told.ever)
    more = churn(newcomers, told, 20, 1001)
    assert told.ever == before | {flow.key for flow in last}  # whose end was not in the next reading
    other = udp(7)
    told.take(newcomers.sift(changes_of(*map(over, more[1:]), tcp(5000), other), told.table))
    assert told.ever - before - {flow.key for flow in last} == {
        more[0].key,
        other.key,
        tcp(5000).key,
    }  # few need not wait


def test_what_ended_while_it_waited_is_not_told() -> None:
    newcomers, told = Newcomers(), Told()
    last = churn(newcomers, told, 20)
    ever = set(told.ever)
    told.take(newcomers.sift(changes_of(gone=tuple(last[1:])), told.table))
    assert told.ever - ever == {last[0].key} and not newcomers.waiting
    again = churn(newcomers, told, 20, 2001)
    anew = again[0]._replace(timeout=7)
    told.take(newcomers.sift(changes_of(anew, gone=tuple(again)), told.table))
    assert told.table[anew.key] == pack(anew)[1]


def test_nothing_waits_where_connections_live_on() -> None:
    newcomers, told = Newcomers(), Told()
    for turn in range(100):
        changes = changes_of(*(tcp(turn * 400 + number) for number in range(400)))
        assert newcomers.sift(changes, told.table) is changes
        told.take(changes)
    churn(newcomers, told, 20, 50_001)
    for turn in range(8):  # and no longer where they begin to
        told.take(newcomers.sift(changes_of(*(tcp(40_000 + turn * 40 + number) for number in range(40))), told.table))
    assert not newcomers.waiting


def test_few_do_not_wait_whatever_others_did() -> None:
    newcomers, told = Newcomers(), Told()
    churn(newcomers, told, 20)
    for number in range(10):
        changes = changes_of(*(tcp(5000 + number * FEW + at) for at in range(FEW)))
        told.take(newcomers.sift(changes, told.table))
        assert not newcomers.waiting


def test_other_protocols_do_not_wait() -> None:
    newcomers, told = Newcomers(), Told()
    last = churn(newcomers, told, 20)
    others = [tcp(number, state=k.SCTP_ESTABLISHED)._replace(proto=k.IPPROTO_SCTP) for number in range(100)]
    others += [udp(number) for number in range(100)]
    new = [tcp(9000 + number) for number in range(40)]
    got = newcomers.sift(changes_of(*map(over, last), *new, *others), told.table)
    assert {flow.key for flow in others} <= {key for table in got.rows.values() for key in table}
    assert newcomers.waiting == rows_of(*new)


def test_a_flood_of_new_flows_stays_in_columns() -> None:
    newcomers = Newcomers()
    flood = in_sheets(changes_of(*(tcp(number) for number in range(1, 500))))
    assert flood.sheets
    assert newcomers.sift(flood, {}) is flood
    assert newcomers.sift(flood, {}) is flood
    told = Told()
    last: list[Flow] = []
    for turn in range(20):  # what begins and closes is rows, also where it came in columns
        now = [tcp(1000 + turn * 40 + number) for number in range(40)]
        told.take(newcomers.sift(in_sheets(changes_of(*map(over, last), *now)), told.table))
        last = now
    assert len(newcomers) == 40


@pytest.mark.parametrize("said", [{"more": True}, {}])
def test_nothing_waits_while_tables_are_compared_or_more_is_to_be_read(said: dict[str, bool]) -> None:
    newcomers, told = Newcomers(), Told()
    last = churn(newcomers, told, 20)
    new = [tcp(9000 + number) for number in range(40)]
    told.take(newcomers.sift(changes_of(*new, **said), told.table, pause=not said))
    assert not newcomers.waiting and {flow.key for flow in (*last, *new)} <= told.ever


def test_extras_come_to_what_waits() -> None:
    newcomers, told = Newcomers(), Told()
    last = churn(newcomers, told, 20)
    labelled = last[0]._replace(labels=bytes(16), timeout=None, state=None, tcp_wscale=None, tcp_flags=None)
    got = newcomers.sift(Changes(rows_of(*map(over, last[1:])), [labelled], [], 40), told.table)
    assert [flow._replace(tcp_flags=None) for flow in got.flows] == [
        last[0]._replace(labels=bytes(16), tcp_flags=None, status=last[0].status & 0xFFFF)
    ]
    assert last[0].key not in got.rows[13]


@pytest.mark.parametrize("seed", range(20))
def test_the_peer_ends_with_the_same_flows(seed: int) -> None:
    """Random lives: what is alive is told after two readings at most, in its last state."""
    chance = random.Random(seed)
    newcomers, sifted, plain = Newcomers(), Told(), Told()
    alive: dict[bytes, tuple[Flow, int]] = {}
    long_lived, port, held = chance.choice((0.0, 0.1, 0.4)), 1, 0
    for turn in range(200):
        events: list[Flow] = []
        gone: list[Flow] = []
        for key, (flow, born) in list(alive.items()):
            fate = chance.random()
            if born != turn - 1 and fate < 0.9:
                continue
            if fate < long_lived:
                events += [flow._replace(timeout=turn)] * chance.choice((0, 1))
                continue
            del alive[key]
            if fate < 0.95:
                events.append(over(flow))
            else:
                gone.append(flow)
        for dummy in range(chance.choice((3, 30, 60))):
            port += 1
            flow = tcp(port) if chance.random() < 0.9 else udp(port)
            alive[flow.key] = (flow, turn)
            events.append(flow)
        changes = changes_of(*events, gone=tuple(gone))
        plain.take(changes)
        got = newcomers.sift(changes, sifted.table, pause=chance.random() < 0.02)
        sifted.take(got)
        held += len(newcomers)
        late = {key for table in newcomers.waiting.values() for key in table}
        for key, (_flow, born) in alive.items():
            assert key in sifted.table or (born == turn and key in late)
            if key in sifted.table:
                assert sifted.table[key] == plain.table[key]
    assert sifted.ever <= plain.ever
    assert held > 100 or long_lived == 0.4


def test_two_nodes_agree_whatever_waited() -> None:
    """Nearly all connections are over at the next turn: the backup hears of few of them, and of each that lives on."""
    sim = Simulation().start()
    sim.run(5.0)
    kernel, last, stay = sim.fw1.kernel, [], []
    before = sim.fw1.up.source.told
    for turn in range(60):
        for key in last:
            kernel.change(key, state=k.TCP_TIME_WAIT, timeout=120)
        last = [kernel.open(tcp(1000 + turn * 40 + number)).key for number in range(40)]
        stay.append(last.pop())
        sim.turn()
    assert sim.fw1.up.counters["newcomers_held"] > 1000
    assert sim.fw1.up.source.told - before < 20 * 40
    sim.turn()
    for key in last:
        kernel.change(key, state=k.TCP_TIME_WAIT, timeout=120)
    sim.run(2.0)
    assert not sim.fw1.up.newcomers.waiting
    assert set(stay) <= sim.fw1.up.source.announced.table.keys()
    sim.converge(sim.fw1, sim.fw2)


def test_what_waits_is_told_to_the_node_that_takes_over() -> None:
    """In a switchover a connection that just came up, among many short ones, is not lost."""
    sim = Simulation().start()
    sim.run(5.0)
    kernel, last = sim.fw1.kernel, []
    for turn in range(30):
        for key in last:
            kernel.change(key, state=k.TCP_TIME_WAIT, timeout=120)
        last = [kernel.open(tcp(1000 + turn * 40 + number)).key for number in range(40)]
        sim.turn()
    assert sim.fw1.up.newcomers.waiting
    assert not set(last) & sim.fw2.kernel.table.keys()
    sim.fw1.set_role(readiness.BACKUP, sim.now)
    sim.fw2.set_role(readiness.ACTIVE, sim.now)
    assert not sim.fw1.up.newcomers.waiting
    sim.run(1.0)
    assert set(last) <= sim.fw2.kernel.table.keys()


def test_what_waits_is_told_though_no_event_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The daemon reads again at the end of the next window, whether or not the kernel says something."""
    waiting: dict[int, dict[bytes, bytes]] = {}
    one = object.__new__(daemon.Daemon)
    engine = types.SimpleNamespace(
        source=types.SimpleNamespace(told=0),
        active=False,
        newcomers=types.SimpleNamespace(waiting=waiting),
        kernel_changes=lambda _changes, _now: None,
    )
    monkeypatch.setattr(one, "_engine", engine, raising=False)
    monkeypatch.setattr(one, "_events", types.SimpleNamespace(read=lambda _limit: Changes({}, [], [])), raising=False)
    monkeypatch.setattr(one, "config", types.SimpleNamespace(window_ms=20), raising=False)
    one._window, one._rested = daemon.Window(), False
    one._read_events(5.0)
    assert one._events_at is None
    waiting[13] = rows_of(tcp(1))[13]
    one._read_events(5.0)
    assert one._events_at == pytest.approx(5.02)


def test_what_waits_is_told_before_an_active_node_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what the kernel has said since the last reading: if its keepalived stops, too, nobody can tell it later."""
    sim = Simulation().start()
    sim.run(3.0)
    kernel, engine = sim.fw1.kernel, sim.fw1.up
    held, late = [tcp(port) for port in range(3000, 3010)], [tcp(port) for port in range(4000, 4010)]
    for flow in held:
        kernel.open(flow)
    waiting = kernel.take_events().settled().rows
    engine.newcomers.waiting = {key_len: dict(table) for key_len, table in waiting.items()}
    for flow in late:
        kernel.open(flow)
    one, sent = object.__new__(daemon.Daemon), []
    parts = {
        "_engine": engine,
        "_sessions": [peer.session for peer in engine.peers],
        "_events": types.SimpleNamespace(read=lambda _limit: kernel.take_events()),
        "_notifier": types.SimpleNamespace(stopping=lambda _text: None),
        "_recorder": types.SimpleNamespace(note=lambda *_note: None, finished=lambda *_note, at_once: ""),
        "_keep_story": lambda *_story: None,
        "_flights": types.SimpleNamespace(finish=lambda _patience: None),
        "_send": lambda datagrams, _now: sent.extend(datagrams[0]),
        "close": lambda: None,
    }
    for name, part in parts.items():
        monkeypatch.setattr(one, name, part, raising=False)
    monkeypatch.setattr(daemon.time, "monotonic", lambda: sim.now)
    one._stop()
    for datagram in sent:
        sim.wire.send("fw2", datagram, sim.now, "fw1")
    sim.fw1.kill()
    sim.run(1.0)
    assert {flow.key for flow in held + late} <= {flow.key for flow, _since in sim.fw2.up.external_flows()}
    assert sim.fw2.up.peers[0].left
