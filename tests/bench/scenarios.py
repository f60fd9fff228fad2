# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is measured: each scenario loads a running pair of daemons and says what that cost them."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple

from integration.netns import Namespace, wait_for

from .daemons import Ctsyncd, Pair
from .loads import Loads
from .measure import QUIET_S, moment, per, settled, worked
from .results import quantile
from .topology import Stand, entries

Values = dict[str, float]

NETLINK_NETFILTER = 12  # <linux/netlink.h>


class Size(NamedTuple):
    """How much is done."""

    rounds: int
    flows: int  # of a flood, a commit, a resync
    growth: tuple[int, ...]  # table sizes of the curve
    growth_first: tuple[int, ...]  # more of them, in the first round only
    warmup_s: float
    seconds: float
    idle_s: float
    probes: int


SIZES = {
    "quick": Size(1, 20_000, (100_000,), (), 4.0, 3.0, 5.0, 150),
    "default": Size(3, 100_000, (25_000, 50_000, 100_000), (), 5.0, 6.0, 10.0, 300),
    "full": Size(
        5, 100_000, (50_000, 100_000, 250_000, 500_000, 1_000_000), (2_000_000, 4_000_000), 5.0, 10.0, 20.0, 600
    ),
}
FILL = 50_000  # flows that a table grows by at once: what conntrackd takes without losing events
EVENT_PROBE = 20_000  # flows that are added and deleted to see what one costs in a table of a certain size
STEADY_RATE = 20_000
CONVERGE_S = 15.0
PROBE_LOST_US = 5_000_000.0  # as long as latency.c waits


class Bench(NamedTuple):
    """Everything that a scenario needs."""

    stand: Stand
    loads: Loads
    size: Size
    round: int

    def seed(self, what: str) -> int:
        """The same for every variant of a round, another one in each round."""
        return self.round * 1000 + sum(what.encode())


def patience(flows: int) -> float:
    """Seconds that working off so many flows may take before it counts as hung."""
    return 60 + flows / 4000


# --- real connections ---

REAP_S = 0.5


@contextlib.contextmanager
def reaper(space: Namespace) -> Iterator[None]:
    """List a table twice a second: the kernel removes the expired entries that a listing meets.

    Left to itself it collects them at intervals of one to many seconds, so that one run would see the end of its
    connections and the next one would not.
    """
    with space.inside():
        lister = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
    stop = threading.Event()

    def reap() -> None:
        request = struct.pack("=IHHIIBBH", 20, 0x0101, 0x301, 0, 0, socket.AF_INET, 0, 0)  # IPCTNL_MSG_CT_GET, dump
        while not stop.wait(REAP_S):
            lister.send(request)
            kind = 0
            while kind != 3:  # NLMSG_DONE
                kind = struct.unpack_from("=H", lister.recv(1 << 17), 4)[0]

    thread = threading.Thread(target=reap)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        lister.close()


def real(bench: Bench, pair: Pair, name: str, *, rate: float, snat: bool, hold_ms: float = 0) -> Values:
    """Real TCP connections: births and deaths in balance, cost per connection."""
    begun = []
    warmup = bench.size.warmup_s + hold_ms / 1000
    with bench.loads.server(), reaper(bench.stand.fw1):
        result = bench.loads.connections(
            snat=snat,
            rate=rate,
            warmup_s=warmup,
            seconds=bench.size.seconds,
            seed=bench.seed(name),
            hold_ms=hold_ms,
            at=lambda: begun.append((moment(pair), entries(bench.stand.fw1))),
        )
        after, left = moment(pair), entries(bench.stand.fw1)
    before, had = begun[0]
    if result["failed"] > result["completed"] // 50:
        raise RuntimeError(f"{name}: {result['failed']} connections failed, {result['completed']} did not")
    settled(pair, patience(left))
    return {
        **per(before, after, result["completed"]),
        "connections": result["completed"],
        "rate": result["completed"] / result["seconds"],
        "failed": result["failed"],
        "entries_before": had,
        "entries_after": left,
    }


