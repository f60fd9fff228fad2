# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Two real keepalived in network namespaces, configured by the module, observed by ha_facts.

They show what the module's rendering relies on: readiness as a weight, nopreempt, the sync group, the FIFO, reloads.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Iterator

import pytest
from ansible_collections.ctsync.ha_firewall.plugins.module_utils import _preflight, _ruleset
from integration import netns
from integration.vrrp_node import V4, V6, Node, adverts_seen, run_module

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(shutil.which("keepalived") is None, reason="needs keepalived"),
]


class Two:
    """fw1 with the higher and fw2 with the lower priority, in the test case's network."""

    def __init__(self, pair: netns.Pair, directory: Path) -> None:
        self.pair = pair
        self.fw1 = Node(pair.fw1, directory / "fw1", 1, 150)
        self.fw2 = Node(pair.fw2, directory / "fw2", 2, 100)

    def start_second_active(self, **more: Any) -> None:
        """fw2 is active, fw1 came later and is backup."""
        self.fw1.configure(**more)
        self.fw2.configure(**more)
        self.fw2.start()
        netns.wait_for(lambda: self.fw2.holds(V4), "fw2 to become active")
        self.fw1.start()
        netns.wait_for(lambda: "Entering BACKUP STATE" in self.fw1.log(), "fw1 to start")

    def hear_each_other(self, yes: bool) -> None:
        """Let VRRP through between the two, or not; nothing else is touched."""
        for node in (self.fw2, self.fw1):
            node.space.run("iptables", "-D" if yes else "-I", "INPUT", "-p", "112", "-j", "DROP")


@pytest.fixture
def two(pair: netns.Pair, tmp_path: Path) -> Iterator[Two]:
    made = Two(pair, tmp_path)
    try:
        yield made
    finally:
        made.fw1.close()
        made.fw2.close()


def test_a_candidate_is_tested_before_it_replaces_the_file(two: Two) -> None:
    node = two.fw1
    predicted = run_module(node.space, "keepalived", check=True, **node.options())
    assert predicted["changed"] and not node.config.exists()
    done = node.configure()
    assert done["diff"] == predicted["diff"]
    written = node.config.read_text(encoding="utf-8")
    assert not node.configure()["changed"]

    wrong = node.options()
    wrong["instances"][0]["interface"] = "eth7"
    failed = run_module(node.space, "keepalived", **wrong)
    assert failed["failed"] and failed["validation"]["rc"] == 5
    assert "interface eth7 for vrrp_instance VI_eth7 doesn't exist" in failed["msg"]
    assert node.config.read_text(encoding="utf-8") == written

    # a single instance has no sync group, which keepalived would refuse
    alone = node.options()
    del alone["instances"][1]
    assert run_module(node.space, "keepalived", check=True, **alone)["validation"]["rc"] == 0


def test_a_node_that_is_not_ready_leaves_the_virtual_ips_with_the_living_peer(two: Two) -> None:
    two.fw1.ready(False)
    two.start_second_active()
    adverts_seen(two.fw1)
    assert two.fw1.holds_none() and two.fw2.holds(V4)
    assert two.fw1.priorities() == {90}

    two.fw1.ready(True)
    netns.wait_for(lambda: two.fw1.priorities() == {150}, "the effective priority to rise")
    adverts_seen(two.fw1)
    assert two.fw1.holds_none() and two.fw2.holds(V4), "nopreempt: the active node stays active"

    # its own readiness does not make the active node give up, either
    two.fw2.ready(False)
    netns.wait_for(lambda: two.fw2.priorities() == {40}, "the effective priority to fall")
    adverts_seen(two.fw1)
    assert two.fw1.holds_none() and two.fw2.holds(V4)


def test_the_node_of_higher_priority_stays_backup_after_its_reboot(two: Two) -> None:
    two.fw1.configure()
    two.fw2.configure()
    two.fw1.start()
    netns.wait_for(lambda: two.fw1.holds(V4), "fw1 to become active")
    two.fw2.start()
    netns.wait_for(lambda: "Entering BACKUP STATE" in two.fw2.log(), "fw2 to start")
    two.fw1.power_off()
    netns.wait_for(lambda: two.fw2.holds(V4), "fw2 to take over")
    two.fw1.start()
    netns.wait_for(lambda: two.fw1.facts()["vrrp"]["instances"][0]["state"] == "BACKUP", "fw1 to come back")
    adverts_seen(two.fw1)
    assert two.fw1.holds_none() and two.fw2.holds(V4)
    assert two.fw1.priorities() == {150}
    assert two.fw1.facts()["role"] == "backup" and two.fw2.facts()["role"] == "active"


