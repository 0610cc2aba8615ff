# One place for every command. `make help` lists them.

SHELL := bash
CARGO ?= cargo
PYTHON ?= python3
PROFILE_DIR := target/release
BINARIES := -p exo -p exoctl -p exo-runner
FEATURES := --features exo/etcd

ifeq ($(shell uname -s),Darwin)
# JACCL is compiled in only from this deployment target on.
export MACOSX_DEPLOYMENT_TARGET ?= 26.2
endif

# nextest runs tests side by side; plain cargo test does too, more slowly.
TEST_RUNNER := $(shell command -v cargo-nextest >/dev/null 2>&1 && echo "nextest run" || echo "test")

.PHONY: help setup build run demo test test-setup parity verify fix bench bench-store cuda-package clean

help: ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-13s %s\n", $$1, $$2}'

setup: ## get MLX and write .cargo/config.toml (every target does this when needed)
	@deploy/mlx/setup.sh

build: setup ## build all binaries, optimised, into target/release
	$(CARGO) build --release --locked $(BINARIES) $(FEATURES)

run: build ## start a two-shard cluster with the built-in tiny model, in the foreground; PORT=N API_PORT=N choose its ports
	@$(PYTHON) deploy/demo.py run --bin $(PROFILE_DIR) $(if $(filter command%,$(origin PORT)),--port $(PORT)) $(if $(filter command%,$(origin API_PORT)),--api-port $(API_PORT))

demo: build ## the same, ask one question, show the answer and timings, shut down
	@$(PYTHON) deploy/demo.py demo --bin $(PROFILE_DIR)

test-setup: setup
	@deploy/mlx/setup.sh --parity
	@tests/setup.sh

test: test-setup ## run all tests
	$(CARGO) build --locked $(BINARIES) $(FEATURES)
	$(CARGO) $(TEST_RUNNER) --workspace --locked $(FEATURES)
	.venv/bin/python -m pytest -q tests/parity

parity: test-setup ## compare with mlx-lm in full: every architecture, packed form and split on three seeds (some 20 minutes)
	$(CARGO) build --locked -p exo-runner
	@rm -f target/parity.jsonl
	.venv/bin/python -m pytest -q tests/parity --full --results target/parity.jsonl

verify: test-setup ## format, lints, docs and tests; writes nothing
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked $(FEATURES) -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps --locked
	$(MAKE) test

fix: setup ## format, apply lint fixes, regenerate files; the only command that writes sources
	$(CARGO) fmt --all
	$(CARGO) clippy --workspace --all-targets --fix --allow-dirty --allow-staged
	EXO_BLESS=1 $(CARGO) test -p exo-crds --test manifests

bench: build test-setup ## measure speed beside mlx-lm's, and memory, on this machine
	.venv/bin/python tests/parity/bench.py --bin $(PROFILE_DIR)
	.venv/bin/python tests/parity/memory.py --bin $(PROFILE_DIR)

cuda-package: build ## pack what a Linux machine with an NVIDIA GPU needs into target/cuda
	@deploy/mlx/cuda-package.sh $(PROFILE_DIR) target/cuda

bench-store: build ## measure three voters against three members of etcd (needs etcd on the path)
	$(CARGO) bench --locked -p exo-store --features etcd --bench store
	EXO_BIN_DIR=$(CURDIR)/$(PROFILE_DIR) $(CARGO) bench --locked -p exo-tests --bench scale

clean: ## remove everything that was built or fetched
	rm -rf target .venv .mlx .cargo
