# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""How the bytes get there, and whose they are: holes, shared blocks, permissions, attributes, preallocation, links, devices."""

from __future__ import annotations

import os
import shutil
import time

import harness
import pytest
from conftest import new_directory
from harness import GIB, MIB, clone, info, refused, result_of, run, same_content, settle, start

# --- data -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["auto", "copy"])
def test_sparse_files_stay_sparse_and_zeros_become_holes(any_pool, method):
    source = harness.make_raw(any_pool / "base.raw", GIB, pieces=((0, 1), (500, 2), (1023, 1)))
    # 100 MiB of zeros that are written out.
    harness.write_at(source, 100 * MIB, bytes(100 * MIB))
    result = settle(pool=any_pool, source="base.raw", name="web", method=method)
    assert (any_pool / "web").stat().st_size == GIB
    assert same_content(source, "raw", any_pool / "web", "raw")
    if result["volume"]["transfer"] == "copy":
        assert harness.allocated(any_pool / "web") < 6 * MIB
        assert result["volume"]["shared"] in (False, None)


@pytest.mark.parametrize("length", [0, 1, 511, 512, 4095, 4096, 4097, MIB - 1, MIB + 1, 3 * MIB + 12345])
def test_any_length_is_copied_to_the_byte(any_pool, length):
    (any_pool / "base.raw").write_bytes(harness.noise(length))
    clone(pool=any_pool, source="base.raw", name="web", method="copy")
    assert (any_pool / "web").read_bytes() == harness.noise(length)


def test_blocks_are_shared_where_the_file_system_can(any_pool):
    harness.make_raw(any_pool / "base.raw", 64 * MIB)
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", any_pool / "base.raw", any_pool / "base.qcow2")
    can = any_pool.parent.name in ("xfs", "btrfs")
    for source, stated in (
        ("base.raw", {}),
        ("base.raw", {"capacity": "1G"}),
        ("base.qcow2", {}),
        ("base.qcow2", {"capacity": "1G"}),
    ):
        name = f"{source}-{len(stated)}"
        volume = settle(pool=any_pool, source=source, name=name, **stated)["volume"]
        assert (volume["transfer"], volume["shared"]) == (("reflink", True) if can else ("copy", False))
        assert (volume["fallback_reason"] is None) == can
        if can:
            settle(pool=any_pool, source=source, name=f"{name}-share", method="reflink", **stated)
        else:
            assert "method" in refused("NO_SUPPORT", pool=any_pool, source=source, name="web", method="reflink", **stated)
        unshared = settle(pool=any_pool, source=source, name=f"{name}-copy", method="copy", **stated)["volume"]
        assert (unshared["transfer"], unshared["shared"]) == ("copy", False)


def test_between_file_systems_nothing_can_be_shared(any_pool, pool, raw):
    if any_pool.parent == pool.parent:
        assert settle(pool=any_pool, source_pool=pool, source="base.raw", name="web")["volume"]["transfer"] == "reflink"
        return
    volume = settle(pool=any_pool, source_pool=pool, source="base.raw", name="web")["volume"]
    assert volume["transfer"] == "copy" and "file system" in volume["fallback_reason"]
    refused("NO_SUPPORT", pool=any_pool, source_pool=pool, source="base.raw", name="web2", method="reflink")


def test_an_empty_image_of_60_gib_takes_no_time(any_pool):
    with open(any_pool / "base.raw", "wb") as file:
        file.truncate(60 * GIB)
    durations = [
        clone(pool=any_pool, source="base.raw", name=f"web{number}", method="copy")["volume"]["duration"] for number in range(3)
    ]
    assert sorted(durations)[1] < 1, durations
    assert (any_pool / "web0").stat().st_size == 60 * GIB
    assert harness.allocated(any_pool / "web0") < MIB


def test_a_chain_is_flattened(pool, raw):
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", pool / "one", cwd=pool)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 7 10M 1M", pool / "one")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "one", "-F", "qcow2", pool / "two", "100M", cwd=pool)
    run("qemu-io", "-f", "qcow2", "-c", "write -z 0 512k", pool / "two")
    for image_format in ("qcow2", "raw", "vhdx"):
        result = settle(pool=pool, source="two", name=f"web.{image_format}", format=image_format)
        assert same_content(pool / "two", "qcow2", pool / f"web.{image_format}", image_format)
        assert result["volume"]["backing"] is None
        assert "backing-filename" not in info(pool / f"web.{image_format}", image_format)


