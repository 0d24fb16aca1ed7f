# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""RBD images of a real Ceph as sources and targets: staged and renamed, linked to snapshots, never waited for without end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import harness
import pytest
import yaml
from ansible_collections.virtforge.libvirt.plugins.module_utils._pools import rbd_child
from conftest import remove_pool
from harness import MIB, check, clone, make_raw, module, refused, result_of, run, settle, start, virsh, virsh_status
from plays import ansible_playbook, counts

POOL = """<pool type='rbd'><name>{name}</name><source><host name='127.0.0.1' port='{port}'/><name>{pool}</name>
<auth type='ceph' username='{user}'><secret uuid='{secret}'/></auth></source></pool>"""
SECRET = "<secret ephemeral='no' private='{private}'><uuid>{uuid}</uuid><usage type='ceph'><name>{uuid}</name></usage></secret>"


class Pool:
    """A pool of libvirt in Ceph, and what is in it, as Ceph's administrator sees that."""

    def __init__(self, ceph, scratch, pool, private="no", name=None):
        self.ceph, self.pool, self.name = ceph, pool, name or f"ceph-{pool}-{private}"
        self.secret = str(uuid.uuid4())
        document = scratch / f"{self.name}.xml"
        document.write_text(SECRET.format(uuid=self.secret, private=private))
        virsh("secret-define", document)
        virsh("secret-set-value", self.secret, ceph.key)
        document.write_text(POOL.format(name=self.name, port=ceph.port, pool=pool, user=ceph.user, secret=self.secret))
        virsh("pool-define", document)
        virsh("pool-start", self.name)

    def end(self):
        remove_pool(self.name)
        virsh_status("secret-undefine", self.secret)

    def rbd(self, *arguments):
        """Output of ``rbd`` with the image ``pool/NAME`` in place of an argument ``@NAME``."""
        return self.ceph.rbd(*(f"{self.pool}/{one[1:]}" if one.startswith("@") else one for one in arguments))

    def json(self, *arguments):
        return json.loads(self.rbd(*arguments, "--format=json"))

    def images(self):
        return self.json("ls", "--pool", self.pool)

    def staged(self):
        return [name for name in self.images() if name.startswith(harness.STAGED)]

    def watched(self, name):
        return bool(self.json("status", f"@{name}")["watchers"])

    def locked(self, name):
        return bool(self.json("lock", "ls", f"@{name}"))

    def snapshots(self, name):
        return [one["name"] for one in self.json("snap", "ls", f"@{name}")]

    def used(self, name):
        return self.json("du", f"@{name}")["images"][-1]["used_size"]

    def node(self, name):
        conf = str(self.ceph.conf)
        return "json:" + json.dumps({"driver": "rbd", "pool": self.pool, "image": name, "conf": conf, "user": "admin"})

    def reads_as(self, name, path, image_format="raw"):
        file = {"driver": image_format, "file": {"driver": "file", "filename": str(path)}}
        command = ["qemu-img", "compare", "-U", self.node(name), "json:" + json.dumps(file)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def write(self, name, at, byte):
        run("qemu-io", "-c", f"write -P {byte} {at} 64k", self.node(name))

    def empty(self):
        """Remove all images, children before their parents."""
        end = time.monotonic() + 60
        while left := self.images():
            said = []
            for name in left:
                image = f"{self.pool}/{name}"
                unprotect = [["snap", "unprotect", f"{image}@{snapshot}"] for snapshot in self.snapshots(name)]
                for how in (*unprotect, ["snap", "purge", image], ["rm", image]):
                    command = ["rbd", "-c", self.ceph.conf, *how]
                    said.append(subprocess.run(command, capture_output=True, text=True, check=False, timeout=60).stderr)
            assert time.monotonic() < end, "".join(said)


@pytest.fixture(scope="session")
def ceph_pool(libvirtd, ceph, scratch):
    pool = Pool(ceph, scratch, ceph.pool)
    yield pool
    pool.end()


@pytest.fixture(scope="session")
def other_ceph_pool(libvirtd, ceph, scratch):
    """Another pool of the same cluster."""
    for command in ("ceph osd pool create second 8", "ceph osd pool application enable second rbd", "rbd pool init second"):
        # A client may lose a race, and ask before it has the monitor's map.
        words = ["timeout", "20", *command.split(), "-c", ceph.conf]
        harness.wait_until(lambda words=words: subprocess.run(words, capture_output=True, check=False).returncode == 0, 60)
    pool = Pool(ceph, scratch, "second")
    yield pool
    pool.end()


@pytest.fixture
def rbd(ceph_pool):
    yield ceph_pool
    staged = ceph_pool.staged()
    ceph_pool.empty()
    assert not staged


@pytest.fixture
def base(rbd, raw):
    """An image with the content of the file ``raw``, which was cloned from it."""
    clone(pool=rbd.name, name="base", source_path=raw)
    return "base"


# --- full clones -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_a_file_becomes_an_image_and_that_a_file(rbd, request, pool2, image_format):
    source = request.getfixturevalue(image_format)
    result = settle(pool=rbd.name, name="web", source_path=source, verify=True)
    assert result["actions"] == ["created"] and result["volume"]["type"] == "network"
    volume = result["volume"]
    assert (volume["path"], volume["key"], volume["transfer"]) == (f"{rbd.pool}/web",) * 2 + ("convert",)
    assert (volume["format"], volume["capacity"], volume["owner"]) == ("raw", 64 * MIB, None)
    # 3 MiB of data, in objects of 4 MiB.
    assert volume["allocation"] == rbd.used("web") == 8 * MIB
    assert rbd.reads_as("web", source, image_format)
    assert "web" in virsh("vol-list", rbd.name)
    assert not rbd.snapshots("web")

    result = settle(pool=pool2, name="back", source_pool=rbd.name, source="web", format=image_format)
    assert result["actions"] == ["created"] and result["source"]["path"] == f"{rbd.pool}/web"
    assert result["volume"]["fallback_reason"] == "the source is on the network"
    assert rbd.reads_as("web", pool2 / "back", image_format)
    assert harness.allocated(pool2 / "back") < 10 * MIB


def test_images_are_cloned_within_a_pool_and_between_pools(rbd, base, raw, other_ceph_pool):
    assert settle(pool=rbd.name, source=base, capacity="80MiB")["volume"]["name"] == "base-clone"
    result = settle(pool=other_ceph_pool.name, source_pool=rbd.name, source=base, name="web")
    assert result["volume"]["path"] == "second/web"
    assert other_ceph_pool.reads_as("web", raw)
    other_ceph_pool.empty()
    assert rbd.reads_as("base-clone", raw)
    assert rbd.used("base-clone") == 8 * MIB
    assert "itself" in refused("INVALID_ARG", pool=rbd.name, source=base, name=base)


def test_partitions_and_images(rbd, base, raw, device, libvirtd):
    path = device(256 * MIB)
    run("parted", "-s", path, "mklabel", "gpt")
    disk = f"disk{os.path.basename(path)}"
    virsh("pool-define-as", disk, "disk", "--source-dev", path, "--source-format", "gpt", "--target", "/dev")
    virsh("pool-start", disk)
    try:
        name = f"{os.path.basename(path)}p1"
        settle(pool=disk, name=name, source_pool=rbd.name, source=base)
        assert harness.same_content(raw, "raw", f"/dev/{name}", "raw")
        settle(pool=rbd.name, name="again", source_pool=disk, source=name)
        assert rbd.reads_as("again", raw)
    finally:
        remove_pool(disk)
        run("partx", "-d", path)


def test_many_images_in_one_task(rbd, base, raw):
    result = settle(pool=rbd.name, source=base, volumes=[{"name": "one"}, {"name": "two", "capacity": "96MiB"}])
    assert [volume["actions"] for volume in result["volumes"]] == [["created"]] * 2
    assert [volume["type"] for volume in result["volumes"]] == ["network"] * 2
    assert rbd.reads_as("one", raw) and rbd.json("info", "@two")["size"] == 96 * MIB


def test_an_image_that_exists_is_judged(rbd, base, raw, pool2):
    params = {"pool": rbd.name, "source_path": raw, "name": base}
    result = settle(**params, capacity="96MiB")
    assert result["actions"] == ["grown"] and rbd.json("info", "@base")["size"] == 96 * MIB
    # More than the cluster has.
    assert settle(**params, capacity="1TiB")["actions"] == ["grown"]
    rbd.rbd("resize", "--allow-shrink", "--size", "96M", "@base")
    assert "64 MiB" in refused("DIFFERS", **params, capacity="64MiB")
    assert clone(**params, compare="content")["actions"] == []
    rbd.write(base, 40 * MIB, 7)
    assert "its data is not that of" in refused("DIFFERS", **params, compare="content")
    result = settle(**params, compare="content", force=True)
    assert result["actions"] == ["replaced"] and rbd.reads_as(base, raw)
    assert rbd.images() == [base]
    assert "'@'" in refused("INVALID_ARG", pool=rbd.name, source_path=raw, name="web@1")
    assert "owner" in refused("NO_SUPPORT", **params, owner="root")
    # Blank ones are made by the same hands.
    made = settle("storage_volume", pool=rbd.name, name="blank", capacity="1GiB")
    assert made["actions"] == ["created"] and rbd.used("blank") == 0


def test_shrinking_is_possible_where_only_zeros_go(rbd, base, pool2):
    params = {"source_pool": rbd.name, "source": base, "allow_shrink": True}
    assert settle(pool=rbd.name, **params, capacity="60MiB", name="small")["volume"]["capacity"] == 60 * MIB
    assert settle(pool=pool2, **params, capacity="60MiB", name="small")["volume"]["capacity"] == 60 * MIB
    at = 50 * MIB
    assert f"the data at byte {at}" in refused("INVALID_ARG", pool=rbd.name, **params, capacity=str(at), name="tiny")


DOMAIN = """<domain type='qemu'><name>{name}</name><memory unit='MiB'>64</memory>
<os><type arch='x86_64' machine='pc'>hvm</type></os>
<devices><emulator>/usr/bin/qemu-system-x86_64</emulator>
<disk type='network' device='disk'><driver name='qemu' type='raw'/>
<auth username='{user}'><secret type='ceph' uuid='{secret}'/></auth>
<source protocol='rbd' name='{image}'><host name='127.0.0.1' port='{port}'/></source>
<target dev='vda' bus='virtio'/></disk></devices></domain>"""


def test_an_image_in_use_is_neither_read_nor_replaced(rbd, base, raw, scratch):
    clone(pool=rbd.name, name="web", source=base)
    document = scratch / "guest.xml"
    guest = {"user": rbd.ceph.user, "secret": rbd.secret, "port": rbd.ceph.port}
    document.write_text(DOMAIN.format(name="in-ceph", image=f"{rbd.pool}/web", **guest))
    virsh("create", document, "--paused")
    try:
        params = {"pool": rbd.name, "source_path": raw}
        assert "domain 'in-ceph'" in refused("IN_USE", pool=rbd.name, source="web", name="copy")
        assert "domain 'in-ceph'" in refused("IN_USE", **params, name="web", capacity="96MiB")
        assert clone(**params, name="web")["actions"] == []
    finally:
        virsh("destroy", "in-ceph")
    # As the image of a CD.
    document.write_text(document.read_text().replace("<target", "<readonly/><target"))
    virsh("create", document, "--paused")
    try:
        assert settle(pool=rbd.name, source="web", name="of-a-cd")["actions"] == ["created"]
        assert "domain 'in-ceph'" in refused("IN_USE", **params, name="web", capacity="96MiB")
    finally:
        virsh("destroy", "in-ceph")
    # Others, on any host, are seen as watchers.
    process = subprocess.Popen(["qemu-io", rbd.node(base)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process.stdin.write("write -P 7 40M 64k\n")
    process.stdin.flush()
    harness.wait_until(lambda: rbd.locked(base), 20)
    assert "the client of Ceph at 127.0.0.1" in refused("IN_USE", pool=rbd.name, source=base, name="copy")
    waiting = start({"pool": rbd.name, "source": base, "name": "copy", "source_in_use": "wait"})
    time.sleep(2)
    process.communicate("quit\n")
    assert result_of(waiting)["actions"] == ["created"]


def test_an_image_that_is_written_to_while_it_is_read(rbd, scratch):
    source = make_raw(scratch / "golden.raw", 64 * MIB, pieces=((0, 24),))
    clone(pool=rbd.name, source_path=source, name="golden")
    reading = start({"pool": rbd.name, "source": "golden", "name": "copy", "bwlimit": "2MiB"})
    harness.wait_until(lambda: any(map(rbd.watched, rbd.staged())), 30)
    process = subprocess.Popen(["qemu-io", rbd.node("golden")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process.stdin.write("write -P 7 40M 64k\n")
    process.stdin.flush()
    try:
        result = result_of(reading)
    finally:
        process.communicate("quit\n")
    assert result["error_code"] == "IN_USE" and "while it was read" in result["msg"], result
    assert rbd.images() == ["golden"]
    source.unlink()


def test_who_uses_many_images_is_told_after_one_moment(rbd):
    names = ["one", "two", "three", "four"]
    guests = []
    for name in names:
        rbd.rbd("create", "@" + name, "--size", "1M")
        guests.append(subprocess.Popen(["qemu-io", rbd.node(name)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    harness.wait_until(lambda: all(map(rbd.watched, names)), 60)
    began = time.monotonic()
    volumes = module({"pool": rbd.name}, module="storage_volume_info")["volumes"]
    took = time.monotonic() - began
    for guest in guests:
        guest.communicate("quit\n")
    assert all("the client of Ceph" in volume["in_use_by"][0] for volume in volumes) and len(volumes) == 4
    # One after the other, they would be waited for for three seconds each.
    assert took < 11, took


@pytest.mark.parametrize("features", ["layering,exclusive-lock", "layering"])
def test_who_reads_an_image_is_no_writer_where_writers_have_its_lock(rbd, scratch, features):
    """Two hosts at once, each for longer than a client may watch an image and be no user of it."""
    source = make_raw(scratch / "golden.raw", 64 * MIB, pieces=((0, 24),))
    rbd.rbd("import", "--image-feature", features, str(source), "@golden")
    params = {"pool": rbd.name, "source": "golden", "bwlimit": "2MiB"}
    first = start({**params, "name": "one"})
    harness.wait_until(lambda: rbd.watched("golden") and any(map(rbd.watched, rbd.staged())), 30)
    second = start({**params, "name": "two"}, prefix=ELSEWHERE)
    results = [result_of(process) for process in (first, second)]
    if "exclusive-lock" in features:
        assert [result.get("actions") for result in results] == [["created"]] * 2, results
        assert rbd.reads_as("one", source) and rbd.reads_as("two", source)
    else:
        assert [result.get("error_code") for result in results] == [None, "IN_USE"], results
    source.unlink()


# --- secrets ---------------------------------------------------------------------------------------------------------------


def test_no_command_line_and_no_result_has_the_key(rbd, base, scratch, pool2):
    log = scratch / "argv.log"
    traced = ["strace", "-qq", "-f", "-s", "65536", "-e", "trace=execve", "-o", str(log)]
    texts = []
    for params in ({"pool": rbd.name, "name": "web"}, {"pool": rbd.name, "name": "child", "clone_type": "linked"}):
        texts.append(json.dumps(result_of(start({"source": base, **params}, prefix=traced))))
        texts.append(log.read_text())
    assert "qemu-img" in texts[1] and "class Cluster" in texts[1]
    assert not any(rbd.ceph.key in text for text in texts)


def test_a_secret_that_cannot_be_read(libvirtd, ceph, rbd, base, scratch, raw):
    private = Pool(ceph, scratch, ceph.pool, private="yes")
    try:
        message = refused("OPERATION_DENIED", pool=private.name, source=base, name="web")
        assert "private" in message and private.secret in message
    finally:
        private.end()
    message = refused("NO_SUPPORT", pool=rbd.name, source=base, name="web", uri="storage:///system")
    assert "qemu:///system" in message


def test_a_missing_package_is_named(rbd, raw):
    (library,) = Path("/usr/lib/python3/dist-packages").glob("rbd.cpython-*.so")
    run("mount", "--bind", "/dev/null", library)
    try:
        assert "python3-rbd" in refused("MISSING_DEPENDENCY", pool=rbd.name, source_path=raw, name="web")
    finally:
        run("umount", library)


# --- crashes ---------------------------------------------------------------------------------------------------------------


def test_killed_in_the_middle_nothing_is_left_after_the_next_run(rbd, scratch):
    source = make_raw(scratch / "large.raw", 256 * MIB, pieces=((0, 48),))
    params = {"pool": rbd.name, "source_path": source, "name": "web"}
    process = start({**params, "bwlimit": "4MiB"})
    harness.wait_until(lambda: any(map(rbd.watched, rbd.staged())), 30)
    harness.kill(process)
    (left,) = rbd.staged()
    assert "web" not in rbd.images()
    # What a dead client had open is Ceph's to let go of.
    assert clone(**params)["actions"] == ["created"]
    assert rbd.reads_as("web", source)
    harness.wait_until(lambda: not rbd.watched(left), 20)
    assert clone(pool=rbd.name, source="web", name="other")["actions"] == ["created"]
    assert sorted(rbd.images()) == ["other", "web"]
    source.unlink()


#: another host, as far as locks tell
ELSEWHERE = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /run/lock && exec "$@"', "sh"]


@pytest.mark.parametrize("clone_type", ["full", "linked"])
def test_of_two_hosts_at_once_one_creates(rbd, base, raw, clone_type):
    params = {"pool": rbd.name, "source": base, "name": "web", "clone_type": clone_type}
    first, second = start(params), start(params, prefix=ELSEWHERE)
    results = [result_of(process) for process in (first, second)]
    assert sorted(result.get("actions", [result.get("msg")]) for result in results) == [[], ["created"]]
    assert rbd.reads_as("web", raw) and sorted(rbd.images()) == [base, "web"]


def test_a_cluster_that_hangs_ends_in_timeout(rbd, scratch):
    source = make_raw(scratch / "large.raw", 256 * MIB, pieces=((0, 48),))
    params = {"pool": rbd.name, "source_path": source, "name": "web", "timeout": 6}
    (osd,) = [pid for pid, words in harness.commands() if words.startswith("ceph-osd -i 0")]
    process = start({**params, "bwlimit": "4MiB"})
    try:
        harness.wait_until(lambda: any(map(rbd.watched, rbd.staged())), 30)
        os.kill(osd, signal.SIGSTOP)
        began = time.monotonic()
        result = result_of(process)
        assert result["error_code"] == "TIMEOUT" and "6 s" in result["msg"], result
        # It tries to clean up for 5 s. An OSD that stands still for 20 s is taken for dead by its monitor.
        assert time.monotonic() - began < 20
        # A run that meets it dead ends so too.
        result = result_of(start({**params, "timeout": 2}))
        assert result["error_code"] == "TIMEOUT", result
    finally:
        os.kill(osd, signal.SIGCONT)
    assert "web" not in rbd.images()
    harness.wait_until(lambda: not any(map(rbd.watched, rbd.staged())), 30)
    assert clone(**{**params, "timeout": 120})["actions"] == ["created"]
    assert rbd.images() == ["web"] and rbd.reads_as("web", source)
    source.unlink()


# --- linked clones ---------------------------------------------------------------------------------------------------------


def test_linked_clones_share_one_snapshot(rbd, base, raw):
    params = {"pool": rbd.name, "source": base, "clone_type": "linked"}
    result = settle(**params, name="one")
    volume = result["volume"]
    assert (result["actions"], volume["transfer"], volume["allocation"]) == (["created"], "link", 0)
    assert volume["backing"] == {"path": f"{rbd.pool}/base", "format": "raw", "depth": 1}
    parent = rbd.json("info", "@one")["parent"]
    assert (parent["image"], parent["snapshot"]) == (base, "virtforge-base-1")
    settle(**params, volumes=[{"name": "two"}, {"name": "large", "capacity": "96MiB"}])
    assert rbd.snapshots(base) == ["virtforge-base-1"]
    assert all(rbd.reads_as(name, raw) for name in ("one", "two", "large"))
    assert settle(**{**params, "source": "one"}, name="below")["volume"]["backing"]["depth"] == 2

    # What is written to the source later is in later clones, and only there.
    rbd.write(base, 40 * MIB, 7)
    settle(**params, name="later")
    assert rbd.json("info", "@later")["parent"]["snapshot"] == "virtforge-base-2"
    assert rbd.reads_as("one", raw) and not rbd.reads_as("later", raw)
    assert clone(**params, name="one")["actions"] == []


def test_looking_at_linked_clones_again_and_again(rbd, base):
    """librbd as it comes uses memory that it has given back: seldom noticed, but for what malloc does to it here."""
    clone(pool=rbd.name, source=base, name="child", clone_type="linked")
    command = [harness.PYTHON, "-I", rbd_child.__file__, rbd.ceph.conf, "admin"]
    requests = (json.dumps(["info", [rbd.pool, ""], "child"]) + "\n") * 40

    def look(_number):
        env = {"MALLOC_PERTURB_": "165"}
        asked = subprocess.run(command, input=requests, env=env, capture_output=True, text=True, check=False)
        return asked.returncode, asked.stdout.count('"done"')

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(look, range(24))) == [(0, 40)] * 24


def test_a_linked_clone_of_a_large_image_costs_what_a_small_one_costs(rbd, base):
    rbd.rbd("create", "@huge", "--size", "1T")
    rbd.write("huge", 1 << 39, 7)
    params = {"pool": rbd.name, "clone_type": "linked"}
    small = clone(**params, source=base, name="one")["volume"]["duration"]
    large = clone(**params, source="huge", name="two")["volume"]["duration"]
    assert large < 3 * small + 1, (small, large)


def test_linked_or_not_is_told(rbd, base, raw, pool2, qcow2):
    params = {"pool": rbd.name, "source": base}
    clone(**params, name="child", clone_type="linked")
    clone(**params, name="full")
    assert f"{rbd.pool}/base" in refused("DIFFERS", **params, name="child", clone_type="full")
    assert "no backing store" in refused("DIFFERS", **params, name="full", clone_type="linked")
    assert f"'{rbd.pool}/full'" in refused("DIFFERS", pool=rbd.name, source="full", name="child", clone_type="linked")
    assert clone(**params, name="child")["actions"] == []
    assert settle(**params, name="child", clone_type="full", force=True)["actions"] == ["replaced"]
    # Its last child is gone, and so is the snapshot.
    assert rbd.snapshots(base) == [] and rbd.reads_as("child", raw)
    linked = {"clone_type": "linked", "name": "web"}
    assert "rbd pool" in refused("NO_SUPPORT", pool=rbd.name, source_path=raw, **linked)
    assert "network" in refused("NO_SUPPORT", pool=pool2, source_pool=rbd.name, source=base, **linked)
    rbd.rbd("create", "@plain", "--size", "1M", "--image-feature", "exclusive-lock")
    assert "layering" in refused("NO_SUPPORT", pool=rbd.name, source="plain", **linked)
    assert rbd.snapshots("plain") == []


def test_linked_to_another_pool_of_the_cluster(rbd, base, raw, other_ceph_pool):
    try:
        result = settle(pool=other_ceph_pool.name, source_pool=rbd.name, source=base, name="web", clone_type="linked")
        assert result["volume"]["backing"]["path"] == f"{rbd.pool}/base"
        assert other_ceph_pool.reads_as("web", raw)
    finally:
        other_ceph_pool.empty()


def test_flattening_removes_our_snapshot_with_its_last_child(rbd, base, raw):
    rbd.rbd("snap", "create", "@base@theirs")
    for name in ("one", "two"):
        clone(pool=rbd.name, source=base, name=name, clone_type="linked")
    result = settle("storage_volume", pool=rbd.name, name="one", flatten=True, capacity="96MiB")
    assert result["actions"] == ["flattened", "grown"] and result["volume"]["backing"] is None
    assert rbd.snapshots(base) == ["theirs", "virtforge-base-1"]
    assert settle("storage_volume", pool=rbd.name, name="two", flatten=True)["actions"] == ["flattened"]
    assert rbd.snapshots(base) == ["theirs"]
    assert rbd.reads_as("one", raw) and "parent" not in rbd.json("info", "@two")


METHODS = """
import json, sys
from ansible_collections.virtforge.libvirt.plugins.module_utils._errors import CloneError
from ansible_collections.virtforge.libvirt.plugins.module_utils._pools.libvirt import Connection
pool = Connection("qemu:///system").pool(sys.argv[1])
try:
    print(json.dumps(getattr(pool, sys.argv[2])(sys.argv[3])))
except CloneError as exc:
    print(json.dumps([exc.code, exc.msg]))
"""


def call(pool, method, name):
    command = [harness.PYTHON, "-c", METHODS, pool.name, method, name]
    return json.loads(run(*command, env=harness.environment()))


def test_growing_never_shrinks(rbd, base):
    """The image may have grown since it was looked at."""
    grow = METHODS.replace("(sys.argv[3])", "(pool.volume(sys.argv[3]), 1 << 20)")
    code, message = json.loads(run(harness.PYTHON, "-c", grow, rbd.name, "grow", base, env=harness.environment()))
    assert "growing volume 'base'" in message, (code, message)
    assert rbd.json("info", "@base")["size"] == 64 * MIB


def test_an_image_that_was_cloned_meanwhile_is_not_replaced(rbd, base):
    clone(pool=rbd.name, source=base, name="child", clone_type="linked")
    rbd.rbd("create", "@new", "--size", "1M")
    publish = METHODS.replace("(sys.argv[3])", "('new', sys.argv[3], True)")
    code, message = json.loads(run(harness.PYTHON, "-c", publish, rbd.name, "publish", base, env=harness.environment()))
    assert code == "IN_USE" and "'child'" in message
    assert sorted(rbd.images()) == [base, "child", "new"]


def test_space_is_what_the_cluster_has_now(rbd):
    available = METHODS.replace("(sys.argv[3])", "()")
    found = json.loads(run(harness.PYTHON, "-c", available, rbd.name, "available", "", env=harness.environment()))
    stats = json.loads(run("ceph", "-c", rbd.ceph.conf, "df", "--format=json"))["stats"]
    assert abs(found - stats["total_avail_bytes"]) < 512 * MIB


def test_an_image_is_deleted_with_what_was_made_for_it(rbd, base, raw, other_ceph_pool):
    try:
        clone(pool=rbd.name, source=base, name="one", clone_type="linked")
        clone(pool=other_ceph_pool.name, source_pool=rbd.name, source=base, name="two", clone_type="linked")
        assert call(rbd, "dependents", base) == ["one", "second/two"]
        code, message = call(rbd, "remove", base)
        assert code == "OPERATION_INVALID" and "linked clones" in message
        assert call(other_ceph_pool, "remove", "two") is None
        assert rbd.snapshots(base) == ["virtforge-base-1"]
        assert call(rbd, "remove", "one") is None
        assert rbd.snapshots(base) == [] and rbd.images() == [base]
    finally:
        other_ceph_pool.empty()
    rbd.rbd("snap", "create", "@base@theirs")
    assert call(rbd, "dependents", base) == ["base@theirs"]
    code, message = call(rbd, "remove", base)
    assert code == "OPERATION_INVALID" and "'theirs'" in message
    rbd.write(base, 40 * MIB, 7)
    message = refused("OPERATION_INVALID", pool=rbd.name, source_path=raw, name=base, compare="content", force=True)
    assert "base@theirs" in message
    rbd.rbd("snap", "rm", "@base@theirs")
    assert call(rbd, "remove", base) is None
    assert rbd.images() == []


def test_a_check_run_takes_nothing(rbd, base):
    result = check(pool=rbd.name, source=base, name="web", clone_type="linked")
    assert result["actions"] == ["created"] and result["volume"]["backing"]["path"] == f"{rbd.pool}/base"
    assert rbd.images() == [base] and rbd.snapshots(base) == []


# --- the documentation -------------------------------------------------------------------------------------------------------


def test_the_inventory_of_a_fleet(rbd, ceph, example_names, scratch, libvirtd):
    """As it stands, but for where the image is: two hosts at once, and a second run that changes nothing."""
    text = (harness.ROOT / "docs" / "ceph_fleet.md").read_text()
    inventory, play = (yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL))
    image = scratch / "debian-13.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, "64M")
    stated = inventory["hypervisors"]["vars"]
    stated["storage_clones"][0]["source_path"] = str(image)
    stated.update(ansible_connection="local", ansible_python_interpreter=harness.PYTHON, ceph_key=ceph.key)
    book, hosts = scratch / "fleet.yml", scratch / "fleet-inventory.yml"
    hosts.write_text(yaml.safe_dump(inventory))
    book.write_text(yaml.safe_dump([{**play[0], "gather_facts": False}]))
    run_with = ("-i", hosts, book, "--limit")
    try:
        # They have one libvirtd here, so the pool is made first.
        status, output = ansible_playbook(*run_with, "kvm1.example.com", "-e", '{"storage_clones": []}')
        assert status == 0 and counts(output) == 1, output
        with ThreadPoolExecutor(2) as at_once:
            runs = [
                at_once.submit(ansible_playbook, *run_with, f"kvm{number}.example.com", prefix=prefix)
                for number, prefix in ((1, ()), (2, ELSEWHERE))
            ]
        outputs = [done.result()[1] for done in runs]
        assert [counts(output) for output in outputs] == [1, 1], outputs
        # Of the golden image, one has made it and the other has found it there.
        told = re.findall(r"(\w+): \[kvm\d.example.com\] => \(item=vms: debian-13\)", "".join(outputs))
        assert sorted(told) == ["changed", "ok"], outputs
        status, output = ansible_playbook("-i", hosts, "--forks", "1", book)
        assert status == 0 and output.count("changed=0") == 2, output
        assert ceph.key not in output + "".join(outputs)
        assert sorted(rbd.images()) == ["debian-13", "kvm1-web", "kvm2-web"]
        assert rbd.json("info", "@kvm2-web")["parent"]["image"] == "debian-13"
        # What is shown of a failure has no key in it either, however much is asked to be shown.
        stated["storage_pools"][0]["type"] = "logical"
        hosts.write_text(yaml.safe_dump(inventory))
        status, output = ansible_playbook("-vvv", "-i", hosts, "--limit", "kvm1.example.com", book)
        assert status == 2 and "fatal: [kvm1.example.com]" in output and ceph.key not in output, output
    finally:
        remove_pool("vms")
        image.unlink()
