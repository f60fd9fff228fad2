# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A small budget of fuzzing with each run of the unit tests; the fuzzer against faults; what it found once."""

from __future__ import annotations

import struct
from pathlib import Path
from random import Random
from typing import Iterator

import pytest
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import (
    client,
    config,
    ctnetlink,
    netlink,
    session,
    wire,
)
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.errors import ConfigError, NetlinkError
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.flow import Flow
from fuzz import __main__ as fuzzer
from fuzz import mutate, targets

BUDGET = 1500  # inputs per target


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    undo = targets.quiet()
    yield
    undo()


@pytest.mark.parametrize("name", targets.TARGETS)
def test_no_input_breaks_a_promise(name: str) -> None:
    target = targets.TARGETS[name]
    share = BUDGET if target.share >= 10 else BUDGET // 5
    accepted = 0
    for number in range(-(-share // target.batch)):
        batch = fuzzer.run_batch(name, 2, number, min(share, target.batch))
        assert not batch.findings, fuzzer.report(batch.findings[0], Path("tests/output/fuzz"))
        accepted += batch.accepted
    if name != "sealed":  # nothing gets through there; elsewhere the inputs must be good enough to get far
        assert accepted > 0


# --- the fuzzer finds faults ---


def broken_iter_tlv(data: bytes, offset: int = 0) -> Iterator[tuple[int, bytes]]:
    """As the real one, but it believes the length."""
    while offset < len(data):
        kind, length = struct.unpack_from("!BH", data, offset)
        yield kind, data[offset + 3 : offset + 3 + length]
        offset += 3 + length


def test_a_decoder_that_believes_lengths_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(wire, "iter_tlv", broken_iter_tlv)
    batch = fuzzer.run_batch("wire", 2, 0, 200)
    assert batch.findings
    smaller = fuzzer.minimised(batch.findings[0])
    test = fuzzer.report(smaller, tmp_path)
    assert len(smaller.inputs) == 1  # this target keeps no state
    assert "targets.replay(" in test and smaller.inputs[0].hex() in test
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises((AssertionError, struct.error)):
        targets.replay("wire", *(data.hex() for data in smaller.inputs))


def test_too_much_work_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = wire.decode_rows

    def slow(data: bytes) -> object:
        for _first in data:
            for _second in data * 50:
                pass
        return real(data)

    monkeypatch.setattr(wire, "decode_rows", slow)
    monkeypatch.setattr(fuzzer, "COUNT_EVERY", 1)
    findings = fuzzer.run_batch("wire", 2, 0, 30).findings
    assert any("lines for" in finding.error for finding in findings)


def test_state_that_grows_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "WINDOW_BLOCKS", 1 << 16)  # what the session takes; the promise is the old one
    monkeypatch.setattr(targets, "WINDOW_BLOCKS", 512)
    known = [fuzzer.run_batch("session", 2, number, 400).findings for number in range(2)]
    assert any("bounded" in finding.error for findings in known for finding in findings)


def test_the_same_seed_gives_the_same_inputs() -> None:
    for name in ("session", "config"):
        grammar = targets.TARGETS[name].grammar()
        first, second = (
            [mutate.mutated(chance, grammar) for _dummy in range(1000)] for chance in (Random(5), Random(5))
        )
        assert first == second  # no mutation leaves anything behind
    one, two = (list(fuzzer.plan(["wire", "key"], 5000)) for _dummy in range(2))
    assert one == two and sum(size for _name, _number, size in one) == 5000


# --- what it found, once ---


def test_credit_beyond_the_window_is_not_believed() -> None:
    targets.replay("session", "19020010" + "00" * 8 + "80" + "00" * 7)


def test_a_wide_acknowledgement_costs_no_more_than_what_is_in_flight() -> None:
    peer = targets.Peer()
    known = peer.engine.peers[0].session._established
    assert known is not None
    known.next_block = 1 << 40  # a session of many years
    known.acked = known.next_block - 1
    for frames in (wire.encode_ack(wire.Ack(0, 513, (1 << 512) - 1)), wire.encode_ack(wire.Ack(1 << 40, 513, 0))):
        fuzzer.counted(lambda data: bool(peer.data(data)), frames, 2000)


def event(flow: Flow) -> bytes:
    return targets.event(flow, ctnetlink.IPCTNL_MSG_CT_NEW, ctnetlink.NLM_F_CREATE)


@pytest.mark.parametrize("number", [5, -4096, -(2**31)])
def test_an_error_number_is_one(number: int) -> None:
    with pytest.raises(NetlinkError, match="error number"):
        ctnetlink.parse_errno(struct.pack("=i", number))


def test_the_two_tuples_of_a_flow_are_alike() -> None:
    plain = next(flow for flow in targets.FLOWS if not flow.orig.l4)
    one, two = event(plain), event(plain._replace(reply=plain.reply._replace(l4=b"\1\2\3\4")))
    assert next(ctnetlink.parse_messages(one)).flow is not None
    with pytest.raises(NetlinkError, match="0 and 4 bytes"):
        list(ctnetlink.parse_messages(two))


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (ctnetlink.CTA_LABELS, bytes(20)),
        (ctnetlink.CTA_HELP, ctnetlink.attribute(ctnetlink.CTA_HELP_NAME, b"sixteencharacter\0")),
        (ctnetlink.CTA_HELP, ctnetlink.attribute(ctnetlink.CTA_HELP_NAME, b"ft\xfc\0")),
    ],
)
def test_what_the_sync_link_cannot_carry_is_malformed(kind: int, value: bytes) -> None:
    body = event(targets.FLOWS[7])[ctnetlink.HEADER_LEN :]
    with pytest.raises(NetlinkError, match=r"labels|helper"):
        ctnetlink.decode_flow(body + ctnetlink.attribute(kind, value))


