# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Checksums as get_url takes them: ``sha256:HEX``, or ``sha256:URL`` of a file that lists those of many files."""

from __future__ import annotations

import hashlib
import re
import typing as t
from dataclasses import dataclass

from .._errors import CloneError
from .._units import quoted

#: The longest list that is read, in bytes.
MAX_LIST = 4 << 20
_ALGORITHMS = sorted(name for name in hashlib.algorithms_guaranteed if not name.startswith("shake_"))
# md5sum(1) and its like: the digest, a blank, a blank or an asterisk, the name. "--tag" and BSD: ALGORITHM (NAME) = DIGEST.
_GNU = re.compile(r"\\?([0-9a-fA-F]+)[ \t]+\*?(\S.*)")
_BSD = re.compile(r"([\w-]+) ?\((.+)\) ?= ?([0-9a-fA-F]+)")


@dataclass(frozen=True)
class Checksum:
    """``digest`` in hexadecimal digits, or the ``url`` of the list that has it."""

    algorithm: str
    digest: str = ""
    url: str = ""

    def new(self) -> t.Any:
        """A hash that can be fed.

        :raises CloneError: ``CONFIG_UNSUPPORTED`` where this host forbids it, as FIPS 140 does md5
        """
        try:
            return hashlib.new(self.algorithm)
        except ValueError as exc:
            raise CloneError("CONFIG_UNSUPPORTED", f"checksum: {self.algorithm} is not possible on this host: {exc}") from None

    def expect(self, found: str, what: str) -> None:
        """:raises CloneError: ``CHECKSUM_MISMATCH``, naming both"""
        if found != self.digest:
            raise CloneError(
                "CHECKSUM_MISMATCH", f"{what} has the {self.algorithm} checksum {found}, asked for is {self.digest}"
            )


def parse(text: str) -> Checksum:
    """:raises CloneError: ``INVALID_ARG`` for what is no checksum"""
    algorithm, colon, value = text.strip().partition(":")
    algorithm = algorithm.strip().lower()
    if not colon or algorithm not in _ALGORITHMS:
        raise CloneError(
            "INVALID_ARG", f"checksum: {quoted(text)} does not begin with one of {', '.join(_ALGORITHMS)} and a colon"
        )
    value = value.strip()
    if re.match("[A-Za-z][A-Za-z0-9+.-]*:", value):
        return Checksum(algorithm, url=value)
    # What a web page puts between the digits, zero-width spaces too.
    return Checksum(algorithm, _digest(algorithm, re.sub(r"\W+", "", value), f"checksum: {quoted(text)}"))


def _digest(algorithm: str, value: str, what: str) -> str:
    length = hashlib.new(algorithm).digest_size * 2
    if not re.fullmatch(f"[0-9a-fA-F]{{{length}}}", value):
        raise CloneError("INVALID_ARG", f"{what} is not {algorithm}, which has {length} hexadecimal digits")
    return value.lower()


def find(listed: str, algorithm: str, name: str, where: str) -> str:
    """The digest that a list, of ``sha256sum`` or with BSD's lines or of nothing but one digest, has for a file.

    :param where: what the list is called in messages
    :raises CloneError: ``INVALID_ARG`` where it has none, or several that differ
    """
    lines = [line.strip() for line in listed.splitlines() if line.strip()]
    if len(lines) == 1 and len(lines[0].split()) == 1:
        return _digest(algorithm, lines[0], f"checksum: what {where} says")
    length = hashlib.new(algorithm).digest_size * 2
    found = set()
    for line in lines:
        tagged, plain = _BSD.fullmatch(line), _GNU.fullmatch(line)
        if tagged:
            called, path, digest = tagged.groups()
            if _plain(called) != _plain(algorithm):
                continue
        elif plain:
            digest, path = plain.groups()
        else:
            # Comments, and the armour of a signature.
            continue
        if len(digest) == length and (path[2:] if path.startswith("./") else path) == name:
            found.add(digest.lower())
    if len(found) != 1:
        what = "several checksums" if found else "no checksum"
        raise CloneError("INVALID_ARG", f"checksum: {where} has {what} of {algorithm} for {quoted(name)}")
    return found.pop()


def _plain(algorithm: str) -> str:
    """openssl(1) writes SHA2-256, and others SHA256."""
    return algorithm.lower().replace("sha2-", "sha").replace("-", "").replace("_", "")
