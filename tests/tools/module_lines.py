# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Fail for a module that has more than 150 lines outside its documentation, blank lines and comments not counted."""

from __future__ import annotations

import ast
import sys

LIMIT = 150
DOCUMENTATION = ("DOCUMENTATION", "EXAMPLES", "RETURN")


def code_lines(text: str) -> int:
    hidden = set()
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in DOCUMENTATION:
            hidden.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = enumerate(text.splitlines(), 1)
    return sum(1 for number, line in lines if number not in hidden and line.strip() and not line.lstrip().startswith("#"))


failed = False
for path in sys.argv[1:]:
    with open(path, encoding="utf-8") as module:
        count = code_lines(module.read())
    if count > LIMIT:
        print(f"{path}: {count} lines of code, {LIMIT} at most")
        failed = True
sys.exit(failed)
