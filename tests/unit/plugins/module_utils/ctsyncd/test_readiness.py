# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The verdict: every reason, and what it does to keepalived."""

from __future__ import annotations

import errno
from typing import Any

import pytest
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import readiness
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.readiness import (
    ACTIVE,
    BACKUP,
    DEGRADED,
    NOT_READY,
    READY,
    TRANSITION,
    Facts,
    PeerFacts,
    judge,
)
from hypothesis import given
from hypothesis import strategies as st

ACTIVE_PEER = PeerFacts("fw2", session=True, alive=True, silent_s=0.1, role=ACTIVE, replicates=True)
BACKUP_PEER = ACTIVE_PEER._replace(role=BACKUP, complete=True)
GOOD = Facts(
    role=BACKUP,
    replicate=True,
    peers=(ACTIVE_PEER,),
    leader=0,
    complete=True,
    waiting=0,
    refused={},
    lag_limit_s=2.0,
    problem="",
    impaired=(),
)
ACTIVE_GOOD = GOOD._replace(role=ACTIVE, peers=(BACKUP_PEER,), complete=False)
INCOMPLETE = {"complete": False}


def change(facts: Facts, **changes: Any) -> Facts:
    """Other facts; ``peer_*``: of the first peer."""
    first = {name[5:]: changes.pop(name) for name in list(changes) if name.startswith("peer_")}
    return facts._replace(**changes, peers=(facts.peers[0]._replace(**first), *facts.peers[1:]))


def test_all_is_well() -> None:
    assert judge(GOOD) == (READY, (), 0, True)
    assert judge(ACTIVE_GOOD) == (READY, (), 0, True)


@pytest.mark.parametrize(
    ("changes", "verdict", "reason"),
    [
        ({"problem": "no socket"}, NOT_READY, "no socket"),
        ({"replicate": False}, NOT_READY, "replication is off"),
        ({**INCOMPLETE, "peer_session": False}, NOT_READY, "no session with fw2"),
        ({**INCOMPLETE, "peer_alive": False}, NOT_READY, "fell silent before its table was here"),
        ({**INCOMPLETE, "peer_replicates": False}, NOT_READY, "replication is off on fw2"),
        ({**INCOMPLETE, "peer_role": BACKUP}, NOT_READY, "nobody has a table to give"),
        (INCOMPLETE, NOT_READY, "the table of fw2 is not complete here yet"),
        ({**INCOMPLETE, "progress": (70, 100)}, NOT_READY, "yet: receiving, 70 of about 100 flows so far"),
        ({**INCOMPLETE, "progress": (70, 0)}, NOT_READY, "yet: receiving, 70 flows so far"),
        ({"peer_alive": False, "peer_silent_s": 3.25}, DEGRADED, "fw2 is silent for 3.2 s"),
        ({"peer_left": True}, DEGRADED, "ctsyncd on fw2 has stopped: the table is as old as that"),
        ({**INCOMPLETE, "peer_left": True}, NOT_READY, "ctsyncd on fw2 stopped before its table was here"),
        ({"waiting": 21_000}, DEGRADED, "21000 flows wait for the kernel"),
        (
            {"refused": {errno.EEXIST: 2, errno.ENOMEM: 3, errno.EINVAL: 1}},
            DEGRADED,
            "the kernel refuses 6 flows (3: its table is full (net.netfilter.nf_conntrack_max); "
            "2: their translated addresses and ports are taken; 1: Invalid argument)",
        ),
        ({"reread_s": 4.6}, DEGRADED, "kernel events were lost: the table is read again in 5 s"),
        ({"impaired": ("no FIFO",)}, DEGRADED, "no FIFO"),
    ],
)
@pytest.mark.parametrize("role", [BACKUP, TRANSITION])
def test_standby(role: str, changes: dict[str, Any], verdict: str, reason: str) -> None:
    judged = judge(change(GOOD, role=role, **changes))
    assert judged.verdict == verdict
    assert reason in judged.reasons[0]
    assert judged.gate == (2 if verdict == NOT_READY else 0)


