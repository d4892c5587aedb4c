//! A round on the demo's traffic whose reward is a trained reward model beside the rules, and whose gate asks another model.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value, json};
use taod::table::{Name, Tables};

use crate::harness::{Outcome, models, root, taod_in, text};

/// Calls of a small demo: as many as a round and a trial need.
const CALLS: &str = "170";

fn demo(folder: &Path, config: &str, dir: &str) -> Value {
    let outcome = taod_in(folder, &["demo", "--config", config, "--dir", dir, "--calls", CALLS, "--json"], &[]);
    assert!([0, 2, 3].contains(&outcome.code), "{}: {}", outcome.code, outcome.err);
    serde_json::from_str(outcome.out.lines().last().unwrap()).unwrap()
}

fn rows(state: &Path, name: Name) -> Vec<Value> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let tables = Tables::open(&state.join("tables")).unwrap();
    runtime.block_on(async { tables.open_one(name).await.unwrap().rows(None).await.unwrap() })
}

/// Returns the answers that a demo drew for training, with their rewards, as `taod reward train` reads them.
fn scored(state: &Path) -> String {
    let list = std::fs::read_to_string(state.join("rounds/round-00001/dataset/train.jsonl")).unwrap();
    let prompts = list.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let messages: BTreeMap<String, Value> = prompts
        .map(|prompt| (prompt["prompt_hash"].as_str().unwrap().to_owned(), prompt["messages"].clone()))
        .collect();
    let rows = rows(state, Name::Candidates).into_iter().filter(|row| row["purpose"] == "train");
    let line = |row: Value| {
        let messages = &messages[row["prompt_hash"].as_str().unwrap()];
        json!({ "messages": messages, "response": row["text"], "reward": row["total"] }).to_string() + "\n"
    };
    rows.map(line).collect()
}

#[test]
#[ignore = "two demos and the training of a reward model: about half an hour on two idle cores"]
fn a_round_learns_from_a_trained_reward_model_and_is_judged_by_another() {
    let Some(models) = models() else { return };
    let folder = tempfile::tempdir().unwrap();
    let place = |name: &str| folder.path().join(name);
    let config = root().join("config/demo.toml").display().to_string();
    demo(folder.path(), &config, "first");

    // Pairs of the logged prompts' answers, the better one by the rules.
    std::fs::write(place("answers.jsonl"), scored(&place("first"))).unwrap();
    let base = models.join("SmolLM2-135M-Instruct.Q4_1.gguf").display().to_string();
    let train = [
        "reward",
        "train",
        "--config",
        &config,
        "--model",
        &base,
        "--input",
        "answers.jsonl",
        "--out",
        "preference",
        "--held-out",
        "0.3",
        "--margin",
        "0.2",
        "--json",
    ];
    let Outcome { out, .. } = taod_in(folder.path(), &train, &[("TAOD__TUNING__EPOCHS", "1")]).code(0);
    let card: Value = serde_json::from_str(out.trim()).unwrap();
    println!("{}", card["card"]["trained"]);
    let accuracy = &card["card"]["trained"]["held_out"]["overall"];
    assert!(accuracy["accuracy"].as_f64() > Some(0.5), "it learnt nothing: {accuracy}");

    // How it stands arguments is on record beside the judges' (docs/rewards.md).
    let scorer =
        format!("[[rewards.scorers]]\nname = 'preference'\nkind = 'classifier'\nmodel = {:?}\n", place("preference"));
    std::fs::write(place("attacked.toml"), scorer).unwrap();
    let attacked = ["reward", "injections", "--config", "attacked.toml", "--scorer", "preference"];
    println!("{}", taod_in(folder.path(), &attacked, &[]).code(0).out);

    let rewards = format!(
        "\n[rewards]\ntrain = ['rules', 'preference']\ngate = ['rules', 'similarity']\n\n[[rewards.scorers]]\nname = \
         'preference'\nkind = 'classifier'\nmodel = {:?}\n",
        place("preference")
    );
    std::fs::write(place("judged.toml"), text("config/demo.toml") + &rewards).unwrap();
    let report = demo(folder.path(), "judged.toml", "second");
    println!("{}", report["outcome"]);
    assert!(report["outcome"]["trial"].is_string(), "{}", report["outcome"]);

    let (training, gate): (Vec<Value>, Vec<Value>) =
        rows(&place("second"), Name::Candidates).into_iter().partition(|row| row["purpose"] == "train");
    let has = |row: &Value, part: &str| row["rewards"].as_object().unwrap().keys().any(|name| name.starts_with(part));
    // Where a hard rule failed nothing else is asked.
    let passed = |row: &&Value| row["passed"] == true && !row["rewards"].as_object().unwrap().is_empty();
    assert!(training.iter().filter(passed).count() > 20);
    assert!(training.iter().filter(passed).all(|row| has(row, "preference") && has(row, "rules")));
    assert!(training.iter().all(|row| !has(row, "similarity")));
    assert!(gate.iter().filter(passed).count() > 20);
    assert!(gate.iter().filter(passed).all(|row| has(row, "similarity") && !has(row, "preference")));
    let steps = rows(&place("second"), Name::GateSteps);
    let of = |suite: &str| steps.iter().filter(|step| step["suite"] == suite).count();
    assert_eq!(of("injection"), 128, "the gate's learned scorer was argued with");
    assert!(of("memorisation") > 0, "training prompts were probed");
    let state = place("second").display().to_string();
    let explain = ["gate", "explain", "--config", "judged.toml"];
    let told = taod_in(folder.path(), &explain, &[("TAOD__STATE__DIR", &state)]).code(0).out;
    println!("{told}");
    assert!(told.contains("guardrail injection: ") && told.contains("guardrail memorisation: "), "{told}");
}
