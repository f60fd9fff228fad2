# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""One systemd service, through systemctl.

Private to this collection.  systemctl(1); unit states as ``systemctl show`` prints them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from typing import Any, NamedTuple

from ansible.module_utils.basic import AnsibleModule

_PROPERTIES = ("LoadState", "ActiveState", "SubState", "UnitFileState", "NeedDaemonReload", "MainPID", "Result")
_ENVIRONMENT = {"LC_ALL": "C", "SYSTEMD_PAGER": "", "SYSTEMD_COLORS": "0"}


class State(NamedTuple):
    """What systemd knows of a unit; ``need_reload`` means that its file is newer than what systemd read."""

    loaded: bool
    active: bool
    enabled: bool
    need_reload: bool
    main_pid: int
    text: str
    masked: bool = False


class SystemdError(Exception):
    """A systemctl command failed.  ``details`` holds cmd, rc, stdout, stderr for ``fail_json``."""

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.details = details


class Service:
    """``name`` with its suffix, for example ``ctsyncd.service``."""

    def __init__(self, module: AnsibleModule, name: str) -> None:
        self._module = module
        self._name = name
        self._systemctl = module.get_bin_path("systemctl", required=True)

    def version(self) -> int:
        """The major version of systemd; 0 when it cannot be told."""
        rc, out, dummy = self._run("--version", check=False)
        found = re.match(r"systemd (\d+)", out)
        return int(found.group(1)) if rc == 0 and found else 0

    def state(self) -> State:
        out = self._run("show", self._name, "--property=" + ",".join(_PROPERTIES))[1]
        found = dict(line.split("=", 1) for line in out.splitlines() if "=" in line)
        active, sub = found.get("ActiveState", ""), found.get("SubState", "")
        return State(
            loaded=found.get("LoadState") == "loaded",
            active=active in ("active", "reloading"),
            enabled=found.get("UnitFileState") in ("enabled", "enabled-runtime"),
            need_reload=found.get("NeedDaemonReload") == "yes",
            main_pid=int(found.get("MainPID") or 0),
            text=f"{active} ({sub})",
            masked=found.get("LoadState") == "masked",
        )

    def daemon_reload(self) -> None:
        self._run("daemon-reload")

    def restart(self) -> None:
        """Start or restart, and wait until the service says that it is ready."""
        self._run("restart", self._name)

    def reload(self) -> None:
        """Let the running service read its configuration again; the unit says how."""
        self._run("reload", self._name)

    def stop(self) -> None:
        self._run("stop", self._name)

    def enable(self) -> None:
        self._run("enable", "--quiet", self._name)

    def disable(self) -> None:
        self._run("disable", "--quiet", self._name)

    def reset_failed(self) -> None:
        self._run("reset-failed", self._name, check=False)

    def journal(self, since: int, lines: int = 30) -> list[str]:
        """The last ``lines`` of the service's journal from ``since`` (Unix time) on, its own lines with their name.

        Empty where there is no journal.
        """
        journalctl = self._module.get_bin_path("journalctl")
        if not journalctl:
            return []
        command = [journalctl, "--unit", self._name, "--since", f"@{since}", "--lines", str(lines), "--no-pager"]
        rc, out, dummy = self._module.run_command([*command, "--output", "json"], environ_update=_ENVIRONMENT)
        found = []
        for line in out.splitlines() if rc == 0 else ():
            with contextlib.suppress(ValueError):
                entry = json.loads(line)
                found.append(f"{entry.get('SYSLOG_IDENTIFIER', '')}: {entry.get('MESSAGE', '')}")
        return found

    def _run(self, *arguments: str, check: bool = True) -> tuple[int, str, str]:
        command = [self._systemctl, *arguments]
        rc, out, err = self._module.run_command(command, environ_update=_ENVIRONMENT)
        if check and rc != 0:
            said = err.strip() or out.strip() or f"exit code {rc}"
            raise SystemdError(f"{' '.join(command)}: {said}", cmd=command, rc=rc, stdout=out, stderr=err)
        return rc, out, err


def booted() -> bool:
    """Whether systemd is the running init; sd_booted(3)."""
    return os.path.isdir("/run/systemd/system")
