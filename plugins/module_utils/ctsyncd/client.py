# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The other side of the control socket: ask a running daemon (protocol: :mod:`control`).

Commands such as ``-c`` are imported, and compiled, anew each time they are typed: so this room imports little.
"""

from __future__ import annotations

import json
import socket
from typing import Any, Iterator

from .errors import CtsyncError

DEFAULT_PATH = "/etc/ctsyncd/ctsyncd.conf"
MAX_CONFIG_BYTES = 1 << 20  # a configuration is a few hundred bytes; more is a mistake
RECEIVE_BYTES = 65_536


class ControlError(CtsyncError):
    """A request that fails.  ``exit`` is the exit status of the command that asked."""

    def __init__(self, message: str, exit: int = 1) -> None:
        super().__init__(message)
        self.exit = exit


def request(path: str, message: dict[str, Any], timeout_s: float = 30.0) -> Iterator[str]:
    """Ask the daemon at ``path``; yields the response's lines without their newlines, as they come.

    ``timeout_s`` bounds the silence, not the whole response.  :class:`ControlError` when the daemon cannot be asked,
    breaks off, or reports a failure (then with its exit status).
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout_s)
        try:
            sock.connect(path)
            sock.sendall(json.dumps(message).encode() + b"\n")
        except (FileNotFoundError, ConnectionRefusedError) as error:
            what = f"no {path}" if isinstance(error, FileNotFoundError) else f"nobody answers on {path}"
            raise ControlError(f"ctsyncd is not running ({what}): systemctl start ctsyncd") from error
        except PermissionError as error:
            raise ControlError(f"permission denied on {path}: run this as root") from error
        except socket.timeout as error:
            raise ControlError(f"ctsyncd does not answer on {path} within {timeout_s:g} s: see its log") from error
        except BrokenPipeError:
            pass  # it answered before it had read everything
        except OSError as error:
            raise ControlError(f"cannot ask ctsyncd on {path}: {error.strerror or error}") from error
        yield from _lines(sock, path, timeout_s)


def _lines(sock: socket.socket, path: str, timeout_s: float) -> Iterator[str]:
    """The response's lines; the last one is held back, for it is the trailer."""
    held: bytes | None = None
    rest = b""
    while True:
        try:
            data = sock.recv(RECEIVE_BYTES)
        except socket.timeout as error:
            raise ControlError(f"ctsyncd does not answer on {path} within {timeout_s:g} s: see its log") from error
        except ConnectionResetError:
            data = b""  # it closed with some of our request unread; the trailer, if any, has been read
        except OSError as error:
            raise ControlError(f"ctsyncd broke off: {error.strerror or error}") from error
        if not data:
            break
        lines = (rest + data).split(b"\n")
        rest = lines.pop()
        for line in lines:
            if held is not None:
                yield held.decode("utf-8", "replace")
            held = line
    try:
        end = json.loads(held) if held is not None and not rest else None
    except (ValueError, RecursionError):
        end = None
    if not isinstance(end, dict) or not isinstance(end.get("ok"), bool) or not isinstance(end.get("exit"), int):
        raise ControlError("the answer of ctsyncd is incomplete: it was stopped meanwhile, or dropped us for slowness")
    if not end["ok"]:
        raise ControlError(str(end.get("error", "failed without a reason")), end["exit"])
