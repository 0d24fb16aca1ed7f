# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Parameters and XML become one request, or a refusal that names the parameter and the value."""

from __future__ import annotations

import pytest
from ansible_collections.virtforge.libvirt.plugins.module_utils._clone import request
from ansible_collections.virtforge.libvirt.plugins.module_utils._clone.request import Mode, made_up_name
from ansible_collections.virtforge.libvirt.plugins.module_utils._errors import CloneError
from ansible_collections.virtforge.libvirt.plugins.module_utils._images.probe import Qcow2Features

XML = """<volume><name>from-xml</name><capacity unit='MiB'>3</capacity>
<target><format type='qcow2'/><permissions><mode>0640</mode><owner>7</owner><group>8</group></permissions>
<compat>1.1</compat><clusterSize unit='KiB'>128</clusterSize><nocow/><features><lazy_refcounts/></features></target></volume>"""


def build(**params):
    return request.from_parameters({"pool": "/p", "source": "base", **params})


@pytest.mark.parametrize(
    "source, image_format, source_format, expected",
    [
        ("base.qcow2", "qcow2", "qcow2", "base-clone.qcow2"),
        ("base.qcow2", "raw", "qcow2", "base-clone.raw"),
        ("base.qcow2", "vmdk", "qcow2", "base-clone.vmdk"),
        ("base.img", "raw", "raw", "base-clone.img"),
        ("base.img", "qcow2", "raw", "base-clone.qcow2"),
        ("base.img", "qcow2", "qcow2", "base-clone.qcow2"),
        ("mini.iso", "raw", "raw", "mini-clone.iso"),
        ("base.vhd", "vpc", "vpc", "base-clone.vhd"),
        ("base", "raw", "raw", "base-clone"),
        ("base", "qcow2", "raw", "base-clone.qcow2"),
        ("base", "qcow2", "qcow2", "base-clone"),
        ("debian-12.1", "raw", "raw", "debian-12.1-clone"),
        ("debian-12.1", "qcow2", "raw", "debian-12.1-clone.qcow2"),
        ("base.qcow2.xz", "qcow2", "qcow2", "base-clone.qcow2"),
        ("base.QCOW2", "qcow2", "qcow2", "base-clone.QCOW2"),
        (".qcow2", "qcow2", "qcow2", ".qcow2-clone"),
        ("base.qcow2", None, None, "base-clone.qcow2"),
        ("sda", "qcow2", "raw", "sda-clone.qcow2"),
    ],
)
def test_a_name_is_made_from_the_source(source, image_format, source_format, expected):
    assert made_up_name(source, image_format, source_format) == expected


def test_a_made_up_name_that_is_too_long_is_refused():
    with pytest.raises(CloneError, match="made from the source"):
        made_up_name("x" * 250, "qcow2", "raw")


@pytest.mark.parametrize(
    "value, current, expected",
    [
        ("0640", 0o600, 0o640),
        ("640", 0o600, 0o640),
        (0o640, 0o600, 0o640),
        ("0o640", 0, 0o640),
        ("u=rw,g=r,o=", 0o777, 0o640),
        ("g+r", 0o600, 0o640),
        ("a-w", 0o666, 0o444),
        ("ug+x,o-r", 0o604, 0o710),
        ("a+X", 0o600, 0o600),
        ("a+X", 0o700, 0o711),
    ],
)
def test_modes(value, current, expected):
    assert Mode(value).on(current) == expected


@pytest.mark.parametrize("value", [644, "1777", "4755", "rw", "u=z", "", "u+s", "-1", "9"])
def test_modes_that_no_volume_has(value):
    with pytest.raises(CloneError, match="^mode: ") as caught:
        Mode(value)
    assert caught.value.code == "INVALID_ARG"


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "a/b",
        "/etc/passwd",
        "a\0b",
        "a\nb",
        "a\x1b[31m",
        "a\x7f",
        "a\x85b",
        "x" * 256,
        "ü" * 128,
        "\ud800",
        ".virtforge-0123456789abcdef.tmp",
    ],
)
@pytest.mark.parametrize("parameter", ["name", "source"])
def test_names_that_are_refused(parameter, name):
    with pytest.raises(CloneError, match=f"^{parameter}: ") as caught:
        build(**{parameter: name})
    assert caught.value.code == "INVALID_ARG"
    caught.value.msg.encode("utf-8")


@pytest.mark.parametrize(
    "name", ["a", "x" * 255, "ü" * 127, "a b", "a,b", "-f", "a'b\"c", "json:{}", "nbd:x", ".hidden", "日本", "a:b", "%s"]
)
def test_names_that_are_fine(name):
    assert build(name=name).name == name


