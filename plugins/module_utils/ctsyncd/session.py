# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The session with one peer: handshake, sealing, replay window, reliable and ordered blocks (docs/protocol.md).

Sans-I/O: fed with datagrams and the time, asked for datagrams and the next deadline.  Times are seconds of a monotonic
clock that the caller owns.  What the peer does wrong never raises: it is dropped and counted by kind.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import NamedTuple

from . import wire
from .crypto import Aead, Crypto
from .errors import WireError

WINDOW_BLOCKS = 512  # blocks that a receiver buffers ahead; the credit that it gives
REPLAY_WINDOW = 1024  # datagrams that may arrive late
ACK_DELAY_S = 0.05  # longest wait before a block is acknowledged ...
ACK_BLOCKS = 64  # ... unless so many came
ACK_HOLE_S = 0.005  # while blocks are missing or come twice: between two acknowledgements
RETRANSMIT_MIN_S = 0.2
RETRANSMIT_MAX_S = 2.0
REORDER_THRESHOLD = 3  # later sendings acknowledged before one counts as lost (RFC 9002, 6.1.1)
_BACK_OFF = 4  # times that the time to a retransmission doubles; by then it is RETRANSMIT_MAX_S

_NEWS_BYTES = wire.TLV_BYTES + 16 + wire.MAX_EARLY_BYTES + wire.TLV_BYTES + 6  # the longest ACK and STATUS
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


class _InFlight:
    """A block that the peer has not acknowledged."""

    __slots__ = ("acked", "again", "born", "frame", "level", "order", "records", "sent")

    def __init__(self, frame: bytes, records: int, born: float) -> None:
        self.frame = frame
        self.records = records
        self.born = born
        self.sent = 0.0  # last
        self.order = 0  # of its last sending among all sendings of blocks
        self.level = 0  # timeouts that it went through
        self.again = False  # it was sent more than once
        self.acked = False


class _Keys:
    """Directional keys of one pair of nonces, made when a key id is first used."""

    def __init__(self, crypto: Crypto, secrets: dict[int, bytes], salt: bytes, sender: str, receiver: str) -> None:
        self._crypto = crypto
        self._secrets = secrets
        self._salt = salt
        self._names = sender.encode() + b"\0" + receiver.encode()
        self._made: dict[int, Aead] = {}

    def __call__(self, key_id: int) -> Aead:
        """Raises WireError ``unknown_key``."""
        made = self._made.get(key_id)
        if made is None:
            secret = self._secrets.get(key_id)
            if secret is None:
                raise WireError("unknown_key", str(key_id))
            info = b"ctsync data" + bytes((wire.VERSION, key_id)) + self._names
            made = self._made[key_id] = self._crypto.derive(secret, self._salt, info)
        return made


class _HelloSealer:
    """Seals HELLOs under one fresh nonce: its key comes of the nonce, its packet numbers count up."""

    def __init__(self, nonce: bytes, key_id: int, aead: Aead) -> None:
        self.nonce = nonce
        self._key_id = key_id
        self._aead = aead
        self._number = 0

    def seal(self, hello: bytes) -> bytes:
        header = wire.encode_header(wire.HELLO, self._key_id, self.nonce, self._number)
        sealed = self._aead.seal(_nonce(self._number), hello, header)
        self._number += 1
        return header + sealed


class _Established:
    """Everything that lives and dies with one pair of nonces."""

    def __init__(self, hello: _HelloSealer, peer_nonce: bytes, send: _Keys, receive: _Keys) -> None:
        self.hello = hello
        self.local_nonce = hello.nonce
        self.peer_nonce = peer_nonce
        self.confirmed = False  # the peer's first DATA proves that it has the session too
        self.send_keys = send
        self.receive_keys = receive
        self.packet = 0
        # replay protection (RFC 4303, 3.4.3)
        self.highest = -1
        self.seen = 0
        # sending
        self.next_block = 0
        self.limit = WINDOW_BLOCKS
        self.in_flight: dict[int, _InFlight] = {}
        self.records = 0  # in them
        self.acked = 0  # all blocks below it are acknowledged; it itself is not
        self.acked_early = 0  # bit k: so is block acked + 1 + k
        self.sendings = 0
        self.newest_acked = 0  # the latest sending that was acknowledged
        # sendings in their order, by how many timeouts the block went through; some may be out of date
        self.timers: list[collections.deque[tuple[int, _InFlight]]] = [
            collections.deque() for _level in range(_BACK_OFF + 1)
        ]
        self.lost: list[_InFlight] = []  # to be sent again at once
        self.probe_at = 0.0
        self.probe_wait = 0.0  # 0: the peer is not silent
        self.srtt: float | None = None
        # receiving
        self.expected = 0
        self.early: dict[int, bytes] = {}
        self.early_bits = 0  # bit k: block expected + 1 + k is in early
        self.ack_at: float | None = None
        self.ack_sent = float("-inf")
        self.unacked = 0  # blocks since then


