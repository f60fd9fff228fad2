# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Thousands of sessions of mixed kinds between two namespaces: a program for each side, told what to do on stdin.

``traffic.py client PLAN`` and ``traffic.py server PLAN``: PLAN is a JSON object, see :class:`Plan`.  Commands and
answers are JSON objects, one a line.  A session is proved alive by a round trip that the client begins and, for TCP and
UDP, by one that the server begins.  The server says in every answer from which address and port it sees the session.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import selectors
import socket
import struct
import sys
import time
from typing import Any, Callable, NamedTuple

TCP_PORT = 7001
UDP_PORT = 7002
CHURN_PORT = 7003
FIRST_PORT = 10_000
FIRST_ECHO_ID = 1_000

REQUEST = 1  # client to server
ANSWER = 2  # its echo, with what the server sees
PUSH = 3  # server to client
PUSHED = 4  # its echo
MESSAGE = struct.Struct("!BxHII16s")  # kind, port seen, session, sequence number, address seen

TICK_S = 0.05
RETRY_S = 1.0  # of datagrams
SLICE = 100  # sends between two looks at what arrived
CONNECTING = 100  # at once

# Of 20 sessions: how many of which kind.  A period of 0 is silence from one proof to the next.
MIX = (
    ("tcp busy", 3, "tcp", 4, 2.0),
    ("tcp slow", 2, "tcp", 4, 10.0),
    ("tcp idle", 5, "tcp", 4, 0.0),
    ("tcp6 busy", 1, "tcp", 6, 2.0),
    ("tcp6 idle", 1, "tcp", 6, 0.0),
    ("udp busy", 1, "udp", 4, 2.0),
    ("udp slow", 3, "udp", 4, 15.0),  # silent for half of the kernel's timeout
    ("udp6 busy", 1, "udp", 6, 2.0),
    ("icmp", 2, "icmp", 4, 5.0),
    ("icmp6", 1, "icmp", 6, 5.0),
)


class Plan(NamedTuple):
    """``sources``: IPv4 addresses of the client, used in turn with the same ports, so that SNAT must change one."""

    sessions: int
    sources: list[str]
    source6: str
    server: str
    server6: str


class Session:
    """One session, as either side knows it."""

    __slots__ = ("back", "buffer", "family", "kind", "number", "proto", "seen", "sequence", "sock", "trouble", "want")

    def __init__(self, number: int, kind: str = "", proto: str = "", family: int = 4) -> None:
        self.number = number
        self.kind = kind
        self.proto = proto
        self.family = family
        self.sock: Any = None
        self.buffer = b""
        self.sequence = 0
        self.want = 0  # the sequence number that has to come back
        self.back = 0  # the highest that came back
        self.seen: Any = None  # address and port that the server saw
        self.trouble = ""

    @property
    def proved(self) -> bool:
        return self.back >= self.want


class Side:
    """What both sides share: the loop, the commands, framing."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.sessions: dict[int, Session] = {}
        self.selector = selectors.EpollSelector()
        self.stopping = False
        self._stdin = b""
        os.set_blocking(0, False)
        self.selector.register(0, selectors.EVENT_READ, self._commands)
        self._queue: collections.deque[Session] = collections.deque()
        self._retry_at = 0.0
        self._until = 0.0
        self._proving: list[Session] | None = None

    def run(self) -> None:
        tick = time.monotonic()
        while not self.stopping:
            now = time.monotonic()
            busy = bool(self._queue)
            for key, _mask in self.selector.select(0 if busy else max(0.0, tick - now)):
                key.data()
            for dummy in range(min(SLICE, len(self._queue))):
                self.speak(self._queue.popleft())
            now = time.monotonic()
            if now >= tick:
                tick = now + TICK_S
                self.tick(now)
                self._tick_proof(now)

    def _commands(self) -> None:
        data = os.read(0, 65536)
        if not data:
            self.stopping = True
        *lines, self._stdin = (self._stdin + data).split(b"\n")
        for line in lines:
            command = json.loads(line)
            getattr(self, "do_" + command.pop("do"))(**command)

    @staticmethod
    def answer(**values: Any) -> None:
        sys.stdout.write(json.dumps(values) + "\n")
        sys.stdout.flush()

    def datagram_socket(self, family: int, kind: int, proto: int, address: tuple[str, int], reader: Any) -> Any:
        made = socket.socket(family, kind, proto)
        with contextlib.suppress(PermissionError):
            made.setsockopt(socket.SOL_SOCKET, 33, 16 << 20)  # SO_RCVBUFFORCE
        made.bind(address)
        made.setblocking(False)
        self.selector.register(made, selectors.EVENT_READ, lambda: reader(made))
        return made

    # --- proof -------------------------------------------------------------------------------------------------------

    def prove(self, sessions: list[Session], deadline: float) -> None:
        """Speak in all these sessions and see which answer; the result is this command's answer."""
        for session in sessions:
            session.sequence += 1
            session.want = session.sequence
            self._queue.append(session)
        now = time.monotonic()
        self._proving, self._retry_at, self._until = sessions, now + RETRY_S, now + deadline

    def _tick_proof(self, now: float) -> None:
        if self._proving is None:
            return
        missing = [session for session in self._proving if not session.proved and not session.trouble]
        if not missing or now >= self._until:
            bad = {}
            for session in self._proving:
                if session.trouble or not session.proved:
                    bad[f"{session.number} {session.kind or session.proto}"] = session.trouble or "no answer"
            self.answer(proved=len(self._proving) - len(bad), lost=bad)
            self._proving = None
        elif now >= self._retry_at and not self._queue:
            self._retry_at = now + RETRY_S
            self._queue.extend(session for session in missing if session.proto != "tcp")

    def read_stream(self, session: Session, take: Callable[[Session, Any], None]) -> None:
        try:
            data = session.sock.recv(4096)
        except BlockingIOError:
            return
        except OSError as error:
            self.broken(session, error.strerror or str(error))
            return
        if not data:
            self.broken(session, "closed")
            return
        data = session.buffer + data
        end = len(data) - len(data) % MESSAGE.size
        session.buffer = data[end:]
        for message in MESSAGE.iter_unpack(data[:end]):
            take(session, message)

    def broken(self, session: Session, why: str) -> None:
        session.trouble = why
        self.selector.unregister(session.sock)
        session.sock.close()

    def speak(self, session: Session) -> None:
        raise NotImplementedError

    def tick(self, now: float) -> None:
        raise NotImplementedError


