# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""storage_volume, present: volumes that are made from nothing, and grown; in a directory and in a pool of libvirt."""

from __future__ import annotations

import os

import harness
import pytest
from harness import GIB, MIB, allocated, clone, held, info, refused, run, settle, virsh, wait_until, warnings

VOLUME = "storage_volume"


@pytest.mark.parametrize(
    "stated, image_format, capacity",
    [
        ({"capacity": "1GiB"}, "raw", GIB),
        ({"capacity": "100000001"}, "raw", 100_000_001),
        ({"capacity": "40GiB", "format": "qcow2"}, "qcow2", 40 * GIB),
        ({"capacity": "100000001", "format": "qcow2"}, "qcow2", 100_000_256),
        ({"size": "1GiB", "format": "vmdk"}, "vmdk", GIB),
        ({"capacity": "1GiB", "format": "vdi"}, "vdi", GIB),
        ({"capacity": "1GiB", "format": "vhdx"}, "vhdx", GIB),
        ({"capacity": "1GiB", "format": "vpc"}, "vpc", GIB),
        ({"capacity": "1GiB", "format": "qed"}, "qed", GIB),
        ({"capacity": "1GiB", "format": "qcow"}, "qcow", GIB),
        ({"capacity": "0"}, "raw", 0),
        ({"capacity": "16TiB"}, "raw", 16 << 40),
    ],
)
def test_absent_is_made_blank_and_takes_no_space(either, pool, stated, image_format, capacity):
    result = settle(VOLUME, pool=either, name="data", **stated)
    assert (result["changed"], result["actions"]) == (True, ["created"])
    volume = result["volume"]
    assert (volume["format"], volume["capacity"], volume["transfer"], volume["shared"]) == (image_format, capacity, None, None)
    assert "source" not in result
    assert (volume["owner"], volume["mode"]) == ("root", "0600")
    path = pool / "data"
    if image_format == "raw":
        assert path.stat().st_size == capacity
    else:
        assert info(path, image_format)["virtual-size"] == capacity
    assert allocated(path) <= 4 * MIB
    if not either.startswith("/"):
        assert "data" in virsh("vol-list", either)


@pytest.mark.parametrize("image_format", ["raw", "qcow2", "qed"])
def test_smaller_than_stated_is_grown_and_keeps_its_data(either, pool, image_format):
    settle(VOLUME, pool=either, name="data", capacity="64M", format=image_format)
    run("qemu-io", "-f", image_format, "-c", "write -P 7 1M 1M", pool / "data")
    result = settle(VOLUME, pool=either, name="data", capacity="1G")
    assert (result["actions"], result["volume"]["capacity"]) == (["grown"], GIB)
    run("qemu-io", "-f", image_format, "-c", "read -P 7 1M 1M", "-c", "read -P 0 2M 60M", pool / "data")
    assert str(64 * MIB) in refused("DIFFERS", VOLUME, pool=either, name="data", capacity="64M")
    message = refused("DIFFERS", VOLUME, pool=either, name="data", capacity="2G", resize=False)
    assert "resize" in message and str(2 * GIB) in message


def test_a_format_that_cannot_grow_says_so(pool):
    settle(VOLUME, pool=pool, name="data", capacity="64M", format="vdi")
    assert "vdi" in refused("NO_SUPPORT", VOLUME, pool=pool, name="data", capacity="65M")


def test_a_volume_that_exists_is_judged_on_what_is_stated(either, pool, qcow2):
    clone(pool=either, source="base.qcow2", name="web")
    assert settle(VOLUME, pool=either, name="web")["actions"] == []
    assert settle(VOLUME, pool=either, name="web", format="qcow2", capacity="64M")["actions"] == []
    message = refused("DIFFERS", VOLUME, pool=either, name="web", format="raw")
    assert "qcow2" in message and "raw" in message


def test_force_replaces_by_a_blank_volume(either, pool, qcow2):
    clone(pool=either, source="base.qcow2", name="web")
    before = (pool / "web").stat().st_ino
    result = settle(VOLUME, pool=either, name="web", format="raw", capacity="1M", force=True)
    assert result["actions"] == ["replaced"]
    assert (pool / "web").read_bytes() == bytes(MIB)
    assert (pool / "web").stat().st_ino != before


