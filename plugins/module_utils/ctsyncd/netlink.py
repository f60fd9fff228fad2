# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The daemon's sockets to the kernel: conntrack events, requests and dumps; the node's own addresses.

See netlink(7), rtnetlink(7) and socket(7).  Every socket needs CAP_NET_ADMIN, but for the addresses.  Opening one
raises OSError if the kernel refuses.
"""

from __future__ import annotations

import array
import contextlib
import errno
import os
import select
import socket
import struct
from typing import Any, Callable, Collection, Iterable, Iterator, NamedTuple, Sequence, TypeVar

from . import columns, ctnetlink
from .constants import IPPROTO_SCTP, IPPROTO_TCP, IPS_SEEN_REPLY
from .ctnetlink import Buffer, Kind
from .errors import NetlinkError
from .filters import EventFilter
from .flow import Flow
from .rows import Changes

try:
    import ctypes
except (ImportError, MemoryError, OSError):
    # Some small builds of Python lack it; older ones make a callback at import, which needs memory that can be written
    # and executed, and MemoryDenyWriteExecute= of systemd.exec(5) forbids that.
    ctypes = None  # type: ignore[assignment]

# <linux/netlink.h>
NETLINK_ROUTE = 0
NETLINK_NETFILTER = 12
SOL_NETLINK = 270  # <linux/socket.h>
NETLINK_ADD_MEMBERSHIP = 1
NETLINK_DROP_MEMBERSHIP = 2
NETLINK_CAP_ACK = 10

# <asm-generic/socket.h>
SO_ATTACH_FILTER = 26
SO_RCVBUFFORCE = 33

# <linux/netfilter/nfnetlink.h>: multicast groups
NFNLGRP_CONNTRACK_NEW = 1
NFNLGRP_CONNTRACK_UPDATE = 2
NFNLGRP_CONNTRACK_DESTROY = 3

# <linux/rtnetlink.h>
RTM_NEWLINK = 16
RTM_GETLINK = 18
RTM_NEWADDR = 20
RTM_GETADDR = 22
RTMGRP_IPV4_IFADDR = 0x10
RTMGRP_IPV6_IFADDR = 0x100
IFLA_IFNAME = 3  # <linux/if_link.h>
IFA_ADDRESS = 1  # <linux/if_addr.h>
IFA_LOCAL = 2
IFA_FLAGS = 8
IFA_F_DADFAILED = 0x08
IFA_F_TENTATIVE = 0x40

# <linux/filter.h>: classic BPF
_BPF_LD_W_ABS = 0x20
_BPF_LD_H_ABS = 0x28
_BPF_LD_W_IND = 0x40
_BPF_LD_H_IND = 0x48
_BPF_LD_B_IND = 0x50
_BPF_LD_IMM = 0x00
_BPF_LDX_IMM = 0x01
_BPF_JA = 0x05
_BPF_JEQ_K = 0x15
_BPF_JSET_K = 0x45
_BPF_RET_K = 0x06
_BPF_TAX = 0x07
_SKF_AD_NLATTR = 0xFFFFF000 + 12  # offset of attribute X at or behind A, 0 if there is none
_SKF_AD_NLATTR_NEST = 0xFFFFF000 + 16  # offset of attribute X inside the attribute at A

_INSTRUCTION = struct.Struct("=HBBI")  # struct sock_filter: code, jt, jf, k
_IFINFOMSG = struct.Struct("=BxHiII")
_IFADDRMSG = struct.Struct("=BBBBi")
_ADDRESS_LEN = {socket.AF_INET: 4, socket.AF_INET6: 16}

DEFAULT_EVENT_BUFFER = 64 << 20
"""Bytes.  A queued event takes 1280 of them, so this is about 100,000 events (it is only used when they queue)."""

PASS_ALL = EventFilter()

# What ctnetlink_conntrack_event tells when it changed, and not again
_TOLD_ONCE = (ctnetlink.CTA_LABELS, ctnetlink.CTA_TUPLE_MASTER, ctnetlink.CTA_SEQ_ADJ_ORIG)

_ANSWER_BUFFER = 4 << 20
_READ_SIZE = 64 << 10  # the kernel fills at most 32 KiB of it in a dump
_EVENT_SLOTS = 512
_EVENT_STRIDE = 1088  # one event with everything in it has less than 1 KiB; not a power of two, for the cache's sake
_FEW = 8  # datagrams whose lengths are not compared first
_ANSWER_SLOTS = 64
_ANSWER_STRIDE = 64  # an error answer has 36 bytes (NETLINK_CAP_ACK)
_SLICE_BYTES = 64 << 10  # of requests per system call; well below the default send buffer (208 KiB)
_ROUTE_TIMEOUT = 5  # seconds
_BUCKETS_PATH = "/proc/sys/net/netfilter/nf_conntrack_buckets"


def event_filter(ignore_portids: Collection[int] = (), unwanted: EventFilter = PASS_ALL) -> bytes:
    """Classic BPF program (array of struct sock_filter) for a socket of conntrack events.

    Drops the events caused by requests from the given netlink ports and what ``unwanted`` describes.  Half-open TCP and
    flows without a reply pass nevertheless if the event has what no later one tells (``_TOLD_ONCE``).  BPF loads are
    big-endian while the netlink header is in host order, so the constants are turned around.
    """
    code = _Assembler()
    if ignore_portids:
        code.add(_BPF_LD_W_ABS, 12)  # nlmsg_pid
        for portid in ignore_portids:
            code.add(_BPF_JEQ_K, _swapped(portid, "I"), "drop")
    if unwanted != PASS_ALL:
        destroy = ctnetlink.NFNL_SUBSYS_CTNETLINK << 8 | ctnetlink.IPCTNL_MSG_CT_DELETE
        code.add(_BPF_LD_H_ABS, 4)  # nlmsg_type
        code.add(_BPF_JEQ_K, _swapped(destroy, "H"), "pass")
        _zone_instructions(code, unwanted.zones)
        _protocol_instructions(code, unwanted)
        code.add(_BPF_JA, label="pass")
        code.label("early")
        for kind in _TOLD_ONCE:
            code.find(kind, missing=f"without {kind}")
            code.add(_BPF_JA, label="pass")
            code.label(f"without {kind}")
        code.add(_BPF_JA, label="drop")
    code.label("pass")
    code.add(_BPF_RET_K, 0xFFFFFFFF)
    code.label("drop")
    code.add(_BPF_RET_K, 0)
    return code.program()


class _Assembler:
    """Instructions of classic BPF with named jump targets."""

    def __init__(self) -> None:
        self._code: list[tuple[int, int, str]] = []  # operation, operand, label to jump to
        self._labels: dict[str, int] = {}

    def add(self, operation: int, operand: int = 0, label: str = "") -> None:
        """An instruction; of a conditional jump ``label`` is where to go if the condition is true."""
        self._code.append((operation, operand, label))

    def label(self, name: str) -> None:
        self._labels[name] = len(self._code)

    def find(self, *path: int, missing: str) -> None:
        """A = offset of the attribute at ``path``; without it go to ``missing``."""
        self.add(_BPF_LD_IMM, ctnetlink.HEADER_LEN + 4)  # the first attribute, behind struct nfgenmsg
        for place, kind in enumerate(path):
            self.add(_BPF_LDX_IMM, kind)
            self.add(_BPF_LD_W_ABS, _SKF_AD_NLATTR_NEST if place else _SKF_AD_NLATTR)
            self.add(_BPF_JEQ_K, 0, missing)

    def load(self, operation: int, *path: int, missing: str) -> None:
        """A = value of the attribute at ``path``, behind its struct nlattr."""
        self.find(*path, missing=missing)
        self.add(_BPF_TAX)
        self.add(operation, 4)

    def program(self) -> bytes:
        out = []
        for at, (operation, operand, label) in enumerate(self._code):
            distance = self._labels[label] - at - 1 if label else 0
            if operation == _BPF_JA:
                out.append(_INSTRUCTION.pack(operation, 0, 0, distance))
            else:
                out.append(_INSTRUCTION.pack(operation, distance, 0, operand))
        return b"".join(out)


def _zone_instructions(code: _Assembler, zones: Collection[int]) -> None:
    if not zones:
        return
    code.load(_BPF_LD_H_IND, ctnetlink.CTA_ZONE, missing="no zone")
    for zone in zones:
        code.add(_BPF_JEQ_K, zone, "zone wanted")
    code.add(_BPF_JA, label="drop")
    code.label("no zone")
    if 0 not in zones:
        # a zone of one direction only: rare, and judged by the reader
        code.find(ctnetlink.CTA_TUPLE_ORIG, ctnetlink.CTA_TUPLE_ZONE, missing="no zone of the original direction")
        code.add(_BPF_JA, label="zone wanted")
        code.label("no zone of the original direction")
        code.find(ctnetlink.CTA_TUPLE_REPLY, ctnetlink.CTA_TUPLE_ZONE, missing="drop")
    code.label("zone wanted")


def _protocol_instructions(code: _Assembler, unwanted: EventFilter) -> None:
    code.load(
        *(_BPF_LD_B_IND, ctnetlink.CTA_TUPLE_ORIG, ctnetlink.CTA_TUPLE_PROTO, ctnetlink.CTA_PROTO_NUM), missing="pass"
    )
    for protocol in unwanted.protocols:
        code.add(_BPF_JEQ_K, protocol, "protocol wanted")
    if unwanted.protocols:
        code.add(_BPF_JA, label="drop")
    code.label("protocol wanted")
    code.add(_BPF_JEQ_K, IPPROTO_TCP, "tcp")
    code.add(_BPF_JEQ_K, IPPROTO_SCTP, "pass")
    if unwanted.replied_only:
        code.load(_BPF_LD_W_IND, ctnetlink.CTA_STATUS, missing="pass")
        code.add(_BPF_JSET_K, IPS_SEEN_REPLY, "pass")
        code.add(_BPF_JA, label="early")
    else:
        code.add(_BPF_JA, label="pass")
    code.label("tcp")
    if unwanted.tcp_states:
        code.load(
            *(_BPF_LD_B_IND, ctnetlink.CTA_PROTOINFO, ctnetlink.CTA_PROTOINFO_TCP, ctnetlink.CTA_PROTOINFO_TCP_STATE),
            missing="pass",
        )
        for state in unwanted.tcp_states:
            code.add(_BPF_JEQ_K, state, "early")


def _swapped(value: int, size: str) -> int:
    """A host-order field as a big-endian load sees it."""
    return int(struct.unpack(">" + size, struct.pack("=" + size, value))[0])


_Self = TypeVar("_Self", bound="_Socket")


class _Socket:
    """A netlink socket that closes itself at the end of a ``with`` block."""

    def __init__(self, protocol: int, receive_buffer: int = 0) -> None:
        self._sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        if receive_buffer:
            self._set_receive_buffer(receive_buffer)

    def _set_receive_buffer(self, size: int) -> None:
        try:
            self._sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, size)
        except PermissionError:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)

    def _hear_the_kernel_only(self) -> None:
        """Take a port and have the kernel refuse what other programs send to it (they get ECONNREFUSED).

        So it is for a connected socket (netlink_getsockbyportid in net/netlink/af_netlink.c).  What a program sends to
        a group that this socket is in still comes; for that, as for changing the table itself, it needs CAP_NET_ADMIN
        in the same network namespace.
        """
        self._sock.connect((0, 0))

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self) -> None:
        self._sock.close()

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    @property
    def portid(self) -> int:
        """The netlink port: nlmsg_pid of the events that requests from this socket cause."""
        return int(self._sock.getsockname()[0])

    @property
    def receive_buffer(self) -> int:
        """Bytes that the kernel really gave (it doubles what was asked for)."""
        return self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)

    def _receive(self, flags: int = 0, size: int = _READ_SIZE) -> bytes | None:
        """The next datagram from the kernel, b"" for one from anybody else, None if there is none."""
        try:
            data, sender = self._sock.recvfrom(size, flags)
        except BlockingIOError:
            return None
        return data if sender[0] == 0 else b""


def _libc_recvmmsg() -> Any:
    """recvmmsg(2), None where it is not to be had."""
    with contextlib.suppress(AttributeError, OSError):
        if ctypes is not None:
            call = ctypes.CDLL(None, use_errno=True).recvmmsg
            call.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int, ctypes.c_void_p)
            call.restype = ctypes.c_int
            return call
    return None


_recvmmsg = _libc_recvmmsg()

_IOVEC = struct.Struct("@PN")
# struct msghdr (name, its length, iovec, how many, control data, its length, flags), then what struct mmsghdr adds
_MSGHDR = "@PIPNPNi0P"
_MMSGHDR = struct.Struct(_MSGHDR + "I0P")


class Receiver:
    """Datagrams, many per system call, of a socket that hears the kernel only: nobody asks who sent them.

    ``data`` has a place of ``stride`` bytes for each; what is longer is cut off.  recvmmsg(2) is not in Python's
    library; without ctypes it is one system call per datagram.
    """

    def __init__(self, sock: socket.socket, slots: int, stride: int) -> None:
        self.stride = stride
        self.slots = slots
        self.data = bytearray(slots * stride)
        self._sock = sock
        self._view = memoryview(self.data)
        self._error: OSError | None = None
        self._call = _recvmmsg
        if self._call is not None:
            self._prepare()

    def _prepare(self) -> None:
        """The arrays that recvmmsg wants; the kernel writes into them, so they stay where they are."""
        iovecs = bytearray(_IOVEC.size * self.slots)
        headers = bytearray(_MMSGHDR.size * self.slots)
        self._pinned = [(ctypes.c_char * len(one)).from_buffer(one) for one in (self.data, iovecs, headers)]
        data_at, iovecs_at, self._headers_at = (ctypes.addressof(one) for one in self._pinned)
        for slot in range(self.slots):
            _IOVEC.pack_into(iovecs, slot * _IOVEC.size, data_at + slot * self.stride, self.stride)
            iovec = iovecs_at + slot * _IOVEC.size
            _MMSGHDR.pack_into(headers, slot * _MMSGHDR.size, 0, 0, iovec, 1, 0, 0, 0, 0)
        self._lengths = memoryview(headers).cast("I")[struct.calcsize(_MSGHDR) // 4 :: _MMSGHDR.size // 4]

    def receive(self, limit: int) -> list[int]:
        """Lengths of the datagrams that are there, at most ``limit``, without waiting.

        Raises OSError with errno ENOBUFS if the kernel had to drop some.
        """
        limit = min(limit, self.slots)
        if self._call is None or limit == 1:  # one by itself is read without ctypes, which is slow on cold caches
            return self._receive_singly(limit)
        count = self._call(self._sock.fileno(), self._headers_at, limit, socket.MSG_DONTWAIT, None)
        if count < 0:
            number = ctypes.get_errno()
            if number in {errno.EAGAIN, errno.EINTR}:
                return []
            if number == errno.ENOSYS:  # a filter of system calls, or a kernel without it
                self._call = None
                return self._receive_singly(limit)
            raise OSError(number, os.strerror(number))
        known = self._lengths[:count]
        alike = count > _FEW and known[1:] == known[:-1]  # takes less than to make numbers of them
        return [known[0]] * count if alike else known.tolist()

    def _receive_singly(self, limit: int) -> list[int]:
        lengths: list[int] = []
        try:
            if self._error is not None:
                raise self._error
            for at in range(0, limit * self.stride, self.stride):
                lengths.append(self._sock.recv_into(self._view[at : at + self.stride], 0, socket.MSG_DONTWAIT))
        except BlockingIOError:
            pass
        except OSError as error:
            if not lengths:
                self._error = None
                raise
            self._error = error  # first what came before it
        return lengths


class EventSocket(_Socket):
    """Conntrack events of this network namespace.

    ``ignore_portids``: netlink ports whose doings are not reported (our own :class:`RequestSocket`).  ``unwanted``:
    other events that are not reported.  ``overruns`` and ``malformed`` count lost-event marks and undecodable events.
    """

    def __init__(
        self,
        receive_buffer: int = DEFAULT_EVENT_BUFFER,
        ignore_portids: Collection[int] = (),
        unwanted: EventFilter = PASS_ALL,
    ) -> None:
        super().__init__(NETLINK_NETFILTER, receive_buffer)
        self.overruns = 0
        self.reader = columns.Reader()
        self._receiver = Receiver(self._sock, _EVENT_SLOTS, _EVENT_STRIDE)
        try:
            self.set_filter(ignore_portids, unwanted)
            self._hear_the_kernel_only()
            self._sock.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, NFNLGRP_CONNTRACK_DESTROY)
            self.follow(True)
        except OSError:
            self.close()
            raise

    def set_filter(self, ignore_portids: Collection[int] = (), unwanted: EventFilter = PASS_ALL) -> None:
        """Replace the kernel-side filter; events that are already queued are not affected."""
        program = array.array("B", event_filter(ignore_portids, unwanted))
        address, length = program.buffer_info()
        # struct sock_fprog; the kernel copies the program before setsockopt returns
        fprog = struct.pack("@HP", length // _INSTRUCTION.size, address)
        self._sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, fprog)

    def follow(self, changes: bool) -> None:
        """Hear of new and changed entries, too, or only of those that end.

        The kernel builds an event only for a group that somebody is in, in whatever network namespace
        (netlink_has_listeners): without a listener to new ones it makes an entry in about half the time.  It goes on
        to keep what it needs to tell the end of such an entry (the ecache extension); with nf_conntrack_events=2, and
        nobody in any group, it would not.
        """
        option = NETLINK_ADD_MEMBERSHIP if changes else NETLINK_DROP_MEMBERSHIP
        for group in (NFNLGRP_CONNTRACK_NEW, NFNLGRP_CONNTRACK_UPDATE):
            self._sock.setsockopt(SOL_NETLINK, option, group)

    def grow(self, receive_buffer: int) -> None:
        """Ask for a larger receive buffer (bytes)."""
        self._set_receive_buffer(receive_buffer)

    def read(self, limit: int = 4096) -> Changes:
        """What the events that are there now say, at most ``limit`` of them, without waiting.

        ``lost``: the kernel dropped events because this socket's buffer was full; what is told is good, but something
        is missing, and only a dump tells what.
        """
        found = columns.Gathering()
        receiver = self._receiver
        seen = events = 0
        lost = False
        while seen < limit:
            wanted = min(limit - seen, receiver.slots)
            try:
                lengths = receiver.receive(wanted)
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self.overruns += 1
                lost = True
                continue
            count, missing = self.reader.events(receiver.data, receiver.stride, lengths, found)
            seen += len(lengths)
            events += count
            lost |= missing
            if len(lengths) < wanted:
                break
        return found.changes(events, lost, seen >= limit)

    @property
    def malformed(self) -> int:
        """Datagrams that could not be decoded."""
        return self.reader.malformed


_ANSWER_BYTES = 20
# struct nlmsghdr (length, type, sequence number), error number of struct nlmsgerr
_ANSWER = struct.Struct(f"=IH2xI4xi{_ANSWER_STRIDE - _ANSWER_BYTES}x")


def _slices(pieces: Sequence[tuple[bytes | bytearray, int]]) -> Iterator[tuple[memoryview, int]]:
    """Joined messages of equal length, cut into parts that one system call takes; how many messages are in each."""
    for piece, length in pieces:
        view, part = memoryview(piece), _SLICE_BYTES // length * length
        for at in range(0, len(piece), part):
            yield view[at : at + part], min(part, len(piece) - at) // length


class RequestSocket(_Socket):
    """Changes to the conntrack table, many per system call, and single look-ups."""

    def __init__(self) -> None:
        super().__init__(NETLINK_NETFILTER, _ANSWER_BUFFER)
        try:
            # An error answer then holds the header of its request only, not the whole of it.
            self._sock.setsockopt(SOL_NETLINK, NETLINK_CAP_ACK, 1)
            self._hear_the_kernel_only()
        except OSError:
            self.close()
            raise
        self._seq = 0
        self._receiver = Receiver(self._sock, _ANSWER_SLOTS, _ANSWER_STRIDE)

    def inject(self, messages: Sequence[bytes]) -> list[tuple[int, int]]:
        """Send requests (from :mod:`ctnetlink`, without NLM_F_ACK) and return ``(index, errno)`` of those that failed.

        All others succeeded: the kernel works through a batch within the send call, answers only failures, and an
        acknowledged no-operation at the end of each batch proves that nothing is missing.  ENOBUFS as errno means that
        the answers were lost: whether these requests succeeded is not known.  The sequence numbers in the messages are
        overwritten.  Raises NetlinkError if the process may not change the table at all.
        """
        first = self._sequence(len(messages))
        return self._transmit(
            ((self._numbered(request, first + index), 1) for index, request in enumerate(messages)), first
        )

    @staticmethod
    def _numbered(request: bytes, seq: int) -> bytes:
        return request[:8] + struct.pack("=I", seq & 0xFFFFFFFF) + request[12:]

    def create_rows(
        self, key_len: int, keys: Sequence[bytes], values: Sequence[bytes], timeouts: Sequence[int]
    ) -> list[tuple[int, int]]:
        """Create an entry for each row, with these timeouts in seconds; failures as :meth:`inject` tells them."""
        return self._rows(
            len(keys),
            lambda part, first: columns.create(key_len, keys[part], values[part], timeouts[part], first),
        )

    def update_rows(
        self, key_len: int, keys: Sequence[bytes], values: Sequence[bytes], timeouts: Sequence[int]
    ) -> list[tuple[int, int]]:
        """Change the entry of each row: status, timeout in seconds, TCP state, mark.  Otherwise as create_rows."""
        return self._rows(
            len(keys),
            lambda part, first: columns.update(key_len, keys[part], values[part], timeouts[part], first),
        )

    def set_timers(self, key_len: int, keys: Sequence[bytes], timeouts: Sequence[int]) -> list[tuple[int, int]]:
        """Give each entry a timeout in seconds and change nothing else.  Otherwise as create_rows."""
        return self._rows(len(keys), lambda part, first: columns.timers(key_len, keys[part], timeouts[part], first))

    def loosen_keys(self, key_len: int, keys: Sequence[bytes]) -> list[tuple[int, int]]:
        """Make the TCP entry of each key liberal.  Otherwise as create_rows."""
        return self._rows(len(keys), lambda part, first: columns.loosen(key_len, keys[part], first))

    def delete_keys(self, key_len: int, keys: Sequence[bytes]) -> list[tuple[int, int]]:
        """Delete the entry of each key.  Otherwise as create_rows."""
        return self._rows(len(keys), lambda part, first: columns.delete(key_len, keys[part], first))

    def _rows(self, count: int, batch: Callable[[slice, int], columns.Batch]) -> list[tuple[int, int]]:
        failures: list[tuple[int, int]] = []
        for start in range(0, count, columns.BATCH_ROWS):
            rows = min(columns.BATCH_ROWS, count - start)
            first = self._sequence(rows)
            made = batch(slice(start, start + rows), first)
            refused = self._transmit(_slices(made.pieces), first)
            failures += [(start + made.order[place], number) for place, number in refused]
        return sorted(failures)

    def _transmit(self, parts: Iterable[tuple[Buffer, int]], first: int) -> list[tuple[int, int]]:
        """Send requests whose numbers count up from ``first``: parts of messages and how many are in each.

        Returns the place and the errno of those that failed.
        """
        failures: list[tuple[int, int]] = []
        waiting: list[Buffer] = []
        size = start = count = 0
        for part, requests in parts:
            if waiting and size + len(part) > _SLICE_BYTES:
                failures += self._exchange(waiting, first, start, count)
                start, size, count = start + count, 0, 0
                waiting.clear()
            waiting.append(part)
            size += len(part)
            count += requests
        if waiting:
            failures += self._exchange(waiting, first, start, count)
        return failures

    def _exchange(self, parts: list[Buffer], first: int, start: int, count: int) -> list[tuple[int, int]]:
        """Send ``count`` requests in one system call and read what the kernel answers."""
        fence = self._sequence(1)
        self._sock.send(b"".join((*parts, ctnetlink.fence(fence))))
        results: dict[int, int] = {}
        fenced = lost = False
        receiver = self._receiver
        while not fenced:
            try:
                lengths = receiver.receive(receiver.slots if count > 1 else 1)
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                lost = True
                continue
            if not lengths:
                break
            for length, answer in zip(lengths, _ANSWER.iter_unpack(receiver.data)):
                said, kind, seq, number = answer
                if kind != ctnetlink.NLMSG_ERROR or min(said, length) < _ANSWER_BYTES:
                    continue
                place = (seq - first) & 0xFFFFFFFF
                if start <= place < start + count:
                    results[place] = -number
                elif seq == fence:
                    fenced = True
        if not fenced and results.get(start) == errno.EPERM:
            raise NetlinkError("changing the conntrack table needs CAP_NET_ADMIN", errno.EPERM)
        if lost or not fenced:
            results = {**dict.fromkeys(range(start, start + count), errno.ENOBUFS), **results}
        return sorted((place, number) for place, number in results.items() if number)

    def _sequence(self, count: int) -> int:
        """The first of ``count`` fresh sequence numbers, which may wrap around at 32 bits."""
        first = self._seq + 1
        self._seq = (self._seq + count) & 0xFFFFFFFF
        return first & 0xFFFFFFFF

    def lookup(self, flow: Flow) -> Flow | None:
        """The kernel's entry with this flow's original tuple and zone, None if there is none.

        Raises NetlinkError if the kernel refuses the request.
        """
        seq = self._sequence(1)
        self._sock.send(ctnetlink.get(flow, seq))
        while True:
            data = self._receive(socket.MSG_DONTWAIT)
            if data is None:
                raise NetlinkError("the kernel did not answer within the request", errno.ENODATA)
            for answer in ctnetlink.parse_messages(data):
                if answer.seq != seq:
                    continue
                if answer.kind == Kind.DUMP:
                    return answer.flow
                if answer.kind == Kind.ERROR and answer.errno == errno.ENOENT:
                    return None
                if answer.kind == Kind.ERROR and answer.errno:
                    raise NetlinkError(f"looking up an entry: {os.strerror(answer.errno)}", answer.errno)


class TableDump(_Socket):
    """One walk through the conntrack table, in slices, on a socket of its own.

    ``done``: the last slice was read.  ``interrupted``: entries may be missing or doubled, because the kernel says so
    (NLM_F_DUMP_INTR) or the hash table was resized meanwhile, which it does not say (ctnetlink_dump_table goes on at
    the number of the bucket where it was).  ``malformed`` counts entries that could not be decoded.
    """

    def __init__(self, family: int = 0, zero: bool = False) -> None:
        super().__init__(NETLINK_NETFILTER, _ANSWER_BUFFER)
        self.done = False
        self.interrupted = False
        self.reader = columns.Reader()
        self._data = bytearray(_READ_SIZE + columns.HEAD_BYTES)
        self._buckets = _buckets()
        try:
            self._sock.bind((0, 0))
            self._sock.send(ctnetlink.dump(1, family, zero))
        except OSError:
            self.close()
            raise

    def read(self, slices: int = 1) -> Changes:
        """The entries of at most ``slices`` datagrams (about 130 each), without waiting; ``more`` until it is done.

        Raises NetlinkError if the kernel ends the dump with an error.
        """
        found = columns.Gathering()
        entries = 0
        while slices > 0 and not self.done:
            slices -= 1
            length = self._receive_slice()
            if length is None:
                break
            count, interrupted, others = self.reader.dump(self._data, length, found)
            entries += count
            self.interrupted |= interrupted
            for message in others:
                self._control(message)
        return found.changes(entries, more=not self.done)

    def read_flows(self, slices: int = 1) -> list[Flow]:
        """The same as flows, for those who want all that the kernel says: start, CTA_ID, window data."""
        flows: list[Flow] = []
        while slices > 0 and not self.done:
            slices -= 1
            length = self._receive_slice()
            if length is None:
                break
            for kind, flags, seq, portid, payload in ctnetlink.split(self._data[:length]):
                self.interrupted |= bool(flags & ctnetlink.NLM_F_DUMP_INTR)
                try:
                    message = ctnetlink.parse_message(kind, flags, seq, portid, payload)
                except NetlinkError:
                    self.reader.malformed += 1
                    continue
                if message is not None and message.flow is not None:
                    flows.append(message.flow)
                elif message is not None:
                    self._control(message)
        return flows

    def _receive_slice(self) -> int | None:
        """Length of the next datagram, now in ``_data``; 0 if it is not the kernel's, None if there is none."""
        try:
            length, sender = self._sock.recvfrom_into(self._data, _READ_SIZE, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            raise NetlinkError("a part of the table dump was lost", errno.ENOBUFS) from error
        return 0 if sender[0] else length

    def _control(self, message: ctnetlink.Message) -> None:
        if message.errno:
            raise NetlinkError(f"dumping the table: {os.strerror(message.errno)}", message.errno)
        if message.kind == Kind.DONE:
            self.done = True
            self.interrupted |= _buckets() != self._buckets

    @property
    def malformed(self) -> int:
        """Entries that could not be decoded."""
        return self.reader.malformed


def dump_flows(family: int = 0) -> Iterator[list[Flow]]:
    """The whole conntrack table (of one address family if it is given), slice by slice; for callers that may wait.

    Raises NetlinkError if the kernel ends the dump with an error, or with errno EINTR if it was interrupted.
    """
    with TableDump(family) as walk:
        poll = select.poll()
        poll.register(walk, select.POLLIN)
        while not walk.done:
            poll.poll()
            flows = walk.read_flows()
            if flows:
                yield flows
        if walk.interrupted:
            raise NetlinkError("the conntrack table changed during the dump", errno.EINTR)


def _buckets() -> str:
    """Buckets of the hash table of conntrack entries, one table for all network namespaces; "" where it is not told."""
    try:
        with open(_BUCKETS_PATH, encoding="ascii") as stream:
            return stream.read()
    except OSError:
        return ""


_PARAMETERS = "/proc/sys/net/netfilter"


def conntrack_parameters() -> dict[str, int]:
    """How this network namespace tracks connections: sysctl net.netfilter.nf_conntrack_NAME by NAME; times in seconds.

    A file that cannot be read is left out.
    """
    parameters: dict[str, int] = {}
    try:
        folder = os.open(_PARAMETERS, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return parameters
    try:  # some fifty files, again and again: without the layers of glob() and open()
        for name in os.listdir(folder):
            if not name.startswith("nf_conntrack_"):
                continue
            try:
                file = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder)
                try:
                    parameters[name[len("nf_conntrack_") :]] = int(os.read(file, 64))
                finally:
                    os.close(file)
            except (OSError, ValueError):
                continue
    finally:
        os.close(folder)
    return parameters


class InterfaceAddress(NamedTuple):
    """An address of this node.  ``flags`` are IFA_F_* (IFA_F_TENTATIVE: not usable yet)."""

    ifindex: int
    ifname: str
    family: int
    address: bytes
    prefix_len: int
    flags: int


def interface_addresses() -> list[InterfaceAddress]:
    """All addresses of this network namespace, loopback included; those that failed duplicate detection are left out.

    Raises OSError or NetlinkError if the kernel does not tell.
    """
    names: dict[int, str] = {}
    for payload in _route_dump(RTM_GETLINK, RTM_NEWLINK, _IFINFOMSG.pack(0, 0, 0, 0, 0)):
        if len(payload) < _IFINFOMSG.size:
            raise NetlinkError(f"ifinfomsg of {len(payload)} bytes")
        name = ctnetlink.attributes(payload, _IFINFOMSG.size).get(IFLA_IFNAME, b"")
        names[_IFINFOMSG.unpack_from(payload)[2]] = os.fsdecode(name.rstrip(b"\0"))
    return _addresses(address_dump(), names)


def _addresses(dump: Sequence[bytes], names: dict[int, str]) -> list[InterfaceAddress]:
    """``names``: of interfaces, by number, as far as anybody asks for them."""
    addresses: list[InterfaceAddress] = []
    for payload in dump:
        if len(payload) < _IFADDRMSG.size:
            raise NetlinkError(f"ifaddrmsg of {len(payload)} bytes")
        family, prefix_len, flags, _scope, ifindex = _IFADDRMSG.unpack_from(payload)
        found = ctnetlink.attributes(payload, _IFADDRMSG.size)
        address = found.get(IFA_LOCAL) or found.get(IFA_ADDRESS)
        if len(found.get(IFA_FLAGS, b"")) == 4:
            flags = struct.unpack("=I", found[IFA_FLAGS])[0]
        if address and len(address) != _ADDRESS_LEN.get(family, len(address)):
            raise NetlinkError(f"address of family {family} with {len(address)} bytes")
        if address and not flags & IFA_F_DADFAILED:
            addresses.append(InterfaceAddress(ifindex, names.get(ifindex, ""), family, address, prefix_len, int(flags)))
    return addresses


def address_dump() -> list[bytes]:
    """What the kernel says of all addresses, for :func:`local_addresses`: while it says the same they are the same.

    Raises OSError or NetlinkError.
    """
    return _route_dump(RTM_GETADDR, RTM_NEWADDR, _IFADDRMSG.pack(0, 0, 0, 0, 0))


def local_addresses(dump: Sequence[bytes] | None = None) -> set[bytes]:
    """The packed addresses of :func:`interface_addresses`, out of what :func:`address_dump` gave or gives."""
    return {entry.address for entry in _addresses(address_dump() if dump is None else dump, {})}


def _route_dump(request: int, answer: int, body: bytes) -> list[bytes]:
    """Payloads of the answers to an rtnetlink dump; repeated when the kernel says that it was interrupted."""
    with _Socket(NETLINK_ROUTE) as route:
        route._sock.settimeout(_ROUTE_TIMEOUT)
        for seq in range(1, 11):
            route._sock.send(ctnetlink.message(request, ctnetlink.NLM_F_DUMP, seq, body))
            payloads, whole = _route_answer(route, answer, seq)
            if whole:
                return payloads
    raise NetlinkError("the list of addresses changed during ten attempts to read it", errno.EINTR)


def _route_answer(route: _Socket, answer: int, seq: int) -> tuple[list[bytes], bool]:
    payloads: list[bytes] = []
    whole = True
    while True:
        for kind, flags, number, _portid, payload in ctnetlink.split(route._receive() or b""):
            if number != seq:
                continue
            whole = whole and not flags & ctnetlink.NLM_F_DUMP_INTR
            if kind == answer:
                payloads.append(payload)
            elif kind in {ctnetlink.NLMSG_ERROR, ctnetlink.NLMSG_DONE}:
                number = ctnetlink.parse_errno(payload)
                if number:
                    raise NetlinkError(f"listing addresses: {os.strerror(number)}", number)
                return payloads, whole


class AddressMonitor(_Socket):
    """Readable when an address of this network namespace came or went: time to call :func:`interface_addresses`."""

    def __init__(self) -> None:
        super().__init__(NETLINK_ROUTE)
        try:
            self._sock.bind((0, RTMGRP_IPV4_IFADDR | RTMGRP_IPV6_IFADDR))
        except OSError:
            self.close()
            raise

    def drain(self) -> bool:
        """Read what is there without waiting; True if anything was, or was lost."""
        changed = False
        while True:
            try:
                if self._receive(socket.MSG_DONTWAIT) is None:
                    return changed
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
            changed = True
