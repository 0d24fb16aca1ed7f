# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Request and facts in, plan or refusal out. Nothing here looks at the world.

This is the outcome table. The check run is the plan, not carried out, so it tells the truth.

Most facts are cheap and always there. Some cost something (is the source in use? is the tail all zeros?) and only some
plans need them; they are None until :class:`Unanswered` asks for them, and then planning starts over.
"""

from __future__ import annotations

import os
import typing as t
from dataclasses import dataclass, replace

from .._errors import CloneError
from .._images.gate import refusal
from .._images.probe import EMPTY_UNREADABLE, GROWABLE, SHARING, Image, Qcow2Features, round_capacity
from .._pools import capabilities
from .._units import format_bytes
from .._volumes import entry
from .request import Request, qcow2_features

Identity = t.Tuple[t.Union[int, str], ...]


@dataclass(frozen=True)
class Ownership:
    """Owner, group, mode and whole SELinux context; None leaves what is there."""

    uid: t.Optional[int] = None
    gid: t.Optional[int] = None
    mode: t.Optional[int] = None
    label: t.Optional[str] = None


@dataclass(frozen=True)
class PoolFacts:
    """``missing`` says why a pool that is needed is not usable yet; only a check run plans on."""

    name: str
    type: str
    path: t.Optional[str]
    missing: t.Optional[str] = None
    #: the unit in bytes in which it gives space to a volume
    granularity: int = 1
    #: the only name that the next volume can have, where the pool decides that
    next_name: t.Optional[str] = None
    #: whether it is on another host, where only libvirt's own calls reach
    remote: bool = False

    @property
    def able(self) -> capabilities.Capabilities:
        return capabilities.of(self.type)


@dataclass(frozen=True)
class SourceFacts:
    """``what`` names it in messages. ``image`` is None when it is gone, then ``gone`` says so in a sentence."""

    what: str
    path: str
    pool: t.Optional[str] = None
    name: t.Optional[str] = None
    image: t.Optional[Image] = None
    gone: str = ""
    #: device and inode of the file, the device number of a block device, or what else is the same only for itself
    identity: t.Optional[Identity] = None
    block: bool = False
    #: identities of the images below the topmost
    below: t.Tuple[Identity, ...] = ()
    #: uid, gid and mode, known only for a file volume of a pool: a clone takes them over
    owner: t.Optional[t.Tuple[int, int, int]] = None
    #: libvirt's key of the file, its path in the pool that it lies in: what a linked clone records
    key: str = ""
    #: the directory that it lies in, when that is none of the pools that the task names
    outside: str = ""
    #: whether only qemu-img reaches it, by network
    network: bool = False
    #: why there can be no linked clone of it in the target's pool
    unlinkable: str = ""
    #: whether a linked clone of it has its capacity, neither less nor more
    fixed: bool = False
    #: whether it is a volume of a pool on another host
    remote: bool = False
    #: what has to be done before it can be looked at, as a participle (``fetched``); empty where it lies open
    pending: str = ""
    #: whether the task states a checksum that it has to have
    claimed: bool = False
    #: whether a cache had it, ``hit`` or ``miss``; None where nothing was looked for in one
    cache: t.Optional[str] = None


@dataclass(frozen=True)
class Backing:
    """A backing store as an image records it, and how many images lie below that image; None for what is not known."""

    path: str
    format: t.Optional[str]
    depth: t.Optional[int] = None


@dataclass(frozen=True)
class TargetFacts:
    """A volume that exists under the target's name; ``image`` is None when there is none. Sizes in bytes."""

    image: t.Optional[Image] = None
    identity: t.Optional[Identity] = None
    #: what stands in the way under that name, when it is no regular file
    obstacle: t.Optional[str] = None
    #: None for a device: whose node that is, udev decides
    uid: t.Optional[int] = None
    gid: t.Optional[int] = None
    mode: t.Optional[int] = None
    label: t.Optional[str] = None
    #: whether the backing store that the image records is the source
    on_source: bool = False
    #: number of images below it; None where the chain cannot be followed
    depth: t.Optional[int] = None
    #: whether it carries the mark of a volume that is not whole: nobody's data
    unfinished: bool = False
    #: whether it is lost without what it is a snapshot of
    needs_origin: bool = False
    #: whether the file has a further name, which is in none of the pools
    linked_elsewhere: bool = False


