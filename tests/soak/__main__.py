# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Random faults on a pair under traffic, from a seed (docs/soak.md)."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Iterator, NoReturn, Sequence

from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.client import ControlError

from . import faults, judge, plan, report
from .stand import Stand, stand

CHECKOUT = Path(__file__).resolve().parents[2]
TOOLS = ("ip", "iptables", "ip6tables", "conntrack", "keepalived", "mount")
SESSIONS = 200
MOST = 10  # complaints of a kind in a record
LONGEST_PLAN = 10_000  # steps
CONTROL_S = 3.0  # patience with sessions that are expected to be dead


class Run:
    """One run; ``records`` are its JSON lines."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.records: list[dict[str, Any]] = []
        self.samples: list[judge.Sample] = []
        self._began = time.monotonic()
        self._folder: Path = options.output
        self._folder.mkdir(parents=True, exist_ok=True)
        self._path = self._folder / f"soak-{options.seed}.jsonl"
        self._path.write_text("", encoding="utf-8")
        self._told: set[str] = set()  # what is wrong in the logs, reported once

    # --- recording ---------------------------------------------------------------------------------------------------

    def at(self) -> float:
        return time.monotonic() - self._began

    def say(self, text: str) -> None:
        print(f"{self.at():8.1f}  {text}", flush=True)

    def record(self, what: str, **values: Any) -> None:
        line = {"what": what, "at_s": round(self.at(), 1), **values}
        self.records.append(line)
        with open(self._path, "a", encoding="utf-8") as out:
            out.write(json.dumps(line) + "\n")

    def keep_logs(self, here: Stand, number: int) -> None:
        """What a failure leaves for the one who looks into it."""
        for daemon in here.daemons:
            name = f"soak-{self.options.seed}-{number}-{daemon.space.label}"
            with contextlib.suppress(OSError):
                (self._folder / f"{name}.log").write_text(daemon.log(), encoding="utf-8")
                (self._folder / f"{name}-keepalived.log").write_text(here.nodes[daemon].log(), encoding="utf-8")

    # --- running -----------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """The plan, as far as there is time; the exit status."""
        options = self.options
        self.record(
            "begin",
            **{"seed": options.seed, "minutes": options.minutes, "sessions": options.sessions, "commit": _commit()},
            **{"kernel": platform.release(), "python": platform.python_version()},
        )
        steps = _chosen(options)
        with tempfile.TemporaryDirectory(prefix="ctsync-s-") as folder:
            for life in itertools.count():
                try:
                    with stand(Path(folder, str(life)), options.seed, options.sessions) as here:
                        if self._live(here, steps):
                            self._end(here)
                            break
                except (AssertionError, OSError, ControlError) as error:
                    self.record("end", complaints=[f"no pair could be built: {error}"])
                    break
                if not self._time_left():
                    self.record("end", complaints=["the last fault left nothing to judge"])
                    break
        self._cost()
        return self._conclude(judge.verdict(self.records))

    def _time_left(self) -> bool:
        return self.at() < self.options.minutes * 60

    def _live(self, here: Stand, steps: Iterator[plan.Step]) -> bool:
        """Faults on one pair; False where it is not fit for more."""
        self.say(f"the pair is READY, {here.sessions} sessions stand")
        while self._time_left():
            step = next(steps, None)
            if step is None:
                break
            if not self._step(here, step):
                return False
        return True

    def _step(self, here: Stand, step: plan.Step) -> bool:
        """One fault; False if something was wrong: the next one gets a new pair."""
        self.say(str(step))
        began = self.at()
        complaints: list[str] = []
        try:
            here.weather(**step.link_values)
            active, backup = here.ready("both nodes to be READY before the fault")
            scene = faults.Scene(here, active, backup, step.values, f"{self.options.seed}.{step.number}")
            complaints += faults.ACTS[step.fault](scene) or []
            active, backup = here.ready("both nodes to be READY after the fault")
            took = self.at() - began
            here.weather()
            complaints += here.lost() + here.equal(active, backup) + here.verified(backup)
        except (AssertionError, OSError, ControlError, subprocess.SubprocessError) as error:
            took = self.at() - began
            complaints.append(str(error))
        complaints += here.dead() + self._new_in_logs(here)
        now = self.at()
        with contextlib.suppress(OSError, StopIteration, AssertionError):  # of a process that is not there
            self.samples += [here.sample(daemon, now) for daemon in here.daemons]
        self.record(
            "step",
            **{**step._asdict(), "took_s": round(took, 1), "equal_s": here.equal_s, "relay": here.relay_counters},
            slow=here.slow,
            samples=[sample._asdict() for sample in self.samples[-2:]],
            complaints=complaints[:MOST],
        )
        for complaint in complaints[:MOST]:
            self.say(f"  WRONG: {complaint}")
        if complaints:
            self.keep_logs(here, step.number)
            return False
        time.sleep(step.rest_s)
        return True

    def _new_in_logs(self, here: Stand) -> list[str]:
        found = [
            f"ctsyncd on {daemon.space.label} logged: {line}"
            for daemon in here.daemons
            for line in judge.log_complaints(daemon.log())
        ]
        new = [line for line in found if line not in self._told]
        self._told.update(new)
        return new

    def _end(self, here: Stand) -> None:
        """The final judgement, and the negative control."""
        complaints: list[str] = []
        try:
            active, backup = here.ready("both nodes to be READY in the end")
            self.samples += [here.sample(daemon, self.at()) for daemon in here.daemons]
            complaints += here.lost() + here.equal(active, backup)
            complaints += here.verified(active) + here.verified(backup)
            lives = judge.growth(self.samples)
            complaints += [f"ctsyncd on {life.node}: {complaint}" for life in lives for complaint in life.complaints]
            self.say("the active node goes while the backup knows nothing: every session has to be seen to die")
            complaints += faults.unready_take_over(here)
        except (AssertionError, OSError, ControlError) as error:
            complaints.append(str(error))
            self.keep_logs(here, 0)
        self.record("end", complaints=complaints[: 2 * MOST])

    def control(self) -> int:
        """Replication is off: the first power cut has to be seen to lose every session."""
        step = next(step for step in plan.steps(self.options.seed, 60) if step.fault == plan.FAULTS[0].name)
        self.record("begin", seed=self.options.seed, control=True, commit=_commit())
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ctsync-s-"))
            options = self.options
            here = stack.enter_context(stand(Path(folder, "0"), options.seed, options.sessions, replicate=False))
            self.say(f"replication is off, {here.sessions} sessions stand")
            self.say(str(step))
            here.deadline_s = CONTROL_S
            scene = faults.Scene(here, *here.daemons, {**step.values, "dark_s": 0}, "control")
            lost = [line for line in faults.ACTS[step.fault](scene) or [] if line.startswith("session ")]
            sessions = here.sessions
        bad = [] if len(lost) == sessions else [f"{len(lost)} of {sessions} sessions were seen to be lost, not all"]
        self.say(f"{len(lost)} of {sessions} sessions were lost, as they should be")
        self.record("end", lost=len(lost), complaints=bad)
        return self._conclude(bad)

    def _cost(self) -> None:
        """Processor time of everything that the run started, by now all ended."""
        times = os.times()
        used = times.user + times.system + times.children_user + times.children_system
        self.record("cost", cpu_s=round(used, 1), cores=round(used / self.at(), 3))

    def _conclude(self, bad: list[str]) -> int:
        (self._folder / f"soak-{self.options.seed}.md").write_text(report.markdown(self.records), encoding="utf-8")
        print(f"\nseed {self.options.seed}, {self.at() / 60:.1f} minutes: {'FAILED' if bad else 'passed'}")
        for complaint in bad:
            print(f"  {complaint}")
        print(f"Record: {self._path}, and as a table: {self._path.with_suffix('.md')}")
        return 1 if bad else 0


def _chosen(options: argparse.Namespace) -> Iterator[plan.Step]:
    """The plan's steps, without those that the options leave out."""
    steps: Iterator[plan.Step] = plan.steps(options.seed, options.minutes)
    steps = itertools.islice(steps, options.first - 1, LONGEST_PLAN)
    if options.only:
        steps = (step for step in steps if step.fault in options.only)
    return itertools.islice(steps, options.steps or None)


