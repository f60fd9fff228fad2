# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Lists keep their order: what is made of them is written into files, and a second run must change none."""

from __future__ import annotations

import pathlib
import re

import pytest
from ansible.plugins.filter import mathstuff

ROLES = pathlib.Path(__file__).parents[3] / "roles"
SETS = re.compile(r"\|\s*(difference|intersect|symmetric_difference|union)\(")


@pytest.mark.parametrize("role", sorted(path.name for path in ROLES.iterdir()))
def test_no_default_comes_out_of_a_set(role):
    text = (ROLES / role / "defaults" / "main.yml").read_text(encoding="utf-8")
    assert SETS.findall(text) == []


def test_that_is_what_they_are():
    """Ansible's filters for sets give lists whose order is that of the hashes, another one in each process."""
    assert set(SETS.findall("{{ a | difference([b]) }} {{ a |union(b) }}")) <= set(dir(mathstuff))
    assert len(SETS.findall("{{ a | difference([b]) }} {{ a |union(b) }}")) == 2
