# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Linked clones: overlays of their source, in a directory and in a pool of libvirt."""

from __future__ import annotations

import os
import time

import harness
import pytest
from harness import GIB, MIB, clone, held, info, module, refused, run, same_content, settle, virsh, warnings

LINKED = {"clone_type": "linked"}


def recorded(path):
    """Path and format of the backing store, as the image has them."""
    found = info(path, "qcow2")
    return found.get("backing-filename"), found.get("backing-filename-format")


def write(path, at, pattern=7, image_format="qcow2"):
    assert "rror" not in run("qemu-io", "-f", image_format, "-c", f"write -P {pattern} {at} 1M", path)


@pytest.fixture
def web(either, pool, qcow2):
    """A volume that exists: a linked clone of base.qcow2."""
    clone(pool=either, source="base.qcow2", name="web", **LINKED)
    return pool / "web"


# --- absent ---------------------------------------------------------------------------------------------------------------


def test_absent_is_made_an_overlay(either, pool, qcow2):
    qcow2.chmod(0o640)
    result = settle(pool=either, source="base.qcow2", name="web", **LINKED)
    assert (result["changed"], result["actions"]) == (True, ["created"])
    volume, path = result["volume"], pool / "web"
    assert (volume["format"], volume["capacity"], volume["mode"]) == ("qcow2", 64 * MIB, "0640")
    assert (volume["transfer"], volume["fallback_reason"], volume["dropped"]) == ("link", None, [])
    assert volume["backing"] == {"path": str(qcow2), "format": "qcow2", "depth": 1}
    assert harness.allocated(path) < MIB
    assert same_content(qcow2, "qcow2", path, "qcow2")


def test_the_source_may_have_any_format(libvirt_pool, pool, raw):
    for image_format in ("raw", "qcow2", "vmdk", "vdi", "vhdx", "vpc", "qed", "qcow"):
        source, path = pool / f"base.{image_format}", pool / f"web.{image_format}"
        if image_format != "raw":
            options = ["-o", "force_size=on"] if image_format == "vpc" else []
            run("qemu-img", "convert", "-f", "raw", "-O", image_format, *options, raw, source)
        volume = clone(pool=libvirt_pool, source=source.name, name=path.name, **LINKED)["volume"]
        assert volume["backing"] == {"path": str(source), "format": image_format, "depth": 1}
        assert recorded(path) == (str(source), image_format)
        assert same_content(raw, "raw", path, "qcow2")
        document = virsh("vol-dumpxml", "--pool", libvirt_pool, path.name)
        below = document[document.index("<backingStore>") :]
        assert f"<path>{source}</path>" in below
        # libvirt knows no vhdx.
        assert f"<format type='{image_format}'/>" in below or image_format == "vhdx"


def test_the_ending_of_a_name_that_is_made_up_is_that_of_an_overlay(pool, raw):
    assert clone(pool=pool, source="base.raw", **LINKED)["volume"]["name"] == "base-clone.qcow2"


def test_the_source_may_be_an_overlay_and_lie_in_another_pool(pool, pool2, qcow2):
    clone(pool=pool, source="base.qcow2", name="mid", **LINKED)
    write(pool / "mid", 5 * MIB)
    result = settle(pool=pool2, source_pool=pool, source="mid", name="top", **LINKED)
    assert result["volume"]["backing"] == {"path": str(pool / "mid"), "format": "qcow2", "depth": 2}
    assert same_content(pool / "mid", "qcow2", pool2 / "top", "qcow2")


@pytest.mark.parametrize("stated, capacity", [({"capacity": "100000001"}, 100_000_256), ({}, 1_024_512)])
def test_its_capacity_is_as_stated_or_the_sources_rounded_up(pool, stated, capacity):
    harness.make_raw(pool / "odd.raw", 1_024_001, pieces=((0, 1000),), unit=1024)
    result = settle(pool=pool, source="odd.raw", name="web", **stated, **LINKED)
    assert result["volume"]["capacity"] == info(pool / "web", "qcow2")["virtual-size"] == capacity
    assert same_content(pool / "odd.raw", "raw", pool / "web", "qcow2")


