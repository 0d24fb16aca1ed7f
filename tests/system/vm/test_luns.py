# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""LUNs that the kernel has as devices, by iSCSI and of a SCSI adapter, as targets and as sources."""

from __future__ import annotations

import harness
import pytest
from conftest import remove_pool
from harness import MIB, clone, kill, make_raw, refused, run, same_content, settle, start, virsh, wait_until

MARK = b"virtforge.libvirt: this volume is not finished\n"


def first_unit(pool):
    """Name and path of the first LUN of 64 MiB."""
    for line in filter(str.strip, virsh("vol-list", pool).splitlines()):
        name, path = line.split()
        if int(run("blockdev", "--getsize64", path)) == 64 * MIB:
            return name, path
    raise AssertionError(virsh("vol-list", pool))


def marked(path):
    with open(path, "rb") as unit:
        return unit.read(len(MARK)) == MARK


@pytest.fixture
def iscsi(libvirtd, initiator):
    source = {"hosts": [{"name": initiator.host, "port": initiator.port}], "devices": [initiator.target]}
    clone("storage_pool", name="by-iscsi", type="iscsi", pool_source=source)
    yield "by-iscsi"
    remove_pool("by-iscsi")


@pytest.fixture
def scsi(libvirtd, adapter):
    virsh("pool-define-as", "of-adapter", "scsi", "--adapter-name", adapter, "--target", "/dev")
    virsh("pool-start", "of-adapter")
    yield "of-adapter"
    remove_pool("of-adapter")


@pytest.mark.parametrize("kind", ["iscsi", "scsi"])
def test_a_unit_is_filled_and_read(request, kind, scratch, pool2):
    pool = request.getfixturevalue(kind)
    name, path = first_unit(pool)
    with open(path, "r+b") as unit:
        unit.write(b"old data" * (64 * MIB // 8))
    source = make_raw(scratch / "unit.raw", 20 * MIB + 512, pieces=((0, 1), (19, 1)))
    params = {"pool": pool, "name": name, "source_path": source, "compare": "content"}
    assert "its data is not that of" in refused("DIFFERS", **params)
    process = start({**params, "force": True, "bwlimit": "256KiB"})
    wait_until(lambda: marked(path), 60)
    kill(process)
    assert "not finished" in refused("CORRUPT_IMAGE", pool=pool2, source_pool=pool, source=name, name="copy")
    # Nobody's data: no force is needed.
    assert settle(**params)["actions"] == ["created"]
    with open(path, "rb") as unit:
        assert unit.read(20 * MIB + 512) == source.read_bytes() and harness.zeros(unit.read())
    assert clone(pool=pool2, source_pool=pool, source=name, name="back", format="qcow2")["actions"] == ["created"]
    assert same_content(source, "raw", pool2 / "back", "qcow2") and harness.allocated(pool2 / "back") < 5 * MIB
    other = make_raw(scratch / "other.raw", 20 * MIB, pieces=((3, 1),))
    with harness.held(path):
        assert "qemu-io" in refused("IN_USE", **{**params, "source_path": other}, force=True)
    source.unlink()
    other.unlink()
