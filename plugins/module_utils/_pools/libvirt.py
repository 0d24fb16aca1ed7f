# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Pools of a libvirtd on this host whose volumes are files: dir, fs and netfs.

libvirt is asked where a pool is, who uses a volume, and to look again once something changed. It never moves the data, unless
``method: libvirt`` says so: its own clones of two pools in opposite directions deadlock the daemon (two mutexes, taken in call
order, in ``storageVolCreateXMLFrom``).
"""

from __future__ import annotations

import os
import stat
import typing as t
from contextlib import contextmanager

from .. import _xml
from .._deadline import Deadline
from .._errors import CloneError
from .._uri import is_remote, is_uri
from . import capabilities, definition
from .capabilities import CLONE_POOLS, FILE_POOLS
from .definition import Definition
from .directory import DirectoryPool

# What a pool answers while jobs run in it (storage_driver.c); the code is INTERNAL_ERROR or OPERATION_INVALID, so only the
# text tells.
_BUSY = ("has asynchronous jobs running", "is still being allocated", "is still in use")
# virStoragePoolObjIsDuplicate and virStoragePoolObjSourceFindDuplicate (virstorageobj.c), both OPERATION_FAILED.
_TAKEN = ("already exists with uuid", "is already defined with uuid", "Storage source conflict")


def libvirt_module() -> t.Any:
    try:
        import libvirt  # pylint: disable=import-outside-toplevel
    except ImportError as exc:
        raise CloneError(
            "MISSING_DEPENDENCY",
            "a libvirt pool needs the Python package libvirt-python (python3-libvirt) on the managed host",
        ) from exc
    return libvirt


@contextmanager
def translated(doing: str) -> t.Iterator[None]:
    """libvirt's errors become ours; ``doing`` is the start of the sentence."""
    libvirt = libvirt_module()
    try:
        yield
    except libvirt.libvirtError as exc:
        raise _error(exc, doing) from exc


