# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The outcome table, for real: each row in check mode, for real, and a second time; in a directory and in a pool of libvirt."""

from __future__ import annotations

import os

import harness
import pytest
from harness import GIB, MIB, check, clone, info, module, refused, run, same_content, settle, warnings

SIXTY_FOUR = 64 * MIB


@pytest.fixture
def web(either, pool, qcow2):
    """A volume that exists: 64 MiB, qcow2, a clone of base.qcow2."""
    clone(pool=either, source="base.qcow2", name="web")
    return pool / "web"


# --- absent ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stated, image_format, capacity",
    [
        ({}, "qcow2", SIXTY_FOUR),
        ({"capacity": "300M"}, "qcow2", 300 * MIB),
        ({"capacity": "100MB"}, "qcow2", 100_000_256),
        ({"format": "raw"}, "raw", SIXTY_FOUR),
        ({"format": "iso", "capacity": "67108865"}, "raw", SIXTY_FOUR + 1),
        ({"format": "vpc", "capacity": "67108865"}, "vpc", SIXTY_FOUR + 512),
        ({"format": "vhdx", "capacity": "67108865"}, "vhdx", SIXTY_FOUR + 512),
        ({"format": "vmdk", "capacity": "100000001"}, "vmdk", 100_000_256),
        ({"format": "vdi", "capacity": "100000001"}, "vdi", 100_000_256),
        ({"format": "qed", "capacity": "1GiB"}, "qed", GIB),
        ({"format": "qcow", "capacity": "100000001"}, "qcow", 100_000_256),
    ],
)
def test_absent_is_created_and_a_second_run_finds_the_rounded_size(either, pool, qcow2, stated, image_format, capacity):
    result = settle(pool=either, source="base.qcow2", name="web", **stated)
    assert (result["changed"], result["actions"]) == (True, ["created"])
    volume = result["volume"]
    assert (volume["format"], volume["capacity"]) == (image_format, capacity)
    if image_format == "raw":
        # qemu-img shows whole sectors only.
        assert os.stat(pool / "web").st_size == capacity
    else:
        assert info(pool / "web", image_format)["virtual-size"] == capacity
    assert same_content(qcow2, "qcow2", pool / "web", image_format)
    assert (volume["path"], volume["key"], volume["type"], volume["pool"]) == (
        str(pool / "web"),
        str(pool / "web"),
        "file",
        either,
    )
    assert volume["physical"] == os.stat(pool / "web").st_size
    assert abs(volume["allocation"] - harness.allocated(pool / "web")) <= MIB
    assert volume["backing"] is None
    assert volume["error_code"] is None


def test_a_raw_clone_is_exact_to_the_byte(either, pool):
    harness.make_raw(pool / "odd.raw", 1_024_512, pieces=((0, 1000),), unit=1024)
    result = settle(pool=either, source="odd.raw", name="copy.raw")
    assert os.stat(pool / "copy.raw").st_size == result["volume"]["capacity"] == 1_024_512
    assert (pool / "copy.raw").read_bytes() == (pool / "odd.raw").read_bytes()


def test_a_qcow2_clone_asked_for_300m_of_a_100m_source_has_300m(either, pool):
    run("qemu-img", "create", "-q", "-f", "qcow2", pool / "small.qcow2", "100M")
    settle(pool=either, source="small.qcow2", name="large.qcow2", capacity="300M")
    assert info(pool / "large.qcow2", "qcow2")["virtual-size"] == 300 * MIB


def test_the_name_is_made_up_the_same_each_time(either, pool, qcow2):
    assert settle(pool=either, source="base.qcow2")["volume"]["name"] == "base-clone.qcow2"
    assert settle(pool=either, source="base.qcow2", format="raw")["volume"]["name"] == "base-clone.raw"


# --- same format, capacity as stated or not stated ------------------------------------------------------------------------


@pytest.mark.parametrize("stated", [{}, {"capacity": "64MiB"}, {"format": "qcow2"}, {"clone_type": "full"}])
def test_as_stated_is_unchanged(either, web, stated):
    before = harness.fingerprint(web)
    result = settle(pool=either, source="base.qcow2", name="web", **stated)
    assert (result["changed"], result["actions"]) == (False, [])
    assert result["diff"]["before"] == result["diff"]["after"]
    assert harness.fingerprint(web) == before


