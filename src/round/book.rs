//! Reading and writing the tables of decisions: each row once, whatever crashes in between.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{Outcome, Paths, RoundError, Verdict};
use crate::gate::{self, Passed, StepRow, Trial, TrialRow, UsageRow};
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

/// Appends rows under a name of their own; what was appended under it before is not appended again.
pub async fn append_once<T: Serialize>(
    tables: &Tables,
    name: Name,
    app_id: &str,
    rows: &[T],
) -> Result<(), TableError> {
    let mut table = tables.open_one(name).await?;
    if rows.is_empty() || table.txn(app_id).await?.is_some() {
        return Ok(());
    }
    let step = TxnStep { app_id: app_id.to_string(), expect: None, set: 1 };
    table.append_rows(rows, &[step]).await.map(|_| ())
}

/// Stores one change of a trial.
pub async fn store_trial(tables: &Tables, row: &TrialRow) -> Result<(), TableError> {
    let app_id = format!("taod/trials/{}/{}/{}", row.facts.trial, row.night, row.state.as_str());
    append_once(tables, Name::Trials, &app_id, &[stored(row.clone())]).await
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
    let Some(open) = gate::trial::open_trial(&trials).map(|row| row.facts.trial.clone()) else { return Ok(()) };
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
        let path = paths.round(&id).join(super::state::OUTCOME);
        if path.exists() {
            return Ok(Some(crate::durable::read_json(&path)?));
        }
    }
    Ok(None)
}
