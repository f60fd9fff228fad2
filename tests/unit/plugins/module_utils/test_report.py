# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The verdict: good evidence passes, and each single flaw fails the check that is about it."""

from __future__ import annotations

import copy
import json
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import jmespath
import pytest
import yaml
from ansible_collections.ctsync.ha_firewall.plugins.module_utils import _report, _report_html

CUT = 1000.0
VIPS = ["192.168.0.100", "192.168.1.100"]
KINDS = {
    "ssh": "ssh",
    **{f"busy-{n:02d}": "busy" for n in range(1, 7)},
    **{f"idle-{n:02d}": "idle" for n in range(7, 12)},
}
FILTER = """# Generated
*filter
:INPUT ACCEPT [0:0]
:FORWARD DROP [{policy}:720]
:OUTPUT ACCEPT [9:9]
:CTSYNC-FORWARD - [0:0]
[3:180] -A CTSYNC-FORWARD -i eth0 -m state --state RELATED,ESTABLISHED -j ACCEPT
[{invalid}:720] -A CTSYNC-FORWARD -m state --state INVALID -j LOG
[{resets}:40] -A CTSYNC-OUTPUT -p tcp -m tcp --tcp-flags RST RST -m comment --comment "ctsync resets"
COMMIT
"""
SYSCTL = {"net.netfilter.nf_conntrack_tcp_loose": "0"}


def unshared(evidence):
    """A copy in which no two places are the same object: a flaw in one must not appear in another."""
    return json.loads(json.dumps(evidence))


def ports():
    return {name: 50000 + number for number, name in enumerate(KINDS)}


def received(count, gaps=(), first=CUT - 5, last=CUT + 5):
    return {
        "bytes": 100 * count,
        "first": first,
        "last": last,
        "gaps": [list(gap) for gap in gaps],
        "step_ms": 100,
        "series": [[int(first * 10) + n, 100] for n in range(100)],
    }


def clean(count):
    return {"received": count, "lost": 0, "duplicated": 0, "reordered": 0, "corrupt": 0}


def near(name, count, gaps, last):
    port = ports()[name]
    return dict(
        clean(count),
        name=name,
        kind=KINDS[name],
        proto="ssh" if name == "ssh" else "tcp",
        local=["192.168.0.3", port],
        pid=77 if name == "ssh" else None,
        rc=None,
        stderr="",
        alive=True,
        ended=None,
        error=None,
        sent=count,
        seen_as=["192.168.1.100", port],
        seen_history=[[CUT - 5, "192.168.1.100", port]],
        verified=None,
        rx=received(count, gaps, last=last),
        ack=received(count, gaps, last=last),
    )


def far(name, count, gaps, last):
    return dict(
        clean(count),
        name=name,
        kind=KINDS[name],
        peer=["192.168.1.100", ports()[name]],
        ended=None,
        error=None,
        rx=received(count, gaps, last=last),
    )


def snapshots(when, count, gaps=(), last=CUT + 5):
    tap = {"problem": None, "seen": []}
    return {
        f"client-{when}": {"now": last, "sessions": [near(n, count, gaps, last) for n in KINDS], "resets": tap},
        f"server-{when}": {"now": last, "sessions": [far(n, count, gaps, last) for n in KINDS], "resets": tap},
    }


def facts(held, verdict="READY", replicate=True):
    flows = [
        {
            "protocol": "tcp",
            "state": "ESTABLISHED",
            "snat": True,
            "orig": {"src": "192.168.0.3", "dst": "192.168.1.3", "sport": port, "dport": 22},
            "reply": {"src": "192.168.1.3", "dst": "192.168.1.100", "sport": 22, "dport": port},
        }
        for port in ports().values()
    ]
    return {
        "role": "active" if held else "backup",
        "virtual_ips": [{"interface": "eth1", "address": address, "held": held} for address in VIPS],
        "sync": {"verdict": verdict, "replicate": replicate, "reasons": []},
        "flows": {"internal": list(flows), "external": list(flows), "kernel": list(flows)},
    }


