//! A whole night in the round's real process, on a tiny random model: the same bytes whatever kills it on the way,
//! nothing of a held-out prompt in what trains, and no content of the log that fails it.

use std::collections::BTreeSet;

use serde_json::Value;
use taod::engine::Model;
use taod::round::Paths;
use taod::table::Name;

use crate::harness::night::{Call, GENEROUS, KILLED, MAKING, Night, bytes_below, calls, marker, model, promotable};
use crate::harness::{Outcome, files, text};

/// Calls of an ordinary night: enough for three chunks of candidates and three blocks of the gate.
const CALLS: usize = 120;

/// Where a round's tables hold what it decided.
const WRITTEN: [Name; 7] =
    [Name::Splits, Name::Rounds, Name::Candidates, Name::TuningSteps, Name::Trials, Name::GateUsage, Name::GateSteps];

/// Returns a night that was run to its end without any disturbance.
fn undisturbed() -> Night {
    let night = Night::new(&calls(CALLS));
    decided(night.worker(&[], &[]));
    night
}

/// Checks that a round ended with a verdict of the gate: promote, refused or open.
fn decided(outcome: Outcome) {
    assert!([0, 2, 3].contains(&outcome.code), "exit code {}:\n{}", outcome.code, outcome.err);
}

/// Returns what a table says, whatever the order of the rows, but not when it was said.
fn said(night: &Night, name: Name) -> Vec<String> {
    let mut rows = night.rows(name);
    for row in &mut rows {
        let row = row.as_object_mut().unwrap();
        let timed = ["time", "time_us"];
        timed.iter().for_each(|key| drop(row.remove(*key)));
        if let Some(detail) = row.get_mut("detail").and_then(Value::as_object_mut) {
            timed.iter().for_each(|key| drop(detail.remove(*key)));
        }
        // How long a stage took, and of the gate only what was judged after the last kill.
        if name == Name::Rounds {
            row.remove("stages");
            row["detail"].as_object_mut().unwrap().remove("stages");
        }
    }
    let mut said: Vec<String> = rows.iter().map(Value::to_string).collect();
    said.sort();
    said
}

fn assert_same(night: &Night, whole: &Night, what: &str) {
    assert!(night.adapters() == whole.adapters(), "{what}: the adapter has other bytes");
    for name in WRITTEN {
        let (ours, theirs) = (said(night, name), said(whole, name));
        assert_eq!(ours.len(), theirs.len(), "{what}: rows of {}", name.spec().name);
        for (ours, theirs) in ours.iter().zip(&theirs) {
            assert_eq!(ours, theirs, "{what}: a row of {}", name.spec().name);
        }
    }
    assert_eq!(night.json("outcome.json")["outcome"], whole.json("outcome.json")["outcome"], "{what}");
    assert_eq!(stages(night), stages(whole), "{what}");
}

/// Returns what each stage before the gate did, but not how long it took.
fn stages(night: &Night) -> Vec<String> {
    let verdict = night.json("outcome.json");
    let stages = verdict["stages"].as_array().unwrap().iter();
    let before_gate = stages.filter(|stage| !stage["stage"].as_str().unwrap().starts_with("gate"));
    let said: Vec<_> = before_gate.map(|s| format!("{} {} {}", s["stage"], s["rows"], s["tokens"])).collect();
    assert!(said.len() >= 7, "{said:?}");
    said
}

