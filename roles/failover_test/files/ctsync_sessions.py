#!/usr/bin/env python3
# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Sessions that can tell whether a firewall lost them.

One program, standard library only, for every node of a failover test:

``server``
    outside; accepts TCP sessions, and SSH sessions by way of ``relay``. Numbers what it sends, checks what it gets.
``client``
    inside; opens the sessions (busy, bulk, idle and one real OpenSSH process) and does the same from its end.
``relay``
    what the SSH session runs on the outside node: joins its standard input and output to the server, and tells it
    what sshd says about the connection (``SSH_CONNECTION``).
``watch``
    on a firewall; records with its time each address that comes or goes and each TCP reset that leaves or enters.
``ctl``
    sends one request to a running server, client or watch and prints the answer, a JSON object.

Every line on the wire is ``VERB SEQ CRC BODY``. Both ends count from 1 without a hole, so a line that is lost, doubled,
reordered or altered shows. The server's lines carry what it has seen of the peer: how many lines arrived, and from
which address and port. Times are seconds since the epoch, taken from the monotonic clock with one fixed offset, so that
a clock that is set during the test moves nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import errno
import json
import os
import signal
import socket
import struct
import sys
import time
import zlib

STEP_MS = 100
"""Width of one bucket of the byte series, milliseconds."""
GAP_FLOOR = 0.03
"""Silences shorter than this many seconds, or than one and a half intervals of the sender, are not listed."""
GAPS_KEPT = 4096
LINE_LIMIT = 1 << 20

# Interval between two lines in seconds (0: only when asked) and bytes of padding in each.
KINDS = {"ssh": (0.1, 48), "busy": (0.05, 64), "bulk": (0.1, 8192), "idle": (0.0, 64)}
LINES_PER_SECOND = 800
"""All busy sessions together send at most this many lines per second and direction; more sessions, slower ones."""

_EPOCH = time.time() - time.monotonic()


def now():
    """Seconds since the epoch, never stepping."""
    return _EPOCH + time.monotonic()


