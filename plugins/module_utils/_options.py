# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The options of all roles as an inventory gives them: misspelt names and values that no role would take.

This module is private to the collection and runs on the controller (filters), so that a value is refused before the
first change and not by the role that would use it.  Pure functions; what is secret is never shown.
Every problem is one sentence: variable, what is wrong, what to do.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import re
from typing import Any, Callable, Dict, Iterable, List, Mapping, NamedTuple, Sequence, Tuple

from ansible.module_utils.common.validation import check_type_bool, check_type_dict, check_type_float, check_type_int

from . import _conntrack_settings, _ctsyncd_files, _keepalived
from .ctsyncd import config as daemon_config

Spec = Mapping[str, Any]

PREFIXES = ("ctsyncd_", "ha_firewall_", "keepalived_", "kernel_", "packages_", "preflight_", "ruleset_")
OWN_NAMES = "preflight_own_variables"

# What describes the pair: the variables, and the option of a role whose specification also holds for them.
# The preflight itself looks at those without one.
PAIR: Dict[str, str] = {
    "ha_firewall_group": "ruleset_group",
    "ha_firewall_key": "",
    "ha_firewall_key_id": "",
    "ha_firewall_priority": "",
    "ha_firewall_services": "ruleset_services",
    "ha_firewall_sync_address": "",
    "ha_firewall_sync_interface": "",
    "ha_firewall_sync_links": "ctsyncd_links",
    "ha_firewall_sync_port": "",
    "ha_firewall_virtual_ips": "",
}

# Options of the role ctsyncd that the daemon's own reader judges, besides their type.
_DAEMON_OPTIONS = ("filter", *(name for name in _ctsyncd_files.CONFIG_OPTIONS if name not in ("node", "send_key")))
# A configuration without fault, into which these options are put.
_DAEMON_FRAME: Dict[str, Any] = {
    "node": "node",
    "peers": [{"node": "peer", "address": "192.0.2.2"}],
    "link": {"interface": "eth0", "address": "192.0.2.1", "port": 3781},
    "virtual_ips": [{"interface": "eth1", "address": "198.51.100.1"}],
    "keys": {"1": "key-1"},
    "send_key": 1,
}
_KEEPALIVED_OPTIONS = (
    *("advert_interval", "authentication", "bfd", "garp", "nopreempt", "preempt_delay", "realtime_priority"),
    *("startup_delay", "track_interfaces", "track_weight", "group"),
)
# What a template has in a play, and not where one host reads another's variables.
_PLAY_ONLY = re.compile(r"'(hostvars|vars|omit|environment|play_hosts|role_\w+|ansible_\w+)' is undefined")


class Judgement(NamedTuple):
    """``problems``: sentences; ``wrong``: the variables that they are about; ``values``: the others, converted."""

    problems: List[str]
    wrong: List[str]
    values: Dict[str, Any]


class _Wrong(Exception):
    """A value that an option does not take: what is wrong with it."""


def near(word: str, known: Iterable[str]) -> str:
    """The known word that looks most like it; empty when none does."""
    found = difflib.get_close_matches(word, list(known), 1, 0.6)
    return found[0] if found else ""


def meant(word: str, known: Iterable[str]) -> str:
    """The end of a sentence: a guess, if there is one."""
    guess = near(word, known)
    return f"; did you mean {guess}?" if guess else ""


# --- names ---


def unknown_names(names: Iterable[str], known: Iterable[str], own: Sequence[str] = ()) -> List[str]:
    """One sentence for each name that looks like an option and is none.

    Names with two underscores behind the prefix are the roles' own.  ``own`` are the operator's, with a ``*`` at the
    end for all that begin so.
    """
    valid = set(known)
    problems = []
    for name in sorted(map(str, names)):
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
        if not prefix or name in valid or name.startswith(f"{prefix}_"):
            continue
        if any(name == word or (word.endswith("*") and name.startswith(word[:-1])) for word in map(str, own)):
            continue
        guess = near(name, (each for each in valid if each.startswith(prefix))) or near(name, valid)
        question = f": did you mean {guess}?" if guess else ", and no option has such a name:"
        problems.append(f"{name}: is not an option{question} (A variable of your own goes into {OWN_NAMES}.)")
    return problems


