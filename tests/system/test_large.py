# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Time, memory and page cache follow the data, not the capacity."""

from __future__ import annotations

import json
import os
import shutil

import harness
import pytest
from conftest import new_directory
from harness import GIB, MIB, clone, info, noise, result_of, run, same_content, start

TIB = 1 << 40
#: MiB of data that goes through the page cache
DATA = int(os.environ.get("VIRTFORGE_LARGE", "512"))
#: Bytes of it that may stay there: 256 MiB of 8 GiB.
STAYS = DATA * MIB // 32
FORMATS = ("raw", "qcow2")


@pytest.fixture
def directory(file_systems):
    """Makes directories that end with the test."""
    made = []

    def make(kind):
        made.append(new_directory(file_systems[kind]))
        return made[-1]

    yield make
    for place in made:
        shutil.rmtree(place)


#: Runs a command and says the peak memory in KiB of the largest of its processes. A process starts with the peak of the one
#: that started it (setmax_mm_hiwater_rss() in the kernel's exec), which must therefore be a small one, not pytest.
MEASURE = """
import resource, subprocess, sys
status = subprocess.call(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)
sys.exit(status)
"""


def measured(params):
    """Seconds that the engine took, and the peak memory in bytes of the largest process of the run."""
    process = start(params, prefix=[harness.PYTHON, "-c", MEASURE])
    out, err = process.communicate(timeout=300)
    result = json.loads(out.splitlines()[-1])
    assert result.get("actions") == ["created"], result
    return result["volume"]["duration"], int(err.splitlines()[-1]) * 1024


@pytest.mark.parametrize("image_format", FORMATS)
@pytest.mark.parametrize("kind, method", [("xfs", "auto"), ("xfs", "copy"), ("btrfs", "copy"), ("ext4", "copy")])
def test_a_tebibyte_costs_what_a_gibibyte_with_the_same_data_does(directory, kind, method, image_format):
    place = directory(kind)
    pieces = [(at, 4) for at in range(0, 1024, 64)]
    small, large = (harness.make_raw(place / f"base{size}.raw", size, pieces) for size in (GIB, TIB))
    run("sync", "-f", place)
    seconds = {small: [], large: []}

    def alike():
        # The least: other tests run beside this one.
        of_small, of_large = (min(spent) for spent in seconds.values())
        return of_large <= 1.5 * of_small + 0.1

    for number in range(10):
        if number >= 3 and alike():
            break
        for source, spent in seconds.items():
            params = {"pool": place, "source": source.name, "name": "web", "method": method, "format": image_format}
            duration, peak = measured(params)
            spent.append(duration)
            assert peak < 64 * MIB, f"{peak / MIB:.0f} MiB"
            (place / "web").unlink()
    clone(pool=place, source=large.name, name="web", method=method, format=image_format)
    assert same_content(large, "raw", place / "web", image_format)
    assert alike(), seconds


@pytest.mark.parametrize("image_format", FORMATS)
@pytest.mark.parametrize("method", ["auto", "copy"])
def test_sixteen_tebibytes_of_sparse_raw(directory, method, image_format):
    place = directory("xfs")
    size = 16 * TIB
    ends = ((0, 1), (9 * TIB // MIB, 3), (size // MIB - 1, 1))
    source = harness.make_raw(place / "base.raw", size, ends)
    result = clone(pool=place, source="base.raw", name="web", method=method, format=image_format)
    assert result["volume"]["capacity"] == size
    assert info(place / "web", image_format)["virtual-size"] == size
    assert same_content(source, "raw", place / "web", image_format)
    # qcow2 has one table of 64 KiB for each 512 MiB with data, and 8 bytes for each of these in all.
    assert harness.allocated(place / "web") < 8 * MIB


# --- the page cache -----------------------------------------------------------------------------------------------------------


def resident(path):
    return int(run("fincore", "--bytes", "--noheadings", "--output", "RES", path))


def make_cold(path):
    """A raw source with holes whose data is on the disk and not in memory."""
    with open(path, "wb") as file:
        for number in range(DATA // 64):
            file.seek(number * 80 * MIB)
            file.write(noise(MIB, number) * 64)
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert resident(path) < MIB
    return path


def make_cold_zeros(path):
    """As above, and its data are zeros but for one block in 64 MiB."""
    make_cold(path)
    with open(path, "r+b") as file:
        for number in range(DATA // 64):
            file.seek(number * 80 * MIB)
            file.write(bytes(63 * MIB) + noise(4096, number) + bytes(MIB - 4096))
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return path


@pytest.fixture
def roomy(small_file_system):
    """Makes file systems with room for a source and its clone."""
    return lambda kind: small_file_system(kind, (3 * DATA + 1024) * MIB)


@pytest.mark.parametrize("stated", [{"format": "raw"}, {"format": "qcow2"}])
@pytest.mark.parametrize("kind", ["xfs", "ext4"])
def test_the_page_cache_is_left_to_others(roomy, kind, stated):
    place = roomy(kind)
    source = make_cold(place / "base.raw")
    before = resident(source)
    clone_without_reading(place, stated)
    more = resident(source) + resident(place / "web") - before
    assert more < STAYS, f"{more / MIB:.0f} MiB"


@pytest.mark.parametrize("stated", [{"format": "raw"}, {"format": "qcow2"}])
@pytest.mark.parametrize("kind", ["xfs", "ext4"])
def test_a_source_that_was_in_the_page_cache_stays_there(roomy, kind, stated):
    """A golden image that many machines boot from is in use by them."""
    place = roomy(kind)
    source = make_cold(place / "base.raw")
    run("sh", "-c", f"cat {source} >/dev/null")
    before = resident(source)
    assert before >= DATA * MIB
    clone_without_reading(place, stated)
    assert resident(source) >= before * 0.95
    assert resident(place / "web") < STAYS
    assert same_content(source, "raw", place / "web", stated["format"])


@pytest.mark.parametrize("kind", ["xfs", "ext4"])
def test_zeros_that_were_read_do_not_stay_in_the_page_cache_either(roomy, kind):
    place = roomy(kind)
    source = make_cold_zeros(place / "base.raw")
    clone_without_reading(place, {"format": "raw"})
    assert resident(source) < STAYS, f"{resident(source) / MIB:.0f} MiB"
    assert harness.allocated(place / "web") < MIB


def clone_without_reading(place, stated):
    """Not harness.clone(), which reads the source before and after."""
    params = {"pool": place, "source": "base.raw", "name": "web", "method": "copy", **stated}
    result = result_of(start(params))
    assert result.get("actions") == ["created"], result
