# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What is done to a pool, row by row: request and facts in, actions or refusal out."""

from __future__ import annotations

from dataclasses import replace

import pytest
from ansible_collections.virtforge.libvirt.plugins.module_utils._errors import CloneError
from ansible_collections.virtforge.libvirt.plugins.module_utils._permissions import Mode
from ansible_collections.virtforge.libvirt.plugins.module_utils._pools.definition import Definition, Host, Source, Stated
from ansible_collections.virtforge.libvirt.plugins.module_utils._poolstate import planner
from ansible_collections.virtforge.libvirt.plugins.module_utils._poolstate.planner import (
    DeviceFacts,
    DirectoryFacts,
    Facts,
    Ownership,
    PoolFacts,
    Unanswered,
)
from ansible_collections.virtforge.libvirt.plugins.module_utils._poolstate.request import Request

DIR = Definition("dir", "p", "u", "/p")
FS = Definition("fs", "p", "u", "/p", Source(devices=("/dev/x",), format="xfs"))
NETFS = Definition("netfs", "p", "u", "/p", Source(hosts=(Host("nas"),), dir="/x", format="nfs"))
THERE = DirectoryFacts("/p", True, identity=(1, 2), owner=Ownership(0, 0, 0o711))
MISSING = DirectoryFacts("/p")


def pool(definition=DIR, active=True, **kwargs):
    return PoolFacts(definition, kwargs.pop("live", definition), "<pool/>", active, **kwargs)


def request(**kwargs):
    stated = {key: kwargs.pop(key) for key in ("type", "target_path", "devices", "format") if key in kwargs}
    return Request("p", stated=Stated(**stated), **kwargs)


def facts(had=None, desired=None, **kwargs):
    """Everything answered and harmless, unless a row says otherwise."""
    desired = desired or (had.definition if had else None)
    values = {"directory": THERE, "others": (), "users": "", "denied": "", "devices": (DeviceFacts("/dev/x", format="xfs"),)}
    values.update(kwargs)
    return Facts(had, desired, "<pool/>" if desired else None, **values)


def refusal(stated, known):
    with pytest.raises(CloneError) as caught:
        planner.plan(stated, known)
    return caught.value.code, caught.value.msg


# --- states ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "had, state, actions",
    [
        (None, "present", ["defined"]),
        (None, "active", ["defined", "started"]),
        (None, "inactive", ["defined"]),
        (None, "absent", []),
        (pool(), "present", []),
        (pool(), "active", []),
        (pool(), "inactive", ["stopped"]),
        (pool(), "absent", ["stopped", "undefined"]),
        (pool(active=False), "present", []),
        (pool(active=False), "active", ["started"]),
        (pool(active=False), "inactive", []),
        (pool(active=False), "absent", ["undefined"]),
        (pool(persistent=False), "present", ["defined"]),
        (pool(persistent=False), "active", ["defined"]),
        (pool(persistent=False), "inactive", ["defined", "stopped"]),
        (pool(persistent=False), "absent", ["stopped", "undefined"]),
        (pool(FS, unmounted=True), "present", []),
        (pool(FS, unmounted=True), "active", ["stopped", "started"]),
        (pool(FS, unmounted=True), "inactive", ["stopped"]),
    ],
)
def test_states(had, state, actions):
    desired = had.definition if had else DIR
    plan = planner.plan(request(type=desired.type, state=state), facts(had, desired))
    assert list(plan.actions) == actions
    assert (plan.before is None) == (had is None)
    assert (plan.after is None) == (state == "absent")
    assert (plan.before != plan.after) == bool(actions)


@pytest.mark.parametrize(
    "had, state, actions",
    [
        (pool(), "active", ["redefined", "stopped", "started"]),
        (pool(), "present", ["redefined", "stopped", "started"]),
        (pool(), "inactive", ["redefined", "stopped"]),
        (pool(active=False), "active", ["redefined", "started"]),
        (pool(active=False), "present", ["redefined"]),
        (pool(active=False), "inactive", ["redefined"]),
        (pool(persistent=False), "active", ["defined", "stopped", "started"]),
        # Already defined so, but still running as it was.
        (pool(replace(DIR, target_path="/q"), live=DIR), "active", ["stopped", "started"]),
        (pool(replace(DIR, target_path="/q"), live=DIR), "inactive", ["stopped"]),
        # Running so, but defined otherwise: no restart is needed.
        (pool(DIR, live=replace(DIR, target_path="/q")), "active", ["redefined"]),
    ],
)
def test_another_definition(had, state, actions):
    desired = replace(DIR, target_path="/q")
    known = facts(had, desired, directory=replace(THERE, path="/q"))
    plan = planner.plan(request(target_path="/q", state=state), known)
    assert list(plan.actions) == actions
    assert plan.after.definition.target_path == "/q"


