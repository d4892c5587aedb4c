//! How often a scorer puts the better answer first, with an interval, and beside it how often mere length would.
//!
//! Pairs of one prompt are not independent: who misreads a question is wrong about all of its answers. So the interval is that of
//! as many independent pairs as tell the same: `p (1 - p)` over the variance of the share by clusters of prompts (the design
//! effect of Kish 1965; Wilson's interval with it: Korn and Graubard 1998, Franco et al. 2019).

use std::collections::{BTreeMap, HashMap};

use serde::Serialize;

use super::pairs::Pair;
use crate::record::prompt_hash;

/// Standard errors of a two-sided interval of 95 %.
const Z: f64 = 1.959_963_984_540_054;

/// A share of pairs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Accuracy {
    pub pairs: usize,
    /// Prompts that they belong to.
    pub prompts: usize,
    /// Independent pairs that would tell as much.
    pub effective_pairs: f64,
    /// Pairs put in the right order; a tie counts one half.
    pub right: f64,
    pub accuracy: f64,
    /// Wilson's interval of 95 %, of the effective pairs.
    pub low: f64,
    pub high: f64,
}

impl Accuracy {
    /// Counts margins, the better answer's score minus the other's, each with the number of its prompt.
    pub fn of(margins: impl Iterator<Item = (usize, f64)>) -> Self {
        let mut by_prompt: BTreeMap<usize, (f64, f64)> = BTreeMap::new();
        for (prompt, margin) in margins {
            let (pairs, right) = by_prompt.entry(prompt).or_default();
            *pairs += 1.0;
            *right += if margin > 0.0 {
                1.0
            } else if margin == 0.0 {
                0.5
            } else {
                0.0
            };
        }
        let prompts: Vec<(f64, f64)> = by_prompt.into_values().collect();
        let (pairs, right): (f64, f64) = prompts.iter().fold((0.0, 0.0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
        let accuracy = if pairs == 0.0 { 0.0 } else { right / pairs };
        let effective_pairs = effective(&prompts, accuracy, pairs);
        let (low, high) = wilson(accuracy, effective_pairs);
        let (pairs, prompts) = (pairs as usize, prompts.len());
        Accuracy { pairs, prompts, effective_pairs, right, accuracy, low, high }
    }
}

/// Returns how many independent pairs tell as much as these, given as (pairs, right ones) of each prompt: at least one, at most
/// all, and where the pairs do not differ, which tells nothing of how they hang together, one for each prompt.
fn effective(prompts: &[(f64, f64)], share: f64, pairs: f64) -> f64 {
    let n = prompts.len() as f64;
    if n < 2.0 || share <= 0.0 || share >= 1.0 {
        return n;
    }
    let squares: f64 = prompts.iter().map(|(pairs, right)| (right - share * pairs).powi(2)).sum();
    let variance = n / (n - 1.0) * squares / (pairs * pairs);
    (share * (1.0 - share) / variance).clamp(1.0, pairs)
}

/// Returns Wilson's interval of a share of `n` (Wilson 1927); everything where there is nothing.
fn wilson(share: f64, n: f64) -> (f64, f64) {
    if n == 0.0 {
        return (0.0, 1.0);
    }
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
        let mut numbers: HashMap<String, usize> = HashMap::new();
        let mut number = |pair: &Pair| {
            let (next, prompt) = (numbers.len(), prompt_hash(&pair.messages, None));
            *numbers.entry(prompt).or_insert(next)
        };
        let prompts: Vec<usize> = pairs.iter().map(&mut number).collect();
        let mut by_subset: BTreeMap<String, Vec<(usize, f64)>> = BTreeMap::new();
        for ((pair, prompt), margin) in pairs.iter().zip(&prompts).zip(margins) {
            if let Some(subset) = &pair.subset {
                by_subset.entry(subset.clone()).or_default().push((*prompt, *margin));
            }
        }
        let subsets: BTreeMap<String, Accuracy> =
            by_subset.into_iter().map(|(name, margins)| (name, Accuracy::of(margins.into_iter()))).collect();
        let sum: f64 = subsets.values().map(|accuracy| accuracy.accuracy).sum();
        let length = |text: &str| text.chars().count() as f64;
        let longer = |pair: &Pair| length(&pair.chosen) - length(&pair.rejected);
        Report {
            overall: Accuracy::of(prompts.iter().copied().zip(margins.iter().copied())),
            mean_of_subsets: (!subsets.is_empty()).then(|| sum / subsets.len() as f64),
            subsets,
            longer_is_better: Accuracy::of(prompts.iter().copied().zip(pairs.iter().map(longer))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{Message, derive_seed};

    #[test]
    fn intervals_are_wilsons() {
        // Computed apart, in Python.
        let known = [
            (8.0, 10, 0.490_162_471_536_641_8, 0.943_317_848_545_624_8),
            (0.0, 20, 0.0, 0.161_125_158_052_819_38),
            (150.0, 200, 0.685_659_016_879_541_7, 0.804_918_320_931_824_9),
        ];
        for (right, n, low, high) in known {
            let n: u32 = n;
            let found = wilson(right / n as f64, n as f64);
            assert!((found.0 - low).abs() < 1e-9 && (found.1 - high).abs() < 1e-9, "{right} of {n}: {found:?}");
        }
        assert_eq!(wilson(0.0, 0.0), (0.0, 1.0));
    }

    #[test]
    fn pairs_of_one_prompt_tell_as_much_as_they_differ() {
        let of = |prompts: &[&[f64]]| {
            let pairs = prompts.iter().enumerate().flat_map(|(p, margins)| margins.iter().map(move |m| (p, *m)));
            Accuracy::of(pairs)
        };
        // One pair each: as if they were independent, which they are. 3 of 4: sum of squares 3/4, variance 4/3 * 3/64.
        let apart = of(&[&[1.0], &[1.0], &[1.0], &[-1.0]]);
        assert!((apart.effective_pairs - 3.0).abs() < 1e-12 && (apart.pairs, apart.prompts) == (4, 4), "{apart:?}");
        // Four that always agree are one pair four times.
        let alike = of(&[&[1.0; 4], &[1.0; 4], &[1.0; 4], &[-1.0; 4]]);
        assert!((alike.effective_pairs - 3.0).abs() < 1e-12 && alike.pairs == 16, "{alike:?}");
        assert_eq!((alike.low, alike.high), (apart.low, apart.high));
        // Prompts that are all half right: no more than there are.
        assert_eq!(of(&[&[1.0, -1.0], &[1.0, -1.0], &[-1.0, 1.0]]).effective_pairs, 6.0);
        assert_eq!((of(&[&[1.0; 9]]).effective_pairs, of(&[&[1.0; 5], &[1.0; 5]]).effective_pairs), (1.0, 2.0));
    }

    /// In a world where a prompt decides half of what becomes of its pairs, the interval holds the truth as often as it says; one
    /// that takes pairs for independent does not.
    #[test]
    fn the_interval_covers_where_pairs_hang_together() {
        let uniform = |parts: &[&str]| derive_seed(11, parts) as f64 / u64::MAX as f64;
        let (mut covered, mut naively, worlds) = (0, 0, 400);
        for world in 0..worlds {
            let world = world.to_string();
            let margins = (0..60usize).flat_map(|prompt| {
                let (world, name) = (world.clone(), prompt.to_string());
                (0..4).map(move |pair: usize| {
                    let pair = pair.to_string();
                    let of_prompt = uniform(&[&world, &name, &pair, "which"]) < 0.7;
                    let drawn = match of_prompt {
                        true => uniform(&[&world, &name]),
                        false => uniform(&[&world, &name, &pair]),
                    };
                    (prompt, if drawn < 0.7 { 1.0 } else { -1.0 })
                })
            });
            let found = Accuracy::of(margins);
            covered += usize::from(found.low <= 0.7 && 0.7 <= found.high);
            let (low, high) = wilson(found.accuracy, found.pairs as f64);
            naively += usize::from(low <= 0.7 && 0.7 <= high);
        }
        let share = |n: usize| n as f64 / f64::from(worlds);
        assert!(share(covered) >= 0.93, "{}", share(covered));
        assert!(share(naively) < 0.87, "the test has no teeth: {}", share(naively));
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