@dataclass(frozen=True)
class Dependents:
    """Volumes that have another below them or their data in it, and what may have but could not be read."""

    names: t.Tuple[str, ...] = ()
    untold: t.Tuple[str, ...] = ()


@dataclass(frozen=True)
class Facts:
    pool: PoolFacts
    source: SourceFacts
    target: TargetFacts
    #: name of the volume: stated, or made up from the source
    name: str
    check_mode: bool = False
    uid: int = 0
    gid: int = 0
    groups: t.Tuple[int, ...] = ()
    #: SELinux context that the policy has for the target's path; None without SELinux
    default_label: t.Optional[str] = None
    #: whether the backing store that the XML states is the source
    backing_is_source: bool = True
    # Asked for when needed:
    #: whether what is pending of the source was done, and the facts have it; a check run leaves it
    brought: t.Optional[bool] = None
    #: that the source has the checksum that the task states
    checked: t.Optional[bool] = None
    #: who has the source open for writing; empty for nobody
    source_writers: t.Optional[str] = None
    #: why ``qemu-img check`` finds a source unsound; empty when it is sound, or when that is looked at beside the work
    source_corrupt: t.Optional[str] = None
    #: that what lies below the target was opened and is where it may be
    target_chain: t.Optional[bool] = None
    #: who else has the target open; empty for nobody
    target_users: t.Optional[str] = None
    #: what loses the data that it relies on when the target is replaced
    target_dependents: t.Optional[Dependents] = None
    #: offset of the first data that shrinking would cut off, -1 for none
    data_beyond: t.Optional[int] = None
    content_equal: t.Optional[bool] = None
    #: bytes that the pool lacks, 0 when it has enough or when blocks may be shared
    space_missing: t.Optional[int] = None
    #: why the target cannot share the source's blocks; empty when it may
    unshareable: t.Optional[str] = None
    #: why the pool does not grow the target, though it grows others; empty when it does
    not_growable: t.Optional[str] = None
    #: bytes that the pool has for the target to grow by
    room: t.Optional[int] = None
    #: why this user may not change the pool; empty when he may
    denied: t.Optional[str] = None


@dataclass(frozen=True)
class Create:
    """Make a new volume and publish it, in place of an old one when ``replaces``.

    ``route``: ``copy`` copies the file as it is and grows it, ``convert`` has qemu-img write it, ``libvirt`` has libvirt;
    ``link`` makes an overlay of the source, or a child of it where the pool makes those; ``blank`` has no source; ``device``
    fills a device, from a source if there is one.
    """

    route: str
    format: str
    capacity: int
    owner: Ownership
    qcow2: t.Optional[Qcow2Features] = None
    preallocation: str = "off"
    nocow: t.Optional[bool] = None
    replaces: bool = False
    dropped: t.Tuple[str, ...] = ()
    #: why blocks of the source are not even tried to be shared; None to try it
    unshared: t.Optional[str] = None
    #: what a linked clone has below it
    backing: t.Optional[Backing] = None
    #: whether the old volume is itself the source, and the new one is that without its backing store
    flattens: bool = False


@dataclass(frozen=True)
class Grow:
    format: str
    capacity: int
    preallocation: str = "off"


@dataclass(frozen=True)
class Flatten:
    """Have a volume, which its pool has linked to another, stand alone."""


@dataclass(frozen=True)
class SetPermissions:
    owner: Ownership


Step = t.Union[Create, Grow, Flatten, SetPermissions]


@dataclass(frozen=True)
class State:
    """What a user sees of a volume; the diff is made of two of these."""

    format: t.Optional[str] = None
    capacity: t.Optional[int] = None
    uid: t.Optional[int] = None
    gid: t.Optional[int] = None
    mode: t.Optional[int] = None
    label: t.Optional[str] = None
    backing: t.Optional[Backing] = None


