# The only commands that CI and the README name. Each does its own set-up.
SHELL := /bin/bash
CARGO := cargo
# One profile for everything, so that the dependencies build once.
FLAGS := --release --locked
CACHE = $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/taod
BIN = $(or $(CARGO_TARGET_DIR),target)/release/taod

.PHONY: help demo test test-full test-ray test-vllm check build bench bench-engine bench-growth bench-ingest bench-scale bench-soak chaos fuzz models setup setup-test bench-dataset bench-gpu test-gpu test-page test-templates deb test-deb package-files dist

help:
	@echo 'make demo       the whole loop on real parts, live (first time: builds, about 20 minutes)'
	@echo 'make test       every test'
	@echo 'make check      format, lints, docs, licences'
	@echo 'make build      $(BIN)'
	@echo 'make bench      the benchmark tables'
	@echo 'make chaos      CYCLES=1000 SEED=1: ingestion between real parts that fail; goes on where it was cut short'
	@echo 'make bench-scale  several instances on one table, each under a CPU quota'
	@echo 'make bench-soak    memory of an ingestion over an hour, after a backlog'
	@echo 'make bench-engine  sampling, scoring and training against transformers, PEFT and llama.cpp'
	@echo 'make bench-ingest  the log into the table, against the limit and against peers'
	@echo 'make bench-dataset  1 million prompts clustered and split: seconds and memory'
	@echo 'make test-page  the admin page in a browser'
	@echo 'make test-templates  chat templates as TRL ships them, against transformers (6 GB)'
	@echo 'make fuzz       every decoder of the log under mutations, SECONDS=60 each'
	@echo 'make test-gpu   the engine on an accelerator against transformers, PEFT and the processor (FEATURE=cuda or metal)'
	@echo 'make bench-gpu  sampling, scoring and training there, in bf16 (SHAPE=0.5b, 1.5b or 3b)'
	@echo 'make bench-growth  sampling with more and more prompts: speed and memory, a plot'
	@echo 'make test-ray   the reference trainer on Ray (6 GB)'
	@echo 'make test-vllm  adapters and promotions with a real vLLM on the CPU (6 GB)'
	@echo 'make deb        a package for Debian, in target/debian'
	@echo 'make test-deb   installs, starts, upgrades and purges it in a clean root (needs root)'
	@echo 'make dist       an archive with its SBOM and checksums, in target/dist'
	@echo 'make test-full  also the tests that take long or need large packages'

demo: build models
	$(BIN) demo --config config/demo.toml $(ARGS)

build: setup
	$(CARGO) build $(FLAGS) --bin taod

test: setup-test models
	$(CARGO) test $(FLAGS)

test-full: models
	tools/setup.sh full
	TAOD_REQUIRE=$${TAOD_REQUIRE:-kafka,readers,models,llamacpp,faketime,peft,spark,azurite,schemathesis} $(CARGO) test $(FLAGS) -- --include-ignored

# The reference trainer on a Ray cluster of this machine.
test-ray: models
	tools/setup.sh ray
	TAOD_REQUIRE=$${TAOD_REQUIRE:-ray,models,readers} $(CARGO) test $(FLAGS) --test it -- --include-ignored --nocapture --test-threads 1 trainer

# Adapters, promotions and candidates with a real vLLM on the CPU.
test-vllm: models
	tools/setup.sh vllm
	TAOD_REQUIRE=$${TAOD_REQUIRE:-vllm,models} $(CARGO) test $(FLAGS) --test it -- --ignored --nocapture --test-threads 1 vllm

# Chat templates as TRL ships them, rendered by transformers and by taod.
test-templates:
	tools/setup.sh engine
	$(CACHE)/reference/bin/python tools/reference/template_golden.py \
	  $$($(CACHE)/reference/bin/python -c 'import importlib.util as u; print(u.find_spec("trl").submodule_search_locations[0])')/chat_templates \
	  >$(CACHE)/templates.json
	TAOD_TEMPLATES=$(CACHE)/templates.json $(CARGO) test $(FLAGS) --lib -- --nocapture templates_render

# The engine on an accelerator; FEATURE=metal on a Mac. Needs the device, and for cuda its toolkit to build.
FEATURE ?= cuda
test-gpu: setup
	$(CARGO) test $(FLAGS) --features $(FEATURE) --lib -- --ignored --nocapture --test-threads 1 gpu_

# Random weights of the shape of Qwen2.5.
SHAPE ?= 1.5b
bench-gpu: setup
	$(CARGO) build $(FLAGS) --features $(FEATURE) --example device
	$(dir $(BIN))examples/device $(FEATURE) bf16 $(SHAPE) tests/fixtures/models/tiny-qwen2

