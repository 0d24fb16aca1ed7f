#!/usr/bin/python
# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: storage_volume
short_description: Make, grow, flatten and delete libvirt storage volumes
version_added: 0.1.0
author:
  - The virtforge.libvirt authors (@virtforge)
description:
  - Makes a blank volume in a pool, grows one that is smaller than stated, flattens one, or deletes one. To make a
    volume that has a content, use M(virtforge.libvirt.storage_volume_clone).
  - The volume is declared. Where it exists as stated, nothing is done. Where it differs in more than a smaller capacity, owner,
    group or mode, the task fails and names the difference.
  - A new volume gets its name once it is whole and safely on disk.
  - A volume that other volumes depend on, as their backing store, or that is in use is not deleted.
extends_documentation_fragment:
  - virtforge.libvirt.options
  - virtforge.libvirt.options.layout
  - virtforge.libvirt.options.patience
  - virtforge.libvirt.attributes
  - virtforge.libvirt.attributes.actiongroup
attributes:
  check_mode:
    support: full
    details: Where the pool would have been made by an earlier task, a change is predicted, with a warning.
  diff_mode:
    support: full
  idempotent:
    support: full
requirements:
  - C(qemu-img) on the managed host, for all volumes but raw ones
  - C(libvirt) and C(lxml) for Python on the managed host, for pools of libvirt; C(lxml) for O(xml)
  - LVM (C(lvs), C(lvcreate) and so on) or C(parted) on the managed host, for pools of the types C(logical) or C(disk)
  - C(rados) and C(rbd) for Python (C(python3-rados), C(python3-rbd)) on the managed host, for pools of the type C(rbd), and
    with O(force) the block driver rbd of QEMU (Debian C(qemu-block-extra))
  - C(scrub) on the managed host, for a O(wipe_algorithm) other than V(zero) and V(trim)
