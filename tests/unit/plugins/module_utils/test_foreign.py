# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Images of other formats: which of them are parts of something larger, and what a vmdk refers to.

Every field of every header is tried by tests/system/test_gate.py, on images that qemu-img has made.
"""

from __future__ import annotations

import struct

import pytest
from ansible_collections.virtforge.libvirt.plugins.module_utils._errors import CloneError
from ansible_collections.virtforge.libvirt.plugins.module_utils._images import foreign, gate


def vmdk(descriptor, capacity=8):
    text = descriptor.encode().ljust(20 * 512, b"\0")
    head = b"KDMV" + struct.pack("<IIQQQQIQQQ", 1, 3, capacity, 128, 1, 20, 512, 21, 22, 128)
    return (head.ljust(512, b"\0") + text).ljust(128 * 512, b"\0")


SPARSE = '# Disk DescriptorFile\nversion=1\ncreateType="{}"\n'
ITSELF = 'RW 8 SPARSE "disk.vmdk"\n'


@pytest.mark.parametrize(
    "data, check",
    [
        (SPARSE.format("monolithicFlat").encode() + b'RW 8 FLAT "/etc/passwd" 0\n', "extent"),
        (b"COWD" + bytes(508), "extent"),
        (vmdk(SPARSE.format("monolithicFlat")), "extent"),
        (vmdk(SPARSE.format("twoGbMaxExtentSparse")), "extent"),
        (vmdk("version=1\n"), "extent"),
        (vmdk("nothing"), "extent"),
        (vmdk(SPARSE.format("monolithicSparse") * 2), "extent"),
        (vmdk(SPARSE.format("monolithicSparse") + ITSELF * 2), "extent"),
        (vmdk(SPARSE.format("monolithicSparse") + 'RW 8 FLAT "/x" 0\n'), "extent"),
        (vmdk(SPARSE.format("monolithicSparse") + "encoding\n"), "extent"),
        (vmdk(SPARSE.format("monolithicSparse") + 'parentFileNameHint="/x"\n'), "parent_locator"),
        (vmdk(SPARSE.format("monolithicSparse") + "parentCID=12345678\n"), "parent_locator"),
        # QEMU takes the embedded text for a list of extents when the header has no capacity, and reads it by other rules.
        (vmdk('createtype="monolithicSparse"\ncreateType="monolithicFlat"\nRW 8 FLAT "/x" 0\n', 0), "extent"),
        (b"KDMV" + bytes(20), "out_of_file"),
    ],
)
def test_a_vmdk_that_is_not_the_whole_image_is_refused(open_file, data, check):
    with pytest.raises(CloneError) as caught:
        foreign.read(open_file(data), len(data), "vmdk", "it")
    assert caught.value.msg.endswith(f"[{check}]") and caught.value.code == gate.CHECKS[check].code


@pytest.mark.parametrize("kind", ["monolithicSparse", "streamOptimized"])
@pytest.mark.parametrize("more", ["", ITSELF, "parentCID=ffffffff\n", '\r\n# more\r\nddb.adapterType = "ide"\r\n'])
def test_a_vmdk_that_stands_alone(open_file, kind, more):
    data = vmdk(SPARSE.format(kind) + more)
    assert foreign.read(open_file(data), len(data), "vmdk", "it").capacity == 4096


def test_what_a_header_refers_to_is_bounded(open_file):
    fd = open_file(b"x" * 4096)
    reader = gate.Reader(fd, 1 << 40, "it", "vmdk")
    reader.read(0, gate.Reader.BUDGET)
    with pytest.raises(CloneError, match="header"):
        reader.read(0, 1)


def test_a_read_ends_with_the_file(open_file):
    reader = gate.Reader(open_file(b"x" * 10), 10, "it", "vmdk")
    assert (reader.read(8, 10), reader.read(10, 1), reader.read(2**64, 512)) == (b"xx", b"", b"")
    with pytest.raises(CloneError, match="its table lies outside the file"):
        reader.need(8, 3, "its table")


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
    assert foreign.vmdk_references(open_file(data)) == names
