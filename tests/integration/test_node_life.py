# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A node's daemon is frozen, killed, restarted and upgraded under traffic, and then the active node is cut off.

``CTSYNC_FREEZE_S`` is how long a daemon is frozen, in seconds (4; with ``CTSYNC_LONG=1`` 60).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import Callable

import pytest
from integration.cluster import Cluster, Daemon, Session, entry, fill, install, missing
from integration.load import Load, Throttle, memory_kib
from integration.netns import Namespace, Pair, wait_for

pytestmark = pytest.mark.netns

FREEZE_S = float(os.environ.get("CTSYNC_FREEZE_S") or (60 if os.environ.get("CTSYNC_LONG") else 4))
GROWTH_KIB = 16 << 10  # of a daemon whose peer is frozen
MANY = 20_000  # flows of a bulk that takes a while


def reasons(daemon: Daemon) -> str:
    status = daemon.status()
    return f"{status['verdict']}: {'; '.join(status['reasons'])}"


class Marks:
    """Changes without end: each packet of a session to port 5001 gives it the newest mark."""

    def __init__(self, space: Namespace) -> None:
        self._space = space
        self.number = 0
        self._set("-A", "FORWARD")

    def _set(self, *place: str) -> None:
        rule = ("-p", "tcp", "--dport", "5001", "-j", "CONNMARK", "--set-mark", str(self.number))
        self._space.run("iptables", "-t", "mangle", *place, *rule)

    def change(self, sessions: list[Session]) -> None:
        self.number += 1
        self._set("-R", "FORWARD", "1")
        for session in sessions:
            session.talk()

    def arrived(self, space: Namespace, sessions: list[Session]) -> bool:
        return all(f"mark={self.number} " in entry(space, "tcp", session.port) for session in sessions)


def survives(lab: Load, sessions: list[Session]) -> None:
    """Cut the active node: nothing is lost, also of ``sessions``."""
    for session in sessions:
        session.talk()
    lab.replicated_all()
    wait_for(lab.active.equal, "equal tables", 120.0)
    lab.cut()
    result = lab.prove(lab.patience_s)
    assert (result["lost"], result["proved"], result["resets"]) == ({}, lab.sessions, 0)
    for session in sessions:
        session.talk()


def test_backup_that_was_frozen_has_all_that_happened_meanwhile(
    load: Callable[..., Load], record_property: Callable[[str, object], None]
) -> None:
    lab = load(100)
    lab.up()
    lab.open()
    closed = [lab.session() for _ in range(10)]
    lab.replicated_all()
    lab.fw2.send(signal.SIGSTOP)
    wait_for(lambda: reasons(lab.fw1).startswith("DEGRADED: fw2 is silent for"), "the silence to be seen")
    before = memory_kib(lab.fw1, "VmHWM")
    opened = [lab.session() for _ in range(10)]
    for session in closed:
        session.close()
    marks = Marks(lab.fw1.space)
    until, waiting = time.monotonic() + FREEZE_S, 0
    while time.monotonic() < until:
        marks.change(opened)
        status = lab.fw1.status()
        assert (status["verdict"], status["role"]) == ("DEGRADED", "active")
        waiting = max(waiting, status["peers"][0]["lag"]["events"])
    changes = status["counters"]["events"]
    assert status["peers"][0]["lag"]["age_s"] > FREEZE_S
    growth = memory_kib(lab.fw1, "VmHWM") - before
    record_property("frozen for", FREEZE_S)
    record_property("events, changes that waited at most, KiB of growth", (changes, waiting, growth))
    assert 0 < waiting < changes
    assert growth < GROWTH_KIB
    assert missing(lab.fw2.space, opened) == opened
    assert missing(lab.fw2.space, closed) == []

    lab.fw2.send(signal.SIGCONT)
    lab.ready(lab.fw1, lab.fw2)
    wait_for(lambda: marks.arrived(lab.fw2.space, opened), "the last states")
    external = lab.fw2.ask("-e")
    for session in closed:
        assert f"ESTABLISHED src=192.168.0.3 dst=192.168.1.3 sport={session.port} dport=5001 " not in external
    lab.seal()
    survives(lab, opened)


