# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Conversations whose further flows a helper must foresee: FTP (vsftpd), TFTP (tftpd-hpa), SIP."""

from __future__ import annotations

import contextlib
import ftplib
import hashlib
import os
import re
import socket
import struct
import time
from pathlib import Path
from typing import Any

from integration.netns import Namespace, wait_for

TIMEOUT_S = 20.0
CONTENT = os.urandom(1 << 20) * 4


def _answers(space: Namespace, address: str, port: int) -> bool:
    with contextlib.suppress(OSError):
        space.connect(address, port, 1.0).close()
        return True
    return False


class Vsftpd:
    """An FTP server of CONTENT as ``big``, for anonymous users, of both families, active mode from port 20."""

    def __init__(self, space: Namespace, home: Path) -> None:
        (home / "root" / "up").mkdir(parents=True)
        (home / "empty").mkdir()
        (home / "root" / "big").write_bytes(CONTENT)
        (home / "root" / "small").write_bytes(CONTENT[:1000])
        (home / "root").chmod(0o555)
        for path in (home, *home.parents):  # pytest's directories are for their owner alone
            with contextlib.suppress(PermissionError):
                path.chmod(path.stat().st_mode | 0o055)
        options = {
            **{"listen": "NO", "listen_ipv6": "YES", "background": "NO", "anon_root": home / "root"},
            **{"anonymous_enable": "YES", "connect_from_port_20": "YES", "no_anon_password": "YES"},
            **{"pasv_min_port": 40000, "pasv_max_port": 40100, "secure_chroot_dir": home / "empty"},
            **{"seccomp_sandbox": "NO", "isolate_network": "NO", "xferlog_enable": "NO"},
        }
        (home / "conf").write_text("".join(f"{name}={value}\n" for name, value in options.items()), encoding="ascii")
        space.popen("/usr/sbin/vsftpd", str(home / "conf"))
        wait_for(lambda: _answers(space, "192.168.1.3", 21), "vsftpd")


class Ftp:
    """An FTP client's control connection and its transfers.  What goes wrong raises ``ftplib.Error`` or OSError."""

    def __init__(self, space: Namespace, server: str, passive: bool, patience: float = TIMEOUT_S) -> None:
        self._space = space
        self._patience = patience
        self._client = ftplib.FTP(timeout=patience)
        with space.inside():
            self._client.connect(server, 21)
        self._client.login()
        self._client.voidcmd("TYPE I")
        self._client.set_pasv(passive)
        self.port = int(self._client.sock.getsockname()[1])  # type: ignore[union-attr]
        self._data: socket.socket | None = None
        self._waiting: Any = None
        self._hash = hashlib.sha256()

    def whole(self, name: str = "small") -> None:
        """A transfer from beginning to end."""
        self.prepare()
        self.start(name)
        self.finish(CONTENT[:1000] if name == "small" else CONTENT)

    def prepare(self) -> None:
        """PORT, EPRT, PASV or EPSV: from now on a helper expects the data connection."""
        with self._space.inside():
            if self._client.passiveserver:
                self._waiting = self._client.makepasv()
            else:
                self._waiting = self._client.makeport()

    def start(self, name: str = "big") -> None:
        """The data connection comes to be, and some of the data."""
        if self._client.passiveserver:
            with self._space.inside():
                self._data = socket.create_connection(self._waiting, self._patience)
        answer = self._client.sendcmd(f"RETR {name}")
        if not answer.startswith("1"):
            raise ftplib.error_reply(answer)
        if not self._client.passiveserver:
            with self._waiting as listener:
                listener.settimeout(self._patience)
                self._data, _address = listener.accept()
        assert self._data is not None
        self._data.settimeout(self._patience)
        self._hash = hashlib.sha256()
        self._take(500)

    def _take(self, count: int) -> bool:
        assert self._data is not None
        part = self._data.recv(count)
        self._hash.update(part)
        return bool(part)

    def finish(self, content: bytes = CONTENT) -> None:
        """The rest of the data, all of it right, and the server's word that it was all."""
        while self._take(1 << 16):
            pass
        assert self._data is not None
        self._data.close()
        self._client.voidresp()
        assert self._hash.digest() == hashlib.sha256(content).digest()

    def close(self) -> None:
        self._client.close()
        if self._data is not None:
            self._data.close()
        with contextlib.suppress(AttributeError):
            self._waiting.close()


