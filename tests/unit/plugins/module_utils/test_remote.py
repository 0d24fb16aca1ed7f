# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Connections to another host: which they are, what the outcome table has for them, and what domains and volumes say."""

from __future__ import annotations

from dataclasses import replace

import pytest
from ansible_collections.virtforge.libvirt.plugins.module_utils import _xml
from ansible_collections.virtforge.libvirt.plugins.module_utils._clone import planner, request
from ansible_collections.virtforge.libvirt.plugins.module_utils._clone.model import (
    Backing,
    Create,
    Facts,
    Grow,
    Ownership,
    PoolFacts,
    SourceFacts,
    TargetFacts,
)
from ansible_collections.virtforge.libvirt.plugins.module_utils._clone.request import Mode, Request
from ansible_collections.virtforge.libvirt.plugins.module_utils._errors import CloneError
from ansible_collections.virtforge.libvirt.plugins.module_utils._images.probe import Image, Qcow2Features
from ansible_collections.virtforge.libvirt.plugins.module_utils._pools import capabilities
from ansible_collections.virtforge.libvirt.plugins.module_utils._pools.definition import Definition, Source
from ansible_collections.virtforge.libvirt.plugins.module_utils._poolstate import planner as pool_planner
from ansible_collections.virtforge.libvirt.plugins.module_utils._poolstate.request import Request as PoolRequest
from ansible_collections.virtforge.libvirt.plugins.module_utils._uri import is_elsewhere, is_remote, is_uri

MIB = 1 << 20
URI = "qemu+ssh://kvm2/system"
RAW = Image("raw", 100 * MIB)
QCOW2 = Image("qcow2", 100 * MIB, qcow2=Qcow2Features("1.1", 65536))
THERE = SourceFacts(
    "volume 'base' of pool 'p'",
    "/p/base",
    "p",
    "base",
    RAW,
    identity=("p", "base"),
    owner=(7, 8, 0o640),
    key="/p/base",
    remote=True,
)
HERE = SourceFacts("source_path '/x'", "/x", image=RAW, identity=(1, 2))


def facts(source=THERE, target=None, **kwargs):
    answered = dict.fromkeys(("source_writers", "source_corrupt", "target_users", "denied"), "")
    return Facts(
        PoolFacts("p", kwargs.pop("type", "dir"), "/p", remote=True),
        source,
        TargetFacts(target, ("p", "web"), None, 7, 8, 0o640) if target else TargetFacts(),
        "web",
        **{**answered, "target_chain": True, "space_missing": 0, "unshareable": "pool 'p' is on another host", **kwargs},
    )


def plan(known=None, **stated):
    return planner.plan(Request(**{"pool": "p", "uri": URI, "source": "base", **stated}), known or facts())


def refusal(known=None, **stated):
    with pytest.raises(CloneError) as caught:
        plan(known, **stated)
    return caught.value.code, caught.value.msg


@pytest.mark.parametrize(
    "uri, remote",
    [
        ("qemu:///system", False),
        ("qemu+unix:///system?socket=/run/x", False),
        ("test:///default", False),
        ("storage:///system", False),
        (URI, True),
        ("qemu://kvm2/system", True),
        ("qemu+ssh:///system", True),
        ("QEMU+TCP://127.0.0.1:1/system", True),
        ("nonsense", False),
    ],
)
def test_which_connections_are_remote(uri, remote):
    assert is_remote(uri) is remote and is_uri(uri) is (uri != "nonsense")
    assert is_elsewhere(uri, "p") is remote and not is_elsewhere(uri, "/srv/images")


@pytest.mark.parametrize(
    "source, stated, route, image_format, capacity",
    [
        (THERE, {}, "libvirt", "raw", 100 * MIB),
        (THERE, {"method": "libvirt"}, "libvirt", "raw", 100 * MIB),
        (THERE, {"format": "qcow2", "capacity": 200 * MIB}, "libvirt", "qcow2", 200 * MIB),
        (THERE, {"clone_type": "linked"}, "link", "qcow2", 100 * MIB),
        (replace(THERE, image=QCOW2), {}, "libvirt", "qcow2", 100 * MIB),
        (replace(THERE, image=QCOW2), {"preallocation": "metadata"}, "libvirt", "qcow2", 100 * MIB),
        (HERE, {}, "copy", "raw", 100 * MIB),
        (HERE, {"capacity": 200 * MIB, "bwlimit": 1}, "copy", "raw", 200 * MIB),
        (HERE, {"format": "qcow2"}, "convert", "qcow2", 100 * MIB),
    ],
)
def test_a_volume_that_is_not_there(source, stated, route, image_format, capacity):
    (step,) = plan(facts(source), **stated).steps
    assert isinstance(step, Create)
    assert (step.route, step.format, step.capacity) == (route, image_format, capacity)


