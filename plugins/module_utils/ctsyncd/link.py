# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A sync link: one UDP socket, bound to its interface and address, that knows the addresses of the peers."""

from __future__ import annotations

import collections
import errno
import fcntl
import logging
import socket
import struct
from collections.abc import Sequence

from .paths import IPV4_BYTES, IPV6_BYTES

LOG = logging.getLogger(__name__)

SO_BINDTODEVICE = 25  # <asm-generic/socket.h>
SO_SNDBUFFORCE = 32
SO_RCVBUFFORCE = 33
IP_FREEBIND = 15  # <linux/in.h>
IPV6_FREEBIND = 78  # <linux/in6.h>
IP_MTU_DISCOVER = 10
IPV6_MTU_DISCOVER = 23
PMTUDISC_PROBE = 3  # always "don't fragment", and no word of ICMP is believed
SIOCGIFMTU = 0x8921  # <linux/sockios.h>
_IFREQ = struct.Struct("16si20x")  # <linux/if.h>: name, MTU
SOCKET_BUFFER_BYTES = 8 << 20  # a window of the longest blocks, as the kernel counts memory
MAX_DATAGRAM_BYTES = 9216
RETRY_S = 1.0
MAX_QUEUE = 1024  # datagrams that wait for a full socket; the session sends again what is dropped here

_NOT_OPEN = -1


class Link:
    """The socket, opened again by :meth:`tick` while it cannot be.

    ``problem`` says why it is not open, or is empty; ``refused`` why the kernel did not take the last datagram;
    ``payload`` is the longest datagram in bytes that the interface takes, 0 while that is not known.  Peers are
    numbered as in ``peers``, the list of their addresses.  Datagrams of others, and those of more than
    MAX_DATAGRAM_BYTES, are dropped and counted.
    """

    def __init__(self, interface: str, address: str, port: int, peers: Sequence[str]) -> None:
        self.interface = interface
        self.problem = "the sync socket is not open yet"
        self.counters: collections.Counter[str] = collections.Counter()
        self.retry_at = 0.0
        self.read_at = 0.0  # for the caller, as the next ones
        self.several = False  # datagrams were there then
        self.watched = 0
        self.refused = ""
        self.payload = 0
        self.told = 0  # of it, for the caller
        self.told_usable = True
        self._local = (address, port)
        self._peers = [(peer, port) for peer in peers]
        self._numbers = {peer: number for number, peer in enumerate(self._peers)}
        self._family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._sock: socket.socket | None = None
        self._queue: collections.deque[tuple[int, bytes]] = collections.deque(maxlen=MAX_QUEUE)
        self._asked = _IFREQ.pack(interface.encode(), 0)

    def fileno(self) -> int:
        return self._sock.fileno() if self._sock is not None else _NOT_OPEN

    @property
    def is_open(self) -> bool:
        return self._sock is not None

    @property
    def usable(self) -> bool:
        """Is it open, and takes what is sent?"""
        return self._sock is not None and not self.refused

    def open(self, now: float) -> bool:
        """Open the socket; False, with ``problem`` and ``retry_at`` set, where it cannot be."""
        self.retry_at = now + RETRY_S
        sock = socket.socket(self._family, socket.SOCK_DGRAM)
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, SO_BINDTODEVICE, self.interface.encode() + b"\0")
            self._grow(sock, SO_RCVBUFFORCE, socket.SO_RCVBUF)
            self._grow(sock, SO_SNDBUFFORCE, socket.SO_SNDBUF)  # a window at once, without waiting for the wire
            if self._family == socket.AF_INET:
                sock.setsockopt(socket.IPPROTO_IP, IP_FREEBIND, 1)
                sock.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, PMTUDISC_PROBE)
            else:
                sock.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
                sock.setsockopt(socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER, PMTUDISC_PROBE)
            sock.bind(self._local)
        except OSError as error:
            sock.close()
            self.problem = f"sync link {self.interface}: {error.strerror}: check the interface and address of link"
            return False
        self._sock = sock
        self.problem = self.refused = ""
        self.look()
        return True

    def look(self) -> None:
        """How long a datagram does the interface take now?"""
        if self._sock is None:
            return
        try:
            answer = fcntl.ioctl(self._sock.fileno(), SIOCGIFMTU, self._asked)
        except OSError:
            return
        self.payload = _IFREQ.unpack(answer)[1] - (IPV4_BYTES if self._family == socket.AF_INET else IPV6_BYTES)

    @staticmethod
    def _grow(sock: socket.socket, *options: int) -> None:
        for option in options:
            try:
                sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)
                return
            except PermissionError:
                continue

    def receive(self, limit: int) -> list[tuple[int, bytes]]:
        """At most ``limit`` datagrams that peers sent, and the number of the peer, without waiting."""
        out: list[tuple[int, bytes]] = []
        if self._sock is None:
            return out
        for dummy in range(limit):
            try:
                data, sender = self._sock.recvfrom(MAX_DATAGRAM_BYTES + 1)  # a longer one is cut to that
            except BlockingIOError:
                break
            except OSError as error:  # an ICMP error about what was sent before, or the interface went away
                self.counters["receive_errors"] += 1
                if error.errno in (errno.ENODEV, errno.EBADF):
                    self._lose(error)
                    break
                continue
            number = self._numbers.get(sender[:2])
            if number is None:
                self.counters["dropped_foreign_address"] += 1
                continue
            if len(data) > MAX_DATAGRAM_BYTES:
                self.counters["dropped_oversized"] += 1
                continue
            self.counters["bytes_received"] += len(data)
            out.append((number, data))
        return out

    def send(self, number: int, datagrams: Sequence[bytes]) -> None:
        """Send to this peer; what a full socket does not take waits, bounded, for the next call."""
        for datagram in datagrams:
            self._queue.append((number, datagram))
        self.flush()

    def flush(self) -> None:
        """Send what waits."""
        if self._sock is None:
            self.counters["send_errors"] += len(self._queue)
            self._queue.clear()
            return
        while self._queue:
            try:
                number, datagram = self._queue[0]
                self._sock.sendto(datagram, self._peers[number])
                if self.refused:
                    self.refused = ""
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                if error.errno in (errno.ENODEV, errno.EBADF):
                    self.counters["send_errors"] += 1
                    self._lose(error)
                    return
                self._refuse(error)
            self._queue.popleft()

    def _refuse(self, error: OSError) -> None:
        if error.errno == errno.EMSGSIZE:  # the interface takes less than a moment ago
            self.counters["send_too_long"] += 1
            self.look()
            return
        self.counters["send_errors"] += 1
        if error.errno not in (errno.ENOBUFS, errno.ECONNREFUSED):
            self.refused = error.strerror or "refused"

    @property
    def waiting(self) -> bool:
        """Datagrams wait for room in the socket."""
        return bool(self._queue)

    def _lose(self, error: OSError) -> None:
        self.problem = f"sync link {self.interface}: {error.strerror}"
        self.close()

    def close(self) -> None:
        self._queue.clear()
        if self._sock is not None:
            self._sock.close()
            self._sock = None
