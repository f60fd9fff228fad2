#!/usr/bin/python
# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: lab_nodes
short_description: Bring up, switch off or remove the lab's machines
version_added: 0.1.0
description:
  - Each node is a container with systemd as process 1 and no Docker network. Its network cards are veth pairs into
    bridges of a network namespace of the lab's own (the switch, named after the prefix with C(sw)). Nothing on the
    host is touched.
  - What is right already stays as it is; a node that is off is started, a cable that is out is put in again.
author:
  - The ctsync authors (@ctsync)
requirements:
  - root
  - a Docker engine on this machine
  - pyroute2
extends_documentation_fragment:
  - ctsync.ha_firewall.attributes
options:
  image:
    description: The node image; required with O(state=present).
    type: str
  nodes:
    description:
      - The machines. For V(powered_off) and V(absent) their names suffice.
      - With O(state=absent), no nodes means all that carry the lab's label, and the switch.
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description: The node's host name; its container is called prefix and name.
        type: str
        required: true
      interfaces:
        description: The network cards, in order.
        type: list
        elements: dict
        default: []
        suboptions:
          name:
            description: The card's name in the node.
            type: str
            required: true
          segment:
            description: The segment it is plugged into.
            type: str
            required: true
          addresses:
            description: IPv4 and IPv6 addresses with prefix length.
            type: list
            elements: str
            default: []
      routes:
        description: Routes by way of a gateway.
        type: list
        elements: dict
        default: []
        suboptions:
          destination:
            description: A network, or V(default) for all of the gateway's family.
            type: str
            default: default
          gateway:
            description: The address of the gateway.
            type: str
            required: true
      hosts:
        description: Names and addresses for C(/etc/hosts).
        type: dict
        default: {}
      volumes:
        description: Folders of the controller, in the form that C(docker run --volume) takes.
        type: list
        elements: str
        default: []
      files:
        description: Files that the node has before its first boot. Changed files mean a new node.
        type: list
        elements: dict
        default: []
        suboptions:
          path:
            description: Where, in the node.
            type: path
            required: true
          content:
            description: What is in it.
            type: str
          src:
            description: A file of the controller with what is in it.
            type: path
          link_to:
            description: Makes it a symbolic link to this.
            type: str
          mode:
            description: Its permissions, octal, as a string.
            type: str
            default: '0644'
  prefix:
    description: The prefix of all names. Labs with different prefixes do not meet.
    type: str
    default: ctsync-
  state:
    description:
      - V(present) means running, plugged in and booted.
      - V(powered_off) is a power cut. All ports of the nodes leave their bridges in one step, so that nothing more
        comes from them, then the containers are killed. Their disks stay; V(present) is the way back.
      - V(absent) removes the nodes with their disks.
    type: str
    choices: [present, powered_off, absent]
    default: present
  timeout:
    description: How many seconds a node may take to boot.
    type: int
    default: 90
seealso:
  - module: ctsync.ha_firewall.lab_engine
  - module: ctsync.ha_firewall.lab_image
"""

EXAMPLES = r"""
- name: Two machines on one wire
  ctsync.ha_firewall.lab_nodes:
    image: ctsync-node:bookworm
    nodes:
      - {name: a, interfaces: [{name: eth0, segment: inside, addresses: [192.168.0.3/24]}]}
      - {name: c, interfaces: [{name: eth0, segment: inside, addresses: [192.168.0.4/24]}]}

- name: Cut the power of one
  ctsync.ha_firewall.lab_nodes:
    nodes: [{name: c}]
    state: powered_off

- name: Remove the lab
  ctsync.ha_firewall.lab_nodes:
    state: absent
"""

RETURN = r"""
nodes:
  description: By node name, what was done to it, in order.
  returned: success
  type: dict
  sample: {"fw1": ["create", "start", "plug eth0 outside"]}
cut_at:
  description: The moment (seconds since 1970) at which the kernel had taken the ports off.
  returned: state is powered_off and there was something to cut
  type: float
  sample: 1767225600.123
cut_ports:
  description: The switch ports that were taken off their bridges.
  returned: state is powered_off
  type: list
  elements: str
  sample: [fw1-eth0, fw1-eth1, fw1-eth2]
