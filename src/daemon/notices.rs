//! Tells the destinations of `[[notifications]]` what happened: read from what is recorded anyway, so that a change by the
//! command line is told as well, and what happened while the daemon was down is told when it is back.
//!
//! Each destination has a loop and a file of its own that says up to where it was told. It is written after each delivery, so
//! that a crash may tell something twice and loses nothing. Rounds and promotions know nothing of this and never wait for it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use chrono::Utc;
use serde::{Deserialize, Serialize};
use tokio::sync::broadcast::{self, error::RecvError};
use tokio::sync::watch as channel;

use super::Daemon;
use crate::config::Config;
use crate::durable;
use crate::gate::standing::trials;
use crate::gate::{State, TrialRow};
use crate::metrics::{Delivery, Metrics};
use crate::notify::{Destination, Event, Notice};
use crate::registry::{self, Happened, Registry};
use crate::round::{Outcome, Paths, Verdict, book};
use crate::table::{Name, Tables};

/// How often the records are looked at.
const EVERY: Duration = Duration::from_secs(5);
/// Failures without a verdict that may wait for a destination.
const WAITING: usize = 16;

/// Up to where a destination was told, as its file holds it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Told {
    /// Events of the registry.
    events: usize,
    /// The newest round that had ended.
    round: Option<String>,
    /// Trials that had ended.
    trials: usize,
}

/// Nights that ended without a verdict, which leave no other record.
pub(super) struct Failures(broadcast::Sender<Notice>);

impl Default for Failures {
    fn default() -> Self {
        Failures(broadcast::Sender::new(WAITING))
    }
}

impl Failures {
    /// Tells that a night failed. Where nobody wants to know, nobody is told.
    pub(super) fn night(&self, config: &Config, error: &anyhow::Error) {
        let text = format!("the round failed, and the next one resumes it: {error:#}");
        let told = self.0.send(notice(config, Event::Failure, Utc::now().timestamp_micros(), &text));
        tracing::trace!(destinations = told.unwrap_or_default(), "a failed night was told");
    }
}

/// Tells every destination what happens until `stop` turns true.
pub(super) async fn keep(daemon: Arc<Daemon>, tables: Tables, stop: channel::Receiver<bool>) {
    let config = daemon.config();
    // Who is told holds until the daemon ends; what is told of is the config in force.
    let in_force = || daemon.config();
    let each = config.notifications.iter().map(|destination| {
        let teller = Teller {
            config: config.clone(),
            metrics: &daemon.metrics,
            tables: &tables,
            paths: Paths::new(&config.state.dir),
            destination,
            trials_as_of: None,
        };
        teller.keep(&in_force, daemon.failures.0.subscribe(), stop.clone())
    });
    futures::future::join_all(each).await;
}

/// One destination and what is told to it.
struct Teller<'a> {
    config: Arc<Config>,
    metrics: &'a Metrics,
    tables: &'a Tables,
    paths: Paths,
    destination: &'a Destination,
    /// Where the records of rounds and of the registry ended when the trials were last read, which costs more.
    trials_as_of: Option<(usize, Option<String>)>,
}

