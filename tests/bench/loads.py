# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The loads: small C programs, compiled when the benchmark starts, so that they are never the bottleneck."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any, Callable, Iterator

from integration.netns import Namespace

from . import topology
from .topology import Stand

SOURCES = Path(__file__).resolve().parent / "load"
PROGRAMS = ("connections", "flows", "latency", "listener")
FIRST = "-20"  # nice value of loads that stand for other machines: the daemons cannot slow them down


class NoCompiler(Exception):
    """There is no C compiler."""


def compile_all(folder: Path) -> None:
    """Compile the programs into ``folder``; NoCompiler names the remedy."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise NoCompiler("the loads are C programs and there is no C compiler: apt-get install gcc libc6-dev")
    for name in PROGRAMS:
        done = subprocess.run(
            [compiler, "-O2", "-Wall", "-Wextra", "-o", str(folder / name), str(SOURCES / f"{name}.c"), "-lm"],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{name}.c does not compile: {done.stderr}")


class Loads:
    """The compiled programs at work in the namespaces."""

    def __init__(self, stand: Stand, folder: Path) -> None:
        self.stand = stand
        self.folder = folder

    def flows(
        self, operation: str, shape: str, seed: int, count: int, *, first: int = 0, rate: float = 0
    ) -> dict[str, Any]:
        """Add or delete flows on fw1 (see flows.c); rate 0 is as fast as the kernel goes."""
        with self.flows_running(operation, shape, seed, count, first=first, rate=rate) as result:
            pass
        return result()

    @contextlib.contextmanager
    def flows_running(
        self, operation: str, shape: str, seed: int, count: int, *, first: int = 0, rate: float = 0
    ) -> Iterator[Callable[[], dict[str, Any]]]:
        """The same beside other work; at the end it is waited for."""
        process = self._start(self.stand.fw1, FIRST, "flows", operation, shape, seed, first, count, rate)
        answer: dict[str, Any] = {}
        try:
            yield lambda: answer
            answer.update(_answer(process, operation))
        finally:
            _end(process)

    def server(self, nice: str = FIRST) -> contextlib.AbstractContextManager[None]:
        """The server of the real connections."""
        return self._running(self.stand.server, nice, "connections", "serve", *topology.PORTS)

    def listener(self) -> contextlib.AbstractContextManager[None]:
        """On fw1: somebody who listens to conntrack events and takes none (see listener.c)."""
        return self._running(self.stand.fw1, "0", "listener")

    @contextlib.contextmanager
    def _running(self, space: Namespace, nice: str, program: str, *argv: object) -> Iterator[None]:
        process = self._start(space, nice, program, *argv)
        try:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise RuntimeError(f"{program} did not start in {space.label}")
            yield
        finally:
            _end(process)

    def connections(
        self,
        *,
        snat: bool,
        rate: float,
        warmup_s: float,
        seconds: float,
        seed: int,
        parallel: int = 0,
        hold_ms: float = 0,
        nice: str = FIRST,
        at: Callable[[], None] = lambda: None,
    ) -> dict[str, Any]:
        """Real connections through fw1 (see connections.c); ``at`` is called when the measured time begins."""
        process = self._start(
            self.stand.client,
            nice,
            *("connections", "open", topology.SNAT_CLIENTS if snat else topology.PLAIN_CLIENTS, topology.SERVERS),
            *(rate, parallel, hold_ms, warmup_s, seconds, seed, *topology.PORTS),
        )
        try:
            assert process.stdout is not None
            if process.stdout.readline() != "begin\n":
                raise RuntimeError("the real connections did not begin")
            at()
            return _answer(process, "connections")
        finally:
            _end(process)

    def latency(self, count: int, mean_ms: float, seed: int) -> dict[str, list[float]]:
        """Probe flows on fw1 (see latency.c)."""
        process = subprocess.Popen(
            [
                str(self.folder / "latency"),
                *(f"/run/netns/{space.name}" for space in (self.stand.fw1, self.stand.fw2)),
                *("eth2", str(count), str(mean_ms), str(seed)),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            return _answer(process, "latency")
        finally:
            _end(process)

    def _start(self, space: Namespace, nice: str, program: str, *argv: object) -> subprocess.Popen[str]:
        process: subprocess.Popen[str] = space.popen(
            *("nice", "-n", nice, str(self.folder / program), *map(str, argv)), stdout=subprocess.PIPE, text=True
        )
        return process


def _answer(process: subprocess.Popen[str], what: str) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if process.wait() or not line:
        raise RuntimeError(f"the load failed: {what}: {line}")
    answer: dict[str, Any] = json.loads(line)
    return answer


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
