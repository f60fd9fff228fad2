# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Expectations, the flows that a helper foresees: as ctnetlink's messages and as records of the sync link.  No I/O.

A helper reads the packets of a *master* flow (the control connection of FTP, say) and tells the kernel which flow will
come of it: the first packet that fits tuple and mask becomes a flow that is RELATED to the master, and is translated as
the helper laid down.  See struct nf_conntrack_expect, <linux/netfilter/nfnetlink_conntrack.h> (enum ctattr_expect) and
net/netfilter/nf_conntrack_netlink.c.  What is malformed raises NetlinkError (from the kernel) or WireError (from a
peer) and nothing else.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from . import ctnetlink
from .constants import AF_INET, AF_INET6
from .ctnetlink import Buffer, attribute, attributes, nested
from .errors import NetlinkError, WireError
from .flow import ZONE_REPLY, Flow, Tuple
from .rows import unpack_key

# <linux/netfilter/nfnetlink.h>
NFNL_SUBSYS_CTNETLINK_EXP = 2

# <linux/netfilter/nfnetlink_conntrack.h>: enum ctnl_exp_msg_types
IPCTNL_MSG_EXP_NEW = 0
IPCTNL_MSG_EXP_GET = 1
IPCTNL_MSG_EXP_DELETE = 2

# the same: enum ctattr_expect, ctattr_expect_nat
CTA_EXPECT_MASTER = 1
CTA_EXPECT_TUPLE = 2
CTA_EXPECT_MASK = 3
CTA_EXPECT_TIMEOUT = 4
CTA_EXPECT_ID = 5
CTA_EXPECT_HELP_NAME = 6
CTA_EXPECT_ZONE = 7
CTA_EXPECT_FLAGS = 8
CTA_EXPECT_CLASS = 9
CTA_EXPECT_NAT = 10
CTA_EXPECT_FN = 11
CTA_EXPECT_NAT_DIR = 1
CTA_EXPECT_NAT_TUPLE = 2

# <linux/netfilter/nf_conntrack_common.h>: NF_CT_EXPECT_*
PERMANENT = 0x1  # packets do not use it up
INACTIVE = 0x2  # nothing fits it yet
USERSPACE = 0x4  # made by a helper in user space; the kernel takes this from its own requests only

FLAG_NAMES = ((PERMANENT, "PERMANENT"), (INACTIVE, "INACTIVE"), (USERSPACE, "USERSPACE"))

# <net/netfilter/nf_conntrack_helper.h>: enough for every name of an expect function that the kernel has
FUNCTION_NAME_LEN = 32

# Helpers whose expectations of class 0 give the helper on to the expected flow (SIP's own signalling).  ctnetlink does
# not tell which do.  Older kernels give the helper that a request names to the flow, and take a class with a name only;
# so others are made without a name where that loses nothing.  Newer ones (6.18.44 is) ignore the name.
_HANDING_ON = frozenset(("sip",))

_ADDRESS_BYTES = {AF_INET: 4, AF_INET6: 16}
_NFGEN = struct.Struct("=BBH")
_U16 = struct.Struct(">H")
_U32 = struct.Struct(">I")


class Nat(NamedTuple):
    """How the expected flow is translated: which direction of the master it follows (0 original, 1 reply), and the
    address and the port (2 bytes) that were there before the helper changed them (saved_addr, saved_proto)."""

    direction: int
    address: bytes
    port: bytes


