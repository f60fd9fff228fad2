# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Run the fuzzer: ``python3 -m fuzz --help``; docs/fuzzing.md.

Batch N of a target depends on the seed alone: the same command finds the same inputs on any machine, with any number
of processes.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import random
import resource
import signal
import sys
import time
import traceback
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from types import FrameType
from typing import Any, Iterator, NamedTuple, Sequence

from .mutate import mutated
from .targets import TARGETS, Runner, Target, quiet

MEMORY_BYTES = 2 << 30  # address space of a process
BATCH_S = 60.0  # of processor time: a batch that takes longer hangs
COUNT_EVERY = 101  # of so many inputs, one has its work counted


class TooMuch(BaseException):
    """An input costs more than its target allows.  Not an Exception: no parser may swallow it."""


class Finding(NamedTuple):
    target: str
    inputs: tuple[bytes, ...]  # to one runner, one after the other; the last one fails
    error: str
    place: str


class Batch(NamedTuple):
    """What became of a batch.  ``work``: most lines that one of the counted inputs cost."""

    target: str
    inputs: int
    accepted: int
    work: int
    findings: tuple[Finding, ...]


def _place(error: BaseException) -> str:
    """Where an error was raised, for telling findings apart."""
    frames = traceback.extract_tb(error.__traceback__)
    inner = [frame for frame in frames if "module_utils" in frame.filename] or list(frames)
    return f"{type(error).__name__} {Path(inner[-1].filename).name}:{inner[-1].lineno}"


