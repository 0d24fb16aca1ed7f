#!/usr/bin/python
# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: storage_pool_info
short_description: Look at libvirt storage pools
version_added: 0.1.0
author:
  - The virtforge.libvirt authors (@virtforge)
description:
  - Tells of all storage pools of a libvirt connection, active and inactive, or of one pool. A plain directory is a pool too.
  - Changes nothing, and has libvirt refresh nothing. The sizes are those that libvirt saw last.
extends_documentation_fragment:
  - virtforge.libvirt.options
  - virtforge.libvirt.attributes
  - virtforge.libvirt.attributes.actiongroup
attributes:
  check_mode:
    support: full
  diff_mode:
    support: N/A
    details: It changes nothing.
  idempotent:
    support: full
requirements:
  - C(libvirt) and C(lxml) for Python on the managed host, for pools of libvirt
options:
  name:
    description:
      - Name of a libvirt pool, or an absolute path of a directory, which needs no libvirt. Without it, all pools of libvirt.
      - One that does not exist is no failure, the list is empty then.
    type: str
  pool:
    description:
      - The same as O(name), for C(module_defaults) of all modules of the collection. O(name) wins over it.
    type: str
seealso:
  - module: virtforge.libvirt.storage_pool
"""

EXAMPLES = r"""
---
- name: Look at all pools
  virtforge.libvirt.storage_pool_info:
  register: storage

- name: Names of the active pools that can hold a clone
  ansible.builtin.debug:
    msg: "{{ storage.pools | selectattr('state', 'eq', 'active') | selectattr('capabilities.clone') | map(attribute='name') }}"

- name: Free space of a directory
  virtforge.libvirt.storage_pool_info:
    name: /srv/images
"""

RETURN = r"""
pools:
  description: The pools, by name. Sizes are in bytes.
  returned: success
  type: list
  elements: dict
  contains:
    name:
      description: Its name, for a directory its path as stated.
      type: str
      returned: success
      sample: default
    uuid:
      description: Its UUID. Null for a directory.
      type: str
      returned: success
      sample: 4f3a1c52-9a9e-4f0e-8a35-0ddf3b1a7f5c
    type:
      description: libvirt's type, or C(directory).
      type: str
      returned: success
      sample: dir
    state:
      description: Either C(active) or C(inactive).
      type: str
      returned: success
      sample: active
    autostart:
      description: Whether it is started with libvirt. Null for a directory.
      type: bool
      returned: success
      sample: true
    persistent:
      description: Whether it has a definition that outlives it. Null for a directory.
      type: bool
      returned: success
      sample: true
    path:
      description: Its target path. Null for a pool that has none.
      type: str
      returned: success
      sample: /var/lib/libvirt/images
    capacity:
      description: All that it can hold. Null while it is inactive.
      type: int
      returned: success
      sample: 107374182400
    allocation:
      description: What is taken. Null while it is inactive.
      type: int
      returned: success
      sample: 53687091200
    available:
      description: What is free. Null while it is inactive.
      type: int
      returned: success
      sample: 53687091200
    source:
      description: Where it keeps its volumes, as M(virtforge.libvirt.storage_pool) takes it, less passwords.
      type: dict
      returned: success
      sample:
        devices: [/dev/vdb]
        format: xfs
    capabilities:
      description:
        - What this collection can do with its volumes, C(create), C(clone) (be the target of a full clone), C(linked) (be
          that of a linked one), C(flatten), C(grow) and C(delete).
        - With C(formats), those that a new volume can have.
      type: dict
      returned: success
      sample:
        create: true
        clone: true
        linked: true
        flatten: true
        grow: true
        delete: true
        formats: [raw, qcow2]
error_code:
  description:
    - Kind of failure, one of V(INVALID_ARG), V(NO_SUPPORT), V(OPERATION_DENIED), V(MISSING_DEPENDENCY) and V(IO_ERROR).
  returned: failure
  type: str
  sample: IO_ERROR
"""

import typing as t
from contextlib import closing

from ..module_utils import _argspec
from ..module_utils._module import Module, respawn_for_pools, run
from ..module_utils._names import check_pool
from ..module_utils._pools.libvirt import Connection
from ..module_utils._poolstate import report

ARGUMENT_SPEC: t.Dict[str, t.Dict[str, t.Any]] = {**_argspec.URI, "name": {"type": "str"}, "pool": {"type": "str"}}


def look(params: t.Mapping[str, t.Any], _check_mode: bool) -> t.Dict[str, t.Any]:
    # An alias would win over the option, and so module_defaults over what the task states.
    name = params["name"] if params["name"] is not None else params["pool"]
    if name is not None:
        check_pool(name, "name")
    respawn_for_pools([name or "all of libvirt"], False)
    with closing(Connection(params["uri"])) as connection:
        pools, warnings = report.entries(connection, name)
    return {"changed": False, "pools": pools, "warnings": warnings}


def main() -> None:
    run(Module(argument_spec=ARGUMENT_SPEC, supports_check_mode=True), look)


if __name__ == "__main__":
    main()
