# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The ctnetlink codec against pyroute2's, and against malformed input."""

from __future__ import annotations

import contextlib
import socket
import struct
from typing import Any

import pytest
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import constants as k
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import ctnetlink
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.ctnetlink import Kind, Message
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.errors import NetlinkError
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.flow import Flow, SeqAdj, Tuple
from hypothesis import given, settings
from hypothesis import strategies as st
from pyroute2.netlink.nfnetlink.nfctsocket import nfct_msg

SNAT_STATUS = 0x19E  # SEEN_REPLY ASSURED CONFIRMED SRC_NAT SRC_NAT_DONE DST_NAT_DONE
ESTABLISHED = 0x18E


def packed(text: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)


def ports(src: str, dst: str, sport: int, dport: int) -> Tuple:
    return Tuple(packed(src), packed(dst), struct.pack("!HH", sport, dport))


def echo(src: str, dst: str, ident: int, kind: int) -> Tuple:
    return Tuple(packed(src), packed(dst), struct.pack("!HBB", ident, kind, 0))


SSH = Flow(
    *(k.AF_INET, k.IPPROTO_TCP, 0),
    ports("192.168.0.3", "192.168.1.3", 51356, 22),
    ports("192.168.1.3", "192.168.1.100", 22, 40000),
    SNAT_STATUS,
    431999,
    k.TCP_ESTABLISHED,
    tcp_wscale=(7, 9),
    tcp_flags=(0x23, 0x33),
    mark=0,
)
FLOWS = {
    "tcp4-snat": SSH,
    "tcp6-dnat": Flow(
        *(k.AF_INET6, k.IPPROTO_TCP, 9),
        ports("2001:db8::1", "fd00:c0de:1::100", 1025, 8080),
        ports("fd00:c0de::3", "2001:db8::1", 80, 1025),
        ESTABLISHED | k.IPS_DST_NAT,
        60,
        k.TCP_ESTABLISHED,
        tcp_wscale=(1, 2),
        tcp_flags=(3, 3),
        mark=0xFFFFFFFF,
        labels=bytes(range(16)),
    ),
    "udp4-both": Flow(
        *(k.AF_INET, k.IPPROTO_UDP, 0),
        ports("192.168.0.3", "192.168.1.200", 5000, 53),
        ports("192.168.1.3", "192.168.1.100", 5353, 6000),
        ESTABLISHED | k.IPS_SRC_NAT | k.IPS_DST_NAT,
        120,
    ),
    "icmp4-snat": Flow(
        *(k.AF_INET, k.IPPROTO_ICMP, 0),
        echo("192.168.0.3", "192.168.1.3", 77, 8),
        echo("192.168.1.3", "192.168.1.100", 1077, 0),
        SNAT_STATUS,
        30,
    ),
    "icmp6-dnat": Flow(
        *(k.AF_INET6, k.IPPROTO_ICMPV6, 0),
        echo("fd00:c0de::3", "fd00:c0de:1::200", 78, 128),
        echo("fd00:c0de:1::3", "fd00:c0de::3", 78, 129),
        ESTABLISHED | k.IPS_DST_NAT,
        30,
    ),
    "sctp4-plain": Flow(
        *(k.AF_INET, k.IPPROTO_SCTP, 0),
        ports("192.168.0.3", "192.168.1.3", 9899, 2905),
        ports("192.168.1.3", "192.168.0.3", 2905, 9899),
        ESTABLISHED,
        210,
        k.SCTP_ESTABLISHED,
        sctp_vtags=(0xDEADBEEF, 7),
    ),
    "esp4-plain": Flow(
        *(k.AF_INET, 50, 0),
        Tuple(packed("192.168.0.3"), packed("192.168.1.3"), b""),
        Tuple(packed("192.168.1.3"), packed("192.168.0.3"), b""),
        ESTABLISHED,
        600,
    ),
    "ftp-data": Flow(
        *(k.AF_INET, k.IPPROTO_TCP, 0),
        ports("192.168.1.3", "192.168.1.100", 20, 1026),
        ports("192.168.0.3", "192.168.1.3", 1026, 20),
        ESTABLISHED | k.IPS_EXPECTED | k.IPS_DST_NAT | k.IPS_SEQ_ADJUST,
        300,
        k.TCP_ESTABLISHED,
        helper="ftp",
        master=ports("192.168.0.3", "192.168.1.3", 51357, 21),
        master_proto=k.IPPROTO_TCP,
        seqadj=(SeqAdj(0x80000001, 0, -3), SeqAdj(5, 2, 4)),
    ),
}


