# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a program is given that looks at somebody's image: no network, no environment, limits, and no life after ours."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import time

import harness
import pytest
from ansible_collections.virtforge.libvirt.plugins.module_utils import _process
from ansible_collections.virtforge.libvirt.plugins.module_utils._errors import CloneError
from ansible_collections.virtforge.libvirt.plugins.module_utils._images import qemu_img
from ansible_collections.virtforge.libvirt.plugins.module_utils._images.qemu_img import Layer, QemuImg
from harness import GIB, MIB, PYTHON

LIMITS = """
import json, resource
print(json.dumps({name: resource.getrlimit(getattr(resource, "RLIMIT_" + name)) for name in ("AS", "CPU", "CORE", "FSIZE")}))
"""
CONNECT = """
import socket, sys
try:
    socket.create_connection(("127.0.0.1", int(sys.argv[1])), 2)
except OSError as error:
    sys.exit(str(error))
"""
#: a run of the code under test, as another user
AS_USER = """
import os, sys
os.setgid(1234); os.setuid(1234)
sys.path.insert(0, sys.argv[1])
from ansible_collections.virtforge.libvirt.plugins.module_utils import _process
status, out, err = _process.run(sys.argv[2:], [], network=False)
print(out, end="")
sys.exit(status)
"""


#: a run of the code under test, which is killed while a command runs that must come to its end
OUTLIVED = """
import sys
sys.path.insert(0, sys.argv[1])
from ansible_collections.virtforge.libvirt.plugins.module_utils import _process
_process.run(["/bin/sh", "-c", "echo begun >$0; sleep 2; echo done >$0", sys.argv[2]], [], outlives=True)
"""


@pytest.fixture
def program(scratch):
    """Makes a program that is taken for qemu-img."""
    made = scratch / "stub"

    def make(text):
        made.write_text(text)
        made.chmod(0o755)
        qemu = QemuImg()
        qemu._program = str(made)
        return qemu

    yield make
    made.unlink(missing_ok=True)


@pytest.fixture
def listener():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        yield server


@pytest.mark.parametrize(
    "given, expected",
    [
        ({}, {"AS": [2 * GIB, 2 * GIB], "CORE": [0, 0], "CPU": [-1, -1], "FSIZE": [-1, -1]}),
        ({"quick": True}, {"AS": [2 * GIB, 2 * GIB], "CORE": [0, 0], "CPU": [30, 31], "FSIZE": [0, 0]}),
        ({"file_limit": MIB}, {"AS": [2 * GIB, 2 * GIB], "CORE": [0, 0], "CPU": [-1, -1], "FSIZE": [MIB, MIB]}),
    ],
)
def test_limits(given, expected):
    status, out, err = _process.run([PYTHON, "-c", LIMITS], [], **given)
    assert status == 0, err
    assert json.loads(out) == expected


def test_the_environment_is_empty(monkeypatch):
    for name in ("http_proxy", "LD_PRELOAD_X", "QEMU_MODULE_DIR", "HOME", "CEPH_ARGS", "TMPDIR"):
        monkeypatch.setenv(name, "/x")
    out = _process.run(["/usr/bin/env"], [])[1]
    assert {line.split("=")[0] for line in out.splitlines()} == {"LC_ALL", "PATH", "MALLOC_ARENA_MAX"}


def test_there_is_no_network(listener):
    connect = [PYTHON, "-c", CONNECT, str(listener.getsockname()[1])]
    assert _process.run(connect, [])[0] == 0
    listener.accept()
    status, _out, err = _process.run(connect, [], network=False)
    assert status == 1 and "unreachable" in err, err
    with pytest.raises(TimeoutError):
        listener.accept()
    links = _process.run(["/bin/cat", "/proc/net/dev"], [], network=False)[1].splitlines()[2:]
    assert [line.split(":")[0].strip() for line in links] == ["lo"]


def as_user(*command):
    return [PYTHON, "-c", AS_USER, harness.library, *command]


def test_there_is_no_network_for_another_user(listener):
    connect = [PYTHON, "-c", CONNECT, str(listener.getsockname()[1])]
    done = subprocess.run(as_user(*connect), check=False, capture_output=True, text=True)
    assert done.returncode == 1, done
    with pytest.raises(TimeoutError):
        listener.accept()


