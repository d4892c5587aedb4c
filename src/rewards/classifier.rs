//! Reward models: sequence classification in Hugging Face's layout, one label, read as they were trained.
//!
//! A decoder (`LlamaForSequenceClassification` and its kin, as Skywork-Reward-V2 is published) reads the whole conversation
//! in its own chat template on taod's engine. An encoder ([`encoder`]) reads the last question and the answer as a pair.
//! Either way the number is a logit: unbounded, and larger is better. What follows the instruction of an answer never
//! reaches a classifier as an instruction; it can only be scored.

mod deberta;
mod encoder;
#[cfg(test)]
mod tests;

use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use self::encoder::{Encoder, FAMILIES};
use super::Item;
use crate::durable;
use crate::engine::{EngineError, SequenceClassifier};
use crate::record::{Message, last_user_text};
use crate::signature::{self, PublicKey, SignatureError};

/// A reward model and how much of a text it reads.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Folder in Hugging Face layout, or a hub id for a decoder, of a sequence-classification model with one label.
    pub model: String,
    /// SHA-256 that the weights must have, in hexadecimal; empty: any. With shards, that of their hashes, one a line.
    #[serde(default)]
    pub sha256: String,
    /// Public key (base64 of an Ed25519 key's 32 bytes) that must have signed the model's folder (`taod reward sign`) before it
    /// is loaded; empty: no signature is asked for.
    #[serde(default)]
    pub public_key: String,
    /// Tokens after which a text is cut; 0: what the model reads at most. A decoder loses the conversation's beginning, an
    /// encoder the end of the longer of question and answer.
    #[serde(default)]
    pub max_tokens: usize,
}

impl Settings {
    /// Checks what can be checked without the model.
    pub fn validate(&self) -> Result<(), String> {
        if self.model.is_empty() {
            return Err("model is empty: name a folder or a hub id".into());
        }
        let hex = self.sha256.len() == 64 && self.sha256.chars().all(|c| c.is_ascii_hexdigit());
        if !self.sha256.is_empty() && !hex {
            return Err(format!("sha256 = {:?}: give 64 hexadecimal digits, or leave it empty", self.sha256));
        }
        if !self.public_key.is_empty() {
            PublicKey::parse(&self.public_key).map_err(|error| format!("public_key: {error}"))?;
        }
        match self.max_tokens {
            1..8 => Err(format!("max_tokens = {}: give at least 8, or 0 for the model's own limit", self.max_tokens)),
            _ => Ok(()),
        }
    }
}

