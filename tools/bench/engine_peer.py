"""The other side of the engine bench: what taod's users would run instead. Same protocol as engine.rs.

    engine_peer.py hf MODEL_FOLDER WORK SIZES        transformers and peft
    engine_peer.py llama.cpp MODEL.gguf WORK SIZES   llama.cpp's server in this process
"""

import concurrent.futures
import json
import os
import sys
import time
import urllib.request

THREADS = len(os.sched_getaffinity(0))


def ids(seed, n):
    return [1000 + (seed * 104_729 + i * 7919) % 40_000 for i in range(n)]


def serve(work):
    work()
    print("ready", flush=True)
    for _ in sys.stdin:
        began = time.monotonic()
        tokens = work()
        print(json.dumps({"seconds": time.monotonic() - began, "tokens": tokens}), flush=True)


def hf(folder, work, sizes):
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if work == "generate":
        prompts, samples, prompt, new = sizes
        batch = torch.tensor([ids(p, prompt) for p in range(prompts)])

        def generate():
            with torch.no_grad():
                model.generate(
                    batch,
                    attention_mask=torch.ones_like(batch),
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    num_return_sequences=samples,
                    min_new_tokens=new,
                    max_new_tokens=new,
                    pad_token_id=0,
                )
            return prompts * samples * new

        serve(generate)
    elif work == "logprobs":
        groups, samples, prompt, new = sizes
        rows = [ids(a // samples, prompt) + ids(1000 + a, new) for a in range(groups * samples)]
        batches = [torch.tensor(rows[at : at + samples]) for at in range(0, len(rows), samples)]

        def score():
            count = 0
            with torch.no_grad():
                for batch in batches:
                    # Only the logits that are needed, as TRL does.
                    logits = model(batch, logits_to_keep=new + 1).logits[:, :-1]
                    chosen = torch.gather(logits, 2, batch[:, prompt:, None]).squeeze(2)
                    count += (chosen - torch.logsumexp(logits, 2)).numel()
            return count

        serve(score)
    elif work == "step":
        from peft import LoraConfig, get_peft_model

        samples, prompt, new = sizes
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM"))
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, weight_decay=0.0)
        batch = torch.tensor([ids(0, prompt) + ids(1000 + a, new) for a in range(samples)])

        def step():
            logits = model(batch, logits_to_keep=new + 1).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, prompt:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return samples * (prompt + new)

        serve(step)
    else:
        sys.exit(f"transformers does not do {work}")


def llama_cpp(gguf, work, sizes):
    import xllamacpp

    prompts, samples, prompt, new = sizes
    parallel = prompts * samples
    params = xllamacpp.CommonParams()
    params.model.path = gguf
    params.n_ctx = parallel * (prompt + new + 16)
    params.n_parallel = parallel
    params.cpuparams.n_threads = THREADS
    params.cpuparams_batch.n_threads = THREADS
    server = xllamacpp.Server(params)
    url = server.listening_address + "/completion"
    seed, rounds = iter(range(10**9)), iter(range(10**9))

    def ask(p):
        body = {"prompt": ids(p, prompt), "n_predict": new, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        body |= {"ignore_eos": True, "seed": next(seed), "cache_prompt": True}
        request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=3600) as answer:
            return json.load(answer)["tokens_predicted"]

    with concurrent.futures.ThreadPoolExecutor(parallel) as pool:
        # New prompts each time: it remembers those it has read.
        def generate():
            first = next(rounds) * prompts
            return sum(pool.map(ask, [p for p in range(first, first + prompts) for _ in range(samples)]))

        serve(generate)


if __name__ == "__main__":
    peer, model, work, *numbers = sys.argv[1:]
    {"hf": hf, "llama.cpp": llama_cpp}[peer](model, work, [int(n) for n in numbers])
