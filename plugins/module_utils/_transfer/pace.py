# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""How fast bytes may move, and what they leave behind in the page cache."""

from __future__ import annotations

import ctypes
import os
import struct
import threading
import time
import typing as t

# syscall numbers are the same on all architectures since 2017
_SYS_CACHESTAT = 451
_WAIT_BEFORE, _WRITE, _WAIT_AFTER = 1, 2, 4  # sync_file_range(2)
_WINDOW = 32 << 20
_LIBC = ctypes.CDLL(None, use_errno=True)


class Rate:
    """At most so many bytes per second, of all who share it; None is no limit."""

    def __init__(self, limit: t.Optional[int]) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        self._free_at = 0.0

    def spend(self, count: int, watch: t.Callable[[], None]) -> None:
        """Wait until ``count`` more bytes may have moved."""
        if self.limit is None:
            return
        with self._lock:
            now = time.monotonic()
            self._free_at = max(self._free_at, now) + count / self.limit
            until = self._free_at
        while True:
            pause = until - time.monotonic()
            if pause <= 0:
                return
            watch()
            time.sleep(min(pause, 0.2))


class Cache:
    """Keeps a copy from driving everything else out of the page cache of a busy host.

    What is written is sent to the disk a window at a time and then forgotten, and so is what was read, unless it was in the
    cache before: a golden image that many machines boot from stays there.
    """

    def __init__(self, source: int, target: int) -> None:
        self._source, self._target = source, target
        self._window = -1
        self._keep = True
        self._written = -1

    def reach(self, position: int) -> None:
        """Everything before ``position`` was read and written."""
        window = position // _WINDOW
        if window == self._window:
            return
        self.leave()
        self._window = window
        # What readahead has already brought in is much less than half.
        self._keep = resident(self._source, window * _WINDOW, _WINDOW) * 2 >= _WINDOW

    def leave(self) -> None:
        """Be done with the present window: start writing it, and wait for the one before."""
        if self._window < 0:
            return
        start = self._window * _WINDOW
        if not self._keep:
            os.posix_fadvise(self._source, start, _WINDOW, os.POSIX_FADV_DONTNEED)
        _sync_range(self._target, start, _WRITE)
        self.settle()
        self._written = self._window

    def settle(self) -> None:
        """Forget what was written in the window before."""
        if self._written >= 0:
            start = self._written * _WINDOW
            _sync_range(self._target, start, _WAIT_BEFORE | _WRITE | _WAIT_AFTER)
            os.posix_fadvise(self._target, start, _WINDOW, os.POSIX_FADV_DONTNEED)
            self._written = -1


def _sync_range(fd: int, start: int, flags: int) -> None:
    # An error of the disk is fsync's to tell; this only decides when it writes.
    _LIBC.sync_file_range(fd, ctypes.c_int64(start), ctypes.c_int64(_WINDOW), ctypes.c_uint(flags))


def resident(fd: int, start: int, length: int) -> int:
    """Bytes of a file that are in the page cache; 0 where the kernel cannot tell (before Linux 6.5)."""
    wanted = ctypes.create_string_buffer(struct.pack("=QQ", start, length))
    found = ctypes.create_string_buffer(40)
    if _LIBC.syscall(_SYS_CACHESTAT, fd, wanted, found, 0) != 0:
        return 0
    return int(struct.unpack_from("=Q", found)[0]) * os.sysconf("SC_PAGE_SIZE")


def forget(fd: int) -> None:
    """Drop a file that was written out from the page cache."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
