# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Blocks that a clone shares with its source, told by FIEMAP; and why not, where not."""

from __future__ import annotations

import json
import os
import time

import harness
import pytest
from harness import GIB, MIB, allocated, clone, info, make_raw, module, noise, refused, run, same_content, settle

SHARES = ("xfs", "btrfs")


@pytest.fixture(params=SHARES)
def sharing_pool(request, file_systems):
    place = harness.Path(file_systems[request.param]) / "sharing"
    place.mkdir()
    yield place
    run("rm", "-r", place)


def used(place):
    run("sync", "-f", place)
    status = os.statvfs(place)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def make(place, kind):
    """A source with 24 MiB of data, and its format."""
    raw = make_raw(place / "base.raw", 300 * MIB, ((0, 8), (100, 16)))
    if kind == "raw":
        return "base.raw", "raw"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, place / "base.qcow2")
    raw.unlink()
    if kind == "qcow2":
        return "base.qcow2", "qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", place / "overlay.qcow2")
    piece = place / "piece"
    piece.write_bytes(noise(8 * MIB, seed=9))
    run("qemu-io", "-f", "qcow2", "-c", f"write -s {piece} 104M 8M", place / "overlay.qcow2")
    piece.unlink()
    return "overlay.qcow2", "qcow2"


@pytest.mark.parametrize("method", ["auto", "reflink"])
@pytest.mark.parametrize(
    "kind, stated",
    [
        ("raw", {}),
        ("raw", {"capacity": "1GiB"}),
        ("raw", {"format": "qcow2"}),
        ("raw", {"format": "qcow2", "capacity": "40GiB"}),
        ("qcow2", {"capacity": "40GiB"}),
        ("qcow2", {"format": "raw"}),
        ("qcow2", {"qcow2": {"cluster_size": "128k"}}),
        ("chain", {}),
        ("chain", {"format": "raw", "capacity": "1GiB"}),
    ],
)
def test_blocks_are_shared_whatever_is_cloned_to_what(sharing_pool, kind, stated, method):
    name, image_format = make(sharing_pool, kind)
    before = used(sharing_pool)
    result = settle(pool=sharing_pool, source=name, name="web", method=method, **stated)
    volume = result["volume"]
    assert (volume["shared"], volume["fallback_reason"]) == (True, None)
    converted = kind == "chain" or stated.get("format", image_format) != image_format or "qcow2" in stated
    assert volume["transfer"] == ("convert" if converted else "reflink")
    assert used(sharing_pool) - before < 4 * MIB
    assert same_content(sharing_pool / name, image_format, sharing_pool / "web", volume["format"])
    if volume["format"] == "qcow2":
        run("qemu-img", "check", "-q", sharing_pool / "web")


@pytest.mark.parametrize("stated", [{}, {"format": "qcow2"}, {"format": "raw", "capacity": "1GiB"}])
@pytest.mark.parametrize("kind", ["raw", "qcow2", "chain"])
def test_method_copy_shares_nothing(sharing_pool, kind, stated):
    name, image_format = make(sharing_pool, kind)
    volume = settle(pool=sharing_pool, source=name, name="web", method="copy", **stated)["volume"]
    assert (volume["shared"], volume["fallback_reason"]) == (False, None)
    assert same_content(sharing_pool / name, image_format, sharing_pool / "web", volume["format"])


@pytest.mark.parametrize("stated", [{}, {"format": "qcow2"}, {"format": "vdi"}])
def test_where_nothing_can_be_shared_the_result_is_the_same_and_says_why(file_systems, pool, raw, stated):
    ext4 = harness.Path(file_systems["ext4"])
    for place, source, reason in (
        (ext4, {"source_path": make_raw(ext4 / "base.raw", 64 * MIB)}, "the file system cannot share blocks"),
        (ext4, {"source_path": raw}, "source and target are on different file systems"),
    ):
        reason = "a conversion of the format vdi writes new blocks" if stated.get("format") == "vdi" else reason
        volume = settle(pool=place, name="web", **source, **stated)["volume"]
        assert (volume["shared"], volume["fallback_reason"]) == (False, reason)
        assert same_content(raw, "raw", place / "web", volume["format"])
        (place / "web").unlink()
        assert reason in refused("NO_SUPPORT", pool=place, name="web", method="reflink", **source, **stated)
    (ext4 / "base.raw").unlink()


