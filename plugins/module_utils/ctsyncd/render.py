# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Flows, the status and the statistics for people and programs: text as conntrack(8) writes it, XML, JSON values."""

from __future__ import annotations

import json
from socket import inet_ntop
from typing import Any, Mapping

from .constants import (
    AF_INET,
    AF_INET6,
    ICMP_PROTOCOLS,
    IPPROTO_GRE,
    IPPROTO_SCTP,
    IPPROTO_TCP,
    IPS_ASSURED,
    IPS_HW_OFFLOAD,
    IPS_OFFLOAD,
    IPS_SEEN_REPLY,
    PORT_PROTOCOLS,
    PROTOCOL_NAMES,
    SCTP_STATE_NAMES,
    TCP_STATE_NAMES,
)
from .flow import BOTH_DIRECTIONS, ZONE_ORIGINAL, ZONE_REPLY, Flow, Tuple

VERDICT_EXITS = {"READY": 0, "DEGRADED": 1, "NOT READY": 2}

_FAMILY_NAMES = {AF_INET: "ipv4", AF_INET6: "ipv6"}
_STATE_NAMES = {IPPROTO_TCP: TCP_STATE_NAMES, IPPROTO_SCTP: SCTP_STATE_NAMES}
_HEADS = tuple(f"{PROTOCOL_NAMES.get(number, 'unknown'):<8} {number} " for number in range(256))


def state_name(flow: Flow) -> str | None:
    """Name of the flow's protocol state; ``None`` for protocols without one or when it is unknown."""
    if flow.state is None:
        return None
    names = _STATE_NAMES.get(flow.proto)
    if names is None:
        return None
    return names[flow.state] if 0 <= flow.state < len(names) else f"STATE_{flow.state}"


def line(flow: Flow, age_s: int | None = None) -> str:
    """The flow as ``conntrack -L`` and ``conntrackd -i`` write it, without the timeout and without a newline.

    ``age_s``: whole seconds since the flow began; ``None``: not known, and not written.
    """
    family, proto, status = flow.family, flow.proto, flow.status
    state = state_name(flow)
    head = _HEADS[proto] if state is None else f"{_HEADS[proto]}{state} "
    unreplied = "" if status & IPS_SEEN_REPLY else "[UNREPLIED] "
    original, reply = _direction(family, proto, flow.orig), _direction(family, proto, flow.reply)
    if flow.zone:
        if flow.zone_dir == ZONE_ORIGINAL:
            original += f" zone-orig={flow.zone}"
        elif flow.zone_dir == ZONE_REPLY:
            reply += f" zone-reply={flow.zone}"
    text = f"{head}{original} {unreplied}{reply}"
    if status & IPS_HW_OFFLOAD:
        text += " [HW_OFFLOAD]"
    elif status & IPS_OFFLOAD:
        text += " [OFFLOAD]"
    elif status & IPS_ASSURED:
        text += " [ASSURED]"
    text += f" mark={flow.mark or 0}"  # an event without a mark means mark 0
    if flow.zone and flow.zone_dir == BOTH_DIRECTIONS:
        text += f" zone={flow.zone}"
    if flow.helper:
        text += f" helper={_word(flow.helper)}"
    if flow.labels and any(flow.labels):
        text += f" labels=0x{flow.labels.hex()}"
    if age_s is not None:
        text += f" [active since {age_s}s]"
    return text


def _direction(family: int, proto: int, way: Tuple) -> str:
    text = f"src={inet_ntop(family, way.src)} dst={inet_ntop(family, way.dst)}"
    l4 = way.l4
    if len(l4) != 4:
        return text
    if proto in PORT_PROTOCOLS:
        return f"{text} sport={l4[0] << 8 | l4[1]} dport={l4[2] << 8 | l4[3]}"
    if proto in ICMP_PROTOCOLS:
        return f"{text} type={l4[2]} code={l4[3]} id={l4[0] << 8 | l4[1]}"
    if proto == IPPROTO_GRE:
        return f"{text} srckey={l4[0] << 8 | l4[1]:#x} dstkey={l4[2] << 8 | l4[3]:#x}"
    return text


def _word(text: str) -> str:
    """A name from the kernel or a peer, safe for a line of words."""
    return "".join(char if char.isprintable() and not char.isspace() else "?" for char in text)


