# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Nodes that begin anew, and nodes that go on from a state of the past: a virtual machine restored from a snapshot.

A restart makes fresh keys.  A snapshot has the keys in it: the node goes on sending with packet numbers that it used
before, and neither node notices.  Those tests are expected to fail; the last one shows what helps.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.crypto import Aead, LibraryCrypto
from unit.simulation import Node, Simulation, tcp

NOT_YET = "a session does not notice that it was restored from a snapshot"


class Ledger:
    """The real cryptography; ``reused`` counts the pairs of key and nonce that sealed two different datagrams."""

    def __init__(self) -> None:
        self._library = LibraryCrypto()
        self._sealed: dict[tuple[bytes, ...], tuple[bytes, bytes]] = {}
        self.reused = 0

    def derive(self, secret: bytes, salt: bytes, info: bytes) -> Aead:
        ledger, inner = self, self._library.derive(secret, salt, info)

        class Noting:
            def seal(self, nonce: bytes, plaintext: bytes, header: bytes) -> bytes:
                datagram = (plaintext, header)
                ledger.reused += ledger._sealed.setdefault((secret, salt, info, nonce), datagram) != datagram
                return inner.seal(nonce, plaintext, header)

            def open(self, nonce: bytes, sealed: bytes, header: bytes) -> bytes:
                return inner.open(nonce, sealed, header)

        return Noting()


def site(crypto: Any = None) -> Simulation:
    """Both nodes with twenty flows."""
    made = Simulation()
    if crypto is not None:
        made.crypto = crypto
    made.start()
    for port in range(2000, 2020):
        made.fw1.kernel.open(tcp(port))
    made.converge(made.fw1, made.fw2)
    return made


def snapshot(made: Simulation, name: str) -> Node:
    """The node's memory.  The ledger is the test's, and the operating system's random bytes go on."""
    node = made.nodes[name]
    outside = (made.crypto, made.chance, made.settings, node._make)
    return copy.deepcopy(node, {id(thing): thing for thing in outside})


def restore(made: Simulation, name: str, image: Node) -> None:
    made.nodes[name] = image
    setattr(made, name, image)


def go_back(made: Simulation, name: str, flows: int, peer_restarts: bool = False) -> None:
    """Take a snapshot, go on while ``flows`` begin, one a second; then the node is as it was."""
    image = snapshot(made, name)
    if peer_restarts:
        peer = made.fw2 if name == "fw1" else made.fw1
        peer.kill()
        peer.start(made.now)
    for port in range(3000, 3000 + flows):
        made.fw1.kernel.open(tcp(port))
        made.run(1.0)
    restore(made, name, image)


def test_no_nonce_is_used_twice_over_restarts() -> None:
    """Configuration and key files are the same each time; the ledger of the simulation raises at the first reuse."""
    made = site()
    sealed = len(made.crypto.sealed)
    for number in range(12):
        victims = {0: (made.fw1,), 1: (made.fw2,), 2: (made.fw1, made.fw2)}[number % 3]
        for node in victims:
            node.kill()
        made.fw1.kernel.open(tcp(3000 + number))
        made.run(0.3)
        for node in victims:
            node.start(made.now)
        made.converge(made.fw1, made.fw2)
    assert len(made.crypto.sealed) > sealed
    salts = {use[1] for use in made.crypto.sealed}
    assert len(salts) >= 12 * 2


def test_a_node_whose_random_bytes_repeat_is_found_out() -> None:
    """The negative control of the ledger."""
    made = site()
    made.chance.seed(0)  # as at the beginning of the simulation
    made.fw1.kill()
    with pytest.raises(AssertionError, match="used twice with one key"):
        made.fw1.start(made.now)
        made.run(1.0)


@pytest.mark.xfail(strict=True, reason=NOT_YET)
@pytest.mark.parametrize("name", ["fw1", "fw2"])
def test_no_nonce_is_used_twice_by_a_node_that_was_restored(name: str) -> None:
    ledger = Ledger()
    made = site(ledger)
    go_back(made, name, 20)
    made.run(30.0)
    assert ledger.reused == 0


@pytest.mark.xfail(strict=True, reason=NOT_YET)
@pytest.mark.parametrize("name", ["fw1", "fw2"])
@pytest.mark.parametrize("peer_restarts", [False, True])
def test_tables_become_equal_after_a_node_was_restored(name: str, peer_restarts: bool) -> None:
    """A restored active node has a table of the past, and that is then the true one."""
    made = site(Ledger())
    go_back(made, name, 20, peer_restarts)
    made.fw1.kernel.open(tcp(4000))
    made.converge(made.fw1, made.fw2, seconds=120.0)


@pytest.mark.parametrize("name", ["fw1", "fw2"])
@pytest.mark.parametrize("restarted", ["fw1", "fw2"])
def test_restart_of_either_daemon_ends_it(name: str, restarted: str) -> None:
    ledger = Ledger()
    made = site(ledger)
    go_back(made, name, 20)
    made.run(5.0)
    made.fw1.kernel.open(tcp(4000))
    made.nodes[restarted].kill()
    made.nodes[restarted].start(made.now)
    made.converge(made.fw1, made.fw2)
    before = ledger.reused
    for port in range(5000, 5010):
        made.fw1.kernel.open(tcp(port))
        made.run(1.0)
    made.converge(made.fw1, made.fw2)
    assert ledger.reused == before > 0
