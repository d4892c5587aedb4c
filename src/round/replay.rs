//! A trial made again from what is stored: the evidence from its scores, and the scores from the answers themselves.
//!
//! Answers stand in `candidates` and questions in the rounds' files, where an erasure reaches both. What was erased cannot be
//! scored again, and is named; its scores stay in the evidence, which is recomputed whole.

use std::collections::{BTreeMap, HashMap};
use std::fs;

use serde::Serialize;

use super::rows::CandidateRow;
use super::{Paths, RoundError, book};
use crate::dataset::Prompt;
use crate::durable::FileError;
use crate::gate::{StepRow, Trial, TrialRow};
use crate::record::FinishReason;
use crate::rewards::{Item, Rewards};
use crate::table::{Name, Tables};

/// How far a score made again may lie from the stored one: learned scorers compute in f32.
const TOLERANCE: f64 = 1e-5;

/// What a replay found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Replay {
    pub trial: String,
    /// Steps whose stake and wealth follow from their scores: all of them, or there is an error instead.
    pub steps: u64,
    pub ln_wealth: f64,
    /// Steps whose scores were made again from the answers.
    pub rescored: u64,
    /// Clusters whose question or answers are gone.
    pub erased: Vec<String>,
    /// Clusters whose answers score otherwise than was stored.
    pub differing: Vec<Difference>,
}

/// A score that does not follow from its answers.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Difference {
    pub cluster: String,
    pub side: &'static str,
    pub stored: f64,
    pub again: f64,
}

impl Replay {
    /// Returns true where everything that could be made again came out as stored.
    pub fn agrees(&self) -> bool {
        self.differing.is_empty()
    }

    /// Returns the finding in words, several lines.
    pub fn explain(&self) -> String {
        let mut lines = vec![format!(
            "trial {}: the evidence of {} steps follows from their scores (ln wealth {:.2}); {} were scored again from their \
             answers, {} differ",
            self.trial,
            self.steps,
            self.ln_wealth,
            self.rescored,
            self.differing.len()
        )];
        for Difference { cluster, side, stored, again } in &self.differing {
            lines.push(format!("  cluster {cluster}, {side}: stored {stored}, scored again {again}"));
        }
        if !self.erased.is_empty() {
            lines.push(format!("  erased, so not scored again: {}", self.erased.join(", ")));
        }
        lines.join("\n")
    }
}

/// Makes a trial again. `rewards` must be those that the trial was judged by.
pub async fn replay(tables: &Tables, paths: &Paths, trial: &str, rewards: &Rewards) -> Result<Replay, RoundError> {
    let rows: Vec<TrialRow> = book::read(tables, Name::Trials).await?;
    let steps: Vec<StepRow> = book::read(tables, Name::GateSteps).await?;
    let resumed = Trial::resume(trial, &rows, &steps)?;
    let (epoch, now) = (&resumed.facts().scorer_epoch, rewards.gate_identity());
    if *epoch != now {
        return Err(RoundError::OtherScorers { trial: trial.to_string(), then: epoch.clone(), now });
    }
    let wanted = format!("purpose = 'gate' and trial = '{}'", trial.replace('\'', "''"));
    let answers: Vec<CandidateRow> = tables.open_one(Name::Candidates).await?.rows(Some(&wanted)).await?;
    let mut by_side: BTreeMap<(String, String), Vec<CandidateRow>> = BTreeMap::new();
    for row in answers {
        by_side.entry((row.cluster.clone(), row.side.clone().unwrap_or_default())).or_default().push(row);
    }
    let prompts = prompts(paths)?;
    let mut out = Replay {
        trial: trial.to_string(),
        steps: resumed.steps(),
        ln_wealth: resumed.ln_wealth(),
        rescored: 0,
        erased: Vec::new(),
        differing: Vec::new(),
    };
    let samples = resumed.settings().samples as usize;
    for observation in resumed.observations() {
        let of = |side: &str| by_side.get(&(observation.cluster.clone(), side.to_string()));
        let whole = |rows: &&Vec<CandidateRow>| rows.len() == samples;
        let found = (prompts.get(&observation.prompt_hash), of("new").filter(whole), of("incumbent").filter(whole));
        let (Some(prompt), Some(new), Some(incumbent)) = found else {
            out.erased.push(observation.cluster.clone());
            continue;
        };
        out.rescored += 1;
        let sides = [("new", new, observation.new.score), ("incumbent", incumbent, observation.incumbent.score)];
        for (side, rows, stored) in sides {
            let again = score(rewards, prompt, rows)?;
            if (again - stored).abs() > TOLERANCE {
                out.differing.push(Difference { cluster: observation.cluster.clone(), side, stored, again });
            }
        }
    }
    Ok(out)
}

/// Returns the mean score of one side's answers to a prompt.
fn score(rewards: &Rewards, prompt: &Prompt, rows: &[CandidateRow]) -> Result<f64, RoundError> {
    let item = |row: &CandidateRow| Item {
        workload: prompt.workload.clone(),
        messages: prompt.messages.clone(),
        response: row.text.clone(),
        finish_reason: if row.finish_reason == FinishReason::Stop.as_str() {
            FinishReason::Stop
        } else {
            FinishReason::Length
        },
        prompt_ids: None,
        token_ids: Some(row.token_ids.clone()),
        ratings: Vec::new(),
    };
    let scored = rewards.gate(&rows.iter().map(item).collect::<Vec<_>>())?;
    Ok(scored.iter().map(|s| s.total).sum::<f64>() / scored.len().max(1) as f64)
}

/// Returns the gate prompts of all rounds that are still there. Their manifests are not asked: after an erasure they do not
/// fit, and every prompt is looked up by its own hash.
fn prompts(paths: &Paths) -> Result<HashMap<String, Prompt>, RoundError> {
    let mut found = HashMap::new();
    for round in paths.round_ids()? {
        let path = paths.round(&round).join("dataset/gate.jsonl");
        let text = match fs::read_to_string(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            result => result.map_err(|e| FileError::io("cannot read", &path, e))?,
        };
        for prompt in text.lines().filter_map(|line| serde_json::from_str::<Prompt>(line).ok()) {
            found.insert(prompt.prompt_hash.clone(), prompt);
        }
    }
    Ok(found)
}
