# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""usage: driver.py MODULE JSON

Run a module of the collection as Ansible does, in this process, with these arguments.
"""

import os
import runpy
import sys

from ansible.module_utils import basic

basic._ANSIBLE_ARGS = sys.argv[2].encode()
basic._ANSIBLE_PROFILE = "legacy"
# Ansible's wrapper sets it.
os.umask(int(os.environ.get("TEST_UMASK", "022"), 8))
runpy.run_module(f"ansible_collections.virtforge.libvirt.plugins.modules.{sys.argv[1]}", run_name="__main__", alter_sys=True)
