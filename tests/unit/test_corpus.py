# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Recorded messages of a real kernel: our codec, pyroute2 and conntrack(8) read the same out of them."""

from __future__ import annotations

import json
import re
import socket
import struct
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import constants as k
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import ctnetlink, rows, wire
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.ctnetlink import Kind, Message
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.flow import Flow, Tuple
from pyroute2.netlink.nfnetlink.nfctsocket import nfct_msg

CORPUS = Path(__file__).resolve().parents[1] / "corpus" / "ctnetlink.jsonl"
RECORDS = [json.loads(line) for line in CORPUS.read_text(encoding="ascii").splitlines()[1:]]
KINDS = {"[NEW]": Kind.NEW, "[UPDATE]": Kind.UPDATE, "[DESTROY]": Kind.DESTROY}


def read(record: dict[str, str]) -> tuple[Message, Flow]:
    (message,) = ctnetlink.parse_messages(bytes.fromhex(record["hex"]))
    assert message.flow is not None
    return message, message.flow


def text_of(flow: Flow, direction: Tuple) -> dict[str, str]:
    """A tuple in conntrack's words."""
    family = socket.AF_INET if flow.family == k.AF_INET else socket.AF_INET6
    out = {"src": socket.inet_ntop(family, direction.src), "dst": socket.inet_ntop(family, direction.dst)}
    if flow.proto in k.ICMP_PROTOCOLS:
        ident, kind, code = struct.unpack("!HBB", direction.l4)
        out.update(type=str(kind), code=str(code), id=str(ident))
    elif flow.proto == k.IPPROTO_GRE:
        out.update(zip(("srckey", "dstkey"), (hex(key) for key in struct.unpack("!HH", direction.l4))))
    elif direction.l4:
        out.update(zip(("sport", "dport"), (str(port) for port in struct.unpack("!HH", direction.l4))))
    return out


def expected(line: str) -> dict[str, Any]:
    """What conntrack's line says: ``[KIND] ipv4 2 tcp 6 [timeout] [STATE] key=value ...``."""
    words = line.split()
    kind = KINDS[words.pop(0)] if words[0] in KINDS else Kind.DUMP
    bare = [word for word in words if "=" not in word and not word.startswith("[")]
    numbers = [int(word) for word in bare if word.isdigit()]
    sides: list[dict[str, str]] = [{}, {}]
    rest: dict[str, str] = {}
    seen: dict[str, int] = {}
    pairs = [word.split("=", 1) for word in words if "=" in word]
    for name, value in pairs:
        times = seen[name] = seen.get(name, -1) + 1
        in_tuple = name in {"src", "dst", "sport", "dport", "type", "code", "srckey", "dstkey"}
        if in_tuple or (name == "id" and " icmp" in line and times < 2):
            sides[times][name] = value
        else:
            rest[name] = value
    return {
        "kind": kind,
        "family": numbers[0],
        "proto": numbers[1],
        "timeout": numbers[2] if len(numbers) > 2 else None,
        "state": next((word for word in bare if word.isupper()), None),
        "sides": sides,
        "rest": rest,
        "assured": "[ASSURED]" in words,
        "replied": "[UNREPLIED]" not in words,
    }


@pytest.mark.parametrize("number", range(len(RECORDS)))
def test_conntrack_reads_the_same(number: int) -> None:
    record = RECORDS[number]
    message, flow = read(record)
    want = expected(record["said"])
    rest = want["rest"]
    assert (message.kind, flow.family, flow.proto) == (want["kind"], want["family"], want["proto"])
    assert [text_of(flow, flow.orig), text_of(flow, flow.reply)] == want["sides"]
    assert flow.ident == int(rest["id"])
    assert flow.assured == want["assured"]
    assert flow.replied == want["replied"]
    if message.kind == Kind.DUMP:  # conntrack -L was a moment before the dump
        assert flow.timeout is not None and 0 <= want["timeout"] - flow.timeout <= 5
        assert flow.mark == int(rest["mark"])
    else:
        assert flow.timeout == want["timeout"]
        assert (flow.mark or 0) == int(rest.get("mark", 0))
    names = {k.IPPROTO_TCP: k.TCP_STATE_NAMES, k.IPPROTO_SCTP: k.SCTP_STATE_NAMES}.get(flow.proto)
    assert want["state"] == (names[flow.state] if names is not None and flow.state is not None else None)
    assert flow.zone == int(rest.get("zone") or rest.get("zone-orig") or 0)
    assert flow.helper == rest.get("helper")
    portid = re.search(r"\[USERSPACE\] portid=(\d+)", record["said"])
    if portid is not None:
        assert message.portid == int(portid[1])


