# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The lab's decisions: what to start, where the image comes from, how nodes are made and wired."""

from __future__ import annotations

import io
import json
import pathlib
import tarfile

import pytest
from ansible_collections.ctsync.ha_firewall.plugins.module_utils import _lab

FW1 = {
    "name": "fw1",
    "interfaces": [
        {"name": "eth0", "segment": "outside", "addresses": ["192.168.1.1/24", "fd00:c0de:1:0::1/64"]},
        {"name": "eth2", "segment": "sync", "addresses": ["192.168.100.1/24"]},
    ],
    "routes": [{"destination": "default", "gateway": "192.168.1.100"}],
}


def no_file(path):
    raise AssertionError(f"{path} should not be read")


@pytest.fixture
def fw1():
    return _lab.parse_node(FW1, no_file)


class FakeRun:
    """Answers commands by their first words, and remembers them."""

    def __init__(self, answers):
        self.answers, self.calls = answers, []

    def __call__(self, args, **_more):
        self.calls.append(list(args))
        for words, result in self.answers.items():
            if " ".join(args).startswith(words):
                return result
        return _lab.Result(0, "", "")


# --- engine ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.parametrize("systemd", [True, False])
def test_an_engine_that_answers_is_never_touched(installed, systemd):
    assert _lab.engine_plan(answers=True, installed=installed, debian=True, systemd=systemd) == []


def test_a_missing_engine_is_installed_and_started_the_way_the_machine_starts_things():
    assert _lab.engine_plan(False, installed=False, debian=True, systemd=False) == ["install", "start-background"]
    assert _lab.engine_plan(False, installed=False, debian=True, systemd=True) == ["install", "start-systemd"]
    assert _lab.engine_plan(False, installed=True, debian=False, systemd=False) == ["start-background"]
    with pytest.raises(_lab.LabError, match="install and start Docker"):
        _lab.engine_plan(False, installed=False, debian=False, systemd=True)


def test_our_engine_leaves_the_hosts_firewall_and_other_engines_data_alone():
    arguments = _lab.dockerd_arguments()
    for option in ("--bridge=none", "--iptables=false", "--ip6tables=false", "--ip-forward=false"):
        assert option in arguments
    assert any(option.startswith("--data-root=/var/lib/ctsync-lab/") for option in arguments)


def test_only_the_daemon_that_the_pid_file_means_is_ours(tmp_path, monkeypatch):
    monkeypatch.setattr(_lab, "RUN_DIRECTORY", str(tmp_path))
    assert _lab.background_pid() is None
    (tmp_path / "dockerd.pid").write_text("1\n", encoding="ascii")  # alive, but no dockerd
    assert _lab.background_pid() is None
    with open("/proc/1/comm", encoding="ascii") as stream:
        assert _lab.background_pid(stream.read().strip()) == 1


def test_packages_that_are_there_are_not_installed_and_new_ones_are_remembered(tmp_path, monkeypatch):
    monkeypatch.setattr(_lab, "STATE_DIRECTORY", str(tmp_path / "state"))
    run = FakeRun(
        {
            "dpkg-query -W -f ${Status} zstd": _lab.Result(0, "install ok installed", ""),
            "dpkg-query": _lab.Result(1, "", "no packages found"),
        }
    )
    assert _lab.install_packages(run, ["zstd"]) == []
    assert not any(call[0] == "apt-get" for call in run.calls)
    assert _lab.install_packages(run, ["zstd", "mmdebstrap"]) == ["mmdebstrap"]
    assert ["apt-get", "install", "-y", "--no-install-recommends", "mmdebstrap"] in run.calls
    assert _lab.read_record()["packages"] == ["mmdebstrap"]


def test_a_failing_installation_says_what_apt_said(tmp_path, monkeypatch):
    monkeypatch.setattr(_lab, "STATE_DIRECTORY", str(tmp_path))
    run = FakeRun({"dpkg-query": _lab.Result(1, "", ""), "apt-get install": _lab.Result(100, "", "E: no such package")})
    with pytest.raises(_lab.LabError, match="E: no such package"):
        _lab.install_packages(run, ["docker.io"])
    assert _lab.read_record()["packages"] == []


