# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""ARP probes and the time that nobody answered."""

from __future__ import annotations

import pytest
from ansible_collections.ctsync.ha_firewall.plugins.module_utils import _watch

OWN, OTHER = bytes.fromhex("020000000001"), bytes.fromhex("020000000002")
# from 02:00:00:00:00:02: 192.168.0.100 is at 02:00:00:00:00:02
REPLY = bytes.fromhex("020000000001 020000000002 0806 0001 0800 06 04 0002 020000000002 c0a80064 020000000001 00000000")


def test_a_probe_has_no_sender_address_and_goes_to_all_or_to_one():
    frame = _watch.probe(OWN, "192.168.0.100")
    assert frame == bytes.fromhex(
        "ffffffffffff 020000000001 0806 0001 0800 06 04 0001 020000000001 00000000 000000000000 c0a80064"
    )
    assert _watch.probe(OWN, "192.168.0.100", OTHER)[:6] == OTHER


def test_a_reply_is_read_and_nothing_else_is():
    assert _watch.parse_answer(REPLY + bytes(18)) == (OTHER, "192.168.0.100")
    assert _watch.parse_answer(_watch.probe(OWN, "192.168.0.100")) is None
    assert _watch.parse_answer(REPLY[:41]) is None
    assert _watch.parse_answer(REPLY[:12] + b"\x08\x00" + REPLY[14:]) is None


def test_one_ipv4_address_of_each_interface_is_watched():
    vips = [
        {"interface": "eth1", "address": "fd00::1/64"},
        {"interface": "eth1", "address": "192.168.0.100/24"},
        {"interface": "eth1", "address": "192.168.0.101/24"},
        {"interface": "eth0", "address": "192.168.1.100"},
    ]
    assert _watch.first_of_each_interface(vips) == [
        {"interface": "eth1", "address": "192.168.0.100"},
        {"interface": "eth0", "address": "192.168.1.100"},
    ]


@pytest.mark.parametrize(
    ("answers", "held", "gap"),
    [
        ([10.0, 10.005], 10.067, 62),
        ([10.0, 10.070], 10.067, 0),
        ([], 10.067, None),
        ([10.0], None, None),
    ],
)
def test_the_gap_is_from_the_last_answer_until_it_is_held(answers, held, gap):
    watch = _watch.Watch("eth1", "192.168.0.100")
    watch.answered(_watch.Answer(OTHER, "192.168.0.101"), 5.0)
    for when in answers:
        watch.answered(_watch.Answer(OTHER, "192.168.0.100"), when)
    if held:
        watch.held(held)
        watch.held(held + 1)
    found = watch.result()
    assert (found["gap_ms"], found["answers"], found["held"]) == (gap, len(answers), held is not None)
