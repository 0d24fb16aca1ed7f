# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""storage_pool on a real LVM, a real NFS server, and disks of iSCSI and SCSI."""

from __future__ import annotations

import glob
import os
from pathlib import Path

import harness
import pytest
import test_pool
import yaml
from ansible_collections.virtforge.libvirt.plugins.modules import storage_pool
from conftest import remove_pools
from harness import MIB, module, run, virsh
from test_pool import POOL, names, refused, settle


@pytest.fixture(autouse=True)
def no_pools(libvirtd, device, monkeypatch):
    """They end with each test, before their devices do."""
    # One virsh instead of three for each pool, which takes an emulated processor a second each.
    monkeypatch.setattr(test_pool, "world", lambda params: (virsh("pool-list", "--all", "--details"), test_pool.tree(params)))
    yield
    remove_pools()
    for group in run("vgs", "--noheadings", "-o", "vg_name").split():
        run("vgremove", "-y", group)
    run("udevadm", "settle")


# --- logical --------------------------------------------------------------------------------------------------------------


def test_a_logical_pool_through_its_life(device):
    disks = [device(16 * MIB), device(16 * MIB)]
    source = {"name": "vgtest", "devices": disks, "format": "lvm2"}
    params = {"name": "vms", "type": "logical", "pool_source": source, "build": True}
    result = settle(["defined", "built", "started"], **params)
    assert result["pool"]["source"] == source and result["pool"]["path"] == "/dev/vgtest"
    assert run("vgs", "--noheadings", "-o", "pv_count", "vgtest").strip() == "2"
    virsh("vol-create-as", "vms", "kept", "8M")
    harness.write_at("/dev/vgtest/kept", 0, b"data")
    # The order of devices is none.
    settle([], **{**params, "pool_source": {**source, "devices": disks[::-1]}, "target_path": "/dev/vgtest/"})
    with open("/dev/vgtest/kept", "rb"):
        result = module({"name": "vms", "state": "inactive"}, module=POOL)
        assert (result["failed"], result["error_code"]) == (True, "IN_USE"), result
    settle(["stopped"], name="vms", state="inactive")
    settle(["started"], name="vms", autostart=False)
    settle(["redefined", "stopped", "started"], name="vms", pool_source={"devices": disks[:1]})
    settle(["stopped", "undefined"], name="vms", state="absent")
    # A volume group that exists needs no devices, and is taken as it is.
    settle(["defined", "started"], name="vgtest", type="logical")
    with open("/dev/vgtest/kept", "rb") as file:
        assert file.read(4) == b"data"


def test_the_example_in_the_documentation(device):
    """The one that needs a volume group."""
    examples = [task[f"virtforge.libvirt.{POOL}"] for task in yaml.safe_load(storage_pool.EXAMPLES)]
    (params,) = (params for params in examples if params.get("type") == "logical")
    links = [Path(path) for path in params["pool_source"]["devices"]]
    for link in links:
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(device(16 * MIB))
    settle(["defined", "built", "started"], **params)
    assert run("vgs", "--noheadings", "-o", "vg_name").split() == [params["pool_source"]["name"]]
    for link in links:
        link.unlink()


def test_a_volume_group_is_never_made_over_data(device):
    first, second, third = device(16 * MIB), device(16 * MIB), device(16 * MIB)
    run("vgcreate", "other", first)
    run("mkfs.ext4", "-q", second)
    before = [harness.data_of(disk) for disk in (first, second, third)]
    params = {"name": "vms", "type": "logical", "build": True}
    for devices, words in (
        ([third, first], [first, "LVM2_member", "'other'", "'vgtest'"]),
        ([third, second], [second, "a file system (ext4)"]),
    ):
        refused("OPERATION_INVALID", "never formats", *words, **params, pool_source={"name": "vgtest", "devices": devices})
    # A group that exists gets no other device.
    refused("OPERATION_INVALID", third, "never extends", "'other'", **params, pool_source={"name": "other", "devices": [third]})
    assert [harness.data_of(disk) for disk in (first, second, third)] == before and names() == []


def test_a_volume_group_that_does_not_exist():
    result = module({"name": "vms", "type": "logical"}, module=POOL)
    assert result["failed"] and "vms" in result["msg"] and names() == [], result


# --- NFS ------------------------------------------------------------------------------------------------------------------


def test_an_nfs_pool_through_its_life(nfs, place):
    path = str(place / "mnt")
    source = {"hosts": [{"name": "127.0.0.1"}], "dir": "/", "format": "nfs"}
    params = {"name": "shared", "type": "netfs", "target_path": path, "pool_source": source}
    result = settle(["created", "defined", "started"], **params, mode="0751")
    assert run("findmnt", "-n", "-o", "FSTYPE", path).strip() == "nfs4"
    assert result["pool"]["capacity"] > 200 * MIB and os.stat(nfs).st_mode & 0o777 == 0o751
    settle(["stopped"], name="shared", state="inactive")
    other = str(place / "other")
    settle(["created", "redefined", "started"], name="shared", target_path=other)
    assert os.path.ismount(other) and not os.path.ismount(path)
    settle(["stopped", "undefined"], name="shared", state="absent")
    assert not os.path.ismount(other)


# --- iSCSI and SCSI -------------------------------------------------------------------------------------------------------


def test_an_iscsi_pool_through_its_life(initiator):
    server = [{"name": initiator.host, "port": initiator.port}]
    source = {"hosts": server, "devices": [initiator.target]}
    params = {"name": "luns", "type": "iscsi", "pool_source": source}
    result = settle(["defined", "started"], **params)
    assert (result["pool"]["path"], result["pool"]["source"]) == ("/dev/disk/by-path", source)
    assert len(virsh("vol-list", "luns").split("\n\n")[0].splitlines()) == len(initiator.units)
    assert len(glob.glob("/dev/disk/by-path/*iqn.2026-01.test:open-lun-*")) >= len(initiator.units)
    # No domain has it, but what has would lose it.
    with open(glob.glob("/dev/disk/by-path/*iqn.2026-01.test:open-lun-1")[0], "rb"):
        result = module({"name": "luns", "state": "inactive"}, module=POOL)
        assert (result["failed"], result["error_code"]) == (True, "IN_USE"), result
    settle(["stopped"], name="luns", state="inactive")
    settle(["started"], name="luns")
    settle(["stopped", "undefined"], name="luns", state="absent")
    # With a password.
    auth = {"username": initiator.user, "password": initiator.password}
    secured = {"hosts": server, "devices": [initiator.chap_target], "auth": auth}
    settle(["secret", "defined", "started"], **{**params, "pool_source": secured})
    settle(["stopped", "undefined", "secret_removed"], name="luns", state="absent")


def test_a_scsi_pool_through_its_life(adapter):
    params = {"name": "disks", "type": "scsi", "pool_source": {"adapter": adapter}, "target_path": "/dev"}
    settle(["defined", "started"], **params)
    assert len(virsh("vol-list", "disks").strip().splitlines()) == 1
    settle([], name="disks", pool_source={"adapter": f"scsi_{adapter}"})
    settle(["stopped", "undefined"], name="disks", state="absent")
