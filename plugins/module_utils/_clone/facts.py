# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Looking at the world: pools, the source and everything below it, the target. Changes nothing.

Files are opened once and stay open until the end of the task, and everything is read through those descriptors, by qemu-img
too. What was judged is what is cloned, whatever happens to names in between.

:class:`Scene` puts together what looks at a part each: ``task.py`` has the pools, ``source.py`` and ``target.py`` the two
volumes, which are files or devices of this host (``files.py``), or on the network (``network.py``), or on another host
(``elsewhere.py``). ``outside.py`` brings in a source that is in no pool. ``space.py`` and ``costly.py`` answer what the planner
asks for.
"""

from __future__ import annotations

import os
import stat
import typing as t
from dataclasses import replace

from .._deadline import Deadline
from .._errors import CloneError
from .._images.probe import Image
from .._images.qemu_img import QemuImg
from .._pools.devices import Device, DevicePool, DiskPool
from .._pools.directory import DirectoryPool
from .._pools.network import NetworkPool
from .._pools.remote import RemotePool
from .._transfer.pace import Rate
from .._uri import is_elsewhere
from . import costly
from .files import Files, OpenImage
from .model import Create, Facts, PoolFacts, SourceFacts, TargetFacts, Unanswered
from .outside import Outside
from .request import Request, made_up_name
from .source import Source
from .space import Space
from .target import Target
from .task import Pools, Task

# Facts that are the same for all clones of a source.
_OF_THE_SOURCE = ("source_writers", "source_corrupt", "unshareable", "checked")


class Scene:
    """What one clone has to do with. Open it, :meth:`gather`, :meth:`answer` what the planner asks, and close it.

    :param first: the scene of another clone of the same source in the same pool, which owns the source, the pools and the
        connection, and is closed last
    """

    def __init__(self, request: Request, check_mode: bool, first: t.Optional[Scene] = None) -> None:
        self._first = first
        if first is None:
            deadline = Deadline(request.timeout, "timeout")
            pools = Pools(request.uri, check_mode, deadline)
            self.task = Task(request, check_mode, pools, deadline, Rate(request.bwlimit), QemuImg())
        else:
            self.task = replace(first.task, request=request)
        self._files = Files(self.task)
        self.outside: Outside = first.outside if first else Outside(self.task, self._files)
        self.source: Source = first.source if first else Source(self.task, self._files, self.outside)
        self.target = Target(self.task, self._files)
        self.space = Space(self.task, self.source, self.target)
        #: a volume just made whose file is copied in place of the source
        self.donor: t.Optional[OpenImage] = None

    def close(self) -> None:
        self.close_files()
        if self._first is None:
            self.outside.close()
            self.task.pools.close()

    def close_files(self) -> None:
        """Let go of every image that is this scene's own, and of what was read of the pools; :meth:`gather` looks again."""
        for pool in self.task.pools:
            pool.look_again()
        if self._first is None:
            self.source.close()
        self.target.close()

    @property
    def request(self) -> Request:
        return self.task.request

    @property
    def check_mode(self) -> bool:
        return self.task.check_mode

    @property
    def pool(self) -> DirectoryPool:
        return self.task.pool

    @property
    def source_pool(self) -> DirectoryPool:
        return self.task.source_pool

    @property
    def deadline(self) -> Deadline:
        return self.task.deadline

    @property
    def rate(self) -> Rate:
        return self.task.rate

    @property
    def qemu(self) -> QemuImg:
        return self.task.qemu

    @property
    def layers(self) -> t.List[OpenImage]:
        """The source and all below it, the topmost first."""
        return self.source.layers

    # --- the facts that every plan needs ------------------------------------------------------------------------------------

    def open_source(self) -> None:
        """Open the pools and the source anew."""
        request = self.request
        self.close_files()
        self.task.pools.open(request.pool)
        if request.source is not None or request.source_pool is not None:
            self.task.pools.open(request.effective_source_pool)
        self.source.look()

    def gather(self) -> Facts:
        if self._first is None:
            self.open_source()
        else:
            self.close_files()
        return self._gathered()

    def _gathered(self) -> Facts:
        """The facts, from the source as it was opened last."""
        self.target.close()
        source = self.source.facts
        pool = self.task.pools.find(self.request.pool)
        if isinstance(pool, DevicePool) and self.request.format is None:
            self.task.request = replace(self.request, format="raw")
        request = self.request
        if isinstance(pool, DiskPool) and request.name is None:
            raise CloneError("INVALID_ARG", f"name: state it; the next partition of pool {pool.name!r} is {pool.next_name()!r}")
        # The same on each run, also before what comes from outside is seen.
        seen = None if self.outside.is_in else source.image
        name = request.name or made_up_name(request.source_name, request.target_format(seen), seen.format if seen else None)
        if pool is None:
            elsewhere = is_elsewhere(request.uri, request.pool)
            missing = self.task.pools.missing[request.pool]
            return self._facts(PoolFacts(request.pool, "unknown", None, missing, remote=elsewhere), source, TargetFacts(), name)
        facts = PoolFacts(pool.name, pool.type, pool.path, remote=isinstance(pool, RemotePool))
        if request.linked:
            source = replace(source, unlinkable=self._unlinkable(pool, source))
        if isinstance(pool, DevicePool):
            facts = replace(
                facts,
                granularity=pool.granularity,
                excess=pool.excess,
                next_name=pool.next_name(self.source.told.names),
                unnameable=pool.cannot_name(name),
            )
        label = None if isinstance(pool, (DevicePool, RemotePool)) else _default_label(pool.path_of(name))
        return self._facts(facts, source, self.target.look(pool, name, source), name, label)

    def _unlinkable(self, pool: DirectoryPool, source: SourceFacts) -> str:
        """Why there can be no linked clone of it in that pool."""
        if source.pending == "decompressed":
            return "it is compressed, and what is inside is there only while it is cloned"
        of_pool = self.request.source is not None
        source_pool = self.task.pools.find(self.request.effective_source_pool) if of_pool else None
        if isinstance(pool, DevicePool):
            if of_pool and source_pool is None:
                # A check run, in which an earlier task makes it.
                return ""
            return pool.cannot_link(source_pool, self.request.source)
        return "it is a volume on the network" if isinstance(source_pool, NetworkPool) else ""

    def _facts(
        self, pool: PoolFacts, source: SourceFacts, target: TargetFacts, name: str, label: t.Optional[str] = None
    ) -> Facts:
        stated = self.request.backing_path
        return Facts(
            pool,
            source,
            target,
            name,
            self.check_mode,
            uid=os.geteuid(),
            gid=os.getegid(),
            groups=tuple(os.getgroups()),
            default_label=label,
            backing_is_source=stated is None or os.path.realpath(stated) == os.path.realpath(source.key),
        )

    # --- what only some plans need ------------------------------------------------------------------------------------------

    def postpones(self, asked: Unanswered) -> bool:
        """Whether that takes long, and is not done before the target is locked: another run may be doing it."""
        return asked.question == "brought" and not (self.check_mode or self.task.locked)

    def answer(self, asked: Unanswered, facts: Facts) -> Facts:
        """The facts with the one that the planner asked for."""
        if asked.question == "brought":
            return self._bring(facts)
        told = self.source.told.answers
        if asked.question not in _OF_THE_SOURCE:
            return replace(facts, **{asked.question: self._answer(asked, facts)})
        if asked.question not in told:
            told[asked.question] = self._answer(asked, facts)
        return replace(facts, **{asked.question: told[asked.question]})

    def _bring(self, facts: Facts) -> Facts:
        """The facts anew, with the source as it has come in; in a check run they may stay as they are."""
        if not self.outside.bring(facts.source, self.open_source if self._first is None else self.source.look):
            return replace(facts, brought=False)
        return self._gathered()

    def _answer(self, asked: Unanswered, facts: Facts) -> t.Any:
        task, source, target = self.task, self.source, self.target
        image = t.cast(Image, facts.target.image)
        device = t.cast(Device, target.device)
        answers: t.Dict[str, t.Callable[[], t.Any]] = {
            "checked": lambda: self.outside.verify(facts.source, source.layers[0]),
            "content_equal": lambda: costly.content_equal(task, source, target, image),
            "data_beyond": lambda: costly.data_beyond(task, source),
            "denied": lambda: costly.denied(task, target, asked.draft),
            "not_growable": lambda: t.cast(DevicePool, task.pool).cannot_grow(device),
            "room": lambda: t.cast(DevicePool, task.pool).room_for(device),
            "source_corrupt": lambda: source.corrupt() if task.check_mode else "",
            "source_writers": source.writers,
            "space_missing": lambda: self.space.missing(t.cast(Create, asked.draft)),
            "target_chain": lambda: costly.target_chain(task, source, target, image),
            "target_dependents": lambda: costly.target_dependents(task, source, facts.name),
            "target_users": lambda: target.users(facts.name),
            "unshareable": self.space.unshareable,
        }
        return answers[asked.question]()


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
