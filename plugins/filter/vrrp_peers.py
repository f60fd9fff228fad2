# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The filter ``vrrp_peers``."""

from __future__ import annotations

DOCUMENTATION = r"""
name: vrrp_peers
short_description: Who may send VRRP on which interface, from the facts of the other nodes
version_added: 0.1.0
description:
  - Makes the C(vrrp_peers) of the module M(ctsync.ha_firewall.ruleset) out of the group's virtual IPs and the facts of
    the other nodes.
  - These are a peer's own addresses on the interface of a virtual IP, of its family, the link-local ones included, from
    which IPv6 multicast is sent. Virtual addresses are left out.
options:
  _input:
    description: The virtual IPs, each with C(interface) and C(address) (with prefix length).
    type: list
    elements: dict
    required: true
  facts:
    description: Host name to C(ansible_facts), for all other nodes of the group.
    type: dict
    required: true
author:
  - The ctsync authors
"""

EXAMPLES = r"""
- name: Show who may send VRRP to this node
  ansible.builtin.debug:
    msg: "{{ ha_firewall_virtual_ips | ctsync.ha_firewall.vrrp_peers(facts) }}"
  vars:
    peers: "{{ groups.firewalls | reject('equalto', inventory_hostname) | list }}"
    facts: "{{ dict(peers | zip(peers | map('extract', hostvars, 'ansible_facts'))) }}"
"""

RETURN = r"""
_value:
  description: Interfaces, each with the addresses of the peers on it.
  type: list
  elements: dict
  sample: [{interface: eth1, addresses: [192.168.0.2, "fd00:c0de::2", "fe80::2"]}]
"""

from typing import Any, Mapping, Sequence

from ansible.errors import AnsibleFilterError
from ansible_collections.ctsync.ha_firewall.plugins.module_utils import _preflight


def vrrp_peers(virtual_ips: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """See DOCUMENTATION. Raises AnsibleFilterError naming host and remedy."""
    try:
        return _preflight.vrrp_peers(virtual_ips, {host: known or {} for host, known in facts.items()})
    except KeyError as error:
        raise AnsibleFilterError(f"vrrp_peers: an entry of the virtual IPs has no {error.args[0]}: add it") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise AnsibleFilterError(f"vrrp_peers: {error}") from error


class FilterModule:
    """Ansible looks for this name."""

    def filters(self) -> dict[str, Any]:
        return {"vrrp_peers": vrrp_peers}
