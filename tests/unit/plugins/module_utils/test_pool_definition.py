# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What pool documents mean, when two mean the same, and what a task makes of one."""

from __future__ import annotations

import pytest
from ansible_collections.virtforge.libvirt.plugins.module_utils._errors import CloneError
from ansible_collections.virtforge.libvirt.plugins.module_utils._pools.definition import Host, Source, Stated, merge, parse

UUID = "7641d5a8-af11-f730-a34e-0a7dfcede71f"
# As "virsh pool-dumpxml" prints a running pool.
DUMPED = f"""<pool type='netfs' xmlns:fs='http://libvirt.org/schemas/storagepool/fs/1.0'>
  <name>isos</name>
  <uuid>{UUID}</uuid>
  <capacity unit='bytes'>270553174016</capacity>
  <allocation unit='bytes'>25535692800</allocation>
  <available unit='bytes'>245017481216</available>
  <features>
    <cow state='no'/>
  </features>
  <source>
    <host name='nas.example.com' port='2049'/>
    <dir path='/export'/>
    <format type='nfs'/>
    <protocol ver='4.1'/>
  </source>
  <target>
    <path>/srv/isos</path>
    <permissions>
      <mode>0751</mode>
      <owner>64055</owner>
      <group>107</group>
    </permissions>
  </target>
  <fs:mount_opts>
    <fs:option name='ro'/>
    <fs:option name='noatime'/>
  </fs:mount_opts>
</pool>
"""


def failure(action, *arguments, **keywords):
    with pytest.raises(CloneError) as caught:
        action(*arguments, **keywords)
    return caught.value.code, caught.value.msg


def test_all_that_a_document_states():
    found = parse(DUMPED, strict=True)
    assert (found.type, found.name, found.uuid, found.target_path) == ("netfs", "isos", UUID, "/srv/isos")
    assert found.source == Source(hosts=(Host("nas.example.com", 2049),), dir="/export", format="nfs")
    assert found.permissions == (0o751, 64055, 107)
    assert found.others == {
        "features/cow": ("state=no",),
        "source/protocol": ("ver=4.1",),
        "fs:mount_opts/fs:option": ("name=noatime", "name=ro"),
    }


def test_a_source_is_shown_as_a_task_writes_it():
    assert parse(DUMPED).source.stated == {
        "hosts": [{"name": "nas.example.com", "port": 2049}],
        "dir": "/export",
        "format": "nfs",
    }
    assert parse("<pool type='dir'/>").source.stated == {}


# Each row: two documents, or pieces of DUMPED and what stands in their place.
@pytest.mark.parametrize(
    "old, new",
    [
        ("<path>/srv/isos</path>", "<path>/srv//isos/</path>"),
        ("<dir path='/export'/>", "<dir path='/export/'/>"),
        ("<fs:option name='ro'/>\n    <fs:option name='noatime'/>", "<fs:option name='noatime'/><fs:option name='ro'/>"),
        ("<host name='nas.example.com' port='2049'/>", "<host port='2049' name='nas.example.com'/>"),
        ("<capacity unit='bytes'>270553174016</capacity>", ""),
        ("<mode>0751</mode>", "<mode>0700</mode>"),
        (UUID, UUID.replace("-", "").upper()),
        ("<features>\n    <cow state='no'/>", "<!-- a remark --><features><cow state='no'/>"),
        ("  ", "\t"),
    ],
)
def test_what_makes_no_difference(old, new):
    assert old in DUMPED
    assert parse(DUMPED.replace(old, new)).means_the_same(parse(DUMPED))


@pytest.mark.parametrize(
    "old, new",
    [
        ("type='netfs'", "type='fs'"),
        ("<name>isos</name>", "<name>other</name>"),
        (UUID, UUID.replace("7", "8")),
        ("<path>/srv/isos</path>", "<path>/srv/iso</path>"),
        ("port='2049'", "port='2050'"),
        ("port='2049'", ""),
        ("nas.example.com", "nas2.example.com"),
        ("<dir path='/export'/>", "<dir path='/exports'/>"),
        ("<format type='nfs'/>", "<format type='cifs'/>"),
        ("<format type='nfs'/>", ""),
        ("ver='4.1'", "ver='4.2'"),
        ("<fs:option name='ro'/>", ""),
        ("<fs:option name='ro'/>", "<fs:option name='rw'/>"),
        ("<cow state='no'/>", "<cow state='yes'/>"),
        ("<cow state='no'/>", ""),
    ],
)
def test_what_makes_a_difference(old, new):
    assert old in DUMPED
    assert not parse(DUMPED.replace(old, new)).means_the_same(parse(DUMPED))


@pytest.mark.parametrize(
    "one, other",
    [
        ("<pool type='fs'><source><format type='auto'/></source></pool>", "<pool type='fs'/>"),
        ("<pool type='netfs'><source><format type='auto'/></source></pool>", "<pool type='netfs'><source/></pool>"),
        ("<pool type='dir'><source/><features/></pool>", "<pool type='dir'/>"),
        (
            "<pool type='netfs'><source><dir path='gv0'/><format type='glusterfs'/></source></pool>",
            "<pool type='netfs'><source><dir path='/gv0'/><format type='glusterfs'/></source></pool>",
        ),
    ],
)
def test_defaults_that_are_spelled_out_make_no_difference(one, other):
    assert parse(one).means_the_same(parse(other))


