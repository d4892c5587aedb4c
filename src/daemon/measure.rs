//! What rounds and trials leave in their folders and tables, as metrics: a round is another process, so the daemon reads what it
//! wrote. Where a gauge says "the latest", it says so from the first minute after a start as well.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::watch as channel;

use super::Daemon;
use crate::gate::standing::{standing, trials};
use crate::gate::{self, State, StepRow, TrialRow};
use crate::metrics::{Feature, Guardrail, Label, Metrics, Promotion, Split, Stage, TrialOutcome};
use crate::registry::{Happened, Registry};
use crate::round::{Paths, anchors, answers, book, live, population, view};
use crate::table::{Name, Tables};

/// How often the running step is looked at, and during a round the tables.
const EVERY: Duration = Duration::from_secs(15);

/// What was counted already: counters say what happened since this process started.
#[derive(Debug, Default)]
struct Counted {
    /// Trials that had ended.
    trials: BTreeSet<String>,
    /// Prompts that trials had used.
    steps: u64,
    /// Events of the registry.
    events: usize,
    /// The round whose answers were counted.
    scored: Option<String>,
}

/// Measures until `stop` turns true: at the start, during rounds, and once after each.
pub(super) async fn keep(daemon: Arc<Daemon>, tables: Tables, mut stop: channel::Receiver<bool>) {
    let paths = Paths::new(&daemon.config().state.dir);
    let mut counted = None;
    let mut was_running = true;
    loop {
        running_step(&daemon.metrics, &paths);
        let running = daemon.in_round.load(Ordering::Acquire);
        if (running || was_running)
            && let Err(error) = all(&daemon.metrics, &paths, &tables, &mut counted).await
        {
            tracing::warn!(
                error = format!("{error:#}"),
                "rounds and trials could not be measured; the next try is in a moment"
            );
        }
        was_running = running;
        tokio::select! {
            () = tokio::time::sleep(EVERY) => {}
            () = daemon.changed.notified() => was_running = true,
            _ = stop.wait_for(|stop| *stop) => return,
        }
    }
}

/// Shows which step runs and how far it is.
fn running_step(metrics: &Metrics, paths: &Paths) {
    let live = live::read(paths);
    let stage = live.as_ref().and_then(|live| match live.step.split(' ').next().unwrap_or_default() {
        "sample" => Some(Stage::Candidates),
        "tuning" => Some(Stage::Adapter),
        "gate" => Some(Stage::Gate),
        other => Stage::from_name(other),
    });
    metrics.rounds.stage.select(stage);
    let part = live.filter(|live| live.total > 0).map_or(0.0, |live| live.done as f64 / live.total as f64);
    metrics.rounds.progress.set(part.min(1.0));
}

async fn all(
    metrics: &Metrics,
    paths: &Paths,
    tables: &Tables,
    counted: &mut Option<Counted>,
) -> Result<(), anyhow::Error> {
    let since_start = counted.is_some();
    let mut count = counted.take().unwrap_or_default();
    served(metrics, paths, &mut count, since_start)?;
    let measured = async {
        latest_round(metrics, paths, tables, &mut count, since_start).await?;
        latest_trial(metrics, tables, &mut count, since_start).await
    };
    let result = measured.await;
    *counted = Some(count);
    result
}

fn served(metrics: &Metrics, paths: &Paths, count: &mut Counted, since_start: bool) -> Result<(), anyhow::Error> {
    let registry = Registry::records(&paths.registry())?;
    metrics.endpoint.current.set(&registry.current()?.version);
    metrics.endpoint.frozen.set(i64::from(registry.frozen()?.is_some()));
    let events = registry.history()?;
    for event in events.iter().skip(count.events).filter(|_| since_start) {
        let outcome = match event.what {
            Happened::Promoted { .. } | Happened::Overridden { .. } | Happened::Imported { .. } => Promotion::Promoted,
            Happened::RolledBack { .. } => Promotion::RolledBack,
            Happened::Aborted { .. } => Promotion::Aborted,
            Happened::Quarantined { .. } => Promotion::Quarantined,
            Happened::Registered { .. }
            | Happened::Rebased { .. }
            | Happened::CanaryBegan { .. }
            | Happened::CanaryEnded { .. }
            | Happened::Frozen { .. }
            | Happened::Thawed { .. } => continue,
        };
        metrics.endpoint.promotions.get(outcome).inc();
    }
    count.events = events.len();
    Ok(())
}

