"""Makes the golden numbers of the training losses with torch's autograd: tests/golden/losses.json.

    python tools/reference/losses_golden.py

Two groups of answers with their rewards and log-probs; for each method the loss of the batch of both and its gradient along
each token's log-prob, in float64. Formulas as their papers and TRL's documentation print them, not as taod arranges
them. Samples stand in the order in which a method takes them (pairs: better, worse).
"""

import json
import pathlib

import torch

GOLDEN = pathlib.Path(__file__).resolve().parents[2] / "tests" / "golden" / "losses.json"
LENGTHS = [[4, 2, 5, 3], [1, 6, 3, 4]]
REWARDS = [[0.9, 0.1, 0.65, 0.3], [1.0, 0.0, 0.5, 0.25]]


def draw():
    generator = torch.Generator().manual_seed(20261126)
    groups = []
    for lengths, rewards in zip(LENGTHS, REWARDS):
        group = []
        for length, reward in zip(lengths, rewards):
            base = -3 * torch.rand(length, generator=generator)
            old = base + 0.3 * torch.randn(length, generator=generator)
            # Far enough that some ratios are clipped on either side.
            policy = old + 0.25 * torch.randn(length, generator=generator)
            sampler = old + 0.02 * torch.randn(length, generator=generator)
            group.append(dict(reward=reward, base=base, old=old, policy=policy, sampler=sampler))
        groups.append(group)
    return groups


def k3(member):
    log = member["base"] - member["policy"]
    return torch.exp(log) - log - 1


def truncated(log):
    return torch.clamp(torch.exp(log), max=2.0).detach()


def clipped(ratio, advantage, low, high):
    return torch.minimum(ratio * advantage, torch.clamp(ratio, 1 - low, 1 + high) * advantage)


def normalised(group):
    rewards = torch.tensor([m["reward"] for m in group], dtype=torch.float64)
    return (rewards - rewards.mean()) / (rewards.std() + 1e-4)


def likelihood(groups, c):
    members = [m for group in groups for m in group]
    return -sum(m["policy"].mean() for m in members) / len(members)


def grpo(groups, c):
    losses = []
    for group in groups:
        for member, advantage in zip(group, normalised(group)):
            ratio = torch.exp(member["policy"] - member["old"])
            gain = truncated(member["old"] - member["sampler"]) * clipped(ratio, advantage, c["clip_low"], c["clip_high"])
            losses.append((-gain + c["beta"] * k3(member)).mean())
    return sum(losses) / len(losses)


def dr_grpo(groups, c):
    longest = max(len(m["policy"]) for group in groups for m in group)
    total, count = 0.0, 0
    for group in groups:
        rewards = torch.tensor([m["reward"] for m in group], dtype=torch.float64)
        for member, advantage in zip(group, rewards - rewards.mean()):
            ratio = torch.exp(member["policy"] - member["old"])
            gain = truncated(member["old"] - member["sampler"]) * clipped(ratio, advantage, c["clip_low"], c["clip_high"])
            total, count = total + (-gain + c["beta"] * k3(member)).sum(), count + 1
    return total / (count * longest)


def dapo(groups, c):
    total, count = 0.0, 0
    for group in groups:
        for member, advantage in zip(group, normalised(group)):
            ratio = torch.exp(member["policy"] - member["old"])
            gain = truncated(member["old"] - member["sampler"]) * clipped(ratio, advantage, c["clip_low"], c["clip_high"])
            total, count = total + (-gain + c["beta"] * k3(member)).sum(), count + len(gain)
    return total / count


def gspo(groups, c):
    losses = []
    for group in groups:
        for member, advantage in zip(group, normalised(group)):
            ratio = torch.exp((member["policy"] - member["old"]).mean())
            gain = truncated((member["old"] - member["sampler"]).mean()) * clipped(ratio, advantage, c["clip_low"], c["clip_high"])
            losses.append(-gain + c["beta"] * k3(member).mean())
    return sum(losses) / len(losses)


