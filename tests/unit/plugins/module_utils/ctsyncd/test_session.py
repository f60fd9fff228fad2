# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The session: handshake, replays, rotation, loss.  Every fault is counted by kind, and nothing of it is delivered."""

from __future__ import annotations

import itertools
import random
from typing import Any, Callable, NamedTuple

import pytest
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import session as sessions
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import wire
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.session import (
    WINDOW_BLOCKS,
    BlockReceived,
    PeerLeft,
    Session,
    SessionUp,
    StatusReceived,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.simulation import SECRET, RecordingCrypto, Wire

OTHER_SECRET = bytes(range(100, 132))


class Two:
    """Two sessions and the wire; every event that came out, by node."""

    def __init__(self, seed: int = 0, **options: Any) -> None:
        self.chance = random.Random(seed)
        self.crypto = RecordingCrypto()
        self.wire = Wire(self.chance)
        self.options: dict[str, Any] = {"secrets": {1: SECRET}, "send_key": 1, "payload": 512, **options}
        self.now = 50.0
        self.ends: dict[str, Session] = {}
        self.events: dict[str, list[NamedTuple]] = {"fw1": [], "fw2": []}
        self.restart("fw1")
        self.restart("fw2")

    def restart(self, name: str, **options: Any) -> None:
        peer = other(name)
        given = {**self.options, **options}
        self.ends[name] = Session(
            name, peer, crypto=self.crypto, random=self.chance.randbytes, version="0", now=self.now, **given
        )
        self.events[name].clear()

    def deliver(self, to: str, datagram: bytes) -> list[NamedTuple]:
        events = self.ends[to].receive(datagram, self.now)
        self.events[to].extend(events)
        return events

    def turn(self, latest: float = float("inf")) -> None:
        due = [latest, self.wire.next_arrival(), *(end.next_deadline() for end in self.ends.values())]
        self.now = max(self.now + 0.0005, min(due))
        for to, datagram in self.wire.arrived(self.now):
            self.deliver(to, datagram)
        for name, end in self.ends.items():
            for datagram in end.poll(self.now):
                self.wire.send(other(name), datagram, self.now)

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            self.turn(end)

    def run_until(self, condition: Callable[[], object], seconds: float = 120.0) -> None:
        end = self.now + seconds
        while not condition():
            assert self.now < end, f"not within {seconds} simulated seconds"
            self.turn()

    def up(self) -> Two:
        """Establish, and let what is in the air arrive."""
        self.run_until(lambda: all(end.established for end in self.ends.values()))
        self.run(1.0)
        return self

    def works(self) -> None:
        """A block each way arrives."""
        for name, end in self.ends.items():
            text = b"from " + name.encode() + str(self.now).encode()
            end.send_block(text, 1, self.now, self.now)
            self.run_until(lambda name=name, text=text: text in self.blocks(other(name)))

    def blocks(self, name: str) -> list[bytes]:
        return [event.records for event in self.events[name] if isinstance(event, BlockReceived)]

    def sessions(self) -> list[int]:
        return [end.counters["sessions"] for end in self.ends.values()]

    def sent(self, to: str, kind: int) -> list[bytes]:
        return [datagram for where, datagram in self.wire.sent if where == to and datagram[1] == kind]

    def dropped(self, name: str) -> dict[str, int]:
        return {key: count for key, count in self.ends[name].counters.items() if key.startswith("dropped_") and count}


def other(name: str) -> str:
    return "fw2" if name == "fw1" else "fw1"


# --- handshake -------------------------------------------------------------------------------------------------------


def test_both_agree_on_one_session_at_once() -> None:
    two = Two().up()
    two.works()
    assert two.sessions() == [1, 1]
    assert [type(event) for event in two.events["fw1"][:2]] == [SessionUp, StatusReceived]
    assert two.dropped("fw1") == two.dropped("fw2") == {}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(("poll1", "poll2", "deliver", "lose", "double")), st.integers(0, 7)), max_size=40
    )
)
def test_handshake_completes_from_any_start(steps: list[tuple[str, int]]) -> None:
    """HELLOs sent, lost, doubled and delivered in any order: nothing that happened can prevent the session."""
    two = Two()
    air: list[tuple[str, bytes]] = []
    for step, choice in steps:
        if step.startswith("poll"):
            name = "fw" + step[4:]
            two.now += 0.21
            air.extend((other(name), datagram) for datagram in two.ends[name].poll(two.now))
        elif air:
            to, datagram = air[choice % len(air)] if step == "double" else air.pop(choice % len(air))
            if step != "lose":
                two.deliver(to, datagram)
    two.run(2.0)
    assert all(end.established for end in two.ends.values())
    two.works()


