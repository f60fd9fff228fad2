# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""From a real conntrackd to ctsyncd, and back, with sessions open; then the active node is cut off.

The order is that of ``playbooks/site.yml`` with ``migrate=true`` and of ``docs/migration.md``.  What systemd and
keepalived would do is done by hand: conntrackd is started and ended, and told what its ``primary-backup.sh`` tells it.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest
from integration.cluster import VIPS, Cluster, Daemon, Session, missing
from integration.netns import Namespace, Pair, last_octet, run, wait_for

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(shutil.which("conntrackd") is None, reason="needs conntrackd"),
]

# what the package's primary-backup.sh says, in its order
PRIMARY = ("-c", "-f", "-R", "-B")
BACKUP = ("-t", "-n")
DEAD_S = 3.0  # patience with a session that must be dead


class Conntrackd:
    """conntrackd on one firewall: FTFW over UDP, with the external cache that is its default."""

    def __init__(self, space: Namespace, home: Path) -> None:
        home.mkdir()
        self.space = space
        self.home = home
        self.process: subprocess.Popen[Any] | None = None
        number = int(space.label[-1])
        own = [f"192.168.{net}.{last_octet(number)}" for net in (0, 1, 100)]
        ignored = ["127.0.0.1", *own, *(address for _interface, address in VIPS if "." in address)]
        lines = "\n".join(f"IPv4_address {address}" for address in ignored)
        (home / "conf").write_text(
            f"""\
Sync {{
    Mode FTFW {{
    }}
    UDP {{
        IPv4_address {own[2]}
        IPv4_Destination_Address 192.168.100.{last_octet(3 - number)}
        Port 3780
        Interface eth2
        Checksum on
    }}
}}
General {{
    HashSize 8192
    HashLimit 65536
    LogFile {home / "logfile"}
    LockFile {home / "lock"}
    UNIX {{
        Path {home / "ctl"}
    }}
    NetlinkBufferSize 2097152
    NetlinkBufferSizeMaxGrowth 8388608
    Filter From Userspace {{
        Protocol Accept {{
            TCP
        }}
        Address Ignore {{
            {lines}
        }}
    }}
}}
""",
            encoding="ascii",
        )

    def start(self) -> None:
        with open(self.home / "log", "ab") as log:
            self.process = self.space.popen(
                "conntrackd", "-C", str(self.home / "conf"), stdout=log, stderr=subprocess.STDOUT
            )
        wait_for(lambda: not self._run("-s").returncode, f"conntrackd on {self.space.label}: {self.log()}")

    def _run(self, *argv: str) -> subprocess.CompletedProcess[str]:
        return run(
            "ip", "netns", "exec", self.space.name, "conntrackd", "-C", str(self.home / "conf"), *argv, check=False
        )

    def ask(self, *letters: str) -> str:
        """Each letter's answer; an assertion fails with what conntrackd said."""
        said = ""
        for letter in letters:
            done = self._run(letter)
            assert done.returncode == 0, f"conntrackd {letter}: {done.stdout}{done.stderr}{self.log()}"
            said += done.stdout
        return said

    def log(self) -> str:
        files = [self.home / name for name in ("log", "logfile")]
        return "".join(file.read_text(encoding="utf-8", errors="replace") for file in files if file.exists())

    def end(self) -> None:
        """As ``systemctl stop`` and the playbook do, and wait until it is gone."""
        self.ask("-k")
        assert self.process is not None
        self.process.wait(30)

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def knows(self, sessions: list[Session]) -> bool:
        """Are all in its external cache, as established?"""
        said = self.ask("-e")
        return all(
            re.search(rf"ESTABLISHED src=192\.168\.0\.3 dst=192\.168\.1\.3 sport={each.port} dport=5001 ", said)
            for each in sessions
        )


