# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The lab's machinery: a Docker engine, one image, a few nodes, and the switch that joins them.

The nodes are containers with systemd as PID 1 and *no* Docker network. Their interfaces are veth pairs whose far ends
are ports of bridges in a network namespace of the lab's own, the switch, so that no frame of the lab ever meets the
host's firewall, routes or Docker networks.

What decides is pure (plans, names, digests) and tested without an engine; what acts takes its runner as an argument.
"""

from __future__ import annotations

import hashlib
import io
import ipaddress
import json
import os
import re
import selectors
import shutil
import subprocess
import tarfile
import time
from dataclasses import dataclass
from email.utils import formatdate
from typing import Any, Callable, Iterable, Mapping, NamedTuple, Sequence

STATE_DIRECTORY = "/var/lib/ctsync-lab"
RUN_DIRECTORY = "/run/ctsync-lab"
LABEL_LAB = "ctsync.lab"
LABEL_SPEC = "ctsync.lab.spec"
# The node's boot waits for this file (see roles/lab/files/Dockerfile): interfaces are there before any service starts.
WIRED_MARK = "run/lab-wired"
INTERFACE_NAME_MAX = 15  # IFNAMSIZ - 1, <linux/if.h>
KERNEL_MODULES = ("veth", "bridge", "nf_conntrack", "nf_conntrack_netlink", "nf_nat", "nft_compat", "xt_LOG")

# A new network namespace copies the host's current values (and Docker switches forwarding on in the host): a node
# starts as a plain host whatever the machine below is; systemd-sysctl applies the node's own settings later.
NODE_SYSCTLS_IPV4 = {"net.ipv4.ip_forward": "0"}
NODE_SYSCTLS_IPV6 = {
    "net.ipv6.conf.all.disable_ipv6": "0",
    "net.ipv6.conf.default.disable_ipv6": "0",
    "net.ipv6.conf.all.forwarding": "0",
    "net.ipv6.conf.default.accept_dad": "0",
    "net.ipv6.conf.default.accept_ra": "0",
}


class LabError(Exception):
    """Something the lab needs went wrong; the text names it and, where there is one, the remedy."""


class Result(NamedTuple):
    """What a command said."""

    rc: int
    out: str
    err: str


Run = Callable[..., Result]


def run_command(
    args: Sequence[str],
    *,
    stdin: bytes | None = None,
    timeout: float = 120,
    log: str | None = None,
    env: Mapping[str, str] | None = None,
) -> Result:
    """Run ``args`` and return its end, never raising for a non-zero one.

    ``timeout`` is in seconds; a command that takes longer is killed and reported as rc 124. With ``log`` both streams
    go to the end of that file (so that a person can follow a long step) and ``out`` is its last 2000 characters. A
    missing program is rc 127.
    """
    environment = {**os.environ, "LC_ALL": "C", **(env or {})}
    try:
        if log is None:
            done = subprocess.run(
                list(args), input=stdin, capture_output=True, timeout=timeout, env=environment, check=False
            )
            return Result(
                done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace")
            )
        with open(log, "ab") as stream:
            stream.write(f"\n$ {' '.join(args)}\n".encode())
            stream.flush()
            done = subprocess.run(
                list(args), input=stdin, stdout=stream, stderr=stream, timeout=timeout, env=environment, check=False
            )
        return Result(done.returncode, tail(log), "")
    except FileNotFoundError:
        return Result(127, "", f"{args[0]}: not installed")
    except subprocess.TimeoutExpired:
        return Result(124, "", f"{' '.join(args)}: no end after {timeout:.0f} s")


def start_in_background(command: Sequence[str], log: str) -> None:
    """Start a program that outlives this one; what it says goes to the end of the log."""
    with open(log, "ab") as stream:
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, cwd="/", start_new_session=True
        )


def mount_points(mountinfo: str) -> list[str]:
    """Where something is mounted, out of /proc/self/mountinfo, which has blanks as octal numbers (proc(5))."""
    fields = [line.split()[4] for line in mountinfo.splitlines()]
    return [re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field) for field in fields]


def remove_tree(path: str) -> None:
    """Remove a folder and what is mounted inside it.  A folder that is a mount point itself is emptied, and stays.

    :raises LabError: where something stays besides.
    """
    with open("/proc/self/mountinfo", encoding="utf-8") as stream:
        points = mount_points(stream.read())
    for point in sorted((each for each in points if each.startswith(f"{path}/")), reverse=True):
        must(run_command(["umount", point]), f"{point} is mounted and cannot be removed: umount {point}")
    try:
        if path not in points:
            shutil.rmtree(path)
            return
        for entry in os.scandir(path):
            (shutil.rmtree if entry.is_dir(follow_symlinks=False) else os.unlink)(entry.path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise LabError(f"{path} cannot be removed: {error}") from error


def run_pipe(first: Sequence[str], second: Sequence[str]) -> str:
    """Run ``first | second``; returns what went wrong, empty for nothing."""
    with subprocess.Popen(first, stdout=subprocess.PIPE) as source:
        done = subprocess.run(second, stdin=source.stdout, capture_output=True, check=False)
    if done.returncode == 0 and source.returncode == 0:
        return ""
    return done.stderr.decode(errors="replace").strip() or f"{first[0]} ended with {source.returncode}"


def tail(path: str, characters: int = 2000) -> str:
    """The last ``characters`` of a text file; empty when it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as stream:
            return stream.read()[-characters:]
    except OSError:
        return ""


