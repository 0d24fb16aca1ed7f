# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Several runs at once, and sources and targets that others use."""

from __future__ import annotations

import os
import subprocess
import threading
import time

import harness
import pytest
from ansible_collections.virtforge.libvirt.plugins.module_utils._transfer import guards
from harness import MIB, clone, module, refused, result_of, run, same_content, start

# --- several runs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stated", [{}, {"format": "qcow2"}, {"method": "copy"}])
def test_eight_runs_for_one_target(either, pool, raw, stated):
    params = {"pool": either, "source": "base.raw", "name": "web", **stated}
    results = [result_of(process) for process in [start(params) for _time in range(8)]]
    assert not any(result.get("failed") for result in results), results
    assert sorted(result["actions"] for result in results) == [[]] * 7 + [["created"]]
    assert sorted(os.listdir(pool)) == ["base.raw", "web"]
    assert same_content(raw, "raw", pool / "web", stated.get("format", "raw"))


def test_eight_runs_that_do_not_see_each_others_locks(pool, raw):
    """As on a file system that several hosts share: the link into place decides."""
    params = {"pool": pool, "source": "base.raw", "name": "web", "format": "qcow2"}
    alone = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /run/lock && exec "$@"', "sh"]
    results = [result_of(process) for process in [start(params, prefix=alone) for _time in range(8)]]
    assert not any(result.get("failed") for result in results), results
    assert sorted(result["actions"] for result in results) == [[]] * 7 + [["created"]]
    assert sorted(os.listdir(pool)) == ["base.raw", "web"]


def test_runs_that_want_different_things_agree_in_the_end(pool, raw):
    """One grows what another makes."""
    sizes = ["64M", "100M", "200M", "100M"]
    processes = [start({"pool": pool, "source": "base.raw", "name": "web", "capacity": size}) for size in sizes]
    results = [result_of(process) for process in processes]
    final = (pool / "web").stat().st_size
    assert final == 200 * MIB
    for size, result in zip(sizes, results):
        # Too late for a smaller one is a failure that says so.
        assert not result.get("failed") or (result["error_code"] == "DIFFERS" and size != "200M"), result
    assert same_content(raw, "raw", pool / "web", "raw")


def test_forty_clones_in_opposite_directions(libvirt_pool, libvirt_pool2, pool, pool2):
    """libvirt's own clones deadlock the daemon here."""
    for place in (pool, pool2):
        harness.make_raw(place / f"{place.name}.raw", 32 * MIB, pieces=((0, 8),))
    processes = []
    for number in range(20):
        for one, other, source in ((libvirt_pool, libvirt_pool2, pool), (libvirt_pool2, libvirt_pool, pool2)):
            params = {"pool": other, "source_pool": one, "source": f"{source.name}.raw", "name": f"copy{number}"}
            params["format"] = "qcow2" if number % 2 else "raw"
            processes.append(start(params))
    results = [result_of(process, timeout=300) for process in processes]
    assert [result.get("actions") for result in results] == [["created"]] * 40, results
    for name in (libvirt_pool, libvirt_pool2):
        assert len(harness.virsh("vol-list", name).split("copy")) == 41


def test_clones_of_each_others_targets_in_opposite_directions(pool, pool2, raw):
    """a to b and b to a, by the same names, with force: locks are taken in one order."""
    (pool2 / "base.raw").write_bytes(raw.read_bytes())
    processes = []
    for _time in range(6):
        for one, other in ((pool, pool2), (pool2, pool)):
            processes.append(
                start({"pool": other, "source_pool": one, "source": "base.raw", "name": "base.raw", "force": True})
            )
    for process in processes:
        assert not result_of(process).get("failed")


@pytest.mark.parametrize("stated", [{"format": "qcow2"}, {"capacity": "64M"}])
def test_runs_that_replace_the_same_volume(pool, raw, stated):
    """One replaces, the others wait for it and find nothing left to do."""
    clone(pool=pool, source="base.raw", name="web", capacity="70M")
    params = {"pool": pool, "source": "base.raw", "name": "web", "force": True, **stated}
    # Slow enough that all of them are there before the first is done.
    slow = ["-e", "trace=ftruncate,fchmod", "-e", "inject=ftruncate,fchmod:delay_exit=1200000:when=1"]
    processes = []
    for _run in range(4):
        processes.append(start(params, prefix=["strace", "-qq", "-o", "/dev/null", *slow]))
        time.sleep(0.1)
    results = [result_of(process) for process in processes]
    assert sorted(result.get("actions", [result.get("msg")]) for result in results) == [[]] * 3 + [["replaced"]]


def test_a_reader_for_a_moment_does_not_cost_a_finished_copy(pool, raw):
    process = harness.start_replacing(pool)
    while process.poll() is None:
        with open(pool / "web", "rb"):
            time.sleep(0.3)
        time.sleep(0.15)
    assert result_of(process)["actions"] == ["replaced"]


def test_qemus_own_locks_are_seen(qcow2):
    """On file systems without leases they are all there is."""
    fd = os.open(qcow2, os.O_RDONLY)
    try:
        assert not guards._qemu_holds(fd, guards._ANYBODY)
        with harness.held(qcow2, "qcow2"):
            assert guards._qemu_holds(fd, guards._WRITERS)
        with harness.held(qcow2, "qcow2", writable=False):
            assert guards._qemu_holds(fd, guards._ANYBODY)
            assert not guards._qemu_holds(fd, guards._WRITERS)
    finally:
        os.close(fd)


