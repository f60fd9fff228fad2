# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Write docs/inventory.md: every variable of every role, out of argument specifications and defaults.

What these do not say (the ha_firewall_* variables, those of the playbooks, examples) is in inventory_reference.yml
beside this file.  Needs PyYAML.

    python3 tools/inventory_reference.py            writes the page
    python3 tools/inventory_reference.py --check    fails if the page is not what it would write
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import sys
from typing import Any, Iterator, Mapping

import yaml

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/inventory.md"
TEXTS = ROOT / "tools/inventory_reference.yml"
# In the order in which site.yml uses them; then what is not deployed.
ROLES = ("preflight", "kernel", "ctsyncd", "ruleset", "keepalived", "packages", "failover_test", "lab")
LONGEST_DEFAULT = 60  # characters; a longer template is not shown

_MARKUP = re.compile(r"\b[CVOEM]\(((?:[^()\\]|\\.)*)\)|\bP\(([^()#]*)#[a-z]+\)")
_UNITS = (("_ms", "ms"), ("_s", "s"), ("_bytes", "bytes"))
_NAMED_UNITS = {
    "keepalived_advert_interval": "s",
    "keepalived_preempt_delay": "s",
    "keepalived_startup_delay": "s",
    "keepalived_garp.interval": "s",
    "keepalived_garp.lower_prio_delay": "s",
    "keepalived_garp.master_delay": "s",
    "keepalived_garp.refresh": "s",
    "ruleset_rollback_timeout": "s",
    "preflight_rollback_timeout": "s",
    "failover_test_ready_timeout": "s",
    "failover_test_vip_timeout": "s",
    "lab_boot_timeout": "s",
}


def load(path: pathlib.Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def plain(text: Any) -> str:
    """A description without Ansible's markup, as one line of Markdown that may stand in a table."""
    sentences = text if isinstance(text, list) else [text]
    joined = " ".join(" ".join(str(sentence).split()) for sentence in sentences)
    marked = _MARKUP.sub(lambda found: f"`{found[1] if found[1] is not None else found[2]}`", joined)
    return marked.replace("|", "\\|")


def unit(name: str) -> str:
    """What a number counts; empty where the name or the meaning says it."""
    if name in _NAMED_UNITS:
        return _NAMED_UNITS[name]
    return next((word for end, word in _UNITS if name.endswith(end)), "")


def kind(spec: Mapping[str, Any]) -> str:
    name = spec["type"]
    if name == "raw":
        return "any"
    elements = f"list of {spec['elements']}" if name == "list" and spec.get("elements") else name
    choices = ", ".join(f"`{choice}`" if choice != "" else "empty" for choice in spec.get("choices") or ())
    return f"{elements}: {choices}" if choices else elements


def default(value: Any) -> str:
    """As one would write it in an inventory."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = " ".join(text.split())
    if isinstance(value, str) and "{{" in text and len(text) > LONGEST_DEFAULT:
        return "computed"
    if text == "":
        return "empty"
    return f"`{text}`".replace("|", "\\|")


def rows(name: str, spec: Mapping[str, Any], defaults: Mapping[str, Any]) -> Iterator[str]:
    """The table's row of one option, and those of its own options."""
    if name in defaults:
        shown = default(defaults[name])
    elif "default" in spec:
        shown = default(spec["default"])
    else:
        shown = "**required**" if spec.get("required") else "-"
    meaning = plain(spec["description"])
    secret = " Never shown." if spec.get("no_log") and "never shown" not in meaning else ""
    yield f"| `{name}` | {kind(spec)} | {shown} | {unit(name)} | {meaning}{secret} |"
    below = f"{name}[]" if spec["type"] == "list" else name
    for inner, inner_spec in (spec.get("options") or {}).items():
        yield from rows(f"{below}.{inner}", inner_spec, {})


def table(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> Iterator[str]:
    yield "| variable | type | default | unit | meaning |"
    yield "|---|---|---|---|---|"
    for name, spec in options.items():
        yield from rows(name, spec, defaults)


def examples(found: Mapping[str, Any]) -> Iterator[str]:
    if not found:
        return
    yield ""
    yield "```yaml"
    for text in found.values():
        yield from str(text).rstrip().splitlines()
    yield "```"


def page() -> str:
    """The text of docs/inventory.md."""
    texts = load(TEXTS)
    lines = [
        "<!--",
        "Copyright: (c) 2026, The ctsync authors",
        "GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)",
        "SPDX-License-Identifier: GPL-3.0-or-later",
        "",
        "Written by tools/inventory_reference.py: change the roles' argument specifications, or",
        "tools/inventory_reference.yml.",
        "-->",
        "",
        "# Inventory reference",
        "",
        *texts["introduction"].rstrip().splitlines(),
    ]
    for title, part in texts["parts"].items():
        lines += ["", f"## {title}", "", *part["text"].rstrip().splitlines(), ""]
        lines += table(part["options"], {})
        lines += examples(part.get("examples") or {})
    for role in ROLES:
        spec = load(ROOT / "roles" / role / "meta/argument_specs.yml")["argument_specs"]["main"]
        lines += ["", f"## Role {role}", "", f"{plain(spec['short_description'])}. {plain(spec['description'])}", ""]
        more = (texts["roles"].get(role) or {}).get("text", "").rstrip().splitlines()
        lines += [*more, ""] if more else []
        lines += table(spec["options"], load(ROOT / "roles" / role / "defaults/main.yml"))
        lines += examples((texts["roles"].get(role) or {}).get("examples") or {})
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--check", action="store_true", help="fail if the page is not what would be written")
    if not parser.parse_args().check:
        PAGE.write_text(page(), encoding="utf-8")
        return 0
    if PAGE.read_text(encoding="utf-8") == page():
        return 0
    print("docs/inventory.md is stale: run python3 tools/inventory_reference.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
