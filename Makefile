# The only commands that CI and the README name. Each does its own set-up.
SHELL := /bin/bash
CARGO := cargo
# One profile for everything, so that the dependencies build once.
FLAGS := --release --locked
BIN = $(or $(CARGO_TARGET_DIR),target)/release/taod

.PHONY: help demo test test-full check build bench fuzz models setup setup-test

help:
	@echo 'make demo       the whole loop on real parts, live (first time: builds, about 20 minutes)'
	@echo 'make test       every test'
	@echo 'make check      format, lints, docs, licences'
	@echo 'make build      $(BIN)'
	@echo 'make bench      the benchmark tables'
	@echo 'make fuzz       every decoder of the log under mutations, SECONDS=60 each'
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
	$(CARGO) fmt --check --manifest-path tests/fuzz/Cargo.toml
	$(CARGO) clippy $(FLAGS) --no-default-features --features decode --lib -- -D warnings
	$(CARGO) clippy $(FLAGS) --all-targets -- -D warnings
	RUSTDOCFLAGS='-D warnings -A rustdoc::private-intra-doc-links' $(CARGO) doc $(FLAGS) --no-deps --document-private-items
	tools/check-licences

bench: setup models
	$(CARGO) test $(FLAGS) --test it -- --ignored --nocapture --test-threads 1 bench_

fuzz: setup
	tools/fuzz $(or $(SECONDS),60)

models: setup
	tools/fetch-models.sh

setup:
	tools/setup.sh build

setup-test:
	tools/setup.sh test
