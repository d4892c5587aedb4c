//! What an operator sets about rewards.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{reasoning, similarity};

/// A scorer: what gives an answer one or more scores in [0, 1].
///
/// The base model's log-prob is none of them on purpose: it is the gate's independent guardrail, and a guardrail must be
/// something that the reward cannot contain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Scorer {
    /// The rules of the answer's workload: the hard ones decide whether there is any reward, the graded ones join the mean.
    Rules,
    /// How near the answer's meaning is to the question's (sentence embeddings), a guard against empty form.
    Similarity,
    /// Shortness, 1 / (1 + words / 20). A reward to be gamed: it exists to prove that the gate's guardrails refuse it.
    Brevity,
}

impl Scorer {
    /// Returns the name that the config, the scored parts and error messages use.
    pub fn name(self) -> &'static str {
        match self {
            Scorer::Rules => "rules",
            Scorer::Similarity => "similarity",
            Scorer::Brevity => "brevity",
        }
    }

    /// Returns true where the score is what was asked for, exactly, and not a learned or rough measure of it; shortness counts
    /// because it is asked for only to be refused.
    pub fn is_specification(self) -> bool {
        match self {
            Scorer::Rules | Scorer::Brevity => true,
            Scorer::Similarity => false,
        }
    }

    /// Returns the version of the scorer's definition; it grows whenever the same input may score differently.
    pub fn version(self) -> u32 {
        match self {
            Scorer::Rules | Scorer::Similarity | Scorer::Brevity => 1,
        }
    }
}

/// Settings of the rewards stage, `[rewards]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Scorers whose scores make the reward of training: any of "rules", "similarity", "brevity" (shortness, for
    /// experiments only).
    pub train: Vec<Scorer>,
    /// Scorers whose scores make the gate's score. With "rules" alone and only hard rules it is the strict pass: 1 or 0.
    pub gate: Vec<Scorer>,
    /// How much disagreement between graded scores costs: the reward is mean - lambda * standard deviation. At least 0.
    pub lambda: f64,
    /// File of frozen quantile maps for graded scores; empty = scores count as they are. Another file is another reward,
    /// so open trials become void.
    pub calibration: String,
    /// Tags around what a reasoning model thinks: trained on, not scored.
    pub reasoning: reasoning::Settings,
    /// The sentence-embedding model behind the scorer "similarity".
    pub similarity: similarity::Settings,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            train: vec![Scorer::Rules, Scorer::Similarity],
            gate: vec![Scorer::Rules],
            lambda: 0.5,
            calibration: String::new(),
            reasoning: reasoning::Settings::default(),
            similarity: similarity::Settings::default(),
        }
    }
}

impl Settings {
    /// Checks ranges; the message names the key, the value and the remedy.
    pub fn validate(&self) -> Result<(), String> {
        for (key, scorers) in [("train", &self.train), ("gate", &self.gate)] {
            if scorers.is_empty() {
                return Err(format!("{key} = []: name at least one scorer, such as \"rules\""));
            }
            let twice = scorers.iter().enumerate().find(|(place, scorer)| scorers[..*place].contains(scorer));
            if let Some((_, scorer)) = twice {
                return Err(format!("{key} names \"{}\" twice: remove one", scorer.name()));
            }
        }
        if !(self.lambda.is_finite() && self.lambda >= 0.0) {
            return Err(format!("lambda = {}: give a number of at least 0", self.lambda));
        }
        self.similarity.validate().map_err(|message| format!("similarity.{message}"))
    }

    /// Returns true where either selection names the scorer.
    pub fn uses(&self, scorer: Scorer) -> bool {
        self.train.contains(&scorer) || self.gate.contains(&scorer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(toml: &str) -> String {
        toml::from_str::<Settings>(toml).unwrap().validate().unwrap_err()
    }

    #[test]
    fn defaults_are_valid() {
        Settings::default().validate().unwrap();
        assert_eq!(toml::from_str::<Settings>("").unwrap(), Settings::default());
    }

    #[test]
    fn refusals_name_key_value_and_remedy() {
        assert_eq!(refusal("gate = []"), "gate = []: name at least one scorer, such as \"rules\"");
        assert_eq!(refusal("train = [\"rules\", \"rules\"]"), "train names \"rules\" twice: remove one");
        assert_eq!(refusal("lambda = -1.0"), "lambda = -1: give a number of at least 0");
        assert_eq!(refusal("lambda = nan"), "lambda = NaN: give a number of at least 0");
        assert!(refusal("similarity = { batch = 0 }").starts_with("similarity.batch = 0"));
        toml::from_str::<Settings>("train = [\"quality\"]").expect_err("the guardrail is no scorer");
        toml::from_str::<Settings>("lamda = 1.0").expect_err("unknown keys are refused");
    }
}
