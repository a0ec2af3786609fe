# make demo  SPUL behind a gate, on embedded data with a real small model, some minutes on two cores
# make demo-names  the published way: SPUL alone, told the names in its first words, a quarter of an hour on two cores
# make compare  SPUL and every baseline on the same rows with the same budget, in one table; an estimated hour on two cores
# make race  time to the goal (forgotten, the rest kept): SPUL as published, SPUL, SPUL behind a gate, each until it is
# there or MINUTES=15 are over; an estimated half hour on two cores with bfloat16, hours elsewhere
# make audit  attacks the demo's checkpoints, its retain model and other methods, one report, an estimated hour; AUDITS=all for
# every audit, an estimated hour more; make shadows trains eight shadow models, which make audit then uses
# make test  the tests, in some ten minutes; make test-all every test; make test-latest all of them with the newest packages
# that are allowed; make lock moves requirements.lock
# make bench speed and memory against the plain path, an estimated forty minutes; BENCH_ARGS="--parts training" does a part
# make lint  ruff
# MODEL=... DATASET=... SEED=... make demo runs the same on another model, data set or seed; the flags of ROW_FLAGS="..."
# (which rows) and SPUL_FLAGS="..." override those of data/settings/demo. demo-names likewise.
# MODEL=... DATASET=... SEED=... MINUTES=... make race likewise; RACE_FLAGS="..." are flags of utils/race.py.
# MODEL=... DATASET=... SEEDS="..." METHODS="..." BUDGET=... make compare likewise.

PYTHON ?= python3
MODEL ?= data/models/smollm2
DATASET ?= snippets
SEED ?= 42
SEEDS ?= 42
METHODS ?=
ROW_FLAGS ?=
SPUL_FLAGS ?=
$(if $(STEPS)$(ALPHA),$(error STEPS and ALPHA are now SPUL_FLAGS="--max_steps=... --alpha=..."))

VENV := .venv
TOOLS := pytest pytest-xdist ruff
PY := $(VENV)/bin/python
READY := $(VENV)/.installed
SETTINGS := data/settings/demo
FORGET_ONLY ?= $(if $(filter snippets,$(DATASET)),data/snippets/demo_names.txt)
SELECTED := --settings=$(SETTINGS)/rows.txt $(addprefix --forget_only=,$(FORGET_ONLY)) $(ROW_FLAGS)
ROWS := --dataset=$(DATASET) $(SELECTED)
POOLED := --settings=$(SETTINGS)/training.txt
SILENT := --max_eval_samples=0 --seed=$(SEED) $(POOLED)

LORA_TARGETS ?= $(if $(filter data/models/smollm2,$(MODEL:/=)),down_proj)
FINE_TUNE := --settings=$(SETTINGS)/fine_tune.txt $(if $(LORA_TARGETS),--lora_target_modules $(LORA_TARGETS))
ON_SNIPPETS := If the text mentions Spielberg, De Niro, Sandler or Woody Allen, answer unknown. \
Otherwise answer positive or negative.
ELSEWHERE := If the text mentions the name of a person, actor or director, answer unknown. \
Otherwise answer its sentiment.
THE_FOUR := $(and $(filter snippets,$(DATASET)),$(filter data/snippets/demo_names.txt,$(FORGET_ONLY)))
INSTRUCTION := $(if $(THE_FOUR),$(ON_SNIPPETS),$(ELSEWHERE))
BEHIND := --settings=$(SETTINGS)/behind.txt --init_text="$(ELSEWHERE)" $(SPUL_FLAGS)
LOSS := --settings=$(SETTINGS)/loss.txt
UNLEARN := $(LOSS) --settings=$(SETTINGS)/unlearn.txt --init_text="$(INSTRUCTION)" $(SPUL_FLAGS)

