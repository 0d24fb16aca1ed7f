# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Carrying out a plan by libvirt's own calls: all of it in a pool on another host, and the clones of ``method: libvirt`` here.

Promise: a call that fails leaves no volume. Not promised: a libvirtd that is killed while it clones leaves half a volume, which
has its final name; one that loses its power may lose a volume that was just made, since libvirt does not wait for the disk.
An upload that is broken off, by a kill, or by the network, is known by its first block, and the next run makes it anew.
"""

from __future__ import annotations

import os
import tempfile
import typing as t
from contextlib import contextmanager

from .. import _xml
from .._deadline import Deadline
from .._errors import CloneError
from .._pools import remote
from .._pools.libvirt import LibvirtPool
from .._pools.remote import RemotePool
from .._transfer import file_copy, guards, locks
from .model import Create, Facts, Grow
from .work import Transfer, held, refuse_in_use, source_checked

if t.TYPE_CHECKING:  # pragma: no cover
    from .facts import Scene

#: How a source becomes another format, in an open file of this host: executor.py has it.
Convert = t.Callable[["Scene", Create, int, str, t.Callable[[], None]], Transfer]

_PREALLOC_METADATA = 1  # VIR_STORAGE_VOL_CREATE_PREALLOC_METADATA


def create(scene: Scene, facts: Facts, step: Create, convert: Convert) -> t.Optional[Transfer]:
    """Make a volume in a pool on another host.

    :raises FileExistsError: somebody else has made one of that name
    """
    pool = t.cast(RemotePool, scene.pool)
    if facts.target.unfinished:
        # Left by a run that is dead, for we have its lock.
        pool.delete(facts.name, _waiting(scene))
    if step.route == "libvirt":
        transfer: t.Optional[Transfer] = clone(scene, facts, step)
        with _made(pool, facts.name):
            _expect(pool, facts, step)
        return transfer
    if step.route in ("copy", "convert"):
        return _upload(scene, facts, step, convert)
    pool.make(_document(facts.name, step), _flags(step))
    with _made(pool, facts.name):
        _expect(pool, facts, step)
    return Transfer("link") if step.route == "link" else None


def grow(scene: Scene, facts: Facts, step: Grow) -> None:
    refuse_in_use(scene, facts.name, f"{facts.what} cannot be grown")
    t.cast(RemotePool, scene.pool).grow(facts.name, step.capacity, _waiting(scene))


def clone(scene: Scene, facts: Facts, step: Create) -> Transfer:
    """libvirt's own call. Cross-pool calls go one at a time: two in opposite directions hang the daemon."""
    pool, source_pool = t.cast(LibvirtPool, scene.pool), t.cast(LibvirtPool, scene.source_pool)
    if step.replaces:
        raise CloneError(
            "NO_SUPPORT", f"method=libvirt cannot replace volume {facts.name!r}: it would be gone if the clone fails"
        )
    with source_checked(scene) as expect_sound:
        expect_sound()
    one_at_a_time = [] if pool.name == source_pool.name else ["libvirt-clone"]
    waiting = _waiting(scene)
    with locks.Locks([], one_at_a_time, waiting, "waiting for another clone by libvirt"):
        try:
            document, name = _document(facts.name, step), t.cast(str, facts.source.name)
            pool.clone(document, source_pool, name, _flags(step), step.capacity, waiting)
        except CloneError as exc:
            if exc.code == "STORAGE_VOL_EXIST":
                raise FileExistsError from exc
            raise
    return Transfer("libvirt")


def _waiting(scene: Scene) -> Deadline:
    return scene.deadline.sooner(scene.request.lock_timeout, "lock_timeout")


def _flags(step: Create) -> int:
    return _PREALLOC_METADATA if step.preallocation == "metadata" else 0


def _document(name: str, step: Create) -> str:
    features = step.qcow2
    return _xml.volume_xml(
        name=name,
        capacity=step.capacity,
        format=step.format,
        mode=step.owner.mode,
        owner=step.owner.uid,
        group=step.owner.gid,
        compat=features.compat if features else None,
        cluster_size=features.cluster_size if features else None,
        lazy_refcounts=features.lazy_refcounts if features else None,
        extended_l2=features.extended_l2 if features else None,
        nocow=step.nocow,
        backing=(step.backing.path, t.cast(str, step.backing.format)) if step.backing else None,
    )


