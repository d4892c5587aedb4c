//! What an operator may set about datasets.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::secrets;
use super::sketch::WIDTH;
use crate::table::{Name, Selection};

/// How a dataset is made from the log. Split boundaries bind only prompts that were never frozen before.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Clusters whose hash modulo 100 lies below this train. Whole number, 1 to 98.
    pub train_below: u8,
    /// Clusters from `train_below` up to below this serve the gate; the rest is the audit. Whole number, above
    /// `train_below`, at most 99.
    pub gate_below: u8,
    /// Jaccard similarity of character 5-grams, estimated to 0.03, from which two prompts are near duplicates. 0.5 to 1.
    pub near_duplicate: f64,
    /// MinHash bands of the near-duplicate search. 1 to 256; more find more and cost disk, 8 bytes a prompt each.
    pub minhash_bands: usize,
    /// MinHash values per band. 1 to 16, at most 256 in all bands together; more make a band stricter. With 32 bands
    /// of 4, a pair of similarity 0.7 is looked at with probability 0.9998, one of 0.8 with 1 - 5e-8.
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
    /// Which calls may be used at all: an SQL expression over the columns of `queries` (docs/tables.md), such as
    /// `model like 'llama%' and status = 200`. Nothing that looks at the clock or draws lots. Empty: all.
    pub filter: String,
    /// Kinds of secrets and personal data that may train all the same, such as `["email"]`; docs/dataset.md lists them.
    pub allow_kinds: Vec<String>,
    /// Calls of one end user in one hour past which all of that hour are quarantined. 0 = no limit.
    pub max_user_hour: u32,
    /// Hashes (`queries.user_hash`) of users who are not quarantined, however much they send.
    pub released_users: Vec<String>,
    /// Most prompts of one end user in each split of a round. 0 = no limit.
    pub max_user_prompts: usize,
    /// Hours before the newest call in which nothing trains, so that the gate also sees traffic that is newer than all
    /// that was trained on; such prompts are marked. 0 = the newest train too. Range 0 to 8760.
    pub forward_hours: u32,
    /// How evenly a round's places are shared among kinds of traffic (workload, tenant, with or without tools): 0 as the
    /// traffic is, 1 all alike.
    pub balance: f64,
    /// Share of a round's places for prompts of earlier rounds, against forgetting. 0 to 1.
    pub replay_share: f64,
    /// Most prompts that one round trains on: of clusters that never trained first, then new ones, then those whose
    /// answers differed most in reward, the rest by lot. 0 = no limit.
    pub max_train_prompts: usize,
    /// Most prompts that the gate, and most that the audit, get of one round: the newest. At least 1.
    pub max_held_prompts: usize,
    /// Fewest training prompts; a round with fewer is skipped. At least 1.
    pub min_train_prompts: usize,
    /// Prompts that are made where a workload has too few to train on.
    pub synthetic: super::synthetic::Settings,
    /// The alarm that tonight's prompts are not like those of the rounds before.
    pub population: super::population::Settings,
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
            filter: String::new(),
            allow_kinds: Vec::new(),
            max_user_hour: 1000,
            released_users: Vec::new(),
            max_user_prompts: 200,
            forward_hours: 0,
            balance: 0.5,
            replay_share: 0.1,
            max_train_prompts: 2000,
            max_held_prompts: 20_000,
            min_train_prompts: 32,
            synthetic: super::synthetic::Settings::default(),
            population: super::population::Settings::default(),
        }
    }
}

/// Functions whose value changes while nothing in the log does.
const VOLATILE: [&str; 6] = ["now", "random", "uuid", "current_date", "current_time", "current_timestamp"];

impl Settings {
    /// Checks that the filter is one expression over the columns, and always says the same of a row.
    fn validate_filter(&self) -> Result<(), String> {
        let filter = self.filter.trim();
        if filter.is_empty() {
            return Ok(());
        }
        let lower = filter.to_lowercase();
        let is_word = |c: char| c.is_alphanumeric() || c == '_';
        if let Some(word) = lower.split(|c| !is_word(c)).find(|word| VOLATILE.contains(word)) {
            return Err(format!(
                "filter asks for {word}: a dataset must not depend on the clock or on chance; leave it out"
            ));
        }
        match Selection::parse(Name::Queries.spec(), filter) {
            Ok(_) => Ok(()),
            Err(error) => Err(format!("filter is no condition over table queries: {error}")),
        }
    }

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
        check(
            self.minhash_bands * self.minhash_rows <= WIDTH,
            format!(
                "minhash_rows is {}, with {} bands more than {WIDTH} values: give at most {}",
                self.minhash_rows,
                self.minhash_bands,
                WIDTH / self.minhash_bands
            ),
        )?;
        between("shared_line_share", self.shared_line_share, 0.0, 1.0)?;
        let at_least = |name: &str, value: usize, low: usize| {
            check(value >= low, format!("{name} is {value}: give a whole number of at least {low}"))
        };
        at_least("shared_line_min", self.shared_line_min, 2)?;
        at_least("max_prompt_chars", self.max_prompt_chars, 1)?;
        between("balance", self.balance, 0.0, 1.0)?;
        between("replay_share", self.replay_share, 0.0, 1.0)?;
        between("forward_hours", self.forward_hours.into(), 0.0, 8760.0)?;
        self.validate_filter()?;
        if let Some(kind) = self.allow_kinds.iter().find(|kind| !secrets::is_kind(kind)) {
            let known: Vec<&str> = secrets::all_kinds().collect();
            return Err(format!("allow_kinds holds {kind:?}: give any of {}", known.join(", ")));
        }
        self.synthetic.validate().map_err(|problem| format!("synthetic.{problem}"))?;
        self.population.validate()?;
        at_least("max_held_prompts", self.max_held_prompts, 1)?;
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
