# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Headers of the formats other than raw and qcow2.

They are read before qemu-img is let near the image: it opens the extents of a vmdk descriptor wherever they lie
(CVE-2022-47951), reads a differencing VHD, VHDX or VDI as if it were whole, and takes its time over tables that are not there.
What QEMU's drivers refuse is refused here too, by the same rules; the names in parentheses are theirs.
"""

from __future__ import annotations

import os
import re
import struct
import typing as t
import uuid
from functools import lru_cache

from .gate import Reader
from .probe import SECTOR, Image

_MIB = 1 << 20
_NAME_LIMIT = 1023


def read(fd: int, size: int, image_format: str, what: str) -> Image:
    """Read the header of an image that its format says stands alone, or has a backing file.

    :raises CloneError: by one of :data:`gate.CHECKS`
    """
    return _READERS[image_format](Reader(fd, size, what, image_format))


def _backing(reader: Reader, at: int, length: int, end: int) -> t.Optional[str]:
    """The recorded name of a backing file, which lies before ``end``."""
    if not at:
        return None
    reader.sound(0 < length <= _NAME_LIMIT and at + length <= end, "the name of its backing file lies outside the header")
    return os.fsdecode(reader.need(at, length, "the name of its backing file"))


def _is_power_of_2(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


# --- qcow, version 1 (block/qcow.c) ---------------------------------------------------------------------------------------


def _read_qcow(reader: Reader) -> Image:
    head = reader.need(0, 48, "the header")
    magic, version, backing_at, backing_len, _mtime, capacity, cluster_bits, l2_bits, crypt, l1_at = struct.unpack(
        ">4sIQIIQBBxxIQ", head
    )
    reader.sound(magic == b"QFI\xfb" and version == 1, "the magic is missing")
    reader.sound(9 <= cluster_bits <= 16, f"the cluster size of 2^{cluster_bits} bytes is out of range")
    reader.sound(6 <= l2_bits <= 13, f"an L2 table of 2^{l2_bits} entries is out of range")
    reader.sound(crypt <= 1, f"encryption method {crypt} is unknown")
    reader.sound(1 < capacity < 1 << 63, f"the capacity of {capacity} bytes is out of range", "capacity")
    entries = -(-capacity // (1 << (cluster_bits + l2_bits)))
    reader.sound(entries * 8 < 1 << 31, f"the capacity of {capacity} bytes is out of range", "capacity")
    reader.inside(l1_at, 8 * entries, "its L1 table")
    backing = _backing(reader, backing_at, backing_len, reader.size)
    return Image("qcow", capacity, backing, encrypted=bool(crypt))


# --- qed (docs/interop/qed_spec.txt) --------------------------------------------------------------------------------------

_QED_BACKING, _QED_NEED_CHECK, _QED_RAW_BACKING = 1, 2, 4


def _read_qed(reader: Reader) -> Image:
    head = reader.need(0, 64, "the header")
    magic, cluster, table, header, features, _compatible, _autoclear, l1_at, capacity, name_at, name_len = struct.unpack(
        "<4sIIIQQQQQII", head
    )
    reader.sound(magic == b"QED\0", "the magic is missing")
    unknown = features & ~(_QED_BACKING | _QED_NEED_CHECK | _QED_RAW_BACKING)
    reader.sound(not unknown, f"uses qed features that are not known here: {unknown:#x}", "unknown_feature")
    reader.sound(_is_power_of_2(cluster) and 4096 <= cluster <= 64 * _MIB, f"a cluster size of {cluster} bytes is out of range")
    reader.sound(_is_power_of_2(table) and table <= 16, f"a table size of {table} clusters is out of range")
    reader.sound(header > 0, "the header has no size")
    limit = (table * cluster // 8) ** 2 * cluster
    reader.sound(capacity <= limit, f"the capacity of {capacity} bytes is out of range", "capacity")
    reader.sound(capacity % SECTOR == 0, f"the capacity of {capacity} bytes is not a multiple of {SECTOR}", "capacity")
    reader.sound(l1_at % cluster == 0 and l1_at >= header * cluster, "its L1 table overlaps the header")
    reader.inside(l1_at, table * cluster, "its L1 table")
    backing = _backing(reader, name_at, name_len, header * cluster) if features & _QED_BACKING else None
    reader.sound(bool(backing) or not features & _QED_BACKING, "the name of its backing file is missing")
    return Image(
        "qed",
        capacity,
        backing,
        "raw" if backing is not None and features & _QED_RAW_BACKING else None,
        unclean="dirty" if features & _QED_NEED_CHECK else None,
    )


# --- vdi (block/vdi.c) ----------------------------------------------------------------------------------------------------

_VDI_BLOCKS_LIMIT = 0x1FFFFFFF


def _read_vdi(reader: Reader) -> Image:
    head = reader.need(0, SECTOR, "the header")
    magic, version, _header_size, kind = struct.unpack_from("<4sIII", head, 64)
    map_at, data_at = struct.unpack_from("<II", head, 340)
    sector, _unused, capacity, block, extra, blocks, allocated = struct.unpack_from("<IIQIIII", head, 360)
    reader.sound(magic == b"\x7f\x10\xda\xbe", "the magic is missing")
    reader.sound(version == 0x10001, f"is a vdi of version {version >> 16}.{version & 0xFFFF}", "unknown_feature")
    reader.sound(
        kind in (1, 2) and head[424:456] == bytes(32), f"is a vdi of type {kind}, which needs a parent image", "parent_locator"
    )
    reader.sound(sector == SECTOR, f"a sector size of {sector} bytes is out of range")
    reader.sound(block == _MIB and extra == 0, f"a block size of {block} bytes is out of range")
    reader.sound(map_at % SECTOR == 0 and data_at % SECTOR == 0, "its block map or its data is not aligned")
    reader.sound(map_at >= SECTOR, "its block map overlaps the header")
    reader.sound(blocks <= _VDI_BLOCKS_LIMIT, f"{blocks} blocks are out of range", "capacity")
    reader.sound(allocated <= blocks, f"{allocated} blocks are in use, of {blocks}")
    reader.sound(capacity <= blocks * block, f"the capacity of {capacity} bytes is more than its blocks", "capacity")
    reader.inside(map_at, 4 * blocks, "its block map")
    reader.inside(data_at, allocated * block, "its data")
    return Image("vdi", -(-capacity // SECTOR) * SECTOR)


# --- vpc: VHD (block/vpc.c) -----------------------------------------------------------------------------------------------

_VPC_KINDS = {2: "fixed", 3: "dynamic"}


def _checksum(data: bytes, at: int) -> int:
    """The one's complement of the sum of all bytes but the four of the checksum itself."""
    return ~(sum(data) - sum(data[at : at + 4])) & 0xFFFFFFFF


