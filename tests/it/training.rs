//! Adapters that tuning writes, read by PEFT itself.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value, json};
use taod::adapter::{Sample, Settings, tune};
use taod::engine::train::LoraMatrices;
use taod::engine::{Adapter, Linear, LoraSpec, Model, ScoreItem, logprobs, save_peft};
use taod::progress::Progress;
use taod::record::Message;

use crate::harness;
use crate::harness::night::model as tiny_model;

/// Two groups of token ids; what they say does not matter here.
fn samples() -> Vec<Sample> {
    let sample = |group: &str, prompt: std::ops::Range<u32>, first: u32, reward: f64| Sample {
        group: group.to_string(),
        prompt: prompt.collect(),
        completion: (first..first + 12).collect(),
        reward,
        old_logprobs: None,
        base_logprobs: None,
    };
    vec![
        sample("a", 100..124, 300, 1.0),
        sample("a", 100..124, 900, 0.5),
        sample("a", 100..124, 4000, 0.0),
        sample("b", 2000..2010, 28, 0.9),
        sample("b", 2000..2010, 7042, 0.1),
    ]
}

/// Runs a script of `tools/reference` with the Python that has PEFT.
fn reference(python: &Path, script: &str, arguments: &[&Path], input: &str) -> String {
    let script = harness::root().join("tools/reference").join(script);
    let mut command = Command::new(python);
    command.arg(script).args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    String::from_utf8(output.stdout).unwrap()
}

/// Returns the Python that has PEFT, where this machine has it.
fn peft_python() -> Option<PathBuf> {
    let python = harness::cache().join("reference/bin/python");
    harness::has("peft", python.is_file(), "run `tools/setup.sh full` (6 GB)").then_some(python)
}

/// Trains an adapter and expects that PEFT loads it on the base's folder and computes the same log-probs.
fn expect_peft_agrees(python: &Path, model: &Model, base: &Path, samples: &[Sample], settings: Settings) {
    let folder = tempfile::tempdir().unwrap();
    let settings = Settings { epochs: 4, batch_samples: 2, ..settings };
    let out = folder.path().join("tuned");
    let outcome = tune(model, samples, None, &settings, 7, &out, &Progress::silent()).unwrap();
    assert!(outcome.kl_sample > 0.0);

    let adapter = Adapter::load(&outcome.adapter_dir, model).unwrap();
    let items: Vec<ScoreItem> =
        samples.iter().map(|s| ScoreItem { prompt: &s.prompt, completion: &s.completion }).collect();
    let ours = logprobs(model, Some(&adapter), &items).unwrap();
    let groups: Vec<Value> =
        samples.iter().map(|s| json!({ "prompt": s.prompt, "completions": [s.completion] })).collect();
    let input = serde_json::to_string(&groups).unwrap();
    let theirs = reference(python, "peft_check.py", &[base, &outcome.adapter_dir], &input);
    for (sample, (ours, theirs)) in ours.iter().zip(theirs.lines()).enumerate() {
        let theirs: Vec<f32> = serde_json::from_str(theirs).unwrap();
        assert_eq!(ours.len(), theirs.len());
        for (a, b) in ours.iter().zip(&theirs) {
            assert!((a - b).abs() < 1e-3, "{}, sample {sample}: {a}, PEFT {b}", base.display());
        }
    }
    assert_eq!(theirs.lines().count(), samples.len());
}

#[test]
fn an_exported_adapter_loads_in_peft_and_gives_the_same_log_probs() {
    let Some(models) = harness::models() else { return };
    let Some(python) = peft_python() else { return };
    let folder = tempfile::tempdir().unwrap();
    let gguf = models.join("SmolLM2-135M-Instruct.Q4_1.gguf");
    let base = folder.path().join("base");
    reference(&python, "gguf_to_hf.py", &[&gguf, &base], "");
    let model = Model::load(&gguf.display().to_string()).unwrap();
    expect_peft_agrees(&python, &model, &base, &samples(), Settings::default());
    expect_peft_agrees(&python, &model, &base, &samples(), patterned("layers.(3|7).self_attn.q_proj"));
}

