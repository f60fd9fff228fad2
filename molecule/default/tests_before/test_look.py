# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Before site.yml: what the nodes consist of is written down, for the test of the removal to compare with."""

from __future__ import annotations

import os
import pathlib

import pytest
import testinfra

PREFIX = os.environ["CTSYNC_LAB_PREFIX"]
LOOK = pathlib.Path(__file__).parents[1] / "files" / "look.sh"


@pytest.mark.parametrize("name", ["fw1", "fw2"])
def test_what_the_node_consists_of_is_known(name):
    host = testinfra.get_host(f"docker://{PREFIX}{name}")
    seen = host.check_output("sh -c %s", LOOK.read_text(encoding="utf-8"))
    assert "/etc/passwd 644 root root" in seen
    path = pathlib.Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"]) / f"bare-{name}.txt"
    path.write_text(seen, encoding="utf-8")