def failover():
    evidence = {
        "meta": {
            "kind": "failover",
            "run": 1,
            "title": "Failover: fw1 dies",
            "from": "fw1",
            "to": "fw2",
            "virtual_ips": VIPS,
            "failed_at": CUT,
            "lines": {"fw1 ctsyncd -i": "tcp      6 ESTABLISHED <&>"},
        },
        "facts-before-fw1": facts(True),
        "facts-before-fw2": facts(False),
        "facts-after-fw2": facts(True),
        "facts-back-fw1": facts(False),
        "facts-back-fw2": facts(True),
        "ready-after": {"seconds": 1.5},
        "firewall-before-fw2": {"filter": FILTER.format(policy=5, invalid=5, resets=2), "sysctl": SYSCTL},
        "firewall-after-fw2": {"filter": FILTER.format(policy=5, invalid=5, resets=2)},
        "watch-fw2": {
            "addresses": [
                {"at": CUT - 40, "event": "added", "address": VIPS[0]},
                {"at": CUT + 0.312, "event": "added", "address": VIPS[0]},
                {"at": CUT + 0.314, "event": "added", "address": VIPS[1]},
            ],
            "resets": {"problem": None, "seen": []},
        },
        "poke": {"answers_ms": {name: 0.8 for name, kind in KINDS.items() if kind == "idle"}},
    }
    evidence.update(snapshots("before", 100, last=CUT - 0.1))
    evidence.update(snapshots("after", 200, gaps=[(CUT - 9, CUT - 8), (CUT - 0.02, CUT + 0.42)]))
    closed = copy.deepcopy(evidence["client-after"])
    for session in closed["sessions"]:
        session["verified"] = clean(session["sent"])
    evidence["client-closed"] = closed
    return unshared(evidence)


def control():
    evidence = failover()
    del evidence["client-closed"]
    evidence["meta"].update(kind="control", title="Negative control")
    evidence["facts-before-fw1"] = facts(True, replicate=False)
    evidence["facts-before-fw2"] = facts(False, "NOT READY", replicate=False)
    for when in ("before", "after"):
        evidence[f"facts-{when}-fw2"]["flows"] = {"internal": [], "external": [], "kernel": []}
    evidence["firewall-after-fw2"]["filter"] = FILTER.format(policy=29, invalid=27, resets=2)
    evidence["poke"] = {"answers_ms": {name: None for name, kind in KINDS.items() if kind == "idle"}}
    evidence["fresh"] = {"tcp": True, "ssh": True, "error": None, "seen_as": ["192.168.1.100", 50999]}
    evidence["ssh-end"] = {"ended": True, "rc": 255}
    for side in ("client-after", "server-after"):
        for session in evidence[side]["sessions"]:
            for direction in ("rx", "ack"):
                if direction in session:
                    session[direction].update(last=CUT - 0.02, gaps=[])
    ssh = evidence["client-after"]["sessions"][0]
    ssh.update(
        alive=False, ended=CUT + 3.2, rc=255, error="ssh ended with rc 255", stderr="Timeout, server not responding."
    )
    return unshared(evidence)


def failing(evidence, positive=None):
    return {check.name for check in _report.checks_of(evidence, positive) if not check.passed}


def session(evidence, side, name):
    return next(one for one in evidence[side]["sessions"] if one["name"] == name)


def test_good_evidence_passes():
    assert failing(failover()) == set()
    assert failing(control(), failover()) == set()


def lose_everywhere(evidence):
    for table in ("external", "kernel"):
        del evidence["facts-before-fw2"]["flows"][table][3]


def other_pid(evidence):
    session(evidence, "client-after", "ssh")["pid"] = 78


def end_far(evidence):
    session(evidence, "server-after", "busy-02").update(ended=CUT + 1, error="ECONNRESET: Connection reset by peer")


def silent(direction):
    def change(evidence):
        session(evidence, "client-after", "busy-01")[direction]["last"] = CUT + 0.1

    return change


def lines(side, fault):
    def change(evidence):
        session(evidence, side, "busy-03")[fault] = 1

    return change


def other_port(evidence):
    changed = session(evidence, "client-after", "busy-04")
    changed["seen_as"] = ["192.168.1.100", 1]
    changed["seen_history"].append([CUT + 1, "192.168.1.100", 1])


def not_translated(evidence):
    for when in ("before", "after"):
        session(evidence, f"server-{when}", "busy-05")["peer"][0] = "192.168.0.3"
        session(evidence, f"client-{when}", "busy-05")["seen_as"][0] = "192.168.0.3"


