# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What every way to make a volume needs: the source held and checked, the target left alone by others."""

from __future__ import annotations

import os
import typing as t
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace

from .._errors import CloneError
from .._images import probe, qemu_img
from .._images.qemu_img import Layer
from .._transfer import pace
from .model import Create

if t.TYPE_CHECKING:  # pragma: no cover
    from .facts import Scene


@dataclass
class Transfer:
    """How the data got there: ``reflink``, ``copy``, ``convert``, ``link`` or ``libvirt``, and why nothing better served."""

    name: str
    fallback_reason: t.Optional[str] = None


def held(scene: Scene) -> t.List[t.Tuple[int, str, t.Tuple[int, ...]]]:
    """The layers of the source that this host can hold still, for :class:`guards.Hold`."""
    return [(image.fd, image.what, image.version) for image in scene.layers if image.network is None and not image.own]


@contextmanager
def source_checked(scene: Scene) -> t.Iterator[t.Callable[[], None]]:
    """``qemu-img check`` of the source, beside the work. What it gives waits for it; of a work that fails it is the reason.

    :raises CloneError: ``CORRUPT_IMAGE``
    """
    with ThreadPoolExecutor(1) as worker:
        verdict = worker.submit(scene.source.corrupt)

        def expect_sound() -> None:
            corrupt = verdict.result()
            if corrupt:
                raise CloneError("CORRUPT_IMAGE", corrupt)

        try:
            yield expect_sound
        except (CloneError, OSError):
            expect_sound()
            raise


def refuse_other_source(scene: Scene) -> None:
    """What this host cannot hold still, on the network, has to be as it was when it was looked at."""
    why = scene.source.disturbed()
    if why:
        raise CloneError("IN_USE", why)


def source_layers(scene: Scene, step: Create) -> t.List[Layer]:
    """The source as far as it is cloned: only raw ones are shrunk, and only where nothing but zeros is cut off."""
    layers = [image.layer for image in scene.layers]
    if step.capacity < scene.layers[0].image.capacity:
        layers = [replace(layers[0], size=probe.round_capacity(step.format, step.capacity))]
    return layers


def verify(scene: Scene, step: Create, target: Layer, what: str, watch: t.Callable[[], None]) -> None:
    """Compare what is on the disk: not what is in the page cache, which a device does not share with qemu's O_DIRECT.

    :raises CloneError: ``IO_ERROR`` where it is not what the source has
    """
    if target.network is None:
        os.fsync(target.fd)
        pace.forget(target.fd)
    names = {image.fd: image.what for image in scene.layers}
    names[target.fd] = what
    layers = source_layers(scene, step)
    arguments = qemu_img.compare(layers, [target, *(layers if step.backing else ())])
    if scene.qemu.run(arguments, names, f"comparing {what} with its source", watch, accept=(0, 1))[0]:
        raise CloneError("IO_ERROR", f"verify: {what} does not read as {scene.layers[0].what} does")


def refuse_in_use(scene: Scene, name: str, doing: str) -> None:
    """For the last moment: somebody may have begun to use the target meanwhile.

    :param doing: what cannot be done then, as a sentence
    """
    why = scene.target.in_use(name)
    if why:
        raise CloneError("IN_USE", f"{doing}: {why}")