@pytest.mark.parametrize("of", [VOLUME, harness.CLONE])
def test_force_does_not_replace_what_others_depend_on(libvirt_pool, libvirt_pool2, pool, pool2, qcow2, of):
    before = harness.fingerprint(qcow2)
    for path in (pool / "web", pool2 / "other"):
        run("qemu-img", "create", "-q", "-f", "qcow2", "-b", qcow2, "-F", "qcow2", path)
    stated = {"source": "base.raw", "format": "raw"} if of == harness.CLONE else {"format": "raw", "capacity": "1M"}
    message = refused("OPERATION_INVALID", of, pool=libvirt_pool, name="base.qcow2", force=True, **stated)
    assert f"cannot be replaced: 2 volumes depend on it: {pool2 / 'other'}, web" in message
    assert "web" in refused("OPERATION_INVALID", of, pool=pool, name="base.qcow2", force=True, **stated)
    assert harness.fingerprint(qcow2) == before
    (pool / "web").unlink()
    (pool2 / "other").unlink()
    assert settle(of, pool=libvirt_pool, name="base.qcow2", force=True, **stated)["actions"] == ["replaced"]


def test_clones_that_replace_what_others_depend_on_fail_alone(pool, qcow2):
    for number in range(3):
        clone(pool=pool, source="base.qcow2", name=f"web{number}")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", pool / "web1", "-F", "qcow2", pool / "above")
    params = {"pool": pool, "source": "base.raw", "force": True, "volumes": [{"name": f"web{number}"} for number in range(3)]}
    result = harness.module(params)
    assert [volume["error_code"] for volume in result["volumes"]] == [None, "OPERATION_INVALID", None]
    assert info(pool / "web1", "qcow2")["virtual-size"] == 64 * MIB


def test_owner_group_and_mode(either, pool):
    settle(VOLUME, pool=either, name="data", capacity="1M", owner="64055", group="108", mode="0640")
    status = (pool / "data").stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (64055, 108, 0o640)
    assert settle(VOLUME, pool=either, name="data", mode="u=rw,g=rw")["actions"] == ["permissions"]
    assert (pool / "data").stat().st_mode & 0o7777 == 0o660


@pytest.mark.parametrize("mode", ["off", "falloc", "full"])
@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_preallocation(any_pool, mode, image_format):
    settle(VOLUME, pool=any_pool, name="data", capacity="32M", format=image_format, preallocation=mode)
    assert (allocated(any_pool / "data") >= 32 * MIB) == (mode != "off")


def test_preallocation_of_metadata_is_for_qcow2(pool):
    settle(VOLUME, pool=pool, name="data", capacity="32M", format="qcow2", preallocation="metadata")
    assert info(pool / "data", "qcow2")["virtual-size"] == 32 * MIB
    assert "raw" in refused("CONFIG_UNSUPPORTED", VOLUME, pool=pool, name="no", capacity="1M", preallocation="metadata")


def test_options_of_qcow2(pool):
    options = {"cluster_size": "4k", "lazy_refcounts": True, "refcount_bits": 64, "compression_type": "zstd", "compat": "1.1"}
    settle(VOLUME, pool=pool, name="data", capacity="32M", format="qcow2", qcow2=options)
    found = info(pool / "data", "qcow2")
    special = found["format-specific"]["data"]
    assert found["cluster-size"] == 4096
    assert (special["lazy-refcounts"], special["refcount-bits"], special["compression-type"]) == (True, 64, "zstd")
    assert "qcow2" in refused("INVALID_ARG", VOLUME, pool=pool, name="no", capacity="1M", format="raw", qcow2=options)


def test_nocow_on_btrfs(file_systems):
    place = harness.Path(file_systems["btrfs"])
    settle(VOLUME, pool=place, name="nocow.qcow2", capacity="32M", format="qcow2", qcow2={"nocow": True})
    assert harness.flags_of(place / "nocow.qcow2") & 0x00800000
    (place / "nocow.qcow2").unlink()


def test_a_description_in_xml_and_parameters_that_win_over_it(either, pool):
    xml = """<volume><name>data</name><capacity unit='MiB'>100</capacity><allocation>0</allocation>
      <target><format type='qcow2'/><permissions><mode>0640</mode><owner>7</owner><group>8</group></permissions>
      <clusterSize unit='KiB'>4</clusterSize></target></volume>"""
    settle(VOLUME, pool=either, xml=xml)
    found = info(pool / "data", "qcow2")
    assert (found["virtual-size"], found["cluster-size"]) == (100 * MIB, 4096)
    assert (pool / "data").stat().st_uid == 7
    settle(VOLUME, pool=either, xml=xml, name="other", capacity="200M")
    assert info(pool / "other", "qcow2")["virtual-size"] == 200 * MIB
    assert settle(VOLUME, pool=either, xml=xml, state="absent")["actions"] == ["deleted"]
    assert sorted(os.listdir(pool)) == ["other"]


