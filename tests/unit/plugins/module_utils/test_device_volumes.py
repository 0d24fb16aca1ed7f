# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Volumes that are devices: what lvs says of them, how they hang together, and what is refused of blank ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
from ansible_collections.virtforge.libvirt.plugins.module_utils._clone import planner
from ansible_collections.virtforge.libvirt.plugins.module_utils._clone.files import Files
from ansible_collections.virtforge.libvirt.plugins.module_utils._clone.model import (
    Create,
    Dependents,
    Facts,
    Grow,
    Ownership,
    PoolFacts,
    SourceFacts,
    TargetFacts,
)
from ansible_collections.virtforge.libvirt.plugins.module_utils._clone.outside import Outside
from ansible_collections.virtforge.libvirt.plugins.module_utils._clone.request import Request
from ansible_collections.virtforge.libvirt.plugins.module_utils._clone.source import Source
from ansible_collections.virtforge.libvirt.plugins.module_utils._clone.space import Space
from ansible_collections.virtforge.libvirt.plugins.module_utils._clone.target import Target
from ansible_collections.virtforge.libvirt.plugins.module_utils._clone.task import Pools, Task
from ansible_collections.virtforge.libvirt.plugins.module_utils._deadline import Deadline
from ansible_collections.virtforge.libvirt.plugins.module_utils._errors import CloneError
from ansible_collections.virtforge.libvirt.plugins.module_utils._images.probe import Image
from ansible_collections.virtforge.libvirt.plugins.module_utils._images.qemu_img import QemuImg
from ansible_collections.virtforge.libvirt.plugins.module_utils._permissions import Mode
from ansible_collections.virtforge.libvirt.plugins.module_utils._pools import devices
from ansible_collections.virtforge.libvirt.plugins.module_utils._pools.devices import Device, DevicePool
from ansible_collections.virtforge.libvirt.plugins.module_utils._pools.rbd import RbdPool
from ansible_collections.virtforge.libvirt.plugins.module_utils._transfer.pace import Rate
from ansible_collections.virtforge.libvirt.plugins.module_utils._volumes import devices as volumes

MIB = 1 << 20
NAMES = ("base", "snap", "tbase", "tsnap", "outer")


def row(name, **stated):
    """A line of lvs(8), reported as JSON."""
    fields = ("lv_attr", "origin", "origin_size", "pool_lv", "data_percent", "lv_tags", "lv_layout", "data_stripes")
    return {**dict.fromkeys(fields, ""), "lv_name": name, "lv_path": f"/dev/vg/{name}", "lv_size": str(8 * MIB), **stated}


def logical_volumes():
    rows = [
        row("base", lv_attr="owi-a-s---", lv_tags="mine,virtforge_zero_from_1048576_to_8388608"),
        row("snap", origin="base", origin_size=str(8 * MIB), lv_size=str(4 * MIB), data_percent="3.00"),
        row("tbase", lv_attr="Vwi-a-tz--", pool_lv="thin", data_percent="50.00", lv_tags="mine,virtforge_zero_from_1_to_2"),
        row("tsnap", lv_attr="Vwi---t---", pool_lv="thin", origin="tbase", data_percent="25.00"),
        row("outer", lv_attr="Vwi---tz-k", pool_lv="thin", origin="base", data_percent="0.00"),
    ]
    thin_pools = {one["lv_name"]: one["pool_lv"] for one in rows}
    return {one["lv_name"]: devices._logical_volume(one, thin_pools) for one in rows}


def test_what_lvs_says():
    found = logical_volumes()
    assert [(found[name].capacity, found[name].allocated) for name in NAMES] == [
        (8 * MIB, 8 * MIB),
        (8 * MIB, 4 * MIB),
        (8 * MIB, 4 * MIB),
        (8 * MIB, 2 * MIB),
        (8 * MIB, 0),
    ]
    sparse = devices._logical_volume(row("s", origin="[s_vorigin]", origin_size=str(64 * MIB)), {"s": ""})
    assert (sparse.capacity, sparse.allocated, sparse.origin, sparse.needs) == (64 * MIB, 8 * MIB, None, None)
    # A thin snapshot stands alone, unless it is one of a volume outside its thin pool.
    assert [found[name].origin for name in NAMES] == [None, "base", None, "tbase", "base"]
    assert [found[name].needs for name in NAMES] == [None, "base", None, None, "base"]
    # Tagged for another length, it was grown by somebody else.
    assert [found[name].sound for name in NAMES] == [MIB, 8 * MIB, 8 * MIB, 8 * MIB, 8 * MIB]
    assert [found[name].zeroes for name in NAMES] == [False, False, True, False, True]
    assert [len(found[name].tags) for name in NAMES] == [1, 0, 1, 0, 0]
    cached = devices._logical_volume(row("c", lv_attr="Cwi-aoC---", pool_lv="[fast_cpool]"), {})
    assert (cached.thin_pool, cached.allocated) == (None, 8 * MIB)


