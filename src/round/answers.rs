//! The answers that a round drew or a trial judged, read back from the table `candidates` for people.
//!
//! Ids come from a request, so they are checked to be ids before they go into a query.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Paths, RoundError};
use crate::dataset::{self, Prompt};
use crate::table::{Name, TableError, Tables};

/// Whose answers are meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Of {
    /// Those that a round trained on.
    Round(String),
    /// Those of both sides of a trial.
    Trial(String),
}

/// All answers to one prompt, in numbers.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct PromptSummary {
    pub prompt_hash: String,
    pub workload: Option<String>,
    pub answers: u64,
    pub mean: Option<f64>,
    pub best: Option<f64>,
    pub worst: Option<f64>,
    pub passed: u64,
}

/// One answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// The training pass, from 1.
    pub iteration: Option<i32>,
    /// `new` or `incumbent`, in a trial.
    pub side: Option<String>,
    pub sample: i32,
    pub sampler: Option<String>,
    pub strategy: Option<String>,
    pub text: String,
    pub finish_reason: String,
    pub rewards: Option<BTreeMap<String, f64>>,
    pub total: Option<f64>,
    pub passed: Option<bool>,
}

/// How many answers of one group have a reward in one twentieth of [0, 1].
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Bin {
    /// The training pass.
    pub iteration: i32,
    /// From 0 (rewards below 0.05) to 19 (rewards of 0.95 and more).
    pub bin: i64,
    pub answers: u64,
}

/// The rewards of a round's last pass.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
pub struct Rewards {
    pub answers: u64,
    pub mean: f64,
    /// The share that passed every hard rule.
    pub passed: f64,
    /// Mean over prompts of the best answer.
    pub best: f64,
}

/// Number of bins of [`Bin`].
pub const BINS: usize = 20;

impl Of {
    fn condition(&self) -> Option<String> {
        let (column, id) = match self {
            Of::Round(id) => ("round", id),
            Of::Trial(id) => ("trial", id),
        };
        is_id(id).then(|| format!("{column} = '{id}'"))
    }
}

/// Returns the prompts that have answers, those with the widest spread of rewards first, at most `limit` after `skip`.
pub async fn prompts(tables: &Tables, of: &Of, limit: usize, skip: usize) -> Result<Vec<PromptSummary>, TableError> {
    let (Some(table), Some(condition)) = (tables.open_existing(Name::Candidates).await?, of.condition()) else {
        return Ok(Vec::new());
    };
    let sql = format!(
        "select prompt_hash, min(workload) as workload, count(*) as answers, avg(total) as mean, max(total) as best, \
         min(total) as worst, sum(case when passed then 1 else 0 end) as passed from t where {condition} \
         group by prompt_hash order by max(total) - min(total) desc, prompt_hash limit {limit} offset {skip}"
    );
    table.select(&sql).await
}

/// Returns the answers to one prompt, in the order of pass, side and sample.
pub async fn answers(tables: &Tables, of: &Of, prompt_hash: &str) -> Result<Vec<Answer>, TableError> {
    let (Some(table), Some(condition)) = (tables.open_existing(Name::Candidates).await?, of.condition()) else {
        return Ok(Vec::new());
    };
    if !is_id(prompt_hash) {
        return Ok(Vec::new());
    }
    let sql = format!(
        "select iteration, side, sample, sampler, strategy, text, finish_reason, rewards, total, passed from t \
         where {condition} and prompt_hash = '{prompt_hash}' order by iteration, side, sample limit 512"
    );
    table.select(&sql).await
}

/// Returns how the rewards of a round's answers are distributed, by pass.
pub async fn distribution(tables: &Tables, round: &str) -> Result<Vec<Bin>, TableError> {
    let of = Of::Round(round.to_string());
    let (Some(table), Some(condition)) = (tables.open_existing(Name::Candidates).await?, of.condition()) else {
        return Ok(Vec::new());
    };
    let sql = format!(
        "select iteration, cast(least(floor(total * {BINS}), {}) as bigint) as bin, count(*) as answers from t \
         where {condition} and iteration is not null and total is not null group by 1, 2 order by 1, 2",
        BINS - 1
    );
    table.select(&sql).await
}

/// Returns the rewards of a round's last pass in numbers; nothing where it drew no answer.
pub async fn summary(tables: &Tables, round: &str) -> Result<Option<Rewards>, TableError> {
    let of = Of::Round(round.to_string());
    let (Some(table), Some(condition)) = (tables.open_existing(Name::Candidates).await?, of.condition()) else {
        return Ok(None);
    };
    let last = format!("select max(iteration) from t where {condition}");
    let groups = format!(
        "select count(*) as n, sum(total) as score, sum(case when passed then 1 else 0 end) as passed, max(total) as best \
         from t where {condition} and total is not null and iteration = ({last}) group by prompt_hash"
    );
    let sql = format!(
        "select sum(n) as answers, sum(score) / sum(n) as mean, 1.0 * sum(passed) / sum(n) as passed, avg(best) as best \
         from ({groups}) having count(*) > 0"
    );
    Ok(table.select(&sql).await?.pop())
}

/// Returns a prompt that a round trained on or a trial judged: the newest dataset that holds it. Audit prompts are not looked
/// for: nobody has seen them, and that is what they are for.
pub fn prompt(paths: &Paths, prompt_hash: &str, newest: usize) -> Result<Option<Prompt>, RoundError> {
    for id in paths.round_ids()?.iter().rev().take(newest) {
        let folder = paths.round(id).join("dataset");
        if dataset::peek(&folder)?.is_none() {
            continue;
        }
        let dataset = dataset::load(&folder)?;
        let train = dataset::synthetic::extended(&paths.round(id).join(super::SYNTHETIC), &dataset.train)?;
        let all = train.prompts().iter().chain(dataset.gate.prompts());
        if let Some(found) = all.into_iter().find(|prompt| prompt.prompt_hash == prompt_hash) {
            return Ok(Some(found.clone()));
        }
    }
    Ok(None)
}

/// Returns true for what taod itself gives as an id: nothing that could end a text in SQL.
fn is_id(id: &str) -> bool {
    (1..=128).contains(&id.len()) && id.chars().all(|c| c.is_ascii_alphanumeric() || "-_.:/".contains(c))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_ids_come_into_a_query() {
        assert_eq!(Of::Round("round-00001".into()).condition().as_deref(), Some("round = 'round-00001'"));
        for id in ["", "x' or '1'='1", "a b", "a\nb", "ä", "a;b", "a\\"] {
            assert_eq!(Of::Trial(id.into()).condition(), None, "{id:?}");
        }
    }
}
