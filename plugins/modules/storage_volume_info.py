#!/usr/bin/python
# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: storage_volume_info
short_description: Describe the volumes of a libvirt storage pool
version_added: 0.1.0
author:
  - The virtforge.libvirt authors (@virtforge)
description:
  - Describes one volume of a pool or all of them, with what lies below each, which other volumes depend on it, and who uses it.
  - What is in the directory counts, whether or not libvirt has listed it yet. Unfinished volumes of this collection, and what
    is no regular file, are left out.
  - Changes nothing. Only files of the pool, and of the other file pools of the same libvirt, are opened, whatever an image
    refers to.
extends_documentation_fragment:
  - virtforge.libvirt.options
  - virtforge.libvirt.attributes
  - virtforge.libvirt.attributes.actiongroup
attributes:
  check_mode:
    support: full
    details: Where an earlier task would have made or started the pool, no volume is listed, with a warning.
  diff_mode:
    support: none
  idempotent:
    support: full
requirements:
  - C(qemu-img) on the managed host, for volumes that are neither raw nor qcow2
  - C(libvirt) and C(lxml) for Python on the managed host, for pools of libvirt
  - LVM (C(lvs)) on the managed host, for pools of the type C(logical)
  - C(rados) and C(rbd) for Python (C(python3-rados), C(python3-rbd)) on the managed host, for pools of the type C(rbd)
  - C(qemu-img) and the block driver iscsi of QEMU (Debian C(qemu-block-extra)) on the managed host, for pools of the type
    C(iscsi-direct)
options:
  pool:
    description:
      - The name of a libvirt pool of files (C(dir), C(fs), C(netfs)), of devices (C(logical), C(disk), C(iscsi), C(scsi)) or on
        the network (C(rbd), C(iscsi-direct)), or an absolute path of a directory, which needs no libvirt at all.
    type: str
    required: true
  name:
    description:
      - Name of the only volume to describe. Where there is none of that name, the list is empty.
    type: str
    aliases: [volume]
seealso:
  - module: virtforge.libvirt.storage_volume
  - module: virtforge.libvirt.storage_volume_clone
notes:
  - In pools of the types C(logical), C(disk), C(iscsi) and C(scsi) volumes are devices, and only root is told of them. They are
    raw, and have no owner, group or mode here. One that a killed run has left unfinished has RV(volumes[].error_code)
    C(CORRUPT_IMAGE).
  - Volumes of pools of the types C(rbd) and C(iscsi-direct) are raw and have no owner, group or mode either. Whether a killed
    run has left a LUN of C(iscsi-direct) unfinished is not told here.
  - The backing store of a logical volume is what it is a snapshot of. A thin snapshot is none of the
    RV(volumes[].dependents) of its origin, because it keeps its data without it.
  - With a O(uri) of another host, all is told as libvirt saw it when it last looked at the pool. Formats are those that it
    finds, dependents are volumes of active pools, users are running domains, and owners and groups are numbers.
  - Without root, volumes and processes that the user may not look into are described as far as that goes.
"""

EXAMPLES = r"""
---
- name: All volumes of a pool
  virtforge.libvirt.storage_volume_info:
    pool: default
  register: found

- name: The volumes that nothing depends on and nobody uses
  ansible.builtin.debug:
    msg: "{{ found.volumes | rejectattr('dependents') | rejectattr('in_use_by') | map(attribute='name') }}"

- name: One volume, without libvirt
  virtforge.libvirt.storage_volume_info:
    pool: /srv/images
    name: base.qcow2