"""

import os
import traceback

from ansible.module_utils.basic import AnsibleModule, missing_required_lib
from ansible_collections.ctsync.ha_firewall.plugins.module_utils import _lab

try:
    import pyroute2
except ImportError:
    pyroute2 = None
    PYROUTE2_ERROR = traceback.format_exc()
else:
    PYROUTE2_ERROR = ""


class Lab:
    """One lab on this machine: does the three states and notes what it did."""

    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.check = module.check_mode
        self.prefix = module.params["prefix"]
        self.docker = _lab.Docker()
        self.switch = _lab.Switch(self.prefix)
        self.ipv6 = os.path.exists("/proc/sys/net/ipv6")
        self.done: dict[str, list[str]] = {}
        self.extra: dict[str, object] = {}

    def note(self, node: str, what: str) -> None:
        """Remember something done (or, in check mode, to be done)."""
        self.done.setdefault(node, []).append(what)

    def own(self, names: list[str]) -> dict[str, _lab.Container]:
        """The containers of these nodes.

        :raises LabError: when a container of that name is not of this lab.
        """
        found = self.docker.containers([self.prefix + name for name in names])
        for container in found.values():
            if container.lab != self.prefix:
                raise _lab.LabError(
                    f"container {container.name} is not of the lab with prefix {self.prefix!r}: "
                    "choose another prefix, or remove it"
                )
        return {name[len(self.prefix) :]: container for name, container in found.items()}

    def present(self) -> None:
        """Nodes exist, run, are plugged in and have booted."""
        nodes = [_lab.parse_node(item, read_text, self.ipv6) for item in self.module.params["nodes"]]
        image = self.module.params["image"]
        image_id = self.docker.image_id(image)
        if not image_id and not self.check:
            raise _lab.LabError(f"there is no image {image} on this machine: lab_image makes it")
        if not self.check:
            load_kernel_modules()
        self.make_switch({interface.segment for node in nodes for interface in node.interfaces})
        existing = self.own([node.name for node in nodes])
        booting = []
        for node in nodes:
            name, old = self.prefix + node.name, existing.get(node.name)
            spec = _lab.spec_digest(self.prefix, node, image_id, self.ipv6)
            if old is not None and old.spec != spec:
                self.note(node.name, "remove, as it was made from another description")
                if not self.check:
                    self.docker.do("rm", "--force", "--volumes", name)
                old = None
            if old is None:
                self.note(node.name, "create")
                if not self.check:
                    self.docker.create(self.prefix, node, image, spec, self.ipv6)
            if old is None or not old.running:
                self.note(node.name, "start")
                booting.append(node.name)
                if not self.check:
                    self.docker.do("start", name)
                    self.wire(node, self.own([node.name])[node.name].pid)
            else:
                self.wire(node, old.pid)
        for node_name in booting if not self.check else []:
            if self.docker.wait_booted(self.prefix + node_name, self.module.params["timeout"]) == "degraded":
                failed = ", ".join(self.docker.failed_units(self.prefix + node_name))
                self.module.warn(f"{node_name} has booted, but these units failed: {failed}")

    def make_switch(self, segments: set[str]) -> None:
        """The switch and its bridges exist."""
        if not self.switch.exists():
            self.note("switch", "create")
            if not self.check:
                self.switch.create()
        missing = self.switch.missing_bridges(segments)
        for segment in missing:
            self.note("switch", f"segment {segment}")
        if missing and not self.check:
            self.switch.add_bridges(missing)

    def wire(self, node: _lab.Node, pid: int) -> None:
        """A running node's cables and addresses are as described; then its boot may go on."""
        if not os.path.exists(f"/proc/{pid}/ns/net"):
            raise _lab.LabError(f"{node.name}'s process {pid} is not on this machine: the engine must be a local one")
        if not self.switch.exists():  # check mode on a machine without the switch
            return
        steps = _lab.wiring_plan(node, self.switch.observe(node, pid))
        for step in steps:
            self.note(node.name, " ".join(step).strip())
        if not self.check:
            self.switch.apply(node, pid, steps)
            with open(f"/proc/{pid}/root/{_lab.WIRED_MARK}", "w", encoding="ascii"):
                pass

    def powered_off(self) -> None:
        """Nodes are cut off and dead."""
        names = [item["name"] for item in self.module.params["nodes"]]
        running = [name for name, container in self.own(names).items() if container.running]
        for name in running:
            self.note(name, "power cut")
        self.extra["cut_ports"] = []
        if running and not self.check:
            ports: list[str] = []
            if self.switch.exists():
                ports, self.extra["cut_at"] = self.switch.cut(running)
            self.docker.do("kill", *(self.prefix + name for name in running))
            if ports:
                self.switch.unplug(ports)
            self.extra["cut_ports"] = ports

    def absent(self) -> None:
        """Nodes are gone; without names, the whole lab is."""
        names = [item["name"] for item in self.module.params["nodes"]]
        if self.docker.answers():
            found = self.own(names) if names else self.own([n[len(self.prefix) :] for n in self.all_names()])
            for name in found:
                self.note(name, "remove")
            if found and not self.check:
                self.docker.do("rm", "--force", "--volumes", *(container.name for container in found.values()))
        if not names and self.switch.exists():
            self.note("switch", "remove")
            if not self.check:
                self.switch.remove()

    def all_names(self) -> list[str]:
        """The container names of this lab."""
        return self.docker.names_of(self.prefix)


