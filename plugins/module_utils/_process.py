# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Running a program that reads or writes volumes: it dies with us, and lives within limits."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import signal
import subprocess
import typing as t

_PR_SET_PDEATHSIG = 1
_MEMORY_LIMIT = 2 << 30
_CPU_LIMIT = 30
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
) -> t.Tuple[int, str, str]:
    """Exit status (negative for a signal), standard output and standard error.

    :param fds: descriptors that the command may use, as ``/proc/self/fd/N``
    :param watch: called five times a second while it runs; what it raises ends the command
    :param quick: limit its processor time too (for headers only: a conversion may take hours)
    :param file_limit: largest file in bytes that it may write
    :param env: variables of its environment besides the language and the path
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=tuple(fds),
        env={**(env or {}), "LC_ALL": "C", "PATH": os.defpath},
        cwd="/",
        preexec_fn=_in_child(os.getpid(), quick, file_limit),  # pylint: disable=subprocess-popen-preexec-fn
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
            process.kill()
            process.communicate()
    return process.returncode, out.decode("utf-8", "replace"), err.decode("utf-8", "replace")


def _in_child(parent: int, quick: bool, file_limit: t.Optional[int]) -> t.Callable[[], None]:
    """What the child does between fork and exec: die with the parent, and live within limits (CVE-2015-5162)."""

    def prepare() -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            # The parent died before the line above took effect; nobody would ever stop us.
            os._exit(127)
        os.umask(0o077)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_LIMIT, _MEMORY_LIMIT))
        if quick:
            resource.setrlimit(resource.RLIMIT_CPU, (_CPU_LIMIT, _CPU_LIMIT))
        if file_limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))

    return prepare
