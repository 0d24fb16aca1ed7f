# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Who else has a file open, and holding a source still while it is read.

Four witnesses, because each sees what the others miss: file leases (any local process, fcntl(2)), the lock bytes of qemu's
``block/file-posix.c`` (also across hosts on a shared file system), the descriptors under ``/proc`` (block devices, and
files that this user does not own), and the kernel's count of what is written to a block device.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import signal
import stat
import struct
import sys
import threading
import time
import typing as t

from .._errors import CloneError

_F_OFD_GETLK, _F_OFD_SETLK, _F_OFD_SETLKW = 36, 37, 38  # in Python's fcntl only since 3.9
# qemu locks byte 100 + n for a permission that it uses, 200 + n for one that it does not share:
# 0 consistent read, 1 write, 2 write unchanged, 3 resize.
_READER = (100, 201, 203)
_WRITERS = (101, 103, 200)
_OWNER = (100, 101, 103, 201, 203)
_ANYBODY = (100, 101, 103, 200, 201, 203)
_SIGN = 1 << 62
_BLKGETSIZE64 = 0x80081272
_NFS = 0x6969
# Seconds for which who has a device open for writing is not taken for a user of it.
_MOMENT = 1.0


def writers(fd: int) -> str:
    """Who has the file open for writing, as a phrase for a message; empty when nobody has."""
    return _others(fd, _WRITERS, fcntl.F_RDLCK, writing=True)


def users(fd: int) -> str:
    """Who else has the file open at all, as a phrase for a message; empty when nobody has."""
    return _others(fd, _ANYBODY, fcntl.F_WRLCK, writing=False)


def _others(fd: int, lock_bytes: t.Iterable[int], lease: int, writing: bool) -> str:
    """qemu's locks tell of other hosts too; a lease is refused while anybody here has the file open; /proc knows names."""
    if _qemu_holds(fd, lock_bytes):
        return _who(fd, writing) or "another qemu process"
    free = _lease_free(fd, lease)
    if free:
        return ""
    # Where leases cannot tell, only the processes that this user may see count.
    return _who(fd, writing) or ("" if free is None else "another process")


class Hold:
    """Keeps writers away from open source files, and notices one that comes all the same.

    :param files: descriptor and name of every layer, and its :func:`version` when it was first looked at
    """

    def __init__(self, files: t.Sequence[t.Tuple[int, str, t.Tuple[int, ...]]]) -> None:
        self._files = files
        self._leased: t.List[t.Tuple[int, str]] = []

    def __enter__(self) -> Hold:
        _ignore_sigio()
        try:
            for fd, name, before in self._files:
                for byte in _READER:
                    _set_lock(fd, fcntl.F_RDLCK, byte)
                who = writers(fd)
                if not who and stat.S_ISREG(os.fstat(fd).st_mode):
                    try:
                        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
                        self._leased.append((fd, name))
                    except OSError as exc:
                        who = "another process" if exc.errno == errno.EAGAIN and file_system(fd) != _NFS else ""
                if who:
                    raise CloneError("IN_USE", f"{name} is open for writing by {who}")
                if version(fd) != before:
                    raise CloneError("IN_USE", f"{name} was changed after it was looked at")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_exc: object) -> None:
        while self._leased:
            try:
                fcntl.fcntl(self._leased.pop()[0], fcntl.F_SETLEASE, fcntl.F_UNLCK)
            except OSError:
                # The kernel takes a lease back after 45 s (lease-break-time); then there is none to give up.
                pass
        for fd, _name, _before in self._files:
            for byte in _READER:
                _set_lock(fd, fcntl.F_UNLCK, byte)

    def check(self) -> None:
        """Raise ``IN_USE`` when somebody has begun to open a source for writing: he waits until we let go."""
        for fd, name in self._leased:
            if fcntl.fcntl(fd, fcntl.F_GETLEASE) != fcntl.F_RDLCK:
                raise CloneError("IN_USE", f"{name} was opened for writing while it was read")

    def finish(self) -> None:
        """Raise ``IN_USE`` unless every source is what it was when it was looked at. For before anything is published.

        A lease has kept the content; then a new name, owner or attribute, as libvirt gives to the base of a domain that starts,
        is no matter. Devices have no leases: who has one open for writing now is asked again.
        """
        self.check()
        leased = [fd for fd, _name in self._leased]
        for fd, name, before in self._files:
            who = _lasting_writers(fd) if stat.S_ISBLK(os.fstat(fd).st_mode) else ""
            if who:
                raise CloneError("IN_USE", f"{name} was opened for writing by {who} while it was read")
            if version(fd)[:2] != before[:2] or (fd not in leased and version(fd) != before):
                raise CloneError("IN_USE", f"{name} changed while it was read")
            if os.fstat(fd).st_nlink == 0:
                raise CloneError("IN_USE", f"{name} was replaced or deleted while it was read")


