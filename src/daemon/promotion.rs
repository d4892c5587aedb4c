//! The one place where the gate's key, the registry and the endpoint meet.
//!
//! A promotion, an operator's override and a rollback are the same change of the served version; they differ only in
//! how the registry lets them begin. What a round's child claims is recomputed from the tables first.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Result, bail};
use chrono::{DateTime, Utc};
use serde::Serialize;
use serde_json::json;

use crate::config::Config;
use crate::dataset;
use crate::endpoint::promote::{Fleet, Outcome as Ended, Promotion};
use crate::endpoint::proof::{Answered, Panel, Proof, Tokens, Who};
use crate::engine::{Adapter, Model, ScoreItem, logprobs};
use crate::record::Message;
use crate::registry::{BASE, Intent, Recovery, Registry};
use crate::round::{Paths, Verdict, book};
use crate::table::{Name, Tables};

/// A change of the served version that happened.
#[derive(Debug, Clone, Serialize)]
pub struct Promoted {
    pub from: String,
    pub to: String,
    /// What showed, on each replica, that the stable name is answered by the new version.
    pub proofs: Vec<Proof>,
}

impl Promoted {
    /// Returns the proof in words.
    pub fn explain(&self) -> String {
        let distance = |proof: &Proof| -> String {
            let each = proof.distances.iter().map(|(who, d)| format!("{who:?} {d:.4}").to_lowercase());
            let used = proof.prompts_used;
            format!("{} over {used} prompts", each.collect::<Vec<_>>().join(", "))
        };
        let shown: Vec<String> = self.proofs.iter().map(distance).collect();
        format!("the stable name answers as {}; distance in nats a token: {}", self.to, shown.join("; "))
    }
}

/// A person's word that what the gate passed may be served.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Approval<'a> {
    pub by: &'a str,
    pub reason: &'a str,
}

/// Promotes what a round's verdict claims, after recomputing the claim from the tables.
pub async fn promote(
    config: &Config,
    verdict: &Verdict,
    approval: Option<Approval<'_>>,
    model: &Model,
) -> Result<Promoted> {
    let paths = Paths::new(&config.state.dir);
    let tables = config.state.open_tables()?;
    let passed = book::prove(&tables, verdict, &config.gate).await?;
    let registry = Registry::open(&paths.registry())?;
    let intent = registry.promote(&passed, now_us())?;
    let promoted = carry_out(config, &registry, &intent, model).await?;
    book::close_promoted(&tables, &passed).await?;
    record(&tables, &intent, ("promote", Some(passed.trial()), approval), &promoted).await?;
    Ok(promoted)
}

/// Promotes a registered version on an operator's word, which is recorded.
pub async fn override_promote(
    config: &Config,
    version: &str,
    operator: &str,
    reason: &str,
    model: &Model,
) -> Result<Promoted> {
    let (registry, tables) = open(config)?;
    let intent = registry.override_promote(version, operator, reason, now_us())?;
    let promoted = carry_out(config, &registry, &intent, model).await?;
    record(&tables, &intent, ("override", None, None), &promoted).await?;
    Ok(promoted)
}

/// Returns to the version served before and quarantines the present one.
pub async fn rollback(config: &Config, reason: &str, model: &Model) -> Result<Promoted> {
    let (registry, tables) = open(config)?;
    let intent = registry.rollback(reason, now_us())?;
    let promoted = carry_out(config, &registry, &intent, model).await?;
    record(&tables, &intent, ("rollback", None, None), &promoted).await?;
    Ok(promoted)
}

/// Settles a change that a crash interrupted: forward where the stable name moved, else back.
pub async fn recover(config: &Config, model: &Model) -> Result<()> {
    let (registry, tables) = open(config)?;
    let intent = match registry.recover()? {
        Recovery::Clean => return Ok(()),
        Recovery::Moved(intent) | Recovery::Underway(intent) => intent,
    };
    let fleet = Fleet::new(&config.endpoint)?;
    let panel = panel(config, &registry, &intent, model)?;
    match Promotion::new(&fleet, &registry, &intent, &panel).recover().await? {
        Ended::Done { proofs } => {
            tracing::info!(to = intent.to(), "an interrupted promotion was completed");
            let promoted = Promoted { from: intent.from().to_string(), to: intent.to().to_string(), proofs };
            record(&tables, &intent, ("recovered", None, None), &promoted).await
        }
        Ended::Undone => {
            tracing::info!(to = intent.to(), "an interrupted promotion was undone");
            Ok(())
        }
    }
}

