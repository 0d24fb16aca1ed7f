# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""How a volume is described in what modules return. Sizes are integers in bytes."""

from __future__ import annotations

import functools
import os
import typing as t

from .. import _permissions

# A pool of a thousand volumes has few owners, and a directory service may be slow to name them.
_user_name = functools.lru_cache(maxsize=None)(_permissions.user_name)
_group_name = functools.lru_cache(maxsize=None)(_permissions.group_name)

Owner = t.Tuple[t.Optional[int], t.Optional[int], t.Optional[int]]


def describe(
    pool: str,
    name: str,
    path: t.Optional[str],
    *,
    kind: str = "file",
    image_format: t.Optional[str] = None,
    capacity: t.Optional[int] = None,
    allocation: t.Optional[int] = None,
    physical: t.Optional[int] = None,
    backing: t.Optional[t.Mapping[str, t.Any]] = None,
    owner: Owner = (None, None, None),
    label: t.Optional[str] = None,
    numeric: bool = False,
) -> t.Dict[str, t.Any]:
    """The part that every module returns of a volume; None for what is not known yet.

    :param kind: libvirt's type of it
    :param backing: ``path``, ``format`` and ``depth``
    :param owner: user, group and mode
    :param numeric: whether users and groups are those of another host, where what they are called is not known
    """
    path = None if path is None else printable(path)
    return {
        "name": printable(name),
        "pool": pool,
        "path": path,
        "key": path,
        "type": kind,
        "format": image_format,
        "capacity": capacity,
        "allocation": allocation,
        "physical": physical,
        "backing": backing,
        **permissions(owner, label, numeric),
    }


def permissions(owner: Owner, label: t.Optional[str], numeric: bool = False) -> t.Dict[str, t.Optional[str]]:
    """Owner, group, mode and SELinux context; None for what there is not, or is not known."""
    uid, gid, mode = owner
    user, group = (str, str) if numeric else (_user_name, _group_name)
    return {
        "owner": None if uid is None else user(uid),
        "group": None if gid is None else group(gid),
        "mode": None if mode is None else f"{mode & 0o777:04o}",
        **({} if label is None else {"secontext": label}),
    }


def printable(path: str) -> str:
    """A path as it can be put into a result, which is UTF-8: file names and what images record may be any bytes."""
    return os.fsencode(path).decode("utf-8", "replace")


def depend(dependents: t.Sequence[str]) -> str:
    """Volumes that depend on one, as words for a message."""
    count = "1 volume depends" if len(dependents) == 1 else f"{len(dependents)} volumes depend"
    return f"{count} on it: {first(dependents)}"


def first(names: t.Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
