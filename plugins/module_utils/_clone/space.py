# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The space that a new volume takes in its pool, and whether it may share the source's blocks instead."""

from __future__ import annotations

import json
import os

from .._images import qemu_img
from .._pools.devices import DevicePool
from .._pools.rbd import RbdPool
from .._pools.remote import RemotePool
from .._transfer import file_copy, guards
from .model import Create, kind
from .source import Source
from .target import Target
from .task import Task

# File systems by statfs(2): ext2 to ext4 and tmpfs never share blocks between files; each subvolume of a btrfs is a device.
_NEVER_SHARE = (0xEF53, 0x01021994)
_BTRFS = 0x9123683E


class Space:
    """Sizes in bytes. What the clones take that were planned before is in :attr:`Source.told`."""

    def __init__(self, task: Task, source: Source, target: Target) -> None:
        self._task = task
        self._source = source
        self._target = target

    def needed(self, step: Create) -> int:
        """Bytes that the new volume takes where nothing is shared with the source.

        An estimate from above where the pool has that much to spare. If not, a raw source is read to count what is not zeros,
        which is all that a copy or conversion writes; for others qemu-img measures what is allocated.
        """
        layers, watch = self._source.layers, self._source.watch
        if step.preallocation in ("falloc", "full"):
            return step.capacity
        if step.backing is not None and step.qcow2 is None:
            return 0
        if step.backing is not None and step.qcow2 is not None:
            # Three clusters of tables, and an L1 table: 8 bytes for each cluster full of entries of 8 bytes.
            return 4 * step.qcow2.cluster_size + step.capacity // (step.qcow2.cluster_size**2 // 8) * 8
        if not layers:
            return 0
        topmost = layers[0]
        available = self._available()
        if topmost.network is None and (topmost.image.format == "raw" or step.route == "copy"):
            end = guards.length(topmost.fd)
            if topmost.image.format == "raw":
                end = min(end, step.capacity)
            allocated = file_copy.allocated_size(topmost.fd, end)
            return allocated if allocated <= available else file_copy.data_size(topmost.fd, end, watch)
        # Metadata of no format takes more than this share; a pool with so much to spare needs no measuring.
        ceiling = step.capacity + step.capacity // 8 + (4 << 20)
        if available >= ceiling:
            return ceiling
        if step.format not in ("raw", "qcow2"):
            return sum(file_copy.allocated_size(image.fd, guards.length(image.fd)) for image in layers)
        # For raw it would answer with the capacity, so a qcow2 image of the same data stands in.
        options = qemu_img.creation_options(step.format, step.qcow2, step.preallocation)
        arguments = qemu_img.measure([image.layer for image in layers], "qcow2", options)
        names = {image.fd: image.what for image in layers}
        out = self._task.qemu.run(arguments, names, f"measuring {topmost.what}", watch)[1]
        return int(json.loads(out)["required"])

    def missing(self, step: Create) -> int:
        """Bytes that the pool lacks for it, 0 when it has enough."""
        return max(self._taken(step) + self._source.told.reserved - self._available(), 0)

    def _available(self) -> int:
        pool = self._task.pool
        return pool.available_for(self._target.device) if isinstance(pool, DevicePool) else pool.available()

    def reserve(self, step: Create) -> None:
        """What this one takes is not there for the next clone of the same source."""
        self._source.told.reserved += self._taken(step)
        self._source.told.kinds.add(kind(step))

    def _taken(self, step: Create) -> int:
        told, pool = self._source.told, self._task.pool
        if isinstance(pool, DevicePool) and not isinstance(pool, RbdPool):
            if step.route == "link":
                return pool.snapshot_size(step.capacity) if self._source.facts.fixed else 0
            target = self._target.device
            if target is None or target.thin_pool is None:
                return pool.space_for(step.capacity, target)
        if step.route == "libvirt" or (step.route not in ("blank", "link") and step.unshared is None):
            return 0
        own_blocks = step.backing is not None or self._task.request.own_blocks
        if not own_blocks and kind(step) in told.kinds and self._may_share():
            # It will share the blocks of the one before.
            return 0
        if step not in told.needed:
            told.needed[step] = self.needed(step)
        return told.needed[step]

    def unshareable(self) -> str:
        """Why source and target cannot share blocks; empty where they may: only trying it, with the staged file, tells."""
        pool, layers = self._task.pool, self._source.layers
        if isinstance(pool, RemotePool):
            return f"pool {pool.name!r} is on another host"
        if not layers:
            return "there is no source"
        if isinstance(pool, DevicePool):
            return f"the target is a volume of a {pool.type} pool"
        if layers[0].network is not None:
            return "the source is on the network"
        if layers[0].block:
            return "the source is a block device"
        source, target = layers[0].fd, pool.fd
        file_system = guards.file_system(source)
        if file_system != guards.file_system(target) or (
            file_system != _BTRFS and os.fstat(source).st_dev != os.fstat(target).st_dev
        ):
            return "source and target are on different file systems"
        return "" if self._may_share() else "the file system cannot share blocks"

    def _may_share(self) -> bool:
        pool = self._task.pool
        return not isinstance(pool, (DevicePool, RemotePool)) and guards.file_system(pool.fd) not in _NEVER_SHARE
