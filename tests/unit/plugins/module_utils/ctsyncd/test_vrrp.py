# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""keepalived's FIFO with real writers that come and go, and the track file as keepalived watches it."""

from __future__ import annotations

import os
import pathlib
import selectors
from typing import Iterator

import pytest
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import vrrp
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.vrrp import FifoReader, TrackFile, Transition


@pytest.fixture
def fifo(tmp_path: pathlib.Path) -> str:
    path = tmp_path / "notify.fifo"
    os.mkfifo(path, 0o640)
    return str(path)


@pytest.fixture
def selector() -> Iterator[selectors.BaseSelector]:
    with selectors.DefaultSelector() as made:
        yield made


def writer(path: str) -> int:
    """As keepalived opens it."""
    return os.open(path, os.O_WRONLY | os.O_NONBLOCK)


def test_transitions_come_in_order(fifo: str) -> None:
    reader = FifoReader(fifo)
    assert reader.open(0.0)
    end = writer(fifo)
    assert reader.read() == []
    os.write(end, b'INSTANCE "VI eth1" MASTER 150\nGROUP "pair" MASTER 0\nINSTANCE "VI eth1" BACKUP_PRIORITY 90\n')
    assert reader.read() == [
        Transition("INSTANCE", "VI eth1", "MASTER", 150),
        Transition("GROUP", "pair", "MASTER", 0),
        Transition("INSTANCE", "VI eth1", "BACKUP_PRIORITY", 90),
    ]
    os.close(end)
    reader.close()


def test_survives_writers_that_come_and_go_without_spinning(fifo: str, selector: selectors.BaseSelector) -> None:
    reader = FifoReader(fifo)
    reader.register(selector)
    assert reader.open(0.0)
    for state in ("MASTER", "BACKUP", "FAULT"):
        assert selector.select(0) == [], "no writer, so nothing to do"
        end = writer(fifo)
        os.write(end, f'GROUP "pair" {state} 0\n'.encode())
        os.close(end)  # before we looked: the line must not be lost
        [(key, _mask)] = selector.select(1)
        assert key.data is reader
        assert [transition.state for transition in reader.read()] == [state]
        [(key, _mask)] = selector.select(1)  # the end of the writer is reported once ...
        assert reader.read() == []
    assert selector.select(0) == []  # ... and not for ever
    assert reader.reopened == 3
    assert reader.garbage == 0
    reader.close()
    assert not selector.get_map()


def test_a_line_in_pieces_is_one_line(fifo: str) -> None:
    reader = FifoReader(fifo)
    reader.open(0.0)
    end = writer(fifo)
    os.write(end, b'GROUP "pa')
    assert reader.read() == []
    os.write(end, b'ir" MASTER 0\nGROUP "pair" BA')
    assert reader.read() == [Transition("GROUP", "pair", "MASTER", 0)]
    os.close(end)  # keepalived was killed in the middle of a line
    assert reader.read() == []
    end = writer(fifo)
    os.write(end, b'GROUP "pair" BACKUP 0\n')
    assert reader.read() == [Transition("GROUP", "pair", "BACKUP", 0)]
    assert reader.garbage == 1
    os.close(end)
    reader.close()


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"MASTER",
        b'GROUP "pair" CONQUEROR 0',
        b"GROUP pair MASTER 0",
        b'GROUP "pa\x00ir" MASTER 0',
        b'group "pair" MASTER 0',
        b'GROUP "pair" MASTER 0 0',
        b'GROUP "pair" MASTER 99999',
        b"\xff\xfe\x00" * 50,
        b"x" * 5000,
    ],
)
def test_garbage_is_counted_and_the_next_line_is_read(fifo: str, line: bytes) -> None:
    reader = FifoReader(fifo)
    reader.open(0.0)
    end = writer(fifo)
    os.write(end, line + b'\nGROUP "pair" MASTER 0\n')
    assert reader.read() == [Transition("GROUP", "pair", "MASTER", 0)]
    assert reader.garbage == 1
    os.close(end)
    reader.close()


