# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Opening images that are files or devices of this host, and all that lies below them, within the pools of the task."""

from __future__ import annotations

import errno
import os
import stat
import time
import typing as t
from dataclasses import dataclass

from .. import _xml
from .._errors import CloneError, from_os_error
from .._images import foreign, probe
from .._images.gate import refusal
from .._images.probe import Image
from .._images.qemu_img import Layer
from .._pools.devices import DevicePool
from .._pools.directory import kind_of
from .._pools.remote import RemotePool
from .._transfer import guards, locks
from .refusals import refuse_image
from .task import Task

#: More images below another than this are refused.
MAX_DEPTH = 64
# Other runs change a pool while its names are counted; after that long it is given up.
_MOMENT = 1.0
_TICK = 20_000_000  # ns


@dataclass
class OpenImage:
    """One layer of the source or target. ``what`` names it in messages, ``version`` is guards.version() at the first look."""

    fd: int
    what: str
    path: str
    image: Image
    block: bool
    version: t.Tuple[int, ...] = ()
    #: of the lock that whoever changes it holds; empty for a file, whose place says it
    lock: str = ""
    #: options by which qemu-img reaches what is no file here; ``fd`` is then its key
    network: t.Optional[t.Mapping[str, t.Any]] = None
    #: its name in its pool, where the volumes of that are devices
    name: str = ""
    #: whether it came from outside: made by this collection, and not written to by anybody any more
    own: bool = False
    #: of a volume on the network, what is another once it was written to
    changes: t.Tuple[str, ...] = ()

    @property
    def layer(self) -> Layer:
        return Layer(self.fd, self.image.format, self.block, network=self.network)

    @property
    def lock_key(self) -> str:
        return self.lock or locks.key(os.stat(os.path.dirname(self.path) or "/"), os.path.basename(self.path))


class Files:
    """Opens images for one clone, by the pools that its task names, and reads their headers."""

    def __init__(self, task: Task) -> None:
        self._task = task

    def open_inside(self, path: str, what: str) -> t.Tuple[int, bool]:
        """Open a file of this real path, which is directly in one of the pools.

        By its name in the directory that is held open: whatever the path has come to mean, nothing else is opened.
        """
        pool = self._task.pools.holding(path)
        if pool is None:
            # A link that leads nowhere, when it was looked at.
            raise FileNotFoundError(path)
        if isinstance(pool, DevicePool):
            return open_image(path, what)
        name = os.path.basename(path)

        def judge(held: os.stat_result) -> None:
            for _time in range(2):
                # Held by one of two names that was then taken away, it would look like a file that never had another.
                status = pool.lstat(name)
                if status is None or not os.path.samestat(status, held):
                    raise CloneError("IN_USE", f"{what} was replaced while it was looked at")
                self._refuse_hard_link(status, what)

        return open_image(name, what, pool.fd, judge)

    def read(self, fd: int, what: str, path: str, block: bool, pinned: t.Optional[str]) -> OpenImage:
        """The open file as an image, by its header; it is closed where that cannot be read."""
        version = guards.version(fd)
        try:
            image = self._read_image(fd, what, block, pinned)
        except BaseException:
            os.close(fd)
            raise
        return OpenImage(fd, what, path, image, block, version)

    def _read_image(self, fd: int, what: str, block: bool, pinned: t.Optional[str]) -> Image:
        size = guards.length(fd)
        found = probe.detect(fd, size)
        # A block device is raw unless somebody says otherwise: its guest writes what it likes at its start.
        image_format = probe.choose_format(found, pinned or ("raw" if block else None), what)
        return self.read_as(image_format, fd, size, found, what)

    def read_as(self, image_format: str, fd: int, size: int, found: t.Sequence[str], what: str) -> Image:
        """What the header of an image of this format says."""
        if image_format == "raw":
            return probe.read_raw(size, found, os.pread(fd, 8, 0))
        if image_format == "qcow2":
            return probe.read_qcow2(fd, size, what)
        header = foreign.read(fd, size, image_format, what)
        return self._task.qemu.read(Layer(fd, image_format), header, what, lambda: self._task.deadline.check(f"reading {what}"))

    def open_chain(self, layers: t.List[OpenImage]) -> None:
        """Open everything below the last of ``layers``.

        :raises FileNotFoundError: with a sentence, for a backing store that does not exist
        """
        topmost = layers[0]
        seen = {identity_of(os.fstat(topmost.fd))}
        while layers[-1].image.backing is not None:
            above = layers[-1]
            if len(layers) > MAX_DEPTH:
                raise refusal("chain_depth", f"{topmost.what} has more than {MAX_DEPTH} images below it")
            path = self.backing_path(above)
            what = f"{path!r}, the backing store of {above.what},"
            try:
                fd, block = self.open_inside(path, what)
            except FileNotFoundError as exc:
                raise FileNotFoundError(f"{what} does not exist") from exc
            try:
                if identity_of(os.fstat(fd)) in seen:
                    raise refusal("chain_loop", f"{what} is part of a loop: it stands above itself")
                recorded = above.image.backing_format
                if recorded is not None and recorded not in probe.FORMATS:
                    raise refusal("backing_format", f"{what} is recorded with the format {recorded!r}, which is not followed")
                if recorded is None and probe.detect(fd, guards.length(fd)):
                    remedy = "set it by qemu-img rebase -u -F" if above.image.format == "qcow2" else "convert it to qcow2"
                    raise refusal("backing_format", f"{above.what} does not record the format of its backing store: {remedy}")
            except BaseException:
                os.close(fd)
                raise
            seen.add(identity_of(os.fstat(fd)))
            layers.append(self.read(fd, what, path, block, recorded or "raw"))
            refuse_image(layers[-1].image, what, self._task.request.max_capacity)
            if layers[-1].image.encrypted:
                raise refusal("encrypted", f"{what} is encrypted, and cannot be read without its secret")

    def backing_path(self, above: OpenImage) -> str:
        """The real path of the backing store that an image records, which is in one of the pools."""
        recorded = t.cast(str, above.image.backing)
        head = recorded.split("/", 1)[0]
        if not recorded or "\0" in recorded or ":" in head:
            # qemu takes "nbd:...", "json:..." and the like for protocols.
            raise refusal("backing_file", f"{above.what} refers to {recorded[:200]!r}, which is not followed")
        path = os.path.realpath(os.path.join(os.path.dirname(os.path.realpath(above.path)), recorded))
        self.refuse_outside("backing_file", path, f"{above.what} has the backing store {path!r}")
        return path

    def refuse_outside(self, check: str, path: str, why: str) -> None:
        """Refuse a real path that is in none of the pools."""
        if self._task.pools.holding(path) is None:
            directory = os.path.dirname(path)
            advice = f"name {directory!r} as source_pool"
            if self._task.request.source is not None:
                advice = f"state the source as source_path, and {advice}"
            raise refusal(check, f"{why}, outside the pools of this task; if it is meant, {advice}")

    def _refuse_hard_link(self, status: os.stat_result, what: str) -> None:
        """Refuse a file that has more names than the pools have of it: who put it there may have had it from anywhere."""
        if self.linked_elsewhere(status):
            as_path = "" if self._task.request.source is None else ", or the file as source_path"
            advice = f"name its directory as source_pool{as_path}"
            raise refusal(
                "hard_link", f"{what} has {status.st_nlink} names, not all in the pools of this task; if it is meant, {advice}"
            )

    def linked_elsewhere(self, status: os.stat_result) -> bool:
        """Whether a file has a name that is in none of the pools."""
        if not stat.S_ISREG(status.st_mode) or status.st_nlink < 2:
            return False
        pools = [pool for pool in self._task.pools if not isinstance(pool, (DevicePool, RemotePool))]
        end = time.monotonic() + _MOMENT
        while True:
            begun = time.time_ns()
            before = [os.fstat(pool.fd) for pool in pools]
            names: t.Dict[t.Tuple[t.Any, ...], int] = {}
            for pool, directory in zip(pools, before):
                names.update({(*identity_of(directory), name): links for name, links in pool.names_of(status)})
            changes = [directory.st_ctime_ns for directory in before]
            # A name that changes while it is counted would count twice. The kernel's clock for files may lag by 10 ms.
            quiet = changes == [os.fstat(pool.fd).st_ctime_ns for pool in pools] and max(changes, default=0) < begun - _TICK
            if quiet or time.monotonic() > end:
                return not quiet or len(names) < max(status.st_nlink, *names.values(), 0)
            time.sleep(2 * _TICK / 1e9)


