# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Options that several modules have. Their documentation is in plugins/doc_fragments/options.py."""

from __future__ import annotations

import typing as t

from ansible.module_utils.basic import env_fallback

Spec = t.Dict[str, t.Dict[str, t.Any]]

URI: Spec = {"uri": {"type": "str", "default": "qemu:///system", "fallback": (env_fallback, ["LIBVIRT_DEFAULT_URI"])}}

OWNERSHIP: Spec = {"owner": {"type": "str"}, "group": {"type": "str"}, "mode": {"type": "raw"}}

#: how a new volume is laid out
LAYOUT: Spec = {
    "preallocation": {"type": "str", "choices": ["off", "metadata", "falloc", "full"], "default": "off"},
    "qcow2": {
        "type": "dict",
        "options": {
            "compat": {"type": "str", "choices": ["0.10", "1.1"]},
            "cluster_size": {"type": "str"},
            "lazy_refcounts": {"type": "bool"},
            "extended_l2": {"type": "bool"},
            "compression_type": {"type": "str", "choices": ["zlib", "zstd"]},
            "refcount_bits": {"type": "int", "choices": [1, 2, 4, 8, 16, 32, 64]},
            "nocow": {"type": "bool"},
        },
    },
}

#: how long to wait
PATIENCE: Spec = {"lock_timeout": {"type": "int", "default": 300}, "timeout": {"type": "int"}}

#: a source that comes from outside; the connection as in ansible.builtin.get_url and uri
OUTSIDE: Spec = {
    "source_url": {"type": "str"},
    "checksum": {"type": "str"},
    "source_compression": {"type": "str", "choices": ["none", "gzip", "bzip2", "xz", "zstd"]},
    "cache_dir": {"type": "path"},
    "url_username": {"type": "str"},
    "url_password": {"type": "str", "no_log": True},
    "force_basic_auth": {"type": "bool", "default": False},
    "headers": {"type": "dict"},
    "client_cert": {"type": "path"},
    "client_key": {"type": "path"},
    "ca_path": {"type": "path"},
    "validate_certs": {"type": "bool", "default": True},
    "use_proxy": {"type": "bool", "default": True},
    "url_timeout": {"type": "int", "default": 300},
}
