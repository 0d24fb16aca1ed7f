# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Images from outside: each hostile one is refused by the check that is there for it, each honest one is cloned."""

from __future__ import annotations

import os
import re
import shutil
import socket
import threading
import time
from collections import Counter

import harness
import pytest
import strangers
from ansible_collections.virtforge.libvirt.plugins.module_utils._images.gate import CHECKS
from conftest import new_directory
from harness import MIB, clone, refused

SECRET = b"TOP-SECRET " * 100
#: checks that no image can meet without taking half a minute of a processor; see tests/unit/…/test_qemu_img.py
TOO_LONG = {"too_costly"}


@pytest.fixture(scope="module")
def outside(file_systems):
    """A directory beside the pools, on their file system, and in it a file that nobody may open."""
    place = new_directory(file_systems["xfs"])
    canary = place / "canary"
    canary.write_bytes(SECRET.ljust(MIB, b"."))
    yield place, canary
    shutil.rmtree(place)


@pytest.fixture(scope="module")
def hostile(file_systems, outside):
    """A pool of hostile images, and what they are."""
    place = new_directory(file_systems["xfs"])
    cases = strangers.hostile(place, *outside)
    assert len({case.name for case in cases}) == len(cases)
    yield place, cases
    shutil.rmtree(place)


def tasks(place, cases):
    return [{"pool": place, "source": case.name, "name": f"stolen-{case.name}", **case.params} for case in cases]


def test_each_hostile_image_is_refused_by_its_own_check(hostile, outside):
    place, cases = hostile
    _directory, canary = outside
    before, secret = harness.listing(place), harness.fingerprint(canary)
    wrong = []
    with harness.opens(canary) as opened:
        for mode in (True, False):
            for case, result in zip(cases, harness.batch(tasks(place, cases), check=mode), strict=True):
                code = CHECKS[case.check].code
                named = result.get("msg", "").endswith(f"[{case.check}]") and f"{case.name!r}" in result["msg"]
                if not (result.get("failed") and result.get("error_code") == code and named) or "\n" in result["msg"]:
                    wrong.append((case, mode, result.get("error_code"), result.get("msg", result)))
        assert not wrong, "\n".join(map(str, wrong))
        assert not opened(), "the file outside the pool was opened"
    assert harness.listing(place) == before, "something was made or touched"
    assert harness.fingerprint(canary) == secret
    found = Counter(case.check for case in cases)
    assert found.total() >= 150 and set(found) == set(CHECKS) - TOO_LONG, found


@pytest.fixture(scope="module")
def honest(file_systems):
    place = new_directory(file_systems["xfs"])
    cases = strangers.honest(place)
    assert len({case.name for case in cases}) == len(cases)
    yield place, cases
    shutil.rmtree(place)


def test_each_honest_image_is_cloned(honest, pool):
    place, cases = honest
    before = [harness.fingerprint(place / case.name) for case in cases]
    asked = [{"pool": pool, "source_pool": place, "source": case.name, "name": case.name, **case.params} for case in cases]
    results = harness.batch(asked)
    wrong = [(case, result["msg"]) for case, result in zip(cases, results, strict=True) if result.get("failed")]
    assert not wrong, "\n".join(map(str, wrong))
    for case, result in zip(cases, results, strict=True):
        assert (result["actions"], result["volume"]["format"]) == (["created"], case.format), (case, result)
        if case.content is None:
            assert (pool / case.name).read_bytes() == (place / case.name).read_bytes(), case
        else:
            assert harness.same_content(case.content, "raw", pool / case.name, case.format), case
    assert [harness.fingerprint(place / case.name) for case in cases] == before
    assert len(cases) >= 150, len(cases)
    again = harness.batch(asked)
    assert not [result for result in again if result.get("failed") or result["changed"]]


# --- names and documents --------------------------------------------------------------------------------------------------


def hostile_names(canary):
    up = f"../{canary.parent.name}/{canary.name}"
    return (
        "..", ".", "", "/", str(canary), up, f"./{up}", f"x/{up}", f"x\0{canary}", f"{canary}\n", "a/b", "\\..\\x/",
        "a\x1b[2Jb",
        "n" * 256, "\u00e9" * 128, "/dev/null", "/proc/self/fd/0", "//", "../", "nbd:x/y", "json:{/}", "\u2028", "x\u0085/",
    )  # fmt: skip


