//! Splits: how a cluster gets one, how the decision is stored, and the types that keep splits apart.

use std::collections::BTreeSet;
use std::marker::PhantomData;

use serde::{Deserialize, Serialize, Serializer};

use super::catalogue::{Catalogue, Decision};
use super::place::Prepared;
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
    /// Returns the name stored in the table.
    pub fn as_str(self) -> &'static str {
        match self {
            Split::Train => "train",
            Split::Gate => "gate",
            Split::Audit => "audit",
            Split::None => "none",
        }
    }

    /// Returns the split of a stored name; one that is unknown is used by none.
    pub(super) fn named(name: &str) -> Split {
        [Split::Train, Split::Gate, Split::Audit]
            .into_iter()
            .find(|split| split.as_str() == name)
            .unwrap_or(Split::None)
    }

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

/// A row of the table `splits`: the decision about one prompt, and all that is needed to tell whether a later one belongs
/// with it. The fields are the table's columns in their order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct SplitRow {
    pub(super) prompt_hash: String,
    pub(super) cluster: String,
    pub(super) split: Split,
    /// The round that first froze the prompt.
    pub(super) round: String,
    /// Its place in the index of prompts; counts from 0 over the whole table.
    pub(super) number: i64,
    /// The first prompt that it is a near duplicate of; its own hash where there is none.
    pub(super) twin: String,
    /// Hashes that are compared, as the bits of signed numbers; 0 where there is none.
    pub(super) context: i64,
    pub(super) text: i64,
    pub(super) conversation: i64,
    pub(super) start: i64,
    pub(super) tail: i64,
    pub(super) sketch: Bytes,
    /// Characters of all messages and tools.
    pub(super) chars: i64,
    /// Why it cannot be a prompt, whatever the settings.
    pub(super) fault: Option<String>,
    /// Kinds of secrets and personal data that it holds, separated by commas.
    pub(super) masked: Option<String>,
    pub(super) language: Option<String>,
    pub(super) has_tools: bool,
    /// What its system prompt is known by, as the bits of a signed number; 0 where there is none.
    pub(super) system: i64,
    /// The version of the rules that looked for secrets.
    pub(super) scan: i64,
    pub(super) detail: Option<String>,
}

/// Bytes for a binary column.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Bytes(pub(super) Vec<u8>);

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

impl SplitRow {
    /// Returns the row of a prompt that was placed.
    pub(super) fn of(prepared: &Prepared, number: u32, catalogue: &Catalogue, round: &str) -> Self {
        let entry = &catalogue.entries[prepared.entry as usize];
        let decision = entry.decision.unwrap_or(Decision { cluster: prepared.entry, split: Split::None });
        let record = &prepared.record;
        SplitRow {
            prompt_hash: hex::encode(entry.hash),
            cluster: catalogue.hash(decision.cluster),
            split: decision.split,
            round: round.to_owned(),
            number: number.into(),
            twin: catalogue.hash(entry.twin),
            context: record.context as i64,
            text: record.text as i64,
            conversation: record.conversation as i64,
            start: record.start as i64,
            tail: record.tail as i64,
            sketch: Bytes(record.sketch.0.to_vec()),
            chars: prepared.facts.chars.into(),
            fault: prepared.facts.fault.clone(),
            masked: prepared.facts.masked.clone(),
            language: prepared.facts.language.clone(),
            has_tools: prepared.facts.has_tools,
            system: prepared.facts.system as i64,
            scan: super::secrets::VERSION,
            detail: None,
        }
    }
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