def reset(witness):
    def change(evidence):
        seen = {"at": CUT + 1, "src": VIPS[1], "sport": ports()["ssh"], "dst": "192.168.1.3", "dport": 22}
        evidence[witness]["resets"] = {"problem": None, "seen": [seen]}

    return change


def set_(value, *path):
    def change(evidence):
        place = evidence
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value

    return change


def drop(*path):
    def change(evidence):
        place = evidence
        for step in path[:-1]:
            place = place[step]
        del place[path[-1]]

    return change


FLAWS = {
    "backup not ready": (set_("DEGRADED", "facts-before-fw2", "sync", "verdict"), {"ready"}),
    "both hold an address": (set_(True, "facts-before-fw2", "virtual_ips", 0, "held"), {"ready"}),
    "no addresses in the facts": (set_([], "facts-before-fw1", "virtual_ips"), {"ready"}),
    "flow not on the backup": (lose_everywhere, {"replicated"}),
    "flow not in the kernel": (drop("facts-before-fw2", "flows", "kernel", 0), {"replicated"}),
    "flow without translation": (set_(False, "facts-before-fw2", "flows", "external", 1, "snat"), {"replicated"}),
    "flow translated to another port": (
        set_(1, "facts-before-fw2", "flows", "external", 1, "reply", "dport"),
        {"replicated"},
    ),
    "flow not ESTABLISHED": (set_("SYN_RECV", "facts-before-fw1", "flows", "internal", 1, "state"), {"replicated"}),
    "one address did not move": (set_(False, "facts-after-fw2", "virtual_ips", 1, "held"), {"vip"}),
    "nobody saw one address move": (drop("watch-fw2", "addresses", 2), {"vip"}),
    "another ssh process": (other_pid, {"ssh", "survival"}),
    "session ended at the far side": (end_far, {"survival", "snat"}),
    "no byte came back": (silent("rx"), {"survival", "snat"}),
    "no byte went out": (silent("ack"), {"survival", "snat"}),
    "line lost": (lines("client-after", "lost"), {"lines", "survival"}),
    "line doubled": (lines("server-after", "duplicated"), {"lines", "survival"}),
    "line reordered": (lines("server-after", "reordered"), {"lines", "survival"}),
    "line altered": (lines("client-after", "corrupt"), {"lines", "survival"}),
    "another port": (other_port, {"snat", "survival"}),
    "no translation": (not_translated, {"snat", "survival"}),
    "reset at the client": (reset("client-after"), {"resets"}),
    "reset at the server": (reset("server-after"), {"resets"}),
    "reset at the firewall": (reset("watch-fw2"), {"resets"}),
    "reset counted": (set_(FILTER.format(policy=5, invalid=5, resets=3), "firewall-after-fw2", "filter"), {"resets"}),
    "resets not counted": (set_("", "firewall-after-fw2", "filter"), {"resets"}),
    "nobody watched": (set_("EPERM: no", "client-after", "resets", "problem"), {"resets"}),
    "idle session silent": (set_(None, "poke", "answers_ms", "idle-08"), {"idle", "survival", "snat"}),
    "nobody asked the idle": (drop("poke"), {"idle", "survival", "snat"}),
    "address moved back": (set_(facts(True), "facts-back-fw1"), {"return"}),
    "node not ready again": (set_("NOT READY", "facts-back-fw1", "sync", "verdict"), {"return"}),
    "node did not come back": (drop("facts-back-fw1"), {"return"}),
    "session not there after": (drop("client-after", "sessions", 2), {"survival", "snat"}),
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_each_flaw_fails_its_checks(flaw):
    change, expected = FLAWS[flaw]
    evidence = failover()
    change(evidence)
    assert failing(evidence) == expected


def survivor(evidence):
    ssh = session(evidence, "client-after", "ssh")
    ssh.update(alive=True, ended=None, rc=None, error=None)
    evidence["ssh-end"] = {"ended": False, "rc": None}


def passes(evidence):
    for side in ("client-after", "server-after"):
        one = session(evidence, side, "busy-01")
        for direction in ("rx", "ack"):
            if direction in one:
                one[direction]["last"] = CUT + 5


CONTROL_FLAWS = {
    "ssh survived": (survivor, {"death"}),
    "ssh failed otherwise": (set_({"ended": True, "rc": 1}, "ssh-end"), {"death"}),
    "another session passes": (passes, {"all"}),
    "idle session answers": (set_(1.0, "poke", "answers_ms", "idle-07"), {"all"}),
    "replication was on": (set_(True, "facts-before-fw2", "sync", "replicate"), {"off"}),
    "backup knew a session": (
        set_(facts(False)["flows"]["kernel"][:1], "facts-before-fw2", "flows", "kernel"),
        {"off"},
    ),
    "session known afterwards": (
        set_(facts(False)["flows"]["kernel"][:1], "facts-after-fw2", "flows", "kernel"),
        {"absent"},
    ),
    "nothing was dropped": (
        set_(FILTER.format(policy=5, invalid=5, resets=2), "firewall-after-fw2", "filter"),
        {"drops"},
    ),
    "address did not move": (set_(False, "facts-after-fw2", "virtual_ips", 0, "held"), {"vip"}),
    "no new session": (set_({"tcp": False, "ssh": None, "error": "timeout", "seen_as": None}, "fresh"), {"fresh"}),
    "no new ssh": (set_(False, "fresh", "ssh"), {"fresh"}),
    "other settings": (set_({"net.netfilter.nf_conntrack_tcp_loose": "1"}, "firewall-before-fw2", "sysctl"), {"same"}),
    "no settings": (set_({}, "firewall-before-fw2", "sysctl"), {"same"}),
    "other rules": (
        set_(FILTER.format(policy=5, invalid=5, resets=2) + "[0:0] -A INPUT -j DROP", "firewall-before-fw2", "filter"),
        {"same"},
    ),
}


@pytest.mark.parametrize("flaw", CONTROL_FLAWS)
def test_each_flaw_of_the_control_fails_it(flaw):
    change, expected = CONTROL_FLAWS[flaw]
    evidence = control()
    change(evidence)
    assert failing(evidence, failover()) == expected


@pytest.mark.parametrize("make", [failover, control])
def test_no_check_passes_without_its_evidence(make):
    meta = {"meta": make()["meta"]}
    assert all(not check.passed for check in _report.checks_of(meta))
    assert all("no evidence" in check.detail for check in _report.checks_of(meta))


def test_counters_are_read_from_iptables_save():
    counted = _report.filter_counters(FILTER.format(policy=12, invalid=7, resets=3))
    assert counted == {"policy": 12, "invalid": 7, "resets": 3}
    assert _report.filter_counters("")["resets"] == -1
    others = "[4:1] -A OUTPUT -p tcp -m tcp --tcp-flags FIN,RST FIN\n[1:1] -A INPUT -p tcp -m tcp --tcp-flags RST RST"
    assert _report.filter_counters(others)["resets"] == -1


def test_the_failure_is_found_in_the_sessions_when_nobody_noted_it():
    evidence = failover()
    evidence["meta"]["failed_at"] = None
    for side in ("client-after", "server-after"):
        for one in evidence[side]["sessions"]:
            one["rx"]["gaps"] = [[CUT - 0.02, CUT + 0.42]]
    assert _report.failed_at(evidence) == pytest.approx(CUT - 0.02)


def test_the_report_has_what_was_promised():
    report = _report.build([failover(), control()], [{"kind": "failover", "run": 1}, {"kind": "control", "run": 1}])
    assert report["verdict"] == "passed", _report.failed_checks(report)
    ssh = report["sessions"][0]
    assert ssh["name"] == "ssh" and ssh["proto"] == "ssh" and ssh["survived"] is True
    assert ssh["gap_ms"] == 440 and ssh["bytes"] > 0
    assert ssh["snat_before"] == ssh["snat_after"] == f"192.168.1.100:{ports()['ssh']}"
    assert len(report["sessions"]) == len(KINDS)
    assert report["takeover"] == {"failovers": 1, "vip_ms": [314], "worst_vip_ms": 314, "longest_gap_ms": 440}
    assert report["negative_control"]["died_after_ms"] == 3200
    assert report["negative_control"]["dropped"] == {"invalid": 22, "policy": 24}
    json.dumps(report)


@pytest.mark.parametrize(
    "change",
    [
        lambda arguments: arguments.update(failure="Cut the power: no such container"),
        lambda arguments: arguments["expected"].append({"kind": "failover", "run": 1}),
        lambda arguments: arguments["expected"].append({"kind": "control", "run": 2}),
        lambda arguments: arguments["experiments"].clear(),
        lambda arguments: arguments["experiments"][0]["client-closed"]["sessions"][4].update(verified=None),
        lambda arguments: arguments["experiments"][0]["client-closed"]["sessions"][4].update(verified=clean(199)),
        lambda arguments: arguments["experiments"][1]["ssh-end"].update(rc=0),
    ],
)
def test_the_verdict_is_failed_when_anything_is_missing(change):
    arguments = {
        "experiments": [failover(), control()],
        "expected": [{"kind": "failover", "run": 1}, {"kind": "control", "run": 1}],
    }
    change(arguments)
    report = _report.build(**arguments)
    assert report["verdict"] == "failed"
    assert _report.failed_checks(report)
    # A failed run has its report, too.
    assert "FAILED" in _report_html.html(report)
    failures = ET.fromstring(_report_html.junit(report).encode()).iter("failure")
    assert len(list(failures)) >= 1


class Audit(HTMLParser):
    """Finds what a page would load, and tags that do not match."""

    VOID = {"meta", "rect", "line", "path", "br"}

    def __init__(self):
        super().__init__()
        self.open, self.problems, self.svgs = [], [], 0

    def handle_starttag(self, tag, attrs):
        self.svgs += tag == "svg"
        self.problems += [(tag, name) for name, _value in attrs if name in ("src", "href", "data", "action")]
        self.problems += [tag] if tag in ("script", "link", "iframe", "img") else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"</{tag}>")


