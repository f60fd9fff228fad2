# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a helper foresaw, and what it foresees later, lives through the loss of the active node: FTP, TFTP, SIP.

The firewalls let nothing begin that no helper expected, and a server's connection to the virtual IP that is not
translated is dropped there.
"""

from __future__ import annotations

import concurrent.futures
import ftplib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import constants as k
from integration.cluster import Cluster, Daemon
from integration.netns import Namespace, wait_for
from integration.related import CONTENT, Call, Ftp, Registration, Tftp, Vsftpd
from integration.test_every_flow import flows, nothing_new

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(not (shutil.which("vsftpd") and shutil.which("in.tftpd")), reason="needs vsftpd, tftpd-hpa"),
]

HELPERS = (("tcp", 21, "ftp"), ("udp", 69, "tftp"), ("udp", 5060, "sip"))
SERVERS = {4: "192.168.1.3", 6: "fd00:c0de:1::3"}


def assign_helpers(lab: Cluster) -> None:
    for firewall in (lab.pair.fw1, lab.pair.fw2):
        for tool in ("iptables", "ip6tables"):
            for proto, port, name in HELPERS:
                match = ("-p", proto, "--dport", str(port), "-j", "CT", "--helper", name)
                firewall.run(tool, "-t", "raw", "-A", "PREROUTING", *match)
            related = ("-m", "conntrack", "--ctstate", "RELATED", "-j", "ACCEPT")
            firewall.run(tool, "-A", "FORWARD", "-i", "eth1", *related)


def start(lab: Cluster) -> None:
    lab.pair.activate(lab.pair.fw1)
    lab.fw1.start()
    lab.fw2.start()
    if json.loads((lab.fw1.home / "conf").read_text(encoding="utf-8")).get("replicate", True):
        lab.ready(lab.fw1, lab.fw2)
    else:
        wait_for(lambda: lab.fw2.status()["reasons"] == ["replication is off"], "fw2 to run")


def expected(firewall: Namespace) -> list[str]:
    """conntrack(8)'s lines of the expectation table, without what time changes."""
    lines = []
    for family in ("ipv4", "ipv6"):
        lines += firewall.conntrack("-L", "expect", "-f", family).splitlines()
    return sorted(line.partition(" ")[2] for line in lines)


def same_expectations(active: Namespace, backup: Namespace, count: int) -> list[str]:
    """Wait until both kernels expect the same, and so many flows; returns conntrack's lines."""
    try:
        wait_for(lambda: len(expected(active)) == count and expected(active) == expected(backup), "expectations", 20.0)
    except AssertionError as error:
        raise AssertionError(f"{error}: {expected(active)} {expected(backup)}") from None
    return expected(backup)


def same_open(active: Namespace, backup: Namespace) -> dict[str, dict[str, Any]]:
    """Wait until the backup's kernel holds the active one's open flows exactly so (closed ones need not be told);
    returns these."""
    wrong: list[Any] = []

    def equal() -> bool:
        here, there = flows(active), flows(backup)
        wrong[:] = [(one, there.get(key)) for key, one in here.items() if is_open(one) and one != there.get(key)]
        return not wrong

    try:
        wait_for(equal, "equal tables", 20.0)
    except AssertionError as error:
        raise AssertionError(f"{error}: {wrong}") from None
    return {key: one for key, one in flows(active).items() if is_open(one)}


def same_cache(active: Daemon, backup: Daemon) -> None:
    """Wait until the backup's external cache has the active node's open flows, and one expectation."""

    def equal() -> bool:
        here, there = (
            {line.partition("[active")[0] for line in daemon.ask(letter).splitlines() if " ESTABLISHED " in line}
            for daemon, letter in ((active, "-i"), (backup, "-e"))
        )
        return here <= there and len(shown(backup, "-e")) == len(shown(active, "-i")) == 1

    wait_for(equal, "equal caches", 20.0)


def is_open(entry: dict[str, Any]) -> bool:
    tcp = entry.get("CTA_PROTOINFO", {}).get("CTA_PROTOINFO_TCP", {})
    return bool(tcp.get("CTA_PROTOINFO_TCP_STATE", k.TCP_ESTABLISHED) == k.TCP_ESTABLISHED)


def shown(daemon: Daemon, letter: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in daemon.ask(letter, "expect", "--json").splitlines()]


