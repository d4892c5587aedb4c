//! Candidates: several sampled answers for each prompt, drawn so that a killed run resumes to the same bytes.
//!
//! TAO's first stage. The unit of work, and of resume, is a chunk of whole prompt groups: its batch is formed and
//! drained alone, so that what a sample sees of the others never depends on where a run was interrupted. A chunk's
//! file is written whole; the manifest comes last and proves that all chunks stand.
//!
//! Every candidate carries its token ids and log-probs: ids win over text from here to the trainer, because
//! `encode(decode(ids))` is not `ids`.

mod decoding;
mod draw;
pub mod remote;
mod strategy;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::crash;
use crate::dataset::Prompt;
use crate::durable::{self, FileError};
use crate::engine::{Adapter, BatchLimits, Batcher, EngineError, Grammar, Model, Policy, Precision, SamplingSettings};
use crate::progress::{Ask, Progress};
use crate::record::FinishReason;
pub use decoding::{Decoding, write_sampling};
use decoding::{check_filters, check_stop};
pub use draw::{Draw, draw, draw_sides};
use draw::{draw_on, fits};
use remote::Remote;
pub use strategy::{PLAIN, Strategy};

/// How candidates for training are drawn.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Answers sampled for each prompt (K of best-of-K); 2 to 64.
    pub samples_per_prompt: usize,
    /// Sampling temperature; 1.0 keeps the samples on-policy for every training method.
    pub temperature: f64,
    /// Nucleus mass kept, in (0, 1]; 1.0 keeps the samples on-policy.
    pub top_p: f64,
    /// Likeliest tokens kept; 0 keeps all, and the samples on-policy.
    pub top_k: usize,
    /// Keeps tokens at least this likely beside the most likely one, in [0, 1]; 0 keeps all, and the samples on-policy.
    pub min_p: f64,
    /// Makes tokens of the prompt and of the answer less likely, above 0 and at most 2; 1.0 is none, and keeps the samples
    /// on-policy.
    pub repetition_penalty: f64,
    /// Most new tokens of one answer.
    pub max_tokens: usize,
    /// Strings that end an answer; its text stops before them, and its token ids hold them.
    pub stop: Vec<String>,
    /// Prompts whose groups are sampled and written together; what a kill can cost at most.
    pub chunk_prompts: usize,
    /// Most sequences decoded at the same time.
    pub max_sequences: usize,
    /// Memory of keys and values, in MiB, for training's answers and for the gate's: as many sequences are decoded at the same
    /// time as surely fit. Prompts that do not fit with one answer are left out.
    pub cache_mib: usize,
    /// Precision of the weights that answers are drawn with; an adapter is merged into them before they are rounded.
    pub precision: Precision,
    /// Draw answers of a workload whose rules ask for JSON (`json`, with or without a schema) from texts that keep that rule alone.
    /// They are off-policy: what the rule forbids had a probability. Reasoning before the answer is not possible then.
    pub follow_json_rules: bool,
    /// More answers to each prompt, drawn in other ways.
    pub strategies: Vec<Strategy>,
    /// A server that samples instead of this machine.
    pub remote: remote::Settings,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            samples_per_prompt: 8,
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            max_tokens: 512,
            stop: Vec::new(),
            chunk_prompts: 16,
            max_sequences: 64,
            cache_mib: BatchLimits::CACHE_MIB,
            precision: Precision::default(),
            follow_json_rules: false,
            strategies: Vec::new(),
            remote: remote::Settings::default(),
        }
    }
}

