# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""storage_pool_info with a real libvirtd."""

from __future__ import annotations

import os
import time

import pytest
from conftest import new_directory
from harness import module, virsh, virsh_status

FORMATS = ["raw", "qcow2", "vmdk", "vdi", "vhdx", "vpc", "qed", "qcow"]
ABILITIES = ("create", "clone", "linked", "flatten", "grow", "delete")


def able(*what, formats):
    return {**{ability: ability in what for ability in ABILITIES}, "formats": formats}


def look(**params):
    results = [module(params, check=check, module="storage_pool_info") for check in (True, False)]
    for result in results:
        assert not result.get("failed"), result
        assert not result["changed"] and not result.get("warnings"), result
    # Free space may change in between.
    assert [pool["name"] for pool in results[0]["pools"]] == [pool["name"] for pool in results[1]["pools"]]
    return results[1]["pools"]


@pytest.fixture
def pools(libvirtd, scratch):
    """One pool of each kind that can be defined here: a running dir, and others that are not running."""
    place = new_directory(scratch)
    virsh("pool-define-as", "images", "dir", "--target", place)
    virsh("pool-start", "images")
    virsh("pool-autostart", "images")
    virsh("pool-define-as", "fast", "fs", "--source-dev", "/dev/x", "--source-format", "xfs", "--target", "/mnt/x")
    virsh("pool-define-as", "isos", "netfs", "--source-host", "nas", "--source-path", "/isos", "--target", "/mnt/y")
    virsh("pool-define-as", "vg", "logical", "--source-name", "vg0", "--source-dev", "/dev/y", "--target", "/dev/vg0")
    virsh("pool-define-as", "luns", "iscsi", "--source-host", "san", "--source-dev", "iqn.x", "--target", "/dev/disk/by-path")
    yield place
    for name in ("images", "fast", "isos", "vg", "luns"):
        virsh_status("pool-destroy", name)
        virsh_status("pool-undefine", name)
    place.rmdir()


def test_all_pools_active_and_inactive(pools):
    found = {pool["name"]: pool for pool in look()}
    assert list(found) == ["fast", "images", "isos", "luns", "vg"]
    images = found["images"]
    shown = dict(line.split(":", 1) for line in virsh("pool-info", "images", "--bytes").splitlines() if ":" in line)
    assert images["uuid"] == shown["UUID"].strip()
    assert images["capacity"] == int(shown["Capacity"]) and images["allocation"] == int(shown["Allocation"])
    assert images["available"] == int(shown["Available"])
    assert {key: images[key] for key in ("type", "state", "autostart", "persistent", "path", "source")} == {
        **{"type": "dir", "state": "active", "autostart": True, "persistent": True, "path": str(pools), "source": {}}
    }
    assert images["capabilities"] == able(*ABILITIES, formats=FORMATS)
    fast = found["fast"]
    assert (fast["state"], fast["autostart"], fast["path"]) == ("inactive", False, "/mnt/x")
    assert (fast["capacity"], fast["allocation"], fast["available"]) == (None, None, None)
    assert fast["source"] == {"devices": ["/dev/x"], "format": "xfs"}
    assert found["isos"]["source"] == {"hosts": [{"name": "nas"}], "dir": "/isos", "format": "auto"}
    assert found["isos"]["capabilities"]["clone"] and fast["capabilities"]["clone"]
    assert found["vg"]["source"]["name"] == "vg0" and found["vg"]["source"]["devices"] == ["/dev/y"]
    assert found["vg"]["capabilities"] == able("create", "clone", "linked", "grow", "delete", formats=["raw"])
    assert found["luns"]["capabilities"] == able("clone", formats=["raw"])


def test_one_pool(pools):
    assert [pool["name"] for pool in look(name="fast")] == ["fast"]
    assert [pool["name"] for pool in look(pool="images")] == ["images"]


def test_a_pool_that_does_not_exist(pools):
    assert look(name="nothing") == []


def test_a_transient_pool(libvirtd, scratch):
    place = new_directory(scratch)
    virsh("pool-create-as", "passing", "dir", "--target", place)
    try:
        (found,) = look(name="passing")
        assert (found["persistent"], found["autostart"], found["state"]) == (False, False, "active")
    finally:
        virsh("pool-destroy", "passing")
        place.rmdir()


def test_a_directory(scratch):
    (found,) = look(name=str(scratch))
    status = os.statvfs(scratch)
    assert found["capacity"] == status.f_blocks * status.f_frsize == found["allocation"] + found["available"]
    assert {key: found[key] for key in ("name", "type", "state", "uuid", "autostart", "persistent", "path")} == {
        **{"name": str(scratch), "type": "directory", "state": "active", "uuid": None, "autostart": None, "persistent": None},
        "path": str(scratch),
    }
    assert found["capabilities"]["clone"]
    assert look(name="/nowhere/at/all") == []


def test_a_pool_whose_storage_is_gone_does_not_spoil_the_list(pools):
    pools.rmdir()
    try:
        assert [pool["name"] for pool in look()] == ["fast", "images", "isos", "luns", "vg"]
    finally:
        pools.mkdir()


def test_nothing_is_refreshed(pools):
    (pools / "new").write_text("data")
    look()
    assert virsh("vol-list", "images").strip() == ""
    (pools / "new").unlink()


def test_a_hundred_pools_are_quick(libvirtd):
    names = [f"many{number}" for number in range(100)]
    for name in names:
        virsh("pool-define-as", name, "dir", "--target", f"/nowhere/{name}")
    try:
        started = time.monotonic()
        assert len(module({}, module="storage_pool_info")["pools"]) == 100
        assert time.monotonic() - started < 5
    finally:
        for name in names:
            virsh("pool-undefine", name)


@pytest.mark.parametrize(
    "code, params, words",
    [
        ("INVALID_ARG", {"name": "a/b"}, ["name", "a/b"]),
        ("INVALID_ARG", {"name": ""}, ["name"]),
        ("INVALID_ARG", {"type": "dir"}, ["type"]),
        ("INVALID_ARG", {"uri": "nonsense"}, ["uri", "nonsense"]),
        ("IO_ERROR", {"uri": "qemu+tcp://127.0.0.1:9/system"}, ["uri", "qemu+tcp://127.0.0.1:9/system"]),
        ("IO_ERROR", {"uri": "nosuch:///system"}, ["uri", "nosuch:///system"]),
    ],
)
def test_bad_input(libvirtd, code, params, words):
    result = module(params, module="storage_pool_info")
    assert result["failed"] and result["error_code"] == code, result
    assert all(word in result["msg"] for word in words), result