class Session:
    """The protocol engine towards one peer.

    ``secrets`` maps key ids to pre-shared keys (any of them opens, ``send_key`` seals); ``random`` gives n fresh random
    bytes; ``payload`` is the largest datagram in bytes (UDP payload).
    """

    def __init__(
        self,
        node: str,
        peer: str,
        *,
        crypto: Crypto,
        secrets: dict[int, bytes],
        send_key: int,
        random: Callable[[int], bytes],
        version: str,
        payload: int = 1400,
        hello_interval_s: float = 0.2,
        dead_after_s: float = 1.0,
        now: float = 0.0,
    ) -> None:
        self.node = node
        self.peer = peer
        self.counters: collections.Counter[str] = collections.Counter()
        self.last_seen: float | None = None
        self._crypto = crypto
        self._secrets = secrets
        self._send_key = send_key
        self._random = random
        self._version = version
        self._payload = payload
        self._interval = hello_interval_s
        self._dead_after = dead_after_s
        self._hello = self._fresh_hello()  # of the next session; replaced as soon as a session uses it
        self._established: _Established | None = None
        self._hello_at = now
        self._heartbeat_at = now
        self._status = wire.Status(wire.ROLE_UNKNOWN, 0, 0)
        self._status_due = False
        self._out: list[bytes] = []

    def set_timers(self, hello_interval_s: float, dead_after_s: float) -> None:
        """Other timers, from the next sign of life on."""
        self._interval = hello_interval_s
        self._dead_after = dead_after_s

    # --- what the engine asks ----------------------------------------------------------------------------------------

    @property
    def established(self) -> bool:
        return self._established is not None

    def alive(self, now: float) -> bool:
        """A session stands and the peer was heard of within ``dead_after_s``."""
        return self.established and self.last_seen is not None and now - self.last_seen <= self._dead_after

    @property
    def block_bytes(self) -> int:
        """Bytes of records that one block may carry."""
        return self._payload - wire.DATA_HEADER_BYTES - wire.TAG_BYTES - wire.BLOCK_HEADER_BYTES

    def credit(self) -> int:
        """Blocks that may be sent now without overrunning the peer's buffer."""
        session = self._established
        if session is None:
            return 0
        return session.limit - session.next_block

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
        flight = _InFlight(wire.encode_block(number, records), count, born)
        session.in_flight[number] = flight
        session.records += count
        self.counters["records_sent"] += count
        more = self._news(session, now, riding=True) if len(records) + _NEWS_BYTES <= self.block_bytes else b""
        self._send_flight(session, flight, now, more)

    def set_status(self, status: wire.Status) -> None:
        """What the next heartbeat says; a changed role or flag is told at once."""
        if status[:2] != self._status[:2]:
            self._status_due = True
        self._status = status

    def say_bye(self) -> None:
        """Tell the peer that this node's daemon stops."""
        if self._established is not None:
            self._send(self._established, wire.tlv(wire.FRAME_BYE))

    # --- input -------------------------------------------------------------------------------------------------------

    def receive(self, datagram: bytes, now: float) -> list[NamedTuple]:
        """Take a datagram; returns what it brought.  Never raises for what the datagram holds."""
        events: list[NamedTuple] = []
        try:
            header = wire.decode_header(datagram)
            if header.kind == wire.HELLO:
                self._receive_hello(header, datagram, now, events)
            else:
                self._receive_data(header, datagram, now, events)
        except WireError as error:  # what came before it in the same datagram is taken already, and stays
            self.counters["dropped_" + error.kind] += 1
        return events

    def _receive_hello(self, header: wire.Header, datagram: bytes, now: float, events: list[NamedTuple]) -> None:
        secret = self._secrets.get(header.key_id)
        if secret is None:
            raise WireError("unknown_key", str(header.key_id))
        aead = self._crypto.derive(secret, header.sender, self._hello_info(header.key_id, self.peer, self.node))
        plaintext = aead.open(_nonce(header.number), datagram[header.size :], datagram[: header.size])
        hello = wire.decode_hello(plaintext)
        if hello.node != self.peer:
            raise WireError("wrong_node", hello.node)
        self.counters["hellos_received"] += 1
        session = self._established
        if session is not None and session.peer_nonce == header.sender:
            if hello.echo != session.local_nonce:  # it has not heard our half yet
                self._send_hello(session.hello, session.peer_nonce)
        elif hello.echo == self._hello.nonce:  # only a live peer can know this nonce
            events.append(self._establish(header.sender, hello, now))
        elif hello.echo == wire.NO_NONCE:  # a peer without a session, or a replay: only the former will echo our nonce
            self._send_hello(self._hello, header.sender)
        else:  # answers a nonce of the past.  Answered in turn, a replayed HELLO would start a new session.
            raise WireError("stale_hello")

    def _establish(self, peer_nonce: bytes, hello: wire.Hello, now: float) -> SessionUp:
        sealer, self._hello = self._hello, self._fresh_hello()
        self._established = _Established(
            sealer,
            peer_nonce,
            _Keys(self._crypto, self._secrets, sealer.nonce + peer_nonce, self.node, self.peer),
            _Keys(self._crypto, self._secrets, peer_nonce + sealer.nonce, self.peer, self.node),
        )
        self.last_seen = now
        self._heartbeat_at = now
        self._status_due = True
        self.counters["sessions"] += 1
        # the last word of the handshake: the peer may still wait for its own nonce to come back
        self._send_hello(sealer, peer_nonce)
        self._hello_at = now + self._interval
        return SessionUp(hello.version, hello.capabilities)

    def _receive_data(self, header: wire.Header, datagram: bytes, now: float, events: list[NamedTuple]) -> None:
        session = self._established
        if session is None or header.sender != session.peer_nonce[:8]:
            raise WireError("unknown_session")
        number = header.number
        age = session.highest - number
        if age >= REPLAY_WINDOW or (age >= 0 and session.seen >> age & 1):
            raise WireError("replayed")
        aead = session.receive_keys(header.key_id)
        plaintext = aead.open(_nonce(number), datagram[header.size :], datagram[: header.size])
        if age < 0:
            session.seen = (session.seen << min(-age, REPLAY_WINDOW) | 1) & ((1 << REPLAY_WINDOW) - 1)
            session.highest = number
        else:
            session.seen |= 1 << age
        self.last_seen = now
        session.confirmed = True
        self.counters["datagrams_received"] += 1
        for kind, payload in wire.iter_tlv(plaintext):
            if kind == wire.FRAME_BLOCK:
                events.extend(self._receive_block(session, payload, now))
            elif kind == wire.FRAME_ACK:
                self._receive_ack(session, wire.decode_ack(payload), now)
            elif kind == wire.FRAME_STATUS:
                events.append(StatusReceived(wire.decode_status(payload)))
                if now >= self._heartbeat_at - self._interval / 2:  # this node is awake: both beat together
                    self._heartbeat_at = now
            elif kind == wire.FRAME_BYE:
                events.append(PeerLeft())
            else:
                self.counters["skipped_unknown_frame"] += 1

    def _receive_block(self, session: _Established, payload: bytes, now: float) -> list[NamedTuple]:
        number, records = wire.decode_block(payload)
        if number >= session.expected + WINDOW_BLOCKS:
            raise WireError("over_credit")
        if number < session.expected or number in session.early:
            self.counters["blocks_duplicate"] += 1
            self._ack_soon(session, now)
            return []
        self.counters["blocks_received"] += 1
        session.unacked += 1
        if number != session.expected:
            self.counters["blocks_early"] += 1
            session.early[number] = records
            session.early_bits |= 1 << (number - session.expected - 1)
            self._ack_soon(session, now)
            return []
        events: list[NamedTuple] = [BlockReceived(records)]
        number += 1
        while number in session.early:
            events.append(BlockReceived(session.early.pop(number)))
            number += 1
        session.early_bits >>= number - session.expected
        session.expected = number
        if session.unacked >= ACK_BLOCKS:
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
        last = ack.expected + 1 + ack.early.bit_length() if ack.early else ack.expected
        if last > session.next_block:
            raise WireError("malformed", "acknowledges what was never sent")
        if ack.expected < session.acked:
            return  # overtaken by a later one
        if ack.expected < session.next_block and ack.expected not in session.in_flight:
            raise WireError("malformed", "takes back an acknowledgement")
        session.limit = max(session.limit, min(ack.limit, ack.expected + WINDOW_BLOCKS))  # a bound for in_flight
        in_flight = session.in_flight
        numbers = [number for number in range(session.acked, ack.expected) if number in in_flight]
        known = session.acked_early >> (ack.expected - session.acked)
        fresh = ack.early & ~known
        session.acked, session.acked_early = ack.expected, ack.early | known
        while fresh:
            lowest = fresh & -fresh
            fresh ^= lowest
            numbers.append(ack.expected + lowest.bit_length())
        if not numbers:
            return
        for number in numbers:
            flight = in_flight.pop(number)
            flight.acked = True
            session.records -= flight.records
            # soon after a retransmission: that was about an earlier sending
            if not flight.again or now - flight.sent >= (session.srtt or 0.0) / 2:
                session.newest_acked = max(session.newest_acked, flight.order)
        if not flight.again:  # an honest sample (Karn); of the last one, that waited least for its acknowledgement
            sample = now - flight.sent
            session.srtt = sample if session.srtt is None else 0.875 * session.srtt + 0.125 * sample
        for timers in session.timers:
            while timers and (_outdated(timers[0]) or timers[0][0] + REORDER_THRESHOLD <= session.newest_acked):
                entry = timers.popleft()
                if not _outdated(entry):
                    session.lost.append(entry[1])

    # --- output ------------------------------------------------------------------------------------------------------

    def poll(self, now: float) -> list[bytes]:
        """Datagrams to send now: answers, retransmissions, acknowledgements, heartbeats."""
        session = self._established
        if session is None:
            if now >= self._hello_at:
                self._send_hello(self._hello, wire.NO_NONCE)
                self._hello_at = now + self._interval
        else:
            self._poll_established(session, now)
        out, self._out = self._out, []
        self.counters["datagrams_sent"] += len(out)
        self.counters["bytes_sent"] += sum(map(len, out))
        return out

    def _poll_established(self, session: _Established, now: float) -> None:
        if not session.confirmed and now >= self._hello_at:
            self._send_hello(session.hello, session.peer_nonce)
            self._hello_at = now + self._interval
        self._poll_retransmissions(session, now)
        frames = self._news(session, now)
        if frames:
            self._send(session, frames)

    def _news(self, session: _Established, now: float, riding: bool = False) -> bytes:
        """The acknowledgement and the status, where they are due; both a little early if they are ``riding`` on a
        datagram that is sent anyway: that saves a datagram here, and a wake-up on the other side."""
        status = self._status_due or now >= self._heartbeat_at - self._interval / 2
        if riding:
            due = status or session.ack_at is not None
        else:
            due = self._status_due or now >= self._heartbeat_at
            due = due or (session.ack_at is not None and now >= session.ack_at)
        if not due:
            return b""
        frames = wire.encode_ack(self._ack(session))  # with each status: that heals a lost acknowledgement
        session.ack_at = None
        session.ack_sent = now
        session.unacked = 0
        if status:
            frames += wire.encode_status(self._status)
            self._status_due = False
            self._heartbeat_at = now + self._interval
        return frames

    def _poll_retransmissions(self, session: _Established, now: float) -> None:
        lost, session.lost = session.lost, []
        for flight in lost:
            if not flight.acked:
                self._send_again(session, flight, now)
        if not session.in_flight:
            session.probe_wait = 0.0
        elif self.alive(now):
            session.probe_wait = 0.0
            for level, timers in enumerate(session.timers):
                limit = now - self._timeout(session, level)
                while timers and (_outdated(timers[0]) or timers[0][1].sent <= limit):
                    entry = timers.popleft()
                    if not _outdated(entry):
                        entry[1].level = min(level + 1, _BACK_OFF)
                        self._send_again(session, entry[1], now)
        elif not session.probe_wait:
            session.probe_wait = self._timeout(session, 0)
            session.probe_at = now + session.probe_wait
        elif now >= session.probe_at:  # a silent peer gets the oldest alone, not the whole window
            session.probe_wait = min(2 * session.probe_wait, RETRANSMIT_MAX_S)
            session.probe_at = now + session.probe_wait
            flight = session.in_flight[session.acked]
            flight.again = True
            self.counters["blocks_retransmitted"] += 1
            self._send(session, flight.frame)

    def _send_flight(self, session: _Established, flight: _InFlight, now: float, more: bytes = b"") -> None:
        session.sendings += 1
        flight.sent = now
        flight.order = session.sendings
        session.timers[flight.level].append((flight.order, flight))
        self._send(session, flight.frame + more)

    def _send_again(self, session: _Established, flight: _InFlight, now: float) -> None:
        flight.again = True
        self.counters["blocks_retransmitted"] += 1
        self._send_flight(session, flight, now)

    @staticmethod
    def _timeout(session: _Established, level: int) -> float:
        """Seconds from a sending to the next one, for a block that went through ``level`` timeouts."""
        first: float = max(RETRANSMIT_MIN_S, 3 * (session.srtt or 0.0))
        return min(first * (1 << level), RETRANSMIT_MAX_S)

    def next_deadline(self) -> float:
        """When :meth:`poll` wants to be called next (monotonic seconds); 0 for at once."""
        session = self._established
        if self._out:
            return 0.0
        if session is None:
            return self._hello_at
        if session.lost:
            return 0.0
        deadline = self._heartbeat_at if session.confirmed else min(self._heartbeat_at, self._hello_at)
        if session.ack_at is not None:
            deadline = min(deadline, session.ack_at)
        if session.probe_wait:
            return min(deadline, session.probe_at)
        for level, timers in enumerate(session.timers):
            while timers and _outdated(timers[0]):
                timers.popleft()
            if timers:
                deadline = min(deadline, timers[0][1].sent + self._timeout(session, level))
        return deadline

    @staticmethod
    def _ack(session: _Established) -> wire.Ack:
        return wire.Ack(session.expected, session.expected + WINDOW_BLOCKS, session.early_bits)

    def _send(self, session: _Established, frames: bytes) -> None:
        header = wire.encode_header(wire.DATA, self._send_key, session.local_nonce, session.packet)
        sealed = session.send_keys(self._send_key).seal(_nonce(session.packet), frames, header)
        session.packet += 1
        if session.packet > _MAX_PACKETS:  # fresh keys long before a nonce could repeat
            self._established = None
        self._out.append(header + sealed)

    def _send_hello(self, sealer: _HelloSealer, echo: bytes) -> None:
        self._out.append(sealer.seal(wire.encode_hello(wire.Hello(echo, self.node, 0, self._version))))

    def _fresh_hello(self) -> _HelloSealer:
        nonce = self._random(wire.NONCE_BYTES)
        info = self._hello_info(self._send_key, self.node, self.peer)
        return _HelloSealer(nonce, self._send_key, self._crypto.derive(self._secrets[self._send_key], nonce, info))

    @staticmethod
    def _hello_info(key_id: int, sender: str, receiver: str) -> bytes:
        return b"ctsync hello" + bytes((wire.VERSION, key_id)) + sender.encode() + b"\0" + receiver.encode()


def _outdated(entry: tuple[int, _InFlight]) -> bool:
    """Was the block of a sending acknowledged or sent again since?"""
    order, flight = entry
    return flight.acked or flight.order != order


def _nonce(number: int) -> bytes:
    return number.to_bytes(12, "big")
