# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import itertools
import sys
import time

import pytest
from ansible_collections.virtforge.libvirt.plugins.module_utils import _xml
from ansible_collections.virtforge.libvirt.plugins.module_utils._errors import CloneError
from ansible_collections.virtforge.libvirt.plugins.module_utils._xml import PoolXML, VolumeXML

# As "virsh vol-dumpxml" prints a volume of a dir pool.
DUMPED = """<volume type='file'>
  <name>web01.qcow2</name>
  <key>/srv/vm/web01.qcow2</key>
  <capacity unit='bytes'>10737418240</capacity>
  <allocation unit='bytes'>1593344</allocation>
  <physical unit='bytes'>1769472</physical>
  <target>
    <path>/srv/vm/web01.qcow2</path>
    <format type='qcow2'/>
    <permissions>
      <mode>0640</mode>
      <owner>64055</owner>
      <group>107</group>
      <label>system_u:object_r:virt_image_t:s0</label>
    </permissions>
    <timestamps>
      <atime>1760000000.123456789</atime>
      <mtime>1760000001</mtime>
      <ctime>1760000001.000000001</ctime>
      <btime>0</btime>
    </timestamps>
    <compat>1.1</compat>
    <clusterSize unit='B'>131072</clusterSize>
    <features>
      <lazy_refcounts/>
      <extended_l2/>
    </features>
  </target>
  <backingStore>
    <path>/srv/vm/golden.raw</path>
    <format type='raw'/>
    <permissions>
      <mode>0444</mode>
      <owner>0</owner>
      <group>0</group>
      <label>system_u:object_r:virt_content_t:s0</label>
    </permissions>
    <timestamps>
      <atime>1750000000.5</atime>
    </timestamps>
  </backingStore>
</volume>
"""

DUMPED_LOGICAL = """<volume type='block'>
  <name>data</name>
  <key>mTnOpq-aaaa-bbbb-cccc-dddd-eeee-ffffff</key>
  <source>
    <device path='/dev/vdb'>
      <extent start='1048576' end='5242880'/>
      <extent start='9437184' end='13631488'/>
    </device>
  </source>
  <capacity unit='bytes'>8388608</capacity>
  <allocation unit='bytes'>8388608</allocation>
  <physical unit='bytes'>8388608</physical>
  <target>
    <path>/dev/vg0/data</path>
    <permissions>
      <mode>0660</mode>
      <owner>0</owner>
      <group>6</group>
      <label>system_u:object_r:fixed_disk_device_t:s0</label>
    </permissions>
  </target>
  <backingStore>
    <path>/dev/vg0/origin</path>
  </backingStore>
</volume>
"""


def volume(inside):
    return _xml.parse_volume(f"<volume>{inside}</volume>")


def target(inside):
    return volume(f"<target>{inside}</target>")


def permissions(inside):
    return target(f"<permissions>{inside}</permissions>")


def refusal(call, *args):
    with pytest.raises(CloneError) as caught:
        call(*args)
    assert "\n" not in caught.value.msg
    assert len(caught.value.msg) < 300
    return caught.value.code, caught.value.msg


# What documents state


def test_what_libvirt_prints_is_read_back():
    assert _xml.parse_volume(DUMPED) == VolumeXML(
        name="web01.qcow2",
        capacity=10737418240,
        format="qcow2",
        mode=0o640,
        owner=64055,
        group=107,
        compat="1.1",
        cluster_size=131072,
        lazy_refcounts=True,
        extended_l2=True,
        backing_path="/srv/vm/golden.raw",
        backing_format="raw",
    )


def test_what_libvirt_prints_of_a_logical_volume_is_read_back():
    assert _xml.parse_volume(DUMPED_LOGICAL) == VolumeXML(
        name="data", capacity=8388608, mode=0o660, owner=0, group=6, backing_path="/dev/vg0/origin"
    )


