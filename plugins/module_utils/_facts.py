# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What can be seen of a firewall of the pair, for the module ha_facts.

This module is private to the collection. It asks the kernel, keepalived and the daemon, and changes nothing. Commands
are run through a function like ``AnsibleModule.run_command``: a list in, (rc, stdout, stderr) out.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import socket
import stat
import time
from typing import Any, Callable, Dict, Iterable, List, Mapping, NamedTuple, Optional, Sequence, Set, Tuple

from . import _ctsyncd_files, _keepalived, _preflight, _systemd
from .ctsyncd import netlink, render
from .ctsyncd.errors import CtsyncError

Runner = Callable[..., Tuple[int, str, str]]

KEEPALIVED_PID = "/run/keepalived.pid"
KEEPALIVED_DUMP = "tmp/keepalived.json"  # in keepalived's own root, which may be a private one
DUMP_WAIT_S = 2.0
VRRP_STATES = ("INIT", "BACKUP", "MASTER", "FAULT")  # vrrp.h: VRRP_STATE_*
CONNTRACK_PROBE = "/proc/sys/net/netfilter/nf_conntrack_max"
SYSCTL_FOLDER = "/proc/sys"
# what decides how the two kernels keep the same flow; the nodes of a pair must agree on it
SYSCTLS = (
    "net.ipv4.ip_forward",
    "net.ipv6.conf.all.forwarding",
    "net.netfilter.nf_conntrack_events",
    "net.netfilter.nf_conntrack_generic_timeout",
    "net.netfilter.nf_conntrack_icmp_timeout",
    "net.netfilter.nf_conntrack_max",
    "net.netfilter.nf_conntrack_tcp_be_liberal",
    "net.netfilter.nf_conntrack_tcp_loose",
    "net.netfilter.nf_conntrack_tcp_timeout_close_wait",
    "net.netfilter.nf_conntrack_tcp_timeout_established",
    "net.netfilter.nf_conntrack_timestamp",
    "net.netfilter.nf_conntrack_udp_timeout",
    "net.netfilter.nf_conntrack_udp_timeout_stream",
)
DUMP_ATTEMPTS = 3  # a dump that the kernel interrupted is begun again


class Address(NamedTuple):
    """An address that an interface has."""

    interface: str
    address: str


def read_addresses() -> Set[Address]:
    """All addresses of this network namespace, from the kernel. Raises OSError or CtsyncError."""
    return {
        Address(entry.ifname, socket.inet_ntop(entry.family, entry.address)) for entry in netlink.interface_addresses()
    }


def virtual_ips_held(wanted: Iterable[Any], addresses: Set[Address]) -> List[Dict[str, Any]]:
    """Each virtual IP, and whether its interface has it.

    A virtual IP is a mapping with ``interface`` and ``address``, or an address for any interface; a prefix length
    behind the address is left out. ``interface`` of the result is empty when nobody named one and none has it.
    """
    result = []
    for vip in wanted:
        named = isinstance(vip, Mapping)
        interface = str(vip["interface"]) if named else ""
        address = str(vip["address"] if named else vip).split("/", maxsplit=1)[0]
        with contextlib.suppress(ValueError):
            address = str(ipaddress.ip_address(address))
        if not named:
            interface = min((found.interface for found in addresses if found.address == address), default="")
        held = Address(interface, address) in addresses
        result.append({"interface": interface, "address": address, "held": held})
    return result


def role_of(virtual_ips: Sequence[Mapping[str, Any]]) -> str:
    """``active`` holds all virtual IPs, ``backup`` none; ``unknown`` when some are held or none are known."""
    held = [bool(vip["held"]) for vip in virtual_ips]
    if not held or any(held) != all(held):
        return "unknown"
    return "active" if all(held) else "backup"


def wanted_virtual_ips(daemon_config: str, keepalived_config: str) -> List[Dict[str, str]]:
    """The pair's virtual IPs out of the daemon's configuration, or else keepalived's; empty without either."""
    text = read_text(daemon_config)
    if text:
        try:
            listed = json.loads(text).get("virtual_ips") or []
            return [{"interface": str(vip["interface"]), "address": str(vip["address"])} for vip in listed]
        except (ValueError, KeyError, TypeError, AttributeError):
            pass  # a broken configuration is the daemon's to complain of
    found = []
    for instance in _keepalived.parse_instances(read_text(keepalived_config)):
        for address in instance.virtual_ips:
            found.append({"interface": instance.interface, "address": address.split("/", maxsplit=1)[0]})
    return found


