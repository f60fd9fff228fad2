#!/usr/bin/python
# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: ctsyncd
short_description: Install, configure and run the state replication daemon ctsyncd
version_added: 0.1.0
description:
  - Installs C(ctsyncd), the daemon that replicates connection tracking states between the firewalls of a pair, out of
    the module's own payload, so that collection and daemon can never be of different versions.
  - Writes its configuration (checked by the new daemon before it replaces the old one), its key files, the runtime
    files that it shares with keepalived, and a hardened systemd unit; then enables and starts it.
  - Restarts the daemon when something that it reads at its start has changed. A restart does not move the virtual IPs.
  - Options that may change while it runs (C(docs/ctsyncd.md) says which) are reloaded instead. When the daemon does not
    say that it uses the new configuration, it is restarted after all.
  - Keys are given to the running daemon without a restart. It refuses those with which it would not understand a living
    peer any more; then the module fails, and everything is as it was.
  - When the new version or configuration does not start, the former one is put back and runs again.
options:
  dead_after_ms:
    description: Silence after which the peer counts as dead, in milliseconds. At least twice O(hello_interval_ms).
    type: int
    default: 1500
  compare:
    description:
      - Compare the tables of both nodes all the time, at most at a hundredth of a core, and repair what differs.
      - With V(false) a difference stays until the next full transfer. C(ctsyncd verify) finds it also then.
    type: bool
    default: true
  datagram_bytes:
    description: Largest UDP payload sent on the sync link, in bytes.
    type: int
    default: 1400
  enabled:
    description: Whether the daemon is started at boot.
    type: bool
    default: true
  filter:
    description:
      - What is replicated, the same on both nodes. A flow must meet every list that is not empty.
      - Flows that are not selected are also never removed from the backup's kernel.
    type: dict
    default: {}
    suboptions:
      addresses:
        description: Networks. The client or the server of the flow is in one of them.
        type: list
        elements: str
        default: []
      marks:
        description: Connection marks. The flow has one of them. No mark is mark 0.
        type: list
        elements: dict
        default: []
        suboptions:
          mask:
            description: Which bits of the mark count.
            type: int
            default: 4294967295
          value:
            description: The mark's bits under the mask.
            type: int
            required: true
      protocols:
        description: Protocols, by name (such as V(tcp), V(udp), V(icmp), V(sctp), V(gre)) or IANA number.
        type: list
        elements: str
        default: []
      tcp_states:
        description: TCP states. A flow that leaves them is removed from the peer.
        type: list
        elements: str
        choices: [ESTABLISHED, FIN_WAIT, CLOSE_WAIT, LAST_ACK, TIME_WAIT, CLOSE]
        default: []
      zones:
        description: Conntrack zones. No zone is zone 0.
        type: list
        elements: int
        default: []
  hello_interval_ms:
    description: Time between two signs of life on an idle link, in milliseconds.
    type: int
    default: 500
  ignore_addresses:
    description:
      - Networks whose flows are not replicated, besides loopback, all addresses of the node itself, VRRP and the sync
        link's own traffic, which are always ignored.
    type: list
    elements: str
    default: []
  interpreter:
    description: Python interpreter that runs the daemon, version 3.9 or newer, with the library C(cryptography).
    type: path
    default: /usr/bin/python3
  keys:
    description:
      - The pre-shared keys that authenticate and encrypt the sync link, the same on both nodes.
      - Key files of ids that are not listed are removed. To rotate a key without a gap, list both for a while.
        At most 8.
      - Required with O(state=present).
    type: list
    elements: dict
    suboptions:
      id:
        description: Number of the key, from 1 to 255.
        type: int
        required: true
      key:
        description: Base64 of at least 32 random bytes, as C(openssl rand -base64 32) prints it.
        type: str
        required: true
  lag_limit_ms:
    description:
      - Age, in milliseconds, of the oldest change that the peer has not acknowledged from which on the active node says
        that it is degraded.
    type: int
    default: 2000
  link:
    description: This node's end of the sync link. Either this or O(links) is required with O(state=present).
    type: dict
    suboptions:
      address:
        description: Own address on the sync link.
        type: str
        required: true
      interface:
        description: Interface of the sync link.
        type: str
        required: true
      port:
        description: UDP port, the same on both nodes.
        type: int
        default: 3781
  links:
    description:
      - This node's ends of several sync links, in the order of preference, the same on both nodes.
      - The first one that works carries the replication; another one takes over without loss where it fails.
    type: list
    elements: dict
    suboptions:
      address:
        description: Own address on this sync link.
        type: str
        required: true
      interface:
        description: Interface of this sync link. Each link has its own.
        type: str
        required: true
      port:
        description: UDP port, the same on both nodes.
        type: int
        default: 3781
  log_level:
    description: Least severity that is logged.
    type: str
    choices: [debug, info, warning, error]
    default: info
  max_expectations:
    description: Expectations of helpers (FTP, SIP) that are replicated at most. V(0) switches that off.
    type: int
    default: 4096
  mode:
    description:
      - With V(hot-standby) the backup writes each replica into its kernel at once.
      - With V(external-cache) it keeps replicas to itself until they are committed at take-over.
    type: str
    choices: [hot-standby, external-cache]
    default: hot-standby
  netlink_buffer_bytes:
    description:
      - Receive buffer for the kernel's events, in bytes.
      - V(0) makes it for this host, with room for an event of each flow that its table may hold (O(table_size)), of at
        most a 32nd of its memory, from 8 to 256 MiB. It takes memory while events wait, and only then.
    type: int
    default: 0
  node:
    description: Name of this node, as the peer knows it. Required with O(state=present).
    type: str
  park_timeout_s:
    description: Kernel timeout of a replica while the peer lives, in seconds. True timers return at take-over.
    type: int
    default: 86400
  peers:
    description: The other nodes. Required with O(state=present).
    type: list
    elements: dict
    suboptions:
      address:
        description: Address of the peer on the sync link, with O(link).
        type: str
      addresses:
        description: Addresses of the peer on the sync links, in the order of O(links).
        type: list
        elements: str
      node:
        description: Name of the peer.
        type: str
        required: true
  remove_user:
    description: With O(state=absent), also remove the system user and group C(ctsyncd).
    type: bool
    default: false
  replicate:
    description:
      - V(false) switches replication off, for a negative test. The daemon runs and says that it is not ready.
    type: bool
    default: true
  ruleset_fingerprint:
    description:
      - File with the fingerprint of the ruleset, which the M(ctsync.ha_firewall.ruleset) module and its watch write.
        The nodes compare theirs, see O(same_conditions).
    type: path
    default: /run/ctsync/ruleset.fingerprint
  running:
    description: Whether the daemon runs.
    type: bool
    default: true
  same_conditions:
    description:
      - What must be the same on both nodes. While it is not, the backup is NOT READY and the active node DEGRADED; the
        reason names what differs.
      - V(ruleset) is the fingerprint in O(ruleset_fingerprint). V(limits) are C(nf_conntrack_max),
        C(nf_conntrack_expect_max) and how strict the TCP tracker is. V(timeouts) are the timeouts of all protocols.
    type: list
    elements: str
    choices: [ruleset, limits, timeouts]
    default: [ruleset, limits, timeouts]
  send_key:
    description: Id of the key to send with. May be left out when there is only one.
    type: int
  state:
    description:
      - V(present) installs and configures the daemon.
      - V(absent) stops it and removes everything that this module installs. Remove keepalived first, or at least its
        use of C(/run/ctsync).
    type: str
    choices: [absent, present]
    default: present
  table_size:
    description:
      - Flows that the kernel's table may hold, for O(netlink_buffer_bytes=0). V(0) is what the kernel says
        (C(net.netfilter.nf_conntrack_max)); give it when that is yet to be set.
    type: int
    default: 0
  udp:
    description:
      - Which flows without a state machine (UDP, ICMP and others) are replicated, those with a reply or all.
    type: str
    choices: [replied, all]
    default: replied
  virtual_ips:
    description:
      - The virtual IPs that VRRP moves. The node that holds them all is the active one.
      - Required with O(state=present).
    type: list
    elements: dict
    suboptions:
      address:
        description: The virtual IP. A prefix length behind it is ignored.
        type: str
        required: true
      interface:
        description: Interface that carries the virtual IP.
        type: str
        required: true
  window_ms:
    description: >-
      Longest time that changes are gathered before they are sent, in milliseconds (0 to 50). A new TCP connection among
      very many short ones may wait twice as long.
    type: int
    default: 20
