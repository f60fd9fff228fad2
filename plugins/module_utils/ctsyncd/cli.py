# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The command line: conntrackd's letters, and words for what conntrackd cannot do.

Exit status: 0 done (``status``: READY; ``verify``: equal), 1 failed (``status``: DEGRADED; ``verify``: different), 2
usage or configuration (``status``: NOT READY, or nobody answers; ``verify``: cannot tell).
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from typing import TYPE_CHECKING, Any, Callable, Iterable, NamedTuple

from . import __version__, client
from .errors import ConfigError, CtsyncError

if TYPE_CHECKING:
    from . import config

OK = 0
FAILED = 1
USAGE = 2
BROKEN_PIPE = 141  # 128 + SIGPIPE, as a shell reports it

STATUS_TIMEOUT_S = 5.0
DUMP_TIMEOUT_S = 60.0
ACTION_TIMEOUT_S = 600.0  # a commit of a large table says nothing until it is done
STOP_TIMEOUT_S = 15.0

HELP = """\
Usage: ctsyncd [-C FILE] [-d]                run in the foreground (systemd supervises)
       ctsyncd [-C FILE] REQUEST             ask the running daemon
       ctsyncd [-C FILE] WORD

Requests:
  -i [ct|expect] [-x]  print the internal cache: this node's flows (or expectations) that are replicated
  -e [ct|expect] [-x]  print the external cache: the peer's flows, or expectations
  -c                   commit the external cache into the kernel
  -f [internal|external]
                       flush the caches, or one of them
  -F                   flush the kernel's table, but for what is not replicated
  -R                   read the kernel's table again
  -B                   send everything to the peer
  -n                   ask the peer to send everything
  -s [network|cache|runtime|link|queue|process|expect]
                       print statistics
  -t                   schedule a flush of the kernel's table
  -k                   stop the daemon
  -x                   with -i or -e: XML
  --json               with -i, -e, -s, status and verify: JSON

Words:
  verify               are the tables of both nodes equal? Exit status 0 yes, 1 no, 2 cannot tell
  status               can this node lose its peer? Exit status 0 READY, 1 DEGRADED, 2 NOT READY
  recorder             what happened in the last minutes, as JSON lines
  keys                 have the running daemon use the keys that configuration and key files have now, without a gap
  check-config         check the configuration; with --keys, the key files too
  gate --not-ready     tell keepalived "not ready", unless this node holds the virtual IPs

Options:
  -C FILE              configuration (default {path})
  -d                   accepted for habit, same as no option
  -v                   version
  -h                   this help
"""

# what a letter asks for, and the words that may follow it (any prefix of a word will do)
_TABLES = ("ct", "expect")
_STATISTICS = ("network", "cache", "runtime", "link", "rsqueue", "process", "queue", "ct", "multicast", "expect")
_STATISTICS_ALIASES = {"rsqueue": "queue", "ct": "summary", "multicast": "link"}


class _Request(NamedTuple):
    command: str
    words: tuple[str, ...] = ()
    timeout_s: float = ACTION_TIMEOUT_S


_REQUESTS = {
    "-i": _Request("internal", _TABLES, DUMP_TIMEOUT_S),
    "-e": _Request("external", _TABLES, DUMP_TIMEOUT_S),
    "-c": _Request("commit", _TABLES),
    "-f": _Request("flush", ("internal", "external")),
    "-F": _Request("flush-kernel", ("ct",)),
    "-R": _Request("resync", _TABLES),
    "-B": _Request("bulk"),
    "-n": _Request("request"),
    "-s": _Request("stats", _STATISTICS, DUMP_TIMEOUT_S),
    "-t": _Request("purge"),
    "-k": _Request("kill"),
}
_WORDS = ("status", "verify", "recorder", "keys", "check-config", "gate")
_FLAGS = ("-d", "-x", "-v", "-h", "-C")


class UsageError(CtsyncError):
    """The command line is wrong."""


