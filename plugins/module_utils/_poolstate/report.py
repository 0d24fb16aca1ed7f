# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the modules return of a pool. Sizes are integers in bytes."""

from __future__ import annotations

import os
import typing as t
from dataclasses import asdict

from .._errors import CloneError
from .._permissions import group_name, user_name
from .._pools import capabilities, definition
from .._pools.definition import Definition, Source
from .._pools.libvirt import Connection, LibvirtPool
from .._pools.remote import RemotePool
from .planner import Facts, Plan, State

if t.TYPE_CHECKING:  # pragma: no cover
    from .facts import Scene

Entry = t.Dict[str, t.Any]


def build(scene: Scene, facts: Facts, plan: Plan) -> t.Dict[str, t.Any]:
    """The result of the module storage_pool."""
    return {
        "changed": bool(plan.actions),
        "actions": list(plan.actions),
        "pool": _entry_of(scene, facts, plan),
        "diff": {"before": _shown(scene.request.name, plan.before), "after": _shown(scene.request.name, plan.after)},
        "warnings": list(plan.warnings),
    }


def _entry_of(scene: Scene, facts: Facts, plan: Plan) -> t.Optional[Entry]:
    name, after = scene.request.name, plan.after
    if after is None:
        return None
    if scene.check_mode and plan.actions:
        state = "active" if scene.request.is_directory else after.state
        uuid = facts.pool.definition.uuid if facts.pool is not None else None
        path = facts.directory.path if facts.directory is not None else None
        if facts.remote and after.definition is not None:
            path = after.definition.target_path
        return _entry(
            name,
            after.type,
            state,
            uuid=uuid,
            autostart=after.autostart,
            persistent=None if scene.request.is_directory else True,
            path=path,
            source=after.definition.source if after.definition is not None else None,
            remote=scene.connection.remote and not scene.request.is_directory,
        )
    return next(iter(entries(scene.connection, name)[0]), None)


def entries(connection: Connection, name: t.Optional[str]) -> t.Tuple[t.List[Entry], t.List[str]]:
    """The pool of that name, or every pool of the connection, as it is, and what could not be told of some.

    A name that nobody has gives no entry.
    """
    if name is not None and name.startswith("/"):
        return _directory_entries(name), []
    found, warnings = [], []
    for each in [name] if name is not None else connection.names():
        try:
            pool = connection.find(each)
            if pool is not None:
                found.append(_libvirt_entry(pool))
        except CloneError as exc:
            # Undefined since it was listed is no news; else the others are told of all the same.
            if name is not None:
                raise
            if exc.code != "NO_STORAGE_POOL":
                warnings.append(exc.msg)
    return found, warnings


def _directory_entries(name: str) -> t.List[Entry]:
    path = os.path.normpath(name)
    if not os.path.isdir(path):
        return []
    status = os.statvfs(path)
    # As libvirt counts them (virStorageBackendRefreshLocal).
    capacity, available = status.f_blocks * status.f_frsize, status.f_bfree * status.f_frsize
    sizes = (capacity, capacity - available, available)
    return [_entry(name, "directory", "active", path=path, sizes=sizes)]


def _libvirt_entry(pool: LibvirtPool) -> Entry:
    described = definition.parse(pool.document())
    active = pool.is_active()
    return _entry(
        pool.name,
        described.type,
        "active" if active else "inactive",
        uuid=described.uuid,
        autostart=pool.autostart(),
        persistent=pool.is_persistent(),
        path=described.target_path,
        sizes=pool.sizes() if active else (None, None, None),
        source=described.source,
        remote=isinstance(pool, RemotePool),
    )


def _entry(
    name: str,
    pool_type: t.Optional[str],
    state: t.Optional[str],
    *,
    uuid: t.Optional[str] = None,
    autostart: t.Optional[bool] = None,
    persistent: t.Optional[bool] = None,
    path: t.Optional[str] = None,
    sizes: t.Tuple[t.Optional[int], t.Optional[int], t.Optional[int]] = (None, None, None),
    source: t.Optional[Source] = None,
    remote: bool = False,
) -> Entry:
    capacity, allocation, available = sizes
    able = asdict(capabilities.of(pool_type or "", remote))
    del able["staging"]
    return {
        "name": name,
        "uuid": uuid,
        "type": pool_type,
        "state": state,
        "autostart": autostart,
        "persistent": persistent,
        "path": path,
        "capacity": capacity,
        "allocation": allocation,
        "available": available,
        "source": source.stated if source is not None else {},
        "capabilities": {**able, "formats": list(able["formats"])},
    }


def _shown(name: str, state: t.Optional[State]) -> t.Dict[str, t.Any]:
    """One side of the diff: what is known, named as a task writes it."""
    if state is None:
        return {}
    owner = state.owner
    shown = {
        "name": name,
        "type": state.type,
        "state": state.state,
        "autostart": state.autostart,
        "persistent": state.persistent,
        **_definition(state.definition),
        "password": state.password,
        "owner": None if owner.uid is None else user_name(owner.uid),
        "group": None if owner.gid is None else group_name(owner.gid),
        "mode": None if owner.mode is None else f"{owner.mode:04o}",
    }
    return {key: value for key, value in shown.items() if value is not None}


def _definition(described: t.Optional[Definition]) -> t.Dict[str, t.Any]:
    if described is None:
        return {}
    return {
        "target_path": described.target_path,
        "pool_source": described.source.stated or None,
        # By path, what no parameter exists for.
        "xml": {path: list(values) for path, values in sorted(described.others.items())} or None,
    }
