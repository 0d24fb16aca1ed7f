# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What an image's first and last bytes say, and which of it is refused."""

from __future__ import annotations

import struct

import pytest
from ansible_collections.virtforge.libvirt.plugins.module_utils._errors import CloneError
from ansible_collections.virtforge.libvirt.plugins.module_utils._images import gate, probe

FOOTER = b"conectix" + bytes(504)
#: one partition of Linux, and the mark of a boot sector
PARTITIONS = (b"\x80\0\2\0\x83" + bytes(11)).ljust(64, b"\0") + b"\x55\xaa"


def vdi_at(data):
    return data[:64].ljust(64, b"\0") + b"\x7f\x10\xda\xbe" + bytes(444)


@pytest.mark.parametrize(
    "data, found",
    [
        (b"", ()),
        (b"QFI", ()),
        (bytes(512), ()),
        (b"QFI\xfb\0\0\0\3", ("qcow2",)),
        (b"QFI\xfb\0\0\0\2", ("qcow2",)),
        (b"QFI\xfb\0\0\0\1", ("qcow",)),
        (b"QED\0" + bytes(60), ("qed",)),
        (b"KDMV" + bytes(60), ("vmdk",)),
        (b"COWD" + bytes(60), ("vmdk",)),
        (b"# Disk DescriptorFile\nversion=1\n", ("vmdk",)),
        (b"vhdxfile", ("vhdx",)),
        (FOOTER, ("vpc",)),
        (vdi_at(b""), ("vdi",)),
        (vdi_at(b"QFI\xfb\0\0\0\3"), ("qcow2", "vdi")),
        (bytes(512) + FOOTER, ("vpc-footer",)),
        (FOOTER + bytes(512) + FOOTER, ("vpc",)),
        # A raw disk in whose first sectors somebody wrote a header, or an image with a disk's mark.
        (vdi_at(b"")[:446] + PARTITIONS, ("vdi", "mbr")),
        (vdi_at(b"").ljust(512, b"\0") + b"EFI PART", ("vdi", "gpt")),
        (b"QFI\xfb\0\0\0\3".ljust(0x8001, b"\0") + b"CD001", ("qcow2", "iso")),
        (vdi_at(b"LUKS\xba\xbe\0\1"), ("vdi", "luks")),
        # The two bytes alone are no partition table.
        (vdi_at(b"")[:510] + b"\x55\xaa", ("vdi",)),
        (vdi_at(b"")[:446] + b"\7" + PARTITIONS[1:], ("vdi",)),
        # What a raw disk has by right.
        (bytes(446) + PARTITIONS, ()),
        (b"LUKS\xba\xbe\0\1".ljust(512, b"\0"), ()),
        ((bytes(446) + PARTITIONS).ljust(0x8001, b"\0") + b"CD001", ()),
        (bytes(446) + PARTITIONS + FOOTER, ("vpc-footer",)),
        # The guest of a fixed VHD wrote a header of its own.
        (b"QFI\xfb\0\0\0\3".ljust(512, b"\0") + FOOTER, ("qcow2", "vpc-footer")),
    ],
)
def test_formats_by_their_magic(open_file, data, found):
    assert probe.detect(open_file(data), len(data)) == found


@pytest.mark.parametrize(
    "found, pinned, chosen",
    [
        ((), None, "raw"),
        (("qcow2",), None, "qcow2"),
        (("qcow2",), "raw", "raw"),
        (("qcow2", "vdi"), "vdi", "vdi"),
        (("vpc-footer",), "vpc", "vpc"),
        (("vpc-footer",), "raw", "raw"),
    ],
)
def test_the_format_to_read_an_image_as(found, pinned, chosen):
    assert probe.choose_format(found, pinned, "it") == chosen


@pytest.mark.parametrize(
    "found, check",
    [
        (("qcow2", "vdi"), "two_formats"),
        (("vpc-footer",), "footer_only"),
        (("qcow2", "vpc-footer"), "two_formats"),
        (("vdi", "mbr"), "two_formats"),
    ],
)
def test_what_only_a_person_can_tell_is_refused(found, check):
    with pytest.raises(CloneError, match="set source_format") as caught:
        probe.choose_format(found, None, "it")
    assert caught.value.code == "UNSAFE_IMAGE" and caught.value.msg.endswith(f"[{check}]")


def qcow2(version=3, **fields):
    """A qcow2 header, valid but for the fields stated."""
    values = {
        "magic": b"QFI\xfb",
        "backing_at": 0,
        "backing_len": 0,
        "cluster_bits": 16,
        "capacity": 1 << 20,
        "crypt": 0,
        "l1_size": 1,
        "l1_at": 0x30000,
        "refcounts_at": 0x10000,
        "refcount_clusters": 1,
        "snapshots": 0,
        "snapshots_at": 0x20000,
        "incompatible": 0,
        "compatible": 0,
        "order": 4,
        "header_len": 104,
        "size": 0x40000,
        "extensions": b"",
    }
    values.update(fields)
    head = values["magic"] + struct.pack(
        ">IQIIQIIQQIIQ",
        version,
        values["backing_at"],
        values["backing_len"],
        values["cluster_bits"],
        values["capacity"],
        values["crypt"],
        values["l1_size"],
        values["l1_at"],
        values["refcounts_at"],
        values["refcount_clusters"],
        values["snapshots"],
        values["snapshots_at"],
    )
    if version == 3:
        head += struct.pack(">QQQII", values["incompatible"], values["compatible"], 0, values["order"], values["header_len"])
    return (head + values["extensions"]).ljust(values["size"], b"\0")


