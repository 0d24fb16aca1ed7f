# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Names of volumes and pools, and which of them are possible."""

from __future__ import annotations

import os
import re
import unicodedata

from ._errors import CloneError
from ._units import quoted

_STAGED_NAME = re.compile(r"\.virtforge-[0-9a-f]{16}\.tmp")

# In bytes. libvirt writes a pool's document to such a file first (virFileRewrite), and no file system has longer names.
_MAX_POOL = 255 - len(".xml.new")


def is_staged_name(name: str) -> bool:
    """Whether a file of this name is somebody's staging file and so no volume."""
    return _STAGED_NAME.fullmatch(name) is not None


def is_readable(text: str) -> bool:
    """Whether a person can read a text on one line, and XML can carry it (``Char`` in XML 1.0)."""
    return not any(unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") or char in "\ufffe\uffff" for char in text)


def check_readable(text: str, parameter: str) -> None:
    if not is_readable(text):
        raise CloneError("INVALID_ARG", f"{parameter}: {quoted(text)} contains a control character")


def check_name(name: str, parameter: str) -> None:
    """A volume's name is one path component that a person can read.

    libvirt itself learned about ``/`` by CVE-2015-5313; control characters would corrupt a terminal or a log line.
    """
    problem = None
    try:
        encoded = name.encode("utf-8")
    except UnicodeEncodeError:
        raise CloneError("INVALID_ARG", f"{parameter}: {name!a} is not valid text") from None
    if not name:
        problem = "is empty"
    elif "/" in name:
        problem = "contains '/'"
    elif name in (".", ".."):
        problem = "is a directory"
    elif not is_readable(name):
        problem = "contains a control character"
    elif len(encoded) > 255:
        problem = f"is {len(encoded)} bytes long, of 255 possible"
    elif is_staged_name(name):
        problem = "is reserved for unfinished volumes"
    if problem:
        shown = name if len(name) <= 80 else name[:77] + "..."
        raise CloneError("INVALID_ARG", f"{parameter}: {shown!a} {problem}; a volume name is one path component")


def check_path(path: str, parameter: str) -> None:
    if "\0" in path or not os.path.isabs(path):
        raise CloneError("INVALID_ARG", f"{parameter}: {path!a} is not an absolute path")


def check_pool(pool: str, parameter: str) -> None:
    if not pool:
        raise CloneError("INVALID_ARG", f"{parameter}: {pool!a} is not the name of a pool")
    check_readable(pool, parameter)
    if os.path.isabs(pool):
        return
    if "/" in pool:
        raise CloneError("INVALID_ARG", f"{parameter}: {pool!a} is neither a pool's name nor an absolute directory")
    size = len(pool.encode("utf-8"))
    if size > _MAX_POOL:
        raise CloneError("INVALID_ARG", f"{parameter}: {quoted(pool)} is {size} bytes long, of {_MAX_POOL} possible")
