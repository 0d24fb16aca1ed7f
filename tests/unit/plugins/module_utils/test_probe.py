# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What an image's first and last bytes say, and which of it is refused."""

from __future__ import annotations

import os
import struct

import pytest
from ansible_collections.virtforge.libvirt.plugins.module_utils._errors import CloneError
from ansible_collections.virtforge.libvirt.plugins.module_utils._images import probe

FOOTER = b"conectix" + bytes(504)


@pytest.fixture
def open_file(tmp_path):
    opened = []

    def make(data):
        path = tmp_path / "image"
        path.write_bytes(data)
        opened.append(os.open(str(path), os.O_RDONLY))
        return opened[-1]

    yield make
    for fd in opened:
        os.close(fd)


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


@pytest.mark.parametrize("found", [("qcow2", "vdi"), ("vpc-footer",), ("qcow2", "vpc-footer")])
def test_what_only_a_person_can_tell_is_refused(found):
    with pytest.raises(CloneError, match="set source_format") as caught:
        probe.choose_format(found, None, "it")
    assert caught.value.code == "UNSAFE_IMAGE"


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
        "snapshots": 0,
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
        0x10000,
        1,
        values["snapshots"],
        0,
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
    "fields, code, words",
    [
        ({"size": 71}, "CORRUPT_IMAGE", "too short"),
        ({"size": 100}, "CORRUPT_IMAGE", "too short"),
        ({"magic": b"QFI\xfa"}, "CORRUPT_IMAGE", "header"),
        ({"version": 4}, "CORRUPT_IMAGE", "version 4"),
        ({"cluster_bits": 8}, "CORRUPT_IMAGE", "cluster size"),
        ({"cluster_bits": 22}, "CORRUPT_IMAGE", "cluster size"),
        ({"capacity": 1 << 63}, "CORRUPT_IMAGE", "capacity"),
        ({"order": 7}, "CORRUPT_IMAGE", "refcount order"),
        ({"header_len": 103}, "CORRUPT_IMAGE", "header length"),
        ({"header_len": 0x10001}, "CORRUPT_IMAGE", "header length"),
        ({"l1_at": 0}, "CORRUPT_IMAGE", "L1 table"),
        ({"l1_size": 1 << 20}, "CORRUPT_IMAGE", "L1 table"),
        ({"backing_at": 8000, "backing_len": 1024}, "CORRUPT_IMAGE", "backing file"),
        ({"backing_at": 8000, "backing_len": 0}, "CORRUPT_IMAGE", "backing file"),
        ({"backing_at": 65536, "backing_len": 5}, "CORRUPT_IMAGE", "backing file"),
        ({"extensions": struct.pack(">II", 1, 1 << 20)}, "CORRUPT_IMAGE", "extension"),
        ({"incompatible": 1 << 40}, "NO_SUPPORT", "not known"),
        ({"incompatible": 8, "extensions": b"\x07"}, "NO_SUPPORT", "compression"),
    ],
)
def test_what_cannot_be_is_refused(open_file, fields, code, words):
    data = qcow2(**fields)[: fields.get("size")]
    with pytest.raises(CloneError, match=words) as caught:
        probe.read_qcow2(open_file(data), len(data), "it")
    assert caught.value.code == code


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


def vmdk(descriptor, capacity=8):
    text = descriptor.encode().ljust(20 * 512, b"\0")
    return b"KDMV" + struct.pack("<IIQQQQ", 1, 3, capacity, 128, 1, 20).ljust(508, b"\0") + text


SPARSE = '# Disk DescriptorFile\nversion=1\ncreateType="{}"\n'


@pytest.mark.parametrize(
    "image_format, data, words",
    [
        ("vmdk", SPARSE.format("monolithicFlat").encode() + b'RW 8 FLAT "/etc/passwd" 0\n', "other files"),
        ("vmdk", b"COWD" + bytes(508), "other files"),
        ("vmdk", vmdk(SPARSE.format("monolithicFlat")), "monolithicflat"),
        ("vmdk", vmdk(SPARSE.format("twoGbMaxExtentSparse")), "other files"),
        ("vmdk", vmdk("nothing"), "unknown"),
        ("vmdk", vmdk(SPARSE.format("monolithicSparse") + 'parentFileNameHint="/x"\n'), "parent"),
        # QEMU takes the embedded text for a list of extents when the header has no capacity, and reads it by other rules.
        ("vmdk", vmdk('createtype="monolithicSparse"\ncreateType="monolithicFlat"\nRW 8 FLAT "/x" 0\n', 0), "capacity"),
        ("vdi", bytes(0x4C) + struct.pack("<I", 4) + bytes(512), "type 4"),
        ("vpc", b"conectix" + bytes(52) + struct.pack(">I", 4) + bytes(448), "differencing"),
    ],
)
def test_parts_of_something_larger_are_refused(open_file, image_format, data, words):
    with pytest.raises(CloneError, match=words) as caught:
        probe.refuse_parents(open_file(data), image_format, "it")
    assert caught.value.code == "UNSAFE_IMAGE"


@pytest.mark.parametrize(
    "image_format, data",
    [
        ("vmdk", vmdk(SPARSE.format("monolithicSparse"))),
        ("vmdk", vmdk(SPARSE.format("streamOptimized"))),
        ("vdi", bytes(0x4C) + struct.pack("<I", 1) + bytes(512)),
        ("vpc", b"conectix" + bytes(52) + struct.pack(">I", 3) + bytes(448)),
    ],
)
def test_images_that_stand_alone_pass(open_file, image_format, data):
    probe.refuse_parents(open_file(data), image_format, "it")


FLAT = 'createType="twoGbMaxExtentFlat"\nRW 8 FLAT "one.vmdk" 0\r\n rdonly  8\tSPARSE "/p/two three"\nRW x FLAT "no" 0\n'


@pytest.mark.parametrize(
    "data, names",
    [
        (b"# Disk DescriptorFile\n" + FLAT.encode(), ("one.vmdk", "/p/two three")),
        (b'# Disk DescriptorFile\nRW 8 FLAT "\xff" 0\n\0RW 8 FLAT "after" 0\n', ("\udcff",)),
        (b'# Disk DescriptorFile\nparentFileNameHint="base.vmdk"\n', ("base.vmdk",)),
        (vmdk(FLAT, 0), ("one.vmdk", "/p/two three")),
        # It is the extent that its descriptor names, by a name that it may no longer have.
        (vmdk(FLAT), ()),
        (vmdk('parentFileNameHint="base.vmdk"\n' + FLAT), ("base.vmdk",)),
        (b"KDMV", ()),
        (b"COWD" + bytes(508), ()),
    ],
)
def test_what_a_vmdk_refers_to(open_file, data, names):
    assert probe.vmdk_references(open_file(data)) == names
