# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Every module, filter and role is documented, and the check of that can fail."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest
import yaml

ENVIRONMENT = {key: value for key, value in os.environ.items() if not key.startswith("ANSIBLE_")}
ROOT = pathlib.Path(__file__).parents[3]
GOOD = {
    "short_description": "Does nothing",
    "description": ["Nothing at all."],
    "author": ["The ctsync authors (@ctsync)"],
    "options": {"depth": {"description": ["How deep."], "type": "int"}},
}
EXAMPLES = "- name: Dig\n  ctsync.ha_firewall.{name}:\n    {option}: 3\n"
RESULTS = {"dug": {"description": "Whether it was.", "type": "bool", "returned": "always"}}


def check(folder, collections):
    path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/check_docs.py"), str(folder)],
        env={**ENVIRONMENT, "PATH": path, "ANSIBLE_COLLECTIONS_PATH": str(collections)},
        capture_output=True,
        text=True,
        check=False,
        cwd="/",  # where there is no ansible.cfg
    )
    return done.returncode, done.stdout + done.stderr


def write_module(folder, name, *, doc=GOOD, option="depth", results=RESULTS):
    text = "#!/usr/bin/python\n"
    if doc is not None:
        parts = {"DOCUMENTATION": {"module": name, **doc}, "RETURN": results}
        text += "".join(f'{key} = r"""\n{yaml.safe_dump(value)}"""\n' for key, value in parts.items())
        text += f'EXAMPLES = r"""\n{EXAMPLES.format(name=name, option=option)}"""\n'
    (folder / "plugins/modules" / f"{name}.py").write_text(text, encoding="utf-8")


@pytest.fixture
def collection(tmp_path):
    folder = tmp_path / "ansible_collections/ctsync/ha_firewall"
    (folder / "plugins/modules").mkdir(parents=True)
    (folder / "roles").mkdir()
    write_module(folder, "fine")
    return folder


def test_this_collection_is_documented():
    rc, said = check(ROOT, ROOT / "collections")
    assert rc == 0, said


def test_a_documented_collection_passes(collection):
    assert check(collection, collection.parents[2]) == (0, "1 modules, filters and roles are documented.\n")


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"doc": None}, "ansible-doc has nothing of this module"),
        ({"doc": {**GOOD, "options": {"depth": {"type": "int"}}}}, "depth has no description"),
        ({"doc": {**GOOD, "options": {"depth": {"description": ["How deep."]}}}}, "depth has no type"),
        ({"option": "dept"}, "dept is used in an example, and is no option"),
        ({"results": {}}, "its results are not described"),
        ({"results": {"dug": {"returned": "always", "type": "bool"}}}, "result dug has no description"),
    ],
)
def test_what_is_missing_is_named(collection, wrong, says):
    write_module(collection, "bad", **wrong)
    rc, said = check(collection, collection.parents[2])
    assert rc == 1
    assert f"ctsync.ha_firewall.bad: {says}" in said, said


def test_a_role_and_an_action_without_documentation_are_named(collection):
    (collection / "roles/mute/tasks").mkdir(parents=True)
    (collection / "plugins/action").mkdir()
    (collection / "plugins/action/lonely.py").write_text("", encoding="utf-8")
    rc, said = check(collection, collection.parents[2])
    assert rc == 1
    assert "ctsync.ha_firewall.mute: ansible-doc has nothing of this role" in said
    assert "ctsync.ha_firewall.lonely: this action plugin has no module of its name" in said


def test_every_module_can_be_given_defaults_as_a_group():
    runtime = yaml.safe_load((ROOT / "meta/runtime.yml").read_text(encoding="utf-8"))
    assert runtime["action_groups"]["ha_firewall"] == sorted(
        path.stem for path in (ROOT / "plugins/modules").glob("*.py")
    )