def test_a_pool_that_leaves_its_volumes_behind_is_warned_of():
    def warnings(had, **stated):
        desired = replace(had, **stated)
        return planner.plan(request(target_path="/q"), facts(pool(had), desired, directory=replace(THERE, path="/q"))).warnings

    (warning,) = warnings(DIR, target_path="/q")
    assert "'p' moves from '/p' to '/q'" in warning and "stay in '/p'" in warning
    # Mounted elsewhere, a file system takes its volumes along.
    assert warnings(FS, target_path="/q") == () == warnings(DIR)


def test_a_definition_that_is_pending_is_left_so_by_who_states_none():
    had = pool(replace(DIR, target_path="/q"), live=DIR)
    plan = planner.plan(request(), facts(had, directory=replace(THERE, path="/q")))
    assert plan.actions == () and plan.before == plan.after


@pytest.mark.parametrize("stated, had, actions", [(None, True, []), (True, True, []), (False, True, ["autostart"])])
def test_autostart_is_compared_where_it_is_stated(stated, had, actions):
    plan = planner.plan(request(autostart=stated), facts(pool(autostart=had)))
    assert list(plan.actions) == actions
    assert plan.after.autostart == (had if stated is None else stated)


# --- the directory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "had, stated, actions",
    [
        (None, {"type": "dir"}, ["created", "defined", "started"]),
        (None, {"type": "dir", "state": "present"}, ["created", "defined"]),
        (None, {"type": "dir", "state": "inactive"}, ["created", "defined"]),
        (pool(active=False), {}, ["created", "started"]),
        (pool(active=False), {"state": "present"}, []),
        (pool(active=False), {"state": "present", "type": "dir"}, ["created"]),
        (pool(active=False), {"state": "inactive", "owner": 5}, ["created"]),
        (pool(), {"state": "inactive"}, ["stopped"]),
        (pool(active=False), {"state": "absent"}, ["undefined"]),
    ],
)
def test_a_missing_directory_is_made_where_it_is_needed_or_described(had, stated, actions):
    plan = planner.plan(request(**stated), facts(had, DIR, directory=MISSING))
    assert list(plan.actions) == actions


@pytest.mark.parametrize(
    "stated, described, owner",
    [
        ({}, (None, None, None), Ownership(None, None, 0o711)),
        ({"owner": 5, "group": 6, "mode": Mode("0750")}, (None, None, None), Ownership(5, 6, 0o750)),
        ({"mode": Mode("g+w")}, (None, None, None), Ownership(None, None, 0o731)),
        ({}, (0o755, 7, 8), Ownership(7, 8, 0o755)),
        ({"owner": 5, "mode": Mode("o=")}, (0o755, 7, 8), Ownership(5, 8, 0o750)),
    ],
)
def test_what_a_directory_is_made_with(stated, described, owner):
    desired = replace(DIR, permissions=described)
    assert planner.plan(request(type="dir", **stated), facts(None, desired, directory=MISSING)).owner == owner


def test_a_user_without_root_makes_it_his_own_whatever_the_document_has():
    desired = replace(DIR, permissions=(0o755, 7, 8))
    plan = planner.plan(request(type="dir"), facts(None, desired, directory=MISSING, uid=1000))
    assert plan.owner == Ownership(None, None, 0o755)


@pytest.mark.parametrize(
    "had, stated, actions",
    [
        (pool(), {"owner": 0, "group": 0, "mode": Mode("0711")}, []),
        (pool(), {"mode": Mode("0750")}, ["permissions"]),
        (pool(), {"group": 5}, ["permissions"]),
        (pool(), {"group": 5, "state": "inactive"}, ["stopped", "permissions"]),
        (pool(), {"owner": 5, "state": "absent"}, ["stopped", "undefined"]),
        (pool(FS), {"owner": 5}, ["permissions"]),
        # Under a file system that is not mounted there is nothing to own.
        (pool(FS, active=False), {"owner": 5, "state": "present"}, []),
        (pool(FS, active=False), {"owner": 5}, ["started"]),
        (pool(FS, unmounted=True), {"owner": 5, "state": "present"}, []),
    ],
)
def test_owner_group_and_mode_of_a_directory_that_exists(had, stated, actions):
    assert list(planner.plan(request(**stated), facts(had)).actions) == actions


