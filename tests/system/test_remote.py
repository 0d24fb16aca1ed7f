# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A connection to another host, by ssh: what libvirt's own calls do there, and what they cannot do."""

from __future__ import annotations

import os

import harness
import pytest
from conftest import DOMAIN
from harness import MIB, allocated, check, clone, info, kill, make_raw, module, refused, run, same_content, settle, start

BLANK = "storage_volume"
POOL = "storage_pool"


@pytest.fixture
def there(hypervisor, far):
    """Parameters of a task, and the pool's directory with base.raw and base.qcow2 in it, 64 MiB with 3 MiB of data."""
    place = harness.pools[far]
    make_raw(place / "base.raw", 64 * MIB)
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", place / "base.raw", place / "base.qcow2")
    for name in ("base.raw", "base.qcow2"):
        os.chown(place / name, 64055, 108)
        (place / name).chmod(0o640)
    hypervisor.virsh("pool-refresh", far)
    return {"uri": hypervisor.uri, "pool": far}, place


# --- clones of volumes of that host ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("image", ["base.raw", "base.qcow2"])
def test_a_clone_in_a_pool(there, image):
    task, place = there
    result = settle(**task, source=image, name="web")
    volume, kind = result["volume"], image.split(".")[1]
    assert (volume["format"], volume["capacity"], volume["transfer"]) == (kind, 64 * MIB, "libvirt")
    assert volume["path"] == volume["key"] == f"/srv/{task['pool']}/web"
    assert (volume["owner"], volume["group"], volume["mode"], volume["shared"]) == ("64055", "108", "0640", None)
    assert volume["allocation"] == allocated(place / "web") <= 4 * MIB
    assert same_content(place / image, kind, place / "web", kind)
    status = (place / "web").stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (64055, 108, 0o640)


@pytest.mark.parametrize(
    "image, stated",
    [("base.raw", {"format": "qcow2"}), ("base.qcow2", {"format": "raw"}), ("base.qcow2", {"qcow2": {"cluster_size": "4KiB"}})],
)
def test_a_clone_across_pools_in_another_format_and_larger(there, far2, image, stated):
    task, place = there
    result = settle(
        uri=task["uri"], pool=far2, source_pool=task["pool"], source=image, capacity="100MiB", mode="0600", owner="7", **stated
    )
    volume = result["volume"]
    kind = stated.get("format", "qcow2")
    assert (volume["name"], volume["capacity"], volume["owner"], volume["mode"]) == (
        f"base-clone.{kind}",
        100 * MIB,
        "7",
        "0600",
    )
    made = harness.pools[far2] / volume["name"]
    found = info(made, kind)
    assert found["virtual-size"] == 100 * MIB and allocated(made) <= 5 * MIB
    assert "qcow2" not in stated or found["cluster-size"] == 4096
    assert same_content(place / image, image.split(".")[1], made, kind)


def test_a_volume_that_exists(there, hypervisor):
    task, place = there
    task = {**task, "source": "base.qcow2", "name": "web"}
    settle(**task)
    assert settle(**task, capacity="80MiB")["actions"] == ["grown"]
    assert info(place / "web", "qcow2")["virtual-size"] == 80 * MIB
    assert settle(**task, capacity="80MiB", format="qcow2", owner=64055, mode="0640")["changed"] is False
    message = refused("DIFFERS", **task, capacity="70MiB")
    assert f"{80 * MIB} bytes" in message and f"{70 * MIB} bytes" in message
    for code, words, stated in (
        ("DIFFERS", "qcow2", {"format": "raw"}),
        ("NO_SUPPORT", "force", {"format": "raw", "force": True}),
        ("NO_SUPPORT", "0640, asked for is 0600", {"mode": "0600"}),
    ):
        result = module({**task, **stated})
        assert result["error_code"] == code and words in result["msg"], result
    # A file that libvirt has not listed yet, until it is in the way.
    make_raw(place / "new", MIB)
    assert check(**{**task, "name": "new"})["actions"] == ["created"]
    assert module({**task, "name": "new"})["error_code"] == "DIFFERS"