impl Settings {
    /// Checks every key; the message names key, value and remedy.
    pub fn validate(&self) -> Result<(), String> {
        let k = self.samples_per_prompt;
        if !(2..=64).contains(&k) {
            return Err(format!("samples_per_prompt = {k}: a group needs 2 to 64 answers to be compared"));
        }
        if self.temperature.is_nan() || self.temperature <= 0.0 || self.temperature > 2.0 {
            return Err(format!("temperature = {}: set a value above 0 and at most 2", self.temperature));
        }
        check_filters(self.top_p, self.min_p, self.repetition_penalty)?;
        for (key, value) in [
            ("max_tokens", self.max_tokens),
            ("chunk_prompts", self.chunk_prompts),
            ("max_sequences", self.max_sequences),
            ("cache_mib", self.cache_mib),
        ] {
            if value == 0 {
                return Err(format!("{key} = 0: set at least 1"));
            }
        }
        check_stop(&self.stop)?;
        let mut names = std::collections::BTreeSet::new();
        for strategy in &self.strategies {
            strategy.validate().map_err(|problem| format!("strategies: {problem}"))?;
            if !names.insert(&strategy.name) {
                return Err(format!("strategies: two are named {:?}; give each a name of its own", strategy.name));
            }
        }
        if self.remote.is_on() && !self.strategies.is_empty() {
            return Err(
                "strategies: the server of remote.url draws plain answers alone; leave one of the two out".into()
            );
        }
        self.remote.validate().map_err(|problem| format!("remote.{problem}"))
    }

    /// Returns what of these settings draws other than from the policy as clients meet it, if anything does.
    pub fn off_policy(&self) -> Option<String> {
        let (top_k, full) = (self.top_k as f64, 1.0);
        let changed = [
            ("temperature", self.temperature, full),
            ("top_p", self.top_p, full),
            ("top_k", top_k, 0.0),
            ("min_p", self.min_p, 0.0),
            ("repetition_penalty", self.repetition_penalty, full),
        ];
        if let Some((key, value, plain)) = changed.into_iter().find(|(_, value, plain)| value != plain) {
            return Some(format!("candidates.{key} is {value}, not {plain}"));
        }
        if self.precision == Precision::Int8 {
            return Some("candidates.precision is int8".to_string());
        }
        if self.follow_json_rules {
            return Some("candidates.follow_json_rules is on".to_string());
        }
        self.strategies.first().map(|strategy| format!("candidates.strategies has {:?}", strategy.name))
    }

    /// Returns how much is decoded and held at once.
    pub fn limits(&self) -> BatchLimits {
        BatchLimits { max_sequences: self.max_sequences, cache_mib: self.cache_mib, ..BatchLimits::default() }
    }

    /// Returns how much is drawn for training, and how.
    pub fn draw(&self) -> Draw {
        let Settings { temperature, top_p, top_k, min_p, repetition_penalty, max_tokens, .. } = *self;
        let stop = self.stop.clone();
        let own = SamplingSettings::default();
        let sampling =
            SamplingSettings { temperature, top_p, top_k, min_p, repetition_penalty, max_tokens, stop, ..own };
        Draw {
            samples: self.samples_per_prompt,
            sampling,
            limits: self.limits(),
            strategies: self.strategies.clone(),
            formats: Formats::new(),
        }
    }
}

/// One sampled answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Candidate {
    pub prompt_hash: String,
    pub cluster: String,
    pub workload: Option<String>,
    /// Counts the answers of one prompt from 0.
    pub sample: usize,
    /// Seed of this draw; all there is of randomness.
    pub seed: u64,
    /// What drew it: `base` or an adapter's served name.
    pub sampler: String,
    /// How the prompt was put: [`PLAIN`], or a [`Strategy`]'s name.
    pub strategy: String,
    pub text: String,
    /// The prompt as the sampler saw it; kept so that training sees the same.
    pub prompt_ids: Vec<u32>,
    /// The answer, with the closing token or that of a stop string exactly when `finish_reason` is `stop`.
    pub token_ids: Vec<u32>,
    /// Log-softmax of the raw logits at temperature 1, one per token id; none where a server does not tell them.
    pub logprobs: Vec<f32>,
    /// Log-prob under the distribution that was drawn from, one per token id; none where a server does not tell them.
    pub sampler_logprobs: Vec<f32>,
    pub finish_reason: FinishReason,
    /// True where its log-probs are near those that training computes, not the same: another server drew it, or
    /// rounded weights.
    #[serde(default, skip_serializing_if = "std::ops::Not::not", alias = "remote")]
    pub approximate: bool,
}

