//! Reading and writing the tables of decisions: each row once, whatever crashes in between.
//!
//! The lease lets one daemon judge at a time, but a lease is a clock, and a process that slept through its end acts once
//! more. So what a decision rests on is bound to what was read: a trial's number to the trials before it, a cluster's
//! reservation to all reservations, a night and its steps to whoever wrote them first. The second writer is told.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{Outcome, Paths, RoundError, Verdict};
use crate::gate::{self, GateError, Opening, Passed, StepRow, Trial, TrialRow, UsageRow};
use crate::table::{Name, TableError, Tables, TxnStep};

/// A row with the time at which it was stored.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Stored<T> {
    time: DateTime<Utc>,
    #[serde(flatten)]
    row: T,
}

/// Returns the row stamped now.
pub fn stored<T>(row: T) -> Stored<T> {
    Stored { time: Utc::now(), row }
}

/// Reads all rows of a small table.
pub async fn read<T: DeserializeOwned>(tables: &Tables, name: Name) -> Result<Vec<T>, TableError> {
    tables.open_one(name).await?.rows(None).await
}

/// Whether rows were appended now or had been before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Landed {
    Now,
    Before,
}

/// Appends rows under a name of their own; what was appended under it before is not appended again.
pub async fn append_once<T: Serialize>(
    tables: &Tables,
    name: Name,
    app_id: &str,
    rows: &[T],
) -> Result<Landed, TableError> {
    let mut table = tables.open_one(name).await?;
    if rows.is_empty() || table.txn(app_id).await?.is_some() {
        return Ok(Landed::Before);
    }
    let step = TxnStep { app_id: app_id.to_string(), expect: None, set: 1 };
    table.append_rows(rows, &[step]).await.map(|_| Landed::Now)
}

/// Tries of a commit that others got ahead of.
const ATTEMPTS: u32 = 5;

