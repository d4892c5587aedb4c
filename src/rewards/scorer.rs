//! Scorers that an operator defines: `[[rewards.scorers]]`, each with a name and a kind.
//!
//! A defined scorer gives every answer one graded score. Its raw scores have a scale of their own: shares of [0, 1], or
//! logits, which a calibration of the same name turns into shares and the logistic function where there is none.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::classifier::{self, Classifier};
use super::{Item, RewardError};

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
}

/// Names that stand for scorers that are always there; `rules` also begins the names of their parts.
const RESERVED: [&str; 3] = ["rules", "similarity", "brevity"];

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

    /// Returns what a raw score is worth, in [0, 1], where no calibration says so.
    pub(super) fn share(self, raw: f64) -> f64 {
        match self {
            Scale::Share => raw,
            Scale::Logit => 1.0 / (1.0 + (-raw).exp()),
        }
    }
}

/// A defined scorer, ready.
pub(super) struct Loaded {
    pub(super) name: String,
    body: Body,
}

enum Body {
    Classifier(Classifier),
}

impl Loaded {
    /// Loads what a definition names.
    pub(super) fn open(definition: &Definition) -> Result<Self, RewardError> {
        let name = definition.name.clone();
        let fail = |source| RewardError::Classifier { name: name.clone(), source };
        let body = match &definition.kind {
            Kind::Classifier(settings) => Body::Classifier(Classifier::open(settings).map_err(fail)?),
        };
        Ok(Loaded { name, body })
    }

    pub(super) fn scale(&self) -> Scale {
        match &self.body {
            Body::Classifier(_) => Scale::Logit,
        }
    }

    /// Returns kind, version of the kind's definition, and whatever else decides the scores.
    pub(super) fn identity(&self) -> String {
        match &self.body {
            Body::Classifier(classifier) => format!("classifier/1/{}", classifier.identity()),
        }
    }

    /// Returns the raw score of each answer.
    pub(super) fn score(&self, items: &[&Item]) -> Result<Vec<f64>, RewardError> {
        match &self.body {
            Body::Classifier(classifier) => {
                classifier.score(items).map_err(|source| RewardError::Classifier { name: self.name.clone(), source })
            }
        }
    }
}
