# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The parsers of foreign bytes, each with good inputs, and with what must hold for any input whatever.

A runner takes one input after the other and tells whether it was accepted.  It lets pass the one documented error of
its parser and raises for everything else: another exception, a broken promise, a table that grew beyond its bound.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import functools
import itertools
import json
import logging
import os
import random
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Iterator, NamedTuple, Sequence

from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import (
    client,
    columns,
    config,
    control,
    crypto,
    ctnetlink,
    daemon,
    engine,
    expectation,
    expectation_render,
    netlink,
    readiness,
    recorder,
    render,
    rows,
    service,
    session,
    vrrp,
    wire,
)
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import constants as k
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.errors import (
    ConfigError,
    NetlinkError,
    WireError,
)
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.flow import Flow, SeqAdj, Tuple
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.jobs import (
    CREATE,
    DELETE,
    TIMER,
    UPDATE,
    Job,
    Request,
)
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.rows import Changes
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.situation import (
    EXTERNAL_CACHE,
    HOT_STANDBY,
    Settings,
)

from .mutate import Grammar, netlink_lengths, tlv_lengths

Runner = Callable[[bytes], bool]

SECRET = bytes(range(32))
OWN = (bytes((192, 168, 0, 1)), bytes((192, 168, 1, 1)), bytes((192, 168, 0, 100)))
EXPECTATION_CORPUS = Path(__file__).resolve().parents[1] / "corpus" / "expectations.jsonl"
EXPECTATION_LIMIT = 12
WIRE_CORPUS = Path(__file__).resolve().parents[1] / "corpus" / "wire.jsonl"
PAYLOAD = 1400
TABLE_LIMIT = 64
WINDOW_BLOCKS = 512  # docs/protocol.md


class Target(NamedTuple):
    """A parser.  ``fresh`` makes a runner; ``batch`` inputs go to one runner; ``share`` of all inputs, in parts.

    ``work``: most lines of Python that an input may cost: so many, and so many more per byte.
    """

    name: str
    grammar: Callable[[], Grammar]
    fresh: Callable[[], Runner]
    batch: int
    share: int
    work: tuple[int, int]


def check(condition: object, what: str) -> None:
    """A promise."""
    if not condition:
        raise AssertionError(what)


# --- flows ---

ALIVE = k.IPS_SEEN_REPLY | k.IPS_ASSURED | k.IPS_CONFIRMED
SNAT = k.IPS_SRC_NAT | k.IPS_SRC_NAT_DONE | k.IPS_DST_NAT_DONE


def _ports(one: int, two: int) -> bytes:
    return struct.pack("!HH", one, two)


def _v6(last: int) -> bytes:
    return bytes.fromhex("fd00c0de") + bytes(11) + bytes((last,))


_A, _B, _VIP = bytes((192, 168, 0, 3)), bytes((192, 168, 1, 3)), bytes((192, 168, 1, 100))

FLOWS = (
    Flow(
        *(k.AF_INET, k.IPPROTO_TCP, 0, Tuple(_A, _B, _ports(51356, 22)), Tuple(_B, _VIP, _ports(22, 40000))),
        *(ALIVE | SNAT, 431999, k.TCP_ESTABLISHED),
        tcp_wscale=(7, 9),
        tcp_flags=(0x23, 0x33),
        mark=0,
    ),
    Flow(
        *(
            k.AF_INET6,
            k.IPPROTO_TCP,
            9,
            Tuple(_v6(3), _v6(9), _ports(1025, 80)),
            Tuple(_v6(9), _v6(3), _ports(80, 1025)),
        ),
        *(ALIVE, 60, k.TCP_TIME_WAIT),
        tcp_wscale=(1, 2),
        tcp_flags=(3, 3),
        mark=0xFFFFFFFF,
        labels=bytes(range(16)),
    ),
    Flow(
        *(k.AF_INET, k.IPPROTO_ICMP, 0, Tuple(_A, _B, b"\0\x4d\x08\0"), Tuple(_B, _VIP, b"\x04\x35\0\0")),
        *(ALIVE | SNAT, 30),
    ),
    Flow(
        *(
            k.AF_INET6,
            k.IPPROTO_ICMPV6,
            0,
            Tuple(_v6(3), _v6(9), b"\0\x4e\x80\0"),
            Tuple(_v6(9), _v6(3), b"\0\x4e\x81\0"),
        ),
        *(ALIVE, 30),
    ),
    Flow(
        *(k.AF_INET, k.IPPROTO_SCTP, 0, Tuple(_A, _B, _ports(9899, 2905)), Tuple(_B, _A, _ports(2905, 9899))),
        *(ALIVE, 210, k.SCTP_ESTABLISHED),
        sctp_vtags=(0xDEADBEEF, 7),
    ),
    Flow(*(k.AF_INET, 50, 0, Tuple(_A, _B, b""), Tuple(_B, _A, b""), ALIVE, None)),
    Flow(
        *(k.AF_INET, k.IPPROTO_TCP, 0, Tuple(_B, _VIP, _ports(20, 1026)), Tuple(_A, _B, _ports(1026, 20))),
        *(ALIVE | k.IPS_EXPECTED | k.IPS_DST_NAT | k.IPS_SEQ_ADJUST, 300, k.TCP_ESTABLISHED),
        helper="ftp",
        master=Tuple(_A, _B, _ports(51357, 21)),
        master_proto=k.IPPROTO_TCP,
        seqadj=(SeqAdj(0x80000001, 0, -3), SeqAdj(5, 2, 4)),
    ),
    Flow(
        *(k.AF_INET, k.IPPROTO_UDP, 0, Tuple(_A, _B, _ports(5000, 53)), Tuple(_B, _A, _ports(53, 5000))),
        *(ALIVE, 120),
    ),
    Flow(*(k.AF_INET, k.IPPROTO_DCCP, 0, Tuple(_A, _B, _ports(1, 2)), Tuple(_B, _A, _ports(2, 1)), ALIVE, 120, 3)),
)


def shown(flow: Flow) -> None:
    """Every way to show and to write a flow that came from outside."""
    render.line(flow, 5).encode()
    render.xml(flow).encode()
    check("\n" not in render.line(flow) and "\n" not in render.xml(flow), "a flow is one line")
    json.loads(render.json_line(flow, None))


def requested(request: Request) -> int:
    """The request as the kernel would get it; 0, or the errno that the daemon takes if it cannot be expressed."""
    try:
        message = daemon._message(request)
    except NetlinkError as error:
        return error.errno or errno.EINVAL
    pieces = list(ctnetlink.split(message))
    check(len(pieces) == 1 and len(message) < 4096, "one request is one short message")
    ctnetlink.attributes(pieces[0][4], 4)
    return 0


def _batches(key_len: int, keys: Sequence[bytes], values: Sequence[bytes]) -> None:
    """Rows as the kernel would get them, many at once."""
    for make in (columns.create, columns.update):
        try:
            batch = make(key_len, keys, values, [1] * len(keys), 7)
        except NetlinkError:
            continue
        check(sorted(batch.order) == list(range(len(keys))), "each row is one request")


def carried_out(job: Job, chance: random.Random) -> list[tuple[int, int]]:
    """What the kernel refuses of a job, at random."""
    if isinstance(job, Request):
        error = requested(job) or chance.choice(_ERRNOS)
        return [(0, error)] if error else []
    if job.values:
        _batches(job.key_len, job.keys, job.values)
    answers = ((index, chance.choice(_ERRNOS)) for index in range(len(job.keys)))
    return [(index, error) for index, error in answers if error]


def changes(flows: Sequence[Flow], gone: Sequence[bytes] = ()) -> rows.Changes:
    """Flows as the kernel's edge gives them."""
    gathering = columns.Gathering()
    for flow in flows:
        gathering.flow(flow)
    found = gathering.changes(len(flows))
    return found._replace(gone=[*found.gone, *gone])


def recorded_expectations() -> list[bytes]:
    """Messages of a kernel."""
    lines = EXPECTATION_CORPUS.read_text(encoding="ascii").splitlines()[1:]
    return [bytes.fromhex(json.loads(line)["hex"]) for line in lines]