def test_options_of_qcow2_are_those_stated_and_else_the_sources(pool, qcow2):
    clone(pool=pool, source="base.qcow2", name="fine", qcow2={"extended_l2": True, "cluster_size": "128k"}, **LINKED)
    found = info(pool / "fine", "qcow2")
    assert (found["cluster-size"], found["format-specific"]["data"]["extended-l2"]) == (131072, True)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "compat=0.10,cluster_size=4k", pool / "old", "64M")
    clone(pool=pool, source="old", name="web", **LINKED)
    found = info(pool / "web", "qcow2")
    assert (found["cluster-size"], found["format-specific"]["data"]["compat"]) == (4096, "0.10")


def test_clusters_too_small_for_the_path_are_refused(pool, qcow2):
    message = refused("CONFIG_UNSUPPORTED", pool=pool, source="base.qcow2", name="web", qcow2={"cluster_size": "512"}, **LINKED)
    assert "qcow2.cluster_size" in message and str(qcow2) in message


def test_raw_bytes_that_look_like_an_image_are_recorded_as_raw(pool, qcow2):
    stated = {"pool": pool, "source": "base.qcow2", "name": "web", **LINKED}
    result = settle(source_format="raw", **stated)
    assert recorded(pool / "web") == (str(qcow2), "raw")
    assert result["volume"]["capacity"] == -(-qcow2.stat().st_size // 512) * 512
    message = refused("DIFFERS", **stated)
    assert "raw" in message and "qcow2" in message


def test_nothing_is_asked_of_a_name_while_it_is_made(pool, qcow2, scratch):
    """qemu-img opens neither the source by its path, nor the target by any."""
    trace = scratch / "trace"
    params = {"pool": pool, "source": "base.qcow2", "name": "web", **LINKED}
    prefix = ["strace", "-f", "-qq", "-s", "4096", "-e", "trace=execve,openat", "-o", trace]
    assert module(params, prefix=prefix)["actions"] == ["created"]
    lines = trace.read_text().splitlines()
    programs = {line.split()[0] for line in lines if "execve(" in line and "qemu-img" in line}
    assert programs
    opened = [line for line in lines if "openat(" in line and line.split()[0] in programs]
    assert not [line for line in opened if str(pool) in line]


def test_permissions_of_a_new_one(pool, qcow2):
    os.chown(qcow2, 1234, 1235)
    settle(pool=pool, source="base.qcow2", name="mine", owner="root", mode="0600", **LINKED)
    status = (pool / "mine").stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (0, 1235, 0o600)


def test_the_path_is_the_one_that_everybody_uses(pool, qcow2):
    """A pool that is reached by a link keeps its name; a volume that is one stands for its file."""
    (pool / "alias.qcow2").symlink_to("base.qcow2")
    link = pool.parent / f"{pool.name}-link"
    link.symlink_to(pool)
    try:
        clone(pool=link, source="alias.qcow2", name="web", **LINKED)
        assert recorded(pool / "web") == (str(link / "base.qcow2"), "qcow2")
        assert not clone(pool=pool, source="base.qcow2", name="web", **LINKED)["changed"]
    finally:
        link.unlink()


# --- exists ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stated", [{}, {"capacity": "64MiB", "format": "qcow2", "force": True, "compare": "content"}])
def test_as_stated_is_unchanged(either, web, qcow2, stated):
    before = harness.fingerprint(web)
    result = settle(pool=either, source="base.qcow2", name="web", **stated, **LINKED)
    assert (result["changed"], result["diff"]["before"]) == (False, result["diff"]["after"])
    assert result["volume"]["backing"] == {"path": str(qcow2), "format": "qcow2", "depth": 1}
    assert harness.fingerprint(web) == before


@pytest.mark.parametrize("either", ["directory"], indirect=True)
def test_smaller_than_stated_is_grown(either, web):
    write(web, 2 * MIB)
    result = settle(pool=either, source="base.qcow2", name="web", capacity="1GiB", **LINKED)
    assert (result["actions"], info(web, "qcow2")["virtual-size"]) == (["grown"], GIB)
    assert result["volume"]["backing"]["depth"] == 1
    run("qemu-io", "-f", "qcow2", "-c", "read -P 7 2M 1M", "-c", "read -P 0 64M 900M", web)


def test_one_that_stands_alone_or_on_another_source_differs(either, pool, qcow2, raw):
    clone(pool=either, source="base.qcow2", name="full")
    clone(pool=either, source="base.raw", name="other", **LINKED)
    for name, word in (("full", "no backing store"), ("other", str(raw))):
        before = harness.fingerprint(pool / name)
        message = module({"pool": either, "source": "base.qcow2", "name": name, **LINKED})["msg"]
        assert all(text in message for text in (name, word, str(qcow2), "differs")), message
        assert harness.fingerprint(pool / name) == before
    result = settle(pool=either, source="base.qcow2", name="other", force=True, **LINKED)
    assert result["actions"] == ["replaced"]
    assert recorded(pool / "other") == (str(qcow2), "qcow2")


@pytest.mark.parametrize("either", ["directory"], indirect=True)
def test_a_linked_one_is_replaced_by_a_full_one_with_force(either, web, qcow2):
    assert "full" in refused("DIFFERS", pool=either, source="base.qcow2", name="web", clone_type="full")
    result = settle(pool=either, source="base.qcow2", name="web", clone_type="full", force=True)
    assert result["actions"] == ["replaced"]
    assert result["diff"]["before"]["backing"] == {"path": str(qcow2), "format": "qcow2", "depth": 1}
    assert (result["diff"]["after"]["backing"], result["volume"]["backing"]) == (None, None)
    assert recorded(web) == (None, None)


@pytest.mark.parametrize("either", ["directory"], indirect=True)
def test_other_content_differs_only_when_asked(either, web):
    write(web, 10 * MIB)
    stated = {"pool": either, "source": "base.qcow2", "name": "web", **LINKED}
    assert not clone(**stated)["changed"]
    assert module({**stated, "compare": "content"})["error_code"] == "DIFFERS"
    assert settle(compare="content", force=True, **stated)["actions"] == ["replaced"]


@pytest.mark.parametrize("either", ["directory"], indirect=True)
def test_without_its_source_it_is_judged_by_the_path(either, web, qcow2):
    qcow2.unlink()
    result = settle(pool=either, source="base.qcow2", name="web", **LINKED)
    assert not result["changed"] and any("base.qcow2" in warning for warning in warnings(result))
    assert result["volume"]["backing"] == {"path": str(qcow2), "format": "qcow2", "depth": None}
    refused("DIFFERS", pool=either, source="gone.qcow2", name="web", **LINKED)


@pytest.mark.parametrize("backing", ["outside", "nbd:unix:/nowhere", "json:{}", "gone"])
def test_a_backing_store_elsewhere_is_told_as_recorded_and_not_opened(pool, pool2, qcow2, scratch, backing):
    if backing == "outside":
        backing = str(harness.make_raw(pool2 / "outside", MIB, ()))
    run("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", "raw", pool / "web", "64M")
    trace = scratch / "trace-elsewhere"
    params = {"pool": pool, "source": "base.qcow2", "name": "web"}
    result = module(params, prefix=["strace", "-f", "-qq", "-e", "trace=openat", "-o", trace])
    assert result["volume"]["backing"] == {"path": backing, "format": "raw", "depth": None}, result
    assert f"{pool2}/" not in trace.read_text()
    assert backing in module({**params, **LINKED})["msg"]


# --- refused --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code, stated, words",
    [
        ("CONFIG_UNSUPPORTED", {"format": "raw"}, ["format", "web", "raw", "qcow2"]),
        ("INVALID_ARG", {"capacity": "32M"}, ["capacity", str(32 * MIB), str(64 * MIB)]),
        ("CONFIG_UNSUPPORTED", {"preallocation": "metadata"}, ["preallocation=metadata", "web", "backing store"]),
        ("INVALID_ARG", {"method": "copy"}, ["method=copy", "clone_type=linked"]),
        ("INVALID_ARG", {"name": "base.qcow2"}, ["base.qcow2", "source"]),
    ],
)
def test_what_makes_no_linked_clone(pool, qcow2, code, stated, words):
    """The rest of them is tested on the planner."""
    message = refused(code, **{"pool": pool, "source": "base.qcow2", "name": "web", **LINKED, **stated})
    assert all(word in message for word in words), message


