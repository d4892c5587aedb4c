"""The other side of the engine bench: what taod's users would run instead. Same protocol as engine.rs.

    engine_peer.py hf MODEL_FOLDER WORK SIZES        transformers and peft
    engine_peer.py hf|hf-sorted FOLDER classify FILE  texts padded in batches, as they come or by length
    engine_peer.py hf|trl MODEL_FOLDER raft|grpo PROMPTS SAMPLES NEW FILE    a whole iteration, the latter by TRL's GRPOTrainer
    engine_peer.py llama.cpp MODEL.gguf WORK SIZES   llama.cpp's server in this process
"""

import concurrent.futures
import json
import os
import pathlib
import sys
import tempfile
import time
import urllib.request

THREADS = len(os.sched_getaffinity(0))
# Of a whole iteration: prompts of the warm-up, prompts whose answers are drawn together, answers of a step.
WARM_UP_PROMPTS = 4
GENERATED_TOGETHER = 8
# Texts that a classifier is given together: pads cost more in larger batches, and products in smaller ones.
CLASSIFIED_TOGETHER = 8
TRAINED_TOGETHER = 8


def ids(seed, n):
    return [1000 + (seed * 104_729 + i * 7919) % 40_000 for i in range(n)]


def serve(work):
    work()
    print("ready", flush=True)
    for _ in sys.stdin:
        began = time.monotonic()
        tokens = work()
        print(json.dumps({"seconds": time.monotonic() - began, "tokens": tokens}), flush=True)