def box(bench: Bench, pair: Pair | None) -> Values:
    """Connections per second that the machine still forwards at most (closed loop, 64 at once)."""
    with bench.loads.server(nice="0"):
        result = bench.loads.connections(
            snat=True,
            rate=0,
            warmup_s=bench.size.warmup_s,
            seconds=bench.size.seconds,
            seed=bench.seed("box"),
            parallel=64,
            nice="0",
        )
    values: Values = {"rate": result["completed"] / result["seconds"], "failed": result["failed"]}
    if pair is not None:
        ended = time.monotonic()
        values["behind_s"] = max(0.0, settled(pair, patience(200_000))[1] - ended)
    return values


def idle(bench: Bench, pair: Pair) -> Values:
    """Nothing happens."""
    settled(pair, 60)
    before = moment(pair)
    time.sleep(bench.size.idle_s)
    after = moment(pair)
    seconds = after.time - before.time
    return {
        "active_percent": (after.active_ns - before.active_ns) / 1e7 / seconds,
        "backup_percent": (after.backup_ns - before.backup_ns) / 1e7 / seconds,
        "bytes_per_s": (after.bytes - before.bytes) / seconds,
        "packets_per_s": (after.packets - before.packets) / seconds,
    }


# --- injected flows ---


def _add(bench: Bench, shape: str, count: int, *, name: str = "", first: int = 0, rate: float = 0) -> int:
    result = bench.loads.flows("add", shape, bench.seed(name or shape), count, first=first, rate=rate)
    if result["refused"] > count // 100:
        raise RuntimeError(f"the kernel refused {result['refused']} of {count} flows")
    return count - int(result["refused"])


def _delete(bench: Bench, shape: str, count: int, *, name: str = "", first: int = 0) -> int:
    result = bench.loads.flows("delete", shape, bench.seed(name or shape), count, first=first)
    return count - int(result["refused"])


def _missing(pair: Pair, expected: int) -> float:
    """Flows that the backup should know of and does not (or the other way round), after some seconds' grace."""
    deadline = time.monotonic() + CONVERGE_S
    while True:
        if pair.variant == "conntrackd-direct":
            missing = max(0, expected - entries(pair.stand.fw2))
        else:
            missing = abs(expected - pair.external())
        if not missing or time.monotonic() > deadline:
            return missing
        time.sleep(0.5)


def flood(bench: Bench, pair: Pair, shape: str) -> Values:
    """New flows as fast as the kernel takes them; memory before and after."""
    count = bench.size.flows
    already = entries(bench.stand.fw1)
    rss = [daemon.usage.rss() for daemon in (pair.active, pair.backup)]
    overruns = pair.overruns()
    values = worked(pair, lambda: _add(bench, shape, count), patience(count))
    grown = [daemon.usage.rss() for daemon in (pair.active, pair.backup)]
    expected = entries(bench.stand.fw1)
    return {
        **values,
        "active_rss": rss[0],
        "backup_rss": rss[1],
        "active_rss_per_flow": (grown[0] - rss[0]) / (expected - already),
        "backup_rss_per_flow": (grown[1] - rss[1]) / (expected - already),
        "missing": _missing(pair, expected),
        "overruns": pair.overruns() - overruns,
    }


def delete(bench: Bench, pair: Pair, shape: str) -> Values:
    """The flows of :func:`flood` deleted as fast as the kernel does it."""
    count = bench.size.flows
    values = worked(pair, lambda: _delete(bench, shape, count), patience(count))
    return {**values, "missing": _missing(pair, entries(bench.stand.fw1))}


def steady(bench: Bench, pair: Pair) -> Values:
    """New flows at a steady rate that leaves the machine time."""
    count = int(STEADY_RATE * bench.size.seconds)
    values = worked(pair, lambda: _add(bench, "transit", count, name="steady", rate=STEADY_RATE), patience(count))
    _delete(bench, "transit", count, name="steady")
    settled(pair, patience(count))
    return values


# --- commit, resync, take-over ---


