# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Each role's argument specification and its defaults say the same."""

from __future__ import annotations

import pathlib

import pytest
import yaml

ROLES = sorted((pathlib.Path(__file__).parents[3] / "roles").iterdir())
IDS = [role.name for role in ROLES]


def load(role, path):
    return yaml.safe_load((role / path).read_text(encoding="utf-8"))


def options(role):
    return load(role, "meta/argument_specs.yml")["argument_specs"]["main"]["options"]


def is_template(value):
    return "{{" in str(value)


@pytest.mark.parametrize("role", ROLES, ids=IDS)
def test_every_default_is_specified_and_every_option_has_a_default_or_is_required(role):
    defaults, specs = load(role, "defaults/main.yml"), options(role)
    assert set(defaults) <= set(specs)
    optional = {name for name, spec in specs.items() if not spec.get("required") and "default" in spec}
    assert optional <= set(defaults)


@pytest.mark.parametrize("role", ROLES, ids=IDS)
def test_the_default_in_the_specification_is_the_real_one(role):
    defaults = load(role, "defaults/main.yml")
    wrong = {
        name: (spec["default"], defaults[name])
        for name, spec in options(role).items()
        if "default" in spec and not is_template(defaults[name]) and spec["default"] != defaults[name]
    }
    assert wrong == {}


@pytest.mark.parametrize("role", ROLES, ids=IDS)
def test_names_begin_with_the_roles_and_every_option_is_described(role):
    specs = options(role)
    assert all(name.startswith(f"{role.name}_") for name in specs)
    assert all(spec.get("description") and spec.get("type") for spec in specs.values())
