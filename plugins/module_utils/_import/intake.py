# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Images from outside: whatever a task names as its source, by URL or compressed, ends here as an open file of this host.

Promise: the file that is given is all of what was there, unpacked, and has the checksum that was asked for; of one that is not,
nothing is left in the pool or the cache. It is staged where the volume will be, so that the volume may share its blocks, and in
the same way: a run that is killed leaves nothing behind, or a hidden file that the next run removes. A checksum is compared
before anything is unpacked.
"""

from __future__ import annotations

import os
import typing as t
from contextlib import ExitStack, closing
from dataclasses import dataclass

from .._deadline import Deadline
from .._errors import CloneError, from_os_error
from .._transfer import file_copy, guards, staging
from .._transfer.pace import Rate
from .._units import format_bytes
from . import unpack
from .cache import Cache, keeps, key_of
from .checksum import MAX_LIST, Checksum, find
from .options import Options, name_of, path_of, shown

if t.TYPE_CHECKING:  # pragma: no cover
    from .web import Answer

_CHUNK = 1 << 20
# What is left to the others who write to the same file system: virtual machines stop when it is full.
_RESERVE = 64 << 20
# File systems that are memory, by statfs(2): tmpfs and ramfs.
_IN_MEMORY = (0x01021994, 0x858458F6)


class _Staging(staging.Staging):
    """A staged file that may outlive the place where it is staged."""

    def __init__(self, directory: int) -> None:
        super().__init__(os.dup(directory))

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)
        os.close(self._directory)


@dataclass(frozen=True)
class Place:
    """An open directory where something may be staged, and what messages call it.

    ``foreign``: whether it is another one than where the volume will be.
    """

    fd: int
    what: str
    foreign: bool = False

    def staging(self) -> staging.Staging:
        if self.foreign and guards.file_system(self.fd) in _IN_MEMORY:
            raise CloneError("CONFIG_UNSUPPORTED", f"{self.what} is in memory, where no image is staged")
        return _Staging(self.fd)

    def free(self) -> int:
        """Bytes that may still be written."""
        status = os.fstatvfs(self.fd)
        # Not what is reserved for root either, which others cannot write to.
        return status.f_bavail * status.f_frsize - min(_RESERVE, status.f_blocks * status.f_frsize // 16)


@dataclass(frozen=True)
class Terms:
    """How an image comes in. ``limit``: the longest that it may be, in bytes."""

    limit: int
    deadline: Deadline
    rate: Rate
    check_mode: bool


class Intake:
    """An image from outside, open for reading as ``fd``. Close it when no volume is made from it any more."""

    def __init__(self, fd: int, cache: t.Optional[str] = None, staged: t.Optional[staging.Staging] = None) -> None:
        self.fd = fd
        #: ``hit`` or ``miss``, None where nothing was looked for in a cache
        self.cache = cache
        self.staged = staged

    def close(self) -> None:
        os.close(self.fd)
        if self.staged is not None:
            self.staged.__exit__()


# --- of this host -------------------------------------------------------------------------------------------------------


def compression(options: Options, fd: int, block: bool, pinned: t.Optional[str], what: str) -> t.Optional[str]:
    """How a file of this host is compressed, None for not at all.

    A device, and raw as the stated format, are bytes as they are: whoever writes them does not decide how they are read.

    :raises CloneError: ``NO_SUPPORT`` for an archive
    """
    if options.compression == "none" or (options.compression is None and (block or pinned == "raw")):
        return None
    return _compression(options, os.pread(fd, unpack.HEAD, 0), what)


def _compression(options: Options, head: bytes, what: str) -> t.Optional[str]:
    if options.compression == "none":
        return None
    found = unpack.compression_of(head)
    if options.compression not in (None, found):
        raise CloneError(
            "CORRUPT_IMAGE",
            f"{what} is {f'compressed by {found}' if found else 'not compressed'}, asked for is"
            f" source_compression={options.compression}",
        )
    if found is None:
        unpack.refuse_archive(head, what)
    return found


def hash_of(fd: int, checksum: Checksum, watch: t.Callable[[], None]) -> str:
    """The digest of all that a file or device holds."""
    digest, at, end = checksum.new(), 0, guards.length(fd)
    while at < end:
        watch()
        data = os.pread(fd, min(_CHUNK, end - at), at)
        if not data:
            raise CloneError("IO_ERROR", f"the source ended at byte {at} of {end}: it changed while it was read")
        digest.update(data)
        at += len(data)
    return t.cast(str, digest.hexdigest())


def unpacked(kind: str, fd: int, place: Place, terms: Terms, what: str, watch: t.Callable[[], None]) -> Intake:
    """What is inside a compressed file."""
    with ExitStack() as stack:
        staged = stack.enter_context(place.staging())
        inside = f"what is inside {what}"
        sink = _Sink(staged.fd, place, terms, inside)
        for data in unpack.unpacked(kind, fd, what, watch):
            sink.write(data)
        sink.finish()
        head = os.pread(staged.fd, unpack.HEAD, 0)
        if unpack.compression_of(head):
            raise CloneError("NO_SUPPORT", f"{inside} is compressed once more: unpack it first")
        intake = _opened(staged)
        stack.pop_all()
    return intake


def _opened(staged: staging.Staging) -> Intake:
    return Intake(os.open(f"/proc/self/fd/{staged.fd}", os.O_RDONLY | os.O_CLOEXEC), staged=staged)


class _Sink:
    """A new file that a stream is written into: zeros become holes, and it stops at what it may be, or take."""

    def __init__(self, fd: int, place: Place, terms: Terms, what: str, archives: bool = False) -> None:
        self._fd, self._place, self._terms, self._what = fd, place, terms, what
        self._archives = archives
        self._buffer = bytearray()
        self._length = 0

    def write(self, data: bytes) -> None:
        self._buffer += data
        while len(self._buffer) >= _CHUNK:
            self._flush(_CHUNK)

    def finish(self) -> int:
        """The length of all; 0 is none."""
        self._flush(len(self._buffer))
        os.ftruncate(self._fd, self._length)
        if not self._length:
            raise CloneError("CORRUPT_IMAGE", f"{self._what} is empty")
        return self._length

    def _flush(self, size: int) -> None:
        if self._length == 0 and not self._archives:
            unpack.refuse_archive(bytes(self._buffer[: unpack.HEAD]), self._what)
        if self._length + size > self._terms.limit:
            raise CloneError("UNSAFE_IMAGE", f"{self._what} is longer than an image of max_capacity can be")
        piece = self._buffer[:size]
        view = memoryview(piece)
        for at, length in file_copy.nonzero_runs(piece, size, self._length):
            if self._place.free() < length:
                raise CloneError("NO_SPACE", f"{self._what} does not fit into {self._place.what}")
            file_copy.write_all(self._fd, view[at : at + length], self._length + at)
        del self._buffer[:size]
        self._length += size


# --- from a web server --------------------------------------------------------------------------------------------------


def _web() -> t.Any:
    """Loading Ansible's utilities for URLs takes longer than many a clone."""
    from . import web  # pylint: disable=import-outside-toplevel

    return web


