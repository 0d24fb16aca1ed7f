# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Images that nobody here made: Debian's install media and rescue disks, and a disk filled with files of this machine."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from harness import MIB, run

#: (name of the file, its format, what the conversion is told)
QCOW2_LAYOUTS = {
    "cluster512.qcow2": ["-o", "cluster_size=512"],
    "cluster4k.qcow2": ["-o", "cluster_size=4k"],
    "cluster64k.qcow2": [],
    "cluster2m.qcow2": ["-o", "cluster_size=2M"],
    "compressed.qcow2": ["-c"],
    "zstd.qcow2": ["-c", "-o", "compression_type=zstd"],
    "subclusters.qcow2": ["-o", "extended_l2=on"],
    "version2.qcow2": ["-o", "compat=0.10"],
    "snapshots.qcow2": [],
    "bitmaps.qcow2": [],
}
OTHERS = ("vmdk", "vdi", "vhdx", "vpc", "qed", "qcow")


def media():
    """Install media and bootable disks, by name. The netboot package has its mini.iso in some releases, its parts in all."""
    wanted = (
        "mini.iso",
        "initrd.gz",
        "grub-rescue-cdrom.iso",
        "grub-rescue-floppy.img",
        "grub-rescue-usb.img",
        "memtest86+x64.iso",
    )
    packages = ("debian-installer-12-netboot-amd64", "grub-rescue-pc", "memtest86+")
    listed = sorted(run("dpkg", "-L", *packages).split())
    return {Path(name).name: Path(name) for name in listed if Path(name).name in wanted and os.path.isfile(name)}


def make_disk(path):
    """A disk of 160 MiB: partition table, and an ext4 file system with real files of several sizes."""
    size, start = 160 * MIB, MIB
    with open(path, "wb") as file:
        file.truncate(size)
    subprocess.run(["sfdisk", "-q", str(path)], input="label: gpt\nstart=2048, type=linux\n", text=True, check=True)
    blocks = (size - 2 * start) // 1024
    run("mkfs.ext4", "-q", "-F", "-d", "/usr/lib/git-core" if os.path.isdir("/usr/lib/git-core") else "/usr/share/zoneinfo",
        "-E", f"offset={start}", path, f"{blocks}k")  # fmt: skip
    return path


def make_all(place):
    """The disk in every format and layout, by file name: format."""
    disk = make_disk(place / "disk.raw")
    made = {"disk.raw": "raw"}
    for name, options in QCOW2_LAYOUTS.items():
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", *options, disk, place / name)
        made[name] = "qcow2"
    for number in (1, 2):
        run("qemu-img", "snapshot", "-c", f"snapshot{number}", place / "snapshots.qcow2")
    run("qemu-img", "bitmap", "--add", "-f", "qcow2", place / "bitmaps.qcow2", "nightly")
    for name in OTHERS:
        run(
            "qemu-img",
            "convert",
            "-f",
            "raw",
            "-O",
            name,
            *(["-o", "force_size"] if name == "vpc" else []),
            disk,
            place / f"disk.{name}",
        )
        made[f"disk.{name}"] = name
    # A chain three deep with the same content: a raw base that differs, and overlays that set it right.
    base = place / "chain0.raw"
    with open(disk, "rb") as source, open(base, "wb") as target:
        data = bytearray(source.read())
        data[40 * MIB : 44 * MIB] = bytes(4 * MIB)
        data[60 * MIB : 61 * MIB] = b"\xff" * MIB
        target.write(data)
    above, above_format = base, "raw"
    for number in (1, 2):
        overlay = place / f"chain{number}.qcow2"
        run("qemu-img", "create", "-q", "-f", "qcow2", "-b", above.name, "-F", above_format, overlay, cwd=place)
        part = (40 * MIB, 4 * MIB) if number == 1 else (60 * MIB, MIB)
        piece = place / "piece"
        piece.write_bytes(disk.read_bytes()[part[0] : part[0] + part[1]])
        run("qemu-io", "-f", "qcow2", "-c", f"write -s {piece} {part[0]} {part[1]}", overlay)
        piece.unlink()
        above, above_format = overlay, "qcow2"
    made["chain2.qcow2"] = "qcow2"
    return made