def test_mount_points_are_read_with_their_blanks():
    line = "36 35 98:0 / /srv/a\\040b\\134c rw,noatime master:1 - ext3 /dev/root rw\n"
    assert _lab.mount_points(line + "37 35 0:1 / /run rw - tmpfs none rw\n") == ["/srv/a b\\c", "/run"]


def test_a_folder_that_is_a_mount_point_is_emptied_and_stays(tmp_path, monkeypatch):
    for folder in ("data", "plain"):
        (tmp_path / folder / "sub").mkdir(parents=True)
        (tmp_path / folder / "file").touch()
        (tmp_path / folder / "link").symlink_to(tmp_path)
    monkeypatch.setattr(_lab, "mount_points", lambda text: [str(tmp_path / "data")] if text else [])
    _lab.remove_tree(str(tmp_path / "data"))
    assert list((tmp_path / "data").iterdir()) == []
    _lab.remove_tree(str(tmp_path / "plain"))
    assert not (tmp_path / "plain").exists()
    _lab.remove_tree(str(tmp_path / "never"))


def test_what_is_mounted_inside_and_cannot_be_unmounted_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(_lab, "mount_points", lambda text: [str(tmp_path / "data/inside")])
    with pytest.raises(_lab.LabError, match=f"umount {tmp_path}/data/inside"):
        _lab.remove_tree(str(tmp_path / "data"))


# --- image ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "exists", "cached", "order"),
    [
        ("auto", True, True, ["existing"]),
        ("auto", False, True, ["cache", "registry", "bootstrap"]),
        ("auto", False, False, ["registry", "bootstrap"]),
        ("bootstrap", False, False, ["bootstrap"]),
        ("registry", False, True, ["registry"]),
    ],
)
def test_the_base_image_is_looked_for_near_before_far(mode, exists, cached, order):
    assert _lab.base_sources(mode, exists, cached) == order


def test_a_changed_recipe_is_another_image():
    tag = _lab.node_tag("ctsync-node", "bookworm", "FROM x\n")
    assert tag.startswith("ctsync-node:bookworm-")
    assert tag == _lab.node_tag("ctsync-node", "bookworm", "FROM x\n")
    assert (
        len(
            {
                tag,
                _lab.node_tag("ctsync-node", "bookworm", "FROM y\n"),
                _lab.node_tag("ctsync-node", "trixie", "FROM x\n"),
            }
        )
        == 3
    )


def test_mirrors_are_those_of_the_machine_and_nobody_elses():
    targets = (
        "http://mirror.example/debian|Debian|main|bookworm\n"
        "http://mirror.example/debian|Debian|contrib|bookworm\n"
        "http://mirror.example/debian|Debian|main|bookworm-updates\n"
        "http://mirror.example/debian-security/|Debian|main|bookworm-security\n"
        "http://vendor.example/apt|Vendor|main|stable\n"
    )
    assert _lab.apt_lines(targets, "trixie") == [
        "deb http://mirror.example/debian trixie main",
        "deb http://mirror.example/debian trixie-updates main",
        "deb http://mirror.example/debian-security trixie-security main",
    ]
    assert _lab.apt_lines("http://vendor.example/apt|Vendor|main|stable\n", "bookworm") == []


def test_the_package_index_is_what_apt_reads():
    said = ">>> a_1_all.deb\nPackage: a\nVersion: 1\nDescription: one\n more\n>>> b_2_all.deb\nPackage: b\n"
    controls = _lab.split_controls(said)
    assert list(controls) == ["a_1_all.deb", "b_2_all.deb"]
    index = _lab.packages_index({name: (control, 7, "00ff") for name, control in controls.items()})
    paragraphs = index.split("\n\n")
    assert len(paragraphs) == 2
    assert paragraphs[0].startswith("Package: a\n")
    assert " more\nFilename: ./a_1_all.deb\nSize: 7\nSHA256: 00ff" in paragraphs[0]
    assert f" {len(index.encode())} Packages\n" in _lab.release_file(index)


# --- nodes ----------------------------------------------------------------------------------------------------------


