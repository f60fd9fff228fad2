# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The sync protocol's bytes: round trips, arbitrary input, golden vectors."""

from __future__ import annotations

import struct
from typing import Any, Callable

import pytest
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import constants as k
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import ctnetlink, render, wire
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.errors import NetlinkError, WireError
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.flow import Flow, SeqAdj, Tuple
from hypothesis import example, given
from hypothesis import strategies as st
from unit.simulation import tcp, udp

U8 = st.integers(0, 255)
U32 = st.integers(0, 2**32 - 1)
I32 = st.integers(-(2**31), 2**31 - 1)


def binary(size: int) -> st.SearchStrategy[bytes]:
    return st.binary(min_size=size, max_size=size)


def tuples(size: int, ports: int) -> st.SearchStrategy[Tuple]:
    return st.builds(Tuple, binary(size), binary(size), binary(ports))


@st.composite
def flows(draw: st.DrawFn) -> Flow:
    """Any flow that the protocol can carry."""
    family, size = draw(st.sampled_from(((k.AF_INET, 4), (k.AF_INET6, 16))))
    ports = draw(st.sampled_from((0, 4)))

    def maybe(strategy: st.SearchStrategy[Any]) -> Any:
        return draw(st.none() | strategy)

    master = maybe(tuples(size, draw(st.sampled_from((0, 4)))))
    adjustment = st.builds(SeqAdj, U32, I32, I32)
    return Flow(
        family,
        draw(U8),
        draw(st.integers(0, 65535)),
        draw(tuples(size, ports)),
        draw(tuples(size, ports)),
        draw(U32),
        maybe(st.integers(0, 2**32 - 2)),
        maybe(U8),
        maybe(st.tuples(U8, U8)),
        maybe(st.tuples(U8, U8)),
        maybe(st.tuples(U32, U32)),
        maybe(U32),
        maybe(st.binary(max_size=16)),
        maybe(st.text(st.characters(min_codepoint=0, max_codepoint=127), max_size=16)),
        master,
        draw(U8) if master else 0,
        maybe(st.tuples(adjustment, adjustment)),
    )


EVERYTHING = tcp(
    51356,
    40000,
    mark=7,
    labels=bytes(range(16)),
    helper="ftp",
    sctp_vtags=(1, 0xFFFFFFFF),
    master=tcp(21).orig,
    master_proto=k.IPPROTO_TCP,
    seqadj=(SeqAdj(1, -2, 3), SeqAdj(0xFFFFFFFF, 0, -(2**31))),
)


@given(flows())
@example(EVERYTHING)
def test_flow_record_round_trip(flow: Flow) -> None:
    assert wire.decode_flow(wire.encode_flow(flow)) == flow


@given(flows())
@example(tcp(1, state=k.TCP_TIME_WAIT))
def test_state_is_found_without_decoding_the_record(flow: Flow) -> None:
    assert wire.tcp_state(wire.encode_flow(flow)) == (flow.state if flow.proto == k.IPPROTO_TCP else None)


def test_state_is_found_wherever_a_peer_puts_it() -> None:
    record = wire.encode_flow(tcp(1)._replace(state=None)) + wire.tlv(1, bytes((k.TCP_CLOSE,)))
    assert wire.tcp_state(record) == wire.decode_flow(record).state == k.TCP_CLOSE


@given(flows())
def test_key_in_a_delete_record_is_the_key_of_the_flow(flow: Flow) -> None:
    assert wire.decode_key(flow.key) == (flow.family, flow.proto, flow.zone, flow.orig)


def test_what_is_true_on_one_node_only_is_not_sent() -> None:
    flow = tcp(1)._replace(start=1_700_000_000_000_000_000, ident=4711)
    assert wire.decode_flow(wire.encode_flow(flow)) == flow._replace(start=None, ident=None)


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.lists(st.integers(1, 9), max_size=64))
def test_ack_round_trip(expected: int, limit: int, steps: list[int]) -> None:
    edges, at = [], expected
    for step in steps:
        at += step
        edges.append(min(at, 2**64 - 1))
    edges = sorted(set(edges) - {expected})
    ranges = tuple(zip(edges[::2], edges[1::2]))
    (kind, payload), *rest = wire.iter_tlv(wire.encode_ack(wire.Ack(expected, limit, ranges)))
    assert (kind, rest) == (wire.FRAME_ACK, [])
    assert wire.decode_ack(payload) == wire.Ack(expected, limit, ranges[: wire.MAX_ACK_RANGES])


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
    "bulk begin": wire.decode_bulk_begin,
    "bulk end": wire.decode_bulk_end,
    "flow": wire.decode_flow,
    "key": wire.decode_key,
}


def test_every_decoder_is_fed_garbage() -> None:
    assert {name for name in dir(wire) if name.startswith("decode_")} == {
        decode.__name__ for decode in DECODERS.values() if decode.__name__ != "<lambda>"
    }


def tlvs() -> st.SearchStrategy[bytes]:
    """Records that are well framed, so that garbage gets past the framing."""
    field = st.tuples(st.integers(0, 10), st.binary(max_size=40)).map(lambda pair: wire.tlv(*pair))
    return st.lists(field, max_size=6).map(b"".join)


