//! Two adapters on the same prompts, compared: for people who look at an adapter without a trial. It decides nothing.
//!
//! Better means what it means for the gate, without the gate's budget: the lower end of the 95 % confidence sequence of the
//! mean gain lies above the margin.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde::Serialize;

use super::confidence::{Bounds, bounds};
use super::{Evidence, GateError, order};
use crate::record::derive_seed;

/// Each end of the confidence sequence misses with at most this probability, so that both hold with 95 %.
const ALPHA: f64 = 0.025;
/// Differences up to this are ties: they come from the rounding of sums.
const TIE: f64 = 1e-9;

/// Both sides' mean scores on one prompt, from 0 to 1, and the segments that the prompt belongs to, such as `workload news`.
#[derive(Debug, Clone, PartialEq)]
pub struct Pair {
    pub adapter: f64,
    pub against: f64,
    pub segments: Vec<String>,
}

/// What came out, over all prompts or over those of a segment.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    pub name: String,
    pub prompts: usize,
    /// Mean score of each side, from 0 to 1.
    pub adapter: f64,
    pub against: f64,
    pub gain: f64,
    /// 95 % confidence sequence of the mean gain.
    pub lower: f64,
    pub upper: f64,
    /// The mean gain in standard deviations of the differences; `None` where they do not differ.
    pub effect_size: Option<f64>,
    pub wins: usize,
    pub ties: usize,
    pub losses: usize,
    /// Whether the lower end is above the margin.
    pub better: bool,
}

/// A whole comparison.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Comparison {
    pub samples: u64,
    pub margin: f64,
    pub all: Row,
    /// The evidence that the gate would have had from these prompts.
    pub ln_wealth: f64,
    pub segments: Vec<Row>,
}

impl Comparison {
    /// Compares; `samples` are the answers of each side to each prompt. `seed` orders the pairs: a file that holds one workload
    /// after the other would break the bounds as it would break a trial.
    pub fn new(pairs: &[Pair], samples: u64, margin: f64, seed: u64) -> Result<Comparison, GateError> {
        let places: Vec<String> = (0..pairs.len()).map(|i| format!("{i:012}")).collect();
        let order = order::permutation(places, derive_seed(seed, &["comparison"]));
        let pairs: Vec<Pair> = order.iter().filter_map(|i| pairs.get(i.parse::<usize>().ok()?)).cloned().collect();
        let mut evidence = Evidence::new(margin)?;
        for pair in &pairs {
            evidence.step(pair.adapter - pair.against)?;
        }
        let mut by_segment: BTreeMap<&str, Vec<&Pair>> = BTreeMap::new();
        for pair in &pairs {
            pair.segments.iter().for_each(|name| by_segment.entry(name).or_default().push(pair));
        }
        Ok(Comparison {
            samples,
            margin,
            all: row("all", &pairs.iter().collect::<Vec<_>>(), margin),
            ln_wealth: evidence.ln_wealth(),
            segments: by_segment.into_iter().map(|(name, pairs)| row(name, &pairs, margin)).collect(),
        })
    }

    /// Returns the comparison as text.
    pub fn text(&self) -> String {
        let verdict = if self.all.better { "better" } else { "not shown to be better" };
        let mut out = format!(
            "{} prompts, {} answers of each side to each; gains with 95 % confidence sequences, margin {}\n",
            self.all.prompts, self.samples, self.margin
        );
        for row in std::iter::once(&self.all).chain(&self.segments) {
            let line = format!(
                "{:<24} {:.3} against {:.3}  gain {:+.3} ({:+.3} to {:+.3})  effect {}  win/tie/loss {}/{}/{}\n",
                row.name,
                row.adapter,
                row.against,
                row.gain,
                row.lower,
                row.upper,
                effect(row),
                row.wins,
                row.ties,
                row.losses
            );
            out.push_str(&line);
        }
        out + &format!("ln wealth {:.2}\n{verdict}\n", self.ln_wealth)
    }

    /// Returns the comparison as one HTML page without anything to load.
    pub fn html(&self, title: &str) -> String {
        let verdict = if self.all.better { "better" } else { "not shown to be better" };
        let mut rows = String::new();
        for row in std::iter::once(&self.all).chain(&self.segments) {
            let cells = [
                format!("{:.3}", row.adapter),
                format!("{:.3}", row.against),
                format!("{:+.3}", row.gain),
                format!("{:+.3} to {:+.3}", row.lower, row.upper),
                effect(row),
                format!("{} / {} / {}", row.wins, row.ties, row.losses),
            ];
            let cells: String = cells.iter().map(|cell| format!("<td>{cell}</td>")).collect();
            let (name, bar) = (escape(&row.name), bar(row, self.margin));
            // Writing to a string cannot fail.
            writeln!(rows, "<tr><th>{name}</th><td>{}</td>{cells}<td>{bar}</td></tr>", row.prompts).unwrap_or_default();
        }
        format!(
            "<!doctype html>\n<html lang=\"en\"><meta charset=\"utf-8\"><title>{title}</title>\n<style>body{{font:14px \
             sans-serif;margin:2em}}table{{border-collapse:collapse}}th,td{{padding:.3em .7em;border-bottom:1px solid \
             #ddd;text-align:right}}th{{text-align:left}}</style>\n<h1>{title}</h1>\n<p><b>{verdict}</b>: gain {:+.3} ({:+.3} to \
             {:+.3} at 95 %), margin {}; {} prompts, {} answers of each side to each; ln wealth {:.2}</p>\n<table>\n\
             <tr><th>segment</th><td>prompts</td><td>adapter</td><td>against</td><td>gain</td><td>95 % confidence \
             sequence</td><td>effect size</td><td>win / tie / loss</td><td>-1 to 1</td></tr>\n{rows}</table>\n</html>\n",
            self.all.gain,
            self.all.lower,
            self.all.upper,
            self.margin,
            self.all.prompts,
            self.samples,
            self.ln_wealth,
            title = escape(title),
        )
    }
}

