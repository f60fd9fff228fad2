# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The control socket with real sockets: honest clients, and hostile ones."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import selectors
import socket
import stat
import threading
import time
from typing import Any, Callable, Iterator

import pytest
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import client, control
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.client import ControlError
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.control import ControlServer

DEADLINE_S = 30.0


class Loop:
    """The owner of a server: its event loop, in the test's hands, with a clock that the test can move."""

    def __init__(self, server: ControlServer) -> None:
        self.server = server
        self.selector = selectors.DefaultSelector()
        self.offset_s = 0.0
        self.turns = 0
        server.open()
        server.register(self.selector)

    def now(self) -> float:
        return time.monotonic() + self.offset_s

    def turn(self, timeout_s: float = 0.0) -> None:
        self.turns += 1
        for key, mask in self.selector.select(timeout_s):
            assert key.data is self.server
            self.server.handle(key, mask, self.now())
        deadline = self.server.next_deadline()
        if deadline is not None and deadline <= self.now():
            self.server.tick(self.now())

    def until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < end, "the condition did not come true"
            self.turn(0.005)

    def ask(self, message: dict[str, Any]) -> list[str]:
        """The client's own function, in a thread, while this loop serves it."""
        lines: list[str] = []
        errors: list[ControlError] = []

        def run() -> None:
            try:
                lines.extend(client.request(self.server.path, message, DEADLINE_S))
            except ControlError as error:
                errors.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        self.until(lambda: not thread.is_alive())
        if errors:
            raise errors[0]
        return lines


@pytest.fixture
def serve(tmp_path: pathlib.Path) -> Iterator[Callable[..., Loop]]:
    loops: list[Loop] = []

    def start(handler: control.Handler, **options: Any) -> Loop:
        loops.append(Loop(ControlServer(str(tmp_path / "c.sock"), handler, **options)))
        return loops[-1]

    yield start
    for loop in loops:
        loop.server.close()
        assert not loop.selector.get_map()
        loop.selector.close()


def connect(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(DEADLINE_S)
    sock.connect(path)
    return sock


def read_all(loop: Loop, sock: socket.socket) -> bytes:
    sock.setblocking(False)
    data = bytearray()

    def done() -> bool:
        with contextlib.suppress(BlockingIOError):
            while True:
                piece = sock.recv(1 << 20)
                if not piece:
                    return True
                data.extend(piece)
        return False

    loop.until(done)
    return bytes(data)


def echo(request: dict[str, Any]) -> control.Response:
    return {"you": request["command"]}


def test_a_dict_is_one_line_and_the_socket_is_private(serve: Callable[..., Loop]) -> None:
    before = os.umask(0)
    try:
        loop = serve(echo)
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(loop.server.path).st_mode) == 0o600
    assert loop.ask({"command": "status"}) == ['{"you": "status"}']
    sock = connect(loop.server.path)
    sock.sendall(b'{"command": "x"}\n')
    assert read_all(loop, sock) == b'{"you": "x"}\n{"ok": true, "exit": 0}\n'
    sock.close()
    assert len(loop.server) == 0


def test_failures_reach_the_client(serve: Callable[..., Loop], caplog: pytest.LogCaptureFixture) -> None:
    def handler(request: dict[str, Any]) -> control.Response:
        if request["command"] == "refuse":
            raise ControlError("a commit is running", 3)
        if request["command"] == "crash":
            raise ZeroDivisionError("bug")

        def pieces() -> Iterator[bytes]:
            yield b"first\nunfinished"
            if request["command"] == "late refusal":
                raise ControlError("the kernel went away", 1)
            raise ZeroDivisionError("bug")

        return pieces()

    loop = serve(handler)
    with pytest.raises(ControlError, match="a commit is running") as caught:
        loop.ask({"command": "refuse"})
    assert caught.value.exit == 3
    with pytest.raises(ControlError, match="internal error"):
        loop.ask({"command": "crash"})
    with pytest.raises(ControlError, match="the kernel went away"):
        loop.ask({"command": "late refusal"})
    with pytest.raises(ControlError, match="internal error"):
        loop.ask({"command": "late crash"})
    assert caplog.text.count("ZeroDivisionError: bug") == 2
    assert loop.server.counters["failed"] == 4


