# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The verdict: may this node take over, and what would be lost?  Pure: facts in, verdict out."""

from __future__ import annotations

import errno
import os
from typing import Mapping, NamedTuple

READY = "READY"
DEGRADED = "DEGRADED"
NOT_READY = "NOT READY"

EXIT_CODES = {READY: 0, DEGRADED: 1, NOT_READY: 2}

ACTIVE = "active"
BACKUP = "backup"
TRANSITION = "transition"


class Facts(NamedTuple):
    """What the verdict depends on.  Ages in seconds."""

    role: str
    replicate: bool
    peer: str
    session: bool  # keys are agreed on with the peer
    peer_alive: bool
    peer_left: bool  # it said that it stops
    peer_silent_s: float | None
    peer_role: str
    peer_replicates: bool
    peer_complete: bool
    complete: bool  # a bulk ended and everything it named is where it belongs
    waiting: int  # replicas that wait for this node's kernel
    refused: Mapping[int, int]  # replicas that this node's kernel refuses to hold: how many, by errno
    lag_s: float  # age of the oldest change that the peer has not acknowledged
    lag_limit_s: float
    problem: str  # what stops replication: no sync socket
    impaired: tuple[str, ...]  # what an operator should mend but does not stop replication
    holds: bool = False  # this node was complete once, or has some of the peer's flows
    learning: bool = False  # active, and gets from the peer what it lacks
    progress: tuple[int, int] | None = None  # flows of the table that comes in so far; about how many there will be
    differences: tuple[str, ...] = ()  # of this node's rules, limits and timers from its peer's
    reread_s: float | None = None  # events were lost: until the kernel's table is read again


# What the track file says; keepalived takes that many times the weight off the priority of this node
OPEN = 0
KNOWS_SOME = 1  # not ready, but holds flows of the peer
KNOWS_NOTHING = 2  # not ready, and another node that is not ready is better than this one


class Verdict(NamedTuple):
    """``gate``: what the track file says, so that keepalived lowers this node's priority.

    ``fit``: this node has the flows that a take-over needs, be its rules as they may.  A deployment, which makes rules
    alike one node after the other, goes by that.
    """

    verdict: str
    reasons: tuple[str, ...]
    gate: int
    fit: bool = True


def judge(facts: Facts) -> Verdict:
    """Readiness gates only *becoming* active: on the active node the gate is always open (lowering its priority would
    move the virtual IPs to a staler node)."""
    if facts.role == ACTIVE:
        return _judge_active(facts)
    return _judge_standby(facts)


def _judge_active(facts: Facts) -> Verdict:
    reasons = []
    if facts.problem:
        reasons.append(facts.problem)
    if not facts.replicate:
        reasons.append("replication is off: a failure loses every session")
    elif not facts.session:
        reasons.append(f"no session with {facts.peer}: a failure loses every session")
    elif facts.peer_left:
        reasons.append(f"ctsyncd on {facts.peer} has stopped: changes are not replicated")
    elif not facts.peer_alive:
        reasons.append(f"{facts.peer} is silent{_for(facts.peer_silent_s)}: changes are not replicated")
    elif facts.peer_role == ACTIVE:
        reasons.append(f"{facts.peer} is active too: split brain")
    elif not facts.peer_replicates:
        reasons.append(f"replication is off on {facts.peer}: a failure loses every session")
    elif facts.learning:
        reasons.append(f"this node may lack flows: {facts.peer} is asked for what it holds")
    elif not facts.peer_complete:
        reasons.append(f"{facts.peer} does not hold the complete table yet")
    elif facts.lag_s > facts.lag_limit_s:
        reasons.append(f"{facts.peer} lags {facts.lag_s:.1f} s behind")
    if facts.reread_s is not None:
        reasons.append(_why_reread(facts.reread_s))
    reasons.extend(facts.differences)
    reasons.extend(facts.impaired)
    return Verdict(DEGRADED if reasons else READY, tuple(reasons), OPEN)


def _judge_standby(facts: Facts) -> Verdict:
    gate = KNOWS_SOME if facts.holds else KNOWS_NOTHING
    if facts.problem:
        return Verdict(NOT_READY, (facts.problem, *facts.impaired), gate, False)
    if not facts.replicate:
        return Verdict(NOT_READY, ("replication is off", *facts.impaired), KNOWS_NOTHING, False)
    if not facts.complete:
        reasons = (_why_incomplete(facts), *facts.differences, *facts.impaired)
        return Verdict(NOT_READY, reasons, gate, False)
    found = list(facts.differences)
    if facts.peer_left:
        found.append(f"ctsyncd on {facts.peer} has stopped: the table is as old as that")
    elif not facts.peer_alive:
        found.append(f"{facts.peer} is silent{_for(facts.peer_silent_s)}: the table is as old as that")
    if facts.waiting:
        found.append(f"{facts.waiting} flows wait for the kernel")
    if facts.refused:
        found.append(_why_refused(facts.refused))
    if facts.reread_s is not None:
        found.append(_why_reread(facts.reread_s))
    found.extend(facts.impaired)
    if facts.differences:
        return Verdict(NOT_READY, tuple(found), KNOWS_SOME)
    return Verdict(DEGRADED if found else READY, tuple(found), OPEN)


def _why_incomplete(facts: Facts) -> str:
    if not facts.session:
        return f"no session with {facts.peer}"
    if facts.peer_left:
        return f"ctsyncd on {facts.peer} stopped before its table was here"
    if not facts.peer_alive:
        return f"{facts.peer} fell silent before its table was here"
    if not facts.peer_replicates:
        return f"replication is off on {facts.peer}"
    if facts.peer_role != ACTIVE:
        return f"{facts.peer} is not active: nobody has a table to give"
    so_far = "" if facts.progress is None else f": receiving, {_so_far(facts.progress)} flows so far"
    bound = f" (if {facts.peer} fails, this node serves with what it has)"
    return f"the table of {facts.peer} is not complete here yet{so_far}{bound}"


def _so_far(progress: tuple[int, int]) -> str:
    flows, expected = progress
    return f"{flows} of about {expected}" if expected >= flows else str(flows)


def table_text(active: bool, bulk: str, progress: tuple[int, int] | None) -> str:
    """Of a peer: has it, if it is the backup, the whole table; has this node, if it is the backup, that of the peer?"""
    if active:
        return {"complete": "holds the whole table", "sending": "is being sent the table"}.get(
            bulk, "does not hold the table"
        )
    if bulk == "receiving" and progress is not None:
        return f"its table is coming in: {_so_far(progress)} flows"
    return {"complete": "its whole table is here", "receiving": "its table is being compared with the kernel"}.get(
        bulk, "its table is not here"
    )


def _why_reread(seconds: float) -> str:
    when = f" in {seconds:.0f} s" if seconds >= 0.5 else ""
    return f"kernel events were lost: the table is read again{when}"


_REFUSALS = {
    errno.EEXIST: "their translated addresses and ports are taken",
    errno.ENOMEM: "its table is full (net.netfilter.nf_conntrack_max)",
    errno.ENOENT: "their helper or master connection is missing",
    errno.EOPNOTSUPP: "it does not support them",
}


def _why_refused(refused: Mapping[int, int]) -> str:
    """The reasons, the most frequent first."""
    ordered = sorted(refused.items(), key=lambda item: (-item[1], item[0]))
    reasons = (f"{count}: {_REFUSALS.get(number) or os.strerror(number)}" for number, count in ordered)
    return f"the kernel refuses {sum(refused.values())} flows ({'; '.join(reasons)})"


def _for(seconds: float | None) -> str:
    return "" if seconds is None else f" for {seconds:.1f} s"
