//! The dashboards ask only for metrics that exist, and keep the rules of Grafana's own linter.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use regex::Regex;
use serde_json::Value;

use crate::harness::{files, text};
use crate::metrics::all;

/// Units of Grafana that the panels may use.
const UNITS: &[&str] = &["Bps", "bytes", "cps", "none", "percentunit", "s", "sci", "short"];

static SELECTOR: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"\b(taod_\w+)(\{[^}]*\})?(\[[^\]]*\])?").unwrap());
static VARIABLE: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"\$(\w+)").unwrap());

/// What a query can stand on: every name that Prometheus will know, and whether it only grows.
fn series() -> BTreeMap<String, bool> {
    let mut series = BTreeMap::new();
    for metric in all() {
        match metric.kind.as_str() {
            "histogram" => {
                series.extend(["bucket", "sum", "count"].map(|part| (format!("{}_{part}", metric.name), true)));
            }
            kind => drop(series.insert(metric.name, kind == "counter")),
        }
    }
    series
}

/// Returns what is wrong with one query.
fn wrong_in_query(query: &str, series: &BTreeMap<String, bool>) -> Vec<String> {
    let mut wrong = Vec::new();
    for found in SELECTOR.captures_iter(query) {
        let (name, at) = (&found[1], found.get(0).unwrap().start());
        let Some(grows) = series.get(name) else {
            wrong.push(format!("{name} is no metric"));
            continue;
        };
        let matchers = found.get(2).map_or("", |matchers| matchers.as_str());
        for needed in [r#"job=~"$job""#, r#"instance=~"$instance""#] {
            if !matchers.contains(needed) {
                wrong.push(format!("{name} lacks {needed}"));
            }
        }
        let over_time = ["rate(", "irate(", "increase("].iter().any(|function| query[..at].ends_with(function));
        let range = found.get(3).map_or("", |range| range.as_str());
        if *grows != over_time {
            wrong.push(format!("{name}: counters stand in rate() or increase(), and nothing else does"));
        }
        if over_time && range != "[$__rate_interval]" {
            wrong.push(format!("{name} is taken over {range:?}, not [$__rate_interval]"));
        }
    }
    for found in
        VARIABLE.captures_iter(query).filter(|found| !["job", "instance", "__rate_interval"].contains(&&found[1]))
    {
        wrong.push(format!("${} is no variable", &found[1]));
    }
    wrong
}

/// Returns what is wrong with one panel.
fn wrong_in_panel(panel: &Value, series: &BTreeMap<String, bool>) -> Vec<String> {
    let mut wrong = Vec::new();
    for field in ["title", "description"] {
        if panel[field].as_str().unwrap_or_default().is_empty() {
            wrong.push(format!("has no {field}"));
        }
    }
    let defaults = &panel["fieldConfig"]["defaults"];
    if !UNITS.contains(&defaults["unit"].as_str().unwrap_or_default()) {
        wrong.push(format!("has the unit {}", defaults["unit"]));
    }
    if panel["datasource"]["uid"] != "$datasource" {
        wrong.push("does not use $datasource".into());
    }
    let targets = panel["targets"].as_array().map(Vec::as_slice).unwrap_or_default();
    if targets.is_empty() {
        wrong.push("asks for nothing".into());
    }
    for target in targets {
        if target["datasource"]["uid"] != "$datasource" {
            wrong.push("has a target that does not use $datasource".into());
        }
        let query = target["expr"].as_str().unwrap_or_default();
        if !query.contains("taod_") {
            wrong.push(format!("has the query {query:?}"));
        }
        wrong.extend(wrong_in_query(query, series));
    }
    wrong
}

/// Returns what is wrong with the variables at the top of a dashboard.
fn wrong_in_variables(dashboard: &Value) -> Vec<String> {
    let mut wrong = Vec::new();
    let list = dashboard["templating"]["list"].as_array().cloned().unwrap_or_default();
    let find = |name: &str| list.iter().find(|variable| variable["name"] == name).cloned().unwrap_or_default();
    let mut check = |name: &str, field: &str, expected: Value| {
        let found = find(name)[field].clone();
        if found != expected {
            wrong.push(format!("variable {name}: {field} is {found}, not {expected}"));
        }
    };
    for (field, expected) in [("type", "datasource"), ("query", "prometheus"), ("label", "Data source")] {
        check("datasource", field, expected.into());
    }
    for (name, label) in [("job", "Job"), ("instance", "Instance")] {
        check(name, "label", label.into());
        check(name, "multi", true.into());
        check(name, "includeAll", true.into());
        check(name, "allValue", ".+".into());
        check(name, "refresh", 2.into());
        check(name, "datasource", serde_json::json!({ "type": "prometheus", "uid": "$datasource" }));
    }
    for name in ["job", "instance"] {
        if !find(name)["query"]["query"].as_str().unwrap_or_default().starts_with("label_values(taod_") {
            wrong.push(format!("variable {name} is not made by label_values"));
        }
    }
    wrong
}

