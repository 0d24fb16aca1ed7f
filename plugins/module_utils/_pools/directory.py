# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A pool that is a directory, with or without libvirt knowing of it. Its volumes are the regular files in it."""

from __future__ import annotations

import os
import re
import stat
import typing as t

from .._deadline import Deadline
from .._errors import CloneError, from_os_error
from .._transfer import locks


class DirectoryPool:
    """A directory on this host, held open: whatever its path comes to mean later, volumes are made where we looked.

    :param name: the pool as the task names it
    :param path: an absolute directory
    """

    type = "directory"

    def __init__(self, name: str, path: str) -> None:
        self.name = name
        self.path = os.path.normpath(path)
        self._fd = -1

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @property
    def fd(self) -> int:
        """The directory, opened."""
        return self.open()

    def open(self) -> int:
        """Open the directory, unless it is open.

        :raises CloneError: ``NO_STORAGE_POOL`` when there is none
        """
        if self._fd < 0:
            try:
                self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except FileNotFoundError as exc:
                raise CloneError("NO_STORAGE_POOL", f"pool {self.name!r}: the directory {self.path!r} does not exist") from exc
            except PermissionError as exc:
                # A pool like /var/lib/libvirt/images, mode 0711, can be passed through though not be listed.
                try:
                    self._fd = os.open(self.path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
                except OSError:
                    raise from_os_error(exc, f"opening pool {self.name!r}, {self.path!r},") from exc
            except NotADirectoryError as exc:
                raise CloneError("INVALID_ARG", f"pool {self.name!r}: {self.path!r} is not a directory") from exc
            except OSError as exc:
                raise from_os_error(exc, f"opening pool {self.name!r}, {self.path!r},") from exc
        return self._fd

    def path_of(self, name: str) -> str:
        return os.path.join(self.path, name)

    def lock_key(self, name: str) -> str:
        """Of the lock that a run holds while it makes or changes a volume."""
        return locks.key(os.fstat(self.fd), name)

    def lstat(self, name: str) -> t.Optional[os.stat_result]:
        """What has that name in the pool, a symbolic link itself; None for nothing."""
        try:
            return os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return None
        except PermissionError as exc:
            raise CloneError(
                "OPERATION_DENIED", f"pool {self.name!r}: this user may not look into {self.path!r}; use become"
            ) from exc

    def names_of(self, status: os.stat_result) -> t.List[t.Tuple[str, int]]:
        """Every name that a file has in the pool, and how many it has in all; none where this user may not list it."""
        try:
            with os.scandir(self.fd) as listed:
                known = [(item.name, self.lstat(item.name)) for item in listed]
        except OSError:
            return []
        return [(name, found.st_nlink) for name, found in known if found is not None and os.path.samestat(found, status)]

    def contains(self, path: str) -> bool:
        """Whether the real path ``path`` is a file directly in this pool."""
        return os.path.dirname(path) == os.path.realpath(self.path)

    def available(self) -> int:
        """Free bytes for this user."""
        status = os.fstatvfs(self.fd)
        blocks = status.f_bfree if os.geteuid() == 0 else status.f_bavail
        return blocks * status.f_frsize

    def denied(self) -> str:
        """Why this user may not change the pool; empty when he may."""
        # Reading too: a new volume is durable once its directory was opened and written out.
        if os.access(self.path, os.R_OK | os.W_OK | os.X_OK, effective_ids=True):
            return ""
        return f"pool {self.name!r}: this user may not write to {self.path!r}; use become"

    def users_of(self, path: str) -> str:
        """Domains that use a volume; empty for none, or where nobody can tell."""
        return ""

    def lists(self, *names: str) -> bool:
        """Whether everybody who asks for the pool's volumes is told of all of these."""
        return True

    def look_again(self) -> None:
        """What was read of the pool may hold no longer: read it anew when it is next asked for."""

    def refresh(self, deadline: Deadline) -> None:
        """Make what changed on disk known."""


def kind_of(status: os.stat_result) -> t.Optional[str]:
    """What stands under a volume's name when it is no regular file, as words for a message."""
    for test, words in (
        (stat.S_ISDIR, "a directory"),
        (stat.S_ISLNK, "a symbolic link"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISFIFO, "a named pipe"),
        (stat.S_ISCHR, "a character device"),
        (stat.S_ISBLK, "a block device"),
    ):
        if test(status.st_mode):
            return words
    return None


def mount_point(path: str) -> t.Optional[str]:
    """Where ``path`` has something mounted on it: the path, or what its symbolic links lead to; None when nothing is.

    Read from the kernel's list: stat(2) fails, or never returns, where a file system has died.
    """
    with open("/proc/self/mountinfo", "rb") as file:
        # The fifth field (proc(5)), with blanks and backslashes as \\ooo.
        fields = [line.split()[4] for line in file]
    points = {os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match.group(1), 8)]), field)) for field in fields}
    if path in points:
        return path
    real = os.path.realpath(path)
    return real if path and real in points else None


# --- the directory itself -------------------------------------------------------------------------------------------------


def make(path: str, uid: t.Optional[int], gid: t.Optional[int], mode: int) -> t.List[str]:
    """Make a directory, and those above it that are missing, and have it last a power cut. What was made, the topmost first.

    libvirt's own build is not used for that: on btrfs it sets the attribute nocow (``virFileSetCOW`` in
    ``virStorageBackendBuildLocal``), and blocks would no longer be shared with files from elsewhere.

    :raises OSError: then nothing of it is left
    """
    made: t.List[str] = []
    missing = [path]
    while not os.path.lexists(os.path.dirname(missing[0])):
        missing.insert(0, os.path.dirname(missing[0]))
    try:
        for directory in missing:
            # Not for others until it has its owner.
            os.mkdir(directory, 0o700 if directory == path else 0o777)
            made.append(directory)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            _own(fd, uid, gid, mode)
        finally:
            os.close(fd)
        for directory in missing:
            _write_out(os.path.dirname(directory))
    except BaseException:
        unmake(made)
        raise
    return made


def unmake(made: t.Sequence[str]) -> None:
    """Remove what :func:`make` has made, as far as nobody has put anything into it."""
    for directory in reversed(made):
        try:
            os.rmdir(directory)
        except OSError:
            return


def remove(path: str) -> None:
    """Remove an empty directory.

    :raises OSError: ``ENOTEMPTY`` when it is not empty
    """
    os.rmdir(path)
    _write_out(os.path.dirname(path))


def own(
    path: str,
    identity: t.Optional[t.Tuple[int, int]],
    uid: t.Optional[int],
    gid: t.Optional[int],
    mode: t.Optional[int],
) -> None:
    """Set owner, group and mode of a directory; None leaves what it has.

    :param identity: device and inode that it must have, else somebody has put something else in its place
    :raises CloneError: ``IN_USE`` for another directory
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        if identity is not None and identity != (status.st_dev, status.st_ino):
            raise CloneError("IN_USE", f"{path!r} was replaced by another directory while it was looked at")
        _own(fd, uid, gid, mode)
    finally:
        os.close(fd)


def _own(fd: int, uid: t.Optional[int], gid: t.Optional[int], mode: t.Optional[int]) -> None:
    if (uid, gid) != (None, None):
        os.fchown(fd, -1 if uid is None else uid, -1 if gid is None else gid)
    # After the owner, because chown(2) takes set-user-ID and set-group-ID away.
    if mode is not None:
        os.fchmod(fd, mode)
    os.fsync(fd)


def _write_out(directory: str) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
