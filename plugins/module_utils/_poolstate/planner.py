# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Request and facts in, plan or refusal out. Nothing here looks at the world.

The check run is the plan, not carried out, so it tells the truth. Facts that cost something are None until
:class:`Unanswered` asks for them, and then planning starts over.
"""

from __future__ import annotations

import typing as t
from dataclasses import dataclass, replace

from .._errors import CloneError
from .._pools import definition
from .._pools.definition import TYPES, Auth, Definition, PoolType
from .request import Request

#: Mode of a directory that nobody stated one for, as libvirt's own build gives it (VIR_STORAGE_DEFAULT_POOL_PERM_MODE).
DEFAULT_MODE = 0o711


@dataclass(frozen=True)
class Ownership:
    """None is left as it is, or is not known."""

    uid: t.Optional[int] = None
    gid: t.Optional[int] = None
    mode: t.Optional[int] = None


NOTHING = Ownership()


@dataclass(frozen=True)
class PoolFacts:
    """A pool that libvirt has. ``definition`` is what it is started with, ``document`` that as libvirt prints it.

    ``live`` is what it runs with, the same while it does not run.
    """

    definition: Definition
    live: Definition
    document: str
    active: bool
    persistent: bool = True
    autostart: bool = False
    #: active for libvirt, but nothing is mounted at its target path
    unmounted: bool = False
    #: where its file system is mounted, for a pool that runs and has one; not its target path where that has symbolic links
    mounted: t.Optional[str] = None


@dataclass(frozen=True)
class DirectoryFacts:
    """What stands at a pool's path. ``obstacle`` says in words why no directory can be there."""

    path: str
    exists: bool = False
    obstacle: t.Optional[str] = None
    identity: t.Optional[t.Tuple[int, int]] = None
    owner: Ownership = NOTHING
    #: a name in it, None when it is empty; only looked for where a directory pool shall go
    entry: t.Optional[str] = None
    #: the path without symbolic links, where that is another
    real: t.Optional[str] = None
    #: that the file system mounted on it has died, in words
    broken: str = ""
    #: why this user cannot make it, own it, or remove it, whichever is asked for; empty when he can
    denied: str = ""


@dataclass(frozen=True)
class DeviceFacts:
    """A device, and what it holds, which is only looked for where it shall be formatted."""

    path: str
    exists: bool = True
    #: of the file system, or whatever it is, that is alone on it
    format: t.Optional[str] = None
    #: the volume group that it is part of
    group: str = ""
    #: in words; empty when nothing was found but zeros
    holds: str = ""
    #: why nobody but its present user may have it, in words
    claimed: str = ""


@dataclass(frozen=True)
class SecretFacts:
    """The secret that a definition's ``auth`` names. ``matches`` says whether it has the password that the task states."""

    exists: bool = False
    private: bool = False
    matches: bool = False
    #: whether this module made it for the pool, and nobody else uses it
    own: bool = False


@dataclass(frozen=True)
class Facts:
    pool: t.Optional[PoolFacts] = None
    #: what the pool shall be, the document and its meaning; None where neither libvirt nor the task defines one
    desired: t.Optional[Definition] = None
    document: t.Optional[str] = None
    #: at the path that the pool shall have; None for a pool without one
    directory: t.Optional[DirectoryFacts] = None
    check_mode: bool = False
    uid: int = 0
    #: whether the pool is on another host, whose directories and devices only libvirt sees
    remote: bool = False
    # Asked for when needed:
    #: all other pools
    others: t.Optional[t.Tuple[Definition, ...]] = None
    #: running domains that use a file of the pool; empty for none
    users: t.Optional[str] = None
    devices: t.Optional[t.Tuple[DeviceFacts, ...]] = None
    #: whether there is a volume group of the name that the pool wants
    grouped: t.Optional[bool] = None
    #: what there is to know of the pool's secret
    secret: t.Optional[SecretFacts] = None
    #: why this connection may not change a pool; empty when it may
    denied: t.Optional[str] = None


@dataclass(frozen=True)
class State:
    """What a user sees of a pool, as far as it is known; the diff is made of two of these."""

    type: t.Optional[str] = None
    state: t.Optional[str] = None
    autostart: t.Optional[bool] = None
    definition: t.Optional[Definition] = None
    persistent: t.Optional[bool] = None
    owner: Ownership = NOTHING
    #: what is known of the password that the task states, in words
    password: t.Optional[str] = None