notes:
  - The keys never appear in results, diffs or messages. Keep them in Ansible Vault.
  - Runtime files are made by C(systemd-tmpfiles) in C(/run/ctsync), which outlives the daemon and keepalived.
requirements:
  - systemd 247 or newer as the running init
  - Python 3.9 or newer with C(cryptography) for the daemon (C(python3-cryptography) of the distribution)
seealso:
  - module: ctsync.ha_firewall.ha_facts
  - module: ctsync.ha_firewall.keepalived
extends_documentation_fragment:
  - ctsync.ha_firewall.attributes
author:
  - The ctsync authors (@ctsync)
"""

EXAMPLES = r"""
- name: Replicate connection states to the other firewall
  ctsync.ha_firewall.ctsyncd:
    node: fw1
    peers:
      - {node: fw2, address: 192.168.100.2}
    link:
      interface: eth2
      address: 192.168.100.1
    virtual_ips:
      - {interface: eth1, address: 192.168.0.100}
      - {interface: eth0, address: 192.168.1.100}
    keys:
      - {id: 1, key: "{{ vault_sync_key }}"}

- name: Replicate over a cable, and over the inside network where the cable fails
  ctsync.ha_firewall.ctsyncd:
    node: fw1
    peers:
      - {node: fw2, addresses: [192.168.100.2, 192.168.0.2]}
    links:
      - {interface: eth2, address: 192.168.100.1}
      - {interface: eth1, address: 192.168.0.1}
    virtual_ips:
      - {interface: eth1, address: 192.168.0.100}
      - {interface: eth0, address: 192.168.1.100}
    keys:
      - {id: 1, key: "{{ vault_sync_key }}"}

- name: Rotate the key, first step on both nodes (both keys are accepted, the old one is sent)
  ctsync.ha_firewall.ctsyncd:
    node: fw1
    peers:
      - {node: fw2, address: 192.168.100.2}
    link:
      interface: eth2
      address: 192.168.100.1
    virtual_ips:
      - {interface: eth1, address: 192.168.0.100}
      - {interface: eth0, address: 192.168.1.100}
    keys:
      - {id: 1, key: "{{ vault_sync_key }}"}
      - {id: 2, key: "{{ vault_sync_key_new }}"}
    send_key: 1

