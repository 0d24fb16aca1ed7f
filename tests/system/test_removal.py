# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""storage_volume, absent: what is deleted and what is not, wiping, kills, and several runs at once."""

from __future__ import annotations

import os
import socket
import subprocess
import time

import harness
import pytest
from conftest import make_pool, remove_pool
from harness import MIB, clone, fingerprint, held, module, refused, result_of, run, settle, start, virsh, warnings

VOLUME = "storage_volume"
ABSENT = {"state": "absent"}
USER = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--bounding-set=-all"]
SECRET = b"what nobody shall read any more "
SCRUB = ("nnsa", "dod", "bsi", "gutmann", "schneier", "pfitzner7", "pfitzner33", "random")


def overlay(path, backing, backing_format="qcow2"):
    run("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", backing_format, path, "64M")


def test_a_volume_is_deleted_and_nothing_else(either, pool, qcow2):
    clone(pool=either, source="base.qcow2", name="web", mode="0640")
    others = [fingerprint(pool / name) for name in ("base.qcow2", "base.raw")]
    described = clone("storage_volume_info", pool=either, name="web")["volumes"][0]
    result = settle(VOLUME, pool=either, name="web", **ABSENT)
    assert (result["changed"], result["actions"]) == (True, ["deleted"])
    assert result["volume"] == {key: value for key, value in described.items() if key not in ("dependents", "in_use_by")}
    before = result["diff"]["before"]
    assert (before["name"], before["pool"], before["format"], before["capacity"]) == ("web", either, "qcow2", 64 * MIB)
    assert (before["owner"], before["mode"], result["diff"]["after"]) == ("root", "0640", {})
    assert not warnings(result)
    assert sorted(os.listdir(pool)) == ["base.qcow2", "base.raw"]
    assert others == [fingerprint(pool / name) for name in ("base.qcow2", "base.raw")]
    if either != str(pool):
        assert "web" not in virsh("vol-list", either)


def test_none_of_that_name_is_no_change(either, pool, raw):
    result = settle(VOLUME, pool=either, name="web", **ABSENT)
    assert (result["changed"], result["actions"], result["volume"]) == (False, [], None)
    assert result["diff"] == {"before": {}, "after": {}}
    # Wiping what is not there needs no program.
    assert not settle(VOLUME, pool=either, name="web", wipe=True, wipe_algorithm="dod", **ABSENT)["changed"]


def test_a_pool_that_does_not_exist_holds_no_volume(libvirtd):
    for pool in ("nothing", "/nowhere/at/all"):
        for mode in (True, False):
            result = module({"pool": pool, "name": "web", **ABSENT}, check=mode, module=VOLUME)
            assert not result.get("failed") and not result["changed"], result


def test_a_pool_that_is_not_active_cannot_be_told_of(libvirt_pool, pool, raw):
    virsh("pool-destroy", libvirt_pool)
    result = module({"pool": libvirt_pool, "name": "base.raw", **ABSENT}, module=VOLUME)
    assert (result["failed"], result["error_code"]) == (True, "OPERATION_INVALID")
    assert libvirt_pool in result["msg"] and "active" in result["msg"]
    result = module({"pool": libvirt_pool, "name": "base.raw", **ABSENT}, check=True, module=VOLUME)
    assert not result["changed"]
    (warning,) = warnings(result)
    assert "not active" in warning and "fails unless an earlier task starts the pool" in warning
    assert raw.exists()


def test_libvirt_forgets_what_somebody_else_deleted(libvirt_pool, pool, raw):
    virsh("pool-refresh", libvirt_pool)
    raw.unlink()
    assert "base.raw" in virsh("vol-list", libvirt_pool)
    assert not settle(VOLUME, pool=libvirt_pool, name="base.raw", **ABSENT)["changed"]
    assert "base.raw" not in virsh("vol-list", libvirt_pool)


@pytest.mark.parametrize("kind", ["a directory", "a symbolic link", "a socket", "a named pipe", "a character device"])
def test_what_is_no_volume_is_never_deleted(either, pool, raw, kind):
    path = pool / "web"
    if kind == "a directory":
        path.mkdir()
    elif kind == "a symbolic link":
        path.symlink_to("base.raw")
    elif kind == "a socket":
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.close()
    elif kind == "a named pipe":
        os.mkfifo(path)
    else:
        run("mknod", path, "c", "1", "3")
    before = os.lstat(path)
    for stated in ({}, {"force": True}, {"force": True, "wipe": True}):
        message = refused("OPERATION_INVALID", VOLUME, pool=either, name="web", **ABSENT, **stated)
        assert kind in message and "'web'" in message
    assert os.path.samestat(before, os.lstat(path)) and raw.exists()