#[test]
fn a_round_ends_with_a_verdict_and_the_same_seed_gives_the_same_bytes() {
    let first = Night::new(&calls(CALLS));
    let outcome = first.worker(&[], &[]);
    // What it tells its parent, which shows it as metrics: each step as it is made. An empty line is a sign of life.
    let told = outcome.out.lines().filter(|line| !line.is_empty());
    let told: Vec<Value> = told.map(|line| serde_json::from_str(line).unwrap()).collect();
    decided(outcome);
    let total = |rows: &[Value]| rows.iter().map(|row| row["tokens"].as_u64().unwrap()).sum::<u64>();
    let steps = first.rows(Name::TuningSteps);
    assert_eq!((told.len(), total(&told)), (steps.len(), total(&steps)));
    assert!(
        told.iter().all(|line| line["measure"] == "step" && line["learning_rate"].as_f64() > Some(0.0)),
        "{told:?}"
    );
    assert_eq!(first.adapters().len(), 2, "a config and weights");
    for name in WRITTEN {
        assert!(!first.rows(name).is_empty(), "{} is empty", name.spec().name);
    }
    // Training really changed something: the divergence from the base is not nothing.
    for pass in 1..=2 {
        let outcome = first.json(&format!("pass-{pass}/adapter/outcome.json"));
        assert!(outcome["kl_sample"].as_f64().unwrap() > 0.0, "pass {pass}: {outcome}");
        // Each of its steps is a row, with the same numbers.
        let rows: Vec<Value> = first.rows(Name::TuningSteps);
        let mut rows: Vec<&Value> = rows.iter().filter(|row| row["iteration"] == pass).collect();
        rows.sort_by_key(|row| row["step"].as_i64());
        let steps = outcome["steps"].as_array().unwrap();
        assert_eq!(rows.len(), steps.len(), "pass {pass}");
        let same = |row: &&Value, step: &Value| {
            row["loss"].as_f64().map(|l| l as f32) == step["loss"].as_f64().map(|l| l as f32)
        };
        assert!(rows.iter().zip(steps).all(|(row, step)| same(row, step)), "{rows:?} {steps:?}");
    }
    let steps = first.rows(Name::GateSteps);
    assert!(steps.len() > 32, "only {} steps: less than three blocks", steps.len());
    let clusters: BTreeSet<String> = steps.iter().map(|step| step["cluster"].to_string()).collect();
    assert_eq!(clusters.len(), steps.len(), "a gate cluster was used twice");
    assert_eq!(first.rows(Name::GateUsage).len(), steps.len());
    let states: Vec<Value> = first.rows(Name::Rounds).iter().map(|row| row["state"].clone()).collect();
    let result = first.json("outcome.json")["outcome"]["result"].clone();
    for state in ["planned", "dataset", "registered", result.as_str().unwrap()] {
        assert_eq!(states.iter().filter(|s| *s == state).count(), 1, "{state} in {states:?}");
    }

    assert_same(&undisturbed(), &first, "another folder");
    let other = Night::new(&calls(CALLS));
    decided(other.worker(&[], &[("TAOD__ROUND__SEED", "8")]));
    assert!(other.adapters() != first.adapters(), "another seed gave the same adapter");
}

/// Returns the names of all crash points in the sources, with a number where the source has `{pass}`.
fn crash_points() -> BTreeSet<String> {
    let mut points = BTreeSet::new();
    for source in files("src", "rs").iter().map(|path| text(path)) {
        for call in source.split("crash::at(").skip(1) {
            let argument = call.trim_start_matches("&format!(");
            let Some((name, _)) = argument.strip_prefix('"').and_then(|rest| rest.split_once('"')) else { continue };
            points.extend([1, 2].map(|pass| name.replace("{pass}", &pass.to_string())));
        }
    }
    points
}

#[test]
fn a_round_that_is_killed_at_any_stage_resumes_to_the_same_bytes() {
    let night = || {
        let night = Night::new(&calls(CALLS));
        night.set(MAKING);
        night
    };
    let whole = night();
    decided(whole.worker(&[], &[]));
    assert!(whole.json("synthetic/manifest.json")["prompts"].as_u64() > Some(0), "no prompt was made");
    let made = |night: &Night| bytes_below(&night.round().join("synthetic"));
    let points = crash_points();
    assert!(points.len() > 18 && points.contains("adapter-2") && points.contains("gate-block"), "{points:?}");
    for point in &points {
        let night = night();
        night.kill_at(point, &[]);
        decided(night.worker(&["--resume"], &[]));
        assert_same(&night, &whole, point);
        assert!(made(&night) == made(&whole), "{point}: other prompts were made");
    }
}

#[test]
fn a_round_that_is_killed_after_every_piece_gets_to_the_same_end() {
    let whole = undisturbed();
    let night = Night::new(&calls(CALLS));
    night.kill_at("dataset", &[]);
    // These come several times in a round: each run does one more piece and is killed again.
    let pieces = [("TAOD_CRASH_AT", "candidates-chunk,adapter-checkpoint,gate-block")];
    let mut kills = 0;
    let ended = loop {
        let outcome = night.worker(&["--resume"], &pieces);
        match outcome.code {
            KILLED if kills < 100 => kills += 1,
            _ => break outcome,
        }
    };
    decided(ended);
    // Three chunks and two checkpoints in each of two passes, and three blocks.
    assert!(kills >= 13, "only {kills} kills");
    assert_same(&night, &whole, "killed often");
}

