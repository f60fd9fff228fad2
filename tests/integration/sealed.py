# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A sealed machine for module tests: own network namespace, own /etc, /usr/lib, /var/lib and /run.

Nothing reaches the host.
"""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

_SETUP = """
mount -t tmpfs tmpfs /mnt
mount -t tmpfs tmpfs /run
for folder in etc var/lib usr/lib; do
    mkdir -p /mnt/$folder/up /mnt/$folder/work
    mount -t overlay overlay -o lowerdir=/$folder,upperdir=/mnt/$folder/up,workdir=/mnt/$folder/work /$folder
done
echo ready
exec sleep infinity
"""


class Machine:
    """Make one with `with Machine() as machine:`; it needs root. Everything ends with the block."""

    def __init__(self) -> None:
        self.name = f"ctsync-t-{secrets.token_hex(4)}"

    def __enter__(self) -> Machine:
        subprocess.run(["ip", "netns", "add", self.name], check=True)
        command = ["ip", "netns", "exec", self.name, "unshare", "-m", "--", "sh", "-ec", _SETUP]
        self._holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        if self._holder.stdout is None or self._holder.stdout.readline() != "ready\n":
            self.__exit__()
            raise RuntimeError("the sealed machine did not start")
        return self

    def __exit__(self, *_exc: object) -> None:
        self._holder.kill()
        self._holder.wait()
        deadline = time.monotonic() + 30
        while subprocess.run(["ip", "netns", "del", self.name], check=False).returncode:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} cannot be removed")
            time.sleep(0.1)

    def _inside(self, *command: str) -> list[str]:
        return ["nsenter", "-t", str(self._holder.pid), "-n", "-m", "--", *command]

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        """Start a command inside; whoever does so ends it."""
        return subprocess.Popen(self._inside(*command), stdin=subprocess.DEVNULL)

    def run(self, *command: str, text: str = "", check: bool = True) -> str:
        """Run a command inside; its standard output."""
        done = subprocess.run(self._inside(*command), input=text, text=True, capture_output=True, check=False)
        if check and done.returncode:
            raise AssertionError(f"{command} ended with {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout

    def module(self, module: str, *, check: bool = False, diff: bool = True, env: dict | None = None, **params) -> dict:
        """Run a module of the collection inside, by its file; its result.

        Nobody stands outside to confirm new rules, so they need no confirmation unless the test says so.
        """
        if module == "ruleset":
            params.setdefault("rollback_timeout", 0)
        arguments = {"ANSIBLE_MODULE_ARGS": {**params, "_ansible_check_mode": check, "_ansible_diff": diff}}
        settings = [f"{key}={value}" for key, value in (env or {}).items()]
        command = ["env", f"PYTHONPATH={ROOT}/collections", *settings, sys.executable]
        program = f"{ROOT}/collections/ansible_collections/ctsync/ha_firewall/plugins/modules/{module}.py"
        out = self.run(*command, program, text=json.dumps(arguments), check=False)
        try:
            return json.loads(out)
        except ValueError as exc:
            raise AssertionError(f"the module printed no result: {out!r}") from exc
