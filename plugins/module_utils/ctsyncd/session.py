# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The session with one peer: handshake, sealing, replay window, reliable and ordered blocks (docs/protocol.md).

Sans-I/O: fed with datagrams and the time, asked for datagrams and the next deadline.  Times are seconds of a monotonic
clock that the caller owns.  What the peer does wrong never raises: it is dropped and counted by kind.
"""

from __future__ import annotations

import collections
import itertools
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from . import wire
from .constants import MAX_KEYS
from .crypto import Aead, Crypto
from .errors import WireError
from .keyring import Agreement, key_info
from .paths import SMALLEST_PAYLOAD, Paths

WINDOW_BLOCKS = 512  # blocks that a receiver buffers ahead; the credit that it gives
REPLAY_WINDOW = 1024  # datagrams that may arrive late
_REPLAY_MASK = (1 << REPLAY_WINDOW) - 1
ACK_DELAY_S = 0.05  # longest wait before a block is acknowledged ...
ACK_BLOCKS = 16  # ... unless so many came: the smallest window, so no sender waits for the delay
ACK_HOLE_S = 0.005  # while blocks are missing or come twice: between two acknowledgements
RETRANSMIT_MIN_S = 0.2
RETRANSMIT_MAX_S = 2.0
STUBBORN = 4  # times that a long block was sent again, while others arrive: is it too long for the link?
TIMEOUT_BLOCKS = 2  # sent again at a timeout, the oldest ones (RFC 9002, 6.2.4)
LATER = 1 / 8  # of the interval: so much later one node's heartbeat is due, so that it is an answer to the other's
REORDER_THRESHOLD = 3  # datagrams later than a block's that are heard before it counts as lost (RFC 9002, 6.1.1) ...
REORDER_S = 0.02  # ... or one, so long after 5/4 of the round-trip time (RFC 9002, 6.1.2)
SEND_WINDOW_FIRST = 128  # blocks on their way; each acknowledged one adds one, up to WINDOW_BLOCKS
SEND_WINDOW_MIN = 16  # it is halved down to this
QUEUE_S = 0.15  # beyond the shortest round-trip time: blocks queue somewhere, the window grows no more ...
QUEUE_MAX_S = 0.5  # ... and is halved
LOSS_MAX = 0.7  # share of the blocks that are lost on any line; beyond it they are lost in a short queue
_RECENT_BLOCKS = 128  # over so many the share is taken
_SAMPLES = 4  # of the round-trip time; a single one may be long because acknowledgements were lost
_BACK_OFF = 4  # times that the time to a retransmission doubles; by then it is RETRANSMIT_MAX_S

_ABOUT_LINKS = (wire.FRAME_PROBE, wire.FRAME_ECHO)
# the longest HEARD, ACK, STATUS and KEYS
_NEWS_BYTES = 4 * wire.TLV_BYTES + 12 + 16 + wire.MAX_EARLY_BYTES + 6 + MAX_KEYS * wire.KEY_CHECK_BYTES
_MAX_PACKETS = 1 << 62  # per key; never reached, and refused rather than wrapped


class SessionUp(NamedTuple):
    """A fresh session: both sides proved to be alive and to hold the key.  Nothing of an older one is left."""

    peer_version: str
    capabilities: int


class BlockReceived(NamedTuple):
    """A block of records, in order, exactly once."""

    records: bytes


class StatusReceived(NamedTuple):
    status: wire.Status


class PeerLeft(NamedTuple):
    """The peer said that it stops."""


_UNKNOWN = wire.Status(wire.ROLE_UNKNOWN, 0, 0)


class _InFlight:
    """A block that the peer has not acknowledged."""

    __slots__ = ("acked", "again", "born", "frame", "lost", "number", "records", "sent")

    def __init__(self, frame: bytes, records: int, born: float) -> None:
        self.frame = frame
        self.records = records
        self.born = born
        self.sent = 0.0  # last
        self.number = 0  # of the datagram of its last sending
        self.again = 0  # times that it was sent after the first one
        self.lost = True  # it is not on its way, but waits to be sent
        self.acked = False


class _Keys:
    """The peer's keys of one pair of nonces, made when a key id is first used."""

    def __init__(self, crypto: Crypto, secrets: Mapping[int, bytes], salt: bytes, sender: str, receiver: str) -> None:
        self._crypto = crypto
        self._secrets = secrets
        self._salt = salt
        self._names = (sender, receiver)
        self._made: dict[int, Aead] = {}

    def __call__(self, key_id: int) -> Aead:
        """Raises WireError ``unknown_key``."""
        made = self._made.get(key_id)
        if made is None:
            secret = self._secrets.get(key_id)
            if secret is None:
                raise WireError("unknown_key", str(key_id))
            made = self._made[key_id] = self._crypto.derive(secret, self._salt, key_info(b"data", key_id, *self._names))
        return made

    def hold(self, secrets: Mapping[int, bytes]) -> None:
        """Open with these from now on."""
        before, self._secrets = self._secrets, secrets
        for key_id in [key_id for key_id in self._made if before.get(key_id) != secrets.get(key_id)]:
            del self._made[key_id]


