//! `taod run`, `taod round` and `taod demo`: the loop as a whole.

use std::path::PathBuf;

use anyhow::ensure;
use chrono::{DateTime, Utc};
use clap::Args;

use super::lines::Output;
use super::{Exit, Global, Screen, Usage, block_on, signals};
use crate::config::Config;
use crate::daemon;
use crate::demo;
use crate::round::child::{self, Launch};
use crate::round::{self, Control, Options, Outcome, RoundError, Verdict};
use crate::schedule::Schedule;

/// Run the daemon: ingest, start rounds on schedule, promote, answer on the admin page. SIGHUP reads the config again.
#[derive(Debug, Args)]
pub struct Run {}

/// Run one round as the scheduler does. Exit code 0 when it promoted or had nothing to do, 1 when training was given up,
/// 2 when the gate refused, 3 when the trial is still open, 75 when it was paused.
#[derive(Debug, Args)]
#[group(skip)]
#[command(group(clap::ArgGroup::new("way").required(true)))]
pub struct Round {
    /// Go on with the unfinished round, or begin a new one.
    #[arg(long, group = "way")]
    pub once: bool,
    /// Only go on with the unfinished round; an error where there is none.
    #[arg(long, group = "way")]
    pub resume: bool,
    /// Only tell what a round would train on, what each filter would leave out, tokens, time and cost; store nothing.
    #[arg(long, group = "way")]
    pub dry_run: bool,
    /// With --dry-run: what an hour of this machine costs, in any currency.
    #[arg(long, value_name = "PRICE", requires = "dry_run")]
    pub price_per_hour: Option<f64>,
    /// Go on with a round that was begun under another number of threads, other settings or another version.
    #[arg(long)]
    pub allow_drift: bool,
    /// Leave off when schedule.window closes, and with 75 at once where it is closed; the next start goes on.
    #[arg(long)]
    pub in_window: bool,
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
    #[arg(long)]
    pub until: Option<DateTime<Utc>>,
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
    /// AlpacaEval's instructions, a JSON array of objects with "instruction"; without it the file that `make models` fetched.
    #[arg(long, value_name = "FILE", env = "TAOD_DEMO_PROMPTS")]
    pub prompts: Option<PathBuf>,
    /// How many instructions are asked.
    #[arg(long, default_value_t = 430, value_name = "N")]
    pub calls: usize,
}

pub(super) fn run(global: &Global, _: &Run) -> anyhow::Result<Exit> {
    let config = global.load()?.config;
    block_on(async {
        let (stop, reload) = (signals::shutdown()?, signals::reload()?);
        let again = global.clone();
        let reread = Box::new(move || Ok(again.load()?.config));
        daemon::run(config, reread, reload, stop).await
    })??;
    Ok(Exit::Done)
}

pub(super) fn run_round(global: &Global, args: &Round) -> anyhow::Result<Exit> {
    let config = global.load()?.config;
    if args.dry_run {
        let forecast = round::forecast(&config)?;
        let mut out = Output::stdout();
        match args.json {
            true => out.line(&forecast)?,
            false => out.text(&forecast.explain(args.price_per_hour))?,
        }
        out.flush()?;
        return Ok(Exit::Done);
    }
    let window = Schedule::new(&config.schedule).map_err(Usage)?.window().copied().filter(|_| args.in_window);
    if let Some(window) = window.filter(|window| !window.is_open(Utc::now())) {
        tracing::info!(opens = %window.opens(Utc::now()), "schedule.window is closed; the round is put off");
        return Ok(Exit::Paused);
    }
    let launch = Launch {
        config: global.config.clone(),
        control: None,
        resume: args.resume,
        allow_drift: args.allow_drift,
        until: window.map(|window| window.closes(Utc::now())),
        stall: daemon::stall(&config),
    };
    let night = match block_on(daemon::night(&config, &launch, &|_| ()))? {
        Err(error) if daemon::is_pause(&error) => return Ok(Exit::Paused),
        night => night?,
    };
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
    child::give_way();
    let config = global.load()?.config;
    let (control, resume, allow_drift, until) = (args.control, args.resume, args.allow_drift, args.until);
    let options = Options { control, resume, allow_drift, until };
    let live = round::live::Writer::new(&round::Paths::new(&config.state.dir));
    let progress = child::telling(&screen.progress()).also(std::sync::Arc::new(live));
    match round::run(&config, &options, &progress) {
        Err(RoundError::Paused { .. }) => Ok(Exit::Paused),
        verdict => Ok(exit_of(&verdict?.outcome)),
    }
}

pub(super) fn run_demo(global: &Global, args: &Demo, screen: &Screen) -> anyhow::Result<Exit> {
    let mut config = global.load()?.config;
    config.round.seed = args.seed.unwrap_or(config.round.seed);
    if let Some(dir) = &args.dir {
        config.state.dir = dir.clone();
    }
    use_fetched(&mut config);
    let prompts = args.prompts.clone().unwrap_or_else(|| models().join("alpaca_eval_gpt4_baseline.json"));
    ensure!(prompts.is_file(), "no prompts at {}; run `make models`, or give --prompts", prompts.display());
    let options = demo::Options { control: args.control, prompts, calls: args.calls };
    let report = block_on(demo::run(config, &options, &screen.progress()))??;
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
        Outcome::Failed { .. } => Exit::Failed,
        Outcome::Open { .. } => Exit::Open,
    }
}

/// Names the model and the scorer that `make models` fetched, where the config names no others.
fn use_fetched(config: &mut Config) {
    let defaults = Config::default();
    if config.model.path == defaults.model.path {
        config.model.path = models().join("SmolLM2-135M-Instruct.Q4_1.gguf").display().to_string();
    }
    if config.rewards.similarity.model == defaults.rewards.similarity.model {
        config.rewards.similarity.model = models().join("all-MiniLM-L6-v2");
    }
}

/// Returns the folder that `make models` fills.
fn models() -> PathBuf {
    let home = || PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache");
    let cache = std::env::var_os("XDG_CACHE_HOME").filter(|dir| !dir.is_empty()).map_or_else(home, PathBuf::from);
    cache.join("taod/models")
}