"""

RETURN = r"""
volumes:
  description: The volumes, by name. Sizes are in bytes.
  returned: success
  type: list
  elements: dict
  contains:
    name:
      description: Its name.
      type: str
      returned: success
      sample: web1.qcow2
    pool:
      description: Its pool, as the task names it.
      type: str
      returned: success
      sample: default
    path:
      description: Its path. On the network, the pool of Ceph and the image as C(vms/web1), or libvirt's name of the LUN.
      type: str
      returned: success
      sample: /var/lib/libvirt/images/web1.qcow2
    key:
      description: libvirt's key, which is the path.
      type: str
      returned: success
      sample: /var/lib/libvirt/images/web1.qcow2
    type:
      description: Kind of volume, V(file), V(block) or V(network).
      type: str
      returned: success
      sample: file
    format:
      description: Its format. Null where that cannot be told.
      type: str
      returned: success
      sample: qcow2
    capacity:
      description: What a guest sees. Null for a volume that cannot be read.
      type: int
      returned: success
      sample: 42949672960
    allocation:
      description: What it occupies.
      type: int
      returned: success
      sample: 1073741824
    physical:
      description: Length of the file or device.
      type: int
      returned: success
      sample: 1074135040
    backing:
      description:
        - Its backing store with C(path) as recorded, C(format) and C(depth), null for a volume that stands alone.
        - The depth is the number of images below, null where RV(volumes[].backing_chain) is not all of them.
      type: dict
      returned: success
      sample:
        path: base.qcow2
        format: qcow2
        depth: 1
    backing_chain:
      description:
        - Every image below it with C(path) and C(format), topmost first.
        - An image that is in none of the pools is the last one, with the path as recorded, for it is not opened.
      type: list
      elements: dict
      returned: success
      sample:
        - path: /var/lib/libvirt/images/base.qcow2
          format: qcow2
    dependents:
      description:
        - Every volume that has it in its backing chain, or keeps data in it, volumes of the same pool by name.
        - Volumes of the other file pools of the same libvirt, active or not, are known too, unless O(pool) is a directory, and
          are given by path.
      type: list
      elements: str
      returned: success
      sample: [/srv/images/web3.qcow2, web1.qcow2, web2.qcow2]
    in_use_by:
      description:
        - Who uses it, running domains and processes that have it open, and of a device the kernel, for a mount, say.
        - Where this user sees neither, and an instance of QEMU has locked it, maybe on another host, it says so.
      type: list
      elements: str
      returned: success
      sample: ["domain 'web1'", qemu-system-x86 (pid 4711)]
    owner:
      description: User that owns it. Null for a device or a volume on the network, and so are group and mode.
      type: str
      returned: success
      sample: libvirt-qemu
    group:
      description: Its group.
      type: str
      returned: success
      sample: kvm
    mode:
      description: Its mode.
      type: str
      returned: success
      sample: '0600'
    secontext:
      description: Its SELinux context.
      type: str
      returned: when it has one
      sample: system_u:object_r:virt_image_t:s0
    error_code:
      description: Why it cannot be read, as RV(error_code). Null for a volume that can be.
      type: str
      returned: success
      sample: CORRUPT_IMAGE
    msg:
      description: The same in a sentence.
      type: str
      returned: success
error_code:
  description: Kind of failure, as in M(virtforge.libvirt.storage_volume_clone).
  returned: failure
  type: str
  sample: NO_STORAGE_POOL
"""

import typing as t
from contextlib import closing

from ..module_utils import _argspec
from ..module_utils._deadline import Deadline
from ..module_utils._errors import CloneError
from ..module_utils._module import Module, respawn_for_pools, run
from ..module_utils._names import check_name, check_pool
from ..module_utils._pools.devices import DevicePool
from ..module_utils._uri import is_elsewhere
from ..module_utils._volumes import devices, remote
from ..module_utils._volumes.inventory import Inventory

ARGUMENT_SPEC: t.Dict[str, t.Dict[str, t.Any]] = {
    **_argspec.URI,
    "pool": {"type": "str", "required": True},
    "name": {"type": "str", "aliases": ["volume"]},
}


def describe(params: t.Mapping[str, t.Any], check_mode: bool) -> t.Dict[str, t.Any]:
    pool, name = params["pool"], params["name"]
    check_pool(pool, "pool")
    if name is not None:
        check_name(name, "name")
    respawn_for_pools([pool], False)
    inventory: t.Union[Inventory, remote.Inventory]
    if is_elsewhere(params["uri"], pool):
        inventory = remote.Inventory(params["uri"], pool, name)
    else:
        inventory = Inventory(params["uri"], pool, name, Deadline(None, "timeout"))
    with closing(inventory):
        try:
            found = inventory.open_pool()
        except CloneError as exc:
            if not check_mode or exc.code not in ("NO_STORAGE_POOL", "OPERATION_INVALID"):
                raise
            warning = f"{exc.msg}; the check run takes it that an earlier task makes it, without volumes"
            return {"changed": False, "volumes": [], "warnings": [warning]}
        if isinstance(found, DevicePool):
            return {"changed": False, "volumes": devices.described(found, name)}
        inventory.scan()
        warnings = [f"{why}: none of its volumes is among the dependents" for why in inventory.unseen.values()]
        return {"changed": False, "volumes": inventory.described(), "warnings": warnings}


def main() -> None:
    run(Module(argument_spec=ARGUMENT_SPEC, supports_check_mode=True), describe)


if __name__ == "__main__":
    main()
