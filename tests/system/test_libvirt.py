# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A real libvirtd: what virsh shows after a clone, connections, busy pools, domains, libvirt's own call."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess

import harness
import pytest
from harness import GIB, MIB, clone, info, module, refused, result_of, run, same_content, settle, start, virsh, warnings
from lxml import etree

RNG = "/usr/share/libvirt/schemas/storagevol.rng"


@pytest.mark.parametrize("stated", [{}, {"format": "raw"}, {"format": "vmdk"}, {"capacity": "1GiB"}])
def test_virsh_shows_the_clone_with_no_refresh_by_hand(libvirt_pool, pool, qcow2, stated):
    result = settle(pool=libvirt_pool, source="base.qcow2", name="web", **stated)
    volume = result["volume"]
    shown = dict(
        line.split(None, 1) for line in virsh("vol-info", "web", "--pool", libvirt_pool, "--bytes").splitlines() if line
    )
    assert int(shown["Capacity:"].split()[0]) == volume["capacity"]
    assert virsh("vol-path", "web", "--pool", libvirt_pool).strip() == volume["path"] == str(pool / "web")
    assert virsh("vol-key", str(pool / "web")).strip() == volume["key"]
    document = etree.fromstring(virsh("vol-dumpxml", "web", "--pool", libvirt_pool))
    assert document.findtext("capacity") == str(volume["capacity"])
    assert document.find("target/format").get("type") == volume["format"]
    assert document.findtext("target/permissions/mode") == volume["mode"]
    result = settle(pool=libvirt_pool, source="base.qcow2", name="web", **stated, mode="0640")
    assert etree.fromstring(virsh("vol-dumpxml", "web", "--pool", libvirt_pool)).findtext("target/permissions/mode") == "0640"


def test_a_grown_volume_is_shown_grown(libvirt_pool, pool, qcow2):
    clone(pool=libvirt_pool, source="base.qcow2", name="web")
    assert settle(pool=libvirt_pool, source="base.qcow2", name="web", capacity="1GiB")["actions"] == ["grown"]
    assert str(GIB) in virsh("vol-info", "web", "--pool", libvirt_pool, "--bytes")


@pytest.mark.parametrize("image", ["base.qcow2", "base.raw"])
def test_the_dump_of_a_volume_describes_its_clone(libvirt_pool, libvirt_pool2, pool, pool2, qcow2, image):
    os.chown(pool / image, 64055, 108)
    (pool / image).chmod(0o640)
    virsh("pool-refresh", libvirt_pool)
    dumped = virsh("vol-dumpxml", image, "--pool", libvirt_pool)
    result = settle(pool=libvirt_pool2, source_pool=libvirt_pool, source=image, xml=dumped)
    volume = result["volume"]
    assert (volume["name"], volume["capacity"], volume["mode"]) == (image, 64 * MIB, "0640")
    status = (pool2 / image).stat()
    assert (status.st_uid, status.st_gid) == (64055, 108)
    ours = etree.fromstring(virsh("vol-dumpxml", image, "--pool", libvirt_pool2))
    theirs = etree.fromstring(dumped)
    for path in (
        "name",
        "capacity",
        "target/permissions/mode",
        "target/permissions/owner",
        "target/compat",
        "target/clusterSize",
    ):
        assert ours.findtext(path) == theirs.findtext(path), path
    assert ours.find("target/format").get("type") == theirs.find("target/format").get("type")


def test_a_description_in_xml_and_parameters_that_win_over_it(libvirt_pool, pool, qcow2):
    xml = """<volume><name>web</name><capacity unit='MiB'>100</capacity><allocation>0</allocation>
      <target><format type='qcow2'/><permissions><mode>0640</mode><owner>7</owner><group>8</group></permissions>
      <compat>0.10</compat><clusterSize unit='KiB'>4</clusterSize></target></volume>"""
    settle(pool=libvirt_pool, source="base.raw", xml=xml)
    found = info(pool / "web", "qcow2")
    assert (found["virtual-size"], found["cluster-size"]) == (100 * MIB, 4096)
    assert found["format-specific"]["data"]["compat"] == "0.10"
    status = (pool / "web").stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (7, 8, 0o640)
    settle(pool=libvirt_pool, source="base.raw", xml=xml, name="other", capacity="200M", mode="0600", qcow2={"compat": "1.1"})
    found = info(pool / "other", "qcow2")
    assert (found["virtual-size"], found["cluster-size"]) == (200 * MIB, 4096)
    assert found["format-specific"]["data"]["compat"] == "1.1"
    assert (pool / "other").stat().st_mode & 0o7777 == 0o600