def test_order_does_not_matter_and_comments_between_elements_neither():
    assert _xml.parse_volume(
        "<!-- a --><volume><target><!-- b --><permissions><group>2</group><!-- c --><owner>1</owner></permissions>"
        "<?pi x?><format type='raw'/></target><capacity>1</capacity>text<name>n</name></volume><!-- d -->"
    ) == VolumeXML(name="n", capacity=1, format="raw", owner=1, group=2)


def test_an_empty_document_states_nothing():
    assert volume("") == VolumeXML() == target("<permissions/>")


@pytest.mark.parametrize(
    "inside, field, value",
    [
        ("<name>a &amp; &lt;b&gt;</name>", "name", "a & <b>"),
        ("<name><![CDATA[a & <b>]]></name>", "name", "a & <b>"),
        ("<name>caf\u00e9 \u6f22\u5b57 \U0001f4be</name>", "name", "caf\u00e9 \u6f22\u5b57 \U0001f4be"),
        # Not stripped, and not judged: libvirt makes such a file, and whoever uses the name has to look at it.
        ("<name> a/.. </name>", "name", " a/.. "),
        ("<capacity unit='GiB'>40</capacity>", "capacity", 42949672960),
        ("<capacity unit='gb'>40</capacity>", "capacity", 40000000000),
        ("<capacity unit=''>40</capacity>", "capacity", 40),
        ("<capacity>\n 0</capacity>", "capacity", 0),
        ("<capacity/>", "capacity", None),
        ("<allocation unit='EiB'>0</allocation>", "capacity", None),
        ("<target><format type='iso'/></target>", "format", "raw"),
        ("<target><format type='vhd'/></target>", "format", "vhd"),
        ("<target><format type=''/></target>", "format", None),
        ("<target><format/></target>", "format", None),
        ("<target><compat>0.10</compat></target>", "compat", "0.10"),
        ("<target><compat/></target>", "compat", None),
        ("<target><features/></target>", "compat", "1.1"),
        ("<target><compat>0.10</compat><features/></target>", "compat", "0.10"),
        ("<target><features/></target>", "lazy_refcounts", None),
        ("<target><features><extended_l2/><!-- only --></features></target>", "extended_l2", True),
        ("<target><features><o:warp xmlns:o='urn:other'/></features></target>", "compat", "1.1"),
        ("<target><clusterSize unit='KiB'>64</clusterSize></target>", "cluster_size", 65536),
        ("<target><clusterSize>0</clusterSize></target>", "cluster_size", None),
        ("<target><nocow/></target>", "nocow", True),
        ("<target/>", "nocow", None),
        ("<target><encryption format='luks'/></target>", "encrypted", True),
        ("<target/>", "encrypted", False),
        ("<backingStore><path>/b</path></backingStore>", "backing_path", "/b"),
        ("<backingStore><path>/b</path><format type='iso'/></backingStore>", "backing_format", "raw"),
        ("<backingStore><path/><format type='unheard-of'/></backingStore>", "backing_path", None),
        ("<backingStore/>", "backing_path", None),
    ],
)
def test_an_element_states(inside, field, value):
    assert getattr(volume(inside), field) == value


@pytest.mark.parametrize("name", [name for name in _xml._FORMATS if name != "iso"])
def test_formats_of_libvirts_file_pools(name):
    assert target(f"<format type='{name}'/>").format == name


@pytest.mark.parametrize("kind", ["file", "block", "dir", "network", "netdir", "ploop", ""])
def test_the_type_of_a_volume_is_the_pools_affair(kind):
    assert _xml.parse_volume(f"<volume type='{kind}'/>") == VolumeXML()


@pytest.mark.parametrize(
    "text, mode", [("0640", 0o640), ("640", 0o640), ("0", 0), ("00", 0), ("0777", 0o777), (" 0600", 0o600), ("", None)]
)
def test_mode_is_octal(text, mode):
    assert permissions(f"<mode>{text}</mode>").mode == mode


