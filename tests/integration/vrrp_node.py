# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A firewall's real keepalived in its network namespace, configured by the module, observed by ha_facts."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from integration import netns

ROOT = Path(__file__).resolve().parents[2]
V4 = {("eth1", "192.168.0.100"), ("eth0", "192.168.1.100")}
V6 = {("eth1", "fd00:c0de::100"), ("eth0", "fd00:c0de:1::100")}


def run_module(space: netns.Namespace, name: str, check: bool = False, **options: Any) -> dict[str, Any]:
    """A module of the collection in a namespace, as Ansible would run it; its result."""
    arguments = {"ANSIBLE_MODULE_ARGS": {**options, "_ansible_check_mode": check, "_ansible_diff": True}}
    module = f"ansible_collections.ctsync.ha_firewall.plugins.modules.{name}"
    done = subprocess.run(
        ["ip", "netns", "exec", space.name, sys.executable, "-m", module],
        input=json.dumps(arguments),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT / "collections")},
    )
    try:
        return dict(json.loads(done.stdout))
    except ValueError:
        raise AssertionError(f"{name}: {done.stdout}{done.stderr}") from None


class Node:
    """A firewall with a keepalived of its own: files in ``directory``, nothing of the machine's.

    ``daemon``: the directory of a daemon that reads the FIFO ``fifo`` there and writes the track file ``not-ready``;
    without one the test does both.  ``others``: numbers of the other firewalls.  ``unicast``: else VRRP by multicast.
    """

    def __init__(
        self,
        space: netns.Namespace,
        directory: Path,
        number: int,
        priority: int,
        daemon: Path | None = None,
        *,
        others: tuple[int, ...] = (),
        unicast: bool = True,
    ) -> None:
        self.space = space
        self.unicast = unicast
        self.others = others or (3 - number,)
        self.number = number
        self.priority = priority
        self.directory = directory
        directory.mkdir()
        self.config = directory / "keepalived.conf"
        self.track_file = (daemon or directory) / "not-ready"
        self.fifo = daemon / "fifo" if daemon else directory / "notify.fifo"
        self._reader: int | None = None
        if not daemon:
            self.track_file.write_text("0\n", encoding="ascii")
            os.mkfifo(self.fifo, 0o640)
            self._reader = os.open(self.fifo, os.O_RDONLY | os.O_NONBLOCK)
        self._process: subprocess.Popen[Any] | None = None

    def options(self, ipv6: bool = False, **more: Any) -> dict[str, Any]:
        """The module's options for the lab's virtual IPs."""
        rows = [("eth1", 51, "192.168.0.{}", 24), ("eth0", 52, "192.168.1.{}", 24)]
        if ipv6:
            rows += [("eth1", 51, "fd00:c0de::{}", 64), ("eth0", 52, "fd00:c0de:1::{}", 64)]
        instances = [
            {
                "interface": interface,
                "router_id": router,
                "virtual_ips": [f"{net.format(100)}/{length}"],
                **(self._unicast(net) if self.unicast else {}),
            }
            for interface, router, net, length in rows
        ]
        return {
            "path": str(self.config),
            "manage_service": False,
            "node": f"fw{self.number}",
            "priority": self.priority,
            "notify_fifo": str(self.fifo),
            "track_file": str(self.track_file),
            "instances": instances,
            **more,
        }

    def _unicast(self, net: str) -> dict[str, Any]:
        return {
            "unicast_src_ip": net.format(netns.last_octet(self.number)),
            "unicast_peers": [net.format(netns.last_octet(other)) for other in self.others],
        }

    def configure(self, **more: Any) -> dict[str, Any]:
        result = run_module(self.space, "keepalived", **self.options(**more))
        assert not result.get("failed"), result
        return result

    def start(self) -> None:
        with (self.directory / "log").open("a", encoding="utf-8") as log:
            self._process = self.space.popen(
                # as the service runs it: a process for VRRP, and one for BFD as soon as there is some
                *("keepalived", "--dont-fork", "--log-console", "--log-detail", "--no-syslog"),
                *("--use-file", str(self.config)),
                *("--pid", str(self.directory / "pid"), "--vrrp_pid", str(self.directory / "vrrp.pid")),
                *("--bfd_pid", str(self.directory / "bfd.pid"), "--checkers_pid", str(self.directory / "checkers.pid")),
                stdout=log,
                stderr=log,
            )

    def stop(self) -> None:
        """An orderly end; nothing happens when it does not run."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait(30)
        self._process = None

    def _children(self) -> list[int]:
        """The processes that speak VRRP and BFD.  (Their files are empty where the disk was full.)"""
        assert self._process is not None
        parent = self._process.pid
        return [int(child) for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]

    def kill(self) -> None:
        """No process, no last word; the addresses stay behind."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGSTOP)  # it would start a new child
        for child in self._children():
            os.kill(child, signal.SIGKILL)
        self._process.kill()
        self._process.wait(30)
        self._process = None
        for name in ("pid", "vrrp.pid"):
            (self.directory / name).unlink()

    def power_off(self) -> None:
        """What a power cut leaves of keepalived: no process, no last word, no addresses."""
        self.kill()
        for interface, address in self.addresses() & (V4 | V6):
            self.space.ip("address", "del", address + ("/64" if ":" in address else "/24"), "dev", interface)

    def freeze(self, frozen: bool) -> None:
        """Stop its processes where they are, or let them go on."""
        assert self._process is not None
        for pid in (self._process.pid, *self._children()):
            os.kill(pid, signal.SIGSTOP if frozen else signal.SIGCONT)

    def reload(self) -> None:
        assert self._process is not None
        done = self.log().count("Reload complete")
        self._process.send_signal(signal.SIGHUP)
        netns.wait_for(lambda: self.log().count("Reload complete") > done, "the reload to end")

    def log(self) -> str:
        return (self.directory / "log").read_text(encoding="utf-8", errors="replace")

    def addresses(self) -> set[tuple[str, str]]:
        listed = json.loads(self.space.ip("-j", "address"))
        return {(link["ifname"], entry["local"]) for link in listed for entry in link["addr_info"] if "local" in entry}

    def holds(self, wanted: set[tuple[str, str]]) -> bool:
        """All of them; an assertion fails if it stays at some."""
        return wanted <= self.addresses()

    def holds_none(self) -> bool:
        return not self.addresses() & (V4 | V6)

    def facts(self) -> dict[str, Any]:
        result = run_module(
            self.space,
            "ha_facts",
            gather_subset=["role", "vrrp"],
            config_file="/nonexistent",
            keepalived_config=str(self.config),
            keepalived_pid_file=str(self.directory / "pid"),
        )
        assert not result.get("failed"), result
        return dict(result["ansible_facts"]["ha_firewall"])

    def priorities(self) -> set[int]:
        """The effective priorities of the instances, from keepalived itself."""
        vrrp = self.facts()["vrrp"]
        assert vrrp["source"] == "dump", vrrp
        return {instance["effective_priority"] for instance in vrrp["instances"]}

    def ready(self, value: bool) -> None:
        """Say whether the node is ready, the way the daemon does: in place, one write, close."""
        descriptor = os.open(self.track_file, os.O_WRONLY)
        os.pwrite(descriptor, b"0\n" if value else b"1\n", 0)
        os.close(descriptor)

    def transitions(self, count: int = 0) -> list[str]:
        """The lines in the FIFO; waits for at least ``count`` of them."""
        text = ""
        assert self._reader is not None
        while True:
            poll = select.poll()
            poll.register(self._reader, select.POLLIN)
            waiting = text.count("\n") < count
            if not poll.poll(30_000 if waiting else 200):
                assert not waiting, f"waited in vain for {count} lines, got {text!r}"
                return text.splitlines()
            data = os.read(self._reader, 65_536)
            if not data:
                return text.splitlines()
            text += data.decode("ascii")

    def close(self) -> None:
        self.stop()
        if self._reader is not None:
            os.close(self._reader)


def adverts_seen(node: Node, more: int = 20) -> None:
    """Wait until a backup has heard ``more`` advertisements: enough for it to act on what they say."""

    def heard() -> int | None:
        """The least that an instance heard; None while keepalived has not written its statistics yet."""
        statistics = [instance.get("statistics") for instance in node.facts()["vrrp"]["instances"]]
        return min(each["advert_rcvd"] for each in statistics) if statistics and all(statistics) else None

    def known() -> list[int]:
        found = heard()
        return [] if found is None else [found]

    (start,) = netns.wait_for(known, "keepalived's statistics")
    netns.wait_for(lambda: (heard() or 0) >= start + more, "advertisements to arrive")
