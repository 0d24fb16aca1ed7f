# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Bad input: one clear sentence with an error code, the target absent, nothing else touched."""

from __future__ import annotations

import os
import socket

import harness
import pytest
from harness import MIB, clone, module, refused, result_of, run, start

XML = "<volume><name>{}</name><capacity unit='{}'>1</capacity></volume>"


@pytest.mark.parametrize(
    "code, stated, words",
    [
        # names
        ("INVALID_ARG", {"name": "a/b"}, ["name", "a/b"]),
        ("INVALID_ARG", {"name": "/etc/passwd"}, ["name", "/etc/passwd"]),
        ("INVALID_ARG", {"name": ".."}, ["name", ".."]),
        ("INVALID_ARG", {"name": "."}, ["name"]),
        ("INVALID_ARG", {"name": "../up"}, ["name", "../up"]),
        ("INVALID_ARG", {"name": ""}, ["name"]),
        ("INVALID_ARG", {"name": "a\nb"}, ["name"]),
        ("INVALID_ARG", {"name": "a\x1bb"}, ["name"]),
        ("INVALID_ARG", {"name": "a\0b"}, ["name"]),
        ("INVALID_ARG", {"name": "n" * 256}, ["name", "256"]),
        ("INVALID_ARG", {"name": "é" * 128}, ["name", "256"]),
        ("INVALID_ARG", {"name": ".virtforge-0123456789abcdef.tmp"}, ["name"]),
        ("INVALID_ARG", {"source": "../base.qcow2"}, ["source", "../base.qcow2"]),
        ("INVALID_ARG", {"source": "n" * 256}, ["source"]),
        ("INVALID_ARG", {"pool": "a/b"}, ["pool", "a/b"]),
        ("INVALID_ARG", {"pool": ""}, ["pool"]),
        # sizes
        ("INVALID_ARG", {"capacity": "forty"}, ["capacity", "forty"]),
        ("INVALID_ARG", {"capacity": "-1"}, ["capacity", "-1"]),
        ("INVALID_ARG", {"capacity": "1.5G"}, ["capacity", "1.5G"]),
        ("INVALID_ARG", {"capacity": "10 parsecs"}, ["capacity", "10 parsecs"]),
        ("INVALID_ARG", {"capacity": "99999999E"}, ["capacity", "99999999E"]),
        ("INVALID_ARG", {"max_capacity": "lots"}, ["max_capacity", "lots"]),
        ("UNSAFE_IMAGE", {"max_capacity": "1M"}, ["max_capacity", "1048576"]),
        # choices, types and what excludes each other
        ("CONFIG_UNSUPPORTED", {"format": "qcow3"}, ["format", "qcow3"]),
        ("CONFIG_UNSUPPORTED", {"source_format": "qcow3"}, ["source_format", "qcow3"]),
        ("INVALID_ARG", {"preallocation": "some"}, ["preallocation", "some"]),
        ("INVALID_ARG", {"method": "magic"}, ["method", "magic"]),
        ("INVALID_ARG", {"resize": "perhaps"}, ["resize", "perhaps"]),
        ("INVALID_ARG", {"source_path": "/tmp/x"}, ["source", "source_path"]),
        ("INVALID_ARG", {"source": None}, ["source"]),
        ("INVALID_ARG", {"pool": None}, ["pool"]),
        ("INVALID_ARG", {"source": None, "source_path": "relative"}, ["source_path", "relative"]),
        ("INVALID_ARG", {"colour": "blue"}, ["colour"]),
        ("INVALID_ARG", {"format": "raw", "qcow2": {"compat": "1.1"}}, ["qcow2", "raw"]),
        ("INVALID_ARG", {"qcow2": {"compat": "2"}}, ["compat", "2"]),
        ("INVALID_ARG", {"qcow2": {"cluster_size": "3k"}}, ["cluster_size", "3"]),
        ("INVALID_ARG", {"qcow2": {"cluster_size": "4M"}}, ["cluster_size"]),
        ("CONFIG_UNSUPPORTED", {"format": "raw", "preallocation": "metadata"}, ["preallocation", "metadata", "raw"]),
        ("CONFIG_UNSUPPORTED", {"format": "vmdk", "preallocation": "full"}, ["preallocation", "full", "vmdk"]),
        ("INVALID_ARG", {"owner": "nobody-of-that-name"}, ["owner", "nobody-of-that-name"]),
        ("INVALID_ARG", {"owner": "4294967295"}, ["owner", "4294967295"]),
        ("INVALID_ARG", {"owner": "99999999999999999999"}, ["owner", "9999"]),
        ("INVALID_ARG", {"owner": "\u00b2"}, ["owner"]),
        ("INVALID_ARG", {"group": "\0"}, ["group"]),
        ("INVALID_ARG", {"mode": True}, ["mode", "True"]),
        ("INVALID_ARG", {"group": "no-such-group"}, ["group", "no-such-group"]),
        ("INVALID_ARG", {"mode": "rwx"}, ["mode", "rwx"]),
        ("INVALID_ARG", {"mode": "9999"}, ["mode", "9999"]),
        ("INVALID_ARG", {"lock_timeout": -1}, ["lock_timeout", "-1"]),
        ("INVALID_ARG", {"timeout": -5}, ["timeout", "-5"]),
        # volume XML
        ("XML_ERROR", {"xml": "<volume>"}, ["xml"]),
        ("XML_ERROR", {"xml": "<pool/>"}, ["xml", "pool"]),
        ("INVALID_ARG", {"name": None, "xml": XML.format("../up", "G")}, ["name", "../up"]),
        ("INVALID_ARG", {"xml": XML.format("web", "parsec")}, ["capacity", "parsec"]),
        ("XML_ERROR", {"xml": "<!DOCTYPE x [<!ENTITY e SYSTEM 'file:///etc/passwd'>]>" + XML.format("&e;", "G")}, ["xml"]),
        # sources
        ("INVALID_ARG", {"source": None, "source_path": "/etc"}, ["/etc", "directory"]),
        ("INVALID_ARG", {"source": None, "source_path": "/dev/null"}, ["/dev/null", "character device"]),
        ("INVALID_ARG", {"source": "directory"}, ["directory"]),
        ("INVALID_ARG", {"source": "socket"}, ["socket"]),
        ("INVALID_ARG", {"source": "pipe"}, ["named pipe"]),
        ("UNSAFE_IMAGE", {"source": "outside"}, ["outside", "/etc/hostname", "source_pool"]),
        ("UNSAFE_IMAGE", {"source": "overlay"}, ["overlay", "elsewhere", "source_pool"]),
        ("CORRUPT_IMAGE", {"source": "cut", "format": "raw"}, ["cut"]),
        ("NO_SUPPORT", {"method": "reflink", "format": "vdi"}, ["method", "reflink", "vdi"]),
    ],
)
def test_in_a_directory(pool, qcow2, scratch, code, stated, words):
    (pool / "directory").mkdir()
    os.mkfifo(pool / "pipe")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(pool / "socket"))
    os.symlink("/etc/hostname", pool / "outside")
    elsewhere = scratch / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    if not (elsewhere / "base.raw").exists():
        harness.make_raw(elsewhere / "base.raw", MIB, pieces=())
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", elsewhere / "base.raw", "-F", "raw", pool / "overlay")
    # Cut off within its tables.
    (pool / "cut").write_bytes(qcow2.read_bytes()[:70000])
    params = {"pool": str(pool), "source": "base.qcow2", "name": "web", **stated}
    params = {key: value for key, value in params.items() if value is not None}
    try:
        message = refused(code, **params)
    finally:
        listener.close()
    assert all(str(word) in message for word in words), message
    assert not (pool / "web").exists()


