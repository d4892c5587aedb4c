//! Reward models that taod trains, read by transformers itself.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::json;
use taod::adapter::Settings;
use taod::engine::Model;
use taod::progress::Progress;
use taod::record::Message;
use taod::reward_model::{self, pairs::Pair};
use taod::rewards::classifier::Classifier;

use crate::harness;

/// Pairs that any model can learn.
fn pairs() -> Vec<Pair> {
    let pair = |i: usize| Pair {
        messages: vec![Message::text("user", format!("Question {i}?"))],
        chosen: format!("{} the capital of France, of course.", i * 7 % 10),
        rejected: format!("{} a weight for paper", i * 3 % 10),
        subset: None,
    };
    (0..60).map(pair).collect()
}

#[test]
#[ignore = "needs transformers, of 6 GB"]
fn transformers_gives_a_trained_reward_model_the_same_scores() {
    let python = harness::cache().join("reference/bin/python");
    if !harness::has("peft", python.is_file(), "run `tools/setup.sh full` (6 GB)") {
        return;
    }
    for name in ["llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3", "gemma2", "gemma3"] {
        let base = harness::root().join("tests/fixtures/models").join(format!("tiny-{name}")).display().to_string();
        let model = Model::load(&base).unwrap();
        let out = tempfile::tempdir().unwrap();
        let settings = Settings { rank: 4, epochs: 3, learning_rate: 3e-3, ..Settings::default() };
        let silent = Progress::silent();
        reward_model::train((&base, &model), &pairs(), &settings, (0.3, 1), out.path(), &silent).unwrap();
        let theirs = transformers(&python, out.path());
        let (items, _): (Vec<_>, Vec<_>) = pairs().iter().map(|pair| reward_model::items(pair, None)).unzip();
        let model = Classifier::load(&out.path().display().to_string()).unwrap();
        let ours = model.score(&items.iter().collect::<Vec<_>>()).unwrap();
        let off = ours.iter().zip(&theirs).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        let most = theirs.iter().map(|score| score.abs()).fold(0.0, f64::max);
        assert!(ours.len() == theirs.len() && off < 1e-4 && most > 0.1, "{name}: off by {off} of {most}");
        println!("{name}: within {off:.1e} of transformers, scores up to {most:.1}");
    }
}

fn transformers(python: &Path, model: &Path) -> Vec<f64> {
    let turns = |pair: &Pair| {
        let question = pair.messages[0].plain_text();
        json!([{ "role": "user", "content": question }, { "role": "assistant", "content": pair.chosen }])
    };
    let input = json!(pairs().iter().map(turns).collect::<Vec<_>>()).to_string();
    let script = harness::root().join("tools/reference/reward_check.py");
    let mut command = Command::new(python);
    let mut child = command.arg(script).arg(model).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    String::from_utf8(output.stdout).unwrap().lines().map(|line| line.parse().unwrap()).collect()
}