def test_an_address_of_a_strange_length_is_malformed() -> None:
    seed = targets.rtnetlink_grammar().seeds[0]
    address = ctnetlink.attribute(netlink.IFA_LOCAL, bytes((192, 168, 0, 3)))
    assert seed.count(address) == 1
    assert len(answered(seed)) == 3
    with pytest.raises(NetlinkError, match="with 3 bytes"):
        answered(seed.replace(address, b"\7" + address[1:]))


def answered(data: bytes) -> list[netlink.InterfaceAddress]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(netlink, "_Socket", targets.RouteSocket)
        patch.setattr(targets.RouteSocket, "answer", data)
        return netlink.interface_addresses()


@pytest.mark.parametrize("end", [b"[" * 100_000 + b"\n", b'{"ok": false, "exit": "x"}\n', b'{"ok": false}\n'])
def test_an_answer_with_a_strange_end_is_incomplete(end: bytes) -> None:
    parts = [end, b""]
    sock = type("Socket", (), {"recv": lambda _self, _size: parts.pop(0)})()
    with pytest.raises(client.ControlError, match="incomplete"):
        list(client._lines(sock, "/run/x", 1.0))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("3781", "1" * 5000),
        ('"/run/ctsync/not-ready"', r'"/run/\ud800"'),
        ('"/run/ctsync/notify.fifo"', r'"/run/\u0000"'),
        ('"eth2"', '"' + "é" * 8 + '"'),  # 16 bytes: the kernel would cut the name, and bind to another interface
        ('"eth2"', r'"eth\udcff"'),
    ],
)
def test_a_value_that_the_system_cannot_use_is_a_mistake(old: str, new: str) -> None:
    assert old in targets.CONFIG
    with pytest.raises(ConfigError):
        config.parse(targets.CONFIG.replace(old, new, 1))


def test_the_most_rows_of_the_fewest_bytes_stay_within_the_limit_of_work() -> None:
    data = bytes.fromhex("0d0400000000000000000000000000")  # 1024 rows of zeros
    wire = targets.TARGETS["wire"]
    accepted, lines = fuzzer.counted(wire.fresh(), data, fuzzer._limit(wire, data))
    assert accepted
    assert lines > 4 * 1024  # they were really read, and asked of the kernel
