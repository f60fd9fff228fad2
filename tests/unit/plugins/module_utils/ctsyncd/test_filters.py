# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The filter: ipaddress is the judge of prefixes; of its program in the kernel an interpreter of classic BPF."""

from __future__ import annotations

import ipaddress
import struct
from typing import Any

import pytest
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import constants as k
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import ctnetlink, filters
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.config import Filter as Selection
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.config import Mark
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.filters import EventFilter, Filter, Prefixes
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.flow import Flow, Tuple
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.netlink import event_filter
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.rows import SHAPES, Sheet, cut, pack, unpack
from hypothesis import given
from hypothesis import strategies as st
from unit.simulation import address, tcp, udp

NEW, DESTROY = 0x100, 0x102
OURS = 0x12345678


def networks(*texts: str) -> tuple[Any, ...]:
    return tuple(ipaddress.ip_network(text) for text in texts)


# --- what is selected ------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.sampled_from((4, 16)), st.binary(min_size=16, max_size=16), st.integers(0, 128)), max_size=8),
    st.lists(st.binary(min_size=4, max_size=4) | st.binary(min_size=16, max_size=16), max_size=8),
)
def test_prefixes_agree_with_ipaddress(nets: list[tuple[int, bytes, int]], addresses: list[bytes]) -> None:
    made = [ipaddress.ip_network((packed[:size], min(length, size * 8)), strict=False) for size, packed, length in nets]
    prefixes = Prefixes(str(network) for network in made)
    assert bool(prefixes) == bool(made)
    # the networks' own ends, and their neighbours
    for network in made:
        number = int(network.network_address)
        size = network.max_prefixlen // 8
        addresses = [*addresses, *(n.to_bytes(size, "big") for n in (number, number - 1) if n >= 0)]
    for packed in addresses:
        parsed = ipaddress.ip_address(packed)
        assert (packed in prefixes) == any(parsed in network for network in made)


@pytest.mark.parametrize(
    ("selection", "flow", "selected"),
    [
        (Selection(), tcp(1), True),
        (Selection(protocols=(6, 17)), tcp(1), True),
        (Selection(protocols=(6,)), udp(1), False),
        (Selection(zones=(0, 7)), tcp(1), True),
        (Selection(zones=(7,)), tcp(1), False),
        (Selection(zones=(7,)), tcp(1)._replace(zone=7), True),
        (Selection(addresses=networks("192.168.0.0/24")), tcp(1), True),  # the client
        (Selection(addresses=networks("192.168.1.3/32")), tcp(1), True),  # the server
        (Selection(addresses=networks("192.168.1.100/32")), tcp(1), False),  # the translation only
        (Selection(addresses=networks("192.168.0.0/24")), udp(1), False),  # the other family
        (Selection(addresses=networks("10.0.0.0/8", "fd00:c0de:1::/48")), udp(1), True),
        (Selection(marks=(Mark(1, 0xFF),)), tcp(1, mark=0x101), True),
        (Selection(marks=(Mark(1, 0xFF), Mark(2, 0xFF))), tcp(1, mark=0x102), True),
        (Selection(marks=(Mark(1, 0xFF),)), tcp(1, mark=None), False),
        (Selection(marks=(Mark(0, 0xFF),)), tcp(1, mark=None), True),
        (Selection(tcp_states=(k.TCP_ESTABLISHED,)), tcp(1), True),
        (Selection(tcp_states=(k.TCP_ESTABLISHED,)), tcp(1, state=k.TCP_FIN_WAIT), False),
        (Selection(tcp_states=(k.TCP_ESTABLISHED,)), tcp(1, state=k.TCP_SYN_SENT), False),
        (Selection(tcp_states=(k.TCP_ESTABLISHED,)), tcp(1, state=None), True),
        (Selection(tcp_states=(k.TCP_ESTABLISHED,)), udp(1), True),
        (Selection(protocols=(6,), marks=(Mark(1, 1),)), tcp(1, mark=2), False),  # every list counts
    ],
)
def test_flow_must_meet_every_list(selection: Selection, flow: Flow, selected: bool) -> None:
    assert Filter(selection).selects(flow) == selected


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({"state": k.TCP_CLOSE, "mark": 1}, True),
        ({"state": None, "mark": 1}, True),
        ({"state": k.TCP_SYN_RECV, "mark": 1}, False),
        ({"state": k.TCP_SYN_SENT2, "mark": 1}, False),
        ({"state": k.TCP_TIME_WAIT, "mark": 1}, False),
        ({"mark": 3}, False),
        ({"mark": None}, False),
    ],
)
def test_replicated_flow_stays_while_mark_and_state_do(changes: dict[str, Any], kept: bool) -> None:
    states = tuple(state for state in range(k.TCP_ESTABLISHED, k.TCP_CLOSE + 1) if state != k.TCP_TIME_WAIT)
    assert Filter(Selection(marks=(Mark(1, 3),), tcp_states=states)).keeps(tcp(1, **changes)) == kept


