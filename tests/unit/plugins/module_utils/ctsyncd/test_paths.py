# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Several links: which one carries the session, whatever happens to each of them; and how long a datagram they take.

The session must go on over any link that works, with the same keys, numbers and blocks; each test that says so counts
sessions and bulks.
"""

from __future__ import annotations

import random
import types
from typing import Any, Callable, NamedTuple

import pytest
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import daemon, paths, wire
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.paths import DOWN, UP, Paths
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.session import BlockReceived, Session
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.simulation import SECRET, RecordingCrypto, Simulation, Wire, tcp

INTERVAL_S, DEAD_AFTER_S = 0.5, 1.5  # as shipped


class Linked:
    """Two sessions with some wires between them."""

    def __init__(self, links: int = 2, seed: int = 0, payload: int = 1400, dead_after_s: float = DEAD_AFTER_S) -> None:
        self.chance = random.Random(seed)
        self.crypto = RecordingCrypto()
        self.wires = [Wire(self.chance) for _link in range(links)]
        self.now = 50.0
        self.events: dict[str, list[NamedTuple]] = {"fw1": [], "fw2": []}
        self.sent: dict[str, list[tuple[float, int, bytes]]] = {"fw1": [], "fw2": []}
        self.next_block = dict.fromkeys(self.events, 0)
        self.ends = {
            name: Session(
                *(name, other(name)),
                crypto=self.crypto,
                secrets={1: SECRET},
                send_key=1,
                random=self.chance.randbytes,
                version="0",
                payload=payload,
                hello_interval_s=INTERVAL_S,
                dead_after_s=dead_after_s,
                now=self.now,
                paths=Paths([(f"eth{link + 2}", 4) for link in range(links)], payload=payload),
            )
            for name in self.events
        }

    @property
    def fw1(self) -> Session:
        return self.ends["fw1"]

    @property
    def fw2(self) -> Session:
        return self.ends["fw2"]

    def turn(self, latest: float = float("inf"), as_due: bool = False) -> None:
        """``as_due``: like the daemon, which looks after a session when that is due, and not in each turn."""
        due = [latest, *(line.next_arrival() for line in self.wires), *(e.next_deadline() for e in self.ends.values())]
        self.now = max(self.now + 0.0005, min(due))
        for link, line in enumerate(self.wires):
            for to, datagram in line.arrived(self.now):
                self.events[to].extend(self.ends[to].receive(datagram, self.now, link))
        for name, end in self.ends.items():
            if not as_due or end.next_deadline() <= self.now:
                self.out(name, end.poll(self.now))

    def out(self, name: str, told: list[bytes]) -> None:
        """What a session gave goes over the links."""
        for link, datagrams in self.ends[name].route(told):
            for datagram in datagrams:
                self.sent[name].append((self.now, link, datagram))
                self.wires[link].send(other(name), datagram, self.now)

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            self.turn(end)

    def run_until(self, condition: Callable[[], object], seconds: float = 60.0) -> float:
        start = self.now
        while not condition():
            assert self.now < start + seconds, f"not within {seconds} simulated seconds: {self.report()}"
            self.turn(start + seconds)
        return self.now - start

    def up(self) -> Linked:
        self.run_until(
            lambda: all(link["state"] == UP for e in self.ends.values() for link in e.paths.status(self.now))
        )
        self.run(1.0)
        return self

    def give(self, name: str, blocks: int = 1) -> None:
        """So many blocks as long as they may be, as credit comes."""
        end = self.ends[name]
        for _block in range(blocks):
            self.run_until(lambda: end.established and end.credit())
            self.send(name, end.block_bytes)

    def send(self, name: str, length: int) -> None:
        """The next block, of so many bytes.  There must be credit."""
        self.ends[name].send_block(self.next_block[name].to_bytes(length, "big"), 1, self.now, self.now)
        self.next_block[name] += 1

    def blocks(self, name: str) -> list[int]:
        """Those that arrived at a node, in order."""
        return [int.from_bytes(event.records, "big") for event in self.events[name] if isinstance(event, BlockReceived)]

    def all_arrived(self) -> bool:
        return all(self.blocks(other(name)) == list(range(count)) for name, count in self.next_block.items())

    def works(self, seconds: float = 20.0) -> float:
        """A block each way arrives, every one before it too; in so many seconds."""
        for name in self.ends:
            self.give(name)
        return self.run_until(self.all_arrived, seconds)

    def chosen(self) -> tuple[int, int]:
        return self.fw1.paths.chosen, self.fw2.paths.chosen

    def state(self, name: str, link: int) -> str:
        return str(self.ends[name].paths.status(self.now)[link]["state"])

    def sessions(self) -> list[int]:
        return [end.counters["sessions"] for end in self.ends.values()]

    def report(self) -> Any:
        return {name: (end.paths.status(self.now), dict(end.counters)) for name, end in self.ends.items()}


def other(name: str) -> str:
    return "fw2" if name == "fw1" else "fw1"


# --- failing over and back -------------------------------------------------------------------------------------------


def test_the_first_link_carries_and_all_are_known_to_work() -> None:
    pair = Linked(3).up()
    assert pair.chosen() == (0, 0)
    pair.works(0.1)
    assert pair.sessions() == [1, 1]
    for link in pair.fw1.paths.status(pair.now):
        assert link["rtt_ms"] == pytest.approx(1.0, abs=0.6)
        assert (link["mtu"], link["loss"]) == (1428, 0.0)
    assert [link["carries"] for link in pair.fw1.paths.status(pair.now)] == [True, False, False]
    assert pair.fw1.paths.down == []


CUTS: dict[str, Callable[[Wire], None]] = {
    "both ways": lambda line: setattr(line, "cut", True),
    "towards fw1": lambda line: setattr(line, "deaf", "fw1"),
    "towards fw2": lambda line: setattr(line, "deaf", "fw2"),
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("busy", [False, True])
def test_a_black_hole_is_noticed_before_the_peer_counts_as_dead(cut: str, busy: bool) -> None:
    pair = Linked().up()
    pair.works()
    CUTS[cut](pair.wires[0])
    start = pair.now
    alive = True
    while pair.now < start + 10.0:
        if busy and pair.fw1.credit() and pair.now < start + 3.0:
            pair.give("fw1")
        pair.turn(start + 10.0)
        alive = alive and pair.fw1.alive(pair.now) and pair.fw2.alive(pair.now)
        if pair.chosen() == (1, 1):
            break
    assert pair.now - start <= DEAD_AFTER_S, pair.report()
    assert alive
    assert pair.works(0.2) <= 0.2  # at once, not at the next time-out
    assert pair.sessions() == [1, 1]
    assert pair.fw1.paths.down == pair.fw2.paths.down == ["eth2"]
    pair.run(30.0)
    assert pair.chosen() == (1, 1)
    assert pair.fw1.alive(pair.now) and pair.fw2.alive(pair.now)


def test_with_one_link_the_peer_is_dead() -> None:
    """The negative control: no second link, no way."""
    pair = Linked(1)
    pair.run(2.0)
    pair.wires[0].cut = True
    pair.give("fw1")
    pair.run(DEAD_AFTER_S + INTERVAL_S)
    assert not pair.fw1.alive(pair.now)
    assert not pair.fw2.alive(pair.now)
    assert pair.blocks("fw2") == []


def test_what_was_on_its_way_is_sent_again_at_once() -> None:
    pair = Linked().up()
    pair.wires[0].cut = True
    pair.give("fw1", 100)
    took = pair.run_until(lambda: pair.fw1.paths.chosen == 1)
    assert took <= DEAD_AFTER_S
    assert pair.run_until(pair.all_arrived) < 0.02
    assert pair.fw1.counters["blocks_retransmitted"] <= 110  # each once, and a few probes before


def test_it_goes_back_to_the_first_link_after_a_while_and_loses_nothing() -> None:
    pair = Linked().up()
    pair.wires[0].cut = True
    pair.run_until(lambda: pair.chosen() == (1, 1))
    pair.wires[0].cut = False
    back = pair.run_until(lambda: pair.state("fw1", 0) == pair.state("fw2", 0) == UP)
    assert back < 2 * paths.STANDBY_S
    start = pair.now
    while pair.chosen() != (0, 0):
        assert pair.now < start + 2 * paths.HOLD_S
        pair.give("fw1")
        pair.run(0.01)
    assert pair.now - start == pytest.approx(paths.HOLD_S, abs=1.2)
    pair.run_until(pair.all_arrived)
    assert pair.sessions() == [1, 1]
    assert pair.fw1.paths.counters["failovers"] == pair.fw1.paths.counters["failbacks"] == 1
    assert pair.fw1.paths.down == []


def test_a_link_that_flaps_is_used_less_and_less() -> None:
    pair = Linked().up()
    waits = []
    for _round in range(5):
        pair.wires[0].cut = True
        pair.run_until(lambda: pair.chosen() == (1, 1))
        pair.wires[0].cut = False
        waits.append(pair.run_until(lambda: pair.chosen() == (0, 0), 100.0))
        pair.works()
    for wait, expected in zip(waits, (5.0, 10.0, 20.0, 40.0, 60.0)):
        assert expected <= wait <= expected + 3.0
    pair.run(paths.CALM_S)
    pair.wires[0].cut = True
    pair.run_until(lambda: pair.chosen() == (1, 1))
    pair.wires[0].cut = False
    assert pair.run_until(lambda: pair.chosen() == (0, 0), 100.0) < 8.0
    assert pair.sessions() == [1, 1]


def test_each_link_works_one_way_only() -> None:
    """fw1 reaches fw2 over the one, fw2 reaches fw1 over the other: no link is up, and the session goes on."""
    pair = Linked().up()
    pair.wires[0].deaf, pair.wires[1].deaf = "fw1", "fw2"
    pair.run(5.0)
    for _round in range(20):
        pair.works(1.0)
        pair.run(1.0)
    assert pair.chosen() == (0, 1)
    assert pair.sessions() == [1, 1]
    assert pair.fw1.alive(pair.now) and pair.fw2.alive(pair.now)


def test_everything_down_and_back_is_the_same_session() -> None:
    pair = Linked().up()
    for line in pair.wires:
        line.cut = True
    pair.give("fw1", 50)
    pair.run(60.0)
    assert not pair.fw1.alive(pair.now)
    assert pair.state("fw1", 0) == pair.state("fw1", 1) == DOWN
    assert pair.fw1.paths.down == []  # the peer is silent: that says it all
    pair.wires[1].cut = False
    assert pair.run_until(pair.all_arrived) <= 2 * paths.STANDBY_S
    assert pair.chosen() == (1, 1)
    pair.wires[0].cut = False
    pair.run_until(lambda: pair.chosen() == (0, 0), 100.0)
    pair.works()
    assert pair.sessions() == [1, 1]


@pytest.mark.parametrize("dead", [0, 1])
def test_a_session_begins_over_whichever_link_works(dead: int) -> None:
    pair = Linked()
    pair.wires[dead].cut = True
    pair.run_until(lambda: pair.fw1.established and pair.fw2.established)
    pair.give("fw1", 100)
    assert pair.run_until(pair.all_arrived) < 1.0
    pair.run(3.0)
    assert pair.chosen() == (1 - dead, 1 - dead)
    assert pair.sessions() == [1, 1]
    assert pair.fw1.paths.down == [f"eth{dead + 2}"]


def test_what_the_kernel_refuses_is_not_waited_for() -> None:
    pair = Linked().up()
    pair.wires[0].cut = True
    for end in pair.ends.values():
        end.paths.set_usable(0, False, pair.now)
    assert pair.chosen() == (1, 1)
    pair.works(0.1)
    pair.wires[0].cut = False
    for end in pair.ends.values():
        end.paths.set_usable(0, True, pair.now)
    pair.run_until(lambda: pair.chosen() == (0, 0))
    assert pair.sessions() == [1, 1]


@pytest.mark.parametrize("loss", [0.05, 0.2])
def test_loss_at_random_is_no_failure(loss: float) -> None:
    pair = Linked(seed=3).up()
    for line in pair.wires:
        line.loss = loss
    for _second in range(120):
        pair.works(5.0)
        pair.run(1.0)
    assert pair.fw1.paths.counters["failovers"] <= (0 if loss < 0.1 else 3)
    assert pair.sessions() == [1, 1]
    assert 0 < pair.fw1.paths.status(pair.now)[0]["loss"] < 0.7


@pytest.mark.parametrize("cut", ["back", "standby"])
def test_a_link_that_fails_under_traffic_without_a_pause_is_noticed_as_soon(cut: str) -> None:
    """As the daemon does it: changes are sent without a look after the session, which comes when it is due."""
    pair = Linked(2, dead_after_s=0.5)
    for end in pair.ends.values():
        end.set_timers(0.05, 0.5)
    for line in pair.wires:
        line.delay_s = 0.06  # a round trip is longer than an interval
    pair.up()

    def busy(seconds: float) -> None:
        until = pair.now + seconds
        while pair.now < until:
            if pair.fw1.credit():
                pair.send("fw1", 20)
            pair.out("fw1", pair.fw1.take())
            then = pair.now + 0.01
            while pair.now < then:
                pair.turn(then, as_due=True)

    busy(5.0)
    failing = 0 if cut == "back" else 1
    assert [pair.state("fw1", link) for link in (0, 1)] == [UP, UP]
    if cut == "back":
        pair.wires[0].deaf = "fw1"
    else:
        pair.wires[1].cut = True
    busy(1.0)
    assert pair.state("fw1", failing) == DOWN
    assert pair.state("fw1", 1 - failing) == UP


@pytest.mark.parametrize("links", [1, 2])
def test_shorter_timers_hold_from_the_last_sign_of_life_on(links: int) -> None:
    pair = Linked(links)
    for end in pair.ends.values():
        end.set_timers(10.0, 30.0)
    pair.run_until(lambda: pair.fw1.established and pair.fw2.established)
    pair.run(60.0)
    heard = [end.last_seen for end in pair.ends.values()]
    pair.run_until(lambda: all(end.last_seen != then for end, then in zip(pair.ends.values(), heard)), 30.0)
    pair.run(0.3)
    for end in pair.ends.values():
        end.set_timers(INTERVAL_S, DEAD_AFTER_S)
    until = pair.now + 20.0
    while pair.now < until:
        pair.run(0.1)
        assert pair.fw1.alive(pair.now)
        assert pair.fw2.alive(pair.now)


def test_links_of_different_length_do_not_confuse_the_measurement_of_loss() -> None:
    """The probes of a fast standby link overtake the blocks on the slow one: that makes nothing seem lost."""
    pair = Linked()
    pair.wires[0].delay_s = 0.04
    pair.up()
    before = pair.fw1.counters["blocks_retransmitted"]
    start = pair.now
    while pair.now < start + 20.0:
        if pair.fw1.credit():
            pair.give("fw1")
        pair.run(0.002)
    assert pair.chosen() == (0, 0)
    assert pair.fw1.counters["blocks_retransmitted"] == before


def test_lists_in_different_orders_are_noticed() -> None:
    """fw1's first link is fw2's second one: what is said about a link is not believed."""
    pair = Linked().up()
    before = pair.fw2.counters["dropped_wrong_link"]
    probe = wire.encode_probe(wire.Probe(0, True, 1 << 20))
    datagram = pair.fw1._established.sealer.seal(probe)  # type: ignore[union-attr]
    pair.wires[1].inject("fw2", datagram, pair.now)
    pair.run(0.1)
    assert pair.fw2.counters["dropped_wrong_link"] == before + 1


# --- lengths ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("links", [1, 2])
@pytest.mark.parametrize(("mtu", "found"), [(1428, 1428), (1420, 1420), (1300, 1300), (1299, 1280), (600, 576)])
def test_the_length_that_a_link_takes_is_found(links: int, mtu: int, found: int) -> None:
    pair = Linked(links)
    for line in pair.wires:
        line.longest = mtu - paths.IPV4_BYTES
    pair.run_until(lambda: pair.fw1.established and pair.fw2.established)
    pair.give("fw1", 200)
    pair.run_until(pair.all_arrived)
    pair.run(2.0)
    assert [link["mtu"] for link in pair.fw1.paths.status(pair.now)] == [found] * links
    assert pair.fw1.block_bytes == found - paths.IPV4_BYTES - wire.DATA_OVERHEAD_BYTES - wire.BLOCK_HEADER_BYTES
    assert pair.fw1.counters["sessions"] == 1
    assert pair.fw1.paths.counters["failovers"] == 0


@pytest.mark.parametrize("links", [1, 2])
def test_a_link_that_shrinks_under_way_is_noticed_and_what_was_too_long_goes_in_parts(links: int) -> None:
    pair = Linked(links, payload=8900)
    pair.run(2.0)
    pair.give("fw1", 20)
    for line in pair.wires:
        line.longest = 1472
    pair.give("fw1", 400)
    assert pair.run_until(pair.all_arrived) < 3.0
    assert pair.fw1.counters["parts_sent"] > 0
    assert pair.fw1.paths.payload == 1472
    assert pair.fw1.paths.counters["failovers"] == 0
    pair.works(1.0)  # fw2 has to notice it, too
    for line in pair.wires:
        line.longest = 1252
    pair.give("fw1", 100)
    assert pair.run_until(pair.all_arrived) < 3.0
    assert pair.fw1.paths.payload == 1252
    for line in pair.wires:
        line.longest = 9000
    pair.run_until(lambda: pair.fw1.paths.payload == 8900, paths.RAISE_S + 1)
    pair.works(0.2)
    assert pair.sessions() == [1, 1]


def test_a_link_that_shrinks_is_noticed_although_nothing_is_sent() -> None:
    pair = Linked().up()
    pair.wires[0].longest = 1272
    pair.run(paths.CONFIRM_S + 3.0)
    assert pair.fw1.paths.payload == 1272
    pair.give("fw1", 10)
    assert pair.run_until(pair.all_arrived) < 0.1
    assert pair.fw1.counters["parts_sent"] == 0


@pytest.mark.parametrize("links", [1, 2])
@pytest.mark.parametrize("gap_s", [0.005, 0.02, 0.1])
def test_a_link_that_shrinks_one_way_is_noticed_though_its_traffic_never_pauses(links: int, gap_s: float) -> None:
    """No heartbeat goes by itself then: every status rides on a block, and short ones arrive all the time."""
    pair = Linked(links).up()
    for line in pair.wires:
        line.longest_to["fw2"] = 1000
    fw1, end = pair.fw1, pair.now + paths.CONFIRM_S + 2.0
    while pair.now < end:
        pair.send("fw1", 20)
        pair.run(gap_s)
    assert fw1.paths.payload == 1006 - paths.IPV4_BYTES
    assert pair.fw2.paths.payload == 1400
    assert fw1.counters["timeouts"] == 0
    pair.give("fw1", 10)
    assert pair.run_until(pair.all_arrived) < 0.1
    assert fw1.counters["parts_sent"] == 0


@pytest.mark.parametrize("links", [1, 2])
@pytest.mark.parametrize("gap_s", [0.005, 0.02, 0.1])
def test_a_long_block_that_is_lost_again_and_again_says_that_the_link_shrank(links: int, gap_s: float) -> None:
    """The blocks behind it arrive, so nothing times out, and none of them counts before it is there."""
    pair = Linked(links).up()
    for line in pair.wires:
        line.longest_to["fw2"] = 1000
    fw1, begun = pair.fw1, pair.now
    while not pair.next_block["fw1"] or pair.blocks("fw2")[-1:] != [pair.next_block["fw1"] - 1]:
        assert pair.now < begun + 2.0, pair.report()
        pair.send("fw1", 20 if pair.next_block["fw1"] else fw1.block_bytes)
        pair.run(gap_s)
    assert fw1.paths.payload == 1006 - paths.IPV4_BYTES
    assert fw1.counters["parts_sent"] == 2


def test_failing_over_to_a_link_that_takes_less() -> None:
    pair = Linked(payload=8900)
    pair.wires[1].longest = 1280 - paths.IPV4_BYTES
    pair.run(3.0)
    assert [link["mtu"] for link in pair.fw1.paths.status(pair.now)] == [8928, 1280]
    pair.wires[0].cut = True
    pair.give("fw1", 100)
    assert pair.run_until(pair.all_arrived) < DEAD_AFTER_S + 0.1
    assert pair.fw1.counters["parts_sent"] > 700
    pair.works(0.1)
    pair.wires[0].cut = False
    pair.run_until(lambda: pair.chosen() == (0, 0))
    assert pair.fw1.paths.payload == 8900
    pair.works(0.1)
    assert pair.sessions() == [1, 1]


def test_what_the_interface_takes_is_known_without_probes() -> None:
    pair = Linked().up()
    pair.fw1.paths.set_ceiling(0, 1252, pair.now)
    assert pair.fw1.paths.payload == 1252
    pair.works(0.1)
    pair.fw1.paths.set_ceiling(0, 65_000, pair.now)
    pair.run(1.0)
    assert pair.fw1.paths.payload == 1400  # not more than is configured


def test_nothing_but_the_shortest_datagrams_pass() -> None:
    pair = Linked(1)
    pair.wires[0].longest = 300
    pair.run(30.0)
    assert pair.fw1.paths.payload == paths.SMALLEST_PAYLOAD
    assert pair.fw1.alive(pair.now)
    assert len(pair.sent["fw1"]) < 250  # and no storm of probes


# --- what it costs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("links", "most"), [(1, 2.2), (2, 4.2), (3, 6.2)])
def test_datagrams_of_an_idle_pair(links: int, most: float) -> None:
    """Two heartbeats a second, and three datagrams a second of both nodes together for each link that stands by."""
    pair = Linked(links).up()
    pair.run(10.0)
    before = [end.counters["datagrams_sent"] for end in pair.ends.values()]
    pair.run(60.0)
    for count, end in zip(before, pair.ends.values()):
        assert end.counters["datagrams_sent"] - count <= 60 * most
    assert pair.fw1.paths.counters["failovers"] == 0


# --- whatever happens ------------------------------------------------------------------------------------------------


class Fault(NamedTuple):
    link: int
    what: str
    seconds: float


FAULTS = ("cut", "deaf fw1", "deaf fw2", "loss", "jitter", "duplication", "short", "slow")


def inflict(line: Wire, what: str) -> None:
    line.cut = what == "cut"
    line.deaf = what[5:] if what.startswith("deaf") else ""
    line.loss = 0.3 if what == "loss" else 0.0
    line.jitter_s = 0.05 if what == "jitter" else 0.0
    line.duplication = 0.3 if what == "duplication" else 0.0
    line.longest = 560 if what == "short" else 1 << 16
    line.delay_s = 0.1 if what == "slow" else 0.0005


faults = st.builds(Fault, st.integers(0, 1), st.sampled_from(FAULTS), st.floats(0.05, 8.0))


@settings(max_examples=40, deadline=None)
@given(st.lists(faults, max_size=12), st.integers(0, 1000))
def test_no_session_restarts_while_one_link_works(story: list[Fault], seed: int) -> None:
    """One fault after the other, on one of the links; the other one is whole."""
    pair = Linked(seed=seed, payload=900).up()
    for fault in story:
        inflict(pair.wires[fault.link], fault.what)
        inflict(pair.wires[1 - fault.link], "")
        end = pair.now + fault.seconds
        while pair.now < end:
            for name, session in pair.ends.items():
                if session.credit():
                    pair.give(name)
            pair.run(0.05)
    for line in pair.wires:
        inflict(line, "")
    assert pair.works(10.0) <= 10.0
    assert pair.sessions() == [1, 1]
    pair.run_until(lambda: pair.chosen() == (0, 0), 200.0)
    pair.run(2 * paths.RAISE_S)
    for end in pair.ends.values():
        assert [(link["state"], link["mtu"]) for link in end.paths.status(pair.now)] == [(UP, 928), (UP, 928)]


@settings(max_examples=25, deadline=None)
@given(st.lists(faults, max_size=8), st.integers(0, 1000))
def test_tables_converge_over_whatever_links_work(story: list[Fault], seed: int) -> None:
    """Both links may fail at once here; flows come and go meanwhile."""
    sim = Simulation(seed=seed, links=2).start()
    port = 2000
    for fault in story:
        inflict(sim.wires[fault.link], fault.what)
        for _flow in range(10):
            port += 1
            sim.fw1.kernel.open(tcp(port))
        if port % 3:
            sim.fw1.kernel.close(tcp(port - 5).key)
        sim.run(fault.seconds)
    for line in sim.wires:
        inflict(line, "")
    sim.converge(sim.fw1, sim.fw2)
    assert [node.up.peers[0].session.counters["sessions"] for node in sim.nodes.values()] == [1, 1]


def test_a_busy_peer_is_no_failure_of_a_link() -> None:
    """fw2 does nothing for seconds, then goes on: the datagrams of both links wait for it."""
    pair = Linked().up()
    pair.give("fw1", 50)
    for pause in (0.95, 1.2, 2.0, 4.0):
        busy = pair.ends.pop("fw2")
        kept: list[tuple[int, bytes]] = []
        end = pair.now + pause
        while pair.now < end:
            pair.now = min(end, max(pair.now + 0.0005, pair.fw1.next_deadline()))
            for link, datagrams in pair.fw1.route(pair.fw1.poll(pair.now)):
                kept.extend((link, datagram) for datagram in datagrams)
        pair.ends["fw2"] = busy
        for link in (1, 0):  # the standby link first
            for where, datagram in kept:
                if where == link:
                    pair.events["fw2"].extend(busy.receive(datagram, pair.now, link))
            pair.turn()
        pair.run(5.0)
        pair.works(1.0)
    assert [end.paths.counters["failovers"] for end in pair.ends.values()] == [0, 0]
    assert pair.sessions() == [1, 1]


def test_a_probe_leaves_though_nothing_goes_over_the_chosen_link() -> None:
    """Else it would wait for the next heartbeat, and the daemon with it, without a pause."""
    pair, sent = Linked().up(), []
    end, one = pair.fw1, object.__new__(daemon.Daemon)
    one._sessions = [end]
    one._links = [
        types.SimpleNamespace(
            send=lambda _peer, part, link=link: sent.extend((link, datagram) for datagram in part),
            **{"payload": 0, "told": 0, "usable": True, "waiting": False},
        )
        for link in range(2)
    ]
    alone = 0
    for _turn in range(500):
        for link, line in enumerate(pair.wires):
            for to, datagram in line.arrived(pair.now):
                pair.ends[to].receive(datagram, pair.now, link)
        for name, some in [(name, peer.poll(pair.now)) for name, peer in pair.ends.items()]:
            sent.clear()
            if name == "fw1":
                alone += not some and bool(end._probes)
                one._send([some], pair.now)
            else:
                sent.extend((link, datagram) for link, part in pair.fw2.route(some) for datagram in part)
            for link, datagram in sent:
                pair.wires[link].send(other(name), datagram, pair.now)
        assert end.next_deadline() > 0.0
        pair.now += 0.01
    assert alone
