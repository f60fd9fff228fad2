# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Other pre-shared keys while a session lives: it goes on, and what is half done or wrong cuts nothing."""

from __future__ import annotations

import itertools
from typing import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.plugins.module_utils.ctsyncd.test_session import OTHER_SECRET, Two, other
from unit.simulation import SECRET

WRONG_SECRET = bytes(range(200, 232))
BOTH = {1: SECRET, 2: OTHER_SECRET}
WRONG = {1: SECRET, 2: WRONG_SECRET}
# node, its keys, the one to send with: as the playbook does it
STEPS: tuple[tuple[str, Mapping[int, bytes], int], ...] = (
    ("fw2", BOTH, 1),
    ("fw1", BOTH, 2),
    ("fw2", {2: OTHER_SECRET}, 2),
    ("fw1", {2: OTHER_SECRET}, 2),
)


class Changing(Two):
    """Two sessions whose keys change while they live."""

    def give(self, name: str, secrets: Mapping[int, bytes], send: int) -> str:
        """As the daemon does it: what would cut the session is refused; returns why."""
        end = self.ends[name]
        refused = end.obstacle(secrets, self.now)
        if not refused:
            end.set_keys(secrets, send, self.now)
        return refused

    def told(self) -> None:
        """Some heartbeats."""
        self.run(3.0)

    def used(self) -> list[int]:
        """Key ids of the last datagram of fw1 and of fw2."""
        return [self.sent(to, 2)[-1][2] for to in ("fw2", "fw1")]

    def undisturbed(self) -> None:
        """One session all the time, and not a datagram that could not be opened."""
        assert self.sessions() == [1, 1]
        assert self.dropped("fw1") == self.dropped("fw2") == {}


def test_keys_change_within_a_session() -> None:
    two = Changing().up()  # type: ignore[assignment]
    seen = [two.used()]
    for name, secrets, send in STEPS:
        assert two.give(name, secrets, send) == ""
        two.told()
        two.works()
        assert [end.key_problems() for end in two.ends.values()] == [[], []]
        seen.append(two.used())
    assert seen == [[1, 1], [1, 1], [2, 1], [2, 2], [2, 2]]
    two.undisturbed()
    assert two.ends["fw1"].keys() == {"accepts": [2], "sends": 2, "used": 2, "differ": []}


def test_without_the_agreement_the_same_hurry_cuts_the_line() -> None:
    """The negative control of the tests below: who sends with a key that the peer does not have is not heard."""
    two = Changing().up()
    end = two.ends["fw1"]
    end.set_keys(BOTH, 2, two.now)
    assert end._established is not None
    end._established.sealer.use(2, OTHER_SECRET)
    two.run(1.0)
    assert two.dropped("fw2")["dropped_unknown_key"] > 0


@pytest.mark.parametrize("wrong", [None, WRONG])
def test_who_is_ahead_waits_for_the_other(wrong: dict[int, bytes] | None) -> None:
    """fw1 is told to send with key 2, and fw2 does not have it, or another one under that id."""
    two = Changing().up()
    if wrong:
        two.give("fw2", wrong, 1)
    two.give("fw1", BOTH, 2)
    two.told()
    two.works()
    assert two.used() == [1, 1]
    (problem,) = two.ends["fw1"].key_problems()
    assert problem == (
        "fw2 has another key under the id 2: this node goes on to send with 1"
        if wrong
        else "fw2 does not accept the key 2 yet: this node goes on to send with 1"
    )
    assert two.ends["fw2"].key_problems() == (["fw1 has another key under the id 2"] if wrong else [])
    assert two.ends["fw1"].keys()["differ"] == ([2] if wrong else [])
    two.give("fw2", BOTH, 1)  # mended
    two.told()
    assert two.used() == [2, 1]
    assert [end.key_problems() for end in two.ends.values()] == [[], []]
    two.undisturbed()


@pytest.mark.parametrize("secrets", [{2: OTHER_SECRET}, {1: WRONG_SECRET, 2: OTHER_SECRET}])
def test_key_that_the_peer_sends_with_is_not_dropped(secrets: dict[int, bytes]) -> None:
    two = Changing().up()
    assert two.give("fw2", BOTH, 1) == ""
    assert two.give("fw1", BOTH, 2) == ""
    two.told()
    assert "fw2 sends with key 1" in two.give("fw1", secrets, 2)
    two.works()
    two.ends["fw2"].say_bye()
    two.wire.loss = 1.0
    two.run(5.0)
    assert two.give("fw1", secrets, 2) == ""  # who is silent holds nobody up


def test_key_that_both_changed_to_by_force_is_followed() -> None:
    """fw2 forgets key 1 while fw1 sends with it (the refusal left aside): what it tells brings fw1 to key 2."""
    two = Changing().up()
    two.give("fw1", BOTH, 1)
    two.give("fw2", BOTH, 2)
    two.told()
    assert two.used() == [1, 2]
    two.ends["fw2"].set_keys({2: OTHER_SECRET}, 2, two.now)
    two.told()
    two.works()
    assert two.used() == [2, 2]
    assert two.sessions() == [1, 1]
    assert two.dropped("fw2").keys() <= {"dropped_unknown_key"}


def test_restart_in_the_middle_finds_a_key_that_both_have() -> None:
    for who, send in itertools.product(("fw1", "fw2"), (1, 2)):
        two = Changing().up()
        two.restart(who, secrets=BOTH, send_key=send)
        two.up().works()  # the other one knows key 1 only
        assert two.ends[who].keys()["used"] == 1
        assert two.ends[other(who)].keys()["accepts"] == [1, 2]
        assert len(two.ends[who].key_problems()) == (send == 2)


def test_keys_are_told_again_when_heartbeats_are_lost() -> None:
    two = Changing().up()
    two.wire.loss = 0.6
    for name, secrets, send in STEPS:
        assert two.give(name, secrets, send) == ""
        two.run_until(lambda name=name, secrets=secrets: two.ends[other(name)].keys()["accepts"] == sorted(secrets))
        two.run(10.0)
    two.wire.loss = 0.0
    two.told()
    two.works()
    assert two.used() == [2, 2]
    assert two.sessions() == [1, 1]


def test_keys_are_told_under_load_too() -> None:
    """Heartbeats ride on blocks then."""
    two = Changing().up()

    def busy(seconds: float) -> None:
        end = two.now + seconds
        while two.now < end:
            for one in two.ends.values():
                if one.credit() > 0:
                    one.send_block(b"x" * one.block_bytes, 1, two.now, two.now)
            two.run(0.02)

    for name, secrets, send in STEPS:
        assert two.give(name, secrets, send) == ""
        busy(5.0)
    assert two.used() == [2, 2]
    two.undisturbed()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["fw1", "fw2"]),
            st.dictionaries(st.integers(1, 3), st.sampled_from([SECRET, OTHER_SECRET, WRONG_SECRET]), min_size=1),
            st.integers(0, 2),
            st.floats(0.05, 2.0),  # not at once: then each could drop the key that the other one is about to use
        ),
        max_size=12,
    )
)
def test_whatever_is_changed_in_whatever_order_the_session_goes_on(
    changes: list[tuple[str, dict[int, bytes], int, float]],
) -> None:
    """No nonce is used twice with one key (RecordingCrypto), nobody is cut off, nothing is lost."""
    two = Changing().up()
    for name, secrets, which, seconds in changes:
        two.give(name, secrets, sorted(secrets)[which % len(secrets)])
        two.run(seconds)
    two.run(20.0)
    two.works()
    assert two.sessions() == [1, 1]
