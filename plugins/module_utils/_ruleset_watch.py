# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The watch: are the rules that run still those that were applied?  A program that a systemd timer starts every minute.

This module is private to the collection. It has two sides, as `_rollback` has:

* the watch itself (`main`), an archive of this file, `_rollback` and `_ruleset` with nothing but the standard library;
* what the ruleset module needs of it: the archive, the units, the lock.

The watch computes the fingerprint of the running rules as the module does, by one iptables-save for each family, and
replaces the file with the fingerprint when something has changed. The daemon reads that file
(`service.read_fingerprint` there), so the watch needs no word with it, and the daemon no rights for the rules. The file
is a `Record`: the fingerprint of what runs, and, only when it applies, a line ``applied HEX`` with that of what was
applied, and a line ``unread WORDS`` when the running rules cannot be read.

While rules are applied or put back the watch looks away. Who changes rules holds the `Lock`; the guard, which cannot
(the module may wait for it with the lock in its hands), is known by its directory.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import subprocess
import sys
import time
from typing import Callable, Dict, NamedTuple, Optional, Sequence

from . import _rollback, _ruleset

NAME = "ctsync-ruleset-watch"
PROGRAM_PATH = "/usr/lib/ctsync/ruleset-watch.pyz"
SERVICE = f"{NAME}.service"
SERVICE_PATH = f"/etc/systemd/system/{SERVICE}"
TIMER = f"{NAME}.timer"
TIMER_PATH = f"/etc/systemd/system/{TIMER}"
FINGERPRINT_PATH = "/run/ctsync/ruleset.fingerprint"
INTERVAL = 60  # seconds between two looks
SECOND_LOOK = 2.0  # seconds after which a difference must still be there: somebody may be at work just now
SAVE_TIMEOUT = 20  # seconds for one iptables-save
NO_RULES = "none"
WORDS_BYTES = 200  # of iptables' own words

_MAIN = "import sys\nfrom watch import _ruleset_watch\nsys.exit(_ruleset_watch.main(sys.argv[1:]))\n"
_HEX = re.compile(r"[0-9a-f]{64}")


class WatchError(Exception):
    """The running rules cannot be read; the text says why."""


# ---------------------------------------------------------------------------------------------------------------------
# The file


class Record(NamedTuple):
    """`running` and `applied` are fingerprints, empty for no rules; `unread` is why the running ones are not known."""

    running: str
    applied: str
    unread: str = ""

    def render(self) -> str:
        """The file's content."""
        lines = [self.running or NO_RULES]
        if self.applied != self.running:
            lines.append(f"applied {self.applied or NO_RULES}")
        if self.unread:
            lines.append(f"unread {self.unread}")
        return "\n".join(lines) + "\n"


def parse_record(text: Optional[str]) -> Optional[Record]:
    """The content of the file; None when there is none, or not what the module or the watch writes."""
    first, *rest = (text or "").splitlines() or [""]
    if not (first == NO_RULES or _HEX.fullmatch(first)):
        return None
    running = applied = "" if first == NO_RULES else first
    unread = ""
    for line in rest:
        key, _space, value = line.partition(" ")
        if key == "applied" and (value == NO_RULES or _HEX.fullmatch(value)):
            applied = "" if value == NO_RULES else value
        elif key == "unread":
            unread = value
        else:
            return None
    return Record(running, applied, unread)


def next_record(held: Optional[str], stored: Optional[str], running: Optional[str], unread: str) -> Optional[Record]:
    """What the file has to say now, or None when there is nothing to compare with: nothing was applied.

    `held` is the file's content and `stored` that of the one that boot restores from, each None when it is not there;
    `running` is the fingerprint of what runs, None when it cannot be read (`unread` says why).
    """
    before = parse_record(held) or parse_record(stored)
    if before is None:
        return None
    if running is None:
        return before._replace(unread=unread)
    return Record(running, before.applied)


# ---------------------------------------------------------------------------------------------------------------------
# The lock


