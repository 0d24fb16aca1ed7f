# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Carrying out a plan on a volume that is a device, of this host or on the network. qemu-img moves the bytes, a piece at a time
where their order matters.

Promise: killed anywhere, a volume that can be renamed is absent or complete, and one that cannot carries a mark until it is
complete. Nothing that the device held before shows through: what lies between the data and beyond it reads as zeros.
"""

from __future__ import annotations

import os
import typing as t
from dataclasses import replace

from .._errors import CloneError, from_os_error
from .._images import qemu_img
from .._images.qemu_img import Layer
from .._pools.devices import Device, DevicePool
from .._pools.network import memory
from .._pools.rbd import RbdPool
from .._transfer import device, guards
from .model import Create, Facts, Grow
from .work import Transfer, held, refuse_in_use, refuse_other_source, source_checked, source_layers, verify

if t.TYPE_CHECKING:  # pragma: no cover
    from .facts import Scene

# What is written last where the first block has a mark: by one write, so that nobody finds a part of it.
_FIRST = len(device.MARK)


def create(scene: Scene, facts: Facts, step: Create) -> t.Optional[Transfer]:
    what = facts.what
    with guards.Hold(held(scene)) as hold, source_checked(scene) as expect_sound:

        def watch() -> None:
            scene.deadline.check(f"making {what}")
            hold.check()

        def finish() -> None:
            """Before anybody may take it for a whole volume."""
            watch()
            expect_sound()
            hold.finish()
            if step.route != "link":
                # A snapshot, which a link is made from, is of one moment.
                refuse_other_source(scene)

        pool = t.cast(DevicePool, scene.pool)
        try:
            if facts.pool.able.staging == "rename":
                with _staged(scene, pool, step) as volume:
                    if step.route != "link":
                        with pool.opened(volume, what) as target:
                            _fill(scene, step, target, volume.capacity, what, watch, zero=_reads_zero(pool, volume))
                            if scene.request.verify and scene.layers:
                                verify(scene, step, target, what, watch)
                    finish()
                    if step.replaces:
                        refuse_in_use(scene, facts.name, f"{what} cannot be replaced")
                        # Else we would be the one who still uses it.
                        scene.target.let_go()
                    pool.publish(volume.name, facts.name, step.replaces)
            else:
                _fill_marked(scene, facts, step, what, watch, finish)
        except FileExistsError:
            raise
        except OSError as exc:
            raise from_os_error(exc, f"writing {what}") from exc
    if step.route == "link":
        return Transfer("link")
    return Transfer("convert", scene.source.told.answers.get("unshareable")) if scene.layers else None


def _staged(scene: Scene, pool: DevicePool, step: Create) -> t.ContextManager[Device]:
    """A new volume, linked to the source or empty, under a name of its own."""
    if step.route == "link":
        return pool.staged_link(step.capacity, scene.source_pool, scene.layers[0].name)
    return pool.staged(step.capacity, scene.target.device)


def _reads_zero(pool: DevicePool, volume: Device) -> bool:
    """Whether what is new there reads as zeros: in a thin pool of LVM, as a rule, and in Ceph."""
    return volume.zeroes or isinstance(pool, RbdPool)


def _fill_marked(
    scene: Scene, facts: Facts, step: Create, what: str, watch: t.Callable[[], None], finish: t.Callable[[], None]
) -> None:
    """A device under its final name: a mark first, the first block last."""
    pool = t.cast(DevicePool, scene.pool)
    made = scene.target.device is None
    if made:
        pool.make(facts.name, step.capacity)
    else:
        refuse_in_use(scene, facts.name, f"{what} cannot be {'replaced' if step.replaces else 'filled'}")
    volume = pool.volume(facts.name)
    if volume is None:
        raise CloneError("IO_ERROR", f"{what} is not there after it was made")
    whole = False
    try:
        with pool.opened(volume, what) as target:
            size = volume.capacity
            _mark(scene, target, what, watch)
            pool.marked(facts.name)
            _fill(scene, step, target, size, what, watch, start=_FIRST)
            if target.network is None:
                # qemu-img has flushed the others when it ended.
                os.fsync(target.fd)
            finish()
            # From here on it is whole, or the mark is still there.
            _fill(scene, step, target, size, what, watch, end=_FIRST)
            if scene.request.verify and scene.layers:
                try:
                    verify(scene, step, target, what, watch)
                except CloneError:
                    _mark(scene, target, what, watch)
                    raise
        whole = True
    finally:
        if made and not whole:
            pool.unmake(facts.name)


def _mark(scene: Scene, target: Layer, what: str, watch: t.Callable[[], None]) -> None:
    if target.network is None:
        device.mark(target.fd)
        return
    fd = memory(device.MARK)
    try:
        source = Layer(fd, "raw")
        into = replace(target, offset=0, size=len(device.MARK))
        arguments = qemu_img.fill(source.node, [], into, False, None)
        scene.qemu.run(arguments, {fd: "the mark", target.fd: what}, f"writing {what}", watch)
    finally:
        os.close(fd)


def _fill(
    scene: Scene,
    step: Create,
    target: Layer,
    size: int,
    what: str,
    watch: t.Callable[[], None],
    start: int = 0,
    end: t.Optional[int] = None,
    zero: bool = False,
) -> None:
    """Make the target, from ``start`` to ``end``, read as the source does, and as zeros beyond the end of that.

    :param size: of the target
    :param zero: whether it reads as zeros already
    """
    end = size if end is None else min(end, size)
    layers = source_layers(scene, step) if scene.layers else []
    # A raw source need not end at a sector; qemu-img fills up the last one with zeros.
    length = -(-min(scene.layers[0].image.capacity, step.capacity) // 512) * 512 if scene.layers else 0
    stop = min(end, length)
    if start < stop:
        source = qemu_img.source_node(layers)
        if start or stop < length:
            source = {"driver": "raw", "offset": start, "size": stop - start, "file": source}
        into = replace(target, offset=start, size=stop - start)
        names = {image.fd: image.what for image in scene.layers}
        names[target.fd] = what
        arguments = qemu_img.fill(source, layers, into, zero, scene.rate.limit)
        scene.qemu.run(arguments, names, f"writing {what}", watch)
    start = max(start, stop)
    if zero or start >= end:
        return
    if target.network is None:
        device.zero(target.fd, start, end, watch)
    else:
        nothing = {"driver": "raw", "file": {"driver": "null-co", "size": end - start, "read-zeroes": True}}
        into = replace(target, offset=start, size=end - start)
        scene.qemu.run(qemu_img.fill(nothing, [], into, False, None), {target.fd: what}, f"writing {what}", watch)


def grow(scene: Scene, facts: Facts, step: Grow) -> None:
    what = facts.what
    pool, volume = t.cast(DevicePool, scene.pool), t.cast(Device, scene.target.device)
    refuse_in_use(scene, facts.name, f"{what} cannot be grown")
    begin = volume.sound
    pool.grow(volume, step.capacity)
    grown = t.cast(Device, pool.volume(facts.name))
    # What was never written to in a thin pool reads as zeros, however that is set.
    if not (grown.thin_pool or isinstance(pool, RbdPool)):
        with pool.opened(grown, what) as target:
            device.zero(target.fd, begin, grown.capacity, lambda: scene.deadline.check(f"growing {what}"))
        pool.zeroed(grown)


def flatten(scene: Scene, facts: Facts) -> None:
    refuse_in_use(scene, facts.name, f"{facts.what} cannot be flattened")
    t.cast(RbdPool, scene.pool).flatten(facts.name)
