# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Pool documents: what they mean, and new ones made of an old one and of what a task states.

Two documents mean the same when libvirt makes the same pool of them (``virStoragePoolDefParseXML`` in storage_conf.c): blanks,
the order of elements that stand for themselves, what libvirt only prints, and defaults that one of them spells out are no
difference.
"""

from __future__ import annotations

import re
import typing as t
import uuid as uuids
from dataclasses import asdict, dataclass, field, replace

from .. import _xml
from .._errors import CloneError
from .._units import quoted

_NAMESPACES = {
    "http://libvirt.org/schemas/storagepool/fs/1.0": "fs:",
    "http://libvirt.org/schemas/storagepool/rbd/1.0": "rbd:",
}
# libvirt prints them, and takes no notice of them in a definition; the permissions count where a directory is made.
_OUTPUT_ONLY = (
    *("capacity", "allocation", "available", "target/permissions", "target/timestamps"),
    # The gaps between the partitions of a disk.
    "source/device/freeExtent",
)
# What parameters exist for, read one by one.
_OWN_FIELDS = (
    *("name", "uuid", "source/name", "source/host", "source/dir", "source/format", "target/path"),
    *("source/initiator/iqn", "source/auth", "source/auth/secret"),
)
# Read one by one, as far as there are parameters for their attributes.
_BY_ATTRIBUTES = ("source/device", "source/adapter")
# All else that libvirt reads. It drops an element that it does not know without a word, so that it would differ each time.
_KNOWN = (
    *("features/cow", "refresh/volume", "fs:mount_opts/fs:option", "rbd:config_opts/rbd:option"),
    *("source/device", "source/protocol", "source/vendor", "source/product"),
    *("source/adapter", "source/adapter/parentaddr", "source/adapter/parentaddr/address"),
)


@dataclass(frozen=True)
class PoolType:
    """What a definition of a type states: ``needs`` and ``may`` are its keys of ``pool_source``, less ``format``."""

    needs: t.Tuple[str, ...] = ()
    may: t.Tuple[str, ...] = ()
    #: those of them that can have several entries
    several: t.Tuple[str, ...] = ()
    #: values of ``pool_source.format``; the first is libvirt's default
    formats: t.Tuple[str, ...] = ()
    #: where libvirt takes ``pool_source.name`` from the pool's name
    named: bool = False
    #: the pool's path: "needed", "none", what libvirt makes of the source's name, or what it is where nobody states one
    path: str = "needed"
    #: whether the path is a directory of the pool's own, to be made and owned
    directory: bool = False
    #: whether starting the pool mounts something at its target path
    mounts: bool = False
    #: whether stopping the pool takes its volumes from those who use them
    takes_away: bool = False
    #: what ``build`` makes, in words; empty where there is nothing to make
    builds: str = ""
    #: whether ``devices`` are devices of this host
    local: bool = False
    #: the type of ``pool_source.auth``
    auth: str = ""
    #: the port of a host that states none; 0 where that means more than one
    port: int = 0
    #: whether there is no such pool without a size, so that one of size 0 has nothing behind it
    sized: bool = False


#: The types that a task can define, as libvirt has them (poolTypeInfo in storage_conf.c).
TYPES = {
    "dir": PoolType(directory=True),
    "fs": PoolType(
        needs=("devices",),
        formats=(
            *("auto", "ext2", "ext3", "ext4", "ufs", "iso9660", "udf", "gfs", "gfs2", "vfat", "hfs+", "xfs", "ocfs2", "vmfs"),
        ),
        directory=True,
        mounts=True,
        takes_away=True,
        builds="file system",
        local=True,
    ),
    "netfs": PoolType(
        needs=("hosts", "dir"), formats=("auto", "nfs", "glusterfs", "cifs"), directory=True, mounts=True, takes_away=True
    ),
    "logical": PoolType(
        may=("name", "devices"),
        several=("devices",),
        # virStoragePoolFormatLogical
        formats=("lvm2", "unknown"),
        named=True,
        path="/dev/{name}",
        takes_away=True,
        builds="volume group",
        local=True,
        sized=True,
    ),
    "disk": PoolType(
        needs=("devices",),
        # virStoragePoolFormatDisk
        formats=("unknown", "dos", "dvh", "gpt", "mac", "bsd", "pc98", "sun", "lvm2"),
        path="/dev",
        builds="partition table",
        local=True,
        sized=True,
    ),
    # Without a port librados tries two, 3300 and 6789.
    "rbd": PoolType(needs=("hosts", "name"), may=("auth",), several=("hosts",), path="none", auth="ceph"),
    "iscsi": PoolType(
        needs=("hosts", "devices"),
        may=("initiator", "auth"),
        path="/dev/disk/by-path",
        takes_away=True,
        auth="chap",
        port=3260,
    ),
    "iscsi-direct": PoolType(needs=("hosts", "devices", "initiator"), may=("auth",), path="none", auth="chap", port=3260),
    "scsi": PoolType(needs=("adapter",), path="/dev/disk/by-path"),
    "mpath": PoolType(path="/dev/mapper"),
    "gluster": PoolType(needs=("hosts", "name"), may=("dir",), path="none", port=24007),
    "zfs": PoolType(may=("name", "devices"), several=("devices",), named=True, path="/dev/zvol/{name}", local=True, sized=True),
    "vstorage": PoolType(needs=("name",)),
}


@dataclass(frozen=True, order=True)
class Host:
    name: str
    port: t.Optional[int] = None


@dataclass(frozen=True)
class Auth:
    """Who the pool is to its server, and the secret of libvirt's that has the password, by one of its two names."""

    type: t.Optional[str] = None
    username: t.Optional[str] = None
    secret_uuid: t.Optional[str] = None
    secret_usage: t.Optional[str] = None

    @property
    def stated(self) -> t.Dict[str, str]:
        return {key: value for key, value in asdict(self).items() if value}


