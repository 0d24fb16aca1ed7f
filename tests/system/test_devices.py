# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Partitions as volumes: a mark until they are whole, zeros wherever the source has none."""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path

import pytest
from conftest import remove_pool
from harness import (
    MIB,
    clone,
    make_raw,
    module,
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

MARK = b"virtforge.libvirt: this volume is not finished\n"
SIZE = 256 * MIB
CYLINDER = 255 * 63 * 512


def make_dirty(path, size=SIZE):
    """Old data all over a device."""
    with open(path, "r+b") as file:
        for at in range(0, size, MIB):
            file.seek(at)
            file.write(b"old data" * (MIB // 8))


class Disk:
    """A pool of partitions on a disk full of old data."""

    def __init__(self, path, table="gpt"):
        self.path = path
        self.pool = f"disk{os.path.basename(path)}"
        make_dirty(path)
        run("parted", "-s", path, "mklabel", "msdos" if table == "dos" else table)
        virsh("pool-define-as", self.pool, "disk", "--source-dev", path, "--source-format", table, "--target", "/dev")
        virsh("pool-start", self.pool)

    def partition(self, number):
        return f"{self.path}p{number}"

    def name(self, number):
        return os.path.basename(self.partition(number))

    def names(self):
        return sorted(line.split()[0] for line in virsh("vol-list", self.pool).splitlines() if line.strip())

    def end(self):
        remove_pool(self.pool)


@pytest.fixture
def table():
    """Of partitions, by libvirt's name for it."""
    return "gpt"


@pytest.fixture
def disk(libvirtd, device, table):
    disk = Disk(device(SIZE), table)
    yield disk
    disk.end()


def reads_zero(path, begin):
    with open(path, "rb") as file:
        file.seek(begin)
        return zeros(file.read())


def head(path):
    try:
        with open(path, "rb") as file:
            return file.read(len(MARK))
    except OSError as exc:
        # A node may be there before the device is.
        assert exc.errno in (errno.ENOENT, errno.ENXIO, errno.ENODEV), exc
        return b""


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_a_partition_is_made_filled_and_found_there(disk, request, image_format):
    source = request.getfixturevalue(image_format)
    result = settle(pool=disk.pool, name=disk.name(1), source_path=source, capacity="80MiB")
    volume = result["volume"]
    assert (result["actions"], volume["type"], volume["transfer"]) == (["created"], "block", "convert")
    assert (volume["capacity"], volume["path"]) == (80 * MIB, disk.partition(1))
    assert volume["fallback_reason"] == "the target is a volume of a disk pool"
    assert same_content(source, image_format, disk.partition(1), "raw")
    assert reads_zero(disk.partition(1), 64 * MIB)


@pytest.mark.parametrize("table", ["dos"])
def test_partitions_that_end_at_cylinders(disk, raw, pool):
    """libvirt makes them larger than it was asked to, in a dos table."""
    largest = 0
    for number, capacity in enumerate((64, 65, 70), 1):
        name = disk.name(number)
        settle(pool=disk.pool, name=name, source_path=raw, capacity=f"{capacity}MiB")
        largest = max(largest, int(run("blockdev", "--getsize64", disk.partition(number))) - capacity * MIB)
        assert same_content(raw, "raw", disk.partition(number), "raw")
        assert reads_zero(disk.partition(number), 64 * MIB)
    assert 0 < largest <= CYLINDER
    other = make_raw(pool / "other.raw", 64 * MIB, [(3, 2)])
    again = {"pool": disk.pool, "name": disk.name(1), "source_path": other, "capacity": "64MiB", "compare": "content"}
    assert settle(**again, force=True)["actions"] == ["replaced"]
    assert same_content(other, "raw", disk.partition(1), "raw")
    smaller = {"pool": disk.pool, "name": disk.name(1), "source_path": raw, "capacity": "50MiB"}
    assert "asked for is 52428800 bytes" in refused("DIFFERS", **smaller)


def test_a_source_that_ends_within_a_sector(disk, pool):
    source = pool / "odd.raw"
    source.write_bytes(b"x" * (MIB + 777))
    result = clone(pool=disk.pool, name=disk.name(1), source_path=source)
    assert result["volume"]["capacity"] == 2 * MIB
    with open(disk.partition(1), "rb") as file:
        assert file.read().rstrip(b"\0") == b"x" * (MIB + 777)


def test_a_partition_is_a_source(disk, raw, pool):
    clone(pool=disk.pool, name=disk.name(1), source_path=raw)
    result = settle(pool=pool, source_pool=disk.pool, source=disk.name(1), name="back.qcow2", format="qcow2")
    assert result["source"]["path"] == disk.partition(1)
    assert same_content(raw, "raw", pool / "back.qcow2", "qcow2")
    settle(pool=disk.pool, source=disk.name(1), name=disk.name(2))
    assert same_content(disk.partition(1), "raw", disk.partition(2), "raw")


def test_several_in_one_task(disk, qcow2):
    volumes = [{"name": disk.name(number), "capacity": "65MiB"} for number in (1, 2, 3)]
    result = settle(pool=disk.pool, source_path=qcow2, volumes=volumes)
    assert [volume["actions"] for volume in result["volumes"]] == [["created"]] * 3
    for number in (1, 2, 3):
        assert same_content(qcow2, "qcow2", disk.partition(number), "raw")


@pytest.mark.parametrize(
    "stated, code, told",
    [
        ({"format": "qcow2"}, "NO_SUPPORT", "holds only raw"),
        ({"owner": "root"}, "NO_SUPPORT", "owner: has no meaning"),
        ({"mode": "0640"}, "NO_SUPPORT", "mode: has no meaning"),
        ({"setype": "virt_image_t"}, "NO_SUPPORT", "setype"),
        ({"preallocation": "falloc"}, "CONFIG_UNSUPPORTED", "preallocation=falloc"),
        ({"qcow2": {"nocow": True}}, "NO_SUPPORT", "qcow2: has no meaning"),
        ({"clone_type": "linked"}, "NO_SUPPORT", "clone_type=linked"),
        ({"method": "reflink"}, "NO_SUPPORT", "method=reflink"),
        ({"capacity": "1TiB"}, "NO_SPACE", "needs"),
        ({"capacity": "1MiB"}, "INVALID_ARG", "less than"),
        ({"name": None}, "INVALID_ARG", "the next partition"),
    ],
)
def test_what_a_partition_cannot_be(disk, raw, stated, code, told):
    params = {"pool": disk.pool, "name": disk.name(1), "source_path": raw, **stated}
    message = refused(code, **{key: value for key, value in params.items() if value is not None})
    assert told in message, message
    assert disk.names() == []


def test_partitions_have_their_names_from_the_disk(disk, raw):
    assert repr(disk.name(1)) in refused("INVALID_ARG", pool=disk.pool, name="web", source_path=raw)
    assert repr(disk.name(1)) in refused("INVALID_ARG", pool=disk.pool, name=disk.name(2), source_path=raw)


def test_a_partition_that_differs(disk, raw, pool):
    name = disk.name(1)
    clone(pool=disk.pool, name=name, source_path=raw, capacity="70MiB")
    assert "cannot be grown" in refused("NO_SUPPORT", pool=disk.pool, name=name, source_path=raw, capacity="71MiB")
    assert "66" in refused("DIFFERS", pool=disk.pool, name=name, source_path=raw, capacity="66MiB")
    other = make_raw(pool / "other.raw", 64 * MIB, [(7, 2)])
    params = {"pool": disk.pool, "name": name, "source_path": other, "compare": "content"}
    assert "its data is not that of" in refused("DIFFERS", **params)
    result = settle(**params, force=True)
    assert result["actions"] == ["replaced"] and result["volume"]["capacity"] == 70 * MIB
    assert same_content(other, "raw", disk.partition(1), "raw") and reads_zero(disk.partition(1), 64 * MIB)


def test_a_partition_in_use_is_left_alone(disk, raw, pool):
    name = disk.name(1)
    clone(pool=disk.pool, name=name, source_path=raw)
    other = make_raw(pool / "other.raw", 64 * MIB, [(7, 2)])
    params = {"pool": disk.pool, "name": name, "source_path": other, "compare": "content", "force": True}
    with open(disk.partition(1), "rb"):
        assert f"(pid {os.getpid()})" in refused("IN_USE", **params)
    run("mkfs.ext4", "-q", "-F", disk.partition(1))
    place = pool.parent / "mounted"
    place.mkdir()
    run("mount", disk.partition(1), place)
    try:
        assert "mounted" in refused("IN_USE", **params)
    finally:
        run("umount", place)
        place.rmdir()


def test_an_encrypted_partition_is_not_written_over(disk, raw):
    name = disk.name(1)
    clone(pool=disk.pool, name=name, source_path=raw)
    with open(disk.partition(1), "r+b") as file:
        file.write(b"LUKS\xba\xbe\0\2")
    assert "LUKS" in refused("NO_SUPPORT", pool=disk.pool, name=name, source_path=raw, compare="content", force=True)
    assert head(disk.partition(1)).startswith(b"LUKS")


def test_a_killed_run_leaves_a_partition_that_is_known_as_unfinished(disk, pool):
    source = make_raw(pool / "base.raw", 96 * MIB, [(0, 96)])
    params = {"pool": disk.pool, "name": disk.name(1), "source_path": source}
    process = start({**params, "bwlimit": "4MiB"})
    wait_until(lambda: os.path.exists(disk.partition(1)) and head(disk.partition(1)) == MARK, 30)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert head(disk.partition(1)) == MARK
    virsh("pool-refresh", disk.pool)
    # Nobody takes it for a source, and the next run takes it for what it is.
    message = module({"pool": pool, "source_pool": disk.pool, "source": disk.name(1), "name": "back"})["msg"]
    assert "not finished" in message
    with open(disk.partition(1), "rb"):
        # Somebody has begun to use it: a guest that is installed there, for one.
        assert f"(pid {os.getpid()})" in refused("IN_USE", **params)
    result = settle(**params)
    assert result["actions"] == ["created"]
    assert same_content(source, "raw", disk.partition(1), "raw")


def test_a_run_killed_before_there_is_a_mark(disk, raw, pool2):
    """Made by libvirt, it has its name and what the disk held before; the first write would have been the mark."""
    params = {"pool": disk.pool, "name": disk.name(1), "source_path": raw}
    kill_at_mark = ["-e", "trace=pwrite64", "-e", "inject=pwrite64:signal=KILL:when=1"]
    process = start(params, prefix=["strace", "-f", "-qq", "-o", "/dev/null", *kill_at_mark])
    process.communicate()
    virsh("pool-refresh", disk.pool)
    assert disk.names() == [disk.name(1)] and head(disk.partition(1)).startswith(b"old data")
    assert "not finished" in refused("CORRUPT_IMAGE", pool=pool2, source_pool=disk.pool, source=disk.name(1), name="back")
    (noted,) = (path for path in Path("/run/lock/virtforge").iterdir() if path.stat().st_size)
    at = noted.stat().st_mtime
    # Had it been made much later, it would be somebody else's.
    os.utime(noted, (at - 300, at - 300))
    assert clone(**params)["actions"] == []
    os.utime(noted, (at, at))
    assert settle(**params)["actions"] == ["created"]
    assert same_content(raw, "raw", disk.partition(1), "raw") and not noted.stat().st_size


def test_a_pool_is_where_it_runs_not_where_it_will_be_started_next(disk, device, raw, scratch):
    other = device(32 * MIB)
    run("parted", "-s", other, "mklabel", "gpt", "mkpart", "his", "1MiB", "9MiB")
    document = scratch / "moved.xml"
    document.write_text(virsh("pool-dumpxml", disk.pool).replace(disk.path, other))
    virsh("pool-define", document)
    params = {"pool": disk.pool, "name": disk.name(1)}
    assert settle(**params, source_path=raw)["actions"] == ["created"]
    assert clone("storage_volume", **params, state="absent")["actions"] == ["deleted"]
    assert disk.names() == [] and "his" in run("parted", "-s", other, "print")


def test_a_partition_that_libvirt_cannot_make_is_not_waited_for(disk, raw):
    """Somebody else makes one of that name instead: it is no unfinished one of ours."""
    run("parted", "-s", disk.path, "mkpart", "middle", "127MiB", "129MiB")
    virsh("pool-refresh", disk.pool)
    params = {"pool": disk.pool, "name": disk.name(2), "source_path": raw, "capacity": "150MiB"}
    assert "making volume" in module(params)["msg"]
    run("parted", "-s", disk.path, "mkpart", "his", "1MiB", "101MiB")
    virsh("pool-refresh", disk.pool)
    assert disk.names() == [disk.name(1), disk.name(2)]
    assert "cannot be grown" in refused("NO_SUPPORT", **params)
    assert head(disk.partition(2)).startswith(b"old data")


def test_what_a_partition_does_not_carry_over_is_told(disk, qcow2):
    run("qemu-img", "snapshot", "-c", "before", qcow2)
    result = settle(pool=disk.pool, name=disk.name(1), source_path=qcow2)
    assert result["volume"]["dropped"] == ["snapshots"]
    assert "does not carry over snapshots" in warnings(result)[0]


def test_a_run_that_fails_takes_its_partition_away(disk, pool):
    source = make_raw(pool / "base.raw", 96 * MIB, [(0, 96)])
    result = module({"pool": disk.pool, "name": disk.name(1), "source_path": source, "bwlimit": "20MiB", "timeout": 2})
    assert result["error_code"] == "TIMEOUT", result
    virsh("pool-refresh", disk.pool)
    assert disk.names() == []


def test_two_runs_for_one_partition(disk, qcow2):
    params = {"pool": disk.pool, "name": disk.name(1), "source_path": qcow2}
    results = [result_of(process) for process in [start(params) for _run in range(3)]]
    assert sorted(result.get("actions", result.get("msg")) for result in results) == [[], [], ["created"]]
    assert same_content(qcow2, "qcow2", disk.partition(1), "raw")
