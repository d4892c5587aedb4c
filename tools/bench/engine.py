"""The engine bench: taod and what its users would run instead, in turn, on the same weights; prints a Markdown table.

    engine.py --engine BIN --gguf MODEL.gguf [--runs 5] [--only NAMES]

Both sides of a row live at the same time, each on all cores, and work in turn, never at once. Seconds are those of the
work alone, after one run to warm up; memory is the peak of the whole process. Tokens are counted alike on both sides: in
training a trainer's, for which every answer has its own prompt.
"""

import argparse
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

# Name, what it is, sizes, taod's works, those that a goal binds, peers, goal of the ratio, goal of the memory's share. Eight bits
# are off by more than policy gradients allow, so that goals do not count them where a sampler's log-probs matter.
SAMPLING = ["generate", "generate-int16", "generate-int8"]
TRAINING = ["step", "step-int16"]
ROWS = [
    ("batch", "4 prompts of 64 x 8 samples x 64 new", [4, 8, 64, 64], SAMPLING, SAMPLING[:2], ["hf", "llama.cpp"], 3.0, None),
    ("long", "1 prompt of 1,024 x 8 x 64 new", [1, 8, 1024, 64], SAMPLING, SAMPLING[:2], ["hf", "llama.cpp"], 5.0, None),
    ("one", "1 prompt of 64 x 1 x 64 new", [1, 1, 64, 64], SAMPLING, SAMPLING, ["hf", "llama.cpp"], 1.0, None),
    ("logprobs", "log-probs of 8 groups x 8 x (64 shared + 64)", [8, 8, 64, 64], ["logprobs"], ["logprobs"], ["hf"], 1.7, None),
    ("step-64", "LoRA step, 8 x (64 shared + 64)", [8, 64, 64], TRAINING, TRAINING, ["hf"], 1.5, 1 / 3),
    ("step-512", "LoRA step, 8 x (512 shared + 64)", [8, 512, 64], TRAINING, TRAINING, ["hf"], 5.0, 1 / 5),
]
LABELS = {
    "generate": "taod, f32",
    "generate-int16": "taod, 16 bits",
    "generate-int8": "taod, 8 bits",
    "logprobs": "taod, f32",
    "step": "taod, f32",
    "step-int16": "taod, 16 bits",
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


def compare(row, arguments, folder):
    name, what, sizes, works, _, peers, _, _ = row
    numbers = [str(size) for size in sizes]
    sides = [Side(LABELS[work], [arguments.engine, folder, work, *numbers]) for work in works]
    for peer in peers:
        work = works[0]
        model = arguments.gguf if peer == "llama.cpp" else folder
        label = "PEFT" if work == "step" else LABELS[peer]
        sides.append(Side(label, [sys.executable, str(HERE / "engine_peer.py"), peer, model, work, *numbers]))
    for run in range(arguments.runs):
        for side in sides:
            side.work()
            print(name, side.name, {k: round(v, 3) for k, v in side.figures[-1].items()}, file=sys.stderr)
    return line(row, [(side.name, *side.close()) for side in sides])


def line(row, figures):
    """Returns a row of the table from (label, tokens/s, MiB) of each side, taod's first."""
    _, what, _, works, binding, _, goal, memory_goal = row
    ours, theirs = figures[: len(works)], figures[len(works) :]
    rate, memory = max(rate for _, rate, _ in theirs), min(memory for _, _, memory in theirs)
    ratios = [(label, own / rate, rss / memory) for label, own, rss in ours]
    bound = [ratio for work, ratio in zip(works, ratios) if work in binding]
    fits = lambda ratio, share: ratio >= goal and (memory_goal is None or share <= memory_goal)
    reached = "reached" if any(fits(ratio, share) for _, ratio, share in bound) else "missed"
    told = lambda label, ratio, share: f"{label.removeprefix('taod, ')} {ratio:.1f}" + (f" ({share:.2f})" if memory_goal else "")
    wanted = f">= {goal:g}" + (f" (<= {memory_goal:.2f})" if memory_goal else "")
    rates = "; ".join(f"{label} {rate:,.0f}" for label, rate, _ in figures)
    peaks = "; ".join(f"{rss:,.0f}" for _, _, rss in figures)
    return f"| {what} | {rates} | {'; '.join(told(*ratio) for ratio in ratios)} | {wanted} | {reached} | {peaks} |"


def about(arguments):
    with open("/proc/cpuinfo") as file:
        lines = file.read().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
    flags = next((line.split(":")[1].split() for line in lines if line.startswith("flags")), [])
    kinds = [flag for flag in ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8") if flag in flags]
    commit = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True)
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    a, b = torch.rand(576, 576), torch.rand(576, 1536)
    began = time.monotonic()
    for _ in range(500):
        a @ b
    gemm = 2 * 576 * 576 * 1536 * 500 / (time.monotonic() - began) / 1e9
    return (
        f"{datetime.date.today()}, commit {commit.stdout.strip() or 'unknown'}; {len(os.sched_getaffinity(0))} cores of {cpu} "
        f"({', '.join(kinds)}); torch's f32 product of [576, 576] and [576, 1536]: {gemm:.0f} GFLOP/s; load of the last minute "
        f"{os.getloadavg()[0]:.1f}; medians of {arguments.runs} runs in turn."
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--engine", required=True)
    parser.add_argument("--gguf", required=True)
    parser.add_argument("--cache", default=os.path.expanduser("~/.cache/taod/bench"))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", default=",".join(row[0] for row in ROWS))
    parser.add_argument("--out", default="")
    arguments = parser.parse_args()
    folder = pathlib.Path(arguments.cache) / "SmolLM2-135M-Instruct"
    if not (folder / "model.safetensors").exists():
        subprocess.run([sys.executable, ROOT / "tools/reference/gguf_to_hf.py", arguments.gguf, folder], check=True)
    lines = [
        "| work | tokens/s | times the best peer (share of its memory) | goal | | peak RSS, MiB, in the same order |",
        "|---|---|---|---|---|---|",
    ]
    chosen = arguments.only.split(",")
    for row in ROWS:
        if row[0] in chosen:
            lines.append(compare(row, arguments, str(folder)))
            print(lines[-1], file=sys.stderr)
    text = "\n".join(lines) + "\n\n" + about(arguments)
    print(text)
    if arguments.out:
        pathlib.Path(arguments.out).write_text(text + "\n")


if __name__ == "__main__":
    main()
