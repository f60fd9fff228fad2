# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Variables of an inventory against the options of the real roles."""

from __future__ import annotations

import pathlib
import re

import pytest
import yaml
from ansible.errors import AnsibleFilterError
from ansible_collections.ctsync.ha_firewall.plugins.filter import option_problems as plugin
from ansible_collections.ctsync.ha_firewall.plugins.module_utils import _options

ROOT = pathlib.Path(__file__).resolve().parents[4]


def judge(own=(), **variables):
    return plugin.option_problems("fw1", {"fw1": variables}, own)


def test_what_the_roles_have_by_default_is_right():
    defaults = {}
    for path in (ROOT / "roles").glob("*/defaults/main.yml"):
        defaults.update(yaml.safe_load(path.read_text(encoding="utf-8")))
    plain = {name: value for name, value in defaults.items() if "{{" not in str(value)}
    assert len(plain) > 40
    assert judge(**plain) == {"problems": [], "wrong": []}


@pytest.mark.parametrize("inventory", ["lab", "example"])
def test_the_inventories_at_hand_are_right(inventory):
    variables = {}
    for path in (ROOT / "inventories" / inventory).glob("*_vars/**/*.yml"):
        variables.update(yaml.safe_load(path.read_text(encoding="utf-8")))
    assert judge(**variables)["problems"] == []


def test_every_variable_of_the_pair_that_a_role_or_playbook_reads_is_known():
    found = set()
    for folder in ("roles", "playbooks"):
        for path in (ROOT / folder).rglob("*.yml"):
            found |= set(re.findall(r"\bha_firewall_[a-z0-9_]+", path.read_text(encoding="utf-8")))
    assert found == set(_options.PAIR)


def test_names_that_playbooks_and_roles_make_themselves_are_no_options():
    made = set()
    for folder in ("roles", "playbooks"):
        for path in (ROOT / folder).rglob("*.yml"):
            text = path.read_text(encoding="utf-8")
            made |= set(re.findall(r"register: (\w+)", text))
            for indent, name in re.findall(r"set_fact:\n( +)(\w+):", text):
                made |= {name, *re.findall(rf"^{indent}(\w+):", text, re.MULTILINE)}
    assert len(made) > 20
    assert _options.unknown_names(made, plugin.role_options()) == []


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("ha_firewall_service", "ha_firewall_services"),
        ("keepalived_nopremt", "keepalived_nopreempt"),
        ("ruleset_rule", "ruleset_rules"),
        ("ctsyncd_parktimeout", "ctsyncd_park_timeout_s"),
        ("kernel_extra_sysctl", "kernel_extra_sysctls"),
    ],
)
def test_a_misspelt_name_is_an_error_with_a_guess(name, meant):
    (found,) = judge(**{name: "x"})["problems"]
    assert found.startswith(f"{name}: is not an option: did you mean {meant}?")
    assert "preflight_own_variables" in found


def test_names_of_ones_own_are_allowed():
    assert judge(["ruleset_common", "kernel_my_*"], ruleset_common=[], kernel_my_a=1, kernel_my_b=2)["problems"] == []
    assert len(judge(["kernel_my_*"], kernel_mine=1)["problems"]) == 1
    assert judge(site_rules=[], ruleset__internal=1, preflight__node={}, ansible_facts={})["problems"] == []


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        (
            {"ha_firewall_services": [{"protocol": "tpc", "port": 22}]},
            "ha_firewall_services: entry 1: protocol 'tpc' is not one of tcp, udp, sctp; did you mean tcp?",
        ),
        (
            {"ha_firewall_services": [{"port": 22}, {"prt": 22}]},
            "ha_firewall_services: entry 2: prt is not known; did you mean port?",
        ),
        ({"ruleset_services": [{"protocol": "udp"}]}, "ruleset_services: entry 1: has no port: add it"),
        ({"ruleset_services": [[1]]}, "ruleset_services: entry 1: is not a dictionary, but a list"),
        (
            {"ctsyncd_mode": "hotstandby"},
            "ctsyncd_mode: 'hotstandby' is not one of hot-standby, external-cache; did you mean hot-standby?",
        ),
        ({"ctsyncd_park_timeout_s": "soon"}, "ctsyncd_park_timeout_s: 'soon' is not a whole number"),
        ({"ctsyncd_park_timeout_s": True}, "ctsyncd_park_timeout_s: 'True' is not a whole number"),
        ({"ctsyncd_park_timeout_s": -5}, "ctsyncd_park_timeout_s: -5 is"),
        ({"ctsyncd_filter": {"zones": ["x"]}}, "ctsyncd_filter: zones entry 1: 'x' is not a whole number"),
        ({"ctsyncd_filter": {"addresses": ["10.0.0.0/99"]}}, "ctsyncd_filter.addresses"),
        ({"keepalived_nopreempt": "maybe"}, "keepalived_nopreempt: 'maybe' is neither true nor false"),
        ({"keepalived_nopreempt": None}, "keepalived_nopreempt: has no value: give it one, or leave the line out"),
        ({"keepalived_advert_interval": 500}, "keepalived_advert_interval: 500 is out of range: choose 0.01 to 40.95"),
        ({"keepalived_advert_interval": "fast"}, "keepalived_advert_interval: 'fast' is not a number"),
        ({"keepalived_sync_group": "a b"}, "keepalived_sync_group: 'a b': use letters"),
        ({"ruleset_rollback_timeout": "30s"}, "ruleset_rollback_timeout: '30s' is not a whole number"),
        ({"ruleset_rules": {"a": 1}}, "ruleset_rules: is not a list, but a dictionary"),
        ({"ruleset_canary": ["true"]}, "ruleset_canary: takes one value, and is a list"),
        ({"kernel_extra_sysctls": "vm.swappiness=1"}, "kernel_extra_sysctls: is not a list, but 'vm.swappiness=1'"),
        ({"kernel_extra_sysctls": [{"name": "a.b"}]}, "kernel_extra_sysctls: entry 1: has no value: add it"),
    ],
)
def test_a_value_that_no_role_takes_is_one_sentence_with_the_operators_variable(variables, said):
    found = judge(**variables)["problems"]
    assert len(found) == 1, found
    assert found[0].startswith(said)


