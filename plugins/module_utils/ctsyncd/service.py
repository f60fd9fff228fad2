# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The process among others: systemd's notifications, signals, key files, logging.

sd_notify(3), systemd.exec(5) (credentials, ``$JOURNAL_STREAM``), sd-daemon(3) (``<N>`` prefixes), signal(7).
"""

from __future__ import annotations

import base64
import binascii
import logging
import os
import signal
import socket
import stat
import time
from collections import OrderedDict
from types import FrameType
from typing import Any, Mapping, TextIO

from . import conditions
from .config import Config
from .errors import ConfigError

LOG = logging.getLogger(__name__)

KEY_BYTES = 32  # least length of a pre-shared key
KEY_FILE_BYTES = 4096
KEY_REMEDY = "make one with: openssl rand -base64 32"


NO_RULES = "none"  # in the place of a fingerprint
FINGERPRINT_BYTES = 512  # read of the file with the fingerprint of the ruleset


class Notifier:
    """sd_notify(3): tells systemd our state; silent where nobody listens (``$NOTIFY_SOCKET`` is not set)."""

    def __init__(self, environ: Mapping[str, str] | None = None) -> None:
        environ = os.environ if environ is None else environ
        address = environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._status = ""
        self.watchdog_interval_s = _watchdog_interval_s(environ)

    def ready(self, status: str = "") -> None:
        """We are started, or reloaded."""
        self._send("READY=1", *self._status_line(status))

    def status(self, status: str) -> None:
        """One line for ``systemctl status``; sent only when it changed."""
        self._send(*self._status_line(status))

    def watchdog(self) -> None:
        """A turn of real work was done.  Call it every ``watchdog_interval_s`` seconds, if that is not ``None``."""
        if self.watchdog_interval_s is not None:
            self._send("WATCHDOG=1")

    def reloading(self) -> None:
        """A reload begins; ``ready`` ends it."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self, status: str = "") -> None:
        self._send("STOPPING=1", *self._status_line(status))

    def _status_line(self, status: str) -> tuple[str, ...]:
        if not status or status == self._status:
            return ()
        self._status = status
        return ("STATUS=" + " ".join(status.split()),)

    def _send(self, *lines: str) -> None:
        if not self._address or not lines:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as sock:
            try:
                sock.sendto("\n".join(lines).encode(), socket.MSG_NOSIGNAL, self._address)
            except OSError as error:
                LOG.debug("sd_notify %s: %s", lines[0], error.strerror)


def _watchdog_interval_s(environ: Mapping[str, str]) -> float | None:
    """Half of systemd's WatchdogSec, as sd_watchdog_enabled(3) advises; ``None`` when it does not watch us."""
    try:
        usec = int(environ["WATCHDOG_USEC"])
        pid = int(environ.get("WATCHDOG_PID", os.getpid()))
    except (KeyError, ValueError):
        return None
    return usec / 2e6 if usec > 0 and pid == os.getpid() else None


class Signals:
    """Signals as bytes on a socket that the event loop watches; the handlers themselves do nothing.

    Make it early: a signal that comes before the first ``read`` waits in the socket.
    """

    def __init__(self, *numbers: signal.Signals) -> None:
        self._receiver, self._sender = socket.socketpair()
        self._receiver.setblocking(False)
        self._sender.setblocking(False)
        self._old_fd = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        self._old = {number: signal.signal(number, _do_nothing) for number in numbers}

    def fileno(self) -> int:
        return self._receiver.fileno()

    def read(self) -> list[int]:
        """Numbers of the signals that came since the last call, oldest first.  Never blocks."""
        try:
            return [number for number in self._receiver.recv(4096) if number in self._old]
        except (BlockingIOError, InterruptedError):
            return []

    def close(self) -> None:
        """Put the former handlers back."""
        signal.set_wakeup_fd(self._old_fd)
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._receiver.close()
        self._sender.close()


def _do_nothing(number: int, frame: FrameType | None) -> None:
    """The wake-up byte is all that we want of a signal."""


def read_key(config: Config, key_id: int, credentials_directory: str | None) -> bytes:
    """The pre-shared key ``key_id`` (at least 32 bytes); :class:`ConfigError` names key, file and remedy.

    ``credentials_directory`` is ``$CREDENTIALS_DIRECTORY`` of systemd, or ``None``.
    """
    place = config.keys.get(key_id)
    if place is None:
        known = ", ".join(str(number) for number in sorted(config.keys))
        raise ConfigError([f"key {key_id}: is not in keys: known are {known}"])
    if place.startswith("/"):
        path = place
    elif credentials_directory:
        path = os.path.join(credentials_directory, place)
    else:
        raise ConfigError(
            [
                f"key {key_id}: credential {place}: systemd gave no credentials: start ctsyncd by its unit "
                f"(LoadCredential={place}:FILE), or write an absolute path in keys.{key_id}"
            ]
        )
    return decode_key(_read_key_file(path, key_id, shared=not place.startswith("/")), key_id, path)


def decode_key(raw: bytes, key_id: int, path: str) -> bytes:
    """Base64 text to a key of at least 32 bytes.  The error never holds any of ``raw``."""
    try:
        key = base64.b64decode(raw.strip(), validate=True)
    except (binascii.Error, ValueError):
        raise ConfigError([f"key {key_id}: {path}: is not one line of base64: {KEY_REMEDY}"]) from None
    if len(key) < KEY_BYTES:
        raise ConfigError([f"key {key_id}: {path}: has {len(key)} bytes, less than {KEY_BYTES}: {KEY_REMEDY}"])
    return key


