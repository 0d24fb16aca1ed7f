# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""``state: absent``: request and facts, the plan, and how it is carried out.

Promises: only the file that was judged is deleted, and never one that is in use. Killed anywhere, the volume still has its
name, so that the next run does what is left to do, or it is gone.
"""

from __future__ import annotations

import os
import stat
import time
import typing as t
from abc import ABC, abstractmethod
from contextlib import closing
from dataclasses import dataclass

from .. import _xml
from .._deadline import Deadline, stated_seconds
from .._errors import CloneError, from_os_error
from .._names import check_name, check_pool
from .._pools import capabilities
from .._pools.devices import Device, DevicePool
from .._pools.directory import kind_of
from .._pools.libvirt import LibvirtPool
from .._transfer import guards, locks, wipe
from .._units import format_bytes
from . import devices, entry
from .inventory import Inventory, open_volume

# Another run that has just looked, or libvirt refreshing the pool, has the file open for a moment.
_MOMENT = 4.0


@dataclass(frozen=True)
class Removal:
    """What the task asks for. ``wipe`` is the algorithm, None for no wiping; times are in seconds."""

    pool: str
    name: str
    uri: str = "qemu:///system"
    wipe: t.Optional[str] = None
    force: bool = False
    lock_timeout: float = 300.0
    timeout: t.Optional[float] = None


@dataclass(frozen=True)
class Facts:
    """The volume as it is. All the rest only matters where ``volume`` is not None, which is its description."""

    volume: t.Optional[t.Mapping[str, t.Any]] = None
    #: what stands under that name, when it is no regular file
    obstacle: t.Optional[str] = None
    #: why only a check run goes on: the pool cannot be looked into yet
    missing: str = ""
    #: why this user may not delete it
    denied: str = ""
    #: volumes that have it below them, or their data in it
    dependents: t.Tuple[str, ...] = ()
    #: volumes that could not be read, and so may depend on it
    untold: t.Tuple[str, ...] = ()
    #: names of pools that could not be looked into
    unseen: t.Tuple[str, ...] = ()
    #: who uses it
    users: str = ""
    #: names that the file has
    links: int = 1
    #: why wiping leaves old bytes on the disk
    kept: str = ""
    #: bytes that the pool lacks for wiping
    space_missing: int = 0
    #: why it cannot be deleted, whatever is asked for
    fixed: str = ""
    #: why it cannot be wiped
    not_wipeable: str = ""
    #: whether its pool deletes the dependents too
    deleted_along: bool = False
    #: whether its pool deletes no volume that has dependents, whatever a task says
    bound: bool = False


@dataclass(frozen=True)
class Plan:
    """``actions`` are what is left to do, of ``wiped`` and ``deleted``, in order."""

    actions: t.Tuple[str, ...] = ()
    warnings: t.Tuple[str, ...] = ()


def from_parameters(params: t.Mapping[str, t.Any]) -> Removal:
    """Check the module's parameters.

    :raises CloneError: ``INVALID_ARG`` or ``XML_ERROR``, naming the parameter and its value
    """
    name = params.get("name")
    if name is None and params.get("xml") is not None:
        name = _xml.parse_volume(params["xml"]).name
    if name is None:
        raise CloneError("INVALID_ARG", "name: which volume shall be absent is stated neither here nor in xml")
    check_name(name, "name")
    check_pool(params["pool"], "pool")
    algorithm = params.get("wipe_algorithm")
    if algorithm is not None and not params.get("wipe"):
        raise CloneError("INVALID_ARG", f"wipe_algorithm: {algorithm} has no meaning without wipe=true")
    return Removal(
        pool=params["pool"],
        name=name,
        uri=params.get("uri") or "qemu:///system",
        wipe=(algorithm or "zero") if params.get("wipe") else None,
        force=bool(params.get("force")),
        lock_timeout=stated_seconds(params, "lock_timeout", 300.0),
        timeout=stated_seconds(params, "timeout", None),
    )


def plan(request: Removal, facts: Facts) -> Plan:
    """What has to be done for the volume to be absent.

    :raises CloneError: the refusal
    """
    what = f"volume {request.name!r} of pool {request.pool!r}"
    if facts.missing:
        return Plan(warnings=(f"{facts.missing}: deleting {what} fails unless an earlier task starts the pool",))
    if facts.obstacle:
        raise CloneError("OPERATION_INVALID", f"{what} cannot be deleted: its name is taken by {facts.obstacle}")
    if facts.volume is None:
        return Plan()
    if facts.fixed:
        raise CloneError("NO_SUPPORT", f"{what} cannot be deleted: {facts.fixed}")
    if facts.denied:
        raise CloneError("OPERATION_DENIED", facts.denied)
    warnings = []
    if facts.dependents:
        depend = entry.depend(facts.dependents)
        if facts.bound:
            raise CloneError("OPERATION_INVALID", f"{what} cannot be deleted: {depend}")
        if not request.force:
            forced = "deletes those too" if facts.deleted_along else "deletes it all the same"
            raise CloneError("OPERATION_INVALID", f"{what} cannot be deleted: {depend}; force=true {forced}")
        warnings.append(f"{what} is deleted although {depend}" + ("; those are deleted too" if facts.deleted_along else ""))
    cannot_tell = f"whether anything depends on {what} cannot be told of"
    if facts.untold:
        if not request.force:
            raise CloneError(
                "OPERATION_INVALID", f"{cannot_tell} {entry.first(facts.untold)}; force=true deletes it all the same"
            )
        warnings.append(f"{cannot_tell} {entry.first(facts.untold)}")
    if facts.unseen:
        warnings.append(f"{cannot_tell} {entry.first([f'pool {name!r}' for name in facts.unseen])}")
    if facts.users:
        raise CloneError("IN_USE", f"{what} cannot be deleted: it is open by {facts.users}")
    if request.wipe is None:
        return Plan(("deleted",), tuple(warnings))
    _refuse_wiping(request, facts, what)
    if facts.kept:
        warnings.append(f"{what} is wiped, but some of its data stays on the disk: {facts.kept}")
    return Plan(("wiped", "deleted"), tuple(warnings))


def _refuse_wiping(request: Removal, facts: Facts, what: str) -> None:
    if facts.not_wipeable:
        raise CloneError("NO_SUPPORT", f"{what} cannot be wiped: {facts.not_wipeable}")
    if facts.links > 1:
        raise CloneError(
            "OPERATION_INVALID",
            f"{what} cannot be wiped: the file has {facts.links - 1} more names, which would lose their data",
        )
    if facts.space_missing:
        raise CloneError(
            "NO_SPACE",
            f"{what} cannot be wiped: wipe_algorithm={request.wipe} fills its holes, for which the pool lacks"
            f" {format_bytes(facts.space_missing)}",
        )


# --- carrying it out ----------------------------------------------------------------------------------------------------


def run(request: Removal, check_mode: bool) -> t.Dict[str, t.Any]:
    """Delete the volume, or in check mode say what would be done. Returns the module's result.

    :raises CloneError: on refusal or failure
    """
    deadline = Deadline(request.timeout, "timeout")
    with closing(Inventory(request.uri, request.pool, request.name, deadline)) as inventory:
        facts = _open_pool(inventory, check_mode)
        if facts is not None:
            return result(facts, plan(request, facts))
        kind = _Device if isinstance(inventory.pool, DevicePool) else _File
        with closing(kind(request, inventory, deadline)) as scene:
            return result(*_remove(scene, check_mode))


def _open_pool(inventory: Inventory, check_mode: bool) -> t.Optional[Facts]:
    """Facts where the pool is not there to be opened."""
    try:
        inventory.open_pool()
    except CloneError as exc:
        if exc.code == "NO_STORAGE_POOL":
            # Nothing is in it; so a second teardown has nothing to do.
            return Facts()
        if check_mode and exc.code == "OPERATION_INVALID":
            return Facts(missing=exc.msg)
        raise
    return None


def _remove(scene: _Scene, check_mode: bool) -> t.Tuple[Facts, Plan]:
    facts, todo = Facts(), None
    try:
        facts = scene.look(patiently=False)
        todo = plan(scene.request, facts)
    except CloneError as exc:
        # Whoever has it open may be another run, which is waited for under the lock; then all is judged again.
        if check_mode or exc.code != "IN_USE":
            raise
    if todo is None or (todo.actions and not check_mode):
        facts, todo = _change(scene)
    if not check_mode:
        scene.refresh()
    return facts, todo


def _change(scene: _Scene) -> t.Tuple[Facts, Plan]:
    request = scene.request
    what = f"volume {request.name!r} of pool {request.pool!r}"
    scene.close()
    target = scene.inventory.pool.lock_key(request.name)
    waiting = scene.deadline.sooner(request.lock_timeout, "lock_timeout")
    with locks.Locks([], [target], waiting, f"waiting for another run to finish {what}"):
        # What another run did while we waited for the lock counts.
        facts = scene.look(patiently=True)
        todo = plan(request, facts)
        for action, doing, carry_out in (("wiped", "wiping", scene.wipe), ("deleted", "deleting", scene.delete)):
            if action in todo.actions:
                try:
                    carry_out(what)
                except OSError as exc:
                    raise from_os_error(exc, f"{doing} {what}") from exc
    return facts, todo


class _Scene(ABC):
    """The volume, its pool, and all that may depend on it."""

    def __init__(self, request: Removal, inventory: Inventory, deadline: Deadline) -> None:
        self.request = request
        self.inventory = inventory
        #: when the whole task has to be over
        self.deadline = deadline

    @abstractmethod
    def close(self) -> None:
        """Let go of what :meth:`look` has opened."""

    @abstractmethod
    def look(self, patiently: bool) -> Facts:
        """All that the plan needs.

        ``patiently`` is for who holds the lock: others would only keep him waiting, with the volume open.
        """

    @abstractmethod
    def wipe(self, what: str) -> None:
        """Under its name: who finds it so after a kill knows what is left to do."""

    @abstractmethod
    def delete(self, what: str) -> None:
        """The last that is done."""

    @abstractmethod
    def _is_there(self) -> bool:
        """Whether the pool has it still."""

    def _overwrite(self, fd: int, what: str) -> None:
        wipe.wipe(fd, t.cast(str, self.request.wipe), what, lambda: self.deadline.check(f"wiping {what}"))

    def refresh(self) -> None:
        """Have libvirt forget a volume that is gone, whoever deleted it."""
        pool = self.inventory.pool
        if isinstance(pool, LibvirtPool) and not self._is_there() and pool.lists(self.request.name):
            pool.refresh(self.deadline.sooner(self.request.lock_timeout, "lock_timeout"))


def _patiently(users: t.Callable[[], str], patiently: bool) -> str:
    """Who uses a volume. ``patiently``: somebody who lets go of it within a moment does not count."""
    end = time.monotonic() + _MOMENT
    who = users()
    while who and patiently and time.monotonic() < end:
        time.sleep(0.05)
        who = users()
    return who


class _File(_Scene):
    """What was judged stays open, and is what is deleted."""

    _fd = -1

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def look(self, patiently: bool) -> Facts:
        self.close()
        name, pool = self.request.name, self.inventory.pool
        status = pool.lstat(name)
        if status is None:
            return Facts()
        if kind_of(status):
            return Facts(obstacle=kind_of(status))
        denied = self._denied(status)
        if denied:
            return Facts(volume={}, denied=denied)
        self.inventory.scan()
        found = self.inventory.asked_for()
        try:
            self._fd = open_volume(pool, name, os.O_RDONLY)
        except FileNotFoundError:
            return Facts()
        except PermissionError:
            # Nobody else can say who has it open.
            return Facts(volume={}, denied=f"pool {pool.name!r}: this user may not open {name!r}; use become")
        if not found or not self._is_still(found[0].status):
            raise CloneError("IN_USE", f"volume {name!r} of pool {pool.name!r} was replaced while it was looked at")
        key = found[0].key
        return Facts(
            volume=self.inventory.describe(found[0]),
            dependents=tuple(sorted(map(self.inventory.call, self.inventory.dependents().get(key, ())))),
            untold=tuple(self.inventory.untold(key)),
            unseen=tuple(self.inventory.unseen),
            users=self._users(patiently),
            **self._about_wiping(),
        )

    def _about_wiping(self) -> t.Dict[str, t.Any]:
        algorithm = self.request.wipe
        if algorithm is None:
            return {}
        wipe.scrub_program(algorithm)
        name, pool = self.request.name, self.inventory.pool
        writable = os.access(f"/proc/self/fd/{self._fd}", os.W_OK, effective_ids=True)
        lacking = 0 if algorithm in ("zero", "trim") else wipe.holes(self._fd) - pool.available()
        return {
            "denied": "" if writable else f"pool {pool.name!r}: this user may not write to {name!r}; use become",
            "links": os.fstat(self._fd).st_nlink,
            "kept": wipe.kept(self._fd),
            "space_missing": max(lacking, 0),
        }

    def _denied(self, status: os.stat_result) -> str:
        pool = self.inventory.pool
        denied = pool.denied()
        if not denied and isinstance(pool, LibvirtPool):
            denied = pool.cannot_write()
        directory = os.fstat(pool.fd)
        if not denied and directory.st_mode & stat.S_ISVTX and os.geteuid() not in (0, status.st_uid, directory.st_uid):
            denied = f"pool {pool.name!r}: in {pool.path!r} users may delete only their own files; use become"
        return denied

    def _users(self, patiently: bool) -> str:
        """Who uses the open volume."""
        who = _patiently(lambda: guards.users(self._fd), patiently)
        # By its name, another run could have deleted it by now.
        return who or self.inventory.pool.users_of(f"/proc/self/fd/{self._fd}")

    def _is_still(self, judged: os.stat_result) -> bool:
        """Whether the name still means the file that was judged, and that is open."""
        status = self.inventory.pool.lstat(self.request.name)
        return status is not None and os.path.samestat(status, judged) and os.path.samestat(status, os.fstat(self._fd))

    def _refuse_change(self, what: str, doing: str) -> None:
        """The last look."""
        if not self._is_still(os.fstat(self._fd)):
            raise CloneError("IN_USE", f"{what} cannot be {doing}: another file has its name by now, or none")
        users = self._users(patiently=True)
        if users:
            raise CloneError("IN_USE", f"{what} cannot be {doing}: it is open by {users}")

    def wipe(self, what: str) -> None:
        guards.claim(self._fd)
        self._refuse_change(what, "wiped")
        fd = open_volume(self.inventory.pool, self.request.name, os.O_RDWR)
        try:
            if not os.path.samestat(os.fstat(fd), os.fstat(self._fd)):
                raise CloneError("IN_USE", f"{what} cannot be wiped: another file has its name by now, or none")
            self._overwrite(fd, what)
        finally:
            os.close(fd)

    def delete(self, what: str) -> None:
        directory = self.inventory.pool.fd
        self._refuse_change(what, "deleted")
        os.unlink(self.request.name, dir_fd=directory)
        os.fsync(directory)

    def _is_there(self) -> bool:
        return self.inventory.pool.lstat(self.request.name) is not None


class _Device(_Scene):
    """A volume of a pool whose volumes are devices."""

    #: what depended on it when that was judged
    _judged: t.Sequence[str] = ()

    def close(self) -> None:
        """Nothing stays open."""

    @property
    def pool(self) -> DevicePool:
        return t.cast(DevicePool, self.inventory.pool)

    def look(self, patiently: bool) -> Facts:
        pool, name = self.pool, self.request.name
        pool.look_again()
        volumes = {volume.name: volume for volume in pool.volumes()}
        volume = volumes.get(name)
        if volume is None:
            return Facts()
        able = capabilities.of(pool.type).delete
        fixed = pool.cannot_delete(volume) if able else f"a pool of type {pool.type} cannot delete one"
        if fixed:
            return Facts(volume={}, fixed=fixed)
        denied = pool.denied() or pool.cannot_write()
        if denied:
            return Facts(volume={}, denied=denied)
        if self.request.wipe is not None:
            wipe.scrub_program(self.request.wipe)
        dependents = self._judged = pool.dependents(name)
        return Facts(
            volume=devices.describe(pool, volume, list(volumes.values())),
            dependents=tuple(dependents),
            deleted_along=pool.removes_dependents,
            bound=pool.refuses_dependents,
            users=self._users([volumes[one] for one in (name, *dependents) if one in volumes], patiently),
            not_wipeable=pool.cannot_wipe(volume) if self.request.wipe is not None else "",
        )

    def _users(self, volumes: t.Sequence[Device], patiently: bool) -> str:
        """Who uses the volume, or one that is deleted with it."""

        def users() -> str:
            found = self.pool.users_by_name(volumes)
            return entry.first(
                [who if name == self.request.name else f"{who} (as {name!r})" for name, some in found.items() for who in some]
            )

        return _patiently(users, patiently)

    def _refuse_change(self, what: str, doing: str) -> Device:
        """The last look."""
        self.pool.look_again()
        volume = self.pool.volume(self.request.name)
        if volume is None:
            raise CloneError("IN_USE", f"{what} cannot be {doing}: it is gone by now")
        users = self._users([volume], patiently=True)
        if users:
            raise CloneError("IN_USE", f"{what} cannot be {doing}: it is open by {users}")
        new = set(self.pool.dependents(volume.name)) - set(self._judged)
        if new:
            raise CloneError("IN_USE", f"{what} cannot be {doing}: {min(new)!r} was made of it meanwhile")
        return volume

    def wipe(self, what: str) -> None:
        volume = self._refuse_change(what, "wiped")
        fd = os.open(os.path.realpath(volume.path), os.O_RDWR | os.O_EXCL | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            self._overwrite(fd, what)
        finally:
            os.close(fd)

    def delete(self, what: str) -> None:
        self._refuse_change(what, "deleted")
        with self.pool.alone(self.deadline.sooner(self.request.lock_timeout, "lock_timeout")):
            self.pool.remove(self.request.name)

    def _is_there(self) -> bool:
        return self.pool.volume(self.request.name) is not None


def result(facts: Facts, todo: Plan) -> t.Dict[str, t.Any]:
    """``volume`` is the volume as it was."""
    shown = ("name", "pool", "format", "capacity", "owner", "group", "mode", "secontext")
    before = {key: facts.volume[key] for key in shown if key in facts.volume} if facts.volume and todo.actions else {}
    return {
        "changed": bool(todo.actions),
        "actions": list(todo.actions),
        "volume": dict(facts.volume) if facts.volume else None,
        "diff": {"before": before, "after": {}},
        "warnings": list(todo.warnings),
    }