class Pool(DevicePool):
    type = "logical"

    def __init__(self, found):
        self.name = "p"
        self._found = found

    def volumes(self):
        return self._found

    def users_by_name(self, volumes):
        return {volume.name: ["somebody"] for volume in volumes}

    def is_unfinished(self, volume):
        return volume.name == "c"


def test_how_they_hang_together():
    pool = Pool(
        [
            Device("a", "/dev/a", 4 * MIB),
            Device("b", "/dev/b", 4 * MIB, "a", allocated=MIB, needs="a"),
            Device("c", "/dev/c", 4 * MIB, "b", needs="b"),
            Device("d", "/dev/d", 4 * MIB, "a"),
            Device("e", "/dev/e", 4 * MIB, "e", needs="e"),
            Device("f", "/dev/f", 4 * MIB, "gone", zero_from=MIB),
        ]
    )
    assert pool.dependents("a") == ["b", "c"] and pool.dependents("b") == ["c"] and pool.dependents("e") == []
    found = {one["name"]: one for one in volumes.described(pool, None)}
    assert [one["dependents"] for one in found.values()] == [["b", "c"], ["c"], [], [], [], []]
    assert found["c"]["backing"] == {"path": "/dev/b", "format": "raw", "depth": 2}
    assert [one["path"] for one in found["c"]["backing_chain"]] == ["/dev/b", "/dev/a"]
    assert (found["d"]["backing"]["path"], found["f"]["backing"]) == ("/dev/a", None)
    assert (found["b"]["allocation"], found["a"]["allocation"]) == (MIB, 4 * MIB)
    assert (found["f"]["capacity"], found["f"]["physical"]) == (MIB, 4 * MIB)
    assert [name for name, one in found.items() if one["error_code"] == "CORRUPT_IMAGE"] == ["c"]
    assert volumes.described(pool, "b") == [found["b"]] and volumes.described(pool, "x") == []


# --- blank volumes --------------------------------------------------------------------------------------------------------


def plan(stated, target=None, pool="logical", **known):
    answers = {
        "target_users": "",
        "target_dependents": Dependents(),
        "space_missing": 0,
        "denied": "",
        "not_growable": "",
        "room": 1 << 40,
    }
    facts = Facts(
        PoolFacts("p", pool, "/dev/p", granularity=MIB, unnameable=known.pop("unnameable", "")),
        SourceFacts("nothing", ""),
        target or TargetFacts(),
        "data",
        **{**answers, **known},
    )
    return planner.plan(Request(pool="p", name="data", **stated), facts)


def there(capacity=4 * MIB, **stated):
    return TargetFacts(Image("raw", capacity), (7,), **stated)


def test_made_grown_and_left_alone():
    (step,) = plan({"capacity": MIB + 1}).steps
    assert (step.route, step.format, step.capacity) == ("device", "raw", 2 * MIB)
    assert plan({"capacity": 5 * MIB}, there()).steps == (Grow("raw", 5 * MIB),)
    for stated in ({}, {"capacity": 4 * MIB}, {"flatten": True}, {"format": "raw"}):
        assert plan(stated, there()).steps == ()
    # LUNs exist.
    assert plan({"capacity": 4 * MIB}, there(), "iscsi").steps == ()
    snapshot = replace(there(needs_origin=True, depth=1), image=Image("raw", 4 * MIB, "/dev/p/base", "raw"))
    state = plan({}, snapshot).after
    assert (state.backing.path, state.uid, state.mode) == ("/dev/p/base", None, None)
    assert plan({"capacity": 4 * MIB}, there(unfinished=True), "disk").actions == ["created"]
    assert plan({"capacity": 2 * MIB, "force": True}, there()).actions == ["replaced"]


@pytest.mark.parametrize(
    "code, stated, target, words, more",
    [
        ("NO_SUPPORT", {"format": "qcow2"}, None, ["format: qcow2", "only raw"], {}),
        ("NO_SUPPORT", {"owner": 0}, there(), ["owner: has no meaning"], {}),
        ("NO_SUPPORT", {"mode": Mode("0640")}, there(), ["mode: has no meaning"], {}),
        ("NO_SUPPORT", {"qcow2": {"compat": "1.1"}}, there(), ["qcow2: has no meaning"], {}),
        ("CONFIG_UNSUPPORTED", {"preallocation": "full"}, None, ["preallocation=full"], {}),
        ("INVALID_ARG", {}, None, ["capacity"], {}),
        ("INVALID_ARG", {"capacity": MIB}, None, ["name: ", "'data'", "it is odd"], {"unnameable": "it is odd"}),
        ("NO_SUPPORT", {"capacity": MIB}, None, ["'data'", "cannot make one"], {"pool": "iscsi"}),
        ("NO_SUPPORT", {"capacity": 5 * MIB}, there(), ["4 MiB", "5 MiB", "cannot be grown"], {"pool": "disk"}),
        ("OPERATION_INVALID", {"capacity": 5 * MIB}, there(), ["5 MiB", "it is odd"], {"not_growable": "it is odd"}),
        ("NO_SPACE", {"capacity": 9 * MIB}, there(), ["'p' lacks", "3 MiB"], {"room": 2 * MIB}),
        ("IN_USE", {"capacity": 5 * MIB}, there(), ["open by X"], {"target_users": "X"}),
        ("DIFFERS", {"capacity": 2 * MIB}, there(), ["4 MiB", "2 MiB"], {}),
        ("NO_SUPPORT", {"capacity": 2 * MIB, "force": True}, there(), ["4 MiB", "keeps its size"], {"pool": "disk"}),
        ("NO_SUPPORT", {"flatten": True}, there(needs_origin=True), ["snapshot", "logical", "flatten"], {}),
    ],
)
def test_what_is_refused(code, stated, target, words, more):
    with pytest.raises(CloneError) as caught:
        plan(stated, target, **more)
    assert caught.value.code == code
    assert all(word in caught.value.msg for word in words), caught.value.msg