impl Teller<'_> {
    async fn keep(
        mut self,
        in_force: &(dyn Fn() -> Arc<Config> + Sync),
        mut failures: broadcast::Receiver<Notice>,
        mut stop: channel::Receiver<bool>,
    ) {
        loop {
            self.config = in_force();
            tokio::select! {
                () = self.turn() => {}
                _ = stop.wait_for(|stop| *stop) => return,
            }
            let failure = tokio::select! {
                () = tokio::time::sleep(EVERY) => continue,
                failure = failures.recv() => failure,
                _ = stop.wait_for(|stop| *stop) => return,
            };
            match failure {
                Ok(notice) => tokio::select! {
                    () = self.deliver(&notice) => {}
                    _ = stop.wait_for(|stop| *stop) => return,
                },
                Err(RecvError::Lagged(missed)) => {
                    tracing::warn!(
                        destination = self.destination.name,
                        missed,
                        "failures were not told: too many waited"
                    );
                }
                Err(RecvError::Closed) => return,
            }
        }
    }

    async fn turn(&mut self) {
        if let Err(error) = self.catch_up().await {
            self.trials_as_of = None;
            tracing::warn!(
                destination = self.destination.name,
                error = format!("{error:#}"),
                "what happened cannot be read and told now; the next try is in a moment"
            );
        }
    }

    /// Tells what happened since this destination was last told. A new destination is told what happens from now on.
    async fn catch_up(&mut self) -> Result<()> {
        let Some(mut told) = self.told()? else {
            let (_, now) = self.news(&Told::default()).await?;
            return self.remember(&now);
        };
        let (news, now) = self.news(&told).await?;
        for (notice, place) in news {
            self.deliver(&notice).await;
            told = place;
            self.remember(&told)?;
        }
        if told != now { self.remember(&now) } else { Ok(()) }
    }

    async fn deliver(&self, notice: &Notice) {
        if !self.destination.events.contains(&notice.event) {
            return;
        }
        let outcome = match self.destination.deliver(notice).await {
            Ok(()) => Delivery::Delivered,
            Err(error) => {
                tracing::error!(destination = self.destination.name, event = ?notice.event, %error, "a notice was given up");
                Delivery::Failed
            }
        };
        self.metrics.daemon.notices.get(outcome).inc();
    }

    /// Returns what happened after `told`, each with where one has been told it, and where all is told.
    async fn news(&mut self, told: &Told) -> Result<(Vec<(Notice, Told)>, Told)> {
        let mut news = Vec::new();
        let mut place = told.clone();
        let events = Registry::records(&self.paths.registry())?.history()?;
        for event in events.iter().skip(told.events) {
            place.events += 1;
            news.extend(of_event(&self.config, event).map(|notice| (notice, place.clone())));
        }
        for round in self.paths.round_ids()?.into_iter().filter(|id| Some(id) > told.round.as_ref()) {
            let Some(verdict) = book::verdict_of(&self.paths, &round)? else { continue };
            place.round = Some(round);
            news.extend(of_verdict(&self.config, &verdict).map(|notice| (notice, place.clone())));
        }
        let as_of = Some((events.len(), place.round.clone()));
        if self.trials_as_of != as_of && self.tables.exists(Name::Trials).await? {
            let rows: Vec<TrialRow> = book::read(self.tables, Name::Trials).await?;
            let ended = trials(&rows).into_iter().rev().filter(|row| row.state != State::Open);
            for row in ended.skip(told.trials) {
                place.trials += 1;
                news.extend(of_trial(&self.config, row).map(|notice| (notice, place.clone())));
            }
        }
        self.trials_as_of = as_of;
        Ok((news, place))
    }

    fn told(&self) -> Result<Option<Told>> {
        match durable::read_json(&self.file()) {
            Ok(told) => Ok(Some(told)),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn remember(&self, told: &Told) -> Result<()> {
        durable::create_folder(&self.folder())?;
        Ok(durable::write_json(&self.file(), told)?)
    }

    fn folder(&self) -> PathBuf {
        self.config.state.dir.join("notifications")
    }

    fn file(&self) -> PathBuf {
        self.folder().join(format!("{}.json", self.destination.name))
    }
}

fn notice(config: &Config, event: Event, time_us: i64, text: &str) -> Notice {
    Notice::new(event, time_us, &config.endpoint.stable_name, text)
}

/// Returns what is told of an event of the registry.
fn of_event(config: &Config, event: &registry::Event) -> Option<Notice> {
    let make = |kind: Event, text: String| notice(config, kind, event.time_us, &text);
    Some(match &event.what {
        Happened::Promoted { from, to, trial, .. } => {
            make(Event::Promotion, format!("{to} is served in place of {from}: its trial passed")).of(to).from(trial)
        }
        Happened::Overridden { from, to, operator, reason, .. } => {
            let text = format!("{to} is served in place of {from} on the word of {operator}: {reason}");
            make(Event::Promotion, text).of(to)
        }
        Happened::Imported { to, operator, reason, .. } => {
            make(Event::Promotion, format!("{to}, already in production, was imported by {operator}: {reason}")).of(to)
        }
        Happened::Rebased { base, operator, reason, .. } => {
            make(Event::Promotion, format!("the base model is {base} now, and served bare, by {operator}: {reason}"))
        }
        Happened::RolledBack { from, to, reason, .. } => {
            make(Event::Rollback, format!("{from} was rolled back to {to}: {reason}")).of(to)
        }
        Happened::Aborted { to, reason, .. } => {
            make(Event::Failure, format!("the change to {to} was undone: {reason}")).of(to)
        }
        Happened::Frozen { reason, by } => make(Event::Freeze, format!("promotions are frozen by {by}: {reason}")),
        Happened::Thawed { reason, by } => {
            make(Event::Freeze, format!("the freeze of promotions was lifted by {by}: {reason}"))
        }
        Happened::Registered { .. }
        | Happened::Quarantined { .. }
        | Happened::CanaryBegan { .. }
        | Happened::CanaryEnded { .. } => return None,
    })
}

/// Returns what is told of a night's end besides what its trial and the registry tell.
fn of_verdict(config: &Config, verdict: &Verdict) -> Option<Notice> {
    let now = Utc::now().timestamp_micros();
    let told = match &verdict.outcome {
        Outcome::Failed { reason } => {
            notice(config, Event::Failure, now, &format!("{} gave training up: {reason}", verdict.round))
        }
        Outcome::Promote { challenger, .. } if config.registry.promotion == registry::Promotion::Approval => {
            let text = format!("{challenger} passed its trial and waits for `taod gate approve` or `taod gate reject`");
            notice(config, Event::Promotion, now, &text).of(challenger)
        }
        _ => return None,
    };
    Some(told.from(&verdict.round))
}

/// Returns what is told of the end of a trial that led to nothing.
fn of_trial(config: &Config, row: &TrialRow) -> Option<Notice> {
    if matches!(row.state, State::Open | State::Promoted) {
        return None;
    }
    let (facts, state) = (&row.facts, row.state.as_str());
    let text = format!(
        "{} is not promoted: its trial ended {state} after {} prompts: {}",
        facts.challenger, row.steps, row.reason
    );
    Some(notice(config, Event::Refusal, row.time_us, &text).of(&facts.challenger).from(&facts.trial))
}

#[cfg(test)]
#[path = "notices_tests.rs"]
mod tests;
