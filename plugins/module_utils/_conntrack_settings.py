# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The size of the connection tracking table and its timeouts, as options of the role kernel.  Pure functions.

This module is private to the collection.  Sources: Documentation/networking/nf_conntrack-sysctl.rst and
net/netfilter/nf_conntrack_core.c of Linux.
"""

from __future__ import annotations

import re
from typing import Any, Dict, List, Mapping, NamedTuple

PREFIX = "net.netfilter.nf_conntrack_"
FLOWS = range(1024, 2**31)
# nf_ct_alloc_hashtable() rounds up to whole pages (4 KiB) of pointers, and nf_conntrack_hash_resize() says what it took
BUCKETS_STEP = 512
SECONDS = range(1, 365 * 86400 + 1)
_TIMEOUT = re.compile(r"(?!frag6_)[a-z0-9_]*timeout[a-z0-9_]*")


class Settings(NamedTuple):
    """`sysctls` are names and values in the order of setting; `problems` are sentences that begin with the option."""

    sysctls: List[Dict[str, str]]
    problems: List[str]


def _whole(value: Any) -> Any:
    """The number, also written as text; None for everything else."""
    if isinstance(value, bool):
        return None
    text = str(value).strip()
    return int(text) if re.fullmatch(r"\d{1,18}", text) else None


def settings(conntrack_max: Any = 0, buckets: Any = 0, timeouts: Any = None) -> Settings:
    """What to set; 0 (or nothing) leaves what the kernel has. What is wrong is left out, and said.

    `conntrack_max` is in flows, `buckets` in entries of the hash table, `timeouts` in seconds by the name of the sysctl
    after ``net.netfilter.nf_conntrack_``.
    """
    found: List[Dict[str, str]] = []
    problems: List[str] = []

    def put(name: str, value: int) -> None:
        found.append({"name": PREFIX + name, "value": str(value)})

    flows, slots = _whole(conntrack_max or 0), _whole(buckets or 0)
    if flows is None or (flows and flows not in FLOWS):
        problems.append(
            f"conntrack_max: {conntrack_max!r} is not {FLOWS.start} to {FLOWS.stop - 1} flows: choose one of these, or"
            " 0 for what the kernel has"
        )
    elif flows:
        put("max", flows)
    if slots is None or slots >= FLOWS.stop:
        problems.append(f"conntrack_buckets: {buckets!r} is not a number of buckets: choose one, or 0 for the kernel's")
    elif slots % BUCKETS_STEP:
        up = slots + BUCKETS_STEP - slots % BUCKETS_STEP
        problems.append(
            f"conntrack_buckets: {slots} is not a multiple of {BUCKETS_STEP}, and the kernel takes whole pages: write"
            f" {up}"
        )
    elif slots:
        put("buckets", slots)
    if timeouts is not None and not isinstance(timeouts, Mapping):
        problems.append("conntrack_timeouts: is not a mapping: write names and seconds, such as {udp_timeout: 30}")
        timeouts = {}
    for name, value in (timeouts or {}).items():
        seconds = _whole(value)
        if not _TIMEOUT.fullmatch(str(name)):
            short = str(name).replace(PREFIX, "").replace("nf_conntrack_", "")
            guess = (
                f": write {short}" if _TIMEOUT.fullmatch(short) else ", such as tcp_timeout_established or udp_timeout"
            )
            problems.append(f"conntrack_timeouts: {name!r} is no name of a timeout after {PREFIX}{guess}")
        elif seconds not in SECONDS:
            problems.append(
                f"conntrack_timeouts: {name}: {value!r} is not {SECONDS.start} to {SECONDS.stop - 1} seconds:"
                " choose one of these"
            )
        else:
            put(str(name), seconds)
    return Settings(found, problems)


def option_of(sysctl: str) -> str:
    """The variable of the role kernel that sets this key."""
    name = sysctl.replace("/", ".")
    if name in (PREFIX + "max", PREFIX + "buckets"):
        return "kernel_conntrack_" + name[len(PREFIX) :]
    if name.startswith(PREFIX) and _TIMEOUT.fullmatch(name[len(PREFIX) :]):
        return "kernel_conntrack_timeouts"
    return "kernel_extra_sysctls"
