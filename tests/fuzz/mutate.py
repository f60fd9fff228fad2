# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Mutations of good inputs: blind ones, and ones that know where lengths and nested records are.  Seeded, no state."""

from __future__ import annotations

import copy
import json
import random
import struct
from typing import Any, Callable, NamedTuple, Sequence

Mutation = Callable[[random.Random, bytearray, "Grammar"], bytearray]
Field = "tuple[int, struct.Struct]"

_U8, _BE16, _BE32, _BE64 = (struct.Struct(code) for code in ("B", ">H", ">I", ">Q"))
_NE16, _NE32 = struct.Struct("=H"), struct.Struct("=I")
_WIDTHS = (_U8, _BE16, _BE32, _BE64, _NE16, _NE32)
_MAX_BYTES = 9216  # what the daemon's largest read of a datagram takes


class Grammar(NamedTuple):
    """What mutations know of a format.

    ``lengths``: where the length fields of an input are; ``wrap``: an input as the payload of a record of that kind;
    ``words``: byte strings that mean something; ``text``: the format is JSON in UTF-8.
    """

    seeds: Sequence[bytes]
    lengths: Callable[[bytes], list[tuple[int, struct.Struct]]] | None = None
    wrap: Callable[[int, bytes], bytes] | None = None
    kinds: Sequence[int] = ()
    words: Sequence[bytes] = ()
    text: bool = False
    limit: int = _MAX_BYTES


# --- where lengths are ---


def tlv_lengths(data: bytes, start: int = 0, depth: int = 0) -> list[tuple[int, struct.Struct]]:
    """Length fields of the sync protocol's frames, records and fields, as far as they can be followed."""
    found: list[tuple[int, struct.Struct]] = []
    at = start
    while at + 3 <= len(data):
        found.append((at + 1, _BE16))
        length = _BE16.unpack_from(data, at + 1)[0]
        if depth == 0 and data[at] == 1 and length > 11:  # records of a block, behind its number
            inner = tlv_lengths(data[: at + 3 + length], at + 11, 1)
            found += inner
        at += 3 + length
    return found


def netlink_lengths(data: bytes) -> list[tuple[int, struct.Struct]]:
    """Length fields of netlink messages and of their attributes, nested ones included."""
    found: list[tuple[int, struct.Struct]] = []
    at = 0
    while at + 16 <= len(data):
        length = _NE32.unpack_from(data, at)[0]
        if not 16 <= length <= len(data) - at:
            break
        found.append((at, _NE32))
        _attribute_lengths(data, at + 20, at + length, found, 0)
        at += (length + 3) & ~3
    return found


def _attribute_lengths(data: bytes, at: int, end: int, found: list[tuple[int, struct.Struct]], depth: int) -> None:
    while at + 4 <= end:
        length, kind = _NE16.unpack_from(data, at)[0], _NE16.unpack_from(data, at + 2)[0]
        if not 4 <= length <= end - at:
            return
        found.append((at, _NE16))
        if kind & 0x8000 and depth < 4:
            _attribute_lengths(data, at + 4, at + length, found, depth + 1)
        at += (length + 3) & ~3


# --- mutations ---


def _place(rng: random.Random, data: bytearray) -> int:
    return int(rng.random() * len(data)) if data else 0


def _flip(rng: random.Random, data: bytearray, _grammar: Grammar) -> bytearray:
    for _dummy in range(1 + int(rng.random() * 4)):
        if data:
            data[_place(rng, data)] ^= 1 << int(rng.random() * 8)
    return data


def _truncate(rng: random.Random, data: bytearray, _grammar: Grammar) -> bytearray:
    return data[: _place(rng, data)]


def _extreme(rng: random.Random, data: bytearray, _grammar: Grammar) -> bytearray:
    """An integer of some width becomes 0, 1, its greatest, the middle or next to one of these."""
    _write_extreme(rng, data, _place(rng, data), _WIDTHS[int(rng.random() * 6)])
    return data


def _write_extreme(rng: random.Random, data: bytearray, at: int, width: struct.Struct) -> None:
    bits = 8 * width.size
    choice = (0, 1, (1 << bits) - 1, 1 << bits - 1, (1 << bits - 1) - 1, (1 << bits) - 2)[int(rng.random() * 6)]
    if at + width.size <= len(data):
        width.pack_into(data, at, choice)


def _length(rng: random.Random, data: bytearray, grammar: Grammar) -> bytearray:
    """A length field lies: by a little, or as much as it can."""
    places = grammar.lengths(bytes(data)) if grammar.lengths is not None else []
    if not places:
        return _extreme(rng, data, grammar)
    at, width = places[int(rng.random() * len(places))]
    if rng.random() < 0.3:
        _write_extreme(rng, data, at, width)
    else:
        mask = (1 << 8 * width.size) - 1
        width.pack_into(data, at, (width.unpack_from(data, at)[0] + int(rng.random() * 17) - 8) & mask)
    return data


def _nest(rng: random.Random, data: bytearray, grammar: Grammar) -> bytearray:
    """The input, or a piece of it, as the payload of records within records."""
    if grammar.wrap is None:
        return _duplicate(rng, data, grammar)
    start = 0 if rng.random() < 0.5 else _place(rng, data)
    inner = bytes(data[start:])
    for _dummy in range(1 + int(rng.random() ** 3 * 40)):
        inner = grammar.wrap(grammar.kinds[int(rng.random() * len(grammar.kinds))], inner[:65000])
    return data[:start] + inner