def _expectations() -> list[expectation.Expectation]:
    """Of FTP (both families) and SIP; two in a zone, of one direction and of both."""
    read = (next(expectation.parse_messages(message)).expectation for message in recorded_expectations())
    found = list({one.name: one for one in read if one is not None}.values())
    return [*found, found[0]._replace(zone=9), found[1]._replace(zone=7, zone_dir=1, used=True)]


def expectation_shown(one: expectation.Expectation) -> None:
    """Every way to show and to write an expectation that came from outside."""
    texts = (expectation_render.line(one, 5), expectation_render.xml(one), expectation_render.json_line(one))
    check(not any("\n" in text for text in texts), "an expectation is one line")
    for make in (expectation.create, functools.partial(expectation.set_timer, seconds=5), expectation.delete):
        try:
            message = make(one)
        except NetlinkError:
            continue
        pieces = list(ctnetlink.split(message))
        check(len(pieces) == 1 and len(message) < 4096, "one request is one short message")
        ctnetlink.attributes(pieces[0][4], 4)


# --- the sync protocol: codecs ---


def _row_records(flows: Sequence[Flow]) -> Iterator[bytes]:
    """ROWS records of flows, one for each shape."""
    groups: dict[int, bytes] = {}
    for flow in flows:
        key, value, _extras = rows.pack(flow)
        groups[len(key)] = groups.get(len(key), b"") + key + value
    for key_len, joined in groups.items():
        yield wire.tlv(wire.RECORD_ROWS, wire.encode_rows(key_len, joined))


def _gone_records(flows: Sequence[Flow]) -> Iterator[bytes]:
    for flow in flows:
        yield wire.tlv(wire.RECORD_GONE, wire.encode_gone(len(flow.key), flow.key))


def _flow_record(flow: Flow) -> bytes:
    return wire.tlv(wire.RECORD_FLOW, wire.encode_flow_record(*rows.pack(flow)))


def _comparison_records() -> list[bytes]:
    """What two nodes tell each other to compare their tables."""
    some = wire.Compare(7, wire.COMPARE_REPORT, frozenset(range(1024)))
    few = wire.Compare(8, wire.COMPARE_REPAIR, frozenset((0, 9, 1023)))
    report = wire.Report(7, 9, (1, 0, 0, 2, 0, 0, 1), [(0, FLOWS[0].key), (3, FLOWS[1].key), (6, FLOWS[5].key)])
    (one,) = _row_records(FLOWS[:1])
    return [
        wire.encode_digest(0, 0),
        wire.encode_digest(9, 1 << 63),
        wire.tlv(wire.RECORD_BUCKETS_REQUEST),
        *(wire.encode_sums(wire.RECORD_BUCKETS, 1, first, [first] * 32) for first in (0, 512, 992)),
        wire.encode_compare(wire.RECORD_COMPARE_REQUEST, few),
        wire.encode_compare(wire.RECORD_COMPARE_BEGIN, some),
        wire.encode_compare(wire.RECORD_COMPARE_BEGIN, few),
        wire.tlv(wire.RECORD_COMPARE_ROWS, one[wire.TLV_BYTES :]),
        wire.tlv(wire.RECORD_COMPARE_FLOW, _flow_record(FLOWS[6])[wire.TLV_BYTES :]),
        wire.encode_compare_end(7, 2),
        wire.encode_compare_end(8, 2),
        wire.encode_number(wire.RECORD_STATES_BEGIN, 3),
        *(wire.encode_sums(wire.RECORD_STATES, 3, first, [0] * 32) for first in range(0, 1024, 32)),
        wire.encode_report(report, 600),
    ]


def _many(count: int) -> list[Flow]:
    """Connections to a few ports: their record has columns of each mode."""
    return [
        FLOWS[0]._replace(
            orig=FLOWS[0].orig._replace(l4=_ports(40000 + 77 * number, (22, 80, 443)[number % 3])),
            reply=FLOWS[0].reply._replace(l4=_ports((22, 80, 443)[number % 3], 40000 + 77 * number)),
        )
        for number in range(count)
    ]


def _wire_seeds() -> list[bytes]:
    hello = wire.Hello(bytes(range(16)), "fw2", 0, "0.1.0")
    singles = [_flow_record(flow) for flow in FLOWS]
    many = [*_row_records(_many(3)), *_row_records(_many(40)), *_row_records(FLOWS), *_gone_records(FLOWS)]
    many.append(wire.tlv(wire.RECORD_GONE, wire.encode_gone(13, b"".join(flow.key for flow in _many(31)))))
    return [
        wire.encode_header(wire.HELLO, 1, bytes(range(16)), 7) + bytes(40),
        wire.encode_header(wire.DATA, 1, bytes(range(16)), 1 << 40) + bytes(40),
        wire.encode_hello(hello),
        wire.encode_ack(wire.Ack(5, 517, 0b1100011))[wire.TLV_BYTES :],
        wire.encode_status(wire.Status(wire.ROLE_ACTIVE, 3, 1000))[wire.TLV_BYTES :],
        wire.encode_block(9, b"".join(many[:3]))[wire.TLV_BYTES :],
        wire.encode_keys({1: b"abcd", 2: b"efgh", 255: b"ijkl"})[wire.TLV_BYTES :],
        wire.encode_bulk_end(3, 9)[wire.TLV_BYTES :],
        b"".join(singles[:4]),
        *(record[wire.TLV_BYTES :] for record in singles + many + _comparison_records()),
        *(expectation.pack(one) for one in _expectations()),
        *(one.name for one in _expectations()),
        *(bytes.fromhex(json.loads(line)["payload"]) for line in WIRE_CORPUS.read_text(encoding="utf-8").splitlines()),
    ]


def _tlv_wrap(kind: int, inner: bytes) -> bytes:
    return wire.tlv(kind, inner)


def wire_grammar() -> Grammar:
    return Grammar(_wire_seeds(), tlv_lengths, _tlv_wrap, tuple(range(27)), (b"\0\0\0", b"\xff\xff\xff", bytes(16)))


def _round_trip(value: Any, encode: Callable[[Any], bytes], decode: Callable[[bytes], Any], skip: int) -> None:
    check(decode(encode(value)[skip:]) == value, f"{value!r} changes when it is written and read again")