@dataclass(frozen=True)
class Source:
    """``pool_source``: empty or None is what the document does not state."""

    hosts: t.Tuple[Host, ...] = ()
    name: t.Optional[str] = None
    dir: t.Optional[str] = None
    devices: t.Tuple[str, ...] = ()
    format: t.Optional[str] = None
    initiator: t.Optional[str] = None
    adapter: t.Optional[str] = None
    auth: t.Optional[Auth] = None

    @property
    def stated(self) -> t.Dict[str, t.Any]:
        """As a task writes it, less what is not stated."""
        written = {
            "hosts": [{"name": host.name, **({"port": host.port} if host.port else {})} for host in self.hosts],
            "name": self.name,
            "dir": self.dir,
            "devices": list(self.devices),
            "format": self.format,
            "initiator": self.initiator,
            "adapter": self.adapter,
            "auth": self.auth.stated if self.auth else None,
        }
        return {key: value for key, value in written.items() if value}


@dataclass(frozen=True)
class Definition:
    """What a pool document means. Paths are as libvirt has them, without slashes at the end."""

    type: str
    name: str = ""
    uuid: t.Optional[str] = None
    target_path: t.Optional[str] = None
    source: Source = Source()
    #: mode, owner and group that the document has for the pool's directory
    permissions: t.Tuple[t.Optional[int], t.Optional[int], t.Optional[int]] = field(default=(None, None, None), compare=False)
    #: by path, all that no parameter exists for: texts, or attributes, of the elements there
    others: t.Mapping[str, t.Tuple[str, ...]] = field(default_factory=dict)

    def means_the_same(self, other: Definition) -> bool:
        return self.meaning() == other.meaning()

    def meaning(self) -> Definition:
        """With what makes no difference left out: two that mean the same are equal."""
        source, known = self.source, TYPES.get(self.type, PoolType())
        if self.type == "gluster" or source.format == "glusterfs":
            # A volume's name, which mount(8) takes with and without the slash; libgfapi starts at the root by default.
            source = replace(source, dir=(source.dir or "").lstrip("/"))
        # The order of monitors, or of the devices of a volume group, is none; nor is what an adapter is called.
        hosts = sorted(Host(host.name, host.port or known.port or None) for host in source.hosts)
        adapter = re.sub("^scsi_host", "host", source.adapter) if source.adapter else None
        source = replace(source, hosts=tuple(hosts), devices=tuple(sorted(source.devices)), adapter=adapter)
        return replace(self, source=source)