class Expectation(NamedTuple):
    """An entry of the expectation table.

    ``zone`` and ``zone_dir`` are the master's; the kernel's messages do not tell them.  ``mask`` has ones where the
    tuple counts.  ``timeout``: seconds left.  ``helper``: the master's.  ``function``: what sets the expected flow up
    (CTA_EXPECT_FN), "" for none.
    """

    family: int
    proto: int
    expected: Tuple
    mask: Tuple
    master_proto: int
    master: Tuple  # its original tuple
    zone: int = 0
    zone_dir: int = 3  # flow.BOTH_DIRECTIONS
    timeout: int = 0
    flags: int = 0
    klass: int = 0
    helper: str = ""
    nat: Nat | None = None
    function: str = ""
    ident: int | None = None  # CTA_EXPECT_ID
    used: bool = False  # its flow began: kept for a moment in case the flow's first packets are repeated, not made anew

    @property
    def name(self) -> bytes:
        """What identifies the expectation on every node: zone, protocol, tuple and mask."""
        return b"".join((_U16.pack(self.zone), bytes((self.proto,)), *self.expected, *self.mask))

    @property
    def master_flow(self) -> Flow:
        """The master, of which only the identity is known."""
        return Flow(
            self.family,
            self.master_proto,
            self.zone,
            self.master,
            ctnetlink.mirror(self.master_proto, self.master),
            0,
            zone_dir=self.zone_dir,
        )

    @property
    def master_key(self) -> bytes:
        return self.master_flow.key

    def of(self, master: bytes) -> Expectation:
        """The same with the zone of this master (a flow's key)."""
        _shape, _proto, zone, direction, _orig = unpack_key(master)
        return self._replace(zone=zone, zone_dir=direction)

    @property
    def lasting(self) -> tuple[object, ...]:
        """All but what time changes and what is true on one node only."""
        return self._replace(timeout=0, ident=None, used=False)


# --- the kernel's messages ---


def decode(payload: bytes) -> Expectation:
    """The expectation in the payload (struct nfgenmsg and attributes) of a message.  Raises NetlinkError."""
    if len(payload) < _NFGEN.size:
        raise NetlinkError(f"nfgenmsg of {len(payload)} bytes")
    family = payload[0]
    if family not in _ADDRESS_BYTES:
        raise NetlinkError(f"address family {family} is neither IPv4 nor IPv6")
    found = attributes(payload, _NFGEN.size)
    value = found.get
    try:
        proto, expected, _zone = ctnetlink.decode_tuple(found[CTA_EXPECT_TUPLE], family)
        mask_proto, mask, _zone = ctnetlink.decode_tuple(found[CTA_EXPECT_MASK], family)
        master_proto, master, _zone = ctnetlink.decode_tuple(found[CTA_EXPECT_MASTER], family)
    except KeyError as missing:
        raise NetlinkError(f"expectation without attribute {missing}") from None
    if mask_proto != proto or len(mask.l4) != len(expected.l4):
        raise NetlinkError(f"expectation of protocol {proto} with a mask of {mask_proto}")
    nat = None
    if (part := value(CTA_EXPECT_NAT)) is not None:
        nat = _decode_nat(part, family)
    zone = value(CTA_EXPECT_ZONE)
    return Expectation(
        family,
        proto,
        expected,
        mask,
        master_proto,
        master,
        zone=0 if zone is None else _u16(zone, "CTA_EXPECT_ZONE"),
        timeout=_number(found, CTA_EXPECT_TIMEOUT),
        flags=_number(found, CTA_EXPECT_FLAGS),
        klass=_number(found, CTA_EXPECT_CLASS),
        helper=_name(value(CTA_EXPECT_HELP_NAME, b""), ctnetlink.HELPER_NAME_LEN, "helper"),
        nat=nat,
        function=_name(value(CTA_EXPECT_FN, b""), FUNCTION_NAME_LEN, "expect function"),
        ident=_number(found, CTA_EXPECT_ID) if CTA_EXPECT_ID in found else None,
    )


def _number(found: dict[int, bytes], kind: int) -> int:
    value = found.get(kind, b"\0\0\0\0")
    if len(value) != 4:
        raise NetlinkError(f"attribute {kind} of an expectation has {len(value)} bytes")
    return int(_U32.unpack(value)[0])


def _u16(value: bytes, name: str) -> int:
    if len(value) != 2:
        raise NetlinkError(f"{name} has {len(value)} bytes")
    return int(_U16.unpack(value)[0])


