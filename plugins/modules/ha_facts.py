#!/usr/bin/python
# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: ha_facts
short_description: Tell the role, readiness and flows of a firewall of the pair
version_added: 0.1.0
description:
  - Returns what can be seen of a firewall, as C(ansible_facts.ha_firewall). Who is active is read from the kernel, the
    state of VRRP from keepalived, the verdict and the replicated flows from C(ctsyncd).
  - Works on a host where some or all of them are not installed, and says so in the facts. It needs no library.
options:
  config_file:
    description: Configuration of C(ctsyncd). The virtual IPs are read from it.
    type: path
    default: /etc/ctsyncd/ctsyncd.conf
  flow_limit:
    description: Largest number of flows returned from each table. Large facts make Ansible slow.
    type: int
    default: 10000
  gather_subset:
    description:
      - What to gather. Each subset is a key of the facts; V(role) also gives C(virtual_ips).
      - V(flows) and V(ruleset) need root. V(host) is what the collection needs of a host, what it has put there, and
        whether conntrackd runs; it needs root, too. Keys are shown as fingerprints, never as they are.
    type: list
    elements: str
    choices: [all, flows, host, role, ruleset, sync, vrrp]
    default: [role, sync, vrrp]
  keepalived_config:
    description: Configuration of keepalived.
    type: path
    default: /etc/keepalived/keepalived.conf
  keepalived_pid_file:
    description: File with keepalived's process id.
    type: path
    default: /run/keepalived.pid
  program:
    description: The program C(ctsyncd).
    type: path
    default: /usr/sbin/ctsyncd
  virtual_ips:
    description:
      - The virtual IPs to look for. The default is what O(config_file) has, or else O(keepalived_config).
      - Each is a dictionary with C(interface) and C(address), or an address that any interface may have. A prefix
        length and other keys are ignored.
    type: list
    elements: raw
notes:
  - The state of VRRP is keepalived's own where it was built with JSON support, as in Debian. It writes its state to
    C(/tmp/keepalived.json) then, which this module reads and removes. Elsewhere the state follows from the addresses.
seealso:
  - module: ctsync.ha_firewall.ctsyncd
  - module: ctsync.ha_firewall.keepalived
  - plugin: ctsync.ha_firewall.flow_query
    plugin_type: filter
extends_documentation_fragment:
  - ctsync.ha_firewall.attributes
  - ctsync.ha_firewall.attributes.facts
attributes:
  diff_mode:
    support: none
author:
  - The ctsync authors (@ctsync)
"""

EXAMPLES = r"""
- name: Look at both firewalls
  ctsync.ha_firewall.ha_facts:

- name: Refuse to go on while a take-over would lose sessions
  ansible.builtin.assert:
    that: ansible_facts.ha_firewall.sync.verdict == 'READY'
    fail_msg: "{{ ansible_facts.ha_firewall.sync.reasons | join(', ') }}"

- name: Wait until this node is active
  ctsync.ha_firewall.ha_facts:
    gather_subset: [role]
  register: now
  until: now.ansible_facts.ha_firewall.role == 'active'
  retries: 50
  delay: 0.2

- name: Gather the flows, too
  ctsync.ha_firewall.ha_facts:
    gather_subset: [flows, role]

