# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Overwriting a file or block device before it is deleted, by libvirt's algorithms (``virStorageBackendVolWipeLocalFile`` in
storage_util.c).

Promise: when :func:`wipe` returns, every block that it had reads as the algorithm leaves it, and is so on disk; what
:func:`kept` speaks of is the exception.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import struct
import typing as t

from .. import _process
from .._errors import CloneError
from . import file_copy, guards

# File systems by statfs(2) that write elsewhere instead of overwriting: btrfs, ZFS, bcachefs, F2FS, NILFS2.
_LOG_STRUCTURED = (0x9123683E, 0x2FC12FC1, 0xCA451A4E, 0xF2F52010, 0x3434)
_BLKDISCARD = 0x1277  # _IO(0x12, 119), linux/fs.h
_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 1, 2


def scrub_program(algorithm: str) -> str:
    """Where the program is that an algorithm needs; empty for one that needs none.

    :raises CloneError: ``MISSING_DEPENDENCY`` when it is not installed
    """
    if algorithm in ("zero", "trim"):
        return ""
    program = _process.find("scrub")
    if program is None:
        raise CloneError(
            "MISSING_DEPENDENCY", f"wipe_algorithm={algorithm} needs the program scrub (package scrub) on the managed host"
        )
    return program


def kept(fd: int) -> str:
    """Why old bytes of the file stay on the disk although they are overwritten; empty where they do not."""
    if file_copy.shares_blocks(fd):
        return "other files share some of its blocks"
    return "the file system writes elsewhere instead of overwriting" if guards.file_system(fd) in _LOG_STRUCTURED else ""


def holes(fd: int) -> int:
    """Bytes that a pattern over the whole length would have to allocate: scrub knows no holes."""
    status = os.fstat(fd)
    return max(status.st_size - status.st_blocks * 512, 0)


def wipe(fd: int, algorithm: str, what: str, watch: t.Callable[[], None]) -> None:
    """Overwrite all of a file or block device that is open for writing.

    :param watch: called between chunks; what it raises ends the wiping
    :raises CloneError: ``NO_SUPPORT`` where the file system or device cannot trim
    """
    block = stat.S_ISBLK(os.fstat(fd).st_mode)
    if algorithm == "zero" and block:
        # Not by a call that may have the device forget the blocks instead: they are to be overwritten.
        file_copy.write_zeros(fd, 0, guards.length(fd), watch)
    elif algorithm == "trim" and block:
        _discard(fd, what)
    elif algorithm == "zero":
        for begin, end in _extents(fd):
            file_copy.write_zeros(fd, begin, end, watch)
    elif algorithm == "trim":
        _punch(fd, os.fstat(fd).st_size, what)
    else:
        _scrub(fd, algorithm, what, watch)
    os.fsync(fd)


def _extents(fd: int) -> t.Iterator[t.Tuple[int, int]]:
    """What is allocated, up to the length of the file.

    Unwritten extents too, which SEEK_DATA may call holes: a guest that discards makes them out of blocks with data.
    """
    size = os.fstat(fd).st_size
    try:
        extents = [(begin, min(end, size)) for begin, end, _shared in file_copy.mapped_extents(fd)]
    except OSError:
        # No FIEMAP: tmpfs, NFS.
        return file_copy.data_extents(fd, size)
    return iter(extents)


def _punch(fd: int, size: int, what: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    fallocate = getattr(libc, "fallocate64", libc.fallocate)
    fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    if size and fallocate(fd, _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE, 0, size) != 0:
        code = ctypes.get_errno()
        if code in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise CloneError("NO_SUPPORT", f"{what} cannot be wiped by wipe_algorithm=trim: its file system cannot trim files")
        raise OSError(code, os.strerror(code))


def _discard(fd: int, what: str) -> None:
    try:
        fcntl.ioctl(fd, _BLKDISCARD, struct.pack("=QQ", 0, guards.length(fd)))
    except OSError as exc:
        if exc.errno in (errno.EOPNOTSUPP, errno.ENOTTY):
            raise CloneError("NO_SUPPORT", f"{what} cannot be wiped by wipe_algorithm=trim: its device cannot trim") from exc
        raise


def _scrub(fd: int, algorithm: str, what: str, watch: t.Callable[[], None]) -> None:
    target = f"/proc/self/fd/{fd}"
    if stat.S_ISBLK(os.fstat(fd).st_mode):
        # By a link it takes a device for an empty file, and succeeds (scrub 2.6).
        target = os.readlink(target)
    # As libvirt does; -f also goes on with a file that bears the signature of a scrub that was killed.
    command = [scrub_program(algorithm), "-f", "-p", algorithm, target]
    status, _out, err = _process.run(command, [fd], watch)
    if status != 0 or ("is zero length" in err and guards.length(fd)):
        why = err.strip().splitlines()[-1].replace(target, what) if err.strip() else f"exit status {status}"
        code = "NO_SPACE" if "No space left" in why or "quota exceeded" in why else "IO_ERROR"
        raise CloneError(code, f"wiping {what} failed: {why}")