/// An erasure stops a round for good; what its gate had reserved and not judged is used up, and the trial goes on.
#[test]
fn a_night_that_is_stopped_for_good_between_a_reservation_and_its_judgement_voids_no_trial() {
    let night = Night::new(&calls(CALLS));
    night.kill_at("gate-reserved", &[]);
    std::fs::write(night.round().join("erased.json"), r#"{"receipts": []}"#).unwrap();
    decided(night.worker(&[], &[]));
    let states: Vec<String> =
        night.rows(Name::Trials).iter().map(|row| row["state"].as_str().unwrap().to_owned()).collect();
    assert!(!states.is_empty() && states.iter().all(|state| state == "open"), "{states:?}");
    let clusters = |name| -> Vec<String> {
        night.rows(name).iter().map(|row| row["cluster"].as_str().unwrap().to_owned()).collect()
    };
    let (reserved, judged) = (clusters(Name::GateUsage), clusters(Name::GateSteps));
    assert!(!judged.is_empty() && judged.len() + 16 == reserved.len(), "{} of {}", judged.len(), reserved.len());
    assert_eq!(reserved.iter().collect::<BTreeSet<_>>().len(), reserved.len(), "a cluster was reserved twice");
}

/// Returns the folders and files that training leaves, with their bytes.
fn trained(night: &Night) -> Vec<(String, Vec<u8>)> {
    let mut files = bytes_below(&night.state().join("registry"));
    for pass in 1..=2 {
        let folder = format!("pass-{pass}");
        let below = bytes_below(&night.round().join(&folder)).into_iter();
        files.extend(below.map(|(path, bytes)| (format!("{folder}/{path}"), bytes)));
    }
    files
}

fn holds(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|window| window == needle)
}

#[test]
fn nothing_of_a_held_out_prompt_is_in_what_trains() {
    let planted = calls(CALLS);
    let night = Night::new(&planted);
    let outcome = night.worker(&[], &[]);
    let model = Model::load(&model().display().to_string()).unwrap();
    let log = outcome.err.clone();
    decided(outcome);

    // A prompt can be there as text, as its hash, or as token ids in JSON or in a tensor.
    let forms = |prompt: &taod::dataset::Prompt| -> [Vec<u8>; 4] {
        let text = prompt.messages[0].plain_text();
        let found = (0..CALLS).map(marker).find(|marker| text.contains(marker)).unwrap();
        let ids = model.prompt_ids(&prompt.messages, None).unwrap();
        let json = serde_json::to_string(&ids).unwrap();
        let bytes = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
        [found.into_bytes(), prompt.prompt_hash.clone().into_bytes(), json.into_bytes(), bytes]
    };
    let (train, held_out) = (night.prompts("train"), [night.prompts("gate"), night.prompts("audit")].concat());
    assert!(train.len() > 20 && night.prompts("gate").len() > 20 && night.prompts("audit").len() > 10);
    let files = trained(&night);
    let rows: Vec<Value> = night.rows(Name::Candidates).into_iter().filter(|row| row["purpose"] == "train").collect();
    let rows = serde_json::to_vec(&rows).unwrap();
    for prompt in &held_out {
        for needle in forms(prompt) {
            let leak = files.iter().find(|(_, bytes)| holds(bytes, &needle));
            assert!(leak.is_none(), "{} holds {}", leak.unwrap().0, String::from_utf8_lossy(&needle));
            assert!(!holds(&rows, &needle), "candidates hold {}", String::from_utf8_lossy(&needle));
        }
    }
    // The search works: what trains is found the same way, each prompt by its hash and its ids.
    for prompt in &train {
        let [marker, hash, ids, _] = forms(prompt);
        assert!(holds(&rows, &hash) && [&hash, &ids].iter().all(|n| files.iter().any(|(_, b)| holds(b, n))));
        let list = std::fs::read(night.round().join("dataset/train.jsonl")).unwrap();
        assert!(holds(&list, &marker));
    }
    // Decisions are numbers and hashes: no prompt's text is in a table but that of the log, nor in what was logged.
    let markers: Vec<String> = (0..CALLS).map(marker).collect();
    for name in WRITTEN {
        let rows = serde_json::to_string(&night.rows(name)).unwrap();
        assert!(markers.iter().all(|marker| !rows.contains(marker)), "{} holds text of the log", name.spec().name);
    }
    assert!(markers.iter().all(|marker| !log.contains(marker)), "{log}");
}

