# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""storage_volume and storage_volume_info where volumes are devices: the partitions of a disk."""

from __future__ import annotations

import os

import pytest
from conftest import DOMAIN, remove_pool
from harness import (
    MIB,
    clone,
    held,
    make_raw,
    module,
    refused,
    result_of,
    run,
    same_content,
    settle,
    start,
    virsh,
    warnings,
    zeros,
)
from plays import device_examples

VOLUME, INFO = "storage_volume", "storage_volume_info"
ABSENT = {"state": "absent"}
MARK = b"virtforge.libvirt: this volume is not finished\n".ljust(4096, b"\0")
SECRET = b"what nobody shall read any more "


def partitions(pool):
    return {volume["name"]: volume for volume in clone(INFO, pool=pool)["volumes"]}


def write(path, data, at=0):
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)
        os.fsync(file.fileno())


def read(path, length=-1):
    with open(path, "rb") as file:
        return file.read(length)


@pytest.fixture
def disk(libvirtd, device):
    """A pool of partitions on a disk full of old data: its name, and the path of a partition by its number."""
    path = device(64 * MIB)
    write(path, SECRET * (64 * MIB // len(SECRET)))
    run("parted", "-s", path, "mklabel", "gpt")
    name = f"disk{os.path.basename(path)}"
    virsh("pool-define-as", name, "disk", "--source-dev", path, "--source-format", "gpt", "--target", "/dev")
    virsh("pool-start", name)
    yield name, lambda number: f"{path}p{number}"
    remove_pool(name)


def test_the_life_of_a_partition(disk):
    pool, path = disk
    names = [os.path.basename(path(number)) for number in (1, 2)]
    assert partitions(pool) == {}
    result = settle(VOLUME, pool=pool, name=names[0], capacity="10000000")
    assert result["actions"] == ["created"]
    # Whole MiB; nothing of what the disk held shows.
    assert zeros(read(path(1))) and len(read(path(1))) == 10 * MIB
    made = result["volume"]
    found = partitions(pool)[names[0]]
    assert found == {
        "name": names[0],
        "pool": pool,
        **dict.fromkeys(("path", "key"), path(1)),
        "type": "block",
        "format": "raw",
        **dict.fromkeys(("capacity", "allocation", "physical"), 10 * MIB),
        **dict.fromkeys(("backing", "owner", "group", "mode", "error_code", "msg")),
        **{"backing_chain": [], "dependents": [], "in_use_by": []},
    }
    assert {key: made[key] for key in found if key in made} == {key: found[key] for key in found if key in made}

    assert not clone(VOLUME, pool=pool, name=names[0], flatten=True)["changed"]
    assert "cannot be grown" in refused("NO_SUPPORT", VOLUME, pool=pool, name=names[0], capacity="20MiB")
    assert names[1] in refused("INVALID_ARG", VOLUME, pool=pool, name="data", capacity="1MiB")

    clone(VOLUME, pool=pool, name=names[1], capacity="5MiB")
    result = settle(VOLUME, pool=pool, name=names[0], **ABSENT)
    assert (result["actions"], result["volume"]["path"]) == (["deleted"], path(1))
    assert result["diff"]["after"] == {} and result["diff"]["before"]["capacity"] == 10 * MIB
    assert not os.path.exists(path(1)) and list(partitions(pool)) == [names[1]]
    assert names[0] not in virsh("vol-list", pool)


def test_the_examples_with_partitions(disk, scratch):
    pool, path = disk
    images = scratch / "images"
    images.mkdir()
    source = make_raw(images / "source.raw", 16 * MIB)
    run("qemu-img", "convert", "-O", "qcow2", source, images / "debian-13.qcow2")
    names = {f"sdb{number}": os.path.basename(path(number)) for number in (1, 2)}
    for of, options in device_examples("sdb", sdb=pool, images=images, **names):
        settle(of, **options)
    assert same_content(source, "raw", path(1), "raw") and partitions(pool)[names["sdb2"]]["capacity"] == 10 * MIB


def test_a_partition_in_use_is_told_and_kept(disk, scratch):
    pool, path = disk
    name = os.path.basename(path(1))
    clone(VOLUME, pool=pool, name=name, capacity="10MiB")
    with held(path(1)) as process:
        assert partitions(pool)[name]["in_use_by"] == [f"qemu-io (pid {process.pid})"]
        assert "qemu-io" in refused("IN_USE", VOLUME, pool=pool, name=name, force=True, wipe=True, **ABSENT)
    run("mkfs.ext4", "-q", "-F", path(1))
    run("mount", path(1), "/mnt")
    try:
        assert "the kernel" in partitions(pool)[name]["in_use_by"][0]
        assert "the kernel" in refused("IN_USE", VOLUME, pool=pool, name=name, force=True, **ABSENT)
    finally:
        run("umount", "/mnt")
    document = scratch / "on-a-partition.xml"
    on_device = DOMAIN.replace("type='file'", "type='block'").replace("file=", "dev=")
    document.write_text(on_device.format(name="on-a-partition", path=path(1), format="raw"))
    virsh("create", document, "--paused")
    try:
        assert partitions(pool)[name]["in_use_by"][0] == "domain 'on-a-partition'"
        result = module({"pool": pool, "name": name, "force": True, **ABSENT}, module=VOLUME, check=True)
        assert (result["error_code"], os.path.exists(path(1))) == ("IN_USE", True)
    finally:
        virsh("destroy", "on-a-partition")


def test_a_partition_is_wiped_before_it_is_deleted(disk):
    pool, path = disk
    name = os.path.basename(path(1))
    disk_itself = path(1)[: -len("p1")]
    for algorithm, byte in (("zero", b"\0"), ("pfitzner7", None), ("trim", b"\0")):
        clone(VOLUME, pool=pool, name=name, capacity="2MiB")
        write(path(1), SECRET * 100)
        with open(f"/sys/class/block/{name}/start", encoding="ascii") as file:
            begin = int(file.read()) * 512
        result = clone(VOLUME, pool=pool, name=name, wipe=True, wipe_algorithm=algorithm, **ABSENT)
        assert result["actions"] == ["wiped", "deleted"] and not warnings(result)
        # What the kernel remembers of the disk is not what it remembers of the partition.
        run("blockdev", "--flushbufs", disk_itself)
        with open(disk_itself, "rb") as file:
            file.seek(begin)
            left = file.read(2 * MIB)
        assert SECRET not in left and (byte is None or left == byte * 2 * MIB), algorithm


def test_an_unfinished_partition_is_told_made_anew_and_deleted(disk):
    pool, path = disk
    name = os.path.basename(path(1))
    clone(VOLUME, pool=pool, name=name, capacity="2MiB")
    write(path(1), MARK)
    found = partitions(pool)[name]
    assert (found["error_code"], found["capacity"]) == ("CORRUPT_IMAGE", 2 * MIB)
    assert name in found["msg"] and "not finished" in found["msg"]
    assert settle(VOLUME, pool=pool, name=name, capacity="2MiB")["actions"] == ["created"]
    assert partitions(pool)[name]["error_code"] is None and zeros(read(path(1)))
    write(path(1), MARK)
    assert settle(VOLUME, pool=pool, name=name, **ABSENT)["volume"]["error_code"] == "CORRUPT_IMAGE"
    assert not os.path.exists(path(1))


def test_two_partitions_deleted_at_once(disk):
    """Each run reads the partition table, and writes it back."""
    pool, path = disk
    names = [os.path.basename(path(number)) for number in (1, 2)]
    for name in names:
        clone(VOLUME, pool=pool, name=name, capacity="2MiB")
    runs = [start({"pool": pool, "name": name, **ABSENT}, module=VOLUME) for name in names]
    results = [result_of(one) for one in runs]
    assert [one.get("actions") for one in results] == [["deleted"], ["deleted"]], results
    # Two lines about the disk, and one for each partition.
    assert len(run("parted", "-s", "-m", path(1)[: -len("p1")], "print").splitlines()) == 2


def test_libvirt_forgets_a_partition_that_somebody_else_deleted(disk):
    pool, path = disk
    name = os.path.basename(path(1))
    clone(VOLUME, pool=pool, name=name, capacity="2MiB")
    run("parted", "-s", path(1)[: -len("p1")], "rm", "1")
    assert partitions(pool) == {} and name in virsh("vol-list", pool)
    assert not settle(VOLUME, pool=pool, name=name, **ABSENT)["changed"]
    assert name not in virsh("vol-list", pool)


def test_a_logical_partition_that_others_are_numbered_after_is_kept(libvirtd, device, scratch):
    """Without the fifth, the sixth would be the fifth, and a second run would delete that."""
    path = device(64 * MIB)
    parts = ["extended", "1MiB", "100%", *(word for at in (2, 14, 26) for word in ("logical", f"{at}MiB", f"{at + 8}MiB"))]
    words = [word for at in range(0, len(parts), 3) for word in ("mkpart", *parts[at : at + 3])]
    run("parted", "-s", path, "mklabel", "msdos", *words)
    name = f"dos{os.path.basename(path)}"
    virsh("pool-define-as", name, "disk", "--source-dev", path, "--source-format", "dos", "--target", "/dev")
    virsh("pool-start", name)
    fifth, sixth, seventh = (f"{os.path.basename(path)}p{number}" for number in (5, 6, 7))
    try:
        assert {fifth, sixth, seventh} <= set(partitions(name))
        assert f"({sixth}, {seventh})" in refused("NO_SUPPORT", VOLUME, pool=name, name=fifth, **ABSENT)
        assert clone(VOLUME, pool=name, name=seventh, **ABSENT)["actions"] == ["deleted"]
        assert {fifth, sixth} <= set(partitions(name)) and seventh not in partitions(name)
        # What they are in has a name as well, and the first of their headers in it.
        extended = f"{os.path.basename(path)}p1"
        assert f"({fifth}, {sixth})" in refused("NO_SUPPORT", VOLUME, pool=name, name=extended, **ABSENT, wipe=True)
        source = make_raw(scratch / "sector.raw", 512)
        replaced = {"pool": name, "name": extended, "source_path": source, "compare": "content", "force": True}
        assert "extended" in refused("NO_SUPPORT", **replaced)
        for logical in (sixth, fifth):
            clone(VOLUME, pool=name, name=logical, **ABSENT)
        assert "extended" in refused("NO_SUPPORT", VOLUME, pool=name, name=extended, **ABSENT, wipe=True)
        assert clone(VOLUME, pool=name, name=extended, **ABSENT)["actions"] == ["deleted"]
        source.unlink()
    finally:
        remove_pool(name)
