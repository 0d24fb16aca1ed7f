#!/usr/bin/python
# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: storage_volume_clone
short_description: Clone a libvirt storage volume
version_added: 0.1.0
author:
  - The virtforge.libvirt authors (@virtforge)
description:
  - Makes a volume that is a clone of another volume, of any file or block device on the managed host, or of an image that a web
    server has, in a pool.
  - The volume is declared. Where it exists as stated, nothing is done. Where it is smaller than stated it is grown. Where it
    differs otherwise, the task fails and names the difference, or replaces it with O(force=true).
  - A clone shares the blocks of its source where the file system can do that, and is otherwise copied without its holes and
    zeros. Formats are converted, and backing chains flattened, by C(qemu-img).
  - A linked clone is made in no time. In a pool of files it is a qcow2 image over its source, of which it records the path, so
    the source has to stay where it is and must not be written to any more. In a pool of the type C(rbd) it is a child of a
    snapshot of its source, in one of the type C(logical) a snapshot.
  - A new volume gets its name once it is whole and safely on disk. In a pool of files a task that is killed leaves nothing
    behind. Where a file needs a name earlier, with O(force=true) and on file systems without unnamed files such as NFS, it may
    leave a hidden file, which the next run removes. What it leaves in pools of devices, the notes say.
  - Images are checked by C(qemu-img check) before they are cloned, and corrupt ones are refused.
  - A source that is open for writing is refused. To clone the disk of a running virtual machine, make a snapshot first and
    clone the image that is then no longer written to.
extends_documentation_fragment:
  - virtforge.libvirt.options
  - virtforge.libvirt.options.layout
  - virtforge.libvirt.options.outside
  - virtforge.libvirt.options.patience
  - virtforge.libvirt.attributes
  - virtforge.libvirt.attributes.actiongroup
attributes:
  check_mode:
    support: full
    details: Where the pool or the source would have been made by an earlier task, a change is predicted, with a warning. So it
      is where the source has to be fetched or unpacked, with a warning if format or capacity are not stated.
  diff_mode:
    support: full
  idempotent:
    support: full
requirements:
  - C(qemu-img) on the managed host, for all but copies of raw volumes
  - C(libvirt) and C(lxml) for Python on the managed host, for pools of libvirt; C(lxml) for O(xml)
  - LVM (C(lvs), C(lvcreate) and so on) on the managed host, for pools of the type C(logical)
  - C(parted) on the managed host, for pools of the type C(disk)
  - C(rados) and C(rbd) for Python (C(python3-rados), C(python3-rbd)), and the block driver rbd of QEMU (Debian
    C(qemu-block-extra)), on the managed host, for pools of the type C(rbd)
  - the block driver iscsi of QEMU (Debian C(qemu-block-extra)) on the managed host, for pools of the type C(iscsi-direct)
  - C(zstd) on the managed host, for images that are compressed by it
