# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""docs/inventory.md names every variable, and says what the argument specifications and defaults say."""

from __future__ import annotations

import importlib.util
import pathlib
import re

import pytest
import yaml
from ansible_collections.ctsync.ha_firewall.plugins.module_utils import _options

ROOT = pathlib.Path(__file__).parents[3]
SPEC = importlib.util.spec_from_file_location("inventory_reference", ROOT / "tools/inventory_reference.py")
reference = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(reference)

TEXTS = reference.load(reference.TEXTS)
EXAMPLES = [
    text
    for part in (*TEXTS["parts"].values(), *TEXTS["roles"].values())
    for text in (part.get("examples") or {}).values()
]


def variables(page):
    return set(re.findall(r"(?m)^\| `([a-z0-9_]+)` \|", page))


def test_the_page_is_what_the_specifications_say():
    stale = "run python3 tools/inventory_reference.py"
    assert reference.PAGE.read_text(encoding="utf-8") == reference.page(), stale


def test_no_role_is_left_out():
    assert set(reference.ROLES) == {path.name for path in (ROOT / "roles").iterdir()}


def test_every_variable_of_the_pair_is_there():
    assert set(_options.PAIR) <= variables(reference.page())


def test_every_variable_of_the_playbooks_is_there():
    """Those that a playbook takes from the command line have a default where they are used."""
    used = set()
    for path in (ROOT / "playbooks").rglob("*.yml"):
        text = path.read_text(encoding="utf-8")
        used |= set(
            re.findall(r"\b((?:migrate|status|switchover|upgrade|uninstall|rotate)(?:_[a-z_]+)?) \| default\(", text)
        )
    assert used
    assert used <= variables(reference.page())


@pytest.mark.parametrize("text", EXAMPLES, ids=[text.split(":")[0] for text in EXAMPLES])
def test_the_examples_are_yaml_about_variables_that_exist(text):
    found = yaml.safe_load(text) or yaml.safe_load(re.sub(r"(?m)^# ", "", text.split("\n", 1)[1]))
    assert set(found) <= variables(reference.page())


def test_each_variable_whose_form_one_has_to_know_has_an_example():
    shown = set(re.findall(r"(?m)^(?:# )?([a-z0-9_]+):", "\n".join(EXAMPLES)))
    wanted = set()
    for role in ("kernel", "ctsyncd", "ruleset", "keepalived"):
        defaults = reference.load(ROOT / "roles" / role / "defaults/main.yml")
        wanted |= {name for name, value in defaults.items() if value in ([], {})}
    assert wanted
    assert wanted <= shown


def test_a_changed_default_makes_the_page_stale(monkeypatch):
    """The control: the comparison above can fail."""
    load = reference.load

    def changed(path):
        found = load(path)
        if path.match("ctsyncd/defaults/main.yml"):
            found["ctsyncd_window_ms"] = 21
        return found

    monkeypatch.setattr(reference, "load", changed)
    assert reference.PAGE.read_text(encoding="utf-8") != reference.page()
