# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The relay's decisions: what becomes of frames, without a network."""

from __future__ import annotations

import pytest
from soak.relay import ETHER_HEADER, FULL, HEADERS, VNET_HEADER, Fate, Weather

UDP = bytes((0x45,)) + bytes(8) + bytes((17,)) + bytes(10) + (3781).to_bytes(2, "big") * 2 + bytes(4)
SYNC = bytes(VNET_HEADER + 12) + b"\x08\x00" + UDP + b"payload" * 20
ARP = bytes(VNET_HEADER + 12) + b"\x08\x06" + bytes(28)


def pass_through(weather: Weather, frame: bytes = SYNC, count: int = 2000, seed: int = 1) -> tuple[Fate, list]:
    fate = Fate(seed)
    fate.weather = weather
    gone = [out for number in range(count) for out in fate.of(frame, "fw2", number * 0.01)]
    assert {way for _at, way, _frame in gone} <= {"fw2"}
    return fate, [(at, one) for at, _way, one in gone]


def test_a_calm_link_changes_nothing() -> None:
    _fate, out = pass_through(Weather())
    assert [frame for _at, frame in out] == [SYNC] * 2000
    assert [at for at, _frame in out] == [number * 0.01 for number in range(2000)]


def test_the_seed_decides() -> None:
    weather = Weather(loss=0.2, corrupt=0.2, duplicate=0.2, noise=0.2, replay=0.2, jitter_ms=50)
    assert pass_through(weather)[1] == pass_through(weather)[1]
    assert pass_through(weather)[1] != pass_through(weather, seed=2)[1]


@pytest.mark.parametrize(
    ("weather", "counter", "frames"),
    [
        (Weather(loss=0.3), "lost", 1400),
        (Weather(duplicate=0.3), "doubled", 2600),
        (Weather(replay=0.3), "repeated", 2600),
        (Weather(noise=0.3), "noise", 2600),
        (Weather(corrupt=0.3), "altered", 2000),
        (Weather(oversize=0.3), "oversized", 2600),
    ],
)
def test_shares_are_kept_and_counted(weather: Weather, counter: str, frames: int) -> None:
    fate, out = pass_through(weather)
    assert fate.counters[counter] == pytest.approx(600, abs=90)
    assert len(out) == pytest.approx(frames, abs=90)
    assert fate.counters["frames"] == 2000


def test_only_the_payload_is_altered_and_by_one_bit() -> None:
    _fate, out = pass_through(Weather(corrupt=1.0), count=200)
    for _at, frame in out:
        assert frame[:HEADERS] == SYNC[:HEADERS]
        assert sum(bin(a ^ b).count("1") for a, b in zip(frame, SYNC)) == 1


def test_other_frames_than_datagrams_of_the_daemons_are_lost_but_not_altered() -> None:
    weather = Weather(corrupt=1.0, noise=1.0, replay=1.0)
    assert [frame for _at, frame in pass_through(weather, ARP)[1]] == [ARP] * 2000
    assert len(pass_through(Weather(loss=0.3), ARP)[1]) < 1600


@pytest.mark.parametrize("to", ["fw1", "fw2"])
def test_a_datagram_is_reflected_with_its_ends_exchanged(to: str) -> None:
    macs, ips = (b"\x01" * 6, b"\x02" * 6), (b"\x0a\x00\x00\x01", b"\x0a\x00\x00\x02")

    def frame(one: int, other: int) -> bytes:
        ends = UDP[:12] + ips[one] + ips[other] + UDP[20:]
        return bytes(VNET_HEADER) + macs[other] + macs[one] + b"\x08\x00" + ends + b"payload"

    fate = Fate(1)
    fate.weather = Weather(reflect=1.0)
    sender = {"fw1": "fw2", "fw2": "fw1"}[to]
    assert fate.of(frame(0, 1), to, 0.0) == [(0.0, to, frame(0, 1)), (0.0, sender, frame(1, 0))]
    assert fate.of(ARP, to, 0.0) == [(0.0, to, ARP)]
    assert fate.counters["reflected"] == 1


def test_an_oversized_datagram_is_whole_and_not_what_was_sent() -> None:
    _fate, out = pass_through(Weather(oversize=1.0), count=50)
    for _at, frame in out[1::2]:
        packet = frame[VNET_HEADER + ETHER_HEADER :]
        assert len(packet) == FULL == int.from_bytes(packet[2:4], "big")
        assert (packet[20:24], packet[24:28]) == (UDP[20:24], (FULL - 20).to_bytes(2, "big") + bytes(2))
        words = [int.from_bytes(packet[place : place + 2], "big") for place in range(0, 20, 2)]
        assert sum(words) % 0xFFFF == 0  # RFC 1071
        assert b"payload" not in packet


def test_random_delays_reorder() -> None:
    _fate, out = pass_through(Weather(delay_ms=20, jitter_ms=100))
    late = [at - number * 0.01 for number, (at, _frame) in enumerate(out)]
    assert min(late) >= 0.02 and max(late) <= 0.12
    assert [at for at, _frame in out] != sorted(at for at, _frame in out)


def test_a_node_that_is_deaf_gets_nothing_and_the_other_all() -> None:
    fate, out = pass_through(Weather(deaf=("fw2",)))
    assert out == [] and fate.counters["cut off"] == 2000
    assert fate.of(SYNC, "fw1", 0.0) == [(0.0, "fw1", SYNC)]


def test_frames_that_are_too_long_do_not_pass() -> None:
    length = len(SYNC) - VNET_HEADER - ETHER_HEADER
    assert len(pass_through(Weather(frame_bytes=length))[1]) == 2000
    assert pass_through(Weather(frame_bytes=length - 1))[1] == []


def test_a_narrow_link_queues_and_then_loses() -> None:
    fate = Fate(1)
    fate.weather = Weather(bits_per_s=len(SYNC) * 8)  # a frame a second
    assert [fate.of(SYNC, "fw2", 0.0)[0][0] for dummy in range(3)] == [1.0, 2.0, 3.0]
    assert fate.of(SYNC, "fw2", 10.0)[0][0] == 11.0
    out = [fate.of(SYNC, "fw2", 20.0) for dummy in range(3000)]
    assert out[-1] == [] and fate.counters["queue full"] > 0
