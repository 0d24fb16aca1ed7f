# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""storage_volume_info: what it says against what qemu-img, the clone module and the system say, and that it touches nothing."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time

import harness
import pytest
from conftest import make_pool, remove_pool
from harness import GIB, MIB, clone, held, info, listing, module, refused, run, virsh, warnings
from plays import ansible_playbook, write_play

INFO = "storage_volume_info"
USER = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--bounding-set=-all"]


def volumes(**params):
    """What a run, and the same check run, returns, by name; the pool must stay as it was."""
    place = harness.pool_path(params["pool"])
    before = listing(place)
    result = clone(INFO, **params)
    assert result["changed"] is False
    again = module(params, check=True, module=INFO)
    assert again["volumes"] == result["volumes"]
    assert listing(place) == before
    return {volume["name"]: volume for volume in result["volumes"]}


def overlay(path, backing, backing_format="qcow2"):
    run("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", backing_format, path, "64M")


@pytest.mark.parametrize("stated", [{}, {"format": "raw"}, {"format": "vmdk"}, {"format": "qed", "capacity": "1GiB"}])
def test_a_volume_is_described_as_when_it_was_made(either, pool, qcow2, stated):
    made = clone(pool=either, source="base.qcow2", name="web", owner="libvirt-qemu", mode="0640", **stated)["volume"]
    found = volumes(pool=either)
    assert list(found) == ["base.qcow2", "base.raw", "web"]
    run_only = {"changed", "actions", "transfer", "shared", "fallback_reason", "dropped", "duration"}
    expected = {key: value for key, value in made.items() if key not in run_only}
    assert found["web"] == {**expected, "backing_chain": [], "dependents": [], "in_use_by": []}


def test_every_format_is_read_as_qemu_img_reads_it(gallery):
    place, formats = gallery
    # What is still to be written out takes other blocks then.
    run("sync", "-f", place)
    found = volumes(pool=place)
    assert set(found) == {name for name in os.listdir(place) if (place / name).is_file()}
    for name, image_format in formats.items():
        theirs = info(place / name, image_format)
        ours = found[name]
        assert (ours["format"], ours["capacity"], ours["error_code"]) == (image_format, theirs["virtual-size"], None), name
        backing = (theirs.get("backing-filename"), theirs.get("backing-filename-format"))
        assert backing == ((ours["backing"]["path"], ours["backing"]["format"]) if ours["backing"] else (None, None))
        status = (place / name).stat()
        assert (ours["physical"], ours["allocation"]) == (status.st_size, status.st_blocks * 512)
        assert (ours["owner"], ours["group"], ours["mode"]) == ("root", "root", f"{status.st_mode & 0o777:04o}")
        # One of them is described as among all.
        assert module({"pool": place, "name": name}, module=INFO)["volumes"] == [ours]


# --- trees ----------------------------------------------------------------------------------------------------------------


def their_chain(path):
    """What ``qemu-img info --backing-chain`` says."""
    listed = json.loads(run("qemu-img", "info", "-U", "--backing-chain", "--output=json", "-f", "qcow2", path))
    return [(os.path.realpath(image["filename"]), image["format"]) for image in listed[1:]]


