"""What taod hands to a trainer and what it means: the folder, the samples that train, their advantages. Plain Python.

The rules are those of taod's own loop (docs/training.md), so that a trainer that follows them trains on the same samples
with the same weights. A folder that is not whole, or that asks for what is not here, is refused in one line.
"""

import dataclasses
import hashlib
import json
import math
import pathlib

import pyarrow.parquet

LIKELIHOOD = ("raft", "rest", "sft")
POLICY = ("rloo", "grpo", "dr_grpo", "gspo")
REGRESSION = ("oapl", "a_star_po")
PAIRS = ("dpo", "rc_dpo", "rpo", "rebel")
METHODS = LIKELIHOOD + POLICY + REGRESSION + PAIRS


class Refused(Exception):
    """Says in one line what cannot be trained and why."""


@dataclasses.dataclass
class Sample:
    group: str
    prompt: list
    completion: list
    reward: float
    # Log-probs of the completion: as the sampler told them, under the base, under the policy that training begins from.
    sampler: list | None
    base: list | None
    old: list | None = None


@dataclasses.dataclass
class Folder:
    settings: dict
    samples: list

    @property
    def tuning(self):
        return self.settings["tuning"]


def read(folder):
    """Reads a dataset's folder and checks it against its manifest."""
    folder = pathlib.Path(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    if manifest["format"] != 1:
        raise Refused(f"{folder}/manifest.json has format {manifest['format']}; this trainer reads 1")
    for name, expected in manifest["files"]:
        found = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        if found != expected:
            raise Refused(f"{folder}/{name} has another hash than its manifest says; it was changed after taod wrote it")
    rows = pyarrow.parquet.read_table(folder / "candidates.parquet").to_pylist()
    if len(rows) != manifest["samples"]:
        raise Refused(f"{folder}/candidates.parquet has {len(rows)} rows where its manifest says {manifest['samples']}")
    names = {"prompt": "prompt_ids", "completion": "completion_ids", "sampler": "logprobs", "base": "base_logprobs"}
    same = lambda row: {name: row[column] for name, column in names.items()}
    samples = [Sample(group=row["group"], reward=row["reward"], **same(row)) for row in rows]
    return Folder(json.loads((folder / "settings.json").read_text()), samples)


def constants(tuning):
    """Returns the constants of the loss: those that are set, else the method's own."""
    method = tuning["method"]
    if method not in METHODS:
        raise Refused(f"tuning.method = {method!r} is not among this trainer's: {', '.join(METHODS)}")
    own = lambda key, value: tuning[key] if tuning[key] > 0 else value
    beta = {"rloo": 0.05, "oapl": 0.05, "a_star_po": 0.05}.get(method, 0.1 if method in PAIRS else 0.0)
    low, high = (3e-4, 4e-4) if method == "gspo" else (0.2, 0.2)
    return {
        "beta": own("beta", beta),
        "value_beta": own("value_beta", 0.5 if method == "a_star_po" else 1.0),
        "clip_low": own("clip_low", low),
        "clip_high": own("clip_high", high),
    }


def choose(samples, tuning):
    """Returns the groups that train, each a list of its chosen samples in the loss's order (pairs: better, worse, ...)."""
    groups = {}
    for sample in samples:
        groups.setdefault(sample.group, []).append(sample)
    chosen = [[group[i] for i in _choose([s.reward for s in group], tuning)] for group in groups.values()]
    chosen = [group for group in chosen if group]
    if not chosen:
        raise Refused(f"nothing to learn from: none of {len(groups)} groups has samples that train")
    return chosen


def _choose(rewards, tuning):
    method, best, least = tuning["method"], tuning["best_per_prompt"], tuning["min_reward"]
    if method == "sft":
        return range(len(rewards))
    if len(set(rewards)) == 1:
        return []
    if method in POLICY + REGRESSION:
        return range(len(rewards))
    # Best first; ties go to the earlier sample.
    order = sorted(range(len(rewards)), key=lambda i: (-rewards[i], i))
    if method in LIKELIHOOD:
        good = [i for i in order if rewards[i] > least]
        return good[:best] if method == "raft" else good
    pairs = [(order[i], order[-1 - i]) for i in range(min(best, len(rewards) // 2))]
    return [i for better, worse in pairs if rewards[better] > max(rewards[worse], least) for i in (better, worse)]


def signals(group, method, c):
    """Returns one number for each sample of a chosen group: its advantage, or its reward where pairs compare those."""
    rewards = [sample.reward for sample in group]
    if method == "rloo":
        # The drift from the base shapes the reward; no gradient flows through it.
        rewards = [sample.reward - c["beta"] * (sum(sample.old) - sum(sample.base)) for sample in group]
        return [reward - (sum(rewards) - reward) / (len(rewards) - 1) for reward in rewards]
    if method in POLICY:
        mean = sum(rewards) / len(rewards)
        deviation = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
        return [(r - mean) / (1.0 if method == "dr_grpo" else deviation + 1e-4) for r in rewards]
    if method in REGRESSION:
        temperature, most = c["value_beta"], max(rewards)
        value = most + temperature * math.log(sum(math.exp((r - most) / temperature) for r in rewards) / len(rewards))
        return [reward - value for reward in rewards]
    return rewards
