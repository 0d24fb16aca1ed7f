# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""libvirt's XML: volumes in and out, and the few things we ask of pools and domains.

A volume document may be anyone's. It is read as libvirt reads it (``virStorageVolDefParseXML`` in storage_conf.c), less
what two readers could understand in two ways: one element each, and only text in it.
"""

from __future__ import annotations

import re
import typing as t
from dataclasses import dataclass, field

from ._errors import CloneError
from ._units import quoted, scale

#: Bytes of UTF-8. A volume's document has about two thousand.
MAX_DOCUMENT = 1 << 20

_VOLUME_TYPES = ("file", "block", "dir", "network", "netdir", "ploop")
# virStorageFileFormat, without "none", which libvirt refuses here as well.
_FORMATS = [
    *("raw", "dir", "bochs", "cloop", "dmg", "iso", "vpc", "vdi", "fat", "vhd", "ploop", "cow", "qcow", "qcow2", "qed", "vmdk")
]
_FEATURES = ("lazy_refcounts", "extended_l2")
_QCOW2_ONLY = ("compat", "clusterSize", "features")
_BLANKS = " \t\r\n"
#: what a disk names: a path, or a pool and the name of a volume
DiskName = t.Union[str, t.Tuple[str, str]]
# uid_t and gid_t; the largest is -1, "leave it".
_MAX_ID = 2**32 - 1


@dataclass(frozen=True)
class VolumeXML:
    """What a volume document states; None for what it does not. Sizes in bytes.

    A feature that ``<features>`` does not list is not stated.
    """

    name: t.Optional[str] = None
    capacity: t.Optional[int] = None
    format: t.Optional[str] = None
    mode: t.Optional[int] = None
    owner: t.Optional[int] = None
    group: t.Optional[int] = None
    compat: t.Optional[str] = None
    cluster_size: t.Optional[int] = None
    lazy_refcounts: t.Optional[bool] = None
    extended_l2: t.Optional[bool] = None
    nocow: t.Optional[bool] = None
    backing_path: t.Optional[str] = None
    backing_format: t.Optional[str] = None
    encrypted: bool = False


@dataclass(frozen=True)
class VolumeStatus:
    """What libvirt tells of a volume besides: where it is, and what it occupies. Sizes in bytes; None where it does not say."""

    name: str
    type: str
    key: str
    path: str
    allocation: t.Optional[int] = None
    physical: t.Optional[int] = None
    label: t.Optional[str] = None


@dataclass(frozen=True)
class PoolXML:
    """A pool as libvirt describes it. ``target_path`` is None where the pool has none (rbd, gluster, iscsi-direct)."""

    type: str
    name: str
    uuid: t.Optional[str] = None
    target_path: t.Optional[str] = None


def parse_volume(document: str, device: bool = False) -> VolumeXML:
    """What a volume document states.

    :param device: whether it describes a device, whose format is of a partition or a file system, and none of an image

    Output-only elements (``key``, ``physical``, ``target/path``, ``target/timestamps``, …), ``allocation``, labels and
    elements that libvirt does not know are accepted and ignored, so that what ``virsh vol-dumpxml`` prints can be given
    back. The name is not judged here: who uses it as a file name has to.

    :raises CloneError: ``XML_ERROR`` for a document that is malformed or says something twice, ``CONFIG_UNSUPPORTED``
        for formats and features that do not exist or do not go together, ``INVALID_ARG`` for an unknown unit or too
        large a size
    """
    refuse_before_parsing(document)
    root = parse(document, "volume")
    volume_type = root.get("type")
    if volume_type and volume_type not in _VOLUME_TYPES:
        raise CloneError("CONFIG_UNSUPPORTED", f"xml: unknown volume type {quoted(volume_type)}")
    name = text_of(root, "name")
    if name == "":
        raise CloneError("XML_ERROR", "xml: the volume name element is empty")
    _size(root, "allocation")
    target = child(root, "target")
    image_format = None if device else _format(target)
    _refuse_qcow2_options(target, image_format)
    compat, features = _compat_and_features(target)
    mode, owner, group = permissions(target)
    backing = child(root, "backingStore")
    backing_path = text_of(backing, "path") or None
    permissions(backing)
    return VolumeXML(
        name=name,
        capacity=_size(root, "capacity"),
        format=image_format,
        mode=mode,
        owner=owner,
        group=group,
        compat=compat,
        # For libvirt 0 is the same as no element.
        cluster_size=_size(target, "clusterSize") or None,
        lazy_refcounts="lazy_refcounts" in features or None,
        extended_l2="extended_l2" in features or None,
        nocow=child(target, "nocow") is not None or None,
        backing_path=backing_path,
        backing_format=_format(backing) if backing_path else None,
        encrypted=child(target, "encryption") is not None,
    )


def volume_xml(
    *,
    name: str,
    capacity: int,
    allocation: int = 0,
    format: t.Optional[str] = None,  # pylint: disable=redefined-builtin
    mode: t.Optional[int] = None,
    owner: t.Optional[int] = None,
    group: t.Optional[int] = None,
    compat: t.Optional[str] = None,
    cluster_size: t.Optional[int] = None,
    lazy_refcounts: t.Optional[bool] = None,
    extended_l2: t.Optional[bool] = None,
    nocow: t.Optional[bool] = None,
    backing: t.Optional[t.Tuple[str, str]] = None,
) -> str:
    """A volume document for libvirt, valid by its storagevol.rng. Sizes in bytes.

    ``allocation`` is always written: libvirt takes a missing one for the whole capacity. ``backing`` is the path and the format
    of a backing store.

    :raises CloneError: ``INVALID_ARG`` for a name that XML cannot carry
    """
    etree = etree_module()
    root = etree.Element("volume")

    def add(parent: t.Any, tag: str, text: t.Optional[object], **attributes: str) -> None:
        if text is not None:
            etree.SubElement(parent, tag, **attributes).text = str(text)

    try:
        add(root, "name", name)
    except ValueError:
        raise CloneError("INVALID_ARG", f"name: {quoted(name)} contains a character that XML cannot carry") from None
    add(root, "capacity", capacity, unit="bytes")
    add(root, "allocation", allocation, unit="bytes")
    target = etree.SubElement(root, "target")
    if format is not None:
        etree.SubElement(target, "format", type=format)
    if (mode, owner, group) != (None, None, None):
        permissions = etree.SubElement(target, "permissions")
        add(permissions, "mode", None if mode is None else f"0{mode:o}")
        add(permissions, "owner", owner)
        add(permissions, "group", group)
    add(target, "compat", compat)
    if nocow:
        etree.SubElement(target, "nocow")
    add(target, "clusterSize", cluster_size, unit="bytes")
    if lazy_refcounts or extended_l2:
        features = etree.SubElement(target, "features")
        for feature, wanted in zip(_FEATURES, (lazy_refcounts, extended_l2)):
            if wanted:
                etree.SubElement(features, feature)
    if backing is not None:
        below = etree.SubElement(root, "backingStore")
        add(below, "path", backing[0])
        etree.SubElement(below, "format", type=backing[1])
    return t.cast(str, etree.tostring(root, encoding="unicode", pretty_print=True))


def volume_status(document: str) -> VolumeStatus:
    """Where a volume is and what it occupies, from what its ``XMLDesc`` returns."""
    root = parse(document, "volume")
    target = child(root, "target")
    path = text_of(target, "path") or ""
    return VolumeStatus(
        name=text_of(root, "name") or "",
        type=root.get("type") or "file",
        key=text_of(root, "key") or path,
        path=path,
        allocation=_size(root, "allocation"),
        physical=_size(root, "physical"),
        label=text_of(child(target, "permissions"), "label") or None,
    )


def volume_path(document: str) -> t.Optional[str]:
    """Where libvirt says that a volume is, from what its ``XMLDesc`` returns."""
    return text_of(child(parse(document, "volume"), "target"), "path") or None


def pool_target(document: str) -> PoolXML:
    """Type, name, uuid and target path of a pool, from what its ``XMLDesc`` returns.

    :raises CloneError: ``XML_ERROR`` when that is no pool document
    """
    root = parse(document, "pool")
    return PoolXML(
        type=root.get("type") or "",
        name=text_of(root, "name") or "",
        uuid=text_of(root, "uuid") or None,
        target_path=text_of(child(root, "target"), "path") or None,
    )


@dataclass(frozen=True)
class NetworkXML:
    """How a pool's storage is reached by the network. A port is None where the document has none."""

    hosts: t.Tuple[t.Tuple[str, t.Optional[int]], ...] = ()
    name: t.Optional[str] = None
    devices: t.Tuple[str, ...] = ()
    initiator: t.Optional[str] = None
    user: t.Optional[str] = None
    secret_uuid: t.Optional[str] = None
    secret_usage: t.Optional[str] = None
    #: settings for the client, of which libvirt takes no notice itself
    options: t.Mapping[str, str] = field(default_factory=dict)


