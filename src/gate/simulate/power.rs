//! The power of a single trial: how likely, and after how many nights, a challenger of a given true gain is promoted.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use rayon::prelude::*;
use serde::Serialize;

use super::world::Truth;
use super::year::Running;
use super::{Law, Years};
use crate::gate::interval::Rate;
use crate::gate::rows::{State, TrialRow};
use crate::gate::{Decision, GateError, Mode};
use crate::record::derive_seed;

/// How trials of one gain ended.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Power {
    pub gain: f64,
    pub shape: &'static str,
    pub guards: &'static str,
    pub mode: Mode,
    pub prompts: usize,
    /// R: promotions of the year before the trial.
    pub promotions: u32,
    /// Trials promoted by the end of each night.
    pub by_night: Vec<Rate>,
    /// Promoted on any night.
    pub promoted: Rate,
}

/// Runs `years.years` trials of a challenger with the mean gain `gain` after `promotions` promotions of the year.
pub fn power(years: &Years<'_>, law: &Law, gain: f64, promotions: u32) -> Result<Power, GateError> {
    let history = promoted(years, promotions)?;
    let run = |at: u64| one(years, law, gain, &history, at);
    let ends: Vec<Option<u32>> = (0..years.years).into_par_iter().map(run).collect::<Result<_, _>>()?;
    let by = |night: u32| ends.iter().flatten().filter(|&&end| end <= night).count() as u64;
    let rate = |night| Rate::of(by(night), years.years);
    Ok(Power {
        gain,
        shape: law.shape.as_str(),
        guards: years.guards.as_str(),
        mode: years.settings.mode,
        prompts: years.prompts,
        promotions,
        by_night: (1..=years.settings.max_nights).map(rate).collect(),
        promoted: rate(u32::MAX),
    })
}

/// Returns the night in which one trial is promoted, or `None`.
fn one(years: &Years<'_>, law: &Law, gain: f64, history: &[TrialRow], at: u64) -> Result<Option<u32>, GateError> {
    let seed = derive_seed(years.seed, &["power", law.shape.as_str(), &at.to_string()]);
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let truth = Truth { gain, second: gain, quality: 0.0, nightly: 0.0, weekend: 0.0 };
    let mut running = Running::open(("challenger".into(), "incumbent".into()), history, years, truth, seed)?;
    for night in 0..years.settings.max_nights {
        let mut pool: Vec<String> = (0..years.prompts).map(|i| format!("{night}-{i:x}")).collect();
        match running.extend(&mut pool, 0, law, years.noise(), &mut rng)? {
            Decision::Continue(_) => {}
            Decision::Promote => return Ok(Some(running.nights())),
            _ => return Ok(None),
        }
    }
    Ok(None)
}

/// Returns a table `trials` with so many promotions in the year.
fn promoted(years: &Years<'_>, promotions: u32) -> Result<Vec<TrialRow>, GateError> {
    let mut history = Vec::new();
    for number in 0..promotions {
        let names = (format!("promoted-{number}"), format!("before-{number}"));
        let truth = Truth { gain: 0.0, second: 0.0, quality: 0.0, nightly: 0.0, weekend: 0.0 };
        let mut rows = Running::open(names, &history, years, truth, 0)?.into_rows();
        rows.iter_mut().for_each(|row| row.state = State::Promoted);
        history.append(&mut rows);
    }
    Ok(history)
}