@pytest.mark.parametrize(
    "code, stated, words",
    [
        ("INVALID_ARG", {}, ["capacity", "data"]),
        ("INVALID_ARG", {"name": None, "capacity": "1M"}, ["name", "XML"]),
        ("INVALID_ARG", {"xml": "<volume><capacity>1</capacity></volume>", "name": None}, ["name"]),
        ("INVALID_ARG", {"name": "a/b", "capacity": "1M"}, ["name", "a/b"]),
        ("INVALID_ARG", {"capacity": "much"}, ["capacity", "much"]),
        ("INVALID_ARG", {"capacity": "1M", "wipe": True}, ["wipe", "present"]),
        ("INVALID_ARG", {"capacity": "1M", "wipe_algorithm": "dod"}, ["wipe_algorithm", "dod", "present"]),
        ("INVALID_ARG", {"capacity": "1M", "state": "gone"}, ["state", "gone"]),
        ("INVALID_ARG", {"capacity": "1M", "source": "base"}, ["source"]),
        ("CONFIG_UNSUPPORTED", {"capacity": "1M", "format": "qcow3"}, ["format", "qcow3"]),
        ("CONFIG_UNSUPPORTED", {"capacity": "0", "format": "vmdk"}, ["capacity", "vmdk"]),
        ("NO_SPACE", {"capacity": "100G", "preallocation": "falloc"}, ["data", "pool"]),
        ("NO_STORAGE_POOL", {"pool": "/no/such/directory", "capacity": "1M"}, ["/no/such/directory"]),
        (
            "NO_SUPPORT",
            {"xml": "<volume><backingStore><path>/b</path></backingStore></volume>", "capacity": "1"},
            ["backingStore"],
        ),
        (
            "NO_SUPPORT",
            {"xml": "<volume><target><encryption format='luks'/></target></volume>", "capacity": "1"},
            ["encryption"],
        ),
    ],
)
def test_bad_input(pool, code, stated, words):
    params = {"pool": pool, "name": "data", **stated}
    # A pool that an earlier task would have made is no mistake in a check run.
    result = harness.module(params, module=VOLUME, check=code != "NO_STORAGE_POOL") if code == "NO_STORAGE_POOL" else None
    message = result["msg"] if result else refused(code, VOLUME, **params)
    assert all(word in message for word in words), message
    assert os.listdir(pool) == []


def test_in_check_mode_a_pool_that_is_not_there_yet_is_presumed(libvirtd):
    for place in ("/no/such/directory", "no-such-pool"):
        result = harness.module({"pool": place, "name": "data", "capacity": "1M"}, module=VOLUME, check=True)
        assert result["actions"] == ["created"], result
        assert any(place in warning for warning in warnings(result))


def test_a_volume_in_use_is_neither_grown_nor_replaced(pool):
    settle(VOLUME, pool=pool, name="data", capacity="64M", format="qcow2")
    with held(pool / "data", "qcow2"):
        assert "qemu-io" in refused("IN_USE", VOLUME, pool=pool, name="data", capacity="128M")
        refused("IN_USE", VOLUME, pool=pool, name="data", capacity="1M", force=True)


def test_runs_for_one_volume_make_it_once(pool):
    params = {"pool": pool, "name": "data", "capacity": "1G", "format": "qcow2"}
    results = [harness.result_of(process) for process in [harness.start(params, module=VOLUME) for _run in range(6)]]
    assert sorted(result["actions"] for result in results) == [[]] * 5 + [["created"]]


def test_a_run_that_is_killed_leaves_nothing(pool):
    params = {"pool": pool, "name": "data", "capacity": "1M"}
    slow = ["strace", "-qq", "-o", "/dev/null", "-e", "trace=linkat", "-e", "inject=linkat:delay_enter=5000000"]
    process = harness.start(params, prefix=slow, module=VOLUME)
    wait_until(lambda: harness.unnamed_files(pool), 30)
    harness.kill(process)
    assert os.listdir(pool) == []
    assert settle(VOLUME, **params)["actions"] == ["created"]
