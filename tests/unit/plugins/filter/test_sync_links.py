# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The sync links out of the inventory, written one way or the other."""

from __future__ import annotations

import pytest
from ansible.errors import AnsibleFilterError
from ansible_collections.ctsync.ha_firewall.plugins.filter.sync_links import FilterModule, sync_links
from ansible_collections.ctsync.ha_firewall.plugins.filter.sync_peers import FilterModule as PeersModule
from ansible_collections.ctsync.ha_firewall.plugins.filter.sync_peers import sync_peers

ONE = {
    f"fw{number}": {
        "ha_firewall_sync_interface": "eth2",
        "ha_firewall_sync_address": f"10.0.0.{number}",
        "ha_firewall_sync_port": "4000",
    }
    for number in (1, 2)
}
TWO = {
    f"fw{number}": {
        "ha_firewall_sync_links": [
            {"interface": "eth2", "address": f"10.0.0.{number}"},
            {"interface": "eth3", "address": f"fd00::{number}", "port": 5000},
        ]
    }
    for number in (1, 2, 3)
}


def test_ansible_finds_them():
    assert FilterModule().filters() == {"sync_links": sync_links}
    assert PeersModule().filters() == {"sync_peers": sync_peers}


def test_one_link():
    link = {"interface": "eth2", "address": "10.0.0.1", "port": 4000}
    assert sync_links("fw1", ONE) == [link]
    assert sync_links("fw1", ONE, peers=["fw2"]) == [{**link, "peers": ["10.0.0.2"]}]
    assert sync_peers(["fw2"], ONE) == [{"node": "fw2", "address": "10.0.0.2"}]


def test_several_links():
    one = {"interface": "eth2", "address": "10.0.0.1", "port": 3781}
    two = {"interface": "eth3", "address": "fd00::1", "port": 5000}
    assert sync_links("fw1", TWO) == [one, two]
    assert sync_links("fw1", TWO, peers=["fw2", "fw3"]) == [
        {**one, "peers": ["10.0.0.2", "10.0.0.3"]},
        {**two, "peers": ["fd00::2", "fd00::3"]},
    ]
    assert sync_peers(["fw2", "fw3"], TWO) == [
        {"node": "fw2", "addresses": ["10.0.0.2", "fd00::2"]},
        {"node": "fw3", "addresses": ["10.0.0.3", "fd00::3"]},
    ]


def test_a_host_without_replication():
    assert sync_links("fw1", {"fw1": {}, "fw2": {}}, peers=["fw2"]) == []
    with pytest.raises(AnsibleFilterError, match="fw2: ha_firewall_sync_links: is missing"):
        sync_peers(["fw2"], {"fw2": {}})


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"ha_firewall_sync_links": "eth2"}, "ha_firewall_sync_links: is not a list"),
        ({"ha_firewall_sync_links": {"interface": "eth2"}}, "ha_firewall_sync_links: is not a list"),
        ({"ha_firewall_sync_links": ["eth2"]}, r"ha_firewall_sync_links\[0\]: is not a dictionary"),
        ({"ha_firewall_sync_links": [{"interface": "eth2"}]}, r"ha_firewall_sync_links\[0\].address: is missing"),
        (
            {"ha_firewall_sync_links": [{"interface": "eth2", "address": "10.0.0.1", "ports": 1}]},
            r"ha_firewall_sync_links\[0\]: ports: write interface, address",
        ),
        ({"ha_firewall_sync_interface": "eth2"}, "ha_firewall_sync_address: is missing"),
    ],
)
def test_what_is_wrong_is_named(variables, says):
    with pytest.raises(AnsibleFilterError, match=f"fw1: {says}"):
        sync_links("fw1", {"fw1": variables})


def test_nodes_with_different_numbers_of_links():
    with pytest.raises(AnsibleFilterError, match="fw2 has 1 sync links and fw1 has 2: name the same links"):
        sync_links("fw1", {"fw1": TWO["fw1"], "fw2": ONE["fw2"]}, peers=["fw2"])
