# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Both daemons, as they are shipped: conntrackd with its package's example for FTFW, ctsyncd with its defaults."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Iterator

from integration.netns import Namespace, wait_for

from .topology import VIPS, Stand

PYTHON = "/usr/bin/python3"  # what the role's zipapp runs with
NICE = "-10"  # of the role's unit
SCHEDULER = ("chrt", "--rr", "1")  # as the role's unit sets it once the daemon is ready

CONNTRACKD = ("conntrackd", "conntrackd-tuned", "conntrackd-direct")
CTSYNCD = ("ctsyncd", "ctsyncd-cache")
WITHOUT = ("none", "listener")  # no daemon
VARIANTS = {
    "conntrackd": "conntrackd, FTFW, the package's example configuration",
    "conntrackd-tuned": "the same with a kernel-space filter and State Accept { ESTABLISHED for TCP }",
    "conntrackd-direct": "the same as conntrackd with DisableExternalCache On (replicas go into the kernel at once)",
    "ctsyncd": "ctsyncd, shipped defaults (hot standby: replicas go into the kernel at once)",
    "ctsyncd-cache": "ctsyncd, shipped defaults but mode external-cache (replicas go into the kernel at take-over)",
    "none": "no daemon",
    "listener": "no daemon, but somebody listens to conntrack events, with a filter that drops them all in the kernel",
}


class Usage:
    """What a process has used so far."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def cpu_ns(self) -> int:
        """CPU time of all threads, in nanoseconds, from the scheduler (not the ticks of ``stat``)."""
        total = 0
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError):
                total += int((task / "schedstat").read_text(encoding="ascii").split()[0])
        return total

    def runnable(self) -> bool:
        """Does it run, or wait for a processor, at this moment?"""
        stat = Path(f"/proc/{self.pid}/stat").read_text(encoding="utf-8")
        return stat.rsplit(")", 1)[1].split()[0] == "R"

    def rss(self) -> int:
        """Resident memory in bytes."""
        text = Path(f"/proc/{self.pid}/smaps_rollup").read_text(encoding="ascii")
        found = re.search(r"^Rss:\s+(\d+) kB", text, re.MULTILINE)
        if found is None:
            raise ValueError(f"no Rss in smaps_rollup of {self.pid}")
        return int(found[1]) * 1024

    def link(self) -> tuple[int, int]:
        """Bytes and packets of the sync link so far, both directions, with Ethernet headers."""
        for line in Path(f"/proc/{self.pid}/net/dev").read_text(encoding="ascii").splitlines():
            name, _colon, rest = line.partition(":")
            if name.strip() == "eth2":
                field = [int(word) for word in rest.split()]
                return field[0] + field[8], field[1] + field[9]
        raise ValueError("no eth2 in the daemon's namespace")


class Daemon:
    """One running daemon."""

    def __init__(self, space: Namespace, home: Path, watchdog_s: int) -> None:
        self.space = space
        self.home = home
        self.process: subprocess.Popen[Any] | None = None
        self._watchdog_us = watchdog_s * 1_000_000
        self._notify: socket.socket | None = None
        home.mkdir()

    def command(self) -> list[str]:
        """What starts it, in the foreground."""
        raise NotImplementedError

    def request(self, *argv: str) -> list[str]:
        """What asks it."""
        raise NotImplementedError

    def forget_and_request(self) -> None:
        """Empty the external cache and ask the peer for everything: ``-f external`` and ``-n``."""
        raise NotImplementedError

    def start(self) -> None:
        """As systemd would, with its notification socket: telling it about the state is part of the work."""
        path = self.home / "notify"
        path.unlink(missing_ok=True)
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind(str(path))
        threading.Thread(target=_swallow, args=(self._notify,), daemon=True).start()
        environment = {
            "PATH": os.environ["PATH"],
            "LC_ALL": "C",
            "NOTIFY_SOCKET": str(path),
            "WATCHDOG_USEC": str(self._watchdog_us),
        }
        with open(self.home / "log", "ab") as log:
            self.process = self.space.popen(*self.command(), env=environment, stdout=log, stderr=subprocess.STDOUT)

    def kill(self) -> None:
        """At once, as a crash would."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        if self._notify is not None:
            with contextlib.suppress(OSError):
                self._notify.shutdown(socket.SHUT_RDWR)
            self._notify.close()
            self._notify = None

    @property
    def usage(self) -> Usage:
        if self.process is None or self.process.poll() is not None:
            raise RuntimeError(f"the daemon in {self.space.label} does not run: {self.log()}")
        return Usage(self.process.pid)

    def log(self) -> str:
        """The end of what it said."""
        texts = [
            (self.home / name).read_text(encoding="utf-8", errors="replace")
            for name in ("log", "logfile")
            if (self.home / name).exists()
        ]
        return "".join(texts)[-2000:]

    def ask(self, *argv: str) -> str:
        """The output of a request; RuntimeError if it fails."""
        done = subprocess.run(self.request(*argv), capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(self.request(*argv))}: {done.stdout}{done.stderr}")
        return done.stdout


