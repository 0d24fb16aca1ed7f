# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Carrying out a plan on a volume that is a device. qemu-img moves the bytes, a piece at a time where their order matters.

Promise: killed anywhere, a volume that can be renamed is absent or complete, and one that cannot carries a mark until it is
complete. Nothing that the device held before shows through: what lies between the data and beyond it reads as zeros.
"""

from __future__ import annotations

import os
import typing as t
from contextlib import contextmanager

from .._errors import CloneError, from_os_error
from .._images import qemu_img
from .._images.qemu_img import Layer
from .._pools.devices import Device, DevicePool, LogicalPool
from .._transfer import device, guards
from .planner import Create, Facts, Grow
from .work import Transfer, held, refuse_in_use, source_checked, source_layers

if t.TYPE_CHECKING:  # pragma: no cover
    from .facts import Scene

# What is written last where the first block has a mark: enough for any header.
_FIRST = 1 << 20


def create(scene: Scene, facts: Facts, step: Create) -> t.Optional[Transfer]:
    what = f"volume {facts.name!r} of pool {facts.pool.name!r}"
    with guards.Hold(held(scene)) as hold, source_checked(scene) as expect_sound:

        def watch() -> None:
            scene.deadline.check(f"making {what}")
            hold.check()

        def finish() -> None:
            """Before anybody may take it for a whole volume."""
            watch()
            expect_sound()
            hold.finish()

        pool = t.cast(DevicePool, scene.pool)
        try:
            if isinstance(pool, LogicalPool):
                with pool.staged(step.capacity, scene.target_device) as volume:
                    with _opened(volume, what) as target:
                        # What a thin pool gives for the first time reads as zeros.
                        _fill(scene, step, target, what, watch, zero=bool(volume.thin_pool))
                    finish()
                    if step.replaces:
                        refuse_in_use(scene, facts.name, f"{what} cannot be replaced")
                    pool.publish(volume.name, facts.name, step.replaces)
            else:
                _fill_marked(scene, facts, step, what, watch, finish)
        except FileExistsError:
            raise
        except OSError as exc:
            raise from_os_error(exc, f"writing {what}") from exc
    return Transfer("convert", scene.told.get("unshareable")) if scene.layers else None


@contextmanager
def _opened(volume: Device, what: str) -> t.Iterator[Layer]:
    """The device for writing, durable at the end."""
    fd = os.open(os.path.realpath(volume.path), os.O_RDWR | os.O_EXCL | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        yield Layer(fd, "raw", block=True)
        os.fsync(fd)
    finally:
        os.close(fd)


def _fill_marked(
    scene: Scene, facts: Facts, step: Create, what: str, watch: t.Callable[[], None], finish: t.Callable[[], None]
) -> None:
    """A device under its final name: a mark first, the first block last."""
    pool = t.cast(DevicePool, scene.pool)
    made = scene.target_device is None
    if made:
        pool.make(facts.name, step.capacity)
    elif step.replaces:
        refuse_in_use(scene, facts.name, f"{what} cannot be replaced")
    volume = pool.volume(facts.name)
    if volume is None:
        raise CloneError("IO_ERROR", f"{what} is not there after it was made")
    whole = False
    try:
        with _opened(volume, what) as target:
            device.mark(target.fd)
            _fill(scene, step, target, what, watch, start=_FIRST)
            os.fsync(target.fd)
            finish()
            # From here on it is whole, or the mark is still there.
            _fill(scene, step, target, what, watch, end=_FIRST)
        whole = True
    finally:
        if made and not whole:
            pool.remove(facts.name)


def _fill(
    scene: Scene,
    step: Create,
    target: Layer,
    what: str,
    watch: t.Callable[[], None],
    start: int = 0,
    end: t.Optional[int] = None,
    zero: bool = False,
) -> None:
    """Make the target, from ``start`` to ``end``, read as the source does, and as zeros beyond the end of that.

    :param zero: whether it reads as zeros already
    """
    size = guards.length(target.fd)
    end = size if end is None else min(end, size)
    layers = source_layers(scene, step) if scene.layers else []
    # A raw source need not end at a sector; qemu-img fills up the last one with zeros.
    length = -(-min(scene.layers[0].image.capacity, step.capacity) // 512) * 512 if scene.layers else 0
    stop = min(end, length)
    if start < stop:
        source = qemu_img.source_node(layers)
        if start or stop < length:
            source = {"driver": "raw", "offset": start, "size": stop - start, "file": source}
        into = Layer(target.fd, "raw", True, stop - start, start)
        names = {image.fd: image.what for image in scene.layers}
        names[target.fd] = what
        arguments = qemu_img.fill(source, layers, into, zero, scene.rate.limit)
        scene.qemu.run(arguments, names, f"writing {what}", watch)
    if not zero and max(start, stop) < end:
        device.zero(target.fd, max(start, stop), end, watch)


def grow(scene: Scene, facts: Facts, step: Grow) -> None:
    what = f"volume {facts.name!r} of pool {facts.pool.name!r}"
    pool, volume = t.cast(LogicalPool, scene.pool), t.cast(Device, scene.target_device)
    refuse_in_use(scene, facts.name, f"{what} cannot be grown")
    begin = volume.capacity if volume.zero_from is None else volume.zero_from
    pool.grow(volume, step.capacity)
    grown = t.cast(Device, pool.volume(facts.name))
    if not grown.thin_pool:
        with _opened(grown, what) as target:
            device.zero(target.fd, begin, grown.capacity, lambda: scene.deadline.check(f"growing {what}"))
        pool.zeroed(grown)
