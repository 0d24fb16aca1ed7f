# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What modules return of the volumes of a pool whose volumes are devices. Changes nothing."""

from __future__ import annotations

import typing as t

from .._pools.devices import Device, DevicePool
from . import entry


def described(pool: DevicePool, name: t.Optional[str]) -> t.List[t.Dict[str, t.Any]]:
    """What ``storage_volume_info`` returns of the volume of that name, or of all for None."""
    volumes = pool.volumes()
    asked_for = [volume for volume in volumes if name in (None, volume.name)]
    dependents, users = pool.dependents_among(volumes), pool.users_by_name(asked_for)
    return [
        {
            **describe(pool, volume, volumes),
            "dependents": sorted(dependents.get(volume.name, ())),
            "in_use_by": users[volume.name],
        }
        for volume in asked_for
    ]


def describe(pool: DevicePool, volume: Device, volumes: t.Sequence[Device]) -> t.Dict[str, t.Any]:
    """The volume as ``storage_volume_clone`` returns one, with its backing chain.

    :param volumes: all of the pool
    """
    below = pool.below(volume, volumes)
    unfinished = pool.is_unfinished(volume)
    why = f"volume {volume.name!r} of pool {pool.name!r} is not finished: the run that made it was killed"
    return {
        **entry.describe(
            pool.name,
            volume.name,
            volume.path,
            kind=pool.volume_type,
            image_format="raw",
            capacity=volume.sound,
            allocation=pool.allocation(volume),
            physical=volume.capacity,
            backing={"path": below[0].path, "format": "raw", "depth": len(below)} if below else None,
        ),
        "error_code": "CORRUPT_IMAGE" if unfinished else None,
        "msg": why if unfinished else None,
        "backing_chain": [{"path": one.path, "format": "raw"} for one in below],
    }
