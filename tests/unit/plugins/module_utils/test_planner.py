# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The outcome table, row by row: request and facts in, steps or refusal out."""

from __future__ import annotations

from dataclasses import replace

import pytest
from ansible_collections.virtforge.libvirt.plugins.module_utils._clone import planner
from ansible_collections.virtforge.libvirt.plugins.module_utils._clone.model import (
    Backing,
    Create,
    Dependents,
    Facts,
    Flatten,
    Grow,
    Ownership,
    PoolFacts,
    SetPermissions,
    SourceFacts,
    TargetFacts,
    Unanswered,
    donates,
    kind,
)
from ansible_collections.virtforge.libvirt.plugins.module_utils._clone.request import Mode, Request
from ansible_collections.virtforge.libvirt.plugins.module_utils._errors import CloneError
from ansible_collections.virtforge.libvirt.plugins.module_utils._images.probe import Image, Qcow2Features

MIB = 1 << 20
QCOW2 = Qcow2Features("1.1", 65536)


def image(image_format="qcow2", capacity=100 * MIB, **kwargs):
    return Image(image_format, capacity, qcow2=QCOW2 if image_format == "qcow2" else None, **kwargs)


def facts(source=None, target=None, **kwargs):
    """Everything answered and harmless, unless a row says otherwise."""
    source_facts = {"what": "volume 'base' of pool '/p'", "path": "/p/base", "pool": "/p", "name": "base", "identity": (1, 2)}
    source_facts["key"] = "/p/base"
    source_facts["owner"] = (64055, 108, 0o640)
    if source is None:
        source_facts.update(identity=None, owner=None, gone="volume 'base' of pool '/p' does not exist")
    values = {
        "source_writers": "",
        "source_corrupt": "",
        "target_users": "",
        "target_dependents": Dependents(),
        "target_chain": True,
        "data_beyond": -1,
        "content_equal": True,
        "space_missing": 0,
        "unshareable": "",
        "denied": "",
    }
    values.update(kwargs)
    return Facts(
        PoolFacts("/p", "directory", "/p"),
        replace(SourceFacts(**source_facts), image=source),
        TargetFacts(target, (1, 3), None, 64055, 108, 0o640) if target else TargetFacts(),
        "clone",
        **values,
    )


def request(**kwargs):
    return Request(**{"pool": "/p", "source": "base", "name": "clone", **kwargs})


def plan(**kwargs):
    known = {key: kwargs.pop(key) for key in list(kwargs) if key in FACTS}
    return planner.plan(request(**kwargs), facts(**known))


FACTS = (
    "source",
    "target",
    "source_writers",
    "source_corrupt",
    "target_chain",
    "target_users",
    "target_dependents",
    "data_beyond",
    "content_equal",
    "space_missing",
    "unshareable",
    "denied",
    "check_mode",
)


# --- absent: created ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source, stated, route, image_format, capacity",
    [
        (image("raw", 1024512), {}, "copy", "raw", 1024512),
        (image("raw", 1000), {"format": "qcow2"}, "convert", "qcow2", 1024),
        (image("raw", 1000), {"capacity": 1001}, "copy", "raw", 1001),
        (image(), {}, "copy", "qcow2", 100 * MIB),
        (image(), {"capacity": 300 * MIB}, "copy", "qcow2", 300 * MIB),
        (image(snapshots=2, bitmaps=1), {"capacity": 300 * MIB}, "copy", "qcow2", 300 * MIB),
        (image(), {"format": "raw"}, "convert", "raw", 100 * MIB),
        (image(), {"format": "vpc", "capacity": 100 * MIB + 1}, "convert", "vpc", 100 * MIB + 512),
        (image("vmdk"), {}, "copy", "vmdk", 100 * MIB),
        (image("vmdk"), {"capacity": 200 * MIB}, "convert", "vmdk", 200 * MIB),
        (image("qed"), {"capacity": 200 * MIB}, "copy", "qed", 200 * MIB),
        (image(backing="base.raw", backing_format="raw"), {}, "convert", "qcow2", 100 * MIB),
        (image(), {"qcow2": {"cluster_size": 4096}}, "convert", "qcow2", 100 * MIB),
        (image(), {"qcow2": {"cluster_size": 65536, "compat": "1.1"}}, "copy", "qcow2", 100 * MIB),
        (image(), {"preallocation": "metadata"}, "convert", "qcow2", 100 * MIB),
        (image("raw"), {"preallocation": "falloc"}, "copy", "raw", 100 * MIB),
        (image("raw", encrypted=True), {"capacity": 300 * MIB}, "copy", "raw", 300 * MIB),
    ],
)
def test_an_absent_volume_is_created(source, stated, route, image_format, capacity):
    result = plan(source=source, **stated)
    (step,) = result.steps
    assert isinstance(step, Create)
    assert (step.route, step.format, step.capacity, step.replaces) == (route, image_format, capacity, False)
    assert result.actions == ["created"]
    assert result.before is None
    assert (result.after.format, result.after.capacity) == (image_format, capacity)


def test_a_conversion_names_what_it_drops():
    result = plan(source=image(snapshots=2, bitmaps=1), format="raw")
    assert result.steps[0].dropped == ("snapshots", "bitmaps")
    assert "snapshots and bitmaps" in result.warnings[0]


def test_a_copy_drops_nothing():
    assert plan(source=image(snapshots=2, bitmaps=1)).steps[0].dropped == ()


