# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Exact command lines of qemu-img, one row a case."""

from __future__ import annotations

import json

import pytest
from ansible_collections.virtforge.libvirt.plugins.module_utils._images import qemu_img
from ansible_collections.virtforge.libvirt.plugins.module_utils._images.probe import Qcow2Features
from ansible_collections.virtforge.libvirt.plugins.module_utils._images.qemu_img import Layer

QCOW2, RAW, TARGET = Layer(5, "qcow2"), Layer(6, "raw"), Layer(9, "vmdk")
# Nothing that its header may say by then is followed.
ALONE = 'json:{"driver": "qcow2", "file": {"driver": "file", "filename": "/proc/self/fd/5"}, "backing": null}'
PLAIN = 'json:{"driver": "raw", "file": {"driver": "file", "filename": "/proc/self/fd/6"}}'


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (
            qemu_img.convert([QCOW2], TARGET, [], exists=False),
            "convert -O vmdk " + ALONE + " /proc/self/fd/9",
        ),
        (
            qemu_img.convert([QCOW2], Layer(9, "raw"), [], exists=True),
            "convert -W -n --target-is-zero -O raw " + ALONE + " /proc/self/fd/9",
        ),
        (
            qemu_img.convert([RAW], Layer(9, "qcow2"), [], exists=False),
            "convert -W -O qcow2 -f raw /proc/self/fd/6 /proc/self/fd/9",
        ),
        (
            qemu_img.convert([RAW], Layer(9, "qed"), [], exists=False),
            "convert -O qed -f raw /proc/self/fd/6 /proc/self/fd/9",
        ),
        (
            qemu_img.convert([QCOW2], Layer(9, "vpc"), ["-o", "force_size=on"], exists=False),
            "convert -o force_size=on -O vpc " + ALONE + " /proc/self/fd/9",
        ),
        (
            qemu_img.convert([RAW], TARGET, ["-o", "ignored=1"], exists=True),
            "convert -n --target-is-zero -O vmdk -f raw /proc/self/fd/6 /proc/self/fd/9",
        ),
        (qemu_img.create(TARGET, [], 1024), "create -q -f vmdk /proc/self/fd/9 1024"),
        (
            qemu_img.create(Layer(9, "qcow2"), ["-o", "compat=1.1"], 1024),
            "create -q -f qcow2 -o compat=1.1 /proc/self/fd/9 1024",
        ),
        (
            qemu_img.create(Layer(9, "qcow2"), [], 1024, ("/p/base", "raw")),
            "create -q -f qcow2 -u -b /p/base -F raw /proc/self/fd/9 1024",
        ),
        (qemu_img.resize([QCOW2], 2048, "off"), f"resize -q {ALONE} 2048"),
        (qemu_img.resize([QCOW2], 2048, "falloc"), f"resize -q --preallocation=falloc {ALONE} 2048"),
        (qemu_img.resize([RAW], 2048, "off"), "resize -q -f raw /proc/self/fd/6 2048"),
        (qemu_img.amend_compat([QCOW2]), f"amend -q -o compat=1.1 {ALONE}"),
        (qemu_img.check(QCOW2), f"check -q {ALONE}"),
        (qemu_img.check(Layer(6, "vdi")), "check -q -f vdi /proc/self/fd/6"),
        (qemu_img.info(QCOW2), "info -U --output=json -f qcow2 /proc/self/fd/5"),
        (qemu_img.compare([QCOW2], [RAW]), f"compare -q -U {ALONE} {PLAIN}"),
        (qemu_img.compare([RAW], [QCOW2]), f"compare -q -U {PLAIN} {ALONE}"),
        (
            qemu_img.measure([QCOW2], "raw", []),
            f"measure --output=json -O raw {ALONE}",
        ),
    ],
)
def test_command_lines(arguments, expected):
    assert " ".join(arguments) == expected


def test_a_chain_is_spelled_out_layer_by_layer():
    (source,) = qemu_img.source_arguments([QCOW2, Layer(7, "qcow2"), Layer(8, "raw", block=True)])
    assert source.startswith("json:")
    assert json.loads(source[5:]) == {
        "driver": "qcow2",
        "file": {"driver": "file", "filename": "/proc/self/fd/5"},
        "backing": {
            "driver": "qcow2",
            "file": {"driver": "file", "filename": "/proc/self/fd/7"},
            "backing": {"driver": "raw", "file": {"driver": "host_device", "filename": "/proc/self/fd/8"}},
        },
    }


def test_a_shrunk_raw_source_is_limited_to_its_start():
    (source,) = qemu_img.source_arguments([Layer(6, "raw", size=1024)])
    node = json.loads(source[5:])
    assert (node["driver"], node["offset"], node["size"]) == ("raw", 0, 1024)


@pytest.mark.parametrize(
    "image_format, features, preallocation, expected",
    [
        ("raw", None, "full", []),
        ("vdi", None, "off", []),
        ("vpc", None, "off", ["-o", "force_size=on"]),
        ("qcow2", Qcow2Features("1.1", 65536), "off", ["-o", "compat=1.1,cluster_size=65536,lazy_refcounts=off"]),
        (
            "qcow2",
            Qcow2Features("0.10", 4096, False),
            "metadata",
            ["-o", "compat=0.10,cluster_size=4096,lazy_refcounts=off,preallocation=metadata"],
        ),
        (
            "qcow2",
            Qcow2Features("1.1", 131072, True, True, "zstd", 8),
            "off",
            [
                "-o",
                "compat=1.1,cluster_size=131072,lazy_refcounts=on,extended_l2=on,compression_type=zstd,refcount_bits=8",
            ],
        ),
    ],
)
def test_creation_options(image_format, features, preallocation, expected):
    assert qemu_img.creation_options(image_format, features, preallocation) == expected


@pytest.mark.parametrize(
    "status, stderr, code, text",
    [
        (
            1,
            "qemu-img: Could not open '/proc/self/fd/5': Failed to get shared \"write\" lock\n"
            "Is another process using the image?",
            "IN_USE",
            "volume 'a'",
        ),
        (1, "qemu-img: error while writing at byte 0: No space left on device", "NO_SPACE", "No space left"),
        (1, "qemu-img: Could not read block 5 of /proc/self/fd/55", "IO_ERROR", "/proc/self/fd/55"),
        (-9, "", "IO_ERROR", "ended by signal SIGKILL"),
        (1, "", "IO_ERROR", "exit status 1"),
    ],
)
def test_failures_speak_of_volumes(status, stderr, code, text):
    error = qemu_img._failure(status, stderr, {5: "volume 'a'"}, "converting volume 'a'")
    assert error.code == code
    assert error.msg.startswith("converting volume 'a' failed: ")
    assert text in error.msg
    assert "qemu-img: " not in error.msg


def test_a_missing_qemu_img_is_named(monkeypatch):
    monkeypatch.setattr(qemu_img._process, "find", lambda _program: None)
    with pytest.raises(qemu_img.CloneError, match="qemu-utils on Debian") as caught:
        qemu_img.QemuImg().run(["info"], {}, "reading")
    assert caught.value.code == "MISSING_DEPENDENCY"


def test_a_name_in_a_message_may_hold_anything():
    error = qemu_img._failure(1, "qemu-img: Could not open '/proc/self/fd/5': no", {5: r"volume '\xa0\g<1>'"}, "reading")
    assert error.msg == r"reading failed: Could not open volume '\xa0\g<1>': no"