@pytest.mark.parametrize(
    "params, code, text",
    [
        ({"pool": ""}, "INVALID_ARG", "pool: ''"),
        ({"pool": "a/b"}, "INVALID_ARG", "pool: 'a/b'"),
        ({"pool": "a\nb"}, "INVALID_ARG", "pool: "),
        ({"source_pool": "../x"}, "INVALID_ARG", "source_pool: '../x'"),
        ({"source": None, "source_path": "x.img"}, "INVALID_ARG", "source_path: 'x.img' is not an absolute path"),
        ({"source": None, "source_path": "/a\0b"}, "INVALID_ARG", "source_path: "),
        ({"format": "dmg"}, "CONFIG_UNSUPPORTED", "format: 'dmg'"),
        ({"source_format": "qcow3"}, "CONFIG_UNSUPPORTED", "source_format: 'qcow3'"),
        ({"capacity": "10X"}, "INVALID_ARG", "capacity: '10X'"),
        ({"capacity": "-1"}, "INVALID_ARG", "capacity: '-1'"),
        ({"capacity": "1.5G"}, "INVALID_ARG", "capacity: '1.5G'"),
        ({"capacity": "16E"}, "INVALID_ARG", "capacity: '16E'"),
        ({"max_capacity": "many"}, "INVALID_ARG", "max_capacity: 'many'"),
        ({"owner": "no-such-user"}, "INVALID_ARG", "owner: there is no user 'no-such-user'"),
        ({"group": "no-such-group"}, "INVALID_ARG", "group: there is no group 'no-such-group'"),
        ({"mode": "0999"}, "INVALID_ARG", "mode: '0999'"),
        ({"timeout": -1}, "INVALID_ARG", "timeout: -1"),
        ({"lock_timeout": -5}, "INVALID_ARG", "lock_timeout: -5"),
        ({"qcow2": {"cluster_size": "3000"}}, "INVALID_ARG", "qcow2.cluster_size: 3000"),
        ({"qcow2": {"cluster_size": "4M"}}, "INVALID_ARG", "qcow2.cluster_size: 4194304"),
        ({"qcow2": {"cluster_size": "x"}}, "INVALID_ARG", "qcow2.cluster_size: 'x'"),
        ({"qcow2": {"compat": "1.1"}, "format": "raw"}, "INVALID_ARG", "qcow2: ['compat'] has no meaning for format=raw"),
        ({"xml": "<volume>"}, "XML_ERROR", "well-formed"),
        ({"xml": "<volume><name>a/b</name></volume>"}, "INVALID_ARG", "name: 'a/b'"),
    ],
)
def test_bad_parameters_are_named_with_their_value(params, code, text):
    with pytest.raises(CloneError) as caught:
        build(**params)
    assert caught.value.code == code
    assert text in caught.value.msg


def test_xml_states_what_parameters_do_not():
    result = build(xml=XML)
    assert (result.name, result.capacity, result.format) == ("from-xml", 3 << 20, "qcow2")
    assert (result.owner, result.group, result.mode.on(0)) == (7, 8, 0o640)
    assert result.qcow2 == {"compat": "1.1", "cluster_size": 128 << 10, "lazy_refcounts": True}
    assert result.nocow is True


def test_parameters_win_over_xml():
    result = build(
        xml=XML, name="n", capacity="5M", owner="0", group="0", mode="0600", qcow2={"cluster_size": "64K", "nocow": False}
    )
    assert (result.name, result.capacity, result.owner, result.group, result.mode.on(0)) == ("n", 5 << 20, 0, 0, 0o600)
    assert result.qcow2["cluster_size"] == 65536
    assert result.nocow is False


def test_defaults():
    result = build()
    assert (result.name, result.format, result.capacity, result.mode) == (None, None, None, None)
    assert (result.preallocation, result.method, result.resize, result.compare) == ("off", "auto", True, "metadata")
    assert (result.lock_timeout, result.timeout, result.max_capacity) == (300.0, None, 64 << 40)
    assert result.effective_source_pool == "/p"


@pytest.mark.parametrize("alias", ["iso", "ISO", "img"])
def test_other_names_for_raw(alias):
    assert build(format=alias).format == "raw"


@pytest.mark.parametrize(
    "stated, source, expected",
    [
        ({}, None, Qcow2Features("1.1", 65536)),
        ({}, Qcow2Features("1.1", 4096, True, False, "zstd", 1), Qcow2Features("1.1", 4096, True, False, "zstd", 1)),
        ({"compat": "0.10"}, Qcow2Features("1.1", 4096, True, False, "zstd", 1), Qcow2Features("0.10", 4096)),
        ({"lazy_refcounts": True}, Qcow2Features("0.10", 4096), Qcow2Features("1.1", 4096, True)),
        ({}, Qcow2Features("0.10", 4096), Qcow2Features("0.10", 4096)),
        ({"cluster_size": 512}, None, Qcow2Features("1.1", 512)),
    ],
)
def test_qcow2_options_come_from_the_task_then_the_source_then_the_defaults(stated, source, expected):
    assert request.qcow2_features(stated, source) == expected


