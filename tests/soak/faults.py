# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""How each fault of :mod:`soak.plan` is done and undone on the stand.

A fault begins with the pair READY; it returns what was wrong while it lasted, and leaves everything mended, so that the
pair can become READY by itself.  Where the nodes change roles, the sessions are proved while the former active node is
still away, so that none can be saved by its return.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import json
import random
import secrets
import shutil
import signal
import time
from typing import Any, Callable, Iterator

from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.client import ControlError
from integration.cluster import Daemon, install

from .stand import DISK_INODES, Stand, Trouble, wait

Act = Callable[["Scene"], "list[str] | None"]
ACTS: dict[str, Act] = {}
SILENCE_S = 2.5  # more than dead_after_ms: from then on the silence is told
SMALL_BUFFER = 65_536
MOST_CHANGED = 30  # replicas on the backup


class Scene:
    """A fault, about to happen: who is active and who is not."""

    def __init__(self, stand: Stand, active: Daemon, backup: Daemon, values: dict[str, Any], seed: str) -> None:
        self.stand = stand
        self.active = active
        self.backup = backup
        self.values = values
        self.chance = random.Random(seed)

    def node(self, name: str) -> Daemon:
        return {"active": self.active, "backup": self.backup}[name]

    def pause(self, name: str) -> None:
        time.sleep(self.values[name])

    def moved(self) -> list[str]:
        """Wait until the backup has the virtual IPs; what is wrong with the sessions then."""
        wait(self.stand.virtual_ips_of(self.backup), f"{self.backup.space.label} to take over")
        return self.stand.lost()


def act(name: str) -> Callable[[Act], Act]:
    def register(function: Act) -> Act:
        ACTS[name] = function
        return function

    return register


# --- a node goes -----------------------------------------------------------------------------------------------------


@act("power cut of the active node")
def _power_cut(scene: Scene) -> list[str]:
    scene.stand.dark(scene.active)
    lost = scene.moved()
    scene.pause("dark_s")
    if scene.stand.replicates:
        scene.stand.says(scene.backup, "active, DEGRADED")
    scene.stand.boot(scene.active)
    return lost


@act("power cut behind a dead link")
def _blind_power_cut(scene: Scene) -> list[str]:
    """The sessions are older than the cut: the backup has them, and says how old its table is."""
    stand = scene.stand
    stand.weather(deaf=["fw1", "fw2"])
    scene.pause("blind_s")
    stand.says(scene.active, "active, DEGRADED", "silent")
    stand.says(scene.backup, "backup, DEGRADED", "the table is as old as that")
    stand.dark(scene.active)
    stand.weather()
    lost = scene.moved()
    scene.pause("dark_s")
    stand.boot(scene.active)
    return lost


@act("power cut of the backup")
def _backup_power_cut(scene: Scene) -> None:
    scene.stand.dark(scene.backup)
    scene.stand.says(scene.active, "active, DEGRADED", "silent")
    scene.pause("dark_s")
    scene.stand.boot(scene.backup)


@act("freeze of the active node")
def _node_freeze(scene: Scene) -> list[str]:
    stand, node = scene.stand, scene.stand.nodes[scene.active]
    stand.lab.unplug_traffic(scene.active.space)
    stand.weather(deaf=["fw1", "fw2"])
    scene.active.send(signal.SIGSTOP)
    node.freeze(True)
    try:
        lost = scene.moved()
        scene.pause("frozen_s")
    finally:
        stand.lab.plug_traffic(scene.active.space)
        stand.weather()
        node.freeze(False)
        scene.pause("late_s")  # by then the other node may have yielded, and is not heard as active any more
        scene.active.send(signal.SIGCONT)
    return lost


@act("cable pulled")
def _cable(scene: Scene) -> list[str]:
    for interface in scene.values["sides"]:
        scene.stand.port(scene.active, interface, False)
    lost = scene.moved()
    scene.pause("dark_s")
    for interface in scene.values["sides"]:
        scene.stand.port(scene.active, interface, True)
    return lost


@act("node off the network")
def _off_network(scene: Scene) -> list[str]:
    scene.stand.lab.unplug_traffic(scene.active.space)
    lost = scene.moved()
    scene.pause("dark_s")
    scene.stand.lab.plug_traffic(scene.active.space)
    return lost


# --- keepalived ------------------------------------------------------------------------------------------------------


