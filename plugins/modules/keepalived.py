#!/usr/bin/python
# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: keepalived
short_description: Configure keepalived for one sync group of virtual IPs
version_added: 0.1.0
description:
  - Renders C(keepalived.conf) for VRRP instances that move together, tied to C(ctsyncd) by a notify FIFO and by a track
    file that lowers the priority of a node which is not ready to take over.
  - The candidate is tested by keepalived itself before it replaces the live file. A running keepalived is reloaded, so
    that the virtual IPs stay where they are. It is restarted only when its program was replaced, see O(restart).
  - When keepalived does not run on with the new configuration, the former one is put back.
  - The file is replaced as a whole. A configuration of others is kept beside it and restored by O(state=absent).
options:
  authentication:
    description:
      - How the advertisements are authenticated, the same on all nodes. Left out, they are not.
      - VRRPv3 has no authentication of its own (RFC 5798). keepalived 2.4.0 and newer seals every advertisement with an
        HMAC (C(auth_hmac)); an older one is refused, because it would silently ignore the setting.
      - The configuration file can be read by root only then, and diffs do not show the keys.
      - For a running group use O(authentication.mode=permissive) on all nodes first, one soon after the other, then
        V(enforce). A node that has no keys drops the advertisements of one that has.
    type: dict
    suboptions:
      anti_replay:
        description: V(time) needs clocks that agree within the window, V(monotonic) only growing numbers.
        type: str
        choices: [time, monotonic]
        default: time
      keys:
        description: The keys that are accepted. List the old and the new one for a while to rotate.
        type: list
        elements: dict
        required: true
        suboptions:
          id:
            description: Number of the key, 1 to 255.
            type: int
            required: true
          key:
            description: 32 to 64 random bytes as hexadecimal digits, C(openssl rand -hex 32).
            type: str
            required: true
      mode:
        description: Whether an advertisement without a seal is dropped (V(enforce)) or accepted (V(permissive)).
        type: str
        choices: [enforce, permissive]
        default: enforce
      send_key:
        description: Id of the key that is sent with. Needed when there are several.
        type: int
      time_window_s:
        description: How old an advertisement may be with V(time), in seconds. keepalived's default is at least 5.
        type: int
  advert_interval:
    description:
      - Time between two VRRP advertisements in seconds, a multiple of 0.01. It must be the same on all nodes.
      - A dead node is noticed after three intervals and a part of a fourth.
    type: float
    default: 0.1
  backup:
    description: Whether to keep a copy with a time stamp of each version that is replaced.
    type: bool
    default: false
  bfd:
    description:
      - Neighbours that a node must reach to be of use, such as the next router, watched by BFD (RFC 5880). It
        notices a loss within tens of milliseconds. They must speak BFD, too.
      - Not for the other firewall. A node would be of less worth whenever its peer is dead.
      - A session that is new is down for a second or so. Give it a O(bfd[].weight) at first, on all nodes, and take
        that away in a second run, or the virtual IPs move once.
    type: list
    elements: dict
    default: []
    suboptions:
      idle_tx_ms:
        description: Time between two packets while the session is down, in milliseconds, 1000 to 10000.
        type: float
        default: 1000
      min_rx_ms:
        description: Shortest time between two packets that this node can take, in milliseconds, 1 to 1000.
        type: float
        default: 50
      min_tx_ms:
        description: Shortest time between two packets that this node wants to send, in milliseconds, 1 to 1000.
        type: float
        default: 50
      multiplier:
        description: Missed packets after which the neighbour counts as lost.
        type: int
        default: 5
      name:
        description: Name of the session. The default is C(bfd_1) and so on.
        type: str
      neighbour:
        description: Address of the neighbour, on a network of this node.
        type: str
        required: true
      passive:
        description: Whether to wait for the neighbour's first packet.
        type: bool
        default: false
      source:
        description: This node's own address in that network.
        type: str
        required: true
      weight:
        description: As for O(track_interfaces[].weight).
        type: int
        default: 0
  enabled:
    description: Whether keepalived is started at boot.
    type: bool
    default: true
  garp:
    description: How the network is told who holds a virtual IP (gratuitous ARP, unsolicited neighbour advertisements).
    type: dict
    default: {}
    suboptions:
      interval:
        description:
          - Least time between two such packets on one interface, in seconds, at most 1. V(0) for none.
          - For switches that drop bursts, where there are many virtual IPs.
        type: float
        default: 0
      lower_prio_delay:
        description: Delay of the second round after an advertisement of lower priority, in seconds, at least 1.
        type: int
        default: 1
      lower_prio_repeat:
        description: Packets per round after an advertisement of lower priority.
        type: int
        default: 5
      master_delay:
        description: Delay of the second round after becoming active, in seconds. V(0) switches the round off.
        type: int
        default: 1
      master_repeat:
        description: Packets per round after becoming active.
        type: int
        default: 5
      refresh:
        description:
          - Time between two reminders while active, in seconds. V(0) switches them off.
          - After two active nodes find each other again, hosts may believe the wrong one until the next reminder.
        type: int
        default: 2
      refresh_repeat:
        description: Packets per reminder.
        type: int
        default: 1
  group:
    description: Name of the sync group.
    type: str
    default: ha_firewall
  instances:
    description: The VRRP instances, which fail over together. Required with O(state=present).
    type: list
    elements: dict
    suboptions:
      advert_interval:
        description: As O(advert_interval), for this instance only.
        type: float
      interface:
        description: Interface that carries the virtual IPs and the advertisements.
        type: str
        required: true
      name:
        description: Name of the instance. The default is C(VI_) and the interface, with C(_6) behind it for IPv6.
        type: str
      priority:
        description: As O(priority). All instances of a group must have the same.
        type: int
      router_id:
        description: Virtual router id, 1 to 255, the same on all nodes and unique on the network.
        type: int
        required: true
      unicast_peers:
        description: Addresses of the other nodes on this interface. Without peers the instance uses multicast.
        type: list
        elements: str
        default: []
      unicast_src_ip:
        description: This node's own address on the interface. Required with peers.
        type: str
      virtual_ips:
        description: Addresses with prefix length, all of one family.
        type: list
        elements: str
        required: true
  manage_service:
    description:
      - Whether the module manages the systemd service C(keepalived), its drop-in file, start, stop and reload.
      - With V(false) it only tests and writes O(path).
    type: bool
    default: true
  node:
    description: Name of this node in keepalived's configuration. The default is the host name.
    type: str
  nopreempt:
    description:
      - Whether an active node stays active when a node of higher priority comes (back).
      - With V(false) the virtual IPs move once more, as soon as that node is ready.
    type: bool
    default: true
  notify_fifo:
    description: FIFO that keepalived writes its transitions to. An empty string switches it off.
    type: str
    default: /run/ctsync/notify.fifo
  path:
    description: The configuration file. Any other than the default needs O(manage_service=false).
    type: path
    default: /etc/keepalived/keepalived.conf
  preempt_delay:
    description: With O(nopreempt=false), how long a node of higher priority waits, in seconds.
    type: float
    default: 0
  priority:
    description:
      - VRRP priority of this node, 1 to 254, different on each node. The highest wins an election.
      - Must be greater than the amount of O(track_weight).
    type: int
  realtime_priority:
    description:
      - Real-time priority of keepalived's VRRP process, 1 to 99. V(0) leaves it with the normal scheduler.
      - Helps against false failovers on busy machines with short intervals. Not available in most containers.
    type: int
    default: 0
  restart:
    description:
      - When keepalived may be restarted. Every change of its configuration takes a reload only. The one reason for a
        restart is that the program was replaced (a newer package) and the old one still runs.
      - V(backup) restarts it while this node holds none of the virtual IPs. On the active node it warns and leaves
        everything as it is; hand over first, then run again.
      - V(always) also restarts it on the active node, which hands the virtual IPs over.
      - V(never) only warns. The reason is in RV(restart_reason) in any case.
    type: str
    choices: [never, backup, always]
    default: backup
  running:
    description: Whether keepalived runs. With V(false) a running one is stopped, which gives the virtual IPs away.
    type: bool
    default: true
  startup_delay:
    description:
      - How long a keepalived that was just started stays passive and deaf, in seconds.
      - Prevents two active nodes where switch ports need long to forward after the link comes up. It also delays a
        take-over within that time.
    type: float
    default: 0
  state:
    description:
      - V(present) configures keepalived and starts it.
      - V(absent) stops it and restores the configuration and the service state that this module found. Where no
        keepalived ran before, what keepalived 2.3 wrote for C(ip) into C(/etc/iproute2/rt_addrprotos.d) goes, too.
    type: str
    choices: [absent, present]
    default: present
  track_file:
    description:
      - File with V(0) when this node is ready, V(1) while it must not be preferred, V(2) while another node that must
        not be preferred is better still. An empty string switches it off.
      - keepalived makes a missing file with V(1), and never changes an existing one.
    type: str
    default: /run/ctsync/not-ready
  track_interfaces:
    description: More interfaces that a node needs to be of use. Those of O(instances) are watched anyway.
    type: list
    elements: dict
    default: []
    suboptions:
      interface:
        description: Name of the interface.
        type: str
        required: true
      weight:
        description:
          - V(0) puts the whole group into the state FAULT while the interface is down, so that all virtual IPs move to
            another node, or nowhere if that has lost it, too.
          - -253 to -1 is added to the priority instead. That decides elections; an active node with O(nopreempt) stays
            active.
        type: int
        default: 0
  track_weight:
    description:
      - What a node that is not ready adds to its priority, -253 to -1; one that knows nothing adds it twice.
      - Its amount must be greater than the difference between the priorities of any two nodes. Where nothing would be
        left, keepalived takes 1; then the order of the nodes is still right.
    type: int
    default: -60
