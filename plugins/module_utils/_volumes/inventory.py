# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What volumes a file pool has and how they hang together. Changes nothing.

A thousand volumes cost a thousand small reads. Only regular files directly in the pools are ever opened, whatever an image
says it refers to: the volumes of the pool itself, and of libvirt's other file pools, where overlays of them may lie.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import time
import typing as t
from dataclasses import dataclass, replace

from .._deadline import Deadline
from .._errors import CloneError, from_os_error
from .._images import foreign, probe
from .._images.probe import Image
from .._images.qemu_img import Layer, QemuImg
from .._names import is_staged_name
from .._pools.directory import DirectoryPool, kind_of
from .._pools.libvirt import Connection, LibvirtPool
from .._transfer import guards, staging
from . import entry

# Formats that record a backing store which is followed here. A vmdk that has one is refused by foreign.read.
_BACKED = ("qcow2", "qed", "qcow")
# Read from the header alone; the others cost a process each.
_CHEAP = ("raw", "qcow2")

FileId = t.Tuple[int, int]
Key = t.Tuple[FileId, str]


@dataclass(frozen=True)
class Volume:
    """A regular file of a pool. ``format`` is None where it cannot be told, ``image`` where ``error`` says why.

    ``image`` and ``error`` are both None where nobody asked for more than the format.
    """

    pool: DirectoryPool
    directory: FileId
    name: str
    status: os.stat_result
    format: t.Optional[str] = None
    image: t.Optional[Image] = None
    error: t.Optional[CloneError] = None
    #: formats whose magic it carries, None where it could not be read at all
    magics: t.Optional[t.Tuple[str, ...]] = None
    #: other files in which a vmdk has its content, as recorded
    references: t.Tuple[str, ...] = ()
    label: t.Optional[str] = None
    held_by_qemu: bool = False

    @property
    def key(self) -> Key:
        return self.directory, self.name

    @property
    def path(self) -> str:
        return self.pool.path_of(self.name)

    @property
    def identity(self) -> FileId:
        return self.status.st_dev, self.status.st_ino

    @property
    def what(self) -> str:
        return f"volume {self.name!r} of pool {self.pool.name!r}"


@dataclass(frozen=True)
class Below:
    """One image below a volume. ``volume`` is None for what is in none of the pools; ``path`` is then as recorded."""

    path: str
    format: t.Optional[str]
    volume: t.Optional[Volume] = None