@dataclass(frozen=True)
class Plan:
    """``actions`` in order, each at most once; none means that the pool is as it should be.

    ``before`` and ``after`` are None for a pool that is not there. ``owner`` is what a directory is made with, or given.
    """

    before: t.Optional[State]
    after: t.Optional[State]
    actions: t.Tuple[str, ...] = ()
    owner: Ownership = NOTHING
    warnings: t.Tuple[str, ...] = ()


#: types of which libvirt has no two pools of the same thing on a server
_SERVED = ("netfs", "iscsi", "gluster")
_UNMOUNTED = "active, not mounted"


class Unanswered(Exception):
    """Planning needs the fact ``question``, a field of :class:`Facts`."""

    def __init__(self, question: str) -> None:
        super().__init__(question)
        self.question = question


def _known(facts: Facts, question: str) -> t.Any:
    answer = getattr(facts, question)
    if answer is None:
        raise Unanswered(question)
    return answer


def plan(request: Request, facts: Facts) -> Plan:
    """The actions that make the pool what the request states.

    :raises CloneError: the refusal
    :raises Unanswered: a fact is missing
    """
    if request.is_directory:
        return _directory(request, facts, t.cast(DirectoryFacts, facts.directory))
    if facts.remote:
        _refuse_remote(request)
    if request.state == "absent":
        result = _absent(request, facts)
    elif facts.desired is None:
        return _nothing_known(request, facts)
    else:
        result = _present(request, facts, facts.desired)
    if set(result.actions) - {"created", "permissions"}:
        denied = _known(facts, "denied")
        if denied:
            raise CloneError("OPERATION_DENIED", f"pool {request.name!r}: {denied}")
    return result


# --- a directory without libvirt ----------------------------------------------------------------------------------------


def _directory(request: Request, facts: Facts, directory: DirectoryFacts) -> Plan:
    before = State("directory", owner=directory.owner) if directory.exists else None
    if request.state == "absent":
        return _removed(request, facts, directory, before)
    actions, owner = _make_or_own(request, facts, directory)
    return Plan(before, State("directory", owner=_owned(owner, directory)), actions, owner)


def _removed(request: Request, facts: Facts, directory: DirectoryFacts, before: t.Optional[State]) -> Plan:
    if directory.obstacle:
        raise CloneError("INVALID_ARG", f"name: {directory.path!r} {directory.obstacle}")
    if before is None:
        return Plan(None, None)
    warnings: t.Tuple[str, ...] = ()
    if directory.entry is not None:
        why = f"pool {request.name!r} is not removed: it is not empty, there is {directory.entry!r} in it"
        if not facts.check_mode:
            raise CloneError("OPERATION_INVALID", why)
        warnings = (f"{why}; the check run takes it that an earlier task deletes what is there",)
    if directory.denied:
        raise CloneError("OPERATION_DENIED", directory.denied)
    return Plan(before, None, ("removed",), warnings=warnings)


def _make_or_own(
    request: Request, facts: Facts, directory: DirectoryFacts, described: t.Optional[Definition] = None, hidden: bool = False
) -> t.Tuple[t.Tuple[str, ...], Ownership]:
    """``created`` or ``permissions`` or nothing, and the owner that goes with it.

    :param described: whose permissions count for a directory that is made, as they do where libvirt makes it
    :param hidden: whether the directory will be, or should be, covered by what is mounted on it
    """
    if directory.obstacle:
        raise CloneError(
            "INVALID_ARG", f"{'name' if request.is_directory else 'target_path'}: {directory.path!r} {directory.obstacle}"
        )
    if directory.broken and not hidden:
        raise CloneError("IO_ERROR", f"target_path: {directory.path!r} {directory.broken}")
    if not directory.exists:
        action, owner = "created", _first_owner(request, facts, described)
    elif request.owns and not hidden:
        mode = None if request.mode is None else request.mode.on(directory.owner.mode or 0)
        action = "permissions"
        owner = Ownership(
            request.owner if request.owner != directory.owner.uid else None,
            request.group if request.group != directory.owner.gid else None,
            mode if mode != directory.owner.mode else None,
        )
    else:
        return (), NOTHING
    if owner == NOTHING:
        return (), NOTHING
    if directory.denied:
        raise CloneError("OPERATION_DENIED", directory.denied)
    if facts.uid != 0 and owner.uid not in (None, facts.uid):
        raise CloneError("OPERATION_DENIED", f"owner: only root gives {directory.path!r} to somebody else; use become")
    return (action,), owner


