# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What is refused of a task whatever the volume's data is: options that contradict each other, the source, or the pool.

None of it asks for a costly fact, so each may be told before anybody waits for anything.
"""

from __future__ import annotations

import os
import typing as t

from .._errors import CloneError
from .._images.gate import refusal
from .._images.probe import EMPTY_UNREADABLE, GROWABLE, Image, Qcow2Features
from .._pools import capabilities
from .._units import format_bytes
from .model import Facts
from .request import Request


def refuse_image(image: Image, what: str, max_capacity: int) -> None:
    """Refuse what a header says of an image that is to be read, be it the source or one below it."""
    if image.unclean:
        raise refusal(image.unclean, f"{what} is marked {image.unclean}: run qemu-img check on it first")
    if image.data_file is not None:
        raise refusal("data_file", f"{what} keeps its data in another file, which is not followed")
    if image.capacity > max_capacity:
        raise refusal(
            "over_limit",
            f"{what} claims {format_bytes(image.capacity)}, more than max_capacity ({format_bytes(max_capacity)})",
        )


def refuse_source(request: Request, facts: Facts, source: Image) -> None:
    what = facts.source.what
    refuse_image(source, what, request.max_capacity)
    if request.linked and source.encrypted:
        raise CloneError("NO_SUPPORT", f"{what} is encrypted: a clone of it cannot be linked, but clone_type=full is possible")
    if request.encrypted and not source.encrypted:
        raise CloneError("CONFIG_UNSUPPORTED", f"xml: <encryption> is not possible, {what} is not encrypted")


def refuse_linked(request: Request, facts: Facts) -> None:
    """What a linked clone can never be, whether or not it exists already."""
    source = facts.source
    if source.unlinkable:
        raise CloneError(
            "NO_SUPPORT",
            f"clone_type=linked is not possible for {facts.what}, which is of type {facts.pool.type}, and {source.what}:"
            f" {source.unlinkable}; clone_type=full is",
        )
    if request.format not in (None, "qcow2") and not facts.pool.able.devices:
        raise CloneError("CONFIG_UNSUPPORTED", f"format: {facts.what} cannot be {request.format}: a linked clone is qcow2")
    if request.preallocation != "off":
        # As libvirt says in its storage_util.c: "metadata preallocation conflicts with backing store".
        raise CloneError(
            "CONFIG_UNSUPPORTED",
            f"preallocation={request.preallocation} is not possible for {facts.what}: it conflicts with a backing store",
        )
    if request.method in ("reflink", "copy"):
        raise CloneError("INVALID_ARG", f"method={request.method} has no meaning for clone_type=linked, which copies no data")
    if request.method == "libvirt":
        raise CloneError("NO_SUPPORT", "method=libvirt cannot make a linked clone")
    if source.outside:
        raise refusal(
            "backing_file",
            f"{source.what} lies outside the pools of this task, where no backing store of a linked clone may be;"
            f" name {source.outside!r} as source_pool",
        )
    image_format = source.image.format if source.image else None
    if not facts.backing_is_source:
        raise CloneError(
            "INVALID_ARG", f"xml: the <backingStore> is {request.backing_path!r}, but the source is {source.key!r}"
        )
    if request.backing_format and image_format and request.backing_format != image_format:
        raise CloneError(
            "INVALID_ARG", f"xml: the format of <backingStore> is {request.backing_format}, but {source.what} is {image_format}"
        )


def refuse_device(request: Request, facts: Facts) -> None:
    """What a volume that is a device can never be, or have, whether or not it exists already."""
    what, able = f"{facts.what}, which is of type {facts.pool.type},", facts.pool.able
    if request.format not in (None, *able.formats):
        raise CloneError("NO_SUPPORT", f"format: {request.format} is not possible for {what} which holds only raw")
    stated = {
        "owner": request.owner,
        "group": request.group,
        "mode": request.mode,
        "seuser, serole, setype, selevel": request.label or None,
        "qcow2": request.qcow2 or None,
        "qcow2.nocow": request.nocow,
    }
    for parameter, value in stated.items():
        if value is not None:
            raise CloneError("NO_SUPPORT", f"{parameter}: has no meaning for {what} a device")
    if request.preallocation != "off":
        raise CloneError("CONFIG_UNSUPPORTED", f"preallocation={request.preallocation} is not possible for {what} a device")
    if request.linked and not able.linked:
        raise CloneError("NO_SUPPORT", f"clone_type=linked is not possible for {what} where there are only full clones")
    if not able.create and not request.blank and request.compare != "content":
        raise CloneError("INVALID_ARG", f"compare: state content for {what} whose volumes exist before anything is cloned")


def refuse_new_device(facts: Facts) -> None:
    pool = facts.pool
    if not pool.able.create:
        raise CloneError("NO_SUPPORT", f"{facts.what} does not exist, and a pool of type {pool.type} cannot make one")
    if pool.unnameable:
        raise CloneError("INVALID_ARG", f"name: {facts.what} cannot be made: {pool.unnameable}")
    if pool.next_name not in (None, facts.name):
        raise CloneError("INVALID_ARG", f"name: {facts.what} cannot be made: its next volume is {pool.next_name!r}")


def refuse_remote(request: Request, facts: Facts) -> None:
    """What libvirt's calls cannot do by a connection to another host, whether or not the volume exists already."""
    source, way = facts.source, f"by a connection to another host (uri {request.uri}); run the task on that host"
    if not facts.pool.remote:
        raise CloneError("NO_SUPPORT", f"pool: {source.what} cannot be cloned into {facts.pool.name!r} of this host {way}")
    if not (facts.pool.missing or capabilities.of(facts.pool.type, remote=True).clone):
        raise CloneError(
            "NO_SUPPORT", f"pool: {facts.what}, which is of type {facts.pool.type}, can be neither made nor changed {way}"
        )
    wanted = request.target_format(source.image)
    impossible = {
        f"format={wanted}": wanted not in (None, *capabilities.of("dir", remote=True).formats),
        f"method={request.method}": request.method in ("reflink", "copy"),
        "compare=content": request.compare == "content",
        f"preallocation={request.preallocation}": request.preallocation in ("falloc", "full"),
        "verify=true": request.verify,
        "flatten=true": request.flatten,
        **{f"se{part}={value}": True for part, value in request.label.items()},
        "clone_type=linked with a source of this host": request.linked and not source.remote,
        "bwlimit": request.bwlimit is not None and source.remote,
        "source_in_use=wait": request.source_in_use == "wait" and source.remote,
        "allow_shrink=true": request.allow_shrink and source.remote,
    }
    for what, stated in impossible.items():
        if stated:
            raise CloneError("NO_SUPPORT", f"{what} is not possible for {facts.what} {way}")


