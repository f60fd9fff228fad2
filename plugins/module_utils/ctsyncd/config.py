# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The daemon's configuration: one JSON object, read once, checked completely, then frozen.

The option tables below drive parsing, defaults, error texts and the reference in ``docs/ctsyncd.md``.
Units are in the option's name.  Secrets are never in here: ``keys`` names where to read them.
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import re
import types
from dataclasses import dataclass
from typing import Any, Callable, Mapping, NamedTuple, Union

from . import conditions
from .client import MAX_CONFIG_BYTES as MAX_BYTES
from .constants import IPPROTO_VRRP, MAX_KEYS, PROTOCOL_NAMES, TCP_CLOSE, TCP_ESTABLISHED, TCP_STATE_NAMES
from .errors import ConfigError

MAX_PEERS = 7
MAX_LINKS = 8

MODES = ("hot-standby", "external-cache")
UDP_CHOICES = ("replied", "all")
LOG_LEVELS = ("debug", "info", "warning", "error")

FILTER_TCP_STATES = TCP_STATE_NAMES[TCP_ESTABLISHED : TCP_CLOSE + 1]
FILTER_PROTOCOLS = {name: number for number, name in PROTOCOL_NAMES.items() if number != IPPROTO_VRRP}

_INTERFACE = re.compile(r"[!-$&-.0-9;-~]{1,15}")  # printable ASCII less / : %; IFNAMSIZ is 16 bytes with the final NUL
_NODE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_CREDENTIAL = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,254}")
_SUN_PATH_BYTES = 107  # <linux/un.h>: UNIX_PATH_MAX less the final NUL

Address = Union[ipaddress.IPv4Address, ipaddress.IPv6Address]
Network = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]


class _Required:
    def __repr__(self) -> str:
        return "required"


REQUIRED: Any = _Required()


class Option(NamedTuple):
    """One row of an option table.  ``minimum`` and ``maximum`` are inclusive and for integers.

    ``live``: a reload (SIGHUP) applies a change; ``handed``: ``ctsyncd keys`` does; any other needs a restart.
    """

    key: str
    kind: str
    default: Any
    help: str
    minimum: int = 0
    maximum: int = 0
    choices: tuple[str, ...] = ()
    live: bool = False
    handed: bool = False


class Peer(NamedTuple):
    """Another node; its addresses are in the order of this node's links."""

    node: str
    addresses: tuple[str, ...]


class Link(NamedTuple):
    """Our own end of the sync link."""

    interface: str
    address: str
    port: int

    @property
    def packed(self) -> bytes:
        """The address in network byte order (4 or 16 bytes)."""
        return ipaddress.ip_address(self.address).packed


class VirtualIp(NamedTuple):
    interface: str
    address: str

    @property
    def packed(self) -> bytes:
        """The address in network byte order (4 or 16 bytes)."""
        return ipaddress.ip_address(self.address).packed


class Mark(NamedTuple):
    """Connection marks whose bits under ``mask`` are ``value``."""

    value: int
    mask: int


class Filter(NamedTuple):
    """What is replicated; an empty list restricts nothing.  Protocols and TCP states are numbers."""

    protocols: tuple[int, ...] = ()
    addresses: tuple[Network, ...] = ()
    tcp_states: tuple[int, ...] = ()
    marks: tuple[Mark, ...] = ()
    zones: tuple[int, ...] = ()


EVERYTHING = Filter()