def test_stated_permissions_that_differ_are_set(either, web):
    result = settle(pool=either, source="base.qcow2", name="web", owner="libvirt-qemu", group="kvm", mode="0640")
    assert (result["changed"], result["actions"]) == (True, ["permissions"])
    status = web.stat()
    assert (web.owner(), web.group(), status.st_mode & 0o7777) == ("libvirt-qemu", "kvm", 0o640)
    assert [result["volume"][key] for key in ("owner", "group", "mode")] == ["libvirt-qemu", "kvm", "0640"]


def test_permissions_that_are_not_stated_are_left(either, web):
    os.chown(web, 1234, 1235)
    web.chmod(0o604)
    assert not settle(pool=either, source="base.qcow2", name="web")["changed"]
    assert (web.stat().st_uid, web.stat().st_gid, web.stat().st_mode & 0o7777) == (1234, 1235, 0o604)
    assert settle(pool=either, source="base.qcow2", name="web", mode="u=rw,g=r,o=")["actions"] == ["permissions"]
    assert (web.stat().st_uid, web.stat().st_gid, web.stat().st_mode & 0o7777) == (1234, 1235, 0o640)


# --- smaller than stated --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_format", ["raw", "qcow2", "qed"])
def test_smaller_than_stated_is_grown_in_place(either, pool, qcow2, image_format):
    clone(pool=either, source="base.qcow2", name="web", format=image_format)
    inode = (pool / "web").stat().st_ino
    result = settle(pool=either, source="base.qcow2", name="web", format=image_format, capacity="200M", mode="0640")
    assert result["actions"] == ["grown", "permissions"]
    assert (pool / "web").stat().st_ino == inode
    assert result["volume"]["capacity"] == info(pool / "web", image_format)["virtual-size"] == 200 * MIB
    assert same_content(qcow2, "qcow2", pool / "web", image_format)
    assert '"capacity": 67108864' in str(result["diff"]).replace("'", '"')


@pytest.mark.parametrize("image_format", ["vmdk", "vdi", "vhdx", "vpc", "qcow"])
def test_a_format_that_cannot_grow_fails(either, pool, qcow2, image_format):
    clone(pool=either, source="base.qcow2", name="web", format=image_format)
    before = harness.fingerprint(pool / "web")
    message = refused("NO_SUPPORT", pool=either, source="base.qcow2", name="web", format=image_format, capacity="200M")
    assert image_format in message and "web" in message
    assert harness.fingerprint(pool / "web") == before


def test_growing_is_refused_without_resize(either, web):
    message = refused("DIFFERS", pool=either, source="base.qcow2", name="web", capacity="200M", resize=False)
    assert str(SIXTY_FOUR) in message and str(200 * MIB) in message and "resize" in message


def test_smaller_than_the_source_is_unchanged_with_a_warning(either, web, qcow2):
    run("qemu-img", "resize", "-q", "-f", "qcow2", qcow2, "128M")
    result = settle(pool=either, source="base.qcow2", name="web")
    assert not result["changed"]
    assert any("web" in warning and str(128 * MIB) in warning for warning in warnings(result))


# --- differs --------------------------------------------------------------------------------------------------------------

DIFFERENCES = [
    ({"capacity": "32M", "allow_shrink": True}, ["67108864", "33554432"]),
    ({"format": "raw"}, ["qcow2", "raw"]),
    ({"format": "vmdk"}, ["qcow2", "vmdk"]),
]


@pytest.mark.parametrize("stated, words", DIFFERENCES)
def test_what_differs_fails_and_names_both(either, web, stated, words):
    before = harness.fingerprint(web)
    message = refused("DIFFERS", pool=either, source="base.qcow2", name="web", **stated)
    assert all(word in message for word in ["web", *words]), message
    assert harness.fingerprint(web) == before


