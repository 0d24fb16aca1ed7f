# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the other tests in the virtual machine count on."""

from __future__ import annotations

from harness import run


def test_a_logical_volume(device):
    disk = device()
    run("vgcreate", "vgtest", disk)
    run("lvcreate", "-y", "-L", "8M", "-n", "volume", "vgtest")
    assert run("blockdev", "--getsize64", "/dev/vgtest/volume").strip() == str(8 << 20)
    run("vgremove", "-y", "vgtest")
