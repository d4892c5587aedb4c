//! The list of metrics is a promise to dashboards and alerts.

use taod::metrics::Metrics;

use crate::harness::assert_golden;

/// Units that a name may end with (before `_total`).
const UNITS: &[&str] = &[
    "answers",
    "bytes",
    "commits",
    "ends",
    "entries",
    "errors",
    "fds",
    "files",
    "info",
    "letters",
    "nats",
    "norm",
    "notices",
    "offsets",
    "partitions",
    "promotions",
    "prompts",
    "rate",
    "ratio",
    "retries",
    "rows",
    "seconds",
    "skips",
    "state",
    "steps",
    "tasks",
    "threads",
    "tokens",
    "trials",
];

/// One metric as it is exported.
pub(crate) struct Metric {
    pub name: String,
    pub kind: String,
    help: String,
    labels: Vec<String>,
}

/// Returns every metric, by name.
pub(crate) fn all() -> Vec<Metric> {
    let text = Metrics::new().unwrap().render().unwrap();
    let mut metrics: Vec<Metric> = Vec::new();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, help) = rest.split_once(' ').unwrap();
            metrics.push(Metric { name: name.into(), kind: String::new(), help: help.into(), labels: vec![] });
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            metrics.last_mut().unwrap().kind = rest.split_once(' ').unwrap().1.into();
        } else if let Some((_, labels)) = line.split_once('{').filter(|(_, labels)| !labels.starts_with("le=")) {
            metrics.last_mut().unwrap().labels.push(labels.split('}').next().unwrap().into());
        }
    }
    metrics
}

#[test]
fn the_metrics_are_those_of_the_list() {
    let version = env!("CARGO_PKG_VERSION");
    let line = |m: &Metric| {
        let labels = m.labels.join(" ").replace(version, "VERSION");
        format!("{} | {} | {} | {labels}", m.name, m.kind, m.help).trim_end().trim_end_matches(" |").to_string() + "\n"
    };
    assert_golden("tests/golden/metrics.txt", &all().iter().map(line).collect::<String>());
}

#[test]
fn names_say_the_unit_and_only_counters_are_totals() {
    for Metric { name, kind, help, .. } in all() {
        let stem = name.strip_prefix("taod_").unwrap_or_else(|| panic!("{name} does not start with taod_"));
        assert_eq!(kind == "counter", name.ends_with("_total"), "{name} is a {kind}");
        let unit = stem.trim_end_matches("_total").rsplit('_').next().unwrap();
        assert!(UNITS.contains(&unit), "{name} ends with no known unit");
        assert!(help.ends_with('.'), "{name}: the help {help:?} is no sentence");
    }
}