@pytest.mark.parametrize("lost", itertools.product((False, True), repeat=6))
def test_lost_hellos_only_cost_time(lost: tuple[bool, ...]) -> None:
    two = Two()
    fates = iter(lost)
    send = two.wire.send

    def lossy(to: str, datagram: bytes, now: float) -> None:
        if not (datagram[1] == wire.HELLO and next(fates, False)):
            send(to, datagram, now)

    two.wire.send = lossy  # type: ignore[method-assign]
    two.run(3.0)
    two.works()
    assert two.sessions() == [1, 1]


@pytest.mark.parametrize("restarted", [("fw1",), ("fw2",), ("fw1", "fw2")])
def test_restart_gives_a_fresh_session_and_nothing_of_the_old_one(restarted: tuple[str, ...]) -> None:
    two = Two().up()
    two.works()
    two.wire.cut = True
    two.ends["fw1"].send_block(b"of the old session", 1, two.now, two.now)
    for name in restarted:
        two.restart(name)
    for name in two.events:
        two.events[name].clear()
    two.wire.cut = False
    two.run_until(lambda: all(any(isinstance(e, SessionUp) for e in events) for events in two.events.values()))
    two.run(2.0)
    assert [sum(isinstance(e, SessionUp) for e in events) for events in two.events.values()] == [1, 1]
    assert two.blocks("fw2") == []
    assert two.ends["fw1"].lag() == (0, None)
    two.works()


def test_silence_is_noticed_and_healing_goes_on_with_the_same_session() -> None:
    two = Two().up()
    end = two.ends["fw1"]
    assert end.alive(two.now)
    two.wire.cut = True
    blocks = [b"while cut %d" % number for number in range(50)]
    for block in blocks:
        end.send_block(block, 3, two.now, two.now)
    assert end.lag() == (150, two.now)
    before = end.counters["datagrams_sent"]
    two.run(60.0)
    assert not end.alive(two.now)
    assert end.established
    assert end.counters["datagrams_sent"] - before < 60 * 5 + 60 * 5  # heartbeats and probes, not the window each time
    two.wire.cut = False
    two.run_until(lambda: end.lag() == (0, None), seconds=5.0)
    assert two.blocks("fw2") == blocks
    assert two.sessions() == [1, 1]
    assert end.alive(two.now)


# --- who is not believed ---------------------------------------------------------------------------------------------


def test_replayed_hellos_and_data_of_this_and_earlier_sessions_change_nothing() -> None:
    two = Two().up()
    two.works()
    for name in ("fw1", "fw2", "fw1"):  # three sessions of the past, one of which ended on one side only
        two.restart(name)
        two.up().works()
    old = list(two.wire.sent)
    sessions_before = two.sessions()
    blocks = {name: two.blocks(name) for name in two.ends}
    for to, datagram in old:
        assert not [event for event in two.deliver(to, datagram) if not isinstance(event, StatusReceived)]
    hellos = sum(datagram[1] == wire.HELLO for _to, datagram in old)
    assert hellos >= 16
    two.run(5.0)
    assert two.sessions() == sessions_before
    assert {name: two.blocks(name) for name in two.ends} == blocks
    for name in two.ends:
        assert two.dropped(name).keys() <= {"dropped_replayed", "dropped_unknown_session", "dropped_stale_hello"}
        assert two.dropped(name)["dropped_replayed"] > 0
    two.works()


def test_a_flood_of_replayed_hellos_does_not_keep_a_starting_node_silent() -> None:
    two = Two().up()
    two.restart("fw2")
    two.up()
    old = [datagram for datagram in two.sent("fw2", wire.HELLO)]
    two.restart("fw2")
    for _ in range(100):
        two.now += 0.05
        two.deliver("fw2", old[0])
        for datagram in two.ends["fw2"].poll(two.now):
            two.wire.send("fw1", datagram, two.now)
        for to, datagram in two.wire.arrived(two.now):
            two.deliver(to, datagram)
        for datagram in two.ends["fw1"].poll(two.now):
            two.wire.send("fw2", datagram, two.now)
    two.works()


