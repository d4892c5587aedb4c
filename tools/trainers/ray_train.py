"""Trains an adapter on taod's frozen candidates with TRL and PEFT on Ray Train; `ray_submit.py` submits it as a job.

    ray_train.py [--model FOLDER] [--workers N] [--gpu] [--cpus N] [--rows N] [--arguments JSON] DATASET OUT

Runs where the cluster's workers can read DATASET and write OUT. Each worker holds the base and a share of the answers.
"""

import argparse
import json
import os
import pathlib
import shutil
import sys

import ray.train
import ray.train.torch
import torch

import contract
import objective

MODULES = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj", "gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
# Phi-3 keeps several in one matrix.
FUSED = {"q": "qkv_proj", "k": "qkv_proj", "v": "qkv_proj", "gate": "gate_up_proj", "up": "gate_up_proj"}
# What the first worker tells, in the scratch folder.
TOLD = "told.json"


def model_of(config, folder):
    """Loads the base and puts the adapter on it: that of the iteration before, or one that changes nothing."""
    import peft
    from transformers import AutoModelForCausalLM

    told = config["model"] or folder.settings["base"]
    dtype = torch.bfloat16 if config["gpu"] else torch.float32
    base = AutoModelForCausalLM.from_pretrained(told, dtype=dtype)
    start, tuning = folder.settings["start"], folder.tuning
    if start:
        model = peft.PeftModel.from_pretrained(base, start, is_trainable=True)
    else:
        names = {name.rsplit(".", 1)[-1] for name, _ in base.named_modules()}
        found = lambda key: MODULES[key] if MODULES[key] in names else FUSED.get(key, MODULES[key])
        targets = sorted({found(key) for key in tuning["targets"]})
        shape = {"r": tuning["rank"], "lora_alpha": tuning["alpha"], "use_rslora": tuning["use_rslora"]}
        # taod's patterns are PEFT's.
        shape |= {key: tuning[key] for key in ("rank_pattern", "alpha_pattern")} | {"lora_dropout": tuning["dropout"]}
        model = peft.get_peft_model(base, peft.LoraConfig(target_modules=targets, task_type="CAUSAL_LM", **shape))
    # What taod calls the base, which servers compare with the model that they serve.
    model.peft_config["default"].base_model_name_or_path = folder.settings["base"]
    # The adapter and its optimizer are f32, as taod's own.
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def collator(rows):
    """Returns what makes a batch of the indices of rows; a row is one answer with its signal, or a pair of such."""

    def padded(values, at, width):
        # Where the model tells the log-prob of a token, one before it.
        values = values or []
        return [0.0] * (at - 1) + values + [0.0] * (width - at - len(values))

    def collate(examples):
        answers = [answer for example in examples for answer in rows[example["row"]]]
        width = max(len(sample.prompt) + len(sample.completion) for sample, _ in answers)
        batch = {"input_ids": [], "attention_mask": [], "labels": [], "old": [], "base": [], "sampler": [], "signal": []}
        for sample, signal in answers:
            ids, at = sample.prompt + sample.completion, len(sample.prompt)
            rest = width - len(ids)
            batch["input_ids"].append(ids + [0] * rest)
            batch["attention_mask"].append([1] * len(ids) + [0] * rest)
            batch["labels"].append([-100] * at + sample.completion + [-100] * rest)
            batch["old"].append(padded(sample.old, at, width))
            batch["base"].append(padded(sample.base, at, width))
            # Without log-probs of the sampler there is nothing to make up for.
            batch["sampler"].append(padded(sample.sampler if sample.sampler is not None else sample.old, at, width))
            batch["signal"].append(signal)
        return {name: torch.tensor(values) for name, values in batch.items()}

    return collate


