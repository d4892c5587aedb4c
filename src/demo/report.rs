//! What the demo ends with: one document, printed as text or as JSON.

use std::fmt::{self, Display, Formatter};

use serde::Serialize;

use super::stats::wilson_95;
use crate::gate::Finding;
use crate::round::{Outcome, StageReport};

/// The whole result of a demo.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    pub seed: u64,
    pub control: Option<String>,
    pub stages: Vec<StageReport>,
    /// Rows in `queries` and `dead_letters`.
    pub rows: i64,
    pub dead_letters: i64,
    pub workloads: Vec<Comparison>,
    pub examples: Vec<Example>,
    pub evidence: Evidence,
    pub outcome: Outcome,
    /// Why, in one sentence.
    pub reason: String,
    /// Served name of the adapter that answers now, or `base`.
    pub served: String,
    /// How the endpoint was shown to serve it; absent without a promotion.
    pub proof: Option<String>,
    pub training: Training,
    pub paths: Paths,
    pub seconds: f64,
}

/// Answers to the audit prompts of one workload, before and after.
#[derive(Debug, Clone, Serialize)]
pub struct Comparison {
    pub workload: String,
    pub before: Side,
    pub after: Side,
}

/// What was measured on one side's answers.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Side {
    pub answers: usize,
    pub passed: usize,
    pub mean_words: f64,
    /// Mean calibrated similarity of answer and question, in [0, 1].
    pub similarity: f64,
}

/// One audit prompt and its two answers.
#[derive(Debug, Clone, Serialize)]
pub struct Example {
    pub workload: String,
    pub prompt: String,
    pub before: String,
    pub after: String,
}

/// The curve of the gate.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Evidence {
    /// ln W after each prompt.
    pub ln_wealth: Vec<f64>,
    /// What ln W has to reach.
    pub bar: f64,
    /// Prompts used per side.
    pub prompts: usize,
    pub mean_d: f64,
    pub sd_d: f64,
    pub guardrails: Vec<Finding>,
}

/// That training really ran.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Training {
    pub steps: usize,
    /// KL from the base in nats a token, as the last steps logged it.
    pub kl: f64,
}

/// Where everything lies.
#[derive(Debug, Clone, Serialize)]
pub struct Paths {
    pub tables: String,
    pub round: String,
    pub adapter: Option<String>,
    pub config: String,
}

impl Display for Report {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        self.stages(f)?;
        self.comparison(f)?;
        self.examples(f)?;
        self.evidence(f)?;
        self.verdict(f)
    }
}

impl Report {
    fn stages(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(f, "\n{:<24}{:>10}{:>12}{:>10}{:>10}", "stage", "rows", "tokens", "seconds", "tokens/s")?;
        for stage in &self.stages {
            let rate =
                if stage.tokens > 0 { format!("{:.0}", stage.tokens as f64 / stage.seconds) } else { String::new() };
            let tokens = if stage.tokens > 0 { stage.tokens.to_string() } else { String::new() };
            writeln!(f, "{:<24}{:>10}{:>12}{:>10.1}{:>10}", stage.stage, stage.rows, tokens, stage.seconds, rate)?;
        }
        writeln!(f, "{:<24}{:>10}{:>12}{:>10.1}", "in all", "", "", self.seconds)?;
        writeln!(f, "\n{} rows in the table, {} dead letters", self.rows, self.dead_letters)
    }

    fn comparison(&self, f: &mut Formatter<'_>) -> fmt::Result {
        if self.workloads.is_empty() {
            return Ok(());
        }
        writeln!(f, "\nAudit prompts, used by neither training nor gate, asked through the name clients use")?;
        writeln!(
            f,
            "{:<14}{:^38}{:^38}{:^13}{:^13}",
            "", "strict pass before", "strict pass after", "words", "similarity"
        )?;
        for row in &self.workloads {
            row_of(f, &row.workload, &row.before, &row.after)?;
        }
        let total = |pick: fn(&Comparison) -> &Side| sum(self.workloads.iter().map(pick));
        row_of(f, "all", &total(|c| &c.before), &total(|c| &c.after))
    }

    fn examples(&self, f: &mut Formatter<'_>) -> fmt::Result {
        for example in &self.examples {
            writeln!(f, "\n[{}] {}", example.workload, one_line(&example.prompt, 240))?;
            writeln!(f, "  before: {}", one_line(&example.before, 240))?;
            writeln!(f, "  after:  {}", one_line(&example.after, 240))?;
        }
        Ok(())
    }

    fn evidence(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let e = &self.evidence;
        if e.ln_wealth.is_empty() {
            return Ok(());
        }
        writeln!(f, "\nEvidence of the gate: ln W after each of {} fresh prompts; the bar is {:.2}", e.prompts, e.bar)?;
        for line in curve(&e.ln_wealth, e.bar, 72, 8) {
            writeln!(f, "  {line}")?;
        }
        writeln!(f, "  mean gain {:+.3}, sd {:.3}", e.mean_d, e.sd_d)?;
        for finding in &e.guardrails {
            writeln!(f, "  guardrail {:<10}{}", finding.guardrail.as_str(), finding.outcome.as_str())?;
            finding.reason.split("; ").try_for_each(|part| writeln!(f, "      {part}"))?;
        }
        Ok(())
    }

