# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""site --check --diff on bare machines: it succeeds, touches nothing, and says what will be done.

What it says is written down, for a test after the deployment to compare with what was done.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess

import testinfra

ROOT = pathlib.Path(os.environ["MOLECULE_PROJECT_DIRECTORY"])
PREFIX = os.environ["CTSYNC_LAB_PREFIX"]
LOOK = (pathlib.Path(__file__).parents[1] / "files" / "look.sh").read_text(encoding="utf-8")
FIREWALLS = ("fw1", "fw2")


def look():
    """What each firewall consists of."""
    return {name: testinfra.get_host(f"docker://{PREFIX}{name}").check_output("sh -c %s", LOOK) for name in FIREWALLS}


def changed_tasks(text):
    """Every host and task that is reported as changed, in order."""
    found, task = [], ""
    for line in text.splitlines():
        named = re.match(r"(?:TASK|RUNNING HANDLER) \[(.*)\] \*", line)
        task = named[1] if named else task
        host = re.match(r"changed: \[(\w+)", line)
        if host:
            found.append([host[1], task])
    return sorted(found)


def test_it_changes_nothing_and_says_what_will_be_done():
    before = look()
    inventory = ROOT / "inventories/lab/hosts.yml"
    done = subprocess.run(
        ["ansible-playbook", "--inventory", str(inventory), "--check", "--diff", "ctsync.ha_firewall.site"],
        env={
            **os.environ,
            "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
            "ANSIBLE_COLLECTIONS_PATH": f"{ROOT / os.environ['CTSYNC_COLLECTIONS']}:{ROOT / '.vendor'}",
            "ANSIBLE_FORCE_COLOR": "0",  # molecule forces it
            "ANSIBLE_NOCOLOR": "1",
        },
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert look() == before
    foretold = changed_tasks(done.stdout)
    assert {host for host, _task in foretold} == set(FIREWALLS)
    for line in (
        "+net.netfilter.nf_conntrack_events = 1",
        "+-A CTSYNC-POSTROUTING -s 192.168.0.3/32 -j SNAT --to-source 192.168.1.100",
        "+:FORWARD DROP",
        "+++ after: /etc/ctsyncd/ctsyncd.conf",
        "+++ after: /etc/keepalived/keepalived.conf",
    ):
        assert line in done.stdout, line
    path = pathlib.Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"]) / "foretold.json"
    path.write_text(json.dumps(foretold), encoding="utf-8")
