# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The edge to Ansible, shared by all modules: the only file here that knows AnsibleModule."""

from __future__ import annotations

import importlib.util
import os
import typing as t

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.common.respawn import has_respawned, probe_interpreters_for_module, respawn_module

from ._errors import CloneError, from_os_error

# Where distributions put the Python that their own packages are for, as in ansible.builtin.dnf and apt.
_SYSTEM_PYTHONS = ("/usr/libexec/platform-python", "/usr/bin/python3", "/usr/bin/python")


class Module(AnsibleModule):
    """An AnsibleModule every failure of which carries an ``error_code``, those of the argument spec too."""

    def fail_json(self, msg: str, **kwargs: t.Any) -> t.NoReturn:  # type: ignore[misc]  # the super call ends it
        kwargs.setdefault("error_code", "INVALID_ARG")
        super().fail_json(msg, **kwargs)


def run(module: Module, work: t.Callable[[t.Mapping[str, t.Any], bool], t.Dict[str, t.Any]]) -> None:
    """Have ``work`` done with the parameters and in check mode or not, and exit with what it returns or refuses."""
    try:
        outcome = work(module.params, module.check_mode)
    except CloneError as exc:
        module.fail_json(exc.msg, error_code=exc.code)
    except OSError as exc:
        error = from_os_error(exc, f"a system call on {exc.filename!r}" if exc.filename else "a system call")
        module.fail_json(error.msg, error_code=error.code)
    for warning in outcome.pop("warnings", ()):
        module.warn(warning)
    if outcome.get("failed"):
        module.fail_json(**outcome)
    module.exit_json(**outcome)


def respawn_for_pools(pools: t.Sequence[t.Optional[str]], xml: bool) -> None:
    """Go on under a Python that has what the pools, and XML where a task states some, need: a directory needs nothing."""
    if any(pool and not pool.startswith("/") for pool in pools):
        respawn_where_found(["libvirt", "lxml.etree"])
    elif xml:
        respawn_where_found(["lxml.etree"])


def respawn_where_found(packages: t.Sequence[str]) -> None:
    """Go on under the system's Python if this one lacks a package and that one has them all.

    Where none has them, nothing happens here: the code that needs a package says which is missing.
    """
    if has_respawned() or all(_importable(package) for package in packages):
        return
    others = [path for path in _SYSTEM_PYTHONS if os.path.exists(path)]
    # The probe runs "import NAME", so one call asks for all of them.
    interpreter = probe_interpreters_for_module(others, ", ".join(packages))
    if interpreter:
        respawn_module(interpreter)


def _importable(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        # A parent of a dotted name is missing.
        return False
