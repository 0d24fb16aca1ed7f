# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Request and facts in, plan or refusal out. Nothing here looks at the world.

This is the outcome table. The check run is the plan, not carried out, so it tells the truth.

Most facts are cheap and always there. Some cost something (is the source in use? is the tail all zeros?) and only some
plans need them; they are None until :class:`Unanswered` asks for them, and then planning starts over.
"""

from __future__ import annotations

import typing as t
from dataclasses import replace

from .._errors import CloneError
from .._images.gate import refusal
from .._images.probe import GROWABLE, SHARING, Image, Qcow2Features, round_capacity
from .._units import format_bytes
from .._volumes import entry
from .model import (
    Backing,
    Create,
    Dependents,
    Facts,
    Flatten,
    Grow,
    Ownership,
    Plan,
    SetPermissions,
    State,
    Step,
    TargetFacts,
    Unanswered,
)
from .ownership import changed_ownership, new_ownership, permissions_stay
from .refusals import (
    refuse_by_libvirt,
    refuse_device,
    refuse_empty,
    refuse_header,
    refuse_image,
    refuse_linked,
    refuse_new_device,
    refuse_options,
    refuse_options_by_libvirt,
    refuse_preallocation,
    refuse_remote,
    refuse_source,
)
from .request import Request, qcow2_features


def _known(facts: Facts, question: str, draft: t.Optional[Create] = None) -> t.Any:
    answer = getattr(facts, question)
    if answer is None:
        raise Unanswered(question, draft)
    return answer


def plan(request: Request, facts: Facts) -> Plan:
    """The steps that make the target what the request states.

    :raises CloneError: the refusal, as the outcome table has it
    :raises Unanswered: a fact is missing
    """
    target = facts.target
    if facts.pool.remote or facts.source.remote:
        refuse_remote(request, facts)
    elif facts.pool.able.devices:
        refuse_device(request, facts)
    if request.linked:
        refuse_linked(request, facts)
    if target.identity is not None and target.identity == facts.source.identity:
        raise CloneError("INVALID_ARG", f"{facts.what} is the source itself ({facts.source.what})")
    if target.identity in facts.source.below:
        raise CloneError("INVALID_ARG", f"{facts.what} is a backing store of {facts.source.what}")
    if target.obstacle:
        raise CloneError("STORAGE_VOL_EXIST", f"{facts.what} cannot be made: its name is taken by {target.obstacle}")
    if target.image and not target.unfinished:
        result = _existing(request, facts, target.image)
    else:
        if target.unfinished:
            # Nobody's data, but somebody may have begun to use the device since.
            _refuse_in_use(facts, "filled")
        result = _absent(request, facts, replaces=False)
    if result.steps and not facts.pool.missing:
        only = result.steps[0] if len(result.steps) == 1 else None
        denied = _known(facts, "denied", only if isinstance(only, Create) else None)
        if denied:
            raise CloneError("OPERATION_DENIED", denied)
    return result


# --- a volume of that name exists ---------------------------------------------------------------------------------------


def _existing(request: Request, facts: Facts, image: Image) -> Plan:
    differences = _differences(request, facts, image)
    if differences and not request.force:
        raise CloneError("DIFFERS", f"{facts.what} exists and differs: {'; '.join(differences)}")
    if differences:
        _refuse_in_use(facts, "replaced")
        return _replacement(request, facts)

    if request.flatten and facts.target.needs_origin and not facts.pool.able.flatten:
        raise CloneError("NO_SUPPORT", f"{facts.what} is a snapshot, which a pool of type {facts.pool.type} cannot flatten")
    devices = facts.pool.able.devices
    if request.flatten and image.backing is not None and not devices:
        return _flattening(request, facts, image)
    before = _state(facts.target, image)
    warnings = []
    steps: t.List[Step] = []
    after = before
    if request.flatten and image.backing is not None and facts.pool.able.flatten:
        _refuse_in_use(facts, "flattened")
        steps.append(Flatten())
        after = replace(after, backing=None)
    wanted = _stated_capacity(request, facts, image.format)
    if wanted is not None and image.capacity < wanted:
        steps.append(_growth(request, facts, image, wanted))
        after = replace(after, capacity=wanted)
    source = facts.source.image
    if request.blank:
        pass
    elif source is None and facts.source.pending:
        if request.compare == "content":
            warnings.append(f"{_unseen(facts)}: whether {facts.what} has its data is not told")
    elif source is None:
        warnings.append(f"{facts.source.gone}; {facts.what} exists and is judged on what the task states")
    elif wanted is None and image.capacity < source.capacity:
        warnings.append(
            f"{facts.what} has {format_bytes(image.capacity)}, less than its source now has"
            f" ({format_bytes(source.capacity)}); state capacity to grow it"
        )

    owner = changed_ownership(request, facts.target)
    if owner is not None:
        if facts.pool.remote:
            raise permissions_stay(request, facts, owner)
        users = _known(facts, "target_users")
        if users:
            warnings.append(f"{facts.what} is open by {users}: its owner, group, mode and label are left alone")
        else:
            _refuse_hard_link(facts)
            steps.append(SetPermissions(owner))
            after = replace(
                after,
                uid=before.uid if owner.uid is None else owner.uid,
                gid=before.gid if owner.gid is None else owner.gid,
                mode=before.mode if owner.mode is None else owner.mode,
                label=before.label if owner.label is None else owner.label,
            )
    return Plan(before, after, tuple(steps), tuple(warnings))


def _flattening(request: Request, facts: Facts, image: Image) -> Plan:
    """The volume is converted as a source is, with all that lies below it, and the result takes its place.

    Not in place, by ``qemu-img rebase -b ""``: that copies what could be shared, has internal snapshots lose what they read
    from below, and leaves an image that is killed meanwhile marked dirty where it has lazy refcounts. Price: the bitmaps.
    Overlays of the volume stay valid, since its path, format and content stay what they are.
    """
    what = facts.what
    if image.encrypted:
        raise CloneError("NO_SUPPORT", f"{what} is encrypted and cannot be flattened without its secret")
    if image.snapshots:
        raise CloneError(
            "OPERATION_INVALID",
            f"{what} cannot be flattened: its internal snapshots ({image.snapshots}) would be lost; delete them first",
        )
    refuse_image(image, what, request.max_capacity)
    wanted = _stated_capacity(request, facts, image.format)
    capacity = round_capacity(image.format, image.capacity)
    if wanted is not None and wanted > image.capacity:
        _growth(request, facts, image, wanted)
        capacity = wanted
    _refuse_target_chain(facts, image)
    _refuse_in_use(facts, "flattened")
    writers = _known(facts, "source_writers")
    if writers:
        raise CloneError("IN_USE", f"{what} cannot be flattened: an image below it is open for writing by {writers}")
    changed = changed_ownership(request, facts.target) or Ownership()
    now = facts.target
    owner = Ownership(
        now.uid if changed.uid is None else changed.uid,
        now.gid if changed.gid is None else changed.gid,
        now.mode if changed.mode is None else changed.mode,
        now.label if changed.label is None else changed.label,
    )
    step = Create(
        "convert",
        image.format,
        capacity,
        owner,
        image.qcow2,
        request.preallocation,
        None,
        replaces=True,
        dropped=_dropped(image),
        unshared=_unshared(request, facts, image, image.format, "convert"),
        flattens=True,
    )
    corrupt = _known(facts, "source_corrupt")
    if corrupt:
        raise CloneError("CORRUPT_IMAGE", corrupt)
    return _creation(facts, step, _drop_warnings(facts, step))


def _drop_warnings(facts: Facts, step: Create) -> t.List[str]:
    if not step.dropped:
        return []
    return [f"{facts.what}: a conversion does not carry over {' and '.join(step.dropped)}"]


def _replacement(request: Request, facts: Facts) -> Plan:
    if facts.pool.remote:
        raise CloneError(
            "NO_SUPPORT",
            f"force=true cannot replace {facts.what} by a connection to another host (uri {request.uri}): libvirt cannot"
            " rename volumes, so it would be gone if the new one fails; delete it first",
        )
    if facts.pool.able.devices and facts.target.image and facts.target.image.encrypted:
        raise CloneError("NO_SUPPORT", f"{facts.what} cannot be replaced: it is encrypted (LUKS); delete it first")
    if facts.target.irreplaceable:
        raise CloneError("NO_SUPPORT", f"{facts.what} cannot be replaced: {facts.target.irreplaceable}; delete it first")
    dependents: Dependents = _known(facts, "target_dependents")
    if dependents.names:
        raise CloneError("OPERATION_INVALID", f"{facts.what} cannot be replaced: {entry.depend(dependents.names)}")
    _refuse_shrinking_device(request, facts)
    result = _absent(request, facts, replaces=True)
    if not dependents.untold:
        return result
    warning = f"whether anything depends on {facts.what} cannot be told of {entry.first(dependents.untold)}"
    return replace(result, warnings=(*result.warnings, warning))


def _differences(request: Request, facts: Facts, image: Image) -> t.List[str]:
    """What only a replacement could mend, as phrases that name both values."""
    if image.unreadable:
        return [image.unreadable]
    found = []
    wanted_format = request.target_format(facts.source.image)
    if wanted_format is not None and image.format != wanted_format:
        found.append(f"its format is {image.format}, asked for is {wanted_format}")
    if request.clone_type == "full" and image.backing is not None:
        found.append(f"it is a linked clone of {image.backing!r}, asked for is clone_type=full")
    if request.linked:
        found += _linked_otherwise(facts, image)
    wanted = _stated_capacity(request, facts, image.format)
    if wanted is not None and image.capacity > wanted and not _rounded_by_geometry(facts, image, wanted):
        found.append(f"its capacity is {format_bytes(image.capacity)}, asked for is {format_bytes(wanted)}")
    if request.compare == "content" and not found:
        if facts.source.image is None and facts.source.pending:
            if not _known(facts, "brought"):
                return found
        elif facts.source.image is None:
            raise CloneError("NO_STORAGE_VOL", f"compare=content: {facts.source.gone}")
        _refuse_target_chain(facts, image)
        if not _known(facts, "content_equal"):
            found.append(f"its data is not that of {facts.source.what}")
    return found


def _linked_otherwise(facts: Facts, image: Image) -> t.List[str]:
    source = facts.source
    asked_for = f"asked for is a linked clone of {source.what}, {source.key!r}"
    if image.backing is None and facts.target.outlives_source and source.image is None and not source.pending:
        return []
    if image.backing is None:
        return [f"it has no backing store, {asked_for}"]
    if not facts.target.on_source:
        return [f"it is a linked clone of {image.backing!r}, {asked_for}"]
    recorded = image.backing_format or "raw"
    if source.image is not None and recorded != source.image.format:
        return [f"it reads its backing store {image.backing!r} as {recorded}, {source.what} is {source.image.format}"]
    return []


def _stated_capacity(request: Request, facts: Facts, image_format: str) -> t.Optional[int]:
    return None if request.capacity is None else _rounded(facts, image_format, request.capacity)


def _rounded(facts: Facts, image_format: str, capacity: int) -> int:
    """The smallest capacity, not below this one, that format and pool can represent."""
    unit = max(facts.pool.granularity, facts.target.granularity)
    return -(-round_capacity(image_format, capacity) // unit) * unit


def _rounded_by_geometry(facts: Facts, image: Image, wanted: int) -> bool:
    """Whether it is no larger than a whole number of cylinders makes it.

    A vpc that others made has such, of at most 16 * 255 sectors (VHD specification), and so has a partition of a dos table.
    """
    excess = image.capacity - wanted
    return excess <= facts.pool.excess or (image.format == "vpc" and excess < 16 * 255 * 512)


def _growth(request: Request, facts: Facts, image: Image, wanted: int) -> Grow:
    sizes = f"{format_bytes(image.capacity)}, asked for is {format_bytes(wanted)}"
    if not request.resize:
        raise CloneError("DIFFERS", f"{facts.what} has {sizes}, and resize is false")
    if image.format not in GROWABLE:
        raise CloneError("NO_SUPPORT", f"{facts.what} has {sizes}; a {image.format} volume cannot be grown")
    if not facts.pool.able.grow:
        raise CloneError("NO_SUPPORT", f"{facts.what} has {sizes}; a volume of a {facts.pool.type} pool cannot be grown")
    if facts.pool.able.devices:
        why = _known(facts, "not_growable")
        if why:
            raise CloneError("OPERATION_INVALID", f"{facts.what} has {sizes}, and cannot be grown: {why}")
        missing = wanted - image.capacity - t.cast(int, _known(facts, "room"))
        if missing > 0:
            raise CloneError(
                "NO_SPACE", f"{facts.what} has {sizes}; pool {facts.pool.name!r} lacks {format_bytes(missing)} for that"
            )
    refuse_preallocation(request.preallocation, image.format)
    if facts.pool.remote and request.preallocation != "off":
        raise CloneError(
            "NO_SUPPORT", f"preallocation={request.preallocation}: {facts.what} has {sizes}; libvirt grows it without"
        )
    _refuse_hard_link(facts)
    _refuse_target_chain(facts, image)
    _refuse_in_use(facts, "grown")
    return Grow(image.format, wanted, request.preallocation)


def _refuse_target_chain(facts: Facts, image: Image) -> None:
    """A target's guest, or whoever else wrote to it, must not have us open files outside the pools."""
    if image.data_file is not None:
        raise refusal("data_file", f"{facts.what} keeps its data in another file, which is not followed")
    if image.backing is not None:
        _known(facts, "target_chain")


