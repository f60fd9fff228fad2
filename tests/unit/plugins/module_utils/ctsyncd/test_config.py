# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The configuration: every mistake named, with its remedy, all at once."""

from __future__ import annotations

import copy
import json
import pathlib
from typing import Any

import pytest
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import config
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.errors import ConfigError

GOOD = {
    "node": "fw1",
    "peers": [{"node": "fw2", "address": "192.168.100.2"}],
    "link": {"interface": "eth2", "address": "192.168.100.1", "port": 3781},
    "virtual_ips": [
        {"interface": "eth1", "address": "192.168.0.100"},
        {"interface": "eth0", "address": "192.168.1.100"},
    ],
    "keys": {"1": "key-1"},
    "send_key": 1,
    "ignore_addresses": ["192.168.100.0/24", "fd00:c0de:64::/64"],
}


def change(document: Any, path: str, value: object) -> None:
    """``path`` as in the error texts."""
    *parents, last = (int(part[1:-1]) if part[0] == "[" else part for part in path.replace("[", ".[").split("."))
    for part in parents:
        document = document[part]
    document[last] = value


def changed(path: str, value: object) -> str:
    """GOOD with one value changed."""
    document = copy.deepcopy(GOOD)
    change(document, path, value)
    return json.dumps(document)


def problems(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        config.parse(text)
    return caught.value.problems


def test_good_configuration_is_read_with_defaults() -> None:
    settings = config.parse(json.dumps(GOOD))
    assert settings.node == "fw1"
    assert settings.peers == (config.Peer("fw2", ("192.168.100.2",)),)
    assert settings.links == (config.Link("eth2", "192.168.100.1", 3781),)
    assert [vip.interface for vip in settings.virtual_ips] == ["eth1", "eth0"]
    assert dict(settings.keys) == {1: "key-1"}
    assert [str(network) for network in settings.ignore_addresses] == ["192.168.100.0/24", "fd00:c0de:64::/64"]
    assert (settings.mode, settings.replicate, settings.udp) == ("hot-standby", True, "replied")
    with pytest.raises(AttributeError):
        settings.node = "fw3"  # type: ignore[misc]


def test_defaults_of_the_table_are_those_of_the_object() -> None:
    """A configuration in which nothing optional stands equals the object made with its own defaults."""
    needed = {option.key for option in config.OPTIONS if option.default is config.REQUIRED}
    read = config.parse(json.dumps({key: GOOD[key] for key in (*needed, "link")}))
    made = config.Config(
        node=read.node, peers=read.peers, links=read.links, virtual_ips=read.virtual_ips, keys=read.keys, send_key=1
    )
    assert read == made
    assert {option.key for option in config.OPTIONS} == {*config.Config.__dataclass_fields__, "link"}


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("node", "", ["node", '""', "name"]),
        ("node", "fw 1", ["node", "fw 1"]),
        ("nodes", "x", ["nodes", "did you mean node?"]),
        ("virtual-ips", [], ["virtual-ips", "did you mean virtual_ips?"]),
        ("zzz", 1, ["zzz", "unknown option", "known are node,"]),
        ("peers", [], ["peers", "[]", "non-empty list"]),
        ("peers", {"node": "fw2"}, ["peers", "list"]),
        (
            "peers",
            [{"node": f"fw{number}", "address": f"192.168.100.{number}"} for number in range(2, 10)],
            ["peers", "8 peers: at most 7 are supported"],
        ),
        (
            "peers",
            [{"node": "fw2", "address": "192.168.100.2"}, {"node": "fw2", "address": "192.168.100.3"}],
            ["peers", "fw2 stands more than once"],
        ),
        (
            "peers",
            [{"node": "fw2", "address": "192.168.100.2"}, {"node": "fw3", "address": "192.168.100.2"}],
            ["peers[1].address", "192.168.100.2 is also peers[0].address"],
        ),
        ("peers[0].address", "192.168.100.1", ["peers[0].address", "this node's own address"]),
        ("peers[0].address", "fd00::2", ["peers[0].address", "same family"]),
        ("peers[0].address", "192.168.100.2/24", ["peers[0].address", "prefix length"]),
        ("peers[0].address", "224.0.0.18", ["peers[0].address", "unicast"]),
        ("peers[0].address", 3232261122, ["peers[0].address", "not an IPv4 or IPv6 address"]),
        ("peers[0].node", "fw1", ["peers[0].node", "own name"]),
        ("peers[0].adress", "x", ["peers[0].adress", "did you mean address?"]),
        ("link.interface", "interface-name16", ["link.interface", "1 to 15 characters"]),
        ("link.interface", "a/b", ["link.interface", "a/b"]),
        ("link.port", 0, ["link.port", "0", "from 1 to 65535"]),
        ("link.port", 65536, ["link.port", "65536", "from 1 to 65535"]),
        ("link.port", "3781", ["link.port", '"3781"', "unquoted"]),
        ("link.port", True, ["link.port", "true"]),
        ("link.port", 3781.0, ["link.port", "3781.0"]),
        ("virtual_ips", [], ["virtual_ips", "non-empty list"]),
        ("virtual_ips[1].address", "192.168.0.100", ["virtual_ips", "192.168.0.100", "more than once"]),
        ("virtual_ips[0].address", "192.168.100.2", ["virtual_ips", "192.168.100.2", "belongs to no node"]),
        ("virtual_ips[0].address", "192.168.0.100/24", ["virtual_ips[0].address", "write the address alone"]),
        ("keys", {}, ["keys", "non-empty object"]),
        ("keys", {"0": "key-0"}, ["keys.0", "from 1 to 255"]),
        ("keys", {"256": "key-256"}, ["keys.256", "from 1 to 255"]),
        ("keys", {"01": "key-1"}, ["keys.01", "from 1 to 255"]),
        ("keys", {"1": "../etc/shadow"}, ["keys.1", "never the key itself"]),
        ("send_key", 2, ["send_key", "2", "not in keys", "write one of 1"]),
        ("mode", "hotstandby", ["mode", '"hotstandby"', "did you mean hot-standby?"]),
        ("replicate", 1, ["replicate", "1", "true or false"]),
        ("replicate", "yes", ["replicate", '"yes"', "true or false"]),
        ("control_socket", "run/x.sock", ["control_socket", "absolute path"]),
        ("control_socket", "/" + "x" * 107, ["control_socket", "107 bytes"]),
        ("track_file", "/run/ctsync/notify.fifo", ["track_file", "also notify_fifo"]),
        ("ignore_addresses", "10.0.0.0/8", ["ignore_addresses", "list"]),
        ("ignore_addresses", ["10.0.0.1/8"], ["ignore_addresses[0]", "host bits", "10.0.0.0/8"]),
        ("ignore_addresses", ["ten"], ["ignore_addresses[0]", '"ten"', "network"]),
        ("filter", [], ["filter", "not an object", "protocols, addresses, tcp_states, marks, zones"]),
        ("filter", {"protocol": ["tcp"]}, ["filter.protocol", "did you mean protocols?"]),
        ("filter", {"protocols": "tcp"}, ["filter.protocols", '"tcp"', "list"]),
        ("filter", {"protocols": ["tpc"]}, ["filter.protocols[0]", '"tpc"', "did you mean tcp?"]),
        ("filter", {"protocols": ["tcp", 256]}, ["filter.protocols[1]", "256", "from 0 to 255"]),
        ("filter", {"protocols": [True]}, ["filter.protocols[0]", "true"]),
        ("filter", {"protocols": ["112"]}, ["filter.protocols[0]", "VRRP", "never replicated"]),
        ("filter", {"addresses": ["10.0.0.1/8"]}, ["filter.addresses[0]", "host bits"]),
        ("filter", {"tcp_states": ["SYN_SENT"]}, ["filter.tcp_states[0]", "SYN_SENT", "ESTABLISHED, FIN_WAIT"]),
        ("filter", {"tcp_states": ["ESTABLISHD"]}, ["filter.tcp_states[0]", "did you mean ESTABLISHED?"]),
        ("filter", {"marks": [1]}, ["filter.marks[0]", "value, mask"]),
        ("filter", {"marks": [{"mask": 1}]}, ["filter.marks[0].value", "is missing"]),
        ("filter", {"marks": [{"value": 1, "mask": 0}]}, ["filter.marks[0].mask", "from 1 to 4294967295"]),
        ("filter", {"marks": [{"value": 3, "mask": 2}]}, ["filter.marks[0]", "0x3", "outside of mask 0x2"]),
        ("filter", {"zones": [0, 65536]}, ["filter.zones[1]", "65536", "from 0 to 65535"]),
        ("lag_limit_ms", 0, ["lag_limit_ms", "from 100 to 600000"]),
        ("dead_after_ms", 300, ["dead_after_ms", "300", "at least 1000"]),
        ("links", [{"interface": "eth3", "address": "10.0.0.1"}], ["links", "stands beside link"]),
        ("peers[0].addresses", ["192.168.100.2"], ["peers[0].addresses", "stands beside address"]),
        ("log_level", "trace", ["log_level", "trace", "debug, info, warning, error"]),
    ],
)
def test_a_mistake_is_named_with_its_remedy(path: str, value: object, says: list[str]) -> None:
    found = problems(changed(path, value))
    assert len(found) == 1, found
    assert all(part in found[0] for part in says), found[0]


