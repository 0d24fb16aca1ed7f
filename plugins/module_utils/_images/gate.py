# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What is refused of an image: one named check for each danger, and bounded reads for whoever looks.

The name of the check ends the message, as ``[backing_file]``. docs/security.md has the same table.
"""

from __future__ import annotations

import os
import typing as t
from dataclasses import dataclass

from .._errors import CloneError


@dataclass(frozen=True)
class Check:
    """``code`` is the error code of a refusal, ``refuses`` says of what."""

    code: str
    refuses: str


#: Every check by its name.
CHECKS: t.Mapping[str, Check] = {
    # What else would be read.
    "backing_file": Check("UNSAFE_IMAGE", "a backing file outside the pools that the task names, or one that is no file"),
    "backing_format": Check(
        "UNSAFE_IMAGE", "a backing file of a format that is not known, or not recorded and so would be guessed"
    ),
    "data_file": Check("UNSAFE_IMAGE", "a qcow2 image that keeps its data in another file"),
    "extent": Check("UNSAFE_IMAGE", "a vmdk that keeps its data in other files, or whose descriptor could mean that"),
    "parent_locator": Check("UNSAFE_IMAGE", "a vmdk, vdi, vpc or vhdx image that is the difference to a parent"),
    "symbolic_link": Check("UNSAFE_IMAGE", "a volume that is a symbolic link out of the pools that the task names"),
    "hard_link": Check("UNSAFE_IMAGE", "a volume or backing file with a further name outside the pools that the task names"),
    "chain_depth": Check("UNSAFE_IMAGE", "more than 64 images below the source"),
    "chain_loop": Check("UNSAFE_IMAGE", "an image that has itself below it"),
    "encrypted": Check("UNSAFE_IMAGE", "an encrypted image below another one, which nobody could read"),
    # What it could be taken for.
    "two_formats": Check("UNSAFE_IMAGE", "bytes of two formats, where source_format does not say which is meant"),
    "footer_only": Check("UNSAFE_IMAGE", "a format told by the end of the file alone, where source_format does not say it"),
    "unknown_feature": Check("UNSAFE_IMAGE", "a version, or a feature that must be understood, which is not known here"),
    # What it would cost.
    "over_limit": Check("UNSAFE_IMAGE", "a capacity over max_capacity"),
    "too_costly": Check("UNSAFE_IMAGE", "an image that takes qemu-img more than 30 s of processor time, or 2 GiB of memory"),
    # What is broken.
    "dirty": Check("CORRUPT_IMAGE", "an image that was not closed, or whose log was not replayed"),
    "corrupt": Check("CORRUPT_IMAGE", "an image that is marked corrupt"),
    "header": Check("CORRUPT_IMAGE", "fields of a header that cannot be, or contradict each other"),
    "out_of_file": Check("CORRUPT_IMAGE", "tables, names or data that lie outside the file"),
    "capacity": Check("CORRUPT_IMAGE", "a capacity that the format, or the image's own tables, cannot have"),
    "unreadable": Check("CORRUPT_IMAGE", "an image that qemu-img info cannot open in the format that it is read as"),
    "qemu_check": Check("CORRUPT_IMAGE", "an image in which qemu-img check finds errors"),
}


def refusal(check: str, sentence: str) -> CloneError:
    """The error of a check: its code, and a sentence that ends in its name."""
    return CloneError(CHECKS[check].code, f"{sentence} [{check}]")


class Reader:
    """The bytes of an image, for who reads its header. An image decides where it is read, so it does not decide how much.

    :param size: of the file or device in bytes
    :param what: what a message calls it
    """

    #: The longest thing that any header leads to is the descriptor of a vmdk, of 1 MiB.
    BUDGET = 2 << 20

    def __init__(self, fd: int, size: int, what: str, image_format: str) -> None:
        self.size = size
        self._fd = fd
        self._what = what
        self._format = image_format
        self._left = self.BUDGET

    def read(self, at: int, length: int) -> bytes:
        """``length`` bytes from ``at`` on, fewer where the image ends."""
        length = min(length, max(self.size - at, 0))
        self._left -= length
        if self._left < 0:
            raise self.refuse("header", f"its header refers to more than {self.BUDGET} bytes of headers")
        return os.pread(self._fd, length, at) if length > 0 else b""

    def need(self, at: int, length: int, part: str) -> bytes:
        """``length`` bytes from ``at`` on.

        :raises CloneError: ``out_of_file`` where they are not all there
        """
        found = self.read(at, length)
        if len(found) < length:
            raise self.refuse("out_of_file", f"{part} lies outside the file")
        return found

    def inside(self, at: int, length: int, part: str) -> None:
        """:raises CloneError: ``out_of_file`` where that part lies outside the file"""
        if at + length > self.size:
            raise self.refuse("out_of_file", f"{part} lies outside the file")

    def sound(self, condition: bool, why: str, check: str = "header") -> None:
        """:raises CloneError: of this check, where the condition does not hold"""
        if not condition:
            raise self.refuse(check, why)

    def refuse(self, check: str, why: str) -> CloneError:
        if CHECKS[check].code == "CORRUPT_IMAGE":
            return refusal(check, f"{self._what} is no sound {self._format} image: {why}")
        return refusal(check, f"{self._what} {why}")
