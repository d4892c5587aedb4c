//! A language model as a judge: how much likelier it says yes than no when asked whether an answer meets a rubric.
//!
//! The score is ln p(yes) - ln p(no) of the first word of its reply, from one forward pass and without sampling. Pairwise, it
//! is asked which of two answers to one prompt is better, in both orders, whose mean takes out the judge's liking for the
//! first place; an answer's score is then the mean chance against a few others of its group, which makes it worth nothing
//! for the gate, whose scores must not depend on their company. What is judged is fenced in ([`prompt`]); how well the fence
//! holds is measured by `taod reward injections`, not promised.

mod backend;
mod prompt;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use self::backend::{Backend, Choice};
use self::prompt::Material;
use super::Item;
use super::http::{Asking, HttpError, check_url};
use super::scorer::Scale;
use crate::engine::{EngineError, Model};
use crate::record::Message;

const YES_NO: Choice = Choice { first: &["yes", "Yes", " yes", " Yes"], second: &["no", "No", " no", " No"] };
const A_B: Choice = Choice { first: &["A", " A"], second: &["B", " B"] };
/// The fewest characters of a text that are still shown where a model's context is short.
const FEWEST: usize = 64;

/// A judge and what it judges by.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// The judging model: a folder, a `.gguf` file or a hub id; at a server, its name there.
    pub model: String,
    /// Address of an OpenAI-compatible server that tells `top_logprobs`, such as `http://gpu-1:8000`; empty: the model runs
    /// here.
    #[serde(default)]
    pub url: String,
    /// What a good answer is, in one or a few sentences.
    pub rubric: String,
    /// How it is asked.
    #[serde(default)]
    pub mode: Mode,
    /// Pairwise: how many other answers to the same prompt each one is compared with. Range 1 to 16.
    #[serde(default = "default_opponents")]
    pub opponents: usize,
    /// Characters of a question, and of an answer, that the judge is shown; of a longer one the middle is left out. Range 64
    /// to 1000000.
    #[serde(default = "default_chars")]
    pub max_chars: usize,
    /// A text that names what the server runs; another one is another reward. Required with `url`.
    #[serde(default)]
    pub version: String,
    /// How the server is asked.
    #[serde(default)]
    pub asking: Asking,
}

fn default_opponents() -> usize {
    2
}

fn default_chars() -> usize {
    6000
}

/// How a judge is asked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// Whether an answer meets the rubric: the score is a logit.
    #[default]
    Pointwise,
    /// Which of two answers to a prompt meets it better: the score is the chance against the others. For training only.
    Pairwise,
}

impl Settings {
    /// Checks every key; the message names key, value and remedy.
    pub fn validate(&self) -> Result<(), String> {
        if self.model.is_empty() {
            return Err("model is empty: name the judging model".into());
        }
        if self.rubric.trim().is_empty() {
            return Err("rubric is blank: say in a sentence what a good answer is".into());
        }
        if !self.url.is_empty() {
            check_url(&self.url)?;
            if self.version.is_empty() {
                return Err("version is empty: name the model and revision that the server runs".into());
            }
        }
        if !(1..=16).contains(&self.opponents) {
            return Err(format!("opponents = {}: choose 1 to 16", self.opponents));
        }
        if !(FEWEST..=1_000_000).contains(&self.max_chars) {
            return Err(format!("max_chars = {}: choose {FEWEST} to 1000000", self.max_chars));
        }
        self.asking.validate().map_err(|message| format!("asking.{message}"))
    }
}

/// A judge that cannot judge.
#[derive(Debug, thiserror::Error)]
pub enum JudgeError {
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    Http(#[from] HttpError),
    #[error(
        "{url} tells no logprobs of its first token; use a server that gives top_logprobs (vLLM, SGLang, llama.cpp)"
    )]
    NoLogprobs { url: String },
}

/// A loaded judge.
pub struct Judge {
    settings: Settings,
    backend: Backend,
}

impl Judge {
    /// Loads the model, to where the base computes if one is given, or makes the client of its server. `name` is the scorer's.
    pub fn open(name: &str, settings: &Settings, base: Option<&Model>) -> Result<Self, JudgeError> {
        Ok(Judge { settings: settings.clone(), backend: Backend::open(name, settings, base)? })
    }

