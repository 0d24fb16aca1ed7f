# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Secrets of libvirt that pools authenticate with.

Those made here are not private: libvirt tells the value of one that is to nobody (``secretGetValue`` in secret_driver.c), so
that no run could see whether it is as stated. One that is not private is told only to those who may do everything anyway: a
read-only connection may not ask (``virSecretGetValue``). No value is ever in a message or an exception.
"""

from __future__ import annotations

import base64
import binascii
import typing as t

from .. import _xml
from .._errors import CloneError
from .definition import Auth
from .libvirt import Connection, libvirt_module, translated

# By the type of pool_source.auth: that of the secret's usage, its number for libvirt, and the element with its name.
_USAGES = {"ceph": ("ceph", "VIR_SECRET_USAGE_TYPE_CEPH", "name"), "chap": ("iscsi", "VIR_SECRET_USAGE_TYPE_ISCSI", "target")}


def made_up_usage(pool: str) -> str:
    """Name of the secret of a pool for which nobody stated one; the same on each run."""
    return f"virtforge:{pool}"


def value_of(password: str, kind: str) -> bytes:
    """The bytes that libvirt keeps. It gives Ceph's library their base64, which is what Ceph calls the key.

    :raises CloneError: ``INVALID_ARG``
    """
    if kind != "ceph":
        return password.encode("utf-8", "surrogateescape")
    try:
        return base64.b64decode(password.strip(), validate=True)
    except (binascii.Error, ValueError):
        raise CloneError(
            "INVALID_ARG", 'pool_source.auth.password: it is no key of Ceph, as "ceph auth get-key" prints one, which is base64'
        ) from None


class Secret:
    """The secret that an ``auth`` names, which may not exist."""

    def __init__(self, connection: Connection, auth: Auth) -> None:
        self._connection = connection
        self._auth = auth
        self._usage = _USAGES.get(auth.type or "", _USAGES["chap"])
        self._named = auth.secret_uuid or auth.secret_usage or ""
        self._secret = self._find()

    @property
    def exists(self) -> bool:
        return self._secret is not None

    def _find(self) -> t.Any:
        libvirt = libvirt_module()
        with translated(f"looking up the secret {self._named!r}"):
            try:
                if self._auth.secret_uuid is not None:
                    return self._connection.handle.secretLookupByUUIDString(self._auth.secret_uuid)
                return self._connection.handle.secretLookupByUsage(getattr(libvirt, self._usage[1]), self._named)
            except libvirt.libvirtError as exc:
                if exc.get_error_code() == libvirt.VIR_ERR_NO_SECRET:
                    return None
                if exc.get_error_code() == libvirt.VIR_ERR_NO_SUPPORT:
                    raise CloneError(
                        "NO_SUPPORT", f"pool_source.auth: {self._connection.uri} has no secrets; use qemu:///system (uri)"
                    ) from exc
                raise

    def is_private(self) -> bool:
        return self._secret is not None and self._document().get("private") == "yes"

    def value(self) -> t.Optional[bytes]:
        """None where it has none."""
        libvirt = libvirt_module()
        if self._secret is None:
            return None
        with translated(f"reading the secret {self._named!r}"):
            try:
                return t.cast(bytes, self._secret.value())
            except libvirt.libvirtError as exc:
                if exc.get_error_code() != libvirt.VIR_ERR_NO_SECRET:
                    raise
        return None

    def is_made_for(self, pool: str) -> bool:
        return self._secret is not None and _xml.text_of(self._document(), "description") == _mark(pool)

    def users(self, pool: str) -> bool:
        """Whether a domain, or another pool than this, names it."""
        if self._secret is None:
            return False
        root = self._document()
        names = {self._secret.UUIDString(), _xml.text_of(_xml.child(root, "usage"), self._usage[2])}
        return any(names & _named_in(document) for document in self._connection.documents(but=pool))

    def _document(self) -> t.Any:
        with translated(f"looking at the secret {self._named!r}"):
            return _xml.parse(self._secret.XMLDesc(0), "secret")

    def make(self, pool: str) -> None:
        etree = _xml.etree_module()
        root = etree.Element("secret", ephemeral="no", private="no")
        etree.SubElement(root, "description").text = _mark(pool)
        if self._auth.secret_uuid is not None:
            etree.SubElement(root, "uuid").text = self._auth.secret_uuid
        usage = etree.SubElement(root, "usage", type=self._usage[0])
        etree.SubElement(usage, self._usage[2]).text = self._auth.secret_usage or made_up_usage(pool)
        with translated(f"making the secret {self._named!r}"):
            self._secret = self._connection.handle.secretDefineXML(etree.tostring(root, encoding="unicode"), 0)

    def set(self, value: bytes) -> None:
        with translated(f"setting the secret {self._named!r}"):
            self._secret.setValue(value, 0)

    def remove(self) -> None:
        with translated(f"removing the secret {self._named!r}"):
            self._secret.undefine()
        self._secret = None


def _mark(pool: str) -> str:
    return f"Made by virtforge.libvirt for the pool {pool}"


def _named_in(document: str) -> t.Set[t.Optional[str]]:
    """UUIDs and usages of the secrets that a pool or a domain names."""
    root = _xml.etree_module().fromstring(document)
    return {element.get(name) for element in root.iter("secret") for name in ("uuid", "usage")} - {None}