def test_what_must_come_to_its_end_outlives_us(scratch):
    """LVM between suspending a device and resuming it, parted between two writes of a table."""
    said = scratch / "outlived"
    process = subprocess.Popen([PYTHON, "-c", OUTLIVED, harness.library, said], start_new_session=True)
    harness.wait_until(said.exists, 20)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    harness.wait_until(lambda: said.read_text() == "done\n", 20)
    said.unlink()


def test_what_another_user_runs_dies_with_him():
    process = subprocess.Popen(as_user("/bin/sleep", "987.5"), start_new_session=True)
    harness.wait_until(lambda: any(words.startswith("/bin/sleep 987.5") for _pid, words in harness.commands()))
    process.send_signal(signal.SIGKILL)
    process.wait()
    harness.wait_until(lambda: not any(words.startswith("/bin/sleep 987.5") for _pid, words in harness.commands()))


def test_another_user_works_with_what_is_his(scratch):
    place = scratch / "his"
    place.mkdir()
    os.chown(place, 1234, 1234)
    done = subprocess.run(as_user("/usr/bin/qemu-img", "create", "-q", "-f", "qcow2", str(place / "x"), "1M"), check=False)
    assert done.returncode == 0
    status = (place / "x").stat()
    assert (status.st_uid, stat.S_IMODE(status.st_mode)) == (1234, 0o600)
    (place / "x").unlink()
    place.rmdir()


def test_only_a_command_that_names_a_volume_on_the_network_may_connect(program, listener):
    """As the options of Layer.node spell it out; whatever an image says is not there."""
    text = f"#!{PYTHON}\nimport sys\nsys.argv[1:] = ['{listener.getsockname()[1]}']\n{CONNECT}"
    qemu = program(text)
    fd = os.memfd_create("key")
    try:
        rbd = Layer(fd, "raw", network={"driver": "rbd", "pool": "p", "image": "i"})
        qemu.run(qemu_img.info(rbd), {fd: "it"}, "reading")
        listener.accept()
        qemu.run(qemu_img.fill(rbd.node, [rbd], Layer(fd, "raw"), False, None), {fd: "it"}, "reading")
        listener.accept()
        qemu.run(qemu_img.fill(Layer(fd, "raw").node, [], rbd, False, None), {fd: "it"}, "writing")
        listener.accept()
        for arguments in (
            qemu_img.info(Layer(fd, "vdi")),
            qemu_img.check(Layer(fd, "qcow2")),
            qemu_img.resize([Layer(fd, "qcow2")], MIB, "off"),
        ):
            with pytest.raises(CloneError, match="unreachable"):
                qemu.run(arguments, {fd: "it"}, "reading")
    finally:
        os.close(fd)


def test_a_network_is_there_for_a_moment_only():
    """A thousand of them do not pile up: the kernel takes away what nobody uses."""
    begun = time.monotonic()
    for _number in range(50):
        assert _process.run(["/bin/true"], [], network=False)[0] == 0
    assert time.monotonic() - begun < 20


@pytest.mark.parametrize(
    "text",
    [
        f"#!{PYTHON}\nwhile True:\n    pass\n",
        f"#!{PYTHON}\nimport sys\nsys.exit('qemu-img: Could not allocate refcount table: Cannot allocate memory')\n",
    ],
)
def test_what_takes_too_long_or_too_much_is_refused(program, monkeypatch, text):
    monkeypatch.setattr(_process, "_CPU_LIMIT", 1)
    qemu = program(text)
    fd = os.memfd_create("image")
    try:
        with pytest.raises(CloneError) as caught:
            qemu.run(qemu_img.check(Layer(fd, "qcow2")), {fd: "it"}, "checking it", quick=True)
        assert caught.value.code == "UNSAFE_IMAGE" and caught.value.msg.endswith("[too_costly]"), caught.value.msg
    finally:
        os.close(fd)


def test_its_messages_are_in_the_error_by_the_names_of_a_person(program):
    qemu = program(
        f"#!{PYTHON}\nimport sys\nsys.exit('qemu-img: Could not open ' + repr(sys.argv[-1]) + ': Image is not in vdi format')\n"
    )
    fd = os.memfd_create("image")
    try:
        with pytest.raises(
            CloneError, match="reading volume 'web' failed: Could not open volume 'web': Image is not in vdi format"
        ):
            qemu.run(qemu_img.info(Layer(fd, "vdi")), {fd: "volume 'web'"}, "reading volume 'web'", quick=True)
    finally:
        os.close(fd)
