# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The filter ``vrrp_instances``."""

from __future__ import annotations

DOCUMENTATION = r"""
name: vrrp_instances
short_description: VRRP instances out of the virtual IPs of a pair
version_added: 0.1.0
description:
  - Makes the option O(ctsync.ha_firewall.keepalived#module:instances) out of the list of virtual IPs and the facts of
    all nodes. Each interface, router id and address family gets one instance.
  - The own addresses of the nodes, for unicast, are those in the virtual IP's network that are not virtual themselves.
options:
  _input:
    description:
      - The virtual IPs, each with C(interface), C(address) (with prefix length) and C(router_id). Without the latter,
        an interface gets the next free number from 51 on, in the order of the list.
    type: list
    elements: dict
    required: true
  facts:
    description: Host name to C(ansible_facts), for all nodes of the pair.
    type: dict
    required: true
  node:
    description: Name of the node to make the instances for.
    type: str
    required: true
  unicast:
    description: Whether to advertise to the peers by unicast.
    type: bool
    default: true
author:
  - The ctsync authors
"""

EXAMPLES = r"""
- name: Show the VRRP instances of this node
  ansible.builtin.debug:
    msg: "{{ ha_firewall_virtual_ips | ctsync.ha_firewall.vrrp_instances(facts, inventory_hostname) }}"
  vars:
    facts: "{{ dict(groups.firewalls | zip(groups.firewalls | map('extract', hostvars, 'ansible_facts'))) }}"
"""

RETURN = r"""
_value:
  description: The instances.
  type: list
  elements: dict
"""

from typing import Any, Mapping, Sequence

from ansible.errors import AnsibleFilterError
from ansible_collections.ctsync.ha_firewall.plugins.module_utils import _preflight


def vrrp_instances(
    virtual_ips: Sequence[Mapping[str, Any]], facts: Mapping[str, Any], node: str, unicast: bool = True
) -> list[dict[str, Any]]:
    """See DOCUMENTATION. Raises AnsibleFilterError naming host and remedy."""
    try:
        return _preflight.vrrp_instances(virtual_ips, facts, node, bool(unicast))
    except KeyError as error:
        raise AnsibleFilterError(
            f"vrrp_instances: an entry of the virtual IPs has no {error.args[0]}: add it"
        ) from error
    except (ValueError, TypeError) as error:
        raise AnsibleFilterError(f"vrrp_instances: {error}") from error


class FilterModule:
    """Ansible looks for this name."""

    def filters(self) -> dict[str, Any]:
        return {"vrrp_instances": vrrp_instances}
