//! Platt's calibration: the logistic curve that makes a raw score the chance of a good answer, fitted on labelled answers.
//!
//! Labels are drawn towards the middle by Platt's prior (Platt 1999; Lin, Lin and Weng 2007), so that a set that a score
//! separates does not send the slope to infinity. How far the chances are still off is told as the expected calibration
//! error, on answers that the curve was not fitted on.

use serde::{Deserialize, Serialize};

/// Labelled answers below which a curve is not fitted, and of the rarer label.
pub const MIN_LABELS: usize = 50;
pub const MIN_OF_EACH: usize = 10;
/// Bins of equal width of the expected calibration error.
const BINS: usize = 10;
const ITERATIONS: usize = 100;

/// The curve `1 / (1 + e^-(slope raw + offset))`, and what it was fitted on.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Platt {
    pub slope: f64,
    pub offset: f64,
    pub labels: usize,
    /// Of chances for answers that the curve had not seen (two folds), in [0, 1].
    pub expected_calibration_error: f64,
}

impl Platt {
    /// Fits the curve on (raw score, good?) of answers in a fixed order, or says why they do not make one.
    pub fn fit(labelled: &[(f64, bool)]) -> Result<Self, String> {
        let good = labelled.iter().filter(|(_, good)| *good).count();
        let rarer = good.min(labelled.len() - good);
        if labelled.len() < MIN_LABELS || rarer < MIN_OF_EACH {
            return Err(format!(
                "{} labels, {rarer} of the rarer kind, are too few; give at least {MIN_LABELS}, {MIN_OF_EACH} of each",
                labelled.len()
            ));
        }
        if let Some((bad, _)) = labelled.iter().find(|(raw, _)| !raw.is_finite()) {
            return Err(format!("{bad} is no score"));
        }
        let (slope, offset) = curve(labelled);
        if slope <= 0.0 {
            return Err(format!(
                "answers with higher scores are not the better ones (slope {slope:.3}): the scorer does not know"
            ));
        }
        // Every second answer, so that a sorted set is halved too.
        let fold = |odd: usize| labelled.iter().skip(odd).step_by(2).copied().collect::<Vec<_>>();
        let folds = [fold(0), fold(1)];
        let chances = [(0, 1), (1, 0)].map(|(seen, unseen)| {
            let (slope, offset) = curve(&folds[seen]);
            folds[unseen].iter().map(|(raw, good)| (logistic(slope * raw + offset), *good)).collect::<Vec<_>>()
        });
        let expected_calibration_error = calibration_error(&chances.concat());
        Ok(Platt { slope, offset, labels: labelled.len(), expected_calibration_error })
    }

    /// Returns the chance that an answer with this raw score is good.
    pub fn apply(&self, raw: f64) -> f64 {
        logistic(self.slope * raw + self.offset)
    }

    /// Says what is wrong with a curve that was read.
    pub(super) fn check(&self) -> Result<(), String> {
        let whole = self.slope.is_finite() && self.offset.is_finite() && self.slope > 0.0;
        if whole { Ok(()) } else { Err("its slope is not a number above 0, or its offset is no number".into()) }
    }
}

/// Returns the expected calibration error of (chance, good?): over bins of equal width, the mean gap between the mean
/// chance and the share of good answers, each bin weighted by its answers (Naeini et al. 2015).
pub fn calibration_error(chances: &[(f64, bool)]) -> f64 {
    let mut bins = [(0usize, 0.0, 0usize); BINS];
    for (chance, good) in chances {
        let bin = &mut bins[((chance * BINS as f64) as usize).min(BINS - 1)];
        *bin = (bin.0 + 1, bin.1 + chance, bin.2 + usize::from(*good));
    }
    let gap = |(_, chance, good): &(usize, f64, usize)| (chance - *good as f64).abs();
    bins.iter().map(gap).sum::<f64>() / chances.len().max(1) as f64
}

