# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the daemon and the playbooks say, read out of the source.

A sentence is a list of its fixed parts, without what values go between them.
"""

from __future__ import annotations

import ast
import pathlib
import re
from typing import Callable, Iterator

import yaml

ROOT = pathlib.Path(__file__).parents[3]
UTILS = ROOT / "plugins/module_utils"
DAEMON = UTILS / "ctsyncd"

# Where the reasons of a node's verdict are made.
VERDICTS = {
    "readiness.py": (
        *("_judge_active", "_why_uncovered", "_flaps", "_judge_standby", "_both_active", "_why_incomplete"),
        *("_why_reread", "_why_refused"),
    ),
    "conditions.py": ("differences",),
    "engine.py": ("_impairments",),
    "checker.py": ("alarm",),
    "helpers.py": ("problem",),
    "keyring.py": ("problems",),
    "daemon.py": ("_broken_links", "_reload"),
    "service.py": ("read_fingerprint",),
    "vrrp.py": ("_report", "write"),
    "flights.py": ("keep", "_write"),
    "link.py": ("__init__", "open"),
}
# Where the daemon gathers them (daemon.py, _report); what is new there belongs into VERDICTS, too.
GATHERED = {
    *("self._not_reloaded", "self._ruleset_problem", "self._fifo.problem", "self._track.problem"),
    *("self._flights.problem", "session.key_problems", "self._broken_links"),
}
VERIFY = {"checker.py": "_why_unable", "prover.py": "_why_unable", "verification.py": "look"}
LEAST_WORDS = 2  # one word alone is a name or a key, not something that is said
_LOGS = ("debug", "info", "warning", "error", "exception")


def parts(text: str) -> list[str]:
    return [part for part in (" ".join(found.split()) for found in re.split(r"\0|%[sd]", text)) if len(part) > 2]


def literal(node: ast.AST) -> str | None:
    """The text of a literal or an f-string, with NUL for its values; ``None`` for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
    return None


class _Sayings(ast.NodeVisitor):
    def __init__(self) -> None:
        self.found: list[str] = []

    def visit_Expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Constant):  # a docstring
            self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        if name not in _LOGS and not (isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) == "re"):
            self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        self._take(node)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        self._take(node)
        for part in node.values:
            if isinstance(part, ast.FormattedValue):
                self.visit(part.value)

    def _take(self, node: ast.AST) -> None:
        text = literal(node)
        if text is not None and len(text.split()) >= LEAST_WORDS and parts(text):
            self.found.append(text)


def sayings(node: ast.AST) -> list[str]:
    visitor = _Sayings()
    visitor.visit(node)
    return visitor.found


def functions(path: pathlib.Path) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            yield node


def said_in(path: pathlib.Path, wanted: Callable[[str], bool]) -> list[str]:
    return [text for node in functions(path) if wanted(node.name) for text in sayings(node)]


def verdicts() -> list[str]:
    return [text for name, wanted in VERDICTS.items() for text in said_in(DAEMON / name, wanted.__contains__)]


def gathered() -> set[str]:
    """Names that hold problems, where the daemon makes its report of them."""
    report = next(node for node in functions(DAEMON / "daemon.py") if node.name == "_find_impairments")
    names = {ast.unparse(node) for node in ast.walk(report) if isinstance(node, ast.Attribute)}
    return {name for name in names if re.search(r"(problems?|broken_links|not_reloaded)\Z", name)}


def verify() -> list[str]:
    found = []
    for name, function in VERIFY.items():
        found += said_in(DAEMON / name, function.__eq__)
    for path in sorted(DAEMON.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".give_up"):
                found += sayings(node)
    return found


def logged() -> list[str]:
    """What the daemon writes into its log as a warning or an error."""
    found = []
    for path in sorted(DAEMON.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if node.func.attr in ("warning", "error") and "log" in ast.unparse(node.func.value).lower():
                texts = [literal(argument) for argument in node.args]
                found += [text for text in texts if text and len(text.split()) >= LEAST_WORDS]
            elif ast.unparse(node.func).endswith("alarms.append"):
                found += sayings(node)
    return found


def counters() -> set[str]:
    """Names of counters; those that are put together end or begin with NUL."""
    found = set()
    for path in sorted(DAEMON.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("counters"):
                found.update(_names(node.slice))
    return found


def _names(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.IfExp):
        yield from (*_names(node.body), *_names(node.orelse))
    elif isinstance(node, ast.BinOp):  # a prefix, and a name
        yield from (f"{text}\0" for text in _names(node.left))
    else:
        text = literal(node)
        if text:
            yield text


def pair() -> list[str]:
    wanted = ("_grave", "_different", "_preemption")
    return said_in(UTILS / "_pair.py", wanted.__contains__) + said_in(
        UTILS / "_preflight.py", "sysctl_differences".__eq__
    )


def preflight() -> list[str]:
    quiet = ("_alike",)  # a part of a sentence that only shows values
    found = said_in(UTILS / "_preflight.py", lambda name: name not in quiet)
    names = ("unknown_names", "_scalar", "_chosen", "check_value", "_check_list", "_check_dict", "judge", "_show")
    return found + said_in(UTILS / "_options.py", names.__contains__)


def playbooks() -> list[str]:
    """What tasks say that fail, in playbooks and in the roles of a deployment: the first sentence of each."""
    found = []
    files = [*(ROOT / "playbooks").rglob("*.yml"), *(ROOT / "roles").glob("*/tasks/*.yml")]
    for path in sorted(files):
        if path.parents[1].name in ("lab", "failover_test") or path.name.startswith("lab"):
            continue
        found += _messages(yaml.safe_load(path.read_text(encoding="utf-8")) or [])
    return found


def _messages(node: object) -> Iterator[str]:
    if isinstance(node, list):
        for entry in node:
            yield from _messages(entry)
    elif isinstance(node, dict):
        for name, value in node.items():
            if name in ("ansible.builtin.fail", "ansible.builtin.assert") and isinstance(value, dict):
                yield from _texts(str(value.get("fail_msg") or value.get("msg") or ""))
            else:
                yield from _messages(value)


def _texts(message: str) -> Iterator[str]:
    inside = re.findall(r"\{\{(.*?)\}\}", message, re.DOTALL)
    outside = re.sub(r"\{[{%].*?[}%]\}", "\0", message, flags=re.DOTALL)
    quoted = [text for expression in inside for text in re.findall(r"'([^']*)'", expression)]
    for text in (outside, *quoted):
        first = re.split(r"[.:]\s+[A-Z]|`|\(", text)[0]  # what follows is the remedy
        if len(first.split()) > LEAST_WORDS:
            yield first
