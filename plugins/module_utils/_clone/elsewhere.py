# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Volumes of pools on another host: what libvirt says of them, and the first bytes of each as libvirt reads them out."""

from __future__ import annotations

import os
import typing as t
from dataclasses import replace

from .. import _xml
from .._deadline import Deadline
from .._errors import CloneError
from .._images import foreign, probe
from .._images.gate import refusal
from .._images.probe import Image
from .._pools import remote
from .._pools.remote import RemotePool, RemoteVolume
from .files import MAX_DEPTH
from .model import SourceFacts, TargetFacts
from .task import Task


def look_at_source(task: Task, facts: SourceFacts, pool: RemotePool) -> SourceFacts:
    """The source: libvirt's word, and the header as libvirt reads it out."""
    volume = pool.volume(t.cast(str, facts.name))
    if volume is None:
        return replace(facts, gone=f"{facts.what} does not exist")
    facts = replace(facts, path=volume.path, key=volume.key, identity=(pool.name, volume.name))
    if volume.stated is None:
        raise t.cast(CloneError, volume.error)
    if volume.type not in ("file", "block"):
        raise CloneError("INVALID_ARG", f"{facts.what} is of type {volume.type}, not a file or block device")
    head = pool.head(volume.name, _patience(task))
    if remote.is_marked(head):
        raise CloneError("CORRUPT_IMAGE", f"{facts.what} is not finished: the run that uploads it was killed, or goes on")
    stated = volume.stated
    image = _image(volume, stated, head, task.request.source_format, facts.what)
    owner = (stated.owner, stated.group, stated.mode)
    return replace(
        facts,
        image=image,
        block=volume.type == "block",
        below=tuple(all_below(task, volume, facts.what)),
        owner=t.cast(t.Tuple[int, int, int], owner) if volume.type == "file" and None not in owner else None,
    )


def look_at_target(task: Task, pool: RemotePool, volume: RemoteVolume, source: SourceFacts) -> TargetFacts:
    """The target: of its header no more than the mark of an unfinished upload counts, for the rest libvirt's word."""
    name, stated, what = volume.name, volume.stated, f"volume {volume.name!r} of pool {pool.name!r}"
    facts = TargetFacts(identity=(pool.name, name), obstacle="a directory" if volume.type == "dir" else None)
    if facts.obstacle or facts.identity == source.identity:
        return facts
    if stated is None:
        error = t.cast(CloneError, volume.error)
        return replace(facts, image=Image("raw", 0, unreadable=error.msg))
    head = pool.head(name, _patience(task))
    unfinished = remote.is_marked(head)
    empty = not (task.request.blank or stated.capacity) and (source.image is None or source.image.capacity > 0)
    if empty or (unfinished and not head.startswith(remote.mark())):
        raise CloneError(
            "IN_USE",
            f"{what} is {'empty' if empty else 'not finished'}: a run on another host is uploading it, or was killed; if"
            " that run is over, delete the volume (storage_volume with state=absent)",
        )
    image = Image(stated.format or "raw", stated.capacity or 0, stated.backing_path, stated.backing_format)
    try:
        depth: t.Optional[int] = len(all_below(task, volume, what))
    except CloneError as exc:
        if exc.code != "UNSAFE_IMAGE":
            raise
        depth = None
    return replace(
        facts,
        image=image,
        unfinished=unfinished,
        uid=-1 if stated.owner is None else stated.owner,
        gid=-1 if stated.group is None else stated.group,
        mode=stated.mode or 0,
        on_source=source.remote and stated.backing_path == source.key,
        depth=depth,
    )


def all_below(task: Task, volume: RemoteVolume, what: str) -> t.List[t.Tuple[str, str]]:
    """Pool and name of all that lies below a volume.

    :raises CloneError: ``UNSAFE_IMAGE`` for what is no volume of the pools that the task names
    """
    found: t.List[t.Tuple[str, str]] = []
    pools = [pool for pool in task.pools if isinstance(pool, RemotePool)]
    while volume.stated is not None and volume.stated.backing_path is not None:
        path = volume.stated.backing_path
        directory, name = os.path.split(path)
        pool = next((pool for pool in pools if os.path.normpath(pool.path) == directory), None)
        above, below = volume, pool.volume(name) if pool else None
        if pool is None or below is None:
            raise refusal(
                "backing_file",
                f"{what} has {path!r} below it, which is no volume of the pools of this task; if it is meant, name its pool"
                " as pool or source_pool",
            )
        if (pool.name, name) in found:
            raise refusal("chain_loop", f"{what} has {path!r} below it twice")
        if len(found) >= MAX_DEPTH:
            raise refusal("chain_depth", f"{what} has more than {MAX_DEPTH} images below it")
        if below.stated is None or (above.stated and below.stated.format != (above.stated.backing_format or "raw")):
            raise refusal("backing_format", f"{what} has {path!r} below it, recorded with another format than libvirt finds")
        found.append((pool.name, name))
        volume = below
    return found


def _patience(task: Task) -> t.Optional[Deadline]:
    """How long a volume that is still being made is waited for."""
    return None if task.check_mode else task.deadline.sooner(task.request.lock_timeout, "lock_timeout")


def _image(volume: RemoteVolume, stated: _xml.VolumeXML, head: bytes, pinned: t.Optional[str], what: str) -> Image:
    """What the header says, which has to be what libvirt says: by that its clone call reads the volume.

    :raises CloneError: ``NO_SUPPORT`` where the task states another format, ``UNSAFE_IMAGE`` where the two disagree
    """
    told = stated.format or "raw"
    if pinned not in (None, told):
        raise CloneError(
            "NO_SUPPORT", f"source_format: {what} is {told} for libvirt, which cannot be told to read it as {pinned}"
        )
    if volume.type == "block":
        return Image("raw", stated.capacity or 0)
    fd = os.memfd_create("head", os.MFD_CLOEXEC)
    try:
        os.write(fd, head)
        size = volume.physical or len(head)
        found = [name for name in probe.detect(fd, len(head)) if name != "vpc-footer"]
        if told != "raw" or not pinned:
            read_as = probe.choose_format(found, None, what)
            if head and read_as != told:
                raise refusal("two_formats", f"{what} is {told} for libvirt, but begins as {read_as}; refresh its pool")
        if told == "qcow2" and head:
            image = probe.read_qcow2(fd, size, what)
            if (image.backing is None) != (stated.backing_path is None):
                raise refusal("backing_file", f"{what} has another backing store than libvirt knows of; refresh its pool")
            return replace(image, backing=stated.backing_path, backing_format=stated.backing_format)
        if told == "raw":
            return replace(probe.read_raw(size, found, head), capacity=stated.capacity or 0)
        os.ftruncate(fd, size)
        try:
            foreign.read(fd, size, told, what)
        except CloneError as exc:
            # Only the beginning is here, so what it refers to within itself may be missing.
            if exc.code == "UNSAFE_IMAGE":
                raise
    finally:
        os.close(fd)
    return Image(told, stated.capacity or 0, stated.backing_path, stated.backing_format)
