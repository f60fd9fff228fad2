# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The filter ``group_problems``."""

from __future__ import annotations

DOCUMENTATION = r"""
name: group_problems
short_description: Everything that is wrong with a pair of firewalls, before anything is done to it
version_added: 0.1.0
description:
  - Checks inventory variables and facts of all nodes of a pair together and returns one sentence for each problem,
    naming host, option and remedy. Keys are never shown.
options:
  _input:
    description: Names of the hosts that belong to the pair.
    type: list
    elements: str
    required: true
  hostvars:
    description:
      - Ansible's C(hostvars). Of each host, C(preflight__node) is read if the role P(ctsync.ha_firewall.preflight#role)
        set it, else the inventory's C(ha_firewall_*) variables; and C(ansible_facts), as far as they were gathered.
    type: dict
    required: true
  track_weight:
    description: What a node that is not ready adds to its VRRP priority.
    type: int
    default: -60
  play_hosts:
    description:
      - The hosts that take part, such as C(ansible_play_hosts_all). A node that is not among them is a problem. Without
        it, nobody is missed.
    type: list
    elements: str
author:
  - The ctsync authors
"""

EXAMPLES = r"""
- name: Refuse a pair that cannot work
  ansible.builtin.assert:
    that: problems | length == 0
    fail_msg: "{{ problems | join('\n') }}"
  vars:
    problems: "{{ groups['firewalls'] | ctsync.ha_firewall.group_problems(hostvars) }}"
"""

RETURN = r"""
_value:
  description: The problems, empty when there are none.
  type: list
  elements: str
"""

from typing import Any, Mapping, Sequence

from ansible.errors import AnsibleFilterError
from ansible_collections.ctsync.ha_firewall.plugins.module_utils import _keepalived, _preflight


def node_options(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a host: what the role prepared, or the inventory's variables as they are."""
    prepared = variables.get("preflight__node")
    if isinstance(prepared, Mapping):
        return dict(prepared)
    options = {}
    for option, name in _preflight.VARIABLES.items():
        value = variables.get(name)
        if value is not None:
            options[option] = value
    options["key"] = _preflight.summarize_key(options.get("key"))
    return options


def group_problems(
    hosts: Sequence[str],
    hostvars: Mapping[str, Any],
    track_weight: Any = _keepalived.DEFAULT_WEIGHT,
    play_hosts: Sequence[str] | None = None,
) -> list[str]:
    """See DOCUMENTATION. Raises AnsibleFilterError when the input is not what it should be."""
    if isinstance(hosts, (str, bytes)) or not isinstance(hosts, Sequence):
        raise AnsibleFilterError("group_problems: the input is not a list of host names")
    nodes, facts = {}, {}
    for host in hosts:
        variables = hostvars.get(host) or {}
        nodes[str(host)] = node_options(variables)
        facts[str(host)] = variables.get("ansible_facts") or {}
    weight = _preflight.as_int(track_weight)  # one that is no number is said as an option's problem
    absent = [host for host in nodes if play_hosts is not None and host not in play_hosts]
    return _preflight.group_problems(nodes, facts, _keepalived.DEFAULT_WEIGHT if weight is None else weight, absent)


class FilterModule:
    """Ansible looks for this name."""

    def filters(self) -> dict[str, Any]:
        return {"group_problems": group_problems}