def test_replay_window_takes_what_is_late_and_refuses_what_is_older() -> None:
    two = Two().up()
    two.run(1.0)
    sender, receiver = two.ends["fw1"], two.ends["fw2"]
    sender.set_status(wire.Status(wire.ROLE_ACTIVE, 0, 0))
    late = sender.poll(two.now)
    assert len(late) == 1
    for _ in range(sessions.REPLAY_WINDOW - 1):
        sender.say_bye()
    for datagram in sender.poll(two.now):
        assert receiver.receive(datagram, two.now) == [PeerLeft()]
    assert [type(event) for event in receiver.receive(late[0], two.now)] == [StatusReceived]
    assert receiver.receive(late[0], two.now) == []
    sender.set_status(wire.Status(wire.ROLE_BACKUP, 0, 0))
    too_late = sender.poll(two.now)
    for _ in range(sessions.REPLAY_WINDOW):
        sender.say_bye()
    for datagram in sender.poll(two.now):
        receiver.receive(datagram, two.now)
    assert receiver.receive(too_late[0], two.now) == []
    assert receiver.counters["dropped_replayed"] == 2


def test_reflected_datagrams_are_not_believed() -> None:
    two = Two().up()
    two.works()
    before = two.sessions()
    for to, datagram in list(two.wire.sent):
        assert two.deliver(other(to), datagram) == []
    two.run(2.0)
    assert two.sessions() == before
    for name in two.ends:
        assert two.dropped(name).keys() == {"dropped_auth_failed", "dropped_unknown_session"}


def test_every_altered_bit_is_noticed() -> None:
    two = Two().up()
    two.ends["fw1"].send_block(b"precious", 1, two.now, two.now)
    data = two.ends["fw1"].poll(two.now)[0]
    hello = two.sent("fw2", wire.HELLO)[0]
    for datagram in (data, hello):
        for bit in range(len(datagram) * 8):
            altered = bytearray(datagram)
            altered[bit // 8] ^= 1 << bit % 8
            assert two.deliver("fw2", bytes(altered)) == [], bit
    assert two.dropped("fw2").keys() == {
        "dropped_auth_failed",
        "dropped_malformed",
        "dropped_replayed",
        "dropped_unknown_key",
        "dropped_unknown_session",
        "dropped_wrong_version",
    }
    assert two.deliver("fw2", data)[0] == BlockReceived(b"precious")  # none of it used up the number of the real one


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=600), st.booleans())
def test_arbitrary_datagrams_bring_nothing(garbage: bytes, framed: bool) -> None:
    two = Two().up()
    if framed:  # past the first checks
        garbage = two.sent("fw2", wire.DATA)[0][: wire.DATA_HEADER_BYTES + wire.DIGEST_BYTES] + garbage
    before = sum(two.dropped("fw2").values())
    assert two.deliver("fw2", garbage) == []
    assert sum(two.dropped("fw2").values()) == before + 1


def test_wrong_key_unknown_key_and_wrong_name() -> None:
    for options, counter in (
        ({"secrets": {1: OTHER_SECRET}}, "dropped_auth_failed"),
        ({"secrets": {7: SECRET}, "send_key": 7}, "dropped_unknown_key"),
    ):
        two = Two()
        two.restart("fw2", **options)
        two.run(2.0)
        assert not any(end.established for end in two.ends.values())
        assert two.dropped("fw1").keys() == {counter}
    two = Two()
    stranger = Session(
        "fw3", "fw1", crypto=two.crypto, random=two.chance.randbytes, version="0", secrets={1: SECRET}, send_key=1
    )
    for datagram in stranger.poll(two.now):
        two.deliver("fw1", datagram)
    assert two.dropped("fw1") == {"dropped_auth_failed": 1}  # names are part of the key


