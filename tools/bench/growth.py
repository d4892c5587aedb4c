"""How sampling grows with the number of prompts: speed and memory of taod and of transformers, as numbers and as a plot.

    growth.py --engine BIN --gguf MODEL.gguf [--prompts 1,2,4,...] [--peer-prompts 1,2,4,8] --out FOLDER

Each point is a process of its own, 8 samples of 64 new tokens to prompts of 64. transformers draws all answers at once, as its `generate`
does with what it is given; past the last of its points its memory would not fit a small machine. FOLDER gets growth.svg and growth.md.
"""

import argparse
import os
import pathlib
import sys

import engine

SAMPLES, PROMPT, NEW = 8, 64, 64


def point(command, runs):
    """Returns tokens/s (median) and MiB of one process."""
    side = engine.Side(command[-5], command)
    for _ in range(runs):
        side.work()
    return side.close()


def measure(arguments, folder):
    """Returns a list of (prompts, tokens/s, MiB) by name."""
    sizes = lambda prompts: [str(n) for n in (prompts, SAMPLES, PROMPT, NEW)]
    own = lambda work: lambda prompts: [arguments.engine, folder, work, *sizes(prompts)]
    peer = lambda prompts: [sys.executable, str(engine.HERE / "engine_peer.py"), "hf", folder, "generate", *sizes(prompts)]
    series = {
        "taod, f32": (own("generate"), arguments.prompts),
        "taod, 16 bits": (own("generate-int16"), arguments.prompts),
        "transformers": (peer, arguments.peer_prompts),
    }
    found = {}
    for name, (command, counts) in series.items():
        found[name] = []
        for prompts in map(int, counts.split(",")):
            rate, memory = point(command(prompts), arguments.runs)
            found[name].append((prompts, rate, memory))
            print(f"{name}: {prompts} prompts, {rate:.0f} tokens/s, {memory:.0f} MiB", file=sys.stderr)
    return found


def plot(found, file):
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "taod"
    from matplotlib import pyplot

    figure, sides = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for side, column, label in ((sides[0], 1, "tokens/s"), (sides[1], 2, "peak memory, MiB")):
        for name, points in found.items():
            side.plot([p[0] for p in points], [p[column] for p in points], marker="o", markersize=4, label=name)
        side.set_xscale("log", base=2)
        side.set_ylim(bottom=0)
        side.set_xlabel("prompts, of 8 answers each")
        side.set_ylabel(label)
        side.xaxis.set_major_formatter("{x:.0f}")
        side.grid(alpha=0.3)
    sides[0].legend()
    figure.savefig(file, metadata={"Date": None})


def table(found):
    lines = ["| | prompts | tokens/s | peak RSS, MiB |", "|---|---|---|---|"]
    for name, points in found.items():
        lines += [f"| {name} | {prompts} | {rate:,.0f} | {memory:,.0f} |" for prompts, rate, memory in points]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--engine", required=True)
    parser.add_argument("--gguf", required=True)
    parser.add_argument("--cache", default=os.path.expanduser("~/.cache/taod/bench"))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--prompts", default="1,2,4,8,16,32,64,128")
    parser.add_argument("--peer-prompts", default="1,2,4,8,16,32")
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    arguments.iterations = 0
    folder = engine.model_folder(arguments)
    products = [engine.product()]
    found = measure(arguments, folder)
    products.append(engine.product())
    out = pathlib.Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    plot(found, out / "growth.svg")
    text = table(found) + "\n\n" + engine.about(arguments, products)
    (out / "growth.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
