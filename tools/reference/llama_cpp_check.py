"""Lets llama.cpp answer greedily with an adapter, for comparison with our log-probs of the same answers.

    python tools/reference/llama_cpp_check.py MODEL.gguf ADAPTER.gguf < prompts.json

prompts.json is [[ids], ...]. Prints one line for each: {"ids": [...], "logprobs": [...]}, log-probs at temperature 1.
"""

import json
import sys
import urllib.request

import xllamacpp

params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.n_ctx = 1024
adapter = xllamacpp.CommonAdapterLoraInfo()
adapter.path = sys.argv[2]
adapter.scale = 1.0
params.lora_adapters = [adapter]
server = xllamacpp.Server(params)
for prompt in json.load(sys.stdin):
    body = {"prompt": prompt, "n_predict": 16, "temperature": 0.0, "n_probs": 1, "return_tokens": True, "ignore_eos": True}
    request = urllib.request.Request(
        server.listening_address + "/completion", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        told = json.load(answer)
    probabilities = told["completion_probabilities"]
    # Tokens that are a part of a character only are told together; such answers cannot be compared.
    assert [p["id"] for p in probabilities] == told["tokens"], "the answer holds parts of characters"
    found = {"ids": [p["id"] for p in probabilities], "logprobs": [p["logprob"] for p in probabilities]}
    print(json.dumps(found), flush=True)