notes:
  - Virtual IPs in advertisements must agree between nodes. While one node has a new list and the other the old one,
    they do not accept each other's advertisements. Change it on all nodes close together, in a maintenance window.
  - keepalived 2.2.7 and newer also checks that unicast advertisements come from a peer with TTL 255, that is, from a
    sender on the same link. For authentication see O(authentication).
requirements:
  - keepalived 2.1.5 or newer
  - systemd, with O(manage_service=true)
seealso:
  - module: ctsync.ha_firewall.ctsyncd
  - module: ctsync.ha_firewall.ha_facts
extends_documentation_fragment:
  - ctsync.ha_firewall.attributes
author:
  - The ctsync authors (@ctsync)
"""

EXAMPLES = r"""
- name: Two virtual IPs that move together
  ctsync.ha_firewall.keepalived:
    node: fw1
    priority: 150
    instances:
      - interface: eth1
        router_id: 51
        virtual_ips: [192.168.0.100/24]
        unicast_src_ip: 192.168.0.1
        unicast_peers: [192.168.0.2]
      - interface: eth0
        router_id: 52
        virtual_ips: [192.168.1.100/24]
        unicast_src_ip: 192.168.1.1
        unicast_peers: [192.168.1.2]

- name: Multicast, one advertisement a second, and the better node takes the virtual IPs back
  ctsync.ha_firewall.keepalived:
    priority: 100
    advert_interval: 1
    nopreempt: false
    preempt_delay: 30
    instances:
      - {interface: eth1, router_id: 51, virtual_ips: [192.168.0.100/24]}
      - {interface: eth0, router_id: 52, virtual_ips: [192.168.1.100/24]}

