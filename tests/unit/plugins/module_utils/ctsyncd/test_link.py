# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The sync socket on loopback: bound to its interface, deaf to strangers, opened again by itself."""

from __future__ import annotations

import errno
import select
import socket
from typing import Iterator

import pytest
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import link as links
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.link import Link

HERE, THERE, STRANGER = "127.0.1.1", "127.0.1.2", "127.0.1.3"


@pytest.fixture
def port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind((HERE, 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def peer(port: int) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((THERE, port))
        sock.settimeout(10)
        yield sock


@pytest.fixture
def link(port: int) -> Iterator[Link]:
    made = Link("lo", HERE, port, [THERE])
    assert made.problem
    assert made.open(0.0), made.problem
    assert (made.problem, made.is_open) == ("", True)
    yield made
    made.close()


def wait(link: Link) -> None:
    assert select.select([link], [], [], 10)[0]


def test_datagrams_go_both_ways(link: Link, peer: socket.socket, port: int) -> None:
    link.send(0, [b"one", b"two"])
    assert [peer.recvfrom(100) for _ in range(2)] == [(b"one", (HERE, port)), (b"two", (HERE, port))]
    assert not link.waiting
    for number in range(5):
        peer.sendto(b"%d" % number, (HERE, port))
    wait(link)
    assert link.receive(3) == [(0, b"0"), (0, b"1"), (0, b"2")]
    assert link.receive(10) == [(0, b"3"), (0, b"4")]
    assert link.receive(10) == []
    assert link.counters["bytes_received"] == 5


def test_each_peer_gets_its_own_and_is_known_by_its_number(port: int, peer: socket.socket) -> None:
    link = Link("lo", HERE, port, [STRANGER, THERE])
    assert link.open(0.0)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind((STRANGER, port))
        other.settimeout(10)
        link.send(0, [b"for the first"])
        link.send(1, [b"for the second", b"more"])
        assert other.recv(100) == b"for the first"
        assert [peer.recv(100), peer.recv(100)] == [b"for the second", b"more"]
        peer.sendto(b"second", (HERE, port))
        wait(link)
        assert link.receive(10) == [(1, b"second")]
        other.sendto(b"first", (HERE, port))
        wait(link)
        assert link.receive(10) == [(0, b"first")]
    link.close()


def test_a_window_of_blocks_fits_into_the_socket(link: Link, peer: socket.socket) -> None:
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as plain:
            assert link._sock.getsockopt(socket.SOL_SOCKET, option) > plain.getsockopt(socket.SOL_SOCKET, option)  # type: ignore[union-attr]
    for number in range(512):
        peer.sendto(number.to_bytes(1400, "big"), link._local)
    wait(link)
    assert [int.from_bytes(datagram, "big") for _peer, datagram in link.receive(1000)] == list(range(512))


def test_strangers_are_counted_and_not_heard(link: Link, peer: socket.socket, port: int) -> None:
    for where in ((STRANGER, port), (THERE, 0)):  # another host, and the peer's host from another port
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
            stranger.bind(where)
            stranger.sendto(b"let me in", (HERE, port))
    peer.sendto(b"peer", (HERE, port))
    wait(link)
    assert link.receive(10) == [(0, b"peer")]
    assert link.counters["dropped_foreign_address"] == 2


def test_a_datagram_that_is_too_long_is_counted_and_not_cut(link: Link, peer: socket.socket, port: int) -> None:
    longest = bytes(range(256)) * 36
    assert len(longest) == links.MAX_DATAGRAM_BYTES
    for payload in (longest + b"x", longest, longest * 4, b"short"):
        peer.sendto(payload, (HERE, port))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        stranger.bind((STRANGER, port))
        stranger.sendto(longest * 2, (HERE, port))
    wait(link)
    assert link.receive(10) == [(0, longest), (0, b"short")]
    assert link.counters == {"dropped_oversized": 2, "dropped_foreign_address": 1, "bytes_received": 9221}


def test_nobody_there_is_an_error_to_count_and_no_more(link: Link, port: int) -> None:
    """The ICMP error about one datagram comes back with a later call."""
    link._sock.connect((THERE, port))  # type: ignore[union-attr]  # only then does the kernel tell
    link.send(0, [b"lost"])
    wait(link)
    assert link.receive(10) == []
    link.send(0, [b"lost again"])
    assert link.is_open
    assert link.counters["receive_errors"] + link.counters["send_errors"] > 0


def test_missing_interface_is_a_problem_with_a_remedy_and_tried_again(port: int) -> None:
    link = Link("nowhere0", HERE, port, [THERE])
    assert not link.open(5.0)
    assert "nowhere0" in link.problem
    assert "check the interface" in link.problem
    assert link.retry_at == 5.0 + links.RETRY_S
    assert link.fileno() == -1
    link.send(0, [b"x"])  # dropped: the session sends again
    assert link.counters["send_errors"] == 1
    assert not link.waiting
    link.interface = "lo"  # it appears
    assert link.open(link.retry_at)
    link.close()


class Broken:
    """A socket whose interface goes away, or that is full."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.sent: list[bytes] = []
        self.closed = False

    def sendto(self, data: bytes, _where: object) -> None:
        if self.number:
            raise OSError(self.number, "as the test wants it")
        self.sent.append(data)

    def recvfrom(self, _size: int) -> tuple[bytes, tuple[str, int]]:
        raise OSError(self.number, "as the test wants it")

    def close(self) -> None:
        self.closed = True


def test_full_socket_keeps_datagrams_in_order_and_bounded(port: int) -> None:
    link = Link("lo", HERE, port, [THERE])
    sock = Broken(errno.EAGAIN)
    link._sock = sock  # type: ignore[assignment]
    link.send(0, [b"%d" % number for number in range(links.MAX_QUEUE + 100)])
    assert link.waiting
    sock.number = 0
    link.send(0, [])
    assert sock.sent == [b"%d" % number for number in range(100, links.MAX_QUEUE + 100)]
    assert not link.waiting


@pytest.mark.parametrize("act", ["send", "receive"])
def test_vanished_interface_closes_the_socket_and_says_so(port: int, act: str) -> None:
    link = Link("lo", HERE, port, [THERE])
    sock = Broken(errno.ENODEV)
    link._sock = sock  # type: ignore[assignment]
    if act == "send":
        link.send(0, [b"x"])
    else:
        assert link.receive(10) == []
    assert sock.closed
    assert not link.is_open
    assert link.problem.startswith("sync link lo: ")


def test_datagrams_are_never_fragmented_and_what_the_interface_does_not_take_is_told(link: Link) -> None:
    """Loopback takes 65536 bytes, headers included; a socket of UDP takes nothing longer than 65507."""
    assert link.payload == 65536 - 28
    discover = link._sock.getsockopt(socket.IPPROTO_IP, links.IP_MTU_DISCOVER)  # type: ignore[union-attr]
    assert discover == links.PMTUDISC_PROBE
    link.payload = 0
    link.send(0, [bytes(65_508), b"short"])
    assert link.counters["send_too_long"] == 1
    assert link.payload == 65536 - 28  # looked up anew
    assert link.refused == ""
    assert not link.waiting


def test_ipv6_has_longer_headers(port: int) -> None:
    link = Link("lo", "::1", port, "::2")
    assert link.open(0.0), link.problem
    assert link.payload == 65536 - 48
    assert link._sock.getsockopt(socket.IPPROTO_IPV6, links.IPV6_MTU_DISCOVER) == links.PMTUDISC_PROBE  # type: ignore[union-attr]
    link.close()


@pytest.mark.parametrize(("number", "refused"), [(errno.ENETDOWN, True), (errno.EPERM, True), (errno.ENOBUFS, False)])
def test_what_the_kernel_refuses_is_known_until_it_takes_something(port: int, number: int, refused: bool) -> None:
    link = Link("lo", HERE, port, [THERE])
    sock = Broken(number)
    link._sock = sock  # type: ignore[assignment]
    link.send(0, [b"x"])
    assert bool(link.refused) == refused
    assert link.counters["send_errors"] == 1
    assert link.is_open
    sock.number = 0
    link.send(0, [b"y"])
    assert link.refused == ""