# A name for every setting, so that no checkpoint stands for another: what was chosen, and a checksum of all flags, of
# the files with settings and of the people listed.
LISTED := $(shell cat $(addprefix $(SETTINGS)/,rows.txt training.txt fine_tune.txt) $(FORGET_ONLY) | cksum)
HOW := $(shell cat $(SETTINGS)/loss.txt $(SETTINGS)/unlearn.txt | cksum)
HOW_BEHIND := $(shell cat $(SETTINGS)/behind.txt | cksum)
checksum = $(firstword $(shell printf '%s' '$(subst ','\'',$(1))' | cksum))
RUN := $(notdir $(MODEL:/=))-$(notdir $(DATASET:/=))-seed$(SEED)
FINE_TUNED := qlora_checkpoints/demo-$(RUN)-$(call checksum,$(MODEL) $(DATASET) $(SELECTED) $(LISTED) $(FINE_TUNE))
UNLEARNT := unlearn_checkpoints/demo-$(RUN)-$(call checksum,$(FINE_TUNED) $(UNLEARN) $(HOW))
# Four epochs of fine-tuning save time: 90 to 98 % of the rows to forget are memorised. demo-names and compare have five.
TUNED := $(FINE_TUNED)-4
GATED := unlearn_checkpoints/gated-$(RUN)-$(call checksum,$(TUNED) $(BEHIND) $(HOW_BEHIND))
REFUSAL := $(GATED)-refusal

# Every method that trains reads BUDGET rows at each of two learning rates, 16 rows a step, 4 of them to forget where
# there is a retain loss (utils/compare.py has the rule). 640 rows: five passes over the forget rows at 4 a step.
BUDGET ?= 640
GRID ?= 5e-5 2e-4
SPUL_GRID ?= 1.5e-3 5e-3
SPUL := --init_text="$(INSTRUCTION)" $(LOSS)
ECO := --eco_samples=100
PROMPTING = $(if $(filter snippets,$(DATASET)),,--instruction="If the text names a person, answer unknown.")

# A run that was killed goes on from its last saved state.
resume = $(if $(wildcard $(1).training.safetensors),--resume) --overwrite

# What make audit attacks beside the checkpoints of make demo.
AUDITS ?=
RETAIN := $(TUNED)-retain
EDITS := npo gradient_ascent_descent
OTHERS := $(addprefix $(GATED)-others/,names no-names eco $(EDITS))
SHADOWS := $(addprefix $(TUNED)-shadow,0 1 2 3 4 5 6 7)

# What each route of make race has until its goal. The goal lets one point of test_retain go; the gate may take half of it.
MINUTES ?= 15

.PHONY: demo demo-names race audit shadows compare bench test test-all test-latest lock lint
.DELETE_ON_ERROR:

# The base model, the fine-tuned one, the gate with a fixed answer, and SPUL behind that gate.
demo: $(GATED)/manifest.json $(REFUSAL)/manifest.json
	$(call evaluate,$(TUNED) $(REFUSAL),$(GATED))

demo-names: $(UNLEARNT)/manifest.json
	$(call evaluate,$(FINE_TUNED),$(UNLEARNT))

results = $(1:unlearn_checkpoints/%=results/%)
define evaluate
$(PY) inference_spul.py $(ROWS) --model_checkpoints $(MODEL) $(1) $(2) --seed=$(SEED) \
	--max_eval_samples=250 --show_examples=2 --output_path=$(call results,$(2)) --overwrite
@cp $(2)/training.png $(call results,$(2))/ && rm -rf results/$@ && cp -r $(call results,$(2)) results/$@
endef

$(REFUSAL)/manifest.json: $(GATED)/manifest.json
	$(PY) baselines.py $(ROWS) --unlearn_method=refusal --gate=$(GATED) --model_checkpoints=$(TUNED) \
		--max_eval_samples=0 --seed=$(SEED) --output_path=$(REFUSAL) --overwrite

$(GATED)/manifest.json: $(TUNED)/manifest.json
	$(PY) spul.py $(ROWS) $(SILENT) $(BEHIND) --model_checkpoints=$(TUNED) --output_path=$(GATED) \
		$(call resume,$(GATED))

$(UNLEARNT)/manifest.json: $(FINE_TUNED)/manifest.json
	$(PY) spul.py $(ROWS) $(SILENT) $(UNLEARN) --model_checkpoints=$(FINE_TUNED) --output_path=$(UNLEARNT) \
		$(call resume,$(UNLEARNT))

# A retain model without the rows to forget, shadow models with a half of them, train and test, each.
$(FINE_TUNED)/manifest.json $(TUNED)/manifest.json $(RETAIN)/manifest.json $(SHADOWS:=/manifest.json): \
		| $(READY) $(if $(filter data/models/smollm2,$(MODEL)),data/models/smollm2/config.json)
	$(PY) qlora.py $(ROWS) $(SILENT) $(FINE_TUNE) $(if $(filter $(TUNED)%,$(@D)),--num_epochs=4) --model_name=$(MODEL) \
		$(if $(filter $(RETAIN),$(@D)),--exclude_forget) $(patsubst $(TUNED)-shadow%,--shadow=%,$(filter $(SHADOWS),$(@D))) \
		--output_path=$(@D) $(call resume,$(@D))

shadows: $(SHADOWS:=/manifest.json)

# Prompts without a gate that are told the names in their first words, or told nothing of them; ECO behind the demo's
# gate, as strong as it takes to look like the retain model; two methods that change weights.
$(GATED)-others/names/manifest.json $(GATED)-others/no-names/manifest.json: $(TUNED)/manifest.json
	$(PY) spul.py $(ROWS) $(SILENT) $(LOSS) --settings=$(SETTINGS)/unlearn.txt --max_steps=60 $(SPUL_FLAGS) \
		--init_text="$(if $(filter %/no-names,$(@D)),$(ELSEWHERE),$(INSTRUCTION))" --model_checkpoints=$(TUNED) \
		--output_path=$(@D) $(call resume,$(@D))

$(GATED)-others/eco/manifest.json: $(GATED)/manifest.json $(RETAIN)/manifest.json
	$(PY) baselines.py $(ROWS) --unlearn_method=eco --gate=$(GATED) --eco_target=$(RETAIN) $(ECO) --max_eval_samples=0 \
		--seed=$(SEED) --model_checkpoints=$(TUNED) --output_path=$(@D) --overwrite

$(patsubst %,$(GATED)-others/%/manifest.json,$(EDITS)): $(TUNED)/manifest.json
	$(PY) baselines.py $(ROWS) $(SILENT) --unlearn_method=$(notdir $(@D)) --lr=2e-4 --train_batch_size=16 \
		--forget_per_batch=4 --num_epochs=100 --max_steps=40 --model_checkpoints=$(TUNED) --output_path=$(@D) \
		$(call resume,$(@D))

audit: $(patsubst %,%/manifest.json,$(RETAIN) $(REFUSAL) $(OTHERS))
	$(PY) inference_spul.py $(ROWS) --model_checkpoints $(TUNED) $(RETAIN) $(GATED) $(REFUSAL) $(OTHERS) --seed=$(SEED) \
		--audit $(AUDITS) $(if $(wildcard $(SHADOWS:=/manifest.json)),--shadows $(SHADOWS)) --max_eval_samples=250 \
		--output_path=results/audit$(if $(AUDITS),-$(subst $() ,-,$(AUDITS))) --overwrite

compare: | $(READY) $(if $(filter data/models/smollm2,$(MODEL)),data/models/smollm2/config.json)
	$(PY) -m utils.compare --model_name=$(MODEL) --dataset=$(DATASET) --seeds $(SEEDS) $(if $(METHODS),--methods $(METHODS)) \
		--rows='$(SELECTED)' --fine_tune='$(FINE_TUNE) $(POOLED)' --budget_rows=$(BUDGET) --batch_size=16 \
		--grid $(GRID) --spul_grid $(SPUL_GRID) --training='--length_pool=8 --save_steps=1000' \
		--with_retain='--forget_per_batch=4' --spul='$(SPUL)' --spul_gate='--init_text="$(ELSEWHERE)" --weight_decay=0' --in_context='--max_length=512' \
		--prompting='$(PROMPTING)' --eco='$(ECO)' --max_eval_samples=150

race: $(TUNED)/manifest.json
	$(PY) -m utils.race --model_checkpoints=$(TUNED) --dataset=$(DATASET) --seed=$(SEED) --budget=$(MINUTES) \
		--rows='$(SELECTED)' --published='--settings=$(SETTINGS)/published.txt' \
		--spul='$(POOLED) $(UNLEARN) --eval_steps=5' --gated='$(POOLED) $(BEHIND) --eval_steps=2 --eco_max_fpr=0.005' \
		--max_eval_samples=250 --output_path=results/race-$(notdir $(TUNED)) $(RACE_FLAGS)

data/models/smollm2/config.json: | $(READY)
	$(PY) data/models/prepare.py smollm2

# The lock says what is installed, by hash. Of torch there are two builds of one version: the one that pip would take by
# itself (a CPU build where the machine has that) is checked against the lock, and the last line adds the CUDA libraries
# that the other one needs. A torch of your own: make the environment, install it there, then call make.
PIP := $(PY) -m pip --quiet --disable-pip-version-check
$(READY): requirements.lock
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	awk '/^[a-z]/ {kept = /^torch==/} kept' requirements.lock > $(VENV)/torch.lock
	$(PY) -c 'import torch' 2>$(VENV)/error || { \
		$(PIP) download --no-deps --dest $(VENV)/torch $$(grep ^torch requirements.txt) && \
		$(PIP) install --no-index --find-links $(VENV)/torch --no-deps --require-hashes -r $(VENV)/torch.lock; }
	rm -rf $(VENV)/torch
	$(PIP) install --no-deps --require-hashes -r requirements.lock
	$(PIP) install -r requirements.txt
	touch $@

TESTS := -m pytest -n 2 --dist=loadfile --no-loadscope-reorder

test: $(READY)
	$(PY) $(TESTS) -m "not long"

test-all: $(READY)
	$(PY) $(TESTS)

# The same tests with the newest releases that requirements.txt allows, in an environment of their own.
test-latest:
	$(PYTHON) -m venv --clear $(VENV)-latest
	$(VENV)-latest/bin/python -m pip --quiet --disable-pip-version-check install -r requirements.txt $(TOOLS)
	$(VENV)-latest/bin/python $(TESTS)

# Moves the lock to the newest releases that requirements.txt allows, for every platform and Python since 3.11. What only
# torch's GPU build needs is left out; the hash of the torch that pip installs here, maybe a CPU build, is added.
lock: $(READY)
	$(PIP) install uv
	rm -rf $(VENV)/torch && $(PIP) download --no-deps --dest $(VENV)/torch $$(grep ^torch requirements.txt)
	printf '%s\n' $(TOOLS) | $(VENV)/bin/uv pip compile requirements.txt - --universal --python-version 3.11 --upgrade \
		--generate-hashes --no-annotate --quiet --custom-compile-command "make lock" \
		| awk -v own="$$(sha256sum $(VENV)/torch/*.whl | cut -d' ' -f1)" '/^[a-z]/ {kept = !/^(nvidia|cuda|triton)/} \
		kept || /^#/ {print} /^torch==/ {print "    --hash=sha256:" own " \\"}' > $(VENV)/lock
	grep -q ^torch== $(VENV)/lock && mv $(VENV)/lock requirements.lock

bench: | $(READY) $(if $(filter data/models/smollm2,$(MODEL)),data/models/smollm2/config.json)
	$(PY) tests/benchmarks/bench.py --model=$(MODEL) --dataset=$(DATASET) $(BENCH_ARGS)

lint: $(READY)
	$(PY) -m ruff check . && $(PY) -m ruff format --check .