fn row(name: &str, pairs: &[&Pair], margin: f64) -> Row {
    let n = pairs.len().max(1) as f64;
    let gains: Vec<f64> = pairs.iter().map(|pair| pair.adapter - pair.against).collect();
    let Bounds { mean, lower, upper, .. } = bounds(&gains, -1.0, 1.0, ALPHA);
    let spread = (gains.iter().map(|gain| (gain - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0)).sqrt();
    Row {
        name: name.to_string(),
        prompts: pairs.len(),
        adapter: pairs.iter().map(|pair| pair.adapter).sum::<f64>() / n,
        against: pairs.iter().map(|pair| pair.against).sum::<f64>() / n,
        gain: mean,
        lower,
        upper,
        effect_size: (spread > TIE).then(|| mean / spread),
        wins: gains.iter().filter(|gain| **gain > TIE).count(),
        ties: gains.iter().filter(|gain| gain.abs() <= TIE).count(),
        losses: gains.iter().filter(|gain| **gain < -TIE).count(),
        better: lower > margin,
    }
}

fn effect(row: &Row) -> String {
    row.effect_size.map_or("-".to_string(), |effect| format!("{effect:+.2}"))
}

/// Draws the confidence sequence on a scale from -1 to 1, with the margin.
fn bar(row: &Row, margin: f64) -> String {
    let x = |value: f64| 100.0 * (value + 1.0);
    format!(
        "<svg width=\"200\" height=\"14\"><line x1=\"{m:.1}\" y1=\"0\" x2=\"{m:.1}\" y2=\"14\" stroke=\"#2a7\"/><line \
         x1=\"{:.1}\" y1=\"7\" x2=\"{:.1}\" y2=\"7\" stroke=\"#26c\" stroke-width=\"3\"/><circle cx=\"{:.1}\" cy=\"7\" r=\"4\" \
         fill=\"#26c\"/></svg>",
        x(row.lower),
        x(row.upper),
        x(row.gain),
        m = x(margin),
    )
}

fn escape(words: &str) -> String {
    words.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(ours: &[f64], theirs: &[f64]) -> Vec<Pair> {
        let segment = |i: usize| vec![format!("workload {}", ["a", "b<"][i % 2])];
        let pair = |(i, (adapter, against)): (usize, (&f64, &f64))| Pair {
            adapter: *adapter,
            against: *against,
            segments: segment(i),
        };
        ours.iter().zip(theirs).enumerate().map(pair).collect()
    }

    #[test]
    fn better_needs_more_than_a_higher_mean() {
        let ours = [1.0, 1.0, 0.0, 1.0];
        let few = Comparison::new(&pairs(&ours, &[0.0, 1.0, 0.0, 1.0]), 1, 0.005, 1).unwrap().all;
        assert!(few.gain > 0.0 && !few.better, "{few:?}");
        let many = Comparison::new(&pairs(&ours.repeat(50), &[0.0].repeat(200)), 1, 0.005, 1).unwrap();
        assert!(many.all.better && many.all.lower > 0.005 && many.ln_wealth > 7.0, "{many:?}");
        let same = Comparison::new(&pairs(&[0.5; 200], &[0.5; 200]), 1, 0.005, 1).unwrap().all;
        assert!(!same.better && same.effect_size.is_none() && same.ties == 200, "{same:?}");
        // Above 0 is not yet above the margin.
        let little: Vec<f64> = (0..400).map(|i| 0.5 + [0.03, 0.05][i % 2]).collect();
        let judged = |margin| Comparison::new(&pairs(&little, &[0.5].repeat(400)), 1, margin, 1).unwrap().all;
        assert!(judged(0.005).better && !judged(0.05).better);
    }

    #[test]
    fn numbers_are_those_of_the_definition() {
        let compared = Comparison::new(&pairs(&[1.0, 0.5, 0.0, 0.5], &[0.5, 0.5, 0.5, 0.0]), 2, 0.0, 1).unwrap();
        let all = &compared.all;
        assert_eq!((all.wins, all.ties, all.losses, all.adapter, all.against), (2, 1, 1, 0.5, 0.375));
        // Differences 0.5, 0, -0.5, 0.5: mean 0.125, standard deviation 0.4787 (n - 1).
        assert!((all.gain - 0.125).abs() < 1e-12 && (all.effect_size.unwrap() - 0.261116).abs() < 1e-5, "{all:?}");
        let names: Vec<&str> = compared.segments.iter().map(|row| row.name.as_str()).collect();
        assert_eq!(names, ["workload a", "workload b<"]);
        assert_eq!((compared.segments[0].wins, compared.segments[0].losses), (1, 1));
    }

    #[test]
    fn the_reports_hold_every_row_and_no_markup_of_ours_breaks() {
        let compared = Comparison::new(&pairs(&[1.0, 0.5], &[0.5, 0.5]), 1, 0.005, 1).unwrap();
        let html = compared.html("new & old");
        assert!(html.contains("new &amp; old") && html.contains("workload b&lt;"), "{html}");
        assert_eq!(html.matches("<tr>").count(), 4);
        assert_eq!(html.matches("<svg").count(), 3);
        assert_eq!(compared.text().lines().count(), 6, "{}", compared.text());
    }
}