def test_hello_that_names_another_node_than_its_key_is_dropped() -> None:
    two = Two()
    liar = two.ends["fw2"]
    liar.node = "fw9"  # keys are made already; the text changes
    for datagram in liar.poll(two.now):
        two.deliver("fw1", datagram)
    assert two.dropped("fw1") == {"dropped_wrong_node": 1}


def test_keys_rotate_without_a_gap() -> None:
    both = {1: SECRET, 2: OTHER_SECRET}
    two = Two().up()
    for name, options in (
        ("fw2", {"secrets": both, "send_key": 1}),  # learn the new key, node by node
        ("fw1", {"secrets": both, "send_key": 1}),
        ("fw2", {"secrets": both, "send_key": 2}),  # use it
        ("fw1", {"secrets": both, "send_key": 2}),
        ("fw2", {"secrets": {2: OTHER_SECRET}, "send_key": 2}),  # forget the old one
        ("fw1", {"secrets": {2: OTHER_SECRET}, "send_key": 2}),
    ):
        two.restart(name, **options)
        two.up().works()
        assert two.dropped(name).keys() <= {"dropped_unknown_session"}
    assert {datagram[2] for _to, datagram in two.wire.sent[-4:]} == {2}


def test_a_fault_in_a_datagram_does_not_take_back_what_came_before_it() -> None:
    """A newer peer's bug behind a block: the block was acknowledged, so it must be delivered."""
    two = Two().up()
    sender, receiver = two.ends["fw1"], two.ends["fw2"]
    established = sender._established
    assert established is not None
    bad_ack = wire.tlv(wire.FRAME_ACK, b"short")
    for tail in (bad_ack, b"\1"):
        number = established.next_block
        established.next_block += 1
        sender._send(established, wire.encode_block(number, b"good") + tail)
        (datagram,) = sender._out
        sender._out.clear()
        assert receiver.receive(datagram, two.now) == [BlockReceived(b"good")]
    assert receiver.counters["dropped_malformed"] == 2
    sender._send(established, wire.tlv(77, b"from the future") + wire.tlv(wire.FRAME_BYE))
    (datagram,) = sender._out
    assert receiver.receive(datagram, two.now) == [PeerLeft()]
    assert receiver.counters["skipped_unknown_frame"] == 1


# --- reliability -----------------------------------------------------------------------------------------------------


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_exactly_once_in_order_through_a_bad_wire(seed: int) -> None:
    """30 % loss, duplication, reordering and altered bits, both ways at once; the credit is never exceeded."""
    two = Two(seed)
    two.wire.loss, two.wire.duplication, two.wire.corruption, two.wire.jitter_s = 0.3, 0.2, 0.05, 0.08
    two.run_until(lambda: all(end.established for end in two.ends.values()))
    total = 1000
    want = {name: [b"%s %d" % (name.encode(), number) for number in range(total)] for name in two.ends}
    sent = dict.fromkeys(two.ends, 0)

    def done() -> bool:
        for name, end in two.ends.items():
            assert 0 <= end.credit() <= WINDOW_BLOCKS
            while sent[name] < total and end.credit():
                end.send_block(want[name][sent[name]], 1, two.now, two.now)
                sent[name] += 1
            assert sent[name] - len(two.blocks(other(name))) <= WINDOW_BLOCKS
        return all(end.lag() == (0, None) for end in two.ends.values()) and all(n == total for n in sent.values())

    two.run_until(done, seconds=600)
    for name in two.ends:
        assert two.blocks(other(name)) == want[name]
        assert "dropped_over_credit" not in two.ends[name].counters
        assert two.ends[name].counters["blocks_duplicate"] > 0
        assert two.ends[name].counters["dropped_replayed"] > 0
    assert two.sessions() == [1, 1]


def test_sender_without_credit_is_told_and_a_block_beyond_it_is_refused() -> None:
    two = Two().up()
    two.wire.cut = True
    sender, receiver = two.ends["fw1"], two.ends["fw2"]
    established = sender._established
    assert established is not None
    for window in (sessions.SEND_WINDOW_FIRST, WINDOW_BLOCKS, 2 * WINDOW_BLOCKS):  # that of congestion, then the peer's
        established.window = window
        while sender.credit():
            sender.send_block(b"x", 1, two.now, two.now)
        with pytest.raises(ValueError, match="credit"):
            sender.send_block(b"x", 1, two.now, two.now)
        assert established.next_block == min(window, WINDOW_BLOCKS)
    sender._out.clear()
    sender._send(established, wire.encode_block(WINDOW_BLOCKS, b"greedy"))
    assert receiver.receive(sender._out[0], two.now) == []
    assert two.dropped("fw2") == {"dropped_over_credit": 1}


