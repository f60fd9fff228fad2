# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Two engines or more, as many model kernels, a bad wire and a clock that nobody waits for.

:class:`Kernel` follows ctnetlink where the engine depends on it: a create is refused if the original or the reply tuple
is taken, an update cannot clear status bits, events leave out what did not change, and a node hears no events of what
its own daemon did.  :class:`Wire` loses, doubles, delays (so: reorders) and alters datagrams, and keeps all of them
for replays.  :class:`RecordingCrypto` fails the test at once when a nonce is used twice with one key.
"""

from __future__ import annotations

import errno
import functools
import heapq
import ipaddress
import itertools
import random
import struct
from collections import Counter
from typing import Any, Callable, Dict, Iterable, NamedTuple

from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import constants as k
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import readiness, wire
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.columns import Gathering
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.crypto import Aead, LibraryCrypto
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.engine import Engine
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.expectation import Expectation
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.expectation_replicas import REMAKE, REMOVE
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.expectation_replicas import TIMER as TIMER_ONLY
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.expectation_replicas import (
    Job as ExpectationJob,
)
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.flow import Flow, Tuple
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.helpers import Helpers
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.jobs import (
    CREATE,
    DELETE,
    LOOSEN,
    TIMER,
    Job,
    Request,
)
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.paths import Paths
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.rows import SHAPES, Changes, Sheet, cut, pack
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.session import Session
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.situation import HOT_STANDBY, Settings

SECRET = bytes(range(32))
KEPT_BITS = k.IPS_SEEN_REPLY | k.IPS_ASSURED | k.IPS_SRC_NAT | k.IPS_DST_NAT
NATTED = k.IPS_SRC_NAT | k.IPS_SRC_NAT_DONE | k.IPS_DST_NAT_DONE
ALIVE = k.IPS_SEEN_REPLY | k.IPS_ASSURED | k.IPS_CONFIRMED
VIP = "192.168.1.100"
OWN = tuple(
    ipaddress.ip_address(text).packed
    for text in ("192.168.0.1", "192.168.0.2", "192.168.1.1", "192.168.1.2", "192.168.0.100", VIP)
)


def address(text: str) -> bytes:
    return ipaddress.ip_address(text).packed


def tcp(port: int, nat_port: int | None = None, state: int = k.TCP_ESTABLISHED, **changes: Any) -> Flow:
    """A TCP connection of the test case: from 192.168.0.3 to 192.168.1.3, port 22, SNATed to the virtual IP."""
    outside = port if nat_port is None else nat_port
    return Flow(
        *(k.AF_INET, k.IPPROTO_TCP, 0),
        Tuple(address("192.168.0.3"), address("192.168.1.3"), struct.pack("!HH", port, 22)),
        Tuple(address("192.168.1.3"), address(VIP), struct.pack("!HH", 22, outside)),
        ALIVE | NATTED,
        **{"timeout": 431_999, "state": state, "tcp_wscale": (7, 9), "tcp_flags": (0x23, 0x23), "mark": 0, **changes},
    )


def udp(port: int, replied: bool = True, **changes: Any) -> Flow:
    """A plain UDP flow over IPv6."""
    return Flow(
        *(k.AF_INET6, k.IPPROTO_UDP, 0),
        Tuple(address("fd00:c0de::3"), address("fd00:c0de:1::3"), struct.pack("!HH", port, 53)),
        Tuple(address("fd00:c0de:1::3"), address("fd00:c0de::3"), struct.pack("!HH", 53, port)),
        k.IPS_CONFIRMED | (k.IPS_SEEN_REPLY if replied else 0),
        **{"timeout": 30, "mark": 0, **changes},
    )


class RecordingCrypto:
    """The real cryptography, and a record of every nonce sealed with every key, over all nodes, restarts and futures of
    a state of the past.  (The same datagram once more is no second use: it tells nothing new.)"""

    def __init__(self) -> None:
        self._library = LibraryCrypto()
        self.sealed: dict[tuple[bytes, bytes, bytes, bytes], tuple[bytes, bytes]] = {}

    def derive(self, secret: bytes, salt: bytes, info: bytes) -> Aead:
        recorder, inner = self, self._library.derive(secret, salt, info)

        class Recording:
            def seal(self, nonce: bytes, plaintext: bytes, header: bytes) -> bytes:
                use = (secret, salt, info, nonce)
                datagram = (plaintext, header)
                first = recorder.sealed.setdefault(use, datagram)
                assert first == datagram, f"nonce {nonce.hex()} used twice with one key"
                return inner.seal(nonce, plaintext, header)

            def open(self, nonce: bytes, sealed: bytes, header: bytes) -> bytes:
                return inner.open(nonce, sealed, header)

        return Recording()

    def derive_digest(self, secret: bytes, salt: bytes, info: bytes) -> Callable[[bytes, bytes], bytes]:
        return self._library.derive_digest(secret, salt, info)


class Wire:
    """The sync link.  Probabilities and the longest extra delay may be changed at any time.

    ``parted``: pairs of nodes that do not hear each other.
    """

    def __init__(self, chance: random.Random) -> None:
        self.loss = self.duplication = self.corruption = 0.0
        self.jitter_s = 0.0
        self.cut = False
        self.deaf = ""  # the node that nothing gets to
        self.longest = 1 << 16  # bytes; longer datagrams vanish
        self.longest_to: dict[str, int] = {}  # the same, one way only
        self.delay_s = 0.0005
        self.parted: set[frozenset[str]] = set()
        self.sent: list[tuple[str, bytes]] = []  # (to, datagram) of everything ever sent
        self._chance = chance
        self._queue: list[tuple[float, int, str, bytes, str]] = []
        self._number = 0

    def send(self, to: str, datagram: bytes, now: float, sender: str = "") -> None:
        self.sent.append((to, datagram))
        longest = min(self.longest, self.longest_to.get(to, self.longest))
        if self.cut or to == self.deaf or len(datagram) > longest or frozenset((to, sender)) in self.parted:
            return
        for _copy in range(1 + (self._chance.random() < self.duplication)):
            if self._chance.random() < self.loss:
                continue
            copy = datagram
            if self._chance.random() < self.corruption:
                place = self._chance.randrange(len(copy))
                copy = copy[:place] + bytes((copy[place] ^ 1 << self._chance.randrange(8),)) + copy[place + 1 :]
            self.inject(to, copy, now + self.delay_s + self._chance.random() * self.jitter_s, sender)

    def inject(self, to: str, datagram: bytes, at: float, sender: str = "") -> None:
        """``sender``: the node whose address it comes from; the only peer's if it is not said."""
        self._number += 1
        heapq.heappush(self._queue, (at, self._number, to, datagram, sender))

    def arrived(self, now: float) -> list[tuple[str, bytes]]:
        return [(to, datagram) for to, datagram, _sender in self.arrived_from(now)]

    def arrived_from(self, now: float) -> list[tuple[str, bytes, str]]:
        out = []
        while self._queue and self._queue[0][0] <= now:
            out.append(heapq.heappop(self._queue)[2:])
        return out

    def next_arrival(self) -> float:
        return self._queue[0][0] if self._queue else float("inf")


