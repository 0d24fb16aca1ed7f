# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The page and the picture."""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import re
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

from contenders import Contender, virt_volume_version
from place import MIB
from works import Work

INTRODUCTION = """# Benchmarks

`make bench` wrote this page and its picture, in one run on one machine.

- The contenders of a work take turns, in another order each round; the figures are medians. Each run makes new volumes, with
  its sources in the page cache and nothing else left to be written.
- Everybody is durable: what a peer made is synced (`sync FILE`), and the sync counts. Everybody is asked for the same format
  and capacity, and what came out is compared with its source once.
- The time of ours is that of the module's process, and of all that it runs, less that of the same process when it finds the
  volume there. Where it says "whole playbook", it is all of `ansible-playbook`.
- `virsh` is compared with ours in a pool of libvirt, which has to be refreshed; the others with ours in a directory.
- The file systems lie on loop devices, {disk}.
"""


# Seconds; less than this cannot be told from nothing.
_NOISE = 0.002
_LOST = "lost in noise"


class Result:
    """Seconds of the runs, and peak memory in bytes, by contender."""

    def __init__(self, work: Work, kind: str) -> None:
        self.work, self.kind = work, kind
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.idle: dict[str, list[float]] = defaultdict(list)
        self.memory: dict[str, list[int]] = defaultdict(list)

    def times(self, contender: Contender) -> list[float]:
        """What each run took, less what an idle one takes, for the whole of the work."""
        idle = statistics.median(self.idle[contender.name]) if contender.idle else 0.0
        once = statistics.median(self.seconds[contender.once]) * (contender.scale - 1) if contender.once else 0.0
        return [seconds * contender.scale - idle - once for seconds in self.seconds[contender.name]]

    def median(self, contender: Contender) -> float:
        return statistics.median(self.times(contender))

    def ratio(self, contender: Contender) -> float | None:
        """How many times as long as ours it takes; None for ours itself, 0 where ours is lost in the noise."""
        ours = self._ours(contender)
        if ours is None:
            return None
        return self.median(contender) / self.median(ours) if self.median(ours) >= _NOISE else 0.0

    def met(self, contender: Contender) -> bool | None:
        ours, goal = self._ours(contender), contender.goal
        if ours is None or goal is None or not self.ratio(contender):
            return None
        return self.median(ours) <= self.median(contender) * goal.times + goal.plus

    def _ours(self, contender: Contender) -> Contender | None:
        return next((other for other in self.work.contenders if other.name == contender.against), None)


def write(results: list[Result], arguments: argparse.Namespace) -> None:
    table = "\n".join(rows(results))
    print(table)
    if arguments.output is None:
        return
    arguments.output.mkdir(parents=True, exist_ok=True)
    draw(results, arguments.output / "benchmarks.svg")
    quick = "\nSmall sizes and one run: **these figures mean nothing.**\n" if arguments.quick else ""
    page = [
        INTRODUCTION.format(disk=_disk()) + quick,
        "![Seconds by work and contender](benchmarks.svg)",
        "",
        table,
        "",
        *_notes(results),
    ]
    page += ["## The machine", "", *_machine(), ""]
    (arguments.output / "benchmarks.md").write_text("\n".join(page), encoding="utf-8")


def rows(results: list[Result]) -> list[str]:
    lines = [
        "| work | contender | runs | seconds | lowest to highest | times ours | goal | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        title = f"{result.work.title}, {result.kind}"
        for contender in result.work.contenders:
            lines.append(_line(title, result, contender))
            title = ""
    return lines


def _line(title: str, result: Result, contender: Contender) -> str:
    times, ratio, met = result.times(contender), result.ratio(contender), result.met(contender)
    goal = contender.goal.text if contender.goal else ""
    memory, limit = max(result.memory[contender.name], default=None), result.work.memory_limit
    if memory is not None:
        goal += f"{'; ' if goal else ''}{memory / MIB:.0f} MiB of memory"
        if limit is not None:
            goal += f", under {limit // MIB}"
            met = met is not False and memory < limit
    cells = [
        title,
        f"`{contender.name}`" if re.match("virsh|qemu-img|cp ", contender.name) else contender.name,
        f"{len(times)}{f' of a part, times {contender.scale}' if contender.scale > 1 else ''}",
        _seconds(result.median(contender)),
        f"{_seconds(min(times))} to {_seconds(max(times))}",
        "" if ratio is None else f"{ratio:.3g}" if ratio else _LOST,
        goal,
        "met" if met else "**missed**" if met is False else _LOST if contender.goal else "",
    ]
    return f"| {' | '.join(cells)} |"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3f}" if seconds < 10 else f"{seconds:.1f}"