class Lock:
    """Held by whoever changes the rules or compares them; the kernel gives it back when its process dies.

    It is the guards' directory itself (flock(2)), which nobody but root can open: others could hold it for ever.
    """

    def __init__(self, folder: str = "") -> None:
        self._folder = folder or _rollback.FOLDER
        self._handle = -1

    def take(self, patience: float = 0.0) -> bool:
        """Whether it could be had within `patience` seconds. Raises OSError when the directory cannot be made."""
        deadline = _rollback.now() + patience
        os.makedirs(self._folder, 0o700, exist_ok=True)
        self._handle = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        while True:
            try:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if _rollback.now() >= deadline:
                    self.give_back()
                    return False
            time.sleep(0.1)

    def give_back(self) -> None:
        """Let others have it; harmless without it."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


def guard_at_work(folder: str = "") -> bool:
    """Whether a guard lives whose rollback is not decided yet."""
    folder = folder or _rollback.FOLDER
    for ident in os.listdir(folder) if os.path.isdir(folder) else ():
        path = os.path.join(folder, ident)
        if os.path.exists(os.path.join(path, "outcome.json")):
            continue
        with contextlib.suppress(OSError):
            with open(os.path.join(path, "pid")) as stream:
                pid = stream.read().strip()
            with open(f"/proc/{pid}/cmdline", "rb") as stream:
                if os.fsencode(path) in stream.read().split(b"\0"):
                    return True
    return False


# ---------------------------------------------------------------------------------------------------------------------
# The watch


def _save(program: str) -> str:
    """What iptables-save prints; WatchError when it does not."""
    try:
        done = subprocess.run(
            [program],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env={**os.environ, "LC_ALL": "C", "LANGUAGE": "C"},
            timeout=SAVE_TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired as exc:
        raise WatchError(f"{program}: no answer within {SAVE_TIMEOUT} s") from exc
    except OSError as exc:
        raise WatchError(f"{program}: {exc.strerror}") from exc
    if done.returncode:
        raise WatchError(f"{program}: {' '.join(done.stderr.split()) or f'it ended with {done.returncode}'}")
    return done.stdout


def read_running(programs: Dict[str, str], optional: Sequence[str]) -> str:
    """Fingerprint of what runs. `programs` is the path of iptables-save by family.

    A family of `optional`, in which nothing was applied, is left out when it cannot be read, as the module leaves it.
    Raises WatchError for any other.
    """
    states: Dict[str, _ruleset.Tables] = {}
    for family, program in programs.items():
        try:
            states[family] = _ruleset.parse_save(_save(program))
        except (ValueError, WatchError, _ruleset.RulesetError) as exc:
            if family not in optional:
                raise WatchError(" ".join(str(exc).split())[:WORDS_BYTES]) from exc
    return _ruleset.fingerprint(states)


def read_text(path: str) -> Optional[str]:
    """Content of a small text file; None if it does not exist. Raises OSError for other reasons."""
    try:
        with open(path, errors="replace") as stream:
            return stream.read(4096)
    except FileNotFoundError:
        return None


class Seen(NamedTuple):
    """What one look found: whether all could be read, and what is to be said of a change (with its priority, <N>)."""

    well: bool
    said: str = ""


def look(path: str, stored_path: str, running: Callable[[], str], pause: Callable[[float], None] = time.sleep) -> Seen:
    """One look: bring the file at `path` up to date.

    `stored_path` is the file that boot restores it from; `running` gives the fingerprint of what runs, or raises
    WatchError. Raises OSError when a file cannot be read or written.
    """
    held, stored = read_text(path), read_text(stored_path)

    def compare() -> Optional[Record]:
        try:
            return next_record(held, stored, running(), "")
        except WatchError as exc:
            return next_record(held, stored, None, str(exc))

    record = compare()
    if record is None:
        return Seen(True)
    if record.render() == held:
        return Seen(not record.unread)
    pause(SECOND_LOOK)
    if compare() != record:
        return Seen(True)  # somebody is at work: the next look will see what has become of it
    _rollback.write_file(path, record.render(), 0o644)
    if record.unread:
        return Seen(False, f"<4>the rules that run cannot be read: {record.unread}")
    if record.running != record.applied:
        return Seen(
            True,
            "<4>the rules that run are not those that were applied"
            f" ({record.running[:12] or NO_RULES} runs, {record.applied[:12] or NO_RULES} was applied):"
            " the playbook site with --check --diff --tags ruleset shows what differs",
        )
    return Seen(True, "<5>the rules that run are those that were applied")


def main(arguments: Sequence[str]) -> int:
    """`arguments`: the file of boot, then FAMILY=PROGRAM, with a ? after a family that may be missing.

    0, or 1 while the rules or a file cannot be read.
    """
    stored, *pairs = arguments
    programs, optional = {}, []
    for pair in pairs:
        family, _equals, program = pair.partition("=")
        if family.endswith("?"):
            family = family[:-1]
            optional.append(family)
        programs[family] = program
    lock = Lock()
    try:
        if not lock.take() or guard_at_work():
            return 0  # rules are being changed: who does that writes the file
        os.makedirs(os.path.dirname(FINGERPRINT_PATH), 0o755, exist_ok=True)
        seen = look(FINGERPRINT_PATH, stored, lambda: read_running(programs, optional))
    except OSError as exc:
        seen = Seen(False, f"<3>{exc.filename}: {exc.strerror}")
    finally:
        lock.give_back()
    if seen.said:
        sys.stderr.write(seen.said + "\n")
    return 0 if seen.well else 1


# ---------------------------------------------------------------------------------------------------------------------
# The module's side


def archive() -> bytes:
    """The watch as a program of its own, made of the sources that run now; the same bytes every time."""
    return _rollback.archive(_MAIN, "watch", (_ruleset, _rollback, sys.modules[__name__]))


def service_text(interpreter: str, stored: str, programs: Sequence[str]) -> str:
    """The systemd unit that looks once. `programs` are the arguments FAMILY=PROGRAM of `main`."""
    words = [interpreter, "-I", "-B", PROGRAM_PATH, stored, *programs]
    return "\n".join(
        [
            "# Written by Ansible (ctsync.ha_firewall.ruleset): changes are lost.",
            "[Unit]",
            "Description=Compares the firewall rules of ctsync that run with those that were applied",
            "After=ctsync-ruleset.service",
            "",
            "[Service]",
            "Type=oneshot",
            f"ExecStart={' '.join(_ruleset.quote(word) for word in words)}",
            "SyslogIdentifier=ctsync-ruleset",
            "# what systemd itself says of every start is information, and nobody needs it each minute",
            "LogLevelMax=notice",
            "TimeoutStartSec=120",
            "UMask=0022",
            "Nice=10",
            "",
            "# iptables-save asks the kernel by netlink or a raw socket, and changes nothing",
            "CapabilityBoundingSet=CAP_NET_ADMIN CAP_NET_RAW",
            "NoNewPrivileges=yes",
            "ProtectSystem=full",
            "ProtectHome=yes",
            "PrivateTmp=yes",
            "ProtectControlGroups=yes",
            "ProtectHostname=yes",
            "LockPersonality=yes",
            "RestrictAddressFamilies=AF_NETLINK AF_INET AF_INET6 AF_UNIX",
            "RestrictNamespaces=yes",
            "RestrictRealtime=yes",
            "RestrictSUIDSGID=yes",
            "SystemCallArchitectures=native",
            "",
        ]
    )


def timer_text() -> str:
    """The systemd timer that starts it every minute."""
    return "\n".join(
        [
            "# Written by Ansible (ctsync.ha_firewall.ruleset): changes are lost.",
            "[Unit]",
            "Description=Looks every minute whether the firewall rules of ctsync are those that were applied",
            "",
            "[Timer]",
            "OnActiveSec=10s",
            f"OnUnitActiveSec={INTERVAL}s",
            "AccuracySec=1s",
            "",
            "[Install]",
            "WantedBy=timers.target",
            "",
        ]
    )
