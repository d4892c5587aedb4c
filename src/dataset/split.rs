//! Splits: how a cluster gets one, how the decision is stored, and the types that keep splits apart.

use std::collections::BTreeSet;
use std::marker::PhantomData;

use serde::{Deserialize, Serialize};

use super::{Prompt, Settings};

/// What a cluster is for, for ever.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Split {
    Train,
    Gate,
    Audit,
    /// Near clusters of different splits: used by none.
    None,
}

impl Split {
    /// Returns the split of a cluster: the first 8 bytes of its BLAKE3 hash, read as a little-endian number, modulo 100.
    pub fn of(cluster: &str, settings: &Settings) -> Split {
        let mut bytes = [0u8; 8];
        bytes.copy_from_slice(&blake3::hash(cluster.as_bytes()).as_bytes()[..8]);
        let place = u64::from_le_bytes(bytes) % 100;
        if place < u64::from(settings.train_below) {
            Split::Train
        } else if place < u64::from(settings.gate_below) {
            Split::Gate
        } else {
            Split::Audit
        }
    }
}

/// A row of the table `splits`: the decision about one prompt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SplitRow {
    pub prompt_hash: String,
    pub cluster: String,
    pub split: Split,
    /// The round that first froze the prompt.
    pub round: String,
}

/// The prompts of one split. Only this module makes them.
#[derive(Debug, Clone, PartialEq)]
pub struct SplitOf<P> {
    prompts: Vec<Prompt>,
    part: PhantomData<P>,
}

/// Marks the training split.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Train {}
/// Marks the gate's split.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gate {}
/// Marks the audit split.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Audit {}

/// Prompts that training, reward training and prompt choice may see.
pub type TrainSplit = SplitOf<Train>;
/// Prompts that the gate may spend, one per cluster.
pub type GateSplit = SplitOf<Gate>;
/// Prompts for people and for before/after tables, one per cluster; neither training nor the gate sees them.
pub type AuditSplit = SplitOf<Audit>;

impl<P> SplitOf<P> {
    pub(super) fn new(prompts: Vec<Prompt>) -> Self {
        SplitOf { prompts, part: PhantomData }
    }

    /// Returns the prompts in the order of the log.
    pub fn prompts(&self) -> &[Prompt] {
        &self.prompts
    }

    /// Iterates over the prompts in the order of the log.
    pub fn iter(&self) -> std::slice::Iter<'_, Prompt> {
        self.prompts.iter()
    }

    /// Returns the number of prompts.
    pub fn len(&self) -> usize {
        self.prompts.len()
    }

    /// Returns true where there is no prompt.
    pub fn is_empty(&self) -> bool {
        self.prompts.is_empty()
    }

    /// Returns the clusters of the prompts.
    pub fn clusters(&self) -> BTreeSet<&str> {
        self.prompts.iter().map(|prompt| prompt.cluster.as_str()).collect()
    }
}

impl<'a, P> IntoIterator for &'a SplitOf<P> {
    type Item = &'a Prompt;
    type IntoIter = std::slice::Iter<'a, Prompt>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}