class Connection:
    """One connection to a libvirtd, opened at the first use; ``remote`` when that is one of another host."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.remote = is_remote(uri)
        self._connection: t.Any = None

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    @property
    def handle(self) -> t.Any:
        if self._connection is None:
            libvirt = libvirt_module()
            if not is_uri(self.uri):
                raise CloneError("INVALID_ARG", f"uri: {self.uri!r} is no libvirt connection URI")
            # Without this libvirt writes every error to stderr as well.
            libvirt.registerErrorHandler(lambda _context, _error: None, None)
            with translated(f"connecting to {self.uri} (uri)"):
                self._connection = libvirt.open(self.uri)
        return self._connection

    def pool(self, name: str) -> LibvirtPool:
        """The pool of that name.

        :raises CloneError: ``NO_STORAGE_POOL`` for none, ``NO_SUPPORT`` for one of a type in which nothing can be cloned
        """
        pool = self.find(name)
        if pool is None:
            raise CloneError("NO_STORAGE_POOL", f"pool {name!r} does not exist at {self.uri}")
        if not capabilities.of(pool.type).clone:
            raise CloneError(
                "NO_SUPPORT",
                f"pool {name!r} is of type {pool.type}; volumes are cloned in pools of the types {', '.join(CLONE_POOLS)}",
            )
        return pool

    def find(self, name: str) -> t.Optional[LibvirtPool]:
        """The pool of that name, of whatever type; None when there is none."""
        libvirt = libvirt_module()
        with translated(f"looking up pool {name!r} at {self.uri}"):
            try:
                pool = self.handle.storagePoolLookupByName(name)
                described = _xml.pool_target(pool.XMLDesc(0))
            except libvirt.libvirtError as exc:
                if exc.get_error_code() != libvirt.VIR_ERR_NO_STORAGE_POOL:
                    raise
                return None
        return _class_of(described.type, self.remote)(name, described.target_path or "", described.type, pool, self)

    def names(self) -> t.List[str]:
        """Of all pools, in order."""
        with translated(f"listing the pools at {self.uri}"):
            return sorted(pool.name() for pool in self.handle.listAllStoragePools(0))

    def definitions(self, but: str) -> t.Iterator[Definition]:
        """What all pools but one are started with."""
        for name in self.names():
            pool = self.find(name) if name != but else None
            if pool is not None:
                yield definition.parse(pool.document(inactive=True))

    def define(self, document: str, name: str) -> LibvirtPool:
        """Define a pool, or give one that has the document's uuid another definition; it runs on with the old one.

        :raises FileExistsError: another pool has the name or the storage by now
        """
        libvirt = libvirt_module()
        with translated(f"defining pool {name!r}"):
            try:
                self.handle.storagePoolDefineXML(document, 0)
            except libvirt.libvirtError as exc:
                if any(text in exc.get_error_message() for text in _TAKEN):
                    raise FileExistsError(exc.get_error_message()) from exc
                raise
        pool = self.find(name)
        if pool is None:
            raise CloneError("NO_STORAGE_POOL", f"pool {name!r} was undefined while it was made")
        return pool

    def denied(self) -> str:
        """Why nobody may define a pool by this connection; empty when one may try.

        A read-only connection says so before it reads the document, and an empty one defines nothing.
        """
        libvirt = libvirt_module()
        try:
            self.handle.storagePoolDefineXML("", 0)
        except libvirt.libvirtError as exc:
            if exc.get_error_code() in (libvirt.VIR_ERR_OPERATION_DENIED, libvirt.VIR_ERR_ACCESS_DENIED):
                return t.cast(str, exc.get_error_message())
        return ""

    def file_pools(self) -> t.List[LibvirtPool]:
        """Every pool that keeps files, active or not."""
        libvirt = libvirt_module()
        pools = []
        with translated(f"listing the pools at {self.uri}"):
            listed = self.handle.listAllStoragePools(0)
        for pool in listed:
            try:
                described = _xml.pool_target(pool.XMLDesc(0))
            except libvirt.libvirtError:
                # Undefined since it was listed.
                continue
            if described.type in FILE_POOLS and described.target_path:
                pools.append(LibvirtPool(pool.name(), described.target_path, described.type, pool, self))
        return pools

    def users_of(self, path: str) -> str:
        """Running domains that have a disk, or a layer of one, in the file ``path``."""
        status = os.stat(path)
        return ", ".join(self.domains_by_file().get((status.st_dev, status.st_ino), [])[:3])

    def domains_by_file(self) -> t.Dict[t.Tuple[int, int], t.List[str]]:
        """Running domains by device and inode of the files in which they have a disk, or a layer of one."""
        found: t.Dict[t.Tuple[int, int], t.List[str]] = {}
        for name, document in self._running_domains():
            used = map(_identity, _xml.domain_disks(document))
            for identity in {identity for identity in used if identity is not None}:
                found.setdefault(identity, []).append(f"domain {name!r}")
        return found

    def domains_by_name(self, writing: bool = False) -> t.Dict[_xml.DiskName, t.List[str]]:
        """Running domains by what their disks name: paths, and volumes as pool and name. For where files cannot be looked at.

        :param writing: leave out what a domain only reads
        """
        found: t.Dict[_xml.DiskName, t.List[str]] = {}
        for name, document in self._running_domains():
            for disk in _xml.domain_uses(document, writing):
                found.setdefault(disk, []).append(f"domain {name!r}")
        return found

    def users_below(self, directory: str, pool: str) -> str:
        """Running domains that have a disk, or a layer of one, below a directory, or name a volume of the pool as a disk."""
        # Links of another host cannot be resolved.
        resolved = os.path.normpath if self.remote else os.path.realpath
        below = os.path.join(resolved(directory), "")
        found = [
            f"domain {name!r}"
            for name, document in self._running_domains()
            if pool in _xml.domain_pools(document)
            or any(resolved(path).startswith(below) for path in _xml.domain_disks(document))
        ]
        return ", ".join(found[:3])

    def documents(self, but: str) -> t.Iterator[str]:
        """Of all pools but one, and of all domains, running or not."""
        libvirt = libvirt_module()
        for name in self.names():
            pool = self.find(name) if name != but else None
            if pool is not None:
                yield pool.document(inactive=True)
        with translated(f"listing the domains at {self.uri}"):
            for domain in self.handle.listAllDomains(0):
                try:
                    yield t.cast(str, domain.XMLDesc(0))
                except libvirt.libvirtError as exc:
                    if exc.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
                        raise

    def users_among(self, paths: t.Collection[str], pool: str) -> str:
        """Running domains that have a disk on one of these block devices, or name a volume of the pool as a disk."""
        # The devices of another host cannot be looked at.
        known: t.Callable[[str], t.Union[int, str, None]] = os.path.normpath if self.remote else device_number
        wanted = {known(path) for path in paths} - {None}
        found = [
            f"domain {name!r}"
            for name, document in self._running_domains()
            if pool in _xml.domain_pools(document) or any(known(disk) in wanted for disk in _xml.domain_disks(document))
        ]
        return ", ".join(found[:3])

    def users_of_device(self, path: str) -> str:
        """Running domains that have a disk on a block device, by whatever node."""
        return ", ".join(self.domains_by_device().get(os.stat(path).st_rdev, [])[:3])

    def domains_by_device(self) -> t.Dict[int, t.List[str]]:
        """Running domains by the numbers of the block devices that they have a disk on."""
        found: t.Dict[int, t.List[str]] = {}
        for name, document in self._running_domains():
            used = map(device_number, _xml.domain_disks(document))
            for number in {number for number in used if number is not None}:
                found.setdefault(number, []).append(f"domain {name!r}")
        return found

    def users_of_network(
        self,
        protocol: str,
        paths: t.Mapping[str, str],
        hosts: t.Sequence[t.Tuple[str, t.Optional[int]]],
        pool: str,
        writing: bool = False,
    ) -> t.Dict[str, str]:
        """Running domains that have a disk, or a layer of one, on volumes reached by the network, by the name of each volume.

        :param paths: by the name of the volume, what libvirt calls it in a disk: ``pool/image`` or ``iqn/lun``
        :param hosts: of the pool; a domain may name others of the same cluster too
        :param writing: only those that write to it
        """
        ours = {host for host, _port in hosts}
        found: t.Dict[str, t.List[str]] = {volume: [] for volume in paths}
        for name, document in self._running_domains():
            disks = _xml.domain_network_disks(document, writing)
            used = {(disk.protocol, disk.name) for disk in disks if not disk.hosts or ours & set(disk.hosts)}
            volumes = _xml.domain_volumes(document, writing)
            for volume, path in paths.items():
                if (protocol, path) in used or (pool, volume) in volumes:
                    found[volume].append(f"domain {name!r}")
        return {volume: ", ".join(domains[:3]) for volume, domains in found.items()}

    def _running_domains(self) -> t.Iterator[t.Tuple[str, str]]:
        """Name and document of each."""
        libvirt = libvirt_module()
        with translated(f"listing the running domains at {self.uri}"):
            try:
                domains = self.handle.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE)
            except libvirt.libvirtError as exc:
                if exc.get_error_code() != libvirt.VIR_ERR_NO_SUPPORT:
                    raise
                # storage:///system has no domains.
                domains = []
        for domain in domains:
            with translated(f"looking at the running domains at {self.uri}"):
                try:
                    found = domain.name(), domain.XMLDesc(0)
                except libvirt.libvirtError as exc:
                    if exc.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
                        raise
                    # It has ended since it was listed.
                    continue
            yield found


def is_busy(message: str) -> bool:
    """Whether libvirt says no only because jobs run in the pool."""
    return any(text in message for text in _BUSY)


def _identity(path: str) -> t.Optional[t.Tuple[int, int]]:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def device_number(path: str) -> t.Optional[int]:
    """Of a block device, None for anything else."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_rdev if stat.S_ISBLK(status.st_mode) else None


