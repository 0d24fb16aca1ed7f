# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""storage_volume, flatten: an overlay becomes a volume that stands alone."""

from __future__ import annotations

import os

import harness
import pytest
from harness import GIB, MIB, clone, held, info, refused, run, same_content, settle, virsh, wait_until

VOLUME = "storage_volume"
FLATTEN = {"name": "web", "flatten": True}


def overlay(path, below, image_format="qcow2", below_format="qcow2", size="64M"):
    """An overlay with a mebibyte of its own."""
    run("qemu-img", "create", "-q", "-f", image_format, "-b", below, "-F", below_format, path, size)
    run("qemu-io", "-f", image_format, "-c", "write -P 7 20M 1M", path)
    return path


def content(path, image_format="qcow2"):
    """A raw copy of what a guest sees."""
    copy = path.parent.parent / f"{path.parent.name}-{path.name}.seen"
    run("qemu-img", "convert", "-f", image_format, "-O", "raw", path, copy)
    return copy


@pytest.fixture
def web(pool, qcow2):
    """An overlay of base.qcow2, and a raw copy of what it reads as."""
    path = overlay(pool / "web", qcow2)
    copy = content(path)
    yield path, copy
    copy.unlink()


def test_an_overlay_comes_to_stand_alone(either, pool, qcow2, web):
    path, before = web
    os.chown(path, 1234, 1235)
    path.chmod(0o604)
    result = settle(VOLUME, pool=either, **FLATTEN)
    assert (result["changed"], result["actions"]) == (True, ["flattened"])
    below = {"path": str(qcow2), "format": "qcow2", "depth": 1}
    assert (result["diff"]["before"]["backing"], result["diff"]["after"]["backing"]) == (below, None)
    volume = result["volume"]
    assert (volume["backing"], volume["transfer"], volume["shared"], volume["dropped"]) == (None, "convert", True, [])
    assert "backing-filename" not in info(path, "qcow2")
    assert same_content(before, "raw", path, "qcow2")
    assert (path.stat().st_uid, path.stat().st_gid, path.stat().st_mode & 0o7777) == (1234, 1235, 0o604)
    if not either.startswith("/"):
        assert "backingStore" not in virsh("vol-dumpxml", "--pool", either, "web")
    # The base may go now.
    assert settle(VOLUME, pool=either, name="base.qcow2", state="absent")["actions"] == ["deleted"]


def test_it_is_grown_and_its_permissions_set_in_one_go(either, web):
    path, before = web
    result = settle(VOLUME, pool=either, capacity="1GiB", mode="0640", preallocation="metadata", **FLATTEN)
    assert result["actions"] == ["flattened", "grown", "permissions"]
    assert (result["volume"]["capacity"], result["volume"]["mode"]) == (GIB, "0640")
    assert info(path, "qcow2")["virtual-size"] == GIB
    assert same_content(before, "raw", path, "qcow2")


@pytest.mark.parametrize(
    "file_system, image_format, below_format",
    [("btrfs", "qcow2", "raw"), ("ext4", "qcow2", "raw"), ("xfs", "qed", "raw")],
)
def test_other_file_systems_and_formats(file_systems, file_system, image_format, below_format):
    place = file_systems[file_system] / f"flatten-{image_format}"
    place.mkdir()
    base = harness.make_raw(place / "base", 64 * MIB)
    path = overlay(place / "web", base, image_format, below_format, size="80M")
    before = content(path, image_format)
    result = clone(VOLUME, pool=place, **FLATTEN)
    assert result["actions"] == ["flattened"]
    assert bool(result["volume"]["fallback_reason"]) == (file_system == "ext4" or image_format != "qcow2")
    assert "backing-filename" not in info(path, image_format)
    assert same_content(before, "raw", path, image_format)


