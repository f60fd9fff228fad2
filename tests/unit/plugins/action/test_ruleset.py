# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import pytest
from ansible.errors import AnsibleConnectionFailure
from ansible_collections.ctsync.ha_firewall.plugins.action import ruleset

ARMED = {"changed": True, "diff": ["d"], "would_cut": {"count": 1}, "rollback": {"armed": True, "deadline_s": 9}}
CONFIRMED = {"changed": True, "rollback": {"armed": True, "outcome": "confirmed"}}
LATE = {"failed": True, "msg": "x", "rollback": {"armed": True, "outcome": "rolled back"}}
CUT = AnsibleConnectionFailure("timed out")


@pytest.fixture
def node(monkeypatch):
    """The action plugin against a node that gives the answers of a list, on a clock that only its naps move."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(ruleset.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(ruleset.time, "sleep", lambda seconds: setattr(clock, "now", clock.now + seconds))
    monkeypatch.setattr(ruleset.ActionBase, "run", lambda *_arguments: {})

    def run(answers, async_val=0, **arguments):
        plugin = ruleset.ActionModule.__new__(ruleset.ActionModule)
        plugin._task = SimpleNamespace(args=arguments, async_val=async_val)
        plugin._templar = SimpleNamespace(template=lambda value: value)
        plugin._play_context = SimpleNamespace(remote_addr="node")
        plugin._connection = mock.Mock()
        remaining = iter(answers)
        plugin.asked = []

        def execute(module_name, module_args, task_vars):
            plugin.asked.append((module_args["rollback_step"], module_args["rollback_id"], clock.now))
            answer = next(remaining)
            if isinstance(answer, Exception):
                raise answer
            return dict(answer)

        plugin._execute_module = execute
        return plugin.run(task_vars={}), plugin

    return run


def steps(plugin):
    return [step for step, _ident, _when in plugin.asked]


def test_what_needs_no_confirmation_gets_none(node):
    result, plugin = node([{"changed": False, "fingerprint": "f"}])
    assert result == {"changed": False, "fingerprint": "f"}
    assert steps(plugin) == ["apply"]
    plugin._connection.reset.assert_not_called()


def test_new_rules_are_confirmed_after_the_connection_was_dropped(node):
    result, plugin = node([ARMED, CONFIRMED])
    assert steps(plugin) == ["apply", "confirm"]
    assert len({ident for _step, ident, _when in plugin.asked}) == 1
    plugin._connection.reset.assert_called_once()
    assert result["rollback"]["outcome"] == "confirmed"
    assert (result["diff"], result["would_cut"], result["changed"]) == (["d"], {"count": 1}, True)


def test_it_tries_until_the_deadline_and_then_only_asks_what_became_of_it(node):
    result, plugin = node([ARMED, *[CUT] * 12, LATE])
    assert steps(plugin) == ["apply", *["confirm"] * 9, *["status"] * 4]
    assert result["failed"]
    assert result["msg"] == (
        "The new rules cut this controller off: no new connection could be opened within 9 s. The node put the old"
        " rules back after 9 s and answers again."
    )


def test_a_connection_that_breaks_while_applying_aborts(node):
    result, plugin = node([CUT, CUT, LATE])
    assert steps(plugin) == ["apply", "abort", "abort"]
    assert result["msg"].startswith("The connection broke while the new rules were applied, and the node put the old")


def test_without_rollback_a_broken_connection_is_an_unreachable_node(node):
    with pytest.raises(AnsibleConnectionFailure):
        node([CUT], rollback_timeout=0)


def test_a_node_that_never_answers_is_given_up(node):
    result, plugin = node([ARMED, *[CUT] * 200])
    assert plugin.asked[-1][2] <= 9 + ruleset.PATIENCE
    assert "did not answer within 90 s after the time (9 s)" in result["msg"]
    assert result["failed"]


def test_the_words_of_the_canary_are_passed_on(node):
    words = {**LATE, "canary_failed": True, "msg": "The canary 'false' ended with 1."}
    result, _plugin = node([ARMED, words])
    assert result["msg"] == "The canary 'false' ended with 1. The node put the old rules back at once."


@pytest.mark.parametrize("outcome", ["failed", "unknown"])
def test_rules_in_an_unclear_state_are_never_called_confirmed(node, outcome):
    result, _plugin = node([ARMED, {"failed": True, "msg": "why", "rollback": {"outcome": outcome}}])
    assert result["failed"]
    assert result["msg"].startswith("The new rules were not confirmed")


def test_async_and_internal_options_are_refused_before_anything(node):
    result, plugin = node([], async_val=60)
    assert result["failed"]
    assert plugin.asked == []
    result, plugin = node([], rollback_step="confirm", rollback_id="x")
    assert result["msg"].startswith("rollback_id and rollback_step: for internal use")
    assert plugin.asked == []
