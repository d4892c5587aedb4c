//! How single scores become one reward: `R = V * clip01(mean z - lambda * sd z)`.
//!
//! `V` is 1 where every hard check passes and 0 otherwise; `z` are the calibrated graded scores. Subtracting their
//! spread makes an answer that only one scorer likes worth less, which is what a scorer being gamed looks like. Without
//! graded scores the reward is `V`: the strict pass.

/// Returns the reward in [0, 1]. `sd` is the spread of the scores at hand (divided by n), so one score has none.
pub fn total(passed: bool, graded: &[f64], lambda: f64) -> f64 {
    if !passed {
        return 0.0;
    }
    if graded.is_empty() {
        return 1.0;
    }
    let n = graded.len() as f64;
    let mean = graded.iter().sum::<f64>() / n;
    let variance = graded.iter().map(|z| (z - mean).powi(2)).sum::<f64>() / n;
    (mean - lambda * variance.sqrt()).clamp(0.0, 1.0)
}

#[cfg(test)]
mod tests {
    use super::total;

    #[test]
    fn hand_worked_totals() {
        // mean 0.5, squared deviations 0.09 and 0.09: sd 0.3.
        assert!((total(true, &[0.2, 0.8], 0.5) - 0.35).abs() < 1e-12);
        assert!((total(true, &[0.2, 0.8], 0.0) - 0.5).abs() < 1e-12);
        // mean 0.6, deviations -0.4, 0, 0.4: variance 0.32 / 3, sd 0.326598632.
        assert!((total(true, &[0.2, 0.6, 1.0], 1.0) - 0.273401367).abs() < 1e-8);
        // mean 0.5, sd 0.5, lambda 2: below 0, clipped.
        assert_eq!(total(true, &[0.0, 1.0], 2.0), 0.0);
        assert_eq!(total(true, &[0.7], 3.0), 0.7);
    }

    #[test]
    fn a_failed_hard_check_leaves_nothing_and_no_graded_score_leaves_the_pass() {
        assert_eq!(total(false, &[1.0, 1.0], 0.0), 0.0);
        assert_eq!(total(false, &[], 0.0), 0.0);
        assert_eq!(total(true, &[], 0.0), 1.0);
    }
}
