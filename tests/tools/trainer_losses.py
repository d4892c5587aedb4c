"""Checks the losses of the reference trainer against tests/golden/losses.json: values and slopes, in float64.

    trainer_losses.py        prints the methods that were checked; ends with 1 where one differs
"""

import json
import pathlib
import sys

import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools" / "trainers"))
import contract  # noqa: E402
import objective  # noqa: E402

golden = json.loads((ROOT / "tests/golden/losses.json").read_text())
members = [member for group in golden["groups"] for member in group]
width = max(len(member["policy"]) for member in members)


def padded(name):
    rows = [member[name] + [0.0] * (width - len(member[name])) for member in members]
    return torch.tensor(rows, dtype=torch.float64)


def sample(member):
    kept = {name: member[name] for name in ("reward", "sampler", "base", "old")}
    return contract.Sample(group="", prompt=[], completion=member["policy"], **kept)


lengths = torch.tensor([len(member["policy"]) for member in members])
mask = (torch.arange(width) < lengths[:, None]).double()
for method in contract.METHODS:
    expected = golden["methods"][method]
    constants = {"beta": 0.0, "value_beta": 1.0, "clip_low": 0.2, "clip_high": 0.2} | expected["constants"]
    groups = [[sample(member) for member in group] for group in golden["groups"]]
    signals = [signal for group in groups for signal in contract.signals(group, method, constants)]
    policy = padded("policy").requires_grad_(True)
    known = {name: padded(name) for name in ("old", "base", "sampler")}
    answers = objective.Answers(policy=policy, mask=mask, signal=torch.tensor(signals, dtype=torch.float64), **known)
    loss = objective.loss(method, constants, answers, width)
    loss.backward()
    slopes = [slope for group in expected["slopes"] for slope in group]
    found = [row[:length].tolist() for row, length in zip(policy.grad, lengths)]
    off = max(abs(a - b) for row, other in zip(found, slopes) for a, b in zip(row, other, strict=True))
    if abs(loss.item() - expected["value"]) > 1e-9 or off > 1e-9 or policy.grad[mask == 0].any():
        sys.exit(f"{method}: loss {loss.item()}, expected {expected['value']}; slopes off by {off}")
print(" ".join(contract.METHODS))
