#!/usr/bin/env python3
# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""check_docs.py [FOLDER] - is everything in this collection documented, as ansible-doc shows it?

FOLDER is the collection's own, by default this checkout.  For every module, filter and role: ansible-doc renders it,
each option has a type and a description, results are described, and the examples use nothing but documented options.
ansible-doc itself ends with success for a plugin that has no documentation at all, so its exit status says nothing.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
from typing import Any, Iterator

import yaml

NAMESPACE = "ctsync.ha_firewall"
FOLDERS = {"module": "modules", "filter": "filter"}


def rendered(kind: str, names: list[str]) -> tuple[dict[str, Any], list[str]]:
    """What ansible-doc has for these names, and what it complains of."""
    if not names:
        return {}, []
    done = subprocess.run(
        ["ansible-doc", "--type", kind, "--json", *names], capture_output=True, text=True, check=False
    )
    found = json.loads(done.stdout) if done.stdout.strip() else {}
    # only what concerns us: some versions of Python and Ansible have a word to say of themselves
    return found, [line for line in done.stderr.splitlines() if NAMESPACE in line or done.returncode]


def undescribed(options: dict[str, Any], where: str) -> Iterator[str]:
    """Options and results, nested ones included, without a description or type."""
    for name, option in (options or {}).items():
        if not option.get("description"):
            yield f"{where}{name} has no description"
        if not option.get("type"):
            yield f"{where}{name} has no type"
        for inner in ("suboptions", "options", "contains"):
            yield from undescribed(option.get(inner) or {}, f"{where}{name}.")


def unknown_options(given: Any, options: dict[str, Any], where: str) -> Iterator[str]:
    """Keys of an example that are no options."""
    for entry in given if isinstance(given, list) else [given]:
        if not isinstance(entry, dict):
            continue
        for key, value in entry.items():
            option = options.get(key) or next((o for o in options.values() if key in (o.get("aliases") or ())), None)
            if option is None:
                yield f"{where}{key} is used in an example, and is no option"
            elif option.get("suboptions"):
                yield from unknown_options(value, option["suboptions"], f"{where}{key}.")


def tasks_of(text: str) -> list[dict[str, Any]]:
    """The tasks of an EXAMPLES block; blocks are opened. Raises yaml.YAMLError."""
    found = []
    for task in yaml.safe_load(text) or []:
        found += task.get("block", [task]) if isinstance(task, dict) else []
    return found


def examples(name: str, text: str, modules: dict[str, Any]) -> Iterator[str]:
    """What is wrong with the examples of one plugin."""
    try:
        tasks = tasks_of(text)
    except yaml.YAMLError as error:
        yield f"{name}: its examples are no YAML: {error}"
        return
    if not tasks:
        yield f"{name}: has no examples"
    for task in tasks:
        if not task.get("name"):
            yield f"{name}: an example has no name"
        for key, arguments in task.items():
            if key.startswith(NAMESPACE + ".") and key not in modules:
                yield f"{name}: an example uses {key}, which there is not"
            elif key in modules:
                yield from unknown_options(arguments or {}, modules[key]["doc"].get("options") or {}, f"{name}: ")


def problems(folder: pathlib.Path) -> tuple[list[str], int]:
    """All that is wrong, and how many documents were looked at."""
    found: list[str] = []
    documents: dict[str, dict[str, Any]] = {}
    for kind in ("module", "filter"):
        files = sorted((folder / "plugins" / FOLDERS[kind]).glob("*.py"))
        names = [f"{NAMESPACE}.{path.stem}" for path in files if path.stem != "__init__"]
        documents[kind], said = rendered(kind, names)
        found += said
        for name in names:
            plugin = documents[kind].get(name) or {}
            doc = plugin.get("doc") or {}
            if not doc.get("short_description"):
                found.append(f"{name}: ansible-doc has nothing of this {kind}")
                continue
            found += [f"{name}: {text}" for text in undescribed(doc.get("options") or {}, "")]
            found += [f"{name}: {text}" for text in undescribed(plugin.get("return") or {}, "result ")]
            if not plugin.get("return"):
                found.append(f"{name}: its results are not described")
            found += examples(name, plugin.get("examples") or "", documents["module"])
    for path in sorted((folder / "plugins" / "action").glob("*.py")):
        if f"{NAMESPACE}.{path.stem}" not in documents["module"]:
            found.append(f"{NAMESPACE}.{path.stem}: this action plugin has no module of its name, which documents it")
    names = [f"{NAMESPACE}.{path.name}" for path in sorted((folder / "roles").iterdir())]
    documents["role"], said = rendered("role", names)
    found += said
    for name in names:
        entry = ((documents["role"].get(name) or {}).get("entry_points") or {}).get("main") or {}
        if not entry.get("short_description"):
            found.append(f"{name}: ansible-doc has nothing of this role")
        found += [f"{name}: {text}" for text in undescribed(entry.get("options") or {}, "")]
    return found, sum(len(part) for part in documents.values())


def main() -> int:
    folder = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).parents[1])
    found, count = problems(folder)
    for text in found:
        sys.stderr.write(text + "\n")
    if not found:
        sys.stdout.write(f"{count} modules, filters and roles are documented.\n")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