@pytest.mark.parametrize(
    "stated, expected",
    [
        ({}, (64055, 108, 0o640)),
        ({"mode": Mode("0600")}, (64055, 108, 0o600)),
        ({"mode": Mode("g+w")}, (64055, 108, 0o660)),
        ({"owner": 7, "group": 8}, (7, 8, 0o640)),
    ],
)
def test_a_new_volume_takes_over_the_owner_and_mode_of_a_pool_volume(stated, expected):
    owner = plan(source=image(), **stated).steps[0].owner
    assert (owner.uid, owner.gid, owner.mode) == expected


def test_a_new_volume_of_a_path_is_private():
    known = facts(source=image())
    known = replace(known, source=replace(known.source, owner=None), uid=1000, gid=1001)
    owner = planner.plan(request(), known).steps[0].owner
    assert (owner.uid, owner.gid, owner.mode) == (1000, 1001, 0o600)


def test_a_user_who_may_not_give_files_away_keeps_his_own():
    known = replace(facts(source=image()), uid=1000, gid=1001, groups=(108,))
    owner = planner.plan(request(), known).steps[0].owner
    assert (owner.uid, owner.gid, owner.mode) == (1000, 108, 0o640)


# --- exists: unchanged, grown, permissions ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source, target, stated",
    [
        (image(), image(), {}),
        (image(), image(), {"capacity": 100 * MIB}),
        (image(), image(capacity=300 * MIB), {}),
        (image(), image("vpc", 100 * MIB + 512), {"format": "vpc", "capacity": 100 * MIB + 1}),
        (image(), image("vpc", 100 * MIB + 70 * 512), {"format": "vpc", "capacity": 100 * MIB}),
        (image("raw", 1000), image("qcow2", 1024), {"format": "qcow2", "capacity": 1000}),
        (image(), image(backing="x"), {}),
        (image(), image(), {"compare": "content"}),
        (image(), image(), {"owner": 64055, "group": 108, "mode": Mode("0640")}),
        (image(), image(), {"qcow2": {"cluster_size": 4096}}),
        (image(unclean="dirty"), image(), {}),
        (image("raw", 64 << 41), image("raw", 64 << 41), {}),
    ],
)
def test_a_volume_as_stated_is_unchanged(source, target, stated):
    result = plan(source=source, target=target, source_writers="somebody", space_missing=1, denied="no", **stated)
    assert result.steps == ()
    assert result.warnings == ()
    assert result.before == result.after


@pytest.mark.parametrize("image_format", ["raw", "qcow2", "qed"])
def test_a_smaller_volume_is_grown_in_place(image_format):
    result = plan(source=image(image_format), target=image(image_format), capacity=300 * MIB)
    assert result.steps == (Grow(image_format, 300 * MIB),)
    assert result.actions == ["grown"]
    assert (result.before.capacity, result.after.capacity) == (100 * MIB, 300 * MIB)


def test_growing_and_permissions_go_together():
    result = plan(source=image(), target=image(), capacity=300 * MIB, mode=Mode("0600"))
    assert result.actions == ["grown", "permissions"]


@pytest.mark.parametrize("stated", [{"capacity": 300 * MIB}, {"mode": Mode("0600")}, {"owner": 7}])
def test_what_has_a_name_elsewhere_is_not_changed_in_place(stated):
    known = facts(image(), image())
    known = replace(known, target=replace(known.target, linked_elsewhere=True))
    with pytest.raises(CloneError, match="further name outside the pools") as refusal:
        planner.plan(request(**stated), known)
    assert refusal.value.code == "UNSAFE_IMAGE"
    assert planner.plan(request(), known).actions == []
    assert planner.plan(request(format="raw", force=True), known).actions == ["replaced"]


def test_stated_permissions_that_differ_are_set():
    result = plan(source=image(), target=image(), owner=7, group=108, mode=Mode("o+r"))
    (step,) = result.steps
    assert isinstance(step, SetPermissions)
    assert (step.owner.uid, step.owner.gid, step.owner.mode) == (7, None, 0o644)
    assert (result.after.uid, result.after.gid, result.after.mode) == (7, 108, 0o644)


def test_a_volume_smaller_than_its_source_is_unchanged_with_a_warning():
    result = plan(source=image(capacity=300 * MIB), target=image())
    assert result.steps == ()
    assert "less than its source" in result.warnings[0]


def test_a_volume_in_use_keeps_its_owner_with_a_warning():
    result = plan(source=image(), target=image(), owner=7, target_users="qemu (pid 1)")
    assert result.steps == ()
    assert "open by qemu (pid 1)" in result.warnings[0]


def test_a_volume_whose_source_is_gone_is_judged_on_what_is_stated():
    result = plan(source=None, target=image(), capacity=100 * MIB)
    assert result.steps == ()
    assert "does not exist" in result.warnings[0]
    assert plan(source=None, target=image(), capacity=300 * MIB).actions == ["grown"]


# --- force --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target, stated",
    [
        (image("raw"), {}),
        (image(capacity=300 * MIB), {"capacity": 200 * MIB}),
        (image(backing="x"), {"clone_type": "full"}),
        (image(), {"compare": "content"}),
    ],
)
def test_a_volume_that_differs_is_replaced_with_force(target, stated):
    result = plan(source=image(), target=target, force=True, content_equal=False, **stated)
    (step,) = result.steps
    assert step.replaces
    assert result.actions == ["replaced"]
    with pytest.raises(CloneError) as caught:
        plan(source=image(), target=target, content_equal=False, **stated)
    assert caught.value.code == "DIFFERS"