def test_block_too_long_is_refused_and_the_longest_fits_into_the_datagram() -> None:
    two = Two().up()
    end = two.ends["fw1"]
    with pytest.raises(ValueError, match="too long"):
        end.send_block(bytes(end.block_bytes + 1), 1, two.now, two.now)
    end.send_block(bytes(end.block_bytes), 1, two.now, two.now)
    assert [len(datagram) for datagram in end.poll(two.now)] == [512]


def test_a_hole_is_filled_before_its_timeout() -> None:
    """Three later blocks acknowledged: the missing one is sent again at once (fast retransmission)."""
    two = Two().up()
    end = two.ends["fw1"]
    for number in range(6):
        end.send_block(b"%d" % number, 1, two.now, two.now)
    lost, *rest = end.poll(two.now)[:6]
    for datagram in rest:
        two.deliver("fw2", datagram)
    assert two.blocks("fw2") == []
    start = two.now
    two.run_until(lambda: len(two.blocks("fw2")) == 6)
    assert two.now - start < sessions.RETRANSMIT_MIN_S / 2
    assert end.counters["blocks_retransmitted"] == 1
    assert BlockReceived(b"0") not in two.deliver("fw2", lost)  # it was only late, after all
    assert two.ends["fw2"].counters["blocks_duplicate"] == 1


class Line:
    """The wire with a bandwidth (bytes per second) and a round trip of 1 ms; it loses at random."""

    def __init__(self, two: Two, loss: float, speed: float = 125e6) -> None:
        self.two = two
        self.loss = loss
        self.speed = speed
        self.free = dict.fromkeys(two.ends, two.now)
        two.wire.send = self.send  # type: ignore[method-assign]

    def send(self, to: str, datagram: bytes, now: float) -> None:
        self.free[to] = max(self.free[to], now) + len(datagram) / self.speed
        if self.two.chance.random() >= self.loss:
            self.two.wire.inject(to, datagram, self.free[to] + 0.0005)

    def bulk(self, blocks: int) -> float:
        """Send so many blocks of the longest kind as fast as the credit allows; seconds until all are acknowledged."""
        two, end = self.two, self.two.ends["fw1"]
        start, sent = two.now, 0
        two.events["fw2"].clear()
        while sent < blocks or end.lag()[0]:
            while sent < blocks and end.credit():
                end.send_block(sent.to_bytes(end.block_bytes, "big"), 1, two.now, two.now)
                sent += 1
            two.turn()
            assert two.now < start + 120
        assert [int.from_bytes(block, "big") for block in two.blocks("fw2")] == list(range(blocks))
        return two.now - start


def test_bulk_flows_at_the_speed_of_the_wire_with_few_acknowledgements() -> None:
    two = Two(payload=1400).up()
    line = Line(two, loss=0.0)
    before = two.ends["fw2"].counters["datagrams_sent"]
    took = line.bulk(4000)
    assert took < 1.1 * 4000 * 1400 / line.speed  # the credit never ran out
    assert "blocks_retransmitted" not in two.ends["fw1"].counters
    assert two.ends["fw2"].counters["datagrams_sent"] - before <= 4000 / sessions.ACK_BLOCKS + 5


@pytest.mark.parametrize(("loss", "seconds"), [(0.01, 0.1), (0.3, 1.0), (0.5, 20.0)])
def test_bulk_goes_on_through_loss(loss: float, seconds: float) -> None:
    two = Two(payload=1400).up()
    assert Line(two, loss).bulk(2000) < seconds
    retransmitted = two.ends["fw1"].counters["blocks_retransmitted"]
    assert 2000 * loss / 2 < retransmitted < 2000 * loss / (1 - loss) * 1.5 + 100  # what is lost, and little besides


