# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The module: evidence on disk in, report on disk out, also when the evidence is bad. (The verdict: test_report.py.)"""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET

import pytest
from ansible.module_utils.testing import patch_module_args
from ansible_collections.ctsync.ha_firewall.plugins.modules import failover_report


@pytest.fixture
def run(tmp_path, capsys):
    def play(check=False, **arguments):
        arguments = {"path": str(tmp_path / "report"), "_ansible_check_mode": check, **arguments}
        with patch_module_args(arguments), pytest.raises(SystemExit) as ended:
            failover_report.main()
        return ended.value.code, json.loads(capsys.readouterr().out)

    return play


@pytest.fixture
def evidence(tmp_path):
    def put(directory, name, value):
        path = tmp_path / "report/evidence" / directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(value if isinstance(value, str) else json.dumps(value))

    return put


META = {"kind": "failover", "run": 1, "title": "one", "from": "fw1", "to": "fw2", "virtual_ips": ["192.168.0.100"]}


def test_files_of_a_directory_are_put_together_in_the_order_of_the_directories(evidence, tmp_path):
    evidence("002-1", "0-meta.json", {"meta": dict(META, title="later"), "poke": {}})
    evidence("004-1", "0-meta.json", {"meta": dict(META, title="not begun")})
    evidence("001-1", "0-meta.json", {"meta": META})
    evidence("001-1", "2-after.json", {"poke": {"answers_ms": {}}})
    evidence("001-1", "notes.txt", "not evidence")
    evidence("003-1", "1-before.json", {"client-before": {}})
    found = failover_report.read_evidence(str(tmp_path / "report/evidence"))
    assert [one["meta"]["title"] for one in found] == ["one", "later"]
    assert found[0]["poke"] == {"answers_ms": {}}


def test_a_failed_test_has_all_three_reports(run, evidence, tmp_path):
    evidence("001-1", "0-meta.json", {"meta": META, "poke": {}})
    code, result = run(failure="Cut the power: <nothing> to cut")
    assert code == 0 and result["changed"] is True
    assert result["verdict"] == "failed"
    assert any("<nothing> to cut" in line for line in result["failed_checks"])
    assert any("every control was made" in line for line in result["failed_checks"])
    assert result["experiments"][0]["title"] == "one"
    report = json.loads((tmp_path / "report/report.json").read_text())
    assert report["verdict"] == "failed" and report["schema"] == 1
    assert "&lt;nothing&gt; to cut" in (tmp_path / "report/report.html").read_text()
    root = ET.parse(tmp_path / "report/junit.xml").getroot()
    assert int(root.get("failures")) == len(result["failed_checks"])


def test_check_mode_judges_and_writes_nothing(run, evidence, tmp_path):
    evidence("001-1", "0-meta.json", {"meta": META})
    code, result = run(check=True)
    assert code == 0 and result["changed"] is False and result["verdict"] == "failed"
    assert not (tmp_path / "report/report.json").exists()


@pytest.mark.parametrize("bad", ['{"meta": ', "[1, 2]", "7"])
def test_evidence_that_cannot_be_read_fails_the_test_and_is_named(run, evidence, bad):
    evidence("001-1", "0-meta.json", bad)
    code, result = run()
    assert code == 0 and result["verdict"] == "failed"
    assert any("0-meta.json" in line for line in result["failed_checks"])


def test_no_evidence_is_no_success(run):
    code, result = run(runs=0, control=False)
    assert code == 0 and result["verdict"] == "failed"


def test_a_report_that_cannot_be_written_is_an_error_with_a_remedy(run, tmp_path):
    (tmp_path / "report").write_text("a file where the directory should be")
    code, result = run()
    assert code == 1 and result["failed"] and "option path" in result["msg"]
