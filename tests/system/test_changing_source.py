# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A source that changes while it is read ends the run with a clear failure, never in a clone that is neither old nor new."""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import harness
import pytest
from conftest import FILE_SYSTEMS, new_directory
from harness import MIB, module, noise, result_of, run, same_content, start, wait_until

SHARING = ("xfs", "btrfs")
SIZE = 32 * MIB
#: 12 MiB of data, of which the last comes last
PIECES = ((0, 4), (12, 4), (28, 4))
# Where bytes are moved, 12 MiB take 4 s. Where blocks are shared, system calls are slowed down: one fsync, and six calls of
# copy_file_range, which qemu-img makes all at once where it can.
LIMITED = {"method": "copy", "bwlimit": "3MiB"}
OTHER = {"raw": "qcow2", "qcow2": "raw"}


_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def slowed(call, seconds):
    delay = f"inject={call}:delay_enter={int(seconds * 1e6)}"
    return ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={call}", "-e", delay]


#: What the task states, how it is slowed down, and the file systems where it goes that way.
ROUTES = {
    "copied": (LIMITED, [], FILE_SYSTEMS),
    "converted": ({**LIMITED, "format": "other"}, [], FILE_SYSTEMS),
    "shared": ({"method": "reflink"}, slowed("fsync", 4), SHARING),
    "converted, sharing": ({"method": "reflink", "format": "other"}, slowed("copy_file_range", 1.3), SHARING),
    "many": ({**LIMITED, "volumes": [{"name": "web0"}, {"name": "web1", "format": "other"}]}, [], FILE_SYSTEMS),
}


def task(stated, image_format):
    def other(params):
        return {**params, "format": OTHER[image_format]} if params.get("format") == "other" else params

    if "volumes" in stated:
        return {**stated, "volumes": [other(volume) for volume in stated["volumes"]]}
    return other({**stated, "name": "web0"})


def make(place, kind):
    """A source, the file below it that holds its data, and its format."""
    raw = harness.make_raw(place / "base.raw", SIZE, PIECES)
    if kind == "raw":
        return raw, raw, "raw"
    source = place / "source.qcow2"
    if kind == "qcow2":
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, source)
        return source, source, "qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", raw, "-F", "raw", source)
    return source, raw, "qcow2"


# --- changes ----------------------------------------------------------------------------------------------------------------


def written(path):
    harness.write_at(path, path.stat().st_size - 2 * MIB, noise(MIB, seed=77))


def written_through_memory(path):
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        memory[-2 * MIB : -MIB] = noise(MIB, seed=77)


def truncated(path):
    os.truncate(path, path.stat().st_size - 3 * MIB)


def extended(path):
    with open(path, "ab") as file:
        file.write(noise(65536, seed=77))


def replaced(path):
    other = path.with_name("other")
    other.write_bytes(noise(MIB, seed=77))
    os.rename(other, path)


CHANGES = (written, written_through_memory, truncated, extended, replaced)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("route", ROUTES)
def test_a_source_that_changes_while_it_is_read(file_systems, route, change):
    during(file_systems, "raw", route, change)


@pytest.mark.parametrize("route", ROUTES)
def test_a_qcow2_image_that_changes_while_it_is_read(file_systems, route):
    during(file_systems, "qcow2", route, written)


@pytest.mark.parametrize("change", [written, truncated, replaced])
@pytest.mark.parametrize("route", ["converted", "converted, sharing", "many"])
def test_a_backing_store_that_changes_while_it_is_read(file_systems, route, change):
    during(file_systems, "chain", route, change)


def during(file_systems, kind, route, change):
    """On all its file systems at the same time, since most of the time is waiting."""
    stated, slow, kinds = ROUTES[route]

    def on(file_system):
        place, pool = (new_directory(file_systems[file_system]) for _time in range(2))
        source, changed, image_format = make(place, kind)
        run("sync", "-f", place)
        params = {"pool": pool, "source_pool": place, "source": source.name, **task(stated, image_format)}
        process = start(params, prefix=slow)
        wait_until(lambda: harness.unnamed_files(pool) or process.poll() is not None, 30)
        time.sleep(0.4)
        assert process.poll() is None, f"too late to change anything: {result_of(process)}"
        # Who opens the file to write to it waits until it is let go.
        writer = threading.Thread(target=change, args=(changed,))
        writer.start()
        result = result_of(process)
        writer.join(10)
        assert not writer.is_alive(), "the writer was kept waiting for longer than the run took"
        assert result.get("failed") and result["error_code"] == "IN_USE", (file_system, result)
        assert changed.name in result["msg"], result
        assert os.listdir(pool) == []
        if (kind, route) == ("raw", "copied"):
            # What came instead is cloned by the next run; of other images there is not always one left.
            again = module({**params, "bwlimit": None})
            assert again.get("actions") == ["created"], again
            assert same_content(source, "raw", pool / "web0", "raw")
        for directory in (place, pool):
            shutil.rmtree(directory)

    with ThreadPoolExecutor(len(kinds)) as threads:
        list(threads.map(on, kinds))


@pytest.mark.parametrize("stated", [{}, {"method": "copy"}, {"format": "qcow2"}, {"volumes": [{"name": "web"}]}])
def test_a_source_that_is_mapped_for_writing_although_nobody_has_it_open(any_pool, stated):
    """A mapping outlives the descriptor it was made by: no list of open files shows it."""
    raw = harness.make_raw(any_pool / "base.raw", SIZE, PIECES)
    with open(raw, "r+b") as file:
        # Python's own mapping keeps a descriptor.
        memory = _LIBC.mmap(None, SIZE, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, file.fileno(), 0)
    assert memory != ctypes.c_void_p(-1).value
    params = {"pool": any_pool, "source": "base.raw", **({} if "volumes" in stated else {"name": "web"}), **stated}
    result = result_of(start(params))
    assert _LIBC.munmap(memory, SIZE) == 0
    assert result.get("failed") and result["error_code"] == "IN_USE", result
    assert os.listdir(any_pool) == ["base.raw"]
    assert module(params)["changed"]


