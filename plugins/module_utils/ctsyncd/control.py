# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The control socket: one request and one response per connection.

Protocol (Unix stream socket, UTF-8): the client sends one JSON object on one line, ``{"command": "...", ...}``.  The
server answers with zero or more lines (text, XML or JSON, as asked for), then one last line, the trailer
``{"ok": true, "exit": 0}`` or ``{"ok": false, "error": "...", "exit": 1}``, and closes.  No trailer means that the
response is incomplete.

Handler: ``handler(request) -> dict | Iterable[bytes | None]``, called once the request line is complete.

* A dict is sent as one JSON line.
* An iterable gives the response in pieces, best of 4 to 64 KiB that end at a line's end; it is asked for the next piece
  only when the client has taken the last one, so a dump of any size costs one piece of memory.  ``b""`` means "nothing
  yet, I wait": the server asks again ``WAIT_S`` later.  ``None`` means "nothing to say, but I am working" (a part of
  the table without a match, say): it asks again as soon as the other sockets had their turn.  A generator is closed
  when its client goes away.
* :class:`ControlError`, at the call or from the iterable, becomes the trailer's error and exit status.  Any other
  exception is logged and becomes ``internal error``.

Loop: the owner registers the server with ``register(selector)``; every key has ``data=server``, so the loop calls
``key.data.handle(key, mask, now)``, and ``tick(now)`` once ``next_deadline()`` has come.  Nothing here blocks.  Times
are seconds on the caller's monotonic clock.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import selectors
import socket
import stat
import struct
import time
from typing import Any, Callable, Collection, Iterable, Iterator, Optional, Union

from .client import ControlError

LOG = logging.getLogger(__name__)

MAX_CLIENTS = 16
MAX_REQUEST_BYTES = 65_536
REQUEST_S = 5.0  # for the whole request line
STALL_S = 30.0  # without the client taking a byte
WAIT_S = 0.02  # between two looks at a handler that had nothing yet
PIECE_BYTES = 65_536  # pieces are gathered up to this size
TURN_BYTES = 262_144  # of one client per turn of the loop
TURN_S = 0.005  # of one client per turn of the loop

Response = Union["dict[str, Any]", Iterable[Optional[bytes]]]
Handler = Callable[["dict[str, Any]"], Response]


def trailer(error: str | None = None, exit: int = 0) -> bytes:
    """The last line of a response."""
    end: dict[str, Any] = {"ok": error is None, "exit": exit}
    if error is not None:
        end["error"] = error
    return json.dumps(end).encode() + b"\n"


class _Client:
    """One connection: first it sends (``pieces`` is None), then it receives."""

    def __init__(self, sock: socket.socket, uid: int, deadline: float) -> None:
        self.sock = sock
        self.uid = uid
        self.deadline = deadline
        self.request = bytearray()
        self.pieces: Iterator[bytes | None] | None = None
        self.source: Iterable[bytes | None] | None = None
        self.out = memoryview(b"")
        self.last = b"\n"  # the last byte of the response so far
        self.ended = False  # the trailer is in ``out``
        self.wait_s = 0.0  # how long the handler may be left alone
        self.wake_at: float | None = None  # the handler had nothing yet
        self.events = 0  # what the selector watches