class Tftp:
    """A TFTP client (RFC 1350) that asks for a file block by block; the server is tftpd-hpa."""

    BLOCKS = 40

    def __init__(self, server: Namespace, client: Namespace, home: Path) -> None:
        (home / "tftp").mkdir()
        (home / "tftp" / "file").write_bytes(CONTENT[: 512 * self.BLOCKS - 1])
        (home / "tftp" / "file").chmod(0o644)
        for path in (home / "tftp", *home.parents, home):
            with contextlib.suppress(PermissionError):
                path.chmod(path.stat().st_mode | 0o055)
        self._server = server.popen(
            *("/usr/sbin/in.tftpd", "-L", "-4", "--address", "192.168.1.3:69", "-T", "300000", "-s", str(home / "tftp"))
        )
        with client.inside():
            self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.settimeout(0.5)
        self._from: Any = None
        self._got = b""
        self._block = 0

    def begin(self) -> None:
        """The request, until the first block is here."""
        deadline = time.monotonic() + TIMEOUT_S
        while not self._got:
            self.ask()
            self._receive(deadline)

    def ask(self) -> None:
        """The request alone: a helper expects the answer from another port."""
        self.socket.sendto(b"\0\1file\0octet\0", ("192.168.1.3", 69))

    def read(self, until: int) -> None:
        """Acknowledge blocks until this one is here."""
        deadline = time.monotonic() + TIMEOUT_S
        while self._block < until:
            self.socket.sendto(struct.pack("!HH", 4, self._block), self._from)
            self._receive(deadline)

    def _receive(self, deadline: float) -> None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"no block {self._block + 1}")
        with contextlib.suppress(TimeoutError):
            data, sender = self.socket.recvfrom(1000)
            code, block = struct.unpack("!HH", data[:4])
            if code == 3 and block == self._block + 1:
                self._from, self._block = sender, block
                self._got += data[4:]

    def finish(self) -> None:
        self.read(self.BLOCKS)
        assert self._got == CONTENT[: 512 * self.BLOCKS - 1]

    def close(self) -> None:
        self.socket.close()


_SDP = (
    "v=0\r\no=- 1 1 IN IP4 {address}\r\ns=-\r\nc=IN IP4 {address}\r\nt=0 0\r\n"
    "m=audio {port} RTP/AVP 0\r\na=rtpmap:0 PCMU/8000\r\n"
)


class Call:
    """A SIP call over UDP (RFC 3261, 4566): INVITE with an offer, the answer, and then sound in both directions."""

    RTP = 30000

    def __init__(self, caller: Namespace, callee: Namespace, here: str, there: str) -> None:
        self._addresses = (here, there)
        self._sip = [self._socket(caller, here, 5060), self._socket(callee, there, 5060)]
        self._rtp = [self._socket(caller, here, self.RTP), self._socket(callee, there, self.RTP + 100)]
        self.media: tuple[str, int] = ("", 0)  # where the callee sends its sound

    @staticmethod
    def _socket(space: Namespace, address: str, port: int) -> socket.socket:
        with space.inside():
            made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        made.bind((address, port))
        made.settimeout(0.5)
        return made

    def _message(self, first: str, caller: str, callee: str, sdp: str) -> bytes:
        return (
            f"{first}\r\nVia: SIP/2.0/UDP {caller}:5060;branch=z9hG4bK1\r\nMax-Forwards: 70\r\n"
            f"From: <sip:a@{caller}>;tag=1\r\nTo: <sip:b@{callee}>\r\nCall-ID: 1@{caller}\r\nCSeq: 1 INVITE\r\n"
            f"Contact: <sip:a@{caller}:5060>\r\nContent-Type: application/sdp\r\n"
            f"Content-Length: {len(sdp)}\r\n\r\n{sdp}"
        ).encode("ascii")

    def invite(self) -> None:
        """The offer and the answer; nobody has said a word yet."""
        here, there = self._addresses
        offer = _SDP.format(address=here, port=self.RTP)
        self._sip[0].sendto(self._message(f"INVITE sip:b@{there}:5060 SIP/2.0", here, there, offer), (there, 5060))
        data, sender = self._sip[1].recvfrom(4000)
        text = data.decode("ascii")
        address = re.search(r"^c=IN IP4 (\S+)", text, re.MULTILINE)
        port = re.search(r"^m=audio (\d+)", text, re.MULTILINE)
        assert address is not None and port is not None, text
        self.media = (address[1], int(port[1]))
        answer = _SDP.format(address=there, port=self.RTP + 100)
        head, _blank, _offer = text.partition("\r\n\r\n")
        headers = [line for line in head.split("\r\n")[1:] if not line.startswith(("Content", "Contact", "Max"))]
        headers += [f"Contact: <sip:b@{there}:5060>", "Content-Type: application/sdp", f"Content-Length: {len(answer)}"]
        self._sip[1].sendto("\r\n".join(["SIP/2.0 200 OK", *headers, "", answer]).encode("ascii"), sender)
        assert self._sip[0].recv(4000).startswith(b"SIP/2.0 200 OK")

    def heard(self, patience: float = TIMEOUT_S) -> bool:
        """Does the caller hear the callee?  (The callee's sound opens the way that the helper foresaw.)"""
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            self._rtp[1].sendto(b"\x80\0" + bytes(10) + b"sound", self.media)
            with contextlib.suppress(TimeoutError):
                self._rtp[0].recv(1000)
                return True
        return False

    def close(self) -> None:
        for one in (*self._sip, *self._rtp):
            one.close()


