"""Lets mistral.rs answer greedily with an adapter, for comparison with our log-probs of the same answers.

    python tools/reference/mistralrs_check.py MODEL_DIR ADAPTER_DIR < questions.json

MODEL_DIR is in Hugging Face layout; questions.json is ["...", ...]. Prints one line for each: {"text": "...", "logprobs": [...]},
12 tokens from the base; then the same questions, answered by the adapter.
"""

import json
import sys

from mistralrs import Architecture, ChatCompletionRequest, ModelDType, Runner, Which

model = Which.Lora(model_id=sys.argv[1], arch=Architecture.Llama, dtype=ModelDType.F32)
runner = Runner(which=model, no_paged_attn=True)
runner.load_lora_adapter("taod", sys.argv[2])
questions = json.load(sys.stdin)
for adapter in (None, "taod"):
    for question in questions:
        request = ChatCompletionRequest(
            messages=[{"role": "user", "content": question}],
            model="default",
            temperature=0.0,
            max_tokens=12,
            logprobs=True,
            adapter=adapter,
        )
        choice = runner.send_chat_completion_request(request).choices[0]
        # The message is trimmed, the tokens are not.
        told = choice.logprobs.content
        found = {"text": "".join(p.token for p in told), "logprobs": [p.logprob for p in told]}
        print(json.dumps(found), flush=True)
