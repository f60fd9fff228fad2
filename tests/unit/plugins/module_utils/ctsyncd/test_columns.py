# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Columns against the general way: recorded messages, variants of them, damaged ones; requests byte for byte."""

from __future__ import annotations

import ctypes
import errno
import json
import random
import socket
import struct
from pathlib import Path
from typing import Any, Sequence

import pytest
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import columns, ctnetlink, netlink, rows
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import constants as k
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.columns import Gathering, Reader
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.errors import NetlinkError
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.flow import (
    ZONE_ORIGINAL,
    ZONE_REPLY,
    Flow,
    Tuple,
    merge,
)
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.rows import Changes
from hypothesis import given, settings
from hypothesis import strategies as st

CORPUS = Path(__file__).resolve().parents[4] / "corpus" / "ctnetlink.jsonl"
RECORDS = [bytes.fromhex(json.loads(line)["hex"]) for line in CORPUS.read_text(encoding="ascii").splitlines()[1:]]
DUMPED = [message for message in RECORDS if message[6] & ctnetlink.NLM_F_MULTI]
EVENTS = [message for message in RECORDS if not message[6] & ctnetlink.NLM_F_MULTI]
STRIDE = 1088


def put_events(reader: Reader, messages: Sequence[bytes], found: Gathering, stride: int = STRIDE) -> tuple[int, bool]:
    data = bytearray(b"\xa5" * (stride * len(messages)))
    for slot, message in enumerate(messages):
        data[slot * stride : slot * stride + len(message)] = message
    return reader.events(data, stride, [len(message) for message in messages], found)


def read_events(reader: Reader, messages: Sequence[bytes], stride: int = STRIDE) -> Changes:
    found = Gathering()
    return in_order(found.changes(*put_events(reader, messages, found, stride)).settled())


def in_order(changes: Changes) -> Changes:
    return changes._replace(gone=sorted(changes.gone))


def read_dump(reader: Reader, messages: Sequence[bytes]) -> Changes:
    data = b"".join(messages)
    found = Gathering()
    entries, interrupted, others = reader.dump(bytearray(data + bytes(columns.HEAD_BYTES)), len(data), found)
    assert others == []
    return in_order(found.changes(entries, interrupted))


def generally(messages: Sequence[bytes]) -> Changes:
    """What the messages say, one after the other, by the codec alone."""
    values: dict[bytes, bytes] = {}
    flows: dict[bytes, Flow] = {}
    gone = set()
    for message in messages:
        (one,) = ctnetlink.parse_messages(message)
        assert one.flow is not None
        flow = one.flow._replace(mark=one.flow.mark or 0)
        key, value, extras = rows.pack(flow)
        if one.kind == ctnetlink.Kind.DESTROY:
            values.pop(key, None)
            flows.pop(key, None)
            gone.add(key)
            continue
        row = not extras and not rows.is_partial(flow)
        if row and key not in flows:
            values[key] = value
            continue
        before = rows.unpack(key, values.pop(key)) if key in values else flows.get(key)
        newer = rows.unpack(key, value) if row else flow
        flows[key] = newer if before is None else merge(before, newer)
    tables: dict[int, dict[bytes, bytes]] = {}
    for key, value in values.items():
        tables.setdefault(len(key), {})[key] = value
    return Changes(tables, list(flows.values()), sorted(gone), len(messages))


def sorted_flows(changes: Changes) -> Changes:
    return changes._replace(flows=sorted(changes.flows, key=lambda flow: flow.key))


@pytest.mark.parametrize("size", [1, 5, 40, len(EVENTS)])
def test_recorded_events(size: int) -> None:
    reader = Reader()
    for _again in range(2):
        for at in range(0, len(EVENTS), size):
            part = EVENTS[at : at + size]
            got = read_events(reader, part)
            assert got == read_events(Reader(columns=False), part)
            assert sorted_flows(got) == sorted_flows(generally(part))
    assert reader.malformed == 0


