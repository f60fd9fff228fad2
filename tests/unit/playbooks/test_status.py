# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The playbook status when no node can be reached; the paths with nodes that answer are in molecule/three."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[3]
PROGRAM = pathlib.Path(sys.executable).with_name("ansible-playbook")


def play(folder, *options):
    """Run it for two hosts that cannot be reached; (exit status, what it said)."""
    hosts = {name: {"ansible_connection": "ssh", "ansible_host": "192.0.2.1"} for name in ("fw1", "fw2")}
    inventory = folder / "hosts.json"
    inventory.write_text(json.dumps({"all": {"children": {"firewalls": {"hosts": hosts}}}}))
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_TIMEOUT": "1", "NO_COLOR": "1"}
    command = [str(PROGRAM), "-i", str(inventory), str(ROOT / "playbooks/status.yml"), *options]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode, " ".join((done.stdout + done.stderr).split())


@pytest.mark.parametrize("mode", [(), ("--check",)])
@pytest.mark.parametrize(("variables", "fails"), [((), True), (("-e", "status_fail=false"), False)])
def test_a_pair_that_cannot_be_asked_is_told_of_and_fails_unless_that_is_not_wanted(tmp_path, variables, fails, mode):
    status, said = play(tmp_path, *variables, *mode)
    assert "fw1" in said and "fw2" in said and "Show the pair" in said
    assert "NOT READY - a failure now would lose sessions or be an outage" in said
    assert ("The pair is NOT READY: " in said) == fails
    assert (status != 0) == fails
