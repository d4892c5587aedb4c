"""Scores conversations with a sequence-classification model in transformers and prints one score a line.

    python tools/reference/reward_check.py MODEL_DIR < conversations.json

conversations.json is [[{"role", "content"}, ...], ...]. All go through one padded batch, so that the padding id in the
config is put to the test too. Computed in float32.
"""

import json
import sys

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

torch.set_num_threads(1)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], dtype=torch.float32, attn_implementation="eager")
model.eval()
ids = []
for messages in json.load(sys.stdin):
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    if tokenizer.bos_token and text.startswith(tokenizer.bos_token):
        text = text[len(tokenizer.bos_token):]
    ids.append(tokenizer(text)["input_ids"])
width = max(map(len, ids))
padding = model.config.pad_token_id
batch = torch.tensor([row + [padding] * (width - len(row)) for row in ids])
mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids])
with torch.no_grad():
    for score in model(input_ids=batch, attention_mask=mask).logits[:, 0]:
        print(score.item())