/// Which draws these are: enters every seed, so that no two purposes ever share a sample stream.
#[derive(Debug, Clone, Copy)]
pub struct Stream<'a> {
    /// Root seed of the round or trial.
    pub seed: u64,
    /// For example `train/1`, or a trial's side.
    pub name: &'a str,
    /// What draws: `base` or an adapter's served name.
    pub sampler: &'a str,
}

/// Why candidates could not be drawn.
#[derive(Debug, thiserror::Error)]
pub enum CandidateError {
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    File(#[from] FileError),
    #[error("the server at candidates.remote.url {url} cannot sample: {what}")]
    Remote { url: String, what: String },
    /// One prompt is refused; the others may not be.
    #[error("{0}")]
    Prompt(String),
    #[error("sampling was paused after {chunks} chunks; it goes on where it left off")]
    Paused { chunks: usize },
}

/// What stands in the stage's folder once it is complete.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    pub sampler: String,
    pub chunks: usize,
    pub prompts: usize,
    pub candidates: usize,
    pub tokens: u64,
    /// Prompts whose turn did not come, because the round's budget was spent.
    #[serde(default)]
    pub cut: usize,
    /// Prompts that do not fit the model's context, or candidates.cache_mib, together with their answer, or that its chat
    /// template or the server refuses.
    pub too_long: usize,
    /// Answers that a strategy drew and threw away: nothing stood after its mark.
    #[serde(default)]
    pub without_answer: usize,
    /// SHA-256 of each chunk's file, in order.
    pub sha256: Vec<String>,
}

/// What answers must be, by their workload.
pub type Formats = BTreeMap<String, Grammar>;

