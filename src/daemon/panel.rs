//! What a proof needs besides the server: prompts, and the log-probs of answers under each model that may have given them.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use anyhow::Result;

use crate::config::Config;
use crate::dataset;
use crate::endpoint::proof::{Answered, Panel, Tokens, Who};
use crate::engine::{Adapter, Model, ScoreItem, logprobs};
use crate::record::Message;
use crate::registry::{BASE, Registry};
use crate::round::Paths;

/// How many times the prompts of a proof are at hand, for those on which the models do not differ enough.
const SPARE: usize = 4;

/// Prepares the proof of who answers when what is served changes from one version to another.
pub(super) fn panel(config: &Config, registry: &Registry, from: &str, to: &str, model: &Model) -> Result<Panel> {
    let mut adapters = BTreeMap::new();
    let mut hypotheses = vec![Who::Base];
    for (who, version) in [(Who::Incumbent, from), (Who::New, to)] {
        if version != BASE && !(who == Who::Incumbent && from == to) {
            registry.verify(version)?;
            adapters.insert(who, Adapter::load(&registry.path(version), model)?);
            hypotheses.push(who);
        }
    }
    let model = model.clone();
    let likelihood = move |who: Who, answers: &[Answered]| likelihood(&model, adapters.get(&who), answers);
    let settings = config.endpoint.proof.of(config.endpoint.kind);
    let prompts = prompts(config, SPARE * settings.prompts)?;
    Ok(Panel { prompts, hypotheses, likelihood: Arc::new(likelihood), settings })
}

/// Scores served answers under one model, token by token.
fn likelihood(model: &Model, adapter: Option<&Adapter>, answers: &[Answered]) -> Result<Vec<Vec<f32>>, String> {
    let mut pairs = Vec::with_capacity(answers.len());
    for answer in answers {
        let prompt = model.prompt_ids(&answer.messages, None).map_err(|e| e.to_string())?;
        let completion = match &answer.tokens {
            Tokens::Ids(ids) => ids.clone(),
            Tokens::Pieces(pieces) => from_pieces(model, pieces)?,
        };
        pairs.push((prompt, completion));
    }
    let items: Vec<ScoreItem<'_>> = pairs.iter().map(|(prompt, completion)| ScoreItem { prompt, completion }).collect();
    logprobs(model, adapter, &items).map_err(|e| e.to_string())
}

/// Finds the ids of tokens that a server gives only as text.
fn from_pieces(model: &Model, pieces: &[String]) -> Result<Vec<u32>, String> {
    let ids = model.tokenizer().encode(&pieces.concat()).map_err(|e| e.to_string())?;
    match ids.len() == pieces.len() {
        true => Ok(ids),
        false => Err("the server's tokens are not those of this model's tokenizer".to_string()),
    }
}

/// Returns the prompts that a proof may ask: training prompts of the newest dataset, so that no held-out prompt is
/// spent, or fixed sentences where there is none.
fn prompts(config: &Config, count: usize) -> Result<Vec<Vec<Message>>> {
    let paths = Paths::new(&config.state.dir);
    for round in paths.round_ids()?.into_iter().rev() {
        let folder = paths.round(&round).join("dataset");
        if has_manifest(&folder) {
            let dataset = dataset::load(&folder)?;
            let mut prompts: Vec<_> = dataset.train.prompts().iter().filter(|p| p.tools.is_none()).collect();
            prompts.sort_by(|a, b| a.prompt_hash.cmp(&b.prompt_hash));
            let messages: Vec<_> = prompts.into_iter().take(count).map(|p| p.messages.clone()).collect();
            if !messages.is_empty() {
                return Ok(messages);
            }
        }
    }
    let fixed = ["Describe how rain forms.", "Write a short note to a colleague.", "What makes a good question?"];
    let cycle = fixed.iter().cycle().enumerate().take(count);
    Ok(cycle.map(|(i, text)| vec![Message::text("user", format!("{text} ({})", i + 1))]).collect())
}

fn has_manifest(folder: &Path) -> bool {
    folder.join("manifest.json").exists()
}
