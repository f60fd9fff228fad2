# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What differs between distributions: every one finds its file, all files have the same names, tasks use them."""

from __future__ import annotations

import pathlib
import re

import jinja2
import pytest
import yaml
from ansible_collections.ctsync.ha_firewall.plugins.module_utils import _preflight

ROLES = pathlib.Path(__file__).parents[3] / "roles"
VARYING = sorted(path.parents[1] for path in ROLES.glob("*/tasks/platform.yml"))
ON_TARGETS = [ROLES / name for name in ("ctsyncd", "keepalived", "kernel", "packages", "preflight", "ruleset")]
FILES = {"Debian.yml", "RedHat-9.yml", "Ubuntu-22.04.yml", "Ubuntu-24.04.yml", "default.yml"}
# facts of Ansible (subset distribution) as these systems have them, and the file that counts there
SYSTEMS = [
    (("Debian", "Debian", "11.11", "11"), "Debian.yml"),
    (("Debian", "Debian", "12.12", "12"), "Debian.yml"),
    (("Debian", "Debian", "13.1", "13"), "Debian.yml"),
    (("Ubuntu", "Debian", "22.04", "22"), "Ubuntu-22.04.yml"),
    (("Ubuntu", "Debian", "24.04", "24"), "Ubuntu-24.04.yml"),
    (("RedHat", "RedHat", "9.6", "9"), "RedHat-9.yml"),
    (("AlmaLinux", "RedHat", "9.6", "9"), "RedHat-9.yml"),
    (("CentOS", "RedHat", "9", "9"), "RedHat-9.yml"),
    (("OracleLinux", "RedHat", "9.5", "9"), "RedHat-9.yml"),
    (("Rocky", "RedHat", "9.5", "9"), "RedHat-9.yml"),
]
OTHERS = [
    (("Debian", "Debian", "10.13", "10"), "Debian.yml"),
    (("Ubuntu", "Debian", "23.10", "23"), "Debian.yml"),
    (("RedHat", "RedHat", "8.10", "8"), "default.yml"),
    (("Fedora", "RedHat", "42", "42"), "default.yml"),
    (("Archlinux", "Archlinux", "", ""), "default.yml"),
]


def facts_of(distribution, family, version, major):
    return {
        "distribution": distribution,
        "os_family": family,
        "distribution_version": version,
        "distribution_major_version": major,
    }


def load(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def variables(role):
    return {path.name: load(path) for path in sorted((role / "vars").glob("*.yml"))}


def chosen(role, facts):
    """The file that the task takes for these facts."""
    (task,) = (task for task in load(role / "tasks/platform.yml") if "ansible.builtin.include_vars" in task)
    names = [jinja2.Template(name).render(ansible_facts=facts) for name in task["vars"]["files"]]
    return next(name for name in names if (role / "vars" / name).exists())


def statements(role):
    """The text of all tasks of a role, without what they include from elsewhere."""
    paths = sorted((role / "tasks").glob("*.yml"))
    return "\n".join(path.read_text(encoding="utf-8") for path in paths if path.name != "platform.yml")


def test_these_roles_differ():
    assert [role.name for role in VARYING] == ["ctsyncd", "keepalived", "kernel", "ruleset"]


@pytest.mark.parametrize("role", VARYING, ids=lambda role: role.name)
def test_every_file_has_the_same_names_of_the_same_types(role):
    found = variables(role)
    assert set(found) == FILES
    shapes = {name: {key: type(value).__name__ for key, value in values.items()} for name, values in found.items()}
    assert all(shape == shapes["default.yml"] for shape in shapes.values()), shapes
    assert all(key.startswith(f"__{role.name}_") for key in shapes["default.yml"])
    for name, values in found.items():
        for key, value in values.items():
            texts = value if isinstance(value, list) else [value]
            assert texts and all(isinstance(text, str) and text for text in texts), (name, key)
            assert not key.endswith(("_file", "_path")) or value.startswith("/"), (name, key)


@pytest.mark.parametrize("role", VARYING, ids=lambda role: role.name)
def test_tasks_use_every_name_after_it_was_loaded_and_no_other(role):
    text = statements(role)
    known = set(variables(role)["default.yml"])
    made = set(re.findall(r"(?:register|loop_var): (__\w+)", text)) | set(re.findall(r"^ +(__\w+):", text, re.M))
    used = {name for name in re.findall(rf"\b__{role.name}_\w+", text)}
    assert known <= used, f"nothing uses {known - used}"
    assert used <= known | made, f"nothing sets {used - known - made}"
    for path in (role / "tasks").glob("*.yml"):
        own = path.read_text(encoding="utf-8")
        places = [own.index(name) for name in known if name in own]
        if places:
            assert -1 < own.find("import_tasks: platform.yml") < min(places), path


@pytest.mark.parametrize("role", VARYING, ids=lambda role: role.name)
@pytest.mark.parametrize(("system", "file"), [*SYSTEMS, *OTHERS], ids=lambda value: " ".join(value[:3:2]))
def test_each_system_gets_its_file(role, system, file):
    assert chosen(role, facts_of(*system)) == file


def test_roles_choose_in_the_same_way():
    tasks = [load(role / "tasks/platform.yml") for role in VARYING]
    assert all(task == tasks[0] for task in tasks)


@pytest.mark.parametrize("system", [system for system, dummy in SYSTEMS], ids=" ".join)
def test_each_supported_system_passes(system):
    assert _preflight.supported(facts_of(*system))


@pytest.mark.parametrize("system", [system for system, dummy in OTHERS], ids=" ".join)
def test_no_other_system_passes(system):
    assert not _preflight.supported(facts_of(*system))


def test_every_system_that_is_supported_is_among_those_tried_here():
    tried = {(system[0], release) for system, dummy in SYSTEMS for release in system[2:]}
    assert {(name, release) for name, releases in _preflight.PLATFORMS.items() for release in releases} <= tried


@pytest.mark.parametrize("role", ON_TARGETS, ids=lambda role: role.name)
def test_metadata_names_what_is_supported(role):
    platforms = {entry["name"]: entry["versions"] for entry in load(role / "meta/main.yml")["galaxy_info"]["platforms"]}
    code_names = {"11": "bullseye", "12": "bookworm", "13": "trixie", "22.04": "jammy", "24.04": "noble"}
    assert platforms == {
        "Debian": [code_names[release] for release in _preflight.PLATFORMS["Debian"]],
        "Ubuntu": [code_names[release] for release in _preflight.PLATFORMS["Ubuntu"]],
        "EL": list(_preflight.PLATFORMS["RedHat"]),
    }