@pytest.mark.parametrize(
    "code, stated, words",
    [
        ("INVALID_ARG", {"name": "../web"}, ["name", "../web"]),
        ("INVALID_ARG", {"name": ".virtforge-0123456789abcdef.tmp"}, ["name", "reserved"]),
        ("INVALID_ARG", {"pool": "a/b"}, ["pool", "a/b"]),
        ("INVALID_ARG", {"pool": "/etc/hostname"}, ["/etc/hostname", "directory"]),
        ("INVALID_ARG", {"wipe_algorithm": "dod"}, ["wipe_algorithm", "dod", "wipe"]),
        ("INVALID_ARG", {"wipe": True, "wipe_algorithm": "magic"}, ["wipe_algorithm", "magic"]),
        ("INVALID_ARG", {"timeout": -1}, ["timeout", "-1"]),
        ("INVALID_ARG", {"lock_timeout": -1}, ["lock_timeout", "-1"]),
    ],
)
def test_bad_input(pool, raw, code, stated, words):
    message = refused(code, VOLUME, **{"pool": str(pool), "name": "base.raw", **ABSENT, **stated})
    assert all(word in message for word in words), message


# --- dependents -----------------------------------------------------------------------------------------------------------


def test_a_volume_that_others_depend_on_is_kept(either, pool, qcow2):
    overlay(pool / "web", qcow2)
    overlay(pool / "web2", "web")
    message = refused("OPERATION_INVALID", VOLUME, pool=either, name="base.qcow2", **ABSENT)
    assert "2 volumes depend on it: web, web2;" in message and "force" in message
    assert "web2" in refused("OPERATION_INVALID", VOLUME, pool=either, name="web", **ABSENT)
    # From the top down nothing depends.
    for name in ("web2", "web", "base.qcow2"):
        assert settle(VOLUME, pool=either, name=name, **ABSENT)["changed"]


@pytest.mark.parametrize("stated", [{}, {"wipe": True}])
def test_force_deletes_what_others_depend_on(either, pool, qcow2, stated):
    for number in range(5):
        overlay(pool / f"web{number}", qcow2)
    result = settle(VOLUME, pool=either, name="base.qcow2", force=True, **ABSENT, **stated)
    assert result["actions"][-1] == "deleted"
    (warning,) = warnings(result)
    assert "5 volumes depend on it: web0, web1, web2 and 2 more" in warning
    assert len(os.listdir(pool)) == 6


def test_a_dependent_in_another_pool_of_libvirt(libvirt_pool, libvirt_pool2, pool, pool2, qcow2):
    overlay(pool2 / "web", qcow2)
    message = refused("OPERATION_INVALID", VOLUME, pool=libvirt_pool, name="base.qcow2", **ABSENT)
    assert str(pool2 / "web") in message
    (pool2 / "web").unlink()
    assert settle(VOLUME, pool=libvirt_pool, name="base.qcow2", **ABSENT)["changed"]


def test_where_an_image_keeps_its_data_is_kept(either, pool, pool2):
    """A data file of a qcow2 image, and the extent of a vmdk."""
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={pool / 'data'},data_file_raw=on", pool / "web", "1M")
    run("qemu-img", "create", "-q", "-f", "vmdk", "-o", "subformat=monolithicFlat", pool / "parts.vmdk", "1M")
    for name, above in (("data", "web"), ("parts-flat.vmdk", "parts.vmdk")):
        message = refused("OPERATION_INVALID", VOLUME, pool=either, name=name, **ABSENT)
        assert f"1 volume depends on it: {above};" in message
        assert clone("storage_volume_info", pool=either, name=name)["volumes"][0]["dependents"] == [above]
        for last in (above, name):
            assert settle(VOLUME, pool=either, name=last, **ABSENT)["changed"]


