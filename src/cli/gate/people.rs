//! `taod gate approve|reject|freeze|thaw`: what people decide, each with their name and their reason.

use anyhow::{Context, bail};
use clap::Args;

use super::super::adapters::Why;
use super::super::lines::Output;
use super::super::{Exit, Global, block_on};
use crate::config::Config;
use crate::daemon::{load_model, promotion};
use crate::registry::{Approval, Promotion, Registry};
use crate::round::{Outcome, Paths, Verdict, book};

/// Let the version that passed the gate be served. Everything is recomputed from the tables first.
#[derive(Debug, Args)]
pub struct Approve {
    /// The trial; without it the one that waits.
    trial: Option<String>,
    #[command(flatten)]
    why: Why,
}

/// Close an open trial without a promotion, whatever its evidence says.
#[derive(Debug, Args)]
pub struct Reject {
    /// The trial; without it the one that waits for approval.
    trial: Option<String>,
    #[command(flatten)]
    why: Why,
}

/// Let nothing be trained, judged or promoted until `taod gate thaw`; the log is stored as before.
#[derive(Debug, Args)]
pub struct Freeze {
    #[command(flatten)]
    why: Why,
}

/// End a freeze.
#[derive(Debug, Args)]
pub struct Thaw {
    #[command(flatten)]
    why: Why,
}

pub(super) fn approve(global: &Global, args: &Approve) -> anyhow::Result<Exit> {
    let config = global.load()?.config;
    if config.registry.promotion == Promotion::Frozen {
        bail!("registry.promotion is \"frozen\": set it to \"approval\" before something is approved");
    }
    let verdict = waiting(&config, args.trial.as_deref())?;
    let promoted = block_on(async {
        let model = load_model(&config).await?;
        let approval = Approval { by: args.why.by.clone(), reason: args.why.reason.clone() };
        promotion::promote(&config, &verdict, Some(approval), &model).await
    })??;
    say(&promoted.explain())
}

pub(super) fn reject(global: &Global, args: &Reject) -> anyhow::Result<Exit> {
    let config = global.load()?.config;
    let trial = match &args.trial {
        Some(trial) => trial.clone(),
        None => trial_of(&waiting(&config, None)?).unwrap_or_default().to_string(),
    };
    let why = format!("rejected by {}: {}", args.why.by, args.why.reason);
    block_on(async { book::reject(&config.state.open_tables()?, &trial, &why).await.map_err(anyhow::Error::from) })??;
    say(&format!("trial {trial} is closed: {why}"))
}

pub(super) fn freeze(global: &Global, args: &Freeze) -> anyhow::Result<Exit> {
    registry(global)?.freeze(&args.why.reason, &args.why.by, now_us())?;
    say("promotions are frozen; `taod gate thaw` ends it")
}

pub(super) fn thaw(global: &Global, args: &Thaw) -> anyhow::Result<Exit> {
    registry(global)?.thaw(&args.why.reason, &args.why.by, now_us())?;
    say("promotions are not frozen")
}

/// Returns the verdict of the newest round, where it waits for a person.
fn waiting(config: &Config, trial: Option<&str>) -> anyhow::Result<Verdict> {
    let newest = book::newest_verdict(&Paths::new(&config.state.dir))?;
    let found = newest.filter(|v| trial_of(v).is_some_and(|id| trial.is_none_or(|wanted| wanted == id)));
    found.with_context(|| match trial {
        Some(trial) => {
            format!("trial {trial} does not wait for approval; `taod gate explain {trial}` says how it stands")
        }
        None => "no trial waits for approval: the newest round ended without a promotion".to_string(),
    })
}

fn trial_of(verdict: &Verdict) -> Option<&str> {
    match &verdict.outcome {
        Outcome::Promote { trial, .. } => Some(trial),
        _ => None,
    }
}

fn registry(global: &Global) -> anyhow::Result<Registry> {
    let config = global.load()?.config;
    Ok(Registry::open(&Paths::new(&config.state.dir).registry(), &config.registry)?)
}

fn say(text: &str) -> anyhow::Result<Exit> {
    let mut out = Output::stdout();
    out.text(&format!("{text}\n"))?;
    out.flush()?;
    Ok(Exit::Done)
}

fn now_us() -> i64 {
    chrono::Utc::now().timestamp_micros()
}
