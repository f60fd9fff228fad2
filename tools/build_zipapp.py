#!/usr/bin/env python3
# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Write the daemon as one executable file, the same bytes that the module ``ctsyncd`` installs.

Needs nothing but Python: ``python3 tools/build_zipapp.py dist/ctsyncd`` (what ``make ctsyncd`` runs).
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "collections"))

from ansible_collections.ctsync.ha_firewall.plugins.module_utils import _zipapp
from ansible_collections.ctsync.ha_firewall.plugins.module_utils import ctsyncd as daemon


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "output", type=Path, nargs="?", default=Path("dist/ctsyncd"), help="file to write (%(default)s)"
    )
    parser.add_argument("--interpreter", default="/usr/bin/python3", help="Python that runs it (%(default)s)")
    chosen = parser.parse_args(arguments)
    sources = _zipapp.package_sources(daemon)
    missing = _zipapp.missing_files(sources)
    if missing:
        parser.error(f"the checkout lacks {', '.join(missing)}")
    try:
        app = _zipapp.build(sources, chosen.interpreter, daemon.__version__)
    except ValueError as error:
        parser.error(f"--interpreter: {error}")
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    candidate = chosen.output.with_name(f".{chosen.output.name}.{os.getpid()}")
    candidate.write_bytes(app.data)
    candidate.chmod(0o755)
    candidate.replace(chosen.output)  # a running one keeps its own file
    sys.stdout.write(f"{chosen.output}: ctsyncd {app.version}, digest {app.digest}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