HEADS = st.sampled_from(
    (b"", wire.encode_flow(EVERYTHING)[:37], wire.encode_flow(udp(1))[:85], wire.encode_flow(tcp(1)))
)


@pytest.mark.parametrize("name", DECODERS)
@given(data=st.binary(max_size=200) | st.builds(bytes.__add__, HEADS, tlvs()))
def test_arbitrary_bytes_are_a_value_or_a_wire_error(name: str, data: bytes) -> None:
    try:
        DECODERS[name](data)
    except WireError as error:
        assert error.kind in ("malformed", "truncated", "wrong_version")


@given(data=st.builds(bytes.__add__, HEADS, tlvs()))
def test_what_a_hostile_peer_sends_cannot_stop_the_printer_or_the_kernel_codec(data: bytes) -> None:
    try:
        flow = wire.decode_flow(data)
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


def test_a_record_cut_short_anywhere_is_refused_or_has_fewer_fields() -> None:
    whole = wire.encode_flow(EVERYTHING)
    fixed = len(wire.encode_flow(EVERYTHING._replace(**dict.fromkeys(wire_optional(), None), master_proto=0)))
    for size in range(len(whole)):
        try:
            flow = wire.decode_flow(whole[:size])
        except WireError:
            continue
        assert size >= fixed
        assert (flow.orig, flow.reply, flow.status) == (EVERYTHING.orig, EVERYTHING.reply, EVERYTHING.status)
        assert wire.encode_flow(flow) == whole[:size]


def wire_optional() -> tuple[str, ...]:
    return "state", "tcp_wscale", "tcp_flags", "sctp_vtags", "mark", "labels", "helper", "master", "seqadj"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hello", wire.encode_hello(wire.Hello(bytes(16), "fw1", 0, "1"))[:32]),
        ("ack", wire.encode_ack(wire.Ack(4, 9, ((5, 6), (8, 9))))[3:]),
        ("status", wire.encode_status(wire.Status(2, 3, 4))[3:]),
        ("bulk begin", wire.encode_bulk_begin(7)[3:]),
        ("bulk end", wire.encode_bulk_end(7, 8)[3:]),
        ("key", tcp(1).key),
    ],
)
def test_every_truncation_of_a_fixed_layout_is_refused(name: str, value: bytes) -> None:
    DECODERS[name](value)
    for size in range(len(value)):
        if name == "key" and size == len(value) - 4:
            continue  # a key without ports is one of a protocol without ports
        if name == "hello" and size == 25:
            continue  # echo and node are whole, what follows is optional
        with pytest.raises(WireError):
            DECODERS[name](value[:size])


@pytest.mark.parametrize("kind", [wire.HELLO, wire.DATA])
def test_every_truncation_of_a_datagram_is_refused_before_cryptography(kind: int) -> None:
    header = wire.encode_header(kind, 1, bytes(range(16)), 5)
    for size in range(len(header) + wire.TAG_BYTES):
        with pytest.raises(WireError, match="truncated"):
            wire.decode_header((header + bytes(wire.TAG_BYTES))[:size])
    assert wire.decode_header(header + bytes(wire.TAG_BYTES)).size == len(header)


def test_master_with_half_a_port_is_refused() -> None:
    master = tcp(21).orig
    for size in range(5):
        field = bytes((k.IPPROTO_TCP, size)) + master.src + master.dst + master.l4
        record = wire.encode_flow(tcp(1)) + wire.tlv(8, field)
        if size in (0, 4):
            assert wire.decode_flow(record).master == master._replace(l4=master.l4[:size])
        else:
            with pytest.raises(WireError, match="master"):
                wire.decode_flow(record)


@pytest.mark.parametrize("ranges", [((3, 5),), ((6, 6),), ((6, 8), (7, 9)), ((9, 10), (6, 8))])
def test_ack_ranges_that_overlap_or_go_back_are_refused(ranges: tuple[tuple[int, int], ...]) -> None:
    _kind, payload = next(wire.iter_tlv(wire.encode_ack(wire.Ack(5, 600, ranges))))
    with pytest.raises(WireError, match="out of order"):
        wire.decode_ack(payload)


def test_unknown_fields_are_skipped_and_longer_heartbeats_read() -> None:
    assert wire.decode_flow(wire.encode_flow(EVERYTHING) + wire.tlv(200, b"later")) == EVERYTHING
    hello = wire.Hello(bytes(16), "fw1", 0, "1")
    assert wire.decode_hello(wire.encode_hello(hello) + wire.tlv(99, b"later")) == hello
    assert wire.decode_status(wire.encode_status(wire.Status(2, 3, 4))[3:] + b"later") == wire.Status(2, 3, 4)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (struct.pack("!BBBx", 9, wire.DATA, 1) + bytes(32), "wrong_version"),
        (struct.pack("!BBBx", wire.VERSION, 3, 1) + bytes(32), "malformed"),
        (b"", "truncated"),
    ],
)
def test_faults_are_told_apart(data: bytes, kind: str) -> None:
    with pytest.raises(WireError) as caught:
        wire.decode_header(data)
    assert caught.value.kind == kind
