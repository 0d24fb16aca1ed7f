# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Sizes as libvirt writes them, in and out of bytes."""

from __future__ import annotations

import re
import typing as t

from ._errors import CloneError

#: ``off_t`` is signed: no file can be larger (``virStorageSize`` in libvirt's storage_conf.c).
MAX_BYTES = 2**63 - 1

_BLANKS = " \t\r\n"
_LETTERS = "kmgtpe"
_BYTES_IN: t.Dict[str, int] = {"": 1, "b": 1, "byte": 1, "bytes": 1}
for _power, _letter in enumerate(_LETTERS, 1):
    _BYTES_IN[_letter] = _BYTES_IN[_letter + "ib"] = 1024**_power
    _BYTES_IN[_letter + "b"] = 1000**_power

_CAPACITY = re.compile(r"([0-9]+)[ \t\r\n]*([A-Za-z]*)")


def quoted(value: str) -> str:
    """A foreign value as messages show it: in quotes, on one line, in ASCII, at most 80 characters of it."""
    return ascii(value if len(value) <= 80 else value[:77] + "...")


def parse_capacity(text: str, parameter: str = "capacity") -> int:
    """Bytes, from a number and one of libvirt's units: ``40G``, ``40GiB`` (1024), ``40 GB`` (1000), plain bytes.

    :raises CloneError: ``INVALID_ARG`` for anything else and for more than :data:`MAX_BYTES`
    """
    match = _CAPACITY.fullmatch(text.strip(_BLANKS))
    if match is None:
        raise CloneError("INVALID_ARG", f"{parameter}: {quoted(text)} is not a size such as 40GiB, 40 GB or 42949672960")
    return _in_bytes(match.group(1), match.group(2), f"{parameter}: {quoted(text)}")


def scale(number: str, unit: t.Optional[str], element: str) -> int:
    """Bytes, from the text and the ``unit`` attribute of an XML element (``virScaleInteger`` in libvirt's virutil.c).

    As in libvirt, blanks may stand before the number, and nothing may follow it.

    :param element: the element's name, for messages
    :raises CloneError: ``XML_ERROR`` for a malformed number; ``INVALID_ARG`` for an unknown unit and for more than
        :data:`MAX_BYTES`
    """
    digits = number.lstrip(_BLANKS)
    if re.fullmatch("[0-9]+", digits) is None:
        raise CloneError("XML_ERROR", f"xml: malformed {element} element: {quoted(number)} is not a decimal number")
    return _in_bytes(digits, unit or "", f"xml: element <{element}>, {quoted(digits)},")


def format_bytes(size: int) -> str:
    """Bytes for a message, exact, and in a unit a person can read: ``42949672960 bytes (40 GiB)``."""
    exact = f"{size} byte" if size == 1 else f"{size} bytes"
    power = min((abs(size).bit_length() - 1) // 10, len(_LETTERS))
    if power < 1:
        return exact
    tenths, rest = divmod(size * 10, 1024**power)
    number = f"{tenths / 10:.1f}"
    if number.endswith(".0"):
        number = number[:-2]
    return f"{exact} ({'about ' if rest else ''}{number} {_LETTERS[power - 1].upper()}iB)"


def _in_bytes(digits: str, unit: str, what: str) -> int:
    # Only ASCII: str.lower() makes a "k" of the Kelvin sign, U+212A.
    factor = _BYTES_IN.get(unit.lower()) if unit.isascii() else None
    if factor is None:
        raise CloneError("INVALID_ARG", f"{what} has the unknown suffix {quoted(unit)}")
    significant = digits.lstrip("0") or "0"
    # The length first: int() of a long string takes quadratic time, or raises ValueError since Python 3.11.
    if len(significant) > len(str(MAX_BYTES)) or int(significant) * factor > MAX_BYTES:
        raise CloneError("INVALID_ARG", f"{what} is more than {MAX_BYTES} bytes")
    return int(significant) * factor