def test_the_source_may_be_made_by_an_earlier_task(pool):
    params = {"pool": pool, "source": "later.qcow2", "name": "web", **LINKED}
    assert harness.check(**params)["diff"]["after"]["backing"]["path"] == str(pool / "later.qcow2")
    assert module(params)["error_code"] == "NO_STORAGE_VOL"


def test_a_source_outside_the_pools_is_refused_with_advice(pool, pool2, qcow2):
    """A later run, which reads through the clone, would refuse it."""
    message = refused("UNSAFE_IMAGE", pool=pool2, source_path=qcow2, name="web", **LINKED)
    assert f"name '{pool}' as source_pool" in message
    result = clone(pool=pool2, source_path=qcow2, source_pool=pool, name="web", **LINKED)
    assert result["volume"]["backing"] == {"path": str(qcow2), "format": "qcow2", "depth": 1}
    assert not clone(pool=pool2, source="base.qcow2", source_pool=pool, name="web", **LINKED)["changed"]


def test_an_encrypted_source_is_refused(pool):
    secret = ["--object", "secret,id=s,data=abc", "-o", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"]
    run("qemu-img", "create", "-q", "-f", "qcow2", *secret, pool / "secret.qcow2", "1M")
    assert "clone_type=full" in refused("NO_SUPPORT", pool=pool, source="secret.qcow2", name="web", **LINKED)


def test_a_source_that_is_written_to_is_refused(pool, qcow2):
    with held(qcow2, "qcow2"):
        assert "qemu-io" in refused("IN_USE", pool=pool, source="base.qcow2", name="web", **LINKED)


def test_guests_may_run_on_linked_clones_while_more_are_made_but_not_on_the_source(libvirt_pool, pool, qcow2, domain):
    clone(pool=libvirt_pool, source="base.qcow2", name="web1", **LINKED)
    domain(pool / "web1", "qcow2")
    assert clone(pool=libvirt_pool, source="base.qcow2", name="web2", **LINKED)["actions"] == ["created"]
    assert not clone(pool=libvirt_pool, source="base.qcow2", name="web1", **LINKED)["changed"]
    message = module({"pool": libvirt_pool, "source": "web1", "name": "web3", **LINKED})["msg"]
    assert "web1" in message and "open for writing by qemu" in message


def test_a_source_that_changes_places_while_it_is_made_is_noticed(pool, qcow2):
    """What is recorded is a name, which must mean the file that was judged."""
    slow = ["strace", "-qq", "-f", "-o", "/dev/null", "-e", "trace=execve", "-e", "inject=execve:delay_exit=1500000"]
    # Made before, since a program may take longer to start than the run is held up.
    other = pool / "other.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", other, "64M")
    process = harness.start({"pool": pool, "source": "base.qcow2", "name": "web", **LINKED}, prefix=slow)
    harness.wait_until(lambda: harness.unnamed_files(pool), 30)
    qcow2.rename(pool / "moved.qcow2")
    other.rename(qcow2)
    result = harness.result_of(process)
    assert result.get("error_code") == "IN_USE", result
    assert "base.qcow2" in result["msg"]
    assert not (pool / "web").exists()


