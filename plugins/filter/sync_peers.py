# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The filter ``sync_peers``."""

from __future__ import annotations

DOCUMENTATION = r"""
name: sync_peers
short_description: The other firewalls and their addresses on the sync links, out of the inventory
version_added: 0.1.0
description:
  - Takes the names of the other nodes and gives the list that O(ctsync.ha_firewall.ctsyncd#module:peers) wants. The
    links of a node are those of P(ctsync.ha_firewall.sync_links#filter).
options:
  _input:
    description: Names of the other hosts.
    type: list
    elements: str
    required: true
  hostvars:
    description: Ansible's C(hostvars).
    type: dict
    required: true
author:
  - The ctsync authors
"""

EXAMPLES = r"""
- name: Show the peers of this node
  ansible.builtin.debug:
    msg: >-
      {{ groups['firewalls'] | reject('equalto', inventory_hostname) | list | ctsync.ha_firewall.sync_peers(hostvars) }}
"""

RETURN = r"""
_value:
  description: Dictionaries with C(node) and C(address), or C(addresses) for a node with several links.
  type: list
  elements: dict
"""

from typing import Any, Mapping, Sequence

from ansible.errors import AnsibleFilterError
from ansible_collections.ctsync.ha_firewall.plugins.module_utils import _sync


def sync_peers(hosts: Sequence[str], hostvars: Mapping[str, Any]) -> list[dict[str, Any]]:
    """See DOCUMENTATION. Raises AnsibleFilterError naming host, variable and remedy."""
    peers = []
    for host in hosts:
        try:
            peers.append(_sync.peer(str(host), hostvars[host]))
        except (KeyError, TypeError, ValueError) as error:
            raise AnsibleFilterError(f"sync_peers: {host}: {error}") from error
    return peers


class FilterModule:
    """Ansible looks for this name."""

    def filters(self) -> dict[str, Any]:
        return {"sync_peers": sync_peers}