OPTIONS: tuple[Option, ...] = (
    Option("node", "node", REQUIRED, "Name of this node, as the peer knows it."),
    Option("peers", "peers", REQUIRED, "The other nodes: a list of 1 to 7 objects."),
    Option("link", "link", None, "This node's end of the sync link, where there is one. Or `links`."),
    Option("links", "links", None, "This node's ends of several sync links; the first one that works is used."),
    Option("virtual_ips", "virtual_ips", REQUIRED, "The virtual IPs that VRRP moves; who holds them all is active."),
    Option(
        "keys",
        "keys",
        REQUIRED,
        f"Pre-shared keys, at most {MAX_KEYS}: key id (1 to 255) to credential name or absolute path.",
        handed=True,
    ),
    Option("send_key", "key_id", None, "Key id to send with. Needed when there are several keys.", 1, 255, handed=True),
    Option(
        "mode",
        "choice",
        "hot-standby",
        "`hot-standby` writes replicas into the kernel at once, `external-cache` at take-over (`ctsyncd -c`).",
        choices=MODES,
    ),
    Option("control_socket", "socket_path", "/run/ctsyncd/ctsyncd.sock", "Control socket of the daemon, mode 0600."),
    Option("notify_fifo", "path", "/run/ctsync/notify.fifo", "FIFO that keepalived writes its transitions to."),
    Option(
        "track_file",
        "path",
        "/run/ctsync/not-ready",
        "File that keepalived tracks: 0 is ready, 1 is not, 2 knows nothing.",
    ),
    Option(
        "ruleset_fingerprint",
        "path",
        "/run/ctsync/ruleset.fingerprint",
        "File with the fingerprint of the ruleset, written by who applies or watches it.",
        live=True,
    ),
    Option(
        "same_conditions",
        "conditions",
        conditions.KINDS,
        "What must be the same on both nodes; while it is not, the backup is NOT READY and the active node DEGRADED.",
        choices=conditions.KINDS,
        live=True,
    ),
    Option(
        "ignore_addresses",
        "networks",
        (),
        "Networks whose flows are not replicated, besides all own addresses.",
        live=True,
    ),
    Option(
        "filter",
        "filter",
        EVERYTHING,
        "What is replicated, the same on both nodes: flows that meet every list that is not empty.",
        live=True,
    ),
    Option("replicate", "boolean", True, "`false` switches replication off; the node then says NOT READY."),
    Option(
        "compare",
        "boolean",
        True,
        "The tables of both nodes are compared all the time, and what differs is repaired.",
        live=True,
    ),
    Option(
        "udp",
        "choice",
        "replied",
        "Which flows without a state machine (UDP, ICMP, others) are replicated: those with a reply, or all.",
        choices=UDP_CHOICES,
        live=True,
    ),
    Option(
        "hello_interval_ms", "integer", 500, "Time between two signs of life on an idle link.", 20, 10_000, live=True
    ),
    Option("dead_after_ms", "integer", 1500, "Silence after which the peer counts as dead.", 100, 60_000, live=True),
    Option(
        "window_ms",
        "integer",
        20,
        "Longest time that changes are gathered before they are sent; a new TCP connection among very many short ones "
        "may wait twice as long.",
        0,
        50,
        live=True,
    ),
    Option(
        "lag_limit_ms",
        "integer",
        2000,
        "Age of the oldest change that the peer has not acknowledged from which on the active node is DEGRADED.",
        100,
        600_000,
        live=True,
    ),
    Option("datagram_bytes", "integer", 1400, "Largest UDP payload sent on the sync link.", 512, 8900),
    Option(
        "netlink_buffer_bytes",
        "integer",
        64 << 20,
        "Receive buffer for the kernel's events.",
        1 << 16,
        1 << 30,
        live=True,
    ),
    Option(
        "park_timeout_s",
        "integer",
        86_400,
        "Kernel timeout of a replica while the peer lives; true timers return at take-over.",
        600,
        2_147_483,
        live=True,
    ),
    Option(
        "max_expectations",
        "integer",
        4096,
        "Expectations of helpers (FTP, SIP) that are replicated at most; 0 switches that off.",
        0,
        65_536,
    ),
    Option("log_level", "choice", "info", "Least severity that is logged.", choices=LOG_LEVELS, live=True),
)
PEER_OPTIONS: tuple[Option, ...] = (
    Option("node", "node", REQUIRED, "Name of the peer."),
    Option("address", "address", None, "Address of the peer on the sync link, with `link`."),
    Option("addresses", "addresses", None, "Addresses of the peer on the sync links, in the order of `links`."),
)
LINK_OPTIONS: tuple[Option, ...] = (
    Option("interface", "interface", REQUIRED, "Interface of the sync link; datagrams of others are not accepted."),
    Option("address", "address", REQUIRED, "Own address on the sync link."),
    Option("port", "integer", 3781, "UDP port, the same on both nodes.", 1, 65_535),
)
VIRTUAL_IP_OPTIONS: tuple[Option, ...] = (
    Option("interface", "interface", REQUIRED, "Interface that carries the virtual IP."),
    Option("address", "address", REQUIRED, "The virtual IP, without a prefix length."),
)
FILTER_OPTIONS: tuple[Option, ...] = (
    Option("protocols", "protocols", (), "Protocols, by name or IANA number."),
    Option("addresses", "networks", (), "Networks; the client or the server of the flow is in one of them."),
    Option(
        "tcp_states",
        "tcp_states",
        (),
        "TCP states; a flow that leaves them is removed from the peer.",
        choices=FILTER_TCP_STATES,
    ),
    Option("marks", "marks", (), "Connection marks; a flow has one of them. No mark is mark 0."),
    Option("zones", "zones", (), "Conntrack zones. No zone is zone 0.", 0, 65_535),
)
MARK_OPTIONS: tuple[Option, ...] = (
    Option("value", "integer", REQUIRED, "The mark's bits under the mask.", 0, 0xFFFFFFFF),
    Option("mask", "integer", 0xFFFFFFFF, "Which bits of the mark count.", 1, 0xFFFFFFFF),
)


