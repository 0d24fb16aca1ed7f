# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The role and the playbooks: from a bare libvirtd to cloned volumes in one run, and back."""

from __future__ import annotations

import json
import os
import shutil

import harness
import pytest
import yaml
from harness import GIB, MIB, ROOT, info, run, same_content, virsh
from plays import SYSTEM_PYTHON, User, ansible_playbook, counts, settle, variables

CLONES = "virtforge.libvirt.clone_volumes"
FANOUT = "virtforge.libvirt.golden_image_fanout"
TEARDOWN = "virtforge.libvirt.teardown"
UNSAFE = variables(storage_safe_mode=False)


@pytest.fixture
def device(scratch):
    """A loop device of 400 MiB with nothing on it."""
    image = scratch / "role-device.img"
    with open(image, "wb") as file:
        file.truncate(400 * MIB)
    device = run("losetup", "-f", "--show", image).strip()
    yield device
    run("losetup", "-d", device)
    image.unlink()


@pytest.fixture
def user(scratch):
    place = scratch / "user"
    place.mkdir()
    somebody = User(place)
    yield somebody
    somebody.end()
    shutil.rmtree(place, ignore_errors=True)


@pytest.fixture
def declared(libvirtd, pool, raw, device, scratch):
    """Two pools, a blank volume and five clones across the pools, as extra variables, and the directories of the pools."""
    images, fast = pool / "images", scratch / "fast"
    wanted = {
        "storage_pools": [
            {"name": "images", "type": "dir", "target_path": images, "mode": "0755", "autostart": True},
            {
                "name": "fast",
                "type": "fs",
                "path": fast,
                "pool_source": {"devices": [device], "format": "xfs"},
                "build": True,
            },
        ],
        "storage_volumes": [{"pool": "fast", "name": "data.qcow2", "format": "qcow2", "capacity": "10GiB"}],
        "storage_clones": [
            {"pool": "images", "name": "base.raw", "source_path": raw},
            {"pool": "images", "name": "web1.qcow2", "source": "base.raw", "format": "qcow2", "capacity": "40GiB"},
            {"pool": "fast", "name": "web2.qcow2", "source_pool": "images", "clone_source": "web1.qcow2"},
            {"pool": "fast", "volume": "web3.raw", "source": "web2.qcow2", "format": "raw", "size": "50GiB", "mode": "0640"},
            {"pool": "images", "name": "web4.qcow2", "source_pool": "fast", "source": "web3.raw", "format": "qcow2"},
        ],
    }
    yield wanted, images, fast
    if fast.exists():
        run("umount", "-q", "-l", fast) if os.path.ismount(fast) else None
        fast.rmdir()
    for name in ("images", "fast"):
        harness.virsh_status("pool-destroy", name)
        harness.virsh_status("pool-undefine", name)


def test_from_a_bare_libvirtd_to_cloned_volumes_and_back(declared, raw):
    wanted, images, fast = declared
    # pools, volume, clones: three tasks
    assert settle(CLONES, *variables(**wanted), *SYSTEM_PYTHON, check_again=True) == 3
    assert sorted(os.listdir(images)) == ["base.raw", "web1.qcow2", "web4.qcow2"]
    assert sorted(os.listdir(fast)) == ["data.qcow2", "web2.qcow2", "web3.raw"]
    assert os.path.ismount(fast)
    for path, image_format, capacity in (
        (images / "web1.qcow2", "qcow2", 40 * GIB),
        (fast / "web2.qcow2", "qcow2", 40 * GIB),
        (fast / "web3.raw", "raw", 50 * GIB),
        (images / "web4.qcow2", "qcow2", 50 * GIB),
    ):
        assert info(path, image_format)["virtual-size"] == capacity
        assert same_content(raw, "raw", path, image_format)
    assert "web4.qcow2" in virsh("vol-list", "images") and "web3.raw" in virsh("vol-list", "fast")
    assert "images" in virsh("pool-list", "--autostart")

    for mode in ([], ["--check"]):
        status, output = ansible_playbook(TEARDOWN, *variables(**wanted), *SYSTEM_PYTHON, *mode)
        assert status == 2 and "storage_safe_mode" in output, output
    assert sorted(os.listdir(images)) == ["base.raw", "web1.qcow2", "web4.qcow2"]
    assert settle(TEARDOWN, *variables(**wanted), *UNSAFE, *SYSTEM_PYTHON, check_again=True) == 3
    assert os.listdir(images) == [] and not os.path.ismount(fast)
    assert "images" not in virsh("pool-list", "--all") and "fast" not in virsh("pool-list", "--all")