def test_a_value_of_the_wrong_type_is_known_to_be_wrong_and_one_out_of_range_only_said():
    assert judge(ha_firewall_services=[{"port": 1, "protocol": "x"}])["wrong"] == ["ha_firewall_services"]
    assert judge(ruleset_rules=["-P FORWARD DROP"])["wrong"] == []


def test_what_ansible_would_convert_is_right():
    variables = {
        "ruleset_rollback_timeout": "30",
        "keepalived_nopreempt": "yes",
        "ctsyncd_ignore_addresses": "10.0.0.0/8",
    }
    assert judge(**variables, ctsyncd_filter="{}")["problems"] == []


def test_all_mistakes_are_told_at_once():
    found = judge(ruleset_rule=[], ctsyncd_mode="x", ctsyncd_window_ms=99, keepalived_track_weight=7)["problems"]
    assert len(found) == 4


def test_a_secret_never_shows():
    secret = "c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0LXNlY3JldA=="
    for value in (secret, {"key": secret}, [secret], [{"id": secret, "key": [secret]}], [{"id": 1, "ky": secret}]):
        found = judge(ctsyncd_keys=value)["problems"]
        assert found
        assert secret not in str(found)


def test_a_variable_that_cannot_be_evaluated_is_named():
    class Broken(dict):
        def __getitem__(self, name):
            raise ValueError("'other' is undefined.\nmore")

    found = plugin.option_problems("fw1", {"fw1": Broken(ruleset_rules="{{ other }}")})
    assert found["problems"] == [
        "ruleset_rules: cannot be evaluated ('other' is undefined): correct what it is made of"
    ]
    assert found["wrong"] == ["ruleset_rules"]


def test_what_can_be_evaluated_in_a_role_only_is_left_to_it_and_undefined_parts_are_found_late():
    class Late:
        """Like a template whose result is undefined: it breaks when it is looked at."""

        def __init__(self, name):
            self.name = name

        def __str__(self):
            raise ValueError(f"'{self.name}' is undefined")

        __repr__ = __str__

    for name in ("hostvars", "ansible_play_hosts", "role_path"):
        assert judge(ctsyncd_node=Late(name), ruleset_rules=[Late(name)]) == {"problems": [], "wrong": []}
    assert judge(ruleset_rules=[Late("other")]) == {
        "problems": ["ruleset_rules: cannot be evaluated ('other' is undefined): correct what it is made of"],
        "wrong": ["ruleset_rules"],
    }


def test_wrong_input_is_refused(tmp_path):
    with pytest.raises(AnsibleFilterError, match="not a host"):
        plugin.option_problems("fw3", {})
    with pytest.raises(AnsibleFilterError, match="not a list"):
        plugin.option_problems("fw1", {"fw1": {}}, "ruleset_x")
    (tmp_path / "role/meta").mkdir(parents=True)
    (tmp_path / "role/meta/argument_specs.yml").write_text("a: [", encoding="ascii")
    with pytest.raises(AnsibleFilterError, match="cannot be read"):
        plugin.role_options(tmp_path)
