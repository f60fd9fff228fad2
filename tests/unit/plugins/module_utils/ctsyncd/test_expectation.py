# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The codec of expectations: recorded messages of a kernel, with conntrack(8)'s words for them, and malformed input."""

from __future__ import annotations

import contextlib
import json
import struct
from pathlib import Path

import pytest
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import (
    ctnetlink,
    expectation,
    expectation_render,
)
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.errors import NetlinkError, WireError
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.expectation import Expectation, Message, Nat
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.flow import (
    BOTH_DIRECTIONS,
    ZONE_ORIGINAL,
    ZONE_REPLY,
    Tuple,
)
from hypothesis import given
from hypothesis import strategies as st

CORPUS = Path(__file__).resolve().parents[4] / "corpus" / "expectations.jsonl"
RECORDS = [json.loads(line) for line in CORPUS.read_text(encoding="ascii").splitlines()[1:]]


def read(record: dict[str, str]) -> Message:
    (message,) = expectation.parse_messages(bytes.fromhex(record["hex"]))
    return message


def value(record: dict[str, str]) -> Expectation:
    found = read(record).expectation
    assert found is not None
    return found


def recorded(part: str) -> Expectation:
    return next(value(record) for record in RECORDS if record["part"] == part)


ACTIVE = recorded("active FTP to 192.168.1.3")
PASSIVE6 = recorded("passive FTP to fd00:c0de:1::3")
SIP = next(one for one in map(value, RECORDS) if one.expected.l4 == struct.pack("!HH", 0, 30100))
REGISTRATION = next(one for one in map(value, RECORDS) if one.flags & expectation.PERMANENT)


@pytest.mark.parametrize("record", [one for one in RECORDS if "said" in one], ids=lambda one: one["part"])
def test_a_recorded_entry_is_what_conntrack_says(record: dict[str, str]) -> None:
    timeout, _space, words = record["said"].partition(" ")
    assert expectation_render.line(value(record)).startswith(words)
    assert abs(value(record).timeout - int(timeout)) <= 1


def test_events_say_the_same_as_entries_and_what_is_gone() -> None:
    events = [read(record) for record in RECORDS if "said" not in record]
    assert sum(event.gone for event in events) == 4  # each data connection used its expectation up
    entries = {value(record).name: value(record).lasting for record in RECORDS if "said" in record}
    for event in events:
        assert event.expectation is not None
        if event.expectation.flags & expectation.PERMANENT:  # it was confirmed between the event and the dump
            event = event._replace(expectation=event.expectation._replace(flags=expectation.PERMANENT))
        assert event.expectation is not None
        assert event.expectation.lasting == entries[event.expectation.name]


def test_translation_and_function_of_active_ftp_behind_snat() -> None:
    port = ACTIVE.expected.l4[2:]
    assert ACTIVE.nat == Nat(1, bytes(4), port)
    assert ACTIVE.function == "nat-follow-master"
    assert ACTIVE.helper == "ftp"
    assert SIP.nat is not None and SIP.klass == 1 and SIP.function == "sip"
    assert (REGISTRATION.klass, REGISTRATION.helper) == (0, "sip")


@pytest.mark.parametrize("record", RECORDS, ids=lambda one: one["part"])
def test_a_request_has_the_attributes_that_the_kernel_wrote(record: dict[str, str]) -> None:
    said = ctnetlink.attributes(bytes.fromhex(record["hex"]), 20)
    one = value(record)
    sent = ctnetlink.attributes(expectation.create(one), 20)
    named = one.klass > 0 or one.helper == "sip"
    for kind in said.keys() - {expectation.CTA_EXPECT_ID, expectation.CTA_EXPECT_TIMEOUT}:
        if kind in (expectation.CTA_EXPECT_HELP_NAME, expectation.CTA_EXPECT_CLASS) and not named:
            assert kind not in sent  # else the data connection would get the helper
        else:
            assert sent[kind] == said[kind], kind


def test_the_zone_is_the_masters_and_in_the_requests() -> None:
    zoned = ACTIVE._replace(zone=7)
    for request in (expectation.create(zoned), expectation.set_timer(zoned, 5), expectation.delete(zoned)):
        assert ctnetlink.attributes(request, 20)[expectation.CTA_EXPECT_ZONE] == b"\0\7"
    # a zone of replies is no part of the tuple that the kernel looks for the master with
    zoned = zoned._replace(zone_dir=ZONE_REPLY)
    assert expectation.CTA_EXPECT_ZONE not in ctnetlink.attributes(expectation.create(zoned), 20)
    assert ctnetlink.attributes(expectation.set_timer(zoned, 5), 20)[expectation.CTA_EXPECT_ZONE] == b"\0\7"
    assert ACTIVE.of(zoned.master_key) == zoned
    assert zoned.name != ACTIVE.name


def test_what_only_one_node_knows_does_not_travel() -> None:
    assert ACTIVE.ident
    told = expectation.unpack(expectation.pack(ACTIVE._replace(flags=expectation.USERSPACE | expectation.PERMANENT)))
    assert told == ACTIVE._replace(ident=None, flags=expectation.PERMANENT)


