"""Makes the golden distributions of sampling with transformers' logits processors: tests/golden/sampling.json.

    python tools/reference/sampling_golden.py

For each setting the log-probs that a token is drawn with, null where it cannot be drawn. The processors are transformers';
the order in which they stand is vLLM's (penalty, temperature, min-p, top-k, top-p), which taod follows.
"""

import json
import pathlib

import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

GOLDEN = pathlib.Path(__file__).resolve().parents[2] / "tests" / "golden" / "sampling.json"
VOCABULARY = 40
# Some of them twice, as text has them, and tokens that stand in both.
PROMPT, ANSWER = [3, 3, 17, 8, 25], [8, 30, 31, 30]
PLAIN = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0)
SETTINGS = [
    {},
    dict(top_k=1),
    dict(top_k=5),
    dict(top_k=1000),
    dict(min_p=0.02),
    dict(min_p=0.3),
    dict(min_p=1.0),
    dict(top_p=0.6),
    dict(top_p=0.97),
    dict(repetition_penalty=1.3),
    dict(repetition_penalty=0.7),
    dict(temperature=0.6, min_p=0.05),
    dict(temperature=1.7, top_k=12),
    dict(temperature=0.8, top_k=7, top_p=0.9),
    dict(temperature=1.4, min_p=0.04, top_p=0.9),
    dict(temperature=1.2, min_p=0.03, top_k=9, top_p=0.8, repetition_penalty=1.2),
    dict(temperature=1.6, min_p=0.01, top_k=20, top_p=0.95, repetition_penalty=1.8),
]


def logprobs(logits, setting):
    ids = torch.tensor([PROMPT + ANSWER])
    steps = [RepetitionPenaltyLogitsProcessor(setting["repetition_penalty"]), TemperatureLogitsWarper(setting["temperature"])]
    if setting["min_p"] > 0:
        steps.append(MinPLogitsWarper(setting["min_p"]))
    if setting["top_k"] > 0:
        steps.append(TopKLogitsWarper(setting["top_k"]))
    if setting["top_p"] < 1:
        steps.append(TopPLogitsWarper(setting["top_p"]))
    scores = logits[None].double()
    for step in steps:
        scores = step(ids, scores)
    return [None if value == float("-inf") else value for value in torch.log_softmax(scores[0], -1).tolist()]


def main():
    generator = torch.Generator().manual_seed(20261127)
    cases = []
    for setting in SETTINGS:
        setting = PLAIN | setting
        logits = 2.5 * torch.randn(VOCABULARY, generator=generator)
        cases.append(dict(**setting, logits=logits.tolist(), logprobs=logprobs(logits, setting)))
    GOLDEN.write_text(json.dumps(dict(prompt=PROMPT, answer=ANSWER, cases=cases)) + "\n")


if __name__ == "__main__":
    main()
