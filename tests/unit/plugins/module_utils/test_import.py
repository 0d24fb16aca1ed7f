# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Sources from outside: options, checksums and their lists, compressed streams in odd pieces."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import os
import tarfile
import zipfile
from dataclasses import replace

import pytest
from ansible_collections.virtforge.libvirt.plugins.module_utils._clone import planner, request
from ansible_collections.virtforge.libvirt.plugins.module_utils._clone.model import (
    Create,
    Dependents,
    Facts,
    PoolFacts,
    SourceFacts,
    TargetFacts,
    Unanswered,
)
from ansible_collections.virtforge.libvirt.plugins.module_utils._errors import CloneError
from ansible_collections.virtforge.libvirt.plugins.module_utils._images.probe import Image
from ansible_collections.virtforge.libvirt.plugins.module_utils._import import cache, checksum, options, unpack

DIGEST = hashlib.sha256(b"").hexdigest()
OTHER = hashlib.sha256(b"1").hexdigest()
URL = "https://host/dir/base.qcow2.xz"


def build(**params):
    return request.from_parameters({"pool": "/p", **params})


# --- options --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url, path",
    [
        ("file:///srv/base.raw", "/srv/base.raw"),
        ("file://localhost/srv/base.raw", "/srv/base.raw"),
        ("file:/srv/base.raw", "/srv/base.raw"),
        ("file:///srv/a%20b%2541", "/srv/a b%41"),
        ("file:///srv/%ff", "/srv/\udcff"),
    ],
)
def test_the_url_of_a_file_of_this_host_is_a_path(url, path):
    result = build(source_url=url)
    assert (result.source_path, result.outside.url, result.source_url) == (path, None, url)
    assert not result.blank


@pytest.mark.parametrize(
    "url, name",
    [
        ("http://host/base.qcow2", "base.qcow2"),
        ("https://user:word@host:8443/a/b.raw.xz?x=/y#z", "b.raw.xz"),
        ("https://host/a%20b.iso", "a b.iso"),
        ("https://[::1]/c", "c"),
    ],
)
def test_the_name_of_a_url(url, name):
    result = build(source_url=url)
    assert (result.source_name, result.source_path, result.outside.url) == (name, None, url)


@pytest.mark.parametrize(
    "url, shown",
    [
        ("https://user:word@host:8443/a?signature=x#y", "https://host:8443/a"),
        ("http://host", "http://host"),
        ("http://a@b@host/x", "http://host/x"),
    ],
)
def test_what_is_shown_of_a_url(url, shown):
    assert options.shown(url) == shown


@pytest.mark.parametrize(
    "params, text",
    [
        ({"source_url": ""}, "source_url"),
        ({"source_url": "/srv/base.raw"}, "source_url"),
        ({"source_url": "javascript:alert(1)"}, "source_url"),
        ({"source_url": "https:///base.raw"}, "source_url"),
        ({"source_url": "https://host:99999/base.raw"}, "source_url"),
        ({"source_url": "https://[::1/base.raw"}, "source_url"),
        ({"source_url": "https://host/ä"}, "%XX"),
        ({"source_url": "https://host/a\r\nHost: other"}, "%XX"),
        ({"source_url": "file://nas/base.raw"}, "source_url"),
        ({"source_url": "file:///base.raw?x"}, "source_url"),
        ({"source_url": "file:///a%00b"}, "source_url"),
        ({"source_url": "https://host/"}, "name"),
        ({"source_url": URL, "clone_type": "linked"}, "clone_type"),
        ({"source_url": URL, "method": "libvirt"}, "method"),
        ({"source_url": URL, "url_timeout": -1}, "url_timeout"),
        ({"source_url": URL, "cache_dir": "cache"}, "cache_dir"),
        ({"source_url": URL, "headers": {"a b": "c"}}, "headers"),
        ({"source_url": URL, "headers": {"a": "b\nc: d"}}, "headers"),
        ({"source_url": URL, "checksum": "sha256:gopher://host/SUMS"}, "checksum"),
        ({"source": "base", "checksum": f"sha256:{DIGEST}"}, "checksum"),
        ({"source": "base", "source_compression": "none"}, "source_compression"),
    ],
)
def test_options_that_cannot_be_meant(params, text):
    with pytest.raises(CloneError, match=text) as caught:
        build(**params)
    assert caught.value.code == "INVALID_ARG"
    caught.value.msg.encode("utf-8")


def test_secrets_are_in_no_representation():
    shown = repr(build(source_url=URL, url_password="open sesame", headers={"X-Token": "open sesame"}))
    assert "sesame" not in shown