@pytest.mark.parametrize(
    "text, number",
    [("0", 0), ("107", 107), ("0744", 744), ("0" * 11 + "7", 7), (" 7\n", 7), ("4294967294", 4294967294)]
    # "Leave it" as libvirt writes it, signed and unsigned.
    + [("-1", None), (" -1 ", None), ("4294967295", None)],
)
def test_owner_and_group_are_decimal(text, number):
    stated = permissions(f"<owner>{text}</owner><group>{text}</group>")
    assert (stated.owner, stated.group) == (number, number)


@pytest.mark.parametrize(
    "ignored",
    [
        "<key>k</key><key>k</key>",
        "<physical unit='leagues'>x</physical>",
        "<source><device path='/dev/sda'/></source>",
        "<target><path>/etc/passwd</path></target>",
        "<target><timestamps><mtime>never</mtime></timestamps></target>",
        "<target><permissions><label>a:b:c</label></permissions></target>",
        "<unheard-of><name>b</name></unheard-of>",
        "<target><unheard-of/><name>b</name></target>",
        "<Name>b</Name>",
        "<o:name xmlns:o='urn:other'>b</o:name><o:capacity xmlns:o='urn:other'>x</o:capacity>",
        "<target><features xmlns='urn:other'><warp/></features></target>",
    ],
)
def test_output_only_unknown_and_foreign_elements_are_ignored(ignored):
    assert volume(f"<name>a</name>{ignored}") == VolumeXML(name="a")


@pytest.mark.parametrize("encoding", ["utf-8", "UTF-16", "ISO-8859-1", "US-ASCII", "UTF-7"])
def test_the_encoding_that_a_document_claims_changes_nothing(encoding):
    document = f"<?xml version='1.0' encoding='{encoding}'?><volume><name>caf\u00e9</name></volume>"
    assert _xml.parse_volume(document).name == "caf\u00e9"


def test_an_encoding_that_does_not_exist_is_no_traceback():
    # libxml2 2.9 refuses it, 2.14 goes by what it was told.
    document = "<?xml version='1.0' encoding='no-such'?><volume><name>caf\u00e9</name></volume>"
    try:
        assert _xml.parse_volume(document).name == "caf\u00e9"
    except CloneError as exc:
        assert exc.code == "XML_ERROR"


@pytest.mark.parametrize("before", ["\n  ", "\ufeff", "\t\r\n"])
def test_what_an_editor_or_a_template_puts_before_a_document_is_accepted(before):
    assert _xml.parse_volume(f"{before}<?xml version='1.0'?><volume><name>a</name></volume>\n").name == "a"


# What is refused


