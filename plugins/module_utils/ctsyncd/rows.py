# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Rows: a flow as bytes, the form in which nearly all flows travel from kernel to peer to kernel.

A flow is a *key* and a *value*, and for a few flows *extras*.  All rows of one *shape* (the length of the key tells
which) have the same size, so that thousands of them are handled as columns: byte k of all rows at once.

key
    protocol (1 byte), original tuple (source, destination, l4: 0 or 4 bytes), zone (nothing for zone 0; 2 bytes; or
    2 bytes and 1 byte, the direction that the zone is limited to)
value
    reply tuple (as long as the original one), then ``TAIL``: status (IPS_* bits 0 to 15), timeout (seconds, or
    ``NO_TIMEOUT``), state (0: not said), TCP window scales (two nibbles, original and reply; ``NO_SCALE``: scales and
    flags are not known), TCP flags (two nibbles, the flags that mean something on another machine), mark
extras
    what few flows have, as TLVs (kind, length, value): labels, helper, master, sequence adjustment, SCTP tags

All numbers are big-endian, addresses and ports as the kernel gives them.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from .constants import AF_INET, AF_INET6, IPPROTO_DCCP, IPPROTO_SCTP, IPPROTO_TCP
from .errors import WireError
from .flow import BOTH_DIRECTIONS, Flow, SeqAdj, Tuple

NO_TIMEOUT = 0xFFFFFFFF
NO_SCALE = 0xFF

TAIL = struct.Struct("!HIBBBI")
TAIL_BYTES = 13  # of TAIL
# Places of the parts of TAIL, counted from the end of a value
STATUS_FROM_END = 13
TIMEOUT_FROM_END = 11
STATE_FROM_END = 7
SCALE_FROM_END = 6
FLAGS_FROM_END = 5
MARK_FROM_END = 4

_FLAGS_MASK = 0x0F  # IP_CT_TCP_FLAG_WINDOW_SCALE, SACK_PERM, CLOSE_INIT, BE_LIBERAL


class Shape(NamedTuple):
    """What the length of a key tells.  Sizes in bytes."""

    family: int
    address: int
    l4: int
    zone: int  # 0, 2 or 3
    key: int
    value: int

    @property
    def row(self) -> int:
        """Bytes of key and value."""
        return self.key + self.value

    @property
    def reply(self) -> int:
        """Bytes of a tuple."""
        return 2 * self.address + self.l4


SHAPES = {
    1 + 2 * address + l4 + zone: Shape(
        family, address, l4, zone, 1 + 2 * address + l4 + zone, 2 * address + l4 + TAIL_BYTES
    )
    for family, address in ((AF_INET, 4), (AF_INET6, 16))
    for l4 in (0, 4)
    for zone in (0, 2, 3)
}
"""By length of the key."""

# Kinds of extras
_LABELS = 1
_HELPER = 2
_MASTER = 3
_SEQADJ = 4
_VTAGS = 5

_TLV = struct.Struct("!BB")
_VTAG_PAIR = struct.Struct("!II")
_SEQADJ_PAIR = struct.Struct("!IiiIii")
_ADDRESS_BYTES = {AF_INET: 4, AF_INET6: 16}


def pack(flow: Flow) -> tuple[bytes, bytes, bytes]:
    """Key, value and extras of a flow.  Not carried: CTA_ID and timestamps (the peer's own are its truth)."""
    return flow.key, pack_value(flow), pack_extras(flow)


def pack_value(flow: Flow) -> bytes:
    scale, flags = NO_SCALE, 0
    if flow.tcp_flags is not None:
        original, reply = flow.tcp_flags
        flags = (original & _FLAGS_MASK) << 4 | reply & _FLAGS_MASK
        # the kernel takes scales only if both sides scale; without them 0 says as much (RFC 7323, 2.3: at most 14)
        scales = flow.tcp_wscale or (0, 0)
        scale = min(scales[0], 14) << 4 | min(scales[1], 14)
    timeout = NO_TIMEOUT if flow.timeout is None else min(flow.timeout, NO_TIMEOUT - 1)
    tail = TAIL.pack(flow.status & 0xFFFF, timeout, flow.state or 0, scale, flags, flow.mark or 0)
    return b"".join((*flow.reply, tail))


def pack_extras(flow: Flow) -> bytes:
    out = b""
    if flow.labels is not None:
        out += _extra(_LABELS, flow.labels)
    if flow.helper is not None:
        out += _extra(_HELPER, flow.helper.encode())
    if flow.master is not None:
        out += _extra(_MASTER, bytes((flow.master_proto,)) + b"".join(flow.master))
    if flow.seqadj is not None:
        out += _extra(_SEQADJ, _SEQADJ_PAIR.pack(*flow.seqadj[0], *flow.seqadj[1]))
    if flow.sctp_vtags is not None:
        out += _extra(_VTAGS, _VTAG_PAIR.pack(*flow.sctp_vtags))
    return out