@contextmanager
def _made(pool: RemotePool, name: str) -> t.Iterator[None]:
    """A volume that this run has just made is deleted again when something fails."""
    try:
        yield
    except BaseException as exc:
        try:
            pool.delete(name, Deadline(30, "30 seconds to delete it"))
        except CloneError as error:
            if isinstance(exc, CloneError):
                raise CloneError(exc.code, f"{exc.msg}; the unfinished volume is still there: {error.msg}") from exc
        raise


def _expect(pool: RemotePool, facts: Facts, step: Create) -> None:
    """What libvirt says that it has made is what was asked of it: some of its calls leave out what they cannot do."""
    what = facts.what
    volume = pool.volume(facts.name)
    made = volume.stated if volume else None
    if made is None:
        raise CloneError("IO_ERROR", f"{what} is not there after it was made")
    asked = (step.format, step.capacity, step.backing.path if step.backing else None)
    found = (made.format or "raw", made.capacity, made.backing_path)
    if step.format == "vpc" and found[0] == "vpc" and (made.capacity or 0) >= step.capacity:
        # Rounded up to whole cylinders.
        return
    if found != asked:
        words = ("format", "capacity", "backing store")
        wrong = next(index for index in range(3) if found[index] != asked[index])
        raise CloneError("IO_ERROR", f"{what} came out with the {words[wrong]} {found[wrong]!r} instead of {asked[wrong]!r}")


# --- from this host -----------------------------------------------------------------------------------------------------


def _upload(scene: Scene, facts: Facts, step: Create, convert: Convert) -> Transfer:
    """The file as it is, or as it was converted here, through a stream that keeps its holes; then grown by libvirt."""
    what = facts.what
    pool, waiting = t.cast(RemotePool, scene.pool), _waiting(scene)
    with guards.Hold(held(scene)) as hold, source_checked(scene) as expect_sound:

        def watch() -> None:
            scene.deadline.check(f"uploading {what}")
            hold.check()

        def finish() -> None:
            watch()
            expect_sound()
            hold.finish()

        with _converted(scene, step, what, convert, watch) if step.route == "convert" else _as_it_is(scene) as fd:
            length = guards.length(fd)
            end = step.capacity if step.format == "raw" else length
            # Of no length, so that it is no volume yet for whoever finds it before the mark is there.
            owner = step.owner
            pool.make(
                _xml.volume_xml(
                    name=facts.name,
                    capacity=0,
                    format="raw",
                    mode=owner.mode,
                    owner=owner.uid,
                    group=owner.gid,
                    nocow=step.nocow,
                )
            )
            with _made(pool, facts.name):
                _send(scene, pool, facts.name, fd, min(length, end), end, watch, finish)
                # libvirt takes it for raw until it looks again.
                pool.refresh(waiting)
                volume = pool.volume(facts.name)
                if volume and volume.stated and (volume.stated.capacity or 0) < step.capacity:
                    pool.grow(facts.name, step.capacity, waiting)
                _expect(pool, facts, step)
    reason = f"pool {facts.pool.name!r} is on another host"
    return Transfer(step.route, reason)


def _send(
    scene: Scene,
    pool: RemotePool,
    name: str,
    fd: int,
    length: int,
    end: int,
    watch: t.Callable[[], None],
    finish: t.Callable[[], None],
) -> None:
    """``length`` bytes of an open file, and zeros up to ``end``: a mark first, the first block last, in one piece."""
    mark = remote.mark()
    head = os.pread(fd, min(len(mark), length), 0).ljust(min(len(mark), end), b"\0")
    if end > len(mark):
        with pool.upload(name) as stream:
            stream.send(mark)
            at = len(mark)
            for begin, data in file_copy.nonzero_data(fd, at, length, watch, rate=scene.rate):
                stream.skip(begin - at)
                stream.send(data)
                at = begin + len(data)
            stream.skip(end - at)
    finish()
    if head:
        with pool.upload(name, len(head)) as stream:
            stream.send(head)


@contextmanager
def _as_it_is(scene: Scene) -> t.Iterator[int]:
    yield scene.layers[0].fd


@contextmanager
def _converted(scene: Scene, step: Create, what: str, convert: Convert, watch: t.Callable[[], None]) -> t.Iterator[int]:
    """The source as the volume shall be, in a file of this host that has no name. It may be large: not in memory."""
    place = scene.request.tmpdir
    with tempfile.TemporaryFile(dir=place) as file:
        try:
            convert(scene, step, file.fileno(), what, watch)
        except CloneError as exc:
            if exc.code == "NO_SPACE":
                raise CloneError("NO_SPACE", f"{exc.msg}; it is converted in {place!r} of this host (TMPDIR) first") from exc
            raise
        yield file.fileno()