class Inventory:
    """The volumes of a pool, as they are now.

    :param name: the one volume that is asked for; None for all, empty for none. Of others, the formats that need qemu-img are
        then read only where they could depend on it.
    """

    def __init__(self, uri: str, pool: str, name: t.Optional[str], deadline: Deadline) -> None:
        self._connection = Connection(uri)
        self._pool_name = pool
        self._name = name
        self._deadline = deadline
        self._qemu = QemuImg()
        self._pools: t.List[DirectoryPool] = []
        self._volumes: t.Dict[Key, Volume] = {}
        self._found: t.Dict[t.Tuple[FileId, str], t.Optional[Volume]] = {}
        #: pools that could not be looked into, and why
        self.unseen: t.Dict[str, str] = {}

    def close(self) -> None:
        for pool in self._pools:
            pool.close()
        self._connection.close()

    def open_pool(self) -> DirectoryPool:
        """The pool, opened.

        :raises CloneError: ``NO_STORAGE_POOL`` for none, ``OPERATION_INVALID`` for one that is not active
        """
        name = self._pool_name
        pool = DirectoryPool(name, name) if os.path.isabs(name) else self._connection.pool(name)
        if isinstance(pool, LibvirtPool) and not pool.is_active():
            raise CloneError("OPERATION_INVALID", f"pool {name!r} is not active")
        pool.open()
        self._pools = [pool]
        return pool

    @property
    def pool(self) -> DirectoryPool:
        return self._pools[0]

    def scan(self) -> None:
        """Look at all volumes again.

        :raises CloneError: ``OPERATION_DENIED`` where this user may not list the pool
        """
        self._volumes, self._found, self.unseen = {}, {}, {}
        self._scan(self.pool)
        if isinstance(self.pool, LibvirtPool):
            self._scan_others()

    def _scan_others(self) -> None:
        """libvirt's other file pools. One of them may be the same directory under another name: the first one counts."""
        for pool in self._pools[1:]:
            pool.close()
        del self._pools[1:]
        for pool in self._connection.file_pools():
            try:
                pool.refuse_unmounted()
                if any(os.path.sameopenfile(pool.fd, other.fd) for other in self._pools):
                    pool.close()
                    continue
                self._pools.append(pool)
                self._scan(pool)
            except CloneError as exc:
                if exc.code == "TIMEOUT":
                    raise
                self.unseen[pool.name] = exc.msg

    # --- looking at volumes ---------------------------------------------------------------------------------------------

    def _scan(self, pool: DirectoryPool) -> None:
        status = os.fstat(pool.fd)
        directory = (status.st_dev, status.st_ino)
        for name in _list(pool):
            self._deadline.check(f"looking at the volumes of pool {pool.name!r}")
            volume = self._look(pool, directory, name)
            if volume is not None:
                self._volumes[volume.key] = volume

    def _look(self, pool: DirectoryPool, directory: FileId, name: str) -> t.Optional[Volume]:
        """The volume of that name; None when it is gone, or no regular file, by now."""
        try:
            fd = open_volume(pool, name, os.O_RDONLY)
        except OSError as exc:
            status = pool.lstat(name)
            if status is None or kind_of(status):
                return None
            volume = Volume(pool, directory, name, status)
            return replace(volume, error=from_os_error(exc, f"opening {volume.what}"))
        try:
            status = os.fstat(fd)
            if kind_of(status):
                return None
            return self._read(Volume(pool, directory, name, status), fd)
        finally:
            os.close(fd)

    def _read(self, volume: Volume, fd: int) -> Volume:
        asked = volume.pool is self.pool and self._name in (None, volume.name)
        if asked:
            volume = replace(volume, label=staging.get_label(fd), held_by_qemu=guards.held_by_qemu(fd))
        try:
            found = probe.detect(fd, volume.status.st_size)
            volume = replace(volume, magics=found, references=foreign.vmdk_references(fd) if "vmdk" in found else ())
            volume = replace(volume, format=_told_format(found, volume.what))
            if asked or volume.format in _CHEAP or volume.format in _BACKED:
                volume = replace(volume, image=self._image(volume, fd, t.cast(str, volume.format), found))
        except CloneError as exc:
            volume = replace(volume, error=exc)
        except OSError as exc:
            volume = replace(volume, error=from_os_error(exc, f"reading {volume.what}"))
        return volume

    def _image(self, volume: Volume, fd: int, image_format: str, found: t.Sequence[str]) -> Image:
        size = volume.status.st_size
        if image_format == "raw":
            return probe.read_raw(size, found, os.pread(fd, 8, 0))
        if image_format == "qcow2":
            return probe.read_qcow2(fd, size, volume.what)
        what = volume.what
        header = foreign.read(fd, size, image_format, what)
        return self._qemu.read(Layer(fd, image_format), header, what, lambda: self._deadline.check(f"reading {what}"))

    # --- how they hang together -----------------------------------------------------------------------------------------

    def asked_for(self) -> t.List[Volume]:
        """The volumes of the pool, or the one that is asked for, by name."""
        found = (one for one in self._volumes.values() if one.pool is self.pool and self._name in (None, one.name))
        return sorted(found, key=lambda one: one.name)

    def chain(self, volume: Volume) -> t.Tuple[t.List[Below], bool]:
        """Every image below the volume, topmost first, and whether that is all of them.

        It is not where an image lies outside the pools or cannot be read, and where the chain is a loop.
        """
        below: t.List[Below] = []
        seen = {volume.key}
        above, image = volume, volume.image
        while image is not None and image.backing is not None:
            found = self._find(above, image.backing)
            if found is None or found.key in seen:
                return (below if found else [*below, Below(image.backing, image.backing_format)]), False
            seen.add(found.key)
            below.append(Below(found.path, image.backing_format or found.format, found))
            above, image = found, self._as_backing(found, image.backing_format)
        return below, image is not None

    def _find(self, above: Volume, recorded: str) -> t.Optional[Volume]:
        """The volume that an image calls its backing store, None for what is no volume of the pools."""
        at = (above.directory, recorded)
        if at not in self._found:
            name = _file_name(recorded)
            key = None
            if name is not None:
                path = os.path.realpath(os.path.join(os.path.realpath(above.pool.path), name))
                key = _key(path)
            self._found[at] = self._volumes.get(key) if key is not None else None
        return self._found[at]

    def _as_backing(self, volume: Volume, recorded: t.Optional[str]) -> t.Optional[Image]:
        """The image as the one above it has it read; None where that cannot be told."""
        image_format = recorded or volume.format
        if image_format == volume.format and (volume.image or volume.error):
            return volume.image
        if image_format not in _BACKED:
            # Nothing lies below it.
            return Image(image_format, volume.status.st_size) if image_format in probe.FORMATS else None
        try:
            fd = open_volume(volume.pool, volume.name, os.O_RDONLY)
            try:
                return self._image(volume, fd, image_format, ())
            finally:
                os.close(fd)
        except (OSError, CloneError):
            return None

    def dependents(self) -> t.Dict[Key, t.List[Volume]]:
        """For each volume that has any: the volumes that are not whole without it.

        They have it in their :meth:`chain`, or they or an image in it keep their data in it.
        """
        found: t.Dict[Key, t.List[Volume]] = {}
        for volume in self._volumes.values():
            for key in self._needed_by(volume):
                found.setdefault(key, []).append(volume)
        return found

    def _needed_by(self, volume: Volume) -> t.Set[Key]:
        needed: t.Set[Key] = set()
        todo = [(volume, volume.image)]
        while todo:
            above, image = todo.pop()
            for recorded, image_format in _references(above, image):
                found = self._find(above, recorded)
                if found is not None and found is not volume and found.key not in needed:
                    needed.add(found.key)
                    todo.append((found, self._as_backing(found, image_format)))
        return needed

    def call(self, volume: Volume) -> str:
        """What a dependent is called: its name in the pool itself, its path in another."""
        return entry.printable(volume.name if volume.pool is self.pool else volume.path)

    def untold(self, key: Key) -> t.List[str]:
        """Volumes of which it cannot be told whether they depend on another. Those of pools in ``unseen`` come on top."""
        return sorted(self.call(one) for one in self._volumes.values() if one.key != key and _may_need_others(one))

    # --- what modules return of them ------------------------------------------------------------------------------------

    def describe(self, volume: Volume) -> t.Dict[str, t.Any]:
        """The volume as ``storage_volume_clone`` returns one, with its backing chain."""
        image, error = volume.image, volume.error
        below, complete = self.chain(volume)
        chain = [{"path": entry.printable(one.path), "format": one.format} for one in below]
        backing = None
        if image is not None and image.backing is not None:
            recorded = {"path": entry.printable(image.backing), "format": chain[0]["format"] if chain else image.backing_format}
            backing = {**recorded, "depth": len(chain) if complete else None}
        status = volume.status
        return {
            **entry.describe(
                volume.pool.name,
                volume.name,
                volume.path,
                image_format=volume.format,
                capacity=image.capacity if image else None,
                allocation=status.st_blocks * 512,
                physical=status.st_size,
                backing=backing,
                owner=(status.st_uid, status.st_gid, status.st_mode),
                label=volume.label,
            ),
            "error_code": error.code if error else None,
            "msg": error.msg if error else None,
            "backing_chain": chain,
        }

    def described(self) -> t.List[t.Dict[str, t.Any]]:
        """What ``storage_volume_info`` returns."""
        asked_for = self.asked_for()
        dependents, users = self.dependents(), self.users(asked_for)
        return [
            {
                **self.describe(volume),
                "dependents": sorted(map(self.call, dependents.get(volume.key, ()))),
                "in_use_by": users[volume.key],
            }
            for volume in asked_for
        ]

    def users(self, volumes: t.Sequence[Volume]) -> t.Dict[Key, t.List[str]]:
        """Who uses each of the volumes: running domains, other processes, and, where neither is seen, a qemu that locks it."""
        processes = guards.openers({volume.identity for volume in volumes})
        domains = self._connection.domains_by_file() if isinstance(self.pool, LibvirtPool) else {}
        users = {one.key: [*domains.get(one.identity, ()), *processes.get(one.identity, ())] for one in volumes}
        for volume in volumes:
            if volume.held_by_qemu and not users[volume.key]:
                users[volume.key] = ["another qemu process"]
        return users


