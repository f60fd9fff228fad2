# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Where the flight recorder's stories are kept: the service's state directory (systemd.exec(5): ``STATE_DIRECTORY``).

A file is written by a thread of its own: a disk that hangs or is full costs the story, never the service.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable

KEPT = 20  # stories; the oldest are removed
SUFFIX = ".jsonl"


class Flights:
    """``directory``: empty where stories are not kept.  ``problem``: why the last one was not."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.problem = ""
        self.written = 0
        self._thread: threading.Thread | None = None

    def keep(self, role: str, lines: Callable[[], Iterable[str]]) -> None:
        """Begin to write a story, named by the time and the role in which it ended; ``lines`` is called at once."""
        if not self.directory:
            return
        if self._thread is not None and self._thread.is_alive():
            self.problem = f"flight recorder: {self.directory} does not answer: a story was not kept"
            return
        text = "\n".join(lines()) + "\n"
        name = f"{time.strftime('%Y-%m-%dT%H-%M-%SZ', time.gmtime())}-{role}"
        self._thread = threading.Thread(target=self._write, args=(name, text), name="flights", daemon=True)
        self._thread.start()

    def finish(self, patience_s: float) -> None:
        """Wait for the file that is being written, but not for ever."""
        if self._thread is not None:
            self._thread.join(patience_s)

    def _write(self, name: str, text: str) -> None:
        partial = os.path.join(self.directory, f".{name}.{os.getpid()}")
        try:
            with open(partial, "w", encoding="ascii") as stream:
                stream.write(text)
            os.replace(partial, os.path.join(self.directory, self._free(name)))
            self._tidy()
        except OSError as error:
            self.problem = f"flight recorder: cannot write to {self.directory}: {error.strerror}"
            with contextlib.suppress(OSError):
                os.unlink(partial)
        else:
            self.problem = ""
            self.written += 1

    def _free(self, name: str) -> str:
        """A name that is not taken: the clock may have been set back."""
        taken = set(os.listdir(self.directory))
        candidates = (f"{name}{f'-{number}' if number else ''}{SUFFIX}" for number in range(len(taken) + 1))
        return next(candidate for candidate in candidates if candidate not in taken)

    def _tidy(self) -> None:
        entries = [entry for entry in os.scandir(self.directory) if entry.name.endswith(SUFFIX)]
        for entry in sorted(entries, key=lambda entry: (entry.stat().st_mtime_ns, entry.name))[:-KEPT]:
            os.unlink(entry.path)