def rloo(groups, c):
    losses = []
    for group in groups:
        rewards = [m["reward"] - c["beta"] * (m["old"] - m["base"]).sum() for m in group]
        for i, member in enumerate(group):
            baseline = sum(r for j, r in enumerate(rewards) if j != i) / (len(group) - 1)
            ratio = torch.exp((member["policy"] - member["old"]).sum())
            weight = truncated((member["old"] - member["sampler"]).sum())
            losses.append(-weight * clipped(ratio, rewards[i] - baseline, c["clip_low"], c["clip_high"]))
    return sum(losses) / len(losses)


def pairs(groups):
    return [(group[i], group[i + 1]) for group in groups for i in range(0, len(group), 2)]


def margin(better, worse, reference):
    return (better["policy"] - better[reference]).sum() - (worse["policy"] - worse[reference]).sum()


def dpo(groups, c):
    found = [-torch.nn.functional.logsigmoid(c["beta"] * margin(b, w, "base")) for b, w in pairs(groups)]
    return sum(found) / len(found)


def rc_dpo(groups, c):
    losses = []
    for better, worse in pairs(groups):
        sure = torch.sigmoid(torch.tensor(better["reward"] - worse["reward"], dtype=torch.float64))
        h = c["beta"] * margin(better, worse, "base")
        log = torch.nn.functional.logsigmoid
        losses.append(-sure * log(h) - (1 - sure) * log(-h))
    return sum(losses) / len(losses)


def rpo(groups, c):
    found = [-b["policy"].mean() for b, _ in pairs(groups)]
    return dpo(groups, c) + sum(found) / len(found)


def rebel(groups, c):
    found = [(c["beta"] * margin(b, w, "old") - (b["reward"] - w["reward"])) ** 2 for b, w in pairs(groups)]
    return sum(found) / len(found)


def regression(reference):
    def loss(groups, c):
        losses = []
        for group in groups:
            rewards = torch.tensor([m["reward"] for m in group], dtype=torch.float64)
            value = c["value_beta"] * (torch.logsumexp(rewards / c["value_beta"], 0) - torch.log(torch.tensor(float(len(group)))))
            for member in group:
                log_ratio = (member["policy"] - member[reference]).sum()
                losses.append((c["beta"] * log_ratio - (member["reward"] - value)) ** 2)
        return sum(losses) / len(losses)

    return loss


METHODS = {
    "raft": (likelihood, {}), "rest": (likelihood, {}), "sft": (likelihood, {}),
    "grpo": (grpo, dict(beta=0.04, clip_low=0.2, clip_high=0.2)),
    "dr_grpo": (dr_grpo, dict(beta=0.04, clip_low=0.2, clip_high=0.2)),
    "dapo": (dapo, dict(beta=0.04, clip_low=0.2, clip_high=0.28)),
    "gspo": (gspo, dict(beta=0.04, clip_low=0.1, clip_high=0.15)),
    "rloo": (rloo, dict(beta=0.05, clip_low=0.2, clip_high=0.2)),
    "dpo": (dpo, dict(beta=0.3)), "rc_dpo": (rc_dpo, dict(beta=0.3)), "rpo": (rpo, dict(beta=0.3)),
    "rebel": (rebel, dict(beta=0.3)),
    "oapl": (regression("old"), dict(beta=0.05, value_beta=1.0)),
    "a_star_po": (regression("base"), dict(beta=0.05, value_beta=0.5)),
}


def main():
    groups = draw()
    kept = [[{k: v if k == "reward" else [float(x) for x in v] for k, v in m.items()} for m in group] for group in groups]
    methods = {}
    for name, (loss, constants) in METHODS.items():
        doubles = [[{k: v if k == "reward" else v.double() for k, v in m.items()} for m in group] for group in groups]
        for group in doubles:
            for member in group:
                member["policy"].requires_grad_(True)
        value = loss(doubles, constants)
        value.backward()
        slopes = [[m["policy"].grad.tolist() for m in group] for group in doubles]
        methods[name] = dict(constants=constants, value=float(value.detach()), slopes=slopes)
    GOLDEN.write_text(json.dumps(dict(groups=kept, methods=methods), separators=(",", ":")) + "\n")
    print({name: round(m["value"], 6) for name, m in methods.items()})


main()