@act("hand-over")
def _hand_over(scene: Scene) -> list[str]:
    node = scene.stand.nodes[scene.active]
    node.stop()
    node.start()
    return scene.moved()


@act("keepalived stopped")
def _keepalived_stopped(scene: Scene) -> list[str]:
    node = scene.stand.nodes[scene.node(scene.values["node"])]
    node.stop()
    lost = scene.moved() if scene.values["node"] == "active" else []
    scene.pause("pause_s")
    node.start()
    return lost


@act("keepalived killed")
def _keepalived_killed(scene: Scene) -> None:
    """The addresses stay: both nodes have them until it runs again, as with a unit that restarts it."""
    node = scene.stand.nodes[scene.node(scene.values["node"])]
    node.kill()
    if scene.values["node"] == "active":
        wait(scene.stand.virtual_ips_of(scene.backup), "two nodes with the virtual IPs")
    scene.pause("pause_s")
    node.start()


@act("keepalived reloaded")
def _keepalived_reloaded(scene: Scene) -> list[str]:
    scene.stand.nodes[scene.node(scene.values["node"])].reload()
    return [] if scene.stand.roles() == (scene.active, scene.backup) else ["a reload moved the virtual IPs"]


@act("flapping")
def _flapping(scene: Scene) -> list[str]:
    stand, active, backup = scene.stand, scene.active, scene.backup
    for dummy in range(scene.values["times"]):
        if scene.values["bulk"]:
            with contextlib.suppress(ControlError):
                stand.ask(active, "bulk")
        stand.nodes[active].stop()
        stand.nodes[active].start()
        wait(stand.virtual_ips_of(backup), f"{backup.space.label} to take over")
        active, backup = backup, active
        scene.pause("pause_s")
    return stand.lost()


@act("split brain")
def _split_brain(scene: Scene) -> list[str]:
    """While both are active the two directions of a session may take different ways: it is proved afterwards.

    A backup that alone is deaf, and has the higher priority, makes none: the active node hears it and yields (RFC 5798,
    section 6.4.3).  That is a take-over like another.
    """
    stand, active, backup = scene.stand, scene.active, scene.backup
    deaf = [scene.node(name) for name in scene.values["deaf"]]
    yields = active not in deaf and stand.nodes[backup].priority > stand.nodes[active].priority
    with _dropped(deaf, "-p", "112"):
        wait(stand.virtual_ips_of(backup), "two active nodes")
        lost = []
        if yields:
            wait(stand.nodes[active].holds_none, f"{active.space.label} to yield")
            lost = stand.lost()
        else:
            for daemon in stand.daemons:
                stand.says(daemon, "active, DEGRADED", "split brain")
        scene.pause("for_s")
    return lost


@contextlib.contextmanager
def _dropped(daemons: list[Daemon], *match: str) -> Iterator[None]:
    """IPv4 and IPv6 packets that match do not come in there."""
    rules = [(daemon.space, tool) for daemon in daemons for tool in ("iptables", "ip6tables")]
    for space, tool in rules:
        space.run(tool, "-I", "INPUT", *match, "-j", "DROP")
    try:
        yield
    finally:
        for space, tool in rules:
            space.run(tool, "-D", "INPUT", *match, "-j", "DROP")


# --- the daemon ------------------------------------------------------------------------------------------------------


@act("ctsyncd killed")
def _killed(scene: Scene) -> None:
    daemon = scene.node(scene.values["node"])
    scene.stand.kill(daemon)
    scene.pause("pause_s")
    scene.stand.start(daemon)


@act("ctsyncd killed on both")
def _both_killed(scene: Scene) -> None:
    first = scene.node(scene.values["first"])
    second = scene.stand.other(first)
    for daemon in (first, second):
        scene.stand.kill(daemon)
    scene.stand.start(first)
    scene.pause("pause_s")
    scene.stand.start(second)


@act("ctsyncd upgraded")
def _upgraded(scene: Scene) -> list[str]:
    stand, lost = scene.stand, []
    stand.version += 1
    version = f"1.0.{stand.version}"
    for name in scene.values["nodes"]:
        daemon = scene.node(name)
        old = (daemon.home / "ctsyncd").resolve()
        install(daemon.home, version)
        daemon.stop()
        old.unlink()
        stand.start(daemon)
        stand.ready()
        if stand.status(daemon)["version"] != version:
            lost.append(f"{daemon.space.label} does not run {version}")
    return lost


