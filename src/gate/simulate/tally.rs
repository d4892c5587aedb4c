//! Counts over simulated years, each with an interval.

use serde::Serialize;

use super::year::Year;
use super::{Law, Years};
use crate::gate::confidence::{Bounds, bounds};
use crate::gate::interval::Rate;

/// What many years of one law came to.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Tally {
    pub scenario: &'static str,
    pub shape: &'static str,
    pub guards: &'static str,
    pub mode: super::super::Mode,
    pub years: u64,
    pub prompts: usize,
    pub trials: u64,
    pub promotions: u64,
    pub false_promotions: u64,
    pub harmful: u64,
    /// Years with at least one false promotion.
    pub false_year: Rate,
    /// Of the challengers in trial that truly gain 0.03 or more, those promoted.
    pub power: Rate,
    /// The mean over years of the share of false promotions among all (0 in a year without any), with 95 % bounds.
    pub fdr: Bounds,
    /// Nights that promotions took: median and the ninth of ten.
    pub nights_median: Option<u32>,
    pub nights_ninth: Option<u32>,
    /// The true gain that the promotions of a year add up to, on average.
    pub true_gain: f64,
    pub refused: u64,
    pub futile: u64,
    pub expired: u64,
    /// Nights, in all years together, after the last challenger of the budget.
    pub exhausted: u64,
}

impl Tally {
    pub(super) fn of(law: &Law, years: &Years<'_>, all: &[Year]) -> Tally {
        let sum = |count: fn(&Year) -> u64| all.iter().map(count).sum::<u64>();
        let (promotions, wrong) = (sum(|y| y.promotions), sum(|y| y.false_promotions));
        let share = |y: &Year| y.false_promotions as f64 / y.promotions.max(1) as f64;
        let mut nights: Vec<u32> = all.iter().flat_map(|y| y.nights.iter().copied()).collect();
        nights.sort_unstable();
        let at = |share: f64| nights.get(((nights.len() as f64 * share).ceil() as usize).saturating_sub(1)).copied();
        let count = all.len() as u64;
        Tally {
            scenario: law.scenario.as_str(),
            shape: law.shape.as_str(),
            guards: years.guards.as_str(),
            mode: years.settings.mode,
            years: count,
            prompts: years.prompts,
            trials: sum(|y| y.trials),
            promotions,
            false_promotions: wrong,
            harmful: sum(|y| y.harmful),
            false_year: Rate::of(all.iter().filter(|y| y.false_promotions > 0).count() as u64, count),
            power: Rate::of(sum(|y| y.large_promoted), sum(|y| y.large)),
            fdr: bounds(&all.iter().map(share).collect::<Vec<_>>(), 0.0, 1.0, 0.025),
            nights_median: at(0.5),
            nights_ninth: at(0.9),
            true_gain: all.iter().map(|y| y.true_gain).sum::<f64>() / count.max(1) as f64,
            refused: sum(|y| y.refused),
            futile: sum(|y| y.futile),
            expired: sum(|y| y.expired),
            exhausted: sum(|y| y.exhausted),
        }
    }
}
