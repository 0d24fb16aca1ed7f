# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Looking at the world: the pool, its directory, its device, who uses it. Changes nothing."""

from __future__ import annotations

import os
import stat
import typing as t
from dataclasses import replace

from .._deadline import Deadline
from .._errors import from_os_error
from .._pools import block_device, definition
from .._pools.definition import TYPES, Definition
from .._pools.directory import kind_of, mount_point
from .._pools.libvirt import Connection, LibvirtPool
from .planner import DeviceFacts, DirectoryFacts, Facts, Ownership, PoolFacts, Unanswered
from .request import Request


class Scene:
    """What one pool has to do with. :meth:`gather`, :meth:`answer` what the planner asks, and close it."""

    def __init__(self, request: Request, check_mode: bool) -> None:
        self.request = request
        self.check_mode = check_mode
        self.connection = Connection(request.uri)
        self.waiting = Deadline(request.lock_timeout, "lock_timeout")
        #: None for one that does not exist, and for a directory pool
        self.pool: t.Optional[LibvirtPool] = None

    def close(self) -> None:
        self.connection.close()

    def gather(self) -> Facts:
        """The facts that every plan needs."""
        request = self.request
        facts = Facts(check_mode=self.check_mode, uid=os.geteuid())
        if request.is_directory:
            return replace(facts, directory=_directory(os.path.normpath(request.name), request))
        self.pool = self.connection.find(request.name)
        pool = _pool(self.pool) if self.pool is not None else None
        if pool is None and request.xml is None and request.stated.type is None:
            return facts
        base = request.xml if request.xml is not None else pool.document if pool else None
        document = definition.merge(base, request.name, pool.definition.uuid if pool else None, request.stated)
        desired = definition.parse(document)
        return replace(
            facts,
            pool=pool,
            desired=desired,
            document=document,
            directory=self._directory(desired),
        )

    def _directory(self, desired: Definition) -> t.Optional[DirectoryFacts]:
        if desired.target_path is None or not self.request.needs_directory:
            return DirectoryFacts(desired.target_path) if desired.target_path is not None else None
        return _directory(desired.target_path, self.request)

    def answer(self, asked: Unanswered, facts: Facts) -> Facts:
        """The facts with the one that the planner asked for."""
        if asked.question == "others":
            return replace(facts, others=tuple(self.connection.definitions(but=self.request.name)))
        if asked.question == "users":
            return replace(facts, users=self._users(t.cast(PoolFacts, facts.pool)))
        if asked.question == "device":
            return replace(facts, device=self._device(t.cast(Definition, facts.desired)))
        return replace(facts, denied=self.connection.denied())

    def _users(self, pool: PoolFacts) -> str:
        path = pool.live.target_path
        return self.connection.users_below(path, self.request.name) if path is not None else ""

    def _device(self, desired: Definition) -> DeviceFacts:
        path = desired.source.devices[0] if desired.source.devices else ""
        if not os.path.exists(path):
            return DeviceFacts(path, exists=False)
        if not self.request.build:
            return DeviceFacts(path)
        found = block_device.examine(path, desired.source.format or "")
        # A domain first: its name says more than its process.
        domains = self.connection.users_of_device(path) if not found.holds else ""
        claimed = f"is in use by {domains}" if domains else found.claimed
        return DeviceFacts(path, format=found.format, holds=found.holds, claimed=claimed)


def _pool(pool: LibvirtPool) -> PoolFacts:
    document = pool.document(inactive=True)
    live = definition.parse(pool.document())
    active = pool.is_active()
    mounts = live.type in TYPES and TYPES[live.type].mounts
    mounted = mount_point(live.target_path or "") if active and mounts else None
    return PoolFacts(
        definition=definition.parse(document),
        live=live,
        document=document,
        active=active,
        persistent=pool.is_persistent(),
        autostart=pool.autostart(),
        unmounted=active and mounts and mounted is None,
        mounted=mounted,
    )


# --- the directory ------------------------------------------------------------------------------------------------------


def _directory(path: str, request: Request) -> DirectoryFacts:
    if request.is_directory and request.state == "absent" and mount_point(path) is not None:
        return DirectoryFacts(path, exists=True, obstacle="is a mount point, and only a directory is removed")
    real = os.path.realpath(path)
    facts = DirectoryFacts(path, real=real if real != path else None)
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return _missing(facts)
    except PermissionError:
        # For libvirt it may be there.
        return replace(facts, exists=True, denied=f"this user may not look at {path!r}; use become")
    except OSError as exc:
        why = f"cannot be looked at: {exc.strerror}"
        return replace(facts, obstacle=why) if mount_point(path) is None else replace(facts, exists=True, broken=why)
    if not stat.S_ISDIR(status.st_mode):
        return replace(facts, obstacle=f"is {kind_of(status) or 'a file'}, no directory")
    facts = replace(
        facts,
        exists=True,
        identity=(status.st_dev, status.st_ino),
        owner=Ownership(status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)),
    )
    if request.is_directory and request.state == "absent":
        if os.path.islink(path):
            return replace(facts, obstacle="is a symbolic link, and only a directory is removed")
        denied = "" if _may_change(os.path.dirname(path)) else f"this user may not remove {path!r}; use become"
        return replace(facts, entry=_entry(path), denied=denied)
    denied = "" if os.geteuid() in (0, status.st_uid) else f"this user may not change {path!r}; use become"
    return replace(facts, denied=denied)


def _missing(facts: DirectoryFacts) -> DirectoryFacts:
    """What stands in the way of making it, from the nearest thing above that is there."""
    above = facts.path
    while not os.path.lexists(above):
        above = os.path.dirname(above)
    what = "" if above == facts.path else f"cannot be made: {above!r} "
    if os.path.islink(above) and not os.path.exists(above):
        return replace(facts, obstacle=f"{what}is a symbolic link to {os.readlink(above)!r}, which does not exist")
    if not os.path.isdir(above):
        return replace(facts, obstacle=f"{what}is no directory")
    return replace(facts, denied="" if _may_change(above) else f"this user may not make {facts.path!r}; use become")


def _may_change(directory: str) -> bool:
    return os.access(directory, os.W_OK | os.X_OK, effective_ids=True)


def _entry(path: str) -> t.Optional[str]:
    try:
        with os.scandir(path) as entries:
            return min((entry.name for entry in entries), default=None)
    except OSError as exc:
        raise from_os_error(exc, f"listing {path!r}") from exc
