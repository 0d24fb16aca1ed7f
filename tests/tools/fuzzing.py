# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""usage: fuzzing.py headers|documents SECONDS SEED

What reads image headers, and what reads XML and names, with what hypothesis makes up. Ends with status 0 when nothing but a
CloneError ever came of it, no example took longer than LONGEST, and memory stayed under MEMORY. Prints what was done, in JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

from ansible_collections.virtforge.libvirt.plugins.module_utils import _names, _xml
from ansible_collections.virtforge.libvirt.plugins.module_utils._errors import CloneError
from ansible_collections.virtforge.libvirt.plugins.module_utils._images import foreign, gate, probe
from ansible_collections.virtforge.libvirt.plugins.module_utils._pools import definition
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from lxml import etree

#: seconds of processor time for one example, whatever else the machine does, and bytes of address space for all of it
LONGEST, MEMORY = 5, 1 << 30
ROUND = 200
#: examples made of the ingredients of each that hypothesis draws
EACH = 30
BLOCK = 4096


class Lines:
    """Lines of the functions of some modules, and which of them are run while it watches."""

    def __init__(self, *modules):
        self.functions = {}
        self.missing = {}
        for module in modules:
            todo = [compile(Path(module.__file__).read_text(), module.__file__, "exec")]
            while todo:
                code = todo.pop()
                todo += [const for const in code.co_consts if isinstance(const, types.CodeType)]
                # No class and no module (CO_OPTIMIZED).
                if code.co_flags & 0x01:
                    lines = {line for _start, _end, line in code.co_lines() if line and line != code.co_firstlineno}
                    self.functions[self._key(code)] = lines
                    self.missing[self._key(code)] = set(lines)

    @staticmethod
    def _key(code):
        return code.co_filename, code.co_firstlineno, code.co_name

    def _trace(self, frame, event, _argument):
        missing = self.missing.get(self._key(frame.f_code))
        if not missing:
            return None
        if event == "line":
            missing.discard(frame.f_lineno)
        return self._trace

    @contextlib.contextmanager
    def watch(self):
        sys.settrace(self._trace)
        try:
            yield
        finally:
            sys.settrace(None)

    def told(self):
        """By function, for those that were called at all; the others are not what reads what comes from outside."""
        found = {}
        for (name, _line, function), lines in self.functions.items():
            left = self.missing[name, _line, function]
            if left != lines or not lines:
                one = found.setdefault(os.path.basename(name), {"lines": 0, "run": 0, "left": [], "functions": 0})
                one["functions"] += 1
                one["lines"] += len(lines)
                one["run"] += len(lines) - len(left)
                one["left"] = sorted([*one["left"], *left])
        return found


# --- headers --------------------------------------------------------------------------------------------------------------


def templates():
    """Images that qemu-img makes: their blocks that are not zeros, by place, and their length."""
    made = {}
    with tempfile.TemporaryDirectory() as place:
        kinds = [
            *(
                ("qcow2", options)
                for options in ("", "compat=0.10", "extended_l2=on", "compression_type=zstd", "cluster_size=512")
            ),
            *(("vmdk", options) for options in ("", "subformat=streamOptimized", "subformat=monolithicFlat")),
            *((name, "") for name in ("vdi", "qed", "qcow")),
            *(("vpc", options) for options in ("", "subformat=fixed")),
            ("vhdx", "block_size=1M"),
        ]
        for number, (image_format, options) in enumerate(kinds):
            path = os.path.join(place, f"image{number}")
            given_options = ["-o", options] if options else []
            subprocess.run(["qemu-img", "create", "-q", "-f", image_format, *given_options, path, "1M"], check=True)
            made[f"{image_format} {options}"] = blocks_of(Path(path).read_bytes())
        path = os.path.join(place, "overlay")
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", "base", "-F", "raw", path, "1M"], check=True)
        made["overlay"] = blocks_of(Path(path).read_bytes())
        path = os.path.join(place, "qed-overlay")
        subprocess.run(["qemu-img", "create", "-q", "-f", "qed", "-u", "-b", "base", "-F", "raw", path, "1M"], check=True)
        made["qed overlay"] = blocks_of(Path(path).read_bytes())
        path, data = os.path.join(place, "external"), os.path.join(place, "data")
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={data}", path, "1M"], check=True)
        made["qcow2 external"] = blocks_of(Path(path).read_bytes())
        blocks, size = made["vmdk subformat=streamOptimized"]
        head = blocks[0][:512]
        # As VMware writes a stream: where its tables are stands in a second header, at the end.
        end = struct.pack("<QII", 1, 0, 3).ljust(512, b"\0") + head + bytes(512)
        data = b"".join(blocks.get(at, bytes(BLOCK)) for at in range(0, size, BLOCK))[:size]
        made["vmdk footer"] = blocks_of(data[:56] + b"\xff" * 8 + data[64:] + end)
    made["nothing"] = ({}, 4096)
    made["disk"] = blocks_of(bytes(446) + (b"\x80\0\2\0\x83" + bytes(11)).ljust(64, b"\0") + b"\x55\xaa" + bytes(1 << 20))
    return made


