# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Fixtures: file systems on loop devices, images, a libvirtd. All of it ends with the namespaces of tests/tools/system."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.insert(0, os.path.dirname(__file__))

import harness
import images
import web
from harness import MIB, run

FILE_SYSTEMS = ("xfs", "btrfs", "ext4")
ALLOWED_SKIPS = harness.ROOT / "tests" / "allowed-skips.txt"


def pytest_configure(config):
    if os.environ.get("VIRTFORGE_PRIVATE") != "yes":
        raise pytest.UsageError("run these tests by tests/tools/system: they need root and namespaces of their own")
    config.skipped = []
    config.pluginmanager.register(Teller(config))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item):
    report = (yield).get_result()
    if report.skipped:
        item.config.skipped.append(
            (item.nodeid, str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr))
        )


class Teller:
    """Tells a failure at once too: a run that is ended from outside tells nothing at its end."""

    def __init__(self, config):
        self.config = config

    def pytest_runtest_logreport(self, report):
        if report.failed:
            reason = [line for line in report.longreprtext.splitlines() if line.startswith("E ")]
            terminal = self.config.pluginmanager.get_plugin("terminalreporter")
            terminal.write_line(f"\n{report.nodeid} ({report.when}): {' '.join(reason[:3])[:2000]}")


def pytest_sessionfinish(session):
    allowed = [line.split(":", 1)[0] for line in ALLOWED_SKIPS.read_text().splitlines() if line and not line.startswith("#")]
    session.config.unlisted = [skip for skip in session.config.skipped if not any(skip[0].startswith(name) for name in allowed)]
    if session.config.unlisted and session.exitstatus == 0:
        session.exitstatus = 1


def pytest_terminal_summary(terminalreporter, config):
    for test, reason in config.skipped:
        listed = "not on the list of allowed skips" if (test, reason) in config.unlisted else "allowed"
        terminalreporter.write_line(f"SKIPPED {test}: {reason} ({listed})")
    if not config.skipped:
        terminalreporter.write_line("No test was skipped.")


@pytest.fixture(scope="session")
def scratch():
    """A directory on the disk of the machine."""
    place = Path(tempfile.mkdtemp(prefix="virtforge-test.", dir="/var/tmp"))
    place.chmod(0o755)
    yield place
    shutil.rmtree(place, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def library(scratch):
    """Where the system's Python finds ansible and the collection, and nothing else of .venv."""
    place = scratch / "library"
    (place / "ansible_collections" / "virtforge").mkdir(parents=True)
    (place / "ansible_collections" / "virtforge" / "libvirt").symlink_to(harness.ROOT)
    (place / "ansible").symlink_to(Path(importlib.util.find_spec("ansible").origin).parent)
    harness.library = str(place)


@pytest.fixture(scope="session", autouse=True)
def fork_server(library, scratch):
    path = str(scratch / "fork_server")
    server = subprocess.Popen(
        [harness.PYTHON, harness.HERE / "fork_server.py", path, harness.HERE / "driver.py"], env=harness.environment()
    )
    harness.wait_until(lambda: os.path.exists(path), 120)
    harness.fork_server = path
    yield
    server.kill()
    server.wait()


def make_file_system(kind, image, size, place):
    """A file system in a file, mounted."""
    with open(image, "wb") as file:
        file.truncate(size)
    options = {"xfs": ["-m", "reflink=1"], "xfs without reflink": ["-m", "reflink=0"], "btrfs": [], "ext4": ["-F"]}[kind]
    run(f"mkfs.{kind.split()[0]}", "-q", *options, image)
    place.mkdir()
    device = run("losetup", "-f", "--show", image).strip()
    try:
        run("mount", device, place)
    finally:
        # Gone for good with the last mount.
        run("losetup", "-d", device)
    place.chmod(0o755)
    return place


@pytest.fixture(scope="session")
def file_systems(scratch):
    mounts = {kind: make_file_system(kind, scratch / f"{kind}.img", 6 << 30, scratch / kind) for kind in FILE_SYSTEMS}
    yield mounts
    for place in mounts.values():
        subprocess.run(["umount", "-l", str(place)], check=False)


@pytest.fixture
def small_file_system(scratch):
    """Makes small file systems that end with the test."""
    made = []

    def make(kind, size):
        number = len(made)
        image = scratch / f"small-{os.getpid()}-{number}.img"
        place = make_file_system(kind, image, size, scratch / f"small-{os.getpid()}-{number}")
        made.append((image, place))
        return place

    yield make
    for image, place in made:
        run("umount", "-l", place)
        place.rmdir()
        image.unlink()


_numbers = iter(range(1 << 30))


def new_directory(base):
    place = base / f"pool{next(_numbers)}"
    place.mkdir()
    place.chmod(0o755)
    return place


@pytest.fixture
def pool(file_systems):
    """A directory pool on XFS."""
    place = new_directory(file_systems["xfs"])
    yield place
    assert not harness.leftovers(place)
    shutil.rmtree(place)


@pytest.fixture
def pool2(pool):
    yield from _second(pool.parent)


def _second(base):
    place = new_directory(base)
    yield place
    assert not harness.leftovers(place)
    shutil.rmtree(place)


@pytest.fixture(params=FILE_SYSTEMS)
def any_pool(request, file_systems):
    """A directory pool on each file system in turn."""
    yield from _second(file_systems[request.param])


@pytest.fixture
def raw(pool):
    """64 MiB with 3 MiB of data."""
    return harness.make_raw(pool / "base.raw", 64 * MIB)


@pytest.fixture
def qcow2(pool, raw):
    """64 MiB with 3 MiB of data."""
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, pool / "base.qcow2")
    return pool / "base.qcow2"