def _first_owner(request: Request, facts: Facts, described: t.Optional[Definition]) -> Ownership:
    mode, uid, gid = described.permissions if described else (None, None, None)
    base = mode if mode is not None else DEFAULT_MODE
    return Ownership(
        request.owner if request.owner is not None else uid if facts.uid == 0 else None,
        request.group if request.group is not None else gid if facts.uid == 0 else None,
        request.mode.on(base) if request.mode is not None else base,
    )


def _owned(owner: Ownership, directory: DirectoryFacts) -> Ownership:
    """What the directory has once it was given ``owner``."""
    return Ownership(
        owner.uid if owner.uid is not None else directory.owner.uid,
        owner.gid if owner.gid is not None else directory.owner.gid,
        owner.mode if owner.mode is not None else directory.owner.mode,
    )


# --- a pool of libvirt --------------------------------------------------------------------------------------------------


def _absent(request: Request, facts: Facts) -> Plan:
    pool = facts.pool
    if pool is None:
        return Plan(None, None)
    if pool.active:
        _refuse_unmounting(request, facts, pool)
    actions: t.Tuple[str, ...] = ("stopped", "undefined") if pool.active else ("undefined",)
    if pool.definition.source.auth and t.cast(SecretFacts, _known(facts, "secret")).own:
        actions = (*actions, "secret_removed")
    return Plan(_before(request, facts, pool), None, actions)


def _nothing_known(request: Request, facts: Facts) -> Plan:
    why = f"pool {request.name!r} does not exist at {request.uri}"
    if not facts.check_mode or request.defines:
        raise CloneError("NO_STORAGE_POOL", f"{why}; state type, or xml, to define it")
    # In which state an earlier task would have left it is not known.
    actions: t.Tuple[str, ...] = {"active": ("started",), "inactive": ("stopped",)}.get(request.state, ())
    if request.autostart is not None:
        actions = (*actions, "autostart")
    after = State(None, None if request.state == "present" else request.state, request.autostart)
    return Plan(None, after, actions, warnings=(f"{why}; the check run takes it that an earlier task defines it",))


def _present(request: Request, facts: Facts, desired: Definition) -> Plan:
    pool = facts.pool
    if request.build:
        _refuse_build(request, desired)
    if request.owns and not _type_of(desired).directory:
        raise CloneError("INVALID_ARG", f"owner, group, mode: a pool of the type {desired.type} has no directory of its own")
    if request.defines:
        _refuse_change(request, pool, desired)
        _refuse_incomplete(request, desired)
    differs = pool is None or not desired.means_the_same(pool.definition)
    if differs:
        _refuse_conflict(facts, desired)

    was_active = pool is not None and pool.active
    active = request.state == "active" or (request.state == "present" and was_active)
    stops = pool is not None and pool.active and (not active or _restarts(request, facts, pool, desired))
    starts = active and (stops or not was_active)
    if request.defines or starts:
        _refuse_symbolic_link(facts, desired)
    if stops and pool is not None:
        _refuse_unmounting(request, facts, pool)

    warnings = _moved(request, pool, desired) if differs else []
    made, owner = _directory_of(request, facts, desired, running=active and not starts)
    actions = [action for action in made if action == "created"]
    password = _password(request, facts, desired)
    if password:
        actions.append("secret")
    if pool is None or not pool.persistent:
        actions.append("defined")
    elif differs:
        actions.append("redefined")
    if stops:
        actions.append("stopped")
    if starts or (request.build and not active):
        actions += _building(request, facts, desired, warnings)
    if starts:
        actions.append("started")
    actions += [action for action in made if action == "permissions"]
    autostart = request.autostart if request.autostart is not None else pool is not None and pool.autostart
    if autostart != (pool is not None and pool.autostart):
        actions.append("autostart")

    after = State(
        desired.type,
        _UNMOUNTED if active and not starts and pool is not None and pool.unmounted else "active" if active else "inactive",
        autostart,
        # Where both mean the same, what is there stays written as it is.
        desired if pool is None or differs else pool.definition,
        True,
        _owned_afterwards(request, facts, desired, owner, active, starts),
        "as stated" if password else None,
    )
    before = None if pool is None else replace(_before(request, facts, pool), password=password or None)
    return Plan(before, after, tuple(actions), owner, tuple(warnings))