@dataclass(frozen=True)
class Config:
    """A checked configuration; see ``OPTIONS`` for the meaning, unit and range of each field."""

    node: str
    peers: tuple[Peer, ...]
    links: tuple[Link, ...]
    virtual_ips: tuple[VirtualIp, ...]
    keys: Mapping[int, str]
    send_key: int
    mode: str = "hot-standby"
    control_socket: str = "/run/ctsyncd/ctsyncd.sock"
    notify_fifo: str = "/run/ctsync/notify.fifo"
    track_file: str = "/run/ctsync/not-ready"
    ruleset_fingerprint: str = "/run/ctsync/ruleset.fingerprint"
    same_conditions: tuple[str, ...] = conditions.KINDS
    ignore_addresses: tuple[Network, ...] = ()
    filter: Filter = EVERYTHING
    replicate: bool = True
    compare: bool = True
    udp: str = "replied"
    hello_interval_ms: int = 500
    dead_after_ms: int = 1500
    window_ms: int = 20
    lag_limit_ms: int = 2000
    datagram_bytes: int = 1400
    netlink_buffer_bytes: int = 64 << 20
    park_timeout_s: int = 86_400
    max_expectations: int = 4096
    log_level: str = "info"

    def differences(self, other: Config) -> list[Option]:
        """Rows of the options in which ``other`` is different."""
        rows = (option for option in OPTIONS if option.key != "link")
        return [option for option in rows if getattr(self, option.key) != getattr(other, option.key)]


def load(path: str) -> Config:
    """Read and check the file ``path``; :class:`ConfigError` also when it cannot be read."""
    return parse(read(path), source=path)


def read(path: str) -> str:
    """The text of the file ``path``; :class:`ConfigError` when it cannot be read."""
    try:
        with open(path, "rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            [f"{path}: cannot be read: {error.strerror}: write the file, or name another one with -C FILE"]
        ) from error
    if len(raw) > MAX_BYTES:
        raise ConfigError([f"{path}: is larger than {MAX_BYTES} bytes: this is not a configuration of ctsyncd"])
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: byte {error.start} is not UTF-8: save the file as UTF-8"]) from error


def parse(text: str, source: str = "configuration") -> Config:
    """Check the JSON ``text`` and build the configuration.

    :class:`ConfigError` carries every problem found, each beginning with ``source``.
    """
    problems = _Problems(source)

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in items:
            if key in found:
                problems.add(key, f"the key {_show(key)} stands twice in one object: keep one of them")
            found[key] = value
        return found

    try:
        document = json.loads(text, object_pairs_hook=pairs)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise ConfigError([f"{source}: {where}: not valid JSON: {error.msg}: correct it there"]) from error
    except ValueError as error:  # from Python 3.11 on: an integer of more than 4300 digits
        raise ConfigError([f"{source}: not valid JSON: a number is too long: correct it"]) from error
    except RecursionError as error:
        raise ConfigError([f"{source}: nested too deeply: write one flat JSON object"]) from error
    values = _object(document, "", OPTIONS, problems)
    if values is not None:
        _one_or_several(values, problems)
        _cross_check(values, problems)
    if problems.found or values is None:
        raise ConfigError(problems.found)
    return Config(**values)