def test_xml_of_our_own_making_is_valid():
    from ansible_collections.virtforge.libvirt.plugins.module_utils import _xml

    schema = etree.RelaxNG(etree.parse(RNG))
    choices = {
        "format": [None, "qcow2", "raw"],
        "mode": [None, 0, 0o600],
        "owner": [None, 0],
        "group": [None, 36],
        "compat": [None, "1.1"],
        "cluster_size": [None, 65536],
        "lazy_refcounts": [None, True],
        "extended_l2": [None, True],
        "nocow": [None, True],
    }
    for chosen in itertools.product(*choices.values()):
        document = _xml.volume_xml(name="a & <b>.qcow2", capacity=2**63 - 1, **dict(zip(choices, chosen)))
        schema.assertValid(etree.fromstring(document))


def test_between_pools_of_libvirt_and_directories(libvirt_pool, libvirt_pool2, pool, pool2, qcow2, any_pool):
    for source_pool, target_pool, place in (
        (libvirt_pool, libvirt_pool2, pool2),
        (libvirt_pool, any_pool, any_pool),
        (pool, libvirt_pool2, pool2),
    ):
        name = f"{os.path.basename(source_pool)}-to-{os.path.basename(target_pool)}-{place.name}"
        settle(pool=target_pool, source_pool=source_pool, source="base.qcow2", name=name)
        assert same_content(qcow2, "qcow2", place / name, "qcow2")


def test_a_pool_of_the_type_fs(libvirtd, scratch, qcow2, pool):
    image, place = scratch / "fs-pool.img", scratch / "fs-pool"
    with open(image, "wb") as file:
        file.truncate(400 * MIB)
    run("mkfs.xfs", "-q", image)
    device = run("losetup", "-f", "--show", image).strip()
    place.mkdir()
    try:
        virsh("pool-define-as", "fspool", "fs", "--source-dev", device, "--target", place)
        virsh("pool-start", "fspool")
        harness.pools["fspool"] = place
        settle(pool="fspool", source_path=qcow2, name="web", capacity="1G")
        assert same_content(qcow2, "qcow2", place / "web", "qcow2")
        settle(pool="fspool", source="web", name="copy", format="raw")
        settle(pool=pool, source_pool="fspool", source="copy", name="back")
        assert "web" in virsh("vol-list", "fspool")
    finally:
        harness.pools.pop("fspool", None)
        harness.virsh_status("pool-destroy", "fspool")
        harness.virsh_status("pool-undefine", "fspool")
        run("losetup", "-d", device)


def test_the_storage_driver_alone(libvirt_pool, pool, qcow2):
    settle(uri="storage:///system", pool=libvirt_pool, source="base.qcow2", name="web", capacity="100M")
    assert "web" in virsh("vol-list", libvirt_pool)


def test_the_uri_comes_from_the_environment(libvirt_pool, pool, qcow2):
    params = {"pool": libvirt_pool, "source": "base.qcow2", "name": "web"}
    result = result_of(start(params, env={"LIBVIRT_DEFAULT_URI": "storage:///system"}))
    assert result["changed"] and result["invocation"]["module_args"]["uri"] == "storage:///system"


