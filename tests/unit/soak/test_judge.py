# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The judge of a run, with made-up figures: what is wrong is found, and what is right is not complained about."""

from __future__ import annotations

import random
from typing import Any

import pytest
from soak import judge, report
from soak.judge import Sample

STEP_S = 20.0


def life(
    minutes: float, kib_per_h: float = 0.0, leaks_descriptors: bool = False, start: float = 500.0, node: str = "fw1"
) -> list[Sample]:
    """A daemon that warms up, is noisy, has one large table that leaves its mark, and grows as told."""
    chance = random.Random(1)
    out = []
    for number in range(int(minutes * 60 / STEP_S)):
        age = number * STEP_S
        rss = 30_000 + min(age, 100.0) * 30 + (6_000 if age > minutes * 30 else 0)
        rss += kib_per_h * age / 3600 + chance.uniform(-300, 300)
        descriptors = 13 + (number // 20 if leaks_descriptors else chance.choice((0, 0, 0, 1)))
        out.append(Sample(start + age, node, 77, int(rss), descriptors, age / 1000))
    return out


def test_a_step_and_noise_are_no_growth() -> None:
    (one,) = judge.growth(life(30))
    assert one.judged and one.complaints == ()


@pytest.mark.parametrize("kib_per_h", [8_000, 60_000])
def test_a_leak_of_memory_is_found(kib_per_h: float) -> None:
    (one,) = judge.growth(life(30, kib_per_h))
    assert len(one.complaints) == 1 and "memory grows" in one.complaints[0]
    assert one.slope_kib_per_h == pytest.approx(kib_per_h, rel=0.5)


def test_what_fills_up_to_its_limit_is_no_growth(monkeypatch: pytest.MonkeyPatch) -> None:
    """The flight recorder has its 600 samples after ten minutes of a busy node."""
    short, long = (
        [one._replace(rss_kib=one.rss_kib + int(5 * min(one.at_s - 500.0, 700.0))) for one in life(minutes)]
        for minutes in (13, 30)
    )
    for samples in (short, long):
        assert judge.growth(samples)[0].complaints == ()
    assert judge.growth(long)[0].judged
    monkeypatch.setattr(judge, "WARM_UP_S", 60.0)  # what it would be without
    assert "memory grows" in judge.growth(short)[0].complaints[0]


def test_a_leak_of_descriptors_is_found() -> None:
    (one,) = judge.growth(life(30, leaks_descriptors=True))
    assert len(one.complaints) == 1 and "descriptors grow from" in one.complaints[0]


def test_a_short_life_is_not_judged_by_its_memory_but_by_its_descriptors() -> None:
    (one,) = judge.growth(life(8, 60_000))
    assert not one.judged and one.complaints == ()
    (one,) = judge.growth(life(20, 0, leaks_descriptors=True)[:30])
    assert not one.judged


def test_lives_are_told_apart() -> None:
    samples = life(5) + [sample._replace(pid=78) for sample in life(30, 60_000, start=900)] + life(30, node="fw2")
    found = judge.growth(samples)
    assert [(one.node, one.pid, bool(one.complaints)) for one in found] == [
        ("fw1", 77, False),
        ("fw1", 78, True),
        ("fw2", 77, False),
    ]


def test_a_daemon_that_was_seen_once_has_no_slope() -> None:
    (one,) = judge.growth(life(30)[:1])
    assert (one.judged, one.complaints, one.seconds) == (False, (), 0.0)
    assert judge.slope([]) == 0.0


# --- tables ----------------------------------------------------------------------------------------------------------

LISTING = """\
tcp      6 431999 ESTABLISHED src=192.168.0.3 dst=192.168.1.3 sport=10001 dport=7001 src=192.168.1.3 dst=192.168.1.100 \
sport=7001 dport=10001 [ASSURED] mark=5 use=1
udp      17 29 src=fd00:c0de::4 dst=fd00:c0de:1::3 sport=10000 dport=7002 [UNREPLIED] src=fd00:c0de:1::3 \
dst=fd00:c0de::4 sport=7002 dport=10000 mark=0 use=1
icmp     1 29 src=192.168.0.3 dst=192.168.1.3 type=8 code=0 id=1000 src=192.168.1.3 dst=192.168.1.100 type=0 code=0 \
id=1000 use=2
conntrack v1.4.7 (conntrack-tools): 3 flow entries have been shown.
"""


def flow(**values: Any) -> dict[str, Any]:
    return {
        **{"protonum": 6, "state": "ESTABLISHED", "assured": True, "mark": 5},
        "orig": {"src": "192.168.0.3", "dst": "192.168.1.3", "sport": 10001, "dport": 7001},
        "reply": {"src": "192.168.1.3", "dst": "192.168.1.100", "sport": 7001, "dport": 10001},
        **values,
    }


def test_the_daemon_and_the_kernel_name_a_flow_alike() -> None:
    entries = judge.kernel_entries(LISTING)
    assert len(entries) == 3
    assert entries[judge.flow_key(flow())] == (True, "5")
    icmp = flow(
        protonum=1,
        orig={"src": "192.168.0.3", "dst": "192.168.1.3", "type": 8, "code": 0, "id": 1000},
        reply={"src": "192.168.1.3", "dst": "192.168.1.100", "type": 0, "code": 0, "id": 1000},
    )
    assert entries[judge.flow_key(icmp)] == (False, "0")


def test_differences_of_what_stood_still() -> None:
    before = {"a": 1, "b": 1, "c": 1, "moving": 1, "gone": 1}
    after = {"a": 1, "b": 1, "c": 1, "moving": 2, "new": 1}
    assert judge.differences(before, {**before, "new": 1}, after) == []
    copy = {"a": 1, "b": 2, "ghost": 1}
    assert judge.differences(before, copy, after) == ["differs (2, not 1) b", "lacks c", "should not have ghost"]
    assert judge.differences({}, {}, {}) == []


def test_what_both_have_to_agree_on() -> None:
    same = judge.flows([flow(), flow(timeout=3, age_s=5)])
    assert len(same) == 1
    for change in ({"state": "CLOSE"}, {"assured": False}, {"mark": 6}):
        assert judge.differences(same, judge.flows([flow(**change)]), same)


# --- a run -----------------------------------------------------------------------------------------------------------


def step(*complaints: str, number: int = 1) -> dict[str, Any]:
    sample = life(1)[0]._asdict()
    return {
        **{"what": "step", "at_s": 20.0 * number, "number": number, "fault": "hand-over", "took_s": 2.0},
        **{"link": "loss", "samples": [sample], "complaints": list(complaints)},
    }


BEGIN = {"what": "begin", "at_s": 0.0, "seed": 1, "commit": "abc"}
END: dict[str, Any] = {"what": "end", "at_s": 99.0, "complaints": []}


def test_a_run_passes_or_says_why_not() -> None:
    assert judge.verdict([BEGIN, step(), END]) == []
    assert judge.verdict([BEGIN, step(), step("session 5 icmp: no answer", number=2), END]) == [
        "step 2 (hand-over): session 5 icmp: no answer"
    ]
    assert judge.verdict([BEGIN, step(), {**END, "complaints": ["it grows"]}]) == ["it grows"]
    assert judge.verdict([BEGIN, step()]) == ["the run did not come to its end"]
    assert judge.verdict([BEGIN, END]) == ["no fault was tried"]


def test_a_traceback_in_a_log_is_found() -> None:
    log = "ctsyncd: info: READY\nTraceback (most recent call last):\n  File\nctsyncd: warning: internal error: x\n"
    assert len(judge.log_complaints(log)) == 2
    assert judge.log_complaints("ctsyncd: info: READY\nctsyncd: warning: fw2 is silent\n") == []


def test_the_report_says_what_was_done_and_what_was_wrong() -> None:
    good = report.markdown([BEGIN, step(), step(number=2), END, {"what": "cost", "at_s": 99.0, "cores": 0.2}])
    assert "passed" in good and "| hand-over | 2 | loss | 2 | 0 |" in good and "20% of one core" in good
    bad = report.markdown([BEGIN, step("a resets"), END])
    assert "**failed**" in bad and "a resets" in bad and "| hand-over | 1 | loss | 2 | 1 |" in bad
