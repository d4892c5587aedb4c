//! Ranks and alphas of their own, dropout, and adapters of whatever making to start from.

use std::collections::BTreeMap;
use std::fs;

use super::settings::Keep;
use super::tests::{bytes, samples, settings, tiny};
use super::*;
use crate::engine::{Adapter, Architecture, Linear, train::fixture::Tiny};

fn patterned() -> Settings {
    Settings {
        rank_pattern: BTreeMap::from([("down_proj".into(), 2), ("layers.1.self_attn.q_proj".into(), 6)]),
        alpha_pattern: BTreeMap::from([("mlp.*".into(), 2.0)]),
        ..settings()
    }
}

#[test]
fn a_layer_may_have_a_rank_and_an_alpha_of_its_own() {
    let (folder, tiny) = (tempfile::tempdir().unwrap(), tiny());
    let outcome = tiny.tune(&samples(), None, &patterned(), folder.path()).unwrap();
    let adapter = Adapter::read(&outcome.adapter_dir, &tiny.config, &tiny.identity).unwrap();
    let pair = |layer, linear| adapter.get(layer, linear).map(|pair| (pair.rank, pair.scale)).unwrap();
    assert_eq!([pair(0, Linear::Q), pair(1, Linear::Q)], [(4, 2.0), (6, 8.0 / 6.0)]);
    assert_eq!([pair(0, Linear::Up), pair(1, Linear::Down)], [(4, 0.5), (2, 1.0)]);
    assert_eq!(adapter.spec, patterned().lora());
    let config = fs::read_to_string(outcome.adapter_dir.join("adapter_config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_str(&config).unwrap();
    assert_eq!(config["rank_pattern"]["layers.1.self_attn.q_proj"], 6);
    assert_eq!(config["alpha_pattern"]["mlp.*"], 2.0);
}

#[test]
fn patterns_that_name_nothing_and_ranks_above_a_width_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let refuse = |tiny: &Tiny, settings: Settings, words: &str| {
        let error = tiny.tune(&samples(), None, &settings, &out).unwrap_err().to_string();
        assert!(error.contains(words) && !out.exists(), "{error}");
    };
    let rank =
        |pattern: &str, rank: usize| Settings { rank_pattern: BTreeMap::from([(pattern.into(), rank)]), ..settings() };
    refuse(&tiny(), rank("w_proj", 2), "tuning.rank_pattern \"w_proj\" matches no layer that is adapted");
    let targets = vec![Linear::Q];
    refuse(&tiny(), Settings { targets, ..rank("up_proj", 2) }, "\"up_proj\" matches no layer");
    refuse(&tiny(), rank("layers.1.self_attn.v_proj", 9), "rank 9 is above the width 8 of self_attn.v_proj");
    // Phi-3 has one matrix where others have three.
    refuse(&Tiny::new(Architecture::Phi3), rank("q_proj", 2), "such as model.layers.0.self_attn.qkv_proj");
}

#[test]
fn dropout_is_in_the_steps_alone() {
    let (folder, tiny) = (tempfile::tempdir().unwrap(), tiny());
    let run = |name: &str, settings: &Settings, seed: u64| {
        let out = folder.path().join(name);
        let tuned = tune_frozen(tiny.frozen(), &samples(), None, settings, seed, &out, &Progress::silent()).unwrap();
        (tuned, Checkpoint::load(&out.join(CHECKPOINT)).unwrap().known.base)
    };
    let dropping = Settings { dropout: 0.4, ..settings() };
    let ((plain, base), (dropped, base_too), (other, _)) =
        (run("plain", &settings(), 7), run("dropped", &dropping, 7), run("other", &dropping, 8));
    assert_eq!(base, base_too, "what is scored sees all");
    // B is zero at first, so that there is nothing to leave out of.
    assert_eq!(plain.steps[0].loss, dropped.steps[0].loss);
    assert_ne!(plain.steps[1].loss, dropped.steps[1].loss);
    assert_ne!(dropped.steps[3].loss, other.steps[3].loss);
    assert!(dropped.steps.last().unwrap().loss < dropped.steps[0].loss - 0.1, "it learns all the same");
}

#[test]
fn activations_made_again_end_in_the_same_adapter() {
    let (folder, tiny) = (tempfile::tempdir().unwrap(), tiny());
    let adapter = |name: &str, activations| {
        let settings = Settings { activations, dropout: 0.2, ..settings() };
        bytes(&tiny.tune(&samples(), None, &settings, &folder.path().join(name)).unwrap().adapter_dir)
    };
    assert_eq!(adapter("kept", Keep::Keep), adapter("again", Keep::Recompute));
}

#[test]
fn a_run_starts_from_any_adapter_of_its_model_and_settings() {
    let (folder, tiny) = (tempfile::tempdir().unwrap(), tiny());
    let outs = ["1", "2", "3", "4"].map(|name| folder.path().join(name));
    let first = tiny.tune(&samples(), None, &patterned(), &outs[0]).unwrap();
    // The same matrices, with the moments and without.
    let goes_on = tiny.tune(&samples(), Some(&outs[0]), &patterned(), &outs[1]).unwrap();
    let warm = tiny.tune(&samples(), Some(&first.adapter_dir), &patterned(), &outs[2]).unwrap();
    assert_eq!(warm.steps[0].loss, goes_on.steps[0].loss);
    assert_ne!(warm.steps[1].loss, goes_on.steps[1].loss);
    let error = tiny.tune(&samples(), Some(&first.adapter_dir), &settings(), &outs[3]).unwrap_err().to_string();
    assert!(error.contains("the LoRA shape") && error.contains("rank_pattern"), "{error}");
    let other = Tiny::new(Architecture::Qwen3);
    let mut identity = other.identity.clone();
    identity.sha256 = "1".repeat(64);
    let frozen = Frozen { identity: &identity, ..other.frozen() };
    let start = Some(first.adapter_dir.as_path());
    let error = tune_frozen(frozen, &samples(), start, &patterned(), 7, &outs[3], &Progress::silent()).unwrap_err();
    assert!(error.to_string().contains("was trained on weights 000"), "{error}");
    let error = tiny.tune(&samples(), Some(&folder.path().join("none")), &settings(), &outs[3]).unwrap_err();
    assert!(error.to_string().contains("none"), "{error}");
}
