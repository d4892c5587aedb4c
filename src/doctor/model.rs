//! The base model and the scorers, loaded and used as a round does.

use std::time::Instant;

use super::{Check, Finding};
use crate::config::Config;
use crate::engine::Model;
use crate::record::{FinishReason, Message};
use crate::registry::{Registry, RegistryError};
use crate::rewards::{Item, RewardError, Rewards, Scorer, Selection, Settings};
use crate::round::Paths;

/// Loads the model and compares it with the one that the registry's adapters are of.
pub(super) async fn load(config: &Config) -> (Vec<Finding>, Option<Model>) {
    let (path, hold, engine) = (config.model.path.clone(), config.model.hold, config.engine);
    let loaded = tokio::task::spawn_blocking(move || Model::load_on(&path, hold, &engine)).await;
    let model = match loaded {
        Ok(Ok(model)) => model,
        Ok(Err(error)) => return (vec![failed(error.to_string())], None),
        Err(_) => return (vec![failed(format!("{} could not be loaded", config.model.path))], None),
    };
    let identity = model.identity();
    let (name, hash) = (&identity.name, &identity.sha256[..12]);
    let mut findings =
        vec![Finding::ok(Check::Model, format!("{name} loads ({}, sha256 {hash})", identity.architecture))];
    match recorded(config) {
        Ok(Some(base)) if base.sha256 != identity.sha256 => {
            let says = format!(
                "the registry's adapters are of {} ({}), not of {name} ({hash})",
                base.name,
                short(&base.sha256)
            );
            let remedy = "set model.path back, or make the change known by `taod adapters new-base`";
            findings.push(Finding::failure(Check::Model, says, remedy));
        }
        Ok(_) => {}
        Err(error) => findings.push(Finding::failure(
            Check::Model,
            error.to_string(),
            "restore the registry together with the tables (docs/runbooks/restore.md)",
        )),
    }
    (findings, Some(model))
}

fn failed(says: String) -> Finding {
    Finding::failure(Check::Model, says, "set model.path to a folder, a .gguf file or a hub id that is on this machine")
}

fn short(hash: &str) -> &str {
    hash.get(..12).unwrap_or(hash)
}

/// Returns the base that the registry knows, where there is a registry.
fn recorded(config: &Config) -> Result<Option<crate::registry::Base>, RegistryError> {
    let root = Paths::new(&config.state.dir).registry();
    if root.is_dir() { Registry::open(&root, &config.registry)?.base() } else { Ok(None) }
}

/// Lets each named scorer score one answer.
pub(super) async fn scorers(config: &Config) -> Vec<Finding> {
    let config = config.clone();
    let scored = tokio::task::spawn_blocking(move || each(&config)).await;
    scored.unwrap_or_else(|_| {
        vec![Finding::failure(Check::Scorers, "the look at the scorers broke off", "run it again with --log debug")]
    })
}

fn each(config: &Config) -> Vec<Finding> {
    let Some(workload) = config.workload.iter().find(|workload| !workload.rules.is_empty()) else {
        let remedy = "describe one as [[workload]] with rules (docs/rewards.md)";
        return vec![Finding::failure(
            Check::Scorers,
            "no workload has rules, so that no prompt may train or judge",
            remedy,
        )];
    };
    let mut named: Vec<&Scorer> = config.rewards.train.iter().chain(&config.rewards.gate).collect();
    named.sort();
    named.dedup();
    let item = Item {
        workload: Some(workload.name.clone()),
        messages: vec![Message::text("user", "Which colours has a traffic light?")],
        response: "Red, amber and green.".into(),
        finish_reason: FinishReason::Stop,
        prompt_ids: None,
        token_ids: None,
        ratings: Vec::new(),
    };
    named.into_iter().map(|scorer| one(config, scorer, &item)).collect()
}

fn one(config: &Config, scorer: &Scorer, item: &Item) -> Finding {
    let alone = Settings { train: vec![scorer.clone()], gate: vec![scorer.clone()], ..config.rewards.clone() };
    let started = Instant::now();
    let score = || -> Result<f64, RewardError> {
        let rewards = Rewards::without_base(&alone, &config.workload)?;
        let scored = rewards.score_fully(Selection::Train, std::slice::from_ref(item))?;
        Ok(scored.first().map_or(f64::NAN, |scored| scored.total))
    };
    let name = scorer.name();
    match score() {
        Ok(_) => {
            Finding::ok(Check::Scorers, format!("{name} scores an answer in {:.1} s", started.elapsed().as_secs_f64()))
        }
        Err(error) => {
            let remedy = format!("start what {name} needs or correct it under [rewards]; a round fails until then");
            Finding::failure(Check::Scorers, error.to_string(), remedy)
        }
    }
}
