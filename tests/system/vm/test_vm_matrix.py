# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The rows and columns of the matrix that need a kernel with LVM and NFS."""

from __future__ import annotations

import pytest
from harness import MIB, run
from test_matrix import Makers, Place, clone_between, make_sources

TYPES = ("directory", "dir", "fs", "fs on ext4", "disk", "rbd", "netfs", "logical")
# Outside, netfs is GlusterFS; here it is NFS, and one pool of files is like another to it.
NFS_WITH = ("directory", "disk", "rbd", "netfs", "logical")
PAIRS = [
    (source, target)
    for source in TYPES
    for target in TYPES
    if "logical" in (source, target) or ("netfs" in (source, target) and {source, target} <= set(NFS_WITH))
]


class VmMakers(Makers):
    def logical(self):
        run("vgcreate", "-q", "vgmatrix", self.device(256 * MIB))
        self.ends.append(lambda: run("vgremove", "-f", "-q", "vgmatrix"))
        return Place(self._defined("logical", "--source-name", "vgmatrix", "--target", "/dev/vgmatrix"), "logical")

    def netfs(self):
        self.request.getfixturevalue("nfs")
        path = self._path("netfs")
        what = ["--source-host", "127.0.0.1", "--source-path", "/", "--source-format", "nfs", "--target", path]
        return Place(self._defined("netfs", *what), "netfs", path)


@pytest.fixture(scope="module")
def places(libvirtd, request, scratch):
    makers = VmMakers(request, scratch, "vm")
    yield makers.all(TYPES)
    makers.end()


@pytest.fixture(scope="module")
def sources(places, scratch):
    yield from make_sources(places, scratch)


@pytest.mark.parametrize("source, target", PAIRS)
def test_from_every_pool_to_every_pool(places, sources, source, target):
    clone_between(places, sources, source, target)