def test_other_content_differs_only_when_asked(either, web, qcow2):
    run("qemu-io", "-f", "qcow2", "-c", "write -P 7 10M 1M", web)
    assert not settle(pool=either, source="base.qcow2", name="web")["changed"]
    message = refused("DIFFERS", pool=either, source="base.qcow2", name="web", compare="content")
    assert "web" in message and "base.qcow2" in message


def test_the_same_content_in_another_layout_is_the_same(either, pool, qcow2):
    run("qemu-img", "convert", "-f", "qcow2", "-O", "qcow2", "-o", "cluster_size=4k", qcow2, pool / "web")
    assert not settle(pool=either, source="base.qcow2", name="web", compare="content")["changed"]


def test_a_linked_clone_is_not_a_full_one(either, pool, qcow2):
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", qcow2, "-F", "qcow2", pool / "web")
    assert not settle(pool=either, source="base.qcow2", name="web")["changed"]
    message = refused("DIFFERS", pool=either, source="base.qcow2", name="web", clone_type="full")
    assert "base.qcow2" in message and "full" in message
    result = settle(pool=either, source="base.qcow2", name="web", clone_type="full", force=True)
    assert result["actions"] == ["replaced"]
    assert "backing-filename" not in info(pool / "web", "qcow2")


@pytest.mark.parametrize("stated", [{"format": "raw"}, {"format": "vdi"}, {"compare": "content"}])
def test_force_replaces_what_differs(either, pool, web, stated, qcow2):
    run("qemu-io", "-f", "qcow2", "-c", "write -P 7 10M 1M", web)
    inode = web.stat().st_ino
    result = settle(pool=either, source="base.qcow2", name="web", force=True, **stated)
    assert (result["changed"], result["actions"]) == (True, ["replaced"])
    assert web.stat().st_ino != inode
    assert same_content(qcow2, "qcow2", web, stated.get("format", "qcow2"))
    assert sorted(os.listdir(pool)) == ["base.qcow2", "base.raw", "web"]


def test_force_replaces_a_larger_one_by_one_of_the_size_stated(either, pool, raw):
    clone(pool=either, source="base.raw", name="web", capacity="200M")
    result = settle(pool=either, source="base.raw", name="web", capacity="64M", force=True)
    assert result["actions"] == ["replaced"]
    assert result["volume"]["capacity"] == (pool / "web").stat().st_size == SIXTY_FOUR


def test_force_leaves_alone_what_is_as_stated(either, web):
    inode = web.stat().st_ino
    assert not settle(pool=either, source="base.qcow2", name="web", force=True, compare="content")["changed"]
    assert web.stat().st_ino == inode


# --- in use ---------------------------------------------------------------------------------------------------------------


def test_a_target_in_use_is_never_changed(either, web):
    os.chown(web, 1234, 1235)
    label = b"system_u:object_r:svirt_image_t:s0:c1,c2\0"
    os.setxattr(web, "security.selinux", label)
    with harness.held(web, "qcow2"):
        before = harness.fingerprint(web)
        for stated in ({"capacity": "200M"}, {"format": "raw", "force": True}):
            message = refused("IN_USE", pool=either, source="base.qcow2", name="web", **stated)
            assert "web" in message and "qemu-io" in message
        stated = {"owner": "root", "group": "root", "mode": "0600", "setype": "virt_image_t"}
        for mode in (True, False):
            result = module({"pool": either, "source": "base.qcow2", "name": "web", **stated}, check=mode)
            assert not result.get("failed"), result
            assert not result["changed"]
            assert any("qemu-io" in warning for warning in warnings(result))
        assert harness.fingerprint(web) == before
        assert os.getxattr(web, "security.selinux") == label


# --- obstacles ------------------------------------------------------------------------------------------------------------


def test_the_source_itself_is_no_target(either, pool, qcow2):
    os.symlink("base.qcow2", pool / "link")
    os.link(qcow2, pool / "hardlink")
    for name in ("base.qcow2", "link", "hardlink"):
        message = refused("INVALID_ARG", pool=either, source="base.qcow2", name=name, force=True)
        assert name in message and "source" in message


