# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The watch over the running rules: its file, its lock, what it says; and the daemon understands the file."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from ansible_collections.ctsync.ha_firewall.plugins.module_utils import _rollback, _ruleset, _ruleset_watch
from ansible_collections.ctsync.ha_firewall.plugins.module_utils._ruleset_watch import Record
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import service

A, B, C = "a" * 64, "b" * 64, "c" * 64


@pytest.mark.parametrize(
    ("record", "text", "said"),
    [
        (Record(A, A), f"{A}\n", (A, "")),
        (
            Record(B, A),
            f"{B}\napplied {A}\n",
            (B, f"the rules that run here are not those that were applied ({B[:12]}"),
        ),
        (
            Record("", A),
            f"none\napplied {A}\n",
            ("", "the rules that run here are not those that were applied (nothing"),
        ),
        (Record(A, A, "x: gone"), f"{A}\nunread x: gone\n", (A, "the rules that run here cannot be read: x: gone")),
        (Record(B, A, "x: gone"), f"{B}\napplied {A}\nunread x: gone\n", (B, "the rules that run here cannot be read")),
        (Record(A, ""), f"{A}\napplied none\n", (A, "the rules that run here are not those that were applied")),
    ],
)
def test_the_file_is_read_as_it_was_written_and_the_daemon_understands_it(record, text, said, tmp_path):
    assert record.render() == text
    assert _ruleset_watch.parse_record(text) == record
    path = tmp_path / "fingerprint"
    path.write_text(text)
    running, problem = service.read_fingerprint(str(path))
    assert running == said[0]
    assert problem.startswith(said[1])
    assert bool(problem) is bool(said[1])


@pytest.mark.parametrize("text", [None, "", "\n", "none of this\n", A[:-1], f"{A}\napplied {B[:-1]}\n", f"{A}\n{B}\n"])
def test_what_is_no_such_file(text):
    assert _ruleset_watch.parse_record(text) is None


@pytest.mark.parametrize(
    ("held", "stored", "running", "unread", "wanted"),
    [
        (f"{A}\n", f"{A}\n", A, "", Record(A, A)),
        (f"{A}\n", f"{A}\n", B, "", Record(B, A)),  # a rule by hand
        (f"{B}\napplied {A}\n", f"{A}\n", C, "", Record(C, A)),  # another one
        (f"{B}\napplied {A}\n", f"{A}\n", A, "", Record(A, A)),  # all is as it was
        (f"{A}\n", None, "", "", Record("", A)),  # everything flushed
        (None, f"{A}\n", B, "", Record(B, A)),  # boot could not restore all
        ("garbage\n", f"{A}\n", A, "", Record(A, A)),
        (f"{B}\n", f"{A}\n", B, "", Record(B, B)),  # applied, not stored for boot yet
        (None, None, A, "", None),  # nothing was applied, as far as is known
        ("garbage\n", None, A, "", None),
        (f"{A}\n", f"{A}\n", None, "x: gone", Record(A, A, "x: gone")),
        (f"{B}\napplied {A}\nunread x: gone\n", None, B, "", Record(B, A)),
    ],
)
def test_what_the_file_has_to_say(held, stored, running, unread, wanted):
    assert _ruleset_watch.next_record(held, stored, running, unread) == wanted


class Look:
    """Looks at files in a folder; `runs` is what runs, one for each reading, the last one for all that follow."""

    def __init__(self, folder):
        self.path, self.stored = folder / "run", folder / "stored"
        self.path.write_text(f"{A}\n")
        self.stored.write_text(f"{A}\n")
        self.pauses = 0

    def __call__(self, *runs):
        left = list(runs)

        def running():
            found = left.pop(0) if len(left) > 1 else left[0]
            if found is None:
                raise _ruleset_watch.WatchError("iptables-save: gone")
            return found

        def pause(_seconds):
            self.pauses += 1

        return _ruleset_watch.look(str(self.path), str(self.stored), running, pause)


def test_the_file_is_replaced_only_when_something_has_changed(tmp_path):
    look = Look(tmp_path)
    before = look.path.stat()
    assert look(A) == (True, "")
    assert look.path.stat() == before
    assert look.pauses == 0

    seen = look(B)
    assert seen.well
    assert seen.said.startswith(
        "<4>the rules that run are not those that were applied (bbbbbbbbbbbb runs, aaaaaaaaaaaa"
    )
    assert look.path.read_text() == f"{B}\napplied {A}\n"
    assert look.path.stat().st_mode & 0o777 == 0o644
    before = look.path.stat()
    assert look(B) == (True, "")  # said once
    assert look.path.stat() == before

    assert look(A).said == "<5>the rules that run are those that were applied"
    assert look.path.read_text() == f"{A}\n"


def test_what_is_there_for_a_moment_only_is_no_change(tmp_path):
    look = Look(tmp_path)
    assert look(B, A) == (True, "")
    assert look("", B) == (True, "")
    assert look.path.read_text() == f"{A}\n"
    assert look.pauses == 2


def test_rules_that_cannot_be_read_are_a_failure_until_they_can(tmp_path):
    look = Look(tmp_path)
    assert look(None) == (False, "<4>the rules that run cannot be read: iptables-save: gone")
    assert look.path.read_text() == f"{A}\nunread iptables-save: gone\n"
    assert look(None) == (False, "")
    assert look(A).well
    assert look.path.read_text() == f"{A}\n"


