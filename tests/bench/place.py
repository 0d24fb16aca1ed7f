# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Where it runs: one file system at a time with a pool on it, the sources in that, and a libvirtd."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import random
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Iterable, Iterator

import harness
from ansible_collections.virtforge.libvirt.plugins.module_utils._transfer import file_copy, pace
from harness import GIB, MIB, run

ROOT = Path(__file__).resolve().parents[2]
#: The pool of libvirt on the file system that is being measured, and a second one with a thousand volumes.
POOL, FULL_POOL = "bench", "full"
#: Sources that are read along with one.
BELOW = {"overlay.qcow2": ("base.qcow2",)}


@dataclass(frozen=True)
class Sizes:
    """``clones`` in one task, of which a peer makes ``loop`` one by one; sizes in bytes."""

    disk: int
    capacity: int
    data: int
    extents: int
    sparse: int
    clones: int
    loop: int
    there: int
    grown: int = 40 * GIB
    narrow: int = GIB
    vast: int = 1024 * GIB
    sparse_data: int = 64 * MIB


FULL = Sizes(disk=40 * GIB, capacity=8 * GIB, data=GIB, extents=900, sparse=64 * GIB, clones=100, loop=20, there=1000)
QUICK = Sizes(disk=2 * GIB, capacity=256 * MIB, data=24 * MIB, extents=60, sparse=GIB, clones=10, loop=2, there=50)


