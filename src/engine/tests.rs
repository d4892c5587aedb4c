//! The engine against transformers and PEFT (numbers of `tools/reference/engine_golden.py`), and its promises on a tiny
//! random model.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::cache::{Cache, Pool, Shape};
use super::decoder::Run;
use super::*;
use crate::record::{FinishReason, Message};

mod device;
mod families;
pub(crate) mod gguf;
mod grammar;
mod held;
mod mixed;
mod room;
mod rounded;
mod sampling;
mod stops;

#[derive(Deserialize)]
struct Golden {
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    messages: Vec<Message>,
    tools: Option<crate::json::Value>,
    prompt_ids: Vec<u32>,
    answer: String,
    completion_ids: Vec<u32>,
    /// After the prompt, the first 256 of the vocabulary.
    logits: Vec<f32>,
    logprobs: Vec<f32>,
    greedy: Vec<u32>,
    #[serde(default)]
    adapter_logprobs: Vec<f32>,
    #[serde(default)]
    divergence: Vec<f32>,
}

impl Case {
    fn item(&self) -> ScoreItem<'_> {
        ScoreItem { prompt: &self.prompt_ids, completion: &self.completion_ids }
    }
}

fn tests_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests")
}

fn golden(name: &str) -> Vec<Case> {
    let path = tests_folder().join(format!("golden/engine_{name}.json"));
    serde_json::from_slice::<Golden>(&std::fs::read(path).unwrap()).unwrap().cases
}

fn fixture(name: &str) -> PathBuf {
    tests_folder().join("fixtures/models").join(name)
}

fn load(path: &Path) -> Model {
    Model::load(&path.display().to_string()).unwrap()
}

fn worst(got: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(got.len(), expected.len());
    got.iter().zip(expected).map(|(g, e)| (g - e).abs()).fold(0.0, f32::max)
}

fn greedy(tokens: usize) -> SamplingSettings {
    SamplingSettings { temperature: 0.0, top_p: 1.0, max_tokens: tokens, ..SamplingSettings::default() }
}

fn group(id: u64, prompt: &[u32], samples: u64, max_tokens: usize) -> Group {
    let sampling = SamplingSettings { temperature: 0.8, top_p: 0.95, max_tokens, ..SamplingSettings::default() };
    Group { id, prompt: prompt.to_vec(), seeds: (0..samples).map(|s| id * 100 + s).collect(), sampling }
}

fn exact(model: &Model) -> Policy {
    Policy::new(model, None, WeightForm::F32).unwrap()
}

fn sample(model: &Model, groups: Vec<Group>, max_sequences: usize) -> Vec<Vec<Completion>> {
    let limits = BatchLimits { max_sequences, ..BatchLimits::default() };
    generate(&exact(model), groups, &limits, &mut |_, _, _| {}).unwrap()
}

/// Compares one model with its golden numbers and returns the largest differences of logits and log-probs.
fn compare(model: &Model, name: &str) -> (f32, f32) {
    let (mut logits_off, mut logprobs_off) = (0.0f32, 0.0f32);
    for case in golden(name) {
        assert_eq!(model.prompt_ids(&case.messages, case.tools.as_ref()).unwrap(), case.prompt_ids, "{name}");
        assert_eq!(model.tokenizer().answer_ids(&case.answer, true).unwrap(), case.completion_ids, "{name}");
        assert_eq!(model.tokenizer().decode(&case.completion_ids), case.answer, "{name}");
        let decoder = model.decoder().unwrap();
        let (mut cache, pool) = (Cache::new(decoder.shape()), Pool::new(decoder.shape()));
        let mut runs = [Run { cache: &mut cache, tokens: &case.prompt_ids, adapter: None }];
        let hidden = decoder.forward(&mut runs, &pool);
        let last = &hidden[hidden.len() - model.config().hidden_size..];
        let logits = decoder.logits(last, Vec::new()).to_rows();
        logits_off = logits_off.max(worst(&logits[..case.logits.len()], &case.logits));
        let scored = logprobs(model, None, &[case.item()]).unwrap();
        logprobs_off = logprobs_off.max(worst(&scored[0], &case.logprobs));
        let group =
            Group { id: 1, prompt: case.prompt_ids.clone(), seeds: vec![1], sampling: greedy(case.greedy.len()) };
        let sampled = generate(&exact(model), vec![group], &BatchLimits::default(), &mut |_, _, _| {}).unwrap();
        assert_eq!(sampled[0][0].token_ids, case.greedy, "{name}");
    }
    println!("{name}: logits within {logits_off:.1e}, log-probs within {logprobs_off:.1e} of transformers");
    (logits_off, logprobs_off)
}

