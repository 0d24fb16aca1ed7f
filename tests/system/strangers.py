# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Images that somebody else made: hostile ones, each with the check that has to refuse it, and honest ones of every kind.

qemu-img makes what it can make; the rest is made of that by changing bytes of its headers.
"""

from __future__ import annotations

import fcntl
import os
import struct
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from harness import GIB, MIB, noise, run

FICLONE = 0x40049409
PARTITIONS = (b"\x80\0\2\0\x83" + bytes(11)).ljust(64, b"\0") + b"\x55\xaa"
GPT = b"EFI PART\0\0\1\0"
ISO = b"\1CD001\1"
#: VHDX: where qemu-img puts the headers, the tables of regions and the metadata
HEADERS, REGIONS = (64 << 10, 128 << 10), (192 << 10, 256 << 10)
FILE_PARAMETERS, VIRTUAL_SIZE, LOGICAL_SECTOR, PARENT = (
    uuid.UUID(text).bytes_le
    for text in (
        "caa16737-fa36-4d43-b3b6-33f0aa44e76b",
        "2fa54224-cd1b-4876-b211-5dbed83bf4b8",
        "8141bf1d-a96f-4709-ba47-f233a8faab5f",
        "a8d35f2d-b30b-454d-abf7-d3d84834ab0c",
    )
)


@dataclass(frozen=True)
class Hostile:
    """``check`` is the one that refuses it."""

    name: str
    check: str
    params: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Honest:
    """``content`` is a raw file of what a guest sees; None where the clone has to be the same bytes as the source."""

    name: str
    format: str
    content: Path | None
    params: dict = field(default_factory=dict)


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _bit in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def vhd_sum(data, at):
    return struct.pack(">I", ~(sum(data) - sum(data[at : at + 4])) & 0xFFFFFFFF)


class Workshop:
    """Makes files in a directory, and remembers what they are."""

    def __init__(self, place):
        self.place = place
        self.hostile, self.honest = [], []

    def qemu(self, image_format, name, *options, size="1M", flags=()):
        run("qemu-img", "create", "-q", "-f", image_format, *flags, *options, self.place / name, size)
        return name

    def convert(self, content, image_format, name, *options):
        run("qemu-img", "convert", "-f", "raw", "-O", image_format, *options, self.place / content, self.place / name)
        return name

    def copy(self, base, name):
        with open(self.place / base, "rb") as source, open(self.place / name, "wb") as target:
            fcntl.ioctl(target.fileno(), FICLONE, source.fileno())

    def patch(self, base, name, *pieces, size=None, append=b""):
        """A copy of an image with (place, bytes) in it; a place may count from the end."""
        self.copy(base, name)
        with open(self.place / name, "r+b") as file:
            if size is not None:
                file.truncate(size)
            for at, data in pieces:
                file.seek(at, os.SEEK_SET if at >= 0 else os.SEEK_END)
                file.write(data)
            file.seek(0, os.SEEK_END)
            file.write(append)
        return name

    def bytes_of(self, name):
        return (self.place / name).read_bytes()

    def at(self, name, at, layout):
        with open(self.place / name, "rb") as file:
            file.seek(at)
            return struct.unpack(layout, file.read(struct.calcsize(layout)))[0]


# --- hostile --------------------------------------------------------------------------------------------------------------


def hostile(place, outside, canary):
    """Build them all in ``place``. ``canary`` is the file outside the pool, in ``outside``, that nobody may read."""
    shop = Workshop(place)
    content = place / "content"
    with open(content, "wb") as file:
        file.write(noise(96 << 10))
        file.truncate(MIB)
    bases = {
        "qcow2": ["-o", "cluster_size=64k"],
        "vmdk": [],
        "vdi": [],
        "vpc": ["-o", "force_size=on"],
        "vhdx": ["-o", "block_size=1M"],
        "qed": [],
        "qcow": [],
    }
    for image_format, options in bases.items():
        shop.convert(content, image_format, f"base.{image_format}", *options)
    shop.convert(content, "vmdk", "stream.vmdk", "-o", "subformat=streamOptimized")
    shop.convert(content, "vpc", "fixed.vpc", "-o", "subformat=fixed,force_size=on")
    for build in (_backing, _chains, _links, _data_files, _vmdk, _parents, _two_formats, _features, _limits, _marks):
        build(shop, outside, canary)
    for build in (_qcow2, _others, _torn, _checked):
        build(shop)
    return shop.hostile


def _add(shop, check, name, **params):
    shop.hostile.append(Hostile(name, check, params))


def _backing(shop, outside, canary):
    os.symlink(canary, shop.place / "link-to-canary")
    elsewhere = {
        "absolute": canary,
        "relative": os.path.relpath(canary, shop.place),
        "dots": f"{shop.place}/../{outside.name}/{canary.name}",
        "symlink": "link-to-canary",
        "etc": "/etc/shadow",
        "proc": "/proc/self/environ",
        "device": "/dev/zero",
        "directory": "/etc",
    }
    for name, path in elsewhere.items():
        for image_format in ("qcow2", "qed", "qcow"):
            image = shop.qemu(image_format, f"backing-{name}.{image_format}", "-u", "-b", str(path), "-F", "raw")
            _add(shop, "backing_file", image)
    protocols = (
        "nbd:127.0.0.1:10809", "nbd+unix:///?socket=/run/x", "nbd://127.0.0.1/x", "http://127.0.0.1/x", "https://127.0.0.1/x",
        "ssh://127.0.0.1/x", "rbd:pool/x", "iscsi://127.0.0.1/iqn.x/1", "file:base.qcow2", f"file:{canary}", "fat:rw:/etc",
        f'json:{{"driver":"file","filename":"{canary}"}}', "vvfat:/etc", "blkdebug::base.qcow2", "ftp://127.0.0.1/x",
        "nfs://h/x",
    )  # fmt: skip
    base = shop.qemu("qcow2", "long-name.qcow2", "-u", "-b", "n" * 200, "-F", "raw")
    at, length = shop.at(base, 8, ">Q"), struct.pack
    (shop.place / base).rename(shop.place / "long-name")
    for number, recorded in enumerate(protocols):
        data = recorded.encode()
        name = shop.patch("long-name", f"protocol{number}.qcow2", (at, data), (16, length(">I", len(data))))
        _add(shop, "backing_file", name)
    _add(shop, "backing_file", shop.patch("long-name", "nul.qcow2", (at, b"base\0.qcow2"), (16, length(">I", 11))))
    (shop.place / "long-name").unlink()
    middle = shop.qemu("qcow2", "middle.qcow2", "-u", "-b", str(canary), "-F", "raw")
    _add(shop, "backing_file", shop.qemu("qcow2", "above-middle.qcow2", "-u", "-b", middle, "-F", "qcow2"))
    for number, form in enumerate(("luks", "bochs", "dmg", "parallels", "cloop", "vvfat", "nbd", "host_device")):
        name = shop.qemu("qcow2", f"odd-format{number}.qcow2", "-u", "-b", "base.qcow2", "-F", "raw")
        at = shop.bytes_of(name).index(struct.pack(">II", 0xE2792ACA, 3))
        data = form.encode()
        piece = struct.pack(">II", 0xE2792ACA, len(data)) + data.ljust(-(-len(data) // 8) * 8, b"\0") + bytes(8)
        # What came behind it goes; it would say what features are called.
        _add(shop, "backing_format", shop.patch(name, name + "x", (at, piece)))
        (shop.place / name).unlink()
    for image_format in ("qcow2", "vdi", "vmdk", "qed"):
        # qemu-img wants to be told, and then does not write it down.
        name = shop.qemu("qcow", f"untold-{image_format}.qcow", "-u", "-b", f"base.{image_format}", "-F", image_format)
        _add(shop, "backing_format", name)


def _chains(shop, outside, canary):
    """Names of the same length, so that one overlay can be made of another by a patch."""
    link = shop.qemu("qcow2", "link.qcow2", "-u", "-b", "link0000", "-F", "qcow2")
    at = shop.at(link, 8, ">Q")
    for number in range(1, 101):
        shop.patch(link, f"link{number:04}", (at, b"link%04d" % (number - 1)))
    shop.qemu("qcow2", "link0000")
    for number in (65, 100):
        _add(shop, "chain_depth", f"link{number:04}")
    for name, length in (("s", 1), ("t", 2), ("u", 3), ("v", 10)):
        for number in range(length):
            shop.patch(link, f"loop-{name}-{number}", (at, f"loop-{name}-{(number + 1) % length}".encode()))
        _add(shop, "chain_loop", f"loop-{name}-0")


def _links(shop, outside, canary):
    names = {"to-canary": canary, "relative": os.path.relpath(canary, shop.place), "two-steps": "link-to-canary"}
    for name, path in names.items():
        os.symlink(path, shop.place / f"symlink-{name}")
        _add(shop, "symbolic_link", f"symlink-{name}")
    os.symlink("/etc/passwd", shop.place / "symlink-etc")
    _add(shop, "symbolic_link", "symlink-etc")
    os.link(canary, shop.place / "hardlink")
    _add(shop, "hard_link", "hardlink")
    _add(shop, "hard_link", shop.qemu("qcow2", "above-hardlink", "-u", "-b", "hardlink", "-F", "raw"))
    os.symlink("hardlink", shop.place / "symlink-hardlink")
    _add(shop, "hard_link", "symlink-hardlink")


def _data_files(shop, outside, canary):
    place = shop.place
    for number, recorded in enumerate((canary, "beside", os.path.relpath(canary, place))):
        victim = place / str(recorded)
        held = victim.read_bytes() if victim.exists() else None
        target = victim if held is None else place / "stand-in"
        name = f"data-file{number}.qcow2"
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={target},data_file_raw=on", place / name, "1M")
        target.unlink()
        if held is not None:
            at = shop.bytes_of(name).index(struct.pack(">I", 0x44415441))
            data = str(recorded).encode()
            shop.patch(name, name + "x", (at + 4, struct.pack(">I", len(data)) + data + bytes(16)))
            (place / name).unlink()
            name += "x"
        _add(shop, "data_file", name)
    # The mark alone, without a name; it stands below another, and with a name that is a protocol.
    _add(shop, "data_file", shop.patch("base.qcow2", "data-file-unnamed", (72, struct.pack(">Q", 4))))
    _add(shop, "data_file", shop.qemu("qcow2", "above-data-file", "-u", "-b", "data-file-unnamed", "-F", "qcow2"))
    name = b'json:{"driver":"nbd","host":"127.0.0.1"}'
    extension = struct.pack(">II", 0x44415441, len(name)) + name.ljust(-(-len(name) // 8) * 8, b"\0") + bytes(8)
    length = shop.at("base.qcow2", 100, ">I")
    _add(shop, "data_file", shop.patch("base.qcow2", "data-file-protocol", (72, struct.pack(">Q", 4)), (length, extension)))


def _vmdk(shop, outside, canary):
    at = shop.at("base.vmdk", 28, "<Q") * 512
    text = shop.bytes_of("base.vmdk")[at : at + 20 * 512].split(b"\0", 1)[0]

    def embedded(number, changed, *more):
        name = shop.patch("base.vmdk", f"extent{number}.vmdk", (at, changed.ljust(20 * 512, b"\0")), *more)
        _add(shop, "extent", name)

    own = text[text.index(b"RW ") :].split(b"\n", 1)[0]
    flat = f'RW 2048 FLAT "{canary}" 0'.encode()
    changes = [
        text.replace(b"monolithicSparse", b"monolithicFlat"),
        text.replace(b"monolithicSparse", b"twoGbMaxExtentSparse"),
        text.replace(b"monolithicSparse", b"vmfs"),
        text.replace(b"monolithicSparse", b"fullDevice"),
        text.replace(b"monolithicSparse", b"custom"),
        text.replace(b"createType", b"kind"),
        text.replace(own, flat),
        text.replace(own, own + b"\n" + flat),
        text.replace(own, own + b"\n" + own),
        text.replace(own, f'RW 2048 VMFS "{canary}"'.encode()),
        text.replace(own, f'RW 2048 VMFSRDM "{canary}"'.encode()),
        text.replace(own, f'RW 2048 ZERO\nRDONLY 2048 FLAT "{canary}" 0'.encode()),
        text + b'\ncreateType="monolithicFlat"\n' + flat,
        text + b"\n" + flat.replace(b"RW", b"rw"),
        text + b"\n \t" + flat,
        text + b"\r" + flat,
        b'createtype="monolithicSparse"\n' + text.replace(b"monolithicSparse", b"monolithicFlat").replace(own, flat),
    ]
    for number, changed in enumerate(changes):
        embedded(number, changed)
    embedded(len(changes), text.replace(own, flat), (12, bytes(8)))
    # No header at all: the descriptor is the file.
    kinds = ("monolithicFlat", "twoGbMaxExtentFlat", "vmfs", "monolithicSparse", "streamOptimized", "custom")
    for kind in kinds:
        name = f"descriptor-{kind}.vmdk"
        (shop.place / name).write_bytes(b'# Disk DescriptorFile\nversion=1\ncreateType="%s"\n' % kind.encode() + flat + b"\n")
        _add(shop, "extent", name)
    _add(shop, "extent", shop.patch("base.vmdk", "cowd.vmdk", (0, b"COWD")))
    for number, line in enumerate((f'parentFileNameHint="{canary}"', 'PARENTFILENAMEHINT = "x"', "parentCID=12345678")):
        changed = text.replace(b"parentCID=ffffffff", b"") + f"\n{line}\n".encode()
        name = shop.patch("base.vmdk", f"parent{number}.vmdk", (at, changed.ljust(20 * 512, b"\0")))
        _add(shop, "parent_locator", name)


def _parents(shop, outside, canary):
    for kind in (0, 3, 4, 5):
        _add(shop, "parent_locator", shop.patch("base.vdi", f"type{kind}.vdi", (0x4C, struct.pack("<I", kind))))
    for at in (424, 440):
        _add(shop, "parent_locator", shop.patch("base.vdi", f"uuid{at}.vdi", (at, b"\1" * 16)))
    footer, head = shop.bytes_of("base.vpc")[:512], shop.bytes_of("base.vpc")[512:1536]
    changed = bytearray(footer)
    changed[60:64] = struct.pack(">I", 4)
    changed[64:68] = vhd_sum(changed, 64)
    _add(shop, "parent_locator", shop.patch("base.vpc", "type4.vpc", (0, changed), (-512, changed)))
    for at, data in ((576, b"W2ku"), (40, b"\1" * 16), (744, b"Wi2r")):
        changed = bytearray(head)
        changed[at : at + len(data)] = data
        changed[36:40] = vhd_sum(changed, 36)
        _add(shop, "parent_locator", shop.patch("base.vpc", f"locator{at}.vpc", (512, changed)))
    place, data = vhdx_metadata(shop)
    at = place + struct.unpack_from("<I", data, data.index(FILE_PARAMETERS) + 16)[0]
    flags = shop.at("base.vhdx", at + 4, "<I")
    _add(shop, "parent_locator", shop.patch("base.vhdx", "has-parent.vhdx", (at + 4, struct.pack("<I", flags | 2))))
    _add(shop, "parent_locator", add_metadata(shop, "locator.vhdx", PARENT, 4))


def vhdx_metadata(shop):
    """Place of the metadata of base.vhdx, and its table."""
    region = shop.bytes_of("base.vhdx")[REGIONS[0] : REGIONS[0] + 65536]
    name = uuid.UUID("8b7ca206-4790-4b9a-b8fe-575f050f886e").bytes_le
    place = struct.unpack_from("<Q", region, region.index(name) + 16)[0]
    return place, shop.bytes_of("base.vhdx")[place : place + 65536]


def add_metadata(shop, name, item, flags):
    place, data = vhdx_metadata(shop)
    count = struct.unpack_from("<H", data, 10)[0]
    entry = item + struct.pack("<IIII", 65536, 0, flags, 0)
    return shop.patch("base.vhdx", name, (place + 10, struct.pack("<H", count + 1)), (place + 32 + 32 * count, entry))


def vhdx_region(shop, name, change):
    region = bytearray(shop.bytes_of("base.vhdx")[REGIONS[0] : REGIONS[0] + 65536])
    change(region)
    region[4:8] = bytes(4)
    region[4:8] = struct.pack("<I", crc32c(region))
    return shop.patch("base.vhdx", name, *((at, region) for at in REGIONS))


def vhdx_header(shop, name, *pieces):
    patches = []
    for at in HEADERS:
        head = bytearray(shop.bytes_of("base.vhdx")[at : at + 4096])
        for place, data in pieces:
            head[place : place + len(data)] = data
        head[4:8] = bytes(4)
        head[4:8] = struct.pack("<I", crc32c(head))
        patches.append((at, head))
    return shop.patch("base.vhdx", name, *patches)


def _two_formats(shop, outside, canary):
    footer = shop.bytes_of("fixed.vpc")[-512:]
    for image_format in ("qcow2", "vmdk", "qed", "vdi", "qcow", "vhdx"):
        _add(shop, "two_formats", shop.patch(f"base.{image_format}", f"footer.{image_format}", append=footer))
        _add(shop, "two_formats", shop.patch(f"base.{image_format}", f"iso.{image_format}", (0x8000, ISO)))
        _add(shop, "two_formats", shop.patch(f"base.{image_format}", f"mbr.{image_format}", (446, PARTITIONS)))
    for image_format in ("qcow2", "vdi", "qed", "vhdx"):
        _add(shop, "two_formats", shop.patch(f"base.{image_format}", f"gpt.{image_format}", (512, GPT)))
    header = shop.bytes_of("base.vdi")[:512]
    for name, start in (("qcow2", b"QFI\xfb\0\0\0\3"), ("qed", b"QED\0"), ("luks", b"LUKS\xba\xbe\0\1"), ("vmdk", b"KDMV")):
        _add(shop, "two_formats", shop.patch("base.vdi", f"begins-as-{name}.vdi", (0, start)))
    # A guest's raw disk, in whose boot code somebody put a whole header.
    (shop.place / "guest.raw").write_bytes(header[:446] + PARTITIONS + bytes(MIB))
    _add(shop, "two_formats", "guest.raw")
    (shop.place / "footer.raw").write_bytes(noise(65536) + footer)
    _add(shop, "footer_only", "footer.raw")
    _add(shop, "footer_only", shop.patch("fixed.vpc", "unsaid.vpc"))
    _add(shop, "footer_only", shop.patch("fixed.vpc", "disk.vpc", (446, PARTITIONS)))


def _features(shop, outside, canary):
    for bit in (5, 6, 7, 31, 32, 63):
        _add(shop, "unknown_feature", shop.patch("base.qcow2", f"bit{bit}.qcow2", (72, struct.pack(">Q", 1 << bit))))
    for version in (0, 4, 255, 1 << 31):
        _add(shop, "unknown_feature", shop.patch("base.qcow2", f"version{version}.qcow2", (4, struct.pack(">I", version))))
    for kind in (2, 255):
        _add(shop, "unknown_feature", shop.patch("base.qcow2", f"compression{kind}.qcow2", (79, b"\x08"), (104, bytes([kind]))))
    for bit in (3, 63):
        _add(shop, "unknown_feature", shop.patch("base.qed", f"bit{bit}.qed", (16, struct.pack("<Q", 1 << bit))))
    for version in (0, 4):
        _add(shop, "unknown_feature", shop.patch("base.vmdk", f"version{version}.vmdk", (4, struct.pack("<I", version))))
    _add(shop, "unknown_feature", shop.patch("stream.vmdk", "compression.vmdk", (77, b"\2\0"), (-1024 + 77, b"\2\0")))
    for version in (1, 0x10002, 0x20001):
        _add(shop, "unknown_feature", shop.patch("base.vdi", f"version{version:x}.vdi", (68, struct.pack("<I", version))))
    _add(shop, "unknown_feature", shop.patch("base.vpc", "version.vpc", (12, struct.pack(">I", 2 << 16))))
    _add(shop, "unknown_feature", vhdx_header(shop, "version.vhdx", (66, b"\2\0")))
    _add(shop, "unknown_feature", vhdx_header(shop, "log-version.vhdx", (64, b"\1\0")))
    _add(shop, "unknown_feature", add_metadata(shop, "metadata.vhdx", b"\7" * 16, 4))

    def one_more(region):
        count = struct.unpack_from("<I", region, 8)[0]
        region[8:12] = struct.pack("<I", count + 1)
        region[16 + 32 * count : 48 + 32 * count] = b"\7" * 16 + struct.pack("<QII", 16 * MIB, MIB, 1)

    _add(shop, "unknown_feature", vhdx_region(shop, "region.vhdx", one_more))


def _limits(shop, outside, canary):
    for image_format in ("qcow2", "vmdk", "vdi", "vpc", "vhdx", "qed", "qcow"):
        name = shop.qemu(image_format, f"large.{image_format}", size="3G")
        _add(shop, "over_limit", name, max_capacity="2GiB")
    _add(shop, "over_limit", shop.qemu("qcow2", "petabyte.qcow2", "-o", "cluster_size=2M", size="1P"))
    for name, size in (("just-over.raw", (64 << 40) + 1), ("eight-exbibytes.raw", (1 << 63) - 4096)):
        with open(shop.place / name, "wb") as file:
            os.truncate(file.fileno(), size)
        _add(shop, "over_limit", name)
    name = shop.qemu("qcow2", "small-above-large.qcow2", "-u", "-b", "large.qcow2", "-F", "qcow2")
    _add(shop, "over_limit", name, max_capacity="2GiB")


def _marks(shop, outside, canary):
    _add(shop, "dirty", shop.patch("base.qcow2", "dirty.qcow2", (79, b"\1")))
    _add(shop, "corrupt", shop.patch("base.qcow2", "corrupt.qcow2", (79, b"\2")))
    _add(shop, "corrupt", shop.patch("base.qcow2", "both.qcow2", (79, b"\3")))
    _add(shop, "dirty", shop.patch("base.qed", "dirty.qed", (16, b"\2")))
    _add(shop, "dirty", vhdx_header(shop, "dirty.vhdx", (48, b"\7" * 16)))
    for mark in ("dirty", "corrupt"):
        _add(shop, mark, shop.qemu("qcow2", f"above-{mark}.qcow2", "-u", "-b", f"{mark}.qcow2", "-F", "qcow2"))
    _add(shop, "dirty", shop.qemu("qcow2", "above-vhdx.qcow2", "-u", "-b", "dirty.vhdx", "-F", "vhdx"))
    for name, pieces in (("luks", [(0, b"LUKS\xba\xbe\0\2")]), ("qcow2", [(32, struct.pack(">I", 2))]), ("aes", [(35, b"\1")])):
        base, form = ("content", "raw") if name == "luks" else ("base.qcow2", "qcow2")
        shop.patch(base, f"encrypted.{name}", *pieces)
        above = shop.qemu("qcow2", f"above-encrypted-{name}.qcow2", "-u", "-b", f"encrypted.{name}", "-F", form)
        _add(shop, "encrypted", above)


def _qcow2(shop):
    def each(check, *fields):
        for number, (at, layout, value) in enumerate(fields):
            name = f"{check}{number}-at{at}.qcow2"
            _add(shop, check, shop.patch("base.qcow2", name, (at, struct.pack(layout, value))))

    end = (shop.place / "base.qcow2").stat().st_size
    each(
        "header",
        *((20, ">I", value) for value in (0, 8, 22, 31, 1 << 31)),
        *((32, ">I", value) for value in (3, 1 << 31)),
        *((96, ">I", value) for value in (7, 31, 1 << 31)),
        *((100, ">I", value) for value in (0, 72, 103, 65537, 1 << 31)),
        *((40, ">Q", value) for value in (0, 4096, 65537)),
        (48, ">Q", 0), (48, ">Q", 511), (56, ">I", 0), (56, ">I", 1 << 20), (60, ">I", 65537), (104, ">B", 1),
    )  # fmt: skip
    each(
        "out_of_file",
        *((40, ">Q", value) for value in (end, 1 << 40, (1 << 63) - 8, (1 << 64) - 65536)),
        (48, ">Q", 1 << 50), (8, ">Q", 1 << 40), (8, ">Q", 65530), (8, ">Q", 16), (36, ">I", 1 << 20),
    )  # fmt: skip
    each("capacity", (24, ">Q", 1 << 63), (24, ">Q", (1 << 64) - 1), (24, ">Q", GIB), (36, ">I", 0), (36, ">I", (4 << 20) + 1))
    pieces = ((60, struct.pack(">IQ", 2, end)),)
    _add(shop, "out_of_file", shop.patch("base.qcow2", "snapshots.qcow2", *pieces))
    length = shop.at("base.qcow2", 100, ">I")
    _add(shop, "out_of_file", shop.patch("base.qcow2", "extension.qcow2", (length, struct.pack(">II", 0xE2792ACA, 1 << 30))))


def _others(shop):
    def each(image_format, *fields):
        for number, (check, at, layout, value) in enumerate(fields):
            name = f"{check}{number}-at{at}.{image_format}"
            _add(shop, check, shop.patch(f"base.{image_format}", name, (at, struct.pack(layout, value))))

    each(
        "qed",
        ("header", 4, "<I", 0), ("header", 4, "<I", 3000), ("header", 4, "<I", 1 << 27), ("header", 8, "<I", 0),
        ("header", 8, "<I", 3), ("header", 8, "<I", 32), ("header", 12, "<I", 0), ("header", 40, "<Q", 1),
        ("header", 40, "<Q", 0), ("out_of_file", 40, "<Q", 1 << 50), ("capacity", 48, "<Q", 1 << 63),
        ("capacity", 48, "<Q", 1000), ("header", 16, "<Q", 1),
    )  # fmt: skip
    each(
        "qcow",
        ("header", 32, ">B", 8), ("header", 32, ">B", 17), ("header", 33, ">B", 5), ("header", 33, ">B", 14),
        ("header", 36, ">I", 2), ("capacity", 24, ">Q", 0), ("capacity", 24, ">Q", 1), ("capacity", 24, ">Q", 1 << 63),
        ("out_of_file", 40, ">Q", 1 << 40), ("out_of_file", 24, ">Q", 1 << 35), ("header", 8, ">Q", 4096),
    )  # fmt: skip
    each(
        "vdi",
        ("header", 360, "<I", 4096), ("header", 376, "<I", 4096), ("header", 380, "<I", 1), ("header", 340, "<I", 513),
        ("header", 340, "<I", 0), ("header", 388, "<I", 1000), ("capacity", 384, "<I", 1 << 30),
        ("capacity", 368, "<Q", 1 << 50), ("out_of_file", 340, "<I", 0xFFFFFE00), ("out_of_file", 344, "<I", 0xFFFFFE00),
        ("out_of_file", 384, "<I", 1 << 28),
    )  # fmt: skip
    each(
        "vmdk",
        ("header", 20, "<Q", 0), ("header", 20, "<Q", 3), ("header", 20, "<Q", 1 << 22), ("header", 44, "<I", 0),
        ("header", 44, "<I", 1024), ("capacity", 12, "<Q", 1 << 60), ("capacity", 12, "<Q", 1 << 53),
        ("out_of_file", 56, "<Q", 1 << 40), ("out_of_file", 48, "<Q", 1 << 40), ("out_of_file", 64, "<Q", 1 << 40),
        ("out_of_file", 12, "<Q", 1 << 40), ("extent", 28, "<Q", 0), ("extent", 28, "<Q", 1 << 62),
    )  # fmt: skip
    streamed(shop, "stream.vmdk", "at-end.vmdk")
    _add(shop, "header", shop.patch("at-end.vmdk", "not-at-end.vmdk", (-1024, b"KDMX")))
    _add(shop, "out_of_file", shop.patch("at-end.vmdk", "directory-at-end.vmdk", (-1024 + 56, struct.pack("<Q", 1 << 40))))
    _add(shop, "unreadable", shop.patch("at-end.vmdk", "no-end.vmdk", (-512, b"\1")))
    _vhd(shop)
    _vhdx(shop)


def _vhd(shop):
    base = shop.bytes_of("base.vpc")

    def footer(number, check, at, data):
        changed = bytearray(base[:512])
        changed[at : at + len(data)] = data
        changed[64:68] = vhd_sum(changed, 64)
        _add(shop, check, shop.patch("base.vpc", f"footer{number}.vpc", (0, changed)))

    def dynamic(number, check, at, data):
        changed = bytearray(base[512:1536])
        changed[at : at + len(data)] = data
        changed[36:40] = vhd_sum(changed, 36)
        _add(shop, check, shop.patch("base.vpc", f"dynamic{number}.vpc", (512, changed)))

    footer(0, "header", 60, struct.pack(">I", 2))
    footer(1, "header", 60, struct.pack(">I", 7))
    footer(2, "out_of_file", 16, struct.pack(">Q", 1 << 50))
    footer(3, "header", 16, struct.pack(">Q", 0))
    footer(4, "capacity", 48, struct.pack(">Q", 1 << 50))
    dynamic(0, "header", 0, b"cxwrong!")
    dynamic(1, "header", 32, struct.pack(">I", 1000))
    dynamic(2, "header", 32, bytes(4))
    dynamic(3, "out_of_file", 16, struct.pack(">Q", 1 << 50))
    dynamic(4, "out_of_file", 28, struct.pack(">I", 1 << 28))
    dynamic(5, "capacity", 28, bytes(4))
    _add(shop, "header", shop.patch("base.vpc", "sum1.vpc", (64, bytes(4))))
    _add(shop, "header", shop.patch("base.vpc", "sum2.vpc", (512 + 36, bytes(4))))
    pinned = {"source_format": "vpc"}
    changed = bytearray(shop.bytes_of("fixed.vpc")[-512:])
    for number, (check, at, data) in enumerate(
        (("capacity", 48, struct.pack(">Q", 1 << 40)), ("header", 60, b"\0\0\0\3"), ("parent_locator", 60, b"\0\0\0\4"))
    ):
        changed[at : at + len(data)] = data
        changed[64:68] = vhd_sum(changed, 64)
        _add(shop, check, shop.patch("fixed.vpc", f"fixed{number}.vpc", (-512, changed)), **pinned)
    (shop.place / "no-footer.vpc").write_bytes(noise(4096))
    _add(shop, "header", "no-footer.vpc", **pinned)


def _vhdx(shop):
    place, data = vhdx_metadata(shop)

    def item(number, check, name, value, layout):
        at = place + struct.unpack_from("<I", data, data.index(name) + 16)[0]
        _add(shop, check, shop.patch("base.vhdx", f"item{number}.vhdx", (at, struct.pack(layout, value))))

    item(0, "header", FILE_PARAMETERS, 1000, "<I")
    item(1, "header", FILE_PARAMETERS, 512 * MIB, "<I")
    item(2, "capacity", VIRTUAL_SIZE, 65 << 40, "<Q")
    item(3, "capacity", VIRTUAL_SIZE, 1000, "<Q")
    item(4, "capacity", VIRTUAL_SIZE, 1 << 40, "<Q")
    item(5, "header", LOGICAL_SECTOR, 1000, "<I")
    _add(shop, "header", shop.patch("base.vhdx", "no-headers.vhdx", *((at, bytes(4096)) for at in HEADERS)))
    _add(shop, "header", shop.patch("base.vhdx", "sums.vhdx", *((at + 4, bytes(4)) for at in HEADERS)))
    _add(shop, "header", shop.patch("base.vhdx", "no-regions.vhdx", *((at, bytes(4096)) for at in REGIONS)))
    _add(shop, "header", shop.patch("base.vhdx", "no-metadata.vhdx", (place, bytes(8))))
    missing = data.index(VIRTUAL_SIZE)
    _add(
        shop, "header", shop.patch("base.vhdx", "no-size.vhdx", (place + missing, bytes(16)), (place + missing + 24, bytes(4)))
    )
    _add(shop, "out_of_file", shop.patch("base.vhdx", "item-far.vhdx", (place + missing + 16, struct.pack("<I", 1 << 31))))

    def far(region):
        for at in (32, 64):
            region[at : at + 8] = struct.pack("<Q", 1 << 50)

    def many(region):
        region[8:12] = struct.pack("<I", 1 << 31)

    def twice(region):
        region[48:80] = region[16:48]

    def crooked(region):
        region[32:40] = struct.pack("<Q", MIB + 512)

    _add(shop, "out_of_file", vhdx_region(shop, "region-far.vhdx", far))
    for change in (many, twice, crooked):
        _add(shop, "header", vhdx_region(shop, f"region-{change.__name__}.vhdx", change))
    # Only its checksum is wrong: nobody but qemu-img looks at that.
    _add(shop, "unreadable", shop.patch("base.vhdx", "region-sum.vhdx", *((at + 4, bytes(4)) for at in REGIONS)))


def _torn(shop):
    """Cut off within their tables, or before their data."""
    for image_format, sizes in {
        "qcow2": (8 << 10, 64 << 10, 192 << 10),
        "vmdk": (600, 11 << 10),
        "vdi": (512, MIB),
        "vpc": (600, 1536),
        "vhdx": (MIB, 2 * MIB),
        "qed": (63, 64, 4096, 64 << 10),
        "qcow": (40, 48),
    }.items():
        for size in sizes:
            check = "extent" if (image_format, size) == ("vmdk", 600) else "out_of_file"
            _add(shop, check, shop.patch(f"base.{image_format}", f"torn{size}.{image_format}", size=size))
    for size in (8, 71, 100):
        _add(shop, "header", shop.patch("base.qcow2", f"torn{size}.qcow2", size=size))


def _checked(shop):
    """Sound headers over tables that are not."""
    l1 = shop.at("base.qcow2", 40, ">Q")
    l2 = shop.at("base.qcow2", l1, ">Q") & 0x00FFFFFFFFFFFE00
    refcounts = shop.at("base.qcow2", 48, ">Q")
    data = shop.at("base.qcow2", l2, ">Q")
    for number, (at, value) in enumerate(
        (
            (l1, 1 << 50 | 1 << 63),
            (l1, l1 | 1 << 63),
            (l2, refcounts | 1 << 63),
            (l2, data + 512),
            (l2, 1 << 50 | 1 << 63),
            (refcounts, 1 << 50),
            (refcounts, 0),
        )
    ):
        _add(shop, "qemu_check", shop.patch("base.qcow2", f"tables{number}.qcow2", (at, struct.pack(">Q", value))))
    bitmap = shop.at("base.vdi", 340, "<I")
    _add(shop, "qemu_check", shop.patch("base.vdi", "tables.vdi", (bitmap, struct.pack("<I", 5))))
    l1 = shop.at("base.qed", 40, "<Q")
    _add(shop, "qemu_check", shop.patch("base.qed", "tables.qed", (l1, struct.pack("<Q", 1 << 50))))


def streamed(shop, base, name):
    """A stream as VMware writes one: only a second header, near its end, says where its tables are (block/vmdk.c of QEMU)."""
    head = shop.bytes_of(base)[:512]
    length = -(-(shop.place / base).stat().st_size // 512) * 512
    footer = struct.pack("<QII", 1, 0, 3).ljust(512, b"\0") + head + bytes(512)
    return shop.patch(base, name, (56, b"\xff" * 8), size=length, append=footer)


# --- honest ---------------------------------------------------------------------------------------------------------------

#: names of the contents, and their length
SIZES = {"even": MIB, "odd": 3 * 65536 + 512, "long": 40 * MIB}


def honest(place):
    """Build them all in ``place``."""
    shop = Workshop(place)
    for number, (name, size) in enumerate(SIZES.items()):
        with open(place / name, "wb") as file:
            file.write(noise(65536, seed=number))
            file.seek(size - 100_000 if size > 200_000 else 65536)
            file.write(noise(50_000, seed=number + 10))
            file.truncate(size)
    for build in (_honest_raw, _honest_qcow2, _honest_chains, _honest_others, _honest_encrypted):
        build(shop)
    return shop.honest


def _keep(shop, image_format, name, content, **params):
    path = None if content is None else shop.place / content
    shop.honest.append(Honest(name, image_format, path, params))


def _honest_raw(shop):
    for size in (0, 1, 511, 512, 513, 4095, 4096, 65537, MIB, MIB + 1, 8 * MIB):
        name = f"size{size}.raw"
        with open(shop.place / name, "wb") as file:
            file.write(noise(min(size, 70000), seed=size))
            file.truncate(size)
        _keep(shop, "raw", name, None)
    begins = {
        "mbr": (446, PARTITIONS), "gpt": (512, GPT), "iso": (0x8000, ISO), "luks1": (0, b"LUKS\xba\xbe\0\1"),
        "luks2": (0, b"LUKS\xba\xbe\0\2"), "parallels": (0, b"WithoutFreeSpace"), "bochs": (0, b"Bochs Virtual HD Image"),
        "gzip": (0, b"\x1f\x8b\x08"), "qf": (0, b"QFI"), "text": (0, b"# Disk Descriptor"), "footer-above": (512, b"conectix"),
        "late-vdi": (128, b"\x7f\x10\xda\xbe"), "vhdx": (0, b"vhdxfil"),
    }  # fmt: skip
    for name, piece in begins.items():
        _keep(shop, "raw", shop.patch("even", f"{name}.raw", piece), None)
    _keep(shop, "raw", shop.patch("even", "hybrid.raw", (446, PARTITIONS), (512, GPT), (0x8000, ISO)), None)
    # Any bytes at all, where somebody has said that they are a raw disk.
    pinned = {"source_format": "raw"}
    for name, start in (("qcow2", b"QFI\xfb\0\0\0\3"), ("qed", b"QED\0"), ("vmdk", b"KDMV"), ("vhdx", b"vhdxfile")):
        _keep(shop, "raw", shop.patch("even", f"pinned-{name}.raw", (0, start)), None, **pinned)
    text = b'# Disk DescriptorFile\ncreateType="monolithicFlat"\nRW 8 FLAT "/etc/shadow" 0\n'
    _keep(shop, "raw", shop.patch("even", "pinned-text.raw", (0, text)), None, **pinned)
    _keep(shop, "raw", shop.patch("even", "pinned-vdi.raw", (64, b"\x7f\x10\xda\xbe"), (446, PARTITIONS)), None, **pinned)
    _keep(shop, "raw", shop.patch("even", "pinned-footer.raw", append=b"conectix".ljust(512, b"\0")), None, **pinned)
    overlay = shop.qemu("qcow2", "pinned-overlay.raw", "-u", "-b", "/etc/shadow", "-F", "raw")
    _keep(shop, "raw", overlay, None, **pinned)


def _honest_qcow2(shop):
    def make(name, *options, content="even"):
        _keep(shop, "qcow2", shop.convert(content, "qcow2", f"{name}.qcow2", *options), content)

    for size in ("512", "1k", "4k", "16k", "64k", "1M", "2M"):
        for compat in ("0.10", "1.1"):
            make(f"cluster{size}-{compat}", "-o", f"cluster_size={size},compat={compat}")
    for bits in (1, 2, 4, 8, 32, 64):
        make(f"refcount{bits}", "-o", f"refcount_bits={bits}")
    for size in ("16k", "64k", "256k", "2M"):
        make(f"subclusters{size}", "-o", f"extended_l2=on,cluster_size={size}")
    for kind in ("zlib", "zstd"):
        for size in ("4k", "64k", "2M"):
            make(f"{kind}{size}", "-c", "-o", f"compression_type={kind},cluster_size={size}")
    make("compressed-0.10", "-c", "-o", "compat=0.10")
    make("lazy", "-o", "lazy_refcounts=on")
    make("compressed-subclusters", "-c", "-o", "extended_l2=on")
    for mode in ("metadata", "falloc", "full"):
        make(f"preallocated-{mode}", "-o", f"preallocation={mode}")
    for content in ("odd", "long"):
        for options in ((), ("-c",), ("-o", "cluster_size=512"), ("-o", "cluster_size=2M")):
            make(f"{content}-{'-'.join(options) or 'plain'}", *options, content=content)
    for compat in ("0.10", "1.1"):
        for count in (1, 3):
            make(f"snapshots{count}-{compat}", "-o", f"compat={compat}")
            for number in range(count):
                run("qemu-img", "snapshot", "-c", f"s{number}", shop.place / f"snapshots{count}-{compat}.qcow2")
    make("bitmap")
    run("qemu-img", "bitmap", "--add", "-f", "qcow2", shop.place / "bitmap.qcow2", "nightly")
    for size in ("0", "512", "1T", "64T"):
        name = shop.qemu("qcow2", f"empty{size}.qcow2", *(["-o", "cluster_size=2M"] if size == "64T" else []), size=size)
        _keep(shop, "qcow2", name, None)
    # Features that need not be understood.
    for at, what in ((80, "compatible"), (88, "autoclear")):
        name = shop.patch("cluster64k-1.1.qcow2", f"{what}.qcow2", (at, struct.pack(">Q", 1 << 50)))
        _keep(shop, "qcow2", name, "even")


def _honest_chains(shop):
    shop.copy("even", "base-even.raw")
    for image_format in ("qcow2", "vmdk", "vdi", "vpc", "vhdx", "qed", "qcow"):
        options = ["-o", "force_size=on"] if image_format == "vpc" else []
        shop.convert("even", image_format, f"base-even.{image_format}", *options)
    for below in ("raw", "qcow2", "vmdk", "vdi", "vpc", "vhdx", "qed", "qcow"):
        name = shop.qemu("qcow2", f"above-{below}.qcow2", "-u", "-b", f"base-even.{below}", "-F", below)
        _keep(shop, "qcow2", name, "even")
    for above in ("qed", "qcow"):
        name = shop.qemu(above, f"above-raw.{above}", "-u", "-b", str(shop.place / "base-even.raw"), "-F", "raw")
        _keep(shop, above, name, "even")
    link = shop.qemu("qcow2", "link.qcow2", "-u", "-b", "link0000", "-F", "qcow2")
    at = shop.at(link, 8, ">Q")
    shop.copy("base-even.qcow2", "link0000")
    for number in range(1, 65):
        shop.patch(link, f"link{number:04}", (at, b"link%04d" % (number - 1)))
    for number in (1, 2, 5, 64):
        _keep(shop, "qcow2", f"link{number:04}", "even")
    for name, path in (("dots", "./../{}/base-even.raw"), ("absolute", "{}/base-even.raw"), ("link", "by-link")):
        path = path.format(shop.place if name == "absolute" else shop.place.name)
        _keep(shop, "qcow2", shop.qemu("qcow2", f"{name}.qcow2", "-u", "-b", path, "-F", "raw"), "even")
    os.symlink("base-even.raw", shop.place / "by-link")
    _keep(shop, "raw", "by-link", "even")
    os.link(shop.place / "base-even.qcow2", shop.place / "another-name.qcow2")
    _keep(shop, "qcow2", "another-name.qcow2", "even")


def _honest_others(shop):
    def make(image_format, *variants, suffix="", **params):
        for number, options in enumerate(variants):
            for content in SIZES:
                name = f"{content}{number}{suffix}.{image_format}"
                exact = ["force_size=on"] if image_format == "vpc" else []
                given = ",".join(filter(None, [options, *exact]))
                shop.convert(content, image_format, name, *(["-o", given] if given else []))
                _keep(shop, image_format, name, content, **params)

    make("vmdk", "", "adapter_type=lsilogic", "compat6=on", "subformat=streamOptimized", "zeroed_grain=on")
    _keep(shop, "vmdk", streamed(shop, "even3.vmdk", "at-end.vmdk"), "even")
    make("vdi", "", "static=on")
    make("vpc", "")
    make("vpc", "subformat=fixed", suffix="-fixed", source_format="vpc")
    make("vhdx", "", "block_size=1M", "subformat=fixed,block_size=1M", "block_size=32M,log_size=2M", "block_state_zero=off")
    make("qed", "", "cluster_size=4096", "table_size=2", "cluster_size=1M,table_size=16")
    make("qcow", "")


def _honest_encrypted(shop):
    """Nobody here has their secret, so their bytes are what counts."""
    secret = shop.place / "secret"
    secret.write_text("open sesame")
    key = ["--object", f"secret,id=key,file={secret}"]
    luks = "key-secret=key,iter-time=10"
    run("qemu-img", "create", "-q", *key, "-f", "luks", "-o", luks, shop.place / "luks.img", "1M")
    _keep(shop, "raw", "luks.img", None)
    encrypt = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10"
    run("qemu-img", "create", "-q", *key, "-f", "qcow2", "-o", encrypt, shop.place / "luks.qcow2", "1M")
    run("qemu-img", "create", "-q", *key, "-f", "qcow2", "-o", "encrypt.format=aes,encrypt.key-secret=key",
        shop.place / "aes.qcow2", "1M")  # fmt: skip
    run("qemu-img", "create", "-q", *key, "-f", "qcow", "-o", "encrypt.format=aes,encrypt.key-secret=key",
        shop.place / "aes.qcow", "1M")  # fmt: skip
    for name in ("luks.qcow2", "aes.qcow2", "aes.qcow"):
        _keep(shop, name.split(".")[1], name, None)