def test_a_long_dump_arrives_whole_and_costs_one_piece(serve: Callable[..., Loop]) -> None:
    """A client that stops reading stops the iterator; other clients are served meanwhile."""
    line = b"tcp      6 ESTABLISHED " + b"x" * 177 + b"\n"
    produced = 0
    closed = []

    def handler(request: dict[str, Any]) -> control.Response:
        if request["command"] == "status":
            return {"verdict": "READY"}

        def pieces() -> Iterator[bytes]:
            nonlocal produced
            try:
                for _ in range(2000):
                    produced += 100
                    yield line * 100
            finally:
                closed.append(True)

        return pieces()

    loop = serve(handler)
    slow = connect(loop.server.path)
    slow.sendall(b'{"command": "internal"}\n')
    loop.until(lambda: produced > 0)
    for _ in range(50):
        loop.turn(0.001)
    stalled = produced
    assert stalled * len(line) < 2 << 20, "only the socket's buffer and one piece are filled"
    assert loop.ask({"command": "status"}) == ['{"verdict": "READY"}']
    assert produced == stalled
    data = read_all(loop, slow)
    assert data == line * 200_000 + b'{"ok": true, "exit": 0}\n'
    assert closed == [True]
    slow.close()


def test_one_dump_does_not_hold_the_loop(serve: Callable[..., Loop]) -> None:
    def handler(request: dict[str, Any]) -> control.Response:
        return (b"line\n" * 1000 for _ in range(4000))

    loop = serve(handler)
    lines = loop.ask({"command": "internal"})
    assert len(lines) == 4_000_000
    assert loop.turns > 20_000_000 // control.TURN_BYTES // 2, "20 MB take many turns"


def test_a_handler_may_have_nothing_yet(serve: Callable[..., Loop]) -> None:
    done = threading.Event()

    def handler(request: dict[str, Any]) -> control.Response:
        if request["command"] == "finish":
            done.set()
            return {}

        def pieces() -> Iterator[bytes]:
            yield b"committing\n"
            while not done.is_set():
                yield b""
            yield b"committed 3\n"

        return pieces()

    loop = serve(handler)
    waiting = connect(loop.server.path)
    waiting.sendall(b'{"command": "commit"}\n')
    loop.until(lambda: len(loop.server) == 1 and bool(loop.server.next_deadline()))
    before = loop.turns
    end = time.monotonic() + 0.3
    while time.monotonic() < end:
        loop.turn(control.WAIT_S)
    assert loop.turns - before < 100, "waiting is not spinning"
    assert loop.ask({"command": "finish"}) == ["{}"]
    assert read_all(loop, waiting) == b'committing\ncommitted 3\n{"ok": true, "exit": 0}\n'
    waiting.close()