options:
  pool:
    description:
      - Pool of the volume, the name of a libvirt pool of files (C(dir), C(fs), C(netfs)), of devices (C(logical), C(disk),
        C(iscsi), C(scsi)) or on the network (C(rbd), C(iscsi-direct)), or an absolute path of a directory, which needs no
        libvirt at all.
      - With O(state=absent), a pool that does not exist holds no volume, so nothing is done.
    type: str
    required: true
  name:
    description:
      - Name of the volume, one path component.
      - In a pool of the type C(disk) a new partition takes the next free number, such as C(sdb3), and no other name. In one
        of the type C(logical) a name has no other characters than letters without accents, digits and C(+ _ . -), and in one
        of the type C(rbd) no C(@).
      - Required, here or in O(xml).
    type: str
    aliases: [volume]
  xml:
    description:
      - Volume XML as C(virsh vol-create) takes it. Other parameters win over it. Allocation, labels, and elements that libvirt
        only prints are ignored.
    type: str
  state:
    description:
      - V(present) makes the volume, blank, or grows it. V(absent) deletes it.
    type: str
    choices: [present, absent]
    default: present
  capacity:
    description:
      - Size that a guest sees, in libvirt's units in any case, or in bytes. V(40G) and V(40GiB) are 40 * 2^30 bytes,
        V(40 GB) is 40 * 10^9.
      - Required for a volume that does not exist yet.
    type: str
    aliases: [size]
  format:
    description:
      - Format of the volume, one of V(raw), V(qcow2), V(vmdk), V(vdi), V(vhdx), V(vpc), V(qed) and V(qcow).
      - A new volume is V(raw) where this is not stated, and the format of one that exists is then not looked at.
      - In pools of devices and on the network it is always V(raw).
    type: str
  owner:
    description:
      - User that owns the volume, by name or number. The running user where not stated.
      - By number with a O(uri) of another host, and libvirt's own user there where not stated.
    type: str
  group:
    description:
      - Group of the volume, by name or number; by number with a O(uri) of another host.
    type: str
  mode:
    description:
      - Mode of the volume, octal and quoted (V('0640')) or symbolic (V(u=rw,g=r)). V(0600) for a new one where not stated.
    type: raw
  resize:
    description:
      - Whether a volume that exists and is smaller than O(capacity) is grown. If not, the task fails.
      - Partitions and LUNs cannot be grown.
    type: bool
    default: true
  flatten:
    description:
      - Whether a volume that has a backing store is made to stand alone. A file is written anew, sharing blocks where the file
        system can do that, and takes its own place once it is whole; owner, group, mode and options of the format stay. Ceph
        does it for a volume of an C(rbd) pool, in place.
      - Linked clones of files and of C(rbd) pools can be flattened. A classic snapshot of a C(logical) pool cannot. A thin one
        keeps its data without its origin, and is left as it is.
      - In the same go it is grown, and gets the owner, group and mode that are stated.
      - Volumes that have it as their backing store stay valid.
      - A volume that is in use is refused, and so is one with internal snapshots, which would be lost. Bitmaps are lost, with
        a warning.
      - Not possible with a O(uri) of another host.
    type: bool
    default: false
  source_pool:
    description:
      - One more pool in which images below the volume may lie, as O(pool). Images elsewhere are not followed.
    type: str
  wipe:
    description:
      - Overwrite the data of the volume before it is deleted. Only with O(state=absent).
      - A thin logical volume, a snapshot, and one that has snapshots cannot be wiped. What is written to them takes space
        elsewhere, or is kept there as it was. Volumes of C(rbd) pools cannot be wiped either.
      - Blocks that other files share, and all blocks on file systems that write elsewhere instead of overwriting (btrfs), keep
        their data; a warning says so.
      - With a O(uri) of another host, libvirt does it, which only frees the blocks of a raw file that has holes.
    type: bool
    default: false
  wipe_algorithm:
    description:
      - How to overwrite, by libvirt's names. V(zero) writes zeros over what is allocated, V(trim) gives the blocks back to the
        storage, the others are patterns of the program C(scrub), written over the whole length of the volume.
      - V(zero) where not stated.
    type: str
    choices: [zero, nnsa, dod, bsi, gutmann, schneier, pfitzner7, pfitzner33, random, trim]
  force:
    description:
      - With O(state=present), a volume that exists and differs is replaced by a blank one, and its data is lost. In pools of
        files, and of the types C(logical) and C(rbd), the new one is made under another name, and until the old one is gone
        both need their space. A partition or LUN keeps its size, so one that is larger than stated is not replaced.
      - With O(state=absent), a volume is deleted although others depend on it, which makes them unreadable, or although some
        that may depend on it cannot be read.
      - A logical volume is deleted together with its snapshots, because LVM does so. Thin snapshots are kept. They keep their
        data when their origin is gone.
      - A volume of an C(rbd) pool that others depend on is never deleted. Delete or flatten its linked clones first.
      - A volume that others depend on is not replaced.
      - A volume that is in use is neither replaced nor deleted.
    type: bool
    default: false
seealso:
  - module: virtforge.libvirt.storage_volume_clone
  - module: virtforge.libvirt.storage_volume_info
notes:
  - Without root, and for a pool that belongs to root, use C(become).
  - In pools of the types C(logical), C(disk), C(iscsi), C(iscsi-direct), C(scsi) and C(rbd) volumes are raw, have no owner,
    group or mode to be stated, and a new one reads as zeros. Their capacity is a whole number of extents (C(logical)) or MiB
    (C(disk)).
  - A partition (C(disk)) has the name that the kernel gives it, such as C(sdb3), which may be C(sdc3) after a reboot, and keeps
    its size. A LUN (C(iscsi), C(iscsi-direct), C(scsi)) is neither made, grown nor deleted here.
  - A logical volume that is a snapshot, or has snapshots, is not grown, a thin one is.
  - What others do to a disk or a target, libvirt notices only when its pool is refreshed.
  - A volume group or disk that several hosts see is only for tasks on one of them, C(run_once=true).
"""

EXAMPLES = r"""
---
- name: A blank disk
  virtforge.libvirt.storage_volume:
    pool: default
    name: data1.qcow2
    format: qcow2
    capacity: 100GiB

