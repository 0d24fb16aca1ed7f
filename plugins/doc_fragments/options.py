# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Options that several modules of this collection have. Their specs are in plugins/module_utils/_argspec.py."""

from __future__ import annotations


class ModuleDocFragment:
    """Documentation of shared options, in parts."""

    # The connection: every module has it.
    DOCUMENTATION = r"""
options:
  uri:
    description:
      - Connection to libvirt on the managed host. Not used for directory pools.
      - With a host in it, or a transport other than a local socket, as in V(qemu+ssh://root@kvm2.example.com/system), the pools
        are those of that host. Only libvirt's own calls reach them. They do less, they are not safe against a crash, and what
        they cannot do fails with C(NO_SUPPORT), see the guide on connections to another host.
      - Taken from the environment variable E(LIBVIRT_DEFAULT_URI) where not stated.
    type: str
    default: qemu:///system
"""

    LAYOUT = r"""
options:
  preallocation:
    description:
      - How much of the new volume is backed by storage at once. For raw V(falloc) and V(full), for qcow2 all of them.
    type: str
    choices: ['off', metadata, falloc, full]
    default: 'off'
  qcow2:
    description:
      - Options of a new volume of the format qcow2. What is not stated is as in the source, or QEMU's default without one.
    type: dict
    suboptions:
      compat:
        description: Version of the format, V(0.10) for QEMU before 1.1.
        type: str
        choices: ['0.10', '1.1']
      cluster_size:
        description: Size of a cluster, with units or in bytes. A power of two from 512 bytes to 2 MiB.
        type: str
      lazy_refcounts:
        description: Whether reference counts are updated late.
        type: bool
      extended_l2:
        description: Whether clusters are divided into subclusters.
        type: bool
      compression_type:
        description: Compression of compressed clusters.
        type: str
        choices: [zlib, zstd]
      refcount_bits:
        description: Width of a reference count.
        type: int
        choices: [1, 2, 4, 8, 16, 32, 64]
      nocow:
        description: Whether the file is exempt from copy-on-write, on btrfs.
        type: bool
"""

    PATIENCE = r"""
options:
  lock_timeout:
    description:
      - Seconds to wait for another run to finish with the same volume, and for libvirt's jobs in the pool.
    type: int
    default: 300
  timeout:
    description:
      - Seconds after which the task gives up and leaves no volume. Without it there is no limit.
    type: int
"""