def test_advertisements_over_ipv6_count(two: Two) -> None:
    """With another hop limit than the peer asks for all would be dropped; only the sync group would hold it back."""
    two.start_second_active(ipv6=True)
    netns.wait_for(lambda: two.fw2.holds(V4 | V6), "all virtual IPs")
    adverts_seen(two.fw1)
    assert "not in range" not in two.fw1.log()
    assert two.fw1.holds_none()


@pytest.mark.parametrize("unicast", [True, False], ids=["unicast", "multicast"])
def test_the_rulesets_own_rules_let_the_peers_advertisements_through_in_both_families(two: Two, unicast: bool) -> None:
    """VRRP from a stranger is dropped: with the peers' addresses as the role makes them, nobody is a stranger here."""
    two.fw1.unicast = two.fw2.unicast = unicast
    for node, other in ((two.fw1, two.fw2), (two.fw2, two.fw1)):
        rows = _preflight.vrrp_peers(virtual_ips(node), {"peer": network_facts(other)})
        pair = _ruleset.Pair(vrrp_peers=tuple((row["interface"], tuple(row["addresses"])) for row in rows))
        for family, program in (("ipv4", "iptables-restore"), ("ipv6", "ip6tables-restore")):
            text = _ruleset.render_plan(_ruleset.build_plan(family, [], pair)).text
            assert "VRRP from a stranger" in text
            node.space.run(program, "--noflush", stdin=text)
    two.start_second_active(ipv6=True)
    netns.wait_for(lambda: two.fw2.holds(V4 | V6), "all virtual IPs")
    adverts_seen(two.fw1)
    assert two.fw1.holds_none()
    assert ("unicast_peer" in two.fw1.config.read_text(encoding="utf-8")) == unicast
    assert joined(two.fw1) == (set() if unicast else {("eth0", "224.0.0.18"), ("eth1", "224.0.0.18")})
    # the negative control: without the accepted peers everybody is a stranger, and both become active
    for program in ("iptables", "ip6tables"):
        for node in (two.fw1, two.fw2):
            node.space.run(program, "-I", "CTSYNC-INPUT", "-p", "112", "-j", "DROP")
    netns.wait_for(lambda: two.fw1.holds(V4 | V6) and two.fw2.holds(V4 | V6), "the split that deaf nodes have")


def joined(node: Node) -> set[tuple[str, str]]:
    """Where the node listens for VRRP by multicast (RFC 5798, 5.1.1.2)."""
    links = json.loads(node.space.ip("-j", "maddress"))
    return {
        (link["ifname"], group["address"])
        for link in links
        for group in link["maddr"]
        if group.get("address") == "224.0.0.18"
    }


def test_multicast_hands_over_and_heals_a_split_like_unicast(two: Two) -> None:
    two.fw1.unicast = two.fw2.unicast = False
    two.start_second_active()
    adverts_seen(two.fw1)
    assert two.fw1.holds_none() and two.fw2.holds(V4)
    two.hear_each_other(False)
    netns.wait_for(lambda: two.fw1.holds(V4) and two.fw2.holds(V4), "the split of nodes that are deaf")
    two.hear_each_other(True)
    netns.wait_for(lambda: two.fw1.holds(V4) and two.fw2.holds_none(), "the lower priority to give up")
    two.fw1.power_off()
    netns.wait_for(lambda: two.fw2.holds(V4), "fw2 to take over")


def virtual_ips(node: Node) -> list[dict[str, Any]]:
    instances = node.options(ipv6=True)["instances"]
    return [{**instance, "address": address} for instance in instances for address in instance["virtual_ips"]]


def network_facts(node: Node) -> dict[str, Any]:
    """The network facts of a namespace, as Ansible has them."""
    facts: dict[str, Any] = {"interfaces": []}
    for link in json.loads(node.space.ip("-j", "address")):
        rows = [{"address": each["local"], "prefix": each["prefixlen"], **each} for each in link["addr_info"]]
        four = [row for row in rows if row["family"] == "inet"]
        facts["interfaces"].append(link["ifname"])
        facts[link["ifname"]] = {
            "ipv4": four[0] if four else {},
            "ipv4_secondaries": four[1:],
            "ipv6": [row for row in rows if row["family"] == "inet6"],
        }
    return facts


def test_two_nodes_that_are_not_ready_still_elect_one(two: Two) -> None:
    for node in (two.fw1, two.fw2):
        node.configure()
        node.ready(False)
        node.start()
    netns.wait_for(lambda: two.fw1.holds(V4) != two.fw2.holds(V4), "one of them to become active")
    backup = two.fw2 if two.fw1.holds(V4) else two.fw1
    adverts_seen(backup)
    assert backup.holds_none()
    assert {instance["state"] for instance in backup.facts()["vrrp"]["instances"]} == {"BACKUP"}, "never FAULT"


