# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the failover test left in writing: without its report, or with a bad one, the scenario fails."""

from __future__ import annotations

import json
import os
import pathlib
from xml.etree import ElementTree

import pytest


@pytest.fixture(scope="module")
def folder():
    return pathlib.Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"]) / "failover-test"


@pytest.fixture(scope="module")
def report(folder):
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def test_the_verdict_is_good(report):
    failed = [check for check in report["checks"] if not check["passed"]]
    failed += [check for part in report["failovers"] for check in part["checks"] if not check["passed"]]
    assert report["verdict"] == "passed", failed


def test_both_ways_without_losing_a_session(report):
    ways = {(part["from"], part["to"]) for part in report["failovers"]}
    assert ways == {("fw1", "fw2"), ("fw2", "fw1")}
    assert len(report["sessions"]) >= 11
    for session in report["sessions"]:
        assert session["survived"], session
        assert session["snat_before"] == session["snat_after"], session
        assert session["snat_before"].startswith("192.168.1.100:"), session
    assert sum(session["kind"] == "ssh" for session in report["sessions"]) == 1
    assert {"busy", "idle"} <= {session["kind"] for session in report["sessions"]}


def test_without_replication_the_session_died(report):
    control = report["negative_control"]
    assert control["verdict"] == "passed", control


def test_the_report_can_be_read_by_people_and_by_ci(folder):
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "<svg" in page
    assert "http://" not in page.replace("http://www.w3.org/", "") and "https://" not in page, (
        "it must be self-contained"
    )
    suite = ElementTree.parse(folder / "junit.xml").getroot()
    cases = list(suite.iter("testcase"))
    assert cases
    assert not [case.get("name") for case in cases if case.find("failure") is not None]