@pytest.mark.parametrize("changes", [INCOMPLETE, {"problem": "no socket"}])
def test_of_two_that_are_not_ready_the_one_that_holds_flows_is_better(changes: dict[str, Any]) -> None:
    assert judge(GOOD._replace(**changes, holds=True)).gate == 1
    assert judge(GOOD._replace(**changes, holds=False)).gate == 2
    assert judge(GOOD._replace(replicate=False, holds=True)).gate == 2  # what it holds is old


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"problem": "no socket"}, "no socket"),
        ({"replicate": False}, "replication is off: a failure loses every session"),
        ({"peer_session": False}, "no session with fw2: a failure loses every session"),
        ({"peer_alive": False, "peer_silent_s": None}, "fw2 is silent: changes are not replicated"),
        ({"peer_left": True, "peer_alive": False}, "ctsyncd on fw2 has stopped: changes are not replicated"),
        ({"peer_role": ACTIVE}, "split brain"),
        ({"peer_replicates": False}, "replication is off on fw2"),
        ({"peer_complete": False}, "does not hold the complete table yet"),
        ({"peer_learning": True, "peer_complete": False}, "this node may lack flows: fw2 is asked for what it holds"),
        ({"reread_s": 0.0}, "kernel events were lost: the table is read again"),
        ({"peer_lag_s": 2.5}, "lags 2.5 s behind"),
        ({"impaired": ("no FIFO",)}, "no FIFO"),
    ],
)
def test_active(changes: dict[str, Any], reason: str) -> None:
    judged = judge(change(ACTIVE_GOOD, **changes))
    assert judged.verdict == DEGRADED
    assert any(reason in text for text in judged.reasons)


THIRD = BACKUP_PEER._replace(name="fw3")


@pytest.mark.parametrize(
    ("peers", "reason"),
    [
        ((BACKUP_PEER, THIRD._replace(session=False)), "no session with fw3: it could not take over"),
        ((BACKUP_PEER, THIRD._replace(left=True)), "ctsyncd on fw3 has stopped: changes are not replicated to it"),
        (
            (BACKUP_PEER, THIRD._replace(alive=False, silent_s=4.0)),
            "fw3 is silent for 4.0 s: changes are not replicated to it",
        ),
        ((BACKUP_PEER, THIRD._replace(replicates=False)), "replication is off on fw3: it could not take over"),
        ((BACKUP_PEER, THIRD._replace(complete=False)), "fw3 does not hold the complete table yet"),
        ((BACKUP_PEER, THIRD._replace(lag_s=3.0)), "fw3 lags 3.0 s behind"),
        ((BACKUP_PEER, THIRD._replace(role=ACTIVE)), "fw3 is active too: split brain"),
        (
            (BACKUP_PEER._replace(complete=False), THIRD._replace(session=False)),
            "no session with fw3: a failure loses every session",
        ),
    ],
)
def test_active_names_the_backup_that_is_the_reason(peers: tuple[PeerFacts, ...], reason: str) -> None:
    judged = judge(ACTIVE_GOOD._replace(peers=peers))
    assert judged.verdict == DEGRADED
    assert judged.reasons[-1] == reason
    assert judged.gate == 0


def test_backup_is_ready_whatever_became_of_the_other_backup() -> None:
    for third in (THIRD, THIRD._replace(session=False, alive=False), THIRD._replace(left=True, alive=False)):
        assert judge(GOOD._replace(peers=(ACTIVE_PEER, third))) == (READY, (), 0, True)
        assert judge(GOOD._replace(peers=(third, ACTIVE_PEER), leader=1)) == (READY, (), 0, True)


