# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The filter ``pair_status``."""

from __future__ import annotations

DOCUMENTATION = r"""
name: pair_status
short_description: The verdict of the pair, or of a group of more nodes, out of what the nodes say
version_added: 0.1.0
description:
  - Judges the nodes of a pair or larger group together, out of the results of M(ctsync.ha_firewall.ha_facts) with the
    subsets V(host), V(role), V(sync) and V(vrrp).
  - A node whose result failed or is unreachable counts as one that could not be asked.
options:
  _input:
    description: Names of the hosts that belong to the pair.
    type: list
    elements: str
    required: true
  hostvars:
    description: Ansible's C(hostvars).
    type: dict
    required: true
  variable:
    description: Name of the variable that the result was registered in.
    type: str
    default: ctsync_asked
  target:
    description:
      - Of several nodes that wait, the one that is to become active; else it is the one that keepalived would elect.
    type: str
    default: ""
author:
  - The ctsync authors
"""

EXAMPLES = r"""
- name: Ask the node
  ctsync.ha_firewall.ha_facts:
    gather_subset: [host, role, sync, vrrp]
  register: ctsync_asked
  ignore_unreachable: true

- name: Show the verdict of the pair
  ansible.builtin.debug:
    msg: "{{ (groups.firewalls | ctsync.ha_firewall.pair_status(hostvars)).lines }}"
  run_once: true
"""

RETURN = r"""
_value:
  description:
    - C(verdict) (V(READY), V(DEGRADED) or V(NOT READY)) with C(reasons); C(active) and C(standby), the names of the
      nodes or empty when it is not clear; C(standbys), all nodes that wait; C(obstacles), why the standby should not be
      made active now; C(lines), a table.
  type: dict
  sample: {verdict: READY, reasons: [], active: fw1, standby: fw2, standbys: [fw2], obstacles: [], lines: [READY]}
"""

from typing import Any, Mapping, Sequence

from ansible.errors import AnsibleFilterError
from ansible_collections.ctsync.ha_firewall.plugins.module_utils import _pair


def node_of(result: Any) -> Mapping[str, Any]:
    """What a registered result says of its node."""
    if not isinstance(result, Mapping):
        return {"problem": "it took no part in this run; run it for the whole pair, without --limit"}
    facts = (result.get("ansible_facts") or {}).get("ha_firewall")
    if not facts:  # a task whose "until" never came true counts as failed, and has the facts
        message = str(result.get("msg") or "no answer").strip()
        return {"problem": message.splitlines()[0]}
    return dict(facts)


def pair_status(
    hosts: Sequence[str], hostvars: Mapping[str, Any], variable: str = "ctsync_asked", target: str = ""
) -> dict[str, Any]:
    """See DOCUMENTATION. Raises AnsibleFilterError when the input is not what it should be."""
    if isinstance(hosts, (str, bytes)) or not isinstance(hosts, Sequence):
        raise AnsibleFilterError("pair_status: the input is not a list of host names")
    nodes = {str(host): node_of((hostvars.get(host) or {}).get(variable)) for host in hosts}
    return _pair.judge(nodes, str(target or ""))


class FilterModule:
    """Ansible looks for this name."""

    def filters(self) -> dict[str, Any]:
        return {"pair_status": pair_status}
