//! What the daemon tells others about itself: metrics of what its parts count, and systemd's readiness and watchdog.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

use chrono::Utc;
use prometheus::IntCounter;
use sd_notify::NotifyState;
use tokio::sync::watch;

use super::TURN;
use crate::health::Health;
use crate::ingest::Counters;
use crate::metrics::{Commit, Metrics, Reason, Stage};
use crate::progress::Measure;
use crate::round::Verdict;

/// How often counts become metrics, and how often the watchdog is fed.
const EVERY: Duration = Duration::from_secs(2);

/// Copies what the ingestion counts into metrics, and feeds systemd's watchdog while all loops turn.
pub(super) async fn observe(
    metrics: Arc<Metrics>,
    health: Arc<Health>,
    counters: Arc<Counters>,
    mut stop: watch::Receiver<bool>,
) {
    let started = Instant::now();
    loop {
        health.beat("observe", TURN);
        export(&metrics, &counters);
        metrics.daemon.up_seconds.inc_by((started.elapsed().as_secs_f64() - metrics.daemon.up_seconds.get()).max(0.0));
        match counters.ready.load(Ordering::Relaxed) {
            true => health.ready("ingest"),
            false => health.not_ready("ingest", "the query log cannot be read and stored now; the log says why"),
        }
        if health.stuck(Instant::now()).is_empty() {
            notify(&[NotifyState::Watchdog]);
        }
        tokio::select! {
            () = tokio::time::sleep(EVERY) => {}
            _ = stop.wait_for(|stop| *stop) => break,
        }
    }
    export(&metrics, &counters);
    health.finished("observe");
}

fn export(metrics: &Metrics, counters: &Counters) {
    let m = &metrics.ingest;
    raise(&m.rows, counters.rows.load(Ordering::Relaxed));
    raise(&m.bytes, counters.bytes.load(Ordering::Relaxed));
    raise(m.commits.get(Commit::Committed), counters.commits.load(Ordering::Relaxed));
    let failed = counters.failed_commits.get();
    for outcome in [Commit::Fenced, Commit::Failed] {
        raise(m.commits.get(outcome), failed.get(crate::metrics::Label::as_str(outcome)).copied().unwrap_or_default());
    }
    counters.take_seals().iter().for_each(|took| m.commit_seconds.observe(took.as_secs_f64()));
    raise(&m.retries, counters.restarts.load(Ordering::Relaxed));
    m.lag_offsets.set(counters.lag.load(Ordering::Relaxed));
    m.partitions.set(counters.assigned.load(Ordering::Relaxed));
    let age = |ms: &AtomicI64| match ms.load(Ordering::Relaxed) {
        0 => 0.0,
        ms => (Utc::now().timestamp_millis() - ms).max(0) as f64 / 1000.0,
    };
    m.lag_seconds.set(age(&counters.behind_since_ms));
    m.data_age_seconds.set(age(&counters.newest_ms));
    by_reason(&counters.dead_letters.get(), |reason| m.dead_letters.get(reason));
    by_reason(&counters.skipped.get(), |reason| m.skips.get(reason));
}

fn by_reason<'a>(counts: &BTreeMap<&'static str, u64>, metric: impl Fn(Reason) -> &'a IntCounter) {
    let mut known: BTreeMap<&'static str, (Reason, u64)> = BTreeMap::new();
    for (name, count) in counts {
        let reason = Reason::from_name(name).unwrap_or(Reason::Other);
        known.entry(crate::metrics::Label::as_str(reason)).or_insert((reason, 0)).1 += count;
    }
    for (reason, count) in known.into_values() {
        raise(metric(reason), count);
    }
}

/// Brings a counter up to a total that somebody else counts.
fn raise(counter: &IntCounter, total: u64) {
    counter.inc_by(total.saturating_sub(counter.get()));
}

/// Shows what a round's process tells while it runs.
pub(super) fn measure(metrics: &Metrics, measure: &Measure) {
    let m = &metrics.training;
    match *measure {
        Measure::Step { tokens, samples, loss, kl, entropy, ratio, clipped, grad_norm, learning_rate, effective } => {
            m.steps.inc();
            m.tokens.inc_by(tokens);
            m.length.set(tokens as f64 / samples.max(1) as f64);
            let gauges = [
                (&m.loss, loss),
                (&m.kl, kl),
                (&m.entropy, entropy),
                (&m.ratio, ratio),
                (&m.clipped, clipped),
                (&m.gradient, grad_norm),
                (&m.learning_rate, learning_rate),
                (&m.effective, effective),
            ];
            gauges.into_iter().for_each(|(gauge, value)| gauge.set(f64::from(value)));
        }
    }
}

/// Shows the stages of a finished round.
pub(super) fn measure_round(metrics: &Metrics, verdict: &Verdict) {
    let mut seconds: BTreeMap<&'static str, (Stage, f64)> = BTreeMap::new();
    for stage in &verdict.stages {
        let name = stage.stage.split(' ').next().unwrap_or_default();
        let Some(label) = Stage::from_name(name) else { continue };
        metrics.rounds.tokens.get(label).inc_by(stage.tokens);
        seconds.entry(crate::metrics::Label::as_str(label)).or_insert((label, 0.0)).1 += stage.seconds;
    }
    for (label, seconds) in seconds.into_values() {
        metrics.rounds.stage_seconds.get(label).set(seconds);
    }
}

/// Tells systemd that the config and the state are loaded.
pub(super) fn ready() {
    notify(&[NotifyState::Ready]);
}

/// Tells systemd that what was read is being committed.
pub(super) fn stopping() {
    notify(&[NotifyState::Stopping]);
}

fn notify(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::debug!(%error, "systemd was not told");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_of_training_is_shown_number_by_number() {
        let metrics = Metrics::new().unwrap();
        let step = |loss| Measure::Step {
            tokens: 30,
            samples: 4,
            loss,
            kl: 0.25,
            entropy: 1.5,
            ratio: 1.125,
            clipped: 0.0625,
            grad_norm: 3.0,
            learning_rate: 0.5,
            effective: 0.75,
        };
        [step(2.0), step(1.0)].iter().for_each(|step| measure(&metrics, step));
        let text = metrics.render().unwrap();
        for line in [
            "steps_total 2",
            "tokens_total 60",
            "loss_nats 1",
            "kl_nats 0.25",
            "entropy_nats 1.5",
            "policy_ratio 1.125",
            "clipped_ratio 0.0625",
            "gradient_norm 3",
            "learning_rate 0.5",
            "effective_sample_ratio 0.75",
            "answer_tokens 7.5",
        ] {
            assert!(text.contains(&format!("\ntaod_training_{line}\n")), "{line} is not in {text}");
        }
    }
}