@pytest.mark.parametrize(
    "inside, code, msg",
    [
        ("<name/>", "XML_ERROR", "xml: the volume name element is empty"),
        ("<name></name>", "XML_ERROR", "xml: the volume name element is empty"),
        (
            "<capacity>ten</capacity>",
            "XML_ERROR",
            "xml: malformed capacity element: 'ten' is not a decimal number",
        ),
        (
            "<capacity unit='GiB'>10 </capacity>",
            "XML_ERROR",
            "xml: malformed capacity element: '10 ' is not a decimal number",
        ),
        (
            "<allocation>-1</allocation>",
            "XML_ERROR",
            "xml: malformed allocation element: '-1' is not a decimal number",
        ),
        (
            "<allocation unit='furlong'>1</allocation>",
            "INVALID_ARG",
            "xml: element <allocation>, '1', has the unknown suffix 'furlong'",
        ),
        (
            "<capacity unit='EiB'>8</capacity>",
            "INVALID_ARG",
            "xml: element <capacity>, '8', is more than 9223372036854775807 bytes",
        ),
        (
            "<target><clusterSize>64K</clusterSize></target>",
            "XML_ERROR",
            "xml: malformed clusterSize element: '64K' is not a decimal number",
        ),
        ("<target><format type='none'/></target>", "CONFIG_UNSUPPORTED", "xml: unknown volume format type 'none'"),
        ("<target><format type='QCOW2'/></target>", "CONFIG_UNSUPPORTED", "xml: unknown volume format type 'QCOW2'"),
        (
            "<backingStore><path>/b</path><format type='zip'/></backingStore>",
            "CONFIG_UNSUPPORTED",
            "xml: unknown volume format type 'zip'",
        ),
        (
            "<target><compat>1.x</compat></target>",
            "XML_ERROR",
            "xml: forbidden characters in 'compat' attribute: '1.x'",
        ),
        (
            "<target><compat>\u0661.\u0661</compat></target>",
            "XML_ERROR",
            r"xml: forbidden characters in 'compat' attribute: '\u0661.\u0661'",
        ),
        ("<target><compat>1.2</compat></target>", "CONFIG_UNSUPPORTED", "xml: compat is 0.10 or 1.1, not '1.2'"),
        (
            "<target><features><data_file/></features></target>",
            "CONFIG_UNSUPPORTED",
            "xml: unsupported feature 'data_file'",
        ),
        (
            "<target><compat>0.10</compat><features><lazy_refcounts/></features></target>",
            "CONFIG_UNSUPPORTED",
            "xml: lazy_refcounts is not supported with compat level 0.10",
        ),
        (
            "<target><compat>0.10</compat><features><extended_l2/></features></target>",
            "CONFIG_UNSUPPORTED",
            "xml: extended_l2 is not supported with compat level 0.10",
        ),
        (
            "<target><format type='raw'/><compat>1.1</compat></target>",
            "CONFIG_UNSUPPORTED",
            "xml: <compat> is only available with qcow2, not with format raw",
        ),
        (
            "<target><format type='vmdk'/><clusterSize>65536</clusterSize></target>",
            "CONFIG_UNSUPPORTED",
            "xml: <clusterSize> is only available with qcow2, not with format vmdk",
        ),
        (
            "<target><format type='iso'/><features/></target>",
            "CONFIG_UNSUPPORTED",
            "xml: <features> is only available with qcow2, not with format raw",
        ),
    ],
)
def test_a_refusal_names_the_element_and_the_value(inside, code, msg):
    assert refusal(volume, inside) == (code, msg)


def test_an_unknown_type_of_volume_is_refused():
    assert refusal(_xml.parse_volume, "<volume type='tape'/>") == (
        "CONFIG_UNSUPPORTED",
        "xml: unknown volume type 'tape'",
    )


@pytest.mark.parametrize("mode", ["1777", "4755", "0o644", "rw-r--r--", "-1", "+644", "8", "644 ", "\u0666", "7" * 500])
def test_a_malformed_mode_is_refused(mode):
    code, msg = refusal(permissions, f"<mode>{mode}</mode>")
    assert (code, msg[:26]) == ("XML_ERROR", "xml: malformed octal mode ")


@pytest.mark.parametrize("name", ["owner", "group"])
@pytest.mark.parametrize("text", ["", "root", "-2", "+1", "1.0", "0x1", "1 2", "4294967296", "\u0661", "9" * 500])
def test_a_malformed_owner_or_group_is_refused(name, text):
    code, msg = refusal(permissions, f"<{name}>{text}</{name}>")
    assert code == "XML_ERROR"
    assert msg.startswith(f"xml: malformed {name} element: ")
    assert msg.endswith(" is not a numeric id")


def test_malformed_permissions_of_the_backing_store_are_refused_as_libvirt_does():
    inside = "<backingStore><path>/b</path><permissions><mode>9</mode></permissions></backingStore>"
    assert refusal(volume, inside) == ("XML_ERROR", "xml: malformed octal mode '9'")


@pytest.mark.parametrize(
    "document, shown",
    [
        ("<pool/>", "'pool'"),
        ("<Volume/>", "'Volume'"),
        ("<volume xmlns='urn:other'><name>a</name></volume>", "'{urn:other}volume'"),
        ("<v:volume xmlns:v='urn:other'/>", "'{urn:other}volume'"),
    ],
)
def test_another_root_element_is_refused(document, shown):
    expected = f"xml: expecting root element of 'volume', not {shown}"
    assert refusal(_xml.parse_volume, document) == ("XML_ERROR", expected)


