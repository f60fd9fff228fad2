# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The sessions program sees what it exists to see: loss, doubles, silence, resets, death."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import shlex
import socket
import struct
import sys
import time
import types

import pytest


@pytest.fixture(scope="module")
def program(request):
    return request.config.rootpath / "roles/failover_test/files/ctsync_sessions.py"


@pytest.fixture(scope="module")
def sessions(program):
    spec = importlib.util.spec_from_file_location("ctsync_sessions", program)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        ([1, 2, 3], (0, 0, 0)),
        ([1, 2, 5], (2, 0, 0)),
        ([1, 3, 2, 4], (0, 0, 1)),
        ([1, 2, 2, 3], (0, 1, 0)),
        ([2, 3], (1, 0, 0)),
        ([1, 4, 2, 2, 5], (1, 1, 1)),
    ],
)
def test_sequence_numbers_are_judged(sessions, seen, expected):
    checker = sessions.Checker()
    for number in seen:
        checker.take(number)
    found = checker.as_dict()
    assert (found["lost"], found["duplicated"], found["reordered"]) == expected
    assert found["received"] == len(seen)


def test_silences_and_bytes_are_recorded(sessions):
    arrivals = sessions.Arrivals(0.1)
    for when in (10.0, 10.1, 10.24, 11.0, 11.1):
        arrivals.note(when, 50)
    found = arrivals.as_dict(0)
    assert found["gaps"] == [[10.24, 11.0]]
    assert found["bytes"] == 250 == sum(size for _index, size in found["series"])
    assert found["series"][0] == [100, 50]
    assert arrivals.as_dict(10.95)["series"] == [[110, 50], [111, 50]]


def test_the_longest_silences_are_kept(sessions, monkeypatch):
    monkeypatch.setattr(sessions, "GAPS_KEPT", 3)
    arrivals = sessions.Arrivals()
    when = 0.0
    for pause in (1, 5, 0.1, 0.2, 3, 0.3):
        when += pause
        arrivals.note(when, 1)
    assert [round(end - start, 1) for start, end in arrivals.gaps] == [5, 3, 0.3]


def test_an_altered_line_is_recognised(sessions):
    line = sessions.encode("S", 7, "3 192.168.1.100 51356 x y")
    assert sessions.decode(line) == ("S", 7, "3 192.168.1.100 51356 x y")
    for bad in (line[:-1], line[:12] + b"!" + line[13:], line.replace(b" 7 ", b" 8 "), b"\n", b"zz S 1 x\n"):
        with pytest.raises(ValueError):
            sessions.decode(bad)


@pytest.mark.parametrize("count", [10, 12, 200])
def test_every_kind_is_among_the_sessions(sessions, count):
    plan = sessions.Client.plan(count)
    assert len(plan) == count
    assert all(plan.count(kind) >= 2 for kind in ("busy", "bulk", "idle"))


def test_the_address_of_a_socket_is_read_from_proc(sessions):
    packed = struct.unpack("=I", socket.inet_aton("192.168.0.3"))[0]
    assert sessions.unhex(f"{packed:08X}:C89C") == ("192.168.0.3", 51356)


class Path:
    """A way from client to server that can hold back, double, drop or reset what passes."""

    def __init__(self, port):
        self.target = port
        self.held = False
        self.spoil = None
        self.writers = []

    async def start(self):
        server = await asyncio.start_server(self.accept, "127.0.0.1", 0)
        return server.sockets[0].getsockname()[1]

    async def accept(self, reader, writer):
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target)
        self.writers += [writer, far_writer]
        await asyncio.gather(self.pump(reader, far_writer, False), self.pump(far_reader, writer, True))

    async def pump(self, reader, writer, back):
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                line = await reader.readuntil(b"\n")
                while self.held:
                    await asyncio.sleep(0.01)
                if back and self.spoil and b" S " in line:
                    line, self.spoil = self.spoil(line), None
                writer.write(line)
        writer.close()

    def reset(self):
        for writer in self.writers:
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()


class Bench:
    """Server, path and client in one event loop."""

    def __init__(self, sessions, directory, ssh=()):
        self.sessions = sessions
        self.directory = directory
        self.ssh = ssh

    async def __aenter__(self):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        options = types.SimpleNamespace(run_dir=str(self.directory), listen=f"127.0.0.1:{port}")
        self.server = self.sessions.Server(options)
        await self.server.start()
        self.path = Path(port)
        connect = f"127.0.0.1:{await self.path.start()}"
        options = types.SimpleNamespace(
            connect=connect, ssh=json.dumps(self.ssh) if self.ssh else "", sessions=10, open_timeout=30
        )
        self.client = self.sessions.Client(options)
        await self.client.start()
        return self

    async def __aexit__(self, *_error):
        await self.client.close()
        await self.server.close()

    async def ask(self, command, **arguments):
        return await self.client.request(command, arguments)

    async def settle(self):
        assert (await self.ask("settle", after=self.sessions.now(), timeout=30))["settled"]

    async def snapshot(self):
        return {one["name"]: one for one in (await self.ask("snapshot"))["sessions"]}