def _commit() -> str:
    done = subprocess.run(
        ["git", "-C", str(CHECKOUT), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def _stop(_number: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _fault(name: str) -> str:
    if name not in plan.BY_NAME:
        raise argparse.ArgumentTypeError(f"{name!r} is none of: {', '.join(plan.BY_NAME)}")
    return name


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m soak", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="what the plan is made from (%(default)s)")
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (%(default)s)")
    parser.add_argument("--sessions", type=int, default=SESSIONS, help="besides those with DNAT (%(default)s)")
    parser.add_argument("--plan", action="store_true", help="print the plan of about so many minutes, and end")
    parser.add_argument("--control", action="store_true", help="replication off: a power cut must lose every session")
    parser.add_argument("--first", type=int, default=1, metavar="STEP", help="begin with this step of the plan")
    parser.add_argument("--steps", type=int, default=0, metavar="COUNT", help="end after so many")
    parser.add_argument("--only", type=_fault, action="append", metavar="FAULT", help="only this fault's steps")
    parser.add_argument("--output", type=Path, default=CHECKOUT / "reports" / "soak", help="folder (%(default)s)")
    options = parser.parse_args(argv)
    if options.minutes <= 0 or options.first < 1 or options.sessions < 20:
        parser.error("--minutes must be more than 0, --first at least 1, --sessions at least 20")
    if options.plan:
        count = options.steps or round(options.minutes * 60 / plan.NOMINAL_STEP_S)
        for step in itertools.islice(_chosen(options), count):
            print(step)
        return 0
    if os.geteuid():
        parser.error("this makes network namespaces: run it as root")
    missing = [tool for tool in TOOLS if not shutil.which(tool)]
    if missing:
        parser.error(f"not installed: {', '.join(missing)}")
    before = signal.signal(signal.SIGTERM, _stop)
    run = Run(options)
    try:
        return run.control() if options.control else run.run()
    except KeyboardInterrupt:
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
