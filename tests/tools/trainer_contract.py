"""A trainer that trains nothing: tells what the reference trainer's reading of a dataset chooses, and hands over an adapter.

    trainer_contract.py ADAPTER DATASET OUT        (as a `tuning.command`)

Writes next to OUT `chosen.json`: the groups, each a list of [completion, reward, advantage].
"""

import json
import pathlib
import shutil
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "tools" / "trainers"))
import contract  # noqa: E402

adapter, dataset, out = map(pathlib.Path, sys.argv[1:])
folder = contract.read(dataset)
method, constants = folder.tuning["method"], contract.constants(folder.tuning)
groups = contract.choose(folder.samples, folder.tuning)
for sample in folder.samples:
    sample.old = sample.base = sample.sampler
told = [
    [[sample.completion, sample.reward, signal] for sample, signal in zip(group, contract.signals(group, method, constants))]
    for group in groups
]
(out.parent / "chosen.json").write_text(json.dumps(told))
shutil.copytree(adapter, out, dirs_exist_ok=True)