@act("ctsyncd frozen")
def _frozen(scene: Scene) -> None:
    daemon = scene.node(scene.values["node"])
    daemon.send(signal.SIGSTOP)
    try:
        scene.pause("for_s")
        if scene.values["for_s"] > SILENCE_S:
            scene.stand.says(scene.stand.other(daemon), "DEGRADED", "silent")
    finally:
        daemon.send(signal.SIGCONT)


def _new_key(stand: Stand) -> str:
    stand.keys += 1
    path = stand.home / f"key{stand.keys}"
    path.write_bytes(base64.b64encode(secrets.token_bytes(32)))
    path.chmod(0o600)
    return str(path)


def _restart(stand: Stand, daemon: Daemon) -> None:
    daemon.stop()
    stand.start(daemon)


def _rotation(scene: Scene) -> Iterator[Daemon]:
    """Another key, step by step: the daemon whose key files and configuration have just been changed for it."""
    stand = scene.stand
    config = json.loads((scene.active.home / "conf").read_text(encoding="utf-8"))
    (old_id,) = config["keys"]
    new_id = str(int(old_id) % 255 + 1)
    old, new = config["keys"][old_id], _new_key(stand)
    both = {old_id: old, new_id: new}
    for daemon, keys, send in (
        (scene.backup, both, old_id),
        (scene.active, both, new_id),
        (scene.backup, {new_id: new}, new_id),
        (scene.active, {new_id: new}, new_id),
    ):
        stand.configure(daemon, keys=keys, send_key=int(send))
        yield daemon


@act("key rotated")
def _key_rotated(scene: Scene) -> None:
    stand = scene.stand
    for daemon in _rotation(scene):
        _restart(stand, daemon)
        stand.ready()


@act("key rotated in service")
def _key_rotated_in_service(scene: Scene) -> list[str]:
    """As the module does it: key files and configuration, then the command; the session goes on."""
    stand = scene.stand

    def lives() -> list[tuple[int, int]]:
        return [
            (daemon.process.pid if daemon.process else 0, stand.status(daemon)["counters"]["sessions"])
            for daemon in stand.daemons
        ]

    before = lives()
    for daemon in _rotation(scene):
        # refused while the other's datagrams with the new key have not arrived yet
        wait(lambda daemon=daemon: daemon.run("keys")[0] == 0, f"{daemon.space.label} to use its keys", timeout=30)
        stand.ready()
    after = lives()
    return [] if after == before else [f"daemons and sessions did not live through it: {before}, then {after}"]


@act("wrong key")
def _wrong_key(scene: Scene) -> None:
    stand, daemon = scene.stand, scene.backup
    right = json.loads((daemon.home / "conf").read_text(encoding="utf-8"))["keys"]
    (key_id,) = right
    stand.configure(daemon, keys={key_id: _new_key(stand)})
    _restart(stand, daemon)
    stand.says(daemon, "backup, NOT READY")
    if daemon.gate == "0":
        raise Trouble(f"{daemon.space.label} has no table and lets keepalived take over")
    scene.pause("for_s")
    stand.configure(daemon, keys=right)
    _restart(stand, daemon)


def _reload(stand: Stand, daemon: Daemon, **options: Any) -> None:
    """Raises Trouble where the options are not in use in the end."""
    stand.configure(daemon, **options)
    before = stand.status(daemon)["configuration"]["digest"]
    daemon.send(signal.SIGHUP)
    wait(lambda: stand.status(daemon)["configuration"]["digest"] != before, "the reload", timeout=30)


@act("configuration reloaded")
def _reloaded(scene: Scene) -> None:
    daemon, options = scene.node(scene.values["node"]), scene.values["options"]
    _reload(scene.stand, daemon, **options)
    scene.stand.ready()
    _reload(scene.stand, daemon, **dict.fromkeys(options))


@act("wrong configuration reloaded")
def _wrong_configuration(scene: Scene) -> None:
    daemon = scene.node(scene.values["node"])
    path = daemon.home / "conf"
    right = path.read_text(encoding="utf-8")
    path.write_text(right.replace('"node"', '"nod"', 1), encoding="utf-8")
    daemon.send(signal.SIGHUP)
    scene.stand.says(daemon, "DEGRADED", "the configuration was not reloaded")
    path.write_text(right, encoding="utf-8")
    daemon.send(signal.SIGHUP)


