#!/usr/bin/python
# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: kernel_settings
short_description: Kernel modules and sysctls of a firewall, set, persisted and read back
version_added: 0.1.0
author: The ctsync authors (@ctsync)
description:
  - Loads kernel modules and sets sysctls in the given order, now and at every boot.
  - Values are written to and read from C(/proc/sys) directly and read back afterwards. C(sysctl -w) ends with success
    for a key that cannot be changed, as many are in a container, so its exit code proves nothing.
  - A module that is built into the kernel, or that the host of a container has loaded, counts as loaded.
extends_documentation_fragment:
  - ctsync.ha_firewall.attributes
options:
  modules:
    description:
      - Kernel modules to load, in this order.
    type: list
    elements: str
    default: []
  modules_file:
    description:
      - File of systemd-modules-load that names O(modules) for the next boot.
    type: path
    default: /etc/modules-load.d/ctsync.conf
  state:
    description:
      - V(present) makes the settings so. V(absent) removes both files and sets every key back to the value it had
        before, unless somebody has changed it since. Modules stay loaded.
    type: str
    choices: [present, absent]
    default: present
  state_file:
    description:
      - File that remembers the values that were replaced.
    type: path
    default: /var/lib/ctsync/kernel_settings.json
  sysctl_file:
    description:
      - File of systemd-sysctl that holds O(sysctls) for the next boot.
    type: path
    default: /etc/sysctl.d/60-ctsync.conf
  sysctls:
    description:
      - Keys and values. They are set in this order.
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description: Key as in sysctl.d, for example V(net.ipv4.ip_forward) or V(net/ipv4/conf/eth0.10/rp_filter).
        type: str
        required: true
      value:
        description: Value. Several numbers are separated by spaces.
        type: str
        required: true
seealso:
  - module: ansible.posix.sysctl
  - module: community.general.modprobe
"""

EXAMPLES = r"""
- name: Track connections strictly, then forward
  ctsync.ha_firewall.kernel_settings:
    modules: [nf_conntrack, nf_conntrack_netlink]
    sysctls:
      - name: net.netfilter.nf_conntrack_tcp_loose
        value: "0"
      - name: net.ipv4.ip_forward
        value: "1"

- name: Give the machine back as it was
  ctsync.ha_firewall.kernel_settings:
    state: absent
"""

RETURN = r"""
problems:
  description: What is wrong with O(sysctls), one sentence for each mistake.
  returned: when keys are wrong
  type: list
  elements: str
  sample: [The kernel has no key net.ipv4.ip_forwards.]
loaded:
  description: Modules that were loaded, or would be in check mode.
  returned: always
  type: list
  elements: str
  sample: [nf_conntrack_netlink]
sysctls:
  description: What the kernel held before and holds now (in check mode, would hold) of every key concerned.
  returned: always
  type: dict
  sample: {"net.ipv4.ip_forward": {"before": "0", "after": "1"}}
