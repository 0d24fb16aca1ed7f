# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a block device holds, to know whether it may be formatted. Reads only."""

from __future__ import annotations

import errno
import os
import stat
import time
import typing as t
from dataclasses import dataclass

from .. import _process
from .._errors import CloneError, from_os_error
from .._transfer.guards import length, users

_PIECE = 1 << 20
# Up to this size a device is read from end to end, a larger one in so many places between its ends.
_WHOLE = 1 << 30
_PLACES = 256
_ATTEMPTS, _PAUSE = 10, 0.2
# libblkid's name of a file system or a partition table, where libvirt has another.
_NAMES = {"hfsplus": "hfs+", "sgi": "dvh"}


@dataclass(frozen=True)
class Found:
    """``format`` of what is alone on the device: a file system, a partition table, or lvm2 with its volume ``group``.

    ``holds`` and ``claimed`` in words, empty for nothing.
    """

    format: str = ""
    group: str = ""
    holds: str = ""
    claimed: str = ""


def examine(path: str, builds: str, wanted: str) -> Found:
    """What the device holds.

    It counts as empty when libblkid finds no signature, no partition table among them, and there are only zeros wherever it is
    read: libblkid does not know everything.

    :param builds: what shall be made on it: a file system, a partition table, a volume group
    :param wanted: the format that it shall get
    :raises CloneError: ``INVALID_ARG`` for what is no block device, ``MISSING_DEPENDENCY`` where nobody could format it
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as exc:
        raise from_os_error(exc, f"opening the device {path!r} (pool_source.devices)") from exc
    try:
        if not stat.S_ISBLK(os.fstat(fd).st_mode):
            raise CloneError("INVALID_ARG", f"pool_source.devices: {path!r} is no block device, and build formats nothing else")
        found = _signatures(fd, path)
        if found.holds:
            return found
        if not _zeros(fd, path):
            return Found(holds="data that is no known format")
        user = _user(fd)
    finally:
        os.close(fd)
    needed = {"file system": f"mkfs.{wanted}", "partition table": "parted", "volume group": "vgcreate"}[builds]
    if _process.find(needed) is None:
        raise CloneError("MISSING_DEPENDENCY", f"pool_source.format: {wanted!r} needs {needed} on the managed host")
    return Found(claimed=f"is open by {user}" if user else _claimed(path))


def _signatures(fd: int, path: str) -> Found:
    program = _process.find("blkid")
    if program is None:
        raise CloneError("MISSING_DEPENDENCY", "build needs blkid (util-linux) on the managed host")
    status, out, err = _process.run([program, "-p", "-o", "export", f"/proc/self/fd/{fd}"], [fd])
    values = dict(line.split("=", 1) for line in out.splitlines() if "=" in line)
    # blkid(8): 2 is nothing found, 8 more than one thing.
    if status == 8:
        return Found(holds="several signatures of file systems or partition tables")
    if status == 0 and values.get("PTTYPE"):
        name = _NAMES.get(values["PTTYPE"], values["PTTYPE"])
        return Found(format=name, holds=f"a partition table ({name})")
    if status == 0 and values.get("USAGE") == "filesystem":
        name = _NAMES.get(values.get("TYPE", ""), values.get("TYPE", ""))
        return Found(format=name, holds=f"a file system ({name})")
    if status == 0 and values.get("TYPE") == "LVM2_member":
        group = volume_group(path)
        return Found(format="lvm2", group=group, holds="a physical volume (LVM2_member)" + (f" of {group!r}" if group else ""))
    if status == 0:
        return Found(holds=f"a signature ({values.get('TYPE', 'unknown')})")
    if status != 2:
        raise CloneError("IO_ERROR", f"blkid failed on the device {path!r}: {' '.join(err.split())[:200] or status}")
    return Found()


def volume_group(path: str) -> str:
    """That of a physical volume, empty for none."""
    return _lvm("pvs", "-o", "vg_name", path)


def is_volume_group(name: str) -> bool:
    return _lvm("vgs", "-o", "vg_name", name) != ""


def _lvm(command: str, *arguments: str) -> str:
    """What LVM says of one thing; empty where there is no such thing, or no LVM. Read-only, it takes no lock either."""
    program = _process.find(command)
    if program is None:
        return ""
    status, out, _err = _process.run([program, "--readonly", "--noheadings", *arguments], [])
    return out.strip() if status == 0 else ""


def _zeros(fd: int, path: str) -> bool:
    size = length(fd)
    last = max(0, size - _PIECE)
    places: t.Iterable[int] = range(0, size, _PIECE)
    if size > _WHOLE:
        places = (last * place // (_PLACES + 1) for place in range(_PLACES + 2))
    return all(_zeros_at(fd, at, min(at + _PIECE, size), path) for at in places)


def _zeros_at(fd: int, at: int, end: int, path: str) -> bool:
    while at < end:
        piece = os.pread(fd, end - at, at)
        if not piece:
            raise CloneError("IO_ERROR", f"the device {path!r} (pool_source.devices) ends at {at}, before its size")
        # By memcmp(3): counting zeros takes ten times as long.
        if piece != bytes(len(piece)):
            return False
        at += len(piece)
    return True


def _user(fd: int) -> str:
    """Who has the device open, which asking for it alone does not tell of one who has not: qemu, for one."""
    for _attempt in range(_ATTEMPTS):
        user = users(fd)
        if not user:
            break
        # udev looks into a device that was just made, for a moment.
        time.sleep(_PAUSE)
    return user


def _claimed(path: str) -> str:
    """The kernel gives a device to one at a time who asks for it alone: a mount, a volume group, a swap area."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as exc:
        if exc.errno != errno.EBUSY:
            raise from_os_error(exc, f"opening the device {path!r} (pool_source.devices)") from exc
        return "is in use: mounted, or part of another device"
    return ""
