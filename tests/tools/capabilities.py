# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Writes docs/pools.md: what can be done in a pool of each type, from the code that decides it."""

from __future__ import annotations

from pathlib import Path

from ansible_collections.virtforge.libvirt.plugins.module_utils._pools import capabilities

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "pools.md"

#: on what the tests in this repository run
TESTED_ON = {
    "directory": "XFS, btrfs, ext4, tmpfs",
    "dir": "libvirt 9.0 on XFS, btrfs, ext4",
    "fs": "XFS and ext4 on loop devices",
    "netfs": "GlusterFS 10 (FUSE); NFS 4.2 of Linux 6.1",
    "logical": "LVM of Debian 12 on Linux 6.1, thin pools too",
    "disk": "GPT and MBR on loop devices",
    "rbd": "Ceph 16.2",
    "iscsi-direct": "tgt 1.0",
    "iscsi": "open-iscsi and tgt 1.0",
    "scsi": "scsi_debug of Linux 6.1",
}
#: what a new volume is until it is whole, and what a run leaves that is killed meanwhile
STAGING = {
    "file": ("a file without a name", "nothing"),
    "rename": ("a volume `.virtforge-…`", "that volume, removed by the next run"),
    "mark": ("a volume with a mark in its first block", "that volume, made anew by the next run of the task"),
    "": ("", ""),
}
#: where a file needs a name earlier
NAMED = ("a file without a name; on NFS a hidden file", "nothing; on NFS a hidden file, removed by the next run")
HEAD = """# Pools

What can be done with the volumes of a pool, by its type. What is not possible is refused before a byte moves, with
`error_code: NO_SUPPORT`. A `directory` is an absolute path in place of a pool's name, and needs no libvirt.

| type | new volumes | full clones | linked clones | flatten | grow | delete | formats | until it is whole, a new volume is \
| a killed run leaves | tested on |
|---|---|---|---|---|---|---|---|---|---|---|
"""
TAIL = """
- Every pool in this table is also a source of full clones.
- A LUN (`iscsi`, `iscsi-direct`, `scsi`) exists before anything is cloned. State `compare: content`. `force: true` fills one
  that holds other data, which else is `DIFFERS`. One that a killed run has left with a mark is filled without it. The role
  takes `force` only with `storage_safe_mode: false`. A LUN keeps its size, and reads as zeros beyond the data of the source.
- `force` replaces a file by a new one, which is a hidden file for a moment, and a killed run may leave that. It replaces a
  volume of `logical` or `rbd` by a new one under another name, and overwrites a partition or LUN in place. A run that is
  killed meanwhile leaves neither the old data of a partition or LUN nor the new.
- A linked clone is a qcow2 image over its source in a pool of files, a child of a protected snapshot in `rbd`, and a snapshot
  in the same volume group in `logical`, thin where its source is thin.
- [LVM, partitions, LUNs, Ceph and NFS](block_and_network_pools.md) tells how these differ, with examples.
- Pools of the types `gluster`, `mpath`, `vstorage` and `zfs` can be declared by `storage_pool`; nothing is cloned there.
- A pool on another host is reached by libvirt's own calls, which can do less.

`make docs` writes this page.
"""


def table() -> str:
    lines = []
    for name in capabilities.TYPES:
        able = capabilities.of(name)
        cells = [able.create, able.clone, able.linked, able.flatten, able.grow, able.delete]
        formats = "all" if len(able.formats) > 1 else ", ".join(able.formats)
        words = ["yes" if cell else "no" for cell in cells]
        meanwhile = " | ".join(NAMED if name == "netfs" else STAGING[able.staging])
        lines.append(f"| `{name}` | {' | '.join(words)} | {formats} | {meanwhile} | {TESTED_ON[name]} |\n")
    return "".join(lines)


def page() -> str:
    return HEAD + table() + TAIL


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"== {PAGE.relative_to(ROOT)}")