def blocks_of(data):
    blocks = {}
    for at in range(0, len(data), BLOCK):
        block = data[at : at + BLOCK]
        if block.count(0) != len(block):
            blocks[at] = block
    return blocks, len(data)


NUMBERS = st.one_of(
    st.sampled_from([*range(9), 255, 512, 4096, 65535, *(1 << bits for bits in (16, 20, 30, 31, 32, 62, 63)), (1 << 64) - 1]),
    st.integers(0, 64).map(lambda bits: max((1 << bits) - 1, 0)),
    st.integers(0, (1 << 64) - 1),
)
PIECES = st.one_of(
    st.tuples(st.sampled_from("BHIQ"), st.sampled_from("<>"), NUMBERS).map(
        lambda drawn: struct.pack(drawn[1] + drawn[0], drawn[2] % (1 << 8 * struct.calcsize(drawn[0])))
    ),
    st.binary(min_size=1, max_size=64),
    st.sampled_from(
        [
            *(b"QFI\xfb\0\0\0\3", b"QFI\xfb\0\0\0\2", b"QFI\xfb\0\0\0\1", b"QED\0", b"KDMV", b"COWD", b"vhdxfile", b"conectix"),
            *(b"# Disk DescriptorFile", b"\x7f\x10\xda\xbe", b"cxsparse", b"head", b"regi", b"metadata", b"LUKS\xba\xbe\0\1"),
            *(b"CD001", b"\x55\xaa", b"EFI PART", b'createType="monolithicFlat"\n', b'RW 1 FLAT "/x" 0\n', b"parentCID=1\n"),
            *(b'parentFileNameHint="x"\n', b"\0" * 16, b"\xe2\x79\x2a\xca\0\0\0\3raw\0\0\0\0\0", b"\x23\x85\x28\x75\0\0\0\x18"),
            b"\x44\x41\x54\x41\0\0\0\4data\0\0\0\0",
        ]
    ),
)
#: where the formats have fields, and anywhere else
PLACES = st.one_of(
    st.sampled_from((72, 104, 112, 0x8001, 446, 510, 512, 64)),
    st.integers(0, 127),
    st.integers(0, 1023),
    st.sampled_from((64 << 10, 128 << 10, 192 << 10, 256 << 10, 0x8001, 512)).flatmap(
        lambda base: st.integers(0, 128).map(lambda more: base + more)
    ),
    st.integers(2 << 20, (2 << 20) + 65536 + 512),
    st.integers(-1536, -1),
    st.integers(0, 1 << 22),
)
FORMATS = ("raw", "qcow2", "vmdk", "vdi", "vhdx", "vpc", "qed", "qcow")


def crc32c(data):
    return foreign._crc32c(data)


