# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Images and moments that somebody else chose: nothing outside the pools is read, written or connected to."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import threading
import time

import harness
import pytest
from harness import MIB, clone, info, module, refused, result_of, run, same_content, settle, start

SECRET = b"TOP-SECRET " * 100


@pytest.fixture
def secret(scratch):
    path = scratch / "secret"
    path.write_bytes(SECRET.ljust(64 * 1024, b"."))
    path.chmod(0o600)
    before = harness.fingerprint(path)
    yield path
    assert harness.fingerprint(path) == before
    path.unlink()


@pytest.fixture
def opened(scratch):
    """Runs the module and tells which files it and its children opened, and what they connected to."""

    def trace(params, **options):
        log = scratch / "opened.log"
        strace = ["strace", "-f", "-qq", "-o", str(log), "-e", "trace=open,openat,connect"]
        result = result_of(start(params, prefix=strace, **options))
        return result, log.read_text()

    return trace


def descriptor(path):
    return f'# Disk DescriptorFile\nversion=1\ncreateType="monolithicFlat"\nRW 8 FLAT "{path}" 0\n'.encode()


@pytest.mark.parametrize("form", ["text", "embedded", "backing", "data_file", "vpc"])
@pytest.mark.parametrize("stated", [{"format": "raw"}, {}])
def test_a_source_that_names_a_file_outside_the_pools(pool, secret, opened, form, stated):
    path = pool / "evil"
    if form == "text":
        path.write_bytes(descriptor(secret))
    elif form == "embedded":
        text = b'createtype="monolithicSparse"\n' + descriptor(secret)
        header = b"KDMV" + struct.pack("<IIQQQQ", 1, 3, 0, 128, 1, 20).ljust(508, b"\0")
        path.write_bytes(header + text.ljust(20 * 512, b"\0"))
    elif form == "backing":
        run("qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", secret, "-F", "raw", path, "64k")
    elif form == "data_file":
        victim = secret.with_name("victim")
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={victim},data_file_raw=on", path, "64k")
        victim.unlink()
        victim.symlink_to(secret)
    else:
        overlay = pool / "overlay"
        run("qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", secret, "-F", "raw", overlay, "64k")
        path.write_bytes(overlay.read_bytes() + b"conectix" + bytes(504))
        overlay.unlink()
    message = refused("UNSAFE_IMAGE", pool=pool, source="evil", name="stolen", **stated)
    assert "evil" in message
    for mode in (True, False):
        result, log = opened({"pool": pool, "source": "evil", "name": "stolen", **stated}, check=mode)
        assert result["failed"] and str(secret) not in log and "victim" not in log
    if form == "data_file":
        secret.with_name("victim").unlink()


def test_what_a_guest_wrote_to_its_raw_disk_opens_nothing(pool, raw, secret, opened):
    clone(pool=pool, source="base.raw", name="vm")
    fifo = secret.with_name("fifo")
    os.mkfifo(fifo)
    for path in (secret, fifo):
        harness.write_at(pool / "vm", 0, descriptor(path))
        for stated in ({}, {"format": "raw"}, {"format": "vmdk"}, {"mode": "0600"}):
            result, log = opened({"pool": pool, "source": "base.raw", "name": "vm", "timeout": 5, **stated})
            assert result["failed"] and result["error_code"] == "DIFFERS", result
            assert str(path) not in log
    fifo.unlink()


@pytest.mark.parametrize("stated", [{"capacity": "2M"}, {"compare": "content"}, {"capacity": "2M", "compare": "content"}])
def test_a_target_that_names_a_file_outside_the_pools(pool, secret, opened, stated):
    harness.make_raw(pool / "base.raw", MIB, pieces=())
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", pool / "base.raw", pool / "base.qcow2")
    victim = secret.with_name("victim")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={victim},data_file_raw=on", pool / "data", "1M")
    victim.unlink()
    victim.symlink_to(secret)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", secret, "-F", "raw", pool / "overlay", "1M")
    for name in ("data", "overlay"):
        params = {"pool": pool, "source": "base.qcow2", "name": name, **stated}
        before = harness.fingerprint(pool / name)
        refused("UNSAFE_IMAGE", **params)
        result, log = opened(params)
        assert result["failed"] and str(secret) not in log and "victim" not in log
        assert harness.fingerprint(pool / name) == before
    victim.unlink()