@dataclass(frozen=True)
class Stated:
    """The definition as far as a task's parameters state it; None is "not stated"."""

    type: t.Optional[str] = None
    target_path: t.Optional[str] = None
    hosts: t.Optional[t.Tuple[Host, ...]] = None
    dir: t.Optional[str] = None
    devices: t.Optional[t.Tuple[str, ...]] = None
    format: t.Optional[str] = None
    name: t.Optional[str] = None
    initiator: t.Optional[str] = None
    adapter: t.Optional[str] = None
    auth: t.Optional[Auth] = None

    @property
    def source(self) -> Source:
        auth = self.auth if self.auth != Auth() else None
        devices = self.devices or ()
        return Source(self.hosts or (), self.name, self.dir, devices, self.format, self.initiator, self.adapter, auth)


def parse(document: str, strict: bool = False) -> Definition:
    """What a pool document means.

    :param strict: refuse elements that libvirt would drop; for documents that a task states
    :raises CloneError: ``XML_ERROR`` for a document that is malformed, or says something twice
    """
    _xml.refuse_before_parsing(document, "pool")
    root = _xml.parse(document, "pool")
    pool_type = root.get("type")
    if not pool_type:
        raise CloneError("XML_ERROR", "xml: the pool has no type")
    others: t.Dict[str, t.List[str]] = {}
    for element in root.iterchildren("*"):
        _collect(element, "", others)
    unknown = [path for path in others if path not in _KNOWN]
    if strict and unknown:
        raise CloneError("XML_ERROR", f"xml: libvirt knows no element <{quoted(unknown[0])[1:-1]}> in a pool")
    target = _xml.child(root, "target")
    name = _xml.text_of(root, "name") or ""
    source = _source(_xml.child(root, "source"), pool_type, name)
    return Definition(
        type=pool_type,
        name=name,
        uuid=_uuid(_xml.text_of(root, "uuid")),
        target_path=_target_path(pool_type, source.name, _xml.text_of(target, "path")),
        source=source,
        permissions=_xml.permissions(target),
        others={path: tuple(sorted(values)) for path, values in others.items()},
    )


def _target_path(pool_type: str, name: t.Optional[str], stated: t.Optional[str]) -> t.Optional[str]:
    """libvirt takes no notice of one that follows from the name, and drops one that a type has no use for."""
    known = TYPES.get(pool_type, PoolType())
    if "{name}" in known.path:
        return plain_path(known.path.format(name=name)) if name else None
    return None if known.path == "none" else plain_path(stated)


def _source(element: t.Any, pool_type: str, pool_name: str) -> Source:
    known = TYPES.get(pool_type, PoolType())
    named = pool_name or None if known.named else None
    first = (known.formats or (None,))[0]
    if element is None:
        return Source(name=named, format=first)
    image_format = _xml.child(element, "format")
    directory = _xml.child(element, "dir")
    iqn = _xml.child(_xml.child(element, "initiator"), "iqn")
    adapter = _xml.child(element, "adapter")
    return Source(
        hosts=tuple(Host(host.get("name") or "", _port(host.get("port"))) for host in element.findall("host")),
        name=_xml.text_of(element, "name") or named,
        dir=plain_path(None if directory is None else directory.get("path")),
        devices=tuple(plain_path(device.get("path")) or "" for device in element.findall("device")),
        format=(image_format.get("type") if image_format is not None else None) or first,
        initiator=None if iqn is None else iqn.get("name"),
        adapter=adapter.get("name") if _is_named(adapter) else None,
        auth=_auth(_xml.child(element, "auth")),
    )


