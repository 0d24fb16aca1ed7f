# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Sources that hypothesis makes up, and how each is built: an image, or a chain of them, and what a guest reads from it.

The content is kept here as plain bytes, by rules simple enough to be believed, so that no program has to vouch for itself.
"""

from __future__ import annotations

import ctypes
import itertools
import os
from dataclasses import dataclass
from pathlib import Path

import harness
from harness import MIB, run
from hypothesis import strategies as st

#: fallocate(2)
_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_LIBC = ctypes.CDLL(None, use_errno=True)
# A prime number of bytes, so that nothing that is moved by a block looks the same.
_NOISES = [harness.noise(65_521, seed) for seed in range(5)]

CLUSTERS = tuple(512 << power for power in range(13))
#: What a raw image consists of: ``half`` is reserved as a whole and written in its middle, ``reserved`` lies past the end.
RAW_PIECES = ("data", "data", "zeros", "unwritten", "half", "hole", "reserved")
QCOW2_PIECES = ("data", "data", "zeros", "zero clusters", "discarded", "compressed")


@dataclass(frozen=True)
class Piece:
    """Something that happens to a range of bytes."""

    kind: str
    at: int
    length: int


@dataclass(frozen=True)
class Features:
    """Creation options of a qcow2 image; the names are qemu-img's."""

    compat: str = "1.1"
    cluster_size: int = 65536
    refcount_bits: int = 16
    extended_l2: bool = False
    lazy_refcounts: bool = False
    compression_type: str = "zlib"

    def stated(self):
        return {name: value for name, value in vars(self).items() if value != getattr(Features, name)}


