//! The paired betting e-process: how much money a fair gambler would have made by betting that the challenger is better.
//!
//! The null hypothesis is `E[d] <= margin`, with one difference `d` in [-1, 1] per cluster of prompts. Before each
//! difference is seen a stake is chosen from the earlier ones alone, so that under the null the wealth is a
//! non-negative supermartingale: by Ville's inequality it ever reaches 1/alpha with probability at most alpha, however
//! often it is looked at. The stake is the predictable plug-in of Waudby-Smith and Ramdas, "Estimating means of bounded
//! random variables by betting" (<https://arxiv.org/abs/2010.09686>), with one pseudo-observation.
//!
//! The stake is never negative, so a challenger that is plainly worse loses no wealth: it is never bet upon. What speaks
//! against one is the wealth of the mirrored bet ([`Evidence::against`]), whose null hypothesis is `E[d] >= margin`.

use std::io::{BufRead, Write};

use serde::{Deserialize, Serialize};

use super::GateError;

/// Squared deviation of the pseudo-observation: what the first stake believes about the spread of d.
const PRIOR_SQUARED_DEVIATION: f64 = 0.12;
/// The largest part of the wealth that one observation may lose.
const STAKE_LIMIT: f64 = 0.5;

/// The state of the process after `n` differences.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Evidence {
    margin: f64,
    n: u64,
    sum: f64,
    squared_deviations: f64,
    ln_wealth: f64,
}

/// What one difference did: the stake that met it and the wealth after it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct EvidenceStep {
    pub lambda: f64,
    pub ln_wealth: f64,
}

impl Evidence {
    /// Returns a process with wealth 1 against the null "the mean gain is at most `margin`".
    pub fn new(margin: f64) -> Result<Evidence, GateError> {
        if !(0.0..1.0).contains(&margin) {
            return Err(GateError::Margin(margin));
        }
        Ok(Evidence::with(margin))
    }

    /// Returns the mirrored process, with wealth 1 against the null "the mean gain is at least `margin`"; it takes `-d`.
    pub fn against(margin: f64) -> Result<Evidence, GateError> {
        Evidence::new(margin).map(|evidence| Evidence::with(-evidence.margin))
    }

    fn with(margin: f64) -> Evidence {
        Evidence { margin, n: 0, sum: 0.0, squared_deviations: 0.0, ln_wealth: 0.0 }
    }

    /// Bets on one difference. A value outside [-1, 1] would break the proof and is refused.
    pub fn step(&mut self, d: f64) -> Result<EvidenceStep, GateError> {
        if !(-1.0..=1.0).contains(&d) {
            return Err(GateError::Difference(d));
        }
        let lambda = self.stake();
        self.ln_wealth += (lambda * (d - self.margin)).ln_1p();
        self.n += 1;
        self.sum += d;
        // The deviation is from the mean that already holds d (and the pseudo-observation at 0).
        self.squared_deviations += (d - self.mean()).powi(2);
        Ok(EvidenceStep { lambda, ln_wealth: self.ln_wealth })
    }

    /// Returns the stake for the next difference, known before it is seen.
    pub(super) fn stake(&self) -> f64 {
        let gain = self.mean() - self.margin;
        let variance = (PRIOR_SQUARED_DEVIATION + self.squared_deviations) / (self.n + 1) as f64;
        (gain / (variance + gain * gain)).clamp(0.0, STAKE_LIMIT / (1.0 + self.margin))
    }

    /// Returns the mean with the pseudo-observation, which the next stake is made of.
    fn mean(&self) -> f64 {
        self.sum / (self.n + 1) as f64
    }

    /// Returns the plain mean of the differences so far, or 0 before the first.
    pub fn mean_gain(&self) -> f64 {
        if self.n == 0 { 0.0 } else { self.sum / self.n as f64 }
    }

    /// Returns the number of differences seen.
    pub fn len(&self) -> u64 {
        self.n
    }