def attribute(nla: Any, *path: str) -> Any:
    for name in path:
        nla = nla.get_attr(name) if nla is not None else None
    return nla


def oracle_tuple(nla: Any, family: int) -> tuple[Any, ...]:
    version = "V4" if family == k.AF_INET else "V6"
    out = [nla.get_attr("CTA_TUPLE_IP").get_attr(f"CTA_IP_{version}_{end}") for end in ("SRC", "DST")]
    proto = nla.get_attr("CTA_TUPLE_PROTO")
    return (*out, *(value for _name, value, *_flags in proto["attrs"]))


def our_tuple(flow: Flow, direction: Tuple, proto: int) -> tuple[Any, ...]:
    family = socket.AF_INET if flow.family == k.AF_INET else socket.AF_INET6
    addresses = tuple(socket.inet_ntop(family, packed) for packed in (direction.src, direction.dst))
    layout = "!HBB" if proto in k.ICMP_PROTOCOLS else "!HH"
    return (*addresses, proto, *(struct.unpack(layout, direction.l4) if direction.l4 else ()))


@pytest.mark.parametrize("number", range(len(RECORDS)))
def test_pyroute2_reads_the_same(number: int) -> None:
    message, flow = read(RECORDS[number])
    other = nfct_msg(bytes.fromhex(RECORDS[number]["hex"]))
    other.decode()
    get = other.get_attr
    assert other["nfgen_family"] == flow.family
    assert (other["header"]["pid"], other["header"]["flags"]) == (message.portid, message.flags)
    for name, direction in (("ORIG", flow.orig), ("REPLY", flow.reply)):
        assert oracle_tuple(get(f"CTA_TUPLE_{name}"), flow.family) == our_tuple(flow, direction, flow.proto)
    assert (get("CTA_STATUS") or 0, get("CTA_TIMEOUT"), get("CTA_MARK"), get("CTA_ID")) == (
        *(flow.status, flow.timeout, flow.mark, flow.ident),
    )
    assert attribute(get("CTA_TIMESTAMP"), "CTA_TIMESTAMP_START") == flow.start
    labels = get("CTA_LABELS")
    assert labels == (None if flow.labels is None else int.from_bytes(flow.labels, "little"))
    master = get("CTA_TUPLE_MASTER")
    assert (master is None) == (flow.master is None)
    if flow.master is not None:
        assert oracle_tuple(master, flow.family) == our_tuple(flow, flow.master, flow.master_proto)
    for number_, name in enumerate(("ORIG", "REPLY")):
        adjusted = get(f"CTA_SEQ_ADJ_{name}")
        assert (adjusted is None) == (flow.seqadj is None)
        if flow.seqadj is not None:
            assert tuple(value for _name, value, *_flags in adjusted["attrs"]) == flow.seqadj[number_]
    tcp = attribute(get("CTA_PROTOINFO"), "CTA_PROTOINFO_TCP")
    if tcp is not None:
        assert tcp.get_attr("CTA_PROTOINFO_TCP_STATE") == flow.state
        for number_, name in enumerate(("ORIGINAL", "REPLY")):
            scale, flags = (tcp.get_attr(f"CTA_PROTOINFO_TCP_{what}_{name}") for what in ("WSCALE", "FLAGS"))
            assert scale == (flow.tcp_wscale[number_] if flow.tcp_wscale is not None else None)
            assert (flags[0] if flags is not None else None) == (flow.tcp_flags[number_] if flow.tcp_flags else None)
    elif flow.proto == k.IPPROTO_TCP:
        assert flow.state is None and flow.tcp_flags is None
    if flow.proto == k.IPPROTO_SCTP and flow.state is not None:
        sctp = attribute(get("CTA_PROTOINFO"), "CTA_PROTOINFO_SCTP")
        assert sctp.get_attr("CTA_PROTOINFO_SCTP_STATE") == flow.state