class ControlServer:
    """The listening socket and its clients.  Raises :class:`ControlError` from ``open`` when it cannot listen.

    ``privileged``: commands that only root may ask for, not the daemon's own user.
    """

    def __init__(
        self, path: str, handler: Handler, max_clients: int = MAX_CLIENTS, privileged: Collection[str] = ()
    ) -> None:
        self.path = path
        self.handler = handler
        self.max_clients = max_clients
        self.privileged = privileged
        self.counters = {"requests": 0, "refused": 0, "dropped": 0, "failed": 0}
        self._listener: socket.socket | None = None
        self._identity = (0, 0)
        self._selector: selectors.BaseSelector | None = None
        self._clients: dict[int, _Client] = {}
        self._paused_until: float | None = None

    def __len__(self) -> int:
        return len(self._clients)

    def open(self) -> None:
        """Bind and listen, mode 0600.  A stale socket is replaced only if nobody answers on it."""
        self._clear_the_way()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            listener.bind(self.path)
            os.chmod(self.path, 0o600)  # before listen: until then nobody can connect, whatever the umask
            listener.listen(self.max_clients)
            status = os.stat(self.path, follow_symlinks=False)
        except OSError as error:
            listener.close()
            raise ControlError(
                f"control socket {self.path}: {error.strerror}: the directory must exist and be writable for the daemon"
            ) from error
        self._identity = (status.st_dev, status.st_ino)
        self._listener = listener

    def fileno(self) -> int:
        return -1 if self._listener is None else self._listener.fileno()

    def register(self, selector: selectors.BaseSelector) -> None:
        self._selector = selector
        if self._listener is not None:
            selector.register(self._listener, selectors.EVENT_READ, self)

    def handle(self, key: selectors.SelectorKey, mask: int, now: float) -> None:
        """Serve what the selector reported for one of our sockets."""
        if self._listener is not None and key.fd == self._listener.fileno():
            self._accept(now)
            return
        client = self._clients.get(key.fd)
        if client is None:
            return
        if client.pieces is None:
            self._receive(client, now)
        else:
            self._send(client, now)

    @property
    def busy(self) -> bool:
        """Is there anything for :meth:`tick` to do, now or later?"""
        return bool(self._clients) or self._paused_until is not None

    def next_deadline(self) -> float | None:
        """When ``tick`` wants to be called next."""
        if not self.busy:
            return None
        times = [client.deadline for client in self._clients.values()]
        times += [client.wake_at for client in self._clients.values() if client.wake_at is not None]
        if self._paused_until is not None:
            times.append(self._paused_until)
        return min(times) if times else None

    def tick(self, now: float) -> None:
        """Drop the clients whose time is up, ask the waiting handlers again."""
        if self._paused_until is not None and now >= self._paused_until:
            self._paused_until = None
            if self._selector is not None and self._listener is not None:
                self._selector.register(self._listener, selectors.EVENT_READ, self)
        for client in list(self._clients.values()):
            if client.wake_at is not None:
                if now >= client.wake_at:
                    client.wake_at = None
                    client.deadline = now + STALL_S  # the handler made it wait, not the client
                    self._send(client, now)
            elif now >= client.deadline:
                self.counters["dropped"] += 1
                LOG.info("control: client was too slow, dropped")
                self._drop(client)

    def close(self) -> None:
        """Close everything and remove our socket from the file system, unless it is another's by now."""
        for client in list(self._clients.values()):
            self._drop(client)
        if self._listener is None:
            return
        if self._selector is not None and self._paused_until is None:
            self._selector.unregister(self._listener)
        try:  # before the close: an open socket keeps its inode number from being used again
            status = os.stat(self.path, follow_symlinks=False)
            if (status.st_dev, status.st_ino) == self._identity:
                os.unlink(self.path)
        except FileNotFoundError:
            pass
        except OSError as error:
            LOG.warning("control: %s cannot be removed: %s", self.path, error.strerror)
        self._listener.close()
        self._listener = None

    def _clear_the_way(self) -> None:
        try:
            status = os.stat(self.path, follow_symlinks=False)
        except FileNotFoundError:
            return
        except OSError as error:
            raise ControlError(f"control socket {self.path}: {error.strerror}") from error
        if not stat.S_ISSOCK(status.st_mode):
            raise ControlError(f"control socket {self.path}: there is a file that is not a socket: remove it")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
            code = probe.connect_ex(self.path)
        if code == errno.ENOENT:
            return
        if code != errno.ECONNREFUSED:
            raise ControlError(
                f"control socket {self.path}: another ctsyncd answers on it: stop that one first (ctsyncd -k)"
                if code in (0, errno.EAGAIN)
                else f"control socket {self.path}: {os.strerror(code)}"
            )
        try:
            os.unlink(self.path)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise ControlError(f"control socket {self.path}: stale, and cannot be removed: {error.strerror}") from error

    def _accept(self, now: float) -> None:
        if self._listener is None:
            return
        for dummy in range(self.max_clients):
            try:
                sock, _address = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                # out of descriptors or memory: the connection stays in the backlog, so look away for a while
                LOG.warning("control: cannot accept: %s", error.strerror)
                if self._selector is not None:
                    self._selector.unregister(self._listener)
                    self._paused_until = now + 1.0
                return
            sock.setblocking(False)
            uid = _uid(sock)
            refusal = self._refusal(uid)
            if refusal is not None:
                self.counters["refused"] += 1
                try:
                    sock.send(trailer(refusal, 1))
                except OSError:
                    LOG.debug("control: a refused client did not wait for the reason")
                sock.close()
                continue
            client = _Client(sock, uid, now + REQUEST_S)
            self._clients[sock.fileno()] = client
            self._watch(client, selectors.EVENT_READ)
            self._receive(client, now)

    def _refusal(self, uid: int) -> str | None:
        """Why this connection is not served.  When the house is full, the oldest silent client makes room."""
        if uid not in (0, os.geteuid()):
            LOG.warning("control: refused a connection of uid %d", uid)
            return "permission denied: only root and the daemon's own user may ask"
        if len(self._clients) < self.max_clients:
            return None
        for client in self._clients.values():
            if client.pieces is None:
                self.counters["dropped"] += 1
                self._drop(client)
                return None
        return f"busy: {self.max_clients} requests are being served: try again"

    def _receive(self, client: _Client, now: float) -> None:
        """Read towards the end of the request line; then call the handler."""
        while True:
            try:
                data = client.sock.recv(MAX_REQUEST_BYTES)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                self._drop(client)
                return
            if not data:
                self._drop(client)
                return
            client.request += data
            end = client.request.find(b"\n")
            if end > MAX_REQUEST_BYTES or (end < 0 and len(client.request) > MAX_REQUEST_BYTES):
                self._refuse(client, f"the request is longer than {MAX_REQUEST_BYTES} bytes", now)
                return
            if end >= 0:
                break
        line = bytes(client.request[:end])
        client.request.clear()
        self._call(client, line, now)

    def _call(self, client: _Client, line: bytes, now: float) -> None:
        try:
            request = json.loads(line)
        except (ValueError, RecursionError):
            request = None
        if not isinstance(request, dict) or not isinstance(request.get("command"), str):
            self._refuse(client, 'the request is not a JSON object with "command" on one line', now)
            return
        if request["command"] in self.privileged and client.uid != 0:
            LOG.warning("control: refused %s of uid %d", request["command"], client.uid)
            self._refuse(client, f"permission denied: only root may ask for {request['command']}", now)
            return
        self.counters["requests"] += 1
        try:
            response = self.handler(request)
        except ControlError as error:
            self.counters["failed"] += 1
            self._answer(client, (), now, trailer(str(error), error.exit))
            return
        except Exception:  # one bad request must not end the replication
            self.counters["failed"] += 1
            LOG.exception("control: the handler of %r failed", request.get("command"))
            self._answer(client, (), now, trailer("internal error: see the daemon's log", 1))
            return
        if isinstance(response, dict):
            response = (json.dumps(response).encode() + b"\n",)
        self._answer(client, response, now)

    def _refuse(self, client: _Client, reason: str, now: float) -> None:
        self.counters["refused"] += 1
        self._answer(client, (), now, trailer(reason, 1))

    def _answer(self, client: _Client, response: Iterable[bytes | None], now: float, end: bytes | None = None) -> None:
        client.source = response
        client.pieces = iter(response)
        client.deadline = now + STALL_S
        if end is not None:
            client.out = memoryview(end)
            client.ended = True
        self._send(client, now)

    def _send(self, client: _Client, now: float) -> None:
        """Send until the client's buffer is full, its turn is over or the response is complete."""
        sent_bytes = 0
        turn_ends = time.monotonic() + TURN_S
        while True:
            if not client.out:
                if client.ended:
                    self._drop(client)
                    return
                client.out = memoryview(self._gather(client, turn_ends))
                if not client.out:
                    client.wake_at = now + client.wait_s
                    self._watch(client, 0)
                    return
            try:
                count = client.sock.send(client.out, socket.MSG_NOSIGNAL)
            except (BlockingIOError, InterruptedError):
                self._watch(client, selectors.EVENT_WRITE)
                return
            except OSError:
                self._drop(client)
                return
            client.out = client.out[count:]
            client.deadline = now + STALL_S
            sent_bytes += count
            finished = client.ended and not client.out
            if not finished and (sent_bytes >= TURN_BYTES or time.monotonic() >= turn_ends):
                self._watch(client, selectors.EVENT_WRITE)
                return

    def _gather(self, client: _Client, turn_ends: float) -> bytes:
        """The next pieces of the response, joined, with the trailer after the last one; empty: nothing yet."""
        pieces: list[bytes] = []
        size = 0
        if client.pieces is None:
            return b""
        client.wait_s = 0.0
        try:
            while size < PIECE_BYTES:
                piece = next(client.pieces)
                if piece:
                    pieces.append(piece)
                    size += len(piece)
                elif piece is not None:
                    client.wait_s = WAIT_S
                    break
                if time.monotonic() >= turn_ends:
                    break
            end = None
        except StopIteration:
            end = trailer()
        except ControlError as error:
            self.counters["failed"] += 1
            end = trailer(str(error), error.exit)
        except Exception:  # one bad request must not end the replication
            self.counters["failed"] += 1
            LOG.exception("control: a response broke off")
            end = trailer("internal error: see the daemon's log", 1)
        data = b"".join(pieces)
        if data:
            client.last = data[-1:]
        if end is not None:
            client.ended = True
            data += end if client.last == b"\n" else b"\n" + end
        return data

    def _watch(self, client: _Client, events: int) -> None:
        if self._selector is None or client.events == events:
            return
        if not events:
            self._selector.unregister(client.sock)
        elif client.events:
            self._selector.modify(client.sock, events, self)
        else:
            self._selector.register(client.sock, events, self)
        client.events = events

    def _drop(self, client: _Client) -> None:
        if self._clients.pop(client.sock.fileno(), None) is None:
            return
        self._watch(client, 0)
        client.sock.close()
        client.out = memoryview(b"")
        close = getattr(client.source, "close", None)
        if close is not None:
            try:
                close()
            except Exception:  # the client has gone, the daemon stays
                LOG.exception("control: a response could not be closed")


def _uid(sock: socket.socket) -> int:
    """Who is at the other end (unix(7), SO_PEERCRED)."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", raw)[1])
