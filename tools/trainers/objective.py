"""The losses of frozen answers, in PyTorch: taod's formulas (src/adapter/losses), checked against the same golden numbers.

TRL's trainers of policies sample by themselves and its trainers of preferences tokenise by themselves; here the answers
are frozen and their ids are given. So the loss takes the log-probs of those ids. Tensors are [answers, tokens], zero outside the
mask; for pairs the answers stand better, worse, better, worse.
"""

import dataclasses

import torch

from contract import LIKELIHOOD, PAIRS, POLICY

# Largest weight of what the sampler held less likely than the trainer does.
LARGEST_WEIGHT = 2.0


@dataclasses.dataclass
class Answers:
    policy: torch.Tensor
    mask: torch.Tensor
    # Under the policy that training began from, the base, and as the sampler told them.
    old: torch.Tensor
    base: torch.Tensor
    sampler: torch.Tensor
    # One number an answer: contract.signals.
    signal: torch.Tensor


def loss(method, c, answers, longest):
    """Returns the mean loss of the answers; `longest` is the length of the longest completion of the run."""
    answers = dataclasses.replace(answers, policy=answers.policy * answers.mask)
    if method in LIKELIHOOD:
        return -_mean(answers, answers.policy).mean()
    if method in POLICY:
        return _policy(method, c, answers, longest)
    if method in PAIRS:
        return _pairs(method, c, answers)
    reference = answers.base if method == "a_star_po" else answers.old
    return ((c["beta"] * (answers.policy - reference).sum(1) - answers.signal) ** 2).mean()


def _mean(answers, values):
    return (values * answers.mask).sum(1) / answers.mask.sum(1)


def _clipped(ratio, advantage, c):
    return torch.minimum(ratio * advantage, ratio.clamp(1 - c["clip_low"], 1 + c["clip_high"]) * advantage)


def _weight(log_ratio):
    return log_ratio.exp().clamp(max=LARGEST_WEIGHT).detach()


def _policy(method, c, answers, longest):
    change, told = answers.policy - answers.old, answers.old - answers.sampler
    tie = (answers.base - answers.policy).clamp(max=18.0)
    tie = c["beta"] * (tie.exp() - tie - 1)
    if method == "rloo":
        return -(_weight(told.sum(1)) * _clipped(change.sum(1).exp(), answers.signal, c)).mean()
    if method == "gspo":
        gain = _weight(_mean(answers, told)) * _clipped(_mean(answers, change).exp(), answers.signal, c)
        return (_mean(answers, tie) - gain).mean()
    tokens = tie - _weight(told) * _clipped(change.exp(), answers.signal[:, None], c)
    if method == "dr_grpo":
        return (tokens * answers.mask).sum() / (len(tokens) * longest)
    return _mean(answers, tokens).mean()


def _pairs(method, c, answers):
    moved = (answers.policy - (answers.old if method == "rebel" else answers.base)).sum(1)
    margin, gap = c["beta"] * (moved[::2] - moved[1::2]), answers.signal[::2] - answers.signal[1::2]
    if method == "rebel":
        return ((margin - gap) ** 2).mean()
    log = torch.nn.functional.logsigmoid
    sure = torch.sigmoid(gap) if method == "rc_dpo" else torch.ones_like(gap)
    value = -(sure * log(margin) + (1 - sure) * log(-margin)).mean()
    return value - _mean(answers, answers.policy)[::2].mean() if method == "rpo" else value