- name: Give keepalived back as it was
  ctsync.ha_firewall.keepalived:
    state: absent
"""

RETURN = r"""
action:
  description: What was done to the service, or would be done in check mode.
  returned: always
  type: str
  choices: [none, started, reloaded, restarted, stopped]
  sample: reloaded
backup_file:
  description: Copy of the version that was replaced.
  returned: when one was made
  type: str
  sample: /etc/keepalived/keepalived.conf.before-ctsync
changes:
  description: What was changed, or would be in check mode, in the order of the work.
  returned: always
  type: list
  elements: str
  sample: [/etc/keepalived/keepalived.conf]
instances:
  description: Names of the VRRP instances.
  returned: when O(state=present)
  type: list
  elements: str
  sample: [VI_eth1, VI_eth0]
path:
  description: The configuration file.
  returned: always
  type: str
  sample: /etc/keepalived/keepalived.conf
problems:
  description: What is wrong with the options, one entry for each problem.
  returned: when options are wrong
  type: list
  elements: str
  sample: ["instances[0].router_id: 0 is out of range: choose 1 to 255"]
restart_reason:
  description: Why a restart of keepalived is due, and was not done or was.
  returned: when there is a reason
  type: str
  sample: the program was replaced since keepalived started
rolled_back:
  description: Whether the former configuration was put back after a failure.
  returned: on failure, when something had been changed
  type: bool
  sample: true
