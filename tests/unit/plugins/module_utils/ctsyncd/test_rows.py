# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A flow as key, value and extras: nothing that matters on another machine is lost, and what is merged is the newer."""

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import constants as k
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import rows
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.errors import WireError
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.flow import (
    BOTH_DIRECTIONS,
    Flow,
    SeqAdj,
    Tuple,
    merge,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.simulation import tcp, udp

FAMILIES = ((k.AF_INET, 4), (k.AF_INET6, 16))
NIBBLE = st.integers(0, 15)
SCALE = st.integers(0, 14)
U32 = st.integers(0, 2**32 - 1)
I32 = st.integers(-(2**31), 2**31 - 1)


def binary(size: int) -> st.SearchStrategy[bytes]:
    return st.binary(min_size=size, max_size=size)


def tuples(size: int, ports: int) -> st.SearchStrategy[Tuple]:
    return st.builds(Tuple, binary(size), binary(size), binary(ports))


@st.composite
def flows(draw: st.DrawFn, families: tuple[tuple[int, int], ...] = FAMILIES) -> Flow:
    """Any flow that a row and extras carry whole."""
    family, size = draw(st.sampled_from(families))
    ports = draw(st.sampled_from((0, 4)))

    def maybe(strategy: st.SearchStrategy[Any]) -> Any:
        return draw(st.none() | strategy)

    zone = draw(st.sampled_from((0, 1, 256, 65535)))
    tracked = maybe(st.tuples(st.tuples(SCALE, SCALE), st.tuples(NIBBLE, NIBBLE)))
    master = maybe(tuples(size, draw(st.sampled_from((0, 4)))))
    adjustment = st.builds(SeqAdj, U32, I32, I32)
    return Flow(
        family,
        draw(st.integers(0, 255)),
        zone,
        draw(tuples(size, ports)),
        draw(tuples(size, ports)),
        draw(st.integers(0, 65535)),
        maybe(st.integers(0, rows.NO_TIMEOUT - 1)),
        maybe(st.integers(1, 255)),
        tracked[0] if tracked else None,
        tracked[1] if tracked else None,
        maybe(st.tuples(U32, U32)),
        draw(U32),
        maybe(st.binary(max_size=16)),
        maybe(st.text(st.characters(min_codepoint=0, max_codepoint=127), max_size=16)),
        master,
        draw(st.integers(0, 255)) if master else 0,
        maybe(st.tuples(adjustment, adjustment)),
        zone_dir=draw(st.sampled_from((1, 2, BOTH_DIRECTIONS))) if zone else BOTH_DIRECTIONS,
    )


@given(flows())
def test_round_trip(flow: Flow) -> None:
    key, value, extras = rows.pack(flow)
    assert rows.unpack(key, value, extras) == flow
    shape, proto, zone, direction, orig = rows.unpack_key(key)
    assert (proto, zone, direction, orig) == (flow.proto, flow.zone, flow.zone_dir, flow.orig)
    assert (len(key), len(value)) == (shape.key, shape.value)


@settings(max_examples=60)
@given(flows(((k.AF_INET, 4),)), flows(((k.AF_INET, 4),)))
def test_merged_values_are_the_value_of_merged_flows(old: Flow, new: Flow) -> None:
    same = ("proto", "zone", "zone_dir", "orig", "reply")
    new = new._replace(**{name: getattr(old, name) for name in same})
    value = rows.merge_value(rows.pack_value(old), rows.pack_value(new))
    assert value == rows.pack_value(merge(old, new))
    extras = rows.merge_extras(rows.pack_extras(old), rows.pack_extras(new))
    merged = merge(old, new)
    if new.master is not None:
        merged = merged._replace(master_proto=new.master_proto)  # of another master, not of the old one
    assert rows.unpack(new.key, value, extras) == merged


def test_another_reply_tuple_is_another_flow() -> None:
    old, new = rows.pack_value(tcp(1, 40000)), rows.pack_value(tcp(1, 40001)._replace(timeout=None, state=None))
    assert rows.merge_value(old, new) == new


def test_what_is_true_on_one_node_only_or_not_known_elsewhere_does_not_travel() -> None:
    flow = tcp(1)._replace(start=1_700_000_000_000_000_000, ident=4711, status=0x1FFFF, tcp_flags=(0x23, 0x33))
    key, value, extras = rows.pack(flow)
    assert rows.unpack(key, value, extras) == flow._replace(start=None, ident=None, status=0xFFFF, tcp_flags=(3, 3))
    assert rows.unpack(key, rows.pack_value(flow._replace(tcp_wscale=(99, 14)))).tcp_wscale == (14, 14)


@pytest.mark.parametrize(
    ("flow", "partial"),
    [
        (tcp(1), False),
        (tcp(1)._replace(timeout=None), True),
        (tcp(1)._replace(state=None), True),
        (tcp(1)._replace(tcp_flags=None), True),
        (tcp(1)._replace(proto=k.IPPROTO_SCTP, tcp_flags=None, tcp_wscale=None), False),
        (tcp(1)._replace(proto=k.IPPROTO_SCTP, state=None), True),
        (udp(1), False),
        (udp(1)._replace(timeout=None), True),
    ],
)
def test_what_leaves_something_out_is_partial(flow: Flow, partial: bool) -> None:
    assert rows.is_partial(flow) is partial


@given(st.sampled_from(sorted(rows.SHAPES)), st.data())
def test_any_row_is_a_flow(key_len: int, data: st.DataObject) -> None:
    shape = rows.SHAPES[key_len]
    key, value = data.draw(binary(key_len)), data.draw(binary(shape.value))
    flow = rows.unpack(key, value)
    assert (flow.family, len(flow.orig.src), len(flow.reply.l4)) == (shape.family, shape.address, shape.l4)
    with pytest.raises(WireError, match="malformed"):
        rows.unpack(key, value[: data.draw(st.integers(0, shape.value - 1))])


@given(st.binary(max_size=60))
def test_extras_are_read_or_refused(extras: bytes) -> None:
    key, value, _extras = rows.pack(tcp(1))
    try:
        flow = rows.unpack(key, value, extras)
    except WireError as error:
        assert error.kind == "malformed"
        return
    assert rows.unpack(*rows.pack(flow)) == flow


@pytest.mark.parametrize("length", sorted(set(range(60)) - set(rows.SHAPES)))
def test_keys_of_other_lengths_are_refused(length: int) -> None:
    with pytest.raises(WireError, match="malformed"):
        rows.unpack_key(bytes(length))


@pytest.mark.parametrize("count", [1, 31, 32, 33, 64, 1000])
def test_sheet_has_the_rows_that_it_was_made_of(count: int) -> None:
    packed = [rows.pack(tcp(number))[:2] for number in range(count)]
    columns = rows.cut(b"".join([key + value for key, value in packed]), rows.SHAPES[13].row)
    sheet = rows.Sheet(13, columns)
    assert len(sheet) == count
    assert sheet.keys == [key for key, _value in packed]
    assert sheet.values == [value for _key, value in packed]
    assert sheet.rows() == dict(packed)