@pytest.mark.parametrize("stated", [{"source": "nothing"}, {"source_path": "/nothing"}])
def test_a_missing_source(pool, stated):
    """For real only: in a check run an earlier task would have made it."""
    result = module({"pool": pool, "name": "web", **stated})
    assert (result["failed"], result["error_code"]) == (True, "NO_STORAGE_VOL")
    assert "nothing" in result["msg"]
    assert not (pool / "web").exists()


@pytest.mark.parametrize("stated", [{"pool": "/nowhere/at/all"}, {"source_pool": "/nowhere/at/all"}])
def test_a_missing_directory(pool, qcow2, stated):
    params = {"pool": str(pool), "source": "base.qcow2", "name": "web", **stated}
    result = module(params)
    assert (result["failed"], result["error_code"]) == (True, "NO_STORAGE_POOL")
    assert "/nowhere/at/all" in result["msg"]


def test_a_pool_that_is_a_file(pool, qcow2):
    assert str(qcow2) in refused("INVALID_ARG", pool=str(qcow2), source_pool=pool, source="base.qcow2", name="web")


def test_a_missing_pool_of_libvirt(libvirtd, pool, qcow2):
    for stated in ({"pool": "nothing", "source_pool": pool}, {"pool": pool, "source_pool": "nothing"}):
        result = module({"source": "base.qcow2", "name": "web", **stated})
        assert (result["failed"], result["error_code"]) == (True, "NO_STORAGE_POOL")
        assert "nothing" in result["msg"]


