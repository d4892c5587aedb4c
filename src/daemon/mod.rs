//! `taod run`: ingestion, the nightly schedule, promotion, and the page, in one process that wires them.
//!
//! Each part retries without end and says in `/readyz` what stands in its way; only a bad config or a foreign table ends
//! the daemon. Rounds run in a child process; this process alone talks to the endpoint. Nothing imports this module but
//! the command line.

mod actions;
pub mod canary;
mod lease;
pub mod live;
pub mod maintenance;
mod measure;
mod panel;
pub mod promotion;
mod shadow;
mod tend;
mod watch;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use chrono::{DateTime, Utc};
use tokio::sync::{Notify, watch as channel};
use tokio::task::JoinSet;

use crate::admin;
use crate::admin::actions::Actions;
use crate::admin::facts::Facts;
use crate::config::Config;
use crate::engine::Model;
use crate::health::Health;
use crate::ingest;
use crate::metrics::{Metrics, RoundOutcome};
use crate::progress::Measure;
use crate::registry::{Promotion, Registry};
use crate::round::{self, Outcome, Paths, Verdict};
use crate::schedule::Schedule;

/// How long a loop of the daemon may take for one turn before the watchdog calls it stuck.
const TURN: Duration = Duration::from_secs(60);

/// Everything the loops of the daemon share.
struct Daemon {
    config: Config,
    config_file: Option<PathBuf>,
    metrics: Arc<Metrics>,
    health: Arc<Health>,
    /// Told when an operator wants a round at once.
    run_now: Notify,
    /// True while a round runs.
    in_round: AtomicBool,
    /// Told when something else than a round changed what is served.
    changed: Notify,
}