def must(result: Result, what: str) -> str:
    """The standard output of a command that has to succeed.

    :raises LabError: with ``what``, the exit code and both streams.
    """
    if result.rc != 0:
        raise LabError(
            f"{what} failed (exit code {result.rc}): {(result.err.strip() + ' ' + result.out.strip()).strip()}"
        )
    return result.out


# --- what a node is -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interface:
    """One network card of a node: its name inside, the segment it is plugged into, its addresses with prefix length."""

    name: str
    segment: str
    addresses: tuple[str, ...]


@dataclass(frozen=True)
class Route:
    """A route of a node; ``destination`` is ``default`` or a network, of the gateway's family."""

    destination: str
    gateway: str


@dataclass(frozen=True)
class Node:
    """One machine of the lab, as the inventory describes it."""

    name: str
    interfaces: tuple[Interface, ...] = ()
    routes: tuple[Route, ...] = ()
    hosts: tuple[tuple[str, str], ...] = ()
    volumes: tuple[str, ...] = ()
    files: tuple[tuple[str, str, str, str], ...] = ()  # path, mode, link target, content


def parse_node(data: Mapping[str, Any], read: Callable[[str], str], ipv6: bool = True) -> Node:
    """A node out of module options; addresses are normalised, IPv6 ones left out where the host has no IPv6.

    ``read`` returns the text of a controller's file (option ``files[].src``).

    :raises LabError: when a name is too long for an interface, an address does not parse or a name appears twice.
    """
    name = data["name"]
    interfaces = []
    for item in data.get("interfaces") or ():
        addresses = []
        for text in item.get("addresses") or ():
            try:
                address = ipaddress.ip_interface(text)
            except ValueError as error:
                raise LabError(f"node {name}, interface {item['name']}: {error}") from error
            if "/" not in text:
                raise LabError(f"node {name}, interface {item['name']}: {text} has no prefix length, write {text}/24")
            if address.version == 4 or ipv6:
                addresses.append(address.with_prefixlen)
        interfaces.append(Interface(item["name"], item["segment"], tuple(addresses)))
        for text, kind in ((port_name(name, item["name"]), "port"), (bridge_name(item["segment"]), "bridge")):
            if len(text) > INTERFACE_NAME_MAX:
                raise LabError(f"node {name}: the switch's {kind} would be called {text}, longer than 15 characters")
    names = [interface.name for interface in interfaces]
    if len(set(names)) != len(names):
        raise LabError(f"node {name}: an interface name appears twice in {', '.join(names)}")
    routes = tuple(
        Route(item["destination"], str(ipaddress.ip_address(item["gateway"])))
        for item in data.get("routes") or ()
        if ipv6 or ":" not in item["gateway"]
    )
    files = []
    for item in data.get("files") or ():
        content = read(item["src"]) if item.get("src") else item.get("content") or ""
        files.append((item["path"], item.get("mode") or "0644", item.get("link_to") or "", content))
    return Node(
        name=name,
        interfaces=tuple(interfaces),
        routes=routes,
        hosts=tuple(sorted((data.get("hosts") or {}).items())),
        volumes=tuple(data.get("volumes") or ()),
        files=tuple(files),
    )


