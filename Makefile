# make demo    the main job on embedded data with a real small model, about 15 minutes on two cores
# make test    every test
# make lint    ruff
# MODEL=... DATASET=... SEED=... make demo runs the same on another model, data set or seed.

PYTHON ?= python3
MODEL ?= data/models/smollm2
DATASET ?= snippets
SEED ?= 42

VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.installed
RUN := $(notdir $(MODEL:/=))-$(notdir $(DATASET:/=))-seed$(SEED)
FINE_TUNED := qlora_checkpoints/demo-$(RUN)
UNLEARNT := unlearn_checkpoints/demo-$(RUN)
RESULTS := results/demo$(if $(filter-out 42,$(SEED)),-seed$(SEED))

.PHONY: demo test lint
.DELETE_ON_ERROR:

$(READY): requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt pytest ruff
	touch $@

test: $(READY)
	$(PY) -m pytest

lint: $(READY)
	$(PY) -m ruff check . && $(PY) -m ruff format --check .
