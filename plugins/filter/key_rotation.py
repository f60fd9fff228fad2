# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The filter ``key_rotation``."""

from __future__ import annotations

DOCUMENTATION = r"""
name: key_rotation
short_description: The next keys of a node on the way to a new key
version_added: 0.1.0
description:
  - A node sends with the new key as soon as all its peers accept it, and forgets the old one when all of them send with
    the new one. When the nodes take turns, they understand each other all the time, and after two turns of two nodes,
    or three turns of more, all have the new key only, from whatever state it began.
options:
  _input:
    description: The node's keys, C(keys) (a dictionary by id) and C(send_key), as in C(host.ctsyncd) of the facts.
    type: dict
    required: true
  peer:
    description: The same of its peers; of an only one also without the list.
    type: list
    elements: dict
    required: true
  new:
    description: Id of the new key.
    type: int
    required: true
author:
  - The ctsync authors
"""

EXAMPLES = r"""
- name: Show the first step of a rotation from key 1 to key 2
  ansible.builtin.debug:
    msg: "{{ now | ctsync.ha_firewall.key_rotation(now, 2) }}"
  vars:
    now: {keys: {"1": ""}, send_key: 1}
"""

RETURN = r"""
_value:
  description: C(ids), the keys to accept, and C(send_key), the one to send with.
  type: dict
  sample: {ids: [1, 2], send_key: 1}
"""

from typing import Any, Mapping, Sequence

from ansible_collections.ctsync.ha_firewall.plugins.module_utils import _pair


def key_rotation(
    own: Mapping[str, Any], peer: Mapping[str, Any] | Sequence[Mapping[str, Any]], new: Any
) -> dict[str, Any]:
    """See DOCUMENTATION."""
    peers = [peer] if isinstance(peer, Mapping) else peer
    state, *others = (_pair.key_state({"host": {"ctsyncd": known}}) for known in (own, *peers))
    step = _pair.rotation_step(state, others, int(new))
    return {"ids": list(step.ids), "send_key": step.send}


class FilterModule:
    """Ansible looks for this name."""

    def filters(self) -> dict[str, Any]:
        return {"key_rotation": key_rotation}