class _Sealer:
    """Seals datagrams of one kind under one key.

    The AEAD's nonce depends on the packet number and on the contents: a node that goes on from a state of the past,
    with numbers that it used before, uses other nonces for other contents, and says the same in the same datagram.
    The numbers go on when another key is used, and when the former one is used again.
    """

    def __init__(
        self,
        crypto: Crypto,
        secret: bytes,
        *,
        key_id: int,
        kind: int,
        nonce: bytes,
        salt: bytes,
        names: tuple[str, str],
    ) -> None:
        self.nonce = nonce
        self.number = 0  # of the next datagram
        self._kind = kind
        self._crypto = crypto
        self._salt = salt
        self._names = names
        self.use(key_id, secret)

    def use(self, key_id: int, secret: bytes) -> None:
        """Seal with this pre-shared key from now on."""
        info = key_info(b"hello" if self._kind == wire.HELLO else b"data", key_id, *self._names)
        self.key_id = key_id
        self._aead = self._crypto.derive(secret, self._salt, info)
        self._digest = self._crypto.derive_digest(secret, self._salt, b"ctsync nonce " + info)

    def seal(self, plaintext: bytes) -> bytes:
        """The whole datagram."""
        header = wire.encode_header(self._kind, self.key_id, self.nonce, self.number)
        self.number += 1
        digest = self._digest(header, plaintext)
        return header + digest + self._aead.seal(wire.aead_nonce(header, digest), plaintext, header)


class _Parts:
    """A block that comes in parts.  They may overlap: a link that takes less cuts a block into other ones."""

    __slots__ = ("_came", "_records")

    def __init__(self, total: int) -> None:
        self._records = bytearray(total)
        self._came = 0  # bit k: byte k

    def add(self, part: wire.Part) -> bytes | None:
        """All records, with the last part.  Raises WireError ``malformed``."""
        length = len(part.records)
        if part.total != len(self._records):
            raise WireError("malformed", "part of a longer or shorter block")
        self._records[part.offset : part.offset + length] = part.records
        self._came |= ((1 << length) - 1) << part.offset
        return bytes(self._records) if self._came == (1 << part.total) - 1 else None


class _Established:
    """Everything that lives and dies with one pair of nonces."""

    def __init__(self, hello: _Sealer, peer_nonce: bytes, send: _Sealer, receive: _Keys, agreement: Agreement) -> None:
        self.hello = hello
        self.local_nonce = hello.nonce
        self.peer_nonce = peer_nonce
        self.confirmed = False  # the peer's first DATA proves that it has the session too
        self.doubted = False  # the peer seems to have forgotten it
        self.sealer = send
        self.receive_keys = receive
        self.agreement = agreement
        # replay protection (RFC 4303, 3.4.3)
        self.highest = -1
        self.seen = 0
        self.carried = -1  # the highest of those that brought more than probes of links
        self.beat = b""  # the latest one began with a heartbeat; this of it will be in the next one, if nothing happens
        self.status = StatusReceived(_UNKNOWN)  # what that said
        self.said = b""  # the same of this node's own heartbeats; nothing where it has changed
        # sending
        self.next_block = 0
        self.limit = WINDOW_BLOCKS
        self.in_flight: dict[int, _InFlight] = {}
        self.records = 0  # in them
        self.acked = 0  # all blocks below it are acknowledged; it itself is not
        self.acked_early = 0  # bit k: so is block acked + 1 + k
        self.sums = collections.deque([0])  # CRC-32 over the records of all blocks before block acked, acked + 1, ...
        self.ack_number = -1  # of the datagram of the latest acknowledgement
        self.heard = -1  # the highest of this node's packet numbers that the peer has heard
        self.sent: collections.deque[tuple[int, _InFlight]] = collections.deque()  # by packet number; some out of date
        self.lost: collections.deque[_InFlight] = collections.deque()  # to be sent again; some out of date
        self.timeout_at = 0.0
        self.timeouts = 0  # since an acknowledgement brought something; the first one is but a probe
        self.srtt: float | None = None
        self.shortest = float("inf")  # round-trip time
        self.samples: collections.deque[float] = collections.deque(maxlen=_SAMPLES)
        self.queueing = 0.0  # by how much the latest ones were longer, all of them
        # congestion: blocks that may be on their way, and are
        self.window = SEND_WINDOW_FIRST
        self.outstanding = 0
        self.recently_lost = 0
        self.recently_acked = 0
        self.shrunk = 0  # packet number of the first datagram after the window was halved
        # receiving
        self.expected = 0
        self.sum = 0  # CRC-32 over the records of all blocks before it
        self.early: dict[int, bytes] = {}
        self.early_bits = 0  # bit k: block expected + 1 + k is in early
        self.parts: dict[int, _Parts] = {}  # blocks of which parts came
        self.ack_at: float | None = None
        self.ack_sent = float("-inf")
        self.unacked = 0  # blocks since then


