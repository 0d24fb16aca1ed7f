# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""storage_pool with a real libvirtd: each type through its life, bad input, what must never be formatted, the way back."""

from __future__ import annotations

import os
import shutil
import subprocess
import zlib
from pathlib import Path

import harness
import pytest
from harness import MIB, module, result_of, run, start, virsh, virsh_status
from lxml import etree

POOL = "storage_pool"
FS = "http://libvirt.org/schemas/storagepool/fs/1.0"


def names():
    return [line.strip() for line in virsh("pool-list", "--all", "--name").splitlines() if line.strip()]


def world(params):
    """All that libvirt has of pools, and what is where one is to be."""
    pools = {name: (virsh("pool-dumpxml", name), virsh("pool-dumpxml", name, "--inactive"), facts(name)) for name in names()}
    return pools, tree(params)


def tree(params):
    """The nearest directory that is where the pool shall be, with all that changes when it is touched."""
    path = Path(str(params.get("target_path") or params.get("path") or params.get("name") or params.get("pool")))
    if not path.is_absolute():
        return None
    while not path.is_dir():
        path = path.parent
    if path == path.parent or path == Path("/dev"):
        # Others of this machine write there all the time.
        return None
    status = path.stat()
    return path, status.st_mode, status.st_uid, status.st_gid, status.st_ctime_ns, harness.listing(path)


def facts(name):
    """State, persistence and autostart as virsh shows them."""
    shown = dict(line.split(":", 1) for line in virsh("pool-info", name).splitlines() if ":" in line)
    return tuple(shown[key].strip() for key in ("State", "Persistent", "Autostart"))


RUNNING, STOPPED = ("running", "yes", "no"), ("inactive", "yes", "no")


def settle(actions, **params):
    """Check run, run, second run, check run again: changes predicted, made, and then none. The result of the run."""
    libvirt = not str(params.get("name") or params.get("pool")).startswith("/")
    before = world(params) if libvirt else tree(params)
    result_of_check = module(params, check=True, module=POOL)
    assert (world(params) if libvirt else tree(params)) == before, "the check run changed something"
    assert not result_of_check.get("failed"), result_of_check
    result = module(params, module=POOL)
    assert not result.get("failed"), result
    assert result["actions"] == actions, result
    for key in ("changed", "actions", "diff"):
        assert result_of_check[key] == result[key], (key, result_of_check[key], result[key])
    assert result["changed"] == bool(actions)
    assert (result["diff"]["before"] != result["diff"]["after"]) == bool(actions), result["diff"]
    for check in (False, True):
        again = module(params, check=check, module=POOL)
        assert not again.get("failed"), again
        assert (again["changed"], again["actions"]) == (False, []), again
        assert again["diff"]["before"] == again["diff"]["after"], again
    return result


def refused(code, *words, **params):
    """Message of a run, and of a check run, that must fail with this error code and change nothing."""
    before = world(params) if virsh_status("pool-list") == 0 else None
    for check in (True, False):
        result = module(params, check=check, module=POOL)
        assert result.get("failed"), f"check mode {check}: no failure: {result}"
        assert result["error_code"] == code, result
        assert all(str(word) in result["msg"] for word in words), result["msg"]
        assert "\n" not in result["msg"]
        assert before is None or world(params) == before
    return result["msg"]


def owner(path):
    status = os.stat(path)
    return status.st_uid, status.st_gid, status.st_mode & 0o7777


def definition(name):
    return etree.fromstring(virsh("pool-dumpxml", name, "--inactive"))


def meaning(name):
    """The definition, less sizes and permissions, which libvirt remembers of the last time that it ran."""
    root = definition(name)
    for path in ("capacity", "allocation", "available", "target/permissions"):
        for element in root.findall(path):
            element.getparent().remove(element)
    return [(element.tag, dict(element.attrib), (element.text or "").strip()) for element in root.iter()]


# --- a plain directory ----------------------------------------------------------------------------------------------------


def test_a_directory_without_libvirt(place):
    path = str(place / "a" / "b")
    result = settle(["created"], name=path)
    assert owner(path) == (0, 0, 0o711)
    assert owner(place / "a") == (0, 0, 0o755)
    assert (result["pool"]["type"], result["pool"]["path"], result["pool"]["uuid"]) == ("directory", path, None)
    assert result["diff"]["before"] == {} and result["diff"]["after"]["mode"] == "0711"
    result = settle(["permissions"], name=path, owner="nobody", group="nogroup", mode="2750")
    assert owner(path) == (65534, 65534, 0o2750)
    assert result["diff"]["before"]["owner"] == "root" and result["diff"]["after"]["owner"] == "nobody"
    settle(["permissions"], name=path, mode="o+x", state="present")
    assert owner(path) == (65534, 65534, 0o2751)
    result = settle(["removed"], pool=path + "/", state="absent")
    assert result["pool"] is None and result["diff"]["after"] == {}
    assert not os.path.exists(path) and (place / "a").is_dir()


def test_a_directory_is_made_with_what_is_stated(place):
    settle(["created"], name=str(place / "new"), owner="nobody", group="games", mode="u=rwx,g=rx,o=")
    assert owner(place / "new") == (65534, 60, 0o750)


def test_a_directory_that_is_not_empty_is_not_removed(place):
    (place / "volume").write_text("data")
    result = module({"name": str(place), "state": "absent"}, module=POOL)
    assert result["error_code"] == "OPERATION_INVALID" and "'volume'" in result["msg"]
    # An earlier task of the same check run may delete it.
    assert module({"name": str(place), "state": "absent"}, check=True, module=POOL)["actions"] == ["removed"]
    assert (place / "volume").exists()
    assert (place / "volume").read_text() == "data"


def test_only_a_directory_itself_is_removed(place):
    (place / "real").mkdir()
    (place / "link").symlink_to(place / "real")
    refused("INVALID_ARG", "link", "symbolic link", name=str(place / "link"), state="absent")
    (place / "file").write_text("data")
    refused("INVALID_ARG", "file", name=str(place / "file"), state="absent")
    assert sorted(os.listdir(place)) == ["file", "link", "real"]


def test_a_mount_point_is_not_removed(place):
    run("mount", "-t", "tmpfs", "none", place)
    try:
        refused("INVALID_ARG", place, "mount point", name=str(place), state="absent")
    finally:
        run("umount", place)
    (place / "a").mkdir()
    (place / "b c").mkdir()
    # Of the same file system, and with a blank, which the kernel's list of mounts escapes.
    run("mount", "--bind", place / "a", place / "b c")
    try:
        refused("INVALID_ARG", place / "b c", "mount point", name=str(place / "b c"), state="absent")
    finally:
        run("umount", place / "b c")