def frozen_trainer():
    """Returns TRL's SFTTrainer with the loss of frozen answers, taod's schedule, and log-probs before the first step."""
    from transformers import TrainerCallback
    from trl import SFTTrainer

    class Begin(TrainerCallback):
        """Runs when the model is distributed, before the first step."""

        def __init__(self, trainer):
            self.trainer = trainer

        def on_train_begin(self, arguments, state, control, **more):
            self.trainer.prepare_rows()

    class FrozenTrainer(SFTTrainer):
        def __init__(self, groups, rows, tuning, c, **more):
            self.groups, self.rows, self.tuning, self.constants = groups, rows, tuning, c
            self.longest = max(len(sample.completion) for group in groups for sample in group)
            super().__init__(**more)
            # The loss is a mean over answers, which the trainer divides over the micro-batches of a step.
            self.model_accepts_loss_kwargs = False
            self.add_callback(Begin(self))

        def forward(self, model, inputs):
            kept = {name: inputs[name] for name in ("input_ids", "attention_mask", "labels")}
            outputs = model(**kept, use_cache=False, fused_lm_head=True)
            return outputs.log_probs, outputs.label_mask.to(outputs.log_probs.dtype)

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            policy, mask = self.forward(model, inputs)
            known = {name: inputs[name] for name in ("old", "base", "sampler", "signal")}
            answers = objective.Answers(policy=policy, mask=mask, **known)
            loss = objective.loss(self.tuning["method"], self.constants, answers, self.longest)
            return (loss, {}) if return_outputs else loss

        def create_scheduler(self, num_training_steps, optimizer=None):
            total = num_training_steps
            warmup = min(self.tuning["warmup_steps"], max(total - 1, 0))

            def rate(step):
                if step < warmup:
                    return (step + 1) / (warmup + 1)
                return max(total - step, 0) / max(total - warmup, 1)

            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, rate)
            return self.lr_scheduler

        def prepare_rows(self):
            """Computes the log-probs that the loss needs and fills the rows in place."""
            method, beta = self.tuning["method"], self.constants["beta"]
            samples = [sample for group in self.groups for sample in group]
            if method in contract.POLICY or method in ("oapl", "rebel"):
                for sample, found in zip(samples, self.score(samples)):
                    sample.old = found
            needs_base = method in ("rloo", "a_star_po", "dpo", "rc_dpo", "rpo")
            unknown = [sample for sample in samples if sample.base is None]
            if unknown and (needs_base or (method in contract.POLICY and beta > 0)):
                with self.accelerator.unwrap_model(self.model).disable_adapter():
                    for sample, found in zip(unknown, self.score(unknown)):
                        sample.base = found
            if method in contract.POLICY:
                check_sampler(samples, self.tuning)
            self.rows[:] = rows_of(self.groups, method, self.constants)

        def score(self, samples):
            """Returns the log-probs of the samples' completions; each worker does its share, all do as many passes."""
            rank, world = self.accelerator.process_index, self.accelerator.num_processes
            model, found = self.model_wrapped, []
            model.eval()
            with torch.no_grad():
                for first in range(0, len(samples), world):
                    sample = samples[min(first + rank, len(samples) - 1)]
                    batch = collator([[(sample, 0.0)]])([{"row": 0}])
                    policy, _ = self.forward(model, self._prepare_inputs(batch))
                    at = len(sample.prompt) - 1
                    found.append(policy[0, at : at + len(sample.completion)].float().tolist())
            model.train()
            everyone = [found]
            if world > 1:
                everyone = [None] * world
                torch.distributed.all_gather_object(everyone, found)
            return [everyone[i % world][i // world] for i in range(len(samples))]

    return FrozenTrainer


def rows_of(groups, method, c):
    """Returns the rows: an answer with its signal each, or a pair of such."""
    rows = []
    for group in groups:
        answers = list(zip(group, contract.signals(group, method, c)))
        size = 2 if method in contract.PAIRS else 1
        rows += [answers[at : at + size] for at in range(0, len(answers), size)]
    return rows


def check_sampler(samples, tuning):
    """Refuses answers that the policy that is trained would not have drawn: ratios of policies would be noise."""
    if any(sample.sampler is None for sample in samples):
        raise contract.Refused(f"{tuning['method']} needs the sampler's log-probs, and some answers have none")
    gaps = [abs(old - told) for sample in samples for old, told in zip(sample.old, sample.sampler)]
    gap, bound = sum(gaps) / len(gaps), tuning["max_sampler_gap"]
    if not gap <= bound:
        raise contract.Refused(f"the sampler's log-probs differ by {gap:.3f} nats a token, past max_sampler_gap = {bound}")


def work(config):
    """What each worker does."""
    import datasets
    import transformers
    from trl import SFTConfig

    folder = contract.read(config["dataset"])
    tuning, c = folder.tuning, contract.constants(folder.tuning)
    groups = contract.choose(folder.samples, tuning)
    transformers.set_seed(folder.settings["seed"] % 2**32)
    if not config["gpu"]:
        torch.set_num_threads(max(config["cpus"], 1))
    size = 2 if tuning["method"] in contract.PAIRS else 1
    count = sum(len(group) for group in groups) // size
    world = ray.train.get_context().get_world_size()
    # A step holds as many answers as taod's, over all workers; whole workers and micro-batches.
    share = max(1, min(tuning["batch_samples"] // size, count) // world)
    micro = max(n for n in range(1, min(config["rows"], share) + 1) if share % n == 0)
    arguments = {
        "output_dir": str(pathlib.Path(config["scratch"]) / "trainer"),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": share // micro,
        "num_train_epochs": tuning["epochs"],
        "learning_rate": tuning["learning_rate"],
        "weight_decay": tuning["weight_decay"],
        "max_grad_norm": tuning["max_grad_norm"],
        "seed": folder.settings["seed"] % 2**32,
        "use_cpu": not config["gpu"],
        "bf16": config["gpu"],
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "max_length": None,
        "ddp_find_unused_parameters": False,
    } | json.loads(config["arguments"])
    model, rows = model_of(config, folder), []
    trainer = frozen_trainer()(
        groups,
        rows,
        tuning,
        c,
        model=model,
        args=SFTConfig(**arguments),
        train_dataset=datasets.Dataset.from_dict({"row": list(range(count))}),
        processing_class=transformers.AutoTokenizer.from_pretrained(config["model"] or folder.settings["base"]),
        data_collator=collator(rows),
    )
    trainer.train()
    save(trainer, config["out"])
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    told = {"method": tuning["method"], "groups": len(groups), "rows": count, "workers": world, "losses": losses}
    if trainer.accelerator.is_main_process:
        (pathlib.Path(config["scratch"]) / TOLD).write_text(json.dumps(told))


def save(trainer, out):
    """Writes the adapter: all workers gather it, the first writes."""
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.accelerator.is_main_process:
        model = trainer.accelerator.unwrap_model(trainer.model)
        model.save_pretrained(out, state_dict=state, save_embedding_layers=False)
        (pathlib.Path(out) / "README.md").unlink(missing_ok=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--cpus", type=int, default=1)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--arguments", default="{}")
    parser.add_argument("dataset")
    parser.add_argument("out")
    options = parser.parse_args()
    # Refused here, before any worker is started.
    try:
        folder = contract.read(options.dataset)
        contract.constants(folder.tuning)
        contract.choose(folder.samples, folder.tuning)
    except contract.Refused as refused:
        sys.exit(f"ray_train: {refused}")
    scratch = pathlib.Path(options.out).absolute().parent / "ray-train"
    # An earlier try may have left its state, which Ray would go on from.
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    config = vars(options) | {"scratch": str(scratch)}
    config |= {name: os.path.abspath(config[name]) for name in ("dataset", "out")}
    each = {"CPU": options.cpus} | ({"GPU": 1} if options.gpu else {})
    trainer = ray.train.torch.TorchTrainer(
        work,
        train_loop_config=config,
        scaling_config=ray.train.ScalingConfig(num_workers=options.workers, use_gpu=options.gpu, resources_per_worker=each),
        run_config=ray.train.RunConfig(name="taod", storage_path=str(scratch)),
    )
    trainer.fit()
    print("ray_train: trained " + (scratch / TOLD).read_text(), flush=True)
    shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