def test_a_session_of_a_user(scratch, libvirtd, raw):
    """An ordinary user with a libvirtd of his own, in his home."""
    home = scratch / "home"
    home.mkdir()
    images = home / "images"
    images.mkdir()
    shutil.copy(raw, images / "base.raw")
    run("chown", "-R", "65534:65534", home)
    user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    runtime = home / "run"
    runtime.mkdir(mode=0o700)
    os.chown(runtime, 65534, 65534)
    variables = {"HOME": str(home), "XDG_RUNTIME_DIR": str(runtime), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "USER": "nobody"}
    daemon = subprocess.Popen(
        [*user, "libvirtd"], env=variables, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    virsh_session = [*user, "virsh", "-q", "-c", "qemu:///session"]

    def up():
        return subprocess.run([*virsh_session, "pool-list"], env=variables, capture_output=True, check=False).returncode == 0

    try:
        harness.wait_until(
            lambda: (
                subprocess.run([*virsh_session, "pool-list"], env=variables, capture_output=True, check=False).returncode == 0
            ),
            30,
        )
        run(*virsh_session, "pool-create-as", "mine", "dir", "--target", images, env=variables)
        params = {"uri": "qemu:///session", "pool": "mine", "source": "base.raw", "name": "web.qcow2", "format": "qcow2"}
        for expected in (["created"], []):
            result = result_of(start(params, prefix=user, env=variables))
            assert not result.get("failed"), result
            assert result["actions"] == expected
        assert "web.qcow2" in run(*virsh_session, "vol-list", "mine", env=variables)
        status = (images / "web.qcow2").stat()
        assert (status.st_uid, status.st_mode & 0o7777) == (65534, 0o644)
        assert (runtime / "virtforge").is_dir()
    finally:
        daemon.terminate()
        daemon.wait(30)
        shutil.rmtree(home)


def test_a_read_only_connection_is_refused(libvirt_pool, pool, qcow2):
    uri = "qemu+unix:///system?socket=/run/libvirt/libvirt-sock-ro"
    message = refused("OPERATION_DENIED", uri=uri, pool=libvirt_pool, source="base.qcow2", name="web")
    assert libvirt_pool in message
    # Nothing to do needs no permission.
    clone(pool=libvirt_pool, source="base.qcow2", name="web")
    assert not clone(uri=uri, pool=libvirt_pool, source="base.qcow2", name="web")["changed"]


def test_a_busy_pool_is_waited_for(libvirt_pool, pool, qcow2):
    """While libvirt itself clones, it refuses to look at the pool again. Its clone reads every hole, which takes seconds."""
    with open(pool / "slow.raw", "wb") as file:
        file.truncate(10 * GIB)
    virsh("pool-refresh", libvirt_pool)
    slow = subprocess.Popen(["virsh", "-q", "vol-clone", "slow.raw", "slow2.raw", "--pool", libvirt_pool])
    harness.wait_until(lambda: harness.virsh_status("pool-refresh", libvirt_pool) != 0)
    params = {"pool": libvirt_pool, "source": "base.qcow2", "name": "web"}
    result = module({**params, "name": "late", "lock_timeout": 0})
    assert slow.poll() is None
    assert result["failed"] and result["error_code"] == "TIMEOUT", result
    assert "lock_timeout" in result["msg"] and libvirt_pool in result["msg"]
    result = module(params)
    assert result["actions"] == ["created"], result
    assert slow.wait() == 0
    assert "web" in virsh("vol-list", libvirt_pool)
    # What the run that gave up had made is there, and is made known.
    assert module({**params, "name": "late"})["actions"] == []
    assert "late" in virsh("vol-list", libvirt_pool)


# --- domains --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image", ["base.qcow2", "base.raw"])
def test_the_disk_of_a_running_domain_is_no_source(libvirt_pool, pool, qcow2, domain, image):
    domain(pool / image, image.split(".")[1])
    message = refused("IN_USE", pool=libvirt_pool, source=image, name="web", format="raw")
    assert image in message


def test_the_disk_of_a_running_domain_is_left_alone(libvirt_pool, pool, qcow2, domain):
    clone(pool=libvirt_pool, source="base.qcow2", name="web")
    name = domain(pool / "web", "qcow2")
    before = harness.fingerprint(pool / "web")
    for target in (libvirt_pool, pool):
        for stated in ({"capacity": "200M"}, {"format": "raw", "force": True}):
            refused("IN_USE", pool=target, source="base.qcow2", name="web", **stated)
        result = clone(pool=target, source="base.qcow2", name="web", owner="root", group="root", mode="0600")
        assert not result["changed"]
        assert any("web" in warning for warning in warnings(result))
        # Asked for nothing that differs, the nightly run is content.
        assert not clone(pool=target, source="base.qcow2", name="web").get("warnings")
    assert harness.fingerprint(pool / "web") == before
    assert "paused" in virsh("domstate", name)


def test_the_base_of_running_domains_can_be_cloned(libvirt_pool, pool, qcow2, domain):
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", qcow2, "-F", "qcow2", pool / "overlay")
    domain(pool / "overlay", "qcow2")
    settle(pool=libvirt_pool, source="base.qcow2", name="web")
    refused("IN_USE", pool=libvirt_pool, source="overlay", name="flat")


# --- libvirt's own call ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stated", [{}, {"format": "raw"}, {"capacity": "300M"}])
def test_method_libvirt(libvirt_pool, libvirt_pool2, pool, pool2, qcow2, stated):
    virsh("pool-refresh", libvirt_pool)
    params = {"source": "base.qcow2", "name": "web", "method": "libvirt", **stated}
    for source_pool, target_pool, place in ((libvirt_pool, libvirt_pool, pool), (libvirt_pool, libvirt_pool2, pool2)):
        result = settle(pool=target_pool, source_pool=source_pool, **params)
        assert result["volume"]["transfer"] == "libvirt"
        image_format = stated.get("format", "qcow2")
        assert same_content(qcow2, "qcow2", place / "web", image_format)
        assert info(place / "web", image_format)["virtual-size"] == (300 * MIB if "capacity" in stated else 64 * MIB)


def test_method_libvirt_needs_pools_of_libvirt(pool, qcow2):
    assert "method" in refused("INVALID_ARG", pool=pool, source="base.qcow2", name="web", method="libvirt")
