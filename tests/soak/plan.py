# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What happens in a run: a pure function of the seed and of the run's length.

A plan is a list of :class:`Step`.  Each is one fault with its parameters, on a sync link in some condition.  Nodes are
named by what they are at that moment (``active``, ``backup``), times are relative to conditions: a step begins when the
pair is READY and every change of the sessions is acknowledged, and ends when the pair is READY again.

So a plan never has two faults that together rightly lose a session: a take-over comes only where the backup has said
that it is ready, or where all that it lacks is younger than the sessions.  The condition of the link holds until the
fault is undone; under one that stops the link (``blind`` faults bring their own) no take-over is drawn.

Faults that end a process of ctsyncd come in the first part of a run only (:data:`RESTARTS_PART`).  In the rest both
daemons live through everything else, long enough to see whether they grow.
"""

from __future__ import annotations

import json
import random
from typing import Any, Callable, Iterator, NamedTuple

NOMINAL_STEP_S = 22.0  # a step on an idle machine, on average
RESTARTS_PART = 0.4  # of the steps that fit into a run

Draw = Callable[[random.Random], "dict[str, Any]"]


class Fault(NamedTuple):
    """``restarts``: ends a process of ctsyncd; ``moves``: the virtual IPs move, or both nodes hold them, so that the
    backup's table is put to use; ``blind``: the sync link carries nothing for a while."""

    name: str
    help: str
    weight: int
    draw: Draw
    restarts: bool = False
    moves: bool = False
    blind: bool = False


class Link(NamedTuple):
    """A condition of the sync link: parameters of :class:`soak.relay.Weather`."""

    name: str
    weight: int
    draw: Draw


class Step(NamedTuple):
    number: int
    fault: str
    values: dict[str, Any]
    link: str
    link_values: dict[str, Any]
    rest_s: float

    def __str__(self) -> str:
        values = json.dumps(self.values)[1:-1]
        link = f" | {self.link} {json.dumps(self.link_values)[1:-1]}" if self.link != "calm" else ""
        return f"{self.number:4} {self.fault}  {values}{link}"


def _seconds(chance: random.Random, low: float, high: float) -> float:
    return round(chance.uniform(low, high), 1)


def _either(chance: random.Random) -> str:
    return chance.choice(("active", "backup"))


LINKS = (
    Link("calm", 10, lambda c: {}),
    Link("loss", 4, lambda c: {"loss": c.choice((0.01, 0.1, 0.3))}),
    Link("duplication", 2, lambda c: {"duplicate": c.choice((0.05, 0.5))}),
    Link("reordering", 2, lambda c: {"jitter_ms": c.choice((5, 30, 100))}),
    Link("corruption", 2, lambda c: {"corrupt": c.choice((0.01, 0.1))}),
    Link("delay", 2, lambda c: {"delay_ms": c.choice((20, 200))}),
    Link("replays", 2, lambda c: {"replay": c.choice((0.05, 0.3))}),
    Link("noise", 2, lambda c: {"noise": c.choice((0.05, 0.3)), "oversize": c.choice((0.0, 0.05))}),
    Link("reflection", 2, lambda c: {"reflect": c.choice((0.1, 1.0))}),
    Link("narrow", 2, lambda c: {"bits_per_s": c.choice((256_000, 1_000_000))}),
    Link(
        "everything",
        3,
        lambda c: {
            **{"loss": 0.05, "duplicate": 0.1, "corrupt": 0.02, "replay": 0.05, "noise": 0.05},
            **{"delay_ms": c.choice((0, 20)), "jitter_ms": 20},
        },
    ),
)

OPERATOR = (  # request and node; -f makes a backup forget, so that it has to ask again
    ("bulk", "active"),
    ("resync", "active"),
    ("resync", "backup"),
    ("request", "backup"),
    ("commit", "backup"),
    ("purge", "backup"),
    ("forget", "backup"),
)


def _operator(chance: random.Random) -> dict[str, Any]:
    return {"requests": [list(chance.choice(OPERATOR)) for dummy in range(chance.randint(1, 6))]}