def _ends(flow: Flow) -> tuple[Any, Any]:
    return (flow.proto, flow.zone, flow.orig), (flow.proto, flow.zone, flow.reply)


class Table(Dict[bytes, Flow]):
    """Flows by key; ``ends`` are the tuples that they use, of both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: Counter[Any] = Counter()

    def __setitem__(self, key: bytes, flow: Flow) -> None:
        if key in self:
            del self[key]
        super().__setitem__(key, flow)
        self.ends.update(_ends(flow))

    def __delitem__(self, key: bytes) -> None:
        self.pop(key)

    def pop(self, key: bytes) -> Flow:  # type: ignore[override]
        flow = super().pop(key)
        for end in _ends(flow):
            self.ends[end] -= 1
            if not self.ends[end]:
                del self.ends[end]
        return flow


def sheets_of(rows: Iterable[tuple[bytes, bytes]]) -> tuple[Sheet, ...]:
    """Rows, of which a key may repeat, as where very many events are alike."""
    joined: dict[int, bytes] = {}
    for key, value in rows:
        joined[len(key)] = joined.get(len(key), b"") + key + value
    return tuple(Sheet(key_len, cut(some, SHAPES[key_len].row)) for key_len, some in joined.items())


def in_sheets(changes: Changes) -> Changes:
    """What is rows in columns."""
    rows = itertools.chain.from_iterable(table.items() for table in changes.rows.values())
    return changes._replace(rows={}, sheets=sheets_of(rows))


class Kernel:
    """A conntrack table.  ``helpers``: what this kernel knows; ``refuse``: errno by key, for every create.
    ``followed``: somebody listens to new and changed entries."""

    def __init__(self) -> None:
        self.table = Table()
        self.events: list[tuple[Flow, bool]] = []
        self.lost = False
        self.followed = True
        self.helpers = {"ftp"}
        self.refuse: dict[bytes, int] = {}
        self.done: list[Request] = []
        self.expectations: dict[bytes, Expectation] = {}  # by name
        self.expected: list[tuple[Expectation, bool]] = []  # events
        self.functions = {"", "nat-follow-master"}
        self._alike = False

    # what traffic does

    def expect(self, one: Expectation) -> None:
        """A helper foresees a flow.  What the kernel says of it has no zone."""
        assert one.master_key in self.table, "the test expects a flow of a master that does not exist"
        self.expectations[one.name] = one
        self.expected.append((one._replace(zone=0, zone_dir=3), False))

    def unexpect(self, name: bytes, timeout: int = 0) -> None:
        """It is used up (``timeout`` seconds were left), or its time is over."""
        one = self.expectations.pop(name)
        self.expected.append((one._replace(zone=0, zone_dir=3, timeout=timeout), True))

    def _masterless(self, silent: bool) -> None:
        """Expectations go with their master."""
        for name in [name for name, one in self.expectations.items() if one.master_key not in self.table]:
            one = self.expectations.pop(name)
            if not silent:
                self.expected.append((one._replace(zone=0, zone_dir=3), True))

    def open(self, flow: Flow) -> Flow:
        assert not self._taken(flow), "the test opens a flow that exists"
        self.table[flow.key] = flow
        if self.followed:
            self.events.append((flow, False))
        return flow

    def change(self, key: bytes, **changes: Any) -> None:
        """A state change; its event leaves out labels and adjustments that did not change."""
        flow = self.table[key] = self.table[key]._replace(**changes)
        unsaid = {name: None for name in ("labels", "seqadj") if name not in changes}
        if self.followed:
            self.events.append((flow._replace(**unsaid), False))

    def close(self, key: bytes) -> None:
        """The entry ends (timer, or an operator): a DESTROY without timeout and protocol details."""
        self.events.append((self.table.pop(key)._replace(timeout=None, tcp_wscale=None, tcp_flags=None), True))
        self._masterless(silent=False)

    # what the daemon does

    def _taken(self, flow: Flow) -> bool:
        """Tuples of both directions share one hash table (nf_conntrack_core.c, nf_conntrack_hash_check_insert)."""
        return flow.key in self.table or any(end in self.table.ends for end in _ends(flow))

    def take_events(self) -> Changes:
        """What the daemon reads; ``lost`` as the kernel's ENOBUFS."""
        events, self.events = self.events, []
        lost, self.lost = self.lost, False
        found = Gathering()
        for flow, destroyed in events:
            if destroyed:
                found.end(flow.key)
            else:
                found.flow(flow)
        changes = found.changes(len(events), lost)
        if not changes.rows or changes.flows or changes.gone:
            return changes
        self._alike = not self._alike
        if not self._alike:
            return changes
        rows = [pack(flow._replace(mark=flow.mark or 0))[:2] for flow, _destroyed in events]
        return changes._replace(rows={}, sheets=sheets_of(rows))

    def lose_events(self) -> None:
        self.events.clear()
        self.lost = True

    def lookup(self, flow: Flow) -> Flow | None:
        """The entry that has this tuple in any direction (nf_conntrack_find_get)."""
        wanted = (flow.proto, flow.zone, flow.orig)
        return next((other for other in self.table.values() if wanted in _ends(other)), None)

    def carry_out_expectation(self, job: ExpectationJob) -> int:
        """As ctnetlink would; 0 or an errno."""
        operation, one, timeout = job
        master = self.table.get(one.master_key)
        if operation in (REMOVE, REMAKE):
            there = self.expectations.pop(one.name, None)
            if operation == REMOVE:
                return 0 if there is not None else errno.ENOENT
        if operation == TIMER_ONLY:
            if one.name not in self.expectations:
                return errno.ENOENT
        elif master is None:
            return errno.ENOENT
        elif master.helper is None or master.helper not in self.helpers:
            return errno.EOPNOTSUPP
        elif one.function not in self.functions:
            return errno.EINVAL
        elif one.name in self.expectations:
            return errno.EEXIST
        self.expectations[one.name] = one._replace(timeout=timeout)
        return 0

    def carry_out(self, job: Job) -> list[tuple[int, int]]:
        """Index and errno of what failed."""
        if isinstance(job, Request):
            results = [self.request(job)]
        else:
            results = [self.request(job.request(index)) for index in range(len(job.keys))]
        return [(index, error) for index, error in enumerate(results) if error]

    def request(self, request: Request) -> int:
        """Carry out a request as ctnetlink would; 0 or an errno."""
        self.done.append(request)
        operation, key, flow, timeout, _attempt = request
        have = self.table.get(key)
        if operation == CREATE:
            if key in self.refuse:
                return self.refuse[key]
            if flow.helper is not None and flow.helper not in self.helpers:
                return errno.EOPNOTSUPP
            if flow.master is not None and not any(other.orig == flow.master for other in self.table.values()):
                return errno.ENOENT
            if self._taken(flow):
                return errno.EEXIST
            assert timeout is None or timeout >= 0
            self.table[key] = flow._replace(timeout=timeout)
            return 0
        if have is None:
            return errno.ENOENT
        if operation == DELETE:
            del self.table[key]
            self._masterless(silent=True)
        elif operation == LOOSEN:
            assert flow.proto == k.IPPROTO_TCP
            one, other = have.tcp_flags or (0, 0)
            self.table[key] = have._replace(tcp_flags=(one | k.TCP_FLAG_BE_LIBERAL, other | k.TCP_FLAG_BE_LIBERAL))
        elif operation == TIMER:
            self.table[key] = have._replace(timeout=timeout)
        else:
            if have.status & ~flow.status & (k.IPS_SEEN_REPLY | k.IPS_ASSURED):
                return errno.EBUSY
            said = ("state", "tcp_wscale", "tcp_flags", "sctp_vtags", "mark", "labels", "seqadj")
            changes = {name: getattr(flow, name) for name in said if getattr(flow, name) is not None}
            self.table[key] = have._replace(timeout=timeout, status=have.status | flow.status & 0x6, **changes)
        return 0