def test_every_mistake_is_reported_at_once() -> None:
    document = copy.deepcopy(GOOD)
    del document["node"]
    document["link"]["port"] = -1
    document["keys"] = {"1": "a b", "300": "x"}
    document["verbos"] = 1
    found = problems(json.dumps(document))
    assert [line.split(": ")[1] for line in found] == ["verbos", "node", "link.port", "keys.1", "keys.300"]
    assert all(line.startswith("configuration: ") for line in found)


def test_duplicate_keys_are_refused() -> None:
    found = problems(json.dumps(GOOD)[:-1] + ', "send_key": 1}')
    assert len(found) == 1
    assert '"send_key" stands twice' in found[0]


def test_several_keys_need_send_key() -> None:
    document = {**GOOD, "keys": {"1": "key-1", "2": "/etc/ctsyncd/keys/2.key"}}
    del document["send_key"]
    assert "write one of 1, 2" in problems(json.dumps(document))[0]
    assert config.parse(json.dumps({**document, "send_key": 2})).send_key == 2


def test_key_material_in_place_of_a_file_is_not_repeated() -> None:
    secret = "c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0MTI+"
    found = problems(json.dumps({**GOOD, "keys": {"1": secret}}))
    assert secret not in "".join(found)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "line 1 column 2: not valid JSON"),
        ('{"node": "fw1",\n "peers" []}', "line 2 column 10"),
        ("[]", "not an object"),
        ("null", "not an object"),
        ("[" * 100_000, "nested too deeply"),
        ('{"node": NaN}', "node"),
    ],
)
def test_what_is_not_a_configuration(text: str, says: str) -> None:
    assert says in problems(text)[0]


