# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Flows as the test-case page, conntrack(8) and the JSON contract have them."""

from __future__ import annotations

import json
from socket import AF_INET, AF_INET6, inet_pton
from typing import Any
from xml.etree import ElementTree

import pytest
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import constants as c
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import render
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.flow import (
    ZONE_ORIGINAL,
    ZONE_REPLY,
    Flow,
    Tuple,
)

SEEN = c.IPS_SEEN_REPLY | c.IPS_CONFIRMED


def way(src: str, dst: str, first: int = 0, second: int = 0, l4: bytes | None = None) -> Tuple:
    family = AF_INET6 if ":" in src else AF_INET
    ports = first.to_bytes(2, "big") + second.to_bytes(2, "big")
    return Tuple(inet_pton(family, src), inet_pton(family, dst), ports if l4 is None else l4)


def icmp(ident: int, kind: int, code: int) -> bytes:
    return ident.to_bytes(2, "big") + bytes((kind, code))


SSH = Flow(
    family=c.AF_INET,
    proto=c.IPPROTO_TCP,
    zone=0,
    orig=way("192.168.0.3", "192.168.1.3", 51356, 22),
    reply=way("192.168.1.3", "192.168.1.100", 22, 51356),
    status=414,
    timeout=431999,
    state=c.TCP_ESTABLISHED,
    mark=0,
)
PING = Flow(
    family=c.AF_INET,
    proto=c.IPPROTO_ICMP,
    zone=0,
    orig=way("10.1.0.2", "10.2.0.2", l4=icmp(16641, 8, 0)),
    reply=way("10.2.0.2", "10.2.0.11", l4=icmp(16641, 0, 0)),
    status=SEEN,
)
GRE = Flow(
    c.AF_INET,
    c.IPPROTO_GRE,
    0,
    way("10.0.0.1", "10.0.0.2", 5, 0xFFFF),
    way("10.0.0.2", "10.0.0.9", 0xFFFF, 0),
    SEEN,
    mark=0,
)


