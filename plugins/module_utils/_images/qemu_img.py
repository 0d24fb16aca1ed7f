# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Command lines of qemu-img, and how one is run.

Every command names the format of every image, reaches files only through descriptors that are already open, and dies
with its parent. So no name is looked up twice, nothing is probed, and a killed task leaves no writer behind.
"""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import typing as t
from dataclasses import dataclass, replace

from .. import _process
from .._errors import CloneError
from .gate import refusal
from .probe import Image, Qcow2Features

# qemu's file-posix.c: 'Failed to get shared "write" lock'. The word alone would also match "block".
_LOCKED = re.compile(r'Failed to get (?:shared )?"[a-z ]+" lock')


# A node on the network, as Layer.node spells it out. Nothing else may connect to anything.
_NETWORK = re.compile(r'(?:"driver": "|driver=)(?:rbd|iscsi)\b')
# What fails for a reason that is not in the image.
_OF_THE_HOST = (errno.EIO, errno.EACCES, errno.EPERM, errno.EMFILE)
# Of its limit of memory: block/qcow2.c and others, and GLib, which aborts.
_TOO_LARGE = re.compile("[Cc]annot allocate memory|[Cc]ould not allocate|failed to allocate")

# Formats with a backing store, of which "null" says that there is none.
_BACKED = ("qcow2", "qed", "qcow", "vmdk")


@dataclass(frozen=True)
class Layer:
    """One open image file, or device, of a chain.

    ``size`` limits a raw layer to that many bytes (a multiple of 512) from ``offset`` on; None is all that follows.

    ``network`` is for what is no file here: qemu's options of that image. ``fd`` is then a file that holds its key, and no
    command line does: the options name it by its path, or by :func:`key_of` where qemu itself shall read it as a secret.
    """

    fd: int
    format: str
    block: bool = False
    size: t.Optional[int] = None
    offset: int = 0
    network: t.Optional[t.Mapping[str, t.Any]] = None

    @property
    def path(self) -> str:
        return f"/proc/self/fd/{self.fd}"

    @property
    def node(self) -> t.Dict[str, t.Any]:
        """What qemu opens, without what lies below it: ``BlockdevOptions`` of its block-core.json."""
        node: t.Dict[str, t.Any] = {"driver": self.format}
        if self.size is not None or self.offset:
            node["offset"] = self.offset
        if self.size is not None:
            node["size"] = self.size
        if self.network is not None:
            node["file"] = dict(self.network)
        else:
            node["file"] = {"driver": "host_device" if self.block else "file", "filename": self.path}
        return node


def key_of(fd: int) -> str:
    """The name that the content of an open file has as a secret of qemu's."""
    return f"key{fd}"


def _secrets(layers: t.Iterable[Layer]) -> t.List[str]:
    arguments = []
    for layer in layers:
        if layer.network is not None and key_of(layer.fd) in layer.network.values():
            arguments += ["--object", f"secret,id={key_of(layer.fd)},format=base64,file={layer.path}"]
    return arguments


def source_arguments(layers: t.Sequence[Layer]) -> t.List[str]:
    """How to name a source whose first layer is the topmost.

    A chain is spelled out layer by layer, and said to end where ours ends, so that no name which an image records is looked
    up by qemu: since our look at the header it could have come to say another thing, or the name to mean another file.
    """
    top = layers[0]
    if len(layers) == 1 and top.size is None and not top.offset and top.network is None and top.format not in _BACKED:
        return ["-f", top.format, top.path]
    return [*_secrets(layers), "json:" + json.dumps(source_node(layers))]


def source_node(layers: t.Sequence[Layer]) -> t.Dict[str, t.Any]:
    """A chain whose first layer is the topmost, for qemu."""
    node: t.Optional[t.Dict[str, t.Any]] = None
    for layer in reversed(layers):
        below, node = node, layer.node
        if below is not None or layer.format in _BACKED:
            node["backing"] = below
    return t.cast(t.Dict[str, t.Any], node)


