"""Makes the golden numbers of LoRA training with torch, transformers and peft.

    python tools/reference/training_golden.py tiny [KIND ...]       # tests/golden/training_<kind>.json, one per family
    python tools/reference/training_golden.py model DIR             # tests/golden/training_smollm2.json; DIR: gguf_to_hf.py

Weights (of the tiny models) and LoRA matrices come from an integer hash of (tensor, element), which the Rust tests
compute too, so that the files hold results only. Each completion is run as a sequence of its own: the reference knows
nothing of shared prompts. Loss: minus the mean over completions of the mean log-prob of their tokens.

Made with torch 2.x, transformers 5.x, peft 0.21 on a CPU, float32.
"""

import json
import pathlib
import sys

import numpy as np
import torch
import transformers
from peft import LoraConfig, get_peft_model

GOLDEN = pathlib.Path(__file__).resolve().parents[2] / "tests" / "golden"
LINEARS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
           "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
FUSED = {"self_attn.qkv_proj": LINEARS[:3], "mlp.gate_up_proj": LINEARS[4:6]}
RATE, WARMUP, STEPS, DECAY, CLIP = 5e-3, 3, 10, 0.01, 1.0


def hashed(tensor, shape, scale, offset=0.0):
    """Values in offset +- scale, a function of the tensor's number and the element's index alone."""
    x = np.arange(int(np.prod(shape)), dtype=np.uint64) + np.uint64(tensor * 0x9E3779B1)
    x = (x & 0xFFFFFFFF).astype(np.uint32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    x = x ^ (x >> np.uint32(16))
    unit = x.astype(np.float64) / 2.0**31 - 1.0
    return torch.from_numpy((offset + scale * unit).astype(np.float32).reshape(shape))


UNTIED = ("qwen2", "olmo2", "phi3")
KINDS = {
    "llama": (transformers.LlamaConfig, {}),
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen3": (transformers.Qwen3Config, {}),
    "mistral": (transformers.MistralConfig, dict(sliding_window=4)),
    "smollm3": (transformers.SmolLM3Config, dict(no_rope_layer_interval=2)),
    "olmo2": (transformers.Olmo2Config, {}),
    "phi3": (transformers.Phi3Config, dict(
        original_max_position_embeddings=32, sliding_window=4, rope_parameters=dict(
            rope_type="longrope", rope_theta=10000.0, partial_rotary_factor=0.5, short_factor=[1.5],
            long_factor=[3.0]))),
    "gemma2": (transformers.Gemma2Config, dict(
        query_pre_attn_scalar=9, sliding_window=4, attn_logit_softcapping=1.5, final_logit_softcapping=4.0)),
    "gemma3_text": (transformers.Gemma3TextConfig, dict(
        query_pre_attn_scalar=9, sliding_window=4, layer_types=["sliding_attention", "full_attention"],
        rope_parameters=dict(full_attention=dict(rope_type="default", rope_theta=100.0),
                             sliding_attention=dict(rope_type="default", rope_theta=10000.0)))),
}


def parts_of(kind):
    """The parameters of a layer in the order of their numbers, as if no projection were fused."""
    attention, mlp = ([f"{l}.weight" for l in part] for part in (LINEARS[:4], LINEARS[4:]))
    norm = lambda name: [f"{name}.weight"]
    if kind == "olmo2":
        parts = [*attention, *norm("post_attention_layernorm"), *mlp, *norm("post_feedforward_layernorm")]
    elif kind.startswith("gemma"):
        parts = [*norm("input_layernorm"), *attention, *norm("post_attention_layernorm"),
                 *norm("pre_feedforward_layernorm"), *mlp, *norm("post_feedforward_layernorm")]
    else:
        parts = [*norm("input_layernorm"), *attention, *norm("post_attention_layernorm"), *mlp]
    if kind == "qwen2":
        parts += [f"self_attn.{p}_proj.bias" for p in "qkv"]
    if kind in ("qwen3", "olmo2", "gemma3_text"):
        parts += ["self_attn.q_norm.weight", "self_attn.k_norm.weight"]
    return parts


def shape_of(name, parameters, config):
    """The shape of a parameter, or of a part of a fused one."""
    if name in parameters:
        return parameters[name].shape
    rows = {"q": config.num_attention_heads * 4, "k": config.num_key_value_heads * 4, "v": config.num_key_value_heads * 4}
    return (rows.get(name.split(".")[-2][0], config.intermediate_size), config.hidden_size)


def tiny(kind):
    common = dict(vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
                  num_key_value_heads=2, head_dim=4, max_position_embeddings=64, rms_norm_eps=1e-5,
                  rope_theta=10000.0, tie_word_embeddings=kind not in UNTIED, attn_implementation="eager",
                  pad_token_id=0)
    config, own = KINDS[kind]
    if "rope_parameters" in own:
        common.pop("rope_theta")
    model = transformers.AutoModelForCausalLM.from_config(config(**common, **own)).float()
    names = ["model.embed_tokens.weight"]
    names += [f"model.layers.{layer}.{part}" for layer in range(2) for part in parts_of(kind)]
    names += ["model.norm.weight"] + (["lm_head.weight"] if kind in UNTIED else [])
    parameters = dict(model.named_parameters())
    values = {}
    for number, name in enumerate(names):
        norm = "norm" in name
        # Gemma stores what its norms add to 1.
        offset = 1.0 if norm and not kind.startswith("gemma") else 0.0
        values[name] = hashed(number, shape_of(name, parameters, model.config), 0.2 if norm else 0.5, offset)
    if kind == "phi3":
        for layer in range(2):
            for fused, linears in FUSED.items():
                pieces = [values.pop(f"model.layers.{layer}.{linear}.weight") for linear in linears]
                values[f"model.layers.{layer}.{fused}.weight"] = torch.cat(pieces)
    assert set(parameters) == set(values), set(parameters) ^ set(values)
    for name, value in values.items():
        assert parameters[name].shape == value.shape, name
        parameters[name].data = value
    groups = [
        dict(prompt=[3, 17, 42, 5, 9], completions=[[7, 1, 30, 2], [11], [40, 41, 8, 8, 25, 2]]),
        dict(prompt=[20, 33, 4], completions=[[6, 46, 2], [13, 0]]),
    ]
    return model, groups


# Ranks and alphas of their own for some modules, by PEFT's patterns.
PATTERNS = {
    "qwen3": (dict(down_proj=6, **{"layers.1.self_attn.q_proj": 2}), dict(up_proj=3)),
    "phi3": (dict(qkv_proj=3), {"layers.0.mlp.gate_up_proj": 5}),
}


def with_lora(model, rank, alpha, rslora):
    ranks, alphas = PATTERNS.get(model.config.model_type, ({}, {}))
    linears = LINEARS
    if model.config.model_type == "phi3":
        linears = ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"]
    names = [l.split(".")[1] for l in linears]
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=names,
                                             use_rslora=rslora, rank_pattern=ranks, alpha_pattern=alphas,
                                             task_type="CAUSAL_LM"))
    parameters = dict(model.named_parameters())
    number, lora = 1000, {}
    for layer in range(model.config.num_hidden_layers):
        for linear in linears:
            for factor in "AB":
                key = f"base_model.model.model.layers.{layer}.{linear}.lora_{factor}.weight"
                parameter = parameters[key.replace(".weight", ".default.weight")]
                # B as small as after some training, so that the gradient of A is not zero.
                scale = 1.0 / parameter.shape[1] ** 0.5 if factor == "A" else 0.02
                parameter.data = hashed(number, parameter.shape, scale)
                lora[key] = parameter
                number += 1
    assert len(lora) == sum(p.requires_grad for p in model.parameters())
    return model, lora


