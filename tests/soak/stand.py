# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The pair that faults happen to: two daemons, two keepalived, sessions of all kinds through them, and a sync link that
goes through :mod:`soak.relay`."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import json
import os
import random
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Iterator

from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import client
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.client import ControlError
from integration.cluster import VIP, Daemon, Session, install
from integration.load import Load, cpu_seconds, memory_kib
from integration.netns import InVain, Namespace, Net, Pair, run, wait_for
from integration.vrrp_node import V4, V6, Node

from . import judge, relay

POLL_S = 0.1
PATIENCE_S = 120.0  # for what takes seconds on an idle machine
ADVERT_S = 0.3  # keepalived's interval
CHURN = 10.0  # short connections a second
DNAT_SESSIONS = 4  # of each address family
EQUAL_S = 180.0  # what passed through a backup while a host had not heard of the other node lives as long as TIME_WAIT
SOON_S = 5.0
DNAT_PATIENCE_S = 60.0
DISK_BYTES = 128 << 20
DISK_INODES = 2_000
RULES = "ab" * 32  # fingerprint of the ruleset
OWN_NETWORKS = ("192.168.0.", "192.168.1.", "192.168.100.", "fd00:c0de::", "fd00:c0de:1::", "fd00:c0de:64::")
VIP6 = "fd00:c0de:1::100"


class Trouble(AssertionError):
    """Something that must not be; the text says what."""


wait = functools.partial(wait_for, timeout=PATIENCE_S, every_s=POLL_S)


class Wire(Pair):
    """The test case's topology with a namespace in the middle of the sync link."""

    def _sync_link(self) -> None:
        self.wire = self.net.namespace("wire")
        self.wire.sysctl({"net/ipv6/conf/all/disable_ipv6": "1", "net/ipv6/conf/default/disable_ipv6": "1"})
        for node in (self.fw1, self.fw2):
            self.net.link(node, "eth2", self.wire, node.label)


