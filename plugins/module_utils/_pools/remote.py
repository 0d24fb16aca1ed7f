# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Pools of a libvirtd on another host. All that is known of them libvirt says, and all that is done to them libvirt does.

Its calls are not safe against a crash: libvirt has no call that renames a volume, so a clone that it makes has its final name
from the start, and a libvirtd that is killed leaves half of it. An upload, which also breaks off when this host or the network
fails, is made known as unfinished by a mark in its first block.
"""

from __future__ import annotations

import hashlib
import os
import typing as t
from contextlib import contextmanager
from dataclasses import dataclass

from .. import _xml
from .._deadline import Deadline
from .._errors import CloneError
from .._transfer import device, locks
from .._xml import VolumeXML
from .capabilities import FILE_POOLS
from .libvirt import LibvirtPool, libvirt_module, translated

#: Bytes at the start of a volume that are looked at: the header of a qcow2 image of the usual cluster size, and all of vmdk's.
HEAD = 64 << 10
# What a stream takes at once is less than this (VIR_NET_MESSAGE_LEGACY_PAYLOAD_MAX).
_PIECE = 256 << 10


@dataclass(frozen=True)
class RemoteVolume:
    """A volume as libvirt describes it. Sizes in bytes."""

    name: str
    type: str
    key: str
    path: str
    allocation: t.Optional[int]
    physical: t.Optional[int]
    label: t.Optional[str]
    #: None where ``error`` says why it cannot be read
    stated: t.Optional[VolumeXML]
    error: t.Optional[CloneError] = None


class RemotePool(LibvirtPool):
    """A pool of libvirt on another host: its paths mean nothing here."""

    def open(self) -> int:
        """There is nothing to open."""
        return -1

    def lock_key(self, name: str) -> str:
        """Runs on other hosts have locks of their own: they are told by libvirt that a name is taken."""
        digest = hashlib.sha256(f"{self._connection.uri}\0{self.name}\0{name}".encode()).hexdigest()
        return f"remote-{digest[:32]}"

    def contains(self, path: str) -> bool:
        """No path of this host is in it."""
        return False

    def available(self) -> int:
        return self.sizes()[2]

    def cannot_write(self) -> str:
        return ""

    def path_of(self, name: str) -> str:
        return os.path.join(self.path, name)

    # --- looking --------------------------------------------------------------------------------------------------------

    def volume(self, name: str) -> t.Optional[RemoteVolume]:
        """The volume of that name, None for one that libvirt does not know."""
        document = self.volume_xml(name)
        return None if document is None else _described(document)

    def volumes(self) -> t.List[RemoteVolume]:
        libvirt = libvirt_module()
        found = []
        with translated(f"listing the volumes of pool {self.name!r}"):
            for volume in self._pool.listAllVolumes(0):
                try:
                    found.append(_described(volume.XMLDesc(0)))
                except libvirt.libvirtError as exc:
                    # Deleted since it was listed.
                    if exc.get_error_code() != libvirt.VIR_ERR_NO_STORAGE_VOL:
                        raise
        return sorted(found, key=lambda volume: volume.name)

    def head(self, name: str, patience: t.Optional[Deadline]) -> bytes:
        """The first bytes of a volume; empty where libvirt does not give them.

        libvirt says here whether it is still making the volume, which is then waited for.

        :param patience: how long; None for not at all
        """
        libvirt = libvirt_module()

        def read() -> bytes:
            volume = self._pool.storageVolLookupByName(name)
            stream = self._connection.handle.newStream(0)
            volume.download(stream, 0, HEAD, 0)
            with _finished(stream):
                pieces = list(iter(lambda: stream.recv(HEAD), b""))
            return b"".join(pieces)

        try:
            with translated(f"reading volume {name!r} of pool {self.name!r}"):
                return t.cast(bytes, read() if patience is None else self._patiently(read, patience))
        except CloneError as exc:
            cause = exc.__cause__
            busy = isinstance(cause, libvirt.libvirtError) and "is still being allocated" in cause.get_error_message()
            if busy:
                raise CloneError("IN_USE", f"volume {name!r} of pool {self.name!r} is still being made") from exc
            if exc.code in ("OPERATION_DENIED", "NO_SUPPORT"):
                return b""
            raise

    def users_of(self, path: str) -> str:
        return _first(self._connection.domains_by_name(), self.name, path)

    def writers_of(self, path: str) -> str:
        return _first(self._connection.domains_by_name(writing=True), self.name, path)

    # --- changing ---------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the pool; where that fails, maybe for want of its directory, libvirt makes that as the definition has it."""
        try:
            super().start()
        except CloneError:
            if self.type not in FILE_POOLS:
                raise
            with translated(f"making the directory of pool {self.name!r}"):
                # Without a flag that says so, no file system is made (virStorageBackendFileSystemBuild).
                self._pool.build(0)
            super().start()

    def make(self, document: str, flags: int = 0) -> None:
        """Have libvirt make a volume.

        :raises FileExistsError: when the name is taken
        """
        try:
            with translated(f"making a volume in pool {self.name!r}"):
                self._pool.createXML(document, flags)
        except CloneError as exc:
            if exc.code == "STORAGE_VOL_EXIST":
                raise FileExistsError(exc.msg) from exc
            raise

    def grow(self, name: str, capacity: int, deadline: Deadline) -> None:
        with translated(f"growing volume {name!r} of pool {self.name!r}"):
            volume = self._pool.storageVolLookupByName(name)
            self._patiently(lambda: volume.resize(capacity, 0), deadline)

    def delete(self, name: str, deadline: Deadline) -> None:
        with translated(f"deleting volume {name!r} of pool {self.name!r}"):
            volume = self._pool.storageVolLookupByName(name)
            self._patiently(lambda: volume.delete(0), deadline)

    def wipe(self, name: str, algorithm: str) -> None:
        """Overwrite by one of libvirt's algorithms, on the other host."""
        libvirt = libvirt_module()
        number = getattr(libvirt, f"VIR_STORAGE_VOL_WIPE_ALG_{algorithm.upper()}")
        with translated(f"wiping volume {name!r} of pool {self.name!r} (wipe_algorithm={algorithm})"):
            self._pool.storageVolLookupByName(name).wipePattern(number, 0)

    @contextmanager
    def upload(self, name: str, length: int = 0) -> t.Iterator[Upload]:
        """What is sent is the volume's, from its first byte on; up to ``length`` bytes, or as many as there come."""
        libvirt = libvirt_module()
        with translated(f"uploading volume {name!r} of pool {self.name!r}"):
            volume = self._pool.storageVolLookupByName(name)
            stream = self._connection.handle.newStream(0)
            volume.upload(stream, 0, length, 0 if length else libvirt.VIR_STORAGE_VOL_UPLOAD_SPARSE_STREAM)
            with _finished(stream):
                yield Upload(stream)


