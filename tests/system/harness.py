# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the tests share: the module in a fresh process, images, fingerprints."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import random
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
#: The interpreter that has libvirt-python and lxml.
PYTHON = "/usr/bin/python3"
MIB = 1 << 20
GIB = 1 << 30
STAGED = ".virtforge-"

#: directories of the libvirt pools that a test made, by name
pools: dict[str, Path] = {}
#: where PYTHON finds ansible and the collection; set by conftest
library = ""
#: the socket of fork_server.py; set by conftest
fork_server = ""


def command(params, *, check=False, diff=True, module="storage_volume_clone", python=PYTHON):
    return [python, str(HERE / "driver.py"), module, _arguments(params, check, diff)]


def _arguments(params, check, diff):
    arguments = {key: str(value) if isinstance(value, Path) else value for key, value in params.items()}
    arguments.update(
        _ansible_check_mode=check, _ansible_diff=diff, _ansible_remote_tmp="/var/tmp", _ansible_keep_remote_files=False
    )
    return json.dumps({"ANSIBLE_MODULE_ARGS": arguments})


def batch(tasks, *, check=False, module="storage_volume_clone", prefix=()):
    """Results of many runs, one after the other in one process."""
    process = subprocess.Popen(
        [*prefix, PYTHON, str(HERE / "batch.py"), module],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    out, err = process.communicate("".join(_arguments(params, check, True) + "\n" for params in tasks), timeout=600)
    results = [json.loads(line) for line in out.splitlines()]
    assert len(results) == len(tasks), f"{len(results)} results of {len(tasks)}: {err}"
    assert "Traceback" not in out + err, out + err
    return results


def environment(**more):
    return {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/root",
        "LC_ALL": "C.UTF-8",
        "PYTHONPATH": library,
        "PYTHONPYCACHEPREFIX": str(ROOT / ".venv" / "pycache"),
        **more,
    }


class Forked:
    """A module in a child of the fork server, as far as tests use subprocess.Popen."""

    def __init__(self, argv):
        # Closed by communicate().
        self._files = [tempfile.TemporaryFile("w+", encoding="utf-8") for _number in range(2)]  # noqa: SIM115
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(fork_server)
        text = json.dumps({"argv": argv, "environment": environment()})
        socket.send_fds(self._socket, [text.encode()], [file.fileno() for file in self._files])
        self._answers = self._socket.makefile()
        self.pid = int(self._answers.readline())
        self.returncode = None
        self.stdout, self.stderr = self._files

    def wait(self, timeout=None):
        if self.returncode is None:
            self._socket.settimeout(timeout)
            self.returncode = int(self._answers.readline())
            self._socket.close()
        return self.returncode

    def poll(self):
        return self.returncode if os.path.exists(f"/proc/{self.pid}") else self.wait()

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout=None):
        self.wait(timeout)
        texts = []
        for file in self._files:
            file.seek(0)
            texts.append(file.read())
            file.close()
        return tuple(texts)