def test_a_full_pool_is_told_before_anything_is_written(small_file_system):
    place = small_file_system("ext4", 8 * MIB)
    harness.make_raw(place / "base.raw", 64 * MIB, ())
    message = refused("NO_SPACE", pool=place, source="base.raw", name="web", qcow2={"cluster_size": "2M"}, **LINKED)
    assert "web" in message and "more than is free" in message


# --- XML ------------------------------------------------------------------------------------------------------------------


def xml(path, image_format=None, capacity=""):
    told = f"<format type='{image_format}'/>" if image_format else ""
    return f"<volume><name>web</name>{capacity}<backingStore><path>{path}</path>{told}</backingStore></volume>"


def test_the_backing_store_of_the_xml_has_to_be_the_source(either, pool, qcow2, raw):
    stated = {"pool": either, "source": "base.qcow2", **LINKED}
    message = module({"xml": xml(raw), **stated})["msg"]
    assert str(raw) in message and str(qcow2) in message and "backingStore" in message
    message = module({"xml": xml(qcow2, "raw"), **stated})["msg"]
    assert "raw" in message and "qcow2" in message
    assert settle(xml=xml(qcow2, "qcow2"), **stated)["actions"] == ["created"]
    if not either.startswith("/"):
        described = virsh("vol-dumpxml", "--pool", either, "web")
        assert not clone(xml=described, **stated)["changed"]
    assert clone(pool=either, source="base.qcow2", name="full", xml=xml(raw, "raw"))["volume"]["backing"] is None