def commit(bench: Bench, pair: Pair) -> Values:
    """The backup's external cache into its kernel: the time that ``-c`` takes.

    The active daemon has died, as at a take-over.  Here it must have: all namespaces share one kernel, and that builds
    an event for each new entry as long as anybody listens in any of them.
    """
    space = bench.stand.fw2
    flows = pair.external()
    space.conntrack("-F", check=False)
    settled(pair, patience(flows))
    pair.active.kill()
    before = pair.backup.usage.cpu_ns()
    began = time.monotonic()
    pair.backup.ask("-c")
    seconds = time.monotonic() - began
    # a daemon may say "done" early: what counts is when the entries are there
    wait_for(lambda: entries(space) >= flows * 0.99, f"{flows} entries after the commit", patience(flows))
    late = time.monotonic() - began
    time.sleep(QUIET_S)
    cpu = pair.backup.usage.cpu_ns() - before
    pair.active.start()
    pair.wait()
    settled(pair, patience(flows))
    return {
        "flows": flows,
        "ms_per_1000": (late if late > seconds + 0.1 else seconds) * 1e6 / flows,
        "seconds": late if late > seconds + 0.1 else seconds,
        "cpu_s": cpu / 1e9,
        "missing": flows - entries(space),
    }


def resync(bench: Bench, pair: Pair) -> Values:
    """The whole table to a backup whose external cache is empty, asked for by ``-f external`` and ``-n``."""
    flows = entries(bench.stand.fw1)
    before = moment(pair)
    pair.backup.forget_and_request()
    wait_for(lambda: moment(pair).bytes - before.bytes > flows, "the resync to begin", patience(flows))
    after, busy_at = settled(pair, patience(flows), link_only=True)
    return {
        "seconds": busy_at - before.time,
        "active_cpu_s": (after.active_ns - before.active_ns) / 1e9,
        "backup_cpu_s": (after.backup_ns - before.backup_ns) / 1e9,
        "cpu_s": (after.active_ns - before.active_ns + after.backup_ns - before.backup_ns) / 1e9,
        "bytes_per_flow": (after.bytes - before.bytes) / flows,
        "missing": _missing(pair, flows),
    }


def take_over(bench: Bench, pair: Pair) -> Values:
    """fw1's daemon dies, fw2 gets the virtual IPs; a real connection's next packet goes through it.

    ``inserted``: entries that fw2's kernel reported as new from then until the packet's answer was there.
    """
    assert isinstance(pair.backup, Ctsyncd)
    stand = bench.stand
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(stand.server.listen("192.168.1.3", 5001))
        with stand.client.inside():
            client = socket.socket()
        client = stack.enter_context(client)
        client.bind(("10.0.3.4", 0))
        client.settimeout(30)
        client.connect(("192.168.1.3", 5001))
        server = stack.enter_context(listener.accept()[0])
        server.settimeout(30)
        client.sendall(b"1")
        server.recv(1)
        settled(pair, patience(entries(stand.fw1)))
        table, present = pair.external(), entries(stand.fw2)
        events = stack.enter_context(_new_entries(stand))
        pair.active.kill()
        stand.hold(stand.fw1, False)
        stand.fw1.ip("link", "set", "eth2", "down")
        began = time.monotonic()
        stand.hold(stand.fw2, True)
        stand.route_through(2)
        client.sendall(b"2")
        if server.recv(1) != b"2":
            raise RuntimeError("the connection did not live through the take-over")
        seconds = time.monotonic() - began
        inserted = _count(events)
        wait_for(
            lambda: isinstance(pair.backup, Ctsyncd) and pair.backup.status().get("role") == "active",
            "fw2 to be active",
        )
        until_active = time.monotonic() - began
    stand.fw1.ip("link", "set", "eth2", "up")
    return {
        "table": table,
        "present": present,
        "inserted": inserted,
        "seconds": seconds,
        "until_active_s": until_active,
    }


def _new_entries(stand: Stand) -> socket.socket:
    """A ctnetlink socket that hears of new entries on fw2 (<linux/netfilter/nfnetlink_compat.h>: group 1)."""
    with stand.fw2.inside():
        listener = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
    listener.setsockopt(socket.SOL_SOCKET, 33, 256 << 20)  # SO_RCVBUFFORCE
    listener.bind((0, 1))
    listener.setblocking(False)
    return listener


def _count(listener: socket.socket) -> int:
    """Messages that wait; OSError with ENOBUFS if there were too many."""
    count = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            listener.recv(65536)
            count += 1
    return count


# --- latency ---