def test_a_dependent_in_a_pool_that_is_not_active(libvirt_pool, libvirt_pool2, pool, pool2, qcow2):
    overlay(pool2 / "web", qcow2)
    virsh("pool-destroy", libvirt_pool2)
    message = refused("OPERATION_INVALID", VOLUME, pool=libvirt_pool, name="base.qcow2", **ABSENT)
    assert str(pool2 / "web") in message


def test_a_pool_whose_file_system_is_not_mounted_is_warned_of(libvirt_pool, pool, qcow2, scratch, small_file_system):
    place = scratch / "unmounted"
    place.mkdir()
    virsh("pool-define-as", "unmounted", "fs", "--source-dev", "/dev/nowhere", "--target", place)
    try:
        (warning,) = warnings(settle(VOLUME, pool=libvirt_pool, name="base.raw", **ABSENT))
        assert "'base.raw'" in warning and "pool 'unmounted'" in warning
        # Mounted by somebody else than libvirt.
        run("mount", "--bind", small_file_system("ext4", 24 * MIB), place)
        overlay(place / "web", qcow2)
        assert str(place / "web") in refused("OPERATION_INVALID", VOLUME, pool=libvirt_pool, name="base.qcow2", **ABSENT)
    finally:
        subprocess.run(["umount", str(place)], check=False)
        remove_pool("unmounted")


def test_what_cannot_be_read_may_depend_on_it(either, pool, qcow2):
    (pool / "cut").write_bytes(qcow2.read_bytes()[:70])
    message = refused("OPERATION_INVALID", VOLUME, pool=either, name="base.raw", **ABSENT)
    assert "'base.raw'" in message and "cannot be told of cut;" in message and "force" in message
    (warning,) = warnings(settle(VOLUME, pool=either, name="base.raw", force=True, **ABSENT))
    assert "'base.raw'" in warning and "cannot be told of cut" in warning
    # It can itself be deleted.
    assert settle(VOLUME, pool=either, name="cut", **ABSENT)["volume"]["error_code"] == "CORRUPT_IMAGE"


def test_a_pool_that_cannot_be_looked_into_is_warned_of(libvirt_pool, pool, raw, scratch):
    place = scratch / "gone"
    place.mkdir()
    make_pool("gone", place)
    place.rmdir()
    try:
        (warning,) = warnings(settle(VOLUME, pool=libvirt_pool, name="base.raw", **ABSENT))
    finally:
        remove_pool("gone")
    assert "'base.raw'" in warning and "pool 'gone'" in warning


def test_a_connection_that_has_no_domains(libvirt_pool, pool, raw):
    assert settle(VOLUME, uri="storage:///system", pool=libvirt_pool, name="base.raw", **ABSENT)["changed"]


# --- in use ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stated", [{}, {"force": True}, {"force": True, "wipe": True}])
def test_a_volume_that_a_process_has_open_is_kept(either, pool, raw, stated):
    before = fingerprint(raw)
    for writable in (True, False):
        with held(raw, writable=writable) as process:
            message = refused("IN_USE", VOLUME, pool=either, name="base.raw", **ABSENT, **stated)
            assert f"qemu-io (pid {process.pid})" in message
    assert fingerprint(raw) == before


def test_a_volume_behind_a_loop_device_is_kept(pool, raw):
    """No process has it open."""
    device = run("losetup", "-f", "--show", raw).strip()
    try:
        refused("IN_USE", VOLUME, pool=pool, name="base.raw", force=True, **ABSENT)
    finally:
        run("losetup", "-d", device)
    assert settle(VOLUME, pool=pool, name="base.raw", **ABSENT)["changed"]


def test_the_disk_of_a_running_domain_is_kept(libvirt_pool, pool, qcow2, domain):
    overlay(pool / "web", qcow2)
    domain(pool / "web", "qcow2")
    for place in (libvirt_pool, pool):
        for name in ("web", "base.qcow2"):
            refused("IN_USE", VOLUME, pool=place, name=name, force=True, **ABSENT)
    assert (pool / "web").exists() and qcow2.exists()


def test_somebody_who_lets_go_within_a_moment_is_no_matter(pool, raw):
    with held(raw) as process:
        removing = start({"pool": pool, "name": "base.raw", **ABSENT}, module=VOLUME)
        harness.wait_until(lambda: harness.opened_by(removing, raw), 20)
        time.sleep(0.2)
        process.kill()
        assert result_of(removing)["actions"] == ["deleted"]


