# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What keepalived tells us (its notify FIFO) and what we tell keepalived (its track file).

Neither file is ours to make: systemd-tmpfiles makes both in a directory that outlives both daemons, because
keepalived goes deaf when that directory is removed and made anew.  Formats: keepalived.conf(5), ``notify_fifo`` and
``track_file``.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import selectors
import stat
from typing import Any, NamedTuple

LOG = logging.getLogger(__name__)

RETRY_S = 1.0  # between two attempts to open, and between two looks at whether the file was replaced
READ_BYTES = 65_536  # a whole pipe
LINE_BYTES = 512  # keepalived's names are short; a longer line is not keepalived's
TMPFILES_REMEDY = "run: systemd-tmpfiles --create /etc/tmpfiles.d/ctsync.conf"

STATES = frozenset(
    (
        "MASTER",
        "BACKUP",
        "FAULT",
        "STOP",
        "DELETED",
        "MASTER_RX_LOWER_PRI",
        "MASTER_PRIORITY",
        "BACKUP_PRIORITY",
    )
)
_LINE = re.compile(rb'(INSTANCE|GROUP) "([^"\x00-\x1f\x7f]{1,128})" ([A-Z_]{1,32})(?: ([0-9]{1,3}))?')


class Transition(NamedTuple):
    """One line of the FIFO.  ``kind`` is INSTANCE or GROUP; ``priority`` is 0 for a group."""

    kind: str
    name: str
    state: str
    priority: int


def parse_line(line: bytes) -> Transition | None:
    """A line of the FIFO without its newline; ``None`` if keepalived does not write such a line."""
    match = _LINE.fullmatch(line)
    if match is None:
        return None
    state = match[3].decode()
    if state not in STATES:
        return None
    return Transition(match[1].decode(), match[2].decode("utf-8", "replace"), state, int(match[4] or 0))


