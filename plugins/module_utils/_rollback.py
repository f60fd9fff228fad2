# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The guard: a process on the node that puts the old rules back unless somebody confirms the new ones in time.

This module is private to the collection. It has two sides, and both are here so that they agree:

* the guard itself (`serve`), which runs on its own from an archive of this file and `_ruleset`, with nothing but the
  standard library, so that it outlives the module, its temporary files and its connection;
* what the ruleset module does with it (`arm`, `ask`, `settle`).

A rollback is a directory below `FOLDER`, named by its id: `job.json` (what to put back), `guard.pyz`, `pid`, `socket`
(one request and one answer per connection, a JSON line each) and, at the end, `outcome.json`. The guard alone decides,
and it does one thing after the other: a confirmation is before the deadline, or is told that it came too late.

It lives in /run: after a reboot there is no guard, and none is needed, because the kernel has forgotten the new rules
and the files from which boot restores are written after the confirmation only.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import syslog
import time
import zipfile
from types import ModuleType
from typing import Any, Dict, List, Optional, Sequence

from . import _ruleset

FOLDER = "/run/ctsync-ruleset"
UNIT = "ctsync-ruleset-rollback-{0}.service"
GRACE = 30  # seconds added to the deadline until the module says that it has applied everything
ATTEMPTS = 20  # to put the rules back, a second apart: somebody else may hold the lock of iptables
ARMED, CONFIRMED, ROLLED_BACK, FAILED, UNKNOWN = "armed", "confirmed", "rolled back", "failed", "unknown"

_MAIN = "import sys\nfrom guard import _rollback\nsys.exit(_rollback.serve(sys.argv[1]))\n"
_DATE = (1980, 1, 1, 0, 0, 0)  # the first moment that a zip archive can express


def now() -> float:
    """Seconds since boot; the same clock for all processes, and it goes on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def folder_of(ident: str) -> str:
    """The directory of a rollback."""
    return os.path.join(FOLDER, ident)


def is_ident(ident: str) -> bool:
    """Whether the text can name a rollback: it becomes part of a path and of a unit's name."""
    return 8 <= len(ident) <= 32 and all(char in "0123456789abcdef" for char in ident)


def read_json(path: str) -> Dict[str, Any]:
    """A JSON object from a file; empty when there is none, or none that can be read."""
    try:
        with open(path) as stream:
            content = json.load(stream)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_file(path: str, text: str, mode: int = 0o600) -> None:
    """Replace a file in one step; the directory must exist."""
    temporary = f"{path}.{os.getpid()}"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(handle, "w") as stream:
        stream.write(text)
    os.chmod(temporary, mode)
    os.replace(temporary, path)


# ---------------------------------------------------------------------------------------------------------------------
# The guard