LEAVES = {
    "name": "{}",
    "capacity": "{}",
    "allocation": "{}",
    "mode": "<target><permissions>{}</permissions></target>",
    "owner": "<target><permissions>{}</permissions></target>",
    "group": "<target><permissions>{}</permissions></target>",
    "compat": "<target>{}</target>",
    "clusterSize": "<target>{}</target>",
    "path": "<backingStore>{}</backingStore>",
}


@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize("content", ["7<!-- c -->7", "7<?pi?>7", "7<b/>", "<b>7</b>", "<!-- c -->"])
def test_a_leaf_holds_nothing_but_text(leaf, content):
    document = LEAVES[leaf].format(f"<{leaf}>{content}</{leaf}>")
    assert refusal(volume, document) == ("XML_ERROR", f"xml: element <{leaf}> contains more than plain text")


def test_a_comment_cannot_hide_the_rest_of_a_name():
    # lxml's .text is "ok", libvirt's string() is "ok../../etc/passwd".
    assert refusal(volume, "<name>ok<!-- x -->../../etc/passwd</name>")[0] == "XML_ERROR"


CONTAINERS = dict(
    LEAVES,
    target="{}",
    backingStore="{}",
    permissions="<target>{}</target>",
    format="<target>{}</target>",
    features="<target>{}</target>",
    nocow="<target>{}</target>",
    encryption="<target>{}</target>",
    lazy_refcounts="<target><features>{}</features></target>",
)


@pytest.mark.parametrize("element", CONTAINERS)
def test_nothing_is_stated_twice(element):
    once = f"<{element}></{element}>"
    code, msg = refusal(volume, CONTAINERS[element].format(once * 2))
    assert (code, msg.partition(" in ")[0]) == ("XML_ERROR", f"xml: element <{element}> appears 2 times")


@pytest.mark.parametrize(
    "document",
    [
        "",
        "  \n",
        "web01.qcow2",
        "<volume>",
        "<volume></pool>",
        "<volume/><volume/>",
        "<volume/>trailing",
        "<!-- only -->",
        "<v:volume/>",
        "<volume a='1' a='2'/>",
        "<volume><name>&undeclared;</name></volume>",
        "<volume><name>a\x01b</name></volume>",
        "<volume><name>a&#0;b</name></volume>",
        "<volume><name>a&#8;b</name></volume>",
        "<volume><name>a\ufffeb</name></volume>",
        pytest.param("<volume>" * 100000, id="endless"),
        pytest.param("<volume>" + "<a>" * 5000 + "</a>" * 5000 + "</volume>", id="deep"),
        "<?xml version='1.0' encoding='UTF-7'?>+ADw-!DOCTYPE volume+AD4-<volume/>",
    ],
)
def test_what_is_not_well_formed_is_refused(document):
    code, msg = refusal(_xml.parse_volume, document)
    assert code == "XML_ERROR"
    assert msg.startswith("xml: the document is not well-formed: ")


@pytest.mark.parametrize("document", ["\0", "<volume/>\0", "<volume><name>a\0b</name></volume>", "<volume/>\0<volume/>"])
def test_a_nul_character_is_refused(document):
    assert refusal(_xml.parse_volume, document) == ("XML_ERROR", "xml: the document contains a NUL character")


def test_bytes_that_were_no_text_are_refused():
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    assert refusal(volume, f"<name>{name}</name>") == ("XML_ERROR", "xml: the document is not valid text")


@pytest.mark.parametrize("filler, size", [("a", 1), ("\u6f22", 3)])
def test_a_document_larger_than_1_mib_is_refused_unparsed(filler, size):
    frame = "<volume><key></key></volume>"
    fits = (_xml.MAX_DOCUMENT - len(frame)) // size
    assert volume(f"<key>{filler * fits}</key>") == VolumeXML()
    code, msg = refusal(volume, f"<key>{filler * (fits + 1)}</key>")
    assert code == "XML_ERROR"
    assert msg == f"xml: the document has {len(frame) + (fits + 1) * size} bytes, more than 1048576"


