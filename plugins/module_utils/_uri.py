# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Connection URIs of libvirt."""

from __future__ import annotations

import re

_URI = re.compile(r"(?P<driver>[a-z]+)(?:\+(?P<transport>[a-z0-9]+))?://(?P<host>[^/?]*)(?:[/?].*)?", re.IGNORECASE)


def is_uri(uri: str) -> bool:
    return _URI.fullmatch(uri) is not None


def is_remote(uri: str) -> bool:
    """Whether a connection has a host, or a transport other than a local socket: its pools' paths mean nothing here."""
    match = _URI.fullmatch(uri)
    return match is not None and (bool(match.group("host")) or (match.group("transport") or "unix").lower() != "unix")


def is_elsewhere(uri: str, pool: str) -> bool:
    """Whether a pool, as a task names it, is on another host: directories are of this one, whatever the connection is."""
    return is_remote(uri) and not pool.startswith("/")