def read_text(path: str) -> str:
    """A file's text; empty when it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as stream:
            return stream.read()
    except OSError:
        return ""


# --- VRRP ---


def process_name(pid: int) -> str:
    """Name of a process; empty when there is none."""
    return read_text(f"/proc/{pid}/comm").strip()


def keepalived_pid(path: str = KEEPALIVED_PID) -> int:
    """Process id of the running keepalived; 0 when it does not run."""
    text = read_text(path).strip()
    if not text.isdigit() or process_name(int(text)) != "keepalived":
        return 0
    return int(text)


def _identity(path: str) -> Optional[Tuple[int, int, int]]:
    """What changes when a file is replaced; ``None`` for anything but a regular file of root's."""
    try:
        found = os.stat(path, follow_symlinks=False)
    except OSError:
        return None
    if not stat.S_ISREG(found.st_mode) or found.st_uid != 0:
        return None
    return (found.st_ino, found.st_mtime_ns, found.st_size)


def keepalived_dump(run: Runner, program: str, pid: int) -> Optional[List[Dict[str, Any]]]:
    """keepalived's own view of its instances; ``None`` if it has no JSON support, or does not answer.

    keepalived(8), SIGFUNC=JSON. The signal would end a keepalived that was built without, so the program on disk is
    asked for its number first, and it must be the one that runs.
    """
    rc, out, dummy = run([program, "--signum=JSON"])
    if rc != 0 or not out.strip().isdigit():
        return None
    try:
        running = os.readlink(f"/proc/{pid}/exe")
        if os.stat(f"/proc/{pid}/exe").st_ino != os.stat(program).st_ino:
            return None  # upgraded since it was started
    except OSError:
        return None
    if running.endswith(" (deleted)"):
        return None
    path = f"/proc/{pid}/root/{KEEPALIVED_DUMP}"
    before = _identity(path)
    try:
        os.kill(pid, int(out))
    except OSError:
        return None
    deadline = time.monotonic() + DUMP_WAIT_S
    while time.monotonic() < deadline:
        if _identity(path) not in (None, before):
            with contextlib.suppress(ValueError):
                dump = json.loads(read_text(path))
                with contextlib.suppress(OSError):
                    os.unlink(path)
                return dump if isinstance(dump, list) else None
        time.sleep(0.02)
    return None


def instances_from_dump(dump: Sequence[Mapping[str, Any]]) -> List[Dict[str, Any]]:
    """The instances of keepalived's dump, in our words."""
    found = []
    for entry in dump:
        data = entry.get("data") or {}
        number = data.get("state")
        known = isinstance(number, int) and 0 <= number < len(VRRP_STATES)
        found.append(
            {
                "name": data.get("iname", ""),
                "interface": data.get("ifp_ifname", ""),
                "router_id": data.get("vrid"),
                "state": VRRP_STATES[number] if known else "UNKNOWN",
                "priority": data.get("base_priority"),
                "effective_priority": data.get("effective_priority"),
                "nopreempt": data.get("nopreempt"),
                "advert_interval": data.get("adver_int"),
                "last_transition": data.get("last_transition"),
                "virtual_ips": [str(vip).split(" ", maxsplit=1)[0] for vip in data.get("vips") or ()],
                "statistics": dict(entry.get("stats") or {}),
            }
        )
    return found


def instances_from_config(text: str, addresses: Set[Address], running: bool) -> List[Dict[str, Any]]:
    """The instances of the configuration, with the state that follows from who has the virtual IPs."""
    found = []
    for instance in _keepalived.parse_instances(text):
        wanted = [{"interface": instance.interface, "address": address} for address in instance.virtual_ips]
        held = [vip["held"] for vip in virtual_ips_held(wanted, addresses)]
        state = "INIT" if not running else "MASTER" if held and all(held) else "BACKUP"
        found.append(
            {
                "name": instance.name,
                "interface": instance.interface,
                "router_id": instance.router_id,
                "state": state,
                "priority": instance.priority,
                "virtual_ips": list(instance.virtual_ips),
            }
        )
    return found