def test_the_page_needs_nothing_else_and_trusts_no_text():
    evil = failover()
    evil["meta"]["title"] = "<script>alert(1)</script>"
    evil["meta"]["lines"] = {"fw1": '"><img src=x>'}
    page = _report_html.html(_report.build([evil, control()], about={"<b>": "\x1b[31m</table>"}))
    audit = Audit()
    audit.feed(page)
    assert audit.problems == [] and audit.open == [] and audit.svgs == 2
    assert "url(" not in page and "@import" not in page and "http" not in page
    assert "\x1b" not in page


def test_the_page_shows_the_moment_the_gap_and_the_death():
    page = _report_html.html(_report.build([failover(), control()]))
    for words in ("fw1 loses power", "virtual IPs on fw2 after 314 ms", "440 ms", "ssh gave up after 3.20 s, rc 255"):
        assert words in page, words


def test_junit_counts_every_check():
    report = _report.build([failover(), control()])
    root = ET.fromstring(_report_html.junit(report).encode())
    cases = list(root.iter("testcase"))
    assert int(root.get("tests")) == len(cases) > 15
    assert root.get("failures") == "0"


def test_the_playbook_queries_agree_with_the_checks(request):
    text = (request.config.rootpath / "roles/failover_test/vars/main.yml").read_text()
    queries = yaml.safe_load(text)
    evidence = failover()
    vips = json.dumps(VIPS)
    flows = queries["__failover_test_query_flows"].replace("{{ __failover_test_vips | to_json }}", vips)
    wanted = jmespath.search(queries["__failover_test_query_sessions"], evidence["client-before"])
    assert len(wanted) == len(KINDS)
    table = evidence["facts-before-fw2"]["flows"]["kernel"]
    assert set(wanted) == set(jmespath.search(flows, table))
    for change in ({"snat": False}, {"state": "CLOSE"}, {"protocol": "udp"}):
        assert len(jmespath.search(flows, [dict(table[0], **change), *table[1:]])) == len(wanted) - 1
    table[0]["reply"] = dict(table[0]["reply"], dst="192.168.0.3")
    assert len(jmespath.search(flows, table)) == len(wanted) - 1
    held = queries["__failover_test_query_held"]
    assert jmespath.search(held, facts(True)) is True
    assert jmespath.search(held, facts(False)) is False
    assert jmespath.search(held, {"virtual_ips": []}) is False