def _extra(kind: int, value: bytes) -> bytes:
    return _TLV.pack(kind, len(value)) + value


def unpack(key: bytes, value: bytes, extras: bytes = b"") -> Flow:
    """The flow of a key, a value and extras; unknown extras are skipped.  Raises WireError ``malformed``."""
    shape, proto, zone, direction, orig = unpack_key(key)
    if len(value) != shape.value:
        raise WireError("malformed", f"flow: value of {len(value)} bytes for a key of {len(key)}")
    status, timeout, state, scale, flags, mark = TAIL.unpack_from(value, shape.reply)
    known = scale != NO_SCALE
    flow = Flow(
        shape.family,
        proto,
        zone,
        orig,
        _tuple(value, 0, shape.address, shape.l4),
        status,
        timeout=None if timeout == NO_TIMEOUT else timeout,
        state=state or None,
        tcp_wscale=(scale >> 4, scale & 15) if known else None,
        tcp_flags=(flags >> 4, flags & 15) if known else None,
        mark=mark,
        zone_dir=direction,
    )
    return flow._replace(**_unpack_extras(extras, shape.family)) if extras else flow


def unpack_key(key: bytes) -> tuple[Shape, int, int, int, Tuple]:
    """Shape, protocol, zone, direction of the zone and original tuple.  Raises WireError ``malformed``."""
    shape = SHAPES.get(len(key))
    if shape is None:
        raise WireError("malformed", f"flow: key of {len(key)} bytes")
    orig = _tuple(key, 1, shape.address, shape.l4)
    zone, direction = 0, BOTH_DIRECTIONS
    if shape.zone:
        at = shape.key - shape.zone
        zone = key[at] << 8 | key[at + 1]
        if shape.zone == 3:
            direction = key[at + 2]
    return shape, key[0], zone, direction, orig


def _tuple(data: bytes, at: int, address: int, l4: int) -> Tuple:
    middle, ports = at + address, at + 2 * address
    return Tuple(data[at:middle], data[middle:ports], data[ports : ports + l4])


def iter_extras(extras: bytes) -> Iterator[tuple[int, bytes]]:
    """Kind and value of the extras.  Raises WireError ``malformed``."""
    at, end = 0, len(extras)
    while at < end:
        if at + 2 > end or at + 2 + extras[at + 1] > end:
            raise WireError("malformed", "flow: truncated extras")
        kind, length = _TLV.unpack_from(extras, at)
        yield kind, extras[at + 2 : at + 2 + length]
        at += 2 + length


def merge_extras(old: bytes, new: bytes) -> bytes:
    """What is known after both: of each kind the newer one.  Raises WireError ``malformed``."""
    if not old or not new:
        return new or old
    return b"".join(_extra(kind, value) for kind, value in {**dict(iter_extras(old)), **dict(iter_extras(new))}.items())


def merge_value(old: bytes, new: bytes) -> bytes:
    """The newer value over the older one of the same flow: what the newer does not say stays.

    Another reply tuple is another flow: the newer value stands alone.  Both must have the same length.
    """
    at = len(new) - TAIL_BYTES
    if old[:at] != new[:at]:
        return new
    status, timeout, state, scale, flags, mark = TAIL.unpack_from(new, at)
    _status, old_timeout, old_state, old_scale, old_flags, _mark = TAIL.unpack_from(old, at)
    if scale == NO_SCALE:
        scale, flags = old_scale, old_flags
    return new[:at] + TAIL.pack(
        status, old_timeout if timeout == NO_TIMEOUT else timeout, state or old_state, scale, flags, mark
    )


def is_partial(flow: Flow) -> bool:
    """Does the kernel's event leave out what a row must say?  Such a flow is merged into what is known."""
    if flow.timeout is None:
        return True
    if flow.proto == IPPROTO_TCP:
        return flow.state is None or flow.tcp_flags is None
    return flow.proto in (IPPROTO_SCTP, IPPROTO_DCCP) and flow.state is None


