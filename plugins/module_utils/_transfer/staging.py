# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A new volume until it is whole: an unnamed file in its own directory, then a name.

Promise: until :meth:`Staging.publish` returns there is no volume of that name, or the old one is untouched; after it there is
the whole new one, durable. A process that is killed leaves nothing behind (``O_TMPFILE``), or, where a name was needed for a
moment, a dot-file that the next run removes.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import secrets
import stat
import typing as t

from .._errors import CloneError
from .._names import is_staged_name
from . import guards

_NO_TMPFILE = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOSYS)
_FS_IOC_GETFLAGS, _FS_IOC_SETFLAGS, _FS_NOCOW = 0x80086601, 0x40086602, 0x00800000
_RENAME_NOREPLACE = 1
_SELINUX = "security.selinux"


class Staging:
    """A new file in the directory that is open as ``directory``. Use as a context manager; without ``publish`` it vanishes."""

    def __init__(self, directory: int) -> None:
        self._directory = directory
        self._name: t.Optional[str] = None
        self.fd = -1

    def __enter__(self) -> Staging:
        sweep(self._directory)
        try:
            self.fd = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=self._directory)
        except OSError as exc:
            if exc.errno not in _NO_TMPFILE:
                raise
            self._open_named()
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._name is not None:
            os.unlink(self._name, dir_fd=self._directory)
            self._name = None
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _open_named(self) -> None:
        while True:
            name = f".virtforge-{secrets.token_hex(8)}.tmp"
            self.fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=self._directory)
            guards.sign(self.fd)
            # Another run's sweep may have come between the two calls above; then the file has no name any more.
            if os.fstat(self.fd).st_nlink:
                self._name = name
                return
            os.close(self.fd)

    def own(self, uid: int, gid: int, mode: int, label: t.Optional[str]) -> None:
        """Set owner, group, SELinux context and at last the mode, so that nobody reads who may not in the end."""
        status = os.fstat(self.fd)
        if (status.st_uid, status.st_gid) != (uid, gid):
            os.fchown(self.fd, uid, gid)
        if label is not None and label != get_label(self.fd):
            set_label(self.fd, label)
        os.fchmod(self.fd, mode)

    def publish(self, name: str, replace: bool) -> None:
        """Give the file, which is durable by now, its name, durably.

        :raises FileExistsError: when the name is taken and ``replace`` is not set
        """
        self.name(name, replace)
        os.fsync(self._directory)

    def name(self, name: str, replace: bool) -> None:
        """Give the file, which is durable by now, its name; for who sees to it himself that the name is durable after.

        :raises FileExistsError: when the name is taken and ``replace`` is not set
        """
        if replace:
            if self._name is None:
                self._link_staged()
            os.rename(t.cast(str, self._name), name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        elif self._name is None:
            link_open_file(self.fd, name, self._directory)
        else:
            _rename_noreplace(self._directory, self._name, name)
        self._name = None

    def _link_staged(self) -> None:
        # The lock comes before the name: a sweep must never find the file unlocked.
        guards.sign(self.fd)
        name = f".virtforge-{secrets.token_hex(8)}.tmp"
        link_open_file(self.fd, name, self._directory)
        self._name = name


def sync_all(files: t.Sequence[int]) -> None:
    """Make many files of one file system durable by one syncfs(2); where that fails, one by one, to know which one fails."""
    if len(files) < 3 or ctypes.CDLL(None, use_errno=True).syncfs(files[0]) != 0:
        for fd in files:
            os.fsync(fd)


def link_open_file(fd: int, name: str, directory: int) -> None:
    """linkat(2) of an unnamed file; the only way to give it a name that refuses an existing one."""
    os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=directory, follow_symlinks=True)


def _rename_noreplace(directory: int, old: str, new: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    renameat2 = getattr(libc, "renameat2", None)
    if renameat2 is not None:
        if renameat2(directory, os.fsencode(old), directory, os.fsencode(new), _RENAME_NOREPLACE) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise OSError(code, os.strerror(code))
    # NFS knows no flags here; a link refuses an existing name just as well.
    os.link(old, new, src_dir_fd=directory, dst_dir_fd=directory)
    os.unlink(old, dir_fd=directory)


def sweep(directory: int) -> None:
    """Remove staging files whose run is dead: their lock is free. Only regular files of our own user are touched."""
    for name in os.listdir(directory):
        if not is_staged_name(name):
            continue
        try:
            fd = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
        except OSError:
            continue
        try:
            status = os.fstat(fd)
            if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and guards.is_dead(fd):
                os.unlink(name, dir_fd=directory)
        except OSError:
            pass
        finally:
            os.close(fd)


def get_label(fd: int) -> t.Optional[str]:
    """The SELinux context of an open file, or None where it has none."""
    try:
        return os.getxattr(fd, _SELINUX).rstrip(b"\0").decode("utf-8", "replace")
    except OSError:
        return None


def set_label(fd: int, label: str) -> None:
    """Set the SELinux context of an open file.

    :raises CloneError: ``CONFIG_UNSUPPORTED`` where the file system keeps no such context
    """
    try:
        os.setxattr(fd, _SELINUX, label.encode("utf-8") + b"\0")
    except OSError as exc:
        if exc.errno in (errno.EOPNOTSUPP, errno.EINVAL):
            raise CloneError("CONFIG_UNSUPPORTED", f"the SELinux context {label!r} cannot be set: {exc.strerror}") from exc
        raise


def is_nocow(fd: int) -> bool:
    """Whether the file (or, for a new file, its directory before it) is exempt from copy-on-write: btrfs ``chattr +C``."""
    buffer = bytearray(8)
    try:
        fcntl.ioctl(fd, _FS_IOC_GETFLAGS, buffer)
    except OSError:
        return False
    return bool(int.from_bytes(buffer[:4], "little") & _FS_NOCOW)


def set_nocow(fd: int, wanted: bool) -> None:
    """Set or clear the flag on an empty file; btrfs ignores it on one with data.

    :raises CloneError: ``CONFIG_UNSUPPORTED`` where the file system has no such flag
    """
    if is_nocow(fd) == wanted:
        return
    buffer = bytearray(8)
    try:
        fcntl.ioctl(fd, _FS_IOC_GETFLAGS, buffer)
        flags = int.from_bytes(buffer[:4], "little")
        flags = flags | _FS_NOCOW if wanted else flags & ~_FS_NOCOW
        fcntl.ioctl(fd, _FS_IOC_SETFLAGS, flags.to_bytes(8, "little"))
    except OSError as exc:
        raise CloneError("CONFIG_UNSUPPORTED", f"nocow is not possible on this file system: {exc.strerror}") from exc
