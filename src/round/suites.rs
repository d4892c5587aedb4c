//! The prompts of a trial's fixed suites: the head of the traffic, and the operator's file.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use serde::Deserialize;

use super::judging::{self, Batch, Sides};
use super::{Night, RoundError, probes, trial};
use crate::dataset::{Dataset, Prompt};
use crate::durable::{self, FileError};
use crate::gate::suite::Named;
use crate::gate::{Observation, Suite, Trial, UsageRow};
use crate::json::Value;
use crate::record::{Coordinates, Message, prompt_hash};

/// One line of the operator's suite.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    messages: Vec<Message>,
    #[serde(default)]
    workload: Option<String>,
    #[serde(default)]
    tools: Option<Value>,
}

/// Returns the clusters of each suite for a trial that is about to be opened.
///
/// The head are gate clusters that stand for more than one call and that earlier trials have judged: they are worth nothing
/// as evidence any more, and are asked every day.
pub(super) fn named(night: &Night<'_>, dataset: &Dataset, used: &[UsageRow]) -> Result<Named, RoundError> {
    let used: BTreeSet<&str> = used.iter().map(|row| row.cluster.as_str()).collect();
    let mut head: Vec<&Prompt> = dataset.gate.prompts().iter().collect();
    let judged =
        |p: &&Prompt| p.count > 1 && used.contains(p.cluster.as_str()) && night.rewards.covers(p.workload.as_deref());
    head.retain(judged);
    head.sort_by(|a, b| b.count.cmp(&a.count).then_with(|| a.cluster.cmp(&b.cluster)));
    head.dedup_by(|a, b| a.cluster == b.cluster);
    head.truncate(night.config.gate.head_prompts as usize);
    let head = head.iter().map(|prompt| prompt.cluster.clone()).collect();
    let regression = regression(night)?.into_iter().map(|prompt| prompt.cluster).collect();
    let (memorisation, injection) = (probes::memorisation(night, dataset)?, probes::injection(night)?);
    Ok([
        (Suite::Head, head),
        (Suite::Regression, regression),
        (Suite::Memorisation, memorisation.into_iter().map(|probe| probe.name).collect()),
        (Suite::Injection, injection.into_iter().map(|(name, _)| name).collect()),
    ]
    .into())
}

/// Judges every suite that is still to be judged; returns how many tokens were drawn.
pub(super) fn judge(
    night: &mut Night<'_>,
    trial: &mut Trial,
    dataset: &Dataset,
    sides: &Sides,
) -> Result<u64, RoundError> {
    let mut tokens = 0;
    while let Some((suite, names)) = trial.next_suite() {
        let (found, drawn) = match suite {
            Suite::Head => ask(night, trial, (suite, names), dataset.gate.prompts(), sides)?,
            Suite::Regression => ask(night, trial, (suite, names), &regression(night)?, sides)?,
            Suite::Memorisation => probes::give_away(night, trial, names, dataset, sides)?,
            Suite::Injection => (probes::argue(night, names)?, 0),
        };
        tokens += drawn;
        let rows = trial.absorb_suite(&found)?;
        trial::store_suite(night, trial.id(), suite, rows)?;
    }
    Ok(tokens)
}

/// Asks both sides the named ones of some prompts.
fn ask(
    night: &Night<'_>,
    trial: &Trial,
    (suite, names): (Suite, &[String]),
    all: &[Prompt],
    sides: &Sides,
) -> Result<(Vec<Observation>, u64), RoundError> {
    let mut by_name: BTreeMap<&str, &Prompt> = BTreeMap::new();
    for prompt in all {
        by_name.entry(prompt.cluster.as_str()).or_insert(prompt);
    }
    let prompts: Vec<&Prompt> = names.iter().filter_map(|name| by_name.get(name.as_str()).copied()).collect();
    let name = format!("suite-{}", suite.as_str());
    judging::play(night, trial, &Batch { name, prompts, divergences: 0 }, sides)
}

/// Returns the hashes of the operator's files that a trial asks from, by what they are.
pub(super) fn hashes(night: &Night<'_>) -> Result<BTreeMap<&'static str, String>, RoundError> {
    let gate = &night.config.gate;
    let files = [("suite", gate.suite.as_str()), ("canaries", gate.guardrails.canaries.as_str())];
    let set = files.into_iter().filter(|(_, path)| !path.is_empty());
    set.map(|(name, path)| Ok((name, durable::sha256_file(Path::new(path))?))).collect()
}

/// Reads the operator's suite.
fn regression(night: &Night<'_>) -> Result<Vec<Prompt>, RoundError> {
    let path = night.config.gate.suite.as_str();
    if path.is_empty() {
        return Ok(Vec::new());
    }
    let text = fs::read_to_string(path).map_err(|e| FileError::io("cannot read gate.suite", Path::new(path), e))?;
    let prompt = |(index, line): (usize, &str)| {
        let refuse = |why: String| RoundError::Suite { path: path.to_string(), line: index + 1, why };
        let line: Line = serde_json::from_str(line).map_err(|e| refuse(e.to_string()))?;
        if !night.rewards.covers(line.workload.as_deref()) {
            let name = line.workload.unwrap_or_default();
            return Err(refuse(format!("workload {name:?} has no rules; add [[workload]] with this name and rules")));
        }
        let ids = night.model.prompt_ids(&line.messages, line.tools.as_ref()).map_err(|e| refuse(e.to_string()))?;
        if !trial::fits(night, ids.len()) {
            return Err(refuse(format!("{} tokens do not fit the model with an answer: shorten it", ids.len())));
        }
        let hash = prompt_hash(&line.messages, line.tools.as_ref());
        let place = Coordinates { topic: "suite".into(), partition: 0, offset: index as i64, record_index: 0 };
        let bare = Prompt::bare(hash.clone(), format!("suite-{hash}"), line.messages, place);
        Ok(Prompt { workload: line.workload, tools: line.tools, ..bare })
    };
    let mut prompts: Vec<Prompt> =
        text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()).map(prompt).collect::<Result<_, _>>()?;
    let mut seen = BTreeSet::new();
    prompts.retain(|prompt| seen.insert(prompt.cluster.clone()));
    Ok(prompts)
}
