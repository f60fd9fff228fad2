#!/usr/bin/env python3
# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Write the daemon as one executable file, the same that the module ctsyncd installs: ``build_ctsyncd.py FILE``."""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "collections"))

from ansible_collections.ctsync.ha_firewall.plugins.module_utils import _zipapp, ctsyncd


def main() -> int:
    target = sys.argv[1]
    archive = _zipapp.build(_zipapp.package_sources(ctsyncd), "/usr/bin/python3", ctsyncd.__version__)
    os.makedirs(os.path.dirname(os.path.abspath(target)), exist_ok=True)
    with open(f"{target}.new", "wb") as stream:
        stream.write(archive.data)
    os.chmod(f"{target}.new", 0o755)
    os.replace(f"{target}.new", target)
    sys.stdout.write(f"{target}: version {archive.version}, digest {archive.digest}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