def test_force_leaves_a_volume_alone_that_does_not_differ():
    assert plan(source=image(), target=image(), force=True).steps == ()


# --- refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "known, stated, code, text",
    [
        ({"source": None}, {}, "NO_STORAGE_VOL", "volume 'base' of pool '/p' does not exist"),
        ({"source": None, "target": image()}, {"compare": "content"}, "NO_STORAGE_VOL", "compare=content: volume 'base'"),
        (
            {"source": None, "target": image(capacity=300 * MIB)},
            {"capacity": MIB, "force": True},
            "NO_STORAGE_VOL",
            "does not exist",
        ),
        ({"target": image("raw")}, {}, "DIFFERS", "its format is raw, asked for is qcow2"),
        (
            {"target": image(capacity=300 * MIB)},
            {"capacity": 200 * MIB},
            "DIFFERS",
            "its capacity is 314572800 bytes (300 MiB), asked for is 209715200 bytes (200 MiB)",
        ),
        ({"target": image("vpc", 300 * MIB)}, {"format": "vpc", "capacity": 200 * MIB}, "DIFFERS", "its capacity is"),
        ({"target": image(backing="x")}, {"clone_type": "full"}, "DIFFERS", "linked clone of 'x'"),
        (
            {"target": image(), "content_equal": False},
            {"compare": "content"},
            "DIFFERS",
            "its data is not that of volume 'base'",
        ),
        ({"target": image()}, {"capacity": 200 * MIB, "resize": False}, "DIFFERS", "resize is false"),
        *[
            ({"target": image(name)}, {"capacity": 200 * MIB, "format": name}, "NO_SUPPORT", f"a {name} volume cannot be grown")
            for name in ("vmdk", "vdi", "vhdx", "vpc", "qcow")
        ],
        (
            {"target": image(), "target_users": "qemu-io (pid 5)"},
            {"capacity": 200 * MIB},
            "IN_USE",
            "cannot be grown: it is open by qemu-io",
        ),
        (
            {"target": image("raw"), "target_users": "domain 'a'"},
            {"force": True},
            "IN_USE",
            "cannot be replaced: it is open by domain",
        ),
        (
            {"target": image("raw"), "target_dependents": Dependents(("web1", "web2", "/q/web3", "web4", "web5"))},
            {"force": True},
            "OPERATION_INVALID",
            "cannot be replaced: 5 volumes depend on it: web1, web2, /q/web3 and 2 more",
        ),
        (
            {"source_writers": "qemu-io (pid 5)"},
            {},
            "IN_USE",
            "volume 'base' of pool '/p' is open for writing by qemu-io (pid 5)",
        ),
        ({}, {"capacity": MIB}, "INVALID_ARG", "allow_shrink permits it"),
        ({}, {"capacity": MIB, "allow_shrink": True}, "NO_SUPPORT", "only raw sources can be shrunk, not qcow2"),
        (
            {"source": image("raw"), "data_beyond": 12345},
            {"capacity": MIB, "allow_shrink": True},
            "INVALID_ARG",
            "the data at byte 12345 would be cut off",
        ),
        ({"space_missing": 4096}, {}, "NO_SPACE", "needs 4096 bytes (4 KiB) more than is free in pool '/p'"),
        ({"denied": "pool '/p': this user may not write"}, {}, "OPERATION_DENIED", "may not write"),
        ({"denied": "no", "target": image()}, {"capacity": 200 * MIB}, "OPERATION_DENIED", "no"),
        ({"source": image(unclean="dirty")}, {}, "CORRUPT_IMAGE", "marked dirty"),
        ({"source_corrupt": "volume 'base' is corrupt"}, {}, "CORRUPT_IMAGE", "is corrupt"),
        ({"target": image(data_file="")}, {"capacity": 200 * MIB}, "UNSAFE_IMAGE", "another file"),
        ({"target": image(data_file="x")}, {"compare": "content"}, "UNSAFE_IMAGE", "another file"),
        ({"target": image(unreadable="it is torn")}, {}, "DIFFERS", "it is torn"),
        ({"source": image(data_file="x")}, {}, "UNSAFE_IMAGE", "another file"),
        ({"source": image(capacity=65 << 40)}, {}, "UNSAFE_IMAGE", "max_capacity"),
        ({"source": image("raw")}, {"qcow2": {"compat": "1.1"}}, "INVALID_ARG", "qcow2: ['compat'] has no meaning"),
        ({"source": image("raw")}, {"preallocation": "metadata"}, "CONFIG_UNSUPPORTED", "preallocation=metadata"),
        ({"source": image("vdi")}, {"preallocation": "falloc"}, "CONFIG_UNSUPPORTED", "format vdi"),
        ({}, {"format": "vdi", "method": "reflink"}, "NO_SUPPORT", "a conversion of the format vdi writes new blocks"),
        ({}, {"preallocation": "falloc", "method": "reflink"}, "NO_SUPPORT", "preallocation=falloc asks for blocks of its own"),
        ({"unshareable": "it is far away"}, {"method": "reflink"}, "NO_SUPPORT", "method=reflink is not possible"),
        ({"source": image("raw", 0)}, {"format": "vmdk"}, "CONFIG_UNSUPPORTED", "a vmdk volume of 0 bytes"),
        ({}, {"method": "libvirt"}, "INVALID_ARG", "method=libvirt needs a libvirt pool"),
        ({"source": image(encrypted=True)}, {"format": "raw"}, "NO_SUPPORT", "encrypted"),
        ({}, {"encrypted": True}, "CONFIG_UNSUPPORTED", "<encryption>"),
        ({}, {"qcow2": {"compat": "0.10", "lazy_refcounts": True}}, "CONFIG_UNSUPPORTED", "qcow2.lazy_refcounts"),
        ({}, {"qcow2": {"extended_l2": True, "cluster_size": 4096}}, "CONFIG_UNSUPPORTED", "cluster_size of 16384"),
    ],
)
def test_refusals_name_what_is_wrong(known, stated, code, text):
    with pytest.raises(CloneError) as caught:
        plan(**{"source": image(), **known}, **stated)
    assert caught.value.code == code
    assert text in caught.value.msg