def _name(value: bytes, limit: int, what: str) -> str:
    """A name that ends with a NUL."""
    name = value.split(b"\0", 1)[0]
    if len(name) >= limit or not _is_word(name):
        raise NetlinkError(f"name of a {what}: {name!r}")
    return name.decode("ascii")


def _decode_nat(value: bytes, family: int) -> Nat | None:
    parts = attributes(value)
    if CTA_EXPECT_NAT_DIR not in parts or CTA_EXPECT_NAT_TUPLE not in parts:
        raise NetlinkError("translation of an expectation without direction or tuple")
    direction = _number(parts, CTA_EXPECT_NAT_DIR)
    if direction > 1:
        raise NetlinkError(f"direction {direction} of an expectation's translation")
    _proto, saved, _zone = ctnetlink.decode_tuple(parts[CTA_EXPECT_NAT_TUPLE], family)
    return Nat(direction, saved.src, saved.l4[:2] or b"\0\0")


def _is_word(name: bytes) -> bool:
    """Of ASCII's visible characters alone."""
    return all(33 <= byte < 127 for byte in name)


class Message(NamedTuple):
    """One message from the kernel: ``gone`` says that the expectation was used up, ended or was removed.

    Without an expectation: the end of a dump or an error (``errno``, 0 for success).
    """

    expectation: Expectation | None
    gone: bool = False
    portid: int = 0
    flags: int = 0
    errno: int = 0


def parse_messages(data: Buffer) -> Iterator[Message]:
    """The messages about expectations, errors and end marks in a netlink buffer, in order; others are skipped.

    Raises NetlinkError where the buffer is malformed; what was yielded before is good.
    """
    for kind, flags, _seq, portid, payload in ctnetlink.split(data):
        if kind >> 8 == NFNL_SUBSYS_CTNETLINK_EXP:
            what = kind & 0xFF
            if what in (IPCTNL_MSG_EXP_NEW, IPCTNL_MSG_EXP_DELETE):
                yield Message(decode(payload), what == IPCTNL_MSG_EXP_DELETE, portid, flags)
        elif kind == ctnetlink.NLMSG_ERROR:
            yield Message(None, False, portid, flags, ctnetlink.parse_errno(payload, required=True))
        elif kind == ctnetlink.NLMSG_DONE:
            yield Message(None, True, portid, flags, ctnetlink.parse_errno(payload))


def _request(what: int, flags: int, seq: int, family: int, *parts: bytes) -> bytes:
    payload = _NFGEN.pack(family, 0, 0) + b"".join(parts)
    return ctnetlink.message(NFNL_SUBSYS_CTNETLINK_EXP << 8 | what, flags, seq, payload)


def _identity(expectation: Expectation, zone: int) -> bytes:
    """Tuple, mask, master and zone: what every request for one expectation must have."""
    family, proto = expectation.family, expectation.proto
    return b"".join(
        (
            ctnetlink.encode_tuple(CTA_EXPECT_TUPLE, family, proto, expectation.expected),
            ctnetlink.encode_tuple(CTA_EXPECT_MASK, family, proto, expectation.mask),
            ctnetlink.encode_tuple(CTA_EXPECT_MASTER, family, expectation.master_proto, expectation.master),
            attribute(CTA_EXPECT_ZONE, _U16.pack(zone)) if zone else b"",
        )
    )