# --- values ---


def _show(value: Any, secret: bool) -> str:
    if secret:
        return "the value (not shown)"
    text = repr(str(value)) if not isinstance(value, (Mapping, list, tuple)) else "a " + _kind(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _kind(value: Any) -> str:
    return "dictionary" if isinstance(value, Mapping) else "list"


def is_secret(spec: Spec) -> bool:
    """Whether the option, or something in it, must not be shown."""
    return bool(spec.get("no_log")) or any(is_secret(inner) for inner in (spec.get("options") or {}).values())


def _scalar(value: Any, spec: Spec) -> Any:
    kind, secret = spec.get("type", "str"), is_secret(spec)
    if kind == "raw":
        return value
    if isinstance(value, (Mapping, list, tuple)):
        raise _Wrong(f"takes one value, and is a {_kind(value)}")
    if kind in ("str", "path"):
        return str(value)
    wanted: Dict[str, Tuple[Callable[[Any], Any], str]] = {
        "bool": (check_type_bool, "neither true nor false"),
        "int": (check_type_int, "not a whole number"),
        "float": (check_type_float, "not a number"),
    }
    convert, words = wanted[kind]
    try:
        if isinstance(value, bool) and kind != "bool":
            raise TypeError
        return convert(value)
    except (TypeError, ValueError):
        raise _Wrong(f"{_show(value, secret)} is {words}") from None


def _chosen(value: Any, spec: Spec) -> Any:
    choices = spec.get("choices")
    if choices and value not in choices:
        listed = ", ".join(str(choice) or "''" for choice in choices)
        guess = meant(str(value), map(str, choices))
        raise _Wrong(f"{_show(value, is_secret(spec))} is not one of {listed}{guess}")
    return value


def check_value(value: Any, spec: Spec, where: str, problems: List[str]) -> Any:
    """The value as the option takes it; what is wrong goes to ``problems``, each sentence beginning with ``where``."""
    kind = spec.get("type", "str")
    if value is None:
        if kind in ("bool", "int", "float", "list", "dict"):
            problems.append(f"{where} has no value: give it one, or leave the line out")
        return value
    try:
        if kind == "list":
            return _check_list(value, spec, where, problems)
        if kind == "dict":
            return _check_dict(value, spec, where, problems)
        return _chosen(_scalar(value, spec), spec)
    except _Wrong as wrong:
        problems.append(f"{where} {wrong}")
        return None


def _check_list(value: Any, spec: Spec, where: str, problems: List[str]) -> List[Any]:
    if isinstance(value, str) and spec.get("elements") != "dict":
        value = value.split(",")  # as Ansible does
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        value = [value]
    if isinstance(value, (str, bool, Mapping)) or not isinstance(value, (list, tuple)):
        raise _Wrong(f"is not a list, but {_show(value, is_secret(spec))}")
    inner = {key: spec[key] for key in ("choices", "options") if key in spec}
    inner.update(type=spec.get("elements", "raw"), no_log=is_secret(spec))
    return [check_value(each, inner, f"{where} entry {number}:", problems) for number, each in enumerate(value, 1)]


def _check_dict(value: Any, spec: Spec, where: str, problems: List[str]) -> Dict[str, Any]:
    if isinstance(value, str):
        with contextlib.suppress(TypeError, ValueError):
            value = check_type_dict(value)
    if not isinstance(value, Mapping):
        raise _Wrong(f"is not a dictionary, but {_show(value, is_secret(spec))}")
    options = spec.get("options")
    if not options:
        return dict(value)
    found = {}
    for key, inner in value.items():
        if key not in options:
            listed = meant(str(key), options) or f": it takes {', '.join(options)}"
            problems.append(f"{where} {key!s} is not known{listed}")
        elif inner is not None:
            hidden = {"no_log": True} if is_secret(spec) else {}
            found[key] = check_value(inner, {**options[key], **hidden}, f"{where} {key}", problems)
    for key, inner_spec in options.items():
        # of two mistakes in one entry, the misspelt key is the likelier one
        if inner_spec.get("required") and value.get(key) is None and set(value) <= set(options):
            problems.append(f"{where} has no {key}: add it")
    return found


def judge(
    variables: Mapping[str, Any],
    specs: Mapping[str, Spec],
    read: Callable[[str], Any],
    own: Sequence[str] = (),
) -> Judgement:
    """Everything that is wrong with the options among a host's variables.

    ``specs`` are the options of all roles by name, ``read`` gives a variable's value and may raise any exception when
    that cannot be made; ``variables`` is asked for names only.
    """
    problems = unknown_names(variables, {*specs, *PAIR}, own)
    wrong: List[str] = []
    values: Dict[str, Any] = {}
    for name in sorted({*specs, *PAIR} & set(variables)):
        spec = specs.get(PAIR.get(name) or name)
        if spec is None or name.startswith("preflight_"):  # that role has looked at its own
            continue
        found: List[str] = []
        try:  # an undefined part may show only when it is looked at
            checked = check_value(read(name), spec, f"{name}:", found)
        except Exception as error:  # noqa: BLE001 # pylint: disable=broad-exception-caught # whatever templating raises
            if _PLAY_ONLY.search(str(error)):
                continue  # right in the role, and not to be had from here
            found = [f"{name}: cannot be evaluated ({_first_line(error)}): correct what it is made of"]
        else:
            values[name] = checked
        if found:
            wrong.append(name)
            values.pop(name, None)
        problems += found
    problems += _kernel_problems(values) + _daemon_problems(values) + _keepalived_problems(values)
    return Judgement(problems, wrong, values)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


# --- ranges, as the programs themselves judge them ---


def _kernel_problems(values: Mapping[str, Any]) -> List[str]:
    given = (values.get(f"kernel_conntrack_{name}") for name in ("max", "buckets", "timeouts"))
    return [f"kernel_{problem}" for problem in _conntrack_settings.settings(*given).problems]


def _daemon_problems(values: Mapping[str, Any]) -> List[str]:
    given = {name: values[f"ctsyncd_{name}"] for name in _DAEMON_OPTIONS if f"ctsyncd_{name}" in values}
    if given.get("netlink_buffer_bytes") == 0:  # the module makes it for the host
        del given["netlink_buffer_bytes"]
    if not given:
        return []
    try:
        daemon_config.parse(json.dumps({**_DAEMON_FRAME, **given}), "")
    except daemon_config.ConfigError as error:
        return [f"ctsyncd_{problem.lstrip(': ')}" for problem in error.problems]
    return []


def _keepalived_problems(values: Mapping[str, Any]) -> List[str]:
    given = {
        name: values[variable]
        for name in _KEEPALIVED_OPTIONS
        for variable in (_keepalived_variable(name),)
        if variable in values
    }
    if not given:
        return []
    instance = {"interface": "eth0", "router_id": 1, "virtual_ips": ["192.0.2.1/24"], "priority": 254}
    frame = {"node": "node", "instances": [instance], "track_file": _keepalived.TRACK_FILE}
    try:
        _keepalived.build_config({**frame, **given})
    except _keepalived.ConfigProblem as error:
        named = [problem.replace("instances[0].", "", 1).partition(": ") for problem in error.problems]
        return [f"{_keepalived_variable(option)}: {words}" for option, _colon, words in named]
    return []


def _keepalived_variable(option: str) -> str:
    return "keepalived_sync_group" if option == "group" else f"keepalived_{option}"
