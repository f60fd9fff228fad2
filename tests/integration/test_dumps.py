# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Dumps of a large table through the control socket: whole, without growing the daemon or keeping it from its work.

``CTSYNC_DUMP_FLOWS`` is the number of flows (50000).  Beyond what the machine allows, the limits of its connection
tracking, which all network namespaces share, are raised for the time of the test.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest
from integration.cluster import Cluster, Daemon, fill
from integration.load import cpu_seconds, memory_kib
from integration.netns import pair, wait_for

pytestmark = pytest.mark.netns

FLOWS = int(os.environ.get("CTSYNC_DUMP_FLOWS", "50000"))
GROWTH_KIB = 4 << 10  # of a daemon that is asked for everything, whatever the number of flows
READERS = 12  # dumps at the same time; the daemon serves 16
PATIENCE_S = 60 + FLOWS / 1000
ANSWER_S = 2.0  # for the status meanwhile; a daemon that hangs takes as long as the dump

Record = Callable[[str, object], None]


@contextlib.contextmanager
def room() -> Iterator[None]:
    """Limits of the machine that let ``FLOWS`` entries in, and are put back."""
    with contextlib.ExitStack() as stack:
        for name in ("nf_conntrack_max", "nf_conntrack_buckets"):
            limit = Path("/proc/sys/net/netfilter", name)
            before = limit.read_text(encoding="ascii")
            if int(before) < FLOWS * 11 // 10:
                limit.write_text(str(FLOWS * 11 // 10), encoding="ascii")
                stack.callback(limit.write_text, before, encoding="ascii")
        yield


class Client:
    """Asks on the control socket as a foreign program would."""

    def __init__(self, daemon: Daemon, command: str) -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.settimeout(PATIENCE_S)
        self._sock.connect(str(daemon.home / "socket"))
        self._sock.sendall(json.dumps({"command": command, "format": "text"}).encode() + b"\n")

    def read(self, size: int = 1 << 18) -> bytes:
        return self._sock.recv(size)

    def all(self) -> tuple[int, bool]:
        """How many different flows came, and whether the response is complete."""
        seen: collections.Counter[bytes] = collections.Counter()
        rest = b""
        while data := self.read():
            *lines, rest = (rest + data).split(b"\n")
            trailer = lines[-1] if lines else b""
            seen.update(hash_of(line) for line in lines if line.startswith(b"tcp "))
        assert set(seen.values()) <= {1}, "a flow came twice"
        return len(seen), not rest and json.loads(trailer) == {"ok": True, "exit": 0}

    def close(self) -> None:
        self._sock.close()


def hash_of(line: bytes) -> bytes:
    """What tells the flows of ``fill`` apart, without keeping whole lines of a million of them."""
    words = line.split(b" src=", 2)[1]
    return words[: words.index(b" ")] + words[words.index(b" sport=") : words.index(b" dport=")]


def status(daemon: Daemon) -> dict[str, Any]:
    with contextlib.closing(Client(daemon, "status")) as client:
        text = b""
        while data := client.read():
            text += data
    found: dict[str, Any] = json.loads(text.splitlines()[0])
    return found


class Watch:
    """Asks both daemons for their status all the time, in a thread."""

    def __init__(self, daemons: tuple[Daemon, Daemon]) -> None:
        self.slowest_s = 0.0
        self.answers = 0
        self.trouble: list[object] = []
        self._daemons = daemons
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            for daemon in self._daemons:
                began = time.monotonic()
                found = status(daemon)
                self.slowest_s = max(self.slowest_s, time.monotonic() - began)
                self.answers += 1
                if found["verdict"] != "READY" or found["peers"][0]["state"] != "up":
                    self.trouble.append((found["node"], found["verdict"], found["reasons"], found["peers"]))


def sessions(lab: Cluster) -> list[int]:
    return [daemon.status()["counters"]["sessions"] for daemon in (lab.fw1, lab.fw2)]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """fw1's kernel and fw2's external cache have ``FLOWS`` flows; fw2's kernel, which nobody asks here, does not.

    The tables are not compared meanwhile: a comparison, too, takes memory for the keys it looks at, when it likes.
    """
    with (
        room(),
        pair() as topology,
        contextlib.closing(
            Cluster(topology, tmp_path_factory.mktemp("lab"), mode="external-cache", compare=False)
        ) as made,
    ):
        fill(topology.fw1, FLOWS)
        topology.activate(topology.fw1)
        made.fw1.start()
        made.fw2.start()

        def complete() -> bool:
            found = status(made.fw2)
            return found["verdict"] == "READY" and found["flows"]["external"] == FLOWS

        wait_for(lambda: made.fw2.status()["role"], "fw2 to run")
        wait_for(complete, "the whole table on fw2", PATIENCE_S)
        made.ready(made.fw1, made.fw2)
        yield made


def daemon_of(lab: Cluster, side: str) -> Daemon:
    return lab.fw1 if side == "internal" else lab.fw2


def begin_to_measure(daemon: Daemon) -> int:
    """The daemon's resident memory in KiB; ``VmHWM`` begins anew (proc(5), clear_refs)."""
    assert daemon.process is not None
    Path(f"/proc/{daemon.process.pid}/clear_refs").write_text("5", encoding="ascii")
    return memory_kib(daemon)


@pytest.mark.parametrize("side", ["internal", "external"])
def test_dumps_that_nobody_reads_on_cost_next_to_nothing(lab: Cluster, side: str, record_property: Record) -> None:
    daemon = daemon_of(lab, side)
    before = begin_to_measure(daemon)
    with contextlib.ExitStack() as stack:
        for _dummy in range(READERS):
            assert stack.enter_context(contextlib.closing(Client(daemon, side))).read(1024).startswith(b"tcp ")
        growth = memory_kib(daemon, "VmHWM") - before
    record_property("flows, dumps, resident KiB before, growth", (FLOWS, READERS, before, growth))
    assert growth < GROWTH_KIB


@pytest.mark.parametrize("side", ["internal", "external"])
def test_dump_of_everything_streams(lab: Cluster, side: str, record_property: Record) -> None:
    daemon = daemon_of(lab, side)
    before_sessions = sessions(lab)
    before, cpu = begin_to_measure(daemon), cpu_seconds(daemon)
    with contextlib.ExitStack() as stack:
        slow, client = (stack.enter_context(contextlib.closing(Client(daemon, side))) for _ in range(2))
        assert slow.read(1024).startswith(b"tcp ")
        watch = stack.enter_context(Watch((lab.fw1, lab.fw2)))
        began = time.monotonic()
        count, complete = client.all()
        took = time.monotonic() - began
        assert slow.read(1024)  # it is still served, and nobody waited for it
    growth, cpu = memory_kib(daemon, "VmHWM") - before, cpu_seconds(daemon) - cpu
    record_property("flows, seconds, CPU seconds", (FLOWS, round(took, 1), round(cpu, 1)))
    record_property("resident KiB before, growth", (before, growth))
    record_property("slowest status in seconds, answers", (round(watch.slowest_s, 3), watch.answers))
    assert (count, complete) == (FLOWS, True)
    assert watch.trouble == []
    assert watch.answers > 2
    assert watch.slowest_s < ANSWER_S
    assert sessions(lab) == before_sessions
    assert growth < GROWTH_KIB
