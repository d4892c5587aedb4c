//! `taod run`: ingestion, the nightly schedule, promotion, and the page, in one process that wires them.
//!
//! Each part retries without end and says in `/readyz` what stands in its way; only a bad config or a foreign table ends
//! the daemon. Rounds run in a child process; this process alone talks to the endpoint. Nothing imports this module but
//! the command line.

mod actions;
pub mod canary;
mod evaluations;
mod lease;
pub mod live;
pub mod maintenance;
mod measure;
mod nights;
mod notices;
mod panel;
pub mod promotion;
pub mod reload;
mod shadow;
mod tend;
mod traces;
mod watch;

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use anyhow::{Context, Result};
use chrono::Utc;
use tokio::sync::{Notify, mpsc, watch as channel};
use tokio::task::JoinSet;

use crate::admin;
use crate::admin::actions::Actions;
use crate::admin::facts::Facts;
use crate::config::Config;
use crate::engine::Model;
use crate::health::Health;
use crate::ingest;
use crate::layout;
use crate::metrics::Metrics;
use crate::registry::Registry;
use crate::round::Paths;

pub use nights::{Night, is_pause, night, stall};

/// How long a loop of the daemon may take for one turn before the watchdog calls it stuck.
const TURN: Duration = Duration::from_secs(60);

/// Everything the loops of the daemon share.
struct Daemon {
    config: RwLock<Arc<Config>>,
    /// What the processes of the daemon read: the config in force.
    config_file: Option<PathBuf>,
    facts: Arc<Facts>,
    /// Told when the config in force is another one.
    reloaded: Notify,
    metrics: Arc<Metrics>,
    health: Arc<Health>,
    /// Told when an operator wants a round at once.
    run_now: Notify,
    /// True while a round runs.
    in_round: AtomicBool,
    /// Told when something else than a round changed what is served.
    changed: Notify,
    /// Nights without a verdict, for who wants to be told.
    failures: notices::Failures,
}

/// Runs until `stop` turns true, then drains and commits what was read. The config is read again by `reread` whenever
/// `reload` says so.
pub async fn run(
    config: Config,
    reread: reload::Reread,
    reload: mpsc::Receiver<()>,
    stop: channel::Receiver<bool>,
) -> Result<()> {
    layout::claim(&config.state.dir)?;
    let metrics = Arc::new(Metrics::new()?);
    let health = Arc::new(Health::default());
    let paths = Paths::new(&config.state.dir);
    let tables = config.state.open_tables()?;
    Registry::open(&paths.registry(), &config.registry)?;
    let counters = Arc::new(ingest::Counters::default());
    // Where another daemon stores the log, nothing here has to be ready for it.
    counters.ready.store(!config.state.stores_log(), Ordering::Relaxed);
    let config = Arc::new(config);
    let facts = Arc::new(Facts::new(config.clone(), metrics.clone(), health.clone())?);
    let daemon = Arc::new(Daemon {
        config: RwLock::new(config.clone()),
        config_file: Some(reload::write(&config)?),
        facts: facts.clone(),
        reloaded: Notify::new(),
        metrics: metrics.clone(),
        health: health.clone(),
        run_now: Notify::new(),
        in_round: AtomicBool::new(false),
        changed: Notify::new(),
        failures: notices::Failures::default(),
    });

    let bound = admin::bind(&config.admin).map_err(anyhow::Error::msg)?;
    let (actions, todo) = Actions::new(&config.state.dir);
    let actions = Arc::new(actions);
    let page = admin::spawn(bound, admin::State { facts, actions: actions.clone() }, stopped(stop.clone()))?;
    let mut loops = JoinSet::new();
    loops.spawn(watch::observe(metrics, health, counters.clone(), stop.clone()));
    let (grants, owner) = lease::channel_of();
    loops.spawn(lease::keep(daemon.clone(), tables.clone(), grants, stop.clone()));
    let mut ingesting = {
        let (config, stop) = (config.clone(), stop.clone());
        tokio::spawn(async move {
            if config.state.stores_log() {
                return ingest::run(&config.ingest, &tables, counters, stop, ingest::Mode::Forever).await;
            }
            tracing::info!(log = config.state.log, "another daemon stores the log; this one reads it there");
            stopped(stop).await;
            Ok(counters.summary())
        })
    };
    loops.spawn(nights::keep(daemon.clone(), owner.clone(), stop.clone()));
    loops.spawn(maintenance::keep(daemon.clone(), owner.clone(), stop.clone()));
    loops.spawn(measure::keep(daemon.clone(), config.state.open_tables()?, stop.clone()));
    loops.spawn(actions::keep(daemon.clone(), actions, todo, owner.clone(), stop.clone()));
    loops.spawn(notices::keep(daemon.clone(), config.state.open_tables()?, stop.clone()));
    loops.spawn(traces::keep(daemon.clone(), stop.clone()));
    loops.spawn(tend::keep(daemon.clone(), owner.clone(), stop.clone()));
    loops.spawn(reload::keep(daemon.clone(), reload, reread, stop.clone()));
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

/// Loads the base model off the async threads, on the processor wherever rounds compute: the proof of what is served reads few
/// tokens and wants them exact.
pub async fn load_model(config: &Config) -> Result<Model> {
    let (path, hold) = (config.model.path.clone(), config.model.hold);
    Ok(tokio::task::spawn_blocking(move || Model::load_held(&path, hold)).await??)
}

impl Daemon {
    /// Returns the config in force.
    fn config(&self) -> Arc<Config> {
        self.config.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, config: Arc<Config>) {
        *self.config.write().unwrap_or_else(PoisonError::into_inner) = config;
    }

    /// Shows in the metrics what is served now.
    fn show(&self, promoted: &promotion::Promoted) {
        self.metrics.endpoint.current.set(&promoted.to);
        self.metrics.endpoint.proof.set(1);
        self.metrics.endpoint.proof_time.set(Utc::now().timestamp() as f64);
        self.changed.notify_one();
    }
}

/// Ingests until `stop` turns true, with metrics and health on the page: one instance of several that only ingest.
pub async fn ingest_only(config: Config, stop: channel::Receiver<bool>) -> Result<ingest::Summary> {
    let (metrics, health) = (Arc::new(Metrics::new()?), Arc::new(Health::default()));
    let (tables, counters) = (config.state.open_tables()?, Arc::new(ingest::Counters::default()));
    let facts = Arc::new(Facts::new(Arc::new(config.clone()), metrics.clone(), health.clone())?);
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