# --- permissions ----------------------------------------------------------------------------------------------------------


def test_without_permission(pool, raw):
    """What a user may not write to, may not open, or may not delete among others' files."""
    raw.chmod(0o644)

    def denied(**stated):
        for mode in (True, False):
            result = module({"pool": pool, "name": "base.raw", **ABSENT, **stated}, check=mode, module=VOLUME, prefix=USER)
            assert result["failed"] and result["error_code"] == "OPERATION_DENIED", result
            assert "become" in result["msg"] and raw.exists()
        return result["msg"]

    for mode, word in ((0o755, "write to"), (0o711, "write to"), (0o733, "write to"), (0o1777, "only their own")):
        pool.chmod(mode)
        assert word in denied()
    pool.chmod(0o777)
    assert "write to 'base.raw'" in denied(wipe=True)
    raw.chmod(0o600)
    assert "open 'base.raw'" in denied()
    raw.chmod(0o644)
    # A volume that is not there needs no permission.
    pool.chmod(0o755)
    assert module({"pool": pool, "name": "web", **ABSENT}, module=VOLUME, prefix=USER)["actions"] == []
    pool.chmod(0o777)
    result = module({"pool": pool, "name": "base.raw", **ABSENT}, module=VOLUME, prefix=USER)
    assert result["actions"] == ["deleted"], result
    pool.chmod(0o755)


def test_a_read_only_connection_is_refused(libvirt_pool, pool, raw):
    uri = "qemu+unix:///system?socket=/run/libvirt/libvirt-sock-ro"
    message = refused("OPERATION_DENIED", VOLUME, uri=uri, pool=libvirt_pool, name="base.raw", **ABSENT)
    assert libvirt_pool in message
    assert not settle(VOLUME, uri=uri, pool=libvirt_pool, name="web", **ABSENT)["changed"]


def test_a_read_only_file_system(small_file_system):
    small = small_file_system("ext4", 24 * MIB)
    harness.make_raw(small / "base.raw", MIB, pieces=())
    run("mount", "-o", "remount,ro", small)
    result = module({"pool": small, "name": "base.raw", **ABSENT}, module=VOLUME)
    assert result["failed"] and result["error_code"] == "OPERATION_DENIED", result


def test_a_file_that_may_not_be_changed(pool, raw):
    """chattr +i: only trying tells."""
    run("chattr", "+i", raw)
    try:
        for stated in ({}, {"wipe": True}):
            result = module({"pool": pool, "name": "base.raw", **ABSENT, **stated}, module=VOLUME)
            assert result["failed"] and result["error_code"] == "OPERATION_DENIED", result
    finally:
        run("chattr", "-i", raw)
    assert raw.exists()


# --- wiping ---------------------------------------------------------------------------------------------------------------