@pytest.fixture
def tree(pool, pool2, libvirt_pool, libvirt_pool2):
    """20 overlays over a raw file and over each other; a branch of it lies in the other pool, and comes back."""
    harness.make_raw(pool / "root.raw", 64 * MIB)
    dice = random.Random(20)
    made = [pool / "root.raw"]
    for number in range(20):
        below = made[0] if number < 2 else made[number // 2] if number < 14 else made[-1]
        place = pool2 if number in (5, 9, 15, 16) else pool
        path = place / f"overlay{number:02}"
        # By a name, by a path, and by a way around.
        recorded = dice.choice([below, os.path.relpath(below, place), place / os.path.relpath(below, place)])
        overlay(path, recorded, "raw" if below == made[0] else "qcow2")
        made.append(path)
    return made


def test_a_tree_of_twenty_overlays_in_two_pools(tree, pool, pool2, libvirt_pool, libvirt_pool2):
    found = {}
    for name in (libvirt_pool, libvirt_pool2):
        found.update({volume["path"]: volume for volume in volumes(pool=name).values()})
    assert set(found) == {str(path) for path in tree}
    for path in tree[1:]:
        ours = [(below["path"], below["format"]) for below in found[str(path)]["backing_chain"]]
        assert ours == their_chain(path)
        assert found[str(path)]["backing"]["depth"] == len(ours)
    assert max(len(volume["backing_chain"]) for volume in found.values()) > 7
    for path in tree:
        above = [other for other in tree if str(path) in [below["path"] for below in found[str(other)]["backing_chain"]]]
        expected = sorted(other.name if other.parent == path.parent else str(other) for other in above)
        assert found[str(path)]["dependents"] == expected
    assert len(found[str(tree[0])]["dependents"]) == 20
    # One volume alone has the same relations.
    for path in (tree[0], tree[6]):
        name = libvirt_pool if path.parent == pool else libvirt_pool2
        assert volumes(pool=name, name=path.name) == {path.name: found[str(path)]}


def test_without_libvirt_a_branch_elsewhere_ends_the_chain(tree, pool):
    found = volumes(pool=pool)
    assert set(found) == {path.name for path in tree if path.parent == pool}
    below = found["overlay12"]["backing_chain"]
    assert len(below) == 1 and found["overlay12"]["backing"]["depth"] is None
    assert below[0]["path"] == info(pool / "overlay12", "qcow2")["backing-filename"]
    # Only what hangs together within the directory is told of; the rest of the tree is not.
    assert {"overlay12", "overlay17"}.isdisjoint(found["root.raw"]["dependents"])


def test_a_directory_that_is_two_pools_is_one(libvirt_pool, pool, pool2, qcow2):
    """By another definition, and by another mount."""
    overlay(pool / "web", pool2 / "base.qcow2")
    run("mount", "--bind", pool, pool2)
    make_pool("twin", pool2)
    try:
        found = volumes(pool=libvirt_pool)
        assert found["base.qcow2"]["dependents"] == ["web"]
        assert found["web"]["backing_chain"] == [{"path": str(qcow2), "format": "qcow2"}]
        assert volumes(pool="twin")["base.qcow2"]["dependents"] == ["web"]
    finally:
        remove_pool("twin")
        run("umount", pool2)


def test_another_pool_that_cannot_be_looked_into_is_warned_of(libvirt_pool, pool, qcow2, scratch, libvirtd):
    place = scratch / "vanishing"
    place.mkdir()
    make_pool("vanishing", place)
    try:
        assert not warnings(module({"pool": libvirt_pool}, module=INFO))
        place.rmdir()
        result = clone(INFO, pool=libvirt_pool)
        assert len(result["volumes"]) == 2
        assert any("'vanishing'" in warning for warning in warnings(result))
        virsh("pool-destroy", "vanishing")
        assert any("'vanishing'" in warning for warning in warnings(module({"pool": libvirt_pool}, module=INFO)))
    finally:
        remove_pool("vanishing")


# --- who uses them --------------------------------------------------------------------------------------------------------


def test_processes_that_have_a_volume_open(either, pool, qcow2):
    with held(pool / "base.raw") as one, held(qcow2, "qcow2", writable=False) as other:
        found = volumes(pool=either)
        assert found["base.raw"]["in_use_by"] == [f"qemu-io (pid {one.pid})"]
        assert found["base.qcow2"]["in_use_by"] == [f"qemu-io (pid {other.pid})"]
    assert not any(volume["in_use_by"] for volume in volumes(pool=either).values())


def test_locks_of_a_qemu_that_cannot_be_seen(pool, qcow2):
    """An ordinary user sees no files of root's processes."""
    qcow2.chmod(0o644)
    with held(qcow2, "qcow2"):
        (volume,) = module({"pool": pool, "name": "base.qcow2"}, module=INFO, prefix=USER)["volumes"]
        assert volume["in_use_by"] == ["another qemu process"]


def test_running_domains_and_what_lies_below_their_disks(libvirt_pool, pool, qcow2, domain):
    overlay(pool / "web", qcow2)
    name = domain(pool / "web", "qcow2")
    found = volumes(pool=libvirt_pool)
    for volume in ("web", "base.qcow2"):
        who = found[volume]["in_use_by"]
        assert who[0] == f"domain '{name}'" and who[1].startswith("qemu-system"), who
    assert found["base.raw"]["in_use_by"] == []
    # A directory pool asks no libvirt; the process is seen all the same.
    (who,) = volumes(pool=pool)["web"]["in_use_by"]
    assert who.startswith("qemu-system")


# --- what is left out, and what cannot be read ----------------------------------------------------------------------------


def test_the_disk_is_the_truth(libvirt_pool, pool, qcow2):
    """libvirt was not told of these files, and is not made to look."""
    shutil.copy(qcow2, pool / "new")
    assert "new" in volumes(pool=libvirt_pool)
    assert "new" not in virsh("vol-list", libvirt_pool)
    virsh("pool-refresh", libvirt_pool)
    (pool / "new").unlink()
    assert "new" not in volumes(pool=libvirt_pool)
    assert "new" in virsh("vol-list", libvirt_pool)


def test_staging_files_and_what_is_no_file_are_no_volumes(either, pool, raw):
    (pool / "directory").mkdir()
    os.mkfifo(pool / "pipe")
    (pool / "link").symlink_to("base.raw")
    (pool / "outside").symlink_to("/etc/hostname")
    (pool / ".virtforge-0123456789abcdef.tmp").write_bytes(b"half")
    try:
        assert list(volumes(pool=either)) == ["base.raw"]
        for name in ("pipe", "link", "directory", "nothing"):
            assert volumes(pool=either, name=name) == {}
    finally:
        (pool / ".virtforge-0123456789abcdef.tmp").unlink()


def test_volumes_that_cannot_be_read_say_why(either, pool, qcow2):
    (pool / "cut").write_bytes(qcow2.read_bytes()[:70])
    run("qemu-img", "create", "-q", "-f", "vmdk", "-o", "subformat=monolithicFlat", pool / "parts.vmdk", "1M")
    shutil.copy(qcow2, pool / "two")
    harness.write_at(pool / "two", 64, b"\x7f\x10\xda\xbe")
    (pool / "claim.vdi").write_bytes(bytes(64) + b"\x7f\x10\xda\xbe" + bytes(444))
    found = volumes(pool=either)
    for name, code, image_format in (
        ("cut", "CORRUPT_IMAGE", "qcow2"),
        ("parts.vmdk", "UNSAFE_IMAGE", "vmdk"),
        ("two", "UNSAFE_IMAGE", None),
        ("claim.vdi", "UNSAFE_IMAGE", "vdi"),
    ):
        volume = found[name]
        assert (volume["error_code"], volume["format"], volume["capacity"]) == (code, image_format, None), volume
        assert name in volume["msg"]
    assert (found["base.qcow2"]["error_code"], found["base.qcow2"]["msg"]) == (None, None)


def test_without_qemu_img_raw_and_qcow2_are_read(pool, qcow2):
    run("qemu-img", "create", "-q", "-f", "vdi", pool / "disk.vdi", "64M")
    hide = ["unshare", "--mount", "sh", "-c", 'mount --bind /dev/null /usr/bin/qemu-img && exec "$@"', "sh"]
    found = {volume["name"]: volume for volume in module({"pool": pool}, module=INFO, prefix=hide)["volumes"]}
    assert {name: volume["error_code"] for name, volume in found.items()} == {
        "base.qcow2": None,
        "base.raw": None,
        "disk.vdi": "MISSING_DEPENDENCY",
    }
    assert found["base.qcow2"]["capacity"] == 64 * MIB


def test_an_ordinary_user_is_told_what_he_may_not_read(pool, qcow2):
    qcow2.chmod(0o600)
    (pool / "base.raw").chmod(0o644)
    found = {volume["name"]: volume for volume in module({"pool": pool}, module=INFO, prefix=USER)["volumes"]}
    assert found["base.raw"]["capacity"] == 64 * MIB
    volume = found["base.qcow2"]
    assert (volume["error_code"], volume["format"], volume["mode"]) == ("OPERATION_DENIED", None, "0600")
    pool.chmod(0o711)
    result = module({"pool": pool}, module=INFO, prefix=USER)
    assert (result["failed"], result["error_code"]) == (True, "OPERATION_DENIED")
    assert "become" in result["msg"]
    pool.chmod(0o755)


def test_nothing_outside_the_pools_is_opened(pool, qcow2, scratch):
    secret = harness.make_raw(scratch / "secret.raw", MIB, pieces=())
    (pool / "link").symlink_to(secret)
    for name, backing in (("over", secret), ("by-link", "link"), ("protocol", "nbd:unix:/nowhere"), ("device", "/dev/zero")):
        overlay(pool / name, backing, "raw")
    run("qemu-img", "create", "-q", "-f", "qed", "-u", "-b", secret, "-F", "raw", pool / "over.qed", "64M")
    log = scratch / "strace.log"
    trace = ["strace", "-qq", "-f", "-o", str(log), "-e", "trace=open,openat,openat2,connect"]
    found = {volume["name"]: volume for volume in module({"pool": pool}, module=INFO, prefix=trace)["volumes"]}
    for name, backing in (("over", secret), ("by-link", "link"), ("protocol", "nbd:unix:/nowhere"), ("over.qed", secret)):
        assert found[name]["backing_chain"] == [{"path": str(backing), "format": "raw"}], found[name]
    calls = log.read_text()
    assert "base.qcow2" in calls and '"/proc/self/fd/' in calls
    assert not any(word in calls for word in ("secret.raw", '"link"', "/dev/zero", "nowhere")), calls


# --- pools ----------------------------------------------------------------------------------------------------------------


def test_a_pool_that_is_not_there_yet(libvirt_pool, pool, raw):
    virsh("pool-destroy", libvirt_pool)
    for name, code, word in (
        ("nothing", "NO_STORAGE_POOL", "nothing"),
        ("/nowhere/at/all", "NO_STORAGE_POOL", "/nowhere/at/all"),
        (libvirt_pool, "OPERATION_INVALID", "not active"),
    ):
        result = module({"pool": name}, module=INFO)
        assert (result["failed"], result["error_code"]) == (True, code)
        assert word in result["msg"]
        # In a check run an earlier task would have made or started it.
        result = module({"pool": name}, check=True, module=INFO)
        assert result["volumes"] == []
        assert any(word in warning for warning in warnings(result))


@pytest.mark.parametrize(
    "code, stated, words",
    [
        ("INVALID_ARG", {"name": "../base.raw"}, ["name", "../base.raw"]),
        ("INVALID_ARG", {"name": ""}, ["name"]),
        ("INVALID_ARG", {"name": ".virtforge-0123456789abcdef.tmp"}, ["name", "reserved"]),
        ("INVALID_ARG", {"pool": "a/b"}, ["pool", "a/b"]),
        ("INVALID_ARG", {"pool": ""}, ["pool"]),
        ("INVALID_ARG", {"pool": None}, ["pool"]),
        ("INVALID_ARG", {"colour": "blue"}, ["colour"]),
        ("INVALID_ARG", {"pool": "/etc/hostname"}, ["/etc/hostname", "directory"]),
    ],
)
def test_bad_input(libvirtd, pool, raw, code, stated, words):
    params = {key: value for key, value in {"pool": str(pool), **stated}.items() if value is not None}
    message = refused(code, INFO, **params)
    assert all(word in message for word in words), message


def test_a_directory_needs_no_libvirt(pool, qcow2):
    """Under a Python that has no libvirt, and where nothing listens."""
    none = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /run && exec "$@"', "sh"]
    assert subprocess.run([sys.executable, "-c", "import libvirt"], capture_output=True, check=False).returncode != 0
    result = module({"pool": pool}, module=INFO, python=sys.executable, prefix=none)
    assert [volume["name"] for volume in result["volumes"]] == ["base.qcow2", "base.raw"]


# --- speed ----------------------------------------------------------------------------------------------------------------


def test_a_thousand_volumes(libvirt_pool, libvirt_pool2, pool, pool2, scratch):
    """They cost the module little more than an empty pool does, and a whole run of ansible-playbook less than 1.5 s more."""
    run("qemu-img", "create", "-q", "-f", "qcow2", pool / "base", "40G")
    overlay(pool / "overlay", "base")
    for number in range(999):
        if number % 4 == 3:
            with open(pool / f"web{number:03}", "wb") as file:
                file.truncate(GIB)
        else:
            shutil.copy(pool / "overlay", pool / f"web{number:03}")
    (pool / "overlay").unlink()
    virsh("pool-refresh", libvirt_pool)

    def seconds(name):
        began = time.monotonic()
        result = clone(INFO, pool=name)
        return time.monotonic() - began, result["volumes"]

    empty = min(seconds(libvirt_pool2)[0] for _time in range(4))
    full, found = min((seconds(libvirt_pool) for _time in range(4)), key=lambda one: one[0])
    assert len(found) == 1000 and len(found[0]["dependents"]) == 750
    # A busy machine makes both slower; a process for each volume would take 20 s.
    assert full - empty < max(1, 4 * empty), (full, empty)

    def played(name, count):
        task = {f"virtforge.libvirt.{INFO}": {"pool": name}, "register": "found"}
        check = {"ansible.builtin.assert": {"that": f"found.volumes | length == {count}", "quiet": True}}
        book = write_play(scratch / "volumes.yml", [task, check], vars={"ansible_python_interpreter": harness.PYTHON})
        began = time.monotonic()
        status, output = ansible_playbook(book)
        assert status == 0, output
        return time.monotonic() - began

    # Most of it is ansible-playbook's own start, which takes its time on a busy machine.
    bare = min(played(libvirt_pool2, 0) for _time in range(3))
    took = []
    while len(took) < 10 and (not took or min(took) >= bare + 1.5):
        took.append(played(libvirt_pool, 1000))
    assert min(took) < bare + 1.5, (bare, took)
    print(f"1000 volumes: module {full:.2f} s, of none {empty:.2f} s; ansible-playbook {min(took):.2f} s, of none {bare:.2f} s")