/// Samples all prompts into `out`, chunk by chunk, and returns the manifest; a folder that is already complete is
/// returned as it stands, a partly written one is continued.
pub fn sample(
    model: &Model,
    adapter: Option<&Adapter>,
    prompts: &[&Prompt],
    (settings, formats): (&Settings, &Formats),
    stream: Stream<'_>,
    out: &Path,
    progress: &Progress,
) -> Result<Manifest, CandidateError> {
    let manifest_path = out.join("manifest.json");
    if manifest_path.exists() {
        return Ok(durable::read_json(&manifest_path)?);
    }
    durable::create_folder(out)?;
    let per_prompt = settings.samples_per_prompt + settings.strategies.iter().map(|s| s.samples).sum::<usize>();
    let total = (prompts.len() * per_prompt * settings.max_tokens) as u64;
    let mut step = progress.step(format!("sample from {}", stream.sampler), total, "tokens");
    let mut manifest = Manifest {
        sampler: stream.sampler.to_string(),
        chunks: 0,
        prompts: prompts.len(),
        candidates: 0,
        tokens: 0,
        cut: 0,
        too_long: 0,
        without_answer: 0,
        sha256: Vec::new(),
    };
    let mut untold = 0;
    let how = Draw { formats: formats.clone(), ..settings.draw() };
    // The server has the base alone.
    let remote = (settings.remote.is_on() && adapter.is_none()).then(|| Remote::open(&settings.remote)).transpose()?;
    let mut local = None;
    if remote.is_none() {
        check_room(model, prompts, settings)?;
    }
    for (index, chunk) in prompts.chunks(settings.chunk_prompts).enumerate() {
        let path = chunk_path(out, index);
        if !path.exists() {
            // At least one chunk is drawn, so that there is something to train on.
            match if index == 0 { Ask::GoOn } else { progress.asks() } {
                Ask::GoOn => {}
                Ask::Pause => return Err(CandidateError::Paused { chunks: index }),
                Ask::Enough => {
                    manifest.cut = prompts.len() - index * settings.chunk_prompts;
                    break;
                }
            }
            let drawn = match &remote {
                Some(remote) => remote.draw(model, chunk, &how, stream, &mut step)?,
                None => {
                    // Made at the first chunk that is missing. Prompts in common are read once for all chunks, which
                    // changes no bit of what is drawn.
                    let (policy, batcher) = match &mut local {
                        Some(local) => local,
                        None => {
                            let form = settings.precision.form();
                            tracing::info!(sampler = stream.sampler, ?form, "sampling");
                            let policy = Policy::new(model, adapter, form)?;
                            let batcher = Batcher::new(policy.clone(), settings.limits())?;
                            local.insert((policy, batcher))
                        }
                    };
                    draw_on(batcher, &[(&*policy, stream)], chunk, &how, &mut step)?.into_iter().flatten().collect()
                }
            };
            durable::write_json_lines(&path, &drawn.concat())?;
            crash::at("candidates-chunk");
        }
        let written: Vec<Candidate> = durable::read_json_lines(&path)?;
        let answered: std::collections::BTreeSet<&str> = written.iter().map(|c| c.prompt_hash.as_str()).collect();
        manifest.chunks += 1;
        manifest.candidates += written.len();
        manifest.tokens += written.iter().map(|c| c.token_ids.len() as u64).sum::<u64>();
        manifest.too_long += chunk.len() - answered.len();
        manifest.without_answer += (answered.len() * per_prompt).saturating_sub(written.len());
        untold += written.iter().filter(|c| c.strategy == PLAIN && c.logprobs.len() != c.token_ids.len()).count();
        manifest.sha256.push(durable::sha256_file(&path)?);
    }
    if manifest.cut > 0 {
        tracing::warn!(
            cut = manifest.cut,
            of = prompts.len(),
            "sampling ends early: the round's budget for it is spent"
        );
    }
    if untold > 0 {
        tracing::warn!(untold, "answers came without token ids or log-probs; policy gradients will refuse them");
    }
    durable::write_json(&manifest_path, &manifest)?;
    Ok(manifest)
}

/// Tells before anything is drawn what will not fit the memory for keys and values; refuses where nothing can.
fn check_room(model: &Model, prompts: &[&Prompt], settings: &Settings) -> Result<(), CandidateError> {
    let (limits, draw) = (settings.limits(), settings.draw());
    limits.check(model, 1, draw.sampling.max_tokens)?;
    let mut left_out = 0;
    let mut most = None;
    for prompt in prompts {
        let Some(ids) = model.readable_ids(&prompt.messages, prompt.tools.as_ref())? else { continue };
        let tokens = ids.len();
        if let (true, Err(error)) =
            (fits(model, tokens, &draw.sampling), limits.check(model, tokens, draw.sampling.max_tokens))
        {
            left_out += 1;
            most = most.max(Some((tokens, error.to_string())));
        }
    }
    if let Some((_, problem)) = most {
        tracing::warn!(left_out, of = prompts.len(), "prompts do not fit candidates.cache_mib: {problem}");
    }
    Ok(())
}

/// Reads all candidates of a complete folder, in the order of the prompts.
pub fn load(out: &Path) -> Result<Vec<Candidate>, CandidateError> {
    let manifest: Manifest = durable::read_json(&out.join("manifest.json"))?;
    let mut all = Vec::with_capacity(manifest.candidates);
    for index in 0..manifest.chunks {
        all.extend(durable::read_json_lines(&chunk_path(out, index))?);
    }
    Ok(all)
}

fn chunk_path(out: &Path, index: usize) -> PathBuf {
    out.join(format!("chunk-{index:05}.jsonl"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_name_the_key_and_the_remedy() {
        let bad = Settings { samples_per_prompt: 1, ..Settings::default() };
        assert!(bad.validate().unwrap_err().starts_with("samples_per_prompt = 1:"));
        assert_eq!(Settings::default().validate(), Ok(()));
    }
}