@pytest.mark.parametrize(
    "stated, words",
    [
        ({"type": "dir"}, ["type", "'dir'"]),
        ({"target_path": "/x"}, ["target_path", "'/x'"]),
        ({"pool_source": {"format": "xfs"}}, ["pool_source", "xfs"]),
        ({"xml": "<pool type='dir'><name>x</name></pool>"}, ["xml", "<pool"]),
        ({"autostart": False}, ["autostart", "False"]),
        ({"build": True}, ["build", "True"]),
        ({"state": "inactive"}, ["state", "inactive"]),
    ],
)
def test_what_a_directory_without_libvirt_has_no_use_for(place, stated, words):
    refused("INVALID_ARG", str(place), *words, name=str(place), **stated)


def test_a_directory_that_belongs_to_somebody_else(place):
    user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--bounding-set=-all"]
    (place / "there").mkdir()
    for params in (
        {"name": place / "new"},
        {"name": place / "there", "mode": "0700"},
        {"name": place / "there", "state": "absent"},
    ):
        for check in (True, False):
            result = module(params, check=check, module=POOL, prefix=user)
            assert result["failed"] and result["error_code"] == "OPERATION_DENIED", result
            assert "become" in result["msg"], result
    assert os.listdir(place) == ["there"]


# --- dir ------------------------------------------------------------------------------------------------------------------


def test_a_dir_pool_through_its_life(libvirtd, place):
    path = str(place / "deep" / "images")
    # Defined and no more.
    result = settle(["created", "defined"], name="images", type="dir", target_path=path, state="present")
    assert facts("images") == STOPPED
    assert owner(path) == (0, 0, 0o711)
    assert result["diff"]["after"] == {
        **{"name": "images", "type": "dir", "state": "inactive", "autostart": False, "persistent": True},
        **{"target_path": path, "mode": "0711"},
    }
    uuid = result["pool"]["uuid"]
    # Started.
    result = settle(["started"], name="images", type="dir", target_path=path)
    assert facts("images") == RUNNING
    assert result["pool"]["state"] == "active" and result["pool"]["capacity"] > 0
    # A name and a state are enough now; "present" leaves it running.
    settle([], name="images")
    settle([], name="images", state="present")
    settle(["autostart"], name="images", autostart=True)
    assert facts("images") == ("running", "yes", "yes")
    settle([], name="images", type="dir", path=path + "//")
    settle(["permissions"], name="images", owner="nobody", group="nogroup", mode="0751")
    assert owner(path) == (65534, 65534, 0o751)
    # Moved.
    other = str(place / "other")
    result = settle(["created", "redefined", "stopped", "started"], name="images", target_path=other, mode="0700")
    assert result["diff"]["before"]["target_path"] == path and result["diff"]["after"]["target_path"] == other
    assert any(f"its volumes are not moved, they stay in '{path}'" in warning for warning in harness.warnings(result))
    assert (result["diff"]["before"]["state"], result["diff"]["after"]["state"]) == ("active", "active")
    assert result["pool"]["uuid"] == uuid and result["pool"]["path"] == other
    assert facts("images") == ("running", "yes", "yes")
    assert owner(other) == (0, 0, 0o700)
    # Stopped, moved back while it is stopped, and gone.
    settle(["stopped"], name="images", state="inactive")
    settle(["redefined"], name="images", target_path=path, state="present")
    assert facts("images") == ("inactive", "yes", "yes")
    settle(["autostart"], name="images", state="present", autostart=False)
    settle(["started"], name="images")
    (place / "deep" / "images" / "volume").write_text("data")
    result = settle(["stopped", "undefined"], name="images", state="absent")
    assert result["pool"] is None and result["diff"]["after"] == {}
    assert "images" not in names()
    assert (place / "deep" / "images" / "volume").read_text() == "data"
    settle([], name="images", state="absent")


def test_defined_stopped_or_started_at_once(libvirtd, place):
    settle(["created", "defined"], name="one", type="dir", target_path=str(place / "1"), state="inactive")
    settle(["created", "defined", "started", "autostart"], name="two", type="dir", target_path=str(place / "2"), autostart=True)
    assert (facts("one"), facts("two")) == (STOPPED, ("running", "yes", "yes"))


def test_a_redefinition_and_a_stop_in_one_task(libvirtd, place):
    settle(["created", "defined", "started"], name="images", type="dir", target_path=str(place / "1"))
    settle(["created", "redefined", "stopped"], name="images", target_path=str(place / "2"), state="inactive")
    assert definition("images").findtext("target/path") == str(place / "2")


def test_the_directory_of_a_running_pool_that_went_missing_is_made_again(libvirtd, place):
    settle(["created", "defined", "started"], name="images", type="dir", target_path=str(place / "1"))
    (place / "1").rmdir()
    settle(["created"], name="images")
    assert (place / "1").is_dir()
    settle(["stopped"], name="images", state="inactive")
    (place / "1").rmdir()
    settle([], name="images", state="inactive")
    assert not (place / "1").exists()


def test_a_directory_on_btrfs_still_shares_blocks(libvirtd, small_file_system):
    """libvirt's own build would set nocow on it."""
    btrfs = small_file_system("btrfs", 128 * MIB)
    settle(["created", "defined", "started"], name="images", type="dir", target_path=str(btrfs / "images"))
    assert harness.flags_of(btrfs / "images") == harness.flags_of(btrfs)
    virsh("pool-destroy", "images")


def test_a_transient_pool(libvirtd, place):
    virsh("pool-create-as", "passing", "dir", "--target", place)
    assert facts("passing") == ("running", "no", "no")
    settle(["stopped", "undefined"], name="passing", state="absent")
    virsh("pool-create-as", "passing", "dir", "--target", place)
    settle(["defined", "autostart"], name="passing", autostart=True)
    assert facts("passing") == ("running", "yes", "yes")
    virsh("pool-destroy", "passing")
    virsh("pool-undefine", "passing")
    virsh("pool-create-as", "passing", "dir", "--target", place)
    settle(["defined", "stopped"], name="passing", state="inactive")
    assert facts("passing") == STOPPED
    virsh("pool-undefine", "passing")
    virsh("pool-create-as", "passing", "dir", "--target", place)
    diff = settle(["defined"], name="passing")["diff"]
    assert (diff["before"]["persistent"], diff["after"]["persistent"]) == (False, True)


