# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Pools of libvirt whose volumes are block devices of this host: logical volumes, partitions, LUNs.

libvirt is asked which volumes there are, and makes partitions. Logical volumes are made, renamed and grown by LVM's own
commands: libvirt has no call for the last two, and none that leaves a new one without its final name until it is whole.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import typing as t
from contextlib import contextmanager
from dataclasses import dataclass

from .. import _process, _xml
from .._deadline import Deadline
from .._errors import CloneError
from .._images.qemu_img import Layer
from .._names import is_staged_name
from .._transfer import guards, locks
from .._transfer.device import is_marked
from . import definition
from .definition import Definition
from .libvirt import LibvirtPool, device_number, translated

# A tag on a logical volume that is being grown: from which byte on, and up to which, it may show what the disk held before. It
# means nothing where the length is another: somebody else has grown that, and what is there may be his data by now.
_GROWING = "virtforge_zero_from_"
_FROM_TO = re.compile(rf"{_GROWING}([0-9]+)_to_([0-9]+)")
#: bytes that a volume which takes its space when it is written to can grow by
ENDLESS = 1 << 62
_CHUNK = 4096
# In a dos table libvirt ends partitions at cylinders, as it takes those to be (virStorageBackendDiskPartBoundaries).
_CYLINDER = 255 * 63 * 512
# The highest number of a partition there that is no logical one.
_PRIMARY = 4
# Seconds that libvirt may take to make a partition.
_MAKING = 120
# lvm(8), "Valid names".
_LVM_CHARACTERS = re.compile(r"[a-zA-Z0-9+_.-]*")
_LVM_NAMES = ("snapshot", "pvmove")
_LVM_PARTS = re.compile(
    "_(cdata|cmeta|cvol|imeta|corig|iorig|mimage|mlog|pmspare|rimage|rmeta|tdata|tmeta|vdata|vorigin|wcorig)"
)
# What we make, by lv_layout (lvs(8)); a snapshot of either has the same.
_LVM_MADE = ("linear", "thin")
# NAME_LEN of LVM (metadata-exported.h), of which it leaves three, and DM_NAME_LEN of the kernel (dm-ioctl.h).
_LVM_LENGTH = _DM_LENGTH = 128
# The last is said where there is space, but not as a striped or mirrored volume needs it.
_LVM_FULL = ("insufficient free space", "not enough free", "insufficient suitable allocatable extents")
_KERNEL = "the kernel, which has it mounted or as part of another device"


@dataclass(frozen=True)
class Device:
    """A volume as its pool describes it. ``capacity`` in bytes; ``origin`` is what it is a snapshot of."""

    name: str
    path: str
    capacity: int
    origin: t.Optional[str] = None
    #: the thin pool that it has its space from
    thin_pool: t.Optional[str] = None
    #: from which byte on it still has to be zeroed, after a run that grew it was killed
    zero_from: t.Optional[int] = None
    #: our tags on it
    tags: t.Tuple[str, ...] = ()
    #: whether what was never written reads as zeros
    zeroes: bool = False
    #: bytes that it takes of its pool, where those are not its capacity
    allocated: t.Optional[int] = None
    #: the volume without which it is lost; a thin snapshot stays whole without its origin
    needs: t.Optional[str] = None
    #: what is the same only for the same volume, where no device of this host tells
    identity: t.Tuple[str, ...] = ()
    #: how LVM lays out its data, in LVM's words, and over how many devices
    layout: str = ""
    stripes: int = 1

    @property
    def sound(self) -> int:
        """Its capacity, less what was added by a run that was killed before it zeroed that."""
        return self.capacity if self.zero_from is None else min(self.capacity, self.zero_from)


