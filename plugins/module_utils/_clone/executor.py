# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Carrying out a plan: lock, judge again, stage, fill, publish, and tell libvirt.

Promise for files: killed anywhere, the target is absent (or the old one) or complete; any error leaves it so too. Others have a
promise of their own in ``devices.py`` and ``remote.py``.
"""

from __future__ import annotations

import json
import os
import time
import typing as t
from contextlib import closing

from .._errors import CloneError, from_os_error
from .._images import probe, qemu_img
from .._images.qemu_img import Layer
from .._pools.devices import DevicePool
from .._pools.remote import RemotePool
from .._transfer import file_copy, guards, locks, pace, staging
from . import devices, planner, remote, result
from .facts import Scene
from .model import Backing, Create, Facts, Flatten, Grow, Ownership, Plan, SetPermissions, Step, Unanswered
from .request import Request
from .work import Transfer, held, refuse_in_use, refuse_other_source, source_checked, source_layers, verify

# Each round means that the world changed after we had looked: another host or user published the name, or the source was
# waited for; then all is judged again.
_ROUNDS = 5
# Bytes of a source in the page cache that are not worth keeping: its header, and what readahead took along.
_COLD = 32 << 20


def run(request: Request, check_mode: bool) -> t.Dict[str, t.Any]:
    """Do what the request states, or in check mode say what would be done. Returns the module's result.

    :raises CloneError: on refusal or failure
    """
    started = time.monotonic()
    with closing(Scene(request, check_mode)) as scene:
        facts = scene.gather()
        plan: t.Optional[Plan] = None
        transfer: t.Optional[Transfer] = None
        try:
            facts, plan = judge(scene, facts)
        except CloneError as exc:
            # Whoever has it open may be another run, which is waited for under the lock; then all is judged again.
            if check_mode or exc.code != "IN_USE":
                raise
        if plan is None or (plan.steps and not check_mode):
            facts, plan, transfer = _change(scene, facts)
        if not check_mode and (plan.steps or not scene.pool.lists(facts.name)):
            scene.pool.refresh(scene.deadline.sooner(request.lock_timeout, "lock_timeout"))
        return result.build(scene, facts, plan, transfer, time.monotonic() - started)


def judge(scene: Scene, facts: Facts) -> t.Tuple[Facts, t.Optional[Plan]]:
    """The plan, and the facts that it is made from. None where it has to wait until the target is locked."""
    while True:
        try:
            return facts, planner.plan(scene.request, facts)
        except Unanswered as asked:
            if scene.postpones(asked):
                return facts, None
            facts = scene.answer(asked, facts)


def _change(scene: Scene, facts: Facts) -> t.Tuple[Facts, Plan, t.Optional[Transfer]]:
    request = scene.request
    target = scene.pool.lock_key(facts.name)
    sources = source_locks(scene)
    waiting = scene.deadline.sooner(request.lock_timeout, "lock_timeout")
    # While we wait, whoever has the lock must not take us for a user of its target.
    scene.close_files()
    with locks.Locks(sources, [target], waiting, f"waiting for another run to finish volume {facts.name!r}"):
        scene.task.locked = True
        for _round in range(_ROUNDS):
            # What another run did while we waited for the lock counts.
            facts, judged = judge(scene, scene.gather())
            plan = t.cast(Plan, judged)
            if facts.source_writers and any(isinstance(step, Create) for step in plan.steps):
                wait_for_source(scene)
                continue
            try:
                transfer = None
                for step in plan.steps:
                    done = carry_out(scene, facts, step)
                    transfer = done or transfer
                return facts, plan, transfer
            except FileExistsError:
                if facts.pool.remote:
                    # Of what others make there libvirt tells once it has looked.
                    scene.pool.refresh(waiting)
                continue
            except OSError as exc:
                raise from_os_error(exc, f"making volume {facts.name!r} of pool {request.pool!r}") from exc
    raise CloneError("STORAGE_VOL_EXIST", f"volume {facts.name!r} of pool {request.pool!r} comes and goes while it is made")


def source_locks(scene: Scene) -> t.List[str]:
    """Names of the locks of the source and all below it; of a volume to be flattened, which is locked itself, all below it."""
    if isinstance(scene.pool, RemotePool) and scene.request.source is not None:
        return [scene.source_pool.lock_key(scene.request.source)]
    layers = scene.layers[1:] if scene.request.flatten else scene.layers
    return [image.lock_key for image in layers if not image.own]


def wait_for_source(scene: Scene) -> None:
    scene.deadline.wait_for(
        lambda: not scene.source.writers(),
        f"waiting for the writers of {scene.layers[0].what}",
    )


def carry_out(scene: Scene, facts: Facts, step: Step) -> t.Optional[Transfer]:
    on_device = isinstance(scene.pool, DevicePool)
    if isinstance(step, Create):
        if facts.pool.remote:
            return remote.create(scene, facts, step, _convert)
        how = remote.clone if step.route == "libvirt" else devices.create if on_device else _create
        return how(scene, facts, step)
    if isinstance(step, Grow):
        how_to_grow = remote.grow if facts.pool.remote else devices.grow if on_device else _grow_in_place
        how_to_grow(scene, facts, step)
    elif isinstance(step, Flatten):
        devices.flatten(scene, facts)
    else:
        _set_permissions(scene, facts, step)
    return None


# --- a new volume -------------------------------------------------------------------------------------------------------


def _create(scene: Scene, facts: Facts, step: Create) -> t.Optional[Transfer]:
    what = facts.what
    with guards.Hold(held(scene)) as hold, staging.Staging(scene.pool.fd) as staged, source_checked(scene) as expect_sound:

        def watch() -> None:
            scene.deadline.check(f"making {what}")
            hold.check()

        transfer = fill(scene, step, staged, what, watch)
        try:
            watch()
            os.fsync(staged.fd)
            expect_sound()
            hold.finish()
            refuse_other_source(scene)
            if step.replaces:
                refuse_in_use(scene, facts.name, f"{what} cannot be {'flattened' if step.flattens else 'replaced'}")
            staged.publish(facts.name, step.replaces)
        except FileExistsError:
            raise
        except (OSError, CloneError) as exc:
            raise _failed(scene, step, staged.fd, exc, f"writing {what}") from exc
    return transfer


def fill(scene: Scene, step: Create, staged: staging.Staging, what: str, watch: t.Callable[[], None]) -> t.Optional[Transfer]:
    """Make the staged file the volume that ``step`` describes; all it lacks is to be durable, and its name."""
    try:
        if step.nocow is not None:
            staging.set_nocow(staged.fd, step.nocow)
        routes = {"copy": _copy, "convert": _convert, "link": _link, "blank": _leave_blank}
        transfer = routes[step.route](scene, step, staged.fd, what, watch)
        _expect(staged.fd, step, what)
        if scene.request.verify and scene.layers:
            verify(scene, step, Layer(staged.fd, step.format), what, watch)
        staged.own(*_ownership(step.owner))
    except (OSError, CloneError) as exc:
        raise _failed(scene, step, staged.fd, exc, f"writing {what}") from exc
    return transfer


def _failed(scene: Scene, step: Create, target: int, exc: t.Union[OSError, CloneError], doing: str) -> CloneError:
    """The error for a volume that could not be written; that of a full pool says how many bytes are missing."""
    error = exc if isinstance(exc, CloneError) else from_os_error(exc, doing)
    if error.code != "NO_SPACE":
        return error
    needed = scene.space.needed(step)
    # What the staged file has taken is free again in a moment.
    missing = needed - scene.pool.available() - os.fstat(target).st_blocks * 512
    amount = f"about {missing} bytes are missing" if missing > 0 else f"it takes about {needed} bytes"
    return CloneError("NO_SPACE", f"{error.msg}; {amount}")


def _ownership(owner: Ownership) -> t.Tuple[int, int, int, t.Optional[str]]:
    return t.cast(int, owner.uid), t.cast(int, owner.gid), t.cast(int, owner.mode), owner.label


def _copy(scene: Scene, step: Create, target: int, what: str, watch: t.Callable[[], None]) -> Transfer:
    """The file as it is, then grown: keeps snapshots, bitmaps and compressed clusters."""
    source = scene.donor or scene.layers[0]
    if step.nocow is None:
        _match_nocow(source.fd, target)
    reason = step.unshared or file_copy.share(source.fd, target)
    if reason is not None:
        _refuse_unshared(scene, step, what, reason)
        length = guards.length(source.fd)
        if source.image.format == "raw":
            length = min(length, step.capacity)
        file_copy.copy(source.fd, target, length, watch, scene.rate)
    if step.format == "raw":
        _set_length(target, step.capacity)
        file_copy.preallocate(target, 0, step.capacity, step.preallocation, watch)
    elif step.capacity > source.image.capacity:
        _grow_image(scene, source.image, [Layer(target, step.format)], step, what, watch)
    return Transfer("copy" if reason else "reflink", reason if scene.request.method != "copy" else None)


def _set_length(fd: int, length: int) -> None:
    # A file that is set to the length it has gets its last, partial block anew on XFS, and shares it no more.
    if os.fstat(fd).st_size != length:
        os.ftruncate(fd, length)


def _refuse_unshared(scene: Scene, step: Create, what: str, reason: str) -> None:
    """Only trying it tells that blocks cannot be shared; the plan took it that they can."""
    if scene.request.method == "reflink":
        raise CloneError("NO_SUPPORT", f"method=reflink is not possible for {what}: {reason}")
    if not step.unshared and scene.space.needed(step) > scene.pool.available():
        raise CloneError("NO_SPACE", f"writing {what} is not possible: {reason}, and the pool has no space for all of it")


def _match_nocow(source: int, target: int) -> None:
    """btrfs shares blocks only between files that are both, or both not, exempt from copy-on-write."""
    try:
        staging.set_nocow(target, staging.is_nocow(source))
    except CloneError:
        # Another file system than the source's: nothing to share there anyway.
        pass


def _convert(scene: Scene, step: Create, target: int, what: str, watch: t.Callable[[], None]) -> Transfer:
    """Another format, other options, or a chain that becomes one image: written by qemu-img, sharing blocks where it can."""
    into = Layer(target, step.format)
    reason = step.unshared
    clusters = [features.cluster_size for features in (step.qcow2, *(image.image.qcow2 for image in scene.layers)) if features]
    if reason is None and clusters and min(clusters) < file_copy.block_size(target):
        # The kernel would copy them one by one, and zeros along with them.
        reason = f"clusters of {min(clusters)} bytes are smaller than a block of the file system"
    if reason is None:
        if step.nocow is None:
            _match_nocow(scene.layers[0].fd, target)
        reason = next(filter(None, (file_copy.sharing_refused(image.fd, target) for image in scene.layers)), None)
    if reason is not None:
        _refuse_unshared(scene, step, what, reason)
    options = qemu_img.creation_options(step.format, step.qcow2, step.preallocation)
    names = {image.fd: image.what for image in scene.layers}
    names[target] = what
    source = scene.layers[0].image
    # Raw: made by us. Another capacity: "convert" has no option for it.
    exists = step.format == "raw" or step.capacity != probe.round_capacity(step.format, min(source.capacity, step.capacity))
    if exists:
        _leave_blank(scene, step, target, what, watch)
    arguments = qemu_img.convert(
        source_layers(scene, step), into, options, exists, share=reason is None, bwlimit=scene.rate.limit
    )
    limit = step.capacity + step.capacity // 4 + (128 << 20)
    files = [image.fd for image in scene.layers if image.network is None]
    hot = [fd for fd in files if pace.resident(fd, 0, guards.length(fd)) > _COLD]
    scene.qemu.run(arguments, names, f"converting {scene.layers[0].what}", watch, file_limit=limit)
    if step.format == "raw":
        _set_length(target, step.capacity)
    if reason is None:
        reason = _not_shared(scene, into, what, watch)
    else:
        os.fsync(target)
        for fd in (target, *(fd for fd in files if fd not in hot)):
            pace.forget(fd)
    return Transfer("convert", reason if scene.request.method != "copy" else None)


def _link(scene: Scene, step: Create, target: int, what: str, watch: t.Callable[[], None]) -> Transfer:
    """An overlay of the source. What it records is a name, so the name has to mean the file that was judged."""
    source, backing = scene.layers[0], t.cast(Backing, step.backing)
    options = qemu_img.creation_options(step.format, step.qcow2, step.preallocation)
    below = (backing.path, t.cast(str, backing.format))
    arguments = qemu_img.create(Layer(target, step.format), options, step.capacity, below)
    scene.qemu.run(arguments, {target: what}, f"making {what}", watch)
    if not os.path.samestat(os.stat(backing.path), os.fstat(source.fd)):
        raise CloneError("IN_USE", f"{source.what} was replaced while it was looked at")
    return Transfer("link")


def _not_shared(scene: Scene, target: Layer, what: str, watch: t.Callable[[], None]) -> t.Optional[str]:
    """Why a conversion that should have shared all blocks has not: compressed clusters, for one, have none to share."""
    if scene.request.method != "reflink":
        return (
            None if file_copy.shares_blocks(target.fd) is not False else "none of the source's data lies in blocks of its own"
        )
    # What qemu-img wrote besides the data, the tables of a qcow2 image, is always new.
    out = scene.qemu.run(qemu_img.data_map(target), {target.fd: what}, f"looking at {what}", watch)[1]
    data = [(part["offset"], part["offset"] + part["length"]) for part in json.loads(out) if part["data"] and not part["zero"]]
    missing = file_copy.unshared(target.fd, data)
    if missing >= file_copy.block_size(target.fd):
        raise CloneError(
            "NO_SUPPORT", f"method=reflink is not possible for {what}: {missing} bytes of data could not be shared"
        )
    return None


def _leave_blank(scene: Scene, step: Create, target: int, what: str, watch: t.Callable[[], None]) -> None:
    if step.format == "raw":
        # Made by us: qemu-img would leave an extent size hint of 1 MiB behind on XFS, which fills small holes.
        os.ftruncate(target, step.capacity)
        file_copy.preallocate(target, 0, step.capacity, step.preallocation, watch)
    else:
        options = qemu_img.creation_options(step.format, step.qcow2, step.preallocation)
        scene.qemu.run(
            qemu_img.create(Layer(target, step.format), options, step.capacity), {target: what}, f"making {what}", watch
        )


def _expect(target: int, step: Create, what: str) -> None:
    """The last look before a volume gets its name; only where it costs one small read."""
    size = os.fstat(target).st_size
    if step.format == "raw":
        capacity = size
    elif step.format == "qcow2":
        image = probe.read_qcow2(target, size, what)
        capacity = image.capacity
        wanted = step.backing
        if image.backing != (wanted.path if wanted else None) or (wanted and image.backing_format != wanted.format):
            raise CloneError("IO_ERROR", f"{what} came out with the backing store {image.backing!r} instead of {wanted}")
    else:
        return
    if capacity != step.capacity:
        raise CloneError("IO_ERROR", f"{what} came out with a capacity of {capacity} bytes instead of {step.capacity}")


def _grow_image(
    scene: Scene,
    image: probe.Image,
    layers: t.Sequence[Layer],
    step: t.Union[Create, Grow],
    what: str,
    watch: t.Callable[[], None],
) -> None:
    """Grow the first of ``layers``, an open file, which is described by ``image``."""
    names = {layer.fd: what for layer in layers}
    if image.qcow2 is not None and image.qcow2.compat == "0.10" and image.snapshots:
        # qemu-img cannot resize a version 2 image that has snapshots: they do not record their own size.
        scene.qemu.run(qemu_img.amend_compat(layers), names, f"amending {what}", watch)
    scene.qemu.run(qemu_img.resize(layers, step.capacity, step.preallocation), names, f"growing {what}", watch)


# --- a volume that exists -----------------------------------------------------------------------------------------------


def _grow_in_place(scene: Scene, facts: Facts, step: Grow) -> None:
    what = facts.what
    image = t.cast(probe.Image, facts.target.image)

    def watch() -> None:
        scene.deadline.check(f"growing {what}")

    if step.format == "raw":
        # For the other formats qemu-img does it.
        guards.claim(scene.target.fd)
    refuse_in_use(scene, facts.name, f"{what} cannot be grown")
    fd = os.open(facts.name, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=scene.pool.fd)
    try:
        status = os.fstat(fd)
        if not os.path.samestat(status, os.fstat(scene.target.fd)) or (
            step.format == "raw" and status.st_size != image.capacity
        ):
            raise CloneError("IN_USE", f"{what} was changed while it was looked at")
        if step.format == "raw":
            os.ftruncate(fd, step.capacity)
            file_copy.preallocate(fd, image.capacity, step.capacity, step.preallocation, watch)
        else:
            layers = [Layer(fd, step.format), *scene.target.layers(image)[1:]]
            _grow_image(scene, image, layers, step, what, watch)
        os.fsync(fd)
    finally:
        os.close(fd)


def _set_permissions(scene: Scene, facts: Facts, step: SetPermissions) -> None:
    what = facts.what
    owner, fd = step.owner, scene.target.fd
    try:
        if owner.uid is not None or owner.gid is not None:
            os.fchown(fd, -1 if owner.uid is None else owner.uid, -1 if owner.gid is None else owner.gid)
        if owner.mode is not None:
            os.fchmod(fd, owner.mode)
        if owner.label is not None:
            staging.set_label(fd, owner.label)
        os.fsync(fd)
    except OSError as exc:
        raise from_os_error(exc, f"setting the permissions of {what}") from exc