class _Problems:
    """What is wrong so far, in the order found, each sentence once."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._found: dict[str, None] = {}

    @property
    def found(self) -> list[str]:
        return list(self._found)

    def add(self, where: str, sentence: str) -> None:
        self._found[f"{self.source}: {where}: {sentence}" if where else f"{self.source}: {sentence}"] = None


_BAD: Any = object()  # a value that was reported already


def _show(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=True)
    except (TypeError, ValueError, RecursionError):
        text = repr(type(value).__name__)
    return text if len(text) <= 80 else text[:77] + "..."


def _object(value: Any, where: str, table: tuple[Option, ...], problems: _Problems) -> dict[str, Any] | None:
    """Read ``value`` by ``table``; fields that are wrong get the value ``_BAD``."""
    if not isinstance(value, dict):
        names = ", ".join(option.key for option in table)
        problems.add(where, f"{_show(value)} is not an object: write a JSON object with the keys {names}")
        return None
    prefix = f"{where}." if where else ""
    known = [option.key for option in table]
    for key in value:
        if key in known:
            continue
        close = difflib.get_close_matches(key.lower().replace("-", "_"), known, n=1)
        remedy = f"did you mean {close[0]}?" if close else f"remove it; known are {', '.join(known)}"
        problems.add(prefix + key[:80], f"unknown option: {remedy}")
    result: dict[str, Any] = {}
    for option in table:
        path = prefix + option.key
        if option.key in value:
            result[option.key] = _READERS[option.kind](value[option.key], path, option, problems)
        elif option.default is REQUIRED:
            problems.add(path, f"is missing: {option.help}")
            result[option.key] = _BAD
        else:
            result[option.key] = option.default
    return result


def _read_text(what: str, pattern: re.Pattern[str]) -> Callable[[Any, str, Option, _Problems], Any]:
    def read(value: Any, where: str, option: Option, problems: _Problems) -> Any:
        if isinstance(value, str) and pattern.fullmatch(value):
            return value
        problems.add(where, f"{_show(value)} is not {what}")
        return _BAD

    return read


def _read_boolean(value: Any, where: str, option: Option, problems: _Problems) -> Any:
    if isinstance(value, bool):
        return value
    problems.add(where, f"{_show(value)} is not a boolean: write true or false")
    return _BAD


def _read_integer(value: Any, where: str, option: Option, problems: _Problems) -> Any:
    if isinstance(value, int) and not isinstance(value, bool) and option.minimum <= value <= option.maximum:
        return value
    problems.add(
        where, f"{_show(value)} is out of range: write an integer from {option.minimum} to {option.maximum}, unquoted"
    )
    return _BAD


def _read_choice(value: Any, where: str, option: Option, problems: _Problems) -> Any:
    if isinstance(value, str) and value in option.choices:
        return value
    close = difflib.get_close_matches(value, option.choices, n=1) if isinstance(value, str) else []
    remedy = f"did you mean {close[0]}?" if close else f"write one of {', '.join(option.choices)}"
    problems.add(where, f"{_show(value)} is not a choice: {remedy}")
    return _BAD


def _is_encodable(path: str) -> bool:
    """Can this be the name of a file?  Not with NUL bytes and what JSON's \\u escapes can write besides characters."""
    try:
        return b"\0" not in path.encode("utf-8")
    except UnicodeEncodeError:
        return False


def _read_path(value: Any, where: str, option: Option, problems: _Problems) -> Any:
    if not isinstance(value, str) or not value.startswith("/") or value.endswith("/") or not _is_encodable(value):
        problems.add(where, f"{_show(value)} is not an absolute path of a file: write one that begins with /")
        return _BAD
    return value


def _read_socket_path(value: Any, where: str, option: Option, problems: _Problems) -> Any:
    path = _read_path(value, where, option, problems)
    if path is not _BAD and len(path.encode("utf-8")) > _SUN_PATH_BYTES:
        problems.add(where, f"{_show(value)} is too long for a socket: shorten it to {_SUN_PATH_BYTES} bytes")
        return _BAD
    return path


