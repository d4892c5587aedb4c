"""Writes the safetensors form of a llama GGUF with a gpt2 tokenizer: a folder in Hugging Face layout, f32.

    python gguf_to_hf.py MODEL.gguf OUT

The values are those of the GGUF, dequantised, with the query and key rows in Hugging Face's order, so that
transformers, PEFT and vLLM compute with exactly the weights that taod reads from the GGUF.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def field(reader, key, default=None):
    found = reader.get_field(key)
    return default if found is None else found.contents()


def hf_name(name):
    stem, kind = name.rsplit(".", 1)
    if stem.startswith("blk."):
        _, layer, part = stem.split(".")
        return f"model.layers.{layer}.{IN_LAYER[part]}.{kind}"
    return f"{TOP[stem]}.{kind}"


def unpermute(rows, heads):
    """Undoes llama.cpp's reshape(heads, 2, d / 2, ..).swapaxes(1, 2)."""
    return rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def tensors(reader, heads, kv_heads):
    out = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        values = values.reshape([int(n) for n in reversed(tensor.shape)])
        if ".attn_q." in tensor.name:
            values = unpermute(values, heads)
        if ".attn_k." in tensor.name:
            values = unpermute(values, kv_heads)
        out[hf_name(tensor.name)] = torch.from_numpy(np.ascontiguousarray(values))
    return out


def tokenizer(reader):
    tokens = field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(m.split(" ")) for m in field(reader, "tokenizer.ggml.merges")]
    made = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    made.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    made.decoder = decoders.ByteLevel()
    kinds = field(reader, "tokenizer.ggml.token_type")
    made.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, k in zip(tokens, kinds) if k == 3])
    return made, tokens


def main(source, out):
    reader = GGUFReader(source)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    get = lambda key, default=None: field(reader, f"llama.{key}", default)
    heads = get("attention.head_count")
    kv_heads = get("attention.head_count_kv", heads)
    weights = tensors(reader, heads, kv_heads)
    made, tokens = tokenizer(reader)
    eos, bos = field(reader, "tokenizer.ggml.eos_token_id"), field(reader, "tokenizer.ggml.bos_token_id")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(tokens),
        "hidden_size": get("embedding_length"),
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "rope_theta": get("rope.freq_base"),
        "max_position_embeddings": get("context_length"),
        "tie_word_embeddings": "lm_head.weight" not in weights,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "torch_dtype": "float32",
    }
    template = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[bos],
        "eos_token": tokens[eos],
        "chat_template": field(reader, "tokenizer.chat_template"),
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": get("context_length"),
    }
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    made.save(str(out / "tokenizer.json"))
    (out / "config.json").write_text(json.dumps(config, indent=1))
    (out / "tokenizer_config.json").write_text(json.dumps(template, indent=1))
    (out / "generation_config.json").write_text(json.dumps({"bos_token_id": bos, "eos_token_id": eos}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
