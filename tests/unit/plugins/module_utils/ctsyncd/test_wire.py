# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The sync protocol's bytes: round trips of every shape, what may be sent, arbitrary input."""

from __future__ import annotations

import random
import struct
from typing import Callable

import pytest
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import constants as k
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import ctnetlink, render, rows, wire
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.errors import NetlinkError, WireError
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.flow import SeqAdj
from hypothesis import example, given
from hypothesis import strategies as st
from unit.simulation import tcp, udp

U32 = st.integers(0, 2**32 - 1)
SHAPES = sorted(rows.SHAPES)
KEY = tcp(1).key
FLOW = tcp(
    51356,
    40000,
    mark=7,
    tcp_flags=(3, 3),
    labels=bytes(range(16)),
    helper="ftp",
    sctp_vtags=(1, 0xFFFFFFFF),
    master=tcp(21).orig,
    master_proto=k.IPPROTO_TCP,
    seqadj=(SeqAdj(1, -2, 3), SeqAdj(0xFFFFFFFF, 0, -(2**31))),
)


def binary(size: int) -> st.SearchStrategy[bytes]:
    return st.binary(min_size=size, max_size=size)


# --- columns ---------------------------------------------------------------------------------------------------------


def with_zones(key_len: int, joined: bytes, width: int) -> bytes:
    """The rows, with zones that may be in them."""
    zone = rows.SHAPES[key_len].zone
    out = bytearray(joined)
    for row in range(0, len(out), width):
        at = row + key_len - zone
        if zone and out[at : at + 2] == b"\0\0":
            out[at + 1] = 1
        if zone == 3:
            out[at + 2] = 1 + out[at + 2] % 2
    return bytes(out)


@st.composite
def columns(draw: st.DrawFn, of_keys: bool = False) -> tuple[int, bytes]:
    """Rows that are alike in some columns, a little different in others, mirrored, translated, or at random."""
    key_len = draw(st.sampled_from(SHAPES))
    shape = rows.SHAPES[key_len]
    width = key_len if of_keys else shape.row
    count = draw(st.sampled_from((1, 2, 3, 7, 23, 24, 25, 40, 129)))
    chance = random.Random(draw(U32))  # a draw for each column would take seconds
    out = bytearray(width * count)
    for at in range(width):
        values = chance.randbytes(chance.choice((0, 1, 1, 1, 2, 15, 16, 17, 256)))
        out[at::width] = bytes(chance.choice(values) for _row in range(count)) if values else bytes(count)
    if not of_keys:
        half = shape.l4 // 2
        original = range(1, 1 + shape.reply)
        mirror = [
            *original[shape.address : 2 * shape.address],
            *original[: shape.address],
            *original[2 * shape.address + half :],
            *original[2 * shape.address : 2 * shape.address + half],
        ]
        for to, source in enumerate(mirror, key_len):
            how = chance.randrange(4)
            if how:  # as it is, mirrored, mirrored and shifted by a constant
                out[to::width] = bytes(value ^ (0, 0, 0, 5)[how] for value in out[source::width])
    return key_len, with_zones(key_len, bytes(out), width)


@given(columns())
def test_rows_round_trip(case: tuple[int, bytes]) -> None:
    key_len, joined = case
    payload = wire.encode_rows(key_len, joined)
    assert wire.decode_rows(payload) == (key_len, joined)
    shape = rows.SHAPES[key_len]
    assert len(payload) <= 3 + 5 + 2 * 12 + len(joined)
    pairs = [
        (joined[at : at + key_len], joined[at + key_len : at + shape.row]) for at in range(0, len(joined), shape.row)
    ]
    assert list(wire.iter_rows(key_len, joined)) == pairs