@pytest.mark.parametrize("stated", [{}, {"format": "qcow2"}])
def test_xfs_made_without_reflink_is_found_out_by_trying(small_file_system, stated):
    place = small_file_system("xfs without reflink", 400 * MIB)
    make_raw(place / "base.raw", 64 * MIB)
    volume = settle(pool=place, source="base.raw", name="web", **stated)["volume"]
    assert (volume["shared"], volume["fallback_reason"]) == (False, "the file system cannot share blocks")
    # Only the run can tell.
    result = module({"pool": place, "source": "base.raw", "name": "no", "method": "reflink", **stated})
    assert result["error_code"] == "NO_SUPPORT" and "method=reflink" in result["msg"]
    assert sorted(os.listdir(place)) == ["base.raw", "web"]


@pytest.mark.parametrize("size", [1, 511, 4095, 4096, 4097, 65536 + 5, MIB + 512])
@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_a_source_whose_size_is_no_multiple_of_a_block(sharing_pool, size, image_format):
    (sharing_pool / "base.raw").write_bytes(noise(size))
    settle(pool=sharing_pool, source="base.raw", name="web", format=image_format)
    assert same_content(sharing_pool / "base.raw", "raw", sharing_pool / "web", image_format)
    if image_format == "raw":
        assert (sharing_pool / "web").read_bytes() == noise(size)


@pytest.mark.parametrize("stated", [{}, {"format": "qcow2"}])
@pytest.mark.parametrize("nocow", ["source", "target", "both"])
def test_nocow_directories_of_btrfs_do_not_hinder_sharing(file_systems, nocow, stated):
    place = harness.Path(file_systems["btrfs"]) / "nocow"
    for name in ("source", "target"):
        (place / name).mkdir(parents=True)
        if nocow in (name, "both"):
            run("chattr", "+C", place / name)
    raw = make_raw(place / "source" / "base.raw", 64 * MIB)
    volume = settle(pool=place / "target", source_path=raw, name="web", **stated)["volume"]
    assert (volume["shared"], volume["fallback_reason"]) == (True, None)
    assert same_content(raw, "raw", place / "target" / "web", volume["format"])
    run("rm", "-r", place)


def test_compressed_clusters_have_no_blocks_to_share(pool):
    # All of it compressed.
    (pool / "plain.raw").write_bytes(b"text that can be compressed\n" * 100_000)
    run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", pool / "plain.raw", pool / "base.qcow2")
    volume = settle(pool=pool, source="base.qcow2", name="web", format="raw")["volume"]
    assert volume["shared"] is False and "none of the source's data" in volume["fallback_reason"]
    assert same_content(pool / "plain.raw", "raw", pool / "web", "raw")
    result = module({"pool": pool, "source": "base.qcow2", "name": "no", "format": "raw", "method": "reflink"})
    assert result["error_code"] == "NO_SUPPORT" and "bytes of data could not be shared" in result["msg"], result
    assert not (pool / "no").exists()


@pytest.mark.parametrize("preallocation", ["falloc", "full"])
@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_preallocated_blocks_are_not_shared(pool, raw, preallocation, image_format):
    stated = {"format": image_format, "preallocation": preallocation}
    volume = settle(pool=pool, source="base.raw", name="web", **stated)["volume"]
    assert volume["shared"] is False and preallocation in volume["fallback_reason"]
    assert allocated(pool / "web") >= 64 * MIB
    assert same_content(raw, "raw", pool / "web", image_format)
    assert preallocation in refused("NO_SUPPORT", pool=pool, source="base.raw", name="no", method="reflink", **stated)


