//! When a night begins, where its round runs, and what becomes of what it found.
//!
//! A night begins by the schedule, by enough new prompts, or because an operator asks. It waits for the window and leaves off
//! when that closes; what it left is gone on with in the next. A failure is logged, shown, and over with.

use std::fs::TryLockError;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use chrono::{DateTime, Utc};
use serde_json::json;
use tokio::sync::watch as channel;

use super::{Daemon, lease, live, load_model, promotion, watch};
use crate::config::Config;
use crate::dataset::population::Shift;
use crate::durable;
use crate::metrics::RoundOutcome;
use crate::progress::Measure;
use crate::registry::Promotion;
use crate::round::{self, Outcome, Paths, RoundError, Verdict, drift};
use crate::schedule::{RunIn, Schedule, Window};
use crate::table::Name;

/// How often new prompts are counted, where their number starts a round.
const COUNT_EVERY: Duration = Duration::from_secs(300);
/// How often the population of the prompts is looked at, where its shift starts a round.
const COMPARE_EVERY: Duration = Duration::from_secs(1800);
/// How often a round that runs in a unit is looked after, and how long that unit may take to start.
const UNIT_EVERY: Duration = Duration::from_secs(5);
const UNIT_STARTS_WITHIN: Duration = Duration::from_secs(120);

/// How often the clock is looked at while a night is waited for.
const LOOK_EVERY: Duration = Duration::from_secs(10);

/// What a night came to.
#[derive(Debug)]
pub struct Night {
    pub verdict: Verdict,
    /// The change of the served version, where there was one.
    pub promoted: Option<promotion::Promoted>,
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

/// Returns true where a night ended because its round was paused.
pub fn is_pause(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(RoundError::Paused { .. }))
}

/// Returns after how long without a piece of work a round's process is ended.
pub fn stall(config: &Config) -> Option<Duration> {
    let seconds = config.round.stall_seconds;
    (seconds > 0).then(|| Duration::from_secs(seconds))
}

/// Why a night begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cause {
    Due,
    NewPrompts,
    Drift,
    /// An operator's word, which goes by no window.
    Asked,
}

/// Waits for each night and runs it while this process owns the lease.
pub(super) async fn keep(daemon: Arc<Daemon>, mut owner: lease::Owner, mut stop: channel::Receiver<bool>) {
    let mut last_start = last_round(&daemon.config());
    let mut left = if has_unfinished(&daemon.config()) { Left::ToTheWindow } else { Left::Nothing };
    let mut was_away = false;
    loop {
        tokio::select! {
            () = owner.gained() => {}
            _ = stop.wait_for(|stop| *stop) => return,
        }
        let config = daemon.config();
        if std::mem::take(&mut was_away) {
            // Another owner may have had the night meanwhile.
            last_start = last_start.max(last_round(&config));
        }
        // The settings were checked when the config was read.
        let Ok(schedule) = Schedule::new(&config.schedule) else { return };
        let now = Utc::now();
        let due = match left {
            // Another owner may have ended it meanwhile.
            Left::ToTheLease if has_unfinished(&config) => Some(now),
            Left::ToTheWindow if schedule.window().is_some() => Some(now),
            Left::ToTheLease | Left::ToTheWindow | Left::Nothing => schedule.due(last_start, now),
        };
        let start = due.map(|due| schedule.start(due, now));
        daemon.metrics.rounds.next_start.set(start.map_or(0.0, |start| start.timestamp() as f64));
        tracing::debug!(?start, "waiting for the next round");
        let cause = tokio::select! {
            waited = wait(start) => match waited {
                Waited::Due => Cause::Due,
                // The schedule is asked again, by the time that it is now.
                Waited::SetBack => continue,
            },
            () = daemon.run_now.notified() => Cause::Asked,
            () = enough(&config, schedule.window().copied(), last_start) => Cause::NewPrompts,
            () = drifted(&config, schedule.window().copied(), last_start) => Cause::Drift,
            // The schedule may be another one now.
            () = daemon.reloaded.notified() => continue,
            () = owner.lost() => {
                was_away = true;
                continue;
            }
            _ = stop.wait_for(|stop| *stop) => return,
        };
        tracing::info!(?cause, "a round begins");
        let (begun, had) = (Some(Utc::now()), last_start);
        // The same night goes on, whatever the clock says by now.
        last_start = if left == Left::ToTheLease { begun.max(last_start) } else { begun };
        daemon.metrics.rounds.last_start.set(Utc::now().timestamp() as f64);
        daemon.in_round.store(true, Ordering::Release);
        let window = schedule.window().copied().filter(|_| cause != Cause::Asked);
        let result = tokio::select! {
            result = one(&daemon, &config, window) => result,
            () = owner.lost() => {
                tracing::warn!("the lease was lost, so the round ends here; its next owner resumes it");
                daemon.in_round.store(false, Ordering::Release);
                was_away = true;
                // A unit goes on by itself.
                left = if config.schedule.run_in == RunIn::Child { Left::ToTheLease } else { Left::Nothing };
                // As after a restart: a night that left no plan was not had, and comes when it is its time.
                if left == Left::ToTheLease && !has_unfinished(&config) {
                    last_start = had;
                }
                continue;
            }
            // Dropping the night kills its child; what it had finished is resumed by the next one.
            _ = stop.wait_for(|stop| *stop) => return,
        };
        daemon.in_round.store(false, Ordering::Release);
        daemon.metrics.rounds.last_end.set(Utc::now().timestamp() as f64);
        left = if matches!(&result, Err(error) if is_pause(error)) { Left::ToTheWindow } else { Left::Nothing };
        daemon.told(result);
    }
}