class Headers:
    """The target: detection, the choice of a format, and the reader of each."""

    modules = (gate, probe, foreign)

    def __init__(self):
        self.made = templates()
        self.names = sorted(self.made)
        self.patches = []
        self.fd = os.memfd_create("image")
        self.strategy = st.tuples(
            st.sampled_from(self.names),
            st.lists(st.tuples(PLACES, PIECES), max_size=6),
            st.one_of(st.none(), st.none(), st.none(), st.integers(0, 300_000), st.integers(0, 1 << 62)),
            st.booleans(),
            st.sampled_from((None, None, None, *FORMATS)),
        )

    def more(self, example, rng):
        """Others of the same ingredients: patches that were drawn so far, on any image."""
        _name, patches, length, _repaired, pinned = example
        self.patches += patches
        if self.patches:
            drawn = [rng.choice(self.patches) for _number in range(rng.choice((1, 1, 1, 2, 3, 5)))]
            # Most often a small change of what qemu-img made; now and then all of what was drawn.
            keep = rng.random() < 0.1
            one = rng.choice(self.names)
            at = one.split()[0] if rng.random() < 0.2 and one.split()[0] in FORMATS else None
            yield (
                one,
                [*(patches if keep else ()), *drawn],
                length if keep else None,
                rng.random() < 0.8,
                pinned if keep else at,
            )

    def run(self, example):
        name, patches, length, repaired, pinned = example
        size = self._write(*self.made[name], patches, length, repaired)
        probe.raw_kinds(os.pread(self.fd, 0x8006, 0))
        foreign.vmdk_references(self.fd)
        found = probe.detect(self.fd, size)
        image_format = probe.choose_format(found, pinned, "it")
        if image_format == "raw":
            image = probe.read_raw(size, found, os.pread(self.fd, 8, 0))
        elif image_format == "qcow2":
            image = probe.read_qcow2(self.fd, size, "it")
        else:
            image = foreign.read(self.fd, size, image_format, "it")
        assert image.format == image_format and 0 <= image.capacity < 1 << 63, image
        assert image.backing is None or 0 < len(os.fsencode(image.backing)) < 1024, image

    def _write(self, blocks, size, patches, length, repaired):
        os.ftruncate(self.fd, 0)
        for at, block in blocks.items():
            os.pwrite(self.fd, block, at)
        os.ftruncate(self.fd, size)
        for at, piece in patches:
            os.pwrite(self.fd, piece, at if at >= 0 else max(size + at, 0))
        size = max(size, os.fstat(self.fd).st_size)
        if length is not None:
            size = length
            os.ftruncate(self.fd, size)
        if repaired:
            self._repair(size)
        return size

    def _repair(self, size):
        """Checksums that fit again, so that what lies behind them is reached."""
        for at in (64 << 10, 128 << 10):
            head = bytearray(os.pread(self.fd, 4096, at)) if size >= at + 4096 else b""
            if head[:4] == b"head":
                head[4:8] = bytes(4)
                os.pwrite(self.fd, struct.pack("<I", crc32c(head)), at + 4)
        for at, length, place in ((0, 512, 64), (max(size - 512, 0), 512, 64), (512, 1024, 36)):
            data = os.pread(self.fd, length, at) if size < 1 << 40 else b""
            if data[:8] in (b"conectix", b"cxsparse") and len(data) == length:
                os.pwrite(self.fd, struct.pack(">I", foreign._checksum(data, place)), at + place)

    @staticmethod
    def judge(error):
        """Every refusal is by a check of its name."""
        name = error.msg.rsplit("[", 1)[-1].rstrip("]")
        assert gate.CHECKS[name].code == error.code, error.msg


# --- documents ------------------------------------------------------------------------------------------------------------