@given(columns())
def test_one_row_may_come_in_any_mode(case: tuple[int, bytes]) -> None:
    """Its sender makes all columns SAME; those of many rows may be mirrored and ZERO; FULL says the same as SAME."""
    key_len, joined = case
    width = rows.SHAPES[key_len].row
    joined = joined[:width]
    size = -(-width // 8)
    high = 3 + -(-rows.SHAPES[key_len].reply // 8)
    low = high + size
    plain, short = wire.encode_rows(key_len, joined), wire.RowColumns(key_len, rows.cut(joined, width)).encode(0, 1)
    assert plain[low + size :] == joined
    assert len(short) <= len(plain)
    for payload in (plain, short):
        assert payload[high:low] == bytes(size)
        full = payload[:high] + payload[low : low + size] + payload[low:]  # SAME where it was SAME, but as FULL
        assert wire.decode_rows(full) == wire.decode_rows(payload) == (key_len, joined)
        shorter = [payload[:end] for end in range(len(payload))]
        for broken in (*shorter, payload + b"\0", full[:-1], full + b"\0"):
            with pytest.raises(WireError):
                wire.decode_rows(broken)


def test_a_single_row_has_no_column_behind_the_last_one() -> None:
    for key_len in SHAPES:
        width = rows.SHAPES[key_len].row
        payload = bytearray(wire.encode_rows(key_len, with_zones(key_len, bytes(width), width)))
        if width % 8:
            payload[-width - 1] |= 1  # the last bit of the second mode mask
            with pytest.raises(WireError, match="mask of more columns"):
                wire.decode_rows(bytes(payload))


@given(columns(), st.data())
def test_parts_of_rows_are_these_rows(case: tuple[int, bytes], data: st.DataObject) -> None:
    key_len, joined = case
    width = rows.SHAPES[key_len].row
    many = wire.RowColumns(key_len, rows.cut(joined, width))
    for dummy in range(3):
        end = data.draw(st.integers(1, len(joined) // width))
        start = data.draw(st.integers(0, end - 1))
        assert wire.decode_rows(many.encode(start, end)) == (key_len, joined[start * width : end * width])


@given(columns(of_keys=True))
def test_gone_round_trip(case: tuple[int, bytes]) -> None:
    key_len, joined = case
    payload = wire.encode_gone(key_len, joined)
    assert wire.decode_gone(payload) == case
    assert b"".join(wire.split_keys(key_len, joined)) == joined
    assert {len(key) for key in wire.split_keys(key_len, joined)} == {key_len}


def public(count: int, snat: bytes = b"", seed: int = 1) -> bytes:
    """TCP connections between random addresses, their source translated to one address or not at all."""
    state, out = seed, []
    for _row in range(count):
        state = state * 6364136223846793005 + 1442695040888963407 & (1 << 64) - 1
        noise = (state >> 16).to_bytes(6, "big")
        state = state * 6364136223846793005 + 1442695040888963407 & (1 << 64) - 1
        source, destination = noise[:4], (state >> 20).to_bytes(6, "big")[:4]
        ports = struct.pack("!HH", 32768 + (state >> 33) % 28232, (443, 80, 53, 22)[state >> 62])
        value = destination + (snat or source) + ports[2:] + ports[:2]
        out.append(b"\6" + source + destination + ports + value + rows.TAIL.pack(0x19E, 432000, 3, 0x77, 0x22, 0))
    return b"".join(out)


@pytest.mark.parametrize("snat", [b"", bytes((192, 168, 1, 100))])
def test_bytes_of_a_row(snat: bytes) -> None:
    """What must not get worse: 10 bytes for two addresses and a port, all random, and 1 for a port of a few."""
    assert len(wire.encode_rows(13, public(110, snat))) <= 11.5 * 110
    assert len(wire.encode_rows(13, public(3, snat))) <= 80
    assert len(wire.encode_rows(13, public(1, snat))) == 53  # as it is: the masks and 38 bytes
    keys = b"".join(key for key, _value in wire.iter_rows(13, public(110)))
    assert len(wire.encode_gone(13, keys)) <= 11.5 * 110


@pytest.mark.parametrize("snat", [b"", bytes((192, 168, 1, 100))])
def test_parts_of_many_rows_are_no_longer_than_each_by_itself(snat: bytes) -> None:
    joined = public(1100, snat)
    many, part = wire.RowColumns(13, rows.cut(joined, 38)), 100 * 38
    together = [many.encode(start, start + 100) for start in range(0, 1100, 100)]
    alone = [wire.encode_rows(13, joined[at : at + part]) for at in range(0, len(joined), part)]
    assert sum(map(len, together)) <= 1.001 * sum(map(len, alone))


@pytest.mark.parametrize("kinds", [1, 3, 12, 16])
def test_what_is_few_in_some_parts_only_is_found_there(kinds: int) -> None:
    """Ten clients in turn, each with some hundred connections from a few of its addresses."""
    chance, joined = random.Random(kinds), bytearray(public(1000))
    for at in range(0, len(joined), 38):
        byte = at // 38 // 100 * 16 + chance.randrange(kinds)
        joined[at + 4] = joined[at + 20] = byte
    many, part = wire.RowColumns(13, rows.cut(bytes(joined), 38)), 100 * 38
    together = [many.encode(start, start + 100) for start in range(0, 1000, 100)]
    alone = [wire.encode_rows(13, bytes(joined[at : at + part])) for at in range(0, len(joined), part)]
    assert sum(map(len, together)) <= 1.001 * sum(map(len, alone))


def flood(count: int) -> bytes:
    """Rows as a flood brings them: most servers' ports are one of a few, a fifth are random; a timer ticks at times."""
    chance, out = random.Random(1), []
    for _row in range(count):
        source, target, port = chance.randbytes(4), chance.randbytes(4), chance.randbytes(2)
        service = chance.choices((443, 80, 22, chance.randrange(1024, 65536)), (60, 15, 5, 20))[0].to_bytes(2, "big")
        value = target + source + service + port
        tail = rows.TAIL.pack(0x0E, 432000 - (chance.random() < 0.002), 3, 0x77, 0x22, 0)
        out.append(b"\6" + source + target + port + service + value + tail)
    return b"".join(out)


def test_parts_of_a_flood_are_made_without_looking_at_each_column(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    real = wire._encode_several
    monkeypatch.setattr(wire, "_encode_several", lambda *about: looks.append(1) or real(*about))
    joined = flood(2000)
    many, part = wire.RowColumns(13, rows.cut(joined, 38)), 100 * 38
    together = [many.encode(start, start + 100) for start in range(0, 2000, 100)]
    assert looks == []
    alone = [wire.encode_rows(13, joined[at : at + part]) for at in range(0, len(joined), part)]
    assert len(looks) == len(alone) == 20  # the same by itself: a look at each
    assert [wire.decode_rows(one) for one in together] == [wire.decode_rows(one) for one in alone]
    assert sum(map(len, together)) <= 1.005 * sum(map(len, alone))
    assert len({one[: one.index(b"\6")] for one in together}) == 2  # the masks: in some of them the timer ticks


def with_mode(column: int, mode: tuple[int, int], width: int) -> bytes:
    """The two masks of columns of which one alone is not zero."""
    size = -(-width // 8)
    return b"".join((bit << size * 8 - 1 - column).to_bytes(size, "big") for bit in mode)


def test_layout_of_a_record_byte_by_byte() -> None:
    """As docs/protocol.md has it."""
    keys = [b"\6\x0a\0\0" + bytes((number,)) + bytes(8) for number in range(3)]
    head = struct.pack("!BH", 13, 3)
    #       columns 0, 1: SAME; 4: FULL; the others ZERO
    masks = bytes((0b00001000, 0)) + bytes((0b11001000, 0))
    assert wire.encode_gone(13, b"".join(keys)) == head + masks + b"\6\x0a" + b"\0\1\2"
    few = struct.pack("!BH", 13, 5) + with_mode(4, (1, 0), 13) + b"\1" + b"\x77\x99" + bytes((0x01, 0x10, 0x00))
    column = b"\x77\x99\x99\x77\x77"
    assert wire.decode_gone(few) == (13, b"".join(bytes(4) + bytes((value,)) + bytes(8) for value in column))
    # a reply tuple that mirrors the original one says nothing; ports are swapped, too
    key, value, _extras = rows.pack(tcp(51356)._replace(reply=tcp(51356).orig))
    reply = key[5:9] + key[1:5] + key[11:13] + key[9:11]
    row = key + reply + value[12:]
    payload = wire.RowColumns(13, rows.cut(row, 38)).encode(0, 1)
    assert payload[3:5] == bytes((0xFF, 0xF0))
    assert payload[5:10] == bytes(5)  # no column varies
    assert payload[15:] == bytes(byte for byte in key + value[12:] if byte)
    # a single row is sent as it is
    assert wire.encode_rows(13, row) == struct.pack("!BH", 13, 1) + bytes(2 + 5) + b"\xff\xff\xff\xff\xfc" + row


@pytest.mark.parametrize("decode", [wire.decode_rows, wire.decode_gone])
@pytest.mark.parametrize("key_len", SHAPES)
def test_every_length_but_the_right_one_is_refused(decode: Callable[[bytes], object], key_len: int) -> None:
    shape = rows.SHAPES[key_len]
    width = shape.row if decode is wire.decode_rows else key_len
    joined = with_zones(key_len, bytes(number * 7 % 251 for number in range(width * 30)), width)
    few = bytearray(joined)
    few[0::width] = bytes((6, 17, 1) * 10)
    encode = wire.encode_rows if decode is wire.decode_rows else wire.encode_gone
    payload = encode(key_len, bytes(few))
    decode(payload)
    for size in range(len(payload)):
        with pytest.raises(WireError, match="malformed"):
            decode(payload[:size])
    with pytest.raises(WireError, match="more than said"):
        decode(payload + b"\0")


@pytest.mark.parametrize(
    ("payload", "what"),
    [
        (struct.pack("!BH", 10, 1) + bytes(50), "keys of 10"),
        (struct.pack("!BH", 13, 0) + bytes(4), "0 keys"),
        (struct.pack("!BH", 13, wire.MAX_ROWS + 1) + bytes(4), "1025 keys"),
        (struct.pack("!BH", 13, 1) + b"\0\1\0\0", "mask of more columns"),
        (struct.pack("!BH", 13, 1) + b"\0\0\0\4", "mask of more columns"),
        (struct.pack("!BH", 13, 4) + with_mode(2, (1, 0), 13) + b"\x10" + bytes(19), "few"),  # 17 different bytes
        (struct.pack("!BH", 13, 4) + with_mode(2, (1, 0), 13) + b"\1\7\x08" + b"\x01\x20", "index of nothing"),
        (struct.pack("!BH", 13, 3) + with_mode(2, (1, 0), 13) + b"\0\7" + b"\x00\x01", "index of nothing"),
        (struct.pack("!BH", 15, 1) + bytes(4), "zone 0"),
        (struct.pack("!BH", 16, 1) + with_mode(14, (0, 1), 16) + b"\1", "direction"),
        (struct.pack("!BH", 16, 2) + b"\0\1" + b"\0\3" + b"\5" + b"\1\3", "direction"),
        (struct.pack("!BH", 16, 1) + b"\0\0" + b"\0\1" + b"\1", "zone 0"),
    ],
)
def test_columns_that_make_no_sense_are_refused(payload: bytes, what: str) -> None:
    with pytest.raises(WireError, match=what):
        wire.decode_gone(payload)


def test_a_few_bytes_grow_to_no_more_than_the_bound() -> None:
    for key_len in SHAPES:
        shape = rows.SHAPES[key_len]
        payload = struct.pack("!BH", key_len, wire.MAX_ROWS) + bytes(-(-shape.reply // 8))
        payload += bytes(-(-shape.row // 8)) + with_mode(key_len - shape.zone, (1, 1), shape.row)[-(-shape.row // 8) :]
        try:
            assert len(wire.decode_rows(payload + b"\1")[1]) == wire.MAX_ROWS * shape.row <= 89 * 1024
        except WireError:
            assert shape.zone == 3  # without a direction


# --- single flows ----------------------------------------------------------------------------------------------------


@given(st.sampled_from(SHAPES), st.data())
def test_flow_record_round_trip(key_len: int, data: st.DataObject) -> None:
    shape = rows.SHAPES[key_len]
    key = with_zones(key_len, data.draw(binary(key_len)), key_len)
    value = data.draw(binary(shape.value))
    extras = data.draw(st.sampled_from((b"", rows.pack_extras(FLOW._replace(master=None)), b"\xfe\3new")))
    assert wire.decode_flow_record(wire.encode_flow_record(key, value, extras)) == (key, value, extras)


@pytest.mark.parametrize("flow", [FLOW, udp(1), FLOW._replace(zone=7), FLOW._replace(zone=7, zone_dir=2)])
def test_every_truncation_of_a_flow_record_is_refused(flow: object) -> None:
    whole = wire.encode_flow_record(*rows.pack(flow))  # type: ignore[arg-type]
    assert rows.unpack(*wire.decode_flow_record(whole)) == flow
    fixed = 1 + rows.SHAPES[whole[0]].row
    edges = {fixed}
    at = fixed
    while at < len(whole):
        at += 2 + whole[at + 1]
        edges.add(at)
    for size in range(len(whole)):
        if size in edges:
            wire.decode_flow_record(whole[:size])  # fewer extras
        else:
            with pytest.raises(WireError, match="malformed"):
                wire.decode_flow_record(whole[:size])


@pytest.mark.parametrize("extra", [b"\2\1\xff", b"\3\2ab", b"\4\1x", b"\5\7" + bytes(7)])
def test_extras_that_cannot_be_read_are_refused(extra: bytes) -> None:
    key, value, _extras = rows.pack(tcp(1))
    with pytest.raises(WireError, match="malformed"):
        wire.decode_flow_record(wire.encode_flow_record(key, value, extra))


# --- frames ----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.integers(0, 2**512 - 1))
@example(0, 0, 0)
@example(0, 0, 1)
@example(0, 0, 1 << 511)
def test_ack_round_trip(expected: int, limit: int, early: int) -> None:
    (kind, payload), *rest = wire.iter_tlv(wire.encode_ack(wire.Ack(expected, limit, early)))
    assert (kind, rest) == (wire.FRAME_ACK, [])
    assert wire.decode_ack(payload) == wire.Ack(expected, limit, early)
    assert len(payload) == 16 + (early.bit_length() + 7) // 8


@given(
    binary(16),
    st.text(st.characters(codec="utf-8"), max_size=64),
    U32,
    st.text(st.characters(codec="utf-8"), max_size=64),
)
def test_hello_round_trip(echo: bytes, node: str, capabilities: int, version: str) -> None:
    hello = wire.Hello(echo, node, capabilities, version)
    assert wire.decode_hello(wire.encode_hello(hello)) == hello


DECODERS: dict[str, Callable[[bytes], object]] = {
    "header": wire.decode_header,
    "tlv": lambda data: list(wire.iter_tlv(data)),
    "hello": wire.decode_hello,
    "ack": wire.decode_ack,
    "block": wire.decode_block,
    "status": wire.decode_status,
    "heard": wire.decode_heard,
    "probe": wire.decode_probe,
    "echo": wire.decode_echo,
    "part": wire.decode_part,
    "keys": wire.decode_keys,
    "bulk begin": wire.decode_bulk_begin,
    "bulk end": wire.decode_bulk_end,
    "conditions": wire.decode_conditions,
    "role": wire.decode_role,
    "rows": wire.decode_rows,
    "gone": wire.decode_gone,
    "flow": wire.decode_flow_record,
    "digest": wire.decode_digest,
    "sums": wire.decode_sums,
    "number": wire.decode_number,
    "compare": wire.decode_compare,
    "report": wire.decode_report,
}


def test_every_decoder_is_fed_garbage() -> None:
    assert {name for name in dir(wire) if name.startswith("decode_")} == {
        decode.__name__ for decode in DECODERS.values() if decode.__name__ != "<lambda>"
    }


@given(
    st.lists(st.builds(wire.Heard, st.integers(0, 2**64 - 1), st.just(1 << 31)), min_size=2, max_size=2),
    st.builds(wire.Ack, st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.sampled_from((0, 0, 1, 1 << 70))),
    st.builds(wire.Status, st.integers(0, 255), st.integers(0, 255), st.integers(0, 2**32 - 1)),
    st.binary(max_size=40),
    st.integers(0, 8 * 34 - 1),
)
def test_heartbeats_differ_from_others_by_the_number_that_was_heard_alone(
    heard: list[wire.Heard], ack: wire.Ack, status: wire.Status, more: bytes, flip: int
) -> None:
    one, other = (wire.encode_heard(each) + wire.encode_ack(ack) + wire.encode_status(status) for each in heard)
    number = heard[1].number
    rest = wire.beat_rest(one + more)
    if ack.early:
        assert rest == b""
        return
    assert wire.encode_beat(number, rest) == other
    assert wire.beat_number(other + more, rest) == number
    assert wire.beat_number(other[:-1], rest) == wire.beat_number(other, b"") == -1
    # in whatever else it differs, it is not the same
    place = flip // 8
    place += 8 if place >= 3 else 0  # behind the number
    changed = bytearray(other)
    changed[place] ^= 1 << flip % 8
    assert wire.beat_number(bytes(changed), rest) == -1


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_frames_that_are_no_heartbeat_have_no_rest(missing: int) -> None:
    frames = [
        wire.encode_heard(wire.Heard(7, 8)),
        wire.encode_ack(wire.Ack(1, 513, 0)),
        wire.encode_status(wire.Status(1, 2, 3)),
    ]
    assert wire.beat_rest(b"".join(frames))
    del frames[missing]
    assert wire.beat_rest(b"".join(frames)) == wire.beat_rest(b"".join(frames) + bytes(40)) == b""


@given(st.dictionaries(st.integers(1, 255), st.binary(min_size=4, max_size=4), min_size=1))
def test_keys_round_trip(keys: dict[int, bytes]) -> None:
    ((kind, payload),) = wire.iter_tlv(wire.encode_keys(keys))
    assert (kind, wire.decode_keys(payload)) == (wire.FRAME_KEYS, keys)


@pytest.mark.parametrize(
    "payload", [b"", b"\0abcd", b"\1abc", b"\1abcd\2", b"\2abcd\1abcd", b"\1abcd\1abcd", b"\1abcde"], ids=bytes.hex
)
def test_keys_without_order_are_refused(payload: bytes) -> None:
    with pytest.raises(WireError, match="keys"):
        wire.decode_keys(payload)


@given(U32, st.integers(0, 255), st.frozensets(st.integers(0, wire.BUCKETS - 1)))
@example(0, 0, frozenset(range(wire.BUCKETS)))
def test_compare_round_trip(number: int, flags: int, buckets: frozenset[int]) -> None:
    compare = wire.Compare(number, flags, buckets)
    for kind in (wire.RECORD_COMPARE_REQUEST, wire.RECORD_COMPARE_BEGIN):
        ((found, payload),) = wire.iter_tlv(wire.encode_compare(kind, compare))
        assert (found, wire.decode_compare(payload)) == (kind, compare)


@given(U32, st.integers(0, 992), st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=32))
def test_sums_round_trip(number: int, first: int, sums: list[int]) -> None:
    ((kind, payload),) = wire.iter_tlv(wire.encode_sums(wire.RECORD_STATES, number, first, sums))
    assert (kind, wire.decode_sums(payload)) == (wire.RECORD_STATES, (number, first, tuple(sums)))


def test_sums_of_buckets_that_do_not_exist_are_refused() -> None:
    for first, count in ((993, 32), (1024, 1), (0, 33), (0, 0)):
        payload = struct.pack("!IH", 1, first) + bytes(8 * count)
        with pytest.raises(WireError, match="malformed"):
            wire.decode_sums(payload)
    with pytest.raises(WireError, match="malformed"):
        wire.decode_sums(struct.pack("!IH", 1, 0) + bytes(9))


@given(U32, U32, st.lists(U32, min_size=7, max_size=7), st.lists(st.integers(0, 6), max_size=40), st.integers(45, 600))
def test_report_round_trip(number: int, flows: int, counts: list[int], kinds: list[int], room: int) -> None:
    keys = [(kind, tcp(1000 + place).key) for place, kind in enumerate(kinds)]
    encoded = wire.encode_report(wire.Report(number, flows, tuple(counts), keys), room)
    assert len(encoded) <= max(room, 39)
    ((_kind, payload),) = wire.iter_tlv(encoded)
    found = wire.decode_report(payload)
    assert found[:3] == (number, flows, tuple(counts))
    assert found.keys == keys[: len(found.keys)]
    assert len(found.keys) == min(len(keys), (room - 39) // 15)


def tlvs() -> st.SearchStrategy[bytes]:
    """Records that are well framed, so that garbage gets past the framing."""
    field = st.tuples(st.integers(0, 10), st.binary(max_size=40)).map(lambda pair: wire.tlv(*pair))
    return st.lists(field, max_size=6).map(b"".join)


HEADS = st.sampled_from(
    (
        b"",
        *(struct.pack("!BH", key_len, count) for key_len in SHAPES for count in (1, 2, 300)),
        wire.encode_rows(13, public(30))[:60],
        wire.encode_flow_record(*rows.pack(FLOW))[:39],
    )
)


@pytest.mark.parametrize("name", DECODERS)
@given(data=st.binary(max_size=200) | st.builds(bytes.__add__, HEADS, st.binary(max_size=200) | tlvs()))
def test_arbitrary_bytes_are_a_value_or_a_wire_error(name: str, data: bytes) -> None:
    try:
        DECODERS[name](data)
    except WireError as error:
        assert error.kind in ("malformed", "truncated", "wrong_version")


@pytest.mark.parametrize("decode", [wire.decode_rows, wire.decode_gone])
@given(case=columns(), place=st.integers(0, 10_000), value=st.integers(1, 255))
def test_an_altered_byte_gives_other_rows_or_none(
    decode: Callable[[bytes], tuple[int, bytes]], case: tuple[int, bytes], place: int, value: int
) -> None:
    key_len, joined = case
    payload = bytearray(wire.encode_rows(key_len, joined))
    payload[place % len(payload)] ^= value
    try:
        length, found = decode(bytes(payload))
    except WireError:
        return
    shape = rows.SHAPES[length]
    width = shape.row if decode is wire.decode_rows else length
    assert len(found) % width == 0
    encode = wire.encode_rows if decode is wire.decode_rows else wire.encode_gone
    assert decode(encode(length, found)) == (length, found)


@given(data=st.builds(bytes.__add__, st.just(wire.encode_flow_record(*rows.pack(FLOW))[:39]), st.binary(max_size=120)))
def test_what_a_hostile_peer_sends_cannot_stop_the_printer_or_the_kernel_codec(data: bytes) -> None:
    try:
        flow = rows.unpack(*wire.decode_flow_record(data))
    except WireError:
        return
    assert "\n" not in render.line(flow, 1)
    assert "\n" not in render.xml(flow)
    assert "\n" not in render.json_line(flow, 1)
    for encode in (ctnetlink.create, ctnetlink.update, ctnetlink.delete):
        try:
            assert encode(flow)
        except NetlinkError:
            continue


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hello", wire.encode_hello(wire.Hello(bytes(16), "fw1", 0, "1"))[:32]),
        ("status", wire.encode_status(wire.Status(2, 3, 4))[3:]),
        ("heard", wire.encode_heard(wire.Heard(5, 6))[3:]),
        ("probe", wire.encode_probe(wire.Probe(1, True, 7))[3:]),
        ("echo", wire.encode_echo(wire.Echo(1, 7, 8))[3:]),
        ("part", wire.encode_part(wire.Part(5, 6, 7, b"r"))[3:]),
        ("bulk begin", wire.encode_bulk_begin(7)[3:]),
        ("bulk end", wire.encode_bulk_end(7, 8)[3:]),
        ("ack", wire.encode_ack(wire.Ack(4, 9, 0))[3:]),
    ],
)
def test_every_truncation_of_a_fixed_layout_is_refused(name: str, value: bytes) -> None:
    DECODERS[name](value)
    for size in range(len(value)):
        if name == "hello" and size == 25:
            continue  # echo and node are whole, what follows is optional
        with pytest.raises(WireError):
            DECODERS[name](value[:size])


@pytest.mark.parametrize("kind", [wire.HELLO, wire.DATA])
def test_every_truncation_of_a_datagram_is_refused_before_cryptography(kind: int) -> None:
    header = wire.encode_header(kind, 1, bytes(range(16)), 5)
    rest = bytes(wire.DIGEST_BYTES + wire.TAG_BYTES)
    for size in range(len(header + rest)):
        with pytest.raises(WireError, match="truncated"):
            wire.decode_header((header + rest)[:size])
    assert wire.decode_header(header + rest).size == len(header)


@pytest.mark.parametrize("kind", [wire.HELLO, wire.DATA])
def test_nonce_of_a_datagram_is_its_number_and_its_digest(kind: int) -> None:
    header = wire.encode_header(kind, 1, bytes(range(16)), 0x0102030405060708)
    datagram = header + b"wxyz" + b"sealed" + bytes(wire.TAG_BYTES)
    parts = wire.sealed_parts(wire.decode_header(datagram), datagram)
    assert parts == (b"\1\2\3\4\5\6\7\x08wxyz", b"sealed" + bytes(wire.TAG_BYTES), header)
    assert wire.aead_nonce(header, b"wxyz") == parts[0]
    assert len(parts[0]) == wire.AEAD_NONCE_BYTES


def test_ack_of_more_than_a_receiver_keeps_is_refused() -> None:
    payload = wire.encode_ack(wire.Ack(5, 600, 1 << 511))[3:]
    assert wire.decode_ack(payload).early == 1 << 511
    with pytest.raises(WireError, match="81 bytes"):
        wire.decode_ack(payload + b"\1")


def test_a_probe_is_as_long_as_it_is_asked_to_be() -> None:
    for length in (0, 5, 9, 10, 1360):
        frame = wire.encode_probe(wire.Probe(3, True, 1 << 31), length)
        assert len(frame) == max(length, wire.PROBE_BYTES)
        assert wire.decode_probe(frame[3:]) == wire.Probe(3, True, 1 << 31)
    assert wire.decode_probe(wire.encode_probe(wire.Probe(0, False, 0))[3:]) == wire.Probe(0, False, 0)


def test_an_echo_that_waited_for_long_says_so() -> None:
    assert wire.decode_echo(wire.encode_echo(wire.Echo(1, 2, 1 << 40))[3:]) == wire.Echo(1, 2, 0xFFFFFFFF)


@pytest.mark.parametrize(
    ("offset", "total", "good"), [(0, 3, True), (6, 9, True), (7, 9, False), (9213, 9216, True), (9214, 9217, False)]
)
def test_a_part_lies_within_its_block(offset: int, total: int, good: bool) -> None:
    part = wire.Part(1 << 40, offset, total, b"abc")
    payload = wire.encode_part(part)[3:]
    if good:
        assert wire.decode_part(payload) == part
    else:
        with pytest.raises(WireError, match="malformed"):
            wire.decode_part(payload)


def test_unknown_fields_are_skipped_and_longer_heartbeats_read() -> None:
    key, value, extras = rows.pack(FLOW)
    record = wire.encode_flow_record(key, value, extras + b"\xc8\5later")
    assert rows.unpack(*wire.decode_flow_record(record)) == FLOW
    hello = wire.Hello(bytes(16), "fw1", 0, "1")
    assert wire.decode_hello(wire.encode_hello(hello) + wire.tlv(99, b"later")) == hello
    assert wire.decode_status(wire.encode_status(wire.Status(2, 3, 4))[3:] + b"later") == wire.Status(2, 3, 4)
    assert wire.decode_heard(wire.encode_heard(wire.Heard(1 << 40, 7))[3:] + b"later") == wire.Heard(1 << 40, 7)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (struct.pack("!BBBx", 9, wire.DATA, 1) + bytes(36), "wrong_version"),
        (struct.pack("!BBBx", wire.VERSION, 3, 1) + bytes(36), "malformed"),
        (b"", "truncated"),
    ],
)
def test_faults_are_told_apart(data: bytes, kind: str) -> None:
    with pytest.raises(WireError) as caught:
        wire.decode_header(data)
    assert caught.value.kind == kind