def latency(bench: Bench, pair: Pair, rate: float) -> Values:
    """From a new flow on fw1 until fw2's kernel has it, and until a datagram holds it; under load and without."""
    mean_ms = 10.0
    background = contextlib.ExitStack()
    count = int(rate * (bench.size.probes * mean_ms / 1000 + 1))
    with background:
        if rate:
            background.enter_context(
                bench.loads.flows_running("add", "transit", bench.seed("latency"), count, rate=rate)
            )
            time.sleep(0.5)
        result = bench.loads.latency(bench.size.probes, mean_ms, bench.seed("probes") + int(rate))
    settled(pair, patience(count))
    bench.stand.fw1.conntrack("-F", check=False)
    settled(pair, patience(count))
    values: Values = {}
    for where in ("wire",) if pair.variant == "conntrackd" else ("kernel",):
        times = result[f"{where}_us"]
        lost = sum(time_us < 0 for time_us in times)
        values[f"{where}_lost"] = lost
        for name, part in (("p50", 0.5), ("p99", 0.99), ("max", 1.0)):
            # what did not come in time took at least as long as it was waited for
            values[f"{where}_{name}_ms"] = (
                quantile([time_us if time_us >= 0 else PROBE_LOST_US for time_us in times], part) / 1000
            )
    return values


# --- growth ---


def growth(bench: Bench, pair: Pair, record: Callable[[str, Values], None], say: Callable[[str], None]) -> None:
    """Tables of growing size: memory, cost of filling, and cost of an event in a table of that size."""
    sizes = bench.size.growth + (bench.size.growth_first if bench.round == 0 else ())
    has = 0
    start = _grown(pair)
    record("growth-0", start)
    for size in sizes:
        say(f"{pair.variant}: {size} flows")
        values = worked(pair, lambda first=has, size=size: _fill(bench, pair, first, size), patience(size - has))
        has = size
        grown = _grown(pair)
        values.update(grown)
        values["missing"] = _missing(pair, entries(bench.stand.fw1))
        known = max(1.0, size - values["missing"])  # what a daemon lost takes no room
        values.update({f"{name}_per_flow": (grown[name] - start[name]) / known for name in grown})
        added = worked(pair, lambda: _add(bench, "transit", EVENT_PROBE, name="event"), patience(EVENT_PROBE))
        deleted = worked(pair, lambda: _delete(bench, "transit", EVENT_PROBE, name="event"), patience(EVENT_PROBE))
        for cost in ("active_us", "backup_us", "bytes"):
            values[f"event_{cost}"] = (added[cost] + deleted[cost]) / 2
        record(f"growth-{size}", values)
        if pair.variant in ("conntrackd", "ctsyncd-cache"):
            record(f"resync-{size}", resync(bench, pair))


def _fill(bench: Bench, pair: Pair, first: int, size: int) -> int:
    """Flows from number ``first`` up to a table of ``size``, in parts that every daemon can work off."""
    added = 0
    for at in range(first, size, FILL):
        added += _add(bench, "transit", min(FILL, size - at), name="growth", first=at)
        settled(pair, patience(FILL))
    return added


def commits(bench: Bench, pair: Pair, record: Callable[[str, Values], None], say: Callable[[str], None]) -> None:
    """Commits of growing size."""
    has = 0
    for size in bench.size.growth + (bench.size.growth_first if bench.round == 0 else ()):
        say(f"{pair.variant}: {size} flows")
        _fill(bench, pair, has, size)
        has = size
        record(f"commit-{size}", commit(bench, pair))
        bench.stand.fw2.conntrack("-F", check=False)
        settled(pair, patience(size))


def _grown(pair: Pair) -> Values:
    return {"active_rss": pair.active.usage.rss(), "backup_rss": pair.backup.usage.rss()}


# --- the order of things ---


class Session(NamedTuple):
    """A pair of daemons of a variant, started once, and what it is measured with."""

    variant: str
    steps: tuple[str, ...]