    /// Returns true before the first difference.
    pub fn is_empty(&self) -> bool {
        self.n == 0
    }

    /// Returns the logarithm of the wealth.
    pub fn ln_wealth(&self) -> f64 {
        self.ln_wealth
    }
}

/// One line of `taod gate evidence`'s input.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct InputLine {
    d: f64,
}

/// One line of its output.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OutputLine {
    pub index: u64,
    pub lambda: f64,
    pub ln_wealth: f64,
}

/// Runs the process over one input line (`{"d": x}`) and returns the line to print; `index` counts from 0.
pub fn evidence_line(evidence: &mut Evidence, line: &str) -> Result<OutputLine, GateError> {
    let index = evidence.len();
    let parsed: InputLine = serde_json::from_str(line).map_err(|source| GateError::Line { index, source })?;
    let EvidenceStep { lambda, ln_wealth } = evidence.step(parsed.d)?;
    Ok(OutputLine { index, lambda, ln_wealth })
}

/// Runs the process over whole lines, as `taod gate evidence` does: one output line for each input line, in order.
pub fn evidence_lines(margin: f64, input: impl BufRead, mut output: impl Write) -> Result<Evidence, GateError> {
    let mut evidence = Evidence::new(margin)?;
    for line in input.lines() {
        let result = evidence_line(&mut evidence, &line?)?;
        serde_json::to_writer(&mut output, &result).map_err(std::io::Error::from)?;
        output.write_all(b"\n")?;
    }
    Ok(evidence)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Deserialize)]
    struct Golden {
        name: String,
        margin: f64,
        d: Vec<f64>,
        /// [lambda, ln_wealth] of each step.
        steps: Vec<[f64; 2]>,
    }

    #[test]
    fn it_agrees_with_an_independent_implementation() {
        let golden: Vec<Golden> = serde_json::from_str(include_str!("../../tests/golden/gate_evidence.json")).unwrap();
        assert!(golden.iter().map(|g| g.d.len()).sum::<usize>() >= 3000);
        for sequence in golden {
            let mut evidence = Evidence::new(sequence.margin).unwrap();
            for (i, (d, [lambda, ln_wealth])) in sequence.d.iter().zip(&sequence.steps).enumerate() {
                let step = evidence.step(*d).unwrap();
                let close = |a: f64, b: f64| (a - b).abs() <= 1e-9 * b.abs().max(1.0);
                assert!(close(step.lambda, *lambda), "{} {i}: {} {lambda}", sequence.name, step.lambda);
                assert!(close(step.ln_wealth, *ln_wealth), "{} {i}: {} {ln_wealth}", sequence.name, step.ln_wealth);
            }
        }
    }

    /// The next word of SplitMix64, as the script that made the golden file has it.
    fn split_mix(state: &mut u64) -> u64 {
        *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (*state ^ (*state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    #[test]
    fn it_agrees_on_ten_thousand_sequences() {
        let golden = include_bytes!("../../tests/golden/gate_evidence_many.f64");
        let golden: Vec<f64> = golden.chunks(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect();
        assert_eq!(golden.len(), 30_000);
        for (index, expected) in golden.chunks(3).enumerate() {
            let mut state = index as u64;
            let mut word = || split_mix(&mut state);
            let margin = [0.0, 0.005, 0.02, 0.3][(word() % 4) as usize];
            let length = 1 + word() % 90;
            let centred = |word: u64, bits: u32| (word % (2 << bits)) as f64 - f64::from(1u32 << bits);
            let shift = centred(word(), 19) / f64::from(1 << 20);
            let pass_or_fail = word().is_multiple_of(2);
            let mut evidence = Evidence::new(margin).unwrap();
            let (mut highest, mut stakes) = (0.0f64, 0.0);
            for _ in 0..length {
                let x = (centred(word(), 20) / f64::from(1 << 20) / 2.0 + shift).clamp(-1.0, 1.0);
                let coin = f64::from(u8::from(x > 0.25)) - f64::from(u8::from(x < -0.25));
                let step = evidence.step(if pass_or_fail { coin } else { x }).unwrap();
                highest = highest.max(step.ln_wealth);
                stakes += step.lambda;
            }
            for (ours, theirs) in [evidence.ln_wealth(), highest, stakes].iter().zip(expected) {
                assert!((ours - theirs).abs() <= 1e-9, "sequence {index}: {ours} {theirs}");
            }
        }
    }

    #[test]
    fn the_first_stake_is_nothing_and_no_single_loss_ruins() {
        let mut evidence = Evidence::new(0.005).unwrap();
        assert_eq!(evidence.step(1.0).unwrap(), EvidenceStep { lambda: 0.0, ln_wealth: 0.0 });
        for _ in 0..50 {
            evidence.step(1.0).unwrap();
        }
        let before = evidence.ln_wealth();
        assert!(evidence.step(-1.0).unwrap().ln_wealth >= before + 0.5f64.ln() - 1e-12);
    }

    #[test]
    fn the_mirrored_bet_wins_where_the_gain_is_below_the_margin_and_is_the_same_process() {
        let (mut ahead, mut against) = (Evidence::new(0.005).unwrap(), Evidence::against(0.005).unwrap());
        // By hand: a mean of 0 is 0.005 above the mirrored margin, so the first stake is 0.005 / (0.12 + 0.005^2). After d = -1 the
        // mirrored mean is 1/2, 0.505 above it, the variance (0.12 + 0.25) / 2, and the stake 0.505 / (0.185 + 0.505^2) = 1.1470,
        // cut to 0.5 / 0.995.
        let (first, second) = (against.step(1.0).unwrap(), against.step(1.0).unwrap());
        assert!((first.lambda - 0.005 / 0.120_025).abs() < 1e-12, "{first:?}");
        assert!((second.lambda - 0.5 / 0.995).abs() < 1e-12, "{second:?}");
        let grown = (first.lambda * 1.005).ln_1p() + (0.5 / 0.995 * 1.005f64).ln_1p();
        assert!((second.ln_wealth - grown).abs() < 1e-12, "{second:?}");
        for i in 0..200 {
            let d = if i % 10 == 0 { 1.0 } else { -0.2 };
            ahead.step(d).unwrap();
            against.step(-d).unwrap();
        }
        assert!(ahead.ln_wealth() > -1.0 && against.ln_wealth() > 50f64.ln(), "{ahead:?} {against:?}");
        // Without a margin the two are one: betting on d against 0 is betting on -d against 0.
        let (mut one, mut other) = (Evidence::new(0.0).unwrap(), Evidence::against(0.0).unwrap());
        for d in [0.3, -0.2, 0.9, 0.1] {
            assert_eq!(one.step(d).unwrap(), other.step(d).unwrap());
        }
    }

    #[test]
    fn what_is_no_difference_is_refused_and_changes_nothing() {
        let mut evidence = Evidence::new(0.005).unwrap();
        let untouched = evidence.clone();
        for d in [1.0001, -1.0001, f64::NAN, f64::INFINITY] {
            assert!(evidence.step(d).is_err(), "{d}");
        }
        assert_eq!(evidence, untouched);
        assert!(Evidence::new(-0.1).is_err() && Evidence::new(f64::NAN).is_err());
    }

    #[test]
    fn lines_in_lines_out() {
        let mut out = Vec::new();
        evidence_lines(0.005, "{\"d\": 1}\n{\"d\":-0.5}\n".as_bytes(), &mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        let lines: Vec<OutputLine> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        assert_eq!((lines[0].index, lines[1].index), (0, 1));
        assert!(lines[1].lambda > 0.0 && lines[1].ln_wealth < 0.0);
        let error = evidence_lines(0.005, "{\"d\": 1}\n{\"x\": 2}\n".as_bytes(), Vec::new()).unwrap_err();
        assert!(error.to_string().contains("line 2"), "{error}");
    }
}
