# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""An attacker on the sync link, with the peer's address: replication goes on, nothing of the attacker's gets in."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
from pathlib import Path
from typing import Any, Iterator

import pytest
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import crypto, session, wire
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import link as links
from integration.cluster import Cluster, Daemon
from integration.netns import Namespace, Pair, wait_for

pytestmark = pytest.mark.netns

PORT = 3781
PEER, VICTIM, FOREIGN = "192.168.100.1", "192.168.100.2", "192.168.100.77"
ROUNDS = 12
FRAGMENT = 1480  # bytes of a packet's payload that fit into a frame; a multiple of 8
EACH = 150  # datagrams of a kind in a round
CPU_S_EACH = 0.0005  # processor time per datagram, many times what one costs
MEMORY_KIB = 48 << 10

KINDS = {  # what the attacker sends: the counter that tells
    "foreign address": "dropped_foreign_address",
    "foreign port": "dropped_foreign_address",
    "short": "dropped_truncated",
    "oversized": "dropped_oversized",
    "other version": "dropped_wrong_version",
    "unknown kind": "dropped_malformed",
    "unknown key": "dropped_unknown_key",
    "forged hello": "dropped_auth_failed",
    "stranger's hello": "dropped_auth_failed",
    "forged data": "dropped_auth_failed",
    "altered": "dropped_auth_failed",
    "reflected": "dropped_unknown_session",
    "replayed": "dropped_replayed",
}


class Attacker:
    """Listens on the sync link and sends with any address."""

    def __init__(self, space: Namespace, stack: contextlib.ExitStack) -> None:
        with space.inside():
            self._ear = stack.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0003)))
            self._mouth = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW))
        self._ear.bind(("eth2", 0x0003))
        self._ear.setblocking(False)
        self.heard: list[bytes] = []  # the peer's to the victim
        self.answers: list[bytes] = []  # the victim's to the peer
        self.chance = random.Random(1)
        self._sent: set[bytes] = set()

    def listen(self) -> None:
        while True:
            try:
                packet = self._ear.recv(65536)
            except BlockingIOError:
                return
            if packet[0] != 0x45 or packet[9] != socket.IPPROTO_UDP or packet[22:24] != struct.pack("!H", PORT):
                continue
            if packet[6:8] not in (b"\0\0", b"\x40\0"):  # a fragment: the daemons make none
                continue
            if packet[12:16] == socket.inet_aton(PEER) and packet[28:] not in self._sent:
                self.heard.append(packet[28:])
            elif packet[12:16] == socket.inet_aton(VICTIM):
                self.answers.append(packet[28:])

    def send(self, payload: bytes, source: str = PEER, port: int = PORT) -> None:
        self._sent.add(payload)
        udp = struct.pack("!HHHH", port, PORT, 8 + len(payload), 0) + payload
        ident = self.chance.randrange(1, 1 << 16) if len(udp) > FRAGMENT else 0  # 0: the kernel chooses one
        for at in range(0, len(udp), FRAGMENT):
            part, more = udp[at : at + FRAGMENT], 0x2000 if at + FRAGMENT < len(udp) else 0
            head = struct.pack(
                *("!BBHHHBBH", 0x45, 0, 20 + len(part), ident, more | at >> 3, 64, socket.IPPROTO_UDP, 0),
            )
            self._mouth.sendto(head + socket.inet_aton(source) + socket.inet_aton(VICTIM) + part, (VICTIM, 0))

    def attack(self, kind: str) -> None:
        """One datagram."""
        chance = self.chance
        noise = chance.randbytes(chance.randrange(40, 1300))
        data = [datagram for datagram in self.heard if datagram[1] == wire.DATA]
        last = data[-1]
        number = struct.unpack_from("!Q", last, 12)[0]
        if kind == "foreign address":
            self.send(chance.choice(data), FOREIGN)
        elif kind == "foreign port":
            self.send(chance.choice(data), port=4000)
        elif kind == "short":
            self.send(noise[: chance.randrange(36)])
        elif kind == "oversized":  # of the peer, and going on
            self.send(chance.choice(data) + bytes(chance.randrange(links.MAX_DATAGRAM_BYTES, 12_000)))
        elif kind == "other version":
            self.send(bytes((wire.VERSION + 1,)) + noise)
        elif kind == "unknown kind":
            self.send(bytes((wire.VERSION, 7, 1, 0)) + noise)
        elif kind == "unknown key":
            self.send(wire.encode_header(wire.HELLO, 9, noise[:16], 0) + noise)
        elif kind == "forged hello":
            self.send(wire.encode_header(wire.HELLO, 1, noise[:16], 0) + noise)
        elif kind == "stranger's hello":
            self.send(chance.choice(STRANGERS))
        elif kind == "forged data":  # of the session, with a number to come: the victim has to try its key
            self.send(wire.encode_header(wire.DATA, 1, last[4:12] + bytes(8), number + 10**6) + noise)
        elif kind == "altered":
            place = chance.randrange(20, len(last))
            changed = last[:12] + struct.pack("!Q", number + 10**6) + last[20:place]
            self.send(changed + bytes((last[place] ^ 1,)) + last[place + 1 :])
        elif kind == "reflected":
            self.send(chance.choice([datagram for datagram in self.answers if datagram[1] == wire.DATA]))
        elif kind == "replayed":
            self.send(chance.choice(data[-900:-100] or data[:1]))


