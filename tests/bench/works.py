# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What is measured, and what is promised of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable

from contenders import CONVERT_BEST, OURS_PLAYBOOK, Contender, Goal, Makers, Volume, virt_volume_version
from place import FULL_POOL, MIB, Sizes

FIVE = Goal("ours 5 times faster", 1 / 5)
TEN = Goal("ours 10 times faster", 1 / 10)
FIFTY = Goal("ours 50 times faster", 1 / 50)
HUNDRED = Goal("ours 100 times faster", 1 / 100)
NO_SLOWER = Goal("ours no slower")
WITHIN_5_PERCENT = Goal("ours no slower, within 5 %", 1.05)
# A peer that takes seconds and is far from any goal need not take them nine times.
FEW = 3


@dataclass(frozen=True)
class Work:
    """``memory_limit``: of our own process, in bytes."""

    row: str
    title: str
    contenders: tuple[Contender, ...]
    memory_limit: int | None = None


def convert(makers: Makers, sizes: Sizes) -> list[Work]:
    data = f"{size(sizes.data)} of data"
    volumes = {
        f"raw to qcow2, {data}": Volume("base.raw", "qcow2", sizes.capacity),
        f"raw to qcow2, {data} in whole clusters": Volume("aligned.raw", "qcow2", sizes.capacity),
        f"qcow2 to raw, {data}": Volume("base.qcow2", "raw", sizes.capacity),
        f"a qcow2 chain flattened, {data}": Volume("overlay.qcow2", "qcow2", sizes.capacity),
    }
    sharing = Goal("ours at most 1.2 times, plus 50 ms", 1.2, 0.05)
    return [
        Work(
            "convert",
            title,
            (
                makers.ours(volume),
                makers.ours_libvirt(volume),
                makers.convert(volume, "qemu-img convert -C", goal=sharing),
                makers.convert(volume, goal=FIVE),
                makers.virsh_from(volume, goal=FIVE),
            ),
        )
        for title, volume in volumes.items()
    ]


def grow(makers: Makers, sizes: Sizes) -> list[Work]:
    volume = Volume("base.qcow2", "qcow2", sizes.grown)
    contenders = (
        makers.ours(volume),
        makers.ours_libvirt(volume),
        makers.cp_grown(volume, goal=NO_SLOWER),
        makers.virsh_grown(volume, goal=TEN),
    )
    return [Work("grow", f"qcow2 to qcow2, {size(sizes.data)} of data, grown to {size(sizes.grown)}", contenders)]


def reflink(makers: Makers, sizes: Sizes) -> list[Work]:
    volume = Volume("base.raw", "raw", sizes.capacity)
    goal = Goal("ours no slower, within 20 ms", 1.0, 0.02)
    contenders = (makers.ours(volume), makers.cp(volume, "cp --reflink=always", goal=goal))
    return [Work("reflink", f"raw to raw, {size(sizes.data)} of data", contenders)]


def copy(makers: Makers, sizes: Sizes) -> list[Work]:
    volume = Volume("base.raw", "raw", sizes.capacity)
    contenders = (
        makers.ours(volume),
        makers.ours_libvirt(volume),
        makers.cp(volume, "cp --sparse=always", goal=WITHIN_5_PERCENT),
        makers.virsh_clone(volume, runs=FEW),
    )
    return [Work("copy", f"raw to raw, nothing can be shared, {size(sizes.data)} of data", contenders)]


def convert_copy(makers: Makers, sizes: Sizes) -> list[Work]:
    volume = Volume("base.raw", "qcow2", sizes.capacity)
    contenders = (
        makers.ours(volume),
        makers.ours_libvirt(volume),
        *(makers.convert(volume, name, goal=WITHIN_5_PERCENT) for name in ("qemu-img convert", *CONVERT_BEST)),
        makers.virsh_from(volume, runs=FEW),
    )
    return [Work("convert-copy", f"raw to qcow2, nothing can be shared, {size(sizes.data)} of data", contenders)]


