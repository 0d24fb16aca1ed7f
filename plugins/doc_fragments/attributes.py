# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Attributes that the modules of this collection have in common."""

from __future__ import annotations


class ModuleDocFragment:
    """Documentation of check mode, diff mode and the action group."""

    DOCUMENTATION = r"""
options: {}
attributes:
  check_mode:
    description: Can run in check mode and say what it would do without doing it.
  diff_mode:
    description: Says what has changed, or would change, in diff mode.
  idempotent:
    description: A second run with the same parameters changes nothing.
  platform:
    description: Operating systems of the managed host.
    support: full
    platforms: linux
"""

    ACTIONGROUP = r"""
options: {}
attributes:
  action_group:
    description: Use C(group/virtforge.libvirt.all) in C(module_defaults) to set options for all modules of this collection.
    support: full
    membership:
      - virtforge.libvirt.all
"""