@pytest.mark.parametrize(
    "directory, stated, code, message",
    [
        (replace(MISSING, obstacle="is a file"), {}, "INVALID_ARG", "target_path: '/p' is a file"),
        (replace(MISSING, denied="this user may not"), {}, "OPERATION_DENIED", "this user may not"),
        (replace(THERE, denied="this user may not"), {"mode": Mode("0700")}, "OPERATION_DENIED", "this user may not"),
        (MISSING, {"owner": 5}, "OPERATION_DENIED", "owner: only root gives '/p' to somebody else; use become"),
        (THERE, {"owner": 5}, "OPERATION_DENIED", "owner: only root gives '/p' to somebody else; use become"),
    ],
)
def test_a_directory_that_cannot_be_made_or_owned(directory, stated, code, message):
    assert refusal(request(type="dir", **stated), facts(pool(), directory=directory, uid=1000)) == (code, message)


def test_a_directory_that_cannot_be_changed_is_no_matter_where_nothing_is_changed():
    plan = planner.plan(
        request(mode=Mode("0711")), facts(pool(), directory=replace(THERE, denied="this user may not"), uid=1000)
    )
    assert plan.actions == ()


# --- building -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "had, stated, device, actions",
    [
        (None, {}, DeviceFacts("/dev/x"), ["defined", "built", "started"]),
        (None, {"state": "present"}, DeviceFacts("/dev/x"), ["defined", "built"]),
        (None, {}, DeviceFacts("/dev/x", format="xfs", holds="a file system (xfs)"), ["defined", "started"]),
        (pool(FS, active=False), {}, DeviceFacts("/dev/x"), ["built", "started"]),
        (pool(FS, active=False), {"state": "inactive"}, DeviceFacts("/dev/x"), ["built"]),
        # What runs is not looked at.
        (pool(FS), {}, None, []),
        (pool(FS), {"state": "absent"}, None, ["stopped", "undefined"]),
    ],
)
def test_building(had, stated, device, actions):
    plan = planner.plan(request(type="fs", build=True, **stated), facts(had, FS, devices=(device,)))
    assert list(plan.actions) == actions


@pytest.mark.parametrize(
    "device, code, words",
    [
        (DeviceFacts("/dev/x", holds="data that is no known format"), "OPERATION_INVALID", ["/dev/x", "data", "xfs"]),
        (DeviceFacts("/dev/x", format="ext4", holds="a file system (ext4)"), "OPERATION_INVALID", ["/dev/x", "ext4", "xfs"]),
        (DeviceFacts("/dev/x", claimed="is in use"), "IN_USE", ["/dev/x", "in use"]),
        (DeviceFacts("/dev/x", exists=False), "INVALID_ARG", ["/dev/x", "pool_source.devices"]),
    ],
)
def test_what_is_never_formatted(device, code, words):
    found, message = refusal(request(type="fs", build=True), facts(None, FS, devices=(device,)))
    assert found == code and all(word in message for word in words), message


def test_a_device_that_an_earlier_task_would_have_made():
    known = facts(None, FS, devices=(DeviceFacts("/dev/x", exists=False),), check_mode=True)
    plan = planner.plan(request(type="fs", build=True), known)
    assert plan.actions == ("defined", "built", "started")
    assert "/dev/x" in plan.warnings[0]


@pytest.mark.parametrize(
    "desired, message",
    [
        (DIR, "build: a pool of the type dir has nothing that could be formatted"),
        (NETFS, "build: a pool of the type netfs has nothing that could be formatted"),
        (
            replace(FS, source=Source(devices=("/dev/x",), format="auto")),
            "build: pool 'p' needs pool_source.format to be formatted",
        ),
    ],
)
def test_what_cannot_be_built(desired, message):
    assert refusal(request(type=desired.type, build=True), facts(None, desired)) == ("INVALID_ARG", message)