@pytest.mark.parametrize("mode", ["hot-standby", pytest.param("external-cache", marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("version", "passive"),
    [
        (4, False),
        (4, True),
        pytest.param(6, False, marks=pytest.mark.long),
        pytest.param(6, True, marks=pytest.mark.long),
    ],
)
def test_ftp_goes_on_after_a_cut_and_the_next(
    cluster: Callable[..., Cluster], tmp_path: Path, version: int, passive: bool, mode: str
) -> None:
    """In mid-transfer; between the announcement of a data connection and its beginning; with a transfer begun later on
    the old control connection.  Behind SNAT the server's text gets longer with the virtual IP in it."""
    lab = cluster(mode=mode)
    assign_helpers(lab)
    start(lab)
    Vsftpd(lab.pair.b, tmp_path / "ftp")
    running, waiting = (Ftp(lab.pair.a, SERVERS[version], passive) for dummy in range(2))
    for client in (running, waiting):
        lab.stack.callback(client.close)
        for dummy in range(3):
            client.whole()
    nothing_new(lab)
    for active, backup in ((lab.fw1, lab.fw2), (lab.fw2, lab.fw1)):
        running.prepare()
        running.start()
        waiting.prepare()
        if mode == "hot-standby":
            same_expectations(active.space, backup.space, 1)
            entries = same_open(active.space, backup.space).values()
            if not passive:  # the virtual IP's text is longer than the client's address
                assert sum("CTA_SEQ_ADJ_ORIG" in entry for entry in entries) == 2
            assert sum("CTA_TUPLE_MASTER" in entry for entry in entries) == 1
        else:
            same_cache(active, backup)
        lab.power_cut(active, backup)
        running.finish()
        waiting.start("small")
        waiting.finish(CONTENT[:1000])
        for client in (running, waiting):
            client.whole()
            client.whole("big")
        counters = backup.status()["counters"]
        wrong = ("kernel_refused", "expectations_refused", "degraded")
        assert not [name for name in counters if name.startswith(wrong)], counters
        lab.back_and_equal(active, backup)


def test_a_data_connection_whose_first_packets_were_lost_with_the_node_comes_to_be(
    cluster: Callable[..., Cluster], tmp_path: Path
) -> None:
    """The server's SYN used the expectation up, the answer never came through: the next SYN finds it on the other
    node."""
    lab = cluster()
    assign_helpers(lab)
    start(lab)
    Vsftpd(lab.pair.b, tmp_path / "ftp")
    client = Ftp(lab.pair.a, SERVERS[4], False)
    lab.stack.callback(client.close)
    nothing_new(lab)
    client.prepare()
    same_expectations(lab.pair.fw1, lab.pair.fw2, 1)
    answer = ("-i", "eth1", "-p", "tcp", "--tcp-flags", "SYN,ACK", "SYN,ACK", "-j", "DROP")
    lab.pair.fw1.run("iptables", "-I", "FORWARD", *answer)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        begun = pool.submit(client.start, "small")
        wait_for(lambda: expected(lab.pair.fw1) == [], "the server's SYN")
        lab.power_cut(lab.fw1, lab.fw2)
        begun.result(30.0)
    client.finish(CONTENT[:1000])
    lab.back_and_equal(lab.fw1, lab.fw2)


@pytest.mark.parametrize("passive", [False, pytest.param(True, marks=pytest.mark.long)])
def test_without_replication_nothing_of_ftp_survives(
    cluster: Callable[..., Cluster], tmp_path: Path, passive: bool
) -> None:
    lab = cluster(replicate=False)
    assign_helpers(lab)
    start(lab)
    Vsftpd(lab.pair.b, tmp_path / "ftp")
    running, waiting = (Ftp(lab.pair.a, SERVERS[4], passive, patience=3.0) for dummy in range(2))
    for client in (running, waiting):
        lab.stack.callback(client.close)
        client.whole()
    nothing_new(lab)
    running.prepare()
    running.start()
    waiting.prepare()
    lab.power_cut(lab.fw1, lab.fw2)
    with pytest.raises(OSError):
        running.finish()
    with pytest.raises((OSError, ftplib.Error)):
        waiting.start("small")
    assert expected(lab.pair.fw2) == []


@pytest.mark.long
def test_flows_alone_are_not_enough_for_ftp(cluster: Callable[..., Cluster], tmp_path: Path) -> None:
    """With expectations switched off the transfer that runs goes on; what was announced does not come to be."""
    lab = cluster(max_expectations=0)
    assign_helpers(lab)
    start(lab)
    Vsftpd(lab.pair.b, tmp_path / "ftp")
    running, waiting = (Ftp(lab.pair.a, SERVERS[4], False, patience=5.0) for dummy in range(2))
    for client in (running, waiting):
        lab.stack.callback(client.close)
    nothing_new(lab)
    running.prepare()
    running.start()
    waiting.prepare()
    wait_for(lambda: len(flows(lab.pair.fw2)) == 3, "two control connections and a transfer")
    assert expected(lab.pair.fw2) == []
    lab.power_cut(lab.fw1, lab.fw2)
    with pytest.raises((OSError, ftplib.Error)):
        waiting.start("small")


@pytest.mark.parametrize("replicate", [True, False], ids=["replicated", "without replication"])
def test_a_call_is_heard_though_nobody_spoke_before_the_cut(cluster: Callable[..., Cluster], replicate: bool) -> None:
    """SIP: the offer and the answer made expectations of the media, of which no packet came before the cut."""
    lab = cluster(replicate=replicate)
    assign_helpers(lab)
    start(lab)
    call = Call(lab.pair.a, lab.pair.b, "192.168.0.3", "192.168.1.3")
    lab.stack.callback(call.close)
    call.invite()
    assert call.media[0] == "192.168.1.100"  # the offer was translated
    nothing_new(lab)
    if not replicate:
        assert len(expected(lab.pair.fw1)) == 4
        lab.power_cut(lab.fw1, lab.fw2)
        assert not call.heard(3.0)
        return
    lines = same_expectations(lab.pair.fw1, lab.pair.fw2, 4)
    assert all("class=1 helper=sip" in line for line in lines)
    for daemon, letter in ((lab.fw1, "-i"), (lab.fw2, "-e")):
        told = shown(daemon, letter)
        assert {(one["function"], one["class"], one["nat"]["direction"]) for one in told} == {
            ("sip", 1, "original"),
            ("sip", 1, "reply"),
        }
        text = sorted(daemon.ask(letter, "expect").splitlines())
        assert [line.partition(" nat=")[0] for line in text] == lines
    assert min(timers(lab.pair.fw2)) > 80_000  # parked
    lab.power_cut(lab.fw1, lab.fw2)
    wait_for(lambda: lab.fw2.status()["role"] == "active" and max(timers(lab.pair.fw2)) <= 180, "true timers")
    assert call.heard()
    lab.back_and_equal(lab.fw1, lab.fw2)


@pytest.mark.long
def test_a_registered_phone_rings_after_a_cut_and_the_next(cluster: Callable[..., Cluster]) -> None:
    """SIP: the registration's expectation is permanent; that the server confirmed it, the kernel tells by no event."""
    lab = cluster()
    assign_helpers(lab)
    start(lab)
    phone = Registration(lab.pair.a, lab.pair.b, "192.168.0.3", "192.168.1.3")
    lab.stack.callback(phone.close)
    phone.register()
    assert phone.contact[0] == "192.168.1.100"
    nothing_new(lab)
    for number, (active, backup) in enumerate(((lab.fw1, lab.fw2), (lab.fw2, lab.fw1))):
        (line,) = same_expectations(active.space, backup.space, 1)
        assert " PERMANENT class=0 helper=sip" in line
        for daemon, letter in ((active, "-i"), (backup, "-e")):
            assert daemon.ask(letter, "expect").partition(" nat=")[0] == line
            xml = re.sub("<timeout>.*?</timeout>", "", daemon.ask(letter, "expect", "-x"))
            truth = daemon.space.conntrack("-L", "expect", "-o", "xml").splitlines()[2]
            assert xml.strip() == re.sub("<timeout>.*?</timeout>", "", truth)
        lab.power_cut(active, backup)
        assert phone.rings(5100 + number)
        wait_for(lambda backup=backup: 3000 < max(timers(backup.space)) <= 3600, "the true timer")
        lab.back_and_equal(active, backup)


def timers(firewall: Namespace) -> list[int]:
    """Seconds left of each expectation."""
    return [int(line.split()[0]) for line in firewall.conntrack("-L", "expect").splitlines()]


@pytest.mark.parametrize(
    ("options", "degraded"),
    [({"udp": "all"}, 0), ({}, 1), pytest.param({"replicate": False}, None, marks=pytest.mark.long)],
    ids=["all flows", "replied flows", "without replication"],
)
def test_tftp_goes_on_in_mid_transfer(
    cluster: Callable[..., Cluster], tmp_path: Path, options: dict[str, Any], degraded: int | None
) -> None:
    """The server answers from another port: the request's own flow never has a reply, and is replicated only if all
    flows are.  Else the transfer is a related flow without a master: it goes on, and that is counted."""
    lab = cluster(**options)
    assign_helpers(lab)
    start(lab)
    client = Tftp(lab.pair.b, lab.pair.a, tmp_path)
    lab.stack.callback(client.close)
    client.begin()
    client.read(10)
    nothing_new(lab)
    if degraded is None:
        lab.power_cut(lab.fw1, lab.fw2)
        with pytest.raises(TimeoutError):
            client.read(20)
        return
    wait_for(lambda: len(flows(lab.pair.fw2)) == 2 - degraded, "the flows on fw2")
    lab.power_cut(lab.fw1, lab.fw2)
    client.finish()
    assert lab.fw2.status()["counters"].get("degraded_without_master", 0) == degraded
    lab.back_and_equal(lab.fw1, lab.fw2)