class Invocation:
    """A command line, taken apart."""

    def __init__(self) -> None:
        self.path = client.DEFAULT_PATH
        self.action = "run"
        self.argument = ""  # the word after the letter, in full
        self.given = ""  # how the action was spelled
        self.xml = False
        self.json = False
        self.keys = False
        self.not_ready = False

    def choose(self, action: str, given: str) -> None:
        if self.given and self.given != given:
            raise UsageError(f"{self.given} and {given} cannot be combined")
        self.action = action
        self.given = given


def parse(arguments: Iterable[str]) -> Invocation:
    """Take a command line apart; :class:`UsageError` says what is wrong with it."""
    chosen = Invocation()
    rest = _expanded(arguments)
    while rest:
        item = rest.pop(0)
        if item in _REQUESTS:
            chosen.choose(_REQUESTS[item].command, item)
            if rest and not rest[0].startswith("-"):
                chosen.argument = _word(item, rest.pop(0))
        elif item in _WORDS:
            chosen.choose(item, item)
        elif item == "-C":
            if not rest:
                raise UsageError("-C needs the path of a configuration file")
            chosen.path = rest.pop(0)
        elif item == "-d":
            chosen.choose("run", item)
        elif item == "-x":
            chosen.xml = True
        elif item == "--json":
            chosen.json = True
        elif item == "--keys":
            chosen.keys = True
        elif item == "--not-ready":
            chosen.not_ready = True
        elif item in ("-v", "--version"):
            chosen.choose("version", "-v")
        elif item in ("-h", "--help"):
            chosen.choose("help", "-h")
        else:
            raise UsageError(f"unknown {'option' if item.startswith('-') else 'word'} {item!r}")
    _check(chosen)
    return chosen


def _expanded(arguments: Iterable[str]) -> list[str]:
    """``-ix`` is ``-i -x`` and ``-CFILE`` is ``-C FILE``."""
    result: list[str] = []
    for item in arguments:
        letters = [f"-{letter}" for letter in item[1:]]
        if item.startswith("-C") and len(item) > 2:
            result += ["-C", item[2:]]
        elif item.startswith("-") and len(letters) > 1 and all(each in _REQUESTS or each in _FLAGS for each in letters):
            result += letters
        else:
            result.append(item)
    return result


def _word(letter: str, word: str) -> str:
    """The word in full; a prefix is enough, as conntrackd has it."""
    words = _REQUESTS[letter].words
    for candidate in words:
        if word and candidate.startswith(word):
            return _STATISTICS_ALIASES.get(candidate, candidate)
    known = f"write one of {', '.join(words)}" if words else "write nothing after it"
    raise UsageError(f"{letter} {word!r}: not known: {known}")