def pool_network(document: str) -> NetworkXML:
    """Where a pool has its volumes, from what its ``XMLDesc`` returns."""
    root = parse(document, "pool")
    source = child(root, "source")
    auth = child(source, "auth")
    secret = child(auth, "secret")
    iqn = child(child(source, "initiator"), "iqn")
    options = root.findall("{http://libvirt.org/schemas/storagepool/rbd/1.0}config_opts/*")
    return NetworkXML(
        tuple((host.get("name") or "", int(host.get("port") or 0) or None) for host in source.findall("host")),
        text_of(source, "name") or None,
        tuple(device.get("path") or "" for device in source.findall("device")),
        None if iqn is None else iqn.get("name"),
        None if auth is None else auth.get("username"),
        None if secret is None else secret.get("uuid"),
        None if secret is None else secret.get("usage"),
        {option.get("name") or "": option.get("value") or "" for option in options},
    )


@dataclass(frozen=True)
class NetworkDisk:
    """A domain's disk on the network; the same disk has the same ``protocol`` and ``name``."""

    protocol: str
    name: str
    hosts: t.Tuple[str, ...] = field(default=(), compare=False)


def domain_network_disks(document: str, writing: bool = False) -> t.List[NetworkDisk]:
    """What a domain's disks use on the network, at any depth as in :func:`domain_disks`, or only what it writes to."""
    disks = []
    for source in _disk_sources(document, writing):
        if source.get("protocol"):
            hosts = tuple(host.get("name") or "" for host in source.findall("host"))
            disks.append(NetworkDisk(source.get("protocol"), source.get("name") or "", hosts))
    return disks


