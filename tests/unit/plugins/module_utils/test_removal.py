# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The outcome table of state=absent, row by row."""

from __future__ import annotations

import os

import pytest
from ansible_collections.virtforge.libvirt.plugins.module_utils._errors import CloneError
from ansible_collections.virtforge.libvirt.plugins.module_utils._transfer import wipe
from ansible_collections.virtforge.libvirt.plugins.module_utils._volumes import removal
from ansible_collections.virtforge.libvirt.plugins.module_utils._volumes.removal import Facts, Removal

THERE = {"volume": {"name": "web"}}
ABOVE = ("web1", "web2", "/other/web3", "web4", "web5")


def plan(facts, **request):
    return removal.plan(Removal("p", "web", **request), Facts(**facts))


@pytest.mark.parametrize(
    "facts, request_, actions",
    [
        ({}, {}, ()),
        ({}, {"wipe": "zero", "force": True}, ()),
        ({"missing": "pool 'p' is not active"}, {}, ()),
        (THERE, {}, ("deleted",)),
        (THERE, {"force": True}, ("deleted",)),
        (THERE, {"wipe": "zero"}, ("wiped", "deleted")),
        (THERE, {"wipe": "gutmann"}, ("wiped", "deleted")),
        ({**THERE, "dependents": ABOVE}, {"force": True}, ("deleted",)),
        ({**THERE, "dependents": ABOVE}, {"force": True, "wipe": "trim"}, ("wiped", "deleted")),
        ({**THERE, "untold": ("cut",)}, {"force": True}, ("deleted",)),
        ({**THERE, "unseen": ("q",)}, {}, ("deleted",)),
        # Another name of the file keeps its data, unless it is wiped.
        ({**THERE, "links": 2}, {}, ("deleted",)),
        ({**THERE, "kept": "for a reason"}, {"wipe": "zero"}, ("wiped", "deleted")),
        ({**THERE, "not_wipeable": "it is thin"}, {}, ("deleted",)),
    ],
)
def test_what_is_done(facts, request_, actions):
    assert plan(facts, **request_).actions == actions


@pytest.mark.parametrize(
    "facts, request_, code, words",
    [
        ({"obstacle": "a directory"}, {"force": True}, "OPERATION_INVALID", ["'web'", "'p'", "taken by a directory"]),
        ({**THERE, "denied": "use become"}, {"force": True}, "OPERATION_DENIED", ["use become"]),
        ({**THERE, "fixed": "it is a LUN"}, {"force": True}, "NO_SUPPORT", ["'web'", "cannot be deleted: it is a LUN"]),
        ({**THERE, "not_wipeable": "it is thin"}, {"wipe": "zero", "force": True}, "NO_SUPPORT", ["wiped: it is thin"]),
        ({**THERE, "dependents": ABOVE, "deleted_along": True}, {}, "OPERATION_INVALID", ["force=true deletes those too"]),
        ({**THERE, "dependents": ABOVE[:1]}, {}, "OPERATION_INVALID", ["1 volume depends on it: web1;", "force=true"]),
        (
            {**THERE, "dependents": ABOVE},
            {},
            "OPERATION_INVALID",
            ["5 volumes depend on it: web1, web2, /other/web3 and 2 more;"],
        ),
        (
            {**THERE, "untold": ("cut", "/q/cut2")},
            {},
            "OPERATION_INVALID",
            ["'web'", "cannot be told of cut, /q/cut2", "force=true"],
        ),
        ({**THERE, "users": "domain 'a'"}, {}, "IN_USE", ["'web'", "open by domain 'a'"]),
        ({**THERE, "users": "domain 'a'"}, {"force": True, "wipe": "zero"}, "IN_USE", ["open by domain 'a'"]),
        ({**THERE, "dependents": ABOVE, "users": "domain 'a'"}, {"force": True}, "IN_USE", ["open by domain 'a'"]),
        ({**THERE, "links": 3}, {"wipe": "zero", "force": True}, "OPERATION_INVALID", ["cannot be wiped", "2 more names"]),
        (
            {**THERE, "space_missing": 1 << 30},
            {"wipe": "dod"},
            "NO_SPACE",
            ["wipe_algorithm=dod", "1073741824 bytes (1 GiB)"],
        ),
    ],
)
def test_what_is_refused(facts, request_, code, words):
    with pytest.raises(CloneError) as caught:
        plan(facts, **request_)
    assert caught.value.code == code
    assert all(word in caught.value.msg for word in words), caught.value.msg


