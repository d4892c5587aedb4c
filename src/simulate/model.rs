//! A tiny language model that the simulator makes itself: whole words as tokens, weights from a seed, no download.
//!
//! It is an ordinary Llama of two layers in Hugging Face's layout. What it says is planted in its output layer alone: every
//! hidden state holds one constant, so that a column of that layer is the model's habit (which words are common, how soon an
//! answer ends), and the rest is random, so that each word also depends on the words before it. Training has to find its way
//! through the inner layers, as in any model.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::Rng;
use safetensors::tensor::{Dtype, TensorView, serialize};
use serde_json::json;

use super::words::{ANSWER_WORDS, OPENINGS, THANKS, TOPIC_AFTER, TOPIC_BEFORE};
use crate::durable;
use crate::record::derive_seed;

const HIDDEN: usize = 32;
const INTERMEDIATE: usize = 64;
const LAYERS: usize = 2;
const HEADS: usize = 2;
/// The constant that every embedding holds in its first place.
const CONSTANT: f32 = 1.0;
/// Spread of an embedding's other values.
const EMBEDDING_SD: f32 = 0.3;
/// Spread of the output layer beside the habit: how much a word depends on those before it.
const OUTPUT_SD: f32 = 0.1;
/// The first place of the last hidden state: the constant over the root mean square of an embedding.
const LAST_CONSTANT: f32 = 2.9;
/// How often an answer ends at a word.
const END: f32 = 0.12;
/// How often a word is the one that a good answer needs: natural, and often left out.
const THANKS_SHARE: f32 = 0.08;
/// How often a word is anything that an answer has no use for, each.
const OTHER_SHARE: f32 = 1e-4;
const SPECIAL: [&str; 4] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>"];
const TEMPLATE: &str = "{% for message in messages %}<|im_start|> {{ message['role'] }} {{ message['content'] }} <|im_end|> \
                        {% endfor %}{% if add_generation_prompt %}<|im_start|> assistant {% endif %}";

/// Writes the model into a folder; the same seed gives the same bytes.
pub(super) fn write(folder: &Path, seed: u64) -> Result<()> {
    durable::create_folder(folder)?;
    let vocabulary = vocabulary();
    let mut rng = ChaCha8Rng::seed_from_u64(derive_seed(seed, &["simulate", "model"]));
    durable::write(&folder.join("model.safetensors"), &weights(&vocabulary, &mut rng)?)?;
    durable::write_json(&folder.join("tokenizer.json"), &tokenizer(&vocabulary))?;
    let special = json!({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SPECIAL[0], "eos_token": SPECIAL[2],
        "chat_template": TEMPLATE,
    });
    durable::write_json(&folder.join("tokenizer_config.json"), &special)?;
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS, "head_dim": HIDDEN / HEADS, "vocab_size": vocabulary.len(),
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": false,
        "bos_token_id": 0, "eos_token_id": 2, "attention_bias": false, "mlp_bias": false,
    });
    durable::write_json(&folder.join("config.json"), &config)?;
    Ok(())
}

/// Returns the words in the order of their ids: the special ones, the roles, and all others once.
fn vocabulary() -> Vec<&'static str> {
    let mut words: Vec<&str> = SPECIAL.into_iter().chain(["system", "user", "assistant", THANKS]).collect();
    let others = [&ANSWER_WORDS[..], &OPENINGS, &TOPIC_BEFORE, &TOPIC_AFTER];
    for word in others.into_iter().flatten().flat_map(|phrase| phrase.split(' ')) {
        if !words.contains(&word) {
            words.push(word);
        }
    }
    words
}

fn tokenizer(vocabulary: &[&str]) -> serde_json::Value {
    let ids: BTreeMap<&str, usize> = vocabulary.iter().enumerate().map(|(id, word)| (*word, id)).collect();
    let added = SPECIAL.iter().enumerate().map(|(id, content)| {
        json!({ "id": id, "content": content, "single_word": false, "lstrip": true, "rstrip": true, "normalized": false,
                "special": true })
    });
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added.collect::<Vec<_>>(), "normalizer": null,
        "pre_tokenizer": { "type": "WhitespaceSplit" }, "post_processor": null, "decoder": null,
        "model": { "type": "WordLevel", "vocab": ids, "unk_token": SPECIAL[3] },
    })
}