def vrrp_facts(
    run: Runner, program: Optional[str], config: str, pid_file: str, addresses: Set[Address]
) -> Dict[str, Any]:
    """keepalived's instances; ``source`` says who told: keepalived (``dump``) or the kernel (``addresses``)."""
    pid = keepalived_pid(pid_file)
    dump = keepalived_dump(run, program, pid) if program and pid else None
    if dump is not None:
        return {"running": True, "source": "dump", "instances": instances_from_dump(dump)}
    instances = instances_from_config(read_text(config), addresses, bool(pid))
    return {"running": bool(pid), "source": "addresses", "instances": instances}


# --- the daemon ---


def sync_facts(run: Runner, program: str, config: str) -> Dict[str, Any]:
    """The daemon's status object; one with the verdict NOT READY and the reason when there is no daemon to ask."""
    if not os.access(program, os.X_OK):
        return {"verdict": "NOT READY", "reasons": ["the daemon is not installed"], "running": False}
    rc, out, err = run([program, "-C", config, "status", "--json"])
    try:
        status = json.loads(out)
    except ValueError:
        status = None
    if isinstance(status, dict) and "verdict" in status:
        status.setdefault("running", bool(status.get("node")))
        return status
    said = (err.strip() or out.strip() or f"exit code {rc}").splitlines()[0]
    return {"verdict": "NOT READY", "reasons": [f"the daemon does not answer: {said}"], "running": False}


def daemon_flows(
    run: Runner, program: str, config: str, letter: str, limit: int
) -> Tuple[List[Dict[str, Any]], int, str]:
    """Flows of a cache of the daemon (``-i``, ``-e``): at most ``limit``, their number, what went wrong."""
    if not os.access(program, os.X_OK):
        return [], 0, "the daemon is not installed"
    rc, out, err = run([program, "-C", config, letter, "--json"])
    if rc != 0:
        return [], 0, (err.strip() or out.strip() or f"exit code {rc}").splitlines()[0]
    flows: List[Dict[str, Any]] = []
    total = 0
    for line in out.splitlines():
        if not line.strip():
            continue
        total += 1
        if len(flows) < limit:
            try:
                flows.append(json.loads(line))
            except ValueError:
                return flows, total, f"the daemon's answer is not JSON: {line[:80]}"
    return flows, total, ""