def _read_address(value: Any, where: str, option: Option, problems: _Problems) -> Any:
    """A unicast address in its canonical spelling."""
    if isinstance(value, str) and "/" in value:
        problems.add(where, f"{_show(value)} has a prefix length: write the address alone")
        return _BAD
    try:
        if not isinstance(value, str) or "%" in value:
            raise ValueError
        address = ipaddress.ip_address(value)
    except ValueError:
        problems.add(where, f"{_show(value)} is not an IPv4 or IPv6 address: write one as a string, without a zone")
        return _BAD
    if address.is_multicast or address.is_unspecified or address == ipaddress.ip_address("255.255.255.255"):
        problems.add(where, f"{_show(value)} is not a unicast address: write the address of one node")
        return _BAD
    return str(address)


def _read_networks(value: Any, where: str, option: Option, problems: _Problems) -> Any:
    if not isinstance(value, list):
        problems.add(where, f"{_show(value)} is not a list: write a list of networks such as 192.168.100.0/24")
        return _BAD
    networks: dict[Network, None] = {}
    for index, item in enumerate(value):
        try:
            if not isinstance(item, str):
                raise ValueError
            interface = ipaddress.ip_interface(item)
        except ValueError:
            problems.add(f"{where}[{index}]", f"{_show(item)} is not a network: write one such as 192.168.100.0/24")
            continue
        if interface.ip != interface.network.network_address:
            problems.add(f"{where}[{index}]", f"{_show(item)} has host bits set: write {interface.network}")
            continue
        networks[interface.network] = None
    return tuple(networks)


def _read_list(
    what: str, item: Callable[[Any, str, Option, _Problems], Any]
) -> Callable[[Any, str, Option, _Problems], Any]:
    """A list, each of whose items ``item`` reads; those that are wrong are left out (and reported)."""

    def read(value: Any, where: str, option: Option, problems: _Problems) -> Any:
        if not isinstance(value, list):
            problems.add(where, f"{_show(value)} is not a list: write a list of {what}")
            return _BAD
        read = (item(entry, f"{where}[{index}]", option, problems) for index, entry in enumerate(value))
        return tuple(dict.fromkeys(entry for entry in read if entry is not _BAD))

    return read


def _read_protocol(value: Any, where: str, option: Option, problems: _Problems) -> Any:
    """A protocol's number, out of its name, its number, or its number as text (YAML and Ansible make one of it)."""
    if isinstance(value, str) and value.lower() in FILTER_PROTOCOLS:
        return FILTER_PROTOCOLS[value.lower()]
    number = int(value) if isinstance(value, str) and re.fullmatch(r"[0-9]{1,3}", value, re.ASCII) else value
    if isinstance(number, int) and not isinstance(number, bool) and 0 <= number <= 255:
        if number != IPPROTO_VRRP:
            return number
        problems.add(where, f"{_show(value)} is VRRP, which is never replicated: remove it")
        return _BAD
    close = difflib.get_close_matches(value.lower(), FILTER_PROTOCOLS, n=1) if isinstance(value, str) else []
    remedy = f"did you mean {close[0]}?" if close else f"write {', '.join(FILTER_PROTOCOLS)}, or a number from 0 to 255"
    problems.add(where, f"{_show(value)} is not a protocol: {remedy}")
    return _BAD


def _read_tcp_state(value: Any, where: str, option: Option, problems: _Problems) -> Any:
    name = _read_choice(value, where, option, problems)
    return _BAD if name is _BAD else TCP_STATE_NAMES.index(name)


def _read_mark(value: Any, where: str, option: Option, problems: _Problems) -> Any:
    fields = _object(value, where, MARK_OPTIONS, problems)
    if fields is None or _BAD in fields.values():
        return _BAD
    mark = Mark(**fields)
    if mark.value & ~mark.mask:
        problems.add(
            where,
            f"value {mark.value:#x} has bits outside of mask {mark.mask:#x}: no mark is like this: correct either",
        )
        return _BAD
    return mark


def _read_filter(value: Any, where: str, option: Option, problems: _Problems) -> Any:
    fields = _object(value, where, FILTER_OPTIONS, problems)
    return _BAD if fields is None or _BAD in fields.values() else Filter(**fields)


