# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The one exception that a user's mistake or a failing system ends in."""

from __future__ import annotations

import errno

#: Every value that ``error_code`` can have. Named after libvirt's ``virErrorNumber`` where libvirt has one.
ERROR_CODES = frozenset(
    (
        "CHECKSUM_MISMATCH",
        "CONFIG_UNSUPPORTED",
        "CORRUPT_IMAGE",
        "DIFFERS",
        "INVALID_ARG",
        "IN_USE",
        "IO_ERROR",
        "MISSING_DEPENDENCY",
        "NO_SPACE",
        "NO_STORAGE_POOL",
        "NO_STORAGE_VOL",
        "NO_SUPPORT",
        "OPERATION_DENIED",
        "OPERATION_INVALID",
        "STORAGE_VOL_EXIST",
        "TIMEOUT",
        "UNSAFE_IMAGE",
        "XML_ERROR",
    )
)


class CloneError(Exception):
    """A refusal or a failure: one sentence for a person, one code for a playbook.

    :param code: one of :data:`ERROR_CODES`.
    :param msg: one sentence that names the parameter or volume, and both values where two disagree.
    """

    def __init__(self, code: str, msg: str) -> None:
        super().__init__(msg)
        if code not in ERROR_CODES:
            raise ValueError(f"unknown error code {code!r}")
        self.code = code
        self.msg = msg


def from_os_error(exc: OSError, doing: str) -> CloneError:
    """The :class:`CloneError` for a failed system call.

    :param doing: what failed, as the start of a sentence: ``"writing volume 'x'"``.
    """
    if exc.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        code = "OPERATION_DENIED"
    elif exc.errno in (errno.ENOSPC, errno.EDQUOT):
        code = "NO_SPACE"
    else:
        code = "IO_ERROR"
    return CloneError(code, f"{doing} failed: {exc.strerror or exc}")
