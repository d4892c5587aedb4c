//! The tokenizer inside a GGUF file, written as a `tokenizer.json`.
//!
//! A GGUF holds tokens, merges or scores, and the name of a way to cut text before merging; the cut itself is known
//! only by that name. A name that is not listed here is refused: another cut would give other ids without a word.

use serde_json::{Value, json};

use super::error::EngineError;
use super::gguf::Gguf;

const REMEDY: &str = "use the model's folder in Hugging Face layout";
const DIGITS_ONE_BY_ONE: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const DIGITS_BY_THREE: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// llama.cpp's kinds of tokens.
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;

/// Returns the `tokenizer.json` of a GGUF file.
pub(crate) fn to_json(gguf: &Gguf) -> Result<Value, EngineError> {
    let fault = |problem: String| EngineError::file(gguf.path(), problem, REMEDY);
    let tokens = gguf.texts("tokenizer.ggml.tokens").ok_or_else(|| fault("tokenizer.ggml.tokens is missing".into()))?;
    let model = gguf.text("tokenizer.ggml.model").unwrap_or_default();
    let added = added_tokens(gguf, &tokens);
    match model.as_str() {
        "gpt2" => {
            let merges = gguf.texts("tokenizer.ggml.merges").ok_or_else(|| fault("merges are missing".into()))?;
            let name = gguf.text("tokenizer.ggml.pre");
            let name = name.ok_or_else(|| fault("tokenizer.ggml.pre is missing: it says how a text is cut".into()))?;
            let (normalizer, cut) = byte_level_cut(&name)
                .ok_or_else(|| fault(format!("pre-tokenizer {name} is not known to this engine")))?;
            Ok(byte_level(&tokens, &merges, added, normalizer, cut))
        }
        "llama" => {
            let scores = gguf.numbers("tokenizer.ggml.scores").ok_or_else(|| fault("scores are missing".into()))?;
            let prefix = gguf.flag("tokenizer.ggml.add_space_prefix").unwrap_or(true);
            Ok(sentence_piece(&tokens, &scores, added, prefix))
        }
        other => Err(fault(format!("tokenizer {other:?} is not one of gpt2, llama"))),
    }
}

/// Returns the normaliser and the pre-tokenizers that llama.cpp's name stands for.
fn byte_level_cut(name: &str) -> Option<(Value, Vec<Value>)> {
    let bytes = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
    let split =
        |regex: &str| json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false});
    match name {
        "gpt-2" => Some((Value::Null, vec![bytes(true)])),
        "smollm" => Some((Value::Null, vec![json!({"type": "Digits", "individual_digits": true}), bytes(true)])),
        "qwen2" => Some((json!({"type": "NFC"}), vec![split(DIGITS_ONE_BY_ONE), bytes(false)])),
        "llama-bpe" | "llama3" | "llama-v3" => Some((Value::Null, vec![split(DIGITS_BY_THREE), bytes(false)])),
        _ => None,
    }
}

fn byte_level(tokens: &[String], merges: &[String], added: Vec<Value>, normalizer: Value, cut: Vec<Value>) -> Value {
    // llama.cpp's runtime takes a whole word that is in the vocabulary as it is, for Llama 3 only; merges give the same.
    json!({
        "version": "1.0",
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": cut},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "vocab": vocabulary(tokens), "merges": merges, "byte_fallback": false},
    })
}

/// SentencePiece's BPE, as transformers converts it: a merge for every split of a token into two others, best first.
fn sentence_piece(tokens: &[String], scores: &[f32], added: Vec<Value>, space_prefix: bool) -> Value {
    let ids: std::collections::HashMap<&str, usize> = tokens.iter().enumerate().map(|(i, t)| (t.as_str(), i)).collect();
    let mut merges = Vec::new();
    for (id, token) in tokens.iter().enumerate() {
        let splits = token.char_indices().skip(1).map(|(at, _)| token.split_at(at));
        let mut known: Vec<_> = splits.filter_map(|(l, r)| Some((*ids.get(l)?, *ids.get(r)?))).collect();
        known.sort_unstable();
        merges.extend(known.into_iter().map(|(l, r)| (scores.get(id).copied().unwrap_or(0.0), l, r)));
    }
    merges.sort_by(|a, b| b.0.total_cmp(&a.0));
    let merges: Vec<[&str; 2]> = merges.iter().map(|(_, l, r)| [tokens[*l].as_str(), tokens[*r].as_str()]).collect();
    let mut normalizers = vec![json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})];
    if space_prefix {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": "▁"}));
    }
    json!({
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": null,
        "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ]},
        "model": {"type": "BPE", "vocab": vocabulary(tokens), "merges": merges, "byte_fallback": true, "fuse_unk": true,
                  "unk_token": "<unk>"},
    })
}

fn vocabulary(tokens: &[String]) -> Value {
    Value::Object(tokens.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect())
}

fn added_tokens(gguf: &Gguf, tokens: &[String]) -> Vec<Value> {
    let kinds = gguf.counts("tokenizer.ggml.token_type").unwrap_or_default();
    let added = kinds.iter().zip(tokens).enumerate().filter(|(_, (kind, _))| [CONTROL, USER_DEFINED].contains(kind));
    added
        .map(|(id, (kind, token))| {
            json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": *kind == CONTROL})
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokenizer(json: Value) -> tokenizers::Tokenizer {
        tokenizers::Tokenizer::from_bytes(json.to_string()).unwrap()
    }

    #[test]
    fn sentence_piece_merges_by_score() {
        let tokens: Vec<String> = ["<unk>", "▁", "a", "b", "c", "ab", "bc", "▁ab"].map(String::from).to_vec();
        let scores = [0., -1., -2., -3., -4., -10., -5., -11.];
        let tokenizer = tokenizer(sentence_piece(&tokens, &scores, vec![], true));
        // bc (-5) beats ab (-10).
        let encoding = tokenizer.encode("abc", false).unwrap();
        assert_eq!(encoding.get_tokens(), ["▁", "a", "bc"]);
    }

    #[test]
    fn digits_are_cut_as_the_name_says() {
        let tokens: Vec<String> = ["1", "2", "12", "a"].map(String::from).to_vec();
        let ids = |name: &str| {
            let (normalizer, cut) = byte_level_cut(name).unwrap();
            let json = byte_level(&tokens, &["1 2".to_string()], vec![], normalizer, cut);
            tokenizer(json).encode("12a", false).unwrap().get_ids().to_vec()
        };
        assert_eq!(ids("smollm"), [0, 1, 3]);
        assert_eq!(ids("qwen2"), [0, 1, 3]);
        assert_eq!(ids("llama-bpe"), [2, 3]);
        assert!(byte_level_cut("unheard-of").is_none());
    }
}
