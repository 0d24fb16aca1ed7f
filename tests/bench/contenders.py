# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Who competes: each is a command that makes new volumes in a pool, durably, named as a person would name it."""

from __future__ import annotations

import json
import os
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Mapping

import harness
import yaml
from place import POOL, ROOT, Place

PEERS = ROOT / ".venv" / "peers"
MEASURED = Path(__file__).with_name("measured.py")

OURS, OURS_LIBVIRT, OURS_PLAYBOOK = "ours, in a directory", "ours, in a pool of libvirt", "ours, whole playbook"
PING = "a playbook that only pings"
#: Ways to say it that might be the best; which one is differs between machines.
CONVERT_BEST = ("qemu-img convert -W", "qemu-img convert -W -m 16", "qemu-img convert -W -m 16 -t none")


@dataclass(frozen=True)
class Volume:
    """What the contenders of a work are asked for. The ending of the source is its format."""

    source: str
    format: str
    capacity: int

    @property
    def source_format(self) -> str:
        return self.source.rsplit(".", 1)[1]


@dataclass(frozen=True)
class Goal:
    """Ours takes at most ``times`` the time of the one that has this goal, and ``plus`` seconds."""

    text: str
    times: float = 1.0
    plus: float = 0.0


@dataclass
class Contender:
    """``command`` makes the volumes ``makes``, each of them as ``volume`` says.

    :param before: a command that is run once, before anything is measured
    :param idle: a command that finds nothing to do, whose time is taken off
    :param memory: where the command notes how much memory it took at most
    :param runs: at most so many
    :param scale: it makes only this part of the volumes, so its time counts so many times,
    :param once: but for the time of this contender, which it spends on its start
    :param against: which of ours this one is compared with, with ``goal``
    """

    name: str
    command: list[str]
    volume: Volume | None = None
    makes: tuple[str, ...] = ("new",)
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)
    before: list[str] | None = None
    idle: list[str] | None = None
    memory: Path | None = None
    runs: int | None = None
    scale: int = 1
    once: str | None = None
    against: str | None = None
    goal: Goal | None = None