# --- refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "had, desired, known, code, message",
    [
        (
            pool(),
            FS,
            {},
            "DIFFERS",
            "pool 'p' exists with the type dir, asked for is fs; it is not changed in place, remove it with state=absent first",
        ),
        (
            pool(),
            replace(DIR, uuid="v"),
            {},
            "DIFFERS",
            "pool 'p' exists with the uuid u, asked for is v; it is not changed in place, remove it with state=absent first",
        ),
        (
            None,
            Definition("sheepdog", "p", target_path="/dev"),
            {},
            "NO_SUPPORT",
            "type: pools of the type 'sheepdog' cannot be defined; those are dir, disk, fs, gluster, iscsi, iscsi-direct,"
            " logical, mpath, netfs, rbd, scsi, vstorage, zfs",
        ),
        (None, Definition("dir", "p"), {}, "INVALID_ARG", "target_path: a pool of the type dir needs it"),
        (
            None,
            replace(FS, source=Source(format="xfs")),
            {},
            "INVALID_ARG",
            "pool_source.devices: a pool of the type fs needs it",
        ),
        (
            None,
            replace(FS, source=Source(devices=("/a", "/b"))),
            {},
            "INVALID_ARG",
            "pool_source.devices: a pool of the type fs has one, not 2",
        ),
        (
            None,
            replace(NETFS, source=Source(dir="/x")),
            {},
            "INVALID_ARG",
            "pool_source.hosts: a pool of the type netfs needs it",
        ),
        (
            None,
            replace(DIR, source=Source(dir="/x")),
            {},
            "INVALID_ARG",
            "pool_source.dir: '/x' has no use in a pool of the type dir",
        ),
        (
            None,
            replace(NETFS, source=replace(NETFS.source, format="xfs")),
            {},
            "CONFIG_UNSUPPORTED",
            "pool_source.format: 'xfs' is no format of libvirt's for the type netfs; those are auto, nfs, glusterfs, cifs,"
            " of which auto takes any file system that the host can mount",
        ),
        (
            None,
            DIR,
            {"others": (Definition("fs", "q", target_path="/p"),)},
            "OPERATION_INVALID",
            "target_path: '/p' is that of pool 'q' already",
        ),
        (
            None,
            FS,
            {"others": (Definition("disk", "q", source=Source(devices=("/dev/x",))),)},
            "OPERATION_INVALID",
            "pool_source.devices: '/dev/x' is that of pool 'q' already",
        ),
        (
            None,
            NETFS,
            {"others": (replace(NETFS, name="q", uuid="v", target_path="/q"),)},
            "OPERATION_INVALID",
            "pool_source: '/x' of 'nas' is that of pool 'q' already",
        ),
        (
            pool(),
            replace(DIR, target_path="/q"),
            {"users": "domain 'web'"},
            "IN_USE",
            "pool 'p' cannot be redefined: its volumes are used by domain 'web'",
        ),
        (None, DIR, {"denied": "read only access"}, "OPERATION_DENIED", "pool 'p': read only access"),
    ],
)
def test_refusals(had, desired, known, code, message):
    assert refusal(request(type=desired.type), facts(had, desired, **known)) == (code, message)


def test_pools_that_share_nothing_are_no_conflict():
    others = (
        Definition("logical", "q", target_path="/p"),
        replace(NETFS, name="r", uuid="v", target_path="/r", source=replace(NETFS.source, dir="/y")),
        replace(NETFS, name="s", uuid="w", target_path="/s", source=replace(NETFS.source, hosts=(Host("other"),))),
    )
    for desired in (DIR, NETFS):
        planner.plan(request(type=desired.type), facts(None, desired, others=others))


@pytest.mark.parametrize("state", ["inactive", "absent"])
def test_a_mounted_pool_is_not_taken_from_a_domain_and_a_directory_is_not_taken_at_all(state):
    known = {"users": "domain 'web'"}
    assert refusal(request(state=state), facts(pool(FS), **known)) == (
        "IN_USE",
        "pool 'p' cannot be stopped: its volumes are used by domain 'web'",
    )
    assert planner.plan(request(state=state), facts(pool(), **known)).actions[0] == "stopped"


def test_a_pool_that_nobody_has_defined():
    assert refusal(request(), facts()) == (
        "NO_STORAGE_POOL",
        "pool 'p' does not exist at qemu:///system; state type, or xml, to define it",
    )
    assert planner.plan(request(state="absent"), facts()).actions == ()
    plan = planner.plan(request(autostart=True), facts(check_mode=True))
    assert plan.actions == ("started", "autostart") and "earlier task" in plan.warnings[0]