def _escaped(text: str) -> str:
    """For character data of XML.  (The library's function comes with an HTTP client and TLS.)"""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def xml(flow: Flow) -> str:
    """The flow as one ``<flow>`` element as of ``conntrack -o xml``: no declaration, no root element, no newline."""
    state = state_name(flow)
    parts = [
        "<flow>",
        _xml_direction("original", flow, flow.orig, ZONE_ORIGINAL),
        _xml_direction("reply", flow, flow.reply, ZONE_REPLY),
        '<meta direction="independent">',
    ]
    for tag, value in (
        ("state", state),
        ("timeout", flow.timeout),
        ("mark", flow.mark),
        ("zone", flow.zone if flow.zone and flow.zone_dir == BOTH_DIRECTIONS else None),
        ("id", flow.ident),
    ):
        if value is not None:
            parts.append(f"<{tag}>{value}</{tag}>")
    if flow.status & IPS_ASSURED:
        parts.append("<assured/>")
    if not flow.status & IPS_SEEN_REPLY:
        parts.append("<unreplied/>")
    if flow.helper:
        parts.append(f"<helper>{_escaped(_word(flow.helper))}</helper>")
    parts.append("</meta></flow>")
    return "".join(parts)


def _xml_direction(name: str, flow: Flow, way: Tuple, direction: int) -> str:
    family, proto = flow.family, flow.proto
    zone = f"<zone>{flow.zone}</zone>" if flow.zone and flow.zone_dir == direction else ""
    ports = ""
    if len(way.l4) == 4:
        source, destination = int.from_bytes(way.l4[:2], "big"), int.from_bytes(way.l4[2:], "big")
        if proto in PORT_PROTOCOLS:
            ports = f"<sport>{source}</sport><dport>{destination}</dport>"
        elif proto == IPPROTO_GRE:
            ports = f"<srckey>{source:#x}</srckey><dstkey>{destination:#x}</dstkey>"
    return (
        f'<meta direction="{name}"><layer3 protonum="{family}" protoname="{_FAMILY_NAMES.get(family, "unknown")}">'
        f"<src>{inet_ntop(family, way.src)}</src><dst>{inet_ntop(family, way.dst)}</dst></layer3>"
        f'<layer4 protonum="{proto}" protoname="{PROTOCOL_NAMES.get(proto, "unknown")}">{ports}</layer4>{zone}</meta>'
    )


def as_dict(flow: Flow, age_s: int | None = None) -> dict[str, Any]:
    """The flow as a JSON object.  Unknown values are ``None``; ``helper`` and ``labels`` only where there are any,
    ``zone_direction`` (``orig``, ``reply``) where the zone is one of that direction only."""
    result: dict[str, Any] = {
        "protocol": PROTOCOL_NAMES.get(flow.proto, "unknown"),
        "protonum": flow.proto,
        "family": _FAMILY_NAMES.get(flow.family, "unknown"),
        "zone": flow.zone,
        "state": state_name(flow),
        "orig": _dict_direction(flow.family, flow.proto, flow.orig),
        "reply": _dict_direction(flow.family, flow.proto, flow.reply),
        "snat": flow.snat,
        "dnat": flow.dnat,
        "assured": flow.assured,
        "status": flow.status,
        "timeout": flow.timeout,
        "mark": flow.mark,
        "age_s": age_s,
    }
    if flow.zone and flow.zone_dir != BOTH_DIRECTIONS:
        result["zone_direction"] = "orig" if flow.zone_dir == ZONE_ORIGINAL else "reply"
    if flow.helper:
        result["helper"] = flow.helper
    if flow.labels and any(flow.labels):
        result["labels"] = "0x" + flow.labels.hex()
    return result


def _dict_direction(family: int, proto: int, way: Tuple) -> dict[str, Any]:
    result: dict[str, Any] = {"src": inet_ntop(family, way.src), "dst": inet_ntop(family, way.dst)}
    l4 = way.l4
    if len(l4) == 4 and proto in PORT_PROTOCOLS:
        result["sport"] = l4[0] << 8 | l4[1]
        result["dport"] = l4[2] << 8 | l4[3]
    elif len(l4) == 4 and proto in ICMP_PROTOCOLS:
        result["type"] = l4[2]
        result["code"] = l4[3]
        result["id"] = l4[0] << 8 | l4[1]
    elif len(l4) == 4 and proto == IPPROTO_GRE:
        result["srckey"] = l4[0] << 8 | l4[1]
        result["dstkey"] = l4[2] << 8 | l4[3]
    return result


