//! The few statistics the demo prints.

/// Returns the 95 % Wilson score interval of a proportion of `passed` out of `n` (Wilson 1927); (0, 1) when `n` is 0.
pub fn wilson_95(passed: usize, n: usize) -> (f64, f64) {
    if n == 0 {
        return (0.0, 1.0);
    }
    const Z: f64 = 1.959_963_984_540_054;
    let (n, p) = (n as f64, passed as f64 / n as f64);
    let centre = (p + Z * Z / (2.0 * n)) / (1.0 + Z * Z / n);
    let half = Z / (1.0 + Z * Z / n) * (p * (1.0 - p) / n + Z * Z / (4.0 * n * n)).sqrt();
    ((centre - half).max(0.0), (centre + half).min(1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wilson_agrees_with_scipy() {
        // scipy.stats.binomtest(9, 40).proportion_ci(method="wilson")
        let (low, high) = wilson_95(9, 40);
        assert!((low - 0.123_160_9).abs() < 1e-6, "{low}");
        assert!((high - 0.375_031_0).abs() < 1e-6, "{high}");
        assert_eq!(wilson_95(0, 0), (0.0, 1.0));
        let (none, all) = (wilson_95(0, 10), wilson_95(10, 10));
        assert!(none.0 < 1e-12 && all.1 > 1.0 - 1e-12 && all.1 <= 1.0, "{none:?} {all:?}");
    }
}