def sparse(makers: Makers, sizes: Sizes) -> list[Work]:
    volume = Volume("sparse.raw", "raw", sizes.sparse)
    contenders = (makers.ours_libvirt(volume), makers.virsh_clone(volume, runs=1, goal=HUNDRED))
    return [Work("sparse", f"raw to raw, {size(sizes.sparse)} with {size(sizes.sparse_data)} of data", contenders)]


def vast(makers: Makers, sizes: Sizes) -> list[Work]:
    large, small = f"ours, {size(sizes.vast)}", f"ours, {size(sizes.narrow)}"
    goal = Goal(f"{size(sizes.vast)} at most 1.5 times", 1.5)
    return [
        Work(
            "vast",
            f"raw to {target}, {size(sizes.sparse_data)} of data in {size(sizes.vast)} or {size(sizes.narrow)}",
            (
                makers.ours(Volume("vast.raw", target, sizes.vast), large),
                makers.ours(Volume("narrow.raw", target, sizes.narrow), small, against=large, goal=goal),
            ),
            memory_limit=64 * MIB,
        )
        for target in ("raw", "qcow2")
    ]


def one(makers: Makers, sizes: Sizes) -> list[Work]:
    volume = Volume("base.qcow2", "qcow2", sizes.grown)
    contenders = [makers.our_playbook(volume, ("new",)), makers.ping(runs=FEW)]
    if virt_volume_version():
        contenders.append(makers.virt_volume(volume, ("new",), runs=FEW))
    return [Work("one", f"one clone of a qcow2, grown to {size(sizes.grown)}, by a playbook", tuple(contenders))]


def hundred(makers: Makers, sizes: Sizes) -> list[Work]:
    """The peers make full copies, of which the disk holds only a part."""
    volume = Volume("base.qcow2", "qcow2", sizes.grown)
    names = tuple(f"clone{number}" for number in range(sizes.clones))
    part = names[: sizes.loop]
    ping = makers.ping(runs=FEW)
    share = {"runs": 1, "scale": sizes.clones // sizes.loop, "goal": FIFTY}
    contenders = [makers.our_playbook(volume, names), ping, makers.virsh_loop(volume, part, against=OURS_PLAYBOOK, **share)]
    if virt_volume_version():
        contenders.append(makers.virt_volume(volume, part, once=ping.name, **share))
    return [Work("hundred", f"{sizes.clones} clones of a qcow2, grown to {size(sizes.grown)}", tuple(contenders))]


def thousand(makers: Makers, sizes: Sizes) -> list[Work]:
    volume = Volume("small.qcow2", "qcow2", sizes.grown)
    names = tuple(f"clone{number}" for number in range(sizes.there))
    goal = Goal("ours at most 2 s more", 1.0, 2.0)
    contenders = (makers.our_idle_playbook(volume, FULL_POOL, names), makers.ping(against=OURS_PLAYBOOK, goal=goal))
    return [Work("thousand", f"{sizes.there} volumes in one task that are there already", contenders)]


#: Rows in the order of the report, each with the file systems it is measured on; a quick run takes the first.
ROWS: dict[str, tuple[tuple[str, ...], Callable[[Makers, Sizes], list[Work]]]] = {
    "convert": (("xfs", "btrfs"), convert),
    "grow": (("btrfs", "xfs"), grow),
    "reflink": (("btrfs", "xfs"), reflink),
    "copy": (("ext4",), copy),
    "convert-copy": (("ext4",), convert_copy),
    "sparse": (("ext4", "xfs"), sparse),
    "vast": (("xfs", "ext4"), vast),
    "one": (("xfs",), one),
    "hundred": (("xfs",), hundred),
    "thousand": (("xfs",), thousand),
}


def size(count: int) -> str:
    """``64 MiB``"""
    for unit, length in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20)):
        if count >= length:
            return f"{count / length:g} {unit}"
    return f"{count} bytes"
