# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Size and timeouts of the conntrack table as typed options."""

from __future__ import annotations

import pytest
from ansible.errors import AnsibleFilterError
from ansible_collections.ctsync.ha_firewall.plugins.filter.conntrack_sysctls import conntrack_sysctls
from ansible_collections.ctsync.ha_firewall.plugins.module_utils import _conntrack_settings, _options

NF = "net.netfilter.nf_conntrack_"


def test_nothing_given_leaves_what_the_kernel_has():
    assert _conntrack_settings.settings() == ([], [])
    assert conntrack_sysctls({"max": 0, "buckets": 0, "timeouts": {}}) == []
    assert conntrack_sysctls({}) == []


def test_what_is_given_becomes_sysctls_in_the_order_of_setting():
    given = {"max": "524288", "buckets": 524288, "timeouts": {"udp_timeout": 30, "tcp_timeout_established": "86400"}}
    assert conntrack_sysctls(given) == [
        {"name": NF + "max", "value": "524288"},
        {"name": NF + "buckets", "value": "524288"},
        {"name": NF + "udp_timeout", "value": "30"},
        {"name": NF + "tcp_timeout_established", "value": "86400"},
    ]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"max": 100}, "kernel_conntrack_max: 100 is not 1024 to 2147483647 flows"),
        ({"max": "many"}, "kernel_conntrack_max: 'many' is not"),
        ({"max": True}, "kernel_conntrack_max: True is not"),
        ({"max": -1}, "kernel_conntrack_max: -1 is not"),
        (
            {"buckets": 500000},
            "kernel_conntrack_buckets: 500000 is not a multiple of 512, and the kernel .* write 500224",
        ),
        ({"buckets": "x"}, "kernel_conntrack_buckets: 'x' is not a number"),
        ({"timeouts": ["udp_timeout"]}, "kernel_conntrack_timeouts: is not a mapping"),
        ({"timeouts": {"udp_timeout": 0}}, "kernel_conntrack_timeouts: udp_timeout: 0 is not 1 to 31536000 seconds"),
        ({"timeouts": {"max": 5}}, "'max' is no name of a timeout after net.netfilter.nf_conntrack_, such as"),
        ({"timeouts": {"frag6_timeout": 5}}, "'frag6_timeout' is no name of a timeout"),
        ({"timeouts": {NF + "udp_timeout": 5}}, "is no name of a timeout .*: write udp_timeout$"),
        ({"timeouts": {"../../x_timeout": 5}}, "is no name of a timeout"),
    ],
)
def test_each_mistake_is_named_with_its_remedy(given, words):
    with pytest.raises(AnsibleFilterError, match=words):
        conntrack_sysctls(given)
    assert conntrack_sysctls(given, strict=False) == []


def test_all_mistakes_are_told_at_once_and_what_is_right_is_kept():
    given = {"max": 1, "buckets": 1, "timeouts": {"udp_timeout": 30, "x": 1}}
    with pytest.raises(AnsibleFilterError) as caught:
        conntrack_sysctls(given)
    assert str(caught.value).count("kernel_conntrack_") == 3
    assert conntrack_sysctls(given, strict=False) == [{"name": NF + "udp_timeout", "value": "30"}]


def test_the_preflight_tells_them_by_the_names_of_the_variables():
    specs = {
        "kernel_conntrack_max": {"type": "int"},
        "kernel_conntrack_buckets": {"type": "int"},
        "kernel_conntrack_timeouts": {"type": "dict"},
    }
    variables = {"kernel_conntrack_max": 7, "kernel_conntrack_buckets": 512, "kernel_conntrack_timeouts": {"y": 1}}
    said = _options.judge(variables, specs, variables.__getitem__).problems
    assert [sentence.partition(":")[0] for sentence in said] == ["kernel_conntrack_max", "kernel_conntrack_timeouts"]
    right = {**variables, "kernel_conntrack_max": 4096, "kernel_conntrack_timeouts": {"udp_timeout": 9}}
    assert _options.judge(right, specs, right.__getitem__).problems == []


@pytest.mark.parametrize(
    ("sysctl", "option"),
    [
        (NF + "max", "kernel_conntrack_max"),
        ("net/netfilter/nf_conntrack_buckets", "kernel_conntrack_buckets"),
        (NF + "tcp_timeout_established", "kernel_conntrack_timeouts"),
        (NF + "tcp_be_liberal", "kernel_extra_sysctls"),
        ("net.core.rmem_max", "kernel_extra_sysctls"),
    ],
)
def test_messages_name_the_variable_that_sets_a_key(sysctl, option):
    assert _conntrack_settings.option_of(sysctl) == option