def test_batches_that_are_all_alike() -> None:
    """What the batch before was is tried first; one message of the same length among them may be of another kind."""
    alike, some = 0, EVENTS[:: len(EVENTS) // 60]
    for message in some:
        reader = Reader()
        assert read_events(reader, [message] * 8) == read_events(Reader(columns=False), [message] * 8)
        others = [other for other in EVENTS if len(other) == len(message)]
        for other in others:
            fast = reader.fast
            for part in ([message] * 7 + [other], [other] + [message] * 7, [message] * 3 + [other]):
                assert read_events(reader, part) == read_events(Reader(columns=False), part)
            alike += reader.fast - fast == 20
    assert alike >= len(some)


@pytest.mark.parametrize("ended", [False, True])
def test_many_that_are_all_alike_are_compared_where_they_are(ended: bool) -> None:
    """Whatever byte of one of them differs: that is found, or it is part of what the message says."""
    alike = [event(ssh(number), ended) for number in range(70)]
    reader, general = Reader(), Reader(columns=False)
    read_events(reader, alike[:8])
    fast = reader.fast
    for part in (alike, alike[:66], alike):  # full batches, and one with the rest
        assert read_events(reader, part) == read_events(general, part)
    assert reader.fast - fast == 70 + 66 + 70
    for place in range(len(alike[0])):
        for slot in (0, 33, 69):
            part = list(alike)
            other = bytearray(part[slot])
            other[place] ^= 0x41
            part[slot] = bytes(other)
            reader.malformed = general.malformed = 0
            assert read_events(reader, part) == read_events(general, part)
            assert reader.malformed == general.malformed
            read_events(reader, alike)  # what was last is tried first


@pytest.mark.parametrize("size", [1, 40, len(DUMPED)])
def test_recorded_dumps(size: int) -> None:
    reader = Reader()
    for at in range(0, len(DUMPED), size):
        part = DUMPED[at : at + size]
        got = read_dump(reader, part)
        assert got == read_dump(Reader(columns=False), part)
        assert sorted_flows(got)[:3] == sorted_flows(generally(part))[:3]
    assert reader.fast > reader.general


def test_what_goes_by_columns_and_what_does_not() -> None:
    """Ordinary traffic never takes the general way: with NAT, marks, zones, timestamps and accounting or without."""
    ways: dict[bool, set[tuple[int, int]]] = {True: set(), False: set()}
    for message in RECORDS:
        (one,) = ctnetlink.parse_messages(message)
        flow = one.flow
        assert flow is not None
        reader = Reader()
        read_events(reader, [message])
        assert reader.fast + reader.general == 1
        extras = rows.pack_extras(flow)
        ended = one.kind == ctnetlink.Kind.DESTROY
        ways[bool(reader.fast)].add((flow.family, flow.proto))
        if not extras and (ended or not rows.is_partial(flow)) and flow.proto != k.IPPROTO_SCTP:
            assert reader.fast == 1, flow
        if extras and not ended:
            assert reader.general == 1, flow
    assert ways[True] == {(2, 1), (10, 58), *((family, proto) for family in (2, 10) for proto in (6, 17, 47, 50))}
    assert {(2, k.IPPROTO_SCTP), (10, k.IPPROTO_SCTP)} <= ways[False]


def event(flow: Flow, ended: bool = False) -> bytes:
    """An event as the codec would write it, with a timeout."""
    message = bytearray(ctnetlink.create(flow._replace(status=flow.status & ~0x30), liberal=False))
    message[4:8] = struct.pack("=HH", 0x102 if ended else 0x100, 0)
    return bytes(message)


def ssh(number: int, **changes: Any) -> Flow:
    orig = Tuple(struct.pack("!I", 0x0A000000 + number), b"\xc0\xa8\1\3", b"\x30\x39\0\x16")
    reply = Tuple(orig.dst, orig.src, b"\0\x16\x30\x39")
    flow = Flow(k.AF_INET, k.IPPROTO_TCP, 0, orig, reply, 0x0E, 600, 3, (7, 9), (3, 3), mark=0)
    return flow._replace(**changes)


@pytest.mark.parametrize(
    "sizes", [(70,), (256, 256, 3), (70, 1), (40, 70), (70, -70), (70, -3), (-70, 70), (70, 6, -6, 70)]
)
def test_sheets_say_what_rows_would(sizes: tuple[int, ...]) -> None:
    """Batches of one turn, of new and (negative) of ended flows, in which some flows come again."""
    reader, general = Reader(), Reader(columns=False)
    read_events(reader, [event(ssh(number)) for number in range(8)])
    found, expected = Gathering(), Gathering()
    for turn, size in enumerate(sizes):
        flows = [ssh((turn * 50 + number) % 300, mark=turn) for number in range(abs(size))]
        part = [event(flow, size < 0) for flow in flows]
        put_events(reader, part, found)
        put_events(general, part, expected)
    changes = found.changes(0)
    many = sizes[0] >= 64 and min(sizes) > 0
    assert bool(changes.sheets) == many
    if many:
        (sheet,) = changes.sheets
        assert (len(sheet), changes.rows) == (sum(sizes), {})
        assert sheet.keys == [rows.pack(ssh((turn * 50 + at) % 300))[0] for turn, size in enumerate(sizes)
                              for at in range(size)]  # fmt: skip
    assert in_order(changes.settled()) == in_order(expected.changes(0))
    assert changes.settled().settled() == changes.settled()


@pytest.mark.parametrize("count", [1, 50])
def test_the_order_of_changes_is_kept(count: int) -> None:
    """Each case with one flow, and with that among many others."""
    others = [event(ssh(number)) for number in range(100, 99 + count)]
    one = ssh(1)
    closed, labelled = one._replace(state=7), one._replace(labels=bytes(range(16)))
    marked = one._replace(mark=9)  # another length, so another group
    zoned, partial = one._replace(zone=5), one._replace(timeout=None)
    no_timeout = bytearray(event(partial))
    at = no_timeout.index(struct.pack("=HH", 8, ctnetlink.CTA_TIMEOUT))
    no_timeout[at + 2 : at + 4] = struct.pack("=H", 99)  # an attribute that nobody knows
    cases = [
        [event(one), event(closed)],
        [event(closed), event(one)],
        [event(one), event(marked), event(closed)],
        [event(marked), event(one)],
        [event(one), event(zoned)],
        [event(one), event(one, True)],
        [event(one, True), event(one)],
        [event(one), event(one, True), event(closed)],
        [event(labelled), event(closed)],
        [event(closed), event(labelled)],
        [event(labelled), event(one, True)],
        [event(labelled), event(one, True), event(closed)],
        [event(one), bytes(no_timeout)],
        [bytes(no_timeout), event(closed)],
    ]
    for number, case in enumerate(cases):
        messages = [*others[: count // 2], *case, *others[count // 2 :]]
        got = read_events(Reader(), messages)
        assert got == read_events(Reader(columns=False), messages), number
        assert sorted_flows(got) == sorted_flows(generally(messages)), number
    only = read_events(Reader(), cases[8])
    assert only.rows == {} and [(flow.labels, flow.state) for flow in only.flows] == [(bytes(range(16)), 7)]
    again = read_events(Reader(), cases[7])
    assert again.gone == [one.key] and rows.unpack(one.key, again.rows[13][one.key]).state == 7


def end_of(flow: Flow) -> bytes:
    """The event of a flow's end, which says less, as the kernel writes it when a timer ran out."""
    return event(flow._replace(state=None, tcp_wscale=None, tcp_flags=None), True)


def real_traffic(source: random.Random, count: int) -> list[bytes]:
    """States of connections that begin and close, with a mark or without, and ends of others."""
    messages = []
    for number in source.sample(range(1000), count):
        state = source.choice((3, 4, 7))
        mark = 9 if number % 4 == 0 else None  # with it an event is longer
        messages += [event(ssh(number, state=state, mark=mark))] * source.choice((1, 1, 2))
        if source.random() < 0.1:
            messages.append(end_of(ssh(2000 + number, mark=None)))
    return messages


@pytest.mark.parametrize("count", [1, 4, 8, 40, 200])
def test_real_traffic_needs_no_sorting_by_what_is_in_it(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages of several lengths, once each of them was seen; what begins a batch may be one of the few."""
    source = random.Random(count)
    reader, general = Reader(), Reader(columns=False)
    read_events(reader, real_traffic(source, 300))
    monkeypatch.setattr(reader, "_read", None)
    for number in range(20):
        messages = real_traffic(source, count)
        if number % 2:
            messages.insert(0, end_of(ssh(3000, mark=None)))
        fast = reader.fast
        got = read_events(reader, messages)
        assert got == read_events(general, messages)
        assert sorted_flows(got) == sorted_flows(generally(messages))
        assert reader.fast - fast == len(messages)


@pytest.mark.parametrize("count", [8, 200])
def test_what_is_unusual_among_real_traffic(count: int) -> None:
    """Where one message is not as those of its length were, or the order counts, nothing is taken from the batch."""
    source = random.Random(count)
    one = ssh(1500, mark=None)
    no_timeout = bytearray(event(one))
    at = no_timeout.index(struct.pack("=HH", 8, ctnetlink.CTA_TIMEOUT))
    no_timeout[at + 2 : at + 4] = struct.pack("=H", 99)
    foreign_end = bytearray(end_of(one))
    at = foreign_end.index(struct.pack("=HH", 8, ctnetlink.CTA_TIMEOUT))
    foreign_end[at + 2 : at + 4] = struct.pack("=H", 99)
    marked, zoned = one._replace(mark=9), one._replace(zone=7, zone_dir=ZONE_ORIGINAL, mark=None)
    cases = [
        [bytes(no_timeout)],
        [bytes(foreign_end)],
        [event(zoned)],  # as long as those with a mark
        [event(one), end_of(one)],
        [end_of(one), event(one)],
        [event(one), event(marked)],
        [event(marked), event(one)],
        [event(marked), end_of(one), event(one)],
        [event(marked), end_of(one)],
        [end_of(one), event(marked)],
        [event(one._replace(timeout=0xFFFFFFFF))],
        [event(one, True)],  # as long as those that tell a state
        [end_of(one), event(marked._replace(timeout=0xFFFFFFFF))],
        [event(one._replace(labels=bytes(range(16))))],
        [b""],
        [event(one)[:100]],
        [event(one) + event(marked)],
        [struct.pack("=IHHII", 16, ctnetlink.NLMSG_OVERRUN, 0, 0, 0)],
    ]
    for number, case in enumerate(cases):
        reader, general = Reader(), Reader(columns=False)
        for one_reader in (reader, general):
            read_events(one_reader, real_traffic(random.Random(1), 300))
        for _again in range(2):
            begun, closed = event(ssh(1600, mark=None)), event(ssh(1600, mark=None, state=7))
            messages = [
                begun,
                closed,
                *real_traffic(source, count),
                *(end_of(ssh(number, mark=None)) for number in (1601, 1602)),
            ]
            assert read_events(reader, messages) == read_events(general, messages)
            for message in case:
                messages.insert(source.randrange(len(messages)) if len(case) == 1 else len(messages) - 3, message)
            assert read_events(reader, messages) == read_events(general, messages), number
            assert reader.malformed == general.malformed


def test_equal_lengths_are_not_equal_layouts() -> None:
    """TCP with a mark and TCP in a zone of the original direction have the same length; so have TCP and ICMP ends."""
    marked = [message for message in EVENTS if len(message) == 216]
    zoned = event(ssh(1, zone=7, zone_dir=ZONE_ORIGINAL, mark=None))
    plain = event(ssh(2, mark=5))
    assert len(zoned) == len(plain)
    for messages in ([zoned, plain] * 20, [plain] * 20 + [zoned], marked):
        assert read_events(Reader(), messages) == read_events(Reader(columns=False), messages)
    got = read_events(Reader(), [zoned, plain] * 20)
    assert {length: list(table) for length, table in got.rows.items()} == {
        16: [ssh(1, zone=7, zone_dir=ZONE_ORIGINAL).key],
        13: [ssh(2).key],
    }


def test_values_that_a_column_cannot_carry() -> None:
    forever = [event(ssh(number, timeout=0xFFFFFFFF)) for number in range(20)]
    no_zone = [event(ssh(number, zone=7)) for number in range(20)]
    at = no_zone[3].index(struct.pack("=HH", 6, ctnetlink.CTA_ZONE)) + 4
    no_zone[3] = no_zone[3][:at] + bytes(2) + no_zone[3][at + 2 :]
    for messages in (forever, no_zone):
        for part in (messages, messages[2:5]):
            assert read_events(Reader(), part) == read_events(Reader(columns=False), part)


def test_datagrams_that_are_not_one_whole_message() -> None:
    one, two = event(ssh(1)), event(ssh(2))
    overrun = struct.pack("=IHHII", 16, ctnetlink.NLMSG_OVERRUN, 0, 0, 0)
    reader = Reader()
    got = read_events(reader, [one + two, b"", one[:100], overrun, two])
    assert (got.events, got.lost, reader.malformed) == (3, True, 1)
    assert set(got.rows[13]) == {ssh(1).key, ssh(2).key}
    # what fills its place and says that it is longer was cut off
    long = struct.pack("=I", 500) + one[4:]
    assert not read_events(Reader(), [long]).lost
    assert read_events(Reader(), [long], len(long)).lost
    with pytest.raises(NetlinkError):
        read_dump(Reader(), [DUMPED[0], DUMPED[1][:-4]])


@st.composite
def damaged(draw: st.DrawFn) -> list[bytes]:
    """Recorded messages, some with a byte or two changed, some cut."""
    source = random.Random(draw(st.integers(0, 1 << 32)))
    pool = source.sample(RECORDS, source.choice((1, 3, len(RECORDS))))
    messages = []
    for _ in range(source.choice((1, 4, 30, 120))):
        message = bytearray(source.choice(pool))
        for _change in range(source.choice((0, 0, 0, 1, 2))):
            message[source.randrange(len(message))] = source.choice((0, 1, 255, source.randrange(256)))
        messages.append(bytes(message[: source.randrange(len(message))] if source.random() < 0.01 else message))
    return messages


@settings(max_examples=150, deadline=None)
@given(messages=damaged(), ended=st.booleans())
def test_damaged_messages_say_the_same_on_both_ways(messages: list[bytes], ended: bool) -> None:
    fast, general = Reader(), Reader(columns=False)
    for reader in (fast, general):
        for part in (RECORDS[::3], EVENTS) if ended else ():  # what was learned before matters not
            read_events(reader, part)
        reader.malformed = 0
    assert read_events(fast, messages) == read_events(general, messages)
    assert fast.malformed == general.malformed

    def dumped(reader: Reader) -> Any:
        reader.malformed = 0
        data = b"".join(messages)
        found = Gathering()
        try:
            result = reader.dump(bytearray(data + bytes(columns.HEAD_BYTES)), len(data), found)
        except NetlinkError:
            return "malformed"
        return result, in_order(found.changes(0)), reader.malformed

    assert dumped(fast) == dumped(general)


def test_what_is_learned_is_bounded() -> None:
    reader = Reader()
    for size in range(0, 4000, 4):
        message = bytearray(event(ssh(1)) + ctnetlink.attribute(99, bytes(size)))
        message[:4] = struct.pack("=I", len(message))
        read_events(reader, [bytes(message)], 8192)
    assert reader.fast == 1000
    for kind in range(100, 140):
        message = bytearray(event(ssh(1)) + ctnetlink.attribute(kind, b""))
        message[:4] = struct.pack("=I", len(message))
        read_events(reader, [bytes(message)])
    assert len(reader._layouts) <= columns._HEADS
    assert max(map(len, reader._layouts.values())) <= columns._LAYOUTS_PER_HEAD


# --- requests ---


def a_row(source: random.Random, key_len: int) -> tuple[bytes, bytes]:
    shape = rows.SHAPES[key_len]
    key = bytes((source.choice((1, 6, 6, 6, 17, 17, 33, 47, 50, 58, 132, 136)),))
    key += bytes(source.randrange(256) for _ in range(key_len - 1 - shape.zone))
    if shape.zone:
        key += struct.pack("!H", source.choice((0, 1, 7, 300)))
    if shape.zone == 3:
        key += bytes((source.choice((ZONE_ORIGINAL, ZONE_REPLY)),))
    tail = rows.TAIL.pack(
        source.randrange(1 << 16),
        source.choice((600, rows.NO_TIMEOUT)),
        source.choice((0, 3, 3, 7)),
        source.choice((rows.NO_SCALE, 0x77, 0xEE, 0)),
        source.choice((0, 0x11, 0x33, 0xFF, 0x12)),
        source.choice((0, source.randrange(1 << 32))),
    )
    return key, bytes(source.randrange(256) for _ in range(shape.reply)) + tail


def messages_of(batch: columns.Batch, first: int) -> list[bytes]:
    """The messages in the order of the rows, unnumbered; their numbers must count up."""
    found: dict[int, bytes] = {}
    place = 0
    for piece, length in batch.pieces:
        for at in range(0, len(piece), length):
            message = bytes(piece[at : at + length])
            assert struct.unpack_from("=II", message)[0] == length
            assert struct.unpack_from("=I", message, 8)[0] == (first + place) & 0xFFFFFFFF
            found[batch.order[place]] = message[:8] + bytes(4) + message[12:]
            place += 1
    return [found[index] for index in range(place)]


@pytest.mark.parametrize("key_len", rows.SHAPES)
@pytest.mark.parametrize("count", [1, 5, 300])
def test_requests_are_those_of_the_codec(key_len: int, count: int) -> None:
    source = random.Random(key_len * 1000 + count)
    for first in (1, 0xFFFFFFFF - 2) * (1 + 100 // count):  # a template is made of a row and used for others
        keys, values = zip(*(a_row(source, key_len) for _ in range(count)))
        timeouts = [source.randrange(1 << 32) for _ in keys]
        flows = [rows.unpack(*row) for row in zip(keys, values)]
        bare = [ctnetlink.flow_of_key(key) for key in keys]
        assert messages_of(columns.create(key_len, keys, values, timeouts, first), first) == [
            ctnetlink.create(flow, timeout=seconds) for flow, seconds in zip(flows, timeouts)
        ]
        assert messages_of(columns.update(key_len, keys, values, timeouts, first), first) == [
            ctnetlink.update(flow, timeout=seconds) for flow, seconds in zip(flows, timeouts)
        ]
        assert messages_of(columns.timers(key_len, keys, timeouts, first), first) == [
            ctnetlink.update(flow, timeout=seconds, status=False) for flow, seconds in zip(bare, timeouts)
        ]
        assert messages_of(columns.loosen(key_len, keys, first), first) == [ctnetlink.loosen(flow) for flow in bare]
        assert messages_of(columns.delete(key_len, keys, first), first) == [ctnetlink.delete(flow) for flow in bare]


def test_rows_of_another_shape_are_refused() -> None:
    key, value, _extras = rows.pack(ssh(1))
    assert columns.delete(13, [], 1) == columns.Batch([], [])
    for call in (
        lambda: columns.delete(14, [key], 1),
        lambda: columns.delete(13, [key, key + b"0"], 1),
        lambda: columns.delete(13, [key[:-1]], 1),
        lambda: columns.create(13, [key], [value[:-1]], [1], 1),
        lambda: columns.update(13, [key, key], [value], [1, 1], 1),
    ):
        with pytest.raises(NetlinkError):
            call()


# --- the edge, without a kernel ---


def refused(*_arguments: object) -> int:
    """A system call that a filter refuses."""
    ctypes.set_errno(errno.ENOSYS)
    return -1


@pytest.mark.parametrize("recvmmsg", ["there", "missing", "refused"])
def test_a_receiver_gives_what_is_there(monkeypatch: pytest.MonkeyPatch, recvmmsg: str) -> None:
    """A netlink socket that writes to itself."""
    if recvmmsg != "there":
        monkeypatch.setattr(netlink, "_recvmmsg", refused if recvmmsg == "refused" else None)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 2) as sock:  # NETLINK_USERSOCK
        sock.bind((0, 0))
        receiver = netlink.Receiver(sock, 4, 64)
        assert receiver.receive(4) == []
        for number in range(3):
            sock.sendto(bytes((number,)) * 40, sock.getsockname())
        assert receiver.receive(2) == [40, 40]
        assert bytes(receiver.data[:40]) == bytes(40) and bytes(receiver.data[64:104]) == b"\1" * 40
        assert receiver.receive(4) == [40]
        assert receiver.receive(4) == []


def test_a_single_datagram_is_read_without_recvmmsg() -> None:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 2) as sock:
        sock.bind((0, 0))
        receiver, calls = netlink.Receiver(sock, 4, 64), []
        receiver._call = lambda *arguments: calls.append(arguments) or 0
        for number in (1, 2):
            sock.sendto(bytes((number,)) * 40, sock.getsockname())
        for number in (1, 2):
            assert receiver.receive(1) == [40]
            assert bytes(receiver.data[:40]) == bytes((number,)) * 40
        assert receiver.receive(1) == [] and not calls
        receiver.receive(2)
        assert len(calls) == 1


@pytest.mark.parametrize("count", [2, 8, 9, 40])
@pytest.mark.parametrize("place", [0, 1, -1])
def test_a_receiver_tells_each_length(count: int, place: int) -> None:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 2) as sock:
        receiver = netlink.Receiver(sock, 40, 64)
        place = min(place, count - 1)
        for other in (60, 48, 0):

            def filled(_fd: int, _headers: int, limit: int, _flags: int, _timeout: None, *, said: int = other) -> int:
                for slot in range(limit):
                    receiver._lengths[slot] = 60
                receiver._lengths[limit + place if place < 0 else place] = said
                return limit

            receiver._call = filled
            expected = [60] * count
            expected[place] = other
            assert receiver.receive(count) == expected


def test_an_error_behind_datagrams_is_told_after_them(monkeypatch: pytest.MonkeyPatch) -> None:
    class Source:
        answers: list[Any] = [16, OSError(105, "no buffer space"), 20]

        def recv_into(self, *_arguments: object) -> Any:
            if not self.answers:
                raise BlockingIOError
            answer = self.answers.pop(0)
            if isinstance(answer, OSError):
                raise answer
            return answer

    monkeypatch.setattr(netlink, "_recvmmsg", None)
    receiver = netlink.Receiver(Source(), 8, 64)  # type: ignore[arg-type]
    assert receiver.receive(8) == [16]
    with pytest.raises(OSError, match="no buffer space"):
        receiver.receive(8)
    assert receiver.receive(8) == [20]
