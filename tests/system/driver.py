# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""usage: driver.py MODULE JSON
       driver.py serve

Run a module of the collection as Ansible does, with these arguments: in this process; or in a child for each line of standard
input, [MODULE, JSON], answered by a line [STATUS, OUTPUT, ERRORS]. What the children import has been imported once: that is
most of what a short run takes.
"""

import atexit
import importlib
import json
import os
import pkgutil
import runpy
import sys
import tempfile
import traceback

from ansible.module_utils import basic

COLLECTION = "ansible_collections.virtforge.libvirt.plugins"


def run(module, arguments):
    basic._ANSIBLE_ARGS = arguments.encode()
    basic._ANSIBLE_PROFILE = "legacy"
    # Ansible's wrapper sets it.
    os.umask(int(os.environ.get("TEST_UMASK", "022"), 8))
    runpy.run_module(f"{COLLECTION}.modules.{module}", run_name="__main__", alter_sys=True)


def child(module, arguments, out, err):
    """Never returns."""
    status = 1
    try:
        for number, fd in enumerate((os.open(os.devnull, os.O_RDONLY), out.fileno(), err.fileno())):
            os.dup2(fd, number)
        run(module, arguments)
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def serve():
    utils = importlib.import_module(f"{COLLECTION}.module_utils")
    for found in pkgutil.walk_packages(utils.__path__, f"{utils.__name__}."):
        importlib.import_module(found.name)
    for name in ("libvirt", "lxml.etree"):
        importlib.import_module(name)
    for line in sys.stdin:
        module, arguments = json.loads(line)
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            pid = os.fork()
            if pid == 0:
                child(module, arguments, out, err)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read().decode(errors="replace"))
        print(json.dumps([status, *texts]), flush=True)


if sys.argv[1] == "serve":
    serve()
else:
    run(*sys.argv[1:])
