#!/usr/bin/python
# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: lab_image
short_description: Build the image of the lab's nodes, with or without a container registry
version_added: 0.1.0
description:
  - The base image is taken from the first of these that can be had - the local engine, the cache, a container registry,
    a bootstrap from Debian's packages with C(mmdebstrap). A bootstrapped base is cached as a compressed tarball.
  - The node image is built on it from a Dockerfile. A changed Dockerfile is another image; the same one is
    not built twice.
author:
  - The ctsync authors (@ctsync)
requirements:
  - root
  - a Docker engine
  - for a bootstrap, a Debian system (C(mmdebstrap) and C(zstd) are installed where missing)
extends_documentation_fragment:
  - ctsync.ha_firewall.attributes
attributes:
  diff_mode:
    support: none
options:
  base:
    description:
      - V(auto) takes the base from wherever it can be had.
      - V(registry) insists on a registry; V(bootstrap) never asks one.
    type: str
    choices: [auto, registry, bootstrap]
    default: auto
  base_name:
    description: The name of the base image, without its tag.
    type: str
    default: ctsync-base
  cache_dir:
    description: Where the base tarball and the log (C(image.log)) are kept.
    type: path
    required: true
  dockerfile:
    description: The recipe of the node image. Its build argument C(BASE) names the base image.
    type: str
  mirror:
    description:
      - A Debian mirror to bootstrap from.
      - Without it the mirrors are those that this machine's own apt uses, or Debian's default.
    type: str
  name:
    description: The name of the node image, without its tag.
    type: str
    default: ctsync-node
  registry_timeout:
    description: How many seconds a registry has before it must say the first word.
    type: int
    default: 8
  state:
    description: V(absent) removes the node image, in all its versions, and the base image.
    type: str
    choices: [present, absent]
    default: present
  suite:
    description: The Debian release.
    type: str
    default: bookworm
seealso:
  - module: ctsync.ha_firewall.lab_engine
  - module: ctsync.ha_firewall.lab_nodes
"""

EXAMPLES = r"""
- name: Build the node image
  ctsync.ha_firewall.lab_image:
    dockerfile: "{{ lookup('ansible.builtin.file', 'Dockerfile') }}"
    cache_dir: ~/.cache/ctsync-lab
"""

RETURN = r"""
image:
  description: The node image's name and tag.
  returned: state is present
  type: str
  sample: ctsync-node:bookworm-0f1e2d3c4b5a
base_source:
  description: Where the base image came from; V(none) when the node image was there already.
  returned: state is present
  type: str
  sample: bootstrap
would_build:
  description: Whether the image was missing, so that it was built, or in check mode would be.
  returned: state is present
  type: bool
  sample: false
log:
  description: The log of the long steps, on the controller.
  returned: state is present
  type: str
  sample: /root/.cache/ctsync-lab/image.log
