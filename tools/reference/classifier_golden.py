"""Scores of sequence-classification models in transformers, for tests/golden/classifier.json.

For each supported family a tiny model with random weights is made once under tests/fixtures/models/reward-NAME (it is kept
when it is there), with a tokenizer that has the family's special tokens. Decoders read conversations in a chat template;
encoders read (question, answer) pairs. Each text is scored alone, so that transformers pads nothing; the batch of the
tests is of unequal lengths.

    $HOME/.cache/taod/reference/bin/python tools/reference/classifier_golden.py [NAME ...]
"""

import argparse
import json
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import engine_golden as engine

torch.set_num_threads(1)
GOLDEN = engine.GOLDEN / "classifier.json"
SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
DECODER = dict(SMALL, num_key_value_heads=2, max_position_embeddings=512, rms_norm_eps=1e-5, num_labels=1)
ENCODER = dict(SMALL, max_position_embeddings=200, num_labels=1, hidden_act="gelu")
CORPUS = engine.CORPUS + ["Why is the sky blue? Because air scatters blue light more than red light."]
LONG = " ".join(f"Sentence {i} says that the brick number {i} is red." for i in range(12))
CONVERSATIONS = engine.CONVERSATIONS + [[{"role": "user", "content": LONG}]]
ANSWERS = ["The capital of France is Paris.", "a door stop, or a weight for paper.", "Yes.", "naïve 你好 answer", ""]
# Longer than the buckets of DeBERTa and the window of ModernBERT, and than what the models read.
PAIRS = [
    ["What is the capital of France?", "The capital of France is Paris."],
    ["Why?", LONG[:160]],
    [LONG, "Yes."],
    [LONG, LONG],
    ["Why is the sky blue?", ""],
    ["Naïve 你好?", "It is <fast> & \"exact\"."],
]


def bpe(special, pattern):
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    made.post_processor = pattern(made)
    return made


def template(single, pair):
    def processor(made):
        special = [(t, made.token_to_id(t)) for t in ("[CLS]", "[SEP]")]
        return processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)

    return processor


def word_piece():
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False))
    made.post_processor = template("[CLS] $A [SEP]", "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1")(made)
    return made


def unigram():
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=200, special_tokens=special, unk_token="[UNK]", show_progress=False))
    made.post_processor = template("[CLS] $A [SEP]", "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1")(made)
    return made


def roberta_processor(made):
    ids = {t: made.token_to_id(t) for t in ("<s>", "</s>")}
    return processors.RobertaProcessing(("</s>", ids["</s>"]), ("<s>", ids["<s>"]), add_prefix_space=False)


def decoder_tokenizer(name):
    made = engine.tiny_tokenizer()
    if name == "llama":
        # Llama's puts its opening token before a text; the template writes it too.
        bos = engine.SPECIAL[0]
        made.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, made.token_to_id(bos))])
    return made


def make(name):
    """Returns the tokenizer, what describes it, and the config of a family's tiny model."""
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, "clean_up_tokenization_spaces": False}
    if name in DECODERS:
        made = decoder_tokenizer(name)
        opening = "{{ bos_token }}" if name == "llama" else ""
        described |= {"bos_token": engine.SPECIAL[0], "eos_token": engine.SPECIAL[2], "pad_token": engine.SPECIAL[0],
                      "chat_template": opening + engine.TEMPLATE}
        if name == "gemma2":
            # No system turns, as Gemma's own says.
            refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
            described["chat_template"] = refusal + engine.TEMPLATE
        # The template closes an answer with <|im_end|>: Mistral's ends there, and pads with it, so that it is passed over.
        if name == "mistral":
            described["chat_template"] = described["chat_template"].replace("<|im_end|>\\n", "<|im_end|>")
        pad = made.token_to_id(engine.SPECIAL[2] if name == "mistral" else engine.SPECIAL[0])
        return made, described, DECODERS[name](made.get_vocab_size(), dict(pad_token_id=pad, bos_token_id=0, eos_token_id=2))
    if name in ("bert", "deberta-v2", "deberta-v3"):
        made = word_piece() if name == "bert" else unigram()
        described |= {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]",
                      "model_input_names": ["input_ids", "token_type_ids", "attention_mask"], "model_max_length": 160}
    elif name == "roberta":
        made = bpe(["<s>", "<pad>", "</s>", "<unk>", "<mask>"], roberta_processor)
        described |= {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "pad_token": "<pad>",
                      "model_input_names": ["input_ids", "attention_mask"], "model_max_length": 198}
    else:
        made = bpe(["[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]"], template("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]"))
        described |= {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]",
                      "model_input_names": ["input_ids", "attention_mask"], "model_max_length": 198}
    return made, described, ENCODERS[name](made.get_vocab_size(), made)


def gemma2(vocab, ends):
    small = {k: v for k, v in DECODER.items()}
    return transformers.Gemma2Config(
        **small, **ends, vocab_size=vocab, head_dim=12, query_pre_attn_scalar=24, sliding_window=9,
        layer_types=["sliding_attention", "full_attention"], attn_logit_softcapping=4.0, final_logit_softcapping=6.0)