def _read_rows(
    value: Any, where: str, table: tuple[Option, ...], make: Callable[..., Any], problems: _Problems
) -> list[Any] | None:
    """A non-empty list of objects; rows that are wrong are left out (and reported)."""
    if not isinstance(value, list) or not value:
        names = ", ".join(option.key for option in table)
        problems.add(where, f"{_show(value)} is not a non-empty list: write a list of objects with the keys {names}")
        return None
    rows = []
    for index, item in enumerate(value):
        fields = _object(item, f"{where}[{index}]", table, problems)
        if fields is not None and _BAD not in fields.values():
            rows.append(make(**fields))
    return rows


def _make_peer(node: str, address: str | None, addresses: tuple[str, ...] | None) -> tuple[str, Any, Any]:
    """Which of the two it must be is known later, when the links are."""
    return node, address, addresses


def _read_peers(value: Any, where: str, option: Option, problems: _Problems) -> Any:
    rows = _read_rows(value, where, PEER_OPTIONS, _make_peer, problems)
    if rows is None or len(rows) != len(value):
        return _BAD
    if len(value) > MAX_PEERS:
        problems.add(where, f"{len(value)} peers: at most {MAX_PEERS} are supported: name fewer")
    seen: set[str] = set()
    for node, _address, _addresses in rows:
        if node in seen:
            problems.add(where, f"{node} stands more than once: name each peer once")
        seen.add(node)
    return tuple(rows)


def _read_link(value: Any, where: str, option: Option, problems: _Problems) -> Any:
    fields = _object(value, where, LINK_OPTIONS, problems)
    return _BAD if fields is None or _BAD in fields.values() else Link(**fields)


def _read_links(value: Any, where: str, option: Option, problems: _Problems) -> Any:
    rows = _read_rows(value, where, LINK_OPTIONS, Link, problems)
    if rows is None or len(rows) != len(value):
        return _BAD
    if len(rows) > MAX_LINKS:
        problems.add(where, f"{len(rows)} links: write {MAX_LINKS} at most")
        return _BAD
    good = True
    for index, row in enumerate(rows):
        for other in rows[:index]:
            for what in ("interface", "address"):
                if getattr(row, what) == getattr(other, what):
                    good = False
                    problems.add(
                        f"{where}[{index}].{what}",
                        f"{getattr(row, what)} stands more than once: one failure would take both links away: "
                        f"give each link its own {what}",
                    )
    return tuple(rows) if good else _BAD


def _read_addresses(value: Any, where: str, option: Option, problems: _Problems) -> Any:
    if not isinstance(value, list) or not value:
        problems.add(where, f"{_show(value)} is not a non-empty list: write a list of addresses, one for each link")
        return _BAD
    read = [_read_address(entry, f"{where}[{index}]", option, problems) for index, entry in enumerate(value)]
    return _BAD if _BAD in read else tuple(read)


def _read_virtual_ips(value: Any, where: str, option: Option, problems: _Problems) -> Any:
    rows = _read_rows(value, where, VIRTUAL_IP_OPTIONS, VirtualIp, problems)
    if rows is None:
        return _BAD
    seen: set[tuple[str, str]] = set()
    for row in rows:
        # a link-local address belongs to its interface; every other one may stand once
        scope = row.interface if ipaddress.ip_address(row.address).is_link_local else ""
        if (row.address, scope) in seen:
            problems.add(where, f"{row.address} stands more than once: name each virtual IP once")
        seen.add((row.address, scope))
    return tuple(rows)


def _read_keys(value: Any, where: str, option: Option, problems: _Problems) -> Any:
    if not isinstance(value, dict) or not value:
        problems.add(where, f'{_show(value)} is not a non-empty object: write one such as {{"1": "key-1"}}')
        return _BAD
    if len(value) > MAX_KEYS:
        problems.add(where, f"has {len(value)} keys, more than {MAX_KEYS}: keep those that a node still sends with")
        return _BAD
    keys: dict[int, str] = {}
    for name, place in value.items():
        path = f"{where}.{name[:80]}"
        number = int(name) if re.fullmatch(r"[1-9][0-9]{0,2}", name, re.ASCII) else 0
        if not 1 <= number <= 255:
            problems.add(path, f"{_show(name)} is not a key id: write a decimal number from 1 to 255")
            continue
        if isinstance(place, str) and place.startswith("/"):
            place = _read_path(place, path, option, problems)
        elif not isinstance(place, str) or not _CREDENTIAL.fullmatch(place):
            problems.add(
                path,
                "the value is not the place of a key: write the name of a systemd credential or an absolute path, "
                "never the key itself",
            )
            place = _BAD
        keys[number] = place
    return types.MappingProxyType(keys)


