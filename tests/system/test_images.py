# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Real images in every format: content kept, size kept, a second run that has nothing to do."""

from __future__ import annotations

import json

import harness
import images
import pytest
from harness import MIB, clone, info, run, same_content, settle

LAYOUTS = ["disk.raw", *images.QCOW2_LAYOUTS, *(f"disk.{name}" for name in images.OTHERS), "chain2.qcow2"]


@pytest.mark.parametrize("target", ["raw", "qcow2"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout_becomes_raw_and_qcow2(gallery, pool, name, target):
    place, formats = gallery
    result = settle(pool=pool, source_pool=place, source=name, name="web", format=target)
    assert same_content(place / "disk.raw", "raw", pool / "web", target)
    assert result["volume"]["capacity"] == 160 * MIB
    assert result["source"]["format"] == formats[name]
    # The disk holds under 40 MiB; zeros that were written are shared like all else, or left out.
    assert result["volume"]["shared"] or harness.allocated(pool / "web") < 64 * MIB


@pytest.mark.parametrize("target", images.OTHERS)
@pytest.mark.parametrize("name", ["disk.raw", "chain2.qcow2", "disk.vpc"])
def test_each_format_can_be_made(gallery, pool, name, target):
    place, _formats = gallery
    result = settle(pool=pool, source_pool=place, source=name, name="web", format=target, capacity="170M")
    assert same_content(place / "disk.raw", "raw", pool / "web", target)
    assert result["volume"]["capacity"] == info(pool / "web", target)["virtual-size"] == 170 * MIB
    assert harness.allocated(pool / "web") < 64 * MIB


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout_is_cloned_as_it_is(gallery, pool, name):
    place, formats = gallery
    result = settle(pool=pool, source_pool=place, source=name, name="web")
    assert same_content(place / "disk.raw", "raw", pool / "web", formats[name])
    if name == "chain2.qcow2":
        assert "backing-filename" not in info(pool / "web", "qcow2")
    else:
        assert (result["volume"]["transfer"], result["volume"]["shared"]) == ("reflink", True)
        assert (pool / "web").read_bytes() == (place / name).read_bytes()


@pytest.mark.parametrize("name", sorted(set(images.QCOW2_LAYOUTS)))
def test_a_larger_clone_of_a_qcow2_keeps_what_is_in_it(gallery, pool, name):
    place, _formats = gallery
    result = settle(pool=pool, source_pool=place, source=name, name="web", capacity="1GiB")
    assert result["volume"]["capacity"] == info(pool / "web", "qcow2")["virtual-size"] == 1024 * MIB
    assert (result["volume"]["transfer"], result["volume"]["dropped"]) == ("reflink", [])
    assert same_content(place / "disk.raw", "raw", pool / "web", "qcow2")
    before, after = info(place / name, "qcow2"), info(pool / "web", "qcow2")
    for key in ("compat", "compression-type", "extended-l2", "refcount-bits"):
        assert before["format-specific"]["data"].get(key) == after["format-specific"]["data"].get(key)
    assert before["cluster-size"] == after["cluster-size"]
    assert [one["name"] for one in before.get("snapshots", [])] == [one["name"] for one in after.get("snapshots", [])]
    bitmaps = [one["name"] for one in before["format-specific"]["data"].get("bitmaps", [])]
    assert bitmaps == [one["name"] for one in after["format-specific"]["data"].get("bitmaps", [])]
    run("qemu-img", "check", "-q", "-f", "qcow2", pool / "web")


def test_a_version_2_image_with_snapshots_grows(pool, raw):
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-o", "compat=0.10", raw, pool / "old.qcow2")
    run("qemu-img", "snapshot", "-c", "one", pool / "old.qcow2")
    settle(pool=pool, source="old.qcow2", name="web", capacity="200M")
    assert info(pool / "web", "qcow2")["virtual-size"] == 200 * MIB
    assert [one["name"] for one in info(pool / "web", "qcow2")["snapshots"]] == ["one"]


def test_a_conversion_says_what_it_drops(gallery, pool):
    place, _formats = gallery
    result = settle(pool=pool, source_pool=place, source="snapshots.qcow2", name="web", format="raw")
    assert result["volume"]["dropped"] == ["snapshots"]
    result = settle(pool=pool, source_pool=place, source="bitmaps.qcow2", name="web2", format="vdi")
    assert result["volume"]["dropped"] == ["bitmaps"]


@pytest.mark.parametrize("target", ["raw", "qcow2"])
@pytest.mark.parametrize("name", sorted(images.media()))
def test_install_media_and_rescue_disks_are_imported_from_a_path(pool, name, target):
    path = images.media()[name]
    # What is inside an initrd is no image, but its bytes are as good as any.
    stated = {"source_compression": "none"} if name.endswith(".gz") else {}
    result = settle(pool=pool, source_path=path, name="media", format=target, **stated)
    assert same_content(path, "raw", pool / "media", target)
    if target == "raw":
        assert (pool / "media").read_bytes() == path.read_bytes()
    assert result["source"]["path"] == str(path)


def test_the_files_in_a_cloned_disk_are_those_of_the_source(gallery, pool, scratch):
    place, _formats = gallery
    clone(pool=pool, source_pool=place, source="chain2.qcow2", name="disk.raw", format="raw", capacity="300M")
    partitions = json.loads(run("sfdisk", "--json", pool / "disk.raw"))["partitiontable"]["partitions"]
    mounts = [scratch / "before", scratch / "after"]
    try:
        for image, mount in zip([place / "disk.raw", pool / "disk.raw"], mounts):
            mount.mkdir()
            run("mount", "-o", f"ro,loop,offset={partitions[0]['start'] * 512}", image, mount)
        run("diff", "-r", "--no-dereference", *mounts)
        assert sum(1 for _item in mounts[1].rglob("*")) > 20
    finally:
        for mount in mounts:
            run("umount", mount)
            mount.rmdir()