def test_a_handler_that_works_in_silence_is_not_made_to_wait(serve: Callable[..., Loop]) -> None:
    """A million flows of which none is printed: asked on and on, yet others are served in between."""
    steps = 0
    served = False

    def handler(request: dict[str, Any]) -> control.Response:
        nonlocal served
        if request["command"] == "status":
            served = True
            return {}

        def pieces() -> Iterator[bytes | None]:
            nonlocal steps
            while not served:
                steps += 1
                yield None
            yield b"one\n"

        return pieces()

    loop = serve(handler)
    dump = connect(loop.server.path)
    dump.sendall(b'{"command": "internal"}\n')
    loop.until(lambda: steps > 0)
    deadline = loop.server.next_deadline()
    assert deadline is not None and deadline <= loop.now(), "it wants the next turn at once"
    assert loop.ask({"command": "status"}) == ["{}"]
    assert read_all(loop, dump) == b'one\n{"ok": true, "exit": 0}\n'
    assert steps > loop.turns, "several steps per turn"
    dump.close()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\n", "not a JSON object"),
        (b"GET / HTTP/1.1\r\n\r\n", "not a JSON object"),
        (b"[1]\n", "not a JSON object"),
        (b'{"command": 7}\n', "not a JSON object"),
        (b"\xff\xfe\x00\n", "not a JSON object"),
        (b"[" * 60_000 + b"\n", "not a JSON object"),
        (b"x" * 70_000, "longer than"),
        (b"x" * 70_000 + b"\n", "longer than"),
    ],
)
def test_garbage_gets_an_answer(serve: Callable[..., Loop], data: bytes, reason: str) -> None:
    loop = serve(echo)
    sock = connect(loop.server.path)
    sock.sendall(data)
    answer = b""
    with contextlib.suppress(ConnectionResetError):
        answer = read_all(loop, sock)
    end = json.loads(answer)
    assert end["ok"] is False
    assert reason in end["error"]
    sock.close()
    assert loop.server.counters["refused"] == 1
    assert loop.ask({"command": "alive"}) == ['{"you": "alive"}']


def test_a_megabyte_without_a_newline_is_cut_off(serve: Callable[..., Loop]) -> None:
    loop = serve(echo)
    sock = connect(loop.server.path)
    sock.setblocking(False)
    sent = 0

    def cut_off() -> bool:
        nonlocal sent
        try:
            sent += sock.send(b"x" * 16_384)
        except BlockingIOError:
            return False
        except (BrokenPipeError, ConnectionResetError):
            return True
        return False

    loop.until(cut_off)
    assert sent < 1 << 20
    assert len(loop.server) == 0
    sock.close()


def test_silent_and_slow_clients_are_dropped(serve: Callable[..., Loop]) -> None:
    closed = []

    def handler(request: dict[str, Any]) -> control.Response:
        def pieces() -> Iterator[bytes]:
            try:
                while True:
                    yield b"y" * 65_535 + b"\n"
            finally:
                closed.append(True)

        return pieces()

    loop = serve(handler)
    silent, never_reads = connect(loop.server.path), connect(loop.server.path)
    never_reads.sendall(b'{"command": "endless"}\n')
    loop.until(lambda: len(loop.server) == 2)
    for _ in range(50):
        loop.turn(0.001)
    loop.offset_s += control.REQUEST_S + 0.1
    loop.turn()
    assert len(loop.server) == 1
    assert silent.recv(10) == b""
    loop.offset_s += control.STALL_S + 0.1
    loop.turn()
    assert len(loop.server) == 0
    assert closed == [True]
    assert loop.server.counters["dropped"] == 2
    assert loop.server.next_deadline() is None
    silent.close()
    never_reads.close()


def test_a_hundred_connections_do_not_keep_an_honest_client_out(serve: Callable[..., Loop]) -> None:
    loop = serve(echo, max_clients=4)
    hundred = []
    for _ in range(100):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
        loop.until(lambda sock=sock: sock.connect_ex(loop.server.path) in (0, 106))
        hundred.append(sock)
        loop.turn()
        assert len(loop.server) <= 4
    assert loop.ask({"command": "status"}) == ['{"you": "status"}']
    for sock in hundred:
        sock.close()
    loop.until(lambda: len(loop.server) == 0)


def test_a_full_house_says_so(serve: Callable[..., Loop]) -> None:
    def handler(request: dict[str, Any]) -> control.Response:
        return (b"" for _ in range(1_000_000_000))

    loop = serve(handler, max_clients=2)
    busy = [connect(loop.server.path) for _ in range(2)]
    for sock in busy:
        sock.sendall(b'{"command": "commit"}\n')
    loop.until(lambda: loop.server.counters["requests"] == 2)
    with pytest.raises(ControlError, match="busy"):
        loop.ask({"command": "status"})
    for sock in busy:
        sock.close()