def test_unknown_fields_of_a_record_are_skipped() -> None:
    assert expectation.unpack(expectation.pack(SIP) + b"\xee\2xx") == SIP._replace(ident=None)


expectations = st.builds(
    lambda base, zone, direction, timeout, flags, klass, used: base._replace(
        zone=zone,
        zone_dir=direction if zone else BOTH_DIRECTIONS,
        timeout=timeout,
        flags=flags,
        klass=klass,
        used=used,
        ident=None,
    ),
    st.sampled_from([ACTIVE, PASSIVE6, SIP, SIP._replace(nat=None, function="", helper="")]),
    st.integers(0, 65535),
    st.sampled_from([BOTH_DIRECTIONS, ZONE_ORIGINAL, ZONE_REPLY]),
    st.integers(0, 0xFFFFFFFF),
    st.integers(0, 3),
    st.integers(0, 0xFFFFFFFF),
    st.booleans(),
)


@given(expectations)
def test_records_keep_everything(one: Expectation) -> None:
    assert expectation.unpack(expectation.pack(one)) == one
    family, zone, proto, expected, mask = expectation.unpack_name(one.name)
    assert (family, zone, proto, expected, mask) == (one.family, one.zone, one.proto, one.expected, one.mask)


@pytest.mark.parametrize(
    "change",
    [
        lambda good: b"",
        lambda good: good[:20],
        lambda good: good[:-1],
        lambda good: good + b"\1",
        lambda good: b"\x1c" + good[1:],
        lambda good: good.replace(b"ftp", b"f\0p"),
        lambda good: good + b"\1\1\0",
        lambda good: good + b"\1\7" + b"\2" + bytes(6),
        lambda good: good[:1] + b"\0\1" + good[3:],
    ],
)
def test_malformed_records_are_refused(change: object) -> None:
    good = expectation.pack(ACTIVE)
    assert callable(change)
    with pytest.raises(WireError):
        expectation.unpack(change(good))


def test_malformed_messages_are_refused() -> None:
    message = bytes.fromhex(RECORDS[0]["hex"])
    for kind in (expectation.CTA_EXPECT_TUPLE, expectation.CTA_EXPECT_MASK, expectation.CTA_EXPECT_MASTER):
        found = ctnetlink.attributes(message, 20)
        found.pop(kind)
        with pytest.raises(NetlinkError):
            expectation.decode(message[16:20] + b"".join(ctnetlink.attribute(*pair) for pair in found.items()))
    for place in range(16, len(message)):
        for bit in range(8):
            changed = message[:place] + bytes((message[place] ^ 1 << bit,)) + message[place + 1 :]
            with contextlib.suppress(NetlinkError):
                list(expectation.parse_messages(changed))


def test_what_the_kernel_cannot_express_is_an_error() -> None:
    for wrong in (
        ACTIVE._replace(function="x" * 32),
        SIP._replace(helper="x" * 16),
        ACTIVE._replace(expected=Tuple(b"\1", b"\2", b"")),
    ):
        with pytest.raises(NetlinkError):
            expectation.create(wrong)


def test_errors_and_the_end_of_a_walk() -> None:
    error = struct.pack("=IHHIIi", 36, 2, 0, 1, 0, -2) + bytes(16)
    done = struct.pack("=IHHIIi", 20, 3, 2, 1, 0, 0)
    messages = list(expectation.parse_messages(error + done))
    assert [(one.expectation, one.gone, one.errno) for one in messages] == [(None, False, 2), (None, True, 0)]


def test_xml_is_conntracks() -> None:
    assert expectation_render.xml(SIP._replace(timeout=179)) == (
        '<flow><layer3 protonum="2" protoname="ipv4"><expected><src>192.168.0.3</src><dst>192.168.1.3</dst></expected>'
        "<mask><src>255.255.255.255</src><dst>255.255.255.255</dst></mask><master><src>192.168.0.3</src>"
        '<dst>192.168.1.3</dst></master></layer3><layer4 protonum="17" protoname="udp"><expected><sport>0</sport>'
        "<dport>30100</dport></expected><mask><sport>0</sport><dport>65535</dport></mask><master><sport>5060</sport>"
        "<dport>5060</dport></master></layer4><meta><helper-name>sip</helper-name><timeout>179</timeout>"
        "<class>1</class></meta></flow>"
    )


def test_json_says_it_all() -> None:
    told = json.loads(expectation_render.json_line(ACTIVE._replace(flags=3), 4))
    assert told["helper"] == "ftp"
    assert told["flags"] == ["permanent", "inactive"]
    assert told["nat"] == {"direction": "reply", "address": "0.0.0.0", "port": told["expected"]["dport"]}
    assert told["master"]["dport"] == 21
    assert (told["function"], told["class"], told["age_s"]) == ("nat-follow-master", 0, 4)