/// Which round is to be gone on with, and when.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Left {
    Nothing,
    /// One that was paused, or cut off by the daemon's end: when the window is open.
    ToTheWindow,
    /// One that was cut off because the lease was lost, as it is where the clock jumps: as soon as the lease is back.
    ToTheLease,
}

/// How a wait for a time ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Waited {
    Due,
    /// The clock was set back, and what was waited for may not be the next run any more.
    SetBack,
}

/// Waits until `start` by the clock on the wall, whatever becomes of that; for ever where no time starts a round.
async fn wait(start: Option<DateTime<Utc>>) -> Waited {
    let Some(start) = start else { return std::future::pending().await };
    let mut before = Utc::now();
    loop {
        let now = Utc::now();
        if now < before {
            tracing::warn!(seconds = (before - now).num_seconds(), "the clock was set back");
            return Waited::SetBack;
        }
        let Some(rest) = (start - now).to_std().ok().filter(|rest| !rest.is_zero()) else { return Waited::Due };
        before = now;
        tokio::time::sleep(rest.min(LOOK_EVERY)).await;
    }
}

/// Runs one night where the config says.
async fn one(daemon: &Daemon, config: &Config, window: Option<Window>) -> Result<Night> {
    match config.schedule.run_in {
        RunIn::Child => {
            let launch = round::child::Launch {
                config: daemon.config_file.clone(),
                until: window.map(|window| window.closes(Utc::now())),
                stall: stall(config),
                ..Default::default()
            };
            let measured = |measure: &Measure| watch::measure(&daemon.metrics, measure);
            night(config, &launch, &measured).await
        }
        RunIn::Unit => in_unit(config).await,
    }
}