def test_a_definition_that_was_changed_behind_a_running_pool(libvirtd, place):
    """As a run that was killed before the restart leaves it."""
    for name in ("1", "2"):
        (place / name).mkdir()
    settle(["defined", "started"], name="images", type="dir", target_path=str(place / "1"))
    document = virsh("pool-dumpxml", "images", "--inactive").replace(str(place / "1"), str(place / "2"))
    (place / "changed.xml").write_text(document)
    virsh("pool-define", place / "changed.xml")
    settle([], name="images")
    result = settle(["stopped", "started"], name="images", target_path=str(place / "2"))
    assert result["diff"]["before"]["target_path"] == str(place / "1")
    assert result["pool"]["path"] == str(place / "2")


def test_a_symbolic_link_to_a_directory_is_a_directory(libvirtd, place):
    (place / "real").mkdir()
    (place / "link").symlink_to(place / "real")
    settle(["defined", "started"], name="images", type="dir", target_path=str(place / "link"))
    settle(["permissions"], name="images", mode="0700")
    assert owner(place / "real") == (0, 0, 0o700)


# --- fs -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_format, size", [("xfs", 320 * MIB), ("ext4", 32 * MIB)])
def test_an_fs_pool_through_its_life(libvirtd, place, device, image_format, size):
    path = str(place / "mnt")
    disk = device(size)
    params = {"name": "fast", "type": "fs", "target_path": path, "pool_source": {"devices": [disk], "format": image_format}}
    result = settle(["created", "defined", "built", "started"], **params, build=True, mode="0750", owner="nobody")
    assert run("findmnt", "-n", "-o", "SOURCE,FSTYPE", path).split() == [disk, image_format]
    assert owner(path) == (65534, 0, 0o750)
    assert result["pool"]["source"] == {"devices": [disk], "format": image_format}
    assert result["diff"]["after"]["pool_source"] == result["pool"]["source"]
    (place / "mnt" / "volume").write_text("data")
    settle([], **params, build=True)
    # The root of what is mounted has an owner while it is mounted.
    settle(["permissions"], name="fast", mode="0711")
    settle(["stopped"], name="fast", state="inactive", mode="0700")
    assert not os.path.ismount(path)
    settle(["started"], name="fast", mode="u=rwx,go=")
    assert owner(path) == (65534, 0, 0o700)
    # Its definition can be changed without touching what the device holds.
    other = str(place / "elsewhere")
    settle(["created", "redefined", "stopped", "started"], **{**params, "target_path": other}, build=True)
    assert (place / "elsewhere" / "volume").read_text() == "data" and not os.path.ismount(path)
    settle(["stopped", "undefined"], name="fast", state="absent")
    assert not os.path.ismount(other)
    # Defined again, with the data that it had.
    settle(["defined", "started"], **{**params, "target_path": other}, build=True)
    assert (place / "elsewhere" / "volume").read_text() == "data"


def test_a_pool_whose_file_system_died_is_stopped_and_removed(libvirtd, place, device):
    path = str(place / "mnt")
    params = {"name": "fast", "type": "fs", "target_path": path}
    params["pool_source"] = {"devices": [device(320 * MIB)], "format": "xfs"}
    for stated, actions in (
        ({"name": "fast", "state": "inactive"}, ["stopped"]),
        ({**params, "mode": "0711", "state": "inactive"}, ["stopped"]),
        ({"name": "fast", "state": "absent"}, ["stopped", "undefined"]),
    ):
        assert not module({**params, "build": True}, module=POOL).get("failed")
        run("xfs_io", "-x", "-c", "shutdown", path)
        with pytest.raises(OSError):
            os.stat(path)
        for check in (True, False):
            result = module({**params, "build": True}, check=check, module=POOL)
            assert (result.get("error_code"), path in result["msg"]) == ("IO_ERROR", True), result
            result = module(stated, check=check, module=POOL)
            assert result.get("actions") == actions, result
        assert path not in run("findmnt", "-rn", "-o", "TARGET").split()
    assert names() == []


def test_a_path_with_a_symbolic_link_in_it_is_not_mounted_on(libvirtd, place, device):
    disk = device()
    (place / "real").mkdir()
    (place / "link").symlink_to(place / "real")
    params = {"name": "fast", "type": "fs", "pool_source": {"devices": [disk], "format": "ext4"}, "build": True}
    for path in (place / "link", place / "link" / "below"):
        real = str(path).replace("link", "real")
        refused("INVALID_ARG", "target_path", path, real, **params, target_path=str(path))
    run("mkfs.ext4", "-q", disk)
    virsh("pool-define-as", "fast", "fs", "--source-dev", disk, "--target", place / "link")
    virsh("pool-start", "fast")
    try:
        for state in ("inactive", "absent"):
            refused("OPERATION_INVALID", "fast", place / "real", "unmount it first", name="fast", state=state)
    finally:
        run("umount", place / "real")
    settle(["stopped", "undefined"], name="fast", state="absent")


def test_a_btrfs_is_taken_without_a_format(libvirtd, place, device):
    disk = device(128 * MIB)
    run("mkfs.btrfs", "-q", disk)
    params = {"name": "fast", "type": "fs", "target_path": str(place / "mnt")}
    refused("CONFIG_UNSUPPORTED", "btrfs", "ext4", "auto", **params, pool_source={"devices": [disk], "format": "btrfs"})
    settle(["created", "defined", "started"], **params, pool_source={"devices": [disk]})


def test_a_run_that_was_killed_between_building_and_starting(libvirtd, place, device):
    disk = device()
    params = {
        "name": "fast",
        "type": "fs",
        "target_path": str(place / "mnt"),
        "pool_source": {"devices": [disk], "format": "ext4"},
    }
    settle(["created", "defined", "built"], **params, build=True, state="present")
    settle(["started"], **params, build=True)


def test_a_run_that_was_killed_before_building(libvirtd, place, device):
    disk = device()
    params = {
        "name": "fast",
        "type": "fs",
        "target_path": str(place / "mnt"),
        "pool_source": {"devices": [disk], "format": "ext4"},
    }
    settle(["created", "defined"], **params, state="present")
    settle(["built", "started"], **params, build=True)


def test_an_fs_pool_that_somebody_unmounted(libvirtd, place, device):
    """libvirt goes on to call it active, and would fill the file system below."""
    disk = device()
    params = {
        "name": "fast",
        "type": "fs",
        "target_path": str(place / "mnt"),
        "pool_source": {"devices": [disk], "format": "ext4"},
    }
    settle(["created", "defined", "built", "started"], **params, build=True)
    run("umount", place / "mnt")
    assert facts("fast") == RUNNING
    settle([], name="fast", state="present", mode="0700")
    result = settle(["stopped", "started"], name="fast")
    assert result["diff"]["before"]["state"] == "active, not mounted"
    assert os.path.ismount(place / "mnt")


def with_garbage(disk, place):
    with open(disk, "r+b") as file:
        file.seek(12345)
        file.write(b"something of somebody's")


