# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Conversations over every protocol that a firewall tracks: TCP, UDP, SCTP, echo, GRE and one without a tracker.

What the kernel has no sockets for goes through raw ones.  Each stream knows from where its server hears it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from integration.netns import Namespace

EXPERIMENTAL = 253  # RFC 3692: a protocol for experiments; the kernel has no tracker for it
RESEND_S = 0.3

_ECHO = {4: (socket.IPPROTO_ICMP, 8, 0), 6: (socket.IPPROTO_ICMPV6, 128, 129)}  # protocol, request, reply
_FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}


class End(NamedTuple):
    """One end of a stream: where its socket is and its address; port 0: any."""

    space: Namespace
    address: str
    port: int = 0


class Died(Exception):
    """A stream does not go on."""


class Stream:
    """Question and answer, again and again.

    ``seen``: the client's address and its port, as the server sees them (ICMP: the id; protocols without: 0).
    """

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client = client
        self.server = server
        self.seen: tuple[str, int] | None = None
        self._number = 0

    @property
    def port(self) -> int:
        """The client's own port (ICMP: the id; protocols without: 0)."""
        return int(self.client.getsockname()[1])

    def word(self) -> bytes:
        """What was never said before in this stream, and in no other."""
        self._number += 1
        return b"%d %d." % (id(self), self._number)

    def talk(self, patience: float = 20.0) -> None:
        """A question and its answer within ``patience`` seconds; :class:`Died` says what went wrong."""
        raise NotImplementedError

    def close(self) -> None:
        self.client.close()
        self.server.close()


class Connection(Stream):
    """TCP."""

    def __init__(self, client: socket.socket, server: socket.socket, seen: tuple[str, int]) -> None:
        super().__init__(client, server)
        self.seen = seen

    @classmethod
    def open(cls, client: End, target: tuple[str, int], server: End) -> Connection:
        with server.space.listen(server.address, server.port) as listener:
            with client.space.inside():
                near = socket.create_connection(target, timeout=20)
            far, seen = listener.accept()
        return cls(near, far, seen[:2])

    def talk(self, patience: float = 20.0) -> None:
        for sender, receiver in ((self.client, self.server), (self.server, self.client)):
            word, got = self.word(), b""
            sender.settimeout(patience)
            receiver.settimeout(patience)
            try:
                sender.sendall(word)
                while len(got) < len(word):
                    part = receiver.recv(len(word) - len(got))
                    if not part:
                        raise Died("closed")
                    got += part
            except OSError as error:
                raise Died(str(error)) from error
            if got != word:
                raise Died(f"{word!r} arrived as {got!r}")


class Frame:
    """How a word travels in a datagram; as it is."""

    answered_by_kernel = False

    def pack(self, word: bytes, *, reply: bool) -> bytes:
        return word

    def unpack(self, data: bytes, *, reply: bool) -> bytes:
        """The word; empty if this is none of this direction."""
        return data

    def source(self, data: bytes) -> int:
        """The source port, or what stands for it."""
        return 0


class Gre(Frame):
    """RFC 2784: version 0, an Ethertype for experiments.  ``keys``: RFC 2890, that of the client and the server's."""

    def __init__(self, *keys: int) -> None:
        flags = 0x2000 if keys else 0
        self._heads = [struct.pack(f"!HH{len(key)}I", flags, 0x88B5, *key) for key in (keys[:1], keys[1:2])]

    def pack(self, word: bytes, *, reply: bool) -> bytes:
        return self._heads[reply] + word

    def unpack(self, data: bytes, *, reply: bool) -> bytes:
        head = self._heads[reply]
        return data[len(head) :] if data.startswith(head) else b""


class Echo(Frame):
    """RFC 792, RFC 4443.  The server's kernel answers; its raw socket only looks on."""

    answered_by_kernel = True

    def __init__(self, version: int, ident: int) -> None:
        self.ident = ident
        self._version = version
        self._kinds = _ECHO[version][1:]

    def pack(self, word: bytes, *, reply: bool) -> bytes:
        body = struct.pack("!HH", self.ident, 1) + word + bytes(len(word) % 2)
        head = struct.pack("!BBH", self._kinds[reply], 0, 0)
        if self._version == 4:  # the kernel fills in the checksum of ICMPv6 only
            total = sum(struct.unpack(f"!{(4 + len(body)) // 2}H", head + body))
            total = (total & 0xFFFF) + (total >> 16)
            head = struct.pack("!BBH", self._kinds[reply], 0, ~(total + (total >> 16)) & 0xFFFF)
        return head + body

    def unpack(self, data: bytes, *, reply: bool) -> bytes:
        if data[0] != self._kinds[reply] or (reply and self.source(data) != self.ident):
            return b""
        return data[8:].rstrip(b"\0")

    def source(self, data: bytes) -> int:
        return int.from_bytes(data[4:6], "big")


