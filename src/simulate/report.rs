//! What a simulation ends with: what was planted, what the loop had to do, and what it did.

use std::fmt::{self, Display, Formatter};

use serde::Serialize;

/// One planted effect.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    pub planted: &'static str,
    pub expected: &'static str,
    pub outcome: String,
    /// The numbers behind it.
    pub evidence: String,
    pub holds: bool,
}

/// The whole table.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    pub seed: u64,
    pub rows: Vec<Row>,
    pub seconds: f64,
}

impl Report {
    /// Returns true where the loop did everything that it had to.
    pub fn holds(&self) -> bool {
        self.rows.iter().all(|row| row.holds)
    }
}

impl Display for Report {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(f, "| planted | expected | outcome | evidence | |\n| --- | --- | --- | --- | --- |")?;
        for Row { planted, expected, outcome, evidence, holds } in &self.rows {
            let mark = if *holds { "as expected" } else { "NOT AS EXPECTED" };
            writeln!(f, "| {planted} | {expected} | {outcome} | {evidence} | {mark} |")?;
        }
        writeln!(f, "\nseed {}, {:.0} s", self.seed, self.seconds)
    }
}
