# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Many clones of one source: it is read and converted once, and what was made first is shared or copied by the others.

Promise: each volume is what a task of its own would have made of it, or its error says why not; one that fails spoils no other.
Files get their names together, once all are on the disk: a run that is killed before has made none of them. Devices come one by
one, and of very many files a part at a time (``_BATCH``).
"""

from __future__ import annotations

import functools
import os
import resource
import time
import typing as t
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace

from .._errors import CloneError, from_os_error
from .._pools.devices import DevicePool
from .._pools.remote import RemotePool
from .._transfer import guards, locks, staging
from . import executor, result
from .facts import Scene
from .files import OpenImage
from .model import Create, Facts, Plan, donates, kind
from .request import Request
from .work import Transfer, held, refuse_in_use, refuse_other_source, source_checked

# Volumes that are made together; each holds three descriptors meanwhile.
_BATCH = 250
_DESCRIPTORS = 4096
# More than processors, since sharing waits for the file system's journal.
_WORKERS = 8
_ROUNDS = 5


@dataclass
class Job:
    """One volume of the task."""

    request: Request
    scene: Scene
    facts: t.Optional[Facts] = None
    plan: t.Optional[Plan] = None
    transfer: t.Optional[Transfer] = None
    staged: t.Optional[staging.Staging] = None
    error: t.Optional[CloneError] = None
    #: somebody else published the name while the volume was made
    taken: bool = False
    duration: float = 0.0

    @property
    def what(self) -> str:
        return f"volume {self.request.name!r} of pool {self.request.pool!r}"

    @property
    def postponed(self) -> bool:
        """Whether it cannot be judged before it is locked."""
        return self.plan is None and self.error is None

    @property
    def creates(self) -> t.Optional[Create]:
        """The step that makes a new volume; a plan has at most one."""
        steps = self.plan.steps if self.plan and not self.error else ()
        return next((step for step in steps if isinstance(step, Create)), None)

    @property
    def stages(self) -> bool:
        """Whether the new volume is a file to be staged; the others are made one by one."""
        if self.creates is None or self.creates.route == "libvirt":
            return False
        return not isinstance(self.scene.pool, (DevicePool, RemotePool))

    def attempt(self, work: t.Callable[[], None]) -> None:
        """Do something for this volume alone: if it fails, that is this volume's error."""
        started = time.monotonic()
        try:
            work()
        except FileExistsError:
            self.taken = True
        except CloneError as exc:
            self.error = exc
        except OSError as exc:
            self.error = from_os_error(exc, f"making {self.what}")
        self.duration += time.monotonic() - started


def run(requests: t.Sequence[Request], check_mode: bool) -> t.Dict[str, t.Any]:
    """Do what the requests state, or in check mode say what would be done. Returns the module's result.

    :raises CloneError: on what concerns all volumes
    """
    with closing(Scene(requests[0], check_mode)) as first:
        first.open_source()
        jobs = [Job(request, Scene(request, check_mode, first)) for request in requests]
        for job in jobs:
            _judge(job)
            # A thousand volumes that are there need not be open all at once.
            job.scene.close_files()
        if not check_mode:
            # In use may mean: by another run, which is waited for under the lock.
            todo = [
                job
                for job in jobs
                if job.postponed or (job.plan and job.plan.steps) or (job.error and job.error.code == "IN_USE")
            ]
            _raise_limit()
            for start in range(0, len(todo), _BATCH):
                _change(first, todo[start : start + _BATCH])
            made = any(job.plan and job.plan.steps and not job.error for job in jobs)
            if made or not first.pool.lists(*(t.cast(str, job.request.name) for job in jobs if not job.error)):
                first.pool.refresh(first.deadline.sooner(first.request.lock_timeout, "lock_timeout"))
        return result.build_many(jobs)


def _judge(job: Job) -> None:
    def judge() -> None:
        job.error = job.plan = None
        job.facts = job.scene.gather()
        job.facts, job.plan = executor.judge(job.scene, job.facts)
        job.scene.source.told.names.add(job.facts.name)
        if job.creates and not job.facts.pool.missing:
            job.scene.space.reserve(job.creates)

    job.attempt(judge)