def test_linked_clones(there):
    task, place = there
    task = {**task, "source": "base.qcow2", "name": "web", "clone_type": "linked"}
    result = settle(**task, capacity="80MiB")
    assert result["volume"]["backing"] == {"path": f"/srv/{task['pool']}/base.qcow2", "format": "qcow2", "depth": 1}
    found = info(place / "web", "qcow2")
    assert found["virtual-size"] == 80 * MIB and found["backing-filename"] == f"/srv/{task['pool']}/base.qcow2"
    assert allocated(place / "web") < MIB
    assert "linked" in refused("DIFFERS", **{**task, "clone_type": "full"})
    # An overlay is flattened by a clone.
    result = settle(uri=task["uri"], pool=task["pool"], source="web", name="flat")
    assert "backing-filename" not in info(place / "flat", "qcow2") and result["volume"]["capacity"] == 80 * MIB


def test_a_partition_as_a_source(hypervisor, far, device):
    path = device(64 * MIB)
    task = {"uri": hypervisor.uri, "source_pool": "parts", "source": f"{os.path.basename(path)}p1"}
    hypervisor.virsh("pool-define-as", "parts", "disk", "--source-dev", path, "--source-format", "gpt", "--target", "/dev")
    try:
        hypervisor.virsh("pool-build", "parts", "--overwrite")
        hypervisor.virsh("pool-start", "parts")
        hypervisor.virsh("vol-create-as", "parts", task["source"], "10MiB")
        harness.write_at(f"{path}p1", 4096, harness.noise(MIB))
        volume = clone(**task, pool=far, name="web", format="qcow2", capacity="20MiB")["volume"]
        assert (volume["capacity"], volume["mode"]) == (20 * MIB, "0600")
        assert same_content(f"{path}p1", "raw", harness.pools[far] / "web", "qcow2")
        there = {"uri": hypervisor.uri, "pool": "parts", "name": task["source"]}
        assert "type disk" in module({**there, "source_pool": far, "source": "web"})["msg"]
        assert "type disk" in module({**there, "state": "absent"}, module=BLANK)["msg"]
        (found,) = module(there, module="storage_volume_info")["volumes"]
        assert (found["type"], found["format"], found["capacity"]) == ("block", "raw", 10 * MIB)
    finally:
        harness.virsh_status("pool-destroy", "parts", uri=hypervisor.uri)
        harness.virsh_status("pool-undefine", "parts", uri=hypervisor.uri)
        run("partx", "-d", path)


# --- uploads --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "image, stated",
    [
        ("base.raw", {}),
        ("base.raw", {"capacity": "100MiB"}),
        ("base.raw", {"format": "vmdk"}),
        ("base.qcow2", {"capacity": "100MiB"}),
        ("base.qcow2", {"format": "raw", "capacity": "100MiB"}),
    ],
)
def test_an_upload_keeps_the_holes(hypervisor, far, pool, qcow2, image, stated):
    task = {"uri": hypervisor.uri, "pool": far, "source_path": pool / image, "name": "web", "mode": "0640", **stated}
    volume = settle(**task)["volume"]
    was = image.split(".")[1]
    kind = stated.get("format", was)
    capacity = 100 * MIB if "capacity" in stated else 64 * MIB
    assert (volume["format"], volume["capacity"], volume["mode"]) == (kind, capacity, "0640")
    assert volume["transfer"] == ("copy" if kind == was else "convert") and "another host" in volume["fallback_reason"]
    made = harness.pools[far] / "web"
    assert same_content(pool / image, was, made, kind) and info(made, kind)["virtual-size"] == capacity
    assert volume["allocation"] == allocated(made) <= 5 * MIB