def open_image(
    path: str, what: str, directory: t.Optional[int] = None, judge: t.Callable[[os.stat_result], None] = lambda status: None
) -> t.Tuple[int, bool]:
    """Open a file or block device for reading: descriptor, and whether it is a block device.

    :param directory: descriptor of the one that ``path`` is a name in
    :param judge: raises for a file that may not be opened
    :raises FileNotFoundError: for nothing there
    """
    try:
        # Taken hold of, but not opened, before it is known what it is: by now the path could be a link or a named pipe.
        handle = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        try:
            status = os.fstat(handle)
            if not (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)):
                raise CloneError("INVALID_ARG", f"{what} is {kind_of(status)}, not a file or block device")
            judge(status)
            return os.open(f"/proc/self/fd/{handle}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), stat.S_ISBLK(status.st_mode)
        finally:
            os.close(handle)
    except OSError as exc:
        if exc.errno in (errno.ENOENT, errno.ENOTDIR):
            raise FileNotFoundError from exc
        raise from_os_error(exc, f"opening {what}") from exc


def real_path(path: str, what: str) -> str:
    try:
        return os.path.realpath(path)
    except OSError as exc:
        # It was a link when it was looked at, and then was none.
        raise CloneError("IN_USE", f"{what} was replaced while it was looked at") from exc


def path_of(fd: int) -> str:
    """Where an open file is now, all links resolved."""
    return os.readlink(f"/proc/self/fd/{fd}")


def identity_of(status: os.stat_result) -> t.Tuple[int, ...]:
    """Device and inode of a file, or the number of a block device."""
    return (status.st_rdev,) if stat.S_ISBLK(status.st_mode) else (status.st_dev, status.st_ino)


def close_all(opened: t.List[OpenImage]) -> None:
    while opened:
        os.close(opened.pop().fd)


def image_from_xml(document: str) -> Image:
    """What libvirt says of a volume, for who cannot read it himself."""
    described = _xml.parse_volume(document)
    return Image(described.format or "raw", described.capacity or 0, described.backing_path, described.backing_format)