DECODERS = {
    "llama": lambda v, ends: transformers.LlamaConfig(**DECODER, **ends, vocab_size=v, rope_parameters=dict(engine.LLAMA3, rope_theta=1e4)),
    "mistral": lambda v, ends: transformers.MistralConfig(**DECODER, **ends, vocab_size=v, sliding_window=9),
    "qwen2": lambda v, ends: transformers.Qwen2Config(**DECODER, **ends, vocab_size=v, tie_word_embeddings=True),
    "qwen3": lambda v, ends: transformers.Qwen3Config(**DECODER, **ends, vocab_size=v, head_dim=12, tie_word_embeddings=True),
    "gemma2": gemma2,
}
DEBERTA = dict(ENCODER, relative_attention=True, position_buckets=16, max_relative_positions=-1, share_att_key=True,
               pos_att_type=["p2c", "c2p"], norm_rel_ebd="layer_norm", position_biased_input=False, pad_token_id=0)
ENCODERS = {
    "bert": lambda v, t: transformers.BertConfig(**ENCODER, vocab_size=v, pad_token_id=0),
    "roberta": lambda v, t: transformers.RobertaConfig(**ENCODER, vocab_size=v, type_vocab_size=1, pad_token_id=1),
    # Version 2 has types, a convolution after the first layer and positions among its inputs in some sizes.
    "deberta-v2": lambda v, t: transformers.DebertaV2Config(
        **dict(DEBERTA, position_biased_input=True), vocab_size=v, type_vocab_size=2, conv_kernel_size=3, conv_act="gelu"),
    "deberta-v3": lambda v, t: transformers.DebertaV2Config(**DEBERTA, vocab_size=v, type_vocab_size=0),
    "modernbert": lambda v, t: transformers.ModernBertConfig(
        **{k: x for k, x in ENCODER.items() if k != "hidden_act"}, vocab_size=v, local_attention=16,
        global_attn_every_n_layers=2, classifier_pooling="mean", cls_token_id=0, sep_token_id=1, pad_token_id=2,
        bos_token_id=0, eos_token_id=1),
}


def make_tiny(name, folder):
    folder.mkdir(parents=True)
    tokenizer, described, config = make(name)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(described, indent=1))
    torch.manual_seed(11)
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for key, value in model.named_parameters():
            norm = ("norm" in key.lower() and key.endswith("weight")) and "gemma" not in name
            value.normal_(1.0 if norm else 0.0, 0.15)
            if key == "score.weight":
                value.normal_(0.0, 0.5)
    model.to(torch.bfloat16).save_pretrained(folder)


def score(model, inputs):
    with torch.no_grad():
        return model(**{k: torch.tensor([v]) for k, v in inputs.items()}).logits[0, 0].item()


def conversation(tokenizer, messages):
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    if tokenizer.bos_token and text.startswith(tokenizer.bos_token):
        text = text[len(tokenizer.bos_token):]
    return tokenizer(text)["input_ids"]


def decoder_cases(tokenizer, model):
    cases = []
    for messages in CONVERSATIONS:
        for answer in ANSWERS:
            whole = messages + [{"role": "assistant", "content": answer}]
            try:
                ids = conversation(tokenizer, whole)
            except Exception as refused:  # Gemma's system turn: one user turn holds all.
                assert "System role" in str(refused)
                turns = "\n\n".join(m["content"] for m in messages)
                ids = conversation(tokenizer, [{"role": "user", "content": turns}, whole[-1]])
            # The last tokens count where a conversation is too long.
            case = {"messages": messages, "answer": answer, "ids": ids, "score": score(model, {"input_ids": ids}),
                    "cut": score(model, {"input_ids": ids[-40:]})}
            cases.append(case)
    return cases


def encoder_cases(tokenizer, model):
    cases = []
    for question, answer in PAIRS:
        read = lambda **how: {k: v for k, v in tokenizer(question, answer, truncation=True, **how).items()}
        cases.append({"question": question, "answer": answer, "ids": read()["input_ids"],
                      "score": score(model, read()), "cut": score(model, read(max_length=40)),
                      "alone": score(model, dict(tokenizer(question, truncation=True)))})
    return cases


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME")
    wanted = parser.parse_args().names or [*DECODERS, *ENCODERS]
    document = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {"models": {}}
    document |= {"script": "tools/reference/classifier_golden.py",
                 "versions": {m.__name__: m.__version__ for m in (torch, transformers, tokenizers)}}
    for name in wanted:
        folder = engine.FIXTURES / f"reward-{name}"
        if not folder.exists():
            make_tiny(name, folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        loaded = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        cases = decoder_cases if name in DECODERS else encoder_cases
        document["models"][name] = cases(tokenizer, loaded.eval())
    GOLDEN.write_text(json.dumps(document, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
