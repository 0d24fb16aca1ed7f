# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What libvirt's RFC "Storage volume clone API" of 2009 asked for, a test for each of its wishes."""

from __future__ import annotations

import subprocess

import harness
import images
from harness import GIB, MIB, clone, info, refused, run, same_content, settle, start, virsh


def test_a_clone_described_by_volume_xml(libvirt_pool, pool, qcow2):
    xml = """<volume><name>web.qcow2</name><capacity unit='MiB'>128</capacity><target><format type='qcow2'/>
      <permissions><mode>0640</mode><owner>64055</owner><group>108</group></permissions></target></volume>"""
    result = settle(pool=libvirt_pool, source="base.raw", xml=xml)
    volume = result["volume"]
    assert (volume["name"], volume["format"], volume["capacity"], volume["mode"]) == ("web.qcow2", "qcow2", 128 * MIB, "0640")
    status = (pool / "web.qcow2").stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (64055, 108, 0o640)
    assert same_content(pool / "base.raw", "raw", pool / "web.qcow2", "qcow2")


def test_no_xml_at_all_gives_a_name_made_up(libvirt_pool, qcow2):
    assert settle(pool=libvirt_pool, source="base.qcow2")["volume"]["name"] == "base-clone.qcow2"


def test_capacity_is_optional(libvirt_pool, qcow2):
    assert settle(pool=libvirt_pool, source="base.qcow2", name="web")["volume"]["capacity"] == 64 * MIB


def test_a_capacity_larger_than_the_sources_is_fine(libvirt_pool, pool, qcow2):
    for source in ("base.qcow2", "base.raw"):
        settle(pool=libvirt_pool, source=source, name=f"web-{source}", capacity="2GiB")
        assert str(2 * GIB) in virsh("vol-info", f"web-{source}", "--pool", libvirt_pool, "--bytes")


def test_a_smaller_capacity_is_doubtful(libvirt_pool, raw):
    assert "allow_shrink" in refused("INVALID_ARG", pool=libvirt_pool, source="base.raw", name="web", capacity="52M")
    settle(pool=libvirt_pool, source="base.raw", name="web", capacity="52M", allow_shrink=True)


def test_clones_inside_a_pool_and_across_pools(libvirt_pool, libvirt_pool2, pool, pool2, qcow2):
    settle(pool=libvirt_pool, source="base.qcow2", name="inside")
    settle(pool=libvirt_pool2, source_pool=libvirt_pool, source="base.qcow2", name="across")
    settle(pool=libvirt_pool, source_pool=libvirt_pool2, source="across", name="back")
    for path in (pool / "inside", pool2 / "across", pool / "back"):
        assert same_content(qcow2, "qcow2", path, "qcow2")


def test_a_block_device_becomes_a_qcow2_file(libvirt_pool, pool, raw):
    """As an LVM volume would, which is a block device too."""
    device = run("losetup", "-f", "--show", raw).strip()
    try:
        settle(pool=libvirt_pool, source_path=device, name="web.qcow2", format="qcow2")
        assert same_content(device, "raw", pool / "web.qcow2", "qcow2")
        assert harness.allocated(pool / "web.qcow2") < 8 * MIB
    finally:
        run("losetup", "-d", device)


def test_sparse_raw_files_stay_sparse(any_pool):
    """Read, look for zeros, seek instead of writing."""
    source = harness.make_raw(any_pool / "base.raw", 4 * GIB, pieces=((0, 1), (4000, 1)))
    harness.write_at(source, 10 * MIB, bytes(20 * MIB))
    clone(pool=any_pool, source="base.raw", name="web", method="copy")
    assert harness.allocated(any_pool / "web") <= 3 * MIB
    assert same_content(source, "raw", any_pool / "web", "raw")