# --- many, and together ---------------------------------------------------------------------------------------------------


def test_many_linked_clones_in_one_task(either, pool, qcow2):
    names = [f"web{number}" for number in range(100)]
    volumes = [{"name": name, **({"capacity": "1GiB"} if number % 10 == 0 else {})} for number, name in enumerate(names)]
    params = {"pool": either, "source": "base.qcow2", "volumes": volumes, **LINKED}
    predicted = harness.check(**params)
    started = time.monotonic()
    result = clone(**params)
    # About a second, of which the module's start takes a half; this is far from what a process for each would take.
    assert time.monotonic() - started < 20
    assert (predicted["changed"], predicted["actions"]) == (result["changed"], result["actions"]) == (True, ["created"])
    for ours, told in zip(result["volumes"], predicted["volumes"]):
        assert (ours["transfer"], ours["backing"]) == ("link", {"path": str(qcow2), "format": "qcow2", "depth": 1})
        assert (told["name"], told["backing"], told["capacity"]) == (ours["name"], ours["backing"], ours["capacity"])
    for number in (0, 1, 50, 99):
        path = pool / names[number]
        assert recorded(path) == (str(qcow2), "qcow2")
        assert info(path, "qcow2")["virtual-size"] == (GIB if number % 10 == 0 else 64 * MIB)
        assert same_content(qcow2, "qcow2", path, "qcow2")
        run("qemu-img", "check", "-q", "-f", "qcow2", path)
    assert not clone(**params)["changed"]
    full = module({**params, "clone_type": "full"})
    assert {volume["error_code"] for volume in full["volumes"]} == {"DIFFERS"}


def test_many_verified(pool, qcow2):
    volumes = [{"name": f"web{number}"} for number in range(3)]
    assert clone(pool=pool, source="base.qcow2", volumes=volumes, verify=True, **LINKED)["actions"] == ["created"]


def test_a_run_that_is_killed_leaves_nothing(pool, qcow2):
    params = {"pool": pool, "source": "base.qcow2", "name": "web", **LINKED}
    slow = ["strace", "-qq", "-o", "/dev/null", "-e", "trace=linkat", "-e", "inject=linkat:delay_enter=5000000"]
    process = harness.start(params, prefix=slow)
    harness.wait_until(lambda: harness.unnamed_files(pool), 30)
    harness.kill(process)
    assert sorted(os.listdir(pool)) == ["base.qcow2", "base.raw"]
    assert clone(**params)["actions"] == ["created"]
