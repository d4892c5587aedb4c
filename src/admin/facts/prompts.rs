//! Prompts with their answers and scores: in numbers for whoever sees figures, in words for a role.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{FactError, Facts};
use crate::json::Value;
use crate::round::answers::{self, Of};

/// Rounds whose datasets are looked through for a prompt.
const ROUNDS: usize = 50;

/// Whose prompts, and how many.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(in super::super) struct Which {
    /// A round: the prompts that it trained on.
    pub(in super::super) round: Option<String>,
    /// A trial: the prompts that it judged. Either this or `round` is given.
    pub(in super::super) trial: Option<String>,
    /// The most items, 1 to 500.
    #[serde(default = "super::fifty", deserialize_with = "super::items")]
    #[schemars(range(min = 1, max = 500))]
    pub(in super::super) limit: u16,
    /// How many to pass over, up to 100000.
    #[serde(default, deserialize_with = "skipped")]
    #[schemars(range(min = 0, max = 100000))]
    pub(in super::super) skip: u32,
}

/// Reads how many are passed over, likewise.
fn skipped<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    let skip = u32::deserialize(deserializer)?;
    match skip <= 100_000 {
        true => Ok(skip),
        false => Err(serde::de::Error::custom(format!("skip is {skip}: give up to 100000"))),
    }
}

impl Which {
    fn of(&self) -> Result<Of, FactError> {
        match (&self.round, &self.trial) {
            (Some(round), None) => Ok(Of::Round(round.clone())),
            (None, Some(trial)) => Ok(Of::Trial(trial.clone())),
            _ => Err(FactError::Missing("give either round or trial: whose prompts are meant".into())),
        }
    }
}

/// A prompt in numbers.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub(in super::super) struct Prompt {
    pub(in super::super) prompt_hash: String,
    pub(in super::super) workload: Option<String>,
    pub(in super::super) answers: u64,
    /// Answers that passed every hard rule.
    pub(in super::super) passed: u64,
    pub(in super::super) mean: Option<f64>,
    pub(in super::super) best: Option<f64>,
    pub(in super::super) worst: Option<f64>,
}

/// A prompt with its text and its answers.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub(in super::super) struct PromptDetail {
    pub(in super::super) prompt_hash: String,
    pub(in super::super) workload: Option<String>,
    /// Rows of the log that it stands for.
    pub(in super::super) calls: u64,
    /// Its messages; empty where no frozen dataset holds it any more.
    pub(in super::super) messages: Vec<Message>,
    pub(in super::super) answers: Vec<Answer>,
}

/// One message of a prompt.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub(in super::super) struct Message {
    pub(in super::super) role: String,
    pub(in super::super) text: String,
}

/// One answer.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub(in super::super) struct Answer {
    /// The training pass, from 1.
    pub(in super::super) pass: Option<i32>,
    /// `new` or `incumbent`, in a trial.
    pub(in super::super) side: Option<String>,
    pub(in super::super) sample: i32,
    pub(in super::super) sampler: Option<String>,
    pub(in super::super) text: String,
    pub(in super::super) finish_reason: String,
    /// Each reward by its name.
    pub(in super::super) rewards: BTreeMap<String, f64>,
    pub(in super::super) total: Option<f64>,
    pub(in super::super) passed: Option<bool>,
}

impl Facts {
    /// Returns prompts in numbers, those whose answers differ most first.
    pub(in super::super) async fn prompts(&self, which: &Which) -> Result<Vec<Prompt>, FactError> {
        let of = which.of()?;
        let (limit, skip) = (usize::from(which.limit.clamp(1, 500)), which.skip.min(100_000) as usize);
        let _reading = self.reading().await?;
        let found = answers::prompts(&self.tables, &of, limit, skip).await.map_err(FactError::failed)?;
        let document = |p: answers::PromptSummary| Prompt {
            prompt_hash: p.prompt_hash,
            workload: p.workload,
            answers: p.answers,
            passed: p.passed,
            mean: p.mean,
            best: p.best,
            worst: p.worst,
        };
        Ok(found.into_iter().map(document).collect())
    }

    /// Returns one prompt with its text and its answers.
    pub(in super::super) async fn prompt(&self, which: &Which, hash: &str) -> Result<PromptDetail, FactError> {
        let of = which.of()?;
        let reading = self.reading().await?;
        let found = answers::answers(&self.tables, &of, hash).await.map_err(FactError::failed)?;
        drop(reading);
        if found.is_empty() {
            return Err(FactError::Missing(format!("no answer to the prompt {hash:?} is stored there")));
        }
        let (paths, wanted) = (self.paths.clone(), hash.to_string());
        let looking = tokio::task::spawn_blocking(move || answers::prompt(&paths, &wanted, ROUNDS));
        let prompt = looking.await.map_err(FactError::failed)?.map_err(FactError::failed)?;
        let text = |content: &Value| content.as_str().map_or_else(|| content.to_string(), str::to_string);
        let message = |m: &crate::record::Message| Message { role: m.role.clone(), text: text(&m.content) };
        Ok(PromptDetail {
            prompt_hash: hash.to_string(),
            workload: prompt.as_ref().and_then(|p| p.workload.clone()),
            calls: prompt.as_ref().map_or(0, |p| p.count),
            messages: prompt.iter().flat_map(|p| &p.messages).map(message).collect(),
            answers: found.into_iter().map(answer).collect(),
        })
    }
}

fn answer(found: answers::Answer) -> Answer {
    Answer {
        pass: found.iteration,
        side: found.side,
        sample: found.sample,
        sampler: found.sampler,
        text: found.text,
        finish_reason: found.finish_reason,
        rewards: found.rewards.unwrap_or_default(),
        total: found.total,
        passed: found.passed,
    }
}
