# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The target: what has its name in the pool, what lies below that, and who uses it."""

from __future__ import annotations

import os
import stat
import time
import typing as t
from dataclasses import replace

from .._errors import CloneError, from_os_error
from .._images import probe
from .._images.probe import Image
from .._images.qemu_img import Layer
from .._pools.devices import Device, DevicePool
from .._pools.directory import DirectoryPool, kind_of
from .._pools.libvirt import LibvirtPool, device_number
from .._pools.network import NetworkPool
from .._pools.remote import RemotePool, RemoteVolume
from .._transfer import guards, staging
from . import elsewhere, network
from .files import Files, OpenImage, close_all, identity_of, image_from_xml, open_image, path_of
from .model import SourceFacts, TargetFacts
from .task import Task

# Another run that has just looked, or libvirt refreshing the pool, has the file open for a moment; on a busy host, where many
# runs start at once, for more than one.
_MOMENT, _LONG_MOMENT = 1.0, 4.0


class Target:
    """What exists under the target's name. :meth:`look` opens it, and says what it is."""

    def __init__(self, task: Task, files: Files) -> None:
        self._task = task
        self._files = files
        #: -1 where it is not open
        self.fd = -1
        #: options by which qemu-img reaches it, where it is no file or device of this host; ``fd`` is then its key
        self.network: t.Optional[t.Mapping[str, t.Any]] = None
        #: the volume, where it is a device
        self.device: t.Optional[Device] = None
        #: the volume, where it is on another host
        self.elsewhere: t.Optional[RemoteVolume] = None
        #: what lies below it, once somebody asked
        self.below: t.List[OpenImage] = []

    def close(self) -> None:
        close_all(self.below)
        self.let_go()

    def let_go(self) -> None:
        """Use it no more, but leave open what lies below it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    # --- what it is -------------------------------------------------------------------------------------------------------

    def look(self, pool: DirectoryPool, name: str, source: SourceFacts) -> TargetFacts:
        self.close()
        if isinstance(pool, DevicePool):
            return self._look_at_device(pool, name, source)
        if isinstance(pool, RemotePool):
            self.elsewhere = pool.volume(name)
            found = self.elsewhere
            return TargetFacts() if found is None else elsewhere.look_at_target(self._task, pool, found, source)
        return self._look_at_file(pool, name, source)

    def _look_at_file(self, pool: DirectoryPool, name: str, source: SourceFacts) -> TargetFacts:
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
            identity=identity_of(followed),
            obstacle=kind_of(status),
            uid=status.st_uid,
            gid=status.st_gid,
            mode=stat.S_IMODE(status.st_mode) & 0o777,
        )
        if facts.obstacle or facts.identity == source.identity:
            return facts
        what = f"volume {name!r} of pool {pool.name!r}"
        try:
            self.fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=pool.fd)
        except FileNotFoundError:
            return TargetFacts()
        except OSError as exc:
            error = from_os_error(exc, f"opening {what}")
            by_libvirt = self._task.request.method == "libvirt" and isinstance(pool, LibvirtPool)
            document = t.cast(LibvirtPool, pool).volume_xml(name) if by_libvirt else None
            if error.code != "OPERATION_DENIED" or document is None:
                raise error from exc
            return replace(facts, image=image_from_xml(document))
        # The name may have come to mean another file since lstat.
        status = os.fstat(self.fd)
        image = self._read(what, source)
        on_source, depth = self._look_below(image, source) if image.backing is not None else (False, None)
        return replace(
            facts,
            identity=identity_of(status),
            image=image,
            on_source=on_source,
            depth=depth,
            uid=status.st_uid,
            gid=status.st_gid,
            mode=stat.S_IMODE(status.st_mode) & 0o777,
            label=staging.get_label(self.fd),
            linked_elsewhere=self._files.linked_elsewhere(status),
        )

    def _read(self, what: str, source: SourceFacts) -> Image:
        """It is read as what was asked for where its bytes allow that."""
        size = guards.length(self.fd)
        found = probe.detect(self.fd, size)
        wanted = self._task.request.target_format(source.image)
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
            return self._files.read_as(image_format, self.fd, size, found, what)
        except CloneError as exc:
            if exc.code not in ("CORRUPT_IMAGE", "UNSAFE_IMAGE", "NO_SUPPORT", "IO_ERROR"):
                raise
            return Image(image_format, size, unreadable=exc.msg)

    def _look_below(self, image: Image, source: SourceFacts) -> t.Tuple[bool, t.Optional[int]]:
        """Whether its backing store is the source, and how many images lie below it; None if that is not told.

        Nothing is opened where it is: a thousand linked clones of one source are told from their headers.
        """
        on_source = False
        try:
            path = self._files.backing_path(OpenImage(self.fd, "the target", path_of(self.fd), image, False))
            on_source = path == os.path.realpath(source.key)
            if on_source and source.image is not None and source.image.format == (image.backing_format or "raw"):
                return True, len(source.below) + 1
            return on_source, len(self.layers(image)) - 1
        except CloneError as exc:
            if exc.code == "TIMEOUT":
                raise
            # It lies outside the pools, is gone, or cannot be read: only who has to read through it minds.
            return on_source, None

    def _look_at_device(self, pool: DevicePool, name: str, source: SourceFacts) -> TargetFacts:
        volume = self.device = pool.volume(name)
        self.network = None
        if volume is None:
            return TargetFacts()
        what = f"volume {name!r} of pool {pool.name!r}"
        if isinstance(pool, NetworkPool):
            layer = pool.layer(volume)
            self.fd, self.network = layer.fd, layer.network
            return network.look_at_target(self._task, pool, volume, layer, source, what)
        try:
            self.fd, _block = open_image(os.path.realpath(volume.path), what)
        except FileNotFoundError:
            if pool.volume(name) is None:
                return TargetFacts()
            raise CloneError("OPERATION_INVALID", f"{what} is not active: there is no {volume.path!r}") from None
        identity = identity_of(os.fstat(self.fd))
        facts = TargetFacts(Image("raw", volume.sound), identity)
        if identity == source.identity:
            return facts
        image = probe.read_raw(volume.sound, (), os.pread(self.fd, 8, 0))
        below = pool.below(volume, pool.volumes()) if volume.origin else []
        if below:
            image = replace(image, backing=below[0].path, backing_format="raw")
        return replace(
            facts,
            image=image,
            unfinished=pool.is_begun(volume.name, self.fd),
            on_source=bool(below) and _device_identity(below[0].path) == source.identity,
            depth=len(below),
            needs_origin=volume.needs is not None,
            irreplaceable=pool.cannot_replace(volume),
            granularity=pool.granularity * volume.stripes,
            outlives_source=volume.thin_pool is not None,
        )

    # --- what lies below it -----------------------------------------------------------------------------------------------

    @property
    def what(self) -> str:
        """What messages call the open file."""
        return f"volume {os.path.basename(path_of(self.fd))!r} of pool {self._task.pool.name!r}"

    def layers(self, image: Image) -> t.List[Layer]:
        """The target and all that lies below it, opened once; it stays within the pools as a source does."""
        if self.device is not None:
            # What a snapshot is of is no image below it.
            return [Layer(self.fd, "raw", self.network is None, network=self.network)]
        if self.fd < 0:
            raise CloneError(
                "OPERATION_DENIED",
                f"the target in pool {self._task.pool.name!r} cannot be opened by this user; use become",
            )
        topmost = OpenImage(self.fd, self.what, path_of(self.fd), image, False)
        if image.backing is not None and not self.below:
            layers = [topmost]
            try:
                self._files.open_chain(layers)
            except BaseException as exc:
                # A part of the chain must not be taken for all of it.
                close_all(layers[1:])
                if isinstance(exc, FileNotFoundError):
                    raise CloneError("NO_STORAGE_VOL", str(exc)) from exc
                raise
            self.below = layers[1:]
        return [opened.layer for opened in (topmost, *self.below)]

    # --- who uses it ------------------------------------------------------------------------------------------------------

    def users(self, name: str) -> str:
        """Who else has it open; empty for nobody."""
        if self.elsewhere is not None:
            return self._task.pool.users_of(self.elsewhere.path)
        return self._users(name) if self.fd >= 0 else ""

    def _users(self, name: str) -> str:
        """Outside check mode, somebody who lets go of it within a moment does not count."""
        pool = self._task.pool
        end = time.monotonic() + (_LONG_MOMENT if self._task.locked else _MOMENT)
        if isinstance(pool, NetworkPool):
            return pool.users(name)
        who = guards.users(self.fd)
        while who and not self._task.check_mode and time.monotonic() < end:
            time.sleep(0.05)
            who = guards.users(self.fd)
        return who or pool.users_of(pool.path_of(name))

    def in_use(self, name: str) -> str:
        """Who uses it now, or that it is another file by now; empty for neither."""
        if self.elsewhere is None and self.device is None:
            status = self._task.pool.lstat(name)
            if status is None or not os.path.samestat(status, os.fstat(self.fd)):
                return "another file has its name by now"
        who = self._users(name) if self.elsewhere is None else self.users(name)
        return f"it is open by {who}" if who else ""


def _device_identity(path: str) -> t.Optional[t.Tuple[int, ...]]:
    number = device_number(path)
    return None if number is None else (number,)