_Reader = Callable[[Any, str, Option, _Problems], Any]
_READERS: dict[str, _Reader] = {
    "node": _read_text(
        "a node's name: write 1 to 63 letters, digits, dots, hyphens, underscores; begin with a letter or digit",
        _NODE,
    ),
    "interface": _read_text(
        "an interface's name: write 1 to 15 characters of ASCII without spaces, slashes, colons and percent signs",
        _INTERFACE,
    ),
    "boolean": _read_boolean,
    "integer": _read_integer,
    "key_id": _read_integer,
    "choice": _read_choice,
    "path": _read_path,
    "socket_path": _read_socket_path,
    "address": _read_address,
    "networks": _read_networks,
    "filter": _read_filter,
    "protocols": _read_list("protocols such as tcp", _read_protocol),
    "tcp_states": _read_list("TCP states such as ESTABLISHED", _read_tcp_state),
    "marks": _read_list("objects with the keys value, mask", _read_mark),
    "zones": _read_list("zone numbers", _read_integer),
    "conditions": _read_list("names such as ruleset", _read_choice),
    "peers": _read_peers,
    "link": _read_link,
    "links": _read_links,
    "addresses": _read_addresses,
    "virtual_ips": _read_virtual_ips,
    "keys": _read_keys,
}


def _one_or_several(values: dict[str, Any], problems: _Problems) -> None:
    """``link`` becomes the only one of ``links``, the peers get their ``addresses``."""
    link, links = values.pop("link"), values["links"]
    if link is not None and links is not None:
        problems.add("links", "stands beside link: write all links into links, in the order of preference")
        values["links"] = values["peers"] = _BAD
        return
    if link is None and links is None:
        problems.add("link", "is missing: write this node's end of the sync link, or several of them as links")
    several = links is not None
    if not several:
        values["links"] = _BAD if link is None or link is _BAD else (link,)
    if values["peers"] is not _BAD:
        count = None if values["links"] is _BAD else len(values["links"])
        peers = [_peer(row, f"peers[{at}]", several, count, problems) for at, row in enumerate(values["peers"])]
        values["peers"] = _BAD if _BAD in peers else tuple(peers)


def _peer(row: tuple[str, Any, Any], where: str, several: bool, count: int | None, problems: _Problems) -> Any:
    node, address, addresses = row
    if address is not None and addresses is not None:
        problems.add(f"{where}.addresses", "stands beside address: write all addresses of the peer into addresses")
    elif several and addresses is None:
        problems.add(f"{where}.addresses", "is missing: write the peer's addresses, in the order of links")
    elif not several and address is None:
        problems.add(
            f"{where}.address",
            "is missing: write the peer's address on the sync link"
            + ("" if addresses is None else " (addresses goes with links)"),
        )
    elif several and count is not None and len(addresses) != count:
        problems.add(
            f"{where}.addresses",
            f"{len(addresses)} for {count} links: write one address for each link, in the order of links",
        )
    else:
        return Peer(node, addresses if several else (address,))
    return _BAD


def _cross_check(values: dict[str, Any], problems: _Problems) -> None:
    """What no option can tell alone.  Only options that are right so far are compared."""
    good = {key: value for key, value in values.items() if value is not _BAD}
    _check_keys(values, good, problems)
    _check_addresses(good, problems)
    hello, dead = good.get("hello_interval_ms"), good.get("dead_after_ms")
    if hello is not None and dead is not None and dead < 2 * hello:
        problems.add(
            "dead_after_ms",
            f"{dead} is less than twice hello_interval_ms ({hello}): one lost datagram would kill the peer: "
            f"write at least {2 * hello}, or lower hello_interval_ms",
        )
    paths: dict[str, str] = {}
    for key in ("control_socket", "notify_fifo", "track_file"):
        path = good.get(key)
        if path in paths:
            problems.add(key, f"{_show(path)} is also {paths[path]}: give each a file of its own")
        elif path is not None:
            paths[path] = key


