# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Copying the bytes of one open file into another, new and empty one.

Promise: when :func:`copy` returns, the target reads exactly as the source did, or an error was raised. Holes and blocks of
zeros of the source are holes in the target.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import typing as t

from .._errors import CloneError

_FICLONE = 0x40049409  # linux/fs.h; in Python's fcntl only since 3.12
_FS_IOC_FIEMAP = 0xC020660B
_FIEMAP_FLAG_SYNC = 1
_FIEMAP_EXTENT_LAST, _FIEMAP_EXTENT_SHARED = 0x1, 0x2000

# What ioctl_ficlone(2) and file systems without it answer when blocks cannot be shared. Any other error is a failure of
# the disk, not of the method: cp once went on after those and published torn copies (coreutils 9.2).
_CANNOT_SHARE = {
    errno.EOPNOTSUPP: "the file system cannot share blocks",
    errno.ENOTTY: "the file system cannot share blocks",
    errno.ENOSYS: "the file system cannot share blocks",
    errno.EXDEV: "source and target are on different file systems",
    errno.EINVAL: "the file system cannot share these blocks",
    errno.EPERM: "the file system does not permit to share blocks",
    errno.ETXTBSY: "the source is a swap file",
}
_CHUNK = 1 << 20
_BLOCK = 4096
_ZEROS = bytes(_CHUNK)


def share(source: int, target: int) -> t.Optional[str]:
    """Make the empty file ``target`` share all blocks of ``source``. Returns None, or the reason why it cannot be."""
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError as exc:
        if exc.errno in _CANNOT_SHARE:
            return _CANNOT_SHARE[exc.errno]
        raise
    if os.fstat(target).st_size != os.fstat(source).st_size:
        raise CloneError("IO_ERROR", "the file system said that it shared the blocks of the source, but did not")
    return None


def copy(source: int, target: int, size: int, watch: t.Callable[[], None]) -> None:
    """Copy the first ``size`` bytes by extents, leaving out zeros, and make the target exactly that long.

    :param watch: called between chunks; what it raises ends the copy
    :raises CloneError: ``IO_ERROR`` when the source ends early
    """
    os.ftruncate(target, size)
    for at, data in nonzero_data(source, 0, size, watch):
        _write_all(target, data, at)


def nonzero_data(fd: int, start: int, end: int, watch: t.Callable[[], None]) -> t.Iterator[t.Tuple[int, memoryview]]:
    """What is not zeros in ``[start, end)``, as (offset, data) in the order of the file. The data is valid until the next."""
    buffer = memoryview(bytearray(_CHUNK))
    for begin, stop in data_extents(fd, end, start):
        at = begin
        while at < stop:
            watch()
            got = os.preadv(fd, [buffer[: min(_CHUNK, stop - at)]], at)
            if got == 0:
                raise CloneError("IO_ERROR", f"the source ended at byte {at} of {end}: it changed while it was read")
            for offset, length in nonzero_runs(buffer[:got], at):
                yield at + offset, buffer[offset : offset + length]
            at += got


def data_extents(fd: int, size: int, start: int = 0) -> t.Iterator[t.Tuple[int, int]]:
    """Ranges of a file that may hold something else than zeros, up to ``size``.

    ENXIO is how ``lseek(2)`` says "no more data"; EINVAL that a device or file system cannot tell. No other error may be
    taken for the end of the data.
    """
    at = start
    while at < size:
        try:
            begin = os.lseek(fd, at, os.SEEK_DATA)
            end = os.lseek(fd, begin, os.SEEK_HOLE)
        except OSError as exc:
            if exc.errno == errno.ENXIO:
                return
            if exc.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            begin, end = at, size
        if begin >= size:
            return
        end = min(end, size)
        if end <= begin:
            # A file whose extents change under us could answer this for ever.
            end = min(begin + _BLOCK, size)
        yield begin, end
        at = end