def _references(volume: Volume, image: t.Optional[Image]) -> t.List[t.Tuple[str, t.Optional[str]]]:
    """Other files in which a volume that is read as ``image`` has its content, as recorded, and the format of each."""
    if image is None:
        return [(name, None) for name in volume.references]
    found: t.List[t.Tuple[str, t.Optional[str]]] = []
    if image.backing is not None:
        found.append((image.backing, image.backing_format))
    if image.data_file:
        # QEMU opens it from where it was started; libvirt, which starts it, takes it to be next to the image.
        found.append((image.data_file, "raw"))
    return found


def _may_need_others(volume: Volume) -> bool:
    if volume.error is not None:
        return volume.magics is None or any(name in _BACKED for name in volume.magics)
    return volume.image is not None and volume.image.data_file == ""


def _list(pool: DirectoryPool) -> t.List[str]:
    try:
        with os.scandir(pool.fd) as listed:
            return [item.name for item in listed if item.is_file(follow_symlinks=False) and not is_staged_name(item.name)]
    except OSError as exc:
        # EBADF: the pool may be passed through only, and was opened so.
        if exc.errno in (errno.EBADF, errno.EACCES):
            raise CloneError(
                "OPERATION_DENIED", f"pool {pool.name!r}: this user may not list {pool.path!r}; use become"
            ) from exc
        raise from_os_error(exc, f"listing pool {pool.name!r}, {pool.path!r},") from exc


