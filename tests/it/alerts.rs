//! The alert rules stand on metrics that exist, each has a page that says what to do, and Prometheus' own tool tests them.

use std::collections::BTreeSet;
use std::process::Command;

use regex::Regex;

use crate::harness::{files, has, root, text};
use crate::metrics::all;

const RULES: &str = "dashboards/alerts.yml";

fn alerts() -> BTreeSet<String> {
    text(RULES).lines().filter_map(|line| line.trim().strip_prefix("- alert: ").map(str::to_string)).collect()
}

fn pages() -> BTreeSet<String> {
    let name = |path: String| path.rsplit('/').next().unwrap().trim_end_matches(".md").to_string();
    files("docs/runbooks", "md").into_iter().map(name).filter(|name| name.starts_with("Taod")).collect()
}

#[test]
fn every_alert_has_a_page_and_every_page_an_alert() {
    assert!(alerts().len() >= 15);
    assert_eq!(alerts(), pages());
    for alert in alerts() {
        assert!(text(RULES).contains(&format!("runbook: docs/runbooks/{alert}.md")), "{alert} names no page");
        let page = text(&format!("docs/runbooks/{alert}.md"));
        for heading in ["## What it means", "## What to look at", "## What to do"] {
            assert!(page.contains(heading), "{alert} lacks {heading:?}");
        }
    }
}

#[test]
fn every_alert_is_tested_and_stands_on_metrics_that_exist() {
    let tests = text("dashboards/alerts_test.yml");
    for alert in alerts() {
        let silent = Regex::new(&format!(r"alertname: {alert}, exp_alerts: \[\]")).unwrap();
        assert!(silent.is_match(&tests), "no test says when {alert} is silent");
        let fires = Regex::new(&format!(r"alertname: {alert}\n\s+exp_alerts:\n\s+- exp_labels")).unwrap();
        assert!(fires.is_match(&tests), "no test says when {alert} fires");
    }
    let mut known: BTreeSet<String> = BTreeSet::new();
    for metric in all() {
        known.insert(metric.name.clone());
        known.extend(["bucket", "sum", "count"].map(|part| format!("{}_{part}", metric.name)));
    }
    let named = Regex::new(r"(:?)\btaod_\w+").unwrap();
    for rules in [text(RULES), tests] {
        for found in named.find_iter(&rules) {
            // `job:taod_...` is a recorded series, made in this file.
            let name = found.as_str();
            assert!(name.starts_with(':') || known.contains(name), "{name} is no metric");
        }
    }
}

#[test]
fn promtool_finds_the_rules_right() {
    let there = Command::new("promtool").arg("--version").output().is_ok();
    if !has("promtool", there, "install Debian's package prometheus") {
        return;
    }
    for arguments in [["check", "rules", RULES], ["test", "rules", "dashboards/alerts_test.yml"]] {
        let output = Command::new("promtool").args(arguments).current_dir(root()).output().unwrap();
        let said = [output.stdout, output.stderr].concat();
        assert!(output.status.success(), "promtool {arguments:?}: {}", String::from_utf8_lossy(&said));
    }
}