@pytest.mark.parametrize(
    ("flow", "age_s", "expected"),
    [
        pytest.param(
            SSH,
            5,
            "tcp      6 ESTABLISHED src=192.168.0.3 dst=192.168.1.3 sport=51356 dport=22 "
            "src=192.168.1.3 dst=192.168.1.100 sport=22 dport=51356 [ASSURED] mark=0 [active since 5s]",
            id="the test-case page",
        ),
        pytest.param(
            SSH._replace(mark=None, state=c.TCP_TIME_WAIT),
            None,
            "tcp      6 TIME_WAIT src=192.168.0.3 dst=192.168.1.3 sport=51356 dport=22 "
            "src=192.168.1.3 dst=192.168.1.100 sport=22 dport=51356 [ASSURED] mark=0",
            id="unknown age, no mark",
        ),
        pytest.param(
            PING,
            4,
            "icmp     1 src=10.1.0.2 dst=10.2.0.2 type=8 code=0 id=16641 "
            "src=10.2.0.2 dst=10.2.0.11 type=0 code=0 id=16641 mark=0 [active since 4s]",
            id="icmp",
        ),
        pytest.param(
            Flow(
                c.AF_INET6,
                c.IPPROTO_ICMPV6,
                0,
                way("fd00:1::2", "fd00:2::2", l4=icmp(119, 128, 0)),
                way("fd00:2::2", "fd00:1::2", l4=icmp(119, 129, 0)),
                SEEN,
            ),
            3,
            "icmpv6   58 src=fd00:1::2 dst=fd00:2::2 type=128 code=0 id=119 "
            "src=fd00:2::2 dst=fd00:1::2 type=129 code=0 id=119 mark=0 [active since 3s]",
            id="icmpv6",
        ),
        pytest.param(
            Flow(
                c.AF_INET,
                c.IPPROTO_UDP,
                7,
                way("10.1.0.2", "10.2.0.9", 1112, 53),
                way("10.2.0.9", "10.1.0.2", 53, 1112),
                c.IPS_CONFIRMED,
                mark=0,
            ),
            4,
            "udp      17 src=10.1.0.2 dst=10.2.0.9 sport=1112 dport=53 [UNREPLIED] "
            "src=10.2.0.9 dst=10.1.0.2 sport=53 dport=1112 mark=0 zone=7 [active since 4s]",
            id="unreplied, zone",
        ),
        pytest.param(
            SSH._replace(zone=5, zone_dir=ZONE_ORIGINAL),
            None,
            "tcp      6 ESTABLISHED src=192.168.0.3 dst=192.168.1.3 sport=51356 dport=22 zone-orig=5 "
            "src=192.168.1.3 dst=192.168.1.100 sport=22 dport=51356 [ASSURED] mark=0",
            id="zone of the original direction",
        ),
        pytest.param(
            SSH._replace(zone=6, zone_dir=ZONE_REPLY, status=c.IPS_CONFIRMED),
            None,
            "tcp      6 ESTABLISHED src=192.168.0.3 dst=192.168.1.3 sport=51356 dport=22 [UNREPLIED] "
            "src=192.168.1.3 dst=192.168.1.100 sport=22 dport=51356 zone-reply=6 mark=0",
            id="zone of the reply direction",
        ),
        pytest.param(
            SSH._replace(helper="ftp", labels=bytes((1, 0, 0, 0)), status=414 | c.IPS_OFFLOAD),
            0,
            "tcp      6 ESTABLISHED src=192.168.0.3 dst=192.168.1.3 sport=51356 dport=22 "
            "src=192.168.1.3 dst=192.168.1.100 sport=22 dport=51356 [OFFLOAD] mark=0 helper=ftp labels=0x01000000 "
            "[active since 0s]",
            id="helper, labels, offload",
        ),
        pytest.param(
            SSH._replace(proto=c.IPPROTO_SCTP, state=c.SCTP_ESTABLISHED, mark=None, status=SEEN),
            None,
            "sctp     132 ESTABLISHED src=192.168.0.3 dst=192.168.1.3 sport=51356 dport=22 "
            "src=192.168.1.3 dst=192.168.1.100 sport=22 dport=51356 mark=0",
            id="sctp",
        ),
        pytest.param(
            Flow(
                c.AF_INET, 50, 0, way("10.1.0.2", "10.2.0.9", l4=b""), way("10.2.0.9", "10.1.0.2", l4=b""), SEEN, mark=9
            ),
            None,
            "unknown  50 src=10.1.0.2 dst=10.2.0.9 src=10.2.0.9 dst=10.1.0.2 mark=9",
            id="protocol without a name",
        ),
        pytest.param(
            GRE,
            None,
            "gre      47 src=10.0.0.1 dst=10.0.0.2 srckey=0x5 dstkey=0xffff "
            "src=10.0.0.2 dst=10.0.0.9 srckey=0xffff dstkey=0x0 mark=0",
            id="gre",
        ),
        pytest.param(
            GRE._replace(orig=way("10.0.0.1", "10.0.0.2", l4=b""), reply=way("10.0.0.2", "10.0.0.9", l4=b"")),
            None,
            "gre      47 src=10.0.0.1 dst=10.0.0.2 src=10.0.0.2 dst=10.0.0.9 mark=0",
            id="gre without keys",
        ),
        pytest.param(
            SSH._replace(state=77, mark=None, helper="a b\n"),
            None,
            "tcp      6 STATE_77 src=192.168.0.3 dst=192.168.1.3 sport=51356 dport=22 "
            "src=192.168.1.3 dst=192.168.1.100 sport=22 dport=51356 [ASSURED] mark=0 helper=a?b?",
            id="a state and a helper that do not exist stay on one line",
        ),
    ],
)
def test_line(flow: Flow, age_s: int | None, expected: str) -> None:
    assert render.line(flow, age_s) == expected