def notify(text):
    """Tell the service manager (sd_notify(3)); nothing happens without one."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    if path.startswith("@"):
        path = "\0" + path[1:]
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto(text.encode(), path)


# --------------------------------------------------------------------------------------------------------------------
# One direction of a session: what was received, in which order, when.


class Checker:
    """Counts received sequence numbers; expects 1, 2, 3, ..."""

    def __init__(self):
        self.received = 0
        self.expected = 1
        self.missing = set()
        self.duplicated = 0
        self.reordered = 0
        self.corrupt = 0

    def take(self, seq):
        """Account for line number ``seq``."""
        self.received += 1
        if seq == self.expected:
            self.expected += 1
        elif seq > self.expected:
            self.missing.update(range(self.expected, min(seq, self.expected + 100000)))
            self.expected = seq + 1
        elif seq in self.missing:
            self.missing.discard(seq)
            self.reordered += 1
        else:
            self.duplicated += 1

    def as_dict(self):
        return {
            "received": self.received,
            "lost": len(self.missing),
            "duplicated": self.duplicated,
            "reordered": self.reordered,
            "corrupt": self.corrupt,
        }


class Arrivals:
    """When bytes came: a series of buckets, and every silence longer than the floor."""

    def __init__(self, interval=0.0):
        self.floor = max(GAP_FLOOR, 1.5 * interval)
        self.total = 0
        self.first = None
        self.last = None
        self.buckets = {}
        self.gaps = []

    def note(self, when, size):
        """``size`` bytes arrived at ``when`` (seconds since the epoch)."""
        if self.last is None:
            self.first = when
        elif when - self.last >= self.floor:
            if len(self.gaps) >= GAPS_KEPT:
                self.gaps.remove(min(self.gaps, key=lambda gap: gap[1] - gap[0]))
            self.gaps.append((self.last, when))
        self.last = when
        self.total += size
        index = int(when * 1000) // STEP_MS
        self.buckets[index] = self.buckets.get(index, 0) + size

    def as_dict(self, since):
        first = int(since * 1000) // STEP_MS
        return {
            "bytes": self.total,
            "first": self.first,
            "last": self.last,
            "gaps": [list(gap) for gap in self.gaps if gap[1] >= since],
            "step_ms": STEP_MS,
            "series": [[index, size] for index, size in sorted(self.buckets.items()) if index >= first],
        }


def encode(verb, seq, body):
    """One line of the wire as bytes."""
    text = f"{verb} {seq} {body}"
    return f"{zlib.crc32(text.encode()):08x} {text}\n".encode()


def decode(line):
    """(verb, seq, body) of a line; ValueError when it was altered or cut."""
    crc, _space, text = line.rstrip(b"\n").partition(b" ")
    if not line.endswith(b"\n") or int(crc, 16) != zlib.crc32(text):
        raise ValueError("checksum")
    verb, seq, body = text.decode().split(" ", 2)
    return verb, int(seq), body


def padding(seq, size):
    """Text of ``size`` characters that differs from line to line."""
    unit = f"{seq:x}."
    return (unit * (size // len(unit) + 1))[:size]


def why(error):
    """One short text for an exception: ``ECONNRESET: Connection reset by peer``."""
    number = getattr(error, "errno", None)
    if number:
        return f"{errno.errorcode.get(number, number)}: {os.strerror(number)}"
    return f"{type(error).__name__}: {error}".rstrip(": ")


# --------------------------------------------------------------------------------------------------------------------
# The outside end.


class ServerSession:
    """A session as the outside node sees it."""

    def __init__(self, reader, writer, peer, origin):
        self.reader = reader
        self.writer = writer
        self.peer = peer
        self.origin = origin
        self.hello = {}
        self.checker = Checker()
        self.arrivals = Arrivals()
        self.sent = 0
        self.opened = now()
        self.ended = None
        self.error = None
        self.complete = False

    def send(self, verb, body):
        self.sent += 1
        ack = self.checker.received
        self.writer.write(encode(verb, self.sent, f"{ack} {self.peer[0]} {self.peer[1]} {body}"))

    async def run(self):
        stream = None
        try:
            _verb, _seq, body = decode(await self.reader.readline())
            self.hello = json.loads(body)
            self.arrivals.note(now(), len(body))
            interval = float(self.hello["interval"])
            self.arrivals.floor = max(GAP_FLOOR, 1.5 * interval)
            if interval:
                stream = asyncio.ensure_future(self.stream(interval, int(self.hello["size"])))
            while True:
                line = await self.reader.readline()
                if not line:
                    break
                self.arrivals.note(now(), len(line))
                try:
                    verb, seq, body = decode(line)
                except ValueError:
                    self.checker.corrupt += 1
                    continue
                self.checker.take(seq)
                if verb == "Q":
                    self.send("A", padding(seq, int(self.hello["size"])))
                elif verb == "E":
                    if stream is not None:
                        stream.cancel()
                        await asyncio.gather(stream, return_exceptions=True)
                    self.complete = True
                    self.send("E", json.dumps(self.checker.as_dict()))
                await self.writer.drain()
        except (OSError, ValueError, KeyError, EOFError, asyncio.IncompleteReadError) as error:
            self.error = why(error)
        finally:
            self.ended = now()
            if stream is not None:
                stream.cancel()
                await asyncio.gather(stream, return_exceptions=True)
            self.writer.close()

    async def stream(self, interval, size):
        while True:
            self.send("S", padding(self.sent, size))
            await self.writer.drain()
            await asyncio.sleep(interval)

    def as_dict(self, since):
        return dict(
            self.checker.as_dict(),
            name=self.hello.get("name"),
            kind=self.hello.get("kind"),
            peer=list(self.peer),
            origin=self.origin,
            sent=self.sent,
            opened=self.opened,
            ended=self.ended,
            error=self.error,
            complete=self.complete,
            rx=self.arrivals.as_dict(since),
        )


class Server:
    """Accepts sessions and remembers each one it ever had."""

    def __init__(self, options):
        self.options = options
        self.sessions = []
        self.resets = ResetWatch()

    async def accept(self, reader, writer):
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 0)
        await self.serve(ServerSession(reader, writer, writer.get_extra_info("peername")[:2], {"via": "tcp"}))

    async def accept_relay(self, reader, writer):
        origin = json.loads(await reader.readline())
        address, port = origin["ssh_connection"].split()[:2]
        await self.serve(ServerSession(reader, writer, (address, int(port)), dict(origin, via="ssh")))

    async def serve(self, session):
        self.sessions.append(session)
        await session.run()

    async def start(self):
        self.resets.start()
        host, port = self.options.listen.rsplit(":", 1)
        await asyncio.start_server(self.accept, host, int(port), limit=LINE_LIMIT, backlog=1024)
        path = os.path.join(self.options.run_dir, "relay.sock")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        await asyncio.start_unix_server(self.accept_relay, path, limit=LINE_LIMIT)
        os.chmod(path, 0o666)  # the SSH session may belong to an ordinary user

    async def request(self, command, arguments):
        if command == "snapshot":
            since = float(arguments.get("since", 0))
            return {"sessions": [session.as_dict(since) for session in self.sessions], "resets": self.resets.as_list()}
        raise ValueError(f"a server does not know {command!r}")

    async def close(self):
        """End every session; a half-dead sshd that carried one would linger for a quarter of an hour otherwise."""
        for session in self.sessions:
            session.writer.close()
        await asyncio.sleep(0.3)
        for session in self.sessions:
            pid = session.origin.get("sshd")
            if pid and comm(pid).startswith("sshd"):
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGTERM)


def comm(pid):
    """Name of a process, empty when it is gone."""
    try:
        with open(f"/proc/{pid}/comm", encoding="ascii", errors="replace") as handle:
            return handle.read().strip()
    except OSError:
        return ""


def parent(pid):
    """Parent of a process, 0 when unknown (proc(5), fourth field of stat)."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as handle:
            return int(handle.read().rpartition(")")[2].split()[1])
    except (OSError, ValueError):
        return 0