def version(fd: int) -> t.Tuple[int, ...]:
    """Something that changes when a file or a device of this host is written to; empty for anything else.

    The page cache of a device is written back first: what waits there would count as written later, whenever it came.
    """
    status = os.fstat(fd)
    if stat.S_ISREG(status.st_mode):
        return (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    if not stat.S_ISBLK(status.st_mode):
        return ()
    try:
        os.fsync(fd)
    except OSError:
        # Who reads it is told of a device that fails.
        pass
    return (length(fd), *_written(status.st_rdev))


def _written(device: int) -> t.Tuple[int, ...]:
    """Sectors written to a block device, and sectors discarded, since there is that device; empty where nobody counts.

    Fields 7 and 14 of the kernel's Documentation/block/stat.rst; the latter is there since Linux 4.18.
    """
    try:
        with open(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat", encoding="ascii") as file:
            fields = file.read().split()
        return tuple(int(field) for field in (*fields[6:7], *fields[13:14]))
    except (OSError, ValueError):
        return ()


def _lasting_writers(fd: int) -> str:
    """Writers of a device, but for one who lets go of it within a moment, as parted does: what he wrote is counted."""
    end = time.monotonic() + _MOMENT
    who = writers(fd)
    while who and time.monotonic() < end:
        time.sleep(0.05)
        who = writers(fd)
    return who


def claim(fd: int) -> None:
    """Have qemu refuse to open a raw file that is about to grow, as another qemu would; ends when the file is closed."""
    for byte in _OWNER:
        _set_lock(fd, fcntl.F_RDLCK, byte)


def sign(fd: int) -> None:
    """Lock a file that this process has open for writing, as a sign that it is alive; ends when the file is closed.

    One byte that no file reaches: NFS and GlusterFS take flock(2) for a lock on all bytes, which would keep qemu's out.
    """
    try:
        fcntl.fcntl(fd, _F_OFD_SETLKW, _flock(fcntl.F_WRLCK, _SIGN))
    except OSError:
        # Where there are no locks, is_dead() finds nobody dead.
        pass


def is_dead(fd: int) -> bool:
    """Whether who signed a file, which this process has open for writing, is no more; signs it."""
    try:
        fcntl.fcntl(fd, _F_OFD_SETLK, _flock(fcntl.F_WRLCK, _SIGN))
    except OSError:
        return False
    return True


def file_system(fd: int) -> int:
    """The file system's magic number, ``f_type`` of statfs(2), which Python's statvfs does not have."""
    buffer = (ctypes.c_long * 32)()
    libc = ctypes.CDLL(None, use_errno=True)
    return buffer[0] & 0xFFFFFFFF if libc.fstatfs(fd, buffer) == 0 else 0


def length(fd: int) -> int:
    """Length in bytes of a regular file or block device."""
    status = os.fstat(fd)
    if stat.S_ISBLK(status.st_mode):
        return int.from_bytes(fcntl.ioctl(fd, _BLKGETSIZE64, bytes(8)), sys.byteorder)
    return status.st_size


def _flock(kind: int, byte: int) -> bytes:
    return struct.pack("hhqqi4x", kind, os.SEEK_SET, byte, 1, 0)


def _set_lock(fd: int, kind: int, byte: int) -> None:
    try:
        fcntl.fcntl(fd, _F_OFD_SETLK, _flock(kind, byte))
    except OSError:
        # No locks on this file system, or somebody excludes readers: writers() tells which.
        pass


def _qemu_holds(fd: int, lock_bytes: t.Iterable[int]) -> bool:
    for byte in lock_bytes:
        try:
            reply = fcntl.fcntl(fd, _F_OFD_GETLK, _flock(fcntl.F_WRLCK, byte))
        except OSError:
            return False
        if struct.unpack_from("h", reply)[0] != fcntl.F_UNLCK:
            return True
    return False


def _ignore_sigio() -> None:
    """The kernel announces the end of a lease by SIGIO, which would end the process; Hold.check() asks instead."""
    # Only the main thread may say so, and it has looked at something before it has workers.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGIO, signal.SIG_IGN)


def _lease_free(fd: int, kind: int) -> t.Optional[bool]:
    """Whether a lease of this kind can be had right now; None where leases cannot tell."""
    _ignore_sigio()
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, kind)
    except OSError as exc:
        # NFS answers that too, to whoever has no delegation from its server (nfs4_add_lease in the kernel).
        return False if exc.errno == errno.EAGAIN and file_system(fd) != _NFS else None
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return True


def openers(files: t.AbstractSet[t.Tuple[int, ...]]) -> t.Dict[t.Tuple[int, ...], t.List[str]]:
    """Other processes that have any of the files open, as far as this user may see them.

    One pass over /proc for all of them: that is most of what :func:`users` costs.

    :param files: device and inode of a file, the device number alone of a block device
    """
    found: t.Dict[t.Tuple[int, ...], t.List[str]] = {}
    for pid, numbers in _descriptors():
        opened = set()
        for number in numbers:
            try:
                status = os.stat(f"/proc/{pid}/fd/{number}")
            except OSError:
                continue
            opened.add(_identity(status))
        for identity in opened & files:
            found.setdefault(identity, []).append(f"{_command(pid)} (pid {pid})")
    return found


def held_by_qemu(fd: int) -> bool:
    """Whether any qemu, maybe on another host, has its locks on the file."""
    return _qemu_holds(fd, _ANYBODY)


def _who(fd: int, writing: bool) -> str:
    """Processes that have the same file or device open, as far as this user may see them."""
    wanted = _identity(os.fstat(fd))
    found = []
    for pid, numbers in _descriptors():
        if any(_has_open(pid, number, wanted, writing) for number in numbers):
            found.append(f"{_command(pid)} (pid {pid})")
    return ", ".join(found[:3])


def _identity(status: os.stat_result) -> t.Tuple[int, ...]:
    return (status.st_rdev,) if stat.S_ISBLK(status.st_mode) else (status.st_dev, status.st_ino)


def _descriptors() -> t.Iterator[t.Tuple[str, t.List[str]]]:
    """Process and numbers of its open files, for every process but this one that this user may look into."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        if int(pid) == os.getpid():
            continue
        try:
            yield pid, os.listdir(f"/proc/{pid}/fd")
        except OSError:
            continue


def _has_open(pid: str, number: str, wanted: t.Tuple[int, ...], writing: bool) -> bool:
    try:
        if _identity(os.stat(f"/proc/{pid}/fd/{number}")) != wanted:
            return False
        if not writing:
            return True
        with open(f"/proc/{pid}/fdinfo/{number}", encoding="ascii", errors="replace") as info:
            flags = next((int(line.split()[1], 8) for line in info if line.startswith("flags:")), 0)
        return flags & os.O_ACCMODE != os.O_RDONLY
    except (OSError, ValueError, IndexError):
        return False


def _command(pid: str) -> str:
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as name:
            return name.read().strip()
    except OSError:
        return "a process"
