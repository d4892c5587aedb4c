//! The length bias of a score, measured within prompts and taken out.
//!
//! Learned scorers like long answers: 70 to 90 % of what PPO gained in reward was length (Singhal et al. 2023,
//! arXiv 2310.03716). Across prompts length and merit are mixed, since hard questions get long answers; so the bias is the slope of
//! the regression with one effect for each prompt,
//!
//! ```text
//! score = effect of the prompt + slope ln(1 + words)
//! slope = sum (x - x of its prompt)(s - s of its prompt) / sum (x - x of its prompt)^2,   x = ln(1 + words)
//! ```
//!
//! (the within estimator), on several answers of the served model to each prompt, and `slope (x - centre)` is subtracted, `centre`
//! being the mean of x. It is frozen with the calibration: what a map turns into a share is the corrected score. A correction
//! lessens what length earns and does not end it; the gate's guardrail of length stays.

use serde::{Deserialize, Serialize};

/// Prompts with answers of different lengths below which a slope says more about chance than about a scorer.
pub const MIN_PROMPTS: usize = 20;

/// What one unit of log length is worth to a score.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LengthBias {
    pub slope: f64,
    /// Standard error of the slope, by clusters of prompts.
    pub error: f64,
    /// The log length at which nothing is subtracted.
    pub centre: f64,
    /// Prompts whose answers differ in length.
    pub prompts: usize,
}

/// One answer: which prompt it is to, its words, its raw score.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Point {
    pub prompt: usize,
    pub words: usize,
    pub score: f64,
}

impl LengthBias {
    /// Measures the bias, or says why the answers do not tell it.
    pub fn fit(points: &[Point]) -> Result<Self, String> {
        let mut groups: std::collections::BTreeMap<usize, Vec<(f64, f64)>> = std::collections::BTreeMap::new();
        for point in points {
            if !point.score.is_finite() {
                return Err(format!("{} is no score", point.score));
            }
            groups.entry(point.prompt).or_default().push((log_length(point.words), point.score));
        }
        // Deviations from the mean of the prompt: the prompt's own effect is gone.
        let deviations = |group: &Vec<(f64, f64)>| -> Vec<(f64, f64)> {
            let n = group.len() as f64;
            let mean = |of: fn(&(f64, f64)) -> f64| group.iter().map(of).sum::<f64>() / n;
            let (x, s) = (mean(|point| point.0), mean(|point| point.1));
            group.iter().map(|point| (point.0 - x, point.1 - s)).collect()
        };
        let within: Vec<Vec<(f64, f64)>> = groups.values().map(deviations).collect();
        let spread = |group: &Vec<(f64, f64)>| group.iter().map(|(x, _)| x * x).sum::<f64>();
        let told = within.iter().filter(|group| spread(group) > 0.0).count();
        if told < MIN_PROMPTS {
            return Err(format!(
                "{told} prompts have answers of different lengths: give several answers to at least {MIN_PROMPTS} prompts"
            ));
        }
        let total: f64 = within.iter().map(spread).sum();
        let slope = within.iter().flatten().map(|(x, s)| x * s).sum::<f64>() / total;
        let residual = |group: &Vec<(f64, f64)>| group.iter().map(|(x, s)| x * (s - slope * x)).sum::<f64>().powi(2);
        let error = within.iter().map(residual).sum::<f64>().sqrt() / total;
        let centre = points.iter().map(|point| log_length(point.words)).sum::<f64>() / points.len() as f64;
        Ok(LengthBias { slope, error, centre, prompts: told })
    }

    /// Returns the score without what its length earned.
    pub fn correct(&self, score: f64, words: usize) -> f64 {
        score - self.slope * (log_length(words) - self.centre)
    }

    /// Says what is wrong with a bias that was read.
    pub(super) fn check(&self) -> Result<(), String> {
        match self.slope.is_finite() && self.centre.is_finite() {
            true => Ok(()),
            false => Err("its length bias is no number".into()),
        }
    }
}

fn log_length(words: usize) -> f64 {
    (words as f64).ln_1p()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Deserialize)]
    struct Case {
        points: Vec<(usize, usize, f64)>,
        slope: f64,
        error: f64,
        centre: f64,
        corrected: Vec<f64>,
    }

    fn cases() -> Vec<Case> {
        serde_json::from_str(include_str!("../../tests/golden/length_bias.json")).unwrap()
    }

    #[test]
    fn the_bias_is_that_of_the_regression_with_a_dummy_for_each_prompt() {
        for case in cases() {
            let points: Vec<Point> =
                case.points.iter().map(|&(prompt, words, score)| Point { prompt, words, score }).collect();
            let bias = LengthBias::fit(&points).unwrap();
            let near = |a: f64, b: f64| (a - b).abs() <= 1e-9 * (1.0 + b.abs());
            assert!(near(bias.slope, case.slope) && near(bias.error, case.error), "{bias:?} {}", case.slope);
            assert!(near(bias.centre, case.centre), "{bias:?}");
            for (point, corrected) in points.iter().zip(&case.corrected) {
                assert!(near(bias.correct(point.score, point.words), *corrected));
            }
        }
    }

    #[test]
    fn a_hard_prompt_with_long_answers_is_no_bias() {
        // Longer answers score higher across prompts, and within each prompt length earns nothing.
        let point = |prompt: usize, k: usize| Point { prompt, words: 5 * prompt + k, score: prompt as f64 };
        let points: Vec<Point> = (1..40).flat_map(|prompt| (0..4).map(move |k| point(prompt, k))).collect();
        assert!(LengthBias::fit(&points).unwrap().slope.abs() < 1e-12);
        let few = LengthBias::fit(&points[..40]).unwrap_err();
        assert!(few.starts_with("10 prompts have answers"), "{few}");
        let none = LengthBias::fit(&[Point { prompt: 0, words: 1, score: f64::NAN }]).unwrap_err();
        assert!(none.contains("NaN"), "{none}");
    }
}