def bomb(depth):
    entities = "".join(f'<!ENTITY e{i} "{f"&e{i - 1};" * 10}">' for i in range(1, depth))
    return f'<!DOCTYPE volume [<!ENTITY e0 "ha">{entities}]><volume><name>&e{depth - 1};</name></volume>'


@pytest.mark.parametrize(
    "document",
    [
        pytest.param(bomb(3), id="small bomb"),
        pytest.param(bomb(30), id="billions of laughs"),
        "<!DOCTYPE volume><volume/>",
        "<?xml version='1.0'?><!-- c --><!DOCTYPE volume SYSTEM 'http://127.0.0.1:9/v.dtd'><volume/>",
        "<!DOCTYPE volume PUBLIC '-//x' 'file:///nowhere.dtd'><volume/>",
        "<!DOCTYPE v [<!ENTITY % p SYSTEM 'file:///nowhere'> %p;]><volume/>",
        "<!DOCTYPE v [<!ATTLIST capacity unit CDATA 'TiB'>]><volume><capacity>1</capacity></volume>",
        "\ufeff \n<!DOCTYPE volume><volume/>",
    ],
)
def test_a_doctype_is_refused_at_once(document):
    started = time.monotonic()
    assert refusal(_xml.parse_volume, document) == (
        "XML_ERROR",
        "xml: the document has a DOCTYPE, which volume XML may not have",
    )
    assert time.monotonic() - started < 1


@pytest.mark.parametrize("read", [_xml.parse_volume, _xml.pool_target, _xml.domain_disks])
def test_an_external_entity_is_never_read(read, tmp_path):
    canary = tmp_path / "canary"
    canary.write_text("secret")
    tag = {_xml.parse_volume: "volume", _xml.pool_target: "pool", _xml.domain_disks: "domain"}[read]
    document = f'<!DOCTYPE x [<!ENTITY e SYSTEM "{canary.as_uri()}">]><{tag}><name>&e;</name></{tag}>'
    code, msg = refusal(read, document)
    assert (code, msg) == ("XML_ERROR", f"xml: the document has a DOCTYPE, which {tag} XML may not have")


def test_an_xinclude_is_not_followed(tmp_path):
    (tmp_path / "canary").write_text("secret")
    include = f"<x:include xmlns:x='http://www.w3.org/2001/XInclude' parse='text' href='{tmp_path}/canary'/>"
    assert refusal(volume, f"<name>{include}</name>")[0] == "XML_ERROR"


def test_without_lxml_the_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lxml", None)
    assert refusal(_xml.parse_volume, "<volume/>") == (
        "MISSING_DEPENDENCY",
        "xml: XML and libvirt pools need the Python package lxml (python3-lxml) on the managed host",
    )


# Documents for libvirt


def test_a_volume_document_in_full():
    document = _xml.volume_xml(
        name="a & <b>.qcow2",
        capacity=42949672960,
        allocation=4096,
        format="qcow2",
        mode=0o640,
        owner=64055,
        group=107,
        compat="1.1",
        cluster_size=131072,
        lazy_refcounts=True,
        extended_l2=True,
        nocow=True,
    )
    assert (
        document
        == """<volume>
  <name>a &amp; &lt;b&gt;.qcow2</name>
  <capacity unit="bytes">42949672960</capacity>
  <allocation unit="bytes">4096</allocation>
  <target>
    <format type="qcow2"/>
    <permissions>
      <mode>0640</mode>
      <owner>64055</owner>
      <group>107</group>
    </permissions>
    <compat>1.1</compat>
    <nocow/>
    <clusterSize unit="bytes">131072</clusterSize>
    <features>
      <lazy_refcounts/>
      <extended_l2/>
    </features>
  </target>
</volume>
"""
    )


