#!/usr/bin/env python3
# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Say in a few lines what the failover test found: ``verdict.py FOLDER`` with the folder of its report.

Exit code 0 when the verdict is good, 1 otherwise, also when there is no report.
"""

from __future__ import annotations

import json
import pathlib
import sys


def main() -> int:
    folder = pathlib.Path(sys.argv[1])
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        verdict = str(report["verdict"])
    except (OSError, ValueError, KeyError) as error:
        sys.stdout.write(f"\n  No verdict: {folder}/report.json: {error}\n\n")
        return 1
    sys.stdout.write(f"\n  Verdict: {verdict.upper()}\n  Report:  {(folder / 'report.html').resolve()}\n\n")
    return 0 if verdict.lower() in ("pass", "passed", "ok") else 1


if __name__ == "__main__":
    raise SystemExit(main())