def test_an_endless_line_is_bounded(fifo: str) -> None:
    reader = FifoReader(fifo)
    reader.open(0.0)
    end = writer(fifo)
    for _ in range(40):
        os.write(end, b"y" * 4000)
        assert reader.read() == []
        assert len(reader._partial) <= vrrp.LINE_BYTES
    os.write(end, b'\nGROUP "pair" MASTER 0\n')
    assert [transition.state for transition in reader.read()] == ["MASTER"]
    assert reader.garbage == 1
    os.close(end)
    reader.close()


def test_a_missing_fifo_is_reported_and_tried_again(
    tmp_path: pathlib.Path, selector: selectors.BaseSelector, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "notify.fifo"
    reader = FifoReader(str(path))
    reader.register(selector)
    assert not reader.open(10.0)
    assert str(path) in str(reader.problem)
    assert "systemd-tmpfiles --create" in str(reader.problem)
    assert reader.read() == []
    assert not reader.tick(reader.retry_at)
    assert len(caplog.records) == 1, "logged once, not at every attempt"
    path.write_text('GROUP "pair" MASTER 0\n')
    assert not reader.tick(reader.retry_at - 0.5), "too early"
    assert "No such file" in str(reader.problem)
    assert not reader.tick(reader.retry_at)
    assert "not a FIFO" in str(reader.problem)
    path.unlink()
    path.symlink_to("/dev/zero")
    assert not reader.tick(reader.retry_at)
    assert "symbolic link" in str(reader.problem)
    path.unlink()
    os.mkfifo(path)
    assert reader.tick(reader.retry_at)
    assert reader.problem is None
    assert list(selector.get_map()) == [reader.fileno()]
    reader.close()


def test_a_replaced_fifo_is_found(fifo: str, selector: selectors.BaseSelector) -> None:
    reader = FifoReader(fifo)
    reader.register(selector)
    reader.open(0.0)
    os.unlink(fifo)
    assert reader.tick(reader.retry_at)
    assert "No such file" in str(reader.problem)
    os.mkfifo(fifo)
    assert reader.tick(reader.retry_at)
    assert reader.problem is None
    end = writer(fifo)
    os.write(end, b'GROUP "pair" MASTER 0\n')
    assert [key.data for key, _mask in selector.select(1)] == [reader]
    assert [transition.state for transition in reader.read()] == ["MASTER"]
    os.close(end)
    reader.close()


def test_track_file_is_written_in_place_and_only_when_changed(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "not-ready"
    path.write_text("1   # left by somebody\n")
    inode = path.stat().st_ino
    track = TrackFile(str(path))
    assert track.write(True)
    assert path.read_text() == "1\n"
    assert track.write(False)
    assert path.read_text() == "0\n"
    assert path.stat().st_ino == inode
    monkeypatch.setattr(vrrp.os, "open", lambda *_: pytest.fail("keepalived is woken for nothing"))
    assert track.write(False)
    monkeypatch.undo()
    assert track.read() is False
    assert (track.errors, track.problem) == (0, None)


def test_every_change_of_the_track_file_closes_it(tmp_path: pathlib.Path) -> None:
    """keepalived watches IN_CLOSE_WRITE: a file that stays open would never wake it."""
    path = tmp_path / "not-ready"
    path.write_text("1\n")
    track = TrackFile(str(path))
    before = sorted(os.listdir("/proc/self/fd"))
    assert track.write(False)
    assert track.write(True)
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_a_replaced_or_changed_track_file_is_written_again(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "not-ready"
    path.write_text("1\n")
    track = TrackFile(str(path))
    track.write(False)
    path.rename(tmp_path / "old")
    path.write_text("1\n")
    assert track.write(False)
    assert path.read_text() == "0\n"
    path.write_text("1\n")  # the gate, say, of a second daemon that was started by hand
    os.utime(path, (1, 1))
    assert track.write(False)
    assert path.read_text() == "0\n"


def test_a_track_file_that_cannot_be_written_is_counted_and_tried_again(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "not-ready"
    track = TrackFile(str(path))
    assert not track.write(True)
    assert track.errors == 1
    assert "No such file" in str(track.problem)
    assert not path.exists(), "a file of ours would be one that keepalived may not know"
    os.mkfifo(path)
    assert not track.write(True)
    path.unlink()
    path.mkdir()
    assert not track.write(True)
    assert track.read() is None
    path.rmdir()
    path.write_text("")
    assert track.write(True)
    assert path.read_text() == "1\n"
    assert (track.errors, track.problem) == (3, None)
