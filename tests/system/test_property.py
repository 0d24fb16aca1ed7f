# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Any data, any layout, any capacity: the clone reads as the source did, and the rest as zeros."""

from __future__ import annotations

import shutil

import harness
from conftest import FILE_SYSTEMS, new_directory
from harness import MIB, clone, info, refused, run, settle
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

PIECES = st.lists(st.tuples(st.integers(0, 8 * MIB), st.integers(1, 300_000), st.booleans()), max_size=8)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    pieces=PIECES,
    tail=st.integers(0, 70_000),
    source_format=st.sampled_from(["raw", "qcow2"]),
    source_options=st.sampled_from([[], ["-o", "cluster_size=512"], ["-o", "cluster_size=2M"], ["-c"], ["-o", "compat=0.10"]]),
    target_format=st.sampled_from(["raw", "qcow2", "vmdk", "vdi", "vhdx", "vpc", "qed", "qcow", None]),
    growth=st.one_of(st.none(), st.integers(0, 5 * MIB)),
    kinds=st.tuples(st.sampled_from(FILE_SYSTEMS), st.sampled_from(FILE_SYSTEMS)),
    method=st.sampled_from(["auto", "copy"]),
)
def test_any_image(file_systems, pieces, tail, source_format, source_options, target_format, growth, kinds, method):
    places = [new_directory(file_systems[kind]) for kind in kinds]
    try:
        data = bytearray(max((at + length for at, length, _zero in pieces), default=0) + tail)
        for at, length, zero in pieces:
            data[at : at + length] = bytes(length) if zero else harness.noise(length, at)
        raw = places[0] / "expected"
        raw.write_bytes(data)
        source = raw
        if source_format == "qcow2":
            source = places[0] / "base"
            run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", *source_options, raw, source)
        length = len(data) if source_format == "raw" else (len(data) + 511) // 512 * 512
        params = {
            "pool": places[1],
            "source_pool": places[0],
            "source": source.name,
            "name": "web",
            "source_format": source_format,
        }
        params["method"] = method
        if target_format:
            params["format"] = target_format
        if growth is not None:
            params["capacity"] = str(length + growth)
        image_format = target_format or source_format
        capacity = length + (growth or 0)
        if capacity == 0 and image_format in ("vmdk", "qcow"):
            refused("CONFIG_UNSUPPORTED", **params)
            return
        result = settle(**params)
        expected = capacity if image_format == "raw" else (capacity + 511) // 512 * 512
        assert result["volume"]["capacity"] == expected
        if image_format != "raw":
            assert info(places[1] / "web", image_format)["virtual-size"] == expected
        clone(pool=places[0], source_path=places[1] / "web", source_format=image_format, name="read", format="raw")
        read = (places[0] / "read").read_bytes()
        assert read[: len(data)] == bytes(data)
        assert read.count(0, len(data)) == len(read) - len(data) and len(read) == expected
    finally:
        for place in places:
            shutil.rmtree(place, ignore_errors=True)
