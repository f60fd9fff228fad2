# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The verdict of a failover test: evidence in, checks and report data out. No input or output here.

An *experiment* is what the playbook collected about one failure, a dict with these keys:

``meta``
    ``kind`` (``failover`` or ``control``), ``run``, ``title``, ``from`` and ``to`` (node names), ``virtual_ips``
    (addresses), ``failed_at`` (seconds since the epoch; None: taken from the sessions).
``client-before``, ``client-after``, ``client-closed``, ``server-before``, ``server-after``
    snapshots of the sessions program (roles/failover_test/files/ctsync_sessions.py).
``watch-NODE``
    addresses that came and went, resets that passed a firewall.
``facts-before-NODE``, ``facts-after-NODE``, ``facts-back-NODE``
    ``ha_firewall`` facts.
``firewall-before-NODE``, ``firewall-after-NODE``
    ``filter`` (text of ``iptables-save -c``) and ``sysctl`` (a dict).
``ready-after``
    ``seconds`` from power on until both nodes were ready.
``poke``, ``fresh``, ``ssh-end``
    answers of the sessions program.

What is missing from the evidence fails the check that needs it; nothing passes by default. All results are plain data
that JSON can carry; times in the report are milliseconds after the failure.
"""

from __future__ import annotations

import re
from typing import Any, Callable, Iterable, Mapping, NamedTuple, Optional, Sequence

SCHEMA = 1
STEP_MS = 100
WINDOW_BEFORE_MS = 2000
WINDOW_LONGEST_MS = 14000

Evidence = Mapping[str, Any]


class Missing(Exception):
    """A piece of evidence is not there."""


class Check(NamedTuple):
    """One thing that was asserted."""

    name: str
    title: str
    passed: bool
    detail: str

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return self._asdict()


def need(evidence: Mapping[str, Any], *path: Any) -> Any:
    """The value at ``path``; raises Missing, which names the path, when there is none."""
    value: Any = evidence
    for step in path:
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            raise Missing(" / ".join(str(part) for part in path)) from None
    return value


def listing(names: Iterable[Any], most: int = 6) -> str:
    """``a, b, c and 4 more``."""
    found = [str(name) for name in names]
    rest = len(found) - most
    return ", ".join(found[:most]) + (f" and {rest} more" if rest > 0 else "")


# ---------------------------------------------------------------------------------------------------------------------
# Reading iptables-save.

_RULE = re.compile(r"^\[(\d+):(\d+)\] (-A .*)$")
_POLICY = re.compile(r"^:(\S+) (\S+) \[(\d+):(\d+)\]$")


def filter_counters(text: str) -> dict[str, int]:
    """Packet counters of an ``iptables-save -c -t filter`` text that the test looks at.

    ``policy``: packets that met the policy of FORWARD. ``invalid``: packets counted by LOG rules for state INVALID.
    ``resets``: packets counted by rules on TCP segments with RST that leave; -1 when there is no such rule.
    """
    policy = invalid = 0
    resets = -1
    for line in text.splitlines():
        found = _POLICY.match(line)
        if found and found.group(1) == "FORWARD":
            policy = int(found.group(3))
            continue
        found = _RULE.match(line)
        if not found:
            continue
        packets, rule = int(found.group(1)), found.group(3)
        if "INVALID" in rule and "-j LOG" in rule:
            invalid += packets
        if re.match(r"-A \S*OUTPUT\b", rule) and re.search(r"--tcp-flags \S*RST\S* RST\b", rule):
            resets = max(resets, 0) + packets
    return {"policy": policy, "invalid": invalid, "resets": resets}


def without_counters(text: str) -> list[str]:
    """The rules of an ``iptables-save`` text without comments and counters."""
    lines = [re.sub(r"^\[\d+:\d+\] | \[\d+:\d+\]$", "", line) for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


# ---------------------------------------------------------------------------------------------------------------------
# Moments.


def by_name(snapshot: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Sessions of a snapshot by name. The last one wins when a name was used twice."""
    return {session["name"]: session for session in need(snapshot, "sessions") if session.get("name")}


def streaming(session: Mapping[str, Any]) -> bool:
    """True for a session that sends all the time."""
    return bool(need(session, "kind") != "idle")


