# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What fixed work costs in things that can be counted: bytes, datagrams, pieces of work, turns, wake-ups.  No clock."""

from __future__ import annotations

import functools
import random
import struct
import sys
from types import FrameType
from typing import Any, Callable

import pytest
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import columns, config, daemon, engine, wire
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import constants as k
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.crypto import LibraryCrypto
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.flow import Flow, Tuple
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.jobs import CREATE, Work
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.rows import Changes, pack
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.session import Session
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.situation import (
    EXTERNAL_CACHE,
    HOT_STANDBY,
    Settings,
)
from unit.simulation import ALIVE, NATTED, SECRET, VIP, Simulation, address

HEADERS = 14 + 20 + 8  # Ethernet, IPv4, UDP: what the link carries besides


def flows(count: int, snat: bool, seed: int = 1) -> dict[bytes, bytes]:
    """Established connections with random addresses and ports."""
    chance = random.Random(seed)
    rows = {}
    while len(rows) < count:
        source, target = b"\x14" + chance.randbytes(3), b"\xc6\x12" + chance.randbytes(2)
        port, service = chance.randrange(1024, 65536), chance.choice((80, 443, 8443))
        outside = (address(VIP), port if chance.random() > 1 / 8 else chance.randrange(1024, 65536))
        seen, back = outside if snat else (source, port)
        flow = Flow(
            *(k.AF_INET, k.IPPROTO_TCP, 0),
            Tuple(source, target, struct.pack("!HH", port, service)),
            Tuple(target, seen, struct.pack("!HH", service, back)),
            ALIVE | (NATTED if snat else 0),
            timeout=432_000,
            state=k.TCP_ESTABLISHED,
            tcp_wscale=(7, 7),
            tcp_flags=(0x23, 0x23),
            mark=0,
        )
        key, value, extras = pack(flow)
        assert not extras
        rows[key] = value
    return rows


def shipped(**changes: object) -> Simulation:
    """A pair with the shipped size of datagrams."""
    return Simulation(settings=Settings(**changes), payload=1400).start()  # type: ignore[arg-type]


@pytest.mark.parametrize(("snat", "most_bytes"), [(False, 9_500), (True, 11_800)])
def test_bytes_and_datagrams_of_a_thousand_flows(snat: bool, most_bytes: int) -> None:
    """conntrackd needs 88 bytes for such a flow, 95 with SNAT."""
    sim = shipped()
    rows = flows(1000, snat)
    sim.fw1.up.kernel_changes(Changes({13: rows}, [], [], 1000, False, False), sim.now)
    sent = sim.fw1.up.poll(sim.now)[0]
    assert len(sent) <= most_bytes // 1400 + 1
    assert sum(map(len, sent)) + HEADERS * len(sent) <= most_bytes


def test_pieces_of_work_of_a_thousand_flows() -> None:
    """One datagram is one batch for the backup's kernel at most; what is read in one turn is one."""
    sim = shipped()
    rows = flows(1000, True)
    sim.fw1.up.kernel_changes(Changes({13: rows}, [], [], 1000, False, False), sim.now)
    for datagram in sim.fw1.up.poll(sim.now)[0]:
        sim.fw2.up.receive(0, datagram, sim.now)
    jobs = sim.fw2.up.kernel_work(daemon.REQUESTS_PER_TURN)
    assert [(job.operation, isinstance(job, Work)) for job in jobs] == [(CREATE, True)]
    answers = sim.fw2.up.poll(sim.now)[0]
    assert len(answers) <= 1  # one acknowledgement


