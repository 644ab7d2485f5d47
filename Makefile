# make demo    the main job on real data, from nothing      make test      what every commit must pass
# make bench   figures of the README, an hour             make lint      style, types, import directions
# make report  the page of the last demo                    make clean     all that make made
# make horovod builds Horovod for the back end of that name, some minutes

PYTHON ?= python3
TORCH  ?= torch==2.13.0
EXTRAS := federated,board,report,tensorboard,float8,dev
BIN    := .venv/bin
PIP    := $(BIN)/pip --quiet --disable-pip-version-check install
# A change of what is asked for installs again; nothing else does.
STAMP  := .venv/installed-$(shell cat pyproject.toml constraints.txt | sha256sum | cut -c 1-16)

# Tests that run at once.
JOBS   ?= 2
# One thread a process: two torch threads on two busy cores are many times slower than one.
export OMP_NUM_THREADS ?= 1

.PHONY: picture demo test test-slow bench report lint clean constraints install horovod

demo: $(STAMP)
	$(BIN)/efftrain demo --out runs/demo

test: $(STAMP)
	$(BIN)/pytest --numprocesses $(JOBS) --dist worksteal

test-slow: $(STAMP)
	$(BIN)/pytest -m slow

bench: $(STAMP)
	$(BIN)/python benchmarks/cluster_watch.py
	$(BIN)/python benchmarks/federated_watch.py
	$(BIN)/python benchmarks/federated_speed.py
	$(BIN)/python benchmarks/limited_link.py --steps 10 --turns 3 || test $$? = 2  # says what it lacks
	$(BIN)/python benchmarks/device_watch.py
	@if command -v qemu-system-arm >/dev/null; then $(BIN)/python benchmarks/device_mcunet.py; \
	else echo "benchmarks/device_mcunet.py needs qemu-system-arm" >&2; fi

report: $(STAMP)
	@test -f runs/demo/report.html || { echo "no demo yet; run: make demo" >&2; exit 1; }
	@echo runs/demo/report.html

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pip check

install: $(STAMP)

horovod: $(STAMP)
	bash launch/horovod.sh $(BIN)/python

$(STAMP):
	$(PYTHON) -m venv .venv
	$(PIP) $(TORCH)
	$(PIP) --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@rm -f .venv/installed-*
	@touch $@

constraints: $(STAMP)
	{ echo "# Versions that the tests passed with, on Python 3.11. Remake: make constraints"; \
	  $(BIN)/pip freeze --exclude-editable | grep '==' | grep -v '^torch==' | sed 's/$$/ ; python_version >= "3.11"/'; } > constraints.txt

clean:
	rm -rf .venv runs .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

picture: $(STAMP)
	chromium --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking \
	  --disable-component-update --disable-sync --hide-scrollbars --window-size=1150,1250 \
	  --screenshot=$(CURDIR)/docs/report.png file://$(CURDIR)/runs/demo/report.html
