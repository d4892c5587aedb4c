//! `taod run`, `taod round` and `taod demo`: the loop as a whole.

use std::path::PathBuf;

use clap::Args;

use super::lines::Output;
use super::{Exit, Global, Screen, runtime, signals};
use crate::daemon;
use crate::demo;
use crate::round::child::{self, Launch};
use crate::round::{self, Control, Options, Outcome, Verdict};

/// Run the daemon: ingest, start rounds on schedule, promote, answer on the admin page.
#[derive(Debug, Args)]
pub struct Run {}

/// Run one round as the scheduler does. Exit code 0 when it promoted or had nothing to do, 2 when the gate refused, 3
/// when the trial is still open.
#[derive(Debug, Args)]
#[group(id = "way", required = true, multiple = false, args = ["once", "resume"])]
pub struct Round {
    /// Go on with the unfinished round, or begin a new one.
    #[arg(long)]
    pub once: bool,
    /// Only go on with the unfinished round; an error where there is none.
    #[arg(long)]
    pub resume: bool,
    /// Go on with a round that was begun under another number of threads, other settings or another version.
    #[arg(long)]
    pub allow_drift: bool,
    /// Print one JSON document.
    #[arg(long)]
    pub json: bool,
}

/// The round's child process; the daemon and `taod round` start it.
#[derive(Debug, Args)]
pub struct RoundWorker {
    #[arg(long, value_enum)]
    pub control: Option<Control>,
    #[arg(long)]
    pub resume: bool,
    #[arg(long)]
    pub allow_drift: bool,
}

/// Show the whole loop on embedded parts: a broker, an endpoint with a real model, real traffic, a round, the gate, a
/// promotion. Exit code 0 when the adapter was promoted, 2 when the gate refused.
#[derive(Debug, Args)]
pub struct Demo {
    /// Changes every draw.
    #[arg(long, value_name = "S")]
    pub seed: Option<u64>,
    /// A deliberate fault; each must end in a refusal.
    #[arg(long, value_enum)]
    pub control: Option<Control>,
    /// Print one JSON document at the end.
    #[arg(long)]
    pub json: bool,
    /// Where everything goes; without it state.dir of the config. An earlier demo there is not overwritten.
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
    /// AlpacaEval's instructions, a JSON array of objects with "instruction".
    #[arg(long, value_name = "FILE", env = "TAOD_DEMO_PROMPTS")]
    pub prompts: PathBuf,
    /// How many instructions are asked.
    #[arg(long, default_value_t = 430, value_name = "N")]
    pub calls: usize,
}

pub(super) fn run(global: &Global, _: &Run) -> anyhow::Result<Exit> {
    let config = global.load()?.config;
    runtime()?.block_on(async {
        let stop = signals::shutdown()?;
        daemon::run(config, global.config.clone(), stop).await
    })?;
    Ok(Exit::Done)
}

pub(super) fn run_round(global: &Global, args: &Round) -> anyhow::Result<Exit> {
    let config = global.load()?.config;
    let launch =
        Launch { config: global.config.clone(), resume: args.resume, allow_drift: args.allow_drift, ..Default::default() };
    let night = runtime()?.block_on(daemon::night(&config, &launch))?;
    let mut out = Output::stdout();
    match args.json {
        true => out.line(&serde_json::json!({ "verdict": night.verdict, "promoted": night.promoted }))?,
        false => out.text(&summary(&night))?,
    }
    out.flush()?;
    Ok(exit_of(&night.verdict.outcome))
}

fn summary(night: &daemon::Night) -> String {
    let Verdict { round, outcome, .. } = &night.verdict;
    let promoted = night.promoted.as_ref().map_or(String::new(), |p| format!("{}\n", p.explain()));
    format!("{round}: {} ({})\n{promoted}", outcome.name(), outcome.reason())
}

pub(super) fn run_worker(global: &Global, args: &RoundWorker, screen: &Screen) -> anyhow::Result<Exit> {
    child::end_with_parent();
    let config = global.load()?.config;
    let options = Options { control: args.control, resume: args.resume, allow_drift: args.allow_drift };
    let verdict = round::run(&config, &options, &screen.progress())?;
    Ok(exit_of(&verdict.outcome))
}

pub(super) fn run_demo(global: &Global, args: &Demo, screen: &Screen) -> anyhow::Result<Exit> {
    let mut config = global.load()?.config;
    config.round.seed = args.seed.unwrap_or(config.round.seed);
    if let Some(dir) = &args.dir {
        config.state.dir = dir.clone();
    }
    let options = demo::Options { control: args.control, prompts: args.prompts.clone(), calls: args.calls };
    let report = runtime()?.block_on(demo::run(config, &options, &screen.progress()))?;
    let mut out = Output::stdout();
    match args.json {
        true => out.line(&report)?,
        false => out.text(&report.to_string())?,
    }
    out.flush()?;
    Ok(exit_of(&report.outcome))
}

fn exit_of(outcome: &Outcome) -> Exit {
    match outcome {
        Outcome::Promote { .. } | Outcome::Skipped { .. } => Exit::Done,
        Outcome::Refused { .. } => Exit::Refused,
        Outcome::Open { .. } => Exit::Open,
    }
}