def oracle(data: bytes) -> Any:
    """The message as pyroute2 reads it."""
    message = nfct_msg(data)
    message.decode()
    return message


def plain(nla: Any) -> dict[str, Any]:
    return {
        name: plain(value) if hasattr(value, "get_attr") and value.get("attrs") else value
        for name, value in nla["attrs"]
    }


def oracle_tuple(flow: Flow, direction: Tuple) -> dict[str, Any]:
    """A tuple as pyroute2 shows it."""
    v4 = flow.family == k.AF_INET
    family = socket.AF_INET if v4 else socket.AF_INET6
    version = "V4" if v4 else "V6"
    proto: dict[str, Any] = {"CTA_PROTO_NUM": flow.proto}
    if flow.proto in k.ICMP_PROTOCOLS:
        name = "ICMP" if v4 else "ICMPV6"
        values = struct.unpack("!HBB", direction.l4)
        proto.update(zip((f"CTA_PROTO_{name}_ID", f"CTA_PROTO_{name}_TYPE", f"CTA_PROTO_{name}_CODE"), values))
    elif direction.l4:
        proto.update(zip(("CTA_PROTO_SRC_PORT", "CTA_PROTO_DST_PORT"), struct.unpack("!HH", direction.l4)))
    return {
        "CTA_TUPLE_IP": {
            f"CTA_IP_{version}_SRC": socket.inet_ntop(family, direction.src),
            f"CTA_IP_{version}_DST": socket.inet_ntop(family, direction.dst),
        },
        "CTA_TUPLE_PROTO": proto,
    }


def attrs(tree: dict[str, Any]) -> list[Any]:
    """A tree as pyroute2 wants it for encoding."""
    return [[name, {"attrs": attrs(value)} if isinstance(value, dict) else value] for name, value in tree.items()]


@pytest.mark.parametrize("name", FLOWS)
def test_create_is_what_pyroute2_reads(name: str) -> None:
    flow = FLOWS[name]
    data = ctnetlink.create(flow, 77)
    message = oracle(data)
    assert message["header"]["length"] == len(data)
    assert (message["header"]["type"], message["header"]["sequence_number"]) == (0x100, 77)
    assert message["header"]["flags"] == 0x601  # REQUEST EXCL CREATE
    assert message["nfgen_family"] == flow.family
    found = plain(message)
    natted = flow.status & (k.IPS_SRC_NAT | k.IPS_DST_NAT)
    assert found["CTA_TUPLE_ORIG"] == oracle_tuple(flow, flow.orig)
    assert found["CTA_TUPLE_REPLY"] == oracle_tuple(
        flow, ctnetlink.mirror(flow.proto, flow.orig) if natted else flow.reply
    )
    assert found["CTA_STATUS"] == flow.status & 0x0E
    assert found["CTA_TIMEOUT"] == flow.timeout
    assert found.get("CTA_ZONE", 0) == flow.zone
    assert found.get("CTA_MARK") == flow.mark
    assert ("CTA_NAT_SRC" in found, "CTA_NAT_DST" in found) == (flow.snat, flow.dnat)
    assert ("CTA_TUPLE_MASTER" in found) == (flow.master is not None)
    if flow.seqadj:
        for direction, want in zip(("ORIG", "REPLY"), flow.seqadj):
            got = found[f"CTA_SEQ_ADJ_{direction}"]
            assert got["CTA_NAT_SEQ_CORRECTION_POS"] == want.correction_pos
            assert got["CTA_NAT_SEQ_OFFSET_AFTER"] == want.offset_after & 0xFFFFFFFF