def _password(request: Request, facts: Facts, desired: Definition) -> str:
    """What the secret has in place of the stated password, in words; empty where it has that, or none is stated."""
    if request.password is None:
        return ""
    secret = t.cast(SecretFacts, _known(facts, "secret"))
    if secret.private:
        named = t.cast(Auth, desired.source.auth)
        raise CloneError(
            "NO_SUPPORT",
            f"pool_source.auth.password: the secret {named.secret_uuid or named.secret_usage!r} is private, and libvirt tells"
            " nobody what it has; state no password, or another secret",
        )
    return "" if secret.matches else "another" if secret.exists else "none"


def _restarts(request: Request, facts: Facts, pool: PoolFacts, desired: Definition) -> bool:
    """Whether a pool has to be stopped and started to be as asked for."""
    if request.defines and not desired.means_the_same(pool.live):
        _refuse_in_use(request, facts, "redefined")
        return True
    return pool.unmounted and request.state == "active"


def _moved(request: Request, pool: t.Optional[PoolFacts], desired: Definition) -> t.List[str]:
    """A warning where a pool leaves its volumes behind; a file system that is mounted elsewhere takes them along."""
    path = pool.definition.target_path if pool else None
    if path in (None, desired.target_path) or desired.type != "dir":
        return []
    return [
        f"pool {request.name!r} moves from {path!r} to {desired.target_path!r} (target_path): its volumes are not moved, they"
        f" stay in {path!r}"
    ]


def _before(request: Request, facts: Facts, pool: PoolFacts) -> State:
    """As it is. Where it runs with another definition than it has, the one that is not as asked for."""
    shown = pool.definition
    if request.defines and facts.desired is not None and shown.means_the_same(facts.desired):
        shown = pool.live
    state = State(pool.definition.type, "active" if pool.active else "inactive", pool.autostart, shown, pool.persistent)
    if pool.unmounted:
        return replace(state, state=_UNMOUNTED)
    directory = facts.directory
    if (
        directory is None
        or not _type_of(shown).directory
        or directory.path != shown.target_path
        or (_mounts(shown) and not pool.active)
    ):
        return state
    return replace(state, owner=directory.owner)


def _owned_afterwards(
    request: Request, facts: Facts, desired: Definition, owner: Ownership, active: bool, starts: bool
) -> Ownership:
    """Owner, group and mode, as far as they can be told beforehand."""
    if facts.directory is None or not _type_of(desired).directory or (_mounts(desired) and not active):
        return NOTHING
    if not _mounts(desired):
        return _owned(owner, facts.directory)
    if starts:
        # What gets mounted has an owner of its own; it gets what is stated.
        return Ownership(request.owner, request.group, request.mode.octal if request.mode else None)
    return NOTHING if facts.pool is not None and facts.pool.unmounted else _owned(owner, facts.directory)


def _directory_of(request: Request, facts: Facts, desired: Definition, running: bool) -> t.Tuple[t.Tuple[str, ...], Ownership]:
    """What is to be done to the pool's directory; nothing for a pool that is asked for no more than another state."""
    if facts.directory is None or not _type_of(desired).directory or not request.needs_directory:
        return (), NOTHING
    unmounted = facts.pool is not None and facts.pool.unmounted
    return _make_or_own(request, facts, facts.directory, desired, hidden=_mounts(desired) and (unmounted or not running))


def _building(request: Request, facts: Facts, desired: Definition, warnings: t.List[str]) -> t.Sequence[str]:
    """``built``, or nothing where nothing is to be built, or what is wanted is there."""
    if not _type_of(desired).builds or not desired.source.devices:
        return ()
    if facts.remote:
        # What is on the device only libvirt sees, and only a new pool may have an empty one.
        return ("built",) if request.build and facts.pool is None else ()
    devices = t.cast(t.Tuple[DeviceFacts, ...], _known(facts, "devices"))
    missing = [device.path for device in devices if not device.exists]
    if missing:
        what = f"pool {request.name!r}: the device {missing[0]!r} (pool_source.devices) does not exist"
        if not facts.check_mode:
            raise CloneError("INVALID_ARG", what)
        warnings.append(f"{what}; the check run takes it that an earlier task makes it")
        return ("built",) if request.build else ()
    if not request.build or all(_is_built(device, desired) for device in devices):
        return ()
    for device in devices:
        _refuse_to_build_on(request, device, desired)
    if desired.type == "logical" and _known(facts, "grouped"):
        raise CloneError(
            "OPERATION_INVALID",
            f"pool {request.name!r}: build makes a volume group and never extends one, and there is one of the name"
            f" {desired.source.name!r} already, without the device {devices[0].path!r} (pool_source.devices)",
        )
    return ("built",)


