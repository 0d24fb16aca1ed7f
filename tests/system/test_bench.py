# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The benchmark still runs: all of its rows with small volumes, and it cleans up after itself."""

from __future__ import annotations

import os
import re
import signal
import subprocess

import pytest
from harness import ROOT, run, wait_until

BENCH = ROOT / "tests" / "tools" / "bench"


@pytest.fixture
def place(scratch):
    """Where the benchmark works; there must be nothing in it afterwards."""
    place = scratch / "bench"
    place.mkdir()
    yield place
    # The kernel takes the last mounts of a killed run apart in its own time.
    wait_until(lambda: str(place) not in run("losetup", "-l") and not any(place.iterdir()), 120)
    place.rmdir()


def environment(place):
    return {**os.environ, "TMPDIR": str(place), "VIRTFORGE_OFFLINE": "yes"}


def test_every_row_is_measured_and_written_down(place, tmp_path):
    done = subprocess.run(
        [BENCH, "--quick", "--output", tmp_path],
        env=environment(place),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "benchmarks.md").read_text()
    assert "these figures mean nothing" in page
    table = [line for line in page.splitlines() if line.startswith("|") and line.count("|") == 9]
    works = [line.split("|")[1].strip() for line in table[2:]]
    assert len([work for work in works if work]) == 14
    for line in table[2:]:
        contender, _runs, seconds, _spread, ratio, goal, met = (cell.strip() for cell in line.strip("|").split("|")[1:])
        # Ours is the difference of two runs, which a moment of the machine can turn around.
        assert float(seconds) > 0 or contender.startswith("ours"), line
        # No claim without its ratio, and no goal without a verdict.
        assert ratio or contender.startswith(("ours", "a playbook")), line
        assert bool(met) == bool(re.sub(r"^\d+ MiB of memory", "", goal)), line
    assert "<svg" in (tmp_path / "benchmarks.svg").read_text()
    assert re.search(r"^\| qemu-img \| \d", page, re.MULTILINE)


def test_a_benchmark_that_is_ended_leaves_nothing_behind(place):
    process = subprocess.Popen(
        [BENCH, "--quick", "--rows", "copy"],
        env=environment(place),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with process:
        line = process.stdout.readline()
        assert line.startswith("== raw to raw"), line
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 1