@pytest.mark.parametrize(
    "stated, known, question",
    [
        (request(type="dir"), facts(None, DIR, others=None), "others"),
        (request(target_path="/q"), facts(pool(), replace(DIR, target_path="/q"), users=None), "users"),
        (request(state="inactive"), facts(pool(FS), users=None), "users"),
        (request(), facts(pool(FS, active=False), devices=None), "devices"),
        (request(state="inactive"), facts(pool(), denied=None), "denied"),
    ],
)
def test_what_costs_something_is_asked_for_when_it_is_needed(stated, known, question):
    with pytest.raises(Unanswered) as caught:
        planner.plan(stated, known)
    assert caught.value.question == question


def test_a_pool_that_is_as_it_should_be_asks_for_nothing():
    known = facts(pool(), others=None, users=None, devices=None, denied=None)
    assert planner.plan(request(type="dir", target_path="/p"), known).actions == ()


# --- a directory without libvirt ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "directory, stated, actions",
    [
        (MISSING, {}, ["created"]),
        (MISSING, {"state": "present"}, ["created"]),
        (MISSING, {"state": "absent"}, []),
        (THERE, {}, []),
        (THERE, {"owner": 5}, ["permissions"]),
        (THERE, {"state": "absent"}, ["removed"]),
    ],
)
def test_a_plain_directory(directory, stated, actions):
    plan = planner.plan(Request("/p", **stated), Facts(directory=directory))
    assert list(plan.actions) == actions
    assert (plan.before is None, plan.after is None) == (directory is MISSING, stated.get("state") == "absent")


@pytest.mark.parametrize(
    "directory, state, code, message",
    [
        (replace(MISSING, obstacle="is a file"), "active", "INVALID_ARG", "name: '/p' is a file"),
        (replace(MISSING, obstacle="is a file"), "absent", "INVALID_ARG", "name: '/p' is a file"),
        (
            replace(THERE, entry="web"),
            "absent",
            "OPERATION_INVALID",
            "pool '/p' is not removed: it is not empty, there is 'web' in it",
        ),
        (replace(THERE, denied="this user may not"), "absent", "OPERATION_DENIED", "this user may not"),
    ],
)
def test_a_plain_directory_that_is_refused(directory, state, code, message):
    assert refusal(Request("/p", state=state), Facts(directory=directory)) == (code, message)


def test_a_check_run_takes_it_that_an_earlier_task_empties_a_directory():
    made = planner.plan(Request("/p", state="absent"), Facts(directory=replace(THERE, entry="web"), check_mode=True))
    assert made.actions == ("removed",)
    assert "'web'" in made.warnings[0] and "an earlier task deletes" in made.warnings[0]


# --- what libvirt would get wrong -----------------------------------------------------------------------------------------


def test_the_uuid_of_another_pool_is_refused():
    code, msg = refusal(request(xml="<pool/>"), facts(None, DIR, others=(Definition("dir", "other", "u", "/other"),)))
    assert code == "OPERATION_INVALID" and "uuid u" in msg and "'other'" in msg


@pytest.mark.parametrize("desired, refuses", [(DIR, False), (FS, True), (NETFS, True)])
def test_a_path_with_a_symbolic_link_is_refused_where_something_is_mounted(desired, refuses):
    stated, known = request(type=desired.type), facts(None, desired, directory=replace(THERE, real="/real"))
    if not refuses:
        assert planner.plan(stated, known).actions == ("defined", "started")
        return
    code, msg = refusal(stated, known)
    assert code == "INVALID_ARG" and "target_path" in msg and "'/real'" in msg


@pytest.mark.parametrize("state", ["inactive", "absent"])
def test_a_pool_that_libvirt_would_not_unmount_is_not_stopped(state):
    code, msg = refusal(request(state=state), facts(pool(FS, mounted="/real")))
    assert code == "OPERATION_INVALID" and "'/real'" in msg and "unmount it first" in msg


def test_a_pool_whose_file_system_died_is_stopped_though_not_called_as_it_should_be():
    dead = replace(THERE, broken="cannot be looked at: Input/output error")
    known = facts(pool(FS, mounted="/p"), directory=dead)
    assert planner.plan(request(type="fs", state="inactive"), known).actions == ("stopped",)
    assert refusal(request(type="fs"), known) == ("IO_ERROR", "target_path: '/p' cannot be looked at: Input/output error")