def with_garbage_at_the_end(disk, place):
    with open(disk, "r+b") as file:
        file.seek(-4096, os.SEEK_END)
        file.write(b"something of somebody's")


def with_another_file_system(disk, place):
    run("mkfs.ext4", "-q", disk)


def with_partitions(disk, place):
    run("sfdisk", "-q", "--no-reread", disk, input="label: gpt\n,8M\n")


def with_physical_volume(disk, place):
    """The label and header of LVM2's physical volume, in the second sector (label.h and format_text.c of lvm2)."""
    header = bytearray(512)
    header[0:8] = b"LABELONE"
    header[8:16] = (1).to_bytes(8, "little")
    header[20:24] = (32).to_bytes(4, "little")
    header[24:32] = b"LVM2 001"
    header[32:64] = b"0123456789abcdefghijklmnopqrstuv"
    header[16:20] = (zlib.crc32(header[20:], 0xF597A6CF ^ 0xFFFFFFFF) ^ 0xFFFFFFFF).to_bytes(4, "little")
    with open(disk, "r+b") as file:
        file.seek(512)
        file.write(header)


@pytest.mark.parametrize(
    "prepare, words",
    [
        (with_garbage, ["data that is no known format"]),
        (with_garbage_at_the_end, ["data that is no known format"]),
        (with_another_file_system, ["a file system (ext4)", "xfs"]),
        (with_partitions, ["a partition table (gpt)"]),
        (with_physical_volume, ["LVM2_member"]),
    ],
)
def test_a_device_that_holds_data_is_never_formatted(libvirtd, place, device, prepare, words):
    disk = device(16 * MIB)
    prepare(disk, place)
    before = harness.data_of(disk)
    params = {"name": "fast", "type": "fs", "target_path": str(place / "mnt"), "build": True}
    source = {"devices": [disk], "format": "xfs"}
    refused("OPERATION_INVALID", disk, "never formats over data", *words, **params, pool_source=source)
    assert harness.data_of(disk) == before
    assert names() == [] and os.listdir(place) == []


def test_a_device_that_is_in_use_is_never_formatted(libvirtd, place, device):
    """Its file system is overwritten with zeros: only that it is mounted tells of it."""
    disk = device()
    run("mkfs.ext4", "-q", disk)
    (place / "mounted").mkdir()
    # Writable, the kernel would write parts of it again.
    run("mount", "-o", "ro", disk, place / "mounted")
    try:
        with open(disk, "r+b") as file:
            file.write(bytes(32 * MIB))
            file.flush()
            os.fsync(file.fileno())
        source = {"devices": [disk], "format": "ext4"}
        params = {"name": "fast", "type": "fs", "target_path": str(place / "mnt"), "build": True}
        refused("IN_USE", disk, "mounted", **params, pool_source=source)
    finally:
        run("umount", "-l", place / "mounted")


def test_a_device_that_a_process_has_open_is_never_formatted(libvirtd, place, device):
    disk = device()
    source = {"devices": [disk], "format": "ext4"}
    params = {"name": "fast", "type": "fs", "target_path": str(place / "mnt"), "build": True}
    with open(disk, "rb"):
        refused("IN_USE", disk, f"pid {os.getpid()}", **params, pool_source=source)
    assert Path(disk).read_bytes() == bytes(32 * MIB) and os.listdir(place) == []


def test_a_device_that_a_domain_has_as_a_disk_is_never_formatted(libvirtd, place, device):
    """By another node, too, such as one in another place."""
    disk = device()
    node = place / "node"
    os.mknod(node, 0o60600, os.stat(disk).st_rdev)
    document = """<domain type='qemu'><name>by-node</name><memory unit='MiB'>64</memory>
    <os><type arch='x86_64' machine='pc'>hvm</type></os><devices><emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type='block' device='disk'><driver name='qemu' type='raw'/><source dev='{}'/>
    <target dev='vda' bus='virtio'/></disk></devices></domain>"""
    (place / "domain.xml").write_text(document.format(node))
    virsh("create", place / "domain.xml", "--paused")
    source = {"devices": [disk], "format": "ext4"}
    params = {"name": "fast", "type": "fs", "target_path": str(place / "mnt"), "build": True}
    try:
        refused("IN_USE", disk, "domain 'by-node'", **params, pool_source=source)
    finally:
        virsh("destroy", "by-node")
    assert sorted(os.listdir(place)) == ["domain.xml", "node"]


def test_a_missing_device(libvirtd, place):
    params = {"name": "fast", "type": "fs", "target_path": str(place / "mnt")}
    source = {"devices": ["/dev/nowhere"], "format": "ext4"}
    for build, actions in ((True, ["created", "defined", "built", "started"]), (False, ["created", "defined", "started"])):
        result = module({**params, "pool_source": source, "build": build}, check=True, module=POOL)
        assert result["actions"] == actions, result
        assert any("/dev/nowhere" in warning for warning in harness.warnings(result))
        result = module({**params, "pool_source": source, "build": build}, module=POOL)
        assert (result["failed"], result["error_code"]) == (True, "INVALID_ARG")
        assert "/dev/nowhere" in result["msg"] and "pool_source.devices" in result["msg"]
    assert names() == [] and os.listdir(place) == []
    # Only to define it, it need not be there.
    settle(["created", "defined"], **params, pool_source=source, state="present")


def test_what_cannot_be_built(libvirtd, place, device):
    disk = device()
    params = {"name": "fast", "target_path": str(place / "mnt"), "build": True}
    refused("INVALID_ARG", "build", "dir", **params, type="dir")
    refused("INVALID_ARG", "build", "netfs", **params, type="netfs", pool_source={"hosts": [{"name": "h"}], "dir": "/x"})
    refused("INVALID_ARG", "build", "pool_source.format", **params, type="fs", pool_source={"devices": [disk]})
    source = {"devices": [disk], "format": "ocfs2"}
    refused("MISSING_DEPENDENCY", "mkfs.ocfs2", **params, type="fs", pool_source=source)
    (place / "file").write_bytes(bytes(MIB))
    source = {"devices": [str(place / "file")], "format": "ext4"}
    refused("INVALID_ARG", str(place / "file"), "block device", **params, type="fs", pool_source=source)
    assert (place / "file").read_bytes() == bytes(MIB)


# --- netfs ----------------------------------------------------------------------------------------------------------------