def counted(run: Runner, data: bytes, limit: int) -> tuple[bool, int]:
    """Run and count the lines executed; TooMuch beyond ``limit``."""
    lines = 0

    def trace(_frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal lines
        if event == "line":
            lines += 1
            if lines > limit:
                raise TooMuch(f"more than {limit} lines for {len(data)} bytes")
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        return run(data), lines
    finally:
        sys.settrace(before)


def _limit(target: Target, data: bytes) -> int:
    return target.work[0] + target.work[1] * len(data)


def _hang(_number: int, _frame: FrameType | None) -> None:
    raise TooMuch(f"a batch took more than {BATCH_S} s of processor time")


def run_batch(name: str, seed: int, number: int, count: int = 0) -> Batch:
    """Batch ``number`` of a target, at most ``count`` inputs of it.  After a failure a fresh runner goes on."""
    target = TARGETS[name]
    rng = random.Random(f"{seed}:{name}:{number}")
    grammar = target.grammar()
    run, history = target.fresh(), []
    accepted = work = 0
    findings: list[Finding] = []
    total = count or target.batch
    signal.signal(signal.SIGVTALRM, _hang)
    signal.setitimer(signal.ITIMER_VIRTUAL, BATCH_S)
    try:
        for index in range(total):
            data = mutated(rng, grammar)
            history.append(data)
            try:
                if (index + number) % COUNT_EVERY == 0:
                    good, lines = counted(run, data, _limit(target, data))
                    work = max(work, lines)
                else:
                    good = run(data)
                accepted += good
            except (Exception, TooMuch) as error:  # noqa: BLE001  whatever it is, it is a finding
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
                findings.append(
                    Finding(
                        name,
                        tuple(history),
                        "".join(traceback.format_exception(type(error), error, error.__traceback__)),
                        _place(error),
                    )
                )
                run, history = target.fresh(), []
                signal.setitimer(signal.ITIMER_VIRTUAL, BATCH_S)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    return Batch(name, total, accepted, work, tuple(findings))


# --- what was found ---


def _fails(finding: Finding, inputs: Sequence[bytes]) -> bool:
    target = TARGETS[finding.target]
    run = target.fresh()
    try:
        for data in inputs[:-1]:
            run(data)
        counted(run, inputs[-1], _limit(target, inputs[-1]))
    except (Exception, TooMuch) as error:  # noqa: BLE001  it is compared
        return _place(error) == finding.place
    return False


def minimised(finding: Finding) -> Finding:
    """The same failure with fewer inputs before it and with a shorter last one, as far as simple cuts get."""
    inputs = list(finding.inputs)
    step = len(inputs) - 1
    while step > 0:
        at = 0
        while at < len(inputs) - 1:
            fewer = inputs[:at] + inputs[min(at + step, len(inputs) - 1) :]
            if _fails(finding, fewer):
                inputs = fewer
            else:
                at += step
        step //= 2
    step = len(inputs[-1]) // 2
    tries = 400
    while step > 0 and tries > 0:
        at = 0
        while at < len(inputs[-1]) and tries > 0:
            tries -= 1
            shorter = [*inputs[:-1], inputs[-1][:at] + inputs[-1][at + step :]]
            if _fails(finding, shorter):
                inputs = shorter
            else:
                at += step
        step //= 2
    return finding._replace(inputs=tuple(inputs))


def report(finding: Finding, folder: Path) -> str:
    """Write the finding to a file; returns a regression test."""
    folder.mkdir(parents=True, exist_ok=True)
    inputs = [data.hex() for data in finding.inputs]
    digest = hashlib.sha256("".join(inputs).encode()).hexdigest()[:8]
    content = {"target": finding.target, "error": finding.error, "inputs": inputs}
    (folder / f"{finding.target}-{digest}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    lines = "".join(f'        "{text}",\n' for text in inputs)
    name = finding.target.replace("-", "_")
    return (
        f"# {finding.place}\ndef test_{name}_{digest}() -> None:\n    targets.replay(\n"
        f'        "{finding.target}",\n{lines}    )\n'
    )


# --- many ---


def plan(names: Sequence[str], inputs: int | None) -> Iterator[tuple[str, int, int]]:
    """Target, number and size of batches: to ``inputs`` altogether by the targets' shares, or without end."""
    shares = sum(TARGETS[name].share for name in names)
    left = {name: inputs * TARGETS[name].share // shares if inputs is not None else None for name in names}
    done = dict.fromkeys(names, 0)
    number = dict.fromkeys(names, 0)
    while True:
        # the target that is furthest behind its share
        open_names = [name for name in names if left[name] is None or done[name] < (left[name] or 0)]
        if not open_names:
            return
        name = min(open_names, key=lambda one: done[one] / TARGETS[one].share)
        limit = left[name]
        size = TARGETS[name].batch if limit is None else min(TARGETS[name].batch, limit - done[name])
        yield name, number[name], size
        done[name] += size
        number[name] += 1


def _work(job: tuple[str, int, int, int]) -> Batch:
    name, seed, number, size = job
    return run_batch(name, seed, number, size)


def _start() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    quiet()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m fuzz", description="Fuzz the parsers of foreign bytes.")
    parser.add_argument("--seconds", type=float, help="stop after this time")
    parser.add_argument("--inputs", type=int, help="stop after so many inputs (default: 200000, or no limit)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--targets", default=",".join(TARGETS), help="some of: %(default)s")
    parser.add_argument("--failures", type=Path, default=Path("tests/output/fuzz"), help="folder for failing inputs")
    options = parser.parse_args(argv)
    names = options.targets.split(",")
    unknown = [name for name in names if name not in TARGETS]
    if unknown:
        parser.error(f"no such target: {', '.join(unknown)}")
    inputs = options.inputs if options.inputs is not None or options.seconds is not None else 200_000
    began = told = time.monotonic()
    totals = {name: [0, 0, 0] for name in names}
    found: dict[tuple[str, str], Finding] = {}
    failing = 0
    deadline = began + options.seconds if options.seconds is not None else float("inf")
    jobs = ((name, options.seed, number, size) for name, number, size in plan(names, inputs))
    quiet()
    with ProcessPoolExecutor(options.jobs, initializer=_start) as pool:
        waiting = {pool.submit(_work, job) for job in itertools.islice(jobs, 3 * options.jobs)}
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for batch in [future.result() for future in done]:
                total = totals[batch.target]
                total[0] += batch.inputs
                total[1] += batch.accepted
                total[2] = max(total[2], batch.work)
                failing += len(batch.findings)
                for finding in batch.findings:
                    key = (finding.target, finding.place)
                    if key not in found:
                        print(f"{finding.target}: {finding.place}", flush=True)
                    if key not in found or sum(map(len, finding.inputs)) < sum(map(len, found[key].inputs)):
                        found[key] = finding
            if time.monotonic() < deadline:
                waiting |= {pool.submit(_work, job) for job in itertools.islice(jobs, len(done))}
            if time.monotonic() > told + 60:
                told = time.monotonic()
                sofar = sum(total[0] for total in totals.values())
                print(f"{told - began:7.0f} s  {sofar} inputs, {len(found)} findings", flush=True)
    took = time.monotonic() - began
    everything = sum(total[0] for total in totals.values())
    print(f"{'target':<16} {'inputs':>10} {'accepted':>10} {'most lines':>10}")
    for name, (count, accepted, work) in totals.items():
        print(f"{name:<16} {count:>10} {accepted:>10} {work:>10}")
    print(f"{everything} inputs, seed {options.seed}, {took:.0f} s, {everything / took:.0f}/s, {failing} failing")
    for finding in found.values():
        smaller = minimised(finding)
        print(f"\n{smaller.error}\n{report(smaller, options.failures)}")
    print(f"{len(found)} findings" + (f", written to {options.failures}" if found else ""))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
