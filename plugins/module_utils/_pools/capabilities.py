# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What this collection can do with the volumes of a pool, by the pool's type: the one table that decides it."""

from __future__ import annotations

import typing as t
from dataclasses import dataclass, replace

from .._images.probe import FORMATS


@dataclass(frozen=True)
class Capabilities:
    """``formats`` are those that a new volume can have; ``clone`` is being the target of a full clone, ``linked`` of a linked.

    ``staging`` is how nobody takes an unfinished volume for a whole one: a ``file`` has no name until it is whole, a device has
    another name (``rename``), or where it cannot be renamed a mark in its first block (``mark``).
    """

    create: bool = False
    clone: bool = False
    linked: bool = False
    flatten: bool = False
    grow: bool = False
    delete: bool = False
    formats: t.Tuple[str, ...] = ()
    staging: str = ""

    @property
    def devices(self) -> bool:
        """Whether the volumes are devices, on this host or on the network, not files."""
        return self.staging in ("rename", "mark")


_FILES = Capabilities(
    create=True, clone=True, linked=True, flatten=True, grow=True, delete=True, formats=tuple(FORMATS), staging="file"
)
_LUNS = Capabilities(clone=True, formats=("raw",), staging="mark")
_OF_TYPE = {
    "directory": _FILES,
    "dir": _FILES,
    "fs": _FILES,
    "netfs": _FILES,
    "logical": Capabilities(create=True, clone=True, linked=True, grow=True, delete=True, formats=("raw",), staging="rename"),
    "disk": Capabilities(create=True, clone=True, delete=True, formats=("raw",), staging="mark"),
    "rbd": Capabilities(
        create=True, clone=True, linked=True, flatten=True, grow=True, delete=True, formats=("raw",), staging="rename"
    ),
    "iscsi": _LUNS,
    "iscsi-direct": _LUNS,
    "scsi": _LUNS,
}

#: a directory without libvirt, and the types of libvirt's pools in which something can be done
TYPES = tuple(_OF_TYPE)
#: types of libvirt's pools whose volumes are files
FILE_POOLS = tuple(name for name, able in _OF_TYPE.items() if able.staging == "file" and name != "directory")
#: types of libvirt's pools in which volumes are cloned
CLONE_POOLS = tuple(name for name, able in _OF_TYPE.items() if able.clone and name != "directory")


def of(pool_type: str, remote: bool = False) -> Capabilities:
    """``remote``: what libvirt itself can do there, which knows no vhdx, and has no call that flattens."""
    able = _OF_TYPE.get(pool_type, Capabilities())
    if not remote:
        return able
    if able.staging != "file":
        return Capabilities()
    return replace(able, flatten=False, formats=tuple(name for name in able.formats if name != "vhdx"))
