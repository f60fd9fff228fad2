# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""No choice of tags leaves out a safety step; where it could, the playbook refuses."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[3]
PROGRAM = pathlib.Path(sys.executable).with_name("ansible-playbook")
TAGS = ("kernel", "ctsyncd", "ruleset", "keepalived")
ALWAYS = (
    "Look at what this node runs",  # the preflight
    "Refuse a pair that cannot work",
    "Sort the nodes, those that are not active first",
    "Stop conntrackd, for good",
    "Leave the active node alone while the other cannot take over",
    "Stop here while no other node can take over",  # of the migration
    "Show the pair",
)


def play(folder, name, *options):
    """Run a playbook for two hosts that cannot be reached; (exit status, what it said)."""
    hosts = {name: {"ansible_connection": "ssh", "ansible_host": "192.0.2.1"} for name in ("fw1", "fw2")}
    inventory = folder / "hosts.json"
    inventory.write_text(json.dumps({"all": {"children": {"firewalls": {"hosts": hosts}}}}))
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_TIMEOUT": "1", "NO_COLOR": "1"}
    command = [str(PROGRAM), "-i", str(inventory), str(ROOT / name), *options]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode, " ".join((done.stdout + done.stderr).split())


@pytest.mark.parametrize("name", ["status", "switchover", "upgrade", "rotate_key"])
def test_a_procedure_refuses_to_be_run_in_part_before_it_asks_anybody(name, tmp_path):
    status, said = play(tmp_path, f"playbooks/{name}.yml", "--tags", "ruleset")
    assert status != 0
    assert "This playbook is one procedure and has no tags" in said
    assert "UNREACHABLE" not in said


def test_a_tag_of_an_import_chooses_the_whole(tmp_path):
    """The control: then the procedure begins, and asks."""
    mine = tmp_path / "mine.yml"
    mine.write_text(
        json.dumps([{"ansible.builtin.import_playbook": str(ROOT / "playbooks/switchover.yml"), "tags": ["over"]}])
    )
    status, said = play(tmp_path, mine, "--tags", "over")
    assert status != 0
    assert "This playbook is one procedure" not in said
    assert "TASK [Ask this node]" in said


@pytest.mark.parametrize("choice", [("--tags", "none-of-these"), ("--skip-tags", ",".join(TAGS))])
def test_in_site_the_safety_steps_belong_to_no_tag(choice, tmp_path):
    status, said = play(tmp_path, "playbooks/site.yml", "--list-tasks", *choice)
    assert status == 0
    assert [step for step in ALWAYS if step not in said] == []


def test_uninstall_has_no_tags_either():
    text = (ROOT / "playbooks/uninstall.yml").read_text(encoding="utf-8")
    assert text.count("tasks/whole.yml") == 1
    assert text.index("tasks/whole.yml") < text.index("Ask for a confirmation")