/// Ranks and alphas of their own, rank-stabilised, with dropout.
fn patterned(own: &str) -> Settings {
    Settings {
        use_rslora: true,
        alpha: 8.0,
        dropout: 0.1,
        rank_pattern: BTreeMap::from([("down_proj".to_string(), 4), (own.to_string(), 24)]),
        alpha_pattern: BTreeMap::from([(own.to_string(), 20.0)]),
        ..Settings::default()
    }
}

/// An adapter that changes queries and keys alone, and strongly: one whose rows were in another order would be another one.
fn strong_adapter(model: &Model, folder: &Path) -> PathBuf {
    let spec =
        LoraSpec { rank: 8, alpha: 16.0, targets: vec![Linear::Q, Linear::K], use_rslora: true, ..LoraSpec::default() };
    let mut lora = LoraMatrices::fresh(model.config(), &spec, 3);
    for (at, value) in lora.values.iter_mut().skip(1).step_by(2).flatten().enumerate() {
        *value = ((at * 7919 % 1013) as f32 / 1013.0 - 0.5) * 0.4;
    }
    let peft = folder.join("peft");
    save_peft(&peft, model.identity(), &spec, &lora.tensors().unwrap()).unwrap();
    peft
}

/// An answer of another engine: prompt, tokens, log-probs.
type Told = (Vec<u32>, Vec<u32>, Vec<f64>);

/// Returns the mean distance of another engine's log-probs from ours of the same tokens.
fn gap(model: &Model, adapter: Option<&Adapter>, told: &[Told]) -> f64 {
    let items: Vec<ScoreItem> = told.iter().map(|(prompt, completion, _)| ScoreItem { prompt, completion }).collect();
    let ours = logprobs(model, adapter, &items).unwrap().concat();
    let theirs: Vec<f64> = told.iter().flat_map(|(_, _, logprobs)| logprobs.clone()).collect();
    assert!(ours.len() == theirs.len() && ours.len() >= 20, "{} and {}", ours.len(), theirs.len());
    ours.iter().zip(&theirs).map(|(a, b)| (f64::from(*a) - b).abs()).sum::<f64>() / theirs.len() as f64
}

const QUESTIONS: [&str; 2] = ["Name three colours of the sky.", "Why do cats sleep so much?"];

fn prompts(model: &Model) -> Vec<Vec<u32>> {
    QUESTIONS.iter().map(|text| model.prompt_ids(&[Message::text("user", *text)], None).unwrap()).collect()
}

/// llama.cpp's weights and activations are quantised, so that it differs from f32 by some hundredths of a nat.
#[test]
fn an_exported_adapter_loads_in_llama_cpp_and_gives_near_log_probs() {
    let Some(models) = harness::models() else { return };
    let Some(python) = peft_python() else { return };
    let folder = tempfile::tempdir().unwrap();
    let gguf = models.join("SmolLM2-135M-Instruct.Q4_1.gguf");
    let model = Model::load(&gguf.display().to_string()).unwrap();
    let (peft, file) = (strong_adapter(&model, folder.path()), folder.path().join("adapter.gguf"));
    let arguments = format!("adapters export {} --out {} --model {}", peft.display(), file.display(), gguf.display());
    harness::taod_in(folder.path(), &arguments.split(' ').collect::<Vec<_>>(), &[]).code(0);

    let input = serde_json::to_string(&prompts(&model)).unwrap();
    let lines = reference(&python, "llama_cpp_check.py", &[&gguf, &file], &input);
    let answers = lines.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let told: Vec<Told> = prompts(&model)
        .into_iter()
        .zip(answers)
        .map(|(prompt, mut answer)| {
            let (ids, logprobs) = (answer["ids"].take(), answer["logprobs"].take());
            (prompt, serde_json::from_value(ids).unwrap(), serde_json::from_value(logprobs).unwrap())
        })
        .collect();
    let adapter = Adapter::load(&peft, &model).unwrap();
    let (with, without) = (gap(&model, Some(&adapter), &told), gap(&model, None, &told));
    println!("llama.cpp's log-probs: {with:.4} nats a token from ours with the adapter, {without:.3} from the base's");
    assert!(with < 0.2 && without > 4.0 * with, "{with} with the adapter, {without} without");
}