@act("requests")
def _requests(scene: Scene) -> list[str]:
    bad = []
    for request, name in scene.values["requests"]:
        daemon = scene.node(name)
        commands = ("flush", "request") if request == "forget" else (request,)
        for command in commands:
            try:
                scene.stand.ask(daemon, command)
            except ControlError as error:
                bad.append(f"{command} on {daemon.space.label}: {error}")
    return bad


@act("disk full")
def _disk_full(scene: Scene) -> list[str]:
    """Both nodes' files are on it; a hand-over then writes the track files and the logs."""
    stand = scene.stand
    ballast = stand.home / "ballast"
    try:
        with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as out:
            while True:
                out.write(bytes(1 << 20))
        with contextlib.suppress(OSError), open(ballast, "ab", buffering=0) as out:
            while True:
                out.write(bytes(4096))
        node = stand.nodes[scene.active]
        node.stop()
        node.start()
        lost = scene.moved()
        scene.pause("for_s")
    finally:
        ballast.unlink()
    return lost


@act("no inodes")
def _no_inodes(scene: Scene) -> list[str]:
    """No file can be made; those that are there can be written."""
    stand = scene.stand
    ballast = stand.home / "ballast"
    ballast.mkdir()
    try:
        for number in range(2 * DISK_INODES):
            try:
                (ballast / str(number)).touch()
            except OSError as error:
                if error.errno == errno.ENOSPC:
                    break
                raise
        else:
            raise Trouble("the disk has more inodes than it was given")
        stand.port(scene.active, "eth0", False)
        try:
            lost = scene.moved()
            scene.pause("for_s")
        finally:
            stand.port(scene.active, "eth0", True)
    finally:
        shutil.rmtree(ballast)
    return lost


@act("other rules")
def _other_rules(scene: Scene) -> list[str]:
    """The active node goes on, the backup may not take over."""
    stand = scene.stand
    stand.rules(scene.backup, "cd" * 32)
    stand.says(scene.backup, "backup, NOT READY", "ruleset differs")
    stand.says(scene.active, "active, DEGRADED", "ruleset differs")
    wrong = [] if scene.backup.gate == "1" else [f"the gate of a backup with other rules is {scene.backup.gate}"]
    scene.pause("for_s")
    stand.rules(scene.backup)
    return wrong


# --- the sync link ---------------------------------------------------------------------------------------------------


@act("sync link cut")
def _link_cut(scene: Scene) -> None:
    stand, how = scene.stand, scene.values["how"]
    if how == "middle":
        stand.weather(deaf=["fw1", "fw2"])
    else:
        scene.node(how).space.ip("link", "set", "eth2", "down")
    scene.pause("for_s")
    if scene.values["for_s"] > SILENCE_S:
        stand.says(scene.active, "active, DEGRADED", "silent")
        stand.says(scene.backup, "backup, DEGRADED", "silent")
    if stand.nodes[scene.backup].addresses() & set(stand.virtual_ips):
        raise Trouble("the virtual IPs moved because of the sync link")
    if how == "middle":
        stand.weather()
    else:
        stand.lab.plug_sync(scene.node(how).space)


@act("sync link one way")
def _one_way(scene: Scene) -> None:
    deaf = scene.node(scene.values["deaf"])
    scene.stand.weather(deaf=[deaf.space.label])
    scene.pause("for_s")
    if scene.values["for_s"] > SILENCE_S:
        scene.stand.says(deaf, "DEGRADED", "silent")
    scene.stand.weather()


@act("half of the sync link lost")
def _half_lost(scene: Scene) -> None:
    """Signs of life get lost in rows now and then: what the daemons make of that is theirs, what they have is not."""
    stand = scene.stand
    stand.weather(loss=scene.values["loss"])
    stand.inject(scene.active.space, scene.chance, 500, 20)
    scene.pause("for_s")
    stand.weather()


@act("sync link flaps")
def _link_flaps(scene: Scene) -> None:
    for dummy in range(scene.values["times"]):
        scene.stand.weather(deaf=["fw1", "fw2"])
        scene.pause("for_s")
        scene.stand.weather()
        scene.pause("for_s")


