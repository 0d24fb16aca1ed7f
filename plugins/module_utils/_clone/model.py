# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the parts of a clone tell each other: the facts, the steps, and the plan that is made of them. Sizes in bytes."""

from __future__ import annotations

import typing as t
from dataclasses import dataclass

from .._images.probe import GROWABLE, Image, Qcow2Features
from .._pools import capabilities

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
    #: bytes by which a volume may come out larger than that
    excess: int = 0
    #: the only name that the next volume can have, where the pool decides that
    next_name: t.Optional[str] = None
    #: why no new volume can have the name that is wanted
    unnameable: str = ""
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
    #: why no new volume can take its place
    irreplaceable: str = ""
    #: the unit in bytes in which it can be grown, where that is larger than the pool's
    granularity: int = 1
    #: whether a clone of this kind stays whole when the source is gone, and does not tell any more what that was
    outlives_source: bool = False


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
    #: that a file of this host has the checksum that the task states; what is fetched or decompressed is compared on its way
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

    @property
    def what(self) -> str:
        """What messages call the volume."""
        return f"volume {self.name!r} of pool {self.pool.name!r}"


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