/// It computes in f32 too, in kernels of its own.
#[test]
fn an_adapter_loads_in_mistral_rs_as_it_is_and_gives_the_same_log_probs() {
    let Some(models) = harness::models() else { return };
    let Some(python) = peft_python() else { return };
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("base");
    reference(&python, "gguf_to_hf.py", &[&models.join("SmolLM2-135M-Instruct.Q4_1.gguf"), &base], "");
    let model = Model::load(&base.display().to_string()).unwrap();
    let peft = strong_adapter(&model, folder.path());
    let lines = reference(&python, "mistralrs_check.py", &[&base, &peft], &serde_json::to_string(&QUESTIONS).unwrap());
    let answers = lines.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let told: Vec<Told> = prompts(&model)
        .into_iter()
        .cycle()
        .zip(answers)
        .map(|(prompt, mut answer)| {
            let ids = model.tokenizer().answer_ids(answer["text"].as_str().unwrap(), false).unwrap();
            (prompt, ids, serde_json::from_value(answer["logprobs"].take()).unwrap())
        })
        .collect();
    let adapter = Adapter::load(&peft, &model).unwrap();
    let (plain, with) = told.split_at(2);
    let (plain, with, without) = (gap(&model, None, plain), gap(&model, Some(&adapter), with), gap(&model, None, with));
    println!(
        "mistral.rs's log-probs: base {plain:.4} nats a token from ours, adapter {with:.4}, and {without:.3} from the base's"
    );
    assert!(plain < 0.02 && with < 0.02 && without > 0.2, "{plain} {with} {without}");
}

/// Phi-3's projections are fused, OLMo 2 norms elsewhere, Gemma 3 does everything its own way.
#[test]
fn adapters_of_other_families_load_in_peft_too() {
    let Some(python) = peft_python() else { return };
    for name in ["tiny-phi3", "tiny-olmo2", "tiny-gemma3"] {
        let base = harness::root().join("tests/fixtures/models").join(name);
        let model = Model::load(&base.display().to_string()).unwrap();
        let samples: Vec<Sample> = samples()
            .into_iter()
            .map(|mut sample| {
                let tokens = sample.prompt.iter_mut().chain(&mut sample.completion);
                tokens.for_each(|id| *id %= 340);
                sample
            })
            .collect();
        expect_peft_agrees(&python, &model, &base, &samples, Settings::default());
        let own = if name == "tiny-phi3" { "layers.1.self_attn.qkv_proj" } else { "q_proj" };
        expect_peft_agrees(&python, &model, &base, &samples, patterned(own));
    }
}

/// An adapter of PEFT's own making, with a rank and an alpha of its own for two modules.
#[test]
fn tuning_starts_from_an_adapter_that_peft_made() {
    let folder = tempfile::tempdir().unwrap();
    let adapter = harness::root().join("tests/fixtures/models/tiny-llama-lora").display().to_string();
    let told = std::fs::read_to_string(Path::new(&adapter).join("adapter_config.json")).unwrap();
    let told: Value = serde_json::from_str(&told).unwrap();
    let targets: Vec<&str> = ["q", "k", "v", "o", "gate", "up", "down"]
        .into_iter()
        .filter(|t| told["target_modules"].as_array().unwrap().iter().any(|m| m == &format!("{t}_proj")))
        .collect();
    let config = format!(
        "[tuning]\nrank = {}\nalpha = {}\nuse_rslora = {}\ntargets = {targets:?}\nrank_pattern = {{ down_proj = 2 }}\n\
         alpha_pattern = {{ up_proj = 4 }}\n",
        told["r"], told["lora_alpha"], told["use_rslora"]
    );
    std::fs::write(folder.path().join("taod.toml"), config).unwrap();
    let losses = |out: &str, more: &[&str]| -> Vec<f64> {
        let outcome = tune_tiny(folder.path(), out, &[&["--config", "taod.toml"], more].concat());
        let outcome: Value = serde_json::from_str(&outcome.code(0).out).unwrap();
        outcome["steps"].as_array().unwrap().iter().map(|step| step["loss"].as_f64().unwrap()).collect()
    };
    let (fresh, warm) = (losses("fresh", &[]), losses("warm", &["--start", &adapter]));
    assert_ne!(fresh[0], warm[0]);
    tune_tiny(folder.path(), "other", &["--start", &adapter]).refused(&["the LoRA shape", "rank_pattern"]);
}

