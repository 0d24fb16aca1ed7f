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
from conftest import new_directory
from harness import MIB, clone, make_raw, refused, run, virsh, virsh_status
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

    def free_name(self, stem, image_format):
        if self.type != "disk":
            return f"{stem}.{image_format}"
        taken = virsh("vol-list", self.pool)
        disk = os.path.basename(self.path)
        return next(f"{disk}p{number}" for number in range(1, 99) if f"{disk}p{number}" not in taken)

    def same_as(self, name, raw):
        """Whether the volume reads as this raw image, which ends before or where it does."""
        if self.ceph:
            return self.ceph.reads_as(name, raw)
        path = {"disk": Path("/dev"), "logical": Path("/dev/vgmatrix")}.get(self.type, self.path) / name
        image_format = "qcow2" if name.endswith("qcow2") else "raw"
        run("qemu-img", "compare", "-f", "raw", "-F", image_format, raw, path)
        return True


class Makers:
    """Makes a pool of each type, by the name that the table below has for it, and in the end takes them all away."""

    def __init__(self, request, scratch, prefix="matrix"):
        self.request, self.scratch, self.prefix = request, scratch, prefix
        self.ends = []

    def _path(self, name):
        path = self.scratch / f"{self.prefix}-{name}"
        path.mkdir()
        return path

    def device(self, size):
        image = self.scratch / f"{self.prefix}-{len(self.ends)}.img"
        with open(image, "wb") as file:
            file.truncate(size)
        device = run("losetup", "-f", "--show", image).strip()
        self.ends.append(lambda: (run("losetup", "-d", device), image.unlink()))
        return device

    def _defined(self, kind, *arguments, name=""):
        name = f"{self.prefix}-{name or kind}"
        virsh("pool-define-as", name, kind, *arguments)
        virsh("pool-start", name)
        self.ends.append(lambda: (virsh_status("pool-destroy", name), virsh_status("pool-undefine", name)))
        return name

    def directory(self):
        path = new_directory(self.request.getfixturevalue("file_systems")["xfs"])
        self.ends.append(lambda: shutil.rmtree(path))
        return Place(str(path), "directory", path)

    def dir(self):
        path = new_directory(self.request.getfixturevalue("file_systems")["btrfs"])
        return Place(self._defined("dir", "--target", path), "dir", path)

    def fs(self, kind="xfs"):
        disk, path = self.device(512 * MIB), self._path(kind)
        run(f"mkfs.{kind}", "-q", disk)
        what = ["--source-dev", disk, "--source-format", kind, "--target", path]
        return Place(self._defined("fs", *what, name=kind), "fs", path)

    def fs_on_ext4(self):
        return self.fs("ext4")

    def disk(self):
        disk = self.device(128 * MIB)
        run("parted", "-s", disk, "mklabel", "gpt")
        self.ends.append(lambda: run("partx", "-d", disk))
        name = self._defined("disk", "--source-dev", disk, "--source-format", "gpt", "--target", "/dev")
        return Place(name, "disk", Path(disk))

    def rbd(self):
        ceph = self.request.getfixturevalue("ceph")
        pool = CephPool(ceph, self.scratch, ceph.pool)
        self.ends.append(lambda: (pool.empty(), pool.end()))
        return Place(pool.name, "rbd", None, pool)

    def netfs(self):
        path = self._path("netfs")
        what = ["--source-host", "127.0.0.2", "--source-path", f"/{self.request.getfixturevalue('gluster')}"]
        return Place(self._defined("netfs", *what, "--source-format", "glusterfs", "--target", path), "netfs", path)

    def all(self, types):
        return {key: getattr(self, key.replace(" ", "_"))() for key in types}

    def end(self):
        for end in reversed(self.ends):
            end()


@pytest.fixture(scope="module")
def places(libvirtd, request, scratch):
    makers = Makers(request, scratch)
    yield makers.all(TYPES)
    makers.end()


@pytest.fixture(scope="module")
def sources(places, scratch):
    yield from make_sources(places, scratch)


def make_sources(places, scratch):
    """In each pool a volume of each format that it holds, all with the same data; and that data."""
    raw = make_raw(scratch / "matrix.raw", 8 * MIB, [(1, 2), (6, 1)])
    names = {}
    for key, place in places.items():
        for image_format in FORMATS:
            if image_format in place.holds:
                name = place.free_name("base", image_format)
                clone(pool=place.pool, name=name, source_path=raw, source_format="raw", format=image_format)
                names[key, image_format] = name
    yield raw, names
    raw.unlink()


def clone_between(places, sources, source, target):
    """As raw and as qcow2: cloned, compared, unchanged by a second run; or refused as the table of capabilities says."""
    raw, names = sources
    here, there = places[source], places[target]
    for image_format in FORMATS:
        name = there.free_name(f"of-{source.replace(' ', '-')}", image_format)
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


@pytest.mark.parametrize("target", TYPES)
@pytest.mark.parametrize("source", TYPES)
def test_from_every_pool_to_every_pool(places, sources, source, target):
    clone_between(places, sources, source, target)
