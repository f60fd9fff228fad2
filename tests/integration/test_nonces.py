# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What an eavesdropper on the sync link sees of real daemons that are killed and started again and again.

The header of a datagram names its key (sender, kind, nonce) and its packet number: no pair may come twice.  What that
means for snapshots of virtual machines is in the unit tests (``test_snapshots.py``).
"""

from __future__ import annotations

import collections
import os
import socket
import struct
from pathlib import Path
from typing import Callable

import pytest
from integration.cluster import Cluster
from integration.netns import Namespace, wait_for

pytestmark = pytest.mark.netns

PORT = 3781
HELLO = 1

FORGETFUL = """\
import os

_left = iter(range(1 << 30))


def urandom(size):
    return next(_left).to_bytes(size, "big")


os.urandom = urandom
"""


class Ear:
    """Counts datagrams on the sync link by key (sender, kind and key id, nonce) and packet number."""

    def __init__(self, space: Namespace) -> None:
        with space.inside():
            self._sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0003))  # ETH_P_ALL
        self._sock.bind(("eth2", 0x0003))
        self._sock.setblocking(False)
        self.seen: collections.Counter[tuple[bytes, ...]] = collections.Counter()

    def listen(self) -> None:
        while True:
            try:
                packet = self._sock.recv(65536)
            except BlockingIOError:
                return
            head = (packet[0] & 15) * 4
            if packet[0] >> 4 != 4 or packet[9] != socket.IPPROTO_UDP:
                continue
            if packet[head + 2 : head + 4] != struct.pack("!H", PORT):
                continue
            payload = packet[head + 8 :]
            end = 4 + (16 if payload[1] == HELLO else 8)
            self.seen[packet[12:16], payload[1:3], payload[4:end], payload[end : end + 8]] += 1

    def twice(self) -> list[tuple[bytes, ...]]:
        return [one for one, count in self.seen.items() if count > 1]

    def nonces(self) -> set[tuple[bytes, ...]]:
        return {one[:3] for one in self.seen}

    def close(self) -> None:
        self._sock.close()


@pytest.fixture
def restarted(cluster: Callable[..., Cluster]) -> Callable[[Path | None], Ear]:
    """Has the pair under way and kills its daemons in turn; ``patch``: a directory of fw2's Python path."""

    def run(patch: Path | None) -> Ear:
        lab = cluster()
        if patch is not None:
            lab.fw2.environment["PYTHONPATH"] += os.pathsep + str(patch)
        ear = Ear(lab.pair.fw1)
        lab.stack.callback(ear.close)
        lab.up()
        for number in range(3):
            ear.listen()
            daemon = (lab.fw1, lab.fw2)[number % 2]
            sessions = ear.nonces()
            daemon.kill()
            lab.session().talk()
            daemon.start()
            wait_for(lambda d=daemon: d.status()["role"], "the daemon to run")
            lab.ready(lab.fw1, lab.fw2)
            lab.replicated(lab.fw1, lab.fw2)
            ear.listen()
            assert ear.nonces() != sessions
        return ear

    return run


def test_no_key_and_number_come_twice(restarted: Callable[[Path | None], Ear]) -> None:
    ear = restarted(None)
    assert len({one[:2] for one in ear.nonces()}) == 4  # both kinds of both nodes
    assert len(ear.nonces()) >= 2 * (1 + 3)
    assert len(ear.seen) > 2 * len(ear.nonces())  # several datagrams under a key
    assert ear.twice() == []


def test_a_node_whose_random_bytes_repeat_is_found_out(restarted: Callable[[Path | None], Ear], tmp_path: Path) -> None:
    """The negative control."""
    patch = tmp_path / "patch"
    patch.mkdir()
    (patch / "sitecustomize.py").write_text(FORGETFUL, encoding="ascii")
    assert restarted(patch).twice()
