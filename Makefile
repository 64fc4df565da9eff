# make run      set up, mount a demonstration image (or IMAGE=) at MNT= (default ./mnt), show it
# make test     install what the tests need and run them all
# make venv     only .venv with fusewire in it
# make bench    kernel ext4, fuse2fs and fusewire side by side (BENCH= options: see bench/README.md)
# For developers: lint, types, unit (needs no root), mount, hostile, model, crash (long: more than ten
# thousand cuts, ten minutes each of stress and random data, a system's files, databases killed)

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
MNT    ?= ./mnt
IMAGE  ?= demo.img
SUDO   := $(shell [ "$$(id -u)" = 0 ] || command -v sudo)
# Debian packages: to build and run, to test, to measure
NEEDS       := python3-venv gcc python3-dev e2fsprogs
TEST_NEEDS  := fuse3 fuse2fs fio acl attr fdisk util-linux libc6-dev linux-libc-dev fsverity rsync git
# Tests of one file share their images, so files go to processes as wholes.
PARALLEL := -n 2 --dist loadfile
export PATH := $(PATH):/usr/sbin:/sbin

.PHONY: run venv test bench lint types unit mount hostile model crash clean

venv: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml setup.py fusewire/uapi_build.py fusewire/uapi_text.py fusewire/uapi_iomap.py fusewire/accel_build.py
	@$(PYTHON) -m venv $(VENV) 2>/dev/null || { $(MAKE) --no-print-directory debian WANTED="$(NEEDS)" && $(PYTHON) -m venv --clear $(VENV); }
	@echo "fusewire: installing into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@$(BIN)/python -m compileall -q fusewire
	@touch $@

$(VENV)/.tested: $(VENV)/.ready pyproject.toml
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

run: venv
	@sh tests/demo.sh $(BIN)/fusewire "$(IMAGE)" "$(MNT)"

test: $(VENV)/.tested
	@$(MAKE) --no-print-directory debian WANTED="$(NEEDS) $(TEST_NEEDS)"
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q $(PARALLEL)

bench: $(VENV)/.tested
	@$(MAKE) --no-print-directory debian WANTED="$(NEEDS) $(TEST_NEEDS)"
	$(BIN)/python -m bench $(BENCH)

# Installs the Debian packages WANTED that are missing, when root; says what is missing otherwise.
.PHONY: debian
debian:
	@missing=; for package in $(WANTED); do \
	    dpkg-query -W -f '$${Status}' $$package 2>/dev/null | grep -q 'ok installed' || missing="$$missing $$package"; done; \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if ! command -v apt-get >/dev/null; then echo "fusewire: install the equivalents of:$$missing" >&2; exit 0; fi; \
	if [ "$$(id -u)" != 0 ]; then echo "fusewire: missing Debian packages:$$missing (run as root: apt-get install$$missing)" >&2; exit 0; fi; \
	echo "fusewire: installing$$missing"; \
	apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $$missing >/dev/null

lint: $(VENV)/.tested
	$(BIN)/ruff check .

types: $(VENV)/.tested
	$(BIN)/mypy

unit: $(VENV)/.tested
	$(BIN)/python -m pytest -q tests/tidy tests/wire tests/ext4

mount: $(VENV)/.tested
	$(SUDO) $(BIN)/python -m pytest -q tests/mount

hostile: $(VENV)/.tested
	$(SUDO) $(BIN)/python -m pytest -q tests/hostile

model: $(VENV)/.tested
	$(SUDO) env FUSEWIRE_LONG=1 $(BIN)/python -m pytest -q tests/model

crash: $(VENV)/.tested
	@$(MAKE) --no-print-directory debian WANTED="$(NEEDS) $(TEST_NEEDS) postgresql"
	$(SUDO) env FUSEWIRE_CRASH_CUTS=10000 FUSEWIRE_STRESS_SECONDS=600 \
	    $(BIN)/python -m pytest -q --timeout 7200 tests/crash tests/stress

clean:
	rm -rf $(VENV) build *.egg-info demo.img fusewire/_uapi.py fusewire/_accel*