def port_name(node: str, interface: str) -> str:
    """The switch's end of a node's cable."""
    return f"{node}-{interface}"


def bridge_name(segment: str) -> str:
    """The bridge in the switch that is a segment."""
    return f"br-{segment}"


def mac_address(prefix: str, node: str, interface: str) -> str:
    """A card keeps its (locally administered) address over power cycles, as real ones do."""
    digest = hashlib.sha256(f"{prefix}{node}/{interface}".encode()).digest()
    return ":".join(f"{byte:02x}" for byte in b"\x02" + digest[:5])


def create_arguments(prefix: str, node: Node, image: str, spec: str, ipv6: bool = True) -> list[str]:
    """The arguments of ``docker create`` for a node: no network, and only the rights that systemd and netlink need.

    ``--add-host NODE:127.0.1.1``: without a network Docker writes no own name to /etc/hosts, and every look-up of it
    would wait 5 s for a name server. ``systempaths=unconfined`` leaves /proc/sys writable.
    """
    arguments = ["--name", prefix + node.name, "--hostname", node.name, "--add-host", f"{node.name}:127.0.1.1"]
    for name, address in node.hosts:
        arguments += ["--add-host", f"{name}:{address}"]
    arguments += ["--network", "none", "--cap-add", "SYS_ADMIN", "--cap-add", "NET_ADMIN"]
    for option in ("seccomp=unconfined", "apparmor=unconfined", "systempaths=unconfined"):
        arguments += ["--security-opt", option]
    arguments += ["--cgroupns", "private", "--tmpfs", "/run", "--tmpfs", "/tmp", "--stop-signal", "SIGRTMIN+3"]
    for key, value in {**NODE_SYSCTLS_IPV4, **(NODE_SYSCTLS_IPV6 if ipv6 else {})}.items():
        arguments += ["--sysctl", f"{key}={value}"]
    for volume in node.volumes:
        arguments += ["--volume", volume]
    return [*arguments, "--label", f"{LABEL_LAB}={prefix}", "--label", f"{LABEL_SPEC}={spec}", image, "/sbin/init"]


def spec_digest(prefix: str, node: Node, image_id: str, ipv6: bool = True) -> str:
    """What the container was made from; another digest means it has to be made anew. The wiring is not part of it."""
    made_from = [create_arguments(prefix, node, image_id, "", ipv6), node.files]
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:16]


def files_archive(files: Iterable[tuple[str, str, str, str]]) -> bytes:
    """A tar archive (owner root, missing folders 0755, ``.ssh`` 0700) of a node's first files, for ``docker cp``."""
    buffer, made = io.BytesIO(), set()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path, mode, link_to, content in files:
            parts = path.strip("/").split("/")
            for depth in range(1, len(parts)):
                folder = "/".join(parts[:depth])
                # Folders of the image keep what they are: only those that the lab itself brings are written.
                if folder not in made and parts[depth - 1].startswith("."):
                    info = tarfile.TarInfo(folder)
                    info.type, info.mode = tarfile.DIRTYPE, 0o700
                    archive.addfile(info)
                made.add(folder)
            info = tarfile.TarInfo("/".join(parts))
            if link_to:
                info.type, info.linkname = tarfile.SYMTYPE, link_to
                archive.addfile(info)
                continue
            data = content.encode()
            info.size, info.mode = len(data), int(mode, 8)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


# --- the wiring -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Link:
    """An interface as the kernel shows it: its index, the name of its bridge (or ""), whether it is up."""

    index: int
    master: str
    up: bool


class Observed(NamedTuple):
    """What is there: ports of the switch, the node's links, addresses per link, and (destination, gateway) routes."""

    ports: Mapping[str, Link]
    links: Mapping[str, Link]
    addresses: Mapping[str, frozenset[str]]
    routes: frozenset[tuple[str, str]]


class Step(NamedTuple):
    """One thing to do to the wiring."""

    action: str  # plug, attach, up, address, route
    target: str
    value: str = ""


