# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the task asks of a pool, typed and checked, before anything is looked at.

A parameter wins over the pool XML; what neither states is None here.
"""

from __future__ import annotations

import typing as t
import uuid as uuids
from dataclasses import asdict, dataclass, field, fields

from .._deadline import stated_seconds
from .._errors import CloneError
from .._names import check_path, check_pool, check_readable
from .._permissions import Mode, group_id, user_id
from .._pools import definition
from .._pools.definition import TYPES, Auth, Definition, Host, Stated
from .._units import quoted

NOTHING_STATED = Stated()
#: Options that describe a pool of libvirt, and that a directory pool has no use for.
_LIBVIRT_ONLY = ("type", "target_path", "pool_source", "xml", "autostart", "build")


@dataclass(frozen=True)
class Request:
    """A pool as the task states it; None is "not stated"."""

    name: str
    uri: str = "qemu:///system"
    state: str = "active"
    stated: Stated = NOTHING_STATED
    xml: t.Optional[str] = None
    owner: t.Optional[int] = None
    group: t.Optional[int] = None
    mode: t.Optional[Mode] = None
    autostart: t.Optional[bool] = None
    build: bool = False
    #: of ``pool_source.auth``
    password: t.Optional[str] = field(default=None, repr=False)
    lock_timeout: float = 300.0

    @property
    def is_directory(self) -> bool:
        """Whether the pool is a plain directory, without libvirt."""
        return self.name.startswith("/")

    @property
    def defines(self) -> bool:
        """Whether the task says anything about the pool's definition."""
        return self.xml is not None or self.stated != NOTHING_STATED

    @property
    def owns(self) -> bool:
        """Whether the task says anything about the directory's owner, group or mode."""
        return (self.owner, self.group, self.mode) != (None, None, None)

    @property
    def needs_directory(self) -> bool:
        """Whether the pool's directory matters. One that is stopped or removed may have a file system that is dead."""
        return self.state != "absent" and (self.state == "active" or self.defines or self.owns)


def from_parameters(params: t.Mapping[str, t.Any], on_host: bool = True) -> Request:
    """Check the module's parameters and its XML.

    :param on_host: whether names of users and groups mean something here; elsewhere they are not looked up
    :raises CloneError: ``INVALID_ARG`` or ``XML_ERROR``, naming the parameter and its value
    """
    xml = params.get("xml")
    described = definition.parse(xml, strict=True) if xml is not None else None
    name = params.get("name")
    if name is None:
        name = described.name if described else None
        if not name:
            raise CloneError("INVALID_ARG", "name: neither the parameter nor the XML states it")
    check_pool(name, "name")
    if name.startswith("/"):
        check_path(name, "name")
        _refuse_for_directory(name, params)
    if params.get("target_path") is not None:
        check_path(params["target_path"], "target_path")
    elif described and described.target_path is not None:
        check_path(described.target_path, "xml: target/path")
    if described:
        _check_described(described)
    stated = _stated(params)
    _check_devices(stated, described)
    mode = params.get("mode")
    return Request(
        name=name,
        uri=params.get("uri") or "qemu:///system",
        state=params.get("state") or "active",
        stated=stated,
        xml=xml,
        owner=user_id(params["owner"]) if on_host and params.get("owner") is not None else None,
        group=group_id(params["group"]) if on_host and params.get("group") is not None else None,
        # A directory may hand its group on to the volumes that are made in it.
        mode=Mode(mode, allowed=0o7777) if mode is not None else None,
        autostart=params.get("autostart"),
        build=bool(params.get("build")),
        password=_password(params),
        lock_timeout=stated_seconds(params, "lock_timeout", 300.0),
    )


def _refuse_for_directory(name: str, params: t.Mapping[str, t.Any]) -> None:
    for option in _LIBVIRT_ONLY:
        value = params.get(option)
        # The default of "build" is no statement.
        if value is not None and (option, value) != ("build", False):
            raise CloneError(
                "INVALID_ARG",
                f"{option}: {quoted(str(value))} has no meaning for the directory pool {name!r}",
            )
    if params.get("state") == "inactive":
        raise CloneError("INVALID_ARG", f"state: 'inactive' has no meaning for the directory pool {name!r}")


