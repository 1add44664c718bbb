# One entry point for every chore; CI calls `make check`.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN ?= .venv/bin
PY := $(BIN)/python
SOURCES := proto expert_store compute_node scheduler deploy tests
PROTOS := $(wildcard proto/*.proto)
STUBS := proto/.generated
READY := .venv/.ready
NATIVE := compute_node/native compute_node/native/avx512bf16 compute_node/native/portable expert_store/native
MODEL := deploy/models/tiny-moe
STORE := .flashmoe/tiny-moe
export PROMPT ?= In the beginning
MEMORY ?= 1GiB
EXPERTS_MEMORY ?= 37.5%
MAX_TOKENS ?= 96
COMPOSE ?= $(shell docker compose version >/dev/null 2>&1 && echo docker compose || echo docker-compose)
CONTAINER ?= $(CURDIR)/.flashmoe/container
IMAGE := flashmoe:0.1.0
TRACES := .flashmoe/traces
TEXT ?= tests/bench/prompts
PEERS := .flashmoe/peers-venv
PEERS_READY := $(PEERS)/.ready
PEERS_PACKAGES := tests/bench/peers/requirements.txt
CLIENTS := .flashmoe/clients-venv
CLIENTS_READY := $(CLIENTS)/.ready
CLIENTS_PACKAGES := tests/compute_node/gateway/real_clients/requirements.txt
CLUSTER := .flashmoe/cluster-venv
CLUSTER_READY := $(CLUSTER)/.ready
CLUSTER_PACKAGES := tests/deploy/cluster/requirements.txt
CONFIGURED = test -f '$(CONTAINER)/compose.env' || { echo "no containers were started from here: make up" >&2; exit 2; }
COMPOSED = $(COMPOSE) --env-file '$(CONTAINER)/compose.env' -f '$(CONTAINER)/docker-compose.yml'

.DEFAULT_GOAL := help
.PHONY: help setup proto run serve test system lint format check bench bench-peers bench-scale bench-quality clients cluster cluster-demo trace policies image up down logs container-test lock clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

$(READY): requirements.lock pyproject.toml $(wildcard $(NATIVE:=/*.c) $(NATIVE:=/*.h))
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "FlashMoE needs Python 3.11 or newer: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@test -x $(PY) || $(PYTHON) -m venv .venv
	@echo "installing dependencies (once, a few minutes) ..."
	@$(PY) -m pip install --quiet --disable-pip-version-check \
	    $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -r requirements.lock
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@$(PY) -c 'from compute_node.native.binding import in_charge; print("matrix kernel:", in_charge())'
	@touch $@

$(STUBS): $(PROTOS) $(READY)
	@PATH="$(BIN):$$PATH" $(PY) -m grpc_tools.protoc -I. --python_out=. --grpc_python_out=. \
	    --mypy_out=quiet:. --mypy_grpc_out=quiet:. $(PROTOS)
	@touch $@

setup: $(STUBS)  ## virtual environment, dependencies, generated stubs

proto: $(STUBS)  ## generate stubs when a .proto changed

$(STORE)/manifest.json: $(STUBS) $(wildcard $(MODEL)/*)
	@$(BIN)/flashmoe index $(MODEL) --out $(STORE)
	@touch $@

run: $(STORE)/manifest.json  ## generate once from the shipped model (PROMPT="...")
	@$(BIN)/flashmoe run "$$PROMPT" --model $(STORE) --memory $(MEMORY) \
	    --experts-memory $(EXPERTS_MEMORY) --max-tokens $(MAX_TOKENS) --temperature 0.8 --seed 7

serve: $(STORE)/manifest.json  ## keep the shipped model up for clients (flashmoe generate "...")
	@$(BIN)/flashmoe serve --model $(STORE) --memory $(MEMORY) --experts-memory $(EXPERTS_MEMORY)

test: $(STUBS)  ## the whole test suite, system tests included
	@$(PY) -m pytest -q -m "not system and not container" -n 2 --dist loadfile; alone=$$?; \
	$(PY) -m pytest -q -m "system and not container" && exit $$alone

system: $(STUBS)  ## only the tests that start real processes
	$(PY) -m pytest -q -m "system and not container"

lint: $(STUBS)  ## style, types, import layers, tests that import; changes nothing
	$(PY) -m ruff format --check $(SOURCES)
	$(PY) -m ruff check $(SOURCES)
	$(PY) -m mypy
	$(BIN)/lint-imports
	$(PY) -m pytest -qq --collect-only

format: $(STUBS)  ## rewrite the sources in our style
	$(PY) -m ruff format $(SOURCES)
	$(PY) -m ruff check --fix $(SOURCES)

check: lint test  ## what passes before a commit

bench: $(STUBS)  ## measure, and print the tables of docs/figures.md
	$(PY) -m tests.bench

$(PEERS_READY): $(PEERS_PACKAGES) $(READY)
	@$(PY) -m venv --without-pip --clear $(PEERS)
	@cd $(PEERS)/lib/python3*/site-packages && $(abspath $(PY)) -c \
	    'import sysconfig; print(sysconfig.get_path("purelib"))' > flashmoe.pth
	@$(PY) -m pip --python $(PEERS)/bin/python install --quiet --disable-pip-version-check \
	    --no-deps -r $(PEERS_PACKAGES)
	@touch $@

bench-peers: $(STUBS) $(PEERS_READY)  ## FlashMoE beside llama.cpp and others (root, 20 GB, hours; ARGS=--quick)
	@$(PY) -m tests.bench.peers --python $(PEERS)/bin/python $(ARGS)

bench-scale: $(STUBS)  ## gpt-oss-20b's geometry on recorded routing (TRACE=FILE.npz, 11 GB, 12 minutes; ARGS=--quick)
	@$(PY) -m tests.bench.scale $(TRACE) $(ARGS)

bench-quality: $(STUBS)  ## what lossy routes cost on the shipped model (TEXT=heldout.jsonl, 1 hour)
	@$(PY) -m tests.bench.quality $(TEXT) $(ARGS)

$(CLIENTS_READY): $(CLIENTS_PACKAGES) $(READY)
	@$(PY) -m venv --without-pip --clear $(CLIENTS)
	@$(PY) -m pip --python $(CLIENTS)/bin/python install --quiet --disable-pip-version-check \
	    -r $(CLIENTS_PACKAGES)
	@touch $@

clients: $(CLIENTS_READY)  ## the HTTP clients that people use, for their tests

$(CLUSTER_READY): $(CLUSTER_PACKAGES) $(READY)
	@$(PY) -m venv --without-pip --clear $(CLUSTER)
	@cd $(CLUSTER)/lib/python3*/site-packages && $(abspath $(PY)) -c \
	    'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' > flashmoe.pth
	@$(PY) -m pip --python $(CLUSTER)/bin/python install --quiet --disable-pip-version-check \
	    --no-deps -r $(CLUSTER_PACKAGES)
	@touch $@

cluster-demo: $(STORE)/manifest.json $(CLUSTER_READY)  ## three boxes generate, one is killed, the same text (minutes)
	@$(CLUSTER)/bin/python -m deploy.cluster.demo $(STORE)

cluster: $(CLUSTER_READY)  ## an environment with flashmoe[cluster], for its tests and demo

$(TRACES)/tiny-moe-test.npz: tests/bench/record_tiny.py $(wildcard tests/bench/prompts/*.txt $(MODEL)/*) \
    | $(STORE)/manifest.json
	@$(PY) -m tests.bench.record_tiny $(STORE) $(TRACES)

policies: $(TRACES)/tiny-moe-test.npz  ## every eviction policy on the shipped model, and a plot
	@$(PY) -m tests.bench.policies $(TRACES)/tiny-moe-test.npz --train $(TRACES)/tiny-moe-train.npz
	@$(PY) -m tests.bench.domain_shift $(TRACES)/tiny-moe-test.npz \
	    --train $(TRACES)/tiny-moe-train.npz --plot $(TRACES)/domain_shift.png

trace: $(TRACES)/tiny-moe-test.npz  ## record the shipped model over eleven domains, for replay

image:  ## the containers' image (BASE=..., TORCH_INDEX=...)
	@docker info >/dev/null 2>&1 || \
	    { echo "no container engine answers: install Docker, or start it (docker info says more)" >&2; exit 2; }
	docker build $(if $(BASE),--build-arg BASE=$(BASE)) $(if $(TORCH_INDEX),--build-arg TORCH_INDEX=$(TORCH_INDEX)) \
	    -f deploy/Dockerfile -t $(IMAGE) .

up: $(STORE)/manifest.json image  ## the shipped model in containers, until it serves
	@$(BIN)/flashmoe container-config $(STORE) --memory $(MEMORY) --experts-memory $(EXPERTS_MEMORY) \
	    --out '$(CONTAINER)' >/dev/null
	$(COMPOSED) up --detach
	@$(BIN)/flashmoe container-wait '$(CONTAINER)'

down:  ## stop the containers, free their shared memory
	@$(CONFIGURED)
	$(COMPOSED) down --volumes

logs:  ## follow the containers' logs
	@$(CONFIGURED)
	$(COMPOSED) logs --follow

container-test: $(STORE)/manifest.json  ## the containers in a real engine, killed and restarted (minutes)
	$(PY) -m pytest -q -rs -m container tests/container

lock:  ## remake requirements.lock from the environment as it is
	@{ echo "# Exact versions that the Makefile installs; ranges are in pyproject.toml. Remake: make lock"; \
	   $(PY) -m pip freeze --all --exclude-editable | sed '/^pip==/d; s/+cpu//'; } > requirements.lock

clean:  ## remove what the Makefile made, the environment included
	rm -rf .venv .flashmoe build *.egg-info $(STUBS) proto/*_pb2*.py proto/*_pb2*.pyi