def _swallow(notify: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while notify.recv(4096):
            pass


class Conntrackd(Daemon):
    """conntrackd in FTFW mode over UDP."""

    def __init__(self, space: Namespace, home: Path, variant: str, flows: int) -> None:
        super().__init__(space, home, watchdog_s=60)
        self.direct = variant == "conntrackd-direct"
        number = int(space.label[-1])
        own = "\n".join(
            f"\t\t\tIPv4_address {address}"
            for address in (
                "127.0.0.1",
                *(address for _interface, address in VIPS),
                *(f"192.168.{net}.{number}" for net in (0, 1, 100)),
            )
        )
        tuned = variant == "conntrackd-tuned"
        state = "\t\tState Accept {\n\t\t\tESTABLISHED for TCP\n\t\t}\n" if tuned else ""
        (home / "conf").write_text(
            f"""\
Sync {{
	Mode FTFW {{
		DisableExternalCache {"On" if self.direct else "Off"}
	}}
	UDP {{
		IPv4_address 192.168.100.{number}
		IPv4_Destination_Address 192.168.100.{3 - number}
		Port 3780
		Interface eth2
		SndSocketBuffer 1249280
		RcvSocketBuffer 1249280
		Checksum on
	}}
}}
General {{
	HashSize {max(65536, 1 << (flows // 4).bit_length())}
	HashLimit {max(524288, 2 * flows + 200_000)}
	LogFile {home / "logfile"}
	LockFile {home / "lock"}
	UNIX {{
		Path {home / "ctl"}
	}}
	NetlinkBufferSize 2097152
	NetlinkBufferSizeMaxGrowth 8388608
	Filter From {"Kernelspace" if tuned else "Userspace"} {{
		Protocol Accept {{
			TCP
			SCTP
			DCCP
		}}
		Address Ignore {{
{own}
		}}
{state}	}}
}}
""",
            encoding="ascii",
        )

    def start(self) -> None:
        for name in ("lock", "ctl"):  # of one that was killed
            (self.home / name).unlink(missing_ok=True)
        super().start()

    def command(self) -> list[str]:
        return ["conntrackd", "-C", str(self.home / "conf")]

    def request(self, *argv: str) -> list[str]:
        return ["conntrackd", "-C", str(self.home / "conf"), *argv]

    def forget_and_request(self) -> None:
        self.ask("-f", "external")
        self.ask("-n")

    def cached(self, which: str) -> int:
        """Flows in the ``internal`` or ``external`` cache."""
        found = re.search(rf"cache {which}:\s+current active connections:\s+(\d+)", self.ask("-s"))
        if found is None:
            raise RuntimeError(f"conntrackd says nothing of its {which} cache")
        return int(found[1])

    def overruns(self) -> int:
        """How often the kernel's events overran its socket."""
        found = re.search(r"netlink overrun:\s+(\d+)", self.ask("-s", "runtime"))
        if found is None:
            raise RuntimeError("conntrackd says nothing of overruns")
        return int(found[1])


class Ctsyncd(Daemon):
    """ctsyncd as the role installs it."""

    def __init__(self, space: Namespace, home: Path, variant: str, application: Path, key: Path) -> None:
        super().__init__(space, home, watchdog_s=10)
        self.application = application
        number = int(space.label[-1])
        peer = 3 - number
        os.mkfifo(home / "fifo")
        (home / "not-ready").write_text("1\n", encoding="ascii")
        config: dict[str, Any] = {
            "node": f"fw{number}",
            "peers": [{"node": f"fw{peer}", "address": f"192.168.100.{peer}"}],
            "link": {"interface": "eth2", "address": f"192.168.100.{number}"},
            "virtual_ips": [{"interface": interface, "address": address} for interface, address in VIPS],
            "keys": {"1": str(key)},
            "control_socket": str(home / "ctl"),
            "notify_fifo": str(home / "fifo"),
            "track_file": str(home / "not-ready"),
            "ignore_addresses": ["192.168.100.0/24"],
        }
        if variant == "ctsyncd-cache":
            config["mode"] = "external-cache"
        (home / "conf").write_text(json.dumps(config), encoding="utf-8")

    def command(self) -> list[str]:
        return [*SCHEDULER, "nice", "-n", NICE, str(self.application), "-C", str(self.home / "conf")]

    def request(self, *argv: str) -> list[str]:
        return [str(self.application), "-C", str(self.home / "conf"), *argv]

    def control(self, **request: str) -> list[str]:
        """The lines of the daemon's answer, asked without starting a Python; RuntimeError if it refuses."""
        with socket.socket(socket.AF_UNIX) as control:
            control.settimeout(60)
            control.connect(str(self.home / "ctl"))
            control.sendall(json.dumps(request).encode() + b"\n")
            lines = b"".join(iter(lambda: control.recv(65536), b"")).decode().splitlines()
        if not lines or not json.loads(lines[-1])["ok"]:
            raise RuntimeError(f"ctsyncd refuses {request}: {lines[-1:]}")
        return lines[:-1]

    def status(self) -> dict[str, Any]:
        """What ``status --json`` says; {} while nobody answers."""
        with contextlib.suppress(OSError, ValueError):
            found: dict[str, Any] = json.loads(self.control(command="status")[0])
            return found
        return {}

    def forget_and_request(self) -> None:
        self.control(command="flush", which="external")
        self.control(command="request")

    def counter(self, name: str) -> int:
        """A counter of the status; one that never counted is 0."""
        return int(self.status()["counters"].get(name, 0))


class Pair:
    """A daemon on each firewall; fw1 is active.  ``variant`` is a key of VARIANTS."""

    def __init__(self, stand: Stand, variant: str, home: Path, application: Path, flows: int) -> None:
        self.stand = stand
        self.variant = variant
        self.ours = variant in CTSYNCD
        self.active: Daemon
        self.backup: Daemon
        if self.ours:
            key = home / "key"
            key.write_bytes(base64.b64encode(secrets.token_bytes(32)))
            key.chmod(0o600)
            self.active = Ctsyncd(stand.fw1, home / "fw1", variant, application, key)
            self.backup = Ctsyncd(stand.fw2, home / "fw2", variant, application, key)
        else:
            self.active = Conntrackd(stand.fw1, home / "fw1", variant, flows)
            self.backup = Conntrackd(stand.fw2, home / "fw2", variant, flows)

    def start(self) -> None:
        """Both run, know each other, and are through with their start."""
        self.stand.hold(self.stand.fw1, True)
        self.active.start()
        self.backup.start()
        self.wait()

    def wait(self) -> None:
        """Until both know each other and are through with their start; RuntimeError if they do not come so far."""
        try:
            wait_for(self._ready, f"{self.variant} to be ready", 60)
        except AssertionError as error:
            raise RuntimeError(f"{error}: {self.active.log()} {self.backup.log()}") from None

    def _ready(self) -> bool:
        if self.process_ended():
            raise RuntimeError(f"{self.variant} ended: {self.active.log()} {self.backup.log()}")
        if self.ours:
            states = [daemon.status() for daemon in (self.active, self.backup) if isinstance(daemon, Ctsyncd)]
            return all(state.get("verdict") == "READY" for state in states)
        return all((daemon.home / "ctl").exists() for daemon in (self.active, self.backup))

    def process_ended(self) -> bool:
        """Is one of the daemons gone?"""
        return any(d.process is None or d.process.poll() is not None for d in (self.active, self.backup))

    def external(self) -> int:
        """Flows that the backup knows of the active node."""
        if isinstance(self.backup, Ctsyncd):
            return int(self.backup.status()["flows"]["external"])
        assert isinstance(self.backup, Conntrackd)
        if self.backup.direct:
            raise RuntimeError("conntrackd without an external cache cannot tell")
        return self.backup.cached("external")

    def overruns(self) -> int:
        """How often the active daemon lost events of the kernel."""
        if isinstance(self.active, Ctsyncd):
            return self.active.counter("overruns")
        assert isinstance(self.active, Conntrackd)
        return self.active.overruns()

    def close(self) -> None:
        self.active.kill()
        self.backup.kill()


@contextlib.contextmanager
def pair(stand: Stand, variant: str, home: Path, application: Path, flows: int) -> Iterator[Pair]:
    """Both daemons of a variant, started on empty tables, killed at the end whatever happened."""
    stand.reset()
    home.mkdir()
    made = Pair(stand, variant, home, application, flows)
    try:
        made.start()
        yield made
    finally:
        made.close()
        stand.reset()
        shutil.rmtree(home, ignore_errors=True)


def build(checkout: Path, target: Path) -> str:
    """Write the daemon of a checkout as the file that its role would install; returns the tool's line about it."""
    done = subprocess.run(
        [sys.executable, str(checkout / "tools" / "build_zipapp.py"), str(target), "--interpreter", PYTHON],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{checkout}: the daemon cannot be built: {done.stderr}")
    return done.stdout.strip().split(": ", 1)[-1]