class Registration:
    """A SIP phone registers at a server (RFC 3261, 10), which then calls it from another port."""

    def __init__(self, phone: Namespace, server: Namespace, here: str, there: str) -> None:
        self._addresses = (here, there)
        self._phone = Call._socket(phone, here, 5060)
        self._server = Call._socket(server, there, 5060)
        self._space = server
        self._callers: list[socket.socket] = []
        self.contact: tuple[str, int] = ("", 0)  # the phone, as the server knows it

    def register(self) -> None:
        here, there = self._addresses
        lines = (
            *(f"REGISTER sip:{there} SIP/2.0", f"Via: SIP/2.0/UDP {here}:5060;branch=z9hG4bK2", "Max-Forwards: 70"),
            *(f"From: <sip:a@{there}>;tag=2", f"To: <sip:a@{there}>", f"Call-ID: 2@{here}", "CSeq: 1 REGISTER"),
            *(f"Contact: <sip:a@{here}:5060>", "Expires: 3600", "Content-Length: 0", "", ""),
        )
        self._phone.sendto("\r\n".join(lines).encode("ascii"), (there, 5060))
        data, sender = self._server.recvfrom(4000)
        text = data.decode("ascii")
        contact = re.search(r"^Contact: <sip:a@([\d.]+):(\d+)>", text, re.MULTILINE)
        assert contact is not None, text
        self.contact = (contact[1], int(contact[2]))
        kept = [line for line in text.split("\r\n")[1:] if not line.startswith(("Contact", "Max", "Content"))]
        answer = ["SIP/2.0 200 OK", f"Contact: <sip:a@{contact[1]}:{contact[2]}>;expires=3600", "Content-Length: 0"]
        self._server.sendto("\r\n".join([*answer, *filter(None, kept), "", ""]).encode("ascii"), sender)
        assert self._phone.recv(4000).startswith(b"SIP/2.0 200 OK")

    def rings(self, port: int, patience: float = TIMEOUT_S) -> bool:
        """Does a message from this port of the server get to the phone?"""
        caller = Call._socket(self._space, self._addresses[1], port)
        self._callers.append(caller)
        deadline = time.monotonic() + patience
        lines = ("OPTIONS sip:a SIP/2.0", f"Via: SIP/2.0/UDP {self._addresses[1]}:{port};branch=z9hG4bK{port}")
        more = (f"From: <sip:b@b>;tag={port}", "To: <sip:a@a>", f"Call-ID: {port}", "CSeq: 1 OPTIONS")
        message = "\r\n".join((*lines, *more, "Max-Forwards: 70", "Content-Length: 0", "", "")).encode("ascii")
        while time.monotonic() < deadline:
            caller.sendto(message, self.contact)
            with contextlib.suppress(TimeoutError):
                return self._phone.recv(4000).startswith(b"OPTIONS")
        return False

    def close(self) -> None:
        for one in (self._phone, self._server, *self._callers):
            one.close()