def test_where_nothing_was_applied_nothing_is_written(tmp_path):
    look = Look(tmp_path)
    look.path.unlink()
    look.stored.unlink()
    assert look(A) == (True, "")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    look = Look(tmp_path)
    look.path.unlink()
    look.path.mkdir()
    with pytest.raises(OSError) as caught:
        look(A)
    assert caught.value.filename == str(look.path)


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


SAVE = """echo '*filter
:FORWARD DROP [7:9]
:CTSYNC-FORWARD - [0:0]
-A FORWARD -m comment --comment "ctsync: own rules" -j CTSYNC-FORWARD
-A CTSYNC-FORWARD -i {0} -j ACCEPT
COMMIT'"""


def test_the_running_rules_are_read_as_the_module_reads_them(tmp_path):
    program = script(tmp_path / "save", SAVE.format("eth1"))
    text = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    wanted = _ruleset.fingerprint({"ipv4": _ruleset.parse_save(text)})
    assert _ruleset_watch.read_running({"ipv4": program}, []) == wanted
    other = script(tmp_path / "other", SAVE.format("eth2"))
    assert _ruleset_watch.read_running({"ipv4": other}, []) != wanted


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("echo 'iptables-save v1.8: no  permission' >&2; exit 3", "iptables-save v1.8: no permission"),
        ("exit 4", "it ended with 4"),
        ("echo nonsense", "a line that cannot be understood: 'nonsense'"),
        (None, "No such file or directory"),
    ],
)
def test_a_family_that_cannot_be_read_counts_only_where_rules_were_applied(tmp_path, text, words):
    good = script(tmp_path / "good", SAVE.format("eth1"))
    bad = script(tmp_path / "bad", text) if text else str(tmp_path / "nowhere")
    alone = _ruleset_watch.read_running({"ipv4": good}, [])
    assert _ruleset_watch.read_running({"ipv4": good, "ipv6": bad}, ["ipv6"]) == alone
    with pytest.raises(_ruleset_watch.WatchError, match=words):
        _ruleset_watch.read_running({"ipv4": good, "ipv6": bad}, [])


def test_what_counts_down_is_not_part_of_the_fingerprint():
    def of(quota):
        return _ruleset.fingerprint(
            {"ipv4": _ruleset.parse_save(f"*filter\n:CTSYNC-FORWARD - [0:0]\n-A CTSYNC-FORWARD {quota} -j ACCEPT\n")}
        )

    assert of("-m quota --quota 1000") == of("-m quota --quota 17")
    assert of("-m quota --quota 1000") != of("-m quota ! --quota 1000")
    assert of("-m limit --limit 5/sec") != of("-m limit --limit 6/sec")


def test_one_holds_the_lock_at_a_time_and_death_gives_it_back(tmp_path):
    folder = str(tmp_path / "guards")
    first, second = _ruleset_watch.Lock(folder), _ruleset_watch.Lock(folder)
    assert first.take()
    assert os.stat(folder).st_mode & 0o777 == 0o700
    assert not second.take(0.2)
    first.give_back()
    assert second.take()
    second.give_back()
    second.give_back()
    program = (
        "import sys; from ansible_collections.ctsync.ha_firewall.plugins.module_utils import _ruleset_watch\n"
        "lock = _ruleset_watch.Lock(sys.argv[1]); print(lock.take(), flush=True); sys.stdin.read()"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    with subprocess.Popen([sys.executable, "-c", program, folder], **pipes) as holder:
        assert holder.stdout.readline() == "True\n"
        assert not first.take()
        holder.kill()
        holder.wait()
    assert first.take(5)
    first.give_back()


def test_a_guard_counts_as_long_as_it_lives_and_nothing_is_decided(tmp_path):
    folder = tmp_path / "guards"
    assert not _ruleset_watch.guard_at_work(str(folder))
    guard = folder / "0123456789abcdef"
    guard.mkdir(parents=True)
    assert not _ruleset_watch.guard_at_work(str(folder))
    (guard / "pid").write_text(f"{os.getpid()}\n")
    assert not _ruleset_watch.guard_at_work(str(folder))  # a process of that number, but no guard
    program = "print('', flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-c", program, str(guard)], **pipes) as living:
        living.stdout.readline()
        (guard / "pid").write_text(f"{living.pid}\n")
        assert _ruleset_watch.guard_at_work(str(folder))
        (guard / "outcome.json").write_text("{}")
        assert not _ruleset_watch.guard_at_work(str(folder))
        (guard / "outcome.json").unlink()
        living.kill()
    assert not _ruleset_watch.guard_at_work(str(folder))


def test_the_program_is_the_same_every_time_and_runs_by_itself(tmp_path):
    program = tmp_path / "watch.pyz"
    program.write_bytes(_ruleset_watch.archive())
    assert program.read_bytes() == _ruleset_watch.archive()
    command = [sys.executable, "-I", "-B", "-c", f"import sys; sys.path.insert(0, {str(program)!r})\n"]
    command[-1] += "from watch import _ruleset_watch as w; print(w.NAME, w._rollback.FOLDER)"
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/").stdout
    assert said.split() == ["ctsync-ruleset-watch", _rollback.FOLDER]


def test_the_units_name_what_they_start():
    text = _ruleset_watch.service_text(
        "/usr/bin/python3", "/etc/ctsync/ruleset.fingerprint", ["ipv4=/sbin/x", "ipv6?=/y"]
    )
    start = "ExecStart=/usr/bin/python3 -I -B /usr/lib/ctsync/ruleset-watch.pyz /etc/ctsync/ruleset.fingerprint"
    assert f"{start} ipv4=/sbin/x ipv6?=/y" in text.splitlines()
    assert "OnUnitActiveSec=60s" in _ruleset_watch.timer_text().splitlines()