def test_a_netfs_pool_through_its_life(libvirtd, place, gluster):
    path = str(place / "mnt")
    source = {"hosts": [{"name": "127.0.0.2"}], "dir": gluster, "format": "glusterfs"}
    params = {"name": "shared", "type": "netfs", "target_path": path}
    settle(["created", "defined"], **params, pool_source=source, state="present")
    result = settle(["started"], **params, pool_source=source, mode="0770")
    assert os.path.ismount(path) and owner(path)[2] == 0o770
    assert result["pool"]["source"] == source
    # A volume of GlusterFS has a name, with or without a slash.
    settle([], **params, pool_source={**source, "dir": f"/{gluster}"})
    settle(["permissions"], name="shared", mode="0750")
    other = str(place / "elsewhere")
    settle(["created", "redefined", "stopped", "started"], **{**params, "target_path": other}, pool_source=source)
    assert os.path.ismount(other) and not os.path.ismount(path) and owner(other)[2] == 0o750
    settle(["stopped"], name="shared", state="inactive")
    # A volume that the server does not have: the old definition is put back.
    before = meaning("shared")
    result = module({"name": "shared", "pool_source": {"dir": "nothing"}}, module=POOL)
    assert result["failed"] and "old definition is back" in result["msg"], result
    assert meaning("shared") == before
    settle(["started"], name="shared")
    settle(["stopped", "undefined"], name="shared", state="absent")
    assert not os.path.ismount(other)


# --- XML ------------------------------------------------------------------------------------------------------------------

DIR = "<pool type='dir'><name>images</name><target><path>{}</path>{}</target></pool>"
NFS = f"""<pool type='netfs' xmlns:fs='{FS}'><name>isos</name>
<source><host name='nas.invalid'/><dir path='/export'/><format type='nfs'/><protocol ver='4.1'/></source>
<target><path>{{}}</path></target>
<fs:mount_opts><fs:option name='{{}}'/><fs:option name='noatime'/></fs:mount_opts></pool>"""


def test_a_definition_in_xml(libvirtd, place):
    path = str(place / "images")
    permissions = "<permissions><mode>0750</mode><owner>65534</owner><group>60</group></permissions>"
    settle(["created", "defined", "started"], xml=DIR.format(path, permissions))
    assert owner(path) == (65534, 60, 0o750)
    # They count where the directory is made; afterwards it may have others.
    settle(["permissions"], name="images", mode="0700")
    settle([], xml=DIR.format(path + "/", permissions))
    # A name and other parameters win over the document.
    settle(["created", "defined"], name="other", xml=DIR.format(path, ""), target_path=str(place / "other"), state="present")
    assert definition("other").findtext("target/path") == str(place / "other")


def test_what_no_parameter_exists_for_is_compared_and_shown_by_its_path(libvirtd, place):
    path = str(place / "isos")
    settle(["created", "defined"], xml=NFS.format(path, "ro"), state="present")
    swapped = NFS.format(path, "ro").replace("name='ro'", "name='x'").replace("name='noatime'", "name='ro'")
    settle([], xml=swapped.replace("name='x'", "name='noatime'"), state="present")
    result = settle(["redefined"], xml=NFS.format(path, "rw"), state="present")
    assert result["diff"]["before"]["xml"]["fs:mount_opts/fs:option"] == ["name=noatime", "name=ro"]
    assert result["diff"]["after"]["xml"]["fs:mount_opts/fs:option"] == ["name=noatime", "name=rw"]
    # A change by parameters keeps it.
    settle(["redefined"], name="isos", pool_source={"dir": "/export/isos"}, state="present")
    found = definition("isos")
    assert [option.get("name") for option in found.iter(f"{{{FS}}}option")] == ["rw", "noatime"]
    assert (found.find("source/dir").get("path"), found.find("source/protocol").get("ver")) == ("/export/isos", "4.1")
    # A document without it takes it away.
    bare = "<pool type='netfs'><name>isos</name><source><host name='nas.invalid'/><dir path='/export/isos'/></source>{}</pool>"
    settle(["redefined"], xml=bare.format(f"<target><path>{path}</path></target>"), state="present")
    assert b"option" not in etree.tostring(definition("isos"))


@pytest.mark.parametrize("exists", [False, True])
def test_what_libvirt_would_drop_is_refused(libvirtd, place, exists):
    path = str(place / "images")
    if exists:
        settle(["created", "defined", "started"], xml=DIR.format(path, ""))
    document = DIR.format(path, "").replace("<target>", "<source><adapter type='fc_host' wwnn='1'/></source><target>")
    result = module({"xml": document}, module=POOL)
    assert result["failed"] and result["error_code"] == "XML_ERROR", result
    assert "source/adapter" in result["msg"] and ("old definition is back" in result["msg"]) == exists
    assert (names(), os.listdir(place)) == ((["images"], ["images"]) if exists else ([], []))


@pytest.mark.parametrize("inactive", [[], ["--inactive"]])
def test_what_virsh_prints_is_unchanged_when_given_back(libvirtd, place, device, inactive):
    disk = device()
    run("mkfs.ext4", "-q", disk)
    settle(["created", "defined", "started"], name="images", type="dir", target_path=str(place / "images"))
    source = {"devices": [disk]}
    settle(["created", "defined", "started"], name="fast", type="fs", target_path=str(place / "fast"), pool_source=source)
    settle(["created", "defined"], xml=NFS.format(place / "isos", "ro"), state="present")
    for name in ("images", "fast", "isos"):
        settle([], xml=virsh("pool-dumpxml", name, *inactive), state="present")


def test_another_uuid_is_another_pool(libvirtd, place):
    path = str(place / "images")
    one, two = "11111111-2222-4333-8444-555555555555", "21111111-2222-4333-8444-555555555555"
    document = DIR.format(path, "").replace("<target>", f"<uuid>{one}</uuid><target>")
    assert settle(["created", "defined", "started"], xml=document)["pool"]["uuid"] == one
    settle([], xml=document.replace(one, one.replace("-", "")))
    refused("DIFFERS", "images", one, two, "state=absent", xml=document.replace(one, two))
    other = document.replace("<name>images", "<name>other").replace(path, str(place / "other"))
    refused("OPERATION_INVALID", one, "'images'", xml=other)


def test_a_name_is_as_long_as_libvirt_can_store(libvirtd, place):
    settle(["defined", "started"], name="x" * 247, type="dir", target_path=str(place))
    refused("INVALID_ARG", "name", "248", "247", name="x" * 248, type="dir", target_path=str(place))


# --- refusals -------------------------------------------------------------------------------------------------------------


