# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Logical volumes: no name until they are whole, no old data, no space lost by a killed run."""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import contextmanager

import pytest
from harness import (
    MIB,
    clone,
    make_raw,
    refused,
    result_of,
    run,
    same_content,
    settle,
    start,
    virsh,
    wait_until,
    warnings,
    zeros,
)
from plays import device_examples

SIZE = 512 * MIB


def volumes(group="vgclone"):
    """Size in bytes and origin of each, by name."""
    out = run("lvs", "--reportformat", "json", "--units", "b", "--nosuffix", "-o", "lv_name,lv_size,origin,segtype", group)
    return {row["lv_name"]: row for row in json.loads(out)["report"][0]["lv"]}


@contextmanager
def made_group(scratch, name):
    """A pool of logical volumes of that name on a disk that held something before."""
    image = scratch / f"{name}.img"
    with open(image, "wb") as file:
        for _piece in range(SIZE // MIB):
            file.write(b"old data" * (MIB // 8))
    device = run("losetup", "-f", "--show", image).strip()
    with open(device, "r+b") as file:
        file.write(bytes(MIB))
    run("vgcreate", "-q", name, device)
    virsh("pool-define-as", name, "logical", "--source-name", name, "--target", f"/dev/{name}")
    virsh("pool-start", name)
    try:
        yield name
    finally:
        if volumes(name):
            # All at once: with a thin pool go its volumes.
            run("lvremove", "-f", "-q", name)
        virsh("pool-destroy", name)
        virsh("pool-undefine", name)
        run("vgremove", "-f", "-q", name)
        run("losetup", "-d", device)
        image.unlink()


@pytest.fixture(scope="module")
def group(libvirtd, scratch):
    with made_group(scratch, "vgclone") as name:
        yield name


@pytest.fixture
def lvm(group):
    yield group
    if volumes():
        # All at once: with a thin pool go its volumes.
        run("lvremove", "-f", "-q", "vgclone")
    virsh("pool-refresh", group)


def reads_zero(name, begin):
    with open(f"/dev/vgclone/{name}", "rb") as file:
        file.seek(begin)
        return zeros(file.read())


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_a_logical_volume_shows_nothing_of_what_was_there(lvm, request, image_format):
    source = request.getfixturevalue(image_format)
    # Asked for is not a whole number of extents, of 4 MiB.
    result = settle(pool=lvm, name="web", source_path=source, capacity="98MiB")
    assert result["actions"] == ["created"]
    volume = result["volume"]
    assert (volume["type"], volume["capacity"], volume["path"]) == ("block", 100 * MIB, "/dev/vgclone/web")
    assert same_content(source, image_format, "/dev/vgclone/web", "raw")
    assert reads_zero("web", 64 * MIB)
    assert list(volumes()) == ["web"]
    assert "web" in virsh("vol-list", lvm)


def test_a_logical_volume_is_grown_and_what_is_added_reads_zero(lvm, raw):
    clone(pool=lvm, name="web", source_path=raw)
    result = settle(pool=lvm, name="web", source_path=raw, capacity="96MiB")
    assert result["actions"] == ["grown"]
    assert same_content(raw, "raw", "/dev/vgclone/web", "raw") and reads_zero("web", 64 * MIB)
    assert "72" in refused("DIFFERS", pool=lvm, name="web", source_path=raw, capacity="72MiB")


def test_a_run_killed_while_it_grows_is_made_up_for(lvm, raw, pool):
    clone(pool=lvm, name="web", source_path=raw)
    # As it is left behind between lvextend and the zeros.
    run("lvchange", "-q", "--addtag", f"virtforge_zero_from_{64 * MIB}_to_{96 * MIB}", "vgclone/web")
    run("lvextend", "-q", "-L", "96M", "vgclone/web")
    with open("/dev/vgclone/web", "r+b") as file:
        file.seek(64 * MIB)
        file.write(b"old data" * (MIB // 8))
    assert "grew it" in refused("CORRUPT_IMAGE", pool=pool, source_pool=lvm, source="web", name="copy")
    result = settle(pool=lvm, name="web", source_path=raw, capacity="96MiB")
    assert result["actions"] == ["grown"]
    assert reads_zero("web", 64 * MIB)
    # Killed before it was grown, which somebody else did later, to another length.
    run("lvchange", "-q", "--addtag", f"virtforge_zero_from_{64 * MIB}_to_{80 * MIB}", "vgclone/web")
    with open("/dev/vgclone/web", "r+b") as file:
        file.seek(70 * MIB)
        file.write(b"his data")
    assert clone(pool=lvm, name="web", source_path=raw, capacity="100MiB")["actions"] == ["grown"]
    assert clone(pool=lvm, name="web", source_path=raw, capacity="100MiB")["actions"] == []
    with open("/dev/vgclone/web", "rb") as file:
        file.seek(70 * MIB)
        assert file.read(8) == b"his data"
    assert "virtforge" not in run("lvs", "--noheadings", "-o", "lv_tags", "vgclone/web")


def test_a_logical_volume_that_differs_is_replaced_by_another(lvm, raw, pool):
    clone(pool=lvm, name="web", source_path=raw)
    other = make_raw(pool / "other.raw", 32 * MIB, [(7, 2)])
    params = {"pool": lvm, "name": "web", "source_path": other, "compare": "content", "capacity": "32MiB"}
    assert "its capacity is" in refused("DIFFERS", **params)
    assert settle(**params, force=True)["actions"] == ["replaced"]
    assert same_content(other, "raw", "/dev/vgclone/web", "raw")
    assert list(volumes()) == ["web"]
    with open("/dev/vgclone/web", "rb"):
        params["capacity"] = "16MiB"
        params["source_path"] = make_raw(pool / "third.raw", 16 * MIB, [(1, 2)])
        assert f"(pid {os.getpid()})" in refused("IN_USE", **params, force=True)


def test_logical_volumes_are_sources_and_many_at_once(lvm, raw, pool):
    clone(pool=lvm, name="base", source_path=raw)
    result = settle(pool=lvm, source="base", volumes=[{"name": "web1"}, {"name": "web2", "capacity": "72MiB"}])
    assert [volume["actions"] for volume in result["volumes"]] == [["created"]] * 2
    assert same_content(raw, "raw", "/dev/vgclone/web2", "raw")
    settle(pool=pool, source_pool=lvm, source="web1", name="back.qcow2", format="qcow2")
    assert same_content(raw, "raw", pool / "back.qcow2", "qcow2")
    run("lvchange", "-q", "-an", "vgclone/base")
    assert "'base'" in refused("OPERATION_INVALID", pool=pool, source_pool=lvm, source="base", name="copy")


def test_a_killed_run_leaves_no_volume_and_takes_no_space(lvm, pool):
    source = make_raw(pool / "base.raw", 96 * MIB, [(0, 96)])
    params = {"pool": lvm, "name": "web", "source_path": source}
    process = start({**params, "bwlimit": "2MiB"})
    wait_until(lambda: any(name.startswith(".virtforge-") for name in volumes()), 60)
    time.sleep(1)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert "web" not in volumes()
    assert settle(**params)["actions"] == ["created"]
    assert list(volumes()) == ["web"]
    assert same_content(source, "raw", "/dev/vgclone/web", "raw")


def test_a_volume_that_another_host_is_filling_is_left_alone(lvm, raw):
    """Of a volume group that hosts share: the lock of its run is there, not here."""
    run("lvcreate", "-y", "-q", "-Zn", "-Wn", "-L", "16M", "-n", ".virtforge-0123456789abcdef.tmp", lvm)
    settle(pool=lvm, name="web", source_path=raw)
    assert sorted(volumes()) == [".virtforge-0123456789abcdef.tmp", "web"]


def test_a_volume_over_several_disks_is_not_replaced_by_one_on_one(lvm, raw, device):
    disk = device(96 * MIB)
    run("vgextend", "-q", "vgclone", disk)
    run("lvcreate", "-y", "-q", "-i", "2", "-L", "64M", "-n", "web", "vgclone")
    params = {"pool": lvm, "name": "web", "source_path": raw, "compare": "content", "force": True}
    assert "as striped" in refused("NO_SUPPORT", **params)
    # An extent on each disk is the least that it can have more.
    for capacity, made in (("60MiB", 64), ("68MiB", 72)):
        settle("storage_volume", pool=lvm, name="web", capacity=capacity)
        assert int(volumes()["web"]["lv_size"]) == made * MIB
    assert reads_zero("web", 64 * MIB)
    run("lvremove", "-f", "-q", "vgclone/web")
    run("vgreduce", "-q", "vgclone", disk)
    run("pvremove", "-q", disk)


def test_a_thin_pool_that_does_not_zero_shows_nothing_either(lvm, pool):
    """A block of it that is written to in part keeps what the rest of it held."""
    run("lvcreate", "-y", "-q", "-Zn", "-L", "96M", "--thinpool", "thin", "vgclone")
    run("lvcreate", "-y", "-q", "-V", "16M", "--thinpool", "thin", "-n", "web", "vgclone")
    source = make_raw(pool / "sparse.raw", 16 * MIB, [(100, 1), (900, 1)], unit=4096)
    result = clone(pool=lvm, name="web", source_path=source, compare="content", force=True)
    assert result["actions"] == ["replaced"] and volumes()["web"]["segtype"] == "thin"
    assert same_content(source, "raw", "/dev/vgclone/web", "raw")


def test_a_thin_pool_that_is_too_full_is_not_filled_up(lvm, pool):
    """It would fail the writes of all its volumes."""
    run("lvcreate", "-y", "-q", "-L", "32M", "--thinpool", "thin", "vgclone")
    run("lvcreate", "-y", "-q", "-V", "64M", "--thinpool", "thin", "-n", "web", "vgclone")
    params = {"pool": lvm, "name": "web", "compare": "content", "force": True}
    source = make_raw(pool / "large.raw", 64 * MIB, [(1, 40)])
    assert "free in pool" in refused("NO_SPACE", **params, source_path=source)
    source = make_raw(pool / "small.raw", 64 * MIB, [(1, 20)])
    assert settle(**params, source_path=source)["actions"] == ["replaced"]
    assert same_content(source, "raw", "/dev/vgclone/web", "raw")


def test_a_name_that_lvm_does_not_have(lvm, raw):
    assert "characters" in refused("INVALID_ARG", pool=lvm, name="web 1", source_path=raw)
    assert not volumes()


def test_a_group_that_is_full(lvm, raw):
    assert "free in pool" in refused("NO_SPACE", pool=lvm, name="web", source_path=raw, capacity="1GiB")


def test_two_runs_for_one_logical_volume(lvm, qcow2):
    results = [
        result_of(process) for process in [start({"pool": lvm, "name": "web", "source_path": qcow2}) for _run in range(2)]
    ]
    assert sorted(result.get("actions", result.get("msg")) for result in results) == [[], ["created"]]


def test_snapshots_are_linked_clones(lvm, raw):
    clone(pool=lvm, name="base", source_path=raw)
    params = {"pool": lvm, "source": "base", "name": "web", "clone_type": "linked"}
    result = settle(**params)
    volume = result["volume"]
    assert (volume["transfer"], volume["backing"]) == ("link", {"path": "/dev/vgclone/base", "format": "raw", "depth": 1})
    # With its own records.
    assert 64 * MIB < volume["allocation"] <= 72 * MIB
    assert same_content(raw, "raw", "/dev/vgclone/web", "raw")
    assert volumes()["web"]["origin"] == "base"
    assert "linked clone" in refused("DIFFERS", **{**params, "clone_type": "full"})
    assert "capacity of that" in refused("NO_SUPPORT", **{**params, "name": "larger", "capacity": "96MiB"})
    assert "snapshot itself" in refused("NO_SUPPORT", **{**params, "source": "web", "name": "third"})
    # Thin: grown along, and nothing reserved for it.
    run("lvcreate", "-y", "-q", "-L", "96M", "--thinpool", "thin", "vgclone")
    run("lvcreate", "-y", "-q", "-V", "64M", "--thinpool", "thin", "-n", "tbase", "vgclone")
    run("dd", f"if={raw}", "of=/dev/vgclone/tbase", "bs=1M", "conv=fsync,sparse")
    result = settle(pool=lvm, source="tbase", name="tweb", clone_type="linked", capacity="80MiB")
    assert (result["volume"]["capacity"], result["volume"]["allocation"]) == (80 * MIB, 0)
    assert same_content(raw, "raw", "/dev/vgclone/tweb", "raw") and reads_zero("tweb", 64 * MIB)
    assert (volumes()["tweb"]["segtype"], volumes()["tweb"]["origin"]) == ("thin", "tbase")
    # It stays whole without its origin, and a second run has nothing to do then either.
    run("lvremove", "-f", "-q", "vgclone/tbase")
    again = clone(pool=lvm, source="tbase", name="tweb", clone_type="linked", capacity="80MiB")
    assert again["actions"] == [] and "tbase" in warnings(again)[0]


def test_the_examples_with_a_volume_group(libvirtd, scratch, pool):
    source = make_raw(pool / "source.raw", 32 * MIB)
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", source, pool / "debian-13.qcow2")
    with made_group(scratch, "vg0"):
        for module, options in device_examples("vg0", images=pool):
            settle(module, **options)
        found = volumes("vg0")
        assert sorted(found) == ["debian-13", "try1", "web1", "web2"]
        assert found["try1"]["origin"] == "debian-13" and int(found["web2"]["lv_size"]) == 40 * MIB
        for name in found:
            assert same_content(source, "raw", f"/dev/vg0/{name}", "raw"), name
        assert same_content(source, "raw", pool / "web1.qcow2", "qcow2")