def _read_vpc(reader: Reader) -> Image:
    at = 0
    footer = reader.need(0, SECTOR, "the footer")
    if footer[:8] != b"conectix":
        # Only of a fixed one: all others have a copy at the start.
        at = max(reader.size - SECTOR, 0)
        footer = reader.need(at, SECTOR, "the footer")
    reader.sound(footer[:8] == b"conectix", "the footer is missing")
    _features, version, table_at, capacity, kind, checksum = struct.unpack_from(">IIQ24xQ4xII", footer, 8)
    reader.sound(kind != 4, "is a differencing VHD, which needs a parent image", "parent_locator")
    reader.sound(version >> 16 == 1, f"is a VHD of version {version >> 16}", "unknown_feature")
    reader.sound(kind == (2 if at else 3), f"it is marked {_VPC_KINDS.get(kind, f'as type {kind}')} and is not that")
    reader.sound(checksum == _checksum(footer, 64), "the checksum of its footer is wrong")
    if at:
        reader.sound(capacity <= at, f"the capacity of {capacity} bytes is more than the file has", "capacity")
        return Image("vpc", capacity)
    head = reader.need(table_at, 1024, "its dynamic header")
    reader.sound(head[:8] == b"cxsparse", "its dynamic header is missing")
    map_at, _version, entries, block, checksum = struct.unpack_from(">QIIII", head, 16)
    reader.sound(checksum == _checksum(head, 36), "the checksum of its dynamic header is wrong")
    locators = any(head[at : at + 4] != bytes(4) for at in range(576, 768, 24))
    reader.sound(not locators and head[40:56] == bytes(16), "names a parent image in its header", "parent_locator")
    reader.sound(_is_power_of_2(block) and SECTOR <= block <= 1 << 31, f"a block size of {block} bytes is out of range")
    reader.sound(capacity <= entries * block, f"the capacity of {capacity} bytes is more than its blocks", "capacity")
    reader.inside(map_at, 4 * entries, "its block map")
    return Image("vpc", capacity)