def bad(place):
    path = str(place / "mnt")
    fs = {"name": "p", "type": "fs", "target_path": path}
    netfs = {"name": "p", "type": "netfs", "target_path": path}
    host = [{"name": "h"}]
    return [
        # argument spec
        ("INVALID_ARG", ["type", "ceph"], {"name": "p", "type": "ceph", "target_path": path}),
        ("INVALID_ARG", ["state", "running"], {"name": "p", "state": "running"}),
        ("INVALID_ARG", ["name", "xml"], {"type": "dir"}),
        ("INVALID_ARG", ["pool_source", "device"], {**fs, "pool_source": {"device": "/dev/x"}}),
        ("INVALID_ARG", ["hosts", "adress"], {**netfs, "pool_source": {"hosts": [{"name": "h", "adress": "h"}], "dir": "/x"}}),
        ("INVALID_ARG", ["name", "hosts"], {**netfs, "pool_source": {"hosts": [{}], "dir": "/x"}}),
        ("INVALID_ARG", ["autostart", "perhaps"], {"name": "p", "autostart": "perhaps"}),
        ("INVALID_ARG", ["lock_timeout", "-1"], {"name": "p", "lock_timeout": -1}),
        # names, paths, owners
        ("INVALID_ARG", ["name", "a/b"], {"name": "a/b", "type": "dir", "target_path": path}),
        ("INVALID_ARG", ["name"], {"name": "", "type": "dir", "target_path": path}),
        ("INVALID_ARG", ["name"], {"xml": "<pool type='dir'/>"}),
        ("INVALID_ARG", ["target_path", "relative"], {"name": "p", "type": "dir", "target_path": "relative"}),
        ("INVALID_ARG", ["target_path"], {"name": "p", "type": "dir", "target_path": "/x\n"}),
        ("INVALID_ARG", ["target/path", "relative"], {"xml": DIR.format("relative", "")}),
        ("INVALID_ARG", ["pool_source.devices", "sdb"], {**fs, "pool_source": {"devices": ["sdb"]}}),
        ("INVALID_ARG", ["pool_source.dir"], {**netfs, "pool_source": {"hosts": host, "dir": ""}}),
        ("INVALID_ARG", ["owner", "nobody-of-that-name"], {"name": "p", "owner": "nobody-of-that-name"}),
        ("INVALID_ARG", ["group", "no-such-group"], {"name": "p", "group": "no-such-group"}),
        ("INVALID_ARG", ["mode", "rwx"], {"name": "p", "mode": "rwx"}),
        ("INVALID_ARG", ["mode", "10000"], {"name": "p", "mode": "10000"}),
        ("INVALID_ARG", ["target_path", "file"], {"name": "p", "type": "dir", "target_path": str(place / "file")}),
        ("INVALID_ARG", ["target_path", "file"], {"name": "p", "type": "dir", "target_path": str(place / "file" / "below")}),
        ("INVALID_ARG", ["target_path", "gone", "/nowhere"], {"name": "p", "type": "dir", "target_path": str(place / "gone")}),
        ("INVALID_ARG", ["target_path", "gone"], {"name": "p", "type": "dir", "target_path": str(place / "gone" / "below")}),
        ("INVALID_ARG", ["name", "file"], {"name": str(place / "file")}),
        # what a type needs, and what it has no use for
        ("INVALID_ARG", ["target_path", "dir"], {"name": "p", "type": "dir"}),
        ("INVALID_ARG", ["target_path", "fs"], {"name": "p", "type": "fs", "pool_source": {"devices": ["/dev/x"]}}),
        ("INVALID_ARG", ["pool_source.devices", "fs"], fs),
        ("INVALID_ARG", ["pool_source.devices", "2"], {**fs, "pool_source": {"devices": ["/dev/x", "/dev/y"]}}),
        ("INVALID_ARG", ["pool_source.hosts", "netfs"], {**netfs, "pool_source": {"dir": "/x"}}),
        ("INVALID_ARG", ["pool_source.hosts", "2"], {**netfs, "pool_source": {"hosts": [*host, {"name": "i"}], "dir": "/x"}}),
        ("INVALID_ARG", ["pool_source.dir", "netfs"], {**netfs, "pool_source": {"hosts": host}}),
        (
            "INVALID_ARG",
            ["pool_source.devices", "/dev/x", "dir"],
            {"name": "p", "type": "dir", "target_path": path, "pool_source": {"devices": ["/dev/x"]}},
        ),
        (
            "INVALID_ARG",
            ["pool_source.format", "xfs", "dir"],
            {"name": "p", "type": "dir", "target_path": path, "pool_source": {"format": "xfs"}},
        ),
        ("INVALID_ARG", ["pool_source.dir", "/x", "fs"], {**fs, "pool_source": {"devices": ["/dev/x"], "dir": "/x"}}),
        ("INVALID_ARG", ["pool_source.hosts", "fs"], {**fs, "pool_source": {"devices": ["/dev/x"], "hosts": host}}),
        (
            "CONFIG_UNSUPPORTED",
            ["pool_source.format", "xfs", "netfs", "glusterfs"],
            {**netfs, "pool_source": {"hosts": host, "dir": "/x", "format": "xfs"}},
        ),
        # XML
        ("XML_ERROR", ["xml"], {"xml": "<pool"}),
        ("XML_ERROR", ["xml", "volume"], {"xml": "<volume/>"}),
        ("XML_ERROR", ["xml", "type"], {"xml": "<pool><name>p</name></pool>"}),
        ("XML_ERROR", ["xml", "uuid", "nonsense"], {"xml": "<pool type='dir'><name>p</name><uuid>nonsense</uuid></pool>"}),
        ("XML_ERROR", ["source/frmat"], {"xml": "<pool type='dir'><name>p</name><source><frmat/></source></pool>"}),
        ("XML_ERROR", ["name"], {"xml": "<pool type='dir'><name>p</name><name>q</name></pool>"}),
        ("XML_ERROR", ["DOCTYPE"], {"xml": "<!DOCTYPE x [<!ENTITY e SYSTEM 'file:///etc/passwd'>]><pool type='dir'/>"}),
        ("NO_SUPPORT", ["type", "sheepdog"], {"xml": "<pool type='sheepdog'><name>p</name></pool>"}),
        # connections
        ("IO_ERROR", ["uri", "127.0.0.1:9"], {"name": "p", "uri": "qemu+tcp://127.0.0.1:9/system"}),
        ("INVALID_ARG", ["uri", "nonsense"], {"name": "p", "uri": "nonsense"}),
    ]


def test_bad_input_is_refused_before_the_first_change(libvirtd, place):
    (place / "file").write_text("data")
    (place / "gone").symlink_to("/nowhere")
    for code, words, params in bad(place):
        refused(code, *words, **params)
    assert sorted(os.listdir(place)) == ["file", "gone"]
    assert (place / "file").read_text() == "data"
    assert names() == []