#[test]
fn smollm2_matches_transformers() {
    let file = "SmolLM2-135M-Instruct.Q4_1.gguf";
    let Some(path) = model_file(file) else {
        let required = std::env::var("TAOD_REQUIRE").unwrap_or_default();
        assert!(!required.split(',').any(|r| r == "models"), "TAOD_REQUIRE names models, but {file} is not there");
        println!("skipped: {file} is not in TAOD_MODELS nor in the user's cache");
        return;
    };
    let (logits, logprobs) = compare(&load(&path), "smollm2-135m-instruct");
    assert!(logits < 1e-3 && logprobs < 1e-3, "{logits} {logprobs}");
}

/// Returns a model file fetched by name, where it is present.
pub(crate) fn model_file(name: &str) -> Option<PathBuf> {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")));
    let folder = std::env::var_os("TAOD_MODELS").map(PathBuf::from).or_else(|| Some(cache?.join("taod/models")));
    folder.map(|f| f.join(name)).filter(|path| path.exists())
}

#[test]
fn a_sample_depends_on_its_seed_and_not_on_the_batch() {
    let model = load(&fixture("tiny-llama"));
    let prompts = [vec![5u32, 6, 7, 8, 9], (3..60).collect(), vec![40]];
    let groups = || prompts.iter().enumerate().map(|(i, p)| group(i as u64, p, 4, 30)).collect::<Vec<_>>();
    let together = sample(&model, groups(), 64);
    assert_eq!(together, sample(&model, groups(), 3));
    for (i, group) in groups().into_iter().enumerate() {
        assert_eq!(sample(&model, vec![group], 64)[0], together[i]);
    }
    let other = sample(&model, vec![Group { seeds: vec![99_999], ..group(0, &prompts[0], 1, 30) }], 64);
    assert_ne!(other[0][0].token_ids, together[0][0].token_ids);
}

#[test]
fn a_sample_ends_with_the_closing_token_or_at_its_limit() {
    let model = load(&fixture("tiny-llama"));
    let closing = model.tokenizer().closing_id().unwrap();
    // Hot draws end sooner or later by themselves on a vocabulary of 340.
    let sampling = SamplingSettings { temperature: 3.0, top_p: 1.0, max_tokens: 300, ..SamplingSettings::default() };
    let group = Group { id: 0, prompt: vec![5, 6], seeds: (0..20).collect(), sampling };
    let samples = &sample(&model, vec![group], 64)[0];
    let stopped = samples.iter().filter(|s| s.finish_reason == FinishReason::Stop).count();
    assert!(stopped > 0 && stopped < 20, "{stopped} of 20 stopped");
    for sample in samples {
        let ends = sample.token_ids.iter().filter(|id| model.tokenizer().is_end(**id)).count();
        match sample.finish_reason {
            FinishReason::Stop => assert_eq!((ends, sample.token_ids.last()), (1, Some(&closing))),
            FinishReason::Length => assert_eq!((ends, sample.token_ids.len()), (0, 300)),
        }
        assert!(!sample.text.contains("<|im_end|>"));
    }
}

#[test]
fn the_context_limits_a_sample_and_refuses_a_prompt() {
    let model = load(&fixture("tiny-llama"));
    let context = model.config().max_positions;
    let prompt = vec![5; context - 3];
    let samples = sample(&model, vec![Group { sampling: greedy(50), ..group(0, &prompt, 1, 50) }], 4);
    assert!(samples[0][0].token_ids.len() <= 3);
    let mut batcher = Batcher::new(exact(&model), BatchLimits::default()).unwrap();
    let error = batcher.push(group(0, &vec![5; context], 1, 4)).unwrap_err().to_string();
    assert!(error.contains("512") && error.contains("shorten"), "{error}");
    let error = batcher.push(group(0, &[9_999], 1, 4)).unwrap_err().to_string();
    assert!(error.contains("9999"), "{error}");
}

#[test]
fn groups_may_come_and_go_while_the_batch_runs() {
    let model = load(&fixture("tiny-llama"));
    let limits = BatchLimits { max_sequences: 4, max_rows: 16, ..BatchLimits::default() };
    let mut batcher = Batcher::new(exact(&model), limits).unwrap();
    let alone = sample(&model, vec![group(2, &[9, 8, 7], 2, 10)], 4);
    batcher.push(group(1, &(3..50).collect::<Vec<_>>(), 4, 40)).unwrap();
    assert_eq!(batcher.free(), 0);
    batcher.step().unwrap();
    batcher.push(group(2, &[9, 8, 7], 2, 10)).unwrap();
    batcher.step().unwrap();
    batcher.cancel(1);
    let mut events = Vec::new();
    while !batcher.is_empty() {
        events.extend(batcher.step().unwrap());
    }
    for event in events {
        match event {
            Event::Token { group, .. } => assert_eq!(group, 2),
            Event::Done { sample, completion, .. } => assert_eq!(completion, alone[0][sample]),
        }
    }
    assert_eq!(batcher.free(), 4);
}

