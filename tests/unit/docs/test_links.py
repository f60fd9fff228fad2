# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Links between the documents lead to a file, and to a heading in it; every document can be found from the README."""

from __future__ import annotations

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[3]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\((?!https?:)([^)\s#]*)(?:#([^)\s]*))?\)")


def text_of(page):
    """Without blocks of code, in which a bracket is no link and a line with # no heading."""
    return re.sub(r"(?ms)^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"))


def anchors(page):
    """As GitHub makes them: of headings that are alike the second one gets -1, and so on."""
    found = {}
    for heading in re.findall(r"(?m)^#+ +(.*)$", text_of(page)):
        name = re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-")
        found[name] = found.get(name, -1) + 1
    return {name if not number else f"{name}-{number}" for name, last in found.items() for number in range(last + 1)}


def broken(page):
    found = []
    for target, anchor in LINK.findall(text_of(page)):
        path = (page.parent / target).resolve() if target else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            found.append(f"{target}#{anchor}" if anchor else target)
    return found


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_links_lead_somewhere(page):
    assert broken(page) == []


def test_every_document_is_reached_from_the_readme():
    linked = {(ROOT / target).resolve() for target, _ in LINK.findall(text_of(ROOT / "README.md"))}
    assert [page.name for page in PAGES[1:] if page not in linked] == []


def test_a_broken_link_is_found(tmp_path):
    """The control."""
    page = tmp_path / "page.md"
    page.write_text("# One\n[a](#one) [b](#two) [c](gone.md) [d](page.md#one)\n```\n[e](nowhere.md)\n```\n")
    assert broken(page) == ["#two", "gone.md"]
