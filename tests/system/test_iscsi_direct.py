# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""LUNs without a device of this host, of a real iSCSI server: a mark until they are whole, zeros where the source has none."""

from __future__ import annotations

import base64
import json
import time
import uuid

import harness
import pytest
from conftest import remove_pool
from harness import MIB, clone, refused, result_of, run, same_content, settle, start, virsh, virsh_status
from plays import device_examples

MARK = b"virtforge.libvirt: this volume is not finished\n"
AUTH = "<auth type='chap' username='{user}'><secret uuid='{secret}'/></auth>"
POOL = """<pool type='iscsi-direct'><name>{name}</name><source><host name='127.0.0.1' port='{port}'/><device path='{target}'/>
{auth}<initiator><iqn name='iqn.2026-01.test:client'/></initiator></source></pool>"""
SECRET = "<secret ephemeral='no' private='no'><uuid>{uuid}</uuid><usage type='iscsi'><target>{uuid}</target></usage></secret>"


def make_pool(tgt, scratch, name, target, auth=""):
    document = scratch / f"{name}.xml"
    document.write_text(POOL.format(name=name, port=tgt.port, target=target, auth=auth))
    virsh("pool-define", document)
    virsh("pool-start", name)
    return name


@pytest.fixture
def luns(libvirtd, tgt, scratch):
    """A pool of two LUNs, of 64 and 32 MiB, full of old data."""
    for unit, size in zip(tgt.units, (64, 32)):
        unit.write_bytes(b"old data" * (size * MIB // 8))
    yield make_pool(tgt, scratch, "direct", tgt.target)
    remove_pool("direct")


def test_a_unit_is_filled_and_found_there(luns, tgt, raw, qcow2, pool2):
    params = {"pool": luns, "name": "unit:0:0:1", "compare": "content"}
    assert "compare" in refused("INVALID_ARG", pool=luns, name="unit:0:0:1", source_path=raw)
    assert "its data is not that of" in refused("DIFFERS", **params, source_path=raw)
    result = settle(**params, source_path=qcow2, force=True, verify=True)
    volume = result["volume"]
    assert result["actions"] == ["replaced"] and (volume["type"], volume["transfer"]) == ("network", "convert")
    assert volume["path"] == volume["key"] == f"ip-127.0.0.1:{tgt.port}-iscsi-{tgt.target}-lun-1"
    # libvirt has it one block smaller.
    assert volume["capacity"] == 64 * MIB
    assert same_content(raw, "raw", tgt.units[0], "raw")

    result = settle(pool=pool2, name="back", source_pool=luns, source="unit:0:0:1", format="qcow2")
    assert same_content(raw, "raw", pool2 / "back", "qcow2") and harness.allocated(pool2 / "back") < 5 * MIB
    assert "lun" in result["source"]["path"]


def test_the_examples_with_a_lun(luns, tgt, raw, qcow2, pool):
    qcow2.rename(pool / "debian-13.qcow2")
    for module, options in device_examples("luns", luns=luns, images=pool):
        settle(module, **options)
    assert same_content(raw, "raw", tgt.units[0], "raw")
    assert same_content(raw, "raw", pool / "lun1.qcow2", "qcow2")


def test_what_is_beyond_the_source_reads_as_zeros(luns, tgt, scratch):
    source = harness.make_raw(scratch / "small.raw", 20 * MIB + 512, pieces=((0, 1), (19, 1)))
    settle(pool=luns, name="unit:0:0:2", source_path=source, compare="content", force=True)
    assert tgt.units[1].read_bytes() == source.read_bytes() + bytes(12 * MIB - 512)
    message = refused("NO_SUPPORT", pool=luns, name="unit:0:0:3", source_path=source, compare="content", force=True)
    assert "does not exist" in message
    larger = harness.make_raw(scratch / "larger.raw", 33 * MIB)
    message = refused("NO_SUPPORT", pool=luns, name="unit:0:0:2", source_path=larger, compare="content", force=True)
    assert "32 MiB" in message and "33 MiB" in message
    assert "only full" in refused(
        "NO_SUPPORT", pool=luns, name="unit:0:0:2", source_path=source, compare="content", clone_type="linked"
    )
    source.unlink()
    larger.unlink()


def test_a_unit_is_marked_until_it_is_whole(luns, tgt, raw, pool2):
    params = {"pool": luns, "name": "unit:0:0:1", "source_path": raw, "compare": "content"}
    process = start({**params, "force": True, "bwlimit": "512KiB"})
    harness.wait_until(lambda: tgt.units[0].read_bytes()[: len(MARK)] == MARK, 30)
    time.sleep(0.5)
    harness.kill(process)
    assert tgt.units[0].read_bytes()[: len(MARK)] == MARK
    message = refused("CORRUPT_IMAGE", pool=pool2, source_pool=luns, source="unit:0:0:1", name="copy")
    assert "not finished" in message
    # Nobody's data: no force is needed.
    assert settle(**params)["actions"] == ["created"]
    assert same_content(raw, "raw", tgt.units[0], "raw")


def test_from_unit_to_unit(luns, tgt, scratch):
    source = harness.make_raw(scratch / "half.raw", 32 * MIB)
    tgt.units[1].write_bytes(source.read_bytes())
    params = {"pool": luns, "source": "unit:0:0:2", "name": "unit:0:0:1", "compare": "content"}
    settle(**params, force=True)
    assert same_content(source, "raw", tgt.units[0], "raw")
    assert "itself" in refused("INVALID_ARG", pool=luns, source="unit:0:0:2", name="unit:0:0:2", compare="content")
    source.unlink()


def test_the_password_of_a_target_is_libvirts_secret(libvirtd, tgt, scratch, pool2):
    secret = str(uuid.uuid4())
    document = scratch / "secret.xml"
    document.write_text(SECRET.format(uuid=secret))
    virsh("secret-define", document)
    virsh("secret-set-value", secret, base64.b64encode(tgt.password.encode()).decode())
    pool = make_pool(tgt, scratch, "chap", tgt.chap_target, AUTH.format(user=tgt.user, secret=secret))
    try:
        source = harness.make_raw(scratch / "chap.raw", 16 * MIB)
        params = {"pool": pool, "name": "unit:0:0:1", "compare": "content", "source_path": source, "force": True}
        log = scratch / "argv.log"
        traced = ["strace", "-qq", "-f", "-s", "65536", "-e", "trace=execve", "-o", str(log)]
        result = result_of(start(params, prefix=traced))
        assert result["actions"] == ["replaced"] and same_content(source, "raw", tgt.chap_unit, "raw")
        text = json.dumps(result) + log.read_text()
        assert "password-secret" in text and tgt.password not in text
        assert base64.b64encode(tgt.password.encode()).decode() not in text
        virsh("secret-set-value", secret, base64.b64encode(b"wrong").decode())
        assert "unit:0:0:1" in refused("IO_ERROR", **params)
        source.unlink()
    finally:
        remove_pool(pool)
        virsh_status("secret-undefine", secret)


def test_a_unit_in_use_is_left_alone(luns, tgt, raw, scratch):
    document = scratch / "guest.xml"
    document.write_text(
        f"""<domain type='qemu'><name>on-lun</name><memory unit='MiB'>64</memory>
        <os><type arch='x86_64' machine='pc'>hvm</type></os>
        <devices><emulator>/usr/bin/qemu-system-x86_64</emulator>
        <disk type='network' device='disk'><driver name='qemu' type='raw'/>
        <source protocol='iscsi' name='{tgt.target}/1'><host name='127.0.0.1' port='{tgt.port}'/></source>
        <target dev='vda' bus='virtio'/></disk></devices></domain>"""
    )
    virsh("create", document, "--paused")
    try:
        params = {"pool": luns, "name": "unit:0:0:1", "compare": "content", "source_path": raw, "force": True}
        assert "domain 'on-lun'" in refused("IN_USE", **params)
    finally:
        virsh("destroy", "on-lun")
    assert clone(**params)["actions"] == ["replaced"]
    run("cmp", "-n", str(64 * MIB), raw, tgt.units[0])
