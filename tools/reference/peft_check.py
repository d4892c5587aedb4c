"""Loads an adapter with peft and prints log-probs of completions under it, for comparison with ours.

    python tools/reference/peft_check.py MODEL_DIR ADAPTER_DIR < groups.json

MODEL_DIR is in Hugging Face layout; groups.json is [{"prompt": [ids], "completions": [[ids], ...]}, ...]. Prints one
JSON list of log-probs per completion, a line each, computed in float32.
"""

import json
import sys

import torch
import transformers
from peft import PeftModel

model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
model = PeftModel.from_pretrained(model, sys.argv[2])
model.eval()
with torch.no_grad():
    for group in json.load(sys.stdin):
        for completion in group["completions"]:
            ids = torch.tensor([group["prompt"] + completion])
            logits = model(input_ids=ids).logits[0, len(group["prompt"]) - 1 : -1].float()
            found = torch.log_softmax(logits, -1).gather(1, torch.tensor(completion)[:, None])[:, 0]
            print(json.dumps([float(v) for v in found]))
