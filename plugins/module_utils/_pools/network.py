# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Pools of libvirt whose volumes are reached by the network, without a device of this host: rbd and iscsi-direct.

qemu-img moves the data. libvirt is asked for the pool's definition and its secret, which it answers from memory; what makes it
talk to the storage, which may never answer, is done by a process that can be ended.
"""

from __future__ import annotations

import base64
import os
import sys
import typing as t
from abc import ABC, abstractmethod
from contextlib import contextmanager

from .. import _process, _xml
from .._deadline import Deadline
from .._errors import CloneError
from .._images.qemu_img import Layer
from .devices import Device, DevicePool
from .libvirt import is_busy, libvirt_module

_REFRESH = """
import sys, libvirt
libvirt.registerErrorHandler(lambda _context, _error: None, None)
try:
    pool = libvirt.open(sys.argv[1]).storagePoolLookupByName(sys.argv[2])
    try:
        pool.refresh(0)
    except libvirt.libvirtError:
        # A refresh that fails leaves a pool inactive that was active before; starting it looks again too.
        if pool.isActive():
            raise
        pool.create(0)
except libvirt.libvirtError as exc:
    sys.exit(exc.get_error_message())
"""


class NetworkPool(DevicePool, ABC):
    """A pool whose volumes only qemu-img and programs of their own can read."""

    volume_type = "network"
    #: VIR_SECRET_USAGE_TYPE of its secret
    secret_type = 0
    #: when the task has to be over
    deadline = Deadline(None, "timeout")
    _access: t.Optional[_xml.NetworkXML] = None
    _key: t.Optional[bytes] = None

    @property
    def access(self) -> _xml.NetworkXML:
        """How it is reached, as the running pool has it."""
        if self._access is None:
            self._access = _xml.pool_network(self.document())
        return self._access

    def key(self) -> bytes:
        """The value of the pool's secret, as libvirt has it.

        :raises CloneError: where this connection cannot have it
        """
        if self._key is None:
            self._key = self._read_secret()
        return self._key

    def _read_secret(self) -> bytes:
        libvirt = libvirt_module()
        access, handle = self.access, self._connection.handle
        called = access.secret_uuid or access.secret_usage
        what = f"pool {self.name!r}: its secret {called!r}"
        try:
            if access.secret_uuid:
                secret = handle.secretLookupByUUIDString(access.secret_uuid)
            else:
                secret = handle.secretLookupByUsage(self.secret_type, access.secret_usage or "")
            return t.cast(bytes, secret.value(0))
        except libvirt.libvirtError as exc:
            code, text = exc.get_error_code(), " ".join(exc.get_error_message().split())
            if code == libvirt.VIR_ERR_NO_SUPPORT:
                raise CloneError(
                    "NO_SUPPORT",
                    f"{what} cannot be read at {self._connection.uri}, which has no secrets; state uri qemu:///system",
                ) from exc
            if code == libvirt.VIR_ERR_INVALID_SECRET:
                raise CloneError(
                    "OPERATION_DENIED", f"{what} is private: only libvirt may read it; define it anew with private='no'"
                ) from exc
            if code == libvirt.VIR_ERR_NO_SECRET:
                raise CloneError(
                    "OPERATION_INVALID", f"{what} cannot be read: {text}; set it by virsh secret-set-value"
                ) from exc
            raise CloneError("OPERATION_DENIED", f"{what} cannot be read: {text}") from exc

    def contains(self, path: str) -> bool:
        return False

    def dependents(self, name: str) -> t.List[str]:
        return []

    def cannot_write(self) -> str:
        return ""

    @abstractmethod
    def layer(self, volume: Device) -> Layer:
        """The volume as qemu-img reaches it. Whoever asks closes its descriptor."""

    @contextmanager
    def opened(self, volume: Device, what: str) -> t.Iterator[Layer]:
        layer = self.layer(volume)
        try:
            yield layer
        finally:
            os.close(layer.fd)

    @abstractmethod
    def users(self, name: str) -> str:
        """Who has the volume open for writing, as a phrase; empty when nobody has."""

    @abstractmethod
    def writers(self, name: str) -> str:
        """Who may be writing to a volume that is read: for a source, where other readers do not count."""

    def users_by_name(self, volumes: t.Sequence[Device]) -> t.Dict[str, t.List[str]]:
        users = {volume.name: self.users(volume.name) for volume in volumes}
        return {name: [who] if who else [] for name, who in users.items()}

    def dependents_among(self, volumes: t.Sequence[Device]) -> t.Dict[str, t.List[str]]:
        found = {volume.name: self.dependents(volume.name) for volume in volumes}
        return {name: dependents for name, dependents in found.items() if dependents}

    def is_unfinished(self, volume: Device) -> bool:
        """Only who is about to fill it reads a volume on the network."""
        return False

    def changes(self, volume: t.Optional[Device]) -> t.Tuple[str, ...]:
        """Something that is another when the volume was written to since it was looked at, as far as that can be told."""
        return ()

    def refresh(self, deadline: Deadline) -> None:
        command = [sys.executable, "-c", _REFRESH, self._connection.uri, self.name]
        doing = f"refreshing pool {self.name!r}"

        def attempt() -> bool:
            status, _out, err = _process.run(command, (), lambda: deadline.check(doing), env=os.environ)
            if status and not is_busy(err):
                raise CloneError("IO_ERROR", f"{doing} failed: {' '.join(err.split())}")
            return not status

        deadline.wait_for(attempt, f"waiting for the jobs of pool {self.name!r}, after which libvirt sees what was done,")


def memory(content: bytes) -> int:
    """A file in memory, without a name, with this content."""
    fd = os.memfd_create("virtforge", os.MFD_CLOEXEC)
    try:
        os.write(fd, content)
    except BaseException:
        os.close(fd)
        raise
    return fd


def as_base64(value: bytes) -> bytes:
    return base64.b64encode(value)