def lora():
    from peft import LoraConfig

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return LoraConfig(r=16, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM")


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
        from peft import get_peft_model

        samples, prompt, new = sizes
        model = get_peft_model(model, lora())
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


def classify(folder, file, by_length):
    """Scores texts with a reward model; the scores go beside the file."""
    import torch
    from transformers import AutoModelForSequenceClassification

    torch.set_num_threads(THREADS)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    texts = json.loads(pathlib.Path(file).read_text())
    order = sorted(range(len(texts)), key=lambda i: len(texts[i])) if by_length else range(len(texts))
    parts = [list(order)[at : at + CLASSIFIED_TOGETHER] for at in range(0, len(texts), CLASSIFIED_TOGETHER)]
    padding = model.config.pad_token_id

    def batch(part):
        longest = max(len(texts[i]) for i in part)
        rows = torch.tensor([texts[i] + [padding] * (longest - len(texts[i])) for i in part])
        lengths = torch.tensor([[len(texts[i])] for i in part])
        return rows, (torch.arange(longest) < lengths).long()

    batches = [batch(part) for part in parts]

    def score():
        with torch.no_grad():
            return torch.cat([model(rows, attention_mask=mask).logits[:, 0] for rows, mask in batches])

    scores = dict(zip((i for part in parts for i in part), score().tolist()))
    pathlib.Path(f"{file}.{'sorted' if by_length else 'hf'}").write_text(json.dumps([scores[i] for i in range(len(texts))]))
    # Pads are no work that was asked for.
    tokens = sum(map(len, texts))

    def work():
        score()
        return tokens

    serve(work)


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


def reward(ids):
    return len(set(ids)) / len(ids)


def in_turn(iterate, prompts):
    """Serves an iteration; the first, on a few prompts, warms up."""
    sizes = iter([WARM_UP_PROMPTS])
    serve(lambda: iterate(prompts[: next(sizes, len(prompts))]))


def raft(folder, prompts, samples, new):
    """The loop that one writes with transformers and PEFT: generate, score, train on the best two answers twice."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    end = model.generation_config.eos_token_id

    def padded(rows, left):
        width = max(map(len, rows))
        fill = lambda row, value: [value] * (width - len(row))
        side = (lambda row, value: fill(row, value) + row) if left else (lambda row, value: row + fill(row, value))
        return torch.tensor([side(row, 0) for row in rows]), torch.tensor([side([1] * len(row), 0) for row in rows])

    def answers(batch):
        ids, mask = padded(batch, left=True)
        with torch.no_grad():
            drawn = model.generate(
                ids,
                attention_mask=mask,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                num_return_sequences=samples,
                max_new_tokens=new,
                pad_token_id=end,
            )
        for i, row in enumerate(drawn[:, ids.shape[1] :].tolist()):
            yield batch[i // samples], row[: row.index(end) + 1] if end in row else row

    def chosen(prompts):
        # Prompts of like length together, so that little is padded.
        prompts = sorted(prompts, key=len)
        for at in range(0, len(prompts), GENERATED_TOGETHER):
            drawn = list(answers(prompts[at : at + GENERATED_TOGETHER]))
            for first in range(0, len(drawn), samples):
                group = drawn[first : first + samples]
                if len({reward(answer) for _, answer in group}) > 1:
                    yield from sorted(group, key=lambda pair: -reward(pair[1]))[:2]

    def train(adapted, pairs):
        parameters = [p for p in adapted.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=2e-4, weight_decay=0.0)
        order = torch.Generator().manual_seed(0)
        for _ in range(2):
            shuffled = [pairs[i] for i in torch.randperm(len(pairs), generator=order).tolist()]
            for at in range(0, len(shuffled), TRAINED_TOGETHER):
                batch = shuffled[at : at + TRAINED_TOGETHER]
                ids, mask = padded([prompt + answer for prompt, answer in batch], left=False)
                labels = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
                for row, (prompt, _) in enumerate(batch):
                    labels[row, : len(prompt) - 1] = -100
                logits = adapted(ids, attention_mask=mask).logits[:, :-1]
                loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
                ((loss.sum(1) / (labels != -100).sum(1)).mean()).backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad()

    def iterate(prompts):
        nonlocal model
        model.eval()
        pairs = list(chosen(prompts))
        adapted = get_peft_model(model, lora())
        adapted.train()
        train(adapted, pairs)
        with tempfile.TemporaryDirectory() as out:
            adapted.save_pretrained(out)
        model = adapted.unload()
        return len(prompts) * samples

    in_turn(iterate, prompts)


def grpo(folder, prompts, samples, new):
    """TRL's own trainer, which samples and trains by itself, with the same steps: eight answers each, all answers once."""
    import datasets
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(THREADS)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def iterate(prompts):
        texts = [tokenizer.decode(ids) for ids in prompts]
        with tempfile.TemporaryDirectory() as out:
            arguments = GRPOConfig(
                output_dir=out,
                num_generations=samples,
                max_completion_length=new,
                per_device_train_batch_size=TRAINED_TOGETHER,
                steps_per_generation=GENERATED_TOGETHER * samples // TRAINED_TOGETHER if len(prompts) >= GENERATED_TOGETHER else 1,
                num_train_epochs=1,
                learning_rate=2e-4,
                temperature=1.0,
                top_k=0,
                beta=0.0,
                loss_type="grpo",
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                save_strategy="no",
                report_to="none",
                logging_strategy="no",
                disable_tqdm=True,
            )
            trainer = GRPOTrainer(
                model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
                reward_funcs=lambda completion_ids, **_: [reward(ids) for ids in completion_ids],
                args=arguments,
                train_dataset=datasets.Dataset.from_dict({"prompt": texts}),
                processing_class=tokenizer,
                peft_config=lora(),
            )
            trainer.train()
            trainer.save_model(out)
        return len(prompts) * samples

    in_turn(iterate, prompts)


ITERATIONS = {("hf", "raft"): raft, ("trl", "grpo"): grpo}

if __name__ == "__main__":
    peer, model, work, *numbers = sys.argv[1:]
    if (peer, work) in ITERATIONS:
        count, samples, new, file = numbers
        ITERATIONS[peer, work](model, json.loads(pathlib.Path(file).read_text())[: int(count)], int(samples), int(new))
    elif work == "classify":
        classify(model, numbers[0], peer == "hf-sorted")
    else:
        {"hf": hf, "llama.cpp": llama_cpp}[peer](model, work, [int(n) for n in numbers])
