# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The filter ``lost_sessions``."""

from __future__ import annotations

DOCUMENTATION = r"""
name: lost_sessions
short_description: Which established sessions of one table the other does not have
version_added: 0.1.0
description:
  - Compares two lists of flows, as M(ctsync.ha_firewall.ha_facts) returns them, before and after a hand-over.
  - Established TCP sessions of the first that the second has in no state at all were lost. One that ended properly in
    between is still in the table for a while.
options:
  _input:
    description: The flows before.
    type: list
    elements: dict
    required: true
  after:
    description: The flows after.
    type: list
    elements: dict
    required: true
author:
  - The ctsync authors
"""

EXAMPLES = r"""
- name: Demand that no session was lost
  ansible.builtin.assert:
    that: before.internal | ctsync.ha_firewall.lost_sessions(after.kernel) | length == 0
"""

RETURN = r"""
_value:
  description: The lost sessions.
  type: list
  elements: str
  sample: ["192.168.0.3:51356 -> 192.168.1.3:22"]
"""

from typing import Any

from ansible_collections.ctsync.ha_firewall.plugins.module_utils import _pair


class FilterModule:
    """Ansible looks for this name."""

    def filters(self) -> dict[str, Any]:
        return {"lost_sessions": _pair.lost_sessions}