def create(expectation: Expectation, seq: int = 0, *, named: bool = True) -> bytes:
    """Request to make the expectation; EEXIST if there is one with this tuple.

    The kernel answers ENOENT without the master, EOPNOTSUPP if the master has no helper or the helper is unknown,
    EINVAL for an unknown function or class, EBUSY if another expectation overlaps, EMFILE if there are too many.  Its
    timer is that of the helper's policy, whatever the request says (nf_ct_expect_insert): see :func:`set_timer`.
    ``named`` False leaves helper and class out.  Raises NetlinkError if the expectation cannot be expressed.
    """
    family = expectation.family
    # nf_conntrack_find_get looks for the master by its original tuple, which a zone of replies is no part of
    zone = 0 if expectation.zone_dir == ZONE_REPLY else expectation.zone
    helper = expectation.helper
    parts = [_identity(expectation, zone), attribute(CTA_EXPECT_TIMEOUT, _U32.pack(expectation.timeout))]
    parts.append(attribute(CTA_EXPECT_FLAGS, _U32.pack(expectation.flags & ~USERSPACE)))
    if named and helper and (expectation.klass or helper in _HANDING_ON):
        parts.append(attribute(CTA_EXPECT_CLASS, _U32.pack(expectation.klass)))
        parts.append(attribute(CTA_EXPECT_HELP_NAME, _packed_name(helper, ctnetlink.HELPER_NAME_LEN)))
    if expectation.nat is not None:
        direction, address, port = expectation.nat
        saved = Tuple(address, bytes(len(address)), port + b"\0\0" if expectation.master.l4 else b"")
        parts.append(
            nested(
                CTA_EXPECT_NAT,
                attribute(CTA_EXPECT_NAT_DIR, _U32.pack(direction)),
                ctnetlink.encode_tuple(CTA_EXPECT_NAT_TUPLE, family, expectation.master_proto, saved),
            )
        )
    if expectation.function:
        parts.append(attribute(CTA_EXPECT_FN, _packed_name(expectation.function, FUNCTION_NAME_LEN)))
    flags = ctnetlink.NLM_F_CREATE | ctnetlink.NLM_F_EXCL
    return _request(IPCTNL_MSG_EXP_NEW, flags, seq, family, *parts)


def _packed_name(name: str, limit: int) -> bytes:
    if not name.isascii() or "\0" in name or len(name) >= limit:
        raise NetlinkError(f"name {name!r}")
    return name.encode("ascii") + b"\0"


def set_timer(expectation: Expectation, seconds: int, seq: int = 0) -> bytes:
    """Request to give an existing expectation this timeout; ENOENT if there is none, ETIME if it is just ending."""
    timeout = attribute(CTA_EXPECT_TIMEOUT, _U32.pack(seconds))
    return _request(IPCTNL_MSG_EXP_NEW, 0, seq, expectation.family, _identity(expectation, expectation.zone), timeout)


def delete(expectation: Expectation, seq: int = 0) -> bytes:
    """Request to remove the expectation with this tuple, mask and zone; ENOENT if there is none."""
    return _request(IPCTNL_MSG_EXP_DELETE, 0, seq, expectation.family, _identity(expectation, expectation.zone))


def dump(seq: int = 0) -> bytes:
    """Request for the whole expectation table."""
    return _request(IPCTNL_MSG_EXP_GET, ctnetlink.NLM_F_DUMP, seq, 0)


def dump_of(master: Flow, seq: int = 0) -> bytes:
    """Request for the expectations of one flow; ENOENT if there is no such flow."""
    zone = 0 if master.zone_dir == ZONE_REPLY else master.zone
    return _request(
        IPCTNL_MSG_EXP_GET,
        ctnetlink.NLM_F_DUMP,
        seq,
        master.family,
        ctnetlink.encode_tuple(CTA_EXPECT_MASTER, master.family, master.proto, master.orig),
        attribute(CTA_EXPECT_ZONE, _U16.pack(zone)) if zone else b"",
    )


# --- records of the sync link (docs/protocol.md, Expectations) ---

_RECORD = struct.Struct("!IIIB")  # timeout, flags, class, length of the master's key
_FIELD = struct.Struct("!BB")
_FIELD_NAT = 1
_FIELD_HELPER = 2
_FIELD_FUNCTION = 3
_FIELD_USED = 4

# Length of a name -> family, bytes of layer 4
_NAMES = {3 + 2 * (2 * size + l4): (family, size, l4) for family, size in _ADDRESS_BYTES.items() for l4 in (0, 4)}


