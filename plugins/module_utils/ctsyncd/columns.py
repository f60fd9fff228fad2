# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Many ctnetlink messages at once: events and dumps to rows, rows to requests.  No I/O."""

from __future__ import annotations

from . import ctnetlink
from .errors import NetlinkError
from .flow import Flow, merge
from .rows import Changes, is_partial, pack_value, unpack

# <linux/netlink.h>: a message of a subsystem has it in the high byte of its type
_CT_NEW = ctnetlink.NFNL_SUBSYS_CTNETLINK << 8 | ctnetlink.IPCTNL_MSG_CT_NEW
_CT_DELETE = ctnetlink.NFNL_SUBSYS_CTNETLINK << 8 | ctnetlink.IPCTNL_MSG_CT_DELETE


class Gathering:
    """:class:`Changes` that are being put together, change by change in the order in which they happened."""

    def __init__(self) -> None:
        self.rows: dict[int, dict[bytes, bytes]] = {}
        self.flows: dict[bytes, Flow] = {}
        self.gone: dict[bytes, None] = {}

    def row(self, key: bytes, value: bytes) -> None:
        """The flow is now as this row says."""
        known = self.flows.get(key)
        if known is None:
            self.rows.setdefault(len(key), {})[key] = value
        else:
            self.flows[key] = _newer(known, unpack(key, value))

    def flow(self, flow: Flow) -> None:
        """The flow is now as an event says that may have extras or leave something out."""
        key = flow.key
        if flow.mark is None:  # an event names every mark but 0 (ctnetlink_conntrack_event)
            flow = flow._replace(mark=0)
        if not needs_flow(flow):
            self.row(key, pack_value(flow))
            return
        known = self.flows.get(key)
        if known is None and (value := self.rows.get(len(key), _NONE).pop(key, None)) is not None:
            known = unpack(key, value)
        self.flows[key] = flow if known is None else _newer(known, flow)

    def end(self, key: bytes) -> None:
        """The flow ended."""
        self.rows.get(len(key), _NONE).pop(key, None)
        self.flows.pop(key, None)
        self.gone[key] = None

    def changes(self, events: int, lost: bool = False, more: bool = False) -> Changes:
        """What was put together."""
        rows = {key_len: known for key_len, known in self.rows.items() if known}
        return Changes(rows, list(self.flows.values()), list(self.gone), events, lost, more)


_NONE: dict[bytes, bytes] = {}  # stays empty


def needs_flow(flow: Flow) -> bool:
    """Is a row not enough for this flow?  It has extras, or leaves out what a row must say."""
    return (
        flow.labels is not None
        or flow.helper is not None
        or flow.master is not None
        or flow.seqadj is not None
        or flow.sctp_vtags is not None
        or is_partial(flow)
    )


def _newer(known: Flow, flow: Flow) -> Flow:
    """Another reply tuple is another flow."""
    return merge(known, flow) if known.reply == flow.reply else flow


class General:
    """The general way: every message is walked attribute by attribute and becomes a flow.

    ``malformed`` counts datagrams of events and messages of a dump that could not be decoded.
    """

    def __init__(self) -> None:
        self.malformed = 0

    def event(self, data: ctnetlink.Buffer, into: Gathering) -> tuple[int, bool]:
        """A datagram of events: how many were in it, and whether it says that others were lost."""
        events, lost = 0, False
        try:
            for message in ctnetlink.parse_messages(data):
                if message.flow is None:
                    lost |= message.kind == ctnetlink.Kind.OVERRUN
                    continue
                events += 1
                if message.kind == ctnetlink.Kind.DESTROY:
                    into.end(message.flow.key)
                else:
                    into.flow(message.flow)
        except NetlinkError:
            self.malformed += 1
        return events, lost