def test_an_inactive_pool(libvirt_pool, pool2, pool, qcow2):
    harness.virsh("pool-destroy", libvirt_pool)
    for stated in ({"pool": libvirt_pool, "source_pool": pool}, {"pool": pool2, "source_pool": libvirt_pool}):
        result = module({"source": "base.qcow2", "name": "web", **stated})
        assert (result["failed"], result["error_code"]) == (True, "OPERATION_INVALID")
        assert libvirt_pool in result["msg"] and "active" in result["msg"]
    assert not (pool / "web").exists()


def test_a_pool_of_another_type(libvirtd, pool, qcow2):
    harness.virsh("pool-define-as", "paths", "mpath", "--target", "/dev/mapper")
    try:
        assert "mpath" in refused("NO_SUPPORT", pool="paths", source_pool=pool, source="base.qcow2", name="web")
    finally:
        harness.virsh("pool-undefine", "paths")


def test_a_uri_that_leads_nowhere(libvirtd, pool, qcow2):
    for uri, code in (
        ("qemu+tcp://127.0.0.1:9/system", "IO_ERROR"),
        ("nonsense", "INVALID_ARG"),
        ("nosuch:///system", "IO_ERROR"),
    ):
        result = module({"uri": uri, "pool": "default", "source_pool": str(pool), "source": "base.qcow2", "name": "web"})
        assert result["failed"] and result["error_code"] == code, result
        assert uri in result["msg"]


def test_an_image_that_claims_too_much(pool):
    run("qemu-img", "create", "-q", "-f", "qcow2", pool / "huge.qcow2", "100T")
    message = refused("UNSAFE_IMAGE", pool=pool, source="huge.qcow2", name="web")
    assert "max_capacity" in message and str(100 << 40) in message
    assert harness.settle(pool=pool, source="huge.qcow2", name="web", max_capacity="200TiB")["changed"]


def test_two_formats_in_one_file_are_refused_until_one_is_stated(pool, qcow2):
    # The magic of VDI stands where qcow2 has the offset of its snapshots, of which there are none.
    harness.write_at(qcow2, 64, b"\x7f\x10\xda\xbe")
    message = refused("UNSAFE_IMAGE", pool=pool, source="base.qcow2", name="web")
    assert "source_format" in message
    assert harness.settle(pool=pool, source="base.qcow2", name="web", source_format="qcow2")["changed"]


def test_any_bytes_can_be_cloned_as_raw(pool, qcow2):
    harness.settle(pool=pool, source="base.qcow2", source_format="raw", name="web")
    assert (pool / "web").read_bytes() == qcow2.read_bytes()


@pytest.mark.parametrize("stated", [{"format": "qcow2"}, {}])
def test_no_space_is_told_before_the_copy(small_file_system, pool, stated):
    small = small_file_system("ext4", 24 * MIB)
    harness.make_raw(pool / "base.raw", 64 * MIB, pieces=((0, 40),))
    free = os.statvfs(small).f_bavail
    message = refused("NO_SPACE", pool=small, source_pool=pool, source="base.raw", name="web", **stated)
    missing = int(next(word for word in message.replace("(", " ").split() if word.isdigit() and len(word) > 6))
    available = os.statvfs(small).f_bfree * os.statvfs(small).f_frsize
    # What was said to be missing is what 40 MiB need beyond the free space, and some for tables.
    assert 0 <= missing - (40 * MIB - available) < 4 * MIB, message
    assert os.statvfs(small).f_bavail == free
    assert sorted(os.listdir(small)) == ["lost+found"]