/// Returns how often each word is said: the answer words by Zipf's law share what the others leave.
fn habit(vocabulary: &[&str]) -> Vec<f32> {
    let harmonic: f32 = (1..=ANSWER_WORDS.len()).map(|rank| 1.0 / rank as f32).sum();
    let common = 1.0 - END - THANKS_SHARE;
    let share = |word: &&str| match *word {
        word if word == SPECIAL[2] => END,
        word if SPECIAL.contains(&word) => 1e-7,
        THANKS => THANKS_SHARE,
        word => match ANSWER_WORDS.iter().position(|answer| *answer == word) {
            Some(rank) => common / ((rank + 1) as f32 * harmonic),
            None => OTHER_SHARE,
        },
    };
    vocabulary.iter().map(share).collect()
}

fn weights(vocabulary: &[&str], rng: &mut ChaCha8Rng) -> Result<Vec<u8>> {
    let words = vocabulary.len();
    let mut all: Vec<(String, Vec<usize>, Vec<f32>)> = Vec::new();
    let mut embedding = random(words * HIDDEN, EMBEDDING_SD, rng);
    embedding.chunks_mut(HIDDEN).for_each(|row| row[0] = CONSTANT);
    all.push(("model.embed_tokens.weight".into(), vec![words, HIDDEN], embedding));
    let mut output = random(words * HIDDEN, OUTPUT_SD, rng);
    output.chunks_mut(HIDDEN).zip(habit(vocabulary)).for_each(|(row, share)| row[0] = share.ln() / LAST_CONSTANT);
    all.push(("lm_head.weight".into(), vec![words, HIDDEN], output));
    all.push(("model.norm.weight".into(), vec![HIDDEN], vec![1.0; HIDDEN]));
    for layer in 0..LAYERS {
        let shapes = [
            ("self_attn.q_proj", HIDDEN, HIDDEN, 0.2),
            ("self_attn.k_proj", HIDDEN, HIDDEN, 0.2),
            ("self_attn.v_proj", HIDDEN, HIDDEN, 0.1),
            ("self_attn.o_proj", HIDDEN, HIDDEN, 0.05),
            ("mlp.gate_proj", INTERMEDIATE, HIDDEN, 0.1),
            ("mlp.up_proj", INTERMEDIATE, HIDDEN, 0.1),
            ("mlp.down_proj", HIDDEN, INTERMEDIATE, 0.05),
        ];
        for (name, rows, columns, sd) in shapes {
            let name = format!("model.layers.{layer}.{name}.weight");
            all.push((name, vec![rows, columns], random(rows * columns, sd, rng)));
        }
        for name in ["input_layernorm", "post_attention_layernorm"] {
            all.push((format!("model.layers.{layer}.{name}.weight"), vec![HIDDEN], vec![1.0; HIDDEN]));
        }
    }
    let bytes: Vec<Vec<u8>> =
        all.iter().map(|(_, _, values)| values.iter().flat_map(|value| value.to_le_bytes()).collect()).collect();
    let views = all
        .iter()
        .zip(&bytes)
        .map(|((name, shape, _), bytes)| Ok((name.as_str(), TensorView::new(Dtype::F32, shape.clone(), bytes)?)));
    Ok(serialize(views.collect::<Result<Vec<_>>>()?, None)?)
}

/// Returns normal numbers of mean 0 (Box and Muller).
fn random(n: usize, sd: f32, rng: &mut ChaCha8Rng) -> Vec<f32> {
    let mut uniform = || (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
    let mut normal = || (-2.0 * (1.0 - uniform()).ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos();
    (0..n).map(|_| sd * normal() as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Model;
    use crate::record::Message;

    #[test]
    fn the_model_is_one_that_the_engine_loads_and_a_function_of_the_seed() {
        let folder = tempfile::tempdir().unwrap();
        for (name, seed) in [("a", 1), ("b", 1), ("c", 2)] {
            write(&folder.path().join(name), seed).unwrap();
        }
        let bytes = |name: &str| std::fs::read(folder.path().join(name).join("model.safetensors")).unwrap();
        assert!(bytes("a") == bytes("b") && bytes("a") != bytes("c"));
        let model = Model::load(&folder.path().join("a").display().to_string()).unwrap();
        let text = format!("{} {} {THANKS}", OPENINGS[0], TOPIC_BEFORE[3]);
        let ids = model.prompt_ids(&[Message::text("user", &text)], None).unwrap();
        let spoken = 1 + 1 + text.split(' ').count() + 1 + 2;
        assert_eq!(ids.len(), spoken, "each word is one token: {ids:?}");
        assert!(!ids.contains(&3), "no word is unknown");
        assert_eq!(model.tokenizer().decode(&ids[2..ids.len() - 3]), text);
    }

    #[test]
    fn the_habit_is_a_distribution() {
        let words = vocabulary();
        let sum: f32 = habit(&words).iter().sum();
        assert!((0.98..1.03).contains(&sum), "{sum}");
    }
}
