//! The tables that `taod gate simulate` and `taod gate plan` print, in Markdown, so that `docs/method.md` holds them as they are.

use super::{Coverage, NaiveRow, Power, Tally};
use crate::gate::interval::Rate;

/// Returns the table of simulated years.
pub fn years_table(rows: &[Tally]) -> String {
    let head = [
        "scenario",
        "d",
        "decided by",
        "mode",
        "prompts",
        "years",
        "trials",
        "promoted",
        "refused, futile, expired",
        "false",
        "harmful",
        "years with a false one",
        "FDR",
        "power",
        "nights, median (9 of 10)",
        "expected gain a year",
    ];
    let line = |t: &Tally| {
        let nights = match (t.nights_median, t.nights_ninth) {
            (Some(median), Some(ninth)) => format!("{median} ({ninth})"),
            _ => "-".to_string(),
        };
        let power = if t.power.tries == 0 { "-".to_string() } else { rate(&t.power) };
        vec![
            t.scenario.to_string(),
            t.shape.to_string(),
            t.guards.to_string(),
            t.mode.as_str().to_string(),
            t.prompts.to_string(),
            t.years.to_string(),
            t.trials.to_string(),
            t.promotions.to_string(),
            format!("{}, {}, {}", t.refused, t.futile, t.expired),
            t.false_promotions.to_string(),
            t.harmful.to_string(),
            rate(&t.false_year),
            format!("{:.4} ({:.4} to {:.4})", t.fdr.mean, t.fdr.lower.max(0.0), t.fdr.upper),
            power,
            nights,
            format!("{:+.3}", t.true_gain),
        ]
    };
    table(&head, rows.iter().map(line))
}

/// Returns the table of naive rules: averages a year.
pub fn naive_table(rows: &[NaiveRow]) -> String {
    let head = ["scenario", "rule", "promoted", "false", "harmful", "expected gain", "gain it saw"];
    let line = |r: &NaiveRow| {
        vec![
            r.scenario.to_string(),
            r.rule.to_string(),
            format!("{:.1}", r.promotions),
            format!("{:.1}", r.false_promotions),
            format!("{:.1}", r.harmful),
            format!("{:+.3}", r.true_gain),
            format!("{:+.3}", r.apparent_gain),
        ]
    };
    table(&head, rows.iter().map(line))
}

/// Returns the table of single trials: the share promoted by the end of each night.
pub fn power_table(rows: &[Power]) -> String {
    let nights = rows.iter().map(|row| row.by_night.len()).max().unwrap_or(0);
    let mut head: Vec<String> =
        ["true gain", "d", "decided by", "mode", "prompts", "R", "trials"].map(str::to_string).to_vec();
    head.extend((1..=nights).map(|night| format!("by night {night}")));
    head.push("promoted".to_string());
    let line = |row: &Power| {
        let mut cells = vec![
            format!("{:+.3}", row.gain),
            row.shape.to_string(),
            row.guards.to_string(),
            row.mode.as_str().to_string(),
            row.prompts.to_string(),
            row.promotions.to_string(),
            row.promoted.tries.to_string(),
        ];
        cells.extend(row.by_night.iter().map(|night| format!("{:.2}", night.share())));
        cells.resize(7 + nights, "-".to_string());
        cells.push(rate(&row.promoted));
        cells
    };
    table(&head.iter().map(String::as_str).collect::<Vec<_>>(), rows.iter().map(line))
}

/// Returns the table of misses of the confidence sequences.
pub fn coverage_table(rows: &[Coverage]) -> String {
    let head = ["d", "mean", "values", "looks", "nominal miss", "lower bound missed", "upper bound missed"];
    let line = |c: &Coverage| {
        vec![
            c.shape.to_string(),
            format!("{:+.3}", c.mean),
            c.values.to_string(),
            c.looks.to_string(),
            format!("{:.3}", 1.0 - c.nominal),
            rate(&c.lower_misses),
            rate(&c.upper_misses),
        ]
    };
    table(&head, rows.iter().map(line))
}

fn rate(rate: &Rate) -> String {
    format!("{:.4} ({:.4} to {:.4})", rate.share(), rate.lower, rate.upper)
}

fn table(head: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    let mut lines = vec![head.iter().map(|cell| cell.to_string()).collect::<Vec<_>>()];
    lines.push(vec!["---".to_string(); head.len()]);
    lines.extend(rows);
    lines.iter().map(|cells| format!("| {} |\n", cells.join(" | "))).collect()
}
