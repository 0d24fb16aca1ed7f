# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the first bytes of a volume say: its format, its capacity, and what it refers to.

Nothing here trusts an image. Headers are read with a few bounded reads, and what they may not say has a name in
:data:`gate.CHECKS`. A file that could be read as two formats is refused until somebody pins one (CVE-2008-2004 and its many
successors: a guest that writes an image header into its raw disk must not decide how the host reads it).
"""

from __future__ import annotations

import os
import struct
import typing as t
from dataclasses import dataclass

from .gate import Reader, refusal

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
#: What a raw disk may begin with, any of it beside the others: an encrypted one, partition tables, install media.
RAW_KINDS = ("luks", "gpt", "mbr", "iso")
# Up to the volume descriptor of ISO 9660, in sector 16 of 2048 bytes.
_LOOKED_AT = 0x8006


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
    """Formats whose magic the file carries; ``vpc-footer`` stands for a VHD told only by its last sector.

    Where one is told by its header, what a raw disk begins with (:data:`RAW_KINDS`) is looked for as well: an image has
    nothing of that where its own header is, and a disk has no image's header.
    """
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
    if found:
        found += raw_kinds(os.pread(fd, _LOOKED_AT, 0))
    if "vpc" not in found and size >= SECTOR and os.pread(fd, 8, size - SECTOR) == b"conectix":
        found.append("vpc-footer")
    return tuple(found)


def raw_kinds(head: bytes) -> t.List[str]:
    """What the first bytes of a raw disk say that it has: of :data:`RAW_KINDS`, any number."""
    found = []
    if head[:6] == b"LUKS\xba\xbe":
        found.append("luks")
    if head[SECTOR : SECTOR + 8] == b"EFI PART":
        found.append("gpt")
    elif head[510:512] == b"\x55\xaa":
        # Four partitions of 16 bytes: each is active or not (UEFI specification, 5.2.1), and one of them has a type.
        partitions = [head[at : at + 16] for at in range(446, 510, 16)]
        if all(one[0] in (0, 0x80) for one in partitions) and any(one[4] for one in partitions):
            found.append("mbr")
    if head[0x8001:0x8006] == b"CD001":
        found.append("iso")
    return found


def choose_format(found: t.Sequence[str], pinned: t.Optional[str], what: str) -> str:
    """The format to read an image as.

    Pinned by the task: that one. No magic: raw. One magic: that format. Anything else is a question only a person can answer.
    """
    if pinned:
        return pinned
    if not found:
        return "raw"
    if len(found) > 1:
        formats = [f"raw ({name})" if name in RAW_KINDS else name.replace("-footer", "") for name in found]
        raise refusal("two_formats", f"{what} can be read as {' and as '.join(formats)}: set source_format to what is meant")
    if found[0] == "vpc-footer":
        raise refusal(
            "footer_only",
            f"{what} ends in the footer of a fixed VHD, which a guest can write too: set source_format to vpc or to raw",
        )
    return found[0]


def read_raw(size: int, found: t.Sequence[str], head: bytes) -> Image:
    """A raw image: its length is its capacity. LUKS is told by its magic, because it must never be converted."""
    return Image("raw", size, encrypted="luks" in raw_kinds(head), magic=found[0] if found else None)


def read_qcow2(fd: int, size: int, what: str) -> Image:
    """Read a qcow2 header, versions 2 and 3 (QEMU's ``docs/interop/qcow2.txt``; the limits are those of its block/qcow2.c).

    :raises CloneError: by one of :data:`gate.CHECKS`
    """
    reader = Reader(fd, size, what, "qcow2")
    sound = reader.sound
    head = reader.read(0, 112)
    sound(len(head) >= 72 and head[:4] == b"QFI\xfb", "the header is missing or too short")
    version, backing_at, backing_len, cluster_bits, capacity, crypt, l1_size, l1_at = struct.unpack_from(">IQIIQIIQ", head, 4)
    refcounts_at, refcount_clusters, snapshots, snapshots_at = struct.unpack_from(">QIIQ", head, 48)
    sound(version in (2, 3), f"is qcow2 of version {version}", "unknown_feature")
    sound(9 <= cluster_bits <= 21, f"the cluster size of 2^{cluster_bits} bytes is out of range")
    sound(crypt <= 2, f"encryption method {crypt} is unknown")
    cluster = 1 << cluster_bits
    incompatible, compatible, refcount_order, header_len, compression = 0, 0, 4, 72, 0
    if version == 3:
        sound(len(head) >= 104, "the header is too short")
        incompatible, compatible = struct.unpack_from(">QQ", head, 72)
        refcount_order, header_len = struct.unpack_from(">II", head, 96)
        sound(refcount_order <= 6, f"the refcount order {refcount_order} is out of range")
        sound(104 <= header_len <= cluster, f"the header length {header_len} is out of range")
        unknown = incompatible & ~_QCOW2_KNOWN
        sound(not unknown, f"uses qcow2 features that are not known here: {unknown:#x}", "unknown_feature")
        compression = head[104] if header_len > 104 and len(head) > 104 else 0
        sound(compression <= 1, f"uses compression type {compression}, which is not known here", "unknown_feature")
        named = bool(incompatible & _QCOW2_COMPRESSION)
        sound(named == bool(compression), "its compression type and its features contradict each other")
    extended = bool(incompatible & _QCOW2_EXTENDED_L2)
    sound(not extended or cluster_bits >= 14, f"clusters of {cluster} bytes have no subclusters")
    # What one entry of the L1 table leads to: a cluster full of entries of 8 bytes, or of 16 where they have subclusters.
    reach = cluster * (cluster // (16 if extended else 8))
    enough = capacity < 1 << 63 and -(-capacity // reach) <= l1_size <= (32 << 20) // 8
    sound(enough, f"the capacity of {capacity} bytes and an L1 table of {l1_size} entries do not go together", "capacity")
    sound(0 < refcount_clusters <= (8 << 20) // cluster, f"a refcount table of {refcount_clusters} clusters is out of range")
    sound(snapshots <= 65536, f"{snapshots} snapshots are out of range")
    for at, length, part in (
        (l1_at, 8 * l1_size, "its L1 table"),
        # May end in a part of a cluster that nobody has written.
        (refcounts_at, 8, "its refcount table"),
        (snapshots_at, 40 * snapshots, "its list of snapshots"),
    ):
        if length:
            reader.inside(at, length, part)
            sound(at > 0 and at % cluster == 0, f"{part} is not at the start of a cluster, or overlaps the header")
    backing = None
    if backing_at:
        within = header_len <= backing_at and 0 < backing_len <= 1023 and backing_at + backing_len <= min(size, cluster)
        sound(within, "the name of its backing file lies outside the header", "out_of_file")
        backing = os.fsdecode(reader.need(backing_at, backing_len, "the name of its backing file"))
    backing_format, bitmaps, data_file = _qcow2_extensions(reader, header_len, backing_at or cluster)
    return Image(
        "qcow2",
        capacity,
        backing,
        backing_format,
        Qcow2Features(
            "1.1" if version == 3 else "0.10",
            cluster,
            bool(compatible & _QCOW2_LAZY_REFCOUNTS),
            extended,
            "zstd" if compression else "zlib",
            1 << refcount_order,
        ),
        snapshots,
        bitmaps,
        encrypted=bool(crypt),
        data_file=data_file if incompatible & _QCOW2_DATA_FILE else None,
        unclean="corrupt" if incompatible & _QCOW2_CORRUPT else "dirty" if incompatible & _QCOW2_DIRTY else None,
    )


def _qcow2_extensions(reader: Reader, start: int, end: int) -> t.Tuple[t.Optional[str], int, str]:
    """Backing format, number of bitmaps and name of the data file from the header extensions."""
    backing_format: t.Optional[str] = None
    bitmaps, data_file, at = 0, "", start
    while at + 8 <= end:
        raw = reader.read(at, 8)
        if len(raw) < 8:
            break
        kind, length = struct.unpack(">II", raw)
        if kind == _EXT_END:
            break
        reader.sound(at + 8 + length <= end, "a header extension is longer than the header", "out_of_file")
        if kind == _EXT_BACKING_FORMAT:
            backing_format = reader.read(at + 8, min(length, 64)).decode("ascii", "replace")
        elif kind == _EXT_BITMAPS and length >= 4:
            bitmaps = int.from_bytes(reader.read(at + 8, 4), "big")
        elif kind == _EXT_DATA_FILE:
            data_file = os.fsdecode(reader.read(at + 8, min(length, 4096)).split(b"\0", 1)[0])
        at += 8 + -(-length // 8) * 8
    return backing_format, bitmaps, data_file
