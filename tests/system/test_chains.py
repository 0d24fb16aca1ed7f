# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Three volumes on top of each other, and one beside them: every order of making, growing, flattening and deleting."""

from __future__ import annotations

import harness
import pytest
from harness import GIB, MIB, module, run, same_content

VOLUME = "storage_volume"
#: what each volume of the chain is made from: base ← mid ← top, and side beside mid
BELOW = {"mid": "base.qcow2", "top": "mid", "side": "base.qcow2"}
#: orders of doing things to volumes; a "!" before one says that it is refused, and by whose name
ORDERS = [
    "grow-mid flatten-top delete-mid flatten-side delete-base",
    "flatten-mid !delete-mid:top grow-top delete-side delete-base flatten-top delete-mid",
    "!delete-mid:top !delete-base:mid,side,top !replace-base:mid,side,top !replace-mid:top flatten-mid !delete-base:side"
    " delete-top replace-mid delete-side delete-base",
]


class Chain:
    """The volumes, and for each a raw copy of what a guest has to see."""

    def __init__(self, pool, place):
        self.pool, self.place = pool, place
        self.seen = {}
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", place / "base.raw", place / "base.qcow2")
        self.remember("base")
        for number, (name, below) in enumerate(BELOW.items()):
            self.done({"source": below, "name": name, "clone_type": "linked"}, ["created"])
            run("qemu-io", "-f", "qcow2", "-c", f"write -P {number + 1} {(number * 10 + 5) * MIB} 1M", place / name)
            self.remember(name)

    def path(self, name):
        return self.place / {"base": "base.qcow2"}.get(name, name)

    def remember(self, name):
        self.seen[name] = self.place.parent / f"{self.place.name}-{name}.seen"
        run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", self.path(name), self.seen[name])

    def call(self, params, of=harness.CLONE):
        return module({"pool": self.pool, **params}, module=of)

    def done(self, params, actions, of=harness.CLONE):
        result = self.call(params, of)
        assert result.get("actions") == actions, result

    def step(self, step):
        refused, _colon, culprits = step.removeprefix("!").partition(":")
        action, name = refused.split("-")
        volume = self.path(name).name
        params, of, actions = {
            "grow": ({"capacity": "1GiB"}, VOLUME, ["grown"]),
            "flatten": ({"flatten": True}, VOLUME, ["flattened"]),
            "delete": ({"state": "absent"}, VOLUME, ["deleted"]),
            "replace": ({"source": "base.raw", "format": "raw", "force": True}, harness.CLONE, ["replaced"]),
        }[action]
        if culprits:
            result = self.call({"name": volume, **params}, of)
            assert result.get("error_code") == "OPERATION_INVALID", result
            assert result["msg"].count("depend") and all(one in result["msg"].split(": ", 1)[1] for one in culprits.split(","))
            return
        self.done({"name": volume, **params}, actions, of)
        if action == "grow":
            assert harness.info(self.path(name), "qcow2")["virtual-size"] == GIB
        if action == "flatten":
            assert "backing-filename" not in harness.info(self.path(name), "qcow2")
        if action in ("delete", "replace"):
            self.seen.pop(name).unlink()

    def look(self):
        for name, seen in self.seen.items():
            assert same_content(seen, "raw", self.path(name), "qcow2"), name


@pytest.mark.parametrize("order", ORDERS)
def test_a_chain_lives_through_every_order(request, pool, raw, order):
    """In a directory and in a pool of libvirt by turns."""
    libvirt = ORDERS.index(order) % 2
    chain = Chain(request.getfixturevalue("libvirt_pool") if libvirt else str(pool), pool)
    chain.look()
    for step in order.split():
        chain.step(step)
        chain.look()
    for seen in chain.seen.values():
        seen.unlink()