def wiring_plan(node: Node, seen: Observed) -> list[Step]:
    """The steps from what is seen to what the node's description says, in order; none when it is already right.

    Addresses that the description does not name (a virtual IP, say) are none of the lab's business and stay.
    """
    steps = []
    for interface in node.interfaces:
        port = seen.ports.get(port_name(node.name, interface.name))
        link = seen.links.get(interface.name)
        whole = port is not None and link is not None
        if not whole:
            steps.append(Step("plug", interface.name, interface.segment))
        elif port is not None and (port.master != bridge_name(interface.segment) or not port.up):
            steps.append(Step("attach", interface.name, interface.segment))
        present = seen.addresses.get(interface.name, frozenset()) if whole else frozenset()
        steps += [Step("address", interface.name, address) for address in interface.addresses if address not in present]
        if not whole or (link is not None and not link.up):
            steps.append(Step("up", interface.name))
    fresh = any(step.action in ("plug", "up") for step in steps)  # routes fall with their interface
    for route in node.routes:
        if fresh or (route_key(route)) not in seen.routes:
            steps.append(Step("route", route_key(route)[0], route.gateway))
    return steps


def route_key(route: Route) -> tuple[str, str]:
    """A route as (network, gateway), ``default`` written out for the gateway's family."""
    version = ipaddress.ip_address(route.gateway).version
    destination = route.destination
    if destination == "default":
        destination = "0.0.0.0/0" if version == 4 else "::/0"
    return str(ipaddress.ip_network(destination)), route.gateway


