//! Bursts: a user who sends more in an hour than people do is quarantined for that hour.
//!
//! A few per cent of poisoned rows can steer what a model learns, and they come in bursts from few users. The rows stay in
//! the log and guard their splits; they are counted as `burst`, the manifest says whose they are, and an operator who
//! knows better releases them (`dataset.released_users`).

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use crate::table::Table;

use super::census::Row;
use super::columns::Columns;
use super::{DatasetError, Settings};

const HOUR_US: i64 = 3_600_000_000;

/// Most bursts that a manifest names, the largest.
const MOST_NAMED: usize = 1000;

/// One user's burst.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Burst {
    /// Calls in the hour.
    pub calls: u64,
    /// The keyed hash of the user, as in `queries`.
    pub user_hash: String,
    /// The hour's begin, in microseconds since the epoch.
    pub hour_us: i64,
}

/// All bursts of the log.
#[derive(Debug, Default)]
pub(super) struct Bursts(HashMap<(String, i64), u64>);

impl Bursts {
    /// Finds the hours in which a user sent more than `max_user_hour` calls, those of released users aside.
    pub(super) async fn find(queries: &Table, settings: &Settings) -> Result<Self, DatasetError> {
        let mut bursts = Bursts::default();
        if settings.max_user_hour == 0 {
            return Ok(bursts);
        }
        let sql = format!(
            "select user_hash, date_trunc('hour', event_time) as hour, count(*) as calls from t \
             where kind = 'call' and train_ok and user_hash is not null \
             group by user_hash, date_trunc('hour', event_time) having count(*) > {}",
            settings.max_user_hour
        );
        let mut scan = queries.scan(&sql).await?;
        while let Some(batch) = scan.next().await? {
            let columns = Columns::of("queries", &batch)?;
            for i in 0..batch.num_rows() {
                let user = columns.text("user_hash", i)?;
                if !settings.released_users.iter().any(|released| released == user) {
                    let calls = columns.number("calls", i)?.unsigned_abs();
                    bursts.0.insert((user.to_owned(), columns.number("hour", i)?), calls);
                }
            }
        }
        Ok(bursts)
    }

    /// Returns true where a row is part of a burst.
    pub(super) fn holds(&self, row: &Row<'_>) -> bool {
        !self.0.is_empty()
            && row.user_hash.is_some_and(|user| {
                self.0.contains_key(&(user.to_owned(), row.event_time_us.div_euclid(HOUR_US) * HOUR_US))
            })
    }

    /// Returns the largest bursts, the largest first.
    pub(super) fn named(&self) -> Vec<Burst> {
        let burst = |((user, hour), calls): (&(String, i64), &u64)| Burst {
            calls: *calls,
            user_hash: user.clone(),
            hour_us: *hour,
        };
        let mut all: Vec<Burst> = self.0.iter().map(burst).collect();
        all.sort_unstable_by(|a, b| b.cmp(a));
        all.truncate(MOST_NAMED);
        all
    }
}
