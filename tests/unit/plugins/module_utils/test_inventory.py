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
from ansible_collections.virtforge.libvirt.plugins.module_utils._pools import libvirt
from ansible_collections.virtforge.libvirt.plugins.module_utils._volumes.inventory import Inventory

MIB = 1 << 20


def with_data_file(name):
    """A header of version 3 whose data lies in another file; an empty name is none."""
    extension = struct.pack(">II", 0x44415441, len(name)) + name.encode().ljust(-(-len(name) // 8) * 8, b"\0") if name else b""
    head = b"QFI\xfb" + struct.pack(">IQIIQIIQQIIQQQQII", 3, 0, 0, 12, MIB, 0, 1, 12288, 4096, 1, 0, 0, 4, 0, 0, 4, 104)
    return (head + extension).ljust(16384, b"\0")


def qcow2(backing=None, backing_format=None):
    """A header of version 2 with nothing but a backing store."""
    name = os.fsencode(backing or "")
    extension = b""
    if backing_format is not None:
        text = backing_format.encode()
        extension = struct.pack(">II", 0xE2792ACA, len(text)) + text.ljust(-(-len(text) // 8) * 8, b"\0")
    extension += bytes(8)
    at = 72 + len(extension) if name else 0
    head = b"QFI\xfb" + struct.pack(">IQIIQIIQQIIQ", 2, at, len(name), 12, MIB, 0, 1, 12288, 4096, 1, 0, 0)
    return (head + extension + name).ljust(16384, b"\0")


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
        (b"QFI\xfb\0\0\0\x09".ljust(200, b"\0"), "UNSAFE_IMAGE", "qcow2"),
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


@pytest.mark.parametrize("recorded", ["data", "./data", "sub/../data", 'json:{"driver": "file", "filename": "data"}'])
def test_who_keeps_data_in_a_volume_depends_on_it(describe, tmp_path, recorded):
    (tmp_path / "sub").mkdir()
    found = describe(data=bytes(MIB), over=with_data_file(recorded), top=qcow2("over", "qcow2"))
    assert found["data"]["dependents"] == ["over", "top"]
    assert chain(found["over"]) == [] and chain(found["top"]) == [("over", "qcow2")]


def test_extents_and_parents_of_a_vmdk_have_dependents(describe, tmp_path):
    head = b"# Disk DescriptorFile\n"
    flat = head + f'RW 8 FLAT "a" 0\nRW 8 FLAT "{tmp_path}/b" 0\nRW 8 FLAT "b" 8\nRW 8 FLAT "flat" 0\n'.encode()
    found = describe(
        a=bytes(512), b=bytes(512), flat=flat, child=head + b'parentFileNameHint="flat"\n', top=qcow2("flat", "vmdk")
    )
    assert [found[name]["dependents"] for name in ("a", "b", "flat")] == [["child", "flat", "top"]] * 2 + [["child", "top"]]


def test_a_data_file_that_the_image_above_has_its_backing_store_read_with(describe):
    """Nobody said how to read ``either`` by itself."""
    either = bytearray(with_data_file("data"))
    either[64:68] = b"\x7f\x10\xda\xbe"
    found = describe(data=bytes(512), either=bytes(either), top=qcow2("either", "qcow2"))
    assert found["data"]["dependents"] == ["top"]


@pytest.mark.parametrize("recorded", ["/etc/hostname", "../data", "missing", "nbd:localhost:10809", "over"])
def test_data_elsewhere_is_no_matter(describe, recorded):
    found = describe(data=bytes(512), over=with_data_file(recorded))
    assert [one["dependents"] for one in found.values()] == [[], []]


def test_what_could_not_be_read_may_depend_on_anything(tmp_path):
    footer = bytes(512) + b"conectix".ljust(512, b"\0")
    files = {
        "base": bytes(512),
        "cut": b"QFI\xfb\0\0\0\2",
        "either": b"QFI\xfb\0\0\0\2".ljust(512, b"\0") + footer,
        "elsewhere": with_data_file(""),
        # None of these has anything below it, however it is read.
        "fixed": footer,
        "flat": b"# Disk DescriptorFile",
        "over": qcow2("base", "raw"),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with closing(Inventory("unused", str(tmp_path), "base", Deadline(None, "timeout"))) as inventory:
        inventory.open_pool()
        inventory.scan()
        (base,) = inventory.asked_for()
        assert inventory.untold(base.key) == ["cut", "either", "elsewhere"]


def test_a_look_has_its_time(tmp_path):
    (tmp_path / "base").write_bytes(bytes(512))
    with closing(Inventory("unused", str(tmp_path), None, Deadline(0, "timeout"))) as inventory:
        inventory.open_pool()
        with pytest.raises(CloneError, match="gave up looking at the volumes") as caught:
            inventory.scan()
    assert caught.value.code == "TIMEOUT"


# --- who uses volumes -----------------------------------------------------------------------------------------------------


class LibvirtError(Exception):
    def __init__(self, code):
        super().__init__("libvirt says no")
        self.code = code

    def get_error_code(self):
        return self.code

    def get_error_message(self):
        return str(self)


class Libvirt:
    """As much of the module as a failure needs that no daemon can be made to answer with."""

    libvirtError = LibvirtError
    VIR_CONNECT_LIST_DOMAINS_ACTIVE = 1

    def __getattr__(self, name):
        return name


class Domains:
    """A connection with three running domains; ``listing`` and ``asking``, of the second, are what fails."""

    def __init__(self, listing=None, asking=None):
        self.listing, self.asking = listing, asking

    def listAllDomains(self, _flags):
        if self.listing:
            raise LibvirtError(self.listing)
        return [Domain(None), Domain(self.asking), Domain(None)]


class Domain:
    def __init__(self, failure):
        self.failure = failure

    def name(self):
        return "web"

    def XMLDesc(self, _flags):
        if self.failure:
            raise LibvirtError(self.failure)
        return "<domain/>"


@pytest.fixture
def running_domains(monkeypatch):
    def run(**failures):
        monkeypatch.setattr(libvirt, "libvirt_module", Libvirt)
        connection = libvirt.Connection("qemu:///system")
        connection._connection = Domains(**failures)
        return len(list(connection._running_domains()))

    return run


def test_a_driver_without_domains_and_a_domain_that_has_ended_use_nothing(running_domains):
    assert running_domains() == 3
    assert running_domains(listing="VIR_ERR_NO_SUPPORT") == 0
    assert running_domains(asking="VIR_ERR_NO_DOMAIN") == 2


@pytest.mark.parametrize("failing", ["listing", "asking"])
@pytest.mark.parametrize(
    "code, ours",
    [("VIR_ERR_RPC", "IO_ERROR"), ("VIR_ERR_ACCESS_DENIED", "OPERATION_DENIED"), ("VIR_ERR_NO_CONNECT", "IO_ERROR")],
)
def test_domains_that_cannot_be_asked_for_are_not_taken_for_none(running_domains, failing, code, ours):
    with pytest.raises(CloneError, match="domains at qemu:///system failed: libvirt says no") as caught:
        running_domains(**{failing: code})
    assert caught.value.code == ours
