# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The controller's half of the module ruleset: new rules are confirmed over a new connection, or they go away again.

The module applies the rules and leaves a process on the node that puts the old ones back after a deadline. This
plugin then drops the connection that it has, opens another one, and lets the module confirm. If that cannot be done in
time, it waits until the node answers again, and fails with what became of the rules.
"""

from __future__ import annotations

import secrets
import time
from typing import Any

from ansible.errors import AnsibleError
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

MODULE = "ctsync.ha_firewall.ruleset"
INTERNAL = ("rollback_id", "rollback_step")
DEFAULT_TIMEOUT = 30  # seconds; the module's default for rollback_timeout
PATIENCE = 90  # seconds after the deadline for the node to answer again: TCP and ssh wait ever longer between attempts
PAUSE = 1.0  # seconds between attempts

display = Display()


class ActionModule(ActionBase):
    """Runs the module once, and if rules are on probation then, a second time over a new connection."""

    TRANSFERS_FILES = False
    _supports_check_mode = True
    _supports_async = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Apply, reconnect, confirm."""
        result = super().run(tmp, task_vars)
        given = [name for name in INTERNAL if self._task.args.get(name) is not None]
        if given:
            return {**result, "failed": True, "msg": f"{' and '.join(given)}: for internal use; leave the option out."}
        if self._task.async_val:
            words = (
                "ruleset cannot be used with 'async' and does not need it, it rolls back by itself. Remove the keyword."
            )
            return {**result, "failed": True, "msg": words}
        ident = secrets.token_hex(8)
        broken = ""
        try:
            first = self._step("apply", ident, task_vars)
        except AnsibleError as exc:
            # Without a rollback this is what it looks like: an unreachable node.
            if not self._timeout():
                raise
            first, broken = {}, str(exc)
        else:
            if not (first.get("rollback") or {}).get("armed") or first.get("failed"):
                return {**result, **first}
        timeout = (first.get("rollback") or {}).get("deadline_s") or self._timeout()
        second = self._conclude("abort" if broken else "confirm", ident, timeout, task_vars)
        if not broken and not second.get("failed"):
            kept = {key: first[key] for key in ("diff", "would_cut") if key in first}
            warnings = [*first.get("warnings", []), *second.get("warnings", [])]
            merged = {**result, **second, **kept, "changed": True}
            return {**merged, "warnings": warnings} if warnings else merged
        return {**result, **self._failure(second, timeout, broken), "changed": False}

    def _timeout(self) -> int:
        try:
            return int(self._templar.template(self._task.args.get("rollback_timeout", DEFAULT_TIMEOUT)))
        except (TypeError, ValueError):
            return DEFAULT_TIMEOUT

    def _step(self, step: str, ident: str, task_vars: dict[str, Any] | None) -> dict[str, Any]:
        arguments = {**self._task.args, "rollback_id": ident, "rollback_step": step}
        return self._execute_module(module_name=MODULE, module_args=arguments, task_vars=task_vars)

    def _conclude(self, step: str, ident: str, timeout: int, task_vars: dict[str, Any] | None) -> dict[str, Any]:
        """Ask over new connections until there is an answer; after the deadline only what became of the rules."""
        deadline = time.monotonic() + timeout
        last = ""
        while time.monotonic() < deadline + PATIENCE:
            self._reconnect()
            late = time.monotonic() >= deadline
            try:
                answer = self._step("status" if late else step, ident, task_vars)
            except AnsibleError as exc:
                last = str(exc)
                display.vvv(f"ruleset: no new connection yet: {last}", host=self._play_context.remote_addr)
            else:
                outcome = (answer.get("rollback") or {}).get("outcome")
                if outcome != "armed":
                    return answer
            time.sleep(PAUSE)
        return {"failed": True, "unanswered": True, "msg": last}

    def _reconnect(self) -> None:
        """End the connection, with the master process that ssh may keep for several of them."""
        try:
            self._connection.reset()
        except (AttributeError, NotImplementedError):
            self._connection.close()
        except AnsibleError as exc:
            display.vvv(f"ruleset: the connection could not be reset: {exc}", host=self._play_context.remote_addr)

    @staticmethod
    def _failure(answer: dict[str, Any], timeout: int, broken: str) -> dict[str, Any]:
        rollback = answer.get("rollback") or {}
        outcome, words = rollback.get("outcome"), str(answer.get("msg", ""))
        if answer.get("unanswered"):
            message = (
                f"The new rules cut this controller off, and the node did not answer within {PATIENCE} s after the time"
                f" ({timeout} s) at which it puts the old rules back. Look at it from its console"
                f" (journalctl -t ctsync-ruleset). The last error was: {words}"
            )
        elif outcome == "rolled back" and answer.get("canary_failed"):
            message = f"{words} The node put the old rules back at once."
        elif outcome == "rolled back" and broken:
            message = (
                f"The connection broke while the new rules were applied, and the node put the old rules back: {broken}"
            )
        elif outcome == "rolled back":
            message = (
                f"The new rules cut this controller off: no new connection could be opened within {timeout} s. The node"
                f" put the old rules back after {timeout} s and answers again."
            )
        elif outcome == "failed":
            message = (
                "The new rules were not confirmed, and the node could not put all of the old ones back. Look at it now"
                f" (journalctl -t ctsync-ruleset): {words}"
            )
        elif outcome == "unknown":
            message = (
                "The new rules were not confirmed, and the process that puts the old ones back has left no word; the"
                " node was restarted, perhaps. Look at its rules, and run again."
            )
        else:
            return answer
        return {"failed": True, "msg": message, "rollback": rollback}
