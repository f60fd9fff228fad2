# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The sync link goes through here: a program in a namespace of its own that carries frames between two interfaces, and
loses, doubles, delays, reorders, alters and repeats them as told.

``relay.py SEED``; the interfaces are ``fw1`` and ``fw2``.  Commands are JSON objects, one a line on stdin: fields of
:class:`Weather`, the others are back at their defaults; each is answered by a line with the counters so far.

Frames pass with their virtio header (PACKET_VNET_HDR, packet(7)), so that checksums and segments that the sender left
to its interface stay as they are.  What is altered therefore arrives with a good checksum: only the seal can tell.
"""

from __future__ import annotations

import collections
import contextlib
import heapq
import json
import os
import random
import select
import socket
import sys
import time
from typing import NamedTuple

ETH_P_ALL = 0x0003
SOL_PACKET = 263  # <linux/socket.h>
PACKET_VNET_HDR = 15  # <linux/if_packet.h>
PACKET_IGNORE_OUTGOING = 23
VNET_HEADER = 10  # struct virtio_net_hdr
ETHER_HEADER = 14
FRAME_BYTES = 70_000
HEADERS = VNET_HEADER + ETHER_HEADER + 20 + 8  # of a UDP datagram over IPv4
PORT = 3781
FULL = 1500  # bytes of the longest IPv4 packet on the link
KEPT = 500  # frames that may be repeated
QUEUE_BYTES = 256 << 10  # of a narrow link; what is more is lost
SIDES = ("fw1", "fw2")


class Weather(NamedTuple):
    """What happens to frames.  Shares of all of them; ``deaf``: nodes that nothing gets to; ``frame_bytes``: longest
    frame that passes, without its link header, 0: any; ``bits_per_s``: 0: any."""

    loss: float = 0.0
    duplicate: float = 0.0
    corrupt: float = 0.0
    replay: float = 0.0  # an old frame is sent once more
    noise: float = 0.0  # a datagram of random bytes from the peer's address goes along
    oversize: float = 0.0  # the same, longer than any that the daemons send: the frame is full
    reflect: float = 0.0  # the sender gets its own datagram, as if from the peer
    delay_ms: float = 0.0
    jitter_ms: float = 0.0  # random, so it reorders
    bits_per_s: int = 0
    frame_bytes: int = 0
    deaf: tuple[str, ...] = ()


class Fate:
    """Decides; pure but for the clock that is given."""

    def __init__(self, seed: int) -> None:
        self.weather = Weather()
        self.counters: collections.Counter[str] = collections.Counter()
        self._chance = random.Random(seed)
        self._old: dict[str, collections.deque[bytes]] = {side: collections.deque(maxlen=KEPT) for side in SIDES}
        self._free_at = {side: 0.0 for side in SIDES}  # when the narrow link has sent all so far

    def of(self, frame: bytes, to: str, now: float) -> list[tuple[float, str, bytes]]:
        """When what leaves, and towards whom: ``to``, or where the frame came from."""
        weather, chance = self.weather, self._chance
        self.counters["frames"] += 1
        if to in weather.deaf:
            return self._drop("cut off")
        if weather.frame_bytes and len(frame) - VNET_HEADER - ETHER_HEADER > weather.frame_bytes:
            return self._drop("too long")
        sync = _is_sync(frame)
        if sync:
            self._old[to].append(frame)
        if chance.random() < weather.loss:
            return self._drop("lost")
        out = [frame]
        if sync and chance.random() < weather.corrupt:
            out = [self._altered(frame, HEADERS)]
            self.counters["altered"] += 1
        if chance.random() < weather.duplicate:
            out *= 2
            self.counters["doubled"] += 1
        if sync and chance.random() < weather.replay:
            out.append(chance.choice(self._old[to]))
            self.counters["repeated"] += 1
        if sync and chance.random() < weather.noise:
            out.append(frame[:HEADERS] + chance.randbytes(len(frame) - HEADERS))
            self.counters["noise"] += 1
        if sync and weather.oversize and chance.random() < weather.oversize:
            out.append(_full(frame, chance))
            self.counters["oversized"] += 1
        leaves = [(to, one) for one in out]
        if sync and weather.reflect and chance.random() < weather.reflect:
            leaves.append((SIDES[to == SIDES[0]], _mirrored(frame)))
            self.counters["reflected"] += 1
        return [(at, way, one) for way, one in leaves if (at := self._when(one, way, now)) is not None]

    def _drop(self, why: str) -> list[tuple[float, str, bytes]]:
        self.counters[why] += 1
        return []

    def _altered(self, frame: bytes, start: int) -> bytes:
        place = self._chance.randrange(start, len(frame))
        return frame[:place] + bytes((frame[place] ^ 1 << self._chance.randrange(8),)) + frame[place + 1 :]

    def _when(self, frame: bytes, to: str, now: float) -> float | None:
        weather = self.weather
        at = now
        if weather.bits_per_s:
            busy = max(0.0, self._free_at[to] - now)
            if busy * weather.bits_per_s / 8 > QUEUE_BYTES:
                self.counters["queue full"] += 1
                return None
            at = self._free_at[to] = now + busy + len(frame) * 8 / weather.bits_per_s
        return at + (weather.delay_ms + weather.jitter_ms * self._chance.random()) / 1000


def _is_sync(frame: bytes) -> bool:
    """A datagram of the daemons: IPv4 without options, UDP to their port."""
    packet = frame[VNET_HEADER + ETHER_HEADER :]
    return (
        len(packet) > 28
        and frame[VNET_HEADER + 12 : VNET_HEADER + 14] == b"\x08\x00"
        and packet[0] == 0x45
        and packet[9] == socket.IPPROTO_UDP
        and packet[22:24] == PORT.to_bytes(2, "big")
    )


def _mirrored(frame: bytes) -> bytes:
    """Ends exchanged, of the link and of IPv4; both ports are the same.  No checksum changes by that."""
    start = VNET_HEADER
    ip = start + ETHER_HEADER
    ends = frame[start + 6 : start + 12] + frame[start : start + 6] + frame[start + 12 : ip + 12]
    return frame[:start] + ends + frame[ip + 16 : ip + 20] + frame[ip + 12 : ip + 16] + frame[ip + 20 :]


def _full(frame: bytes, chance: random.Random) -> bytes:
    """A datagram between the same ends that fills a frame with random bytes; without a UDP checksum (RFC 768)."""
    start = VNET_HEADER + ETHER_HEADER
    header = bytearray(frame[start : start + 20])
    header[2:4] = FULL.to_bytes(2, "big")
    header[10:12] = bytes(2)
    total = sum(header[place] << 8 | header[place + 1] for place in range(0, 20, 2))
    total = (total & 0xFFFF) + (total >> 16)
    header[10:12] = (~(total + (total >> 16)) & 0xFFFF).to_bytes(2, "big")
    udp = frame[start + 20 : start + 24] + (FULL - 20).to_bytes(2, "big") + bytes(2)
    return bytes(VNET_HEADER) + frame[VNET_HEADER:start] + bytes(header) + udp + chance.randbytes(FULL - 28)


class Relay:
    """The loop."""

    def __init__(self, seed: int) -> None:
        self.fate = Fate(seed)
        self._waiting: list[tuple[float, int, str, bytes]] = []
        self._number = 0
        self._socks = {}
        for side in SIDES:
            sock = self._socks[side] = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
            sock.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
            sock.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
            with contextlib.suppress(PermissionError):
                sock.setsockopt(socket.SOL_SOCKET, 33, 8 << 20)  # SO_RCVBUFFORCE
            sock.bind((side, ETH_P_ALL))
            sock.setblocking(False)

    def run(self) -> None:
        poll = select.poll()
        poll.register(0, select.POLLIN)
        others = {}
        for side, other in (SIDES, SIDES[::-1]):
            poll.register(self._socks[side].fileno(), select.POLLIN)
            others[self._socks[side].fileno()] = (self._socks[side], other)
        rest = b""
        while True:
            now = time.monotonic()
            while self._waiting and self._waiting[0][0] <= now:
                _at, _number, to, frame = heapq.heappop(self._waiting)
                self._send(to, frame)
            wait = None if not self._waiting else max(0.0, self._waiting[0][0] - now) * 1000 + 1
            for fd, _mask in poll.poll(wait):
                if fd:
                    self._carry(*others[fd])
                    continue
                data = os.read(0, 65536)
                if not data:
                    return
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    self._command(line)

    def _command(self, line: bytes) -> None:
        values = json.loads(line)
        if "deaf" in values:
            values["deaf"] = tuple(values["deaf"])
        self.fate.weather = Weather(**values)
        sys.stdout.write(json.dumps(self.fate.counters) + "\n")
        sys.stdout.flush()

    def _carry(self, sock: socket.socket, to: str) -> None:
        for dummy in range(100):
            try:
                frame = sock.recv(FRAME_BYTES)
            except OSError:  # nothing more; or the interface went down
                return
            now = time.monotonic()
            for at, way, one in self.fate.of(frame, to, now):
                if at <= now:
                    self._send(way, one)
                else:
                    self._number += 1
                    heapq.heappush(self._waiting, (at, self._number, way, one))

    def _send(self, to: str, frame: bytes) -> None:
        try:
            self._socks[to].send(frame)
        except OSError as error:  # the interface is down, or its queue is full: lost, as on a wire
            self.fate.counters[f"not sent: {error.strerror}"] += 1


if __name__ == "__main__":
    Relay(int(sys.argv[1])).run()
