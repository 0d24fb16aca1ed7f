# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Any source, to any target: the clone reads as the source did and the rest as zeros, is sound, and takes no more than it must.

The module's work is called in this process, since the start of one would take longer than all the rest of a case.
``tests/tools/property`` runs more cases, by another seed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import sources
from ansible_collections.virtforge.libvirt.plugins.module_utils._clone import executor, many, request
from ansible_collections.virtforge.libvirt.plugins.module_utils._errors import CloneError
from conftest import FILE_SYSTEMS, make_file_system, new_directory
from harness import GIB, MIB, allocated, fingerprint, info, run, same_content
from hypothesis import HealthCheck, Phase, event, given, seed, settings
from hypothesis import strategies as st

CASES = int(os.environ.get("VIRTFORGE_CASES", "300"))
#: None: the same cases each time
SEED = os.environ.get("VIRTFORGE_SEED")
SHARING = ("xfs", "btrfs")
FOREIGN = ("vmdk", "vdi", "vhdx", "vpc", "qed", "qcow")
#: Formats whose new images cannot be read at a capacity of 0.
NEVER_EMPTY = ("vmdk", "qcow")
BLOCK = 4096
#: The file system's own maps of the extents of one file.
MAPS = 8 * BLOCK
done = 0


@dataclass(frozen=True)
class Wish:
    """A volume that is asked for. ``growth`` is in bytes; None states no capacity."""

    format: str | None
    growth: int | None


@dataclass(frozen=True)
class Task:
    """What is asked for besides the source."""

    wishes: tuple
    kinds: tuple
    method: str
    options: dict
    preallocation: str
    #: whether what lies below the source lies in the target's pool
    apart: bool


@st.composite
def qcow2_options(draw):
    """Options that go together, whatever the source's are."""
    of = draw(sources.features())
    return {
        "compat": of.compat,
        "cluster_size": str(of.cluster_size),
        **({"refcount_bits": of.refcount_bits, "extended_l2": of.extended_l2} if of.compat == "1.1" else {}),
        **({"compression_type": of.compression_type} if of.compat == "1.1" and draw(st.booleans()) else {}),
        **({"lazy_refcounts": of.lazy_refcounts} if of.compat == "1.1" and draw(st.booleans()) else {}),
    }


@st.composite
def tasks(draw):
    options = draw(st.one_of(st.just({}), st.just({}), qcow2_options()))
    formats = st.just("qcow2") if options else st.sampled_from((None, None, "raw", "raw", "qcow2", "qcow2", "foreign"))
    preallocation = draw(st.sampled_from(("off", "off", "off", "off", "metadata", "falloc", "full")))
    growths = [st.none(), st.integers(0, 5 * MIB), st.sampled_from((1, 511, 512, 65536, 8 * MIB))]
    if preallocation == "off":
        # More than the file system has.
        growths.append(st.integers(0, 1 << 33))
    growths = st.one_of(growths)
    count = draw(st.sampled_from((1, 1, 1, 2, 4)))
    wishes = []
    for _number in range(count):
        image_format = draw(formats)
        wishes.append(Wish(draw(st.sampled_from(FOREIGN)) if image_format == "foreign" else image_format, draw(growths)))
    method = draw(st.sampled_from(("auto", "auto", "copy", "copy", "reflink")))
    same = [(kind, kind) for kind in (SHARING if method == "reflink" else FILE_SYSTEMS)]
    kinds = draw(st.sampled_from(same * 2 + [(one, two) for one in FILE_SYSTEMS for two in FILE_SYSTEMS if one != two]))
    return Task(tuple(wishes), kinds, method, options, preallocation, apart=draw(st.integers(0, 4)) == 0)


@pytest.fixture(scope="module")
def memory():
    """A directory in memory, of these namespaces alone: most of a case would be waiting for a disk."""
    place = Path("/run/virtforge-property")
    place.mkdir()
    return place


@pytest.fixture(scope="module")
def noises(memory):
    return sources.write_noises(memory)


@pytest.fixture(scope="module")
def file_systems(memory):
    mounts = {kind: make_file_system(kind, memory / f"{kind}.img", GIB, memory / kind) for kind in FILE_SYSTEMS}
    yield mounts
    for place in mounts.values():
        run("umount", "-l", place)


@pytest.fixture(scope="module", autouse=True)
def told():
    yield
    print(f"{done} cases, seed {SEED if SEED is not None else 'fixed'}")


def of_a_long_run(test):
    return test if SEED is None else seed(int(SEED))(test)