def key_dict(flow: Flow) -> dict[str, Any]:
    """What identifies the flow, as a JSON object: the keys of :func:`as_dict` that its key tells."""
    result = as_dict(flow)
    wanted = ("protocol", "protonum", "family", "zone", "zone_direction", "orig")
    return {name: result[name] for name in wanted if name in result}


_DIFFERENCES = {
    "missing": "missing on {backup}: {active} has them",
    "left_over": "left over on {backup}: {active} has them no more",
    "translation": "translated in another way on {backup}",
    "state": "in another state on {backup}",
    "kernel_missing": "missing in the kernel of {backup}: its external cache has them",
    "kernel_left_over": "left over in the kernel of {backup}: its external cache has them not",
    "kernel_differs": "different in the kernel of {backup} from its external cache",
}


def verification_text(result: Mapping[str, Any]) -> str:
    """The object of ``verify --json`` for a person: each backup by itself.  Ends with a newline."""
    backups = result.get("backups") or ()
    if len(backups) > 1:
        return "".join(
            verification_text(one)
            if one.get("equal") is not None
            else f"cannot tell of {one['backup']}: {one['reason']}\n"
            for one in backups
        )
    names = {"active": result.get("active"), "backup": result.get("backup")}
    if result.get("equal") is None:
        return f"cannot tell: {result.get('reason')}\n"
    if result["equal"]:
        return f"equal: {result.get('flows')} flows on {names['active']} and {names['backup']}\n"
    lines = [f"different: of {result.get('flows')} flows of {names['active']}"]
    for difference in result.get("differences") or ():
        kind, count, flows = difference.get("kind"), difference.get("count"), difference.get("flows") or ()
        lines.append(f"{count} {_DIFFERENCES.get(str(kind), str(kind)).format(**names)}")
        for flow in flows:
            tuple_text = " ".join(f"{name}={value}" for name, value in flow["orig"].items())
            zone = f" zone={flow['zone']}" if flow.get("zone") else ""
            lines.append(f"  {flow['protocol']:<8} {flow['protonum']} {tuple_text}{zone}")
        if len(flows) < int(count or 0):
            lines.append(f"  and {int(count or 0) - len(flows)} more")
    return "\n".join(lines) + "\n"


def json_line(flow: Flow, age_s: int | None = None) -> str:
    """The flow as one line of JSON, without a newline."""
    return json.dumps(as_dict(flow, age_s), separators=(", ", ": "))


def verdict_line(status: Mapping[str, Any]) -> str:
    """``READY``, ``DEGRADED: reason; reason`` or ``NOT READY: reason``."""
    verdict = str(status.get("verdict") or "NOT READY")
    reasons = "; ".join(str(reason) for reason in status.get("reasons") or ())
    return f"{verdict}: {reasons}" if reasons else verdict


def status_text(status: Mapping[str, Any]) -> str:
    """The object of ``status --json`` for a person: the verdict, then the details.  Ends with a newline."""
    rows: list[tuple[str, str]] = []
    if "node" in status:
        rows.append(("node", f"{status['node']} ({status.get('role', 'role unknown')})"))
    for vip in status.get("virtual_ips") or ():
        held = "held" if vip.get("held") else "not held"
        rows.append(("virtual IP", f"{vip.get('address')} on {vip.get('interface')}, {held}"))
    if "mode" in status:
        rows.append(("mode", str(status["mode"]) + ("" if status.get("replicate", True) else ", replication off")))
    rows.extend(("keys", text) for text in _key_texts(status))
    for peer in status.get("peers") or ():
        rows.append(("peer", _peer_text(peer)))
        rows.extend(("link", _link_text(link, peer.get("node"))) for link in peer.get("links") or ())
    flows = status.get("flows")
    if isinstance(flows, Mapping):
        rows.append(("flows", ", ".join(f"{_count(count)} {name}" for name, count in flows.items())))
    last = status.get("last_transition")
    if isinstance(last, Mapping):
        rows.append(("transition", f"to {last.get('to')}, {_seconds(last.get('ago_s'))} ago"))
    if "version" in status:
        rows.append(("version", str(status["version"])))
    details = "".join(f"  {name:<11} {text}\n" for name, text in rows)
    return f"{verdict_line(status)}\n{details}"


