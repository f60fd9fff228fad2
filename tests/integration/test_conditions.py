# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Nodes whose rulesets, limits or timeouts differ say so, and are READY again when they are alike."""

from __future__ import annotations

from pathlib import Path
from typing import Callable

import pytest
from integration.cluster import Cluster, Daemon
from integration.netns import wait_for

pytestmark = pytest.mark.netns

RULES, OTHER = "ab" * 32, "cd" * 32


def write(path: Path, fingerprint: str) -> None:
    """As the ruleset module does: by renaming."""
    new = path.with_suffix(".new")
    new.write_text(fingerprint + "\n", encoding="ascii")
    new.rename(path)


def says(daemon: Daemon, verdict: str, reasons: list[str]) -> bool:
    said = daemon.status()
    found = [said.get(name) for name in ("verdict", "reasons", "differences", "fit")]
    return found == [verdict, reasons, reasons, True]


def alike(cluster: Callable[..., Cluster], folder: Path) -> tuple[Cluster, list[Path]]:
    """A pair that runs with the same rules, and the file of each node that says so."""
    files = [folder / "rules1", folder / "rules2"]
    lab = cluster()
    for daemon, path in zip((lab.fw1, lab.fw2), files):
        write(path, RULES)
        daemon.configure(ruleset_fingerprint=str(path))
    lab.up()
    return lab, files


def test_a_ruleset_that_differs_makes_the_backup_not_ready_and_alarms_the_active_node(
    cluster: Callable[..., Cluster], tmp_path: Path
) -> None:
    lab, files = alike(cluster, tmp_path)
    session = lab.session()
    session.talk()

    write(files[1], OTHER)
    here = "ruleset differs (cdcdcdcdcdcd here, abababababab on fw1)"
    wait_for(lambda: says(lab.fw2, "NOT READY", [here]), "the backup to be NOT READY")
    there = "ruleset differs (abababababab here, cdcdcdcdcdcd on fw2)"
    wait_for(lambda: says(lab.fw1, "DEGRADED", [there]), "the active node to be DEGRADED")
    wait_for(lambda: (lab.fw1.gate, lab.fw2.gate) == ("0", "1"), "the gate of the backup alone")

    files[0].unlink()  # the active node has no rules any more: as different
    wait_for(lambda: says(lab.fw2, "NOT READY", [here.replace("abababababab", "none known")]), "the other reason")
    files[1].write_text("not a fingerprint\n", encoding="ascii")
    wait_for(
        lambda: any("does not hold 16 to 64 hexadecimal digits" in why for why in lab.fw2.status()["reasons"]),
        "the backup to complain of the file",
    )

    for path in files:
        write(path, OTHER)
    lab.ready(lab.fw1, lab.fw2)
    session.talk()  # nothing of this touched a session

    write(files[0], RULES)
    wait_for(lambda: lab.fw2.gate == "1", "the gate")
    lab.power_cut(lab.fw1, lab.fw2)  # alone, a node with other rules serves all the same
    session.talk()
    assert lab.fw2.gate == "0"
    write(files[0], OTHER)
    lab.back_and_equal(lab.fw1, lab.fw2)


def test_limits_and_timeouts_are_compared_and_need_not_be(cluster: Callable[..., Cluster], tmp_path: Path) -> None:
    missing = str(tmp_path / "no-ruleset")
    lab = cluster(ruleset_fingerprint=missing)
    lab.pair.fw2.sysctl({"net/netfilter/nf_conntrack_udp_timeout_stream": "77"})
    lab.pair.activate(lab.pair.fw1)
    lab.fw1.start()
    lab.fw2.start()
    theirs = lab.pair.fw1.run("sysctl", "-n", "net.netfilter.nf_conntrack_udp_timeout_stream").stdout.strip()
    reason = f"conntrack timeouts differ (nf_conntrack_udp_timeout_stream 77 here, {theirs} on fw1)"
    wait_for(lambda: says(lab.fw2, "NOT READY", [reason]), "the backup to name the timeout")

    for daemon in (lab.fw1, lab.fw2):
        daemon.configure(ruleset_fingerprint=missing, same_conditions=["ruleset", "limits"])
        daemon.reload()
    lab.ready(lab.fw1, lab.fw2)


def test_rules_that_are_not_those_that_were_applied_show_until_they_are_put_back(
    cluster: Callable[..., Cluster], tmp_path: Path
) -> None:
    """What the watch of the rules writes; also where both nodes were changed alike, so that they do not differ."""
    lab, files = alike(cluster, tmp_path)

    drift = "the rules that run here are not those that were applied (cdcdcdcdcdcd runs, abababababab was applied)"
    write(files[0], f"{OTHER}\napplied {RULES}")
    there = "ruleset differs (cdcdcdcdcdcd here, abababababab on fw2)"
    wait_for(lambda: lab.fw1.status()["reasons"] == [there, drift], "both reasons on the node that was changed")
    here = "ruleset differs (abababababab here, cdcdcdcdcdcd on fw1)"
    wait_for(lambda: says(lab.fw2, "NOT READY", [here]), "the backup to be NOT READY")

    write(files[1], f"{OTHER}\napplied {RULES}")
    for daemon in (lab.fw1, lab.fw2):
        wait_for(
            lambda daemon=daemon: [daemon.status()[name] for name in ("verdict", "reasons")] == ["DEGRADED", [drift]],
            "the drift alone",
        )
    write(files[1], f"{OTHER}\napplied {RULES}\nunread iptables-save: gone")
    unread = "the rules that run here cannot be read: iptables-save: gone"
    wait_for(lambda: lab.fw2.status()["reasons"] == [unread], "the other reason")

    for path in files:
        write(path, RULES)
    lab.ready(lab.fw1, lab.fw2)