#[test]
fn memory_stays_flat_over_ten_thousand_steps() {
    const CHILD: &str = "TAOD_TEST_MEMORY_CHILD";
    if std::env::var_os(CHILD).is_none() {
        // Alone in a process: the other tests' models would be counted too.
        let mut child = std::process::Command::new(std::env::current_exe().unwrap());
        let filter = ["--exact", "engine::tests::memory_stays_flat_over_ten_thousand_steps", "--nocapture"];
        let output = child.args(filter).env(CHILD, "1").output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && text.contains("1 passed"), "{text}");
        return;
    }
    let model = load(&fixture("tiny-llama"));
    let limits = BatchLimits { max_sequences: 4, ..BatchLimits::default() };
    let mut batcher = Batcher::new(exact(&model), limits).unwrap();
    let mut run = |steps: usize| {
        for step in 0..steps {
            if batcher.free() >= 4 {
                batcher.push(group(step as u64, &[5, 6, 7], 4, 12)).unwrap();
            }
            batcher.step().unwrap();
        }
    };
    run(500);
    let before = resident();
    run(10_000);
    let grown = resident().saturating_sub(before);
    assert!(grown < 8 << 20, "{grown} bytes more after 10,000 steps");
}

/// Returns the resident memory of this process in bytes.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/statm").unwrap();
    status.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

#[test]
fn an_adapter_survives_saving_and_another_base_is_refused() {
    let (model, other) = (load(&fixture("tiny-llama")), load(&fixture("tiny-qwen2")));
    let adapter = Adapter::load(&fixture("tiny-qwen2-lora"), &other).unwrap();
    let tensors = adapter.tensors(other.config()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let spec = adapter.spec.clone();
    save_peft(folder.path(), other.identity(), &spec, &tensors).unwrap();
    let bytes = std::fs::read(folder.path().join("adapter_model.safetensors")).unwrap();
    save_peft(folder.path(), other.identity(), &spec, &tensors).unwrap();
    assert_eq!(bytes, std::fs::read(folder.path().join("adapter_model.safetensors")).unwrap());
    let read = Adapter::load(folder.path(), &other).unwrap();
    assert_eq!(read.spec, spec);
    // One module has a rank of its own, one an alpha.
    let pair = |adapter: &Adapter, linear| adapter.get(1, linear).map(|pair| (pair.rank, pair.scale)).unwrap();
    for linear in Linear::ALL {
        assert_eq!(pair(&read, linear), pair(&adapter, linear));
    }
    let [q, up, down] = [Linear::Q, Linear::Up, Linear::Down].map(|linear| pair(&read, linear));
    assert!(q.1 != up.1 && q.0 != down.0 && read.largest_rank() == 4, "{q:?} {up:?} {down:?}");
    // Same shapes, other weights: only the recorded hash tells them apart.
    let error = Adapter::load(folder.path(), &model).unwrap_err().to_string();
    assert!(error.contains("trained on weights") && error.contains("give the model"), "{error}");
    // No hash recorded, other shapes.
    let error = Adapter::load(&fixture("tiny-qwen3-lora"), &model).unwrap_err().to_string();
    assert!(error.contains("q_proj") && error.contains("shape"), "{error}");
}

#[test]
fn a_zero_adapter_changes_nothing() {
    let model = load(&fixture("tiny-llama"));
    let spec = LoraSpec { rank: 4, alpha: 8.0, targets: vec![Linear::Q, Linear::Down], ..LoraSpec::default() };
    let zero = Adapter::zero(&model, &spec).unwrap();
    let item = ScoreItem { prompt: &[5, 6, 7], completion: &[8, 9, 10] };
    let (with, without) = (logprobs(&model, Some(&zero), &[item]).unwrap(), logprobs(&model, None, &[item]).unwrap());
    assert_eq!(with, without);
    assert_eq!(divergence(&model, Some(&zero), None, &[item]).unwrap(), [[0.0; 3]]);
}

#[test]
fn a_broken_model_is_refused_with_the_file_and_the_remedy() {
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(fixture("tiny-llama")).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
    }
    let weights = folder.path().join("model.safetensors");
    let error = || Model::load(&folder.path().display().to_string()).unwrap_err().to_string();
    let whole = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, &whole[..whole.len() / 2]).unwrap();
    assert!(error().contains("model.safetensors: truncated"), "{}", error());
    std::fs::remove_file(&weights).unwrap();
    assert!(error().contains("model.safetensors is not there"), "{}", error());
    std::fs::write(&weights, whole).unwrap();
    let config = folder.path().join("config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, text.replace("\"model_type\": \"llama\"", "\"model_type\": \"falcon\"")).unwrap();
    let known = "llama, mistral, qwen2, qwen3, smollm3, olmo2, phi3, gemma2, gemma3_text";
    assert!(error().contains("falcon is not supported") && error().contains(known), "{}", error());
    std::fs::write(&config, text.replace("\"hidden_size\": 64", "\"hidden_size\": 32")).unwrap();
    assert!(error().contains("model.embed_tokens.weight has shape [340, 64]"), "{}", error());
}
