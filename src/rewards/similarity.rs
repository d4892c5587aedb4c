//! How near an answer's meaning is to its question's: the cosine of two sentence embeddings.
//!
//! The model is a BERT-like encoder in Hugging Face layout (`model.safetensors`, `tokenizer.json`, `config.json`), made
//! for all-MiniLM-L6-v2: token states are averaged over the real tokens and scaled to length 1. A negative cosine counts
//! as 0, so that the score lies in [0, 1].

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use candle_core::{D, DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::bert::{BertModel, Config};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokenizers::{Tokenizer, TruncationParams};

use crate::durable;

/// Where the embedding model lies and how much it does at once.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Folder with model.safetensors, tokenizer.json and config.json of the sentence-embedding model.
    pub model: PathBuf,
    /// Texts embedded at once; at least 1.
    pub batch: usize,
    /// Tokens after which a text is cut, 8 to 512; the model was trained on 256.
    pub max_tokens: usize,
    /// Embeddings of questions kept in memory (1.5 kB each); the oldest run is dropped as a whole when it is full.
    pub cache: usize,
}

impl Default for Settings {
    fn default() -> Self {
        Settings { model: PathBuf::from("models/all-MiniLM-L6-v2"), batch: 32, max_tokens: 256, cache: 20_000 }
    }
}

impl Settings {
    /// Checks ranges; the message names the key, the value and the remedy.
    pub fn validate(&self) -> Result<(), String> {
        if self.batch == 0 {
            return Err("batch = 0: give at least 1".into());
        }
        if !(8..=512).contains(&self.max_tokens) {
            return Err(format!("max_tokens = {}: give 8 to 512", self.max_tokens));
        }
        Ok(())
    }
}

/// What went wrong with the embedding model.
#[derive(Debug, thiserror::Error)]
pub enum SimilarityError {
    #[error(
        "{path}: {reason}; rewards.similarity.model must name a folder with model.safetensors, tokenizer.json and config.json"
    )]
    Load { path: String, reason: String },
    #[error("the embedding model failed on a batch of {texts} texts: {source}")]
    Forward { texts: usize, source: candle_core::Error },
    #[error("the embedding model's tokenizer failed: {0}")]
    Tokenize(String),
}

/// An embedding of length 1.
type Embedding = Vec<f32>;

/// The loaded model, with the questions it has met.
pub struct Similarity {
    model: BertModel,
    tokenizer: Tokenizer,
    settings: Settings,
    /// Hashes of the weights, the tokenizer and the configuration.
    files: String,
    questions: Mutex<HashMap<String, Embedding>>,
}

impl Similarity {
    /// Loads the model's three files.
    pub fn load(settings: &Settings) -> Result<Self, SimilarityError> {
        let folder = &settings.model;
        let config: Config = durable::read_json(&folder.join("config.json")).map_err(|e| refuse(folder, e))?;
        let tokenizer_path = folder.join("tokenizer.json");
        let mut tokenizer = Tokenizer::from_file(&tokenizer_path).map_err(|e| refuse(&tokenizer_path, e))?;
        let max_length = settings.max_tokens.min(config.max_position_embeddings);
        let truncation = TruncationParams { max_length, ..Default::default() };
        tokenizer.with_truncation(Some(truncation)).map_err(|e| refuse(&tokenizer_path, e))?;
        tokenizer.with_padding(None);

        let weights = folder.join("model.safetensors");
        let bytes = std::fs::read(&weights).map_err(|e| refuse(&weights, e))?;
        let hash = |path: &Path| durable::sha256_file(path).map_err(|e| refuse(path, e));
        let (cut, shape) = (hash(&tokenizer_path)?, hash(&folder.join("config.json"))?);
        let files = format!("{}/{cut}/{shape}", hex::encode(Sha256::digest(&bytes)));
        let variables = VarBuilder::from_buffered_safetensors(bytes, DType::F32, &Device::Cpu);
        let model = variables.and_then(|vars| BertModel::load(vars, &config)).map_err(|e| refuse(&weights, e))?;
        Ok(Similarity { model, tokenizer, settings: settings.clone(), files, questions: Mutex::default() })
    }

    /// Returns what decides the scores: the weights, the tokenizer, the configuration and how much of a text is read.
    pub fn identity(&self) -> String {
        format!("{}/{}", self.files, self.settings.max_tokens)
    }