def _strangers() -> list[bytes]:
    """HELLOs as the peer would seal them, with another key."""
    out = []
    for number in range(20):
        one = session.Session(
            *("fw1", "fw2"),
            crypto=crypto.LibraryCrypto(),
            secrets={1: bytes((number,)) * 32},
            send_key=1,
            random=os.urandom,
            version="0",
        )
        out += one.poll(0.0)
    return out


STRANGERS = _strangers()


def used(daemon: Daemon) -> tuple[float, int]:
    """Processor time in seconds and the greatest resident memory in KiB so far."""
    assert daemon.process is not None
    home = Path("/proc", str(daemon.process.pid))
    fields = (home / "stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()
    high = (home / "status").read_text(encoding="ascii").split("VmHWM:")[1].split()[0]
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), int(high)


@pytest.fixture
def lab(pair: Pair, tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(pair, tmp_path)
    yield made.up()
    made.close()


def test_a_flood_on_the_sync_link_stops_nothing_and_gets_nothing_in(lab: Cluster) -> None:
    attacker = Attacker(lab.pair.fw1, lab.stack)
    sessions = [lab.session()]
    lab.replicated(lab.fw1, lab.fw2)

    def heard_enough() -> bool:
        attacker.listen()
        return len(attacker.heard) > 20 and len(attacker.answers) > 5

    wait_for(heard_enough, "the daemons to talk")
    before = counters(lab.fw2)
    cpu, memory = used(lab.fw2)
    for _round in range(ROUNDS):
        for kind in KINDS:
            for _dummy in range(EACH):
                attacker.attack(kind)
        sessions.append(lab.session())
        sessions[-1].talk()
        attacker.listen()
    count = ROUNDS * EACH * len(KINDS)
    lab.replicated(lab.fw1, lab.fw2)  # the new sessions got through meanwhile
    for counter in set(KINDS.values()):
        wait_for(lambda counter=counter: counters(lab.fw2).get(counter, 0) > before.get(counter, 0), counter)
    after = counters(lab.fw2)
    dropped = sum(after.get(name, 0) - before.get(name, 0) for name in set(KINDS.values()))
    assert dropped > count // 10  # most of the flood was looked at, not lost in a full socket
    cpu_now, memory_now = used(lab.fw2)
    assert memory_now - memory < MEMORY_KIB
    assert cpu_now - cpu < 2 + count * CPU_S_EACH
    assert after["sessions"] == before["sessions"]  # no handshake was started anew
    assert after.get("records_malformed", 0) == 0
    lab.ready(lab.fw1, lab.fw2)
    wait_for(lab.fw1.equal, "equal tables", 120.0)
    assert len(lab.fw2.ask("-e").splitlines()) == len(sessions)
    lab.power_cut(lab.fw1, lab.fw2)
    for one in sessions:
        one.talk()


def counters(daemon: Daemon) -> dict[str, Any]:
    found: dict[str, Any] = daemon.status()["counters"]
    return found