    fn verdict(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(f, "\nVerdict: {} ({})", self.outcome.name(), self.reason)?;
        writeln!(f, "Training: {} steps, KL from the base {:.3} nats a token", self.training.steps, self.training.kl)?;
        if let Some(proof) = &self.proof {
            writeln!(f, "Proof: {proof}")?;
        }
        writeln!(f, "Served now: {}", self.served)?;
        writeln!(f, "\nTables    {}\nDecision  {}", self.paths.tables, self.paths.round)?;
        if let Some(adapter) = &self.paths.adapter {
            writeln!(f, "Adapter   {adapter}")?;
        }
        writeln!(f, "Config    {}", self.paths.config)?;
        writeln!(
            f,
            "\nNext, for an endpoint of your own: copy config/production.toml, set brokers, topic, model and endpoint,"
        )?;
        writeln!(f, "then `taod config check --config FILE` and `taod run --config FILE`.")
    }
}

fn row_of(f: &mut Formatter<'_>, name: &str, before: &Side, after: &Side) -> fmt::Result {
    let cell = |s: &Side| {
        let (low, high) = wilson_95(s.passed, s.answers);
        let rate = 100.0 * s.passed as f64 / s.answers.max(1) as f64;
        format!("{:>3}/{:<3} {:>5.1} % ({:.0} to {:.0} %)", s.passed, s.answers, rate, 100.0 * low, 100.0 * high)
    };
    let words = format!("{:.0} -> {:.0}", before.mean_words, after.mean_words);
    let similarity = format!("{:.2} -> {:.2}", before.similarity, after.similarity);
    writeln!(f, "{:<14}{:^38}{:^38}{:^13}{:^13}", name, cell(before), cell(after), words, similarity)
}

/// Returns the sides joined, with means weighted by their answers.
fn sum<'a>(sides: impl Iterator<Item = &'a Side>) -> Side {
    let mut all = Side::default();
    for side in sides {
        let n = side.answers as f64;
        all.mean_words += n * side.mean_words;
        all.similarity += n * side.similarity;
        all.answers += side.answers;
        all.passed += side.passed;
    }
    let n = all.answers.max(1) as f64;
    Side { mean_words: all.mean_words / n, similarity: all.similarity / n, ..all }
}

/// Returns text on one line, control characters removed (logged text is hostile to terminals), cut at `max` characters.
fn one_line(text: &str, max: usize) -> String {
    let clean: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let joined = clean.split_whitespace().collect::<Vec<_>>().join(" ");
    match joined.char_indices().nth(max) {
        Some((cut, _)) => format!("{}...", &joined[..cut]),
        None => joined,
    }
}

/// Draws a curve as `height` lines of `width` characters, with the bar as a line of dashes.
fn curve(values: &[f64], bar: f64, width: usize, height: usize) -> Vec<String> {
    let top = values.iter().copied().fold(bar, f64::max);
    let bottom = values.iter().copied().fold(0.0, f64::min);
    let level = |v: f64| (((v - bottom) / (top - bottom).max(1e-9)) * (height - 1) as f64).round() as usize;
    let columns = width.min(values.len());
    let at = |column: usize| values[((column + 1) * values.len() / columns).saturating_sub(1)];
    let line = |row: usize| -> String {
        let mark = if row == level(bar) { '-' } else { ' ' };
        let drawn: String = (0..columns).map(|c| if level(at(c)) == row { '*' } else { mark }).collect();
        format!("{:>6.1} |{drawn}", bottom + (top - bottom) * row as f64 / (height - 1) as f64)
    };
    (0..height).rev().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_curve_ends_where_the_values_end() {
        let values: Vec<f64> = (0..100).map(|i| i as f64 / 10.0).collect();
        let lines = curve(&values, 7.1, 50, 8);
        assert_eq!(lines.len(), 8);
        assert!(lines[0].ends_with('*'), "{lines:?}");
        assert!(lines[7].contains("|*"), "{lines:?}");
        assert!(lines.iter().any(|l| l.contains("----")), "{lines:?}");
    }

    #[test]
    fn logged_text_cannot_steer_the_terminal() {
        assert_eq!(one_line("a\u{1b}[31m\nb", 10), "a [31m b");
        assert_eq!(one_line("abcdef", 3), "abc...");
    }

    #[test]
    fn joined_sides_weigh_by_answers() {
        let a = Side { answers: 1, passed: 1, mean_words: 10.0, similarity: 1.0 };
        let b = Side { answers: 3, passed: 0, mean_words: 20.0, similarity: 0.0 };
        let all = sum([&a, &b].into_iter());
        assert_eq!((all.answers, all.passed), (4, 1));
        assert!((all.mean_words - 17.5).abs() < 1e-12 && (all.similarity - 0.25).abs() < 1e-12);
    }
}