def resolved(options: Options, name: str, deadline: Deadline) -> t.Optional[Checksum]:
    """The checksum with its digest, looked up in the list that it names.

    :param name: of the file in that list
    """
    checksum = options.checksum
    if checksum is None or not checksum.url:
        return checksum
    listed = _listed(checksum.url, options, deadline)
    return Checksum(checksum.algorithm, find(listed, checksum.algorithm, name, shown(checksum.url)))


def _listed(url: str, options: Options, deadline: Deadline) -> str:
    what = f"the checksums, {shown(url)!r},"
    if url.startswith("file:"):
        try:
            with open(path_of(url, "checksum"), "rb") as file:
                data = file.read(MAX_LIST + 1)
        except OSError as exc:
            raise from_os_error(exc, f"reading {what}") from exc
    else:
        data, web = b"", _web()
        web.refuse_missing_files(options)
        with web.Answer(url, options.url or url, options, what, lambda: deadline.check(f"fetching {what}")) as answer:
            for piece in answer.pieces():
                data += piece
                if len(data) > MAX_LIST:
                    break
    if len(data) > MAX_LIST:
        raise CloneError("INVALID_ARG", f"checksum: {shown(url)!r} is longer than {MAX_LIST} bytes, no list of checksums")
    return data.decode("utf-8", "replace")


