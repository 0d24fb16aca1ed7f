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
from .pace import Cache, Rate

_FICLONE, _FICLONERANGE = 0x40049409, 0x4020940D  # linux/fs.h; in Python's fcntl only since 3.12
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
_MANY_ZEROS = bytes(65536)


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


def sharing_refused(source: int, target: int) -> t.Optional[str]:
    """Why the empty file ``target`` cannot share blocks of ``source``; None when it can. Tried with one block, and undone."""
    block = os.fstatvfs(target).f_bsize
    # Up to the end of the file is allowed whatever the length is; 0 says so.
    length = block if os.fstat(source).st_size >= block else 0
    try:
        fcntl.ioctl(target, _FICLONERANGE, struct.pack("=qQQQ", source, 0, length, 0))
    except OSError as exc:
        if exc.errno in _CANNOT_SHARE:
            return _CANNOT_SHARE[exc.errno]
        raise
    os.ftruncate(target, 0)
    return None


def copy(source: int, target: int, size: int, watch: t.Callable[[], None], rate: t.Optional[Rate] = None) -> None:
    """Copy the first ``size`` bytes by extents, leaving out zeros, and make the target exactly that long.

    :param watch: called between chunks; what it raises ends the copy
    :param rate: how fast
    :raises CloneError: ``IO_ERROR`` when the source ends early
    """
    os.ftruncate(target, size)
    cache = Cache(source, target)
    for at, data in nonzero_data(source, 0, size, watch, block_size(target), rate, cache.reach):
        write_all(target, data, at)
    cache.leave()
    cache.settle()


def block_size(fd: int) -> int:
    """The unit in bytes in which the file system leaves holes."""
    size = os.fstatvfs(fd).f_frsize
    return size if 512 <= size <= 65536 and not size & (size - 1) else _BLOCK


def nonzero_data(
    fd: int,
    start: int,
    end: int,
    watch: t.Callable[[], None],
    block: int = _BLOCK,
    rate: t.Optional[Rate] = None,
    reach: t.Callable[[int], None] = lambda at: None,
) -> t.Iterator[t.Tuple[int, memoryview]]:
    """What is not zeros in ``[start, end)``, as (offset, data) in the order of the file. The data is valid until the next.

    :param reach: called with the offset of all that is about to be read, zeros too
    """
    buffer = bytearray(_CHUNK)
    view = memoryview(buffer)
    for begin, stop in data_extents(fd, end, start):
        at = begin
        while at < stop:
            watch()
            reach(at)
            got = os.preadv(fd, [view[: min(_CHUNK - at % _CHUNK, stop - at)]], at)
            if got == 0:
                raise CloneError("IO_ERROR", f"the source ended at byte {at} of {end}: it changed while it was read")
            if rate is not None:
                rate.spend(got, watch)
            for offset, length in nonzero_runs(buffer, got, at, block):
                yield at + offset, view[offset : offset + length]
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


def nonzero_runs(buffer: bytearray, size: int, position: int, block: int = _BLOCK) -> t.Iterator[t.Tuple[int, int]]:
    """Runs (offset, length) of blocks that are not all zeros. Blocks are aligned in the file, not in the buffer."""
    # startswith() compares at the speed of memory, and ends at the first byte that differs; comparing memoryviews does not.
    zeros = _ZEROS[:block]
    begin, at = 0, -position % block
    while at < size:
        if not buffer.startswith(zeros if at + block <= size else _ZEROS[: size - at], at):
            at += block
            continue
        if at > begin:
            yield begin, at - begin
        at += block
        while buffer.startswith(_MANY_ZEROS, at, size):
            at += len(_MANY_ZEROS)
        begin = at
    if begin < size:
        yield begin, size - begin


def write_all(fd: int, data: memoryview, position: int) -> None:
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
        write_all(fd, memoryview(_ZEROS)[: min(_CHUNK, end - at)], at)


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


def unshared(fd: int, ranges: t.Sequence[t.Tuple[int, int]]) -> int:
    """Bytes in these ranges of a file, in order, that no other file shares."""
    shared = [(begin, end) for begin, end, is_shared in mapped_extents(fd) if is_shared]
    missing = sum(end - begin for begin, end in ranges)
    wanted = sorted(ranges)
    at = 0
    for begin, end in shared:
        while at < len(wanted) and wanted[at][1] <= begin:
            at += 1
        index = at
        while index < len(wanted) and wanted[index][0] < end:
            missing -= min(end, wanted[index][1]) - max(begin, wanted[index][0])
            index += 1
    return missing


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