def test_own_addresses_and_ignored_networks_never_pass() -> None:
    judge = Filter(ignore=("192.168.1.0/29", "fd00:c0de:9::/64"))
    assert not judge.passes_through(tcp(1))  # the server is ignored
    assert judge.passes_through(udp(1))
    judge.own = frozenset((address("fd00:c0de:1::3"),))
    assert not judge.passes_through(udp(1))


# --- rows ------------------------------------------------------------------------------------------------------------

# few of each, so that filters and flows meet
_V4 = ("10.0.0.1", "10.0.0.2", "10.0.1.1", "10.1.0.77", "127.0.0.1", "128.0.0.1", "224.0.0.5", "255.1.2.3", "192.0.2.9")
_V6 = ("fd00::1", "fd00::2", "fd00:1::1", "fe80::1", "fea0::1", "ff02::1", "2001:db8::9")
_NETS = ("10.0.0.0/24", "10.0.0.0/15", "10.0.0.2/32", "0.0.0.0/0", "192.0.2.8/29", "fd00::/64", "fd00::2/127", "::/0")
_MANY = tuple(f"10.0.{number}.0/30" for number in range(20)) + tuple(f"fd00:{number:x}::/64" for number in range(20))


@st.composite
def flows_of_one_shape(draw: st.DrawFn) -> list[Flow]:
    family = draw(st.sampled_from((k.AF_INET, k.AF_INET6)))
    ends = st.sampled_from([address(text) for text in (_V4 if family == k.AF_INET else _V6)])
    ports = st.binary(min_size=4, max_size=4) if draw(st.booleans()) else st.just(b"")
    zone, direction = draw(st.sampled_from(((0, 3), (7, 3), (300, 3), (7, 1))))
    tuples = st.tuples(ends, ends, ports).map(lambda parts: Tuple(*parts))
    parts = st.tuples(
        st.sampled_from((1, 6, 6, 6, 17, 33, 58, 112, 132)),
        st.sampled_from((7, 8, 300)) if zone else st.just(0),
        tuples,
        tuples,
        st.integers(0, 0xFFFF),
        st.none() | st.integers(1, 10),
        st.sampled_from((0, 1, 2, 0x101, 0x1FF, 0xFFFFFFFF)),
    )
    flow = parts.map(lambda one: Flow(family, *one[:5], timeout=30, state=one[5], mark=one[6], zone_dir=direction))
    return draw(st.lists(flow, max_size=40, unique_by=lambda one: one.key))


@given(
    flows_of_one_shape(),
    st.builds(
        Selection,
        protocols=st.lists(st.sampled_from((1, 6, 17, 58, 132)), max_size=3).map(tuple),
        addresses=st.lists(st.sampled_from(_NETS), max_size=2).map(lambda names: networks(*names))
        | st.just(networks(*_MANY)),
        zones=st.lists(st.sampled_from((0, 7, 300)), max_size=2).map(tuple),
        tcp_states=st.lists(st.integers(3, 8), max_size=3).map(tuple),
        marks=st.lists(st.sampled_from((Mark(0, 255), Mark(1, 255), Mark(0x100, 0x100), Mark(1, 2))), max_size=2).map(
            tuple
        ),
    ),
    st.lists(st.sampled_from(_NETS), max_size=2).map(tuple) | st.just(_MANY),
    st.lists(st.sampled_from(_V4 + _V6), max_size=3),
    st.booleans(),
)
def test_rows_are_judged_as_flows_are(
    flows: list[Flow], selection: Selection, ignore: tuple[str, ...], own: list[str], unreplied: bool
) -> None:
    judge = Filter(selection, ignore, unreplied)
    judge.own = frozenset(map(address, own))
    rows = {key: value for key, value, _extras in map(pack, flows)}
    key_len = len(flows[0].key) if flows else 13
    for by_rows, by_flow in (
        (judge.select_rows, judge.matches),
        (judge.keep_rows, judge.keeps),
        (judge.passing_rows, judge.passes_through),
        (judge.selected_rows, judge.selects),
        (judge.concerned_rows, judge.concerns),
    ):
        wanted = [key for key, value in rows.items() if by_flow(unpack(key, value))]
        assert list(by_rows(key_len, rows).items()) == [(key, rows[key]) for key in wanted]
    if rows:
        joined = b"".join(key + value for key, value in rows.items())
        all_match = len(judge.select_rows(key_len, rows)) == len(rows)
        width = SHAPES[key_len].row
        assert judge.matches_all(Sheet(key_len, cut(joined, width))) == all_match
        judge.matches_all(Sheet(key_len, cut(joined[:width] * 20 + joined, width)))  # a key that repeats harms nothing