@pytest.mark.parametrize(
    ("grades", "winner", "priorities"),
    [((2, 1), "fw2", (30, 40)), ((1, 2), "fw1", (90, 1)), ((2, 2), "fw1", (30, 1)), ((2, 0), "fw2", (30, 100))],
)
def test_of_two_nodes_the_better_informed_is_elected(
    two: Two, grades: tuple[int, int], winner: str, priorities: tuple[int, int]
) -> None:
    """Twice the weight is more than the lower priority has: keepalived takes 1 then, and the order stays."""
    nodes = (two.fw1, two.fw2)
    for node, grade in zip(nodes, grades):
        node.configure(nopreempt=False)
        node.track_file.write_text(f"{grade}\n", encoding="ascii")
    for node in nodes:
        node.start()
    netns.wait_for(lambda: two.fw1.holds(V4) != two.fw2.holds(V4), "one of them to become active")
    stays, goes = nodes if winner == "fw1" else nodes[::-1]
    netns.wait_for(lambda: stays.holds(V4) and goes.holds_none(), f"{winner} to become active")
    adverts_seen(goes)
    assert stays.holds(V4) and goes.holds_none()
    assert tuple(node.priorities() for node in nodes) == tuple({priority} for priority in priorities)


@pytest.mark.parametrize(("ready", "winner"), [(False, "fw2"), (True, "fw1")])
def test_after_a_split_the_better_informed_node_keeps_the_virtual_ips(two: Two, ready: bool, winner: str) -> None:
    two.start_second_active()
    two.fw1.ready(ready)
    two.hear_each_other(False)
    netns.wait_for(lambda: two.fw1.holds(V4) and two.fw2.holds(V4), "the split")
    two.hear_each_other(True)
    stays, goes = (two.fw1, two.fw2) if winner == "fw1" else (two.fw2, two.fw1)
    netns.wait_for(goes.holds_none, "the other node to give up")
    assert stays.holds(V4)

    # hosts must find the winner again, who last said nothing: the reminder tells them
    mac = json.loads(stays.space.ip("-j", "link", "show", "eth1"))[0]["address"]
    two.pair.a.ip("neigh", "replace", "192.168.0.100", "lladdr", "02:00:00:00:00:01", "dev", "eth0", "nud", "stale")

    def neighbour() -> str:
        return str(json.loads(two.pair.a.ip("-j", "neigh", "show", "192.168.0.100"))[0].get("lladdr"))

    netns.wait_for(lambda: neighbour() == mac, "the neighbour entry to be corrected")


def test_a_reload_moves_nothing_and_the_fifo_survives_it(two: Two) -> None:
    two.start_second_active()
    inode = two.fw2.fifo.stat().st_ino
    first = two.fw2.transitions(6)
    assert first[:3] == [
        'GROUP "ha_firewall" BACKUP 0',
        'INSTANCE "VI_eth1" BACKUP 100',
        'INSTANCE "VI_eth0" BACKUP 100',
    ]
    assert sorted(first[3:5]) == ['INSTANCE "VI_eth0" MASTER 100', 'INSTANCE "VI_eth1" MASTER 100']
    assert first[5:] == ['GROUP "ha_firewall" MASTER 0']
    two.fw1.transitions(3)

    monitors = []
    for node in (two.fw1, two.fw2):
        with (node.directory / "monitor").open("w", encoding="utf-8") as log:
            monitors.append(node.space.popen("ip", "-o", "monitor", "address", stdout=log))
    # something that the watchers must see, so that their silence means something
    for node in (two.fw1, two.fw2):

        def watching(node: Node = node) -> bool:
            node.space.ip("address", "add", "203.0.113.1/32", "dev", "lo")
            node.space.ip("address", "del", "203.0.113.1/32", "dev", "lo")
            return "203.0.113.1" in (node.directory / "monitor").read_text(encoding="utf-8")

        netns.wait_for(watching, "the monitor to watch")

    for node in (two.fw2, two.fw1):
        result = node.configure(advert_interval=0.1, garp={"refresh": 7}, startup_delay=5)
        assert result["changed"]
        node.reload()
    adverts_seen(two.fw1)
    assert two.fw2.holds(V4) and two.fw1.holds_none()
    for process, node in zip(monitors, (two.fw1, two.fw2)):
        process.terminate()
        process.wait(30)
        seen = (node.directory / "monitor").read_text(encoding="utf-8")
        assert ".100/" not in seen, seen
    assert two.fw2.transitions(1) == ['GROUP "ha_firewall" MASTER 0'], "the state, said again after the reload"
    assert 'GROUP "ha_firewall" BACKUP 0' in two.fw1.transitions(1)

    two.fw2.stop()
    netns.wait_for(lambda: two.fw1.holds(V4), "fw1 to take over")
    assert two.fw2.transitions(3) == [
        'INSTANCE "VI_eth1" STOP 100',
        'INSTANCE "VI_eth0" STOP 100',
        'GROUP "ha_firewall" STOP 0',
    ]
    assert two.fw1.transitions(3)[2] == 'GROUP "ha_firewall" MASTER 0'
    assert two.fw2.fifo.stat().st_ino == inode