def _duplicate(rng: random.Random, data: bytearray, _grammar: Grammar) -> bytearray:
    start = _place(rng, data)
    end = start + 1 + int(rng.random() ** 2 * (len(data) - start))
    return data[:end] + data[start:end] * (1 + int(rng.random() ** 4 * 60)) + data[end:]


def _delete(rng: random.Random, data: bytearray, _grammar: Grammar) -> bytearray:
    start = _place(rng, data)
    del data[start : start + 1 + int(rng.random() ** 2 * (len(data) - start))]
    return data


def _splice(rng: random.Random, data: bytearray, grammar: Grammar) -> bytearray:
    other = grammar.seeds[int(rng.random() * len(grammar.seeds))]
    return data[: _place(rng, data)] + other[int(rng.random() * (len(other) + 1)) :]


def _word(rng: random.Random, data: bytearray, grammar: Grammar) -> bytearray:
    if not grammar.words:
        return _flip(rng, data, grammar)
    word = grammar.words[int(rng.random() * len(grammar.words))]
    at = _place(rng, data)
    if rng.random() < 0.5:
        data[at : at + len(word)] = word
    else:
        data[at:at] = word
    return data


_MUTATIONS: tuple[Mutation, ...] = (_flip, _extreme, _length, _length, _truncate, _splice, _word, _nest)
_MUTATIONS += (_duplicate, _delete)

# --- JSON ---

_SCALARS: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 255, 256, 65535, 65536, 2**31, 2**63, 2**64, -(2**63), 10**400, 0.5, 1e308),
    *(float("nan"), float("inf"), "", " ", "/", "//", "/x/", "/\0", "\ud800", "/\ud800", "\udcff", "é", "/é" * 60),
    *(
        "e\u0301" * 7,
        "eth0\ud800",
        "\U0001f600" * 15,
        "1",
        "01",
        "-1",
        "1e3",
        "\u0661",
        "٣" * 3,
        "key-1",
        "..",
        "a" * 70,
    ),
    *("10.0.0.1", "10.0.0.1/24", "10.0.0.0/8", "0.0.0.0", "255.255.255.255", "224.0.0.1", "127.0.0.1", "010.0.0.1"),
    *(
        "::",
        "::1",
        "fe80::1",
        "fe80::1%eth0",
        "fe80::%eth0/64",
        "fe80::%/64",
        "::ffff:10.0.0.1",
        "::/0",
        "0/0",
        "1" * 300,
    ),
    *("10.0.0.0/" + "9" * 30, "10.0.0.0/0.0.0.255", "10.0.0.0/255.0.255.0", [], {}, [[]], [None], {"": None}),
)


def _walk(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Every place in a document: container and key or index."""
    if isinstance(value, dict):
        for key, item in value.items():
            found.append((value, key))
            _walk(item, found)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            found.append((value, index))
            _walk(item, found)
    return found


def _document(rng: random.Random, data: bytearray, grammar: Grammar) -> bytearray:
    """Change the JSON document itself: values, keys, nesting, doubled keys."""
    try:
        document = json.loads(data)
        for _dummy in range(1 + int(rng.random() * 3)):
            places = _walk(document, [])
            if not places:
                break
            where, key = places[int(rng.random() * len(places))]
            action = rng.random()
            if action < 0.5:
                value = _SCALARS[int(rng.random() * len(_SCALARS))]
                where[key] = copy.deepcopy(value) if isinstance(value, (list, dict)) else value
            elif action < 0.65:
                other, name = places[int(rng.random() * len(places))]
                where[key] = json.loads(json.dumps(other[name]))
            elif action < 0.75:
                del where[key]
            elif action < 0.9 and isinstance(where, dict):
                name = _SCALARS[int(rng.random() * len(_SCALARS))]
                where[str(name)] = where.pop(key)
            elif isinstance(where, list) and len(where) < 1000:
                where += where * (1 + int(rng.random() ** 4 * 50))
        text = json.dumps(document)
    except (ValueError, RecursionError):
        return _splice(rng, data, grammar)
    if rng.random() < 0.05:
        depth = 1 + int(rng.random() ** 2 * 3000)
        text = text.replace("1", "[" * depth + "1" + "]" * depth, 1)
    if rng.random() < 0.05:
        text = text.replace("1", "1" * (1 + int(rng.random() * 6000)), 1)
    if rng.random() < 0.1:
        text = text.replace("}", f",{text[1:]}", 1)
    return bytearray(text.encode("utf-8", "surrogatepass"))


def mutated(rng: random.Random, grammar: Grammar) -> bytes:
    """One mutated input: a seed with one to four mutations."""
    data = bytearray(grammar.seeds[int(rng.random() * len(grammar.seeds))])
    if grammar.text and rng.random() < 0.7:
        data = _document(rng, data, grammar)
        if rng.random() < 0.7:
            return bytes(data[: grammar.limit])
    for _dummy in range(1 + int(rng.random() ** 2 * 4)):
        data = _MUTATIONS[int(rng.random() * len(_MUTATIONS))](rng, data, grammar)
        if len(data) > grammar.limit:
            del data[grammar.limit :]
    return bytes(data)