/// Asks for a round by a file, and waits until the unit that answers it has ended.
async fn in_unit(config: &Config) -> Result<Night> {
    let paths = Paths::new(&config.state.dir);
    let before = round::book::newest_verdict(&paths)?.map(|v| v.round);
    durable::write_json(&paths.due(), &json!({ "asked": Utc::now() }))?;
    let asked = tokio::time::Instant::now();
    while paths.due().exists() {
        if asked.elapsed() > UNIT_STARTS_WITHIN {
            drop(std::fs::remove_file(paths.due()));
            bail!(
                "{} was not answered: enable taod-round.path (`systemctl enable --now taod-round.path`), or set \
                 schedule.run_in to \"child\"",
                paths.due().display()
            );
        }
        tokio::time::sleep(UNIT_EVERY).await;
    }
    while is_running(&paths)? {
        tokio::time::sleep(UNIT_EVERY).await;
    }
    let verdict = round::book::newest_verdict(&paths)?.filter(|v| Some(&v.round) != before.as_ref());
    match verdict {
        // The unit has promoted by itself where there was something to promote.
        Some(verdict) => Ok(Night { verdict, promoted: None }),
        None if paths.unfinished()?.is_some() => Err(RoundError::Paused { round: "the round".into() }.into()),
        None => bail!("taod-round.service ended without a verdict: see `journalctl -u taod-round`"),
    }
}

/// Returns true while some process holds the round's lock.
fn is_running(paths: &Paths) -> Result<bool> {
    match paths.probe() {
        Ok(()) => Ok(false),
        Err(TryLockError::WouldBlock) => Ok(true),
        Err(TryLockError::Error(error)) => Err(error).context("the round's lock cannot be looked at"),
    }
}

/// Waits until enough new prompts came and the window is open; for ever where their number starts no round.
async fn enough(config: &Config, window: Option<Window>, since: Option<DateTime<Utc>>) {
    let wanted = config.schedule.new_prompts;
    if wanted == 0 {
        return std::future::pending().await;
    }
    loop {
        tokio::time::sleep(COUNT_EVERY).await;
        match new_prompts(config, since).await {
            Ok(found) if found >= wanted && window.is_none_or(|window| window.is_open(Utc::now())) => return,
            Ok(found) => tracing::debug!(found, wanted, "new prompts since the last round began"),
            Err(error) => tracing::warn!(error = format!("{error:#}"), "new prompts could not be counted; tried again"),
        }
    }
}

/// Waits until the prompts' population has shifted and the window is open; for ever where that starts no round.
async fn drifted(config: &Config, window: Option<Window>, since: Option<DateTime<Utc>>) {
    let (Some(from), Some(since)) = (config.schedule.drift_from(since), since) else {
        return std::future::pending().await;
    };
    loop {
        tokio::time::sleep(COMPARE_EVERY).await;
        if Utc::now() < from || window.is_some_and(|window| !window.is_open(Utc::now())) {
            continue;
        }
        match shifted(config, since).await {
            Ok(shifts) if !shifts.is_empty() => {
                for shift in shifts {
                    let (feature, index, chance) = (shift.feature.as_str(), shift.index, shift.chance);
                    tracing::info!(feature, index, chance, "the prompts are others than before the last round");
                }
                return;
            }
            Ok(_) => {}
            Err(error) => tracing::warn!(error = format!("{error:#}"), "prompts could not be compared; tried again"),
        }
    }
}

/// Compares the prompts since the last round began with those of the week before it.
async fn shifted(config: &Config, since: DateTime<Utc>) -> Result<Vec<Shift>> {
    let mut settings = config.dataset.population.clone();
    settings.index = config.schedule.drift_index;
    let question = drift::Question { since, wanted: &live::wanted(config), settings: &settings };
    Ok(drift::shifted(&config.state.open_tables()?, &question).await?)
}

/// Counts the distinct prompts that may train and were asked since `since`. The bounds of times in the table's log leave all
/// older files unread.
async fn new_prompts(config: &Config, since: Option<DateTime<Utc>>) -> Result<u64> {
    #[derive(serde::Deserialize)]
    struct Count {
        n: u64,
    }
    let Some(queries) = config.state.open_tables()?.open_existing(Name::Queries).await? else { return Ok(0) };
    let since = since.map_or(0, |since| since.timestamp_micros());
    let sql = format!(
        "select count(distinct prompt_hash) as n from t where train_ok and {} and event_time > arrow_cast({since}, 'Timestamp(Microsecond, Some(\"UTC\"))')",
        live::wanted(config)
    );
    let counted: Vec<Count> = queries.select(&sql).await?;
    Ok(counted.first().map_or(0, |count| count.n))
}