FAULTS = (
    # --- a node goes, the other takes over
    Fault(
        "power cut of the active node",
        "no network, no processes, no table; boots again",
        10,
        lambda c: {"dark_s": _seconds(c, 2, 12)},
        restarts=True,
        moves=True,
    ),
    Fault(
        "power cut behind a dead link",
        "first the sync link goes down, then the active node",
        3,
        lambda c: {"blind_s": _seconds(c, 2, 6), "dark_s": _seconds(c, 2, 8)},
        restarts=True,
        moves=True,
        blind=True,
    ),
    Fault(
        "power cut of the backup",
        "boots again with an empty table, as a new machine would",
        4,
        lambda c: {"dark_s": _seconds(c, 2, 12)},
        restarts=True,
        blind=True,
    ),
    Fault(
        "freeze of the active node",
        "nothing runs or forwards there; then it goes on as if nothing had been, ctsyncd at once or later",
        5,
        lambda c: {"frozen_s": _seconds(c, 3, 12), "late_s": c.choice((0.0, 0.0, 2.0))},
        moves=True,
        blind=True,
    ),
    Fault(
        "cable pulled",
        "of the active node, inside, outside or both",
        6,
        lambda c: {"sides": c.choice((["eth0"], ["eth1"], ["eth0", "eth1"])), "dark_s": _seconds(c, 2, 8)},
        moves=True,
    ),
    Fault(
        "node off the network",
        "the active node hears and is heard on the sync link only, and does not notice",
        4,
        lambda c: {"dark_s": _seconds(c, 3, 8)},
        moves=True,
    ),
    # --- keepalived
    Fault("hand-over", "keepalived of the active node restarts", 5, lambda c: {"pause_s": 0.0}, moves=True),
    Fault(
        "keepalived stopped",
        "an orderly end, and a start later",
        4,
        lambda c: {"node": _either(c), "pause_s": _seconds(c, 1, 8)},
        moves=True,
    ),
    Fault(
        "keepalived killed",
        "its addresses stay behind until it is started again",
        4,
        lambda c: {"node": _either(c), "pause_s": _seconds(c, 1, 6)},
        moves=True,
    ),
    Fault("keepalived reloaded", "moves nothing", 2, lambda c: {"node": _either(c)}),
    Fault(
        "flapping",
        "the virtual IPs move again and again; nobody waits for READY in between",
        5,
        lambda c: {"times": c.randint(3, 8), "pause_s": _seconds(c, 0, 1.5), "bulk": c.random() < 0.5},
        moves=True,
    ),
    Fault(
        "split brain",
        "no advertisement gets through, both nodes are active",
        4,
        lambda c: {"deaf": c.choice((["active", "backup"], ["backup"])), "for_s": _seconds(c, 3, 10)},
        moves=True,
    ),
    # --- the daemon
    Fault(
        "ctsyncd killed",
        "and started again",
        6,
        lambda c: {"node": _either(c), "pause_s": _seconds(c, 0, 5)},
        restarts=True,
    ),
    Fault(
        "ctsyncd killed on both",
        "and started again",
        2,
        lambda c: {"first": _either(c), "pause_s": _seconds(c, 0, 3)},
        restarts=True,
    ),
    Fault(
        "ctsyncd upgraded",
        "another version, one node after the other",
        3,
        lambda c: {"nodes": c.choice((["backup"], ["backup", "active"]))},
        restarts=True,
    ),
    Fault(
        "ctsyncd frozen",
        "SIGSTOP, SIGCONT",
        6,
        lambda c: {"node": _either(c), "for_s": _seconds(c, 1, 15)},
        blind=True,
    ),
    Fault("key rotated", "receive-only, send, drop the old one; node by node", 2, lambda c: {}, restarts=True),
    Fault("key rotated in service", "the same by `ctsyncd keys`: no process ends", 2, lambda c: {}),
    Fault(
        "wrong key",
        "on the backup for a while",
        2,
        lambda c: {"for_s": _seconds(c, 2, 6)},
        restarts=True,
        blind=True,
    ),
    Fault(
        "configuration reloaded",
        "options that may change in service",
        3,
        lambda c: {
            "node": _either(c),
            "options": c.choice(
                (
                    {"window_ms": 0},
                    {"window_ms": 50},
                    {"hello_interval_ms": 100},
                    {"park_timeout_s": 3600},
                    {"log_level": "debug"},
                    {"udp": "all"},
                )
            ),
        },
    ),
    Fault("wrong configuration reloaded", "and put right later", 2, lambda c: {"node": _either(c)}),
    Fault("requests", "an operator uses the command line", 5, _operator),
    Fault("disk full", "where the log and the track file are", 2, lambda c: {"node": _either(c), "for_s": 5.0}),
    Fault(
        "no inodes",
        "there, and the active node loses a cable",
        2,
        lambda c: {"for_s": _seconds(c, 2, 5)},
        moves=True,
    ),
    Fault(
        "other rules",
        "the fingerprint of the backup's ruleset is another one for a while",
        3,
        lambda c: {"for_s": _seconds(c, 1, 4)},
    ),
    # --- the sync link
    Fault(
        "sync link cut",
        "in the middle, or an interface is down",
        5,
        lambda c: {"how": c.choice(("middle", "active", "backup")), "for_s": _seconds(c, 1, 12)},
        blind=True,
    ),
    Fault(
        "sync link one way",
        "a node sends and hears nothing",
        4,
        lambda c: {"deaf": _either(c), "for_s": _seconds(c, 1, 10)},
        blind=True,
    ),
    Fault(
        "half of the sync link lost",
        "every other frame, at random, in both directions",
        3,
        lambda c: {"loss": 0.5, "for_s": _seconds(c, 3, 10)},
        blind=True,
    ),
    Fault("sync link flaps", "up and down", 3, lambda c: {"times": c.randint(3, 10), "for_s": 0.7}, blind=True),
    Fault(
        "small datagrams only",
        "what is longer does not get through",
        2,
        lambda c: {"frame_bytes": 1280, "for_s": _seconds(c, 3, 8)},
        blind=True,
    ),
    # --- load and tables
    Fault(
        "flood of flows",
        "injected into the active kernel, with short timers",
        4,
        lambda c: {"flows": c.choice((2_000, 5_000)), "timeout_s": c.randint(5, 30)},
    ),
    Fault(
        "events lost",
        "a flood while the active daemon is frozen and its buffer small",
        4,
        lambda c: {"flows": c.choice((2_000, 5_000)), "timeout_s": c.randint(5, 30)},
        blind=True,
    ),
    Fault("short connections", "many of them", 3, lambda c: {"per_s": 150, "for_s": _seconds(c, 3, 8)}),
    Fault("holes", "an operator deletes replicas on the backup", 4, lambda c: {"port_rest": c.randint(0, 4)}),
    Fault("wrong marks", "an operator changes replicas on the backup", 3, lambda c: {"port_rest": c.randint(0, 4)}),
    Fault("table flushed", "conntrack -F on the backup", 3, lambda c: {}),
    Fault("ghosts", "entries on the backup that the active node does not have", 3, lambda c: {"flows": 50}),
    Fault(
        "squatters",
        "entries on the backup use the translated ports of flows to come",
        3,
        lambda c: {"flows": 50, "timeout_s": 20},
    ),
)
BY_NAME = {fault.name: fault for fault in FAULTS}


def steps(seed: int, minutes: float) -> Iterator[Step]:
    """The plan, without end: a run takes what it has time for.  ``minutes`` says where the first part ends."""
    chance = random.Random(f"ctsync {seed}")
    first = max(1, round(RESTARTS_PART * minutes * 60 / NOMINAL_STEP_S))
    number = 0
    bags: dict[bool, list[Fault]] = {True: [], False: []}
    while True:
        number += 1
        restarts = number <= first
        fault = _next(chance, bags[restarts], restarts)
        link = LINKS[0] if fault.blind else chance.choices(LINKS, [one.weight for one in LINKS])[0]
        yield Step(number, fault.name, fault.draw(chance), link.name, link.draw(chance), round(chance.uniform(1, 4), 1))


def _next(chance: random.Random, bag: list[Fault], restarts: bool) -> Fault:
    """Out of a bag that holds each fault once, and once more in proportion to its weight: all of them come soon."""
    if not bag:
        allowed = [fault for fault in FAULTS if restarts or not fault.restarts]
        bag.extend(allowed)
        bag.extend(chance.choices(allowed, [fault.weight for fault in allowed], k=len(allowed) // 2))
        chance.shuffle(bag)
    return bag.pop()
