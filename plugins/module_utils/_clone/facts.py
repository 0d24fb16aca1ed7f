# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Looking at the world: pools, the source and everything below it, the target. Changes nothing.

Files are opened once and stay open until the end of the task, and everything is read through those descriptors, by qemu-img
too. What was judged is what is cloned, whatever happens to names in between.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import time
import typing as t
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace

from .. import _xml
from .._deadline import Deadline
from .._errors import CloneError, from_os_error
from .._images import foreign, probe, qemu_img
from .._images.gate import refusal
from .._images.probe import Image
from .._images.qemu_img import Layer, QemuImg
from .._import import intake
from .._import.options import shown
from .._pools import capabilities, remote
from .._pools.devices import Device, DevicePool, DiskPool
from .._pools.directory import DirectoryPool, kind_of
from .._pools.libvirt import Connection, LibvirtPool, device_number
from .._pools.network import NetworkPool, memory
from .._pools.rbd import RbdImage, RbdPool
from .._pools.remote import RemotePool, RemoteVolume
from .._transfer import device, file_copy, guards, locks, staging
from .._transfer.pace import Rate
from .._uri import is_elsewhere
from .._volumes.inventory import Inventory
from .model import Create, Dependents, Facts, PoolFacts, SourceFacts, TargetFacts, Unanswered, kind
from .refusals import refuse_image
from .request import Request, made_up_name

#: More images below a source than this are refused.
MAX_DEPTH = 64
# File systems by statfs(2): ext2 to ext4 and tmpfs never share blocks between files; each subvolume of a btrfs is a device.
_NEVER_SHARE = (0xEF53, 0x01021994)
_BTRFS = 0x9123683E
# Another run that has just looked, or libvirt refreshing the pool, has the file open for a moment; on a busy host, where many
# runs start at once, for more than one.
_MOMENT, _LONG_MOMENT = 1.0, 4.0
_TICK = 20_000_000  # ns
# Facts that are the same for all clones of a source.
_OF_THE_SOURCE = ("source_writers", "source_corrupt", "unshareable", "checked")


@dataclass
class OpenImage:
    """One layer of the source or target. ``what`` names it in messages, ``version`` is guards.version() at the first look."""

    fd: int
    what: str
    path: str
    image: Image
    block: bool
    version: t.Tuple[int, ...]
    #: of the lock that whoever changes it holds; empty for a file, whose place says it
    lock: str = ""
    #: options by which qemu-img reaches what is no file here; ``fd`` is then its key
    network: t.Optional[t.Mapping[str, t.Any]] = None
    #: its name in its pool, where it is none of this host's files or devices
    name: str = ""
    #: whether it came from outside: made by this collection, and not written to by anybody any more
    own: bool = False

    @property
    def layer(self) -> Layer:
        return Layer(self.fd, self.image.format, self.block, network=self.network)

    @property
    def lock_key(self) -> str:
        return self.lock or locks.key(os.stat(os.path.dirname(self.path) or "/"), os.path.basename(self.path))


class Postponed(Exception):
    """What the planner asks for takes long, and is not done before the target is locked: another run may be doing it."""