def _check_keys(values: dict[str, Any], good: dict[str, Any], problems: _Problems) -> None:
    keys = good.get("keys")
    if not keys or "send_key" not in good:
        return
    known = ", ".join(str(number) for number in sorted(keys))
    if good["send_key"] is None:
        if len(keys) == 1:
            values["send_key"] = next(iter(keys))
        else:
            problems.add("send_key", f"is missing, and there are several keys: write one of {known}")
    elif good["send_key"] not in keys:
        problems.add("send_key", f"{good['send_key']} is not in keys: write one of {known}, or add the key")


def _check_addresses(good: dict[str, Any], problems: _Problems) -> None:
    links: tuple[Link, ...] = good.get("links") or ()
    names = [f"links[{index}].address" for index in range(len(links))] if len(links) > 1 else ["link.address"]
    own = {link.address for link in links}
    taken: dict[str, str] = {}
    for index, peer in enumerate(good.get("peers", ())):
        if peer.node == good.get("node"):
            problems.add(f"peers[{index}].node", f"{_show(peer.node)} is this node's own name: name the other node")
        for at, address in enumerate(peer.addresses):
            where = f"peers[{index}].addresses[{at}]" if len(peer.addresses) > 1 else f"peers[{index}].address"
            if address in own:
                problems.add(where, f"{address} is this node's own address: write the other node's")
            elif address in taken:
                problems.add(
                    where, f"{address} is also {taken[address]}: a node has an address of its own on each link"
                )
            elif at < len(links) and (":" in address) != (":" in links[at].address):
                problems.add(
                    where,
                    f"{address} and {names[at]} {links[at].address} are not of the same family: "
                    "use IPv4 or IPv6 for both",
                )
            taken.setdefault(address, where)
    fixed = {
        address: f"the address of the peer {peer.node}" for peer in good.get("peers", ()) for address in peer.addresses
    }
    for link in links:
        fixed.setdefault(link.address, "this node's own address on the sync link")
    for vip in good.get("virtual_ips", ()):
        if vip.address in fixed:
            problems.add("virtual_ips", f"{vip.address} is {fixed[vip.address]}: a virtual IP belongs to no node")


def reference() -> str:
    """The option tables as Markdown, for ``docs/ctsyncd.md``."""
    lines = ["| option | value | default | change needs | meaning |", "|---|---|---|---|---|"]
    for prefix, table in (
        ("", OPTIONS),
        ("peers[].", PEER_OPTIONS),
        ("link.", LINK_OPTIONS),
        ("links[].", LINK_OPTIONS),
        ("virtual_ips[].", VIRTUAL_IP_OPTIONS),
        ("filter.", FILTER_OPTIONS),
        ("filter.marks[].", MARK_OPTIONS),
    ):
        live = prefix.startswith("filter.")
        for option in table:
            needs = "reload" if live or option.live else "`ctsyncd keys`" if option.handed else "restart"
            lines.append(
                f"| `{prefix}{option.key}` | {_value_text(option)} | {_default_text(option)} | {needs} "
                f"| {option.help} |"
            )
    return "\n".join(lines) + "\n"


_KIND_TEXTS = {
    "node": "string",
    "interface": "interface name",
    "boolean": "true or false",
    "path": "absolute path",
    "socket_path": "absolute path",
    "address": "IPv4 or IPv6 address",
    "networks": "list of networks",
    "filter": "object",
    "protocols": "list of names or numbers",
    "marks": "list of objects",
    "peers": "list of objects",
    "link": "object",
    "links": "list of objects",
    "addresses": "list of addresses",
    "virtual_ips": "list of objects",
    "keys": "object",
}


def _value_text(option: Option) -> str:
    if option.choices:
        choices = ", ".join(f"`{choice}`" for choice in option.choices)
        return f"list of {choices}" if option.kind in ("tcp_states", "conditions") else choices
    if option.kind == "zones":
        return f"list of {option.minimum} to {option.maximum}"
    if option.maximum:
        return f"{option.minimum} to {option.maximum}"
    return _KIND_TEXTS[option.kind]


def _default_text(option: Option) -> str:
    if option.default is REQUIRED:
        return "required"
    if option.default is None:
        return "the only key" if option.kind == "key_id" else "none"
    return "`{}`" if isinstance(option.default, Filter) else f"`{json.dumps(option.default)}`"
