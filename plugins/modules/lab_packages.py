#!/usr/bin/python
# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: lab_packages
short_description: Keep a small Debian repository for the lab's nodes
version_added: 0.1.0
description:
  - The lab's nodes have no way to the outside. This module downloads packages, with whatever they need that the
    node image does not have, and writes them with an index to a folder that the nodes mount and use as their
    only package source.
  - Nothing is installed. The download runs in a container of the node image that is thrown away.
author:
  - The ctsync authors (@ctsync)
requirements:
  - a Docker engine
extends_documentation_fragment:
  - ctsync.ha_firewall.attributes
attributes:
  diff_mode:
    support: none
options:
  image:
    description: The node image, name and tag.
    type: str
    required: true
  names:
    description: The packages that the nodes may want to install.
    type: list
    elements: str
    required: true
  path:
    description:
      - The folder, made where missing. It gets two folders; C(pool), to be mounted at C(/srv/ctsync-packages), and
        C(sources), to be mounted in place of C(/etc/apt/sources.list.d).
    type: path
    required: true
seealso:
  - module: ctsync.ha_firewall.lab_image
"""

EXAMPLES = r"""
- name: Offer the nodes what the firewalls need
  ctsync.ha_firewall.lab_packages:
    image: ctsync-node:bookworm
    names: [keepalived, python3-cryptography, python3-pyroute2]
    path: ~/.cache/ctsync-lab/packages
"""

RETURN = r"""
files:
  description: The package files in the repository.
  returned: success
  type: list
  elements: str
  sample: [keepalived_2.2.7-1+b2_amd64.deb]
"""

import hashlib
import json
import os
import shutil

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.ctsync.ha_firewall.plugins.module_utils import _lab

SOURCE = "deb [trusted=yes] file:/srv/ctsync-packages ./\n"
# Runs in the throw-away container: download, then say each file's control paragraph.
SCRIPT = """set -e
apt-get -qq update >&2
apt-get -qq -y --no-install-recommends --download-only \\
  -o APT::Sandbox::User=root -o Dir::Cache::archives=/out/ install "$@" >&2
rm -rf /out/partial /out/lock
cd /out
for file in *.deb; do echo ">>> $file"; dpkg-deb --field "$file"; done
"""


def stamp_of(image_id: str, names: list[str]) -> str:
    """What the repository was made from."""
    return json.dumps({"image": image_id, "names": sorted(names)})


def read_text(path: str) -> str:
    """A file's text, "" when there is none."""
    try:
        with open(path, encoding="utf-8") as stream:
            return stream.read()
    except FileNotFoundError:
        return ""


def write_text(path: str, text: str) -> None:
    """Write a file that everybody may read."""
    with open(path, "w", encoding="utf-8") as stream:
        stream.write(text)
    os.chmod(path, 0o644)


def fetch(image: str, names: list[str], pool: str) -> None:
    """Fill the pool with packages and their index.

    The folder itself stays the same one (running nodes have it mounted); its old contents go.
    """
    for entry in os.scandir(pool):
        shutil.rmtree(entry.path) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)
    command = ["docker", "run", "--rm", "--network", "host", "--volume", f"{pool}:/out", "--entrypoint", "/bin/sh"]
    for name in ("http_proxy", "https_proxy", "no_proxy"):
        if os.environ.get(name):
            command += ["--env", f"{name}={os.environ[name]}"]
    said = _lab.must(
        _lab.run_command([*command, image, "-c", SCRIPT, "sh", *names], timeout=600), f"download of {' '.join(names)}"
    )
    files = {}
    for name, control in _lab.split_controls(said).items():
        with open(os.path.join(pool, name), "rb") as stream:
            data = stream.read()
        files[name] = (control, len(data), hashlib.sha256(data).hexdigest())
    index = _lab.packages_index(files)
    write_text(os.path.join(pool, "Packages"), index)
    write_text(os.path.join(pool, "Release"), _lab.release_file(index))


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "image": {"type": "str", "required": True},
            "names": {"type": "list", "elements": "str", "required": True},
            "path": {"type": "path", "required": True},
        },
        supports_check_mode=True,
    )
    path, names = module.params["path"], module.params["names"]
    pool, sources = os.path.join(path, "pool"), os.path.join(path, "sources")
    changed = False
    try:
        stamp = stamp_of(_lab.Docker().image_id(module.params["image"]), names)
        if read_text(os.path.join(path, "stamp")) != stamp:
            changed = True
            if not module.check_mode:
                for folder in (pool, sources):
                    os.makedirs(folder, mode=0o755, exist_ok=True)
                    os.chmod(folder, 0o755)
                fetch(module.params["image"], names, pool)
                write_text(os.path.join(sources, "ctsync-lab.list"), SOURCE)
                write_text(os.path.join(path, "sources.list"), "# The lab's only source is in sources.list.d\n")
                write_text(os.path.join(path, "stamp"), stamp)
    except _lab.LabError as error:
        module.fail_json(msg=str(error))
    files = sorted(name for name in os.listdir(pool) if name.endswith(".deb")) if os.path.isdir(pool) else []
    module.exit_json(changed=changed, files=files)


if __name__ == "__main__":
    main()