@pytest.mark.parametrize(
    "facts, request_, words",
    [
        ({"missing": "pool 'p' is not active"}, {}, ["pool 'p' is not active", "'web'", "fails unless an earlier task"]),
        ({**THERE, "dependents": ABOVE}, {"force": True}, ["deleted although 5 volumes depend on it: web1,"]),
        ({**THERE, "dependents": ABOVE, "deleted_along": True}, {"force": True}, ["web1,", "those are deleted too"]),
        ({**THERE, "untold": ("cut", "/q/cut2")}, {"force": True}, ["'web'", "cannot be told of cut, /q/cut2"]),
        ({**THERE, "unseen": ("q", "r")}, {}, ["'web'", "cannot be told of pool 'q', pool 'r'"]),
        ({**THERE, "kept": "other files share it"}, {"wipe": "zero"}, ["stays on the disk: other files share it"]),
    ],
)
def test_what_is_warned_of(facts, request_, words):
    (warning,) = plan(facts, **request_).warnings
    assert all(word in warning for word in words), warning


def test_nothing_is_warned_of_otherwise():
    assert plan(THERE, force=True, wipe="zero").warnings == ()


def test_parameters():
    params = {
        "pool": "p",
        "name": "web",
        "uri": "qemu:///session",
        "lock_timeout": 7,
        "timeout": 9,
        "force": True,
        "wipe": True,
    }
    assert removal.from_parameters(params) == Removal("p", "web", "qemu:///session", "zero", True, 7.0, 9.0)
    assert removal.from_parameters({"pool": "p", "name": "web"}) == Removal("p", "web")
    assert removal.from_parameters({**params, "wipe_algorithm": "dod"}).wipe == "dod"
    document = "<volume><name>data</name></volume>"
    assert removal.from_parameters({"pool": "p", "xml": document}).name == "data"
    assert removal.from_parameters({"pool": "p", "xml": document, "name": "web"}).name == "web"


@pytest.mark.parametrize(
    "params, code, words",
    [
        ({"name": "../web"}, "INVALID_ARG", ["name", "../web"]),
        ({"name": ""}, "INVALID_ARG", ["name"]),
        ({"name": ".virtforge-0123456789abcdef.tmp"}, "INVALID_ARG", ["name", "reserved"]),
        ({"pool": "a/b"}, "INVALID_ARG", ["pool", "a/b"]),
        ({"name": None, "xml": "<volume/>"}, "INVALID_ARG", ["name"]),
        ({"name": None, "xml": "<pool/>"}, "XML_ERROR", ["xml"]),
        ({"wipe_algorithm": "dod"}, "INVALID_ARG", ["wipe_algorithm", "dod", "wipe=true"]),
        ({"lock_timeout": -1}, "INVALID_ARG", ["lock_timeout", "-1"]),
        ({"timeout": -1}, "INVALID_ARG", ["timeout", "-1"]),
    ],
)
def test_bad_parameters(params, code, words):
    with pytest.raises(CloneError) as caught:
        removal.from_parameters({"pool": "p", "name": "web", **params})
    assert caught.value.code == code
    assert all(word in caught.value.msg for word in words), caught.value.msg


# --- overwriting ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


def test_zeros_are_written_over_data_and_over_nothing_else(file):
    os.ftruncate(file, 64 << 20)
    for at in (0, 10 << 20, (64 << 20) - 5000):
        os.pwrite(file, b"secret" * 800, at)
    os.fsync(file)
    blocks = os.fstat(file).st_blocks
    wipe.wipe(file, "zero", "it", lambda: None)
    assert os.fstat(file).st_size == 64 << 20
    assert os.pread(file, 64 << 20, 0).count(0) == 64 << 20
    assert os.fstat(file).st_blocks <= blocks + 16


def test_wiping_stops_when_it_is_told_to(file):
    os.pwrite(file, bytes(range(256)) * (4 << 12), 0)
    rounds = []

    def watch():
        rounds.append(1)
        if len(rounds) == 3:
            raise CloneError("TIMEOUT", "enough")

    with pytest.raises(CloneError, match="enough"):
        wipe.wipe(file, "zero", "it", watch)
    # Two of four chunks.
    assert os.pread(file, 4 << 20, 0).count(0) == (2 << 20) + (2 << 12)


def test_holes_are_what_a_pattern_over_all_of_a_file_would_fill(file):
    os.ftruncate(file, 64 << 20)
    assert wipe.holes(file) == 64 << 20
    os.posix_fallocate(file, 0, 32 << 20)
    assert 31 << 20 <= wipe.holes(file) <= 32 << 20
    os.ftruncate(file, 5)
    assert wipe.holes(file) == 0