def read_text(path: str) -> str:
    """A controller's file.

    :raises LabError: when it cannot be read.
    """
    try:
        with open(path, encoding="utf-8") as stream:
            return stream.read()
    except OSError as error:
        raise _lab.LabError(f"{path}: {error.strerror}") from error


def load_kernel_modules() -> None:
    """Ask for what a node cannot load by itself; what a kernel has built in, or has not at all, is no error here."""
    for name in _lab.KERNEL_MODULES:
        if not os.path.isdir(f"/sys/module/{name}"):
            _lab.run_command(["modprobe", "--quiet", name])


def main() -> None:
    interface = {
        "name": {"type": "str", "required": True},
        "segment": {"type": "str", "required": True},
        "addresses": {"type": "list", "elements": "str", "default": []},
    }
    route = {"destination": {"type": "str", "default": "default"}, "gateway": {"type": "str", "required": True}}
    file = {
        "path": {"type": "path", "required": True},
        "content": {"type": "str"},
        "src": {"type": "path"},
        "link_to": {"type": "str"},
        "mode": {"type": "str", "default": "0644"},
    }
    node = {
        "name": {"type": "str", "required": True},
        "interfaces": {"type": "list", "elements": "dict", "default": [], "options": interface},
        "routes": {"type": "list", "elements": "dict", "default": [], "options": route},
        "hosts": {"type": "dict", "default": {}},
        "volumes": {"type": "list", "elements": "str", "default": []},
        "files": {
            "type": "list",
            "elements": "dict",
            "default": [],
            "options": file,
            "required_one_of": [("content", "src", "link_to")],
            "mutually_exclusive": [("content", "src", "link_to")],
        },
    }
    module = AnsibleModule(
        argument_spec={
            "image": {"type": "str"},
            "nodes": {"type": "list", "elements": "dict", "default": [], "options": node},
            "prefix": {"type": "str", "default": "ctsync-"},
            "state": {"type": "str", "choices": ["present", "powered_off", "absent"], "default": "present"},
            "timeout": {"type": "int", "default": 90},
        },
        required_if=[("state", "present", ["image", "nodes"])],
        supports_check_mode=True,
    )
    if pyroute2 is None:
        module.fail_json(msg=missing_required_lib("pyroute2"), exception=PYROUTE2_ERROR)
    if os.geteuid() != 0:
        module.fail_json(msg="the lab makes network namespaces and containers: run it as root")
    lab = Lab(module)
    try:
        getattr(lab, module.params["state"])()
    except (_lab.LabError, ValueError) as error:
        module.fail_json(msg=str(error), nodes=lab.done)
    lines = "".join(f"{node}: {what}\n" for node, steps in lab.done.items() for what in steps)
    module.exit_json(changed=bool(lab.done), nodes=lab.done, diff={"prepared": lines}, **lab.extra)


if __name__ == "__main__":
    main()
