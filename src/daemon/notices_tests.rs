use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Mutex;

use axum::Router;
use axum::http::StatusCode;
use serde_json::Value;

use super::*;
use crate::gate::Opening;

/// A webhook that keeps what it is sent and answers with a status.
async fn hook(folder: &Path, status: StatusCode) -> (Destination, Arc<Mutex<Vec<Value>>>) {
    let sent = Arc::new(Mutex::new(Vec::new()));
    let kept = sent.clone();
    let router = Router::new().fallback(async move |body: String| {
        kept.lock().unwrap().push(serde_json::from_str(&body).unwrap());
        status
    });
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    std::fs::write(folder.join("url"), format!("http://{}/", listener.local_addr().unwrap())).unwrap();
    tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    let text = format!(
        "name = 'ops'\nkind = 'webhook'\nurl_file = '{}'\nbody = 'notice'\nretries = 0\n\
         events = ['promotion', 'refusal', 'rollback', 'failure', 'freeze']",
        folder.join("url").display()
    );
    (toml::from_str(&text).unwrap(), sent)
}

struct Site {
    folder: tempfile::TempDir,
    config: Config,
    tables: Tables,
    metrics: Metrics,
}

fn site() -> Site {
    let folder = tempfile::tempdir().unwrap();
    let mut config = Config::default();
    config.state.dir = folder.path().join("var");
    config.endpoint.stable_name = "production".into();
    let tables = config.state.open_tables().unwrap();
    Site { folder, config, tables, metrics: Metrics::new().unwrap() }
}

impl Site {
    /// A teller as a start of the daemon makes it.
    fn teller<'a>(&'a self, destination: &'a Destination) -> Teller<'a> {
        let paths = Paths::new(&self.config.state.dir);
        let Site { config, metrics, tables, .. } = self;
        let config = Arc::new(config.clone());
        Teller { config, metrics, tables, paths, destination, trials_as_of: None }
    }

    fn registry(&self) -> Registry {
        Registry::open(&Paths::new(&self.config.state.dir).registry(), &self.config.registry).unwrap()
    }

    /// Writes a finished round.
    fn round(&self, id: &str, outcome: Outcome) {
        let folder = Paths::new(&self.config.state.dir).round(id);
        durable::create_folder(&folder).unwrap();
        durable::write_json(&folder.join("plan.json"), &0).unwrap();
        let verdict = Verdict { round: id.into(), outcome, stages: vec![] };
        durable::write_json(&folder.join("outcome.json"), &verdict).unwrap();
    }

    fn history(&self, line: &str) {
        let path = Paths::new(&self.config.state.dir).registry().join("history.jsonl");
        let old = std::fs::read_to_string(&path).unwrap_or_default();
        std::fs::write(&path, format!("{old}{line}\n")).unwrap();
    }
}

