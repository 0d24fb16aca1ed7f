# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Running a program that reads or writes volumes: it dies with us, and lives within limits."""

from __future__ import annotations

import ctypes
import os
import resource
import select
import shutil
import signal
import subprocess
import typing as t

_PR_SET_PDEATHSIG = 1
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_MEMORY_LIMIT = 2 << 30
_CPU_LIMIT = 30
# Of its memory, librbd's threads would reserve 64 MiB each for themselves (mallopt(3)).
_ENVIRONMENT = {"LC_ALL": "C", "PATH": os.defpath, "MALLOC_ARENA_MAX": "4"}
# Loaded before any fork: a child between fork and exec must not import or open anything.
_LIBC = ctypes.CDLL(None, use_errno=True)


def find(program: str) -> t.Optional[str]:
    """Where a program is; Ansible may come with a PATH that lacks the usual places."""
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/local/bin", "/usr/bin", "/bin", "/usr/sbin", "/sbin"))
    return shutil.which(program, path=path)


def run(
    command: t.Sequence[str],
    fds: t.Iterable[int],
    watch: t.Callable[[], None] = lambda: None,
    quick: bool = False,
    file_limit: t.Optional[int] = None,
    env: t.Optional[t.Mapping[str, str]] = None,
    network: bool = True,
    outlives: bool = False,
) -> t.Tuple[int, str, str]:
    """Exit status (negative for a signal), standard output and standard error.

    :param fds: descriptors that the command may use, as ``/proc/self/fd/N``
    :param watch: called five times a second while it runs; what it raises ends the command
    :param quick: limit its processor time too, and let it write to no file (it looks at headers; a conversion may take hours)
    :param file_limit: largest file in bytes that it may write
    :param env: variables of its environment besides the language and the path
    :param network: whether it may connect to other hosts, and to servers on this one
    :param outlives: whether it comes to its own end when we are killed: it is in the middle of what only it can undo
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=tuple(fds),
        env={**(env or {}), **_ENVIRONMENT},
        cwd="/",
        preexec_fn=_in_child(os.getpid(), quick, file_limit, network, outlives),  # pylint: disable=subprocess-popen-preexec-fn
        start_new_session=outlives,
    )
    try:
        while True:
            try:
                out, err = process.communicate(timeout=0.2)
                break
            except subprocess.TimeoutExpired:
                watch()
    finally:
        if process.poll() is None:
            if not outlives:
                process.kill()
            process.communicate()
    return process.returncode, out.decode("utf-8", "replace"), err.decode("utf-8", "replace")


class Child:
    """A process that is talked to line by line, and is ended where its answer takes too long.

    Start it from the main thread: with the thread that has started it, it dies.
    """

    def __init__(self, command: t.Sequence[str], fds: t.Iterable[int]) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pass_fds=tuple(fds),
            env=_ENVIRONMENT,
            cwd="/",
            preexec_fn=_in_child(os.getpid(), False, None, True),  # pylint: disable=subprocess-popen-preexec-fn
        )

    def ask(self, line: str, watch: t.Callable[[], None]) -> str:
        """Its answer to a line; empty when it has ended.

        :param watch: called five times a second while it is waited for; what it raises ends the process
        """
        stdin, stdout = t.cast(t.IO[bytes], self._process.stdin), t.cast(t.IO[bytes], self._process.stdout)
        try:
            try:
                stdin.write(line.encode() + b"\n")
                stdin.flush()
            except BrokenPipeError:
                return ""
            while not select.select([stdout], [], [], 0.2)[0]:
                watch()
            # It writes a line at once.
            return stdout.readline().decode("utf-8", "replace")
        except BaseException:
            self.close()
            raise

    def close(self) -> int:
        """End it; its exit status, negative for the signal that ended it."""
        self._process.kill()
        # Nothing is left to be written, so that closing has nothing to fail with.
        for stream in (self._process.stdin, self._process.stdout):
            try:
                t.cast(t.IO[bytes], stream).close()
            except BrokenPipeError:
                pass
        return self._process.wait()


class Output:
    """A program that reads an open file and writes what we read from it. Use as a context manager, which ends it.

    Start it from the main thread: with the thread that has started it, it dies.
    """

    def __init__(self, command: t.Sequence[str], stdin: int) -> None:
        self._errors = os.memfd_create("stderr", os.MFD_CLOEXEC)
        try:
            self._process = subprocess.Popen(
                command,
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=_ENVIRONMENT,
                cwd="/",
                preexec_fn=_in_child(os.getpid(), False, 1 << 16, network=False),  # pylint: disable=subprocess-popen-preexec-fn
            )
        except BaseException:
            os.close(self._errors)
            raise

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        t.cast(t.IO[bytes], self._process.stdout).close()
        os.close(self._errors)

    def pieces(self, size: int, watch: t.Callable[[], None]) -> t.Iterator[bytes]:
        """What it writes.

        :param watch: called at least five times a second; what it raises ends the program
        """
        stdout = t.cast(t.IO[bytes], self._process.stdout).fileno()
        while True:
            watch()
            if not select.select([stdout], [], [], 0.2)[0]:
                continue
            data = os.read(stdout, size)
            if not data:
                return
            yield data

    def end(self) -> t.Tuple[int, str]:
        """Exit status (negative for a signal) and the beginning of standard error, once it has nothing more to write."""
        status = self._process.wait()
        return status, os.pread(self._errors, 4096, 0).decode("utf-8", "replace")


def _in_child(
    parent: int, quick: bool, file_limit: t.Optional[int], network: bool, outlives: bool = False
) -> t.Callable[[], None]:
    """What the child does between fork and exec: die with the parent, and live within limits (CVE-2015-5162)."""

    def prepare() -> None:
        if not network and _LIBC.unshare(_CLONE_NEWNET) != 0:
            # Only root may do that alone. Where users may do neither, what is spelled out for the program has to be enough.
            # Before the next call, since a change of credentials may undo that (PR_SET_PDEATHSIG(2const)).
            _LIBC.unshare(_CLONE_NEWUSER | _CLONE_NEWNET)
        if not outlives:
            _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            # The parent died before the line above took effect; nobody would ever stop us.
            os._exit(127)
        os.umask(0o077)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_LIMIT, _MEMORY_LIMIT))
        if quick:
            # One more second until the signal that does not say why (setrlimit(2)).
            resource.setrlimit(resource.RLIMIT_CPU, (_CPU_LIMIT, _CPU_LIMIT + 1))
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        if file_limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))

    return prepare
