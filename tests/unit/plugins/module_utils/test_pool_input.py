# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a task may state of a pool, and where a device is read to know whether it is empty."""

from __future__ import annotations

import os

import pytest
from ansible_collections.virtforge.libvirt.plugins.module_utils._errors import CloneError
from ansible_collections.virtforge.libvirt.plugins.module_utils._names import check_pool
from ansible_collections.virtforge.libvirt.plugins.module_utils._permissions import Mode
from ansible_collections.virtforge.libvirt.plugins.module_utils._pools import block_device
from ansible_collections.virtforge.libvirt.plugins.module_utils._poolstate.request import from_parameters

MIB, GIB = 1 << 20, 1 << 30
DOCUMENT = "<pool type='dir'><name>{}</name><target><path>{}</path></target></pool>"


def refusal(action, *arguments):
    with pytest.raises(CloneError) as caught:
        action(*arguments)
    return caught.value.code, caught.value.msg


@pytest.mark.parametrize("char", ["\ufffe", "\uffff", "\x01", "\n", "\x7f", "\u2028", "\udc80"])
@pytest.mark.parametrize("stated", [{"name": "p{}"}, {"name": "/p{}"}, {"name": "p", "target_path": "/x{}"}])
def test_names_and_paths_that_nobody_could_read(char, stated):
    params = {key: value.format(char) for key, value in stated.items()}
    code, msg = refusal(from_parameters, params)
    assert code == "INVALID_ARG" and msg.startswith(list(stated)[-1]) and msg.isascii()


@pytest.mark.parametrize("name, path", [("p&#10;", "/x"), ("p", "/x&#9;y"), ("p", "/x&#x7f;"), ("p", "/&#x2028;")])
def test_xml_with_names_and_paths_that_nobody_could_read(name, path):
    code, msg = refusal(from_parameters, {"xml": DOCUMENT.format(name, path)})
    assert code == "INVALID_ARG" and "control character" in msg


def test_a_name_is_as_long_as_libvirt_can_store():
    check_pool("\u00e9" * 123 + "x", "name")
    check_pool("/" + "x" * 300, "name")
    code, msg = refusal(check_pool, "\u00e9" * 124, "name")
    assert code == "INVALID_ARG" and "248 bytes" in msg and "247" in msg


@pytest.mark.parametrize("value", [711, 755, 750, 700, 770, 777])
def test_a_mode_without_quotes_is_no_mode(value):
    code, msg = refusal(lambda: Mode(value, allowed=0o7777))
    assert code == "INVALID_ARG" and f"mode: {value} " in msg and "quoted" in msg


@pytest.mark.parametrize("value", [0o711, 0o755, 0o750, 0o700, 0o2775, "1777", "2750", "711"])
def test_modes_of_a_directory(value):
    assert Mode(value, allowed=0o7777).octal == (value if isinstance(value, int) else int(value, 8))


@pytest.fixture
def sparse(tmp_path):
    """Makes a file of a size with one byte set, and opens it; no byte for None."""
    opened = []

    def make(size, at):
        path = tmp_path / f"disk{len(opened)}"
        with open(path, "wb") as file:
            file.truncate(size)
            if at is not None:
                file.seek(at)
                file.write(b"x")
        opened.append(os.open(path, os.O_RDONLY))
        return opened[-1]

    yield make
    for fd in opened:
        os.close(fd)


@pytest.mark.parametrize(
    "size, at, empty",
    [
        (3 * MIB, None, True),
        (0, None, True),
        (3 * MIB, 0, False),
        (3 * MIB + 512, 3 * MIB // 2, False),
        (3 * MIB + 512, 3 * MIB + 511, False),
        (8 * GIB, None, True),
        (8 * GIB, MIB - 1, False),
        (8 * GIB, 8 * GIB - MIB, False),
        # The first place between the ends.
        (8 * GIB, (8 * GIB - MIB) // 257, False),
        (8 * GIB, (8 * GIB - MIB) // 257 * 128 + MIB // 2, False),
        # What lies between two places is not seen, and the documentation says so.
        (8 * GIB, 2 * MIB, True),
    ],
)
def test_where_a_device_is_read(sparse, size, at, empty):
    assert block_device._zeros(sparse(size, at), "/dev/x") is empty


def test_a_device_that_is_read_in_short_pieces_is_read_to_its_end(sparse, monkeypatch):
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, count, at: pread(fd, min(count, 4096), at))
    assert block_device._zeros(sparse(MIB, MIB - 1), "/dev/x") is False
    monkeypatch.setattr(os, "pread", lambda fd, count, at: pread(fd, count, at) if at < 4096 else b"")
    code, msg = refusal(block_device._zeros, sparse(2 * MIB, None), "/dev/x")
    assert code == "IO_ERROR" and "'/dev/x'" in msg
