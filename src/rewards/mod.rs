//! Rewards: how good an answer is, as a number in [0, 1], without labels.
//!
//! Reading order: [`rules`] are exact checks of form; [`workload`] says which rules an answer is held to; [`similarity`]
//! is the graded score that keeps answers on the question; [`scorer`] holds those that an operator defines, of which
//! [`classifier`] is a reward model; [`length`] takes out what length earns, [`calibration`] and [`ensemble`] make one number of
//! several; `draft` holds what they say meanwhile, `identity` what it was said by; [`anchors`] see a scorer that changes;
//! [`quality`] is the gate's guardrail, which no reward may contain; [`lines`] serves `taod score`.
//!
//! [`Rewards`] holds two selections of scorers: one whose total trains, one whose total the gate compares. Scorers see
//! the answer and the prompt as data. None follows instructions, so no text in a prompt can argue with it.

pub mod anchors;
mod cache;
pub mod calibration;
pub mod classifier;
pub mod command;
mod draft;
pub mod ensemble;
mod feedback;
pub mod http;
mod identity;
pub mod judge;
pub mod length;
pub mod lines;
mod margins;
pub mod platt;
mod quality;
pub mod reasoning;
pub mod remote;
pub mod rules;
pub mod scorer;
mod settings;
pub mod similarity;
mod workload;

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::OnceLock;

use calibration::{Calibration, CalibrationError};
use draft::{Draft, Effort, Graded};
use rules::text;
use scorer::{Loaded, ScorerError};
use similarity::{Similarity, SimilarityError};

use crate::engine::{EngineError, Model};
use crate::record::{FinishReason, Message, last_user_text};

pub use feedback::Rated;
pub use settings::{Scorer, Settings};
pub use workload::{NamedCheck, Workload, Workloads};

/// One answer to score.
#[derive(Debug, Clone)]
pub struct Item {
    /// The workload field of the prompt's record.
    pub workload: Option<String>,
    pub messages: Vec<Message>,
    pub response: String,
    pub finish_reason: FinishReason,
    pub prompt_ids: Option<Vec<u32>>,
    /// The answer's ids; they win over `response` where a model reads the answer.
    pub token_ids: Option<Vec<u32>>,
    /// Other answers to the same prompt that users rated.
    pub ratings: Vec<Rated>,
}

/// The reward of one answer and what it is made of.
#[derive(Debug, Clone, PartialEq)]
pub struct Scored {
    /// In [0, 1].
    pub total: f64,
    /// True where every hard check passed.
    pub passed: bool,
    /// Every score, before calibration, as `scorer` or `rules/<kind>`; that of a reward model is a logit, all others lie in
    /// [0, 1]. Where a hard rule failed, the total is 0 whatever follows, and scores that cost a forward pass are left out.
    pub parts: BTreeMap<String, f64>,
}

/// Which of the two totals is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Selection {
    Train,
    Gate,
}

