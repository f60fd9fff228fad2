# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Files of a host: look at them, replace them in one step, put them back.

Private to this collection.  Every function raises :class:`OSError` as the kernel reports it.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from typing import Callable, NamedTuple, Optional


class Snapshot(NamedTuple):
    """What is at a path.  ``content`` is ``None`` when nothing is there; ``kind`` is the ``S_IFMT`` part."""

    content: Optional[bytes] = None
    kind: int = 0
    mode: int = 0
    uid: int = 0
    gid: int = 0

    @property
    def exists(self) -> bool:
        return self.kind != 0


class Wanted(NamedTuple):
    """A regular file as it should be.  ``uid`` and ``gid`` are ``None`` while the account does not exist yet."""

    path: str
    content: bytes
    mode: int
    uid: Optional[int] = 0
    gid: Optional[int] = 0

    def matches(self, found: Snapshot) -> bool:
        wanted = (self.content, stat.S_IFREG, self.mode, self.uid, self.gid)
        return (found.content, found.kind, found.mode, found.uid, found.gid) == wanted


def look(path: str) -> Snapshot:
    """The state of ``path``, symbolic links not followed; a link's ``content`` is its target."""
    try:
        status = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return Snapshot()
    kind = stat.S_IFMT(status.st_mode)
    content = b""
    if kind == stat.S_IFREG:
        with open(path, "rb") as stream:
            content = stream.read()
    elif kind == stat.S_IFLNK:
        content = os.fsencode(os.readlink(path))
    return Snapshot(content, kind, stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid)


def sync_directory(path: str) -> None:
    """Make renames in the directory ``path`` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write(
    path: str, content: bytes, mode: int, *, uid: int = 0, gid: int = 0, label: Optional[Callable[[str], object]] = None
) -> None:
    """Replace ``path`` in one step.

    Owner and mode are right before the first byte is written, so that no secret is ever readable by others.
    ``label`` may set a security context on the new file's temporary name.
    """
    folder = os.path.dirname(path)
    descriptor, temporary = tempfile.mkstemp(prefix=".ctsync-", dir=folder)  # 0600
    try:
        with os.fdopen(descriptor, "wb") as stream:
            os.fchown(stream.fileno(), uid, gid)
            os.fchmod(stream.fileno(), mode)
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        if label is not None:
            label(temporary)
        os.rename(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    sync_directory(folder)


def link(path: str, target: str) -> None:
    """Make ``path`` a symbolic link to ``target`` in one step, whatever file or link it was before."""
    folder = os.path.dirname(path)
    temporary = os.path.join(folder, f".{os.path.basename(path)}.ctsync-{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    os.symlink(target, temporary)
    try:
        os.rename(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    sync_directory(folder)


def remove(path: str) -> bool:
    """Remove a file or link; ``False`` when there was none."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    return True


def remove_empty_directory(path: str) -> bool:
    """Remove a directory if nothing is in it; ``False`` when it stays or was not there."""
    try:
        os.rmdir(path)
    except OSError:
        return False
    return True


def restore(path: str, earlier: Snapshot, label: Optional[Callable[[str], object]] = None) -> None:
    """Bring back a regular file or link that :func:`look` saw, or its absence."""
    if not earlier.exists:
        remove(path)
    elif earlier.kind == stat.S_IFLNK:
        link(path, os.fsdecode(earlier.content or b""))
    elif earlier.kind == stat.S_IFREG:
        write(path, earlier.content or b"", earlier.mode, uid=earlier.uid, gid=earlier.gid, label=label)
