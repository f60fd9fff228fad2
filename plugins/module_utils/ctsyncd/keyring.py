# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Pre-shared keys while they are changed: which of them two nodes have in common, and which one is used.

A node tells its peer of each key its id and a check value, which says whether both have the same key and nothing else
of it.  It sends with another key only when it knows that the peer has that one, too: a step of a rotation that is
missing, or a wrong key, is seen and cuts nothing.  Pure: no I/O, no clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import wire
from .crypto import Crypto

REPEATED = 8  # heartbeats with the keys after a change: if all of them are lost, the line is down
REFRESHED = 32  # every so many heartbeats, nevertheless


def key_info(what: bytes, key_id: int, sender: str, receiver: str) -> bytes:
    """What a key is for, as HKDF takes it."""
    return b"ctsync " + what + bytes((wire.VERSION, key_id)) + sender.encode() + b"\0" + receiver.encode()


class Agreement:
    """The keys of a session.  ``sends``: id of the one that this node seals with; ``heard``: of the peer's latest
    datagram.  Both begin with the one that the handshake proved."""

    def __init__(self, crypto: Crypto, names: tuple[str, str], salts: tuple[bytes, bytes], key_id: int) -> None:
        """``names``: this node and the peer; ``salts``: of the keys that this node sends with, and the peer."""
        self.sends = key_id
        self.heard = key_id
        self._crypto = crypto
        self._names = names
        self._salts = salts
        self._wanted = key_id
        self._expected: dict[int, bytes] = {}  # check values that the peer tells of this node's keys, if it has them
        self._theirs: wire.Keys | None = None  # None until it told them
        self._frame = b""
        self._repeat = 0
        self._beats = 0

    def hold(self, secrets: Mapping[int, bytes], wanted: int) -> None:
        """This node has these keys from now on, and would send with the one with the id ``wanted``."""
        node, peer = self._names
        own = {key_id: self._check(secrets[key_id], key_id, self._salts[0], node, peer) for key_id in sorted(secrets)}
        self._expected = {
            key_id: self._check(secrets[key_id], key_id, self._salts[1], peer, node) for key_id in sorted(secrets)
        }
        self._wanted = wanted
        self._frame = wire.encode_keys(own)
        self._repeat = REPEATED
        self._choose()

    def told(self, keys: wire.Keys) -> bool:
        """The peer has these keys; returns whether this node is to send with another one now."""
        if keys == self._theirs:
            return False
        self._theirs = keys
        self._repeat = REPEATED
        before = self.sends
        self._choose()
        return before != self.sends

    def riding(self) -> bytes:
        """The frame that goes with a heartbeat, if it is time for it."""
        self._beats += 1
        if self._repeat:
            self._repeat -= 1
        elif self._beats % REFRESHED:
            return b""
        return self._frame

    def describe(self) -> dict[str, Any]:
        return {
            "accepts": None if self._theirs is None else sorted(self._theirs),
            "sends": self.heard,
            "used": self.sends,
            "differ": self._differing(),
        }

    def problems(self) -> list[str]:
        """What an operator should mend."""
        peer = self._names[1]
        found = [f"{peer} has another key under the id {key_id}" for key_id in self._differing()]
        if self._theirs is not None and self._wanted not in self._theirs:
            found.append(f"{peer} does not accept the key {self._wanted} yet")
        if found and self.sends != self._wanted:
            found[-1] += f": this node goes on to send with {self.sends}"
        return found

    def _check(self, secret: bytes, key_id: int, salt: bytes, sender: str, receiver: str) -> bytes:
        return self._crypto.derive_digest(secret, salt, key_info(b"check", key_id, sender, receiver))(b"", b"")

    def _differing(self) -> list[int]:
        theirs = self._theirs or {}
        return [key_id for key_id, check in self._expected.items() if theirs.get(key_id, check) != check]

    def _choose(self) -> None:
        """A key that both have: the wanted one, else the one in use."""
        if self._theirs is None:  # it has not told, or knows nothing of that: one that it used
            common = {self.sends, self.heard} & self._expected.keys()
        else:
            common = {key_id for key_id, check in self._expected.items() if self._theirs.get(key_id) == check}
        for key_id in (self._wanted, self.sends, self.heard, *sorted(common)):
            if key_id in common:
                self.sends = key_id
                return
        self.sends = self._wanted  # they do not understand each other any more
