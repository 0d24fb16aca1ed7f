# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Fixtures that several files use."""

from __future__ import annotations

import os

import pytest


@pytest.fixture
def open_file(tmp_path):
    """Makes a file with these bytes, and opens it for reading."""
    opened = []

    def make(data):
        path = tmp_path / "image"
        path.write_bytes(data)
        opened.append(os.open(str(path), os.O_RDONLY))
        return opened[-1]

    yield make
    for fd in opened:
        os.close(fd)