def test_the_source_itself_is_no_target():
    known = facts(source=image(), target=image())
    known = replace(known, target=replace(known.target, identity=known.source.identity, image=None))
    with pytest.raises(CloneError, match="is the source itself") as caught:
        planner.plan(request(), known)
    assert caught.value.code == "INVALID_ARG"


def test_a_backing_store_of_the_source_is_no_target():
    known = facts(source=image(backing="x"), target=image("raw"))
    known = replace(known, source=replace(known.source, below=(known.target.identity,)))
    with pytest.raises(CloneError, match="is a backing store of volume 'base'") as caught:
        planner.plan(request(force=True), known)
    assert caught.value.code == "INVALID_ARG"


def test_a_name_taken_by_something_else_is_refused_even_with_force():
    known = replace(facts(source=image()), target=TargetFacts(None, (1, 3), "a directory"))
    with pytest.raises(CloneError, match="taken by a directory") as caught:
        planner.plan(request(force=True), known)
    assert caught.value.code == "STORAGE_VOL_EXIST"


def test_a_zero_tail_may_be_cut_off():
    result = plan(source=image("raw"), capacity=MIB, allow_shrink=True, data_beyond=-1)
    assert result.steps[0].capacity == MIB


def test_a_source_that_will_be_waited_for_is_not_refused():
    assert plan(source=image(), source_writers="x", source_in_use="wait").actions == ["created"]


# --- check mode ---------------------------------------------------------------------------------------------------------


def test_a_check_run_expects_the_source_that_an_earlier_task_makes():
    result = plan(source=None, check_mode=True, capacity=MIB, format="raw")
    assert result.actions == ["created"]
    assert "does not exist" in result.warnings[0]
    assert (result.after.format, result.after.capacity) == ("raw", MIB)


def test_a_check_run_expects_the_pool_that_an_earlier_task_makes():
    known = facts(source=image(), check_mode=True, denied=None)
    known = replace(known, pool=PoolFacts("p", "unknown", None, "there is no pool 'p'"))
    result = planner.plan(request(), known)
    assert result.actions == ["created"]
    assert "there is no pool 'p'" in result.warnings[0]


# --- facts that cost something ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "question, known, stated",
    [
        ("source_writers", {}, {}),
        ("space_missing", {}, {}),
        ("denied", {}, {}),
        ("target_users", {"target": image()}, {"capacity": 200 * MIB}),
        ("target_users", {"target": image()}, {"mode": Mode("0600")}),
        ("target_dependents", {"target": image("raw")}, {"force": True}),
        ("data_beyond", {"source": image("raw")}, {"capacity": MIB, "allow_shrink": True}),
        ("content_equal", {"target": image()}, {"compare": "content"}),
    ],
)
def test_the_planner_asks_for_what_it_needs(question, known, stated):
    with pytest.raises(Unanswered) as caught:
        plan(**{"source": image(), question: None, **known}, **stated)
    assert caught.value.question == question


def test_a_volume_as_stated_needs_no_costly_fact():
    costly = ("source_writers", "target_users", "target_dependents", "data_beyond", "content_equal", "space_missing", "denied")
    unknown = dict.fromkeys(costly)
    assert plan(source=image(), target=image(), **unknown).steps == ()
    assert plan(source=image(), target=image(), force=True, **unknown).steps == ()


@pytest.mark.parametrize(
    "target, stated, actions",
    [(None, {}, ["created"]), (image(), {"capacity": 200 * MIB, "mode": Mode("0600")}, ["grown", "permissions"])],
)
def test_only_a_replacement_asks_who_depends_on_the_volume(target, stated, actions):
    assert plan(source=image(), target=target, target_dependents=None, force=True, **stated).actions == actions


def test_a_replacement_warns_of_what_may_depend_on_the_volume():
    result = plan(source=image(), target=image("raw"), force=True, target_dependents=Dependents(untold=("cut", "pool 'q'")))
    assert result.actions == ["replaced"]
    assert result.warnings == ("whether anything depends on volume 'clone' of pool '/p' cannot be told of cut, pool 'q'",)


# --- a volume made from nothing -------------------------------------------------------------------------------------------


def blank(target=None, missing=None, **stated):
    known = replace(facts(None, target), source=SourceFacts("nothing", ""))
    if missing:
        known = replace(known, check_mode=True, pool=replace(known.pool, missing=missing))
    return planner.plan(Request(**{"pool": "/p", "name": "clone", **stated}), known)


