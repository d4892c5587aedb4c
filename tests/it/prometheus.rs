//! Every query of the dashboards, asked of a real Prometheus that scrapes a real daemon.

use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::harness::site::{Running, Site, port, wait_for};
use crate::harness::{files, has, text};

/// Returns the title and the query of every panel and mark.
fn queries() -> Vec<(String, String)> {
    let mut found = Vec::new();
    for path in files("dashboards", "json") {
        let dashboard: Value = serde_json::from_str(&text(&path)).unwrap();
        let mut add = |name: &Value, query: &Value| {
            found.push((format!("{path}: {}", name.as_str().unwrap()), query.as_str().unwrap().to_owned()));
        };
        for panel in dashboard["panels"].as_array().unwrap() {
            for target in panel["targets"].as_array().into_iter().flatten() {
                add(&panel["title"], &target["expr"]);
            }
        }
        for mark in dashboard["annotations"]["list"].as_array().unwrap() {
            add(&mark["name"], &mark["expr"]);
        }
    }
    found
}

/// Asks Prometheus, and returns how many series answer.
async fn ask(port: u16, query: &str) -> Result<usize, String> {
    let address = format!("http://127.0.0.1:{port}/api/v1/query");
    let url = url::Url::parse_with_params(&address, &[("query", query)]).unwrap();
    let text = reqwest::get(url).await.unwrap().text().await.unwrap();
    // While it starts it answers with a text.
    let answer: Value = serde_json::from_str(&text).map_err(|_| text)?;
    match answer["status"].as_str() {
        Some("success") => Ok(answer["data"]["result"].as_array().unwrap().len()),
        _ => Err(answer["error"].to_string()),
    }
}

/// Waits until a query has an answer.
async fn until(port: u16, query: &str, site: &Site) {
    let started = Instant::now();
    while ask(port, query).await.unwrap_or(0) == 0 {
        assert!(started.elapsed() < Duration::from_secs(120), "{query} has no answer\n{}", site.log());
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Lets the daemon do something, as an operator of its interface.
async fn act(site: &Site, token: &str, what: &str, body: &Value) {
    let url = format!("http://127.0.0.1:{}/api/v1/actions/{what}", site.page);
    let asked = reqwest::Client::new().post(url).bearer_auth(token).json(body).send().await.unwrap();
    assert_eq!(asked.status(), 202, "{what}: {}", asked.text().await.unwrap());
}

#[tokio::test]
async fn every_query_of_the_dashboards_is_answered() {
    let there = Command::new("prometheus").arg("--version").output().is_ok();
    if !has("prometheus", there, "install Debian's package prometheus") {
        return;
    }
    let site = tokio::task::spawn_blocking(Site::open).await.unwrap();
    let (folder, own) = (site.folder(), port());
    let config = format!(
        "global: {{ scrape_interval: 500ms }}\nscrape_configs:\n  - job_name: taod\n    static_configs:\n      \
         - targets: [\"127.0.0.1:{}\"]\n",
        site.page
    );
    std::fs::write(folder.join("prometheus.yml"), config).unwrap();
    let mut command = Command::new("prometheus");
    command.arg(format!("--config.file={}", folder.join("prometheus.yml").display()));
    command.arg(format!("--storage.tsdb.path={}", folder.join("tsdb").display()));
    command.arg(format!("--web.listen-address=127.0.0.1:{own}"));
    let log = folder.join("prometheus.log");
    let _prometheus = Running::start(&mut command, &log);
    wait_for(own, &log);
    // Rates need some scrapes, and the measures of the gate one look of the daemon at its tables.
    until(own, "count_over_time(taod_daemon_up_seconds_total[1h]) >= 4 and taod_gate_open_trials > 0", &site).await;
    let token = site.token("olga", "operate");
    let adapter = site.night.adapters().remove(0).0;
    let version = adapter.split('/').next().unwrap();
    act(&site, &token, "promote", &json!({ "version": version, "reason": "a test" })).await;
    until(own, r#"increase(taod_endpoint_promotions_total{outcome="promoted"}[1h]) > 0"#, &site).await;
    act(&site, &token, "rollback", &json!({ "reason": "a test" })).await;
    until(own, r#"increase(taod_endpoint_promotions_total{outcome="rolled_back"}[1h]) > 0"#, &site).await;
    act(&site, &token, "run", &json!({ "reason": "a test" })).await;
    until(own, "taod_round_end_timestamp_seconds > 0", &site).await;
    let mut wrong = Vec::new();
    for (name, query) in queries() {
        let filled = query.replace("$__rate_interval", "1h").replace("$job", ".+").replace("$instance", ".+");
        match ask(own, &filled).await {
            Err(error) => wrong.push(format!("{name}: {filled}: {error}")),
            Ok(0) => wrong.push(format!("{name}: {filled}: no data")),
            Ok(_) => {}
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
