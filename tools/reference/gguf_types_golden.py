"""Writes tests/golden/gguf_types.gguf and .json: one tensor of each GGUF type, and its values by the gguf package.

The blocks are random bytes with finite scales, so that every bit of every field matters. Run with the environment of
tools/reference.txt: python tools/reference/gguf_types_golden.py
"""

import json
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter
from gguf.quants import dequantize

ROWS, COLUMNS = 2, 256
# Bytes of a block, its elements, and where its 16-bit floats lie.
BLOCKS = {
    Type.Q4_0: (18, 32, [0]),
    Type.Q4_1: (20, 32, [0, 2]),
    Type.Q8_0: (34, 32, [0]),
    Type.Q4_K: (144, 256, [0, 2]),
    Type.Q5_K: (176, 256, [0, 2]),
    Type.Q6_K: (210, 256, [208]),
    Type.Q5_0: (22, 32, [0]),
    Type.Q5_1: (24, 32, [0, 2]),
    Type.Q2_K: (84, 256, [80, 82]),
    Type.Q3_K: (110, 256, [108]),
    Type.BF16: (2, 1, []),
}


def raw(kind, rng):
    """Returns the bytes of a tensor, a row of blocks for each row."""
    if kind in (Type.F32, Type.F16):
        return rng.normal(size=(ROWS, COLUMNS)).astype(np.float32 if kind == Type.F32 else np.float16)
    size, elements, floats = BLOCKS[kind]
    if kind == Type.BF16:
        values = rng.normal(size=(ROWS, COLUMNS)).astype(np.float32)
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8).reshape(ROWS, -1)
    blocks = rng.integers(0, 256, size=(ROWS * COLUMNS // elements, size), dtype=np.uint8)
    for at in floats:
        scales = rng.uniform(0.001, 0.05, size=len(blocks)).astype(np.float16)
        blocks[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(ROWS, -1)


def main():
    rng = np.random.default_rng(5)
    folder = Path(__file__).resolve().parents[2] / "tests/golden"
    writer = GGUFWriter(str(folder / "gguf_types.gguf"), "llama")
    values = {}
    for kind in [Type.F32, Type.F16, *BLOCKS]:
        data = raw(kind, rng)
        plain = kind in (Type.F32, Type.F16)
        writer.add_tensor(kind.name, data, raw_dtype=None if plain else kind)
        read = data.astype(np.float32) if plain else dequantize(data, kind)
        values[kind.name] = [float(f"{value:.9g}") for value in read.reshape(-1)]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (folder / "gguf_types.json").write_text(json.dumps(values) + "\n")


main()