class FifoReader:
    """The reading end of keepalived's notify FIFO, non-blocking, alive across keepalived's restarts.

    Use: ``register(selector)``, ``open(now)``; when the selector names :attr:`fd`, call ``read()``; call ``tick(now)``
    when ``retry_at`` (always a time) has come.  The reader moves its registration itself when it reopens the file.
    ``problem`` says what is wrong, or is ``None``.  Times are seconds on the caller's monotonic clock.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.fd = -1
        self.problem: str | None = None
        self.retry_at = 0.0
        self.garbage = 0  # lines that keepalived would not write
        self.reopened = 0
        self._partial = b""
        self._skipping = False  # inside a line that is too long
        self._identity = (0, 0)
        self._selector: selectors.BaseSelector | None = None
        self._data: Any = None

    def fileno(self) -> int:
        return self.fd

    def register(self, selector: selectors.BaseSelector, data: Any = None) -> None:
        """Keep this reader registered for reading in ``selector`` with ``data`` (default: the reader)."""
        self._selector = selector
        self._data = self if data is None else data
        if self.fd >= 0:
            selector.register(self.fd, selectors.EVENT_READ, self._data)

    def open(self, now: float) -> bool:
        """Open the FIFO; ``False`` and :attr:`problem` when it is not there or is not a FIFO."""
        self.retry_at = now + RETRY_S
        return self._reopen()

    def tick(self, now: float) -> bool:
        """Open the FIFO if it is not open or was replaced by another.  Returns whether it is open."""
        if now < self.retry_at:
            return self.fd >= 0
        self.retry_at = now + RETRY_S
        if self.fd >= 0:
            try:
                status = os.stat(self.path, follow_symlinks=False)
            except OSError as error:
                # our end still works; a writer cannot find it any more
                self._report(f"{error.strerror}: {TMPFILES_REMEDY}, then restart keepalived")
                return True
            if (status.st_dev, status.st_ino) == self._identity:
                self._report(None)
                return True
        return self._reopen()

    def read(self) -> list[Transition]:
        """Everything that keepalived wrote, in order.  Never blocks and never raises for what is in the FIFO."""
        if self.fd < 0:
            return []
        try:
            data = os.read(self.fd, READ_BYTES)
        except (BlockingIOError, InterruptedError):
            return []
        except OSError as error:
            self._fail(f"cannot be read: {error.strerror}")
            return []
        if not data:
            # The last writer has gone, and poll(2) would say so again and again: a new end does not know of it.
            if self._partial or self._skipping:
                self.garbage += 1
            self._forget_line()
            self._reopen()
            return []
        return self._split(data)

    def close(self) -> None:
        self._unregister()
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1

    def _split(self, data: bytes) -> list[Transition]:
        found = []
        pieces = (self._partial + data).split(b"\n")
        self._partial = pieces.pop()
        for piece in pieces:
            transition = None if self._skipping else parse_line(piece)
            self._skipping = False
            if transition is not None:
                found.append(transition)
            else:
                self.garbage += 1
        if len(self._partial) > LINE_BYTES:
            self._partial = b""
            self._skipping = True
        return found

    def _forget_line(self) -> None:
        self._partial = b""
        self._skipping = False

    def _reopen(self) -> bool:
        """Open the new end before the old one is closed: a FIFO without any reader loses what is in it."""
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NOCTTY)
        except OSError as error:
            hint = f"it must be readable for the daemon: {TMPFILES_REMEDY}"
            self._fail("is a symbolic link" if error.errno == errno.ELOOP else f"{error.strerror}: {hint}")
            return False
        status = os.fstat(fd)
        if not stat.S_ISFIFO(status.st_mode):
            os.close(fd)
            self._fail(f"is not a FIFO: remove it and {TMPFILES_REMEDY}")
            return False
        identity = (status.st_dev, status.st_ino)
        if identity != self._identity:
            self._forget_line()
        if self.fd >= 0:
            self.close()
            self.reopened += 1
        self.fd = fd
        self._identity = identity
        self._report(None)
        if self._selector is not None:
            self._selector.register(fd, selectors.EVENT_READ, self._data)
        return True

    def _fail(self, what: str) -> None:
        self.close()
        self._forget_line()
        self._report(what)

    def _report(self, what: str | None) -> None:
        """Log a problem when it comes and when it goes, not at every attempt."""
        problem = None if what is None else f"notify FIFO {self.path}: {what}"
        if problem is not None and problem != self.problem:
            LOG.warning("%s", problem)
        elif problem is None and self.problem is not None:
            LOG.info("notify FIFO %s: in use again", self.path)
        self.problem = problem

    def _unregister(self) -> None:
        if self._selector is not None and self.fd >= 0:
            self._selector.unregister(self.fd)


class TrackFile:
    """The file whose number keepalived multiplies with a negative weight: 0 is ready, 1 and 2 are not (see
    :class:`readiness.Verdict`).

    keepalived acts on IN_CLOSE_WRITE and takes a missing or empty file for 0.  So each change opens, overwrites in
    place (never truncating first) and closes; the file is never renamed, made or removed.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.value: int | None = None  # what we know to be in the file
        self.problem: str | None = None
        self.errors = 0
        self._mark = (0, 0, 0)  # device, inode and time of the last change, after our own

    def write(self, value: int) -> bool:
        """Make the file say ``value``, if it does not already; ``False``, with :attr:`problem`, on failure.

        A file that was replaced or that somebody else wrote is written again.
        """
        if self.value == value and self._untouched():
            return True
        try:
            self._overwrite(b"%d\n" % value)
        except OSError as error:
            self.value = None
            self.errors += 1
            self.problem = f"track file {self.path}: {error.strerror or error}: {TMPFILES_REMEDY}"
            return False
        self.value = value
        self.problem = None
        return True

    def read(self) -> bool | None:
        """What the file says now: not ready?  ``None`` if it cannot be read."""
        try:
            with open(self.path, "rb") as stream:
                return stream.read(16).strip() != b"0"
        except OSError:
            return None

    def _untouched(self) -> bool:
        try:
            return _mark(os.stat(self.path, follow_symlinks=False)) == self._mark
        except OSError:
            return False

    def _overwrite(self, content: bytes) -> None:
        fd = os.open(self.path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise OSError(errno.EINVAL, "is not a regular file")
            if os.pwrite(fd, content, 0) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.ftruncate(fd, len(content))
            self._mark = _mark(os.fstat(fd))
        finally:
            os.close(fd)


def _mark(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_dev, status.st_ino, status.st_mtime_ns
