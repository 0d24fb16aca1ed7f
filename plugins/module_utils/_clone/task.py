# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What all that look at the world for one clone go by: what is asked for, the pools, and how long it may take."""

from __future__ import annotations

import os
import typing as t
from dataclasses import dataclass

from .._deadline import Deadline
from .._errors import CloneError
from .._images.qemu_img import QemuImg
from .._pools.directory import DirectoryPool
from .._pools.libvirt import Connection, LibvirtPool
from .._pools.network import NetworkPool
from .._transfer.pace import Rate
from .request import Request


class Pools:
    """The pools that the task names, each opened once. Nothing but what lies in them is opened as a part of an image."""

    def __init__(self, uri: str, check_mode: bool, deadline: Deadline) -> None:
        self._connection = Connection(uri)
        self._check_mode = check_mode
        self._deadline = deadline
        self._opened: t.Dict[str, DirectoryPool] = {}
        #: why those that a check run goes on without are not there
        self.missing: t.Dict[str, str] = {}

    def close(self) -> None:
        for pool in self._opened.values():
            pool.close()
        self._connection.close()

    def open(self, name: str) -> None:
        """Open a pool, or in a check run remember why it is not there: an earlier task may be about to make it."""
        if name in self._opened or name in self.missing:
            return
        try:
            pool = DirectoryPool(name, name) if os.path.isabs(name) else self._connection.pool(name)
            if isinstance(pool, LibvirtPool) and not pool.is_active():
                raise CloneError("OPERATION_INVALID", f"pool {name!r} is not active")
            if isinstance(pool, NetworkPool):
                pool.deadline = self._deadline
            pool.open()
        except CloneError as exc:
            if self._check_mode and exc.code in ("NO_STORAGE_POOL", "OPERATION_INVALID"):
                self.missing[name] = exc.msg
                return
            raise
        self._opened[name] = pool

    def __getitem__(self, name: str) -> DirectoryPool:
        return self._opened[name]

    def __iter__(self) -> t.Iterator[DirectoryPool]:
        return iter(self._opened.values())

    def find(self, name: str) -> t.Optional[DirectoryPool]:
        """None for one that is missing, or that the task has no use for."""
        return self._opened.get(name)

    def holding(self, path: str) -> t.Optional[DirectoryPool]:
        """The pool that the real path ``path`` is directly in."""
        return next((pool for pool in self if pool.contains(path)), None)

    def key_of(self, path: str) -> str:
        """What libvirt calls the file of this real path: pools may be reached by links, volumes are not."""
        pool = self.holding(path)
        return pool.path_of(os.path.basename(path)) if pool else path


@dataclass
class Task:
    """What one clone goes by. The clones of a task have a request each, and share the rest."""

    request: Request
    check_mode: bool
    pools: Pools
    #: when the whole task has to be over
    deadline: Deadline
    rate: Rate
    qemu: QemuImg
    #: whether the target is locked, so that what is seen of it counts
    locked: bool = False

    @property
    def pool(self) -> DirectoryPool:
        return self.pools[self.request.pool]

    @property
    def source_pool(self) -> DirectoryPool:
        return self.pools[self.request.effective_source_pool]
