//! Exact intervals for a probability that was counted: Clopper and Pearson (Biometrika 1934).
//!
//! They err on the safe side whatever the probability is, also at 0 of n, where a normal interval is empty.

use serde::{Deserialize, Serialize};

/// Halvings of the unit interval: the ends are exact to about 1e-12.
const HALVINGS: u32 = 40;

/// Some successes in some tries, with a two-sided interval for their probability.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Rate {
    pub successes: u64,
    pub tries: u64,
    pub lower: f64,
    pub upper: f64,
}

impl Rate {
    /// Returns the rate with its two-sided 95 % interval.
    pub fn of(successes: u64, tries: u64) -> Rate {
        let (lower, upper) = clopper_pearson(successes, tries, 0.05);
        Rate { successes, tries, lower, upper }
    }

    /// Returns the plain share, or 0 where nothing was tried.
    pub fn share(&self) -> f64 {
        self.successes as f64 / self.tries.max(1) as f64
    }
}

/// Returns the two-sided interval that holds the probability with at least 1 - `alpha`.
pub fn clopper_pearson(successes: u64, tries: u64, alpha: f64) -> (f64, f64) {
    if tries == 0 {
        return (0.0, 1.0);
    }
    // The upper end: so many successes or fewer would be this rare. The lower end is the upper one of the failures.
    let upper = |successes: u64| {
        if successes >= tries {
            return 1.0;
        }
        let (mut kept, mut excluded) = (successes as f64 / tries as f64, 1.0);
        for _ in 0..HALVINGS {
            let p = (kept + excluded) / 2.0;
            match at_most(successes, tries, p) >= alpha / 2.0 {
                true => kept = p,
                false => excluded = p,
            }
        }
        (kept + excluded) / 2.0
    };
    (1.0 - upper(tries - successes.min(tries)), upper(successes))
}

/// Returns the probability of at most `successes` of `tries` at the probability `p` of each, `0 < p < 1`.
fn at_most(successes: u64, tries: u64, p: f64) -> f64 {
    let n = tries as f64;
    let mut ln_term = n * (-p).ln_1p();
    let odds = p.ln() - (-p).ln_1p();
    let mut sum = ln_term.exp();
    for k in 0..successes {
        ln_term += ((n - k as f64) / (k as f64 + 1.0)).ln() + odds;
        sum += ln_term.exp();
    }
    sum.min(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_is_that_of_the_tables() {
        // R 4.3: binom.test(10, 100)$conf.int; for 0 of n the upper end is 1 - 0.025^(1/n).
        let (lower, upper) = clopper_pearson(10, 100, 0.05);
        assert!((lower - 0.049_004_69).abs() < 1e-7 && (upper - 0.176_222_60).abs() < 1e-7, "{lower} {upper}");
        let none = clopper_pearson(0, 2000, 0.05);
        assert!(none.0 == 0.0 && (none.1 - (1.0 - 0.025f64.powf(1.0 / 2000.0))).abs() < 1e-10, "{none:?}");
        let all = clopper_pearson(50, 50, 0.05);
        assert!(all.1 == 1.0 && (all.0 - 0.025f64.powf(1.0 / 50.0)).abs() < 1e-10, "{all:?}");
        assert_eq!(clopper_pearson(0, 0, 0.05), (0.0, 1.0));
    }

    #[test]
    fn each_end_leaves_its_tail() {
        for (successes, tries) in [(1, 7), (30, 400), (499, 500), (1000, 2000)] {
            let (lower, upper) = clopper_pearson(successes, tries, 0.05);
            assert!((at_most(successes, tries, upper) - 0.025).abs() < 1e-6, "{successes} of {tries}");
            assert!((1.0 - at_most(successes - 1, tries, lower) - 0.025).abs() < 1e-6, "{successes} of {tries}");
        }
    }
}