def test_turns_of_a_commit() -> None:
    sim = shipped(mode=EXTERNAL_CACHE)
    count, most = 10_000, daemon.REQUESTS_PER_TURN
    sim.fw2.up.cache.add_rows(flows(count, True), sim.now)
    assert sim.fw2.up.commit() == count
    turns = 0
    while not sim.fw2.up.idle:
        jobs = sim.fw2.up.kernel_work(most)
        assert [job.operation for job in jobs] == [CREATE]
        for job in jobs:
            sim.fw2.up.kernel_results(job, ())
        turns += 1
    assert turns == -(-count // most)


def test_wake_ups_of_an_idle_pair() -> None:
    """Twice a second one node beats and the other answers: two wake-ups for the one, one for the other."""
    option = {one.key: one.default for one in config.OPTIONS}
    sessions = {
        name: Session(
            *(name, peer),
            crypto=LibraryCrypto(),
            secrets={1: SECRET},
            send_key=1,
            random=random.Random(number).randbytes,
            version="0",
            hello_interval_s=option["hello_interval_ms"] / 1000,
            dead_after_s=option["dead_after_ms"] / 1000,
        )
        for number, (name, peer) in enumerate((("fw1", "fw2"), ("fw2", "fw1")))
    }
    for session in sessions.values():
        session.set_status(wire.Status(wire.ROLE_BACKUP, 0, 0))
    wakes, sent = dict.fromkeys(sessions, 0), dict.fromkeys(sessions, 0)
    now = 0.0
    waiting: list[tuple[str, bytes]] = []
    while now < 62.0:
        if now > 2.0:
            assert all(session.alive(now) for session in sessions.values())
        if waiting:
            now += 0.0001
        else:
            now = max(now + 0.0001, min(session.next_deadline() for session in sessions.values()))
        arrived, waiting = waiting, []
        for name, session in sessions.items():
            mine = [datagram for to, datagram in arrived if to == name]
            if not mine and session.next_deadline() > now:
                continue
            for datagram in mine:
                session.receive(datagram, now)
            out = session.poll(now)
            waiting += [(session.peer, datagram) for datagram in out]
            if now > 2.0:
                wakes[name] += 1
                sent[name] += len(out)
    assert sent["fw1"] <= 121
    assert sent["fw2"] <= 121
    assert wakes["fw1"] <= 242
    assert wakes["fw2"] <= 121


def lines(work: Callable[[], object]) -> int:
    """How many lines of Python are executed: what is done for each flow shows, however fast the machine is."""
    count = 0

    def trace(_frame: FrameType, event: str, _arg: object) -> Callable[..., Any]:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize(
    ("mode", "most"),
    [
        # new on the active node, new on the backup, ends on the active node, ends on the backup; for each flow of 1000
        (HOT_STANDBY, (6.2, 6.3, 5.5, 4.8)),
        (EXTERNAL_CACHE, (6.2, 6.0, 5.5, 4.8)),
    ],
)
def test_lines_of_a_flood(mode: str, most: tuple[float, ...]) -> None:
    """Nearly all is done for many flows at once; what is left is the digest's sum and columns of datagrams."""
    sim = shipped(mode=mode)
    count = 1000
    rows = flows(count, True)
    found = []
    for changes in (
        Changes({13: rows}, [], [], count, False, False),
        Changes({}, [], list(rows), count, False, False),
    ):
        sent: list[bytes] = []
        told = changes

        def tell(told: Changes = told, sent: list[bytes] = sent) -> None:
            sim.fw1.up.kernel_changes(told, sim.now)
            sent += sim.fw1.up.poll(sim.now)[0]

        def hear(sent: list[bytes] = sent) -> None:
            for datagram in sent:
                sim.fw2.up.receive(0, datagram, sim.now)
            for job in sim.fw2.up.kernel_work(daemon.REQUESTS_PER_TURN):
                sim.fw2.up.kernel_results(job, ())

        found += [lines(tell), lines(hear)]
        sim.now += 0.001
        sim.converge(sim.fw1)
    assert all(one <= count * limit for one, limit in zip(found, most)), found


def test_lines_of_a_single_flow() -> None:
    """On a quiet node flows come one by one, and every line counts twice: what it needs is in no cache."""
    sim = shipped()
    found = []
    for key, value in flows(20, True).items():
        sent: list[bytes] = []

        def tell(changes: Changes, sent: list[bytes]) -> None:
            sim.fw1.up.kernel_changes(changes, sim.now)
            sent += sim.fw1.up.tell(sim.now)[0]

        def hear(sent: list[bytes]) -> None:
            for datagram in sent:
                sim.fw2.up.receive(0, datagram, sim.now)
            for job in sim.fw2.up.kernel_work(daemon.REQUESTS_PER_TURN):
                assert isinstance(job, Work) and len(job.keys) == 1
                columns.create(job.key_len, job.keys, job.values, job.timeouts, 1)
                sim.fw2.up.kernel_results(job, ())

        changes = Changes({13: {key: value}}, [], [], 1, False, False)
        found.append((lines(functools.partial(tell, changes, sent)), lines(functools.partial(hear, sent))))
        sim.now += 0.1
        sim.converge(sim.fw1)
    told, heard = (sorted(some)[len(found) // 2] for some in zip(*found))
    assert told <= 210 and heard <= 345, (told, heard)


def test_lines_of_a_bulk_out_of_memory() -> None:
    """The kernel is not asked, and hardly any Python runs per flow: all but the digest of the backup is columns."""
    sim = shipped(mode=EXTERNAL_CACHE)
    count = 10_000
    for snat in (False, True):
        rows = flows(count // 2, snat, seed=1 + snat)
        sim.fw1.up.kernel_changes(Changes({13: rows}, [], [], count // 2, False, False), sim.now)
    sim.run(1.0)
    assert len(sim.fw2.up.cache) == count
    sim.fw2.up.flush_external()
    sim.fw2.up.request_bulk(sim.now)
    dumps, found = sim.fw1.up.counters["dumps"], [0, 0]

    def turn(one: int) -> None:
        node, other = ((sim.fw1, sim.fw2), (sim.fw2, sim.fw1))[one]
        sent: list[bytes] = []
        found[one] += lines(lambda: sent.extend(node.up.poll(sim.now)[0]))
        for datagram in sent:
            found[1 - one] += lines(lambda datagram=datagram: other.up.receive(0, datagram, sim.now))  # type: ignore[misc]

    for dummy in range(200):
        turn(0)
        turn(1)
        if sim.fw2.up.complete:
            break
    assert len(sim.fw2.up.cache) == count and sim.fw2.up.complete
    assert (sim.fw1.up.counters["bulks_from_memory"], sim.fw1.up.counters["dumps"]) == (1, dumps)
    assert found[0] <= 4.2 * count and found[1] <= 5.8 * count, found


def test_lines_of_a_turn_and_a_verdict_of_an_idle_node() -> None:
    sim = shipped()
    sim.run(3.0)
    for up in (sim.fw1.up, sim.fw2.up):
        up.set_conditions("ab" * 16, {f"tcp_timeout_{number}": number for number in range(50)}, sim.now)
    sim.run(3.0)
    for up in (sim.fw1.up, sim.fw2.up):
        up.poll(sim.now)
        up.verdict(sim.now)
        assert lines(lambda up=up: up.poll(sim.now)) <= 200  # type: ignore[misc]
        assert up.resting(sim.now)
        assert lines(functools.partial(up.resting, sim.now)) + lines(up.rests_until) <= 17
        assert lines(functools.partial(up.talk, sim.now)) <= 29
        assert lines(lambda up=up: up.verdict(sim.now)) <= 165  # type: ignore[misc]


def test_lines_of_a_heartbeat_and_its_answer() -> None:
    """Nearly all that an idle pair does.  What was said before is neither put together nor taken apart again."""
    sim = shipped()
    sim.run(20.0)
    ups = (sim.fw1.up, sim.fw2.up)
    found: list[int] = []
    waiting: list[tuple[int, bytes]] = []
    now = sim.now
    for number, up in enumerate(ups):
        waiting.extend((1 - number, datagram) for datagram in up.poll(now)[0])

    def turn(number: int, datagrams: list[bytes]) -> None:
        up = ups[number]
        for datagram in datagrams:
            up.receive(0, datagram, now)
        assert up.resting(now)
        if up.rests_until() <= now:
            waiting.extend((1 - number, datagram) for datagram in up.talk(now)[0])

    while len(found) < 40:
        now = now + 0.0001 if waiting else max(now + 0.0001, min(up.rests_until() for up in ups))
        arrived = list(waiting)
        waiting.clear()
        for number, up in enumerate(ups):
            mine = [datagram for to, datagram in arrived if to == number]
            if mine or up.rests_until() <= now:
                found.append(lines(functools.partial(turn, number, mine)))
    assert sorted(found)[len(found) // 2] <= 99, found


def test_when_an_engine_sleeps() -> None:
    """A poll each second is left out while nothing at all happens, and no longer than that."""
    sim = shipped()
    sim.run(3.0)
    one, two = sim.fw1.up, sim.fw2.up
    slept = 0
    for dummy in range(30):
        sim.run(1.0)
        one.poll(sim.now)
        two.poll(sim.now)
        slept += one.sleeps(sim.now) and two.sleeps(sim.now)
    assert slept > 20
    sim.run(1.0)
    for up in (one, two):
        up.poll(sim.now)
        assert up.resting(sim.now)
    assert not one.sleeps(sim.now + engine.SLEEP_S)
    one.poll(sim.now)
    assert one.sleeps(sim.now)
    rows = flows(3, False)
    one.kernel_changes(Changes({13: rows}, [], [], 3, False, False), sim.now)
    assert one.resting(sim.now)
    assert not one.sleeps(sim.now)  # what has changed will be part of a digest
    one.poll(sim.now)
    assert not one.sleeps(sim.now)  # it is not acknowledged
    told = one.counters["digests_sent"]
    sim.run(2.5)
    assert one.counters["digests_sent"] == told + 1  # which does not wait for the next one of a quiet node
    two.poll(sim.now)
    assert two.sleeps(sim.now)
    two.flush_external()
    two.poll(sim.now)
    assert not two.sleeps(sim.now)  # it asks for the table


def test_what_an_engine_rests_from() -> None:
    """Changes of flows and signs of life leave it at rest; whatever else comes in, or is due, does not."""
    sim = shipped()
    sim.run(3.0)
    one, two = sim.fw1.up, sim.fw2.up

    def rested() -> bool:
        one.poll(sim.now)
        return one.resting(sim.now)

    def comes(changes: Changes) -> bool:
        one.kernel_changes(changes, sim.now)
        return one.resting(sim.now)

    rows = flows(3, False)
    assert rested()
    assert comes(Changes({13: rows}, [], [], 3, False, False))
    sent = one.talk(sim.now)[0]
    assert len(sent) == 1  # they are told
    assert one.nothing_to_tell
    assert one.resting(sim.now)
    two.receive(0, sent[0], sim.now)
    assert not two.resting(sim.now)  # it has something to do
    for answer in two.poll(sim.now)[0]:
        one.receive(0, answer, sim.now)
    assert comes(Changes({}, [], list(rows), 3, False, False))
    assert not comes(Changes({}, [], [], 0, True, False))  # events were lost
    assert one.dump is None
    one.poll(sim.now)
    assert not one.resting(sim.now)  # the table is read again
    sim.run(10.0)
    assert rested()
    assert not one.resting(sim.now + 60.0)  # the peer was not heard of
    assert rested()
    one.set_conditions("ab" * 16, {"tcp_loose": 0}, sim.now)
    assert not one.resting(sim.now)
    assert rested()
    sim.fw2.set_role("transition", sim.now)
    for heard in two.poll(sim.now)[0]:
        one.receive(0, heard, sim.now)
    assert not one.resting(sim.now)  # the peer's role is another one
    one.resync()
    assert not rested()


def test_an_engine_is_awake_while_two_nodes_are_active() -> None:
    """A split brain begins, and is told, without anything new coming in."""
    sim = shipped()
    sim.run(20.0)
    sim.fw1.up.poll(sim.now)
    assert sim.fw1.up.sleeps(sim.now)
    sim.fw2.set_role("active", sim.now)
    sim.run(1.0)
    for dummy in range(60):
        for node in (sim.fw1, sim.fw2):
            assert not node.up.sleeps(sim.now)
            node.up.poll(sim.now)
            assert not node.up.sleeps(sim.now)
        sim.run(0.1)
    assert sim.fw1.up.counters["split_brains"] == sim.fw2.up.counters["split_brains"] == 1
    sim.fw2.set_role("backup", sim.now)
    sim.run(20.0)
    sim.fw1.up.take_alarms()
    sim.fw1.up.poll(sim.now)
    assert sim.fw1.up.sleeps(sim.now)