# --- vhdx (Microsoft's specification of the format, version 1.00) ---------------------------------------------------------

_VHDX_BAT = uuid.UUID("2dc27766-f623-4200-9d64-115e9bfd4a08")
_VHDX_METADATA = uuid.UUID("8b7ca206-4790-4b9a-b8fe-575f050f886e")
_VHDX_FILE, _VHDX_SIZE, _VHDX_SECTOR = (
    uuid.UUID(text)
    for text in (
        "caa16737-fa36-4d43-b3b6-33f0aa44e76b",
        "2fa54224-cd1b-4876-b211-5dbed83bf4b8",
        "8141bf1d-a96f-4709-ba47-f233a8faab5f",
    )
)
_VHDX_PARENT = uuid.UUID("a8d35f2d-b30b-454d-abf7-d3d84834ab0c")
# The identifier of the disk, and its physical sector size.
_VHDX_OTHERS = (uuid.UUID("beca12ab-b2e6-4523-93ef-c309e000c746"), uuid.UUID("cda348c7-445d-4471-9cc9-e9885251c556"))
_VHDX_REQUIRED_REGION, _VHDX_REQUIRED_ITEM = 1, 4
_VHDX_LIMIT = 64 << 40


@lru_cache(maxsize=1)
def _crc32c_table() -> t.Tuple[int, ...]:
    table = []
    for value in range(256):
        for _bit in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return tuple(table)