class Makers:
    """Makes the contenders that work in a place."""

    def __init__(self, place: Place, scratch: Path) -> None:
        self.place, self.scratch = place, scratch
        self._environment = harness.environment()
        self._files = 0

    def _path(self, name: str) -> str:
        return str(self.place.pool / name)

    def _file(self, ending: str, text: str) -> str:
        self._files += 1
        file = self.scratch / f"{self.place.kind}-{self._files}.{ending}"
        file.write_text(text)
        return str(file)

    # --- ours -------------------------------------------------------------------------------------------------------------

    def ours(self, volume: Volume, name: str = OURS, pool: str | None = None, **more: Any) -> Contender:
        """The module in a process of its own, as Ansible runs it."""
        memory = self.scratch / "memory"
        params = _params(volume, pool or str(self.place.pool))
        commands = []
        for target in ("new", f"{volume.source}-there"):
            python, *rest = harness.command({**params, "name": target}, diff=False)
            commands.append([python, str(MEASURED), str(memory), *rest])
        run, idle = commands
        return Contender(name, run, volume, environment=self._environment, before=idle, idle=idle, memory=memory, **more)

    def ours_libvirt(self, volume: Volume) -> Contender:
        return self.ours(volume, OURS_LIBVIRT, POOL)

    # --- what a person would type -----------------------------------------------------------------------------------------

    def _shell(
        self, name: str, volume: Volume, *commands: list[str], makes: tuple[str, ...] = ("new",), **more: Any
    ) -> Contender:
        """These commands, and the sync that makes the volumes durable, which none of them sees to."""
        lines = [*(shlex.join(command) for command in commands), shlex.join(["sync", *map(self._path, makes)])]
        more.setdefault("against", OURS)
        return Contender(name, ["sh", "-ec", " && ".join(lines)], volume, makes, **more)

    def virsh_from(self, volume: Volume, **more: Any) -> Contender:
        xml = self._file("xml", volume_xml("new", volume))
        command = ["virsh", "-q", "vol-create-from", POOL, xml, volume.source, "--inputpool", POOL]
        return self._shell("virsh vol-create-from", volume, command, **{"against": OURS_LIBVIRT, **more})

    def virsh_clone(self, volume: Volume, **more: Any) -> Contender:
        command = ["virsh", "-q", "vol-clone", "--pool", POOL, volume.source, "new"]
        return self._shell("virsh vol-clone", volume, command, **{"against": OURS_LIBVIRT, **more})

    def virsh_grown(self, volume: Volume, **more: Any) -> Contender:
        commands = _virsh_grown("new", volume)
        return self._shell("virsh vol-clone, vol-resize", volume, *commands, **{"against": OURS_LIBVIRT, **more})

    def virsh_loop(self, volume: Volume, names: tuple[str, ...], **more: Any) -> Contender:
        commands = [command for name in names for command in _virsh_grown(name, volume)]
        return self._shell("shell loop of virsh vol-clone, vol-resize", volume, *commands, makes=names, **more)

    def convert(self, volume: Volume, name: str = "qemu-img convert", **more: Any) -> Contender:
        """The options stand in the name."""
        images = ["-f", volume.source_format, "-O", volume.format, self._path(volume.source), self._path("new")]
        return self._shell(name, volume, [*name.split(), *images], **more)

    def cp(self, volume: Volume, name: str, **more: Any) -> Contender:
        return self._shell(name, volume, [*name.split(), self._path(volume.source), self._path("new")], **more)

    def cp_grown(self, volume: Volume, **more: Any) -> Contender:
        copy = ["cp", "--reflink=always", self._path(volume.source), self._path("new")]
        grow = ["qemu-img", "resize", "-q", "-f", volume.format, self._path("new"), str(volume.capacity)]
        return self._shell("cp --reflink=always, qemu-img resize", volume, copy, grow, **more)

    # --- playbooks --------------------------------------------------------------------------------------------------------

    def _playbook(
        self, name: str, task: dict[str, Any], volume: Volume | None, makes: tuple[str, ...], **more: Any
    ) -> Contender:
        play = {"hosts": "localhost", "connection": "local", "gather_facts": False, "tasks": [task]}
        program = str(Path(sys.executable).with_name("ansible-playbook"))
        # The Python that has libvirt: ours would find it, which takes a while, and virt_volume would not.
        command = [program, "-e", f"ansible_python_interpreter={harness.PYTHON}", self._file("yml", yaml.safe_dump([play]))]
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.scratch),
            "LC_ALL": "C.UTF-8",
            "ANSIBLE_COLLECTIONS_PATH": f"{ROOT / '.venv' / 'collections'}:{PEERS}",
            "ANSIBLE_LOCALHOST_WARNING": "0",
            "ANSIBLE_INVENTORY_UNPARSED_WARNING": "0",
        }
        return Contender(name, command, volume, makes, environment, **more)

    def our_playbook(self, volume: Volume, names: tuple[str, ...], **more: Any) -> Contender:
        task = {**_params(volume, POOL), "volumes": [{"name": name} for name in names]}
        return self._playbook(OURS_PLAYBOOK, {"virtforge.libvirt.storage_volume_clone": task}, volume, names, **more)

    def our_idle_playbook(self, volume: Volume, pool: str, names: tuple[str, ...]) -> Contender:
        task = {**_params(volume, pool), "source_pool": POOL, "volumes": [{"name": name} for name in names]}
        idle = self._playbook(OURS_PLAYBOOK, {"virtforge.libvirt.storage_volume_clone": task}, volume, ())
        idle.before = idle.command
        return idle

    def ping(self, **more: Any) -> Contender:
        return self._playbook(PING, {"ansible.builtin.ping": {}}, None, (), **more)

    def virt_volume(self, volume: Volume, names: tuple[str, ...], **more: Any) -> Contender:
        """It calls libvirt, and so needs a sync too."""
        parameters = {"command": "create", "pool": POOL, "clone_source": volume.source, "xml": volume_xml("{{ item }}", volume)}
        task = {"community.libvirt.virt_volume": parameters, "loop": list(names)}
        name = "virt_volume, whole playbook" if len(names) == 1 else "virt_volume in a loop, whole playbook"
        played = self._playbook(name, task, volume, names, against=OURS_PLAYBOOK, **more)
        sync = shlex.join(["sync", *map(self._path, names)])
        played.command = ["sh", "-ec", f"{shlex.join(played.command)} && {sync}"]
        return played


def virt_volume_version() -> str | None:
    """Of the collection community.libvirt; None where it could not be had."""
    manifest = PEERS / "ansible_collections" / "community" / "libvirt" / "MANIFEST.json"
    return str(json.loads(manifest.read_text())["collection_info"]["version"]) if manifest.exists() else None


def volume_xml(name: str, volume: Volume) -> str:
    """``allocation``: without it libvirt would reserve all blocks. ``compat``: without it qcow2 would be the old version 2."""
    compat = "<compat>1.1</compat>" if volume.format == "qcow2" else ""
    return (
        f"<volume><name>{name}</name><capacity unit='bytes'>{volume.capacity}</capacity><allocation>0</allocation>"
        f"<target><format type='{volume.format}'/>{compat}</target></volume>"
    )


def _params(volume: Volume, pool: str) -> dict[str, Any]:
    return {"pool": pool, "source": volume.source, "format": volume.format, "capacity": str(volume.capacity)}


def _virsh_grown(name: str, volume: Volume) -> list[list[str]]:
    clone = ["virsh", "-q", "vol-clone", "--pool", POOL, volume.source, name]
    return [clone, ["virsh", "-q", "vol-resize", "--pool", POOL, name, str(volume.capacity)]]
