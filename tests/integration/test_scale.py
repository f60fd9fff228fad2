# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Many sessions of mixed kinds, a sync link that loses 30 %, the active node cut, there and back: none is lost.

``CTSYNC_SCALE`` is the number of sessions (200), ``CTSYNC_REPEAT`` how often the survival is repeated (1);
``CTSYNC_SCALE_LOG`` names a file that gets a JSON line for each cut.
"""

from __future__ import annotations

import json
import os
from typing import Any, Callable

import pytest
from integration.cluster import VIP, VIP6
from integration.load import Load, cpu_seconds, memory_kib
from integration.netns import wait_for

pytestmark = pytest.mark.netns

SESSIONS = int(os.environ.get("CTSYNC_SCALE", "200"))
REPEAT = int(os.environ.get("CTSYNC_REPEAT", "1"))
LOSS = 0.3


def _record(**values: Any) -> None:
    name = os.environ.get("CTSYNC_SCALE_LOG")
    if name:
        with open(name, "a", encoding="utf-8") as log:
            log.write(json.dumps(values) + "\n")


# what becomes of the node that was cut, before the other one is cut: its daemon and its table
JOURNEY = (("restarted", "kept"), ("ran on", "kept"), ("restarted", "empty"))


@pytest.mark.parametrize("attempt", range(REPEAT))
def test_no_session_is_lost_there_and_back_and_there(load: Callable[..., Load], attempt: int) -> None:
    """1→2→1→2→1, with a kept table (adoption) and an empty one."""
    lab = load(SESSIONS, LOSS)
    lab.up()
    lab.open()
    lab.seal()
    nat = lab.server.ask("translated")
    assert nat["sources"] == sorted((VIP, VIP6))  # every session has SNAT, of whatever protocol and family
    assert nat["translated"] > SESSIONS // 8  # and it really chose ports
    for number, back in enumerate((*JOURNEY, None)):
        before = lab.replicated_all()
        lab.cut()
        result = lab.prove(lab.patience_s)
        _record(
            attempt=attempt,
            cut=number + 1,
            sessions=SESSIONS,
            **{**result, "lost": dict(list(result["lost"].items())[:20]), "lost_count": len(result["lost"])},
            retransmitted=before["counters"].get("blocks_retransmitted", 0),
            lag=before["peers"][0]["lag"],
            cpu_s={daemon.space.label: cpu_seconds(daemon) for daemon in (lab.fw1, lab.fw2)},
            rss_kib={daemon.space.label: memory_kib(daemon) for daemon in (lab.fw1, lab.fw2)},
        )
        assert result["lost"] == {}, f"cut {number + 1}: {len(result['lost'])} lost"
        assert (result["proved"], result["resets"]) == (SESSIONS, 0)
        if back is not None:
            lab.come_back(*back)
    assert lab.client.ask("talk", on=False)["short_connections"] > 0


def test_without_replication_every_session_dies(load: Callable[..., Load]) -> None:
    """The negative control: what the other test sees is ctsyncd's work."""
    lab = load(SESSIONS, LOSS, replicate=False)
    lab.pair.activate(lab.pair.fw1)
    lab.fw1.start()
    lab.fw2.start()
    wait_for(lambda: lab.fw2.status()["reasons"] == ["replication is off"], "fw2 to run")
    lab.open()
    lab.seal()
    lab.cut()
    result = lab.prove(3.0)
    _record(attempt="negative control", sessions=SESSIONS, proved=result["proved"])
    assert result["proved"] == 0