def test_overlays_of_it_stay_valid_and_its_options_are_kept(pool, qcow2):
    options = ["-o", "cluster_size=4k,lazy_refcounts=on"]
    run("qemu-img", "create", "-q", "-f", "qcow2", *options, "-b", qcow2, "-F", "qcow2", pool / "web")
    top = overlay(pool / "top", pool / "web")
    before = content(top)
    settle(VOLUME, pool=pool, **FLATTEN)
    found = info(pool / "web", "qcow2")
    assert (found["cluster-size"], found["format-specific"]["data"]["lazy-refcounts"]) == (4096, True)
    assert same_content(before, "raw", top, "qcow2")
    run("qemu-img", "check", "-q", "-f", "qcow2", top)


def test_one_that_is_in_use_or_whose_base_is_written_to_is_left_alone(pool, qcow2, web, libvirt_pool, domain):
    path, _before = web
    fingerprint = harness.fingerprint(path)
    with held(qcow2, "qcow2"):
        message = refused("IN_USE", VOLUME, pool=pool, **FLATTEN)
        assert "web" in message and "qemu-io" in message
    assert harness.fingerprint(path) == fingerprint
    # As an image below that of a guest, which only reads it.
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", path, "-F", "qcow2", pool / "top")
    domain(pool / "top", "qcow2")
    assert "qemu" in refused("IN_USE", VOLUME, pool=libvirt_pool, **FLATTEN)


def test_what_lies_below_has_to_be_in_the_pools(pool, pool2, qcow2):
    path = overlay(pool2 / "web", qcow2)
    before = content(path)
    message = refused("UNSAFE_IMAGE", VOLUME, pool=pool2, **FLATTEN)
    assert f"name '{pool}' as source_pool" in message
    assert settle(VOLUME, pool=pool2, source_pool=pool, **FLATTEN)["actions"] == ["flattened"]
    assert same_content(before, "raw", path, "qcow2")
    run("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", "gone", "-F", "raw", pool2 / "lost", "64M")
    assert "gone" in refused("NO_STORAGE_VOL", VOLUME, pool=pool2, name="lost", flatten=True)


def test_internal_snapshots_are_not_lost(pool, web):
    path, _before = web
    run("qemu-img", "snapshot", "-c", "before", path)
    fingerprint = harness.fingerprint(path)
    assert "internal snapshots (1)" in refused("OPERATION_INVALID", VOLUME, pool=pool, **FLATTEN)
    assert harness.fingerprint(path) == fingerprint


def test_without_space_nothing_changes(small_file_system):
    place = small_file_system("ext4", 72 * MIB)
    base = harness.make_raw(place / "base", 64 * MIB, pieces=((0, 40),))
    path = overlay(place / "web", base, below_format="raw")
    before = harness.fingerprint(path)
    message = refused("NO_SPACE", VOLUME, pool=place, **FLATTEN)
    assert "web" in message
    assert harness.fingerprint(path) == before


@pytest.mark.parametrize("call", ["copy_file_range", "fchmod", "rename"])
def test_killed_anywhere_it_reads_as_before(pool, web, call):
    path, before = web
    slow = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={call}", "-e", f"inject={call}:delay_enter=2000000"]
    process = harness.start({"pool": str(pool), **FLATTEN}, prefix=slow, module=VOLUME)
    wait_until(lambda: harness.unnamed_files(pool) or harness.leftovers(pool), 60)
    harness.kill(process)
    assert same_content(before, "raw", path, "qcow2")
    assert clone(VOLUME, pool=pool, **FLATTEN)["actions"] == ["flattened"]
    assert "backing-filename" not in info(path, "qcow2")
    assert same_content(before, "raw", path, "qcow2")
    run("qemu-img", "check", "-q", "-f", "qcow2", path)


def test_what_stands_alone_or_is_not_there_yet_needs_no_flattening(pool, qcow2):
    assert clone(VOLUME, pool=pool, name="base.qcow2", flatten=True)["actions"] == []
    assert clone(VOLUME, pool=pool, capacity="1M", **FLATTEN)["actions"] == ["created"]
    clone(pool=pool, source="base.qcow2", name="linked", clone_type="linked")
    assert clone(VOLUME, pool=pool, name="linked")["actions"] == []