async fn latest_round(
    metrics: &Metrics,
    paths: &Paths,
    tables: &Tables,
    count: &mut Counted,
    since_start: bool,
) -> Result<(), anyhow::Error> {
    let Some(seen) = view::rounds(paths, 5)?.into_iter().find(|seen| seen.dataset.is_some()) else { return Ok(()) };
    if let Some(dataset) = &seen.dataset {
        for (split, part) in
            [(Split::Train, &dataset.train), (Split::Gate, &dataset.gate), (Split::Audit, &dataset.audit)]
        {
            metrics.rounds.prompts.get(split).set(part.prompts as i64);
        }
        metrics.rounds.excluded.set(dataset.excluded.values().sum::<u64>() as i64);
    }
    let round = seen.plan.round;
    shifts(metrics, population::read(paths, &round)?.as_ref());
    let standings = anchors::read(paths, &round)?.unwrap_or_default();
    metrics.rewards.anchor_shift.set(standings.iter().map(|standing| standing.shift).fold(0.0, f64::max));
    metrics.rewards.anchor_moved.set(i64::from(standings.iter().any(|standing| standing.alarm)));
    let Some(rewards) = answers::summary(tables, &round).await? else { return Ok(()) };
    metrics.rewards.mean.set(rewards.mean);
    metrics.rewards.passed.set(rewards.passed);
    metrics.rewards.best.set(rewards.best);
    // Counted once, when it is over; what was over before the start belongs to another process.
    if seen.verdict.is_some() && count.scored.as_ref() != Some(&round) {
        if since_start {
            metrics.rewards.answers.inc_by(rewards.answers);
        }
        count.scored = Some(round);
    }
    Ok(())
}

/// Shows how far the prompts' population moved; 0 where there was too little to tell.
fn shifts(metrics: &Metrics, population: Option<&population::Population>) {
    for feature in Feature::ALL {
        let shift = population.and_then(|p| p.shifts.iter().find(|shift| shift.feature.as_str() == feature.as_str()));
        metrics.rounds.shift.get(*feature).set(shift.map_or(0.0, |shift| shift.index));
        metrics.rounds.shifted.get(*feature).set(shift.map_or(0, |shift| i64::from(shift.alarm)));
    }
}

async fn latest_trial(
    metrics: &Metrics,
    tables: &Tables,
    count: &mut Counted,
    since_start: bool,
) -> Result<(), anyhow::Error> {
    if !tables.exists(Name::Trials).await? {
        return Ok(());
    }
    let rows: Vec<TrialRow> = book::read(tables, Name::Trials).await?;
    let steps: Vec<StepRow> = book::read(tables, Name::GateSteps).await?;
    let all = trials(&rows);
    let m = &metrics.gate;
    for ended in all.iter().filter(|row| row.state != State::Open && !count.trials.contains(&row.facts.trial)) {
        if let Some(outcome) = TrialOutcome::from_name(ended.state.as_str()).filter(|_| since_start) {
            m.trials.get(outcome).inc();
        }
    }
    count.trials = all.iter().filter(|row| row.state != State::Open).map(|row| row.facts.trial.clone()).collect();
    let used = steps.len() as u64;
    if since_start {
        m.prompts.inc_by(used.saturating_sub(count.steps));
    }
    count.steps = used;
    let open = all.iter().filter(|row| row.state == State::Open).count();
    m.open.set(open as i64);
    // The open trial, and where there is none the newest: its guardrails say why it was refused.
    let Some(newest) = all.iter().find(|row| row.state == State::Open).or(all.first()) else { return Ok(()) };
    let verdict = standing(&newest.facts.trial, &rows, &steps)?;
    for finding in &verdict.findings {
        if let Some(guardrail) = Guardrail::from_name(finding.guardrail.as_str()) {
            m.guardrails.get(guardrail).set(match finding.outcome {
                gate::Outcome::Pass => 1,
                gate::Outcome::NotYet => 0,
                gate::Outcome::Fail => -1,
            });
        }
    }
    let (wealth, bar, gain, prompts) = match open {
        0 => (0.0, 0.0, 0.0, 0),
        _ => (verdict.ln_wealth, verdict.bar, verdict.mean_gain, verdict.steps),
    };
    m.wealth.set(wealth);
    m.bar.set(bar);
    m.gain.set(gain);
    m.trial_prompts.set(prompts as i64);
    Ok(())
}