def logprobs(model, groups):
    found = []
    for group in groups:
        for completion in group["completions"]:
            ids = torch.tensor([group["prompt"] + completion])
            logits = model(input_ids=ids).logits[0, len(group["prompt"]) - 1 : -1].float()
            found.append(torch.log_softmax(logits, -1).gather(1, torch.tensor(completion)[:, None])[:, 0])
    return found


def loss_of(found):
    return -sum(f.mean() for f in found) / len(found)


def rate(step):
    warmup = min(WARMUP, STEPS - 1)
    return (step + 1) / (warmup + 1) if step < warmup else (STEPS - step) / max(STEPS - warmup, 1)


def sample(values, full):
    """All values of a small tensor, or 4 spread ones."""
    flat = values.detach().flatten()
    return [float(v) for v in (flat if full else flat[:: len(flat) // 4][:4])]


def golden(model, groups, rank, alpha, rslora, full):
    model, lora = with_lora(model, rank, alpha, rslora)
    found = logprobs(model, groups)
    loss = loss_of(found)
    loss.backward()
    ranks, alphas = PATTERNS.get(model.config.model_type, ({}, {}))
    result = dict(rank=rank, alpha=alpha, use_rslora=rslora, rank_pattern=ranks, alpha_pattern=alphas, groups=groups, loss=float(loss.detach()),
                  logprobs=[[float(v) for v in f.detach()] for f in found],
                  gradients={k: dict(norm=float(p.grad.norm()), values=sample(p.grad, full)) for k, p in lora.items()},
                  training=dict(learning_rate=RATE, warmup_steps=WARMUP, steps=STEPS, weight_decay=DECAY, max_grad_norm=CLIP))
    optimizer = torch.optim.AdamW(lora.values(), lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    losses, norms = [], []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(logprobs(model, groups))
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(lora.values(), CLIP)))
        losses.append(float(loss.detach()))
        optimizer.step()
        schedule.step()
    final = {k: dict(norm=float(p.norm()), values=sample(p, full)) for k, p in lora.items()}
    return result | dict(losses=losses, grad_norms=norms, final=final)


def rounded(value):
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return {k: rounded(v) for k, v in value.items()} if isinstance(value, dict) else value


def write(path, result):
    path.write_text(json.dumps(rounded(result), separators=(",", ":")) + "\n")
    print(path, path.stat().st_size, "loss", result["losses"][0], "->", result["losses"][-1])


def main():
    if sys.argv[1] == "tiny":
        for kind in sys.argv[2:] or KINDS:
            made = golden(*tiny(kind), rank=4, alpha=8, rslora=kind == "qwen3", full=True)
            write(GOLDEN / f"training_{kind}.json", made)
        return
    model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype=torch.float32)
    groups = [
        dict(prompt=list(range(100, 124)), completions=[list(range(300, 312)), list(range(5000, 5020, 2))]),
        dict(prompt=list(range(2000, 2040, 5)), completions=[[28, 198, 2], [7042]]),
    ]
    global RATE
    RATE = 2e-4
    write(GOLDEN / "training_smollm2.json", golden(model, groups, rank=16, alpha=32, rslora=False, full=False))


main()
