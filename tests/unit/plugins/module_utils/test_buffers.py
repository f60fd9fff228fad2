# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The size of the daemon's event buffer follows from the host."""

from __future__ import annotations

import pytest
from ansible_collections.ctsync.ha_firewall.plugins.module_utils import _buffers as b
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import config as daemon_config

MIB = 1 << 20
GIB = 1 << 30


@pytest.mark.parametrize(
    ("table_size", "memory", "size"),
    [
        pytest.param(65_536, 2 * GIB, 32 * MIB, id="a small host"),
        pytest.param(262_144, 8 * GIB, 128 * MIB, id="the kernel's default of a larger one"),
        pytest.param(262_144, 1 * GIB, 32 * MIB, id="a large table in little memory"),
        pytest.param(2_000_000, 64 * GIB, 256 * MIB, id="no more than the daemon takes by itself"),
        pytest.param(4_096, 64 * GIB, 8 * MIB, id="a tiny table"),
        pytest.param(65_536, 128 * MIB, 8 * MIB, id="a tiny host"),
        pytest.param(None, 4 * GIB, 128 * MIB, id="connection tracking is not loaded yet"),
        pytest.param(262_144, None, 128 * MIB, id="memory is not known"),
        pytest.param(None, None, 256 * MIB, id="nothing is known"),
    ],
)
def test_room_for_each_flow_within_bounds(table_size, memory, size):
    assert b.event_buffer(table_size, memory) == size


def test_every_size_is_one_that_the_daemon_takes():
    (row,) = [option for option in daemon_config.OPTIONS if option.key == "netlink_buffer_bytes"]
    for table_size in (1, 1 << 16, 1 << 40):
        for memory in (1, 1 << 31, 1 << 60):
            assert row.minimum <= b.event_buffer(table_size, memory) <= row.maximum


def test_the_host_is_read(tmp_path):
    table, memory = tmp_path / "max", tmp_path / "meminfo"
    assert (b.read_table_size(str(table)), b.read_memory(str(memory))) == (None, None)
    table.write_text("262144\n", encoding="ascii")
    memory.write_text("MemTotal:       24684480 kB\nMemFree: 1 kB\n", encoding="ascii")
    assert (b.read_table_size(str(table)), b.read_memory(str(memory))) == (262_144, 24_684_480 * 1024)
    memory.write_text("MemFree: 1 kB\n", encoding="ascii")
    assert b.read_memory(str(memory)) is None