impl Daemon {
    fn told(&self, result: Result<Night>) {
        match result {
            Ok(night) => self.ended(&night),
            Err(error) if is_pause(&error) => {
                self.health.ready("round");
                tracing::info!("the round was paused; it goes on in the next window");
            }
            Err(error) => {
                self.metrics.rounds.ended.get(RoundOutcome::Failed).inc();
                self.health.not_ready("round", format!("{error:#}"));
                self.failures.night(&self.config(), &error);
                tracing::error!(error = format!("{error:#}"), "the round failed; the next one resumes it");
            }
        }
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
    let plan: round::Plan = durable::read_json(&paths.round(&newest).join(Path::new("plan.json"))).ok()?;
    DateTime::from_timestamp_micros(plan.created_us)
}

fn has_unfinished(config: &Config) -> bool {
    Paths::new(&config.state.dir).unfinished().is_ok_and(|round| round.is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(offset: usize, hash: &str, time: &str, train_ok: bool) -> serde_json::Value {
        json!({
            "topic": "calls", "partition": 0, "offset": offset, "record_index": 0, "event_time": time,
            "ingest_date": "2026-05-01", "kind": "call", "status": 200, "messages": [], "params": {}, "prompt_hash": hash,
            "format": "openai", "redacted": false, "train_ok": train_ok, "sample_weight": 1.0, "truncated": false,
            "taod_version": "0", "config_hash": "none", "extra": {},
        })
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn new_prompts_are_distinct_may_train_and_came_after_the_last_round_began() {
        let folder = tempfile::tempdir().unwrap();
        let mut config = Config::default();
        config.state.dir = folder.path().to_path_buf();
        assert_eq!(new_prompts(&config, None).await.unwrap(), 0, "no table is no prompt");
        let rows = [
            row(0, "a", "2026-05-01T12:00:00Z", true),
            row(1, "b", "2026-05-01T13:00:00Z", true),
            row(2, "b", "2026-05-01T13:00:01Z", true),
            row(3, "c", "2026-05-01T13:00:02Z", false),
            row(4, "d", "2026-05-01T14:00:00Z", true),
        ];
        let mut queries = config.state.open_tables().unwrap().open_one(Name::Queries).await.unwrap();
        queries.append_rows(&rows, &[]).await.unwrap();
        assert_eq!(new_prompts(&config, None).await.unwrap(), 3);
        let since = "2026-05-01T12:00:00Z".parse().unwrap();
        assert_eq!(new_prompts(&config, Some(since)).await.unwrap(), 2);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_round_that_is_asked_of_a_unit_is_waited_for_and_its_verdict_read() {
        let folder = tempfile::tempdir().unwrap();
        let mut config = Config::default();
        config.state.dir = folder.path().to_path_buf();
        let paths = Paths::new(folder.path());
        let unit = {
            let paths = paths.clone();
            // What taod-round.service does, without the work.
            move || {
                while !paths.due().exists() {
                    std::thread::yield_now();
                }
                let lock = paths.lock().unwrap();
                std::fs::remove_file(paths.due()).unwrap();
                let round = paths.round("round-00001");
                std::fs::create_dir_all(&round).unwrap();
                std::fs::write(round.join("plan.json"), "{}").unwrap();
                let outcome = json!({ "result": "skipped", "reason": "test" });
                let verdict = json!({ "round": "round-00001", "outcome": outcome, "stages": [] });
                std::fs::write(round.join("outcome.json"), verdict.to_string()).unwrap();
                drop(lock);
            }
        };
        let unit = tokio::task::spawn_blocking(unit);
        let night = in_unit(&config).await.unwrap();
        unit.await.unwrap();
        assert_eq!((night.verdict.round.as_str(), night.promoted.is_none()), ("round-00001", true));
    }
}