class Sctp(Frame):
    """RFC 9260, as much as a tracker wants to see: the association's begin, verification tags, checksums."""

    DATA, INIT, INIT_ACK, COOKIE_ECHO, COOKIE_ACK = 0, 1, 2, 10, 11

    def __init__(self, port: int, target: int, service: int) -> None:
        self._ports = ((port, target), (service, port))  # as the client and the server write them
        self._tags = (0x5EC0_0001 + port, 0x5EC0_8001 + port)  # what the client and the server want to be addressed by

    @property
    def port(self) -> int:
        return self._ports[0][0]

    def chunk(self, kind: int, value: bytes, *, reply: bool) -> bytes:
        """A packet with one chunk."""
        tag = 0 if kind == self.INIT else self._tags[not reply]
        body = struct.pack("!BBH", kind, 3 if kind == self.DATA else 0, 4 + len(value)) + value + bytes(-len(value) % 4)
        head = struct.pack("!HHI", *self._ports[reply], tag)
        return head + struct.pack("<I", _crc32c(head + bytes(4) + body)) + body

    def opening(self, *, reply: bool) -> list[bytes]:
        """What one side says to open the association."""
        init = struct.pack("!IIHHI", self._tags[reply], 1 << 16, 1, 1, 1)
        cookie = b"a cookie"
        if reply:
            parameter = struct.pack("!HH", 7, 4 + len(cookie)) + cookie
            return [
                self.chunk(self.INIT_ACK, init + parameter, reply=True),
                self.chunk(self.COOKIE_ACK, b"", reply=True),
            ]
        return [self.chunk(self.INIT, init, reply=False), self.chunk(self.COOKIE_ECHO, cookie, reply=False)]

    def pack(self, word: bytes, *, reply: bool) -> bytes:
        return self.chunk(self.DATA, struct.pack("!IHHI", 1, 0, 0, 0) + word, reply=reply)

    def unpack(self, data: bytes, *, reply: bool) -> bytes:
        if len(data) < 28 or data[12] != self.DATA or _crc32c(data[:8] + bytes(4) + data[12:]) != _checksum(data):
            return b""
        return data[28 : 12 + int.from_bytes(data[14:16], "big")]

    def source(self, data: bytes) -> int:
        return int.from_bytes(data[:2], "big")


def _checksum(packet: bytes) -> int:
    return int.from_bytes(packet[8:12], "little")


