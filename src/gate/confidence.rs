//! Confidence sequences for the mean of bounded values: bounds that hold at all times at once.
//!
//! A guardrail is looked at after every block, so an ordinary interval would fail far more often than it says. The
//! bounds here invert the same kind of bet as the evidence (Waudby-Smith and Ramdas, section 4): a candidate mean is
//! excluded once betting against it has made 1/alpha. The stakes do not depend on the candidate except where it caps
//! them, which makes the wealth monotone in it, so that the bound is found by bisection.

use serde::{Deserialize, Serialize};

/// The largest part of the wealth that one value may lose.
const STAKE_LIMIT: f64 = 0.75;
/// How near a bound is to the exact one, in parts of the range, always on the safe side.
const EXACT: f64 = 1e-12;

/// The mean of some values with a lower and an upper bound, each of which holds at all times with probability
/// 1 - alpha.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Bounds {
    pub n: usize,
    pub mean: f64,
    pub lower: f64,
    pub upper: f64,
}

/// Returns the bounds for values in `[low, high]`; a value outside is moved to the nearer end.
pub fn bounds(values: &[f64], low: f64, high: f64, alpha: f64) -> Bounds {
    let range = high - low;
    let unit: Vec<f64> = values.iter().map(|x| unit_value(*x, low, high)).collect();
    let mirrored: Vec<f64> = unit.iter().map(|x| 1.0 - x).collect();
    let mean = if unit.is_empty() { 0.5 } else { unit.iter().sum::<f64>() / unit.len() as f64 };
    Bounds {
        n: values.len(),
        mean: low + range * mean,
        lower: low + range * unit_lower(&unit, alpha),
        upper: high - range * unit_lower(&mirrored, alpha),
    }
}

/// Returns an anytime-valid p-value of the null "the mean of values in `[low, high]` is at least `bound`".
///
/// `alpha` only tunes the stakes; the p-value is valid at every level.
pub fn p_at_least(values: &[f64], bound: f64, low: f64, high: f64, alpha: f64) -> f64 {
    let mirrored: Vec<f64> = values.iter().map(|x| 1.0 - unit_value(*x, low, high)).collect();
    let candidate = 1.0 - unit_value(bound, low, high);
    (-ln_wealth(&mirrored, &stakes(&mirrored, alpha), candidate)).exp().min(1.0)
}

/// Moves a value to the unit interval. What is not a number counts as the lowest value.
fn unit_value(x: f64, low: f64, high: f64) -> f64 {
    if x.is_nan() { 0.0 } else { ((x - low) / (high - low)).clamp(0.0, 1.0) }
}

/// Returns the lower bound of the mean of values in [0, 1].
///
/// The wealth falls as the candidate grows, so the bound is where it crosses 1/alpha. Each pair of steps is one by the secant and
/// one by halving: about a dozen sums instead of forty, and never more than eighty.
fn unit_lower(values: &[f64], alpha: f64) -> f64 {
    let stakes = stakes(values, alpha);
    let excess = |candidate: f64| ln_wealth(values, &stakes, candidate) + alpha.ln();
    let (mut excluded, mut kept) = (0.0, 1.0);
    let (mut above, mut below) = (excess(excluded), excess(kept));
    if above < 0.0 {
        return 0.0;
    }
    for halve in [false, true].into_iter().cycle() {
        if kept - excluded <= EXACT {
            break;
        }
        let share = if halve || !above.is_finite() || !below.is_finite() { 0.5 } else { above / (above - below) };
        // Half an EXACT into the bracket at least: a secant that always lands on one side would leave it wide.
        let inner = (0.25 * EXACT / (kept - excluded)).min(0.25);
        let candidate = excluded + (kept - excluded) * share.clamp(inner, 1.0 - inner);
        let found = excess(candidate);
        if found >= 0.0 {
            (excluded, above) = (candidate, found);
        } else {
            (kept, below) = (candidate, found);
        }
    }
    excluded
}

/// Returns the stake for each value, made of the values before it alone: the predictable plug-in.
fn stakes(values: &[f64], alpha: f64) -> Vec<f64> {
    let (mut sum, mut squared_deviations) = (0.5, 0.25);
    let mut out = Vec::with_capacity(values.len());
    for (i, x) in values.iter().enumerate() {
        let t = (i + 1) as f64;
        let variance = squared_deviations / t;
        out.push((-2.0 * alpha.ln() / (variance * t * t.ln_1p())).sqrt());
        sum += x;
        squared_deviations += (x - sum / (t + 1.0)).powi(2);
    }
    out
}