#: one component each, so they are names like any other
ODD_NAMES = (
    "nbd:127.0.0.1:10809", 'json:{"driver":"nbd"}', "-f", "--help", "a,b", "a b", "%s", "$(id)", "`id`", ";id", "|id", "..x",
    "~", "*",
    "file:x", "\u202ex", "'", '"', "\\", "#", "http:x", "fat:rw:x",
)  # fmt: skip


def hostile_documents(canary, port):
    volume = "<volume><name>{}</name><capacity>65536</capacity></volume>"
    entity = "<!DOCTYPE volume [<!ENTITY x {}>]>" + volume.format("&x;")
    return (
        entity.format(f"SYSTEM 'file://{canary}'"),
        entity.format(f"SYSTEM 'http://127.0.0.1:{port}/x'"),
        entity.format(f"PUBLIC 'x' 'ftp://127.0.0.1:{port}/x'"),
        entity.format("'web'"),
        f"<!DOCTYPE volume SYSTEM 'http://127.0.0.1:{port}/x.dtd'>" + volume.format("web"),
        f"<!DOCTYPE volume [<!ENTITY % x SYSTEM 'file://{canary}'> %x;]>" + volume.format("web"),
        "<!DOCTYPE x [<!ENTITY a 'aaaaaaaaaa'>" + "".join(
            f"<!ENTITY {chr(98 + n)} '{f'&{chr(97 + n)};' * 10}'>" for n in range(9)
        ) + "]>" + volume.format("&j;"),
        f"<volume xmlns:xi='http://www.w3.org/2001/XInclude'><name>a</name><name><xi:include href='{canary}'/></name></volume>",
        f"<volume xmlns:xi='http://www.w3.org/2001/XInclude'><name><xi:include href='{canary}' parse='text'/></name></volume>",
        volume.format(f"web<!-- x -->/../../{canary.parent.name}/{canary.name}"),
        volume.format("<![CDATA[../x]]>"),
        volume.format("web</name><name>../x"),
        volume.format("web<x/>"),
        volume.format("<?x y?>web"),
        volume.format("&undeclared;"),
        volume.format("n" * (1 << 20)),
        volume.format("web\0"),
        volume.format("web") + volume.format("web"),
        "<x>" * 100_000,
        f"<?xml version='1.0'?><?xml-stylesheet href='file://{canary}'?>" + volume.format("../x"),
    )  # fmt: skip


def test_nothing_outside_is_opened_and_nothing_connected_to(hostile, outside, scratch):
    """One run under strace over every hostile image, name and document."""
    place, cases = hostile
    _directory, canary = outside
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    names = hostile_names(canary)
    asked = [
        *tasks(place, cases),
        *({"pool": place, "source": "content", "name": name} for name in names),
        *({"pool": place, "source": name, "name": "stolen"} for name in names),
        *({"pool": place, "source": "content", "xml": document} for document in hostile_documents(canary, port)),
    ]
    before = harness.listing(place)
    log = scratch / "hostile.log"
    calls = "trace=open,openat,openat2,creat,connect,sendto,sendmsg,socket,execve"
    strace = ["strace", "-f", "--seccomp-bpf", "-qq", "-s", "300", "-o", str(log), "-e", calls]
    with harness.opens(canary) as opened:
        results = harness.batch(asked, prefix=strace)
        assert not opened()
    accepted = [(task, result) for task, result in zip(asked, results, strict=True) if not result.get("failed")]
    assert not accepted, accepted
    codes = {result["error_code"] for result in results[len(cases) :]}
    assert codes <= {"INVALID_ARG", "XML_ERROR"}, codes
    assert harness.listing(place) == before
    text = log.read_text()
    assert re.search("execve.*qemu-img", text)
    assert not [line for line in text.splitlines() if str(canary) in line and "open" in line]
    # AnsibleModule tells the system's log what it is asked to do.
    connects = [line for line in text.splitlines() if re.search(r"\b(connect|sendto|sendmsg)\(", line)]
    assert not [line for line in connects if "/dev/log" not in line and "/run/systemd/journal/socket" not in line], connects
    assert not [line for line in text.splitlines() if "AF_INET" in line]
    listener.settimeout(0.1)
    with pytest.raises(TimeoutError):
        listener.accept()
    listener.close()
    log.unlink()


