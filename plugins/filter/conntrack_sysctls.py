# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The filter ``conntrack_sysctls``."""

from __future__ import annotations

DOCUMENTATION = r"""
name: conntrack_sysctls
short_description: Size and timeouts of the connection tracking table as sysctls
version_added: 0.1.0
description:
  - Makes the sysctls of the module M(ctsync.ha_firewall.kernel_settings) out of the role's options
    C(kernel_conntrack_max), C(kernel_conntrack_buckets) and C(kernel_conntrack_timeouts).
options:
  _input:
    description: C(max) and C(buckets), V(0) for what the kernel has, and C(timeouts), in seconds by name.
    type: dict
    required: true
  strict:
    description: Whether to fail with what is wrong, instead of leaving it out.
    type: bool
    default: true
author:
  - The ctsync authors
"""

EXAMPLES = r"""
- name: Show what would be set
  ansible.builtin.debug:
    msg: "{{ {'max': 524288, 'timeouts': {'udp_timeout': 30}} | ctsync.ha_firewall.conntrack_sysctls }}"
"""

RETURN = r"""
_value:
  description: Names and values, in the order of setting.
  type: list
  elements: dict
  sample: [{name: net.netfilter.nf_conntrack_max, value: "524288"}]
"""

from typing import Any, Mapping

from ansible.errors import AnsibleFilterError
from ansible_collections.ctsync.ha_firewall.plugins.module_utils import _conntrack_settings


def conntrack_sysctls(options: Mapping[str, Any], strict: bool = True) -> list[dict[str, str]]:
    """See DOCUMENTATION. Raises AnsibleFilterError naming every mistake."""
    if not isinstance(options, Mapping):
        raise AnsibleFilterError("conntrack_sysctls: the input is not a mapping of max, buckets and timeouts")
    found = _conntrack_settings.settings(options.get("max"), options.get("buckets"), options.get("timeouts"))
    if found.problems and strict:
        raise AnsibleFilterError("; ".join(f"kernel_{problem}" for problem in found.problems))
    return found.sysctls


class FilterModule:
    """Ansible looks for this name."""

    def filters(self) -> dict[str, Any]:
        return {"conntrack_sysctls": conntrack_sysctls}
