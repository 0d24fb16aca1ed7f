# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The benchmark. Run it by tests/tools/bench, which gives it namespaces and a directory of its own.

All contenders of a work take turns, so that a slow minute of the machine is everybody's.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import harness
import place as places
import report
from contenders import Contender, Makers, Volume
from place import BELOW, POOL, ROOT, Place
from report import Result
from works import ROWS, Work


def main() -> None:
    arguments = parse()
    scratch = Path(os.environ["VIRTFORGE_BENCH"])
    scratch.chmod(0o755)
    sizes = places.QUICK if arguments.quick else places.FULL
    free = os.statvfs(scratch).f_bavail * os.statvfs(scratch).f_frsize
    if free < sizes.disk:
        sys.exit(
            f"{scratch.parent} has {free >> 30} GiB free, and the benchmark takes up to {sizes.disk >> 30}; TMPDIR says where"
        )
    places.provide_library(scratch)
    results: list[Result] = []
    with places.libvirtd(scratch):
        for kind in ("xfs", "btrfs", "ext4"):
            rows = [row for row in arguments.rows if kind in (ROWS[row][0][:1] if arguments.quick else ROWS[row][0])]
            if not rows:
                continue
            with places.opened(scratch, kind, sizes) as place:
                makers = Makers(place, scratch)
                for row in rows:
                    results += [measure(work, place, arguments.runs) for work in ROWS[row][1](makers, sizes)]
    results.sort(key=lambda result: list(ROWS).index(result.work.row))
    report.write(results, arguments)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tests/tools/bench", description="Measure clones side by side with what they replace."
    )
    parser.add_argument("--rows", help=f"only these, with commas between: {' '.join(ROWS)}")
    parser.add_argument("--runs", type=int, help="runs of each contender (9); slow ones have fewer")
    parser.add_argument("--quick", action="store_true", help="small sizes, one run: shows that it works, measures nothing")
    parser.add_argument(
        "--output", type=Path, help="directory for benchmarks.md and benchmarks.svg (docs, for all rows at full size)"
    )
    arguments = parser.parse_args()
    if arguments.output is None and not arguments.quick and not arguments.rows:
        arguments.output = ROOT / "docs"
    arguments.runs = arguments.runs or (1 if arguments.quick else 9)
    arguments.rows = arguments.rows.split(",") if arguments.rows else list(ROWS)
    unknown = [row for row in arguments.rows if row not in ROWS]
    if unknown:
        parser.error(f"there is no row {' '.join(unknown)}")
    return arguments


def measure(work: Work, place: Place, runs: int) -> Result:
    print(f"== {work.title}, {place.kind}", flush=True)
    result = Result(work, place.kind)
    volumes = [contender.volume for contender in work.contenders if contender.volume]
    for volume in volumes:
        place.source(volume.source)
    sources = {place.pool / name for volume in volumes for name in (volume.source, *BELOW.get(volume.source, ()))}
    for contender in work.contenders:
        if contender.before:
            timed(contender, contender.before)
    for number in range(runs):
        turn = number % len(work.contenders)
        for contender in (*work.contenders[turn:], *work.contenders[:turn]):
            if number >= (contender.runs or runs):
                continue
            if contender.idle:
                place.settle(sources)
                result.idle[contender.name].append(timed(contender, contender.idle))
            place.settle(sources)
            result.seconds[contender.name].append(timed(contender, contender.command))
            if contender.memory:
                result.memory[contender.name].append(int(contender.memory.read_text()) << 10)
            if number == 0 and contender.volume:
                verify(contender, contender.volume, place)
            for name in contender.makes:
                (place.pool / name).unlink()
            harness.virsh("pool-refresh", POOL)
    place.clear()
    for contender in work.contenders:
        print(f"   {result.median(contender):9.4f} s  {contender.name}", flush=True)
    return result


def timed(contender: Contender, command: list[str]) -> float:
    """Seconds that the command takes."""
    started = time.perf_counter()
    done = subprocess.run(
        command, env=contender.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - started
    if done.returncode:
        sys.exit(f"{contender.name} failed ({done.returncode}): {' '.join(command)[:2000]}\n{done.stdout}{done.stderr}")
    if command == contender.idle and command != contender.before and '"changed": false' not in done.stdout:
        sys.exit(f"{contender.name} had something to do: {done.stdout}")
    return seconds


def verify(contender: Contender, volume: Volume, place: Place) -> None:
    """All contenders owe the same. Of many volumes two are read: each would come from the disk."""
    for name in contender.makes:
        capacity = harness.info(place.pool / name, volume.format)["virtual-size"]
        if capacity != volume.capacity:
            sys.exit(f"{contender.name} made a volume of {capacity} bytes, asked for were {volume.capacity}")
    for name in {*contender.makes[:1], *contender.makes[-1:]}:
        if not harness.same_content(place.pool / volume.source, volume.source_format, place.pool / name, volume.format):
            sys.exit(f"{contender.name} made a volume that is not what its source is")


main()