class Node:
    """A firewall: a kernel that lives on, and a daemon that may be restarted."""

    def __init__(self, name: str, make: Callable[[float], Engine]) -> None:
        self.name = name
        self.kernel = Kernel()
        self.engine: Engine | None = None
        self.role = readiness.BACKUP
        self._make = make
        self._dump: tuple[int, list[Flow]] | None = None
        self._poll_at = 0.0
        self.requests_per_turn = 256
        self.booted = False

    @property
    def up(self) -> Engine:
        assert self.engine is not None
        return self.engine

    def start(self, now: float) -> None:
        self.kernel.events.clear()  # nobody listened
        self.kernel.expected.clear()
        self._dump = None
        self.engine = self._make(now)
        self.engine.cold_start = self.booted
        self.booted = False
        self.engine.set_addresses(OWN)
        self.engine.set_role(self.role, now)
        self.kernel.followed = self.engine.follows

    def kill(self) -> None:
        self.engine = None

    def crash(self) -> None:
        """The node loses power: its next life begins with an empty table."""
        self.kill()
        self.kernel = Kernel()
        self.booted = True

    def set_role(self, role: str, now: float) -> None:
        self.role = role
        if self.engine is not None:
            self.engine.set_role(role, now)
            self.kernel.followed = self.engine.follows

    def turn(self, now: float) -> list[list[bytes]]:
        """One turn of the daemon's loop, in its order; what it sends to each of its peers."""
        if self.engine is None:
            return []
        if self.kernel.events or self.kernel.lost or self.engine.newcomers.waiting:
            self.engine.kernel_changes(self.kernel.take_events(), now)
        rests = not self.kernel.expected and self.engine.resting(now)
        second = now >= self._poll_at
        if second:
            self._poll_at = now + 1.0
        if rests and (not second or self.engine.sleeps(now)):
            return self.engine.talk(now)
        self.kernel.followed = self.engine.follows
        self._feed_dump(self.engine, now)
        out = self.engine.poll(now)
        self._look_after_helpers(self.engine.helpers, now)
        for question in self.engine.take_questions():
            self.engine.answer(question, self.kernel.lookup(question.flow), now)
        for job in self.engine.kernel_work(self.requests_per_turn):
            self.engine.kernel_results(job, self.kernel.carry_out(job))
        return out

    def _look_after_helpers(self, helpers: Helpers, now: float) -> None:
        events, self.kernel.expected = self.kernel.expected, []
        if events:
            helpers.events(events, False, now)
        listed = [one._replace(zone=0, zone_dir=3) for one in self.kernel.expectations.values()]
        if helpers.walk is not None:
            helpers.walked(listed, now)
            helpers.walk_ended(True, now)
        for master in helpers.take_asks():
            theirs = [one for one in self.kernel.expectations.values() if one.master_key == master.key]
            known = master.key in self.kernel.table
            helpers.told(master, [one._replace(zone=0, zone_dir=3) for one in theirs] if known else None, now)
        for job in helpers.work(self.requests_per_turn):
            helpers.result(job, self.kernel.carry_out_expectation(job))

    def _feed_dump(self, engine: Engine, now: float) -> None:
        """A few entries per turn: the table changes under the dump, as it does in the kernel."""
        if engine.dump is None:
            self._dump = None
            return
        if self._dump is None or self._dump[0] != engine.dump.number:
            self._dump = (engine.dump.number, list(self.kernel.table.values()))
        if not engine.dump_room:
            return
        rest = self._dump[1]
        part = Gathering()
        for flow in rest[:7]:
            if flow.key in self.kernel.table:
                part.flow(self.kernel.table[flow.key])
        del rest[:7]
        engine.dump_slice(part.changes(7), now)
        if not rest:
            self._dump = None
            engine.dump_finished(True, now)


