# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Owner, group, mode and SELinux context: what a new volume gets, and what of one that exists is to be changed."""

from __future__ import annotations

import typing as t

from .._errors import CloneError
from .model import Facts, Ownership, TargetFacts
from .request import Request


def new_ownership(request: Request, facts: Facts) -> Ownership:
    """As stated; else the source's, when that is a file volume of a pool (as ``virsh vol-clone`` does); else 0600 and us.

    A user who may not give files away keeps his own where nothing was stated.
    """
    if facts.pool.able.devices:
        return Ownership()
    if facts.pool.remote:
        # Of libvirt's daemon where nothing is stated, and nobody knows who that is.
        source_uid, source_gid, mode = facts.source.owner or (None, None, 0o600)
        return Ownership(
            source_uid if request.owner is None else request.owner,
            source_gid if request.group is None else request.group,
            mode if request.mode is None else request.mode.on(mode),
        )
    uid, gid, mode = facts.uid, facts.gid, 0o600
    if facts.source.owner is not None:
        source_uid, source_gid, mode = facts.source.owner
        uid = source_uid if facts.uid == 0 else uid
        gid = source_gid if facts.uid == 0 or source_gid in facts.groups else gid
    return Ownership(
        request.owner if request.owner is not None else uid,
        request.group if request.group is not None else gid,
        request.mode.on(mode) if request.mode is not None else mode,
        merged_label(facts.default_label, request.label),
    )


def changed_ownership(request: Request, target: TargetFacts) -> t.Optional[Ownership]:
    """The stated values that are not so yet."""
    mode = None if request.mode is None else request.mode.on(target.mode or 0)
    label = merged_label(target.label, request.label)
    wanted = Ownership(
        request.owner if request.owner != target.uid else None,
        request.group if request.group != target.gid else None,
        mode if mode != target.mode else None,
        label if label != target.label else None,
    )
    return None if wanted == Ownership() else wanted


def merged_label(current: t.Optional[str], stated: t.Mapping[str, str]) -> t.Optional[str]:
    """A SELinux context, ``user:role:type:level``, with the stated parts put in."""
    if not stated:
        return current
    parts = dict(zip(("user", "role", "type", "level"), (current or "system_u:object_r:virt_image_t:s0").split(":", 3)))
    parts.update(stated)
    return ":".join(parts.values())


def permissions_stay(request: Request, facts: Facts, wanted: Ownership) -> CloneError:
    """libvirt sets them where it makes a volume, and has no call that changes them."""
    now = facts.target
    parameter, has, asked = next(
        (name, has, asked)
        for name, has, asked in (
            ("owner", str(now.uid), wanted.uid),
            ("group", str(now.gid), wanted.gid),
            ("mode", f"{now.mode:04o}", None if wanted.mode is None else f"{wanted.mode:04o}"),
        )
        if asked is not None
    )
    return CloneError(
        "NO_SUPPORT",
        f"{parameter}: {facts.what} has {has}, asked for is {asked}, which cannot be changed by a connection to another host"
        f" (uri {request.uri}); run the task on that host",
    )