def test_a_sound_header(open_file):
    data = qcow2(snapshots=2, compatible=1, order=3, extensions=struct.pack(">II", 0xE2792ACA, 3) + b"raw\0\0\0\0\0")
    image = probe.read_qcow2(open_file(data), len(data), "it")
    assert (image.format, image.capacity, image.snapshots, image.backing_format) == ("qcow2", 1 << 20, 2, "raw")
    assert image.qcow2 == probe.Qcow2Features("1.1", 65536, True, False, "zlib", 8)
    assert (image.backing, image.data_file, image.encrypted, image.unclean) == (None, None, False, None)


@pytest.mark.parametrize(
    "fields, check, words",
    [
        ({"size": 71}, "header", "too short"),
        ({"size": 100}, "header", "too short"),
        ({"magic": b"QFI\xfa"}, "header", "header"),
        ({"version": 4}, "unknown_feature", "version 4"),
        ({"cluster_bits": 8}, "header", "cluster size"),
        ({"cluster_bits": 22}, "header", "cluster size"),
        ({"crypt": 3}, "header", "encryption method 3"),
        ({"capacity": 1 << 63}, "capacity", "capacity"),
        ({"capacity": (1 << 29) + 1}, "capacity", "L1 table of 1 entries"),
        ({"l1_size": (4 << 20) + 1}, "capacity", "L1 table"),
        ({"order": 7}, "header", "refcount order"),
        ({"header_len": 103}, "header", "header length"),
        ({"header_len": 0x10001}, "header", "header length"),
        ({"l1_at": 0}, "header", "L1 table"),
        ({"l1_at": 0x30008}, "header", "L1 table"),
        ({"l1_size": 1 << 20}, "out_of_file", "L1 table"),
        ({"refcount_clusters": 0}, "header", "refcount table of 0"),
        ({"refcount_clusters": 129}, "header", "refcount table of 129"),
        ({"refcounts_at": 0x10001}, "header", "refcount table"),
        ({"refcounts_at": 0x40000}, "out_of_file", "refcount table"),
        ({"snapshots": 65537}, "header", "65537 snapshots"),
        ({"snapshots": 1, "snapshots_at": 1 << 62}, "out_of_file", "list of snapshots"),
        ({"snapshots": 1, "snapshots_at": 0}, "header", "list of snapshots"),
        ({"backing_at": 8000, "backing_len": 1024}, "out_of_file", "backing file"),
        ({"backing_at": 8000, "backing_len": 0}, "out_of_file", "backing file"),
        ({"backing_at": 65536, "backing_len": 5}, "out_of_file", "backing file"),
        ({"backing_at": 8, "backing_len": 5}, "out_of_file", "backing file"),
        ({"extensions": struct.pack(">II", 1, 1 << 20)}, "out_of_file", "extension"),
        ({"incompatible": 1 << 40}, "unknown_feature", "not known"),
        ({"incompatible": 16, "cluster_bits": 13, "l1_at": 0x2000, "refcounts_at": 0x4000}, "header", "subclusters"),
        ({"incompatible": 8, "header_len": 112, "extensions": b"\x07"}, "unknown_feature", "compression"),
        ({"incompatible": 8}, "header", "compression"),
        ({"header_len": 112, "extensions": b"\x01"}, "header", "compression"),
    ],
)
def test_what_cannot_be_is_refused(open_file, fields, check, words):
    data = qcow2(**fields)[: fields.get("size")]
    with pytest.raises(CloneError, match=words) as caught:
        probe.read_qcow2(open_file(data), len(data), "it")
    assert caught.value.msg.endswith(f"[{check}]") and caught.value.code == gate.CHECKS[check].code


def test_an_l1_table_for_subclusters_is_twice_as_long(open_file):
    data = qcow2(incompatible=16, capacity=1 << 29, l1_size=2)
    assert probe.read_qcow2(open_file(data), len(data), "it").qcow2.extended_l2
    data = qcow2(incompatible=16, capacity=1 << 29, l1_size=1)
    with pytest.raises(CloneError, match="L1 table of 1 entries"):
        probe.read_qcow2(open_file(data), len(data), "it")


@pytest.mark.parametrize(
    "bits, field, value", [(1, "unclean", "dirty"), (2, "unclean", "corrupt"), (4, "data_file", ""), (16, "unclean", None)]
)
def test_incompatible_features(open_file, bits, field, value):
    data = qcow2(incompatible=bits)
    assert getattr(probe.read_qcow2(open_file(data), len(data), "it"), field) == value


@pytest.mark.parametrize(
    "bits, recorded, name", [(4, b"disk.raw", "disk.raw"), (4, b"/p/\xff\0more", "/p/\udcff"), (0, b"disk.raw", None)]
)
def test_the_name_of_a_data_file(open_file, bits, recorded, name):
    extension = struct.pack(">II", 0x44415441, len(recorded)) + recorded.ljust(-(-len(recorded) // 8) * 8, b"\0")
    data = qcow2(incompatible=bits, extensions=extension)
    assert probe.read_qcow2(open_file(data), len(data), "it").data_file == name
