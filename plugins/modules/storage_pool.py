#!/usr/bin/python
# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: storage_pool
short_description: Manage a libvirt storage pool
version_added: 0.1.0
author:
  - The virtforge.libvirt authors (@virtforge)
description:
  - Defines, starts, stops and undefines a storage pool, and makes its directory. A plain directory, without libvirt, is a pool
    too.
  - The pool is declared. Its definition is compared with the stated one by what both mean. Order and blanks are no difference,
    nor are slashes at the end of a path and defaults that only one of them spells out. With parameters only what is stated
    counts, with O(xml) all but what libvirt only prints.
  - A definition that differs is changed. A pool that is active is stopped and started for that, which is refused while
    a running domain uses a volume of it. If libvirt does not take the new definition, or cannot start it, the old one is put
    back.
  - Another type or UUID makes another pool of it. That fails, and the pool has to be removed first.
  - A pool that exists, of whatever type, can be started, stopped and undefined by its name alone.
  - No volume is ever deleted, and no device formatted that holds anything.
extends_documentation_fragment:
  - virtforge.libvirt.options
  - virtforge.libvirt.attributes
  - virtforge.libvirt.attributes.actiongroup
attributes:
  check_mode:
    support: full
    details: Where the pool or its device would have been made by an earlier task, a change is predicted, with a warning.
  diff_mode:
    support: full
  idempotent:
    support: full
requirements:
  - C(libvirt) and C(lxml) for Python on the managed host, for pools of libvirt
  - C(blkid), and C(mkfs) for the format, C(parted) or C(lvm2), for O(build)