def test_json_is_the_contract() -> None:
    assert json.loads(render.json_line(SSH, 5)) == {
        "protocol": "tcp",
        "protonum": 6,
        "family": "ipv4",
        "zone": 0,
        "state": "ESTABLISHED",
        "orig": {"src": "192.168.0.3", "dst": "192.168.1.3", "sport": 51356, "dport": 22},
        "reply": {"src": "192.168.1.3", "dst": "192.168.1.100", "sport": 22, "dport": 51356},
        "snat": True,
        "dnat": False,
        "assured": True,
        "status": 414,
        "timeout": 431999,
        "mark": 0,
        "age_s": 5,
    }
    assert render.as_dict(PING)["orig"] == {"src": "10.1.0.2", "dst": "10.2.0.2", "type": 8, "code": 0, "id": 16641}
    assert render.as_dict(GRE)["orig"] == {"src": "10.0.0.1", "dst": "10.0.0.2", "srckey": 5, "dstkey": 65535}
    assert render.as_dict(GRE)["reply"] == {"src": "10.0.0.2", "dst": "10.0.0.9", "srckey": 65535, "dstkey": 0}
    assert render.as_dict(SSH._replace(helper="ftp"))["helper"] == "ftp"
    assert "zone_direction" not in render.as_dict(SSH._replace(zone=5))
    assert render.as_dict(SSH._replace(zone=5, zone_dir=ZONE_ORIGINAL))["zone_direction"] == "orig"
    assert render.as_dict(SSH._replace(zone=5, zone_dir=ZONE_REPLY))["zone_direction"] == "reply"


def test_xml_is_one_element_per_flow() -> None:
    text = render.xml(SSH._replace(ident=1564740973, timeout=None, helper="a<b"))
    assert text == (
        '<flow><meta direction="original"><layer3 protonum="2" protoname="ipv4"><src>192.168.0.3</src>'
        '<dst>192.168.1.3</dst></layer3><layer4 protonum="6" protoname="tcp"><sport>51356</sport><dport>22</dport>'
        '</layer4></meta><meta direction="reply"><layer3 protonum="2" protoname="ipv4"><src>192.168.1.3</src>'
        '<dst>192.168.1.100</dst></layer3><layer4 protonum="6" protoname="tcp"><sport>22</sport><dport>51356</dport>'
        '</layer4></meta><meta direction="independent"><state>ESTABLISHED</state><mark>0</mark><id>1564740973</id>'
        "<assured/><helper>a&lt;b</helper></meta></flow>"
    )
    element = ElementTree.fromstring(render.xml(PING._replace(status=0)))
    assert element.find("meta[@direction='independent']/unreplied") is not None
    layer4 = '<layer4 protonum="47" protoname="gre"><srckey>0x{:x}</srckey><dstkey>0x{:x}</dstkey></layer4>'
    text = render.xml(GRE)
    assert layer4.format(5, 0xFFFF) in text
    assert layer4.format(0xFFFF, 0) in text
    assert "<mark>0</mark><zone>5</zone>" in render.xml(SSH._replace(zone=5))
    original, reply = (
        ElementTree.fromstring(render.xml(SSH._replace(zone=5, zone_dir=direction)))
        for direction in (ZONE_ORIGINAL, ZONE_REPLY)
    )
    assert [one.get("direction") for one in original.iterfind("meta[zone='5']")] == ["original"]
    assert [one.get("direction") for one in reply.iterfind("meta[zone='5']")] == ["reply"]


STATUS = {
    "schema": 1,
    "version": "0.1.0",
    "node": "fw1",
    "verdict": "DEGRADED",
    "reasons": ["peer fw2 is down", "2 events were lost"],
    "role": "active",
    "virtual_ips": [{"interface": "eth1", "address": "192.168.0.100", "held": True}],
    "replicate": True,
    "mode": "hot-standby",
    "peers": [
        {
            "node": "fw2",
            "address": "192.168.100.2",
            "state": "up",
            "role": "backup",
            "last_seen_s": 0.2,
            "lag": {"events": 3, "age_s": 0.5},
            "bulk": "complete",
            "table": "holds the whole table",
        }
    ],
    "flows": {"kernel": 12, "external": None},
    "counters": {},
    "last_transition": {"to": "active", "ago_s": 12.1},
}


