# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""storage_volume and storage_volume_info where volumes are logical volumes.

A run takes seconds in this machine, so each test goes through a whole life.
"""

from __future__ import annotations

import os

import pytest
from harness import MIB, clone, held, module, run, settle, virsh, virsh_status, warnings

VOLUME, INFO = "storage_volume", "storage_volume_info"
ABSENT = {"state": "absent"}
SECRET = b"what nobody shall read any more "


def volumes(pool):
    return {volume["name"]: volume for volume in clone(INFO, pool=pool)["volumes"]}


def refused(code, **params):
    """The message of a check run that must fail, which is that of the run."""
    result = module(params, check=True, module=VOLUME)
    assert result.get("error_code") == code, result
    return result["msg"]


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


def test_the_life_of_a_logical_volume(group, disk):
    path = "/dev/vglife/data"
    result = settle(VOLUME, pool=group, name="data", capacity="10000000")
    # Whole extents.
    assert (result["actions"], result["volume"]["capacity"]) == (["created"], 12 * MIB)
    with open(path, "rb") as file:
        assert not any(file.read())
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
    result = settle(VOLUME, pool=group, name="data", capacity="20MiB")
    assert (result["actions"], result["volume"]["capacity"]) == (["grown"], 20 * MIB)
    assert "lacks" in refused("NO_SPACE", pool=group, name="data", capacity="1GiB")
    with held(path) as process:
        assert volumes(group)["data"]["in_use_by"] == [f"qemu-io (pid {process.pid})"]
        assert "qemu-io" in refused("IN_USE", pool=group, name="data", force=True, **ABSENT)

    with open(path, "r+b") as file:
        file.write(SECRET)
    result = settle(VOLUME, pool=group, name="data", wipe=True, **ABSENT)
    assert result["actions"] == ["wiped", "deleted"] and result["volume"]["path"] == path
    assert volumes(group) == {} and not os.path.exists(path)
    assert "data" not in virsh("vol-list", group)
    run("lvcreate", "-q", "-y", "-Zn", "-Wn", "-L", "20M", "-n", "again", group)
    with open("/dev/vglife/again", "rb") as file:
        assert not any(file.read(20 * MIB))


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

    unchanged = clone(VOLUME, pool=group, name="snap")
    assert not unchanged["changed"] and unchanged["volume"]["backing"] == backing
    for code, stated, word in (
        ("NO_SUPPORT", {"name": "snap", "flatten": True}, "snapshot"),
        ("OPERATION_INVALID", {"name": "snap", "capacity": "20MiB"}, "it is a snapshot"),
        ("OPERATION_INVALID", {"name": "base", "capacity": "20MiB"}, "snapshots (snap)"),
        ("OPERATION_INVALID", {"name": "base", **ABSENT}, "1 volume depends on it: snap; force=true deletes those too"),
        ("NO_SUPPORT", {"name": "base", "force": True, "wipe": True, **ABSENT}, "snapshots (snap)"),
        ("NO_SUPPORT", {"name": "tbase", "wipe": True, **ABSENT}, "thin"),
    ):
        assert word in refused(code, pool=group, **stated)
    with held("/dev/vglife/snap"):
        assert "(as 'snap')" in refused("IN_USE", pool=group, name="base", force=True, **ABSENT)

    (warning,) = warnings(settle(VOLUME, pool=group, name="base", force=True, **ABSENT))
    assert "'base'" in warning and "those are deleted too" in warning
    assert not warnings(clone(VOLUME, pool=group, name="tbase", **ABSENT))
    assert clone(VOLUME, pool=group, name="tsnap", capacity="2GiB")["actions"] == ["grown"]
    # One that is not active has no device.
    run("lvchange", "-q", "-an", f"{group}/tsnap")
    found = volumes(group)
    assert list(found) == ["tsnap"] and (found["tsnap"]["capacity"], found["tsnap"]["backing"]) == (2 << 30, None)
    assert "not active" in refused("OPERATION_INVALID", pool=group, name="tsnap", capacity="2GiB")
    assert clone(VOLUME, pool=group, name="tsnap", **ABSENT)["actions"] == ["deleted"]