- name: Remove the daemon
  ctsync.ha_firewall.ctsyncd:
    state: absent
    remove_user: true
"""

RETURN = r"""
action:
  description: What was done to the service, or would be done in check mode.
  returned: always
  type: str
  choices: [none, started, reloaded, rekeyed, restarted, stopped]
  sample: restarted
changes:
  description: What was changed, or would be in check mode, in the order of the work.
  returned: always
  type: list
  elements: str
  sample: [/etc/ctsyncd/ctsyncd.conf]
config:
  description: The daemon's configuration. Keys are named, never shown.
  returned: when O(state=present)
  type: dict
  sample: {node: fw1, keys: {"1": key-1}}
digest:
  description: SHA-256 over the names and contents of the daemon's files and its first line.
  returned: when O(state=present)
  type: str
  sample: 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08
program:
  description: The installed file that C(/usr/sbin/ctsyncd) leads to.
  returned: when O(state=present)
  type: str
  sample: /usr/lib/ctsyncd/ctsyncd-9f86d081884c.pyz
rolled_back:
  description: Whether the former version and configuration were put back after a failure.
  returned: on failure, when something had been changed
  type: bool
  sample: true
version:
  description: Version of the daemon.
  returned: when O(state=present)
  type: str
  sample: 0.1.0
"""

import contextlib
import functools
import grp
import hashlib
import json
import os
import pwd
import stat
import tempfile
import time
from typing import TYPE_CHECKING, Any, Callable, NoReturn, Optional

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.ctsync.ha_firewall.plugins.module_utils import _buffers, _files, _systemd, _zipapp
from ansible_collections.ctsync.ha_firewall.plugins.module_utils import _ctsyncd_files as layout
from ansible_collections.ctsync.ha_firewall.plugins.module_utils import ctsyncd as daemon
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import config as daemon_config
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.errors import ConfigError

if TYPE_CHECKING:
    # Ansible reads this line to find the daemon's files and ships them; Python never executes it.
    from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import __main__  # noqa: F401

MINIMUM_SYSTEMD = 247  # LoadCredential=
MINIMUM_PYTHON = (3, 9)
RESTART_PENDING = "/run/ctsyncd.restart-pending"  # files are newer than the running daemon, even after a crash of ours
KEYS_PENDING = b"keys\n"  # in it: the running daemon lacks nothing but its keys
RELOAD_TIMEOUT_S = 5.0
REQUIRED = ("node", "peers", "virtual_ips", "keys")
PROBE = """\
import json, sys
found = {"python": sys.version_info[:3], "cryptography": ""}
try:
    import cryptography
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF
    found["cryptography"] = cryptography.__version__
except ImportError as error:
    found["problem"] = str(error)
print(json.dumps(found))
"""


def argument_spec() -> dict[str, Any]:
    return {
        "dead_after_ms": {"type": "int", "default": 1500},
        "compare": {"type": "bool", "default": True},
        "datagram_bytes": {"type": "int", "default": 1400},
        "enabled": {"type": "bool", "default": True},
        "filter": {
            "type": "dict",
            "default": {},
            "options": {
                "addresses": {"type": "list", "elements": "str", "default": []},
                "marks": {
                    "type": "list",
                    "elements": "dict",
                    "default": [],
                    "options": {
                        "mask": {"type": "int", "default": 4294967295},
                        "value": {"type": "int", "required": True},
                    },
                },
                "protocols": {"type": "list", "elements": "str", "default": []},
                "tcp_states": {
                    "type": "list",
                    "elements": "str",
                    "choices": ["ESTABLISHED", "FIN_WAIT", "CLOSE_WAIT", "LAST_ACK", "TIME_WAIT", "CLOSE"],
                    "default": [],
                },
                "zones": {"type": "list", "elements": "int", "default": []},
            },
        },
        "hello_interval_ms": {"type": "int", "default": 500},
        "ignore_addresses": {"type": "list", "elements": "str", "default": []},
        "interpreter": {"type": "path", "default": "/usr/bin/python3"},
        "keys": {
            "type": "list",
            "elements": "dict",
            "no_log": False,
            "options": {
                "id": {"type": "int", "required": True},
                "key": {"type": "str", "required": True, "no_log": True},
            },
        },
        "lag_limit_ms": {"type": "int", "default": 2000},
        "link": {
            "type": "dict",
            "options": {
                "address": {"type": "str", "required": True},
                "interface": {"type": "str", "required": True},
                "port": {"type": "int", "default": 3781},
            },
        },
        "links": {
            "type": "list",
            "elements": "dict",
            "options": {
                "address": {"type": "str", "required": True},
                "interface": {"type": "str", "required": True},
                "port": {"type": "int", "default": 3781},
            },
        },
        "log_level": {"type": "str", "choices": ["debug", "info", "warning", "error"], "default": "info"},
        "max_expectations": {"type": "int", "default": 4096},
        "mode": {"type": "str", "choices": ["hot-standby", "external-cache"], "default": "hot-standby"},
        "netlink_buffer_bytes": {"type": "int", "default": 0},
        "node": {"type": "str"},
        "park_timeout_s": {"type": "int", "default": 86400},
        "peers": {
            "type": "list",
            "elements": "dict",
            "options": {
                "address": {"type": "str"},
                "addresses": {"type": "list", "elements": "str"},
                "node": {"type": "str", "required": True},
            },
            "mutually_exclusive": [("address", "addresses")],
            "required_one_of": [("address", "addresses")],
        },
        "remove_user": {"type": "bool", "default": False},
        "replicate": {"type": "bool", "default": True},
        "ruleset_fingerprint": {"type": "path", "default": "/run/ctsync/ruleset.fingerprint"},
        "running": {"type": "bool", "default": True},
        "same_conditions": {
            "type": "list",
            "elements": "str",
            "choices": ["ruleset", "limits", "timeouts"],
            "default": ["ruleset", "limits", "timeouts"],
        },
        "send_key": {"type": "int", "no_log": False},
        "state": {"type": "str", "choices": ["absent", "present"], "default": "present"},
        "table_size": {"type": "int", "default": 0},
        "udp": {"type": "str", "choices": ["replied", "all"], "default": "replied"},
        "virtual_ips": {
            "type": "list",
            "elements": "dict",
            "options": {
                "address": {"type": "str", "required": True},
                "interface": {"type": "str", "required": True},
            },
        },
        "window_ms": {"type": "int", "default": 20},
    }


class Account:
    """The daemon's system user and group, as far as they exist."""

    def __init__(self) -> None:
        self.uid: Optional[int] = None
        self.gid: Optional[int] = None
        self.refresh()

    def refresh(self) -> None:
        with contextlib.suppress(KeyError):
            self.gid = grp.getgrnam(layout.USER).gr_gid
        with contextlib.suppress(KeyError):
            self.uid = pwd.getpwnam(layout.USER).pw_uid