class Switch:
    """The network namespace with one bridge per segment; ``<prefix>sw``."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.name = prefix + "sw"

    def exists(self) -> bool:
        """Whether the namespace is there."""
        return os.path.exists(f"/run/netns/{self.name}") or os.path.exists(f"/var/run/netns/{self.name}")

    def create(self) -> None:
        """Make the namespace; its bridges speak for nobody and are not filtered."""
        from pyroute2 import netns  # noqa: PLC0415

        netns.create(self.name)
        netns.pushns(self.name)
        try:
            for key in ("net/ipv6/conf/all/disable_ipv6", "net/ipv6/conf/default/disable_ipv6"):
                write_if_present(f"/proc/sys/{key}", "1")
        finally:
            netns.popns()

    def remove(self) -> None:
        """Remove the namespace with all that is in it."""
        from pyroute2 import netns  # noqa: PLC0415

        netns.remove(self.name)

    def open(self) -> Any:
        """A netlink socket in the switch; close it after use."""
        from pyroute2 import NetNS  # noqa: PLC0415

        return NetNS(self.name, flags=0)

    def missing_bridges(self, segments: Iterable[str]) -> list[str]:
        """The segments that have no bridge yet."""
        if not self.exists():
            return sorted(set(segments))
        with self.open() as kernel:
            links = links_of(kernel)
        return sorted(segment for segment in set(segments) if bridge_name(segment) not in links)

    def add_bridges(self, segments: Iterable[str]) -> None:
        """Make bridges that forward at once, flood multicast like a plain switch, and never call iptables."""
        from pyroute2 import netns  # noqa: PLC0415

        with self.open() as kernel:
            for segment in segments:
                name = bridge_name(segment)
                kernel.link("add", ifname=name, kind="bridge", br_forward_delay=0, br_mcast_snooping=0)
                kernel.link("set", index=index_of(kernel, name), state="up")
        netns.pushns(self.name)
        try:
            for table in ("iptables", "ip6tables", "arptables"):
                write_if_present(f"/proc/sys/net/bridge/bridge-nf-call-{table}", "0")
        finally:
            netns.popns()

    def observe(self, node: Node, pid: int) -> Observed:
        """What the kernel has of a running node's wiring."""
        from pyroute2 import NetNS  # noqa: PLC0415

        with self.open() as kernel:
            ports = links_of(kernel)
        with NetNS(f"/proc/{pid}/ns/net", flags=0) as kernel:
            links = links_of(kernel)
            names = {link.index: name for name, link in links.items()}
            addresses: dict[str, set[str]] = {}
            for message in kernel.get_addr():
                text = f"{message.get_attr('IFA_ADDRESS')}/{message['prefixlen']}"
                addresses.setdefault(names.get(message["index"], ""), set()).add(
                    ipaddress.ip_interface(text).with_prefixlen
                )
            routes = set()
            for message in kernel.get_routes():
                gateway = message.get_attr("RTA_GATEWAY")
                if gateway:
                    zero = "0.0.0.0" if message["family"] == 2 else "::"
                    network = f"{message.get_attr('RTA_DST') or zero}/{message['dst_len']}"
                    routes.add((str(ipaddress.ip_network(network)), str(ipaddress.ip_address(gateway))))
        return Observed(
            ports, links, {name: frozenset(values) for name, values in addresses.items()}, frozenset(routes)
        )

    def apply(self, node: Node, pid: int, steps: Sequence[Step]) -> None:
        """Do the steps of a plan on the node whose first process is ``pid``."""
        from pyroute2 import NetNS  # noqa: PLC0415

        inside = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
        try:
            with self.open() as switch, NetNS(f"/proc/{pid}/ns/net", flags=0) as kernel:
                kernel.link("set", index=1, state="up")  # lo is always 1
                for step in steps:
                    if step.action in ("plug", "attach"):
                        port = port_name(node.name, step.target)
                        if step.action == "plug":
                            self._plug(switch, kernel, node, step.target, inside)
                        switch.link(
                            "set",
                            index=index_of(switch, port),
                            master=index_of(switch, bridge_name(step.value)),
                            state="up",
                        )
                    elif step.action == "up":
                        kernel.link("set", index=index_of(kernel, step.target), state="up")
                    elif step.action == "address":
                        add_address(kernel, index_of(kernel, step.target), step.value)
                    else:
                        family = 2 if ipaddress.ip_address(step.value).version == 4 else 10
                        kernel.route("replace", dst=step.target, gateway=step.value, family=family)
        finally:
            os.close(inside)

    def _plug(self, switch: Any, kernel: Any, node: Node, interface: str, inside: int) -> None:
        """Lay a new cable between the switch and the node, in place of what is left of an old one."""
        for side, name in ((switch, port_name(node.name, interface)), (kernel, interface)):
            for index in side.link_lookup(ifname=name):
                side.link("del", index=index)
        switch.link(
            "add",
            ifname=port_name(node.name, interface),
            kind="veth",
            peer={"ifname": interface, "net_ns_fd": inside, "address": mac_address(self.prefix, node.name, interface)},
        )

    def cut(self, names: Iterable[str]) -> tuple[list[str], float]:
        """Take every port of the nodes off its bridge in one write to the kernel; the carrier stays.

        A power cut, seen from the segments: nothing more comes from the node, and nothing tells anyone. (With the
        carrier gone, or one port at a time, keepalived would say goodbye over another port.) Returns the ports'
        names and the moment (seconds since 1970) at which the kernel had done it.
        """
        from pyroute2 import IPBatch  # noqa: PLC0415

        with self.open() as kernel:
            ports = {name: link for name, link in links_of(kernel).items() if name.rsplit("-", 1)[0] in set(names)}
            batch = IPBatch()
            for link in ports.values():
                batch.link("set", index=link.index, master=0)
            if ports:
                kernel.sendto(batch.batch, (0, 0))
            moment = time.time()
        with self.open() as kernel:  # another socket: the first one has the batch's answers in its queue
            left = [name for name, link in links_of(kernel).items() if name in ports and link.master]
        if left:
            raise LabError(f"still on their bridge after the cut: {', '.join(left)}")
        return sorted(ports), moment

    def unplug(self, ports: Iterable[str]) -> None:
        """Remove ports, and with each the interface at its other end."""
        with self.open() as kernel:
            for port in ports:
                for index in kernel.link_lookup(ifname=port):
                    kernel.link("del", index=index)


def links_of(kernel: Any) -> dict[str, Link]:
    """The interfaces of a namespace by name."""
    messages = list(kernel.get_links())
    names = {message["index"]: message.get_attr("IFLA_IFNAME") for message in messages}
    return {
        names[message["index"]]: Link(
            message["index"], names.get(message.get_attr("IFLA_MASTER"), ""), bool(message["flags"] & 1)
        )
        for message in messages
    }


def index_of(kernel: Any, name: str) -> int:
    """The index of an interface.

    :raises LabError: when there is none of that name.
    """
    found = kernel.link_lookup(ifname=name)
    if not found:
        raise LabError(f"no interface {name} in {getattr(kernel, 'netns', 'the namespace')}")
    return int(found[0])