def _auth(element: t.Any) -> t.Optional[Auth]:
    if element is None:
        return None
    secret = _xml.child(element, "secret")
    uuid, usage = (None, None) if secret is None else (secret.get("uuid"), secret.get("usage"))
    return Auth(element.get("type"), element.get("username"), _uuid(uuid), usage)


def _is_named(adapter: t.Any) -> bool:
    """Whether an adapter is stated by its name; others are by what only XML can say."""
    return adapter is not None and adapter.get("type", "scsi_host") == "scsi_host" and adapter.get("name") is not None


def _collect(element: t.Any, above: str, found: t.Dict[str, t.List[str]]) -> None:
    path = above + _short(element.tag)
    if path in _OUTPUT_ONLY:
        return
    attributes = [f"{_short(name)}={value}" for name, value in sorted(element.items())]
    if path == "source/device":
        attributes = attributes if len(attributes) > 1 else []
    elif path in _OWN_FIELDS or (path == "source/adapter" and _is_named(element)):
        attributes = []
    value = " ".join(attributes if path in _OWN_FIELDS else [*attributes, *(element.text or "").split()])
    children = list(element.iterchildren("*"))
    # An element for others, such as <features>, means nothing when it is empty.
    if value or not (children or path in _OWN_FIELDS or path in _BY_ATTRIBUTES or _holds_others(path)):
        found.setdefault(path, []).append(value)
    for below in children:
        _collect(below, f"{path}/", found)


def _holds_others(path: str) -> bool:
    return any(known.startswith(f"{path}/") for known in _KNOWN + _OWN_FIELDS)


def _short(tag: str) -> str:
    namespace, brace, name = tag[1:].partition("}") if tag.startswith("{") else ("", "", tag)
    return _NAMESPACES.get(namespace, f"{{{namespace}}}") + name if brace else name


def plain_path(text: t.Optional[str]) -> t.Optional[str]:
    """Less what means nothing in a path, as virFileSanitizePath has it, which keeps two slashes at the start."""
    return (re.sub("/+", "/", text).rstrip("/") or "/") if text else None


def _port(text: t.Optional[str]) -> t.Optional[int]:
    if not text:
        return None
    if re.fullmatch("[0-9]{1,5}", text) is None:
        raise CloneError("XML_ERROR", f"xml: malformed port {quoted(text)} of a host")
    return int(text) or None


def _uuid(text: t.Optional[str]) -> t.Optional[str]:
    if not text or not text.strip():
        return None
    try:
        return str(uuids.UUID(text.strip()))
    except ValueError:
        raise CloneError("XML_ERROR", f"xml: malformed uuid element {quoted(text)}") from None


def refuse_useless(pool_type: str, source: Source) -> None:
    """Refuse what a type has no use for: libvirt would drop it without a word.

    :raises CloneError: ``INVALID_ARG`` for a key of ``pool_source``, ``CONFIG_UNSUPPORTED`` for a format
    """
    known = TYPES[pool_type]
    for key, value in source.stated.items():
        if key not in (*known.needs, *known.may) and not (key == "format" and known.formats):
            raise CloneError("INVALID_ARG", f"pool_source.{key}: {value!r} has no use in a pool of the type {pool_type}")
    if source.format is not None and source.format not in known.formats:
        auto = ", of which auto takes any file system that the host can mount" if "auto" in known.formats else ""
        raise CloneError(
            "CONFIG_UNSUPPORTED",
            f"pool_source.format: {source.format!r} is no format of libvirt's for the type {pool_type}; those are"
            f" {', '.join(known.formats)}{auto}",
        )
    if source.auth and source.auth.type not in (None, known.auth):
        raise CloneError(
            "INVALID_ARG", f"pool_source.auth.type: a pool of the type {pool_type} has {known.auth}, not {source.auth.type}"
        )