class Work:
    """What is to be done: each step with its name and its diff, in order."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, Callable[[], object]]] = []
        self.diff: list[dict[str, str]] = []
        self.restart = False
        self.reload = False
        self.keys = False  # the running daemon is to be given its keys
        self.late: set[str] = set()  # names of steps that come after systemd has read the unit

    def add(
        self,
        name: str,
        before: str,
        after: str,
        do: Callable[[], object],
        *,
        restart: bool = False,
        keys: bool = False,
    ) -> None:
        self.steps.append((name, do))
        self.diff.append({"before_header": name, "after_header": name, "before": before, "after": after})
        self.restart = self.restart or restart
        self.keys = self.keys or keys

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(name for name, dummy in self.steps))


class Installation:
    """The daemon on this host: look, plan, do, or undo."""

    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.params = module.params
        self.service = _systemd.Service(module, layout.UNIT)
        self.account = Account()
        self.work = Work()
        self.earlier: dict[str, _files.Snapshot] = {}
        self.began = int(time.time())

    # --- state: present ---

    def present(self) -> None:
        self._check_host()
        app = self._build()
        self._check_interpreter()
        problems = layout.check_keys(self.params["keys"])
        if self.params["table_size"] < 0:
            problems.append(f"table_size: {self.params['table_size']} is negative: write a number of flows, or 0")
        if problems:
            self.module.fail_json(msg="; ".join(problems), problems=problems)
        if not self.params["netlink_buffer_bytes"]:
            table_size = self.params["table_size"] or _buffers.read_table_size()
            self.params["netlink_buffer_bytes"] = _buffers.event_buffer(table_size, _buffers.read_memory())
        config = layout.render_config(self.params)
        self._check_config(app, config)

        state = self.service.state()
        self._plan_present(app, config, state)
        action = self._action(state)
        result = {
            "version": app.version,
            "digest": app.digest,
            "program": f"{layout.LIBRARY}/{app.file_name}",
            "config": json.loads(config),
        }
        if not self.module.check_mode:
            action = self._apply_present(state, action, hashlib.sha256(config.encode()).hexdigest())
        self._exit(action, **result)

    def _check_host(self) -> None:
        if not _systemd.booted():
            self.module.fail_json(msg="systemd is not the running init of this host: ctsyncd needs it as supervisor")
        version = self.service.version()
        if version < MINIMUM_SYSTEMD:
            self.module.fail_json(
                msg=f"systemd {version} is too old: LoadCredential= needs {MINIMUM_SYSTEMD} or newer: "
                "upgrade the distribution"
            )

    def _build(self) -> _zipapp.Zipapp:
        sources = _zipapp.package_sources(daemon)
        missing = _zipapp.missing_files(sources)
        if missing:
            self.module.fail_json(
                msg=f"payload incomplete: Ansible did not ship {', '.join(missing)}: "
                "install the collection again and report this",
                missing=missing,
            )
        try:
            return _zipapp.build(sources, self.params["interpreter"], daemon.__version__)
        except ValueError as error:
            self.module.fail_json(msg=f"interpreter: {error}: write a path such as /usr/bin/python3")

    def _check_interpreter(self) -> None:
        """The daemon's Python is not necessarily the one that runs this module."""
        path = self.params["interpreter"]
        if not os.access(path, os.X_OK):
            self.module.fail_json(
                msg=f"interpreter: {path} is not there or not executable: install Python 3.9 or newer"
            )
        command = [path, "-I", "-c", PROBE]
        rc, out, err = self.module.run_command(command, environ_update={"LC_ALL": "C"})
        try:
            found = json.loads(out)
        except ValueError:
            found = None
        if rc != 0 or found is None:
            self.module.fail_json(
                msg=f"interpreter: {path} does not run Python code: name a working Python 3.9 or newer",
                cmd=[*command[:3], "..."],
                rc=rc,
                stdout=out,
                stderr=err,
            )
        if tuple(found["python"]) < MINIMUM_PYTHON:
            version = ".".join(str(part) for part in found["python"])
            self.module.fail_json(msg=f"interpreter: {path} is Python {version}: name Python 3.9 or newer")
        if not found["cryptography"]:
            message = (
                f"{path} cannot import cryptography ({found['problem']}): "
                "install the package python3-cryptography of the distribution"
            )
            if not self.module.check_mode:
                self.module.fail_json(msg=message)
            self.module.warn(message)  # in check mode the task that installs it did not run

    def _check_config(self, app: _zipapp.Zipapp, config: str) -> None:
        """Let the new daemon judge the new configuration, before anything on the host is changed."""
        with tempfile.TemporaryDirectory(dir=self.module.tmpdir) as folder:
            program, candidate = os.path.join(folder, app.file_name), os.path.join(folder, "ctsyncd.conf")
            for path, content in ((program, app.data), (candidate, config.encode())):
                with open(path, "wb") as stream:
                    stream.write(content)
            command = [self.params["interpreter"], "-I", program, "check-config", "-C", candidate]
            rc, out, err = self.module.run_command(command, environ_update={"LC_ALL": "C"})
        if rc == 0:
            return
        lines = err.replace(candidate, layout.CONFIG).splitlines()
        prefix = f"ctsyncd: {layout.CONFIG}: "
        problems = [line[len(prefix) :] for line in lines if line.startswith(prefix)]
        self.module.fail_json(
            msg="the configuration is wrong: " + ("; ".join(problems) or err.strip() or f"exit code {rc}"),
            problems=problems,
            cmd=command,
            rc=rc,
            stdout=out,
            stderr="\n".join(lines),
        )

    def _plan_present(self, app: _zipapp.Zipapp, config: str, state: _systemd.State) -> None:
        params = self.params
        keys = {entry["id"]: entry["key"].strip() for entry in params["keys"]}
        peers = [address for peer in params["peers"] for address in peer["addresses"] or [peer["address"]]]
        unit = layout.render_unit(list(keys), peers, self.service.version())
        program = f"{layout.LIBRARY}/{app.file_name}"

        self._plan_directory(layout.LIBRARY, 0o755)
        self._plan_file(program, app.data, 0o755, show=f"digest: {app.digest}\n")
        self._plan_account()
        self._plan_file(layout.TMPFILES, layout.render_tmpfiles().encode(), 0o644)
        self._plan_shared()
        self._plan_directory(layout.CONFIG_DIRECTORY, 0o755)
        self._plan_directory(layout.KEY_DIRECTORY, 0o700)
        for number, key in sorted(keys.items()):
            self._plan_file(layout.key_file(number), f"{key}\n".encode(), 0o600, show="(hidden)\n", keys=True)
        self._plan_unit(unit)
        self._plan_config(config)
        self._plan_link(program, app.digest)
        self._plan_old_keys(set(keys))
        self._plan_old_programs(program)
        if state.enabled != params["enabled"]:
            name = f"{layout.UNIT} at boot"
            words = {True: "enabled\n", False: "disabled\n"}
            change = self.service.enable if params["enabled"] else self.service.disable
            self.work.add(name, words[state.enabled], words[params["enabled"]], change)

    def _plan_directory(self, path: str, mode: int) -> None:
        found = _files.look(path)
        if found.exists and found.kind != stat.S_IFDIR:
            self.module.fail_json(msg=f"{path} is not a directory: move it away")
        if (found.mode, found.uid, found.gid) == (mode, 0, 0) and found.exists:
            return

        def do() -> None:
            os.makedirs(path, exist_ok=True)
            os.chown(path, 0, 0)
            os.chmod(path, mode)
            if self.module.selinux_enabled():
                self.module.set_default_selinux_context(path, False)

        self.work.add(path, _attributes(found), _attributes(_files.Snapshot(b"", stat.S_IFDIR, mode)), do)

    def _plan_file(
        self,
        path: str,
        content: bytes,
        mode: int,
        *,
        group: bool = False,
        show: Optional[str] = None,
        restart: bool = False,
        keys: bool = False,
    ) -> None:
        """``group``: readable by the daemon's group.  ``show``: what a diff shows in place of the contents."""
        found = _files.look(path)
        if found.exists and found.kind not in (stat.S_IFREG, stat.S_IFLNK):
            self.module.fail_json(msg=f"{path} is not a file: move it away")
        wanted = _files.Wanted(path, content, mode, 0, self.account.gid if group else 0)
        if wanted.matches(found):
            return

        def do() -> None:
            gid = (self.account.gid or 0) if group else 0
            _files.write(path, content, mode, uid=0, gid=gid, label=self._labeller(path))

        same_content = found.kind == stat.S_IFREG and found.content == content
        if same_content:
            gid = f"group {layout.USER}" if wanted.gid is None else f"group {wanted.gid}"
            after = f"mode {mode:04o}, owner 0, {gid}\n"
            self.work.add(path, _attributes(found), after, do, restart=restart, keys=keys)
            return
        before = "" if not found.exists else "(other contents, hidden)\n" if show else _text(found.content)
        self.work.add(path, before, show or _text(content), do, restart=restart, keys=keys)

    def _plan_unit(self, unit: str) -> None:
        """Other credentials alone need no restart: the running daemon is given its keys."""
        found = _files.look(layout.UNIT_FILE)
        old = _text(found.content) if found.kind == stat.S_IFREG else ""
        same = layout.without_credentials(old) == layout.without_credentials(unit)
        self._plan_file(layout.UNIT_FILE, unit.encode(), 0o644, restart=not same, keys=same)

    def _plan_config(self, config: str) -> None:
        """A restart, unless every option that changes may change while the daemon runs."""
        found = _files.look(layout.CONFIG)
        try:
            old = daemon_config.parse(_text(found.content)) if found.kind == stat.S_IFREG else None
            changed = old.differences(daemon_config.parse(config)) if old is not None else None
        except ConfigError:
            changed = None  # of another version, or edited
        live = changed is not None and all(row.live for row in changed)
        handed = changed is not None and not live and all(row.live or row.handed for row in changed)
        restart = not (live or handed)
        self._plan_file(layout.CONFIG, config.encode(), 0o640, group=True, restart=restart, keys=handed)
        self.work.reload = live and layout.CONFIG in self.work.names

    def _plan_link(self, program: str, digest: str) -> None:
        found = _files.look(layout.COMMAND)
        if found.kind == stat.S_IFLNK and found.content == program.encode():
            return
        if found.kind == stat.S_IFDIR:
            self.module.fail_json(msg=f"{layout.COMMAND} is a directory: move it away")
        before = ""
        if found.kind == stat.S_IFLNK:
            target = _text(found.content)
            before = f"-> {target}\ndigest: {_zipapp.read_build(target).get('digest', 'unknown')}\n"
        elif found.exists:
            before = "(a file)\n"
        after = f"-> {program}\ndigest: {digest}\n"
        self.work.add(layout.COMMAND, before, after, lambda: _files.link(layout.COMMAND, program), restart=True)

    def _plan_account(self) -> None:
        if self.account.uid is not None and self.account.gid is not None:
            return

        def do() -> None:
            if self.account.gid is None:
                self._command("groupadd", "--system", layout.USER)
            if self.account.uid is None:
                self._command(
                    "useradd",
                    "--system",
                    "--gid",
                    layout.USER,
                    "--home-dir",
                    "/nonexistent",
                    "--no-create-home",
                    "--shell",
                    "/usr/sbin/nologin",
                    "--comment",
                    "Connection tracking state replication",
                    layout.USER,
                )
            self.account.refresh()

        self.work.add(f"user {layout.USER}", "", "present\n", do, restart=True)

    def _plan_shared(self) -> None:
        """The directory, track file and FIFO that keepalived and the daemon share."""
        account = self.account
        wanted = (
            (layout.SHARED_DIRECTORY, stat.S_IFDIR, 0o755, 0, 0),
            (layout.TRACK_FILE, stat.S_IFREG, 0o644, account.uid, account.gid),
            (layout.NOTIFY_FIFO, stat.S_IFIFO, 0o640, 0, account.gid),
        )
        wrong = []
        for path, kind, mode, uid, gid in wanted:
            found = _files.look(path)
            if found.exists and found.kind != kind:
                self.module.fail_json(
                    msg=f"{path} is not a {_KIND_NAMES[kind]}: stop keepalived, remove it and run again"
                )
            if (found.kind, found.mode, found.uid, found.gid) != (kind, mode, uid, gid):
                wrong.append((path, found))
        if not wrong:
            return
        before = "".join(f"{path}: {_attributes(found) or 'absent' + chr(10)}" for path, found in wrong)
        after = "".join(f"{path}: present as in {layout.TMPFILES}\n" for path, dummy in wrong)
        self.work.add(
            f"files in {layout.SHARED_DIRECTORY}",
            before,
            after,
            lambda: self._command("systemd-tmpfiles", "--create", layout.TMPFILES),
            restart=True,
        )

    def _plan_old_keys(self, wanted: set[int]) -> None:
        for name in _list(layout.KEY_DIRECTORY):
            number, dummy, suffix = name.partition(".")
            if suffix == "key" and number.isdigit() and int(number) not in wanted:
                path = f"{layout.KEY_DIRECTORY}/{name}"
                self.work.add(path, "(hidden)\n", "", functools.partial(_files.remove, path), keys=True)
                self.work.late.add(path)

    def _plan_old_programs(self, program: str) -> None:
        """Keep the newest of the other versions, which a process may still be reading, or someone wants back."""
        others = [path for path in _programs() if path != program]
        link = _files.look(layout.COMMAND)
        target = _text(link.content) if link.kind == stat.S_IFLNK else ""
        keep = target if target in others else max(others, key=os.path.getmtime, default="")
        for path in others:
            if path != keep:
                self.work.add(path, "present\n", "", functools.partial(_files.remove, path))

    def _action(self, state: _systemd.State) -> str:
        if not self.params["running"]:
            return "stopped" if state.active else "none"
        if not state.active:
            return "started"
        pending = _files.look(RESTART_PENDING)
        if self.work.restart or (pending.exists and pending.content != KEYS_PENDING):
            return "restarted"
        if self.work.keys or pending.exists:
            return "rekeyed"
        return "reloaded" if self.work.reload else "none"

    def _apply_present(self, state: _systemd.State, action: str, digest: str) -> str:
        """Do the work; returns what was done to the service.  ``digest``: SHA-256 of the new configuration."""
        for path in (layout.CONFIG, layout.UNIT_FILE, layout.COMMAND, *_key_files()):
            self.earlier[path] = _files.look(path)
        for entry in self.params["keys"]:
            self.earlier.setdefault(layout.key_file(entry["id"]), _files.Snapshot())
        try:
            if (self.work.restart or self.work.reload or self.work.keys) and state.active:
                _files.write(RESTART_PENDING, KEYS_PENDING if action == "rekeyed" else b"", 0o600)
            for name, do in self.work.steps:
                if name == layout.UNIT + " at boot" or name in self.work.late:
                    self._reload_manager()
                do()
            self._reload_manager()
            if action == "reloaded" and not self._reload(digest):
                action = "restarted"
            if action == "rekeyed":
                self._hand_over_keys()
            elif action in ("started", "restarted"):
                self.service.restart()
            elif action == "stopped":
                self.service.stop()
            _files.remove(RESTART_PENDING)
        except (OSError, _systemd.SystemdError) as error:
            self._roll_back(state, error, action)
        return action

    def _hand_over_keys(self) -> None:
        """Have the running daemon use keys and configuration as the files have them now."""
        command = [layout.COMMAND, "-C", layout.CONFIG, "keys"]
        rc, out, err = self.module.run_command(command, environ_update={"LC_ALL": "C"})
        if rc != 0:
            said = err.strip() or f"exit code {rc}"
            raise _systemd.SystemdError(said, cmd=command, rc=rc, stdout=out, stderr=err)

    def _reload(self, digest: str) -> bool:
        """Have the daemon read its configuration again; does it say that it uses it?"""
        self.service.reload()
        deadline = time.monotonic() + RELOAD_TIMEOUT_S
        while self._digest_in_use() != digest:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True

    def _digest_in_use(self) -> str:
        """SHA-256 of the configuration that the running daemon uses; empty when it does not say."""
        command = [layout.COMMAND, "-C", layout.CONFIG, "status", "--json"]
        dummy, out, dummy = self.module.run_command(command, environ_update={"LC_ALL": "C"})
        try:
            return str(json.loads(out)["configuration"]["digest"])
        except (ValueError, KeyError, TypeError):
            return ""

    def _reload_manager(self) -> None:
        if layout.UNIT_FILE in self.work.names or self.service.state().need_reload:
            self.service.daemon_reload()

    def _roll_back(self, state: _systemd.State, error: Exception, action: str) -> NoReturn:
        """Put the former installation back and run it, if there was one that ran.

        A daemon that did not take its keys goes on as it was.
        """
        journal = self.service.journal(self.began) if action != "rekeyed" else []
        details: dict[str, Any] = dict(error.details) if isinstance(error, _systemd.SystemdError) else {}
        rolled_back = False
        if state.active and self.work.steps:
            try:
                for path, snapshot in self.earlier.items():
                    if _files.look(path) != snapshot:
                        _files.restore(path, snapshot, self._labeller(path))
                self.service.daemon_reload()
                former = hashlib.sha256(self.earlier[layout.CONFIG].content or b"").hexdigest()
                if action != "rekeyed" or self._digest_in_use() != former:
                    self.service.restart()
                _files.remove(RESTART_PENDING)
                rolled_back = True
            except (OSError, _systemd.SystemdError) as second:
                details["rollback_error"] = str(second)
        remedy = (
            "the former version and configuration run again"
            if rolled_back
            else "correct the cause and run again; the daemon goes on as it was"
            if action == "rekeyed"
            else "correct the cause and run again; systemd goes on trying to start it"
        )
        starts = [number for number, line in enumerate(journal) if line.startswith("systemd: Starting ")]
        attempt = journal[starts[-1] :] if starts else journal
        said = [line for line in attempt if line.startswith("ctsyncd: ")] or attempt
        cause = f"{str(error).splitlines()[0]}{' ' + said[-1] if said else ''}"
        if "/run/credentials/" in cause and "Permission denied" in cause:
            remedy = "in a container, run in it before the boot: mount --make-rshared / (LoadCredential= needs it)"
        self.module.fail_json(
            msg=f"ctsyncd was not installed: {cause}: {remedy}",
            rolled_back=rolled_back,
            journal=journal,
            changes=self.work.names,
            **details,
        )

    # --- state: absent ---

    def absent(self) -> None:
        if not _systemd.booted():
            self.module.fail_json(msg="systemd is not the running init of this host: nothing can be stopped here")
        state = self.service.state()
        paths = [layout.UNIT_FILE, layout.TMPFILES, layout.CONFIG, *_key_files()]
        link = _files.look(layout.COMMAND)
        if link.kind == stat.S_IFLNK and _text(link.content).startswith(layout.LIBRARY + "/"):
            paths.append(layout.COMMAND)
        paths += [*_programs(), layout.TRACK_FILE, layout.NOTIFY_FIFO, RESTART_PENDING]
        if state.enabled:
            self.work.add(f"{layout.UNIT} at boot", "enabled\n", "disabled\n", self.service.disable)
        for path in paths:
            if _files.look(path).exists:
                self.work.add(path, "present\n", "", functools.partial(_files.remove, path))
        if _only_ours(layout.STATE_DIRECTORY, _stories()):
            self.work.add(layout.STATE_DIRECTORY, "present\n", "", _remove_stories)
        for path in (layout.KEY_DIRECTORY, layout.CONFIG_DIRECTORY, layout.LIBRARY, layout.SHARED_DIRECTORY):
            if _only_ours(path, paths):
                self.work.add(path, "present\n", "", functools.partial(_files.remove_empty_directory, path))
        if self.params["remove_user"] and self.account.uid is not None:
            self.work.add(f"user {layout.USER}", "present\n", "", lambda: self._command("userdel", layout.USER))
        elif self.params["remove_user"] and self.account.gid is not None:
            self.work.add(f"group {layout.USER}", "present\n", "", lambda: self._command("groupdel", layout.USER))
        action = "stopped" if state.active else "none"
        if not self.module.check_mode and (self.work.steps or state.active):
            try:
                if state.loaded:
                    self.service.stop()  # also ends a start that is being retried
                for _name, do in self.work.steps:
                    do()
                self.service.daemon_reload()
                self.service.reset_failed()
            except (OSError, _systemd.SystemdError) as error:
                details = error.details if isinstance(error, _systemd.SystemdError) else {}
                self.module.fail_json(msg=f"ctsyncd was not removed completely: {error}: run again", **details)
        self._exit(action)

    # --- both ---

    def _labeller(self, path: str) -> Optional[Callable[[str], object]]:
        """On hosts with SELinux a new file gets the context of its final place."""
        if not self.module.selinux_enabled():
            return None
        context = self.module.selinux_default_context(path)
        return lambda temporary: self.module.set_context_if_different(temporary, context, False)

    def _command(self, program: str, *arguments: str) -> None:
        command = [self.module.get_bin_path(program, required=True), *arguments]
        rc, out, err = self.module.run_command(command, environ_update={"LC_ALL": "C"})
        if rc != 0:
            said = err.strip() or out.strip() or f"exit code {rc}"
            raise _systemd.SystemdError(f"{' '.join(command)}: {said}", cmd=command, rc=rc, stdout=out, stderr=err)

    def _exit(self, action: str, **result: Any) -> NoReturn:
        changed = bool(self.work.steps) or action != "none"
        if self.module._diff:
            result["diff"] = self.work.diff
        self.module.exit_json(changed=changed, action=action, changes=self.work.names, **result)


