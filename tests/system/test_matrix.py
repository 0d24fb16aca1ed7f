# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""From every type of pool to every type of pool, as raw and as qcow2: cloned and found there, or refused as the table says."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from ansible_collections.virtforge.libvirt.plugins.module_utils._pools import capabilities
from conftest import make_pool, new_directory
from harness import MIB, clone, make_raw, module, refused, run, virsh, virsh_status
from test_rbd import Pool as CephPool

TYPES = ("directory", "dir", "fs", "fs on ext4", "disk", "rbd", "netfs")
FORMATS = ("raw", "qcow2")


@dataclass(frozen=True)
class Place:
    """A pool: its name or directory, its type, and where its files are, for those that have some."""

    pool: str
    type: str
    path: Path | None = None
    ceph: CephPool | None = None

    @property
    def holds(self):
        return capabilities.of(self.type).formats

    def free_name(self, image_format):
        if self.type != "disk":
            return f"new.{image_format}"
        taken = virsh("vol-list", self.pool)
        disk = os.path.basename(self.path)
        return next(f"{disk}p{number}" for number in range(1, 99) if f"{disk}p{number}" not in taken)

    def same_as(self, name, raw):
        """Whether the volume reads as this raw image, which ends before or where it does."""
        if self.ceph:
            return self.ceph.reads_as(name, raw)
        path = f"/dev/{name}" if self.type == "disk" else self.path / name
        image_format = "qcow2" if name.endswith("qcow2") else "raw"
        run("qemu-img", "compare", "-f", "raw", "-F", image_format, raw, path)
        return True

    def remove(self, name):
        result = module({"pool": self.pool, "name": name, "state": "absent"}, module="storage_volume")
        assert result.get("actions") == ["deleted"], result


@pytest.fixture(scope="module")
def places(libvirtd, file_systems, gluster, ceph, scratch):
    made = {}
    directory = new_directory(file_systems["xfs"])
    made["directory"] = Place(str(directory), "directory", directory)
    path = new_directory(file_systems["btrfs"])
    made["dir"] = Place(make_pool("matrix-dir", path), "dir", path)
    devices = []

    def device(size):
        image = scratch / f"matrix-{len(devices)}.img"
        with open(image, "wb") as file:
            file.truncate(size)
        devices.append((run("losetup", "-f", "--show", image).strip(), image))
        return devices[-1][0]

    for key, kind in (("fs", "xfs"), ("fs on ext4", "ext4")):
        path = scratch / f"matrix-{kind}"
        path.mkdir()
        disk, name = device(512 * MIB), f"matrix-{kind}"
        run(f"mkfs.{kind}", "-q", disk)
        virsh("pool-define-as", name, "fs", "--source-dev", disk, "--source-format", kind, "--target", path)
        virsh("pool-start", name)
        made[key] = Place(name, "fs", path)
    disk = device(128 * MIB)
    run("parted", "-s", disk, "mklabel", "gpt")
    virsh("pool-define-as", "matrix-disk", "disk", "--source-dev", disk, "--source-format", "gpt", "--target", "/dev")
    virsh("pool-start", "matrix-disk")
    made["disk"] = Place("matrix-disk", "disk", Path(disk))
    in_ceph = CephPool(ceph, scratch, ceph.pool)
    made["rbd"] = Place(in_ceph.name, "rbd", None, in_ceph)
    path = scratch / "matrix-netfs"
    path.mkdir()
    source = ["--source-host", "127.0.0.2", "--source-path", f"/{gluster}", "--source-format", "glusterfs"]
    virsh("pool-define-as", "matrix-netfs", "netfs", *source, "--target", path)
    virsh("pool-start", "matrix-netfs")
    made["netfs"] = Place("matrix-netfs", "netfs", path)
    yield made
    in_ceph.empty()
    in_ceph.end()
    for place in made.values():
        if place.type not in ("directory", "rbd"):
            virsh_status("pool-destroy", place.pool)
            virsh_status("pool-undefine", place.pool)
    run("partx", "-d", disk)
    for one, image in devices:
        run("losetup", "-d", one)
        image.unlink()
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def sources(places, scratch):
    """In each pool a volume of each format that it holds, all with the same data; and that data."""
    raw = make_raw(scratch / "matrix.raw", 8 * MIB, [(1, 2), (6, 1)])
    names = {}
    for key, place in places.items():
        for image_format in FORMATS:
            if image_format in place.holds:
                name = place.free_name(image_format).replace("new.", "base.")
                clone(pool=place.pool, name=name, source_path=raw, source_format="raw", format=image_format)
                names[key, image_format] = name
    yield raw, names
    raw.unlink()


@pytest.mark.parametrize("target", TYPES)
@pytest.mark.parametrize("source", TYPES)
def test_from_every_pool_to_every_pool(places, sources, source, target):
    raw, names = sources
    here, there = places[source], places[target]
    for image_format in FORMATS:
        name = there.free_name(image_format)
        params = {
            "pool": there.pool,
            "name": name,
            "source_pool": here.pool,
            "source": names.get((source, image_format)) or names[source, "raw"],
            "format": image_format,
        }
        if image_format not in there.holds:
            assert f"type {there.type}" in refused("NO_SUPPORT", **params)
            continue
        assert clone(**params)["actions"] == ["created"]
        assert there.same_as(name, raw)
        assert clone(**params)["actions"] == []
        there.remove(name)
