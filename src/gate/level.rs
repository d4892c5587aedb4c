//! The yearly error budget: how high the bar is for the t-th challenger of the year.
//!
//! Each of at most T challengers a year may spend an equal share alpha/T. In `fdr` mode the share grows with the
//! promotions already made (e-LOND, Xu and Ramdas 2024): the expected fraction of false promotions among all stays
//! below alpha whatever the dependence. In `strict` mode the probability of any false promotion in the year does.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::GateError;

/// What the yearly budget bounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// The expected share of false promotions among the year's promotions.
    Fdr,
    /// The probability of any false promotion in the year.
    Strict,
}

impl Mode {
    /// Returns the name in the config and in reports.
    pub fn as_str(self) -> &'static str {
        match self {
            Mode::Fdr => "fdr",
            Mode::Strict => "strict",
        }
    }
}

/// The terms that a year's budget is spent on.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Terms {
    pub mode: Mode,
    pub alpha: f64,
    /// T: the most challengers in a year.
    pub challengers: u32,
}

/// What of a year's budget is gone.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Spent {
    /// Trials opened this year, void ones too: a number stays spent.
    pub trials: u32,
    /// Promotions made by the gate this year.
    pub promotions: u32,
    /// The sum of the shares alpha/T of those trials.
    pub share: f64,
}

impl Terms {
    /// Returns the level of the next trial, or an error where the year's budget is exhausted.
    ///
    /// The sum of shares is checked besides the count, so that a change of T or alpha within the year cannot buy
    /// more error than the larger of the two settings allows.
    pub fn next_level(&self, spent: &Spent) -> Result<f64, GateError> {
        if spent.trials >= self.challengers || spent.share + self.share() > self.alpha * (1.0 + 1e-9) {
            return Err(GateError::Exhausted { trials: spent.trials, challengers: self.challengers });
        }
        Ok(self.level(spent.promotions))
    }

    /// Returns the level alpha_t after `promotions` promotions this year.
    pub fn level(&self, promotions: u32) -> f64 {
        match self.mode {
            Mode::Fdr => self.share() * f64::from(promotions + 1),
            Mode::Strict => self.share(),
        }
    }

    /// Returns the part of the year's budget that one trial spends.
    pub fn share(&self) -> f64 {
        self.alpha / f64::from(self.challengers)
    }
}

/// Returns the bar that the logarithm of the wealth must reach at level `alpha`.
pub fn bar(alpha: f64) -> f64 {
    -alpha.ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    const FDR: Terms = Terms { mode: Mode::Fdr, alpha: 0.10, challengers: 120 };

    fn wealth(terms: Terms, promotions: u32) -> f64 {
        bar(terms.level(promotions)).exp()
    }

    #[test]
    fn the_bars_are_those_of_the_method() {
        let strict = Terms { mode: Mode::Strict, alpha: 0.05, challengers: 120 };
        let nightly = Terms { challengers: 365, ..strict };
        let cases = [(FDR, 0, 1200.0), (FDR, 5, 200.0), (strict, 0, 2400.0), (strict, 5, 2400.0), (nightly, 0, 7300.0)];
        for (terms, promotions, expected) in cases {
            assert!((wealth(terms, promotions) - expected).abs() < 1e-6, "{terms:?} {promotions}");
        }
    }

    #[test]
    fn the_cap_is_hard_and_a_changed_cap_buys_nothing() {
        let after = |trials: u32| Spent { trials, promotions: 2, share: f64::from(trials) * FDR.share() };
        assert!(FDR.next_level(&after(119)).is_ok());
        assert!(FDR.next_level(&after(120)).is_err());
        // Half the budget went under T = 120; under T = 60 each trial costs twice as much.
        let fewer = Terms { challengers: 61, ..FDR };
        let spent = Spent { trials: 60, promotions: 0, share: 60.0 * FDR.share() };
        assert!(fewer.next_level(&spent).is_ok());
        let spent = Spent { trials: 60, promotions: 0, share: 0.0999 };
        assert!(fewer.next_level(&spent).is_err());
    }
}