def add_address(kernel: Any, index: int, text: str) -> None:
    """Add an address; an IPv6 one is used at once (no duplicate address detection: IFA_F_NODAD, <linux/if_addr.h>)."""
    address = ipaddress.ip_interface(text)
    extra = {"IFA_FLAGS": 0x02} if address.version == 6 else {}
    kernel.addr("add", index=index, address=str(address.ip), prefixlen=address.network.prefixlen, **extra)


def write_if_present(path: str, text: str) -> None:
    """Write a kernel setting that not every kernel has."""
    if os.path.exists(path):
        with open(path, "w", encoding="ascii") as stream:
            stream.write(text)


# --- the engine -----------------------------------------------------------------------------------------------------


def engine_plan(answers: bool, installed: bool, debian: bool, systemd: bool) -> list[str]:
    """What it takes to have a Docker engine: nothing when one answers (it is never touched), or install and start.

    :raises LabError: where no engine answers and none can be installed.
    """
    if answers:
        return []
    if not installed and not debian:
        raise LabError(
            "no Docker engine answers, and this is no Debian system to install one on: install and start Docker"
        )
    return [*([] if installed else ["install"]), "start-systemd" if systemd else "start-background"]


# No bridge and no rules: the nodes need none, and so the host's firewall and forwarding stay as they are.
DOCKERD_OPTIONS = ("--bridge=none", "--iptables=false", "--ip6tables=false", "--ip-forward=false", "--ip-masq=false")


def dockerd_arguments() -> list[str]:
    """The command line of a daemon of the lab's own; its data is apart from any other engine's."""
    return [
        "dockerd",
        *DOCKERD_OPTIONS,
        f"--data-root={STATE_DIRECTORY}/docker",
        f"--pidfile={RUN_DIRECTORY}/dockerd.pid",
    ]


def background_pid(name: str = "dockerd") -> int | None:
    """The daemon that the lab started in the background, when it still runs (and is that program, not a reused id)."""
    try:
        with open(f"{RUN_DIRECTORY}/dockerd.pid", encoding="ascii") as stream:
            pid = int(stream.read())
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stream:
            command, state = stream.read().split("(", 1)[1].rsplit(")", 1)  # proc_pid_stat(5)
        return pid if command == name and state.split()[0] != "Z" else None
    except (OSError, ValueError, IndexError):
        return None


def read_record() -> dict[str, Any]:
    """What the lab did to this machine: ``packages`` it installed, and how it ``started`` an engine."""
    try:
        with open(f"{STATE_DIRECTORY}/record.json", encoding="utf-8") as stream:
            record = json.load(stream)
    except (OSError, ValueError):
        record = {}
    packages = {*record.get("packages", []), *_lines_of(f"{STATE_DIRECTORY}/packages")}
    return {
        "packages": sorted(packages),
        "started": record.get("started", ""),
        "made": list(record.get("made", [])),  # by an engine in the background
    }


def _lines_of(path: str) -> list[str]:
    """The words of a text file, one a line; none when there is no such file (tools/need.sh writes it)."""
    try:
        with open(path, encoding="utf-8") as stream:
            return stream.read().split()
    except OSError:
        return []


def write_record(record: Mapping[str, Any]) -> None:
    """Keep the record for the day the lab is taken down."""
    os.makedirs(STATE_DIRECTORY, mode=0o755, exist_ok=True)
    with open(f"{STATE_DIRECTORY}/record.json.new", "w", encoding="utf-8") as stream:
        json.dump(dict(record), stream)
    os.replace(f"{STATE_DIRECTORY}/record.json.new", f"{STATE_DIRECTORY}/record.json")


