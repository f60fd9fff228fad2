#!/usr/bin/python
# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Judge the evidence of a failover test and write the report."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: failover_report
short_description: Judge the evidence of a failover test and write the report
version_added: 0.1.0
description:
  - Reads the evidence that the P(ctsync.ha_firewall.failover_test#role) role collected, one directory of JSON files per
    failover (each file an object; their keys are put together), decides on every check, and writes C(report.json),
    C(report.html) (one file, no external resources) and C(junit.xml).
  - A check whose evidence is missing fails. The module itself succeeds whatever the verdict is, so that a failed test
    has a report too; look at RV(verdict).
author:
  - The ctsync authors (@ctsync)
options:
  about:
    description: What to tell about the environment, shown in the report in this order.
    type: dict
    default: {}
  control:
    description: Whether each run has a negative control. A run without one fails the test when it was asked for.
    type: bool
    default: true
  failure:
    description: What stopped the test before its end; empty when nothing did.
    type: str
    default: ''
  path:
    description:
      - Directory for the report. Its subdirectory C(evidence) has the evidence, in directories whose names sort in the
        order of the experiments.
    type: path
    required: true
  runs:
    description: How many runs were asked for, each of two failovers and the negative control. A missing one fails.
    type: int
    default: 1
extends_documentation_fragment:
  - ctsync.ha_firewall.attributes
attributes:
  check_mode:
    support: full
    details: Judges and returns everything, writes nothing.
  diff_mode:
    support: none
    details: A report has no earlier state worth a comparison.
  idempotent:
    support: none
    details: Writes the report anew each time.
  action_group:
    support: none
    membership: []
"""

EXAMPLES = r"""
- name: Judge the evidence again
  ctsync.ha_firewall.failover_report:
    path: "{{ playbook_dir }}/reports/failover-test"
  delegate_to: localhost
"""

RETURN = r"""
verdict:
  description: V(passed) when every check passed, otherwise V(failed).
  returned: always
  type: str
  sample: passed
failed_checks:
  description: Every check that failed, one line each.
  returned: always
  type: list
  elements: str
  sample: []
table:
  description: A small table for the terminal, one line per experiment.
  returned: always
  type: list
  elements: str
report:
  description: Path of C(report.html).
  returned: always
  type: str
  sample: reports/failover-test/report.html
experiments:
  description: The checks of each experiment, in order.
  returned: always
  type: list
  elements: dict
  sample:
    - title: "Failover 1: fw1 to fw2"
      run: 1
      checks: [{name: ssh, title: The same SSH process and connection went on, passed: true, detail: process 4711}]
takeover:
  description: Take-over times in milliseconds.
  returned: always
  type: dict
  sample: {failovers: 2, vip_ms: [312, 297], worst_vip_ms: 312, longest_gap_ms: 431}
"""

import json
import os
import tempfile
from typing import Any

from ansible.module_utils.basic import AnsibleModule

from ..module_utils import _report, _report_html


def read_evidence(path: str) -> list[dict[str, Any]]:
    """Every experiment, in the order of the directories' names.

    :raises ValueError: for a file that is no JSON, naming it.
    """
    experiments = []
    for directory in sorted(entry.path for entry in os.scandir(path) if entry.is_dir()):
        evidence: dict[str, Any] = {}
        for name in sorted(os.listdir(directory)):
            if not name.endswith(".json"):
                continue
            with open(os.path.join(directory, name), encoding="utf-8") as handle:
                try:
                    evidence.update(json.load(handle))
                except (TypeError, ValueError) as error:
                    raise ValueError(f"{os.path.join(directory, name)} is not a JSON object: {error}") from error
        # One that ended before anything was seen says nothing; that it was not made is a failed check by itself.
        if "meta" in evidence and len(evidence) > 1:
            experiments.append(evidence)
    return experiments


def main() -> None:
    """Module entry point."""
    module = AnsibleModule(
        argument_spec={
            "about": {"type": "dict", "default": {}},
            "control": {"type": "bool", "default": True},
            "failure": {"type": "str", "default": ""},
            "path": {"type": "path", "required": True},
            "runs": {"type": "int", "default": 1},
        },
        supports_check_mode=True,
    )
    path = module.params["path"]
    failure = module.params["failure"]
    experiments: list[dict[str, Any]] = []
    try:
        experiments = read_evidence(os.path.join(path, "evidence"))
    except (OSError, ValueError) as error:
        failure = "; ".join(part for part in (failure, f"evidence cannot be read: {error}") if part)
    kinds = ["failover", "failover"] + (["control"] if module.params["control"] else [])
    expected = [{"kind": kind, "run": run} for run in range(1, module.params["runs"] + 1) for kind in kinds]
    report = _report.build(experiments, expected, failure, module.params["about"])
    files = {
        "report.json": json.dumps(report, indent=1) + "\n",
        "report.html": _report_html.html(report),
        "junit.xml": _report_html.junit(report),
    }
    if not module.check_mode:
        try:
            os.makedirs(path, exist_ok=True)
            for name, content in files.items():
                handle, temporary = tempfile.mkstemp(dir=module.tmpdir)
                with os.fdopen(handle, "w", encoding="utf-8") as stream:
                    stream.write(content)
                os.chmod(temporary, 0o644)
                module.atomic_move(temporary, os.path.join(path, name))
        except OSError as error:
            module.fail_json(
                msg=f"cannot write the report to {path}: {error}; choose another directory with option path"
            )
    module.exit_json(
        changed=not module.check_mode,
        verdict=report["verdict"],
        failed_checks=_report.failed_checks(report),
        table=_report.table(report),
        report=os.path.join(path, "report.html"),
        experiments=[
            {name: part[name] for name in ("title", "kind", "run", "checks")}
            for part in sorted([*report["failovers"], *report["negative_controls"]], key=_report.moment)
        ],
        takeover=report["takeover"],
    )


if __name__ == "__main__":
    main()
