# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a replica meets on the other node: its ruleset, and its kernel's limits and timers.  Pure values.

A flow that one node forwards the other forwards only with the same rules, translates alike only with the same NAT
pools, and keeps as long only with the same timers.  Each node tells its peer what it has; where they differ the node
that waits is not ready.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Collection, Mapping
from typing import NamedTuple

# What is compared
RULESET = "ruleset"  # rules, policies and NAT pools
LIMITS = "limits"  # of tables, and how strict the TCP tracker is
TIMEOUTS = "timeouts"
KINDS = (RULESET, LIMITS, TIMEOUTS)

FINGERPRINT = re.compile(r"(?:[0-9a-f]{2}){8,32}\Z")
NAMED_DIFFERENCES = 4  # parameters that one reason names; the others are counted

_LIMITS = ("max", "expect_max", "tcp_loose", "tcp_be_liberal", "tcp_ignore_invalid_rst", "tcp_max_retrans")


class Conditions(NamedTuple):
    """``ruleset``: fingerprint of the rules that were applied last (hexadecimal digits; empty: none known).

    ``parameters``: sysctls net.netfilter.nf_conntrack_NAME by the CRC-32 of NAME.
    """

    ruleset: str
    parameters: Mapping[int, int]


UNKNOWN = Conditions("", {})


def kind(name: str) -> str:
    """To which kind the sysctl net.netfilter.nf_conntrack_``name`` belongs; empty: it need not be the same."""
    return TIMEOUTS if "_timeout" in name and not name.startswith("frag6_") else LIMITS if name in _LIMITS else ""


def number(name: str) -> int:
    return zlib.crc32(name.encode())


def own(ruleset: str, parameters: Mapping[str, int]) -> Conditions:
    """This node's; parameters that need not be the same are left out."""
    compared = ((number(name), value) for name, value in parameters.items() if kind(name))
    return Conditions(ruleset, {name: value for name, value in compared if 0 <= value <= 0xFFFFFFFF})


def differences(
    ours: Conditions, theirs: Conditions, names: Collection[str], peer: str, kinds: Collection[str]
) -> tuple[str, ...]:
    """One sentence for each of ``kinds`` in which the nodes differ.

    ``names``: of this node's parameters.  One that only one of the kernels has is not compared.
    """
    found = []
    if RULESET in kinds and ours.ruleset != theirs.ruleset:
        found.append(f"ruleset differs ({_short(ours.ruleset)} here, {_short(theirs.ruleset)} on {peer})")
    for compared, title in ((LIMITS, "conntrack limits differ"), (TIMEOUTS, "conntrack timeouts differ")):
        if compared not in kinds:
            continue
        unlike = []
        for name in sorted(name for name in names if kind(name) == compared):
            here, there = ours.parameters.get(number(name)), theirs.parameters.get(number(name))
            if here is not None and there is not None and here != there:
                unlike.append(f"nf_conntrack_{name} {here} here, {there} on {peer}")
        if unlike:
            more = [f"{len(unlike) - NAMED_DIFFERENCES} more"] if len(unlike) > NAMED_DIFFERENCES else []
            found.append(f"{title} ({'; '.join(unlike[:NAMED_DIFFERENCES] + more)})")
    return tuple(found)


def _short(fingerprint: str) -> str:
    return fingerprint[:12] or "none known"
