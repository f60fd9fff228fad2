# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Hands in the kernels' tables: ``ctsyncd verify`` names what differs, and the pair mends it; not with ``compare`` off.

Flows that are born while ``nf_conntrack_events`` is 0 never make an event, not even when they change or end: that is
how the active node's daemon is kept in the dark.
"""

from __future__ import annotations

import json
import time
from typing import Any, Callable

import pytest
from integration.cluster import Cluster, Daemon, fill
from integration.netns import Namespace, wait_for

pytestmark = pytest.mark.netns

HEALED_S = 300.0  # four rounds, on a slow machine
STAYS_S = 75.0  # two rounds: nothing may happen in them


def flow(port: int, *more: str, change: str = "-I") -> tuple[str, ...]:
    """Arguments of conntrack(8) for a TCP connection that nobody speaks in."""
    tuple_ = ("-p", "tcp", "-s", "10.9.0.1", "-d", "198.51.100.7", "--sport", str(port), "--dport", "443")
    if change == "-I":
        return (change, *tuple_, "--state", "ESTABLISHED", "-u", "SEEN_REPLY,ASSURED", "-t", "86400", *more)
    return (change, *tuple_, *more)


def in_the_dark(space: Namespace, *argv: str) -> None:
    space.sysctl({"net/netfilter/nf_conntrack_events": "0"})
    space.conntrack(*argv)
    space.sysctl({"net/netfilter/nf_conntrack_events": "1"})


def verify(daemon: Daemon) -> tuple[int, dict[str, Any]]:
    status, text = daemon.run("verify", "--json")
    return status, json.loads(text)


def kinds(daemon: Daemon) -> dict[str, int] | None:
    """How many flows differ in which way; None: it cannot tell."""
    status, result = verify(daemon)
    assert status == {True: 0, False: 1, None: 2}[result["equal"]]
    return None if status == 2 else {each["kind"]: each["count"] for each in result["differences"]}


def plant(lab: Cluster) -> dict[str, int]:
    """One of each on a pair that is equal, and what verify must say of it."""
    fw1, fw2 = lab.fw1.space, lab.fw2.space
    for port in (1001, 1002, 1003):
        in_the_dark(fw1, *flow(port))  # missing
    fw2.conntrack(*flow(2001))  # left over in the kernel
    fw2.conntrack("-U", *filled(1), "--mark", "7")  # different there
    fw2.conntrack("-U", *filled(2), "--state", "CLOSE")
    return {"missing": 3, "kernel_left_over": 1, "kernel_differs": 2}


def filled(number: int) -> tuple[str, ...]:
    """The tuple of one of the flows that :func:`fill` makes."""
    return (
        *("-p", "tcp", "-s", f"10.0.0.{number}", "-d", "198.51.100.9"),
        *("--sport", str(10_000 + number), "--dport", "443"),
    )


def equal(lab: Cluster) -> bool:
    return kinds(lab.fw1) == {} and kinds(lab.fw2) == {}


@pytest.fixture
def lab(cluster: Callable[..., Cluster]) -> Callable[..., Cluster]:
    def up(**options: Any) -> Cluster:
        made = cluster(**options)
        for space in (made.fw1.space, made.fw2.space):
            space.sysctl({"net/netfilter/nf_conntrack_events": "1"})
        made.up()
        for session in made.all_kinds().values():
            session.talk()
        fill(made.fw1.space, 300)
        made.replicated(made.fw1, made.fw2)
        wait_for(lambda: equal(made), "equal tables")
        return made

    return up


@pytest.mark.long
def test_hands_in_the_tables_are_seen_and_mended(lab: Callable[..., Cluster]) -> None:
    pair = lab()
    planted = plant(pair)
    assert kinds(pair.fw2) == planted
    status, text = pair.fw1.run("verify")
    assert status == 1
    assert "3 missing on fw2: fw1 has them" in text
    assert "  tcp      6 src=10.9.0.1 dst=198.51.100.7 sport=1002 dport=443" in text
    wait_for(lambda: equal(pair), "the tables to be mended", HEALED_S)
    assert "sport=1002" in pair.fw2.space.conntrack("-L", "-p", "tcp", "-s", "10.9.0.1")
    assert "sport=2001" not in pair.fw2.space.conntrack("-L", "-p", "tcp", "-s", "10.9.0.1")
    assert "mark=0" in pair.fw2.space.conntrack("-L", *filled(1))
    assert "ESTABLISHED" in pair.fw2.space.conntrack("-L", *filled(2))
    # now what the active node's daemon knows, and cannot hear of
    fw1 = pair.fw1.space
    fw1.conntrack(*flow(1001, change="-D"))
    fw1.conntrack(*flow(1002, "--mark", "5", change="-U"))
    fw1.conntrack(*flow(1003, change="-D"))
    in_the_dark(fw1, *flow(1003, "--src-nat", "192.168.1.100:33333"))
    assert kinds(pair.fw1) == {"left_over": 1, "state": 1, "translation": 1}
    wait_for(lambda: equal(pair), "the tables to be mended", HEALED_S)
    assert "dst=192.168.1.100" in pair.fw2.space.conntrack("-L", *flow(1003, change="-L")[1:])
    for daemon in (pair.fw1, pair.fw2):
        status = daemon.status()
        assert status["verdict"] == "READY", status
        wait_for(lambda one=daemon: one.status()["peers"][0]["equality"]["state"] == "equal", "equal digests")


@pytest.mark.long
def test_with_compare_off_they_stay_and_verify_still_tells(lab: Callable[..., Cluster]) -> None:
    pair = lab(compare=False)
    planted = plant(pair)
    until = time.monotonic() + STAYS_S
    while time.monotonic() < until:
        assert kinds(pair.fw2) == planted
        time.sleep(5)
    assert pair.fw1.status()["peers"][0]["equality"]["state"] == "unknown"
    pair.fw1.ask("-B")  # the whole table mends all but what is wrong in an entry of the backup's kernel
    wait_for(lambda: kinds(pair.fw2) == {"kernel_differs": 2}, "the tables to be mended")


def test_verify_cannot_tell_alone(lab: Callable[..., Cluster]) -> None:
    pair = lab()
    pair.fw2.stop()
    for daemon in (pair.fw1, pair.fw2):
        status, text = daemon.run("verify")
        assert (status, text.startswith("cannot tell: ")) == (2, True)
