# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The first faults of a plan, and the negative control: ``make soak`` works, and sees a loss when there is one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from soak.__main__ import main

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(shutil.which("keepalived") is None, reason="needs keepalived"),
]

SEED = "58"
STEPS = 3


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / f"soak-{SEED}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.long
def test_the_first_faults_of_a_plan(tmp_path: Path) -> None:
    """In the end the active node goes while the backup knows nothing, which loses every session, and is seen."""
    status = main(["--seed", SEED, "--steps", str(STEPS), "--sessions", "60", "--output", str(tmp_path)])
    told = records(tmp_path)
    assert (status, [r["complaints"] for r in told if r.get("complaints")]) == (0, [])
    assert [record["what"] for record in told] == ["begin", *["step"] * STEPS, "end", "cost"]
    assert "passed" in (tmp_path / f"soak-{SEED}.md").read_text(encoding="utf-8")


@pytest.mark.long
def test_without_replication_a_power_cut_is_seen_to_lose_every_session(tmp_path: Path) -> None:
    assert main(["--seed", SEED, "--control", "--sessions", "60", "--output", str(tmp_path)]) == 0
    assert records(tmp_path)[-1]["lost"] == 60 + 8
