# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Roles hand every option to their module, by a variable with the same default."""

from __future__ import annotations

import pathlib

import pytest
import yaml
from ansible_collections.ctsync.ha_firewall.plugins.modules import keepalived, kernel_settings, ruleset

ROLES = pathlib.Path(__file__).parents[3] / "roles"

# Options that a role has no variable for, and why.
LEFT_OUT = {
    "ruleset": {
        "config_directory": "the unit and the files of boot are in one place, which the other roles know",
        "rollback_id": "the action plugin's",
        "rollback_step": "the action plugin's",
        "state_directory": "what is remembered is in one place, which uninstall looks into",
        "validate_only": "tasks_from: validate",
        "will_forward": "for the preflight; when the role runs, forwarding is what it shall be",
    },
    "keepalived": {
        "manage_service": "a node without systemd has no ctsyncd either",
        "notify_fifo": "made by the role ctsyncd",
        "track_file": "made by the role ctsyncd",
        "path": "where keepalived of the distributions looks",
    },
    "kernel": {
        "state_file": "what is remembered is in one place, which uninstall looks into",
    },
}
MODULES = {
    "ruleset": ("ruleset", ruleset.ARGUMENT_SPEC),
    "keepalived": ("keepalived", keepalived.argument_spec()),
    "kernel": ("kernel_settings", kernel_settings.ARGUMENT_SPEC),
}
# Roles that compute the value, or call the option otherwise.
COMPUTED = {
    "ruleset": {"vrrp_peers", "sync", "virtual_ips", "services"},
    "keepalived": {"instances", "node", "priority", "group"},
    "kernel": {"modules", "modules_file", "sysctl_file", "sysctls"},
}


def calls_of(role, module):
    """The arguments of every task of a role that calls the module, and of the blocks in them."""
    todo = [task for path in (ROLES / role / "tasks").glob("*.yml") for task in yaml.safe_load(path.read_text()) or []]
    found = []
    while todo:
        task = todo.pop()
        todo += [inner for key in ("block", "rescue", "always") for inner in task.get(key) or []]
        if f"ctsync.ha_firewall.{module}" in task:
            found.append(task[f"ctsync.ha_firewall.{module}"])
    return found


@pytest.mark.parametrize("role", MODULES)
def test_the_role_hands_every_option_to_its_module(role):
    module, spec = MODULES[role]
    handed = set().union(*calls_of(role, module)) - {"validate_only"}
    assert handed == set(spec) - set(LEFT_OUT[role])


@pytest.mark.parametrize("role", MODULES)
def test_defaults_of_role_and_module_are_the_same(role):
    _module, spec = MODULES[role]
    defaults = yaml.safe_load((ROLES / role / "defaults/main.yml").read_text())
    differing = {}
    for name, option in spec.items():
        if name in LEFT_OUT[role] or name in COMPUTED[role]:
            continue
        held = defaults[f"{role}_{name}"]
        wanted = option.get("default")
        if (held or None) != (wanted or None):
            differing[name] = (held, wanted)
    assert differing == {}