def _refuse_hard_link(facts: Facts) -> None:
    """What is changed in place changes under all its names."""
    if facts.target.linked_elsewhere:
        raise refusal(
            "hard_link", f"{facts.what} has a further name outside the pools of this task, and would change there too"
        )


def _refuse_in_use(facts: Facts, done: str) -> None:
    users = _known(facts, "target_users")
    if users:
        raise CloneError("IN_USE", f"{facts.what} cannot be {done}: it is open by {users}")


# --- there is none, or it is to be replaced -----------------------------------------------------------------------------


def _absent(request: Request, facts: Facts, replaces: bool) -> Plan:
    if facts.pool.able.devices and not facts.target.image:
        refuse_new_device(facts)
    if request.blank:
        return _blank(request, facts, replaces)
    source = facts.source.image
    if source is None and facts.source.pending and not facts.pool.missing:
        # All that is wrong whatever the source holds, before somebody waits for it.
        predicted = _predicted(request, facts, replaces)
        denied = _known(facts, "denied", t.cast(Create, predicted.steps[0]))
        if denied:
            raise CloneError("OPERATION_DENIED", denied)
        if not _known(facts, "brought"):
            return predicted
    if facts.pool.missing or source is None:
        if not facts.check_mode or replaces:
            raise CloneError("NO_STORAGE_VOL", facts.source.gone)
        return _predicted(request, facts, replaces)
    writers = _known(facts, "source_writers")
    if writers and request.source_in_use == "fail":
        raise CloneError("IN_USE", f"{facts.source.what} is open for writing by {writers}")
    if not writers:
        # The image of a running domain may be marked dirty; once its writers are gone, all is judged again.
        refuse_source(request, facts, source)

    image_format = request.target_format(source) or source.format
    refuse_options(request, image_format)
    capacity = _stated_capacity(request, facts, image_format)
    if capacity is None:
        capacity = _rounded(facts, image_format, source.capacity)
    elif capacity < source.capacity:
        _refuse_shrinking(request, facts, source, capacity)
    if facts.target.image and facts.pool.able.staging == "mark":
        capacity = _refilled(facts, facts.target.image, capacity)

    refuse_empty(image_format, capacity)
    features = qcow2_features(request.qcow2, source.qcow2) if image_format == "qcow2" else None
    route = _route(request, facts, source, image_format, capacity, features)
    step = Create(
        route,
        image_format,
        capacity,
        new_ownership(request, facts),
        features,
        request.preallocation,
        request.nocow,
        replaces,
        _dropped(source) if route in ("convert", "libvirt", "device") else (),
        None if route in ("link", "libvirt") else _unshared(request, facts, source, image_format, route),
        _backing(request, facts),
    )
    if request.outside.checksum is not None and not writers:
        _known(facts, "checked")
    corrupt = "" if writers else _known(facts, "source_corrupt")
    if corrupt:
        raise CloneError("CORRUPT_IMAGE", corrupt)
    return _creation(facts, step, _drop_warnings(facts, step))


