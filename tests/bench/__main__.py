# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""``python3 -m bench``: run the benchmark and write its report, see docs/performance.md.  Root only."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NoReturn, Sequence

from . import daemons, loads, report, results, scenarios, topology
from .goals import ROWS

QUIET = 0.1  # share of the processors that others may use before the numbers are called rough
CHECKOUT = Path(__file__).resolve().parents[2]


def _others() -> list[str]:
    """Daemons that run already: another listener to conntrack events makes every event dearer, in all namespaces."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            name = (process / "comm").read_text(encoding="utf-8").strip()
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:
            continue
        if name == "conntrackd" or "ctsyncd.pyz" in command or "/ctsyncd " in f"{command} ":
            found.append(f"{process.name} ({command})")
    return found


def _say(text: str) -> None:
    print(f"{datetime.datetime.now():%H:%M:%S}  {text}", flush=True)


def _versions(checkout: Path, built: str) -> dict[str, Any]:
    def first_line(*argv: str) -> str:
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        return (done.stdout or done.stderr).strip().splitlines()[0] if done.stdout or done.stderr else "unknown"

    changed = subprocess.run(
        ["git", "-C", str(checkout), "status", "--porcelain", "plugins"], capture_output=True, text=True, check=False
    ).stdout
    commit = first_line("git", "-C", str(checkout), "rev-parse", "--short", "HEAD")
    return {
        "ctsyncd": built,
        "commit": commit + (" with local changes" if changed else ""),
        "python": first_line(daemons.PYTHON, "-V"),
        "conntrackd": first_line("dpkg-query", "-W", "-f", "conntrackd ${Version}", "conntrackd"),
    }


def _summary(samples: Sequence[results.Sample]) -> str:
    lines = []
    for o in results.evaluate(ROWS, samples):
        verdict = "" if o.must_met is None else "met" if o.must_met else "MISSED"
        theirs = report.number(o.theirs) if o.theirs is not None else "-"
        must = report.fraction(o.row.must, o.row.above) if o.row.theirs or o.row.must is None else f"≤ {o.row.must:g}"
        aim = "" if o.aim_met is None else "aim reached" if o.aim_met else ""
        lines.append(
            f"{o.row.name:<24} {report.number(o.ours):>9} {theirs:>9} {o.row.unit:<15} {report.number(o.median):>8}"
            f"  [{report.number(o.low)} … {report.number(o.high)}]  {must:<8} {verdict} {aim}".rstrip()
        )
    return "\n".join(lines)


class Run:
    """One run of the benchmark."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.size: scenarios.Size = scenarios.SIZES[options.size]
        if options.rounds:
            self.size = self.size._replace(rounds=options.rounds)
        self.samples: list[results.Sample] = []
        self.failures: list[str] = []
        self.about: dict[str, Any] = {}
        self._began = time.monotonic()

    def run(self) -> int:
        """Measure; 0, or 1 if a step failed."""
        with tempfile.TemporaryDirectory(prefix="ctsync-b-") as folder:
            home = Path(folder)
            loads.compile_all(home)
            application = home / "ctsyncd.pyz"
            built = daemons.build(self.options.checkout, application)
            self.about = {
                **scenarios.machine(),
                **_versions(self.options.checkout, built),
                "mode": self.options.size,
                "rounds": self.size.rounds,
                "date": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}",
                "disturbance": [],
                "other_listeners": len(_others()),
            }
            _say(f"{built}; {self.about['conntrackd']}")
            with topology.stand() as stand:
                for number in range(self.size.rounds):
                    self._round(stand, home, application, number)
                    self.write()
        _say(f"{len(self.failures)} failures" + "".join(f"\n  {failure}" for failure in self.failures))
        print(_summary(self.samples))
        if not self.options.steps and not self.options.variants:
            print(report.unmeasured(results.evaluate(ROWS, self.samples)))
        print(f"Report: {self.options.output / 'performance.md'}")
        return 1 if self.failures else 0

    def _most_flows(self, session: scenarios.Session, number: int) -> int:
        """How large the table gets in a session."""
        if not {"growth", "commit"} & set(session.steps):
            return max(2 * self.size.flows, 250_000)
        return max(*self.size.growth, *(self.size.growth_first if number == 0 else ()), 250_000)

    def _round(self, stand: topology.Stand, home: Path, application: Path, number: int) -> None:
        stand.reset()
        self.about["disturbance"].append(scenarios.disturbance())
        if self.about["disturbance"][-1] > QUIET:
            _say(f"warning: other programs use {self.about['disturbance'][-1]:.0%} of the processors: rough numbers")
        bench = scenarios.Bench(stand, loads.Loads(stand, home), self.size, number)
        for session in scenarios.sessions(self.options.steps, number):
            if self.options.variants and session.variant not in self.options.variants:
                continue
            flows = self._most_flows(session, number)
            try:
                with topology.table_room(flows):
                    if session.variant in daemons.WITHOUT:
                        stand.reset()
                        stand.hold(stand.fw1, True)  # translated connections are answered there
                        with bench.loads.listener() if session.variant == "listener" else contextlib.nullcontext():
                            self._steps(session, bench, None)
                        stand.reset()
                    else:
                        with daemons.pair(stand, session.variant, home / "run", application, flows) as pair:
                            self._steps(session, bench, pair)
            except (RuntimeError, TimeoutError, AssertionError, OSError) as error:
                self.failures.append(f"round {number + 1}, {session.variant}: {error}")
                _say(self.failures[-1])

    def _steps(self, session: scenarios.Session, bench: scenarios.Bench, pair: daemons.Pair | None) -> None:
        for step in session.steps:
            _say(f"round {bench.round + 1}/{self.size.rounds}  {session.variant:<18} {step}")

            def record(name: str, values: dict[str, float]) -> None:
                self.samples.append(results.Sample(name, session.variant, bench.round, values))
                if self.options.verbose:
                    print(
                        "   " + ", ".join(f"{key} {report.number(value)}" for key, value in values.items()), flush=True
                    )

            scenarios.run_step(step, bench, pair, record, _say)

    def write(self) -> None:
        """The result so far."""
        self.about["minutes"] = (time.monotonic() - self._began) / 60
        self.about["entry_bytes"] = scenarios.entry_bytes()
        document = {
            "about": self.about,
            "failures": self.failures,
            "rows": results.as_json(results.evaluate(ROWS, self.samples)),
            "samples": [sample._asdict() for sample in self.samples],
        }
        write_report(document, self.options.output)