def test_only_a_volume_of_glusterfs_has_no_slash():
    one = "<pool type='netfs'><source><dir path='{}'/><format type='nfs'/></source></pool>"
    assert not parse(one.format("x")).means_the_same(parse(one.format("/x")))


def test_the_options_of_another_namespace_keep_their_values():
    found = parse(
        "<pool type='rbd' xmlns:rbd='http://libvirt.org/schemas/storagepool/rbd/1.0'><source><name>rbd</name>"
        "<host name='a' port='6789'/><host name='b'/><auth type='ceph' username='admin'><secret usage='x'/></auth></source>"
        "<rbd:config_opts><rbd:option name='b' value='2'/><rbd:option name='a' value='1'/></rbd:config_opts></pool>",
        strict=True,
    )
    assert found.others == {
        "rbd:config_opts/rbd:option": ("name=a value=1", "name=b value=2"),
    }
    assert found.source.stated == {
        "hosts": [{"name": "a", "port": 6789}, {"name": "b"}],
        "name": "rbd",
        "auth": {"type": "ceph", "username": "admin", "secret_usage": "x"},
    }


@pytest.mark.parametrize(
    "code, document, message",
    [
        ("XML_ERROR", "<pool", "xml: the document is not well-formed: "),
        ("XML_ERROR", "<volume/>", "xml: expecting root element of 'pool', not 'volume'"),
        ("XML_ERROR", "<pool/>", "xml: the pool has no type"),
        ("XML_ERROR", "<pool type='dir'><name>a</name><name>b</name></pool>", "xml: element <name> appears 2 times in <pool>"),
        ("XML_ERROR", "<pool type='dir'><uuid>x</uuid></pool>", "xml: malformed uuid element 'x'"),
        (
            "XML_ERROR",
            "<pool type='netfs'><source><host name='h' port='x'/></source></pool>",
            "xml: malformed port 'x' of a host",
        ),
        ("XML_ERROR", "<!DOCTYPE pool><pool type='dir'/>", "xml: the document has a DOCTYPE, which pool XML may not have"),
        ("XML_ERROR", "<pool type='dir'><sorce/></pool>", "xml: libvirt knows no element <sorce> in a pool"),
        (
            "XML_ERROR",
            "<pool type='dir'><target><pat>/x</pat></target></pool>",
            "xml: libvirt knows no element <target/pat> in a pool",
        ),
        (
            "XML_ERROR",
            "<pool type='dir' xmlns:fs='http://libvirt.org/schemas/storagepool/fs/1.0'><fs:mount_opt/></pool>",
            "xml: libvirt knows no element <fs:mount_opt> in a pool",
        ),
    ],
)
def test_a_document_that_is_refused(code, document, message):
    found_code, found = failure(parse, document, strict=True)
    assert found_code == code and found.startswith(message), found


def test_what_libvirt_itself_prints_is_never_refused_for_being_unknown():
    assert parse("<pool type='dir'><news><item a='1'>text</item></news></pool>").others == {"news/item": ("a=1 text",)}


# --- documents made of others ---------------------------------------------------------------------------------------------


def test_a_new_document():
    stated = Stated("fs", "/srv/fast", devices=("/dev/vdb",), format="xfs")
    found = parse(merge(None, "fast & <new>", None, stated), strict=True)
    assert (found.type, found.name, found.uuid, found.target_path) == ("fs", "fast & <new>", None, "/srv/fast")
    assert found.source == Source(devices=("/dev/vdb",), format="xfs")


def test_nothing_stated_changes_nothing():
    assert parse(merge(DUMPED, "isos", UUID, Stated())).means_the_same(parse(DUMPED))


@pytest.mark.parametrize(
    "stated, old, new",
    [
        (Stated(target_path="/new"), "/srv/isos", "/new"),
        (Stated(dir="/new"), "'/export'", "'/new'"),
        (Stated(format="cifs"), "'nfs'", "'cifs'"),
        (Stated(hosts=(Host("new"),)), "name='nas.example.com' port='2049'", "name='new'"),
        # Its port stays.
        (Stated(hosts=(Host("nas.example.com"),)), "", ""),
    ],
)
def test_what_is_stated_replaces_what_was_and_all_else_stays(stated, old, new):
    merged = parse(merge(DUMPED, "isos", UUID, stated))
    assert merged.means_the_same(parse(DUMPED.replace(old, new) if old else DUMPED))


def test_the_attributes_of_a_device_that_stays_are_kept():
    document = "<pool type='disk'><source><device path='/dev/vdb' part_separator='no'/></source></pool>"
    assert parse(merge(document, "p", None, Stated(devices=("/dev/vdb",)))).others == {
        "source/device": ("part_separator=no path=/dev/vdb",)
    }
    assert parse(merge(document, "p", None, Stated(devices=("/dev/vdc",)))).others == {}


def test_the_name_of_the_task_wins_and_a_uuid_of_the_document_stays():
    document = f"<pool type='dir'><name>old</name><uuid>{UUID}</uuid></pool>"
    found = parse(merge(document, "new", "other", Stated()))
    assert (found.name, found.uuid) == ("new", UUID)
    assert parse(merge("<pool type='dir'/>", "new", UUID, Stated())).uuid == UUID
