# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the module returns. Sizes are integers in bytes."""

from __future__ import annotations

import os
import typing as t
from dataclasses import replace

from .._errors import CloneError
from .._pools.devices import DevicePool
from .._pools.remote import RemotePool
from .._transfer import file_copy
from .._volumes import entry
from .model import Backing, Create, Facts, Plan, SourceFacts, State

if t.TYPE_CHECKING:  # pragma: no cover
    from .facts import Scene
    from .many import Job
    from .work import Transfer


def build(scene: Scene, facts: Facts, plan: Plan, transfer: t.Optional[Transfer], duration: float) -> t.Dict[str, t.Any]:
    """The module's result for one clone."""
    actions = plan.actions
    created = next((step for step in plan.steps if isinstance(step, Create)), None)
    path = os.path.join(facts.pool.path, facts.name) if facts.pool.path else None
    there = not (scene.check_mode and created)
    devices, remote = facts.pool.able.devices, facts.pool.remote
    pool = scene.pool if not facts.pool.missing else None
    if isinstance(pool, DevicePool):
        path = scene.target.device.path if scene.target.device else pool.path_of(facts.name)
    on_disk = _stat(path) if path and there and not (devices or remote) else None
    elsewhere = pool.volume(facts.name) if isinstance(pool, RemotePool) and there else None
    after = plan.after
    if on_disk is not None and not scene.check_mode:
        after = replace(after, uid=on_disk.st_uid, gid=on_disk.st_gid, mode=on_disk.st_mode & 0o777)
    if elsewhere is not None and elsewhere.stated is not None:
        stated = elsewhere.stated
        after = replace(after, uid=stated.owner, gid=stated.group, mode=stated.mode)
    allocation, physical = None, None
    if on_disk is not None:
        allocation, physical = on_disk.st_blocks * 512, on_disk.st_size
    elif elsewhere is not None:
        allocation, physical = elsewhere.allocation, elsewhere.physical
    elif there:
        allocation, physical = _allocation(scene, facts, plan), after.capacity if devices else None
    volume: t.Dict[str, t.Any] = {
        **entry.describe(
            facts.pool.name,
            facts.name,
            path,
            kind=pool.volume_type if isinstance(pool, DevicePool) else "file",
            image_format=after.format,
            capacity=after.capacity,
            allocation=allocation,
            physical=physical,
            backing=_backing(after.backing),
            owner=(after.uid, after.gid, after.mode),
            label=after.label,
            numeric=remote,
        ),
        "changed": bool(actions),
        "actions": actions,
        "transfer": transfer.name if transfer else None,
        "shared": _shared(path) if transfer and not (devices or remote) else None,
        "fallback_reason": transfer.fallback_reason if transfer else None,
        "dropped": list(created.dropped) if created else [],
        "duration": round(duration, 3),
        "error_code": None,
        "msg": None,
    }
    named = {"name": facts.name, "pool": facts.pool.name}
    diff: t.Dict[str, t.Dict[str, t.Any]] = {
        "before": {**named, **_state(plan.before, remote)} if plan.before else {},
        "after": {**named, **_state(plan.after, remote)},
    }
    if plan.after.backing or (plan.before and plan.before.backing):
        for side, state in (("before", plan.before), ("after", plan.after)):
            if state is not None:
                diff[side]["backing"] = _backing(state.backing)
    return {
        "changed": bool(actions),
        "actions": actions,
        "volume": volume,
        **({} if scene.request.blank else {"source": _source(facts.source)}),
        "diff": diff,
        "warnings": [*plan.warnings, *scene.outside.warnings],
    }


def build_many(jobs: t.Sequence[Job]) -> t.Dict[str, t.Any]:
    """The module's result for many clones, in the order of the task; ``failed`` where one has failed."""
    singles = [_single(job) for job in jobs]
    volumes = [single["volume"] for single in singles]
    failed = [volume for volume in volumes if volume["error_code"]]
    outcome: t.Dict[str, t.Any] = {
        "changed": any(volume["changed"] for volume in volumes),
        "actions": sorted({action for volume in volumes for action in volume["actions"]}),
        "volumes": volumes,
        "source": next((single["source"] for single in singles if "source" in single), None),
        "diff": [single["diff"] for single in singles if single["volume"]["changed"]],
        "warnings": list(dict.fromkeys(warning for single in singles for warning in single.get("warnings", ()))),
    }
    if failed:
        told = "; ".join(f"{volume['name']!r}: {volume['msg']}" for volume in failed[:3])
        told += f"; and {len(failed) - 3} more" if len(failed) > 3 else ""
        msg = f"{len(failed)} of {len(volumes)} volumes failed: {told}"
        outcome.update(failed=True, error_code=failed[0]["error_code"], msg=msg)
    return outcome


def _single(job: Job) -> t.Dict[str, t.Any]:
    if job.error is None and job.facts is not None and job.plan is not None:
        return build(job.scene, job.facts, job.plan, job.transfer, job.duration)
    error = t.cast(CloneError, job.error)
    volume = {
        **entry.describe(job.request.pool, t.cast(str, job.request.name), None),
        "changed": False,
        "actions": [],
        "transfer": None,
        "shared": None,
        "fallback_reason": None,
        "dropped": [],
        "duration": round(job.duration, 3),
        "error_code": error.code,
        "msg": error.msg,
    }
    return {"volume": volume}


def _source(source: SourceFacts) -> t.Dict[str, t.Any]:
    return {
        "pool": source.pool,
        "name": source.name,
        "path": source.path,
        "format": source.image.format if source.image else None,
        "capacity": source.image.capacity if source.image else None,
        "cache": source.cache,
    }


def _allocation(scene: Scene, facts: Facts, plan: Plan) -> t.Optional[int]:
    if facts.pool.missing or not isinstance(scene.pool, DevicePool):
        return None
    if not facts.source.fixed and any(isinstance(step, Create) and step.route == "link" for step in plan.steps):
        # All that it reads is its source's; but a classic snapshot of LVM has the space for all of it to change.
        return 0
    changed = plan.steps and not scene.check_mode
    volume = scene.pool.volume(facts.name) if changed else scene.target.device
    return scene.pool.allocation(volume) if volume is not None else None


def _backing(backing: t.Optional[Backing]) -> t.Optional[t.Dict[str, t.Any]]:
    if backing is None:
        return None
    return {"path": entry.printable(backing.path), "format": backing.format, "depth": backing.depth}


def _state(state: State, remote: bool) -> t.Dict[str, t.Any]:
    return {
        "format": state.format,
        "capacity": state.capacity,
        **entry.permissions((state.uid, state.gid, state.mode), state.label, numeric=remote),
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