class View(NamedTuple):
    """What must be equal on both nodes, of one flow."""

    reply: Tuple
    status: int
    state: int | None
    wscale: tuple[int, int] | None
    mark: int | None
    labels: bytes | None
    seqadj: Any


def view(flow: Flow, state: bool = True) -> View:
    return View(
        flow.reply,
        flow.status & KEPT_BITS,
        flow.state if state else None,
        flow.tcp_wscale,
        flow.mark,
        flow.labels,
        flow.seqadj,
    )


def replicable(flow: Flow) -> bool:
    """The rule of docs/protocol.md in the words of this model: what the backup must hold."""
    if flow.orig.src in OWN or flow.reply.src in OWN:
        return False
    if flow.proto == k.IPPROTO_TCP:
        return flow.state in range(k.TCP_ESTABLISHED, k.TCP_LAST_ACK + 1)
    return bool(flow.status & k.IPS_SEEN_REPLY)


class Simulation:
    """fw1, fw2 (and more), the wires between them (``wire`` is the first one), the clock."""

    def __init__(
        self, seed: int = 0, settings: Settings | None = None, links: int = 1, nodes: int = 2, **session: Any
    ) -> None:
        self.now = 1000.0
        self.settings = settings or Settings(park_timeout_s=86_400)
        self.chance = random.Random(seed)
        self.crypto = RecordingCrypto()
        self.wires = [Wire(self.chance) for _link in range(links)]
        self.wire = self.wires[0]
        self.session = {"secrets": {1: SECRET}, "send_key": 1, "payload": 600, **session}
        names = [f"fw{number + 1}" for number in range(nodes)]
        self.nodes = {name: Node(name, functools.partial(self._engine, name)) for name in names}
        self.fw1, self.fw2 = self.nodes["fw1"], self.nodes["fw2"]

    def peers(self, name: str) -> list[str]:
        """Whom a node knows, in the order of its configuration."""
        return [other for other in self.nodes if other != name]

    def _engine(self, name: str, now: float) -> Engine:
        sessions = []
        for peer in self.peers(name):
            options: dict[str, Any] = dict(self.session)
            if len(self.wires) > 1:
                names = [(f"eth{2 + link}", 4) for link in range(len(self.wires))]
                options["paths"] = Paths(names, payload=options["payload"])
            random_bytes = self.chance.randbytes
            sessions.append(
                Session(name, peer, crypto=self.crypto, random=random_bytes, version="0", now=now, **options)
            )
        return Engine(self.settings, sessions, now)

    def start(self) -> Simulation:
        """All daemons; fw1 is active, and the others are complete."""
        self.fw1.role = readiness.ACTIVE
        for node in self.nodes.values():
            node.start(self.now)
        self.run_until(lambda: all(node.up.complete for node in self.nodes.values() if node is not self.fw1))
        return self

    def turn(self) -> None:
        """Go to the next moment at which something is due, and let both daemons take a turn."""
        due = [
            *(wire.next_arrival() for wire in self.wires),
            *(n.engine.next_deadline() for n in self.nodes.values() if n.engine),
        ]
        self.now = max(self.now + 0.001, min(self.now + 0.05, *due))
        for link, line in enumerate(self.wires):
            for to, datagram, sender in line.arrived_from(self.now):
                node = self.nodes[to].engine
                if node is not None:
                    node.receive(self.peers(to).index(sender) if sender else 0, datagram, self.now, link)
        for name, one in self.nodes.items():
            for peer, datagrams in enumerate(one.turn(self.now)):
                to = self.peers(name)[peer]
                for link, part in one.up.peers[peer].session.route(datagrams):
                    for datagram in part:
                        self.wires[link].send(to, datagram, self.now, name)

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            self.turn()

    def run_until(self, condition: Callable[[], object], seconds: float = 60.0) -> None:
        end = self.now + seconds
        while not condition():
            assert self.now < end, f"not within {seconds} simulated seconds"
            self.turn()

    def heal(self) -> None:
        for line in self.wires:
            line.loss = line.duplication = line.corruption = line.jitter_s = 0.0
            line.cut = False
            line.deaf = ""
            line.parted.clear()

    def move(self, to: Node) -> None:
        """VRRP moves the virtual IPs: away from the one, then to the other."""
        for other in self.nodes.values():
            if other is not to:
                other.set_role(readiness.BACKUP, self.now)
        to.set_role(readiness.ACTIVE, self.now)

    def differences(self, active: Node, backup: Node) -> list[str]:
        """What keeps the backup from being the active node's equal; [] when it is."""
        wanted = {key: flow for key, flow in active.kernel.table.items() if replicable(flow)}
        # what was told and is over may still be there, or not any more
        over = {key for key, flow in active.kernel.table.items() if flow.state in (k.TCP_TIME_WAIT, k.TCP_CLOSE)}
        cache = {flow.key: flow for flow, _since in backup.up.external_flows() if flow.key not in over}
        mine = {
            key: flow
            for key, flow in backup.kernel.table.items()
            if (replicable(flow) or key in wanted) and key not in over
        }
        out = list(_compare("cache", wanted, cache, True))
        if backup.up.settings.mode == HOT_STANDBY:
            out.extend(_compare("kernel", wanted, mine, False))
        return out

    def converge(self, active: Node, *backups: Node, seconds: float = 200.0) -> None:
        """Without further faults the backups become equal, and stay so.  (A lost event may be made good for only after
        the longest back-off, and the table is read twice then.)"""
        self.heal()

        def settled() -> bool:
            for node in (active, *backups):
                if node.kernel.lost or node.up.verdict(self.now).verdict != readiness.READY:
                    return False
            complete = all(backup.up.complete for backup in backups)
            return complete and active.up.lag(self.now)[0] == 0 and not differences()

        def differences() -> list[str]:
            return [text for backup in backups for text in self.differences(active, backup)]

        try:
            self.run_until(settled, seconds)
        except AssertionError:
            verdicts = [f"{node.name}: {node.up.verdict(self.now)}" for node in (active, *backups)]
            raise AssertionError("\n".join([*verdicts, *differences()])) from None
        self.run(3.0)
        assert not differences()
        self.run_until(settled, 3.0)  # a digest may be under way
        for node in (active, *backups):
            assert node.up.verdict(self.now).verdict == readiness.READY, node.up.verdict(self.now)


def _compare(where: str, wanted: dict[bytes, Flow], have: dict[bytes, Flow], state: bool) -> Iterable[str]:
    for key in wanted.keys() - have.keys():
        yield f"{where}: {wanted[key].orig} is missing"
    for key in have.keys() - wanted.keys():
        yield f"{where}: {have[key].orig} is too much"
    for key in have.keys() & wanted.keys():
        one, two = view(wanted[key], state), view(have[key], state)
        if one != two:
            yield f"{where}: {one} on the active node is {two} here"


def opened(datagram: bytes, kind: int = wire.DATA) -> bool:
    """Is this datagram of the given kind?"""
    return datagram[1] == kind
