# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Carrying out a plan: lock, judge again, make, define, start.

Promise: a definition that libvirt does not take, or that does not start, leaves the pool as it was.
"""

from __future__ import annotations

import errno
import hashlib
import os
import typing as t
from contextlib import closing

from .._deadline import Deadline
from .._errors import CloneError, from_os_error
from .._pools import definition, directory
from .._pools.definition import TYPES, Definition
from .._pools.libvirt import LibvirtPool
from .._pools.secrets import Secret
from .._transfer import locks
from . import planner, report
from .facts import Scene
from .planner import DirectoryFacts, Facts, Plan, PoolFacts
from .request import Request

# Each round means that somebody else defined a pool of that name, or with that storage, after we had looked.
_ROUNDS = 5


def run(request: Request, check_mode: bool) -> t.Dict[str, t.Any]:
    """Do what the request states, or in check mode say what would be done. Returns the module's result.

    :raises CloneError: on refusal or failure
    """
    with closing(Scene(request, check_mode)) as scene:
        facts, plan = _judge(scene)
        if plan.actions and not check_mode:
            facts, plan = _change(scene)
        return report.build(scene, facts, plan)


def _judge(scene: Scene) -> t.Tuple[Facts, Plan]:
    facts = scene.gather()
    while True:
        try:
            return facts, planner.plan(scene.request, facts)
        except planner.Unanswered as asked:
            facts = scene.answer(asked, facts)


def _change(scene: Scene) -> t.Tuple[Facts, Plan]:
    name = scene.request.name
    key = f"pool-{hashlib.sha256(name.encode()).hexdigest()[:32]}"
    taken = ""
    with locks.Locks([], [key], scene.waiting, f"waiting for another run to finish with pool {name!r}"):
        for _round in range(_ROUNDS):
            # What another run did while we waited for the lock counts.
            facts, plan = _judge(scene)
            try:
                _Change(scene, facts, plan).carry_out()
                return facts, plan
            except FileExistsError as exc:
                taken = str(exc)
    raise CloneError("OPERATION_INVALID", f"pool {name!r} cannot be made: {taken}")


class _Change:
    """The actions of a plan, each a method of its name, and the way back."""

    def __init__(self, scene: Scene, facts: Facts, plan: Plan) -> None:
        self.scene = scene
        self.request = scene.request
        self.facts = facts
        self.plan = plan
        #: what there is to undo
        self._done: t.List[str] = []
        self._made: t.List[str] = []
        #: the secret that was made or set, and its old value
        self._secret: t.Optional[t.Tuple[Secret, t.Optional[bytes]]] = None
        self._secret_is_new = False

    @property
    def pool(self) -> LibvirtPool:
        return t.cast(LibvirtPool, self.scene.pool)

    @property
    def place(self) -> DirectoryFacts:
        return t.cast(DirectoryFacts, self.facts.directory)

    def carry_out(self) -> None:
        """Do it all, or leave what was.

        :raises FileExistsError: somebody else made a pool or a directory of that name meanwhile
        :raises CloneError: for everything else, saying what was put back
        """
        try:
            for action in self.plan.actions:
                getattr(self, action)()
        except FileExistsError:
            self._put_back()
            raise
        except (CloneError, OSError) as exc:
            error = exc if isinstance(exc, CloneError) else from_os_error(exc, f"changing pool {self.request.name!r}")
            raise CloneError(error.code, f"{error.msg}{self._put_back()}") from exc

    def _put_back(self) -> str:
        """Undo what was done, and say so as the end of a sentence."""
        try:
            return self._restore() if self.scene.pool is not None else ""
        except (CloneError, OSError) as exc:
            return f"; what it was could not be put back: {exc}"
        finally:
            directory.unmake(self._made)
            self._restore_secret()

    def _restore(self) -> str:
        before = self.facts.pool
        patience = Deadline(self.request.lock_timeout, "lock_timeout")
        told = ""
        if "started" in self._done:
            self.pool.stop(patience)
        if "defined" in self._done and before is None:
            self.pool.undefine()
            return told
        if before is not None and {"defined", "redefined"} & set(self._done):
            self.scene.connection.define(before.document, self.request.name)
            told = "; its old definition is back"
        if before is not None and before.active and not self.pool.is_active():
            self.pool.start()
            told += " and it runs again" if told else "; it runs again"
        return told

    def _restore_secret(self) -> None:
        if self._secret is None:
            return
        secret, value = self._secret
        if self._secret_is_new:
            secret.remove()
        elif value is not None:
            secret.set(value)

    # --- the actions ------------------------------------------------------------------------------------------------------

    def created(self) -> None:
        owner = self.plan.owner
        self._made = directory.make(self.place.path, owner.uid, owner.gid, t.cast(int, owner.mode))

    def secret(self) -> None:
        desired = t.cast(Definition, self.facts.desired)
        secret = self.scene.secret(desired)
        self._secret_is_new = not secret.exists
        if self._secret_is_new:
            secret.make(self.request.name)
        self._secret = secret, None if self._secret_is_new else secret.value()
        secret.set(self.scene.password(desired))

    def secret_removed(self) -> None:
        self.scene.secret(t.cast(PoolFacts, self.facts.pool).definition).remove()

    def defined(self) -> None:
        self._define("defined")

    def redefined(self) -> None:
        self._define("redefined")

    def _define(self, action: str) -> None:
        self.scene.pool = self.scene.connection.define(t.cast(str, self.facts.document), self.request.name)
        self._done.append(action)
        kept = definition.parse(self.pool.document(inactive=True)).others
        lost = [path for path in t.cast(Definition, self.facts.desired).others if path not in kept]
        if lost:
            # It would differ, and be defined again, on each run.
            raise CloneError("XML_ERROR", f"xml: libvirt has no use for <{lost[0]}> in a pool of the type {self.pool.type}")

    def stopped(self) -> None:
        self.pool.stop(self.scene.waiting)
        before = t.cast(PoolFacts, self.facts.pool)
        path = directory.mount_point(before.mounted) if before.mounted is not None else None
        if path is not None:
            raise CloneError("IO_ERROR", f"pool {self.request.name!r} was stopped, but something is still mounted at {path!r}")

    def undefined(self) -> None:
        # A pool that has no definition is gone once it is stopped.
        if t.cast(PoolFacts, self.facts.pool).persistent:
            self.pool.undefine()

    def built(self) -> None:
        self.pool.build()

    def started(self) -> None:
        self.pool.start()
        self._done.append("started")
        desired = t.cast(Definition, self.facts.desired)
        self._expect_storage(desired)
        if desired.type in TYPES and TYPES[desired.type].mounts and self.request.owns:
            self._own_mounted(t.cast(str, desired.target_path))

    def permissions(self) -> None:
        owner = self.plan.owner
        directory.own(self.place.path, self.place.identity, owner.uid, owner.gid, owner.mode)

    def autostart(self) -> None:
        self.pool.set_autostart(bool(self.request.autostart))

    def removed(self) -> None:
        try:
            directory.remove(self.place.path)
        except OSError as exc:
            if exc.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise CloneError("OPERATION_INVALID", f"{self.place.path!r} is not removed: it is no longer empty") from exc
            raise

    def _expect_storage(self, desired: Definition) -> None:
        """Starting may succeed with nothing behind it."""
        known = TYPES.get(desired.type)
        path = desired.target_path or ""
        if not self.pool.is_active():
            raise CloneError("IO_ERROR", f"pool {self.request.name!r} is not active after it was started")
        if known and known.sized and self.pool.sizes()[0] == 0:
            # As a pool of the type zfs is without any ZFS.
            raise CloneError("IO_ERROR", f"pool {self.request.name!r} was started, but libvirt finds no storage behind it")
        if self.facts.remote or known is None or not known.directory:
            return
        if not (directory.mount_point(path) if known.mounts else os.path.isdir(path)):
            raise CloneError("IO_ERROR", f"pool {self.request.name!r} was started, but there is nothing at {path!r}")

    def _own_mounted(self, path: str) -> None:
        """What was mounted a moment ago is not what the plan knew."""
        request = self.request
        mode = request.mode.on(os.stat(path).st_mode & 0o7777) if request.mode is not None else None
        directory.own(path, None, request.owner, request.group, mode)
