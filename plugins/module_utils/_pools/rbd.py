# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Images of a Ceph pool, which libvirt calls an rbd pool.

Monitors, user and key are those of libvirt's pool and its secret, as libvirt itself reads no ceph.conf for a pool. They are
given to librbd and to qemu-img as a ceph.conf in memory, so that the key stands on no command line and in no file. Images are
made, renamed, grown and linked by a process that can be ended, :mod:`.rbd_child`.
"""

from __future__ import annotations

import errno
import hashlib
import inspect
import json
import os
import re
import sys
import time
import typing as t
from contextlib import contextmanager
from dataclasses import dataclass

from .. import _process
from .._deadline import Deadline
from .._errors import CloneError
from .._images.qemu_img import Layer
from .._names import is_staged_name
from .._transfer import locks
from . import rbd_child
from .devices import ENDLESS, Device
from .network import NetworkPool, as_base64, memory

#: A snapshot that linked clones are made from. Ours alone: no other is ever removed.
_BASE = re.compile("virtforge-base-([0-9]+)")
# As libvirt has them (storage_backend_rbd.c): without the first two a client with a wrong key would try for five minutes.
_PATIENCE = {"client mount timeout": "30", "rados mon op timeout": "30"}
# Not for qemu-img: data may have to wait for longer, while the cluster repairs itself.
_OSD_PATIENCE = {"rados osd op timeout": "30"}
# Seconds for cleaning up after a cluster that does not answer; the next run sweeps what is left.
_CLEANING = 5.0
# Seconds for which a client may have an image open without being taken for a user of it.
_MOMENT = 3.0
# Seconds after which an unfinished image of another host, which no client has open, is nobody's.
_ABANDONED = 3600


@dataclass(frozen=True)
class Parent:
    """What an image is a linked clone of."""

    pool: str
    namespace: str
    image: str
    snapshot: str

    @property
    def place(self) -> t.Tuple[str, str]:
        return self.pool, self.namespace


@dataclass(frozen=True)
class RbdImage(Device):
    parent: t.Optional[Parent] = None
    layering: bool = True
    fast_diff: bool = False
    #: seconds since 1970, by the clock of the cluster
    created: float = 0.0
    modified: float = 0.0


@dataclass(frozen=True)
class Snapshot:
    id: int
    name: str
    size: int

    @property
    def ours(self) -> bool:
        return _BASE.fullmatch(self.name) is not None


class RbdPool(NetworkPool):
    """``place`` is a pool of Ceph and a namespace in it."""

    secret_type = 2  # VIR_SECRET_USAGE_TYPE_CEPH
    refuses_dependents = True
    _child: t.Optional[_process.Child] = None

    def close(self) -> None:
        if self._child is not None:
            self._child.close()
            self._child = None

    @property
    def place(self) -> t.Tuple[str, str]:
        pool, _slash, namespace = (self.access.name or self.name).partition("/")
        return pool, namespace

    @property
    def storage(self) -> str:
        return self.access.name or self.name

    def path_of(self, name: str) -> str:
        return f"{self.access.name or self.name}/{name}"

    def volume(self, name: str) -> t.Optional[RbdImage]:
        return self._image(self.place, name)

    def _names(self) -> t.List[str]:
        """libvirt learns of what others made only when it looks again."""
        names = self._ask(f"listing the volumes of pool {self.name!r}", "names", self.place)
        return [name for name in names if not is_staged_name(name)]

    def below(self, volume: Device, volumes: t.Sequence[Device]) -> t.List[Device]:
        return list(self.parents(t.cast(RbdImage, volume)))

    def available(self) -> int:
        """As libvirt has it, but now: it asks when it looks at all of the pool."""
        return t.cast(int, self._ask(f"looking at pool {self.name!r}", "available"))

    def allocation(self, volume: Device) -> int:
        """As libvirt does: asked only where Ceph has it counted."""
        if not t.cast(RbdImage, volume).fast_diff:
            return volume.capacity
        doing = f"looking at volume {volume.name!r} of pool {self.name!r}"
        return t.cast(int, self._ask(doing, "used", self.place, volume.name))

    def layer(self, volume: Device) -> Layer:
        fd = self._configuration({})
        pool, namespace = self.place
        node = {"driver": "rbd", "pool": pool, "image": volume.name, "conf": f"/proc/self/fd/{fd}"}
        if namespace:
            node["namespace"] = namespace
        if self.access.user:
            node["user"] = self.access.user
        return Layer(fd, "raw", network=node)

    def users(self, name: str) -> str:
        """Clients that watch it: whoever opens an image for writing does, on whatever host; 30 s longer if it is killed.

        libvirt does so for a moment when it refreshes the pool, and another run when it makes a snapshot: they do not count.
        """
        return self._clients([name], "watchers")[name]

    def users_by_name(self, volumes: t.Sequence[Device]) -> t.Dict[str, t.List[str]]:
        users = self._clients([volume.name for volume in volumes], "watchers")
        return {name: [who] if who else [] for name, who in users.items()}

    def writers(self, name: str) -> str:
        """Clients that may be writing to it, as opposed to those that qemu-img reads a source by, which watch it too.

        With exclusive-lock, which all images have by default, who writes has the image's lock; without, whoever watches counts.
        """
        return self._clients([name], "writers")[name]

    def _clients(self, names: t.Sequence[str], which: str) -> t.Dict[str, str]:
        """Of each name; who lets go of them all within one moment does not count."""
        paths = {name: self.path_of(name) for name in names}
        hosts, writing = self.access.hosts, which == "writers"
        found = self._connection.users_of_network("rbd", paths, hosts, self.name, writing)
        watchers = {name: self._watchers(name, which) for name in names if not found[name]}
        end = time.monotonic() + _MOMENT
        while any(watchers.values()) and time.monotonic() < end:
            time.sleep(0.1)
            watchers = {name: self._watchers(name, which) for name, before in watchers.items() if before}
        found.update({name: f"the client of Ceph at {', '.join(some[:3])}" for name, some in watchers.items() if some})
        return found

    def changes(self, volume: t.Optional[Device]) -> t.Tuple[str, ...]:
        """Ceph notes the time of a change once a minute (rbd_mtime_update_interval); in between, only watchers tell."""
        return (*volume.identity, str(volume.capacity), str(volume.modified)) if isinstance(volume, RbdImage) else ()

    def _watchers(self, name: str, which: str = "watchers") -> t.List[str]:
        doing = f"looking at volume {name!r} of pool {self.name!r}"
        try:
            return t.cast(t.List[str], self._ask(doing, which, self.place, name))
        except FileNotFoundError:
            return []

    def dependents(self, name: str) -> t.List[str]:
        """Linked clones of it, and snapshots that others have made: with any of them it cannot go."""
        doing = f"looking for what depends on volume {name!r} of pool {self.name!r}"
        try:
            children = self._ask(doing, "children", self.place, name, None)
        except FileNotFoundError:
            return []
        foreign = [f"{name}@{snapshot.name}" for snapshot in self._snapshots(self.place, name) if not snapshot.ours]
        # Unfinished ones are not counted: they are swept, or wait for us.
        return sorted([self._call(*child) for child in children if not is_staged_name(child[2])] + foreign)

    def _call(self, pool: str, namespace: str, image: str) -> str:
        """What an image is called here."""
        return image if (pool, namespace) == self.place else "/".join((*filter(None, (pool, namespace)), image))

    # --- new images -------------------------------------------------------------------------------------------------------

    @contextmanager
    def staged(self, capacity: int, like: t.Optional[Device]) -> t.Iterator[RbdImage]:
        doing = f"making an image in pool {self.name!r}"

        def make(name: str) -> None:
            self._ask(doing, "create", self.place, name, capacity)

        with self._staged(make, capacity) as image:
            yield image

    @contextmanager
    def staged_link(self, capacity: int, source: RbdPool, name: str) -> t.Iterator[RbdImage]:
        """A linked clone of a volume of ``source``, a pool of the same cluster."""

        def make(staged: str) -> None:
            if self._link(source, name, staged) != capacity:
                self.grow(Device(staged, self.path_of(staged), 0), capacity)

        with self._staged(make, capacity) as image:
            yield image

    @contextmanager
    def _staged(self, make: t.Callable[[str], None], capacity: int) -> t.Iterator[RbdImage]:
        """A new image under a name that the next run knows as unfinished; it goes where it was not published."""
        self._sweep()
        name = self._unfinished_name()
        with locks.Locks([], [self.lock_key(name)], Deadline(60, "lock_timeout"), "making an RBD image"):
            try:
                make(name)
                yield RbdImage(name, self.path_of(name), capacity)
            except BaseException:
                self._clean_up(name)
                raise

    def _clean_up(self, name: str) -> None:
        """As far as the cluster answers soon. A client that was ended is a watcher for a while: the next run tries again."""
        before = self.deadline
        try:
            self.deadline = Deadline(_CLEANING, "timeout")
            self.remove(name)
        except (CloneError, FileNotFoundError):
            pass
        finally:
            self.deadline = before

    def _sweep(self) -> None:
        """Delete what dead runs have left unfinished.

        One of this host's is dead when its lock is free. Another host's, or one from before a reboot, cannot be told to be so:
        while it is filled, who fills it is a watcher; what nobody has open, and is an hour old, is taken to be abandoned.
        """
        for name in self._ask(f"listing pool {self.name!r}", "names", self.place):
            if not is_staged_name(name) or self._watchers(name):
                continue
            if not name.startswith(self._unfinished):
                image = self.volume(name)
                if image is not None and time.time() - image.created > _ABANDONED:
                    self._clean_up(name)
                continue
            try:
                with locks.Locks([], [self.lock_key(name)], Deadline(0, "lock_timeout"), ""):
                    self._clean_up(name)
            except CloneError:
                continue

    @property
    def _unfinished(self) -> str:
        return f".virtforge-{_this_host()}"

    def _rename(self, name: str, other: str) -> None:
        self._ask(f"naming the image {other!r} of pool {self.name!r}", "rename", self.place, name, other)

    def room_for(self, volume: Device) -> int:
        """What is added takes no space before it is written to."""
        return ENDLESS

    def grow(self, device: Device, capacity: int) -> None:
        """What is added reads as zeros."""
        doing = f"growing volume {device.name!r} of pool {self.name!r}"
        self._ask(doing, "resize", self.place, device.name, capacity)

    def zeroed(self, device: Device) -> None:
        """There is nothing to be noted."""

    def remove(self, name: str) -> None:
        """Delete an image, with the snapshots that we have made of it, and the one of its parent that it was the last child of.

        :raises CloneError: ``OPERATION_INVALID`` for one that has other snapshots, or linked clones
        """
        what = f"volume {name!r} of pool {self.name!r}"
        image = self.volume(name)
        if image is None:
            raise CloneError("NO_STORAGE_VOL", f"{what} does not exist")
        snapshots = self._snapshots(self.place, name)
        foreign = ", ".join(repr(snapshot.name) for snapshot in snapshots if not snapshot.ours)
        if foreign:
            raise CloneError("OPERATION_INVALID", f"{what} cannot be deleted: it has snapshots, {foreign}; delete them first")
        for snapshot in snapshots:
            if not self._drop(self.place, name, snapshot.name):
                raise CloneError("OPERATION_INVALID", f"{what} cannot be deleted: linked clones depend on it")
        self._ask(f"deleting {what}", "remove", self.place, name)
        self._release(image.parent)

    # --- linked clones ----------------------------------------------------------------------------------------------------

    def cannot_link(self, source: t.Optional[t.Any], name: t.Optional[str]) -> str:
        if not isinstance(source, RbdPool):
            return "it is no volume of an rbd pool"
        if not {host for host, _port in self.access.hosts} & {host for host, _port in source.access.hosts}:
            monitors = [host for host, _port in (*self.access.hosts, *source.access.hosts)]
            return f"the two pools name none of the same monitors ({', '.join(monitors)})"
        image = source.volume(name) if name else None
        return "it was made without RBD's feature layering" if image and not image.layering else ""

    def parents(self, image: t.Optional[RbdImage]) -> t.List[RbdImage]:
        """All that lies below an image, the nearest first."""
        found: t.List[RbdImage] = []
        while image is not None and image.parent is not None and len(found) < 64:
            image = self._image(image.parent.place, image.parent.image)
            if image is not None:
                found.append(image)
        return found

    def _link(self, source: RbdPool, name: str, staged: str) -> int:
        """Make a linked clone; the capacity that it has.

        Which of its two kinds of clones Ceph makes is its own setting (rbd_default_clone_format).

        So the snapshot is protected, which the older kind needs and the newer does not mind. As long as there are children of
        the older kind it can neither be unprotected nor removed; removed under one of the newer kind, it stays in the trash.
        """
        doing = f"making a linked clone of volume {name!r} of pool {source.name!r}"
        for last in (False, False, True):
            snapshot, capacity = source._base(name)
            try:
                self._ask(doing, "clone", source.place, name, snapshot, self.place, staged)
                break
            except FileNotFoundError as exc:
                # Another host has removed the last other child, and the snapshot with it.
                if last:
                    raise CloneError("IN_USE", f"{doing} failed: {exc.strerror}") from exc
        return capacity

    def _base(self, name: str) -> t.Tuple[str, int]:
        """A protected snapshot of ours that reads as the volume does now, made unless there is one: name and capacity.

        As libvirt's own clone does it (virStorageBackendRBDCloneImage): with fast-diff a look at a map, else at each object.
        """
        doing = f"making a snapshot of volume {name!r} of pool {self.name!r}"
        image = self.volume(name)
        if image is None:
            raise CloneError("NO_STORAGE_VOL", f"volume {name!r} of pool {self.name!r} does not exist")
        ours = [snapshot for snapshot in self._snapshots(self.place, name) if snapshot.ours]
        newest = max(ours, key=lambda snapshot: snapshot.id) if ours else None
        same = newest is not None and newest.size == image.capacity
        if newest is not None and same and not self._ask(doing, "changed_since", self.place, name, newest.name):
            self._ask(doing, "protect", self.place, name, newest.name)
            return newest.name, newest.size
        numbers = [int(t.cast(t.Any, _BASE.fullmatch(snapshot.name)).group(1)) for snapshot in ours]
        made = f"virtforge-base-{max(numbers, default=0) + 1}"
        try:
            self._ask(doing, "snap", self.place, name, made)
        except FileExistsError:
            # Another host has just made it, of the same data: nobody is writing to the source.
            pass
        self._ask(doing, "protect", self.place, name, made)
        for snapshot in ours:
            self._release(Parent(*self.place, name, snapshot.name))
        return made, image.capacity

    def flatten(self, name: str) -> None:
        image = self.volume(name)
        doing = f"flattening volume {name!r} of pool {self.name!r}"
        self._ask(doing, "flatten", self.place, name)
        self._release(image.parent if image else None)

    def _release(self, parent: t.Optional[Parent]) -> None:
        """Remove a snapshot of ours when its last child is gone."""
        if parent is None or _BASE.fullmatch(parent.snapshot) is None:
            return
        doing = f"removing a snapshot of image {parent.image!r}"
        try:
            if not self._ask(doing, "children", parent.place, parent.image, parent.snapshot):
                self._drop(parent.place, parent.image, parent.snapshot)
        except FileNotFoundError:
            return

    def _drop(self, place: t.Tuple[str, str], name: str, snapshot: str) -> bool:
        """Whether the snapshot is gone: it is not while there are children."""
        try:
            self._ask(f"removing a snapshot of image {name!r}", "drop", place, name, snapshot)
        except FileNotFoundError:
            pass
        except CloneError as exc:
            if exc.code != "IN_USE":
                raise
            return False
        return True

    # --- the child --------------------------------------------------------------------------------------------------------

    def _image(self, place: t.Tuple[str, str], name: str) -> t.Optional[RbdImage]:
        doing = f"looking at volume {name!r} of pool {self.name!r}"
        if "@" in name:
            raise CloneError("INVALID_ARG", f"name: {name!r} contains '@'; no volume of an rbd pool can have that name")
        try:
            found = self._ask(doing, "info", place, name)
        except FileNotFoundError:
            return None
        return RbdImage(
            name,
            "/".join((*filter(None, place), name)),
            found["size"],
            # Two pools of libvirt may be the same of Ceph, by other names of its monitors.
            identity=("rbd", *place, found["id"], str(found["created"])),
            parent=Parent(*found["parent"]) if found["parent"] else None,
            layering=found["layering"],
            fast_diff=found["fast_diff"],
            created=found["created"],
            modified=found["modified"],
        )

    def _snapshots(self, place: t.Tuple[str, str], name: str) -> t.List[Snapshot]:
        doing = f"looking at volume {name!r} of pool {self.name!r}"
        return [Snapshot(**one) for one in self._ask(doing, "snapshots", place, name)]

    def _configuration(self, more: t.Mapping[str, str]) -> int:
        """A ceph.conf in memory."""
        access = self.access
        monitors = [(f"[{host}]" if ":" in host else host) + (f":{port}" if port else "") for host, port in access.hosts]
        auth = "cephx" if access.user else "none"
        settings = {**_PATIENCE, **more, "mon host": ",".join(monitors), "auth client required": auth}
        settings.update(access.options)
        if access.user:
            settings["key"] = as_base64(self.key()).decode()
        lines = []
        for name, value in settings.items():
            if re.search("[\\0-\x1f]", name + value) or re.search("[=#;\\[]", name):
                raise CloneError("CONFIG_UNSUPPORTED", f"pool {self.name!r}: its setting {name!r} cannot be given to Ceph")
            quoted = value.replace("\\", "\\\\").replace('"', '\\"')
            lines.append(f'{name} = "{quoted}"\n')
        return memory(("[global]\n" + "".join(lines)).encode())

    def _ask(self, doing: str, operation: str, *arguments: t.Any) -> t.Any:
        """What a method of :class:`.rbd_child.Cluster` returns.

        :raises FileNotFoundError: for an image or snapshot that does not exist
        :raises FileExistsError: for one that does
        """
        if self._child is None:
            fd = self._configuration(_OSD_PATIENCE)
            try:
                program = [sys.executable, "-I", "-c", inspect.getsource(rbd_child)]
                self._child = _process.Child([*program, f"/proc/self/fd/{fd}", self.access.user or ""], (fd,))
                # It reads the file before it answers anything, even that it cannot.
                self._answer(doing, "ready")
            finally:
                os.close(fd)
        answer = self._answer(doing, operation, *arguments)
        if "done" not in answer:
            raise self._failure(answer, doing)
        return answer["done"]

    def _answer(self, doing: str, *request: t.Any) -> t.Dict[str, t.Any]:
        deadline, child = self.deadline, t.cast(_process.Child, self._child)
        try:
            line = child.ask(json.dumps(request), lambda: deadline.check(doing))
        except BaseException:
            # It was ended; who asks on, to clean up, gets another.
            self._child = None
            raise
        if not line:
            self._child = None
            raise CloneError("IO_ERROR", f"pool {self.name!r}: {doing} failed: librbd has ended (status {child.close()})")
        return t.cast(t.Dict[str, t.Any], json.loads(line))

    def _failure(self, answer: t.Mapping[str, t.Any], doing: str) -> Exception:
        where = f"pool {self.name!r}"
        if "missing" in answer:
            packages = "rados and rbd (python3-rados and python3-rbd)"
            return CloneError("MISSING_DEPENDENCY", f"{where}: an rbd pool needs the Python packages {packages}")
        if "no_pool" in answer:
            return CloneError("NO_STORAGE_POOL", f"{where}: {doing} failed: Ceph has no pool {answer['no_pool']!r} for it")
        number, text = answer["errno"], answer["text"]
        if not answer["connected"]:
            hosts = ", ".join(host for host, _port in self.access.hosts)
            text = f"no monitor of {hosts} answers, or none takes the key of user {self.access.user!r} ({text})"
            return CloneError("IO_ERROR", f"{where}: {doing} failed: {text}")
        if number == errno.ENOENT:
            return FileNotFoundError(number, text)
        if number == errno.EEXIST:
            return FileExistsError(number, text)
        codes = {
            errno.EBUSY: "IN_USE",
            errno.ENOSPC: "NO_SPACE",
            errno.EDQUOT: "NO_SPACE",
            errno.EPERM: "OPERATION_DENIED",
            errno.EACCES: "OPERATION_DENIED",
            errno.ENOTEMPTY: "OPERATION_INVALID",
        }
        return CloneError(codes.get(number, "IO_ERROR"), f"{where}: {doing} failed: {text}")


def _this_host() -> str:
    """Eight hexadecimal digits that runs have in common which see each other's locks."""
    return hashlib.sha256(locks.domain().encode()).hexdigest()[:8]