class Place:
    """A new file system, mounted, with an empty pool of libvirt; sources are made when they are first asked for."""

    def __init__(self, scratch: Path, kind: str, sizes: Sizes) -> None:
        self.sizes = sizes
        self.kind = kind
        self.mount = scratch / kind
        self.pool = self.mount / "pool"

    def source(self, name: str) -> Path:
        """The source of this name, made if need be."""
        path = self.pool / name
        if not path.exists():
            getattr(self, "_make_" + name.replace(".", "_"))(path)
            run("sync", path)
            harness.virsh("pool-refresh", POOL)
        return path

    def _make_base_raw(self, path: Path) -> None:
        _scatter(path, self.sizes.capacity, self.sizes.capacity, self.sizes.data, self.sizes.extents)

    def _make_aligned_raw(self, path: Path) -> None:
        """As qemu-img makes one of a qcow2 image: no cluster holds both data and nothing."""
        _scatter(path, self.sizes.capacity, self.sizes.capacity, self.sizes.data, self.sizes.extents, 65536)

    def _make_base_qcow2(self, path: Path) -> None:
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", self.source("base.raw"), path)

    def _make_overlay_qcow2(self, path: Path) -> None:
        """A chain of two, the upper one with a sixteenth of the data."""
        self.source("base.qcow2")
        run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", path)
        piece, count = MIB, max(self.sizes.data // 16 // MIB, 1)
        step = self.sizes.capacity // count // MIB * MIB
        writes = [word for at in range(count) for word in ("-c", f"write -q -P {at % 255 + 1} {at * step} {piece}")]
        run("qemu-io", "-f", "qcow2", *writes, path)

    def _make_sparse_raw(self, path: Path) -> None:
        _scatter(path, self.sizes.sparse, self.sizes.sparse, self.sizes.sparse_data, 64)

    def _make_narrow_raw(self, path: Path) -> None:
        _scatter(path, self.sizes.narrow, self.sizes.narrow, self.sizes.sparse_data, 64)

    def _make_vast_raw(self, path: Path) -> None:
        _scatter(path, self.sizes.vast, self.sizes.narrow, self.sizes.sparse_data, 64)

    def _make_small_qcow2(self, path: Path) -> None:
        run("qemu-img", "create", "-q", "-f", "qcow2", path, "64M")
        run("qemu-io", "-f", "qcow2", "-c", f"write -q -P 1 0 {MIB}", path)

    def clear(self) -> None:
        """Remove everything but the sources."""
        for path in self.pool.iterdir():
            if not hasattr(self, "_make_" + path.name.replace(".", "_")):
                path.unlink()
        harness.virsh("pool-refresh", POOL)

    def settle(self, sources: Iterable[Path]) -> None:
        """Before each run: nobody else's data is left to be written, and the sources are in the page cache."""
        fd = os.open(self.mount, os.O_RDONLY)
        try:
            if ctypes.CDLL(None).syncfs(fd):
                raise OSError("syncfs failed")
        finally:
            os.close(fd)
        for path in sources:
            _warm(path)


def _scatter(path: Path, size: int, room: int, data: int, extents: int, block: int = 4096) -> None:
    """A raw image with so much random data in so many extents, spread over its first ``room`` bytes, the same each time."""
    generator = random.Random(room)
    length = max(data // extents // block, 1) * block
    step = room // extents // block * block
    with open(path, "wb") as file:
        for number in range(extents):
            file.seek(number * step + generator.randrange((step - length) // block or 1) * block)
            file.write(generator.randbytes(length))
        file.truncate(size)


def _warm(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(fd).st_size
        extents = list(file_copy.data_extents(fd, size))
        if pace.resident(fd, 0, size) < sum(end - begin for begin, end in extents):
            for begin, end in extents:
                for at in range(begin, end, MIB):
                    os.pread(fd, min(MIB, end - at), at)
    finally:
        os.close(fd)


@contextlib.contextmanager
def opened(scratch: Path, kind: str, sizes: Sizes) -> Iterator[Place]:
    """A place on a new file system of this kind, which takes its disk space with it when it goes."""
    place = Place(scratch, kind, sizes)
    image = scratch / f"{kind}.img"
    with open(image, "wb") as file:
        file.truncate(sizes.disk)
    options = {"xfs": ["-q", "-m", "reflink=1"], "btrfs": ["-q"], "ext4": ["-q", "-F"]}[kind]
    run(f"mkfs.{kind}", *options, image)
    place.mount.mkdir()
    device = run("losetup", "-f", "--show", "--direct-io=on", image).strip()
    try:
        # From here on both end with the last mount, also where nobody is left to see to it.
        image.unlink()
        run("mount", device, place.mount)
    finally:
        run("losetup", "-d", device)
    try:
        with pool(POOL, place.pool), pool(FULL_POOL, place.mount / FULL_POOL):
            yield place
    finally:
        subprocess.run(["umount", "-l", str(place.mount)], check=False)
        place.mount.rmdir()


@contextlib.contextmanager
def pool(name: str, directory: Path) -> Iterator[None]:
    directory.mkdir()
    harness.virsh("pool-define-as", name, "dir", "--target", directory)
    harness.virsh("pool-start", name)
    try:
        yield
    finally:
        harness.virsh_status("pool-destroy", name)
        harness.virsh_status("pool-undefine", name)


@contextlib.contextmanager
def libvirtd(scratch: Path) -> Iterator[None]:
    """A libvirtd at qemu:///system of these namespaces."""
    with open(scratch / "libvirtd.log", "w", encoding="utf-8") as log:
        daemons = [
            subprocess.Popen([name], stdin=subprocess.DEVNULL, stdout=log, stderr=log) for name in ("virtlogd", "libvirtd")
        ]
    try:
        harness.wait_until(lambda: harness.virsh_status("pool-list") == 0, 60)
        yield
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(30)


def provide_library(scratch: Path) -> None:
    """Where the system's Python finds ansible and the collection, and nothing else of .venv."""
    library = scratch / "library"
    (library / "ansible_collections" / "virtforge").mkdir(parents=True)
    (library / "ansible_collections" / "virtforge" / "libvirt").symlink_to(ROOT)
    ansible = importlib.util.find_spec("ansible")
    assert ansible is not None and ansible.origin is not None
    (library / "ansible").symlink_to(Path(ansible.origin).parent)
    harness.library = str(library)