@pytest.mark.parametrize(
    ("name", "direction", "address", "key"),
    [
        ("tcp4-snat", "SRC", "192.168.1.100", 40000),
        ("tcp6-dnat", "DST", "fd00:c0de::3", 80),
        ("udp4-both", "SRC", "192.168.1.100", 6000),
        ("udp4-both", "DST", "192.168.1.3", 5353),
        ("icmp4-snat", "SRC", "192.168.1.100", 1077),
        ("icmp6-dnat", "DST", "fd00:c0de:1::3", 78),
    ],
)
def test_nat_names_exactly_one_address_and_port(name: str, direction: str, address: str, key: int) -> None:
    got = plain(oracle(ctnetlink.create(FLOWS[name])))[f"CTA_NAT_{direction}"]
    version = "V6" if ":" in address else "V4"
    assert got == {
        f"CTA_NAT_{version}_MINIP": address,
        f"CTA_NAT_{version}_MAXIP": address,
        "CTA_NAT_PROTO": {"CTA_PROTONAT_PORT_MIN": key, "CTA_PROTONAT_PORT_MAX": key},
    }


def tcp_info(data: bytes) -> dict[str, Any]:
    return plain(oracle(data))["CTA_PROTOINFO"]["CTA_PROTOINFO_TCP"]


def tcp_flags(data: bytes) -> tuple[Any, Any]:
    found = tcp_info(data)
    return (
        found["CTA_PROTOINFO_TCP_FLAGS_ORIGINAL"],
        found["CTA_PROTOINFO_TCP_FLAGS_REPLY"],
    )


def test_window_scale_needs_both_flags_and_both_scales() -> None:
    known = ctnetlink.create(SSH, liberal=False)
    assert tcp_info(known)["CTA_PROTOINFO_TCP_WSCALE_ORIGINAL"] == 7
    assert tcp_info(known)["CTA_PROTOINFO_TCP_WSCALE_REPLY"] == 9
    assert tcp_flags(known) == ((0x03, 0x0F), (0x03, 0x0F))  # window data (0x20, 0x10) stays behind
    assert tcp_flags(ctnetlink.create(SSH)) == ((0x0B, 0x0F), (0x0B, 0x0F))
    one_sided = ctnetlink.create(SSH._replace(tcp_flags=(3, 2)), liberal=False)
    assert "CTA_PROTOINFO_TCP_WSCALE_ORIGINAL" not in tcp_info(one_sided)
    assert tcp_flags(one_sided) == ((0x03, 0x0F), (0x02, 0x0F))
    lost = ctnetlink.create(SSH._replace(tcp_wscale=None), liberal=False)
    assert tcp_flags(lost) == ((0x0A, 0x0F), (0x0A, 0x0F))
    unknown = ctnetlink.create(SSH._replace(tcp_flags=None), liberal=False)
    assert tcp_flags(unknown) == ((0x0A, 0x0A), (0x0A, 0x0A))


def test_update_leaves_out_what_the_kernel_refuses() -> None:
    for flow in FLOWS.values():
        message = oracle(ctnetlink.update(flow, 5, timeout=9))
        found = plain(message)
        assert message["header"]["flags"] == 0x001
        assert found["CTA_TUPLE_ORIG"] == oracle_tuple(flow, flow.orig)
        assert found["CTA_TIMEOUT"] == 9
        assert not {"CTA_NAT_SRC", "CTA_NAT_DST", "CTA_TUPLE_MASTER", "CTA_HELP", "CTA_TUPLE_REPLY"} & set(found)
    assert plain(oracle(ctnetlink.update(FLOWS["ftp-data"])))["CTA_STATUS"] == 0x0F
    assert plain(oracle(ctnetlink.update(FLOWS["ftp-data"], expected=False)))["CTA_STATUS"] == 0x0E
    assert "CTA_STATUS" not in plain(oracle(ctnetlink.update(SSH, status=False)))


def test_timer_of_gre_is_fixed_when_its_entry_is_made() -> None:
    """IPS_FIXED_TIMEOUT; the kernel answers EPERM to whoever sets such a timer then."""
    flow = Flow(
        *(k.AF_INET, k.IPPROTO_GRE, 0),
        ports("192.168.0.3", "192.168.1.3", 5, 0xFFFE),
        ports("192.168.1.3", "192.168.1.100", 0xFFFE, 5),
        SNAT_STATUS | k.IPS_ASSURED,
        180,
    )
    made = plain(oracle(ctnetlink.create(flow, timeout=86_400)))
    assert (made["CTA_STATUS"], made["CTA_TIMEOUT"]) == (0x40E, 86_400)
    changed = plain(oracle(ctnetlink.update(flow, timeout=9)))
    assert (changed["CTA_STATUS"], "CTA_TIMEOUT" in changed) == (0xE, False)
    assert plain(oracle(ctnetlink.create(SSH)))["CTA_STATUS"] & k.IPS_FIXED_TIMEOUT == 0