/// Opens the next trial of the year and stores it in one commit with the count of trials it was numbered by: of two that
/// open at once, the second reads again and finds the first one open.
pub async fn open_trial(tables: &Tables, opening: &Opening, settings: &gate::Settings) -> Result<Trial, RoundError> {
    const OPENED: &str = "taod/trials/opened";
    let mut attempt = 0;
    loop {
        attempt += 1;
        let mut table = tables.open_one(Name::Trials).await?;
        let last = table.txn(OPENED).await?;
        let trial = Trial::open(opening.clone(), &table.rows::<TrialRow>(None).await?, settings)?;
        let row = trial.row(gate::State::Open, "opened", Utc::now().timestamp_micros());
        let steps = [
            TxnStep { app_id: OPENED.to_string(), expect: last, set: last.unwrap_or(0) + 1 },
            TxnStep { app_id: trial_name(&row), expect: None, set: 1 },
        ];
        match table.append_rows(&[stored(row)], &steps).await {
            Ok(_) => return Ok(trial),
            Err(TableError::Fenced { .. }) if attempt < ATTEMPTS => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Stores one change of a trial. What another writer stored in its place is an error.
pub async fn store_trial(tables: &Tables, row: &TrialRow) -> Result<(), RoundError> {
    if append_once(tables, Name::Trials, &trial_name(row), &[stored(row.clone())]).await? == Landed::Now {
        return Ok(());
    }
    let same = |other: &TrialRow| {
        let (a, b) = (&other.facts, &row.facts);
        a == b
            && (other.state, other.night, other.steps) == (row.state, row.night, row.steps)
            && other.record == row.record
    };
    match read::<TrialRow>(tables, Name::Trials).await?.iter().any(same) {
        true => Ok(()),
        false => Err(GateError::Contended { trial: row.facts.trial.clone() }.into()),
    }
}

/// Returns the name under which a row of a trial is appended: one for its opening, one for each night, one for its end.
fn trial_name(row: &TrialRow) -> String {
    match row.state {
        gate::State::Open => format!("taod/trials/{}/{}/open", row.facts.trial, row.night),
        _ => format!("taod/trials/{}/closed", row.facts.trial),
    }
}

/// Stores the steps of one block. Steps that another writer stored in their place are an error.
pub async fn store_steps(tables: &Tables, trial: &str, rows: Vec<StepRow>) -> Result<(), RoundError> {
    let Some(first) = rows.first().map(|row| row.step) else { return Ok(()) };
    let rows: Vec<_> = rows.into_iter().map(stored).collect();
    match append_once(tables, Name::GateSteps, &format!("taod/gate_steps/{trial}/{first}"), &rows).await? {
        Landed::Now => Ok(()),
        Landed::Before => Err(GateError::Contended { trial: trial.to_string() }.into()),
    }
}

/// Reserves clusters for a trial. It lands only if nobody reserved anything since the reservations were read; a cluster of
/// another trial among them is refused as [`GateError::Reused`].
pub async fn reserve(tables: &Tables, wanted: &[UsageRow]) -> Result<(), RoundError> {
    const APP_ID: &str = "taod/gate_usage";
    let mut attempt = 0;
    loop {
        attempt += 1;
        let mut table = tables.open_one(Name::GateUsage).await?;
        let last = table.txn(APP_ID).await?;
        let known: Vec<UsageRow> = table.rows(None).await?;
        let taken = |known: &&UsageRow| wanted.iter().any(|row| row.cluster == known.cluster && row != *known);
        if let Some(other) = known.iter().find(taken) {
            return Err(GateError::Reused { cluster: other.cluster.clone(), trial: other.trial.clone() }.into());
        }
        let rows: Vec<_> = wanted.iter().filter(|row| !known.contains(row)).cloned().map(stored).collect();
        if rows.is_empty() {
            return Ok(());
        }
        let step = TxnStep { app_id: APP_ID.to_string(), expect: last, set: last.unwrap_or(0) + 1 };
        match table.append_rows(&rows, &[step]).await {
            Ok(_) => return Ok(()),
            Err(TableError::Fenced { .. }) if attempt < ATTEMPTS => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Recomputes a verdict from the stored rows and returns the key to its promotion.
///
/// The round's child only claims; whatever it wrote into its verdict file, this reads the tables.
pub async fn prove(tables: &Tables, verdict: &Verdict, settings: &gate::Settings) -> Result<Passed, RoundError> {
    let Outcome::Promote { trial, challenger, .. } = &verdict.outcome else {
        let reason = format!("its outcome is {}", verdict.outcome.name());
        return Err(RoundError::Unproven { round: verdict.round.clone(), reason });
    };
    let trials: Vec<TrialRow> = read(tables, Name::Trials).await?;
    let steps: Vec<StepRow> = read(tables, Name::GateSteps).await?;
    let usage: Vec<UsageRow> = read(tables, Name::GateUsage).await?;
    let passed = gate::verify(trial, &trials, &steps, &usage, settings)?;
    if passed.challenger() != challenger {
        let reason = format!("it names {challenger}, but its trial was of {}", passed.challenger());
        return Err(RoundError::Unproven { round: verdict.round.clone(), reason });
    }
    Ok(passed)
}

/// Closes an open trial on a person's word.
pub async fn reject(tables: &Tables, trial: &str, why: &str) -> Result<(), RoundError> {
    let trials: Vec<TrialRow> = read(tables, Name::Trials).await?;
    let steps: Vec<StepRow> = read(tables, Name::GateSteps).await?;
    let mut resumed = Trial::resume(trial, &trials, &steps)?;
    if resumed.state() != gate::State::Open {
        return Err(GateError::Ended { trial: trial.to_string(), state: resumed.state().as_str() }.into());
    }
    match resumed.close(&gate::Decision::Reject(why.to_string()), Utc::now().timestamp_micros()) {
        Some(row) => store_trial(tables, &row).await,
        None => Ok(()),
    }
}

/// Closes the trial of an adapter that the endpoint now serves. Safe to repeat.
pub async fn close_promoted(tables: &Tables, trial: &str) -> Result<(), RoundError> {
    let trials: Vec<TrialRow> = read(tables, Name::Trials).await?;
    let steps: Vec<StepRow> = read(tables, Name::GateSteps).await?;
    let mut trial = Trial::resume(trial, &trials, &steps)?;
    if trial.state() == gate::State::Open {
        let row = trial.close(&gate::Decision::Promote, Utc::now().timestamp_micros());
        if let Some(row) = row {
            store_trial(tables, &row).await?;
        }
    }
    Ok(())
}

/// Closes the trial that is open, if one is, because its evidence means nothing any more. Safe to repeat.
pub async fn void_open(tables: &Tables, reason: &str) -> Result<(), RoundError> {
    let trials: Vec<TrialRow> = read(tables, Name::Trials).await?;
    let Some(open) = gate::history::open_trial(&trials).map(|row| row.facts.trial.clone()) else { return Ok(()) };
    let steps: Vec<StepRow> = read(tables, Name::GateSteps).await?;
    let mut trial = Trial::resume(&open, &trials, &steps)?;
    match trial.close(&gate::Decision::Void(reason.to_owned()), Utc::now().timestamp_micros()) {
        Some(row) => Ok(store_trial(tables, &row).await?),
        None => Ok(()),
    }
}

/// Reads the verdict of the newest finished round.
pub fn newest_verdict(paths: &Paths) -> Result<Option<Verdict>, RoundError> {
    for id in paths.round_ids()?.into_iter().rev() {
        if let Some(verdict) = verdict_of(paths, &id)? {
            return Ok(Some(verdict));
        }
    }
    Ok(None)
}

/// Reads the verdict of a round, or `None` where it has not ended.
pub fn verdict_of(paths: &Paths, round: &str) -> Result<Option<Verdict>, RoundError> {
    let path = paths.round(round).join(super::state::OUTCOME);
    Ok(path.exists().then(|| crate::durable::read_json(&path)).transpose()?)
}

#[cfg(test)]
#[path = "book_tests.rs"]
mod tests;
