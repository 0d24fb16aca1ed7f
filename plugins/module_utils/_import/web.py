# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Asking a web server, by Ansible's own utilities for URLs.

Promise: what :meth:`Answer.pieces` gives is all that the server announced, or an error was raised. What the task states to
identify itself goes to the server that the task names, and to no other that a redirection leads to. Only http and https are
followed.
"""

from __future__ import annotations

import http.client
import os
import queue
import socket
import ssl
import threading
import typing as t
import urllib.error
from contextlib import closing
from urllib.parse import quote, urljoin, urlsplit

from ansible.module_utils.urls import MissingModuleError, open_url

from .._errors import CloneError
from .options import WEB, Options, shown

_CHUNK = 1 << 20
_REDIRECTIONS = (301, 302, 303, 307, 308)
_MAX_REDIRECTIONS = 10
#: Of a server that does not answer HEAD, or not everybody: nothing is known then.
UNTOLD = (403, 405, 501)


class Answer:
    """What a server answers to one request. Use as a context manager.

    A thread asks and reads, since nothing else can wait for a name server, a connection or a byte and end by a deadline.

    :param home: the URL whose server may know who we are
    :param watch: called five times a second while we wait; what it raises ends it
    """

    def __init__(
        self,
        url: str,
        home: str,
        options: Options,
        what: str,
        watch: t.Callable[[], None],
        headers: t.Optional[t.Mapping[str, str]] = None,
        method: str = "GET",
    ) -> None:
        self._what, self._watch = what, watch
        self._queue: queue.Queue[t.Any] = queue.Queue(4)
        self._over = threading.Event()
        arguments = (url, home, options, {**(headers or {})}, method)
        threading.Thread(target=self._ask, args=arguments, daemon=True).start()
        self.status = 0
        #: by names in lower case
        self.headers: t.Dict[str, str] = {}
        #: of the body in bytes, where the server says it
        self.length: t.Optional[int] = None
        self._silence = options.timeout

    def __enter__(self) -> Answer:
        try:
            self.status, self.headers = self._next()
        except BaseException:
            self._over.set()
            raise
        # Both at once is an attack on somebody, and the length does not count then (RFC 9112, section 6.3).
        length = self.headers.get("content-length", "")
        if "transfer-encoding" not in self.headers and length.isdecimal():
            self.length = int(length)
        return self

    def __exit__(self, *_exc: object) -> None:
        self._over.set()

    def pieces(self) -> t.Iterator[bytes]:
        """The body.

        :raises CloneError: ``IO_ERROR`` where it is shorter than announced
        """
        count = 0
        while self.length is None or count < self.length:
            data = self._next()
            if not data:
                break
            count += len(data)
            yield data
        if self.length not in (None, count):
            raise CloneError("IO_ERROR", f"{self._what} broke off: the server sent {count} of {self.length} bytes")

    def _next(self) -> t.Any:
        while True:
            self._watch()
            try:
                found = self._queue.get(timeout=0.2)
            except queue.Empty:
                continue
            if isinstance(found, Exception):
                raise _error(found, self._what, self._silence) from found
            return found

    def _ask(self, *arguments: t.Any) -> None:
        try:
            status, headers, response = _open(*arguments)
            self._put((status, {name.lower(): value for name, value in headers.items()}))
            while response is not None and not self._over.is_set():
                data = response.read1(_CHUNK)
                self._put(data)
                if not data:
                    break
            if response is None:
                self._put(b"")
            else:
                response.close()
        except Exception as exc:  # pylint: disable=broad-except  # whoever waits for us gets it
            self._put(exc)

    def _put(self, found: t.Any) -> None:
        while not self._over.is_set():
            try:
                self._queue.put(found, timeout=0.2)
            except queue.Full:
                continue
            return


def _open(url: str, home: str, options: Options, headers: t.Dict[str, str], method: str) -> t.Tuple[int, t.Any, t.Any]:
    """Status, headers and response, which is None for one without a body."""
    for _hop in range(_MAX_REDIRECTIONS + 1):
        known = _origin(url) == _origin(home)
        try:
            response = open_url(
                url,
                method=method,
                headers={**(options.headers if known else {}), **headers},
                use_proxy=options.use_proxy,
                timeout=options.timeout,
                validate_certs=options.validate_certs,
                # As get_url; some servers have something against Python's own.
                http_agent="ansible-httpget",
                url_username=options.username if known else None,
                url_password=options.password if known else None,
                force_basic_auth=options.force_basic_auth and known,
                follow_redirects="none",
                client_cert=options.client_cert,
                client_key=options.client_key,
                ca_path=options.ca_path,
                # The bytes that a checksum is of, and that Content-Length counts.
                decompress=False,
            )
        except urllib.error.HTTPError as exc:
            with closing(exc):
                if (exc.code == 304 and headers) or (method == "HEAD" and exc.code in UNTOLD):
                    return exc.code, exc.headers, None
                location = exc.headers.get("Location")
                if exc.code not in _REDIRECTIONS or not location:
                    raise
            url = urljoin(url, quote(location, safe="%/:=&?~#+!$,;'@()*[]"))
            if urlsplit(url).scheme not in WEB:
                raise CloneError("UNSAFE_IMAGE", f"the server redirects to {shown(url)!a}, which is not followed") from None
            continue
        if response.status != 200:
            response.close()
            raise CloneError("IO_ERROR", f"the server answers with status {response.status} in place of the file")
        return response.status, response.headers, response
    raise CloneError("IO_ERROR", f"the server redirects more than {_MAX_REDIRECTIONS} times")


def _origin(url: str) -> t.Tuple[str, t.Optional[str], t.Optional[int]]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _error(exc: Exception, what: str, silence: int) -> CloneError:
    """What a person is told of an exception that urllib, or what it stands on, has raised."""
    if isinstance(exc, CloneError):
        return CloneError(exc.code, f"fetching {what} failed: {exc.msg}")
    if isinstance(exc, urllib.error.HTTPError):
        codes = {404: "NO_STORAGE_VOL", 410: "NO_STORAGE_VOL", **dict.fromkeys((401, 403, 407), "OPERATION_DENIED")}
        code = codes.get(exc.code, "IO_ERROR")
        return CloneError(code, f"fetching {what} failed: the server answers {exc.code} {exc.reason or ''}".rstrip())
    if isinstance(exc, MissingModuleError):
        return CloneError("MISSING_DEPENDENCY", f"fetching {what} failed: {exc}")
    reason = exc.reason if isinstance(exc, urllib.error.URLError) else exc
    if isinstance(reason, (socket.timeout, TimeoutError)):
        return CloneError("TIMEOUT", f"fetching {what} failed: the server was silent for {silence} s (url_timeout)")
    if isinstance(reason, ssl.SSLCertVerificationError):
        return CloneError(
            "OPERATION_DENIED",
            f"fetching {what} failed: the server's certificate is not accepted, {reason.verify_message}; ca_path names others"
            " who vouch for it",
        )
    if isinstance(exc, http.client.IncompleteRead):
        return CloneError("IO_ERROR", f"{what} broke off: the server said less than it had announced")
    return CloneError("IO_ERROR", f"fetching {what} failed: {' '.join(str(reason).split()) or type(reason).__name__}")


def refuse_missing_files(options: Options) -> None:
    """:raises CloneError: ``INVALID_ARG`` for a certificate that is not there, of which ssl would not say which it is"""
    for parameter in ("client_cert", "client_key", "ca_path"):
        path = getattr(options, parameter)
        if path is not None and not os.access(path, os.R_OK):
            raise CloneError("INVALID_ARG", f"{parameter}: {path!r} is not there, or not readable for this user")
