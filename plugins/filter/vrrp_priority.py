# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The filter ``vrrp_priority``."""

from __future__ import annotations

DOCUMENTATION = r"""
name: vrrp_priority
short_description: The VRRP priority of a node by its place in the group
version_added: 0.1.0
description:
  - Gives each node of a group a priority of its own, the first the highest (150 and 100 for two nodes), such that a
    node that is not ready loses against every one that is.
options:
  _input:
    description: Names of all nodes of the group, in the same order on every node.
    type: list
    elements: str
    required: true
  host:
    description: Name of the node.
    type: str
    required: true
  track_weight:
    description: What a node that is not ready adds to its priority.
    type: int
    default: -60
author:
  - The ctsync authors
"""

EXAMPLES = r"""
- name: Show the priorities that a group gets
  ansible.builtin.debug:
    msg: "{{ item }}: {{ groups.firewalls | ctsync.ha_firewall.vrrp_priority(item) }}"
  loop: "{{ groups.firewalls }}"
"""

RETURN = r"""
_value:
  description: The priority, 1 to 254.
  type: int
  sample: 150
"""

from typing import Any, Sequence

from ansible.errors import AnsibleFilterError
from ansible_collections.ctsync.ha_firewall.plugins.module_utils import _keepalived, _vrrp_numbers


def vrrp_priority(hosts: Sequence[str], host: str, track_weight: Any = _keepalived.DEFAULT_WEIGHT) -> int:
    """See DOCUMENTATION. Raises AnsibleFilterError when there is none."""
    if isinstance(hosts, str) or not isinstance(hosts, Sequence):
        raise AnsibleFilterError("vrrp_priority: the input is not a list of host names")
    try:
        return _vrrp_numbers.priority([str(each) for each in hosts], str(host), int(track_weight))
    except ValueError as error:
        raise AnsibleFilterError(f"vrrp_priority: {error}") from error


class FilterModule:
    """Ansible looks for this name."""

    def filters(self) -> dict[str, Any]:
        return {"vrrp_priority": vrrp_priority}
