# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Expectations for people and programs: text and XML as conntrackd and conntrack(8) write them, JSON."""

from __future__ import annotations

import json
from socket import inet_ntop
from typing import Any

from .constants import PROTOCOL_NAMES
from .expectation import FLAG_NAMES, Expectation
from .flow import Tuple
from .render import _FAMILY_NAMES, _dict_direction, _direction, _escaped, _word

_DIRECTIONS = ("original", "reply")


def line(one: Expectation, age_s: int | None = None) -> str:
    """The expectation as ``conntrackd -i expect`` writes it, and what it does not tell: translation and function.

    ``age_s``: whole seconds since it was replicated; ``None``: not known, and not written.
    """
    mask = _direction(one.family, one.proto, one.mask)
    master = _direction(one.family, one.master_proto, one.master)
    text = f"proto={one.proto} {_direction(one.family, one.proto, one.expected)}"
    text += f" {_prefixed('mask', mask)} {_prefixed('master', master)}"
    if one.zone:
        text += f" zone={one.zone}"
    flags = ",".join(name for bit, name in FLAG_NAMES if one.flags & bit)
    if flags:
        text += f" {flags}"
    text += f" class={one.klass}"
    if one.helper:
        text += f" helper={_word(one.helper)}"
    if one.nat is not None:
        saved = Tuple(one.nat.address, one.nat.address, one.nat.port + b"\0\0")
        words = _direction(one.family, one.master_proto, saved).split()
        text += f" nat={_DIRECTIONS[one.nat.direction]} {_prefixed('nat', words[0])} nat-port={_port(one)}"
    if one.function:
        text += f" fn={_word(one.function)}"
    if age_s is not None:
        text += f" [active since {age_s}s]"
    return text


def _prefixed(prefix: str, text: str) -> str:
    """``src=`` and ``dst=`` with a prefix; the others stand without one in conntrackd's lines."""
    return text.replace("src=", f"{prefix}-src=", 1).replace(" dst=", f" {prefix}-dst=", 1)


def _port(one: Expectation) -> int:
    return 0 if one.nat is None else int.from_bytes(one.nat.port, "big")


def xml(one: Expectation) -> str:
    """The expectation as one ``<flow>`` element as of ``conntrack -L expect -o xml``, without a newline."""
    parts = (
        ("expected", one.proto, one.expected),
        ("mask", one.proto, one.mask),
        ("master", one.master_proto, one.master),
    )
    family = _FAMILY_NAMES.get(one.family, "unknown")
    out = [f'<flow><layer3 protonum="{one.family}" protoname="{family}">']
    for tag, _proto, way in parts:
        src, dst = inet_ntop(one.family, way.src), inet_ntop(one.family, way.dst)
        out.append(f"<{tag}><src>{src}</src><dst>{dst}</dst></{tag}>")
    out.append(f'</layer3><layer4 protonum="{one.proto}" protoname="{PROTOCOL_NAMES.get(one.proto, "unknown")}">')
    for tag, proto, way in parts:
        ports = _dict_direction(one.family, proto, way)
        text = "".join(f"<{name}>{ports[name]}</{name}>" for name in ("sport", "dport") if name in ports)
        out.append(f"<{tag}>{text}</{tag}>")
    out.append("</layer4><meta>")
    if one.helper:
        out.append(f"<helper-name>{_escaped(_word(one.helper))}</helper-name>")
    out.append(f"<timeout>{one.timeout}</timeout><class>{one.klass}</class>")
    if one.zone:
        out.append(f"<zone>{one.zone}</zone>")
    out += [f"<{name.lower()}/>" for bit, name in FLAG_NAMES if one.flags & bit]
    out.append("</meta></flow>")
    return "".join(out)


def as_dict(one: Expectation, age_s: int | None = None) -> dict[str, Any]:
    """The expectation as a JSON object.  ``nat`` and ``function`` are None where nothing is translated."""
    nat = None
    if one.nat is not None:
        nat = {
            "direction": _DIRECTIONS[one.nat.direction],
            "address": inet_ntop(one.family, one.nat.address),
            "port": _port(one),
        }
    return {
        "protocol": PROTOCOL_NAMES.get(one.proto, "unknown"),
        "protonum": one.proto,
        "family": _FAMILY_NAMES.get(one.family, "unknown"),
        "zone": one.zone,
        "expected": _dict_direction(one.family, one.proto, one.expected),
        "mask": _dict_direction(one.family, one.proto, one.mask),
        "master": {
            "protocol": PROTOCOL_NAMES.get(one.master_proto, "unknown"),
            **_dict_direction(one.family, one.master_proto, one.master),
        },
        "helper": one.helper or None,
        "class": one.klass,
        "flags": [name.lower() for bit, name in FLAG_NAMES if one.flags & bit],
        "nat": nat,
        "function": one.function or None,
        "used": one.used,
        "timeout": one.timeout,
        "age_s": age_s,
    }


def json_line(one: Expectation, age_s: int | None = None) -> str:
    """The expectation as one line of JSON, without a newline."""
    return json.dumps(as_dict(one, age_s), separators=(", ", ": "))
