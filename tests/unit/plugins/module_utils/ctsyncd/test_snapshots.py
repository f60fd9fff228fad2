# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Nodes that begin anew, and nodes that go on from a state of the past: a virtual machine restored from a snapshot.

A restart makes fresh keys.  A snapshot has the keys in it: the node goes on sending with packet numbers that it used
before.  Its nonces differ all the same, as what it says differs; and the first that it hears ends the session.
"""

from __future__ import annotations

import copy
from typing import Any, Callable

import pytest
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import readiness, wire
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.crypto import Aead, LibraryCrypto
from unit.simulation import Node, Simulation, tcp


class Ledger:
    """The real cryptography; ``reused`` counts the pairs of key and nonce that sealed two different datagrams.

    With ``numbers_only`` a nonce is the packet number, whatever the contents.
    """

    def __init__(self, numbers_only: bool = False) -> None:
        self._numbers_only = numbers_only
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

    def derive_digest(self, secret: bytes, salt: bytes, info: bytes) -> Callable[[bytes, bytes], bytes]:
        if self._numbers_only:
            return lambda _header, _plaintext: bytes(wire.DIGEST_BYTES)
        return self._library.derive_digest(secret, salt, info)


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
    return snapshot_of(made, made.nodes[name])


def snapshot_of(made: Simulation, node: Node) -> Node:
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
    made.run_until(lambda: made.wire.next_arrival() > made.now + 1.0)  # so it speaks before it hears
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


@pytest.mark.parametrize("numbers_only", [False, True])
def test_random_bytes_that_repeat_make_no_nonce_repeat(numbers_only: bool) -> None:
    """As after a clone of a virtual machine whose random numbers begin where those of the other began."""
    ledger = Ledger(numbers_only)
    made = site(ledger)
    for life in range(2):
        made.chance.seed(0)  # as at the beginning of the simulation
        made.fw1.kill()
        made.fw1.start(made.now)
        made.fw1.kernel.open(tcp(3000 + life))
        made.converge(made.fw1, made.fw2)
    assert (ledger.reused > 0) == numbers_only  # the ledger would have noticed


@pytest.mark.parametrize("name", ["fw1", "fw2"])
@pytest.mark.parametrize("numbers_only", [False, True])
def test_no_nonce_is_used_twice_by_a_node_that_was_restored(name: str, numbers_only: bool) -> None:
    ledger = Ledger(numbers_only)
    made = site(ledger)
    go_back(made, name, 20)
    for port in range(5000, 5010):
        made.fw1.kernel.open(tcp(port))
        made.run(0.1)
    made.converge(made.fw1, made.fw2)
    assert (ledger.reused > 0) == numbers_only  # the ledger would have noticed


@pytest.mark.parametrize("name", ["fw1", "fw2"])
def test_two_futures_of_one_snapshot_share_no_nonce(name: str) -> None:
    """The same image twice, and neither life knows of the other."""
    ledger = Ledger()
    made = site(ledger)
    image = snapshot(made, name)
    for life in range(3):
        for port in range(10):
            made.fw1.kernel.open(tcp(3000 + 100 * life + port))
            made.run(0.3)
        restore(made, name, snapshot_of(made, image))
    made.fw1.kernel.open(tcp(4000))
    made.converge(made.fw1, made.fw2)
    assert ledger.reused == 0


@pytest.mark.parametrize("name", ["fw1", "fw2"])
@pytest.mark.parametrize("peer_restarts", [False, True])
@pytest.mark.parametrize("flows", [1, 20])
def test_tables_become_equal_after_a_node_was_restored(name: str, peer_restarts: bool, flows: int) -> None:
    """A restored active node has a table of the past, and that is then the true one.  Nobody does anything, and soon
    nobody says READY while the tables differ."""
    made = site(Ledger())
    go_back(made, name, flows, peer_restarts)
    noticed = made.now + (2.0 if peer_restarts else 2 * 0.2)  # silence, or two heartbeats
    made.fw1.kernel.open(tcp(4000))
    equal_at = 0.0
    end = made.now + 20.0
    while made.now < end:
        made.turn()
        equal = not made.differences(made.fw1, made.fw2)
        verdicts = [node.up.verdict(made.now).verdict for node in made.nodes.values()]
        if not equal and made.now > noticed:
            assert readiness.READY not in verdicts, made.now
        if equal and verdicts == [readiness.READY] * 2:
            equal_at = equal_at or made.now
        elif made.now > noticed:
            equal_at = 0.0
    assert 0 < equal_at < end - 15.0
    assert sum(node.up.peers[0].session.counters["sessions_ended_went_back"] for node in made.nodes.values()) == (
        not peer_restarts
    )
    made.converge(made.fw1, made.fw2)


def test_a_session_that_a_node_does_not_know_is_doubted_only_in_silence() -> None:
    """Datagrams of an old session, replayed all the time, are answered with nothing while the true peer is heard, and
    with one HELLO for each ``hello_interval`` while it is not."""
    made = site()
    old = [datagram for to, datagram in made.wire.sent if to == "fw1" and datagram[1] == wire.DATA]
    made.fw2.kill()
    made.fw2.start(made.now)
    made.converge(made.fw1, made.fw2)
    before = made.fw1.up.peers[0].session.counters["sessions"]

    def hellos_to_fw2(seconds: float) -> int:
        start, end = len(made.wire.sent), made.now + seconds
        while made.now < end:
            made.wire.inject("fw1", old[-1], made.now)
            made.turn()
        return sum(to == "fw2" and datagram[1] == wire.HELLO for to, datagram in made.wire.sent[start:])

    assert hellos_to_fw2(10.0) == 0
    made.fw2.kill()
    assert 40 <= hellos_to_fw2(10.0) <= 50
    assert made.fw1.up.peers[0].session.counters["sessions"] == before


@pytest.mark.parametrize("name", ["fw1", "fw2"])
def test_an_acknowledgement_of_the_past_ends_the_session(name: str) -> None:
    """The restored node says more than the peer has heard before it hears anything itself: the numbers tell nothing."""
    made = site()
    image = snapshot(made, name)
    peer = made.fw2 if name == "fw1" else made.fw1
    for port in range(3000, 3010):
        made.fw1.kernel.open(tcp(port))
        made.run(0.1)
    restore(made, name, image)
    session = made.nodes[name].up.peers[0].session
    known = session._established
    assert known is not None
    known.sealer.number += 100_000  # as many datagrams on, all of them lost
    made.fw1.kernel.open(tcp(4000))
    made.converge(made.fw1, made.fw2)
    restored, other = session.counters, peer.up.peers[0].session.counters
    if name == "fw1":  # its new blocks have numbers that the peer acknowledged already
        assert restored["sessions_ended_went_back"] == 1
    else:  # it acknowledges less than it did
        assert other["sessions_ended_peer_went_back"] == 1


@pytest.mark.parametrize("flows", [5, 100])
def test_new_blocks_under_old_numbers_are_found_out(flows: int) -> None:
    """The restored active node says more than it had said since the snapshot before it hears anything: neither packet
    numbers nor block numbers tell.  Some of its new blocks were never delivered, as the backup had older ones."""
    made = site()
    image = snapshot(made, "fw1")
    made.fw1.kernel.open(tcp(3000))
    made.run(0.1)
    restore(made, "fw1", image)
    made.fw1.up.peers[0].session._established.sealer.number += 100_000  # as many datagrams on, all of them lost
    made.wire.deaf = "fw1"
    for port in range(4000, 4000 + flows):
        made.fw1.kernel.open(tcp(port))
        made.run(0.01)
    made.wire.deaf = ""
    made.run(0.5)
    counters = made.fw1.up.peers[0].session.counters
    assert counters["sessions_ended_differed"] == 1
    assert counters["sessions_ended_went_back"] == 0
    made.converge(made.fw1, made.fw2)
