# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A flow: its key and what is known of it.

Addresses, ports and ids stay in network byte order as packed bytes, the way the kernel gives them.
"""

from __future__ import annotations

from typing import NamedTuple

from .constants import (
    IPS_ASSURED,
    IPS_DST_NAT,
    IPS_SEEN_REPLY,
    IPS_SRC_NAT,
)

# <net/netfilter/nf_conntrack_zones.h>: the directions of a flow that its zone belongs to, as a bit mask
ZONE_ORIGINAL = 1  # NF_CT_ZONE_DIR_ORIG
ZONE_REPLY = 2  # NF_CT_ZONE_DIR_REPL
BOTH_DIRECTIONS = 3  # NF_CT_DEFAULT_ZONE_DIR


class Tuple(NamedTuple):
    """One direction of a flow (struct nf_conntrack_tuple).

    ``l4`` is, in network byte order: source port and destination port (TCP, UDP, UDP-Lite, SCTP, DCCP: 4 bytes);
    id, type, code (ICMP, ICMPv6: 2 + 1 + 1 bytes); the two keys (GRE: 4 bytes); empty for every other protocol.
    """

    src: bytes
    dst: bytes
    l4: bytes


class SeqAdj(NamedTuple):
    """NAT sequence adjustment of one direction (struct nf_ct_seqadj)."""

    correction_pos: int
    offset_before: int
    offset_after: int


class Flow(NamedTuple):
    """A conntrack entry.  ``None`` means: the kernel did not say (absent is not "cleared").

    Units: ``timeout`` seconds left, ``start`` nanoseconds since the epoch (CTA_TIMESTAMP_START).
    """

    family: int
    proto: int
    zone: int
    orig: Tuple
    reply: Tuple
    status: int
    timeout: int | None = None
    state: int | None = None  # TCP, SCTP or DCCP state
    tcp_wscale: tuple[int, int] | None = None  # original, reply direction
    tcp_flags: tuple[int, int] | None = None  # original, reply direction (value without mask)
    sctp_vtags: tuple[int, int] | None = None  # original, reply direction
    mark: int | None = None
    labels: bytes | None = None
    helper: str | None = None
    master: Tuple | None = None
    master_proto: int = 0
    seqadj: tuple[SeqAdj, SeqAdj] | None = None
    start: int | None = None
    ident: int | None = None  # CTA_ID
    zone_dir: int = BOTH_DIRECTIONS  # of which direction's tuple the zone is a part: ZONE_ORIGINAL, ZONE_REPLY, both

    @property
    def key(self) -> bytes:
        """What identifies the flow on every node: protocol, original tuple, zone."""
        return flow_key(self.proto, self.zone, self.orig, self.zone_dir)

    @property
    def snat(self) -> bool:
        """The source is translated (IPS_SRC_NAT)."""
        return bool(self.status & IPS_SRC_NAT)

    @property
    def dnat(self) -> bool:
        """The destination is translated (IPS_DST_NAT)."""
        return bool(self.status & IPS_DST_NAT)

    @property
    def assured(self) -> bool:
        return bool(self.status & IPS_ASSURED)

    @property
    def replied(self) -> bool:
        return bool(self.status & IPS_SEEN_REPLY)


def flow_key(proto: int, zone: int, orig: Tuple, zone_dir: int = BOTH_DIRECTIONS) -> bytes:
    """Key of a flow: protocol, original tuple, and the zone if there is one (the layout: :mod:`rows`)."""
    key = b"".join((bytes((proto,)), *orig))
    if zone:
        key += bytes((zone >> 8, zone & 255))
        if zone_dir != BOTH_DIRECTIONS:
            key += bytes((zone_dir,))
    return key


def merge(old: Flow, new: Flow) -> Flow:
    """The newer event over what is known: fields that the newer one lacks keep their old value.

    TCP flags and window scale travel in the same kernel attribute as the state; a DESTROY carries the state alone.
    """
    return new._replace(
        **{name: getattr(old, name) for name in _STICKY if getattr(new, name) is None},
        master_proto=new.master_proto or old.master_proto,
    )


_STICKY = (
    "timeout",
    "state",
    "tcp_wscale",
    "tcp_flags",
    "sctp_vtags",
    "mark",
    "labels",
    "helper",
    "master",
    "seqadj",
    "start",
    "ident",
)
