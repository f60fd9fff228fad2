# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""ctsyncd, the connection-tracking state replication daemon.

Rooms, from the ground up; a room imports only from the floors below it:

1. values: ``constants``, ``errors``, ``flow``, ``rows``, ``config``, ``conditions``
2. codecs, bytes <-> values: ``ctnetlink`` (kernel), ``wire`` (peer), ``render`` (people); ``expectation`` (kernel and
   peer), ``expectation_render``
3. pure logic, time is an argument: ``pending``, ``tables``, ``filters``, ``session``, ``keyring``, ``paths``,
   ``readiness``, ``recorder``, ``digest``, ``announced``, ``verification``; the engine's: ``situation`` (what its rooms
   share), ``jobs`` (requests to the kernel), ``dumps``, ``takeover``, ``replicas`` (a backup's), ``peer`` (one of
   them), ``newcomers`` and ``source`` (the active node's flows), ``expectation_source`` and ``expectation_replicas``
   under ``helpers``, ``prover`` and ``checker`` (equal tables: the active node's part and the backup's), ``engine``
   (conducts)
4. edges: ``crypto``, ``netlink``, ``expectation_sockets``, ``helper_edge``, ``link``, ``control``, ``client``,
   ``vrrp``, ``flights``, ``service``, ``watch``
5. ``daemon`` (the event loop), ``cli``, ``__main__``

Only the standard library is imported at import time.
"""

from __future__ import annotations

__version__ = "0.1.0"