def _refuse_shrinking_device(request: Request, facts: Facts) -> None:
    """A device that is filled again keeps its size, and would be larger than stated on each run."""
    image, wanted = facts.target.image, _stated_capacity(request, facts, "raw")
    if image is None or wanted is None or _rounded_by_geometry(facts, image, wanted):
        return
    if image.capacity > wanted and facts.pool.able.staging == "mark":
        sizes = f"{format_bytes(image.capacity)}, asked for is {format_bytes(wanted)}"
        raise CloneError("NO_SUPPORT", f"{facts.what} has {sizes}; a volume of a {facts.pool.type} pool keeps its size")


def _refilled(facts: Facts, image: Image, needed: int) -> int:
    """A device that is filled again keeps its size."""
    if image.capacity < needed:
        raise CloneError(
            "NO_SUPPORT",
            f"{facts.what} has {format_bytes(image.capacity)}, needed are {format_bytes(needed)}; it cannot be grown",
        )
    return image.capacity


def _blank(request: Request, facts: Facts, replaces: bool) -> Plan:
    image_format = request.format or "raw"
    refuse_options(request, image_format)
    if request.capacity is None:
        raise CloneError("INVALID_ARG", f"capacity: {facts.what} does not exist, and nothing states how large it shall be")
    capacity = _rounded(facts, image_format, request.capacity)
    if facts.target.image and facts.pool.able.staging == "mark":
        capacity = _refilled(facts, facts.target.image, capacity)
    refuse_empty(image_format, capacity)
    features = qcow2_features(request.qcow2, None) if image_format == "qcow2" else None
    if facts.pool.remote:
        refuse_options_by_libvirt(features)
    owner = new_ownership(request, facts)
    route = "device" if facts.pool.able.devices else "blank"
    step = Create(route, image_format, capacity, owner, features, request.preallocation, request.nocow, replaces)
    if facts.pool.missing:
        return Plan(None, _state_after(step), (step,), (_presumed(facts.pool.missing),))
    return _creation(facts, step, [])