def test_a_client_that_leaves_costs_nothing(serve: Callable[..., Loop]) -> None:
    loop = serve(lambda request: (b"z" * 65_536 for _ in range(1000)))
    for data in (b"", b'{"comm', b'{"command": "internal"}\n'):
        sock = connect(loop.server.path)
        sock.sendall(data)
        loop.turn(0.1)
        sock.close()
    loop.until(lambda: len(loop.server) == 0)
    assert [key.fileobj for key in loop.selector.get_map().values()] == [loop.server._listener]


def test_another_user_is_refused(serve: Callable[..., Loop], monkeypatch: pytest.MonkeyPatch) -> None:
    loop = serve(echo)
    monkeypatch.setattr(control.struct, "unpack", lambda layout, raw: (1, 65_534, 65_534))
    with pytest.raises(ControlError, match="permission denied"):
        loop.ask({"command": "status"})
    assert loop.server.counters == {"requests": 0, "refused": 1, "dropped": 0, "failed": 0}


def test_privileged_command_is_for_root_only(serve: Callable[..., Loop], monkeypatch: pytest.MonkeyPatch) -> None:
    loop = serve(echo, privileged=("keys",))
    uids = [os.geteuid()]
    monkeypatch.setattr(control, "_uid", lambda sock: uids[0])
    monkeypatch.setattr(control.os, "geteuid", lambda: 990)
    uids[0] = 990  # the daemon's own user
    assert loop.ask({"command": "status"})
    with pytest.raises(ControlError, match="only root may ask for keys"):
        loop.ask({"command": "keys", "keys": {"1": "secret"}})
    uids[0] = 0
    assert loop.ask({"command": "keys"})
    assert loop.server.counters == {"requests": 2, "refused": 1, "dropped": 0, "failed": 0}


def test_only_a_stale_socket_is_replaced(tmp_path: pathlib.Path) -> None:
    path = str(tmp_path / "c.sock")
    first = ControlServer(path, echo)
    first.open()
    with pytest.raises(ControlError, match="another ctsyncd answers"):
        ControlServer(path, echo).open()
    os.unlink(path)
    second = ControlServer(path, echo)
    second.open()
    first.close()
    assert os.path.exists(path), "the socket of another is not removed"
    second.close()
    assert not os.path.exists(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as killed:
        killed.bind(path)  # what a kill -9 leaves
    second.open()
    second.close()
    assert not os.path.exists(path)
    pathlib.Path(path).write_text("precious")
    with pytest.raises(ControlError, match="not a socket"):
        ControlServer(path, echo).open()
    assert pathlib.Path(path).read_text() == "precious"
    with pytest.raises(ControlError, match="No such file"):
        ControlServer(str(tmp_path / "missing" / "c.sock"), echo).open()


def answer_once(path: str, data: bytes) -> threading.Thread:
    """A server that sends ``data`` to its only client and closes."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen(1)

    def run() -> None:
        sock, _address = listener.accept()
        with listener, sock:
            sock.recv(1000)
            sock.sendall(data)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


@pytest.mark.parametrize(
    "data", [b"", b"a flow\n", b'a flow\n{"ok": tr', b'a flow\n{"ok": true}', b"7\n", b'{"ok": 1}\n']
)
def test_an_answer_without_its_end_is_an_error(tmp_path: pathlib.Path, data: bytes) -> None:
    path = str(tmp_path / "c.sock")
    thread = answer_once(path, data)
    with pytest.raises(ControlError, match="incomplete"):
        list(client.request(path, {"command": "internal"}, DEADLINE_S))
    thread.join()


def test_nobody_there(tmp_path: pathlib.Path) -> None:
    path = str(tmp_path / "c.sock")
    with pytest.raises(ControlError, match=r"ctsyncd is not running \(no .*c.sock\): systemctl start ctsyncd"):
        list(client.request(path, {"command": "status"}))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(path)
    with pytest.raises(ControlError, match="nobody answers on"):
        list(client.request(path, {"command": "status"}))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as mute:
        os.unlink(path)
        mute.bind(path)
        mute.listen(1)
        with pytest.raises(ControlError, match="does not answer"):
            list(client.request(path, {"command": "status"}, 0.05))