def test_a_full_pool_takes_a_clone_that_shares(small_file_system):
    place = small_file_system("xfs", 400 * MIB)
    make_raw(place / "base.raw", 300 * MIB, ((0, 250),))
    for number, image_format in enumerate(("raw", "qcow2")):
        assert settle(pool=place, source="base.raw", name=f"web{number}", format=image_format)["volume"]["shared"]
        message = refused("NO_SPACE", pool=place, source="base.raw", name="no", format=image_format, method="copy")
        assert str(place) in message


# --- bwlimit and verify ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stated", [{}, {"format": "qcow2"}])
def test_bwlimit_holds(file_systems, stated):
    place = harness.Path(file_systems["ext4"])
    raw = make_raw(place / "base.raw", 64 * MIB, ((8, 24),))
    started = time.monotonic()
    volume = clone(pool=place, source_path=raw, name="web", bwlimit="8MiB", **stated)["volume"]
    # How much longer it takes is a matter of what else the machine does.
    assert 0.9 * 24 / 8 <= volume["duration"] <= 24 / 8 + 15, (volume["duration"], time.monotonic() - started)
    assert same_content(raw, "raw", place / "web", volume["format"])
    for name in ("web", "base.raw"):
        (place / name).unlink()


@pytest.mark.parametrize("stated", [{}, {"format": "qcow2"}, {"format": "raw", "capacity": "1GiB"}, {"method": "copy"}])
def test_verify_reads_the_new_volume_once_more(pool, qcow2, stated):
    result = settle(pool=pool, source="base.qcow2", name="web", verify=True, **stated)
    assert result["actions"] == ["created"]


@pytest.mark.parametrize("stated", [{}, {"format": "qcow2"}])
def test_verify_notices_a_disk_that_lies(pool, raw, stated):
    """The program that converts, or the system call that writes, says that it did, and did not."""
    params = {"pool": pool, "source": "base.raw", "name": "web", "verify": True, "method": "copy", **stated}
    lie = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=pwrite64", "-e", "inject=pwrite64:retval=1048576:when=2"]
    result = harness.result_of(harness.start(params, prefix=lie))
    assert result.get("failed"), result
    assert result["error_code"] in ("IO_ERROR", "CORRUPT_IMAGE"), result
    assert not (pool / "web").exists()


# --- many clones ----------------------------------------------------------------------------------------------------------


def names(result):
    return [volume["name"] for volume in result["volumes"]]


def test_many_clones_of_one_source(either, pool, qcow2):
    volumes = [{"name": "a"}, {"name": "b", "capacity": "1GiB"}, {"name": "c", "format": "raw", "mode": "0640"}]
    volumes += [
        {"name": "d", "capacity": "1GiB", "owner": "64055"},
        {"name": "e", "format": "vdi"},
        {"name": "f", "format": "vdi"},
    ]
    result = settle(pool=either, source="base.qcow2", volumes=volumes)
    assert names(result) == ["a", "b", "c", "d", "e", "f"]
    assert result["actions"] == ["created"] and result["source"]["name"] == "base.qcow2"
    assert [diff["after"]["name"] for diff in result["diff"]] == names(result)
    for volume in result["volumes"]:
        assert same_content(qcow2, "qcow2", pool / volume["name"], volume["format"])
        assert (volume["changed"], volume["actions"], volume["error_code"]) == (True, ["created"], None)
        # The second vdi shares the blocks of the first.
        assert volume["shared"] is (volume["name"] != "e") or volume["name"] == "e"
    assert info(pool / "d", "qcow2")["virtual-size"] == GIB
    assert (pool / "d").stat().st_uid == 64055 and (pool / "c").stat().st_mode & 0o777 == 0o640
    if not either.startswith("/"):
        assert all(name in harness.virsh("vol-list", either) for name in "abcdef")


