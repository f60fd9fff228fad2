# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Fixtures of the tests on the real kernel."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Callable, Iterator

import pytest
from integration import netns
from integration.cluster import Cluster
from integration.load import Load
from integration.sealed import Machine


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests in namespaces need root and the tools that make them."""
    missing = [tool for tool in ("ip", "conntrack", "iptables-restore", "ip6tables-restore") if not shutil.which(tool)]
    reason = "needs root" if os.geteuid() else f"needs {', '.join(missing)}" if missing else ""
    if reason:
        for item in items:
            if item.get_closest_marker("netns"):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(params=["nft", "legacy"])
def backend(request: pytest.FixtureRequest) -> str:
    """Which of both iptables is used, one after the other."""
    if not shutil.which(f"iptables-{request.param}"):
        pytest.skip(f"iptables-{request.param} is not installed")
    return str(request.param)


@pytest.fixture
def machine() -> Iterator[Machine]:
    """A machine sealed off from this one."""
    with Machine() as made:
        yield made


@pytest.fixture
def net() -> Iterator[netns.Net]:
    """An empty set of namespaces."""
    with netns.net() as made:
        yield made


@pytest.fixture
def pair() -> Iterator[netns.Pair]:
    """a -- (fw1 | fw2) -- b; see :class:`netns.Pair`."""
    with netns.pair() as made:
        yield made


@pytest.fixture
def cluster(pair: netns.Pair, tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    """A factory of the pair's daemons: options are those of their configuration."""
    with contextlib.ExitStack() as stack:
        yield lambda **options: stack.enter_context(contextlib.closing(Cluster(pair, tmp_path, **options)))


@pytest.fixture
def load(pair: netns.Pair, tmp_path: Path) -> Iterator[Callable[..., Load]]:
    """A factory of the pair under load; see :class:`Load`."""
    with contextlib.ExitStack() as stack:
        yield lambda *size, **options: stack.enter_context(contextlib.closing(Load(pair, tmp_path, *size, **options)))