# In this order, and in the odd rounds the other way round: the same work follows each other closely on both daemons.
SESSIONS = (
    Session("conntrackd", ("idle", "real-200", "real-2000", "real-2000-snat", "real-2000-held", "steady")),
    Session("ctsyncd", ("idle", "real-200", "real-2000", "real-2000-snat", "real-2000-held", "steady")),
    Session("conntrackd-tuned", ("real-2000", "real-200")),
    Session("ctsyncd-cache", ("real-2000", "real-200")),
    Session("conntrackd", ("latency-idle", "latency-load")),
    Session("conntrackd-direct", ("real-2000", "latency-idle", "latency-load")),
    Session("ctsyncd", ("latency-idle", "latency-load")),
    Session("none", ("box",)),
    Session("listener", ("box",)),
    Session("conntrackd", ("box",)),
    Session("ctsyncd", ("box",)),
    Session("conntrackd", ("flood-transit", "delete", "flood-site", "flood-snat")),
    Session("ctsyncd", ("flood-transit", "delete", "flood-site", "flood-snat", "take-over")),
    Session("conntrackd-direct", ("flood-transit",)),
    Session("ctsyncd-cache", ("flood-transit", "delete", "flood-snat")),
    Session("conntrackd", ("growth",)),
    Session("ctsyncd-cache", ("growth",)),
    Session("ctsyncd", ("growth",)),
    Session("conntrackd", ("commit",)),
    Session("ctsyncd-cache", ("commit",)),
)
STEPS = tuple(dict.fromkeys(step for session in SESSIONS for step in session.steps))


def run_step(
    step: str, bench: Bench, pair: Pair | None, record: Callable[[str, Values], None], say: Callable[[str], None]
) -> None:
    """Measure one step and give what came out to ``record``."""
    if step == "box":
        record(step, box(bench, pair))
        return
    assert pair is not None
    if step in ("growth", "commit"):
        (growth if step == "growth" else commits)(bench, pair, record, say)
        return
    simple: dict[str, Callable[[], Values]] = {
        "idle": lambda: idle(bench, pair),
        "real-200": lambda: real(bench, pair, step, rate=200, snat=True),
        "real-2000": lambda: real(bench, pair, step, rate=2000, snat=False),
        "real-2000-snat": lambda: real(bench, pair, step, rate=2000, snat=True),
        "real-2000-held": lambda: real(bench, pair, step, rate=2000, snat=True, hold_ms=100),
        "steady": lambda: steady(bench, pair),
        "flood-transit": lambda: flood(bench, pair, "transit"),
        "flood-site": lambda: flood(bench, pair, "site"),
        "flood-snat": lambda: flood(bench, pair, "snat"),
        "delete": lambda: delete(bench, pair, "transit"),
        "take-over": lambda: take_over(bench, pair),
        "latency-idle": lambda: latency(bench, pair, 0),
        "latency-load": lambda: latency(bench, pair, STEADY_RATE),
    }
    record(step, simple[step]())


def sessions(only: tuple[str, ...], number: int) -> list[Session]:
    """What round ``number`` does, in its order; ``only``: no steps but these (all of them when empty)."""
    chosen = [
        Session(session.variant, tuple(step for step in session.steps if not only or step in only))
        for session in (SESSIONS if number % 2 == 0 else reversed(SESSIONS))
    ]
    return [session for session in chosen if session.steps]


def machine() -> dict[str, Any]:
    """What the run ran on."""
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ),
        os.uname().machine,
    )
    memory = int(Path("/proc/meminfo").read_text(encoding="ascii").split()[1]) // 1024
    return {"kernel": os.uname().release, "cpu": cpu, "cores": os.cpu_count(), "memory_mib": memory}


def disturbance(seconds: float = 2.0) -> float:
    """Share of the processors that other programs use while the benchmark does nothing (0 to 1)."""

    def ticks() -> tuple[int, int]:
        field = [int(word) for word in Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:9]]
        return sum(field), field[3] + field[4]

    before = ticks()
    time.sleep(seconds)
    after = ticks()
    return 1 - (after[1] - before[1]) / max(1, after[0] - before[0])


def entry_bytes() -> int | None:
    """Kernel memory of a conntrack entry without its extensions, from /proc/slabinfo; None if it is not there."""
    for line in Path("/proc/slabinfo").read_text(encoding="ascii").splitlines():
        if line.startswith("nf_conntrack "):
            return int(line.split()[3])
    return None
