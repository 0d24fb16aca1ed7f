# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""LUNs of an iscsi-direct pool: qemu-img reaches them by libiscsi, and there is no device of this host."""

from __future__ import annotations

import json
import re
import typing as t

from .._errors import CloneError
from .._images import qemu_img
from .._images.qemu_img import Layer, QemuImg, key_of
from .devices import Device
from .libvirt import libvirt_module, translated
from .network import NetworkPool, as_base64, memory


class IscsiDirectPool(NetworkPool):
    """LUNs that exist: nothing is made, grown or deleted there."""

    secret_type = 3  # VIR_SECRET_USAGE_TYPE_ISCSI

    @property
    def portal(self) -> str:
        host, port = self.access.hosts[0]
        return f"{f'[{host}]' if ':' in host else host}:{port or 3260}"

    def path_of(self, name: str) -> str:
        """As libvirt has it (``virISCSIDirectVolumeSetup…`` in storage_backend_iscsi_direct.c)."""
        return self._path(name) or name

    def _path(self, name: str) -> t.Optional[str]:
        libvirt = libvirt_module()
        with translated(f"looking up volume {name!r} of pool {self.name!r}"):
            try:
                # Its XMLDesc would have libvirt talk to the server.
                return t.cast(str, self._pool.storageVolLookupByName(name).path())
            except libvirt.libvirtError as exc:
                if exc.get_error_code() != libvirt.VIR_ERR_NO_STORAGE_VOL:
                    raise
        return None

    def volume(self, name: str) -> t.Optional[Device]:
        path = self._path(name)
        if path is None:
            return None
        with self.opened(Device(name, path, 0), name) as layer:
            # libvirt says one block less than there is (9.0: it takes the last block's number for their count).
            what = f"volume {name!r} of pool {self.name!r}"
            out = QemuImg().run(
                qemu_img.info(layer), {layer.fd: what}, f"looking at {what}", lambda: self.deadline.check(f"looking at {what}")
            )[1]
        return Device(name, path, int(json.loads(out)["virtual-size"]), identity=("iscsi", self.portal, self._target, path))

    @property
    def _target(self) -> str:
        return self.access.devices[0]

    def layer(self, volume: Device) -> Layer:
        unit = re.search("-lun-([0-9]+)$", volume.path)
        if unit is None:
            raise CloneError("NO_SUPPORT", f"volume {volume.name!r} of pool {self.name!r}: {volume.path!r} names no unit")
        access = self.access
        fd = memory(as_base64(self.key()) if access.user else b"")
        node: t.Dict[str, t.Any] = {
            "driver": "iscsi",
            "transport": "tcp",
            "portal": self.portal,
            "target": self._target,
            "lun": int(unit.group(1)),
        }
        if access.initiator:
            node["initiator-name"] = access.initiator
        if access.user:
            node.update({"user": access.user, "password-secret": key_of(fd)})
        return Layer(fd, "raw", network=node)

    def users(self, name: str) -> str:
        """Running domains; what other initiators do, the server does not tell."""
        return self._domains(name, writing=False)

    def writers(self, name: str) -> str:
        return self._domains(name, writing=True)

    def _domains(self, name: str, writing: bool) -> str:
        unit = (self._path(name) or "").rpartition("-lun-")[2]
        paths = {name: f"{self._target}/{unit}"}
        return self._connection.users_of_network("iscsi", paths, self.access.hosts, self.name, writing)[name]