def open_volume(pool: DirectoryPool, name: str, access: int) -> int:
    """Open a volume, for reading or writing.

    Without O_NONBLOCK a named pipe that has taken the name would be waited for. With it, another run that is just asking who
    has the volume open, by a lease, keeps us out for a moment.
    """
    end = time.monotonic() + 1
    while True:
        try:
            return os.open(name, access | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=pool.fd)
        except BlockingIOError:
            if time.monotonic() > end:
                raise
            time.sleep(0.005)


def _told_format(found: t.Sequence[str], what: str) -> str:
    """The format by the rule of :func:`probe.choose_format`, with a message that fits where nobody can pin one."""
    try:
        return probe.choose_format(found, None, what)
    except CloneError as exc:
        formats = [name.replace("-footer", "") for name in found] + (["raw"] if len(found) == 1 else [])
        raise CloneError(exc.code, f"{what} can be read as {' and as '.join(formats)}, so its format cannot be told") from exc


def _file_name(recorded: str) -> t.Optional[str]:
    """The file that qemu opens for a recorded backing store (``bdrv_parse_filename`` and ``json:`` in its block.c), if any."""
    if recorded.startswith("json:"):
        try:
            node = json.loads(recorded[5:])
        except (ValueError, RecursionError):
            return None
        while isinstance(node, dict) and isinstance(node.get("file"), dict):
            node = node["file"]
        name = (node.get("filename") or node.get("file.filename")) if isinstance(node, dict) else None
        return name if isinstance(name, str) and "\0" not in name else None
    if recorded.startswith("file:"):
        recorded = recorded[5:]
    elif ":" in recorded.split("/", 1)[0]:
        # nbd:..., https:... and so on.
        return None
    return recorded if recorded and "\0" not in recorded else None


def _key(path: str) -> t.Optional[Key]:
    try:
        status = os.stat(os.path.dirname(path))
    except OSError:
        return None
    return ((status.st_dev, status.st_ino), os.path.basename(path)) if stat.S_ISDIR(status.st_mode) else None
