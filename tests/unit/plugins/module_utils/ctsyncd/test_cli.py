# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The command line against a real control socket."""

from __future__ import annotations

import base64
import json
import pathlib
import selectors
import subprocess
import sys
import threading
import time
from typing import Any, Callable, Iterator

import pytest
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import cli, control, netlink, verification

PACKAGE = pathlib.Path(cli.__file__).parent


def write_config(directory: pathlib.Path, **changes: Any) -> str:
    document = {
        "node": "fw1",
        "peers": [{"node": "fw2", "address": "192.168.100.2"}],
        "link": {"interface": "eth2", "address": "192.168.100.1"},
        "virtual_ips": [
            {"interface": "eth1", "address": "192.168.0.100"},
            {"interface": "eth0", "address": "192.168.1.100"},
        ],
        "keys": {"1": "key-1"},
        "control_socket": str(directory / "c.sock"),
        "track_file": str(directory / "not-ready"),
        **changes,
    }
    file = directory / "ctsyncd.conf"
    file.write_text(json.dumps(document))
    return str(file)


class Daemon(threading.Thread):
    """A daemon as far as the control socket goes; remembers the requests."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.requests: list[dict[str, Any]] = []
        self.answer: Callable[[dict[str, Any]], control.Response] = lambda request: (b"done\n",)
        self.stopping = False
        self.server = control.ControlServer(path, self.handle)
        self.server.open()

    def handle(self, request: dict[str, Any]) -> control.Response:
        self.requests.append(request)
        if request["command"] == "kill":
            self.stopping = True
        return self.answer(request)

    def run(self) -> None:
        with selectors.DefaultSelector() as selector:
            self.server.register(selector)
            while not self.stopping or len(self.server):
                for key, mask in selector.select(0.01):
                    key.data.handle(key, mask, time.monotonic())
                self.server.tick(time.monotonic())
            if self.requests and self.requests[-1]["command"] == "kill":
                time.sleep(0.2)  # a daemon stops a while after its answer
            self.server.close()


@pytest.fixture
def daemon(tmp_path: pathlib.Path) -> Iterator[Daemon]:
    write_config(tmp_path)
    thread = Daemon(str(tmp_path / "c.sock"))
    thread.start()
    yield thread
    thread.stopping = True
    thread.join()


@pytest.fixture
def run(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command line with the test's configuration: exit status, stdout, stderr."""

    def command(*arguments: str) -> tuple[int, str, str]:
        status = cli.main(["-C", str(tmp_path / "ctsyncd.conf"), *arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return command


Run = Callable[..., "tuple[int, str, str]"]


@pytest.mark.parametrize(
    ("arguments", "request_"),
    [
        (["-i"], {"command": "internal", "format": "text"}),
        (["-i", "ct", "-x"], {"command": "internal", "format": "xml"}),
        (["-x", "-e"], {"command": "external", "format": "xml"}),
        (["-ex"], {"command": "external", "format": "xml"}),
        (["-e", "--json"], {"command": "external", "format": "json"}),
        (["-i", "exp"], {"command": "internal", "format": "text", "table": "expect"}),
        (["-e", "expect", "-x"], {"command": "external", "format": "xml", "table": "expect"}),
        (["-s", "exp"], {"command": "stats", "section": "expect"}),
        (["-c"], {"command": "commit"}),
        (["-f"], {"command": "flush", "which": "all"}),
        (["-f", "int"], {"command": "flush", "which": "internal"}),
        (["-f", "external"], {"command": "flush", "which": "external"}),
        (["-F"], {"command": "flush-kernel"}),
        (["-R"], {"command": "resync"}),
        (["-B"], {"command": "bulk"}),
        (["-n"], {"command": "request"}),
        (["-s"], {"command": "stats", "section": "summary"}),
        (["-s", "network"], {"command": "stats", "section": "network"}),
        (["-s", "rsq"], {"command": "stats", "section": "queue"}),
        (["-s", "multicast"], {"command": "stats", "section": "link"}),
        (["-t"], {"command": "purge"}),
    ],
)
def test_letters_become_requests(daemon: Daemon, run: Run, arguments: list[str], request_: dict[str, Any]) -> None:
    assert run(*arguments) == (0, "done\n", "")
    assert daemon.requests == [request_]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-z"], "unknown option '-z'"),
        (["-iz"], "unknown option '-iz'"),
        (["--jsn"], "unknown option '--jsn'"),
        (["start"], "unknown word 'start'"),
        (["-i", "-e"], "-i and -e cannot be combined"),
        (["-d", "-i"], "-d and -i cannot be combined"),
        (["status", "check-config"], "cannot be combined"),
        (["-x"], "-x belongs to -i or -e"),
        (["-s", "-x"], "-x belongs to -i or -e"),
        (["-i", "-x", "--json"], "-x and --json cannot be combined"),
        (["--json"], "--json belongs to"),
        (["-f", "both"], "-f 'both': not known: write one of internal, external"),
        (["-s", "nonsense"], "write one of network,"),
        (["-s", ""], "write one of network,"),
        (["-B", "now"], "write nothing after it"),
        (["-F", "exp"], "-F 'exp': not known: write one of ct"),
        (["gate"], "gate needs --not-ready"),
        (["status", "--not-ready"], "--not-ready belongs to gate"),
        (["status", "--keys"], "--keys belongs to check-config"),
        (["-C"], "-C needs the path"),
    ],
)
def test_a_wrong_command_line_is_explained(capsys: pytest.CaptureFixture[str], arguments: list[str], says: str) -> None:
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("ctsyncd: ")
    assert says in captured.err.splitlines()[0]
    assert "Usage: ctsyncd" in captured.err


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["-v"]) == 0
    assert capsys.readouterr().out == "ctsyncd 0.1.0\n"
    assert cli.main(["-h"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {letter} " in text for letter in cli._REQUESTS)
    assert all(f"\n  {word} " in text for word in cli._WORDS)


def test_failures_of_the_daemon_are_the_exit_status(daemon: Daemon, run: Run) -> None:
    def answer(request: dict[str, Any]) -> control.Response:
        def pieces() -> Iterator[bytes]:
            yield b"committed 3 flows\n"
            raise control.ControlError("2 flows cannot be committed", 4)

        return pieces()

    daemon.answer = answer
    assert run("-c") == (4, "committed 3 flows\n", "ctsyncd: 2 flows cannot be committed\n")


def test_objects_are_rendered_for_people(daemon: Daemon, run: Run) -> None:
    daemon.answer = lambda request: {"cache internal": {"active_connections": 9}}
    assert run("-s")[1].split() == ["cache", "internal:", "active", "connections:", "9"]
    assert json.loads(run("-s", "--json")[1]) == {"cache internal": {"active_connections": 9}}


@pytest.mark.parametrize(("verdict", "status"), [("READY", 0), ("DEGRADED", 1), ("NOT READY", 2), ("odd", 2)])
def test_status_is_the_verdict(daemon: Daemon, run: Run, verdict: str, status: int) -> None:
    document = {
        "schema": 1,
        "version": "0.1.0",
        "node": "fw1",
        "verdict": verdict,
        "reasons": ["why"],
        "role": "backup",
    }
    daemon.answer = lambda request: document
    code, out, err = run("status")
    assert (code, err) == (status, "")
    assert out.splitlines()[:2] == [f"{verdict}: why", "  node        fw1 (backup)"]
    code, out, err = run("status", "--json")
    assert (code, json.loads(out)) == (status, document)


FLOW = {
    "protocol": "tcp",
    "protonum": 6,
    "family": "ipv4",
    "zone": 5,
    "orig": {"src": "10.9.0.1", "dst": "198.51.100.7", "sport": 1001, "dport": 443},
}
COMPARED = {"schema": 1, "active": "fw1", "backup": "fw2", "reason": ""}
COMPARED_ONE = {"active": "fw1", "reason": "", "equal": True, "flows": 3, "differences": []}
DIFFERENT = [{"kind": "missing", "count": 3, "flows": [FLOW]}, {"kind": "kernel_differs", "count": 1, "flows": []}]


@pytest.mark.parametrize(
    ("answer", "status", "text"),
    [
        (
            {**COMPARED, "equal": True, "flows": 9, "differences": []},
            0,
            "equal: 9 flows on fw1 and fw2\n",
        ),
        (
            {**COMPARED, "equal": False, "flows": 9, "differences": DIFFERENT},
            1,
            "different: of 9 flows of fw1\n"
            "3 missing on fw2: fw1 has them\n"
            "  tcp      6 src=10.9.0.1 dst=198.51.100.7 sport=1001 dport=443 zone=5\n"
            "  and 2 more\n"
            "1 different in the kernel of fw2 from its external cache\n"
            "  and 1 more\n",
        ),
        (
            {**COMPARED, "equal": None, "reason": "fw2 is silent", "flows": None, "differences": []},
            2,
            "cannot tell: fw2 is silent\n",
        ),
        (
            verification.together(
                [
                    {**COMPARED_ONE, "backup": "fw2"},
                    {**COMPARED_ONE, "backup": "fw3", "equal": False, "flows": 9, "differences": DIFFERENT[1:]},
                    {**COMPARED_ONE, "backup": "fw4", "equal": None, "reason": "fw4 is silent", "flows": None},
                ]
            ),
            1,
            "equal: 3 flows on fw1 and fw2\n"
            "different: of 9 flows of fw1\n"
            "1 different in the kernel of fw3 from its external cache\n"
            "  and 1 more\n"
            "cannot tell of fw4: fw4 is silent\n",
        ),
        (
            verification.together(
                [
                    {**COMPARED_ONE, "backup": "fw2"},
                    {**COMPARED_ONE, "backup": "fw3", "equal": None, "reason": "no session with fw3", "flows": None},
                ]
            ),
            2,
            "equal: 3 flows on fw1 and fw2\ncannot tell of fw3: no session with fw3\n",
        ),
    ],
)
def test_verify_is_an_exit_status(daemon: Daemon, run: Run, answer: dict[str, Any], status: int, text: str) -> None:
    daemon.answer = lambda request: answer
    assert run("verify") == (status, text, "")
    code, out, err = run("verify", "--json")
    assert (code, json.loads(out), err) == (status, answer, "")
    assert daemon.requests == [{"command": "verify"}] * 2


def test_verify_without_a_daemon_cannot_tell(tmp_path: pathlib.Path, run: Run) -> None:
    write_config(tmp_path)
    code, out, err = run("verify")
    assert (code, out.startswith("cannot tell: "), err) == (2, True, "")
    code, out, err = run("verify", "--json")
    assert (code, json.loads(out)["equal"], err) == (2, None, "")


def test_status_without_a_daemon(tmp_path: pathlib.Path, run: Run) -> None:
    write_config(tmp_path)
    code, out, err = run("status")
    assert (code, out) == (2, "NOT READY: ctsyncd does not answer\n")
    assert "systemctl start ctsyncd" in err
    code, out, err = run("status", "--json")
    assert code == 2
    assert json.loads(out) == {
        "schema": 1,
        "version": "0.1.0",
        "verdict": "NOT READY",
        "reasons": ["ctsyncd does not answer"],
    }
    code, out, err = run("-i")
    assert (code, out) == (1, "")
    assert err == f"ctsyncd: ctsyncd is not running (no {tmp_path}/c.sock): systemctl start ctsyncd\n"


def test_a_client_needs_no_valid_configuration(daemon: Daemon, tmp_path: pathlib.Path, run: Run) -> None:
    write_config(tmp_path, nonsense=True, keys={})
    assert run("-i") == (0, "done\n", "")


def test_kill_waits_until_the_socket_is_gone(daemon: Daemon, tmp_path: pathlib.Path, run: Run) -> None:
    assert run("-k") == (0, "done\n", "")
    assert not (tmp_path / "c.sock").exists()
    assert run("-k")[0] == 1


def test_kill_says_when_the_daemon_does_not_stop(daemon: Daemon, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon.server, "handler", lambda request: (b"stopping\n",))
    monkeypatch.setattr(cli, "STOP_TIMEOUT_S", 0.2)
    code, out, err = run("-k")
    assert (code, out) == (1, "stopping\n")
    assert "still runs after 0.2 s" in err


def test_check_config(tmp_path: pathlib.Path, run: Run) -> None:
    write_config(tmp_path)
    assert run("check-config") == (0, "", "")
    write_config(tmp_path, mode="warm", link={"interface": "eth2", "address": "x"})
    code, out, err = run("check-config")
    assert (code, out) == (2, "")
    assert [line.split(": ")[2] for line in err.splitlines()] == ["link.address", "mode"]
    assert run()[0] == 2, "the daemon does not start with it"


def test_keys_are_read_and_handed_over(tmp_path: pathlib.Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = base64.b64encode(bytes(range(32))).decode()
    (tmp_path / "keys").mkdir()
    file = tmp_path / "keys" / "1.key"
    write_config(tmp_path)
    asked: list[dict[str, Any]] = []

    def request(path: str, message: dict[str, Any], timeout_s: float) -> list[str]:
        asked.append(message)
        return ["accepts 1, sends with 1"]

    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    monkeypatch.setattr(cli.client, "request", request)
    code, _out, err = run("keys")
    assert code == 2 and "1.key: cannot be read" in err and asked == []
    file.write_text(secret + "\n")
    file.chmod(0o600)
    assert run("keys") == (0, "accepts 1, sends with 1\n", "")
    assert asked == [{"command": "keys", "keys": {"1": secret}}]


def test_check_config_looks_at_the_keys(tmp_path: pathlib.Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    write_config(tmp_path, keys={"1": "key-1", "2": str(tmp_path / "two")}, send_key=1)
    code, _out, err = run("check-config", "--keys")
    assert code == 2
    assert [line.split(": ")[1] for line in err.splitlines()] == ["key 1", "key 2"]
    (tmp_path / "keys").mkdir()
    for file in (tmp_path / "keys" / "1.key", tmp_path / "two"):
        file.write_text("QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVphYmNkZWY=\n")
        file.chmod(0o600)
    assert run("check-config", "--keys") == (0, "", "")


VIPS = {bytes((192, 168, 0, 100)), bytes((192, 168, 1, 100))}


@pytest.mark.parametrize(
    ("held", "after"), [(set(), "2\n"), (VIPS, "0\n"), ({bytes((192, 168, 0, 100))}, "2\n"), (None, "2\n")]
)
def test_gate(
    tmp_path: pathlib.Path, run: Run, monkeypatch: pytest.MonkeyPatch, held: set[bytes] | None, after: str
) -> None:
    def addresses() -> set[bytes]:
        if held is None:
            raise OSError(1, "Operation not permitted")
        return {bytes((127, 0, 0, 1))} | held

    monkeypatch.setattr(netlink, "local_addresses", addresses)
    write_config(tmp_path)
    (tmp_path / "not-ready").write_text("0\n")
    assert run("gate", "--not-ready")[:2] == (0, "")
    assert (tmp_path / "not-ready").read_text() == after


def test_gate_asks_the_real_kernel(tmp_path: pathlib.Path, run: Run) -> None:
    write_config(tmp_path, virtual_ips=[{"interface": "lo", "address": "127.0.0.1"}])
    (tmp_path / "not-ready").write_text("0\n")
    assert run("gate", "--not-ready") == (0, "", "")
    assert (tmp_path / "not-ready").read_text() == "0\n"


def test_gate_is_on_the_safe_side(tmp_path: pathlib.Path, run: Run) -> None:
    write_config(tmp_path, virtual_ips=[])
    code, _out, err = run("gate", "--not-ready")
    assert code == 1
    assert "not-ready: No such file" in err
    (tmp_path / "not-ready").write_text("0\n")
    code, _out, err = run("gate", "--not-ready")
    assert code == 0
    assert "virtual_ips" in err
    assert (tmp_path / "not-ready").read_text() == "2\n"


def test_a_reader_that_leaves_is_no_error(daemon: Daemon, tmp_path: pathlib.Path) -> None:
    """``ctsyncd -i | head``, as a process of its own with only the standard library."""
    daemon.answer = lambda request: (b"tcp      6 ESTABLISHED\n" * 1000 for _ in range(1000))
    code = (
        f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r}); import ctsyncd.cli as c;"
        f"raise SystemExit(c.main(['-C', {str(tmp_path / 'ctsyncd.conf')!r}, '-i']))"
    )
    command = [sys.executable, "-I", "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == b"tcp      6 ESTABLISHED\n"
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == cli.BROKEN_PIPE


def test_client_commands_do_without_the_daemons_rooms() -> None:
    """Each module is compiled anew for each command: asking the daemon needs next to none of them."""
    code = (
        f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r}); import ctsyncd.cli;"
        "sys.stdout.write(' '.join(sorted(name for name in sys.modules if name.startswith('ctsyncd.'))))"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], check=True, capture_output=True, text=True)
    names = {name.split(".")[1] for name in done.stdout.split()}
    assert names == {"cli", "client", "errors"}
