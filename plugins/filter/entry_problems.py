# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What is wrong with the entries of the role's lists, told before anything is changed."""

from __future__ import annotations

DOCUMENTATION = r"""
name: entry_problems
short_description: Find mistakes in lists of pools, volumes and clones
version_added: 0.1.0
author:
  - The virtforge.libvirt authors (@virtforge)
description:
  - Holds each entry of a list against the options of the module that it is meant for, without looking at any host.
  - The role P(virtforge.libvirt.storage#role) uses it to fail before its first change.
options:
  _input:
    description: The entries.
    type: list
    elements: dict
    required: true
  module:
    description: The module that takes the entries.
    type: str
    choices: [storage_pool, storage_volume, storage_volume_clone]
    required: true
  list_name:
    description: What the messages call the list.
    type: str
    required: true
  safe_mode:
    description: Whether an entry that could destroy something is a problem, one with C(force) or C(state=absent).
    type: bool
    default: false
"""

EXAMPLES = r"""
---
- name: Fail before anything is changed
  ansible.builtin.assert:
    that: problems | length == 0
    fail_msg: "{{ problems | join('; ') }}"
  vars:
    problems: "{{ my_pools | virtforge.libvirt.entry_problems('storage_pool', 'my_pools') }}"
    my_pools:
      - name: images
        type: dir
        target_path: /srv/images
"""

RETURN = r"""
_value:
  description: One sentence for each problem, that names the entry and the key.
  type: list
  elements: str
"""

import difflib
import typing as t

from ansible.errors import AnsibleFilterError
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator

from ..module_utils._errors import CloneError
from ..modules import storage_pool, storage_volume, storage_volume_clone

if t.TYPE_CHECKING:  # pragma: no cover
    from types import ModuleType

Entry = t.Mapping[str, t.Any]


def entry_problems(entries: t.Any, module: str, list_name: str, safe_mode: bool = False) -> t.List[str]:
    """Sentences that name the entry and the key."""
    modules: t.Dict[str, t.Tuple[ModuleType, t.Callable[[Entry], object]]] = {
        "storage_pool": (storage_pool, lambda entry: storage_pool.check(entry, on_host=False)),
        "storage_volume": (storage_volume, lambda entry: storage_volume.check(entry, on_host=False)),
        "storage_volume_clone": (storage_volume_clone, lambda entry: storage_volume_clone.check(entry, on_host=False)),
    }
    if module not in modules:
        raise AnsibleFilterError(f"module: {module!r} is none of {', '.join(modules)}")
    code, semantics = modules[module]
    problems: t.List[str] = []
    seen: t.Dict[t.Tuple[str, ...], str] = {}
    for number, entry in enumerate(entries):
        if not isinstance(entry, t.Mapping):
            problems.append(f"{list_name}[{number}]: {entry!r} is not a dictionary")
            continue
        called = entry.get("name") or entry.get("volume") or (module == "storage_pool" and entry.get("pool"))
        what = f"{list_name}[{number}]" + (f" ({str(called)!r})" if called else "")
        found = _problems(entry, code, semantics, safe_mode)
        problems += [f"{what}: {problem}" for problem in found]
        for key in _claims(entry, module) if not found else ():
            if key in seen:
                problems.append(f"{what}: {key[0]} is that of {seen[key]}, and one of them would undo the other")
            seen.setdefault(key, what)
    return problems


def _claims(entry: Entry, module: str) -> t.Iterator[t.Tuple[str, ...]]:
    """What no other entry of the list may have too, with the key that says so first."""
    if module == "storage_pool":
        for keys in (("name", "pool"), ("target_path", "path")):
            yield from ((keys[0], str(entry[key]).rstrip("/")) for key in keys if entry.get(key))
        return
    volumes = entry.get("volumes") or [entry]
    for volume in volumes if isinstance(volumes, list) else ():
        name = isinstance(volume, t.Mapping) and (volume.get("name") or volume.get("volume"))
        if name:
            yield "name", str(entry.get("pool")), str(name)


def _problems(entry: Entry, code: ModuleType, semantics: t.Callable[[Entry], object], safe_mode: bool) -> t.List[str]:
    unknown = _unknown_keys(entry, code.ARGUMENT_SPEC, "")
    if unknown:
        return unknown
    validated = ArgumentSpecValidator(code.ARGUMENT_SPEC, **code.CONDITIONS).validate(dict(entry))
    if validated.error_messages:
        return [" ".join(message.split()) for message in validated.error_messages]
    parameters = validated.validated_parameters
    try:
        semantics(parameters)
    except CloneError as exc:
        # The host's Python may have lxml where this one has not.
        if exc.code != "MISSING_DEPENDENCY":
            return [exc.msg]
    if safe_mode and parameters.get("force"):
        return ["force is true, which storage_safe_mode forbids"]
    if safe_mode and parameters.get("state") == "absent":
        return ["state is absent, which storage_safe_mode forbids"]
    return []


def _unknown_keys(entry: Entry, spec: t.Mapping[str, t.Any], above: str) -> t.List[str]:
    """Ansible's own message does not say which entry it is about, and lists all options there are."""
    known = [name for option, details in spec.items() for name in (option, *details.get("aliases", ()))]
    problems = []
    for key, value in entry.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            problems.append(f"unknown key {above}{key}" + (f", did you mean {above}{near[0]}?" if near else ""))
        elif "options" in spec.get(key, {}):
            below = value if isinstance(value, list) else [value]
            for part in below:
                if isinstance(part, t.Mapping):
                    problems += _unknown_keys(part, spec[key]["options"], f"{above}{key}.")
    return problems


class FilterModule:
    def filters(self) -> t.Dict[str, t.Callable[..., t.Any]]:
        return {"entry_problems": entry_problems}
