# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Router ids and priorities that nobody gave: different, in range, and the same whoever computes them."""

from __future__ import annotations

import pytest
from ansible.errors import AnsibleFilterError
from ansible_collections.ctsync.ha_firewall.plugins.filter import vrrp_priority
from ansible_collections.ctsync.ha_firewall.plugins.module_utils import _vrrp_numbers as n
from hypothesis import given
from hypothesis import strategies as st


def ids(*entries):
    return [entry["router_id"] for entry in n.with_router_ids([{"interface": i, "router_id": r} for i, r in entries])]


def test_interfaces_are_numbered_in_their_order_and_given_numbers_stay():
    assert ids(("a", None), ("b", None), ("a", None)) == [51, 52, 51]
    assert ids(("a", None), ("b", 51), ("c", ""), ("c", None)) == [52, 51, 53, 53]
    assert ids(("a", None), ("a", 7), ("b", "52"), ("c", None)) == [7, 7, "52", 51]
    assert n.with_router_ids(["no mapping", {"interface": "a"}]) == ["no mapping", {"interface": "a", "router_id": 51}]


def test_names_of_interfaces_do_not_matter():
    entries = [("eth1", None), ("eth0", None), ("eth1", None), ("eth5", 9)]
    renamed = [(name.replace("eth", "ens"), number) for name, number in entries]
    assert ids(*entries) == ids(*renamed)


@given(count=st.integers(1, 60), weight=st.integers(-253, -1))
def test_priorities_differ_and_a_node_that_is_not_ready_loses(count, weight):
    hosts = [f"fw{number}" for number in range(count)]
    try:
        found = [n.priority(hosts, host, weight) for host in hosts]
    except ValueError as error:
        assert count > 1 and "different priorities" in str(error)
        assert min(50, -weight - 1, 254 - max(100, 1 - weight)) < count - 1
        return
    assert found == sorted(set(found), reverse=True)
    assert all(1 - weight <= number <= 254 for number in found)
    assert found[0] + weight < found[-1]


def test_two_nodes_get_what_the_documentation_says():
    assert [vrrp_priority.vrrp_priority(["fw1", "fw2"], host) for host in ("fw1", "fw2")] == [150, 100]
    assert [vrrp_priority.vrrp_priority(["a", "b", "c"], host, "-60") for host in "abc"] == [150, 125, 100]


@pytest.mark.parametrize(("hosts", "host", "weight"), [(["a"], "b", -60), ("ab", "a", -60), (["a", "b"], "a", "x")])
def test_wrong_input_is_refused(hosts, host, weight):
    with pytest.raises(AnsibleFilterError, match="vrrp_priority: "):
        vrrp_priority.vrrp_priority(hosts, host, weight)
