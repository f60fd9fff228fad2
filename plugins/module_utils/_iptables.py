# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The edge between the ruleset module and iptables: save, restore, and a scratch namespace to try rules in.

This module is private to the collection. Commands are lists, never shell strings; their language is C.
"""

from __future__ import annotations

import os
import re
import tempfile
from typing import Dict, List, NamedTuple, Sequence

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.ctsync.ha_firewall.plugins.module_utils import _ruleset

LOCK_WAIT = "10"  # seconds to wait for another iptables command to finish
_ENVIRONMENT = {"LC_ALL": "C", "LANGUAGE": "C"}

# Reads the ipset headers named in $3 ("" for none), loads standard input, prints what the kernel made of it.
_SCRATCH_SCRIPT = '[ -z "$3" ] || "$3" restore -file "$4" || exit 70; "$1" -w "$5" || exit 71; exec "$2"'


class Outcome(NamedTuple):
    """What a command said. `words` are its errors without the advice to read the manual."""

    rc: int
    out: str
    words: str
    command: List[str]


class ScratchError(Exception):
    """No scratch network namespace can be made here (as opposed to: the rules are wrong)."""


class Iptables:
    """The programs of one address family."""

    def __init__(self, module: AnsibleModule, family: str, backend: str) -> None:
        self._module = module
        self.family = family
        self.backend = backend
        self.program = _ruleset.find_program(_ruleset.program_name(family, backend, ""))
        self.save_program = _ruleset.find_program(_ruleset.program_name(family, backend, "-save"))
        self.restore_program = _ruleset.find_program(_ruleset.program_name(family, backend, "-restore"))

    @property
    def available(self) -> bool:
        """Whether the programs are installed."""
        return bool(self.program and self.save_program and self.restore_program)

    @property
    def save_command(self) -> List[str]:
        """Prints what the kernel holds, with counters."""
        return [self.save_program, "-c"]

    @property
    def restore_command(self) -> List[str]:
        """Applies standard input; what it does not name stays."""
        return [self.restore_program, "-w", LOCK_WAIT, "--noflush"]

    def _run(self, command: Sequence[str], data: str = "") -> Outcome:
        rc, out, err = self._module.run_command(
            list(command), data=data or None, binary_data=True, environ_update=_ENVIRONMENT
        )
        return Outcome(rc, out, clean_words(err), list(command))

    def save(self) -> Outcome:
        """What the kernel holds now, with counters."""
        return self._run(self.save_command)

    def restore(self, text: str, *, test: bool = False) -> Outcome:
        """Apply (or only test) input for iptables-restore; what it does not name stays."""
        mode = ["--test"] if test else []
        return self._run([*self.restore_command, *mode], text)

    def scratch(self, text: str, sets: Sequence[str] = ()) -> Outcome:
        """Load the text into an empty network namespace that ends with the command, and print what the kernel holds.

        ipsets belong to a namespace, so the headers of those in use are made there as well (without members).
        Raises ScratchError when namespaces cannot be made.
        """
        unshare = _ruleset.find_program("unshare")
        if not unshare:
            raise ScratchError("the program unshare (package util-linux) is missing")
        ipset, headers = self._set_headers(sets)
        try:
            programs = [self.restore_program, self.save_program, ipset, headers, LOCK_WAIT]
            outcome = self._run([unshare, "-n", "--", "/bin/sh", "-c", _SCRATCH_SCRIPT, "scratch", *programs], text)
        finally:
            if headers:
                os.unlink(headers)
        if outcome.words.startswith("unshare:"):
            raise ScratchError(outcome.words)
        return outcome

    def _set_headers(self, sets: Sequence[str]) -> tuple[str, str]:
        ipset = _ruleset.find_program("ipset") if sets else ""
        found: List[str] = []
        for name in sets if ipset else ():
            saved = self._run([ipset, "save", name])
            if saved.rc == 0:
                found += [line for line in saved.out.splitlines() if line.startswith("create ")]
        if not found:
            return "", ""
        handle, path = tempfile.mkstemp(prefix="ctsync-ipset-", dir=self._module.tmpdir)
        with os.fdopen(handle, "w") as stream:
            stream.write("\n".join(found) + "\n")
        return ipset, path


def clean_words(errors: str) -> str:
    """iptables' own words in one line: without program name, empty lines, and the advice to read the manual."""
    kept: List[str] = []
    for line in errors.splitlines():
        line = re.sub(r"^(ip6?tables\S*)(?: v\S+)?(?: \(\w+\))?:\s*", "", line.strip())
        if line and not line.startswith(("Try `", "#")):
            kept.append(line)
    return "; ".join(kept)


def blamed_rule(words: str, origins: Dict[int, str]) -> tuple[str, str]:
    """The rule that an error message points at, and the message without the line number; ("", words) if unknown."""
    found = re.search(r"line:? (\d+)", words)
    return (origins.get(int(found[1]), "") if found else ""), without_line(words)


def without_line(words: str) -> str:
    """An error message without the number of a line that only this code has seen."""
    words = re.sub(r"(?:; )?Error occurred at line: \d+|^;? ?line \d+: ", "", words)
    return re.sub(
        r"line \d+ failed", "the kernel refuses it without a reason; a match or target may not fit the table", words
    )