fn texts(sent: &Mutex<Vec<Value>>) -> Vec<String> {
    sent.lock()
        .unwrap()
        .iter()
        .map(|told| format!("{} {}", told["event"].as_str().unwrap(), told["text"].as_str().unwrap()))
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn each_thing_is_told_once_also_what_happened_while_the_daemon_was_down() {
    let site = site();
    let (ops, sent) = hook(site.folder.path(), StatusCode::OK).await;
    site.registry().freeze("before anybody was to be told", "anna", 1).unwrap();
    site.teller(&ops).catch_up().await.unwrap();
    assert_eq!(texts(&sent), Vec::<String>::new(), "what was before is not told");

    site.registry().thaw("it is over", "berta", 2).unwrap();
    let mut running = site.teller(&ops);
    running.catch_up().await.unwrap();
    running.catch_up().await.unwrap();
    assert_eq!(texts(&sent), ["freeze the freeze of promotions was lifted by berta: it is over"]);

    // The daemon is down; the command line changes what is served, and a round by hand gives up.
    drop(running);
    sent.lock().unwrap().clear();
    site.history(r#"{"time_us":3,"event":"promoted","promotion":"p","from":"base","to":"taod-1","trial":"2026-1"}"#);
    site.history(r#"{"time_us":4,"event":"registered","version":"taod-2","sha256":"00"}"#);
    site.history(
        r#"{"time_us":5,"event":"rolled_back","promotion":"q","from":"taod-1","to":"base","reason":"it fell"}"#,
    );
    site.history(r#"{"time_us":6,"event":"aborted","promotion":"r","to":"taod-2","reason":"a replica is down"}"#);
    site.round("round-00001", Outcome::Skipped { reason: "few".into() });
    site.round("round-00002", Outcome::Failed { reason: "it diverged".into() });
    let mut running = site.teller(&ops);
    running.catch_up().await.unwrap();
    running.catch_up().await.unwrap();
    assert_eq!(
        texts(&sent),
        [
            "promotion taod-1 is served in place of base: its trial passed",
            "rollback taod-1 was rolled back to base: it fell",
            "failure the change to taod-2 was undone: a replica is down",
            "failure round-00002 gave training up: it diverged",
        ]
    );
    let first = sent.lock().unwrap()[0].clone();
    assert_eq!(
        (&first["version"], &first["source"], &first["endpoint"]),
        (&"taod-1".into(), &"2026-1".into(), &"production".into())
    );
    assert_eq!(site.metrics.daemon.notices.get(Delivery::Delivered).get(), 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_trial_is_told_with_its_reason_also_where_the_night_went_on() {
    let site = site();
    let (ops, sent) = hook(site.folder.path(), StatusCode::OK).await;
    site.teller(&ops).catch_up().await.unwrap();
    let opening = Opening {
        budget_year: 2026,
        challenger: "taod-3".into(),
        challenger_sha256: "s3".into(),
        incumbent: "base".into(),
        incumbent_sha256: "sb".into(),
        scorer_epoch: "scorers".into(),
        decoding: "decoding".into(),
        lengths: BTreeMap::new(),
        suites: Default::default(),
        seed: 1,
    };
    let trial = book::open_trial(&site.tables, &opening, &site.config.gate).await.unwrap();
    let id = trial.facts().trial.clone();
    book::reject(&site.tables, &id, "answers grew too long").await.unwrap();
    // The night went on to another trial, so that its verdict says nothing of the refusal.
    let open = Outcome::Open { trial: "next".into(), challenger: "taod-4".into(), reason: "too few".into() };
    site.round("round-00001", open);
    let mut running = site.teller(&ops);
    running.catch_up().await.unwrap();
    running.catch_up().await.unwrap();
    let told = texts(&sent);
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(
        told[0].starts_with("refusal taod-3 is not promoted: its trial ended refused after 0 prompts: "),
        "{told:?}"
    );
    assert!(told[0].contains("answers grew too long"), "{told:?}");
    assert_eq!(sent.lock().unwrap()[0]["source"], id);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_destination_gets_what_it_wants_and_one_that_fails_is_counted_and_left() {
    let site = site();
    let (ops, sent) = hook(site.folder.path(), StatusCode::NOT_FOUND).await;
    let ops = Destination { events: vec![Event::Freeze], ..ops };
    site.teller(&ops).catch_up().await.unwrap();
    site.history(r#"{"time_us":3,"event":"promoted","promotion":"p","from":"base","to":"taod-1","trial":"2026-1"}"#);
    site.registry().freeze("holidays", "anna", 4).unwrap();
    let mut running = site.teller(&ops);
    running.catch_up().await.unwrap();
    running.catch_up().await.unwrap();
    assert_eq!(texts(&sent), ["freeze promotions are frozen by anna: holidays"]);
    assert_eq!(site.metrics.daemon.notices.get(Delivery::Failed).get(), 1);
    assert_eq!(site.metrics.daemon.notices.get(Delivery::Delivered).get(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_night_without_a_verdict_and_one_that_waits_for_a_word_are_told() {
    let mut site = site();
    site.config.registry.promotion = registry::Promotion::Approval;
    let (ops, sent) = hook(site.folder.path(), StatusCode::OK).await;
    site.teller(&ops).catch_up().await.unwrap();
    let passed = Outcome::Promote { trial: "t".into(), challenger: "taod-5".into(), reason: "it is better".into() };
    site.round("round-00001", passed);
    let failures = Failures::default();
    let (stop, stopped) = channel::channel(false);
    let listening = failures.0.subscribe();
    failures.night(&site.config, &anyhow::anyhow!("exit status: 137").context("the round's process ended"));
    let until_both = async {
        while sent.lock().unwrap().len() < 2 {
            tokio::task::yield_now().await;
        }
        stop.send(true).unwrap();
    };
    let in_force = || Arc::new(site.config.clone());
    tokio::join!(site.teller(&ops).keep(&in_force, listening, stopped), until_both);
    assert_eq!(
        texts(&sent),
        [
            "promotion taod-5 passed its trial and waits for `taod gate approve` or `taod gate reject`",
            "failure the round failed, and the next one resumes it: the round's process ended: exit status: 137",
        ]
    );
}