def test_options_of_qcow2(pool, qcow2):
    stated = {
        "cluster_size": "128k",
        "lazy_refcounts": True,
        "extended_l2": True,
        "compression_type": "zstd",
        "refcount_bits": 8,
    }
    settle(pool=pool, source="base.raw", name="web", format="qcow2", qcow2=stated)
    data = info(pool / "web", "qcow2")["format-specific"]["data"]
    assert info(pool / "web", "qcow2")["cluster-size"] == 128 << 10
    assert (data["lazy-refcounts"], data["extended-l2"], data["compression-type"], data["refcount-bits"]) == (
        True,
        True,
        "zstd",
        8,
    )
    # A conversion keeps the source's own.
    settle(pool=pool, source="web", name="flat", preallocation="metadata")
    assert info(pool / "flat", "qcow2")["format-specific"]["data"] == data
    assert info(pool / "flat", "qcow2")["cluster-size"] == 128 << 10
    settle(pool=pool, source="web", name="old", qcow2={"compat": "0.10"})
    assert info(pool / "old", "qcow2")["format-specific"]["data"]["compat"] == "0.10"


@pytest.mark.parametrize(
    "image_format, mode", [("raw", "falloc"), ("raw", "full"), ("qcow2", "metadata"), ("qcow2", "falloc"), ("qcow2", "full")]
)
def test_preallocation(pool, raw, image_format, mode):
    result = settle(pool=pool, source="base.raw", name="web", format=image_format, preallocation=mode)
    assert same_content(raw, "raw", pool / "web", image_format)
    assert (harness.allocated(pool / "web") >= 64 * MIB) == (mode != "metadata")
    assert result["volume"]["physical"] >= 64 * MIB
    settle(pool=pool, source="base.raw", name="web", format=image_format, preallocation=mode, capacity="96M")
    assert (harness.allocated(pool / "web") >= 96 * MIB) == (mode != "metadata")
    assert same_content(raw, "raw", pool / "web", image_format)


def test_nocow_on_btrfs(file_systems):
    nocow = 0x00800000
    place = new_directory(file_systems["btrfs"])
    harness.make_raw(place / "base.raw", 8 * MIB, pieces=((0, 1),))
    settle(pool=place, source="base.raw", name="web", format="qcow2", qcow2={"nocow": True})
    assert harness.flags_of(place / "web") & nocow
    # A directory whose new files are exempt must not cost the shared blocks.
    run("chattr", "+C", place)
    assert settle(pool=place, source="base.raw", name="shared")["volume"]["transfer"] == "reflink"
    assert not harness.flags_of(place / "shared") & nocow
    shutil.rmtree(place)


def test_a_block_device_is_a_raw_source(pool, qcow2, scratch):
    for number, image in enumerate((pool / "base.raw", qcow2)):
        device = run("losetup", "-f", "--show", image).strip()
        try:
            result = settle(pool=pool, source_path=device, name=f"web{number}")
            assert (result["volume"]["format"], result["source"]["format"]) == ("raw", "raw")
            size = image.stat().st_size // 512 * 512
            assert (pool / f"web{number}").read_bytes() == image.read_bytes()[:size]
            settle(pool=pool, source_path=device, name=f"web{number}.qcow2", format="qcow2")
        finally:
            run("losetup", "-d", device)
        time.sleep(0.1)
    device = run("losetup", "-f", "--show", qcow2).strip()
    try:
        settle(pool=pool, source_path=device, source_format="qcow2", name="pinned.raw", format="raw")
        assert same_content(pool / "base.raw", "raw", pool / "pinned.raw", "raw")
    finally:
        run("losetup", "-d", device)


def test_a_source_path_may_be_a_link(pool, raw, scratch):
    link = scratch / "link-to-base"
    link.symlink_to(raw)
    assert settle(pool=pool, source_path=link, name="web")["volume"]["capacity"] == 64 * MIB
    link.unlink()


# --- owner, group, mode, attributes ---------------------------------------------------------------------------------------


