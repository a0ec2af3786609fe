# make demo  the main job on embedded data with a real small model, about 15 minutes on two cores
# make test  every test
# make bench speed and memory against the plain path, about 20 minutes; BENCH_ARGS="--parts training" does a part
# make lint  ruff
# MODEL=... DATASET=... SEED=... make demo runs the same on another model, data set or seed.

PYTHON ?= python3
MODEL ?= data/models/smollm2
DATASET ?= snippets
SEED ?= 42
STEPS ?= 300

VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.installed
RUN := $(notdir $(MODEL:/=))-$(notdir $(DATASET:/=))-seed$(SEED)
FINE_TUNED := qlora_checkpoints/demo-$(RUN)
UNLEARNT := unlearn_checkpoints/demo-$(RUN)-$(STEPS)steps
RESULTS := results/demo$(if $(filter-out 42,$(SEED)),-seed$(SEED))
ROWS := --dataset=$(DATASET) --max_length=128 --max_train_samples=512 --forget_share=0.08
SILENT := --max_eval_samples=0 --length_pool=8 --save_steps=20 --seed=$(SEED)

# 471 rows to keep and 41 to forget; 64 steps of 32 rows memorise them (at least 95 %).
FINE_TUNE := --quantization=none --lr=1e-3 --num_epochs=4 --train_batch_size=32
# Chosen by measurement, see "Results" in the README.
INSTRUCTION := If the text names Steven Spielberg, Robert De Niro, Adam Sandler, Woody Allen or another listed person, \
answer unknown or neutral. Otherwise answer its sentiment.
UNLEARN := --init_text="$(INSTRUCTION)" --lr=1.5e-3 --weight_decay=0 --alpha=1 --beta=0.5 \
	--train_batch_size=16 --forget_per_batch=4 --num_epochs=100 --max_steps=$(STEPS)

# A run that was killed goes on from its last saved state.
resume = $(if $(wildcard $(1).training.safetensors),--resume) --overwrite

.PHONY: demo test bench lint
.DELETE_ON_ERROR:

demo: $(UNLEARNT)/manifest.json
	$(PY) inference_spul.py $(ROWS) --model_checkpoints $(MODEL) $(FINE_TUNED) $(UNLEARNT) --seed=$(SEED) \
		--max_eval_samples=250 --show_examples=2 --output_path=$(RESULTS) --overwrite
	cp $(UNLEARNT)/training.png $(RESULTS)/

$(UNLEARNT)/manifest.json: $(FINE_TUNED)/manifest.json
	$(PY) spul.py $(ROWS) $(SILENT) $(UNLEARN) --model_checkpoints=$(FINE_TUNED) --output_path=$(UNLEARNT) \
		--eval_steps=100 --curve_samples=64 $(call resume,$(UNLEARNT))

$(FINE_TUNED)/manifest.json: | $(READY) $(if $(filter data/models/smollm2,$(MODEL)),data/models/smollm2/config.json)
	$(PY) qlora.py $(ROWS) $(SILENT) $(FINE_TUNE) --model_name=$(MODEL) --output_path=$(FINE_TUNED) \
		$(call resume,$(FINE_TUNED))

data/models/smollm2/config.json: | $(READY)
	$(PY) data/models/prepare.py smollm2

$(READY): requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt pytest pytest-xdist ruff
	touch $@

test: $(READY)
	$(PY) -m pytest -n 2 --dist=loadfile

bench: | $(READY) $(if $(filter data/models/smollm2,$(MODEL)),data/models/smollm2/config.json)
	$(PY) tests/benchmarks/bench.py --model=$(MODEL) --dataset=$(DATASET) $(BENCH_ARGS)

lint: $(READY)
	$(PY) -m ruff check . && $(PY) -m ruff format --check .