def test_a_check_run_on_a_bare_host_predicts_all_and_says_what_it_presumes(declared):
    wanted, images, fast = declared
    status, output = ansible_playbook(CLONES, *variables(**wanted), *SYSTEM_PYTHON, "--check", "--diff")
    assert status == 0 and counts(output) == 3, output
    assert "the check run takes it that an earlier task makes it" in output
    assert not images.exists() and not fast.exists()
    assert '+    "capacity": 42949672960' in output and '"name": "web1.qcow2"' in output


def test_a_mistake_stops_the_role_before_the_first_change(pool):
    """Which mistakes are found is tested on the filter entry_problems."""
    pools = [{"name": str(pool / "new")}, {"name": "p", "type": "dir", "targt_path": "/p"}]
    clones = [{"pool": "p", "source": "b", "capacity": "10 cubits"}]
    for mode in ([], ["--check"]):
        status, output = ansible_playbook(CLONES, *variables(storage_pools=pools, storage_clones=clones), *mode)
        assert status == 2, output
        expected = "storage_pools[1] ('p'): unknown key targt_path, did you mean target_path?; storage_clones[0]: capacity: "
        assert expected in output.replace("\\'", "'"), output
    assert not (pool / "new").exists()


def test_a_pool_that_cannot_be_as_declared_stops_the_role_before_the_first_change(pool):
    (pool / "dangling").symlink_to(pool / "nowhere")
    pools = [{"name": str(pool / "new")}, {"name": str(pool / "dangling")}]
    status, output = ansible_playbook(CLONES, *variables(storage_pools=pools))
    assert status == 2 and "dangling" in output, output
    assert not (pool / "new").exists()


def test_pools_that_shall_be_gone_go_last(pool):
    place = pool / "temporary"
    settle(CLONES, *variables(storage_pools=[{"name": place}], storage_volumes=[{"pool": place, "name": "v", "capacity": 1}]))
    volumes = [{"pool": place, "name": "v", "state": "absent"}]
    assert settle(CLONES, *variables(storage_pools=[{"name": place, "state": "absent"}], storage_volumes=volumes), *UNSAFE) == 2
    assert not place.exists()


def test_flat_variables_say_the_same_as_the_lists(pool, qcow2):
    flat = {
        "storage_pool_name": pool / "vms",
        "storage_clone_source_path": qcow2,
        "storage_clone_names": "web1.raw\nweb2.raw\n\n",
        "storage_clone_format": "raw",
        "storage_clone_capacity": "1GiB",
        "storage_clone_owner": "games",
        "storage_clone_mode": "0640",
        # what a form sends for a field that was left empty
        "storage_pool_type": "",
        "storage_pool_path": "",
        "storage_clone_pool": "",
        "storage_clone_source": "",
    }
    assert settle(CLONES, *variables(**flat)) == 2
    assert sorted(os.listdir(pool / "vms")) == ["web1.raw", "web2.raw"]
    status = os.stat(pool / "vms" / "web1.raw")
    assert (status.st_size, status.st_uid, status.st_mode & 0o7777) == (GIB, 5, 0o640)
    assert settle(TEARDOWN, *variables(**flat), *UNSAFE) == 2
    assert not (pool / "vms").exists()


def test_a_flat_pool_of_libvirt(libvirtd, pool, qcow2):
    flat = {"storage_pool_name": "flat", "storage_pool_path": pool / "flat", "storage_clone_source_path": qcow2}
    try:
        assert settle(CLONES, *variables(**flat)) == 2
        assert "base-clone.qcow2" in virsh("vol-list", "flat")
    finally:
        harness.virsh_status("pool-destroy", "flat")
        harness.virsh_status("pool-undefine", "flat")


def test_teardown_needs_no_more_than_the_pool_and_the_names(pool, qcow2):
    assert settle(CLONES, *variables(pool=str(pool), source="base.qcow2", names="a\nb")) == 1
    stated = variables(pool=str(pool), names="a\nb\n")
    status, output = ansible_playbook(TEARDOWN, *stated)
    assert status == 2 and "Teardown would remove a, b, which storage_safe_mode forbids" in output, output
    assert settle(TEARDOWN, *stated, *UNSAFE) == 1
    assert sorted(os.listdir(pool)) == ["base.qcow2", "base.raw"]