def _crc32c(data: bytes) -> int:
    """RFC 9260, appendix A."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _bit in range(8):
            crc = crc >> 1 ^ 0x82F63B78 * (crc & 1)
    return crc ^ 0xFFFFFFFF


class Datagrams(Stream):
    """Everything else; a datagram that gets lost is sent again."""

    def __init__(self, client: socket.socket, server: socket.socket, frame: Frame) -> None:
        super().__init__(client, server)
        self.frame = frame
        self.raw = client.type == socket.SOCK_RAW
        self._from: tuple[str, int] = ("", 0)  # where answers go
        for sock in (client, server):
            sock.setblocking(False)

    @classmethod
    def open(cls, proto: int, frame: Frame, client: End, target: tuple[str, int], server: End) -> Datagrams:
        family = socket.AF_INET6 if ":" in target[0] else socket.AF_INET
        kind = socket.SOCK_DGRAM if proto == socket.IPPROTO_UDP else socket.SOCK_RAW
        sockets = []
        for end in (client, server):
            with end.space.inside():
                sockets.append(socket.socket(family, kind, proto))
            sockets[-1].bind((end.address, end.port if kind == socket.SOCK_DGRAM else 0))
        near, far = sockets
        near.connect(target if kind == socket.SOCK_DGRAM else (target[0], 0))
        made = cls(near, far, frame)
        if isinstance(frame, Sctp):
            made._associate(frame)
        return made

    @property
    def port(self) -> int:
        return getattr(self.frame, "ident", 0) or getattr(self.frame, "port", 0) or (0 if self.raw else super().port)

    def talk(self, patience: float = 20.0) -> None:
        deadline = time.monotonic() + patience
        word = self.word()
        question, answer = (self.frame.pack(word, reply=reply) for reply in (False, True))
        while True:
            self._send(self.client, question)
            heard = self._hear(self.server, word, reply=False)
            if heard is not None:
                self._note(*heard)
                if not self.frame.answered_by_kernel:
                    self._send(self.server, answer, self._from)
                if self._hear(self.client, word, reply=True) is not None:
                    return
            if time.monotonic() > deadline:
                raise Died(f"no {'question' if heard is None else 'answer'} arrives")

    def _note(self, data: bytes, sender: tuple[str, int]) -> None:
        """From where the server hears the client; it must not change."""
        seen = (sender[0], self.frame.source(data) if self.raw else sender[1])
        if self.seen not in (None, seen):
            raise Died(f"the server sees {seen} in place of {self.seen}")
        self.seen, self._from = seen, sender

    def _send(self, sock: socket.socket, data: bytes, *address: tuple[str, int]) -> None:
        try:
            sock.sendto(data, *address) if address else sock.send(data)
        except OSError as error:  # an ICMP error that came in, or no room
            if error.errno not in (
                errno.ECONNREFUSED,
                errno.EHOSTUNREACH,
                errno.ENOPROTOOPT,
                errno.EPROTO,
                errno.EAGAIN,
            ):
                raise

    def _hear(self, sock: socket.socket, word: bytes, *, reply: bool) -> tuple[bytes, tuple[str, int]] | None:
        for data, sender in self._packets(sock):
            if self.frame.unpack(data, reply=reply) == word:
                return data, sender
        return None

    def _packets(self, sock: socket.socket) -> Iterator[tuple[bytes, tuple[str, int]]]:
        deadline = time.monotonic() + RESEND_S
        while select.select([sock], [], [], max(0.0, deadline - time.monotonic()))[0]:
            with contextlib.suppress(OSError):
                data, sender = sock.recvfrom(4096)
                if self.raw and sock.family == socket.AF_INET:
                    data = data[(data[0] & 15) * 4 :]
                yield data, (sender[0], sender[1])

    def _associate(self, frame: Sctp) -> None:
        for question, answer in zip(frame.opening(reply=False), frame.opening(reply=True)):
            self._send(self.client, question)
            for data, sender in self._packets(self.server):
                if data == question or data[12:] == question[12:]:
                    self._note(data, sender)
                    break
            else:
                raise Died("the association does not begin")
            self._send(self.server, answer, self._from)
            if not any(data[12:] == answer[12:] for data, _sender in self._packets(self.client)):
                raise Died("the association is not answered")


def open_stream(proto: str, number: int, client: End, target: tuple[str, int], server: End) -> Stream:
    """``target``: where the client sends to.  ``number``: tells echo streams and associations apart."""
    if proto == "tcp":
        return Connection.open(client, target, server)
    version = 6 if ":" in target[0] else 4
    frame, protocol = Frame(), EXPERIMENTAL
    if proto == "udp":
        protocol = socket.IPPROTO_UDP
    elif proto == "icmp":
        frame, protocol = Echo(version, 20_000 + number), _ECHO[version][0]
    elif proto == "sctp":
        frame, protocol = Sctp(30_000 + number, target[1], server.port), socket.IPPROTO_SCTP
    elif proto == "gre":
        frame, protocol = Gre(), socket.IPPROTO_GRE
    return Datagrams.open(protocol, frame, client, target, server)


class Transfer:
    """Bytes both ways over a connection at the same time until told to stop: all of them must arrive."""

    PAUSE_S = 0.005  # per block: leaves the processor to others

    def __init__(self, stream: Connection) -> None:
        self.received = [0, 0]  # bytes at the server, at the client
        self.trouble: list[str] = []
        self._sums = [[0, 0], [0, 0]]  # sent and received, by direction
        self._stop = threading.Event()
        self._threads = []
        for way, (sender, receiver) in enumerate(
            ((stream.client, stream.server), (stream.server, stream.client)),
        ):
            sender.settimeout(30)
            for target, sock in ((self._send, sender), (self._receive, receiver)):
                self._threads.append(threading.Thread(target=target, args=(way, sock)))
        for thread in self._threads:
            thread.start()

    def _send(self, way: int, sock: socket.socket) -> None:
        try:
            while not self._stop.wait(self.PAUSE_S):
                block = os.urandom(1 << 17)
                sock.sendall(block)
                self._sums[way][0] = zlib.crc32(block, self._sums[way][0])
            sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            self.trouble.append(str(error))

    def _receive(self, way: int, sock: socket.socket) -> None:
        try:
            while part := sock.recv(1 << 20):
                self.received[way] += len(part)
                self._sums[way][1] = zlib.crc32(part, self._sums[way][1])
        except OSError as error:
            self.trouble.append(str(error))

    def finish(self) -> None:
        """Stop; raises :class:`Died` if not everything arrived as it was sent."""
        self._stop.set()
        for thread in self._threads:
            thread.join()
        if self.trouble or any(sent != received for sent, received in self._sums):
            raise Died(f"{self.trouble or 'other bytes arrived than were sent'}")


def window_scales(sock: socket.socket) -> tuple[int, int]:
    """The scale of the windows that this end announces, and of its peer's (struct tcp_info)."""
    scales = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 8)[6]
    return scales >> 4, scales & 15