def test_a_clone_of_a_pool_volume_has_its_owner_and_mode(either, pool, qcow2):
    os.chown(qcow2, 64055, 108)
    qcow2.chmod(0o640)
    for stated in ({}, {"format": "raw"}):
        result = settle(pool=either, source="base.qcow2", name=f"web{len(stated)}", **stated)
        status = (pool / f"web{len(stated)}").stat()
        assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (64055, 108, 0o640)
        assert result["volume"]["mode"] == "0640"


def test_a_clone_of_a_path_is_private(either, pool, qcow2):
    os.chown(qcow2, 64055, 108)
    settle(pool=either, source_path=qcow2, name="web")
    status = (pool / "web").stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (0, 0, 0o600)
    settle(pool=either, source_path=qcow2, name="web2", owner="libvirt-qemu", mode="0444")
    status = (pool / "web2").stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (64055, 0, 0o444)


@pytest.mark.parametrize("umask", ["000", "027", "077", "777"])
def test_the_umask_does_not_matter(pool, qcow2, umask):
    params = {"pool": pool, "source": "base.qcow2", "name": "web", "format": "raw", "mode": "0644"}
    assert result_of(start(params, env={"TEST_UMASK": umask}))["changed"]
    assert (pool / "web").stat().st_mode & 0o7777 == 0o644


@pytest.mark.parametrize("stated", [{"method": "copy"}, {"format": "qcow2"}])
def test_nobody_can_read_a_clone_while_it_is_made(pool, raw, stated):
    """It has no name until it is whole, and the unnamed file is 0600."""
    delay = ["-e", "trace=pwrite64", "-e", "inject=pwrite64:delay_enter=400000:when=1..3"]
    params = {"pool": pool, "source": "base.raw", "name": "web", "mode": "0644", **stated}
    process = start(params, prefix=["strace", "-f", "-qq", "-o", "/dev/null", *delay])
    modes, names = set(), set()
    while process.poll() is None:
        modes.update(harness.unnamed_files(pool))
        names.update(os.listdir(pool))
        if "web" in names:
            break
    assert result_of(process)["changed"]
    assert 0o600 in modes and modes <= {0o600, 0o644}, modes
    # The stated mode is set when the data is complete, just before the name.
    assert names <= {"base.raw", "web"}
    assert (pool / "web").stat().st_mode & 0o7777 == 0o644


def test_selinux_context_as_stated(either, pool, qcow2):
    settle(
        pool=either, source="base.qcow2", name="web", seuser="system_u", serole="object_r", setype="svirt_image_t", selevel="s0"
    )
    assert os.getxattr(pool / "web", "security.selinux").rstrip(b"\0") == b"system_u:object_r:svirt_image_t:s0"
    assert settle(pool=either, source="base.qcow2", name="web", setype="virt_content_t")["actions"] == ["permissions"]
    assert os.getxattr(pool / "web", "security.selinux").rstrip(b"\0") == b"system_u:object_r:virt_content_t:s0"


def test_the_context_and_attributes_of_the_source_are_not_taken_over(pool, qcow2):
    os.setxattr(qcow2, "security.selinux", b"system_u:object_r:svirt_image_t:s0:c1,c2\0")
    os.setxattr(qcow2, "user.note", b"golden")
    clone(pool=pool, source="base.qcow2", name="web")
    assert os.listxattr(pool / "web") == []


def test_names_that_a_file_system_takes(either, pool, qcow2):
    for name in ("with space", "-rf", "a,b=c", "json:{}", "nbd:x", "ümläut", "a'b\"c", "%s", "{{ x }}", "n" * 255, "…", "a\\b"):
        result = settle(pool=either, source="base.qcow2", name=name, format="qcow2", qcow2={"cluster_size": 4096})
        assert result["volume"]["name"] == name
        assert same_content(qcow2, "qcow2", pool / name, "qcow2") if ":" not in name else (pool / name).exists()


def test_a_directory_pool_with_an_odd_path(pool, qcow2):
    odd = pool / "a,b: c'd"
    odd.mkdir()
    settle(pool=odd, source_pool=pool, source="base.qcow2", name="web", format="raw")
    settle(pool=f"{odd}/", source="web", name="web2", format="qcow2")
    assert sorted(os.listdir(odd)) == ["web", "web2"]
    shutil.rmtree(odd)