def test_by_ssh(hypervisor, far, pool, raw):
    """The whole way as users have it; the other tests do without ssh to be quick."""
    task = {"uri": hypervisor.ssh, "pool": far}
    clone(**task, source_path=raw, name="base.raw")
    clone(**task, source="base.raw", name="web", capacity="70MiB")
    assert same_content(raw, "raw", harness.pools[far] / "web", "raw") and allocated(harness.pools[far] / "web") < 4 * MIB
    assert len(module(task, module="storage_volume_info")["volumes"]) == 2
    assert clone(BLANK, **task, name="web", state="absent")["actions"] == ["deleted"]


def test_small_files(hypervisor, far, pool):
    for size in (0, 100, 4097):
        make_raw(pool / "small", size, ((0, 1),) if size else (), unit=max(size, 1))
        clone(uri=hypervisor.uri, pool=far, source_path=pool / "small", name=f"web{size}")
        assert (harness.pools[far] / f"web{size}").read_bytes() == (pool / "small").read_bytes()


def test_snapshots_are_uploaded_too(hypervisor, far, pool, qcow2):
    run("qemu-img", "snapshot", "-c", "before", qcow2)
    settle(uri=hypervisor.uri, pool=far, source_pool=pool, source="base.qcow2", name="web")
    assert [one["name"] for one in info(harness.pools[far] / "web", "qcow2")["snapshots"]] == ["before"]


def test_many_volumes(there, pool, raw):
    task, place = there
    volumes = [{"name": "a"}, {"name": "b", "capacity": "70MiB"}, {"name": "base.qcow2"}]
    for source in ({"source": "base.raw"}, {"source_path": raw}):
        result = module({**task, **source, "volumes": volumes})
        assert [one["error_code"] for one in result["volumes"]] == [None, None, "DIFFERS"]
        assert (place / "b").stat().st_size == 70 * MIB and same_content(raw, "raw", place / "a", "raw")
        again = clone(**task, **source, volumes=volumes[:2])
        assert again["changed"] is False
        for name in ("a", "b"):
            assert clone(BLANK, **task, name=name, state="absent")["actions"] == ["deleted"]


# --- what goes wrong ------------------------------------------------------------------------------------------------------


def test_what_cannot_be_done_there(there, hypervisor, far2, pool, qcow2):
    task, _place = there
    local = {"source_path": pool / "base.raw"}
    far = {"source": "base.raw"}
    # tests/unit has all of them.
    for stated, words in (
        ({**far, "compare": "content"}, "compare=content"),
        ({**local, "verify": True}, "verify=true"),
        ({"source": "base.qcow2", "source_format": "raw"}, "source_format"),
        ({**far, "owner": "root"}, "owner: 'root'"),
    ):
        assert words in module({**task, "name": "web", **stated})["msg"]
    assert "another host" in refused("NO_SUPPORT", uri=task["uri"], pool=pool, source_pool=task["pool"], **far)
    assert "source itself" in module({**task, **far, "name": "base.raw"})["msg"]
    assert module({**task, "source": "nothing", "name": "web"})["error_code"] == "NO_STORAGE_VOL"
    assert module({**task, "pool": "nothing", **far})["error_code"] == "NO_STORAGE_POOL"
    assert "connecting" in module({**task, "uri": "qemu+tcp://127.0.0.1:9/system", **far})["msg"]


def test_a_backing_store_in_a_pool_that_the_task_does_not_name(there, hypervisor, far2):
    task, place = there
    (place / "base.qcow2").rename(harness.pools[far2] / "base.qcow2")
    below = f"/srv/{far2}/base.qcow2"
    run("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b", below, place / "overlay", "64M")
    for name in (task["pool"], far2):
        hypervisor.virsh("pool-refresh", name)
    assert below in refused("UNSAFE_IMAGE", **task, source="overlay", name="web")
    settle(uri=task["uri"], pool=far2, source_pool=task["pool"], source="overlay", name="web")
    # What a guest has written to the start of its raw disk.
    with open(place / "base.raw", "r+b") as file:
        file.write((harness.pools[far2] / "base.qcow2").read_bytes())
    assert "base.raw" in refused("UNSAFE_IMAGE", **task, source="base.raw", name="web2")