_KIND_NAMES = {stat.S_IFDIR: "directory", stat.S_IFREG: "regular file", stat.S_IFIFO: "FIFO"}


def _text(content: Optional[bytes]) -> str:
    return (content or b"").decode("utf-8", "replace")


def _attributes(found: _files.Snapshot) -> str:
    return f"mode {found.mode:04o}, owner {found.uid}, group {found.gid}\n" if found.exists else ""


def _list(path: str) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except FileNotFoundError:
        return []


def _programs() -> list[str]:
    return [
        f"{layout.LIBRARY}/{name}"
        for name in _list(layout.LIBRARY)
        if name.startswith("ctsyncd-") and name.endswith(".pyz")
    ]


def _key_files() -> list[str]:
    return [f"{layout.KEY_DIRECTORY}/{name}" for name in _list(layout.KEY_DIRECTORY) if name.endswith(".key")]


def _stories() -> list[str]:
    """What the flight recorder has kept."""
    return [f"{layout.STATE_DIRECTORY}/{name}" for name in _list(layout.STATE_DIRECTORY) if name.endswith(".jsonl")]


def _remove_stories() -> None:
    """With the last one, which the daemon wrote while it stopped."""
    for path in _stories():
        _files.remove(path)
    _files.remove_empty_directory(layout.STATE_DIRECTORY)


def _only_ours(path: str, removed: list[str]) -> bool:
    """Whether the directory is there and nothing is in it but what gets removed."""
    if not os.path.isdir(path):
        return False
    inside = [f"{path}/{name}" for name in _list(path)]
    return all(entry in removed or (entry == layout.KEY_DIRECTORY and _only_ours(entry, removed)) for entry in inside)


def main() -> None:
    module = AnsibleModule(
        argument_spec=argument_spec(),
        mutually_exclusive=[("link", "links")],
        required_if=[("state", "present", REQUIRED), ("state", "present", ("link", "links"), True)],
        supports_check_mode=True,
    )
    if module.params["state"] == "present":
        # required_if takes an explicit null, as an undefined default gives it, for a value
        missing = [name for name in REQUIRED if module.params[name] is None]
        if module.params["link"] is None and not module.params["links"]:
            missing.append("link or links")
        if missing:
            module.fail_json(msg=f"state is present but all of the following are missing: {', '.join(missing)}")
    installation = Installation(module)
    if module.params["state"] == "present":
        installation.present()
    else:
        installation.absent()


if __name__ == "__main__":
    main()