def test_backup_that_does_not_hear_the_active_node_is_behind_one_that_does() -> None:
    """An only backup takes over whatever it has; of two the one that heard the active node last is better."""
    silent = ACTIVE_PEER._replace(alive=False, silent_s=60.0)
    assert judge(GOOD._replace(peers=(silent,))).gate == 0
    assert judge(GOOD._replace(peers=(silent, THIRD), holds=True)).gate == 1
    just_died = silent._replace(silent_s=3.0)  # both see it: neither goes behind
    assert judge(GOOD._replace(peers=(just_died, THIRD), holds=True)).gate == 0


def test_backup_without_an_active_node_says_why_of_each_peer() -> None:
    judged = judge(GOOD._replace(peers=(BACKUP_PEER, THIRD._replace(session=False)), leader=None, complete=False))
    assert judged.verdict == NOT_READY
    assert judged.reasons == ("fw2 is not active: nobody has a table to give", "no session with fw3")


def test_what_a_peer_has_not_said_yet_is_not_held_against_it() -> None:
    silent = ACTIVE_PEER._replace(role="", replicates=False)
    judged = judge(GOOD._replace(peers=(silent,), complete=False, progress=(70, 0)))
    assert judged.reasons[0].startswith("the table of fw2 is not complete here yet: receiving, 70 flows so far")
    assert judge(ACTIVE_GOOD._replace(peers=(silent,))).reasons == ("fw2 does not hold the complete table yet",)


def test_backup_sees_the_split_brain_of_others() -> None:
    judged = judge(GOOD._replace(peers=(ACTIVE_PEER, THIRD._replace(role=ACTIVE))))
    assert judged.verdict == DEGRADED
    assert judged.reasons == ("fw2 and fw3 are active at the same time: split brain",)


@pytest.mark.parametrize("facts", [GOOD, ACTIVE_GOOD])
def test_flapping_is_said(facts: Facts) -> None:
    judged = judge(facts._replace(flapping=True))
    assert (judged.verdict, judged.gate) == (DEGRADED, 0)
    assert "come and go" in judged.reasons[0]


_BOOLEANS = (
    "replicate",
    "peer_session",
    "peer_alive",
    "peer_left",
    "peer_replicates",
    "peer_complete",
    "complete",
    "holds",
)


@given(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from((ACTIVE, BACKUP, TRANSITION)),
            "peer_role": st.sampled_from((ACTIVE, BACKUP, TRANSITION, "")),
            "refused": st.dictionaries(st.sampled_from([errno.EEXIST, errno.EINVAL]), st.integers(1, 2)),
            "peer_lag_s": st.floats(0, 10),
            "problem": st.sampled_from(("", "broken")),
            "reread_s": st.none() | st.floats(0, 60),
            "differences": st.sampled_from(((), ("ruleset differs",))),
            **{name: st.booleans() for name in _BOOLEANS},
        }
    )
)
def test_gate_and_reasons(changes: dict[str, Any]) -> None:
    facts = change(GOOD, **changes)
    judged = judge(facts)
    assert bool(judged.reasons) == (judged.verdict != READY)
    assert bool(judged.gate) == (judged.verdict == NOT_READY)
    if facts.role == ACTIVE:
        assert not judged.gate  # never moves the virtual IPs away from the node that knows the flows
        assert judged.fit
    elif not facts.complete or not facts.replicate:
        assert judged.gate and not judged.fit
    elif facts.differences:
        assert judged.gate and judged.fit == (not facts.problem)
    if facts.differences:
        assert "ruleset differs" in judged.reasons or facts.problem or not facts.replicate


def test_exit_codes_cover_every_verdict() -> None:
    assert readiness.EXIT_CODES == {READY: 0, DEGRADED: 1, NOT_READY: 2}


@pytest.mark.parametrize("changes", [{"problem": "no socket"}, {"replicate": False}, INCOMPLETE])
def test_what_an_operator_should_mend_is_said_of_a_node_that_is_not_ready_too(changes: dict[str, Any]) -> None:
    verdict, reasons, _gate, _fit = judge(GOOD._replace(**changes, impaired=("the configuration was not reloaded",)))
    assert verdict == NOT_READY
    assert len(reasons) == 2 and reasons[1] == "the configuration was not reloaded"