def _raise_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(_DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


# --- a batch ------------------------------------------------------------------------------------------------------------


def _change(first: Scene, jobs: t.Sequence[Job]) -> None:
    targets = [first.pool.lock_key(t.cast(str, job.request.name)) for job in jobs]
    waiting = first.deadline.sooner(first.request.lock_timeout, "lock_timeout")
    # While we wait, whoever has a lock must not take us for a user of its target.
    first.close_files()
    with locks.Locks(
        executor.source_locks(first), targets, waiting, f"waiting for another run to finish with {len(jobs)} volumes"
    ):
        for _round in range(_ROUNDS):
            first.open_source()
            for job in jobs:
                job.taken, job.scene.task.locked = False, True
                _judge(job)
            if any(job.facts and job.facts.source_writers and job.creates for job in jobs):
                executor.wait_for_source(first)
                continue
            _create_all(first, [job for job in jobs if job.stages])
            for job in jobs:
                if not job.stages and job.plan and not job.error:
                    job.attempt(functools.partial(_carry_out, job))
                job.scene.close_files()
            jobs = [job for job in jobs if job.taken]
            if not jobs:
                return
            if isinstance(first.pool, RemotePool):
                # Of what others make there libvirt tells once it has looked.
                first.pool.refresh(waiting)
    for job in jobs:
        job.error = CloneError("STORAGE_VOL_EXIST", f"{job.what} comes and goes while it is made")


def _carry_out(job: Job) -> None:
    for step in t.cast(Plan, job.plan).steps:
        job.transfer = executor.carry_out(job.scene, t.cast(Facts, job.facts), step) or job.transfer


def _create_all(first: Scene, jobs: t.Sequence[Job]) -> None:
    """Fill all, sync once, name all."""
    if not jobs:
        return
    with guards.Hold(held(first)) as hold, source_checked(first) as expect_sound, ExitStack() as stack:
        for job in jobs:
            job.attempt(functools.partial(_stage, job, stack))

        def watch() -> None:
            first.deadline.check("making the volumes")
            hold.check()

        _fill_all([job for job in jobs if job.staged and not job.error], watch)
        whole = [job for job in jobs if job.staged and not job.error]
        try:
            watch()
            staging.sync_all([t.cast(staging.Staging, job.staged).fd for job in whole])
            expect_sound()
            hold.finish()
            refuse_other_source(first)
            for job in whole:
                job.attempt(functools.partial(_name, job))
            os.fsync(first.pool.fd)
        except (CloneError, OSError) as exc:
            error = exc if isinstance(exc, CloneError) else from_os_error(exc, "making the volumes durable")
            for job in whole:
                job.error = error


def _stage(job: Job, stack: ExitStack) -> None:
    job.staged = stack.enter_context(staging.Staging(job.scene.pool.fd))


def _name(job: Job) -> None:
    step, facts = t.cast(Create, job.creates), t.cast(Facts, job.facts)
    if step.replaces:
        refuse_in_use(job.scene, facts.name, f"{job.what} cannot be replaced")
    t.cast(staging.Staging, job.staged).name(facts.name, step.replaces)


def _fill_all(jobs: t.Sequence[Job], watch: t.Callable[[], None]) -> None:
    """Make the first of each kind from the source, the first of each other capacity from that, and the rest from those."""
    kinds: t.Dict[t.Any, t.Dict[int, t.List[Job]]] = {}
    for job in jobs:
        step = t.cast(Create, job.creates)
        kinds.setdefault(kind(step), {}).setdefault(step.capacity, []).append(job)
    with ThreadPoolExecutor(_WORKERS) as workers:

        def fill(batch: t.Sequence[t.Tuple[Job, t.Optional[Job]]]) -> None:
            for future in [workers.submit(_fill, job, donor, watch) for job, donor in batch]:
                future.result()

        # The smallest, since growing is all that can be done to a copy.
        heads = [capacities[min(capacities)][0] for capacities in kinds.values()]
        fill([(job, None) for job in heads])
        sizes = [
            (same[0], head)
            for head, capacities in zip(heads, kinds.values())
            for same in capacities.values()
            if same[0] is not head
        ]
        fill(sizes)
        fill([(job, same[0]) for capacities in kinds.values() for same in capacities.values() for job in same[1:]])


def _fill(job: Job, donor: t.Optional[Job], watch: t.Callable[[], None]) -> None:
    """``donor``: a volume of the same kind that was just made; where it does not serve, the source itself has to."""
    step = t.cast(Create, job.creates)
    made = donor.creates if donor else None
    if donor is not None and donor.staged is not None and made is not None and donates(made, step):
        # Nobody else has seen that file yet, so nobody can have changed it.
        image = replace(job.scene.layers[0].image, format=made.format, capacity=made.capacity, qcow2=made.qcow2)
        if made.route == "convert":
            image = replace(image, snapshots=0, bitmaps=0)
        job.scene.donor = OpenImage(donor.staged.fd, donor.what, "", image, False, ())
        unshared = step.unshared if job.request.own_blocks else None
        # An overlay is nothing but a few tables, which would soon be shared no more.
        step = replace(step, route="copy", unshared="it has no data" if step.backing else unshared)

    def work() -> None:
        transfer = executor.fill(job.scene, step, t.cast(staging.Staging, job.staged), job.what, watch)
        job.transfer = Transfer("link") if step.backing else transfer

    job.attempt(work)
