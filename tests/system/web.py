# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A web server on 127.0.0.1 that behaves as the first component of the path says, and certificates for it."""

from __future__ import annotations

import base64
import hashlib
import ssl
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from harness import run

USER, PASSWORD = "anna", "open:sesame"
LAST_MODIFIED = "Thu, 01 Jan 2026 00:00:00 GMT"


@dataclass(frozen=True)
class Asked:
    """A request: ``status`` of the answer, ``sent`` bytes of its body."""

    method: str
    path: str
    headers: dict[str, str]
    status: int
    sent: int


class Web:
    """Serves the files of a directory.

    ``/plain/NAME`` as anybody does; the others are the methods of :class:`_Handler`. Any other path is that of a file, with an
    ETag. What was asked is in ``log``.
    """

    def __init__(self, place: Path, context: ssl.SSLContext | None = None, address=("127.0.0.1", 0)):
        self.place, self.log = place, []
        self.over = threading.Event()
        self.server = ThreadingHTTPServer(address, _Handler)
        self.server.daemon_threads = True
        self.server.web = self
        # Who hangs up, or does not trust us, does so on purpose.
        self.server.handle_error = lambda *_arguments: None
        if context:
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True, do_handshake_on_connect=False)
        self.scheme = "https" if context else "http"
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def url(self, path, host="127.0.0.1"):
        return f"{self.scheme}://{host}:{self.port}/{path}"

    def bodies(self, name=""):
        """Requests whose answer had a body and that named this file."""
        return [asked for asked in self.log if asked.sent and asked.path.endswith(name)]

    def end(self):
        self.over.set()
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *_arguments):
        """On no terminal."""

    def do_GET(self):
        self.sent, self.status = 0, 0
        # A whole URL is what a proxy is asked for.
        path = urlsplit(self.path).path
        how, _slash, name = path.lstrip("/").partition("/")
        try:
            if hasattr(self, f"how_{how}"):
                getattr(self, f"how_{how}")(unquote(name))
            else:
                self.how_etag(unquote(path.lstrip("/")))
        except FileNotFoundError:
            self.begin(404, Content_Length=0)
        except (BrokenPipeError, ConnectionResetError, ssl.SSLError):
            pass
        self.server.web.log.append(Asked(self.command, self.path, dict(self.headers), self.status, self.sent))

    do_HEAD = do_GET

    def begin(self, status, **headers):
        self.status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def body(self, data):
        if self.command != "HEAD" and data:
            self.wfile.write(data)
            self.sent += len(data)

    def file(self, name):
        return (self.server.web.place / name).read_bytes()

    def give(self, data, **headers):
        self.begin(200, Content_Length=len(data), **headers)
        self.body(data)

    def how_plain(self, name):
        self.give(self.file(name))

    def how_nolength(self, name):
        self.begin(200)
        self.body(self.file(name))

    def chunks(self, pieces, end=b"0\r\n\r\n"):
        self.protocol_version = "HTTP/1.1"
        self.begin(200, Transfer_Encoding="chunked", Connection="close")
        for piece in pieces:
            self.body(b"%x\r\n%s\r\n" % (len(piece), piece))
        self.body(end)
        self.close_connection = True

    def how_chunked(self, name):
        data = self.file(name)
        self.chunks(data[at : at + 70_000] for at in range(0, len(data), 70_000))

    def how_dyingchunked(self, name):
        self.chunks([self.file(name)[:100_000]], end=b"")

    def how_dying(self, name):
        data = self.file(name)
        self.begin(200, Content_Length=len(data))
        self.body(data[: len(data) // 2])

    def how_dyingnolength(self, name):
        self.begin(200)
        self.body(self.file(name)[: len(self.file(name)) // 2])

    def how_partial(self, name):
        data = self.file(name)[:1000]
        self.begin(206, Content_Length=len(data), Content_Range=f"bytes 0-999/{len(self.file(name))}")
        self.body(data)

    def how_huge(self, _name):
        self.begin(200, Content_Length=1 << 50)
        self.body(bytes(1000))

    def how_slow(self, name):
        """Ten pieces, each after a pause."""
        data = self.file(name)
        self.begin(200, Content_Length=len(data))
        step = -(-len(data) // 10)
        for at in range(0, len(data), step):
            if self.server.web.over.wait(0.15):
                return
            self.body(data[at : at + step])
            self.wfile.flush()

    def how_silent(self, _name):
        self.server.web.over.wait(60)

    def how_stalled(self, name):
        data = self.file(name)
        self.begin(200, Content_Length=len(data))
        self.body(data[: len(data) // 2])
        self.wfile.flush()
        self.server.web.over.wait(60)

    def how_redirect(self, name):
        self.begin(302, Location=f"../plain/{name}", Content_Length=0)

    def how_moved(self, target):
        """``moved/CODE/TARGET``, where the target may be a whole URL."""
        code, _slash, target = target.partition("/")
        self.begin(int(code), Location=target, Content_Length=0)

    def how_loop(self, name):
        self.begin(302, Location=f"/loop/{name}", Content_Length=0)

    def how_status(self, name):
        self.begin(int(name.partition("/")[0]), Content_Length=0)

    def how_nohead(self, name):
        if self.command == "HEAD":
            self.begin(405, Content_Length=0)
        else:
            self.give(self.file(name))

    def how_auth(self, name):
        wanted = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        if self.headers.get("Authorization") != wanted:
            self.begin(401, WWW_Authenticate='Basic realm="images"', Content_Length=0)
        else:
            self.give(self.file(name))

    def how_forced(self, name):
        """As ``auth``, without asking for it."""
        if "Authorization" in self.headers:
            self.how_auth(name)
        else:
            self.begin(404, Content_Length=0)

    def how_token(self, name):
        if self.headers.get("X-Token") != "sesame":
            self.begin(403, Content_Length=0)
        else:
            self.give(self.file(name))

    def how_client(self, name):
        if not self.connection.getpeercert():
            self.begin(403, Content_Length=0)
        else:
            self.give(self.file(name))

    def how_etag(self, name):
        data = self.file(name)
        tag = f'"{hashlib.sha256(data).hexdigest()[:16]}"'
        if self.headers.get("If-None-Match") == tag:
            self.begin(304, ETag=tag)
        else:
            self.give(data, ETag=tag)

    def how_dated(self, name):
        if self.headers.get("If-Modified-Since") == LAST_MODIFIED:
            self.begin(304)
        else:
            self.give(self.file(name), Last_Modified=LAST_MODIFIED)

    def how_slowetag(self, name):
        if self.command != "HEAD":
            time.sleep(1)
        self.how_etag(name)


@dataclass(frozen=True)
class Certificates:
    """Of a test CA: ``ca`` itself, and certificates with their keys in one file for ``server`` and ``client``."""

    ca: Path
    server: Path
    client: Path

    def context(self):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.server)
        context.load_verify_locations(self.ca)
        context.verify_mode = ssl.CERT_OPTIONAL
        return context


def make_certificates(place: Path) -> Certificates:
    """Valid for 127.0.0.1 and cloud.example.com."""
    place.mkdir()
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    run("openssl", "req", "-x509", *key, "-subj", "/CN=Test CA", "-keyout", place / "ca.key", "-out", place / "ca.pem")
    names = {"server": "subjectAltName=IP:127.0.0.1,DNS:cloud.example.com", "client": "subjectAltName=DNS:kvm1"}
    for name, alternative in names.items():
        files = ["-keyout", place / f"{name}.key", "-out", place / f"{name}.crt"]
        signed = ["-CA", place / "ca.pem", "-CAkey", place / "ca.key", "-addext", alternative]
        run("openssl", "req", "-x509", *key, "-subj", f"/CN={name}", *signed, "-addext", "basicConstraints=CA:FALSE", *files)
        (place / f"{name}.pem").write_bytes((place / f"{name}.crt").read_bytes() + (place / f"{name}.key").read_bytes())
    return Certificates(place / "ca.pem", place / "server.pem", place / "client.pem")