def _is_built(device: DeviceFacts, desired: Definition) -> bool:
    group = desired.source.name if desired.type == "logical" else ""
    return device.format == desired.source.format and device.group == group


def _refuse_to_build_on(request: Request, device: DeviceFacts, desired: Definition) -> None:
    what = f"the device {device.path!r} (pool_source.devices)"
    if device.holds:
        wanted = f"the volume group {desired.source.name!r}" if desired.type == "logical" else ""
        raise CloneError(
            "OPERATION_INVALID",
            f"pool {request.name!r}: build never formats over data: {what} holds {device.holds},"
            f" asked for is {wanted or f'pool_source.format={desired.source.format}'}",
        )
    if device.claimed:
        raise CloneError("IN_USE", f"pool {request.name!r}: {what} {device.claimed}")


def _type_of(described: Definition) -> PoolType:
    return TYPES.get(described.type, PoolType())


def _mounts(described: Definition) -> bool:
    return _type_of(described).mounts


def _refuse_remote(request: Request) -> None:
    for parameter, value in (("owner", request.owner), ("group", request.group), ("mode", request.mode)):
        if value is not None:
            raise CloneError(
                "NO_SUPPORT",
                f"{parameter}: the directory of pool {request.name!r} is on another host (uri {request.uri}); state it in"
                " <permissions> of xml, which counts where libvirt makes the directory, or run the task on that host",
            )


# --- refusals -----------------------------------------------------------------------------------------------------------


def _refuse_change(request: Request, pool: t.Optional[PoolFacts], desired: Definition) -> None:
    """What makes another pool of it."""
    if pool is None:
        return
    for what, had, wanted in (
        ("type", pool.definition.type, desired.type),
        ("uuid", pool.definition.uuid, desired.uuid),
    ):
        if had != wanted:
            raise CloneError(
                "DIFFERS",
                f"pool {request.name!r} exists with the {what} {had}, asked for is {wanted}; it is not changed in place,"
                " remove it with state=absent first",
            )


def _refuse_incomplete(request: Request, desired: Definition) -> None:
    known = TYPES.get(desired.type)
    if known is None:
        raise CloneError(
            "NO_SUPPORT", f"type: pools of the type {desired.type!r} cannot be defined; those are {', '.join(sorted(TYPES))}"
        )
    _refuse_path(request, desired, known)
    stated = desired.source.stated
    for key in (*known.needs, *known.may):
        # What only XML can say of an adapter is one, too.
        if key not in stated and key in known.needs and f"source/{key}" not in desired.others:
            raise CloneError("INVALID_ARG", f"pool_source.{key}: a pool of the type {desired.type} needs it")
        if key not in known.several and isinstance(stated.get(key), list) and len(stated[key]) > 1:
            raise CloneError(
                "INVALID_ARG", f"pool_source.{key}: a pool of the type {desired.type} has one, not {len(stated[key])}"
            )
    definition.refuse_useless(desired.type, desired.source)
    _refuse_port(desired)
    _refuse_auth(request, desired)


def _refuse_path(request: Request, desired: Definition, known: PoolType) -> None:
    stated = request.stated.target_path
    if known.path == "none":
        if stated is not None:
            raise CloneError("INVALID_ARG", f"target_path: {stated!r} has no use in a pool of the type {desired.type}")
    elif desired.target_path is None:
        raise CloneError("INVALID_ARG", f"target_path: a pool of the type {desired.type} needs it")
    elif "{name}" in known.path and stated is not None and definition.plain_path(stated) != desired.target_path:
        raise CloneError(
            "INVALID_ARG",
            f"target_path: {stated!r} is not where a pool of the type {desired.type} has its volumes, which is"
            f" {desired.target_path!r}",
        )