def _unpack_extras(extras: bytes, family: int) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    try:
        for kind, value in iter_extras(extras):
            if kind == _LABELS:
                fields["labels"] = value
            elif kind == _HELPER:
                fields["helper"] = value.decode("ascii")
            elif kind == _MASTER:
                address = _ADDRESS_BYTES[family]
                if len(value) - 1 - 2 * address not in (0, 4):
                    raise WireError("malformed", f"flow: master of {len(value)} bytes")
                fields["master_proto"] = value[0]
                fields["master"] = _tuple(value, 1, address, len(value) - 1 - 2 * address)
            elif kind == _SEQADJ:
                numbers = _SEQADJ_PAIR.unpack(value)
                fields["seqadj"] = (SeqAdj(*numbers[:3]), SeqAdj(*numbers[3:]))
            elif kind == _VTAGS:
                fields["sctp_vtags"] = _VTAG_PAIR.unpack(value)
    except (struct.error, UnicodeDecodeError) as error:
        raise WireError("malformed", f"flow: {error!r}") from error
    return fields


# --- sheets ---

_TOGETHER = 32  # rows that are cut off in one step, which takes half the time


def cutter(size: int) -> Callable[[bytes | bytearray], list[bytes]]:
    """Makes a list of joined pieces of ``size`` bytes."""
    many, one = struct.Struct(f"{size}s" * _TOGETHER).iter_unpack, struct.Struct(f"{size}s").iter_unpack
    step = size * _TOGETHER

    def pieces(joined: bytes | bytearray) -> list[bytes]:
        end, view = len(joined) // step * step, memoryview(joined)
        return list(itertools.chain.from_iterable(itertools.chain(many(view[:end]), one(view[end:]))))

    return pieces


_KEYS = {key_len: cutter(key_len) for key_len in SHAPES}
_VALUES = {key_len: cutter(shape.value) for key_len, shape in SHAPES.items()}

Columns = Sequence[bytes]


def split_keys(key_len: int, joined: bytes | bytearray) -> list[bytes]:
    """Joined keys, one by one."""
    return _KEYS[key_len](joined)


class Sheet:
    """Rows of one shape as columns, at least one; of equal keys the last row counts.

    The form in which a flood is handled: a dictionary costs an object for each key and each value, and whoever looks at
    its columns has to join it and cut it up again.  ``columns``: byte k of all rows for each k, key and value.
    """

    __slots__ = ("_keys", "columns", "key_len")

    def __init__(self, key_len: int, columns: Columns) -> None:
        self.key_len = key_len
        self.columns = columns
        self._keys: list[bytes] | None = None

    def __len__(self) -> int:
        return len(self.columns[0])

    @property
    def keys(self) -> list[bytes]:
        if self._keys is None:
            self._keys = split_keys(self.key_len, interleave(self.columns[: self.key_len]))
        return self._keys

    @property
    def values(self) -> list[bytes]:
        """Made anew each time."""
        joined = interleave(self.columns[self.key_len :])
        return _VALUES[self.key_len](joined)

    def rows(self) -> dict[bytes, bytes]:
        """Key to value."""
        return dict(zip(self.keys, self.values))


def interleave(columns: Sequence[bytes | bytearray]) -> bytearray:
    """The joined rows that have these columns."""
    width = len(columns)
    out = bytearray(width * len(columns[0]))
    for at, column in enumerate(columns):
        out[at::width] = column
    return out


def cut(joined: bytes, width: int) -> list[bytes]:
    """The columns of joined rows of ``width`` bytes."""
    return [joined[at::width] for at in range(width)]


def join(parts: Sequence[tuple[int, Sequence[bytes | bytearray]]]) -> tuple[Sheet, ...]:
    """Columns that came one after the other, each with the length of its keys: a sheet for each shape."""
    shapes: dict[int, list[Sequence[bytes | bytearray]]] = {}
    for key_len, columns in parts:
        shapes.setdefault(key_len, []).append(columns)
    return tuple(Sheet(key_len, list(map(b"".join, zip(*found)))) for key_len, found in shapes.items())


class Changes(NamedTuple):
    """What the kernel told since it was last asked, the last state of a flow only; or a part of its table.

    ``rows``: by length of the key, key to value, complete (nothing is left out) and without extras.  ``flows``: those
    that have extras or leave something out (:func:`is_partial`), in order; no key of theirs is in ``rows``.  ``gone``:
    keys of entries that ended; one that is in ``rows`` or ``flows`` too was made anew after its end.
    ``sheets``: rows as columns, one sheet to a shape, where there are many alike; then these three are empty.
    """

    rows: dict[int, dict[bytes, bytes]]
    flows: list[Flow]
    gone: list[bytes]
    events: int = 0  # messages that this was made of
    lost: bool = False  # the kernel dropped events (ENOBUFS): something is missing
    more: bool = False  # the limit was reached, more waits
    sheets: tuple[Sheet, ...] = ()

    def settled(self) -> Changes:
        """The same without sheets."""
        if not self.sheets:
            return self
        return self._replace(rows={sheet.key_len: sheet.rows() for sheet in self.sheets}, sheets=())
