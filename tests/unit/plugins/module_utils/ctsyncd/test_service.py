# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""systemd's side of the process with real sockets, signals and files."""

from __future__ import annotations

import base64
import dataclasses
import io
import logging
import os
import pathlib
import select
import signal
import socket
import time
from typing import Any

import pytest
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import config, service
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.errors import ConfigError


def settings(place: str) -> config.Config:
    return config.Config(
        node="fw1",
        peers=(config.Peer("fw2", ("192.168.100.2",)),),
        links=(config.Link("eth2", "192.168.100.1", 3781),),
        virtual_ips=(config.VirtualIp("eth1", "192.168.0.100"),),
        keys={7: place},
        send_key=7,
    )


@pytest.mark.parametrize("abstract", [False, True])
def test_notifications_arrive(tmp_path: pathlib.Path, abstract: bool) -> None:
    name = f"@ctsync-t-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind("\0" + name[1:] if abstract else name)
        systemd.settimeout(10)
        notifier = service.Notifier({"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "3000000"})
        assert notifier.watchdog_interval_s == 1.5
        notifier.ready("NOT READY: no\npeer")
        assert systemd.recv(999) == b"READY=1\nSTATUS=NOT READY: no peer"
        notifier.status("NOT READY: no\npeer")  # said already
        notifier.watchdog()
        assert systemd.recv(999) == b"WATCHDOG=1"
        before = time.monotonic_ns() // 1000
        notifier.reloading()
        first, second = systemd.recv(999).decode().split("\n")
        assert first == "RELOADING=1"
        assert before <= int(second.removeprefix("MONOTONIC_USEC=")) <= time.monotonic_ns() // 1000
        notifier.stopping()
        assert systemd.recv(999) == b"STOPPING=1"


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"WATCHDOG_USEC": "x"},
        {"WATCHDOG_USEC": "0"},
        {"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"},
        {"NOTIFY_SOCKET": "/nowhere/notify"},
    ],
)
def test_without_systemd_notifications_are_silent(environ: dict[str, str]) -> None:
    notifier = service.Notifier(environ)
    assert notifier.watchdog_interval_s is None
    notifier.ready("READY")
    notifier.watchdog()
    notifier.stopping()


def test_signals_wake_the_loop_in_order() -> None:
    former = signal.getsignal(signal.SIGUSR1)
    signals = service.Signals(signal.SIGUSR1, signal.SIGHUP)
    try:
        assert signals.read() == []
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGHUP)
        assert select.select([signals], [], [], 10)[0] == [signals]
        assert signals.read() == [signal.SIGUSR1, signal.SIGHUP]
        assert signals.read() == []
    finally:
        signals.close()
    assert signal.getsignal(signal.SIGUSR1) is former
    assert signal.set_wakeup_fd(-1) == -1


KEY = bytes(range(32))


def test_key_is_read_from_the_credentials_or_a_path(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "key-7"
    file.write_bytes(base64.b64encode(KEY) + b"\n")
    file.chmod(0o440)  # an access list of systemd shows up as the group's rights
    assert service.read_key(settings("key-7"), 7, str(tmp_path)) == KEY
    assert service.read_key(settings(str(file)), 7, None) == KEY


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (base64.b64encode(KEY[:31]), "has 31 bytes, less than 32"),
        (b"", "has 0 bytes"),
        (b"secret-secret-not-base64!", "not one line of base64"),
        (base64.b64encode(KEY) + b"\n" + base64.b64encode(KEY), "not one line of base64"),
        (b"A" * 5000, "larger than"),
    ],
)
def test_a_bad_key_is_named_but_not_shown(tmp_path: pathlib.Path, content: bytes, says: str) -> None:
    file = tmp_path / "key-7"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        service.read_key(settings("key-7"), 7, str(tmp_path))
    [problem] = caught.value.problems
    assert problem.startswith(f"key 7: {file}: ")
    assert says in problem
    assert "openssl rand -base64 32" in problem
    assert "secret" not in problem.replace(str(file), "")
    assert caught.value.__cause__ is None


