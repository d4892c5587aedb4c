"""Writes a GGUF of a named Llama shape with random Q4_0 weights: the memory and the time of training do not ask what they are.

    python tools/bench/large_gguf.py 7b /tmp/7b.gguf

Needs the packages gguf and numpy (`tools/setup.sh full`). One tensor is in memory at a time.
"""

import sys

import gguf
import numpy as np

# layers, hidden, intermediate, heads, key-value heads, vocabulary
SHAPES = {
    "1b": (16, 2048, 8192, 32, 8, 32000),
    "3b": (28, 3072, 8192, 24, 8, 32000),
    "7b": (32, 4096, 11008, 32, 32, 32000),
}
BLOCK = np.dtype([("scale", "<f2"), ("values", "u1", 16)])


def blocks(rng, rows, columns):
    """Q4_0 blocks of 32 values each, of a standard deviation of about 0.02."""
    made = np.zeros(rows * columns // 32, BLOCK)
    made["scale"] = 0.02 / 4.6
    made["values"] = rng.integers(0, 256, (len(made), 16), np.uint8)
    return made.view(np.uint8).reshape(rows, columns // 32 * BLOCK.itemsize)


def main():
    layers, hidden, wide, heads, kv_heads, vocab = SHAPES[sys.argv[1]]
    kv = hidden // heads * kv_heads
    writer = gguf.GGUFWriter(sys.argv[2], "llama")
    writer.add_block_count(layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(wide)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    letters = [chr(c) for c in range(33, 127)] + ["\u0120", "ab"]
    tokens = ["<s>", "</s>"] + letters
    tokens += [f"<unused{i}>" for i in range(vocab - len(tokens))]
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (vocab - 2))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    matrices = [("token_embd", vocab, hidden)]
    for layer in range(layers):
        parts = dict(attn_q=(hidden, hidden), attn_k=(kv, hidden), attn_v=(kv, hidden), attn_output=(hidden, hidden),
                     ffn_gate=(wide, hidden), ffn_up=(wide, hidden), ffn_down=(hidden, wide))
        matrices += [(f"blk.{layer}.{name}", *shape) for name, shape in parts.items()]
    matrices.append(("output", vocab, hidden))
    norms = [f"blk.{layer}.{name}" for layer in range(layers) for name in ("attn_norm", "ffn_norm")] + ["output_norm"]
    for name, rows, columns in matrices:
        size = rows * columns // 32 * BLOCK.itemsize
        shape = (rows, columns // 32 * BLOCK.itemsize)
        writer.add_tensor_info(f"{name}.weight", shape, np.dtype(np.uint8), size, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    for name in norms:
        writer.add_tensor_info(f"{name}.weight", (hidden,), np.dtype(np.float32), 4 * hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(0)
    for _, rows, columns in matrices:
        writer.write_tensor_data(blocks(rng, rows, columns))
    for _ in norms:
        writer.write_tensor_data(np.ones(hidden, np.float32))
    writer.close()
    print(sys.argv[2], sum(rows * columns for _, rows, columns in matrices) / 1e9, "billion weights")


main()