@dataclass(frozen=True)
class Plan:
    """Steps in order; none means that the volume is as it should be. ``before`` is None for a volume that is not there."""

    before: t.Optional[State]
    after: State
    steps: t.Tuple[Step, ...] = ()
    warnings: t.Tuple[str, ...] = ()

    @property
    def actions(self) -> t.List[str]:
        names = []
        for step in self.steps:
            if isinstance(step, Create) and step.flattens:
                names += ["flattened", *self._done_along()]
            elif isinstance(step, Create):
                names.append("replaced" if step.replaces else "created")
            else:
                names.append({Flatten: "flattened", Grow: "grown", SetPermissions: "permissions"}[type(step)])
        return names

    def _done_along(self) -> t.List[str]:
        """What a volume that is written anew gets in one go."""
        before, after = t.cast(State, self.before), self.after
        owners = [(state.uid, state.gid, state.mode, state.label) for state in (before, after)]
        grown = ["grown"] if after.capacity != before.capacity else []
        return grown + (["permissions"] if owners[0] != owners[1] else [])


class Unanswered(Exception):
    """Planning needs the fact ``question``, a field of :class:`Facts`; ``draft`` is what it is about, if anything."""

    def __init__(self, question: str, draft: t.Optional[Create] = None) -> None:
        super().__init__(question)
        self.question = question
        self.draft = draft


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
        _refuse_remote(request, facts)
    elif facts.pool.able.devices:
        _refuse_device(request, facts)
    if request.linked:
        _refuse_linked(request, facts)
    if target.identity is not None and target.identity == facts.source.identity:
        raise CloneError("INVALID_ARG", f"{_what(facts)} is the source itself ({facts.source.what})")
    if target.identity in facts.source.below:
        raise CloneError("INVALID_ARG", f"{_what(facts)} is a backing store of {facts.source.what}")
    if target.obstacle:
        raise CloneError("STORAGE_VOL_EXIST", f"{_what(facts)} cannot be made: its name is taken by {target.obstacle}")
    if target.image and not target.unfinished:
        result = _existing(request, facts, target.image)
    else:
        result = _absent(request, facts, replaces=False)
    if result.steps and not facts.pool.missing:
        only = result.steps[0] if len(result.steps) == 1 else None
        denied = _known(facts, "denied", only if isinstance(only, Create) else None)
        if denied:
            raise CloneError("OPERATION_DENIED", denied)
    return result


def kind(step: Create) -> t.Tuple[t.Any, ...]:
    """Volumes of which one may be made from another that was just made."""
    return step.route, step.format, step.qcow2, step.preallocation, step.nocow, step.unshared, step.backing


def donates(made: Create, step: Create) -> bool:
    """Whether the file of a volume of the same kind can be copied, and grown, in place of the source."""
    # A copy keeps no blocks reserved; those of a raw volume are reserved anew.
    whole = made.format == "raw" or made.preallocation == "off"
    # An overlay is made as fast as one is grown.
    growable = made.format in GROWABLE and made.backing is None
    return whole and (made.capacity == step.capacity or (made.capacity < step.capacity and growable))


def own_blocks(request: Request) -> bool:
    """Whether the task asks for blocks that nobody shares."""
    return request.method == "copy" or request.preallocation in ("falloc", "full")


def target_format(request: Request, source: t.Optional[Image]) -> t.Optional[str]:
    """The format asked for; None when it is not stated and the source that would give it is gone."""
    return request.format or ("qcow2" if request.linked else source.format if source else None)


