# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Block devices as targets: zeros where nothing is, and a mark where not all is there yet."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import typing as t

from .file_copy import write_zeros

_BLKZEROOUT = 0x127F  # _IO(0x12, 127), linux/fs.h
# Between two looks at the time: a device without a call for it is zeroed at the speed of writing.
_PIECE = 256 << 20
# Zeroed as a whole, so that a sector of any size is.
_BLOCK = 4096

#: The first block of a device that is being filled: whoever finds it knows that this is nobody's data. Written first, and
#: overwritten last.
MARK = b"virtforge.libvirt: this volume is not finished\n".ljust(_BLOCK, b"\0")


def is_marked(fd: int) -> bool:
    return os.pread(fd, len(MARK), 0) == MARK


def mark(fd: int) -> None:
    os.pwrite(fd, MARK, 0)
    os.fsync(fd)


def zero(fd: int, begin: int, end: int, watch: t.Callable[[], None]) -> None:
    """Have a block device read zeros from ``begin`` to ``end``, by the cheapest call that promises it.

    BLKZEROOUT has the device do it where it can (unmap, write same), and the kernel where not; BLKDISCARD promises nothing of
    what is read afterwards (``blkdev_issue_zeroout`` and ``blkdev_issue_discard`` in the kernel's block/blk-lib.c).
    """
    # What is not on whole blocks at either end is written.
    first, last = -(-begin // _BLOCK) * _BLOCK, end // _BLOCK * _BLOCK
    if first >= last:
        write_zeros(fd, begin, end, watch)
        return
    write_zeros(fd, begin, first, watch)
    for at in range(first, last, _PIECE):
        watch()
        length = min(_PIECE, last - at)
        try:
            fcntl.ioctl(fd, _BLKZEROOUT, struct.pack("=QQ", at, length))
        except OSError as exc:
            if exc.errno not in (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL):
                raise
            write_zeros(fd, at, at + length, watch)
    write_zeros(fd, last, end, watch)
