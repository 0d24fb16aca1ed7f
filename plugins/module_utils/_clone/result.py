# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the module returns. Sizes are integers in bytes."""

from __future__ import annotations

import os
import typing as t
from dataclasses import replace

from .._permissions import group_name, user_name
from .._transfer import file_copy
from .planner import Create, Facts, Plan, SourceFacts, State

if t.TYPE_CHECKING:  # pragma: no cover
    from .executor import Transfer
    from .facts import Scene


def build(scene: Scene, facts: Facts, plan: Plan, transfer: t.Optional[Transfer], duration: float) -> t.Dict[str, t.Any]:
    """The module's result for one clone."""
    actions = plan.actions
    created = next((step for step in plan.steps if isinstance(step, Create)), None)
    path = os.path.join(facts.pool.path, facts.name) if facts.pool.path else None
    on_disk = _stat(path) if path and not (scene.check_mode and created) else None
    after = plan.after
    if on_disk is not None and not scene.check_mode:
        after = replace(after, uid=on_disk.st_uid, gid=on_disk.st_gid, mode=on_disk.st_mode & 0o777)
    image = None if created else facts.target.image
    volume: t.Dict[str, t.Any] = {
        "name": facts.name,
        "pool": facts.pool.name,
        "path": path,
        "key": path,
        "type": "file",
        "allocation": on_disk.st_blocks * 512 if on_disk else None,
        "physical": on_disk.st_size if on_disk else None,
        "backing": {"path": image.backing, "format": image.backing_format or "raw", "depth": None}
        if image is not None and image.backing is not None
        else None,
        "changed": bool(actions),
        "actions": actions,
        "transfer": transfer.name if transfer else None,
        "shared": _shared(path) if transfer else None,
        "fallback_reason": transfer.fallback_reason if transfer else None,
        "dropped": list(created.dropped) if created else [],
        "duration": round(duration, 3),
        "error_code": None,
        "msg": None,
        **_state(after),
    }
    named = {"name": facts.name, "pool": facts.pool.name}
    return {
        "changed": bool(actions),
        "actions": actions,
        "volume": volume,
        **({} if scene.request.blank else {"source": _source(facts.source)}),
        "diff": {
            "before": {**named, **_state(plan.before)} if plan.before else {},
            "after": {**named, **_state(plan.after)},
        },
        "warnings": list(plan.warnings),
    }


def _source(source: SourceFacts) -> t.Dict[str, t.Any]:
    return {
        "pool": source.pool,
        "name": source.name,
        "path": source.path,
        "format": source.image.format if source.image else None,
        "capacity": source.image.capacity if source.image else None,
    }


def _state(state: State) -> t.Dict[str, t.Any]:
    return {
        "format": state.format,
        "capacity": state.capacity,
        "owner": None if state.uid is None else user_name(state.uid),
        "group": None if state.gid is None else group_name(state.gid),
        "mode": None if state.mode is None else f"{state.mode:04o}",
        **({} if state.label is None else {"secontext": state.label}),
    }


def _stat(path: str) -> t.Optional[os.stat_result]:
    try:
        return os.stat(path, follow_symlinks=False)
    except OSError:
        return None


def _shared(path: t.Optional[str]) -> t.Optional[bool]:
    try:
        fd = os.open(t.cast(str, path), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return file_copy.shares_blocks(fd)
    finally:
        os.close(fd)
