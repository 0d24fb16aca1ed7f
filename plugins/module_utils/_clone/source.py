# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The source of one clone, or of many: opened once, with all below it, and what is told of it meanwhile."""

from __future__ import annotations

import os
import stat
import typing as t
from dataclasses import dataclass, field, replace

from .._errors import CloneError
from .._images import probe, qemu_img
from .._import.options import shown
from .._pools.devices import DevicePool
from .._pools.directory import DirectoryPool
from .._pools.libvirt import LibvirtPool
from .._pools.network import NetworkPool
from .._pools.remote import RemotePool
from .._transfer import guards
from .._volumes.inventory import Inventory, Key, Volume
from . import elsewhere, network
from .files import Files, OpenImage, close_all, identity_of, image_from_xml, open_image, real_path
from .model import Create, SourceFacts
from .outside import Outside
from .task import Task


@dataclass
class Told:
    """What was found out and planned since the source was last looked at, the same for all clones of it."""

    #: facts that the planner asked for
    answers: t.Dict[str, t.Any] = field(default_factory=dict)
    #: all volumes of the target's pool, and which depend on which
    inventory: t.Optional[t.Tuple[Inventory, t.Dict[Key, t.List[Volume]]]] = None
    #: names of the clones, those that are still to be made too
    names: t.Set[str] = field(default_factory=set)
    #: of the clones that are planned, as kind() has it
    kinds: t.Set[t.Any] = field(default_factory=set)
    #: bytes that they will take
    reserved: int = 0
    #: bytes that a step takes
    needed: t.Dict[Create, int] = field(default_factory=dict)


