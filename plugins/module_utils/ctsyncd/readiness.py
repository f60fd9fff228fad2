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


class PeerFacts(NamedTuple):
    """What the verdict depends on, of one peer.  Ages in seconds."""

    name: str
    session: bool = False  # keys are agreed on with it
    alive: bool = False
    left: bool = False  # it said that it stops
    silent_s: float | None = None
    role: str = ""
    replicates: bool = False
    complete: bool = False
    learning: bool = False  # this node is active, and gets from it what it lacks
    lag_s: float = 0.0  # age of the oldest change that it has not acknowledged


class Facts(NamedTuple):
    """What the verdict depends on.  Ages in seconds."""

    role: str
    replicate: bool
    peers: tuple[PeerFacts, ...]
    leader: int | None  # which of the peers this backup holds the replicas of
    complete: bool  # a bulk ended and everything it named is where it belongs
    waiting: int  # replicas that wait for this node's kernel
    refused: Mapping[int, int]  # replicas that this node's kernel refuses to hold: how many, by errno
    lag_limit_s: float
    problem: str  # what stops replication: no sync socket
    impaired: tuple[str, ...]  # what an operator should mend but does not stop replication
    holds: bool = False  # this node was complete once, or has some of the peer's flows
    progress: tuple[int, int] | None = None  # flows of the table that comes in so far; about how many there will be
    differences: tuple[str, ...] = ()  # of this node's rules, limits and timers from its peer's
    reread_s: float | None = None  # events were lost: until the kernel's table is read again
    full: int = 0  # flows for which this node has room, where the peer has more
    flapping: bool = False  # the virtual IPs come and go


STALE_S = 10.0  # silence of the active node after which another backup, that heard it since, is the better one

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
    else:
        covered = any(_covers(peer) for peer in facts.peers)
        reasons.extend(filter(None, (_why_uncovered(peer, facts, covered) for peer in facts.peers)))
    reasons.extend(facts.differences)
    reasons.extend(_general(facts))
    return Verdict(DEGRADED if reasons else READY, tuple(reasons), OPEN)


def _covers(peer: PeerFacts) -> bool:
    """Could it take over from this active node without a loss?"""
    return peer.session and peer.alive and not peer.left and peer.replicates and peer.complete


def _why_uncovered(peer: PeerFacts, facts: Facts, covered: bool) -> str:
    """What is wrong with this backup of an active node.  ``covered``: another one could take over."""
    loss = "it could not take over" if covered else "a failure loses every session"
    if not peer.session:
        return f"no session with {peer.name}: {loss}"
    if peer.left:
        return f"ctsyncd on {peer.name} has stopped: changes are not replicated" + (" to it" if covered else "")
    if not peer.alive:
        return f"{peer.name} is silent{_for(peer.silent_s)}: changes are not replicated" + (" to it" if covered else "")
    if peer.role == ACTIVE:
        return f"{peer.name} is active too: split brain"
    if peer.role and not peer.replicates:  # it has said so
        return f"replication is off on {peer.name}: {loss}"
    if peer.learning:
        return f"this node may lack flows: {peer.name} is asked for what it holds"
    if not peer.complete:
        return f"{peer.name} does not hold the complete table yet"
    if peer.lag_s > facts.lag_limit_s:
        return f"{peer.name} lags {peer.lag_s:.1f} s behind"
    return ""


def _general(facts: Facts) -> list[str]:
    """What is worth a reason on any node."""
    reasons = []
    if facts.reread_s is not None:
        reasons.append(_why_reread(facts.reread_s))
    return [*reasons, *_flaps(facts), *facts.impaired]


def _flaps(facts: Facts) -> list[str]:
    text = "the virtual IPs come and go: bulks are held back (look at keepalived and its links)"
    return [text] if facts.flapping else []


def _judge_standby(facts: Facts) -> Verdict:
    gate = KNOWS_SOME if facts.holds else KNOWS_NOTHING
    if facts.problem:
        return Verdict(NOT_READY, (facts.problem, *facts.impaired), gate, False)
    if not facts.replicate:
        return Verdict(NOT_READY, ("replication is off", *facts.impaired), KNOWS_NOTHING, False)
    leader = None if facts.leader is None else facts.peers[facts.leader]
    if leader is None or not facts.complete:
        about = facts.peers if leader is None else (leader,)
        why = (_why_incomplete(peer, facts.progress) for peer in about)
        reasons = (*why, *_both_active(facts), *_flaps(facts), *facts.differences, *facts.impaired)
        return Verdict(NOT_READY, reasons, gate, False)
    found, gate = list(facts.differences), OPEN
    if leader.left:
        found.append(f"ctsyncd on {leader.name} has stopped: the table is as old as that")
    elif not leader.alive:
        found.append(f"{leader.name} is silent{_for(leader.silent_s)}: the table is as old as that")
        if len(facts.peers) > 1 and (leader.silent_s is None or leader.silent_s > STALE_S):
            gate = KNOWS_SOME
    if facts.waiting:
        found.append(f"{facts.waiting} flows wait for the kernel")
    if facts.refused:
        found.append(_why_refused(facts.refused))
    if facts.full:
        found.append(f"the external cache is full ({facts.full} flows): others of {leader.name} are not here")
    found.extend(_both_active(facts))
    found.extend(_general(facts))
    if facts.differences:
        return Verdict(NOT_READY, tuple(found), KNOWS_SOME)
    return Verdict(DEGRADED if found else READY, tuple(found), gate)


def _both_active(facts: Facts) -> list[str]:
    active = [peer.name for peer in facts.peers if peer.alive and peer.role == ACTIVE]
    return [f"{' and '.join(active)} are active at the same time: split brain"] if len(active) > 1 else []


def _why_incomplete(peer: PeerFacts, progress: tuple[int, int] | None) -> str:
    if not peer.session:
        return f"no session with {peer.name}"
    if peer.left:
        return f"ctsyncd on {peer.name} stopped before its table was here"
    if not peer.alive:
        return f"{peer.name} fell silent before its table was here"
    if peer.role and not peer.replicates:  # it has said so
        return f"replication is off on {peer.name}"
    if peer.role and peer.role != ACTIVE:
        return f"{peer.name} is not active: nobody has a table to give"
    so_far = "" if progress is None else f": receiving, {_so_far(progress)} flows so far"
    bound = f" (if {peer.name} fails, this node serves with what it has)"
    return f"the table of {peer.name} is not complete here yet{so_far}{bound}"


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