@dataclass(frozen=True)
class Layer:
    """One image of a chain. ``snapshots`` says after how many pieces one is taken; ``settled`` that it is on the disk."""

    format: str
    size: int
    pieces: tuple
    settled: bool
    features: Features = Features()
    preallocation: str = "off"
    snapshots: tuple = ()
    bitmap: bool = False

    @property
    def capacity(self):
        return self.size if self.format == "raw" else -(-self.size // 512) * 512


@dataclass
class Source:
    """A source on the disk: its topmost image, all images with that, and what a guest reads."""

    path: Path
    layers: list
    content: bytes
    format: str
    features: Features | None
    snapshots: int
    bitmaps: int

    @property
    def stands_alone(self):
        return len(self.layers) == 1


# --- made up --------------------------------------------------------------------------------------------------------------

sizes = st.one_of(
    st.integers(0, 6 * MIB),
    st.builds(
        lambda unit, count, more: max(unit * count % (6 * MIB) + more, 0),
        st.sampled_from((512, 4096, 65536, MIB, 2 * MIB)),
        st.integers(0, 100),
        st.sampled_from((-4096, -512, -1, 0, 0, 0, 1, 511, 512, 4095)),
    ),
)
_lengths = st.one_of(st.integers(1, 5000), st.sampled_from((512, 4096, 65536)), st.integers(1, MIB), st.just(6 * MIB))


@st.composite
def features(draw):
    """What qemu-img accepts together."""
    cluster_size = draw(st.sampled_from(CLUSTERS))
    if draw(st.integers(0, 3)) == 0:
        return Features("0.10", cluster_size)
    return Features(
        "1.1",
        cluster_size,
        draw(st.sampled_from((16, 16, 1, 2, 4, 8, 32, 64))),
        cluster_size >= 16384 and draw(st.booleans()),
        draw(st.booleans()),
        draw(st.sampled_from(("zlib", "zstd"))),
    )


@st.composite
def pieces(draw, kinds, size):
    if size == 0:
        return ()
    places = st.one_of(
        st.just(0), st.integers(0, size - 1), st.integers(0, (size - 1) // 65536).map(lambda block: block * 65536)
    )
    return tuple(
        Piece(draw(st.sampled_from(kinds)), at, min(draw(_lengths), size - at)) for at in draw(st.lists(places, max_size=7))
    )


@st.composite
def raw_layers(draw):
    size = draw(sizes)
    return Layer("raw", size, draw(pieces(RAW_PIECES, size)), draw(st.booleans()))


@st.composite
def qcow2_layers(draw, alone):
    """``alone``: with what only an image that lies at the bottom, or at the top, can have."""
    size = draw(sizes)
    of = draw(features())
    done = draw(pieces(QCOW2_PIECES, size))
    snapshots = ()
    # qemu-img refuses snapshots where a cluster would be counted too often; many compressed ones lie in one.
    often = of.refcount_bits >= 16 or (of.refcount_bits > 1 and not any(piece.kind == "compressed" for piece in done))
    if often and draw(st.integers(0, 2)) == 0:
        snapshots = tuple(sorted(draw(st.lists(st.integers(0, len(done)), min_size=1, max_size=2, unique=True))))
    preallocation = draw(st.sampled_from(("off", "off", "off", "metadata", "falloc", "full"))) if alone else "off"
    bitmap = of.compat == "1.1" and size > 0 and draw(st.integers(0, 3)) == 0
    return Layer("qcow2", size, done, draw(st.booleans()), of, preallocation, snapshots, bitmap)


@st.composite
def chains(draw):
    """From the bottom to the top; each of its own size."""
    depth = draw(st.sampled_from((0, 0, 0, 0, 0, 1, 1, 2)))
    bottom = draw(st.one_of(raw_layers(), qcow2_layers(alone=True)))
    return (bottom, *(draw(qcow2_layers(alone=False)) for _above in range(depth)))


# --- built ----------------------------------------------------------------------------------------------------------------


def write_noises(place):
    """Files that qemu-io takes its data from."""
    for number, noise in enumerate(_NOISES):
        (place / f"noise{number}").write_bytes(noise)
    return place


def build(chain, place, below, noises):
    """Make the images: the topmost in ``place``, the others in ``below``."""
    content, paths = b"", []
    for number, layer in enumerate(chain):
        path = (place if layer is chain[-1] else below) / f"layer{number}"
        if layer.format == "raw":
            content = _build_raw(layer, path)
        else:
            backing = ["-b", paths[-1], "-F", chain[number - 1].format] if paths else []
            content = _Qcow2(layer, path, backing, content, noises).build()
        if layer.settled:
            run("sync", path)
        paths.append(path)
    top = chain[-1]
    of = top.features if top.format == "qcow2" else None
    return Source(paths[-1], paths, content, top.format, of, len(top.snapshots), int(top.bitmap))


def _noise(number, length):
    noise = _NOISES[number % len(_NOISES)]
    return (noise * (length // len(noise) + 1))[:length]


def _build_raw(layer, path):
    content = bytearray(layer.size)
    with open(path, "wb", buffering=0) as file:
        fd = file.fileno()
        os.ftruncate(fd, layer.size)
        for number, piece in enumerate(layer.pieces):
            at, length = piece.at, piece.length
            if piece.kind in ("unwritten", "half"):
                # What was written there stays as it is.
                os.posix_fallocate(fd, at, length)
            if piece.kind == "half":
                at, length = at + length // 4, length // 2
            if piece.kind in ("data", "half"):
                _write(fd, content, at, _noise(number, length))
            elif piece.kind == "zeros":
                _write(fd, content, at, bytes(length))
            elif piece.kind == "hole":
                _fallocate(fd, _KEEP_SIZE | _PUNCH_HOLE, at, length)
                content[at : at + length] = bytes(length)
            elif piece.kind == "reserved":
                _fallocate(fd, _KEEP_SIZE, layer.size, length)
    return bytes(content)


def _write(fd, content, at, data):
    assert os.pwrite(fd, data, at) == len(data)
    content[at : at + len(data)] = data


def _fallocate(fd, mode, at, length):
    assert _LIBC.fallocate(fd, mode, ctypes.c_int64(at), ctypes.c_int64(length)) == 0, os.strerror(ctypes.get_errno())


class _Qcow2:
    """Makes one qcow2 image, over one that reads as ``below``."""

    def __init__(self, layer, path, backing, below, noises):
        self.layer, self.path, self.backing, self.noises = layer, path, backing, noises
        self.content = bytearray(below[: layer.capacity].ljust(layer.capacity, b"\0"))
        #: clusters that something was written to
        self.touched = set()

    def build(self):
        layer, path = self.layer, self.path
        options = [f"{name}={'on' if value is True else value}" for name, value in layer.features.stated().items()]
        options.append(f"preallocation={layer.preallocation}")
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", ",".join(options), *self.backing, path, layer.size)
        if layer.bitmap:
            run("qemu-img", "bitmap", "--add", "-f", "qcow2", path, "dirty")
        for number, (first, last) in enumerate(itertools.pairwise((0, *layer.snapshots, len(layer.pieces)))):
            if number:
                run("qemu-img", "snapshot", "-c", f"snapshot{number}", path)
            commands = [self._command(index, layer.pieces[index]) for index in range(first, last)]
            if commands:
                lines = itertools.chain(*(("-c", line) for line in commands))
                out = run("qemu-io", "-d", "unmap", "-f", "qcow2", *lines, path)
                assert "rror" not in out and "failed" not in out, (commands, out)
        return bytes(self.content)

    def _command(self, index, piece):
        """The qemu-io command for a piece; what it does is done to the content too."""
        of = self.layer.features
        kind, at, length = piece.kind, piece.at, piece.length
        if kind in ("compressed", "discarded"):
            # Both go by whole clusters, of which the last may be cut off by the end.
            at = at // of.cluster_size * of.cluster_size
            length = min(-(-length // of.cluster_size) * of.cluster_size, self.layer.capacity - at)
        clusters = range(at // of.cluster_size, -(-(at + length) // of.cluster_size))
        if kind == "compressed" and (self.layer.preallocation != "off" or not self.touched.isdisjoint(clusters)):
            # Compressed clusters cannot be written over what is there.
            kind = "data"
        if kind == "discarded" and of.compat == "0.10" and self.backing:
            # What is below would come to light, so QEMU leaves it.
            kind = "zeros"
        self.touched.update(clusters)
        data, line = {
            "data": (_noise(index, length), f"write -s {self.noises / f'noise{index % len(_NOISES)}'}"),
            "compressed": (bytes([index + 1]) * length, f"write -c -P {index + 1}"),
            "zeros": (bytes(length), "write -P 0"),
            "zero clusters": (bytes(length), "write -z -u" if index % 2 else "write -z"),
            "discarded": (bytes(length), "discard"),
        }[kind]
        self.content[at : at + length] = data
        return f"{line} {at} {length}"
