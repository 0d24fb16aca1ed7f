# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Tests that need more of a kernel than the machine may have: LVM, NFS, iSCSI. They run in a virtual machine:

    tests/tools/vm-run -d 1G -d 512M -- tests/tools/system tests/system/vm

All fixtures of the tests outside are there too, and the same rules.
"""

from __future__ import annotations

import os
import subprocess

import harness
import pytest
from harness import run


def pytest_configure(config):
    if os.environ.get("VIRTFORGE_VM") != "yes":
        raise pytest.UsageError("run the tests of tests/system/vm by tests/tools/vm-run -- tests/tools/system tests/system/vm")


@pytest.fixture(scope="session", autouse=True)
def udev():
    """Without it lvcreate does not find the nodes of the devices that it makes."""
    run("modprobe", "-a", "loop", "dm-mod", "dm-snapshot", "dm-thin-pool", "xfs", "btrfs", "fuse")
    daemon = subprocess.Popen(["/lib/systemd/systemd-udevd"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    harness.wait_until(lambda: os.path.exists("/run/udev/control"), 60)
    run("udevadm", "trigger")
    run("udevadm", "settle")
    yield
    daemon.terminate()
    daemon.wait(30)
