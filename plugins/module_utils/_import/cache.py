# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Images that were fetched, kept in a directory: ``KEY.image``, with ``KEY.json`` that says what it is.

Promise: a file that is there is whole, and what it was when it was fetched; of two runs that want the same one, one fetches it.
The image gets its name first, and a record that speaks of another file counts for nothing: a kill in between costs a download.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import typing as t
from contextlib import contextmanager
from dataclasses import dataclass

from .._deadline import Deadline
from .._errors import CloneError, from_os_error
from .._transfer import locks, staging
from .checksum import Checksum
from .options import Options, shown

# What a server says of a file, and how it is asked whether that is still so (RFC 9110, section 13.1).
_VALIDATORS = {"etag": "If-None-Match", "last-modified": "If-Modified-Since"}


@dataclass(frozen=True)
class Entry:
    """An image of the cache, open for reading; ``conditions`` are the headers that ask whether the server has a newer one."""

    fd: int
    conditions: t.Mapping[str, str]


class Cache:
    """The directory. It belongs to this user alone: what it holds is believed.

    :param make: whether it is made where it is missing
    """

    def __init__(self, path: str, make: bool) -> None:
        self.path = path
        self.fd = -1
        try:
            if make:
                os.makedirs(path, 0o700, exist_ok=True)
            self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            status = os.fstat(self.fd)
        except FileNotFoundError:
            return
        except OSError as exc:
            raise from_os_error(exc, f"opening the cache_dir {path!r}") from exc
        if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o022:
            self.close()
            raise CloneError("OPERATION_DENIED", f"cache_dir: {path!r} belongs to another user, or others may write to it")

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    @contextmanager
    def locked(self, key: str, deadline: Deadline, what: str) -> t.Iterator[None]:
        """No other run looks for this image meanwhile, or fetches it. A download may take hours, so only ``timeout`` counts."""
        name = locks.key(os.fstat(self.fd), key)
        with locks.Locks([], [name], deadline, f"waiting for another run to fetch {what}"):
            yield

    def find(self, key: str) -> t.Optional[Entry]:
        """What is there under a key."""
        try:
            with open(f"{key}.json", encoding="utf-8", opener=self._opener) as file:
                record = json.load(file)
            fd = self._opener(f"{key}.image", os.O_RDONLY)
        except (OSError, ValueError):
            return None
        if not isinstance(record, dict) or record.get("file") != _identity(fd):
            os.close(fd)
            return None
        conditions = {asks: str(record[name]) for name, asks in _VALIDATORS.items() if record.get(name)}
        return Entry(fd, conditions)

    def store(self, key: str, staged: staging.Staging, options: Options, headers: t.Mapping[str, str]) -> None:
        """Keep a whole file."""
        os.fsync(staged.fd)
        staged.publish(f"{key}.image", replace=True)
        record = {"url": shown(options.url or ""), "file": _identity(staged.fd)}
        record.update({name: headers[name] for name in _VALIDATORS if headers.get(name)})
        with staging.Staging(self.fd) as file:
            os.write(file.fd, json.dumps(record).encode())
            os.fsync(file.fd)
            file.publish(f"{key}.json", replace=True)

    def _opener(self, name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.fd)


def key_of(options: Options, checksum: t.Optional[Checksum]) -> str:
    """The same for the same bytes of the same URL, read in the same way."""
    told = f"{checksum.algorithm}:{checksum.digest}" if checksum else ""
    return hashlib.sha256("\n".join((options.url or "", told, options.compression or "")).encode()).hexdigest()


def keeps(checksum: t.Optional[Checksum], headers: t.Mapping[str, str]) -> bool:
    """Whether it can be told later that the image is still the one that is meant."""
    return checksum is not None or any(headers.get(name) for name in _VALIDATORS)


def _identity(fd: int) -> t.List[int]:
    status = os.fstat(fd)
    return [status.st_ino, status.st_size, status.st_mtime_ns]
