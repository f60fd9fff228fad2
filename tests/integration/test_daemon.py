# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Two real daemons on the real kernel: sessions live through lost nodes, killed daemons and a bad sync link."""

from __future__ import annotations

import signal
from typing import Callable

import pytest
from integration.cluster import VIP, Cluster
from integration.netns import Namespace, wait_for

pytestmark = pytest.mark.netns


def test_sessions_of_all_kinds_survive_a_power_cut_and_the_next(cluster: Callable[..., Cluster]) -> None:
    lab = cluster().up()
    sessions = lab.all_kinds()
    for session in sessions.values():
        session.talk()
    lab.replicated(lab.fw1, lab.fw2)
    port, outside = sessions["tcp snat"].client.getsockname()[1], sessions["tcp snat"].seen[1]
    line = (
        f"tcp      6 ESTABLISHED src=192.168.0.3 dst=192.168.1.3 sport={port} dport=5001 "
        f"src=192.168.1.3 dst={VIP} sport=5001 dport={outside} [ASSURED] mark=0"
    )
    for daemon, letter in ((lab.fw1, "-i"), (lab.fw2, "-e")):
        assert line in daemon.ask(letter)
    assert sessions["tcp snat"].seen[0] == sessions["udp snat"].seen[0] == VIP

    lab.power_cut(lab.fw1, lab.fw2)
    for name, session in sessions.items():
        try:
            session.talk()
        except OSError as error:
            raise AssertionError(f"{name} died with fw1: {error}") from error

    lab.power_on(lab.fw1)
    lab.ready(lab.fw2, lab.fw1)
    late = lab.session()
    late.talk()
    lab.replicated(lab.fw2, lab.fw1)
    assert lab.fw1.gate == "0"
    lab.power_cut(lab.fw2, lab.fw1)
    for name, session in {**sessions, "opened on fw2": late}.items():
        try:
            session.talk()
        except OSError as error:
            raise AssertionError(f"{name} died with fw2: {error}") from error
    counters = lab.fw1.status()["counters"]
    assert not [name for name in counters if name.startswith("kernel_refused")], counters


def test_without_replication_the_same_sessions_die(cluster: Callable[..., Cluster]) -> None:
    """The negative control: what the test above sees is the replication's work."""
    lab = cluster(replicate=False)
    lab.pair.activate(lab.pair.fw1)
    lab.fw1.start()
    lab.fw2.start()
    wait_for(lambda: lab.fw2.status()["reasons"] == ["replication is off"], "fw2 to run")
    session = lab.session()
    session.talk()
    assert lab.fw2.gate == "2"
    lab.power_cut(lab.fw1, lab.fw2)
    for sock in (session.client, session.server):
        sock.settimeout(2)
    with pytest.raises(OSError):
        session.talk()
    lab.session().talk()  # new ones work


def test_killed_daemons_come_back_and_catch_up(cluster: Callable[..., Cluster]) -> None:
    lab = cluster().up()
    idle = lab.session()
    ended = {name: lab.session() for name in ("fw1", "fw2")}
    lab.replicated(lab.fw1, lab.fw2)
    born = [idle]
    for daemon in (lab.fw1, lab.fw2):
        daemon.kill()
        name = daemon.space.label
        born.append(lab.session())
        gone = ended[name]
        lab.pair.fw1.conntrack("-D", "-p", "tcp", "--sport", str(gone.client.getsockname()[1]))  # its end
        daemon.start()
        lab.ready(lab.fw1, lab.fw2)
        lab.replicated(lab.fw1, lab.fw2)
        external = lab.fw2.ask("-e")
        assert f"sport={gone.client.getsockname()[1]} " not in external
        assert f"sport={born[-1].client.getsockname()[1]} " in external
    closed_by_itself = born.pop()
    port = closed_by_itself.client.getsockname()[1]
    closed_by_itself.close()
    wait_for(
        lambda: f"TIME_WAIT src=192.168.0.3 dst=192.168.1.3 sport={port} " in lab.fw2.ask("-e"), "the end on the backup"
    )
    lab.power_cut(lab.fw1, lab.fw2)
    for session in born:
        session.talk()
    wait_for(
        lambda: "TIME_WAIT" in lab.pair.fw2.conntrack("-L", "-p", "tcp", "--sport", str(port)),
        "the true state after the take-over",
    )


