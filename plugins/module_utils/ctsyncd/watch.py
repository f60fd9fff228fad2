# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the daemon's loop waits for: the kernel's events, the sync links, and all else, which seldom has anything."""

from __future__ import annotations

import select

from .link import Link

READ = select.EPOLLIN
WRITE = select.EPOLLOUT
_MOST = 16  # descriptors that one wait tells of; the next one tells of the others


class Watch:
    """Outside of a window of events everything is waited for, in it everything but them: no socket is registered anew.

    Links are found by their descriptors, without the layers of :mod:`selectors`: nearly every wake-up is for one.
    ``link.watched``: for what a link is registered, 0 for nothing.
    """

    def __init__(self, events: int, rest: int) -> None:
        """``events``: descriptor of the event socket; ``rest``: of a selector with all that is not a link."""
        self.links: dict[int, Link] = {}  # by descriptor
        self._all = select.epoll()
        self._others = select.epoll()
        self._all.register(events, READ)
        for poller in (self._all, self._others):
            poller.register(rest, READ)

    def all(self, wait: float) -> list[int]:
        """Descriptors that are ready, after at most ``wait`` seconds."""
        return [fd for fd, _mask in self._all.poll(wait, _MOST)]

    def others(self, wait: float) -> list[int]:
        """The same without the event socket."""
        return [fd for fd, _mask in self._others.poll(wait, _MOST)]

    def watch(self, link: Link, wanted: int) -> None:
        """Wait for a link to be readable (READ), writable (WRITE), both, or neither.  A closed link is forgotten."""
        if not link.is_open:
            if link.watched:  # epoll forgot the descriptor when it was closed
                self.links = {fd: other for fd, other in self.links.items() if other is not link}
                link.watched = 0
            return
        if wanted == link.watched:
            return
        fd = link.fileno()
        for poller in (self._all, self._others):
            if not wanted:
                poller.unregister(fd)
            elif link.watched:
                poller.modify(fd, wanted)
            else:
                poller.register(fd, wanted)
        self.links[fd] = link
        link.watched = wanted

    def close(self) -> None:
        self._all.close()
        self._others.close()
