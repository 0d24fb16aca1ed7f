# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Playbooks, run as a person runs them: by ansible-playbook, as root or as another user."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import yaml
from ansible_collections.virtforge.libvirt.plugins.modules import storage_volume_clone
from harness import ROOT

BIN = Path(sys.executable).parent
COLLECTIONS = ROOT / ".venv" / "collections"
RECAP = re.compile(r"^\S+ +: ok=(\d+) +changed=(\d+) +unreachable=0 +failed=(\d+) ", re.MULTILINE)
#: what any play on this machine needs, whoever runs it
LOCAL = {
    "ANSIBLE_NOCOLOR": "1",
    "ANSIBLE_STDOUT_CALLBACK": "ansible.builtin.default",
    "ANSIBLE_LOCALHOST_WARNING": "0",
    "ANSIBLE_INVENTORY_UNPARSED_WARNING": "0",
    "ANSIBLE_DEPRECATION_WARNINGS": "1",
}


#: pools of devices that the examples in the documentation speak of: a volume group, LUNs, the partitions of a disk
DEVICE_POOLS = ("vg0", "luns", "sdb")


def on_devices(tasks):
    """Whether any of the tasks names a pool of devices, which only some tests have: those run it by :func:`device_examples`."""
    stated = [options for task in tasks for options in task.values() if isinstance(options, dict)]
    return any(options.get(key) in DEVICE_POOLS for options in stated for key in ("pool", "source_pool"))


def device_examples(pool, **names):
    """The examples of a guide and of a module that name this pool of devices, in order: module and options.

    :param names: what stands in the options for what it is here, ``images`` for the directories of images
    """
    page = (ROOT / "docs" / "block_and_network_pools.md").read_text()
    examples = []
    for text in [*re.findall("^```yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL), storage_volume_clone.EXAMPLES]:
        for old in ("/srv/images", "/var/lib/libvirt/images"):
            text = text.replace(old, str(names["images"]))
        for task in yaml.safe_load(text):
            for name, options in task.items():
                if name.startswith("virtforge.libvirt.") and pool in (options.get("pool"), options.get("source_pool")):
                    # The sizes are those of a person's machine.
                    here = {key: names.get(str(value), value) for key, value in options.items()}
                    if "capacity" in here:
                        here["capacity"] = here["capacity"].replace("GiB", "MiB")
                    examples.append((name.rpartition(".")[2], here))
    assert examples, pool
    return examples


class User:
    """Somebody without root, with a home and a runtime directory in ``place``, who sees this checkout by a path of his own.

    The checkout and its Python may lie where only root may look; ``unshare`` gave this process mounts of its own, so both are
    mounted once more where everybody may.
    """

    name = "games"

    def __init__(self, place: Path) -> None:
        self.home, self.runtime, self.checkout = place / "home", place / "run", place / "checkout"
        for directory in (self.home, self.runtime, self.checkout):
            directory.mkdir(mode=0o700)
            subprocess.run(["chown", f"{self.name}:{self.name}", str(directory)], check=True)
        subprocess.run(["mount", "--bind", str(ROOT), str(self.checkout)], check=True)
        namespace = place / "collections" / "ansible_collections" / "virtforge"
        namespace.mkdir(parents=True)
        (namespace / "libvirt").symlink_to(self.checkout)
        self.bin = self.checkout / ".venv" / "bin"
        self.environment = {
            "PATH": f"{self.bin}:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(self.home),
            "XDG_RUNTIME_DIR": str(self.runtime),
            "ANSIBLE_REMOTE_TMP": str(self.home / "tmp"),
            "LC_ALL": "C.UTF-8",
            "ANSIBLE_COLLECTIONS_PATH": str(place / "collections"),
            **LOCAL,
        }
        self.prefix = ["setpriv", "--reuid", self.name, "--regid", self.name, "--clear-groups", "--no-new-privs"]

    def run(self, *arguments):
        command = [
            *self.prefix,
            "env",
            "-i",
            *(f"{key}={value}" for key, value in self.environment.items()),
            *map(str, arguments),
        ]
        return subprocess.run(
            command, cwd=self.home, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=300
        )

    def end(self) -> None:
        subprocess.run(["umount", "-l", str(self.checkout)], check=False)


def ansible_playbook(*arguments, user=None, env=None, prefix=()):
    """Status and output of one run, which must not end in a traceback."""
    if user is not None:
        done = user.run(user.bin / "python", user.bin / "ansible-playbook", *arguments)
    else:
        environment = {**os.environ, "ANSIBLE_COLLECTIONS_PATH": str(COLLECTIONS), **LOCAL, **(env or {})}
        command = [*prefix, str(BIN / "ansible-playbook"), *map(str, arguments)]
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=300
        )
    output = done.stdout + done.stderr
    assert "Traceback" not in output, output
    return done.returncode, output


def write_play(path, tasks, **more):
    """A playbook for this host in a file."""
    play = {"name": "Test", "hosts": "localhost", "connection": "local", "gather_facts": False, "tasks": tasks, **more}
    path.write_text(yaml.safe_dump([play]))
    return path


#: The Python that has libvirt. Others find it too, which costs a second for each item of a loop.
SYSTEM_PYTHON = ["-e", "ansible_python_interpreter=/usr/bin/python3"]


def variables(**values):
    """Extra variables as arguments."""
    return ["-e", json.dumps(values, default=str)]


def counts(output):
    """Number of tasks that changed something, by the recap, of a run in which none failed."""
    ok, changed, failed = map(int, RECAP.search(output).groups())
    assert ok and not failed, output
    return changed


def settle(*arguments, check_again=False, allow_warnings=False, **options):
    """Check run, run, second run: what the first predicts the run does, and then nothing is left to do, for a check run either.

    Returns the number of changes.
    """
    changed = []
    for mode in (["--check"], [], [], *([["--check"]] if check_again else [])):
        status, output = ansible_playbook(*arguments, *mode, **options)
        assert status == 0, output
        # A check run on a bare host says what it takes for granted.
        assert mode or allow_warnings or "[WARNING]" not in output, output
        assert "[DEPRECATION" not in output, output
        changed.append(counts(output))
    assert changed[0] == changed[1] and not any(changed[2:]), changed
    return changed[1]