def fetched(options: Options, place: Place, terms: Terms, what: str) -> t.Tuple[t.Optional[Intake], t.List[str]]:
    """The image of a URL, and warnings. In a check run None, unless the cache has it: then nothing but the header is asked for.

    :raises CloneError: also in a check run, for what the server says before it sends anything
    """
    _web().refuse_missing_files(options)
    checksum = resolved(options, name_of(options.url or ""), terms.deadline)
    if options.cache_dir is None:
        return _fetched(options, checksum, place, None, terms, what)
    with closing(Cache(options.cache_dir, make=not terms.check_mode)) as cache:
        if terms.check_mode:
            return _fetched(options, checksum, place, cache, terms, what)
        with cache.locked(key_of(options, checksum), terms.deadline, what):
            return _fetched(options, checksum, place, cache, terms, what)


def _fetched(
    options: Options, checksum: t.Optional[Checksum], place: Place, cache: t.Optional[Cache], terms: Terms, what: str
) -> t.Tuple[t.Optional[Intake], t.List[str]]:
    key, url = key_of(options, checksum), t.cast(str, options.url)
    entry = cache.find(key) if cache and cache.fd >= 0 else None
    with ExitStack() as stack:
        if entry:
            stack.callback(os.close, entry.fd)
        conditions = entry.conditions if entry else {}
        method = "HEAD" if terms.check_mode else "GET"

        def watch() -> None:
            terms.deadline.check(f"fetching {what}")

        if entry is None or checksum is None:
            answer = stack.enter_context(_web().Answer(url, url, options, what, watch, conditions, method))
        if entry and (checksum is not None or answer.status == 304):
            return Intake(os.dup(entry.fd), "hit"), []
        if cache is not None and not terms.check_mode:
            place = Place(cache.fd, f"cache_dir {cache.path!r}", foreign=True)
        if answer.length is not None and answer.status == 200 and answer.length > place.free():
            raise CloneError("NO_SPACE", f"{what} has {format_bytes(answer.length)}, which do not fit into {place.what}")
        if terms.check_mode:
            return None, []
        intake, kind = _received(options, answer, checksum, place, terms, what)
        try:
            if cache is not None:
                intake.cache = "miss"
                if keeps(checksum, answer.headers):
                    cache.store(key, t.cast(staging.Staging, intake.staged), options, answer.headers)
        except BaseException:
            intake.close()
            raise
        # The last piece of a chunked answer says that it is the last one, and so does that of a compressed image.
        told = answer.length is not None or "transfer-encoding" in answer.headers or kind or checksum
    warning = f"the server does not say how long {what} is, and no checksum is stated: nobody can tell whether all of it came"
    return intake, [] if told else [warning]


def _received(
    options: Options, answer: Answer, checksum: t.Optional[Checksum], place: Place, terms: Terms, what: str
) -> t.Tuple[Intake, t.Optional[str]]:
    """What the server sends, unpacked, and how it was compressed."""
    digest = checksum.new() if checksum else None
    with ExitStack() as stack:
        staged = stack.enter_context(place.staging())
        sink = _Sink(staged.fd, place, terms, what, archives=options.compression == "none")

        def watch() -> None:
            terms.deadline.check(f"fetching {what}")

        for data in answer.pieces():
            if digest is not None:
                digest.update(data)
            terms.rate.spend(len(data), watch)
            sink.write(data)
        sink.finish()
        if checksum is not None and digest is not None:
            checksum.expect(digest.hexdigest(), what)
        kind = _compression(options, os.pread(staged.fd, unpack.HEAD, 0), what)
        if kind:
            return unpacked(kind, staged.fd, place, terms, what, watch), kind
        intake = _opened(staged)
        stack.pop_all()
    return intake, None