def test_a_volume_document_states_no_allocation_as_none():
    # Without the element libvirt allocates the whole capacity.
    document = _xml.volume_xml(name="n", capacity=1)
    assert '<allocation unit="bytes">0</allocation>' in document
    assert _xml.parse_volume(document) == VolumeXML(name="n", capacity=1)


CHOICES = {
    "format": [None, "qcow2"],
    "mode": [None, 0, 0o600],
    "owner": [None, 0],
    "group": [None, 36],
    "compat": [None, "1.1"],
    "cluster_size": [None, 65536],
    "lazy_refcounts": [None, True],
    "extended_l2": [None, True],
    "nocow": [None, True],
}


@pytest.mark.parametrize("features", list(itertools.product(*CHOICES.values()))[::7])
def test_what_is_written_is_read_back(features):
    stated = dict(zip(CHOICES, features))
    expected = dict(stated)
    if stated["lazy_refcounts"] or stated["extended_l2"]:
        expected["compat"] = "1.1"
    document = _xml.volume_xml(name="n", capacity=1, **stated)
    assert _xml.parse_volume(document) == VolumeXML(name="n", capacity=1, **expected)


def test_features_that_are_off_are_not_written():
    document = _xml.volume_xml(name="n", capacity=1, lazy_refcounts=False, extended_l2=False, nocow=False)
    assert "features" not in document
    assert "nocow" not in document


@pytest.mark.parametrize("name", ["]]>", "&amp;", "'\"", "<!-- -->", " ", "\u00e9\u6f22\U0001f4be", "a\r\nb"])
def test_any_name_survives_the_round_trip(name):
    assert _xml.parse_volume(_xml.volume_xml(name=name, capacity=1)).name == name


@pytest.mark.parametrize("name", ["a\0b", "a\x1bb", "\udce9", "\ufffe"])
def test_a_name_that_xml_cannot_carry_is_refused(name):
    assert refusal(lambda: _xml.volume_xml(name=name, capacity=1)) == (
        "INVALID_ARG",
        f"name: {name!a} contains a character that XML cannot carry",
    )


# Pools and domains


def test_a_pool_as_libvirt_describes_it():
    document = """<pool type='netfs'>
  <name>a &amp; b</name>
  <uuid>0a1b2c3d-0000-4000-8000-000000000001</uuid>
  <capacity unit='bytes'>1000</capacity>
  <allocation unit='bytes'>10</allocation>
  <available unit='bytes'>990</available>
  <source>
    <host name='nfs.example.com'/>
    <dir path='/export'/>
    <format type='auto'/>
  </source>
  <target>
    <path>/srv/vm</path>
    <permissions><mode>0755</mode><owner>0</owner><group>0</group></permissions>
  </target>
</pool>"""
    assert _xml.pool_target(document) == PoolXML("netfs", "a & b", "0a1b2c3d-0000-4000-8000-000000000001", "/srv/vm")


def test_a_pool_without_a_path_is_not_named_after_its_source():
    document = "<pool type='rbd'><name>p</name><source><name>ceph-pool</name></source></pool>"
    assert _xml.pool_target(document) == PoolXML("rbd", "p", None, None)


@pytest.mark.parametrize("read, tag", [(_xml.pool_target, "pool"), (_xml.domain_disks, "domain")])
def test_only_the_document_that_was_asked_for_is_read(read, tag):
    expected = f"xml: expecting root element of '{tag}', not 'volume'"
    assert refusal(read, "<volume/>") == ("XML_ERROR", expected)


