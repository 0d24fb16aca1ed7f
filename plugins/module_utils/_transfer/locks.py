# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Locks between runs of this collection on one host: one file per volume, kept, held by flock(2).

The kernel drops them with the process, so a killed run never blocks the next one. Across hosts and users the file system
decides: linking a volume into place fails when the name exists.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import os
import stat
import tempfile
import typing as t

from .._deadline import Deadline
from .._errors import CloneError, from_os_error


def key(directory: os.stat_result, name: str) -> str:
    """The lock file's name for a volume: a volume keeps its lock whatever path its directory is reached by."""
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:32]
    return f"{directory.st_dev:x}-{directory.st_ino:x}-{digest}"


def domain() -> str:
    """The same for all runs that these locks keep apart, and for no others: a container has a lock directory of its own."""
    status = os.stat(_lock_directory())
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return f"{file.read().strip()}:{status.st_dev:x}:{status.st_ino:x}"


class Locks:
    """Holds locks from ``__enter__`` to ``__exit__``; all are taken in the order of their keys, so that no two runs wait
    for each other."""

    def __init__(self, shared: t.Iterable[str], exclusive: t.Iterable[str], deadline: Deadline, doing: str) -> None:
        wanted = dict.fromkeys(shared, fcntl.LOCK_SH)
        wanted.update(dict.fromkeys(exclusive, fcntl.LOCK_EX))
        self._wanted = sorted(wanted.items())
        self._deadline = deadline
        self._doing = doing
        self._held: t.List[int] = []

    def __enter__(self) -> Locks:
        try:
            directory = _lock_directory()
            for name, kind in self._wanted:
                fd = os.open(os.path.join(directory, name), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
                self._held.append(fd)
                self._deadline.wait_for(functools.partial(_try_lock, fd, kind), self._doing)
        except OSError as exc:
            self.__exit__()
            raise from_os_error(exc, "taking the lock") from exc
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_exc: object) -> None:
        while self._held:
            os.close(self._held.pop())


def _try_lock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except OSError as exc:
        if exc.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def note(name: str, pending: bool) -> None:
    """Note in a lock file whose lock is held that what it stands for is not to be taken for whole, or that it may be.

    It is there until a reboot, also when the process is killed.
    """
    fd = os.open(os.path.join(_lock_directory(), name), os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.ftruncate(fd, 0)
        if pending:
            os.write(fd, b"pending")
    finally:
        os.close(fd)


def noted_at(name: str) -> t.Optional[float]:
    """When :func:`note` has noted that, in seconds since the epoch; None where it has not. Makes no file."""
    try:
        status = os.lstat(os.path.join(_where(), name))
    except FileNotFoundError:
        return None
    return status.st_mtime if status.st_size else None


def _where() -> str:
    user = os.geteuid()
    if user == 0:
        return "/run/lock/virtforge"
    if os.path.isdir(os.environ.get("XDG_RUNTIME_DIR", "")):
        return os.path.join(os.environ["XDG_RUNTIME_DIR"], "virtforge")
    return os.path.join(tempfile.gettempdir(), f"virtforge-{user}")


def _lock_directory() -> str:
    """A directory that is ours alone: in a place where everybody may write, another user could have made it first."""
    user, path = os.geteuid(), _where()
    if user == 0:
        os.makedirs(os.path.dirname(path), exist_ok=True)
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        pass
    status = os.lstat(path)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != user:
        raise CloneError("OPERATION_DENIED", f"the lock directory {path!r} belongs to somebody else")
    return path
