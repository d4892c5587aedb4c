//! What an operator may set about datasets.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How a dataset is made from the log. Split boundaries bind only prompts that were never frozen before.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Clusters whose hash modulo 100 lies below this train. Whole number, 1 to 98.
    pub train_below: u8,
    /// Clusters from `train_below` up to below this serve the gate; the rest is the audit. Whole number, above
    /// `train_below`, at most 99.
    pub gate_below: u8,
    /// Jaccard similarity of character 5-grams from which two prompts are near duplicates. 0.5 to 1.
    pub near_duplicate: f64,
    /// MinHash bands of the near-duplicate search. 1 to 256; more find more and cost memory.
    pub minhash_bands: usize,
    /// MinHash values per band. 1 to 16; more make a band stricter. With 32 bands of 4, a pair of similarity 0.7 is
    /// found with probability 0.9998, one of 0.8 with 1 - 5e-8.
    pub minhash_rows: usize,
    /// Lines that more than this share of a workload's prompts carry are a template and are not compared. 0 to 1.
    pub shared_line_share: f64,
    /// A line is a template only where at least this many prompts carry it: fewer are more likely near duplicates of
    /// one another, which stripping would hide. Whole number, at least 2.
    pub shared_line_min: usize,
    /// Longest prompt in characters of all its messages and tools; longer ones are left out as `too_long`. At least 1.
    pub max_prompt_chars: usize,
    /// Days of the log to use, counted back from the newest ingested day. 0 = all. Older rows still keep their
    /// near duplicates out of other splits.
    pub lookback_days: u32,
    /// Most prompts that one round trains on, drawn with the round's seed. 0 = no limit.
    pub max_train_prompts: usize,
    /// Fewest training prompts; a round with fewer is skipped. At least 1.
    pub min_train_prompts: usize,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            train_below: 80,
            gate_below: 95,
            near_duplicate: 0.7,
            minhash_bands: 32,
            minhash_rows: 4,
            shared_line_share: 0.01,
            shared_line_min: 10,
            max_prompt_chars: 32_000,
            lookback_days: 0,
            max_train_prompts: 2000,
            min_train_prompts: 32,
        }
    }
}

impl Settings {
    /// Checks ranges; the message names the key, the value and what to write instead.
    pub fn validate(&self) -> Result<(), String> {
        let check = |holds: bool, message: String| if holds { Ok(()) } else { Err(message) };
        let between = |name: &str, value: f64, low: f64, high: f64| {
            let message = format!("{name} is {value}: give a number from {low} to {high}");
            check((low..=high).contains(&value), message)
        };
        between("train_below", self.train_below.into(), 1.0, 98.0)?;
        check(
            self.gate_below > self.train_below && self.gate_below <= 99,
            format!(
                "gate_below is {}: give a number above train_below ({}), at most 99",
                self.gate_below, self.train_below
            ),
        )?;
        between("near_duplicate", self.near_duplicate, 0.5, 1.0)?;
        between("minhash_bands", self.minhash_bands as f64, 1.0, 256.0)?;
        between("minhash_rows", self.minhash_rows as f64, 1.0, 16.0)?;
        between("shared_line_share", self.shared_line_share, 0.0, 1.0)?;
        let at_least = |name: &str, value: usize, low: usize| {
            check(value >= low, format!("{name} is {value}: give a whole number of at least {low}"))
        };
        at_least("shared_line_min", self.shared_line_min, 2)?;
        at_least("max_prompt_chars", self.max_prompt_chars, 1)?;
        at_least("min_train_prompts", self.min_train_prompts, 1)?;
        check(
            self.max_train_prompts == 0 || self.max_train_prompts >= self.min_train_prompts,
            format!(
                "max_train_prompts is {}, below min_train_prompts ({}): raise it, or give 0 for no limit",
                self.max_train_prompts, self.min_train_prompts
            ),
        )
    }
}
