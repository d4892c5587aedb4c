# The only commands that CI and the README name. Each does its own set-up.
SHELL := /bin/bash
CARGO := cargo
# One profile for everything, so that the dependencies build once.
FLAGS := --release --locked
BIN = $(or $(CARGO_TARGET_DIR),target)/release/taod

.PHONY: help demo test test-full check build bench bench-ingest models setup setup-test

help:
	@echo 'make demo       the whole loop on real parts, live (first time: builds, about 20 minutes)'
	@echo 'make test       every test'
	@echo 'make check      format, lints, docs, licences'
	@echo 'make build      $(BIN)'
	@echo 'make bench      the benchmark tables'
	@echo 'make bench-ingest  the log into the table, against the limit and against peers'
	@echo 'make test-full  also the tests that take long or need large packages'

demo: build models
	$(BIN) demo --config config/demo.toml $(ARGS)

build: setup
	$(CARGO) build $(FLAGS) --bin taod

test: setup-test models
	$(CARGO) test $(FLAGS)

test-full: models
	tools/setup.sh full
	TAOD_REQUIRE=$${TAOD_REQUIRE:-kafka,readers,models,peft} $(CARGO) test $(FLAGS) -- --include-ignored

check: setup
	$(CARGO) fmt --check
	$(CARGO) clippy $(FLAGS) --all-targets -- -D warnings
	RUSTDOCFLAGS='-D warnings -A rustdoc::private-intra-doc-links' $(CARGO) doc $(FLAGS) --no-deps --document-private-items
	tools/check-licences

bench: setup models
	$(CARGO) test $(FLAGS) --test it -- --ignored --nocapture --test-threads 1 bench_

BENCH_PYTHON = $${XDG_CACHE_HOME:-$$HOME/.cache}/taod/bench-python/bin/python
bench-ingest: models
	tools/setup.sh bench
	tests/kafka/kafka.sh have || tests/kafka/kafka.sh get
	$(CARGO) build $(FLAGS) --bin taod --example consume
	$(BENCH_PYTHON) tools/bench/ingest.py --taod $(BIN) --consume $(dir $(BIN))examples/consume \
		--models $${XDG_CACHE_HOME:-$$HOME/.cache}/taod/models --out $(dir $(BIN))bench-ingest.md $(ARGS)

models: setup
	tools/fetch-models.sh

setup:
	tools/setup.sh build

setup-test:
	tools/setup.sh test