@pytest.fixture(scope="session")
def certificates(scratch):
    """Of a certificate authority of these tests."""
    return web.make_certificates(scratch / "ca")


@pytest.fixture(scope="session")
def libvirtd(scratch):
    """A libvirtd, at qemu:///system of these namespaces."""
    with open(scratch / "libvirtd.log", "w", encoding="utf-8") as log:
        # libvirtd opens every image of a pool of Ceph when it looks at it, by the librbd that rbd_child.py speaks of.
        environment = {**os.environ, "CEPH_ARGS": "--librados_thread_count=1"}
        options = {"env": environment, "stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
        daemons = [subprocess.Popen([name], **options) for name in ("virtlogd", "libvirtd")]
    try:
        # "virsh version" would also ask for an emulator.
        harness.wait_until(lambda: harness.virsh_status("pool-list") == 0, 60)
        yield daemons[1]
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(30)


def make_pool(name, place, kind="dir"):
    harness.virsh("pool-define-as", name, kind, "--target", place)
    harness.virsh("pool-start", name)
    harness.pools[name] = place
    return name


def remove_pool(name):
    harness.virsh_status("pool-destroy", name)
    harness.virsh_status("pool-undefine", name)
    harness.pools.pop(name, None)


@pytest.fixture
def libvirt_pool(libvirtd, pool):
    """A pool of libvirt on XFS: its name; its directory is ``pool``."""
    yield make_pool(pool.name, pool)
    remove_pool(pool.name)


@pytest.fixture
def libvirt_pool2(libvirtd, pool2):
    yield make_pool(pool2.name, pool2)
    remove_pool(pool2.name)


DOMAIN = """<domain type='qemu'><name>{name}</name><memory unit='MiB'>64</memory>
<os><type arch='x86_64' machine='pc'>hvm</type></os>
<devices><emulator>/usr/bin/qemu-system-x86_64</emulator>
<disk type='file' device='disk'><driver name='qemu' type='{format}'/><source file='{path}'/>
<target dev='vda' bus='virtio'/></disk>
</devices></domain>"""


@pytest.fixture
def domain(libvirtd, scratch):
    """Starts domains, paused, with one disk."""
    names = []

    def run_with(path, image_format):
        name = f"guest{len(names)}-{time.monotonic_ns()}"
        document = scratch / f"{name}.xml"
        document.write_text(DOMAIN.format(name=name, path=path, format=image_format))
        harness.virsh("create", document, "--paused")
        names.append(name)
        return name

    yield run_with
    for name in names:
        harness.virsh("destroy", name)


@pytest.fixture(params=["directory", "libvirt"])
def either(request, pool):
    """How the task names the pool: its directory, and as a pool of libvirt."""
    return str(pool) if request.param == "directory" else request.getfixturevalue("libvirt_pool")


@pytest.fixture(scope="session")
def gallery(file_systems):
    """A directory on XFS with the images of ``images.make_all``, and what they are."""
    place = new_directory(file_systems["xfs"])
    return place, images.make_all(place)


# --- pools of their own ---------------------------------------------------------------------------------------------------


@pytest.fixture
def device(scratch):
    """Makes empty loop devices that end with the test."""
    made = []

    def make(size=32 * MIB):
        image = scratch / f"device-{os.getpid()}-{next(_numbers)}.img"
        with open(image, "wb") as file:
            file.truncate(size)
        made.append((run("losetup", "-f", "--show", image).strip(), image))
        return made[-1][0]

    yield make
    for path, image in made:
        # A partition would stay in the kernel, for who gets this loop device next.
        subprocess.run(["partx", "-d", path], check=False, capture_output=True)
        run("losetup", "-d", path)
        image.unlink()


@contextmanager
def served(script, place, *arguments):
    """A server of tests/tools, from when it is ready to the end of its standard input."""
    server = subprocess.Popen(
        [harness.ROOT / "tests" / "tools" / script, place, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout.readline() == "ready\n"
    yield
    server.communicate(timeout=30)


@pytest.fixture(scope="session")
def gluster(scratch):
    """A GlusterFS server on 127.0.0.2: the name of its volume."""
    with served("start-gluster", scratch / "gluster"):
        yield "gv0"


@dataclass(frozen=True)
class Ceph:
    """A Ceph on 127.0.0.1 with the RBD pool ``pool``; ``conf`` is for its administrator, ``user`` has ``key``.

    At the port and with the pool that the documentation speaks of.
    """

    conf: Path
    key: str
    pool: str = "vms"
    user: str = "libvirt"
    host: str = "127.0.0.1"
    port: int = 3300

    def rbd(self, *arguments):
        return run("rbd", "-c", self.conf, *arguments, timeout=60)


@pytest.fixture(scope="session")
def ceph(scratch):
    place = scratch / "ceph"
    with served("start-ceph", place, Ceph.pool, Ceph.port):
        yield Ceph(place / "ceph.conf", (place / "key").read_text().strip())


@pytest.fixture
def example_names(scratch):
    """The hosts that the documentation speaks of."""
    names = scratch / "names"
    names.write_text(
        f"{Path('/etc/hosts').read_text()}\n127.0.0.2 nas.example.com\n"
        "127.0.0.1 kvm2.example.com cloud.example.com mon1.example.com mon2.example.com\n"
    )
    run("mount", "--bind", names, "/etc/hosts")
    yield
    run("umount", "/etc/hosts")
    names.unlink()


@dataclass(frozen=True)
class Tgt:
    """An iSCSI server on 127.0.0.1. ``target`` has units for everybody, 1 and 2 in the files ``units``.

    ``chap_target`` has one of 16 MiB, in ``chap_unit``, for ``user`` with ``password``.
    """

    units: tuple[Path, ...]
    chap_unit: Path
    target: str = "iqn.2026-01.test:open"
    chap_target: str = "iqn.2026-01.test:chap"
    user: str = "virtforge"
    password: str = "open-sesame-123"
    host: str = "127.0.0.1"
    port: int = 13260


@pytest.fixture(scope="session")
def tgt(scratch):
    place = scratch / "tgt"
    with served("start-tgt", place, Tgt.port, "64M", "32M"):
        yield Tgt((place / "open1", place / "open2"), place / "chap1")


def remove_pools():
    """All that libvirt has."""
    for name in filter(None, map(str.strip, harness.virsh("pool-list", "--all", "--name").splitlines())):
        harness.virsh_status("pool-destroy", name)
        harness.virsh_status("pool-undefine", name)


@pytest.fixture
def place(request, scratch):
    """An empty directory to make pools in, which are removed with it."""
    place = new_directory(scratch)
    yield place
    if "libvirtd" in request.fixturenames:
        remove_pools()
    shutil.rmtree(place)


@dataclass(frozen=True)
class Hypervisor:
    """A host that is reached at ``uri``, and by ssh. What it has in /srv is seen here below ``srv``."""

    uri: str
    ssh: str
    srv: Path

    def virsh(self, *arguments):
        return harness.virsh(*arguments, uri=self.uri)


@pytest.fixture(scope="session")
def hypervisor(scratch):
    place, known = scratch / "hosts", Path("/root/.ssh")
    missing = not known.exists()
    known.mkdir(exist_ok=True)
    run("mount", "-t", "tmpfs", "-o", "mode=0700", "none", known)
    with served("start-sshhosts", place, 1, 2201):
        keys = (place / "known_hosts").read_text()
        # Also as the examples in docs/remote.md call it.
        (known / "known_hosts").write_text(keys + keys.replace("127.0.0.1", "kvm2.example.com"))
        ssh = f"qemu+ssh://root@127.0.0.1:2201/system?keyfile={place}/id&no_tty=1"
        yield Hypervisor("qemu+tcp://127.0.0.1:3201/system", ssh, place / "host1" / "srv")
    run("umount", known)
    if missing:
        known.rmdir()


def _far_pool(hypervisor):
    name = f"far{_numbers.__next__()}"
    hypervisor.virsh("pool-define-as", name, "dir", "--target", f"/srv/{name}")
    hypervisor.virsh("pool-build", name)
    hypervisor.virsh("pool-start", name)
    harness.pools[name] = hypervisor.srv / name
    yield name
    harness.virsh_status("pool-destroy", name, uri=hypervisor.uri)
    harness.virsh_status("pool-undefine", name, uri=hypervisor.uri)
    assert not harness.leftovers(harness.pools[name])
    shutil.rmtree(harness.pools.pop(name))


@pytest.fixture
def far(hypervisor):
    """A directory pool of the other host: its name."""
    yield from _far_pool(hypervisor)


@pytest.fixture
def far2(hypervisor):
    yield from _far_pool(hypervisor)
