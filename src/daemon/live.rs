//! The watch over what clients get from a promoted version, and the rollback where it falls.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use chrono::{DateTime, Utc};
use serde::Deserialize;
use tokio::sync::watch as channel;

use super::evaluations::{self, Evaluation};
use super::{Daemon, lease, load_model, promotion};
use crate::config::Config;
use crate::endpoint::watch::{Action, Seen, judge};
use crate::metrics::Part;
use crate::record::{FinishReason, Message};
use crate::registry::{BASE, Happened, Registry};
use crate::rewards::{Item, Rewards};
use crate::round::Paths;
use crate::table::{Name, Table};

/// A logged answer, as it is scored.
#[derive(Debug, Deserialize)]
pub(super) struct Answer {
    workload: Option<String>,
    messages: serde_json::Value,
    response: String,
    finish_reason: Option<String>,
    event_time: DateTime<Utc>,
    request_id: Option<String>,
    trace_id: Option<String>,
}

impl Answer {
    pub(super) fn item(self) -> Option<Item> {
        let length = self.finish_reason.as_deref() == Some(FinishReason::Length.as_str());
        Some(Item {
            workload: self.workload,
            messages: read_messages(&self.messages)?,
            response: self.response,
            finish_reason: if length { FinishReason::Length } else { FinishReason::Stop },
            prompt_ids: None,
            token_ids: None,
            ratings: Vec::new(),
        })
    }
}

/// Reads messages whether the table gives them as a tree or as text.
fn read_messages(value: &serde_json::Value) -> Option<Vec<Message>> {
    match value.as_str() {
        Some(text) => serde_json::from_str(text).ok(),
        None => serde_json::from_value(value.clone()).ok(),
    }
}

/// Looks at the live reward now and then, while this process owns the lease.
pub(super) async fn keep(daemon: Arc<Daemon>, mut owner: lease::Owner, mut stop: channel::Receiver<bool>) {
    // The endpoint's section holds until the daemon ends.
    let settings = daemon.config().endpoint.watch.clone();
    if settings.action == Action::Off {
        return;
    }
    let every = Duration::from_secs(60 * settings.every_minutes);
    loop {
        tokio::select! {
            () = tokio::time::sleep(every) => {}
            _ = stop.wait_for(|stop| *stop) => return,
        }
        tokio::select! {
            () = owner.gained() => {}
            _ = stop.wait_for(|stop| *stop) => return,
        }
        let config = daemon.config();
        tokio::select! {
            looked = look_and_act(&config) => daemon.looked(looked),
            _ = stop.wait_for(|stop| *stop) => return,
        }
    }
}

impl Daemon {
    fn looked(&self, looked: Result<Option<promotion::Promoted>>) {
        match looked {
            Ok(None) => self.health.ready("live reward"),
            Ok(Some(back)) => {
                self.metrics.endpoint.current.set(&back.to);
                tracing::error!(from = back.from, to = back.to, "the live reward fell, so the version was rolled back");
            }
            Err(error) => {
                self.metrics.daemon.errors.get(Part::Promotion).inc();
                self.health.not_ready("live reward", format!("{error:#}"));
                tracing::error!(error = format!("{error:#}"), "the live reward could not be watched");
            }
        }
    }
}

/// Looks at the canary, and takes it away where it earns less than the served version. Returns the reason.
async fn look_at_canary(config: &Config) -> Result<Option<String>> {
    let paths = Paths::new(&config.state.dir);
    let registry = Registry::open(&paths.registry(), &config.registry)?;
    let Some(canary) = registry.canary()? else { return Ok(None) };
    let served = registry.current()?.version;
    let since = |version: &str| {
        // The names are ours: no quote is in them. A gateway may put a provider before a name.
        let own = format!("coalesce(served_version, model) like '%{version}'");
        format!("{own} and {}", at(">=", canary.since_us))
    };
    let served = if served == BASE { config.endpoint.base_model.clone() } else { served };
    let (seen, _) = compare(config, &since(&served.replace('\'', "''")), &since(&canary.version)).await?;
    let Some(fall) = seen.fall() else { return Ok(None) };
    let reason = format!("as canary {fall}");
    if config.endpoint.watch.action == Action::Rollback {
        super::canary::end(config, Some(&canary.version), &reason).await?;
    }
    Ok(Some(reason))
}

/// Looks at the live reward, and rolls back where it fell and the settings say so. Returns the rollback.
pub async fn look_and_act(config: &Config) -> Result<Option<promotion::Promoted>> {
    if let Some(reason) = look_at_canary(config).await? {
        tracing::error!(reason, "the canary earns less than what is served");
    }
    let judged = Registry::open(&Paths::new(&config.state.dir).registry(), &config.registry)?.current()?.version;
    let Some(reason) = look(config).await?.and_then(|seen| seen.fall()) else { return Ok(None) };
    if config.endpoint.watch.action != Action::Rollback {
        tracing::error!(reason, "the live reward fell; roll back, or set endpoint.watch.action");
        return Ok(None);
    }
    let model = load_model(config).await?;
    promotion::rollback(config, Some(&judged), &reason, &model).await.map(Some)
}

