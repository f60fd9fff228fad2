# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import pytest
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import conditions, readiness, wire
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.conditions import KINDS, Conditions
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.errors import WireError
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.situation import Settings
from hypothesis import given
from hypothesis import strategies as st
from unit.simulation import Simulation

KERNEL = {"max": 262144, "tcp_loose": 0, "tcp_timeout_established": 432000, "udp_timeout": 30, "count": 17}
RULES = "ab" * 32
OTHER = "cd" * 32


def differences(here: Conditions, there: Conditions, kinds: tuple[str, ...] = KINDS) -> tuple[str, ...]:
    return conditions.differences(here, there, KERNEL, "fw2", kinds)


def test_equal_nodes_do_not_differ_and_what_counts_connections_is_not_compared() -> None:
    assert conditions.own("", KERNEL).parameters.keys() == {conditions.number(n) for n in KERNEL if n != "count"}
    assert not differences(conditions.own(RULES, KERNEL), conditions.own(RULES, {**KERNEL, "count": 5}))


@pytest.mark.parametrize(
    ("ruleset", "changed", "sentences"),
    [
        (OTHER, {}, ("ruleset differs (abababababab here, cdcdcdcdcdcd on fw2)",)),
        ("", {}, ("ruleset differs (abababababab here, none known on fw2)",)),
        (RULES, {"max": 65536}, ("conntrack limits differ (nf_conntrack_max 262144 here, 65536 on fw2)",)),
        (
            OTHER,
            {"udp_timeout": 60, "tcp_timeout_established": 3600},
            (
                "ruleset differs (abababababab here, cdcdcdcdcdcd on fw2)",
                "conntrack timeouts differ (nf_conntrack_tcp_timeout_established 432000 here, 3600 on fw2;"
                " nf_conntrack_udp_timeout 30 here, 60 on fw2)",
            ),
        ),
    ],
)
def test_each_kind_of_difference_is_one_sentence(
    ruleset: str, changed: dict[str, int], sentences: tuple[str, ...]
) -> None:
    here, there = conditions.own(RULES, KERNEL), conditions.own(ruleset, {**KERNEL, **changed})
    assert differences(here, there) == sentences
    assert differences(here, there, ()) == ()


def test_a_parameter_of_one_kernel_only_is_not_compared() -> None:
    newer = {**KERNEL, "tcp_timeout_offload": 30}
    assert not differences(conditions.own(RULES, KERNEL), conditions.own(RULES, newer))
    assert not conditions.differences(conditions.own(RULES, newer), conditions.own(RULES, KERNEL), newer, "fw2", KINDS)


def test_many_differences_are_counted_not_listed() -> None:
    names = {f"{letter}_timeout": 1 for letter in "abcdefg"}
    here, there = conditions.own("", names), conditions.own("", dict.fromkeys(names, 2))
    (sentence,) = conditions.differences(here, there, names, "fw2", KINDS)
    assert sentence.count(" on fw2") == conditions.NAMED_DIFFERENCES and sentence.endswith("; 3 more)")


@given(
    st.builds(
        Conditions,
        st.just("") | st.binary(min_size=8, max_size=32).map(bytes.hex),
        st.dictionaries(st.integers(0, 0xFFFFFFFF), st.integers(0, 0xFFFFFFFF), max_size=60),
    )
)
def test_the_record_says_what_was_put_in(said: Conditions) -> None:
    ((kind, payload),) = wire.iter_tlv(wire.encode_conditions(said))
    assert kind == wire.RECORD_CONDITIONS
    assert wire.decode_conditions(payload) == said


@pytest.mark.parametrize("payload", [wire.tlv(1, b"short"), wire.tlv(1, bytes(33)), wire.tlv(2, bytes(7)), b"\1\0"])
def test_a_record_that_cannot_be_is_refused(payload: bytes) -> None:
    with pytest.raises(WireError) as caught:
        wire.decode_conditions(payload)
    assert caught.value.kind == "malformed"


def test_the_record_of_a_real_kernel_fits_a_datagram_of_the_least_size() -> None:
    parameters = {f"a_timeout_{number}": number for number in range(48)}  # Linux 6.18 has 31 that are compared
    assert len(wire.encode_conditions(conditions.own(RULES, parameters))) < 512 - 64


def both(sim: Simulation) -> tuple[readiness.Verdict, readiness.Verdict]:
    return sim.fw1.up.verdict(sim.now), sim.fw2.up.verdict(sim.now)


def test_a_node_whose_rules_differ_is_not_ready_and_says_why_until_they_are_alike() -> None:
    sim = Simulation().start()
    sim.fw1.up.set_conditions(RULES, KERNEL, sim.now)
    sim.fw2.up.set_conditions(OTHER, KERNEL, sim.now)
    sim.run(2.0)
    active, backup = both(sim)
    assert active[:2] == (readiness.DEGRADED, ("ruleset differs (abababababab here, cdcdcdcdcdcd on fw2)",))
    assert active.gate == readiness.OPEN
    assert backup == (
        *(readiness.NOT_READY, ("ruleset differs (cdcdcdcdcdcd here, abababababab on fw1)",), readiness.KNOWS_SOME),
        True,
    )
    sim.fw1.up.set_conditions(OTHER, KERNEL, sim.now)
    sim.run(2.0)
    assert [verdict.verdict for verdict in both(sim)] == [readiness.READY] * 2
    sim.fw2.up.set_conditions(OTHER, {**KERNEL, "max": 5}, sim.now)
    sim.run(2.0)
    assert [verdict.verdict for verdict in both(sim)] == [readiness.DEGRADED, readiness.NOT_READY]


def test_conditions_are_told_again_after_a_restart_and_after_changes_were_dropped() -> None:
    sim = Simulation().start()
    sim.fw1.up.set_conditions(RULES, KERNEL, sim.now)
    sim.fw2.up.set_conditions(OTHER, KERNEL, sim.now)
    sim.run(2.0)
    sim.fw1.up.peers[0].conditions = sim.fw2.up.peers[0].conditions = None
    sim.fw2.up.resync()
    sim.fw1.up.resync()  # what follows an overflow of the changes that wait
    sim.run(2.0)
    assert both(sim)[1].verdict == readiness.NOT_READY
    sim.fw2.kill()
    sim.fw2.start(sim.now)
    sim.fw2.up.set_conditions(OTHER, KERNEL, sim.now)
    sim.run(5.0)
    assert [verdict.verdict for verdict in both(sim)] == [readiness.DEGRADED, readiness.NOT_READY]


def test_what_need_not_be_the_same_does_not_count() -> None:
    sim = Simulation(settings=Settings(same_conditions=("limits",))).start()
    sim.fw1.up.set_conditions(RULES, KERNEL, sim.now)
    sim.fw2.up.set_conditions(OTHER, {**KERNEL, "udp_timeout": 7}, sim.now)
    sim.run(2.0)
    assert [verdict.verdict for verdict in both(sim)] == [readiness.READY] * 2