XML_QCOW2 = (
    "<volume><name>web</name><capacity>5</capacity><target><format type='qcow2'/><compat>1.1</compat>"
    "<clusterSize unit='KiB'>64</clusterSize></target></volume>"
)


def test_a_format_that_wins_over_the_xml_takes_its_qcow2_options_along():
    stated = build(xml=XML_QCOW2, format="raw")
    assert (stated.format, stated.qcow2) == ("raw", {})
    stated = build(xml=XML_QCOW2)
    assert (stated.format, stated.qcow2) == ("qcow2", {"compat": "1.1", "cluster_size": 65536})


@pytest.mark.parametrize("parameter", ["owner", "group"])
@pytest.mark.parametrize("value", ["4294967295", "99999999999", "\u00b2", "-1", "", "\0", "nobody of that name"])
def test_owners_that_nobody_is(parameter, value):
    with pytest.raises(CloneError, match=f"^{parameter}: there is no") as caught:
        build(**{parameter: value})
    assert caught.value.code == "INVALID_ARG"


@pytest.mark.parametrize("value, number", [("0", 0), ("4294967294", 4294967294), ("root", 0)])
def test_owners(value, number):
    assert build(owner=value).owner == number


def test_names_of_users_are_looked_up_on_the_host_only():
    with pytest.raises(CloneError, match="owner"):
        build(owner="nobody-of-that-name")
    assert request.from_parameters({"pool": "/p", "source": "b", "owner": "nobody-of-that-name"}, on_host=False).owner is None


def test_a_request_without_a_source_is_for_a_blank_volume():
    assert request.blank_from_parameters({"pool": "/p", "name": "data", "capacity": "1M"}).blank
    assert not build().blank


@pytest.mark.parametrize(
    "code, stated, word",
    [
        ("INVALID_ARG", {}, "name"),
        ("NO_SUPPORT", {"xml": "<volume><name>a</name><backingStore><path>/b</path></backingStore></volume>"}, "backingStore"),
        ("NO_SUPPORT", {"xml": "<volume><name>a</name><target><encryption format='luks'/></target></volume>"}, "encryption"),
    ],
)
def test_what_a_blank_volume_cannot_be(code, stated, word):
    with pytest.raises(CloneError, match=word) as caught:
        request.blank_from_parameters({"pool": "/p", **stated})
    assert caught.value.code == code


# --- many volumes ---------------------------------------------------------------------------------------------------------


def many(volumes, **params):
    return request.many_from_parameters({"pool": "/p", "source": "base", **params, "volumes": volumes})


def test_what_an_entry_does_not_state_is_as_the_task_states_it():
    none = {"capacity": None, "format": None, "owner": None, "group": None, "mode": None, "xml": None}
    first, second = many(
        [{**none, "name": "a"}, {**none, "name": "b", "capacity": "2M", "mode": "0640"}], capacity="1M", format="raw"
    )
    assert (first.name, first.capacity, first.format, first.mode) == ("a", 1 << 20, "raw", None)
    assert (second.name, second.capacity, second.format, second.mode.octal) == ("b", 2 << 20, "raw", 0o640)


def test_an_entry_s_name_wins_over_its_xml():
    (only,) = many([{"name": "a", "xml": XML}])
    assert (only.name, only.capacity) == ("a", 3 << 20)


@pytest.mark.parametrize(
    "volumes, text",
    [
        ([], "volumes: [] names no volume"),
        ([{"name": "a"}, {"name": "a"}], "volumes[1]: name: 'a' appears twice"),
        ([{"name": "a"}, {"name": "b", "capacity": "much"}], "volumes[1] ('b'): capacity: 'much'"),
        ([{"name": "a/b"}], "volumes[0] ('a/b'): name: 'a/b' contains '/'"),
    ],
)
def test_a_mistake_in_an_entry_names_it(volumes, text):
    with pytest.raises(CloneError) as caught:
        many(volumes)
    assert caught.value.code == "INVALID_ARG"
    assert text in caught.value.msg


def test_bwlimit_is_bytes_per_second_and_more_than_none():
    assert build(bwlimit="10MiB").bwlimit == 10 << 20
    with pytest.raises(CloneError, match="bwlimit"):
        build(bwlimit="0")
