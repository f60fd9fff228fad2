# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The deployment has changed what the dry run before it had said, task by task."""

from __future__ import annotations

import json
import os
import pathlib
import re

EPHEMERAL = pathlib.Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"])
FIRST_PLAY = "PLAY [Check the whole group before the first change]"


def test_the_deployment_did_what_the_dry_run_had_said():
    foretold = json.loads((EPHEMERAL / "foretold.json").read_text(encoding="utf-8"))
    # each line of Ansible's log begins with date, process and level, which end with a bar
    said = re.sub(r"(?m)^\d{4}-\d\d-\d\d [^|\n]*\| ", "", (EPHEMERAL / "ansible.log").read_text(encoding="utf-8"))
    deployment = said.split(FIRST_PLAY)[1].partition("PLAY RECAP")[0]
    done, task = [], ""
    for line in deployment.splitlines():
        named = re.match(r"(?:TASK|RUNNING HANDLER) \[(.*)\] \*", line)
        task = named[1] if named else task
        host = re.match(r"changed: \[(\w+)", line)
        if host:
            done.append([host[1], task])
    assert sorted(done) == foretold