def domain_volumes(document: str, writing: bool = False) -> t.List[t.Tuple[str, str]]:
    """Pool and name of the volumes that a domain's disks name as such (``type='volume'``), or only those it writes to."""
    sources = _disk_sources(document, writing)
    return [(source.get("pool"), source.get("volume")) for source in sources if source.get("pool") and source.get("volume")]


def domain_disks(document: str) -> t.List[str]:
    """Paths of all files and devices that a domain's disks use: images, backing chains, data files, mirrors.

    Each once, in the order of the domain's ``XMLDesc``. Disks that name a volume of a pool (``type='volume'``) or
    something on the network have no path there.

    :raises CloneError: ``XML_ERROR`` when that is no domain document
    """
    root = parse(document, "domain")
    paths = [
        element.get(attribute)
        for disk in root.findall("devices/disk")
        # At any depth: backingStore, mirror and dataStore have sources of their own, and older mirrors are one.
        for element in disk.iter("source", "mirror")
        for attribute in ("file", "dev")
    ]
    return list(dict.fromkeys(path for path in paths if path))


def domain_uses(document: str, writing: bool = False) -> t.Set[DiskName]:
    """What a domain's disks name: the paths of :func:`domain_disks`, and volumes of pools.

    :param writing: only what the domain writes to: no layers below a disk, and no disk that is only read
    :raises CloneError: ``XML_ERROR`` when that is no domain document
    """
    found: t.Set[DiskName] = set()
    for element in _disk_sources(document, writing):
        # An image of Ceph has its name for a path.
        named = element.get("name") if element.get("protocol") == "rbd" else None
        found.update(value for value in (element.get("file"), element.get("dev"), named) if value)
        if element.get("pool") and element.get("volume"):
            found.add((element.get("pool"), element.get("volume")))
    return found


