# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The pair, or group of more nodes, as a whole, out of what each node says of itself. Pure functions.

This module is private to the collection and runs on the controller (filters). A node is what ha_facts returns with the
subsets host, role, sync and vrrp; one that could not be asked has a ``problem`` instead.
"""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, NamedTuple, Sequence

from ._preflight import sysctl_differences

READY = "READY"
DEGRADED = "DEGRADED"
NOT_READY = "NOT READY"
ENDPOINT = ("protonum", "zone", "orig")  # what a flow is known by
HEADINGS = ("node", "role", "verdict", "VIPs", "VRRP", "lag", "flows", "replicas", "key")


class KeyState(NamedTuple):
    """Which keys a daemon accepts, and which it sends with (0: none)."""

    ids: Sequence[int]
    send: int


def judge(nodes: Mapping[str, Mapping[str, Any]], target: str = "") -> Dict[str, Any]:
    """The verdict of the pair, or of a group of more nodes.

    ``verdict`` and ``reasons`` are for people: everything that should be mended. ``obstacles`` is narrower: why the
    standby should not be made active now. ``active`` and ``standby`` are empty when it is not clear which node is; of
    several nodes that wait ``standby`` is ``target``, or else the one that keepalived would elect, and ``standbys`` are
    all of them in that order. ``lines`` is a table with the reasons below it.
    """
    active = [host for host, node in nodes.items() if node.get("role") == "active"]
    standby = [host for host, node in nodes.items() if node.get("role") == "backup"]
    standby.sort(key=lambda host: (host != target, *_election(nodes[host])))
    clear = len(active) == 1 and len(standby) >= 1 and len(active) + len(standby) == len(nodes)
    grave = _grave(nodes, active)
    light: List[str] = []
    for host, node in nodes.items():
        sync = node.get("sync") or {}
        if sync.get("verdict") == DEGRADED:
            light += [f"{host}: {reason}" for reason in sync.get("reasons") or ["it does not say why"]]
    differing = _different(nodes)
    verdict = NOT_READY if grave else DEGRADED if light or differing else READY
    result: Dict[str, Any] = {
        "verdict": verdict,
        "reasons": grave + light + differing,
        "active": active[0] if clear else "",
        "standby": standby[0] if clear else "",
        "standbys": standby if clear else [],
        "obstacles": grave + light + (_preemption(nodes, active[0], standby[0]) if clear else []),
    }
    result["lines"] = _lines(nodes, result)
    return result


def _election(node: Mapping[str, Any]) -> Sequence[Any]:
    """Sorts first what keepalived would rather elect."""
    ready = ((node.get("sync") or {}).get("verdict")) in (READY, DEGRADED)
    return (not ready, -_priority(node))


def _priority(node: Mapping[str, Any]) -> int:
    instances = (node.get("vrrp") or {}).get("instances") or ()
    return max((entry.get("priority") or 0 for entry in instances), default=0)


def _grave(nodes: Mapping[str, Mapping[str, Any]], active: Sequence[str]) -> List[str]:
    """What makes a take-over lose sessions, or impossible."""
    reasons = []
    for host, node in nodes.items():
        if node.get("problem"):
            reasons.append(f"{host}: could not be asked ({node['problem']})")
            continue
        sync = node.get("sync") or {}
        if sync.get("verdict") not in (READY, DEGRADED):
            reasons += [f"{host}: {reason}" for reason in sync.get("reasons") or ["it does not say why"]]
        vrrp = node.get("vrrp") or {}
        if not vrrp.get("running"):
            reasons.append(f"{host}: keepalived does not run")
        faulty = [entry["name"] for entry in vrrp.get("instances") or () if entry.get("state") == "FAULT"]
        if faulty:
            reasons.append(f"{host}: keepalived is in FAULT state ({', '.join(faulty)}): an interface is down")
        if node.get("role") == "unknown":
            held = [vip["address"] for vip in node.get("virtual_ips") or () if vip.get("held")]
            reasons.append(f"{host}: holds only some of the virtual IPs ({', '.join(held) or 'none is configured'})")
    if len(active) > 1:
        reasons.append(f"{' and '.join(active)} hold the virtual IPs at the same time: they do not hear each other")
    elif not active and not any(node.get("problem") for node in nodes.values()):
        reasons.append("no node holds the virtual IPs")
    return reasons


def _different(nodes: Mapping[str, Mapping[str, Any]]) -> List[str]:
    """In what the nodes are not alike, and should be."""
    asked = {host: node for host, node in nodes.items() if not node.get("problem")}
    if len(asked) < 2:
        return []
    reasons = []
    versions = {host: str((node.get("sync") or {}).get("version") or "") for host, node in asked.items()}
    if len(set(versions.values())) > 1 and all(versions.values()):
        reasons.append(f"versions of ctsyncd differ ({_each(versions)}): run the playbook upgrade")
    keys = {host: key_state(node) for host, node in asked.items()}
    if all(state.ids for state in keys.values()) and len(set(keys.values())) > 1:
        shown = {host: f"accepts {_numbers(state.ids)}, sends {state.send}" for host, state in keys.items()}
        reasons.append(f"a key rotation is half done ({_each(shown)}): run the playbook rotate_key")
    for host, node in asked.items():
        in_use = (node.get("sync") or {}).get("keys") or {}
        held = KeyState(tuple(in_use.get("accepts") or ()), int(in_use.get("sends") or 0))
        if held.ids and held != keys[host]:
            reasons.append(
                f"{host}: the daemon does not have the keys of its files yet (it accepts {_numbers(held.ids)}, sends"
                f" {held.send}): run the playbook rotate_key"
            )
    return reasons + sysctl_differences(
        {host: (node.get("host") or {}).get("sysctls") or {} for host, node in asked.items()}
    )


def _preemption(nodes: Mapping[str, Mapping[str, Any]], active: str, standby: str) -> List[str]:
    """With preemption the virtual IPs would come back at once to the node of the higher priority."""
    others = [active] + [host for host in nodes if host not in (active, standby)]
    reasons = []
    for host in others:
        instances = (nodes[host].get("vrrp") or {}).get("instances") or ()
        preempts = any(entry.get("nopreempt") is False for entry in instances)
        if preempts and _priority(nodes[host]) > _priority(nodes[standby]):
            back = "back " if host == active else ""
            reasons.append(
                f"{host} has the higher priority and keepalived_nopreempt is false: it would take the virtual IPs"
                f" {back}at once; set keepalived_nopreempt to true"
            )
    return reasons


def _each(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{host}: {value}" for host, value in values.items())


def _numbers(ids: Sequence[int]) -> str:
    return " and ".join(map(str, ids))


def _lines(nodes: Mapping[str, Mapping[str, Any]], result: Mapping[str, Any]) -> List[str]:
    if result["verdict"] == READY:
        waiting = " or ".join(result["standbys"])
        first = f"READY - {waiting} could take over from {result['active']} now"
    elif result["verdict"] == DEGRADED:
        first = f"DEGRADED - the {'pair' if len(nodes) == 2 else 'group'} works, but this should be mended"
    else:
        first = "NOT READY - a failure now would lose sessions or be an outage"
    rows = [HEADINGS] + [_row(host, node) for host, node in nodes.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    versions = {host: _versions(node) for host, node in nodes.items() if not node.get("problem")}
    same = len(set(versions.values())) == 1
    table.append(f"versions  {next(iter(versions.values())) if same else _each(versions)}")
    return [first, *table, *result["reasons"]]


def _versions(node: Mapping[str, Any]) -> str:
    daemon = (node.get("sync") or {}).get("version") or "-"
    keepalived = ((node.get("host") or {}).get("keepalived") or {}).get("version") or "-"
    return f"ctsyncd {daemon}, keepalived {keepalived}"


def _row(host: str, node: Mapping[str, Any]) -> Sequence[str]:
    if node.get("problem"):
        return (host, "-", "no answer", *["-"] * (len(HEADINGS) - 3))
    sync, vips = node.get("sync") or {}, node.get("virtual_ips") or []
    states = {str(entry.get("state")) for entry in (node.get("vrrp") or {}).get("instances") or ()}
    running = (node.get("vrrp") or {}).get("running")
    lag = [peer.get("lag") or {} for peer in sync.get("peers") or ()]
    flows, keys = sync.get("flows") or {}, key_state(node)
    return (
        host,
        str(node.get("role", "-")),
        str(sync.get("verdict", "-")),
        f"{sum(bool(vip.get('held')) for vip in vips)}/{len(vips)}",
        "/".join(sorted(states)) if running and states else "runs" if running else "stopped",
        _lag(lag) if node.get("role") == "active" else "-",
        str(flows.get("kernel", "-")),
        str(flows.get("external", "-")),
        "-"
        if not keys.ids
        else ", ".join(f"{number}{'*' if number == keys.send and len(keys.ids) > 1 else ''}" for number in keys.ids),
    )


def _lag(lags: Sequence[Mapping[str, Any]]) -> str:
    events = sum(int(lag.get("events") or 0) for lag in lags)
    if not lags or not events:
        return "none" if lags else "-"
    return f"{events} changes, {max(float(lag.get('age_s') or 0) for lag in lags):.1f} s"


# --- sessions ---


def lost_sessions(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> List[str]:
    """Established TCP sessions of one table that the other has in no state at all, as ``source -> destination``.

    A session that ended properly in between is still there for a while, closing; one that is missing was lost.
    """
    known = {_identity(flow) for flow in after}
    return [
        "{src}:{sport} -> {dst}:{dport}".format(**flow["orig"])
        for flow in before
        if flow.get("protocol") == "tcp" and flow.get("state") == "ESTABLISHED" and _identity(flow) not in known
    ]


def established(flows: Sequence[Mapping[str, Any]]) -> int:
    return sum(flow.get("protocol") == "tcp" and flow.get("state") == "ESTABLISHED" for flow in flows)


def _identity(flow: Mapping[str, Any]) -> Sequence[Any]:
    return (*(repr(flow.get(name)) for name in ENDPOINT[:-1]), *sorted((flow.get("orig") or {}).items()))


# --- keys ---


def key_state(node: Mapping[str, Any]) -> KeyState:
    """The keys of a node's daemon."""
    known = (node.get("host") or {}).get("ctsyncd") or {}
    return KeyState(tuple(sorted(int(number) for number in known.get("keys") or {})), int(known.get("send_key") or 0))


def rotation_step(own: KeyState, peers: Sequence[KeyState], new: int) -> KeyState:
    """The next keys of one node on the way to ``new`` alone, such that all nodes understand each other all the time.

    A node sends with the new key as soon as all its peers accept it, and forgets an old one when all of them send with
    the new one. Taking turns, from whatever state, two nodes have arrived after two turns each, more after three.
    """
    ids = {new}
    if any(peer.send != new for peer in peers):
        ids |= set(own.ids) | {peer.send for peer in peers if peer.send}
    accepting = [set(peer.ids) for peer in peers if peer.ids]
    if all(new in accepted for accepted in accepting):
        return KeyState(tuple(sorted(ids)), new)
    understood = set.intersection(*accepting)
    choices = [own.send, *(peer.send for peer in peers)]
    send = next((number for number in choices if number in understood), own.send or new)
    return KeyState(tuple(sorted(ids | {send})), send)