class Narrow:
    """The wire with a bandwidth in datagrams per second, and a queue of so many; what does not fit is dropped."""

    def __init__(self, two: Two, rate: float, queue: int) -> None:
        self.two = two
        self.rate = rate
        self.queue_s = queue / rate
        self.free = dict.fromkeys(two.ends, two.now)
        self.sent = self.dropped = 0
        self.wait = 0.0  # in the queue now
        two.wire.send = self.send  # type: ignore[method-assign]

    def send(self, to: str, datagram: bytes, now: float) -> None:
        self.sent += to == "fw2"
        if self.free[to] - now > self.queue_s:
            self.dropped += to == "fw2"
            return
        self.free[to] = max(self.free[to], now) + 1 / self.rate
        self.wait = self.free["fw2"] - now
        self.two.wire.inject(to, datagram, self.free[to] + 0.0005)


@pytest.mark.parametrize(("rate", "queue"), [(40, 10**6), (40, 100), (40, 10), (1000, 100), (1000, 10)])
def test_a_narrow_line_is_used_well_and_not_flooded(rate: int, queue: int) -> None:
    two = Two(payload=1400).up()
    line = Narrow(two, rate, queue)
    blocks = 20 * rate
    took = Line.bulk(line, blocks)  # type: ignore[arg-type]
    assert took < 20 * 1.4  # heartbeats take their part of 40 datagrams
    assert two.ends["fw2"].counters["blocks_duplicate"] <= blocks / 100
    assert line.sent - line.dropped < 1.35 * blocks
    assert line.dropped < 5 * blocks
    if queue > 100:
        assert line.wait < 1.5  # changes do not wait longer than that, although the line would take them all
    assert two.sessions() == [1, 1]


def test_a_peer_that_stands_still_is_not_buried_in_retransmissions() -> None:
    """A backup that takes three seconds, again and again: its socket holds a window, and needs nothing twice."""
    two = Two(payload=1400).up()
    end, peer = two.ends["fw1"], two.ends["fw2"]
    receive, kept = peer.receive, []
    awake = True

    def slow(datagram: bytes, now: float) -> list[NamedTuple]:
        if awake:
            return receive(datagram, now)
        kept.append(datagram)
        return []

    peer.receive = slow  # type: ignore[method-assign]
    peer_poll = peer.poll
    peer.poll = lambda now: peer_poll(now) if awake else []  # type: ignore[method-assign]
    deadline = peer.next_deadline
    peer.next_deadline = lambda: deadline() if awake else float("inf")  # type: ignore[method-assign]
    sent = 0
    for _pause in range(10):
        awake = False
        resume = two.now + 3.0
        while two.now < resume:
            while end.credit():
                end.send_block(sent.to_bytes(4, "big"), 1, two.now, two.now)
                sent += 1
            two.turn(resume)
        awake = True
        for datagram in kept:
            two.deliver("fw2", datagram)
        kept.clear()
        two.run(0.3)
    two.run_until(lambda: end.lag() == (0, None))
    assert [int.from_bytes(block, "big") for block in two.blocks("fw2")] == list(range(sent))
    assert sent > 1000
    assert peer.counters["blocks_duplicate"] <= 10 * 12  # in each pause a handful, less often each time
    assert end.counters["timeouts"] > 0


def test_a_lost_last_block_is_made_good_before_its_timeout() -> None:
    two = Two().up()
    end = two.ends["fw1"]
    for _ in range(20):  # measure the round trip
        end.send_block(b"now and then", 1, two.now, two.now)
        two.run(0.02)
    two.run_until(lambda: end.lag() == (0, None))
    two.wire.cut = True
    end.send_block(b"the last one", 1, two.now, two.now)
    start = two.now
    two.run(0.001)
    two.wire.cut = False
    two.run_until(lambda: two.blocks("fw2")[-1] == b"the last one")
    assert two.now - start < sessions.RETRANSMIT_MIN_S
    assert "timeouts" not in end.counters
    assert end._established.window >= sessions.SEND_WINDOW_FIRST


