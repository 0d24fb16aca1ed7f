# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""How the volumes of a directory hang together, by what their headers record."""

from __future__ import annotations

import json
import os
import random
import struct
from contextlib import closing

import pytest
from ansible_collections.virtforge.libvirt.plugins.module_utils._deadline import Deadline
from ansible_collections.virtforge.libvirt.plugins.module_utils._errors import CloneError
from ansible_collections.virtforge.libvirt.plugins.module_utils._volumes.inventory import Inventory

MIB = 1 << 20


def qcow2(backing=None, backing_format=None):
    """A header of version 2 with nothing but a backing store."""
    name = os.fsencode(backing or "")
    extension = b""
    if backing_format is not None:
        text = backing_format.encode()
        extension = struct.pack(">II", 0xE2792ACA, len(text)) + text.ljust(-(-len(text) // 8) * 8, b"\0")
    extension += bytes(8)
    at = 72 + len(extension) if name else 0
    head = b"QFI\xfb" + struct.pack(">IQIIQIIQQIIQ", 2, at, len(name), 16, MIB, 0, 0, 0, 0, 0, 0, 0)
    return (head + extension + name).ljust(4096, b"\0")


@pytest.fixture
def describe(tmp_path):
    """What ``storage_volume_info`` returns of the files made by the keyword arguments, by name."""

    def run(asked=None, **files):
        for name, data in files.items():
            (tmp_path / name).write_bytes(data)
        with closing(Inventory("unused", str(tmp_path), asked, Deadline(None, "timeout"))) as inventory:
            inventory.open_pool()
            inventory.scan()
            described = inventory.described()
        assert [one["name"] for one in described] == sorted(one["name"] for one in described)
        return {one["name"]: one for one in described}

    return run


def chain(entry):
    return [(os.path.basename(below["path"]), below["format"]) for below in entry["backing_chain"]]


def test_a_volume_knows_what_lies_below_and_above_it(describe, tmp_path):
    found = describe(base=bytes(MIB), a=qcow2("base", "raw"), b=qcow2(str(tmp_path / "a"), "qcow2"), c=qcow2("./b", "qcow2"))
    assert found["c"]["backing_chain"] == [
        {"path": str(tmp_path / "b"), "format": "qcow2"},
        {"path": str(tmp_path / "a"), "format": "qcow2"},
        {"path": str(tmp_path / "base"), "format": "raw"},
    ]
    assert found["c"]["backing"] == {"path": "./b", "format": "qcow2", "depth": 3}
    assert [found[name]["dependents"] for name in ("base", "a", "b", "c")] == [["a", "b", "c"], ["b", "c"], ["c"], []]
    assert (found["base"]["backing"], found["base"]["backing_chain"]) == (None, [])


def test_dependents_are_the_inverse_of_the_chains(describe):
    dice = random.Random(1)
    names = [f"v{number:02}" for number in range(60)]
    parents = {name: dice.choice(names[:index]) if index and dice.random() < 0.9 else None for index, name in enumerate(names)}
    found = describe(**{name: qcow2(parent, parent and "qcow2") for name, parent in parents.items()})

    def below(name):
        return [parents[name], *below(parents[name])] if parents[name] else []

    assert max(len(below(name)) for name in names) > 4
    for name in names:
        assert [path for path, _format in chain(found[name])] == below(name)
        assert found[name]["dependents"] == [other for other in names if name in below(other)]


def test_one_volume_is_described_as_among_all(describe):
    files = {"base": bytes(MIB), "a": qcow2("base", "raw"), "b": qcow2("a", "qcow2")}
    found = describe(**files)
    for name in files:
        assert describe(asked=name, **files) == {name: found[name]}
    assert describe(asked="other", **files) == {}


@pytest.mark.parametrize(
    "recorded",
    [
        "/etc/hostname",
        "../elsewhere",
        "sub/base",
        "missing",
        "nbd:localhost:10809",
        "https://example.com/base",
        "fat:rw:.",
        "base\0",
        "json:{",
        "json:" + "[" * 1000,
        "json:[]",
        'json:{"driver": "nbd", "host": "localhost"}',
        'json:{"file": {"filename": 7}}',
    ],
)
def test_what_is_no_volume_of_the_pool_ends_the_chain_as_recorded(describe, recorded):
    found = describe(base=bytes(MIB), over=qcow2(recorded, "raw"))
    assert found["over"]["backing_chain"] == [{"path": recorded, "format": "raw"}]
    assert found["over"]["backing"] == {"path": recorded, "format": "raw", "depth": None}
    assert found["over"]["error_code"] is None
    assert found["base"]["dependents"] == []


@pytest.mark.parametrize(
    "recorded",
    [
        "base",
        "./base",
        "link",
        "sub/../base",
        "file:base",
        'json:{"driver": "raw", "file": {"driver": "file", "filename": "base"}}',
        'json:{"driver": "raw", "file.driver": "file", "file.filename": "base"}',
        'json:{"driver": "file", "filename": "base"}',
    ],
)
def test_every_way_to_record_a_volume_makes_a_dependent(describe, tmp_path, recorded):
    (tmp_path / "link").symlink_to("base")
    (tmp_path / "sub").mkdir()
    found = describe(base=bytes(MIB), over=qcow2(recorded, "raw"))
    assert sorted(found) == ["base", "over"]
    assert found["base"]["dependents"] == ["over"]
    assert found["over"]["backing_chain"] == [{"path": str(tmp_path / "base"), "format": "raw"}]


def test_a_pool_reached_by_another_path(describe, tmp_path):
    alias = tmp_path.parent / f"{tmp_path.name}-alias"
    alias.symlink_to(tmp_path)
    found = describe(base=bytes(MIB), over=qcow2(str(alias / "base"), "raw"))
    assert found["base"]["dependents"] == ["over"]


def test_loops_end(describe):
    found = describe(a=qcow2("b", "qcow2"), b=qcow2("a", "qcow2"), own=qcow2("own", "qcow2"), above=qcow2("a", "qcow2"))
    assert [chain(found[name]) for name in ("a", "b", "own")] == [[("b", "qcow2")], [("a", "qcow2")], []]
    assert chain(found["above"]) == [("a", "qcow2"), ("b", "qcow2")]
    assert found["above"]["backing"]["depth"] is None
    assert (found["a"]["dependents"], found["b"]["dependents"]) == (["above", "b"], ["a", "above"])


def test_a_backing_store_is_what_the_image_above_has_it_read_as(describe):
    two = bytearray(qcow2("base", "raw"))
    two[64:68] = b"\x7f\x10\xda\xbe"
    found = describe(
        base=bytes(MIB),
        middle=qcow2("base", "raw"),
        as_raw=qcow2("middle", "raw"),
        unsaid=qcow2("middle"),
        either=bytes(two),
        pinned=qcow2("either", "qcow2"),
        strange=qcow2("middle", "nonsense"),
    )
    assert chain(found["as_raw"]) == [("middle", "raw")]
    assert chain(found["unsaid"]) == [("middle", "qcow2"), ("base", "raw")]
    assert found["unsaid"]["backing"] == {"path": "middle", "format": "qcow2", "depth": 2}
    assert chain(found["strange"]) == [("middle", "nonsense")]
    assert found["strange"]["backing"]["depth"] is None
    # Nobody said how to read it by itself, but the image above did.
    assert (found["either"]["error_code"], found["either"]["format"]) == ("UNSAFE_IMAGE", None)
    assert "qcow2 and as vdi" in found["either"]["msg"] and "source_format" not in found["either"]["msg"]
    assert chain(found["pinned"]) == [("either", "qcow2"), ("base", "raw")]
    assert found["base"]["dependents"] == ["middle", "pinned", "unsaid"]


@pytest.mark.parametrize(
    "data, code, image_format",
    [
        (b"QFI\xfb\0\0\0\2", "CORRUPT_IMAGE", "qcow2"),
        (qcow2()[:20] + b"\xff" + qcow2()[21:], "CORRUPT_IMAGE", "qcow2"),
        (b"QFI\xfb\0\0\0\x09".ljust(200, b"\0"), "CORRUPT_IMAGE", "qcow2"),
        (bytes(512) + b"conectix".ljust(512, b"\0"), "UNSAFE_IMAGE", None),
        (b'# Disk DescriptorFile\nRW 1 FLAT "/etc/shadow" 0\n', "UNSAFE_IMAGE", "vmdk"),
    ],
)
def test_a_volume_that_cannot_be_read_spoils_no_other(describe, data, code, image_format):
    found = describe(base=bytes(MIB), bad=data, over=qcow2("base", "raw"), above=qcow2("bad", "qcow2"))
    bad = found["bad"]
    assert (bad["error_code"], bad["format"], bad["capacity"]) == (code, image_format, None)
    assert "'bad'" in bad["msg"] and "\n" not in bad["msg"]
    assert bad["physical"] == len(data)
    assert (bad["backing"], bad["backing_chain"]) == (None, [])
    assert (found["base"]["dependents"], found["base"]["error_code"]) == (["over"], None)
    assert chain(found["above"])[0] == ("bad", "qcow2") and bad["dependents"] == ["above"]


def test_what_is_no_regular_file_is_no_volume(describe, tmp_path):
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("base")
    (tmp_path / "dangling").symlink_to("nothing")
    (tmp_path / ".virtforge-0123456789abcdef.tmp").write_bytes(qcow2("base", "raw"))
    found = describe(base=bytes(MIB))
    assert (list(found), found["base"]["dependents"]) == (["base"], [])


def test_names_of_any_bytes_can_be_returned(describe, tmp_path):
    with open(os.fsencode(tmp_path) + b"/\xff\xfe", "wb") as file:
        file.write(qcow2("base", "raw"))
    found = describe(base=bytes(MIB), over=qcow2(os.fsdecode(b"\xff\xfe"), "qcow2"))
    assert json.dumps(found, ensure_ascii=False).encode("utf-8")
    assert found["base"]["dependents"] == ["over", "\ufffd\ufffd"]
    assert [one["format"] for one in found["over"]["backing_chain"]] == ["qcow2", "raw"]


def test_what_could_not_be_read_may_depend_on_anything(tmp_path):
    files = {"base": bytes(512), "cut": b"QFI\xfb\0\0\0\2", "flat": b"# Disk DescriptorFile", "over": qcow2("base", "raw")}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with closing(Inventory("unused", str(tmp_path), "base", Deadline(None, "timeout"))) as inventory:
        inventory.open_pool()
        inventory.scan()
        (base,) = inventory.asked_for()
        assert inventory.untold(base.key) == ["cut"]


def test_a_look_has_its_time(tmp_path):
    (tmp_path / "base").write_bytes(bytes(512))
    with closing(Inventory("unused", str(tmp_path), None, Deadline(0, "timeout"))) as inventory:
        inventory.open_pool()
        with pytest.raises(CloneError, match="gave up looking at the volumes") as caught:
            inventory.scan()
    assert caught.value.code == "TIMEOUT"
