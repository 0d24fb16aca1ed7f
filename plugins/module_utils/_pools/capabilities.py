# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What this collection can do with the volumes of a pool, by the pool's type: the one table that decides it."""

from __future__ import annotations

import typing as t
from dataclasses import dataclass

from .._images.probe import FORMATS


@dataclass(frozen=True)
class Capabilities:
    """``formats`` are those that a new volume can have; ``clone`` is being the target of a full clone."""

    create: bool = False
    clone: bool = False
    grow: bool = False
    delete: bool = False
    formats: t.Tuple[str, ...] = ()


_FILES = Capabilities(create=True, clone=True, grow=True, delete=True, formats=tuple(FORMATS))
_OF_TYPE = {"directory": _FILES, "dir": _FILES, "fs": _FILES, "netfs": _FILES}

#: types of libvirt's pools whose volumes are files
FILE_POOLS = tuple(pool_type for pool_type in _OF_TYPE if pool_type != "directory")


def of(pool_type: str) -> Capabilities:
    return _OF_TYPE.get(pool_type, Capabilities())