def _command(command: List[str], data: Optional[str] = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LC_ALL": "C", "LANGUAGE": "C"}
    return subprocess.run(command, input=data, capture_output=True, text=True, env=environment, timeout=60, check=False)


def _restore_family(part: Dict[str, Any], position: str) -> str:
    """Put our chains, jumps and policies of one family back; the reason when that did not work, or empty."""
    before = _ruleset.parse_save(part["before"])
    policies = {tuple(key.split(" ", 1)): policy for key, policy in part["policies"].items()}
    for attempt in (1, 2):
        held = _command(part["save"])
        if held.returncode:
            return f"{part['save'][0]}: {held.stderr.strip()}"
        live = _ruleset.parse_save(held.stdout)
        change = _ruleset.render_change(live, _ruleset.put_back(live, before, policies, position))
        if not change:
            return ""
        if attempt == 2:
            return f"{part['restore'][0]} said nothing, and yet the old rules are not there"
        done = _command(part["restore"], change)
        if done.returncode:
            return f"{part['restore'][0]}: {done.stderr.strip()}"
    return ""


def roll_back(job: Dict[str, Any]) -> List[str]:
    """Put rules and files back; every reason why something could not be, none when all is as before."""
    problems: List[str] = []
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(1)
        problems = []
        for family, part in job["families"].items():
            try:
                problem = _restore_family(part, job["position"])
            except (OSError, ValueError, subprocess.SubprocessError, _ruleset.RulesetError) as exc:
                problem = str(exc)
            if problem:
                problems.append(f"{family}: {problem}")
        if not problems:
            break
    for path, (text, mode) in job["files"].items():
        try:
            if text is not None:
                write_file(path, text, mode)
            elif os.path.lexists(path):
                os.unlink(path)
        except OSError as exc:
            problems.append(f"{path}: {exc.strerror}")
    return problems


class _Guard:
    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.job = read_json(os.path.join(folder, "job.json"))
        self.stopped = False

    def finish(self, outcome: str, reason: str, problems: List[str]) -> Dict[str, Any]:
        result = {"outcome": outcome, "reason": reason, "problems": problems}
        write_file(os.path.join(self.folder, "outcome.json"), json.dumps(result) + "\n")
        words = "; ".join([f"ctsync: new firewall rules {outcome}: {reason}", *problems])
        syslog.syslog(syslog.LOG_ERR if problems else syslog.LOG_NOTICE, words)
        return result

    def back(self, reason: str) -> Dict[str, Any]:
        problems = roll_back(self.job)
        return self.finish(FAILED if problems else ROLLED_BACK, reason, problems)

    def answer(self, request: Dict[str, Any]) -> Dict[str, Any]:
        """Do what is asked; the answer's outcome is final, or 'armed' when the watch goes on."""
        what = request.get("do")
        if what == "start":
            self.job["deadline"] = now() + self.job["timeout"]
            self.job["started"] = True
            write_file(os.path.join(self.folder, "job.json"), json.dumps(self.job))
        elif what == "confirm" and self.job.get("started"):
            return self.finish(CONFIRMED, "the controller came back over a new connection", [])
        elif what == "abort":
            return self.back(str(request.get("reason", "")))
        return {"outcome": ARMED, "left_s": round(max(0.0, self.job["deadline"] - now()), 1)}

    def talk(self, connection: socket.socket) -> Dict[str, Any]:
        connection.settimeout(2)
        with connection, contextlib.suppress(OSError, ValueError), connection.makefile("rw") as stream:
            line = stream.readline(65536)
            if line:
                result = self.answer(json.loads(line))
                with contextlib.suppress(OSError):
                    stream.write(json.dumps(result) + "\n")
                    stream.flush()
                return result
        return {"outcome": ARMED}

    def watch(self) -> Dict[str, Any]:
        path = os.path.join(self.folder, "socket")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(path)
            listener.listen(4)
            while not self.stopped:
                left = self.job["deadline"] - now()
                if left <= 0:
                    return self.back(f"nobody confirmed them within {self.job['timeout']} s")
                listener.settimeout(min(left, 0.5))
                try:
                    connection, _address = listener.accept()
                except socket.timeout:
                    continue
                result = self.talk(connection)
                if result["outcome"] != ARMED:
                    return result
        return self.back("the guard was told to stop")

    def stop(self, *_arguments: object) -> None:
        self.stopped = True


def serve(folder: str) -> int:
    """Watch over one rollback until it is decided; 0, or 1 when the rules could not be put back."""
    guard = _Guard(folder)
    if read_json(os.path.join(folder, "outcome.json")):
        return 0  # started again after the decision
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, guard.stop)
    signal.signal(signal.SIGINT, guard.stop)
    write_file(os.path.join(folder, "pid"), f"{os.getpid()}\n")
    syslog.openlog("ctsync-ruleset", syslog.LOG_PID, syslog.LOG_DAEMON)
    result = guard.watch()
    return 1 if result["outcome"] == FAILED else 0


# ---------------------------------------------------------------------------------------------------------------------
# The module's side


class GuardError(Exception):
    """The guard could not be started, so nothing may be changed under its protection."""


def ask(ident: str, what: str, reason: str = "", patience: float = 3.0) -> Dict[str, Any]:
    """What became of a rollback, after asking its guard for something (confirm, abort, start, status).

    The answer has `outcome`: armed, confirmed, rolled back, failed (with `problems`), or unknown when there is neither
    guard nor outcome. A guard that was killed is started again by systemd, hence the patience (seconds).
    """
    folder = folder_of(ident)
    deadline = now() + patience
    request = json.dumps({"do": what, "reason": reason}) + "\n"
    while True:
        outcome = read_json(os.path.join(folder, "outcome.json"))
        if outcome:
            return outcome
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(ATTEMPTS * 3 + 60.0)
                connection.connect(os.path.join(folder, "socket"))
                with connection.makefile("rw") as stream:
                    stream.write(request)
                    stream.flush()
                    line = stream.readline()
                if line:
                    return dict(json.loads(line))
        except (OSError, ValueError):
            pass
        if now() > deadline:
            return {"outcome": UNKNOWN, "reason": "there is no guard", "problems": []}
        time.sleep(0.05)


