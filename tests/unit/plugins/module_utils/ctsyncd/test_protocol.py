# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The test vectors of docs/protocol.md: checked with an HKDF of the test's own, and reproduced by the session."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import struct
import zlib
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import digest, expectation, paths, rows, wire
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import session as sessions
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.announced import Announced
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.crypto import LibraryCrypto
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.errors import WireError
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.flow import Flow, Tuple
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.session import (
    BlockReceived,
    Session,
    SessionUp,
)
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from unit.simulation import SECRET, address, tcp

CORPUS = Path(__file__).resolve().parents[4] / "corpus" / "wire.jsonl"
DOCUMENT = Path(__file__).resolve().parents[5] / "docs" / "protocol.md"
FLOW: Flow = tcp(51356, 40000, tcp_flags=(3, 3))
HELPED: Flow = tcp(51357, 40001, tcp_flags=(3, 3), helper="ftp")._replace(state=None, tcp_wscale=None)
EXPECTED = expectation.Expectation(
    *(HELPED.family, HELPED.proto),
    Tuple(address("192.168.1.3"), address("192.168.1.100"), struct.pack("!HH", 0, 40100)),
    Tuple(b"\xff" * 4, b"\xff" * 4, struct.pack("!HH", 0, 0xFFFF)),
    *(HELPED.proto, HELPED.orig),
    timeout=300,
    helper="ftp",
    nat=expectation.Nat(1, bytes(4), struct.pack("!H", 40101)),
    function="nat-follow-master",
)
# 24 connections to two ports: a column of each mode, and a mirrored one
MANY: list[Flow] = [
    flow._replace(
        orig=flow.orig._replace(l4=struct.pack("!HH", port, service)),
        reply=flow.reply._replace(l4=struct.pack("!HH", service, port)),
    )
    for port in range(40000, 40024)
    for service in (443 if port % 3 else 22,)
    for flow in (tcp(port, tcp_flags=(3, 3)),)
]