def test_a_key_that_is_not_there(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match=r"key 7: .*key-7: cannot be read: No such file.*openssl rand"):
        service.read_key(settings("key-7"), 7, str(tmp_path))
    with pytest.raises(ConfigError, match=r"key 7: credential key-7: .*LoadCredential=key-7:FILE.*keys\.7"):
        service.read_key(settings("key-7"), 7, None)
    with pytest.raises(ConfigError, match="key 8: is not in keys: known are 7"):
        service.read_key(settings("key-7"), 8, None)


def test_a_key_for_everybody_is_refused(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "7.key"
    file.write_bytes(base64.b64encode(KEY))
    file.chmod(0o644)
    with pytest.raises(ConfigError, match=f"chmod 600 {file}"):
        service.read_key(settings(str(file)), 7, None)


@pytest.fixture
def root_logger():
    """The root logger, put back afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield root
    root.handlers[:] = handlers
    root.setLevel(level)


def test_log_for_the_journal(tmp_path: pathlib.Path, root_logger: logging.Logger) -> None:
    with open(tmp_path / "journal", "w+", encoding="utf-8") as stream:
        status = os.fstat(stream.fileno())
        service.setup_logging("info", stream, {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"})
        log = logging.getLogger("ctsyncd.test")
        log.debug("not this")
        log.info("started")
        log.warning("peer said %s", "\x1b[2J")
        try:
            raise ValueError("broken")
        except ValueError:
            log.exception("turn failed")
        stream.seek(0)
        lines = stream.read().splitlines()
    assert lines[:3] == ["<6>started", "<4>peer said \\x1b[2J", "<3>turn failed"]
    assert lines[-1] == "<3>ValueError: broken"
    assert all(line.startswith("<") for line in lines)


def test_log_for_a_terminal(root_logger: logging.Logger) -> None:
    stream = io.StringIO()
    service.setup_logging("warning", stream, {"JOURNAL_STREAM": "1:2"})
    logging.getLogger("ctsyncd.test").info("not this")
    logging.getLogger("ctsyncd.test").warning("no peer")
    assert stream.getvalue() == "ctsyncd: warning: no peer\n"


def test_limited_log_counts_what_it_leaves_out(caplog: pytest.LogCaptureFixture) -> None:
    limited = service.LimitedLog(logging.getLogger("ctsyncd.test"), interval_s=60.0, max_keys=3)
    said = [limited.warning("bad tag", now, "datagram from %s dropped", "fw2") for now in (0.0, 1.0, 59.9, 60.0, 61.0)]
    assert said == [True, False, False, True, False]
    assert [record.getMessage() for record in caplog.records] == [
        "datagram from fw2 dropped",
        "datagram from fw2 dropped (and 2 more since the last such message)",
    ]
    for number in range(1000):
        limited.warning(f"key {number}", 61.0, "x")
    assert len(limited) == 3
    assert limited.warning("bad tag", 62.0, "forgotten, so said again")


SHOWN = base64.b64encode(bytes(range(32))).decode()


@pytest.mark.parametrize(
    "given",
    [None, [], {}, {"1": SHOWN}, {"1": SHOWN, "2": SHOWN, "3": SHOWN}, {"1": SHOWN, "2": 7}, {"1": SHOWN, "2": "x"}],
)
def test_keys_that_are_handed_over_must_be_those_of_the_configuration(given: Any) -> None:
    named = dataclasses.replace(settings("key-7"), keys={1: "key-1", 2: "key-2"}, send_key=1)
    with pytest.raises(ConfigError) as caught:
        service.handed_over(given, named)
    assert SHOWN not in str(caught.value)
    assert service.handed_over({"1": SHOWN, "2": SHOWN}, named) == dict.fromkeys((1, 2), base64.b64decode(SHOWN))