@pytest.mark.parametrize(
    "stated, image_format, capacity",
    [
        ({"capacity": 5}, "raw", 5),
        ({"capacity": 5, "format": "qcow2"}, "qcow2", 512),
        ({"capacity": 40 << 30, "format": "vdi"}, "vdi", 40 << 30),
    ],
)
def test_a_blank_volume_is_raw_unless_stated_and_as_large_as_its_format_can_be(stated, image_format, capacity):
    (step,) = blank(**stated).steps
    assert (step.route, step.format, step.capacity, step.replaces) == ("blank", image_format, capacity, False)
    assert (step.owner.mode, step.dropped) == (0o600, ())


def test_a_blank_volume_needs_a_capacity():
    with pytest.raises(CloneError, match="capacity: volume 'clone' of pool '/p' does not exist") as caught:
        blank()
    assert caught.value.code == "INVALID_ARG"


def test_a_blank_volume_that_exists_is_judged_on_what_is_stated():
    assert blank(image()).actions == []
    assert blank(image(), capacity=100 * MIB, format="qcow2").actions == []
    assert blank(image(), capacity=200 * MIB).actions == ["grown"]
    assert blank(image(), mode=Mode("0600")).actions == ["permissions"]
    assert blank(image(), format="raw", capacity=5, force=True).steps[0].replaces
    assert blank(image()).warnings == ()
    for stated in ({"format": "raw"}, {"capacity": 5}):
        with pytest.raises(CloneError) as caught:
            blank(image(), **stated)
        assert caught.value.code == "DIFFERS"


def test_a_check_run_presumes_the_pool_of_a_blank_volume():
    made = blank(missing="pool 'p' does not exist", capacity=5)
    assert made.actions == ["created"]
    assert made.warnings == ("pool 'p' does not exist; the check run takes it that an earlier task makes it",)


def test_a_blank_volume_of_no_bytes_is_refused_where_nobody_could_open_it():
    with pytest.raises(CloneError, match="0 bytes"):
        blank(capacity=0, format="vmdk")


# --- sharing blocks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "known, stated, unshared",
    [
        ({}, {}, None),
        ({}, {"format": "raw"}, None),
        ({"source": image("raw")}, {"format": "qcow2"}, None),
        ({"source": image(backing="b")}, {}, None),
        ({}, {"method": "reflink", "format": "raw"}, None),
        ({"unshareable": "it is far away"}, {}, "it is far away"),
        ({"unshareable": "it is far away"}, {"format": "raw"}, "it is far away"),
        ({}, {"method": "copy"}, "method is copy"),
        ({}, {"method": "copy", "format": "raw"}, "method is copy"),
        ({}, {"format": "vdi"}, "a conversion of the format vdi writes new blocks"),
        ({"source": image("vdi")}, {"format": "raw"}, "a conversion of the format vdi writes new blocks"),
        ({"source": image("vdi")}, {}, None),
        ({"source": image("raw")}, {"preallocation": "full"}, "preallocation=full asks for blocks of its own"),
        ({}, {"preallocation": "metadata"}, None),
    ],
)
def test_why_blocks_are_not_even_tried_to_be_shared(known, stated, unshared):
    (step,) = plan(**{"source": image(), **known}, **stated).steps
    assert step.unshared == unshared


@pytest.mark.parametrize(
    "made, step, serves",
    [
        (("qcow2", 5), ("qcow2", 5), True),
        (("qcow2", 5), ("qcow2", 6), True),
        (("qcow2", 6), ("qcow2", 5), False),
        (("vdi", 5), ("vdi", 5), True),
        (("vdi", 5), ("vdi", 6), False),
        (("raw", 5, "falloc"), ("raw", 6, "falloc"), True),
        (("qcow2", 5, "falloc"), ("qcow2", 5, "falloc"), False),
    ],
)
def test_which_volume_just_made_serves_in_place_of_the_source(made, step, serves):
    def create(image_format, capacity, preallocation="off"):
        return Create("convert", image_format, capacity, Ownership(), preallocation=preallocation)

    assert donates(create(*made), create(*step)) is serves


# --- linked clones --------------------------------------------------------------------------------------------------------


def linked(on_source=True, outside="", below=(), backing_is_source=True, **kwargs):
    known = {key: kwargs.pop(key) for key in list(kwargs) if key in FACTS}
    made = facts(**{"source": image(), **known})
    made = replace(
        made,
        source=replace(made.source, outside=outside, below=below),
        target=replace(made.target, on_source=on_source),
        backing_is_source=backing_is_source,
    )
    return planner.plan(request(clone_type="linked", **kwargs), made)


