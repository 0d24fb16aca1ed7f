# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""librbd in a process of its own: a call to a cluster that does not answer never returns, but a process can be ended.

Run by :mod:`.rbd` with the path of a ceph.conf and the name of a user. Requests come in as lines of JSON,
``[operation, arguments…]``, and each is answered by a line, ``{"done": …}`` or ``{"errno": …, "text": …}``. Two connections
serve them all: the ``rbd`` program takes a tenth of a second each time. Nothing of this collection is imported here.
"""

from __future__ import annotations

import calendar
import errno
import json
import sys
import time
import typing as t

_NO_POOL = "no_pool"
# Seconds for one to give an image its name.
_LOCK = 60


class Cluster:
    """What can be asked for. A place is the name of a pool of Ceph and of a namespace in it, which may be empty."""

    def __init__(self, conf: str, user: str) -> None:
        import rados  # type: ignore[import-not-found,unused-ignore]  # pylint: disable=import-outside-toplevel
        import rbd  # type: ignore[import-not-found,unused-ignore]  # pylint: disable=import-outside-toplevel

        self.error = (rados.Error, rbd.Error)
        self._rbd = rbd
        described = {"conffile": conf, **({"rados_id": user} if user else {})}
        # Most of what is asked only looks. With more than one thread, the end of closing a linked clone runs beside the opening
        # of the next image, in memory that is no longer its own: in Ceph 16.2.15 one run in fifty ended so on a busy host.
        self._looking = rados.Rados(**described)
        self._looking.conf_set("librados_thread_count", "1")
        # With one alone, removing the protection of a snapshot waits for itself: it asks for the list of pools in that thread.
        self._changing = rados.Rados(**described)
        self._can_change = False

    def connect(self) -> None:
        self._looking.connect()

    def _in(self, place: t.Sequence[str], changing: bool) -> t.Any:
        pool, namespace = place
        connection = self._changing if changing else self._looking
        if changing and not self._can_change:
            connection.connect()
            self._can_change = True
        try:
            context = connection.open_ioctx(pool)
        except self.error as exc:
            raise KeyError(pool) from exc
        context.set_namespace(namespace)
        return context

    def _image(self, place: t.Sequence[str], name: str, snapshot: t.Optional[str] = None, writable: bool = False) -> t.Any:
        # Only who opens it for writing is a watcher.
        return self._rbd.Image(self._in(place, writable), name, snapshot=snapshot, read_only=not writable)

    def names(self, place: t.Sequence[str]) -> t.List[str]:
        return list(self._rbd.RBD().list(self._in(place, False)))

    def available(self) -> int:
        return int(self._looking.get_cluster_stats()["kb_avail"]) * 1024

    def info(self, place: t.Sequence[str], name: str) -> t.Dict[str, t.Any]:
        with self._image(place, name) as image:
            try:
                above = image.get_parent_image_spec()
                parent = [above["pool_name"], above["pool_namespace"], above["image_name"], above["snap_name"]]
            except self._rbd.ImageNotFound:
                parent = None
            return {
                "size": image.size(),
                "id": image.id(),
                "layering": bool(image.features() & self._rbd.RBD_FEATURE_LAYERING),
                "fast_diff": bool(image.features() & self._rbd.RBD_FEATURE_FAST_DIFF),
                "created": calendar.timegm(image.create_timestamp().timetuple()),
                "modified": calendar.timegm(image.modify_timestamp().timetuple()),
                "parent": parent,
            }

    def used(self, place: t.Sequence[str], name: str) -> int:
        found = []

        def add(_offset: int, length: int, exists: bool) -> None:
            found.append(length if exists else 0)

        with self._image(place, name) as image:
            image.diff_iterate(0, image.size(), None, add, include_parent=False, whole_object=True)
        return sum(found)

    def watchers(self, place: t.Sequence[str], name: str) -> t.List[str]:
        with self._image(place, name) as image:
            return self._watching(image)

    def writers(self, place: t.Sequence[str], name: str) -> t.List[str]:
        """Watchers, but for those of an image whose lock nobody has: the first write takes it, and reading does not."""
        with self._image(place, name) as image:
            found = self._watching(image)
            if not found or not image.features() & self._rbd.RBD_FEATURE_EXCLUSIVE_LOCK:
                return found
            # Without an owner it is an empty list.
            locked = image.list_lockers()
            return found if locked and locked["lockers"] else []

    @staticmethod
    def _watching(image: t.Any) -> t.List[str]:
        return [watcher["addr"] for watcher in image.watchers_list()]

    def create(self, place: t.Sequence[str], name: str, size: int) -> None:
        self._rbd.RBD().create(self._in(place, True), name, size)

    def clone(self, place: t.Sequence[str], name: str, snapshot: str, to: t.Sequence[str], child: str) -> None:
        self._rbd.RBD().clone(self._in(place, True), name, snapshot, self._in(to, True), child)

    def rename(self, place: t.Sequence[str], name: str, other: str) -> None:
        """One at a time: librbd looks whether a name is taken and then takes it; two at once may both have it (Ceph 16.2)."""
        context = self._in(place, True)
        while True:
            try:
                # On what every rbd pool has. Of a client that dies it ends by itself.
                context.lock_exclusive("rbd_directory", "virtforge", name, duration=_LOCK)
                break
            except self.error as exc:
                if getattr(exc, "errno", 0) != errno.EBUSY:
                    raise
                time.sleep(0.05)
        try:
            self._rbd.RBD().rename(context, name, other)
        finally:
            context.unlock("rbd_directory", "virtforge", name)

    def resize(self, place: t.Sequence[str], name: str, size: int) -> None:
        """Only growth: an image that is larger by now is left as it is."""
        with self._image(place, name, writable=True) as image:
            image.resize(size, False)

    def remove(self, place: t.Sequence[str], name: str) -> None:
        self._rbd.RBD().remove(self._in(place, True), name)

    def flatten(self, place: t.Sequence[str], name: str) -> None:
        with self._image(place, name, writable=True) as image:
            image.flatten()

    def children(self, place: t.Sequence[str], name: str, snapshot: t.Optional[str]) -> t.List[t.List[str]]:
        """Of one snapshot or of all: pool, namespace and name of each, those in the trash too."""
        with self._image(place, name, snapshot) as image:
            return [[child["pool"], child["pool_namespace"], child["image"]] for child in image.list_children2()]

    def snapshots(self, place: t.Sequence[str], name: str) -> t.List[t.Dict[str, t.Any]]:
        """Those that somebody has made, as opposed to those that Ceph keeps in its trash."""
        with self._image(place, name) as image:
            return [
                {"id": one["id"], "name": one["name"], "size": one["size"]}
                for one in image.list_snaps()
                if one["namespace"] == self._rbd.RBD_SNAP_NAMESPACE_TYPE_USER
            ]

    def snap(self, place: t.Sequence[str], name: str, snapshot: str) -> None:
        with self._image(place, name, writable=True) as image:
            image.create_snap(snapshot)

    def protect(self, place: t.Sequence[str], name: str, snapshot: str) -> None:
        with self._image(place, name, writable=True) as image:
            if not image.is_protected_snap(snapshot):
                image.protect_snap(snapshot)

    def drop(self, place: t.Sequence[str], name: str, snapshot: str) -> None:
        with self._image(place, name, writable=True) as image:
            if image.is_protected_snap(snapshot):
                image.unprotect_snap(snapshot)
            image.remove_snap(snapshot)

    def changed_since(self, place: t.Sequence[str], name: str, snapshot: str) -> bool:
        found = []

        def note(_offset: int, _length: int, _exists: bool) -> None:
            found.append(True)

        with self._image(place, name) as image:
            image.diff_iterate(0, image.size(), snapshot, note, include_parent=True, whole_object=True)
        return bool(found)


def main(conf: str, user: str) -> None:
    try:
        cluster = Cluster(conf, user)
    except ImportError as exc:
        answers: t.Dict[str, t.Any] = {"missing": exc.name or "rbd"}
    else:
        answers = {}
    connected = False
    for line in sys.stdin:
        operation, *arguments = json.loads(line)
        answer = answers
        if operation != "ready" and not answers:
            try:
                if not connected:
                    cluster.connect()
                    connected = True
                answer = {"done": getattr(cluster, operation)(*arguments)}
            except KeyError as exc:
                answer = {_NO_POOL: exc.args[0]}
            except cluster.error as exc:
                answer = {"errno": getattr(exc, "errno", 0) or 0, "text": str(exc), "connected": connected}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:3])