@pytest.mark.long
def test_active_node_that_was_frozen_tells_what_it_missed(load: Callable[..., Load]) -> None:
    """What the kernel could keep for it, and what it could not: then the buffer overran, and all is read again."""
    lab = load(100)
    lab.up()
    lab.open()
    opened, closed = [], [lab.session() for _ in range(20)]
    marks = Marks(lab.fw1.space)
    for overrun, freeze_s in ((False, FREEZE_S), (True, 0.0)):
        lab.replicated_all()
        if overrun:
            path = lab.fw1.home / "conf"
            path.write_text(json.dumps({**json.loads(path.read_text()), "netlink_buffer_bytes": 65_536}))
            lab.fw1.send(signal.SIGHUP)
            wait_for(lambda: "SIGHUP: configuration reloaded: netlink_buffer_bytes" in lab.fw1.log(), "the reload")
        lab.fw1.send(signal.SIGSTOP)
        began = time.monotonic()
        wait_for(lambda: reasons(lab.fw2).startswith("DEGRADED: fw1 is silent for"), "the silence to be seen")
        assert lab.fw2.gate == "0"  # it may take over: it has all but the last moments
        born = [lab.session() for _ in range(10)]
        dead = [closed.pop() for _ in range(10)]
        for session in dead:
            session.close()
        marks.change(born)
        while marks.number % 20 or time.monotonic() < began + freeze_s:
            marks.change(born)
        assert missing(lab.fw2.space, born) == born
        assert missing(lab.fw2.space, dead) == []

        lab.fw1.send(signal.SIGCONT)
        wait_for(lambda sessions=born: marks.arrived(lab.fw2.space, sessions), "the last states")
        lab.ready(lab.fw1, lab.fw2)
        external = lab.fw2.ask("-e")
        for session in dead:
            assert f"ESTABLISHED src=192.168.0.3 dst=192.168.1.3 sport={session.port} dport=5001 " not in external
        assert bool(lab.fw1.status()["counters"].get("overruns")) == overrun
        opened += born
    lab.seal()
    survives(lab, opened)


def run_from_zipapp(lab: Load) -> None:
    for daemon in (lab.fw1, lab.fw2):
        install(daemon.home, "1.0.1")
        daemon.program = (sys.executable, "-I", str(daemon.home / "ctsyncd"))


def test_upgrade_node_by_node_under_traffic(load: Callable[..., Load]) -> None:
    """The standby first.  Its kernel forgets all, so that only replication can bring it back."""
    lab = load(100)
    run_from_zipapp(lab)
    lab.up()
    lab.open()
    opened, closed = [], [lab.session() for _ in range(2)]
    lab.replicated_all()
    for daemon in (lab.fw2, lab.fw1):
        opened.append(lab.session())
        install(daemon.home, "1.0.2")
        assert daemon.status()["version"] == "1.0.1"  # the running one keeps its file
        daemon.stop()
        other = lab.fw1 if daemon is lab.fw2 else lab.fw2
        wait_for(lambda d=daemon, o=other: f"ctsyncd on {d.space.label} has stopped" in reasons(o), "the peer's word")
        opened.append(lab.session())
        gone = closed.pop()
        gone.close()
        if daemon is lab.fw2:
            daemon.space.conntrack("-F")
        daemon.start()
        lab.ready(lab.fw1, lab.fw2)
        assert daemon.status()["version"] == "1.0.2"
        wait_for(lambda: not missing(lab.fw2.space, opened), "the sessions on fw2")
        state = f"ESTABLISHED src=192.168.0.3 dst=192.168.1.3 sport={gone.port} dport=5001 "
        wait_for(lambda s=state: s not in lab.fw2.ask("-e"), "the end of a session")
    lab.seal()
    survives(lab, opened)
    lab.come_back("ran on", "kept")
    survives(lab, opened)