- name: Show the established sessions that the peer would take over
  ansible.builtin.debug:
    msg: "{{ ansible_facts.ha_firewall.flows.external
      | ctsync.ha_firewall.flow_query(\"[?state == 'ESTABLISHED'].endpoint(orig)\") }}"
"""

RETURN = r"""
ansible_facts:
  description: The facts.
  returned: always
  type: dict
  contains:
    ha_firewall:
      description: State of this firewall. Keys of subsets that were not asked for are missing.
      returned: always
      type: dict
      contains:
        flows:
          description:
            - Flows of the daemon's caches and of the kernel's table.
            - Each list is ordered by family, protocol, original source and destination with their ports, and zone.
          returned: with V(flows) in O(gather_subset)
          type: dict
          contains:
            counts:
              description: How many flows there are of C(internal), C(external) and C(kernel).
              type: dict
              returned: success
              sample: {internal: 12, external: 0, kernel: 17}
            errors:
              description: Why a table could not be read, by its name. Empty when all is well.
              type: dict
              returned: success
              sample: {}
            external:
              description: Flows replicated from the peer, as C(ctsyncd -e).
              type: list
              elements: dict
              returned: success
            internal:
              description: Own flows, as C(ctsyncd -i).
              type: list
              elements: dict
              returned: success
            kernel:
              description: The kernel's table, with the flows of the host itself.
              type: list
              elements: dict
              returned: success
              sample:
                - protocol: tcp
                  protonum: 6
                  family: ipv4
                  zone: 0
                  state: ESTABLISHED
                  orig: {src: 192.168.0.3, dst: 192.168.1.3, sport: 51356, dport: 22}
                  reply: {src: 192.168.1.3, dst: 192.168.1.100, sport: 22, dport: 51356}
                  snat: true
                  dnat: false
                  assured: true
                  status: 414
                  timeout: 431999
                  mark: 0
                  age_s: 5
            truncated:
              description: Names of tables that have more flows than O(flow_limit).
              type: list
              elements: str
              returned: success
              sample: []
        host:
          description:
            - What the collection needs of a host, what it has put there, and whether conntrackd is there.
            - C(ctsyncd) has the ids of the daemon's keys with a fingerprint of each, and the id it sends with;
              C(sysctls) what the nodes of a pair must agree on; C(time) the host's clock in seconds since 1970.
          returned: with V(host) in O(gather_subset)
          type: dict
          sample:
            conntrack: true
            conntrackd: {pids: [], active: false, enabled: false}
            ctsyncd: {keys: {"1": 9f86d081884c7d659a2feaa0c55ad015}, send_key: 1}
            keepalived: {version: 2.2.7, configured: true, ours: true}
            sysctls: {net.netfilter.nf_conntrack_max: "262144"}
            systemd: true
            time: 1764000000.1
        role:
          description: V(active) holds all virtual IPs, V(backup) none; V(unknown) otherwise.
          returned: with V(role) in O(gather_subset)
          type: str
          choices: [active, backup, unknown]
          sample: active
        ruleset:
          description: The collection's chains with counters, the policies, and a fingerprint of the rules.
          returned: with V(ruleset) in O(gather_subset)
          type: dict
          contains:
            chains:
              description: Rules of the IPv4 chains by table and chain, with the packets and bytes that they have seen.
              type: dict
              returned: success
              sample:
                filter:
                  CTSYNC-FORWARD:
                    rules: [{rule: -A CTSYNC-FORWARD -m state --state INVALID -j LOG, packets: 3, bytes: 180}]
            error:
              description: Why iptables could not be asked. Empty when all is well.
              type: str
              returned: success
              sample: ""
            fingerprint:
              description: As the M(ctsync.ha_firewall.ruleset) module returns it. Empty without rules.
              type: str
              returned: success
              sample: 0b0cbf6bd0c9e5f1d3f94f1a3f1d0a1d5c3ad0d8ab9a3d2a51a4bd7a6f7c0e11
            ipv6:
              description: The same C(chains) and C(policies) of IPv6.
              type: dict
              returned: success
              sample: {chains: {}, policies: {}}
            policies:
              description: Policies of the chains of the IPv4 table filter, with packets and bytes that they decided on.
              type: dict
              returned: success
              sample: {FORWARD: {policy: DROP, packets: 12, bytes: 720}}
        sync:
          description:
            - The daemon's status, all that C(ctsyncd status --json) says (C(docs/ctsyncd.md)), and whether it is
              C(running).
            - Without a daemon the verdict is V(NOT READY), with the reason, and the other keys are missing.
          returned: with V(sync) in O(gather_subset)
          type: dict
          sample: {verdict: READY, reasons: [], role: active, node: fw1, running: true}
        virtual_ips:
          description: The virtual IPs, and whether this node has them.
          returned: with V(role) in O(gather_subset)
          type: list
          elements: dict
          sample: [{interface: eth1, address: 192.168.0.100, held: true}]
        vrrp:
          description:
            - Whether keepalived runs, and its instances. C(source) is V(dump) when keepalived told, V(addresses) when
              the state follows from who has the virtual IPs.
          returned: with V(vrrp) in O(gather_subset)
          type: dict
          sample:
            running: true
            source: dump
            instances:
              - {name: VI_eth1, interface: eth1, state: MASTER, priority: 150, effective_priority: 150, router_id: 51}
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.ctsync.ha_firewall.plugins.module_utils import _facts, _keepalived, _ruleset
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.errors import CtsyncError

SUBSETS = ("flows", "host", "role", "ruleset", "sync", "vrrp")


def argument_spec() -> dict[str, Any]:
    return {
        "config_file": {"type": "path", "default": "/etc/ctsyncd/ctsyncd.conf"},
        "flow_limit": {"type": "int", "default": 10000},
        "gather_subset": {
            "type": "list",
            "elements": "str",
            "choices": ["all", *SUBSETS],
            "default": ["role", "sync", "vrrp"],
        },
        "keepalived_config": {"type": "path", "default": _keepalived.CONFIG_PATH},
        "keepalived_pid_file": {"type": "path", "default": _facts.KEEPALIVED_PID},
        "program": {"type": "path", "default": "/usr/sbin/ctsyncd"},
        "virtual_ips": {
            "type": "list",
            "elements": "raw",
        },
    }


def gather(module: AnsibleModule) -> dict[str, Any]:
    """The facts that were asked for."""
    params = module.params
    subsets = set(SUBSETS) if "all" in params["gather_subset"] else set(params["gather_subset"])
    program, config = params["program"], params["config_file"]
    facts: dict[str, Any] = {}

    def run(command: list[str]) -> Any:
        return module.run_command(command, environ_update={"LC_ALL": "C"})

    if subsets & {"role", "vrrp"}:
        try:
            addresses = _facts.read_addresses()
        except (OSError, CtsyncError) as error:
            module.fail_json(msg=f"the kernel does not tell the addresses of this host: {error}")
    if "role" in subsets:
        wanted = params["virtual_ips"]
        if wanted is None:
            wanted = _facts.wanted_virtual_ips(config, params["keepalived_config"])
        for number, vip in enumerate(wanted):
            if not isinstance(vip, str) and not (isinstance(vip, dict) and {"interface", "address"} <= set(vip)):
                module.fail_json(
                    msg=f"virtual_ips[{number}]: {vip!r} is no address and no dictionary with interface and address"
                )
        facts["virtual_ips"] = _facts.virtual_ips_held(wanted, addresses)
        facts["role"] = _facts.role_of(facts["virtual_ips"])
    if "vrrp" in subsets:
        keepalived = module.get_bin_path("keepalived")
        facts["vrrp"] = _facts.vrrp_facts(
            run, keepalived, params["keepalived_config"], params["keepalived_pid_file"], addresses
        )
    if "sync" in subsets:
        facts["sync"] = _facts.sync_facts(run, program, config)
    if "flows" in subsets:
        facts["flows"] = _facts.flow_facts(run, program, config, params["flow_limit"])
    if "ruleset" in subsets:
        facts["ruleset"] = _ruleset.read_live(run)
    if "host" in subsets:
        systemctl = module.get_bin_path("systemctl")
        facts["host"] = _facts.host_facts(
            run,
            systemctl,
            module.get_bin_path("modprobe"),
            module.get_bin_path("keepalived"),
            config=config,
            keepalived_config=params["keepalived_config"],
        )
    return facts


def main() -> None:
    module = AnsibleModule(argument_spec=argument_spec(), supports_check_mode=True)
    if module.params["flow_limit"] < 0:
        module.fail_json(msg=f"flow_limit: {module.params['flow_limit']} is negative: choose 0 or more")
    module.exit_json(changed=False, ansible_facts={"ha_firewall": gather(module)})


if __name__ == "__main__":
    main()