def _refuse_port(desired: Definition) -> None:
    ports = [host.port for host in desired.source.hosts if host.port]
    if ports and desired.type == "netfs":
        # mount(8) takes it among the options, and libvirt does not pass it on.
        raise CloneError("INVALID_ARG", f"pool_source.hosts.port: {ports[0]} has no use in a pool of the type netfs")


def _refuse_auth(request: Request, desired: Definition) -> None:
    auth = desired.source.auth
    if auth is None:
        return
    if auth.username is None:
        raise CloneError("INVALID_ARG", f"pool_source.auth.username: pool {request.name!r} needs it to authenticate")
    if auth.secret_uuid is None and auth.secret_usage is None:
        raise CloneError(
            "INVALID_ARG", f"pool_source.auth: pool {request.name!r} needs a password, or secret_uuid or secret_usage"
        )


def _refuse_build(request: Request, desired: Definition) -> None:
    """``build`` where there is nothing to build, or nobody knows what."""
    if not _type_of(desired).builds:
        raise CloneError("INVALID_ARG", f"build: a pool of the type {desired.type} has nothing that could be formatted")
    if not desired.source.devices:
        raise CloneError("INVALID_ARG", f"build: pool {request.name!r} needs pool_source.devices to make a volume group of")
    if desired.source.format in ("auto", "unknown"):
        raise CloneError("INVALID_ARG", f"build: pool {request.name!r} needs pool_source.format to be formatted")


def _refuse_conflict(facts: Facts, desired: Definition) -> None:
    """What libvirt calls a storage source conflict (virStoragePoolObjSourceFindDuplicate), and a directory of two pools."""
    for other in t.cast(t.Tuple[Definition, ...], _known(facts, "others")):
        shared = None
        if desired.uuid is not None and desired.uuid == other.uuid:
            shared = f"xml: the uuid {desired.uuid}"
        elif _type_of(desired).directory and _type_of(other).directory and desired.target_path == other.target_path:
            shared = f"target_path: {desired.target_path!r}"
        elif _type_of(desired).local and _type_of(other).local and set(desired.source.devices) & set(other.source.devices):
            both = sorted(set(desired.source.devices) & set(other.source.devices))
            shared = f"pool_source.devices: {both[0]!r}"
        elif desired.type == other.type and desired.type in _SERVED and _served(desired) == _served(other):
            what = desired.source.dir or desired.source.devices[0] if desired.type != "gluster" else desired.source.name
            shared = f"pool_source: {what!r} of {desired.source.hosts[0].name!r}"
        elif desired.type == other.type == "scsi" and desired.source.adapter and _served(desired) == _served(other):
            shared = f"pool_source.adapter: {desired.source.adapter!r}"
        if shared:
            raise CloneError("OPERATION_INVALID", f"{shared} is that of pool {other.name!r} already")


def _served(described: Definition) -> t.Tuple[object, ...]:
    """What tells one pool of a server from another, or one adapter."""
    source = described.meaning().source
    hosts = tuple(host.name for host in source.hosts)
    return hosts, source.name, (source.dir or "").lstrip("/"), source.devices, source.initiator, source.adapter


def _refuse_symbolic_link(facts: Facts, desired: Definition) -> None:
    """libvirt looks for the path as it is written among the mounts (virStorageBackendFileSystemIsMounted), and misses it."""
    directory = facts.directory
    if directory is not None and directory.real is not None and _mounts(desired):
        raise CloneError(
            "INVALID_ARG",
            f"target_path: {directory.path!r} is {directory.real!r} in truth; a pool of the type {desired.type} needs a path"
            " without symbolic links, which libvirt does not find among the mounts",
        )


def _refuse_in_use(request: Request, facts: Facts, done: str) -> None:
    users = _known(facts, "users")
    if users:
        raise CloneError("IN_USE", f"pool {request.name!r} cannot be {done}: its volumes are used by {users}")


def _refuse_unmounting(request: Request, facts: Facts, pool: PoolFacts) -> None:
    """Stopping a pool whose files stay where they are takes nothing from anybody; unmounting does, and so does logging out."""
    if _type_of(pool.live).takes_away and not pool.unmounted:
        _refuse_in_use(request, facts, "stopped")
    if pool.mounted not in (None, pool.live.target_path):
        raise CloneError(
            "OPERATION_INVALID",
            f"pool {request.name!r} cannot be stopped: libvirt would leave it mounted at {pool.mounted!r}, because its path"
            f" {pool.live.target_path!r} has a symbolic link in it; unmount it first",
        )
