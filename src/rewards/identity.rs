//! What scores were made by: a stamp of each scorer beside a recorded score, and one hash of everything that decides a total.

use std::collections::BTreeMap;

use super::scorer::Loaded;
use super::similarity::Similarity;
use super::{Rewards, Scorer, Workload};
use crate::engine::Model;

impl Rewards {
    /// Returns version and identity of every scorer that either selection names: what a recorded score was made by.
    pub fn stamps(&self) -> BTreeMap<String, String> {
        let short = |identity: &str| blake3::hash(identity.as_bytes()).to_hex()[..16].to_owned();
        let stamp = |scorer: &Scorer| {
            let identity = match scorer {
                Scorer::Rules => serde_json::json!(self.workloads.iter().collect::<Vec<_>>()).to_string(),
                Scorer::Brevity => String::new(),
                Scorer::Similarity | Scorer::Feedback => {
                    self.similarity.get().map(Similarity::identity).unwrap_or_default()
                }
                Scorer::Defined(name) => {
                    self.defined.iter().find(|loaded| loaded.name == *name).map(Loaded::identity).unwrap_or_default()
                }
            };
            (scorer.name().to_owned(), format!("{}/{}", scorer.version(), short(&identity)))
        };
        self.settings.train.iter().chain(&self.settings.gate).map(stamp).collect()
    }

    /// Returns the hash of everything that can change any total: scorers, versions, settings, rules, weights, maps.
    pub fn identity(&self) -> String {
        self.hash(&[("train", &self.settings.train), ("gate", &self.settings.gate)])
    }

    /// Returns the hash of everything that can change the gate's total. Another hash voids an open trial.
    pub fn gate_identity(&self) -> String {
        self.hash(&[("gate", &self.settings.gate)])
    }

    fn hash(&self, selections: &[(&str, &Vec<Scorer>)]) -> String {
        fn scorers(selection: &[Scorer]) -> Vec<(&str, u32)> {
            selection.iter().map(|scorer| (scorer.name(), scorer.version())).collect()
        }
        let named = |loaded: &&Loaded| selections.iter().any(|(_, s)| s.iter().any(|s| s.name() == loaded.name));
        let defined: BTreeMap<&str, String> =
            self.defined.iter().filter(named).map(|loaded| (loaded.name.as_str(), loaded.identity())).collect();
        let embeds = [Scorer::Similarity, Scorer::Feedback];
        let embeds = selections.iter().any(|(_, scorers)| scorers.iter().any(|scorer| embeds.contains(scorer)));
        let selections: BTreeMap<&str, _> = selections.iter().map(|(name, s)| (*name, scorers(s))).collect();
        let workloads: Vec<&Workload> = self.workloads.iter().collect();
        let mut whole = serde_json::json!({
            "selections": selections,
            "lambda": self.settings.lambda,
            "reasoning": self.settings.reasoning,
            "workloads": workloads,
            "calibration": self.calibration.hash(),
            "similarity": self.similarity.get().filter(|_| embeds).map(Similarity::identity),
            "base": self.base.as_ref().map(|base| base.identity().sha256.clone()),
        });
        if !self.settings.length_corrected.is_empty() {
            whole["length_corrected"] = serde_json::json!(self.settings.length_corrected);
        }
        if let Some(device) = self.base.as_ref().and_then(Model::computed_on) {
            whole["device"] = serde_json::json!(device);
        }
        if !defined.is_empty() {
            whole["defined"] = serde_json::json!(defined);
        }
        blake3::hash(whole.to_string().as_bytes()).to_hex().to_string()
    }
}
