# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# The developer interface. Each target installs what it needs into .venv, or by apt where root.

.PHONY: help demo test lint bench docs clean

help:
	@echo "make demo   clone volumes in directory pools, twice; the second run changes nothing"
	@echo "make test   all tests and lint; as root, they start a libvirtd of their own"
	@echo "make lint   ansible-lint, ruff, mypy, changelog"
	@echo "make bench  measure clones side by side with virsh, qemu-img, cp and virt_volume; as root, about 15 minutes"
	@echo "make docs   write the reference pages in docs/reference anew, from what the modules say of themselves"

demo:
	@tests/tools/prepare demo
	@tests/tools/demo

test:
	@tests/tools/prepare test
	@tests/tools/test

lint:
	@tests/tools/prepare lint
	@tests/tools/lint

bench:
	@tests/tools/prepare bench
	@tests/tools/bench

docs:
	@tests/tools/prepare docs
	@tests/tools/docs

clean:
	rm -rf .venv