@pytest.mark.parametrize(
    "source, stated, capacity, features",
    [
        (image(), {}, 100 * MIB, QCOW2),
        (image(), {"capacity": 300 * MIB}, 300 * MIB, QCOW2),
        (image(), {"format": "qcow2", "capacity": 100 * MIB}, 100 * MIB, QCOW2),
        (image("raw", 1000), {}, 1024, QCOW2),
        (image("raw", 1000), {"capacity": 1001}, 1024, QCOW2),
        (image("vmdk"), {}, 100 * MIB, QCOW2),
        (image(), {"qcow2": {"cluster_size": 4096}}, 100 * MIB, replace(QCOW2, cluster_size=4096)),
        (image(), {"qcow2": {"compat": "0.10"}}, 100 * MIB, replace(QCOW2, compat="0.10")),
        (image(), {"qcow2": {"extended_l2": True}}, 100 * MIB, replace(QCOW2, extended_l2=True)),
        (image(snapshots=1, bitmaps=1), {}, 100 * MIB, QCOW2),
        (image("raw", magic="qcow2"), {"source_format": "raw"}, 100 * MIB, QCOW2),
    ],
)
def test_an_absent_linked_clone_is_an_overlay_of_the_source(source, stated, capacity, features):
    result = linked(source=source, below=((1, 7), (1, 8)), unshareable="asked in vain", **stated)
    (step,) = result.steps
    assert (step.route, step.format, step.capacity, step.qcow2) == ("link", "qcow2", capacity, features)
    assert step.backing == result.after.backing == Backing("/p/base", source.format, 3)
    assert (step.unshared, step.dropped, result.actions, result.warnings) == (None, (), ["created"], ())
    assert (step.owner.uid, step.owner.gid, step.owner.mode) == (64055, 108, 0o640)


@pytest.mark.parametrize(
    "target, stated, actions",
    [
        (image(backing="/p/base", backing_format="qcow2"), {}, []),
        (image(backing="/p/base", backing_format="qcow2", capacity=300 * MIB), {}, []),
        (image(backing="/p/base", backing_format="qcow2"), {"compare": "content"}, []),
        (image(backing="/p/base", backing_format="qcow2"), {"capacity": 200 * MIB}, ["grown"]),
        (image(backing="/p/base", backing_format="qcow2"), {"mode": Mode("0600")}, ["permissions"]),
        (image(backing="/p/base", backing_format="qcow2"), {"force": True}, []),
    ],
)
def test_a_linked_clone_of_the_source_is_as_stated(target, stated, actions):
    result = linked(target=target, **stated)
    assert result.actions == actions
    assert result.before.backing == result.after.backing == Backing("/p/base", "qcow2")


@pytest.mark.parametrize(
    "target, on_source, text",
    [
        (image(), False, "it has no backing store, asked for is a linked clone of volume 'base' of pool '/p', '/p/base'"),
        (image("raw"), False, "its format is raw, asked for is qcow2; it has no backing store"),
        (
            image(backing="/p/other", backing_format="qcow2"),
            False,
            "it is a linked clone of '/p/other', asked for is a linked clone of volume 'base' of pool '/p', '/p/base'",
        ),
        (image(backing="/p/base", backing_format="raw"), True, "it reads its backing store '/p/base' as raw"),
        (image(backing="/p/base"), True, "it reads its backing store '/p/base' as raw, volume 'base' of pool '/p' is qcow2"),
    ],
)
def test_what_is_no_linked_clone_of_the_source_differs_and_is_replaced_with_force(target, on_source, text):
    with pytest.raises(CloneError) as caught:
        linked(target=target, on_source=on_source)
    assert caught.value.code == "DIFFERS"
    assert text in caught.value.msg
    result = linked(target=target, on_source=on_source, force=True)
    assert (result.actions, result.steps[0].route) == (["replaced"], "link")


def test_a_linked_clone_whose_source_is_gone_is_judged_by_its_name():
    target = image(backing="/p/base", backing_format="qcow2")
    known = replace(facts(None, target), target=TargetFacts(target, (1, 3), None, 64055, 108, 0o640, on_source=True))
    result = planner.plan(request(clone_type="linked"), known)
    assert result.actions == []
    assert "does not exist" in result.warnings[0]


@pytest.mark.parametrize(
    "known, code, text",
    [
        ({"format": "raw"}, "CONFIG_UNSUPPORTED", "format: volume 'clone' of pool '/p' cannot be raw: a linked clone is qcow2"),
        ({"capacity": MIB}, "INVALID_ARG", "a linked clone is no smaller than its source"),
        ({"capacity": MIB, "allow_shrink": True, "source": image("raw")}, "INVALID_ARG", "no smaller than its source"),
        ({"preallocation": "metadata"}, "CONFIG_UNSUPPORTED", "preallocation=metadata is not possible"),
        ({"preallocation": "full"}, "CONFIG_UNSUPPORTED", "it conflicts with a backing store"),
        ({"method": "reflink"}, "INVALID_ARG", "method=reflink has no meaning for clone_type=linked"),
        ({"method": "copy"}, "INVALID_ARG", "method=copy has no meaning for clone_type=linked"),
        ({"method": "libvirt"}, "NO_SUPPORT", "method=libvirt cannot make a linked clone"),
        ({"outside": "/home"}, "UNSAFE_IMAGE", "name '/home' as source_pool"),
        (
            {"backing_is_source": False, "backing_path": "/p/x"},
            "INVALID_ARG",
            "xml: the <backingStore> is '/p/x', but the source is '/p/base'",
        ),
        (
            {"backing_format": "raw"},
            "INVALID_ARG",
            "xml: the format of <backingStore> is raw, but volume 'base' of pool '/p' is qcow2",
        ),
        ({"source": image(encrypted=True)}, "NO_SUPPORT", "is encrypted: a clone of it cannot be linked"),
        ({"source": image("raw", encrypted=True)}, "NO_SUPPORT", "is encrypted: a clone of it cannot be linked"),
        ({"source": image(data_file="x")}, "UNSAFE_IMAGE", "another file"),
        ({"source": image(unclean="dirty")}, "CORRUPT_IMAGE", "marked dirty"),
        ({"source_corrupt": "volume 'base' is corrupt"}, "CORRUPT_IMAGE", "is corrupt"),
        ({"source_writers": "domain 'a'"}, "IN_USE", "volume 'base' of pool '/p' is open for writing by domain 'a'"),
        ({"qcow2": {"cluster_size": 512}}, "CONFIG_UNSUPPORTED", "qcow2.cluster_size: 512 bytes leave no room for the path"),
        ({"space_missing": 4096}, "NO_SPACE", "needs 4096 bytes"),
    ],
)
def test_a_linked_clone_that_cannot_be_is_refused(known, code, text):
    with pytest.raises(CloneError) as caught:
        linked(**known)
    assert caught.value.code == code
    assert text in caught.value.msg


