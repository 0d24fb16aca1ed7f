# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""usage: batch.py MODULE

Run a module of the collection once for each line of standard input, its arguments in JSON, and write a line for each result.
All in one process: to start one for each would take most of the time.
"""

import contextlib
import io
import os
import runpy
import sys

from ansible.module_utils import basic

basic._ANSIBLE_PROFILE = "legacy"
os.umask(0o022)
for line in sys.stdin:
    basic._ANSIBLE_ARGS = line.encode()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        runpy.run_module(f"ansible_collections.virtforge.libvirt.plugins.modules.{sys.argv[1]}", run_name="__main__")
    print(printed.getvalue().strip().splitlines()[-1], flush=True)