def test_upgrade_that_goes_on_before_the_table_is_there_loses_everything(load: Callable[..., Load]) -> None:
    """The negative control of the test above: it goes on while the upgraded standby says that it is not ready."""
    lab = load(100)
    run_from_zipapp(lab)
    lab.up()
    lab.open()
    lab.replicated_all()
    lab.fw2.stop()
    lab.fw2.space.conntrack("-F")
    Throttle(lab.fw2.space, 0)
    lab.fw2.start()
    wait_for(lambda: reasons(lab.fw2) == "NOT READY: no session with fw1", "fw2 to run")
    assert lab.fw2.gate == "2"
    lab.seal()
    lab.cut()
    assert lab.prove(2.0)["proved"] == 0


@pytest.mark.parametrize("born_with_events", [True, False])
def test_flow_born_while_the_daemon_was_dead_is_replicated_and_its_end_too(
    cluster: Callable[..., Cluster], born_with_events: bool
) -> None:
    """The kernel must keep events for a flow from its birth on (``nf_conntrack_events``); else its end is not told."""
    lab = cluster().up()
    lab.fw1.kill()
    lab.fw1.space.sysctl({"net/netfilter/nf_conntrack_events": str(int(born_with_events))})
    orphan = lab.session()
    lab.fw1.space.sysctl({"net/netfilter/nf_conntrack_events": "1"})
    assert missing(lab.fw2.space, [orphan])
    lab.fw1.start()
    lab.ready(lab.fw1, lab.fw2)
    lab.replicated(lab.fw1, lab.fw2)
    later = lab.session()
    lab.replicated(lab.fw1, lab.fw2)
    assert not missing(lab.fw2.space, [orphan, later])
    for session in (orphan, later):
        lab.fw1.space.conntrack("-D", "-p", "tcp", "--sport", str(session.port))
    wait_for(lambda: missing(lab.fw2.space, [later]), "the end of the later one")
    assert bool(missing(lab.fw2.space, [orphan])) == born_with_events
    lab.fw1.ask("-B")  # what a whole table does not name goes
    wait_for(lambda: missing(lab.fw2.space, [orphan]), "the end of the other")


def receiving(backup: Daemon) -> int:
    """How many flows of a bulk that has not ended are here."""
    status = backup.status()
    if not status.get("peers") or status["peers"][0]["bulk"] != "receiving":
        return 0
    assert status["verdict"] == "NOT READY", status
    return int(status["flows"]["external"])


@pytest.mark.parametrize("victim", ["the one that receives", "the one that sends"])
def test_daemon_is_killed_in_the_middle_of_a_bulk(cluster: Callable[..., Cluster], victim: str) -> None:
    lab = cluster()
    pair: Pair = lab.pair
    fill(pair.fw1, MANY)
    pair.activate(pair.fw1)
    sessions = [lab.session() for _ in range(30)]
    throttle = Throttle(pair.fw2, 10)
    lab.fw1.start()
    lab.fw2.start()
    wait_for(lambda: receiving(lab.fw2) > MANY // 20, "a part of the table")
    assert "the table of fw1 is not complete here yet" in reasons(lab.fw2)
    assert lab.fw2.gate == "1"
    daemon = lab.fw2 if victim == "the one that receives" else lab.fw1
    daemon.kill()
    assert 0 < int(pair.fw2.conntrack("-C")) < MANY
    assert missing(pair.fw2, sessions)  # a take-over now would lose them
    if daemon is lab.fw1:
        silent = "NOT READY: fw1 fell silent before its table was here"
        wait_for(lambda: reasons(lab.fw2) == silent, "fw2 to say what is wrong")
        assert lab.fw2.gate == "1"
    here = [session for session in sessions if session not in missing(pair.fw2, sessions)]
    gone = here[:3] + missing(pair.fw2, sessions)[:3]
    for session in gone:
        pair.fw1.conntrack("-D", "-p", "tcp", "--sport", str(session.port))
    throttle.end()
    daemon.start()
    lab.ready(lab.fw1, lab.fw2)
    rest = [session for session in sessions if session not in gone]
    assert (missing(pair.fw2, rest), missing(pair.fw2, gone)) == ([], gone)
    assert lab.fw2.status()["flows"] == {"kernel": int(pair.fw2.conntrack("-C")), "external": MANY + len(rest)}
    lab.power_cut(lab.fw1, lab.fw2)
    for session in rest:
        session.talk()