def _peer_text(peer: Mapping[str, Any]) -> str:
    words = [f"{peer.get('node')} ({peer.get('address')}) is {peer.get('state')}"]
    if peer.get("role"):
        words.append(str(peer["role"]))
    if peer.get("last_seen_s") is not None:
        words.append(f"seen {_seconds(peer['last_seen_s'])} ago")
    lag = peer.get("lag")
    if isinstance(lag, Mapping):
        events = lag.get("events") or 0
        words.append(f"lag {events} changes, {_seconds(lag.get('age_s'))}" if events else "no lag")
    if peer.get("table"):
        words.append(str(peer["table"]))
    equality = peer.get("equality")
    if isinstance(equality, Mapping):
        words.append(_equality_text(equality))
    return ", ".join(words)


def _key_texts(status: Mapping[str, Any]) -> list[str]:
    """Which keys each node accepts and sends with; nothing while there is but one and all use it."""
    own, peers = status.get("keys") or {}, status.get("peers") or ()
    known = [(peer.get("node"), peer.get("keys") or {}) for peer in peers]
    one = [own.get("sends")]
    if all(
        accepts in (None, one) for accepts in (own.get("accepts"), *(keys.get("accepts") for _node, keys in known))
    ) and not any(keys.get("differ") for _node, keys in known):
        return []
    texts = [f"{status.get('node')} accepts {_ids(own.get('accepts'))}, is to send with {own.get('sends')}"]
    for node, keys in known:
        if keys.get("sends") is None:
            texts.append(f"{node} does not say (no session)")
            continue
        differ = f", has another key under {_ids(keys['differ'])}" if keys.get("differ") else ""
        used = f"sends with {keys['sends']}, is sent to with {keys.get('used')}"
        texts.append(f"{node} accepts {_ids(keys.get('accepts'))}, {used}{differ}")
    return texts


def _ids(numbers: Any) -> str:
    return " and ".join(map(str, numbers)) if numbers else "unknown keys"


def _link_text(link: Mapping[str, Any], peer: Any) -> str:
    state = str(link.get("state"))
    if link.get("since_s") is not None:
        state += f" for {_seconds(link['since_s'])}"
    words = [f"{link.get('interface')} to {peer} ({link.get('address')}) is {state}"]
    if link.get("carries"):
        words.append("in use")
    if link.get("rtt_ms") is not None:
        words.append(f"round trip {link['rtt_ms']:.1f} ms")
    if link.get("mtu"):
        words.append(f"MTU {link['mtu']}")
    if link.get("loss"):
        words.append(f"{100 * link['loss']:.0f} % of the probes lost")
    return ", ".join(words)


def _equality_text(equality: Mapping[str, Any]) -> str:
    state = equality.get("state")
    if state == "equal":
        return "tables equal"
    if state != "differs":
        return "tables not compared"
    part = f" in {equality['buckets']} of {equality.get('of')} parts" if equality.get("buckets") else ""
    since = f" for {_seconds(equality['since_s'])}" if equality.get("since_s") is not None else ""
    return f"tables differ{part}{since}"


def _seconds(value: Any) -> str:
    return f"{value:.1f} s" if isinstance(value, (int, float)) else "unknown time"


def _count(value: Any) -> str:
    return "unknown" if value is None else str(value)


def statistics(sections: Mapping[str, Any]) -> str:
    """Blocks of counters: ``{"title": {"name": value or {"name": value}}}``.  Ends with a newline unless empty."""
    blocks = []
    for title, body in sections.items():
        lines = [f"{_title(title)}:"]
        if isinstance(body, Mapping):
            lines += _counter_lines(body, 1)
        elif isinstance(body, (list, tuple)):
            lines += [f"    {_value(item)}" for item in body]
        else:
            lines = [f"{_title(title)}: {_value(body)}"]
        blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks)


def _counter_lines(body: Mapping[str, Any], depth: int) -> list[str]:
    lines = []
    indent = "    " * depth
    for name, value in body.items():
        label = f"{indent}{_title(name)}:"
        if isinstance(value, Mapping):
            lines.append(label)
            lines += _counter_lines(value, depth + 1)
        else:
            lines.append(f"{label:<44} {_value(value):>16}")
    return lines


def _title(name: Any) -> str:
    return str(name).replace("_", " ")


def _value(value: Any) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_value(item) for item in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{_title(key)} {_value(item)}" for key, item in value.items())
    return str(value)