def test_acknowledgements_wait_for_each_other() -> None:
    """A trickle of blocks: an acknowledgement at most every ``ACK_DELAY_S``, and no heartbeat where data goes."""
    two = Two().up()
    one, other_end = two.ends["fw1"], two.ends["fw2"]
    before = one.counters["datagrams_sent"], other_end.counters["datagrams_sent"]
    for _ in range(200):
        one.send_block(b"now and then", 1, two.now, two.now)
        two.run(0.01)
    assert one.counters["datagrams_sent"] - before[0] == 200
    assert other_end.counters["datagrams_sent"] - before[1] <= 2.2 / sessions.ACK_DELAY_S
    statuses = [event for event in two.events["fw2"] if isinstance(event, StatusReceived)]
    assert len(statuses) >= 10  # they rode along
    assert one.lag()[0] <= 10


def test_idle_nodes_beat_together() -> None:
    two = Two().up()
    two.run(0.07)
    start = len(two.wire.sent)
    begin = two.now
    two.run(10.0)
    sent = len(two.wire.sent) - start
    assert 90 <= sent <= 2 * 10 / 0.2 + 4
    assert two.now - begin < 10.1
    woken = {"fw1": 0, "fw2": 0}
    for _ in range(50):  # a node that was woken by the other's heartbeat has its own behind it
        moment = min(end.next_deadline() for end in two.ends.values())
        woken[min(two.ends, key=lambda name: two.ends[name].next_deadline())] += 1
        two.run_until(lambda moment=moment: two.now > moment + 0.01)
    assert sorted(woken.values()) == [0, 50] or min(woken.values()) <= 5


def test_lag_is_the_sum_and_the_oldest_of_what_is_in_flight() -> None:
    two = Two().up()
    end = two.ends["fw1"]
    for number in range(5):
        end.send_block(b"%d" % number, number + 1, two.now - 5 + number, two.now)
    assert end.lag() == (15, two.now - 5)
    first, *rest = (datagram for datagram in end.poll(two.now) if datagram[1] == wire.DATA)
    born = two.now - 5
    for datagram in rest:
        two.deliver("fw2", datagram)
    two.now += sessions.ACK_HOLE_S  # if one was sent just now
    for datagram in two.ends["fw2"].poll(two.now):
        two.deliver("fw1", datagram)
    assert end.lag() == (1, born)
    two.deliver("fw2", first)
    two.run_until(lambda: end.lag() == (0, None))


def test_an_acknowledgement_that_takes_back_another_is_refused() -> None:
    two = Two().up()
    end, liar = two.ends["fw1"], two.ends["fw2"]
    for number in range(4):
        end.send_block(b"%d" % number, 1, two.now, two.now)
    known = liar._established
    assert known is not None
    for ack in (wire.Ack(0, 512, 0b10), wire.Ack(2, 512, 0), wire.Ack(1, 512, 0)):
        liar._send(known, wire.encode_ack(ack))
        two.deliver("fw1", liar._out.pop())
    assert two.dropped("fw1") == {"dropped_malformed": 1}
    assert end.lag() == (2, two.now)  # blocks 1 and 3
    two.wire.cut = True
    two.run(5.0)  # silence: the oldest are sent again and again
    assert sorted(number for number in end._established.in_flight) == [1, 3]
    two.wire.cut = False
    two.run(5.0)  # the liar's true acknowledgement takes block 0 back
    assert end.counters["sessions_ended_peer_went_back"] == 1
    assert two.sessions() == [2, 2]
    two.works()


@pytest.mark.parametrize(
    "frame", [wire.encode_heard(wire.Heard(10**6, 0)), wire.encode_ack(wire.Ack(10**6, 10**6 + 512, 0))]
)
def test_a_node_that_hears_of_its_own_future_begins_anew(frame: bytes) -> None:
    two = Two().up()
    end, peer = two.ends["fw1"], two.ends["fw2"]
    for number in range(300):
        if end.credit():
            end.send_block(b"%d" % number, 1, two.now, two.now)
    hello = end._hello.nonce
    known = peer._established
    assert known is not None
    peer._send(known, frame + wire.encode_block(0, b"what follows makes no sense"))
    assert two.deliver("fw1", peer._out.pop()) == []
    assert not end.established
    assert end._hello.nonce != hello
    assert end.lag() == (0, None)
    assert [datagram[1] for datagram in end.poll(two.now)] == [wire.HELLO]  # at once, and nothing under the old keys
    two.run(1.0)
    assert two.sessions() == [2, 2]
    assert end.counters["sessions_ended_went_back"] == 1
    two.works()