/// Returns what is wrong with the way from this dashboard to the others, and with its marks of promotions and rollbacks.
fn wrong_in_links(dashboard: &Value) -> Vec<String> {
    let mut wrong = Vec::new();
    let tagged = |value: &Value| value["tags"].as_array().is_some_and(|tags| tags.iter().any(|tag| tag == "taod"));
    let links = dashboard["links"].as_array().cloned().unwrap_or_default();
    if !links.iter().any(|link| link["type"] == "dashboards" && tagged(link)) || !tagged(dashboard) {
        wrong.push("no link leads to the others".into());
    }
    let marks = dashboard["annotations"]["list"].to_string();
    for outcome in ["promoted", "rolled_back"] {
        if !marks.contains(outcome) {
            wrong.push(format!("{outcome} is not marked"));
        }
    }
    wrong
}

fn wrong_in_dashboard(dashboard: &Value) -> Vec<String> {
    let series = series();
    let mut wrong = wrong_in_variables(dashboard);
    if dashboard["schemaVersion"] != 39 || dashboard["editable"] != false {
        wrong.push("schemaVersion must be 39 and editable false".into());
    }
    for field in ["uid", "title"] {
        if dashboard[field].as_str().unwrap_or_default().is_empty() {
            wrong.push(format!("has no {field}"));
        }
    }
    wrong.extend(wrong_in_links(dashboard));
    for annotation in dashboard["annotations"]["list"].as_array().into_iter().flatten() {
        let name = annotation["name"].as_str().unwrap_or("an annotation");
        if annotation["datasource"]["uid"] != "$datasource" {
            wrong.push(format!("{name} does not use $datasource"));
        }
        let query = annotation["expr"].as_str().unwrap_or_default();
        if query.is_empty() {
            wrong.push(format!("{name} asks for nothing"));
        }
        wrong.extend(wrong_in_query(query, &series).into_iter().map(|what| format!("{name}: {what}")));
    }
    let panels = dashboard["panels"].as_array().cloned().unwrap_or_default();
    for panel in panels.iter().filter(|panel| panel["type"] != "row") {
        let name = panel["title"].as_str().unwrap_or("a panel");
        wrong.extend(wrong_in_panel(panel, &series).into_iter().map(|what| format!("{name}: {what}")));
    }
    wrong
}

#[test]
fn every_dashboard_is_right() {
    let dashboards = files("dashboards", "json");
    assert!(!dashboards.is_empty());
    for path in dashboards {
        let dashboard: Value = serde_json::from_str(&text(&path)).unwrap();
        assert_eq!(wrong_in_dashboard(&dashboard), Vec::<String>::new(), "{path}");
    }
}

#[test]
fn every_metric_of_taod_is_on_a_dashboard() {
    let shown: String = files("dashboards", "json").iter().map(|path| text(path)).collect();
    // What the process costs beyond CPU, memory and open files is for who looks for it.
    let missing: Vec<String> = all()
        .into_iter()
        .map(|metric| metric.name)
        .filter(|name| !name.starts_with("taod_process_") && name != "taod_daemon_up_seconds_total")
        .filter(|name| !shown.contains(name.as_str()))
        .collect();
    assert_eq!(missing, Vec::<String>::new());
}

#[test]
fn each_dashboard_has_an_address_of_its_own() {
    let mut seen = std::collections::BTreeSet::new();
    for path in files("dashboards", "json") {
        let dashboard: Value = serde_json::from_str(&text(&path)).unwrap();
        let ids: Vec<i64> = dashboard["panels"].as_array().unwrap().iter().filter_map(|p| p["id"].as_i64()).collect();
        let different: std::collections::BTreeSet<_> = ids.iter().collect();
        assert_eq!(ids.len(), different.len(), "{path} gives two panels one id");
        assert!(path.ends_with(&format!("/{}.json", dashboard["uid"].as_str().unwrap())), "{path}");
        assert!(seen.insert(dashboard["title"].to_string()), "{path} has the title of another");
    }
    assert_eq!(seen.len(), 5);
}

#[test]
fn each_rule_bites() {
    let path = "dashboards/taod.json";
    let broken = |from: &str, to: &str| {
        let changed = text(path).replacen(from, to, 1);
        assert_ne!(changed, text(path), "{from} is not in {path}");
        assert!(!wrong_in_dashboard(&serde_json::from_str(&changed).unwrap()).is_empty(), "{from} -> {to}");
    };
    broken("taod_ingest_rows_total", "taod_ingest_row_total");
    broken("rate(taod_ingest_rows_total", "avg_over_time(taod_ingest_rows_total");
    broken("max(taod_ingest_lag_seconds", "rate(taod_ingest_lag_seconds");
    broken("[$__rate_interval]", "[5m]");
    broken(r#"instance=~\"$instance\""#, r#"instance=\"$instance\""#);
    broken(r#"job=~\"$job\""#, r#"job=~\"$jobs\""#);
    broken(r#""unit": "cps""#, r#""unit": "rows/s""#);
    broken(r#""label": "Data source""#, r#""label": "Datasource""#);
    broken(r#""allValue": ".+""#, r#""allValue": ".*""#);
    broken(r#""uid": "$datasource""#, r#""uid": "prometheus-1""#);
    broken(r#""editable": false"#, r#""editable": true"#);
    broken(r#""description": "Rows committed"#, r#""descriptions": "Rows committed"#);
    broken(r#"outcome=\"rolled_back\""#, r#"outcome=\"rolled\""#);
    broken("increase(taod_endpoint_promotions_total", "sum(taod_endpoint_promotions_total");
    broken(r#""type": "dashboards""#, r#""type": "link""#);
}