def kernel_flows(limit: int) -> Tuple[List[Dict[str, Any]], int, str]:
    """Flows of the kernel's table: at most ``limit`` of them, their number, and what went wrong."""
    problem = ""
    for dummy in range(DUMP_ATTEMPTS):
        flows: List[Dict[str, Any]] = []
        total = 0
        now_ns = time.time_ns()
        try:
            for piece in netlink.dump_flows():
                total += len(piece)
                for flow in piece[: max(0, limit - len(flows))]:
                    age = None if flow.start is None else max(0, (now_ns - flow.start) // 1_000_000_000)
                    flows.append(render.as_dict(flow, age))
        except (OSError, CtsyncError) as error:
            problem = str(error)
            continue
        return flows, total, ""
    return [], 0, problem


def flow_order(flow: Mapping[str, Any]) -> Tuple[Any, ...]:
    """Where a flow stands in a list: by family, protocol, original direction (addresses as numbers) and zone.

    No two flows of a table have the same place, so two lists of the same flows are in the same order.
    """
    side = flow.get("orig") or {}

    def address(key: str) -> Tuple[int, int]:
        try:
            found = ipaddress.ip_address(str(side.get(key)))
        except ValueError:
            return (0, 0)
        return (found.version, int(found))

    numbers = (side.get(key) for key in ("sport", "dport", "type", "code", "id"))
    return (
        str(flow.get("family")),
        flow.get("protonum") or 0,
        address("src"),
        address("dst"),
        *(-1 if number is None else number for number in numbers),
        str(flow.get("zone")),
    )


def flow_facts(run: Runner, program: str, config: str, limit: int) -> Dict[str, Any]:
    """The flows of both caches and of the kernel, how many there are of each, and what could not be read."""
    parts = {
        "internal": daemon_flows(run, program, config, "-i", limit),
        "external": daemon_flows(run, program, config, "-e", limit),
        "kernel": kernel_flows(limit),
    }
    result: Dict[str, Any] = {name: sorted(flows, key=flow_order) for name, (flows, dummy, problem) in parts.items()}
    result["counts"] = {name: total for name, (flows, total, problem) in parts.items()}
    result["truncated"] = [name for name, (flows, total, problem) in parts.items() if total > len(flows)]
    result["errors"] = {name: problem for name, (flows, total, problem) in parts.items() if problem}
    return result


# --- the host ---


def processes_named(name: str) -> List[int]:
    """Processes of that name in this network namespace; those of containers are another host's business."""
    here = os.stat("/proc/self/ns/net")
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or process_name(int(entry)) != name:
            continue
        try:
            there = os.stat(f"/proc/{entry}/ns/net")
        except OSError:
            continue
        if (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino):
            found.append(int(entry))
    return sorted(found)


def unit_facts(run: Runner, systemctl: Optional[str], unit: str) -> Dict[str, bool]:
    """Whether a unit is active and whether it would start at boot."""
    if not systemctl or not _systemd.booted():
        return {"active": False, "enabled": False}
    rc_active, dummy, dummy = run([systemctl, "is-active", "--quiet", unit])
    rc_enabled, out, dummy = run([systemctl, "is-enabled", unit])
    return {"active": rc_active == 0, "enabled": rc_enabled == 0 and out.strip() in ("enabled", "enabled-runtime")}


def sysctl_facts(folder: str = SYSCTL_FOLDER) -> Dict[str, Optional[str]]:
    """What the kernel holds of :data:`SYSCTLS`; ``None`` for a key that it does not have."""
    found: Dict[str, Optional[str]] = {}
    for name in SYSCTLS:
        text = read_text(os.path.join(folder, *name.split("."))).split()
        found[name] = " ".join(text) if text else None
    return found


def key_facts(config: str, folder: str) -> Dict[str, Any]:
    """The daemon's keys by id, each as a fingerprint (empty when its file cannot be read), and the one it sends with.

    ``config`` is the daemon's configuration; without one there is no key. A key never leaves this function.
    """
    try:
        document = json.loads(read_text(config))
        ids = sorted(int(number) for number in document["keys"])
        send = int(document.get("send_key") or ids[0])
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return {"keys": {}, "send_key": None}
    prints = {
        str(number): _preflight.summarize_key(read_text(os.path.join(folder, f"{number}.key")))["fingerprint"]
        for number in ids
    }
    return {"keys": prints, "send_key": send}


def keepalived_version(run: Runner, program: Optional[str]) -> str:
    """Version of the installed keepalived; empty without one."""
    if not program:
        return ""
    dummy, out, err = run([program, "--version"])
    return ".".join(map(str, _keepalived.parse_version(out + err)))


def keepalived_facts(config: str) -> Dict[str, bool]:
    """Whether there is a configuration of keepalived, and whether this collection wrote it."""
    text = read_text(config)
    return {"configured": bool(text), "ours": bool(text) and _keepalived.is_ours(text)}


def host_facts(
    run: Runner,
    systemctl: Optional[str],
    modprobe: Optional[str],
    keepalived: Optional[str] = None,
    *,
    config: str = _ctsyncd_files.CONFIG,
    keepalived_config: str = _keepalived.CONFIG_PATH,
) -> Dict[str, Any]:
    """What the collection needs of a host, and what it has put there before."""
    conntrack = os.path.exists(CONNTRACK_PROBE)
    if not conntrack and modprobe:
        conntrack = run([modprobe, "--dry-run", "--quiet", "nf_conntrack_netlink"])[0] == 0
    return {
        "conntrack": conntrack,
        "conntrackd": {"pids": processes_named("conntrackd"), **unit_facts(run, systemctl, "conntrackd.service")},
        "ctsyncd": key_facts(config, os.path.join(os.path.dirname(config), "keys")),
        "keepalived": {"version": keepalived_version(run, keepalived), **keepalived_facts(keepalived_config)},
        "sysctls": sysctl_facts(),
        "systemd": _systemd.booted(),
        "time": time.time(),
    }