@act("small datagrams only")
def _small_datagrams(scene: Scene) -> None:
    """A bulk cannot get through meanwhile, or arrives in smaller datagrams; either way all is well afterwards."""
    scene.stand.weather(frame_bytes=scene.values["frame_bytes"])
    scene.stand.ask(scene.active, "bulk")
    scene.stand.inject(scene.active.space, scene.chance, 500, 20)
    scene.pause("for_s")
    scene.stand.weather()


# --- load and tables -------------------------------------------------------------------------------------------------


@act("flood of flows")
def _flood(scene: Scene) -> None:
    scene.stand.inject(scene.active.space, scene.chance, scene.values["flows"], scene.values["timeout_s"])


@act("events lost")
def _events_lost(scene: Scene) -> list[str]:
    stand, daemon = scene.stand, scene.active
    _reload(stand, daemon, netlink_buffer_bytes=SMALL_BUFFER)
    before = stand.status(daemon)["counters"].get("overruns", 0)
    daemon.send(signal.SIGSTOP)
    stand.inject(daemon.space, scene.chance, scene.values["flows"], scene.values["timeout_s"])
    daemon.send(signal.SIGCONT)
    wait(lambda: stand.status(daemon)["counters"].get("overruns", 0) > before, "the loss to be counted", timeout=30)
    stand.ready()
    _reload(stand, daemon, netlink_buffer_bytes=None)
    return []


@act("short connections")
def _short_connections(scene: Scene) -> None:
    scene.stand.churn(scene.values["per_s"])
    scene.pause("for_s")
    scene.stand.churn()


def _change_replicas(scene: Scene, *how: str) -> None:
    """conntrack(8) with some TCP replicas of the backup."""
    flows = [json.loads(line) for line in scene.stand.ask(scene.backup, "external", format="json")]
    rest = scene.values["port_rest"]
    wanted = [flow for flow in flows if flow["protocol"] == "tcp" and flow["orig"]["sport"] % 5 == rest]
    for flow in wanted[:MOST_CHANGED]:
        ends = flow["orig"]
        where = ("-f", flow["family"], "-p", "tcp", "-s", ends["src"], "-d", ends["dst"])
        ports = ("--sport", str(ends["sport"]), "--dport", str(ends["dport"]))
        scene.backup.space.conntrack(how[0], *where, *ports, *how[1:], check=False)  # it may have ended


@act("holes")
def _holes(scene: Scene) -> None:
    """What is deleted on the backup is made again."""
    _change_replicas(scene, "-D")


@act("wrong marks")
def _wrong_marks(scene: Scene) -> None:
    """Nobody tells the daemon: it has to find them by comparing."""
    if scene.stand.compares:
        _change_replicas(scene, "-U", "--mark", "99")


@act("table flushed")
def _flushed(scene: Scene) -> None:
    scene.backup.space.conntrack("-F")


@act("ghosts")
def _ghosts(scene: Scene) -> None:
    scene.stand.inject(scene.backup.space, scene.chance, scene.values["flows"], 3600)
    scene.stand.tidy(scene.active)


@act("squatters")
def _squatters(scene: Scene) -> None:
    values, stand = scene.values, scene.stand
    stand.inject(scene.backup.space, scene.chance, values["flows"], values["timeout_s"], squat=True)
    stand.inject(scene.active.space, scene.chance, values["flows"], 3 * values["timeout_s"])


# --- what shows that a loss would be seen ----------------------------------------------------------------------------


def unready_take_over(stand: Stand) -> list[str]:
    """The last act of a run: the active node loses its power while the backup has no table.  That rightly loses every
    session, and both nodes have to say so before; what is wrong otherwise."""
    active, backup = stand.ready()
    stand.weather(deaf=["fw1", "fw2"])
    stand.kill(backup)
    backup.space.conntrack("-F")
    stand.start(backup)
    stand.says(backup, "backup, NOT READY")
    stand.says(active, "active, DEGRADED", "silent")
    bad = [] if backup.gate == "2" else [f"the gate of a node that knows nothing is {backup.gate}"]
    stand.dark(active)
    wait(stand.virtual_ips_of(backup), "the node that is not ready to take over")
    lost = [line for line in stand.lost(2.0) if line.startswith("session ")]
    if len(lost) != stand.sessions:
        bad.append(f"the negative control: {len(lost)} of {stand.sessions} sessions were seen to be lost")
    return bad
