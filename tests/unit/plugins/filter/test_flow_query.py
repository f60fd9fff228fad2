# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Queries over flows."""

from __future__ import annotations

import pytest
from ansible.errors import AnsibleFilterError
from ansible_collections.ctsync.ha_firewall.plugins.filter import flow_query as module


def flow(src, dst, sport, dport, *, state="ESTABLISHED", vip="192.168.1.100"):
    return {
        "state": state,
        "orig": {"src": src, "dst": dst, "sport": sport, "dport": dport},
        "reply": {"src": dst, "dst": vip, "sport": dport, "dport": sport},
    }


FLOWS = [
    flow("192.168.0.3", "192.168.1.3", 51356, 22),
    flow("192.168.0.4", "192.168.1.3", 51357, 22, state="TIME_WAIT"),
    flow("fd00:c0de::3", "fd00:c0de:1::3", 40000, 443, vip="fd00:c0de:1::100"),
    {"state": None, "orig": {"src": "192.168.0.3", "dst": "192.168.1.3", "type": 8, "code": 0, "id": 7}, "reply": {}},
]


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("[?state == 'ESTABLISHED'].orig.sport", [51356, 40000]),
        ("[?cidr_contains('192.168.0.0/24', orig.src)].orig.src", ["192.168.0.3", "192.168.0.4", "192.168.0.3"]),
        ("[?cidr_contains('0.0.0.0/0', orig.src)] | length(@)", 3),
        ("[?cidr_contains('192.168.0.3', orig.src)] | length(@)", 2),
        ("[?has_port(@, `22`)].orig.sport", [51356, 51357]),
        ("[?has_port(@, `51356`)] | length(@)", 1),
        ("[?between(@, '192.168.0.0/24', '192.168.1.3')] | length(@)", 3),
        ("[?between(@, '192.168.1.3', '192.168.0.0/24')]", []),
        (
            "[?between(@, 'fd00:c0de::/64', '::/0')].endpoint(reply)",
            ["[fd00:c0de:1::3]:443 -> [fd00:c0de:1::100]:40000"],
        ),
        ("[0].endpoint(orig)", "192.168.0.3:51356 -> 192.168.1.3:22"),
        ("[3].endpoint(orig)", "192.168.0.3 -> 192.168.1.3 id 7"),
    ],
)
def test_expressions(expression, result):
    assert module.flow_query(FLOWS, expression) == result


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("[?state ==", "Invalid jmespath expression"),
        ("[?cidr_contains('10.0.0.0/33', orig.src)]", "'10.0.0.0/33' is not an address or a network"),
        ("[?cidr_contains('10.0.0.0/8', 'x')]", "'x' is not an address"),
        ("[?has_port(@, '22')]", "invalid type"),
    ],
)
def test_a_wrong_expression_is_explained(expression, said):
    with pytest.raises(AnsibleFilterError, match="flow_query") as caught:
        module.flow_query(FLOWS, expression)
    assert said in str(caught.value)


def test_a_missing_library_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setattr(module, "jmespath", None)
    with pytest.raises(AnsibleFilterError, match="pip install jmespath"):
        module.flow_query(FLOWS, "[0]")