def test_a_layer_of_the_source_is_no_target(either, pool, qcow2):
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", qcow2, "-F", "qcow2", pool / "overlay")
    before = harness.fingerprint(qcow2)
    refused("INVALID_ARG", pool=either, source="overlay", name="base.qcow2", force=True, compare="content")
    assert harness.fingerprint(qcow2) == before


def test_what_is_no_volume_is_not_replaced(either, pool, qcow2):
    (pool / "directory").mkdir()
    os.mkfifo(pool / "fifo")
    os.symlink("/nowhere", pool / "dangling")
    for name, words in (("directory", "directory"), ("fifo", "named pipe"), ("dangling", "symbolic link")):
        message = refused("STORAGE_VOL_EXIST", pool=either, source="base.qcow2", name=name, force=True)
        assert name in message and words in message


# --- the source is gone ---------------------------------------------------------------------------------------------------


def test_without_the_source_a_volume_is_judged_on_what_is_stated(either, web, qcow2):
    qcow2.unlink()
    result = settle(pool=either, source="base.qcow2", name="web")
    assert not result["changed"]
    assert any("base.qcow2" in warning for warning in warnings(result))
    assert settle(pool=either, source="base.qcow2", name="web", capacity="200M")["actions"] == ["grown"]
    refused("DIFFERS", pool=either, source="base.qcow2", name="web", format="raw")
    refused("NO_STORAGE_VOL", pool=either, source="base.qcow2", name="web", compare="content")
    refused("NO_STORAGE_VOL", pool=either, source="base.qcow2", name="web", format="raw", force=True)


def test_a_check_run_predicts_what_an_earlier_task_would_have_made_possible(either, pool):
    result = check(pool=either, source="later.qcow2", name="web", format="qcow2", capacity="1G")
    assert (result["changed"], result["actions"]) == (True, ["created"])
    assert any("later.qcow2" in warning for warning in warnings(result))
    result = check(pool=f"{pool}/later", source="base.raw", name="web")
    assert (result["changed"], result["actions"]) == (True, ["created"])
    if either != str(pool):
        assert check(pool="later", source="base.raw", name="web")["changed"]


# --- shrinking ------------------------------------------------------------------------------------------------------------


def test_shrinking_is_refused_unless_nothing_but_zeros_is_cut_off(either, pool, raw, qcow2):
    message = refused("INVALID_ARG", pool=either, source="base.raw", name="web", capacity="60M")
    assert "allow_shrink" in message and str(60 * MIB) in message and str(SIXTY_FOUR) in message
    message = refused("INVALID_ARG", pool=either, source="base.raw", name="web", capacity="51M", allow_shrink=True)
    assert str(51 * MIB) in message or str(52 * MIB - 1) in message
    message = refused("NO_SUPPORT", pool=either, source="base.qcow2", name="web", capacity="60M", allow_shrink=True)
    assert "qcow2" in message
    result = settle(pool=either, source="base.raw", name="web", capacity="52M", allow_shrink=True)
    assert (pool / "web").stat().st_size == result["volume"]["capacity"] == 52 * MIB
    assert (pool / "web").read_bytes() == raw.read_bytes()[: 52 * MIB]
    settle(pool=either, source="base.raw", name="web.qcow2", format="qcow2", capacity="52M", allow_shrink=True)
    assert info(pool / "web.qcow2", "qcow2")["virtual-size"] == 52 * MIB
    assert same_content(raw, "raw", pool / "web.qcow2", "qcow2")


def test_a_new_file_in_a_libvirt_pool_that_libvirt_has_not_seen_is_a_volume(libvirt_pool, pool, qcow2):
    (pool / "web").write_bytes(qcow2.read_bytes())
    assert "web" not in harness.virsh("vol-list", libvirt_pool)
    assert check(pool=libvirt_pool, source="base.qcow2", name="web")["changed"] is False
    assert "web" not in harness.virsh("vol-list", libvirt_pool)
    assert clone(pool=libvirt_pool, source="base.qcow2", name="web")["changed"] is False
    assert "web" in harness.virsh("vol-list", libvirt_pool)