def test_no_space_where_only_trying_tells_that_blocks_cannot_be_shared(small_file_system):
    small = small_file_system("xfs without reflink", 300 * MIB)
    harness.make_raw(small / "base.raw", 200 * MIB, pieces=((0, 160),))
    free = os.statvfs(small).f_bfree
    result = module({"pool": small, "source": "base.raw", "name": "web"})
    assert result["failed"] and result["error_code"] == "NO_SPACE", result
    assert "bytes are missing" in result["msg"]
    result = module({"pool": small, "source": "base.raw", "name": "web", "method": "reflink"})
    assert result["failed"] and result["error_code"] == "NO_SUPPORT", result
    assert os.listdir(small) == ["base.raw"]
    assert os.statvfs(small).f_bfree == free


def test_a_preallocated_volume_that_cannot_fit(small_file_system, pool, raw):
    small = small_file_system("ext4", 24 * MIB)
    refused("NO_SPACE", pool=small, source_pool=pool, source="base.raw", name="web", preallocation="falloc")


def test_without_permission(pool, qcow2):
    """An ordinary user and a pool of root."""
    qcow2.chmod(0o644)
    user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--bounding-set=-all"]
    for stated in ({"source": "base.qcow2"}, {"source_path": "/etc/shadow"}):
        for mode in (True, False):
            result = module({"pool": pool, "name": "web", **stated}, check=mode, prefix=user)
            assert result["failed"] and result["error_code"] == "OPERATION_DENIED", result
            assert ("become" in result["msg"]) == ("source" in stated)
    assert not (pool / "web").exists()


def test_a_pool_that_may_be_passed_through_but_not_listed(pool, qcow2):
    """As /var/lib/libvirt/images is; what there is to do decides."""
    user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--bounding-set=-all"]
    qcow2.chmod(0o644)
    clone(pool=pool, source="base.qcow2", name="web")
    for mode in (0o711, 0o733):
        pool.chmod(mode)
        for checked in (True, False):
            params = {"pool": pool, "source": "base.qcow2"}
            result = module({**params, "name": "new"}, check=checked, prefix=user)
            assert result["failed"] and result["error_code"] == "OPERATION_DENIED", result
            assert "become" in result["msg"]
            assert module({**params, "name": "web"}, check=checked, prefix=user)["actions"] == []
    pool.chmod(0o755)


def test_a_read_only_file_system(small_file_system, raw, pool):
    small = small_file_system("ext4", 24 * MIB)
    run("mount", "-o", "remount,ro", small)
    result = module({"pool": small, "source_pool": pool, "source": "base.raw", "name": "web"})
    assert result["failed"] and result["error_code"] == "OPERATION_DENIED", result
    assert str(small) in result["msg"]


def test_a_missing_qemu_img(pool, qcow2):
    """In a mount namespace in which nobody can find it."""
    hide = ["unshare", "--mount", "sh", "-c", 'mount --bind /dev/null /usr/bin/qemu-img && exec "$@"', "sh"]
    message = None
    for stated in ({"format": "raw"}, {"format": "vmdk"}, {"capacity": "1G"}):
        result = result_of(start({"pool": pool, "source": "base.qcow2", "name": "web", **stated}, prefix=hide))
        assert result["failed"] and result["error_code"] == "MISSING_DEPENDENCY", result
        message = result["msg"]
        assert "qemu-img" in message and "\n" not in message
        assert not (pool / "web").exists()
    # A copy of a raw volume needs none.
    result = result_of(start({"pool": pool, "source": "base.raw", "name": "web"}, prefix=hide))
    assert result["actions"] == ["created"]


def test_a_capacity_larger_than_the_file_system_can_hold(pool, raw):
    result = module({"pool": pool, "source": "base.raw", "name": "web", "capacity": "8EiB"})
    assert result["failed"] and result["error_code"] in ("INVALID_ARG", "NO_SPACE", "CONFIG_UNSUPPORTED"), result
    assert not (pool / "web").exists()
    result = module({"pool": pool, "source": "base.raw", "name": "web", "format": "vpc", "capacity": "64TiB"})
    assert result["failed"], result
    assert not (pool / "web").exists()
