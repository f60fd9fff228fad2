# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The filter ``facts_from_rules``."""

from __future__ import annotations

DOCUMENTATION = r"""
name: facts_from_rules
short_description: Addresses of nodes that cannot be asked, out of another node's rules for VRRP
version_added: 0.1.0
description:
  - A node that has been deployed accepts VRRP from the addresses of its peers, and from nobody else. When one of them
    is dead, what the roles need of its facts is read from these rules.
options:
  _input:
    description: What M(ctsync.ha_firewall.ha_facts) reports as C(ruleset) on the node that lives.
    type: dict
    required: true
  virtual_ips:
    description: The virtual IPs, each with C(interface) and C(address) (with prefix length).
    type: list
    elements: dict
    required: true
  facts:
    description: Host name to C(ansible_facts), for all other nodes of the group, in its order; empty for those without.
    type: dict
    required: true
author:
  - The ctsync authors
"""

EXAMPLES = r"""
- name: Show the addresses of a dead node
  ansible.builtin.debug:
    msg: "{{ rules | ctsync.ha_firewall.facts_from_rules(ha_firewall_virtual_ips, {'fw2': {}}) }}"
  vars:
    rules: "{{ ansible_facts.ha_firewall.ruleset }}"
"""

RETURN = r"""
_value:
  description:
    - For each host without facts a part of them, C(interfaces) and their addresses. A host of which nothing can be told
      is left out.
  type: dict
  sample:
    fw2:
      interfaces: [eth1]
      eth1: {ipv4: {address: 192.168.0.2, prefix: "24"}, ipv4_secondaries: [], ipv6: []}
"""

from typing import Any, Mapping, Sequence

from ansible.errors import AnsibleFilterError
from ansible_collections.ctsync.ha_firewall.plugins.module_utils import _preflight


def facts_from_rules(
    ruleset: Mapping[str, Any], virtual_ips: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """See DOCUMENTATION. Raises AnsibleFilterError when the input is not what it should be."""
    try:
        return _preflight.facts_from_rules(ruleset, virtual_ips, {host: known or {} for host, known in facts.items()})
    except KeyError as error:
        raise AnsibleFilterError(
            f"facts_from_rules: an entry of the virtual IPs has no {error.args[0]}: add it"
        ) from error
    except (ValueError, TypeError, AttributeError) as error:
        raise AnsibleFilterError(f"facts_from_rules: {error}") from error


class FilterModule:
    """Ansible looks for this name."""

    def filters(self) -> dict[str, Any]:
        return {"facts_from_rules": facts_from_rules}
