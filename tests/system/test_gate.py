# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Images from outside: each hostile one is refused by the check that is there for it, each honest one is cloned."""

from __future__ import annotations

import shutil
from collections import Counter

import harness
import pytest
import strangers
from ansible_collections.virtforge.libvirt.plugins.module_utils._images.gate import CHECKS
from conftest import new_directory
from harness import MIB

SECRET = b"TOP-SECRET " * 100
#: checks that no image can meet without taking half a minute of a processor; see tests/unit/…/test_qemu_img.py
TOO_LONG = {"too_costly"}


@pytest.fixture(scope="module")
def outside(file_systems):
    """A directory beside the pools, on their file system, and in it a file that nobody may open."""
    place = new_directory(file_systems["xfs"])
    canary = place / "canary"
    canary.write_bytes(SECRET.ljust(MIB, b"."))
    yield place, canary
    shutil.rmtree(place)


@pytest.fixture(scope="module")
def hostile(file_systems, outside):
    """A pool of hostile images, and what they are."""
    place = new_directory(file_systems["xfs"])
    cases = strangers.hostile(place, *outside)
    assert len({case.name for case in cases}) == len(cases)
    yield place, cases
    shutil.rmtree(place)


def tasks(place, cases):
    return [{"pool": place, "source": case.name, "name": f"stolen-{case.name}", **case.params} for case in cases]


def test_each_hostile_image_is_refused_by_its_own_check(hostile, outside):
    place, cases = hostile
    _directory, canary = outside
    before, secret = harness.listing(place), harness.fingerprint(canary)
    wrong = []
    with harness.opens(canary) as opened:
        for mode in (True, False):
            for case, result in zip(cases, harness.batch(tasks(place, cases), check=mode), strict=True):
                code = CHECKS[case.check].code
                named = result.get("msg", "").endswith(f"[{case.check}]") and f"{case.name!r}" in result["msg"]
                if not (result.get("failed") and result.get("error_code") == code and named) or "\n" in result["msg"]:
                    wrong.append((case, mode, result.get("error_code"), result.get("msg", result)))
        assert not wrong, "\n".join(map(str, wrong))
        assert not opened(), "the file outside the pool was opened"
    assert harness.listing(place) == before, "something was made or touched"
    assert harness.fingerprint(canary) == secret
    found = Counter(case.check for case in cases)
    assert found.total() >= 150 and set(found) == set(CHECKS) - TOO_LONG, found


@pytest.fixture(scope="module")
def honest(file_systems):
    place = new_directory(file_systems["xfs"])
    cases = strangers.honest(place)
    assert len({case.name for case in cases}) == len(cases)
    yield place, cases
    shutil.rmtree(place)


def test_each_honest_image_is_cloned(honest, pool):
    place, cases = honest
    before = [harness.fingerprint(place / case.name) for case in cases]
    asked = [{"pool": pool, "source_pool": place, "source": case.name, "name": case.name, **case.params} for case in cases]
    results = harness.batch(asked)
    wrong = [(case, result["msg"]) for case, result in zip(cases, results, strict=True) if result.get("failed")]
    assert not wrong, "\n".join(map(str, wrong))
    for case, result in zip(cases, results, strict=True):
        assert (result["actions"], result["volume"]["format"]) == (["created"], case.format), (case, result)
        if case.content is None:
            assert (pool / case.name).read_bytes() == (place / case.name).read_bytes(), case
        else:
            assert harness.same_content(case.content, "raw", pool / case.name, case.format), case
    assert [harness.fingerprint(place / case.name) for case in cases] == before
    assert len(cases) >= 150, len(cases)
    again = harness.batch(asked)
    assert not [result for result in again if result.get("failed") or result["changed"]]