def wire_runner() -> Runner:
    """Every decoder of the sync protocol, with the same bytes."""

    def flow(data: bytes) -> None:
        record = wire.decode_flow_record(data)
        check(wire.encode_flow_record(*record) == data, "a flow is written as it was read")
        one_flow(*record)

    def one_flow(key: bytes, value: bytes, extras: bytes = b"") -> None:
        found = rows.unpack(key, value, extras)
        check(found.key == key, "the key is that of the flow")
        again = rows.unpack(*rows.pack(found))
        check(again.orig == found.orig and again.reply == found.reply, "the tuples survive")
        shown(found)
        for operation in (CREATE, UPDATE, TIMER, DELETE):
            requested(Request(operation, found.key, found, found.timeout))

    def many(data: bytes) -> None:
        key_len, joined = wire.decode_rows(data)
        width = rows.SHAPES[key_len].row
        count, rest = divmod(len(joined), width)
        check(rest == 0 and 1 <= count <= wire.MAX_ROWS, "rows are whole, and not too many")
        check(wire.decode_rows(wire.encode_rows(key_len, joined)) == (key_len, joined), "rows survive")
        pairs = list(wire.iter_rows(key_len, joined))
        check(b"".join(map(b"".join, pairs)) == joined, "rows are keys and values")
        keys, values = [key for key, _value in pairs], [value for _key, value in pairs]
        for place in {0, count - 1}:
            one_flow(keys[place], values[place])
        _batches(key_len, keys, values)

    def gone(data: bytes) -> None:
        key_len, joined = wire.decode_gone(data)
        check(len(joined) % key_len == 0 and len(joined) <= wire.MAX_ROWS * key_len, "keys are whole, and not too many")
        check(wire.decode_gone(wire.encode_gone(key_len, joined)) == (key_len, joined), "keys survive")
        keys = wire.split_keys(key_len, joined)
        check(ctnetlink.flow_of_key(keys[0]).key == keys[0], "the key is that of the flow")

    def tlvs(data: bytes) -> None:
        size = sum(wire.TLV_BYTES + len(payload) for _kind, payload in wire.iter_tlv(data))
        check(size == len(data), "records cover their bytes")

    def hello(data: bytes) -> None:
        _round_trip(wire.decode_hello(data), wire.encode_hello, wire.decode_hello, 0)

    def ack(data: bytes) -> None:
        _round_trip(wire.decode_ack(data), wire.encode_ack, wire.decode_ack, wire.TLV_BYTES)

    def status(data: bytes) -> None:
        _round_trip(wire.decode_status(data), wire.encode_status, wire.decode_status, wire.TLV_BYTES)

    def heard(data: bytes) -> None:
        _round_trip(wire.decode_heard(data), wire.encode_heard, wire.decode_heard, wire.TLV_BYTES)

    def conditions(data: bytes) -> None:
        _round_trip(wire.decode_conditions(data), wire.encode_conditions, wire.decode_conditions, wire.TLV_BYTES)

    def probe(data: bytes) -> None:
        _round_trip(wire.decode_probe(data), wire.encode_probe, wire.decode_probe, wire.TLV_BYTES)

    def echo(data: bytes) -> None:
        _round_trip(wire.decode_echo(data), wire.encode_echo, wire.decode_echo, wire.TLV_BYTES)

    def part(data: bytes) -> None:
        _round_trip(wire.decode_part(data), wire.encode_part, wire.decode_part, wire.TLV_BYTES)

    def keys(data: bytes) -> None:
        _round_trip(wire.decode_keys(data), wire.encode_keys, wire.decode_keys, wire.TLV_BYTES)

    def foreseen(data: bytes) -> None:
        one = expectation.unpack(data)
        check(expectation.unpack(expectation.pack(one)) == one, "an expectation survives")
        check(expectation.unpack_name(one.name)[1:3] == (one.zone, one.proto), "so does its name")
        check(rows.unpack_key(one.master_key)[0].family == one.family, "its master is a flow of its family")
        expectation_shown(one)

    def compare(data: bytes) -> None:
        found = wire.decode_compare(data)
        check(all(0 <= one < wire.BUCKETS for one in found.buckets), "only buckets that exist")
        again = wire.encode_compare(wire.RECORD_COMPARE_BEGIN, found)[wire.TLV_BYTES :]
        check(wire.decode_compare(again) == found, "a comparison survives")

    def sums(data: bytes) -> None:
        number, first, found = wire.decode_sums(data)
        check(first + len(found) <= wire.BUCKETS and 1 <= len(found) <= wire.BUCKETS_TOLD, "only buckets that exist")
        check(wire.encode_sums(1, number, first, found)[wire.TLV_BYTES :] == data, "sums are written as they were read")

    def report(data: bytes) -> None:
        found = wire.decode_report(data)
        check(len(found.keys) <= len(data) // 11 and len(found.counts) == wire.REPORT_COUNTS, "keys are not made up")
        check(wire.encode_report(found, 1 << 20)[wire.TLV_BYTES :] == data, "a report is written as it was read")
        for _kind, key in found.keys:
            check(ctnetlink.flow_of_key(key).key == key, "the key is that of the flow")
            json.dumps(render.key_dict(ctnetlink.flow_of_key(key)))

    decoders: tuple[Callable[[bytes], Any], ...] = (
        *(foreseen, expectation.unpack_name),
        *(flow, many, gone, tlvs, hello, ack, status, heard, probe, echo, part, keys, wire.decode_header),
        *(wire.decode_block, wire.decode_bulk_begin, wire.decode_bulk_end, conditions),
        *(compare, sums, report, wire.decode_digest, wire.decode_number),
    )

    def run(data: bytes) -> bool:
        accepted = False
        for decode in decoders:
            try:
                decode(data)
                accepted = accepted or decode in (foreseen, flow, many, gone, hello, ack, status)
            except WireError as error:
                check(error.kind in ("malformed", "truncated", "wrong_version"), f"kind {error.kind}")
        return accepted

    return run


# --- the sync protocol: behind the authentication ---


class OpenCrypto:
    """No cryptography: the tag is 16 zeros.  What the mutations make goes straight to what reads the plaintext."""

    def derive(self, _secret: bytes, _salt: bytes, _info: bytes) -> OpenCrypto:
        return self

    def derive_digest(self, _secret: bytes, _salt: bytes, _info: bytes) -> Callable[[bytes, bytes], bytes]:
        return lambda _header, _plaintext: bytes(wire.DIGEST_BYTES)

    def seal(self, _nonce: bytes, plaintext: bytes, _header: bytes) -> bytes:
        return plaintext + bytes(wire.TAG_BYTES)

    def open(self, _nonce: bytes, sealed: bytes, _header: bytes) -> bytes:
        return sealed[: -wire.TAG_BYTES]


def _engine(
    name: str, peer: str, crypt: crypto.Crypto, seed: int, *, mode: str = HOT_STANDBY, secret: bytes = SECRET
) -> engine.Engine:
    chance = random.Random(seed)
    made = session.Session(
        *(name, peer),
        crypto=crypt,
        secrets={1: secret, 2: secret[::-1]},
        send_key=1,
        random=lambda count: bytes(chance.getrandbits(8) for _dummy in range(count)),
        version="0",
        payload=PAYLOAD,
        now=0.0,
    )
    ignore = ("192.168.100.0/24", "fd00:1::/64")
    settings = Settings(mode=mode, ignore=ignore, table_limit=TABLE_LIMIT, max_expectations=EXPECTATION_LIMIT)
    one = engine.Engine(settings, [made], 0.0)
    one.set_addresses(OWN)
    return one


_ECHO = b"\xec" * wire.NONCE_BYTES  # in an input: the nonce that the engine waits for
_DO_HELLO, _DO_ROLE, _DO_WAIT, _DO_EVENT, _DO_BARE = range(5)  # first byte of an input; more: a DATA datagram
_ERRNOS = (0, 0, 0, 0, errno.EEXIST, errno.ENOENT, errno.EBUSY, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOMEM)


class Peer:
    """The other end of an engine's session, without cryptography, and the engine's kernel."""

    def __init__(self, mode: str = HOT_STANDBY) -> None:
        self.now = 1.0
        self.engine = _engine("fw1", "fw2", OpenCrypto(), 1, mode=mode)
        self.engine.set_role(readiness.BACKUP, 0.0)
        self._nonces = itertools.count(1)
        self._number = 0
        self._sender = b""
        self.hello(wire.encode_hello(wire.Hello(_ECHO, "fw2", 0, "0")))
        check(self.engine.peers[0].session.established, "the handshake works")

    def hello(self, plaintext: bytes) -> None:
        sender = next(self._nonces).to_bytes(wire.NONCE_BYTES // 2, "big") * 2
        plaintext = plaintext.replace(_ECHO, self.engine.peers[0].session._hello.nonce)
        header = wire.encode_header(wire.HELLO, 1, sender, 0)
        self.engine.receive(0, header + bytes(wire.DIGEST_BYTES) + plaintext + bytes(wire.TAG_BYTES), self.now)
        known = self.engine.peers[0].session._established
        if known is not None and known.peer_nonce == sender:
            self._sender, self._number = sender, 0

    def data(self, frames: bytes) -> None:
        if not self.engine.peers[0].session.established:  # it was told that it is in a state of the past
            self.hello(wire.encode_hello(wire.Hello(_ECHO, "fw2", 0, "0")))
        header = wire.encode_header(wire.DATA, 1, self._sender, self._number)
        self._number += 1
        self.engine.receive(0, header + bytes(wire.DIGEST_BYTES) + frames + bytes(wire.TAG_BYTES), self.now)

    def turn(self, chance: random.Random) -> None:
        """What the daemon does after input: datagrams, requests to the kernel and their results."""
        one = self.engine
        out = one.poll(self.now)[0]
        check(len(out) <= 2 * WINDOW_BLOCKS + 64, f"{len(out)} datagrams at once")
        check(all(len(datagram) <= PAYLOAD for datagram in out), "no datagram is longer than configured")
        if one.dump is not None:
            one.dump_slice(changes(FLOWS[: int(chance.random() * len(FLOWS))]), self.now)
            one.dump_finished(chance.random() < 0.8, self.now)
        self._look_after_helpers(chance)
        for _dummy in range(200):
            jobs = one.kernel_work(256)
            if not jobs:
                break
            for job in jobs:
                one.kernel_results(job, carried_out(job, chance))
        else:
            raise AssertionError("requests to the kernel breed requests without end")
        check(len(one.peers[0].session._out) == 0, "everything was handed out")

    def _look_after_helpers(self, chance: random.Random) -> None:
        helpers = self.engine.helpers
        if helpers.walk is not None:
            helpers.walked(EXPECTATIONS[: int(chance.random() * len(EXPECTATIONS))], self.now)
            helpers.walk_ended(chance.random() < 0.8, self.now)
        for master in helpers.take_asks():
            helpers.told(master, chance.choice((None, EXPECTATIONS[:2], [])), self.now)
        for _dummy in range(20):
            jobs = helpers.work(256)
            if not jobs:
                break
            for job in jobs:
                try:
                    job.messages()
                    helpers.result(job, chance.choice(_ERRNOS))
                except NetlinkError:
                    helpers.result(job, errno.EINVAL)

    def bounded(self) -> None:
        source, replicas = self.engine.helpers.source, self.engine.helpers.replicas
        tables: tuple[Any, ...] = (source._known, source._lingering, replicas._table, replicas._wanted)
        check(all(len(table) <= EXPECTATION_LIMIT for table in (*tables, replicas._late)), "expectations are bounded")
        check(len(source._orphans) <= 1024 and len(source.asks) < 10_000, "and those of no flow")
        check(sum(map(len, source._of.values())) == len(source._known), "the index has what the table has")
        check(sum(map(len, replicas._of.values())) == len(replicas._table), "on the other side, too")
        one, known = self.engine, self.engine.peers[0].session._established
        waiting = len(one.peers[0].pending)
        check(len(one.cache) <= TABLE_LIMIT and waiting <= TABLE_LIMIT, "the tables keep their bounds")
        check(len(one.source.announced) <= 1000 + TABLE_LIMIT, "so does the set of what was announced")
        noted = (one.copies.asked, one.copies.outdated, one.copies.refused, one.copies._others)
        check(all(len(keys) <= TABLE_LIMIT for keys in noted), "and what is noted of the kernel's copies")
        check(len(one.provers[0]._wanted) <= 4, "comparisons that wait are few")
        check(len(one.counters) < 120 and len(one.peers[0].session.counters) < 40, "no input makes up counters")
        if known is not None:
            check(len(known.early) <= WINDOW_BLOCKS, "blocks ahead are bounded by the credit given")
            check(len(known.parts) <= WINDOW_BLOCKS, "so are blocks that come in parts")
            check(len(known.in_flight) <= WINDOW_BLOCKS, "blocks in flight are bounded, whatever the peer says")
            check(known.limit <= known.next_block + WINDOW_BLOCKS, "credit is bounded, whatever the peer says")


def _blocks(*records: bytes) -> Iterator[bytes]:
    for number, record in enumerate(records):
        yield wire.encode_block(number, record)


def session_grammar() -> Grammar:
    singles = [_flow_record(flow) for flow in FLOWS]
    states = b"".join((*_row_records(FLOWS), *singles))
    bulk = wire.encode_bulk_begin(1) + states + wire.encode_bulk_end(1, len(FLOWS))
    ends = b"".join(_gone_records(FLOWS))
    changed = b"".join(_row_records([FLOWS[0]._replace(reply=FLOWS[7].reply, mark=5)]))
    many = [*_row_records(_many(30)), *_row_records(_many(100))]
    foreseen = [wire.tlv(wire.RECORD_EXPECT, expectation.pack(one)) for one in _expectations()]
    foreseen += [wire.tlv(wire.RECORD_EXPECT_GONE, one.name) for one in _expectations()[::3]]
    masters = b"".join(_flow_record(flow) for flow in _masters())
    status = wire.encode_status(wire.Status(wire.ROLE_ACTIVE, wire.STATUS_REPLICATES, 9))
    ack = wire.encode_ack(wire.Ack(1, 513, 0b110))
    hello = wire.encode_hello(wire.Hello(_ECHO, "fw2", 0, "0.1.0"))
    blank = wire.encode_hello(wire.Hello(wire.NO_NONCE, "fw2", 0, "0.1.0"))
    frames = [
        *_blocks(bulk, states, ends, changed, singles[6], ends[:30] + changed, *many, many[0] + ends),
        *(wire.encode_block(number, singles[number % 9]) for number in (6, 7, 9, 500, 511, 512, 600)),
        wire.encode_block(0, wire.tlv(wire.RECORD_BULK_REQUEST)),
        wire.encode_block(1, wire.encode_bulk_begin(2)),
        wire.encode_block(2, wire.encode_bulk_end(2, 0)),
        *(wire.encode_block(0, record) for record in _comparison_records()),
        wire.encode_block(0, b"".join(_comparison_records()[6:13])),
        wire.encode_block(0, bulk + wire.encode_digest(9, 7) + b"".join(_comparison_records()[7:13])),
        *(status, ack, status + ack, wire.tlv(wire.FRAME_BYE), wire.encode_ack(wire.Ack(0, 1 << 63, 0))),
        wire.encode_ack(wire.Ack(0, 2, 1)) + wire.encode_block(1, singles[0]),
        *(wire.encode_heard(wire.Heard(number, 0)) + ack for number in (0, 2, 9, 1 << 62)),
        wire.encode_heard(wire.Heard(1, 0)) + wire.encode_ack(wire.Ack(0, 512, 0b110)),
        *(wire.encode_probe(wire.Probe(link, True, number), 99) for link, number in ((0, 0), (0, 1 << 31), (1, 5))),
        *(wire.encode_echo(wire.Echo(link, number, 7)) for link, number in ((0, 0), (0, 1), (9, 0))),
        *(
            wire.encode_part(wire.Part(block, at, 9, b"abc"))
            for block, at in ((0, 0), (0, 3), (0, 6), (1, 0), (999, 0))
        ),
        *(wire.encode_keys({key_id: bytes(4), 9: b"abcd"}) for key_id in (1, 2)),
    ]
    seeds = [bytes((what,)) + frame for frame in frames for what in (5, 100, 252)]
    seeds += [bytes((_DO_HELLO,)) + hello, bytes((_DO_HELLO,)) + blank]
    seeds += [bytes((_DO_ROLE,)) + status, bytes((_DO_WAIT,)) + ack, bytes((_DO_BARE,)) + bulk]
    seeds += [bytes((_DO_EVENT,)) + single[wire.TLV_BYTES :] for single in singles]
    seeds += [bytes((_DO_BARE,)) + record for record in many]
    seeds += [bytes((_DO_BARE,)) + masters + b"".join(foreseen), bytes((_DO_BARE,)) + b"".join(foreseen[::2])]
    seeds += [bytes((_DO_BARE,)) + record for record in foreseen]
    numbers = tuple(struct.pack("!Q", number) for number in (0, 1, 2, 3, 511, 512, 1 << 63, (1 << 64) - 1))
    return Grammar(seeds, functools.partial(tlv_lengths, start=1), _tlv_wrap, tuple(range(27)), (_ECHO, *numbers))


def _numbered(one: engine.Engine, frames: bytes, what: int) -> bytes:
    """Often the block at the beginning gets the number that the engine waits for, or one near it."""
    known = one.peers[0].session._established
    if known is None or what < 100 or len(frames) < 11 or frames[0] != wire.FRAME_BLOCK:
        return frames
    return frames[:3] + struct.pack("!Q", known.expected + max(0, what - 250)) + frames[11:]


def _session_runner(mode: str) -> Runner:
    peer = Peer(mode)
    block = itertools.count()

    def run(data: bytes) -> bool:
        what, rest = (data[0], data[1:]) if data else (9, b"")
        chance = random.Random(zlib.crc32(data))
        taken = peer.engine.peers[0].session.counters["blocks_received"]
        peer.now += 0.003
        if what == _DO_HELLO:
            peer.hello(rest)
        elif what == _DO_EVENT:
            try:
                flow = rows.unpack(*wire.decode_flow_record(rest))
            except WireError:
                return False
            ended = [flow.key] if chance.random() < 0.5 else []
            peer.engine.kernel_changes(changes([flow] if chance.random() < 0.7 else [], ended), peer.now)
        elif what == _DO_BARE:  # records in a block of the right number
            known = peer.engine.peers[0].session._established
            peer.data(wire.encode_block(known.expected if known else next(block), rest[:9000]))
        else:
            if what == _DO_ROLE:
                roles = (readiness.ACTIVE, readiness.BACKUP, readiness.TRANSITION)
                peer.engine.set_role(roles[len(rest) % 3], peer.now)
            elif what == _DO_WAIT:
                peer.now += 1.0
            peer.data(_numbered(peer.engine, rest, what))
        peer.turn(chance)
        peer.bounded()
        if chance.random() < 0.02:
            peer.engine.verify(peer.now).look(peer.now)
        if chance.random() < 0.05:
            for flow, _since in peer.engine.external_flows():
                shown(flow)
            peer.engine.verdict(peer.now)
            json.dumps(peer.engine.peer_status(peer.now))
        return peer.engine.peers[0].session.counters["blocks_received"] > taken

    return run


EXPECTATIONS = _expectations()


def _masters() -> Iterator[Flow]:
    """The flows whose helpers foresaw them."""
    for key, one in {one.master_key: one for one in EXPECTATIONS}.items():
        flow = ctnetlink.flow_of_key(key)
        state = k.TCP_ESTABLISHED if flow.proto == k.IPPROTO_TCP else None
        yield flow._replace(status=ALIVE | k.IPS_SRC_NAT, timeout=500, state=state, tcp_flags=(3, 3), helper=one.helper)


# --- the sync protocol: before the authentication ---


class _Exchange(NamedTuple):
    """An engine in a session, and datagrams that must not do anything to it any more."""

    engine: engine.Engine
    peer: engine.Engine
    dead: list[bytes]


def _exchange() -> _Exchange:
    """A session with real cryptography, state replicated, everything delivered once; then the datagrams of it, of an
    older session, of the engine itself, of other keys, nodes and versions."""
    dead: list[bytes] = []
    crypt = crypto.LibraryCrypto()
    one = _engine("fw1", "fw2", crypt, 11)
    one.set_role(readiness.BACKUP, 0.0)
    two = _engine("fw2", "fw1", crypt, 12)
    for life in range(2):
        two = _engine("fw2", "fw1", crypt, 20 + life)
        two.set_role(readiness.ACTIVE, 0.0)
        now = 1.0 + 100 * life
        for step in range(60):
            now += 0.05
            if step == 20:
                two.kernel_changes(changes((FLOWS[0], FLOWS[2])), now)
            for datagram in two.poll(now)[0]:
                one.receive(0, datagram, now)
                dead.append(datagram)
            for datagram in one.poll(now)[0]:
                two.receive(0, datagram, now)
                dead.append(datagram)
            if two.dump is not None:
                two.dump_slice(changes(FLOWS), now)
                two.dump_finished(True, now)
            if one.dump is not None:
                one.dump_finished(True, now)
            for job in one.kernel_work(999):
                one.kernel_results(job, ())
    check(len(one.cache) >= 5 and one.complete, "the exchange replicated something")
    for name, secret in (("fw2", bytes(32)), ("fw3", SECRET)):
        stranger = _engine(name, "fw1", crypt, 40, secret=secret)
        dead += stranger.poll(1.0)[0]
    unique = list(dict.fromkeys(dead))
    return _Exchange(one, two, unique)


@functools.lru_cache(maxsize=1)
def _dead_datagrams() -> tuple[bytes, ...]:
    dead = _exchange().dead
    hellos = [datagram for datagram in dead if datagram[1] == wire.HELLO]
    data = sorted((datagram for datagram in dead if datagram[1] == wire.DATA), key=len)
    return (*hellos[:8], *hellos[-8:], *data[:20], *data[-20:], *data[len(data) // 2 :][:20])


def sealed_grammar() -> Grammar:
    return Grammar(_dead_datagrams(), None, None, (), (b"\2\1\1\0", b"\2\2\1\0", b"\2\2\2\0", b"\1\2\1\0"))


def _state(one: engine.Engine) -> tuple[Any, ...]:
    known = one.peers[0].session._established
    part: tuple[Any, ...] = ()
    if known is not None:
        part = (id(known), known.highest, known.seen, known.expected, len(known.early), known.limit, known.next_block)
    return (
        *part,
        [(replica, one.copies.held(replica.key)) for replica in one.cache.items()],
        *(
            len(one.peers[0].pending),
            len(one.replicas.jobs),
            one.dump,
            one.complete,
            one.role,
            one.peers[0].status,
            one.peers[0].session.last_seen,
        ),
        one.peers[0].session._hello.nonce,
    )


def sealed_runner() -> Runner:
    """Datagrams as they come from the link.  None of them may change anything but counters.

    The peer is silent and the session doubted, which is what the first datagram of another session does.
    """
    one = _exchange().engine
    nonce = one.peers[0].session._hello.nonce
    other = wire.encode_header(wire.DATA, 1, bytes(wire.NONCE_BYTES), 0) + bytes(wire.DIGEST_BYTES + wire.TAG_BYTES)
    one.receive(0, other, 300.0)
    check(one.peers[0].session._hello.nonce != nonce and len(one.peers[0].session._out) == 1, "the session is doubted")
    one.peers[0].session._out.clear()
    before = _state(one)
    moment = [300.0]

    def run(data: bytes) -> bool:
        counters = one.peers[0].session.counters
        dropped = sum(count for name, count in counters.items() if name.startswith("dropped_"))
        hellos = counters["hellos_received"]
        moment[0] += 0.07
        one.receive(0, data, moment[0])
        heard = counters["hellos_received"] > hellos  # a true HELLO of the past: heard, perhaps answered, no more
        now_dropped = sum(count for name, count in counters.items() if name.startswith("dropped_"))
        check(heard or now_dropped == dropped + 1, "what is dropped is counted")
        check(_state(one) == before, "a datagram that fails authentication changed the state")
        check(len(one.peers[0].session._out) <= 1, "at most one answer")
        one.peers[0].session._out.clear()
        return False

    return run


# --- netlink ---


class _FakeSocket:
    """What a netlink socket reads, datagram by datagram; then nothing is there."""

    def __init__(self) -> None:
        self.waiting: list[bytes] = []

    def recv_into(self, buffer: memoryview, _size: int = 0, _flags: int = 0) -> int:
        if not self.waiting:
            raise BlockingIOError
        data = self.waiting.pop(0)[: len(buffer)]
        buffer[: len(data)] = data
        return len(data)

    def recvfrom_into(self, buffer: memoryview, _size: int = 0, _flags: int = 0) -> tuple[int, tuple[int, int]]:
        return self.recv_into(buffer), (0, 0)


class _Netlink:
    """Event socket and table dump on a fake socket: by columns, or everything the general way."""

    def __init__(self, by_columns: bool) -> None:
        self._socket = _FakeSocket()
        self._events = netlink.EventSocket.__new__(netlink.EventSocket)
        self._walk = netlink.TableDump.__new__(netlink.TableDump)
        self._walk._buckets = netlink._buckets()
        for one in (self._events, self._walk):
            one._sock = self._socket  # type: ignore[assignment]
            one.reader = columns.Reader(by_columns)
        self._events.overruns = 0
        real, netlink._recvmmsg = netlink._recvmmsg, None
        # places as long as the inputs: what several datagrams of the kernel would be comes in one
        self._events._receiver = netlink.Receiver(self._socket, 8, 33_000)  # type: ignore[arg-type]
        netlink._recvmmsg = real
        self._walk._data = bytearray(netlink._READ_SIZE + columns.HEAD_BYTES)

    def events(self, datagrams: list[bytes]) -> tuple[Changes, int]:
        """What they say, and how many of them are malformed."""
        self._socket.waiting = datagrams[:]
        self._events.reader.malformed = 0
        changes = self._events.read()
        return changes._replace(gone=sorted(changes.gone)), self._events.malformed

    def dump(self, datagram: bytes) -> tuple[Changes | int, int, bool, bool]:
        """What a slice of a dump says or the errno of its failure, what is malformed, is it interrupted, is it done."""
        walk = self._walk
        self._socket.waiting = [datagram]
        walk.done = walk.interrupted = False
        walk.reader.malformed = 0
        try:
            found: Changes | int = walk.read()
        except NetlinkError as error:
            check(0 <= error.errno <= 4095, f"errno {error.errno}")
            return error.errno, 0, False, False
        return found, walk.malformed, walk.interrupted, walk.done


def event(flow: Flow, what: int, flags: int, portid: int = 0) -> bytes:
    """The kernel's own layout: as :func:`ctnetlink.create` writes it, with what only the kernel says."""
    body = bytearray(ctnetlink.create(flow, liberal=False))
    body += ctnetlink.attribute(ctnetlink.CTA_ID, b"\1\2\3\4")
    start = ctnetlink.attribute(ctnetlink.CTA_TIMESTAMP_START, struct.pack(">Q", 1_700_000_000 * 10**9))
    body += ctnetlink.attribute(ctnetlink.CTA_TIMESTAMP | ctnetlink.NLA_F_NESTED, start)
    struct.pack_into("=IHHII", body, 0, len(body), 1 << 8 | what, flags, 7, portid)
    return bytes(body)


def netlink_grammar() -> Grammar:
    seeds = [event(flow, 0, ctnetlink.NLM_F_CREATE) for flow in FLOWS]
    seeds += [event(flow, 0, 0) for flow in FLOWS[:3]] + [event(flow, 2, 0) for flow in FLOWS]
    dump = b"".join(event(flow, 0, ctnetlink.NLM_F_MULTI, 99) for flow in FLOWS)
    done = struct.pack("=IHHIIi", 20, ctnetlink.NLMSG_DONE, 2, 7, 99, 0)
    seeds += [dump, dump + done, done, struct.pack("=IHHIIi", 20, ctnetlink.NLMSG_DONE, 2, 7, 99, -4)]
    seeds += [struct.pack("=IHHIIi", 36, ctnetlink.NLMSG_ERROR, 0, 7, 99, number) + bytes(16) for number in (0, -17)]
    seeds += [struct.pack("=IHHII", 16, ctnetlink.NLMSG_OVERRUN, 0, 0, 0)]
    words = (*(struct.pack("=HH", 4, kind) for kind in (1, 2, 4, 0x8001, 0x8004)), b"\xff\xff\xff\xff", bytes(4))

    def wrap(kind: int, inner: bytes) -> bytes:
        return ctnetlink.attribute(kind | 0x8000, inner)

    return Grammar(seeds, netlink_lengths, wrap, (1, 2, 4, 5, 13, 14, 15, 20, 22), words, limit=32768)


def netlink_runner() -> Runner:
    """Events, alone and many at once, to an active engine too; the same bytes as a dump.  Both ways say the same."""
    peer = Peer()
    peer.engine.set_role(readiness.ACTIVE, 0.0)
    fast, general = _Netlink(True), _Netlink(False)

    def run(data: bytes) -> bool:
        peer.now += 0.001
        changes, malformed = fast.events([data])
        check((changes, malformed) == general.events([data]), "both ways say the same")
        many = [data, *_EVENTS, data, data, data, data, data]
        check(fast.events(many) == general.events(many), "both ways say the same of many")
        check(fast.dump(data) == general.dump(data), "both ways say the same in a dump")
        flows = [*changes.flows]
        flows += [rows.unpack(key, value) for table in changes.rows.values() for key, value in table.items()]
        check(max(len(flows), changes.events) * 40 <= len(data), "no flow comes from nothing")
        for flow in flows:
            check(rows.unpack(*rows.pack(flow)).key == flow.key, f"{flow!r} does not survive the sync link")
            shown(flow)
            requested(Request(CREATE, flow.key, flow, flow.timeout))
        for key_len, table in changes.rows.items():
            _batches(key_len, list(table), list(table.values()))
        if changes.events:
            peer.engine.kernel_changes(changes, peer.now)
            peer.turn(random.Random(zlib.crc32(data)))
            peer.data(wire.encode_ack(_all_received(peer.engine)))
            if len(peer.engine.source.announced) > 900:
                peer.engine.set_role(readiness.BACKUP, peer.now)
                peer.engine.set_role(readiness.ACTIVE, peer.now)
            peer.bounded()
        return changes.events > 0

    return run


_EVENTS = (event(FLOWS[0], 0, 0), event(FLOWS[0], 2, 0))


def expectations_grammar() -> Grammar:
    messages = recorded_expectations()
    done = struct.pack("=IHHIIi", 20, ctnetlink.NLMSG_DONE, 2, 7, 99, 0)
    error = struct.pack("=IHHIIi", 36, ctnetlink.NLMSG_ERROR, 0, 7, 99, -2) + bytes(16)
    seeds = [*messages, b"".join(messages[:3]) + done, b"".join(messages[-4:]), done, error]
    words = (*(struct.pack("=HH", 4, kind) for kind in (1, 2, 0x8001, 0x8003, 0x800A)), b"\xff\xff\xff\xff", bytes(4))

    def wrap(kind: int, inner: bytes) -> bytes:
        return ctnetlink.attribute(kind | 0x8000, inner)

    return Grammar(seeds, netlink_lengths, wrap, (1, 2, 3, 4, 6, 8, 9, 10, 11), words, limit=16384)


def expectations_runner() -> Runner:
    """Events and entries of the kernel's expectation table, into an active engine that knows some of the masters."""
    peer = Peer()
    peer.engine.set_role(readiness.ACTIVE, 0.0)
    known = list(_masters())[::2]
    peer.engine.kernel_changes(changes(known), peer.now)

    def run(data: bytes) -> bool:
        peer.now += 0.01
        found = []
        with contextlib.suppress(NetlinkError):
            found += [message for message in expectation.parse_messages(data) if message.expectation is not None]
        check(len(found) * 40 <= len(data), "no expectation comes from nothing")
        heard = [(message.expectation, message.gone) for message in found if message.expectation is not None]
        for one, _gone in heard:
            check(expectation.unpack(expectation.pack(one)).name == one.name, f"{one!r} does not survive the sync link")
            expectation_shown(one)
        helpers = peer.engine.helpers
        helpers.events(heard, data[:1] == b"\0", peer.now)
        if helpers.walk is not None:
            helpers.walked([one for one, _gone in heard], peer.now)
        peer.turn(random.Random(zlib.crc32(data)))
        peer.data(wire.encode_ack(_all_received(peer.engine)))
        peer.bounded()
        return bool(heard)

    return run


def _all_received(one: engine.Engine) -> wire.Ack:
    known = one.peers[0].session._established
    number = known.next_block if known is not None else 0
    return wire.Ack(number, number + WINDOW_BLOCKS, 0)


def rtnetlink_grammar() -> Grammar:
    def link(index: int, name: bytes) -> bytes:
        body = struct.pack("=BxHiII", 0, 1, index, 0x1043, 0) + ctnetlink.attribute(netlink.IFLA_IFNAME, name + b"\0")
        return struct.pack("=IHHII", 16 + len(body), netlink.RTM_NEWLINK, 2, 1, 9) + body

    def address(family: int, packed: bytes, index: int, flags: int) -> bytes:
        body = struct.pack("=BBBBi", family, 24, flags & 255, 0, index)
        body += ctnetlink.attribute(netlink.IFA_ADDRESS, packed) + ctnetlink.attribute(netlink.IFA_LOCAL, packed)
        body += ctnetlink.attribute(netlink.IFA_FLAGS, struct.pack("=I", flags))
        return struct.pack("=IHHII", 16 + len(body), netlink.RTM_NEWADDR, 2, 1, 9) + body

    done = struct.pack("=IHHIIi", 20, ctnetlink.NLMSG_DONE, 2, 1, 9, 0)
    links = link(1, b"lo") + link(2, b"eth0")
    addresses = address(k.AF_INET, b"\x7f\0\0\1", 1, 0x80) + address(k.AF_INET, _A, 2, 0x80)
    addresses += address(k.AF_INET6, _v6(3), 2, 0x40)
    error = struct.pack("=IHHIIi", 36, ctnetlink.NLMSG_ERROR, 0, 1, 9, -1) + bytes(16)
    seeds = [links + addresses + done, addresses + links + done, links + done, addresses + done, done + links, error]
    return Grammar(seeds, netlink_lengths, None, (), (done, error, b"\xff\xff\xff\xff", bytes(4)), limit=32768)


class RouteSocket(netlink._Socket):
    """A routing socket that answers every request with the input, once, and then nothing in time."""

    answer = b""

    def __init__(self, _protocol: int, _receive_buffer: int = 0) -> None:
        self._sock = SimpleNamespace(settimeout=lambda _s: None, send=self._ask, close=lambda: None)  # type: ignore
        self._left: list[bytes] = []

    def _ask(self, _message: bytes) -> None:
        self._left = [self.answer]

    def _receive(self, _flags: int = 0, _size: int = 0) -> bytes | None:
        if not self._left:
            raise TimeoutError("the kernel does not answer")
        return self._left.pop()


def rtnetlink_runner() -> Runner:
    def run(data: bytes) -> bool:
        RouteSocket.answer = data
        real, netlink._Socket = netlink._Socket, RouteSocket  # type: ignore[misc]
        try:
            found = netlink.interface_addresses()
        except (OSError, NetlinkError):
            return False
        finally:
            netlink._Socket = real  # type: ignore[misc]
        for entry in found:
            check(
                entry.family not in (2, 10) or len(entry.address) in (4, 16), f"address of {len(entry.address)} bytes"
            )
        return True

    return run


# --- control socket ---


def control_grammar() -> Grammar:
    commands = [
        name[len("_command_") :].replace("_", "-") for name in dir(daemon.Daemon) if name.startswith("_command_")
    ]
    requests: list[dict[str, Any]] = [{"command": name} for name in commands]
    requests += [{"command": "external", "format": name} for name in ("text", "json", "xml", "yaml")]
    requests += [{"command": "stats", "section": "network"}, {"command": "flush", "which": "external"}]
    texts = {str(key_id): base64.b64encode(bytes([key_id]) * 32).decode() for key_id in (1, 2)}
    requests += [{"command": "keys", "keys": texts}, {"command": "keys", "keys": {"1": texts["1"]}}]
    seeds = [json.dumps(request).encode() + b"\n" for request in requests]
    words = (
        b"\n",
        b"{",
        b"}",
        b"[" * 5000,
        b'{"command":' * 3000,
        b"\xff\xfe",
        b"\0",
        b'"\\ud800"',
        b"1" * 5000,
        b"NaN",
    )
    return Grammar(seeds, words=words, text=True, limit=140_000)


class _ClientSocket:
    """A connected client: sends its request in two parts, takes every answer."""

    def __init__(self, request: bytes) -> None:
        middle = len(request) // 2
        self._parts = [part for part in (request[:middle], request[middle:]) if part]
        self.answer = bytearray()
        self.closed = False

    def recv(self, size: int) -> bytes:
        if not self._parts:
            raise BlockingIOError
        part = self._parts.pop(0)
        if len(part) > size:
            self._parts.insert(0, part[size:])
        return part[:size]

    def send(self, data: memoryview, _flags: int) -> int:
        self.answer += data
        return len(data)

    def fileno(self) -> int:
        return 9

    def close(self) -> None:
        self.closed = True


class _Commands(daemon.Daemon):
    """The daemon's commands without its sockets.  What is not set here is an empty text."""

    def __getattr__(self, name: str) -> str:
        if name.startswith("_command_"):
            raise AttributeError(name)
        return ""

    def _apply(self, new: config.Config, now: float) -> None:
        self.config = new

    def _report(self, now: float) -> None:
        pass


def control_runner() -> Runner:
    """The control server with the daemon's own commands."""
    one = _Commands.__new__(_Commands)
    one.config = config.parse(CONFIG)
    descriptor, one._path = _memory_file()
    os.write(descriptor, CONFIG.encode())
    one.started = 0.0
    one._virtual_ips = [(vip.interface, vip.address, vip.packed) for vip in one.config.virtual_ips]
    one._held = set()
    one._recorder = recorder.Recorder()
    one._recorder.note(0.0, "start")
    one._event_buffer = 1
    one._events = one._fifo = SimpleNamespace(malformed=0, garbage=0)  # type: ignore[assignment]
    one._recorder = SimpleNamespace(  # type: ignore[assignment]
        lines=lambda *_args, **_options: iter(("line",)), note=lambda *_args, **_options: None
    )
    one._links = [SimpleNamespace(counters={}, is_open=True, interface="eth2", refused="")]  # type: ignore[list-item]
    one._helpers = SimpleNamespace(counters={}, statistics=dict)  # type: ignore[assignment]
    one._internal = lambda line: iter((b"", None, line(FLOWS[0], 1).encode() + b"\n"))  # type: ignore[method-assign]
    server = control.ControlServer("/nonexistent", one._command)
    server.counters["failed"] = 0

    def run(data: bytes) -> bool:
        peer = Peer()
        peer.data(wire.encode_block(0, _flow_record(FLOWS[0])))
        one._engine, one._sessions = peer.engine, [peer.engine.peers[0].session]
        sock = _ClientSocket(data)
        client = control._Client(sock, 0, 5.0)  # type: ignore[arg-type]
        server._clients = {9: client}
        requests = server.counters["requests"]
        server._receive(client, 0.0)
        for now in range(1, 60):  # a handler that waits is asked again
            if sock.closed:
                break
            if client.wake_at is not None:
                peer.turn(random.Random(0))
            server.tick(float(now) / 20)
            if client.pieces is not None and client.wake_at is None:
                server._send(client, float(now) / 20)
        if b"\n" in data[: control.MAX_REQUEST_BYTES] or len(data) > control.MAX_REQUEST_BYTES + 1:
            check(sock.closed, "a request is answered and the connection closed")
            lines = bytes(sock.answer).split(b"\n")
            end = json.loads(lines[-2])
            check(
                lines[-1] == b"" and isinstance(end["ok"], bool) and isinstance(end["exit"], int), "a trailer ends it"
            )
            check("internal error" not in end.get("error", ""), f"internal error: {_Caught.text}")
        else:
            check(not sock.answer and len(client.request) <= control.MAX_REQUEST_BYTES, "half a request waits, bounded")
        return server.counters["requests"] > requests

    return run


class _Caught(logging.Handler):
    """Keeps the last thing that was logged with a traceback."""

    text = ""

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            _Caught.text = logging.Formatter().formatException(record.exc_info)


def answer_grammar() -> Grammar:
    line = json.dumps(render.as_dict(FLOWS[0], 5)).encode()
    seeds = [line + b"\n" + control.trailer(), control.trailer("refused", 2), line + b"\n" * 3 + control.trailer("x")]
    seeds += [b"text\n" * 9 + control.trailer(), b'{"ok": false, "exit": 3}\n']
    words = (b"\n", b'"exit": "x"', b'"exit": null', b'"ok": 1', b"[" * 5000, b"\xff", b"1" * 5000)
    return Grammar(seeds, words=words, limit=80_000)


def answer_runner() -> Runner:
    """The client's side: what came back over the socket."""

    def run(data: bytes) -> bool:
        parts = [data[: len(data) // 3], data[len(data) // 3 :], b""]
        sock = SimpleNamespace(recv=lambda _size: parts.pop(0) or (parts.pop(0) if parts else b""))
        try:
            size = sum(len(line) for line in client._lines(sock, "/run/x", 1.0))  # type: ignore[arg-type]
        except client.ControlError as error:
            check(isinstance(error.exit, int), "an exit status is a number")
            return False
        check(size <= 3 * len(data), "the answer is no longer than what was read")
        return True

    return run


# --- files ---

CONFIG = json.dumps(
    {
        "node": "fw1",
        "peers": [{"node": "fw2", "address": "192.168.100.2"}],
        "link": {"interface": "eth2", "address": "192.168.100.1", "port": 3781},
        "virtual_ips": [
            {"interface": "eth1", "address": "192.168.0.100"},
            {"interface": "eth0", "address": "fd00:c0de:1::100"},
        ],
        "keys": {"1": "key-1", "2": "/etc/ctsyncd/keys/2.key"},
        "send_key": 1,
        "mode": "hot-standby",
        "control_socket": "/run/ctsyncd/ctsyncd.sock",
        "notify_fifo": "/run/ctsync/notify.fifo",
        "track_file": "/run/ctsync/not-ready",
        "ignore_addresses": ["192.168.100.0/24", "fd00:c0de:64::/64"],
        "replicate": True,
        "udp": "replied",
        "hello_interval_ms": 200,
        "dead_after_ms": 1000,
        "window_ms": 5,
        "datagram_bytes": 1400,
        "netlink_buffer_bytes": 67108864,
        "park_timeout_s": 86400,
        "log_level": "info",
    }
)


def _memory_file() -> tuple[int, str]:
    descriptor = os.memfd_create("fuzz")
    os.fchmod(descriptor, 0o600)
    return descriptor, f"/proc/self/fd/{descriptor}"


def config_grammar() -> Grammar:
    least = {key: json.loads(CONFIG)[key] for key in ("node", "peers", "link", "virtual_ips", "keys", "send_key")}
    several = {
        **least,
        "links": [{"interface": "eth2", "address": "192.168.100.1"}, {"interface": "eth3", "address": "fd00::1"}],
        "peers": [{"node": "fw2", "addresses": ["192.168.100.2", "fd00::2"]}],
    }
    del several["link"]
    seeds = [CONFIG.encode(), CONFIG.encode(), json.dumps(least).encode(), json.dumps(several).encode(), b"{}"]
    words = (b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"NaN", b"-Infinity", b"1" * 5000, b"[" * 2000, b'"\\ud800"')
    return Grammar(seeds, words=words, text=True, limit=200_000)


def config_runner() -> Runner:
    """A file, read, checked, and put to use."""
    descriptor, path = _memory_file()

    def run(data: bytes) -> bool:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, data, 0)
        try:
            found = config.load(path)
        except ConfigError as error:
            check(error.problems and all(isinstance(text, str) and text for text in error.problems), "it says what")
            check(sum(map(len, error.problems)) <= 2000 + 400 * len(data), "it says so in reasonable length")
            str(error).encode("utf-8", "backslashreplace")
            return False
        engine.Engine(Settings(ignore=tuple(map(str, found.ignore_addresses))), [_QUIET], 0.0)
        check(all(len(peer.addresses) == len(found.links) for peer in found.peers), "each link has its address")
        for vip in (*found.virtual_ips, *found.links):
            check(1 <= len(vip.interface.encode()) <= 15 and len(vip.packed) in (4, 16), "interfaces and addresses fit")
        for file in (found.control_socket, found.notify_fifo, found.track_file, *found.keys.values()):
            os.fsencode(file)
        check(found.send_key in found.keys and len(found.peers) == 1, "the key is there")
        return True

    return run


_QUIET = Peer().engine.peers[0].session


def key_grammar() -> Grammar:
    seeds = [base64.b64encode(bytes(range(count))) + b"\n" for count in (32, 33, 48, 64, 31, 0)]
    words = (b"=", b"==", b"\n", b"\0", b"\xff", b"-", b"_", b" ")
    return Grammar(seeds, words=words, limit=70_000)


def key_runner() -> Runner:
    descriptor, path = _memory_file()
    where = config.parse(CONFIG.replace("/etc/ctsyncd/keys/2.key", path))

    def run(data: bytes) -> bool:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, data, 0)
        try:
            key = service.read_key(where, 2, None)
        except ConfigError as error:
            text = str(error).encode("utf-8", "backslashreplace")
            check(len(data.strip()) < 8 or data.strip()[:8] not in text, "an error tells nothing of a key")
            return False
        digits = [text.rstrip(b"=")[:-1] for text in (base64.b64encode(key), data.strip())]  # the last has unused bits
        check(len(key) >= 32 and digits[0] == digits[1], "the key is what the file says")
        return True

    return run


def fifo_grammar() -> Grammar:
    seeds = [b'INSTANCE "inside" MASTER 150\n', b'GROUP "firewall" BACKUP 0\n', b'INSTANCE "outside" FAULT 150\n']
    seeds += [b"".join(seeds), b'INSTANCE "inside" MASTER_RX_LOWER_PRI 150\nGROUP "firewall" STOP\n']
    words = (b"\n", b'"', b" ", b"\0", b"\xff", b"MASTER", b"GROUP", b"9999", b"x" * 600, b"\xd9\xa3")
    return Grammar(seeds, words=words, limit=60_000)


def fifo_runner() -> Runner:
    """A reader whose writer wrote the input in two parts; then comes a good line, which must be understood."""
    reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    reader = vrrp.FifoReader("/nonexistent")
    reader.fd = reading
    good = b'\nINSTANCE "inside" BACKUP 1\n'

    def run(data: bytes) -> bool:
        found = []
        middle = len(data) // 2
        for part in (data[:middle], data[middle:], good):
            if part:
                os.write(writing, part)
                found += reader.read()
            check(len(reader._partial) <= vrrp.LINE_BYTES, "a half line is bounded")
        check(len(found) <= data.count(b"\n") + 2, "a line gives one transition")
        check(found[-1] == vrrp.Transition("INSTANCE", "inside", "BACKUP", 1), "after garbage the next line counts")
        for transition in found:
            check(transition.state in vrrp.STATES and 0 <= transition.priority <= 999, repr(transition))
        return len(found) > 1

    return run


TARGETS = {
    target.name: target
    for target in (
        Target("wire", wire_grammar, wire_runner, 1000, 28, (9000, 120)),  # 15 bytes may be 1024 rows
        Target("session", session_grammar, functools.partial(_session_runner, HOT_STANDBY), 400, 14, (300_000, 300)),
        Target(
            *("session-classic", session_grammar, functools.partial(_session_runner, EXTERNAL_CACHE)),
            *(400, 4, (300_000, 300)),
        ),
        Target("sealed", sealed_grammar, sealed_runner, 2000, 12, (3000, 5)),
        Target("netlink", netlink_grammar, netlink_runner, 1000, 14, (60_000, 300)),
        Target("expectations", expectations_grammar, expectations_runner, 500, 6, (60_000, 300)),
        Target("rtnetlink", rtnetlink_grammar, rtnetlink_runner, 1000, 10, (4000, 60)),
        Target("control", control_grammar, control_runner, 200, 2, (20_000, 20)),
        Target("answer", answer_grammar, answer_runner, 500, 4, (4000, 20)),
        Target("config", config_grammar, config_runner, 200, 2, (30_000, 300)),
        Target("key", key_grammar, key_runner, 1000, 4, (1000, 2)),
        Target("fifo", fifo_grammar, fifo_runner, 1000, 6, (2000, 20)),
    )
}


def quiet() -> Callable[[], None]:
    """Keep the daemon's log from the terminal; tracebacks in it are kept for the report.  Returns how to undo that."""
    package = logging.getLogger(daemon.__name__.rsplit(".", 1)[0])
    handlers, propagate = package.handlers[:], package.propagate
    package.handlers[:], package.propagate = [_Caught()], False

    def undo() -> None:
        package.handlers[:], package.propagate = handlers, propagate

    return undo


def replay(name: str, *inputs: str) -> None:
    """Give inputs (hexadecimal) to a fresh runner, one after the other; raises what the last one raises."""
    run = TARGETS[name].fresh()
    for text in inputs:
        run(bytes.fromhex(text))
