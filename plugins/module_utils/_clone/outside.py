# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A source from outside the pools: an image that is fetched or decompressed before it is a source, or has to have a checksum.

It comes in once, for all clones of the task, and stays open until the last of them is made.
"""

from __future__ import annotations

import os
import typing as t
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace

from .._errors import CloneError, from_os_error
from .._images.gate import refusal
from .._import import intake
from .._pools.devices import DevicePool
from .._pools.remote import RemotePool
from .._transfer import guards
from .files import Files, OpenImage, identity_of, open_image
from .model import SourceFacts
from .task import Task


class Outside:
    """What comes in from outside. Nothing does before :meth:`bring`."""

    def __init__(self, task: Task, files: Files) -> None:
        self._task = task
        self._files = files
        self._intake: t.Optional[intake.Intake] = None
        self._asked = False
        #: why nothing came in
        self._refusal: t.Optional[CloneError] = None
        #: version of a source that has the checksum that is stated
        self._verified: t.Optional[t.Tuple[int, ...]] = None
        self.warnings: t.List[str] = []

    def close(self) -> None:
        if self._intake is not None:
            self._intake.close()

    @property
    def is_in(self) -> bool:
        return self._intake is not None

    def judge(self, facts: SourceFacts, path: str) -> SourceFacts:
        """Whether a file of this host has to be decompressed before it is a source."""
        options = self._task.request.outside
        try:
            fd, block = open_image(path, facts.what)
        except (FileNotFoundError, CloneError):
            # Whoever opens it as a source says why.
            return facts
        try:
            if intake.compression(options, fd, block, self._task.request.source_format, facts.what):
                facts = replace(facts, pending="decompressed", identity=identity_of(os.fstat(fd)))
        finally:
            os.close(fd)
        return facts

    def look_at_source(self, layers: t.List[OpenImage], facts: SourceFacts, path: str) -> SourceFacts:
        """The source as it came in, appended to ``layers``, by the same gate as any other; as it is when it has not."""
        if self._intake is None:
            return facts
        opened = self._files.read(os.dup(self._intake.fd), facts.what, path, False, self._task.request.source_format)
        opened.own = True
        layers.append(opened)
        image = opened.image
        if image.backing is not None:
            raise refusal(
                "backing_file",
                f"{facts.what} has the backing store {image.backing[:200]!r}: an image from outside stands alone",
            )
        return replace(facts, image=image, pending="", cache=self._intake.cache)

    def bring(self, source: SourceFacts, look: t.Callable[[], object]) -> bool:
        """Have the source come in. Whether it has: in a check run it may not.

        :param look: looks at the source again
        """
        if self._refusal is not None:
            raise self._refusal
        try:
            if not self._asked:
                self._asked = True
                self._take_in(source)
            if self._intake is None:
                return False
            look()
        except CloneError as exc:
            # The other clones of the task need not ask again.
            self._refusal = exc
            raise
        except OSError as exc:
            self._refusal = from_os_error(exc, f"reading {source.what}")
            raise self._refusal from exc
        return True

    def _take_in(self, source: SourceFacts) -> None:
        task, request = self._task, self._task.request
        # An image is not much longer than what is in it: as in Space.needed().
        limit = request.max_capacity + request.max_capacity // 8 + (4 << 20)
        terms = intake.Terms(limit, task.deadline, task.rate, task.check_mode)
        with ExitStack() as stack:
            if isinstance(task.pool, (DevicePool, RemotePool)):
                fd = os.open(request.tmpdir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                stack.callback(os.close, fd)
                place = intake.Place(fd, f"{request.tmpdir!r} of this host (TMPDIR)", foreign=True)
            else:
                place = intake.Place(task.pool.fd, f"pool {task.pool.name!r}")
            if request.outside.url is not None:
                self._intake, self.warnings = intake.fetched(request.outside, place, terms, source.what)
                return
            fd, block, _version, watch = stack.enter_context(self._checked_file(source))
            kind = intake.compression(request.outside, fd, block, request.source_format, source.what)
            if not task.check_mode:
                self._intake = intake.unpacked(t.cast(str, kind), fd, place, terms, source.what, watch)

    def verify(self, source: SourceFacts, opened: OpenImage) -> bool:
        """That the source has the checksum which is stated.

        :raises CloneError: ``CHECKSUM_MISMATCH``
        """
        if opened.own:
            # It was compared as it came in.
            return True
        if self._verified != opened.version:
            with self._checked_file(source) as (_fd, _block, version, _watch):
                self._verified = version
        if self._verified != opened.version:
            raise CloneError("IN_USE", f"{source.what} was changed after it was looked at")
        return True

    @contextmanager
    def _checked_file(self, source: SourceFacts) -> t.Iterator[t.Tuple[int, bool, t.Tuple[int, ...], t.Callable[[], None]]]:
        """A file of this host, held, that has the checksum which is stated.

        Gives its descriptor, whether it is a device, its version, and what to call while it is read.
        """
        task, path = self._task, t.cast(str, self._task.request.source_path)
        fd, block = open_image(os.path.realpath(path), source.what)

        hold: t.Optional[guards.Hold] = None

        def watch() -> None:
            task.deadline.check(f"reading {source.what}")
            if hold is not None:
                hold.check()

        with closing(os.fdopen(fd, "rb")), ExitStack() as stack:
            version = guards.version(fd)
            if not task.check_mode:
                if task.request.source_in_use == "wait":
                    task.deadline.wait_for(lambda: not guards.writers(fd), f"waiting for the writers of {source.what}")
                    version = guards.version(fd)
                hold = stack.enter_context(guards.Hold([(fd, source.what, version)]))
            checksum = intake.resolved(task.request.outside, os.path.basename(path), task.deadline)
            if checksum is not None:
                checksum.expect(intake.hash_of(fd, checksum, watch), source.what)
            yield fd, block, version, watch
            if hold is not None:
                hold.finish()
