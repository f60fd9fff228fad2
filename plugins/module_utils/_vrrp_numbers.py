# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Router ids and priorities of a group that the operator leaves to us, out of what is the same on all nodes.

This module is private to the collection and runs on the controller (filters).
"""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, Sequence

FIRST_ROUTER_ID = 51  # keepalived's own examples begin there, too
HIGHEST, LOWEST, SPREAD = 150, 100, 50


def with_router_ids(virtual_ips: Sequence[Any]) -> List[Any]:
    """The virtual IPs with a router id in every entry; what is no mapping is left as it is.

    An entry without one gets that of its interface, or else the next number from 51 that no entry has.  An interface is
    its place in the list, not its name: nodes may name their interfaces differently, and their ids must agree.
    """
    taken = {str(entry.get("router_id")) for entry in virtual_ips if isinstance(entry, Mapping)}
    of_interface: Dict[str, Any] = {}
    for entry in virtual_ips:
        if isinstance(entry, Mapping) and entry.get("router_id") not in (None, ""):
            of_interface.setdefault(str(entry.get("interface")), entry["router_id"])
    filled: List[Any] = []
    number = FIRST_ROUTER_ID
    for entry in virtual_ips:
        if not isinstance(entry, Mapping) or entry.get("router_id") not in (None, ""):
            filled.append(entry)
            continue
        interface = str(entry.get("interface"))
        if interface not in of_interface:
            while str(number) in taken:
                number += 1
            of_interface[interface] = number
            taken.add(str(number))
        filled.append({**entry, "router_id": of_interface[interface]})
    return filled


def priority(hosts: Sequence[str], host: str, track_weight: int) -> int:
    """The VRRP priority of one node: the first of the group has the highest.

    All are closer to each other than ``track_weight`` (negative), so that a node that is not ready loses against every
    one that is, and all stay above 0 with it.  Raises ValueError when the host is not in the group, or when the group
    is too large to have different ones.
    """
    if host not in hosts:
        raise ValueError(f"{host} is not one of {', '.join(hosts) or 'no host'}: add it to the group of firewalls")
    lowest = max(LOWEST, 1 - track_weight)
    spread = min(SPREAD, -track_weight - 1, 254 - lowest)
    steps = max(1, len(hosts) - 1)
    if len(hosts) > 1 and spread < steps:
        raise ValueError(
            f"no {len(hosts)} different priorities fit between {lowest} and {lowest + spread}: give"
            " keepalived_track_weight a larger amount, or set ha_firewall_priority on each node"
        )
    return lowest + spread - (list(hosts).index(host) * spread) // steps