def test_a_node_gets_no_network_and_no_more_rights_than_it_needs(fw1):
    arguments = _lab.create_arguments("ctsync-", fw1, "image", "0123")
    assert arguments[-2:] == ["image", "/sbin/init"]
    assert arguments[arguments.index("--network") + 1] == "none"
    given = {arguments[index + 1] for index, word in enumerate(arguments) if word == "--cap-add"}
    assert given == {"SYS_ADMIN", "NET_ADMIN"}
    assert "--privileged" not in arguments
    assert "fw1:127.0.1.1" in arguments
    assert "net.ipv4.ip_forward=0" in arguments


def test_ipv6_is_left_out_where_the_host_has_none():
    node = _lab.parse_node({**FW1, "routes": [{"destination": "default", "gateway": "fd00::1"}]}, no_file, ipv6=False)
    assert node.interfaces[0].addresses == ("192.168.1.1/24",)
    assert node.routes == ()
    assert not any("ipv6" in word for word in _lab.create_arguments("p-", node, "i", "s", ipv6=False))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"interfaces": [{"name": "eth0", "segment": "in", "addresses": ["192.168.0.300/24"]}]}, "192.168.0.300"),
        ({"interfaces": [{"name": "eth0", "segment": "in", "addresses": ["192.168.0.3"]}]}, "no prefix length"),
        ({"interfaces": [{"name": "eth0", "segment": "in"}] * 2}, "appears twice"),
        ({"name": "a-very-long-name"}, "longer than 15"),
        ({"interfaces": [{"name": "eth0", "segment": "a-long-segment", "addresses": []}]}, "longer than 15"),
    ],
)
def test_a_wrong_description_is_refused_by_name(change, words):
    with pytest.raises(_lab.LabError, match=words):
        _lab.parse_node({**FW1, **change}, no_file)


def test_the_digest_follows_what_the_container_is_made_from_but_not_its_wires(fw1):
    digest = _lab.spec_digest("ctsync-", fw1, "sha256:1")
    rewired = _lab.parse_node({**FW1, "interfaces": []}, no_file)
    with_file = _lab.parse_node({**FW1, "files": [{"path": "/etc/x", "content": "1"}]}, no_file)
    assert _lab.spec_digest("ctsync-", rewired, "sha256:1") == digest
    assert _lab.spec_digest("ctsync-", fw1, "sha256:2") != digest
    assert _lab.spec_digest("ctsync-", with_file, "sha256:1") != digest


def test_first_files_keep_the_images_folders_and_close_the_keys(tmp_path):
    key = tmp_path / "key"
    key.write_text("secret", encoding="utf-8")
    node = _lab.parse_node(
        {
            "name": "a",
            "files": [
                {"path": "/root/.ssh/id", "src": str(key), "mode": "0600"},
                {"path": "/etc/systemd/system/x.service", "link_to": "/lib/x.service"},
            ],
        },
        lambda path: pathlib.Path(path).read_text(encoding="utf-8"),
    )
    with tarfile.open(fileobj=io.BytesIO(_lab.files_archive(node.files))) as archive:
        members = {member.name: member for member in archive.getmembers()}
        assert archive.extractfile("root/.ssh/id").read() == b"secret"
    assert set(members) == {"root/.ssh", "root/.ssh/id", "etc/systemd/system/x.service"}
    assert (members["root/.ssh"].mode, members["root/.ssh/id"].mode) == (0o700, 0o600)
    assert members["etc/systemd/system/x.service"].linkname == "/lib/x.service"


# --- wiring ---------------------------------------------------------------------------------------------------------

WIRED = _lab.Observed(
    ports={
        "fw1-eth0": _lab.Link(10, "br-outside", True),
        "fw1-eth2": _lab.Link(11, "br-sync", True),
    },
    links={"lo": _lab.Link(1, "", True), "eth0": _lab.Link(2, "", True), "eth2": _lab.Link(3, "", True)},
    addresses={
        "eth0": frozenset({"192.168.1.1/24", "fd00:c0de:1::1/64", "192.168.1.100/24"}),
        "eth2": frozenset({"192.168.100.1/24"}),
    },
    routes=frozenset({("0.0.0.0/0", "192.168.1.100")}),
)