# --- checksums ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [
        (f"sha256:{DIGEST}", ("sha256", DIGEST, "")),
        (f" SHA256: {DIGEST.upper()} ", ("sha256", DIGEST, "")),
        (f"sha256:\u200b{DIGEST}", ("sha256", DIGEST, "")),
        ("md5:" + "0" * 32, ("md5", "0" * 32, "")),
        ("sha512:https://host/SHA512SUMS", ("sha512", "", "https://host/SHA512SUMS")),
        ("sha1:file:///srv/SUMS", ("sha1", "", "file:///srv/SUMS")),
    ],
)
def test_a_checksum_as_get_url_takes_it(text, expected):
    result = checksum.parse(text)
    assert (result.algorithm, result.digest, result.url) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        DIGEST,
        "sha256:",
        "sha256",
        f"sha512:{DIGEST}",
        "sha256:" + "g" * 64,
        "shake_128:00",
        "crc32:00000000",
        ":",
        "sha256:0x12",
    ],
)
def test_what_is_no_checksum(text):
    with pytest.raises(CloneError, match="^checksum: ") as caught:
        checksum.parse(text)
    assert caught.value.code == "INVALID_ARG"


@pytest.mark.parametrize(
    "listed",
    [
        DIGEST,
        f"{DIGEST}\n",
        f"{DIGEST}  base.raw\n{OTHER}  other.raw",
        f"{OTHER} *other.raw\n{DIGEST} *base.raw\n",
        f"{DIGEST}  ./base.raw\n",
        f"{DIGEST.upper()}\tbase.raw\r\n",
        f"SHA256 (base.raw) = {DIGEST}\nSHA512 (base.raw) = {'0' * 128}",
        f"SHA2-256(base.raw)= {DIGEST}\n",
        f"MD5 (base.raw) = {'0' * 32}\nSHA256 (base.raw) = {DIGEST}",
        f"-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA256\n\n# base.raw: 1 byte\nSHA256 (base.raw) = {DIGEST}\n",
        # Those of several algorithms under one name, told by their length.
        f"{'0' * 128}  base.raw\n{DIGEST}  base.raw\n",
        f"{DIGEST}  base.raw\n{DIGEST}  base.raw\n",
        f"{OTHER}  dir/base.raw\n{DIGEST}  base.raw\n",
        f"{OTHER}  base.raw.xz\n{DIGEST}  base.raw\n",
    ],
)
def test_a_list_has_the_checksum_of_a_file(listed):
    assert checksum.find(listed, "sha256", "base.raw", "the list") == DIGEST


@pytest.mark.parametrize(
    "listed, text",
    [
        ("", "no checksum"),
        (f"{DIGEST}  other.raw\n{DIGEST}  base.raw.xz", "no checksum"),
        (f"{DIGEST}  base.raw\n{OTHER}  base.raw", "several checksums"),
        (f"SHA512 (base.raw) = {'0' * 128}\nMD5 (base.raw) = {'0' * 32}", "no checksum"),
        (f"SHA3-256 (base.raw) = {DIGEST}\n", "no checksum"),
        ("<html>", "64 hexadecimal digits"),
        ("<html> not found </html>\n", "no checksum"),
        ("0" * 128, "64 hexadecimal digits"),
    ],
)
def test_a_list_without_it_or_with_too_many(listed, text):
    with pytest.raises(CloneError, match=text) as caught:
        checksum.find(listed, "sha256", "base.raw", "the list")
    assert caught.value.code == "INVALID_ARG"


def test_a_mismatch_names_both():
    with pytest.raises(CloneError, match=f"{OTHER}.*{DIGEST}") as caught:
        checksum.parse(f"sha256:{DIGEST}").expect(OTHER, "the file")
    assert caught.value.code == "CHECKSUM_MISMATCH"


# --- streams --------------------------------------------------------------------------------------------------------------