def _crc32c(data: bytes) -> int:
    table, crc = _crc32c_table(), 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ table[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def _read_vhdx(reader: Reader) -> Image:
    reader.sound(reader.need(0, 8, "the header") == b"vhdxfile", "the magic is missing")
    newest = max(filter(None, (_vhdx_header(reader, at) for at in (64 << 10, 128 << 10))), default=None)
    if newest is None:
        raise reader.refuse("header", "neither of its headers is whole")
    _sequence, log, log_version, version = newest
    reader.sound((log_version, version) == (0, 1), f"is a vhdx of version {version}, log {log_version}", "unknown_feature")
    regions = _vhdx_regions(reader)
    items = _vhdx_items(reader, *regions[_VHDX_METADATA])
    block, flags = struct.unpack("<II", _vhdx_item(reader, items, _VHDX_FILE, 8))
    parent = bool(flags & 2) or _VHDX_PARENT in items
    reader.sound(not parent, "is a differencing VHDX, which needs a parent image", "parent_locator")
    capacity = struct.unpack("<Q", _vhdx_item(reader, items, _VHDX_SIZE, 8))[0]
    sector = struct.unpack("<I", _vhdx_item(reader, items, _VHDX_SECTOR, 4))[0]
    reader.sound(sector in (512, 4096), f"a sector size of {sector} bytes is out of range")
    reader.sound(_is_power_of_2(block) and _MIB <= block <= 256 * _MIB, f"a block size of {block} bytes is out of range")
    fits = capacity <= _VHDX_LIMIT and capacity % sector == 0
    reader.sound(fits, f"the capacity of {capacity} bytes is out of range", "capacity")
    # After the blocks that one block of bitmaps is for, 2^23 sectors, comes an entry for that.
    blocks = -(-capacity // block)
    entries = blocks + max(blocks - 1, 0) // ((sector << 23) // block)
    reader.sound(8 * entries <= regions[_VHDX_BAT][1], f"the capacity of {capacity} bytes is more than its blocks", "capacity")
    return Image("vhdx", capacity, unclean="dirty" if log != bytes(16) else None)


def _vhdx_header(reader: Reader, at: int) -> t.Optional[t.Tuple[int, bytes, int, int]]:
    """Sequence number, identifier of the log and versions of a header; None for one that is not whole."""
    head = reader.read(at, 4096)
    if len(head) < 4096 or head[:4] != b"head":
        return None
    checksum, sequence = struct.unpack_from("<IQ", head, 4)
    if checksum != _crc32c(head[:4] + bytes(4) + head[8:]):
        return None
    return (sequence, head[48:64], *struct.unpack_from("<HH", head, 64))


def _vhdx_regions(reader: Reader) -> t.Dict[uuid.UUID, t.Tuple[int, int]]:
    """Place and length of the regions, by their identifier."""
    head = reader.read(192 << 10, 16)
    at = (192 << 10) if head[:4] == b"regi" else (256 << 10)
    head = reader.need(at, 16, "its region table")
    reader.sound(head[:4] == b"regi", "its region table is missing")
    count = struct.unpack_from("<I", head, 8)[0]
    reader.sound(count <= 2047, f"{count} regions are out of range")
    found: t.Dict[uuid.UUID, t.Tuple[int, int]] = {}
    for entry in struct.iter_unpack("<16sQII", reader.need(at + 16, 32 * count, "its region table")):
        name, place, length, required = uuid.UUID(bytes_le=entry[0]), *entry[1:]
        known = name in (_VHDX_BAT, _VHDX_METADATA)
        unknown = not known and required & _VHDX_REQUIRED_REGION
        reader.sound(not unknown, f"has a region {name} that is not known here", "unknown_feature")
        reader.sound(name not in found, f"region {name} is there twice")
        if known:
            reader.sound(place % _MIB == 0 and place >= _MIB, f"region {name} is not aligned")
            reader.inside(place, length, f"region {name}")
            found[name] = place, length
    reader.sound(len(found) == 2, "a region is missing")
    return found


def _vhdx_items(reader: Reader, place: int, length: int) -> t.Dict[uuid.UUID, t.Tuple[int, int]]:
    """Place in the file and length of the pieces of metadata, by their identifier."""
    reader.sound(length >= 64 << 10, "its metadata is too short")
    head = reader.need(place, 32, "its metadata")
    reader.sound(head[:8] == b"metadata", "its metadata is missing")
    count = struct.unpack_from("<H", head, 10)[0]
    reader.sound(count <= 2047, f"{count} pieces of metadata are out of range")
    found: t.Dict[uuid.UUID, t.Tuple[int, int]] = {}
    for entry in struct.iter_unpack("<16sIIIxxxx", reader.need(place + 32, 32 * count, "its metadata")):
        name, at, size, flags = uuid.UUID(bytes_le=entry[0]), *entry[1:]
        known = name in (_VHDX_FILE, _VHDX_SIZE, _VHDX_SECTOR, _VHDX_PARENT, *_VHDX_OTHERS)
        unknown = not known and flags & _VHDX_REQUIRED_ITEM
        reader.sound(not unknown, f"has metadata {name} that is not known here", "unknown_feature")
        reader.sound(name not in found, f"metadata {name} is there twice")
        reader.sound(at + size <= length, f"metadata {name} lies outside its region", "out_of_file")
        found[name] = place + at, size
    return found


def _vhdx_item(reader: Reader, items: t.Mapping[uuid.UUID, t.Tuple[int, int]], name: uuid.UUID, size: int) -> bytes:
    reader.sound(name in items and items[name][1] == size, f"metadata {name} is missing")
    return reader.need(items[name][0], size, f"metadata {name}")


# --- vmdk (block/vmdk.c) --------------------------------------------------------------------------------------------------

# QEMU reads 20 sectors whatever the header says (DESC_SIZE), and no longer descriptor than this (vmdk_read_desc).
_VMDK_SHORTEST, _VMDK_LONGEST = 20 * SECTOR, _MIB - 1
# More than QEMU takes (vmdk_parse_extents): other programs also know extents that are only read, and do not mind the case.
_VMDK_EXTENT = re.compile(rb'\b(?:RW|RDONLY|NOACCESS)\s+\d+\s+\w+\s+"([^"\r\n]+)"', re.IGNORECASE)
_VMDK_PARENT = re.compile(rb'parentFileNameHint\s*=\s*"([^"\r\n]+)"', re.IGNORECASE)
_VMDK_KEY = re.compile(r"([a-z0-9_.:]+)\s*=\s*(.*)")
_VMDK_ITSELF = re.compile(r'(?:rw|rdonly)\s+[0-9]+\s+sparse\s+"[^"]*"(?:\s+[0-9]+)?')
_VMDK_AT_END = 2**64 - 1
_VMDK_SPARE, _VMDK_COMPRESSED, _VMDK_DEFLATE = 1 << 1, 1 << 16, 1


def _read_vmdk(reader: Reader) -> Image:
    head = reader.read(0, SECTOR)
    reader.sound(head[:4] == b"KDMV", "is a vmdk that keeps its data in other files", "extent")
    reader.sound(len(head) == SECTOR, "the header lies outside the file", "out_of_file")
    # QEMU then takes the descriptor inside for a list of other files, by its own rules of reading it.
    own = head[12:20] != bytes(8)
    reader.sound(own, "is a vmdk without a capacity of its own, which keeps its data in other files", "extent")
    _refuse_vmdk_references(reader, *struct.unpack_from("<QQ", head, 28))
    if struct.unpack_from("<Q", head, 56)[0] == _VMDK_AT_END:
        # A stream was not known in full when its header was written: the same comes again near its end.
        head = reader.need(max(reader.size - 2 * SECTOR, 0), SECTOR, "the header at its end")
        reader.sound(head[:4] == b"KDMV", "the header at its end is missing")
    version, flags, sectors, grain = struct.unpack_from("<IIQQ", head, 4)
    entries, spare_at, directory_at, data_at = struct.unpack_from("<IQQQ", head, 44)
    reader.sound(1 <= version <= 3, f"is a vmdk of version {version}", "unknown_feature")
    compression = struct.unpack_from("<H", head, 77)[0]
    known = not flags & _VMDK_COMPRESSED or compression == _VMDK_DEFLATE
    reader.sound(known, f"uses compression {compression}, which is not known here", "unknown_feature")
    reader.sound(_is_power_of_2(grain) and grain <= 0x200000, f"grains of {grain} sectors are out of range")
    reader.sound(0 < entries <= 512, f"tables of {entries} entries are out of range")
    reader.sound(sectors < 1 << 54, f"the capacity of {sectors} sectors is out of range", "capacity")
    directory = -(-sectors // (entries * grain))
    reader.sound(directory <= 512 * _MIB // 4, f"the capacity of {sectors} sectors is out of range", "capacity")
    reader.inside(directory_at * SECTOR, 4 * directory, "its grain directory")
    if flags & _VMDK_SPARE:
        reader.inside(spare_at * SECTOR, 4 * directory, "its second grain directory")
    reader.inside(data_at * SECTOR, 0, "its data")
    return Image("vmdk", sectors * SECTOR)


def _refuse_vmdk_references(reader: Reader, at: int, sectors: int) -> None:
    """The descriptor inside an image may name the image itself and nothing else.

    Read by a strict grammar: a line that another program could take for more is refused.
    """
    length = min(max(sectors * SECTOR, _VMDK_SHORTEST), _VMDK_LONGEST)
    text = reader.read(at * SECTOR, length) if at else b""
    descriptor = text.split(b"\0", 1)[0].decode("utf-8", "replace").lower()
    reader.sound("parentfilenamehint" not in descriptor, "is a vmdk that needs a parent image", "parent_locator")
    kinds, extents = [], 0
    for line in map(str.strip, re.split("[\r\n]", descriptor)):
        key = _VMDK_KEY.fullmatch(line)
        if key is not None:
            name, value = key.group(1), key.group(2).strip(' "')
            if name == "createtype":
                kinds.append(value)
            # ffffffff: it has none.
            own = name != "parentcid" or value == "ffffffff"
            reader.sound(own, "is a vmdk that needs a parent image", "parent_locator")
        elif _VMDK_ITSELF.fullmatch(line):
            extents += 1
        else:
            plain = not line or line.startswith("#")
            reader.sound(plain, f"is a vmdk whose descriptor says {line[:80]!r}, which may mean another file", "extent")
    kind = " and ".join(kinds) or "unknown"
    alone = kind in ("monolithicsparse", "streamoptimized") and extents <= 1
    reader.sound(alone, f"is a vmdk of type {kind[:80]!r}, which keeps its data in other files", "extent")


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
    descriptor = os.pread(fd, _VMDK_LONGEST, at).split(b"\0", 1)[0]
    return tuple(os.fsdecode(name) for pattern in patterns for name in pattern.findall(descriptor))


_READERS: t.Mapping[str, t.Callable[[Reader], Image]] = {
    "vmdk": _read_vmdk,
    "vdi": _read_vdi,
    "vpc": _read_vpc,
    "vhdx": _read_vhdx,
    "qed": _read_qed,
    "qcow": _read_qcow,
}