def test_tables_are_equal_in_spite_of_a_sync_link_that_loses_a_third(cluster: Callable[..., Cluster]) -> None:
    lab = cluster().up()
    for firewall in (lab.pair.fw1, lab.pair.fw2):
        loss = ("-m", "statistic", "--mode", "random", "--probability", "0.3")
        firewall.run("iptables", "-I", "INPUT", "-i", "eth2", "-p", "udp", *loss, "-j", "DROP")
    sessions = [lab.session() for _ in range(40)]
    for session in sessions[::2]:
        lab.pair.fw1.conntrack("-D", "-p", "tcp", "--sport", str(session.client.getsockname()[1]))
    lab.replicated(lab.fw1, lab.fw2)
    external = lab.fw2.ask("-e")
    for number, session in enumerate(sessions):
        assert (f"sport={session.client.getsockname()[1]} " in external) == bool(number % 2)
    wait_for(lambda: lab.fw1.status()["counters"].get("blocks_retransmitted"), "a retransmission")
    lab.ready(lab.fw1, lab.fw2)


def resets(firewall: Namespace) -> int:
    """RSTs that the firewall itself sent to b."""
    rules = firewall.run("iptables", "-nvxL", "OUTPUT").stdout.splitlines()
    return sum(int(line.split()[0]) for line in rules if "0x04" in line or "RST" in line)


@pytest.mark.parametrize(
    ("mode", "strays"), [("external-cache", "answered"), ("hot-standby", "answered"), ("hot-standby", "dropped")]
)
def test_table_comes_before_the_virtual_ip(cluster: Callable[..., Cluster], mode: str, strays: str) -> None:
    """The daemon cannot act while the virtual IPs move: it is stopped.

    The classic mode commits too late then, and where strays are not dropped the firewall itself resets the session.
    In hot standby the flows are there already.
    """
    lab = cluster(mode=mode).up()
    fw2 = lab.pair.fw2
    fw2.run("iptables", "-A", "OUTPUT", "-p", "tcp", "--tcp-flags", "RST", "RST", "-d", "192.168.1.3")
    if strays == "answered":
        fw2.run("iptables", "-D", "INPUT", "-d", VIP, "-p", "tcp", "-j", "DROP")
    session = lab.session()
    session.talk()
    wait_for(lambda: f"sport={session.client.getsockname()[1]} " in lab.fw2.ask("-e"), "the flow on the backup")
    if mode == "hot-standby":
        lab.replicated(lab.fw1, lab.fw2)
    lab.fw2.send(signal.SIGSTOP)
    lab.power_cut(lab.fw1, lab.fw2)
    session.server.sendall(b"anybody there?")
    if mode == "external-cache":
        wait_for(lambda: resets(fw2), "a reset")
        with pytest.raises(ConnectionResetError):
            session.server.recv(10)
    else:
        assert session.client.recv(100) == b"anybody there?"
        session.talk()
        assert resets(fw2) == 0
    lab.fw2.send(signal.SIGCONT)
    wait_for(lambda: lab.fw2.status()["role"] == "active", "fw2 to be active")


def test_commit_by_hand_says_how_many(cluster: Callable[..., Cluster]) -> None:
    lab = cluster(mode="external-cache").up()
    session = lab.session()
    wait_for(lambda: f"sport={session.client.getsockname()[1]} " in lab.fw2.ask("-e"), "the flow on the backup")
    assert "sport=5001" not in lab.pair.fw2.conntrack("-L")
    assert lab.fw2.ask("-c") == "1 flows committed\n"
    assert f"sport={session.client.getsockname()[1]} " in lab.pair.fw2.conntrack("-L")
