# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Every example in the documentation, as it stands, on a host that has what the examples speak of."""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import re
import shlex
import shutil
from pathlib import Path

import harness
import pytest
import web
import yaml
from ansible_collections.virtforge.libvirt.plugins.module_utils._images.gate import CHECKS
from harness import GIB, MIB, ROOT, run, virsh
from plays import BIN, COLLECTIONS, ansible_playbook, counts, on_devices, write_play
from test_rbd import Pool as CephPool

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
GUIDES = sorted(path.name for path in (ROOT / "docs").glob("*.md"))
#: pages without examples: an index, and what is written by programs; that of the fleet needs a Ceph, and is in test_rbd.py
TABLES = ("README.md", "benchmarks.md", "ceph_fleet.md", "fuzzing.md", "pools.md", "second_run.md", "security.md")
MODULES = sorted(path.stem for path in (ROOT / "plugins" / "modules").glob("*.py"))


@pytest.fixture
def host(libvirtd, example_names, gluster, ceph, hypervisor, file_systems, scratch, certificates, monkeypatch):
    """What the examples find: pools, images, devices, servers, another hypervisor, and an inventory with "hypervisors"."""
    place = file_systems["xfs"] / "examples"
    for name in ("srv", "home", "var/lib/libvirt/images"):
        (place / name).mkdir(parents=True)
        Path("/", name).mkdir(parents=True, exist_ok=True)
        run("mount", "--bind", place / name, f"/{name}")

    golden = place / "golden.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", golden, "2G")
    run("qemu-io", "-c", "write -P 5 0 1M", golden)
    for pool in ("default", "isos", "fast", "images"):
        target = Path("/var/lib/libvirt/images") if pool == "default" else Path("/srv") / pool
        target.mkdir(exist_ok=True)
        virsh("pool-define-as", pool, "dir", "--target", target)
        virsh("pool-start", pool)
    for path in ("/var/lib/libvirt/images/debian-13.qcow2", "/var/lib/libvirt/images/base.qcow2", "/srv/images/base.qcow2"):
        shutil.copy(golden, path)
    Path("/home/anna").mkdir()
    shutil.copy(golden, "/home/anna/debian-13.qcow2")
    harness.make_raw("/home/anna/netinst.iso", 4 * MIB, ((0, 1),))
    Path("/home/anna/.ssh").mkdir()
    shutil.copy(hypervisor.srv.parents[1] / "id", "/home/anna/.ssh/kvm2")

    cloud = place / "cloud" / "trixie"
    cloud.mkdir(parents=True)
    packed = cloud / "debian-13.qcow2.xz"
    packed.write_bytes(lzma.compress(golden.read_bytes(), preset=0))
    (cloud / "SHA256SUMS").write_text(f"{hashlib.sha256(packed.read_bytes()).hexdigest()} *{packed.name}\n")
    server = web.Web(cloud.parent, certificates.context(), ("127.0.0.1", 443))
    # As if the certificate authority of the tests was one that everybody trusts.
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates.ca))

    devices = {name: Device(scratch, name) for name in ("/dev/vg0/web1", "/dev/disk/by-id/virtio-vms")}
    inventory = scratch / "hosts.yml"
    here = {"ansible_connection": "local", "ansible_python_interpreter": harness.PYTHON}
    inventory.write_text(yaml.safe_dump({"hypervisors": {"hosts": {"localhost": {**here, "ceph_key": ceph.key}}}}))
    in_ceph = CephPool(ceph, scratch, ceph.pool, name="ceph")
    yield inventory
    in_ceph.empty()
    in_ceph.end()
    server.end()
    for uri in ("qemu:///system", hypervisor.uri):
        for pool in virsh("pool-list", "--all", "--name", uri=uri).split():
            harness.virsh_status("pool-destroy", pool, uri=uri)
            harness.virsh_status("pool-undefine", pool, uri=uri)
    for device in devices.values():
        device.end()
    for name in ("/srv", "/home", "/var/lib/libvirt/images"):
        run("umount", "-R", "-l", name)
    shutil.rmtree(place)


