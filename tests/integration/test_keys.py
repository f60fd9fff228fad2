# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Another pre-shared key on a live pair, by ``ctsyncd keys``: one session all the time, and no flow lost."""

from __future__ import annotations

import base64
import secrets
import subprocess
import threading
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest
from integration.cluster import Cluster, Daemon, Session, fill
from integration.netns import wait_for

pytestmark = pytest.mark.netns

CUT = ("dropped_unknown_key", "dropped_auth_failed", "dropped_unknown_session")


class Rotation:
    """A pair, new keys for it, and clients that open a connection now and then."""

    def __init__(self, lab: Cluster) -> None:
        self.lab = lab
        self.old = self._only_key(lab.fw1)
        self.new = self.key("new")
        self.sessions = lab.all_kinds()
        self.opened: list[Session] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._go_on)
        self._thread.start()
        lab.stack.callback(self.rest)

    @staticmethod
    def _only_key(daemon: Daemon) -> Path:
        return daemon.home.parent / "key"

    def key(self, name: str) -> Path:
        path = self.lab.fw1.home.parent / name
        path.write_bytes(base64.b64encode(secrets.token_bytes(32)))
        path.chmod(0o600)
        return path

    def _go_on(self) -> None:
        while not self._over.wait(0.05):
            self.opened.append(self.lab.session())

    def rest(self) -> None:
        """No more new connections."""
        self._over.set()
        self._thread.join()

    def step(self, daemon: Daemon, keys: dict[int, Path], send: int) -> tuple[int, str]:
        """What the module does: files, then the command; its exit status and all that it said."""
        daemon.configure(keys={str(key_id): str(path) for key_id, path in keys.items()}, send_key=send)
        done = subprocess.run(
            daemon._command("keys"),
            cwd=daemon.package,
            env=daemon.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout

    def used(self) -> tuple[Any, Any]:
        """What fw1 and fw2 send with, as fw1 sees it."""
        keys = self.lab.fw1.status()["peers"][0]["keys"]
        return keys["used"], keys["sends"]

    def settles(self, *used: int) -> None:
        wait_for(lambda: self.used() == used, f"fw1 and fw2 to send with {used}")

    def undisturbed(self) -> None:
        """The daemons have had one session, and everything in it could be opened."""
        for daemon in (self.lab.fw1, self.lab.fw2):
            counters = daemon.status()["counters"]
            assert counters["sessions"] == 1
            assert [counters.get(name, 0) for name in CUT] == [0, 0, 0], counters

    def talk(self) -> None:
        for session in [*self.sessions.values(), *self.opened]:
            session.talk()


@pytest.fixture
def rotation(cluster: Callable[..., Cluster]) -> Iterator[Rotation]:
    found = Rotation(cluster().up())
    yield found
    found.rest()


def test_rotation_under_traffic_keeps_session_and_flows(rotation: Rotation) -> None:
    one, lab = rotation, rotation.lab
    fill(lab.pair.fw1, 2000)
    both, new = {1: one.old, 2: one.new}, {2: one.new}
    pids = [daemon.process.pid for daemon in lab.daemons if daemon.process]
    assert lab.fw1.status()["keys"] == {"accepts": [1], "sends": 1}
    assert "keys " not in lab.fw1.ask("status")
    for daemon, keys, send, used, shown in (
        (lab.fw2, both, 1, (1, 1), "fw2 accepts 1 and 2, sends with 1, is sent to with 1"),
        (lab.fw1, both, 2, (2, 1), "fw2 accepts 1 and 2, sends with 1, is sent to with 2"),
        (lab.fw2, new, 2, (2, 2), "fw2 accepts 2, sends with 2, is sent to with 2"),
        (lab.fw1, new, 2, (2, 2), ""),
    ):
        count = len(one.opened)
        said = f"accepts {' and '.join(map(str, keys))}, sends with {send}\n"
        for _again in range(2):  # what is done already is done again without harm
            assert one.step(daemon, keys, send) == (0, said)
        one.settles(*used)
        wait_for(lambda count=count: len(one.opened) > count, "another connection")
        lab.ready(lab.fw1, lab.fw2)
        assert ("keys " in lab.fw1.ask("status")) == bool(shown)
        wait_for(lambda shown=shown: shown in lab.fw1.ask("status"), shown)
    one.rest()
    one.undisturbed()
    assert pids == [daemon.process.pid for daemon in lab.daemons if daemon.process]
    assert not [line for line in lab.fw1.log().splitlines() if one.new.read_text(encoding="ascii") in line]
    one.talk()
    lab.replicated(lab.fw1, lab.fw2)
    assert lab.fw1.equal()
    lab.fw2.stop()
    lab.fw2.start()  # what it reads at its start is the same
    lab.ready(lab.fw1, lab.fw2)
    lab.power_cut(lab.fw1, lab.fw2)
    one.talk()


@pytest.mark.parametrize("fault", ["another one", pytest.param("not there yet", marks=pytest.mark.long)])
def test_key_that_is_missing_or_wrong_on_one_node_cuts_nothing(rotation: Rotation, fault: str) -> None:
    one, lab = rotation, rotation.lab
    both = {1: one.old, 2: one.new}
    reason = "fw2 does not accept the key 2 yet"
    if fault == "another one":
        assert one.step(lab.fw2, {1: one.old, 2: one.key("wrong")}, 1)[0] == 0
        reason = "fw2 has another key under the id 2"
    assert one.step(lab.fw1, both, 2)[0] == 0
    wanted = [f"{reason}: this node goes on to send with 1"]
    wait_for(lambda: lab.fw1.status()["reasons"] == wanted, reason)
    assert one.used() == (1, 1)
    one.rest()
    lab.replicated(lab.fw1, lab.fw2)
    status, said = one.step(lab.fw1, {2: one.new}, 2)
    assert status == 1
    assert "fw2 sends with key 1: keep that as it is until fw2 sends with another one" in said
    missing = {**both, 3: one.old.parent / "absent"}
    status, said = one.step(lab.fw1, missing, 1)
    assert status == 2
    assert "absent: cannot be read" in said
    lab.fw1.configure(keys={"1": str(one.old), "2": str(one.new)}, send_key=2)
    one.undisturbed()
    lab.fw2.stop()  # in the middle of it all
    lab.fw2.start()
    wait_for(lambda: lab.fw1.status()["reasons"] == wanted, reason)
    assert one.step(lab.fw2, both, 1)[0] == 0
    one.settles(2, 1)
    lab.ready(lab.fw1, lab.fw2)
    one.talk()
    lab.power_cut(lab.fw1, lab.fw2)
    one.talk()


def test_without_the_steps_a_changed_key_loses_the_sessions(rotation: Rotation) -> None:
    """The negative control: a node that starts with another key is not understood."""
    one, lab = rotation, rotation.lab
    one.rest()
    lab.fw2.configure(keys={"2": str(one.new)}, send_key=2)
    lab.fw2.stop()
    lab.pair.fw2.conntrack("-F")
    lab.fw2.start()
    wait_for(lambda: lab.fw1.status()["verdict"] == "DEGRADED", "fw1 to say that it is alone")
    wait_for(lambda: lab.fw1.status()["counters"].get("dropped_unknown_key", 0) > 0, "strange datagrams")
    assert lab.fw2.status()["verdict"] == "NOT READY"
    session = lab.session()
    session.talk()
    lab.power_cut(lab.fw1, lab.fw2)
    for side in (session.client, session.server):
        side.settimeout(2)
    with pytest.raises(OSError):
        session.talk()
        raise AssertionError("survived")