DATA = b"".join(hashlib.sha256(b"%d" % number).digest() * 7 for number in range(9000)) + bytes(3 << 20)
PACK = {"gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress}


def unpacked(tmp_path, kind, data):
    path = tmp_path / "packed"
    path.write_bytes(data)
    fd = os.open(path, os.O_RDONLY)
    try:
        pieces = list(unpack.unpacked(kind, fd, "the file", lambda: None))
    finally:
        os.close(fd)
    assert all(0 < len(piece) <= 1 << 20 for piece in pieces)
    return b"".join(pieces)


@pytest.mark.parametrize("kind", PACK)
def test_a_stream_comes_out_whole(tmp_path, kind):
    assert unpack.compression_of(PACK[kind](DATA)) == kind
    assert unpacked(tmp_path, kind, PACK[kind](DATA)) == DATA
    assert unpacked(tmp_path, kind, PACK[kind](b"")) == b""
    assert unpacked(tmp_path, kind, PACK[kind](b"ab") + PACK[kind](b"") + PACK[kind](b"cd")) == b"abcd"


@pytest.mark.parametrize("kind", PACK)
def test_a_stream_may_end_anywhere_in_what_is_read_at_once(tmp_path, monkeypatch, kind):
    packed = PACK[kind](b"ab") + PACK[kind](b"cd")
    for size in range(1, len(packed) + 1):
        monkeypatch.setattr(unpack, "_CHUNK", size)
        path = tmp_path / "packed"
        path.write_bytes(packed)
        fd = os.open(path, os.O_RDONLY)
        assert b"".join(unpack.unpacked(kind, fd, "the file", lambda: None)) == b"abcd", size
        os.close(fd)


@pytest.mark.parametrize("kind", PACK)
def test_every_stream_that_is_cut_is_refused(tmp_path, kind):
    packed = PACK[kind](b"some text, " * 20)
    for length in range(1, len(packed)):
        with pytest.raises(CloneError) as caught:
            unpacked(tmp_path, kind, packed[:length])
        assert caught.value.code == "CORRUPT_IMAGE", length


@pytest.mark.parametrize("kind", PACK)
def test_nothing_else_may_follow_the_end(tmp_path, kind):
    packed = PACK[kind](b"some text")
    for behind in (b"x", b"\0x", bytes(5000) + b"x", packed[:5], packed[1:]):
        with pytest.raises(CloneError, match=f"no sound {kind} file") as caught:
            unpacked(tmp_path, kind, packed + behind)
        assert caught.value.code == "CORRUPT_IMAGE"


@pytest.mark.parametrize("kind, zeros", [("gzip", 1), ("gzip", 5000), ("xz", 4), ("xz", 5000)])
def test_padding_that_the_format_has(tmp_path, kind, zeros):
    packed = PACK[kind](b"text")
    assert unpacked(tmp_path, kind, packed + bytes(zeros)) == b"text"
    assert unpacked(tmp_path, kind, packed + bytes(zeros) + packed) == b"texttext"


@pytest.mark.parametrize("kind, zeros", [("xz", 1), ("xz", 6), ("bzip2", 1), ("bzip2", 5000)])
def test_padding_that_the_format_has_not(tmp_path, kind, zeros):
    with pytest.raises(CloneError, match="zeros follow its end"):
        unpacked(tmp_path, kind, PACK[kind](b"text") + bytes(zeros))


def archive_of(kind):
    file = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("disk.raw", b"text")
    else:
        formats = {"gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT, "ustar": tarfile.USTAR_FORMAT}
        with tarfile.open(fileobj=file, mode="w", format=formats[kind]) as archive:
            archive.addfile(tarfile.TarInfo("disk.raw"))
    return file.getvalue()


@pytest.mark.parametrize("kind", ["zip", "gnu", "pax", "ustar"])
def test_an_archive_is_told(kind):
    with pytest.raises(CloneError, match="archive, not an image: unpack it") as caught:
        unpack.refuse_archive(archive_of(kind)[:512], "the file")
    assert caught.value.code == "NO_SUPPORT"


@pytest.mark.parametrize(
    "head", [b"", bytes(512), b"QFI\xfb\0\0\0\3", b"KDMV", b"\xeb\x63\x90" + bytes(507) + b"\x55\xaa", b"PK", b"<!"]
)
def test_what_may_be_an_image(head):
    unpack.refuse_archive(head, "the file")
    assert unpack.compression_of(head) is None


# --- the cache ------------------------------------------------------------------------------------------------------------


def test_other_bytes_have_another_key():
    with_checksum = checksum.parse(f"sha256:{DIGEST}")
    stated = [options.Options(URL), options.Options(URL + "?x"), options.Options(URL, compression="none")]
    keys = {cache.key_of(one, sworn) for one in stated for sworn in (None, with_checksum, checksum.parse(f"sha256:{OTHER}"))}
    assert len(keys) == 9
    # Who fetches it, and how, does not matter.
    assert cache.key_of(options.Options(URL, username="anna"), None) == cache.key_of(options.Options(URL), None)


# --- what the planner makes of it -----------------------------------------------------------------------------------------


def facts(target=None, **kwargs):
    source = SourceFacts("source_url 'https://host/base'", "https://host/base", pending="fetched")
    existing = TargetFacts(target, (1, 3), None, 0, 0, 0o600) if target else TargetFacts()
    values = {
        "target_users": "",
        "target_dependents": Dependents(),
        "denied": "",
        "check_mode": True,
        "target_chain": True,
    }
    return Facts(PoolFacts("/p", "directory", "/p"), source, existing, "web", **{**values, **kwargs})


def test_what_is_wrong_anyway_comes_before_the_download():
    for stated, code in (
        ({"preallocation": "full", "format": "vdi"}, "CONFIG_UNSUPPORTED"),
        ({"qcow2": {"compat": "1.1"}, "format": None}, None),
    ):
        asked = build(source_url=URL, name="web", **stated)
        with pytest.raises(CloneError if code else Unanswered) as caught:
            planner.plan(asked, facts())
        assert code is None or caught.value.code == code
    with pytest.raises(CloneError) as caught:
        planner.plan(build(source_url=URL, name="web"), facts(denied="no"))
    assert caught.value.code == "OPERATION_DENIED"


def test_a_new_volume_has_its_source_brought():
    with pytest.raises(Unanswered) as asked:
        planner.plan(build(source_url=URL, name="web"), facts())
    assert asked.value.question == "brought"


@pytest.mark.parametrize(
    "stated, warned", [({}, True), ({"format": "raw"}, True), ({"format": "raw", "capacity": "1M"}, False)]
)
def test_a_check_run_predicts_what_is_stated(stated, warned):
    plan = planner.plan(build(source_url=URL, name="web", **stated), facts(brought=False))
    assert plan.actions == ["created"] and plan.before is None and bool(plan.warnings) == warned
    assert plan.after.format == stated.get("format")
    assert plan.after.capacity == (1 << 20 if "capacity" in stated else None)


@pytest.mark.parametrize(
    "stated, actions",
    [
        ({}, []),
        ({"format": "raw"}, []),
        ({"capacity": "8M"}, []),
        ({"force": True}, []),
        ({"capacity": "9M"}, ["grown"]),
        ({"mode": "0640"}, ["permissions"]),
        ({"format": "qcow2"}, "DIFFERS"),
        ({"capacity": "1M"}, "DIFFERS"),
    ],
)
def test_a_volume_that_exists_is_judged_without_its_source(stated, actions):
    asked, found = build(source_url=URL, name="web", **stated), facts(Image("raw", 8 << 20))
    if isinstance(actions, str):
        with pytest.raises(CloneError) as caught:
            planner.plan(asked, found)
        assert caught.value.code == actions
    else:
        plan = planner.plan(asked, found)
        assert plan.actions == actions and not plan.warnings


def test_a_replacement_is_predicted_with_what_was_there():
    asked = build(source_url=URL, name="web", format="qcow2", capacity="9M", force=True)
    plan = planner.plan(asked, facts(Image("raw", 8 << 20), brought=False))
    (step,) = plan.steps
    assert isinstance(step, Create) and step.replaces and plan.actions == ["replaced"]
    assert (plan.before.format, plan.after.format) == ("raw", "qcow2")


def test_content_is_compared_with_what_is_brought():
    asked, found = build(source_url=URL, name="web", compare="content"), Image("raw", 8 << 20)
    with pytest.raises(Unanswered) as question:
        planner.plan(asked, facts(found))
    assert question.value.question == "brought"
    plan = planner.plan(asked, facts(found, brought=False))
    assert not plan.actions and "not told" in plan.warnings[0]


def test_a_checksum_is_asked_for_where_something_is_made():
    source = SourceFacts("source_path '/q/base'", "/q/base", image=Image("raw", 8 << 20), identity=(1, 2))
    known = replace(facts(source_writers="", unshareable="", space_missing=0, source_corrupt=""), source=source)
    assert planner.plan(build(source_path="/q/base", name="web"), known).actions == ["created"]
    asked = build(source_path="/q/base", name="web", checksum=f"sha256:{DIGEST}")
    with pytest.raises(Unanswered) as question:
        planner.plan(asked, known)
    assert question.value.question == "checked"
    assert planner.plan(asked, replace(known, checked=True)).actions == ["created"]
    there = replace(known, target=TargetFacts(Image("raw", 8 << 20), (1, 3), None, 0, 0, 0o600))
    assert planner.plan(asked, there).actions == []


@pytest.mark.parametrize("stated, used", [("/srv/tmp", "/srv/tmp"), ("", "/var/tmp"), (None, "/var/tmp")])
def test_what_is_staged_elsewhere_is_where_tmpdir_says(monkeypatch, stated, used):
    if stated is None:
        monkeypatch.delenv("TMPDIR", raising=False)
    else:
        monkeypatch.setenv("TMPDIR", stated)
    assert build(source_url=URL, name="web").tmpdir == used