def pack(expectation: Expectation) -> bytes:
    """Payload of EXPECT.  What is true on one node only (CTA_EXPECT_ID, made in user space) is left out."""
    name, master = expectation.name, expectation.master_key
    out = [bytes((len(name),)), name]
    flags = expectation.flags & ~USERSPACE
    out.append(_RECORD.pack(min(expectation.timeout, 0xFFFFFFFF), flags, expectation.klass, len(master)))
    out.append(master)
    if expectation.nat is not None:
        direction, address, port = expectation.nat
        out.append(_field(_FIELD_NAT, bytes((direction,)) + address + port))
    if expectation.helper:
        out.append(_field(_FIELD_HELPER, expectation.helper.encode("ascii")))
    if expectation.function:
        out.append(_field(_FIELD_FUNCTION, expectation.function.encode("ascii")))
    if expectation.used:
        out.append(_field(_FIELD_USED, b""))
    return b"".join(out)


def _field(kind: int, value: bytes) -> bytes:
    return _FIELD.pack(kind, len(value)) + value


def unpack(payload: bytes) -> Expectation:
    """The expectation of EXPECT; unknown fields are skipped.  Raises WireError ``malformed``."""
    end = 1 + payload[0] if payload else 0
    name = unpack_name(payload[1:end])
    if len(payload) < end + _RECORD.size:
        raise WireError("malformed", "expectation: truncated")
    timeout, flags, klass, key_len = _RECORD.unpack_from(payload, end)
    at = end + _RECORD.size
    shape, master_proto, zone, direction, master = unpack_key(payload[at : at + key_len])
    family, zone_of_name, proto, expected, mask = name
    if (shape.family, zone) != (family, zone_of_name) or (shape.zone and not zone) or direction not in (1, 2, 3):
        raise WireError("malformed", "expectation: another family or zone than its master's")
    if shape.zone == 3 and direction == 3:
        raise WireError("malformed", "key: direction of the zone")
    fields = _unpack_fields(payload, at + key_len, shape.address)
    return Expectation(
        family,
        proto,
        expected,
        mask,
        master_proto,
        master,
        zone,
        direction,
        timeout,
        flags & ~USERSPACE,
        klass,
        fields.helper,
        fields.nat,
        fields.function,
        used=fields.used,
    )


class _Fields(NamedTuple):
    nat: Nat | None = None
    helper: str = ""
    function: str = ""
    used: bool = False


def _unpack_fields(payload: bytes, at: int, address: int) -> _Fields:
    fields = _Fields()
    while at < len(payload):
        if at + _FIELD.size > len(payload):
            raise WireError("malformed", "expectation: truncated field")
        kind, length = _FIELD.unpack_from(payload, at)
        at += _FIELD.size
        value = payload[at : at + length]
        if len(value) != length:
            raise WireError("malformed", "expectation: truncated field")
        at += length
        if kind == _FIELD_NAT:
            if length != 3 + address or value[0] > 1:
                raise WireError("malformed", "expectation: translation")
            fields = fields._replace(nat=Nat(value[0], value[1:-2], value[-2:]))
        elif kind == _FIELD_HELPER:
            fields = fields._replace(helper=_wire_name(value, ctnetlink.HELPER_NAME_LEN))
        elif kind == _FIELD_FUNCTION:
            fields = fields._replace(function=_wire_name(value, FUNCTION_NAME_LEN))
        elif kind == _FIELD_USED:
            fields = fields._replace(used=True)
    return fields


def _wire_name(value: bytes, limit: int) -> str:
    if not value or len(value) >= limit or not _is_word(value):
        raise WireError("malformed", "expectation: name")
    return value.decode("ascii")


def unpack_name(name: bytes) -> tuple[int, int, int, Tuple, Tuple]:
    """Family, zone, protocol, tuple and mask of an expectation's name.  Raises WireError ``malformed``."""
    found = _NAMES.get(len(name))
    if found is None:
        raise WireError("malformed", f"expectation: name of {len(name)} bytes")
    family, size, l4 = found
    whole = 2 * size + l4
    tuples = [
        Tuple(name[at : at + size], name[at + size : at + 2 * size], name[at + 2 * size : at + whole])
        for at in (3, 3 + whole)
    ]
    return family, name[0] << 8 | name[1], name[2], tuples[0], tuples[1]