def _disk_sources(document: str, writing: bool) -> t.Iterator[t.Any]:
    """Elements that name what a domain's disks use; ``writing`` as in :func:`domain_uses`."""
    for disk in parse(document, "domain").findall("devices/disk"):
        if not writing:
            yield from disk.iter("source", "mirror")
        elif disk.find("readonly") is None:
            # What is being copied to is written to as well (virDomainDiskDefMirrorParse).
            yield from (*disk.findall("source"), *disk.findall("mirror"), *disk.findall("mirror/source"))


def domain_pools(document: str) -> t.List[str]:
    """Names of the pools in which a domain's disks are volumes (``type='volume'``).

    :raises CloneError: ``XML_ERROR`` when that is no domain document
    """
    root = parse(document, "domain")
    return [source.get("pool") for source in root.findall("devices/disk/source[@pool]")]


def etree_module() -> t.Any:
    try:
        from lxml import etree  # type: ignore[import-untyped,unused-ignore]  # pylint: disable=import-outside-toplevel
    except ImportError as exc:
        raise CloneError(
            "MISSING_DEPENDENCY",
            "xml: XML and libvirt pools need the Python package lxml (python3-lxml) on the managed host",
        ) from exc
    return etree


def refuse_before_parsing(document: str, tag: str = "volume") -> None:
    # The parser has no such limit: lxml 4.9 takes an element of 11 MiB.
    size = len(document.encode("utf-8", "surrogatepass"))
    if size > MAX_DOCUMENT:
        raise CloneError("XML_ERROR", f"xml: the document has {size} bytes, more than {MAX_DOCUMENT}")
    # For libvirt, and for some versions of libxml2, the document ends here.
    if "\0" in document:
        raise CloneError("XML_ERROR", "xml: the document contains a NUL character")
    # A document type declares entities: files to read, hosts to connect to, texts that grow without limit. Volumes
    # and pools need none. Refused before the parser can act on it; a mere mention, in a comment, is refused as well.
    if "<!DOCTYPE" in document:
        raise CloneError("XML_ERROR", f"xml: the document has a DOCTYPE, which {tag} XML may not have")


def parse(document: str, tag: str) -> t.Any:
    etree = etree_module()
    parser = etree.XMLParser(
        # The characters are known, whatever encoding the document claims; and lxml refuses a str that claims one.
        encoding="utf-8",
        resolve_entities=False,
        no_network=True,
        load_dtd=False,
        dtd_validation=False,
        huge_tree=False,
        recover=False,
        # Kept, to be seen: libvirt would join the text around a comment, lxml's .text ends at it.
        remove_comments=False,
        remove_pis=False,
    )
    try:
        root = etree.fromstring(document.lstrip(_BLANKS).encode("utf-8"), parser)
    except UnicodeEncodeError:
        raise CloneError("XML_ERROR", "xml: the document is not valid text") from None
    except etree.XMLSyntaxError as exc:
        raise CloneError("XML_ERROR", f"xml: the document is not well-formed: {_one_line(exc.msg)}") from None
    if root.getroottree().docinfo.doctype:
        # With resolve_entities=False an element that holds an entity is read as empty: refuse, or a text goes missing.
        raise CloneError("XML_ERROR", f"xml: the document has a DOCTYPE, which {tag} XML may not have")
    if root.tag != tag:
        raise CloneError("XML_ERROR", f"xml: expecting root element of '{tag}', not {quoted(root.tag)}")
    return root


def _one_line(message: t.Optional[str]) -> str:
    return " ".join((message or "no element found").split())[:200]