class LibvirtPool(DirectoryPool):
    """A file pool of libvirt."""

    def __init__(self, name: str, path: str, pool_type: str, pool: t.Any, connection: Connection) -> None:
        super().__init__(name, path)
        self.type = pool_type
        self._pool = pool
        self._connection = connection

    def is_active(self) -> bool:
        with translated(f"looking at pool {self.name!r}"):
            return bool(self._pool.isActive())

    def refuse_unmounted(self) -> None:
        """The directory of a pool that is not active has its volumes too, unless they are on a file system to be mounted.

        :raises CloneError: ``OPERATION_INVALID`` where that is so
        """
        if self.type != "dir" and not os.path.ismount(self.path) and not self.is_active():
            raise CloneError("OPERATION_INVALID", f"pool {self.name!r} is not active, and nothing is mounted at {self.path!r}")

    def is_persistent(self) -> bool:
        with translated(f"looking at pool {self.name!r}"):
            return bool(self._pool.isPersistent())

    def autostart(self) -> bool:
        with translated(f"looking at pool {self.name!r}"):
            return bool(self._pool.autostart())

    def document(self, inactive: bool = False) -> str:
        """What the pool runs with, or with ``inactive`` what it is started with."""
        libvirt = libvirt_module()
        with translated(f"looking at pool {self.name!r}"):
            return t.cast(str, self._pool.XMLDesc(libvirt.VIR_STORAGE_XML_INACTIVE if inactive else 0))

    def sizes(self) -> t.Tuple[int, int, int]:
        """Capacity, allocation and free space in bytes, as libvirt last saw them."""
        with translated(f"looking at pool {self.name!r}"):
            _state, capacity, allocation, available = self._pool.info()
        return capacity, allocation, available

    def build(self) -> None:
        """Make the file system; libvirt refuses by itself where it finds another one."""
        libvirt = libvirt_module()
        with translated(f"building pool {self.name!r}"):
            self._pool.build(libvirt.VIR_STORAGE_POOL_BUILD_NO_OVERWRITE)

    def start(self) -> None:
        with translated(f"starting pool {self.name!r}"):
            self._pool.create(0)

    def stop(self, deadline: Deadline) -> None:
        """Stop the pool, once no job is running.

        :raises CloneError: ``IN_USE`` when it cannot be unmounted
        """
        try:
            with translated(f"stopping pool {self.name!r}"):
                self._patiently(self._pool.destroy, deadline)
        except CloneError as exc:
            # Of umount(8), and of vgchange(8).
            if "target is busy" in exc.msg or "open logical volume" in exc.msg:
                raise CloneError("IN_USE", exc.msg) from exc
            raise

    def undefine(self) -> None:
        with translated(f"undefining pool {self.name!r}"):
            self._pool.undefine()

    def set_autostart(self, wanted: bool) -> None:
        with translated(f"setting autostart of pool {self.name!r}"):
            self._pool.setAutostart(int(wanted))

    def denied(self) -> str:
        """Also notices a read-only connection, which libvirt tells only to somebody who tries to change something."""
        refusal = self._connection.denied()
        return f"pool {self.name!r}: {refusal}" if refusal else ""

    def cannot_write(self) -> str:
        """Why this user may not write to the pool's directory; empty when he may."""
        refusal = super().denied()
        return f"{refusal} or method=libvirt" if refusal else ""

    def users_of(self, path: str) -> str:
        return self._connection.users_of(path)

    def lists(self, *names: str) -> bool:
        libvirt = libvirt_module()
        try:
            if len(names) != 1:
                return set(names).issubset(self._pool.listVolumes())
            self._pool.storageVolLookupByName(names[0])
        except libvirt.libvirtError:
            return False
        return True

    def volume_paths(self) -> t.List[str]:
        """Of all volumes that libvirt has listed."""
        with translated(f"listing the volumes of pool {self.name!r}"):
            return [volume.path() for volume in self._pool.listAllVolumes(0)]

    def refresh(self, deadline: Deadline) -> None:
        """Look again, once no job is running."""
        libvirt = libvirt_module()

        def again() -> None:
            try:
                self._pool.refresh(0)
            except libvirt.libvirtError:
                # A refresh that fails leaves a pool inactive that was active before; starting it looks again too.
                if self._pool.isActive():
                    raise
                self._pool.create(0)

        with translated(f"refreshing pool {self.name!r}"):
            self._patiently(again, deadline, ", after which libvirt sees what was done,")

    def _patiently(self, call: t.Callable[[], t.Any], deadline: Deadline, remark: str = "") -> t.Any:
        """The answer of a call that libvirt refuses while jobs run in the pool."""
        libvirt = libvirt_module()
        answers: t.List[t.Any] = []

        def attempt() -> bool:
            try:
                answers.append(call())
            except libvirt.libvirtError as exc:
                if not is_busy(exc.get_error_message()):
                    raise
            return bool(answers)

        deadline.wait_for(attempt, f"waiting for the jobs of pool {self.name!r}{remark}")
        return answers[0]

    def volume_xml(self, name: str) -> t.Optional[str]:
        """libvirt's description of a volume, None for one that it does not know."""
        libvirt = libvirt_module()
        with translated(f"looking up volume {name!r} of pool {self.name!r}"):
            try:
                return t.cast(str, self._pool.storageVolLookupByName(name).XMLDesc(0))
            except libvirt.libvirtError as exc:
                if exc.get_error_code() != libvirt.VIR_ERR_NO_STORAGE_VOL:
                    raise
        return None

    def clone(
        self, document: str, source: LibvirtPool, source_name: str, flags: int, capacity: int, deadline: Deadline
    ) -> None:
        """libvirt's own clone call, which ignores a larger capacity for all formats but raw: so the volume is grown after it.

        :raises CloneError: ``STORAGE_VOL_EXIST`` when the name is taken
        """
        with translated(f"cloning volume {source_name!r} by libvirt"):
            original = source._pool.storageVolLookupByName(source_name)
            volume = self._patiently(lambda: self._pool.createXMLFrom(document, original, flags), deadline)
            try:
                if volume.info()[1] < capacity:
                    volume.resize(capacity, 0)
            except libvirt_module().libvirtError:
                # What libvirt has made by now would be taken for the clone.
                volume.delete(0)
                raise