def test_a_pool_that_does_not_exist(libvirtd):
    for stated in ({}, {"state": "inactive"}, {"state": "present"}, {"target_path": "/x"}):
        result = module({"name": "nothing", **stated}, module=POOL)
        assert (result["failed"], result["error_code"]) == (True, "NO_STORAGE_POOL")
        assert "'nothing'" in result["msg"] and "type" in result["msg"]
    # In a check run an earlier task would have defined it.
    for state, actions in (("active", ["started"]), ("inactive", ["stopped"]), ("present", [])):
        result = module({"name": "nothing", "state": state}, check=True, module=POOL)
        assert result["actions"] == actions
        assert any("nothing" in warning for warning in harness.warnings(result))
    settle([], name="nothing", state="absent")


def test_a_name_that_another_type_has(libvirtd, place):
    settle(["created", "defined", "started"], name="images", type="dir", target_path=str(place / "1"))
    source = {"devices": ["/dev/x"]}
    refused("DIFFERS", "images", "dir", "fs", "state=absent", name="images", type="fs", pool_source=source)


def test_what_another_pool_has_already(libvirtd, place, device):
    disk = device()
    settle(["created", "defined", "started"], name="images", type="dir", target_path=str(place / "1"))
    source = {"devices": [disk], "format": "ext4"}
    params = {"type": "fs", "pool_source": source, "build": True}
    settle(["created", "defined", "built", "started"], name="fast", target_path=str(place / "2"), **params)
    shared = {"hosts": [{"name": "nas"}], "dir": "/x"}
    params = {"type": "netfs", "pool_source": shared, "state": "present"}
    settle(["created", "defined"], name="isos", target_path=str(place / "3"), **params)
    refused("OPERATION_INVALID", place / "1", "'images'", name="p", type="dir", target_path=str(place / "1") + "/")
    refused(
        "OPERATION_INVALID",
        place / "1",
        "'images'",
        name="p",
        type="fs",
        pool_source={"devices": ["/dev/x"]},
        target_path=str(place / "1"),
    )
    refused("OPERATION_INVALID", disk, "'fast'", name="p", type="fs", pool_source=source, target_path=str(place / "4"))
    refused(
        "OPERATION_INVALID", "/x", "'nas'", "'isos'", name="p", type="netfs", pool_source=shared, target_path=str(place / "4")
    )
    # So is moving one there.
    refused("OPERATION_INVALID", place / "1", "'images'", name="fast", target_path=str(place / "1"))
    assert sorted(os.listdir(place)) == ["1", "2", "3"]


def test_a_read_only_connection(libvirtd, place):
    uri = "qemu+unix:///system?socket=/run/libvirt/libvirt-sock-ro"
    params = {"name": "images", "type": "dir", "target_path": str(place / "1")}
    refused("OPERATION_DENIED", "images", "read only", uri=uri, **params)
    assert os.listdir(place) == []
    settle(["created", "defined", "started"], **params)
    refused("OPERATION_DENIED", "images", "read only", uri=uri, name="images", state="inactive")
    # Nothing to do needs no permission.
    settle([], uri=uri, **params)


def test_pools_of_other_types_are_started_and_removed_by_name(libvirtd):
    virsh("pool-define-as", "paths", "mpath", "--target", "/dev/mapper")
    settle(["started"], name="paths")
    settle(["stopped"], name="paths", state="inactive")
    settle(["undefined"], name="paths", state="absent")


# --- the way back, and who is in it ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("active", [True, False])
def test_a_definition_that_does_not_start_puts_back_the_old_one(libvirtd, place, device, active):
    good, empty = device(), device()
    run("mkfs.ext4", "-q", good)
    params = {"name": "fast", "type": "fs", "target_path": str(place / "mnt"), "pool_source": {"devices": [good]}}
    settle(["created", "defined", "started"], **params)
    if not active:
        settle(["stopped"], name="fast", state="inactive")
    before = meaning("fast")
    changed = {"pool_source": {"devices": [empty]}, "target_path": str(place / "other")}
    result = module({"name": "fast", **changed}, module=POOL)
    assert result["failed"] and result["error_code"] == "IO_ERROR", result
    assert empty in result["msg"] and "old definition is back" in result["msg"] and "\n" not in result["msg"]
    assert ("runs again" in result["msg"]) == active
    assert meaning("fast") == before
    assert facts("fast") == (RUNNING if active else STOPPED)
    assert os.path.ismount(place / "mnt") == active
    assert os.listdir(place) == ["mnt"]


def test_a_new_pool_that_does_not_start_leaves_nothing(libvirtd, place, device):
    params = {"name": "fast", "type": "fs", "target_path": str(place / "a" / "b"), "pool_source": {"devices": [device()]}}
    result = module(params, module=POOL)
    assert result["failed"] and result["error_code"] == "IO_ERROR", result
    assert names() == [] and os.listdir(place) == []


def test_a_definition_that_libvirt_does_not_take_changes_nothing(libvirtd, place):
    """It has no copy-on-write to turn off on the network, which only it knows."""
    settle(["created", "defined"], xml=NFS.format(place / "isos", "ro"), state="present")
    before = meaning("isos")
    document = NFS.format(place / "moved", "ro").replace("<source>", "<features><cow state='no'/></features><source>", 1)
    result = module({"xml": document, "state": "present"}, module=POOL)
    assert result["failed"] and "cow" in result["msg"], result
    assert meaning("isos") == before
    assert os.listdir(place) == ["isos"]


def test_a_domain_that_uses_the_pool_keeps_it_as_it_is(libvirtd, place, domain):
    params = {"name": "images", "type": "dir", "target_path": str(place / "1"), "mode": "0711"}
    settle(["created", "defined", "started"], **params)
    run("qemu-img", "create", "-q", "-f", "raw", place / "1" / "disk", "1M")
    guest = domain(place / "1" / "disk", "raw")
    refused("IN_USE", "images", guest, name="images", target_path=str(place / "2"))
    assert sorted(os.listdir(place)) == ["1"]
    # What needs no restart goes on, and so does stopping, which takes no file away.
    settle(["permissions"], name="images", mode="0751")
    settle(["stopped"], name="images", state="inactive")
    settle(["created", "redefined"], name="images", target_path=str(place / "2"), state="inactive")
    assert "paused" in virsh("domstate", guest)


def test_a_domain_that_names_a_volume_of_the_pool_keeps_it_as_it_is(libvirtd, place, scratch):
    settle(["created", "defined", "started"], name="images", type="dir", target_path=str(place / "1"))
    run("qemu-img", "create", "-q", "-f", "raw", place / "1" / "disk", "1M")
    virsh("pool-refresh", "images")
    document = """<domain type='qemu'><name>by-volume</name><memory unit='MiB'>64</memory>
    <os><type arch='x86_64' machine='pc'>hvm</type></os><devices><emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type='volume' device='disk'><driver name='qemu' type='raw'/><source pool='images' volume='disk'/>
    <target dev='vda' bus='virtio'/></disk></devices></domain>"""
    (place / "domain.xml").write_text(document)
    virsh("create", place / "domain.xml", "--paused")
    try:
        refused("IN_USE", "images", "by-volume", name="images", target_path=str(place / "2"))
    finally:
        virsh("destroy", "by-volume")