options:
  pool:
    description:
      - Pool in which the volume is made, the name of a libvirt pool of files (C(dir), C(fs), C(netfs)), of devices (C(logical),
        C(disk), C(iscsi), C(scsi)) or on the network (C(rbd), C(iscsi-direct)), or an absolute path of a directory, which needs
        no libvirt at all.
    type: str
    required: true
  name:
    description:
      - Name of the new volume. One path component.
      - Made up where neither this nor O(xml) states it. The clone of C(base.qcow2) is C(base-clone.qcow2).
      - To be stated for a pool of the type C(disk), where a new partition takes the next free number, such as C(sdb3), and no
        other name. One for C(iscsi), C(iscsi-direct) and C(scsi) is that of a LUN that exists.
      - In a pool of the type C(logical) it has no other characters than letters without accents, digits and C(+ _ . -), and in
        one of the type C(rbd) no C(@).
    type: str
    aliases: [volume]
  xml:
    description:
      - Volume XML as C(virsh vol-create-from) takes it; what C(virsh vol-dumpxml) prints of a volume describes its clone.
        libvirt knows no vhdx and prints it as raw.
      - Other parameters win over it. Allocation, labels, and elements that libvirt only prints are ignored.
      - A C(<backingStore>) has to be the source for O(clone_type=linked), and is ignored for a full clone.
    type: str
  volumes:
    description:
      - Many clones of the one source. The task's other options are defaults for all of them.
      - The source is read and converted once; what was made first is shared, or copied, by the others. All of them are written
        out together and get their names together.
      - A volume that fails does not hinder the others; the task fails in the end, and RV(volumes) says which, and why.
    type: list
    elements: dict
    suboptions:
      name:
        description: As O(name).
        type: str
        required: true
      capacity:
        description: As O(capacity).
        type: str
      format:
        description: As O(format).
        type: str
      owner:
        description: As O(owner).
        type: str
      group:
        description: As O(group).
        type: str
      mode:
        description: As O(mode).
        type: raw
      xml:
        description: As O(xml). The name in it does not count.
        type: str
  source:
    description:
      - Name of the volume in O(source_pool) to clone.
      - To clone a linked clone whose backing file lies in another directory, state the linked clone as O(source_path) and that
        directory as O(source_pool).
    type: str
    aliases: [clone_source, source_volume]
  source_path:
    description:
      - Absolute path of a file or block device on the managed host to clone.
      - A file that is compressed is unpacked, and an archive refused, see O(source_compression).
      - For O(clone_type=linked) it has to lie in O(pool) or O(source_pool), since later tasks read through the clone.
      - With a O(uri) of another host it is uploaded to that, without its holes. To become another format, it is first converted
        in the directory C(/var/tmp) of the managed host, or in that of the environment variable E(TMPDIR).
    type: path
  source_pool:
    description:
      - Pool of the source, as O(pool). With O(source_path), one more pool that a backing file may lie in.
      - The same as O(pool) where not stated.
    type: str
  source_format:
    description:
      - Format to read the source as, one of those of O(format). Without it, a file that begins like an image is read as that,
        any other as raw, and block devices as raw; a file that could be two formats is refused.
      - V(raw) clones any bytes as they are, of a O(source_url) those that are inside where it is compressed.
    type: str
  clone_type:
    description:
      - V(full) makes a volume that stands alone; it is what is made without this option too.
      - V(linked) makes a volume that has the source as its backing store. The source may be of any format, and a linked clone
        itself; an encrypted one is refused. It has to stay, so a O(source_url) and a compressed source are refused.
      - In a pool of files it is a qcow2 image. In one of the type C(rbd) it is a child of a snapshot of a O(source) in a pool
        of the same Ceph. In one of the type C(logical) it is a snapshot of a O(source) in the same pool. Other pools have
        none.
      - The snapshot of a thin volume is thin. That of another one is classic. It reserves as much space as its source has, has
        exactly the capacity of that, and neither of the two can be grown from then on.
      - Where stated, a volume that exists and is the other kind, or a linked clone of something else, differs.
      - To flatten a linked clone later, see O(virtforge.libvirt.storage_volume#module:flatten). Classic snapshots of
        C(logical) cannot be flattened.
    type: str
    choices: [full, linked]
  format:
    description:
      - Format of the new volume, one of V(raw), V(qcow2), V(vmdk), V(vdi), V(vhdx), V(vpc), V(qed) and V(qcow).
        V(iso) and V(img) are read as V(raw).
      - The source's where not stated. A linked clone is always V(qcow2) in a pool of files.
      - In pools of devices and on the network it is always V(raw), stated or not.
    type: str
  capacity:
    description:
      - Size that a guest sees, in libvirt's units in any case, or in bytes. V(40G) and V(40GiB) are 40 * 2^30 bytes,
        V(40 GB) is 40 * 10^9.
      - Exact, or the smallest size above it that format and pool can represent, in pools of the type C(logical) a whole number
        of extents, in those of the type C(disk) of MiB. The source's where not stated.
    type: str
    aliases: [size]
  allow_shrink:
    description:
      - Permits a O(capacity) smaller than the source's, where the source is raw and nothing but zeros would be cut off.
      - A linked clone is never smaller than its source.
    type: bool
    default: false
  method:
    description:
      - V(auto) shares blocks where it can and copies where not, and says so in RV(volume.fallback_reason). With a O(uri) of
        another host it is V(libvirt), or an upload.
      - V(reflink) shares all blocks of data or fails. V(copy) shares none.
      - V(libvirt) has libvirt make the clone, for a user who may not write to the pool's directory. It is slower, and
        a libvirtd that is killed leaves an unfinished volume.
      - A linked clone copies nothing, so only V(auto) goes with O(clone_type=linked).
    type: str
    choices: [auto, reflink, copy, libvirt]
    default: auto
  resize:
    description:
      - Whether a volume that exists and is smaller than O(capacity) is grown. If not, the task fails.
      - Partitions and LUNs cannot be grown.
    type: bool
    default: true
  compare:
    description:
      - What a volume that exists is judged on. V(content) compares its data with the source's too.
      - V(content) is to be stated for a LUN.
    type: str
    choices: [metadata, content]
    default: metadata
  force:
    description:
      - Replace a volume that exists and differs in more than its owner, group, mode, or a smaller capacity.
      - A file is replaced by a new one, which is renamed. A volume of C(logical) or C(rbd) is replaced by a new one that was
        made under another name. Until it is gone, the old one needs its space too.
      - A partition or LUN is overwritten in place and keeps its size. A task that is killed meanwhile leaves neither the old
        data nor the new but a mark, and the next run begins anew.
      - A device with LUKS is not replaced.
      - A volume that others depend on, as their backing store or for their data, or that is in use is not replaced.
    type: bool
    default: false
  owner:
    description:
      - User that owns the volume, by name or number; by number with a O(uri) of another host.
      - Where not stated, a new volume has the owner, group and mode of a source that is a volume of a pool, else it
        belongs to the running user with the mode V(0600).
    type: str
  group:
    description:
      - Group of the volume, by name or number; by number with a O(uri) of another host.
    type: str
  mode:
    description:
      - Mode of the volume, octal and quoted (V('0640')) or symbolic (V(u=rw,g=r)).
    type: raw
  seuser:
    description: User part of the SELinux context. Without any part stated the policy's context is set.
    type: str
  serole:
    description: Role part of the SELinux context.
    type: str
  setype:
    description: Type part of the SELinux context.
    type: str
  selevel:
    description: Level part of the SELinux context.
    type: str
  source_in_use:
    description:
      - What to do while the source is open for writing. V(wait) has no limit but O(timeout).
    type: str
    choices: [fail, wait]
    default: fail
  max_capacity:
    description:
      - A source that claims to be larger is refused, and so is one with a larger image below it.
    type: str
    default: 64TiB
  bwlimit:
    description:
      - At most so many bytes a second are fetched and copied, with the units of O(capacity). The sum for O(volumes).
      - Blocks that are shared are not copied and do not count.
    type: str
  verify:
    description:
      - Compare each new volume with the source, as read back from the disk, before it gets its name.
    type: bool
    default: false
seealso:
  - module: community.libvirt.virt_volume
  - module: ansible.builtin.get_url
notes:
  - Without root, and for a pool that belongs to root, use C(become).
  - Pools of the types C(rbd) and C(iscsi-direct) are reached with what their definition says, and with the secret that libvirt
    keeps for them, which must not be private. No configuration of Ceph or iSCSI on the managed host is read. The key appears on
    no command line and in no file.
  - A new image of an C(rbd) pool has another name until it is whole. A task that is killed leaves that image behind, and a
    later task for the pool removes it, once Ceph has noticed after half a minute that nobody has it open, and after an hour
    where another host had made it.
  - With O(clone_type=linked), a volume of an C(rbd) pool is a child of a snapshot of its source, which has to be in an C(rbd)
    pool that names the same monitors. The snapshot is called C(virtforge-base-1) and so on. It is made once, protected, and
    used again for as long as the source stays as it is. It is removed when its last child was deleted or made to stand alone.
  - Who has an image open for writing, on whatever host, is told by Ceph. What other hosts do with a LUN, nobody tells.
  - A LUN, of a pool of the type C(iscsi), C(iscsi-direct) or C(scsi), has to exist, and is filled only with O(compare=content),
    and with O(force=true) where it holds other data. It keeps its size, and reads as zeros beyond the data of the source.
  - Until it is whole, a LUN or partition begins with a mark. A task that is killed leaves it so. The next run that makes it
    begins anew, for which it needs no O(force). As a source it is refused.
  - Until it is whole, a volume of a C(logical) pool has a name that begins with C(.virtforge-). A task that is killed leaves
    that volume behind, and the next task on the same host that makes one in the pool removes it.
  - Runs on several hosts do not wait for each other. With Ceph and NFS one of them makes a name, and the others find it. A
    volume group, a disk or LUN that several hosts see is only for tasks on one of them, C(run_once=true), since a run on
    another host would change the same volume group, or overwrite what is not finished.
  - A volume of a C(logical) pool that LVM does not lay out as linear or thin is not replaced. Delete it first.
  - In a partition table of the kind C(dos), libvirt ends partitions at cylinders. One that is up to 8225280 bytes larger than
    O(capacity) is as large as stated.
  - A partition has the name that the kernel gives it. C(sdb3) may be C(sdc3) after a reboot.
"""

EXAMPLES = r"""
---
- name: A virtual machine's disk from the golden image
  virtforge.libvirt.storage_volume_clone:
    pool: default
    source: debian-13.qcow2
    name: web1.qcow2
    capacity: 40GiB

- name: An LVM volume as a qcow2 file, owned by the hypervisor's user
  virtforge.libvirt.storage_volume_clone:
    pool: images
    source_path: /dev/vg0/web1
    name: web1.qcow2
    format: qcow2
    owner: libvirt-qemu
    group: kvm
    mode: '0600'

- name: Install media from a home directory
  virtforge.libvirt.storage_volume_clone:
    pool: isos
    source_path: /home/anna/netinst.iso
    name: netinst.iso

- name: A clone in a plain directory, without libvirt
  virtforge.libvirt.storage_volume_clone:
    pool: /srv/images
    source: base.qcow2
    name: test.raw
    format: raw

- name: The disks of a whole class, in one task
  virtforge.libvirt.storage_volume_clone:
    pool: default
    source: debian-13.qcow2
    capacity: 40GiB
    volumes:
      - name: student1.qcow2
      - name: student2.qcow2
      - name: teacher.qcow2
        capacity: 100GiB
  register: disks

- name: A disk that is made in no time, over the golden image
  virtforge.libvirt.storage_volume_clone:
    pool: default
    source: debian-13.qcow2
    name: try1.qcow2
    clone_type: linked
    capacity: 40GiB

- name: Where they are
  ansible.builtin.debug:
    msg: "{{ disks.volumes | map(attribute='path') }}"

- name: A clone that leaves other guests their share of the disk, compared with its source
  virtforge.libvirt.storage_volume_clone:
    pool: isos
    source_path: /home/anna/netinst.iso
    name: verified.iso
    method: copy
    bwlimit: 50MiB
    verify: true

- name: A golden image from a web server, checked and unpacked
  virtforge.libvirt.storage_volume_clone:
    pool: default
    source_url: https://cloud.example.com/trixie/debian-13.qcow2.xz
    checksum: sha256:https://cloud.example.com/trixie/SHA256SUMS
    name: debian-13-golden.qcow2

- name: Disks from an image that is fetched once for all hosts' tasks and nights
  virtforge.libvirt.storage_volume_clone:
    pool: default
    source_url: https://cloud.example.com/trixie/debian-13.qcow2.xz
    cache_dir: /srv/cache
    capacity: 40GiB
    volumes:
      - name: cloud1.qcow2
      - name: cloud2.qcow2

- name: A golden image in Ceph, from a file
  virtforge.libvirt.storage_volume_clone:
    pool: ceph
    source_path: /var/lib/libvirt/images/debian-13.qcow2
    name: debian-13

- name: A disk over the golden image in Ceph, made in no time
  virtforge.libvirt.storage_volume_clone:
    pool: ceph
    source: debian-13
    name: web1
    clone_type: linked
    capacity: 40GiB

- name: A LUN of an iSCSI target filled from the golden image, whatever it holds
  virtforge.libvirt.storage_volume_clone:
    pool: luns
    name: "unit:0:0:1"
    source_path: /var/lib/libvirt/images/debian-13.qcow2
    compare: content
    force: true

- name: The clone that a volume's own XML describes
  virtforge.libvirt.storage_volume_clone:
    pool: fast
    source_pool: default
    source: base.qcow2
    xml: |
      <volume>
        <name>db1.qcow2</name>
        <capacity unit='GiB'>100</capacity>
        <target><format type='qcow2'/></target>
      </volume>
"""

RETURN = r"""
actions:
  description: What was done, or would be done, to any of the volumes. Empty when all was as stated.
  returned: success
  type: list
  elements: str
  sample: [created]
volume:
  description: The volume. Sizes are in bytes.
  returned: success, without O(volumes)
  type: dict
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
      description: Its format.
      type: str
      returned: success
      sample: qcow2
    capacity:
      description: What a guest sees.
      type: int
      returned: success
      sample: 42949672960
    allocation:
      description: What it occupies. Null in check mode for a volume that would be made.
      type: int
      returned: success
      sample: 1073741824
    physical:
      description: Length of the file or device. Null in check mode for a volume that would be made.
      type: int
      returned: success
      sample: 1074135040
    backing:
      description:
        - Its backing store with C(path) as recorded, C(format) and C(depth), null for a volume that stands alone.
        - The depth is the number of images below it, null where one of them is gone, or lies outside the pools of the task.
      type: dict
      returned: success
      sample:
        path: /var/lib/libvirt/images/debian-13.qcow2
        format: qcow2
        depth: 1
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
    changed:
      description: Whether anything was done to it.
      type: bool
      returned: success
      sample: true
    actions:
      description: What was done to it, of C(created), C(grown), C(replaced) and C(permissions).
      type: list
      elements: str
      returned: success
      sample: [created]
    transfer:
      description:
        - How the data got there, C(reflink), C(copy), C(convert), C(link) or C(libvirt). Null when nothing was made.
        - C(convert) for each full clone to a device or a volume on the network.
      type: str
      returned: success
      sample: reflink
    shared:
      description: Whether it shares blocks with another file. Null where that cannot be told, or nothing was made.
      type: bool
      returned: success
      sample: true
    fallback_reason:
      description: Why blocks were not shared.
      type: str
      returned: success
      sample: source and target are on different file systems
    dropped:
      description: What of the source a conversion could not carry over, of C(snapshots) and C(bitmaps).
      type: list
      elements: str
      returned: success
      sample: []
    duration:
      description: Seconds that it took.
      type: float
      returned: success
      sample: 0.041
    error_code:
      description: Null.
      type: str
      returned: success
    msg:
      description: Null.
      type: str
      returned: success
volumes:
  description:
    - The volumes in the order of O(volumes), each as RV(volume).
    - C(error_code) and C(msg) of one that failed say why. What is not known of it is null.
  returned: with O(volumes), also on failure
  type: list
  elements: dict
source:
  description: The source. What was not looked at is null.
  returned: success
  type: dict
  contains:
    pool:
      description: Its pool, null for one that is in none.
      type: str
      returned: success
      sample: default
    name:
      description: Its name in that.
      type: str
      returned: success
      sample: debian-13.qcow2
    path:
      description: Its path, or the URL without passwords and queries.
      type: str
      returned: success
      sample: /var/lib/libvirt/images/debian-13.qcow2
    format:
      description: Its format, of a compressed image that of what is inside.
      type: str
      returned: success
      sample: qcow2
    capacity:
      description: What a guest sees of it, in bytes.
      type: int
      returned: success
      sample: 2147483648
    cache:
      description: V(hit) or V(miss) where an image was looked for in O(cache_dir), else null.
      type: str
      returned: success
      sample: hit
diff:
  description:
    - The volume C(before) and C(after), with the values that the task is about.
    - With O(volumes), a list of these for all that change.
  returned: success
  type: raw
error_code:
  description:
    - Kind of failure, after libvirt's own where it has one.
    - One of V(NO_STORAGE_POOL), V(NO_STORAGE_VOL), V(STORAGE_VOL_EXIST), V(NO_SUPPORT), V(OPERATION_DENIED),
      V(OPERATION_INVALID), V(XML_ERROR), V(INVALID_ARG), V(CONFIG_UNSUPPORTED), V(NO_SPACE), V(IN_USE), V(DIFFERS),
      V(TIMEOUT), V(IO_ERROR), V(MISSING_DEPENDENCY), V(UNSAFE_IMAGE), V(CORRUPT_IMAGE) and V(CHECKSUM_MISMATCH).
  returned: failure
  type: str
  sample: DIFFERS
"""

import typing as t

from ..module_utils import _argspec
from ..module_utils._clone import executor, many, request
from ..module_utils._module import Module, respawn_for_pools, run

ARGUMENT_SPEC: t.Dict[str, t.Dict[str, t.Any]] = {
    **_argspec.URI,
    "pool": {"type": "str", "required": True},
    "name": {"type": "str", "aliases": ["volume"]},
    "xml": {"type": "str"},
    "volumes": {
        "type": "list",
        "elements": "dict",
        "options": {
            "name": {"type": "str", "required": True},
            "capacity": {"type": "str"},
            "format": {"type": "str"},
            **_argspec.OWNERSHIP,
            "xml": {"type": "str"},
        },
    },
    "source": {"type": "str", "aliases": ["clone_source", "source_volume"]},
    "source_path": {"type": "path"},
    **_argspec.OUTSIDE,
    "source_pool": {"type": "str"},
    "source_format": {"type": "str"},
    "clone_type": {"type": "str", "choices": ["full", "linked"]},
    "format": {"type": "str"},
    "capacity": {"type": "str", "aliases": ["size"]},
    "allow_shrink": {"type": "bool", "default": False},
    **_argspec.LAYOUT,
    "method": {"type": "str", "choices": ["auto", "reflink", "copy", "libvirt"], "default": "auto"},
    "resize": {"type": "bool", "default": True},
    "compare": {"type": "str", "choices": ["metadata", "content"], "default": "metadata"},
    "force": {"type": "bool", "default": False},
    **_argspec.OWNERSHIP,
    "seuser": {"type": "str"},
    "serole": {"type": "str"},
    "setype": {"type": "str"},
    "selevel": {"type": "str"},
    "source_in_use": {"type": "str", "choices": ["fail", "wait"], "default": "fail"},
    **_argspec.PATIENCE,
    "max_capacity": {"type": "str", "default": "64TiB"},
    "bwlimit": {"type": "str"},
    "verify": {"type": "bool", "default": False},
}
CONDITIONS: t.Dict[str, t.Any] = {
    "mutually_exclusive": [["source", "source_path", "source_url"], ["volumes", "name"], ["volumes", "xml"]],
    "required_one_of": [["source", "source_path", "source_url"]],
    "required_by": {"cache_dir": ["source_url"], "client_key": ["client_cert"]},
}


def check(params: t.Mapping[str, t.Any], on_host: bool = True) -> t.List[request.Request]:
    """What the task asks for, or a refusal."""
    if params["volumes"] is not None:
        return request.many_from_parameters(params, on_host)
    return [request.from_parameters(params, on_host)]


def clone(params: t.Mapping[str, t.Any], check_mode: bool) -> t.Dict[str, t.Any]:
    xml = [params["xml"], *(entry["xml"] for entry in params["volumes"] or ())]
    respawn_for_pools([params["pool"], params["source_pool"]], any(document is not None for document in xml))
    requests = check(params)
    return executor.run(requests[0], check_mode) if params["volumes"] is None else many.run(requests, check_mode)


def main() -> None:
    run(Module(argument_spec=ARGUMENT_SPEC, supports_check_mode=True, **CONDITIONS), clone)


if __name__ == "__main__":
    main()
