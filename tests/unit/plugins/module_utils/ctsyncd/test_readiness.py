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
    judge,
)
from hypothesis import given
from hypothesis import strategies as st

GOOD = Facts(
    role=BACKUP,
    replicate=True,
    peer="fw2",
    session=True,
    peer_alive=True,
    peer_left=False,
    peer_silent_s=0.1,
    peer_role=ACTIVE,
    peer_replicates=True,
    peer_complete=False,
    complete=True,
    waiting=0,
    refused={},
    lag_s=0.0,
    lag_limit_s=2.0,
    problem="",
    impaired=(),
)
ACTIVE_GOOD = GOOD._replace(role=ACTIVE, peer_role=BACKUP, peer_complete=True, complete=False)
INCOMPLETE = {"complete": False}


def test_all_is_well() -> None:
    assert judge(GOOD) == (READY, (), 0, True)
    assert judge(ACTIVE_GOOD) == (READY, (), 0, True)


@pytest.mark.parametrize(
    ("changes", "verdict", "reason"),
    [
        ({"problem": "no socket"}, NOT_READY, "no socket"),
        ({"replicate": False}, NOT_READY, "replication is off"),
        ({**INCOMPLETE, "session": False}, NOT_READY, "no session with fw2"),
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
    judged = judge(GOOD._replace(role=role, **changes))
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
        ({"session": False}, "no session with fw2: a failure loses every session"),
        ({"peer_alive": False, "peer_silent_s": None}, "fw2 is silent: changes are not replicated"),
        ({"peer_left": True, "peer_alive": False}, "ctsyncd on fw2 has stopped: changes are not replicated"),
        ({"peer_role": ACTIVE}, "split brain"),
        ({"peer_replicates": False}, "replication is off on fw2"),
        ({"peer_complete": False}, "does not hold the complete table yet"),
        ({"learning": True, "peer_complete": False}, "this node may lack flows: fw2 is asked for what it holds"),
        ({"reread_s": 0.0}, "kernel events were lost: the table is read again"),
        ({"lag_s": 2.5}, "lags 2.5 s behind"),
        ({"impaired": ("no FIFO",)}, "no FIFO"),
    ],
)
def test_active(changes: dict[str, Any], reason: str) -> None:
    judged = judge(ACTIVE_GOOD._replace(**changes))
    assert judged.verdict == DEGRADED
    assert any(reason in text for text in judged.reasons)


_BOOLEANS = ("replicate", "session", "peer_alive", "peer_left", "peer_replicates", "peer_complete", "complete", "holds")


@given(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from((ACTIVE, BACKUP, TRANSITION)),
            "peer_role": st.sampled_from((ACTIVE, BACKUP, TRANSITION, "")),
            "refused": st.dictionaries(st.sampled_from([errno.EEXIST, errno.EINVAL]), st.integers(1, 2)),
            "lag_s": st.floats(0, 10),
            "problem": st.sampled_from(("", "broken")),
            "reread_s": st.none() | st.floats(0, 60),
            "differences": st.sampled_from(((), ("ruleset differs",))),
            **{name: st.booleans() for name in _BOOLEANS},
        }
    )
)
def test_gate_and_reasons(changes: dict[str, Any]) -> None:
    facts = GOOD._replace(**changes)
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