class Device:
    """An empty block device of 400 MiB under a name of its own in /dev."""

    def __init__(self, scratch, name):
        self.link, self.image = Path(name), scratch / f"{os.path.basename(name)}.img"
        if self.link.is_symlink() and os.readlink(self.link).startswith("/dev/loop"):
            # Left by a run that was killed: /dev is the machine's own.
            self.link.unlink()
        self.made = [place for place in self.link.parents if not place.exists()]
        self.link.parent.mkdir(parents=True, exist_ok=True)
        with open(self.image, "wb") as file:
            file.truncate(400 * MIB)
        self.device = run("losetup", "-f", "--show", self.image).strip()
        self.link.symlink_to(self.device)

    def end(self):
        self.link.unlink()
        for place in self.made:
            place.rmdir()
        run("losetup", "-d", self.device)
        self.image.unlink()


def blocks(page):
    return BLOCK.findall((ROOT / "docs" / page).read_text())


@pytest.mark.parametrize("page", [page for page in GUIDES if page not in TABLES])
def test_the_examples_of_a_guide(page, host, scratch):
    """Plays and tasks in check mode, for real, and a second time; commands once."""
    done = 0
    for language, text in blocks(page):
        if language == "console":
            for line in text.splitlines():
                program, *arguments = shlex.split(line)
                assert program == "ansible-playbook", line
                status, output = ansible_playbook("-i", host, *arguments)
                assert status == 0 and "[WARNING]" not in output, output
                done += 1
        if language == "yaml":
            document = yaml.safe_load(text)
            if on_devices(document):
                continue
            book = scratch / "example.yml"
            if "hosts" in document[0]:
                book.write_text(text)
            else:
                write_play(book, document, vars={"ansible_python_interpreter": harness.PYTHON})
            changed = []
            for mode in (["--check"], [], []):
                status, output = ansible_playbook("-i", host, *mode, book)
                assert status == 0, output
                assert mode or "[WARNING]" not in output, output
                changed.append(counts(output))
            assert changed[0] == changed[1] and changed[2] == 0, (text, changed)
            done += 1
        if language == "json":
            json.loads(text)
    assert done


@pytest.mark.parametrize("module", MODULES)
def test_the_examples_of_a_module(module, host, scratch):
    """Each task in check mode, for real, and a second time. That with a volume group is in vm/test_vm_pool.py."""
    examples = [task for task in yaml.safe_load(documented("module", module)["examples"]) if not on_devices([task])]
    examples = [task for task in examples if (task.get(f"virtforge.libvirt.{module}") or {}).get("type") != "logical"]
    tasks = []
    for number, task in enumerate(examples):
        if f"virtforge.libvirt.{module}" not in task:
            tasks.append(task)
            continue
        rounds = (f"predicted{number}", f"done{number}", task.get("register", f"again{number}"))
        for name in rounds:
            tasks.append({**task, "check_mode": name == rounds[0], "register": name})
        told_the_truth = f"({rounds[0]} is changed) == ({rounds[1]} is changed)"
        look = {"that": [told_the_truth, f"{rounds[2]} is not changed"]}
        tasks.append({"name": f"Look at {task['name']}", "ansible.builtin.assert": look})
    book = write_play(scratch / "examples.yml", tasks, vars={"ansible_python_interpreter": harness.PYTHON})
    status, output = ansible_playbook("-i", host, book)
    assert status == 0, output
    assert len(examples) >= 2


def test_the_example_of_the_filter(scratch):
    (task,) = yaml.safe_load(documented("filter", "entry_problems")["examples"])
    status, output = ansible_playbook(write_play(scratch / "filter.yml", [task]))
    assert status == 0, output
    task["vars"]["my_pools"][0]["kind"] = "dir"
    status, output = ansible_playbook(write_play(scratch / "filter.yml", [task]))
    assert status == 2 and "my_pools[0] ('images'): unknown key kind" in output.replace("\\'", "'"), output


def documented(kind, name):
    environment = {**os.environ, "ANSIBLE_COLLECTIONS_PATH": str(COLLECTIONS)}
    shown = run(BIN / "ansible-doc", "--json", "-t", kind, f"virtforge.libvirt.{name}", env=environment)
    return json.loads(shown)[f"virtforge.libvirt.{name}"]


