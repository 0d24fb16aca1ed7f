# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""usage: fork_server.py SOCKET DRIVER

Runs modules in children of a process that has imported all they need: that is most of what a short run takes. For each
connection: the words of a command and its environment come in, with two open files for its output; its number goes out, and
when it has ended its status.
"""

import atexit
import importlib
import json
import os
import pkgutil
import runpy
import signal
import socket
import sys

import ansible_collections.virtforge.libvirt.plugins.module_utils as ours


def serve(path, driver):
    for name in ("ansible.module_utils.basic", "ansible.module_utils.common.respawn", "libvirt", "lxml.etree"):
        importlib.import_module(name)
    for found in pkgutil.walk_packages(ours.__path__, f"{ours.__name__}."):
        importlib.import_module(found.name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        while True:
            client, _address = listening.accept()
            if not os.fork():
                listening.close()
                handle(client, driver)
            client.close()


def handle(client, driver):
    """One command, from its words to its status; does not return."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    text, fds, _flags, _address = socket.recv_fds(client, 1 << 20, 2)
    request = json.loads(text)
    child = os.fork()
    if child:
        _pid, status = os.waitpid(child, 0)
        client.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
        os._exit(0)
    # Whoever knows its number may end its session.
    os.setsid()
    client.sendall(f"{os.getpid()}\n".encode())
    for number, fd in enumerate((os.open(os.devnull, os.O_RDONLY), *fds)):
        os.dup2(fd, number)
    os.closerange(3, 64)
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = request["argv"]
    status = 0
    try:
        runpy.run_path(driver, run_name="__main__")
    except SystemExit as exc:
        status = exc.code if isinstance(exc.code, int) else int(exc.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


serve(*sys.argv[1:])
