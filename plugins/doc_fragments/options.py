# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Options that several modules of this collection have. Their specs are in plugins/module_utils/_argspec.py."""

from __future__ import annotations


class ModuleDocFragment:
    """Documentation of shared options, in parts."""

    # The connection: every module has it.
    DOCUMENTATION = r"""
options:
  uri:
    description:
      - Connection to libvirt on the managed host. Not used for directory pools.
      - With a host in it, or a transport other than a local socket, as in V(qemu+ssh://root@kvm2.example.com/system), the pools
        are those of that host. Only libvirt's own calls reach them. They do less, they are not safe against a crash, and what
        they cannot do fails with C(NO_SUPPORT), see the guide on connections to another host.
      - Taken from the environment variable E(LIBVIRT_DEFAULT_URI) where not stated.
    type: str
    default: qemu:///system
"""

    LAYOUT = r"""
options:
  preallocation:
    description:
      - How much of the new volume is backed by storage at once. For raw V(falloc) and V(full), for qcow2 all of them.
    type: str
    choices: ['off', metadata, falloc, full]
    default: 'off'
  qcow2:
    description:
      - Options of a new volume of the format qcow2. What is not stated is as in the source, or QEMU's default without one.
    type: dict
    suboptions:
      compat:
        description: Version of the format, V(0.10) for QEMU before 1.1.
        type: str
        choices: ['0.10', '1.1']
      cluster_size:
        description: Size of a cluster, with units or in bytes. A power of two from 512 bytes to 2 MiB.
        type: str
      lazy_refcounts:
        description: Whether reference counts are updated late.
        type: bool
      extended_l2:
        description: Whether clusters are divided into subclusters.
        type: bool
      compression_type:
        description: Compression of compressed clusters.
        type: str
        choices: [zlib, zstd]
      refcount_bits:
        description: Width of a reference count.
        type: int
        choices: [1, 2, 4, 8, 16, 32, 64]
      nocow:
        description: Whether the file is exempt from copy-on-write, on btrfs.
        type: bool
"""

    PATIENCE = r"""
options:
  lock_timeout:
    description:
      - Seconds to wait for another run to finish with the same volume, and for libvirt's jobs in the pool.
    type: int
    default: 300
  timeout:
    description:
      - Seconds after which the task gives up and leaves no volume. Without it there is no limit.
    type: int
"""

    OUTSIDE = r"""
options:
  source_url:
    description:
      - URL of an image to clone, V(http), V(https) or V(file), fetched on the managed host. A C(file) URL is the same as
        O(source_path).
      - The server is asked only if something must be copied. A volume that exists is judged on the format and capacity that are
        stated, and where none are stated it is left as it is. O(compare=content) fetches the image each time.
      - The image is staged in the pool, or in O(cache_dir), without a name, so that the volume can share its blocks. For pools
        without files, and those of another host, it is staged in C(/var/tmp) of the managed host, or in the directory that the
        environment variable E(TMPDIR) names. It is refused where it does not fit, and as soon as it turns out not to.
      - An image that has a backing store is refused, and so is an archive.
      - In a check run only the header is asked for, so format and capacity are not known where they are not stated.
      - Redirections are followed to V(http) and V(https), and to no other server with what identifies this one.
    type: str
  checksum:
    description:
      - Checksum of what O(source_url) or O(source_path) names, as it is there, as M(ansible.builtin.get_url) takes it.
      - An algorithm and hexadecimal digits, V(sha256:9f86d08...), or an algorithm and the URL of a list as C(sha256sum) writes
        it, V(sha512:https://cloud.example.com/SHA512SUMS). The list has to name the file as the URL or path does.
      - Looked at where something is copied. Where it is another one nothing is made, nothing is unpacked, and nothing is kept.
    type: str
  source_compression:
    description:
      - How the image that O(source_url) or O(source_path) names is compressed. Without it the first bytes tell, whatever the
        name is.
      - V(none) takes the bytes as they are. Where this is not stated, so it is for a block device, and for O(source_path) with
        O(source_format=raw).
      - V(zstd) needs the program C(zstd) on the managed host.
    type: str
    choices: [none, gzip, bzip2, xz, zstd]
  cache_dir:
    description:
      - Directory of the managed host in which images of O(source_url) are kept, unpacked. Made where it is missing.
      - With O(checksum), an image that is there is used without asking the server for it. Without, the server is asked whether
        it has another one; an image for which it sends neither C(ETag) nor C(Last-Modified) is not cached.
      - Of many tasks that want the same image, one fetches it. RV(source.cache) tells which.
      - Nothing is ever removed from it. On the file system of the pool, volumes can share the blocks of what is in it.
    type: path
  url_username:
    description: User name for the server of O(source_url). Not sent to another one.
    type: str
  url_password:
    description: Password for the server of O(source_url).
    type: str
  force_basic_auth:
    description: Whether user name and password are sent before the server asks for them.
    type: bool
    default: false
  headers:
    description: Headers for the server of O(source_url). Not sent to another one.
    type: dict
  client_cert:
    description: PEM file with a certificate that identifies this host to the server, and maybe its key.
    type: path
  client_key:
    description: PEM file with the key of O(client_cert).
    type: path
  ca_path:
    description: PEM file with the certificates of those who vouch for the server.
    type: path
  validate_certs:
    description: Whether the certificate of the server has to be valid.
    type: bool
    default: true
  use_proxy:
    description: Whether the proxy that the environment of the managed host names is used.
    type: bool
    default: true
  url_timeout:
    description: Seconds that the server may be silent. How long all of it may take, O(timeout) says.
    type: int
    default: 300
"""
