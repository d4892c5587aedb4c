//! How often a scorer puts the better answer first, with an interval, and beside it how often mere length would.

use std::collections::BTreeMap;

use serde::Serialize;

use super::pairs::Pair;

/// Standard errors of a two-sided interval of 95 %.
const Z: f64 = 1.959_963_984_540_054;

/// A share of pairs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Accuracy {
    pub pairs: usize,
    /// Pairs put in the right order; a tie counts one half.
    pub right: f64,
    pub accuracy: f64,
    /// Wilson's interval of 95 %.
    pub low: f64,
    pub high: f64,
}

impl Accuracy {
    /// Counts margins: the better answer's score minus the other's.
    pub fn of(margins: impl Iterator<Item = f64>) -> Self {
        let (mut pairs, mut right) = (0, 0.0);
        for margin in margins {
            pairs += 1;
            right += if margin > 0.0 {
                1.0
            } else if margin == 0.0 {
                0.5
            } else {
                0.0
            };
        }
        let (low, high) = wilson(right, pairs);
        let accuracy = if pairs == 0 { 0.0 } else { right / pairs as f64 };
        Accuracy { pairs, right, accuracy, low, high }
    }
}

/// Returns Wilson's interval of `right` of `n` (Wilson 1927); everything where there is nothing.
fn wilson(right: f64, n: usize) -> (f64, f64) {
    if n == 0 {
        return (0.0, 1.0);
    }
    let n = n as f64;
    let share = right / n;
    let middle = (share + Z * Z / (2.0 * n)) / (1.0 + Z * Z / n);
    let half = Z / (1.0 + Z * Z / n) * (share * (1.0 - share) / n + Z * Z / (4.0 * n * n)).sqrt();
    ((middle - half).max(0.0), (middle + half).min(1.0))
}

/// A scorer on pairs, as a whole and by subset.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    pub overall: Accuracy,
    /// The mean of the subsets' accuracies, as RewardBench averages; nothing where no pair names one.
    pub mean_of_subsets: Option<f64>,
    pub subsets: BTreeMap<String, Accuracy>,
    /// How often the longer answer is the better one.
    pub longer_is_better: Accuracy,
}

impl Report {
    /// Reports the margins of pairs, in their order.
    pub fn new(pairs: &[Pair], margins: &[f64]) -> Self {
        let mut by_subset: BTreeMap<String, Vec<f64>> = BTreeMap::new();
        for (pair, margin) in pairs.iter().zip(margins) {
            if let Some(subset) = &pair.subset {
                by_subset.entry(subset.clone()).or_default().push(*margin);
            }
        }
        let subsets: BTreeMap<String, Accuracy> =
            by_subset.into_iter().map(|(name, margins)| (name, Accuracy::of(margins.into_iter()))).collect();
        let sum: f64 = subsets.values().map(|accuracy| accuracy.accuracy).sum();
        let length = |text: &str| text.chars().count() as f64;
        Report {
            overall: Accuracy::of(margins.iter().copied()),
            mean_of_subsets: (!subsets.is_empty()).then(|| sum / subsets.len() as f64),
            subsets,
            longer_is_better: Accuracy::of(pairs.iter().map(|pair| length(&pair.chosen) - length(&pair.rejected))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Message;

    #[test]
    fn intervals_are_wilsons() {
        // Computed apart, in Python.
        let known = [
            (8.0, 10, 0.490_162_471_536_641_8, 0.943_317_848_545_624_8),
            (0.0, 20, 0.0, 0.161_125_158_052_819_38),
            (150.0, 200, 0.685_659_016_879_541_7, 0.804_918_320_931_824_9),
        ];
        for (right, n, low, high) in known {
            let found = wilson(right, n);
            assert!((found.0 - low).abs() < 1e-9 && (found.1 - high).abs() < 1e-9, "{right} of {n}: {found:?}");
        }
        assert_eq!(wilson(0.0, 0), (0.0, 1.0));
    }

    #[test]
    fn a_report_counts_by_subset_and_against_length() {
        let pair = |subset: &str, chosen: &str, rejected: &str| Pair {
            messages: vec![Message::text("user", "q")],
            chosen: chosen.into(),
            rejected: rejected.into(),
            subset: Some(subset.into()),
        };
        let pairs = [pair("chat", "long", "a"), pair("chat", "long", "b"), pair("safety", "no", "longer")];
        let report = Report::new(&pairs, &[1.0, -1.0, 0.0]);
        assert_eq!((report.overall.right, report.overall.accuracy), (1.5, 0.5));
        assert_eq!((report.subsets["chat"].accuracy, report.subsets["safety"].accuracy), (0.5, 0.5));
        assert_eq!(report.longer_is_better.right, 2.0);
        let margins = [1.0, 1.0, -1.0];
        assert_eq!(Report::new(&pairs, &margins).mean_of_subsets, Some(0.5));
    }
}