async def relay(options):
    """Standard input and output of an SSH session <-> the server's socket."""
    sshd = os.getppid()
    while sshd > 1 and not comm(sshd).startswith("sshd"):
        sshd = parent(sshd)
    reader, writer = await asyncio.open_unix_connection(os.path.join(options.run_dir, "relay.sock"))
    about = {"ssh_connection": os.environ["SSH_CONNECTION"], "pid": os.getpid(), "sshd": sshd if sshd > 1 else None}
    writer.write(json.dumps(about).encode() + b"\n")

    loop = asyncio.get_running_loop()
    ended = loop.create_future()

    def upstream():
        data = os.read(0, 65536)
        if data:
            writer.write(data)
        elif not ended.done():
            ended.set_result(None)

    async def downstream():
        while True:
            data = await reader.read(65536)
            if not data:
                return
            view = memoryview(data)
            while view:
                view = view[os.write(1, view) :]

    loop.add_reader(0, upstream)
    down = asyncio.ensure_future(downstream())
    await asyncio.wait([down, ended], return_when=asyncio.FIRST_COMPLETED, timeout=options.max_seconds)
    os._exit(0)  # a blocked write to a dead connection must not keep this process


# --------------------------------------------------------------------------------------------------------------------
# The inside end.


class ClientSession:
    """A session as the inside node sees it."""

    def __init__(self, name, kind, interval, size):
        self.name = name
        self.kind = kind
        self.interval = interval
        self.size = size
        self.checker = Checker()
        self.arrivals = Arrivals(interval)
        self.acks = Arrivals(interval)
        self.acked = 0
        self.sent = 0
        self.sent_bytes = 0
        self.local = None
        self.remote = None
        self.process = None
        self.pid = None
        self.code = None
        self.stderr = b""
        self.opened = now()
        self.ended = None
        self.error = None
        self.seen_as = None
        self.seen_history = []
        self.pokes = []
        self.answer = None
        self.verified = None
        self.first = None
        self.tasks = []
        self.reader = None
        self.writer = None

    @property
    def alive(self):
        return self.ended is None

    async def open_tcp(self, host, port):
        self.reader, self.writer = await asyncio.open_connection(host, port, limit=LINE_LIMIT)
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 0)
        self.local = self.writer.get_extra_info("sockname")[:2]
        self.remote = self.writer.get_extra_info("peername")[:2]
        self.begin()

    async def open_ssh(self, argv):
        self.process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=LINE_LIMIT,
            start_new_session=True,
        )
        self.pid = self.process.pid
        self.reader, self.writer = self.process.stdout, self.process.stdin
        self.begin()
        self.tasks.append(asyncio.ensure_future(self.watch_process()))

    def begin(self):
        loop = asyncio.get_running_loop()
        self.first = loop.create_future()
        hello = {"name": self.name, "kind": self.kind, "interval": self.interval, "size": self.size}
        self.writer.write(encode("H", 0, json.dumps(hello)))
        self.tasks.append(asyncio.ensure_future(self.receive()))
        if self.interval:
            self.tasks.append(asyncio.ensure_future(self.stream()))
        else:
            self.send("Q")

    def send(self, verb, body=None):
        self.sent += 1
        line = encode(verb, self.sent, padding(self.sent, self.size) if body is None else body)
        self.sent_bytes += len(line)
        self.writer.write(line)

    async def stream(self):
        try:
            while True:
                self.send("C")
                await self.writer.drain()
                await asyncio.sleep(self.interval)
        except OSError as error:
            self.fail(why(error))

    async def receive(self):
        try:
            while True:
                line = await self.reader.readline()
                if not line:
                    self.fail("end of stream")
                    return
                self.take(line)
        except (OSError, ValueError, asyncio.IncompleteReadError) as error:
            self.fail(why(error))

    def take(self, line):
        when = now()
        self.arrivals.note(when, len(line))
        try:
            verb, seq, body = decode(line)
        except ValueError:
            self.checker.corrupt += 1
            return
        self.checker.take(seq)
        acked, address, port, rest = body.split(" ", 3)
        seen = [address, int(port)]
        if seen != self.seen_as:
            self.seen_as = seen
            self.seen_history.append([when, *seen])
        if int(acked) > self.acked:
            share = int(acked) - self.acked
            self.acked = int(acked)
            self.acks.note(when, share * (self.sent_bytes // max(self.sent, 1)))
        if verb == "A" and self.answer is not None and not self.answer.done():
            self.answer.set_result(when)
        if verb == "E":
            self.verified = json.loads(rest)
        if not self.first.done():
            self.first.set_result(when)

    async def watch_process(self):
        while True:
            data = await self.process.stderr.read(4096)
            if not data:
                break
            self.stderr = (self.stderr + data)[-4000:]
        self.code = await self.process.wait()
        self.fail(f"ssh ended with rc {self.code}")

    def fail(self, reason):
        if self.error is None or (self.code is not None and not self.error.startswith("ssh ended")):
            self.error = reason
        if self.ended is None:
            self.ended = now()
        if not self.first.done():
            self.first.set_exception(ConnectionError(f"{self.name}: {reason}"))

    async def poke(self, timeout):
        """One question, one answer; milliseconds or None."""
        started = now()
        self.answer = asyncio.get_running_loop().create_future()
        result = None
        if self.alive:
            try:
                self.send("Q")
                result = await asyncio.wait_for(self.answer, timeout)
            except (OSError, asyncio.TimeoutError):
                result = None
        took = None if result is None else round((result - started) * 1000, 1)
        self.pokes.append([started, took])
        return took

    async def finish(self, timeout):
        """Say how much was sent, hear how much arrived; True when both ends have everything."""
        for task in self.tasks[1:]:
            if self.process is None or task is not self.tasks[-1]:
                task.cancel()
        deadline = now() + timeout
        if self.alive:
            with contextlib.suppress(OSError):
                self.send("E", "-")
        while self.alive and self.verified is None and now() < deadline:
            await asyncio.sleep(0.02)
        return self.verified is not None

    async def abort(self):
        for task in self.tasks:
            task.cancel()
        if self.process is not None:
            if self.process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    self.process.kill()
                await self.process.wait()
        elif self.writer is not None:
            self.writer.transport.abort()

    def find_socket(self):
        """The addresses of the connection that the SSH process holds (proc(5): fd, net/tcp)."""
        if self.process is None or self.code is not None:
            return
        inodes = set()
        try:
            for name in os.listdir(f"/proc/{self.pid}/fd"):
                target = os.readlink(f"/proc/{self.pid}/fd/{name}")
                if target.startswith("socket:["):
                    inodes.add(target[8:-1])
            with open("/proc/net/tcp", encoding="ascii") as handle:
                rows = [row.split() for row in handle.readlines()[1:]]
        except OSError:
            return
        for row in rows:
            if row[9] in inodes:
                self.local, self.remote = unhex(row[1]), unhex(row[2])

    def as_dict(self, since):
        self.find_socket()
        return dict(
            self.checker.as_dict(),
            name=self.name,
            kind=self.kind,
            proto="ssh" if self.process is not None else "tcp",
            interval_ms=int(self.interval * 1000),
            local=self.local and list(self.local),
            remote=self.remote and list(self.remote),
            pid=self.pid,
            rc=self.code,
            stderr=self.stderr.decode(errors="replace").strip(),
            alive=self.alive,
            opened=self.opened,
            ended=self.ended,
            error=self.error,
            sent=self.sent,
            sent_bytes=self.sent_bytes,
            acked=self.acked,
            seen_as=self.seen_as,
            seen_history=self.seen_history,
            pokes=self.pokes,
            verified=self.verified,
            rx=self.arrivals.as_dict(since),
            ack=self.acks.as_dict(since),
        )


def unhex(text):
    """``0300A8C0:C89C`` of /proc/net/tcp -> ("192.168.0.3", 51356)."""
    address, port = text.split(":")
    return socket.inet_ntoa(struct.pack("=I", int(address, 16))), int(port, 16)


class Client:
    """Opens the sessions and keeps them busy."""

    def __init__(self, options):
        self.options = options
        self.host, port = options.connect.rsplit(":", 1)
        self.port = int(port)
        self.ssh = json.loads(options.ssh) if options.ssh else []
        self.sessions = []
        self.resets = ResetWatch()

    @staticmethod
    def plan(count):
        """Kinds of ``count`` TCP sessions: a twentieth bulk (at least two), the rest half busy, half idle."""
        bulk = min(count, max(2, count // 20))
        busy = (count - bulk + 1) // 2
        return ["busy"] * busy + ["bulk"] * bulk + ["idle"] * (count - bulk - busy)

    async def start(self):
        self.resets.start()
        plan = self.plan(self.options.sessions)
        slow = max(1.0, plan.count("busy") / KINDS["busy"][0] / LINES_PER_SECOND)
        jobs = []
        if self.ssh:
            session = ClientSession("ssh", "ssh", *KINDS["ssh"])
            self.sessions.append(session)
            jobs.append(session.open_ssh(self.ssh))
        for number, kind in enumerate(plan, 1):
            interval, size = KINDS[kind]
            session = ClientSession(f"{kind}-{number:02d}", kind, interval * slow, size)
            self.sessions.append(session)
            jobs.append(session.open_tcp(self.host, self.port))
        await asyncio.gather(*jobs)
        # A session is open when its first line has come back through the firewall.
        await asyncio.wait_for(asyncio.gather(*(session.first for session in self.sessions)), self.options.open_timeout)
        for session in self.sessions:
            session.find_socket()

    async def request(self, command, arguments):
        timeout = float(arguments.get("timeout", 30))
        since = float(arguments.get("since", 0))
        if command == "snapshot":
            return {"sessions": [session.as_dict(since) for session in self.sessions], "resets": self.resets.as_list()}
        if command == "settle":
            return await self.settle(float(arguments["after"]), timeout)
        if command == "poke":
            idle = [session for session in self.sessions if session.kind == "idle"]
            answers = await asyncio.gather(*(session.poke(timeout) for session in idle))
            return {"answers_ms": {session.name: answer for session, answer in zip(idle, answers)}}
        if command == "await-ssh-end":
            return await self.await_ssh_end(timeout)
        if command == "fresh":
            return await self.fresh(timeout)
        if command == "finish":
            done = await asyncio.gather(*(session.finish(timeout) for session in self.sessions))
            missing = [session.name for session, good in zip(self.sessions, done) if not good]
            return {"finished": len(done) - len(missing), "unfinished": missing}
        raise ValueError(f"a client does not know {command!r}")

    async def settle(self, after, timeout):
        """Wait until every streaming session moved bytes both ways later than ``after``."""
        deadline = now() + timeout
        while True:
            waiting = [
                session.name
                for session in self.sessions
                if session.interval
                and (not session.alive or (session.arrivals.last or 0) <= after or (session.acks.last or 0) <= after)
            ]
            lost = any(not session.alive for session in self.sessions if session.interval)
            if not waiting or lost or now() >= deadline:
                return {"settled": not waiting, "waiting": waiting, "at": now()}
            await asyncio.sleep(0.05)

    async def await_ssh_end(self, timeout):
        deadline = now() + timeout
        while True:
            session = next(session for session in self.sessions if session.process is not None)
            if session.code is not None or now() >= deadline:
                return {"ended": session.code is not None, "rc": session.code, "at": session.ended}
            await asyncio.sleep(0.05)

    async def fresh(self, timeout):
        """Prove that the path carries new sessions: one over TCP, one over SSH."""
        started = now()
        session = ClientSession(f"fresh-{len(self.sessions)}", "idle", *KINDS["idle"])
        answer = {"tcp": False, "ssh": None, "error": None, "seen_as": None}
        try:
            await asyncio.wait_for(session.open_tcp(self.host, self.port), timeout)
            await asyncio.wait_for(session.first, timeout)
            answer["tcp"] = await session.finish(timeout)
            answer["seen_as"] = session.seen_as
            answer["local"] = list(session.local)
            answer["took_ms"] = round((now() - started) * 1000, 1)
            if self.ssh:
                argv = [*self.ssh[:-1], "echo ctsync"]
                process = await asyncio.create_subprocess_exec(
                    *argv,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.PIPE,
                )
                out, err = await asyncio.wait_for(process.communicate(), timeout)
                answer["ssh"] = process.returncode == 0 and out.strip() == b"ctsync"
                answer["error"] = None if answer["ssh"] else err.decode(errors="replace").strip()
        except (OSError, asyncio.TimeoutError) as error:
            answer["error"] = why(error)
        finally:
            await session.abort()
        return answer

    async def close(self):
        await asyncio.gather(*(session.abort() for session in self.sessions), return_exceptions=True)


# --------------------------------------------------------------------------------------------------------------------
# Witnesses.


class ResetWatch:
    """Every TCP segment with RST that any interface but the loopback sends or receives."""

    # Classic BPF (linux/filter.h): code, jump if true, jump if false, operand.
    FILTER = (
        (0x28, 0, 0, 12),  # 0 ldh ethertype
        (0x15, 0, 5, 0x0800),  # 1 IPv4? else 7
        (0x30, 0, 0, 23),  # 2 ldb protocol
        (0x15, 0, 9, 6),  # 3 TCP? else 13
        (0xB1, 0, 0, 14),  # 4 ldx header length
        (0x50, 0, 0, 27),  # 5 ldb flags
        (0x45, 5, 6, 0x04),  # 6 RST? 12 : 13
        (0x15, 0, 5, 0x86DD),  # 7 IPv6? else 13
        (0x30, 0, 0, 20),  # 8 ldb next header
        (0x15, 0, 3, 6),  # 9 TCP? else 13
        (0x30, 0, 0, 67),  # 10 ldb flags
        (0x45, 0, 1, 0x04),  # 11 RST? 12 : 13
        (0x06, 0, 0, 0xFFFF),  # 12 accept
        (0x06, 0, 0, 0),  # 13 refuse
    )

    def __init__(self):
        self.seen = []
        self.problem = None

    def start(self):
        """Open the tap; a node that refuses (no CAP_NET_RAW) says so in the evidence, it is not taken for silence."""
        code = b"".join(struct.pack("=HBBI", *instruction) for instruction in self.FILTER)
        buffer = ctypes.create_string_buffer(code)
        program = struct.pack("HL", len(self.FILTER), ctypes.addressof(buffer))
        try:
            # All protocols (ETH_P_ALL) on all interfaces; what came in before the filter stood is thrown away.
            tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.htons(0x0003))
            tap.setsockopt(socket.SOL_SOCKET, 26, program)  # SO_ATTACH_FILTER
            with contextlib.suppress(BlockingIOError):
                while True:
                    tap.recv(1)
        except OSError as error:
            self.problem = why(error)
            return
        asyncio.get_running_loop().add_reader(tap, self.take, tap)

    def take(self, tap):
        with contextlib.suppress(BlockingIOError):
            while True:
                data, (interface, _proto, kind, _hatype, _address) = tap.recvfrom(256)
                if interface != "lo":
                    self.seen.append(self.describe(data, interface, kind))

    @staticmethod
    def describe(data, interface, kind):
        if data[12:14] == b"\x08\x00":
            source, target, tcp = data[26:30], data[30:34], 14 + (data[14] & 15) * 4
            family = socket.AF_INET
        else:
            source, target, tcp, family = data[22:38], data[38:54], 54, socket.AF_INET6
        sport, dport = struct.unpack_from("!HH", data, tcp)
        return {
            "at": now(),
            "interface": interface,
            "direction": "out" if kind == 4 else "in",  # PACKET_OUTGOING
            "src": socket.inet_ntop(family, source),
            "sport": sport,
            "dst": socket.inet_ntop(family, target),
            "dport": dport,
        }

    def as_list(self):
        return {"problem": self.problem, "seen": self.seen}


class AddressWatch:
    """Addresses that come and go, with the time the kernel said so (rtnetlink(7), RTM_NEWADDR and RTM_DELADDR)."""

    def __init__(self):
        self.seen = []

    def start(self):
        sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
        sock.bind((0, 0x10 | 0x100))  # RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR
        asyncio.get_running_loop().add_reader(sock, self.take, sock)

    def take(self, sock):
        with contextlib.suppress(BlockingIOError):
            while True:
                self.parse(sock.recv(65536))

    def parse(self, data):
        when = now()
        offset = 0
        while offset + 24 <= len(data):
            length, kind = struct.unpack_from("=IH", data, offset)
            if length < 24:
                return
            family, prefix, _flags, _scope, index = struct.unpack_from("=BBBBI", data, offset + 16)
            if kind in (20, 21):
                address = self.address(data[offset + 24 : offset + length], family)
                if address:
                    event = {"at": when, "event": "added" if kind == 20 else "removed", "address": address}
                    self.seen.append(dict(event, prefix=prefix, interface=self.name(index)))
            offset += (length + 3) & ~3

    @staticmethod
    def address(attributes, family):
        found = {}
        offset = 0
        while offset + 4 <= len(attributes):
            length, kind = struct.unpack_from("=HH", attributes, offset)
            if length < 4:
                break
            found[kind] = attributes[offset + 4 : offset + length]
            offset += (length + 3) & ~3
        raw = found.get(2) or found.get(1)  # IFA_LOCAL, IFA_ADDRESS
        return socket.inet_ntop(family, raw) if raw and len(raw) in (4, 16) else None

    @staticmethod
    def name(index):
        try:
            return socket.if_indextoname(index)
        except OSError:
            return str(index)


class Watch:
    """The witness on a firewall."""

    def __init__(self, options):
        self.options = options
        self.addresses = AddressWatch()
        self.resets = ResetWatch()

    async def start(self):
        self.addresses.start()
        self.resets.start()

    async def request(self, command, _arguments):
        if command == "snapshot":
            return {"addresses": self.addresses.seen, "resets": self.resets.as_list()}
        raise ValueError(f"a watch does not know {command!r}")

    async def close(self):
        return None


# --------------------------------------------------------------------------------------------------------------------
# Running and asking.


async def run(part, options):
    """Start a part, answer requests until told to stop, to a signal, or to the end of the allowed time."""
    os.makedirs(options.run_dir, mode=0o755, exist_ok=True)
    stop = asyncio.get_running_loop().create_future()

    def end(*_ignored):
        if not stop.done():
            stop.set_result(None)

    async def answer(reader, writer):
        try:
            question = json.loads(await reader.readline())
            if question["command"] == "stop":
                reply = {"stopped": True}
                end()
            else:
                reply = await part.request(question["command"], question["arguments"])
            reply = dict(reply, now=now())
        except (ValueError, KeyError, StopIteration) as error:
            reply = {"failed": why(error)}
        with contextlib.suppress(OSError):
            writer.write(json.dumps(reply).encode() + b"\n")
            await writer.drain()
        writer.close()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, end)
    try:
        await part.start()
        path = os.path.join(options.run_dir, f"{options.part}.sock")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        await asyncio.start_unix_server(answer, path, limit=LINE_LIMIT)
        os.chmod(path, 0o600)
        notify("READY=1")
        await asyncio.wait([stop], timeout=options.max_seconds)
        return 0
    except (OSError, asyncio.TimeoutError) as error:
        await asyncio.sleep(0.3)  # what ssh has to say comes by another pipe
        problems = [f"{session.name}: {session.error}" for session in getattr(part, "sessions", []) if session.error]
        details = "; ".join([why(error), *problems[:5], *(s.stderr.decode(errors="replace") for s in ssh_of(part))])
        sys.stderr.write(f"ctsync_sessions {options.part}: cannot start: {details}\n")
        return 1
    finally:
        await part.close()


def ssh_of(part):
    """Client sessions that are SSH processes."""
    return [session for session in getattr(part, "sessions", []) if getattr(session, "process", None) is not None]


def ask(options):
    """The ``ctl`` part: one request, one answer on standard output."""
    arguments = dict(item.split("=", 1) for item in options.arguments)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(float(arguments.get("timeout", 30)) + 30)
        try:
            sock.connect(os.path.join(options.run_dir, f"{options.of}.sock"))
        except OSError as error:
            sys.stderr.write(f"ctsync_sessions ctl: no {options.of} runs in {options.run_dir}: {why(error)}\n")
            return 2
        sock.sendall(json.dumps({"command": options.command, "arguments": arguments}).encode() + b"\n")
        with sock.makefile("rb") as stream:
            line = stream.readline()
    sys.stdout.write(line.decode())
    return 0 if line and "failed" not in json.loads(line) else 1


def main(argv=None):
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="ctsync_sessions", description=__doc__.partition("\n")[0])
    parts = parser.add_subparsers(dest="part", required=True)
    for name in ("server", "client", "relay", "watch", "ctl"):
        part = parts.add_parser(name)
        part.add_argument("--run-dir", required=True, help="directory of the control sockets")
        part.add_argument("--max-seconds", type=float, default=1800.0, help="end by itself after this time")
        if name == "server":
            part.add_argument("--listen", required=True, metavar="ADDRESS:PORT")
        elif name == "client":
            part.add_argument("--connect", required=True, metavar="ADDRESS:PORT")
            part.add_argument("--sessions", type=int, default=12, help="TCP sessions besides the SSH session")
            part.add_argument(
                "--ssh", default="", help="JSON list: the ssh command, its last item run on the other side"
            )
            part.add_argument("--open-timeout", type=float, default=60.0)
        elif name == "ctl":
            part.add_argument("of", choices=("server", "client", "watch"))
            part.add_argument("command")
            part.add_argument("arguments", nargs="*", metavar="NAME=VALUE")
    options = parser.parse_args(argv)
    if options.part == "ctl":
        return ask(options)
    if options.part == "relay":
        asyncio.run(relay(options))
        return 0
    return asyncio.run(run({"server": Server, "client": Client, "watch": Watch}[options.part](options), options))


if __name__ == "__main__":
    sys.exit(main())
