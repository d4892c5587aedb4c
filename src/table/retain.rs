//! Retention: rows past their age go, on the same path as an erasure.
//!
//! Files are in time order, so most of what goes goes as whole files, judged by their bounds in the log and never read;
//! only a file that the bound cuts through is rewritten. The bytes stay until the vacuum, because a row that is merely
//! old may still be read at an older version.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Hunt, Name, Selection, Table, TableError};

const DAY_US: i64 = 86_400_000_000;

/// How long rows are kept, in days from their ingestion; 0 keeps them for ever.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Retention {
    /// Days that calls are kept in `queries`; 0 = for ever. Range 0 to 36500.
    pub queries_days: u32,
    /// Days that unreadable records are kept in `dead_letters`; 0 = for ever. Range 0 to 36500.
    pub dead_letters_days: u32,
    /// Days that sampled answers are kept in `candidates`; 0 = for ever. Range 0 to 36500.
    pub candidates_days: u32,
}

impl Retention {
    /// Checks ranges.
    pub fn validate(&self) -> Result<(), String> {
        match self.rules().into_iter().find(|rule| rule.days > 36_500) {
            Some(Rule { name, days, .. }) => {
                Err(format!("{}_days is {days}: choose 0 (for ever) to 36500", name.spec().name))
            }
            None => Ok(()),
        }
    }

    /// Tables of decisions have no rule: they hold no text, and the gate's budget rests on their history.
    fn rules(&self) -> [Rule; 3] {
        [
            Rule { name: Name::Queries, column: "ingest_date", days: self.queries_days },
            Rule { name: Name::DeadLetters, column: "ingest_date", days: self.dead_letters_days },
            Rule { name: Name::Candidates, column: "time", days: self.candidates_days },
        ]
    }
}

struct Rule {
    name: Name,
    column: &'static str,
    days: u32,
}

/// What retention took out of a table.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Retained {
    pub rows: u64,
    pub files: u64,
    /// Files that were rewritten without some of their rows; the others went whole.
    pub rewritten: u64,
}

/// Removes rows past their retention from a table that has one; `now_us` is told by the caller.
pub async fn retain(table: &mut Table, retention: &Retention, now_us: i64) -> Result<Option<Retained>, TableError> {
    let rule = retention.rules().into_iter().find(|rule| rule.name.spec().name == table.spec.name && rule.days > 0);
    let Some(Rule { column, days, .. }) = rule else { return Ok(None) };
    // A date holds the whole day: the bound is a midnight.
    let bound = now_us.div_euclid(DAY_US) - i64::from(days);
    let selection = Selection::Before { column, micros: bound * DAY_US };
    let mut hunt = Hunt::begin(table, &selection, &[]).await?;
    let mut retained = Retained::default();
    while let Some(found) = hunt.next().await? {
        let taken = hunt.take(found).await?;
        retained.rows += taken.rows;
        retained.files += taken.gone.len() as u64;
        retained.rewritten += taken.rewritten;
    }
    Ok((retained.files > 0).then_some(retained))
}