def _error(exc: t.Any, doing: str) -> CloneError:
    libvirt = libvirt_module()
    code, text = exc.get_error_code(), exc.get_error_message()
    known = {
        libvirt.VIR_ERR_OPERATION_DENIED: "OPERATION_DENIED",
        libvirt.VIR_ERR_ACCESS_DENIED: "OPERATION_DENIED",
        libvirt.VIR_ERR_AUTH_FAILED: "OPERATION_DENIED",
        libvirt.VIR_ERR_AUTH_UNAVAILABLE: "OPERATION_DENIED",
        libvirt.VIR_ERR_AUTH_CANCELLED: "OPERATION_DENIED",
        libvirt.VIR_ERR_NO_STORAGE_POOL: "NO_STORAGE_POOL",
        libvirt.VIR_ERR_NO_STORAGE_VOL: "NO_STORAGE_VOL",
        libvirt.VIR_ERR_STORAGE_VOL_EXIST: "STORAGE_VOL_EXIST",
        libvirt.VIR_ERR_NO_SUPPORT: "NO_SUPPORT",
        libvirt.VIR_ERR_ARGUMENT_UNSUPPORTED: "NO_SUPPORT",
        libvirt.VIR_ERR_OPERATION_INVALID: "OPERATION_INVALID",
        libvirt.VIR_ERR_CONFIG_UNSUPPORTED: "CONFIG_UNSUPPORTED",
        libvirt.VIR_ERR_XML_ERROR: "XML_ERROR",
    }.get(code)
    if known is None and "missing backend for pool type" in text:
        # A libvirt that was built without it, or lacks the package with it.
        known = "NO_SUPPORT"
    if code == libvirt.VIR_ERR_OPERATION_INVALID and "volume target path" in text:
        # A file that libvirt has not listed (virStorageBackendVolCreateLocal).
        known = None
    if known is None:
        taken = "already in use" in text or "already exists" in text
        denied = "ermission denied" in text
        space = "No space left" in text
        known = "STORAGE_VOL_EXIST" if taken else "OPERATION_DENIED" if denied else "NO_SPACE" if space else "IO_ERROR"
    # What a child process of libvirt's printed is several lines.
    return CloneError(known, f"{doing} failed: {' '.join(text.split())}")


def _class_of(pool_type: str, remote: bool) -> t.Type[LibvirtPool]:
    # These are libvirt's pools too.
    from . import devices, iscsi_direct, rbd  # pylint: disable=import-outside-toplevel
    from .remote import RemotePool  # pylint: disable=import-outside-toplevel

    if remote:
        return RemotePool
    classes: t.Dict[str, t.Type[LibvirtPool]] = {
        **devices.CLASSES,
        "rbd": rbd.RbdPool,
        "iscsi-direct": iscsi_direct.IscsiDirectPool,
    }
    return classes.get(pool_type, LibvirtPool)
