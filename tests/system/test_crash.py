# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Killed at any moment, out of space, interrupted system calls: the target is absent or complete, and nothing else is left."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time

import harness
import pytest
from harness import MIB, clone, fingerprint, kill, leftovers, processes_with, result_of, run, same_content, start

KILLS = 200


@pytest.fixture(scope="module")
def sources(file_systems):
    """The same 96 MiB of data as raw and qcow2, on ext4, so that nothing can be shared with it."""
    place = file_systems["ext4"] / "crash"
    place.mkdir()
    harness.make_raw(place / "base.raw", 512 * MIB, pieces=((0, 32), (100, 32), (400, 32)))
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", place / "base.raw", place / "base.qcow2")
    yield place
    shutil.rmtree(place)


@pytest.mark.parametrize("kind", ["directory", "libvirt"])
def test_two_hundred_kills_over_copies_and_conversions(request, sources, pool, kind):
    """Half of them in each kind of pool; the process alone is killed, not the qemu-img that it started."""
    target = str(pool) if kind == "directory" else request.getfixturevalue("libvirt_pool")
    jobs = [
        ({"source": "base.raw", "name": "copy.raw"}, "raw"),
        ({"source": "base.raw", "name": "converted.qcow2", "format": "qcow2"}, "qcow2"),
        ({"source": "base.qcow2", "name": "converted.raw", "format": "raw"}, "raw"),
        ({"source": "base.qcow2", "name": "larger.qcow2", "capacity": "1GiB"}, "qcow2"),
    ]
    before = [fingerprint(sources / name) for name in ("base.raw", "base.qcow2")]
    dice = random.Random(kind)
    absent = complete = 0
    for stated, image_format in jobs:
        params = {"pool": target, "source_pool": str(sources), **stated}
        path = pool / stated["name"]
        for _time in range(2):
            # The second is no longer slowed down by what the first reads from the disk.
            began = time.monotonic()
            clone(**params)
            whole = time.monotonic() - began
            path.unlink()
        for _time in range(KILLS // 2 // len(jobs)):
            process = start(params)
            time.sleep(dice.uniform(0, 1.1) * whole)
            process.kill()
            process.wait()
            process.stdout.close()
            process.stderr.close()
            if path.exists():
                complete += 1
                assert same_content(sources / "base.raw", "raw", path, image_format)
                path.unlink()
            else:
                absent += 1
            assert os.listdir(pool) == []
            # pdeathsig is sent at once; the process needs a moment to be gone.
            harness.wait_until(lambda: not processes_with("qemu-img convert"), 30)
        assert clone(**params)["actions"] == ["created"]
        assert same_content(sources / "base.raw", "raw", path, image_format)
        path.unlink()
    assert absent + complete == KILLS // 2
    # Kills that always come too early or too late would prove nothing.
    assert absent >= KILLS // 8 and complete >= 3, (absent, complete)
    assert before == [fingerprint(sources / name) for name in ("base.raw", "base.qcow2")]


def test_qemu_img_dies_with_the_module(sources, pool):
    """It is slowed down so that it would live on for half a minute."""
    slow = ["strace", "-qq", "-f", "-o", "/dev/null", "-e", "trace=pwrite64", "-e", "inject=pwrite64:delay_enter=500000"]
    process = start({"pool": pool, "source_pool": sources, "source": "base.raw", "name": "web", "format": "qcow2"}, prefix=slow)
    harness.wait_until(
        lambda: any(words.startswith("/usr/bin/qemu-img convert") for words in processes_with("qemu-img convert")), 30
    )
    (module,) = [
        pid for pid, words in harness.commands() if words.startswith(f"{harness.PYTHON} {harness.HERE / 'driver.py'} ")
    ]
    os.kill(module, signal.SIGKILL)
    harness.wait_until(lambda: not any(words.startswith("/usr/bin/qemu-img") for _pid, words in harness.commands()), 12)
    kill(process)
    assert os.listdir(pool) == []


def test_kills_while_a_volume_is_replaced_leave_the_old_or_the_new(sources, pool):
    dice = random.Random(3)
    params = {"pool": pool, "source_pool": sources, "source": "base.raw", "name": "web", "force": True, "compare": "content"}
    old = harness.make_raw(sources / "old.raw", 512 * MIB, pieces=((5, 3),))
    seen = set()
    clone(**{**params, "source": "old.raw"})
    spent = []
    for source in 2 * ("base.raw", "old.raw"):
        began = time.monotonic()
        assert clone(**{**params, "source": source})["actions"] == ["replaced"]
        spent.append(time.monotonic() - began)
    # The least: by one that had to wait for others, most of the kills would come too late.
    whole = min(spent)
    for _time in range(24):
        clone(**{**params, "source": "old.raw"})
        process = start(params)
        time.sleep(dice.uniform(0.05, 1.1) * whole)
        kill(process)
        is_old = same_content(old, "raw", pool / "web", "raw")
        assert is_old or same_content(sources / "base.raw", "raw", pool / "web", "raw")
        seen.add(is_old)
        # A replacement has a name for a moment; the next run sweeps what a kill left then.
        clone(**params)
        assert not leftovers(pool)
    assert True in seen


# Calls that the start of Python does not make, so that their first time is ours.
@pytest.mark.parametrize("call", ["linkat", "fsync", "ftruncate", "pwrite64", "fchown", "fchmod"])
def test_killed_at_a_system_call(sources, pool, call):
    params = {"pool": pool, "source_pool": sources, "source": "base.raw", "name": "web"}
    if call == "fchown":
        params["owner"] = "libvirt-qemu"
    hits = 0
    for number in (1, 2, 17):
        inject = ["-e", f"trace={call}", "-e", f"inject={call}:signal=KILL:when={number}"]
        process = start(params, prefix=["strace", "-qq", "-o", "/dev/null", *inject])
        process.communicate(timeout=120)
        hits += process.returncode != 0
        assert not leftovers(pool)
        if (pool / "web").exists():
            assert same_content(sources / "base.raw", "raw", pool / "web", "raw")
            (pool / "web").unlink()
        assert os.listdir(pool) == []
        assert clone(**params)["actions"] == ["created"]
        (pool / "web").unlink()
    assert hits


@pytest.mark.parametrize("error", ["EIO", "ENOSPC", "EDQUOT"])
@pytest.mark.parametrize("call", ["pwrite64", "fsync", "ftruncate", "linkat", "fchmod"])
def test_a_failed_system_call_is_a_clear_failure(sources, pool, scratch, call, error):
    params = {"pool": pool, "source_pool": sources, "source": "base.raw", "name": "web"}
    log = scratch / "strace.log"
    inject = ["-e", f"trace={call}", "-e", f"inject={call}:error={error}:when=1+"]
    result = result_of(start(params, prefix=["strace", "-qq", "-o", str(log), *inject]))
    assert "INJECTED" in log.read_text()
    assert result["failed"], result
    assert result["error_code"] == ("IO_ERROR" if error == "EIO" else "NO_SPACE"), result
    assert os.listdir(pool) == []
    assert clone(**params)["actions"] == ["created"]


def test_an_unreadable_source_is_never_taken_for_a_hole(sources, pool, scratch):
    """EIO of SEEK_DATA is no end of the data."""
    params = {"pool": pool, "source_pool": sources, "source": "base.raw", "name": "web"}
    for number in range(1, 7):
        log = scratch / "strace.log"
        inject = ["-P", str(sources / "base.raw"), "-e", "trace=lseek", "-e", f"inject=lseek:error=EIO:when={number}"]
        result = result_of(start(params, prefix=["strace", "-qq", "-o", str(log), *inject]))
        if "INJECTED" in log.read_text():
            assert result["failed"] and result["error_code"] == "IO_ERROR", result
            assert os.listdir(pool) == []
        else:
            (pool / "web").unlink()
            assert number > 2
            break


@pytest.mark.parametrize("kind, size", [("ext4", 24 * MIB), ("xfs", 300 * MIB), ("btrfs", 128 * MIB)])
@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_a_full_file_system(small_file_system, scratch, kind, size, image_format):
    """The image fits by what is known beforehand; the file system then fills up while it is written."""
    small = small_file_system(kind, size)
    source = harness.make_raw(scratch / "base.raw", 2 * size, pieces=((0, size // MIB // 3),))
    params = {"pool": small, "source_path": source, "name": "web", "format": image_format}
    names = sorted(os.listdir(small))
    free = os.statvfs(small).f_bfree
    # Another program takes the space once the copy has begun, and is slowed down a little.
    hog = small / "hog"
    slow = ["-e", "trace=pwrite64,ftruncate", "-e", "inject=pwrite64,ftruncate:delay_enter=700000:when=1..3"]
    process = start(params, prefix=["strace", "-qq", "-f", "-o", "/dev/null", *slow])
    harness.wait_until(lambda: harness.unnamed_files(small), 60)
    with open(hog, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, os.statvfs(small).f_bavail * os.statvfs(small).f_frsize - size // 5)
    result = result_of(process)
    assert result["failed"] and result["error_code"] == "NO_SPACE", result
    assert "bytes" in result["msg"] and result["msg"].startswith(("writing", "converting")), result["msg"]
    hog.unlink()
    assert sorted(os.listdir(small)) == names
    run("sync", "-f", small)
    slack = 8 * MIB // os.statvfs(small).f_frsize
    harness.wait_until(lambda: abs(os.statvfs(small).f_bfree - free) <= slack, 40)
    assert clone(**params)["actions"] == ["created"]
    assert same_content(source, "raw", small / "web", image_format)
    source.unlink()


@pytest.mark.parametrize("stated", [{}, {"format": "qcow2"}, {"format": "qcow2", "capacity": "1G"}])
def test_a_timeout_leaves_nothing(sources, pool, stated):
    """The copy, or qemu-img, is slowed down."""
    slow = ["strace", "-qq", "-f", "-o", "/dev/null", "-e", "trace=pwrite64", "-e", "inject=pwrite64:delay_enter=300000"]
    params = {"pool": pool, "source_pool": sources, "source": "base.raw", "name": "web", "timeout": 2, **stated}
    result = result_of(start(params, prefix=slow))
    assert result["failed"] and result["error_code"] == "TIMEOUT", result
    assert "2 s" in result["msg"] and "timeout" in result["msg"]
    assert os.listdir(pool) == []
    assert not processes_with("qemu-img convert")


def test_leftovers_of_a_killed_run_without_unnamed_files_are_swept(pool, raw):
    """Where a file system has no unnamed files, a run leaves a name of ours; nobody holds it, so the next run removes it."""
    stale = pool / ".virtforge-0123456789abcdef.tmp"
    stale.write_bytes(b"half")
    other = pool / ".virtforge-mine"
    other.write_bytes(b"not ours")
    clone(pool=pool, source="base.raw", name="web")
    assert not stale.exists()
    assert other.read_bytes() == b"not ours"
    other.unlink()