def handed_over(request: Any, config: Config) -> dict[int, bytes]:
    """The keys of this configuration out of a request's object: base64 by key id.  Raises ConfigError, which never
    shows any of it."""
    texts = request if isinstance(request, dict) else {}
    if sorted(texts) != sorted(str(key_id) for key_id in config.keys):
        raise ConfigError(["keys: the configuration was changed meanwhile, or is not this daemon's: ask again"])
    return {
        key_id: decode_key(str(texts[str(key_id)]).encode(), key_id, "what was handed over")
        for key_id in sorted(config.keys)
    }


def _read_key_file(path: str, key_id: int, shared: bool) -> bytes:
    """``shared``: systemd guards the file, and its access list looks like group permissions."""
    try:
        with open(path, "rb") as stream:
            mode = os.fstat(stream.fileno()).st_mode
            raw = stream.read(KEY_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            [f"key {key_id}: {path}: cannot be read: {error.strerror}: write a key there, {KEY_REMEDY}"]
        ) from error
    if len(raw) > KEY_FILE_BYTES:
        raise ConfigError([f"key {key_id}: {path}: is larger than {KEY_FILE_BYTES} bytes: {KEY_REMEDY}"])
    if not shared and mode & (stat.S_IROTH | stat.S_IWOTH):
        raise ConfigError(
            [f"key {key_id}: {path}: everybody may read or write it: chmod 600 {path}, and change the key"]
        )
    return raw


_PRIORITIES = (  # sd-daemon(3)
    (logging.CRITICAL, 2),
    (logging.ERROR, 3),
    (logging.WARNING, 4),
    (logging.INFO, 6),
)


def read_fingerprint(path: str) -> tuple[str, str]:
    """The fingerprint of the ruleset that runs (hexadecimal digits), and what is wrong with it.

    The first line of the file is the fingerprint, or ``none``.  Who watches the rules adds ``applied FINGERPRINT`` when
    that is not what was applied, or ``unread WHY`` when nobody can tell.  No file is no problem: then nobody who writes
    one has applied rules here.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            text = os.read(descriptor, FINGERPRINT_BYTES).decode("ascii", "replace").strip()
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        return "", ""
    except OSError as error:
        return "", f"ruleset fingerprint: cannot read {path}: {error.strerror}"
    first, *rest = text.splitlines() or [""]
    running, notes = first.strip().lower(), dict(line.split(" ", 1) for line in rest if " " in line)
    if running == NO_RULES:
        running = ""
    elif not conditions.FINGERPRINT.match(running):
        return "", f"ruleset fingerprint: {path} does not hold 16 to 64 hexadecimal digits: apply the ruleset again"
    if "unread" in notes:
        return running, f"the rules that run here cannot be read: {notes['unread']}"
    if "applied" in notes:
        runs, applied = running[:12] or "nothing", notes["applied"][:12]
        return running, f"the rules that run here are not those that were applied ({runs} runs, {applied} was applied)"
    return running, ""


class JournalFormatter(logging.Formatter):
    """One journal entry per line, each with its ``<N>`` priority; the journal adds time and name."""

    def format(self, record: logging.LogRecord) -> str:
        prefix = next((f"<{number}>" for level, number in _PRIORITIES if record.levelno >= level), "<7>")
        return "\n".join(prefix + _printable(line) for line in super().format(record).splitlines())


class TerminalFormatter(logging.Formatter):
    """For a person at a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        head = f"ctsyncd: {record.levelname.lower()}: "
        return "\n".join(head + _printable(line) for line in super().format(record).splitlines())


def _printable(line: str) -> str:
    """A peer or a file may have put anything into a message: no control characters reach a terminal."""
    if line.isprintable():
        return line
    return "".join(char if char.isprintable() or char == "\t" else f"\\x{ord(char):02x}" for char in line)


def setup_logging(level: str, stream: TextIO, environ: Mapping[str, str] | None = None) -> None:
    """Log everything from ``level`` (a choice of ``log_level``) on to ``stream``, for the journal if it goes there."""
    handler = logging.StreamHandler(stream)
    to_journal = _is_journal(stream, os.environ if environ is None else environ)
    handler.setFormatter(JournalFormatter() if to_journal else TerminalFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())


def _is_journal(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """``$JOURNAL_STREAM`` is device:inode of the socket; a redirected stderr is another file."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


class LimitedLog:
    """Messages that a peer or the kernel can cause at any rate: each ``key`` once per ``interval_s``.

    Of those left out only the number is kept, for at most ``max_keys`` keys; the longest unused key is forgotten first.
    """

    def __init__(self, log: logging.Logger, interval_s: float = 60.0, max_keys: int = 256) -> None:
        self._log = log
        self._interval_s = interval_s
        self._max_keys = max_keys
        self._seen: OrderedDict[str, list[float]] = OrderedDict()  # key: time of the last message, left out since

    def __len__(self) -> int:
        return len(self._seen)

    def warning(self, key: str, now: float, message: str, *args: Any) -> bool:
        return self.log(logging.WARNING, key, now, message, *args)

    def log(self, level: int, key: str, now: float, message: str, *args: Any) -> bool:
        """Log unless ``key`` was logged less than ``interval_s`` before ``now``; returns whether it was."""
        entry = self._seen.get(key)
        if entry is not None:
            self._seen.move_to_end(key)
            if now - entry[0] < self._interval_s:
                entry[1] += 1
                return False
        left_out = int(entry[1]) if entry is not None else 0
        self._seen[key] = [now, 0]
        if len(self._seen) > self._max_keys:
            self._seen.popitem(last=False)
        if left_out:
            message, args = message + " (and %d more since the last such message)", (*args, left_out)
        self._log.log(level, message, *args)
        return True