def _flat(node: t.Mapping[str, t.Any], prefix: str = "") -> t.Iterator[str]:
    """Options in the syntax of ``--image-opts``, where a comma is written twice."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, (list, tuple)):
            yield from _flat({str(index): one for index, one in enumerate(value)}, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}={str(value).replace(',', ',,')}"


def creation_options(image_format: str, qcow2: t.Optional[Qcow2Features], preallocation: str) -> t.List[str]:
    """``-o`` for an image that is about to be made; nothing where qemu-img's own default is what was asked for."""
    options = []
    if image_format == "vpc":
        # Without it the capacity is rounded up to what a geometry of cylinders can express.
        options.append("force_size=on")
    if image_format == "qcow2" and qcow2 is not None:
        options += [
            f"compat={qcow2.compat}",
            f"cluster_size={qcow2.cluster_size}",
            f"lazy_refcounts={'on' if qcow2.lazy_refcounts else 'off'}",
        ]
        # Named only where they differ from the default: older versions of qemu-img do not know them.
        if qcow2.extended_l2:
            options.append("extended_l2=on")
        if qcow2.compression_type != "zlib":
            options.append(f"compression_type={qcow2.compression_type}")
        if qcow2.refcount_bits != 16:
            options.append(f"refcount_bits={qcow2.refcount_bits}")
    if preallocation != "off" and image_format == "qcow2":
        options.append(f"preallocation={preallocation}")
    return ["-o", ",".join(options)] if options else []


def create(target: Layer, options: t.List[str], capacity: int, backing: t.Optional[t.Tuple[str, str]] = None) -> t.List[str]:
    """``backing``: path and format that the image records of what lies below it. By ``-u`` qemu-img does not open that."""
    below = [] if backing is None else ["-u", "-b", backing[0], "-F", backing[1]]
    return ["create", "-q", "-f", target.format, *options, *below, target.path, str(capacity)]


def convert(
    layers: t.Sequence[Layer],
    target: Layer,
    options: t.List[str],
    exists: bool,
    share: bool = False,
    bwlimit: t.Optional[int] = None,
) -> t.List[str]:
    """Convert into a new image, or into one that ``create`` has just made and that so reads as zeros.

    ``share``: by ``-C``, copy_file_range(2), which XFS and btrfs do by sharing the blocks. It does not look for zeros.
    ``-W`` lets writes land out of order: a staged file has no reader that would mind. For raw and qcow2 only: QEMU's qed driver
    aborts on it (assertion "allocating_acb == NULL" in 7.2).
    """
    how = [*(["-C"] if share else []), *(["-W"] if target.format in ("raw", "qcow2") else [])]
    pace = [] if bwlimit is None or share else ["-r", str(bwlimit)]
    into = ["-n", "--target-is-zero"] if exists else options
    return ["convert", *how, *pace, *into, "-O", target.format, *source_arguments(layers), target.path]


def fill(
    source: t.Mapping[str, t.Any], layers: t.Sequence[Layer], target: Layer, zero: bool, bwlimit: t.Optional[int]
) -> t.List[str]:
    """Write ``source``, a node made of ``layers``, into a raw target that exists; ``zero`` says that the target reads as zeros.

    ``-t writeback``: what is written to a network has to be flushed when it is closed. Zeros are looked for in blocks of 4 KiB.
    """
    pace = [] if bwlimit is None else ["-r", str(bwlimit)]
    known = ["--target-is-zero"] if zero else []
    where = ["--target-image-opts", *_secrets([*layers, target])]
    into = ",".join(_flat(target.node))
    return ["convert", "-n", "-W", "-t", "writeback", *pace, *known, *where, "json:" + json.dumps(source), into]


def resize(layers: t.Sequence[Layer], capacity: int, preallocation: str) -> t.List[str]:
    """With what lies below: where that is longer than the image was, qemu has to write zeros over it."""
    extra = [] if preallocation == "off" else [f"--preallocation={preallocation}"]
    return ["resize", "-q", *extra, *source_arguments(layers), str(capacity)]


def amend_compat(layers: t.Sequence[Layer]) -> t.List[str]:
    return ["amend", "-q", "-o", "compat=1.1", *source_arguments(layers)]


def data_map(layer: Layer) -> t.List[str]:
    """Where in the file the data of an image that stands alone is."""
    return ["map", "--output=json", *source_arguments([layer])]


def check(layer: Layer) -> t.List[str]:
    return ["check", "-q", *source_arguments([layer])]


def info(layer: Layer) -> t.List[str]:
    """``-U``: an image that a domain has open can still be described."""
    if layer.network is not None:
        return ["info", "-U", "--output=json", *source_arguments([layer])]
    return ["info", "-U", "--output=json", "-f", layer.format, layer.path]


def compare(layers: t.Sequence[Layer], target: t.Sequence[Layer]) -> t.List[str]:
    nodes = ("json:" + json.dumps(source_node(side)) for side in (layers, target))
    return ["compare", "-q", "-U", *_secrets({layer.fd: layer for layer in (*layers, *target)}.values()), *nodes]