#: what a task may say, in the words of libvirt
MODELS = (
    """<volume type='file'><name>web</name><key>/x</key><capacity unit='G'>4</capacity><allocation>0</allocation>
    <physical unit='bytes'>1</physical><source></source><target><path>/x</path><format type='qcow2'/><permissions>
    <mode>0644</mode><owner>0</owner><group>-1</group><label>x</label></permissions><timestamps><atime>1.0</atime></timestamps>
    <compat>1.1</compat><clusterSize unit='KiB'>64</clusterSize><nocow/><features><lazy_refcounts/><extended_l2/></features>
    <encryption format='luks'><secret type='passphrase' uuid='x'/></encryption></target><backingStore><path>/base</path>
    <format type='raw'/><permissions><mode>0600</mode></permissions></backingStore></volume>""",
    "<volume><name>web</name><capacity>1</capacity></volume>",
    """<pool type='netfs'><name>a</name><uuid>c1d4f5b2-0000-4000-8000-000000000000</uuid><capacity unit='bytes'>1</capacity>
    <source><host name='nas' port='2049'/><dir path='/x'/><format type='nfs'/></source><target><path>/srv/a</path><permissions>
    <mode>0711</mode><owner>1</owner><group>1</group></permissions></target></pool>""",
    """<pool type='rbd'><name>b</name><source><host name='h' port='6789'/><host name='i'/><name>rbd</name>
    <auth type='ceph' username='u'><secret uuid='c1d4f5b2-0000-4000-8000-000000000000'/></auth></source></pool>""",
    """<pool type='iscsi-direct'><name>c</name><source><host name='h'/><device path='iqn.x'/><initiator><iqn name='iqn.y'/>
    </initiator><auth type='chap' username='u'><secret usage='x'/></auth></source></pool>""",
    """<pool type='logical'><name>vg</name><source><device path='/dev/sda'/><device path='/dev/sdb'/><name>vg</name>
    <format type='lvm2'/></source><target><path>/dev/vg</path></target></pool>""",
    """<pool type='scsi'><name>d</name><source><adapter type='scsi_host' name='host1'/></source><target><path>/dev</path>
    </target></pool>""",
    "<pool type='dir'><name>e</name><target><path>/srv/e</path></target></pool>",
)
TOKEN = re.compile(r"<[^>]*>|[^<]+")
TAGS = (
    "name", "key", "capacity", "allocation", "physical", "target", "source", "format", "permissions", "mode", "owner", "group",
    "label", "path", "compat", "clusterSize", "nocow", "features", "lazy_refcounts", "extended_l2", "backingStore",
    "encryption",
    "uuid", "host", "device", "adapter", "auth", "secret", "initiator", "iqn", "dir", "x:name",
)  # fmt: skip
WORDS = (
    "", "web", "../../etc/passwd", "a/b", "1", "0", "-1", "4294967295", "4294967296", "0644", "744", "0888", "1.1", "0.10",
    "2", "9" * 30,
    "0x10", " 7 ", "&amp;", "&#0;", "&#65;", "&x;", "&lt;x&gt;", "<![CDATA[../x]]>", "<!-- x -->", "<?x y?>", "]]>", "%x;",
    "\u202e",
    "/dev/sda", "\0", "\ud800", "\ufffe", "raw", "qcow2", "iso", "parsec", "n" * 5000, "<!DOCTYPE x>",
)  # fmt: skip
FRAGMENTS = (
    *WORDS,
    *(f"<{tag}>" for tag in TAGS), *(f"</{tag}>" for tag in TAGS), *(f"<{tag}/>" for tag in TAGS),
    *(f"<{tag}>{word}</{tag}>" for tag in ("name", "capacity", "mode", "owner", "path", "uuid", "compat") for word in WORDS),
    *(f"<{tag} {name}='{word}'/>" for tag, name in (("format", "type"), ("host", "name"), ("host", "port"), ("device", "path"),
      ("dir", "path"), ("secret", "uuid"), ("auth", "type")) for word in ("", "raw", "x", "1", "99999", "../x", "&x;")),
    *(f"<capacity unit='{unit}'>7</capacity>" for unit in ("", "B", "kib", "parsec", "E", "&x;")),
    *(f"<volume type='{kind}'>" for kind in ("file", "block", "x", "")), "<volume xmlns:x='urn:x'>", "<pool type='x'>",
    "<pool>",
    *(f"<{tag}>" * 300 + f"</{tag}>" * 300 for tag in ("x", "name", "target")),
)  # fmt: skip
FRONTS = (
    "", "", "", "", "", "", "", "", "<?xml version='1.0' encoding='utf-8'?>", "<?xml version='1.0' encoding='utf-16'?>",
    "\ufeff",
    " \n", "<!-- -->", "<!DOCTYPE volume SYSTEM 'file:///etc/passwd'>",
    "<!DOCTYPE x [<!ENTITY x SYSTEM 'http://127.0.0.1/x'>]>",
    "<!doctype x>", "<?xml-stylesheet href='file:///etc/passwd'?>", "<?xml version='1.1'?>", "\0",
    "<!DOCTYPE x [" + "".join(f"<!ENTITY x{n} '{f'&x{n - 1};' * 10}'>" for n in range(1, 10)) + "]>",
)  # fmt: skip
EDITS = st.tuples(
    st.integers(0, 200), st.sampled_from(("before", "instead", "without", "twice", "cut")), st.sampled_from(FRAGMENTS)
)