def failed_at(evidence: Evidence) -> float:
    """The moment of the failure.

    Given by the playbook, or the last byte that came before the one silence that most streaming sessions share.
    """
    given = need(evidence, "meta").get("failed_at")
    if given:
        return float(given)
    starts = []
    for session in need(evidence, "client-after", "sessions"):
        if streaming(session):
            gaps = [tuple(gap) for gap in session["rx"]["gaps"]]
            if gaps:
                starts.append(max(gaps, key=lambda gap: gap[1] - gap[0])[0])
            elif session["rx"]["last"]:
                starts.append(session["rx"]["last"])
    if not starts:
        raise Missing("the moment of the failure")
    starts.sort()
    return float(starts[len(starts) // 2])


def vip_moves(evidence: Evidence) -> dict[str, Optional[int]]:
    """For each virtual address the milliseconds from the failure until the other node had it; None: never."""
    meta = need(evidence, "meta")
    moment = failed_at(evidence)
    events = need(evidence, f"watch-{meta['to']}", "addresses")
    moves: dict[str, Optional[int]] = {}
    for address in meta["virtual_ips"]:
        times = [
            event["at"]
            for event in events
            if event["event"] == "added" and event["address"] == address and event["at"] >= moment - 0.05
        ]
        moves[address] = max(0, round((min(times) - moment) * 1000)) if times else None
    return moves


def gap_of(session: Mapping[str, Any], moment: float, end: float) -> tuple[float, float]:
    """Begin and end of the longest silence since shortly before the failure, in the direction of ``session['rx']``.

    A silence that has not ended counts up to ``end``. Twice the moment itself when no silence was longer than one and a
    half intervals of the sender.
    """
    rx = need(session, "rx")
    gaps = [(float(gap[0]), float(gap[1])) for gap in rx["gaps"] if gap[1] >= moment - 0.5]
    if rx["last"] is not None and end - rx["last"] > 1.0:
        gaps.append((float(rx["last"]), end))
    return max(gaps, key=lambda gap: gap[1] - gap[0], default=(moment, moment))


# ---------------------------------------------------------------------------------------------------------------------
# Sessions.


def faults_of(session: Mapping[str, Any]) -> dict[str, int]:
    """Lines that were lost, doubled, reordered or altered, at one end."""
    return {name: int(session[name]) for name in ("lost", "duplicated", "reordered", "corrupt")}


def session_rows(evidence: Evidence) -> list[dict[str, Any]]:
    """One row per session: what it was before, what became of it."""
    meta = need(evidence, "meta")
    moment = failed_at(evidence)
    end = float(need(evidence, "client-after", "now"))
    before, after = by_name(need(evidence, "client-before")), by_name(need(evidence, "client-after"))
    far_before, far_after = by_name(need(evidence, "server-before")), by_name(need(evidence, "server-after"))
    answers = evidence.get("poke", {}).get("answers_ms", {})
    moved = [move for move in vip_moves(evidence).values() if move is not None]
    resumed = moment + (max(moved) / 1000 if moved else 0.0)
    rows = []
    for name, old in before.items():
        new = after.get(name)
        far_old, far_new = far_before.get(name), far_after.get(name)
        reasons: list[str] = []
        row: dict[str, Any] = {
            "name": name,
            "proto": old["proto"],
            "kind": old["kind"],
            "port": old["local"][1] if old["local"] else None,
            "snat_before": endpoint(far_old["peer"] if far_old else None),
            "snat_after": None,
            "gap_ms": None,
            "gap_at": None,
            "answer_ms": None,
            "bytes": 0,
            "lines": 0,
            "error": None,
            "timeline": {"down": [], "up": []},
        }
        rows.append(row)
        if new is None or far_new is None or far_old is None:
            row.update(survived=False, reasons=["no record of the session at both ends"])
            continue
        row["error"] = new["error"] or far_new["error"]
        row["bytes"] = int(new["rx"]["bytes"]) + int(far_new["rx"]["bytes"])
        row["lines"] = int(new["received"]) + int(far_new["received"])
        if not new["alive"]:
            reasons.append(f"ended: {new['error']}")
        if far_new["ended"] is not None:
            reasons.append(f"ended on the far side: {far_new['error'] or 'closed'}")
        if streaming(old):
            gap = max((gap_of(side, moment, end) for side in (new, far_new)), key=lambda gap: gap[1] - gap[0])
            row["gap_ms"] = round((gap[1] - gap[0]) * 1000)
            row["gap_at"] = [round((at - moment) * 1000) for at in gap]
            for direction, last in (("from", new["rx"]["last"]), ("to", new["ack"]["last"])):
                if last is None or last <= resumed:
                    reasons.append(f"nothing came {direction} the far side after the take-over")
        else:
            row["answer_ms"] = answers.get(name)
            if row["answer_ms"] is None:
                reasons.append("did not answer after the take-over")
        alive = not reasons
        for end_name, side in (("near", new), ("far", far_new)):
            for fault, count in faults_of(side).items():
                if count:
                    reasons.append(f"{count} lines {fault} ({end_name} end)")
        if alive:
            row["snat_after"] = endpoint(new["seen_as"])
            if row["snat_after"] != row["snat_before"] or len(new["seen_history"]) != 1:
                reasons.append(f"the far side saw {row['snat_before']}, then {row['snat_after']}")
            if row["snat_before"] and row["snat_before"].rpartition(":")[0] not in meta["virtual_ips"]:
                reasons.append(f"the far side saw {row['snat_before']}, which is no virtual address")
            if old["local"] != new["local"] or old["pid"] != new["pid"]:
                reasons.append("another process or connection than before")
        row["timeline"] = {
            "down": [[t, size] for t, size in relative(new["rx"]["series"], moment)],
            "up": [[t, size] for t, size in relative(far_new["rx"]["series"], moment)],
        }
        row.update(survived=not reasons, reasons=reasons)
    return rows


def relative(series: Sequence[Sequence[int]], moment: float) -> list[tuple[int, int]]:
    """Buckets of a series as (milliseconds after the failure, bytes), the window only."""
    points = []
    for index, size in series:
        offset = round(index * STEP_MS - moment * 1000)
        if -WINDOW_BEFORE_MS <= offset <= WINDOW_LONGEST_MS:
            points.append((offset, int(size)))
    return points


def endpoint(pair: Optional[Sequence[Any]]) -> Optional[str]:
    """``192.168.1.100:51356``."""
    return f"{pair[0]}:{pair[1]}" if pair else None


def resets_of(evidence: Evidence) -> list[dict[str, Any]]:
    """Resets of the test's own sessions that any witness saw.

    :raises Missing: when a witness could not watch.
    """
    ports = set()
    for session in need(evidence, "client-before", "sessions"):
        if session["local"]:
            ports.add(session["local"][1])
    for session in need(evidence, "server-before", "sessions"):
        ports.add(session["peer"][1])
    meta = need(evidence, "meta")
    found = []
    for witness in ("client-after", "server-after", f"watch-{meta['to']}"):
        tap = need(evidence, witness, "resets")
        if tap["problem"]:
            raise Missing(f"resets at {witness} ({tap['problem']})")
        for reset in tap["seen"]:
            if reset["sport"] in ports or reset["dport"] in ports:
                found.append(dict(reset, witness=witness))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Flows in the tables.


def flow_ports(flows: Iterable[Mapping[str, Any]], addresses: Iterable[str]) -> dict[int, int]:
    """Source port -> port after translation, of established TCP flows that are translated to one of ``addresses``."""
    wanted = set(addresses)
    ports = {}
    for flow in flows:
        if (
            flow.get("protocol") == "tcp"
            and flow.get("state") == "ESTABLISHED"
            and flow.get("snat")
            and need(flow, "reply", "dst") in wanted
        ):
            ports[int(need(flow, "orig", "sport"))] = int(need(flow, "reply", "dport"))
    return ports


def session_ports(evidence: Evidence) -> dict[str, tuple[int, int]]:
    """Name -> (source port at the inside, port the outside sees) of every session before the failure."""
    far = by_name(need(evidence, "server-before"))
    ports = {}
    for name, session in by_name(need(evidence, "client-before")).items():
        if not session["local"]:
            raise Missing(f"the connection of {name}")
        ports[name] = (int(session["local"][1]), int(need(far, name, "peer", 1)))
    return ports


def lacking(evidence: Evidence, facts: str, table: str) -> list[str]:
    """Sessions that are not in a table with the right translation."""
    have = flow_ports(need(evidence, facts, "flows", table), need(evidence, "meta", "virtual_ips"))
    return [name for name, (near, far) in session_ports(evidence).items() if have.get(near) != far]


def having(evidence: Evidence, facts: str, table: str) -> list[str]:
    """Sessions whose source port is in a table, in whatever state."""
    ports = {need(flow, "orig").get("sport") for flow in need(evidence, facts, "flows", table)}
    return [name for name, (near, _far) in session_ports(evidence).items() if near in ports]


def holds_all(facts: Mapping[str, Any]) -> bool:
    """True when a node holds every virtual address (and there is one)."""
    addresses = need(facts, "virtual_ips")
    return bool(addresses) and all(address["held"] for address in addresses)


def holds_none(facts: Mapping[str, Any]) -> bool:
    """True when a node holds no virtual address (and there is one)."""
    addresses = need(facts, "virtual_ips")
    return bool(addresses) and not any(address["held"] for address in addresses)


# ---------------------------------------------------------------------------------------------------------------------
# Checks. Each returns (passed, detail) or raises Missing.

Outcome = tuple[bool, str]


def check_ready(evidence: Evidence) -> Outcome:
    """Both nodes say READY; one holds every virtual address, the other none."""
    meta = need(evidence, "meta")
    active, backup = (need(evidence, f"facts-before-{meta[side]}") for side in ("from", "to"))
    verdicts = [need(facts, "sync", "verdict") for facts in (active, backup)]
    places = holds_all(active) and holds_none(backup)
    good = verdicts == ["READY", "READY"] and places
    where = "holds every virtual address" if places else "is NOT the only holder of the virtual addresses"
    return good, f"{meta['from']} {verdicts[0]} and {where}, {meta['to']} {verdicts[1]}"


def check_enough(evidence: Evidence) -> Outcome:
    """A real SSH session, ten other TCP sessions at least, busy ones and idle ones."""
    sessions = need(evidence, "client-before", "sessions")
    kinds = [session["kind"] for session in sessions if session["alive"]]
    others = len(kinds) - kinds.count("ssh")
    good = "ssh" in kinds and others >= 10 and "busy" in kinds and "idle" in kinds
    return good, f"{kinds.count('ssh')} SSH and {others} TCP sessions open ({kinds.count('idle')} of them idle)"


def check_replicated(evidence: Evidence) -> Outcome:
    """Every session is in the active's table and in the backup's cache and kernel, translation included."""
    meta = need(evidence, "meta")
    total = len(session_ports(evidence))
    parts = []
    for side, table, title in (
        ("from", "internal", "internal cache"),
        ("to", "external", "external cache"),
        ("to", "kernel", "kernel"),
    ):
        absent = lacking(evidence, f"facts-before-{meta[side]}", table)
        if absent:
            parts.append(f"not in {meta[side]}'s {title}: {listing(absent)}")
    detail = f"{total} of {total} in {meta['from']}'s internal cache, {meta['to']}'s external cache and its kernel"
    return total > 0 and not parts, "; ".join(parts) or detail


def check_vip(evidence: Evidence) -> Outcome:
    """The other node holds every virtual address, and the kernel said when."""
    meta = need(evidence, "meta")
    held = holds_all(need(evidence, f"facts-after-{meta['to']}"))
    moves = vip_moves(evidence)
    late = [address for address, move in moves.items() if move is None]
    if not held or late or not moves:
        return False, f"{meta['to']} does not hold every virtual address" + (f": {listing(late)}" if late else "")
    return True, ", ".join(f"{address} on {meta['to']} after {move} ms" for address, move in moves.items())


def check_ssh(evidence: Evidence) -> Outcome:
    """The same SSH process and the same TCP connection go on."""
    old = need(by_name(need(evidence, "client-before")), "ssh")
    new = need(by_name(need(evidence, "client-after")), "ssh")
    row = next(row for row in session_rows(evidence) if row["name"] == "ssh")
    same = old["pid"] is not None and old["pid"] == new["pid"] and old["local"] and old["local"] == new["local"]
    if same and new["alive"] and row["survived"]:
        return True, f"process {new['pid']}, connection from {endpoint(new['local'])}, {row['lines']} lines"
    return False, listing(row["reasons"]) or new["stderr"] or "another process or connection than before"


def check_survival(evidence: Evidence) -> Outcome:
    """No session was lost."""
    rows = session_rows(evidence)
    dead = [f"{row['name']} ({'; '.join(row['reasons'])})" for row in rows if not row["survived"]]
    return bool(rows) and not dead, listing(dead, 3) or f"0 of {len(rows)} sessions lost"


def check_lines(evidence: Evidence) -> Outcome:
    """No line was lost, doubled, reordered or altered, in either direction."""
    bad, lines = [], 0
    for side in ("client-after", "server-after"):
        for name, session in by_name(need(evidence, side)).items():
            lines += session["received"]
            bad += [f"{name}: {count} {fault}" for fault, count in faults_of(session).items() if count]
    return lines > 0 and not bad, listing(bad) or f"{lines} numbered lines checked"


def check_snat(evidence: Evidence) -> Outcome:
    """The outside sees the same address and port before and after, and it is a virtual address."""
    rows = session_rows(evidence)
    virtual = need(evidence, "meta", "virtual_ips")
    bad = [
        f"{row['name']}: {row['snat_before']}, then {row['snat_after'] or 'nothing'}"
        for row in rows
        if not row["snat_before"]
        or row["snat_before"] != row["snat_after"]
        or row["snat_before"].rpartition(":")[0] not in virtual
    ]
    seen = sorted({str(row["snat_before"]).rpartition(":")[0] for row in rows})
    return bool(rows) and not bad, listing(bad) or f"always {listing(seen)}, every port unchanged"


def check_resets(evidence: Evidence) -> Outcome:
    """No end got a reset, and none left a firewall."""
    meta = need(evidence, "meta")
    seen = resets_of(evidence)
    counts = [
        filter_counters(need(evidence, f"firewall-{when}-{meta['to']}", "filter"))["resets"]
        for when in ("before", "after")
    ]
    if -1 in counts:
        return False, f"{meta['to']} has no rule that counts resets in OUTPUT (set ruleset_count_resets)"
    left = counts[1] - counts[0]
    if seen or left:
        return False, f"{len(seen)} resets seen, {left} counted in {meta['to']}'s OUTPUT" + (
            f"; first: {seen[0]['src']}:{seen[0]['sport']} -> {seen[0]['dst']}:{seen[0]['dport']}" if seen else ""
        )
    return True, f"none at either end, none on {meta['to']}, none counted in its OUTPUT"


def check_idle(evidence: Evidence) -> Outcome:
    """Sessions that were silent all the time answer after the take-over."""
    answers = need(evidence, "poke", "answers_ms")
    silent = [name for name, answer in answers.items() if answer is None]
    slowest = max((answer for answer in answers.values() if answer is not None), default=0)
    return bool(answers) and not silent, (
        f"no answer from {listing(silent)}" if silent else f"{len(answers)} answered, the slowest in {slowest} ms"
    )


def check_return(evidence: Evidence) -> Outcome:
    """The dead node comes back, gets READY by itself and stays backup."""
    meta = need(evidence, "meta")
    back, other = (need(evidence, f"facts-back-{meta[side]}") for side in ("from", "to"))
    verdict = need(back, "sync", "verdict")
    stays = holds_none(back) and holds_all(other)
    took = evidence.get("ready-after", {}).get("seconds")
    place = "backup" if stays else "NOT backup: the virtual addresses moved back"
    when = f" {took} s after power on" if took is not None else ""
    return verdict == "READY" and stays, f"{meta['from']} {verdict}{when}, {place}"


def check_control_off(evidence: Evidence) -> Outcome:
    """Replication was off, and the backup knew none of the sessions."""
    meta = need(evidence, "meta")
    on = [
        meta[side]
        for side in ("from", "to")
        if need(evidence, f"facts-before-{meta[side]}", "sync", "replicate") is not False
    ]
    known = having(evidence, f"facts-before-{meta['to']}", "kernel")
    known += having(evidence, f"facts-before-{meta['to']}", "external")
    if on:
        return False, f"replication was on: {listing(on)}"
    if known:
        return False, f"{meta['to']} knew {listing(sorted(set(known)))} before the failure"
    absent = lacking(evidence, f"facts-before-{meta['from']}", "internal")
    if absent:
        return False, f"not in {meta['from']}'s own table: {listing(absent)}"
    return True, f"off on both nodes; none of {len(session_ports(evidence))} sessions in {meta['to']}'s table"


def check_control_same(evidence: Evidence, positive: Optional[Evidence]) -> Outcome:
    """Same kernel settings and same rules as in the positive run."""
    if positive is None:
        raise Missing("a failover with replication, to compare with")
    node = need(evidence, "meta", "to")
    mine = need(evidence, f"firewall-before-{node}")
    theirs = positive.get(f"firewall-before-{node}") or need(positive, f"firewall-after-{node}")
    differing = sorted(
        key
        for key in set(need(mine, "sysctl")) | set(need(theirs, "sysctl"))
        if mine["sysctl"].get(key) != theirs["sysctl"].get(key)
    )
    if not mine["sysctl"]:
        raise Missing("kernel settings")
    if differing:
        return False, f"settings of {node} differ: {listing(differing)}"
    if without_counters(need(mine, "filter")) != without_counters(need(theirs, "filter")):
        return False, f"rules of {node} differ from the positive run"
    return True, f"{len(mine['sysctl'])} settings and all filter rules of {node} as in the positive run"


def check_control_death(evidence: Evidence) -> Outcome:
    """Without replication the SSH session dies."""
    end = need(evidence, "ssh-end")
    session = need(by_name(need(evidence, "client-after")), "ssh")
    if need(end, "ended") and end["rc"] == 255 and not session["alive"]:
        took = round(float(session["ended"]) - failed_at(evidence), 1)
        return True, f"ssh ended with rc 255, {took} s after the failure: {session['stderr'] or session['error']}"
    return False, f"the SSH session is not dead (rc {end['rc']}): this test would prove nothing"


def check_control_all(evidence: Evidence) -> Outcome:
    """Without replication no session passes the new active node."""
    rows = session_rows(evidence)
    alive = [row["name"] for row in rows if row["survived"]]
    return bool(rows) and not alive, f"survived: {listing(alive)}" if alive else f"{len(rows)} of {len(rows)} dead"


def control_counters(evidence: Evidence) -> dict[str, int]:
    """How much rule [5] and the FORWARD policy of the new active node have counted since the failure."""
    node = need(evidence, "meta", "to")
    before, after = (
        filter_counters(need(evidence, f"firewall-{when}-{node}", "filter")) for when in ("before", "after")
    )
    return {name: after[name] - before[name] for name in ("invalid", "policy")}


def check_control_drops(evidence: Evidence) -> Outcome:
    """Rule [5] or the policy of the new active node counted the dropped packets."""
    rose = control_counters(evidence)
    return max(
        rose.values()
    ) > 0, f"rule [5] (INVALID, LOG) +{rose['invalid']}, FORWARD policy +{rose['policy']} packets"


def check_control_fresh(evidence: Evidence) -> Outcome:
    """A new session passes through the new active node: only the state was missing."""
    fresh = need(evidence, "fresh")
    good = bool(fresh["tcp"]) and fresh["ssh"] is not False
    return good, fresh["error"] or f"TCP and SSH, seen as {endpoint(fresh['seen_as'])}"


def check_control_absent(evidence: Evidence) -> Outcome:
    """After the take-over the new active node still lacks the old sessions."""
    node = need(evidence, "meta", "to")
    known = having(evidence, f"facts-after-{node}", "kernel")
    return not known, f"{node} has {listing(known)}" if known else f"none of the old sessions in {node}'s table"


FAILOVER_CHECKS: tuple[tuple[str, str, Callable[[Evidence], Outcome]], ...] = (
    ("ready", "Both nodes ready before the failure", check_ready),
    ("sessions", "A real SSH session and at least ten more", check_enough),
    ("replicated", "Every session replicated, translation included", check_replicated),
    ("vip", "The virtual addresses moved", check_vip),
    ("ssh", "The same SSH process and connection went on", check_ssh),
    ("survival", "No session lost", check_survival),
    ("lines", "No line lost, doubled or reordered", check_lines),
    ("snat", "Same translated address and port", check_snat),
    ("resets", "Nobody got a reset, none left a firewall", check_resets),
    ("idle", "Idle sessions answer", check_idle),
    ("return", "The node came back ready, as backup", check_return),
)
CONTROL_CHECKS: tuple[tuple[str, str, Callable[[Evidence], Outcome]], ...] = (
    ("off", "Replication off, the backup knows no session", check_control_off),
    ("vip", "The virtual addresses moved", check_vip),
    ("death", "The SSH session died", check_control_death),
    ("all", "No session got through", check_control_all),
    ("drops", "The dropped packets were counted", check_control_drops),
    ("fresh", "A new session passes the new active node", check_control_fresh),
    ("absent", "The new active node lacks the old sessions", check_control_absent),
)


def run_check(name: str, title: str, function: Callable[[], Outcome]) -> Check:
    """Run one check; evidence that is missing or malformed makes it fail and is named."""
    try:
        passed, detail = function()
    except Missing as missing:
        passed, detail = False, f"no evidence: {missing}"
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, StopIteration) as error:
        passed, detail = False, f"evidence not usable: {type(error).__name__}: {error}"
    return Check(name, title, bool(passed), str(detail))


def checks_of(evidence: Evidence, positive: Optional[Evidence] = None) -> list[Check]:
    """Every check of one experiment. ``positive``: a failover with replication, for the control to compare with."""
    if need(evidence, "meta", "kind") == "failover":
        return [run_check(name, title, lambda f=f: f(evidence)) for name, title, f in FAILOVER_CHECKS]  # type: ignore[misc]
    checks = [run_check(name, title, lambda f=f: f(evidence)) for name, title, f in CONTROL_CHECKS]  # type: ignore[misc]
    same = run_check(
        "same", "Same settings and rules as with replication", lambda: check_control_same(evidence, positive)
    )
    return [checks[0], same, *checks[1:]]


def closing_checks(experiments: Sequence[Evidence]) -> list[Check]:
    """At the end of a run both ends compare what was sent with what arrived, to the last line."""

    def closed(evidence: Evidence) -> Outcome:
        bad, lines = [], 0
        for name, session in by_name(need(evidence, "client-closed")).items():
            told = session["verified"]
            if not told or told["received"] != session["sent"] or any(faults_of(told).values()):
                bad.append(f"{name}: {session['sent']} sent, {told['received'] if told else 'unknown'} arrived")
            elif any(faults_of(session).values()):
                bad.append(f"{name}: {listing(f'{n} {what}' for what, n in faults_of(session).items() if n)}")
            lines += session["sent"] + session["received"]
        return lines > 0 and not bad, listing(bad) or f"{lines} lines sent, {lines} arrived in order"

    last: dict[Any, Evidence] = {}
    for evidence in experiments:
        if need(evidence, "meta", "kind") == "failover":
            last[need(evidence, "meta", "run")] = evidence
    return [
        run_check(f"closing-{run}", f"Run {run}: every line of every session accounted for", lambda e=e: closed(e))  # type: ignore[misc]
        for run, e in last.items()
    ]


# ---------------------------------------------------------------------------------------------------------------------
# The report.


def describe(evidence: Evidence, positive: Optional[Evidence]) -> dict[str, Any]:
    """One experiment as the report has it."""
    meta = need(evidence, "meta")
    checks = checks_of(evidence, positive)
    result: dict[str, Any] = {
        "kind": meta["kind"],
        "run": meta["run"],
        "title": meta["title"],
        "from": meta["from"],
        "to": meta["to"],
        "verdict": "passed" if all(check.passed for check in checks) else "failed",
        "checks": [check.as_dict() for check in checks],
        "failed_at": None,
        "vip_ms": {},
        "takeover_ms": None,
        "longest_gap_ms": None,
        "sessions": [],
        "resets": None,
        "window_ms": [-WINDOW_BEFORE_MS, 5000],
        "lines": meta.get("lines", {}),
        "ready_after_s": evidence.get("ready-after", {}).get("seconds"),
    }
    try:
        moment = failed_at(evidence)
        result["failed_at"] = round(moment, 3)
        result["sessions"] = session_rows(evidence)
        result["vip_ms"] = vip_moves(evidence)
        moves = list(result["vip_ms"].values())
        result["takeover_ms"] = None if not moves or None in moves else max(moves)
        result["resets"] = len(resets_of(evidence))
    except (Missing, KeyError, TypeError, ValueError, IndexError):
        # The checks above say what is missing; the report shows what there is.
        pass
    gaps = [row["gap_ms"] for row in result["sessions"] if row["gap_ms"] is not None]
    ends = [t for row in result["sessions"] for side in ("down", "up") for t, _size in row["timeline"][side]]
    if meta["kind"] == "failover":
        result["longest_gap_ms"] = max(gaps, default=None)
        result["window_ms"][1] = min(WINDOW_LONGEST_MS, max(3000, 2 * max(gaps, default=0) + 1500))
    else:
        ssh = next((row for row in result["sessions"] if row["name"] == "ssh"), None)
        if ssh is not None:
            session = by_name(evidence["client-after"])["ssh"]
            if session["ended"] and result["failed_at"]:
                result["died_after_ms"] = round((session["ended"] - result["failed_at"]) * 1000)
                result["rc"] = session["rc"]
        result["window_ms"][1] = min(WINDOW_LONGEST_MS, max(4000, int(result.get("died_after_ms", 3500)) + 1000))
        try:
            result["dropped"] = control_counters(evidence)
        except Missing:
            result["dropped"] = {}
        result["fresh"] = evidence.get("fresh")
    if not ends:
        result["window_ms"] = [-WINDOW_BEFORE_MS, 3000]
    first, last = result["window_ms"]
    for row in result["sessions"]:
        for side in ("down", "up"):
            row["timeline"][side] = [[t, size] for t, size in row["timeline"][side] if first - STEP_MS <= t <= last]
    return result


def summarise(sessions: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Sessions over several failovers: survived means survived each; the gap is the longest."""
    merged: dict[tuple[int, str], dict[str, Any]] = {}
    for row in sessions:
        key = (row["run"], row["name"])
        short = {name: row[name] for name in ("name", "proto", "kind", "survived", "gap_ms", "answer_ms", "bytes")}
        short.update(run=row["run"], snat_before=row["snat_before"], snat_after=row["snat_after"])
        if key not in merged:
            merged[key] = short
            continue
        old = merged[key]
        old["survived"] = old["survived"] and short["survived"]
        old["bytes"] = max(old["bytes"], short["bytes"])
        old["snat_after"] = short["snat_after"]
        for name in ("gap_ms", "answer_ms"):
            values = [value for value in (old[name], short[name]) if value is not None]
            old[name] = max(values) if values else None
    return list(merged.values())


def build(
    experiments: Sequence[Evidence],
    expected: Sequence[Mapping[str, Any]] = (),
    failure: str = "",
    about: Optional[Mapping[str, Any]] = None,
) -> dict[str, Any]:
    """The whole report as plain data.

    ``expected``: one mapping with ``kind`` and ``run`` per experiment that was asked for; one that is missing fails
    the test. ``failure``: what stopped the playbook, empty when nothing did.
    """
    positives = [evidence for evidence in experiments if need(evidence, "meta", "kind") == "failover"]

    def partner(evidence: Evidence) -> Optional[Evidence]:
        node = need(evidence, "meta", "to")
        fitting = [
            p for p in positives if f"firewall-before-{node}" in p and p["meta"]["run"] == evidence["meta"]["run"]
        ]
        return fitting[-1] if fitting else None

    described = [describe(evidence, partner(evidence)) for evidence in experiments]
    general = [Check("run", "The test ran to its end", not failure, failure or "every step was done")]
    done = [(part["kind"], part["run"]) for part in described]
    for kind, run in sorted({(str(part["kind"]), int(part["run"])) for part in expected}):
        asked = sum(1 for part in expected if (part["kind"], int(part["run"])) == (kind, run))
        if done.count((kind, run)) != asked:
            detail = f"{asked} asked for, {done.count((kind, run))} done"
            general.append(Check(f"asked-{kind}-{run}", f"Run {run}: every {kind} was made", False, detail))
    if not described:
        general.append(Check("evidence", "There is evidence", False, "no experiment was made"))
    general += closing_checks(experiments)

    failovers = [part for part in described if part["kind"] == "failover"]
    controls = [part for part in described if part["kind"] == "control"]
    sessions = summarise(dict(row, run=part["run"]) for part in failovers for row in part["sessions"])
    takeovers = [part["takeover_ms"] for part in failovers if part["takeover_ms"] is not None]
    gaps = [part["longest_gap_ms"] for part in failovers if part["longest_gap_ms"] is not None]
    good = all(check.passed for check in general) and all(part["verdict"] == "passed" for part in described)
    return {
        "schema": SCHEMA,
        "verdict": "passed" if good else "failed",
        "about": dict(about or {}),
        "checks": [check.as_dict() for check in general],
        "sessions": sessions,
        "takeover": {
            "failovers": len(failovers),
            "vip_ms": [part["takeover_ms"] for part in failovers],
            "worst_vip_ms": max(takeovers, default=None),
            "longest_gap_ms": max(gaps, default=None),
        },
        "failovers": failovers,
        "negative_control": controls[-1] if controls else None,
        "negative_controls": controls,
    }


def moment(part: Mapping[str, Any]) -> float:
    """Sort key for described experiments: when the failure was; those where it is unknown come last."""
    return float(part["failed_at"] or 9e99)


def failed_checks(report: Mapping[str, Any]) -> list[str]:
    """Everything that failed, one line each."""
    lines = [f"{check['title']}: {check['detail']}" for check in report["checks"] if not check["passed"]]
    for part in sorted([*report["failovers"], *report["negative_controls"]], key=moment):
        label = f"run {part['run']}, {part['title']}"
        lines += [f"{label}: {check['title']}: {check['detail']}" for check in part["checks"] if not check["passed"]]
    return lines


def table(report: Mapping[str, Any]) -> list[str]:
    """A small table for the terminal."""

    def cell(value: Any, unit: str = "") -> str:
        return "-" if value is None else f"{value}{unit}"

    rows = [("failure", "sessions", "lost", "VIP", "gap", "RST", "verdict")]
    for part in sorted([*report["failovers"], *report["negative_controls"]], key=moment):
        lost = sum(1 for row in part["sessions"] if not row["survived"])
        rows.append(
            (
                f"{part['run']}. {part['from']} -> {part['to']}"
                + (", no replication" if part["kind"] == "control" else ""),
                str(len(part["sessions"])),
                str(lost),
                cell(part["takeover_ms"], " ms"),
                cell(part["longest_gap_ms"], " ms"),
                cell(part["resets"]),
                part["verdict"],
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(value.ljust(width) for value, width in zip(row, widths)).rstrip() for row in rows]