def test_conversion_between_formats_through_qemu_img(libvirt_pool, pool, qcow2):
    previous, previous_format = "base.qcow2", "qcow2"
    for image_format in ("raw", "vmdk", "vdi", "vhdx", "vpc", "qed", "qcow", "qcow2"):
        settle(
            pool=libvirt_pool, source=previous, name=f"web.{image_format}", format=image_format, source_format=previous_format
        )
        assert same_content(qcow2, "qcow2", pool / f"web.{image_format}", image_format)
        previous, previous_format = f"web.{image_format}", image_format


def test_backing_stores_are_flattened(libvirt_pool, pool, qcow2):
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", pool / "overlay", cwd=pool)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 9 30M 1M", pool / "overlay")
    settle(pool=libvirt_pool, source="overlay", name="web")
    assert "backing-filename" not in info(pool / "web", "qcow2")
    assert same_content(pool / "overlay", "qcow2", pool / "web", "qcow2")


def test_import_of_install_media_from_a_home_directory(libvirt_pool, pool, scratch):
    """In a directory that libvirt's own user could not read."""
    home = scratch / "anna"
    home.mkdir(mode=0o700)
    media = images.media()["grub-rescue-cdrom.iso"]
    path = home / media.name
    path.write_bytes(media.read_bytes())
    settle(pool=libvirt_pool, source_path=path, name="rescue.iso")
    assert (pool / "rescue.iso").read_bytes() == media.read_bytes()
    assert "rescue.iso" in virsh("vol-list", libvirt_pool)


def test_a_pool_is_not_locked_during_a_long_copy(libvirt_pool, pool, raw):
    """Others go on with the pool while a clone is in the middle of its copy."""
    slow = ["strace", "-qq", "-o", "/dev/null", "-e", "trace=linkat", "-e", "inject=linkat:delay_enter=5000000"]
    process = start({"pool": libvirt_pool, "source": "base.raw", "name": "slow"}, prefix=slow)
    harness.wait_until(lambda: harness.unnamed_files(pool), 30)
    virsh("pool-refresh", libvirt_pool)
    virsh("vol-create-as", libvirt_pool, "other", "1M")
    virsh("vol-delete", "other", "--pool", libvirt_pool)
    clone(pool=libvirt_pool, source="base.raw", name="quick")
    assert process.poll() is None
    assert harness.result_of(process)["actions"] == ["created"]


def test_clear_errors_for_read_only_connections(libvirt_pool, qcow2):
    uri = "qemu+unix:///system?socket=/run/libvirt/libvirt-sock-ro"
    assert libvirt_pool in refused("OPERATION_DENIED", uri=uri, pool=libvirt_pool, source="base.qcow2", name="web")


def test_clear_errors_for_pools_that_cannot_clone(libvirtd, pool, qcow2):
    virsh("pool-define-as", "multipath", "mpath", "--target", "/dev/mapper")
    try:
        message = refused("NO_SUPPORT", pool="multipath", source_pool=pool, source="base.qcow2", name="web")
        assert "multipath" in message and "mpath" in message
    finally:
        virsh("pool-undefine", "multipath")


def test_a_clone_of_a_bootable_disk_boots(libvirt_pool, pool, scratch):
    media = images.media()["grub-rescue-usb.img"]
    settle(pool=libvirt_pool, source_path=media, name="rescue.qcow2", format="qcow2", capacity="1GiB")
    memory = scratch / "screen"
    drive = f"file={pool / 'rescue.qcow2'},format=qcow2,if=ide,snapshot=on"
    qemu = subprocess.Popen(
        [
            "qemu-system-x86_64",
            "-display",
            "none",
            "-m",
            "128",
            "-monitor",
            "stdio",
            "-nodefaults",
            "-vga",
            "std",
            "-drive",
            drive,
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    try:

        def grub_is_on_screen():
            # The text screen of a PC: a byte for each character, and one for its colour.
            qemu.stdin.write(f'pmemsave 0xb8000 4000 "{memory}"\n')
            qemu.stdin.flush()
            return memory.exists() and b"GRUB" in memory.read_bytes()[::2]

        harness.wait_until(grub_is_on_screen, 60)
    finally:
        qemu.kill()
        qemu.wait()
