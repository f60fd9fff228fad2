# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The texts that the daemon's installation consists of: configuration, unit, tmpfiles entry, key files.

Private to this collection.  Pure functions of the module's options.
"""

from __future__ import annotations

import base64
import binascii
import json
from typing import Any, Mapping, Sequence

USER = "ctsyncd"
UNIT = "ctsyncd.service"
LIBRARY = "/usr/lib/ctsyncd"
COMMAND = "/usr/sbin/ctsyncd"
CONFIG_DIRECTORY = "/etc/ctsyncd"
CONFIG = "/etc/ctsyncd/ctsyncd.conf"
KEY_DIRECTORY = "/etc/ctsyncd/keys"
UNIT_FILE = "/etc/systemd/system/ctsyncd.service"
TMPFILES = "/etc/tmpfiles.d/ctsync.conf"
SHARED_DIRECTORY = "/run/ctsync"
TRACK_FILE = "/run/ctsync/not-ready"
NOTIFY_FIFO = "/run/ctsync/notify.fifo"
STATE_DIRECTORY = "/var/lib/ctsyncd"  # the flight recorder's files
CONTROL_SOCKET = "/run/ctsyncd/ctsyncd.sock"
# The oldest systemd on which a sandboxed ExecStartPre= of a unit with LoadCredential= was seen to run
SINCE_CREDENTIALS_BEFORE_START = 252
KEY_BYTES = 32
KEY_REMEDY = "make one with: openssl rand -base64 32"

# Options of the module that go into the configuration as they are
CONFIG_OPTIONS = (
    "node",
    "send_key",
    "mode",
    "ignore_addresses",
    "replicate",
    "compare",
    "udp",
    "hello_interval_ms",
    "dead_after_ms",
    "window_ms",
    "lag_limit_ms",
    "datagram_bytes",
    "netlink_buffer_bytes",
    "park_timeout_s",
    "ruleset_fingerprint",
    "same_conditions",
    "max_expectations",
    "log_level",
)


def check_keys(keys: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is wrong with the pre-shared keys, one sentence each; no sentence holds any part of a key."""
    problems = []
    seen = set()
    for index, entry in enumerate(keys):
        where = f"keys[{index}] (id {entry['id']})"
        if not 1 <= entry["id"] <= 255:
            problems.append(f"{where}: the id is out of range: write a number from 1 to 255")
        if entry["id"] in seen:
            problems.append(f"{where}: the id stands twice: give every key an id of its own")
        seen.add(entry["id"])
        try:
            size = len(base64.b64decode(entry["key"].strip(), validate=True))
        except (binascii.Error, ValueError):
            problems.append(f"{where}: the key is not base64: {KEY_REMEDY}")
            continue
        if size < KEY_BYTES:
            problems.append(f"{where}: the key has {size} bytes, less than {KEY_BYTES}: {KEY_REMEDY}")
    if not keys:
        problems.append(f"keys: is empty: write at least one key, {KEY_REMEDY}")
    return problems


def key_file(key_id: int) -> str:
    return f"{KEY_DIRECTORY}/{key_id}.key"


def render_config(params: Mapping[str, Any]) -> str:
    """``ctsyncd.conf`` from the module's options; options without a value are left to the daemon's defaults."""
    document = {name: params[name] for name in CONFIG_OPTIONS if params.get(name) is not None}
    document["filter"] = {key: value for key, value in (params.get("filter") or {}).items() if value is not None}
    document["peers"] = [
        {key: peer[key] for key in ("node", "address", "addresses") if peer.get(key) is not None}
        for peer in params["peers"]
    ]
    if params.get("link"):
        document["link"] = {key: params["link"][key] for key in ("interface", "address", "port")}
    if params.get("links"):
        document["links"] = [{key: link[key] for key in ("interface", "address", "port")} for link in params["links"]]
    document["virtual_ips"] = [
        # an inventory has the prefix length with the address, the daemon needs the address alone
        {"interface": vip["interface"], "address": vip["address"].split("/")[0]}
        for vip in params["virtual_ips"]
    ]
    document["keys"] = {str(entry["id"]): f"key-{entry['id']}" for entry in params["keys"]}
    return json.dumps(document, indent=2, sort_keys=True) + "\n"


def render_tmpfiles() -> str:
    """tmpfiles.d(5) entry of what keepalived and the daemon share; it outlives a restart of either."""
    return (
        "# Managed by Ansible (ctsync.ha_firewall.ctsyncd)\n"
        "# keepalived watches these by inotify: the directory must not go away while it runs.\n"
        f"d {SHARED_DIRECTORY} 0755 root root -\n"
        f"f {TRACK_FILE} 0644 {USER} {USER} - 1\n"
        f"p {NOTIFY_FIFO} 0640 root {USER} -\n"
    )