class Upload:
    """An open stream into a volume."""

    def __init__(self, stream: t.Any) -> None:
        self._stream = stream

    def send(self, data: t.Union[bytes, memoryview]) -> None:
        at = 0
        while at < len(data):
            at += self._stream.send(bytes(data[at : at + _PIECE]))

    def skip(self, length: int) -> None:
        """What follows is a hole."""
        if length:
            self._stream.sendHole(length, 0)


@contextmanager
def _finished(stream: t.Any) -> t.Iterator[None]:
    """The other side hears of the end of a stream, or that there will be none."""
    try:
        yield
        stream.finish()
    except BaseException:
        try:
            stream.abort()
        except libvirt_module().libvirtError:
            # It is broken already, which is what the first error says.
            pass
        raise


def mark() -> bytes:
    """The first block of an upload that is not complete. It tells which runs share a lock with the one that makes it."""
    return (device.MARK.rstrip(b"\0") + locks.domain().encode() + b"\n").ljust(len(device.MARK), b"\0")


def is_marked(head: bytes) -> bool:
    return head.startswith(device.MARK.rstrip(b"\0"))


def _described(document: str) -> RemoteVolume:
    status = _xml.volume_status(document)
    stated, error = None, None
    try:
        stated = _xml.parse_volume(document, device=status.type in ("block", "network"))
    except CloneError as exc:
        # A format or a feature of a newer libvirt.
        error = exc
    return RemoteVolume(
        status.name,
        status.type,
        status.key,
        status.path,
        status.allocation,
        status.physical,
        status.label,
        stated,
        error,
    )


def _first(domains: t.Mapping[_xml.DiskName, t.Sequence[str]], pool: str, path: str) -> str:
    """Those of the domains that have a volume as a disk, as words for a message."""
    found = dict.fromkeys([*domains.get(path, ()), *domains.get((pool, os.path.basename(path)), ())])
    return ", ".join(list(found)[:3])
