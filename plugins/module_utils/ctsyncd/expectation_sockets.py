# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The daemon's sockets to the kernel's expectation table: its events and walks through it.

Both need CAP_NET_ADMIN.  Opening one raises OSError if the kernel refuses.
"""

from __future__ import annotations

import array
import errno
import os
import socket
import struct
from collections.abc import Collection
from typing import NamedTuple

from . import expectation as codec
from . import netlink
from .ctnetlink import NLM_F_DUMP_INTR
from .errors import NetlinkError
from .expectation import Expectation
from .flow import Flow

# <linux/netfilter/nfnetlink_compat.h>: group bits of bind(2)
NF_NETLINK_CONNTRACK_EXP_NEW = 8
NF_NETLINK_CONNTRACK_EXP_DESTROY = 32

EVENT_BUFFER = 1 << 20
"""Bytes, some 800 events that wait.  If it overflows the table is walked through, which is small."""

_READ_SIZE = 64 << 10


class Events(NamedTuple):
    """What happened to expectations, in order: the expectation and whether it is gone.

    ``lost``: the kernel dropped events, and only a walk tells what they were.  ``more``: the limit was reached.
    """

    changes: list[tuple[Expectation, bool]]
    lost: bool = False
    more: bool = False


class EventSocket(netlink._Socket):
    """Events of this network namespace's expectations, but for those that ``ignore_portids`` caused.

    ``malformed`` counts undecodable datagrams.
    """

    def __init__(self, ignore_portids: Collection[int] = ()) -> None:
        super().__init__(netlink.NETLINK_NETFILTER, EVENT_BUFFER)
        self.malformed = 0
        try:
            program = array.array("B", netlink.event_filter(ignore_portids))
            address, length = program.buffer_info()
            # struct sock_fprog; an instruction has 8 bytes; the kernel copies them before setsockopt returns
            fprog = struct.pack("@HP", length // 8, address)
            self._sock.setsockopt(socket.SOL_SOCKET, netlink.SO_ATTACH_FILTER, fprog)
            self._sock.bind((0, NF_NETLINK_CONNTRACK_EXP_NEW | NF_NETLINK_CONNTRACK_EXP_DESTROY))
        except OSError:
            self.close()
            raise

    def read(self, limit: int = 1024) -> Events:
        """The events that are there now, at most ``limit`` of them, without waiting."""
        changes: list[tuple[Expectation, bool]] = []
        lost = False
        for dummy in range(limit):
            try:
                data = self._receive(socket.MSG_DONTWAIT)
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                lost = True
                continue
            if data is None:
                return Events(changes, lost)
            try:
                for message in codec.parse_messages(data):
                    if message.expectation is not None:
                        changes.append((message.expectation, message.gone))
            except NetlinkError:
                self.malformed += 1
        return Events(changes, lost, True)


class Walk(netlink._Socket):
    """One walk through the expectation table, or through the expectations of one flow, in slices.

    ``done``: the last slice was read.  ``interrupted``: something may be missing (NLM_F_DUMP_INTR).  ``malformed``
    counts undecodable entries.
    """

    def __init__(self, master: Flow | None = None) -> None:
        super().__init__(netlink.NETLINK_NETFILTER)
        self.done = False
        self.interrupted = False
        self.malformed = 0
        try:
            self._sock.bind((0, 0))
            self._sock.send(codec.dump(1) if master is None else codec.dump_of(master, 1))
        except OSError:
            self.close()
            raise

    def read(self, slices: int = 1) -> list[Expectation]:
        """The entries of at most ``slices`` datagrams, without waiting: the kernel has each ready before it is asked.

        Raises NetlinkError if the kernel ends the walk with an error.
        """
        found: list[Expectation] = []
        for dummy in range(slices):
            data = None if self.done else self._receive(socket.MSG_DONTWAIT, _READ_SIZE)
            if data is None:  # of a flow without a helper the kernel says nothing at all (ctnetlink_dump_exp_ct)
                self.done = True
                break
            messages = codec.parse_messages(data)
            while not self.done:
                try:
                    message = next(messages)
                except StopIteration:
                    break
                except NetlinkError:
                    self.malformed += 1
                    self.interrupted = True
                    break
                self.interrupted |= bool(message.flags & NLM_F_DUMP_INTR)
                if message.expectation is not None:
                    found.append(message.expectation)
                elif message.errno:
                    raise NetlinkError(f"listing expectations: {os.strerror(message.errno)}", message.errno)
                else:
                    self.done = message.gone
        return found