/// Runs a night that must be skipped, and returns the reason.
fn skipped(calls: &[Call]) -> (Night, String) {
    let night = Night::new(calls);
    night.worker(&[], &[]).code(0);
    let outcome = night.json("outcome.json")["outcome"].clone();
    assert_eq!(outcome["result"], "skipped");
    let last = night.rows(Name::Rounds).into_iter().find(|row| row["state"] == "skipped").unwrap();
    assert_eq!(last["detail"]["outcome"], outcome);
    assert!(night.rows(Name::Trials).is_empty());
    let reason = outcome["reason"].as_str().unwrap().to_string();
    (night, reason)
}

/// Returns a call that is longer than the model's context.
fn long(i: usize) -> Call {
    let words: Vec<String> = (0..60).map(|word| marker(1000 + 60 * i + word)).collect();
    Call::new("short", words.join(" "))
}

#[test]
fn a_night_without_anything_to_train_on_is_skipped_with_its_reason() {
    let (_, reason) = skipped(&[]);
    assert!(reason.contains("0 training prompts, fewer than min_train_prompts (8)"), "{reason}");

    let mut unruled = calls(40);
    unruled.iter_mut().for_each(|call| call.workload = Some("free".to_string()));
    unruled[0].workload = Some("unknown to the config".to_string());
    unruled[1].workload = None;
    let (night, reason) = skipped(&unruled);
    assert!(reason.contains("0 training prompts"), "{reason}");
    assert_eq!(night.json("dataset/manifest.json")["excluded"]["no_rules"], 40);

    let all_long: Vec<Call> = (0..40).map(long).collect();
    let (night, reason) = skipped(&all_long);
    assert!(reason.contains("context"), "{reason}");
    let trained = night.prompts("train").len();
    assert!(trained >= 8, "{trained}");
    assert_eq!(night.json("pass-1/candidates/manifest.json")["too_long"], trained);
}

#[test]
fn prompts_that_the_model_cannot_read_are_left_out_and_counted() {
    let mut mixed = calls(100);
    mixed.extend((0..20).map(long));
    mixed.extend(calls(140).split_off(120).into_iter().map(|call| Call { has_image: true, ..call }));
    let night = Night::new(&mixed);
    decided(night.worker(&[], &[]));
    let is_long = |prompt: &&taod::dataset::Prompt| prompt.messages[0].plain_text().len() > 512;
    let (train, gate) = (night.prompts("train"), night.prompts("gate"));
    let (long_train, long_gate) = (train.iter().filter(is_long).count(), gate.iter().filter(is_long).count());
    assert!(long_train > 0 && long_gate > 0, "{long_train} and {long_gate}");
    let is_image = |prompt: &&taod::dataset::Prompt| matches!(prompt.messages[0].content, taod::json::Value::Array(_));
    let (image_train, image_gate) = (train.iter().filter(is_image).count(), gate.iter().filter(is_image).count());
    assert!(image_train > 0 && image_gate > 0, "{image_train} and {image_gate}");
    let left_out = long_train + image_train;
    for pass in 1..=2 {
        let manifest = night.json(&format!("pass-{pass}/candidates/manifest.json"));
        assert_eq!(manifest["too_long"], left_out, "{manifest}");
        assert_eq!(manifest["candidates"], 4 * (train.len() - left_out), "{manifest}");
    }
    let steps = night.rows(Name::GateSteps);
    assert_eq!(steps.iter().filter(|step| step["suite"].is_null()).count(), gate.len() - long_gate - image_gate);
    let trial = steps[0]["trial"].as_str().unwrap();
    let tonight = night.json(&format!("tonight-{trial}.json"));
    assert_eq!(tonight["left_out"]["too_long"], long_gate, "{tonight}");
    assert_eq!(tonight["left_out"]["unreadable"], image_gate, "{tonight}");
}

#[test]
fn a_second_round_is_refused_while_one_runs() {
    let night = Night::new(&[]);
    let held = Paths::new(night.state()).lock().unwrap();
    night.worker(&[], &[]).refused(&["another round is running", "round.lock"]);
    assert!(!night.state().join("rounds").exists(), "the refused round left something");
    drop(held);
    night.worker(&[], &[]).code(0);
}

