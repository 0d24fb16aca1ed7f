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
from dataclasses import dataclass, field, replace

from .. import _xml
from .._errors import CloneError
from .._units import quoted

_NAMESPACES = {
    "http://libvirt.org/schemas/storagepool/fs/1.0": "fs:",
    "http://libvirt.org/schemas/storagepool/rbd/1.0": "rbd:",
}
# libvirt prints them, and takes no notice of them in a definition; the permissions count where a directory is made.
_OUTPUT_ONLY = ("capacity", "allocation", "available", "target/permissions", "target/timestamps")
# What parameters exist for, read one by one.
_OWN_FIELDS = ("name", "uuid", "source/name", "source/host", "source/dir", "source/format", "target/path")
# All else that libvirt reads. It drops an element that it does not know without a word, so that it would differ each time.
_KNOWN = (
    *("features/cow", "refresh/volume", "fs:mount_opts/fs:option", "rbd:config_opts/rbd:option"),
    *("source/device", "source/device/freeExtent", "source/protocol", "source/vendor", "source/product"),
    *("source/initiator/iqn", "source/auth", "source/auth/secret"),
    *("source/adapter", "source/adapter/parentaddr", "source/adapter/parentaddr/address"),
)


@dataclass(frozen=True)
class PoolType:
    """What a definition of a type states. ``needs`` are keys of ``pool_source``; it has no others, but ``format``."""

    needs: t.Tuple[str, ...] = ()
    #: values of ``pool_source.format``; the first is libvirt's default
    formats: t.Tuple[str, ...] = ()
    #: whether starting the pool mounts something at its target path
    mounts: bool = False
    #: whether there is something that ``build`` could format
    builds: bool = False


#: The types that a task can define. Their formats are libvirt's, virStoragePoolFormatFileSystem and …FileSystemNet.
TYPES = {
    "dir": PoolType(),
    "fs": PoolType(
        needs=("devices",),
        formats=(
            *("auto", "ext2", "ext3", "ext4", "ufs", "iso9660", "udf", "gfs", "gfs2", "vfat", "hfs+", "xfs", "ocfs2", "vmfs"),
        ),
        mounts=True,
        builds=True,
    ),
    "netfs": PoolType(needs=("hosts", "dir"), formats=("auto", "nfs", "glusterfs", "cifs"), mounts=True),
}


@dataclass(frozen=True)
class Host:
    name: str
    port: t.Optional[int] = None


