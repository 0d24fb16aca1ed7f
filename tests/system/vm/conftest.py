# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Tests that need more of a kernel than the machine may have: LVM, NFS, iSCSI. They run in a virtual machine:

    tests/tools/vm-run -- tests/tools/system tests/system/vm

All fixtures of the tests outside are there too, and the same rules.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import harness
import pytest
from conftest import make_file_system
from harness import MIB, run

HERE = Path(__file__).resolve().parent


def pytest_configure(config):
    if os.environ.get("VIRTFORGE_VM") != "yes":
        raise pytest.UsageError("run the tests of tests/system/vm by tests/tools/vm-run -- tests/tools/system tests/system/vm")


@pytest.fixture(scope="session", autouse=True)
def udev():
    """Without it lvcreate does not find the nodes of the devices that it makes."""
    run("modprobe", "-a", "loop", "dm-mod", "dm-snapshot", "dm-thin-pool", "xfs", "btrfs", "fuse")
    # It would ask LVM after each change of a disk whether there is a volume group to activate.
    Path("/etc/udev/rules.d/69-lvm.rules").symlink_to("/dev/null")
    daemon = subprocess.Popen(["/lib/systemd/systemd-udevd"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    harness.wait_until(lambda: os.path.exists("/run/udev/control"), 60)
    run("udevadm", "trigger")
    run("udevadm", "settle")
    yield
    daemon.terminate()
    daemon.wait(30)


@pytest.fixture(scope="session")
def nfs(scratch):
    """An NFS server (4.2) on 127.0.0.1: the directory that it exports as "/", which is an XFS with reflinks."""
    place = make_file_system("xfs", scratch / "export.img", 320 * MIB, scratch / "export")
    run("modprobe", "-a", "nfsd", "nfsv4")
    run("mount", "-t", "nfsd", "none", "/proc/fs/nfsd")
    for directory in ("/var/lib/nfs/v4recovery", "/var/lib/nfs/rpc_pipefs", "/run/rpcbind"):
        os.makedirs(directory, exist_ok=True)
    # As the root of all exports: those above it are on an overlay, which cannot be exported.
    run("exportfs", "-o", "rw,sync,no_root_squash,no_subtree_check,fsid=0", f"127.0.0.1:{place}")
    run("rpc.nfsd", "-N", "3", "--no-udp", "--host", "127.0.0.1", "2")
    daemon = subprocess.Popen(["rpc.mountd", "--foreground", "--no-nfs-version", "3"], stdin=subprocess.DEVNULL)
    yield place
    run("rpc.nfsd", "0")
    daemon.terminate()
    daemon.wait(30)
    run("exportfs", "-ua")
    run("umount", "-l", place)


@pytest.fixture
def adapter():
    """The name of a SCSI adapter that has one unit, of 64 MiB in memory."""
    run("modprobe", "-a", "scsi_mod", "sd_mod")
    before = set(os.listdir("/sys/class/scsi_host"))
    run("modprobe", "scsi_debug", "dev_size_mb=64")
    run("udevadm", "settle")
    (name,) = set(os.listdir("/sys/class/scsi_host")) - before
    yield name
    # udev may still have the unit open.
    run("udevadm", "settle")
    run("modprobe", "-r", "scsi_debug")


@pytest.fixture(scope="session")
def initiator(tgt):
    """The kernel's side of iSCSI, which logs in to ``tgt``."""
    run("modprobe", "-a", "iscsi_tcp", "sd_mod")
    Path("/etc/iscsi/initiatorname.iscsi").write_text("InitiatorName=iqn.2026-01.test:vm\n")
    # At its end it sends SIGTERM to process 0, which is all of its group, where it has no logger as a child.
    daemon = subprocess.Popen(["iscsid", "-f"], stdin=subprocess.DEVNULL, start_new_session=True)
    yield tgt
    daemon.terminate()
    daemon.wait(30)