def write_report(document: dict[str, Any], folder: Path) -> None:
    """``performance.md`` and ``performance/`` in ``folder``."""
    result = report.Result.parse(document)
    plots = folder / "performance"
    plots.mkdir(parents=True, exist_ok=True)
    (plots / "result.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    for old in plots.glob("*.svg"):
        old.unlink()
    for name, text in report.plots(result).items():
        (plots / name).write_text(text, encoding="utf-8")
    (folder / "performance.md").write_text(report.markdown(result), encoding="utf-8")


def _words(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.split(",")))


def _stop(_number: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m bench", description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=scenarios.SIZES, default="default")
    parser.add_argument("--rounds", type=int, default=0, help="instead of the size's own number")
    parser.add_argument("--steps", type=_words, default=(), help=f"only some of: {','.join(scenarios.STEPS)}")
    parser.add_argument("--variants", type=_words, default=(), help=f"only some of: {','.join(daemons.VARIANTS)}")
    parser.add_argument("--checkout", type=Path, default=CHECKOUT, help="whose ctsyncd (default: this one)")
    parser.add_argument("--output", type=Path, default=CHECKOUT / "reports" / "bench", help="folder (%(default)s)")
    parser.add_argument("--render", type=Path, metavar="RESULT.json", help="no run: the report of an earlier one")
    parser.add_argument("--verbose", action="store_true", help="print every number at once")
    options = parser.parse_args(argv)
    for given, known in ((options.steps, scenarios.STEPS), (options.variants, daemons.VARIANTS)):
        unknown = [word for word in given if word not in known]
        if unknown:
            parser.error(f"unknown: {', '.join(unknown)} (there are: {', '.join(known)})")
    if options.render:
        write_report(json.loads(options.render.read_text(encoding="utf-8")), options.output)
        return 0
    if os.geteuid():
        parser.error("this makes network namespaces: run it as root")
    others = _others()
    if others:
        _say(f"warning: these listen to conntrack events, too, and make every event dearer: {', '.join(others)}")
    signal.signal(signal.SIGTERM, _stop)
    try:
        return Run(options).run()
    except loads.NoCompiler as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
