# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""How large the daemon's buffer for the kernel's events should be on a host. Private to the collection.

An event that waits costs the kernel 1280 bytes, however short it is (``truesize`` of a small netlink message), and the
kernel doubles the size that is asked for (socket(7), SO_RCVBUF): 640 bytes that are asked for hold one event.
"""

from __future__ import annotations

from typing import Optional

BYTES_PER_EVENT = 640
LEAST = 8 << 20
MOST = 256 << 20  # up to which the daemon grows the buffer by itself when events were lost
MEMORY_SHARE = 32  # the buffer is at most this part of the memory; it is used while events wait, and only then
TABLE_SIZE_FILE = "/proc/sys/net/netfilter/nf_conntrack_max"
MEMORY_FILE = "/proc/meminfo"


def event_buffer(table_size: Optional[int], memory: Optional[int]) -> int:
    """Bytes to ask for: room for one event of each flow of a full table, within bounds, as a power of two.

    ``table_size``: flows that the kernel's table may hold, ``memory``: bytes of the host; None for what is not known.
    """
    wanted = table_size * BYTES_PER_EVENT if table_size else MOST
    if memory:
        wanted = min(wanted, memory // MEMORY_SHARE)
    wanted = max(LEAST, min(MOST, wanted))
    return 1 << (wanted.bit_length() - 1)


def read_table_size(path: str = TABLE_SIZE_FILE) -> Optional[int]:
    """Flows that the kernel's table may hold; None before connection tracking is loaded."""
    try:
        with open(path, encoding="ascii") as stream:
            return int(stream.read())
    except (OSError, ValueError):
        return None


def read_memory(path: str = MEMORY_FILE) -> Optional[int]:
    """Bytes of memory of the host; None when the kernel does not tell."""
    try:
        with open(path, encoding="ascii") as stream:
            for line in stream:
                if line.startswith("MemTotal:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return None
