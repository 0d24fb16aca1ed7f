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
from .._errors import CloneError, from_os_error
from .._pools import block_device, definition
from .._pools.definition import TYPES, Auth, Definition, PoolType, Stated
from .._pools.devices import DevicePool
from .._pools.directory import kind_of, mount_point
from .._pools.libvirt import Connection, LibvirtPool
from .._pools.remote import RemotePool
from .._pools.secrets import Secret, made_up_usage, value_of
from .._uri import is_elsewhere
from .planner import DeviceFacts, DirectoryFacts, Facts, Ownership, PoolFacts, SecretFacts, Unanswered
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
        remote = is_elsewhere(request.uri, request.name)
        facts = Facts(check_mode=self.check_mode, uid=os.geteuid(), remote=remote)
        if request.is_directory:
            return replace(facts, directory=_directory(os.path.normpath(request.name), request))
        self.pool = self.connection.find(request.name)
        pool = _pool(self.pool) if self.pool is not None else None
        if pool is None and request.xml is None and request.stated.type is None:
            return facts
        base = request.xml if request.xml is not None else pool.document if pool else None
        document, desired = self._desired(base, pool, request.stated)
        auth = desired.source.auth
        if request.password is not None and auth is not None and not (auth.secret_uuid or auth.secret_usage):
            named = replace(request.stated.auth or Auth(), secret_usage=made_up_usage(request.name))
            document, desired = self._desired(base, pool, replace(request.stated, auth=named))
        return replace(
            facts,
            pool=pool,
            desired=desired,
            document=document,
            directory=None if remote else self._directory(desired),
        )

    def _desired(self, base: t.Optional[str], pool: t.Optional[PoolFacts], stated: Stated) -> t.Tuple[str, Definition]:
        # Which names of a device of another host are links to others is not known here.
        spelled = _Spelling(pool.definition.source.devices if pool and not self.connection.remote else ())
        uuid = pool.definition.uuid if pool else None
        document = definition.merge(base, self.request.name, uuid, stated, spelled)
        desired = definition.parse(document)
        if desired.type == "logical" and not self.connection.remote:
            document = definition.merge(base, self.request.name, uuid, stated, lambda device: _name_for_lvm(spelled(device)))
            desired = definition.parse(document)
        return document, desired

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
        if asked.question == "devices":
            desired = t.cast(Definition, facts.desired)
            return replace(facts, devices=tuple(self._device(path, desired) for path in desired.source.devices))
        if asked.question == "grouped":
            return replace(facts, grouped=block_device.is_volume_group(t.cast(Definition, facts.desired).source.name or ""))
        if asked.question == "secret":
            return replace(facts, secret=self._secret_facts(facts))
        return replace(facts, denied=self.connection.denied())

    def _users(self, pool: PoolFacts) -> str:
        known = TYPES.get(pool.live.type, PoolType())
        if known.takes_away and not known.mounts:
            domains = self.connection.users_among(t.cast(LibvirtPool, self.pool).volume_paths(), self.request.name)
            if domains or not isinstance(self.pool, DevicePool):
                return domains
            # A file system, a volume group or a guest's disk may be on top of them; iscsid logs out under all of that.
            users = self.pool.users_by_name(self.pool.volumes())
            return next((f"{some[0]} (volume {name!r})" for name, some in users.items() if some), "")
        path = pool.live.target_path
        if known.path == "none" or path is None or not known.directory:
            # Nothing of it is a file of this host.
            return self.connection.users_among((), self.request.name)
        return self.connection.users_below(path, self.request.name)

    def _device(self, path: str, desired: Definition) -> DeviceFacts:
        if not os.path.exists(path):
            return DeviceFacts(path, exists=False)
        if not self.request.build:
            return DeviceFacts(path)
        found = block_device.examine(path, TYPES[desired.type].builds, desired.source.format or "")
        # A domain first: its name says more than its process.
        domains = self.connection.users_of_device(path) if not found.holds else ""
        claimed = f"is in use by {domains}" if domains else found.claimed
        return DeviceFacts(path, format=found.format, group=found.group, holds=found.holds, claimed=claimed)

    # --- the secret -------------------------------------------------------------------------------------------------------

    def secret(self, described: t.Optional[Definition]) -> Secret:
        """The one that a definition names."""
        auth = t.cast(Auth, t.cast(Definition, described).source.auth)
        kind = auth.type or TYPES[t.cast(Definition, described).type].auth
        return Secret(self.connection, replace(auth, type=kind))

    def password(self, desired: Definition) -> bytes:
        """The stated password as libvirt keeps it."""
        kind = t.cast(Auth, desired.source.auth).type or TYPES[desired.type].auth
        return value_of(t.cast(str, self.request.password), kind)

    def _secret_facts(self, facts: Facts) -> SecretFacts:
        if self.request.state == "absent":
            try:
                secret = self.secret(t.cast(PoolFacts, facts.pool).definition)
                own = secret.is_made_for(self.request.name) and not secret.users(self.request.name)
            except CloneError as exc:
                if exc.code != "NO_SUPPORT":
                    raise
                # A connection without secrets has made none.
                own = False
            return SecretFacts(own=own)
        desired = t.cast(Definition, facts.desired)
        wanted = self.password(desired)
        secret = self.secret(desired)
        private = secret.is_private()
        return SecretFacts(secret.exists, private, not private and secret.value() == wanted)


class _Spelling:
    """Gives a device the name that a pool has for it already: another of its names makes no difference."""

    def __init__(self, devices: t.Iterable[str]) -> None:
        self._names = {os.path.realpath(device): device for device in devices if device.startswith("/")}

    def __call__(self, device: str) -> str:
        return self._names.get(os.path.realpath(device), device) if device.startswith("/") else device


def _name_for_lvm(device: str) -> str:
    """A device as LVM prints it, where it is stated by a link of udev's.

    libvirt starts a volume group only if each device has, letter by letter, the name that pvs(8) prints
    (virStorageBackendLogicalMatchPoolSource).
    """
    if not device.startswith("/dev/disk/"):
        return device
    real = os.path.realpath(device)
    try:
        with open(f"/sys/class/block/{os.path.basename(real)}/dm/name", encoding="utf-8") as file:
            return f"/dev/mapper/{file.read().strip()}"
    except OSError:
        return real


def _pool(pool: LibvirtPool) -> PoolFacts:
    document = pool.document(inactive=True)
    live = definition.parse(pool.document())
    active = pool.is_active()
    # What is mounted on another host only libvirt knows.
    mounts = live.type in TYPES and TYPES[live.type].mounts and not isinstance(pool, RemotePool)
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