def test_owner_group_and_mode():
    def owner(source, **stated):
        return plan(facts(source), **stated).steps[0].owner

    assert owner(THERE) == Ownership(7, 8, 0o640)
    assert owner(THERE, owner=9, mode=Mode("g-r")) == Ownership(9, 8, 0o600)
    # That of libvirt's daemon there.
    assert owner(HERE) == Ownership(None, None, 0o600)


def test_a_blank_volume():
    nothing = facts(SourceFacts("nothing", ""))
    (step,) = plan(nothing, source=None, capacity=MIB, format="qcow2").steps
    assert (step.route, step.format, step.capacity, step.owner) == ("blank", "qcow2", MIB, Ownership(None, None, 0o600))
    code, message = refusal(nothing, source=None, capacity=MIB, format="qcow2", qcow2={"refcount_bits": 1})
    assert code == "NO_SUPPORT" and "qcow2.refcount_bits" in message


def test_a_volume_that_is_there():
    assert plan(facts(target=RAW)).steps == ()
    assert plan(facts(target=RAW), owner=7, group=8, mode=Mode("0640"), capacity=100 * MIB).steps == ()
    assert plan(facts(target=RAW), capacity=101 * MIB).steps == (Grow("raw", 101 * MIB),)
    code, message = refusal(facts(target=RAW), capacity=99 * MIB)
    assert code == "DIFFERS" and str(99 * MIB) in message and str(100 * MIB) in message
    assert refusal(facts(target=QCOW2))[0] == "DIFFERS"
    assert refusal(facts(target=RAW, target_users="domain 'x'"), capacity=101 * MIB)[0] == "IN_USE"
    unfinished = replace(facts(HERE), target=TargetFacts(RAW, ("p", "web"), unfinished=True))
    assert plan(unfinished).actions == ["created"]
    linked = replace(QCOW2, backing="/p/base", backing_format="raw")
    known = replace(facts(), target=TargetFacts(linked, ("p", "web"), on_source=True, depth=1))
    assert plan(known, clone_type="linked").after.backing == Backing("/p/base", "raw", 1)


@pytest.mark.parametrize(
    "known, stated, words",
    [
        (None, {"method": "reflink"}, "method=reflink"),
        (facts(HERE), {"method": "copy"}, "method=copy"),
        (None, {"compare": "content"}, "compare=content"),
        (None, {"preallocation": "falloc"}, "preallocation=falloc"),
        (facts(HERE), {"preallocation": "full"}, "preallocation=full"),
        (facts(HERE), {"verify": True}, "verify=true"),
        (None, {"bwlimit": 1}, "bwlimit"),
        (None, {"label": {"type": "virt_image_t"}}, "setype=virt_image_t"),
        (None, {"source_in_use": "wait"}, "source_in_use=wait"),
        (None, {"allow_shrink": True}, "allow_shrink=true"),
        (None, {"flatten": True}, "flatten=true"),
        (facts(HERE), {"clone_type": "linked"}, "clone_type=linked with a source of this host"),
        (None, {"format": "vhdx"}, "format=vhdx"),
        (facts(replace(HERE, image=Image("vhdx", MIB))), {}, "format=vhdx"),
        (facts(type="logical"), {}, "of type logical"),
        (replace(facts(), pool=PoolFacts("/q", "directory", "/q")), {"pool": "/q", "source_pool": "p"}, "'/q' of this host"),
    ],
)
def test_what_is_done_only_on_the_host_itself(known, stated, words):
    for target in (None, RAW):
        tried = known or facts()
        if target:
            tried = replace(tried, target=TargetFacts(target, ("p", "web")))
        code, message = refusal(tried, **stated)
        assert code == "NO_SUPPORT" and words in message and message.endswith("run the task on that host")


@pytest.mark.parametrize(
    "known, stated, words",
    [
        (facts(target=QCOW2), {"force": True}, "force=true"),
        (facts(target=RAW), {"owner": 9}, "owner: volume 'web' of pool 'p' has 7, asked for is 9"),
        (facts(target=RAW), {"group": 9}, "group: volume 'web' of pool 'p' has 8, asked for is 9"),
        (facts(target=RAW), {"mode": Mode("0600")}, "mode: volume 'web' of pool 'p' has 0640, asked for is 0600"),
        (
            facts(target=QCOW2),
            {"format": "qcow2", "capacity": 200 * MIB, "preallocation": "metadata"},
            "preallocation=metadata",
        ),
        (None, {"format": "vmdk", "capacity": 200 * MIB}, "a larger capacity for the format vmdk"),
        (None, {"format": "qcow2", "qcow2": {"compression_type": "zstd"}}, "qcow2.compression_type"),
        (None, {"clone_type": "linked", "qcow2": {"refcount_bits": 1}}, "qcow2.refcount_bits"),
        (facts(replace(THERE, image=replace(RAW, encrypted=True))), {}, "encrypted"),
        (facts(replace(HERE, image=replace(RAW, encrypted=True))), {}, "encrypted"),
        (facts(replace(THERE, image=replace(RAW, magic="qcow2"))), {"source_format": "raw"}, "source_format=raw"),
        (facts(replace(HERE, image=replace(RAW, magic="qcow2"))), {"source_format": "raw"}, "source_format=raw"),
    ],
)
def test_what_libvirt_has_no_call_for(known, stated, words):
    code, message = refusal(known, **stated)
    assert code == "NO_SUPPORT" and words in message


