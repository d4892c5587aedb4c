use std::collections::BTreeMap;

use super::*;
use crate::gate::{Observation, Settings, State};

fn tables() -> (tempfile::TempDir, Tables) {
    let folder = tempfile::tempdir().unwrap();
    let tables = Tables::open(&folder.path().join("tables")).unwrap();
    (folder, tables)
}

fn opening(challenger: &str) -> Opening {
    Opening {
        budget_year: 2026,
        challenger: challenger.into(),
        challenger_sha256: format!("sha-{challenger}"),
        incumbent: "base".into(),
        incumbent_sha256: "sha-base".into(),
        scorer_epoch: "scorers".into(),
        decoding: "decoding".into(),
        lengths: BTreeMap::new(),
        suites: Default::default(),
        seed: 1,
    }
}

fn usage(trial: &str, clusters: &[&str]) -> Vec<UsageRow> {
    let row = |(step, cluster): (u64, &&str)| UsageRow {
        cluster: cluster.to_string(),
        trial: trial.to_string(),
        night: 1,
        step,
    };
    (1..).zip(clusters).map(row).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_is_reserved_for_one_trial_whoever_asks_at_once() {
    let (_folder, tables) = tables();
    reserve(&tables, &usage("a", &["x", "y"])).await.unwrap();
    reserve(&tables, &usage("a", &["x", "y"])).await.unwrap();
    let error = reserve(&tables, &usage("b", &["z", "y"])).await.unwrap_err();
    assert!(
        matches!(&error, RoundError::Gate(GateError::Reused { cluster, trial }) if cluster == "y" && trial == "a"),
        "{error}"
    );
    // Two that ask for the same at the same time: one of them gets it.
    for round in 0..4 {
        let cluster = format!("c{round}");
        let (left, right) = (usage("a", &["only-a", &cluster]), usage("b", &["only-b", &cluster]));
        let (left, right) = (
            left.into_iter().filter(|row| row.step == 2).collect::<Vec<_>>(),
            right.into_iter().filter(|row| row.step == 2).collect::<Vec<_>>(),
        );
        let both = tokio::join!(reserve(&tables, &left), reserve(&tables, &right));
        assert!(both.0.is_ok() != both.1.is_ok(), "{both:?}");
    }
    let rows: Vec<UsageRow> = read(&tables, Name::GateUsage).await.unwrap();
    let mut clusters: Vec<&str> = rows.iter().map(|row| row.cluster.as_str()).collect();
    clusters.sort_unstable();
    assert_eq!(clusters, ["c0", "c1", "c2", "c3", "x", "y"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_daemons_that_open_a_trial_one_finds_the_other() {
    let (_folder, tables) = tables();
    let settings = Settings::default();
    let (a, b) = (opening("a"), opening("b"));
    let (a, b) = tokio::join!(open_trial(&tables, &a, &settings), open_trial(&tables, &b, &settings));
    let (won, lost) = if a.is_ok() { (a, b) } else { (b, a) };
    let won = won.unwrap();
    assert!(matches!(&lost, Err(RoundError::Gate(GateError::StillOpen(trial))) if trial == won.id()), "{lost:?}");
    assert_eq!(read::<TrialRow>(&tables, Name::Trials).await.unwrap().len(), 1);
    assert_eq!(won.facts().number, 1);
}

fn measured(cluster: &str) -> Observation {
    let step: StepRow = serde_json::from_value(serde_json::json!({
        "trial": "", "step": 0, "night": 0, "cluster": cluster, "prompt_hash": "p", "traffic": 1, "d": 0.0, "lambda": 0.0,
        "ln_wealth": 0.0, "new_score": 0.5, "incumbent_score": 0.5, "new_words": 1.0, "incumbent_words": 1.0,
        "new_chars": 1.0, "incumbent_chars": 1.0,
    }))
    .unwrap();
    step.observation()
}

#[tokio::test(flavor = "multi_thread")]
async fn two_that_drive_one_trial_are_told() {
    let (_folder, tables) = tables();
    let mut first = open_trial(&tables, &opening("a"), &Settings::default()).await.unwrap();
    let mut second = first.clone();
    let contended = |error: RoundError| matches!(error, RoundError::Gate(GateError::Contended { .. }));
    let clusters = |names: &[&str]| names.iter().map(|name| name.to_string()).collect::<Vec<_>>();
    let night = first.begin_night(clusters(&["x", "y"]), 0, 1).unwrap();
    store_trial(&tables, &night).await.unwrap();
    // The same night with the same order is a repetition; with other prompts it is somebody else's.
    store_trial(&tables, &night).await.unwrap();
    let other = second.begin_night(clusters(&["x", "z"]), 0, 1).unwrap();
    assert!(contended(store_trial(&tables, &other).await.unwrap_err()));
    let block: Vec<Observation> = first.next_block().unwrap().clusters.iter().map(|c| measured(c)).collect();
    let steps = first.absorb(block).unwrap();
    store_steps(&tables, first.id(), steps.clone()).await.unwrap();
    assert!(contended(store_steps(&tables, first.id(), steps).await.unwrap_err()));
    // A trial ends once: by a person here, and not by the gate a moment later.
    reject(&tables, first.id(), "rejected by ann: tone").await.unwrap();
    let late = first.close(&gate::Decision::Futile, 9).unwrap();
    assert!(contended(store_trial(&tables, &late).await.unwrap_err()));
    let rows: Vec<TrialRow> = read(&tables, Name::Trials).await.unwrap();
    assert_eq!(rows.iter().filter(|row| row.state != State::Open).count(), 1);
}