    /// Returns the score in [0, 1] of each (question, answer).
    pub fn score(&self, pairs: &[(String, String)]) -> Result<Vec<f64>, SimilarityError> {
        let clipped = self.cosine(pairs)?.into_iter().map(|cosine| cosine.clamp(0.0, 1.0));
        Ok(clipped.collect())
    }

    /// Returns the cosine of each (question, answer). Questions are embedded once.
    pub fn cosine(&self, pairs: &[(String, String)]) -> Result<Vec<f64>, SimilarityError> {
        let questions = self.embed_questions(pairs)?;
        let answers: Vec<&str> = pairs.iter().map(|(_, answer)| answer.as_str()).collect();
        let answers = self.embed(&answers)?;
        let dot = |(a, b): (&Embedding, &Embedding)| a.iter().zip(b).map(|(x, y)| f64::from(x * y)).sum();
        Ok(questions.iter().zip(&answers).map(dot).collect())
    }

    fn embed_questions(&self, pairs: &[(String, String)]) -> Result<Vec<Embedding>, SimilarityError> {
        // A poisoned lock only means that another caller died between two inserts: the map itself is whole.
        let mut known = self.questions.lock().unwrap_or_else(PoisonError::into_inner);
        let mut new: Vec<&str> = pairs.iter().map(|(question, _)| question.as_str()).collect();
        new.retain(|question| !known.contains_key(*question));
        new.sort_unstable();
        new.dedup();
        let fresh = self.embed(&new)?;
        let fresh: HashMap<String, Embedding> = new.iter().map(|q| q.to_string()).zip(fresh).collect();
        let find = |question: &String| known.get(question).or_else(|| fresh.get(question)).cloned().unwrap_or_default();
        let found = pairs.iter().map(|(question, _)| find(question)).collect();
        if known.len() + fresh.len() > self.settings.cache {
            known.clear();
        }
        if fresh.len() <= self.settings.cache {
            known.extend(fresh);
        }
        Ok(found)
    }

    /// Returns the embedding of each text. Texts of like length share a batch, so that little is padded.
    pub fn embed(&self, texts: &[&str]) -> Result<Vec<Embedding>, SimilarityError> {
        let encode = |text: &&str| {
            let encoding = self.tokenizer.encode(*text, true);
            encoding.map(|e| e.get_ids().to_vec()).map_err(|e| SimilarityError::Tokenize(e.to_string()))
        };
        let ids: Vec<Vec<u32>> = texts.iter().map(encode).collect::<Result<_, _>>()?;
        let mut order: Vec<usize> = (0..ids.len()).collect();
        order.sort_by_key(|&i| (ids[i].len(), i));
        let mut embeddings = vec![Embedding::new(); ids.len()];
        for batch in order.chunks(self.settings.batch) {
            let rows: Vec<&[u32]> = batch.iter().map(|&i| ids[i].as_slice()).collect();
            let forward = self.forward(&rows);
            let rows = forward.map_err(|source| SimilarityError::Forward { texts: rows.len(), source })?;
            for (&i, row) in batch.iter().zip(rows) {
                embeddings[i] = row;
            }
        }
        Ok(embeddings)
    }

    fn forward(&self, rows: &[&[u32]]) -> candle_core::Result<Vec<Embedding>> {
        let width = rows.iter().map(|row| row.len()).max().unwrap_or(0);
        let padded = |value: &dyn Fn(&[u32], usize) -> u32| -> candle_core::Result<Tensor> {
            let cells: Vec<u32> = rows.iter().flat_map(|row| (0..width).map(move |at| value(row, at))).collect();
            Tensor::from_vec(cells, (rows.len(), width), &Device::Cpu)
        };
        let ids = padded(&|row, at| row.get(at).copied().unwrap_or(0))?;
        let mask = padded(&|row, at| u32::from(at < row.len()))?;
        let states = self.model.forward(&ids, &ids.zeros_like()?, Some(&mask))?;
        let mask = mask.to_dtype(DType::F32)?.unsqueeze(2)?;
        let mean = states.broadcast_mul(&mask)?.sum(1)?.broadcast_div(&mask.sum(1)?)?;
        let length = mean.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?;
        mean.broadcast_div(&length)?.to_vec2()
    }
}

fn refuse(path: &Path, reason: impl std::fmt::Display) -> SimilarityError {
    SimilarityError::Load { path: path.display().to_string(), reason: reason.to_string() }
}

#[cfg(test)]
mod tests;