def _packed(address: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address).ljust(16, b"\0")


def _checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


class Client(Side):
    """Opens the sessions and speaks in each as its kind does."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self._opening: collections.deque[Session] = collections.deque()
        self._connecting = 0
        self._waiting_to_open = False
        self._talking = False
        self._rounds: dict[str, tuple[list[Session], float, list[float]]] = {}
        self._churn = 0.0
        self._churn_due = 0.0
        self._short: dict[socket.socket, float] = {}
        self.short_done = 0
        self._make()

    def _make(self) -> None:
        pattern = [entry for entry in MIX for dummy in range(entry[1])]
        raw4 = []
        for source in self.plan.sources:
            raw4.append(
                self.datagram_socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP, (source, 0), self._read_echo)
            )
        raw6 = self.datagram_socket(
            socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6, (self.plan.source6, 0), self._read_echo
        )
        count: collections.Counter[tuple[str, int]] = collections.Counter()
        for number in range(self.plan.sessions):
            kind, _share, proto, family, _period = pattern[number % len(pattern)]
            session = self.sessions[number] = Session(number, kind, proto, family)
            place = count[proto, family]
            count[proto, family] += 1
            sources = self.plan.sources if family == 4 else [self.plan.source6]
            turn, source = place // len(sources), sources[place % len(sources)]
            if proto == "icmp":
                session.sock = (raw4[place % len(sources)] if family == 4 else raw6, FIRST_ECHO_ID + turn)
            else:
                session.sock = (source, FIRST_PORT + turn)
        for kind, _share, _proto, _family, period in MIX:
            if period:
                mine = [session for session in self.sessions.values() if session.kind == kind]
                self._rounds[kind] = (mine, period, [0.0, 0])

    # --- commands ----------------------------------------------------------------------------------------------------

    def do_open(self) -> None:
        """Open every session; the answer comes when each has had its first round trip."""
        self._opening.extend(self.sessions.values())
        self._waiting_to_open = True

    def do_talk(self, on: bool, churn: float = 0.0) -> None:
        """Speak as each kind does, and open and close ``churn`` more connections each second."""
        self._talking, self._churn = on, churn
        self.answer(talking=on, short_connections=self.short_done)

    def do_prove(self, deadline: float, part: str) -> None:
        """``part``: all, or those in which the server does not speak first."""
        self.prove(
            [s for s in self.sessions.values() if part == "all" or s.proto == "icmp" or s.number % 2 == 0], deadline
        )

    # --- speaking ----------------------------------------------------------------------------------------------------

    def speak(self, session: Session) -> None:
        message = MESSAGE.pack(REQUEST, 0, session.number, session.sequence, b"")
        if session.trouble:
            return
        try:
            if session.proto == "icmp":
                raw, ident = session.sock
                kind, server = (8, self.plan.server) if session.family == 4 else (128, self.plan.server6)
                echo = struct.pack("!HH", ident, session.sequence & 0xFFFF) + message
                head = struct.pack("!BB", kind, 0)
                checksum = _checksum(head + b"\0\0" + echo) if session.family == 4 else 0
                raw.sendto(head + struct.pack("!H", checksum) + echo, (server, 0))
            else:
                session.sock.send(message)
        except BlockingIOError:
            pass
        except OSError as error:
            if session.proto == "tcp":
                self.broken(session, error.strerror or str(error))
            elif session.proto == "udp":  # an ICMP error: told once, the next datagram may pass
                session.trouble = "" if isinstance(error, ConnectionRefusedError) else str(error)

    def tick(self, now: float) -> None:
        while self._opening and self._connecting < CONNECTING:
            self._open(self._opening.popleft())
        if self._waiting_to_open and not self._opening and not self._connecting:
            self._waiting_to_open = False
            self.prove(list(self.sessions.values()), 120.0)
        if self._talking:
            for sessions, period, state in self._rounds.values():
                due = state[0] + len(sessions) * TICK_S / period
                state[0] = due % 1
                for dummy in range(int(due)):
                    session = sessions[int(state[1]) % len(sessions)]
                    state[1] += 1
                    session.sequence += 1
                    self._queue.append(session)
        self._tick_short(now)

    def _open(self, session: Session) -> None:
        if session.proto == "icmp":
            return
        family = socket.AF_INET if session.family == 4 else socket.AF_INET6
        server = self.plan.server if session.family == 4 else self.plan.server6
        source = session.sock
        if session.proto == "udp":
            sock = session.sock = socket.socket(family, socket.SOCK_DGRAM)
            sock.bind(source)
            sock.connect((server, UDP_PORT))
            sock.setblocking(False)
            self.selector.register(sock, selectors.EVENT_READ, lambda: self._read_datagram(session))
            return
        sock = session.sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.bind(source)
        sock.setblocking(False)
        sock.connect_ex((server, TCP_PORT))
        self._connecting += 1
        self.selector.register(sock, selectors.EVENT_WRITE, lambda: self._connected(session))

    def _connected(self, session: Session) -> None:
        self._connecting -= 1
        number = session.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number:
            self.broken(session, os.strerror(number))
        else:
            self.selector.modify(
                session.sock, selectors.EVENT_READ, lambda: self.read_stream(session, self._take_of_stream)
            )
        if self._opening:
            self._open(self._opening.popleft())

    # --- what comes back ---------------------------------------------------------------------------------------------

    def _take_of_stream(self, session: Session, message: Any) -> None:
        self._take(message, session)

    def _take(self, message: Any, session: Session) -> None:
        kind, port, number, sequence, address = message
        if kind == PUSH:
            with contextlib.suppress(OSError):
                session.sock.send(MESSAGE.pack(PUSHED, 0, number, sequence, b""))
        elif kind == ANSWER:
            if number != session.number:
                session.trouble = f"the answer belongs to session {number}"
            elif session.seen is None:
                session.seen = (address, port)
            elif session.seen != (address, port):
                session.trouble = f"the server sees port {port} in place of {session.seen[1]}"
            session.back = max(session.back, sequence)

    def _read_datagram(self, session: Session) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionRefusedError):
            while True:
                self._take(MESSAGE.unpack(session.sock.recv(100)), session)

    def _read_echo(self, raw: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            for dummy in range(500):
                data = raw.recv(2048)
                if raw.family == socket.AF_INET:
                    data = data[(data[0] & 15) * 4 :]
                if data[0] not in (0, 129) or len(data) != 8 + MESSAGE.size:
                    continue
                _kind, _port, number, sequence, _address = MESSAGE.unpack_from(data, 8)
                session = self.sessions.get(number)
                if session is None or session.proto != "icmp":
                    continue
                if struct.unpack_from("!H", data, 4)[0] != session.sock[1]:
                    session.trouble = "the answer came with another echo id"
                session.back = max(session.back, sequence)

    # --- short connections -------------------------------------------------------------------------------------------

    def _tick_short(self, now: float) -> None:
        for sock in [sock for sock, since in self._short.items() if now - since > 5]:
            self._end_short(sock)
        self._churn_due += self._churn * TICK_S
        while self._churn_due >= 1:
            self._churn_due -= 1
            if len(self._short) < 500:
                sock = socket.socket()
                sock.setblocking(False)
                sock.connect_ex((self.plan.server, CHURN_PORT))
                self._short[sock] = now
                self.selector.register(sock, selectors.EVENT_READ, lambda sock=sock: self._read_short(sock))

    def _read_short(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            if sock.recv(100):
                self.short_done += 1
        self._end_short(sock)

    def _end_short(self, sock: socket.socket) -> None:
        del self._short[sock]
        self.selector.unregister(sock)
        sock.close()


class Server(Side):
    """Echoes; knows from where each session comes."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self._anonymous: set[Session] = set()  # accepted, and not a word yet
        self._echo_ids: dict[int, set[int]] = collections.defaultdict(set)
        self._echo_sources: set[str] = set()
        self._listeners = []
        self._udp = {}
        for family, host in ((socket.AF_INET, plan.server), (socket.AF_INET6, plan.server6)):
            for port, accept in ((TCP_PORT, self._accept), (CHURN_PORT, self._accept_short)):
                listener = socket.create_server((host, port), family=family, backlog=4096)
                listener.setblocking(False)
                self.selector.register(
                    listener, selectors.EVENT_READ, lambda listener=listener, accept=accept: accept(listener)
                )
                self._listeners.append(listener)
            self._udp[4 if family == socket.AF_INET else 6] = self.datagram_socket(
                family, socket.SOCK_DGRAM, 0, (host, UDP_PORT), self._read_datagrams
            )
            proto = socket.IPPROTO_ICMP if family == socket.AF_INET else socket.IPPROTO_ICMPV6
            self.datagram_socket(family, socket.SOCK_RAW, proto, (host, 0), self._see_echo)
        self.answer(listening=True)

    def tick(self, now: float) -> None:
        pass

    def do_prove(self, deadline: float) -> None:
        """Speak first in every other session of TCP and UDP."""
        self.prove([s for s in self.sessions.values() if s.number % 2], deadline)

    def do_echo_ids(self) -> None:
        """Echo streams whose id, as seen here, was not always the same."""
        changed = {number: sorted(ids) for number, ids in self._echo_ids.items() if len(ids) > 1}
        self.answer(streams=len(self._echo_ids), changed=changed)

    def do_translated(self) -> None:
        """How many sessions come from another port than the client's (SNAT had to choose one); from where all come."""
        ports = [s.seen[1] for s in self.sessions.values() if s.family == 4]
        expected = len(ports) // len(self.plan.sources) + 1 + FIRST_PORT
        chosen = sum(not FIRST_PORT <= port < expected for port in ports)
        sources = self._echo_sources | {session.seen[0] for session in self.sessions.values()}
        self.answer(sessions=len(ports), translated=chosen, sources=sorted(sources))

    def speak(self, session: Session) -> None:
        message = MESSAGE.pack(PUSH, 0, session.number, session.sequence, b"")
        try:
            if session.proto == "udp":
                self._udp[session.family].sendto(message, session.seen[:2])
            elif not session.trouble:
                session.sock.send(message)
        except BlockingIOError:
            pass
        except OSError as error:
            if session.proto == "tcp":
                self.broken(session, error.strerror or str(error))

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                sock, peer = listener.accept()
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                session = Session(-1, proto="tcp", family=4 if listener.family == socket.AF_INET else 6)
                session.sock, session.seen = sock, peer[:2]
                self.selector.register(
                    sock, selectors.EVENT_READ, lambda session=session: self.read_stream(session, self._take)
                )

    def _accept_short(self, listener: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                sock, _peer = listener.accept()
                with contextlib.suppress(OSError):
                    sock.send(b"hello")
                sock.close()

    def _take(self, session: Session, message: Any) -> None:
        kind, _port, number, sequence, _address = message
        if session.number < 0:
            session.number = number
            self.sessions[number] = session
        if kind == PUSHED:
            session.back = max(session.back, sequence)
            return
        try:
            session.sock.send(MESSAGE.pack(ANSWER, session.seen[1], number, sequence, _packed(session.seen[0])))
        except OSError as error:
            self.broken(session, error.strerror or str(error))

    def _read_datagrams(self, sock: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            for dummy in range(500):
                data, peer = sock.recvfrom(100)
                kind, _port, number, sequence, _address = MESSAGE.unpack(data)
                session = self.sessions.get(number)
                if session is None:
                    session = self.sessions[number] = Session(
                        number, proto="udp", family=4 if sock.family == socket.AF_INET else 6
                    )
                    session.seen = peer[:2]
                if session.seen != peer[:2]:
                    session.trouble = f"came from port {peer[1]}, before from {session.seen[1]}"
                if kind == PUSHED:
                    session.back = max(session.back, sequence)
                else:
                    sock.sendto(MESSAGE.pack(ANSWER, peer[1], number, sequence, _packed(peer[0])), peer)

    def _see_echo(self, raw: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            for dummy in range(500):
                data, peer = raw.recvfrom(2048)
                if raw.family == socket.AF_INET:
                    data = data[(data[0] & 15) * 4 :]
                if data[0] in (8, 128) and len(data) == 8 + MESSAGE.size:
                    self._echo_sources.add(peer[0])
                    self._echo_ids[MESSAGE.unpack_from(data, 8)[2]].add(struct.unpack_from("!H", data, 4)[0])


if __name__ == "__main__":
    {"client": Client, "server": Server}[sys.argv[1]](Plan(**json.loads(sys.argv[2]))).run()
