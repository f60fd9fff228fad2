# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What else a sync group of keepalived watches, and how its advertisements are sealed: options to values and to text.

This module is private to the collection, a part of :mod:`_keepalived`.  It reads no file and runs no command.

Tried with keepalived 2.2.7 (tests/integration): a tracked interface or BFD neighbour without a weight puts the whole
group into FAULT, whatever ``nopreempt`` says; with a weight it only lowers the priority, which an active node with
``nopreempt`` does not act upon.  A reload starts and ends the BFD process as needed.

Sources: keepalived.conf(5) of 2.2.7; for ``auth_hmac`` keepalived's article on VRRP HMAC authentication (2.4.0).
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Any, Dict, List, Mapping, Sequence, Tuple

SINCE_HMAC = (2, 4, 0)
BFD_DEFAULTS: Dict[str, Any] = {"min_rx_ms": 50.0, "min_tx_ms": 50.0, "idle_tx_ms": 1000.0, "multiplier": 5}

_BFD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,30}")
_INTERFACE = re.compile(r"[^\s/:%{}\"'#!\x00-\x1f\x7f]{1,15}")
_KEY = re.compile(r"(?:[0-9A-Fa-f]{2}){32,64}")
_KEY_LINE = re.compile(r"(?m)^(\s*key \d+ )\S+$")


@dataclass(frozen=True)
class TrackedInterface:
    """An interface that the group needs.  ``weight``: what its loss adds to the priority; 0 makes FAULT of it."""

    interface: str
    weight: int = 0


@dataclass(frozen=True)
class Neighbour:
    """A neighbour that answers BFD (RFC 5880); intervals in milliseconds, ``weight`` as for an interface."""

    name: str
    neighbour: str
    source: str
    min_rx_ms: float
    min_tx_ms: float
    idle_tx_ms: float
    multiplier: int
    passive: bool = False
    weight: int = 0


@dataclass(frozen=True)
class Authentication:
    """``keys``: id and hexadecimal text of each; ``send_key``: id to send with; ``time_window_s`` 0 for the default."""

    keys: Tuple[Tuple[int, str], ...]
    send_key: int
    mode: str = "enforce"
    anti_replay: str = "time"
    time_window_s: int = 0


def _weight(value: Any, where: str, problems: List[str]) -> int:
    weight = int(value or 0)
    if not -253 <= weight <= 0:
        problems.append(f"{where}.weight: {weight} is out of range: choose -253 to -1, or 0 for the state FAULT")
    return weight


def build_interfaces(
    raw: Sequence[Mapping[str, Any]], carriers: Sequence[str], problems: List[str]
) -> Tuple[TrackedInterface, ...]:
    """``carriers`` are the interfaces of the instances, which keepalived watches anyway."""
    found: List[TrackedInterface] = []
    for number, entry in enumerate(raw):
        where, name = f"track_interfaces[{number}]", str(entry.get("interface") or "")
        if not _INTERFACE.fullmatch(name):
            problems.append(f"{where}.interface: {name!r} is not an interface name (1 to 15 characters)")
        elif name in carriers:
            problems.append(f"{where}.interface: {name} carries an instance, and is watched anyway: leave it out")
        elif name in (other.interface for other in found):
            problems.append(f"{where}.interface: {name} stands twice: remove one")
        found.append(TrackedInterface(name, _weight(entry.get("weight"), where, problems)))
    return tuple(found)


def build_neighbours(raw: Sequence[Mapping[str, Any]], problems: List[str]) -> Tuple[Neighbour, ...]:
    """The option ``bfd``; keepalived itself takes a session of two families, or with itself, without a word."""
    found: List[Neighbour] = []
    for number, entry in enumerate(raw):
        where = f"bfd[{number}]"
        name = str(entry.get("name") or f"bfd_{number + 1}")
        if not _BFD_NAME.fullmatch(name):
            problems.append(f"{where}.name: {name!r}: use letters, digits, '.', '_' and '-', at most 31")
        elif name in (other.name for other in found):
            problems.append(f"{where}.name: {name} stands twice: names must differ")
        versions = {}
        for key in ("neighbour", "source"):
            try:
                versions[key] = ipaddress.ip_address(str(entry.get(key) or "")).version
            except ValueError:
                problems.append(f"{where}.{key}: {str(entry.get(key) or '')!r} is not an IP address")
        if len(set(versions.values())) > 1:
            problems.append(f"{where}.source: {entry['source']} is not of the family of {entry['neighbour']}")
        elif len(versions) == 2 and str(entry["source"]) == str(entry["neighbour"]):
            problems.append(f"{where}.neighbour: {entry['neighbour']} is the source itself: name another machine")
        values = {key: BFD_DEFAULTS[key] if entry.get(key) is None else entry[key] for key in BFD_DEFAULTS}
        for key, low, high in (("min_rx_ms", 1, 1000), ("min_tx_ms", 1, 1000), ("idle_tx_ms", 1000, 10000)):
            if not low <= float(values[key]) <= high:
                problems.append(f"{where}.{key}: {values[key]:g} is out of range: choose {low} to {high}")
        if not 1 <= int(values["multiplier"]) <= 255:
            problems.append(f"{where}.multiplier: {values['multiplier']} is out of range: choose 1 to 255")
        found.append(
            Neighbour(
                name,
                str(entry.get("neighbour") or ""),
                str(entry.get("source") or ""),
                passive=bool(entry.get("passive")),
                weight=_weight(entry.get("weight"), where, problems),
                **values,
            )
        )
    return tuple(found)


