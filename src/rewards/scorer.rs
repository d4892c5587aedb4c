//! Scorers that an operator defines: `[[rewards.scorers]]`, each with a name and a kind.
//!
//! A defined scorer gives every answer one graded score: [`super::classifier`] is a reward model, [`super::judge`] a language
//! model that is asked, [`super::remote`] a reward server, [`super::command`] a program. Its raw scores have a scale of their own: shares of [0, 1], or
//! logits, which a calibration of the same name turns into shares and the logistic function where there is none.

use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::cache::{self, ScoreCache};
use super::classifier::{self, Classifier, ClassifierError};
use super::command::{self, Command, CommandError};
use super::judge::{self, Judge, JudgeError};
use super::remote::{self, Remote, RemoteError};
use super::{Item, RewardError};
use crate::durable::FileError;
use crate::engine::Model;

/// One `[[rewards.scorers]]` of the config.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Definition {
    /// Name by which `train` and `gate` ask for it and under which its scores are recorded: lower-case letters, digits, `_`
    /// and `-`.
    pub name: String,
    #[serde(flatten)]
    pub kind: Kind,
}

/// What a defined scorer is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Kind {
    /// A reward model: sequence classification with one label, in Hugging Face's layout.
    Classifier(classifier::Settings),
    /// A language model that is asked whether an answer meets a rubric, here or at a server.
    Judge(judge::Settings),
    /// A reward server: vLLM, SGLang, text-embeddings-inference, or the plain contract.
    Remote(remote::Settings),
    /// A program that scores lines of JSON.
    Command(command::Settings),
}

impl Kind {
    /// Returns whether an answer's score is the same whatever other answers are scored beside it.
    pub(super) fn is_absolute(&self) -> bool {
        !matches!(self, Kind::Judge(settings) if settings.mode == judge::Mode::Pairwise)
    }
}

impl Kind {
    /// Returns what the scorer is made from as far as its settings say: two of the same are no two opinions, whatever rubric or
    /// cut each has.
    pub(super) fn made_from(&self) -> String {
        // A place that is not here (yet) is compared as it is written.
        let place = |path: &str| std::fs::canonicalize(path).map_or(path.to_owned(), |p| p.display().to_string());
        match self {
            Kind::Classifier(settings) if !settings.sha256.is_empty() => settings.sha256.to_lowercase(),
            Kind::Classifier(settings) => place(&settings.model),
            Kind::Judge(settings) if settings.url.is_empty() => place(&settings.model),
            Kind::Judge(settings) => format!("{} {}", settings.url, settings.model),
            Kind::Remote(settings) => format!("{} {}", settings.url, settings.model),
            Kind::Command(settings) => settings.command.join(" "),
        }
    }
}

/// Names that stand for scorers that are always there; `rules` also begins the names of their parts.
const RESERVED: [&str; 4] = ["rules", "similarity", "feedback", "brevity"];

impl Definition {
    /// Checks name and settings; the message begins with the key.
    pub fn validate(&self) -> Result<(), String> {
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '_' | '-');
        if self.name.is_empty() || !self.name.chars().all(plain) {
            return Err(format!("name = {:?}: use lower-case letters, digits, _ and -", self.name));
        }
        if RESERVED.contains(&self.name.as_str()) {
            return Err(format!("name = {:?} is taken by a scorer of taod's own: choose another", self.name));
        }
        match &self.kind {
            Kind::Classifier(settings) => settings.validate(),
            Kind::Judge(settings) => settings.validate(),
            Kind::Remote(settings) => settings.validate(),
            Kind::Command(settings) => settings.validate(),
        }
    }
}

/// What the raw scores of a scorer are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Scale {
    /// In [0, 1].
    #[default]
    Share,
    /// Any finite number; larger is better.
    Logit,
}

impl Scale {
    /// Returns true where a scorer of this scale may give the number.
    pub(super) fn holds(self, raw: f64) -> bool {
        match self {
            Scale::Share => (0.0..=1.0).contains(&raw),
            Scale::Logit => raw.is_finite(),
        }
    }

    /// Returns what a score must be, for messages.
    pub(super) fn wanted(self) -> &'static str {
        match self {
            Scale::Share => "a number in [0, 1]",
            Scale::Logit => "a finite number",
        }
    }

    /// Returns what a raw score is worth, in [0, 1], where no calibration says so.
    pub(super) fn share(self, raw: f64) -> f64 {
        match self {
            Scale::Share => raw,
            Scale::Logit => 1.0 / (1.0 + (-raw).exp()),
        }
    }
}