def test_a_form_leaves_alone_what_the_inventory_declares(pool, qcow2, scratch):
    inventory = scratch / "declared.yml"
    here = {"ansible_connection": "local", "ansible_python_interpreter": "{{ ansible_playbook_python }}"}
    nightly = {"storage_clones": [{"pool": str(pool), "name": "nightly", "source": "base.qcow2"}]}
    inventory.write_text(yaml.safe_dump({"all": {"hosts": {"localhost": {**here, **nightly}}}}))
    host = ["-i", inventory]
    assert settle(CLONES, *host) == 1
    form = variables(pool=str(pool), source="base.qcow2", volume="mine")
    assert settle(CLONES, *host, *form) == 1
    assert settle(TEARDOWN, *host, *form, *UNSAFE) == 1
    assert sorted(os.listdir(pool)) == ["base.qcow2", "base.raw", "nightly"]
    assert settle(TEARDOWN, *host, *UNSAFE) == 1


@pytest.mark.parametrize(
    "stated, word",
    [
        ({"pool": "/p", "volume": "z"}, "storage_clone_names: what to clone is not stated"),
        ({"storage_pool_path": "/p"}, "storage_pool_path: the pool is not named"),
        ({"storage_clone_names": "a", "storage_clone_source": "b"}, "storage_clone_names: their pool is not stated"),
        ({"storage_clone_prefix": "a"}, "storage_clone_count:  is no number of clones from 1 to 9999"),
        ({"storage_clone_prefix": "a", "storage_clone_count": "-1"}, "storage_clone_count: -1 is no number of clones"),
        ({"storage_clone_count": 3}, "storage_clone_prefix: what the names begin with is not stated"),
        (
            {"storage_clone_prefix": "a", "storage_clone_count": 3, "storage_clone_names": "b"},
            "storage_clone_prefix: it is stated together with storage_clone_names",
        ),
    ],
)
def test_a_form_that_is_filled_in_by_half_is_refused(stated, word):
    if "storage_clone_prefix" in stated or "storage_clone_count" in stated:
        stated = {"storage_clone_pool": "/p", "storage_clone_source": "b", **stated}
    status, output = ansible_playbook(CLONES, *variables(**stated))
    assert status == 2 and word in output, output


# --- golden_image_fanout, and linked clones -------------------------------------------------------------------------------


def test_a_golden_image_is_fanned_out_and_swept_up(pool, qcow2):
    # What a form sends for a field that was left empty is not stated.
    form = {"pool": str(pool), "source": "base.qcow2", "source_pool": "", "names": "", "format": ""}
    form = variables(**form, prefix="web", count="3", clone_type="linked", capacity="1GiB")
    assert settle(FANOUT, *form) == 1
    assert sorted(os.listdir(pool)) == ["base.qcow2", "base.raw", "web1.qcow2", "web2.qcow2", "web3.qcow2"]
    assert info(pool / "web3.qcow2", "qcow2")["backing-filename"] == str(qcow2)
    for playbook, stated in (
        (FANOUT, variables(pool=str(pool), source="base.qcow2", names=["a", "b"], format="raw", mode="0640")),
        (TEARDOWN, [*form, *UNSAFE]),
    ):
        status, output = ansible_playbook(playbook, *stated)
        assert status == 0 and counts(output) == 1, output
    assert sorted(os.listdir(pool)) == ["a", "b", "base.qcow2", "base.raw"]
    assert (pool / "a").stat().st_size == 64 * MIB


def test_a_fanout_needs_names(pool, qcow2):
    status, output = ansible_playbook(FANOUT, *variables(pool=str(pool), source="base.qcow2"))
    assert status == 2 and "names: what the volumes shall be called is not stated" in output, output
    assert sorted(os.listdir(pool)) == ["base.qcow2", "base.raw"]


def test_clones_of_the_lists_and_of_the_form_may_be_linked_and_volumes_flattened(pool, qcow2):
    linked = {"pool": str(pool), "source": "base.qcow2", "clone_type": "linked", "volumes": [{"name": "a"}, {"name": "b"}]}
    flat = {"pool": str(pool), "source": "base.qcow2", "names": "c", "type": "linked"}
    flat = {f"storage_clone_{name}": value for name, value in flat.items()}
    for stated in (
        {"storage_clones": [linked], **flat},
        {"storage_volumes": [{"pool": str(pool), "name": "a", "flatten": True}]},
    ):
        status, output = ansible_playbook(CLONES, *variables(**stated))
        assert status == 0 and counts(output) == 1, output
    assert [info(pool / name, "qcow2").get("backing-filename") for name in "abc"] == [None, str(qcow2), str(qcow2)]


