# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the first bytes of a volume say: its format, its capacity, and what it refers to.

Nothing here trusts an image. Headers are read with a few bounded reads; a field that points outside the file or
claims what cannot be is ``CORRUPT_IMAGE``; a file that could be read as two formats is ``UNSAFE_IMAGE`` until
somebody pins one (CVE-2008-2004 and its many successors: a guest that writes an image header into its raw disk must not
decide how the host reads it).
"""

from __future__ import annotations

import os
import re
import struct
import typing as t
from dataclasses import dataclass

from .._errors import CloneError

#: Formats that a clone may have, each named as libvirt and qemu-img name it.
FORMATS = ("raw", "qcow2", "vmdk", "vdi", "vhdx", "vpc", "qed", "qcow")
#: Formats whose capacity qemu-img can change in place.
GROWABLE = ("raw", "qcow2", "qed")
#: Formats between which a conversion can share blocks: those whose drivers in QEMU copy ranges (bdrv_co_copy_range).
SHARING = ("raw", "qcow2")
# qemu-img makes them with a capacity of 0, and then cannot open them (7.2).
EMPTY_UNREADABLE = ("vmdk", "qcow")
#: Formats that "qemu-img check" knows.
CHECKABLE = ("qcow2", "qed", "vmdk", "vdi", "vhdx")
#: Every format but raw counts in sectors.
SECTOR = 512

_QCOW2_DIRTY, _QCOW2_CORRUPT, _QCOW2_DATA_FILE, _QCOW2_COMPRESSION, _QCOW2_EXTENDED_L2 = (1 << n for n in range(5))
_QCOW2_KNOWN = (1 << 5) - 1
_QCOW2_LAZY_REFCOUNTS = 1
_EXT_END, _EXT_BACKING_FORMAT, _EXT_BITMAPS, _EXT_DATA_FILE = 0, 0xE2792ACA, 0x23852875, 0x44415441
# The longest descriptor that QEMU reads (vmdk_read_desc).
_VMDK_DESCRIPTOR = (1 << 20) - 1
# More than QEMU takes (vmdk_parse_extents): other programs also know extents that are only read, and do not mind the case.
_VMDK_EXTENT = re.compile(rb'\b(?:RW|RDONLY|NOACCESS)\s+\d+\s+\w+\s+"([^"\r\n]+)"', re.IGNORECASE)
_VMDK_PARENT = re.compile(rb'parentFileNameHint\s*=\s*"([^"\r\n]+)"', re.IGNORECASE)


@dataclass(frozen=True)
class Qcow2Features:
    """The creation options that a qcow2 header records. Sizes in bytes."""

    compat: str
    cluster_size: int
    lazy_refcounts: bool = False
    extended_l2: bool = False
    compression_type: str = "zlib"
    refcount_bits: int = 16


@dataclass(frozen=True)
class Image:
    """One image as its header describes it. ``capacity`` is what a guest sees, in bytes."""

    format: str
    capacity: int
    backing: t.Optional[str] = None
    backing_format: t.Optional[str] = None
    qcow2: t.Optional[Qcow2Features] = None
    snapshots: int = 0
    bitmaps: int = 0
    encrypted: bool = False
    #: the file that has the data in place of this one, as recorded; empty where none is
    data_file: t.Optional[str] = None
    #: why the content cannot be relied on (``dirty``, ``corrupt``), or None
    unclean: t.Optional[str] = None
    #: why its bytes could not be read as this format; only of a target, which is then judged as different
    unreadable: str = ""
    #: a format whose magic the bytes carry although they are read as raw
    magic: t.Optional[str] = None


def round_capacity(image_format: str, capacity: int) -> int:
    """The smallest capacity in bytes, not below ``capacity``, that the format can represent.

    Raw is exact to the byte; every other format that qemu-img writes counts in sectors of 512 bytes
    (vpc with ``force_size``; all eight formats measured with qemu-img 7.2).
    """
    return capacity if image_format == "raw" else -(-capacity // SECTOR) * SECTOR


def detect(fd: int, size: int) -> t.Tuple[str, ...]:
    """Formats whose magic the file carries; ``vpc-footer`` stands for a VHD told only by its last sector."""
    head = os.pread(fd, 68, 0)
    found = []
    if head[:4] == b"QFI\xfb" and len(head) >= 8:
        found.append("qcow" if head[4:8] == b"\0\0\0\1" else "qcow2")
    if head[:4] == b"QED\0":
        found.append("qed")
    if head[:4] in (b"KDMV", b"COWD") or head.startswith(b"# Disk DescriptorFile"):
        found.append("vmdk")
    if head[:8] == b"vhdxfile":
        found.append("vhdx")
    if head[:8] == b"conectix":
        found.append("vpc")
    if head[64:68] == b"\x7f\x10\xda\xbe":
        found.append("vdi")
    if "vpc" not in found and size >= SECTOR and os.pread(fd, 8, size - SECTOR) == b"conectix":
        found.append("vpc-footer")
    return tuple(found)


def choose_format(found: t.Sequence[str], pinned: t.Optional[str], what: str) -> str:
    """The format to read an image as.

    Pinned by the task: that one. No magic: raw. One magic: that format. Anything else is a question only a person can answer.
    """
    if pinned:
        return pinned
    if not found:
        return "raw"
    if len(found) > 1:
        raise CloneError(
            "UNSAFE_IMAGE",
            f"{what} can be read as {' and as '.join(found).replace('-footer', '')}: set source_format to what is meant",
        )
    if found[0] == "vpc-footer":
        raise CloneError(
            "UNSAFE_IMAGE",
            f"{what} ends in the footer of a fixed VHD, which a guest can write too: set source_format to vpc or to raw",
        )
    return found[0]


def read_raw(size: int, found: t.Sequence[str], head: bytes) -> Image:
    """A raw image: its length is its capacity. LUKS is told by its magic, because it must never be converted."""
    return Image("raw", size, encrypted=head[:6] == b"LUKS\xba\xbe", magic=found[0] if found else None)


def read_qcow2(fd: int, size: int, what: str) -> Image:
    """Read a qcow2 header, versions 2 and 3 (QEMU's ``docs/interop/qcow2.txt``).

    :raises CloneError: ``CORRUPT_IMAGE`` for fields that cannot be, ``NO_SUPPORT`` for incompatible features that
        are not known here and so could mean anything.
    """
    head = os.pread(fd, 112, 0)

    def corrupt(why: str) -> CloneError:
        return CloneError("CORRUPT_IMAGE", f"{what} is no sound qcow2 image: {why}")

    if len(head) < 72 or head[:4] != b"QFI\xfb":
        raise corrupt("the header is missing or too short")
    version, backing_at, backing_len, cluster_bits, capacity, crypt, l1_size, l1_at = struct.unpack_from(">IQIIQIIQ", head, 4)
    snapshots = struct.unpack_from(">I", head, 60)[0]
    if version not in (2, 3):
        raise corrupt(f"version {version} is unknown")
    if not 9 <= cluster_bits <= 21:
        raise corrupt(f"the cluster size of 2^{cluster_bits} bytes is out of range")
    if capacity > 2**63 - 1:
        raise corrupt(f"the capacity of {capacity} bytes is out of range")
    incompatible, compatible, refcount_order, header_len = 0, 0, 4, 72
    compression = "zlib"
    if version == 3:
        if len(head) < 104:
            raise corrupt("the header is too short")
        incompatible, compatible = struct.unpack_from(">QQ", head, 72)
        refcount_order, header_len = struct.unpack_from(">II", head, 96)
        if refcount_order > 6:
            raise corrupt(f"the refcount order {refcount_order} is out of range")
        if not 104 <= header_len <= 1 << cluster_bits:
            raise corrupt(f"the header length {header_len} is out of range")
        if incompatible & ~_QCOW2_KNOWN:
            raise CloneError(
                "NO_SUPPORT", f"{what} uses qcow2 features that are not known here: {incompatible & ~_QCOW2_KNOWN:#x}"
            )
        if incompatible & _QCOW2_COMPRESSION and len(head) > 104:
            compression = {0: "zlib", 1: "zstd"}.get(head[104], "unknown")
            if compression == "unknown":
                raise CloneError("NO_SUPPORT", f"{what} uses compression type {head[104]}, which is not known here")
    if l1_size and not (l1_at > 0 and l1_at + 8 * l1_size <= size):
        raise corrupt("its L1 table lies outside the file")
    end = backing_at or (1 << cluster_bits)
    backing_format, bitmaps, data_file = _qcow2_extensions(fd, header_len, end, corrupt)
    backing = None
    if backing_at:
        if not 0 < backing_len <= 1023 or backing_at + backing_len > min(size, 1 << cluster_bits):
            raise corrupt("the name of its backing file lies outside the header")
        backing = os.fsdecode(os.pread(fd, backing_len, backing_at))
    unclean = "corrupt" if incompatible & _QCOW2_CORRUPT else "dirty" if incompatible & _QCOW2_DIRTY else None
    return Image(
        "qcow2",
        capacity,
        backing,
        backing_format,
        Qcow2Features(
            "1.1" if version == 3 else "0.10",
            1 << cluster_bits,
            bool(compatible & _QCOW2_LAZY_REFCOUNTS),
            bool(incompatible & _QCOW2_EXTENDED_L2),
            compression,
            1 << refcount_order,
        ),
        snapshots,
        bitmaps,
        encrypted=bool(crypt),
        data_file=data_file if incompatible & _QCOW2_DATA_FILE else None,
        unclean=unclean,
    )


def _qcow2_extensions(
    fd: int, start: int, end: int, corrupt: t.Callable[[str], CloneError]
) -> t.Tuple[t.Optional[str], int, str]:
    """Backing format, number of bitmaps and name of the data file from the header extensions."""
    backing_format, bitmaps, data_file, at = None, 0, "", start
    while at + 8 <= end:
        raw = os.pread(fd, 8, at)
        if len(raw) < 8:
            break
        kind, length = struct.unpack(">II", raw)
        if kind == _EXT_END:
            break
        if at + 8 + length > end:
            raise corrupt("a header extension is longer than the header")
        if kind == _EXT_BACKING_FORMAT:
            backing_format = os.pread(fd, min(length, 64), at + 8).decode("ascii", "replace")
        elif kind == _EXT_BITMAPS and length >= 4:
            bitmaps = struct.unpack(">I", os.pread(fd, 4, at + 8))[0]
        elif kind == _EXT_DATA_FILE:
            data_file = os.fsdecode(os.pread(fd, min(length, 4096), at + 8).split(b"\0", 1)[0])
        at += 8 + -(-length // 8) * 8
    return backing_format, bitmaps, data_file


def refuse_parents(fd: int, image_format: str, what: str) -> None:
    """Refuse images of foreign formats that are parts of something larger.

    qemu-img opens the extents of a vmdk descriptor wherever they lie (CVE-2022-47951), and reads a differencing VHD or
    VDI as if it were whole. None of them stands alone, so none can be a source.
    """
    if image_format == "vmdk":
        _refuse_vmdk_references(fd, what)
    elif image_format == "vdi":
        kind = struct.unpack("<I", os.pread(fd, 4, 0x4C).ljust(4, b"\0"))[0]
        if kind not in (1, 2):
            raise CloneError("UNSAFE_IMAGE", f"{what} is a VDI of type {kind}, which needs a parent image")
    elif image_format == "vpc":
        footer = os.pread(fd, SECTOR, 0)
        if footer[:8] == b"conectix" and struct.unpack_from(">I", footer, 60)[0] not in (2, 3):
            raise CloneError("UNSAFE_IMAGE", f"{what} is a differencing VHD, which needs a parent image")


def _refuse_vmdk_references(fd: int, what: str) -> None:
    head = os.pread(fd, SECTOR, 0)
    if head[:4] != b"KDMV":
        raise CloneError("UNSAFE_IMAGE", f"{what} is a vmdk that keeps its data in other files")
    if head[12:20] == bytes(8):
        # QEMU then takes the descriptor inside for a list of other files, by its own rules of reading it.
        raise CloneError("UNSAFE_IMAGE", f"{what} is a vmdk without a capacity of its own, which keeps its data in other files")
    at, sectors = struct.unpack_from("<QQ", head, 28)
    # QEMU reads 20 sectors whatever the header says (vmdk.c, DESC_SIZE).
    text = os.pread(fd, min(max(sectors, 20) * SECTOR, 64 * 1024), at * SECTOR) if at else b""
    descriptor = text.split(b"\0", 1)[0].decode("utf-8", "replace").lower()
    kind = next((line.split("=", 1)[1].strip(' "\r') for line in descriptor.split("\n") if line.startswith("createtype")), "")
    if kind not in ("monolithicsparse", "streamoptimized"):
        raise CloneError("UNSAFE_IMAGE", f"{what} is a vmdk of type {kind or 'unknown'!r}, which keeps its data in other files")
    if "parentfilenamehint" in descriptor:
        raise CloneError("UNSAFE_IMAGE", f"{what} is a vmdk that needs a parent image")


def vmdk_references(fd: int) -> t.Tuple[str, ...]:
    """The extents and the parent of a vmdk, as its descriptor records them.

    QEMU looks for extents in a descriptor inside an image only where the image has no capacity of its own (vmdk_open_vmdk4);
    else the one extent is the image itself, by the name that it was made with.
    """
    head = os.pread(fd, SECTOR, 0)
    at, patterns = 0, [_VMDK_EXTENT, _VMDK_PARENT]
    if head[:4] == b"KDMV":
        at = struct.unpack("<Q", head[28:36].ljust(8, b"\0"))[0] * SECTOR
        if head[12:20] != bytes(8):
            patterns.remove(_VMDK_EXTENT)
    if head[:4] == b"COWD" or not 0 <= at < 1 << 62 or (at == 0 and head[:4] == b"KDMV"):
        return ()
    descriptor = os.pread(fd, _VMDK_DESCRIPTOR, at).split(b"\0", 1)[0]
    return tuple(os.fsdecode(name) for pattern in patterns for name in pattern.findall(descriptor))
