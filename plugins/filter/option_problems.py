# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The filter ``option_problems``."""

from __future__ import annotations

DOCUMENTATION = r"""
name: option_problems
short_description: Which options of the roles a host's inventory gets wrong
version_added: 0.1.0
description:
  - Compares the variables of a host with the argument specifications of all roles of this collection, so that a
    misspelt name or a value that no role takes is found before the first change.
  - Values are also given to the programs' own readers (the daemon's, and what the module keepalived checks), which know
    the ranges. Secrets are never shown.
options:
  _input:
    description: Name of the host.
    type: str
    required: true
  hostvars:
    description: Ansible's C(hostvars).
    type: dict
    required: true
  own:
    description:
      - Names of your own that look like options, beginning with C(ruleset_), C(keepalived_) and so on. A C(*) at the
        end stands for all names that begin so.
    type: list
    elements: str
    default: []
author:
  - The ctsync authors
"""

EXAMPLES = r"""
- name: Say what is wrong with this host's variables
  ansible.builtin.debug:
    msg: "{{ (inventory_hostname | ctsync.ha_firewall.option_problems(hostvars)).problems }}"
"""

RETURN = r"""
_value:
  description:
    - C(problems), one sentence each, empty when all is well; C(wrong), the names of the variables whose value no role
      takes.
  type: dict
  sample:
    problems: ["keepalived_nopremt: is not an option: did you mean keepalived_nopreempt?"]
    wrong: []
"""

import pathlib
from typing import Any, Mapping, Sequence

import yaml
from ansible.errors import AnsibleFilterError
from ansible_collections.ctsync.ha_firewall.plugins.module_utils import _options

ROLES = pathlib.Path(__file__).resolve().parents[2] / "roles"


def role_options(folder: pathlib.Path = ROLES) -> dict[str, Any]:
    """The options of all roles by name, as their argument specifications have them. Raises AnsibleFilterError."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*/meta/argument_specs.yml")):
        try:
            document = yaml.safe_load(path.read_text(encoding="utf-8"))
            found.update(document["argument_specs"]["main"]["options"])
        except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
            raise AnsibleFilterError(f"option_problems: {path} cannot be read: {error}") from error
    return found


def option_problems(host: str, hostvars: Mapping[str, Any], own: Sequence[str] = ()) -> dict[str, Any]:
    """See DOCUMENTATION. Raises AnsibleFilterError when the input is not what it should be."""
    variables = hostvars.get(host)
    if variables is None:
        raise AnsibleFilterError(f"option_problems: {host} is not a host of the inventory")
    if isinstance(own, str) or not isinstance(own, Sequence):
        raise AnsibleFilterError("option_problems: own is not a list of names")
    found = _options.judge(variables, role_options(), variables.__getitem__, own)
    return {"problems": found.problems, "wrong": found.wrong}


class FilterModule:
    """Ansible looks for this name."""

    def filters(self) -> dict[str, Any]:
        return {"option_problems": option_problems}
