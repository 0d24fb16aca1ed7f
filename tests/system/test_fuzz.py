# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A minute of what tests/tools/fuzz does at length: half of it for image headers, half for XML and names."""

from __future__ import annotations

import json
import os

import pytest
from harness import MIB, ROOT, run

SECONDS = 30
SEED = 20260101


@pytest.mark.parametrize(
    "target, files",
    [("headers", {"gate.py", "probe.py", "foreign.py"}), ("documents", {"_xml.py", "definition.py", "_names.py"})],
)
def test_whatever_is_made_up_ends_in_a_clear_error(target, files):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / ".venv" / "collections")}
    told = json.loads(
        run(ROOT / ".venv" / "bin" / "python", ROOT / "tests/tools/fuzzing.py", target, SECONDS, SEED, env=environment)
    )
    assert told["examples"] > 1000 and told["peak"] < 512 * MIB, told
    assert set(told["lines"]) == files
    for name, lines in told["lines"].items():
        assert lines["run"] >= 0.8 * lines["lines"], (name, lines)


def test_the_report_is_of_a_long_run():
    text = (ROOT / "docs" / "fuzzing.md").read_text()
    for target in ("headers", "documents"):
        row = next(line for line in text.splitlines() if line.startswith(f"| {target} |"))
        _target, seconds, _seed, examples, _longest, _memory = (cell.strip() for cell in row.strip("|").split("|"))
        assert int(seconds.split()[0]) >= 300 and int(examples.replace(",", "")) >= 100_000, row
