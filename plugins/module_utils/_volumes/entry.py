# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""How a volume on disk is described in what modules return. Sizes are integers in bytes."""

from __future__ import annotations

import functools
import os
import typing as t

from .. import _permissions

# A pool of a thousand volumes has few owners, and a directory service may be slow to name them.
_user_name = functools.lru_cache(maxsize=None)(_permissions.user_name)
_group_name = functools.lru_cache(maxsize=None)(_permissions.group_name)


def describe(
    pool: str,
    path: str,
    status: os.stat_result,
    image_format: t.Optional[str],
    capacity: t.Optional[int],
    label: t.Optional[str],
    backing: t.Optional[t.Mapping[str, t.Any]],
) -> t.Dict[str, t.Any]:
    """The part that every module returns of a volume. ``backing`` has ``path``, ``format`` and ``depth``."""
    path = printable(path)
    return {
        "name": os.path.basename(path),
        "pool": pool,
        "path": path,
        "key": path,
        "type": "file",
        "format": image_format,
        "capacity": capacity,
        "allocation": status.st_blocks * 512,
        "physical": status.st_size,
        "backing": backing,
        "owner": _user_name(status.st_uid),
        "group": _group_name(status.st_gid),
        "mode": f"{status.st_mode & 0o777:04o}",
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