def _creation(facts: Facts, step: Create, warnings: t.Sequence[str]) -> Plan:
    missing = _known(facts, "space_missing", step)
    if missing:
        raise CloneError(
            "NO_SPACE", f"{facts.what} needs {format_bytes(missing)} more than is free in pool {facts.pool.name!r}"
        )
    before = _state(facts.target, facts.target.image) if facts.target.image else None
    return Plan(before, _state_after(step), (step,), tuple(warnings))


def _state_after(step: Create) -> State:
    owner = step.owner
    return State(step.format, step.capacity, owner.uid, owner.gid, owner.mode, owner.label, step.backing)


def _backing(request: Request, facts: Facts) -> t.Optional[Backing]:
    """What a new volume has below it."""
    source = facts.source
    if not request.linked:
        return None
    if source.image is None:
        return Backing(source.key, request.source_format)
    return Backing(source.key, source.image.format, len(source.below) + 1)


def _predicted(request: Request, facts: Facts, replaces: bool) -> Plan:
    """A check run that does not see the source, or in which an earlier task would have made it or the pool."""
    owner = new_ownership(request, facts)
    image_format = request.target_format(facts.source.image)
    capacity = request.capacity
    if capacity is None and facts.source.image is not None:
        capacity = facts.source.image.capacity
    if image_format is not None:
        refuse_options(request, image_format)
        capacity = None if capacity is None else _rounded(facts, image_format, capacity)
    step = Create("copy", image_format or "raw", capacity or 0, owner, replaces=replaces)
    after = State(image_format, capacity, owner.uid, owner.gid, owner.mode, owner.label, _backing(request, facts))
    before = _state(facts.target, facts.target.image) if facts.target.image else None
    warnings = []
    if facts.pool.missing or not facts.source.pending:
        warnings.append(_presumed(facts.pool.missing or facts.source.gone))
    elif image_format is None or capacity is None:
        warnings.append(f"{_unseen(facts)}: what of its format and capacity is not stated is not told")
    return Plan(before, after, (step,), tuple(warnings))