@pytest.mark.parametrize("module", MODULES)
def test_the_reference_page_of_a_module_has_every_option(module):
    page = (ROOT / "docs" / "reference" / f"{module}_module.rst").read_text()
    document = documented("module", module)
    for option in document["doc"]["options"]:
        assert f'id="parameter-{option}"' in page, f"make docs: {option} is missing"
    for text in document["examples"].splitlines():
        assert text.strip() in page, f"make docs: {text!r} is missing"


def test_the_table_of_pools_is_what_the_code_decides():
    run(
        BIN / "python",
        "-c",
        "import sys, capabilities; sys.exit(capabilities.PAGE.read_text() != capabilities.page())",
        env={**os.environ, "PYTHONPATH": f"{COLLECTIONS}:{ROOT / 'tests' / 'tools'}"},
    )


def test_the_page_on_security_has_every_check_and_names_tests_that_exist():
    page = (ROOT / "docs" / "security.md").read_text()
    rows = [f"| `{name}` | `{check.code}` | {check.refuses} |" for name, check in CHECKS.items()]
    assert re.findall(r"^\| `[a-z0-9_]+` \| `[A-Z_]+` \|.*$", page, re.MULTILINE) == rows
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", page):
        assert f"def {name}(" in tests, name


def test_every_page_is_linked():
    overview = (ROOT / "docs" / "README.md").read_text()
    for path in (ROOT / "docs").rglob("*"):
        if path.suffix in (".md", ".rst") and path.name != "README.md":
            assert f"({path.relative_to(ROOT / 'docs')})" in overview, path


def test_links_between_pages_lead_somewhere():
    for page in GUIDES:
        for target in re.findall(r"\]\(([^)#]+)", (ROOT / "docs" / page).read_text()):
            assert (ROOT / "docs" / target).is_file(), (page, target)


def test_the_forms_for_awx_ask_for_variables_that_the_playbooks_have(host):
    """A survey's answers as AWX sends them, by ansible-runner; no warning and no deprecation in any event."""
    import ansible_runner

    (host.parent / "runner").mkdir()
    forms = [json.loads(text) for language, text in blocks("playbooks.md") if language == "json"]
    answers = {question["variable"]: question["default"] for question in forms[0]["spec"]}
    answers["capacity"] = "40GiB"
    fan = {question["variable"]: question["default"] for question in forms[1]}
    fan["names"] = ""
    safe = forms[2]
    assert set(safe["choices"]) == {"true", "false"}
    for playbook, more, expected in (
        ("clone_volumes", {}, 1),
        ("clone_volumes", {}, 0),
        ("golden_image_fanout", fan, 1),
        ("golden_image_fanout", fan, 0),
        ("teardown", {safe["variable"]: "false"}, 1),
        ("teardown", {safe["variable"]: "false"}, 0),
    ):
        job = ansible_runner.run(
            private_data_dir=str(host.parent / "runner"),
            playbook=f"virtforge.libvirt.{playbook}",
            inventory=str(host),
            extravars={**answers, **more},
            envvars={
                "ANSIBLE_COLLECTIONS_PATH": str(COLLECTIONS),
                "ANSIBLE_NOCOLOR": "1",
                "PATH": f"{BIN}:{os.environ['PATH']}",
            },
            quiet=True,
        )
        events = list(job.events)
        assert job.status == "successful", [event["stdout"] for event in events]
        assert sum(job.stats["changed"].values()) == expected, job.stats
        for event in events:
            assert event["event"] not in ("warning", "deprecated", "error"), event
            assert "WARNING" not in event["stdout"] and "DEPRECATION" not in event["stdout"], event["stdout"]
            result = event.get("event_data", {}).get("res", {})
            assert not result.get("warnings") and not result.get("deprecations"), result
        if (playbook, expected) == ("clone_volumes", 1):
            images = Path("/var/lib/libvirt/images")
            assert harness.info(images / "web2.qcow2", "qcow2")["virtual-size"] == 40 * GIB
        if (playbook, expected) == ("golden_image_fanout", 1):
            assert harness.info(images / "class20.qcow2", "qcow2")["backing-filename"] == str(images / "debian-13.qcow2")