def compare_nodes(node: t.Mapping[str, t.Any], other: t.Mapping[str, t.Any], layers: t.Iterable[Layer]) -> t.List[str]:
    """Of two nodes made of ``layers``; says where the first difference is."""
    return ["compare", "-U", *_secrets(layers), *("json:" + json.dumps(side) for side in (node, other))]


def measure(layers: t.Sequence[Layer], target_format: str, options: t.List[str]) -> t.List[str]:
    return ["measure", "--output=json", *options, "-O", target_format, *source_arguments(layers)]


class QemuImg:
    """Runs qemu-img. ``names`` maps descriptors to what a person calls the file, for its error messages."""

    def __init__(self) -> None:
        self._program: t.Optional[str] = None

    @property
    def program(self) -> str:
        if self._program is None:
            self._program = _process.find("qemu-img")
        if self._program is None:
            raise CloneError(
                "MISSING_DEPENDENCY", "qemu-img is not installed (package qemu-utils on Debian, qemu-img on Fedora)"
            )
        return self._program

    def run(
        self,
        arguments: t.Sequence[str],
        names: t.Mapping[int, str],
        doing: str,
        watch: t.Callable[[], None] = lambda: None,
        quick: bool = False,
        file_limit: t.Optional[int] = None,
        accept: t.Sequence[int] = (0,),
    ) -> t.Tuple[int, str]:
        """Exit status and standard output.

        :param names: descriptors that the command may use, each with the name that a message gives it
        :param doing: start of the sentence should it fail: ``"converting volume 'x'"``
        :param watch: called five times a second while it runs; what it raises ends the command
        :param quick: limit its processor time too (for headers only: a conversion may take hours)
        :param file_limit: largest file in bytes that it may write
        """
        network = any(_NETWORK.search(argument) for argument in arguments)
        status, out, err = _process.run([self.program, *arguments], names, watch, quick, file_limit, network=network)
        if status not in accept:
            raise _failure(status, err, names, doing)
        return status, out

    def read(self, layer: Layer, header: Image, name: str, watch: t.Callable[[], None]) -> Image:
        """Open an image of any format by ``qemu-img info``, its format given, never probed, and hold that against its header.

        :param header: what was read there by our own means
        :raises CloneError: ``unreadable`` where it cannot be opened, ``header`` where two readers understand it in two ways
        """
        if header.unclean:
            # Some of these qemu-img does not open.
            return header
        doing = f"reading {name} as {layer.format}"
        try:
            described = json.loads(self.run(info(layer), {layer.fd: name}, doing, watch, quick=True)[1])
        except CloneError as exc:
            if exc.code != "IO_ERROR" or any(os.strerror(number) in exc.msg for number in _OF_THE_HOST):
                raise
            raise refusal("unreadable", exc.msg) from exc
        capacity = int(described["virtual-size"])
        if layer.format == "vpc":
            # It may be told by the number of its cylinders (vpc_open).
            return replace(header, capacity=capacity)
        if (capacity, "backing-filename" in described) != (header.capacity, header.backing is not None):
            raise refusal("header", f"{doing} failed: qemu-img finds {capacity} bytes, its header says {header.capacity}")
        return header


def _failure(status: int, stderr: str, names: t.Mapping[int, str], doing: str) -> CloneError:
    text = stderr.strip()
    for fd, name in names.items():
        # Its messages know only descriptors; a person knows names.
        text = re.sub(rf"'?/proc/self/fd/{fd}\b'?", lambda _match, name=name: name, text)  # type: ignore[misc]
    text = "; ".join(line.replace("qemu-img: ", "", 1) for line in text.splitlines()[-3:]) or f"exit status {status}"
    if status < 0:
        text = f"qemu-img was ended by signal {signal.Signals(-status).name}" + (f" ({text})" if stderr.strip() else "")
    if status == -signal.SIGXCPU or _TOO_LARGE.search(text):
        return refusal("too_costly", f"{doing} failed: {text}")
    if _LOCKED.search(text):
        return CloneError("IN_USE", f"{doing} failed: another process has the image open ({text})")
    if "No space left on device" in text or "Disk quota exceeded" in text:
        return CloneError("NO_SPACE", f"{doing} failed: {text}")
    return CloneError("IO_ERROR", f"{doing} failed: {text}")