    pub(super) fn scale(&self) -> Scale {
        match self.settings.mode {
            Mode::Pointwise => Scale::Logit,
            Mode::Pairwise => Scale::Share,
        }
    }

    /// Returns the hash of the weights, where they are here.
    pub(super) fn weights(&self) -> Option<String> {
        self.backend.weights()
    }

    /// Returns what decides the scores as far as can be known from here.
    pub fn identity(&self) -> String {
        let Settings { rubric, mode, opponents, max_chars, version, .. } = &self.settings;
        json!([prompt::VERSION, self.backend.identity(version), rubric, mode, opponents, max_chars]).to_string()
    }

    /// Returns the raw score of each answer.
    pub fn score(&self, items: &[&Item]) -> Result<Vec<f64>, JudgeError> {
        match self.settings.mode {
            Mode::Pointwise => {
                let ask = |item: &&Item| self.fitting(item, |material| material.ask_one(&item.response));
                let prompts: Vec<Message> = items.iter().map(ask).collect::<Result<_, _>>()?;
                self.backend.log_odds(&prompts, &YES_NO)
            }
            Mode::Pairwise => self.chances(items),
        }
    }

    /// Returns how much better the judge finds the first answer of each pair to the first's prompt, as log-odds: the mean
    /// of both orders.
    pub fn prefer(&self, pairs: &[(&Item, &Item)]) -> Result<Vec<f64>, JudgeError> {
        let mut prompts = Vec::with_capacity(2 * pairs.len());
        for (first, second) in pairs {
            prompts.push(self.fitting(first, |material| material.ask_two(&first.response, &second.response))?);
            prompts.push(self.fitting(first, |material| material.ask_two(&second.response, &first.response))?);
        }
        let odds = self.backend.log_odds(&prompts, &A_B)?;
        Ok(odds.chunks_exact(2).map(|both| (both[0] - both[1]) / 2.0).collect())
    }

    /// Compares each answer with the next ones of its group and returns its mean chance; alone it is one half.
    fn chances(&self, items: &[&Item]) -> Result<Vec<f64>, JudgeError> {
        let mut groups: BTreeMap<String, Vec<usize>> = BTreeMap::new();
        for (place, item) in items.iter().enumerate() {
            groups.entry(serde_json::to_string(&item.messages).unwrap_or_default()).or_default().push(place);
        }
        let rounds: Vec<(usize, usize)> =
            groups.values().flat_map(|group| opponents(group, self.settings.opponents)).collect();
        let pairs: Vec<(&Item, &Item)> = rounds.iter().map(|(a, b)| (items[*a], items[*b])).collect();
        let mut sums = vec![(0.0, 0.0); items.len()];
        for ((a, b), odds) in rounds.iter().zip(self.prefer(&pairs)?) {
            let chance = 1.0 / (1.0 + (-odds).exp());
            for (place, won) in [(*a, chance), (*b, 1.0 - chance)] {
                sums[place].0 += won;
                sums[place].1 += 1.0;
            }
        }
        Ok(sums.into_iter().map(|(won, met)| if met > 0.0 { won / met } else { 0.5 }).collect())
    }

    /// Writes a prompt that the model reads whole, showing less of the material until it does.
    fn fitting(&self, item: &Item, ask: impl Fn(&Material) -> Message) -> Result<Message, JudgeError> {
        let question = prompt::question(item);
        let mut most = self.settings.max_chars;
        loop {
            let message = ask(&Material { rubric: &self.settings.rubric, question: &question, most });
            if most <= FEWEST || self.backend.fits(&message)? {
                return Ok(message);
            }
            most = (most / 2).max(FEWEST);
        }
    }
}

/// Returns who meets whom in a group: each the next few, in a ring, each pair once.
fn opponents(group: &[usize], most: usize) -> Vec<(usize, usize)> {
    let n = group.len();
    let met = |at: usize, step: usize| (group[at], group[(at + step) % n]);
    let mut rounds: Vec<(usize, usize)> =
        (1..=most.min(n.saturating_sub(1))).flat_map(|step| (0..n).map(move |at| met(at, step))).collect();
    let mut seen = std::collections::BTreeSet::new();
    rounds.retain(|(a, b)| seen.insert((*a.min(b), *a.max(b))));
    rounds
}
