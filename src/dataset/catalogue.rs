//! The catalogue: every distinct prompt ever placed, and what tonight's rows say of it.
//!
//! It stands in memory while a dataset is frozen, so entries are small: hashes as bytes, names as numbers, no text. An
//! entry takes 144 bytes, and 28 with its share of the map: 17 GB for 100 million distinct prompts.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use super::census::Place;
use super::workload::Workloads;
use super::{Split, WorkloadView};

/// The number of an entry that stands for none.
pub(super) const NONE: u32 = u32::MAX;

/// What was read of a prompt's text when it was placed. It depends on the text alone, so that no setting makes it old.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Facts {
    /// Characters of all messages and tools.
    pub(super) chars: u32,
    /// Why it cannot be a prompt at all: `empty` or `no_user_turn`.
    pub(super) fault: Option<String>,
    /// Kinds of secrets and personal data that it holds, separated by commas.
    pub(super) masked: Option<String>,
    /// ISO 639-3 code of the last user turn's language, where it can be told.
    pub(super) language: Option<String>,
    pub(super) has_tools: bool,
    /// What its system prompt is known by; 0 where there is none.
    pub(super) system: u64,
}

/// One prompt.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub(super) hash: [u8; 32],
    /// What was decided of it; `None` while it waits to be placed.
    pub(super) decision: Option<Decision>,
    /// The prompt it is a near duplicate of, the first of all; itself where there is none.
    pub(super) twin: u32,
    pub(super) chars: u32,
    /// Numbers of the words of its fault, its kinds of secrets and its language.
    pub(super) fault: u32,
    pub(super) masked: u32,
    pub(super) language: u32,
    pub(super) system: u64,
    pub(super) has_tools: bool,
    /// True where its sketch is in the index and its facts are of today's form.
    pub(super) is_indexed: bool,
    /// Its rows, where the log still has some.
    pub(super) rows: Option<Rows>,
}

/// Cluster and split of a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Decision {
    /// The entry of the cluster's first member.
    pub(super) cluster: u32,
    pub(super) split: Split,
}

/// The rows of a prompt.
#[derive(Debug, Clone)]
pub(super) struct Rows {
    /// Its first row that may be used, or else its first row.
    pub(super) place: Place,
    pub(super) event_time_us: i64,
    pub(super) usable: u32,
    /// The workloads that take it by what stands beside its text, as bits.
    pub(super) workloads: u64,
    /// Hash of the end user, 0 where it is not known.
    pub(super) user: u64,
    /// Number of a word.
    pub(super) tenant: u32,
    /// Hash of tenant and conversation id, 0 where it has none.
    pub(super) conversation: u64,
}

/// Names by their numbers: workloads, tenants and topics repeat in millions of rows.
#[derive(Debug, Default)]
pub(super) struct Words {
    by_name: HashMap<String, u32>,
    names: Vec<String>,
}

impl Words {
    pub(super) fn number(&mut self, name: &str) -> u32 {
        if let Some(&number) = self.by_name.get(name) {
            return number;
        }
        let number = self.names.len() as u32;
        self.by_name.insert(name.to_owned(), number);
        self.names.push(name.to_owned());
        number
    }

    pub(super) fn optional(&mut self, name: Option<&str>) -> u32 {
        name.map_or(NONE, |name| self.number(name))
    }

    /// Returns the number of a name that was seen before.
    pub(super) fn known(&self, name: &str) -> Option<u32> {
        self.by_name.get(name).copied()
    }

    /// Returns for each number the place of its name in the order of names.
    pub(super) fn ranks(&self) -> Vec<u32> {
        let mut order: Vec<u32> = (0..self.names.len() as u32).collect();
        order.sort_unstable_by_key(|number| &self.names[*number as usize]);
        let mut ranks = vec![0; order.len()];
        order.iter().enumerate().for_each(|(rank, number)| ranks[*number as usize] = rank as u32);
        ranks
    }

    pub(super) fn name(&self, number: u32) -> Option<&str> {
        self.names.get(number as usize).map(String::as_str)
    }
}

/// All prompts.
#[derive(Debug, Default)]
pub(super) struct Catalogue {
    pub(super) entries: Vec<Entry>,
    by_id: HashMap<[u8; 16], u32>,
    pub(super) words: Words,
}

/// Returns the bytes of a prompt's hash, or nothing where the text is no such hash.
pub(super) fn bytes_of(hash: &str) -> Option<[u8; 32]> {
    let mut bytes = [0; 32];
    hex::decode_to_slice(hash, &mut bytes).ok()?;
    Some(bytes)
}

/// Returns the half of a hash by which a prompt is known.
pub(super) fn id_of(hash: &[u8; 32]) -> [u8; 16] {
    std::array::from_fn(|i| hash[i])
}

impl Catalogue {
    /// Makes room for so many prompts at once: a table that grows by doubling takes twice its size.
    pub(super) fn reserve(&mut self, prompts: usize) {
        self.entries.reserve_exact(prompts);
        self.by_id.reserve(prompts);
    }

    /// Returns the entry of a prompt, which is added where it is not there.
    pub(super) fn entry(&mut self, hash: [u8; 32]) -> u32 {
        let next = self.entries.len() as u32;
        let at = *self.by_id.entry(id_of(&hash)).or_insert(next);
        if at == next {
            self.entries.push(Entry {
                hash,
                decision: None,
                twin: next,
                chars: 0,
                fault: NONE,
                masked: NONE,
                language: NONE,
                system: 0,
                has_tools: false,
                is_indexed: false,
                rows: None,
            });
        }
        at
    }

    pub(super) fn find(&self, id: &[u8; 16]) -> Option<u32> {
        self.by_id.get(id).copied()
    }

    pub(super) fn hash(&self, entry: u32) -> String {
        hex::encode(self.entries[entry as usize].hash)
    }

    /// Returns the rows of an entry.
    pub(super) fn rows(&self, entry: u32) -> Option<&Rows> {
        self.entries[entry as usize].rows.as_ref()
    }

    /// Returns the workload of an entry that was placed.
    pub(super) fn workload<'a>(&self, entry: u32, workloads: &'a Workloads) -> Option<&'a WorkloadView> {
        workloads.find(self.rows(entry)?.workloads, self.entries[entry as usize].system)
    }

    /// Keeps what was read of a prompt's text.
    pub(super) fn keep(&mut self, entry: u32, facts: &Facts) {
        let words = &mut self.words;
        let fault = words.optional(facts.fault.as_deref());
        let masked = words.optional(facts.masked.as_deref());
        let language = words.optional(facts.language.as_deref());
        let entry = &mut self.entries[entry as usize];
        (entry.fault, entry.masked, entry.language) = (fault, masked, language);
        (entry.chars, entry.has_tools, entry.system) = (facts.chars, facts.has_tools, facts.system);
        entry.is_indexed = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_takes_what_is_said_of_it() {
        assert_eq!(size_of::<Entry>(), 144);
    }
}