options:
  name:
    description:
      - Name of the pool, or an absolute path for a pool that is a directory and needs no libvirt.
      - Needed unless O(xml) or O(pool) states it. The parameter wins.
    type: str
  pool:
    description:
      - The same as O(name), for C(module_defaults) of all modules of the collection. O(name) wins over it, and so does O(xml).
    type: str
  type:
    description:
      - Kind of pool. V(dir) is a directory, V(fs) a file system on a block device, V(netfs) one on the network, V(logical)
        a volume group of LVM, V(disk) the partitions of a disk, V(rbd) a pool of Ceph, V(iscsi) the LUNs of an iSCSI target as
        disks of the host and V(iscsi-direct) the same without the kernel, V(scsi) the disks of an adapter, V(mpath) the
        multipath devices of the host, V(gluster) a volume of GlusterFS by its library, V(zfs) a pool of ZFS, V(vstorage) a
        cluster of Virtuozzo.
      - Which of them there are depends on how libvirt was built. One that it lacks fails with V(NO_SUPPORT).
      - Needed for a pool that does not exist, unless O(xml) states it.
    type: str
    choices: [dir, fs, netfs, logical, disk, rbd, iscsi, iscsi-direct, scsi, mpath, gluster, zfs, vstorage]
  target_path:
    description:
      - Directory of the pool, or where its file system gets mounted, or where the nodes of its volumes are. An absolute path.
      - V(dir), V(fs), V(netfs) and V(vstorage) need it. V(disk) has V(/dev) where nothing is stated, V(iscsi) and V(scsi) have
        V(/dev/disk/by-path), V(mpath) has V(/dev/mapper). That of V(logical) and V(zfs) follows from O(pool_source.name), and
        another is refused. V(rbd), V(iscsi-direct) and V(gluster) have none.
      - With another directory than it has, a pool of the type V(dir) leaves its volumes behind. A warning says so.
      - For V(fs) and V(netfs) a path with a symbolic link in it is refused, because libvirt would not find it among the mounts.
    type: path
    aliases: [path]
  pool_source:
    description:
      - Where the pool's storage is. What a type has no use for is refused.
      - V(fs) and V(disk) need O(pool_source.devices), V(netfs) needs O(pool_source.hosts) and O(pool_source.dir), V(rbd) and
        V(gluster) need O(pool_source.hosts) and O(pool_source.name), V(iscsi) needs O(pool_source.hosts) and
        O(pool_source.devices), V(iscsi-direct) O(pool_source.initiator) too, V(scsi) needs O(pool_source.adapter), V(vstorage)
        needs O(pool_source.name).
      - V(logical) and V(zfs) can have O(pool_source.name) and O(pool_source.devices).
    type: dict
    suboptions:
      hosts:
        description: The server, or for V(rbd) the monitors, whose order does not matter. All other types take one.
        type: list
        elements: dict
        suboptions:
          name:
            description: Its name or address.
            type: str
            required: true
          port:
            description:
              - Its port. Where it is not stated, a host that the pool has keeps its own, and one that it does not have gets the
                default of the type. V(netfs) has no use for it, O(xml) takes mount options.
            type: int
      name:
        description:
          - Name of the volume group, of the pool of Ceph or ZFS, of the volume of GlusterFS. For V(logical) and V(zfs) that
            of the pool, where it is not stated.
        type: str
      dir:
        description: Directory that the server exports. For the format V(glusterfs) the name of a volume.
        type: str
      devices:
        description:
          - The block device, for V(logical) all those of the volume group, for V(iscsi) and V(iscsi-direct) the name of the
            target.
          - Another name of the same device, by a symbolic link, is no difference.
        type: list
        elements: path
      format:
        description:
          - Format of the file system. For V(fs) one of libvirt's list, such as V(ext4) and V(xfs), for V(netfs) V(nfs),
            V(glusterfs) or V(cifs).
          - V(auto), libvirt's default, takes what is there. For a btrfs, which libvirt has no name for, make it beforehand and
            state no format.
          - For V(logical) it is V(lvm2), for V(disk) the kind of partition table, such as V(gpt) and V(dos).
        type: str
      initiator:
        description: IQN that the pool has for an iSCSI server.
        type: str
      adapter:
        description: Name of the SCSI adapter, such as V(host2). A Fibre Channel adapter is stated by O(xml).
        type: str
      auth:
        description: Who the pool is for its server, for the types V(rbd), V(iscsi) and V(iscsi-direct).
        type: dict
        suboptions:
          type:
            description: For V(rbd) it is V(ceph), for the others V(chap), and so it need not be stated.
            type: str
            choices: [ceph, chap]
          username:
            description: Name of the user, for Ceph without C(client).
            type: str
          secret_uuid:
            description: UUID of the secret of libvirt that has the password.
            type: str
          secret_usage:
            description:
              - Usage name of that secret, instead of O(pool_source.auth.secret_uuid).
              - With a password and neither of them it is C(virtforge:) and the pool's name.
            type: str
          password:
            description:
              - The password, for Ceph the key as C(ceph auth get-key) prints it. It is kept in the secret, which is made if it
                does not exist, and set if it has another.
              - A secret that is made is not private, so that a later run can tell whether it has this password. A connection
                that may change things can read it, a read-only one not. A private secret, which nobody can compare, is refused.
              - O(state=absent) removes a secret that was made for the pool, unless another pool or a domain names it.
              - A pool that is active is not started again for another password.
              - Secrets need C(qemu:///system) or the like, C(storage:///system) has none.
            type: str
  xml:
    description:
      - Pool XML as C(virsh pool-define) takes it, and C(virsh pool-dumpxml) prints it. Other parameters win over it.
      - The whole document is compared, less sizes, permissions, and a UUID that it does not have. It can state what no
        parameter exists for, such as mount options.
      - Its permissions count only for a directory that is made.
    type: str
  state:
    description:
      - V(present) is defined, and running or not as it is. V(active) is defined and running, V(inactive) is defined and
        stopped.
      - V(absent) is stopped and undefined, with all data left where it is. A directory pool is removed, if it is empty
        and no mount point. A directory that libvirt has as a pool is not known as such by its path.
    type: str
    choices: [present, active, inactive, absent]
    default: active
  autostart:
    description: Whether the pool is started with libvirt. Left alone where not stated.
    type: bool
  build:
    description:
      - Make the file system of a pool of the type V(fs) or the partition table of one of the type V(disk), in the format that
        O(pool_source.format) states, or the volume group of one of the type V(logical), if all its devices are empty.
      - A device that has that format, or belongs to that volume group, is left as it is. A volume group is never extended.
      - A device that holds anything else is never formatted. It counts as empty when
        C(blkid) finds nothing and there are only zeros where it is read. A device of up to 1 GiB is read as a whole, of
        a larger one the first and the last MiB, and 1 MiB at each of 256 places between them, evenly spread.
      - A device that a running domain or any other process has open is not formatted either.
      - Directories are always made.
    type: bool
    default: false
  owner:
    description:
      - User that owns the pool's directory, by name or number. Where not stated, a new one belongs to the running user.
      - For V(fs) and V(netfs) that is the root of what is mounted, while the pool is active.
    type: str
  group:
    description: Group of the pool's directory, by name or number.
    type: str
  mode:
    description:
      - Mode of the pool's directory, octal and quoted (V('0751')) or symbolic (V(u=rwx,go=x)).
      - A number, as YAML makes of a mode without quotes, is refused if it has the sticky or the set-user-ID bit. V(711) is
        such a number, V(0711) is not.
      - Where not stated, a new one has V(0711), as libvirt makes it.
    type: raw
  lock_timeout:
    description: Seconds to wait for another run to finish with the same pool, and for libvirt's jobs in it.
    type: int
    default: 300
seealso:
  - module: virtforge.libvirt.storage_pool_info
  - module: community.libvirt.virt_pool
notes:
  - With a O(uri) of another host, libvirt makes the directory of a pool that does not start without, with the permissions that
    O(xml) states. O(owner), O(group) and O(mode) are refused. O(build) formats only for a pool that the same task defines, and
    libvirt refuses a device that holds anything. On btrfs libvirt exempts directories that it makes from copy-on-write.
  - Without root, and for a pool of C(qemu:///system), use C(become).
"""

EXAMPLES = r"""
---
- name: A directory of images
  virtforge.libvirt.storage_pool:
    name: images
    type: dir
    target_path: /srv/images
    mode: '0751'
    autostart: true

- name: A file system of its own for the disks, made if the device is empty
  virtforge.libvirt.storage_pool:
    name: disks
    type: fs
    target_path: /srv/disks
    pool_source:
      devices: [/dev/disk/by-id/virtio-vms]
      format: xfs
    build: true

- name: A volume of a GlusterFS server, with mount options
  virtforge.libvirt.storage_pool:
    xml: |
      <pool type='netfs' xmlns:fs='http://libvirt.org/schemas/storagepool/fs/1.0'>
        <name>media</name>
        <source>
          <host name='nas.example.com'/>
          <dir path='gv0'/>
          <format type='glusterfs'/>
        </source>
        <target><path>/srv/media</path></target>
        <fs:mount_opts><fs:option name='ro'/></fs:mount_opts>
      </pool>

- name: A volume group, made if its devices are empty
  virtforge.libvirt.storage_pool:
    name: vms
    type: logical
    pool_source:
      name: vg_vms
      devices: [/dev/disk/by-id/virtio-vms1, /dev/disk/by-id/virtio-vms2]
    build: true

- name: A pool of Ceph
  virtforge.libvirt.storage_pool:
    name: block
    type: rbd
    pool_source:
      hosts: [{name: mon1.example.com}, {name: mon2.example.com}]
      name: vms
      auth:
        username: libvirt
        password: "{{ ceph_key }}"

- name: A directory that needs no libvirt
  virtforge.libvirt.storage_pool:
    name: /srv/plain

- name: Stop a pool
  virtforge.libvirt.storage_pool:
    name: media
    state: inactive

- name: Remove a pool and leave its volumes
  virtforge.libvirt.storage_pool:
    name: media
    state: absent
"""

RETURN = r"""
actions:
  description:
    - What was done, or would be done, in order. Of C(created) (the directory), C(secret) (made, or its
      password set), C(defined), C(redefined), C(stopped), C(built), C(started), C(permissions), C(autostart), C(undefined),
      C(secret_removed) and C(removed) (the directory). Empty when the pool was as stated.
  returned: success
  type: list
  elements: str
  sample: [created, defined, started]
pool:
  description:
    - The pool, as M(virtforge.libvirt.storage_pool_info) describes one. Null when it is absent.
    - In check mode that of a pool that would change, as far as it is known.
  returned: success
  type: dict
  sample:
    name: images
    uuid: 4f3a1c52-9a9e-4f0e-8a35-0ddf3b1a7f5c
    type: dir
    state: active
    autostart: true
    persistent: true
    path: /srv/images
    capacity: 107374182400
    allocation: 53687091200
    available: 53687091200
    source: {}
    capabilities:
      create: true
      clone: true
      grow: true
      delete: true
      formats: [raw, qcow2]
diff:
  description:
    - The pool C(before) and C(after), with what is known of it, named as the parameters. What no parameter exists for stands
      under C(xml), by its path in the document.
  returned: success
  type: dict
error_code:
  description:
    - Kind of failure, after libvirt's own where it has one.
    - One of V(NO_STORAGE_POOL), V(DIFFERS), V(IN_USE), V(INVALID_ARG), V(XML_ERROR), V(CONFIG_UNSUPPORTED), V(NO_SUPPORT),
      V(OPERATION_DENIED), V(OPERATION_INVALID), V(TIMEOUT), V(NO_SPACE), V(IO_ERROR) and V(MISSING_DEPENDENCY).
    - V(OPERATION_INVALID) is also that of a device that O(build) must not format, and of a path, device or export that another
      pool has.
  returned: failure
  type: str
  sample: DIFFERS
"""

import typing as t

from ..module_utils import _argspec
from ..module_utils._module import Module, respawn_for_pools, run
from ..module_utils._poolstate import executor, request

ARGUMENT_SPEC: t.Dict[str, t.Dict[str, t.Any]] = {
    **_argspec.URI,
    "name": {"type": "str"},
    "pool": {"type": "str"},
    "type": {
        "type": "str",
        "choices": [
            *("dir", "fs", "netfs", "logical", "disk", "rbd", "iscsi", "iscsi-direct"),
            *("scsi", "mpath", "gluster", "zfs", "vstorage"),
        ],
    },
    "target_path": {"type": "path", "aliases": ["path"]},
    "pool_source": {
        "type": "dict",
        "options": {
            "hosts": {
                "type": "list",
                "elements": "dict",
                "options": {"name": {"type": "str", "required": True}, "port": {"type": "int"}},
            },
            "name": {"type": "str"},
            "dir": {"type": "str"},
            "devices": {"type": "list", "elements": "path"},
            "format": {"type": "str"},
            "initiator": {"type": "str"},
            "adapter": {"type": "str"},
            "auth": {
                "type": "dict",
                "options": {
                    "type": {"type": "str", "choices": ["ceph", "chap"]},
                    "username": {"type": "str"},
                    "secret_uuid": {"type": "str", "no_log": False},
                    "secret_usage": {"type": "str", "no_log": False},
                    "password": {"type": "str", "no_log": True},
                },
            },
        },
    },
    "xml": {"type": "str"},
    "state": {"type": "str", "choices": ["present", "active", "inactive", "absent"], "default": "active"},
    "autostart": {"type": "bool"},
    "build": {"type": "bool", "default": False},
    **_argspec.OWNERSHIP,
    "lock_timeout": _argspec.PATIENCE["lock_timeout"],
}
CONDITIONS: t.Dict[str, t.Any] = {"required_one_of": [["name", "pool", "xml"]]}


def check(params: t.Mapping[str, t.Any], on_host: bool = True) -> request.Request:
    """What the task asks for, or a refusal."""
    # An alias would win over the option, and so module_defaults over what the task states.
    name = params["name"] if params["name"] is not None or params["xml"] is not None else params["pool"]
    return request.from_parameters({**params, "name": name}, on_host)


def manage(params: t.Mapping[str, t.Any], check_mode: bool) -> t.Dict[str, t.Any]:
    name = params["name"] or (params["xml"] is None and params["pool"]) or "that of the XML"
    respawn_for_pools([name], params["xml"] is not None)
    return executor.run(check(params), check_mode)


def main() -> None:
    run(Module(argument_spec=ARGUMENT_SPEC, supports_check_mode=True, **CONDITIONS), manage)


if __name__ == "__main__":
    main()