def build_authentication(raw: Any, problems: List[str]) -> Any:
    """An :class:`Authentication`, or ``None`` for none.  No sentence has any part of a key."""
    if not raw:
        return None
    keys: List[Tuple[int, str]] = []
    for number, entry in enumerate(raw.get("keys") or ()):
        where, ident = f"authentication.keys[{number}]", int(entry.get("id") or 0)
        if not 1 <= ident <= 255:
            problems.append(f"{where}.id: {ident} is out of range: choose 1 to 255")
        if ident in (other for other, _key in keys):
            problems.append(f"{where}.id: {ident} stands twice: give every key an id of its own")
        if not _KEY.fullmatch(str(entry.get("key") or "").strip()):
            problems.append(f"{where}.key: is not 64 to 128 hexadecimal digits: make one with: openssl rand -hex 32")
        keys.append((ident, str(entry.get("key") or "").strip().lower()))
    if not keys:
        problems.append("authentication.keys: is empty: name at least one key, or leave authentication out")
    idents = [ident for ident, _key in keys]
    send = raw.get("send_key")
    send = idents[0] if send is None and len(idents) == 1 else send
    if send is None and keys:
        problems.append("authentication.send_key: is missing: of several keys, name the id to send with")
    elif keys and send not in idents:
        problems.append(f"authentication.send_key: there is no key {send}: choose {' or '.join(map(str, idents))}")
    window = int(raw.get("time_window_s") or 0)
    replay = str(raw.get("anti_replay") or "time")
    if window and not 1 <= window <= 300:
        problems.append(f"authentication.time_window_s: {window} is out of range: choose 1 to 300")
    if window and replay != "time":
        problems.append("authentication.time_window_s: has no effect with anti_replay monotonic: leave it out")
    return Authentication(tuple(keys), int(send or 0), str(raw.get("mode") or "enforce"), replay, window)


def hmac_problem(version: Tuple[int, ...]) -> str:
    """Why a keepalived of this version cannot authenticate; empty if it can, or is not known."""
    if not version or version >= SINCE_HMAC:
        return ""
    return (
        f"authentication: keepalived {'.'.join(map(str, version))} has none for VRRPv3 (RFC 5798 took the passwords"
        " away, auth_hmac came with keepalived 2.4.0): leave it out, or install a newer keepalived on all nodes."
        " Without it, the ruleset takes VRRP from the peers' addresses only, and keepalived only with TTL 255, from"
        " the same link"
    )


def render_neighbour(neighbour: Neighbour) -> List[str]:
    """The lines within the braces of ``bfd_instance``.  TTL 255 both ways: a neighbour on the link (RFC 5881, 5)."""
    return [
        f"neighbor_ip {neighbour.neighbour}",
        f"source_ip {neighbour.source}",
        f"min_rx {neighbour.min_rx_ms:g}",
        f"min_tx {neighbour.min_tx_ms:g}",
        f"idle_tx {neighbour.idle_tx_ms:g}",
        f"multiplier {neighbour.multiplier}",
        "hoplimit 255" if ":" in neighbour.neighbour else "ttl 255",
        *(["passive"] if neighbour.passive else []),
    ]


def render_authentication(authentication: Authentication) -> List[str]:
    """The lines within the braces of ``auth_hmac``."""
    return [
        *(f"key {ident} hex:{key}" for ident, key in authentication.keys),
        f"active_key {authentication.send_key}",
        f"mode {authentication.mode}",
        f"anti_replay {authentication.anti_replay}",
        *([f"time_window {authentication.time_window_s}"] if authentication.time_window_s else []),
    ]


def weighted(name: str, weight: int) -> str:
    """A line of a track block."""
    return f"{name} weight {weight}" if weight else name


def hide_keys(text: str) -> str:
    """A configuration as it may be shown."""
    return _KEY_LINE.sub(r"\1(not shown)", text)
