//! Reward models of one's own: trained on preference pairs, evaluated on pairs, saved as transformers loads them.
//!
//! Reading order: [`pairs`] is what is learned from, [`training`] how, [`accuracy`] what came of it; [`injections`]
//! tells how a scorer stands texts that try to steer it. What comes out is a
//! folder for `[[rewards.scorers]]` of kind `classifier`, with a report beside it that says how often the model is right
//! about pairs it has not seen, and how often mere length would be.

pub mod accuracy;
pub mod injections;
pub mod pairs;
#[cfg(test)]
mod tests;
pub mod training;

use std::path::Path;

use serde::Serialize;

use self::accuracy::Report;
use self::pairs::Pair;
use self::training::{MIN_HELD_OUT, Run, Trained, held_out};
use crate::adapter::Settings;
use crate::durable::{self, FileError};
use crate::engine::{EngineError, Model, Precision, padding_id, save_classifier};
use crate::progress::Progress;
use crate::record::FinishReason;
use crate::rewards::{Item, RewardError};

/// What went wrong with a reward model.
#[derive(Debug, thiserror::Error)]
pub enum RewardModelError {
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    File(#[from] FileError),
    #[error(transparent)]
    Reward(#[from] RewardError),
    #[error("tuning.{0}")]
    Settings(String),
    #[error("{found} {what} are too few; give at least {least}")]
    Few { what: &'static str, found: usize, least: usize },
    #[error("taod's own test texts are damaged: {0}; build it again")]
    Builtin(String),
    #[error("the loss is no number after step {step}; lower tuning.learning_rate")]
    Diverged { step: usize },
}

/// What stands beside a trained model.
#[derive(Debug, Clone, Serialize)]
pub struct Card<'a> {
    pub base: &'a crate::engine::ModelIdentity,
    pub seed: u64,
    pub held_out_share: f64,
    pub tuning: &'a Settings,
    pub trained: Trained,
}

/// Trains a reward model on `source` and saves it in `out`, which a `classifier` then reads. `share` of the prompts are held
/// out for the accuracy.
pub fn train<'a>(
    (source, model): (&str, &'a Model),
    pairs: &[Pair],
    settings: &'a Settings,
    (share, seed): (f64, u64),
    out: &Path,
    progress: &Progress,
) -> Result<Card<'a>, RewardModelError> {
    settings.validate().map_err(RewardModelError::Settings)?;
    refuse_unused(settings)?;
    let held = held_out(pairs, share, seed);
    if held.len() < MIN_HELD_OUT {
        return Err(RewardModelError::Few { what: "pairs held out", found: held.len(), least: MIN_HELD_OUT });
    }
    let mut run = Run::new(model, settings, padding_id(source)?, seed)?;
    let trained = run.train(pairs, &held, seed, progress)?;
    let (adapter, head) = run.parts()?;
    save_classifier(source, model, &adapter, head, out)?;
    let card = Card { base: model.identity(), seed, held_out_share: share, tuning: settings, trained };
    durable::write_json(&out.join("taod_reward.json"), &card)?;
    Ok(card)
}

/// Refuses keys that were set for a trainer of policies and would do nothing here. What an operator reads as a limit must be one.
fn refuse_unused(settings: &Settings) -> Result<(), RewardModelError> {
    let default = Settings::default();
    let unused = [
        ("dropout", settings.dropout != default.dropout, "nothing is dropped here"),
        ("memory_mib", settings.memory_mib != default.memory_mib, "memory is not limited here; lower batch_tokens"),
        ("command", settings.command != default.command, "taod itself trains here"),
        ("precision", !matches!(settings.precision, Precision::Auto | Precision::F32), "weights are f32 here"),
    ];
    match unused.into_iter().find(|(_, is_set, _)| *is_set) {
        Some((key, _, why)) => Err(RewardModelError::Settings(format!(
            "{key} does nothing for a reward model ({why}): train under a config without it"
        ))),
        None => Ok(()),
    }
}

/// Reports how often the better answer of a pair wins. `margins` tells by how much the first of two answers is better.
pub fn evaluate(
    pairs: &[Pair],
    workload: Option<&str>,
    margins: impl Fn(&[(Item, Item)]) -> Result<Vec<f64>, RewardError>,
) -> Result<Report, RewardModelError> {
    let answers: Vec<(Item, Item)> = pairs.iter().map(|pair| items(pair, workload)).collect();
    Ok(Report::new(pairs, &margins(&answers)?))
}

/// Returns the better and the worse answer of a pair as scorers see them.
pub fn items(pair: &Pair, workload: Option<&str>) -> (Item, Item) {
    let item = |response: &str| Item {
        workload: workload.map(str::to_owned),
        messages: pair.messages.clone(),
        response: response.to_owned(),
        finish_reason: FinishReason::Stop,
        prompt_ids: None,
        token_ids: None,
        ratings: Vec::new(),
    };
    (item(&pair.chosen), item(&pair.rejected))
}