def edited(model, front, edits, filler):
    """A model with fragments put before, in place of, or without some of its tags and texts."""
    tokens = TOKEN.findall(model)
    for at, how, fragment in edits:
        at %= len(tokens) + 1
        if how == "cut":
            # Within a tag.
            tokens[at : at + 1] = [token[: len(token) // 2] + fragment for token in tokens[at : at + 1]]
        else:
            kept = {"before": 1, "instead": 0, "without": 0, "twice": 2}[how]
            tokens[at : at + 1] = [*([] if how in ("without", "twice") else [fragment]), *tokens[at : at + 1] * kept]
    return front + "".join(tokens).replace("web", "web" + "w" * filler, 1)


class Documents:
    """The target: volume and pool XML from a task, and names."""

    modules = (_xml, definition, _names)

    def __init__(self):
        self.edits = []
        self.strategy = st.tuples(
            st.sampled_from(MODELS),
            st.sampled_from(FRONTS),
            st.lists(EDITS, max_size=4),
            st.sampled_from((0, 0, 0, 0, 0, 0, 0, 200, _xml.MAX_DOCUMENT - 1000, _xml.MAX_DOCUMENT)),
            st.booleans(),
            st.one_of(st.sampled_from(WORDS), st.text(max_size=30), st.text("a/.:\0\n\u00e9", max_size=300)),
        )

    def more(self, example, rng):
        """Others of the same ingredients: edits that were drawn so far, of any model."""
        _model, front, edits, _filler, flag, name = example
        self.edits += edits
        if self.edits:
            drawn = [rng.choice(self.edits) for _number in range(rng.choice((1, 1, 1, 2, 3)))]
            drawn = [(rng.randrange(200), how, fragment) for _at, how, fragment in drawn]
            yield rng.choice(MODELS), front if rng.random() < 0.1 else "", drawn, 0, flag, name

    def run(self, example):
        *parts, flag, name = example
        document = edited(*parts)
        for reader in (self._name, self._pool, self._volume):
            try:
                reader(name if reader == self._name else document, flag)
            except CloneError as error:
                self.judge(error)

    @staticmethod
    def _name(name, flag):
        _names.is_staged_name(name)
        (_names.check_pool if flag else _names.check_name)(name, "name")
        assert flag or (os.path.basename(name) == name and name not in ("", ".", "..") and "\0" not in name)
        _names.check_path(name, "path")

    @staticmethod
    def _pool(document, flag):
        stated = definition.parse(document, flag)
        assert stated.type is None or isinstance(stated.type, str)

    @staticmethod
    def _volume(document, flag):
        stated = _xml.parse_volume(document, flag)
        # As libvirt reads it, by an XPath of its own (virStorageVolDefParseXML).
        root = etree.fromstring(document.lstrip(" \t\r\n").encode(), etree.XMLParser(encoding="utf-8", resolve_entities=False))
        assert (stated.name or "") == root.xpath("string(./name)"), document
        assert stated.capacity is None or 0 <= stated.capacity < 1 << 64, document
        kept = ("format", "mode", "owner", "group", "compat", "cluster_size")
        again = _xml.volume_xml(
            name=stated.name or "x", capacity=stated.capacity or 0, **{name: getattr(stated, name) for name in kept}
        )
        written = _xml.parse_volume(again)
        assert flag or all(getattr(written, name) == getattr(stated, name) for name in kept), (document, again)

    @staticmethod
    def judge(error):
        assert error.msg and "\n" not in error.msg and len(error.msg) < 2000, error.msg


TARGETS = {"headers": Headers, "documents": Documents}


def fuzz(name, seconds, first_seed):
    """Examples until the time is over; what was done."""
    target = TARGETS[name]()
    lines = Lines(*target.modules)
    told = {"target": name, "seed": first_seed, "seconds": seconds, "examples": 0, "longest": 0.0}
    end = time.monotonic() + seconds

    def try_one(example):
        begun = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, LONGEST)
        try:
            with lines.watch():
                target.run(example)
        except CloneError as error:
            target.judge(error)
        except Exception as error:
            raise AssertionError(f"{target.__class__.__name__}.run({example!r})") from error
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        told["examples"] += 1
        told["longest"] = max(told["longest"], round(time.process_time() - begun, 3))

    def try_some(drawn):
        example, number = drawn
        # To draw an example takes hypothesis longer than to try it, so what it has drawn is put together in other ways too.
        rng = random.Random(number)
        try_one(example)
        for _number in range(EACH):
            for other in target.more(example, rng):
                if time.monotonic() < end:
                    try_one(other)

    number = 0
    while time.monotonic() < end:
        run = given(st.tuples(target.strategy, st.integers(0, 1 << 32)))(try_some)
        run = settings(
            max_examples=ROUND if end - time.monotonic() > 10 else 10,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate, Phase.shrink),
        )(run)
        seed(first_seed + number)(run)()
        number += 1
    told["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    told["lines"] = lines.told()
    return told


def page(told):
    """The report of docs/fuzzing.md."""
    rows = []
    for one in told:
        for name, lines in sorted(one["lines"].items()):
            left = ", ".join(map(str, lines["left"])) or "none"
            rows.append(f"| {one['target']} | `{name}` | {lines['functions']} | {lines['run']} of {lines['lines']} | {left} |")
    runs = []
    for one in told:
        cells = [one["target"], f"{one['seconds']:.0f} s", one["seed"], f"{one['examples']:,}", f"{one['longest']} s"]
        runs.append(f"| {' | '.join(map(str, cells))} | {one['peak'] >> 20} MiB |")
    return PAGE.format(runs="\n".join(runs), rows="\n".join(rows), longest=LONGEST, memory=MEMORY >> 20)


PAGE = """# Fuzzing

What reads image headers, and what reads volume XML, pool XML and names, was given what
hypothesis, a Python package for that, makes up: images that qemu-img has made, with fields and signatures changed and parts
cut off, and documents in libvirt's words, with entities, comments, doubles and nonsense put in. An example fails the run if
it ends in anything but a clear error, takes more than {longest} s of processor time, or has the process need more than
{memory} MiB of memory. A document that is accepted has to have the name that libvirt's own XPath finds in it.

This page is written by `tests/tools/fuzz SECONDS [SEED]`. `make test` does the same for a minute. No example failed:

| target | time | seed | examples | longest | memory at most |
|---|---|---|---|---|---|
{runs}

Lines of the functions that were called, and the numbers of those that were not reached:

| target | file | functions | lines run | not reached |
|---|---|---|---|---|
{rows}
"""


def main():
    if sys.argv[1] == "page":
        print(page([json.loads(line) for line in sys.stdin]), end="")
        return
    name, seconds, first_seed = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))

    def too_long(_signal, _frame):
        raise AssertionError(f"an example took more than {LONGEST} s of processor time")

    signal.signal(signal.SIGPROF, too_long)
    print(json.dumps(fuzz(name, seconds, first_seed)))


if __name__ == "__main__":
    main()