def test_changed_status_is_told_at_once_and_repeated() -> None:
    two = Two().up()
    start = two.now
    new = wire.Status(wire.ROLE_ACTIVE, wire.STATUS_REPLICATES, 5)
    two.ends["fw1"].set_status(new)
    two.run_until(lambda: two.events["fw2"][-1] == StatusReceived(new))
    assert two.now - start < 0.01
    two.events["fw2"].clear()
    two.run(2.0)
    statuses = [event.status for event in two.events["fw2"] if isinstance(event, StatusReceived)]
    assert 9 <= len(statuses) <= 13
    assert set(statuses) == {new}
    two.ends["fw1"].say_bye()
    two.run(0.5)
    assert any(isinstance(event, PeerLeft) for event in two.events["fw2"])


# --- heartbeats at rest ----------------------------------------------------------------------------------------------


def story(seed: int, **options: Any) -> Two:
    """Blocks, statuses, rest, losses, doubled and late datagrams, other keys: always the same for a seed."""
    two = Two(seed, secrets={1: SECRET, 2: OTHER_SECRET}, **options).up()
    chance = random.Random(seed)
    for turn in range(60):
        end = two.ends[chance.choice(("fw1", "fw2"))]
        what = chance.randrange(8)
        if what == 0 and end.credit():
            end.send_block(b"records %d" % turn, 1, two.now, two.now)
        elif what == 1:
            end.set_status(wire.Status(chance.randrange(3), chance.randrange(4), chance.randrange(3)))
        elif what == 2:
            two.wire.loss = chance.choice((0.0, 0.0, 0.3))
        elif what == 3:
            two.wire.duplication = chance.choice((0.0, 0.3))
        elif what == 4 and chance.random() < 0.2:
            end.set_keys({1: SECRET, 2: OTHER_SECRET}, chance.choice((1, 2)), two.now)
        two.run(chance.choice((0.01, 0.3, 2.0)))
    two.wire.loss = two.wire.duplication = 0.0
    two.run(5.0)
    return two


@pytest.mark.parametrize("seed", range(8))
def test_a_heartbeat_that_says_the_same_is_taken_like_any_other(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """It is not taken apart: with and without that all goes the same way, to the byte."""
    same: list[int] = []
    receive_same = Session._receive_same

    def counted(self: Session, *given: Any) -> bool:
        same.append(1)
        return receive_same(self, *given)

    monkeypatch.setattr(Session, "_receive_same", counted)
    one = story(seed)
    assert len(same) > 100
    same.clear()
    monkeypatch.setattr(wire, "beat_number", lambda _frames, _rest: -1)
    monkeypatch.setattr(wire, "beat_rest", lambda _frames: b"")
    two = story(seed)
    assert not same
    assert one.wire.sent == two.wire.sent
    assert one.events == two.events
    assert [end.counters for end in one.ends.values()] == [end.counters for end in two.ends.values()]


def test_a_heartbeat_that_says_the_same_but_has_heard_too_much_ends_the_session() -> None:
    """This node is in a state of the past: it sent less than the peer has heard, and at rest nothing else shows it."""
    two = Two().up()
    two.run(3.0)
    established = two.ends["fw1"]._established
    assert established is not None and established.beat
    established.sealer.number -= 3
    two.run_until(lambda: two.ends["fw1"].counters["sessions_ended_went_back"])
    two.up().works()


def test_a_heartbeat_after_news_is_taken_apart() -> None:
    """What was acknowledged, or the status, is another one: then all of it counts."""
    two = Two().up()
    two.run(3.0)
    first, second = two.ends["fw1"], two.ends["fw2"]
    assert first._established is not None
    before = first._established.beat
    two.works()
    two.run(1.0)
    assert first._established.beat not in (b"", before)
    assert not first.in_flight and not second.in_flight
    two.events["fw1"].clear()
    second.set_status(wire.Status(wire.ROLE_ACTIVE, 0, 5))
    two.run(3.0)
    statuses = [event for event in two.events["fw1"] if isinstance(event, StatusReceived)]
    assert len(statuses) > 5
    assert set(statuses) == {StatusReceived(wire.Status(wire.ROLE_ACTIVE, 0, 5))}