def test_a_path_that_no_image_can_record_is_refused():
    known = facts(source=image())
    known = replace(known, source=replace(known.source, key="/" + "p" * 1023))
    with pytest.raises(CloneError, match="cannot record a backing store whose path has 1024 bytes") as caught:
        planner.plan(request(clone_type="linked"), known)
    assert caught.value.code == "CONFIG_UNSUPPORTED"


def test_a_full_clone_does_not_heed_the_backing_store_of_the_xml():
    known = replace(facts(source=image()), backing_is_source=False)
    for stated in ({}, {"clone_type": "full"}):
        (step,) = planner.plan(request(backing_path="/q/x", backing_format="raw", **stated), known).steps
        assert (step.route, step.backing) == ("copy", None)


def test_a_check_run_predicts_a_linked_clone_of_a_source_that_an_earlier_task_makes():
    result = linked(source=None, check_mode=True)
    assert (result.actions, result.after.format, result.after.backing) == (["created"], "qcow2", Backing("/p/base", None))


def test_an_overlay_is_copied_for_one_of_the_same_size_only():
    step = linked().steps[0]
    assert donates(step, step)
    assert not donates(step, replace(step, capacity=300 * MIB))
    assert kind(step) != kind(replace(step, backing=Backing("/p/other", "qcow2", 1)))


# --- a volume that shall stand alone --------------------------------------------------------------------------------------

OVERLAY = image(backing="/p/base", backing_format="raw")


def flatten(target=OVERLAY, stated=None, **known):
    made = replace(facts(None, target, **known), source=SourceFacts("nothing", ""))
    return planner.plan(Request(**{"pool": "/p", "name": "clone", "flatten": True, **(stated or {})}), made)


@pytest.mark.parametrize(
    "stated, actions, capacity, mode",
    [
        ({}, ["flattened"], 100 * MIB, 0o640),
        ({"capacity": 100 * MIB, "format": "qcow2"}, ["flattened"], 100 * MIB, 0o640),
        ({"capacity": 300 * MIB}, ["flattened", "grown"], 300 * MIB, 0o640),
        ({"capacity": 300 * MIB, "mode": Mode("0600")}, ["flattened", "grown", "permissions"], 300 * MIB, 0o600),
        ({"mode": Mode("0600"), "owner": 64055}, ["flattened", "permissions"], 100 * MIB, 0o600),
    ],
)
def test_an_overlay_is_flattened_and_all_else_done_in_one_go(stated, actions, capacity, mode):
    result = flatten(stated=stated)
    (step,) = result.steps
    assert (step.route, step.replaces, step.flattens, step.format, step.qcow2) == ("convert", True, True, "qcow2", QCOW2)
    assert (step.capacity, step.owner.uid, step.owner.gid, step.owner.mode) == (capacity, 64055, 108, mode)
    assert result.actions == actions
    assert (result.before.backing, result.after.backing) == (Backing("/p/base", "raw"), None)


def test_what_stands_alone_is_not_flattened():
    unknown = dict.fromkeys(("target_chain", "target_users", "source_writers", "source_corrupt", "space_missing", "denied"))
    assert flatten(image(), **unknown).steps == ()
    assert flatten(image(), {"capacity": 200 * MIB}).actions == ["grown"]
    assert flatten(None, {"capacity": MIB}).steps[0].route == "blank"
    assert flatten(OVERLAY, {"flatten": False}, **unknown).steps == ()


@pytest.mark.parametrize(
    "target, known, stated, code, text",
    [
        (OVERLAY, {"target_users": "domain 'a'"}, {}, "IN_USE", "cannot be flattened: it is open by domain 'a'"),
        (OVERLAY, {"source_writers": "dd (pid 5)"}, {}, "IN_USE", "an image below it is open for writing by dd (pid 5)"),
        (OVERLAY, {"source_corrupt": "'/p/base' is corrupt"}, {}, "CORRUPT_IMAGE", "'/p/base' is corrupt"),
        (OVERLAY, {"space_missing": 4096}, {}, "NO_SPACE", "needs 4096 bytes"),
        (OVERLAY, {"denied": "use become"}, {}, "OPERATION_DENIED", "use become"),
        (OVERLAY, {}, {"capacity": MIB}, "DIFFERS", "its capacity is"),
        (OVERLAY, {}, {"capacity": 200 * MIB, "resize": False}, "DIFFERS", "resize is false"),
        (OVERLAY, {}, {"format": "raw"}, "DIFFERS", "its format is qcow2"),
        (replace(OVERLAY, snapshots=2), {}, {}, "OPERATION_INVALID", "its internal snapshots (2) would be lost"),
        (replace(OVERLAY, encrypted=True), {}, {}, "NO_SUPPORT", "is encrypted"),
        (replace(OVERLAY, unclean="dirty"), {}, {}, "CORRUPT_IMAGE", "is marked dirty"),
        (replace(OVERLAY, data_file="x"), {}, {}, "UNSAFE_IMAGE", "another file"),
        (
            replace(OVERLAY, format="qcow", qcow2=None),
            {},
            {"capacity": 200 * MIB},
            "NO_SUPPORT",
            "a qcow volume cannot be grown",
        ),
    ],
)
def test_a_volume_that_cannot_be_flattened(target, known, stated, code, text):
    with pytest.raises(CloneError) as caught:
        flatten(target, stated, **known)
    assert caught.value.code == code
    assert text in caught.value.msg