# --- what the kernel decides -----------------------------------------------------------------------------------------


def attribute(kind: int, *parts: bytes, nested: bool = False) -> bytes:
    value = b"".join(parts)
    size = len(value) + 4
    return struct.pack("=HH", size, kind | (0x8000 if nested else 0)) + value + bytes(-size % 4)


def message(
    *,
    proto: int = 6,
    kind: int = NEW,
    portid: int = 0,
    status: int | None = 0x8,
    state: int | None = None,
    zone: int | None = None,
    half_zone: int | None = None,
    once: int | None = None,
) -> bytes:
    """An event with attributes in the kernel's order (ctnetlink_conntrack_event of nf_conntrack_netlink.c)."""
    ends = attribute(1, b"\x0a\0\0\1"), attribute(2, b"\x0a\0\0\2")
    tuples = []
    for direction in (1, 2):
        part = attribute(1, *ends, nested=True)
        part += attribute(2, attribute(1, bytes((proto,))), attribute(2, b"\0\1"), attribute(3, b"\0\2"), nested=True)
        if half_zone is not None and direction == 1:
            part += attribute(3, struct.pack("!H", half_zone))
        tuples.append(attribute(direction, part, nested=True))
    body = b"".join(tuples)
    if zone is not None:
        body += attribute(18, struct.pack("!H", zone))
    body += attribute(12, b"\0\0\0\1")
    if status is not None:
        body += attribute(3, struct.pack("!I", status))
    body += attribute(7, b"\0\0\0\x1e")
    if state is not None:
        body += attribute(4, attribute(1, attribute(1, bytes((state,))), attribute(2, b"\7"), nested=True), nested=True)
    if once is not None:
        body += {
            ctnetlink.CTA_LABELS: attribute(ctnetlink.CTA_LABELS, b"\1" + bytes(15)),
            ctnetlink.CTA_TUPLE_MASTER: attribute(ctnetlink.CTA_TUPLE_MASTER, body[4 : len(tuples[1])], nested=True),
            ctnetlink.CTA_SEQ_ADJ_ORIG: attribute(ctnetlink.CTA_SEQ_ADJ_ORIG, nested=True),
            ctnetlink.CTA_HELP: attribute(ctnetlink.CTA_HELP, attribute(1, b"ftp\0"), nested=True),
        }[once]
    payload = b"\2\0\0\0" + body
    return struct.pack("=IHHII", 16 + len(payload), kind, 0, 0, portid) + payload


def run(program: bytes, data: bytes) -> bool:
    """A machine of classic BPF with the netlink extensions of Linux (net/core/filter.c); True if the packet passes."""
    code = list(struct.iter_unpack("=HBBI", program))
    accumulator = index = at = 0

    def attributes(start: int, end: int, kind: int) -> int:
        while start + 4 <= end:
            size, found = struct.unpack_from("=HH", data, start)
            if size < 4 or start + size > end:
                return 0
            if found & 0x3FFF == kind:
                return start
            start += size + 3 & ~3
        return 0

    for _step in range(len(code) + 1):
        operation, true, false, operand = code[at]
        at += 1
        if operation == 0x20 and operand == 0xFFFFF00C:
            accumulator = attributes(accumulator, len(data), index)
        elif operation == 0x20 and operand == 0xFFFFF010:
            size = struct.unpack_from("=H", data, accumulator)[0]
            accumulator = attributes(accumulator + 4, accumulator + size, index)
        elif operation in (0x20, 0x28, 0x30, 0x40, 0x48, 0x50):
            place = operand + (index if operation & 0x40 else 0)
            size = {0x00: 4, 0x08: 2, 0x10: 1}[operation & 0x18]
            if place + size > len(data):
                return False
            accumulator = int.from_bytes(data[place : place + size], "big")
        elif operation == 0x00:
            accumulator = operand
        elif operation == 0x01:
            index = operand
        elif operation == 0x07:
            index = accumulator
        elif operation == 0x05:
            at += operand
        elif operation == 0x15:
            at += true if accumulator == operand else false
        elif operation == 0x45:
            at += true if accumulator & operand else false
        elif operation == 0x06:
            return bool(operand)
        else:
            raise AssertionError(f"instruction {operation:#x}")
    raise AssertionError("the program does not end")


