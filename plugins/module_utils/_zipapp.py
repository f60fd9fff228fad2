# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Build the daemon's zipapp from the sources of its package, the same bytes every time.

Private to this collection.  The sources come out of whatever the package was imported from: a checkout, an installed
collection or the payload that Ansible shipped to the target.  Nothing outside the standard library.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.resources
import io
import json
import zipfile
from types import ModuleType
from typing import Any, NamedTuple

PACKAGE = "ctsyncd"
REQUIRED_FILES = ("__init__.py", "__main__.py", "cli.py")
BUILD_FILE = "BUILD.json"
_DATE = (1980, 1, 1, 0, 0, 0)  # the first moment that a zip archive can express
_MODE = 0o100644
_SHEBANG_BYTES = 127  # <linux/binfmts.h>: BINPRM_BUF_SIZE was 128 until Linux 5.1

# zipimport keeps the path it was started with and opens it again for each import.  Behind a symbolic link that
# would be another archive after an upgrade, so the first thing is to settle on the file behind the link.
_MAIN = """\
import os
import sys

sys.path[0] = os.path.realpath(sys.path[0])

from ctsyncd.cli import main

if __name__ == "__main__":
    sys.exit(main())
"""


class Zipapp(NamedTuple):
    """A built archive: ``data`` is the file, ``digest`` names its contents (SHA-256, hexadecimal)."""

    data: bytes
    digest: str
    version: str

    @property
    def file_name(self) -> str:
        """``ctsyncd-<first 12 digits of the digest>.pyz``."""
        return f"{PACKAGE}-{self.digest[:12]}.pyz"


def package_sources(package: ModuleType) -> dict[str, bytes]:
    """Every ``.py`` file of ``package`` as ``{"ctsyncd/cli.py": b"..."}``, wherever the package lives."""
    found: dict[str, bytes] = {}

    def walk(node: Any, prefix: str) -> None:
        for child in sorted(node.iterdir(), key=lambda entry: str(entry.name)):
            if child.is_dir():
                if child.name != "__pycache__":
                    walk(child, f"{prefix}{child.name}/")
            elif child.name.endswith(".py"):
                found[prefix + child.name] = child.read_bytes()

    walk(importlib.resources.files(package), PACKAGE + "/")
    return found


def missing_files(sources: dict[str, bytes]) -> list[str]:
    """What ``sources`` lacks: the files that every build needs, and modules that one of its files imports.

    Ansible ships what it finds by reading import statements; this is the check that it found everything.
    """
    missing = {f"{PACKAGE}/{name}" for name in REQUIRED_FILES} - set(sources)
    for path, source in sources.items():
        folder = path.split("/")[:-1]
        for node in ast.walk(ast.parse(source, path)):
            if not isinstance(node, ast.ImportFrom) or not node.level:
                continue
            base = "/".join([*folder[: len(folder) - node.level + 1], *(node.module or "").split(".")]).rstrip("/")
            if f"{base}.py" in sources:
                continue
            if f"{base}/__init__.py" not in sources:
                missing.add(f"{base}.py")
                continue
            names = {alias.name for alias in node.names} - _names(sources[f"{base}/__init__.py"])
            missing.update(f"{base}/{name}.py" for name in names if not _has_module(sources, f"{base}/{name}"))
    return sorted(missing)


def _has_module(sources: dict[str, bytes], path: str) -> bool:
    return f"{path}.py" in sources or f"{path}/__init__.py" in sources


def _names(source: bytes) -> set[str]:
    """What a package's ``__init__.py`` defines by itself."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


def shebang(interpreter: str) -> bytes:
    """The first line of the archive; :class:`ValueError` when the kernel could not run it.

    ``-I`` keeps the environment, the working directory and the user's site-packages out; not ``-S``, because
    distributions put python3-cryptography where only ``site`` finds it.
    """
    line = f"#!{interpreter} -I\n".encode()
    if not interpreter.startswith("/") or interpreter.split() != [interpreter]:
        raise ValueError(f"{interpreter!r} is not an absolute path without spaces")
    if len(line) > _SHEBANG_BYTES:
        raise ValueError(f"{interpreter!r} is too long for the first line of a script ({_SHEBANG_BYTES} bytes)")
    return line


def build(sources: dict[str, bytes], interpreter: str, version: str) -> Zipapp:
    """Build the archive: sorted, stored uncompressed, fixed dates and modes; the same input gives the same bytes."""
    first_line = shebang(interpreter)
    files = dict(sources)
    files["__main__.py"] = _MAIN.encode()
    digest = hashlib.sha256(first_line)
    for name in sorted(files):
        for part in (name.encode(), files[name]):
            digest.update(len(part).to_bytes(8, "big"))
            digest.update(part)
    build_info = {"digest": digest.hexdigest(), "version": version}
    files[BUILD_FILE] = (json.dumps(build_info, sort_keys=True) + "\n").encode()
    stream = io.BytesIO()
    stream.write(first_line)
    with zipfile.ZipFile(stream, "a", zipfile.ZIP_STORED) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, _DATE)
            entry.create_system = 3  # Unix, also when built elsewhere
            entry.external_attr = _MODE << 16
            archive.writestr(entry, files[name])
    return Zipapp(stream.getvalue(), digest.hexdigest(), version)


def read_build(path: str) -> dict[str, str]:
    """``{"digest": ..., "version": ...}`` of an installed archive; empty when there is none or it is broken."""
    try:
        with zipfile.ZipFile(path) as archive:
            found = json.loads(archive.read(BUILD_FILE))
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        return {}
    return {key: str(found[key]) for key in ("digest", "version") if key in found} if isinstance(found, dict) else {}
