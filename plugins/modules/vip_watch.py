#!/usr/bin/python
# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: vip_watch
short_description: Measure how long nobody answers for the virtual IPs while they move to this node
version_added: 0.1.0
description:
  - Runs on the node that is about to become active, while the other one is told to hand over. It asks for one virtual
    IP of each interface by ARP every few milliseconds, and looks when the node itself has it.
  - The time from the last answer of the other node to that moment is what a host on the segment would see that has just
    begun to look for the address. Both ends are read from one clock, so the nodes' clocks do not matter.
  - Probes carry no sender address and go to the node that answers only. They change no table and nothing else.
options:
  duration_s:
    description: How long to wait for the virtual IPs, in seconds.
    type: float
    default: 30
  interval_ms:
    description: Time between two probes of a virtual IP, in milliseconds. It is also the resolution of the result.
    type: int
    default: 5
  started:
    description: File to make when probing has begun and every virtual IP was answered for, or a second has passed.
    type: path
  virtual_ips:
    description: The virtual IPs. Those of IPv6 are left out; they move with the others.
    type: list
    elements: dict
    required: true
    suboptions:
      address:
        description: The address. A prefix length behind it is ignored.
        type: str
        required: true
      interface:
        description: Interface of this node that gets it.
        type: str
        required: true
notes:
  - Run it with C(async) and C(poll=0), wait for O(started), hand over on the other node, then collect the result with
    M(ansible.builtin.async_status). The tasks of the playbook C(switchover) do that.
  - It needs root.
  - On an interface that is not Ethernet nothing is measured.
seealso:
  - module: ctsync.ha_firewall.ha_facts
extends_documentation_fragment:
  - ctsync.ha_firewall.attributes
attributes:
  check_mode:
    support: none
  diff_mode:
    support: none
author:
  - The ctsync authors (@ctsync)
"""

EXAMPLES = r"""
- name: Watch who has the virtual IPs
  ctsync.ha_firewall.vip_watch:
    virtual_ips: "{{ ha_firewall_virtual_ips }}"
    started: /run/ctsync-watch
  async: 60
  poll: 0
  register: watch
"""

RETURN = r"""
gap_ms:
  description: The longest time, in milliseconds, that nobody answered for one of them. Null when it was not measured.
  returned: always
  type: int
  sample: 63
taken:
  description: Whether this node has got all of the watched virtual IPs.
  returned: always
  type: bool
  sample: true
virtual_ips:
  description: What was seen of each. Keys of the input that are not used for it are left out.
  returned: always
  type: list
  elements: dict
  sample:
    - {interface: eth1, address: 192.168.0.100, probes: 412, answers: 399, gap_ms: 63, held: true}
"""

import contextlib
import os
import select
import socket
import time
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.ctsync.ha_firewall.plugins.module_utils import _facts, _watch

SETTLE_S = 1.0


def open_sockets(watches: list[_watch.Watch]) -> dict[socket.socket, tuple[_watch.Watch, bytes]]:
    """A packet socket for each interface that is Ethernet, with the interface's own address."""
    found = {}
    for watch in watches:
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_watch.ETH_P_ARP))
        sock.bind((watch.interface, _watch.ETH_P_ARP))
        _name, _protocol, _kind, hardware, mac = sock.getsockname()
        if hardware != _watch.ARPHRD_ETHER or len(mac) != 6:
            sock.close()
            continue
        sock.setblocking(False)
        found[sock] = (watch, mac)
    return found


def run(module: AnsibleModule, watches: list[_watch.Watch]) -> None:
    """Ask and look until this node has every address, or the time is over."""
    interval = module.params["interval_ms"] / 1000
    begin = time.monotonic()
    sockets = open_sockets(watches)
    started = module.params["started"]
    next_probe = begin
    while True:
        now = time.monotonic()
        for address in _facts.read_addresses():
            for watch in watches:
                if address == (watch.interface, watch.address):
                    watch.held(now)
        if all(watch.held_at is not None for watch in watches) or now - begin > module.params["duration_s"]:
            return
        if started and (all(watch.answers for watch in watches) or now - begin > SETTLE_S):
            with open(started, "w", encoding="utf-8"):
                started = None
        if now >= next_probe:
            next_probe = now + interval
            for sock, (watch, mac) in sockets.items():
                watch.probes += 1
                with contextlib.suppress(OSError):  # a full queue, an interface that is down
                    sock.send(_watch.probe(mac, watch.address, watch.mac))
        for sock in select.select(list(sockets), [], [], max(0.0, next_probe - time.monotonic()))[0]:
            answer = _watch.parse_answer(sock.recv(2048))
            if answer is not None:
                sockets[sock][0].answered(answer, time.monotonic())


def argument_spec() -> dict[str, Any]:
    return {
        "duration_s": {"type": "float", "default": 30},
        "interval_ms": {"type": "int", "default": 5},
        "started": {"type": "path"},
        "virtual_ips": {
            "type": "list",
            "elements": "dict",
            "required": True,
            "options": {
                "address": {"type": "str", "required": True},
                "interface": {"type": "str", "required": True},
            },
        },
    }


def main() -> None:
    module = AnsibleModule(argument_spec=argument_spec(), supports_check_mode=False)
    if module.params["interval_ms"] < 1:
        module.fail_json(msg=f"interval_ms: {module.params['interval_ms']} is too short: choose 1 or more")
    chosen = _watch.first_of_each_interface(module.params["virtual_ips"])
    watches = [_watch.Watch(**vip) for vip in chosen]
    try:
        run(module, watches)
    except OSError as error:
        module.fail_json(msg=f"the virtual IPs cannot be watched: {error}")
    finally:
        if module.params["started"]:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(module.params["started"])
    results = [watch.result() for watch in watches]
    gaps = [row["gap_ms"] for row in results if row["gap_ms"] is not None]
    module.exit_json(
        changed=False,
        gap_ms=max(gaps) if gaps else None,
        taken=bool(results) and all(row["held"] for row in results),
        virtual_ips=results,
    )


if __name__ == "__main__":
    main()