def render_unit(key_ids: Sequence[int], peers: Sequence[str], systemd: int = SINCE_CREDENTIALS_BEFORE_START) -> str:
    """The hardened unit.  ``peers`` are the only addresses that the service may exchange packets with.

    ``systemd`` is its major version on the host.
    """
    credentials = "".join(f"LoadCredential=key-{number}:{key_file(number)}\n" for number in sorted(key_ids))
    allowed = " ".join(sorted(peers))
    return _UNIT.format(
        allowed=allowed,
        command=COMMAND,
        config=CONFIG,
        credentials=credentials,
        start=(_START if systemd >= SINCE_CREDENTIALS_BEFORE_START else _START_IN_ONE).format(
            command=COMMAND, config=CONFIG
        ),
        shared=SHARED_DIRECTORY,
        user=USER,
    )


def without_credentials(unit: str) -> str:
    """The unit less the names of its keys."""
    return "".join(line for line in unit.splitlines(True) if not line.startswith("LoadCredential="))


# Why some lines are as they are:
# - Before=keepalived.service: the track file says "not ready" and the FIFO has its reader before VRRP begins; on the
#   way down keepalived hands over first.  Nothing waits for a complete network: the daemon does that by itself.
# - ExecStartPre and ExecStopPost also run after a crash or kill -9: no stale "ready" outlives the daemon.  systemd 247
#   fails an ExecStartPre of such a unit with 226/NAMESPACE, with "+", too (systemd issue 18116): there a shell runs
#   both commands, and becomes the daemon.
# - ExecStartPost: a nice value counts within a session or a control group only (sched(7), autogroup), so any busy
#   program would delay what the daemon tells by tens of milliseconds; a real-time policy counts everywhere.  The lowest
#   priority does, bounded by kernel.sched_rt_runtime_us.  Not CPUSchedulingPolicy=: where the kernel refuses it (a
#   container, CONFIG_RT_GROUP_SCHED) the service would not start; "-" lets it run with its nice value.
# - No PrivateUsers=: capabilities would be those of a child user namespace, and ctnetlink answers EPERM.
# - No ProcSubset=pid: the daemon reads /proc/sys/net/netfilter.
# - LimitCORE=0: a core file would hold the session keys.
_START = """\
ExecStartPre={command} -C {config} gate --not-ready
ExecStart={command} -C {config}"""
_START_IN_ONE = """\
ExecStart=/bin/sh -c '{command} -C {config} gate --not-ready && exec {command} -C {config}'"""
_UNIT = """\
# Managed by Ansible (ctsync.ha_firewall.ctsyncd)
[Unit]
Description=Connection tracking state replication
Documentation=https://github.com/ctsync/ha_firewall
After=network.target
Before=keepalived.service
StartLimitIntervalSec=0

[Service]
Type=notify
NotifyAccess=main
{start}
ExecStartPost=-+/usr/bin/chrt --rr --pid 1 $MAINPID
ExecReload=/bin/kill -HUP $MAINPID
ExecStopPost={command} -C {config} gate --not-ready
Restart=always
RestartSec=1
TimeoutStartSec=30
TimeoutStopSec=10
WatchdogSec=10
SyslogIdentifier=ctsyncd

User={user}
Group={user}
{credentials}RuntimeDirectory=ctsyncd
RuntimeDirectoryMode=0750
StateDirectory=ctsyncd
StateDirectoryMode=0750
ReadWritePaths={shared}
UMask=0077

Nice=-10
OOMScoreAdjust=-900
LimitCORE=0
LimitNOFILE=4096
TasksMax=64

CapabilityBoundingSet=CAP_NET_ADMIN
AmbientCapabilities=CAP_NET_ADMIN
NoNewPrivileges=yes
ProtectSystem=strict
ProtectHome=yes
PrivateTmp=yes
PrivateDevices=yes
DevicePolicy=closed
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectProc=invisible
KeyringMode=private
LockPersonality=yes
MemoryDenyWriteExecute=yes
RemoveIPC=yes
RestrictAddressFamilies=AF_NETLINK AF_INET AF_INET6 AF_UNIX
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources
SystemCallErrorNumber=EPERM
IPAddressDeny=any
IPAddressAllow={allowed}

[Install]
WantedBy=multi-user.target
"""
