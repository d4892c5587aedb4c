//! Prompts that a round makes: marked wherever they go, out of the gate, and gone with what they were made from.

use std::collections::BTreeSet;

use serde_json::Value;
use taod::dataset::Prompt;
use taod::table::Name;

use crate::harness::night::{MAKING, Night, calls};
use crate::harness::{Outcome, taod};
use crate::remote::Server;

fn lines(night: &Night, path: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(night.round().join(path)).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn run(night: &Night, arguments: &[&str]) -> Outcome {
    let config = night.config().display().to_string();
    taod(&[&["--config", &config], arguments].concat())
}

#[test]
fn made_prompts_train_are_marked_and_go_with_their_sources() {
    let planted = calls(120);
    let night = Night::new(&planted);
    night.set(MAKING);
    let told = run(&night, &["round", "--dry-run"]).code(0).out;
    assert!(told.contains("fewer than dataset.synthetic.below (22): up to"), "{told}");
    let outcome = night.worker(&[], &[]);
    assert!([0, 2, 3].contains(&outcome.code), "{}", outcome.err);

    let manifest = night.json("synthetic/manifest.json");
    let made: Vec<Prompt> = lines(&night, "synthetic/prompts.jsonl")
        .into_iter()
        .map(|line| serde_json::from_value(line).unwrap())
        .collect();
    assert!(!made.is_empty() && manifest["prompts"] == made.len(), "{manifest}");
    let train = night.prompts("train");
    for child in &made {
        let source = train.iter().find(|prompt| prompt.prompt_hash == child.sources[0]).unwrap();
        assert_eq!((&child.cluster, &child.workload), (&source.cluster, &source.workload));
    }
    let hashes: BTreeSet<&str> = made.iter().map(|child| child.prompt_hash.as_str()).collect();
    let is_child = |row: &Value| hashes.contains(row["prompt_hash"].as_str().unwrap());
    let rows = night.rows(Name::Candidates);
    let (ours, others): (Vec<&Value>, Vec<&Value>) = rows.iter().partition(|row| is_child(row));
    assert!(ours.len() >= made.len() && ours.iter().all(|row| row["synthetic"] == true && row["purpose"] == "train"));
    assert!(others.iter().all(|row| row.get("synthetic").is_none_or(|mark| *mark != true)));
    let steps = night.rows(Name::GateSteps);
    let clusters: BTreeSet<&str> = made.iter().map(|child| child.cluster.as_str()).collect();
    assert!(!steps.is_empty() && steps.iter().all(|row| !is_child(row)));
    assert!(steps.iter().all(|row| !clusters.contains(row["cluster"].as_str().unwrap())));
    let states: Vec<Value> = night.rows(Name::Rounds).into_iter().filter(|row| row["state"] == "synthetic").collect();
    assert_eq!(states.len(), 1);

    let shown = run(&night, &["dataset", "show"]).code(0).out;
    assert!(shown.contains(&format!("{:>10} synthetic: made from logged prompts", made.len())), "{shown}");
    let document: Value = serde_json::from_str(&run(&night, &["dataset", "show", "--json"]).code(0).out).unwrap();
    assert_eq!(document["synthetic"]["prompts"], made.len());
    let exported = run(&night, &["dataset", "export", "--split", "train", "--format", "jsonl"]).code(0).out;
    let exported: Vec<Value> = exported.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(exported.len(), train.len() + made.len());
    assert!(exported.iter().all(|row| row["synthetic"].as_bool() == Some(is_child(row))));

    // Of what one prompt was shown for, nothing is left once it is erased: neither children, nor their answers, nor the
    // questions that showed it.
    let source = &made[0].sources[0];
    let gone: Vec<&Prompt> = made.iter().filter(|child| child.sources.contains(source)).collect();
    let asks = lines(&night, "synthetic/wave-1/asks.jsonl");
    let shows = |ask: &&Value| ask["sources"].as_array().unwrap().iter().any(|shown| shown == source.as_str());
    let asked: BTreeSet<String> =
        asks.iter().filter(shows).map(|ask| ask["prompt_hash"].as_str().unwrap().to_owned()).collect();
    assert!(!asked.is_empty());
    let condition = format!("prompt_hash = '{source}'");
    let dry: Value = serde_json::from_str(
        &run(&night, &["table", "erase", "--where", &condition, "--dry-run", "--json"]).code(0).out,
    )
    .unwrap();
    let receipt: Value =
        serde_json::from_str(&run(&night, &["table", "erase", "--where", &condition, "--json"]).code(0).out).unwrap();
    let erased = |receipt: &Value| receipt["tables"]["candidates"]["rows"].as_u64().unwrap();
    assert_eq!(erased(&dry), erased(&receipt));
    let left = night.rows(Name::Candidates);
    for child in &gone {
        assert!(left.iter().all(|row| row["prompt_hash"] != child.prompt_hash.as_str()), "answers of a child are left");
    }
    let lost: BTreeSet<&str> = gone
        .iter()
        .map(|c| c.prompt_hash.as_str())
        .chain(asked.iter().map(String::as_str))
        .chain([source.as_str()])
        .collect();
    for (path, bytes) in crate::harness::night::bytes_below(&night.round()) {
        let text = String::from_utf8_lossy(&bytes);
        for line in text.lines().filter(|_| path.ends_with(".jsonl")) {
            let line: Value = serde_json::from_str(line).unwrap();
            let hash = line["prompt_hash"].as_str().unwrap_or_default();
            assert!(!lost.contains(hash), "{path} still holds {hash}");
        }
    }
    assert!(left.len() < rows.len() && gone.len() < made.len(), "others are left");
}

#[test]
fn a_night_with_too_few_prompts_even_with_made_ones_is_skipped_with_its_reason() {
    let night = Night::new(&calls(30));
    night.set("[dataset.synthetic]\nbelow = 50\n");
    let few = [("TAOD__DATASET__MIN_TRAIN_PROMPTS", "40")];
    night.worker(&[], &few).code(0);
    let outcome = night.json("outcome.json")["outcome"].clone();
    let reason = outcome["reason"].as_str().unwrap();
    assert!(reason.contains("made ones, fewer than min_train_prompts (40)"), "{reason}");
    assert!(!night.round().join("synthetic").exists(), "nothing is drawn where it cannot suffice");
}

#[test]
fn what_draws_the_candidates_writes_the_prompts() {
    let night = Night::new(&calls(120));
    night.set(MAKING);
    let server = Server::start();
    let remote =
        [("TAOD__CANDIDATES__REMOTE__URL", server.url.as_str()), ("TAOD__CANDIDATES__REMOTE__MODEL", "tiny-llama")];
    let outcome = night.worker(&[], &remote);
    assert!([0, 2, 3].contains(&outcome.code), "{}", outcome.err);
    assert!(night.json("synthetic/manifest.json")["prompts"].as_u64() > Some(0));
    let drawn = lines(&night, "synthetic/wave-1/chunk-00000.jsonl");
    assert!(!drawn.is_empty() && drawn.iter().all(|candidate| candidate["approximate"] == true), "{drawn:?}");
}