def _refuse_linked(request: Request, facts: Facts) -> None:
    """What a linked clone can never be, whether or not it exists already."""
    source = facts.source
    if source.unlinkable:
        raise CloneError(
            "NO_SUPPORT",
            f"clone_type=linked is not possible for {_what(facts)}, which is of type {facts.pool.type}, and {source.what}:"
            f" {source.unlinkable}; clone_type=full is",
        )
    if request.format not in (None, "qcow2") and not facts.pool.able.devices:
        raise CloneError("CONFIG_UNSUPPORTED", f"format: {_what(facts)} cannot be {request.format}: a linked clone is qcow2")
    if request.preallocation != "off":
        # As libvirt says in its storage_util.c: "metadata preallocation conflicts with backing store".
        raise CloneError(
            "CONFIG_UNSUPPORTED",
            f"preallocation={request.preallocation} is not possible for {_what(facts)}: it conflicts with a backing store",
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


def _refuse_device(request: Request, facts: Facts) -> None:
    """What a volume that is a device can never be, or have, whether or not it exists already."""
    what, able = f"{_what(facts)}, which is of type {facts.pool.type},", facts.pool.able
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


def _refuse_remote(request: Request, facts: Facts) -> None:
    """What libvirt's calls cannot do by a connection to another host, whether or not the volume exists already."""
    source, way = facts.source, f"by a connection to another host (uri {request.uri}); run the task on that host"
    if not facts.pool.remote:
        raise CloneError("NO_SUPPORT", f"pool: {source.what} cannot be cloned into {facts.pool.name!r} of this host {way}")
    if not (facts.pool.missing or capabilities.of(facts.pool.type, remote=True).clone):
        raise CloneError(
            "NO_SUPPORT", f"pool: {_what(facts)}, which is of type {facts.pool.type}, can be neither made nor changed {way}"
        )
    wanted = target_format(request, source.image)
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
            raise CloneError("NO_SUPPORT", f"{what} is not possible for {_what(facts)} {way}")


# --- a volume of that name exists ---------------------------------------------------------------------------------------


def _existing(request: Request, facts: Facts, image: Image) -> Plan:
    differences = _differences(request, facts, image)
    if differences and not request.force:
        raise CloneError("DIFFERS", f"{_what(facts)} exists and differs: {'; '.join(differences)}")
    if differences:
        _refuse_in_use(facts, "replaced")
        return _replacement(request, facts)

    if request.flatten and facts.target.needs_origin and not facts.pool.able.flatten:
        raise CloneError("NO_SUPPORT", f"{_what(facts)} is a snapshot, which a pool of type {facts.pool.type} cannot flatten")
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
            warnings.append(f"{_unseen(facts)}: whether {_what(facts)} has its data is not told")
    elif source is None:
        warnings.append(f"{facts.source.gone}; {_what(facts)} exists and is judged on what the task states")
    elif wanted is None and image.capacity < source.capacity:
        warnings.append(
            f"{_what(facts)} has {format_bytes(image.capacity)}, less than its source now has"
            f" ({format_bytes(source.capacity)}); state capacity to grow it"
        )

    owner = _changed_ownership(request, facts.target)
    if owner is not None:
        if facts.pool.remote:
            raise _permissions_stay(request, facts, owner)
        users = _known(facts, "target_users")
        if users:
            warnings.append(f"{_what(facts)} is open by {users}: its owner, group, mode and label are left alone")
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


def _permissions_stay(request: Request, facts: Facts, wanted: Ownership) -> CloneError:
    """libvirt sets them where it makes a volume, and has no call that changes them."""
    now = facts.target
    parameter, has, asked = next(
        (name, has, asked)
        for name, has, asked in (
            ("owner", str(now.uid), wanted.uid),
            ("group", str(now.gid), wanted.gid),
            ("mode", f"{now.mode:04o}", None if wanted.mode is None else f"{wanted.mode:04o}"),
        )
        if asked is not None
    )
    return CloneError(
        "NO_SUPPORT",
        f"{parameter}: {_what(facts)} has {has}, asked for is {asked}, which cannot be changed by a connection to another host"
        f" (uri {request.uri}); run the task on that host",
    )


def _flattening(request: Request, facts: Facts, image: Image) -> Plan:
    """The volume is converted as a source is, with all that lies below it, and the result takes its place.

    Not in place, by ``qemu-img rebase -b ""``: that copies what could be shared, has internal snapshots lose what they read
    from below, and leaves an image that is killed meanwhile marked dirty where it has lazy refcounts. Price: the bitmaps.
    Overlays of the volume stay valid, since its path, format and content stay what they are.
    """
    what = _what(facts)
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
    changed = _changed_ownership(request, facts.target) or Ownership()
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
    return [f"{_what(facts)}: a conversion does not carry over {' and '.join(step.dropped)}"]


def _replacement(request: Request, facts: Facts) -> Plan:
    if facts.pool.remote:
        raise CloneError(
            "NO_SUPPORT",
            f"force=true cannot replace {_what(facts)} by a connection to another host (uri {request.uri}): libvirt cannot"
            " rename volumes, so it would be gone if the new one fails; delete it first",
        )
    if facts.pool.able.devices and facts.target.image and facts.target.image.encrypted:
        raise CloneError("NO_SUPPORT", f"{_what(facts)} cannot be replaced: it is encrypted (LUKS); delete it first")
    dependents: Dependents = _known(facts, "target_dependents")
    if dependents.names:
        raise CloneError("OPERATION_INVALID", f"{_what(facts)} cannot be replaced: {entry.depend(dependents.names)}")
    _refuse_shrinking_device(request, facts)
    result = _absent(request, facts, replaces=True)
    if not dependents.untold:
        return result
    warning = f"whether anything depends on {_what(facts)} cannot be told of {entry.first(dependents.untold)}"
    return replace(result, warnings=(*result.warnings, warning))


def _differences(request: Request, facts: Facts, image: Image) -> t.List[str]:
    """What only a replacement could mend, as phrases that name both values."""
    if image.unreadable:
        return [image.unreadable]
    found = []
    wanted_format = target_format(request, facts.source.image)
    if wanted_format is not None and image.format != wanted_format:
        found.append(f"its format is {image.format}, asked for is {wanted_format}")
    if request.clone_type == "full" and image.backing is not None:
        found.append(f"it is a linked clone of {image.backing!r}, asked for is clone_type=full")
    if request.linked:
        found += _linked_otherwise(facts, image)
    wanted = _stated_capacity(request, facts, image.format)
    if wanted is not None and image.capacity > wanted and not _rounded_by_geometry(image, wanted):
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
    unit = facts.pool.granularity
    return -(-round_capacity(image_format, capacity) // unit) * unit


def _rounded_by_geometry(image: Image, wanted: int) -> bool:
    """A vpc that others made is rounded up to a whole number of cylinders, of at most 16 * 255 sectors (VHD specification)."""
    return image.format == "vpc" and image.capacity - wanted < 16 * 255 * 512


def _growth(request: Request, facts: Facts, image: Image, wanted: int) -> Grow:
    sizes = f"{format_bytes(image.capacity)}, asked for is {format_bytes(wanted)}"
    if not request.resize:
        raise CloneError("DIFFERS", f"{_what(facts)} has {sizes}, and resize is false")
    if image.format not in GROWABLE:
        raise CloneError("NO_SUPPORT", f"{_what(facts)} has {sizes}; a {image.format} volume cannot be grown")
    if not facts.pool.able.grow:
        raise CloneError("NO_SUPPORT", f"{_what(facts)} has {sizes}; a volume of a {facts.pool.type} pool cannot be grown")
    if facts.pool.able.devices:
        why = _known(facts, "not_growable")
        if why:
            raise CloneError("OPERATION_INVALID", f"{_what(facts)} has {sizes}, and cannot be grown: {why}")
        missing = wanted - image.capacity - t.cast(int, _known(facts, "room"))
        if missing > 0:
            raise CloneError(
                "NO_SPACE", f"{_what(facts)} has {sizes}; pool {facts.pool.name!r} lacks {format_bytes(missing)} for that"
            )
    _refuse_preallocation(request.preallocation, image.format)
    if facts.pool.remote and request.preallocation != "off":
        raise CloneError(
            "NO_SUPPORT", f"preallocation={request.preallocation}: {_what(facts)} has {sizes}; libvirt grows it without"
        )
    _refuse_hard_link(facts)
    _refuse_target_chain(facts, image)
    _refuse_in_use(facts, "grown")
    return Grow(image.format, wanted, request.preallocation)


def _refuse_target_chain(facts: Facts, image: Image) -> None:
    """A target's guest, or whoever else wrote to it, must not have us open files outside the pools."""
    if image.data_file is not None:
        raise refusal("data_file", f"{_what(facts)} keeps its data in another file, which is not followed")
    if image.backing is not None:
        _known(facts, "target_chain")


def _refuse_hard_link(facts: Facts) -> None:
    """What is changed in place changes under all its names."""
    if facts.target.linked_elsewhere:
        raise refusal(
            "hard_link", f"{_what(facts)} has a further name outside the pools of this task, and would change there too"
        )


def _refuse_in_use(facts: Facts, done: str) -> None:
    users = _known(facts, "target_users")
    if users:
        raise CloneError("IN_USE", f"{_what(facts)} cannot be {done}: it is open by {users}")


def _changed_ownership(request: Request, target: TargetFacts) -> t.Optional[Ownership]:
    """The stated values that are not so yet."""
    mode = None if request.mode is None else request.mode.on(target.mode or 0)
    label = merged_label(target.label, request.label)
    wanted = Ownership(
        request.owner if request.owner != target.uid else None,
        request.group if request.group != target.gid else None,
        mode if mode != target.mode else None,
        label if label != target.label else None,
    )
    return None if wanted == Ownership() else wanted


def merged_label(current: t.Optional[str], stated: t.Mapping[str, str]) -> t.Optional[str]:
    """A SELinux context, ``user:role:type:level``, with the stated parts put in."""
    if not stated:
        return current
    parts = dict(zip(("user", "role", "type", "level"), (current or "system_u:object_r:virt_image_t:s0").split(":", 3)))
    parts.update(stated)
    return ":".join(parts.values())


# --- there is none, or it is to be replaced -----------------------------------------------------------------------------


def _absent(request: Request, facts: Facts, replaces: bool) -> Plan:
    if facts.pool.able.devices and not facts.target.image:
        _refuse_new_device(facts)
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
        _refuse_source(request, facts, source)

    image_format = target_format(request, source) or source.format
    _refuse_options(request, image_format)
    capacity = _stated_capacity(request, facts, image_format)
    if capacity is None:
        capacity = _rounded(facts, image_format, source.capacity)
    elif capacity < source.capacity:
        _refuse_shrinking(request, facts, source, capacity)
    if facts.target.image and facts.pool.able.staging == "mark":
        capacity = _refilled(facts, facts.target.image, capacity)

    _refuse_empty(image_format, capacity)
    features = qcow2_features(request.qcow2, source.qcow2) if image_format == "qcow2" else None
    route = _route(request, facts, source, image_format, capacity, features)
    step = Create(
        route,
        image_format,
        capacity,
        _new_ownership(request, facts),
        features,
        request.preallocation,
        request.nocow,
        replaces,
        _dropped(source) if route in ("convert", "libvirt") else (),
        None if route in ("link", "libvirt") else _unshared(request, facts, source, image_format, route),
        _backing(request, facts),
    )
    if facts.source.claimed and not writers:
        _known(facts, "checked")
    corrupt = "" if writers else _known(facts, "source_corrupt")
    if corrupt:
        raise CloneError("CORRUPT_IMAGE", corrupt)
    return _creation(facts, step, _drop_warnings(facts, step))


def _refuse_new_device(facts: Facts) -> None:
    pool = facts.pool
    if not pool.able.create:
        raise CloneError("NO_SUPPORT", f"{_what(facts)} does not exist, and a pool of type {pool.type} cannot make one")
    if pool.next_name not in (None, facts.name):
        raise CloneError("INVALID_ARG", f"name: {_what(facts)} cannot be made: its next volume is {pool.next_name!r}")


def _refuse_shrinking_device(request: Request, facts: Facts) -> None:
    """A device that is filled again keeps its size, and would be larger than stated on each run."""
    image, wanted = facts.target.image, _stated_capacity(request, facts, "raw")
    if image and wanted is not None and image.capacity > wanted and facts.pool.able.staging == "mark":
        sizes = f"{format_bytes(image.capacity)}, asked for is {format_bytes(wanted)}"
        raise CloneError("NO_SUPPORT", f"{_what(facts)} has {sizes}; a volume of a {facts.pool.type} pool keeps its size")


def _refilled(facts: Facts, image: Image, needed: int) -> int:
    """A device that is filled again keeps its size."""
    if image.capacity < needed:
        raise CloneError(
            "NO_SUPPORT",
            f"{_what(facts)} has {format_bytes(image.capacity)}, needed are {format_bytes(needed)}; it cannot be grown",
        )
    return image.capacity


def _blank(request: Request, facts: Facts, replaces: bool) -> Plan:
    image_format = request.format or "raw"
    _refuse_options(request, image_format)
    if request.capacity is None:
        raise CloneError("INVALID_ARG", f"capacity: {_what(facts)} does not exist, and nothing states how large it shall be")
    capacity = _rounded(facts, image_format, request.capacity)
    if facts.target.image and facts.pool.able.staging == "mark":
        capacity = _refilled(facts, facts.target.image, capacity)
    _refuse_empty(image_format, capacity)
    features = qcow2_features(request.qcow2, None) if image_format == "qcow2" else None
    if facts.pool.remote:
        _refuse_options_by_libvirt(features)
    owner = _new_ownership(request, facts)
    route = "device" if facts.pool.able.devices else "blank"
    step = Create(route, image_format, capacity, owner, features, request.preallocation, request.nocow, replaces)
    if facts.pool.missing:
        return Plan(None, _state_after(step), (step,), (_presumed(facts.pool.missing),))
    return _creation(facts, step, [])


def _creation(facts: Facts, step: Create, warnings: t.Sequence[str]) -> Plan:
    missing = _known(facts, "space_missing", step)
    if missing:
        raise CloneError(
            "NO_SPACE", f"{_what(facts)} needs {format_bytes(missing)} more than is free in pool {facts.pool.name!r}"
        )
    before = _state(facts.target, facts.target.image) if facts.target.image else None
    return Plan(before, _state_after(step), (step,), tuple(warnings))


def _state_after(step: Create) -> State:
    owner = step.owner
    return State(step.format, step.capacity, owner.uid, owner.gid, owner.mode, owner.label, step.backing)


def _refuse_empty(image_format: str, capacity: int) -> None:
    if capacity == 0 and image_format in EMPTY_UNREADABLE:
        raise CloneError("CONFIG_UNSUPPORTED", f"capacity: a {image_format} volume of 0 bytes could not be opened by anybody")


def _refuse_options(request: Request, image_format: str) -> None:
    if request.qcow2 and image_format != "qcow2":
        raise CloneError("INVALID_ARG", f"qcow2: {sorted(request.qcow2)} has no meaning for a volume of format {image_format}")
    _refuse_preallocation(request.preallocation, image_format)


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
    owner = _new_ownership(request, facts)
    image_format = target_format(request, facts.source.image)
    capacity = request.capacity
    if capacity is None and facts.source.image is not None:
        capacity = facts.source.image.capacity
    if image_format is not None:
        _refuse_options(request, image_format)
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


def _refuse_source(request: Request, facts: Facts, source: Image) -> None:
    what = facts.source.what
    refuse_image(source, what, request.max_capacity)
    if request.linked and source.encrypted:
        raise CloneError("NO_SUPPORT", f"{what} is encrypted: a clone of it cannot be linked, but clone_type=full is possible")
    if request.encrypted and not source.encrypted:
        raise CloneError("CONFIG_UNSUPPORTED", f"xml: <encryption> is not possible, {what} is not encrypted")


def _refuse_preallocation(mode: str, image_format: str) -> None:
    if mode == "off" or image_format == "qcow2" or (image_format == "raw" and mode != "metadata"):
        return
    raise CloneError("CONFIG_UNSUPPORTED", f"preallocation={mode} is not possible for a volume of format {image_format}")


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
            _refuse_header(facts, features)
        if source_remote:
            _refuse_options_by_libvirt(features)
        return "link"
    if source_remote:
        _refuse_by_libvirt(request, source, image_format, capacity, features)
        return "libvirt"
    if request.method == "libvirt":
        if facts.pool.type == "directory" or facts.source.pool is None or facts.source.pool.startswith("/"):
            raise CloneError("INVALID_ARG", "method=libvirt needs a libvirt pool for both the source and the target")
        _refuse_by_libvirt(request, source, image_format, capacity, features)
        return "libvirt"
    if facts.pool.able.devices and (source.format == "raw" or not source.encrypted):
        return "device"
    whole_file = (
        image_format == source.format
        and not (facts.source.network or facts.pool.able.devices)
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
                f" {_what(facts)} for that",
            )
        return "copy"
    if source.encrypted:
        raise CloneError("NO_SUPPORT", f"{facts.source.what} is encrypted: it is cloned in its own format or not at all")
    return "convert"


# The longest name of a backing store that qcow2 takes, and room for the rest of its header (docs/interop/qcow2.txt of QEMU).
_LONGEST_BACKING, _HEADER = 1023, 512


def _refuse_header(facts: Facts, features: Qcow2Features) -> None:
    """The path of the backing store stands in the first cluster, behind the header."""
    path, length = facts.source.key, len(os.fsencode(facts.source.key))
    if length > _LONGEST_BACKING:
        raise CloneError(
            "CONFIG_UNSUPPORTED", f"{_what(facts)} cannot record a backing store whose path has {length} bytes, {path!r}"
        )
    if length + _HEADER > features.cluster_size:
        raise CloneError(
            "CONFIG_UNSUPPORTED",
            f"qcow2.cluster_size: {features.cluster_size} bytes leave no room for the path of the backing store of"
            f" {_what(facts)}, {path!r}",
        )


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
        raise CloneError("NO_SUPPORT", f"method=reflink is not possible for {_what(facts)}: {reason}")
    return reason or None


def _refuse_by_libvirt(
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
    _refuse_options_by_libvirt(features)


def _refuse_options_by_libvirt(features: t.Optional[Qcow2Features]) -> None:
    """Options of qcow2 that libvirt's XML has no element for."""
    for option, default in (("refcount_bits", 16), ("compression_type", "zlib")):
        value = default if features is None else getattr(features, option)
        if value != default:
            raise CloneError(
                "NO_SUPPORT", f"qcow2.{option}: {value} cannot be told to libvirt (method=libvirt), which knows only {default}"
            )


def _dropped(source: Image) -> t.Tuple[str, ...]:
    return tuple(name for name, count in (("snapshots", source.snapshots), ("bitmaps", source.bitmaps)) if count)


def _new_ownership(request: Request, facts: Facts) -> Ownership:
    """As stated; else the source's, when that is a file volume of a pool (as ``virsh vol-clone`` does); else 0600 and us.

    A user who may not give files away keeps his own where nothing was stated.
    """
    if facts.pool.able.devices:
        return Ownership()
    if facts.pool.remote:
        # Of libvirt's daemon where nothing is stated, and nobody knows who that is.
        source_uid, source_gid, mode = facts.source.owner or (None, None, 0o600)
        return Ownership(
            source_uid if request.owner is None else request.owner,
            source_gid if request.group is None else request.group,
            mode if request.mode is None else request.mode.on(mode),
        )
    uid, gid, mode = facts.uid, facts.gid, 0o600
    if facts.source.owner is not None:
        source_uid, source_gid, mode = facts.source.owner
        uid = source_uid if facts.uid == 0 else uid
        gid = source_gid if facts.uid == 0 or source_gid in facts.groups else gid
    return Ownership(
        request.owner if request.owner is not None else uid,
        request.group if request.group is not None else gid,
        request.mode.on(mode) if request.mode is not None else mode,
        merged_label(facts.default_label, request.label),
    )


def _state(target: TargetFacts, image: t.Optional[Image]) -> State:
    image_format, capacity = (image.format, image.capacity) if image else (None, None)
    backing = None
    if image is not None and image.backing is not None:
        backing = Backing(image.backing, image.backing_format or "raw", target.depth)
    return State(image_format, capacity, target.uid, target.gid, target.mode, target.label, backing)


def _what(facts: Facts) -> str:
    return f"volume {facts.name!r} of pool {facts.pool.name!r}"