def test_a_file_system_in_use_is_not_unmounted(libvirtd, place, device, domain):
    params = {"name": "fast", "type": "fs", "target_path": str(place / "mnt"), "mode": "0711"}
    source = {"devices": [device()], "format": "ext4"}
    settle(["created", "defined", "built", "started"], **params, pool_source=source, build=True)
    run("qemu-img", "create", "-q", "-f", "raw", place / "mnt" / "disk", "1M")
    guest = domain(place / "mnt" / "disk", "raw")
    refused("IN_USE", "fast", guest, name="fast", state="inactive")
    refused("IN_USE", "fast", guest, name="fast", state="absent")
    assert facts("fast") == RUNNING


def test_a_file_system_with_an_open_file_is_not_unmounted(libvirtd, place, device):
    """Which only the kernel knows of."""
    params = {"name": "fast", "type": "fs", "target_path": str(place / "mnt")}
    source = {"devices": [device()], "format": "ext4"}
    settle(["created", "defined", "built", "started"], **params, pool_source=source, build=True)
    (place / "mnt" / "disk").write_text("data")
    with open(place / "mnt" / "disk", "rb"):
        for stated in ({"state": "inactive"}, {"target_path": str(place / "other")}):
            result = module({"name": "fast", **stated}, module=POOL)
            assert result["failed"] and result["error_code"] == "IN_USE", result
        assert facts("fast") == RUNNING
        assert definition("fast").findtext("target/path") == str(place / "mnt")
    assert os.listdir(place) == ["mnt"]


def test_a_busy_pool_is_waited_for(libvirtd, place):
    """While libvirt clones, it refuses to stop the pool. Its clone reads every hole, which takes seconds."""
    settle(["created", "defined", "started"], name="images", type="dir", target_path=str(place / "1"))
    with open(place / "1" / "slow.raw", "wb") as file:
        file.truncate(10 << 30)
    virsh("pool-refresh", "images")
    slow = subprocess.Popen(["virsh", "-q", "vol-clone", "slow.raw", "slow2.raw", "--pool", "images"])
    harness.wait_until(lambda: virsh_status("pool-refresh", "images") != 0)
    result = module({"name": "images", "state": "inactive", "lock_timeout": 0}, module=POOL)
    assert slow.poll() is None
    assert result["failed"] and result["error_code"] == "TIMEOUT" and "lock_timeout" in result["msg"], result
    result = module({"name": "images", "state": "inactive"}, module=POOL)
    assert result["actions"] == ["stopped"], result
    assert slow.wait() == 0


def test_two_runs_at_once_define_one_pool(libvirtd, place):
    params = {"name": "images", "type": "dir", "target_path": str(place / "1")}
    runs = [start(params, module=POOL) for _number in range(3)]
    results = [result_of(process) for process in runs]
    assert not any(result.get("failed") for result in results), results
    assert sorted(result["actions"] for result in results) == [[], [], ["created", "defined", "started"]]


# --- a user without root --------------------------------------------------------------------------------------------------


def test_a_user_in_his_own_session(scratch, libvirtd):
    home = scratch / "user"
    for directory in (home, home / "run"):
        directory.mkdir(mode=0o700)
        os.chown(directory, 65534, 65534)
    user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    env = {"HOME": str(home), "XDG_RUNTIME_DIR": str(home / "run"), "USER": "nobody"}
    params = {"uri": "qemu:///session", "name": "mine"}
    try:
        for stated, actions in (
            ({"type": "dir", "target_path": home / "images", "mode": "0700"}, ["created", "defined", "started"]),
            ({"autostart": True}, ["autostart"]),
            ({"state": "inactive"}, ["stopped"]),
            ({"state": "absent"}, ["undefined"]),
        ):
            for check, expected in ((True, actions), (False, actions), (False, []), (True, [])):
                result = result_of(start({**params, **stated}, module=POOL, prefix=user, env=env, check=check))
                assert not result.get("failed"), result
                assert result["actions"] == expected
        assert owner(home / "images") == (65534, 65534, 0o700)
        result = result_of(start({**params, "type": "dir", "target_path": "/srv/new/pool"}, module=POOL, prefix=user, env=env))
        assert result["failed"] and result["error_code"] == "OPERATION_DENIED", result
    finally:
        # It ends by itself after a while, and with the process namespace at the latest.
        for pid, words in harness.commands():
            if "libvirtd" in words and os.stat(f"/proc/{pid}").st_uid == 65534:
                os.kill(pid, 15)
                harness.wait_until(lambda pid=pid: not os.path.exists(f"/proc/{pid}/exe"), 30)
        shutil.rmtree(home)


# --- what it needs --------------------------------------------------------------------------------------------------------


def test_without_libvirt_python_or_lxml_the_package_is_named(libvirtd, place):
    hide = ["unshare", "--mount", "sh", "-c", 'mount --bind /dev/null "$1" && shift && exec "$@"', "sh"]
    virsh("pool-define-as", "images", "dir", "--target", place)
    for package, name in (("libvirt", "python3-libvirt"), ("lxml.etree", "lxml")):
        path = run(harness.PYTHON, "-c", f"import {package} as p; print(p.__file__)").strip()
        for of in (POOL, "storage_pool_info"):
            result = result_of(start({"name": "images"}, module=of, prefix=[*hide, path]))
            assert result["failed"] and result["error_code"] == "MISSING_DEPENDENCY", result
            assert name in result["msg"]
        # A directory needs neither.
        result = result_of(start({"name": place / package}, module=POOL, prefix=[*hide, path]))
        assert result["actions"] == ["created"]


def test_without_blkid_nothing_is_formatted(libvirtd, place, device):
    hide = ["unshare", "--mount", "sh", "-c", 'mount --bind /dev/null /usr/sbin/blkid && exec "$@"', "sh"]
    source = {"devices": [device()], "format": "ext4"}
    params = {"name": "fast", "type": "fs", "target_path": place / "mnt", "pool_source": source, "build": True}
    params["target_path"] = str(place / "mnt")
    result = result_of(start(params, module=POOL, prefix=hide))
    assert result["failed"] and result["error_code"] == "MISSING_DEPENDENCY" and "blkid" in result["msg"], result
    assert names() == [] and os.listdir(place) == []
