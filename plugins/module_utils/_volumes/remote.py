# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The volumes of a pool on another host, as far as libvirt tells of them, and their end by its calls.

What is in a pool is what libvirt saw when it last looked. Who uses a volume is known of running domains only, and what depends
on one of the volumes of active pools.
"""

from __future__ import annotations

import typing as t
from contextlib import closing

from .._deadline import Deadline
from .._errors import CloneError
from .._names import is_staged_name
from .._pools.capabilities import FILE_POOLS
from .._pools.libvirt import Connection
from .._pools.remote import RemotePool, RemoteVolume
from .._transfer import locks
from . import removal
from .removal import Facts, Plan, Removal

Entry = t.Dict[str, t.Any]


class Inventory:
    """The volumes of a pool, and of the other active file pools of the connection, in which overlays of them may lie."""

    def __init__(self, uri: str, pool: str, name: t.Optional[str]) -> None:
        self._connection = Connection(uri)
        self._pool_name = pool
        self._name = name
        #: by path, with the pool's name
        self._volumes: t.Dict[str, t.Tuple[str, RemoteVolume]] = {}
        #: file pools that could not be looked into, and why
        self.unseen: t.Dict[str, str] = {}

    def close(self) -> None:
        self._connection.close()

    def open_pool(self) -> RemotePool:
        """The pool.

        :raises CloneError: ``NO_STORAGE_POOL`` for none, ``OPERATION_INVALID`` for one that is not active
        """
        pool = t.cast(RemotePool, self._connection.pool(self._pool_name))
        if not pool.is_active():
            raise CloneError("OPERATION_INVALID", f"pool {self._pool_name!r} is not active")
        return pool

    def scan(self) -> None:
        """Ask for all volumes again."""
        self._volumes, self.unseen = {}, {}
        for name in self._connection.names():
            pool = t.cast(t.Optional[RemotePool], self._connection.find(name))
            if pool is None or (pool.type not in FILE_POOLS and name != self._pool_name):
                continue
            if not pool.is_active():
                self.unseen[name] = f"pool {name!r} is not active"
                continue
            for volume in pool.volumes():
                # Two pools may be one directory: the one that is asked for counts.
                if name == self._pool_name or volume.path not in self._volumes:
                    self._volumes[volume.path] = name, volume

    def described(self) -> t.List[Entry]:
        """What ``storage_volume_info`` returns."""
        asked_for = [volume for pool, volume in self._volumes.values() if pool == self._pool_name and self._is_asked(volume)]
        domains = self._connection.domains_by_name()
        dependents = self.dependents()
        return [
            {
                **self._described(volume),
                "dependents": dependents.get(volume.path, []),
                "in_use_by": list(
                    dict.fromkeys([*domains.get(volume.path, ()), *domains.get((self._pool_name, volume.name), ())])
                ),
            }
            for volume in sorted(asked_for, key=lambda one: one.name)
        ]

    def _is_asked(self, volume: RemoteVolume) -> bool:
        asked = self._name in (None, volume.name) and not is_staged_name(volume.name)
        return asked and volume.type in ("file", "block", "network")

    def dependents(self) -> t.Dict[str, t.List[str]]:
        """By path, for each file that has any: the volumes that have it below them."""
        found: t.Dict[str, t.List[str]] = {}
        for pool, volume in self._volumes.values():
            for path, _format in self._chain(volume)[0]:
                found.setdefault(path, []).append(volume.name if pool == self._pool_name else volume.path)
        return {path: sorted(names) for path, names in found.items()}

    def _chain(self, volume: RemoteVolume) -> t.Tuple[t.List[t.Tuple[str, str]], bool]:
        """Path and format of every image below a volume, topmost first, and whether that is all of them."""
        below: t.List[t.Tuple[str, str]] = []
        above: t.Optional[RemoteVolume] = volume
        while above is not None and above.stated is not None and above.stated.backing_path is not None:
            path = above.stated.backing_path
            if path == volume.path or any(path == known for known, _format in below):
                return below, False
            below.append((path, above.stated.backing_format or "raw"))
            above = self._volumes.get(path, (None, None))[1]
        return below, above is not None and above.stated is not None

    def _described(self, volume: RemoteVolume) -> Entry:
        stated, error = volume.stated, volume.error
        chain, complete = self._chain(volume)
        backing = None
        if chain:
            backing = {"path": chain[0][0], "format": chain[0][1], "depth": len(chain) if complete else None}
        return {
            "name": volume.name,
            "pool": self._pool_name,
            "path": volume.path,
            "key": volume.key,
            "type": volume.type,
            "format": (stated.format or "raw") if stated else None,
            "capacity": stated.capacity if stated else None,
            "allocation": volume.allocation,
            "physical": volume.physical,
            "backing": backing,
            "owner": str(stated.owner) if stated and stated.owner is not None else None,
            "group": str(stated.group) if stated and stated.group is not None else None,
            "mode": f"{stated.mode:04o}" if stated and stated.mode is not None else None,
            **({"secontext": volume.label} if volume.label else {}),
            "error_code": error.code if error else None,
            "msg": error.msg if error else None,
            "backing_chain": [{"path": path, "format": image_format} for path, image_format in chain],
        }


# --- deleting a volume --------------------------------------------------------------------------------------------------


def remove(request: Removal, check_mode: bool) -> t.Dict[str, t.Any]:
    """Have libvirt delete a volume, or in check mode say what would be done. Returns the module's result.

    :raises CloneError: on refusal or failure
    """
    if request.wipe == "trim":
        raise CloneError(
            "NO_SUPPORT",
            f"wipe_algorithm=trim is not possible by a connection to another host (uri {request.uri}): libvirt has it for"
            " no file; run the task on that host",
        )
    deadline = Deadline(request.timeout, "timeout")
    with closing(Inventory(request.uri, request.pool, request.name)) as inventory:
        try:
            pool = inventory.open_pool()
        except CloneError as exc:
            if exc.code == "NO_STORAGE_POOL":
                # Nothing is in it; so a second teardown has nothing to do.
                return removal.result(Facts(), Plan())
            if check_mode and exc.code == "OPERATION_INVALID":
                facts = Facts(missing=exc.msg)
                return removal.result(facts, removal.plan(request, facts))
            raise
        if pool.type not in FILE_POOLS:
            raise CloneError(
                "NO_SUPPORT",
                f"pool: volumes of {request.pool!r}, which is of type {pool.type}, are not deleted by a connection to another"
                f" host (uri {request.uri}), where nobody sees who uses it; run the task on that host",
            )
        facts = _look(request, inventory, pool)
        todo = removal.plan(request, facts)
        if check_mode or not todo.actions:
            return removal.result(facts, todo)
        waiting = deadline.sooner(request.lock_timeout, "lock_timeout")
        what = f"volume {request.name!r} of pool {request.pool!r}"
        with locks.Locks([], [pool.lock_key(request.name)], waiting, f"waiting for another run to finish {what}"):
            # What another run did while we waited for the lock counts.
            facts = _look(request, inventory, pool)
            todo = removal.plan(request, facts)
            if "wiped" in todo.actions:
                pool.wipe(request.name, t.cast(str, request.wipe))
            if todo.actions:
                pool.delete(request.name, waiting)
        return removal.result(facts, todo)


def _look(request: Removal, inventory: Inventory, pool: RemotePool) -> Facts:
    there = pool.volume(request.name)
    if there is not None and there.type == "dir":
        return Facts(obstacle="a directory")
    inventory.scan()
    volume = next(iter(inventory.described()), None)
    if volume is None:
        return Facts()
    kept = ""
    if request.wipe == "zero" and (volume["allocation"] or 0) < (volume["physical"] or 0):
        # virStorageBackendVolZeroSparseFileLocal in storage_util.c
        kept = "libvirt frees the blocks of a file that has holes, and overwrites none"
    return Facts(
        volume={key: value for key, value in volume.items() if key not in ("dependents", "in_use_by")},
        dependents=tuple(volume["dependents"]),
        unseen=tuple(inventory.unseen),
        users=", ".join(volume["in_use_by"][:3]),
        denied=pool.denied(),
        kept=kept,
    )
