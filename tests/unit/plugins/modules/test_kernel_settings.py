# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import pytest
from ansible_collections.ctsync.ha_firewall.plugins.modules import kernel_settings


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("net.ipv4.ip_forward", "net/ipv4/ip_forward"),
        ("net/ipv4/conf/eth0.10/rp_filter", "net/ipv4/conf/eth0.10/rp_filter"),
        ("net.ipv4.conf.eth0/10.rp_filter", "net/ipv4/conf/eth0.10/rp_filter"),
    ],
)
def test_both_notations_of_sysctl_d_lead_to_the_same_path(name, path):
    assert kernel_settings.key_path(name) == "/proc/sys/" + path
    assert kernel_settings.is_key(name)


@pytest.mark.parametrize("name", ["", "forward", "net..ip", "net/../../etc/passwd", "net.*.x", "/etc/passwd", "a b.c"])
def test_what_cannot_be_a_key_is_refused(name):
    assert not kernel_settings.is_key(name)


def test_a_file_that_wins_at_boot_is_found(tmp_path):
    etc, lib = tmp_path / "etc", tmp_path / "lib"
    etc.mkdir()
    lib.mkdir()
    (etc / "10-early.conf").write_text("net.ipv4.ip_forward=0\n")
    (etc / "80-masked.conf").write_text("# nothing\n")
    (lib / "80-masked.conf").write_text("net.ipv4.ip_forward=0\n")
    (lib / "70-same.conf").write_text("net.ipv4.ip_forward = 1\n")

    def found():
        return kernel_settings.overriding("net.ipv4.ip_forward", "1", "/x/60-ctsync.conf", (str(etc), str(lib)))

    assert found() == ""
    (lib / "90-late.conf").write_text("; net.ipv4.ip_forward = 0\n-net.ipv4.ip_* = 0\n")
    assert found() == str(lib / "90-late.conf")
    (etc / "99-last.conf").write_text("net/ipv4/ip_forward = 1\n")
    assert found() == ""