def _notes(results: list[Result]) -> list[str]:
    notes = []
    if any(contender.scale > 1 for result in results for contender in result.work.contenders):
        notes.append(
            "Full copies, as the peers make them of a hundred volumes, are more than the disk holds. They make a part of them,"
            " one after the other, and its time is multiplied, but for the start of the playbook."
        )
    if not virt_volume_version():
        notes.append("`virt_volume` is missing: the collection community.libvirt could not be had.")
    return [line for note in notes for line in (note, "")]


def draw(results: list[Result], path: Path) -> None:
    """A row of marks for each work, on a scale of powers of ten."""
    import matplotlib

    matplotlib.use("Agg")
    # The same figures make the same file.
    matplotlib.rcParams["svg.hashsalt"] = "benchmarks"
    from matplotlib import pyplot

    looks = {
        "ours": ("o", "#0b6e4f"),
        "virsh": ("s", "#c1440e"),
        "virt_volume": ("D", "#8d3b8f"),
        "qemu-img convert -C": ("<", "#3a7ca5"),
        "qemu-img convert": (">", "#1f4e79"),
        "cp": ("^", "#a6861a"),
    }
    figure, axes = pyplot.subplots(figsize=(10, 1.6 + 0.36 * len(results)), layout="constrained")
    for place, result in enumerate(results):
        axes.axhline(place, color="#dddddd", linewidth=0.8, zorder=0)
        for contender in result.work.contenders:
            look = next((look for look in looks if contender.name.removeprefix("shell loop of ").startswith(look)), None)
            if look:
                marker, color = looks[look]
                size = 60 if look == "ours" else 36
                axes.scatter(
                    max(result.median(contender), _NOISE), place, marker=marker, color=color, s=size, alpha=0.85, zorder=2
                )
    for name, (marker, color) in looks.items():
        axes.scatter([], [], marker=marker, color=color, label=name)
    axes.set_yticks(range(len(results)), [f"{result.work.title}, {result.kind}" for result in results], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("seconds")
    axes.grid(axis="x", color="#eeeeee")
    figure.legend(loc="outside upper center", ncols=len(looks), fontsize=8, frameon=False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


# --- where it was measured ------------------------------------------------------------------------------------------------


def _machine() -> list[str]:
    cpu = _first(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) or platform.machine()
    memory = int(_first(r"MemTotal: *(\d+)", Path("/proc/meminfo").read_text()) or 0) / (1 << 20)
    facts = {
        "processor": f"{cpu}, {os.cpu_count()} cores",
        "memory": f"{memory:.0f} GiB",
        "kernel": platform.release(),
        "qemu-img": _version("qemu-img", "--version"),
        "libvirt": _version("libvirtd", "--version"),
        "coreutils": _version("cp", "--version"),
        "mkfs.xfs, mkfs.btrfs, mkfs.ext4": ", ".join(
            (_version("mkfs.xfs", "-V"), _version("mkfs.btrfs", "--version"), _version("mkfs.ext4", "-V"))
        ),
        "ansible-core": _version(str(Path(sys.executable).with_name("ansible")), "--version"),
        "community.libvirt": virt_volume_version() or "none",
        "Python of the module": _version("/usr/bin/python3", "--version"),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "command": " ".join(["tests/tools/bench", *sys.argv[1:]]),
    }
    return ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in facts.items())]


def _version(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return _first(r"(\d+(?:\.\d+)+)", done.stdout + done.stderr) or "unknown"


def _first(pattern: str, text: str) -> str | None:
    found = re.search(pattern, text)
    return found.group(1).strip() if found else None


def _disk() -> str:
    done = subprocess.run(
        ["findmnt", "-no", "FSTYPE", "-T", os.environ["VIRTFORGE_BENCH"]], capture_output=True, text=True, check=False
    )
    return f"whose files are on {done.stdout.strip() or 'the disk of the machine'}"