/// What can go wrong with rewards. Nothing in the text of an answer can.
#[derive(Debug, thiserror::Error)]
pub enum RewardError {
    #[error("rewards.{0}")]
    Settings(String),
    #[error("workload {name:?}: {reason}")]
    Workload { name: String, reason: String },
    #[error("workload {workload:?}, rule {index} ({kind}): {reason}")]
    Rule { workload: String, index: usize, kind: &'static str, reason: String },
    #[error(
        "item {index}: workload {workload:?} has no rules; add [[workload]] with this name and rules to the config"
    )]
    NoRules { index: usize, workload: String },
    #[error("item {index}: the answer has no tokens; leave empty answers out")]
    NoTokens { index: usize },
    #[error(
        "scorer {part} gave {value} for item {index}, which is no score of its kind; its model or its calibration is damaged"
    )]
    Range { part: String, index: usize, value: f64 },
    #[error("scorer {name}: {source}")]
    Scorer { name: String, source: Box<ScorerError> },
    #[error("the quality guardrail needs the base model; load the rewards with it")]
    NoBase,
    #[error(transparent)]
    Calibration(#[from] CalibrationError),
    #[error(transparent)]
    Similarity(#[from] SimilarityError),
    #[error(transparent)]
    Engine(#[from] EngineError),
}

/// All scorers of a config, loaded.
pub struct Rewards {
    settings: Settings,
    workloads: Workloads,
    calibration: Calibration,
    similarity: OnceLock<Similarity>,
    /// Those of the definitions that a selection names.
    defined: Vec<Loaded>,
    base: Option<Model>,
}

impl Rewards {
    /// Loads what the settings name. `base` is the frozen base model that the quality guardrail reads.
    pub fn load(settings: &Settings, workloads: &[Workload], base: &Model) -> Result<Self, RewardError> {
        Ok(Rewards { base: Some(base.clone()), ..Self::open(settings, workloads, Some(base), None)? })
    }

    /// Does the same and keeps the scores of defined scorers in a folder, where later uses find them.
    pub fn keeping(
        settings: &Settings,
        workloads: &[Workload],
        base: &Model,
        folder: &Path,
    ) -> Result<Self, RewardError> {
        let rewards =
            Rewards { base: Some(base.clone()), ..Self::open(settings, workloads, Some(base), Some(folder))? };
        // Copies of one model in two places are told by their weights, which only now are known.
        let made_from = |name: &str| {
            let loaded = rewards.defined.iter().find(|loaded: &&Loaded| loaded.name == name);
            loaded.and_then(Loaded::weights).unwrap_or_else(|| settings.made_from(name))
        };
        match settings.dependent(&made_from) {
            Some(problem) => Err(RewardError::Settings(problem)),
            None => Ok(rewards),
        }
    }

    /// Loads what the settings name, for uses that never ask for [`Rewards::quality`].
    pub fn without_base(settings: &Settings, workloads: &[Workload]) -> Result<Self, RewardError> {
        Self::open(settings, workloads, None, None)
    }

    /// Judges load beside the base, where there is one: to where it computes.
    fn open(
        settings: &Settings,
        workloads: &[Workload],
        base: Option<&Model>,
        kept: Option<&Path>,
    ) -> Result<Self, RewardError> {
        settings.validate().map_err(RewardError::Settings)?;
        let calibration = match settings.calibration.as_str() {
            "" => Calibration::default(),
            path => Calibration::load(Path::new(path))?,
        };
        settings.check_lengths(&calibration).map_err(RewardError::Settings)?;
        let workloads = Workloads::compile(workloads)?;
        let settings = settings.clone();
        let used = settings.scorers.iter().filter(|d| settings.uses(&Scorer::Defined(d.name.clone())));
        let defined = used.map(|definition| Loaded::open(definition, base, kept)).collect::<Result<_, _>>()?;
        let rewards = Rewards { settings, workloads, calibration, similarity: OnceLock::new(), defined, base: None };
        if rewards.settings.uses(&Scorer::Similarity) || rewards.settings.uses(&Scorer::Feedback) {
            rewards.similarity_model()?;
        }
        Ok(rewards)
    }

    /// Returns true where a record with this workload field can be scored: its workload is known and has rules.
    pub fn covers(&self, workload: Option<&str>) -> bool {
        self.workloads.find(workload).is_some_and(|(_, rules)| !rules.is_empty())
    }

    /// Returns the workload of a record's workload field.
    pub fn workload(&self, field: Option<&str>) -> Option<&Workload> {
        self.workloads.find(field).map(|(workload, _)| workload)
    }

    /// Returns the rewards that training learns from.
    pub fn train(&self, items: &[Item]) -> Result<Vec<Scored>, RewardError> {
        self.score(&self.settings.train, items, Effort::Needed)
    }

    /// Returns the scores that the gate compares.
    pub fn gate(&self, items: &[Item]) -> Result<Vec<Scored>, RewardError> {
        self.score(&self.settings.gate, items, Effort::Needed)
    }

    /// Returns what the rules alone say, whatever the selections: the strict pass that reports count.
    pub fn strict(&self, items: &[Item]) -> Result<Vec<Scored>, RewardError> {
        self.score(&[Scorer::Rules], items, Effort::Needed)
    }

    /// Returns the scores of a selection with every part, also where a failed hard rule has settled the total.
    pub fn score_fully(&self, selection: Selection, items: &[Item]) -> Result<Vec<Scored>, RewardError> {
        self.score(self.selection(selection), items, Effort::Full)
    }

    /// Returns every graded score by its name, with the place of the answer that it belongs to, before calibration.
    pub fn graded_parts(
        &self,
        selection: Selection,
        items: &[Item],
    ) -> Result<BTreeMap<String, Vec<(usize, f64)>>, RewardError> {
        self.graded(self.selection(selection), items, Effort::Full)
    }

    /// Returns every graded score that either selection names, in the order of the answers; none comes from what was kept.
    pub fn graded_anew(&self, items: &[Item]) -> Result<BTreeMap<String, Vec<f64>>, RewardError> {
        let mut scorers = self.settings.train.clone();
        scorers.extend(self.settings.gate.iter().filter(|s| !self.settings.train.contains(s)).cloned());
        let graded = self.graded(&scorers, items, Effort::Anew)?.into_iter();
        Ok(graded.map(|(name, scores)| (name, scores.into_iter().map(|(_, raw)| raw).collect())).collect())
    }

    fn graded(
        &self,
        scorers: &[Scorer],
        items: &[Item],
        effort: Effort,
    ) -> Result<BTreeMap<String, Vec<(usize, f64)>>, RewardError> {
        let mut by_name: BTreeMap<String, Vec<(usize, f64)>> = BTreeMap::new();
        for (place, draft) in self.drafts(scorers, items, effort)?.into_iter().enumerate() {
            for Graded { part, raw, scale } in draft.graded {
                if !scale.holds(raw) {
                    return Err(RewardError::Range { part, index: place, value: raw });
                }
                by_name.entry(part).or_default().push((place, raw));
            }
        }
        Ok(by_name)
    }

    /// Returns how natural the base finds each answer to the question without the house rules: mean log-prob per token,
    /// in nats.
    pub fn quality(&self, items: &[Item]) -> Result<Vec<f64>, RewardError> {
        let base = self.base.as_ref().ok_or(RewardError::NoBase)?;
        quality::mean_logprobs(base, items, |item| self.workload(item.workload.as_deref()))
    }

    /// Returns the similarity, in [0, 1] and not calibrated, of each (question, answer).
    pub fn similarity(&self, pairs: &[(String, String)]) -> Result<Vec<f64>, RewardError> {
        Ok(self.similarity_model()?.score(pairs)?)
    }

    /// Returns the question of an item: its last user turn without the house rules.
    pub fn question(&self, item: &Item) -> String {
        let text = last_user_text(&item.messages);
        self.workload(item.workload.as_deref()).map_or(text.clone(), |workload| workload.without_house_rules(&text))
    }

    fn selection(&self, selection: Selection) -> &[Scorer] {
        match selection {
            Selection::Train => &self.settings.train,
            Selection::Gate => &self.settings.gate,
        }
    }

    fn similarity_model(&self) -> Result<&Similarity, RewardError> {
        if let Some(model) = self.similarity.get() {
            return Ok(model);
        }
        let model = Similarity::load(&self.settings.similarity)?;
        Ok(self.similarity.get_or_init(|| model))
    }

    fn score(&self, scorers: &[Scorer], items: &[Item], effort: Effort) -> Result<Vec<Scored>, RewardError> {
        let drafts = self.drafts(scorers, items, effort)?;
        let answers = self.without_thoughts(items);
        let words = answers.iter().map(|item| text::words(&item.response).count());
        let counted = drafts.into_iter().zip(words).enumerate();
        counted.map(|(index, (draft, words))| self.finish(index, words, draft)).collect()
    }

    /// Returns what a graded score of an answer of so many words is worth, in [0, 1].
    fn worth(&self, Graded { part, raw, scale }: &Graded, words: usize) -> f64 {
        let bias = self.calibration.length(part).filter(|_| self.settings.corrects_length(part));
        let score = bias.map_or(*raw, |bias| bias.correct(*raw, words));
        // Without a map a corrected share may lie a little outside.
        self.calibration.get(part, score).unwrap_or_else(|| scale.share(score).clamp(0.0, 1.0))
    }

    fn finish(&self, index: usize, words: usize, draft: Draft) -> Result<Scored, RewardError> {
        let Draft { failed, parts, graded } = draft;
        if let Some(Graded { part, raw, .. }) = graded.iter().find(|graded| !graded.scale.holds(graded.raw)) {
            return Err(RewardError::Range { part: part.clone(), index, value: *raw });
        }
        let z: Vec<f64> = graded.iter().map(|graded| self.worth(graded, words)).collect();
        Ok(Scored { total: ensemble::total(!failed, &z, self.settings.lambda), passed: !failed, parts })
    }
}