@dataclass(frozen=True)
class Source:
    """``pool_source``: empty or None is what the document does not state."""

    hosts: t.Tuple[Host, ...] = ()
    name: t.Optional[str] = None
    dir: t.Optional[str] = None
    devices: t.Tuple[str, ...] = ()
    format: t.Optional[str] = None

    @property
    def stated(self) -> t.Dict[str, t.Any]:
        """As a task writes it, less what is not stated."""
        written = {
            "hosts": [{"name": host.name, **({"port": host.port} if host.port else {})} for host in self.hosts],
            "name": self.name,
            "dir": self.dir,
            "devices": list(self.devices),
            "format": self.format,
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
        return self._meaning() == other._meaning()

    def _meaning(self) -> Definition:
        source = self.source
        if source.format == "glusterfs" and source.dir:
            # A volume's name, which mount(8) takes with and without the slash.
            source = replace(source, dir=source.dir.lstrip("/"))
        return replace(self, source=source)


@dataclass(frozen=True)
class Stated:
    """The definition as far as a task's parameters state it; None is "not stated"."""

    type: t.Optional[str] = None
    target_path: t.Optional[str] = None
    hosts: t.Optional[t.Tuple[str, ...]] = None
    dir: t.Optional[str] = None
    devices: t.Optional[t.Tuple[str, ...]] = None
    format: t.Optional[str] = None


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
    return Definition(
        type=pool_type,
        name=_xml.text_of(root, "name") or "",
        uuid=_uuid(_xml.text_of(root, "uuid")),
        target_path=_path(_xml.text_of(target, "path")),
        source=_source(_xml.child(root, "source"), pool_type),
        permissions=_xml.permissions(target),
        others={path: tuple(sorted(values)) for path, values in others.items()},
    )


def _source(element: t.Any, pool_type: str) -> Source:
    known = TYPES.get(pool_type, PoolType())
    if element is None:
        return Source(format=known.formats[0] if known.formats else None)
    image_format = _xml.child(element, "format")
    directory = _xml.child(element, "dir")
    return Source(
        hosts=tuple(Host(host.get("name") or "", _port(host.get("port"))) for host in element.findall("host")),
        name=_xml.text_of(element, "name") or None,
        dir=_path(None if directory is None else directory.get("path")),
        devices=tuple(_path(device.get("path")) or "" for device in element.findall("device")),
        format=(image_format.get("type") if image_format is not None else None) or (known.formats or (None,))[0],
    )


def _collect(element: t.Any, above: str, found: t.Dict[str, t.List[str]]) -> None:
    path = above + _short(element.tag)
    if path in _OUTPUT_ONLY or path in _OWN_FIELDS:
        return
    attributes = [f"{_short(name)}={value}" for name, value in sorted(element.items())]
    if path == "source/device":
        attributes = attributes if len(attributes) > 1 else []
    value = " ".join([*attributes, *(element.text or "").split()])
    children = list(element.iterchildren("*"))
    # An element for others, such as <features>, means nothing when it is empty.
    if value or not (children or any(known.startswith(f"{path}/") for known in _KNOWN + _OWN_FIELDS)):
        found.setdefault(path, []).append(value)
    for below in children:
        _collect(below, f"{path}/", found)


def _short(tag: str) -> str:
    namespace, brace, name = tag[1:].partition("}") if tag.startswith("{") else ("", "", tag)
    return _NAMESPACES.get(namespace, f"{{{namespace}}}") + name if brace else name


def _path(text: t.Optional[str]) -> t.Optional[str]:
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
        if key not in known.needs and not (key == "format" and known.formats):
            raise CloneError("INVALID_ARG", f"pool_source.{key}: {value!r} has no use in a pool of the type {pool_type}")
    if source.format is not None and source.format not in known.formats:
        raise CloneError(
            "CONFIG_UNSUPPORTED",
            f"pool_source.format: {source.format!r} is no format of libvirt's for the type {pool_type}; those are"
            f" {', '.join(known.formats)}, of which auto takes any file system that the host can mount",
        )


# --- a new document -----------------------------------------------------------------------------------------------------


def merge(base: t.Optional[str], name: str, uuid: t.Optional[str], stated: Stated) -> str:
    """The document ``base``, or an empty one, with what a task states in place of what it says about that.

    All else stays: the uuid, mount options, elements that libvirt may come to know.

    :param uuid: of the pool that exists, for a document without one: libvirt takes a pool of another uuid for another pool
    :raises CloneError: ``XML_ERROR`` for a malformed base
    """
    etree = _xml.etree_module()
    root = _xml.parse(base, "pool") if base is not None else etree.Element("pool")
    if stated.type is not None:
        root.set("type", stated.type)
    _set_text(root, "name", name)
    if uuid is not None and not (_xml.text_of(root, "uuid") or "").strip():
        _set_text(root, "uuid", uuid)
    source = _made(root, "source")
    if stated.hosts is not None:
        ports = {host.get("name"): host.get("port") for host in source.findall("host")}
        _set_all(
            source, "host", [{"name": host, **({"port": ports[host]} if ports.get(host) else {})} for host in stated.hosts]
        )
    if stated.dir is not None:
        _set_all(source, "dir", [{"path": stated.dir}])
    if stated.devices is not None and stated.devices != tuple(device.get("path") for device in source.findall("device")):
        _set_all(source, "device", [{"path": device} for device in stated.devices])
    if stated.format is not None:
        _set_all(source, "format", [{"type": stated.format}])
    if stated.target_path is not None:
        _set_text(_made(root, "target"), "path", stated.target_path)
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
