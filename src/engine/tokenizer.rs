//! Text to token ids and back, with the ids that end an answer.

mod bytes;

use std::collections::BTreeSet;

use serde_json::Value;
use sha2::{Digest, Sha256};

use self::bytes::Spelling;
use super::error::EngineError;
use super::gguf_tokenizer;
use super::source::Files;

/// Tokens that close an assistant's turn in the families' chat templates, whether or not the config lists them.
const CHAT_END: [&str; 5] = ["<|im_end|>", "<|eot_id|>", "<|end|>", "<|eom_id|>", "<end_of_turn>"];

/// A model's tokenizer.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    sha256: String,
    ends: BTreeSet<u32>,
    closing: Option<u32>,
}

impl Tokenizer {
    pub(crate) fn load(files: &Files) -> Result<Self, EngineError> {
        let broken = |e: String| EngineError::file(files.home(), format!("tokenizer: {e}"), "download the model again");
        let bytes = match files.gguf() {
            Some(gguf) => gguf_tokenizer::to_json(gguf)?.to_string().into_bytes(),
            None => {
                let path = files.home().join("tokenizer.json");
                let remedy = "copy the model's tokenizer.json there";
                std::fs::read(&path).map_err(|e| EngineError::file(&path, e, remedy))?
            }
        };
        let inner = tokenizers::Tokenizer::from_bytes(&bytes).map_err(|e| broken(e.to_string()))?;
        let declared = match files.gguf() {
            Some(gguf) => gguf.end_ids(),
            None => declared_ends(files, &inner)?,
        };
        let chat_end: Vec<u32> = CHAT_END.iter().filter_map(|token| inner.token_to_id(token)).collect();
        let closing = declared.first().filter(|id| chat_end.contains(id)).or(chat_end.first()).or(declared.first());
        let closing = closing.copied();
        let ends = declared.iter().chain(&chat_end).copied().collect();
        Ok(Tokenizer { inner, sha256: hex::encode(Sha256::digest(&bytes)), ends, closing })
    }

    /// Returns the ids of a text. Special tokens written in it are recognised; none are added.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, EngineError> {
        let encoding = self.inner.encode(text, false);
        let encoding = encoding.map_err(|e| EngineError::request(format!("text cannot be tokenised: {e}")))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Returns the ids of a text with the special tokens that the tokenizer puts around one.
    pub(crate) fn encode_whole(&self, text: &str) -> Result<Vec<u32>, EngineError> {
        let encoding = self.inner.encode(text, true);
        let encoding = encoding.map_err(|e| EngineError::request(format!("text cannot be tokenised: {e}")))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Returns a text without anything that would be read as a special token, such as `<|im_end|>`: what a text from outside
    /// must go through before it stands where such a token would end a turn and open another.
    pub fn defuse(&self, text: &str) -> String {
        let special = self.inner.get_added_tokens_decoder().into_values().filter(|token| token.special);
        let special: Vec<String> = special.map(|token| token.content).filter(|content| !content.is_empty()).collect();
        let mut text = text.to_owned();
        // Taking one out may join the halves of another.
        while let Some(found) = special.iter().find(|token| text.contains(token.as_str())) {
            text = text.replace(found.as_str(), "");
        }
        text
    }

    /// Returns the text of ids, without special tokens. Bytes that are no character yet become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> String {
        self.inner.decode(ids, true).unwrap_or_default()
    }

    /// Returns true where the id ends an answer.
    pub fn is_end(&self, id: u32) -> bool {
        self.ends.contains(&id)
    }

    /// Returns the id that closes an assistant's turn, which a given answer that ended by itself is completed with.
    pub fn closing_id(&self) -> Option<u32> {
        self.closing
    }

    /// Returns the ids of an answer given as text; a finished one gets the closing token.
    pub fn answer_ids(&self, text: &str, finished: bool) -> Result<Vec<u32>, EngineError> {
        let mut ids = self.encode(text)?;
        ids.extend(self.closing.filter(|_| finished));
        Ok(ids)
    }

    /// Returns the ids that end an answer.
    pub(crate) fn ends(&self) -> impl Iterator<Item = u32> {
        self.ends.iter().copied()
    }

    /// Returns the bytes that each id of a model's vocabulary writes: none for ids that no token has, and a mark that no text
    /// holds before the name of a special token.
    pub(crate) fn bytes(&self, vocab: usize) -> Result<Vec<Vec<u8>>, EngineError> {
        const SPECIAL: u8 = 0xFF;
        let decoder = self.inner.get_decoder().and_then(|decoder| serde_json::to_string(decoder).ok());
        let spelling = decoder.as_deref().and_then(Spelling::of).ok_or_else(|| {
            EngineError::request(
                "the tokenizer is neither byte-level nor has byte fallback; schemas need the bytes of tokens",
            )
        })?;
        let (alphabet, added) = (bytes::alphabet(), self.inner.get_added_tokens_decoder());
        let word = |id: u32| {
            let Some(token) = self.inner.id_to_token(id) else { return Vec::new() };
            match added.get(&id) {
                Some(added) if added.special || self.is_end(id) => [&[SPECIAL], token.as_bytes()].concat(),
                Some(_) => token.into_bytes(),
                None => spelling.bytes(&token, &alphabet).unwrap_or_default(),
            }
        };
        Ok((0..vocab as u32).map(word).collect())
    }

    /// Returns the SHA-256 of its definition.
    pub(crate) fn sha256(&self) -> &str {
        &self.sha256
    }
}

/// Returns the end ids that a folder declares, that of the tokenizer first.
fn declared_ends(files: &Files, tokenizer: &tokenizers::Tokenizer) -> Result<Vec<u32>, EngineError> {
    let config = files.json("tokenizer_config.json")?;
    let token = config["eos_token"].as_str().or(config["eos_token"]["content"].as_str());
    let mut ids: Vec<u32> = token.and_then(|t| tokenizer.token_to_id(t)).into_iter().collect();
    for name in ["generation_config.json", "config.json"] {
        let ends = &files.json(name)?["eos_token_id"];
        let listed = ends.as_array().cloned().unwrap_or_else(|| vec![ends.clone()]);
        ids.extend(listed.iter().filter_map(Value::as_u64).map(|id| id as u32));
    }
    Ok(ids)
}