def refuse_options(request: Request, image_format: str) -> None:
    if request.qcow2 and image_format != "qcow2":
        raise CloneError("INVALID_ARG", f"qcow2: {sorted(request.qcow2)} has no meaning for a volume of format {image_format}")
    refuse_preallocation(request.preallocation, image_format)


def refuse_preallocation(mode: str, image_format: str) -> None:
    if mode == "off" or image_format == "qcow2" or (image_format == "raw" and mode != "metadata"):
        return
    raise CloneError("CONFIG_UNSUPPORTED", f"preallocation={mode} is not possible for a volume of format {image_format}")


def refuse_empty(image_format: str, capacity: int) -> None:
    if capacity == 0 and image_format in EMPTY_UNREADABLE:
        raise CloneError("CONFIG_UNSUPPORTED", f"capacity: a {image_format} volume of 0 bytes could not be opened by anybody")


def refuse_by_libvirt(
    request: Request, source: Image, image_format: str, capacity: int, features: t.Optional[Qcow2Features]
) -> None:
    """What libvirt's own clone call cannot be told, or does not do."""
    impossible = {
        f"preallocation={request.preallocation}": request.preallocation not in ("off", "metadata"),
        "a smaller capacity": capacity < source.capacity,
        f"a larger capacity for the format {image_format}": capacity > source.capacity and image_format not in GROWABLE,
        "a SELinux context": bool(request.label),
        # libvirt probes the source again, and follows whatever names it finds then.
        f"source_format=raw for what begins as {source.magic}": source.magic is not None,
        "bwlimit": request.bwlimit is not None,
        "verify": request.verify,
    }
    for what, wanted in impossible.items():
        if wanted:
            raise CloneError("NO_SUPPORT", f"libvirt's own call (method=libvirt) cannot do {what}")
    refuse_options_by_libvirt(features)


def refuse_options_by_libvirt(features: t.Optional[Qcow2Features]) -> None:
    """Options of qcow2 that libvirt's XML has no element for."""
    for option, default in (("refcount_bits", 16), ("compression_type", "zlib")):
        value = default if features is None else getattr(features, option)
        if value != default:
            raise CloneError(
                "NO_SUPPORT", f"qcow2.{option}: {value} cannot be told to libvirt (method=libvirt), which knows only {default}"
            )


# The longest name of a backing store that qcow2 takes, and room for the rest of its header (docs/interop/qcow2.txt of QEMU).
_LONGEST_BACKING, _HEADER = 1023, 512


def refuse_header(facts: Facts, features: Qcow2Features) -> None:
    """The path of the backing store stands in the first cluster, behind the header."""
    path, length = facts.source.key, len(os.fsencode(facts.source.key))
    if length > _LONGEST_BACKING:
        raise CloneError(
            "CONFIG_UNSUPPORTED", f"{facts.what} cannot record a backing store whose path has {length} bytes, {path!r}"
        )
    if length + _HEADER > features.cluster_size:
        raise CloneError(
            "CONFIG_UNSUPPORTED",
            f"qcow2.cluster_size: {features.cluster_size} bytes leave no room for the path of the backing store of"
            f" {facts.what}, {path!r}",
        )
