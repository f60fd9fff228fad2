# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The daemon's archive: complete, reproducible, runnable without anything else."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from ansible_collections.ctsync.ha_firewall.plugins.module_utils import _files, _zipapp
from ansible_collections.ctsync.ha_firewall.plugins.module_utils import ctsyncd as daemon

ROOT = Path(__file__).resolve().parents[4]
PACKAGE = ROOT / "plugins" / "module_utils" / "ctsyncd"
PYTHON = "/usr/bin/python3"


@pytest.fixture(scope="module")
def sources() -> dict[str, bytes]:
    return _zipapp.package_sources(daemon)


def test_sources_are_the_files_of_the_package(sources):
    wanted = {f"ctsyncd/{path.relative_to(PACKAGE)}": path.read_bytes() for path in PACKAGE.rglob("*.py")}
    assert sources == wanted
    assert _zipapp.missing_files(sources) == []


def test_a_file_that_was_not_shipped_is_named(sources):
    some = {name: data for name, data in sources.items() if name not in ("ctsyncd/wire.py", "ctsyncd/__main__.py")}
    assert _zipapp.missing_files(some) == ["ctsyncd/__main__.py", "ctsyncd/wire.py"]


def test_same_sources_same_bytes_and_every_difference_another_digest(sources):
    app = _zipapp.build(sources, PYTHON, "1.2.3")
    backwards = dict(reversed(list(sources.items())))
    assert _zipapp.build(backwards, PYTHON, "1.2.3") == app
    changed = {**sources, "ctsyncd/cli.py": sources["ctsyncd/cli.py"] + b"\n"}
    renamed = {("ctsyncd/cli2.py" if name == "ctsyncd/cli.py" else name): data for name, data in sources.items()}
    others = [
        _zipapp.build(changed, PYTHON, "1.2.3"),
        _zipapp.build(renamed, PYTHON, "1.2.3"),
        _zipapp.build(sources, "/usr/bin/python3.11", "1.2.3"),
    ]
    assert len({app.file_name, *(other.file_name for other in others)}) == 4
    with zipfile.ZipFile(io.BytesIO(app.data)) as archive:
        entries = archive.infolist()
    assert [entry.filename for entry in entries] == sorted(entry.filename for entry in entries)
    assert {(entry.compress_type, entry.date_time, entry.create_system) for entry in entries} == {
        (zipfile.ZIP_STORED, (1980, 1, 1, 0, 0, 0), 3)
    }


def test_digest_and_version_can_be_read_back(sources, tmp_path):
    app = _zipapp.build(sources, PYTHON, "1.2.3")
    path = tmp_path / app.file_name
    path.write_bytes(app.data)
    assert _zipapp.read_build(str(path)) == {"digest": app.digest, "version": "1.2.3"}
    path.write_bytes(app.data[: len(app.data) // 2])
    assert _zipapp.read_build(str(path)) == {}
    assert _zipapp.read_build(str(tmp_path / "nothing")) == {}


@pytest.mark.parametrize("interpreter", ["python3", "/usr/bin/env python3", "/" + "x" * 200, "/usr/bin/python3\n"])
def test_interpreter_that_no_kernel_would_run_is_refused(interpreter):
    with pytest.raises(ValueError, match=r"absolute path|too long"):
        _zipapp.shebang(interpreter)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """What ``make ctsyncd`` writes."""
    output = tmp_path_factory.mktemp("dist") / "ctsyncd"
    command = [sys.executable, "-I", str(ROOT / "tools" / "build_zipapp.py"), str(output), "--interpreter", PYTHON]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert f"ctsyncd {daemon.__version__}, digest " in shown
    return output


@pytest.mark.parametrize("command", [[], [sys.executable, "-I"], [sys.executable, "-I", "-S"]])
def test_archive_runs_by_itself_and_without_site_packages(built, command):
    result = subprocess.run(
        [*command, str(built), "-v"],
        check=False,
        capture_output=True,
        text=True,
        cwd="/",
        env={"PATH": os.environ["PATH"]},
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, f"ctsyncd {daemon.__version__}\n", "")


def test_every_room_imports_from_the_archive_with_the_standard_library_alone(built):
    names = [f"ctsyncd.{path.stem}" for path in sorted(PACKAGE.glob("*.py")) if not path.stem.startswith("__")]
    code = (
        f"import sys, importlib; sys.path[:0] = [{str(built)!r}]\nfor name in {names!r}: importlib.import_module(name)"
    )
    result = subprocess.run([sys.executable, "-I", "-S", "-c", code], check=False, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_process_started_by_the_link_goes_on_importing_its_own_version(sources, tmp_path):
    """An upgrade switches the link under a running process, which must not read the new archive with old offsets."""
    waiting = (
        b"import sys\n\ndef main():\n    sys.stdout.write('up\\n')\n    sys.stdout.flush()\n    sys.stdin.readline()\n"
    )
    waiting += b"    from . import late\n    sys.stdout.write(late.WHO)\n    return 0\n"
    base = {**sources, "ctsyncd/cli.py": waiting}
    paths = []
    for who in ("old", "new"):
        app = _zipapp.build(
            {**base, "ctsyncd/a.py": who.encode() * 500, "ctsyncd/late.py": f"WHO = '{who}'\n".encode()}, PYTHON, who
        )
        path = tmp_path / app.file_name
        _files.write(str(path), app.data, 0o755, uid=os.getuid(), gid=os.getgid())
        paths.append(str(path))
    link = str(tmp_path / "ctsyncd")
    _files.link(link, paths[0])
    with subprocess.Popen(
        [sys.executable, "-I", link], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "up\n"
        _files.link(link, paths[1])
        out, _ = process.communicate("go\n", timeout=60)
    assert (process.returncode, out) == (0, "old")