def _check_devices(stated: Stated, described: t.Optional[Definition]) -> None:
    """Those of this host are paths; one of iSCSI is the name of a target."""
    pool_type = stated.type or (described.type if described else None)
    if pool_type is not None and pool_type in TYPES and not TYPES[pool_type].local:
        return
    for device in stated.devices or ():
        # Of a pool that exists the type is not known yet.
        if pool_type is not None or not device.startswith(("iqn.", "eui.", "naa.")):
            check_path(device, "pool_source.devices")


def _check_described(described: Definition) -> None:
    """libvirt leaves such characters out of the documents that it writes, so that the pool would differ on each run."""
    source = described.source
    for path, texts in (
        ("target/path", (described.target_path,)),
        ("source/name", (source.name,)),
        ("source/dir", (source.dir,)),
        ("source/format", (source.format,)),
        ("source/device", source.devices),
        ("source/host", tuple(host.name for host in source.hosts)),
        ("source/initiator", (source.initiator,)),
        ("source/adapter", (source.adapter,)),
        ("source/auth", tuple(source.auth.stated.values()) if source.auth else ()),
    ):
        for text in texts:
            check_readable(text or "", f"xml: {path}")


def _stated(params: t.Mapping[str, t.Any]) -> Stated:
    source = params.get("pool_source") or {}
    hosts = source.get("hosts")
    devices = source.get("devices")
    auth = source.get("auth")
    stated = Stated(
        type=params.get("type"),
        target_path=params.get("target_path"),
        hosts=None if hosts is None else tuple(Host(host["name"], host.get("port")) for host in hosts),
        dir=source.get("dir"),
        devices=None if devices is None else tuple(devices),
        format=source.get("format"),
        name=source.get("name"),
        initiator=source.get("initiator"),
        adapter=source.get("adapter"),
        auth=None if auth is None else _auth(auth),
    )
    for parameter, text in _texts(stated):
        if text == "":
            raise CloneError("INVALID_ARG", f"{parameter}: '' is empty")
        check_readable(text, parameter)
    for host in stated.hosts or ():
        if host.port is not None and not 0 < host.port < 65536:
            raise CloneError("INVALID_ARG", f"pool_source.hosts.port: {host.port} is not between 1 and 65535")
    if stated.type is not None:
        definition.refuse_useless(stated.type, stated.source)
    return stated


def _texts(stated: Stated) -> t.Iterator[t.Tuple[str, str]]:
    """All that is stated, by its parameter."""
    for entry in fields(stated):
        value = getattr(stated, entry.name)
        parameter = entry.name if entry.name in ("type", "target_path") else f"pool_source.{entry.name}"
        if isinstance(value, Auth):
            yield from ((f"{parameter}.{key}", text) for key, text in asdict(value).items() if text is not None)
        elif value is not None:
            for text in value if isinstance(value, tuple) else (value,):
                yield parameter, text.name if isinstance(text, Host) else text


def _auth(auth: t.Mapping[str, t.Any]) -> Auth:
    uuid = auth.get("secret_uuid")
    if uuid is not None:
        try:
            uuid = str(uuids.UUID(uuid))
        except ValueError:
            raise CloneError("INVALID_ARG", f"pool_source.auth.secret_uuid: {quoted(uuid)} is no UUID") from None
        if auth.get("secret_usage") is not None:
            raise CloneError(
                "INVALID_ARG", "pool_source.auth: secret_uuid and secret_usage name one secret, so state one of them"
            )
    return Auth(auth.get("type"), auth.get("username"), uuid, auth.get("secret_usage"))


def _password(params: t.Mapping[str, t.Any]) -> t.Optional[str]:
    password = ((params.get("pool_source") or {}).get("auth") or {}).get("password")
    if password == "":
        raise CloneError("INVALID_ARG", "pool_source.auth.password: it is empty")
    return t.cast(t.Optional[str], password)