fn logistic(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// Returns slope and offset of the least log-loss against the smoothed labels: Newton's method with halved steps.
fn curve(labelled: &[(f64, bool)]) -> (f64, f64) {
    let n = labelled.len() as f64;
    let good = labelled.iter().filter(|(_, good)| *good).count() as f64;
    let (high, low) = ((good + 1.0) / (good + 2.0), 1.0 / (n - good + 2.0));
    // Raw scores of any scale: the fit is done on scores with mean 0 and spread 1.
    let mean = labelled.iter().map(|(raw, _)| raw).sum::<f64>() / n;
    let spread = (labelled.iter().map(|(raw, _)| (raw - mean).powi(2)).sum::<f64>() / n).sqrt().max(1e-12);
    let points: Vec<(f64, f64)> =
        labelled.iter().map(|(raw, good)| ((raw - mean) / spread, if *good { high } else { low })).collect();
    // ln(1 + e^z) - t z, without overflow.
    let loss = |a: f64, b: f64| -> f64 {
        points
            .iter()
            .map(|(x, t)| {
                let z = a * x + b;
                z.max(0.0) + (-z.abs()).exp().ln_1p() - t * z
            })
            .sum()
    };
    let (mut a, mut b) = (0.0, ((good + 1.0) / (n - good + 1.0)).ln());
    for _ in 0..ITERATIONS {
        let (mut ga, mut gb, mut haa, mut hab, mut hbb) = (0.0, 0.0, 1e-12, 0.0, 1e-12);
        for (x, t) in &points {
            let p = logistic(a * x + b);
            let (slope, curvature) = (p - t, p * (1.0 - p));
            (ga, gb) = (ga + slope * x, gb + slope);
            (haa, hab, hbb) = (haa + curvature * x * x, hab + curvature * x, hbb + curvature);
        }
        let determinant = haa * hbb - hab * hab;
        let (da, db) = ((hbb * ga - hab * gb) / determinant, (haa * gb - hab * ga) / determinant);
        let before = loss(a, b);
        let mut step = 1.0;
        while loss(a - step * da, b - step * db) > before && step > 1e-10 {
            step /= 2.0;
        }
        (a, b) = (a - step * da, b - step * db);
        if da.abs().max(db.abs()) < 1e-12 {
            break;
        }
    }
    (a / spread, b - a * mean / spread)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Deserialize)]
    struct Golden {
        raw: Vec<f64>,
        good: Vec<bool>,
        slope: f64,
        offset: f64,
        error: f64,
        held_out_error: f64,
    }

    #[test]
    fn curves_and_errors_are_those_of_the_reference() {
        let golden: Vec<Golden> = serde_json::from_str(include_str!("../../tests/golden/platt.json")).unwrap();
        assert!(golden.len() >= 3);
        for Golden { raw, good, slope, offset, error, held_out_error } in golden {
            let labelled: Vec<(f64, bool)> = raw.into_iter().zip(good).collect();
            let platt = Platt::fit(&labelled).unwrap();
            let near = |a: f64, b: f64| (a - b).abs() < 1e-6 * (1.0 + b.abs());
            assert!(near(platt.slope, slope) && near(platt.offset, offset), "{platt:?}, reference {slope} {offset}");
            let chances: Vec<(f64, bool)> = labelled.iter().map(|(raw, good)| (platt.apply(*raw), *good)).collect();
            assert!(near(calibration_error(&chances), error), "{} {error}", calibration_error(&chances));
            assert!(near(platt.expected_calibration_error, held_out_error), "{platt:?} {held_out_error}");
        }
    }

    #[test]
    fn a_set_that_is_too_small_or_says_nothing_is_refused() {
        let labelled = |n: usize, good: fn(usize) -> bool| (0..n).map(|i| (i as f64, good(i))).collect::<Vec<_>>();
        assert!(Platt::fit(&labelled(49, |i| i > 20)).unwrap_err().contains("49 labels"));
        assert!(Platt::fit(&labelled(100, |i| i > 92)).unwrap_err().contains("7 of the rarer kind"));
        assert!(Platt::fit(&labelled(100, |i| i < 50)).unwrap_err().contains("does not know"));
        assert!(Platt::fit(&[labelled(99, |i| i > 50), vec![(f64::NAN, true)]].concat()).unwrap_err().contains("NaN"));
        // Separated without an error: the slope stays finite.
        let apart = Platt::fit(&labelled(100, |i| i >= 50)).unwrap();
        assert!(apart.slope.is_finite() && apart.slope > 0.0 && apart.apply(0.0) < 0.05 && apart.apply(99.0) > 0.95);
    }
}
