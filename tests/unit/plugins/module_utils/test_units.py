# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import pytest
from ansible_collections.virtforge.libvirt.plugins.module_utils import _units
from ansible_collections.virtforge.libvirt.plugins.module_utils._errors import CloneError

MAX = 2**63 - 1


@pytest.mark.parametrize(
    "unit, factor",
    [("", 1), ("b", 1), ("byte", 1), ("bytes", 1)]
    + [(letter + ending, 1024**power) for power, letter in enumerate("kmgtpe", 1) for ending in ("", "ib")]
    + [(letter + "b", 1000**power) for power, letter in enumerate("kmgtpe", 1)],
)
def test_every_unit_of_libvirt_in_any_case_with_or_without_blanks(unit, factor):
    for spelled in (unit, unit.upper(), unit.title()):
        assert _units.parse_capacity(f"7{spelled}") == 7 * factor
        assert _units.parse_capacity(f" 7 {spelled}\n") == 7 * factor
        assert _units.scale("7", spelled, "capacity") == 7 * factor


@pytest.mark.parametrize(
    "text, size",
    [
        ("0", 0),
        ("40G", 42949672960),
        ("40GiB", 42949672960),
        ("40 GB", 40000000000),
        ("42949672960", 42949672960),
        ("007k", 7168),
        ("9223372036854775807", MAX),
        ("0" * 200 + "1", 1),
        ("7E", 7 * 1024**6),
        ("9EB", 9 * 1000**6),
    ],
)
def test_capacity_in_bytes(text, size):
    assert _units.parse_capacity(text) == size


@pytest.mark.parametrize(
    "text",
    ["", " ", "G", "-1", "+1", "1.5G", "1,5G", "1_000", "0x10", "1e3", "1 2", "G1", "1G 1", "1G!", "inf"]
    # Digits and blanks that only Unicode takes for such.
    + ["\u0664", "\uff11\uff10", "\u00b2", "1\u00a0G", "\u00a01G", "1\u2212"]
    # The Kelvin sign, which lower() makes a "k" of, and the long s.
    + ["1\u212a", "1byte\u017f"],
)
def test_what_is_no_size_is_refused_by_parameter_and_value(text):
    with pytest.raises(CloneError) as caught:
        _units.parse_capacity(text, "max_capacity")
    assert caught.value.code == "INVALID_ARG"
    assert caught.value.msg == (f"max_capacity: {text!a} is not a size such as 40GiB, 40 GB or 42949672960")


@pytest.mark.parametrize("unit", ["x", "gi", "kbb", "bit", "gigabyte", "ki", "z", "zib", "bib", "by"])
def test_an_unknown_suffix_is_named(unit):
    with pytest.raises(CloneError) as caught:
        _units.parse_capacity(f"1 {unit}")
    assert (caught.value.code, caught.value.msg) == (
        "INVALID_ARG",
        f"capacity: '1 {unit}' has the unknown suffix '{unit}'",
    )


@pytest.mark.parametrize("text", ["9223372036854775808", "8E", "8388608TiB", "10EB", "99999999999999999999", "9999999T"])
def test_more_than_a_file_can_have_is_refused(text):
    with pytest.raises(CloneError) as caught:
        _units.parse_capacity(text)
    assert (caught.value.code, caught.value.msg) == (
        "INVALID_ARG",
        f"capacity: '{text}' is more than 9223372036854775807 bytes",
    )


def test_a_million_digits_are_refused_shortly_and_at_once():
    with pytest.raises(CloneError) as caught:
        _units.parse_capacity("9" * 1000000)
    assert caught.value.msg == f"capacity: '{'9' * 77}...' is more than 9223372036854775807 bytes"


def test_blanks_are_allowed_before_a_number_in_xml_as_libvirt_does():
    assert _units.scale("\n  10", "GiB", "capacity") == 10 * 1024**3


@pytest.mark.parametrize("unit", [None, ""])
def test_no_unit_in_xml_is_bytes(unit):
    assert _units.scale("10", unit, "capacity") == 10


@pytest.mark.parametrize("number", ["", " ", "x", "-1", "+1", "1.5", "10 ", "10\n", "10G", "0x10", "\u0664"])
def test_a_malformed_number_in_xml(number):
    with pytest.raises(CloneError) as caught:
        _units.scale(number, "GiB", "capacity")
    assert (caught.value.code, caught.value.msg) == (
        "XML_ERROR",
        f"xml: malformed capacity element: {number!a} is not a decimal number",
    )


@pytest.mark.parametrize("unit", ["furlong", " GiB", "GiB ", "\u212aiB", "\u212a"])
def test_an_unknown_unit_in_xml(unit):
    with pytest.raises(CloneError) as caught:
        _units.scale("10", unit, "allocation")
    assert (caught.value.code, caught.value.msg) == (
        "INVALID_ARG",
        f"xml: element <allocation>, '10', has the unknown suffix {unit!a}",
    )


def test_too_large_a_number_in_xml():
    with pytest.raises(CloneError) as caught:
        _units.scale("8", "EiB", "clusterSize")
    assert (caught.value.code, caught.value.msg) == (
        "INVALID_ARG",
        "xml: element <clusterSize>, '8', is more than 9223372036854775807 bytes",
    )


@pytest.mark.parametrize(
    "size, text",
    [
        (0, "0 bytes"),
        (1, "1 byte"),
        (1023, "1023 bytes"),
        (1024, "1024 bytes (1 KiB)"),
        (1536, "1536 bytes (1.5 KiB)"),
        (1025, "1025 bytes (about 1 KiB)"),
        (42949672960, "42949672960 bytes (40 GiB)"),
        (42949672961, "42949672961 bytes (about 40 GiB)"),
        (40000000000, "40000000000 bytes (about 37.2 GiB)"),
        (1024**5 - 1, "1125899906842623 bytes (about 1023.9 TiB)"),
        (MAX, "9223372036854775807 bytes (about 7.9 EiB)"),
    ],
)
def test_sizes_in_messages_are_exact_and_readable(size, text):
    assert _units.format_bytes(size) == text


@pytest.mark.parametrize(
    "value, shown",
    [
        ("a'b", '"a\'b"'),
        ("a\nb", r"'a\nb'"),
        ("\u202e", r"'\u202e'"),
        ("x" * 80, repr("x" * 80)),
        ("x" * 81, repr("x" * 77 + "...")),
    ],
)
def test_foreign_values_in_messages_are_one_short_ascii_line(value, shown):
    assert _units.quoted(value) == shown
