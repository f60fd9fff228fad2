# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The filter ``sync_links``."""

from __future__ import annotations

DOCUMENTATION = r"""
name: sync_links
short_description: The sync links of a firewall, out of the inventory
version_added: 0.1.0
description:
  - The list C(ha_firewall_sync_links) of a host, or a list of one link out of C(ha_firewall_sync_interface) and
    C(ha_firewall_sync_address). A link without a port has C(ha_firewall_sync_port), or 3781.
options:
  _input:
    description: Name of the host.
    type: str
    required: true
  hostvars:
    description: Ansible's C(hostvars).
    type: dict
    required: true
  peers:
    description: Names of the other hosts. With them each link has C(peers), their addresses on it.
    type: list
    elements: str
author:
  - The ctsync authors
"""

EXAMPLES = r"""
- name: Show the sync links of this node
  ansible.builtin.debug:
    msg: "{{ inventory_hostname | ctsync.ha_firewall.sync_links(hostvars) }}"
"""

RETURN = r"""
_value:
  description:
    - Dictionaries with C(interface), C(address) and C(port), and C(peers) if they were asked for.
    - In the order of preference; empty for a host without a link.
  type: list
  elements: dict
"""

from typing import Any, Mapping, Optional, Sequence

from ansible.errors import AnsibleFilterError
from ansible_collections.ctsync.ha_firewall.plugins.module_utils import _sync


def sync_links(host: str, hostvars: Mapping[str, Any], peers: Optional[Sequence[str]] = None) -> list[dict[str, Any]]:
    """See DOCUMENTATION. Raises AnsibleFilterError naming host, variable and remedy."""
    own = _links(host, hostvars)
    if peers is None or not own:
        return own
    for link in own:
        link["peers"] = []
    for peer in peers:
        theirs = _links(peer, hostvars)
        if len(theirs) != len(own):
            raise AnsibleFilterError(
                f"sync_links: {peer} has {len(theirs)} sync links and {host} has {len(own)}: "
                f"name the same links on all nodes, in the same order ({_sync.LINKS})"
            )
        for link, other in zip(own, theirs):
            link["peers"].append(other["address"])
    return own


def _links(host: str, hostvars: Mapping[str, Any]) -> list[dict[str, Any]]:
    try:
        return _sync.links(hostvars[host])
    except (KeyError, TypeError, ValueError) as error:
        raise AnsibleFilterError(f"sync_links: {host}: {error}") from error


class FilterModule:
    """Ansible looks for this name."""

    def filters(self) -> dict[str, Any]:
        return {"sync_links": sync_links}