class Site:
    """The pair with both programs on each node, and sessions from a to b through SNAT."""

    def __init__(self, lab: Cluster, home: Path) -> None:
        self.lab = lab
        self.pair: Pair = lab.pair
        self.old1 = Conntrackd(lab.pair.fw1, home / "conntrackd1")
        self.old2 = Conntrackd(lab.pair.fw2, home / "conntrackd2")
        self.sessions: list[Session] = []

    def talk(self) -> None:
        for session in self.sessions:
            session.talk()

    def open(self) -> None:
        self.sessions += [self.lab.session() for _ in range(5)]
        self.talk()
        assert {session.seen[0] for session in self.sessions} == {"192.168.1.100"}

    def conntrackd_replicates(self) -> None:
        """fw2's conntrackd has the sessions, and its kernel does not: they come into the kernel at take-over."""
        wait_for(lambda: self.old2.knows(self.sessions), f"the sessions in conntrackd's cache: {self.old2.log()}")
        assert missing(self.pair.fw2, self.sessions) == self.sessions

    def with_conntrackd(self) -> None:
        """fw1 active, fw2 with its replicas, sessions open."""
        self.pair.activate(self.pair.fw1)
        for old in (self.old1, self.old2):
            old.start()
        self.old1.ask(*PRIMARY)
        self.old2.ask(*BACKUP)
        self.open()
        self.conntrackd_replicates()

    def replace(self, old: Conntrackd, new: Daemon) -> None:
        """``playbooks/tasks/migrate.yml`` on one node."""
        old.end()
        assert not (old.home / "ctl").exists()
        new.start()

    def cut(self) -> None:
        """fw1 is off the network at once, and nothing runs there any more; fw2 has the virtual IPs."""
        self.pair.unplug(self.pair.fw1)
        self.pair.activate(self.pair.fw2)
        self.old1.kill()
        if self.lab.fw1.process is not None and self.lab.fw1.process.poll() is None:
            self.lab.fw1.kill()

    def lost(self) -> bool:
        """Does no session get an answer any more?"""
        answered = []
        for session in self.sessions:
            for sock in (session.client, session.server):
                sock.settimeout(DEAD_S / len(self.sessions))
            with contextlib.suppress(OSError):
                session.talk()
                answered.append(session.port)
        return not answered

    def close(self) -> None:
        for old in (self.old1, self.old2):
            old.kill()


@pytest.fixture
def site(cluster: Callable[..., Cluster], tmp_path: Path) -> Iterator[Site]:
    with contextlib.closing(Site(cluster(), tmp_path)) as made:
        yield made


def test_conntrackd_alone_keeps_the_sessions(site: Site) -> None:
    """Where the migration begins: a pair that fails over."""
    site.with_conntrackd()
    site.cut()
    site.old2.ask(*PRIMARY)
    site.talk()


def test_sessions_go_on_through_the_migration_and_survive_the_cut_after_it(site: Site) -> None:
    site.with_conntrackd()
    lab = site.lab
    site.replace(site.old2, lab.fw2)
    wait_for(lambda: "no session with fw1" in str(lab.fw2.status().get("reasons")), "fw2 to say what is missing")
    assert (lab.fw2.status()["verdict"], lab.fw2.gate) == ("NOT READY", "2")
    site.talk()
    site.open()  # and begin while each node has another program
    site.replace(site.old1, lab.fw1)
    lab.ready(lab.fw1, lab.fw2)  # the gate that the playbook waits at
    site.talk()
    site.open()
    wait_for(lambda: not missing(site.pair.fw2, site.sessions), "the sessions on fw2")
    lab.replicated(lab.fw1, lab.fw2)
    site.cut()
    site.talk()
    assert len(site.sessions) == 15


def test_cut_before_the_new_pair_is_ready_loses_the_sessions(site: Site) -> None:
    """The negative control, and what the page on migration warns of: the active node fails in between."""
    site.with_conntrackd()
    site.replace(site.old2, site.lab.fw2)
    wait_for(lambda: "no session with fw1" in str(site.lab.fw2.status().get("reasons")), "fw2 to run")
    site.talk()
    site.cut()
    assert site.lost()


@pytest.mark.parametrize("replicas", ["left behind", "gone"])
def test_the_way_back_keeps_the_sessions(site: Site, replicas: str) -> None:
    """ctsyncd goes, the standby first; conntrackd comes, the active node first, and takes over after a cut."""
    back(site, replicas)
    site.cut()
    site.old2.ask(*PRIMARY)
    site.talk()


def test_conntrackd_that_is_back_and_not_told_to_take_over_loses_the_sessions(site: Site) -> None:
    """The negative control: nothing that ctsyncd has left keeps them alive."""
    back(site, "gone")
    site.cut()
    assert site.lost()


def back(site: Site, replicas: str) -> None:
    lab = site.lab
    lab.up()
    site.open()
    lab.replicated(lab.fw1, lab.fw2)
    for daemon in (lab.fw2, lab.fw1):
        daemon.stop()
        site.talk()
    if replicas == "gone":
        site.pair.fw2.conntrack("-F")
    site.old1.start()  # its keepalived has nothing to say to it: the node was active all the time
    site.old2.start()
    site.old2.ask(*BACKUP)
    wait_for(lambda: site.old2.knows(site.sessions), f"the sessions in conntrackd's cache: {site.old2.log()}")
    assert missing(site.pair.fw2, site.sessions) == (site.sessions if replicas == "gone" else [])
    site.talk()