def test_a_clone_that_fails_leaves_no_volume(there, hypervisor):
    """qemu-img there finds no room, and resizing a clone is more than the file system can have."""
    task, place = there
    before = set(os.listdir(place))
    huge = {**task, "source": "base.raw", "name": "web", "capacity": "63TiB", "max_capacity": "64TiB"}
    result = module(huge)
    assert result["error_code"] == "IO_ERROR" and "too large" in result["msg"].lower(), result
    assert set(os.listdir(place)) == before and "web" not in hypervisor.virsh("vol-list", task["pool"])


def test_an_upload_that_is_broken_off(hypervisor, far, pool):
    make_raw(pool / "base.raw", 64 * MIB, ((0, 1), (8, 8), (40, 8)))
    task = {"uri": hypervisor.uri, "pool": far, "source_path": pool / "base.raw", "name": "web"}
    made = harness.pools[far] / "web"
    # By its time limit: nothing is left.
    result = module({**task, "bwlimit": "1MiB", "timeout": 3})
    assert result["error_code"] == "TIMEOUT" and not made.exists(), result
    # By a kill: a volume that is no clone yet, and that the next run makes anew.
    process = start({**task, "bwlimit": "1MiB"})
    harness.wait_until(lambda: made.exists() and made.stat().st_size > MIB, 60)
    kill(process)
    assert made.read_bytes().startswith(b"virtforge.libvirt: this volume is not finished\n")
    hypervisor.virsh("pool-refresh", far)
    assert "not finished" in module({"uri": task["uri"], "pool": far, "source": "web", "name": "x"})["msg"]
    assert check(**task)["actions"] == ["created"]
    assert clone(**task)["actions"] == ["created"] and same_content(pool / "base.raw", "raw", made, "raw")
    # One of another host may still go on.
    data = bytearray(made.read_bytes())
    data[:4096] = b"virtforge.libvirt: this volume is not finished\nanother host\n".ljust(4096, b"\0")
    made.write_bytes(data)
    assert "another host" in refused("IN_USE", **task)
    assert clone(BLANK, **{key: task[key] for key in ("uri", "pool", "name")}, state="absent")["actions"] == ["deleted"]


# --- volumes without a source, and pools ----------------------------------------------------------------------------------


def test_a_blank_volume_grown_and_wiped(hypervisor, far):
    task = {"uri": hypervisor.uri, "pool": far, "name": "web"}
    stated = {"capacity": "10MiB", "format": "qcow2", "owner": "7", "mode": "0640", "qcow2": {"cluster_size": "4KiB"}}
    made = harness.pools[far] / "web"
    volume = settle(BLANK, **task, **stated)["volume"]
    assert (volume["format"], volume["capacity"], volume["owner"], volume["mode"]) == ("qcow2", 10 * MIB, "7", "0640")
    assert info(made, "qcow2")["cluster-size"] == 4096 and made.stat().st_uid == 7
    assert settle(BLANK, **task, capacity="20MiB")["actions"] == ["grown"]
    assert module({**task, "capacity": "5MiB"}, module=BLANK)["error_code"] == "DIFFERS"
    gone = {**task, "name": "gone", "state": "absent", "wipe": True}
    assert "trim" in module({**gone, "wipe_algorithm": "trim"}, module=BLANK)["msg"]
    make_raw(made.parent / "gone", MIB, ((0, 1),), unit=4096)
    hypervisor.virsh("pool-refresh", far)
    predicted, result = check(BLANK, **gone), clone(BLANK, **gone)
    assert predicted["actions"] == result["actions"] == ["wiped", "deleted"] and not (made.parent / "gone").exists()
    assert "overwrites none" in str(harness.warnings(result))
    assert clone(BLANK, **gone)["changed"] is False