/// Puts the served version back on every replica that lost it, as after a restart of the server.
pub async fn reconcile(config: &Config) -> Result<Vec<String>> {
    let (registry, _) = open(config)?;
    if registry.intent()?.is_some() {
        return Ok(Vec::new());
    }
    let fleet = Fleet::new(&config.endpoint)?;
    let current = fleet.target(&registry, &registry.current()?.version);
    Ok(fleet.reconcile(&current).await?)
}

fn open(config: &Config) -> Result<(Registry, Tables)> {
    let paths = Paths::new(&config.state.dir);
    Ok((Registry::open(&paths.registry())?, config.state.open_tables()?))
}

async fn carry_out(config: &Config, registry: &Registry, intent: &Intent, model: &Model) -> Result<Promoted> {
    let prepared = Fleet::new(&config.endpoint).map_err(anyhow::Error::from);
    let (fleet, panel) = match prepared.and_then(|fleet| Ok((fleet, panel(config, registry, intent, model)?))) {
        Ok(prepared) => prepared,
        Err(error) => {
            registry.abort(intent, &error.to_string(), now_us())?;
            return Err(error);
        }
    };
    let outcome = Promotion::new(&fleet, registry, intent, &panel).carry_out().await?;
    let Ended::Done { proofs } = outcome else { bail!("the change to {} was undone", intent.to()) };
    if let Err(error) = fleet.retire(&fleet.target(registry, intent.from())).await {
        // Clients have the new version; an old one left in the server's memory is untidy, not wrong.
        tracing::warn!(%error, version = intent.from(), "the old version could not be unloaded");
    }
    Ok(Promoted { from: intent.from().to_string(), to: intent.to().to_string(), proofs })
}

/// Prepares the proof of who answers: the prompts, and the models that may be behind the name.
fn panel(config: &Config, registry: &Registry, intent: &Intent, model: &Model) -> Result<Panel> {
    let mut adapters = BTreeMap::new();
    let mut hypotheses = vec![Who::Base];
    for (who, version) in [(Who::Incumbent, intent.from()), (Who::New, intent.to())] {
        if version != BASE {
            registry.verify(version)?;
            adapters.insert(who, Adapter::load(&registry.path(version), model)?);
            hypotheses.push(who);
        }
    }
    let model = model.clone();
    let likelihood = move |who: Who, answers: &[Answered]| likelihood(&model, adapters.get(&who), answers);
    let settings = config.endpoint.proof.clone();
    let prompts = proof_prompts(config, settings.prompts)?;
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

/// Returns the prompts that a proof asks: training prompts of the newest dataset, so that no held-out prompt is spent,
/// or fixed sentences where there is none.
fn proof_prompts(config: &Config, count: usize) -> Result<Vec<Vec<Message>>> {
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

/// A row of `promotions`.
#[derive(Serialize)]
struct PromotionRow<'a> {
    id: &'a str,
    action: &'a str,
    time: DateTime<Utc>,
    version: &'a str,
    previous: &'a str,
    trial: Option<&'a str>,
    detail: serde_json::Value,
}

async fn record(
    tables: &Tables,
    intent: &Intent,
    (action, trial, approval): (&str, Option<&str>, Option<Approval<'_>>),
    promoted: &Promoted,
) -> Result<()> {
    let row = PromotionRow {
        id: intent.promotion(),
        action,
        time: Utc::now(),
        version: &promoted.to,
        previous: &promoted.from,
        trial,
        detail: json!({ "proofs": promoted.proofs, "approval": approval }),
    };
    let app_id = format!("taod/promotions/{}", intent.promotion());
    book::append_once(tables, Name::Promotions, &app_id, &[row]).await?;
    Ok(())
}

fn now_us() -> i64 {
    Utc::now().timestamp_micros()
}
