# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The module as Ansible runs it: from playbooks, under another Python, with the action group."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import harness
import pytest
import yaml
from harness import MIB, run
from plays import BIN, COLLECTIONS, ansible_playbook, write_play


def play(scratch, tasks, *arguments, python="{{ ansible_playbook_python }}", env=None, **more):
    """Run a playbook; status and output."""
    book = write_play(scratch / "play.yml", tasks, vars={"ansible_python_interpreter": python}, **more)
    return ansible_playbook(*arguments, book, env=env)


def task(**params):
    return {"name": "Clone", "virtforge.libvirt.storage_volume_clone": {key: str(value) for key, value in params.items()}}


def lacks_libvirt(python):
    return subprocess.run([python, "-c", "import libvirt"], capture_output=True, check=False).returncode != 0


def test_another_python_respawns_under_the_systems(libvirt_pool, pool, qcow2, scratch):
    """The interpreter of .venv has no libvirt-python; /usr/bin/python3 has."""
    assert lacks_libvirt(sys.executable)
    tasks = [{**task(pool=libvirt_pool, source="base.qcow2", name="web"), "register": "made"}]
    tasks.append({"name": "Show", "ansible.builtin.debug": {"var": "made"}})
    for changed in (1, 0):
        status, output = play(scratch, tasks)
        assert status == 0, output
        assert f"changed={changed} " in output
        assert "[WARNING]" not in output, output
    assert "web" in harness.virsh("vol-list", libvirt_pool)


def test_without_libvirt_python_anywhere_the_package_is_named(pool, qcow2, scratch):
    hide = ["unshare", "--mount", "sh", "-c", 'mount --bind /dev/null "$1" && shift && exec "$@"', "sh"]
    libvirt = run(harness.PYTHON, "-c", "import libvirt; print(libvirt.__file__)").strip()
    process = harness.start({"pool": "default", "source": "base.qcow2"}, prefix=[*hide, libvirt])
    result = harness.result_of(process)
    assert result["failed"] and result["error_code"] == "MISSING_DEPENDENCY", result
    assert "python3-libvirt" in result["msg"]
    lxml = run(harness.PYTHON, "-c", "import lxml.etree; print(lxml.etree.__file__)").strip()
    xml = "<volume><name>web</name></volume>"
    process = harness.start({"pool": str(pool), "source": "base.qcow2", "xml": xml}, prefix=[*hide, lxml])
    result = harness.result_of(process)
    assert result["failed"] and result["error_code"] == "MISSING_DEPENDENCY", result
    assert "lxml" in result["msg"]
    # A directory pool needs neither.
    process = harness.start({"pool": str(pool), "source": "base.qcow2", "name": "web"}, prefix=[*hide, lxml])
    assert harness.result_of(process)["actions"] == ["created"]


def test_the_action_group_sets_uri_and_pool_once(libvirt_pool, qcow2, scratch):
    defaults = {"group/virtforge.libvirt.all": {"uri": "qemu:///system", "pool": libvirt_pool}}
    status, output = play(scratch, [task(source="base.qcow2", name="web")], module_defaults=defaults)
    assert status == 0 and "changed=1" in output, output
    assert "web" in harness.virsh("vol-list", libvirt_pool)


def test_a_name_wins_over_the_action_groups_pool(pool, scratch):
    """The default must not have a task act on another pool than the one it names."""
    defaults = {"group/virtforge.libvirt.all": {"pool": str(pool / "one")}}
    for name in ("one", "two"):
        (pool / name).mkdir()
    removal = {"name": "Remove", "virtforge.libvirt.storage_pool": {"name": str(pool / "two"), "state": "absent"}}
    look = {"name": "Look", "virtforge.libvirt.storage_pool_info": {"name": str(pool / "three")}, "register": "found"}
    empty = {"name": "None", "ansible.builtin.assert": {"that": "found.pools == []"}}
    status, output = play(scratch, [removal, look, empty], module_defaults=defaults)
    assert status == 0 and "[WARNING]" not in output, output
    assert os.listdir(pool) == ["one"]
    bare = {"name": "Remove", "virtforge.libvirt.storage_pool": {"state": "absent"}}
    assert play(scratch, [bare], module_defaults=defaults)[0] == 0
    assert os.listdir(pool) == []


def test_check_and_diff(pool, qcow2, scratch):
    status, output = play(scratch, [task(pool=pool, source="base.qcow2", name="web", capacity="1GiB")], "--check", "--diff")
    assert status == 0 and "changed=1" in output, output
    assert '+    "capacity": 1073741824' in output and '+    "format": "qcow2"' in output
    assert sorted(os.listdir(pool)) == ["base.qcow2", "base.raw"]


def test_a_failure_is_one_sentence(pool, qcow2, scratch):
    status, output = play(scratch, [task(pool=pool, source="base.qcow2", name="a/b")])
    assert status == 2
    assert '"error_code": "INVALID_ARG"' in output and "a/b" in output


def test_asynchronous(pool, raw, scratch):
    status, output = play(scratch, [{**task(pool=pool, source="base.raw", name="web"), "async": 60, "poll": 1}])
    assert status == 0 and "changed=1" in output, output
    assert (pool / "web").stat().st_size == 64 * MIB


def test_every_old_python_of_a_target(pool, raw, scratch):
    """Those that are on this machine, from 3.8 on."""
    found = {}
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
    for pattern in ("/usr/bin/python3.*", f"{pyenv}/versions/3.*/bin/python3.*"):
        for path in sorted(Path("/").glob(pattern[1:])):
            version = path.name.removeprefix("python3.")
            if version.isdigit() and 8 <= int(version) <= 13:
                found.setdefault(int(version), str(path))
    assert found
    for version, python in found.items():
        status, output = play(
            scratch, [task(pool=pool, source="base.raw", name=f"web{version}.qcow2", format="qcow2")], python=python
        )
        assert status == 0 and "changed=1" in output, output


def test_the_documentation_is_readable():
    environment = {**os.environ, "ANSIBLE_COLLECTIONS_PATH": str(COLLECTIONS)}
    shown = run(BIN / "ansible-doc", "--json", "virtforge.libvirt.storage_volume_clone", env=environment)
    document = json.loads(shown)["virtforge.libvirt.storage_volume_clone"]
    assert set(document["doc"]["options"]) >= {"pool", "source", "source_path", "capacity", "format", "xml", "force", "owner"}
    assert len(yaml.safe_load(document["examples"])) >= 4


@pytest.fixture
def ansible_here(ansible_adhoc):
    """Ansible in this process, which keeps its signals and standard streams from the processes started later."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield ansible_adhoc
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for fd in range(3):
        os.set_inheritable(fd, True)


@pytest.mark.filterwarnings("ignore")
def test_by_pytest_ansible(ansible_here, pool, raw, monkeypatch):
    """One call through pytest-ansible's own fixture: the collection works there too."""
    host = ansible_here(inventory="localhost,", host_pattern="localhost", connection="local")
    monkeypatch.setenv("ANSIBLE_PYTHON_INTERPRETER", sys.executable)
    call = getattr(host.all, "virtforge.libvirt.storage_volume_clone")
    for actions in (["created"], []):
        result = call(pool=str(pool), source="base.raw", name="web").contacted["localhost"]
        assert result["actions"] == actions, result
