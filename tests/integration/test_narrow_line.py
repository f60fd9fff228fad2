# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A sync link of about 40 full datagrams a second, with a queue of ten: a table gets over it, and gets over it once."""

from __future__ import annotations

from typing import Any, Callable

import pytest
from integration.cluster import Cluster, fill
from integration.netns import wait_for

pytestmark = pytest.mark.netns

FLOWS = 60_000
QDISC = ("tbf", "rate", "448kbit", "burst", "3000", "limit", "14000")


def test_a_narrow_sync_link_is_not_filled_with_retransmissions(cluster: Callable[..., Cluster]) -> None:
    lab = cluster()
    lab.pair.fw1.run("tc", "qdisc", "add", "dev", "eth2", "root", *QDISC)
    lab.up()
    fill(lab.pair.fw1, FLOWS)
    lab.fw1.ask("-B")
    status: dict[str, Any] = {}

    def complete() -> bool:
        status.update(lab.fw2.status())
        return status["flows"]["external"] >= FLOWS and status["verdict"] == "READY"

    wait_for(complete, "the backup to hold the table", 180)
    sent, received = lab.fw1.status()["counters"], status["counters"]
    queue = lab.pair.fw1.run("tc", "-s", "qdisc", "show", "dev", "eth2").stdout
    assert "dropped 0," not in queue  # the line was too narrow
    assert received.get("blocks_duplicate", 0) <= received["blocks_received"] * 0.05
    assert sent["blocks_retransmitted"] <= 2 * received["blocks_received"]
    assert sent["sessions"] == received["sessions"] == 1