def test_delete_get_and_dump() -> None:
    flow = FLOWS["tcp6-dnat"]
    for data in (ctnetlink.delete(flow, 3, ident=99), ctnetlink.delete(ctnetlink.flow_of_key(flow.key), 3, ident=99)):
        message = oracle(data)
        assert (message["header"]["type"], message["header"]["flags"]) == (0x102, 1)
        assert plain(message) == {"CTA_TUPLE_ORIG": oracle_tuple(flow, flow.orig), "CTA_ZONE": 9, "CTA_ID": 99}
    assert oracle(ctnetlink.get(flow))["header"]["type"] == 0x101
    message = oracle(ctnetlink.dump(4, zero=True))
    assert (message["header"]["type"], message["header"]["flags"], message["nfgen_family"]) == (0x103, 0x301, 0)


def event(flow: Flow, flags: int = 0x600, portid: int = 0, **more: Any) -> bytes:
    """An event with this flow, encoded by pyroute2."""
    message = nfct_msg()
    message["header"].update({"type": 0x100, "flags": flags, "pid": portid})
    message["nfgen_family"] = flow.family
    tree: dict[str, Any] = {
        "CTA_TUPLE_ORIG": oracle_tuple(flow, flow.orig),
        "CTA_TUPLE_REPLY": oracle_tuple(flow, flow.reply),
        "CTA_ID": flow.ident or 0,
        "CTA_STATUS": flow.status,
        **more,
    }
    if flow.timeout is not None:
        tree["CTA_TIMEOUT"] = flow.timeout
    message["attrs"] = attrs(tree)
    message.encode()
    return bytes(message.data)


@pytest.mark.parametrize("name", FLOWS)
def test_what_pyroute2_writes_is_read(name: str) -> None:
    want = FLOWS[name]._replace(ident=0xFEDCBA98)
    more: dict[str, Any] = {"CTA_SECCTX": {"CTA_SECCTX_NAME": "unconfined"}}
    if want.zone:
        more["CTA_ZONE"] = want.zone
    if want.mark is not None:
        more["CTA_MARK"] = want.mark
    if want.labels is not None:
        more["CTA_LABELS"] = int.from_bytes(want.labels, "little")
    if want.master is not None:
        more["CTA_TUPLE_MASTER"] = oracle_tuple(want, want.master)
    if want.seqadj is not None:
        for direction, one in zip(("ORIG", "REPLY"), want.seqadj):
            more[f"CTA_SEQ_ADJ_{direction}"] = {
                "CTA_NAT_SEQ_CORRECTION_POS": one.correction_pos,
                "CTA_NAT_SEQ_OFFSET_BEFORE": one.offset_before & 0xFFFFFFFF,
                "CTA_NAT_SEQ_OFFSET_AFTER": one.offset_after & 0xFFFFFFFF,
            }
    info: dict[str, Any] = {}
    if want.proto == k.IPPROTO_TCP:
        info["CTA_PROTOINFO_TCP_STATE"] = want.state
        if want.tcp_flags and want.tcp_wscale:
            info["CTA_PROTOINFO_TCP_WSCALE_ORIGINAL"], info["CTA_PROTOINFO_TCP_WSCALE_REPLY"] = want.tcp_wscale
            for direction, value in zip(("ORIGINAL", "REPLY"), want.tcp_flags):
                info[f"CTA_PROTOINFO_TCP_FLAGS_{direction}"] = (value, 0)
        more["CTA_PROTOINFO"] = {"CTA_PROTOINFO_TCP": info}
    elif want.proto == k.IPPROTO_SCTP:
        info = {"CTA_PROTOINFO_SCTP_STATE": want.state}
        info["CTA_PROTOINFO_SCTP_VTAG_ORIGINAL"], info["CTA_PROTOINFO_SCTP_VTAG_REPLY"] = want.sctp_vtags or (0, 0)
        more["CTA_PROTOINFO"] = {"CTA_PROTOINFO_SCTP": info}
    more["CTA_TIMESTAMP"] = {"CTA_TIMESTAMP_START": 1795397228715401729}
    data = event(want, portid=4242, **more)
    want = want._replace(start=1795397228715401729, helper=None)  # pyroute2 does not know that CTA_HELP is nested
    assert list(ctnetlink.parse_messages(data)) == [Message(Kind.NEW, want, 0, 4242, 0x600)]