def test_odd_names_are_made_as_they_are(pool, raw):
    results = harness.batch([{"pool": pool, "source": "base.raw", "name": name, "format": "qcow2"} for name in ODD_NAMES])
    assert [result.get("actions") for result in results] == [["created"]] * len(ODD_NAMES)
    assert sorted(os.listdir(pool)) == sorted(["base.raw", *ODD_NAMES])
    again = harness.batch([{"pool": pool, "source": name, "name": f"{name}.raw", "format": "raw"} for name in ODD_NAMES])
    assert [result.get("actions") for result in again] == [["created"]] * len(ODD_NAMES)
    assert all((pool / f"{name}.raw").read_bytes() == raw.read_bytes() for name in ODD_NAMES)


def test_what_is_changed_in_place_has_no_other_name_outside(pool, raw, outside):
    """A hard link is the file itself: to change its mode here would change it there."""
    _directory, canary = outside
    secret = harness.fingerprint(canary)
    os.link(canary, pool / "web")
    linked = harness.fingerprint(canary)
    for stated in ({"mode": "0666"}, {"owner": "1"}, {"capacity": "2M"}):
        message = refused("UNSAFE_IMAGE", pool=pool, source="base.raw", name="web", **stated)
        assert message.endswith("[hard_link]")
    assert harness.fingerprint(canary) == linked
    # What is judged by its header alone stays as it is, and what is replaced gets its own file.
    assert not clone(pool=pool, source="base.raw", name="web")["changed"]
    assert clone(pool=pool, source="base.raw", name="web", compare="content", force=True)["actions"] == ["replaced"]
    assert (pool / "web").read_bytes() == raw.read_bytes()
    assert harness.data_of(canary) == secret[-1]


def test_a_source_that_is_swapped_for_a_link_all_the_time(pool, raw, outside):
    """By turns it is a file of its own, a symbolic link and a hard link to the file outside."""
    _directory, canary = outside
    asked = [{"pool": pool, "source": "turning", "name": f"stolen{number}"} for number in range(30)]
    stop = threading.Event()

    def turn():
        while not stop.is_set():
            for make in (
                lambda path: os.symlink(canary, path),
                lambda path: os.link(canary, path),
                lambda path: os.link(raw, path),
            ):
                make(pool / "next")
                os.rename(pool / "next", pool / "turning")
                # Renaming one link of a file over another does nothing (rename(2)).
                if os.path.lexists(pool / "next"):
                    os.unlink(pool / "next")

    os.link(raw, pool / "turning")
    thread = threading.Thread(target=turn)
    thread.start()
    try:
        with harness.opens(canary) as opened:
            results = harness.batch(asked)
            assert not opened(), "the file outside the pool was opened"
    finally:
        stop.set()
        thread.join()
    for number, result in enumerate(results):
        if result.get("failed"):
            # A name may be gone at the very moment, too.
            assert result["error_code"] in ("UNSAFE_IMAGE", "INVALID_ARG", "NO_STORAGE_VOL", "IN_USE"), result["msg"]
        else:
            assert (pool / f"stolen{number}").read_bytes() == raw.read_bytes()
    assert {result.get("error_code") for result in results} >= {"UNSAFE_IMAGE"}


def test_a_source_with_other_names_elsewhere_can_be_named(pool, pool2, raw):
    os.link(raw, pool2 / "kept")
    advice = refused("UNSAFE_IMAGE", pool=pool, source="base.raw", name="web")
    assert "source_path" in advice and advice.endswith("[hard_link]")
    clone(pool=pool, source_path=raw, name="one")
    # All its names are in the pools of the task.
    clone(pool=pool2, source_pool=pool, source="base.raw", name="two")
    assert (pool / "one").read_bytes() == (pool2 / "two").read_bytes() == raw.read_bytes()


# --- what it costs --------------------------------------------------------------------------------------------------------


def test_what_is_too_large_or_too_deep_is_refused_within_the_limits(hostile):
    """All of them together, in 30 s of a processor and 2 GiB of memory."""
    place, cases = hostile
    wanted = ("eight-exbibytes.raw", "just-over.raw", "petabyte.qcow2", "link0100", "loop-s-0", "loop-t-0", "loop-v-0")
    some = [case for case in cases if case.name in wanted]
    assert len(some) == len(wanted)
    begun = time.monotonic()
    for mode in (True, False):
        limits = ["prlimit", f"--as={2 << 30}", "--cpu=30"]
        for case, result in zip(some, harness.batch(tasks(place, some), check=mode, prefix=limits), strict=True):
            assert result["failed"] and result["msg"].endswith(f"[{case.check}]"), result
    assert time.monotonic() - begun < 60