def wanted(unwanted: EventFilter, event: dict[str, Any]) -> bool:
    """The rule of :class:`EventFilter` in plain words."""
    if event["portid"] == OURS:
        return False
    if event["kind"] == DESTROY:
        return True
    zone = event["zone"] if event["zone"] is not None else 0
    doubtful = event["zone"] is None and event["half_zone"] is not None
    if unwanted.zones and zone not in unwanted.zones and not doubtful:
        return False
    if unwanted.protocols and event["proto"] not in unwanted.protocols:
        return False
    if event["once"] in (ctnetlink.CTA_LABELS, ctnetlink.CTA_TUPLE_MASTER, ctnetlink.CTA_SEQ_ADJ_ORIG):
        return True
    if event["proto"] == k.IPPROTO_TCP:
        return event["state"] not in unwanted.tcp_states
    if event["proto"] == k.IPPROTO_SCTP or not unwanted.replied_only or event["status"] is None:
        return True
    return bool(event["status"] & k.IPS_SEEN_REPLY)


PROTOCOLS = st.sampled_from((1, 6, 17, 47, 58, 132, 136, 255))
ZONES = st.sampled_from((0, 1, 7, 256, 65_535))
EVENTS = st.fixed_dictionaries(
    {
        "proto": PROTOCOLS,
        "kind": st.sampled_from((NEW, NEW, DESTROY)),
        "portid": st.sampled_from((0, 1, OURS)),
        "status": st.none() | st.sampled_from((0x8, 0xA, 0xE, 0x18E, 0x200)),
        "state": st.none() | st.integers(0, 10),
        "zone": st.none() | ZONES,
        "half_zone": st.none() | ZONES,
        "once": st.none()
        | st.sampled_from(
            (ctnetlink.CTA_LABELS, ctnetlink.CTA_TUPLE_MASTER, ctnetlink.CTA_SEQ_ADJ_ORIG, ctnetlink.CTA_HELP)
        ),
    }
)


@given(
    st.builds(
        EventFilter,
        st.lists(PROTOCOLS, unique=True).map(tuple),
        st.lists(ZONES, unique=True).map(tuple),
        st.booleans(),
        st.sampled_from(((), filters.HALF_OPEN, (3, 7))),
    ),
    EVENTS,
)
def test_program_decides_as_the_rule_says(unwanted: EventFilter, event: dict[str, Any]) -> None:
    assert run(event_filter([OURS], unwanted), message(**event)) == wanted(unwanted, event)


@given(
    st.builds(
        Selection,
        protocols=st.lists(PROTOCOLS, unique=True).map(tuple),
        zones=st.lists(ZONES, unique=True).map(tuple),
        tcp_states=st.lists(st.integers(3, 8), unique=True).map(tuple),
        marks=st.sampled_from(((), (Mark(0, 255),), (Mark(1, 255),))),
    ),
    st.booleans(),
    EVENTS,
)
def test_what_the_kernel_drops_is_nothing_that_is_replicated(
    selection: Selection, unreplied: bool, event: dict[str, Any]
) -> None:
    judge = Filter(selection, unreplied=unreplied)
    event = {**event, "portid": 0, "status": event["status"] or 0, "state": event["state"] or None}
    data = message(**event)
    (decoded,) = ctnetlink.parse_messages(data)
    assert decoded.flow is not None
    if not run(event_filter((), judge.events), data):
        assert event["kind"] == NEW
        closing = (k.TCP_CLOSE_WAIT, k.TCP_LAST_ACK)  # FIN_WAIT said it before, and the end will be told
        if event["proto"] == k.IPPROTO_TCP and decoded.flow.state in closing:
            assert not selection.tcp_states or not judge.matches(decoded.flow)
            return
        assert not judge.matches(decoded.flow)
        if event["proto"] == k.IPPROTO_TCP and judge.selects(decoded.flow):
            assert decoded.flow.state in filters.HALF_OPEN


def test_long_lists_are_left_to_the_reader_and_the_longest_program_fits_its_jumps() -> None:
    selection = Selection(protocols=tuple(range(64)), zones=tuple(range(1, 65)))
    program = event_filter([1, 2], Filter(selection).events)
    assert len(program) // 8 < 255
    assert run(program, message(proto=63, zone=64, status=0xE))
    assert not run(program, message(proto=64, zone=64, status=0xE))
    assert not run(program, message(proto=63, zone=65, status=0xE))
    longer = Selection(protocols=tuple(range(65)), zones=tuple(range(65)))
    assert (Filter(longer).events.protocols, Filter(longer).events.zones) == ((), ())
    assert not Filter(longer).selects(tcp(1)._replace(zone=65))