def test_all_virtual_ips_of_both_families_move_together(two: Two) -> None:
    two.start_second_active(ipv6=True)
    netns.wait_for(lambda: two.fw2.holds(V4 | V6), "fw2 to hold all")
    two.fw2.space.ip("link", "set", "eth1", "down")
    netns.wait_for(lambda: two.fw1.holds(V4 | V6), "fw1 to take all over")
    netns.wait_for(two.fw2.holds_none, "fw2 to give all up")
    assert {instance["state"] for instance in two.fw2.facts()["vrrp"]["instances"]} == {"FAULT"}
    two.fw2.space.ip("link", "set", "eth1", "up")
    netns.wait_for(
        lambda: {instance["state"] for instance in two.fw2.facts()["vrrp"]["instances"]} == {"BACKUP"},
        "fw2 to become backup",
    )
    assert two.fw1.holds(V4 | V6)


def test_a_missing_track_file_is_made_as_not_ready_and_an_existing_one_is_left_alone(two: Two) -> None:
    node = two.fw1
    node.configure()
    node.track_file.unlink()
    node.start()
    netns.wait_for(lambda: node.holds(V4), "fw1 to become active")
    assert node.track_file.read_text(encoding="ascii").strip() == "1"
    assert node.priorities() == {90}
    node.track_file.unlink()  # a removed file counts as ready: who says "not ready" must write, never remove
    netns.wait_for(lambda: node.priorities() == {150}, "the removed file to count as ready")
    node.stop()
    node.track_file.write_text("0\n", encoding="ascii")
    node.start()
    netns.wait_for(lambda: node.holds(V4), "fw1 to become active again")
    assert node.track_file.read_text(encoding="ascii") == "0\n"
    assert node.priorities() == {150}


def uplink(node: Node) -> None:
    """An interface ``up0`` that loses its carrier when ``far0`` goes down; nobody else is concerned."""
    node.space.ip("link", "add", "up0", "type", "veth", "peer", "name", "far0")
    for name in ("up0", "far0"):
        node.space.ip("link", "set", name, "up")


@pytest.mark.parametrize(("weight", "moves"), [(0, True), (-55, False)])
def test_a_tracked_interface_without_a_weight_moves_the_virtual_ips_and_one_with_a_weight_decides_elections(
    two: Two, weight: int, moves: bool
) -> None:
    """With nopreempt a lower priority alone takes nothing away from an active node; the state FAULT does."""
    for node in (two.fw1, two.fw2):
        uplink(node)
    two.start_second_active(track_interfaces=[{"interface": "up0", "weight": weight}])
    two.fw2.space.ip("link", "set", "far0", "down")
    if moves:
        netns.wait_for(lambda: two.fw1.holds(V4) and two.fw2.holds_none(), "fw1 to take over")
        assert {instance["state"] for instance in two.fw2.facts()["vrrp"]["instances"]} == {"FAULT"}
        two.fw2.space.ip("link", "set", "far0", "up")
        netns.wait_for(
            lambda: {instance["state"] for instance in two.fw2.facts()["vrrp"]["instances"]} == {"BACKUP"},
            "fw2 to become backup",
        )
        assert two.fw1.holds(V4)
        return
    netns.wait_for(lambda: two.fw2.priorities() == {45}, "the effective priority to fall")
    adverts_seen(two.fw1)
    assert two.fw2.holds(V4) and two.fw1.holds_none()


def test_a_node_that_lost_a_tracked_interface_loses_the_election_with_preemption(two: Two) -> None:
    for node in (two.fw1, two.fw2):
        uplink(node)
        node.configure(nopreempt=False, track_interfaces=[{"interface": "up0", "weight": -55}])
        node.start()
    netns.wait_for(lambda: two.fw1.holds(V4) and two.fw2.holds_none(), "fw1 to become active")
    two.fw1.space.ip("link", "set", "far0", "down")
    netns.wait_for(lambda: two.fw2.holds(V4) and two.fw1.holds_none(), "fw2 to take over")
    assert two.fw1.priorities() == {95}