/// Returns the wealth of betting that the mean is above `candidate`.
///
/// A logarithm for each of some values, not for each value: a bound takes a dozen such sums, and a guardrail several bounds at
/// every look. A factor is between 0.25 and 8 (no stake exceeds 6), so a product of 32 is far from any limit.
fn ln_wealth(values: &[f64], stakes: &[f64], candidate: f64) -> f64 {
    const TOGETHER: usize = 32;
    // Zero only as the candidate "the mean is 0", against which any stake is safe.
    let cap = STAKE_LIMIT / candidate.max(f64::MIN_POSITIVE);
    let product = |(values, stakes): (&[f64], &[f64])| {
        let factor = |(x, stake): (&f64, &f64)| 1.0 + stake.min(cap) * (x - candidate);
        values.iter().zip(stakes).map(factor).product::<f64>().ln()
    };
    values.chunks(TOGETHER).zip(stakes.chunks(TOGETHER)).map(product).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand_chacha::ChaCha8Rng;
    use rand_chacha::rand_core::{Rng, SeedableRng};

    fn uniform(rng: &mut ChaCha8Rng) -> f64 {
        (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    #[test]
    fn the_bounds_cover_at_all_looks_together() {
        // Skewed values in [-1, 1]: mean 2 * 0.1 - 1. Looked at after every 20 of 200, in 400 runs.
        let mut misses = [0, 0];
        for seed in 0..400 {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let values: Vec<f64> = (0..200).map(|_| if uniform(&mut rng) < 0.1 { 1.0 } else { -1.0 }).collect();
            let looks: Vec<Bounds> = (1..=10).map(|k| bounds(&values[..20 * k], -1.0, 1.0, 0.1)).collect();
            misses[0] += usize::from(looks.iter().any(|b| b.lower > -0.8));
            misses[1] += usize::from(looks.iter().any(|b| b.upper < -0.8));
        }
        // 40 expected at most; the upper 99.9 % limit of a binomial of 400 at 0.1 is 59.
        assert!(misses.iter().all(|&m| m <= 59), "{misses:?}");
        // A bound that never errs would be useless: some misses show that it is near its level.
        assert!(misses.iter().any(|&m| m >= 2), "{misses:?}");
    }

    #[test]
    fn the_bounds_close_in_on_the_mean() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let values: Vec<f64> = (0..2000).map(|_| uniform(&mut rng)).collect();
        let (few, many) = (bounds(&values[..50], 0.0, 1.0, 0.05), bounds(&values, 0.0, 1.0, 0.05));
        assert!(few.lower < 0.5 && 0.5 < few.upper && few.upper - few.lower < 0.4, "{few:?}");
        assert!(many.lower > 0.46 && many.upper < 0.54, "{many:?}");
    }

    #[test]
    fn nothing_is_known_of_no_values() {
        assert_eq!(bounds(&[], -1.0, 1.0, 0.05), Bounds { n: 0, mean: 0.0, lower: -1.0, upper: 1.0 });
    }

    #[test]
    fn the_p_value_and_the_bound_agree() {
        let values: Vec<f64> = (0..60).map(|i| if i % 3 == 0 { 0.1 } else { -0.4 }).collect();
        let upper = bounds(&values, -1.0, 1.0, 0.05).upper;
        assert!((p_at_least(&values, upper, -1.0, 1.0, 0.05) - 0.05).abs() < 1e-6);
        assert!(p_at_least(&values, 0.3, -1.0, 1.0, 0.05) < 0.05);
        assert_eq!(p_at_least(&values, -0.9, -1.0, 1.0, 0.05), 1.0);
    }

    #[test]
    fn a_value_outside_the_range_counts_as_the_nearer_end() {
        assert_eq!(bounds(&[9.0, -9.0, 0.5], 0.0, 1.0, 0.05), bounds(&[1.0, 0.0, 0.5], 0.0, 1.0, 0.05));
        assert_eq!(bounds(&[f64::NAN], 0.0, 1.0, 0.05), bounds(&[0.0], 0.0, 1.0, 0.05));
    }
}