def bench(sessions, directory, scenario, ssh=()):
    async def play():
        async with Bench(sessions, directory, ssh) as made:
            await scenario(made)

    asyncio.run(asyncio.wait_for(play(), 120))


def test_every_line_is_accounted_for(sessions, tmp_path):
    async def scenario(made):
        await made.settle()
        answers = (await made.ask("poke", timeout=30))["answers_ms"]
        assert answers and None not in answers.values()
        fresh = await made.ask("fresh", timeout=30)
        assert fresh["tcp"] and fresh["ssh"] is None
        assert (await made.ask("finish", timeout=30))["unfinished"] == []
        far = {one["name"]: one for one in (await made.server.request("snapshot", {}))["sessions"]}
        for name, near in (await made.snapshot()).items():
            assert near["alive"] and near["verified"]["received"] == near["sent"] == far[name]["received"]
            assert near["received"] == far[name]["sent"]
            assert near["lost"] == near["duplicated"] == near["reordered"] == near["corrupt"] == 0
            assert near["seen_as"] == list(far[name]["peer"])

    bench(sessions, tmp_path, scenario)


def test_a_silence_is_measured(sessions, tmp_path):
    async def scenario(made):
        await made.settle()
        begun = time.time()
        made.path.held = True
        await asyncio.sleep(1.0)
        made.path.held = False
        held = time.time() - begun
        await made.settle()
        for one in (await made.snapshot()).values():
            if one["kind"] != "idle":
                longest = max(end - start for start, end in one["rx"]["gaps"])
                assert 0.8 < longest < held + 5
                assert one["lost"] == 0

    bench(sessions, tmp_path, scenario)


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (lambda line: b"", "lost"),
        (lambda line: line + line, "duplicated"),
        (lambda line: line[:-2] + b"?\n", "corrupt"),
    ],
)
def test_a_spoilt_line_is_noticed(sessions, tmp_path, spoil, fault):
    async def scenario(made):
        await made.settle()
        made.path.spoil = spoil
        while made.path.spoil:
            await asyncio.sleep(0.02)
        await made.settle()
        assert sum(one[fault] for one in (await made.snapshot()).values()) == 1

    bench(sessions, tmp_path, scenario)


def test_a_reset_is_reported_as_one(sessions, tmp_path):
    async def scenario(made):
        await made.settle()
        made.path.reset()
        deadline = time.monotonic() + 30
        while any(one["alive"] for one in (await made.snapshot()).values()) and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        found = await made.snapshot()
        assert all(not one["alive"] for one in found.values())
        assert any("ECONNRESET" in one["error"] for one in found.values())
        answer = await made.ask("settle", after=sessions.now(), timeout=60)
        assert not answer["settled"], "sessions that are dead must not be waited for as if they were late"
        assert set((await made.ask("poke", timeout=5))["answers_ms"].values()) == {None}

    bench(sessions, tmp_path, scenario)


def test_a_dead_path_keeps_silent_and_kills_ssh(sessions, program, tmp_path):
    # What stands in for ssh: the relay itself, which ends with rc 255 when the path is cut.
    relay = " ".join(shlex.quote(part) for part in (sys.executable, str(program), "relay", "--run-dir", str(tmp_path)))
    script = tmp_path / "ssh"
    script.write_text(
        f"#!/bin/sh\nexport SSH_CONNECTION='192.168.1.100 51356 192.168.1.3 22'\n{relay} &\n"
        f"while kill -0 $! && ! [ -e {tmp_path}/cut ]; do sleep 0.1; done 2>/dev/null\n"
        "kill $!; echo 'Timeout, server not responding.' >&2; exit 255\n"
    )
    script.chmod(0o755)

    async def scenario(made):
        await made.settle()
        found = (await made.snapshot())["ssh"]
        assert found["seen_as"] == ["192.168.1.100", 51356] and found["pid"]
        assert not (await made.ask("await-ssh-end", timeout=0.2))["ended"]
        made.path.held = True
        (tmp_path / "cut").touch()
        ended = await made.ask("await-ssh-end", timeout=30)
        assert ended["ended"] and ended["rc"] == 255
        found = (await made.snapshot())["ssh"]
        assert not found["alive"] and "Timeout" in found["stderr"] and found["error"] == "ssh ended with rc 255"
        assert set((await made.ask("poke", timeout=0.5))["answers_ms"].values()) == {None}

    # a background process of a shell has /dev/null as its standard input, unless it is told otherwise
    script.write_text(script.read_text().replace(f"{relay} &", f"exec 3<&0; {relay} <&3 &"))
    bench(sessions, tmp_path, scenario, ssh=[str(script), "x"])


def test_a_client_that_cannot_connect_says_why(sessions, program, tmp_path, capfd):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        arguments = ["client", "--run-dir", str(tmp_path), "--connect", f"127.0.0.1:{port}", "--sessions", "10"]
        assert sessions.main(arguments) == 1
    assert "ECONNREFUSED" in capfd.readouterr().err
    assert sessions.main(["ctl", "--run-dir", str(tmp_path), "client", "snapshot"]) == 2
    assert "no client runs" in capfd.readouterr().err
