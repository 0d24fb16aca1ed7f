# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""usage: run_ansible_test.py [sanity] [units] [integration]

Runs ansible-test on a copy of what git would commit: it works only in a real directory ansible_collections/NAMESPACE/NAME, and
tests nothing, silently, where that holds links.
"""

from __future__ import annotations

import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OUTPUT = ROOT / ".venv" / "ansible-test"
COPY = OUTPUT / "stage" / "ansible_collections" / "virtforge" / "libvirt"
HOME = OUTPUT / "home"
PYTHONS = OUTPUT / "python"

# Those that modules run on; ansible-test sorts out which of them its own version knows.
VERSIONS = ("3.8", "3.9", "3.10", "3.11", "3.12", "3.13")

# ansible-test fetches a script that installs pip from a host of its own, which many networks do not reach. This one does the
# same with a wheel from the configured index.
GET_PIP = """import sys
sys.path.insert(0, {wheel!r})
from pip._internal.cli.main import main
sys.exit(main(["install"] + [argument for argument in sys.argv[1:] if argument not in ("--no-setuptools", "--no-wheel")]))
"""


def stage() -> int:
    """Copy the collection; number of files."""
    shutil.rmtree(COPY, ignore_errors=True)
    listed = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT).decode().split("\0")
    files = [name for name in listed if name and (ROOT / name).is_file()]
    for name in files:
        (COPY / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, COPY / name)
    # It asks git for the files.
    subprocess.run(["git", "init", "-q"], cwd=COPY, check=True)
    subprocess.run(["git", "add", "-A"], cwd=COPY, check=True)
    return len(files)


def provide_pip() -> None:
    from ansible_test._internal import python_requirements

    found = re.search(r"pip='([0-9.]+)'", inspect.getsource(python_requirements))
    if found is None:
        sys.exit("This ansible-test does not say which pip it wants.")
    cache = HOME / ".ansible" / "test" / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    version = found.group(1)
    if not list(cache.glob(f"pip-{version}-*.whl")):
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", str(cache), f"pip=={version}"]
        subprocess.run(command, check=True)
    wheel = next(cache.glob(f"pip-{version}-*.whl"))
    script = cache / f"get_pip_{version.replace('.', '_')}.py"
    script.write_text(GET_PIP.format(wheel=str(wheel)), encoding="utf-8")


def provide_pythons() -> list[str]:
    """Link the interpreter of each version that really runs; a pyenv shim of a version that is not chosen does not."""
    PYTHONS.mkdir(parents=True, exist_ok=True)
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
    found = []
    for version in VERSIONS:
        candidates = [shutil.which(f"python{version}"), *pyenv.glob(f"versions/{version}.*/bin/python{version}")]
        for candidate in filter(None, candidates):
            ask = [str(candidate), "-c", "import venv, ensurepip, sys; print(sys.executable)"]
            answer = subprocess.run(ask, capture_output=True, text=True, check=False)
            if answer.returncode == 0:
                link = PYTHONS / f"python{version}"
                link.unlink(missing_ok=True)
                link.symlink_to(answer.stdout.strip())
                found.append(version)
                break
    return found


def run(arguments: list[str]) -> str:
    """Output of an ansible-test that succeeded; it is shown where it did not."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("ANSIBLE_", "PYTHON"))}
    environment.update(HOME=str(HOME), PATH=f"{ROOT / '.venv' / 'bin'}:{PYTHONS}:{os.environ['PATH']}", ANSIBLE_NOCOLOR="1")
    log = OUTPUT / f"ansible-test-{arguments[0]}.log"
    with open(log, "a", encoding="utf-8") as output:
        print("+ ansible-test", *arguments, file=output, flush=True)
        status = subprocess.run(
            ["ansible-test", *arguments],
            cwd=COPY,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            check=False,
        ).returncode
    text = log.read_text(encoding="utf-8")
    text = text[text.rindex("+ ansible-test") :]
    if status:
        told = [line for line in text.splitlines() if line.startswith(("ERROR", "FATAL", "E  ", "FAILED", "fatal"))]
        sys.exit(
            "\n".join([*told, *text.splitlines()[-30:], f"ansible-test {' '.join(arguments)} failed ({status}), see {log}"])
        )
    return text


def sanity(versions: list[str]) -> None:
    text = run(["sanity", "--color", "no"])
    for test in ("validate-modules", "import", "compile", "pep8", "pylint"):
        if f'sanity test "{test}"' not in text:
            sys.exit(f"{text}\nansible-test sanity did not run {test}")
    skipped = [version for version in versions if f'"compile" on Python {version}' not in text]
    if skipped:
        sys.exit(f"{text}\nansible-test sanity left out Python {', '.join(skipped)}")
    print(f"ansible-test sanity: passed with Python {', '.join(versions)}, no ignore file")


def units(versions: list[str]) -> None:
    for version in sorted({versions[0], "3.11"} & set(versions)):
        text = run(["units", "--venv", "--python", version, "--requirements", "--color", "no"])
        passed = sum(int(number) for number in re.findall(r"(\d+) passed", text))
        if passed < 500 or "skipped" in text:
            sys.exit(f"{text}\nansible-test units ran only {passed} tests with Python {version}, or skipped some")
        print(f"ansible-test units: {passed} passed with Python {version}")


def integration(versions: list[str]) -> None:
    version = "3.11" if "3.11" in versions else versions[-1]
    text = run(["integration", "--local", "--python", version, "--color", "no", "storage_volume_clone"])
    if "Running storage_volume_clone integration test role" not in text or "failed=0" not in text:
        sys.exit(f"{text}\nansible-test integration did not run its target")
    print(f"ansible-test integration: storage_volume_clone passed with Python {version}")


def main() -> None:
    OUTPUT.mkdir(parents=True, exist_ok=True)
    print(f"== ansible-test {' '.join(sys.argv[1:])}, on a copy of {stage()} files", flush=True)
    provide_pip()
    versions = provide_pythons()
    for command in sys.argv[1:]:
        {"sanity": sanity, "units": units, "integration": integration}[command](versions)


main()
