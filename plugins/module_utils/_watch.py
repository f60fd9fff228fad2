# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Who answers for a virtual IP, asked by ARP, and for how long nobody did.

Private to this collection. RFC 826 (ARP), RFC 5227 section 1.1 (a probe has no sender address, so that it changes no
neighbour's table).
"""

from __future__ import annotations

import socket
import struct
from typing import Any, Dict, Iterable, List, Mapping, NamedTuple, Optional

ETH_P_ARP = 0x0806
ARPHRD_ETHER = 1
BROADCAST = b"\xff" * 6
_ETHERNET = struct.Struct("!6s6sH")
_ARP = struct.Struct("!HHBBH6s4s6s4s")
_REQUEST, _REPLY = 1, 2


class Answer(NamedTuple):
    """An ARP reply."""

    mac: bytes
    address: str


def probe(own_mac: bytes, address: str, to_mac: Optional[bytes] = None) -> bytes:
    """An ARP probe for an IPv4 address as an Ethernet frame; to one host, so that no other is bothered, or to all."""
    head = _ETHERNET.pack(to_mac or BROADCAST, own_mac, ETH_P_ARP)
    body = _ARP.pack(ARPHRD_ETHER, 0x0800, 6, 4, _REQUEST, own_mac, bytes(4), bytes(6), socket.inet_aton(address))
    return head + body


def parse_answer(frame: bytes) -> Optional[Answer]:
    """The reply that a frame holds; ``None`` for everything else."""
    if len(frame) < _ETHERNET.size + _ARP.size or _ETHERNET.unpack_from(frame)[2] != ETH_P_ARP:
        return None
    hardware, protocol, mac_len, address_len, operation, mac, address, _mac, _address = _ARP.unpack_from(
        frame, _ETHERNET.size
    )
    if (hardware, protocol, mac_len, address_len, operation) != (ARPHRD_ETHER, 0x0800, 6, 4, _REPLY):
        return None
    return Answer(mac, socket.inet_ntoa(address))


def first_of_each_interface(virtual_ips: Iterable[Mapping[str, Any]]) -> List[Dict[str, str]]:
    """One IPv4 address for each interface: those of an interface move together."""
    chosen: Dict[str, str] = {}
    for vip in virtual_ips:
        address = str(vip["address"]).split("/", maxsplit=1)[0]
        if ":" not in address:
            chosen.setdefault(str(vip["interface"]), address)
    return [{"interface": interface, "address": address} for interface, address in chosen.items()]


class Watch:
    """What was seen of one virtual IP. Times in seconds of one clock."""

    def __init__(self, interface: str, address: str) -> None:
        self.interface = interface
        self.address = address
        self.mac: Optional[bytes] = None  # of the node that answered last
        self.probes = 0
        self.answers = 0
        self.answered_at: Optional[float] = None
        self.held_at: Optional[float] = None

    def answered(self, answer: Answer, now: float) -> None:
        if answer.address == self.address:
            self.mac = answer.mac
            self.answers += 1
            self.answered_at = now

    def held(self, now: float) -> None:
        """This node has the address now."""
        if self.held_at is None:
            self.held_at = now

    def result(self) -> Dict[str, Any]:
        """``gap_ms``: from the other node's last answer until this node had the address; 0 when both did for a
        moment; ``None`` when the other never answered or this node never got it."""
        gap = None
        if self.held_at is not None and self.answered_at is not None:
            gap = round(max(0.0, self.held_at - self.answered_at) * 1000)
        return {
            "interface": self.interface,
            "address": self.address,
            "answers": self.answers,
            "probes": self.probes,
            "gap_ms": gap,
            "held": self.held_at is not None,
        }