"""

import errno
import fnmatch
import json
import os
import re
import socket
import struct

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.ctsync.ha_firewall.plugins.module_utils import _files, _ruleset

SYSCTL_FOLDERS = ("/etc/sysctl.d", "/run/sysctl.d", "/usr/local/lib/sysctl.d", "/usr/lib/sysctl.d", "/lib/sysctl.d")
HEADER = "# Written by Ansible (ctsync.ha_firewall.kernel_settings): changes are lost.\n"

ARGUMENT_SPEC = {
    "modules": {"type": "list", "elements": "str", "default": []},
    "modules_file": {"type": "path", "default": "/etc/modules-load.d/ctsync.conf"},
    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
    "state_file": {"type": "path", "default": "/var/lib/ctsync/kernel_settings.json"},
    "sysctl_file": {"type": "path", "default": "/etc/sysctl.d/60-ctsync.conf"},
    "sysctls": {
        "type": "list",
        "elements": "dict",
        "default": [],
        "options": {"name": {"type": "str", "required": True}, "value": {"type": "str", "required": True}},
    },
}


def key_path(name: str) -> str:
    """Path below /proc/sys of a key in either notation of sysctl.d(5): the first separator decides which one it is."""
    first = re.search(r"[./]", name)
    if first and first[0] == ".":
        name = name.translate(str.maketrans("./", "/."))
    return "/proc/sys/" + name


def is_key(name: str) -> bool:
    """Whether the text can be a key: no folder above, nothing empty, no wildcard."""
    parts = key_path(name)[len("/proc/sys/") :].split("/")
    return len(parts) > 1 and all(re.fullmatch(r"[\w.:@-]+", part) and part.strip(".") for part in parts)


def squeeze(value: str) -> str:
    """A value without differences of white space."""
    return " ".join(str(value).split())


def read_key(name: str):
    """What the kernel holds; None if there is no such key."""
    try:
        with open(key_path(name)) as stream:
            return squeeze(stream.read())
    except (FileNotFoundError, NotADirectoryError):
        return None


def overriding(name: str, value: str, own_file: str, folders=SYSCTL_FOLDERS) -> str:
    """The file of sysctl.d that is read after ours at boot and sets the key to another value; empty if none.

    sysctl.d(5): files are ordered by name over all folders, and of two with the same name the first folder wins.
    """
    files = {}
    for folder in folders:
        for entry in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
            if entry.endswith(".conf"):
                files.setdefault(entry, os.path.join(folder, entry))
    path = key_path(name)
    found = ""
    for entry in sorted(files):
        if entry <= os.path.basename(own_file):
            continue
        for line in (_files.look(os.path.realpath(files[entry])).content or b"").decode(errors="replace").splitlines():
            other, equals, text = line.strip().partition("=")
            other = other.strip().lstrip("-").strip()
            if equals and not other.startswith(("#", ";")) and fnmatch.fnmatchcase(path, key_path(other)):
                found = files[entry] if squeeze(text) != squeeze(value) else ""
    return found


def ctnetlink_answers() -> bool:
    """Whether the kernel answers a conntrack question over netlink (nfnetlink_conntrack.h: IPCTNL_MSG_CT_GET_STATS)."""
    question = struct.pack("=IHHII4x", 20, 1 << 8 | 5, 1, 1, 0)  # NLM_F_REQUEST; nfgenmsg of zeros
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12) as sock:  # NETLINK_NETFILTER
            sock.settimeout(5)
            sock.send(question)
            kind = struct.unpack_from("=H", sock.recv(4096), 4)[0]
    except OSError:
        return False
    return kind != 2  # NLMSG_ERROR


class Run:
    """One run: look at everything, then change, then read back."""

    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.params = module.params
        self.present = module.params["state"] == "present"

    def module_missing(self, name: str) -> bool:
        """Whether a kernel module has still to be loaded. Fails if there is no such module."""
        if os.path.isdir("/sys/module/" + name.replace("-", "_")):
            return False
        modprobe = _ruleset.find_program("modprobe")
        words = "there is no modprobe"
        if modprobe:
            rc, out, err = self.module.run_command([modprobe, "--show-depends", name], environ_update={"LC_ALL": "C"})
            if rc == 0:
                return not out.rstrip().rpartition("\n")[2].startswith("builtin")
            words = err.strip()
        # Neither loaded nor known by name: built in, or loaded by the host of this container?
        probes = {
            "nf_conntrack": lambda: os.path.exists("/proc/sys/net/netfilter/nf_conntrack_count"),
            "nf_conntrack_netlink": ctnetlink_answers,
        }
        if name in probes and probes[name]():
            return False
        return self.module.fail_json(
            msg=f"The kernel has no module {name} and cannot load it here ({words}). In a container, load it on the"
            f" host with 'modprobe {name}'; elsewhere install the kernel's modules. Nothing was changed."
        )

    def load(self, name: str) -> None:
        command = [_ruleset.find_program("modprobe"), name]
        rc, out, err = self.module.run_command(command, environ_update={"LC_ALL": "C"})
        if rc != 0:
            self.module.fail_json(
                msg=f"Kernel module {name} could not be loaded: {err.strip()}. In a container, load it on the host.",
                cmd=command,
                rc=rc,
                stdout=out,
                stderr=err,
            )

    def set_key(self, name: str, value: str) -> None:
        """Write and read back; fails naming the key and what the kernel holds."""
        reason = ""
        try:
            with open(key_path(name), "w") as stream:
                stream.write(value + "\n")
        except FileNotFoundError:
            self.module.fail_json(
                msg=f"The kernel has no key {name}. Correct the name, or load the module that brings it ('modules')."
            )
        except OSError as exc:
            if exc.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                self.fixed_key(name, value)
            reason = f" and answers: {exc.strerror}"
        held = read_key(name)
        if held != squeeze(value):
            self.module.fail_json(
                msg=f"{name} could not be set to '{value}': the kernel holds '{held}'{reason}. Give a value it takes.",
                key=name,
                wanted=value,
                held=held,
            )

    def fixed_key(self, name: str, value: str) -> None:
        """Fail for a key that cannot be written here at all."""
        held = read_key(name)
        self.module.fail_json(
            msg=f"{name} cannot be set to '{value}': the kernel holds '{held}', and the key is read-only here, as keys"
            " of the host are in a container. Set it on the host and leave it out here.",
            key=name,
            wanted=value,
            held=held,
        )

    def load_state(self) -> dict:
        content = _files.look(self.params["state_file"]).content
        if content is None:
            return {}
        try:
            return dict(json.loads(content)["replaced"])
        except (ValueError, KeyError, TypeError):
            return self.module.fail_json(
                msg=f"{self.params['state_file']} does not hold what this module wrote there. It remembers the values"
                " to put back; repair it, or remove it if the present values are to be kept for good."
            )

    def refuse(self, problems: list) -> None:
        """Fail with all of them; go on when there are none."""
        if problems:
            self.module.fail_json(msg=" ".join([*problems, "Nothing was changed."]), problems=problems)

    def run(self) -> dict:
        params, module = self.params, self.module
        names = params["modules"] if self.present else []
        settings = [(s["name"], squeeze(s["value"])) for s in params["sysctls"]] if self.present else []
        problems = []
        for number, (name, value) in enumerate(settings, 1):
            if not is_key(name):
                problems.append(f"sysctls[{number}].name: '{name}' is no key; write it as net.ipv4.ip_forward.")
            elif key_path(name) in [key_path(earlier) for earlier, _v in settings[: number - 1]]:
                problems.append(f"sysctls[{number}].name: {name} is given more than once; keep one of them.")
            if not value:
                problems.append(f"sysctls[{number}].value: is empty for {name}; give the value to set.")
        to_load = [name for name in names if self.module_missing(name)]

        remembered = self.load_state()
        goals = list(settings)
        keep = {}
        for name, value in settings:
            if not is_key(name):
                continue
            held = read_key(name)
            if held is None and not to_load:
                problems.append(
                    f"The kernel has no key {name}. Correct the name, or load the module that brings it ('modules')."
                )
            replaced = remembered.get(name, {}).get("replaced", held)
            keep[name] = {"replaced": replaced, "set": value}
            later = overriding(name, value, params["sysctl_file"])
            if later:
                module.warn(
                    f"{later} sets {name} to another value at boot, after {params['sysctl_file']}; remove it there."
                )
        self.refuse(problems)
        for name, entry in reversed(list(remembered.items())):
            if name not in keep and entry["replaced"] is not None and read_key(name) == entry["set"]:
                goals.append((name, entry["replaced"]))
        before = {name: read_key(name) for name, _value in goals}

        files = self.wanted_files(names, settings, keep)
        found = {path: _files.look(path).content for path in files}
        stale = [path for path, content in files.items() if found[path] != content]
        differing = [(name, value) for name, value in goals if before[name] != value]
        for name, value in differing:
            if before[name] is not None and not os.access(key_path(name), os.W_OK):
                self.fixed_key(name, value)
        changed = bool(to_load or stale or differing)
        if changed and not module.check_mode:
            for name in to_load:
                self.load(name)
            for name, entry in keep.items():
                if entry["replaced"] is None:  # the key came with a module just loaded
                    entry["replaced"] = read_key(name)
                    before[name] = entry["replaced"]
            files = self.wanted_files(names, settings, keep)
            if keep:  # before the values it remembers are replaced
                self.write(params["state_file"], files[params["state_file"]])
            for name, value in goals:
                if read_key(name) != value:
                    self.set_key(name, value)
            for path in stale:
                self.write(path, files[path])
        result = {
            "changed": changed,
            "loaded": to_load,
            "sysctls": {name: {"before": before[name], "after": value} for name, value in goals},
        }
        if module._diff and changed:
            result["diff"] = self.diffs(to_load, differing, before)
            result["diff"] += [
                {
                    "before": (found[path] or b"").decode(errors="replace"),
                    "after": (files[path] or b"").decode(),
                    "before_header": path,
                    "after_header": path,
                }
                for path in stale
            ]
        return result

    def write(self, path: str, content) -> None:
        """Make one file so, or remove it."""
        if content is None:
            _files.remove(path)
            if path == self.params["state_file"] and not os.listdir(os.path.dirname(path)):
                os.rmdir(os.path.dirname(path))
            return
        os.makedirs(os.path.dirname(path), 0o755, exist_ok=True)
        _files.write(path, content, 0o644, label=lambda name: self.module.set_default_selinux_context(name, False))

    @staticmethod
    def diffs(to_load: list, differing: list, before: dict) -> list:
        """What changes in the kernel, as sysctl and lsmod would say it."""
        old = "".join(f"{name} = {before[name]}\n" for name, _value in differing if before[name] is not None)
        new = "".join(f"{name} = {value}\n" for name, value in differing)
        new += "".join(f"module {name}\n" for name in to_load)
        if not old and not new:
            return []
        return [{"before": old, "after": new, "before_header": "kernel", "after_header": "kernel"}]

    def wanted_files(self, names: list, settings: list, keep: dict) -> dict:
        """Path to content; None for 'must not exist'."""
        lines = {
            self.params["modules_file"]: [f"{name}\n" for name in names],
            self.params["sysctl_file"]: [f"{name} = {value}\n" for name, value in settings],
        }
        files = {path: (HEADER + "".join(text)).encode() if text else None for path, text in lines.items()}
        state = json.dumps({"version": 1, "replaced": keep}, indent=1) + "\n"  # in the order of setting
        files[self.params["state_file"]] = state.encode() if keep else None
        return files


def main() -> None:
    module = AnsibleModule(argument_spec=ARGUMENT_SPEC, supports_check_mode=True)
    module.exit_json(**Run(module).run())


if __name__ == "__main__":
    main()