def install_packages(run: Run, names: Sequence[str], log: str | None = None) -> list[str]:
    """Install those of the Debian packages that are missing; returns them, and writes them into the record.

    :raises LabError: with apt's last words.
    """
    missing = []
    for name in names:
        shown = run(["dpkg-query", "-W", "-f", "${Status}", name])
        if shown.rc != 0 or "install ok installed" not in shown.out:
            missing.append(name)
    if not missing:
        return []
    env = {"DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "-y", "--no-install-recommends", *missing]
    must(run(["apt-get", "update"], timeout=300, log=log, env=env), "apt-get update")
    must(run(install, timeout=900, log=log, env=env), f"apt-get install {' '.join(missing)}")
    record = read_record()
    record["packages"] = sorted({*record["packages"], *missing})
    write_record(record)
    return missing


# --- the image ------------------------------------------------------------------------------------------------------


def base_sources(mode: str, exists: bool, cached: bool) -> list[str]:
    """Where to look for the base image, in order: what is here already, then the registry, then Debian's packages."""
    if exists:
        return ["existing"]
    order = ["cache"] if cached and mode != "registry" else []
    if mode != "bootstrap":
        order.append("registry")
    if mode != "registry":
        order.append("bootstrap")
    return order


def node_tag(name: str, suite: str, dockerfile: str) -> str:
    """The node image's name and tag: a change of its recipe is another image."""
    return f"{name}:{suite}-{hashlib.sha256(f'{suite}{chr(10)}{dockerfile}'.encode()).hexdigest()[:12]}"


def apt_lines(targets: str, suite: str) -> list[str]:
    """Sources for ``suite`` from the mirrors that this Debian machine itself uses; none when it does not say.

    ``targets`` has lines ``SITE|ORIGIN|COMPONENT|CODENAME`` of ``apt-get indextargets``; others' sources are left out.
    """
    sites: dict[str, str] = {}
    for line in targets.splitlines():
        fields = line.strip().split("|")
        if len(fields) != 4 or fields[1] != "Debian" or fields[2] != "main":
            continue
        site, codename = fields[0].rstrip("/"), fields[3]
        sites.setdefault("security" if codename.endswith("-security") or "security" in site else "main", site)
    if "main" not in sites:
        return []
    lines = [f"deb {sites['main']} {suite} main", f"deb {sites['main']} {suite}-updates main"]
    if "security" in sites:
        lines.append(f"deb {sites['security']} {suite}-security main")
    return lines


def pull(image: str, log: str, first_word: float = 8, end: float = 300) -> bool:
    """Try to have an image from its registry; gives up when the registry says nothing for ``first_word`` seconds.

    ``end`` (seconds) bounds the whole. False when there is no such thing to be had from here.
    """
    started, spoke = time.monotonic(), False
    with open(log, "ab") as stream:
        stream.write(f"\n$ docker pull {image}\n".encode())
        child = subprocess.Popen(["docker", "pull", image], stdout=subprocess.PIPE, stderr=stream)
        output = child.stdout
        if output is None:
            raise LabError("docker pull: no pipe")
        with selectors.DefaultSelector() as selector:
            selector.register(output, selectors.EVENT_READ)
            while True:
                left = started + (end if spoke else first_word) - time.monotonic()
                if left <= 0 or not selector.select(left):
                    child.kill()
                    stream.write(b"given up: no answer in time\n")
                    break
                data = os.read(output.fileno(), 65536)
                if not data:
                    break
                spoke = True
                stream.write(data)
        output.close()
        return child.wait() == 0


# --- the package cache ----------------------------------------------------------------------------------------------


def packages_index(files: Mapping[str, tuple[str, int, str]]) -> str:
    """The ``Packages`` file of a flat repository.

    ``files`` maps a file name to its control paragraph, its size in bytes and its SHA-256 (deb-control(5),
    "Repository format" of the Debian wiki).
    """
    paragraphs = []
    for name in sorted(files):
        control, size, digest = files[name]
        paragraphs.append(f"{control.strip()}\nFilename: ./{name}\nSize: {size}\nSHA256: {digest}\n")
    return "\n".join(paragraphs)


def release_file(index: str) -> str:
    """The ``Release`` file of the flat repository with this ``Packages`` file: apt asks for nothing else then."""
    data = index.encode()
    return (
        f"Date: {formatdate(usegmt=True)}\n"
        "Origin: ctsync lab\nLabel: ctsync lab\nDescription: what the lab's firewalls may install\n"
        f"SHA256:\n {hashlib.sha256(data).hexdigest()} {len(data)} Packages\n"
    )


def split_controls(text: str) -> dict[str, str]:
    """Control paragraphs by file name, from the output of the download script (``>>> NAME`` before each)."""
    found = {}
    for part in re.split(r"^>>> ", text, flags=re.MULTILINE)[1:]:
        name, _newline, control = part.partition("\n")
        found[name.strip()] = control.strip()
    return found


# --- Docker ---------------------------------------------------------------------------------------------------------


class Container(NamedTuple):
    """A container as the engine shows it."""

    name: str
    pid: int  # 0 when it does not run
    running: bool
    spec: str
    lab: str


class Docker:
    """The few engine commands that the lab needs, by the command line client (the API lacks ``systempaths``)."""

    def __init__(self, run: Run = run_command) -> None:
        self.run = run

    def answers(self) -> bool:
        """Whether an engine answers."""
        return self.run(["docker", "version", "--format", "{{.Server.Version}}"], timeout=30).rc == 0

    def image_id(self, image: str) -> str:
        """The id of a local image, "" when there is none."""
        shown = self.run(["docker", "image", "inspect", "--format", "{{.Id}}", image])
        return shown.out.strip() if shown.rc == 0 else ""

    def containers(self, names: Sequence[str]) -> dict[str, Container]:
        """Those of the named containers that exist."""
        if not names:
            return {}
        shown = self.run(["docker", "container", "inspect", *names])
        try:
            data = json.loads(shown.out or "[]")
        except ValueError as error:
            raise LabError(f"docker inspect answers no JSON: {shown.err.strip() or shown.out[:200]}") from error
        missing = "no such container"
        if shown.rc != 0 and any(missing not in line.lower() for line in shown.err.splitlines() if line.strip()):
            raise LabError(f"docker inspect: {shown.err.strip()}")
        found = {}
        for item in data:
            labels = item["Config"].get("Labels") or {}
            found[item["Name"].lstrip("/")] = Container(
                item["Name"].lstrip("/"),
                item["State"]["Pid"],
                item["State"]["Running"],
                labels.get(LABEL_SPEC, ""),
                labels.get(LABEL_LAB, ""),
            )
        return found

    def names_of(self, prefix: str) -> list[str]:
        """The containers of a lab, running or not."""
        shown = must(
            self.run(["docker", "ps", "--all", "--filter", f"label={LABEL_LAB}={prefix}", "--format", "{{.Names}}"]),
            "docker ps",
        )
        return sorted(shown.split())

    def create(self, prefix: str, node: Node, image: str, spec: str, ipv6: bool) -> None:
        """Make a node's container with its files in place, not yet started."""
        must(
            self.run(["docker", "create", *create_arguments(prefix, node, image, spec, ipv6)]),
            f"docker create {node.name}",
        )
        if node.files:
            copy = ["docker", "cp", "-", f"{prefix}{node.name}:/"]
            must(self.run(copy, stdin=files_archive(node.files)), f"docker cp to {node.name}")

    def do(self, *arguments: str) -> str:
        """A docker command that has to succeed; returns its output."""
        return must(self.run(["docker", *arguments]), f"docker {' '.join(arguments)}")

    def wait_booted(self, name: str, timeout: float) -> str:
        """Wait until systemd in a container has started everything; returns ``running`` or ``degraded``.

        :raises LabError: when it has not after ``timeout`` seconds, or the container ended.
        """
        deadline = time.monotonic() + timeout
        while True:
            shown = self.run(["docker", "exec", name, "systemctl", "is-system-running"])
            state = shown.out.strip()
            if state in ("running", "degraded"):
                return state
            container = self.containers([name]).get(name)
            if container is None or not container.running:
                raise LabError(f"{name} ended while booting: {self.run(['docker', 'logs', '--tail', '20', name]).err}")
            if time.monotonic() > deadline:
                jobs = self.run(["docker", "exec", name, "systemctl", "list-jobs", "--no-legend"]).out.strip()
                raise LabError(
                    f"{name} is {state or 'not up'} after {timeout:.0f} s; waiting for: {jobs or 'unknown'}. Look what"
                    f" it does: docker exec {name} journalctl -b -n 50 (or docker logs {name}). On a slow machine give"
                    " it more time: make lab-up ARGS='-e lab_boot_timeout=300'; to begin afresh: make lab-stop"
                )
            time.sleep(0.1)

    def failed_units(self, name: str) -> list[str]:
        """The units that did not start in a container."""
        shown = self.run(["docker", "exec", name, "systemctl", "--failed", "--plain", "--no-legend"])
        return [line.split()[0] for line in shown.out.splitlines() if line.strip()]