class Scene:
    """What one clone has to do with. Open it, :meth:`gather`, :meth:`answer` what the planner asks, and close it.

    :param first: the scene of another clone of the same source in the same pool, which owns the source, the pools and the
        connection, and is closed last
    """

    def __init__(self, request: Request, check_mode: bool, first: t.Optional[Scene] = None) -> None:
        self.request = request
        self.check_mode = check_mode
        self._first = first
        #: whether the target is locked, so that this is the last look at it
        self.locked = False
        #: a volume just made whose file is copied in place of the source
        self.donor: t.Optional[OpenImage] = None
        self.target_fd = -1
        #: the target where it is a device
        self.target_device: t.Optional[Device] = None
        #: options by which qemu-img reaches it, where it is no device of this host; ``target_fd`` is then its key
        self.target_network: t.Optional[t.Mapping[str, t.Any]] = None
        #: the target where it is on another host
        self.target_elsewhere: t.Optional[RemoteVolume] = None
        #: what lies below the target, once somebody asked
        self.target_below: t.List[OpenImage] = []
        #: when the whole task has to be over
        self.deadline: Deadline = first.deadline if first else Deadline(request.timeout, "timeout")
        self.rate: Rate = first.rate if first else Rate(request.bwlimit)
        self.qemu: QemuImg = first.qemu if first else QemuImg()
        self.layers: t.List[OpenImage] = first.layers if first else []
        #: what is known of the source, the same for all clones of it
        self.told: t.Dict[t.Any, t.Any] = first.told if first else {}
        self._connection: Connection = first._connection if first else Connection(request.uri)
        self._pools: t.Dict[str, DirectoryPool] = first._pools if first else {}
        self._missing: t.Dict[str, str] = first._missing if first else {}
        #: an image from outside, for as long as the task lasts, and why there is none
        self._intake: t.Optional[intake.Intake] = None
        self._refusal: t.Optional[CloneError] = None
        self._asked = False
        self.intake_warnings: t.List[str] = first.intake_warnings if first else []
        #: version of a source that has the checksum that is stated
        self._verified: t.Optional[t.Tuple[int, ...]] = None

    def close(self) -> None:
        self.close_files()
        if self._intake is not None:
            self._intake.close()
        if self._first is None:
            for pool in self._pools.values():
                pool.close()
            self._connection.close()

    def close_files(self) -> None:
        """Let go of every image that is this scene's own; :meth:`gather` opens them again."""
        if self._first is None:
            _close_all(self.layers)
            self.told.clear()
        _close_all(self.target_below)
        self.let_go_of_target()

    def let_go_of_target(self) -> None:
        if self.target_fd >= 0:
            os.close(self.target_fd)
            self.target_fd = -1

    # --- pools ----------------------------------------------------------------------------------------------------------

    @property
    def pool(self) -> DirectoryPool:
        return self._pools[self.request.pool]

    @property
    def source_pool(self) -> DirectoryPool:
        return self._pools[self.request.effective_source_pool]

    def _open_pool(self, name: str) -> None:
        """Open a pool, or in a check run remember why it is not there: an earlier task may be about to make it."""
        if name in self._pools or name in self._missing:
            return
        try:
            pool = DirectoryPool(name, name) if os.path.isabs(name) else self._connection.pool(name)
            if isinstance(pool, LibvirtPool) and not pool.is_active():
                raise CloneError("OPERATION_INVALID", f"pool {name!r} is not active")
            if isinstance(pool, NetworkPool):
                pool.deadline = self.deadline
            pool.open()
        except CloneError as exc:
            if self.check_mode and exc.code in ("NO_STORAGE_POOL", "OPERATION_INVALID"):
                self._missing[name] = exc.msg
                return
            raise
        self._pools[name] = pool

    # --- facts ----------------------------------------------------------------------------------------------------------

    def open_source(self) -> SourceFacts:
        """Open the pools and the source anew."""
        request = self.request
        self.close_files()
        self._open_pool(request.pool)
        if request.source is not None or request.source_pool is not None:
            self._open_pool(request.effective_source_pool)
        self.told["source"] = self._source()
        return t.cast(SourceFacts, self.told["source"])

    def gather(self) -> Facts:
        """The facts that every plan needs."""
        self.close_files()
        source = self.open_source() if self._first is None else self.told["source"]
        pool = self._pools.get(self.request.pool)
        if isinstance(pool, DevicePool) and self.request.format is None:
            self.request = replace(self.request, format="raw")
        request = self.request
        if isinstance(pool, DiskPool) and request.name is None:
            raise CloneError("INVALID_ARG", f"name: state it; the next partition of pool {pool.name!r} is {pool.next_name()!r}")
        # The same on each run, also before what comes from outside is seen.
        seen = None if self._root._intake else source.image
        name = request.name or made_up_name(request.source_name, request.target_format(seen), seen.format if seen else None)
        if pool is None:
            elsewhere = is_elsewhere(request.uri, request.pool)
            facts = PoolFacts(request.pool, "unknown", None, self._missing[request.pool], remote=elsewhere)
            return self._with_user(Facts(facts, source, TargetFacts(), name, self.check_mode))
        facts = PoolFacts(pool.name, pool.type, pool.path)
        if request.linked:
            source = replace(source, unlinkable=self._unlinkable(pool, source))
        if isinstance(pool, DevicePool):
            taken = t.cast(t.Set[str], self.told.get("names", set()))
            facts = replace(facts, granularity=pool.granularity, next_name=pool.next_name(taken))
            return self._with_user(Facts(facts, source, self._target_device(pool, name, source), name, self.check_mode))
        if isinstance(pool, RemotePool):
            facts = replace(facts, remote=True)
            return self._with_user(Facts(facts, source, self._target_elsewhere(pool, name, source), name, self.check_mode))
        label = _default_label(pool.path_of(name))
        return self._with_user(
            Facts(facts, source, self._target(pool, name, source), name, self.check_mode, default_label=label)
        )

    def _unlinkable(self, pool: DirectoryPool, source: SourceFacts) -> str:
        if source.pending == "decompressed":
            return "it is compressed, and what is inside is there only while it is cloned"
        source_pool = self._pools.get(self.request.effective_source_pool) if self.request.source is not None else None
        if isinstance(pool, DevicePool):
            if self.request.source is not None and source_pool is None:
                # A check run, in which an earlier task makes it.
                return ""
            return pool.cannot_link(source_pool)
        return "it is a volume on the network" if isinstance(source_pool, NetworkPool) else ""

    def _with_user(self, facts: Facts) -> Facts:
        stated = self.request.backing_path
        is_source = stated is None or os.path.realpath(stated) == os.path.realpath(facts.source.key)
        return replace(facts, uid=os.geteuid(), gid=os.getegid(), groups=tuple(os.getgroups()), backing_is_source=is_source)

    def _source(self) -> SourceFacts:
        request = self.request
        if request.blank:
            return SourceFacts("nothing", "")
        if request.outside.url is not None:
            url = shown(request.outside.url)
            return self._from_outside(SourceFacts(f"source_url {url!r}", url, pending="fetched"), "")
        if request.source_path is not None:
            path = os.path.realpath(request.source_path)
            what = (
                f"source_path {request.source_path!r}" if request.source_url is None else f"source_url {request.source_url!r}"
            )
            facts = SourceFacts(what, request.source_path, key=self._key_of(path))
            if not self._missing and not self._inside(path):
                facts = replace(facts, outside=os.path.dirname(path))
            facts = self._look_outside(facts, path)
            return self._from_outside(facts, path) if facts.pending else self._open_source(facts, path, None)
        name, pool_name = t.cast(str, request.source), request.effective_source_pool
        facts = SourceFacts(f"volume {name!r} of pool {pool_name!r}", name, pool_name, name)
        pool = self._pools.get(pool_name)
        if pool is None:
            return replace(facts, gone=self._missing[pool_name])
        if isinstance(pool, DevicePool):
            return self._source_device(facts, pool)
        if isinstance(pool, RemotePool):
            return self._source_elsewhere(replace(facts, remote=True), pool)
        facts = replace(facts, path=pool.path_of(name))
        status = pool.lstat(name)
        path = facts.path
        if status is not None and stat.S_ISLNK(status.st_mode):
            path = _real_path(path, facts.what)
            if os.path.lexists(path):
                self._refuse_outside("symbolic_link", path, f"{facts.what} is a symbolic link to {path!r}")
        return self._open_source(replace(facts, key=self._key_of(_real_path(path, facts.what))), path, pool)

    # --- a source from outside ------------------------------------------------------------------------------------------

    @property
    def _root(self) -> Scene:
        return self._first or self

    def _look_outside(self, facts: SourceFacts, path: str) -> SourceFacts:
        """Whether a file of this host has to be decompressed before it is a source, or has to have a checksum."""
        options = self.request.outside
        try:
            fd, block = _open_image(path, facts.what)
        except (FileNotFoundError, CloneError):
            # Whoever opens it as a source says why.
            return facts
        try:
            if intake.compression(options, fd, block, self.request.source_format, facts.what):
                return replace(facts, pending="decompressed", identity=_identity(os.fstat(fd)))
            return replace(facts, claimed=options.checksum is not None)
        finally:
            os.close(fd)

    def _from_outside(self, facts: SourceFacts, path: str) -> SourceFacts:
        """The source as it came in, by the same gate as any other; as it is when it has not."""
        if self._intake is None:
            return facts
        fd = os.dup(self._intake.fd)
        image = self._add_layer(self.layers, fd, facts.what, path, False, self.request.source_format)
        self.layers[0].own = True
        if image.backing is not None:
            raise refusal(
                "backing_file",
                f"{facts.what} has the backing store {image.backing[:200]!r}: an image from outside stands alone",
            )
        return replace(facts, image=image, pending="", cache=self._intake.cache)

    def _bring(self, facts: Facts) -> Facts:
        """The facts, with the source as it has come in; in a check run they may stay as they are.

        :raises Postponed: before the target is locked
        """
        if not (self.check_mode or self.locked):
            raise Postponed
        root = self._root
        if root._refusal is not None:
            raise root._refusal
        try:
            if not root._asked:
                root._asked = True
                root._take_in(facts.source)
            if root._intake is None:
                return replace(facts, brought=False)
            if root is not self:
                root.told["source"] = root._source()
        except CloneError as exc:
            # The other clones of the task need not ask again.
            root._refusal = exc
            raise
        except OSError as exc:
            root._refusal = from_os_error(exc, f"reading {facts.source.what}")
            raise root._refusal from exc
        return self.gather()

    def _take_in(self, source: SourceFacts) -> None:
        request = self.request
        # An image is not much longer than what is in it: as in space_needed().
        limit = request.max_capacity + request.max_capacity // 8 + (4 << 20)
        terms = intake.Terms(limit, self.deadline, self.rate, self.check_mode)
        with ExitStack() as stack:
            if isinstance(self.pool, (DevicePool, RemotePool)):
                path = os.environ.get("TMPDIR") or "/var/tmp"
                fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                stack.callback(os.close, fd)
                place = intake.Place(fd, f"{path!r} of this host (TMPDIR)", foreign=True)
            else:
                place = intake.Place(self.pool.fd, f"pool {self.pool.name!r}")
            if request.outside.url is not None:
                self._intake, self.intake_warnings[:] = intake.fetched(request.outside, place, terms, source.what)
                return
            fd, block, _version, watch = stack.enter_context(self._file_outside(source))
            kind = intake.compression(request.outside, fd, block, request.source_format, source.what)
            if not self.check_mode:
                self._intake = intake.unpacked(t.cast(str, kind), fd, place, terms, source.what, watch)

    def _checked(self, source: SourceFacts) -> bool:
        """:raises CloneError: ``CHECKSUM_MISMATCH``"""
        root = self._root
        if root._verified != root.layers[0].version:
            with root._file_outside(source) as (_fd, _block, version, _watch):
                root._verified = version
        if root._verified != root.layers[0].version:
            raise CloneError("IN_USE", f"{source.what} was changed after it was looked at")
        return True

    @contextmanager
    def _file_outside(self, source: SourceFacts) -> t.Iterator[t.Tuple[int, bool, t.Tuple[int, ...], t.Callable[[], None]]]:
        """A file of this host, held, that has the checksum which is stated.

        Gives its descriptor, whether it is a device, its version, and what to call while it is read.
        """
        path = t.cast(str, self.request.source_path)
        fd, block = _open_image(os.path.realpath(path), source.what)

        hold: t.Optional[guards.Hold] = None

        def watch() -> None:
            self.deadline.check(f"reading {source.what}")
            if hold is not None:
                hold.check()

        with closing(os.fdopen(fd, "rb")), ExitStack() as stack:
            version = guards.version(fd)
            if not self.check_mode:
                if self.request.source_in_use == "wait":
                    self.deadline.wait_for(lambda: not guards.writers(fd), f"waiting for the writers of {source.what}")
                    version = guards.version(fd)
                hold = stack.enter_context(guards.Hold([(fd, source.what, version)]))
            checksum = intake.resolved(self.request.outside, os.path.basename(path), self.deadline)
            if checksum is not None:
                checksum.expect(intake.hash_of(fd, checksum, watch), source.what)
            yield fd, block, version, watch
            if hold is not None:
                hold.finish()

    def _source_device(self, facts: SourceFacts, pool: DevicePool) -> SourceFacts:
        volume = pool.volume(t.cast(str, facts.name))
        if volume is None:
            return replace(facts, gone=f"{facts.what} does not exist")
        if isinstance(pool, NetworkPool):
            return self._source_network(facts, pool, volume)
        opened = self._open_source(replace(facts, path=volume.path, key=volume.path), os.path.realpath(volume.path), pool)
        self.layers[0].lock, self.layers[0].name = pool.lock_key(volume.name), volume.name
        if device.is_marked(self.layers[0].fd):
            raise CloneError("CORRUPT_IMAGE", f"{facts.what} is not finished: the run that made it was killed")
        return replace(opened, owner=None, fixed=volume.thin_pool is None)

    def _source_network(self, facts: SourceFacts, pool: NetworkPool, volume: Device) -> SourceFacts:
        request = self.request
        if request.source_format not in (None, "raw"):
            raise CloneError(
                "NO_SUPPORT",
                f"source_format: {facts.what}, which is of type {pool.type}, is read as raw, not as {request.source_format}",
            )
        layer = pool.layer(volume)
        image = Image("raw", volume.capacity)
        opened = OpenImage(layer.fd, facts.what, volume.path, image, False, (), pool.lock_key(volume.name), layer.network)
        opened.name = volume.name
        self.layers.append(opened)
        marked = capabilities.of(pool.type).staging == "mark"
        if marked or request.encrypted or request.format not in (None, "raw"):
            # Reading costs a process, so only where it matters what is there.
            head = self._head(layer, facts.what)
            if head == device.MARK:
                raise CloneError("CORRUPT_IMAGE", f"{facts.what} is not finished: the run that made it was killed")
            image = opened.image = probe.read_raw(volume.capacity, (), head)
        self.told["changes"] = pool.changes(volume)
        return replace(
            facts,
            path=volume.path,
            key=volume.path,
            image=image,
            identity=volume.identity,
            below=tuple(above.identity for above in _parents(pool, volume)),
            network=True,
        )

    def _head(self, layer: Layer, what: str) -> bytes:
        """The first block of a volume on the network."""
        fd = memory(bytes(len(device.MARK)))
        try:
            source = replace(layer, offset=0, size=len(device.MARK))
            arguments = qemu_img.fill(source.node, [layer], Layer(fd, "raw"), False, None)
            self.qemu.run(
                arguments, {layer.fd: what, fd: "memory"}, f"reading {what}", lambda: self.deadline.check(f"reading {what}")
            )
            return os.pread(fd, len(device.MARK), 0)
        finally:
            os.close(fd)

    def writers_now(self) -> str:
        """Who has the source open for writing."""
        source = t.cast(SourceFacts, self.told["source"])
        if source.remote:
            return t.cast(RemotePool, self.source_pool).writers_of(source.path)
        for image in self.layers:
            if image.own:
                continue
            pool = self._pools.get(self.request.effective_source_pool)
            on_network = image.network is not None and isinstance(pool, NetworkPool)
            who = t.cast(NetworkPool, pool).users(image.name) if on_network else guards.writers(image.fd)
            if who:
                return who
        return ""

    def source_disturbed(self) -> str:
        """Why a source on the network may have been written to while it was read; empty when nothing is known of that.

        Of a file and of a device, :class:`guards.Hold` tells more.
        """
        pool = self._pools.get(self.request.effective_source_pool)
        if not self.layers or self.layers[0].network is None or not isinstance(pool, NetworkPool):
            return ""
        image = self.layers[0]
        who = pool.users(image.name)
        if who:
            return f"{image.what} was opened for writing by {who} while it was read"
        changed = pool.changes(pool.volume(image.name)) != self.told["changes"]
        return f"{image.what} changed while it was read" if changed else ""

    def _source_elsewhere(self, facts: SourceFacts, pool: RemotePool) -> SourceFacts:
        """A volume on another host: libvirt's word, and the header as libvirt reads it out."""
        volume = pool.volume(t.cast(str, facts.name))
        if volume is None:
            return replace(facts, gone=f"{facts.what} does not exist")
        facts = replace(facts, path=volume.path, key=volume.key, identity=(pool.name, volume.name))
        if volume.stated is None:
            raise t.cast(CloneError, volume.error)
        if volume.type not in ("file", "block"):
            raise CloneError("INVALID_ARG", f"{facts.what} is of type {volume.type}, not a file or block device")
        head = pool.head(
            volume.name, None if self.check_mode else self.deadline.sooner(self.request.lock_timeout, "lock_timeout")
        )
        if remote.is_marked(head):
            raise CloneError("CORRUPT_IMAGE", f"{facts.what} is not finished: the run that uploads it was killed, or goes on")
        stated = volume.stated
        image = _image_elsewhere(volume, stated, head, self.request.source_format, facts.what)
        owner = (stated.owner, stated.group, stated.mode)
        return replace(
            facts,
            image=image,
            block=volume.type == "block",
            below=tuple(self._below_elsewhere(volume, facts.what)),
            owner=t.cast(t.Tuple[int, int, int], owner) if volume.type == "file" and None not in owner else None,
        )

    def _below_elsewhere(self, volume: RemoteVolume, what: str) -> t.List[t.Tuple[str, str]]:
        """Pool and name of all that lies below a volume on another host.

        :raises CloneError: ``UNSAFE_IMAGE`` for what is no volume of the pools that the task names
        """
        found: t.List[t.Tuple[str, str]] = []
        pools = [pool for pool in self._pools.values() if isinstance(pool, RemotePool)]
        while volume.stated is not None and volume.stated.backing_path is not None:
            path = volume.stated.backing_path
            directory, name = os.path.split(path)
            pool = next((pool for pool in pools if os.path.normpath(pool.path) == directory), None)
            above, below = volume, pool.volume(name) if pool else None
            if pool is None or below is None:
                raise refusal(
                    "backing_file",
                    f"{what} has {path!r} below it, which is no volume of the pools of this task; if it is meant, name its pool"
                    " as pool or source_pool",
                )
            if (pool.name, name) in found:
                raise refusal("chain_loop", f"{what} has {path!r} below it twice")
            if len(found) >= MAX_DEPTH:
                raise refusal("chain_depth", f"{what} has more than {MAX_DEPTH} images below it")
            if below.stated is None or (above.stated and below.stated.format != (above.stated.backing_format or "raw")):
                raise refusal(
                    "backing_format", f"{what} has {path!r} below it, recorded with another format than libvirt finds"
                )
            found.append((pool.name, name))
            volume = below
        return found

    def _open_source(self, facts: SourceFacts, path: str, pool: t.Optional[DirectoryPool]) -> SourceFacts:
        try:
            fd, block = self._open_inside(path, facts.what) if pool is not None else _open_image(path, facts.what)
        except FileNotFoundError:
            return replace(facts, gone=f"{facts.what} does not exist")
        except CloneError as exc:
            described = self._described_by_libvirt(facts) if exc.code == "OPERATION_DENIED" else None
            if described is None:
                raise
            return described
        image = self._add_layer(self.layers, fd, facts.what, path, block, self.request.source_format)
        try:
            self._open_chain(self.layers)
        except FileNotFoundError as exc:
            return replace(self._identified(facts), gone=str(exc))
        status = os.fstat(fd)
        return replace(
            self._identified(facts),
            image=image,
            block=block,
            owner=(status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode) & 0o777) if pool else None,
        )

    def _identified(self, facts: SourceFacts) -> SourceFacts:
        identity, *below = (_identity(os.fstat(layer.fd)) for layer in self.layers)
        return replace(facts, identity=identity, below=tuple(below))

    def _described_by_libvirt(self, facts: SourceFacts) -> t.Optional[SourceFacts]:
        """With ``method: libvirt`` a user may clone what he cannot read: libvirt's word has to do."""
        pool = self._pools.get(facts.pool or "")
        if self.request.method != "libvirt" or not isinstance(pool, LibvirtPool):
            return None
        document = pool.volume_xml(t.cast(str, facts.name))
        image = _image_from_xml(document) if document else None
        return replace(facts, image=image, gone="" if image else f"{facts.what} does not exist")

    def _add_layer(
        self, layers: t.List[OpenImage], fd: int, what: str, path: str, block: bool, pinned: t.Optional[str]
    ) -> Image:
        """Read an image's header and append it to ``layers``; the descriptor is closed with them."""
        version = guards.version(fd)
        try:
            image = self._read_image(fd, what, block, pinned)
        except BaseException:
            os.close(fd)
            raise
        layers.append(OpenImage(fd, what, path, image, block, version))
        return image

    def _read_image(self, fd: int, what: str, block: bool, pinned: t.Optional[str]) -> Image:
        size = guards.length(fd)
        found = probe.detect(fd, size)
        # A block device is raw unless somebody says otherwise: its guest writes what it likes at its start.
        image_format = probe.choose_format(found, pinned or ("raw" if block else None), what)
        return self._read_as(image_format, fd, size, found, what)

    def _read_as(self, image_format: str, fd: int, size: int, found: t.Sequence[str], what: str) -> Image:
        if image_format == "raw":
            return probe.read_raw(size, found, os.pread(fd, 8, 0))
        if image_format == "qcow2":
            return probe.read_qcow2(fd, size, what)
        header = foreign.read(fd, size, image_format, what)
        return self.qemu.read(Layer(fd, image_format), header, what, lambda: self.deadline.check(f"reading {what}"))

    def _open_chain(self, layers: t.List[OpenImage]) -> None:
        """Open everything below the last of ``layers``.

        :raises FileNotFoundError: with a sentence, for a backing store that does not exist
        """
        topmost = layers[0]
        seen = {_identity(os.fstat(topmost.fd))}
        while layers[-1].image.backing is not None:
            above = layers[-1]
            if len(layers) > MAX_DEPTH:
                raise refusal("chain_depth", f"{topmost.what} has more than {MAX_DEPTH} images below it")
            path = self._backing_path(above)
            what = f"{path!r}, the backing store of {above.what},"
            try:
                fd, block = self._open_inside(path, what)
            except FileNotFoundError as exc:
                raise FileNotFoundError(f"{what} does not exist") from exc
            try:
                if _identity(os.fstat(fd)) in seen:
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
            seen.add(_identity(os.fstat(fd)))
            image = self._add_layer(layers, fd, what, path, block, recorded or "raw")
            refuse_image(image, what, self.request.max_capacity)
            if image.encrypted:
                raise refusal("encrypted", f"{what} is encrypted, and cannot be read without its secret")

    def target_layers(self, image: Image) -> t.List[Layer]:
        """The target and all that lies below it, opened once; it stays within the pools as a source does."""
        if self.target_device is not None:
            # What a snapshot is of is no image below it.
            return [Layer(self.target_fd, "raw", self.target_network is None, network=self.target_network)]
        if self.target_fd < 0:
            raise CloneError(
                "OPERATION_DENIED", f"the target in pool {self.pool.name!r} cannot be opened by this user; use become"
            )
        block = self.target_device is not None
        topmost = OpenImage(self.target_fd, self._target_name(), _path_of(self.target_fd), image, block, ())
        if image.backing is not None and not self.target_below:
            layers = [topmost]
            try:
                self._open_chain(layers)
            except BaseException as exc:
                # A part of the chain must not be taken for all of it.
                _close_all(layers[1:])
                if isinstance(exc, FileNotFoundError):
                    raise CloneError("NO_STORAGE_VOL", str(exc)) from exc
                raise
            self.target_below = layers[1:]
        return [opened.layer for opened in (topmost, *self.target_below)]

    def _target_name(self) -> str:
        return f"volume {os.path.basename(_path_of(self.target_fd))!r} of pool {self.pool.name!r}"

    def _backing_path(self, above: OpenImage) -> str:
        recorded = t.cast(str, above.image.backing)
        head = recorded.split("/", 1)[0]
        if not recorded or "\0" in recorded or ":" in head:
            # qemu takes "nbd:...", "json:..." and the like for protocols.
            raise refusal("backing_file", f"{above.what} refers to {recorded[:200]!r}, which is not followed")
        path = os.path.realpath(os.path.join(os.path.dirname(os.path.realpath(above.path)), recorded))
        self._refuse_outside("backing_file", path, f"{above.what} has the backing store {path!r}")
        return path

    def _inside(self, path: str) -> bool:
        return any(pool.contains(path) for pool in self._pools.values())

    def _key_of(self, path: str) -> str:
        """What libvirt calls the file of this real path: pools may be reached by links, volumes are not."""
        pool = next((pool for pool in self._pools.values() if pool.contains(path)), None)
        return pool.path_of(os.path.basename(path)) if pool else path

    def _open_inside(self, path: str, what: str) -> t.Tuple[int, bool]:
        """Open a file of this real path, which is directly in one of the pools.

        By its name in the directory that is held open: whatever the path has come to mean, nothing else is opened.
        """
        pool = next((pool for pool in self._pools.values() if pool.contains(path)), None)
        if pool is None:
            # A link that leads nowhere, when it was looked at.
            raise FileNotFoundError(path)
        if isinstance(pool, DevicePool):
            return _open_image(path, what)
        name = os.path.basename(path)

        def judge(held: os.stat_result) -> None:
            for _time in range(2):
                # Held by one of two names that was then taken away, it would look like a file that never had another.
                status = pool.lstat(name)
                if status is None or not os.path.samestat(status, held):
                    raise CloneError("IN_USE", f"{what} was replaced while it was looked at")
                self._refuse_hard_link(status, what)

        return _open_image(name, what, pool.fd, judge)

    def _refuse_hard_link(self, status: os.stat_result, what: str) -> None:
        """Refuse a file that has more names than the pools have of it: who put it there may have had it from anywhere."""
        if self._linked_elsewhere(status):
            advice = f"name its directory as source_pool{'' if self.request.source is None else ', or the file as source_path'}"
            raise refusal(
                "hard_link", f"{what} has {status.st_nlink} names, not all in the pools of this task; if it is meant, {advice}"
            )

    def _linked_elsewhere(self, status: os.stat_result) -> bool:
        if not stat.S_ISREG(status.st_mode) or status.st_nlink < 2:
            return False
        pools = [pool for pool in self._pools.values() if not isinstance(pool, (DevicePool, RemotePool))]
        end = time.monotonic() + _MOMENT
        while True:
            begun = time.time_ns()
            before = [os.fstat(pool.fd) for pool in pools]
            names: t.Dict[t.Tuple[t.Any, ...], int] = {}
            for pool, directory in zip(pools, before):
                names.update({(*_identity(directory), name): links for name, links in pool.names_of(status)})
            changes = [directory.st_ctime_ns for directory in before]
            # A name that changes while it is counted would count twice. The kernel's clock for files may lag by 10 ms.
            quiet = changes == [os.fstat(pool.fd).st_ctime_ns for pool in pools] and max(changes, default=0) < begun - _TICK
            if quiet or time.monotonic() > end:
                return not quiet or len(names) < max(status.st_nlink, *names.values(), 0)
            time.sleep(2 * _TICK / 1e9)

    def _refuse_outside(self, check: str, path: str, why: str) -> None:
        if not self._inside(path):
            directory = os.path.dirname(path)
            advice = f"name {directory!r} as source_pool"
            if self.request.source is not None:
                advice = f"state the source as source_path, and {advice}"
            raise refusal(check, f"{why}, outside the pools of this task; if it is meant, {advice}")

    def _target(self, pool: DirectoryPool, name: str, source: SourceFacts) -> TargetFacts:
        status = pool.lstat(name)
        if status is None:
            return TargetFacts()
        followed = status
        if stat.S_ISLNK(status.st_mode):
            try:
                followed = os.stat(name, dir_fd=pool.fd)
            except OSError:
                pass
        facts = TargetFacts(
            identity=_identity(followed),
            obstacle=kind_of(status),
            uid=status.st_uid,
            gid=status.st_gid,
            mode=stat.S_IMODE(status.st_mode) & 0o777,
        )
        if facts.obstacle or facts.identity == source.identity:
            return facts
        what = f"volume {name!r} of pool {pool.name!r}"
        try:
            self.target_fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=pool.fd)
        except FileNotFoundError:
            return TargetFacts()
        except OSError as exc:
            error = from_os_error(exc, f"opening {what}")
            document = pool.volume_xml(name) if self.request.method == "libvirt" and isinstance(pool, LibvirtPool) else None
            if error.code != "OPERATION_DENIED" or document is None:
                raise error from exc
            return replace(facts, image=_image_from_xml(document))
        # The name may have come to mean another file since lstat.
        status = os.fstat(self.target_fd)
        image = self._read_target(what, source)
        on_source, depth = self._below_target(image, source) if image.backing is not None else (False, None)
        return replace(
            facts,
            identity=_identity(status),
            image=image,
            on_source=on_source,
            depth=depth,
            uid=status.st_uid,
            gid=status.st_gid,
            mode=stat.S_IMODE(status.st_mode) & 0o777,
            label=staging.get_label(self.target_fd),
            linked_elsewhere=self._linked_elsewhere(status),
        )

    def _target_device(self, pool: DevicePool, name: str, source: SourceFacts) -> TargetFacts:
        self.target_device = pool.volume(name)
        if self.target_device is None:
            return TargetFacts()
        what = f"volume {name!r} of pool {pool.name!r}"
        self.target_network = None
        if isinstance(pool, NetworkPool):
            return self._target_on_network(pool, self.target_device, source, what)
        try:
            self.target_fd, _block = _open_image(os.path.realpath(self.target_device.path), what)
        except FileNotFoundError:
            if pool.volume(name) is None:
                return TargetFacts()
            raise CloneError("OPERATION_INVALID", f"{what} is not active: there is no {self.target_device.path!r}") from None
        identity = _identity(os.fstat(self.target_fd))
        capacity = self.target_device.sound
        facts = TargetFacts(Image("raw", capacity), identity)
        if identity == source.identity:
            return facts
        image = probe.read_raw(capacity, (), os.pread(self.target_fd, 8, 0))
        volume = self.target_device
        below = pool.below(volume, pool.volumes()) if volume.origin else []
        if below:
            image = replace(image, backing=below[0].path, backing_format="raw")
        return replace(
            facts,
            image=image,
            unfinished=device.is_marked(self.target_fd),
            on_source=bool(below) and _device_identity(below[0].path) == source.identity,
            depth=len(below),
            needs_origin=volume.needs is not None,
        )

    def _target_on_network(self, pool: NetworkPool, volume: Device, source: SourceFacts, what: str) -> TargetFacts:
        layer = pool.layer(volume)
        self.target_fd, self.target_network = layer.fd, layer.network
        image = Image("raw", volume.capacity)
        facts = TargetFacts(image, volume.identity)
        if volume.identity == source.identity:
            return facts
        below = _parents(pool, volume)
        if below:
            image = replace(image, backing=below[0].path, backing_format="raw")
            facts = replace(facts, on_source=below[0].identity == source.identity, depth=len(below))
        marked = capabilities.of(pool.type).staging == "mark"
        if not (marked or self.request.force):
            return replace(facts, image=image)
        head = self._head(layer, what)
        encrypted = probe.read_raw(volume.capacity, (), head).encrypted
        return replace(facts, image=replace(image, encrypted=encrypted), unfinished=marked and head == device.MARK)

    def _target_elsewhere(self, pool: RemotePool, name: str, source: SourceFacts) -> TargetFacts:
        volume = self.target_elsewhere = pool.volume(name)
        if volume is None:
            return TargetFacts()
        stated, what = volume.stated, f"volume {name!r} of pool {pool.name!r}"
        facts = TargetFacts(identity=(pool.name, name), obstacle="a directory" if volume.type == "dir" else None)
        if facts.obstacle or facts.identity == source.identity:
            return facts
        if stated is None:
            error = t.cast(CloneError, volume.error)
            return replace(facts, image=Image("raw", 0, unreadable=error.msg))
        patience = None if self.check_mode else self.deadline.sooner(self.request.lock_timeout, "lock_timeout")
        head = pool.head(name, patience)
        unfinished = remote.is_marked(head)
        empty = not (self.request.blank or stated.capacity) and (source.image is None or source.image.capacity > 0)
        if empty or (unfinished and not head.startswith(remote.mark())):
            raise CloneError(
                "IN_USE",
                f"{what} is {'empty' if empty else 'not finished'}: a run on another host is uploading it, or was killed; if"
                " that run is over, delete the volume (storage_volume with state=absent)",
            )
        image = Image(stated.format or "raw", stated.capacity or 0, stated.backing_path, stated.backing_format)
        try:
            depth: t.Optional[int] = len(self._below_elsewhere(volume, what))
        except CloneError as exc:
            if exc.code != "UNSAFE_IMAGE":
                raise
            depth = None
        return replace(
            facts,
            image=image,
            unfinished=unfinished,
            uid=-1 if stated.owner is None else stated.owner,
            gid=-1 if stated.group is None else stated.group,
            mode=stated.mode or 0,
            on_source=source.remote and stated.backing_path == source.key,
            depth=depth,
        )

    def _below_target(self, image: Image, source: SourceFacts) -> t.Tuple[bool, t.Optional[int]]:
        """Whether the target's backing store is the source, and how many images lie below the target; None if that is not told.

        Nothing is opened where it is: a thousand linked clones of one source are told from their headers.
        """
        on_source = False
        try:
            path = self._backing_path(OpenImage(self.target_fd, "the target", _path_of(self.target_fd), image, False, ()))
            on_source = path == os.path.realpath(source.key)
            if on_source and source.image is not None and source.image.format == (image.backing_format or "raw"):
                return True, len(source.below) + 1
            return on_source, len(self.target_layers(image)) - 1
        except CloneError as exc:
            if exc.code == "TIMEOUT":
                raise
            # It lies outside the pools, is gone, or cannot be read: only who has to read through it minds.
            return on_source, None

    def _read_target(self, what: str, source: SourceFacts) -> Image:
        """A target is read as what was asked for where its bytes allow that."""
        size = guards.length(self.target_fd)
        found = probe.detect(self.target_fd, size)
        wanted = self.request.target_format(source.image)
        if wanted is not None and wanted in found:
            image_format = wanted
        elif wanted == "vpc" and found == ("vpc-footer",):
            image_format = "vpc"
        elif not found or found[0] == "vpc-footer":
            image_format = "raw"
        elif wanted == "raw" and source.image is not None and source.image.format == "raw" and source.image.magic == found[0]:
            # A raw clone of bytes that look like an image, and that the task pinned as raw.
            image_format = "raw"
        else:
            image_format = found[0]
        if wanted not in (None, image_format) and image_format not in ("raw", "qcow2"):
            # It differs already. A guest may have written the magic to its raw disk: no program is let near that.
            return Image(image_format, size)
        try:
            return self._read_as(image_format, self.target_fd, size, found, what)
        except CloneError as exc:
            if exc.code not in ("CORRUPT_IMAGE", "UNSAFE_IMAGE", "NO_SUPPORT", "IO_ERROR"):
                raise
            return Image(image_format, size, unreadable=exc.msg)

    # --- what only some plans need --------------------------------------------------------------------------------------

    def answer(self, asked: Unanswered, facts: Facts) -> Facts:
        """The facts with the one that the planner asked for."""
        if asked.question == "brought":
            return self._bring(facts)
        answers: t.Dict[str, t.Callable[[], t.Any]] = {
            "source_writers": self.writers_now,
            "source_corrupt": lambda: self.source_corrupt() if self.check_mode else "",
            "target_users": lambda: self._target_users(facts),
            "target_dependents": lambda: self._target_dependents(facts),
            "data_beyond": self._data_beyond,
            "content_equal": lambda: self._content_equal(t.cast(Image, facts.target.image)),
            "space_missing": lambda: self._space_missing(t.cast(Create, asked.draft)),
            "unshareable": self._unshareable,
            "checked": lambda: self._checked(facts.source),
            "target_chain": lambda: self._target_chain(t.cast(Image, facts.target.image)),
            "not_growable": lambda: t.cast(DevicePool, self.pool).cannot_grow(t.cast(Device, self.target_device)),
            "room": lambda: t.cast(DevicePool, self.pool).room_for(t.cast(Device, self.target_device)),
            "denied": lambda: self._denied(asked.draft),
        }
        if asked.question in _OF_THE_SOURCE:
            if asked.question not in self.told:
                self.told[asked.question] = answers[asked.question]()
            return replace(facts, **{asked.question: self.told[asked.question]})
        return replace(facts, **{asked.question: answers[asked.question]()})

    def _target_chain(self, image: Image) -> bool:
        """The chain is where it may be. To be flattened, it becomes the source."""
        if self.target_elsewhere is not None:
            self._below_elsewhere(self.target_elsewhere, f"volume {self.target_elsewhere.name!r}")
            return True
        topmost, *_below = self.target_layers(image)
        if self.request.flatten:
            # The same open file, so that we do not take ourselves for another user of it.
            what, path = self._target_name(), _path_of(topmost.fd)
            fd = os.dup(topmost.fd)
            self.layers[:] = [OpenImage(fd, what, path, image, False, guards.version(fd)), *self.target_below]
            self.target_below = []
        return True

    def source_corrupt(self) -> str:
        """What ``qemu-img check`` says of the first image that is not sound. Leaked clusters (status 3) are no damage.

        A run asks beside its work, before anything is published.
        """
        for image in self.layers:
            # An encrypted image cannot be checked without its key.
            if image.image.format in probe.CHECKABLE and not image.image.encrypted:
                arguments = qemu_img.check(image.layer)
                doing = f"checking {image.what}"
                status = self.qemu.run(arguments, {image.fd: image.what}, doing, self._watch, quick=True, accept=(0, 2, 3))[0]
                if status == 2:
                    return f"{image.what} is corrupt: qemu-img check finds errors in it [qemu_check]"
        return ""

    def _target_users(self, facts: Facts) -> str:
        if self.target_elsewhere is not None:
            return self.pool.users_of(self.target_elsewhere.path)
        return self._users_now(facts.name) if self.target_fd >= 0 else ""

    def _target_dependents(self, facts: Facts) -> Dependents:
        """One look at all volumes serves all clones of a task; it is taken anew with each look at their source."""
        if isinstance(self.pool, DevicePool):
            return Dependents(tuple(self.pool.dependents(facts.name)))
        if "inventory" not in self.told:
            with closing(Inventory(self.request.uri, self.request.pool, "", self.deadline)) as inventory:
                inventory.open_pool()
                inventory.scan()
                self.told["inventory"] = inventory, inventory.dependents()
        inventory, dependents = self.told["inventory"]
        directory = os.fstat(self.pool.fd)
        key = ((directory.st_dev, directory.st_ino), facts.name)
        untold = [*inventory.untold(key), *(f"pool {name!r}" for name in inventory.unseen)]
        return Dependents(tuple(sorted(map(inventory.call, dependents.get(key, ())))), tuple(untold))

    def _users_now(self, name: str) -> str:
        """Who uses the open target; outside check mode, somebody who lets go of it within a moment does not count."""
        end = time.monotonic() + (_LONG_MOMENT if self.locked else _MOMENT)
        if isinstance(self.pool, NetworkPool):
            return self.pool.users(name)
        who = guards.users(self.target_fd)
        while who and not self.check_mode and time.monotonic() < end:
            time.sleep(0.05)
            who = guards.users(self.target_fd)
        return who or self.pool.users_of(self.pool.path_of(name))

    def _data_beyond(self) -> int:
        topmost = self.layers[0]
        start, end = t.cast(int, self.request.capacity), topmost.image.capacity
        if topmost.network is not None:
            # From the start of a sector on: maybe refused for what would be kept, never cut off.
            start = start // probe.SECTOR * probe.SECTOR
            tail = replace(topmost.layer, offset=start, size=end - start)
            return self._first_data(tail, end - start, start)
        return next((at for at, _data in file_copy.nonzero_data(topmost.fd, start, end, self._watch)), -1)

    def _first_data(self, layer: Layer, length: int, start: int) -> int:
        """Offset of the first that is not zero in a part of a volume on the network, -1 for none."""
        nothing = {"driver": "raw", "file": {"driver": "null-co", "size": length, "read-zeroes": True}}
        arguments = qemu_img.compare_nodes(layer.node, nothing, [layer])
        what = self.layers[0].what
        status, out = self.qemu.run(arguments, {layer.fd: what}, f"looking at {what}", self._watch, accept=(0, 1))
        found = re.search("offset ([0-9]+)", out)
        return -1 if status == 0 else start + (int(found.group(1)) if found else 0)

    def _content_equal(self, target: Image) -> bool:
        names = {image.fd: image.what for image in self.layers}
        names[self.target_fd] = "the target"
        target_layers = self.target_layers(target)
        names.update({image.fd: image.what for image in self.target_below})
        arguments = qemu_img.compare([image.layer for image in self.layers], target_layers)
        return self.qemu.run(arguments, names, f"comparing with {self.layers[0].what}", self._watch, accept=(0, 1))[0] == 0

    def _watch(self) -> None:
        self.deadline.check(f"looking at {self.layers[0].what}")

    def space_needed(self, step: Create) -> int:
        """Bytes that the new volume takes where nothing is shared with the source.

        An estimate from above where the pool has that much to spare. If not, a raw source is read to count what is not zeros,
        which is all that a copy or conversion writes; for others qemu-img measures what is allocated.
        """
        if step.preallocation in ("falloc", "full"):
            return step.capacity
        if step.backing is not None and step.qcow2 is None:
            return 0
        if step.backing is not None and step.qcow2 is not None:
            # Three clusters of tables, and an L1 table: 8 bytes for each cluster full of entries of 8 bytes.
            return 4 * step.qcow2.cluster_size + step.capacity // (step.qcow2.cluster_size**2 // 8) * 8
        if not self.layers:
            return 0
        topmost = self.layers[0]
        available = self.pool.available()
        if topmost.network is None and (topmost.image.format == "raw" or step.route == "copy"):
            end = guards.length(topmost.fd)
            if topmost.image.format == "raw":
                end = min(end, step.capacity)
            allocated = file_copy.allocated_size(topmost.fd, end)
            return allocated if allocated <= available else file_copy.data_size(topmost.fd, end, self._watch)
        # Metadata of no format takes more than this share; a pool with so much to spare needs no measuring.
        ceiling = step.capacity + step.capacity // 8 + (4 << 20)
        if available >= ceiling:
            return ceiling
        if step.format not in ("raw", "qcow2"):
            return sum(file_copy.allocated_size(image.fd, guards.length(image.fd)) for image in self.layers)
        # For raw it would answer with the capacity, so a qcow2 image of the same data stands in.
        options = qemu_img.creation_options(step.format, step.qcow2, step.preallocation)
        arguments = qemu_img.measure([image.layer for image in self.layers], "qcow2", options)
        names = {image.fd: image.what for image in self.layers}
        out = self.qemu.run(arguments, names, f"measuring {self.layers[0].what}", self._watch)[1]
        return int(json.loads(out)["required"])

    def _space_missing(self, step: Create) -> int:
        reserved = t.cast(int, self.told.get("reserved", 0))
        return max(self._space_taken(step) + reserved - self.pool.available(), 0)

    def _space_taken(self, step: Create) -> int:
        if isinstance(self.pool, DevicePool) and not isinstance(self.pool, RbdPool):
            thin = step.route == "link" and not t.cast(SourceFacts, self.told["source"]).fixed
            return 0 if thin else self.pool.space_for(step.capacity, self.target_device)
        if step.route == "libvirt" or (step.route not in ("blank", "link") and step.unshared is None):
            return 0
        if (
            step.backing is None
            and kind(step) in self.told.get("kinds", ())
            and not self.request.own_blocks
            and self._may_share()
        ):
            # It will share the blocks of the one before.
            return 0
        if step not in self.told:
            self.told[step] = self.space_needed(step)
        return t.cast(int, self.told[step])

    def reserve(self, step: Create, name: str) -> None:
        """What this one takes is not there for the next clone of the same source."""
        self.name_taken(name)
        self.told["reserved"] = self.told.get("reserved", 0) + self._space_taken(step)
        self.told.setdefault("kinds", set()).add(kind(step))

    def name_taken(self, name: str) -> None:
        """Another clone of the same task will have it."""
        self.told.setdefault("names", set()).add(name)

    def _may_share(self) -> bool:
        return not isinstance(self.pool, RemotePool) and guards.file_system(self.pool.fd) not in _NEVER_SHARE

    def _unshareable(self) -> str:
        """Why source and target cannot share blocks; empty where they may: only trying it, with the staged file, tells."""
        if isinstance(self.pool, RemotePool):
            return f"pool {self.pool.name!r} is on another host"
        if not self.layers:
            return "there is no source"
        if isinstance(self.pool, DevicePool):
            return f"the target is a volume of a {self.pool.type} pool"
        source, target = self.layers[0].fd, self.pool.fd
        if self.layers[0].network is not None:
            return "the source is on the network"
        if self.layers[0].block:
            return "the source is a block device"
        file_system = guards.file_system(source)
        if file_system != guards.file_system(target) or (
            file_system != _BTRFS and os.fstat(source).st_dev != os.fstat(target).st_dev
        ):
            return "source and target are on different file systems"
        return "" if self._may_share() else "the file system cannot share blocks"

    def _denied(self, draft: t.Optional[Create]) -> str:
        """``draft``: the step, when it is the only one; libvirt itself may be let do what this user may not."""
        denied = self.pool.denied()
        by_libvirt = draft is not None and draft.route == "libvirt"
        if not denied and isinstance(self.pool, LibvirtPool) and not by_libvirt:
            denied = self.pool.cannot_write()
        if not denied and draft is None and self.target_fd < 0 and not isinstance(self.pool, RemotePool):
            denied = f"pool {self.pool.name!r}: this user cannot open the volume; use become"
        return denied

    def volume_elsewhere(self, name: str) -> t.Optional[RemoteVolume]:
        """The target as it is now, where it is on another host."""
        pool = self._pools.get(self.request.pool)
        return pool.volume(name) if isinstance(pool, RemotePool) else None

    def target_in_use(self, name: str) -> str:
        """Who uses the target now, or that it is another file by now; empty for neither."""
        if self.target_elsewhere is not None:
            who = self.pool.users_of(self.target_elsewhere.path)
            return f"it is open by {who}" if who else ""
        if self.target_device is not None:
            who = self._users_now(name)
            return f"it is open by {who}" if who else ""
        status = self.pool.lstat(name)
        if status is None or not os.path.samestat(status, os.fstat(self.target_fd)):
            return "another file has its name by now"
        who = self._users_now(name)
        return f"it is open by {who}" if who else ""


