"""Computes with transformers and PEFT, f32 on the CPU, what taod's engine must compute.

    python engine_golden.py [--model MODEL.gguf] [NAME ...]

Writes tiny random models (tests/fixtures/models/) with an adapter each, and for them the expected numbers
(tests/golden/engine_<name>.json): all of them, or those named. With --model also the numbers of a real model, through
its safetensors form. A variant is the model of another name with some settings of its config.json changed.
The random models are written once: a run that finds them computes with what it finds.
"""

import argparse
import json
import tempfile
from pathlib import Path

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer

import gguf_to_hf

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests" / "fixtures" / "models"
GOLDEN = ROOT / "tests" / "golden"
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = """{%- if tools %}
    {{- '<|im_start|>tools\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set text = message['content'].strip() %}
    {%- else %}
        {%- set text = '' %}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + text + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
CORPUS = [
    "The engine reads a prompt once and samples many answers from it.",
    "A gate compares the new adapter with the old one on prompts that neither has seen.",
    "Answers in three bullet points, in lower case, with at most 160 characters.",
    "What is the capital of France? The capital of France is Paris, of course.",
]
CONVERSATIONS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "system", "content": "You answer in lower case."},
        {"role": "user", "content": "Name 3 uses of a brick (2024), naïvely: 你好 \n  please."},
        {"role": "assistant", "content": "a wall."},
        {"role": "user", "content": " And another? "},
    ],
]
TOOLS = [{"type": "function", "function": {"name": "look_up", "description": "it's <fast> & \"exact\"", "parameters": {}}}]
ANSWERS = ["The capital of France is Paris.", "a door stop, or a weight for paper."]
LIMIT = 24

COMMON = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=512, hidden_act="silu", rms_norm_eps=1e-5,
)
LLAMA3 = dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)


# Every window is shorter than every prompt.
WINDOW = 9
GEMMA = dict(
    {k: v for k, v in COMMON.items() if k != "hidden_act"}, hidden_activation="gelu_pytorch_tanh", head_dim=20,
    query_pre_attn_scalar=24, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"],
)
NAMES = ["tiny-llama", "tiny-qwen2", "tiny-qwen3", "tiny-mistral", "tiny-smollm3", "tiny-olmo2", "tiny-phi3",
         "tiny-gemma2", "tiny-gemma3"]
VARIANTS = {
    "tiny-qwen2-sliding": ("tiny-qwen2", dict(use_sliding_window=True, sliding_window=WINDOW,
                                              layer_types=["full_attention", "sliding_attention"])),
    "tiny-qwen3-yarn": ("tiny-qwen3", dict(rope_parameters=dict(
        rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=64))),
}


def config(name, vocab):
    ends = dict(vocab_size=vocab, bos_token_id=0, eos_token_id=2, pad_token_id=0)
    if name == "tiny-mistral":
        return transformers.MistralConfig(**COMMON, **ends, head_dim=16, sliding_window=WINDOW)
    if name == "tiny-smollm3":
        return transformers.SmolLM3Config(**COMMON, **ends, no_rope_layer_interval=2)
    if name == "tiny-olmo2":
        return transformers.Olmo2Config(**COMMON, **ends)
    if name == "tiny-phi3":
        factors = [1.0, 1.1, 1.3, 1.6, 2.0, 2.5]
        rope = dict(rope_type="longrope", rope_theta=10000.0, partial_rotary_factor=0.75, short_factor=factors,
                    long_factor=[4 * f for f in factors])
        return transformers.Phi3Config(**COMMON, **ends, original_max_position_embeddings=400, rope_parameters=rope,
                                       sliding_window=40)
    if name == "tiny-gemma2":
        return transformers.Gemma2Config(**GEMMA, **ends, attn_logit_softcapping=4.0, final_logit_softcapping=6.0)
    if name == "tiny-gemma3":
        rope = dict(full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1000000.0),
                    sliding_attention=dict(rope_type="default", rope_theta=10000.0))
        return transformers.Gemma3TextConfig(**GEMMA, **ends, rope_parameters=rope)
    ends.pop("pad_token_id")
    if name == "tiny-llama":
        rope = dict(LLAMA3, rope_theta=10000.0)
        return transformers.LlamaConfig(**COMMON, **ends, tie_word_embeddings=True, rope_parameters=rope)
    if name == "tiny-qwen2":
        return transformers.Qwen2Config(**COMMON, **ends, tie_word_embeddings=True)
    return transformers.Qwen3Config(**COMMON, **ends, head_dim=20, tie_word_embeddings=False)


def tiny_tokenizer():
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = [AddedToken(t, special=True, normalized=False) for t in SPECIAL]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    return made


def make_tiny(name, folder):
    folder.mkdir(parents=True)
    tokenizer = tiny_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SPECIAL[0], "eos_token": SPECIAL[2],
        "chat_template": TEMPLATE, "model_max_length": 512, "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(described, indent=1))
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config(name, tokenizer.get_vocab_size()), dtype=torch.float32)
    with torch.no_grad():
        for key, value in model.named_parameters():
            # Gemma stores what its norms add to 1.
            value.normal_(1.0 if "norm" in key and "gemma" not in name else 0.0, 0.15)
    # Half the size on disk; read back, the same f32 values on both sides.
    model.to(torch.bfloat16).save_pretrained(folder)


def make_adapter(model, folder, rslora):
    torch.manual_seed(8)
    fused = "phi3" in folder.name
    spec = LoraConfig(r=4, lora_alpha=8, target_modules=FUSED if fused else LINEAR, task_type="CAUSAL_LM",
                      use_rslora=rslora, rank_pattern={"down_proj": 2},
                      alpha_pattern={"gate_up_proj" if fused else "up_proj": 4})
    adapted = get_peft_model(model, spec)
    with torch.no_grad():
        for key, value in adapted.named_parameters():
            if "lora_" in key:
                value.normal_(0.0, 0.05)
    # PEFT would record where the model lay on the machine that ran this.
    adapted.peft_config["default"].base_model_name_or_path = folder.name.removesuffix("-lora")
    adapted.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    return adapted.unload()


def log_softmax(model, prompt, completion):
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0].float()
    return logits, torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]


def picked(rows, completion):
    return [row[token].item() for row, token in zip(rows, completion)]


def greedy(model, prompt, ends):
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(LIMIT):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in ends:
                break
    return ids[len(prompt) :]


def load(folder, **changed):
    # Of the ways to compute attention only this one applies Gemma 2's cap on scores.
    eager = dict(dtype=torch.float32, attn_implementation="eager")
    return AutoModelForCausalLM.from_pretrained(folder, **eager, **changed).eval()


def cases(folder, adapter, changed):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = load(folder, **changed)
    out = []
    for messages, answer, tools in zip(CONVERSATIONS, ANSWERS, [None, TOOLS]):
        text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer.encode(text, add_special_tokens=False)
        completion = tokenizer.encode(answer, add_special_tokens=False) + [tokenizer.eos_token_id]
        logits, rows = log_softmax(model, prompt, completion)
        case = {
            "messages": messages, "tools": tools, "prompt_text": text, "prompt_ids": prompt, "answer": answer,
            "completion_ids": completion, "logits": logits[len(prompt) - 1, :256].tolist(),
            "logprobs": picked(rows, completion), "greedy": greedy(model, prompt, [tokenizer.eos_token_id]),
        }
        if adapter:
            adapted = PeftModel.from_pretrained(model, adapter).eval()
            _, new = log_softmax(adapted, prompt, completion)
            case["adapter_logprobs"] = picked(new, completion)
            case["divergence"] = (new.exp() * (new - rows)).sum(-1).tolist()
            model = adapted.unload()
        out.append(case)
    return out


def write(name, folder, adapter, changed={}):
    versions = {m.__name__: m.__version__ for m in (torch, transformers, peft)}
    document = {"script": "tools/reference/engine_golden.py", "versions": versions, "changed": changed,
                "cases": cases(folder, adapter, changed)}
    GOLDEN.mkdir(parents=True, exist_ok=True)
    path = GOLDEN / f"engine_{name}.json"
    path.write_text(json.dumps(document, ensure_ascii=False) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a llama GGUF, such as SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("names", nargs="*", metavar="NAME", help="of a tiny model or a variant; default: all")
    options = parser.parse_args()
    wanted = options.names or [*NAMES, *VARIANTS]
    for name in wanted:
        base, changed = VARIANTS.get(name, (name, {}))
        folder, adapter = FIXTURES / base, FIXTURES / f"{base}-lora"
        if not folder.exists():
            make_tiny(base, folder)
            make_adapter(load(folder), adapter, rslora=base == "tiny-qwen3")
        write(name, folder, adapter, changed)
    if options.model:
        with tempfile.TemporaryDirectory() as folder:
            gguf_to_hf.main(options.model, folder)
            write(Path(options.model).name.split(".")[0].lower(), folder, None)


if __name__ == "__main__":
    main()
