# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the daemon makes of the engine's requests."""

from __future__ import annotations

import pytest
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import constants as k
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import ctnetlink, daemon, engine
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.engine import Request
from unit.simulation import tcp


def meant(operation: str, attempt: int = 0) -> dict[int, bytes]:
    """The attributes of the message for a request."""
    flow = tcp(1001, 2001, mark=7)
    message = daemon._message(Request(operation, flow.key, flow, 55, attempt))
    return ctnetlink.attributes(message, ctnetlink.HEADER_LEN + 4)


def test_timer_request_says_nothing_but_the_timer() -> None:
    """At a take-over packets may have changed everything else meanwhile."""
    said = meant(engine.TIMER)
    assert set(said) == {ctnetlink.CTA_TUPLE_ORIG, ctnetlink.CTA_TIMEOUT}
    assert said[ctnetlink.CTA_TIMEOUT] == b"\0\0\0\x37"


@pytest.mark.parametrize(("operation", "attempt"), [(engine.TIMER, 1), (engine.UPDATE, 0), (engine.UPDATE, 1)])
def test_update_makes_window_tracking_liberal_even_where_the_status_stays(operation: str, attempt: int) -> None:
    """An adopted entry has the sequence numbers of the past: without this the kernel drops its packets as invalid."""
    said = meant(operation, attempt)
    state, _scale, flags, _tags = ctnetlink._decode_protoinfo(said[ctnetlink.CTA_PROTOINFO])
    assert state == k.TCP_ESTABLISHED
    assert flags is not None
    assert all(one & k.TCP_FLAG_BE_LIBERAL for one in flags)
    assert (ctnetlink.CTA_STATUS in said) == (operation == engine.UPDATE)
    assert said[ctnetlink.CTA_MARK] == b"\0\0\0\7"
