"""The engine bench: taod and what its users would run instead, in turn, on the same weights; prints a Markdown table.

    engine.py --engine BIN --gguf MODEL.gguf [--runs 5] [--only NAMES]

Both sides of a row live at the same time, each on all cores, and work in turn, never at once. Seconds are those of the
work alone, after one run to warm up; memory is the peak of the whole process. Tokens are counted alike on both sides: in
training a trainer's, for which every answer has its own prompt.
"""

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent



@dataclasses.dataclass(frozen=True)
class Row:
    name: str
    what: str
    sizes: list
    works: list
    # Works, one of which must be so many times as fast as the best peer. Eight bits are off by more than policy gradients allow, so
    # that goals do not count them where a sampler's log-probs matter.
    goals: list
    peers: list
    # The peers that count, where some only show what else can be done.
    against: list | None = None
    # Of the share of the best peer's memory.
    memory_goal: float | None = None
    # Multiplications and additions, in 1e9, that a counted token needs at least: 0.27 a token that is read or made, 0.54 one that trains.
    gflop: float | None = None
    # A whole iteration takes minutes, and averages over all of its answers.
    whole: bool = False
    # What it works on: token ids in a file, of texts whose lengths differ.
    texts: bool = False


SAMPLING = ["generate", "generate-int16", "generate-int8"]
TRAINING = ["step", "step-int16"]
SCORING = ["logprobs", "logprobs-int16", "logprobs-gate"]
READ, TRAINED = 0.27, 0.54
ROWS = [
    Row("batch", "4 prompts of 64 x 8 samples x 64 new", [4, 8, 64, 64], SAMPLING, [(SAMPLING[:2], 3.0)], ["hf", "llama.cpp"], gflop=READ * 36 / 32),
    Row("long", "1 prompt of 1,024 x 8 x 64 new", [1, 8, 1024, 64], SAMPLING, [(SAMPLING[:2], 5.0)], ["hf", "llama.cpp"], gflop=READ * 24 / 8),
    Row("one", "1 prompt of 64 x 1 x 64 new", [1, 1, 64, 64], SAMPLING, [(SAMPLING, 1.0)], ["hf", "llama.cpp"], gflop=READ * 2),
    Row("logprobs", "log-probs of 8 groups x 8 x (64 shared + 64)", [8, 8, 64, 64], SCORING, [(SCORING[:2], 1.7)], ["hf"], gflop=READ * 9 / 8),
    Row("step-64", "LoRA step, 8 x (64 shared + 64)", [8, 64, 64], TRAINING, [(TRAINING, 1.5)], ["hf"], memory_goal=1 / 3, gflop=TRAINED * 9 / 16),
    Row("step-512", "LoRA step, 8 x (512 shared + 64)", [8, 512, 64], TRAINING, [(TRAINING, 5.0)], ["hf"], memory_goal=1 / 5, gflop=TRAINED * 16 / 72),
    Row(
        "classifier",
        "reward model, 64 texts of log-normal length 32 to 512",
        [64],
        ["classify"],
        [(["classify"], 1.5)],
        ["hf", "hf-sorted"],
        against=["hf"],
        gflop=READ,
        texts=True,
    ),
    Row(
        "raft",
        "RAFT iteration, 112 prompts x 8 x <= 64, in answers/s",
        [112, 8, 64],
        ["raft", "raft-int16", "raft-int8"],
        [(["raft"], 3.0), (["raft-int16", "raft-int8"], 4.0)],
        ["hf"],
        whole=True,
    ),
    Row(
        "grpo",
        "GRPO iteration, 112 prompts x 8 x <= 64, in answers/s",
        [112, 8, 64],
        ["grpo", "grpo-int16"],
        [(["grpo"], 3.0), (["grpo-int16"], 4.0)],
        ["trl"],
        whole=True,
    ),
]
LABELS = {
    "generate": "taod, f32",
    "generate-int16": "taod, 16 bits",
    "generate-int8": "taod, 8 bits",
    "logprobs": "taod, f32",
    "logprobs-int16": "taod, 16 bits",
    "logprobs-gate": "taod, f32, as the gate does",
    "classify": "taod, f32",
    "hf-sorted": "transformers, sorted by length",
    "step": "taod, f32",
    "step-int16": "taod, 16 bits",
    "raft": "taod, f32",
    "raft-int16": "taod, 16 bits",
    "raft-int8": "taod, sampling 8 bits, training 16",
    "grpo": "taod, f32",
    "grpo-int16": "taod, 16 bits",
    "trl": "TRL",
    "hf": "transformers",
    "llama.cpp": "llama.cpp, Q4_1",
}


