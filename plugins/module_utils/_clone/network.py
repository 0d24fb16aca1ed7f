# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Volumes on the network, of pools of type rbd and iscsi-direct: only qemu-img reads them."""

from __future__ import annotations

import os
import typing as t
from dataclasses import replace

from .._errors import CloneError
from .._images import probe, qemu_img
from .._images.probe import Image
from .._images.qemu_img import Layer
from .._pools import capabilities
from .._pools.devices import Device
from .._pools.network import NetworkPool, memory
from .._pools.rbd import RbdImage, RbdPool
from .._transfer import device
from .files import OpenImage
from .model import SourceFacts, TargetFacts
from .task import Task


def look_at_source(task: Task, layers: t.List[OpenImage], facts: SourceFacts, pool: NetworkPool, volume: Device) -> SourceFacts:
    """The source, appended to ``layers``."""
    request = task.request
    if request.source_format not in (None, "raw"):
        raise CloneError(
            "NO_SUPPORT",
            f"source_format: {facts.what}, which is of type {pool.type}, is read as raw, not as {request.source_format}",
        )
    layer = pool.layer(volume)
    image = Image("raw", volume.capacity)
    opened = OpenImage(layer.fd, facts.what, volume.path, image, False, (), pool.lock_key(volume.name), layer.network)
    opened.name = volume.name
    layers.append(opened)
    marked = capabilities.of(pool.type).staging == "mark"
    if marked or request.encrypted or request.format not in (None, "raw"):
        # Reading costs a process, so only where it matters what is there.
        head = _head(task, layer, facts.what)
        if head == device.MARK:
            raise CloneError("CORRUPT_IMAGE", f"{facts.what} is not finished: the run that made it was killed")
        image = opened.image = probe.read_raw(volume.capacity, (), head)
    opened.changes = pool.changes(volume)
    return replace(
        facts,
        path=volume.path,
        key=volume.path,
        image=image,
        identity=volume.identity,
        below=tuple(above.identity for above in _parents(pool, volume)),
        network=True,
    )


def disturbed(pool: NetworkPool, image: OpenImage) -> str:
    """Why a source may have been written to while it was read; empty when nothing is known of that."""
    who = pool.writers(image.name)
    if who:
        return f"{image.what} was opened for writing by {who} while it was read"
    return f"{image.what} changed while it was read" if pool.changes(pool.volume(image.name)) != image.changes else ""


def look_at_target(task: Task, pool: NetworkPool, volume: Device, layer: Layer, source: SourceFacts, what: str) -> TargetFacts:
    """The target, opened as ``layer``."""
    image = Image("raw", volume.capacity)
    facts = TargetFacts(image, volume.identity)
    if volume.identity == source.identity:
        return facts
    below = _parents(pool, volume)
    if below:
        image = replace(image, backing=below[0].path, backing_format="raw")
        facts = replace(facts, on_source=below[0].identity == source.identity, depth=len(below))
    marked = capabilities.of(pool.type).staging == "mark"
    if not (marked or task.request.force):
        return replace(facts, image=image)
    head = _head(task, layer, what)
    encrypted = probe.read_raw(volume.capacity, (), head).encrypted
    return replace(facts, image=replace(image, encrypted=encrypted), unfinished=marked and head == device.MARK)


def _head(task: Task, layer: Layer, what: str) -> bytes:
    """The first block."""
    fd = memory(bytes(len(device.MARK)))
    try:
        source = replace(layer, offset=0, size=len(device.MARK))
        arguments = qemu_img.fill(source.node, [layer], Layer(fd, "raw"), False, None)
        doing = f"reading {what}"
        task.qemu.run(arguments, {layer.fd: what, fd: "memory"}, doing, lambda: task.deadline.check(doing))
        return os.pread(fd, len(device.MARK), 0)
    finally:
        os.close(fd)


def _parents(pool: NetworkPool, volume: Device) -> t.List[Device]:
    """What lies below it, the nearest first."""
    return list(pool.parents(volume)) if isinstance(pool, RbdPool) and isinstance(volume, RbdImage) else []