"""

import os
import shutil

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.ctsync.ha_firewall.plugins.module_utils import _lab

PROXIES = ("http_proxy", "https_proxy", "no_proxy")
IMPORT_CHANGES = ["--change", 'CMD ["/sbin/init"]', "--change", "ENV container=docker"]
ROOM = 2 * 1024**3  # bytes that a bootstrap needs


def import_tarball(tarball: str, tag: str) -> None:
    """Make an image of a zstd-compressed tarball.

    :raises LabError: with what zstd or docker said.
    """
    problem = _lab.run_pipe(["zstd", "-dc", tarball], ["docker", "import", *IMPORT_CHANGES, "-", tag])
    if problem:
        raise _lab.LabError(f"import of {tarball} failed: {problem}")


def bootstrap(suite: str, mirror: str | None, tarball: str, log: str) -> None:
    """Make a base tarball out of Debian's packages.

    :raises LabError: with mmdebstrap's last words.
    """
    _lab.install_packages(_lab.run_command, ["mmdebstrap", "zstd"], log=log)
    if mirror:
        sources = [mirror]
    else:
        line = "$(SITE)|$(ORIGIN)|$(COMPONENT)|$(CODENAME)"
        shown = _lab.run_command(["apt-get", "indextargets", "--format", line, "Created-By: Packages"])
        sources = _lab.apt_lines(shown.out, suite)
    memory = "/dev/shm"
    fast = os.path.isdir(memory) and shutil.disk_usage(memory).free > ROOM
    command = ["mmdebstrap", "--variant=minbase", "--aptopt=Acquire::Languages none"]
    part = f"{tarball}.part.tar"
    try:
        made = _lab.run_command(
            [*command, suite, part, *sources], timeout=1200, log=log, env={"TMPDIR": memory} if fast else None
        )
        _lab.must(made, f"mmdebstrap {suite} (log: {log})")
        packed = _lab.run_command(["zstd", "-q", "-3", "-f", part, "-o", f"{tarball}.part"], timeout=600)
        _lab.must(packed, "zstd")
        os.replace(f"{tarball}.part", tarball)
    finally:
        for leftover in (part, f"{tarball}.part"):
            if os.path.exists(leftover):
                os.unlink(leftover)


def get_base(params: dict, tag: str, log: str) -> str:
    """Make sure of the base image; returns where it came from."""
    tarball = os.path.join(params["cache_dir"], f"base-{params['suite']}.tar.zst")
    docker = _lab.Docker()
    for source in _lab.base_sources(params["base"], bool(docker.image_id(tag)), os.path.exists(tarball)):
        if source == "cache":
            _lab.install_packages(_lab.run_command, [] if shutil.which("zstd") else ["zstd"], log=log)
            import_tarball(tarball, tag)
        elif source == "registry":
            wanted = f"debian:{params['suite']}"
            if not docker.image_id(wanted) and not _lab.pull(wanted, log, params["registry_timeout"]):
                continue
            docker.do("tag", wanted, tag)
        elif source == "bootstrap":
            bootstrap(params["suite"], params["mirror"], tarball, log)
            import_tarball(tarball, tag)
        return source
    raise _lab.LabError(f"no registry gave debian:{params['suite']}, and base is {params['base']}; log: {log}")


def build(params: dict, base: str, tag: str, log: str) -> None:
    """Build the node image, with the classic builder where the client has no other."""
    has_buildx = _lab.run_command(["docker", "buildx", "version"]).rc == 0
    command = ["docker", "build", "--network", "host", "--build-arg", f"BASE={base}", "--tag", tag]
    for name in PROXIES:
        if os.environ.get(name):
            command += ["--build-arg", f"{name}={os.environ[name]}"]
    built = _lab.run_command(
        [*command, "-"],
        stdin=params["dockerfile"].encode(),
        timeout=1200,
        log=log,
        env={"DOCKER_BUILDKIT": "1" if has_buildx else "0"},
    )
    _lab.must(built, f"docker build (log: {log})")


def present(module: AnsibleModule) -> dict:
    """Make sure of the node image; returns the module's result."""
    params, docker = module.params, _lab.Docker()
    tag = _lab.node_tag(params["name"], params["suite"], params["dockerfile"])
    log = os.path.join(params["cache_dir"], "image.log")
    result = {"changed": False, "image": tag, "would_build": False, "base_source": "none", "log": log}
    if docker.image_id(tag):
        return result
    result["changed"] = result["would_build"] = True
    if not module.check_mode:
        os.makedirs(params["cache_dir"], mode=0o700, exist_ok=True)
        base = f"{params['base_name']}:{params['suite']}"
        result["base_source"] = get_base(params, base, log)
        build(params, base, tag, log)
        docker.do("tag", tag, f"{params['name']}:{params['suite']}")
    return result


def absent(module: AnsibleModule) -> dict:
    """Remove the images; returns the module's result."""
    docker = _lab.Docker()
    if not docker.answers():
        return {"changed": False}
    names = []
    for name in (module.params["name"], module.params["base_name"]):
        names += docker.do("images", "--format", "{{.Repository}}:{{.Tag}}", name).split()
    users = docker.do("ps", "--all", "--filter", f"label={_lab.LABEL_LAB}", "--format", "{{.Names}}").split()
    if names and users:
        raise _lab.LabError(f"the images are in use by nodes of another lab, remove that first: {', '.join(users)}")
    if names and not module.check_mode:
        docker.do("image", "rm", *names)
    return {"changed": bool(names)}


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "base": {"type": "str", "choices": ["auto", "registry", "bootstrap"], "default": "auto"},
            "base_name": {"type": "str", "default": "ctsync-base"},
            "cache_dir": {"type": "path", "required": True},
            "dockerfile": {"type": "str"},
            "mirror": {"type": "str"},
            "name": {"type": "str", "default": "ctsync-node"},
            "registry_timeout": {"type": "int", "default": 8},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "suite": {"type": "str", "default": "bookworm"},
        },
        required_if=[("state", "present", ["dockerfile"])],
        supports_check_mode=True,
    )
    act = present if module.params["state"] == "present" else absent
    try:
        result = act(module)
    except _lab.LabError as error:
        module.fail_json(msg=str(error))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