def test_status_begins_with_the_verdict() -> None:
    lines = render.status_text(STATUS).splitlines()
    assert lines[0] == "DEGRADED: peer fw2 is down; 2 events were lost"
    assert "  node        fw1 (active)" in lines
    assert "  virtual IP  192.168.0.100 on eth1, held" in lines
    peer = "fw2 (192.168.100.2) is up, backup, seen 0.2 s ago, lag 3 changes, 0.5 s, holds the whole table"
    assert f"  peer        {peer}" in lines
    assert "  flows       12 kernel, unknown external" in lines
    assert "  transition  to active, 12.1 s ago" in lines


@pytest.mark.parametrize(
    ("accepts", "theirs", "lines"),
    [
        ([1], {"accepts": [1], "sends": 1, "used": 1, "differ": []}, []),
        ([1], {"accepts": None, "sends": None, "used": None, "differ": []}, []),
        (
            [1, 2],
            {"accepts": [1], "sends": 1, "used": 1, "differ": []},
            ["fw1 accepts 1 and 2, is to send with 1", "fw2 accepts 1, sends with 1, is sent to with 1"],
        ),
        (
            [1],
            {"accepts": [1], "sends": 1, "used": 1, "differ": [1]},
            [
                "fw1 accepts 1, is to send with 1",
                "fw2 accepts 1, sends with 1, is sent to with 1, has another key under 1",
            ],
        ),
        (
            [1, 2],
            {"accepts": None, "sends": None, "used": None, "differ": []},
            ["fw1 accepts 1 and 2, is to send with 1", "fw2 does not say (no session)"],
        ),
    ],
)
def test_status_shows_keys_while_they_change(accepts: list[int], theirs: dict[str, Any], lines: list[str]) -> None:
    status = {
        "verdict": "READY",
        "node": "fw1",
        "keys": {"accepts": accepts, "sends": 1},
        "peers": [{"node": "fw2", "keys": theirs}],
    }
    said = render.status_text(status).splitlines()
    assert [line.split(None, 1)[1] for line in said if line.startswith("  keys ")] == lines


def test_status_shows_each_link() -> None:
    one = {"interface": "eth2", "address": "192.168.100.2", "state": "up", "since_s": 3.21, "carries": True}
    two = {"interface": "eth3", "address": "fd00::2", "state": "down", "since_s": None, "carries": False}
    peer = {
        "node": "fw2",
        "links": [
            {**one, "rtt_ms": 0.25, "mtu": 1428, "loss": 0.0},
            {**two, "rtt_ms": None, "mtu": 1280, "loss": 0.125},
        ],
    }
    lines = render.status_text({**STATUS, "peers": [peer]}).splitlines()
    assert "  link        eth2 to fw2 (192.168.100.2) is up for 3.2 s, in use, round trip 0.2 ms, MTU 1428" in lines
    assert "  link        eth3 to fw2 (fd00::2) is down, MTU 1280, 12 % of the probes lost" in lines


@pytest.mark.parametrize("missing", sorted(STATUS))
def test_status_of_another_version_is_still_readable(missing: str) -> None:
    partial = {key: value for key, value in STATUS.items() if key != missing}
    first = render.status_text(partial).splitlines()[0]
    assert first.startswith("NOT READY" if missing == "verdict" else "DEGRADED")
    assert render.status_text(dict.fromkeys(STATUS)).startswith("NOT READY\n")


def test_statistics_are_blocks_of_aligned_counters() -> None:
    text = render.statistics(
        {
            "cache_external": {"active_connections": 12, "created": {"ok": 3, "failed": 0}, "oldest_s": 0.25},
            "uptime": "3 h",
            "links": ["eth2 up"],
            "tracked": {"timestamps": True, "limit": None},
        }
    )
    blocks = text.split("\n\n")
    assert [block.splitlines()[0] for block in blocks] == ["cache external:", "uptime: 3 h", "links:", "tracked:"]
    values = [line for line in blocks[0].splitlines()[1:] if not line.endswith(":")]
    assert {len(line) for line in values} == {61}
    assert [line.split()[-1] for line in values] == ["12", "3", "0", "0.250"]
    assert [line.split()[-1] for line in blocks[3].splitlines()[1:]] == ["yes", "unknown"]