@of_a_long_run
@settings(
    max_examples=CASES,
    deadline=None,
    derandomize=SEED is None,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.generate, Phase.shrink),
    print_blob=False,
)
@given(chain=sources.chains(), task=tasks())
def test_any_source_to_any_target(file_systems, noises, chain, task):
    global done
    place, pool = (new_directory(file_systems[kind]) for kind in task.kinds)
    try:
        source = sources.build(chain, place, pool if task.apart else place, noises)
        before = [fingerprint(path) for path in source.layers]
        opened = os.listdir("/proc/self/fd")
        outcome = clone(task, source, place, pool)
        assert len(os.listdir("/proc/self/fd")) == len(opened), "a file was left open"
        assert [fingerprint(path) for path in source.layers] == before, "the source was changed"
        made = [f"web{number}" for number, volume in enumerate(outcome) if not volume["error_code"]]
        assert sorted(os.listdir(pool)) == sorted(made + [path.name for path in source.layers if path.parent == pool])
        for number, (wish, volume) in enumerate(zip(task.wishes, outcome, strict=True)):
            expect(Expected(task, wish, source), volume, pool / f"web{number}")
        event(f"{task.method}: {outcome[0]['transfer']}")
        if made == [f"web{number}" for number in range(len(task.wishes))]:
            again = clone(task, source, place, pool)
            assert not any(volume["changed"] or volume["actions"] for volume in again), again
    finally:
        for directory in (place, pool):
            shutil.rmtree(directory, ignore_errors=True)
    done += 1


def clone(task, source, place, pool):
    """The results of all volumes, in the single form where there is but one; a failure as the ``volumes`` form tells it."""
    params = {"pool": str(pool), "source_pool": str(place), "source": source.path.name, "source_format": source.format}
    params.update(method=task.method, preallocation=task.preallocation, qcow2=task.options)
    stated = []
    for number, wish in enumerate(task.wishes):
        capacity = None if wish.growth is None else str(len(source.content) + wish.growth)
        stated.append({"name": f"web{number}", "format": wish.format, "capacity": capacity})
    try:
        if len(stated) > 1:
            return many.run(request.many_from_parameters({**params, "volumes": stated}), False)["volumes"]
        return [executor.run(request.from_parameters({**params, **stated[0]}), False)["volume"]]
    except CloneError as exc:
        return [{"error_code": exc.code, "msg": exc.msg, "transfer": None, "changed": False} for _wish in stated]


# --- what has to come out ---------------------------------------------------------------------------------------------------