def test_own_reading_of_what_we_write() -> None:
    for flow in FLOWS.values():
        (message,) = ctnetlink.parse_messages(ctnetlink.create(flow._replace(status=0x0E), liberal=False))
        got = message.flow
        assert got is not None
        assert got._replace(tcp_flags=None) == flow._replace(status=0x0E, tcp_flags=None)


def test_kinds_of_messages() -> None:
    head = struct.Struct("=IHHII")
    flow = FLOWS["udp4-both"]
    data = event(flow, flags=0) + event(flow, flags=2) + ctnetlink.delete(flow)  # which has no reply tuple
    messages = ctnetlink.parse_messages(data)
    assert [next(messages).kind, next(messages).kind] == [Kind.UPDATE, Kind.DUMP]
    with pytest.raises(NetlinkError, match="two tuples"):
        next(messages)
    destroyed = bytearray(event(flow, flags=0))
    destroyed[4] = 2
    controls = (
        bytes(destroyed)
        + head.pack(16, 1, 0, 1, 0)  # NLMSG_NOOP
        + head.pack(20, 0x201, 0, 1, 0) + b"\2\0\0\0"  # an expectation
        + head.pack(36, 2, 0x100, 7, 9) + struct.pack("=i", -17) + head.pack(20, 0x100, 5, 7, 9)
        + head.pack(36, 2, 0x100, 8, 9) + struct.pack("=i", 0) + head.pack(20, 0x100, 5, 8, 9)
        + head.pack(20, 3, 0x12, 3, 9) + struct.pack("=i", 0)
        + head.pack(16, 4, 0, 0, 0)
    )  # fmt: skip
    got = list(ctnetlink.parse_messages(controls))
    assert [(m.kind, m.seq, m.errno) for m in got] == [
        (Kind.DESTROY, 0, 0),
        (Kind.ERROR, 7, 17),
        (Kind.ERROR, 8, 0),
        (Kind.DONE, 3, 0),
        (Kind.OVERRUN, 0, 0),
    ]
    assert got[3].flags & ctnetlink.NLM_F_DUMP_INTR


def test_zone_of_one_direction_stands_in_the_tuple() -> None:
    """CTA_TUPLE_ZONE inside CTA_TUPLE_ORIG; pyroute2 does not know it."""
    flow = FLOWS["udp4-both"]
    data = event(flow)
    orig_len = struct.unpack_from("=H", data, 20)[0]
    zone = ctnetlink.attribute(ctnetlink.CTA_TUPLE_ZONE, b"\x12\x34")
    body = struct.pack("=H", orig_len + len(zone)) + data[22 : 20 + orig_len] + zone + data[20 + orig_len :]
    moved = struct.pack("=I", len(data) + len(zone)) + data[4:20] + body
    (message,) = ctnetlink.parse_messages(moved)
    assert message.flow is not None and message.flow.zone == 0x1234


def test_helper_name_is_nested_and_checked() -> None:
    (message,) = ctnetlink.parse_messages(ctnetlink.create(FLOWS["ftp-data"]))
    assert message.flow is not None and message.flow.helper == "ftp"
    for name in ("x" * 16, "a\0b", "\u20ac"):
        with pytest.raises(NetlinkError, match="helper"):
            ctnetlink.create(SSH._replace(helper=name))


@pytest.mark.parametrize(
    "bad",
    [
        SSH._replace(family=7),
        SSH._replace(orig=SSH.orig._replace(src=b"123")),
        SSH._replace(orig=SSH.orig._replace(l4=b"12")),
        SSH._replace(labels=b"123"),
    ],
)
def test_flows_that_cannot_be_said(bad: Flow) -> None:
    with pytest.raises(NetlinkError):
        ctnetlink.create(bad)


@pytest.mark.parametrize("key", [b"", b"\6\0\0", bytes(17), SSH.key[:-3], SSH.key + b"0"])
def test_malformed_keys(key: bytes) -> None:
    with pytest.raises(NetlinkError):
        ctnetlink.flow_of_key(key)