class Session:
    """The protocol engine towards one peer.

    ``secrets`` maps key ids to pre-shared keys: any of them opens, ``send_key`` seals if the peer has it, too.
    ``random`` gives n fresh random bytes; ``payload`` is the largest datagram in bytes (UDP payload), ``paths`` the
    links to the peer, if there are more than one.
    """

    def __init__(
        self,
        node: str,
        peer: str,
        *,
        crypto: Crypto,
        secrets: Mapping[int, bytes],
        send_key: int,
        random: Callable[[int], bytes],
        version: str,
        payload: int = 1400,
        hello_interval_s: float = 0.2,
        dead_after_s: float = 1.0,
        now: float = 0.0,
        paths: Paths | None = None,
    ) -> None:
        self.node = node
        self.peer = peer
        self._answers = LATER if node > peer else 0.0
        self.counters: collections.Counter[str] = collections.Counter()
        self.last_seen: float | None = None
        self._crypto = crypto
        self._secrets = secrets
        self._send_key = send_key
        self._random = random
        self._version = version
        self.paths = Paths(payload=payload) if paths is None else paths
        self.paths.set_timers(hello_interval_s, dead_after_s)
        self._payload = self.paths.payload
        self._generation = self.paths.generation
        self._interval = hello_interval_s
        self._later = self._answers * hello_interval_s
        self._dead_after = dead_after_s
        self._hello = self._fresh_hello()  # of the next session; replaced as soon as a session uses it
        self._hellos = 0  # sent without a session
        self._established: _Established | None = None
        self._hello_at = now
        self._heartbeat_at = now
        self._status = wire.Status(wire.ROLE_UNKNOWN, 0, 0)
        self._status_due = False
        self._out: list[bytes] = []
        self._probes: list[tuple[int, bytes]] = []  # link and datagram: what goes over others than the chosen one

    def set_timers(self, hello_interval_s: float, dead_after_s: float) -> None:
        """Other timers, from the last sign of life on where they are shorter, else from the next one."""
        self._heartbeat_at -= max(0.0, self._interval - hello_interval_s) * (1 + self._answers)
        self._interval = hello_interval_s
        self._later = self._answers * hello_interval_s
        self._dead_after = dead_after_s
        self.paths.set_timers(hello_interval_s, dead_after_s)

    # --- keys ---------------------------------------------------------------------------------------------------------

    def obstacle(self, secrets: Mapping[int, bytes], now: float) -> str:
        """Why :meth:`set_keys` would cut the session with a peer that is alive; empty if it would not."""
        session = self._established
        if session is None or not self.alive(now):
            return ""
        heard = session.agreement.heard
        if secrets.get(heard) == self._secrets.get(heard):
            return ""
        return f"{self.peer} sends with key {heard}: keep that as it is until {self.peer} sends with another one"

    def set_keys(self, secrets: Mapping[int, bytes], send_key: int, now: float) -> None:
        """Hold other pre-shared keys from now on.  The session goes on, if both nodes have a key in common."""
        self._secrets = secrets
        self._send_key = send_key
        self._hello = self._fresh_hello()
        session = self._established
        if session is None:
            self._hello_at = now
            return
        session.receive_keys.hold(secrets)
        session.agreement.hold(secrets, send_key)
        self._use_key(session)
        self._status_due = True

    def keys(self) -> dict[str, Any]:
        """The peer's keys as far as they are known (``accepts``, ``sends``), the one that this node uses (``used``),
        and ids under which both have different keys (``differ``)."""
        session = self._established
        if session is None:
            return {"accepts": None, "sends": None, "used": None, "differ": []}
        return session.agreement.describe()

    def key_problems(self) -> list[str]:
        return [] if self._established is None else self._established.agreement.problems()

    def _use_key(self, session: _Established) -> None:
        """The one that the agreement says."""
        key_id = session.agreement.sends
        session.sealer.use(key_id, self._secrets[key_id])
        session.hello.use(key_id, self._secrets[key_id])

    # --- what the engine asks ----------------------------------------------------------------------------------------

    @property
    def established(self) -> bool:
        return self._established is not None

    @property
    def in_flight(self) -> bool:
        """Blocks wait for their acknowledgement."""
        return self._established is not None and bool(self._established.in_flight)

    def alive(self, now: float) -> bool:
        """A session stands and the peer was heard of within ``dead_after_s``."""
        seen = self.last_seen
        return self._established is not None and seen is not None and now - seen <= self._dead_after

    @property
    def block_bytes(self) -> int:
        """Bytes of records that one block may carry."""
        return self._payload - wire.DATA_OVERHEAD_BYTES - wire.BLOCK_HEADER_BYTES

    def credit(self) -> int:
        """Blocks that may be sent now without overrunning the peer's buffer or the way there."""
        session = self._established
        if session is None:
            return 0
        return max(0, min(session.limit - session.next_block, session.window - len(session.in_flight)))

    def lag(self) -> tuple[int, float | None]:
        """Records sent and not acknowledged, and when the oldest of them came up (monotonic seconds)."""
        session = self._established
        if session is None or not session.in_flight:
            return 0, None
        return session.records, session.in_flight[session.acked].born

    # --- what the engine does ----------------------------------------------------------------------------------------

    def send_block(self, records: bytes, count: int, born: float, now: float) -> None:
        """Send ``count`` records, the oldest of which came up at ``born``.  Ask :meth:`credit` first.

        Raises ValueError without a session, without credit, or for a block over ``block_bytes``.
        """
        session = self._established
        if session is None or self.credit() <= 0 or len(records) > self.block_bytes:
            raise ValueError("no session, no credit or block too long")
        number = session.next_block
        session.next_block += 1
        session.sums.append(zlib.crc32(records, session.sums[-1]))
        flight = _InFlight(wire.encode_block(number, records), count, born)
        if not session.in_flight:
            self._start_timer(session, now)
        session.in_flight[number] = flight
        session.records += count
        self.counters["records_sent"] += count
        more = b""
        news = session.ack_at is not None or self._status_due or now >= self._heartbeat_at - self._interval / 2
        if news and len(records) + _NEWS_BYTES <= self.block_bytes:
            more = self._news(session, now, riding=True)
        self._send_flight(session, flight, now, more)

    def set_status(self, status: wire.Status) -> None:
        """What the next heartbeat says; a changed role or flag is told at once."""
        if status == self._status:
            return
        if status[:2] != self._status[:2]:
            self._status_due = True
        self._status = status
        if self._established is not None:
            self._established.said = b""

    def say_bye(self) -> None:
        """Tell the peer that this node's daemon stops."""
        if self._established is not None:
            self._send(self._established, wire.tlv(wire.FRAME_BYE))

    # --- input -------------------------------------------------------------------------------------------------------

    def receive(self, datagram: bytes, now: float, link: int = 0) -> list[NamedTuple]:
        """Take a datagram that came over a link; returns what it brought.  Never raises for what it holds."""
        events: list[NamedTuple] = []
        try:
            header = wire.decode_header(datagram)
            if header.kind == wire.HELLO:
                self._receive_hello(header, datagram, now, events)
            else:
                self._receive_data(header, datagram, now, link, events)
        except WireError as error:  # what came before it in the same datagram is taken already, and stays
            self.counters["dropped_" + error.kind] += 1
        return events

    def _receive_hello(self, header: wire.Header, datagram: bytes, now: float, events: list[NamedTuple]) -> None:
        secret = self._secrets.get(header.key_id)
        if secret is None:
            raise WireError("unknown_key", str(header.key_id))
        aead = self._crypto.derive(secret, header.sender, key_info(b"hello", header.key_id, self.peer, self.node))
        plaintext = aead.open(*wire.sealed_parts(header, datagram))
        hello = wire.decode_hello(plaintext)
        if hello.node != self.peer:
            raise WireError("wrong_node", hello.node)
        self.counters["hellos_received"] += 1
        session = self._established
        if session is not None and session.peer_nonce == header.sender:
            if hello.echo != session.local_nonce:  # it has not heard our half yet
                self._send_hello(session.hello, session.peer_nonce, header.key_id)
        elif hello.echo == self._hello.nonce:  # only a live peer can know this nonce
            events.append(self._establish(header, hello, now))
        elif hello.echo == wire.NO_NONCE:  # a peer without a session, or a replay: only the former will echo our nonce
            self._send_hello(self._hello, header.sender, header.key_id)
        else:  # answers a nonce of the past.  Answered in turn, a replayed HELLO would start a new session.
            raise WireError("stale_hello")

    def _establish(self, header: wire.Header, hello: wire.Hello, now: float) -> SessionUp:
        """The key of this HELLO is one that both have."""
        sealer, self._hello = self._hello, self._fresh_hello()
        peer_nonce, key_id = header.sender, header.key_id
        salts = (sealer.nonce + peer_nonce, peer_nonce + sealer.nonce)
        agreement = Agreement(self._crypto, (self.node, self.peer), salts, key_id)
        agreement.hold(self._secrets, self._send_key)
        self._established = _Established(
            sealer,
            peer_nonce,
            self._sealer(wire.DATA, sealer.nonce, salts[0], key_id),
            _Keys(self._crypto, self._secrets, salts[1], self.peer, self.node),
            agreement,
        )
        self.last_seen = now
        self._heartbeat_at = now
        self._status_due = True
        self.counters["sessions"] += 1
        # the last word of the handshake: the peer may still wait for its own nonce to come back
        self._send_hello(sealer, peer_nonce, key_id)
        self._hello_at = now + self._interval
        self._probes.clear()
        self.paths.begin(now)
        self._follow_paths(now)
        return SessionUp(hello.version, hello.capabilities)

    def _receive_data(
        self, header: wire.Header, datagram: bytes, now: float, link: int, events: list[NamedTuple]
    ) -> None:
        session = self._established
        if session is None or header.sender != session.peer_nonce[:8]:
            if session is not None and not self.alive(now):
                self._doubt(session, now)
            raise WireError("unknown_session")
        number = header.number
        age = session.highest - number
        if age >= REPLAY_WINDOW or (age >= 0 and session.seen >> age & 1):
            raise WireError("replayed")
        aead = session.receive_keys(header.key_id)
        plaintext = aead.open(*wire.sealed_parts(header, datagram))
        if age < 0:
            session.seen = (session.seen << min(-age, REPLAY_WINDOW) | 1) & _REPLAY_MASK
            session.highest = number
            session.agreement.heard = header.key_id
        else:
            session.seen |= 1 << age
        self.last_seen = now
        self.paths.heard_at[link] = now
        session.confirmed = True
        self.counters["datagrams_received"] += 1
        begins = 0
        if age < 0 and not session.in_flight:
            heard_number = wire.beat_number(plaintext, session.beat)
            if heard_number >= 0:
                if not self._receive_same(session, heard_number, number, now):
                    return
                events.append(session.status)
                begins = wire.BEAT_BYTES
                if len(plaintext) == begins:
                    return
        session.beat = b""
        frames = wire.iter_tlv(plaintext, begins)
        self._receive_frames(session, frames, number=number, link=link, now=now, events=events)
        if age < 0:
            session.beat = wire.beat_rest(plaintext)

    def _receive_same(self, session: _Established, heard: int, number: int, now: float) -> bool:
        """A heartbeat that says what the one before said; nothing was told since.  False where the session ends."""
        if heard >= session.sealer.number:
            self._forget("went_back", now)
            return False
        session.heard = max(session.heard, heard)
        session.carried = session.ack_number = number
        self._beat_together(now)
        return True

    def _beat_together(self, now: float) -> None:
        """The peer beats, and this node is awake: it beats, too, if it is nearly time."""
        if now >= self._heartbeat_at - self._interval / 2:
            self._heartbeat_at = now

    def _receive_frames(
        self,
        session: _Established,
        frames: Iterator[tuple[int, bytes]],
        *,
        number: int,
        link: int,
        now: float,
        events: list[NamedTuple],
    ) -> None:
        heard = None
        for kind, payload in frames:
            if kind in _ABOUT_LINKS:
                self._receive_about_links(kind, payload, link, now)
                continue
            session.carried = max(session.carried, number)
            if kind == wire.FRAME_BLOCK:
                events.extend(self._receive_block(session, payload, now))
            elif kind == wire.FRAME_ACK:
                ack = wire.decode_ack(payload)
                if self._contradicts(session, ack, heard, number, now):
                    return
                self._receive_ack(session, ack, now)
            elif kind == wire.FRAME_HEARD:
                heard = wire.decode_heard(payload)
                if heard.number >= session.sealer.number:
                    self._forget("went_back", now)
                    return
                session.heard = max(session.heard, heard.number)
            elif kind == wire.FRAME_STATUS:
                session.status = StatusReceived(wire.decode_status(payload))
                events.append(session.status)
                self._beat_together(now)
            elif kind == wire.FRAME_BYE:
                events.append(PeerLeft())
            elif kind == wire.FRAME_PART:
                events.extend(self._receive_part(session, wire.decode_part(payload), now))
            elif kind == wire.FRAME_KEYS:
                self._receive_keys(session, wire.decode_keys(payload))
            else:
                self.counters["skipped_unknown_frame"] += 1

    def _receive_keys(self, session: _Established, keys: wire.Keys) -> None:
        if session.agreement.told(keys):
            self._use_key(session)
            self._status_due = True  # the peer sees what is used

    def _contradicts(
        self, session: _Established, ack: wire.Ack, heard: wire.Heard | None, number: int, now: float
    ) -> bool:
        """Does a later datagram take back an acknowledgement, or any acknowledge what this node has not sent?"""
        if ack.expected + (1 + ack.early.bit_length() if ack.early else 0) > session.next_block:
            self._forget("went_back", now)
            return True
        if number > session.ack_number:
            session.ack_number = number
            if ack.expected < session.acked:
                self._forget("peer_went_back", now)
                return True
        if heard is None or ack.expected < session.acked or heard.blocks == session.sums[ack.expected - session.acked]:
            return False
        self._forget("differed", now)
        return True

    def _doubt(self, session: _Established, now: float) -> None:
        """Nothing is heard in this session, but something of another one: one of the nodes may be in a state of the
        past, when the session of the other one did not exist yet.  Nothing proves it.  A HELLO does no harm."""
        if not session.doubted:
            session.doubted = True
            self._hello = self._fresh_hello()  # a state of the past has a nonce of the past
            self._hello_at = min(self._hello_at, now)
        if now >= self._hello_at:
            self._call(now)

    def _forget(self, why: str, now: float) -> None:
        """One of the nodes goes on from a state of the past (a virtual machine was restored from a snapshot): it said
        or acknowledged more in this session than it knows.  The session is worth nothing, its keys are used up."""
        self.counters["sessions_ended_" + why] += 1
        self._end()
        self._hello = self._fresh_hello()
        self._hello_at = now
        self._out.clear()

    def _end(self) -> None:
        self._established = None
        self.paths.end()
        self._probes.clear()

    def _receive_about_links(self, kind: int, payload: bytes, link: int, now: float) -> None:
        if kind == wire.FRAME_PROBE:
            known = self.paths.receive_probe(wire.decode_probe(payload), link, now)
        else:
            known = self.paths.receive_echo(wire.decode_echo(payload), link, now)
            self._follow_paths(now)
        if not known:
            raise WireError("wrong_link")

    def _follow_paths(self, now: float) -> None:
        """Another link carries the session, or it takes other lengths than before."""
        paths = self.paths
        if self._generation == paths.generation:
            return
        self._generation = paths.generation
        self._payload = paths.payload
        session = self._established
        if session is None:
            return
        failed_over, paths.failed_over = paths.failed_over, False
        most = self._payload - wire.DATA_OVERHEAD_BYTES
        for flight in session.in_flight.values():  # the oldest one first, but those that were known to be lost
            if not flight.lost and (failed_over or len(flight.frame) > most):
                flight.lost = True
                session.outstanding -= 1
                session.lost.append(flight)
        # what was learned of one link does not hold for another one
        session.srtt, session.shortest, session.queueing = None, float("inf"), 0.0
        session.samples.clear()
        if failed_over:
            session.sent.clear()
            session.window = min(max(session.window, SEND_WINDOW_FIRST), WINDOW_BLOCKS)
            self._start_timer(session, now)
            self._status_due = True  # the peer wants an acknowledgement

    def _receive_part(self, session: _Established, part: wire.Part, now: float) -> list[NamedTuple]:
        self.counters["parts_received"] += 1
        number = part.block
        if not self._wanted(session, number, now):
            return []
        parts = session.parts.get(number)
        if parts is None:
            parts = session.parts[number] = _Parts(part.total)
        records = parts.add(part)
        return [] if records is None else self._take_block(session, number, records, now)

    def _receive_block(self, session: _Established, payload: bytes, now: float) -> list[NamedTuple]:
        number, records = wire.decode_block(payload)
        return self._take_block(session, number, records, now) if self._wanted(session, number, now) else []

    def _wanted(self, session: _Established, number: int, now: float) -> bool:
        """Is this block missing?  Raises WireError ``over_credit``."""
        if number >= session.expected + WINDOW_BLOCKS:
            raise WireError("over_credit")
        if number < session.expected or number in session.early:
            self.counters["blocks_duplicate"] += 1
            self._ack_soon(session, now)
            return False
        return True

    def _take_block(self, session: _Established, number: int, records: bytes, now: float) -> list[NamedTuple]:
        if session.parts:
            session.parts.pop(number, None)
        self.counters["blocks_received"] += 1
        session.unacked += 1
        if number != session.expected:
            self.counters["blocks_early"] += 1
            session.early[number] = records
            session.early_bits |= 1 << (number - session.expected - 1)
            session.said = b""
            self._ack_soon(session, now)
            return []
        events: list[NamedTuple] = [BlockReceived(records)]
        session.said = b""
        session.sum = zlib.crc32(records, session.sum)
        number += 1
        while number in session.early:
            records = session.early.pop(number)
            events.append(BlockReceived(records))
            session.sum = zlib.crc32(records, session.sum)
            number += 1
        session.early_bits >>= number - session.expected
        session.expected = number
        if session.unacked >= ACK_BLOCKS or now - session.ack_sent >= ACK_DELAY_S:  # no wake-up for it alone
            session.ack_at = now
        elif session.early:
            self._ack_soon(session, now)
        elif session.ack_at is None:
            session.ack_at = now + ACK_DELAY_S
        return events

    @staticmethod
    def _ack_soon(session: _Established, now: float) -> None:
        """Something is missing, or an acknowledgement was lost: tell at once, but not all the time."""
        moment = max(now, session.ack_sent + ACK_HOLE_S)
        session.ack_at = moment if session.ack_at is None else min(session.ack_at, moment)

    def _receive_ack(self, session: _Established, ack: wire.Ack, now: float) -> None:
        if ack.expected < session.acked:
            return  # overtaken by a later one
        if ack.expected < session.next_block and ack.expected not in session.in_flight:
            raise WireError("malformed", "takes back an acknowledgement")
        session.limit = max(session.limit, min(ack.limit, ack.expected + WINDOW_BLOCKS))  # a bound for in_flight
        in_flight = session.in_flight
        numbers = [number for number in range(session.acked, ack.expected) if number in in_flight]
        for _block in range(ack.expected - session.acked):
            session.sums.popleft()
        known = session.acked_early >> (ack.expected - session.acked)
        fresh = ack.early & ~known
        session.acked, session.acked_early = ack.expected, ack.early | known
        while fresh:
            lowest = fresh & -fresh
            fresh ^= lowest
            numbers.append(ack.expected + lowest.bit_length())
        if numbers:
            for number in numbers:
                flight = in_flight.pop(number)
                flight.acked = True
                session.records -= flight.records
                session.outstanding -= not flight.lost
            if not flight.again:  # an honest sample (Karn); of the last one, that waited least for its acknowledgement
                self._measure(session, now - flight.sent)
            session.recently_acked += len(numbers)
            if not self._congested(session):
                session.window = min(session.window + len(numbers), WINDOW_BLOCKS)
            elif session.queueing > QUEUE_MAX_S:
                self._shrink(session)
            self._start_timer(session, now)
        self._detect_losses(session, now)

    @staticmethod
    def _measure(session: _Established, sample: float) -> None:
        session.srtt = sample if session.srtt is None else 0.875 * session.srtt + 0.125 * sample
        session.shortest = min(session.shortest, sample)
        session.samples.append(sample)
        session.queueing = min(session.samples) - session.shortest

    @staticmethod
    def _congested(session: _Established) -> bool:
        """Would sending more only make a queue longer, or overflow it?  A line that loses at random is no reason."""
        recent = session.recently_lost + session.recently_acked
        return session.queueing > QUEUE_S or (recent > SEND_WINDOW_MIN and session.recently_lost > LOSS_MAX * recent)

    @staticmethod
    def _shrink(session: _Established) -> None:
        """Halve the window, once in a round trip."""
        if session.heard >= session.shrunk:
            session.window = max(session.window // 2, SEND_WINDOW_MIN)
            session.shrunk = session.sealer.number

    def _detect_losses(self, session: _Established, now: float) -> None:
        """What the peer lacks, although it has heard what was sent later (RFC 9002, 6.1)."""
        latest = now - 1.25 * (session.srtt or 0.0) - REORDER_S
        found = 0
        while session.sent:
            number, flight = session.sent[0]
            if not flight.acked and flight.number == number:
                if number >= session.heard or (number + REORDER_THRESHOLD > session.heard and flight.sent > latest):
                    break
                flight.lost = True
                session.outstanding -= 1
                session.lost.append(flight)
                found += 1
            session.sent.popleft()
        session.recently_lost += found
        if found and self._congested(session):
            self._shrink(session)
        if session.recently_lost + session.recently_acked > _RECENT_BLOCKS:
            session.recently_lost //= 2
            session.recently_acked //= 2

    # --- output ------------------------------------------------------------------------------------------------------

    def poll(self, now: float) -> list[bytes]:
        """Datagrams to send now: answers, retransmissions, acknowledgements, heartbeats."""
        session = self._established
        if session is None:
            if now >= self._hello_at:
                self._call(now)
        else:
            self._poll_established(session, now)
        return self.take()

    def take(self) -> list[bytes]:
        """Of these what is made already: blocks that were given meanwhile, and answers."""
        if not self._out:
            return []
        out, self._out = self._out, []
        self.counters["datagrams_sent"] += len(out)
        self.counters["bytes_sent"] += sum(map(len, out))
        return out

    def route(self, datagrams: list[bytes]) -> list[tuple[int, list[bytes]]]:
        """Link by link, what :meth:`poll` gave and what goes over other links besides.

        A HELLO goes over all of them: before a session nothing is known of any.
        """
        chosen = self.paths.chosen
        routed = [(chosen, datagrams)] if datagrams else []
        if len(self.paths) > 1:
            hellos = [datagram for datagram in datagrams if datagram[1] == wire.HELLO]
            if hellos:
                routed.extend((link, hellos) for link in range(len(self.paths)) if link != chosen)
            routed.extend((link, [datagram]) for link, datagram in self._probes)
            self._probes.clear()
        return routed

    def _poll_established(self, session: _Established, now: float) -> None:
        if not session.confirmed and now >= self._hello_at:
            self._send_hello(session.hello, session.peer_nonce, session.agreement.sends)
            self._hello_at = now + self._interval
        paths = self.paths
        paths.wake(now)
        if now >= paths.due:
            paths.examine(now)
            self._follow_paths(now)
        due = session.ack_at
        if self._status_due or now >= self._heartbeat_at or (due is not None and now >= due):
            self._send(session, self._news(session, now))
        if now >= paths.due:
            self._poll_paths(session, now)
        if session.in_flight or session.lost:
            self._poll_retransmissions(session, now)

    def _poll_paths(self, session: _Established, now: float) -> None:
        for link, frames in self.paths.poll(now):
            if link == self.paths.chosen:
                self._send(session, frames)
            else:
                datagram = session.sealer.seal(frames)
                self.counters["datagrams_sent"] += 1
                self.counters["bytes_sent"] += len(datagram)
                self._probes.append((link, datagram))
        self._follow_paths(now)  # a link may take less now

    def _news(self, session: _Established, now: float, riding: bool = False) -> bytes:
        """The acknowledgement, and the status where it is due or nearly so.  Either is told a little early if it is
        ``riding`` on a datagram that is sent anyway: that saves a datagram here, and a wake-up on the other side."""
        status = self._status_due or now >= self._heartbeat_at - self._interval / 2
        # The number first: to a node in a state of the past the rest makes no sense.
        if status and session.said:
            frames = wire.encode_beat(session.carried, session.said)
        else:
            frames = wire.encode_heard(wire.Heard(session.carried, session.sum)) if session.carried >= 0 else b""
            frames += wire.encode_ack(self._ack(session))  # with each status: that heals a lost acknowledgement
            if status:
                frames += wire.encode_status(self._status)
                session.said = wire.beat_rest(frames)
        session.ack_at = None
        session.ack_sent = now
        session.unacked = 0
        if status:
            frames += session.agreement.riding()
            self._status_due = False
            self._heartbeat_at = now + self._interval + self._later
            if riding:
                self.paths.wake(now)
            else:
                frames += self.paths.riding(now, self._payload - wire.DATA_OVERHEAD_BYTES - len(frames))
        return frames

    def _poll_retransmissions(self, session: _Established, now: float) -> None:
        while session.lost and session.outstanding < session.window:
            flight = session.lost.popleft()
            if flight.lost and not flight.acked:
                self._send_again(session, flight, now)
        if session.in_flight and now >= session.timeout_at:
            # Nothing came back for long.  What is sent now is to make the peer say what it has: no more is known.
            count = 1
            self.paths.suspect(now)
            if session.timeouts:
                count = TIMEOUT_BLOCKS
                session.window = max(session.window // 2, SEND_WINDOW_MIN)
                session.shrunk = session.sealer.number
                self.counters["timeouts"] += 1
            first = max(RETRANSMIT_MIN_S, 3 * (session.srtt or 0.0))
            session.timeout_at = now + min(first * (1 << session.timeouts), RETRANSMIT_MAX_S)
            session.timeouts = min(session.timeouts + 1, _BACK_OFF)
            for flight in list(itertools.islice(session.in_flight.values(), count)):
                self._send_again(session, flight, now)

    @staticmethod
    def _start_timer(session: _Established, now: float) -> None:
        """From now on something new is waited for: first until the peer must have answered, if nothing was lost."""
        session.timeouts = 0
        session.timeout_at = now + min(2 * (session.srtt or RETRANSMIT_MIN_S) + ACK_DELAY_S, RETRANSMIT_MAX_S)

    def _send_flight(self, session: _Established, flight: _InFlight, now: float, more: bytes = b"") -> None:
        session.outstanding += flight.lost
        flight.lost = False
        flight.sent = now
        flight.number = session.sealer.number
        if len(flight.frame) > self._payload - wire.DATA_OVERHEAD_BYTES:
            self._send_parts(session, flight)
        else:
            self._send(session, flight.frame + more)
        session.sent.append((flight.number, flight))

    def _send_parts(self, session: _Established, flight: _InFlight) -> None:
        """The links take less than when the block was made.  ``flight.number`` becomes that of its last datagram."""
        number, records = wire.decode_block(flight.frame[wire.TLV_BYTES :])
        room = self._payload - wire.DATA_OVERHEAD_BYTES - wire.PART_HEADER_BYTES
        for offset in range(0, len(records), room):
            flight.number = session.sealer.number
            part = wire.Part(number, offset, len(records), records[offset : offset + room])
            self._send(session, wire.encode_part(part))
            self.counters["parts_sent"] += 1

    def _send_again(self, session: _Established, flight: _InFlight, now: float) -> None:
        flight.again += 1
        if flight.again >= STUBBORN and len(flight.frame) > SMALLEST_PAYLOAD:
            self.paths.suspect(now)
        self.counters["blocks_retransmitted"] += 1
        self._send_flight(session, flight, now)

    def next_deadline(self) -> float:
        """When :meth:`poll` wants to be called next (monotonic seconds); 0 for at once."""
        session = self._established
        if self._out or self._probes:
            return 0.0
        if session is None:
            return self._hello_at
        if self._status_due or (session.lost and session.outstanding < session.window):
            return 0.0
        deadline = min(self._heartbeat_at, self.paths.due)
        if session.confirmed and session.ack_at is None and not session.in_flight:
            return deadline  # as with all that rests
        if not session.confirmed:
            deadline = min(deadline, self._hello_at)
        if session.ack_at is not None:
            deadline = min(deadline, session.ack_at)
        if session.in_flight:
            deadline = min(deadline, session.timeout_at)
        return deadline

    @staticmethod
    def _ack(session: _Established) -> wire.Ack:
        return wire.Ack(session.expected, session.expected + WINDOW_BLOCKS, session.early_bits)

    def _send(self, session: _Established, frames: bytes) -> None:
        self._out.append(session.sealer.seal(frames))
        if session.sealer.number > _MAX_PACKETS:  # fresh keys long before a nonce could repeat
            self._end()

    def _call(self, now: float) -> None:
        """A HELLO to a peer that may hold any of this node's keys: with each in turn, the one to send with first."""
        others = sorted(self._secrets.keys() - {self._send_key})
        key_id = [self._send_key, *others][self._hellos % (len(others) + 1)]
        self._hellos += 1
        self._send_hello(self._hello, wire.NO_NONCE, key_id)
        self._hello_at = now + self._interval

    def _send_hello(self, sealer: _Sealer, echo: bytes, key_id: int) -> None:
        if sealer.key_id != key_id:
            sealer.use(key_id, self._secrets[key_id])
        self._out.append(sealer.seal(wire.encode_hello(wire.Hello(echo, self.node, 0, self._version))))

    def _fresh_hello(self) -> _Sealer:
        nonce = self._random(wire.NONCE_BYTES)
        return self._sealer(wire.HELLO, nonce, nonce, self._send_key)

    def _sealer(self, kind: int, nonce: bytes, salt: bytes, key_id: int) -> _Sealer:
        names = (self.node, self.peer)
        secret = self._secrets[key_id]
        return _Sealer(self._crypto, secret, key_id=key_id, kind=kind, nonce=nonce, salt=salt, names=names)