class Side:
    """A process that works when it is told to."""

    def __init__(self, name, command):
        self.name, self.figures = name, []
        # Libraries talk much; what they said last is shown when a side ends early.
        self.said = tempfile.TemporaryFile("w+")
        # A round's process has this, too.
        environment = os.environ | {"MIMALLOC_PURGE_DELAY": "-1"}
        pipes = {"env": environment, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.said}
        self.child = subprocess.Popen(command, text=True, **pipes)
        self.wait("ready")

    def wait(self, what):
        for line in self.child.stdout:
            if line.startswith(what):
                return line
        self.said.seek(0)
        sys.exit(f"{self.name} ended early: {self.said.read()[-2000:]}")

    def work(self):
        print("run", file=self.child.stdin, flush=True)
        self.figures.append(json.loads(self.wait("{")))

    def close(self):
        """Ends it and returns its median rate and its peak memory in MiB."""
        self.child.stdin.close()
        self.child.stdout.read()
        _, status, usage = os.wait4(self.child.pid, 0)
        self.child.returncode = status
        rate = statistics.median(figure["tokens"] / figure["seconds"] for figure in self.figures)
        return rate, usage.ru_maxrss / 1024


def compare(row, arguments, folder, rate):
    numbers = [str(size) for size in row.sizes]
    if row.texts:
        folder, file = reward_model(folder), texts_file(folder, row.sizes[0])
        numbers = [str(file)]
    if row.whole:
        numbers.append(str(prompts_file(arguments, folder, row.sizes[0])))
    sides = [Side(LABELS[work], [arguments.engine, folder, work, *numbers]) for work in row.works]
    for peer in row.peers:
        work = row.works[0]
        model = arguments.gguf if peer == "llama.cpp" else folder
        label = {"step": "PEFT", "raft": "transformers and PEFT"}.get(work, LABELS[peer])
        sides.append(Side(label, [sys.executable, str(HERE / "engine_peer.py"), peer, model, work, *numbers]))
    for run in range(arguments.iterations if row.whole else arguments.runs):
        for side in sides:
            side.work()
            print(row.name, side.name, {k: round(v, 3) for k, v in side.figures[-1].items()}, file=sys.stderr)
    if row.texts:
        check_scores(file)
    return line(row, [(side.name, *side.close()) for side in sides], rate)


def reward_model(folder):
    """Returns a reward model made of the same model with a random head, for both sides."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    made = pathlib.Path(folder).parent / "reward-model"
    if not (made / "tokenizer.json").exists():
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model.config.pad_token_id = tokenizer.pad_token_id or 0
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
    return str(made)


def texts_file(folder, count):
    """Writes texts of log-normal length (median 128 tokens, sigma 0.7), cut to 32 to 512; ids above those with a meaning."""
    import numpy

    random = numpy.random.default_rng(20261127)
    lengths = numpy.clip(random.lognormal(numpy.log(128), 0.7, count).round(), 32, 512).astype(int)
    file = pathlib.Path(folder).parent / f"texts-{count}.json"
    file.write_text(json.dumps([random.integers(1000, 41_000, length).tolist() for length in lengths]))
    return file


def check_scores(file):
    """Ends the bench where the two sides did not say the same: a speed of something else is none."""
    ours, *theirs = (json.loads(pathlib.Path(f"{file}.{side}").read_text()) for side in ("taod", "hf", "sorted"))
    for other in theirs:
        worst = max(abs(a - b) for a, b in zip(ours, other, strict=True))
        print(f"classifier: scores differ by {worst:.1e} at most", file=sys.stderr)
        if not worst < 1e-2:
            sys.exit(f"the two sides' scores differ by {worst}: they do not do the same work")


def prompts_file(arguments, folder, count):
    """Writes the first prompts written by people that are short, as the model's chat template renders them: the same ids for all."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = [row["instruction"] for row in json.loads(pathlib.Path(arguments.prompts).read_text())]
    render = lambda text: tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False)
    short = [ids for ids in map(render, asked) if len(ids) <= 96][:count]
    if len(short) < count:
        sys.exit(f"{arguments.prompts} has {len(short)} short prompts, and {count} are needed")
    file = pathlib.Path(folder).parent / f"prompts-{count}.json"
    file.write_text(json.dumps(short))
    return file


