# make demo       the main job on embedded data with a real small model, at most 15 minutes on two cores
# make demo-long  the same with more steps
# make test       every test
# make lint       ruff
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
UNLEARNT := unlearn_checkpoints/$(DEMO)-$(RUN)
RESULTS := results/$(DEMO)$(if $(filter-out 42,$(SEED)),-seed$(SEED))
COMMON := --dataset=$(DATASET) --max_length=128 --max_train_samples=960 --eval_batch_size=32

# 960 rows, 90 steps of 32: enough to memorise them (at least 95 %).
FINE_TUNE := --quantization=none --lr=1e-3 --num_epochs=3 --train_batch_size=32 --length_pool=8 --save_steps=20
# Chosen by measurement, see "Results" in the README.
UNLEARN := --length_pool=8 --save_steps=20 --eval_steps=60 --curve_samples=100

DEMO := demo
.PHONY: demo demo-long test lint
.DELETE_ON_ERROR:

demo-long: DEMO := demo-long

$(READY): requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt pytest ruff
	touch $@

test: $(READY)
	$(PY) -m pytest

lint: $(READY)
	$(PY) -m ruff check . && $(PY) -m ruff format --check .