def test_many_are_grown_created_and_left_alone_in_one_task(either, pool, qcow2):
    clone(pool=either, source="base.qcow2", name="small")
    clone(pool=either, source="base.qcow2", name="large", capacity="1GiB")
    volumes = [{"name": "small"}, {"name": "new"}, {"name": "large"}]
    result = settle(pool=either, source="base.qcow2", capacity="1GiB", volumes=volumes)
    assert [volume["actions"] for volume in result["volumes"]] == [["grown"], ["created"], []]
    assert result["actions"] == ["created", "grown"] and len(result["diff"]) == 2


def test_one_bad_volume_does_not_spoil_the_others(either, pool, qcow2):
    clone(pool=either, source="base.qcow2", name="raw", format="raw")
    volumes = [{"name": "a"}, {"name": "raw"}, {"name": "small", "capacity": "1M"}, {"name": "b"}]
    for check in (True, False):
        result = module({"pool": either, "source": "base.qcow2", "volumes": volumes}, check=check)
        assert result["failed"] and result["changed"], result
        assert result["error_code"] == "DIFFERS"
        assert result["msg"].startswith("2 of 4 volumes failed: 'raw': ") and "'small': capacity" in result["msg"]
        codes = [volume["error_code"] for volume in result["volumes"]]
        assert codes == [None, "DIFFERS", "INVALID_ARG", None]
        assert (pool / "a").exists() is (not check)
    assert same_content(qcow2, "qcow2", pool / "b", "qcow2")


@pytest.mark.parametrize("kind", ["xfs", "ext4"])
def test_a_hundred_clones_in_one_task(file_systems, kind, scratch):
    place = harness.Path(file_systems[kind]) / "hundred"
    place.mkdir()
    make_raw(place / "base.raw", 64 * MIB)
    volumes = [{"name": f"web{number}"} for number in range(100)]
    result = settle(pool=place, source="base.raw", format="qcow2", capacity="40GiB", volumes=volumes)
    transfers = [volume["transfer"] for volume in result["volumes"]]
    assert transfers.count("convert") == 1 and transfers.count("reflink" if kind == "xfs" else "copy") == 99
    assert all(info(place / volume["name"], "qcow2")["virtual-size"] == 40 * GIB for volume in volumes[::25])
    for volume in volumes[::11]:
        assert same_content(place / "base.raw", "raw", place / volume["name"], "qcow2")
        run("qemu-img", "check", "-q", place / volume["name"])
    run("rm", "-r", place)


def test_a_thousand_volumes_that_are_there_cost_little(pool, raw):
    params = {"pool": pool, "source": "base.raw", "volumes": [{"name": f"web{number}"} for number in range(1000)]}
    clone(**params)
    nothing = {"pool": pool, "source": "base.raw", "name": "web0"}
    spent = {}
    for name, what in 3 * (("nothing", nothing), ("thousand", params)):
        started = time.monotonic()
        assert not clone(**what)["changed"]
        spent[name] = min(spent.get(name, 99), time.monotonic() - started)
    # A process for each would take 20 s.
    assert spent["thousand"] - spent["nothing"] < 8, spent


def test_more_clones_than_the_pool_has_space_for(small_file_system):
    """ext4 shares nothing: each takes 40 MiB, and some of them fit."""
    place = small_file_system("ext4", 200 * MIB)
    make_raw(place / "base.raw", 64 * MIB, ((0, 40),))
    result = module({"pool": place, "source": "base.raw", "volumes": [{"name": f"web{number}"} for number in range(8)]})
    codes = [volume["error_code"] for volume in result["volumes"]]
    assert 0 < codes.count(None) < 8 and set(codes) == {None, "NO_SPACE"}, codes
    for volume in result["volumes"]:
        assert (place / volume["name"]).exists() is (volume["error_code"] is None)