def test_what_is_right_needs_no_step_even_with_a_virtual_ip_on_it(fw1):
    assert _lab.wiring_plan(fw1, WIRED) == []


def test_a_new_node_is_plugged_in_before_it_is_addressed_and_routed_last(fw1):
    steps = _lab.wiring_plan(fw1, _lab.Observed({}, {}, {}, frozenset()))
    assert [step.action for step in steps] == ["plug", "address", "address", "up", "plug", "address", "up", "route"]
    assert steps[0] == _lab.Step("plug", "eth0", "outside")
    assert steps[-1] == _lab.Step("route", "0.0.0.0/0", "192.168.1.100")


def test_a_cut_port_is_put_back_and_nothing_else(fw1):
    cut = WIRED._replace(ports={**WIRED.ports, "fw1-eth0": _lab.Link(10, "", True)})
    assert _lab.wiring_plan(fw1, cut) == [_lab.Step("attach", "eth0", "outside")]


def test_a_lost_address_and_a_link_that_is_down_are_mended(fw1):
    hurt = WIRED._replace(
        addresses={**WIRED.addresses, "eth2": frozenset()}, links={**WIRED.links, "eth2": _lab.Link(3, "", False)}
    )
    assert _lab.wiring_plan(fw1, hurt)[:2] == [
        _lab.Step("address", "eth2", "192.168.100.1/24"),
        _lab.Step("up", "eth2"),
    ]


def test_a_card_keeps_its_address_and_no_two_are_the_same():
    cards = [("fw1", "eth0"), ("fw1", "eth1"), ("fw2", "eth0")]
    addresses = [_lab.mac_address("ctsync-", *card) for card in cards]
    assert addresses == [_lab.mac_address("ctsync-", *card) for card in cards]
    assert len(set(addresses)) == 3
    assert all(int(address[:2], 16) & 3 == 2 for address in addresses)  # locally administered, not a group's


# --- Docker ---------------------------------------------------------------------------------------------------------


def test_containers_that_do_not_exist_are_no_error_but_a_dead_engine_is():
    known = {
        "Name": "/ctsync-fw1",
        "State": {"Pid": 42, "Running": True},
        "Config": {"Labels": {_lab.LABEL_SPEC: "s", _lab.LABEL_LAB: "ctsync-"}},
    }
    docker = _lab.Docker(
        FakeRun(
            {"docker container inspect": _lab.Result(1, json.dumps([known]), "Error: No such container: ctsync-a\n")}
        )
    )
    assert docker.containers(["ctsync-fw1", "ctsync-a"]) == {
        "ctsync-fw1": _lab.Container("ctsync-fw1", 42, True, "s", "ctsync-")
    }
    dead = _lab.Docker(FakeRun({"docker": _lab.Result(1, "[]", "Cannot connect to the Docker daemon\n")}))
    with pytest.raises(_lab.LabError, match="Cannot connect"):
        dead.containers(["ctsync-fw1"])


def test_a_node_that_dies_while_booting_is_told_from_one_that_is_slow():
    gone = _lab.Docker(
        FakeRun({"docker exec": _lab.Result(1, "", "is not running"), "docker container": _lab.Result(0, "[]", "")})
    )
    with pytest.raises(_lab.LabError, match="ended while booting"):
        gone.wait_booted("ctsync-fw1", 5)
    booted = _lab.Docker(FakeRun({"docker exec": _lab.Result(1, "degraded\n", "")}))
    assert booted.wait_booted("ctsync-fw1", 5) == "degraded"


def test_commands_that_fail_hang_or_are_missing_are_results_not_exceptions(tmp_path):
    assert _lab.run_command(["false"]).rc == 1
    assert _lab.run_command(["no-such-program-here"]).rc == 127
    assert _lab.run_command(["sleep", "60"], timeout=0.1).rc == 124
    log = tmp_path / "log"
    assert _lab.run_command(["sh", "-c", "echo out; echo err >&2"], log=str(log)).out.endswith("out\nerr\n")
    with pytest.raises(_lab.LabError, match=r"what failed \(exit code 3\): why"):
        _lab.must(_lab.Result(3, "", "why\n"), "what")