def test_the_disks_of_a_domain_are_files_devices_chains_and_mirrors():
    document = """<domain type='kvm' id='1'>
  <name>web01</name>
  <os><loader type='pflash'>/fw/code.fd</loader><nvram>/fw/vars.fd</nvram></os>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2'/>
      <source file='/srv/vm/top.qcow2' index='1'>
        <reservations managed='no'><source type='unix' path='/run/pr.sock' mode='client'/></reservations>
        <dataStore type='file'><format type='raw'/><source file='/srv/vm/top.data'/></dataStore>
      </source>
      <backingStore type='file' index='2'>
        <format type='qcow2'/>
        <source file='/srv/vm/middle.qcow2'/>
        <backingStore type='block' index='3'>
          <format type='raw'/>
          <source dev='/dev/vg0/base'/>
          <backingStore/>
        </backingStore>
      </backingStore>
      <mirror type='file' file='/srv/new/old-style.qcow2' job='copy'>
        <format type='qcow2'/>
        <source file='/srv/new/top.qcow2'/>
        <backingStore type='file'><source file='/srv/new/below.qcow2'/></backingStore>
      </mirror>
      <target dev='vda' bus='virtio'/>
    </disk>
    <disk type='block' device='disk'><source dev='/dev/vg0/data'/><target dev='vdb'/></disk>
    <disk type='file' device='cdrom'><target dev='sda'/></disk>
    <disk type='file' device='cdrom'><source file='/srv/vm/top.qcow2'/><target dev='sdb'/></disk>
    <disk type='network' device='disk'><source protocol='rbd' name='pool/image'/><target dev='vdc'/></disk>
    <disk type='volume' device='disk'><source pool='images' volume='x'/><target dev='vdd'/></disk>
    <interface type='direct'><source dev='eth0' mode='bridge'/></interface>
    <serial type='file'><source file='/var/log/serial.log'/></serial>
  </devices>
</domain>"""
    assert _xml.domain_disks(document) == [
        "/srv/vm/top.qcow2",
        "/srv/vm/top.data",
        "/srv/vm/middle.qcow2",
        "/dev/vg0/base",
        "/srv/new/old-style.qcow2",
        "/srv/new/top.qcow2",
        "/srv/new/below.qcow2",
        "/dev/vg0/data",
    ]


def test_a_chain_as_long_as_libvirt_allows_is_followed():
    chain = "".join(f"<backingStore type='file'><source file='/{n}'/>" for n in range(200)) + "</backingStore>" * 200
    assert len(_xml.domain_disks(f"<domain><devices><disk>{chain}</disk></devices></domain>")) == 200


def test_a_domain_may_be_large_and_talk_about_doctypes():
    metadata = f"<metadata><n xmlns='urn:n'><![CDATA[<!DOCTYPE html>{'x' * _xml.MAX_DOCUMENT}]]></n></metadata>"
    assert _xml.domain_disks(f"<domain>{metadata}</domain>") == []


# --- what is reached by the network ---------------------------------------------------------------------------------------


def test_how_an_rbd_pool_is_reached():
    document = """<pool type='rbd'><name>ceph</name><source><host name='a' port='6789'/><host name='b'/><name>vms/team</name>
    <auth type='ceph' username='libvirt'><secret uuid='11111111-2222-3333-4444-555555555555'/></auth></source>
    <rbd:config_opts xmlns:rbd='http://libvirt.org/schemas/storagepool/rbd/1.0'>
    <rbd:option name='client_mount_timeout' value='45'/></rbd:config_opts></pool>"""
    assert _xml.pool_network(document) == _xml.NetworkXML(
        (("a", 6789), ("b", None)),
        "vms/team",
        user="libvirt",
        secret_uuid="11111111-2222-3333-4444-555555555555",
        options={"client_mount_timeout": "45"},
    )


def test_disks_on_the_network_and_disks_that_are_volumes():
    document = """<domain><devices>
    <disk type='network'><source protocol='rbd' name='vms/web'><host name='a'/><host name='b'/></source>
    <backingStore><source protocol='nbd' name='x'/></backingStore></disk>
    <disk type='volume'><source pool='ceph' volume='db'/></disk>
    <disk type='file'><source file='/x'/></disk></devices></domain>"""
    first, second = _xml.domain_network_disks(document)
    assert (first, first.hosts) == (_xml.NetworkDisk("rbd", "vms/web"), ("a", "b"))
    assert second == _xml.NetworkDisk("nbd", "x")
    assert _xml.domain_volumes(document) == [("ceph", "db")]