- name: The same disk, larger
  virtforge.libvirt.storage_volume:
    pool: default
    name: data1.qcow2
    capacity: 200GiB

- name: A raw file with all of its space reserved, without libvirt
  virtforge.libvirt.storage_volume:
    pool: /srv/images
    name: swap.raw
    capacity: 1GiB
    preallocation: falloc

- name: A disk that no longer needs the golden image it was linked to
  virtforge.libvirt.storage_volume:
    pool: default
    name: data1.qcow2
    source_pool: images
    flatten: true

- name: A disk that is no longer needed, overwritten first
  virtforge.libvirt.storage_volume:
    pool: default
    name: data1.qcow2
    state: absent
    wipe: true
"""

RETURN = r"""
actions:
  description:
    - What was done, or would be done, of C(created), C(grown), C(replaced), C(permissions), C(flattened), C(wiped) and
      C(deleted).
    - Empty when the volume was as stated.
  returned: success
  type: list
  elements: str
  sample: [created]
volume:
  description:
    - The volume as M(virtforge.libvirt.storage_volume_clone) returns it; sizes are in bytes.
    - A volume that was deleted is described as it was. Null where there was none to delete.
  returned: success
  type: dict
  sample:
    name: data1.qcow2
    pool: default
    path: /var/lib/libvirt/images/data1.qcow2
    format: qcow2
    capacity: 107374182400
diff:
  description: The volume C(before) and C(after), with the values that the task is about.
  returned: success
  type: dict
error_code:
  description: Kind of failure, as in M(virtforge.libvirt.storage_volume_clone).
  returned: failure
  type: str
  sample: IN_USE
"""

import typing as t

from ..module_utils import _argspec
from ..module_utils._clone import executor, request
from ..module_utils._errors import CloneError
from ..module_utils._module import Module, respawn_for_pools, run
from ..module_utils._uri import is_elsewhere
from ..module_utils._volumes import remote, removal

ARGUMENT_SPEC: t.Dict[str, t.Dict[str, t.Any]] = {
    **_argspec.URI,
    "pool": {"type": "str", "required": True},
    "name": {"type": "str", "aliases": ["volume"]},
    "xml": {"type": "str"},
    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
    "capacity": {"type": "str", "aliases": ["size"]},
    "format": {"type": "str"},
    **_argspec.LAYOUT,
    **_argspec.OWNERSHIP,
    "resize": {"type": "bool", "default": True},
    "flatten": {"type": "bool", "default": False},
    "source_pool": {"type": "str"},
    "wipe": {"type": "bool", "default": False},
    "wipe_algorithm": {
        "type": "str",
        "choices": ["zero", "nnsa", "dod", "bsi", "gutmann", "schneier", "pfitzner7", "pfitzner33", "random", "trim"],
    },
    "force": {"type": "bool", "default": False},
    **_argspec.PATIENCE,
}
CONDITIONS: t.Dict[str, t.Any] = {"required_one_of": [["name", "xml"]]}


def check(params: t.Mapping[str, t.Any], on_host: bool = True) -> t.Union[request.Request, removal.Removal]:
    """What the task asks for, or a refusal."""
    if params["state"] == "absent":
        return removal.from_parameters(params)
    for parameter in ("wipe", "wipe_algorithm"):
        if params[parameter]:
            raise CloneError("INVALID_ARG", f"{parameter}: {params[parameter]} has no meaning for state=present")
    return request.blank_from_parameters(params, on_host)


def declare(params: t.Mapping[str, t.Any], check_mode: bool) -> t.Dict[str, t.Any]:
    respawn_for_pools([params["pool"], params["source_pool"]], params["xml"] is not None)
    wanted = check(params)
    if isinstance(wanted, removal.Removal):
        return (remote.remove if is_elsewhere(wanted.uri, wanted.pool) else removal.run)(wanted, check_mode)
    return executor.run(wanted, check_mode)


def main() -> None:
    run(Module(argument_spec=ARGUMENT_SPEC, supports_check_mode=True, **CONDITIONS), declare)


if __name__ == "__main__":
    main()
