# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a compressed image is compressed by, and what is inside, as a stream.

Promise: what comes out is all that was put in, or an error was raised, for a stream that ends early and for anything behind its
end. Memory is bounded whatever the stream says.
"""

from __future__ import annotations

import os
import typing as t

from .. import _process
from .._errors import CloneError

#: Compressions that are undone, by the first bytes.
_COMPRESSIONS = {
    "gzip": (b"\x1f\x8b\x08",),
    "bzip2": tuple(b"BZh%d" % level for level in range(1, 10)),
    "xz": (b"\xfd7zXZ\0",),
    # A frame of zstd, or one that it skips (RFC 8878, section 3.1).
    "zstd": (b"\x28\xb5\x2f\xfd", *(bytes((0x50 + number,)) + b"\x2a\x4d\x18" for number in range(16))),
}
#: What holds files, or is compressed in a way that is not undone here: where its first bytes are, what they are.
_NO_IMAGES: t.Sequence[t.Tuple[str, int, t.Tuple[bytes, ...]]] = (
    ("a tar archive", 257, (b"ustar\0", b"ustar ")),
    ("a zip archive", 0, (b"PK\3\4", b"PK\5\6", b"PK\7\x08")),
    ("a 7z archive", 0, (b"7z\xbc\xaf\x27\x1c",)),
    ("a rar archive", 0, (b"Rar!\x1a\x07",)),
    ("a cpio archive", 0, (b"070701", b"070702", b"070707", b"\xc7\x71", b"\x71\xc7")),
    ("an ar archive", 0, (b"!<arch>\n",)),
    ("a cab archive", 0, (b"MSCF\0\0\0\0",)),
    ("a xar archive", 0, (b"xar!\0\x1c",)),
    ("compressed by lz4", 0, (b"\x04\x22\x4d\x18",)),
    ("compressed by lzip", 0, (b"LZIP\1",)),
    ("compressed by lzop", 0, (b"\x89LZO\0\r\n\x1a\n",)),
    ("compressed by compress", 0, (b"\x1f\x9d",)),
)
#: Bytes that are enough to tell all of them.
HEAD = 512
_CHUNK = 1 << 20
# A dictionary of xz may have 4 GiB; "xz -9" takes 64 MiB.
_XZ_MEMORY = 1 << 30


def compression_of(head: bytes) -> t.Optional[str]:
    return next((name for name, magics in _COMPRESSIONS.items() if head.startswith(magics)), None)


def refuse_archive(head: bytes, what: str) -> None:
    """:raises CloneError: ``NO_SUPPORT`` for an archive, and for a compression that is not undone here"""
    found = next((name for name, at, magics in _NO_IMAGES if head[at:].startswith(magics)), None)
    if found is None and head.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html")):
        found = "a web page"
    if found:
        remedy = "" if found == "a web page" else ": unpack it and clone what is inside"
        raise CloneError(
            "NO_SUPPORT", f"{what} is {found}, not an image{remedy}; source_compression=none clones its bytes as they are"
        )


def unpacked(kind: str, fd: int, what: str, watch: t.Callable[[], None]) -> t.Iterator[bytes]:
    """What is inside a file, from its start, in pieces of at most 1 MiB.

    :raises CloneError: ``CORRUPT_IMAGE`` for a stream that is not whole or not sound, ``MISSING_DEPENDENCY``
    """
    return _by_program(fd, what, watch) if kind == "zstd" else _by_module(kind, fd, what, watch)


class _Gzip:
    """zlib with the interface that bz2 and lzma have."""

    def __init__(self) -> None:
        import zlib

        # 31: of gzip's own format only.
        self._decoder = zlib.decompressobj(31)
        self._rest = b""
        self.needs_input = True

    def decompress(self, data: bytes, max_length: int) -> bytes:
        out = self._decoder.decompress(self._rest + data, max_length)
        self._rest = self._decoder.unconsumed_tail
        # A full buffer may not have been all, even where all input was taken.
        self.needs_input = not self._rest and len(out) < max_length
        return out

    @property
    def eof(self) -> bool:
        return self._decoder.eof

    @property
    def unused_data(self) -> bytes:
        return self._decoder.unused_data


def _decoder(kind: str) -> t.Any:
    try:
        if kind == "gzip":
            return _Gzip()
        if kind == "bzip2":
            import bz2

            return bz2.BZ2Decompressor()
        import lzma

        return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)
    except ImportError as exc:
        raise CloneError("MISSING_DEPENDENCY", f"decompressing {kind} needs {exc.name} of Python on the managed host") from exc


def _by_module(kind: str, fd: int, what: str, watch: t.Callable[[], None]) -> t.Iterator[bytes]:
    """One stream after another: gzip, bzip2 and xz all say that files may be put end to end."""
    position = 0

    def read() -> bytes:
        nonlocal position
        watch()
        data = os.pread(fd, _CHUNK, position)
        position += len(data)
        return data

    def corrupt(why: str) -> CloneError:
        return CloneError("CORRUPT_IMAGE", f"{what} is no sound {kind} file: {why}")

    data = read()
    while data:
        decoder = _decoder(kind)
        while not decoder.eof:
            if decoder.needs_input and not data:
                data = read()
                if not data:
                    raise corrupt("it ends early")
            try:
                out, data = decoder.decompress(data, _CHUNK), b""
            except Exception as exc:  # pylint: disable=broad-except  # each module has its own
                if "emory" in str(exc):
                    raise CloneError(
                        "UNSAFE_IMAGE", f"decompressing {what} takes more than {_XZ_MEMORY} bytes of memory"
                    ) from exc
                raise corrupt(str(exc)) from exc
            watch()
            if out:
                yield out
        data, zeros = _behind(decoder.unused_data, read)
        # gzip(1) takes zeros for the rest of a tape's block; the padding of xz is zeros, four at a time (its section 2.2).
        if zeros and (kind == "bzip2" or (kind == "xz" and zeros % 4)):
            raise corrupt(f"{zeros} zeros follow its end")
        if data and not data.startswith(_COMPRESSIONS[kind]):
            raise corrupt("something that is no other stream follows its end")


def _behind(data: bytes, read: t.Callable[[], bytes]) -> t.Tuple[bytes, int]:
    """What follows the end of a stream, enough of it to tell a magic, and the number of zeros before that."""
    zeros = 0
    while True:
        kept = data.lstrip(b"\0")
        zeros += len(data) - len(kept)
        more = b"" if len(kept) >= HEAD else read()
        if not more:
            return kept, zeros
        data = kept + more


def _by_program(fd: int, what: str, watch: t.Callable[[], None]) -> t.Iterator[bytes]:
    program = _process.find("zstd")
    if program is None:
        raise CloneError("MISSING_DEPENDENCY", f"{what} is compressed by zstd: install the package zstd on the managed host")
    # Windows of up to 1 GiB, as much as xz may take.
    os.lseek(fd, 0, os.SEEK_SET)
    with _process.Output([program, "-q", "-d", "-c", "--long=30"], fd) as output:
        yield from output.pieces(_CHUNK, watch)
        status, err = output.end()
    if status:
        why = " ".join(err.replace("/*stdin*\\ : ", "").split()) or f"zstd ended with status {status}"
        raise CloneError("CORRUPT_IMAGE", f"{what} is no sound zstd file: {why}")