def _check(chosen: Invocation) -> None:
    """Flags that stand without what they belong to."""
    if chosen.xml and chosen.action not in ("internal", "external"):
        raise UsageError("-x belongs to -i or -e")
    if chosen.xml and chosen.json:
        raise UsageError("-x and --json cannot be combined")
    if chosen.json and chosen.action == "run":
        raise UsageError("--json belongs to -i, -e, -s, status or verify")
    if chosen.keys and chosen.action != "check-config":
        raise UsageError("--keys belongs to check-config")
    if chosen.not_ready != (chosen.action == "gate"):
        raise UsageError("gate needs --not-ready" if chosen.action == "gate" else "--not-ready belongs to gate")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line (default: ``sys.argv``); returns the exit status."""
    try:
        chosen = parse(sys.argv[1:] if arguments is None else arguments)
    except UsageError as error:
        _complain(f"{error}")
        sys.stderr.write(HELP.format(path=client.DEFAULT_PATH))
        return USAGE
    try:
        status = _ACTIONS.get(chosen.action, _ask)(chosen)
        sys.stdout.flush()
        return status
    except ConfigError as error:
        for problem in error.problems:
            _complain(problem)
        return USAGE
    except client.ControlError as error:
        _complain(str(error))
        return error.exit or FAILED
    except CtsyncError as error:
        _complain(str(error))
        return FAILED
    except BrokenPipeError:
        # the reader (head, less) has seen enough; the interpreter must not complain of it at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KeyboardInterrupt:
        return 130


def _complain(text: str) -> None:
    sys.stderr.write(f"ctsyncd: {text}\n")


def _help(chosen: Invocation) -> int:
    sys.stdout.write(HELP.format(path=client.DEFAULT_PATH))
    return OK


def _version(chosen: Invocation) -> int:
    sys.stdout.write(f"ctsyncd {__version__}\n")
    return OK


def _run(chosen: Invocation) -> int:
    """Be the daemon."""
    from .daemon import run  # noqa: PLC0415 - the client commands do without the daemon's rooms

    return run(chosen.path)


def _check_config(chosen: Invocation) -> int:
    from . import config  # noqa: PLC0415 - only these commands need it

    settings = config.load(chosen.path)
    if chosen.keys:
        _read_keys(settings, chosen.path)
    return OK


def _keys(chosen: Invocation) -> int:
    """The daemon cannot read the files itself: systemd gave it copies when it started."""
    import base64  # noqa: PLC0415 - only this command needs them

    from . import config  # noqa: PLC0415

    keys = _read_keys(config.load(chosen.path), chosen.path)
    texts = {str(key_id): base64.b64encode(key).decode() for key_id, key in keys.items()}
    for line in client.request(_socket_path(chosen), {"command": "keys", "keys": texts}, STATUS_TIMEOUT_S):
        sys.stdout.write(_for_people(line))
    return OK


def _read_keys(settings: config.Config, path: str) -> dict[int, bytes]:
    """All of them by id; ConfigError with everything that is wrong."""
    problems: list[str] = []
    found = {}
    for key_id in settings.keys:
        try:
            found[key_id] = _read_key_as_operator(settings, key_id, path)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return found


def _read_key_as_operator(settings: config.Config, key_id: int, path: str) -> bytes:
    """Outside the unit there are no credentials: look at the file that the unit loads as ``key-<id>``."""
    import dataclasses  # noqa: PLC0415 - only this command needs them

    from . import service  # noqa: PLC0415

    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    if directory is None and settings.keys[key_id] == f"key-{key_id}":
        file = os.path.join(os.path.dirname(os.path.abspath(path)), "keys", f"{key_id}.key")
        settings = dataclasses.replace(settings, keys={**settings.keys, key_id: file})
    return service.read_key(settings, key_id, directory)


def _gate(chosen: Invocation) -> int:
    """Before the daemon's start and after its end: no stale "ready" may outlive it.

    A node that holds the virtual IPs is left alone: lowering its priority would move them.
    """
    from . import config, readiness, vrrp  # noqa: PLC0415 - only this command needs them

    try:
        settings = config.load(chosen.path)
        track_file, addresses = settings.track_file, {vip.packed for vip in settings.virtual_ips}
    except ConfigError as error:
        # whatever is wrong there, the safe side is "not ready"
        for problem in error.problems:
            _complain(problem)
        track_file, addresses = _lenient(chosen.path, "track_file", "/run/ctsync/not-ready"), set()
    if addresses and addresses <= _own_addresses():
        return OK
    target = vrrp.TrackFile(track_file)
    if target.write(readiness.KNOWS_NOTHING):
        return OK
    _complain(str(target.problem))
    return FAILED


def _own_addresses() -> set[bytes]:
    """All addresses of this node, packed; empty when the kernel does not say."""
    from .netlink import local_addresses  # noqa: PLC0415 - only this command needs the kernel

    try:
        return set(local_addresses())
    except (OSError, CtsyncError) as error:
        _complain(f"cannot list this node's addresses: {error}")
        return set()


def _lenient(path: str, key: str, default: str) -> str:
    """One path out of a configuration that may be unreadable or wrong: a client needs no more of it."""
    try:
        with open(path, "rb") as stream:
            value = json.loads(stream.read(client.MAX_CONFIG_BYTES)).get(key, default)
    except (OSError, ValueError, AttributeError, RecursionError):
        return default
    return value if isinstance(value, str) and value.startswith("/") else default


def _socket_path(chosen: Invocation) -> str:
    return _lenient(chosen.path, "control_socket", "/run/ctsyncd/ctsyncd.sock")


def _message(chosen: Invocation) -> dict[str, Any]:
    """The request for the daemon."""
    message: dict[str, Any] = {"command": chosen.action}
    if chosen.action in ("internal", "external"):
        message["format"] = "xml" if chosen.xml else "json" if chosen.json else "text"
        if chosen.argument == "expect":
            message["table"] = "expect"
    elif chosen.action == "flush":
        message["which"] = chosen.argument or "all"
    elif chosen.action == "stats":
        message["section"] = chosen.argument or "summary"
    return message


def _ask(chosen: Invocation) -> int:
    """A request to the daemon whose lines are printed as they come."""
    request = _REQUESTS.get(chosen.given)
    timeout_s = request.timeout_s if request else DUMP_TIMEOUT_S
    raw = chosen.json or chosen.action in ("internal", "external", "recorder")
    for line in client.request(_socket_path(chosen), _message(chosen), timeout_s):
        sys.stdout.write(line + "\n" if raw else _for_people(line))
    return OK


def _for_people(line: str) -> str:
    """An object of the daemon becomes blocks of counters; a line of text stays as it is."""
    if line.startswith("{"):
        try:
            value = json.loads(line)
        except ValueError:
            return line + "\n"
        if isinstance(value, dict):
            from .render import statistics  # noqa: PLC0415 - most answers are lines of text

            return statistics(value)
    return line + "\n"


def _status(chosen: Invocation) -> int:
    """The verdict.  No answer is a verdict, too."""
    from . import render  # noqa: PLC0415 - only this command needs it

    try:
        lines = list(client.request(_socket_path(chosen), {"command": "status"}, STATUS_TIMEOUT_S))
        status = json.loads(lines[0]) if lines else None
        if not isinstance(status, dict):
            raise client.ControlError("the daemon's status is not a JSON object")
    except (client.ControlError, ValueError) as error:
        _complain(str(error))
        status = {
            "schema": 1,
            "version": __version__,
            "verdict": "NOT READY",
            "reasons": ["ctsyncd does not answer"],
        }
    if chosen.json:
        sys.stdout.write(json.dumps(status) + "\n")
    else:
        sys.stdout.write(
            render.status_text({key: status[key] for key in status if key != "version" or "node" in status})
        )
    return render.VERDICT_EXITS.get(str(status.get("verdict")), USAGE)


def _verify(chosen: Invocation) -> int:
    """Both nodes compare all flows; an answer that is none has a reason."""
    from . import render  # noqa: PLC0415 - only this command needs it

    result: Any = None
    try:
        lines = list(client.request(_socket_path(chosen), {"command": "verify"}, ACTION_TIMEOUT_S))
        result = json.loads(lines[0]) if lines else None
        reason = "the daemon's answer is not a JSON object"
    except (client.ControlError, ValueError) as error:
        reason = str(error)
    if not isinstance(result, dict):
        result = {"schema": 1, "equal": None, "reason": reason, "flows": None, "differences": []}
    sys.stdout.write(json.dumps(result) + "\n" if chosen.json else render.verification_text(result))
    return {True: OK, False: FAILED}.get(result.get("equal"), USAGE)


def _kill(chosen: Invocation) -> int:
    """Stop the daemon and wait until its socket is gone."""
    path = _socket_path(chosen)
    for line in client.request(path, _message(chosen), STATUS_TIMEOUT_S):
        sys.stdout.write(_for_people(line))
    end = time.monotonic() + STOP_TIMEOUT_S
    while _answers(path):
        if time.monotonic() > end:
            raise client.ControlError(
                f"ctsyncd was asked to stop and still runs after {STOP_TIMEOUT_S:g} s: see its log"
            )
        time.sleep(0.05)
    return OK


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except OSError:
            return True
    return True


_ACTIONS: dict[str, Callable[[Invocation], int]] = {
    "run": _run,
    "help": _help,
    "version": _version,
    "status": _status,
    "verify": _verify,
    "keys": _keys,
    "check-config": _check_config,
    "gate": _gate,
    "kill": _kill,
}