class Stand:
    """Everything of a run that can be rebuilt.  ``options`` are those of both daemons' configuration."""

    virtual_ips = V4 | V6

    def __init__(self, pair: Wire, home: Path, seed: int, sessions: int, **options: Any) -> None:
        self.pair = pair
        self.home = home
        self.lab = Load(pair, home, sessions, **options)
        self.stack = self.lab.stack
        self.replicates = bool(options.get("replicate", True))
        self.daemons = (self.lab.fw1, self.lab.fw2)
        self.nodes: dict[Daemon, Node] = {}
        for daemon, priority in zip(self.daemons, (150, 100)):
            self.nodes[daemon] = Node(
                daemon.space, home / f"vrrp-{daemon.space.label}", int(daemon.space.label[-1]), priority, daemon.home
            )
        self.compares = False  # the daemons compare their tables by themselves
        self.dnat: list[Session] = []
        self.equal_s = 0.0  # how long it took the tables to become equal, and what differed after SOON_S
        self.slow: list[str] = []
        self.deadline_s: float | None = None  # of a proof, instead of the usual patience
        self.version = 0
        self.keys = 1
        self._relay = pair.wire.popen(
            *(sys.executable, str(Path(relay.__file__)), str(seed)), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.relay_counters: dict[str, int] = {}
        self.weather()

    # --- beginning and end -------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Both nodes run, fw1 is active, all sessions stand, and none that is lost can begin anew."""
        for daemon in self.daemons:
            self.nodes[daemon].configure(ipv6=True, advert_interval=ADVERT_S)
            install(daemon.home, "1.0.0")
            self.rules(daemon)
            self.configure(daemon, ruleset_fingerprint=str(daemon.home / "rules"))
            daemon.program = (sys.executable, "-I", str(daemon.home / "ctsyncd"))
            daemon.start()
        self.compares = "\n  verify " in self.daemons[0].run("-h")[1]
        for daemon in self.daemons:
            self.nodes[daemon].start()
            wait(self.virtual_ips_of(self.daemons[0]), "fw1 to become active")
        if self.replicates:
            self.ready()
        else:
            for daemon in self.daemons:
                wait(lambda d=daemon: self.status(d)["role"], "the daemons to run")
        self.lab.open()
        self.churn()
        listener6 = self.stack.enter_context(self.pair.a.listen("fd00:c0de::3", 80))
        for listener, address in ((self.lab.web, VIP), (listener6, VIP6)):
            for dummy in range(DNAT_SESSIONS):
                client = self.pair.b.connect(address, 8080)
                server, seen = listener.accept()
                for sock in (client, server):
                    self.stack.callback(sock.close)
                self.dnat.append(Session(client, server, seen))
        self.lab.seal()

    def close(self) -> None:
        for node in self.nodes.values():
            with contextlib.suppress(Exception):
                node.close()
        self.lab.close()
        self._relay.kill()
        self._relay.wait()

    # --- the sync link -----------------------------------------------------------------------------------------------

    def weather(self, **values: Any) -> None:
        """What the relay does from now on; see :class:`relay.Weather`."""
        assert self._relay.stdin is not None and self._relay.stdout is not None
        self._relay.stdin.write(json.dumps(values).encode() + b"\n")
        self._relay.stdin.flush()
        if not select.select([self._relay.stdout], [], [], PATIENCE_S)[0]:
            raise Trouble("the relay says nothing")
        self.relay_counters = json.loads(self._relay.stdout.readline())

    # --- asking ------------------------------------------------------------------------------------------------------

    def ask(self, daemon: Daemon, command: str, **values: Any) -> list[str]:
        """Lines of the daemon's answer, asked through its socket; :class:`ControlError` where it has none."""
        return list(client.request(str(daemon.home / "socket"), {"command": command, **values}))

    def status(self, daemon: Daemon) -> dict[str, Any]:
        """The daemon's status; where nobody answers, one that says so."""
        try:
            return dict(json.loads("".join(self.ask(daemon, "status"))))
        except ControlError as error:
            return {"verdict": "NOT READY", "role": "", "reasons": [str(error)], "peers": [], "counters": {}}

    def say(self, daemon: Daemon) -> str:
        """The daemon's verdict in one line."""
        status = self.status(daemon)
        return f"{daemon.space.label}, {status['role'] or 'no daemon'}, {status['verdict']}: {status['reasons']}"

    def roles(self) -> tuple[Daemon, Daemon] | None:
        """Active and backup; None while it is not one of each."""
        by_role = {self.status(daemon)["role"]: daemon for daemon in self.daemons}
        if set(by_role) != {"active", "backup"}:
            return None
        return by_role["active"], by_role["backup"]

    def other(self, daemon: Daemon) -> Daemon:
        return self.daemons[1] if daemon is self.daemons[0] else self.daemons[0]

    def virtual_ips_of(self, daemon: Daemon) -> Callable[[], bool]:
        return lambda: self.nodes[daemon].holds(V4 | V6)

    def ready(self, what: str = "both nodes to be READY") -> tuple[Daemon, Daemon]:
        """Active and backup, when both are READY and every change until now is acknowledged."""
        began = time.monotonic()

        def done() -> tuple[Daemon, Daemon] | None:
            asked = time.monotonic()
            statuses = {daemon: self.status(daemon) for daemon in self.daemons}
            if any(status["verdict"] != "READY" for status in statuses.values()):
                return None
            by_role = {status["role"]: daemon for daemon, status in statuses.items()}
            if set(by_role) != {"active", "backup"}:
                return None
            age = statuses[by_role["active"]]["peers"][0]["lag"]["age_s"]
            return (by_role["active"], by_role["backup"]) if asked - age > began else None

        try:
            return wait(done, what)
        except InVain as error:
            raise Trouble(f"{error}: {'; '.join(self.say(daemon) for daemon in self.daemons)}") from None

    def says(self, daemon: Daemon, *words: str) -> None:
        """Wait until the daemon's verdict has these words: the product has to tell what an operator must know."""
        try:
            wait(
                lambda: all(word in self.say(daemon) for word in words),
                f"{daemon.space.label} to say {words}",
                timeout=30,
            )
        except InVain as error:
            raise Trouble(f"{error}: {self.say(daemon)}") from None

    # --- sessions ----------------------------------------------------------------------------------------------------

    def lost(self, deadline: float | None = None) -> list[str]:
        """What is wrong with the sessions: round trips in all of them."""
        deadline = deadline or self.deadline_s
        result = self.lab.prove(deadline or self.lab.patience_s)
        by_number = {name.split()[0]: f"session {name}: {why}" for name, why in result["lost"].items()}
        out = list(by_number.values())
        if result["resets"]:
            out.append(f"{result['resets']} TCP resets")
        for session in self.dnat:
            for sock in (session.client, session.server):
                sock.settimeout(deadline or DNAT_PATIENCE_S)
        with concurrent.futures.ThreadPoolExecutor(len(self.dnat)) as pool:
            answers = pool.map(_trouble, self.dnat)
        out += [f"session {number} dnat: {why}" for number, why in enumerate(answers) if why]
        return out

    @property
    def sessions(self) -> int:
        return self.lab.sessions + len(self.dnat)

    def churn(self, per_s: float = CHURN) -> None:
        """So many connections begin and end each second beside the sessions."""
        self.lab.client.ask("talk", on=True, churn=per_s)

    # --- tables ------------------------------------------------------------------------------------------------------

    def _listing(self, daemon: Daemon, command: str) -> dict[str, Any]:
        return judge.flows(json.loads(line) for line in self.ask(daemon, command, format="json"))

    @staticmethod
    def _kernel(space: Namespace) -> dict[str, Any]:
        listing = "".join(space.conntrack("-L", "-f", family) for family in ("ipv4", "ipv6"))
        return judge.kernel_entries(listing)

    def differences(self, active: Daemon, backup: Daemon) -> list[str]:
        """How the backup's tables differ from the active node's: its cache, and what its kernel really holds."""
        before, kernel_before = self._listing(active, "internal"), self._kernel(active.space)
        copy, kernel = self._listing(backup, "external"), self._kernel(backup.space)
        after, kernel_after = self._listing(active, "internal"), self._kernel(active.space)

        def meant(table: dict[str, Any]) -> dict[str, Any]:
            return {key: value for key, value in table.items() if key in after}

        # what the backup's kernel has and the active one's has not counts where it could take over: with an answer seen
        known = {**meant(kernel), **{key: value for key, value in kernel.items() if value[0] and _through(key)}}
        # a connection that is over is not listed by the active node; the backup forgets it when it leaves that kernel
        over = (kernel_before.keys() | kernel_after.keys()) - before.keys() - after.keys()
        copy = {key: value for key, value in copy.items() if key not in over}
        return [
            *(f"the backup {what}" for what in judge.differences(before, copy, after)),
            *(f"the backup's kernel {what}" for what in judge.differences(meant(kernel_before), known, kernel_after)),
        ]

    def equal(self, active: Daemon, backup: Daemon, patience: float = EQUAL_S) -> list[str]:
        """The differences that stay; empty: none.  ``slow`` is what took longer than a few seconds to become equal.

        Connections begin and end all the time, so there is always one that the backup has not heard of yet: only what
        was found a second before, too, is a difference.
        """
        before: set[str] = set()
        stays: list[str] = []
        began = time.monotonic()
        self.slow = []

        def same() -> bool:
            nonlocal before, stays
            found = self.differences(active, backup)
            stays = [one for one in found if one in before]
            done = not found or bool(before and not stays)
            before = set(found)
            if stays and time.monotonic() > began + SOON_S and not self.slow:
                self.slow = stays[:3]
            if not done:
                time.sleep(1.0)
            return done

        try:
            wait(same, "equal tables", timeout=patience)
        except InVain:
            return stays
        except ControlError as error:
            return [f"the tables cannot be listed: {error}"]
        finally:
            self.equal_s = round(time.monotonic() - began, 1)
        return []

    def verified(self, daemon: Daemon) -> list[str]:
        """What ``ctsyncd verify`` says if it is not "equal", and stays so."""
        if not self.compares:
            return []
        said = ""

        def equal() -> bool:
            nonlocal said
            status, said = daemon.run("verify")
            return status == 0

        try:
            wait(equal, "equal tables", timeout=EQUAL_S)
        except InVain:
            return [f"verify on {daemon.space.label}: {said[:500]}"]
        return []

    # --- processes ---------------------------------------------------------------------------------------------------

    def sample(self, daemon: Daemon, at_s: float) -> judge.Sample:
        assert daemon.process is not None
        pid = daemon.process.pid
        return judge.Sample(
            *(round(at_s, 1), daemon.space.label, pid, memory_kib(daemon)),
            *(len(os.listdir(f"/proc/{pid}/fd")), cpu_seconds(daemon)),
        )

    def dead(self) -> list[str]:
        """Daemons and keepalived that ended by themselves."""
        return [
            f"ctsyncd on {daemon.space.label} ended with {daemon.process.returncode}"
            for daemon in self.daemons
            if daemon.process is not None and daemon.process.poll() is not None
        ]

    def start(self, daemon: Daemon) -> None:
        """As the unit does."""
        daemon.ask("gate", "--not-ready")
        daemon.start()

    def kill(self, daemon: Daemon) -> None:
        """As the unit does where the daemon dies."""
        daemon.kill()
        daemon.ask("gate", "--not-ready")

    def configure(self, daemon: Daemon, **options: Any) -> None:
        """Change options in the daemon's file; None removes one."""
        path = daemon.home / "conf"
        config = {**json.loads(path.read_text(encoding="utf-8")), **options}
        config = {name: value for name, value in config.items() if value is not None}
        path.write_text(json.dumps(config), encoding="utf-8")

    @staticmethod
    def rules(daemon: Daemon, fingerprint: str = RULES) -> None:
        """The node has this ruleset, as far as the others are told."""
        new = daemon.home / "rules.new"
        new.write_text(fingerprint + "\n", encoding="ascii")
        new.rename(daemon.home / "rules")

    # --- nodes -------------------------------------------------------------------------------------------------------

    def dark(self, daemon: Daemon) -> None:
        """No power: what the node had in memory is gone, but for the rules, which a boot would load."""
        self.lab.unplug(daemon.space)
        daemon.kill()
        self.nodes[daemon].power_off()
        daemon.space.conntrack("-F")
        (daemon.home / "not-ready").write_text("1\n", encoding="ascii")

    def boot(self, daemon: Daemon) -> None:
        self.lab.plug_sync(daemon.space)
        self.lab.plug_traffic(daemon.space)
        self.start(daemon)
        self.nodes[daemon].start()

    def port(self, daemon: Daemon, interface: str, up: bool) -> None:
        """The cable of an interface, pulled at the switch: the node sees its carrier go."""
        self.pair.switch.ip("link", "set", f"{daemon.space.label}-{interface}", "up" if up else "down")

    def inject(self, space: Namespace, chance: random.Random, count: int, timeout_s: int, squat: bool = False) -> None:
        """Entries for random flows from an inner network, with SNAT, that a packet would have made.

        ``squat``: from other clients, with the same translations as the next call without it.
        """
        state = chance.getstate()
        lines = []
        for dummy in range(count):
            host, port, outside = chance.randrange(1 << 20), chance.randrange(1024, 1 << 16), chance.randrange(1 << 16)
            client = f"{11 if squat else 10}.{host >> 16}.{host >> 8 & 255}.{host & 255}"
            server = f"198.51.{100 + (outside >> 8) % 2}.{outside & 255}"
            lines.append(
                f"-A -p tcp -s {client} -d {server} --sport {port} --dport 443 --src-nat {VIP}:{port}"
                f" --state ESTABLISHED -u SEEN_REPLY,ASSURED -t {timeout_s}\n"
            )
        if squat:
            chance.setstate(state)
        space.run("conntrack", "-R", "-", stdin="".join(lines), check=False)  # a tuple that is taken is left out

    def tidy(self, active: Daemon) -> None:
        """What an operator does about entries on the backup that nobody knows, where the daemons do not find them."""
        if not self.compares:
            self.ask(active, "bulk")


def _through(key: str) -> bool:
    """Does the flow of a :func:`judge.kernel_entries` key go through the firewalls?"""
    own = {f"{net}{n}" for net in OWN_NETWORKS for n in (1, 2)}
    ends = [word.partition("=")[2] for word in key.split() if word[:4] in ("src=", "dst=")]
    return not any(end in own or end.startswith(("fe80:", "ff0", "224.")) for end in ends)


def _trouble(session: Session) -> str:
    """What is wrong with a session, after a message each way."""
    try:
        session.talk()
    except OSError as error:
        return str(error)
    return ""


@contextlib.contextmanager
def stand(home: Path, seed: int, sessions: int, **options: Any) -> Iterator[Stand]:
    """A pair on a small disk of its own; everything is removed at the end, whatever happened."""
    with contextlib.ExitStack() as stack:
        home.mkdir()
        run(
            "mount",
            "-t",
            "tmpfs",
            "-o",
            f"size={DISK_BYTES},nr_inodes={DISK_INODES},mode=0755",
            "ctsync-t-soak",
            str(home),
        )
        stack.callback(run, "umount", "-l", str(home), check=False)
        made = Net()
        stack.callback(made.close)
        here = Stand(Wire(made), home, seed, sessions, **options)
        stack.callback(here.close)
        here.begin()
        yield here
