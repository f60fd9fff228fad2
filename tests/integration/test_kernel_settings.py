# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The module kernel_settings against the real kernel, in a network namespace where host keys are fixed."""

from __future__ import annotations

import pytest
from ansible_collections.ctsync.ha_firewall.plugins.filter.conntrack_sysctls import conntrack_sysctls
from integration.sealed import Machine

pytestmark = pytest.mark.netns

MODULES = ["nf_conntrack", "nf_conntrack_netlink"]
WANTED = {
    "net.netfilter.nf_conntrack_events": ("0", "1"),  # key: (value before, value wanted)
    "net.netfilter.nf_conntrack_tcp_loose": ("1", "0"),
    "net.netfilter.nf_conntrack_timestamp": ("0", "1"),
    "net.ipv4.conf.all.rp_filter": ("1", "2"),
    "net.ipv4.ip_forward": ("0", "1"),
}
SYSCTLS = [{"name": name, "value": value} for name, (_before, value) in WANTED.items()]
FILES = ["/etc/modules-load.d/ctsync.conf", "/etc/sysctl.d/60-ctsync.conf", "/var/lib/ctsync/kernel_settings.json"]


@pytest.fixture
def machine():
    with Machine() as made:
        made.run("mkdir", "-p", "/etc/sysctl.d", "/etc/modules-load.d")
        for name, (before, _value) in WANTED.items():
            write(made, name, before)
        yield made


def write(machine, name, value):
    machine.run("sh", "-c", f"echo {value} > /proc/sys/{name.replace('.', '/')}")


def held(machine):
    return [machine.run("cat", "/proc/sys/" + name.replace(".", "/")).strip() for name in WANTED]


def files(machine):
    return [path for path in FILES if machine.run("find", path, check=False)]


def test_settings_are_made_kept_repaired_and_undone(machine):
    before, after = ([value[i] for value in WANTED.values()] for i in (0, 1))
    predicted = machine.module("kernel_settings", check=True, modules=MODULES, sysctls=SYSCTLS)
    assert predicted["changed"]
    assert held(machine) == before
    assert files(machine) == []
    assert predicted["diff"][0]["before"].splitlines()[-1] == "net.ipv4.ip_forward = 0"

    done = machine.module("kernel_settings", modules=MODULES, sysctls=SYSCTLS)
    assert done["diff"] == predicted["diff"]
    assert held(machine) == after
    assert files(machine) == FILES
    lines = machine.run("cat", FILES[1]).splitlines()[1:]
    assert lines == [f"{name} = {value}" for name, (_before, value) in WANTED.items()]
    assert not machine.module("kernel_settings", modules=MODULES, sysctls=SYSCTLS)["changed"]

    write(machine, "net.netfilter.nf_conntrack_tcp_loose", "1")
    repaired = machine.module("kernel_settings", modules=MODULES, sysctls=SYSCTLS)
    assert repaired["sysctls"]["net.netfilter.nf_conntrack_tcp_loose"] == {"before": "1", "after": "0"}
    assert held(machine) == after

    write(machine, "net.ipv4.conf.all.rp_filter", "0")  # somebody's later decision stays
    assert machine.module("kernel_settings", state="absent")["changed"]
    assert held(machine) == [*before[:3], "0", before[4]]
    assert files(machine) == []
    assert not machine.module("kernel_settings", state="absent")["changed"]


def test_a_fixed_key_of_the_host_is_reported_before_any_change(machine):
    sysctls = [*SYSCTLS, {"name": "net.netfilter.nf_conntrack_max", "value": "12345"}]
    for check in (True, False):
        failed = machine.module("kernel_settings", check=check, sysctls=sysctls)
        assert failed["failed"]
        assert failed["msg"].startswith("net.netfilter.nf_conntrack_max cannot be set to '12345': the kernel holds '")
        assert "Set it on the host" in failed["msg"]
    assert held(machine) == [before for before, _value in WANTED.values()]
    assert files(machine) == []


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"sysctls": [{"name": "net.ipv4.ip_forwards", "value": "1"}]}, "The kernel has no key net.ipv4.ip_forwards"),
        ({"sysctls": [{"name": "ip_forward", "value": "1"}]}, "'ip_forward' is no key"),
        ({"sysctls": [*SYSCTLS, {"name": "net/ipv4/ip_forward", "value": "0"}]}, "more than once"),
        ({"modules": ["nf_ct_nobody_has"]}, "The kernel has no module nf_ct_nobody_has"),
    ],
)
def test_mistakes_are_named_before_any_change(machine, wrong, words):
    failed = machine.module("kernel_settings", **wrong)
    assert failed["failed"]
    assert words in failed["msg"]
    assert files(machine) == []


def test_a_value_that_the_kernel_does_not_take_is_an_error(machine):
    failed = machine.module("kernel_settings", sysctls=[{"name": "net.ipv4.ip_forward", "value": "many"}])
    assert failed["failed"]
    assert "net.ipv4.ip_forward could not be set to 'many': the kernel holds '0'" in failed["msg"]


def test_a_file_that_wins_at_boot_is_warned_of(machine):
    machine.run("sh", "-c", "echo 'net.ipv4.ip_forward = 0' > /etc/sysctl.d/99-other.conf")
    done = machine.module("kernel_settings", sysctls=SYSCTLS)
    assert "99-other.conf sets net.ipv4.ip_forward" in str(done["warnings"])


def test_typed_timeouts_are_set_and_a_size_that_is_the_hosts_is_refused_before_any_change(machine):
    name = "net.netfilter.nf_conntrack_udp_timeout_stream"
    path = "/proc/sys/" + name.replace(".", "/")
    former = machine.run("cat", path).strip()
    timeouts = {"timeouts": {"udp_timeout_stream": int(former) + 7}}
    refused = machine.module("kernel_settings", sysctls=conntrack_sysctls({**timeouts, "max": 4096}))
    assert refused["failed"]
    assert "net.netfilter.nf_conntrack_max cannot be set to '4096'" in refused["msg"]
    assert machine.run("cat", path).strip() == former
    done = machine.module("kernel_settings", sysctls=conntrack_sysctls(timeouts))
    assert done["sysctls"] == {name: {"before": former, "after": str(int(former) + 7)}}
    assert machine.run("cat", path).strip() == str(int(former) + 7)
    assert f"{name} = {int(former) + 7}" in machine.run("cat", FILES[1]).splitlines()
    assert not machine.module("kernel_settings", sysctls=conntrack_sysctls(timeouts))["changed"]
    machine.module("kernel_settings", state="absent")
    assert machine.run("cat", path).strip() == former
    unknown = machine.module("kernel_settings", sysctls=conntrack_sysctls({"timeouts": {"udp_timeout_steam": 9}}))
    assert "The kernel has no key net.netfilter.nf_conntrack_udp_timeout_steam." in unknown["msg"]