@pytest.mark.parametrize(
    "name, word",
    [
        ("web1+_.-", ""),
        ("-web", "begins with -"),
        ("web 1", "characters"),
        ("web@1", "characters"),
        ("w\u00e9b", "characters"),
        ("snapshot", "for itself"),
        ("snapshot-web1", "for itself"),
        ("web_tmeta1", "for itself"),
        ("w" * 123, ""),
        ("w" * 124, "123"),
        ("w-" * 42, "device-mapper"),
    ],
)
def test_names_that_lvm_cannot_give(name, word):
    pool = devices.LogicalPool("p", "/dev/vg", "logical", None, None)
    pool._group = "vg"
    assert word in pool.cannot_name(name) and bool(word) == bool(pool.cannot_name(name))


@pytest.mark.parametrize(
    "said, code",
    [
        ('Volume group "vg" has insufficient free space (1 extents): 2 required.', "NO_SPACE"),
        ("Insufficient suitable allocatable extents for logical volume web", "NO_SPACE"),
        ("Device vg/web is in use.", "IO_ERROR"),
    ],
)
def test_what_lvm_says_of_a_failure(monkeypatch, said, code):
    monkeypatch.setattr(devices._process, "find", lambda program: f"/sbin/{program}")
    monkeypatch.setattr(devices._process, "run", lambda command, fds, outlives: (5, "", f"  {said}\n"))
    monkeypatch.setattr(devices.os, "geteuid", lambda: 0)
    with pytest.raises(CloneError) as refusal:
        devices.LogicalPool("p", "/dev/vg", "logical", None, None)._lvm("making a logical volume", "lvcreate")
    assert (refusal.value.code, said in refusal.value.msg) == (code, True)


@pytest.mark.parametrize(
    "operation",
    [
        lambda pool: pool.make("web", MIB),
        lambda pool: pool.staged(MIB, None),
        lambda pool: pool.staged_link(MIB, pool, "base"),
        lambda pool: pool.grow(Device("web", "/dev/p/web", MIB), 2 * MIB),
        lambda pool: pool._rename("web", "other"),
    ],
)
def test_what_a_pool_of_luns_cannot_do_is_refused(operation):
    pool = devices.LunPool("luns", "/dev/disk/by-path", "iscsi", None, None)
    with pytest.raises(CloneError) as refusal:
        operation(pool)
    assert refusal.value.code == "NO_SUPPORT" and "'luns'" in refusal.value.msg and "iscsi" in refusal.value.msg


class Inactive(DevicePool):
    """A pool that lists a volume which has no node on this host."""

    def volume(self, name):
        return Device(name, f"/nowhere/{name}", MIB)

    def _paths(self):
        return []


def task_in(pool):
    """A task whose only pool is this one, and its source."""
    pools = Pools("qemu:///system", False, Deadline(None, "timeout"))
    pools._opened[pool.name] = pool
    task = Task(Request(pool.name, source="base", name="web"), False, pools, Deadline(None, "timeout"), Rate(None), QemuImg())
    files = Files(task)
    return task, files, Source(task, files, Outside(task, files))


class Full(RbdPool):
    """A pool of Ceph with 3 MiB left."""

    def available(self):
        return 3 * MIB


def test_many_full_clones_in_ceph_share_no_space():
    task, files, source = task_in(Full("ceph", "", "rbd", None, None))
    space = Space(task, source, Target(task, files))
    step = Create("device", "raw", 4 * MIB, Ownership(), unshared="it is on the network")
    source.told.needed[step] = 2 * MIB
    assert space.missing(step) == 0
    space.reserve(step)
    assert space.missing(step) == MIB


def test_a_source_that_is_not_active_is_refused():
    _task, _files, source = task_in(Inactive("vg", "/nowhere", "logical", None, None))
    with pytest.raises(CloneError) as refusal:
        source.look()
    assert refusal.value.code == "OPERATION_INVALID"
    assert refusal.value.msg == "volume 'base' of pool 'vg' is not active: there is no '/nowhere/base'"