# --- again and again --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["pwrite", "mmap"])
@pytest.mark.parametrize("stated", [{"method": "copy"}, {"format": "qcow2"}, {"volumes": [{"name": "web0"}, {"name": "web1"}]}])
def test_a_source_that_is_written_again_and_again_is_never_torn(file_systems, stated, by):
    """Every writer fills the whole source with one byte; a clone has the same byte everywhere, or there is none."""

    def on(file_system):
        place, pool = (new_directory(file_systems[file_system]) for _time in range(2))
        raw = place / "base.raw"
        size = 4 * MIB
        raw.write_bytes(bytes([1]) * size)
        over = threading.Event()

        def write():
            number = 1
            while not over.is_set():
                number = number % 255 + 1
                with open(raw, "r+b", buffering=0) as file:
                    if by == "pwrite":
                        for at in range(0, size, 65536):
                            os.pwrite(file.fileno(), bytes([number]) * 65536, at)
                    else:
                        with mmap.mmap(file.fileno(), 0) as memory:
                            for at in range(0, size, 65536):
                                memory[at : at + 65536] = bytes([number]) * 65536
                time.sleep(0.05 * (number % 4))

        writer = threading.Thread(target=write)
        writer.start()
        outcomes = []
        # At least four, and as many as it takes for one to meet a write, which a run of some milliseconds need not.
        while len(outcomes) < 4 or ("IN_USE" not in outcomes and len(outcomes) < 60):
            params = {"pool": pool, "source_pool": place, "source": "base.raw", **stated}
            result = result_of(start(params if "volumes" in stated else {"name": "web0", **params}))
            outcomes.append(result.get("error_code"))
            assert result.get("error_code") in (None, "IN_USE"), result
            for path in pool.iterdir():
                content = path
                if stated.get("format") == "qcow2":
                    content = place / "read"
                    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, content)
                data = content.read_bytes()
                assert len(data) == size and data.count(data[0]) == size, "a torn clone"
                path.unlink()
        over.set()
        writer.join()
        for directory in (place, pool):
            shutil.rmtree(directory)
        return outcomes

    with ThreadPoolExecutor(len(FILE_SYSTEMS)) as threads:
        for outcomes in threads.map(on, FILE_SYSTEMS):
            assert "IN_USE" in outcomes


# --- devices ----------------------------------------------------------------------------------------------------------------


def written_directly(path):
    fd = os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_DSYNC)
    with mmap.mmap(-1, MIB) as memory:
        memory.write(noise(MIB, seed=77))
        os.pwrite(fd, memory, SIZE - 2 * MIB)
    os.close(fd)


def written_through_cache(path):
    """While we have the device open too, the kernel does not write back when the writer closes it."""
    harness.write_at(path, SIZE - 2 * MIB, noise(MIB, seed=77))


def discarded(path):
    run("blkdiscard", "-f", "-o", 12 * MIB, "-l", 4 * MIB, path)


@pytest.fixture
def source_device(device, tmp_path):
    path = device(SIZE)
    raw = harness.make_raw(tmp_path / "base.raw", SIZE, PIECES)
    with open(path, "r+b") as file:
        file.write(raw.read_bytes())
        os.fsync(file.fileno())
    return path


def start_reading(pool, **params):
    process = start({"pool": pool, "name": "web0", **LIMITED, **params})
    wait_until(lambda: harness.unnamed_files(pool) or process.poll() is not None, 30)
    time.sleep(0.4)
    assert process.poll() is None, f"too late to change anything: {result_of(process)}"
    return process


@pytest.mark.parametrize("change", [written_directly, written_through_cache, discarded])
@pytest.mark.parametrize("stated", [{}, {"format": "qcow2"}])
def test_a_device_that_is_written_to_while_it_is_read(pool, source_device, change, stated):
    process = start_reading(pool, source_path=source_device, **stated)
    change(source_device)
    result = result_of(process)
    assert result.get("failed") and result["error_code"] == "IN_USE", result
    assert "changed while it was read" in result["msg"], result
    assert os.listdir(pool) == []
    again = module({"pool": pool, "name": "web0", "source_path": source_device, **stated})
    assert again.get("actions") == ["created"], again
    assert same_content(source_device, "raw", pool / "web0", stated.get("format", "raw"))


def test_a_device_that_is_opened_for_writing_while_it_is_read(pool, source_device):
    process = start_reading(pool, source_path=source_device)
    # Not by qemu-io, which our locks keep out; a domain of libvirt has a node of the device of its own, without them.
    with open(source_device, "r+b"):
        result = result_of(process)
    assert result.get("failed") and result["error_code"] == "IN_USE", result
    assert "was opened for writing by" in result["msg"] and f"(pid {os.getpid()})" in result["msg"], result
    assert os.listdir(pool) == []


def test_devices_that_nobody_writes_to_are_read_by_two_at_once(pool, pool2, source_device):
    # What was written before, and waits in the page cache, is no change.
    harness.write_at(source_device, SIZE - 2 * MIB, noise(MIB, seed=78))
    processes = [start_reading(place, source_path=source_device) for place in (pool, pool2)]
    assert [result_of(process).get("actions") for process in processes] == [["created"]] * 2
    for place in (pool, pool2):
        assert same_content(source_device, "raw", place / "web0", "raw")
