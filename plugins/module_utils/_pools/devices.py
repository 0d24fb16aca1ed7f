# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Pools of libvirt whose volumes are block devices of this host: logical volumes, partitions, LUNs.

libvirt is asked which volumes there are, and makes partitions. Logical volumes are made, renamed and grown by LVM's own
commands: libvirt has no call for the last two, and none that leaves a new one without its final name until it is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import stat
import typing as t
from contextlib import contextmanager
from dataclasses import dataclass

from .. import _process, _xml
from .._deadline import Deadline
from .._errors import CloneError
from .._names import is_staged_name
from .._transfer import guards, locks
from . import definition
from .definition import Definition
from .libvirt import LibvirtPool, translated

# A tag on a logical volume that is being grown: from which byte on it may show what the disk held before.
_GROWING = "virtforge_zero_from_"


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


class DevicePool(LibvirtPool):
    """A pool without a directory of its own. What it makes is described by its entry in ``capabilities``."""

    #: the unit in bytes in which it gives space to a volume
    granularity = 512
    #: what libvirt calls the type of its volumes
    volume_type = "block"

    def open(self) -> int:
        """There is nothing to open."""
        return -1

    def path_of(self, name: str) -> str:
        volume = self.volume(name)
        return volume.path if volume else os.path.join(self.path, name)

    def definition(self) -> Definition:
        return definition.parse(self.document(inactive=True))

    def lock_key(self, name: str) -> str:
        digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:32]
        return f"pool-{hashlib.sha256(os.fsencode(self.name)).hexdigest()[:32]}-{digest}"

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
        return Device(name, path, self._length(path))

    def _paths(self) -> t.List[str]:
        with translated(f"listing the volumes of pool {self.name!r}"):
            return [volume.path() for volume in self._pool.listAllVolumes(0)]

    def _length(self, path: str) -> int:
        """Of the device itself: what libvirt says of some is less than there is (one block, for iSCSI in 9.0)."""
        fd = os.open(os.path.realpath(path), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            return guards.length(fd)
        finally:
            os.close(fd)

    def available(self) -> int:
        return self.sizes()[2]

    def space_for(self, capacity: int, target: t.Optional[Device]) -> int:
        """Bytes that a volume of this capacity takes in place of ``target``."""
        return 0 if target is not None else capacity

    def next_name(self, taken: t.AbstractSet[str] = frozenset()) -> t.Optional[str]:
        """The only name that the next volume can have, once those in ``taken`` are made; None where it is free."""
        return None

    def cannot_write(self) -> str:
        return "" if os.geteuid() == 0 else f"pool {self.name!r}: only root may write to its devices; use become"

    def users_of(self, path: str) -> str:
        """Domains that have the device; or the kernel, for a mount, a volume group, a swap area, a device on top of it."""
        domains = self._connection.users_of_device(path)
        return domains or ("the kernel, which has it mounted or as part of another device" if _claimed(path) else "")

    def dependents(self, name: str) -> t.List[str]:
        """Names of the snapshots of a volume."""
        return []

    def make(self, name: str, capacity: int) -> None:
        """Make a volume; nobody has said yet what it reads as."""
        raise NotImplementedError

    def remove(self, name: str) -> None:
        with translated(f"deleting volume {name!r} of pool {self.name!r}"):
            self._pool.storageVolLookupByName(name).delete(0)


class DiskPool(DevicePool):
    """Partitions of one disk, made by libvirt and parted."""

    # parted places them at whole MiB.
    granularity = 1 << 20

    def next_name(self, taken: t.AbstractSet[str] = frozenset()) -> t.Optional[str]:
        """parted takes the lowest free number, and libvirt refuses any other name (virStorageBackendDiskMakeDataVol)."""
        device = os.path.basename(os.path.realpath(self.source_devices()[0]))
        # As the kernel names them: nvme0n1p1, loop0p1, sda1.
        stem = f"{device}p" if device[-1].isdigit() else device
        numbers = {
            int(match.group(1))
            for match in map(re.compile(rf"{re.escape(stem)}(\d+)").fullmatch, [*self._names(), *taken])
            if match
        }
        return stem + str(next(number for number in range(1, len(numbers) + 2) if number not in numbers))

    def source_devices(self) -> t.Tuple[str, ...]:
        return self.definition().source.devices

    def _names(self) -> t.List[str]:
        with translated(f"listing the volumes of pool {self.name!r}"):
            return t.cast(t.List[str], self._pool.listVolumes())

    def make(self, name: str, capacity: int) -> None:
        document = _xml.volume_xml(name=name, capacity=capacity, allocation=capacity)
        with translated(f"making volume {name!r} of pool {self.name!r}"):
            self._pool.createXML(document, 0)
        made = self.volume(name)
        if made is None or made.capacity < capacity:
            self.remove(name)
            found = made.capacity if made else 0
            raise CloneError("NO_SPACE", f"volume {name!r} of pool {self.name!r} came out with {found} bytes, not {capacity}")

    def remove(self, name: str) -> None:
        """By parted itself: libvirt asks it to remove "p1" of disks whose own name ends in a digit (9.0)."""
        number = re.search(r"\d+$", name)
        program = _process.find("parted")
        if program is None or number is None:
            raise CloneError("MISSING_DEPENDENCY", f"pool {self.name!r}: parted is not installed")
        status, _out, err = _process.run([program, "--script", self.source_devices()[0], "rm", number.group()], ())
        if status:
            text = " ".join(err.split())
            raise CloneError("IO_ERROR", f"deleting volume {name!r} of pool {self.name!r} failed: {text}")
        self.refresh(Deadline(60, "lock_timeout"))


class LogicalPool(DevicePool):
    """A volume group of LVM."""

    @property
    def group(self) -> str:
        described = self.definition()
        return described.source.name or self.name

    @property
    def granularity(self) -> int:  # type: ignore[override]
        return int(self._report("vgs", "vg_extent_size", self.group)[0]["vg_extent_size"])

    def available(self) -> int:
        return int(self._report("vgs", "vg_free", self.group)[0]["vg_free"])

    def volume(self, name: str) -> t.Optional[Device]:
        return next((device for device in self._devices() if device.name == name), None)

    def _paths(self) -> t.List[str]:
        return [device.path for device in self._devices()]

    def _devices(self) -> t.List[Device]:
        """What LVM knows: libvirt learns of what others made only when it looks again."""
        fields = "lv_name,lv_path,lv_size,lv_attr,origin,pool_lv,lv_tags"
        found = []
        for row in self._report("lvs", fields, self.group):
            # The first attribute tells pools, metadata and the parts of mirrors from what has data of its own (lvs(8)).
            if row["lv_attr"][0] in "-oOmMrRsSV" and row["lv_path"]:
                tags = (tag for tag in row["lv_tags"].split(",") if tag.startswith(_GROWING))
                zero_from = next((int(tag[len(_GROWING) :]) for tag in tags), None)
                found.append(
                    Device(
                        row["lv_name"],
                        row["lv_path"],
                        int(row["lv_size"]),
                        row["origin"] or None,
                        row["pool_lv"] or None,
                        zero_from,
                    )
                )
        return found

    def space_for(self, capacity: int, target: t.Optional[Device]) -> int:
        # The old one is there until the new one is whole.
        return 0 if target is not None and target.thin_pool else capacity

    def dependents(self, name: str) -> t.List[str]:
        return [device.name for device in self._devices() if device.origin == name]

    @contextmanager
    def staged(self, capacity: int, like: t.Optional[Device]) -> t.Iterator[Device]:
        """A new volume under a name that the next run knows as unfinished; it goes where it was not published.

        :param like: a volume whose thin pool shall also hold the new one
        """
        self._sweep()
        name = f".virtforge-{secrets.token_hex(8)}.tmp"
        with locks.Locks([], [self.lock_key(name)], Deadline(60, "lock_timeout"), "making a logical volume"):
            try:
                if like is not None and like.thin_pool:
                    size = ["-V", f"{capacity}b", "--thinpool", like.thin_pool]
                else:
                    # -Zn -Wn: we zero it ourselves, and whatever signature it had before with that.
                    size = ["-L", f"{capacity}b", "-Zn", "-Wn"]
                self._lvm("making a logical volume", "lvcreate", "-y", "-q", "-n", name, *size, self.group)
                device = self.volume(name)
                if device is None:
                    raise CloneError("IO_ERROR", f"pool {self.name!r}: lvcreate made no volume")
                yield device
            finally:
                if self.volume(name) is not None:
                    self.remove(name)

    def publish(self, staged: str, name: str, replaces: bool) -> None:
        """Give a staged volume its name.

        :raises FileExistsError: when the name is taken and ``replaces`` is not set
        """
        old = f".virtforge-{secrets.token_hex(8)}.tmp"
        if self.volume(name) is not None:
            if not replaces:
                raise FileExistsError(name)
            # Killed in between, there is none, and the next run makes one.
            self._rename(name, old)
        try:
            self._rename(staged, name)
        except BaseException:
            if replaces and self.volume(name) is None:
                self._rename(old, name)
            raise
        if replaces:
            self.remove(old)

    def _rename(self, name: str, other: str) -> None:
        self._lvm(f"naming the logical volume {other!r}", "lvrename", "-q", self.group, name, other)

    def remove(self, name: str) -> None:
        self._lvm(f"deleting the logical volume {name!r}", "lvremove", "-f", "-q", f"{self.group}/{name}")

    def grow(self, device: Device, capacity: int) -> None:
        """What is added reads as it did on the disk, until :meth:`zeroed`: a tag says so, whatever happens."""
        where = f"{self.group}/{device.name}"
        if not device.thin_pool and device.zero_from is None:
            self._lvm(f"growing {where}", "lvchange", "-q", "--addtag", f"{_GROWING}{device.capacity}", where)
        self._lvm(f"growing {where}", "lvextend", "-q", "-L", f"{capacity}b", where)

    def zeroed(self, device: Device) -> None:
        if device.zero_from is not None:
            where = f"{self.group}/{device.name}"
            self._lvm(f"growing {where}", "lvchange", "-q", "--deltag", f"{_GROWING}{device.zero_from}", where)

    def _sweep(self) -> None:
        """Delete what runs that are dead have left unfinished: their lock is free."""
        for device in self._devices():
            if is_staged_name(device.name):
                try:
                    with locks.Locks([], [self.lock_key(device.name)], Deadline(0, "lock_timeout"), ""):
                        if self.volume(device.name) is not None:
                            self.remove(device.name)
                except CloneError:
                    continue

    def _report(self, program: str, fields: str, *names: str) -> t.List[t.Dict[str, str]]:
        arguments = ("--reportformat", "json", "--units", "b", "--nosuffix", "-o", fields, *names)
        out = self._lvm(f"looking at volume group {self.group!r}", program, *arguments)
        kind = {"lvs": "lv", "vgs": "vg"}[program]
        return t.cast(t.List[t.Dict[str, str]], json.loads(out)["report"][0][kind])

    def _lvm(self, doing: str, program: str, *arguments: str) -> str:
        path = _process.find(program)
        if path is None:
            raise CloneError("MISSING_DEPENDENCY", f"pool {self.name!r}: {program} is not installed (package lvm2)")
        status, out, err = _process.run([path, *arguments], ())
        if status:
            text = " ".join(err.split())
            if "already exists" in text:
                raise FileExistsError(text)
            full = "insufficient free space" in text.lower() or "not enough free" in text.lower()
            raise CloneError("NO_SPACE" if full else "IO_ERROR", f"pool {self.name!r}: {doing} failed: {text or status}")
        return out


class LunPool(DevicePool):
    """LUNs that exist: nothing is made, grown or deleted there."""


def _claimed(path: str) -> bool:
    """Whether the kernel has given the device to somebody who asked for it alone."""
    try:
        os.close(os.open(os.path.realpath(path), os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError:
        return os.path.exists(path) and stat.S_ISBLK(os.stat(path).st_mode)
    return False


#: by type of the pool
CLASSES: t.Dict[str, t.Type[DevicePool]] = {"logical": LogicalPool, "disk": DiskPool, "iscsi": LunPool, "scsi": LunPool}
