//! Synthetic inputs: prompts made from logged ones, where a workload has too few to train on.
//!
//! TAO needs inputs only, and where there are few it makes more of the same kind (Databricks 2025: "generated
//! synthetically"). The model is shown a few logged prompts of one workload and writes the next one (Wang et al. 2023,
//! Self-Instruct). A child is marked by its sources, stands in the cluster of the first of them, and is recorded in `splits`
//! like any prompt, so that a logged one near it joins the training split instead of judging what was trained on its like. The
//! gate and the audit never see one: their types are made from the log alone, and sources come from the training split.
//!
//! Reading order: [`needs`] (how many are wanted), [`asks()`] (what the model is asked), [`Draft`] (what it wrote), `admit`
//! (which are new, and where they belong).

mod admit;
mod asks;
mod explain;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{DatasetError, Prompt, TrainSplit};
use crate::durable;

pub use admit::{Admission, admit, children, resume, store};
pub use asks::{Ask, AskLine, asks};
pub use explain::{Explained, told};

pub(super) const MANIFEST: &str = "manifest.json";
pub(super) const PROMPTS: &str = "prompts.jsonl";

/// How prompts are made where a workload has too few.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Training prompts of a workload below which more are made from those that it has, by what draws the candidates
    /// (`candidates.remote`, or this machine). 0 = never.
    pub below: usize,
    /// The largest share of made prompts among a workload's training prompts, above 0 and at most 0.9.
    pub share: f64,
    /// Logged prompts that are shown for each one that is made. Range 1 to 16.
    pub examples: usize,
    /// How often what is still missing is asked for. Range 1 to 10.
    pub waves: usize,
    /// Most tokens of a made prompt; one that is cut there is dropped. At least 1.
    pub max_tokens: usize,
    /// Sampling temperature, above 0 and at most 2.
    pub temperature: f64,
}

impl Default for Settings {
    fn default() -> Self {
        Settings { below: 0, share: 0.5, examples: 4, waves: 3, max_tokens: 256, temperature: 1.0 }
    }
}

impl Settings {
    /// Checks ranges; the message names the key, the value and what to write instead.
    pub fn validate(&self) -> Result<(), String> {
        let (share, temperature) = (self.share, self.temperature);
        if !(share > 0.0 && share <= 0.9) {
            return Err(format!("share is {share}: give a number above 0 and at most 0.9"));
        }
        if !(temperature > 0.0 && temperature <= 2.0) {
            return Err(format!("temperature is {temperature}: give a number above 0 and at most 2"));
        }
        let ranges = [
            ("examples", self.examples, 1, 16),
            ("waves", self.waves, 1, 10),
            ("max_tokens", self.max_tokens, 1, 1 << 20),
        ];
        match ranges.into_iter().find(|(_, value, low, high)| !(low..=high).contains(&value)) {
            Some((key, value, low, high)) => Err(format!("{key} is {value}: give a whole number from {low} to {high}")),
            None => Ok(()),
        }
    }
}

/// What a workload lacks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Need {
    pub workload: String,
    /// Training prompts that it has.
    pub logged: usize,
    /// Prompts to be made.
    pub wanted: usize,
}

/// Returns what each workload lacks of training prompts, of those that `usable` holds for.
pub fn needs(train: &TrainSplit, settings: &Settings, usable: impl Fn(&Prompt) -> bool) -> Vec<Need> {
    let mut logged: BTreeMap<&str, usize> = BTreeMap::new();
    for workload in train.iter().filter(|prompt| usable(prompt)).filter_map(|prompt| prompt.workload.as_deref()) {
        *logged.entry(workload).or_default() += 1;
    }
    let need = |(workload, logged): (&str, usize)| {
        // A hair more than the quotient, so that a share of 0.5 of ten is ten.
        let most = (logged as f64 * settings.share / (1.0 - settings.share) + 1e-9).floor() as usize;
        let wanted = settings.below.saturating_sub(logged).min(most);
        (wanted > 0).then(|| Need { workload: workload.to_owned(), logged, wanted })
    };
    logged.into_iter().filter_map(need).collect()
}

/// What a model wrote, not yet looked at.
#[derive(Debug, Clone, PartialEq)]
pub enum Draft {
    /// A prompt of the log's form, with its sources.
    Prompt(Box<Prompt>),
    /// Nothing that can be one.
    Dropped { workload: String, reason: &'static str },
}

/// All that was written for a round.
#[derive(Debug, Clone, Default)]
pub struct Drafts {
    pub drafts: Vec<Draft>,
    pub tokens: u64,
}

/// What was made for one workload.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Made {
    pub logged: u64,
    pub wanted: u64,
    pub made: u64,
    /// Texts that were drawn and are no prompt, by reason.
    pub dropped: BTreeMap<String, u64>,
}

/// What stands in the folder of a complete stage.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    pub round: String,
    pub seed: u64,
    pub settings: Settings,
    /// Hash of the dataset whose training split it extends.
    pub dataset: String,
    pub prompts: u64,
    /// Tokens that were drawn for them.
    pub tokens: u64,
    pub workloads: BTreeMap<String, Made>,
    pub sha256: String,
}

/// Returns what was made for a round, without its prompts; nothing where `out` holds no complete stage.
pub fn peek(out: &Path) -> Result<Option<Manifest>, DatasetError> {
    match durable::read_json(&out.join(MANIFEST)) {
        Err(error) if error.is_not_found() => Ok(None),
        read => Ok(Some(read?)),
    }
}

/// Reads the prompts that were made and returns the training split with them. Each must come from prompts of that split and
/// stand in the cluster of one.
pub fn extended(out: &Path, train: &TrainSplit) -> Result<TrainSplit, DatasetError> {
    let Some(manifest) = peek(out)? else { return Ok(train.clone()) };
    let path = out.join(PROMPTS);
    let found = durable::sha256_file(&path)?;
    if found != manifest.sha256 {
        return Err(DatasetError::Changed { path, expected: manifest.sha256, found });
    }
    let made: Vec<Prompt> = durable::read_json_lines(&path)?;
    let clusters = train.clusters();
    let logged: BTreeSet<&str> = train.iter().map(|prompt| prompt.prompt_hash.as_str()).collect();
    let is_child = |prompt: &Prompt| {
        let known = |source: &String| logged.contains(source.as_str());
        clusters.contains(prompt.cluster.as_str()) && !prompt.sources.is_empty() && prompt.sources.iter().all(known)
    };
    if let Some(stray) = made.iter().find(|prompt| !is_child(prompt)) {
        return Err(DatasetError::Orphan { path, prompt: stray.prompt_hash.clone() });
    }
    Ok(TrainSplit::new(train.iter().cloned().chain(made).collect()))
}