def start(params, *, prefix=(), env=None, **options):
    """The module in a process of its own session."""
    if not prefix and not env and "python" not in options:
        return Forked(command(params, **options)[1:])
    return subprocess.Popen(
        [*prefix, *command(params, **options)],
        env=environment(**(env or {})),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def result_of(process, timeout=300):
    try:
        out, err = process.communicate(timeout=timeout)
    except BaseException:
        kill(process)
        raise
    lines = [line for line in out.splitlines() if line.startswith("{")]
    assert lines, f"no result, status {process.returncode}: {out}{err}"
    result = json.loads(lines[-1])
    assert "Traceback" not in json.dumps(result), result
    assert bool(result.get("failed")) == (process.returncode != 0)
    return result


def module(params, *, untouched=(), **options):
    """Result of one run, and proof that its source was left as it was."""
    paths = [*source_paths(params), *untouched]
    before = [fingerprint(path) for path in paths]
    result = result_of(start(params, **options))
    assert [fingerprint(path) for path in paths] == before, f"the source was changed by {params}"
    return result


#: The functions below run this module where they are not told another as their first argument.
CLONE = "storage_volume_clone"


def check(of=CLONE, /, **params):
    """Result of a check run, which must leave both pools as they were."""
    paths = [pool_path(params.get("pool")), pool_path(params.get("source_pool"))]
    places = [path for path in paths if path and path.is_dir()]
    before = [listing(place) for place in places]
    result = module(params, check=True, module=of)
    assert [listing(place) for place in places] == before, "the check run changed something"
    return result


def clone(of=CLONE, /, **params):
    """Result of a run that must succeed."""
    result = module(params, module=of)
    assert not result.get("failed"), result
    return result


def settle(of=CLONE, /, **params):
    """Check run, run, second run: the first tells the truth and the last has nothing to do. The result of the run."""
    predicted = check(of, **params)
    assert not predicted.get("failed"), predicted
    result = clone(of, **params)
    for key in ("changed", "actions", "diff"):
        assert predicted[key] == result[key], (key, predicted[key], result[key])
    again = clone(of, **params)
    # A replacement is asked for each time that something differs; after it nothing does.
    assert (again["changed"], again["actions"]) == (False, []), again
    return result


def refused(code, of=CLONE, /, **params):
    """Message of a run, and of a check run, that must fail with this error code and make nothing."""
    place = pool_path(params.get("pool"))
    before = listing(place) if place and place.is_dir() else None
    messages = []
    for mode in (True, False):
        result = module(params, check=mode, module=of)
        assert result.get("failed"), f"check mode {mode}: no failure: {result}"
        assert result["error_code"] == code, result
        messages.append(result["msg"])
    assert before == (listing(place) if place and place.is_dir() else None)
    message = messages[1]
    assert message and "\n" not in message.strip(), message
    return message


def warnings(result):
    """Its warnings as texts, whatever ansible-core makes of them."""
    return [str(warning) for warning in result.get("warnings", [])]


def pool_path(pool):
    if not pool or "\0" in str(pool):
        return None
    return Path(pool) if str(pool).startswith("/") else pools.get(str(pool))


def source_paths(params):
    path = params.get("source_path")
    if path is None and params.get("source"):
        place = pool_path(params.get("source_pool") or params.get("pool"))
        path = place / str(params["source"]) if place and len(str(params["source"])) < 256 else None
    try:
        return [Path(path)] if path is not None and Path(path).is_file() else []
    except (OSError, ValueError):
        return []


def data_of(path):
    """Hash of a file's data, in which zeros and holes count as the same: writeback moves the holes' edges.

    Python's own hash, good in this process only, takes an emulated processor a twentieth of what SHA-256 takes.
    """
    digest = 0
    fd = os.open(path, os.O_RDONLY)
    try:
        size, at = os.fstat(fd).st_size, 0
        while at < size:
            try:
                at = os.lseek(fd, at, os.SEEK_DATA) // MIB * MIB
            except OSError:
                break
            block = os.pread(fd, MIB, at)
            if block.count(0) != len(block):
                digest = hash((digest, at, block))
            at += MIB
    finally:
        os.close(fd)
    return digest


def flags_of(path):
    """The inode's flags, as lsattr shows them; btrfs and XFS set none by being read."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return int.from_bytes(fcntl.ioctl(fd, 0x80086601, bytes(8))[:4], "little")
    finally:
        os.close(fd)


def fingerprint(path):
    """All that must not change of a source: bytes, times but for the access time, owner, mode, attributes."""
    status = os.stat(path)
    attributes = {name: os.getxattr(path, name) for name in os.listxattr(path)}
    identity = (status.st_dev, status.st_ino, status.st_mode, status.st_uid, status.st_gid, status.st_nlink, status.st_size)
    return (str(path), identity, status.st_mtime_ns, status.st_ctime_ns, attributes, flags_of(path), data_of(path))


def listing(place):
    """Everything in a directory, with what changes when somebody touches it."""
    found = {}
    for entry in sorted(os.scandir(place), key=lambda item: item.name):
        status = entry.stat(follow_symlinks=False)
        found[entry.name] = (
            status.st_ino,
            status.st_size,
            status.st_mode,
            status.st_uid,
            status.st_mtime_ns,
            status.st_ctime_ns,
        )
    return found


def leftovers(place):
    return [name for name in os.listdir(place) if name.startswith(STAGED)]


def run(*arguments, **options):
    done = subprocess.run([str(argument) for argument in arguments], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
    return done.stdout


def info(path, image_format):
    return json.loads(run("qemu-img", "info", "-U", "--output=json", "-f", image_format, path))


def same_content(source, source_format, target, target_format):
    """Whether a guest sees the same; zeros after the end of the shorter count as nothing."""
    done = subprocess.run(
        ["qemu-img", "compare", "-U", "-f", source_format, "-F", target_format, str(source), str(target)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr
    return done.returncode == 0


def allocated(path):
    return os.stat(path).st_blocks * 512


def write_at(path, at, data):
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


def make_raw(path, size, pieces=((0, 1), (50, 2)), unit=MIB):
    """A raw image with random-looking data at (place, length) in units."""
    with open(path, "wb") as file:
        for at, length in pieces:
            file.seek(at * unit)
            file.write(noise(length * unit, seed=at))
        file.truncate(size)
    return Path(path)


def zeros(data):
    """Whether these bytes are all zero; any() takes a second for each 100 MiB."""
    return data.count(0) == len(data)


def noise(length, seed=0):
    return random.Random(seed).randbytes(length)


@contextlib.contextmanager
def opens(path):
    """A function that tells whether anybody has opened the file since, by whatever name (inotify(7))."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    in_open = 0x20
    assert fd >= 0 and libc.inotify_add_watch(fd, os.fsencode(path), in_open) >= 0

    def opened():
        try:
            return bool(os.read(fd, 4096))
        except BlockingIOError:
            return False

    try:
        yield opened
    finally:
        os.close(fd)


def unnamed_files(place):
    """Modes of the files without a name in this directory that some process has open."""
    modes = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            for number in os.listdir(f"/proc/{pid}/fd"):
                link = f"/proc/{pid}/fd/{number}"
                target = os.readlink(link)
                if target.startswith(f"{place}/#") and target.endswith("(deleted)"):
                    modes.append(os.stat(link).st_mode & 0o7777)
    return modes


def commands():
    """Number and command line of every process."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
            found.append((int(pid), words))
    return found


def processes_with(text):
    return [words for _pid, words in commands() if text in words]


def opened_by(process, path):
    """Whether the module that runs in this process, or under strace in a child of it, has the file open."""
    for pid, words in commands():
        if str(HERE / "driver.py") in words:
            with contextlib.suppress(OSError):
                for number in os.listdir(f"/proc/{pid}/fd"):
                    if os.readlink(f"/proc/{pid}/fd/{number}") == str(path):
                        return True
    return process.poll() is not None


def start_replacing(place):
    """A run that replaces the volume "web" by a smaller clone of base.raw, caught with its new file open for 4 s."""
    clone(pool=place, source="base.raw", name="web", capacity="70M")
    params = {"pool": place, "source": "base.raw", "name": "web", "capacity": "64M", "force": True}
    slow = ["-e", "trace=fchmod", "-e", "inject=fchmod:delay_exit=4000000"]
    process = start(params, prefix=["strace", "-qq", "-o", "/dev/null", *slow])
    wait_until(lambda: unnamed_files(place), 30)
    return process


def wait_until(true, seconds=10):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)


def kill(process):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdout, process.stderr):
        if stream:
            stream.close()


@contextlib.contextmanager
def held(path, image_format="raw", writable=True):
    """qemu-io with the image open."""
    mode = [] if writable else ["-r"]
    process = subprocess.Popen(
        ["qemu-io", *mode, "-f", image_format, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        # It answers a command once the image is open.
        process.stdin.write("length\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        assert "GiB" in answer or "MiB" in answer or "KiB" in answer or "bytes" in answer, answer
        yield process
    finally:
        process.kill()
        process.communicate()


def virsh(*arguments, uri="qemu:///system"):
    return run("virsh", "-q", "-c", uri, *arguments)


def virsh_status(*arguments, uri="qemu:///system"):
    return subprocess.run(["virsh", "-q", "-c", uri, *map(str, arguments)], capture_output=True, check=False).returncode