def test_a_target_that_names_a_server_is_not_connected_to(pool, qcow2):
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0.1)
    address = f"nbd:127.0.0.1:{listener.getsockname()[1]}"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", address, "-F", "raw", pool / "web", "64M")
    for stated in ({"capacity": "200M"}, {"compare": "content"}):
        refused("UNSAFE_IMAGE", pool=pool, source="base.qcow2", name="web", **stated)
        with pytest.raises(TimeoutError):
            listener.accept()
    assert not clone(pool=pool, source="base.qcow2", name="web")["changed"]
    listener.close()


def test_an_honest_linked_clone_grows_and_is_compared(pool, qcow2):
    for name, backing in (("relative", "base.qcow2"), ("absolute", qcow2)):
        run("qemu-img", "create", "-q", "-f", "qcow2", "-b", backing, "-F", "qcow2", pool / name, "32M", cwd=pool)
        result = settle(pool=pool, source="base.qcow2", name=name, capacity="128M", compare="metadata")
        assert result["actions"] == ["grown"]
        found = info(pool / name, "qcow2")
        assert (found["virtual-size"], found["backing-filename"]) == (128 * MIB, str(backing))
        # What the base has beyond the old end must not shine through.
        done = run("qemu-io", "-r", "-f", "qcow2", "-c", "read -P 0 50M 2M", pool / name)
        assert "verification failed" not in done
        run("qemu-img", "create", "-q", "-f", "qcow2", "-b", backing, "-F", "qcow2", pool / f"{name}2", cwd=pool)
        assert not settle(pool=pool, source="base.qcow2", name=f"{name}2", compare="content")["changed"]


def test_method_libvirt_does_not_probe_what_was_pinned(libvirt_pool, pool, secret):
    run("qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", secret, "-F", "raw", pool / "evil", "64k")
    harness.virsh("pool-refresh", libvirt_pool)
    params = {"pool": libvirt_pool, "source": "evil", "source_format": "raw", "format": "raw", "name": "stolen"}
    assert "source_format" in refused("NO_SUPPORT", method="libvirt", **params)
    settle(**params)
    assert (pool / "stolen").read_bytes() == (pool / "evil").read_bytes()


@pytest.mark.parametrize(
    "stated, words",
    [
        ({"capacity": "52M", "allow_shrink": True}, "smaller"),
        ({"format": "vmdk", "capacity": "100M"}, "vmdk"),
        ({"format": "qcow2", "qcow2": {"refcount_bits": 8}}, "refcount_bits"),
        ({"format": "qcow2", "qcow2": {"compression_type": "zstd"}}, "compression_type"),
        ({"setype": "virt_image_t"}, "SELinux"),
        ({"preallocation": "full"}, "preallocation"),
    ],
)
def test_method_libvirt_says_what_it_cannot_do(libvirt_pool, raw, stated, words):
    harness.virsh("pool-refresh", libvirt_pool)
    message = refused("NO_SUPPORT", pool=libvirt_pool, source="base.raw", name="web", method="libvirt", **stated)
    assert words in message and "method=libvirt" in message