def write_secret(path, length=MIB):
    path.write_bytes(SECRET * (length // len(SECRET)))
    run("sync", "-f", path)


def secrets_on(disk, place):
    """How often the secret is on the disk under a file system."""
    run("sync", "-f", place)
    return disk.read_bytes().count(SECRET)


def disk_under(place, scratch):
    return scratch / f"{place.name}.img"


@pytest.mark.parametrize(
    "kind, size, algorithms", [("ext4", 64 * MIB, ("zero", *SCRUB)), ("xfs", 300 * MIB, ("zero", "random"))]
)
def test_nothing_of_a_wiped_volume_is_left_on_the_disk(small_file_system, scratch, kind, size, algorithms):
    place = small_file_system(kind, size)
    disk = disk_under(place, scratch)
    for stated in ({}, *({"wipe_algorithm": algorithm} for algorithm in algorithms)):
        write_secret(place / "web")
        assert secrets_on(disk, place) >= 30000
        result = clone(VOLUME, pool=place, name="web", wipe=True, **stated, **ABSENT)
        assert result["actions"] == ["wiped", "deleted"] and not warnings(result)
        assert secrets_on(disk, place) == 0, stated
    # Without wiping all of it would be.
    write_secret(place / "web")
    settle(VOLUME, pool=place, name="web", **ABSENT)
    assert secrets_on(disk, place) >= 30000


def test_blocks_that_read_as_zeros_but_hold_old_data_are_wiped(small_file_system, scratch):
    """A guest that writes zeros turns blocks into unwritten ones, which keep their bytes on ext4; XFS takes new ones."""
    place = small_file_system("ext4", 64 * MIB)
    write_secret(place / "web")
    run("fallocate", "--zero-range", "--offset", 64 * 1024, "--length", 512 * 1024, place / "web")
    assert secrets_on(disk_under(place, scratch), place) >= 30000
    assert (place / "web").read_bytes().count(SECRET) < 20000
    settle(VOLUME, pool=place, name="web", wipe=True, **ABSENT)
    assert secrets_on(disk_under(place, scratch), place) == 0


def test_wiping_takes_no_more_time_and_space_than_the_data(pool):
    """16 TiB with 3 MiB of data."""
    harness.make_raw(pool / "web", 16 << 40)
    began = time.monotonic()
    assert settle(VOLUME, pool=pool, name="web", wipe=True, **ABSENT)["changed"]
    assert time.monotonic() - began < 10


def test_wiping_by_patterns_does_not_fill_the_pool(small_file_system):
    """scrub writes over holes too."""
    place = small_file_system("ext4", 64 * MIB)
    harness.make_raw(place / "web", 1 << 30)
    message = refused("NO_SPACE", VOLUME, pool=place, name="web", wipe=True, wipe_algorithm="random", **ABSENT)
    assert "random" in message and "bytes" in message
    assert settle(VOLUME, pool=place, name="web", wipe=True, **ABSENT)["changed"]


@pytest.mark.parametrize("kind, size", [("ext4", 64 * MIB), ("xfs", 300 * MIB)])
def test_trimming_gives_the_blocks_back_before_the_volume_is_deleted(small_file_system, scratch, kind, size):
    place = small_file_system(kind, size)
    write_secret(place / "web")
    log = scratch / "strace.log"
    trace = ["strace", "-qq", "-f", "-o", str(log), "-e", "trace=fallocate,unlinkat,fsync"]
    params = {"pool": place, "name": "web", "wipe": True, "wipe_algorithm": "trim", **ABSENT}
    assert module(params, check=True, module=VOLUME)["actions"] == ["wiped", "deleted"]
    assert module(params, module=VOLUME, prefix=trace)["actions"] == ["wiped", "deleted"]
    calls = [line.split(None, 1)[1] for line in log.read_text().splitlines()]
    first = next(index for index, call in enumerate(calls) if call.startswith("fallocate"))
    assert "FALLOC_FL_PUNCH_HOLE" in calls[first] and calls[first].endswith(f" 0, {MIB}) = 0")
    assert [call.split("(")[0] for call in calls[first + 1 : first + 4]] == ["fsync", "unlinkat", "fsync"]


def test_trimming_where_that_is_impossible(scratch):
    place = scratch / "ramfs"
    place.mkdir()
    run("mount", "-t", "ramfs", "none", place)
    try:
        write_secret(place / "web")
        params = {"pool": place, "name": "web", "wipe": True, **ABSENT}
        result = module({**params, "wipe_algorithm": "trim"}, module=VOLUME)
        assert result["failed"] and result["error_code"] == "NO_SUPPORT", result
        assert "trim" in result["msg"] and (place / "web").exists()
        assert settle(VOLUME, **params)["changed"]
    finally:
        run("umount", place)


def test_blocks_that_stay_on_the_disk_are_warned_of(pool, raw, file_systems):
    run("cp", "--reflink=always", raw, pool / "web")
    (warning,) = warnings(settle(VOLUME, pool=pool, name="web", wipe=True, **ABSENT))
    assert "share" in warning
    assert not warnings(settle(VOLUME, pool=pool, name="base.raw", wipe=True, **ABSENT))
    place = file_systems["btrfs"]
    write_secret(place / "web")
    (warning,) = warnings(settle(VOLUME, pool=place, name="web", wipe=True, **ABSENT))
    assert "instead of overwriting" in warning


def test_a_file_with_another_name_is_not_wiped(pool, pool2, raw):
    os.link(raw, pool2 / "kept")
    before = harness.data_of(raw)
    message = refused("OPERATION_INVALID", VOLUME, pool=pool, name="base.raw", wipe=True, force=True, **ABSENT)
    assert "1 more name" in message
    assert settle(VOLUME, pool=pool, name="base.raw", **ABSENT)["actions"] == ["deleted"]
    assert harness.data_of(pool2 / "kept") == before


def test_a_missing_scrub(pool, raw):
    hide = ["unshare", "--mount", "sh", "-c", 'mount --bind /dev/null /usr/bin/scrub && exec "$@"', "sh"]
    params = {"pool": pool, "name": "base.raw", "wipe": True, "wipe_algorithm": "dod", **ABSENT}
    for mode in (True, False):
        result = module(params, check=mode, module=VOLUME, prefix=hide)
        assert result["failed"] and result["error_code"] == "MISSING_DEPENDENCY", result
        assert "scrub" in result["msg"] and "dod" in result["msg"]
    assert raw.exists()
    # What is there already as declared needs none.
    assert module({**params, "name": "web"}, module=VOLUME, prefix=hide)["actions"] == []


@pytest.mark.parametrize("algorithm", ["zero", "random"])
def test_a_timeout_ends_the_wiping(pool, algorithm):
    harness.make_raw(pool / "web", 64 * MIB, pieces=((0, 64),))
    slow = ["strace", "-qq", "-f", "-o", "/dev/null", "-e", "trace=pwrite64,write", "-P", str(pool / "web")]
    slow += ["-e", "inject=pwrite64,write:delay_enter=200000"]
    params = {"pool": pool, "name": "web", "wipe": True, "wipe_algorithm": algorithm, **ABSENT}
    result = result_of(start({**params, "timeout": 2}, prefix=slow, module=VOLUME))
    assert result["failed"] and result["error_code"] == "TIMEOUT", result
    assert "wiping" in result["msg"] and "2 s" in result["msg"]
    assert not harness.processes_with("scrub -f")
    assert clone(VOLUME, **params)["actions"] == ["wiped", "deleted"]


@pytest.mark.parametrize("error", ["EIO", "ENOSPC"])
@pytest.mark.parametrize("call", ["pwrite64", "fsync", "unlinkat"])
def test_a_failed_system_call_is_a_clear_failure(pool, raw, scratch, call, error):
    log = scratch / "strace.log"
    inject = ["strace", "-qq", "-o", str(log), "-e", f"trace={call}", "-e", f"inject={call}:error={error}:when=1+"]
    params = {"pool": pool, "name": "base.raw", "wipe": True, **ABSENT}
    result = result_of(start(params, prefix=inject, module=VOLUME))
    assert "INJECTED" in log.read_text()
    assert result["failed"] and result["error_code"] == ("IO_ERROR" if error == "EIO" else "NO_SPACE"), result
    assert "base.raw" in result["msg"] and raw.exists()
    assert clone(VOLUME, **params)["actions"] == ["wiped", "deleted"]


# --- kills, and several at once -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call, number", [("pwrite64", 1), ("pwrite64", 20), ("fsync", 1)])
def test_killed_while_it_wipes_the_next_run_does_it_all(libvirt_pool, pool, call, number):
    harness.make_raw(pool / "web", 32 * MIB, pieces=((0, 32),))
    params = {"pool": libvirt_pool, "name": "web", "wipe": True, **ABSENT}
    inject = ["strace", "-qq", "-o", "/dev/null", "-e", f"trace={call}", "-e", f"inject={call}:signal=KILL:when={number}"]
    process = start(params, prefix=inject, module=VOLUME)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert (pool / "web").stat().st_size == 32 * MIB
    assert clone(VOLUME, **params)["actions"] == ["wiped", "deleted"]
    assert os.listdir(pool) == []


def test_killed_while_scrub_runs_the_next_run_does_it_all(libvirt_pool, pool):
    params = {"pool": libvirt_pool, "name": "web", "wipe": True, "wipe_algorithm": "bsi", **ABSENT}
    for _time in range(3):
        harness.make_raw(pool / "web", 64 * MIB, pieces=((0, 64),))
        process = start(params, module=VOLUME)
        harness.wait_until(lambda: harness.processes_with("scrub -f"), 30)
        time.sleep(0.05)
        # The module alone is killed; scrub dies with it.
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()
        harness.wait_until(lambda: not harness.processes_with("scrub -f"), 5)
        assert (pool / "web").exists()
        assert clone(VOLUME, **params)["actions"] == ["wiped", "deleted"]
        assert os.listdir(pool) == []


@pytest.mark.parametrize("call", ["unlinkat", "fsync"])
def test_killed_at_the_end_the_next_run_finds_it_there_or_gone(libvirt_pool, pool, raw, call):
    virsh("pool-refresh", libvirt_pool)
    params = {"pool": libvirt_pool, "name": "base.raw", **ABSENT}
    inject = ["strace", "-qq", "-o", "/dev/null", "-e", f"trace={call}", "-e", f"inject={call}:signal=KILL"]
    process = start(params, prefix=inject, module=VOLUME)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert "base.raw" in virsh("vol-list", libvirt_pool)
    there = raw.exists()
    assert clone(VOLUME, **params)["changed"] == there
    assert not raw.exists() and "base.raw" not in virsh("vol-list", libvirt_pool)


@pytest.mark.parametrize("stated", [{}, {"wipe": True}])
def test_several_at_once_delete_it_once(either, pool, stated):
    for _time in range(6):
        harness.make_raw(pool / "web", 64 * MIB, pieces=((0, 32),))
        runs = [start({"pool": either, "name": "web", **ABSENT, **stated}, module=VOLUME) for _number in range(4)]
        results = [result_of(process) for process in runs]
        assert not any(result.get("failed") for result in results), results
        assert sorted(result["changed"] for result in results) == [False, False, False, True]
        assert os.listdir(pool) == []


def test_another_run_is_waited_for_no_longer_than_stated(pool):
    harness.make_raw(pool / "web", 24 * MIB, pieces=((0, 24),))
    slow = ["strace", "-qq", "-o", "/dev/null", "-e", "trace=pwrite64", "-e", "inject=pwrite64:delay_enter=300000"]
    params = {"pool": pool, "name": "web", "wipe": True, **ABSENT}
    first = start(params, prefix=slow, module=VOLUME)
    harness.wait_until(lambda: (pool / "web").open("rb").read(4096) == bytes(4096), 30)
    result = module({**params, "lock_timeout": 1}, module=VOLUME)
    assert result["failed"] and result["error_code"] == "TIMEOUT", result
    assert "lock_timeout" in result["msg"] and "web" in result["msg"]
    assert result_of(first)["actions"] == ["wiped", "deleted"]


def test_another_file_that_has_got_the_name_is_kept(pool, raw):
    """Renamed over the volume while that is wiped."""
    harness.make_raw(pool / "web", 16 * MIB, pieces=((0, 16),))
    slow = ["strace", "-qq", "-o", "/dev/null", "-e", "trace=pwrite64", "-e", "inject=pwrite64:delay_enter=200000"]
    process = start({"pool": pool, "name": "web", "wipe": True, **ABSENT}, prefix=slow, module=VOLUME)
    harness.wait_until(lambda: (pool / "web").read_bytes()[:MIB].count(0) == MIB, 30)
    content = harness.data_of(raw)
    os.rename(raw, pool / "web")
    result = result_of(process)
    assert result["failed"] and result["error_code"] == "IN_USE", result
    assert "another file" in result["msg"]
    assert harness.data_of(pool / "web") == content


def test_a_busy_pool_is_waited_for(libvirt_pool, pool, raw):
    """libvirt refuses to look at the pool while it clones by itself; that reads every hole."""
    with open(pool / "slow.raw", "wb") as file:
        file.truncate(9 << 30)
    virsh("pool-refresh", libvirt_pool)
    with subprocess.Popen(["virsh", "-q", "vol-clone", "slow.raw", "slow2.raw", "--pool", libvirt_pool]) as slow:
        harness.wait_until(lambda: harness.virsh_status("pool-refresh", libvirt_pool) != 0)
        # By a check run, which waits for nobody: any other gives libvirt a moment to be done, and then deletes it.
        result = module({"pool": libvirt_pool, "name": "slow.raw", **ABSENT}, check=True, module=VOLUME)
        assert result["failed"] and result["error_code"] == "IN_USE", result
        result = clone(VOLUME, pool=libvirt_pool, name="base.raw", **ABSENT)
        assert result["actions"] == ["deleted"]
        assert slow.wait() == 0
    assert "base.raw" not in virsh("vol-list", libvirt_pool)