def test_what_is_told_of_volumes(there, hypervisor):
    task, place = there
    clone(**task, source="base.qcow2", name="top", clone_type="linked")
    (place / "sub").mkdir()
    hypervisor.virsh("pool-refresh", task["pool"])
    volumes = {volume["name"]: volume for volume in module(task, module="storage_volume_info")["volumes"]}
    assert list(volumes) == ["base.qcow2", "base.raw", "top"]
    base, top = volumes["base.qcow2"], volumes["top"]
    assert (base["format"], base["capacity"], base["owner"], base["mode"]) == ("qcow2", 64 * MIB, "64055", "0640")
    assert base["allocation"] == allocated(place / "base.qcow2") and base["physical"] == (place / "base.qcow2").stat().st_size
    assert base["dependents"] == ["top"] and base["in_use_by"] == []
    assert top["backing"] == {"path": base["path"], "format": "qcow2", "depth": 1}
    assert top["backing_chain"] == [{"path": base["path"], "format": "qcow2"}]
    assert module({**task, "name": "sub"}, module="storage_volume_info")["volumes"] == []
    assert "a directory" in module({**task, "name": "sub", "state": "absent"}, module=BLANK)["msg"]
    result = module({**task, "name": "base.qcow2", "state": "absent"}, module=BLANK)
    assert result["error_code"] == "OPERATION_INVALID" and "top" in result["msg"]


def test_the_disk_of_a_running_domain(there, hypervisor, scratch):
    task, _place = there
    document = scratch / "far-guest.xml"
    document.write_text(DOMAIN.format(name="far-guest", path=f"/srv/{task['pool']}/base.raw", format="raw"))
    hypervisor.virsh("create", document, "--paused")
    try:
        assert "domain 'far-guest'" in module({**task, "source": "base.raw", "name": "web"})["msg"]
        (found,) = module({**task, "name": "base.raw"}, module="storage_volume_info")["volumes"]
        assert found["in_use_by"] == ["domain 'far-guest'"]
        for stated in ({"state": "absent"}, {"capacity": "100MiB"}):
            assert module({**task, "name": "base.raw", **stated}, module=BLANK)["error_code"] == "IN_USE"
    finally:
        hypervisor.virsh("destroy", "far-guest")


def test_a_pool(hypervisor):
    task = {"uri": hypervisor.uri, "name": "farther"}
    place = hypervisor.srv / "new" / "farther"
    stated = {"type": "dir", "target_path": "/srv/new/farther", "autostart": True}
    result = settle(POOL, **task, **stated)
    assert result["actions"] == ["defined", "started", "autostart"] and place.is_dir()
    pool = result["pool"]
    assert (pool["state"], pool["path"], pool["persistent"]) == ("active", "/srv/new/farther", True)
    assert pool["capabilities"]["formats"] and "vhdx" not in pool["capabilities"]["formats"]
    assert module(task, module="storage_pool_info")["pools"] == [pool]
    assert "<permissions>" in module({**task, "mode": "0700"}, module=POOL)["msg"]
    clone(BLANK, uri=hypervisor.uri, pool="farther", name="web", capacity="1MiB")
    assert settle(POOL, **task, state="inactive")["actions"] == ["stopped"]
    assert settle(POOL, **task, type="dir", target_path="/srv/other")["actions"] == ["redefined", "started"]
    assert settle(POOL, **task, state="absent")["actions"] == ["stopped", "undefined"]
    assert (place / "web").exists()


def test_a_file_system_is_made_on_an_empty_device_only(hypervisor, device):
    path = device(64 * MIB)
    stated = {"type": "fs", "target_path": "/srv/disk", "build": True, "pool_source": {"devices": [path], "format": "ext4"}}
    task = {"uri": hypervisor.uri, "name": "disk"}
    assert settle(POOL, **task, **stated)["actions"] == ["defined", "built", "started"]
    assert clone(POOL, **task, state="inactive")["changed"]
    assert settle(POOL, **task, **stated)["actions"] == ["started"]
    assert settle(POOL, **task, state="absent")["actions"] == ["stopped", "undefined"]
    result = module({**task, **stated}, module=POOL)
    assert result.get("failed") and "disk" not in hypervisor.virsh("pool-list", "--all", "--name"), result