# --- clone_volumes, with pool, source and name alone ----------------------------------------------------------------------


@pytest.mark.parametrize("word", ["name", "volume"])
def test_pool_source_and_name_are_enough_for_root_and_the_systems_libvirt(libvirt_pool, pool, qcow2, word):
    virsh("pool-refresh", libvirt_pool)
    stated = variables(pool=libvirt_pool, source="base.qcow2", **{word: "web"})
    # Ansible remarks that it has the word "name" for itself.
    assert settle(CLONES, *stated, allow_warnings=word == "name") == 1
    assert "web" in virsh("vol-list", libvirt_pool)
    assert settle(TEARDOWN, *stated, *UNSAFE, allow_warnings=word == "name") == 1
    assert sorted(os.listdir(pool)) == ["base.qcow2", "base.raw"]


def test_pool_source_and_name_are_enough_with_no_libvirt_at_all(pool, qcow2):
    """A directory, where neither the daemon nor its Python package can be reached."""
    hidden = {"LIBVIRT_DEFAULT_URI": "qemu+unix:///system?socket=/nowhere"}
    stated = variables(pool=str(pool), source="base.qcow2", volume="web")
    assert settle(CLONES, *stated, env=hidden) == 1
    assert info(pool / "web", "qcow2")["virtual-size"] == 64 * MIB


def test_pool_source_and_name_are_enough_for_a_user_and_his_own_libvirt(libvirtd, user):
    place = user.home / "images"
    pools = variables(storage_pools=[{"name": "mine", "type": "dir", "target_path": place}])
    assert settle(CLONES, *pools, *SYSTEM_PYTHON, user=user) == 1
    assert user.run("qemu-img", "create", "-q", "-f", "qcow2", place / "base.qcow2", "64M").returncode == 0
    stated = variables(pool="mine", source="base.qcow2", volume="web")
    assert settle(CLONES, *stated, user=user) == 1
    assert info(place / "web", "qcow2")["virtual-size"] == 64 * MIB
    listed = user.run("virsh", "-q", "-c", "qemu:///session", "vol-list", "mine").stdout
    assert "web" in listed
    assert "mine" not in virsh("pool-list", "--all")
    stated += variables(storage_pools=[{"name": "mine"}])
    assert settle(TEARDOWN, *stated, *UNSAFE, *SYSTEM_PYTHON, user=user) == 2


def test_under_become(pool, qcow2):
    stated = variables(pool=str(pool), source="base.qcow2", volume="web", ansible_become=True, ansible_become_method="su")
    assert settle(CLONES, *stated) == 1


def test_several_names_in_one_run(pool, qcow2):
    stated = variables(pool=str(pool), source="base.qcow2", names=["a", "b"], capacity="1GiB")
    assert settle(CLONES, *stated) == 1
    assert sorted(os.listdir(pool)) == ["a", "b", "base.qcow2", "base.raw"]


# --- the role's parts agree with the modules ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tasks, module", [("pools", "storage_pool"), ("volumes", "storage_volume"), ("clones", "storage_volume_clone")]
)
def test_the_role_hands_on_every_option_of_the_module(tasks, module):
    environment = {**os.environ, "ANSIBLE_COLLECTIONS_PATH": str(ROOT / ".venv" / "collections")}
    shown = run(ROOT / ".venv/bin/ansible-doc", "--json", f"virtforge.libvirt.{module}", env=environment)
    options = json.loads(shown)[f"virtforge.libvirt.{module}"]["doc"]["options"]
    (task,) = yaml.safe_load((ROOT / f"roles/storage/tasks/{tasks}.yml").read_text())
    handed = task[f"virtforge.libvirt.{module}"]
    assert set(handed) == set(options)
    for option, details in options.items():
        for name in [option, *details.get("aliases", [])]:
            assert f"item.{name} " in handed[option], (option, name)


def test_defaults_of_the_role_are_those_of_its_argument_specs():
    specs = yaml.safe_load((ROOT / "roles/storage/meta/argument_specs.yml").read_text())["argument_specs"]
    defaults = yaml.safe_load((ROOT / "roles/storage/defaults/main.yml").read_text())
    for entry in ("main", "teardown"):
        assert {name: option["default"] for name, option in specs[entry]["options"].items()} == defaults
