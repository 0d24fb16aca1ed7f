# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the task asks for, typed and checked, before anything is looked at: a clone, or a blank volume.

A parameter wins over the volume XML; what neither states is None here and gets its default from the facts, in the planner.
"""

from __future__ import annotations

import os
import typing as t
from dataclasses import dataclass, field

from .. import _units, _xml
from .._deadline import stated_seconds
from .._errors import CloneError
from .._images.probe import FORMATS, Image, Qcow2Features
from .._import import options
from .._import.options import Options, name_of
from .._names import check_name, check_path, check_pool
from .._permissions import Mode, group_id, user_id
from .._uri import is_elsewhere

#: Endings of image files; anything else after a dot belongs to the name ("debian-12.1").
_ENDINGS = ("raw", "img", "iso", "bin", "qcow2", "qcow", "qed", "vmdk", "vdi", "vhdx", "vhd", "vpc")
_RAW_ENDINGS = ("raw", "img", "iso", "bin")
_COMPRESSION_ENDINGS = ("gz", "bz2", "xz", "zst")
#: Other names for raw: libvirt reads and writes an iso as raw.
_RAW_ALIASES = ("iso", "img")


@dataclass(frozen=True)
class Request:
    """One volume as the task and its XML state it. Sizes in bytes; None is "not stated"."""

    pool: str
    uri: str = "qemu:///system"
    name: t.Optional[str] = None
    source: t.Optional[str] = None
    source_path: t.Optional[str] = None
    #: as stated; that of a file of this host is a ``source_path`` too
    source_url: t.Optional[str] = None
    #: how a source that comes from outside is fetched, checked and unpacked
    outside: Options = field(default_factory=Options)
    source_pool: t.Optional[str] = None
    source_format: t.Optional[str] = None
    format: t.Optional[str] = None
    capacity: t.Optional[int] = None
    allow_shrink: bool = False
    clone_type: t.Optional[str] = None
    preallocation: str = "off"
    qcow2: t.Mapping[str, t.Any] = field(default_factory=dict)
    nocow: t.Optional[bool] = None
    encrypted: bool = False
    #: the backing store that the XML states; only a linked clone has one
    backing_path: t.Optional[str] = None
    backing_format: t.Optional[str] = None
    #: whether a volume that has a backing store is made to stand alone
    flatten: bool = False
    method: str = "auto"
    resize: bool = True
    compare: str = "metadata"
    force: bool = False
    owner: t.Optional[int] = None
    group: t.Optional[int] = None
    mode: t.Optional[Mode] = None
    #: stated parts of the SELinux context: user, role, type, level
    label: t.Mapping[str, str] = field(default_factory=dict)
    source_in_use: str = "fail"
    lock_timeout: float = 300.0
    timeout: t.Optional[float] = None
    max_capacity: int = 64 << 40
    #: bytes per second
    bwlimit: t.Optional[int] = None
    verify: bool = False
    #: directory where what cannot be staged in the pool is: its volumes are devices, or on another host
    tmpdir: str = "/var/tmp"

    @property
    def blank(self) -> bool:
        """Whether the volume is made from nothing."""
        return self.source is None and self.source_path is None and self.source_url is None

    @property
    def linked(self) -> bool:
        return self.clone_type == "linked"

    @property
    def effective_source_pool(self) -> str:
        return self.source_pool if self.source_pool is not None else self.pool

    @property
    def source_name(self) -> str:
        """The last component of the source: what a made-up name is made from."""
        if self.outside.url is not None:
            return name_of(self.outside.url)
        return self.source if self.source is not None else os.path.basename(self.source_path or "")

    @property
    def own_blocks(self) -> bool:
        """Whether the volume shall have blocks that nobody shares."""
        return self.method == "copy" or self.preallocation in ("falloc", "full")

    def target_format(self, source: t.Optional[Image]) -> t.Optional[str]:
        """The format asked for; None when it is not stated and the source that would give it is gone."""
        return self.format or ("qcow2" if self.linked else source.format if source else None)


def from_parameters(params: t.Mapping[str, t.Any], on_host: bool = True) -> Request:
    """Check the module's parameters and its XML.

    :param on_host: whether names of users and groups mean something here; elsewhere they are not looked up
    :raises CloneError: ``INVALID_ARG``, ``XML_ERROR`` or ``CONFIG_UNSUPPORTED``, naming the parameter and its value
    """
    xml = _xml.parse_volume(params["xml"]) if params.get("xml") is not None else _xml.VolumeXML()

    def stated(parameter: str, in_xml: t.Any) -> t.Any:
        return params[parameter] if params.get(parameter) is not None else in_xml

    name = stated("name", xml.name)
    if name is not None:
        check_name(name, "name")
    if params.get("source") is not None:
        check_name(params["source"], "source")
    if params.get("source_path") is not None:
        check_path(params["source_path"], "source_path")
    for parameter in ("pool", "source_pool"):
        if params.get(parameter) is not None:
            check_pool(params[parameter], parameter)
    outside, path_in_url = options.from_parameters(params)
    if outside.url is not None:
        _check_outside(params, outside.url, name)
    image_format = _check_format(stated("format", xml.format), "format")
    capacity = params.get("capacity")
    return Request(
        pool=params["pool"],
        uri=params.get("uri") or "qemu:///system",
        name=name,
        source=params.get("source"),
        source_path=path_in_url or params.get("source_path"),
        source_url=params.get("source_url"),
        outside=outside,
        source_pool=params.get("source_pool"),
        source_format=_check_format(params.get("source_format"), "source_format"),
        format=image_format,
        capacity=_units.parse_capacity(capacity, "capacity") if capacity is not None else xml.capacity,
        allow_shrink=bool(params.get("allow_shrink")),
        clone_type=params.get("clone_type"),
        preallocation=params.get("preallocation") or "off",
        qcow2=_qcow2_options(params.get("qcow2") or {}, xml, image_format),
        nocow=_nocow(params.get("qcow2") or {}, xml),
        encrypted=xml.encrypted,
        backing_path=xml.backing_path,
        backing_format=xml.backing_format,
        flatten=bool(params.get("flatten")),
        method=params.get("method") or "auto",
        resize=params.get("resize") is not False,
        compare=params.get("compare") or "metadata",
        force=bool(params.get("force")),
        owner=_account(params, "owner", user_id, on_host) if params.get("owner") is not None else xml.owner,
        group=_account(params, "group", group_id, on_host) if params.get("group") is not None else xml.group,
        mode=_mode(params.get("mode"), xml.mode),
        label={part: params[f"se{part}"] for part in ("user", "role", "type", "level") if params.get(f"se{part}") is not None},
        source_in_use=params.get("source_in_use") or "fail",
        lock_timeout=stated_seconds(params, "lock_timeout", 300.0),
        timeout=stated_seconds(params, "timeout", None),
        max_capacity=_units.parse_capacity(params.get("max_capacity", "64TiB"), "max_capacity"),
        bwlimit=_bwlimit(params.get("bwlimit")),
        verify=bool(params.get("verify")),
        tmpdir=os.environ.get("TMPDIR") or "/var/tmp",
    )


def _check_outside(params: t.Mapping[str, t.Any], url: str, name: t.Optional[str]) -> None:
    """What does not go with a source that is there only while it is cloned."""
    if params.get("clone_type") == "linked":
        raise CloneError(
            "INVALID_ARG",
            "clone_type=linked has no meaning for a source_url: a linked clone reads from its source for as long as it lives;"
            " clone the image into a pool, and link to that",
        )
    if params.get("method") == "libvirt":
        raise CloneError("INVALID_ARG", "method=libvirt has no meaning for a source_url: libvirt clones volumes of its pools")
    if name is None and not name_of(url):
        raise CloneError("INVALID_ARG", "name: state it; the path of source_url ends in no name to make one from")


def many_from_parameters(params: t.Mapping[str, t.Any], on_host: bool = True) -> t.List[Request]:
    """One request for each entry of ``volumes``; what it does not state is as the task states it.

    :raises CloneError: as :func:`from_parameters`, naming the entry
    """
    requests: t.List[Request] = []
    names = set()
    for number, entry in enumerate(params["volumes"]):
        stated = {key: value for key, value in entry.items() if value is not None}
        try:
            requests.append(from_parameters({**params, **stated}, on_host))
        except CloneError as exc:
            raise CloneError(exc.code, f"volumes[{number}] ({entry['name']!a}): {exc.msg}") from None
        if entry["name"] in names:
            raise CloneError("INVALID_ARG", f"volumes[{number}]: name: {entry['name']!a} appears twice")
        names.add(entry["name"])
    if not requests:
        raise CloneError("INVALID_ARG", "volumes: [] names no volume")
    return requests


def blank_from_parameters(params: t.Mapping[str, t.Any], on_host: bool = True) -> Request:
    """Check the parameters and the XML of a volume that is made from nothing.

    :raises CloneError: as :func:`from_parameters`, and ``NO_SUPPORT`` for XML that describes another kind of volume
    """
    request = from_parameters(params, on_host)
    if request.name is None:
        raise CloneError("INVALID_ARG", "name: neither the parameter nor the XML states it")
    if request.encrypted:
        raise CloneError("NO_SUPPORT", "xml: <encryption> is not possible; an encrypted volume can be cloned, not made")
    if request.backing_path is not None:
        raise CloneError(
            "NO_SUPPORT", "xml: <backingStore> is not possible for a blank volume; storage_volume_clone makes linked clones"
        )
    return request


def _check_format(value: t.Optional[str], parameter: str) -> t.Optional[str]:
    if value is None:
        return None
    value = value.lower()
    if value in _RAW_ALIASES:
        return "raw"
    if value not in FORMATS:
        raise CloneError(
            "CONFIG_UNSUPPORTED", f"{parameter}: {value!r} is no format that a clone can have; those are {', '.join(FORMATS)}"
        )
    return value


def _qcow2_options(given: t.Mapping[str, t.Any], xml: _xml.VolumeXML, image_format: t.Optional[str]) -> t.Dict[str, t.Any]:
    stated = {key: value for key, value in given.items() if value is not None}
    if stated and image_format not in (None, "qcow2"):
        raise CloneError("INVALID_ARG", f"qcow2: {sorted(stated)} has no meaning for format={image_format}")
    options: t.Dict[str, t.Any] = {}
    if image_format in (None, "qcow2"):
        # Of the XML of a qcow2 volume, with another format stated by the parameter that wins over it, nothing is left.
        options = {
            "compat": xml.compat,
            "cluster_size": xml.cluster_size,
            "lazy_refcounts": xml.lazy_refcounts,
            "extended_l2": xml.extended_l2,
        }
    options.update(stated)
    size = options.get("cluster_size")
    if isinstance(size, str):
        size = options["cluster_size"] = _units.parse_capacity(size, "qcow2.cluster_size")
    if size is not None and (size & (size - 1) or not 512 <= size <= 2 << 20):
        raise CloneError("INVALID_ARG", f"qcow2.cluster_size: {size} is not a power of two between 512 and 2097152 bytes")
    return {key: value for key, value in options.items() if value is not None}


def _nocow(given: t.Mapping[str, t.Any], xml: _xml.VolumeXML) -> t.Optional[bool]:
    return given["nocow"] if given.get("nocow") is not None else xml.nocow


def qcow2_features(stated: t.Mapping[str, t.Any], source: t.Optional[Qcow2Features]) -> Qcow2Features:
    """The options of a new qcow2 volume: stated, else the source's, else libvirt's and qemu-img's defaults.

    :raises CloneError: ``CONFIG_UNSUPPORTED`` for what version 2 images (compat 0.10) cannot have
    """
    newer = [
        option
        for option, default in (
            ("lazy_refcounts", False),
            ("extended_l2", False),
            ("compression_type", "zlib"),
            ("refcount_bits", 16),
        )
        if stated.get(option, default) != default
    ]
    compat = stated.get("compat") or ("1.1" if newer or source is None else source.compat)
    if compat == "0.10" and newer:
        raise CloneError("CONFIG_UNSUPPORTED", f"qcow2.{newer[0]} is not possible with compat 0.10")
    if source is None or compat == "0.10" != source.compat:
        # Options that the source has but version 2 cannot have fall back to the defaults.
        source = Qcow2Features(compat, source.cluster_size if source else 65536)
    features = Qcow2Features(
        compat,
        stated.get("cluster_size", source.cluster_size),
        stated.get("lazy_refcounts", source.lazy_refcounts),
        stated.get("extended_l2", source.extended_l2),
        stated.get("compression_type", source.compression_type),
        stated.get("refcount_bits", source.refcount_bits),
    )
    if features.extended_l2 and features.cluster_size < 16384:
        raise CloneError(
            "CONFIG_UNSUPPORTED", f"qcow2.extended_l2 needs a cluster_size of 16384 bytes or more, not {features.cluster_size}"
        )
    return features


def made_up_name(source_name: str, image_format: t.Optional[str], source_format: t.Optional[str]) -> str:
    """``base.qcow2`` becomes ``base-clone.qcow2``; the ending follows the target's format. The same on each run.

    :raises CloneError: ``INVALID_ARG`` when the result is no valid name
    """
    stem, dot, ending = source_name.rpartition(".")
    if dot and stem and ending.lower() in _COMPRESSION_ENDINGS:
        source_name = stem
        stem, dot, ending = source_name.rpartition(".")
    if not (dot and stem and ending.lower() in _ENDINGS):
        stem, ending = source_name, ""
    unchanged = image_format is None or (not ending and image_format == source_format)
    kept = ending if unchanged or _names_format(ending, image_format) else image_format
    name = f"{stem}-clone.{kept}" if kept else f"{stem}-clone"
    check_name(name, "name (made from the source)")
    return name


def _names_format(ending: str, image_format: t.Optional[str]) -> bool:
    known = {"raw": _RAW_ENDINGS, "vpc": ("vpc", "vhd")}.get(image_format or "", (image_format,))
    return ending.lower() in known


def _bwlimit(value: t.Optional[str]) -> t.Optional[int]:
    if value is None:
        return None
    limit = _units.parse_capacity(value, "bwlimit")
    if limit == 0:
        raise CloneError("INVALID_ARG", f"bwlimit: {_units.quoted(value)} a second would never get done")
    return limit


def _account(params: t.Mapping[str, t.Any], parameter: str, look_up: t.Callable[[str], int], on_host: bool) -> t.Optional[int]:
    value = params[parameter]
    if is_elsewhere(params.get("uri") or "", params["pool"]) and not value.isdecimal():
        raise CloneError(
            "NO_SUPPORT",
            f"{parameter}: {_units.quoted(value)} may be another number on the host of pool {params['pool']!r} than here;"
            " state the number",
        )
    return look_up(value) if on_host else None


def _mode(value: t.Union[int, str, None], in_xml: t.Optional[int]) -> t.Optional[Mode]:
    if value is not None:
        return Mode(value)
    return Mode(in_xml) if in_xml is not None else None