def documented() -> dict[str, str]:
    (block,) = re.findall(r"```json\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    return json.loads(block)


def endpoint(node: str, peer: str, first: int) -> Session:
    """A session whose nonces are first, first + 1, ... and then first + 16, ..."""
    nonces = iter((bytes(range(first, first + 16)), bytes(range(first + 16, first + 32))))
    return Session(
        *(node, peer),
        crypto=LibraryCrypto(),
        secrets={1: SECRET},
        send_key=1,
        random=lambda _size: next(nonces),
        version="1.0.0",
        now=0.0 if node == "fw1" else 100.0,  # fw2 only answers
    )


def reproduced() -> dict[str, str]:
    """What the document must say, by the code."""
    fw1, fw2 = endpoint("fw1", "fw2", 0xA0), endpoint("fw2", "fw1", 0xC0)
    (hello1,) = fw1.poll(0.0)
    assert fw2.receive(hello1, 0.0) == []
    (hello2,) = fw2.poll(0.0)
    assert isinstance(fw1.receive(hello2, 0.0)[0], SessionUp)
    fw1.set_status(wire.Status(wire.ROLE_ACTIVE, wire.STATUS_REPLICATES, 0))
    hello3, data0 = fw1.poll(0.0)
    assert isinstance(fw2.receive(hello3, 0.0)[0], SessionUp)
    key, value, _extras = rows.pack(FLOW)
    records = wire.encode_bulk_begin(1) + wire.tlv(wire.RECORD_ROWS, wire.encode_rows(len(key), key + value))
    records += wire.encode_bulk_end(1, 1)
    fw1.send_block(records, 3, 0.0, 0.0)
    (data1,) = fw1.poll(0.0)
    assert len(fw2.receive(data0, 0.0)) == 1
    assert fw2.receive(data1, 0.0) == [BlockReceived(records)]
    fw2.set_status(wire.Status(wire.ROLE_BACKUP, wire.STATUS_REPLICATES, 1))
    (data2,) = (datagram for datagram in fw2.poll(0.01) if datagram[1] == wire.DATA)
    raw = {
        "pre-shared key": SECRET,
        "1: fw1 to fw2, HELLO": hello1,
        "2: fw2 to fw1, HELLO": hello2,
        "3: fw1 to fw2, HELLO": hello3,
        "4: fw1 to fw2, DATA (ack, status, keys)": data0,
        "5: fw1 to fw2, DATA (block)": data1,
        "6: fw2 to fw1, DATA (heard, ack, status, keys)": data2,
        "records of 5": records,
        "ROWS of 5, shorter": wire.RowColumns(13, rows.cut(key + value, 38)).encode(0, 1),
        "key of the flow": key,
        "value of the flow": value,
        "EXPECT of the helper's": expectation.pack(EXPECTED),
        "FLOW of one with a helper": wire.encode_flow_record(*rows.pack(HELPED._replace(tcp_flags=None))),
        "ROWS of 24 flows": wire.encode_rows(13, b"".join(b"".join(rows.pack(flow)[:2]) for flow in MANY)),
        "GONE of 24 flows": wire.encode_gone(13, b"".join(flow.key for flow in MANY)),
        "ACK of 0 to 4, 6, 7 and 15": wire.encode_ack(wire.Ack(5, 517, 0b1000000011)),
        "HEARD of 0 and 1, and of the records of 5": wire.encode_heard(wire.Heard(1, zlib.crc32(records))),
        "PROBE 258 of link 1, at once, 16 bytes": wire.encode_probe(wire.Probe(1, True, 258), 16),
        "ECHO of it, after 1 ms": wire.encode_echo(wire.Echo(1, 258, 1000)),
        "PART of block 5, from byte 7 on, of 10": wire.encode_part(wire.Part(5, 7, 10, b"abc")),
    }
    return {**{name: value.hex() for name, value in raw.items()}, **compared(key, value)}


def compared(key: bytes, value: bytes) -> dict[str, str]:
    """What the nodes tell each other of a table of this one flow."""
    announced, states = Announced(), digest.States(3)
    announced.add({key: value}, 12)
    states.add(13, {key: value})
    bucket = digest.bucket(key)
    first = bucket // 32 * 32
    records = {
        "DIGEST of the flow": wire.encode_digest(1, announced.digest.total),
        "BUCKETS with that of the flow": wire.encode_sums(
            wire.RECORD_BUCKETS, 2, first, announced.digest.told()[first : first + 32]
        ),
        "STATES with that of the flow": wire.encode_sums(
            wire.RECORD_STATES, 3, first, states.totals()[first : first + 32]
        ),
        "COMPARE_REQUEST of its bucket": wire.encode_compare(
            wire.RECORD_COMPARE_REQUEST, wire.Compare(7, wire.COMPARE_REPAIR, frozenset((bucket,)))
        ),
        "REPORT that it is missing": wire.encode_report(wire.Report(7, 1, (1, 0, 0, 0, 0, 0, 0), [(0, key)]), 600),
    }
    return {name: record[wire.TLV_BYTES :].hex() for name, record in records.items()}


def hkdf(secret: bytes, salt: bytes, info: bytes) -> bytes:
    """RFC 5869 with SHA-256, one block of output."""
    extracted = hmac.new(salt, secret, hashlib.sha256).digest()
    return hmac.new(extracted, info + b"\1", hashlib.sha256).digest()


def test_document_and_code_agree() -> None:
    assert documented() == reproduced()


def test_digests_of_the_document_by_its_words() -> None:
    vectors = {name: bytes.fromhex(text) for name, text in documented().items()}
    key, value = vectors["key of the flow"], bytearray(vectors["value of the flow"])
    number, low = zlib.crc32(key), zlib.crc32(value[:12]) >> 24
    bucket, first = number % 1024, number % 1024 // 32 * 32
    sums = [number ^ low << 24 if at == bucket else 0 for at in range(1024)]
    total = hashlib.blake2b(struct.pack("!1024Q", *sums), digest_size=8).digest()
    assert vectors["DIGEST of the flow"] == struct.pack("!I", 1) + total
    assert vectors["BUCKETS with that of the flow"] == struct.pack("!IH32Q", 2, first, *sums[first : first + 32])
    value[12:14] = bytes((0, value[13] & 6))  # SEEN_REPLY and ASSURED
    value[14:18] = bytes(4)  # timeout
    value[20] = 0  # flags
    told = zlib.crc32(value, number) ** 2 % 2**64
    sums = [told if first + at == bucket else 0 for at in range(32)]
    assert vectors["STATES with that of the flow"] == struct.pack("!IH32Q", 3, first, *sums)
    bits = bytearray(128)
    bits[bucket // 8] = 1 << bucket % 8
    assert vectors["COMPARE_REQUEST of its bucket"] == struct.pack("!IB", 7, 1) + bits
    assert vectors["REPORT that it is missing"] == struct.pack("!9IBB", 7, 1, 1, 0, 0, 0, 0, 0, 0, 0, 13) + key


def test_vectors_open_with_the_keys_of_the_document_and_nothing_of_ours() -> None:
    vectors = {name: bytes.fromhex(text) for name, text in documented().items()}
    secret = vectors["pre-shared key"]
    nonce1, nonce2 = vectors["1: fw1 to fw2, HELLO"][4:20], vectors["2: fw2 to fw1, HELLO"][4:20]

    def opened(name: str, size: int, key: bytes) -> bytes:
        datagram = vectors[name]
        return AESGCM(key).decrypt(datagram[size - 8 : size + 4], datagram[size + 4 :], datagram[:size])

    def digested(name: str, size: int, key: bytes, plain: bytes) -> bool:
        datagram = vectors[name]
        digest = hashlib.blake2b(datagram[:size] + plain, key=key, digest_size=4).digest()
        return datagram[size : size + 4] == digest

    for name, nonce, ends, echo in (
        ("1: fw1 to fw2, HELLO", nonce1, b"fw1\0fw2", bytes(16)),
        ("2: fw2 to fw1, HELLO", nonce2, b"fw2\0fw1", nonce1),
        ("3: fw1 to fw2, HELLO", nonce1, b"fw1\0fw2", nonce2),
    ):
        plain = opened(name, 28, hkdf(secret, nonce, b"ctsync hello\2\1" + ends))
        assert plain[:19] == b"\1\0\x10" + echo
        assert digested(name, 28, hkdf(secret, nonce, b"ctsync nonce ctsync hello\2\1" + ends), plain)
    key = hkdf(secret, nonce1 + nonce2, b"ctsync data\2\1" + b"fw1\0fw2")
    digest_key = hkdf(secret, nonce1 + nonce2, b"ctsync nonce ctsync data\2\1" + b"fw1\0fw2")
    first = opened("4: fw1 to fw2, DATA (ack, status, keys)", 20, key)
    check = hashlib.blake2b(key=hkdf(secret, nonce1 + nonce2, b"ctsync check\2\1fw1\0fw2"), digest_size=4).digest()
    assert first[:3] == b"\2\0\x10" and first[-8:] == b"\x09\0\5\1" + check
    block = opened("5: fw1 to fw2, DATA (block)", 20, key)
    assert digested("5: fw1 to fw2, DATA (block)", 20, digest_key, block)
    heard = opened(
        "6: fw2 to fw1, DATA (heard, ack, status, keys)", 20, hkdf(secret, nonce2 + nonce1, b"ctsync data\2\1fw2\0fw1")
    )
    said = vectors["HEARD of 0 and 1, and of the records of 5"]
    assert heard[:15] == said == b"\5\0\x0c" + struct.pack("!QI", 1, zlib.crc32(vectors["records of 5"]))
    assert heard[15:34] == b"\2\0\x10" + struct.pack("!QQ", 1, 513)
    records = vectors["records of 5"]
    assert block == b"\1" + (len(records) + 8).to_bytes(2, "big") + bytes(8) + records
    rows_of_one = columns(records[10:-11], reply=12)
    assert rows_of_one == [vectors["key of the flow"] + vectors["value of the flow"]]
    assert records[:10] == b"\4\0\4\0\0\0\1" + b"\1" + (len(records) - 21).to_bytes(2, "big")
    assert records[-11:] == b"\5\0\x08\0\0\0\1\0\0\0\1"


def columns(payload: bytes, reply: int) -> list[bytes]:
    """The rows of a good record, by the words of the document and nothing of ours; ``reply``: bytes of a tuple that the
    values begin with, 0 for GONE."""
    key_len, count = payload[0], payload[1] << 8 | payload[2]
    address, layer4 = next(
        (size, ports)
        for size in (4, 16)
        for ports in (0, 4)
        for zone in (0, 2, 3)
        if 1 + 2 * size + ports + zone == key_len
    )
    width = key_len + (2 * address + layer4 + 13 if reply else 0)
    at = 3

    def bits(number: int) -> list[int]:
        nonlocal at
        size = (number + 7) // 8
        out = [payload[at + place // 8] >> 7 - place % 8 & 1 for place in range(8 * size)]
        at += size
        assert not any(out[number:])
        return out[:number]

    mirrored = bits(reply)
    modes = list(zip(bits(width), bits(width)))
    table = [[0] * width for _row in range(count)]
    for wanted in ((0, 1), (1, 0), (1, 1)):
        for column, mode in enumerate(modes):
            if mode != wanted:
                continue
            if mode == (0, 1):
                values = [payload[at]] * count
                at += 1
            elif mode == (1, 0):
                known = payload[at] + 1
                digits = payload[at + 1 + known : at + 1 + known + (count + 1) // 2].hex()
                values = [payload[at + 1 + int(digit, 16)] for digit in digits[:count]]
                at += 1 + known + (count + 1) // 2
            else:
                values = list(payload[at : at + count])
                at += count
            for row, byte in zip(table, values):
                row[column] = byte
    assert at == len(payload)
    for row in table:
        source, destination = row[1 : 1 + address], row[1 + address : 1 + 2 * address]
        first, second = row[1 + 2 * address :][: layer4 // 2], row[1 + 2 * address :][layer4 // 2 : layer4]
        for place, byte in enumerate((destination + source + second + first)[:reply]):
            row[key_len + place] ^= byte * mirrored[place]
    return [bytes(row) for row in table]


def test_columns_are_what_the_document_says() -> None:
    vectors = {name: bytes.fromhex(text) for name, text in documented().items()}
    found = columns(vectors["ROWS of 24 flows"], reply=12)
    assert found == [
        bytes((6, 192, 168, 0, 3, 192, 168, 1, 3))
        + struct.pack("!HH", 40000 + number, service)
        + bytes((192, 168, 1, 3, 192, 168, 1, 100))
        + struct.pack("!HH", service, 40000 + number)
        + struct.pack("!HIBBBI", 0x19E, 431999, 3, 0x79, 0x33, 0)
        for number in range(24)
        for service in (443 if (40000 + number) % 3 else 22,)
    ]
    assert columns(vectors["GONE of 24 flows"], reply=0) == [row[:13] for row in found]
    size = 3 + 2 + 2 * 5
    masks = vectors["ROWS of 24 flows"][5:size]
    modes = {(masks[k // 8] >> 7 - k % 8 & 1, masks[5 + k // 8] >> 7 - k % 8 & 1) for k in range(38)}
    assert modes == {(0, 0), (0, 1), (1, 0), (1, 1)}
    helped = vectors["FLOW of one with a helper"]
    assert helped[0] == 13
    assert helped[1:14] == bytes((6, 192, 168, 0, 3, 192, 168, 1, 3)) + struct.pack("!HH", 51357, 22)
    assert helped[26:39] == struct.pack("!HIBBBI", 0x19E, 431999, 0, 0xFF, 0, 0)
    assert helped[39:] == b"\2\3ftp"
    ack = vectors["ACK of 0 to 4, 6, 7 and 15"]
    assert ack == b"\2\0\x12" + struct.pack("!QQ", 5, 517) + b"\x03\x02"


def test_numbers_of_the_document_are_those_of_the_code() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    stated = dict(re.findall(r"^\| `([A-Z_]+)` \| ([0-9.]+) ", text, re.MULTILINE))
    assert len(stated) >= 20
    for name, value in stated.items():
        module = next(module for module in (sessions, paths, wire) if hasattr(module, name))
        assert getattr(module, name) == float(value), name


def entries() -> Iterator[dict[str, Any]]:
    with CORPUS.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


@pytest.mark.parametrize("entry", entries(), ids=lambda entry: f"{entry['decoder']}: {entry['what']}")
def test_corpus_is_read_as_it_says(entry: dict[str, Any]) -> None:
    """Good and bad payloads for those who write another implementation: what they mean, or that they are refused."""
    payload = bytes.fromhex(entry["payload"])
    decode: Callable[[bytes], Any] = {
        "rows": wire.decode_rows,
        "gone": wire.decode_gone,
        "flow": wire.decode_flow_record,
        "ack": wire.decode_ack,
    }[entry["decoder"]]
    if "error" in entry:
        with pytest.raises(WireError) as caught:
            decode(payload)
        assert caught.value.kind == entry["error"]
        return
    found = decode(payload)
    if entry["decoder"] == "ack":
        assert found == wire.Ack(entry["expected"], entry["limit"], sum(1 << place for place in entry["early"]))
    elif entry["decoder"] == "flow":
        assert [part.hex() for part in found] == [entry["key"], entry["value"], entry["extras"]]
    else:
        assert found == (entry["key_len"], bytes.fromhex(entry["joined"]))
        reply = rows.SHAPES[entry["key_len"]].reply if entry["decoder"] == "rows" else 0
        assert b"".join(columns(payload, reply)).hex() == entry["joined"]