/// A defined scorer that gave no usable scores.
#[derive(Debug, thiserror::Error)]
pub enum ScorerError {
    #[error(transparent)]
    Classifier(#[from] ClassifierError),
    #[error(transparent)]
    Judge(#[from] JudgeError),
    #[error(transparent)]
    Remote(#[from] RemoteError),
    #[error(transparent)]
    Command(#[from] CommandError),
    #[error(transparent)]
    Cache(#[from] FileError),
}

/// Answers whose scores are asked for, and kept, at once.
const CHUNK: usize = 256;
/// Scores kept on disk for each scorer: 48 bytes each.
const KEPT: usize = 1_000_000;

/// A defined scorer, ready.
pub(super) struct Loaded {
    pub(super) name: String,
    is_absolute: bool,
    body: Body,
    cache: Mutex<Option<ScoreCache>>,
}

enum Body {
    Classifier(Box<Classifier>),
    Judge(Box<Judge>),
    Remote(Box<Remote>),
    Command(Box<Command>),
}

impl Loaded {
    /// Loads what a definition names. Scores are kept in the folder, where one is given.
    pub(super) fn open(
        definition: &Definition,
        base: Option<&Model>,
        folder: Option<&Path>,
    ) -> Result<Self, RewardError> {
        let name = definition.name.clone();
        let is_absolute = definition.kind.is_absolute();
        let body = Body::open(&name, &definition.kind, base);
        let fail = |source| RewardError::Scorer { name: name.clone(), source: Box::new(source) };
        let loaded = Loaded { name: name.clone(), is_absolute, body: body.map_err(fail)?, cache: Mutex::new(None) };
        if let Some(folder) = folder.filter(|_| is_absolute) {
            let cache = ScoreCache::open(folder, &name, &loaded.identity(), KEPT);
            *loaded.cache() = Some(cache.map_err(|e| fail(e.into()))?);
        }
        Ok(loaded)
    }

    /// Returns what the raw scores are.
    pub(super) fn scale(&self) -> Scale {
        match &self.body {
            Body::Classifier(_) => Scale::Logit,
            Body::Judge(judge) => judge.scale(),
            Body::Remote(remote) => remote.scale(),
            Body::Command(command) => command.scale(),
        }
    }

    /// Returns kind, version of the kind's definition, and whatever else decides the scores.
    pub(super) fn identity(&self) -> String {
        match &self.body {
            Body::Classifier(classifier) => format!("classifier/1/{}", classifier.identity()),
            Body::Judge(judge) => format!("judge/1/{}", judge.identity()),
            Body::Remote(remote) => format!("remote/1/{}", remote.identity()),
            Body::Command(command) => format!("command/1/{}", command.identity()),
        }
    }

    /// Returns the hash of the weights, where they were loaded here.
    pub(super) fn weights(&self) -> Option<String> {
        match &self.body {
            Body::Classifier(classifier) => Some(classifier.sha256().to_owned()),
            Body::Judge(judge) => judge.weights(),
            Body::Remote(_) | Body::Command(_) => None,
        }
    }

    /// Returns the raw score of each answer: those that are kept, and new ones for the rest, which are kept as they come.
    pub(super) fn score(&self, items: &[&Item]) -> Result<Vec<f64>, RewardError> {
        let fail = |source| RewardError::Scorer { name: self.name.clone(), source: Box::new(source) };
        if !self.is_absolute {
            return self.body.score(items).map_err(fail);
        }
        let keys: Vec<[u8; 32]> = items.iter().map(|item| cache::key(item)).collect();
        let kept = |key: &[u8; 32]| self.cache().as_ref().and_then(|cache| cache.get(key));
        let mut scores: Vec<Option<f64>> = keys.iter().map(kept).collect();
        let new: Vec<usize> = (0..items.len()).filter(|place| scores[*place].is_none()).collect();
        for places in new.chunks(CHUNK) {
            let asked: Vec<&Item> = places.iter().map(|place| items[*place]).collect();
            let found = self.body.score(&asked).map_err(fail)?;
            // What is no score is refused later, with the answer's place; it is never kept.
            let sound = places.iter().zip(&found).filter(|(_, score)| self.scale().holds(**score));
            let records: Vec<([u8; 32], f64)> = sound.map(|(place, score)| (keys[*place], *score)).collect();
            if let Some(cache) = self.cache().as_mut() {
                cache.add(&records).map_err(|e| fail(e.into()))?;
            }
            places.iter().zip(found).for_each(|(place, score)| scores[*place] = Some(score));
        }
        Ok(scores.into_iter().map(|score| score.unwrap_or(f64::NAN)).collect())
    }

    /// Returns the raw score of each answer, none from what is kept and none kept.
    pub(super) fn score_anew(&self, items: &[&Item]) -> Result<Vec<f64>, RewardError> {
        self.body
            .score(items)
            .map_err(|source| RewardError::Scorer { name: self.name.clone(), source: Box::new(source) })
    }

    /// Returns how much better the first answer of each pair is than the second, in units of the raw score.
    pub(super) fn margins(&self, pairs: &[(Item, Item)]) -> Result<Vec<f64>, RewardError> {
        if let Body::Judge(judge) = &self.body
            && !self.is_absolute
        {
            let pairs: Vec<(&Item, &Item)> = pairs.iter().map(|(a, b)| (a, b)).collect();
            return judge
                .prefer(&pairs)
                .map_err(|e| RewardError::Scorer { name: self.name.clone(), source: Box::new(e.into()) });
        }
        let items: Vec<&Item> = pairs.iter().flat_map(|(a, b)| [a, b]).collect();
        Ok(self.score(&items)?.chunks_exact(2).map(|both| both[0] - both[1]).collect())
    }

    fn cache(&self) -> MutexGuard<'_, Option<ScoreCache>> {
        // A poisoned lock only means that another caller died between two scores: each record is whole or absent.
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Body {
    fn open(name: &str, kind: &Kind, base: Option<&Model>) -> Result<Self, ScorerError> {
        Ok(match kind {
            Kind::Classifier(settings) => Body::Classifier(Box::new(Classifier::open(settings)?)),
            Kind::Judge(settings) => Body::Judge(Box::new(Judge::open(name, settings, base)?)),
            Kind::Remote(settings) => Body::Remote(Box::new(Remote::open(name, settings)?)),
            Kind::Command(settings) => Body::Command(Box::new(Command::open(settings)?)),
        })
    }

    fn score(&self, items: &[&Item]) -> Result<Vec<f64>, ScorerError> {
        Ok(match self {
            Body::Classifier(classifier) => classifier.score(items)?,
            Body::Judge(judge) => judge.score(items)?,
            Body::Remote(remote) => remote.score(items)?,
            Body::Command(command) => command.score(items)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rewards::testing::items;

    #[test]
    fn a_kept_score_is_not_paid_for_again() {
        let folder = tempfile::tempdir().unwrap();
        let runs = folder.path().join("runs");
        let script = format!("echo run >> {}; while read -r line; do echo '{{\"score\": 0.5}}'; done", runs.display());
        let definition = |version: &str| -> Definition {
            let script = serde_json::to_string(&script).unwrap();
            let command = format!("command = ['/bin/sh', '-c', {script}]");
            toml::from_str(&format!("name = 'c'\nkind = 'command'\nversion = '{version}'\n{command}")).unwrap()
        };
        let kept = folder.path().join("scores");
        let score = |version: &str, answers: &[(&str, &str)]| {
            let loaded = Loaded::open(&definition(version), None, Some(&kept)).unwrap();
            let answers = items(answers);
            loaded.score(&answers.iter().collect::<Vec<_>>()).unwrap().len()
        };
        let paid = || std::fs::read_to_string(&runs).unwrap().lines().count();
        assert_eq!((score("1", &[("q", "a"), ("q", "b")]), paid()), (2, 1));
        assert_eq!((score("1", &[("q", "b"), ("q", "a")]), paid()), (2, 1), "both are known");
        assert_eq!((score("1", &[("q", "a"), ("q", "c")]), paid()), (2, 2), "one is new");
        assert_eq!((score("2", &[("q", "a")]), paid()), (1, 3), "another version knows nothing");
    }

    #[test]
    fn a_logit_is_worth_its_logistic_and_a_share_itself() {
        assert_eq!((Scale::Logit.share(0.0), Scale::Share.share(0.25)), (0.5, 0.25));
        assert!(Scale::Logit.holds(-300.0) && !Scale::Logit.holds(f64::INFINITY) && !Scale::Share.holds(1.5));
        assert!(Scale::Logit.share(800.0) <= 1.0 && Scale::Logit.share(-800.0) >= 0.0);
    }
}
