# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What only some plans need, since it costs something: the data, all volumes of the pool, the chain below the target."""

from __future__ import annotations

import os
import re
import typing as t
from contextlib import closing
from dataclasses import replace

from .._images import probe, qemu_img
from .._images.probe import Image
from .._images.qemu_img import Layer
from .._pools.devices import DevicePool
from .._pools.libvirt import LibvirtPool
from .._pools.remote import RemotePool
from .._transfer import file_copy, guards
from .._volumes.inventory import Inventory
from . import elsewhere
from .files import OpenImage, path_of
from .model import Create, Dependents
from .source import Source
from .target import Target
from .task import Task


def target_chain(task: Task, source: Source, target: Target, image: Image) -> bool:
    """The chain is where it may be. To be flattened, it becomes the source."""
    if target.elsewhere is not None:
        elsewhere.all_below(task, target.elsewhere, f"volume {target.elsewhere.name!r}")
        return True
    topmost, *_below = target.layers(image)
    if task.request.flatten:
        # The same open file, so that we do not take ourselves for another user of it.
        what, path = target.what, path_of(topmost.fd)
        fd = os.dup(topmost.fd)
        source.layers[:] = [OpenImage(fd, what, path, image, False, guards.version(fd)), *target.below]
        target.below = []
    return True


def target_dependents(task: Task, source: Source, name: str) -> Dependents:
    """One look at all volumes serves all clones of a task; it is taken anew with each look at their source."""
    if isinstance(task.pool, DevicePool):
        return Dependents(tuple(task.pool.dependents(name)))
    if source.told.inventory is None:
        with closing(Inventory(task.request.uri, task.request.pool, "", task.deadline)) as scanned:
            scanned.open_pool()
            scanned.scan()
            source.told.inventory = scanned, scanned.dependents()
    inventory, dependents = source.told.inventory
    directory = os.fstat(task.pool.fd)
    key = ((directory.st_dev, directory.st_ino), name)
    untold = [*inventory.untold(key), *(f"pool {name!r}" for name in inventory.unseen)]
    return Dependents(tuple(sorted(map(inventory.call, dependents.get(key, ())))), tuple(untold))


def data_beyond(task: Task, source: Source) -> int:
    """Offset of the first data that shrinking would cut off, -1 for none."""
    topmost = source.layers[0]
    start, end = t.cast(int, task.request.capacity), topmost.image.capacity
    if topmost.network is not None:
        # From the start of a sector on: maybe refused for what would be kept, never cut off.
        start = start // probe.SECTOR * probe.SECTOR
        tail = replace(topmost.layer, offset=start, size=end - start)
        return _first_data(task, source, tail, end - start, start)
    return next((at for at, _data in file_copy.nonzero_data(topmost.fd, start, end, source.watch)), -1)


def _first_data(task: Task, source: Source, layer: Layer, length: int, start: int) -> int:
    """Offset of the first that is not zero in a part of a volume on the network, -1 for none."""
    nothing = {"driver": "raw", "file": {"driver": "null-co", "size": length, "read-zeroes": True}}
    arguments = qemu_img.compare_nodes(layer.node, nothing, [layer])
    what = source.layers[0].what
    status, out = task.qemu.run(arguments, {layer.fd: what}, f"looking at {what}", source.watch, accept=(0, 1))
    found = re.search("offset ([0-9]+)", out)
    return -1 if status == 0 else start + (int(found.group(1)) if found else 0)


def content_equal(task: Task, source: Source, target: Target, image: Image) -> bool:
    """Whether the target, described by ``image``, reads as the source does."""
    names = {image.fd: image.what for image in source.layers}
    names[target.fd] = "the target"
    target_layers = target.layers(image)
    names.update({image.fd: image.what for image in target.below})
    arguments = qemu_img.compare([image.layer for image in source.layers], target_layers)
    doing = f"comparing with {source.layers[0].what}"
    return task.qemu.run(arguments, names, doing, source.watch, accept=(0, 1))[0] == 0


def denied(task: Task, target: Target, draft: t.Optional[Create]) -> str:
    """Why this user may not change the pool; empty when he may.

    :param draft: the step, when it is the only one; libvirt itself may be let do what this user may not
    """
    pool = task.pool
    why = pool.denied()
    by_libvirt = draft is not None and draft.route == "libvirt"
    if not why and isinstance(pool, LibvirtPool) and not by_libvirt:
        why = pool.cannot_write()
    if not why and draft is None and target.fd < 0 and not isinstance(pool, RemotePool):
        why = f"pool {pool.name!r}: this user cannot open the volume; use become"
    return why