class Source:
    """What is cloned. :meth:`look` opens it, and says what it is."""

    def __init__(self, task: Task, files: Files, outside: Outside) -> None:
        self._task = task
        self._files = files
        self._outside = outside
        #: the source and all below it, the topmost first; none for one on another host
        self.layers: t.List[OpenImage] = []
        self.facts = SourceFacts("nothing", "")
        self.told = Told()

    def close(self) -> None:
        close_all(self.layers)
        self.told = Told()

    def look(self) -> SourceFacts:
        self.facts = self._look()
        return self.facts

    def _look(self) -> SourceFacts:
        request, pools = self._task.request, self._task.pools
        if request.blank:
            return SourceFacts("nothing", "")
        if request.outside.url is not None:
            url = shown(request.outside.url)
            facts = SourceFacts(f"source_url {url!r}", url, pending="fetched")
            return self._outside.look_at_source(self.layers, facts, "")
        if request.source_path is not None:
            return self._look_at_path(request.source_path)
        name, pool_name = t.cast(str, request.source), request.effective_source_pool
        facts = SourceFacts(f"volume {name!r} of pool {pool_name!r}", name, pool_name, name)
        pool = pools.find(pool_name)
        if pool is None:
            return replace(facts, gone=pools.missing[pool_name])
        if isinstance(pool, DevicePool):
            return self._look_at_device(facts, pool)
        if isinstance(pool, RemotePool):
            return elsewhere.look_at_source(self._task, replace(facts, remote=True), pool)
        facts = replace(facts, path=pool.path_of(name))
        status = pool.lstat(name)
        path = facts.path
        if status is not None and stat.S_ISLNK(status.st_mode):
            path = real_path(path, facts.what)
            if os.path.lexists(path):
                self._files.refuse_outside("symbolic_link", path, f"{facts.what} is a symbolic link to {path!r}")
        return self._open(replace(facts, key=pools.key_of(real_path(path, facts.what))), path, pool)

    def _look_at_path(self, stated: str) -> SourceFacts:
        request, pools = self._task.request, self._task.pools
        path = os.path.realpath(stated)
        what = f"source_path {stated!r}" if request.source_url is None else f"source_url {request.source_url!r}"
        facts = SourceFacts(what, stated, key=pools.key_of(path))
        if not pools.missing and pools.holding(path) is None:
            facts = replace(facts, outside=os.path.dirname(path))
        facts = self._outside.judge(facts, path)
        if facts.pending:
            return self._outside.look_at_source(self.layers, facts, path)
        return self._open(facts, path, None)

    def _look_at_device(self, facts: SourceFacts, pool: DevicePool) -> SourceFacts:
        volume = pool.volume(t.cast(str, facts.name))
        if volume is None:
            return replace(facts, gone=f"{facts.what} does not exist")
        if isinstance(pool, NetworkPool):
            return network.look_at_source(self._task, self.layers, facts, pool, volume)
        opened = self._open(replace(facts, path=volume.path, key=volume.path), os.path.realpath(volume.path), pool)
        if not self.layers:
            if opened.gone and pool.volume(volume.name) is not None:
                raise CloneError("OPERATION_INVALID", f"{facts.what} is not active: there is no {volume.path!r}")
            return opened
        self.layers[0].lock, self.layers[0].name = pool.lock_key(volume.name), volume.name
        if pool.is_begun(volume.name, self.layers[0].fd):
            raise CloneError("CORRUPT_IMAGE", f"{facts.what} is not finished: the run that made it was killed")
        if volume.zero_from is not None:
            raise CloneError("CORRUPT_IMAGE", f"{facts.what} is not finished: the run that grew it was killed")
        return replace(opened, owner=None, fixed=volume.thin_pool is None)

    def _open(self, facts: SourceFacts, path: str, pool: t.Optional[DirectoryPool]) -> SourceFacts:
        """:param path: the real path; ``pool`` is None for one that the task states"""
        try:
            fd, block = self._files.open_inside(path, facts.what) if pool is not None else open_image(path, facts.what)
        except FileNotFoundError:
            return replace(facts, gone=f"{facts.what} does not exist")
        except CloneError as exc:
            described = self._described_by_libvirt(facts) if exc.code == "OPERATION_DENIED" else None
            if described is None:
                raise
            return described
        opened = self._files.read(fd, facts.what, path, block, self._task.request.source_format)
        self.layers.append(opened)
        try:
            self._files.open_chain(self.layers)
        except FileNotFoundError as exc:
            return replace(self._identified(facts), gone=str(exc))
        status = os.fstat(fd)
        return replace(
            self._identified(facts),
            image=opened.image,
            block=block,
            owner=(status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode) & 0o777) if pool else None,
        )

    def _identified(self, facts: SourceFacts) -> SourceFacts:
        identity, *below = (identity_of(os.fstat(layer.fd)) for layer in self.layers)
        return replace(facts, identity=identity, below=tuple(below))

    def _described_by_libvirt(self, facts: SourceFacts) -> t.Optional[SourceFacts]:
        """With ``method: libvirt`` a user may clone what he cannot read: libvirt's word has to do."""
        pool = self._task.pools.find(facts.pool or "")
        if self._task.request.method != "libvirt" or not isinstance(pool, LibvirtPool):
            return None
        document = pool.volume_xml(t.cast(str, facts.name))
        image = image_from_xml(document) if document else None
        return replace(facts, image=image, gone="" if image else f"{facts.what} does not exist")

    # --- while it is cloned -----------------------------------------------------------------------------------------------

    def watch(self) -> None:
        """To be called while it is looked at."""
        self._task.deadline.check(f"looking at {self.layers[0].what}")

    def writers(self) -> str:
        """Who has it open for writing."""
        if self.facts.remote:
            return t.cast(RemotePool, self._task.source_pool).writers_of(self.facts.path)
        pool = self._task.pools.find(self._task.request.effective_source_pool)
        for image in self.layers:
            if image.own:
                continue
            on_network = image.network is not None and isinstance(pool, NetworkPool)
            who = t.cast(NetworkPool, pool).writers(image.name) if on_network else guards.writers(image.fd)
            if who:
                return who
        return ""

    def disturbed(self) -> str:
        """Why a source on the network may have been written to while it was read; empty when nothing is known of that.

        Of a file and of a device, :class:`guards.Hold` tells more.
        """
        pool = self._task.pools.find(self._task.request.effective_source_pool)
        if not self.layers or self.layers[0].network is None or not isinstance(pool, NetworkPool):
            return ""
        return network.disturbed(pool, self.layers[0])

    def corrupt(self) -> str:
        """What ``qemu-img check`` says of the first image that is not sound. Leaked clusters (status 3) are no damage.

        A run asks beside its work, before anything is published.
        """
        for image in self.layers:
            # An encrypted image cannot be checked without its key.
            if image.image.format in probe.CHECKABLE and not image.image.encrypted:
                doing = f"checking {image.what}"
                arguments, names = qemu_img.check(image.layer), {image.fd: image.what}
                status = self._task.qemu.run(arguments, names, doing, self.watch, quick=True, accept=(0, 2, 3))[0]
                if status == 2:
                    return f"{image.what} is corrupt: qemu-img check finds errors in it [qemu_check]"
        return ""