LINKS = [
    {"interface": "eth2", "address": "192.168.100.1"},
    {"interface": "eth3", "address": "fd00:c0de:65::1", "port": 4000},
]


def several(path: str = "", value: object = None) -> dict[str, Any]:
    document = {**copy.deepcopy(GOOD), "links": copy.deepcopy(LINKS)}
    del document["link"]
    document["peers"] = [{"node": "fw2", "addresses": ["192.168.100.2", "fd00:c0de:65::2"]}]
    if path:
        change(document, path, value)
    return document


def test_several_links_in_the_order_of_preference() -> None:
    settings = config.parse(json.dumps(several()))
    assert settings.links == (
        config.Link("eth2", "192.168.100.1", 3781),
        config.Link("eth3", "fd00:c0de:65::1", 4000),
    )
    assert settings.peers[0] == config.Peer("fw2", ("192.168.100.2", "fd00:c0de:65::2"))
    single = config.parse(json.dumps(GOOD))
    assert [option.key for option in single.differences(settings)] == ["peers", "links"]


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("links", [], ["links", "non-empty list"]),
        ("links", LINKS[0], ["links", "list"]),
        ("links", LINKS * 5, ["links", "10 links", "8 at most"]),
        ("links[1].interface", "eth2", ["links[1].interface", "eth2 stands more than once", "its own interface"]),
        ("links[1].address", "192.168.100.1", ["links[1].address", "stands more than once"]),
        ("links[1].port", 0, ["links[1].port", "from 1 to 65535"]),
        ("peers[0].addresses", ["192.168.100.2"], ["peers[0].addresses", "1 for 2 links", "in the order of links"]),
        ("peers[0].addresses", "192.168.100.2", ["peers[0].addresses", "list of addresses"]),
        ("peers[0].addresses[0]", "x", ["peers[0].addresses[0]", "not an IPv4 or IPv6 address"]),
        ("peers[0].addresses[0]", "fd00::2", ["peers[0].addresses[0]", "same family", "links[0].address"]),
        ("peers[0].addresses[1]", "192.168.100.2", ["peers[0].addresses[1]", "also peers[0].addresses[0]"]),
        ("peers[0].addresses[1]", "fd00:c0de:65::1", ["peers[0].addresses[1]", "this node's own address"]),
        ("peers[0].address", "192.168.100.2", ["peers[0].addresses", "stands beside address"]),
        ("peers", [{"node": "fw2"}], ["peers[0].addresses", "is missing", "in the order of links"]),
        ("peers", [{"node": "fw2", "address": "192.168.100.2"}], ["peers[0].addresses", "is missing"]),
        ("virtual_ips[0].address", "fd00:c0de:65::2", ["virtual_ips", "belongs to no node"]),
    ],
)
def test_a_mistake_in_several_links_is_named_with_its_remedy(path: str, value: object, says: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        config.parse(json.dumps(several(path, value)))
    assert len(caught.value.problems) == 1, caught.value.problems
    for word in says:
        assert word in caught.value.problems[0]


def test_no_link_at_all() -> None:
    assert problems(json.dumps({key: value for key, value in GOOD.items() if key != "link"})) == [
        "configuration: link: is missing: write this node's end of the sync link, or several of them as links"
    ]


def test_addresses_need_links() -> None:
    document = {**GOOD, "peers": [{"node": "fw2", "addresses": ["192.168.100.2"]}]}
    with pytest.raises(ConfigError, match=r"peers\[0\].address: is missing.*addresses goes with links"):
        config.parse(json.dumps(document))


def test_a_link_local_virtual_ip_may_stand_on_every_interface() -> None:
    vips = [{"interface": name, "address": "fe80::100"} for name in ("eth0", "eth1")]
    assert len(config.parse(changed("virtual_ips", vips)).virtual_ips) == 2
    assert "more than once" in problems(changed("virtual_ips", vips + vips[:1]))[0]


def test_load_reports_files_that_cannot_be_read(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "ctsyncd.conf"
    with pytest.raises(ConfigError, match=r"cannot be read: No such file.*-C FILE"):
        config.load(str(file))
    file.write_bytes(b'{"node": "\xff"}')
    with pytest.raises(ConfigError, match="byte 10 is not UTF-8"):
        config.load(str(file))
    file.write_bytes(b" " * (config.MAX_BYTES + 1))
    with pytest.raises(ConfigError, match="larger than"):
        config.load(str(file))
    file.write_text(json.dumps(GOOD))
    assert config.load(str(file)) == config.parse(json.dumps(GOOD))


def test_the_reference_manual_has_the_table() -> None:
    manual = pathlib.Path(__file__).parents[5] / "docs" / "ctsyncd.md"
    assert config.reference() in manual.read_text(encoding="utf-8")


def test_filter_is_read_into_numbers_each_once() -> None:
    selection = {
        "protocols": ["TCP", "6", 17, "gre"],
        "addresses": ["10.0.0.0/8"],
        "tcp_states": ["ESTABLISHED", "TIME_WAIT"],
        "marks": [{"value": 5}, {"value": 1, "mask": 255}],
        "zones": [7, 0, 7],
    }
    read = config.parse(json.dumps({**GOOD, "filter": selection})).filter
    assert read.protocols == (6, 17, 47)
    assert [str(network) for network in read.addresses] == ["10.0.0.0/8"]
    assert read.tcp_states == (3, 7)
    assert read.marks == (config.Mark(5, 0xFFFFFFFF), config.Mark(1, 255))
    assert read.zones == (7, 0)


def test_differences_tell_what_a_reload_can_do() -> None:
    old = config.parse(json.dumps(GOOD))
    new = config.parse(json.dumps({**GOOD, "window_ms": 9, "filter": {"zones": [1]}, "mode": "external-cache"}))
    assert {option.key: option.live for option in old.differences(new)} == {
        "window_ms": True,
        "filter": True,
        "mode": False,
    }
    assert old.differences(old) == []
