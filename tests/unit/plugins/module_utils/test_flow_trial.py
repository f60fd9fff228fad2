# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import ipaddress
import socket

import pytest
from ansible_collections.ctsync.ha_firewall.plugins.module_utils import _flow_trial, _ruleset
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.flow import Flow, Tuple


def flow(proto, client, server, seen=None):
    """A flow whose client may be seen under another address by the server."""
    inside, out = ipaddress.ip_address(client).packed, ipaddress.ip_address(server).packed
    outside = ipaddress.ip_address(seen or client).packed
    orig = Tuple(inside, out, (40000).to_bytes(2, "big") + (53).to_bytes(2, "big"))
    reply = Tuple(out, outside, (53).to_bytes(2, "big") + (40000).to_bytes(2, "big"))
    return Flow(socket.AF_INET if len(inside) == 4 else socket.AF_INET6, proto, 0, orig, reply, 14)


def ones_sum(data):
    total = sum(int.from_bytes(data[at : at + 2].ljust(2, b"\0"), "big") for at in range(0, len(data), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


@pytest.mark.parametrize("proto", [socket.IPPROTO_TCP, socket.IPPROTO_UDP])
@pytest.mark.parametrize("payload", [b"even", b"odd"])
@pytest.mark.parametrize("reply", [False, True])
@pytest.mark.parametrize("ends", [("10.1.0.2", "10.2.0.2", "192.0.2.1"), ("fd00::2", "fd00:1::2", None)])
def test_packets_are_what_the_wire_would_bring(proto, payload, reply, ends):
    given = flow(proto, *ends)
    data = _flow_trial.packet(given, reply, payload)
    sent = given.reply if reply else given.orig
    six = ":" in ends[0]
    start = 40 if six else 20
    body = data[start:]
    assert data.endswith(payload)
    assert data[0] >> 4 == (6 if six else 4)
    assert int.from_bytes(data[4:6] if six else data[2:4], "big") == len(data) - (40 if six else 0)
    assert data[6 if six else 9] == proto
    assert data[start - 2 * len(sent.src) : start] == sent.src + sent.dst
    assert body[:4] == sent.l4
    if not six:
        assert ones_sum(data[:20]) == 0xFFFF
    pseudo = sent.src + sent.dst + len(body).to_bytes(4, "big") + bytes([0, 0, 0, proto])
    assert ones_sum(pseudo + body + b"\0" * (len(body) % 2)) == 0xFFFF


def test_flows_are_described_as_the_client_sees_them():
    plain = flow(socket.IPPROTO_TCP, "fd00::2", "fd00:1::2")
    assert _flow_trial.describe(plain) == "tcp [fd00::2]:40000 -> [fd00:1::2]:53"
    moved = plain._replace(reply=plain.reply._replace(src=ipaddress.ip_address("fd00:1::9").packed))
    assert _flow_trial.describe(moved) == "tcp [fd00::2]:40000 -> [fd00:1::2]:53 ([fd00:1::9]:53)"


def test_only_flows_that_are_cut_make_a_warning():
    nothing = {"checked": 5, "count": 0, "flows": []}
    assert _flow_trial.sentence(nothing) == _flow_trial.sentence(None) == ""
    four = {"checked": 5, "count": 4, "flows": ["a", "b", "c", "d"]}
    assert _flow_trial.sentence(four) == "The new rules cut 4 of 5 established flows: a; b; c, ..."


def test_rendered_tables_are_read_back_as_they_were():
    saved = """\
*filter
:INPUT ACCEPT [0:0]
:FORWARD DROP [0:0]
:THEIRS - [0:0]
-A FORWARD -j THEIRS
-A THEIRS -j RETURN
COMMIT
"""
    tables = _ruleset.parse_save(saved)
    assert _flow_trial.render_tables(tables) == saved
    tables["nat"] = _ruleset.Table(chains={"POSTROUTING": []})  # a table that only the new rules have
    assert "*nat\n:POSTROUTING ACCEPT [0:0]\nCOMMIT\n" in _flow_trial.render_tables(tables)