/// Runs until `stop` turns true, then drains and commits what was read.
///
/// `config_file` is what the round's child reads; it holds the same config.
pub async fn run(config: Config, config_file: Option<PathBuf>, stop: channel::Receiver<bool>) -> Result<()> {
    let metrics = Arc::new(Metrics::new()?);
    let health = Arc::new(Health::default());
    let paths = Paths::new(&config.state.dir);
    let tables = config.state.open_tables()?;
    Registry::open(&paths.registry())?;
    let counters = Arc::new(ingest::Counters::default());
    let daemon = Arc::new(Daemon {
        config,
        config_file,
        metrics: metrics.clone(),
        health: health.clone(),
        run_now: Notify::new(),
        in_round: AtomicBool::new(false),
        changed: Notify::new(),
    });

    let bound = admin::bind(&daemon.config.admin).map_err(anyhow::Error::msg)?;
    let facts = Arc::new(Facts::new(daemon.config.clone(), metrics.clone(), health.clone())?);
    let (actions, todo) = Actions::new(&daemon.config.state.dir);
    let actions = Arc::new(actions);
    let page = admin::spawn(bound, admin::State { facts, actions: actions.clone() }, stopped(stop.clone()))?;
    let mut loops = JoinSet::new();
    loops.spawn(watch::observe(metrics, health, counters.clone(), stop.clone()));
    let (grants, owner) = lease::channel_of();
    loops.spawn(lease::keep(daemon.clone(), tables.clone(), grants, stop.clone()));
    let mut ingesting = {
        let (daemon, stop) = (daemon.clone(), stop.clone());
        tokio::spawn(
            async move { ingest::run(&daemon.config.ingest, &tables, counters, stop, ingest::Mode::Forever).await },
        )
    };
    loops.spawn(schedule(daemon.clone(), owner.clone(), stop.clone()));
    loops.spawn(maintenance::keep(daemon.clone(), owner.clone(), stop.clone()));
    loops.spawn(measure::keep(daemon.clone(), daemon.config.state.open_tables()?, stop.clone()));
    loops.spawn(actions::keep(daemon.clone(), actions, todo, owner.clone(), stop.clone()));
    loops.spawn(tend::keep(daemon.clone(), owner.clone(), stop.clone()));
    loops.spawn(live::keep(daemon, owner, stop.clone()));
    watch::ready();

    // A loop ends before the stop only by a panic: better no daemon, which is started again, than one that does half its work.
    let summary = loop {
        tokio::select! {
            summary = &mut ingesting => break summary.context("ingestion ended unexpectedly")?,
            Some(ended) = loops.join_next() => ended.context("a loop of the daemon ended unexpectedly")?,
        }
    };
    watch::stopping();
    if let Err(error) = summary {
        return Err(error.into());
    }
    while let Some(ended) = loops.join_next().await {
        ended.context("a loop of the daemon ended unexpectedly")?;
    }
    match page.join() {
        Ok(result) => Ok(result?),
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

/// Runs one night as the schedule does: the round in its child process, then the promotion it earned. `measured` gets the
/// numbers for metrics that the child tells meanwhile.
pub async fn night(
    config: &Config,
    launch: &round::child::Launch,
    measured: &(dyn Fn(&Measure) + Sync),
) -> Result<Night> {
    let paths = Paths::new(&config.state.dir);
    let before = round::book::newest_verdict(&paths)?.map(|v| v.round);
    let status = round::child::run(launch, measured).await?;
    let verdict = round::book::newest_verdict(&paths)?.filter(|v| Some(&v.round) != before.as_ref());
    let verdict = verdict.with_context(|| format!("the round's process ended without a verdict ({status})"))?;
    let promoted = match (&verdict.outcome, config.registry.promotion) {
        (Outcome::Promote { .. }, Promotion::Automatic) => {
            let model = load_model(config).await?;
            Some(promotion::promote(config, &verdict, None, &model).await?)
        }
        (Outcome::Promote { trial, .. }, Promotion::Approval) => {
            tracing::info!(trial, "waits for `taod gate approve` or `taod gate reject`");
            None
        }
        _ => None,
    };
    Ok(Night { verdict, promoted })
}

/// What a night came to.
#[derive(Debug)]
pub struct Night {
    pub verdict: Verdict,
    /// The change of the served version, where there was one.
    pub promoted: Option<promotion::Promoted>,
}

/// Loads the base model off the async threads.
pub async fn load_model(config: &Config) -> Result<Model> {
    let (path, hold) = (config.model.path.clone(), config.model.hold);
    Ok(tokio::task::spawn_blocking(move || Model::load_held(&path, hold)).await??)
}

/// Waits for each due time and runs a night while this process owns the lease; a failure is logged, shown, and over with: the next night tries again.
async fn schedule(daemon: Arc<Daemon>, mut owner: lease::Owner, mut stop: channel::Receiver<bool>) {
    // The settings were checked when the config was read.
    let Ok(schedule) = Schedule::new(&daemon.config.schedule) else { return };
    let mut last_start = last_round(&daemon.config);
    loop {
        tokio::select! {
            () = owner.gained() => {}
            _ = stop.wait_for(|stop| *stop) => return,
        }
        let now = Utc::now();
        let Some(due) = schedule.due(last_start, now) else { return };
        daemon.metrics.rounds.next_start.set(due.timestamp() as f64);
        let wait = (due - now).to_std().unwrap_or_default();
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = daemon.run_now.notified() => {}
            () = owner.lost() => continue,
            _ = stop.wait_for(|stop| *stop) => return,
        }
        last_start = Some(Utc::now());
        daemon.metrics.rounds.last_start.set(Utc::now().timestamp() as f64);
        let launch = round::child::Launch { config: daemon.config_file.clone(), ..Default::default() };
        let measured = |measure: &Measure| watch::measure(&daemon.metrics, measure);
        daemon.in_round.store(true, Ordering::Release);
        let result = tokio::select! {
            result = night(&daemon.config, &launch, &measured) => result,
            () = owner.lost() => {
                tracing::warn!("the lease was lost, so the round ends here; its next owner resumes it");
                daemon.in_round.store(false, Ordering::Release);
                continue;
            }
            // Dropping the night kills its child; what it had finished is resumed by the next one.
            _ = stop.wait_for(|stop| *stop) => return,
        };
        daemon.in_round.store(false, Ordering::Release);
        daemon.metrics.rounds.last_end.set(Utc::now().timestamp() as f64);
        match result {
            Ok(night) => daemon.ended(&night),
            Err(error) => {
                daemon.metrics.rounds.ended.get(RoundOutcome::Failed).inc();
                daemon.health.not_ready("round", format!("{error:#}"));
                tracing::error!(error = format!("{error:#}"), "the round failed; the next one resumes it");
            }
        }
    }
}

impl Daemon {
    /// Shows in the metrics what is served now.
    fn show(&self, promoted: &promotion::Promoted) {
        self.metrics.endpoint.current.set(&promoted.to);
        self.metrics.endpoint.proof.set(1);
        self.metrics.endpoint.proof_time.set(Utc::now().timestamp() as f64);
        self.changed.notify_one();
    }

    fn ended(&self, night: &Night) {
        self.health.ready("round");
        let outcome = RoundOutcome::from_name(night.verdict.outcome.name()).unwrap_or(RoundOutcome::Failed);
        self.metrics.rounds.ended.get(outcome).inc();
        watch::measure_round(&self.metrics, &night.verdict);
        if let Some(promoted) = &night.promoted {
            self.show(promoted);
        }
        tracing::info!(
            round = night.verdict.round,
            outcome = night.verdict.outcome.name(),
            reason = night.verdict.outcome.reason(),
            "the round ended"
        );
    }
}

/// Returns when the newest round was planned, so that a run missed while the daemon was down is caught up once.
fn last_round(config: &Config) -> Option<DateTime<Utc>> {
    let paths = Paths::new(&config.state.dir);
    let newest = paths.round_ids().ok()?.pop()?;
    let plan: round::Plan = crate::durable::read_json(&plan_path(&paths, &newest)).ok()?;
    DateTime::from_timestamp_micros(plan.created_us)
}

fn plan_path(paths: &Paths, round: &str) -> PathBuf {
    paths.round(round).join(Path::new("plan.json"))
}

/// Ingests until `stop` turns true, with metrics and health on the page: one instance of several that only ingest.
pub async fn ingest_only(config: Config, stop: channel::Receiver<bool>) -> Result<ingest::Summary> {
    let (metrics, health) = (Arc::new(Metrics::new()?), Arc::new(Health::default()));
    let (tables, counters) = (config.state.open_tables()?, Arc::new(ingest::Counters::default()));
    let facts = Arc::new(Facts::new(config.clone(), metrics.clone(), health.clone())?);
    let state = admin::State { facts, actions: Arc::new(Actions::none(&config.state.dir)) };
    let bound = admin::bind(&config.admin).map_err(anyhow::Error::msg)?;
    let page = admin::spawn(bound, state, stopped(stop.clone()))?;
    let observed = tokio::spawn(watch::observe(metrics, health, counters.clone(), stop.clone()));
    let summary = ingest::run(&config.ingest, &tables, counters, stop, ingest::Mode::Forever).await?;
    observed.await.context("a loop of the page ended unexpectedly")?;
    match page.join() {
        Ok(result) => result.map(|()| summary).map_err(Into::into),
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

async fn stopped(mut stop: channel::Receiver<bool>) {
    // An error means that the sender is gone, which is a stop as well.
    let _stopped = stop.wait_for(|stop| *stop).await;
}