def _device_identity(path: str) -> t.Optional[t.Tuple[int, ...]]:
    number = device_number(path)
    return None if number is None else (number,)


def _parents(pool: NetworkPool, volume: Device) -> t.List[Device]:
    """What lies below a volume on the network, the nearest first."""
    return list(pool.parents(volume)) if isinstance(pool, RbdPool) and isinstance(volume, RbdImage) else []


def _close_all(opened: t.List[OpenImage]) -> None:
    while opened:
        os.close(opened.pop().fd)


def _open_image(
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


def _real_path(path: str, what: str) -> str:
    try:
        return os.path.realpath(path)
    except OSError as exc:
        # It was a link when it was looked at, and then was none.
        raise CloneError("IN_USE", f"{what} was replaced while it was looked at") from exc


def _path_of(fd: int) -> str:
    """Where an open file is now, all links resolved."""
    return os.readlink(f"/proc/self/fd/{fd}")


def _identity(status: os.stat_result) -> t.Tuple[int, ...]:
    return (status.st_rdev,) if stat.S_ISBLK(status.st_mode) else (status.st_dev, status.st_ino)


def _image_elsewhere(volume: RemoteVolume, stated: _xml.VolumeXML, head: bytes, pinned: t.Optional[str], what: str) -> Image:
    """What the header says, which has to be what libvirt says: by that its clone call reads the volume.

    :raises CloneError: ``NO_SUPPORT`` where the task states another format, ``UNSAFE_IMAGE`` where the two disagree
    """
    told = stated.format or "raw"
    if pinned not in (None, told):
        raise CloneError(
            "NO_SUPPORT", f"source_format: {what} is {told} for libvirt, which cannot be told to read it as {pinned}"
        )
    if volume.type == "block":
        return Image("raw", stated.capacity or 0)
    fd = os.memfd_create("head", os.MFD_CLOEXEC)
    try:
        os.write(fd, head)
        size = volume.physical or len(head)
        found = [name for name in probe.detect(fd, len(head)) if name != "vpc-footer"]
        if told != "raw" or not pinned:
            read_as = probe.choose_format(found, None, what)
            if head and read_as != told:
                raise refusal("two_formats", f"{what} is {told} for libvirt, but begins as {read_as}; refresh its pool")
        if told == "qcow2" and head:
            image = probe.read_qcow2(fd, size, what)
            if (image.backing is None) != (stated.backing_path is None):
                raise refusal("backing_file", f"{what} has another backing store than libvirt knows of; refresh its pool")
            return replace(image, backing=stated.backing_path, backing_format=stated.backing_format)
        if told == "raw":
            return replace(probe.read_raw(size, found, head), capacity=stated.capacity or 0)
        os.ftruncate(fd, size)
        try:
            foreign.read(fd, size, told, what)
        except CloneError as exc:
            # Only the beginning is here, so what it refers to within itself may be missing.
            if exc.code == "UNSAFE_IMAGE":
                raise
    finally:
        os.close(fd)
    return Image(told, stated.capacity or 0, stated.backing_path, stated.backing_format)


def _image_from_xml(document: str) -> Image:
    described = _xml.parse_volume(document)
    return Image(described.format or "raw", described.capacity or 0, described.backing_path, described.backing_format)


def _default_label(path: str) -> t.Optional[str]:
    """The SELinux policy's context for a file at this path, None where SELinux is off or not there."""
    try:
        from ansible.module_utils.compat import selinux  # pylint: disable=import-outside-toplevel
    except ImportError:
        return None
    if not selinux.is_selinux_enabled():
        return None
    result, context = selinux.matchpathcon(path, stat.S_IFREG)
    return context if result == 0 else None