@pytest.mark.parametrize("question", ["target_chain", "target_users", "source_writers", "source_corrupt", "space_missing"])
def test_flattening_asks_for_what_it_needs(question):
    with pytest.raises(Unanswered) as caught:
        flatten(**{question: None})
    assert caught.value.question == question


def test_flattening_shares_blocks_where_a_clone_would():
    assert flatten().steps[0].unshared is None
    assert flatten(unshareable="it is far away").steps[0].unshared == "it is far away"
    asked_for = flatten(stated={"preallocation": "falloc"}).steps[0]
    assert (asked_for.preallocation, asked_for.unshared) == ("falloc", "preallocation=falloc asks for blocks of its own")
    assert "format qed writes new blocks" in flatten(image("qed", backing="/p/base")).steps[0].unshared


def test_bitmaps_that_flattening_drops_are_named():
    result = flatten(replace(OVERLAY, bitmaps=1))
    assert result.steps[0].dropped == ("bitmaps",)
    assert "bitmaps" in result.warnings[0]


# --- volumes on the network -----------------------------------------------------------------------------------------------


def in_ceph(target=None, source=None, source_facts=(), target_facts=(), **kwargs):
    """Facts of an rbd pool; the source is a volume of it."""
    known = facts(source=source or image("raw"), target=target, **kwargs)
    ours = {"key": "rbd/base", "path": "rbd/base", "network": True, "owner": None, **dict(source_facts)}
    return replace(
        known,
        not_growable="",
        room=1 << 40,
        pool=PoolFacts("ceph", "rbd", "", granularity=512),
        source=replace(known.source, **ours),
        target=replace(known.target, uid=None, gid=None, mode=None, **dict(target_facts)) if target else TargetFacts(),
    )


def rbd_request(**kwargs):
    return request(pool="ceph", format="raw", **kwargs)


CHILD = Image("raw", 100 * MIB, backing="rbd/base", backing_format="raw")


def test_a_linked_clone_in_ceph_is_a_child_of_the_source():
    made = planner.plan(rbd_request(clone_type="linked"), in_ceph(source_facts={"below": (("rbd", "x"),)}))
    (step,) = made.steps
    assert isinstance(step, Create) and (step.route, step.format, step.capacity) == ("link", "raw", 100 * MIB)
    assert made.after.backing == Backing("rbd/base", "raw", 2)


@pytest.mark.parametrize(
    "target, on_source, stated, phrase",
    [
        (CHILD, True, {"clone_type": "full"}, "it is a linked clone of 'rbd/base'"),
        (CHILD, False, {"clone_type": "linked"}, "asked for is a linked clone of"),
        (image("raw"), False, {"clone_type": "linked"}, "it has no backing store"),
        (CHILD, True, {"clone_type": "linked", "capacity": 50 * MIB}, "its capacity is"),
    ],
)
def test_a_child_that_differs(target, on_source, stated, phrase):
    known = in_ceph(target, target_facts={"on_source": on_source})
    with pytest.raises(CloneError) as refusal:
        planner.plan(rbd_request(**stated), known)
    assert refusal.value.code == "DIFFERS" and phrase in refusal.value.msg


@pytest.mark.parametrize("stated", [{}, {"clone_type": "linked"}])
def test_a_child_of_the_source_is_as_it_should_be(stated):
    assert planner.plan(rbd_request(**stated), in_ceph(CHILD, target_facts={"on_source": True})).steps == ()


def test_a_source_that_cannot_be_linked_is_refused():
    known = in_ceph(source_facts={"unlinkable": "it is no volume of an rbd pool"})
    with pytest.raises(CloneError) as refusal:
        planner.plan(rbd_request(clone_type="linked"), known)
    assert refusal.value.code == "NO_SUPPORT" and "no volume of an rbd pool" in refusal.value.msg


def test_a_child_is_flattened_by_its_pool_and_then_grown():
    blank = replace(rbd_request(source=None), capacity=200 * MIB, flatten=True)
    made = planner.plan(blank, in_ceph(CHILD))
    assert made.steps == (Flatten(), Grow("raw", 200 * MIB))
    assert made.actions == ["flattened", "grown"] and made.after.backing is None
    with pytest.raises(CloneError) as refusal:
        planner.plan(blank, in_ceph(CHILD, target_users="domain 'web'"))
    assert refusal.value.code == "IN_USE"


def test_a_source_on_the_network_is_never_copied_as_a_file():
    known = facts(source=image("raw"))
    known = replace(known, source=replace(known.source, network=True), unshareable="the source is on the network")
    (step,) = planner.plan(request(), known).steps
    assert isinstance(step, Create) and (step.route, step.unshared) == ("convert", "the source is on the network")
