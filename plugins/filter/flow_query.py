# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The filter ``flow_query``."""

from __future__ import annotations

DOCUMENTATION = r"""
name: flow_query
short_description: Ask a list of flows with JMESPath
version_added: 0.1.0
description:
  - Searches flows (or any data) with a JMESPath expression, as P(community.general.json_query#filter) does, with
    functions for addresses and ports added.
  - C(cidr_contains(network, address)) is whether the address is in the network. Other families are never in it.
  - C(has_port(flow, port)) is whether any of the four ports of a flow is this one.
  - C(between(flow, a, b)) is whether the flow was opened from C(a) to C(b), addresses or networks. The original
    direction counts, so that address translation does not matter.
  - C(endpoint(side)) is a side of a flow (C(orig) or C(reply)) as text, C(source:port -> destination:port).
options:
  _input:
    description: Flows, as M(ctsync.ha_firewall.ha_facts) returns them.
    type: raw
    required: true
  expression:
    description: The JMESPath expression. Numbers and texts in it are written in back quotes and single quotes.
    type: str
    required: true
requirements:
  - jmespath (Python library) on the controller
seealso:
  - name: JMESPath
    description: The language.
    link: https://jmespath.org/specification.html
author:
  - The ctsync authors
"""

EXAMPLES = r"""
- name: The SSH sessions from the inside network, as the server sees them
  ansible.builtin.debug:
    msg: "{{ ansible_facts.ha_firewall.flows.kernel | ctsync.ha_firewall.flow_query(expression) }}"
  vars:
    expression: "[?between(@, '192.168.0.0/24', '192.168.1.3') && orig.dport == `22`].endpoint(reply)"

- name: Every established session must be with both nodes
  ansible.builtin.assert:
    that: here | ctsync.ha_firewall.flow_query(expression) | difference(there) | length == 0
  vars:
    here: "{{ hostvars.fw1.ansible_facts.ha_firewall.flows.internal }}"
    there: "{{ hostvars.fw2.ansible_facts.ha_firewall.flows.external | ctsync.ha_firewall.flow_query(expression) }}"
    expression: "[?state == 'ESTABLISHED'].endpoint(orig)"
"""

RETURN = r"""
_value:
  description: What the expression selects.
  type: raw
"""

import functools
import ipaddress
from typing import Any

from ansible.errors import AnsibleFilterError

try:
    import jmespath
    import jmespath.exceptions
    import jmespath.functions
except ImportError:
    jmespath = None


def _network(text: str) -> Any:
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise AnsibleFilterError(f"flow_query: {text!r} is not an address or a network") from None


def _contains(network: str, address: str) -> bool:
    wanted = _network(network)
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        raise AnsibleFilterError(f"flow_query: {address!r} is not an address") from None
    return found.version == wanted.version and found in wanted


def _endpoint(side: Any) -> str:
    def end(address: Any, port: Any) -> str:
        if port is None:
            return str(address)
        return f"[{address}]:{port}" if ":" in str(address) else f"{address}:{port}"

    text = f"{end(side.get('src'), side.get('sport'))} -> {end(side.get('dst'), side.get('dport'))}"
    return text if side.get("id") is None else f"{text} id {side['id']}"


@functools.lru_cache(maxsize=1)
def _options() -> Any:
    """The JMESPath options with our functions; made when first needed, because jmespath may be missing."""

    class Functions(jmespath.functions.Functions):
        """The library calls methods by the prefix of their name."""

        @jmespath.functions.signature({"types": ["string"]}, {"types": ["string"]})
        def _func_cidr_contains(self, network: str, address: str) -> bool:
            return _contains(network, address)

        @jmespath.functions.signature({"types": ["object"]}, {"types": ["number"]})
        def _func_has_port(self, flow: Any, port: int) -> bool:
            sides = [flow.get("orig") or {}, flow.get("reply") or {}]
            return any(side.get(key) == port for side in sides for key in ("sport", "dport"))

        @jmespath.functions.signature({"types": ["object"]}, {"types": ["string"]}, {"types": ["string"]})
        def _func_between(self, flow: Any, one: str, other: str) -> bool:
            side = flow.get("orig") or {}
            if not side.get("src") or not side.get("dst"):
                return False
            return _contains(one, side["src"]) and _contains(other, side["dst"])

        @jmespath.functions.signature({"types": ["object"]})
        def _func_endpoint(self, side: Any) -> str:
            return _endpoint(side)

    return jmespath.Options(custom_functions=Functions())


def _plain(value: Any) -> Any:
    """Plain Python values: jmespath asks for exact types, and Ansible's are subclasses."""
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, bool) or value is None:
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    return value


def flow_query(data: Any, expression: str) -> Any:
    """See DOCUMENTATION. Raises AnsibleFilterError naming what is wrong with the expression."""
    if jmespath is None:
        raise AnsibleFilterError(
            "flow_query: the Python library jmespath is missing on the controller: pip install jmespath, into the"
            " environment that runs ansible-playbook"
        )
    try:
        return jmespath.search(str(expression), _plain(data), options=_options())
    except jmespath.exceptions.JMESPathError as error:
        raise AnsibleFilterError(f"flow_query: {expression!r}: {error}") from error


class FilterModule:
    """Ansible looks for this name."""

    def filters(self) -> dict[str, Any]:
        return {"flow_query": flow_query}