/// What went wrong with a reward model.
#[derive(Debug, thiserror::Error)]
pub enum ClassifierError {
    #[error("{path}: {reason}; give a sequence-classification model with one label, its tokenizer beside it")]
    Load { path: String, reason: String },
    #[error("{model}: its weights have SHA-256 {found}, not {expected}; fetch it again or correct sha256")]
    Hash { model: String, found: String, expected: String },
    #[error("{model} is no folder, so nobody can have signed it: fetch it into one, or empty public_key")]
    NoFolder { model: String },
    #[error(transparent)]
    Signature(#[from] SignatureError),
    #[error("the reward model failed on a batch of {texts} texts: {source}")]
    Forward { texts: usize, source: candle_core::Error },
    #[error("the reward model's tokenizer failed: {0}")]
    Tokenize(String),
    #[error(transparent)]
    Engine(#[from] EngineError),
}

impl ClassifierError {
    fn load(path: &Path, reason: impl ToString) -> Self {
        ClassifierError::Load { path: path.display().to_string(), reason: reason.to_string() }
    }
}

/// Returns the hashes of an encoder's tokenizer and configuration.
fn hashes(folder: &Path) -> Result<String, ClassifierError> {
    let hash = |name: &str| durable::sha256_file(&folder.join(name)).map_err(|e| ClassifierError::load(folder, e));
    Ok(format!("{}/{}", hash("tokenizer.json")?, hash("config.json")?))
}

/// A loaded reward model.
pub struct Classifier {
    body: Body,
    sha256: String,
    /// Hashes of what decides a score beside the weights: how a text is cut, and how the layers' output is read.
    reading: String,
    max_tokens: usize,
}

enum Body {
    Decoder(SequenceClassifier),
    Encoder(Box<Encoder>),
}

impl Classifier {
    /// Loads a model as it is published.
    pub fn load(model: &str) -> Result<Self, ClassifierError> {
        Self::open(&Settings { model: model.to_owned(), ..Settings::default() })
    }

    /// Loads what the settings name and checks its hash and, where they name a key, its signature first.
    pub fn open(settings: &Settings) -> Result<Self, ClassifierError> {
        let folder = Path::new(&settings.model);
        if !settings.public_key.is_empty() {
            if !folder.is_dir() {
                return Err(ClassifierError::NoFolder { model: settings.model.clone() });
            }
            signature::check_folder(folder, &[PublicKey::parse(&settings.public_key)?])?;
        }
        let config: Value = match folder.is_dir() {
            true => durable::read_json(&folder.join("config.json")).map_err(|e| ClassifierError::load(folder, e))?,
            false => Value::Null,
        };
        check_labels(folder, &config)?;
        let is_encoder = config["model_type"].as_str().is_some_and(|family| FAMILIES.contains(&family));
        let (body, sha256, reading, longest) = if is_encoder {
            let encoder = Encoder::load(folder, &config, settings.max_tokens)?;
            let (sha256, longest) = (encoder.sha256.clone(), encoder.max_tokens);
            (Body::Encoder(Box::new(encoder)), sha256, hashes(folder)?, longest)
        } else {
            let decoder = SequenceClassifier::load(&settings.model)?;
            // A model without a chat template, or with a broken one, is refused here and not in the middle of a night.
            decoder.conversation_ids(&[Message::text("user", "?"), Message::text("assistant", "!")])?;
            let id = decoder.identity();
            let reading = format!("{}/{}", id.tokenizer_sha256, id.template_sha256);
            let (sha256, longest) = (id.sha256.clone(), decoder.max_tokens());
            (Body::Decoder(decoder), sha256, reading, longest)
        };
        if !settings.sha256.is_empty() && !settings.sha256.eq_ignore_ascii_case(&sha256) {
            let (model, expected) = (settings.model.clone(), settings.sha256.clone());
            return Err(ClassifierError::Hash { model, found: sha256, expected });
        }
        let max_tokens = if settings.max_tokens == 0 { longest } else { settings.max_tokens.min(longest) };
        Ok(Classifier { body, sha256, reading, max_tokens })
    }

    /// Returns the SHA-256 of the weights.
    pub fn sha256(&self) -> &str {
        &self.sha256
    }

    /// Returns what decides the scores: the weights, their tokenizer and template, and how much of a text is read.
    pub fn identity(&self) -> String {
        format!("{}/{}/{}", self.sha256, self.reading, self.max_tokens)
    }

    /// Returns the raw score of each answer to its conversation.
    pub fn score(&self, items: &[&Item]) -> Result<Vec<f64>, ClassifierError> {
        let scores = match &self.body {
            Body::Decoder(decoder) => {
                let ids = |item: &&Item| conversation_ids(decoder, &item.messages, &item.response);
                let ids: Vec<Vec<u32>> = items.iter().map(ids).collect::<Result<_, _>>()?;
                self.score_ids(decoder, &ids)?
            }
            Body::Encoder(encoder) => {
                let pair = |item: &&Item| (last_user_text(&item.messages), item.response.clone());
                encoder.score_pairs(&items.iter().map(pair).collect::<Vec<_>>())?
            }
        };
        Ok(scores.into_iter().map(f64::from).collect())
    }

    /// Returns the raw score of each plain text, as it is, without a chat template.
    pub fn score_texts(&self, texts: &[&str]) -> Result<Vec<f64>, ClassifierError> {
        let scores = match &self.body {
            Body::Decoder(decoder) => {
                let ids: Vec<Vec<u32>> = texts.iter().map(|text| decoder.text_ids(text)).collect::<Result<_, _>>()?;
                self.score_ids(decoder, &ids)?
            }
            Body::Encoder(encoder) => encoder.score_texts(texts)?,
        };
        Ok(scores.into_iter().map(f64::from).collect())
    }

    /// Scores texts as ids, of which the last `max_tokens` count: the answer stands at the end.
    fn score_ids(&self, decoder: &SequenceClassifier, ids: &[Vec<u32>]) -> Result<Vec<f32>, EngineError> {
        let cut: Vec<&[u32]> = ids.iter().map(|ids| &ids[ids.len().saturating_sub(self.max_tokens)..]).collect();
        decoder.score(&cut)
    }
}

/// Returns the ids of a conversation with its answer. One that the model's template refuses (a role that it does not
/// know, turns out of order) is read as a single question: no text of a log may fail a round.
fn conversation_ids(
    decoder: &SequenceClassifier,
    messages: &[Message],
    response: &str,
) -> Result<Vec<u32>, EngineError> {
    let answer = Message::text("assistant", response);
    match decoder.conversation_ids(&[messages, std::slice::from_ref(&answer)].concat()) {
        Err(EngineError::Template { .. }) => {
            let turns: Vec<String> = messages.iter().map(Message::plain_text).collect();
            decoder.conversation_ids(&[Message::text("user", turns.join("\n\n")), answer])
        }
        ids => ids,
    }
}

/// Refuses a model with several labels by what its config says.
fn check_labels(folder: &Path, config: &Value) -> Result<(), ClassifierError> {
    let listed = config["id2label"].as_object().map(|labels| labels.len() as u64);
    match config["num_labels"].as_u64().or(listed) {
        Some(labels) if labels != 1 => Err(ClassifierError::load(folder, format!("it gives {labels} numbers, not 1"))),
        _ => Ok(()),
    }
}