def _unseen(facts: Facts) -> str:
    return f"{facts.source.what} is not {facts.source.pending} in a check run"


def _presumed(why: str) -> str:
    return f"{why}; the check run takes it that an earlier task makes it"


def _refuse_shrinking(request: Request, facts: Facts, source: Image, capacity: int) -> None:
    sizes = f"capacity: {format_bytes(capacity)} is less than {facts.source.what} has, {format_bytes(source.capacity)}"
    if request.linked:
        raise CloneError("INVALID_ARG", f"{sizes}, and a linked clone is no smaller than its source")
    if not request.allow_shrink:
        raise CloneError("INVALID_ARG", f"{sizes}; allow_shrink permits it where nothing but zeros would be cut off")
    if source.format != "raw":
        raise CloneError("NO_SUPPORT", f"{sizes}, and only raw sources can be shrunk, not {source.format}")
    beyond = _known(facts, "data_beyond")
    if beyond >= 0:
        raise CloneError("INVALID_ARG", f"{sizes}, and the data at byte {beyond} would be cut off")


def _route(
    request: Request, facts: Facts, source: Image, image_format: str, capacity: int, features: t.Optional[Qcow2Features]
) -> str:
    source_remote = facts.source.remote
    if facts.pool.remote and source.encrypted:
        raise CloneError(
            "NO_SUPPORT",
            f"{facts.source.what} is encrypted, which libvirt (uri {request.uri}) has no secret for; run the task on that host",
        )
    if request.linked:
        if facts.source.fixed and capacity > source.capacity:
            raise CloneError(
                "NO_SUPPORT",
                f"capacity: {format_bytes(capacity)} is more than {facts.source.what} has, {format_bytes(source.capacity)}, and"
                " a snapshot of a volume that is not thin has the capacity of that",
            )
        if features is not None:
            refuse_header(facts, features)
        if source_remote:
            refuse_options_by_libvirt(features)
        return "link"
    if source_remote:
        refuse_by_libvirt(request, source, image_format, capacity, features)
        return "libvirt"
    if request.method == "libvirt":
        if facts.pool.type == "directory" or facts.source.pool is None or facts.source.pool.startswith("/"):
            raise CloneError("INVALID_ARG", "method=libvirt needs a libvirt pool for both the source and the target")
        refuse_by_libvirt(request, source, image_format, capacity, features)
        return "libvirt"
    if facts.pool.able.devices and (source.format == "raw" or not source.encrypted):
        return "device"
    whole_file = (
        image_format == source.format
        and not facts.source.network
        and source.backing is None
        and features == source.qcow2
        and (capacity <= source.capacity or image_format in GROWABLE)
        and (image_format == "raw" or request.preallocation == "off")
    )
    if whole_file:
        if facts.pool.remote and image_format == "raw" and source.magic is not None:
            raise CloneError(
                "NO_SUPPORT",
                f"source_format=raw: {facts.source.what} begins as {source.magic}, and libvirt (uri {request.uri}) would take"
                f" {facts.what} for that",
            )
        return "copy"
    if source.encrypted:
        raise CloneError("NO_SUPPORT", f"{facts.source.what} is encrypted: it is cloned in its own format or not at all")
    return "convert"


