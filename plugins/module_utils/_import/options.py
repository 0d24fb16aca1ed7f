# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a task states of a source that comes from outside, and what of it can be told wrong before anybody is asked."""

from __future__ import annotations

import os
import re
import typing as t
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit, urlunsplit

from .._errors import CloneError
from .._names import check_path
from .._units import quoted
from .checksum import Checksum, parse

#: Schemes that are asked for by a connection.
WEB = ("http", "https")


@dataclass(frozen=True)
class Options:
    """``url`` is None for a file of this host. The options of the connection are named as in get_url."""

    url: t.Optional[str] = None
    checksum: t.Optional[Checksum] = None
    #: how it is compressed, ``none`` for bytes as they are; None has its first bytes tell
    compression: t.Optional[str] = None
    cache_dir: t.Optional[str] = None
    username: t.Optional[str] = None
    password: t.Optional[str] = field(default=None, repr=False)
    force_basic_auth: bool = False
    headers: t.Mapping[str, str] = field(default_factory=dict, repr=False, hash=False)
    client_cert: t.Optional[str] = None
    client_key: t.Optional[str] = None
    ca_path: t.Optional[str] = None
    validate_certs: bool = True
    use_proxy: bool = True
    #: seconds that a server may be silent
    timeout: int = 300


def from_parameters(params: t.Mapping[str, t.Any]) -> t.Tuple[Options, t.Optional[str]]:
    """The options, and the path where ``source_url`` is the URL of a file of this host.

    :raises CloneError: ``INVALID_ARG``, naming the parameter
    """
    url: t.Optional[str] = params.get("source_url")
    path = None
    if url is not None:
        check_url(url, "source_url", ("http", "https", "file"))
        if urlsplit(url).scheme == "file":
            path, url = path_of(url, "source_url"), None
    text = params.get("checksum")
    checksum = parse(text) if text else None
    if checksum is not None and checksum.url:
        check_url(checksum.url, "checksum", ("http", "https", "file"))
    for parameter in ("checksum", "source_compression"):
        if params.get(parameter) and params.get("source") is not None:
            raise CloneError("INVALID_ARG", f"{parameter}: has no meaning for a volume of a pool (source)")
    cache_dir = params.get("cache_dir")
    if cache_dir is not None:
        check_path(cache_dir, "cache_dir")
    timeout = params.get("url_timeout")
    if timeout is not None and timeout <= 0:
        raise CloneError("INVALID_ARG", f"url_timeout: {timeout} seconds is no time")
    options = Options(
        url,
        checksum,
        params.get("source_compression"),
        cache_dir,
        params.get("url_username"),
        params.get("url_password"),
        bool(params.get("force_basic_auth")),
        _headers(params.get("headers") or {}),
        params.get("client_cert"),
        params.get("client_key"),
        params.get("ca_path"),
        params.get("validate_certs") is not False,
        params.get("use_proxy") is not False,
        timeout or 300,
    )
    return options, path


def check_url(url: str, parameter: str, schemes: t.Sequence[str]) -> None:
    """:raises CloneError: ``INVALID_ARG`` for what is no such URL"""
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - a port that is no number raises
    except ValueError as exc:
        raise CloneError("INVALID_ARG", f"{parameter}: {quoted(url)} is no URL: {exc}") from None
    if parts.scheme not in schemes or (parts.scheme in WEB and not parts.hostname):
        raise CloneError("INVALID_ARG", f"{parameter}: {quoted(shown(url))} is no URL of {', '.join(schemes)}")
    if re.search(r"[^\x21-\x7e]", url):
        raise CloneError("INVALID_ARG", f"{parameter}: {quoted(shown(url))} has characters that a URL writes as %XX")


def path_of(url: str, parameter: str) -> str:
    """The path of a ``file`` URL (RFC 8089), which has no host or this one."""
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
        raise CloneError("INVALID_ARG", f"{parameter}: {quoted(url)} is no file of this host")
    path = unquote(parts.path, errors="surrogateescape")
    check_path(path, parameter)
    return path


def name_of(url: str) -> str:
    """The last component of its path."""
    return unquote(os.path.basename(urlsplit(url).path), errors="surrogateescape")


def shown(url: str) -> str:
    """A URL as messages and results have it: without a password, and without a query, which may be a signature."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _headers(stated: t.Mapping[str, t.Any]) -> t.Dict[str, str]:
    headers = {str(name): str(value) for name, value in stated.items() if value is not None}
    for name, value in headers.items():
        # A line break would begin a header, or a request, of its own (RFC 9110, section 5.5).
        if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name) or re.search(r"[^\t\x20-\x7e\x80-\xff]", value):
            raise CloneError("INVALID_ARG", f"headers: {quoted(name)} is no header that HTTP has")
    return headers