def test_what_pools_there_are_able_to():
    there = capabilities.of("dir", remote=True)
    assert there.clone and there.linked and not there.flatten and "vhdx" not in there.formats
    for name in ("logical", "rbd", "iscsi-direct"):
        there = capabilities.of(name, remote=True)
        assert not (there.clone or there.create)


def test_names_of_users_are_of_this_host():
    params = {"pool": "p", "uri": URI, "source": "base", "max_capacity": "64TiB"}
    assert request.from_parameters({**params, "owner": "7", "group": "8"}).owner == 7
    for parameter in ("owner", "group"):
        with pytest.raises(CloneError, match=f"{parameter}: 'root'") as caught:
            request.from_parameters({**params, parameter: "root"}, on_host=False)
        assert caught.value.code == "NO_SUPPORT"
    assert request.from_parameters({**params, "pool": "/srv", "owner": "root"}).owner == 0


# --- pools ----------------------------------------------------------------------------------------------------------------

FS = Definition("fs", "p", "u", "/p", Source(devices=("/dev/x",), format="xfs"))


def test_a_pool_there():
    known = pool_planner.Facts(None, FS, "<pool/>", others=(), users="", denied="", remote=True)
    assert pool_planner.plan(PoolRequest("p", URI, xml="<pool/>"), known).actions == ("defined", "started")
    assert pool_planner.plan(PoolRequest("p", URI, xml="<pool/>", build=True), known).actions == ("defined", "built", "started")
    had = replace(known, pool=pool_planner.PoolFacts(FS, FS, "<pool/>", active=False))
    assert pool_planner.plan(PoolRequest("p", URI, xml="<pool/>", build=True), had).actions == ("started",)
    for stated in ({"owner": 7}, {"group": 7}, {"mode": Mode("0700")}):
        with pytest.raises(CloneError, match="<permissions>") as caught:
            pool_planner.plan(PoolRequest("p", URI, **stated), had)
        assert caught.value.code == "NO_SUPPORT" and next(iter(stated)) in caught.value.msg


# --- documents ------------------------------------------------------------------------------------------------------------


def test_what_a_domain_uses_and_writes():
    document = """<domain><devices>
      <disk><source file='/a'/><backingStore><source file='/b'/></backingStore><mirror><source file='/m'/></mirror></disk>
      <disk><source pool='p' volume='v'/><backingStore><source file='/c'/></backingStore></disk>
      <disk><source protocol='rbd' name='pool/image'/></disk>
      <disk><source dev='/dev/r'/><readonly/></disk></devices></domain>"""
    assert _xml.domain_uses(document) == {"/a", "/b", "/m", "/c", "/dev/r", "pool/image", ("p", "v")}
    assert _xml.domain_uses(document, writing=True) == {"/a", "/m", "pool/image", ("p", "v")}


def test_what_libvirt_says_of_a_volume():
    document = """<volume type='block'><name>v</name><key>k</key><capacity>9</capacity><allocation unit='KiB'>1</allocation>
      <physical>7</physical><target><path>/p/v</path><permissions><label>l</label></permissions></target></volume>"""
    assert _xml.volume_status(document) == _xml.VolumeStatus("v", "block", "k", "/p/v", 1024, 7, "l")
    partition = "<volume type='block'><name>v</name><target><format type='linux-lvm'/></target></volume>"
    assert _xml.parse_volume(partition, device=True).format is None
    least = "<volume><name>v</name><target><path>/p/v</path></target></volume>"
    assert _xml.volume_status(least) == _xml.VolumeStatus("v", "file", "/p/v", "/p/v")


def test_a_document_with_a_backing_store():
    document = _xml.volume_xml(name="v", capacity=1, format="qcow2", backing=("/p/base", "raw"))
    stated = _xml.parse_volume(document)
    assert (stated.backing_path, stated.backing_format) == ("/p/base", "raw")