def in_first_namespaces() -> bool:
    """Whether systemd runs, and works on the same network and files as this process."""
    if not os.path.isdir("/run/systemd/system"):
        return False
    try:
        return all(os.readlink(f"/proc/1/ns/{kind}") == os.readlink(f"/proc/self/ns/{kind}") for kind in ("net", "mnt"))
    except OSError:
        return False


def archive(main: str, package: str, modules: Sequence[ModuleType]) -> bytes:
    """A program of its own, made of the sources that run now: `modules` in a package, and the text of its start."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as pyz:
        files = {"__main__.py": main, f"{package}/__init__.py": ""}
        for module in modules:
            source = module.__spec__.loader.get_source(module.__name__)  # type: ignore[union-attr]
            files[f"{package}/{module.__name__.rpartition('.')[2]}.py"] = source
        for name, text in files.items():
            pyz.writestr(zipfile.ZipInfo(name, _DATE), text)
    return stream.getvalue()


def _forget_old() -> None:
    """Remove what earlier rollbacks left, but keep the last: somebody may still ask for its outcome."""
    found = [os.path.join(FOLDER, name) for name in os.listdir(FOLDER)]
    for path in sorted(found, key=os.path.getmtime)[:-1]:
        shutil.rmtree(path, ignore_errors=True)


def armed_now() -> List[str]:
    """The rollbacks that are not decided yet and whose guard answers."""
    if not os.path.isdir(FOLDER):
        return []
    return [i for i in sorted(os.listdir(FOLDER)) if ask(i, "status", patience=1.5)["outcome"] == ARMED]


def settle(limit: float) -> List[str]:
    """Wait until every rollback of earlier runs is decided, at most `limit` seconds; those that are not by then."""
    deadline = now() + limit
    while True:
        armed = armed_now()
        if not armed or now() > deadline:
            return armed
        time.sleep(0.2)


def arm(ident: str, job: Dict[str, Any]) -> None:
    """Start the guard and wait until it answers; GuardError if it does not.

    `job`: `timeout` (seconds), `position` of the jumps, `files` {path: [text or None, mode]}, and `families` {family:
    {before: iptables-save output, policies: {"table CHAIN": policy}, save: command, restore: command}}.
    """
    folder = folder_of(ident)
    try:
        os.makedirs(FOLDER, 0o700, exist_ok=True)
        _forget_old()
        os.mkdir(folder, 0o700)
        job = {**job, "deadline": now() + job["timeout"] + GRACE}
        write_file(os.path.join(folder, "job.json"), json.dumps(job))
        program = os.path.join(folder, "guard.pyz")
        with open(program, "wb") as stream:
            stream.write(archive(_MAIN, "guard", (_ruleset, sys.modules[__name__])))
    except OSError as exc:
        raise GuardError(f"{exc.filename}: {exc.strerror}") from exc
    command = [sys.executable or "/usr/bin/python3", "-I", "-B", program, folder]
    said = ""
    systemd_run = _ruleset.find_program("systemd-run") if in_first_namespaces() else ""
    if systemd_run:
        # a unit of its own: it is neither in the session of ssh nor killed with it, and comes back when it is killed
        wrapped = [systemd_run, "--quiet", "--collect", f"--unit={UNIT.format(ident)}"]
        wrapped += ["--description=Puts the old firewall rules back unless the new ones are confirmed"]
        wrapped += ["--property=Restart=on-failure", "--property=RestartSec=1", "--property=KillMode=process"]
        started = _command([*wrapped, *command])
        said = started.stderr.strip()
        if started.returncode:
            systemd_run = ""
    if not systemd_run:
        with open(os.path.join(folder, "errors"), "wb") as errors:
            subprocess.Popen(
                command,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                start_new_session=True,
            )
    if ask(ident, "status", patience=20)["outcome"] != ARMED:
        with contextlib.suppress(OSError), open(os.path.join(folder, "errors")) as stream:
            said = stream.read().strip() or said
        raise GuardError(f"it does not answer ({said or 'no message'})")


def run_canary(command: List[str], limit: float) -> str:
    """Run the operator's own test of the new rules; why it failed, or empty."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=limit, check=False
        )
    except subprocess.TimeoutExpired:
        return "was not done in time"
    except OSError as exc:
        return f"could not be started: {exc.strerror}"
    if done.returncode == 0:
        return ""
    words = (done.stderr.strip() or done.stdout.strip())[-500:]
    return f"ended with {done.returncode}" + (f": {words}" if words else "")