#[test]
fn resume_needs_an_unfinished_round_under_the_conditions_it_was_begun_with() {
    let whole = undisturbed();
    whole.worker(&["--resume"], &[]).refused(&["no unfinished round to resume", "taod round --once"]);

    let night = Night::new(&calls(CALLS));
    night.worker(&["--resume"], &[]).refused(&["no unfinished round to resume"]);
    night.kill_at("rewards-1", &[]);
    let before = bytes_below(&night.round());
    let changes = [
        ("TAOD__TUNING__LEARNING_RATE", "0.02", "settings"),
        ("TAOD__DECODING__TEMPERATURE", "0.9", "settings"),
        ("TAOD__ROUND__SEED", "8", "seed"),
        ("RAYON_NUM_THREADS", "3", "number of threads"),
    ];
    for (key, value, what) in changes {
        night.worker(&["--resume"], &[(key, value)]).refused(&["round-00001", what, "--allow-drift"]);
        night.worker(&[], &[(key, value)]).refused(&[what]);
    }
    night.worker(&["--resume", "--control", "same-adapter"], &[]).refused(&["control", "--allow-drift"]);
    assert!(bytes_below(&night.round()) == before, "a refusal changed the round");

    decided(night.worker(&["--resume", "--allow-drift"], &[("TAOD__TUNING__LEARNING_RATE", "0.02")]));
    assert!(night.adapters() != whole.adapters(), "the drift did not reach training");
    assert_eq!(night.json("plan.json")["accepted_drift"], serde_json::json!(["settings"]));
    assert!(night.round().join("outcome.json").exists());
}

#[test]
fn an_accepted_drift_trains_a_pass_anew_that_was_begun_under_other_settings() {
    let night = Night::new(&calls(CALLS));
    night.kill_at("adapter-checkpoint", &[]);
    let faster = [("TAOD__TUNING__LEARNING_RATE", "0.02")];
    night.worker(&["--resume"], &faster).refused(&["settings"]);
    decided(night.worker(&["--resume", "--allow-drift"], &faster));
    // Drift before anything was trained: the same settings from the first step on.
    let other = Night::new(&calls(CALLS));
    other.kill_at("rewards-1", &[]);
    decided(other.worker(&["--resume", "--allow-drift"], &faster));
    assert!(night.adapters() == other.adapters(), "a step of the old settings is left");
}

#[test]
fn training_that_collapses_fails_its_round_once_and_the_next_begins_anew() {
    let night = Night::new(&calls(CALLS));
    let strict = [("TAOD__TUNING__MAX_KL", "0.000001")];
    night.worker(&[], &strict).code(1);
    let outcome = night.json("outcome.json")["outcome"].clone();
    assert_eq!(outcome["result"], "failed");
    assert!(outcome["reason"].as_str().unwrap().contains("tuning.max_kl = 0.000001"), "{outcome}");
    assert!(night.adapters().is_empty() && night.rows(Name::Trials).is_empty());
    night.worker(&["--resume"], &strict).refused(&["no unfinished round"]);
    decided(night.worker(&[], &[]));
    assert!(night.state().join("rounds/round-00002/outcome.json").exists());
}

/// The endpoint was down when the gate had decided: the next night claims the same promotion, and spends nothing on it.
#[test]
fn a_promotion_that_was_not_carried_out_is_claimed_again_without_fresh_prompts() {
    let night = promotable();
    night.worker(&[], &GENEROUS).code(0);
    let first = night.json("outcome.json")["outcome"].clone();
    assert_eq!(first["result"], "promote", "{first}");
    let (steps, adapters) = (night.rows(Name::GateSteps).len(), night.adapters());
    night.worker(&[], &GENEROUS).code(0);
    let second = std::fs::read(night.state().join("rounds/round-00002/outcome.json")).unwrap();
    let second: Value = serde_json::from_slice(&second).unwrap();
    assert_eq!(second["outcome"], first);
    assert_eq!(night.rows(Name::GateSteps).len(), steps);
    assert!(night.adapters() == adapters, "it trained although a promotion is due");
}

#[test]
fn a_year_without_budget_for_another_trial_trains_nothing() {
    let night = Night::new(&calls(CALLS));
    let one = [("TAOD__GATE__CHALLENGERS", "1"), ("TAOD__GATE__MAX_NIGHTS", "1")];
    night.worker(&[], &one).code(2);
    night.worker(&[], &one).code(0);
    let second = night.state().join("rounds/round-00002");
    let verdict: Value = serde_json::from_slice(&std::fs::read(second.join("outcome.json")).unwrap()).unwrap();
    assert_eq!(verdict["outcome"]["result"], "skipped");
    assert!(verdict["outcome"]["reason"].as_str().unwrap().contains("1 of 1 challengers"), "{verdict}");
    assert!(!second.join("pass-1").exists(), "it trained for nothing");
}
