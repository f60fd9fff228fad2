# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""docs/runbook.md has an entry for everything that the daemon and the playbooks say, and for every counter."""

from __future__ import annotations

import importlib.util
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[3]
SPEC = importlib.util.spec_from_file_location("ctsync_reasons", pathlib.Path(__file__).with_name("reasons.py"))
reasons = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(reasons)

PAGE = (ROOT / "docs/runbook.md").read_text(encoding="utf-8")
LINES = PAGE.splitlines()
HEADINGS = [line for line in LINES if line.startswith("### ")]
SECOND = [line for line in LINES if line.startswith("And `")]  # one more of a section's kind


def is_in(line, text):
    """All fixed parts of the sentence, in their order."""
    at = 0
    for part in reasons.parts(text):
        at = line.find(part, at)
        if at < 0:
            return False
        at += len(part)
    return True


def missing(texts, lines):
    return sorted({text.replace("\0", "{}") for text in texts if not any(is_in(line, text) for line in lines)})


def test_it_is_known_where_reasons_come_from():
    assert reasons.gathered() == reasons.GATHERED, "a new source of reasons: add its function to VERDICTS, and this"


def test_every_reason_of_the_verdict_has_a_section():
    found = reasons.verdicts()
    assert len(found) > 30
    assert missing([text for text in found if len(text.split()) > 2], [*HEADINGS, *SECOND]) == []
    assert missing(found, LINES) == []


SAID = {name: getattr(reasons, name)() for name in ("verify", "logged", "pair", "preflight", "playbooks")}
LEAST = {"verify": 10, "logged": 15, "pair": 9, "preflight": 55, "playbooks": 15}


@pytest.mark.parametrize("kind", SAID)
def test_everything_that_is_said_has_an_entry(kind):
    assert len(SAID[kind]) >= LEAST[kind]
    assert missing(SAID[kind], LINES) == []


def test_every_counter_is_explained():
    named = set(re.findall(r"`([a-z_]+)`", PAGE))
    found = reasons.counters()
    assert len(found) > 80
    unknown = set()
    for counter in found:
        pattern = re.compile("[a-z_]+".join(map(re.escape, counter.split("\0"))) + ("" if "\0" in counter else r"\Z"))
        if not any(pattern.match(name) for name in named):
            unknown.add(counter)
    assert unknown == set()


def test_a_reason_without_an_entry_is_noticed():
    """The control."""
    assert missing(["the moon is full over \0"], LINES) == ["the moon is full over {}"]
    assert missing(["no session with \0: \0"], HEADINGS) == []