class DevicePool(LibvirtPool):
    """A pool without a directory of its own. What it makes is described by its entry in ``capabilities``."""

    #: the unit in bytes in which it gives space to a volume
    granularity = 512
    #: bytes by which a volume may come out larger than that
    excess = 0
    #: what libvirt calls the type of its volumes
    volume_type = "block"
    #: whether volumes that are lost without another are deleted with it
    removes_dependents = False
    #: whether no volume that others depend on is ever deleted
    refuses_dependents = False

    def open(self) -> int:
        """There is nothing to open."""
        return -1

    def path_of(self, name: str) -> str:
        volume = self.volume(name)
        return volume.path if volume else os.path.join(self.path, name)

    def definition(self) -> Definition:
        """What it runs with, whatever it will be started with next."""
        return definition.parse(self.document())

    @property
    def storage(self) -> str:
        """The same for all pools of libvirt that have the same volumes, as far as that can be told."""
        return self.name

    def lock_key(self, name: str) -> str:
        digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:32]
        return f"pool-{hashlib.sha256(os.fsencode(f'{self.type} {self.storage}')).hexdigest()[:32]}-{digest}"

    def contains(self, path: str) -> bool:
        """Whether the real path ``path`` is a volume of this pool."""
        return any(os.path.realpath(known) == path for known in self._paths())

    def volume(self, name: str) -> t.Optional[Device]:
        """The volume of that name, None for none."""
        document = self.volume_xml(name)
        if document is None:
            # libvirt learns of what others make only when it looks again, and a check run may not have it do so.
            return None
        path = _xml.volume_path(document) or os.path.join(self.path, name)
        try:
            return Device(name, path, self._length(path))
        except FileNotFoundError:
            # Nor does it notice by itself that one is gone.
            return None

    def volumes(self) -> t.List[Device]:
        """All volumes, by name; those that nobody but us knows of are none."""
        found = (self.volume(name) for name in sorted(self._names()) if not is_staged_name(name))
        return [volume for volume in found if volume is not None]

    def _names(self) -> t.List[str]:
        with translated(f"listing the volumes of pool {self.name!r}"):
            return t.cast(t.List[str], self._pool.listVolumes())

    def _paths(self) -> t.List[str]:
        with translated(f"listing the volumes of pool {self.name!r}"):
            return [volume.path() for volume in self._pool.listAllVolumes(0)]

    def _length(self, path: str) -> int:
        """Of the device itself: what libvirt says of some is less than there is (one block, for iSCSI in 9.0)."""
        fd = self._open_device(path)
        try:
            return guards.length(fd)
        finally:
            os.close(fd)

    def _open_device(self, path: str) -> int:
        try:
            return os.open(os.path.realpath(path), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except PermissionError as exc:
            raise CloneError(
                "OPERATION_DENIED", f"pool {self.name!r}: this user may not open the device {path!r}; use become"
            ) from exc
        except OSError as exc:
            # A node whose device has just gone.
            if exc.errno in (errno.ENXIO, errno.ENODEV):
                raise FileNotFoundError(exc.errno, exc.strerror, path) from exc
            raise

    def is_unfinished(self, volume: Device) -> bool:
        """Whether a volume has its name already, and is not whole."""
        try:
            fd = self._open_device(volume.path)
        except FileNotFoundError:
            # A logical volume that is not active has no node.
            return False
        try:
            return self.is_begun(volume.name, fd)
        finally:
            os.close(fd)

    def is_begun(self, name: str, fd: int) -> bool:
        """The same of a volume that is open."""
        return is_marked(fd)

    def available(self) -> int:
        return self.sizes()[2]

    def available_for(self, target: t.Optional[Device]) -> int:
        """Bytes that what takes the place of ``target`` can have."""
        return self.available()

    def space_for(self, capacity: int, target: t.Optional[Device]) -> int:
        """Bytes that a volume of this capacity takes in place of ``target``."""
        return 0 if target is not None else capacity

    def snapshot_size(self, capacity: int) -> int:
        """Bytes that a linked clone of this capacity takes, where those are reserved for it."""
        return capacity

    def next_name(self, taken: t.AbstractSet[str] = frozenset()) -> t.Optional[str]:
        """The only name that the next volume can have, once those in ``taken`` are made; None where it is free."""
        return None

    def cannot_name(self, name: str) -> str:
        """Why no new volume can have this name; empty where one can."""
        return ""

    def cannot_write(self) -> str:
        return "" if os.geteuid() == 0 else f"pool {self.name!r}: only root may write to its devices; use become"

    def users_of(self, path: str) -> str:
        """Domains that have the device; or the kernel, for a mount, a volume group, a swap area, a device on top of it."""
        domains = self._connection.users_of_device(path)
        return domains or (_KERNEL if _claimed(path) else "")

    def users_by_name(self, volumes: t.Sequence[Device]) -> t.Dict[str, t.List[str]]:
        """The same for many volumes, by name, with the processes that have them open."""
        numbers = {volume.name: device_number(volume.path) for volume in volumes}
        processes = guards.openers({(number,) for number in numbers.values() if number is not None})
        domains = self._connection.domains_by_device()
        found = {}
        for volume in volumes:
            number = numbers[volume.name]
            users = [] if number is None else [*domains.get(number, ()), *processes.get((number,), ())]
            found[volume.name] = users or ([_KERNEL] if _claimed(volume.path) else [])
        return found

    def allocation(self, volume: Device) -> int:
        return volume.capacity if volume.allocated is None else volume.allocated

    def below(self, volume: Device, volumes: t.Sequence[Device]) -> t.List[Device]:
        """What the volume is a snapshot of, what that is one of, and so on.

        :param volumes: all of the pool
        """
        by_name = {one.name: one for one in volumes}
        found: t.List[Device] = []
        while volume.origin in by_name and by_name[volume.origin] not in found:
            volume = by_name[volume.origin]
            found.append(volume)
        return found

    def dependents(self, name: str) -> t.List[str]:
        """Names of the volumes that are lost without this one."""
        return sorted(self.dependents_among(self.volumes()).get(name, ()))

    def dependents_among(self, volumes: t.Sequence[Device]) -> t.Dict[str, t.List[str]]:
        """The same for each of all volumes that has any."""
        needed = {volume.name: volume.needs for volume in volumes}
        found: t.Dict[str, t.List[str]] = {}
        for name in needed:
            below, seen = needed[name], {name}
            while below is not None and below not in seen:
                found.setdefault(below, []).append(name)
                seen.add(below)
                below = needed.get(below)
        return found

    def cannot_delete(self, volume: Device) -> str:
        """Why this one cannot be deleted, in a pool where others can; empty where it can."""
        return ""

    def cannot_grow(self, volume: Device) -> str:
        """Why this one cannot be grown, in a pool where others can; empty where it can."""
        return ""

    def cannot_replace(self, volume: Device) -> str:
        """Why no new volume can take the place of this one; empty where one can."""
        return ""

    def room_for(self, volume: Device) -> int:
        """Bytes by which it can grow."""
        return self.available()

    def cannot_wipe(self, volume: Device) -> str:
        """Why its data cannot be overwritten; empty where it can."""
        return "" if self.volume_type == "block" else "it is no device of this host"

    @contextmanager
    def alone(self, deadline: Deadline) -> t.Iterator[None]:
        """Held by who changes which volumes there are, in a pool that bears only one at a time."""
        yield

    @contextmanager
    def opened(self, volume: Device, what: str) -> t.Iterator[Layer]:
        """The volume for writing, durable at the end."""
        fd = os.open(os.path.realpath(volume.path), os.O_RDWR | os.O_EXCL | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            yield Layer(fd, "raw", block=True)
            os.fsync(fd)
        finally:
            os.close(fd)

    def make(self, name: str, capacity: int) -> None:
        """Make a volume; nobody has said yet what it reads as."""
        raise self._cannot("make a volume")

    def unmake(self, name: str) -> None:
        """Delete what :meth:`make` has made, and nobody has filled."""
        self.remove(name)

    def marked(self, name: str) -> None:
        """What was made has a mark now."""

    def staged(self, capacity: int, like: t.Optional[Device]) -> t.ContextManager[Device]:
        """A new volume under a name that the next run knows as unfinished; it goes where it was not published."""
        raise self._cannot("make a volume under another name")

    def cannot_link(self, source: t.Optional[t.Any], name: t.Optional[str]) -> str:
        """Why there is no linked clone here of the volume ``name`` of the pool ``source``; empty when there is."""
        return "there are only full clones"

    def staged_link(self, capacity: int, source: t.Any, name: str) -> t.ContextManager[Device]:
        """The same as :meth:`staged`, for a linked clone of the volume ``name`` of the pool ``source``."""
        raise self._cannot("make a linked clone")

    def publish(self, staged: str, name: str, replaces: bool) -> None:
        """Give a staged volume its name.

        :raises FileExistsError: when the name is taken and ``replaces`` is not set: of two at once, one creates
        """
        self.look_again()
        if not replaces or self.volume(name) is None:
            self._rename(staged, name)
            return
        dependents = self.dependents(name) if self.removes_dependents or self.refuses_dependents else []
        if dependents:
            raise CloneError(
                "IN_USE",
                f"volume {name!r} of pool {self.name!r} cannot be replaced: {dependents[0]!r} was made of it meanwhile",
            )
        old = self._unfinished_name()
        # While its lock is held, no other run takes it for left behind.
        with locks.Locks([], [self.lock_key(old)], Deadline(60, "lock_timeout"), "replacing a volume"):
            # Killed in between, there is none of that name, and the next run makes one.
            self._rename(name, old)
            try:
                self._rename(staged, name)
            except BaseException:
                if self.volume(name) is None:
                    self._rename(old, name)
                raise
            self.remove(old)

    def _unfinished_name(self) -> str:
        """A new name, by which the next run knows a volume that is not finished."""
        return f"{self._unfinished}{secrets.token_hex(4)}.tmp"

    @property
    def _unfinished(self) -> str:
        """What such names begin with on this host, before and after a reboot."""
        return f".virtforge-{hashlib.sha256(os.uname().nodename.encode()).hexdigest()[:8]}"

    def _rename(self, name: str, other: str) -> None:
        """Give a volume another name.

        :raises FileExistsError: when that is taken
        """
        raise self._cannot("give a volume another name")

    def grow(self, device: Device, capacity: int) -> None:
        raise self._cannot("grow a volume")

    def _cannot(self, what: str) -> CloneError:
        """For what ``capabilities`` says that pools of this type cannot do, and so no plan asks for."""
        return CloneError("NO_SUPPORT", f"pool {self.name!r}: a pool of type {self.type} cannot {what}")

    def zeroed(self, device: Device) -> None:
        """What a volume was grown by reads as zeros now."""

    def remove(self, name: str) -> None:
        with translated(f"deleting volume {name!r} of pool {self.name!r}"):
            self._pool.storageVolLookupByName(name).delete(0)


class DiskPool(DevicePool):
    """Partitions of one disk, made by libvirt and parted."""

    # parted places them at whole MiB.
    granularity = 1 << 20

    @property
    def excess(self) -> int:  # type: ignore[override]
        return _CYLINDER if self.definition().source.format == "dos" else 0

    def next_name(self, taken: t.AbstractSet[str] = frozenset()) -> t.Optional[str]:
        """parted takes the lowest free number, and libvirt refuses any other name (virStorageBackendDiskMakeDataVol)."""
        numbers = {self._number(name) for name in (*self._names(), *taken)} - {None}
        return self._stem() + str(next(number for number in range(1, len(numbers) + 2) if number not in numbers))

    def _stem(self) -> str:
        """What the kernel's names of the partitions begin with: nvme0n1p, loop0p, sda."""
        device = os.path.basename(os.path.realpath(self._disk()))
        return f"{device}p" if device[-1].isdigit() else device

    def _number(self, name: str) -> t.Optional[int]:
        """Of the partition with that name; None for what is none of this disk's."""
        match = re.fullmatch(rf"{re.escape(self._stem())}([0-9]+)", name)
        return int(match.group(1)) if match else None

    def _disk(self) -> str:
        return self.definition().source.devices[0]

    @property
    def storage(self) -> str:
        return os.path.realpath(self._disk())

    def cannot_delete(self, volume: Device) -> str:
        if self.definition().source.format != "dos":
            return ""
        number = self._number(volume.name) or 0
        logical = sorted(name for name in self._names() if (self._number(name) or 0) > max(number, _PRIMARY))
        if number > _PRIMARY and logical:
            return f"the logical partitions behind it ({', '.join(logical[:3])}) would get other names"
        if logical and self._is_extended(volume):
            return f"the logical partitions in it ({', '.join(logical[:3])}) would be deleted with it"
        return ""

    def _is_extended(self, volume: Device) -> bool:
        """Of such a partition the kernel shows two sectors, or one of 4 KiB (msdos_partition() in block/partitions/msdos.c)."""
        return self.definition().source.format == "dos" and volume.capacity <= 4096

    def cannot_replace(self, volume: Device) -> str:
        return "it is an extended partition" if self._is_extended(volume) else ""

    def cannot_wipe(self, volume: Device) -> str:
        return "it is an extended partition" if self._is_extended(volume) else super().cannot_wipe(volume)

    @contextmanager
    def alone(self, deadline: Deadline) -> t.Iterator[None]:
        # parted reads the whole table and writes it back: of two at once, one would undo what the other did.
        with locks.Locks([], [self.lock_key("")], deadline, f"waiting for the partition table of pool {self.name!r}"):
            yield

    def make(self, name: str, capacity: int) -> None:
        document = _xml.volume_xml(name=name, capacity=capacity, allocation=capacity)
        with self.alone(Deadline(60, "lock_timeout")), translated(f"making volume {name!r} of pool {self.name!r}"):
            # It has its name, and anybody's data, before there is a mark on it.
            locks.note(self.lock_key(name), True)
            try:
                self._pool.createXML(document, 0)
            except BaseException:
                if not os.path.exists(f"/sys/class/block/{name}"):
                    locks.note(self.lock_key(name), False)
                raise
        made = self.volume(name)
        if made is None or made.capacity < capacity:
            self.unmake(name)
            found = made.capacity if made else 0
            raise CloneError("NO_SPACE", f"volume {name!r} of pool {self.name!r} came out with {found} bytes, not {capacity}")

    def unmake(self, name: str) -> None:
        with self.alone(Deadline(60, "lock_timeout")):
            self.remove(name)
            locks.note(self.lock_key(name), False)

    def marked(self, name: str) -> None:
        locks.note(self.lock_key(name), False)

    def is_begun(self, name: str, fd: int) -> bool:
        """Also where the run that made it was killed before it could mark it."""
        noted = locks.noted_at(self.lock_key(name))
        # One that was made later, or given to somebody, is not the one that the note is of.
        return is_marked(fd) or (noted is not None and -1 <= os.fstat(fd).st_ctime - noted < _MAKING)

    def remove(self, name: str) -> None:
        """By parted itself: libvirt asks it to remove "p1" of disks whose own name ends in a digit (9.0)."""
        number = self._number(name)
        if number is None:
            raise CloneError("OPERATION_INVALID", f"volume {name!r} of pool {self.name!r} is no partition of {self._disk()!r}")
        program = _process.find("parted")
        if program is None:
            raise CloneError("MISSING_DEPENDENCY", f"pool {self.name!r}: parted is not installed")
        status, _out, err = _process.run([program, "--script", self._disk(), "rm", str(number)], (), outlives=True)
        if status:
            text = " ".join(err.split())
            raise CloneError("IO_ERROR", f"deleting volume {name!r} of pool {self.name!r} failed: {text}")
        self.refresh(Deadline(60, "lock_timeout"))


class LogicalPool(DevicePool):
    """A volume group of LVM."""

    removes_dependents = True

    def __init__(self, *described: t.Any) -> None:
        super().__init__(*described)
        self._group = ""
        # A report takes LVM as long as a small copy, and longer the more disks the host has.
        self._rows: t.Optional[t.List[t.Dict[str, str]]] = None

    def look_again(self) -> None:
        self._rows = None

    @property
    def storage(self) -> str:
        return self.group

    @property
    def group(self) -> str:
        self._group = self._group or self.definition().source.name or self.name
        return self._group

    @property
    def granularity(self) -> int:  # type: ignore[override]
        return self._of_the_group("vg_extent_size")

    def available(self) -> int:
        return self._of_the_group("vg_free")

    def _of_the_group(self, field: str) -> int:
        # lvs says nothing of a group without volumes.
        rows = self._listed() or self._report("vgs", field, self.group)
        return int(rows[0][field])

    def volume(self, name: str) -> t.Optional[Device]:
        return next((one for one in self._devices() if one.name == name), None)

    def volumes(self) -> t.List[Device]:
        return sorted((one for one in self._devices() if not is_staged_name(one.name)), key=lambda one: one.name)

    def _paths(self) -> t.List[str]:
        return [one.path for one in self._devices()]

    def _devices(self) -> t.List[Device]:
        """What LVM knows: libvirt learns of what others made only when it looks again."""
        rows = self._listed()
        thin_pools = {row["lv_name"]: row["pool_lv"] for row in rows}
        # The first attribute tells pools, metadata and the parts of mirrors from what has data of its own (lvs(8)).
        return [_logical_volume(row, thin_pools) for row in rows if row["lv_attr"][0] in "-oOmMrRsSVCv" and row["lv_path"]]

    def _listed(self) -> t.List[t.Dict[str, str]]:
        """The volumes as lvs tells them, each with what is the same for all of the group."""
        if self._rows is None:
            fields = "lv_name,lv_path,lv_size,lv_attr,lv_layout,lv_tags,origin,origin_size,pool_lv,data_percent"
            # A line for each segment of a volume.
            rows: t.Dict[str, t.Dict[str, str]] = {}
            for row in self._report("lvs", f"{fields},data_stripes,vg_extent_size,vg_free", self.group):
                known = rows.setdefault(row["lv_name"], row)
                known["data_stripes"] = max(known["data_stripes"], row["data_stripes"], key=lambda text: int(text or 1))
            self._rows = list(rows.values())
        return self._rows

    def available_for(self, target: t.Optional[Device]) -> int:
        thin_pool = target.thin_pool if target else None
        if thin_pool is None:
            return self.available()
        row = next(row for row in self._listed() if row["lv_name"] == thin_pool)
        free = int(int(row["lv_size"]) * (1 - float(row["data_percent"] or 0) / 100))
        setting = "activation/thin_pool_autoextend_threshold"
        told = self._lvm("looking at the settings of LVM", "lvmconfig", "--type", "full", setting)
        # With 100 a thin pool is never made larger by itself (lvmthin(7)).
        return free if int(told.rpartition("=")[2]) >= 100 else free + self.available()

    def space_for(self, capacity: int, target: t.Optional[Device]) -> int:
        # The old one is there until the new one is whole.
        return capacity

    def snapshot_size(self, capacity: int) -> int:
        # Of chunks of 4 KiB a header, and one with records for each 256 of data (_cow_max_size() in LVM's snapshot.c).
        chunks = -(-capacity // _CHUNK)
        size = (1 + chunks + -(-chunks // 256)) * _CHUNK
        return -(-size // self.granularity) * self.granularity

    def cannot_name(self, name: str) -> str:
        if name.startswith("-"):
            return "it begins with -, which LVM takes for an option"
        if not _LVM_CHARACTERS.fullmatch(name):
            return "LVM has no other characters in a name than letters without accents, digits, and + _ . -"
        if name.startswith(_LVM_NAMES) or _LVM_PARTS.search(name):
            return "LVM keeps such names for itself"
        room = _LVM_LENGTH - 3 - len(self.group)
        if len(name) > room:
            return f"LVM leaves {room} characters for a name in this group, which is not enough for {len(name)}"
        # Each hyphen is doubled there.
        if len(f"{self.group}{name}".replace("-", "--")) + 1 >= _DM_LENGTH:
            return "with its hyphens it is too long for device-mapper"
        return ""

    def cannot_grow(self, volume: Device) -> str:
        if volume.needs and not volume.thin_pool:
            return "it is a snapshot, and LVM grows only what that may keep of its origin"
        dependents = self.dependents(volume.name)
        # "Snapshot origin volumes can be resized only while inactive" (lvextend).
        return f"LVM does not grow the origin of snapshots ({', '.join(dependents[:3])})" if dependents else ""

    def cannot_replace(self, volume: Device) -> str:
        layout = volume.layout.split(",")[0]
        return "" if layout in _LVM_MADE else f"LVM lays it out as {layout}, and a new one would be linear"

    def room_for(self, volume: Device) -> int:
        # What a run that was killed has added is there already. A thin pool may promise more than it has.
        return ENDLESS if volume.thin_pool else self.available() + volume.capacity - volume.sound

    def cannot_wipe(self, volume: Device) -> str:
        # As libvirt has it (virStorageBackendLogicalVolWipe): what is written there takes new space, until there is none.
        if volume.thin_pool or volume.origin:
            return "it is thin or a snapshot, and what is written to it takes space elsewhere"
        dependents = self.dependents(volume.name)
        return f"its snapshots ({', '.join(dependents[:3])}) would keep what it held" if dependents else ""

    @contextmanager
    def staged(self, capacity: int, like: t.Optional[Device]) -> t.Iterator[Device]:
        """A new volume under a name that the next run knows as unfinished; it goes where it was not published.

        :param like: a volume whose thin pool shall also hold the new one
        """
        if like is not None and like.thin_pool:
            size = ["-V", f"{capacity}b", "--thinpool", like.thin_pool]
        else:
            # -Zn -Wn: we zero it ourselves, and whatever signature it had before with that.
            size = ["-L", f"{capacity}b", "-Zn", "-Wn"]
        with self._staged([*size, self.group]) as device:
            yield device

    def cannot_link(self, source: t.Optional[t.Any], name: t.Optional[str]) -> str:
        if not isinstance(source, LogicalPool) or source.name != self.name:
            return "it is no logical volume of the same pool"
        volume = self.volume(name) if name else None
        # "Snapshots of snapshots are not supported" (lvcreate).
        return (
            "it is a snapshot itself, of a volume that is not thin" if volume and volume.needs and not volume.thin_pool else ""
        )

    @contextmanager
    def staged_link(self, capacity: int, source: t.Any, name: str) -> t.Iterator[Device]:
        """A snapshot: a thin one of a thin volume; else a classic one, with room for all of its origin to change."""
        origin = t.cast(Device, self.volume(name))
        # Thin snapshots are made not to be activated, unless one says so (lvmthin(7)). The other kind has records of its own,
        # and LVM knows how much more those take ("100%ORIGIN" in lvcreate(8)).
        how = ["-kn", "-ay"] if origin.thin_pool else ["-l", "100%ORIGIN"]
        with self._staged(["-s", *how, f"{self.group}/{name}"]) as device:
            if device.capacity < capacity:
                self.grow(device, capacity)
            yield device

    @contextmanager
    def _staged(self, arguments: t.Sequence[str]) -> t.Iterator[Device]:
        self._sweep()
        name = self._unfinished_name()
        with locks.Locks([], [self.lock_key(name)], Deadline(60, "lock_timeout"), "making a logical volume"):
            try:
                self._change("making a logical volume", "lvcreate", "-y", "-q", "-n", name, *arguments)
                device = self.volume(name)
                if device is None:
                    raise CloneError("IO_ERROR", f"pool {self.name!r}: lvcreate made no volume")
                yield device
            except BaseException:
                self.look_again()
                if self.volume(name) is not None:
                    self.remove(name)
                raise

    def _rename(self, name: str, other: str) -> None:
        self._change(f"naming the logical volume {other!r}", "lvrename", "-q", self.group, name, other)

    def remove(self, name: str) -> None:
        self._change(f"deleting the logical volume {name!r}", "lvremove", "-f", "-q", f"{self.group}/{name}")

    def grow(self, device: Device, capacity: int) -> None:
        """What is added reads as it did on the disk, until :meth:`zeroed`: a tag says so, whatever happens."""
        where = f"{self.group}/{device.name}"
        if device.capacity == capacity:
            # By a run that was killed before it zeroed what it had added.
            return
        tag = f"{_GROWING}{device.sound}_to_{capacity}"
        if device.thin_pool is None:
            self._tag(where, add=[tag])
        try:
            self._change(f"growing {where}", "lvextend", "-q", "-L", f"{capacity}b", where)
        except CloneError:
            # It is as large as before.
            if device.thin_pool is None:
                self._tag(where, remove=[tag])
            raise

    def zeroed(self, device: Device) -> None:
        self._tag(f"{self.group}/{device.name}", remove=device.tags)

    def _tag(self, where: str, add: t.Sequence[str] = (), remove: t.Sequence[str] = ()) -> None:
        arguments = [*(f"--addtag={tag}" for tag in add), *(f"--deltag={tag}" for tag in remove)]
        if arguments:
            self._change(f"growing {where}", "lvchange", "-q", *arguments, where)

    def _sweep(self) -> None:
        """Delete what runs of this host that are dead have left unfinished: their lock is free.

        Where hosts share a volume group, nothing here tells what the others are at.
        """
        for device in self._devices():
            if is_staged_name(device.name) and device.name.startswith(self._unfinished):
                try:
                    with locks.Locks([], [self.lock_key(device.name)], Deadline(0, "lock_timeout"), ""):
                        self.look_again()
                        if self.volume(device.name) is not None:
                            self.remove(device.name)
                except CloneError:
                    continue

    def _change(self, doing: str, program: str, *arguments: str) -> None:
        try:
            self._lvm(doing, program, *arguments)
        finally:
            self.look_again()

    def _report(self, program: str, fields: str, *names: str) -> t.List[t.Dict[str, str]]:
        arguments = ("--reportformat", "json", "--units", "b", "--nosuffix", "-o", fields, *names)
        out = self._lvm(f"looking at volume group {self.group!r}", program, *arguments)
        kind = {"lvs": "lv", "vgs": "vg"}[program]
        return t.cast(t.List[t.Dict[str, str]], json.loads(out)["report"][0][kind])

    def _lvm(self, doing: str, program: str, *arguments: str) -> str:
        path = _process.find(program)
        if path is None:
            raise CloneError("MISSING_DEPENDENCY", f"pool {self.name!r}: {program} is not installed (package lvm2)")
        if os.geteuid() != 0:
            raise CloneError("OPERATION_DENIED", f"pool {self.name!r}: only root may ask LVM; use become")
        # Killed between suspending a device and resuming it, LVM would leave it so: whoever reads it then waits for ever.
        status, out, err = _process.run([path, *arguments], (), outlives=True)
        if status:
            text = " ".join(err.split())
            if "already exists" in text:
                raise FileExistsError(text)
            full = any(phrase in text.lower() for phrase in _LVM_FULL)
            raise CloneError("NO_SPACE" if full else "IO_ERROR", f"pool {self.name!r}: {doing} failed: {text or status}")
        return out


def _logical_volume(row: t.Mapping[str, str], thin_pools: t.Mapping[str, str]) -> Device:
    """What a line of lvs says.

    :param thin_pools: of every volume of the group, by name
    """
    size, origin, thin_pool = int(row["lv_size"]), row["origin"] or None, row["pool_lv"] or None
    if row["lv_attr"][:1] != "V":
        # Of a cached volume it is the pool of its cache.
        thin_pool = None
    capacity, allocation, needs = size, size, None
    if thin_pool:
        allocation = int(size * float(row["data_percent"] or 0) / 100)
        # A thin snapshot has its own reference to each block. A volume from outside the thin pool is read where it is.
        needs = origin if thin_pools.get(origin or "", thin_pool) != thin_pool else None
    elif origin:
        # The size of another snapshot is that of what changed since.
        capacity = int(row["origin_size"] or size)
        # One in brackets is LVM's own, of a volume that was made with --virtualsize.
        needs = origin = None if origin.startswith("[") else origin
    tags = tuple(tag for tag in row["lv_tags"].split(",") if tag.startswith(_GROWING))
    grown = [match for match in map(_FROM_TO.fullmatch, tags) if match and int(match.group(2)) == capacity]
    zero_from = max((int(match.group(1)) for match in grown), default=None)
    # Its thin pool may have been told not to zero new blocks (lvs(8), the eighth attribute).
    zeroes = thin_pool is not None and row["lv_attr"][7:8] == "z"
    return Device(
        row["lv_name"],
        row["lv_path"],
        capacity,
        origin,
        thin_pool,
        zero_from,
        tags,
        zeroes,
        allocation,
        needs,
        layout=row["lv_layout"],
        stripes=int(row["data_stripes"] or 1),
    )


class LunPool(DevicePool):
    """LUNs that exist: nothing is made, grown or deleted there."""


def _claimed(path: str) -> bool:
    """Whether the kernel has given the device to somebody who asked for it alone."""
    try:
        os.close(os.open(os.path.realpath(path), os.O_RDONLY | os.O_EXCL | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError as exc:
        return exc.errno == errno.EBUSY
    return False


#: by type of the pool
CLASSES: t.Dict[str, t.Type[DevicePool]] = {"logical": LogicalPool, "disk": DiskPool, "iscsi": LunPool, "scsi": LunPool}