# The page in Chromium: what it shows, its actions, its accessibility; SHOTS=DIR keeps the screenshots.
test-page:
	tools/setup.sh page
	TAOD_REQUIRE=chromium TAOD_SCREENSHOTS=$(SHOTS) $(CARGO) test $(FLAGS) --test it -- --ignored page_browser

# What packages hold besides the program: man pages and completions, made by the program itself.
package-files: build
	rm -rf target/package && mkdir -p target/package/completions
	$(BIN) man target/package/man
	$(BIN) completions bash >target/package/completions/taod
	$(BIN) completions zsh >target/package/completions/_taod
	$(BIN) completions fish >target/package/completions/taod.fish

# Needs cargo-deb (`cargo install cargo-deb`).
deb: package-files
	cargo deb --no-build --output target/debian/ $(ARGS)

# Installs, starts, upgrades and purges the package in a fresh Debian; needs root, cargo-deb, mmdebstrap and a mirror.
test-deb: package-files
	cargo deb --no-build --quiet --output target/debian/old.deb --deb-version 0.0.1-1
	cargo deb --no-build --quiet --output target/debian/new.deb --deb-version 0.0.2-1
	tests/package/test-deb --old target/debian/old.deb --new target/debian/new.deb --cache $(CACHE)/package $(ARGS)

# The same program and the same tree give the same bytes.
dist: build
	tools/package/dist --binary $(BIN) --out target/dist

check: setup
	$(CARGO) metadata --locked --format-version 1 --manifest-path tests/fuzz/Cargo.toml >/dev/null
	$(CARGO) fmt --check
	$(CARGO) fmt --check --manifest-path tests/fuzz/Cargo.toml
	$(CARGO) clippy $(FLAGS) --no-default-features --features decode --lib -- -D warnings
	$(CARGO) clippy $(FLAGS) --all-targets -- -D warnings
	RUSTDOCFLAGS='-D warnings -A rustdoc::private-intra-doc-links' $(CARGO) doc $(FLAGS) --no-deps --document-private-items
	tools/check-licences

bench: setup models
	$(CARGO) test $(FLAGS) --test it -- --ignored --nocapture --test-threads 1 bench_

chaos: CYCLES ?= 1000
chaos: SEED ?= 1
chaos: setup-test build
	$(CACHE)/chaos/bin/python tests/chaos/main.py --binary $(BIN) --work $(or $(WORK),$(CACHE)/chaos-$(SEED)) \
	  --cycles $(CYCLES) --seed $(SEED) $(ARGS)

# Needs control groups that this user may make (root, or delegated).
bench-scale: build
	tools/setup.sh scale
	$(CACHE)/scale/bin/python tools/bench/scale.py --binary $(BIN) --work $(CACHE)/bench/scale $(ARGS)

bench-soak: build models
	tools/setup.sh bench
	$(CACHE)/bench-python/bin/python tools/bench/soak.py --taod $(BIN) --models $(CACHE)/models $(ARGS)

# Both sides of every row live at once: 8 GiB of memory.
bench-engine: models
	tools/setup.sh engine
	$(CARGO) build $(FLAGS) --example engine
	$(CACHE)/reference/bin/python tools/bench/engine.py --engine $(dir $(BIN))examples/engine \
		--gguf $(CACHE)/models/SmolLM2-135M-Instruct.Q4_1.gguf --out $(dir $(BIN))bench-engine.md $(ARGS)

# Sampling with more and more prompts; writes growth.svg and growth.md there.
bench-growth: models
	tools/setup.sh engine
	$(CARGO) build $(FLAGS) --example engine
	$(CACHE)/reference/bin/python tools/bench/growth.py --engine $(dir $(BIN))examples/engine \
		--gguf $(CACHE)/models/SmolLM2-135M-Instruct.Q4_1.gguf --out $(dir $(BIN))bench-growth $(ARGS)

bench-ingest: models
	tools/setup.sh bench
	$(CARGO) build $(FLAGS) --bin taod --example consume
	$(CACHE)/bench-python/bin/python tools/bench/ingest.py --taod $(BIN) --consume $(dir $(BIN))examples/consume \
		--models $(CACHE)/models --out $(dir $(BIN))bench-ingest.md $(ARGS)

# 1 million generated prompts, and 20,000 more the night after; needs 4 GiB of disk.
bench-dataset: setup
	$(CARGO) build $(FLAGS) --example dataset
	rm -rf $(CACHE)/bench/dataset
	$(dir $(BIN))examples/dataset 1000000 20000 $(CACHE)/bench/dataset

fuzz: setup
	tools/fuzz $(or $(SECONDS),60)

models: setup
	tools/fetch-models.sh

setup:
	tools/setup.sh build

setup-test:
	tools/setup.sh test
