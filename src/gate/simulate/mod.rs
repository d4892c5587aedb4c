//! What the gate promises, counted: years of nights on the production code, with challengers whose truth is known.
//!
//! Nothing here decides. A simulated night opens trials, orders and absorbs blocks, examines guardrails and proves a
//! promotion by the very functions that a round calls ([`Trial`](super::Trial), [`verify`](super::verify)); only the
//! differences are drawn, from laws in [`world`](Scenario). Seeds are fixed: the same arguments give the same table.
//! [`mod@naive`] holds the rules that the gate is compared with.

mod coverage;
mod naive;
mod power;
mod report;
mod tally;
mod world;
mod year;

use rayon::prelude::*;

use super::settings::Settings;
use super::{GateError, Thresholds};

pub use coverage::{Coverage, coverage};
pub use naive::{NaiveRow, naive};
pub use power::{Power, power};
pub use report::{coverage_table, naive_table, power_table, years_table};
pub use tally::Tally;
pub use world::{Scenario, Shape};

/// Nights in a simulated year.
pub const NIGHTS: u32 = 365;

/// What challengers are like and how their differences fall.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Law {
    pub scenario: Scenario,
    pub shape: Shape,
}

/// Whether a run asks the guardrails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Guards {
    /// As set.
    Asked,
    /// Every threshold at its loosest, so that the evidence alone decides.
    Waved,
}

impl Guards {
    /// Returns the name in reports.
    pub fn as_str(self) -> &'static str {
        match self {
            Guards::Asked => "guardrails",
            Guards::Waved => "evidence alone",
        }
    }

    /// Returns the settings under which a run goes.
    pub fn settings(self, settings: &Settings) -> Settings {
        match self {
            Guards::Asked => settings.clone(),
            Guards::Waved => Settings { guardrails: Thresholds::loosest(), ..settings.clone() },
        }
    }
}

/// How many years are run, and under what.
#[derive(Debug, Clone, Copy)]
pub struct Years<'a> {
    /// As [`Guards::settings`] returns them.
    pub settings: &'a Settings,
    pub guards: Guards,
    pub years: u64,
    pub nights: u32,
    /// Fresh gate prompts an ordinary night.
    pub prompts: usize,
    pub seed: u64,
}

impl Years<'_> {
    fn noise(&self) -> world::Noise {
        match self.guards {
            Guards::Asked => world::Noise::Full,
            Guards::Waved => world::Noise::Score,
        }
    }
}

/// Runs the years of one law, on all threads, and counts.
pub fn years(years: &Years<'_>, law: &Law) -> Result<Tally, GateError> {
    let run = |year| year::run(years, law, year);
    let all: Vec<year::Year> = (0..years.years).into_par_iter().map(run).collect::<Result<_, _>>()?;
    Ok(Tally::of(law, years, &all))
}

#[cfg(test)]
mod tests;