@pytest.fixture
def router(pair: netns.Pair, tmp_path: Path) -> Iterator[None]:
    """b, the router outside, speaks BFD with both firewalls, by a keepalived that does nothing else."""
    folder = tmp_path / "router"
    folder.mkdir()
    sessions = "".join(
        f"bfd_instance fw{number} {{\n neighbor_ip 192.168.1.{number}\n source_ip 192.168.1.3\n min_rx 50\n min_tx 50\n"
        " ttl 255\n passive\n}\n"
        for number in (1, 2)
    )
    (folder / "keepalived.conf").write_text(sessions, encoding="ascii")
    with (folder / "log").open("w", encoding="utf-8") as log:
        process = pair.b.popen(
            *("keepalived", "--dont-fork", "--log-console", "--log-detail", "--no-syslog"),
            *("--use-file", str(folder / "keepalived.conf"), "--pid", str(folder / "pid")),
            *("--bfd_pid", str(folder / "bfd.pid"), "--checkers_pid", str(folder / "checkers.pid")),
            stdout=log,
            stderr=log,
        )
    yield
    process.terminate()
    process.wait(30)


@pytest.mark.usefixtures("router")
def test_a_router_that_bfd_does_not_reach_moves_the_virtual_ips(two: Two) -> None:
    """BFD comes with a weight first: a session that is new is down for a second, and without a weight that is FAULT."""

    def watch(node: Node, weight: int) -> None:
        neighbour = {"neighbour": "192.168.1.3", "source": f"192.168.1.{node.number}", "weight": weight}
        node.configure(bfd=[neighbour])
        node.reload()

    two.start_second_active()
    for node in (two.fw1, two.fw2):
        watch(node, -10)
        netns.wait_for(lambda node=node: node.log().count("is in state Up") == 1, "BFD to come up")
    for node in (two.fw1, two.fw2):
        watch(node, 0)
        netns.wait_for(
            lambda node=node: node.priorities() == {node.priority}, "the neighbour to count as reached after the reload"
        )
    adverts_seen(two.fw1)
    assert two.fw2.holds(V4) and two.fw1.holds_none()
    # the way from the router to fw2 is lost, and nothing else: the link is up, VRRP goes on
    two.fw2.space.run("iptables", "-I", "INPUT", "-p", "udp", "--dport", "3784", "-j", "DROP")
    netns.wait_for(lambda: two.fw1.holds(V4) and two.fw2.holds_none(), "fw1 to take over")
    assert {instance["state"] for instance in two.fw2.facts()["vrrp"]["instances"]} == {"FAULT"}


def test_every_option_passes_keepalived_s_own_test_and_what_it_lacks_is_refused(two: Two) -> None:
    node = two.fw1
    everything = node.options(
        ipv6=True,
        nopreempt=False,
        preempt_delay=5,
        startup_delay=1,
        realtime_priority=10,
        garp={"refresh": 5, "refresh_repeat": 2, "interval": 0.01, "master_repeat": 3},
        track_interfaces=[{"interface": "eth2"}, {"interface": "lo", "weight": -1}],
        bfd=[
            {"neighbour": "192.168.1.3", "source": "192.168.1.1", "multiplier": 3, "weight": -5},
            {"neighbour": "fd00:c0de:1::3", "source": "fd00:c0de:1::1", "passive": True, "min_rx_ms": 9.5},
        ],
    )
    done = run_module(node.space, "keepalived", **everything)
    assert not done.get("failed"), done
    assert done["validation"] == {"rc": 0, "output": done["validation"]["output"], "meaning": ""}
    for word in ("ignor", "nknown", "nvalid", "WARN"):
        assert word not in done["validation"]["output"], done["validation"]["output"]

    wrong = node.options(track_interfaces=[{"interface": "eth7"}])
    failed = run_module(node.space, "keepalived", **wrong)
    assert failed["failed"] and "tracked interface eth7 doesn't exist" in failed["msg"]

    key = "5a" * 32
    sealed = run_module(node.space, "keepalived", **node.options(authentication={"keys": [{"id": 1, "key": key}]}))
    assert key not in json.dumps(sealed)
    version = tuple(map(int, done["version"].split(".")))
    if version < (2, 4, 0):
        assert sealed["failed"] and "has none for VRRPv3" in sealed["msg"]
    else:
        assert sealed["validation"]["rc"] == 0