def test_another_run_is_waited_for_only_so_long(pool, raw):
    params = {"pool": pool, "source": "base.raw", "name": "web"}
    slow = start(
        params, prefix=["strace", "-qq", "-o", "/dev/null", "-e", "trace=linkat", "-e", "inject=linkat:delay_enter=4000000"]
    )
    harness.wait_until(lambda: harness.unnamed_files(pool), 30)
    result = module({**params, "lock_timeout": 1})
    assert result["failed"] and result["error_code"] == "TIMEOUT", result
    assert "lock_timeout" in result["msg"] and "web" in result["msg"]
    assert module(params)["actions"] == []
    assert result_of(slow)["actions"] == ["created"]


# --- a source in use ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
@pytest.mark.parametrize("stated", [{}, {"format": "vdi"}, {"method": "copy"}])
def test_a_source_held_open_for_writing_by_qemu_is_refused(either, pool, qcow2, image_format, stated):
    source = pool / f"base.{image_format}"
    with harness.held(source, image_format):
        message = refused("IN_USE", pool=either, source=source.name, name="web", **stated)
        assert source.name in message and "qemu-io" in message
    assert module({"pool": either, "source": source.name, "name": "web", **stated})["actions"] == ["created"]


def test_a_source_held_open_for_reading_is_cloned(either, pool, qcow2):
    with harness.held(qcow2, "qcow2", writable=False):
        assert clone(pool=either, source="base.qcow2", name="web")["actions"] == ["created"]
        assert clone(pool=either, source="base.qcow2", name="web.raw", format="raw")["actions"] == ["created"]


@pytest.mark.parametrize("stated", [{}, {"format": "qcow2"}])
def test_a_source_open_for_writing_by_any_program_is_refused(pool, raw, stated):
    with open(raw, "r+b"):
        message = refused("IN_USE", pool=pool, source="base.raw", name="web", **stated)
        assert str(os.getpid()) in message


def test_a_backing_store_open_for_writing_is_refused(pool, qcow2):
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", qcow2, "-F", "qcow2", pool / "overlay")
    with harness.held(qcow2, "qcow2"):
        refused("IN_USE", pool=pool, source="overlay", name="web")


def test_a_source_in_use_is_waited_for_where_asked(pool, raw):
    params = {"pool": pool, "source": "base.raw", "name": "web", "source_in_use": "wait"}
    with open(raw, "r+b"):
        process = start(params)
        time.sleep(1.5)
        assert process.poll() is None
    assert result_of(process)["actions"] == ["created"]


def test_a_source_in_use_is_not_waited_for_longer_than_the_timeout(pool, raw):
    with open(raw, "r+b"):
        result = module({"pool": pool, "source": "base.raw", "name": "web", "source_in_use": "wait", "timeout": 1})
    assert result["failed"] and result["error_code"] == "TIMEOUT", result
    assert not (pool / "web").exists()


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_a_writer_that_comes_while_the_source_is_read(pool, qcow2, image_format):
    """Whoever opens it for writing is kept waiting, or the clone is given up; never a torn clone."""
    source = pool / f"base.{image_format}"
    before = source.read_bytes()
    delay = ["-e", "trace=ftruncate,pwrite64,linkat", "-e", "inject=ftruncate,pwrite64,linkat:delay_enter=800000:when=1..2"]
    params = {"pool": pool, "source": source.name, "name": "web", "method": "copy"}
    process = start(params, prefix=["strace", "-qq", "-o", "/dev/null", *delay])
    harness.wait_until(lambda: harness.unnamed_files(pool), 30)

    def write():
        with open(source, "r+b") as file:
            file.seek(50 * MIB if image_format == "raw" else 300000)
            file.write(b"torn" * 1000)

    writer = threading.Thread(target=write)
    writer.start()
    result = result_of(process)
    writer.join()
    if result.get("failed"):
        assert result["error_code"] == "IN_USE", result
        assert not (pool / "web").exists()
    else:
        assert (pool / "web").read_bytes() == before


def test_qemu_cannot_write_to_the_source_while_it_is_read(pool, qcow2):
    """It is refused, or kept waiting until the clone is there, or the clone is given up."""
    params = {"pool": pool, "source": "base.qcow2", "name": "web", "format": "raw"}
    delay = ["-e", "trace=linkat", "-e", "inject=linkat:delay_enter=2500000"]
    process = start(params, prefix=["strace", "-qq", "-o", "/dev/null", *delay])
    harness.wait_until(lambda: harness.unnamed_files(pool), 30)
    write = ["qemu-io", "-f", "qcow2", "-c", "write -P 7 0 32M", str(qcow2)]
    done = subprocess.run(write, capture_output=True, text=True, check=False)
    result = result_of(process)
    if result.get("failed"):
        assert result["error_code"] == "IN_USE", result
        assert not (pool / "web").exists()
    else:
        # base.raw has what base.qcow2 had before.
        assert same_content(pool / "base.raw", "raw", pool / "web", "raw"), (done, result)
