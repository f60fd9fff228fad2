# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The texts of the modules' C(attributes), once for all of them.

A module names the fragment (``ctsync.ha_firewall.attributes``) and overrides what differs, for example
``attributes: {diff_mode: {support: none}}``. Modules that return facts add ``ctsync.ha_firewall.attributes.facts``.
"""

from __future__ import annotations


class ModuleDocFragment:
    """Fragments: ``attributes`` (every module) and ``attributes.facts`` (modules that only return facts)."""

    DOCUMENTATION = r"""
options: {}
attributes:
  check_mode:
    description: Can run in C(check_mode) and return the changes a real run would make, without making them.
    support: full
  diff_mode:
    description: Returns what has changed, or would change in C(check_mode), when in diff mode.
    support: full
  idempotent:
    description:
      - When run twice in a row outside check mode with the same arguments, the second run reports no change,
        provided that nothing else changed the host in between.
    support: full
  platform:
    description: Target operating systems that the module works on.
    platforms: linux
    support: full
  action_group:
    description: Use C(group/ctsync.ha_firewall.ha_firewall) in C(module_defaults) to set defaults for this module.
    support: full
    membership:
      - ctsync.ha_firewall.ha_firewall
"""

    FACTS = r"""
options: {}
attributes:
  facts:
    description: Action returns an C(ansible_facts) dictionary that updates the facts of the host.
    support: full
"""
