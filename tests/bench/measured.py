# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""usage: measured.py FILE PROGRAM [ARGUMENTS]

Run a Python program in this process and write to FILE how much memory it took at most, in KiB.

VmHWM and not ``ru_maxrss``: that one would count what the process was a copy of before it became this program, and to whoever
waits for it also the largest of its own children.
"""

import atexit
import runpy
import sys

_file = sys.argv[1]


@atexit.register
def _note() -> None:
    with open("/proc/self/status", encoding="ascii", errors="replace") as status, open(_file, "w", encoding="ascii") as file:
        file.write(next(line.split()[1] for line in status if line.startswith("VmHWM:")))


sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
