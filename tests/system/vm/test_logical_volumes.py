# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""storage_volume and storage_volume_info where volumes are logical volumes."""

from __future__ import annotations

import os

import harness
import pytest
from harness import MIB, held, run, virsh, virsh_status

ABSENT = {"state": "absent"}
SECRET = b"what nobody shall read any more "


def tasks(*wanted):
    """Results for (check mode, parameters); a pool alone is for storage_volume_info."""
    return [
        harness.module(params, check=check, module="storage_volume" if len(params) > 1 else "storage_volume_info")
        for check, params in wanted
    ]


def volumes(pool):
    (result,) = tasks((False, {"pool": pool}))
    return {volume["name"]: volume for volume in result["volumes"]}


def settle(**params):
    return harness.settle("storage_volume", **params)


@pytest.fixture(scope="module")
def disk(scratch):
    """A disk that held something before."""
    image = scratch / "life.img"
    image.write_bytes(SECRET * (128 * MIB // len(SECRET)))
    path = run("losetup", "-f", "--show", image).strip()
    with open(path, "r+b") as file:
        file.write(bytes(MIB))
    yield path
    run("losetup", "-d", path)


@pytest.fixture
def group(libvirtd, disk):
    run("vgcreate", "-q", "vglife", disk)
    virsh("pool-define-as", "vglife", "logical", "--source-name", "vglife", "--target", "/dev/vglife")
    virsh("pool-start", "vglife")
    yield "vglife"
    # Before the group: libvirt's way to stop the pool is to deactivate the group.
    virsh_status("pool-destroy", "vglife")
    virsh_status("pool-undefine", "vglife")
    run("vgremove", "-f", "-q", "vglife")


def test_the_life_of_a_logical_volume(group):
    path = "/dev/vglife/data"
    result = settle(pool=group, name="data", capacity="10000000")
    # Whole extents.
    assert (result["actions"], result["volume"]["capacity"]) == (["created"], 12 * MIB)
    with open(path, "rb") as file:
        assert harness.zeros(file.read())
    found = volumes(group)["data"]
    assert found == {
        **{"name": "data", "pool": group, "path": path, "key": path, "type": "block", "format": "raw"},
        **dict.fromkeys(("capacity", "allocation", "physical"), 12 * MIB),
        **dict.fromkeys(("backing", "owner", "group", "mode", "error_code", "msg")),
        **{"backing_chain": [], "dependents": [], "in_use_by": []},
    }
    assert {key: result["volume"][key] for key in found if key in result["volume"]} == {
        key: found[key] for key in found if key in result["volume"]
    }
    result = settle(pool=group, name="data", capacity="20MiB")
    assert (result["actions"], result["volume"]["capacity"]) == (["grown"], 20 * MIB)
    data = {"pool": group, "name": "data"}
    with held(path) as process:
        described, full, used = tasks(
            (True, {"pool": group}), (True, {**data, "capacity": "1GiB"}), (True, {**data, "force": True, **ABSENT})
        )
    assert described["volumes"][0]["in_use_by"] == [f"qemu-io (pid {process.pid})"]
    assert full["error_code"] == "NO_SPACE" and "lacks" in full["msg"]
    assert used["error_code"] == "IN_USE" and "qemu-io" in used["msg"]

    with open(path, "r+b") as file:
        file.write(SECRET)
    result, again, described = tasks(
        (False, {**data, "wipe": True, **ABSENT}), (False, {**data, **ABSENT}), (True, {"pool": group})
    )
    assert result["actions"] == ["wiped", "deleted"] and result["volume"]["path"] == path
    assert (again["changed"], described["volumes"], os.path.exists(path)) == (False, [], False)
    assert "data" not in virsh("vol-list", group)
    run("lvcreate", "-q", "-y", "-Zn", "-Wn", "-L", "20M", "-n", "again", group)
    with open("/dev/vglife/again", "rb") as file:
        assert harness.zeros(file.read(20 * MIB))


def test_snapshots(group):
    """What changed since has a place of its own; a thin snapshot stands alone."""
    run("lvcreate", "-q", "-y", "-L", "8M", "-n", "base", group)
    run("lvcreate", "-q", "-y", "-s", "-L", "4M", "-n", "snap", f"{group}/base")
    run("lvcreate", "-q", "-y", "-L", "32M", "-T", f"{group}/thin")
    run("lvcreate", "-q", "-y", "-V", "1G", "-T", f"{group}/thin", "-n", "tbase")
    run("lvcreate", "-q", "-y", "-kn", "-s", "-n", "tsnap", f"{group}/tbase")
    run("lvcreate", "-q", "-y", "-L", "4M", "-n", ".virtforge-0123456789abcdef.tmp", group)
    found = volumes(group)
    assert list(found) == ["base", "snap", "tbase", "tsnap"]
    backing = {"path": "/dev/vglife/base", "format": "raw", "depth": 1}
    snap, tsnap = found["snap"], found["tsnap"]
    assert (snap["capacity"], snap["allocation"], snap["backing"]) == (8 * MIB, 4 * MIB, backing)
    assert found["base"]["dependents"] == ["snap"] and snap["backing_chain"] == [{"path": backing["path"], "format": "raw"}]
    assert (tsnap["capacity"], tsnap["backing"]["path"], found["tbase"]["dependents"]) == (1 << 30, "/dev/vglife/tbase", [])
    assert tsnap["allocation"] < 32 * MIB

    refusals = [
        ("NO_SUPPORT", {"name": "snap", "flatten": True}, "snapshot"),
        ("OPERATION_INVALID", {"name": "snap", "capacity": "20MiB"}, "it is a snapshot"),
        ("OPERATION_INVALID", {"name": "base", "capacity": "20MiB"}, "snapshots (snap)"),
        ("OPERATION_INVALID", {"name": "base", **ABSENT}, "1 volume depends on it: snap; force=true deletes those too"),
        ("IN_USE", {"name": "base", "force": True, **ABSENT}, "(as 'snap')"),
    ]
    with held("/dev/vglife/snap"):
        unchanged, *refused = tasks(
            (False, {"pool": group, "name": "snap"}), *((True, {"pool": group, **stated}) for _code, stated, _word in refusals)
        )
    assert not unchanged["changed"] and unchanged["volume"]["backing"] == backing
    for (code, _stated, word), result in zip(refusals, refused):
        assert result["error_code"] == code and word in result["msg"], result

    wiped, removed, alone, grown = tasks(
        (True, {"pool": group, "name": "base", "force": True, "wipe": True, **ABSENT}),
        (False, {"pool": group, "name": "base", "force": True, **ABSENT}),
        (False, {"pool": group, "name": "tbase", **ABSENT}),
        (False, {"pool": group, "name": "tsnap", "capacity": "2GiB"}),
    )
    assert wiped["error_code"] == "NO_SUPPORT" and "snapshots (snap)" in wiped["msg"]
    (warning,) = harness.warnings(removed)
    assert "'base'" in warning and "those are deleted too" in warning
    assert alone["actions"] == ["deleted"] and not harness.warnings(alone)
    assert grown["actions"] == ["grown"]

    # One that is not active has no device.
    run("lvchange", "-q", "-an", f"{group}/tsnap")
    described, stopped, deleted = tasks(
        (False, {"pool": group}),
        (True, {"pool": group, "name": "tsnap", "capacity": "2GiB"}),
        (False, {"pool": group, "name": "tsnap", **ABSENT}),
    )
    assert [(one["name"], one["capacity"], one["backing"]) for one in described["volumes"]] == [("tsnap", 2 << 30, None)]
    assert stopped["error_code"] == "OPERATION_INVALID" and "not active" in stopped["msg"]
    assert deleted["actions"] == ["deleted"]
