# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The test vectors of docs/protocol.md: checked with an HKDF of the test's own, and reproduced by the session."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from pathlib import Path

from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import session as sessions
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import wire
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.crypto import LibraryCrypto
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.flow import Flow
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.session import (
    BlockReceived,
    Session,
    SessionUp,
)
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from unit.simulation import SECRET, tcp

DOCUMENT = Path(__file__).resolve().parents[5] / "docs" / "protocol.md"
FLOW: Flow = tcp(51356, 40000)


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
    upsert = wire.tlv(wire.RECORD_UPSERT, wire.encode_flow(FLOW))
    records = wire.encode_bulk_begin(1) + upsert + wire.encode_bulk_end(1, 1)
    fw1.send_block(records, 3, 0.0, 0.0)
    (data1,) = fw1.poll(0.0)
    assert len(fw2.receive(data0, 0.0)) == 1
    assert fw2.receive(data1, 0.0) == [BlockReceived(records)]
    raw = {
        "pre-shared key": SECRET,
        "1: fw1 to fw2, HELLO": hello1,
        "2: fw2 to fw1, HELLO": hello2,
        "3: fw1 to fw2, HELLO": hello3,
        "4: fw1 to fw2, DATA (ack, status)": data0,
        "5: fw1 to fw2, DATA (block)": data1,
        "records of 5": records,
        "flow key": FLOW.key,
        "flow record": wire.encode_flow(FLOW),
    }
    return {name: value.hex() for name, value in raw.items()}


def hkdf(secret: bytes, salt: bytes, info: bytes) -> bytes:
    """RFC 5869 with SHA-256, one block of output."""
    extracted = hmac.new(salt, secret, hashlib.sha256).digest()
    return hmac.new(extracted, info + b"\1", hashlib.sha256).digest()


def test_document_and_code_agree() -> None:
    assert documented() == reproduced()


def test_vectors_open_with_the_keys_of_the_document_and_nothing_of_ours() -> None:
    vectors = {name: bytes.fromhex(text) for name, text in documented().items()}
    secret = vectors["pre-shared key"]
    nonce1, nonce2 = vectors["1: fw1 to fw2, HELLO"][4:20], vectors["2: fw2 to fw1, HELLO"][4:20]

    def opened(name: str, size: int, key: bytes) -> bytes:
        datagram = vectors[name]
        return AESGCM(key).decrypt(bytes(4) + datagram[size - 8 : size], datagram[size:], datagram[:size])

    for name, nonce, ends, echo in (
        ("1: fw1 to fw2, HELLO", nonce1, b"fw1\0fw2", bytes(16)),
        ("2: fw2 to fw1, HELLO", nonce2, b"fw2\0fw1", nonce1),
        ("3: fw1 to fw2, HELLO", nonce1, b"fw1\0fw2", nonce2),
    ):
        plain = opened(name, 28, hkdf(secret, nonce, b"ctsync hello\1\1" + ends))
        assert plain[:19] == b"\1\0\x10" + echo
    key = hkdf(secret, nonce1 + nonce2, b"ctsync data\1\1" + b"fw1\0fw2")
    assert opened("4: fw1 to fw2, DATA (ack, status)", 20, key)[:3] == b"\2\0\x11"
    block = opened("5: fw1 to fw2, DATA (block)", 20, key)
    records = vectors["records of 5"]
    assert block == b"\1" + (len(records) + 8).to_bytes(2, "big") + bytes(8) + records
    assert vectors["flow record"] in records


def test_numbers_of_the_document_are_those_of_the_code() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    stated = dict(re.findall(r"^\| `([A-Z_]+)` \| ([0-9.]+) ", text, re.MULTILINE))
    assert len(stated) >= 20
    for name, value in stated.items():
        module = sessions if hasattr(sessions, name) else wire
        assert getattr(module, name) == float(value), name