def line(row, figures, limit):
    """Returns a row of the table from (label, tokens/s, MiB) of each side, taod's first; `limit` is the product's rate in GFLOP/s."""
    ours, theirs = figures[: len(row.works)], figures[len(row.works) :]
    counted = [figure for peer, figure in zip(row.peers, theirs, strict=True) if peer in (row.against or row.peers)]
    rate, memory = max(rate for _, rate, _ in counted), min(memory for _, _, memory in counted)
    best = max(rate for _, rate, _ in theirs)
    ratios = [(label, own / rate, rss / memory) for label, own, rss in ours]
    of = dict(zip(row.works, ratios, strict=True))
    fits = lambda goal, ratio, share: ratio >= goal and (row.memory_goal is None or share <= row.memory_goal)
    reached = all(any(fits(goal, *of[work][1:]) for work in works) for works, goal in row.goals)
    short = lambda label: label.removeprefix("taod, ")
    beside = lambda ratio: f" ({ratio * rate / best:.1f} of the best)" if best > rate else ""
    told = lambda label, ratio, share: f"{short(label)} {ratio:.1f}" + (f" ({share:.2f})" if row.memory_goal else beside(ratio))
    names = lambda works: ", ".join(short(LABELS[work]) for work in works) + " " if len(row.goals) > 1 else ""
    wanted = "; ".join(f"{names(works)}>= {goal:g}" for works, goal in row.goals) + (f" (<= {row.memory_goal:.2f})" if row.memory_goal else "")
    rates = "; ".join(f"{label} {rate:,.{1 if row.whole else 0}f}" for label, rate, _ in figures)
    peaks = "; ".join(f"{rss:,.0f}" for _, _, rss in figures)
    shares = "; ".join(f"{short(label)} {own * row.gflop / limit:.0%}" for label, own, _ in figures) if row.gflop else "-"
    return f"| {row.what} | {rates} | {'; '.join(told(*ratio) for ratio in ratios)} | {wanted} | {'reached' if reached else 'missed'} | {shares} | {peaks} |"


def product():
    """Returns the rate of torch's f32 product in this model's shapes, in GFLOP/s: what no f32 engine here can pass."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    a, b = torch.rand(576, 576), torch.rand(576, 1536)
    began = time.monotonic()
    for _ in range(500):
        a @ b
    return 2 * 576 * 576 * 1536 * 500 / (time.monotonic() - began) / 1e9


def about(arguments, products):
    with open("/proc/cpuinfo") as file:
        lines = file.read().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
    flags = next((line.split(":")[1].split() for line in lines if line.startswith("flags")), [])
    kinds = [flag for flag in ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8") if flag in flags]
    commit = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True)
    gemm = statistics.median(products)
    return (
        f"{datetime.date.today()}, commit {commit.stdout.strip() or 'unknown'}; {len(os.sched_getaffinity(0))} cores of {cpu} "
        f"({', '.join(kinds)}); torch's f32 product of [576, 576] and [576, 1536]: {gemm:.0f} GFLOP/s; load of the last minute "
        f"{os.getloadavg()[0]:.1f}; medians of {arguments.runs} runs in turn (whole iterations: {arguments.iterations})."
    )


def model_folder(arguments):
    """Returns the folder of the model in Hugging Face layout, made of the GGUF where it is not there yet."""
    folder = pathlib.Path(arguments.cache) / "SmolLM2-135M-Instruct"
    if not (folder / "model.safetensors").exists():
        subprocess.run([sys.executable, ROOT / "tools/reference/gguf_to_hf.py", arguments.gguf, folder], check=True)
    return str(folder)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--engine", required=True)
    parser.add_argument("--gguf", required=True)
    parser.add_argument("--cache", default=os.path.expanduser("~/.cache/taod/bench"))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=1, help="runs of the rows that are whole iterations")
    parser.add_argument("--prompts", default=os.path.expanduser("~/.cache/taod/models/alpaca_eval_gpt4_baseline.json"))
    parser.add_argument("--only", default=",".join(row.name for row in ROWS))
    parser.add_argument("--out", default="")
    arguments = parser.parse_args()
    folder = model_folder(arguments)
    lines = [
        "| work | tokens/s | times the best peer (share of its memory) | goal | | share of the f32 limit | peak RSS, MiB, in the same order |",
        "|---|---|---|---|---|---|---|",
    ]
    chosen, products = arguments.only.split(","), []
    for row in ROWS:
        if row.name in chosen:
            # With the row, since a machine's speed wanders.
            products.append(product())
            lines.append(compare(row, arguments, folder, products[-1]))
            print(lines[-1], file=sys.stderr)
    text = "\n".join(lines) + "\n\n" + about(arguments, products)
    print(text)
    if arguments.out:
        pathlib.Path(arguments.out).write_text(text + "\n")


if __name__ == "__main__":
    main()