def test_many_runs_for_the_same_volumes_make_each_once(pool, raw):
    params = {"pool": pool, "source": "base.raw", "volumes": [{"name": f"web{number}"} for number in range(10)]}
    results = [harness.result_of(process) for process in [harness.start(params) for _run in range(4)]]
    made = [volume["name"] for result in results for volume in result["volumes"] if volume["actions"]]
    assert sorted(made) == sorted(volume["name"] for volume in params["volumes"]), [result.get("msg") for result in results]


def test_many_clones_that_are_killed_leave_nothing(pool, raw):
    params = {
        "pool": pool,
        "source": "base.raw",
        "format": "qcow2",
        "volumes": [{"name": f"web{number}"} for number in range(20)],
    }
    slow = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=syncfs", "-e", "inject=syncfs:delay_enter=5000000"]
    process = harness.start(params, prefix=slow)
    harness.wait_until(lambda: len(harness.unnamed_files(pool)) == 20, 30)
    harness.kill(process)
    assert os.listdir(pool) == ["base.raw"]
    assert len(settle(**params)["volumes"]) == 20


def test_syncfs_that_fails_is_made_good_one_by_one(pool, raw):
    params = {"pool": pool, "source": "base.raw", "volumes": [{"name": f"web{number}"} for number in range(5)]}
    fail = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=syncfs", "-e", "inject=syncfs:error=EIO"]
    assert harness.result_of(harness.start(params, prefix=fail))["changed"]
    both = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=syncfs,fsync", "-e", "inject=syncfs,fsync:error=EIO"]
    result = harness.result_of(harness.start({**params, "volumes": [{"name": f"new{n}"} for n in range(5)]}, prefix=both))
    assert result["failed"] and result["error_code"] == "IO_ERROR"
    assert not any(name.startswith("new") for name in os.listdir(pool))


@pytest.mark.parametrize(
    "stated, words",
    [
        ({"volumes": []}, ["volumes"]),
        ({"volumes": [{"name": "a"}, {"name": "a"}]}, ["volumes[1]", "twice"]),
        ({"volumes": [{"name": "a"}], "name": "b"}, ["volumes", "name"]),
        ({"volumes": [{"name": "a"}], "xml": "<volume/>"}, ["volumes", "xml"]),
        ({"volumes": [{"capacity": "1G"}]}, ["name"]),
        ({"volumes": [{"name": "a", "size": "1G"}]}, ["size"]),
        ({"volumes": [{"name": "a"}, {"name": "b", "capacity": "much"}]}, ["volumes[1]", "capacity", "much"]),
        ({"volumes": [{"name": "a", "xml": "<volume>"}]}, ["volumes[0]", "xml"]),
        ({"bwlimit": "fast"}, ["bwlimit", "fast"]),
        ({"bwlimit": "0"}, ["bwlimit", "0"]),
        ({"verify": "perhaps"}, ["verify", "perhaps"]),
    ],
)
def test_bad_input(pool, raw, stated, words):
    code = "XML_ERROR" if stated.get("volumes", [{}])[:1] == [{"name": "a", "xml": "<volume>"}] else "INVALID_ARG"
    message = refused(code, pool=pool, source="base.raw", **stated)
    assert all(word in message for word in words), message


def test_many_volumes_described_in_xml(pool, qcow2):
    xml = "<volume><name>ignored</name><capacity unit='MiB'>{}</capacity><target><format type='{}'/></target></volume>"
    volumes = [{"name": "a", "xml": xml.format(100, "raw")}, {"name": "b", "xml": xml.format(200, "qcow2")}]
    result = settle(pool=pool, source="base.qcow2", volumes=volumes)
    assert [(volume["format"], volume["capacity"]) for volume in result["volumes"]] == [
        ("raw", 100 * MIB),
        ("qcow2", 200 * MIB),
    ]


def test_results_of_many_are_json_with_whole_numbers(pool, raw):
    result = settle(pool=pool, source="base.raw", volumes=[{"name": "a"}])
    (volume,) = json.loads(json.dumps(result["volumes"]))
    assert all(isinstance(volume[key], int) for key in ("capacity", "allocation", "physical"))