/// Scores the answers before and after the newest promotion; `None` where no promoted version is served.
pub async fn look(config: &Config) -> Result<Option<Seen>> {
    let paths = Paths::new(&config.state.dir);
    let registry = Registry::open(&paths.registry(), &config.registry)?;
    let current = registry.current()?;
    if current.version == BASE {
        return Ok(None);
    }
    let settle = i64::try_from(config.endpoint.watch.settle_seconds)?.saturating_mul(1_000_000);
    let before = format!("{} order by event_time desc", at("<", current.since_us));
    // What a canary answered since is not the served version's doing.
    let tried = registry.history()?.into_iter().filter_map(|event| match event.what {
        Happened::CanaryBegan { version, .. } if version != current.version => Some(version),
        _ => None,
    });
    let others: String =
        tried.map(|version| format!(" and coalesce(served_version, model, '') not like '%{version}'")).collect();
    let after = format!("{}{others} order by event_time", at(">=", current.since_us.saturating_add(settle)));
    let (seen, scored) = compare(config, &before, &after).await?;
    // The watch does not depend on who else is told.
    if let Err(error) = evaluations::send(config, &scored).await {
        tracing::warn!(error = format!("{error:#}"), "scores of calls were not sent; they are with the next ones");
    }
    Ok(Some(seen))
}

/// Scores two kinds of answers, so many of each as the settings allow, and holds one against the other. Returns the scores, too.
async fn compare(config: &Config, before: &str, after: &str) -> Result<(Seen, Vec<Evaluation>)> {
    let (settings, tables) = (&config.endpoint.watch, config.state.open_tables()?);
    let (queries, limit) = (tables.open_one(Name::Queries).await?, settings.max_answers);
    let before = answers(config, &queries, &format!("{before} limit {limit}")).await?;
    let after = answers(config, &queries, &format!("{after} limit {limit}")).await?;
    if before.len().min(after.len()) < settings.min_answers {
        return Ok((Seen::Waiting { before: before.len(), after: after.len() }, Vec::new()));
    }
    let (rewards, workloads) = (config.rewards.clone(), config.workload.clone());
    let work = move || {
        let rewards = Rewards::without_base(&rewards, &workloads)?;
        Ok::<_, anyhow::Error>((score(&rewards, before)?, score(&rewards, after)?))
    };
    let (before, after) = tokio::task::spawn_blocking(work).await??;
    let totals = |scored: &[Evaluation]| scored.iter().map(|one| one.score).collect::<Vec<_>>();
    let seen = judge(&totals(&before), &totals(&after), settings);
    Ok((seen, [before, after].concat()))
}

/// Scores the answers whose workload has rules.
fn score(rewards: &Rewards, answers: Vec<Answer>) -> Result<Vec<Evaluation>> {
    let call = |answer: Answer| {
        let (time_us, response_id) = (answer.event_time.timestamp_micros(), answer.request_id.clone());
        let unscored =
            Evaluation { time_us, response_id, trace_id: answer.trace_id.clone(), score: 0.0, passed: false };
        Some((unscored, answer.item()?))
    };
    let covered = |(_, item): &(Evaluation, Item)| rewards.covers(item.workload.as_deref());
    let (calls, items): (Vec<Evaluation>, Vec<Item>) = answers.into_iter().filter_map(call).filter(covered).unzip();
    let scored = calls.into_iter().zip(rewards.gate(&items)?);
    Ok(scored.map(|(call, one)| Evaluation { score: one.total, passed: one.passed, ..call }).collect())
}

fn at(relation: &str, us: i64) -> String {
    format!("event_time {relation} arrow_cast({us}, 'Timestamp(Microsecond, Some(\"UTC\"))')")
}

/// Returns the answers that clients got, not those that taod asked for, of the traffic that this daemon is about.
pub(super) async fn answers(config: &Config, queries: &Table, which: &str) -> Result<Vec<Answer>> {
    let columns = "workload, messages, response, finish_reason, event_time, request_id, trace_id";
    let theirs = "kind = 'call' and status = 200 and response is not null and coalesce(reason, '') <> 'self'";
    let ours = wanted(config);
    Ok(queries.select(&format!("select {columns} from t where {theirs} and {ours} and {which}")).await?)
}

/// Returns `dataset.filter` as a condition; a row of which it says nothing is left out, as it is from a dataset.
pub(super) fn wanted(config: &Config) -> String {
    match config.dataset.filter.trim() {
        "" => "true".into(),
        // On lines of its own, for a comment at its end.
        filter => format!("coalesce((\n{filter}\n), false)"),
    }
}