validation:
  description: What keepalived says of the candidate.
  returned: when the candidate was tested
  type: dict
  contains:
    meaning:
      description: Meaning of the exit code, empty for success.
      type: str
      returned: success
      sample: ""
    output:
      description: keepalived's own words.
      type: str
      returned: success
      sample: ""
    rc:
      description: Exit code of the configuration test.
      type: int
      returned: success
      sample: 0
version:
  description: Version of keepalived.
  returned: when keepalived is installed and O(state=present)
  type: str
  sample: 2.2.7
"""

import os
import platform
import stat
import tempfile
import time
from typing import Any, Callable, NoReturn, Optional

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.ctsync.ha_firewall.plugins.module_utils import _facts, _files, _systemd
from ansible_collections.ctsync.ha_firewall.plugins.module_utils import _keepalived as layout

UNIT = "keepalived.service"
SUFFIX = ".before-ctsync"
PENDING = "/run/keepalived.ctsync-pending"  # the file is newer than the running keepalived, even after a crash of ours
SETTLE_S = 0.5  # a keepalived that cannot go on after a reload is gone by then
OLDEST = (2, 1, 5)


def argument_spec() -> dict[str, Any]:
    return {
        "authentication": {
            "type": "dict",
            "options": {
                "anti_replay": {"type": "str", "choices": ["time", "monotonic"], "default": "time"},
                "keys": {
                    "type": "list",
                    "elements": "dict",
                    "required": True,
                    "no_log": False,
                    "options": {
                        "id": {"type": "int", "required": True},
                        "key": {"type": "str", "required": True, "no_log": True},
                    },
                },
                "mode": {"type": "str", "choices": ["enforce", "permissive"], "default": "enforce"},
                "send_key": {"type": "int", "no_log": False},
                "time_window_s": {"type": "int"},
            },
        },
        "advert_interval": {"type": "float", "default": 0.1},
        "backup": {"type": "bool", "default": False},
        "bfd": {
            "type": "list",
            "elements": "dict",
            "default": [],
            "options": {
                "idle_tx_ms": {"type": "float", "default": 1000},
                "min_rx_ms": {"type": "float", "default": 50},
                "min_tx_ms": {"type": "float", "default": 50},
                "multiplier": {"type": "int", "default": 5},
                "name": {"type": "str"},
                "neighbour": {"type": "str", "required": True},
                "passive": {"type": "bool", "default": False},
                "source": {"type": "str", "required": True},
                "weight": {"type": "int", "default": 0},
            },
        },
        "enabled": {"type": "bool", "default": True},
        "garp": {
            "type": "dict",
            "default": {},
            "apply_defaults": True,
            "options": {
                "interval": {"type": "float", "default": 0},
                "lower_prio_delay": {"type": "int", "default": 1},
                "lower_prio_repeat": {"type": "int", "default": 5},
                "master_delay": {"type": "int", "default": 1},
                "master_repeat": {"type": "int", "default": 5},
                "refresh": {"type": "int", "default": 2},
                "refresh_repeat": {"type": "int", "default": 1},
            },
        },
        "group": {"type": "str", "default": "ha_firewall"},
        "instances": {
            "type": "list",
            "elements": "dict",
            "options": {
                "advert_interval": {"type": "float"},
                "interface": {"type": "str", "required": True},
                "name": {"type": "str"},
                "priority": {"type": "int"},
                "router_id": {"type": "int", "required": True},
                "unicast_peers": {"type": "list", "elements": "str", "default": []},
                "unicast_src_ip": {"type": "str"},
                "virtual_ips": {"type": "list", "elements": "str", "required": True},
            },
        },
        "manage_service": {"type": "bool", "default": True},
        "node": {"type": "str"},
        "nopreempt": {"type": "bool", "default": True},
        "notify_fifo": {"type": "str", "default": layout.NOTIFY_FIFO},
        "path": {"type": "path", "default": layout.CONFIG_PATH},
        "preempt_delay": {"type": "float", "default": 0},
        "priority": {"type": "int"},
        "realtime_priority": {"type": "int", "default": 0},
        "restart": {"type": "str", "choices": ["never", "backup", "always"], "default": "backup"},
        "running": {"type": "bool", "default": True},
        "startup_delay": {"type": "float", "default": 0},
        "state": {"type": "str", "choices": ["absent", "present"], "default": "present"},
        "track_file": {"type": "str", "default": layout.TRACK_FILE},
        "track_interfaces": {
            "type": "list",
            "elements": "dict",
            "default": [],
            "options": {
                "interface": {"type": "str", "required": True},
                "weight": {"type": "int", "default": 0},
            },
        },
        "track_weight": {"type": "int", "default": layout.DEFAULT_WEIGHT},
    }


class Work:
    """Steps to do, in order, each with its name and its diff."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, Callable[[], None]]] = []
        self.diff: list[dict[str, str]] = []

    def add(self, name: str, before: str, after: str, do: Callable[[], None]) -> None:
        self.steps.append((name, do))
        self.diff.append({"before_header": name, "after_header": name, "before": before, "after": after})


