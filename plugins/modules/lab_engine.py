#!/usr/bin/python
# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: lab_engine
short_description: Make sure that a Docker engine runs for the lab
version_added: 0.1.0
description:
  - An engine that answers is left alone, whoever started it.
  - Where none answers, Debian's package is installed if need be and the engine started, by systemd where that is
    process 1, otherwise in the background, without a bridge and without any firewall rule, and with data of its own.
  - What was installed and started is recorded under C(/var/lib/ctsync-lab), so that O(state=absent) can undo it.
author:
  - The ctsync authors (@ctsync)
requirements:
  - root
extends_documentation_fragment:
  - ctsync.ha_firewall.attributes
attributes:
  diff_mode:
    support: none
  platform:
    platforms: debian
options:
  state:
    description:
      - V(present) makes sure that an engine answers.
      - V(absent) stops the engine that this module started, and no other, unless it runs containers of somebody else.
        Packages stay; they are named in RV(packages).
    type: str
    choices: [present, absent]
    default: present
  timeout:
    description: How many seconds a started engine has before it must answer.
    type: int
    default: 60
seealso:
  - module: ctsync.ha_firewall.lab_image
  - module: ctsync.ha_firewall.lab_nodes
"""

EXAMPLES = r"""
- name: Make sure that a Docker engine runs
  ctsync.ha_firewall.lab_engine:

- name: Stop the engine, if it was started for the lab
  ctsync.ha_firewall.lab_engine:
    state: absent
"""

RETURN = r"""
how:
  description: How the engine came to run, or what became of it.
  returned: success
  type: str
  sample: it was running
packages:
  description: The Debian packages that the lab installed on this machine, now or earlier. They stay after the lab.
  returned: success
  type: list
  elements: str
  sample: [docker.io]
"""

import contextlib
import os
import shutil
import signal
import time

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.ctsync.ha_firewall.plugins.module_utils import _lab

# What dockerd makes outside of its data; what was not there before goes when the lab's engine is stopped.
ENGINE_PATHS = ("/run/docker", "/run/containerd", "/etc/docker")


def install() -> None:
    """Install Debian's engine, and the client where that is a package of its own."""
    names = ["docker.io"]
    shown = _lab.run_command(["apt-cache", "policy", "docker-cli"])
    if "Candidate: (none)" not in shown.out and "Candidate:" in shown.out and not shutil.which("docker"):
        names.append("docker-cli")
    _lab.install_packages(_lab.run_command, names)


def start(step: str, timeout: float) -> str:
    """Start the engine and wait until it answers; returns how."""
    docker = _lab.Docker()
    record = _lab.read_record()
    log = f"{_lab.RUN_DIRECTORY}/dockerd.log"
    if step == "start-systemd":
        _lab.must(_lab.run_command(["systemctl", "start", "docker.service"], timeout=timeout), "systemctl start docker")
        record["started"], how = "systemd", "started by systemd"
    else:
        os.makedirs(_lab.RUN_DIRECTORY, mode=0o755, exist_ok=True)
        os.makedirs(f"{_lab.STATE_DIRECTORY}/docker", mode=0o711, exist_ok=True)
        record["made"] = [path for path in ENGINE_PATHS if not os.path.exists(path)]
        _lab.start_in_background(_lab.dockerd_arguments(), log)
        record["started"], how = "background", f"started in the background, log in {log}"
    _lab.write_record(record)
    deadline = time.monotonic() + timeout
    while not docker.answers():
        if time.monotonic() > deadline:
            raise _lab.LabError(f"the engine does not answer after {timeout:.0f} s; its log ends: {_lab.tail(log)}")
        time.sleep(0.1)
    return how


def present(check: bool, timeout: float) -> tuple[bool, str]:
    """Make sure that an engine answers; returns whether something was done, and what."""
    docker = _lab.Docker()
    plan = _lab.engine_plan(
        answers=docker.answers(),
        installed=bool(shutil.which("dockerd") and shutil.which("docker")),
        debian=bool(shutil.which("apt-get")),
        systemd=os.path.isdir("/run/systemd/system"),
    )
    how = "it was running" if not plan else "it would be started"
    if check:
        return bool(plan), how
    for step in plan:
        if step != "install":
            how = start(step, timeout)
            continue
        install()
        if docker.answers():  # the package itself started it
            record = _lab.read_record()
            record["started"] = "systemd"
            _lab.write_record(record)
            return True, "installed, and started by systemd"
    return bool(plan), f"{'installed, and ' if 'install' in plan else ''}{how}"


def absent(check: bool, timeout: float) -> tuple[bool, str]:
    """Stop the engine that the lab started; returns whether something was done, and what."""
    record, docker = _lab.read_record(), _lab.Docker()
    pid = _lab.background_pid()
    if record["started"] == "systemd":
        running = docker.answers()
    elif record["started"] == "background":
        running = pid is not None
    else:
        return False, "not started for the lab, so it is left alone"
    if running:
        others = docker.do("ps", "--quiet").split()
        if others:
            return False, f"{len(others)} other containers run on it, so it is left alone"
    if check:
        return True, "it would be stopped"
    if running and record["started"] == "systemd":
        units = ["docker.service", "docker.socket"]
        _lab.must(_lab.run_command(["systemctl", "stop", *units]), "systemctl stop docker")
        if "docker.io" in record["packages"]:  # it came for the lab: it does not come back at the next boot
            _lab.run_command(["systemctl", "disable", *units])
    elif running and pid is not None:
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + timeout
        while _lab.background_pid() is not None:
            if time.monotonic() > deadline:
                raise _lab.LabError(f"dockerd (process {pid}) did not end within {timeout:.0f} s of SIGTERM")
            time.sleep(0.1)
    for folder in (_lab.RUN_DIRECTORY, f"{_lab.STATE_DIRECTORY}/docker", *record.get("made", ())):
        _lab.remove_tree(folder)
    record["started"] = ""
    record["made"] = []
    _lab.write_record(record)
    return True, "stopped" if running else "it had stopped by itself"


def forget(packages: list[str]) -> None:
    """Remove the record, or what is empty of it: as long as packages are there, it says which came for the lab."""
    if packages:
        _lab.write_record({"packages": packages})
        return
    for name in ("record.json", "packages"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{_lab.STATE_DIRECTORY}/{name}")
    for folder in (f"{_lab.STATE_DIRECTORY}/docker", _lab.STATE_DIRECTORY):
        with contextlib.suppress(OSError):  # a mount point, or something of others in it
            os.rmdir(folder)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "timeout": {"type": "int", "default": 60},
        },
        supports_check_mode=True,
    )
    if os.geteuid() != 0:
        module.fail_json(msg="the lab makes network namespaces and containers: run it as root")
    act = present if module.params["state"] == "present" else absent
    try:
        changed, how = act(module.check_mode, module.params["timeout"])
    except _lab.LabError as error:
        module.fail_json(msg=str(error))
    packages = _lab.read_record()["packages"]
    if module.params["state"] == "absent" and not module.check_mode and not _lab.read_record()["started"]:
        forget(packages)
    module.exit_json(changed=changed, how=how, packages=packages)


if __name__ == "__main__":
    main()