def test_every_message_survives_the_sync_link_and_can_be_made_again() -> None:
    for record in RECORDS:
        _message, flow = read(record)
        want = flow._replace(start=None, ident=None, mark=flow.mark or 0, status=flow.status & 0xFFFF)
        if flow.tcp_flags is not None:  # of the flags those that mean something elsewhere; no scale is scale 0
            first, second = (one & 15 for one in flow.tcp_flags)
            want = want._replace(tcp_flags=(first, second), tcp_wscale=flow.tcp_wscale or (0, 0))
        assert rows.unpack(*wire.decode_flow_record(wire.encode_flow_record(*rows.pack(flow)))) == want
        (made,) = ctnetlink.split(ctnetlink.create(flow, liberal=False))
        again = ctnetlink.decode_flow(made[4])
        assert (again.key, again.mark, again.labels, again.helper, again.master, again.seqadj) == (
            *(flow.key, flow.mark, flow.labels, flow.helper, flow.master, flow.seqadj),
        )


def test_the_corpus_has_every_kind() -> None:
    """What a new recording must not lose."""
    read_all = [read(record) for record in RECORDS]
    kinds = {(message.kind, flow.family, flow.proto) for message, flow in read_all}
    for kind in (Kind.NEW, Kind.UPDATE, Kind.DESTROY, Kind.DUMP):
        assert {(kind, k.AF_INET, k.IPPROTO_TCP), (kind, k.AF_INET, k.IPPROTO_UDP)} <= kinds, kind
    protocols = {(flow.family, flow.proto) for _message, flow in read_all}
    both_families = {(family, one) for family in (k.AF_INET, k.AF_INET6) for one in (6, 17, 47, 50, 132)}
    assert both_families | {(k.AF_INET, 1), (k.AF_INET6, 58)} <= protocols
    for family in (k.AF_INET, k.AF_INET6):
        assert (Kind.DUMP, family, k.IPPROTO_SCTP) in kinds
        assert any(
            flow.sctp_vtags and flow.state == k.SCTP_STATE_NAMES.index("ESTABLISHED")
            for _message, flow in read_all
            if flow.family == family
        )
    nat = {(flow.family, flow.snat, flow.dnat) for _message, flow in read_all}
    both = {(k.AF_INET, True, True), (k.AF_INET, False, False)}
    assert both | {(family, *way) for family in (2, 10) for way in ((True, False), (False, True))} <= nat
    flows = [flow for _message, flow in read_all]
    assert {0, 5, 7, 9} <= {flow.zone for flow in flows}
    for name in ("labels", "helper", "master", "tcp_wscale", "sctp_vtags"):
        assert any(getattr(flow, name) for flow in flows), name
    assert any(flow.seqadj and flow.seqadj[0].offset_after for flow in flows)
    assert {None, 0x12345678, 9, 10} <= {flow.mark for flow in flows}
    ended = [message for message, _flow in read_all if message.kind == Kind.DESTROY]
    assert {bool(message.portid) for message in ended} == {True, False}  # by request, by the timer
    assert any(message.kind == Kind.NEW and message.portid for message, _flow in read_all)  # made over ctnetlink
    assert {flow.start is None for message, flow in read_all if message.kind == Kind.DUMP} == {True, False}
    assert any("packets=" in record["said"] for record in RECORDS)
    assert CORPUS.stat().st_size < 300_000