class Keepalived:
    """keepalived on this host: look, plan, do, or undo."""

    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.params = module.params
        self.path: str = module.params["path"]
        self.saved = self.path + SUFFIX
        self.work = Work()
        self.result: dict[str, Any] = {"path": self.path, "action": "none"}
        self.earlier: dict[str, _files.Snapshot] = {}
        self.service: Optional[_systemd.Service] = None
        self.unit = _systemd.State(False, False, False, False, 0, "unknown")
        if module.params["manage_service"]:
            self._look_at_service()

    def _look_at_service(self) -> None:
        if self.path != layout.CONFIG_PATH:
            self.module.fail_json(
                msg=f"path: the service reads {layout.CONFIG_PATH}, not {self.path}: leave path out or set"
                " manage_service to false"
            )
        if not _systemd.booted():
            self.module.fail_json(
                msg="manage_service: systemd is not the running init of this host: set manage_service to false and"
                " start keepalived yourself"
            )
        self.service = _systemd.Service(self.module, UNIT)
        self.unit = self.service.state()
        if self.unit.masked and self.params["state"] == "present" and self.params["running"]:
            self.module.fail_json(msg=f"{UNIT} is masked: run systemctl unmask {UNIT}, or set running to false")

    # --- state: present ---

    def present(self) -> None:
        config = self._config()
        self.result["instances"] = [instance.name for instance in config.instances]
        program = self.module.get_bin_path("keepalived")
        version = self._version(program)
        problem = layout.tracking.hmac_problem(version) if config.authentication else ""
        if problem:
            self.module.fail_json(msg=f"{problem}. Nothing was changed.", problems=[problem])
        found = self._look(self.path)
        text = _decode(found)
        foreign = found.exists and not layout.is_ours(text)
        before = layout.parse_before(text) if not foreign else None
        if before is None and self.service is not None:
            before = layout.Before(active=self.unit.active, enabled=self.unit.enabled)
        wanted = layout.render_config(config, version or layout.SINCE_HARDENING, before)
        if program:
            self._validate(program, wanted)
        fresh = [each.name for each in config.bfd if not each.weight and f"bfd_instance {each.name} {{" not in text]
        if fresh and self.unit.active:
            self.module.warn(
                f"bfd: {', '.join(fresh)} is new and has no weight: until the session is up, for a second or so, this"
                " node is in FAULT, and the virtual IPs leave it. To avoid that, give it a weight first and take it"
                " away in a second run"
            )
        self._plan_config(found, text, wanted, foreign, 0o600 if config.authentication else 0o644)
        if self.service is not None:
            self._plan_service(self.service, self._restart_now(program, config, text))
        self._finish()

    def _config(self) -> layout.Config:
        params = dict(self.params)
        params["node"] = params["node"] or platform.node().split(".", maxsplit=1)[0]
        try:
            return layout.build_config(params)
        except layout.ConfigProblem as problem:
            self.module.fail_json(msg=f"{problem}. Nothing was changed.", problems=problem.problems)

    def _version(self, program: Optional[str]) -> tuple[int, ...]:
        if not program:
            if not self.module.check_mode:
                self.module.fail_json(
                    msg="keepalived is not installed: install the package keepalived first (the role"
                    " ctsync.ha_firewall.keepalived does). Nothing was changed."
                )
            self.module.warn("keepalived is not installed yet: its configuration was not tested")
            return ()
        _dummy, out, err = self._run([program, "--version"])
        version = layout.parse_version(out + err)
        if version:
            self.result["version"] = ".".join(map(str, version))
        if version and version < OLDEST:
            self.module.fail_json(
                msg=f"keepalived {self.result['version']} is too old: this module needs 2.1.5. Nothing was changed."
            )
        return version

    def _validate(self, program: str, text: str) -> None:
        descriptor, candidate = tempfile.mkstemp(prefix="keepalived-", suffix=".conf", dir=self.module.tmpdir)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
                stream.write(text)
            # not into the journal: nothing of it is live
            command = [program, "--no-syslog", "--config-test", "--use-file", candidate]
            rc, out, err = self._run(command)
        finally:
            os.unlink(candidate)
        said = layout.clean_test_output(out + err, candidate, self.path)
        meaning = layout.explain_exit(rc) if rc else ""
        self.result["validation"] = {"rc": rc, "output": said, "meaning": meaning}
        if rc:
            self.module.fail_json(
                msg=f"keepalived's test of the new configuration ended with {rc} ({meaning}): {said or 'no output'}."
                " Nothing was changed.",
                candidate=layout.tracking.hide_keys(text),
                **self.result,
            )

    def _restart_now(self, program: Optional[str], config: layout.Config, text: str) -> bool:
        """Whether to restart a running keepalived instead of reloading it; warns when it should be and is not."""
        if not (program and self.unit.active and self.params["running"] and replaced(program, self.unit.main_pid)):
            return False
        self.result["restart_reason"] = reason = "the program was replaced since keepalived started"
        wanted = [
            {"interface": instance.interface, "address": address.split("/")[0]}
            for instance in (*config.instances, *layout.parse_instances(text))
            for address in instance.virtual_ips
        ]
        held = any(vip["held"] for vip in _facts.virtual_ips_held(wanted, _facts.read_addresses()))
        if self.params["restart"] == "always" or (self.params["restart"] == "backup" and not held):
            return True
        remedy = "hand over first (playbook switchover), then run this again" if held else "set restart to backup"
        self.module.warn(f"keepalived should be restarted, because {reason}; it was not: {remedy}")
        return False

    def _plan_config(self, found: _files.Snapshot, text: str, wanted: str, foreign: bool, mode: int) -> None:
        file = _files.Wanted(self.path, wanted.encode(), mode)
        if file.matches(found):
            return
        folder = os.path.dirname(self.path)
        if not os.path.isdir(folder):
            self.work.add(folder, "", "directory\n", lambda: os.makedirs(folder, 0o755))
        if foreign and not os.path.lexists(self.saved):
            kept = found.content or b""
            self.work.add(self.saved, "", text, lambda: self._write(self.saved, kept, found.mode))
            self.result["backup_file"] = self.saved
        elif found.exists and text != wanted and (self.params["backup"] or foreign):
            self.work.steps.append(("", self._backup))
        self.work.add(
            self.path,
            _view(text, found),
            _view(wanted, _files.Snapshot(file.content, stat.S_IFREG, file.mode)),
            lambda: self._write(self.path, file.content, file.mode),
        )

    def _backup(self) -> None:
        self.result["backup_file"] = self.module.backup_local(self.path)

    def _plan_service(self, service: _systemd.Service, restart: bool) -> None:
        dropin = _files.Wanted(layout.DROPIN_PATH, layout.render_dropin(self.path).encode(), 0o644)
        found = self._look(dropin.path)
        changed = bool(self.work.steps)
        reload_units = self.unit.need_reload
        if not dropin.matches(found):
            reload_units = True
            self.work.add(dropin.path, _decode(found), dropin.content.decode(), lambda: self._write_dropin(dropin))
        if reload_units:
            self.work.steps.append(("", service.daemon_reload))
        if self.params["enabled"] != self.unit.enabled and not self.unit.masked:
            self._plan_state("enabled", "disabled", self.params["enabled"], service.enable, service.disable)
        if self.params["running"]:
            if not self.unit.active:
                self._plan_action("started", service.restart)
            elif restart:
                self._plan_action("restarted", service.restart)
            elif changed or os.path.exists(PENDING):
                self._plan_action("reloaded", self._reload)
        elif self.unit.active:
            self._plan_action("stopped", service.stop)

    def _plan_state(
        self, yes: str, no: str, wanted: bool, make_yes: Callable[[], None], make_no: Callable[[], None]
    ) -> None:
        before, after = (no, yes) if wanted else (yes, no)
        self.work.add(f"{UNIT} at boot", before + "\n", after + "\n", make_yes if wanted else make_no)

    def _plan_action(self, action: str, do: Callable[[], None]) -> None:
        self.result["action"] = action
        self.work.add(UNIT, self.unit.text + "\n", action + "\n", do)

    def _reload(self) -> None:
        """Reload, and see that the same keepalived is still there."""
        if self.service is None:
            return
        self.service.reload()
        time.sleep(SETTLE_S)
        now = self.service.state()
        if not now.active or now.main_pid != self.unit.main_pid:
            raise _systemd.SystemdError(f"{UNIT} did not survive the reload: it is {now.text}")

    # --- state: absent ---

    def absent(self) -> None:
        found = self._look(self.path)
        text = _decode(found)
        ours = found.exists and layout.is_ours(text)
        before = layout.parse_before(text) if ours else None
        kept = self._look(self.saved)
        service = self.service
        if service is not None and ours and self.unit.active:
            self._plan_action("stopped", service.stop)
        if ours:
            restored = _files.Snapshot() if not kept.exists else kept
            self.work.add(self.path, _view(text, found), _view(_decode(kept), kept), lambda: self._restore(restored))
            if kept.exists:
                self.work.add(self.saved, _decode(kept), "", lambda: self._remove(self.saved))
        if service is not None:
            dropin = self._look(layout.DROPIN_PATH)
            if dropin.exists and layout.is_ours(_decode(dropin)):
                self.work.add(layout.DROPIN_PATH, _decode(dropin), "", self._remove_dropin)
                self.work.steps.append(("", service.daemon_reload))
            if before is not None and before.enabled != self.unit.enabled:
                self._plan_state("enabled", "disabled", before.enabled, service.enable, service.disable)
            if before is not None and before.active and kept.exists:
                self._plan_action("restarted", service.restart)
            elif ours:
                self._plan_note_removal()
        self._finish()

    def _plan_note_removal(self) -> None:
        """keepalived 2.3 tells ip(8) the name of its addresses' protocol, in a file that no package owns."""
        path = layout.PROTOCOL_NOTE
        note = self._look(path)
        lines = _decode(note).splitlines()
        # a file that somebody has written into is somebody's
        if note.exists and all(line.endswith(layout.PROTOCOL_NOTE_MARK) for line in lines):
            self.work.add(path, _decode(note), "", self._remove_note)

    def _remove_note(self) -> None:
        self._remove(layout.PROTOCOL_NOTE)
        folder = os.path.dirname(layout.PROTOCOL_NOTE)
        if _files.remove_empty_directory(folder):
            _files.remove_empty_directory(os.path.dirname(folder))

    def _restore(self, kept: _files.Snapshot) -> None:
        self._remember(self.path)
        _files.restore(self.path, kept, self._label(self.path))

    # --- files ---

    def _look(self, path: str) -> _files.Snapshot:
        try:
            found = _files.look(path)
        except OSError as error:
            self.module.fail_json(msg=f"{path} cannot be read: {error.strerror}. Nothing was changed.")
        if found.exists and found.kind != stat.S_IFREG:
            self.module.fail_json(
                msg=f"{path} is not a regular file: move it away, or set path to the file that it stands for."
                " Nothing was changed."
            )
        return found

    def _label(self, path: str) -> Callable[[str], None]:
        """Give a new file the security context that belongs to ``path``."""

        def label(temporary: str) -> None:
            if self.module.selinux_enabled():
                self.module.set_context_if_different(temporary, self.module.selinux_default_context(path), False)

        return label

    def _remember(self, path: str) -> None:
        self.earlier.setdefault(path, _files.look(path))

    def _write(self, path: str, content: bytes, mode: int) -> None:
        self._remember(path)
        if self.service is not None and path == self.path:
            _files.write(PENDING, b"", 0o644)
        _files.write(path, content, mode, label=self._label(path))

    def _write_dropin(self, dropin: _files.Wanted) -> None:
        os.makedirs(os.path.dirname(dropin.path), 0o755, exist_ok=True)
        self._write(dropin.path, dropin.content, dropin.mode)

    def _remove(self, path: str) -> None:
        self._remember(path)
        _files.remove(path)

    def _remove_dropin(self) -> None:
        self._remove(layout.DROPIN_PATH)
        _files.remove_empty_directory(os.path.dirname(layout.DROPIN_PATH))

    # --- doing ---

    def _finish(self) -> None:
        self.result["changes"] = list(dict.fromkeys(name for name, dummy in self.work.steps if name))
        self.result["changed"] = bool(self.result["changes"])
        self.result["diff"] = self.work.diff
        if self.module.check_mode:
            self.module.exit_json(**self.result)
        try:
            for _dummy, step in self.work.steps:
                step()
        except (OSError, _systemd.SystemdError) as error:
            self._undo(error)
        if self.service is not None:
            _files.remove(PENDING)
        self.module.exit_json(**self.result)

    def _undo(self, error: Exception) -> NoReturn:
        """Put back what was there, and let keepalived run as it did."""
        details = getattr(error, "details", {})
        journal = self.service.journal() if self.service is not None else ""
        failures = []
        for path, earlier in reversed(list(self.earlier.items())):
            try:
                if earlier.exists:
                    os.makedirs(os.path.dirname(path), 0o755, exist_ok=True)
                _files.restore(path, earlier, self._label(path))
            except OSError as problem:
                failures.append(f"{path}: {problem.strerror}")
        if self.service is not None:
            try:
                self._undo_service(self.service)
            except _systemd.SystemdError as problem:
                failures.append(str(problem))
        if not failures:
            _files.remove(PENDING)
        outcome = "The former state was put back." if not failures else "Putting it back failed: " + "; ".join(failures)
        self.result["changed"] = bool(failures)
        self.result.pop("diff", None)
        self.module.fail_json(
            msg=f"{error}. {outcome}", rolled_back=not failures, journal=journal, **details, **self.result
        )

    def _undo_service(self, service: _systemd.Service) -> None:
        service.daemon_reload()
        now = service.state()
        if now.enabled != self.unit.enabled:
            (service.enable if self.unit.enabled else service.disable)()
        if self.unit.active and now.active and now.main_pid == self.unit.main_pid:
            service.reload()
        elif self.unit.active:
            service.restart()
        elif now.text != self.unit.text:
            service.stop()
            service.reset_failed()

    def _run(self, command: list[str]) -> tuple[int, str, str]:
        return self.module.run_command(command, environ_update={"LC_ALL": "C"})


def _decode(found: _files.Snapshot) -> str:
    return (found.content or b"").decode("utf-8", "replace")


def _view(text: str, found: _files.Snapshot) -> str:
    """A file for the diff, with its mode when that is unusual."""
    text = layout.tracking.hide_keys(text)
    return text if not found.exists or found.mode == 0o644 else f"# mode {found.mode:04o}\n{text}"


def replaced(program: str, pid: int) -> bool:
    """Whether the process runs another file than the program that a start would take; ``False`` where nobody knows."""
    try:
        running, installed = os.stat(f"/proc/{pid}/exe"), os.stat(os.path.realpath(program))
    except OSError:
        return False
    return (running.st_dev, running.st_ino) != (installed.st_dev, installed.st_ino)


def main() -> None:
    module = AnsibleModule(argument_spec=argument_spec(), supports_check_mode=True)
    if module.params["state"] == "present" and not module.params["instances"]:
        module.fail_json(msg="instances: is missing or empty: name at least one VRRP instance. Nothing was changed.")
    work = Keepalived(module)
    if module.params["state"] == "present":
        work.present()
    work.absent()


if __name__ == "__main__":
    main()
