# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The daemon's own errors, one root and one branch per party that can be at fault."""

from __future__ import annotations


class CtsyncError(Exception):
    """Root of the tree."""


class ConfigError(CtsyncError):
    """The operator's configuration is wrong.  ``problems`` holds every mistake found, one sentence each."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


class WireError(CtsyncError):
    """A peer's datagram or record is wrong.  ``kind`` is the label of the counter that it belongs to."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind


class NetlinkError(CtsyncError):
    """The kernel's message is malformed, or it refused a request with ``errno``."""

    def __init__(self, message: str, errno: int = 0) -> None:
        super().__init__(message)
        self.errno = errno