class Expected:
    """One volume, judged by the contract alone."""

    def __init__(self, task, wish, source):
        self.task, self.source = task, source
        self.format = wish.format or source.format
        wanted = len(source.content) + (wish.growth or 0)
        self.capacity = wanted if self.format == "raw" else -(-wanted // 512) * 512
        self.grown = self.capacity > len(source.content)
        self.features = self._features() if self.format == "qcow2" else None
        self.shares = task.kinds[0] == task.kinds[1] and task.kinds[0] in SHARING
        self.whole_file = (
            self.format == source.format
            and source.stands_alone
            and self.features == source.features
            and (self.format == "raw" or task.preallocation == "off")
        )

    def _features(self):
        """Stated, else the source's, else qemu-img's defaults; version 2 takes over what it can have."""
        given = {**self.task.options}
        if "cluster_size" in given:
            given["cluster_size"] = int(given["cluster_size"])
        of = self.source.features or sources.Features()
        if given.get("compat", of.compat) != of.compat:
            of = sources.Features(cluster_size=of.cluster_size)
        return sources.Features(**{**vars(of), **given})

    @property
    def refusals(self):
        """Codes of which one has to come; none for a volume that has to be made."""
        preallocation = self.task.preallocation
        if preallocation != "off" and self.format != "qcow2" and (self.format != "raw" or preallocation == "metadata"):
            return ("CONFIG_UNSUPPORTED",)
        if self.capacity == 0 and self.format in NEVER_EMPTY:
            return ("CONFIG_UNSUPPORTED",)
        if self.task.method == "reflink":
            if not self.shares or preallocation in ("falloc", "full") or self.format in FOREIGN:
                return ("NO_SUPPORT",)
            if not self.whole_file:
                # Compressed clusters, and what lies on another file system, cannot be shared; all else may be.
                return ("NO_SUPPORT", None)
        return (None,)


def expect(expected, volume, path):
    """Raise unless the volume is what had to come out."""
    assert volume["error_code"] in expected.refusals, (expected.refusals, volume)
    if volume["error_code"]:
        return
    source = expected.source
    assert (volume["format"], volume["capacity"]) == (expected.format, expected.capacity), volume
    assert same_content(source.path, source.format, path, expected.format)
    if expected.format == "raw":
        assert path.stat().st_size == expected.capacity
        reads_as(path, source.content)
    else:
        described = info(path, expected.format)
        assert described["virtual-size"] == expected.capacity
        assert "backing-filename" not in described
        sound(path, expected.format)
    if expected.format == "qcow2":
        is_made_as_asked(expected, volume, described, path)
    if expected.task.method == "copy":
        assert volume["shared"] is not True
    if expected.task.method == "reflink" and has_blocks_to_share(expected):
        assert volume["shared"] is True, volume
    takes_no_more_than_it_must(expected, volume, path)


def has_blocks_to_share(expected):
    """The last block, if partial, is written anew where a file grows, and so is a conversion's data of less than one block."""
    content = expected.source.content
    whole = blocks_with_data(content[: len(content) // BLOCK * BLOCK])
    return len(whole) > (0 if expected.whole_file else BLOCK // 512)


def reads_as(path, content):
    """The raw file has this content, and zeros after it."""
    with open(path, "rb") as file:
        assert file.read(len(content)) == content
        at = len(content)
        while True:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:
                return
            block = os.pread(file.fileno(), MIB, at)
            if not block:
                return
            assert block.count(0) == len(block), f"data after the end of the source, at {at}"
            at += len(block)


def sound(path, image_format):
    """Neither errors nor leaks."""
    if image_format in ("vpc", "qcow"):
        # qemu-img cannot check these.
        return
    check = subprocess.run(["qemu-img", "check", "-f", image_format, str(path)], capture_output=True, text=True, check=False)
    assert check.returncode == 0, check.stdout + check.stderr


def is_made_as_asked(expected, volume, described, path):
    source, of = expected.source, expected.features
    specific = described["format-specific"]["data"]
    kept = expected.whole_file
    if kept and expected.grown and of.compat == "0.10" and source.snapshots:
        # Snapshots of version 2 do not know their own size.
        assert specific["compat"] == "1.1"
    else:
        assert specific["compat"] == of.compat
    assert (described["cluster-size"], specific["refcount-bits"]) == (of.cluster_size, of.refcount_bits)
    if of.compat == "1.1":
        assert specific["extended-l2"] == of.extended_l2
        assert specific["lazy-refcounts"] == of.lazy_refcounts
        assert specific["compression-type"] == of.compression_type
    assert len(described.get("snapshots", ())) == (source.snapshots if kept else 0)
    assert len(specific.get("bitmaps", ())) == (source.bitmaps if kept else 0)
    assert (volume["transfer"] in ("copy", "reflink")) == kept or len(expected.task.wishes) > 1
    if kept and not expected.grown:
        assert path.read_bytes() == source.path.read_bytes()
    for number in range(1, source.snapshots + 1 if kept and expected.grown else 1):
        snapshots = [snapshot(image, f"snapshot{number}") for image in (source.path, path)]
        assert same_content(snapshots[0], "raw", snapshots[1], "raw")
        for image in snapshots:
            image.unlink()


def snapshot(path, name):
    """An internal snapshot as an image of its own."""
    raw = path.with_name(f"{path.name}.{name}")
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", "-l", f"snapshot.name={name}", path, raw)
    return raw


# --- how much it takes ------------------------------------------------------------------------------------------------------


def takes_no_more_than_it_must(expected, volume, path):
    taken = allocated(path)
    preallocation = expected.task.preallocation
    if preallocation in ("falloc", "full"):
        assert taken >= expected.capacity
        return
    if volume["shared"] or volume["transfer"] == "reflink" or preallocation != "off" or expected.format in FOREIGN:
        # What is shared is shared with its zeros.
        return
    if not expected.whole_file:
        most = converted(expected)
    elif expected.format == "raw":
        most = len(blocks_with_data(expected.source.content)) * BLOCK
    else:
        most = len(blocks_with_data(expected.source.path.read_bytes())) * BLOCK
        if expected.grown:
            most += metadata(expected.features, expected.capacity, set())
    assert taken <= most + MAPS, (taken, most, volume)


def blocks_with_data(content):
    """Numbers of the blocks that are not all zeros."""
    zeros = bytes(BLOCK)
    return {
        at // BLOCK
        for at in range(0, len(content), BLOCK)
        if not (content.startswith(zeros, at) or content.count(0, at, at + BLOCK) == len(content) - at)
    }


def converted(expected):
    """The most that qemu-img may write: it drops zeros by 4 KiB that may lie across two blocks."""
    with_data = blocks_with_data(expected.source.content)
    with_data |= {block + 1 for block in with_data} | {block - 1 for block in with_data if block}
    if expected.format == "raw":
        return len(with_data) * BLOCK
    unit = max(expected.features.cluster_size, BLOCK)
    clusters = {block * BLOCK // unit for block in with_data}
    most = len(clusters) * unit + metadata(expected.features, expected.capacity, {cluster * unit for cluster in clusters})
    # QEMU has XFS allocate the files that it makes by so much at a time (extent_size_hint of its file driver).
    return most + MIB if expected.task.kinds[1] == "xfs" else most


def metadata(of, capacity, places):
    """The most that the tables of a qcow2 image with data at these places take (QEMU's docs/interop/qcow2.txt)."""
    size = of.cluster_size
    entries = size // (16 if of.extended_l2 else 8)
    l2_tables = len({at // (size * entries) for at in places})
    l1_clusters = -(-(-(-capacity // (size * entries)) * 8) // size)
    # Of the tables that grow the older ones are left behind as free clusters.
    clusters = 1 + 2 * l1_clusters + l2_tables + len(places) * max(1, BLOCK // size)
    refcounts = size * 8 // of.refcount_bits
    refcount_blocks = 1 + -(-clusters // refcounts)
    refcount_table = 1 + -(-refcount_blocks * 8 // size)
    return (clusters - len(places) * max(1, BLOCK // size) + refcount_blocks + 2 * refcount_table + 1) * size
