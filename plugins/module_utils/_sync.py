# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The sync links of a node, out of the inventory's variables.

This module is private to the collection. It reads no file and runs no command.
"""

from __future__ import annotations

from typing import Any, Dict, List, Mapping

LINKS = "ha_firewall_sync_links"
INTERFACE = "ha_firewall_sync_interface"
ADDRESS = "ha_firewall_sync_address"
PORT = "ha_firewall_sync_port"
DEFAULT_PORT = 3781


def links(variables: Mapping[str, Any]) -> List[Dict[str, Any]]:
    """Interface, address and port of each link, in the order of preference; empty for a node without replication.

    Raises ValueError naming the variable and the remedy.
    """
    port = variables.get(PORT)
    port = DEFAULT_PORT if port is None else port
    listed = variables.get(LINKS)
    if listed is None:
        interface, address = variables.get(INTERFACE), variables.get(ADDRESS)
        if interface is None and address is None:
            return []
        listed = [{"interface": interface, "address": address}]
        names = {"interface": INTERFACE, "address": ADDRESS}
    else:
        names = {}
    if isinstance(listed, (str, bytes, Mapping)) or not hasattr(listed, "__iter__"):
        raise ValueError(f"{LINKS}: is not a list: write a list of dictionaries with interface and address")
    found = []
    for index, link in enumerate(listed):
        if not isinstance(link, Mapping):
            raise ValueError(f"{LINKS}[{index}]: is not a dictionary: write one with interface and address")
        for key in ("interface", "address"):
            if not link.get(key):
                raise ValueError(f"{names.get(key) or f'{LINKS}[{index}].{key}'}: is missing: add it")
        unknown = sorted(str(key) for key in set(link) - {"interface", "address", "port"})
        if unknown:
            raise ValueError(f"{LINKS}[{index}]: {', '.join(unknown)}: write interface, address and, if needed, port")
        found.append(
            {
                "interface": str(link["interface"]),
                "address": str(link["address"]),
                "port": int(port if link.get("port") is None else link["port"]),
            }
        )
    return found


def peer(node: str, variables: Mapping[str, Any]) -> Dict[str, Any]:
    """A node as another one's configuration names it: ``address`` where it has one link, ``addresses`` else.

    Raises ValueError naming the variable and the remedy.
    """
    addresses = [link["address"] for link in links(variables)]
    if not addresses:
        raise ValueError(f"{LINKS}: is missing, and {INTERFACE} with {ADDRESS} too: name the node's sync link")
    return {"node": node, "address": addresses[0]} if len(addresses) == 1 else {"node": node, "addresses": addresses}
