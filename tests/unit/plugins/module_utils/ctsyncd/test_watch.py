# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the loop waits for: events or not, links by their descriptors, one that was lost and opened again."""

from __future__ import annotations

import errno
import socket
from typing import Iterator

import pytest
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.link import Link
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.watch import READ, WRITE, Watch

HERE = "127.0.2.1"


class Stand:
    def __init__(self) -> None:
        self.events, self.tell_events = socket.socketpair()
        self.rest, self.tell_rest = socket.socketpair()
        self.watch = Watch(self.events.fileno(), self.rest.fileno())
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind((HERE, 0))
            self.port = int(probe.getsockname()[1])
        self.link = Link("lo", HERE, self.port, ["127.0.2.2"])
        assert self.link.open(0.0), self.link.problem

    def knock(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"x", (HERE, self.port))

    def close(self) -> None:
        self.watch.close()
        self.link.close()
        for sock in (self.events, self.tell_events, self.rest, self.tell_rest):
            sock.close()


@pytest.fixture
def stand() -> Iterator[Stand]:
    made = Stand()
    yield made
    made.close()


def test_in_a_window_everything_but_events_is_waited_for(stand: Stand) -> None:
    stand.watch.watch(stand.link, READ)
    assert stand.watch.all(0.0) == stand.watch.others(0.0) == []
    stand.tell_events.send(b"x")
    assert stand.watch.all(10.0) == [stand.events.fileno()]
    assert stand.watch.others(0.0) == []
    stand.tell_rest.send(b"x")
    stand.knock()
    link, rest = stand.link.fileno(), stand.rest.fileno()
    assert sorted(stand.watch.all(10.0)) == sorted([stand.events.fileno(), link, rest])
    assert sorted(stand.watch.others(10.0)) == sorted([link, rest])
    assert stand.watch.links == {link: stand.link}


def test_a_link_is_read_written_or_held_back(stand: Stand) -> None:
    stand.knock()
    fd = stand.link.fileno()
    assert stand.watch.others(0.0) == []
    for wanted, ready in ((READ, [fd]), (READ | WRITE, [fd]), (0, []), (WRITE, [fd]), (0, []), (READ, [fd])):
        stand.watch.watch(stand.link, wanted)
        assert stand.link.watched == wanted
        assert stand.watch.others(0.0) == stand.watch.all(0.0) == ready
        stand.watch.watch(stand.link, wanted)  # nothing to do
    stand.link.receive(10)
    assert stand.watch.others(0.0) == []


def test_a_link_that_was_lost_is_watched_when_it_is_open_again(stand: Stand) -> None:
    stand.watch.watch(stand.link, READ)
    stand.link._lose(OSError(errno.ENODEV, "gone"))
    stand.watch.watch(stand.link, READ)
    assert (stand.watch.links, stand.link.watched) == ({}, 0)
    taken = socket.socket()  # likely the same number
    assert stand.link.open(0.0)
    stand.watch.watch(stand.link, READ)
    stand.knock()
    assert stand.watch.all(10.0) == stand.watch.others(10.0) == [stand.link.fileno()]
    assert stand.watch.links == {stand.link.fileno(): stand.link}
    taken.close()