/// The shape of Llama 2 7B, whose weights are not there.
#[test]
fn a_7b_model_trains_within_24_gib_where_its_weights_stay_as_they_are_stored() {
    let folder = tempfile::tempdir().unwrap();
    let config = json!({
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "max_position_embeddings": 4096, "tie_word_embeddings": false, "hidden_act": "silu",
    });
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let told = harness::taod_in(folder.path(), &["estimate", "--model", ".", "--json"], &[]).code(0).out;
    let told: Value = serde_json::from_str(&told).unwrap();
    let gib = |hold: &str, activations: &str| {
        let way = told["ways"]
            .as_array()
            .unwrap()
            .iter()
            .find(|way| way["hold"] == hold && way["precision"] == "f32" && way["activations"] == activations);
        way.unwrap()["bytes"]["total"].as_f64().unwrap() / (1u64 << 30) as f64
    };
    assert_eq!(told["weights"], 6_738_149_376u64);
    assert!(
        gib("stored", "recompute") < 18.0 && gib("f32", "recompute") > 24.0 && gib("stored", "keep") > 18.0,
        "{told}"
    );
    let table = harness::taod_in(folder.path(), &["estimate", "--model", "."], &[]).code(0).out;
    assert!(table.contains("6738 million weights in 32 layers"), "{table}");
}

/// Runs `taod tune` on two samples, one good and one bad, and returns how it ended.
fn tune_tiny(folder: &Path, out: &str, more: &[&str]) -> harness::Outcome {
    let line = |ids: [u32; 6], reward: f64| {
        let messages = [json!({"role": "user", "content": "one two"})];
        json!({"group": "a", "messages": messages, "token_ids": ids, "finish_reason": "length", "reward": reward})
    };
    let lines = format!("{}\n{}\n", line([40, 41, 42, 43, 44, 45], 1.0), line([60, 61, 62, 63, 64, 65], 0.0));
    std::fs::write(folder.join("scored.jsonl"), lines).unwrap();
    let model = tiny_model().display().to_string();
    let arguments = ["tune", "--model", &model, "--input", "scored.jsonl", "--out", out, "--json"];
    harness::taod_in(folder, &[&arguments, more].concat(), &[("TAOD__TUNING__LEARNING_RATE", "0.003")])
}

#[test]
fn tuning_goes_on_from_an_earlier_run_and_says_where_there_is_none() {
    let folder = tempfile::tempdir().unwrap();
    let losses = |out: &str, more: &[&str]| -> Vec<f64> {
        let outcome: Value = serde_json::from_str(&tune_tiny(folder.path(), out, more).code(0).out).unwrap();
        outcome["steps"].as_array().unwrap().iter().map(|step| step["loss"].as_f64().unwrap()).collect()
    };
    let first = losses("one", &[]);
    let second = losses("two", &["--start", "one"]);
    assert!(second[0] < first[0], "the second run begins where the base is: {first:?}, then {second:?}");
    tune_tiny(folder.path(), "three", &["--start", "nowhere"]).refused(&["nowhere"]);
    assert!(!folder.path().join("three/adapter").exists());
}