@pytest.mark.parametrize("image_format", ["qcow2", "vhdx"])
def test_a_torn_image_is_no_source(pool, raw, image_format):
    whole = pool / f"whole.{image_format}"
    run("qemu-img", "convert", "-f", "raw", "-O", image_format, raw, whole)
    (pool / "torn").write_bytes(whole.read_bytes()[: whole.stat().st_size * 2 // 3])
    for stated in ({"format": "raw"}, {}):
        result = module({"pool": pool, "source": "torn", "name": "web", **stated})
        assert result["failed"] and result["error_code"] in ("CORRUPT_IMAGE", "IO_ERROR"), result
        assert not (pool / "web").exists()


def test_leaked_clusters_are_no_corruption(pool):
    run("qemu-img", "create", "-q", "-f", "qcow2", pool / "leaky", "64M")
    run("qemu-io", "-f", "qcow2", "-c", "write 0 64k", pool / "leaky")
    # Without its entry in the L1 table, nothing refers to what was written.
    l1 = int.from_bytes((pool / "leaky").read_bytes()[40:48], "big")
    harness.write_at(pool / "leaky", l1, bytes(8))
    assert subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", pool / "leaky"], check=False).returncode == 3
    settle(pool=pool, source="leaky", name="web")


def test_a_target_that_cannot_be_read_differs_and_can_be_replaced(either, pool, qcow2):
    (pool / "web").write_bytes(qcow2.read_bytes()[:70000])
    message = refused("DIFFERS", pool=either, source="base.qcow2", name="web")
    assert "web" in message and "L1" in message
    assert settle(pool=either, source="base.qcow2", name="web", force=True)["actions"] == ["replaced"]
    assert same_content(qcow2, "qcow2", pool / "web", "qcow2")


def test_a_target_whose_sources_base_is_gone_is_judged_on_what_is_stated(pool, qcow2):
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", qcow2, "-F", "qcow2", pool / "overlay")
    clone(pool=pool, source="overlay", name="web")
    qcow2.unlink()
    result = settle(pool=pool, source="overlay", name="web", format="qcow2")
    assert not result["changed"] and any("base.qcow2" in warning for warning in harness.warnings(result))
    result = module({"pool": pool, "source": "overlay", "name": "new", "format": "qcow2"})
    assert result["failed"] and result["error_code"] == "NO_STORAGE_VOL"


# --- the wrong moment -----------------------------------------------------------------------------------------------------


def test_a_header_that_changes_after_it_was_judged(pool, raw, secret):
    """Between the look at the source and the conversion it gets a backing file outside the pools."""
    run("qemu-img", "create", "-q", "-f", "qcow2", pool / "source", "64k")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", secret, "-F", "raw", pool / "evil", "64k")
    evil = (pool / "evil").read_bytes()
    delay = ["-e", "trace=flock", "-e", "inject=flock:delay_exit=700000"]
    params = {"pool": pool, "source": "source", "name": "stolen", "format": "raw"}
    process = start(params, prefix=["strace", "-qq", "-o", "/dev/null", *delay])
    stop = threading.Event()

    def rewrite():
        while not stop.wait(0.05):
            with open(pool / "source", "r+b") as file:
                file.write(evil)

    thread = threading.Thread(target=rewrite)
    thread.start()
    result = result_of(process)
    stop.set()
    thread.join()
    if (pool / "stolen").exists():
        assert b"TOP-SECRET" not in (pool / "stolen").read_bytes()
    else:
        assert result["error_code"] in ("IN_USE", "UNSAFE_IMAGE", "CORRUPT_IMAGE"), result


def test_a_domain_that_starts_while_its_disk_is_replaced(pool, raw):
    process = harness.start_replacing(pool)
    inode = (pool / "web").stat().st_ino
    with harness.held(pool / "web", "raw"):
        result = result_of(process)
    assert result["failed"] and result["error_code"] == "IN_USE", result
    assert (pool / "web").stat().st_ino == inode


def test_a_volume_that_appears_while_an_old_one_is_replaced(pool, raw):
    process = harness.start_replacing(pool)
    (pool / "other").write_bytes(b"precious")
    os.rename(pool / "other", pool / "web")
    result = result_of(process)
    assert result["failed"] and result["error_code"] == "IN_USE", result
    assert (pool / "web").read_bytes() == b"precious"


def test_qemu_cannot_open_a_raw_volume_while_it_grows(pool, raw):
    params = {"pool": pool, "source": "base.raw", "name": "web", "capacity": "128M", "preallocation": "full"}
    clone(pool=pool, source="base.raw", name="web")
    slow = ["-e", "trace=pwrite64", "-e", "inject=pwrite64:delay_enter=50000"]
    process = start(params, prefix=["strace", "-qq", "-o", "/dev/null", *slow])
    harness.wait_until(lambda: (pool / "web").stat().st_size == 128 * MIB, 30)
    done = subprocess.run(
        ["qemu-io", "-f", "raw", "-c", "write -P 7 100M 1M", str(pool / "web")], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0 and "lock" in done.stderr
    assert result_of(process)["actions"] == ["grown"]


def test_growing_ends_with_the_timeout(pool, raw):
    clone(pool=pool, source="base.raw", name="web")
    params = {"pool": pool, "source": "base.raw", "name": "web", "capacity": "128M", "preallocation": "full", "timeout": 2}
    slow = ["-e", "trace=pwrite64", "-e", "inject=pwrite64:delay_enter=200000"]
    result = result_of(start(params, prefix=["strace", "-qq", "-o", "/dev/null", *slow]))
    assert result["failed"] and result["error_code"] == "TIMEOUT", result


@pytest.mark.parametrize("returned", ["0", "99999999"])
def test_a_file_system_that_lies_about_what_it_wrote(pool, raw, returned):
    lie = ["-e", "trace=pwrite64", "-e", f"inject=pwrite64:retval={returned}"]
    params = {"pool": pool, "source": "base.raw", "name": "web", "method": "copy", "timeout": 20}
    result = result_of(start(params, prefix=["strace", "-qq", "-o", "/dev/null", *lie]))
    assert result["failed"] and result["error_code"] == "IO_ERROR", result
    assert not (pool / "web").exists()


def test_a_file_system_that_lies_about_sharing(pool, raw, scratch):
    """FICLONE answers 0 and does nothing. Which of the many calls it is, a first run tells."""
    log = scratch / "ioctl.log"
    params = {"pool": pool, "source": "base.raw", "name": "web"}
    trace = ["strace", "-qq", "-o", str(log), "-e", "trace=ioctl"]
    assert result_of(start(params, prefix=trace))["volume"]["transfer"] == "reflink"
    number = next(index for index, line in enumerate(log.read_text().splitlines(), 1) if "FICLONE" in line)
    (pool / "web").unlink()
    result = result_of(start(params, prefix=[*trace, "-e", f"inject=ioctl:retval=0:when={number}"]))
    assert any("FICLONE" in line and "INJECTED" in line for line in log.read_text().splitlines())
    assert result["failed"] and result["error_code"] == "IO_ERROR" and "shared" in result["msg"], result
    assert not (pool / "web").exists()


def test_a_source_that_is_written_to_between_the_look_and_the_copy(pool, raw):
    """It grows, and is closed again before the copy begins: never a clone of the first part alone."""
    delay = ["-e", "trace=flock", "-e", "inject=flock:delay_exit=1000000"]
    params = {"pool": pool, "source": "base.raw", "name": "web", "method": "copy"}
    process = start(params, prefix=["strace", "-qq", "-o", "/dev/null", *delay])
    harness.wait_until(lambda: harness.opened_by(process, raw), 30)
    for _time in range(20):
        with open(raw, "ab") as file:
            file.write(b"more")
        time.sleep(0.1)
    result = result_of(process)
    if result.get("failed"):
        assert result["error_code"] == "IN_USE", result
        assert not (pool / "web").exists()
    else:
        assert (pool / "web").stat().st_size % 4 == 0
        assert (pool / "web").read_bytes() == raw.read_bytes()[: (pool / "web").stat().st_size]


@pytest.mark.parametrize("change", ["attribute", "mode", "link"])
def test_what_is_no_change_of_the_content_is_no_matter(pool, raw, change):
    """libvirt marks the base of a domain that starts."""
    slow = ["-e", "trace=pwrite64", "-e", "inject=pwrite64:delay_enter=300000"]
    expected = raw.read_bytes()
    params = {"pool": pool, "source": "base.raw", "name": "web", "method": "copy"}
    process = start(params, prefix=["strace", "-qq", "-o", "/dev/null", *slow])
    harness.wait_until(lambda: harness.unnamed_files(pool), 30)
    time.sleep(0.1)
    if change == "attribute":
        os.setxattr(raw, "trusted.libvirt.security.ref_dac", b"1")
    elif change == "mode":
        raw.chmod(0o640)
    else:
        os.link(raw, pool / "another")
    result = result_of(process)
    assert result.get("actions") == ["created"], result
    assert (pool / "web").read_bytes() == expected


def test_an_encrypted_image_is_cloned_in_its_own_format(pool, raw):
    """By what their headers say: nothing here needs the key."""
    run("qemu-img", "create", "-q", "-f", "qcow2", pool / "enc.qcow2", "16M")
    harness.write_at(pool / "enc.qcow2", 32, (2).to_bytes(4, "big"))
    harness.write_at(raw, 0, b"LUKS\xba\xbe\0\1")
    for name in ("enc.qcow2", "base.raw"):
        settle(pool=pool, source=name, name=f"clone-{name}")
        assert (pool / f"clone-{name}").read_bytes() == (pool / name).read_bytes()
        assert "encrypted" in refused("NO_SUPPORT", pool=pool, source=name, name="web", format="vdi")


def test_the_source_itself_is_recognised_without_its_base(pool, qcow2):
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", qcow2, "-F", "qcow2", pool / "overlay")
    qcow2.unlink()
    before = harness.fingerprint(pool / "overlay")
    refused("INVALID_ARG", pool=pool, source="overlay", name="overlay", mode="0666")
    assert harness.fingerprint(pool / "overlay") == before


def test_a_dirty_image_that_is_being_written_to_is_in_use(pool):
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", pool / "base.qcow2", "16M")
    with open(pool / "base.qcow2", "r+b", buffering=0) as file:
        file.seek(72 + 7)
        file.write(b"\1")
        refused("IN_USE", pool=pool, source="base.qcow2", name="web")
    assert "dirty" in refused("CORRUPT_IMAGE", pool=pool, source="base.qcow2", name="web")
