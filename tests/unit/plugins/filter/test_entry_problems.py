# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A mistake in an entry of the role's lists is one sentence that names the entry and the key."""

from __future__ import annotations

import pytest
from ansible.errors import AnsibleFilterError
from ansible_collections.virtforge.libvirt.plugins.filter.entry_problems import FilterModule

entry_problems = FilterModule().filters()["entry_problems"]

POOL = {"name": "p", "type": "dir", "target_path": "/p"}
VOLUME = {"pool": "p", "name": "v", "capacity": "1G"}
CLONE = {"pool": "p", "name": "c", "source": "b"}


@pytest.mark.parametrize(
    "module, entry, problem",
    [
        ("storage_pool", {**POOL, "targt_path": "/p"}, "('p'): unknown key targt_path, did you mean target_path?"),
        ("storage_pool", {**POOL, "colour": "blue"}, "('p'): unknown key colour"),
        ("storage_pool", {"type": "dir", "path": "/p"}, ": one of the following is required: name, pool, xml"),
        (
            "storage_pool",
            {**POOL, "type": "directory"},
            "('p'): value of type must be one of: dir, fs, netfs, logical, disk, rbd, iscsi, iscsi-direct, scsi, mpath,"
            " gluster, zfs, vstorage, got: directory",
        ),
        ("storage_pool", {**POOL, "state": "gone"}, "('p'): value of state must be one of: present, active, inactive, absent"),
        ("storage_pool", {**POOL, "target_path": "p"}, "('p'): target_path: 'p' is not an absolute path"),
        ("storage_pool", {**POOL, "pool_source": {"device": "/d"}}, "('p'): unknown key pool_source.device, did you mean"),
        (
            "storage_pool",
            {**POOL, "pool_source": {"hosts": [{"nme": "h"}]}},
            "('p'): unknown key pool_source.hosts.nme",
        ),
        ("storage_pool", {**POOL, "pool_source": {"devices": ["/d"]}}, "('p'): pool_source.devices: ['/d'] has no use in"),
        ("storage_pool", {"pool": "/p", "type": "dir"}, "('/p'): type: 'dir' has no meaning for the directory pool '/p'"),
        ("storage_volume", {**VOLUME, "capacity": "10 cubits"}, "('v'): capacity: '10 cubits'"),
        ("storage_volume", {"name": "v"}, "('v'): missing required arguments: pool"),
        ("storage_volume", {**VOLUME, "wipe": True}, "('v'): wipe: True has no meaning for state=present"),
        ("storage_volume", {**VOLUME, "state": "absent", "name": "a/b"}, "('a/b'): name: 'a/b' contains '/'"),
        ("storage_volume_clone", {"pool": "p", "volume": "c"}, "('c'): one of the following is required: source, source_path"),
        (
            "storage_volume_clone",
            {**CLONE, "source_path": "/b"},
            "('c'): parameters are mutually exclusive",
        ),
        ("storage_volume_clone", {**CLONE, "qcow2": {"compact": "1.1"}}, "('c'): unknown key qcow2.compact, did you mean"),
        ("storage_volume_clone", {**CLONE, "resize": "perhaps"}, "('c'): argument 'resize' is of type"),
        ("storage_volume_clone", {**CLONE, "mode": "rwx"}, "('c'): mode: 'rwx' is neither an octal nor a symbolic mode"),
        ("storage_volume_clone", {"pool": "p", "source": "b", "volumes": [{"nme": "v"}]}, ": unknown key volumes.nme"),
        ("storage_volume_clone", {"pool": "p", "source": "b", "volumes": [{"name": "a/b"}]}, ": volumes[0] ('a/b'): name"),
        (
            "storage_volume_clone",
            {**CLONE, "clone_type": "thin"},
            "('c'): value of clone_type must be one of: full, linked, got: thin",
        ),
        ("storage_volume", {**VOLUME, "flatten": "perhaps"}, "('v'): argument 'flatten' is of type"),
        ("storage_volume_clone", "c", ": 'c' is not a dictionary"),
    ],
)
def test_a_mistake_names_the_entry_and_the_key(module, entry, problem):
    good = {"storage_pool": {"name": "good"}, "storage_volume": VOLUME, "storage_volume_clone": CLONE}[module]
    (found,) = entry_problems([good, entry], module, "things")
    assert found.startswith("things[1]")
    assert problem in found
    assert "\n" not in found


@pytest.mark.parametrize(
    "module, entry, forbidden",
    [
        ("storage_pool", {**POOL, "state": "absent"}, "state is absent"),
        ("storage_volume", {**VOLUME, "state": "absent"}, "state is absent"),
        ("storage_volume", {**VOLUME, "force": "yes"}, "force is true"),
        ("storage_volume_clone", {**CLONE, "force": True}, "force is true"),
    ],
)
def test_safe_mode_forbids_what_could_destroy_something(module, entry, forbidden):
    assert entry_problems([entry], module, "things") == []
    assert entry_problems([entry], module, "things", True) == [
        f"things[0] ({entry['name']!r}): {forbidden}, which storage_safe_mode forbids"
    ]


@pytest.mark.parametrize(
    "module, first, second, key",
    [
        ("storage_pool", POOL, {**POOL, "target_path": "/q"}, "name"),
        ("storage_pool", POOL, {"pool": "q", "type": "dir", "path": "/p/"}, "target_path"),
        ("storage_volume", VOLUME, {"pool": "p", "volume": "v", "size": "2G"}, "name"),
        ("storage_volume_clone", CLONE, {"pool": "p", "source": "b", "volumes": [{"name": "d"}, {"name": "c"}]}, "name"),
    ],
)
def test_two_entries_for_the_same_thing_would_undo_each_other(module, first, second, key):
    (problem,) = entry_problems([first, second], module, "things")
    assert problem.startswith("things[1]") and f": {key} is that of things[0]" in problem


def test_entries_without_a_mistake():
    assert entry_problems([POOL, {"pool": "q", "state": "inactive"}], "storage_pool", "things", True) == []
    assert entry_problems([VOLUME, {"pool": "/p", "volume": "w", "size": "1G"}], "storage_volume", "things", True) == []
    # A user whom this machine does not know may be one of the host.
    assert (
        entry_problems([CLONE, {**CLONE, "name": "d", "owner": "nobody-of-that-name"}], "storage_volume_clone", "things", True)
        == []
    )


def test_a_module_that_takes_no_entries_is_refused():
    with pytest.raises(AnsibleFilterError, match="storage_pool_info"):
        entry_problems([], "storage_pool_info", "things")
