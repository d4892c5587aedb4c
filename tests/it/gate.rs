//! The gate's commands and refusals in the real processes, on a tiny random model.

use serde_json::Value;
use taod::table::Name;

use crate::harness::night::{Night, calls};
use crate::harness::{Outcome, taod_in};

/// A night that leaves its trial open.
fn open_trial() -> Night {
    let night = Night::new(&calls(120));
    night.worker(&[], &[]).code(3);
    night
}

fn gate(night: &Night, arguments: &[&str], environment: &[(&str, &str)]) -> Outcome {
    let config = night.config().display().to_string();
    let all: Vec<&str> = ["gate"].iter().chain(arguments).copied().chain(["--config", config.as_str()]).collect();
    taod_in(&night.state(), &all, environment)
}

/// Returns the state and the reason of each trial's last row.
fn ended(night: &Night) -> Vec<(String, String)> {
    let word = |row: &Value, key: &str| row[key].as_str().unwrap().to_string();
    let rows = night.rows(Name::Trials);
    rows.iter().filter(|r| r["state"] != "open").map(|r| (word(r, "state"), word(r, "reason"))).collect()
}

#[test]
fn a_trial_can_be_retold_drawn_and_made_again_and_says_what_was_erased() {
    let night = open_trial();
    let told = gate(&night, &["explain", "round-00001", "--svg", "evidence.svg"], &[]).code(0).out;
    assert!(told.contains("stays in trial") && told.contains("more prompts are needed"), "{told}");
    assert!(told.contains("guardrail behaviour") && told.contains("% of the gate's logged calls"), "{told}");
    let svg = std::fs::read_to_string(night.state().join("evidence.svg")).unwrap();
    assert!(svg.starts_with("<svg") && svg.contains("bar: ln W"), "{svg}");
    gate(&night, &["explain", "round-00009"], &[]).refused(&["round-00009", "the newest is round-00001"]);

    let replayed: Value = serde_json::from_str(&gate(&night, &["replay", "--json"], &[]).code(0).out).unwrap();
    let steps = night.rows(Name::GateSteps).len() as u64;
    assert_eq!((replayed["steps"].as_u64(), replayed["rescored"].as_u64()), (Some(steps), Some(steps)), "{replayed}");
    // Other scorers than the trial's cannot make it again.
    let other = gate(&night, &["replay"], &[("TAOD__REWARDS__LAMBDA", "0.25")]);
    other.refused(&["judged by other scorers"]);
    // Without its question a cluster is named, and the rest still agrees.
    let lines = night.round().join("dataset/gate.jsonl");
    let kept: Vec<String> = std::fs::read_to_string(&lines).unwrap().lines().skip(1).map(str::to_string).collect();
    std::fs::write(&lines, kept.join("\n")).unwrap();
    let replayed: Value = serde_json::from_str(&gate(&night, &["replay", "--json"], &[]).code(0).out).unwrap();
    assert_eq!(replayed["erased"].as_array().unwrap().len(), 1, "{replayed}");
    assert_eq!(replayed["rescored"].as_u64(), Some(steps - 1), "{replayed}");
}

#[test]
fn a_changed_scorer_voids_the_open_trial_and_says_so() {
    let night = open_trial();
    night.worker(&[], &[("TAOD__REWARDS__LAMBDA", "0.25"), ("TAOD__GATE__MAX_NIGHTS", "7")]);
    let ended = ended(&night);
    assert_eq!(ended[0].0, "void", "{ended:?}");
    assert_eq!(ended[0].1, "changed since the trial was opened: scorer");
}

#[test]
fn too_few_gate_prompts_open_no_trial_and_say_how_many_nights_are_missing() {
    let night = Night::new(&calls(30));
    let most = [("TAOD__GATE__MAX_NIGHTS", "2"), ("TAOD__GATE__GUARDRAILS__MIN_PROMPTS", "100")];
    night.worker(&[], &most).code(0);
    let outcome = night.json("outcome.json")["outcome"].clone();
    assert_eq!(outcome["result"], "skipped", "{outcome}");
    let reason = outcome["reason"].as_str().unwrap();
    assert!(
        reason.starts_with("too few gate prompts: ") && reason.contains("at least 100 within 2 nights"),
        "{reason}"
    );
    assert!(reason.ends_with(" nights of this traffic bring them"), "{reason}");
    assert!(night.rows(Name::Trials).is_empty() && !night.round().join("pass-1").exists());
}

#[test]
fn a_freeze_trains_and_judges_nothing_until_it_is_taken_back() {
    let night = Night::new(&calls(120));
    gate(&night, &["freeze", "--reason", "audit", "--by", "ann"], &[]).code(0);
    night.worker(&[], &[]).code(0);
    let outcome = night.json("outcome.json")["outcome"].clone();
    assert_eq!(outcome["result"], "skipped", "{outcome}");
    assert!(outcome["reason"].as_str().unwrap().contains("frozen by ann (audit)"), "{outcome}");
    assert!(night.rows(Name::Trials).is_empty());
    gate(&night, &["thaw", "--reason", "done", "--by", "ann"], &[]).code(0);
    night.worker(&[], &[("TAOD__REGISTRY__PROMOTION", "frozen")]).code(0);
    night.worker(&[], &[]).code(3);
    assert_eq!(night.rows(Name::Rounds).iter().filter(|row| row["state"] == "skipped").count(), 2);
}

#[test]
fn a_person_closes_an_open_trial_with_a_name_and_a_reason() {
    let night = open_trial();
    let trial = night.rows(Name::Trials)[0]["trial"].as_str().unwrap().to_string();
    gate(&night, &["approve", "--reason", "fine", "--by", "ann"], &[]).refused(&["no trial waits for approval"]);
    gate(&night, &["reject", &trial, "--reason", "tone", "--by", "ann"], &[]).code(0);
    assert_eq!(ended(&night), [("refused".to_string(), "rejected by ann: tone".to_string())]);
    gate(&night, &["reject", &trial, "--reason", "again", "--by", "ann"], &[]).refused(&["has ended (refused)"]);
    assert!(gate(&night, &["explain"], &[]).code(0).out.contains("is refused by a person"));
}

#[test]
fn simulations_print_tables_that_repeat() {
    let run = |arguments: &[&str]| taod_in(tempfile::tempdir().unwrap().path(), arguments, &[]).code(0).out;
    let years =
        ["gate", "simulate", "--scenario", "null", "--years", "2", "--nights", "20", "--prompts", "100", "--naive"];
    let table = run(&years);
    assert_eq!(table, run(&years));
    assert!(table.contains("| null | continuous | guardrails | fdr | 100 | 2 |"), "{table}");
    assert!(table.contains("| null | mean higher, fresh prompts |"), "{table}");
    let plan = run(&["gate", "plan", "--gain", "0.2", "--prompts", "60", "--trials", "4", "--mode", "strict"]);
    assert!(plan.contains("| +0.200 | continuous | guardrails | strict | 60 | 0 | 4 |"), "{plan}");
    let wrong = taod_in(tempfile::tempdir().unwrap().path(), &["gate", "simulate", "--scenario", "nil"], &[]);
    assert!(wrong.code == 64 && wrong.err.contains("one of null, boundary"), "{}", wrong.err);
}