def child(parent: t.Any, name: str) -> t.Any:
    """The one child element of that name, None where parent or child is missing.

    Elements of other namespaces are not libvirt's, and not seen.
    """
    found = [] if parent is None else parent.findall(name)
    if len(found) > 1:
        # libvirt takes the first without a word: whoever reviewed the document may have seen the other.
        raise CloneError("XML_ERROR", f"xml: element <{name}> appears {len(found)} times in <{parent.tag}>")
    return found[0] if found else None


def text_of(parent: t.Any, name: str) -> t.Optional[str]:
    """The text of a child element, as it stands: None without the element, "" when it is empty."""
    element = child(parent, name)
    if element is None:
        return None
    if len(element):
        raise CloneError("XML_ERROR", f"xml: element <{name}> contains more than plain text")
    return element.text or ""


def _size(parent: t.Any, name: str) -> t.Optional[int]:
    number = text_of(parent, name)
    # libvirt takes an empty element for a missing one.
    return scale(number, child(parent, name).get("unit"), name) if number else None


def _format(parent: t.Any) -> t.Optional[str]:
    element = child(parent, "format")
    value = element.get("type") if element is not None else None
    if not value:
        return None
    if value not in _FORMATS:
        raise CloneError("CONFIG_UNSUPPORTED", f"xml: unknown volume format type {quoted(value)}")
    return "raw" if value == "iso" else t.cast(str, value)


def _refuse_qcow2_options(target: t.Any, image_format: t.Optional[str]) -> None:
    for name in _QCOW2_ONLY:
        if image_format not in (None, "qcow2") and child(target, name) is not None:
            raise CloneError(
                "CONFIG_UNSUPPORTED", f"xml: <{name}> is only available with qcow2, not with format {image_format}"
            )


def _compat_and_features(target: t.Any) -> t.Tuple[t.Optional[str], t.Sequence[str]]:
    compat = text_of(target, "compat") or None
    if compat and not re.fullmatch(r"[0-9]+\.[0-9]+", compat):
        raise CloneError("XML_ERROR", f"xml: forbidden characters in 'compat' attribute: {quoted(compat)}")
    if compat and compat not in ("0.10", "1.1"):
        raise CloneError("CONFIG_UNSUPPORTED", f"xml: compat is 0.10 or 1.1, not {quoted(compat)}")
    element = child(target, "features")
    if element is None:
        return compat, ()
    features = [feature.tag for feature in element.iterchildren("{}*")]
    for feature in features:
        if feature not in _FEATURES:
            raise CloneError("CONFIG_UNSUPPORTED", f"xml: unsupported feature {quoted(feature)}")
        if compat == "0.10":
            raise CloneError("CONFIG_UNSUPPORTED", f"xml: {feature} is not supported with compat level 0.10")
        child(element, feature)
    return compat or "1.1", features


def permissions(parent: t.Any) -> t.Tuple[t.Optional[int], t.Optional[int], t.Optional[int]]:
    """Mode, owner and group (``virStorageDefParsePerms``)."""
    element = child(parent, "permissions")
    mode = None
    text = text_of(element, "mode")
    if text:
        digits = text.lstrip(_BLANKS)
        if re.fullmatch("[0-7]+", digits) is None or int(digits, 8) > 0o777:
            raise CloneError("XML_ERROR", f"xml: malformed octal mode {quoted(text)}")
        mode = int(digits, 8)
    return mode, _id(element, "owner"), _id(element, "group")


def _id(parent: t.Any, name: str) -> t.Optional[int]:
    text = text_of(parent, name)
    if text is None or text.strip(_BLANKS) == "-1":
        return None
    # Decimal, with leading zeros: libvirt reads 0744 as 744 here. The length is bounded before int() sees it.
    match = re.fullmatch("0*([0-9]{1,10})", text.strip(_BLANKS))
    if match is None or int(match.group(1)) > _MAX_ID:
        raise CloneError("XML_ERROR", f"xml: malformed {name} element: {quoted(text)} is not a numeric id")
    value = int(match.group(1))
    return None if value == _MAX_ID else value