def nonzero_runs(data: memoryview, position: int) -> t.Iterator[t.Tuple[int, int]]:
    """Runs (offset, length) of blocks that are not all zeros. Blocks are aligned in the file, not in the buffer."""
    size, begin, at = len(data), None, 0
    if data == _ZEROS[:size]:
        return
    while at < size:
        step = min(_BLOCK - (position + at) % _BLOCK, size - at)
        if data[at : at + step] == _ZEROS[:step]:
            if begin is not None:
                yield begin, at - begin
                begin = None
        elif begin is None:
            begin = at
        at += step
    if begin is not None:
        yield begin, size - begin


def _write_all(fd: int, data: memoryview, position: int) -> None:
    while len(data):
        written = os.pwrite(fd, data, position)
        if not 0 < written <= len(data):
            raise CloneError("IO_ERROR", f"the file system said that it wrote {written} of {len(data)} bytes")
        data, position = data[written:], position + written


def preallocate(fd: int, start: int, end: int, mode: str, watch: t.Callable[[], None]) -> None:
    """Back the bytes from ``start`` to ``end`` of a raw file by storage: ``falloc`` reserves blocks, ``full`` writes them too.

    :raises CloneError: ``NO_SUPPORT`` where the file system cannot reserve.
    """
    if mode == "off" or end <= start:
        return
    empty = list(_holes(fd, start, end)) if mode == "full" else []
    try:
        os.posix_fallocate(fd, start, end - start)
    except OSError as exc:
        if exc.errno in (errno.EOPNOTSUPP, errno.EINVAL):
            raise CloneError(
                "NO_SUPPORT", f"preallocation={mode} is not possible: the file system cannot reserve space"
            ) from exc
        raise
    for begin, stop in empty:
        write_zeros(fd, begin, stop, watch)


def write_zeros(fd: int, begin: int, end: int, watch: t.Callable[[], None]) -> None:
    """Write zeros, rather than have the file system make holes or mark blocks as unwritten."""
    for at in range(begin, end, _CHUNK):
        watch()
        _write_all(fd, memoryview(_ZEROS)[: min(_CHUNK, end - at)], at)


def _holes(fd: int, start: int, end: int) -> t.Iterator[t.Tuple[int, int]]:
    at = start
    for begin, stop in data_extents(fd, end, start):
        if begin > at:
            yield at, begin
        at = stop
    if at < end:
        yield at, end


def shares_blocks(fd: int) -> t.Optional[bool]:
    """Whether FIEMAP calls any data extent shared; None where the file system has no FIEMAP."""
    try:
        return any(shared for _begin, _end, shared in mapped_extents(fd))
    except OSError:
        return None


def mapped_extents(fd: int) -> t.Iterator[t.Tuple[int, int, bool]]:
    """Begin, end, and whether other files share it, of every extent that has blocks, unwritten ones too, by FIEMAP.

    :raises OSError: where the file system has no FIEMAP
    """
    at, count = 0, 512
    while True:
        request = struct.pack("=QQIIII", at, 2**64 - 1 - at, _FIEMAP_FLAG_SYNC, 0, count, 0)
        reply = bytearray(request + bytes(56 * count))
        fcntl.ioctl(fd, _FS_IOC_FIEMAP, reply)
        mapped = struct.unpack_from("=I", reply, 20)[0]
        flags = 0
        for index in range(mapped):
            logical, _physical, length = struct.unpack_from("=QQQ", reply, 32 + 56 * index)
            flags = struct.unpack_from("=I", reply, 32 + 56 * index + 40)[0]
            at = logical + length
            yield logical, at, bool(flags & _FIEMAP_EXTENT_SHARED)
        if mapped < count or flags & _FIEMAP_EXTENT_LAST:
            return


def allocated_size(fd: int, end: int) -> int:
    """Bytes up to ``end`` that lie in no hole."""
    return sum(stop - begin for begin, stop in data_extents(fd, end))


def data_size(fd: int, end: int, watch: t.Callable[[], None]) -> int:
    """Bytes up to ``end`` in blocks that are not all zeros: what a copy of them takes. Reads all of them."""
    return sum(len(data) for _offset, data in nonzero_data(fd, 0, end, watch))
