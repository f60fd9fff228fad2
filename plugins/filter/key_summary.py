# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The filter ``key_summary``."""

from __future__ import annotations

DOCUMENTATION = r"""
name: key_summary
short_description: What may be said of a pre-shared key without showing it
version_added: 0.1.0
description:
  - Tells whether a key is given, whether it is base64, and its length in bytes.
  - A key of at least 32 bytes also gets a fingerprint, so that the keys of two nodes can be compared.
options:
  _input:
    description: The key, base64.
    type: str
    required: true
author:
  - The ctsync authors
"""

EXAMPLES = r"""
- name: Compare keys without showing them
  ansible.builtin.debug:
    msg: "{{ ha_firewall_key | ctsync.ha_firewall.key_summary }}"
"""

RETURN = r"""
_value:
  description: The keys C(given), C(valid), C(bytes) and C(fingerprint).
  type: dict
  sample: {given: true, valid: true, bytes: 32, fingerprint: 9f86d081884c7d659a2feaa0c55ad015}
"""

from typing import Any

from ansible_collections.ctsync.ha_firewall.plugins.module_utils import _preflight


class FilterModule:
    """Ansible looks for this name."""

    def filters(self) -> dict[str, Any]:
        return {"key_summary": _preflight.summarize_key}