# --- a new document -----------------------------------------------------------------------------------------------------


def merge(
    base: t.Optional[str],
    name: str,
    uuid: t.Optional[str],
    stated: Stated,
    spelled: t.Callable[[str], str] = lambda device: device,
) -> str:
    """The document ``base``, or an empty one, with what a task states in place of what it says about that.

    All else stays: the uuid, mount options, elements that libvirt may come to know.

    :param spelled: gives a device the name that the pool has for it, where that is another of its names
    :param uuid: of the pool that exists, for a document without one: libvirt takes a pool of another uuid for another pool
    :raises CloneError: ``XML_ERROR`` for a malformed base
    """
    etree = _xml.etree_module()
    root = _xml.parse(base, "pool") if base is not None else etree.Element("pool")
    if stated.type is not None:
        root.set("type", stated.type)
    known = TYPES.get(root.get("type") or "", PoolType())
    _set_text(root, "name", name)
    if uuid is not None and not (_xml.text_of(root, "uuid") or "").strip():
        _set_text(root, "uuid", uuid)
    source = _made(root, "source")
    if stated.hosts is not None:
        ports = {host.get("name"): host.get("port") for host in source.findall("host")}
        _set_all(source, "host", [_host(host, ports.get(host.name)) for host in stated.hosts])
    if stated.name is not None:
        _set_text(source, "name", stated.name)
    if stated.dir is not None:
        _set_all(source, "dir", [{"path": stated.dir}])
    if stated.devices is not None and stated.devices != tuple(device.get("path") for device in source.findall("device")):
        _set_all(source, "device", [{"path": device} for device in stated.devices])
    for device in source.findall("device"):
        device.set("path", spelled(device.get("path") or ""))
    if stated.format is not None:
        _set_all(source, "format", [{"type": stated.format}])
    if stated.initiator is not None:
        _set_all(_made(source, "initiator"), "iqn", [{"name": stated.initiator}])
    if stated.adapter is not None:
        _set_all(source, "adapter", [{"type": "scsi_host", "name": stated.adapter}])
    if stated.auth is not None:
        _set_auth(_made(source, "auth"), stated.auth, known)
    path = stated.target_path
    if path is None and known.path.startswith("/") and "{" not in known.path:
        path = _xml.text_of(_xml.child(root, "target"), "path") or known.path
    if path is not None:
        _set_text(_made(root, "target"), "path", path)
    return t.cast(str, etree.tostring(root, encoding="unicode", pretty_print=True))


def _made(parent: t.Any, tag: str) -> t.Any:
    found = _xml.child(parent, tag)
    return found if found is not None else _xml.etree_module().SubElement(parent, tag)


def _set_text(parent: t.Any, tag: str, text: str) -> None:
    _made(parent, tag).text = text


def _set_all(parent: t.Any, tag: str, all_attributes: t.Sequence[t.Mapping[str, str]]) -> None:
    for old in parent.findall(tag):
        parent.remove(old)
    for attributes in all_attributes:
        _xml.etree_module().SubElement(parent, tag, dict(attributes))


def _host(host: Host, port: t.Optional[str]) -> t.Dict[str, str]:
    """A port that is not stated stays what it was."""
    port = str(host.port) if host.port is not None else port
    return {"name": host.name, **({"port": port} if port else {})}


def _set_auth(element: t.Any, auth: Auth, known: PoolType) -> None:
    kind = auth.type or element.get("type") or known.auth
    if kind:
        element.set("type", kind)
    if auth.username is not None:
        element.set("username", auth.username)
    if auth.secret_uuid is not None:
        _set_all(element, "secret", [{"uuid": auth.secret_uuid}])
    elif auth.secret_usage is not None:
        _set_all(element, "secret", [{"usage": auth.secret_usage}])