def _unshared(request: Request, facts: Facts, source: Image, image_format: str, route: str) -> t.Optional[str]:
    """Why the new volume cannot, or shall not, share the source's blocks; None where it is worth a try."""
    foreign = next((name for name in (source.format, image_format) if name not in SHARING), None)
    if request.method == "copy":
        return "method is copy"
    if request.preallocation in ("falloc", "full"):
        reason: str = f"preallocation={request.preallocation} asks for blocks of its own"
    elif route == "convert" and foreign:
        reason = f"a conversion of the format {foreign} writes new blocks"
    else:
        reason = _known(facts, "unshareable")
    if reason and request.method == "reflink":
        raise CloneError("NO_SUPPORT", f"method=reflink is not possible for {facts.what}: {reason}")
    return reason or None


def _dropped(source: Image) -> t.Tuple[str, ...]:
    return tuple(name for name, count in (("snapshots", source.snapshots), ("bitmaps", source.bitmaps)) if count)


def _state(target: TargetFacts, image: t.Optional[Image]) -> State:
    image_format, capacity = (image.format, image.capacity) if image else (None, None)
    backing = None
    if image is not None and image.backing is not None:
        backing = Backing(image.backing, image.backing_format or "raw", target.depth)
    return State(image_format, capacity, target.uid, target.gid, target.mode, target.label, backing)