def test_offloaded_flows_say_neither_timeout_nor_state() -> None:
    data = ctnetlink.create(SSH._replace(timeout=None, state=None, tcp_flags=None, tcp_wscale=None))
    assert plain(oracle(data))["CTA_TIMEOUT"] == ctnetlink.FALLBACK_TIMEOUT
    assert tcp_info(data)["CTA_PROTOINFO_TCP_STATE"] == k.TCP_ESTABLISHED


def consume(data: bytes) -> None:
    """Only NetlinkError may come out."""
    with contextlib.suppress(NetlinkError):
        list(ctnetlink.parse_messages(data))
    with contextlib.suppress(NetlinkError):
        ctnetlink.decode_flow(data)


def test_truncation_at_every_length() -> None:
    for flow in FLOWS.values():
        data = ctnetlink.create(flow, 1)
        for length in range(1, len(data)):
            with pytest.raises(NetlinkError):
                list(ctnetlink.parse_messages(data[:length]))
            consume(struct.pack("=I", length) + data[4:length])  # as if the kernel had meant it
            consume(data[16:length])


@given(st.binary(max_size=300))
def test_arbitrary_bytes(data: bytes) -> None:
    consume(data)
    consume(struct.pack("=IHHII", 16 + len(data), 0x100, 0, 0, 0) + data)


@settings(max_examples=300)
@given(
    st.sampled_from(sorted(FLOWS)),
    st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_flipped_bytes(name: str, changes: list[tuple[int, int]]) -> None:
    data = bytearray(ctnetlink.create(FLOWS[name], 1))
    for at, value in changes:
        data[at % len(data)] = value
    consume(bytes(data))
    consume(bytes(data[16:]))


addresses = {k.AF_INET: st.binary(min_size=4, max_size=4), k.AF_INET6: st.binary(min_size=16, max_size=16)}


@st.composite
def flows(draw: st.DrawFn) -> Flow:
    family = draw(st.sampled_from((k.AF_INET, k.AF_INET6)))
    proto = draw(st.integers(0, 255))
    known = proto in k.PORT_PROTOCOLS | k.ICMP_PROTOCOLS
    l4 = st.binary(min_size=4, max_size=4) if known else st.just(draw(st.sampled_from((b"", b"\1\2\3\4"))))
    orig, reply = (Tuple(draw(addresses[family]), draw(addresses[family]), draw(l4)) for _ in range(2))
    u32 = st.integers(0, 0xFFFFFFFF)
    return Flow(
        *(family, proto, draw(st.integers(0, 0xFFFF)), orig, reply),
        draw(st.sampled_from((0x8, 0xA, 0xE))),
        draw(u32),
        mark=draw(st.none() | u32),
        labels=draw(st.none() | st.binary(min_size=16, max_size=16)),
        helper=draw(st.none() | st.from_regex(r"[a-z0-9-]{1,15}", fullmatch=True)),
        seqadj=draw(st.none() | st.just((SeqAdj(1, -(2**31), 2**31 - 1), SeqAdj(2**32 - 1, 0, 0)))),
    )


@given(flows())
def test_every_flow_survives_the_round_trip(flow: Flow) -> None:
    (message,) = ctnetlink.parse_messages(ctnetlink.create(flow))
    got = message.flow
    assert got is not None
    if flow.proto == k.IPPROTO_TCP and flow.assured:
        got = got._replace(state=None, tcp_flags=None)  # an assured flow without a state is said to be established
    if flow.proto == k.IPPROTO_GRE:
        got = got._replace(status=got.status & ~k.IPS_FIXED_TIMEOUT)
    assert got == flow
    assert ctnetlink.flow_of_key(flow.key).orig == flow.orig


@given(flows(), st.booleans())
def test_the_usual_tuple_layout_and_the_walk_agree(flow: Flow, foreign: bool) -> None:
    """The comparison of whole layouts must never accept what the attribute walk reads differently."""
    data = bytearray(ctnetlink.create(flow))
    length = struct.unpack_from("=H", data, 20)[0]
    value = data[24 : 20 + length]
    if foreign:
        value[4] ^= 1  # the length of the source address
        with pytest.raises(NetlinkError):
            ctnetlink.decode_tuple(bytes(value), flow.family)
    else:
        got = ctnetlink.decode_tuple(bytes(value), flow.family)
        assert got == ctnetlink._walk_tuple(bytes(value), flow.family) == (flow.proto, flow.orig, 0)
