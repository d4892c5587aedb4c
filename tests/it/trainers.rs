//! Trainers in other processes: the reference trainer on Ray, its reading of a dataset, and what becomes of a trainer whose
//! taod died.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value, json};
use taod::adapter::losses::Method;
use taod::adapter::{ADAPTER, Outcome, Sample, Settings, tune};
use taod::engine::train::LoraMatrices;
use taod::engine::{
    Adapter, BatchLimits, Group, Model, Policy, Precision, SamplingSettings, ScoreItem, WeightForm, generate, logprobs,
    save_peft,
};
use taod::progress::Progress;
use taod::record::{Message, derive_seed};

use crate::harness;
use crate::harness::night::model as tiny_model;

fn fixture(name: &str) -> PathBuf {
    harness::root().join("tests/fixtures/models").join(name)
}

/// Writes a config whose trainer is a shell script in a folder, and two samples, one good and one bad.
fn script(folder: &Path, text: &str) {
    std::fs::write(folder.join("trainer.sh"), text).unwrap();
    let command = format!("[tuning]\ncommand = [\"sh\", {:?}]\n", folder.join("trainer.sh"));
    std::fs::write(folder.join("taod.toml"), command).unwrap();
    let line = |id: u32, reward: f64| {
        let messages = [json!({"role": "user", "content": "one two"})];
        json!({"group": "a", "messages": messages, "token_ids": [id, 41], "finish_reason": "length", "reward": reward})
    };
    std::fs::write(folder.join("scored.jsonl"), format!("{}\n{}\n", line(40, 1.0), line(60, 0.0))).unwrap();
}

/// The arguments of a tuning in a folder that [`script`] filled.
fn arguments() -> Vec<String> {
    let model = tiny_model().display().to_string();
    let words = ["tune", "--config", "taod.toml", "--model", &model, "--input", "scored.jsonl", "--out", "run"];
    words.map(str::to_owned).to_vec()
}

#[test]
fn a_trainer_and_all_it_started_end_with_a_taod_that_was_killed() {
    let folder = tempfile::tempdir().unwrap();
    // The inner shell outlives the outer one, unless the whole group is told.
    let text = "cd \"$1/../..\"\ntrap 'touch told; exit 0' TERM\n\
                sh -c 'sleep 60; touch survived' & echo training; wait\n";
    script(folder.path(), text);
    let mut taod = Command::new(env!("CARGO_BIN_EXE_taod"))
        .args(arguments())
        .current_dir(folder.path())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(taod.stderr.take().unwrap());
    let mut line = String::new();
    while !line.starts_with("training\n") {
        line.clear();
        assert!(lines.read_line(&mut line).unwrap() > 0, "taod ended before its trainer began");
    }
    taod.kill().unwrap();
    taod.wait().unwrap();
    // Standard error ends when the last process that holds it has ended.
    lines.read_to_string(&mut line).unwrap();
    assert!(folder.path().join("told").exists(), "the trainer was asked to end");
    assert!(!folder.path().join("survived").exists(), "what the trainer had started went on");
}

#[test]
fn what_a_trainer_left_running_ends_with_it_and_its_words_stay_out_of_the_document() {
    let folder = tempfile::tempdir().unwrap();
    let adapter = fixture("tiny-llama-lora");
    let text = format!(
        "cd \"$1/../..\"\nsh -c 'sleep 60; touch survived' &\necho not JSON\ncp {}/* \"$2\"\n",
        adapter.display()
    );
    script(folder.path(), &text);
    let words = arguments();
    let words: Vec<&str> = words.iter().map(String::as_str).chain(["--json"]).collect();
    // Returns when the last process that holds its output has ended.
    let outcome = harness::taod_in(folder.path(), &words, &[("TAOD__TUNING__MAX_KL", "100")]).code(0);
    assert!(!folder.path().join("survived").exists(), "what the trainer had started went on");
    serde_json::from_str::<Outcome>(&outcome.out).unwrap();
    assert!(outcome.err.contains("not JSON"), "{}", outcome.err);
}

/// Two prompts of four answers and one of two, rewards mixed; the log-probs are made up.
fn made_up() -> Vec<Sample> {
    let rewards: [&[f64]; 4] = [&[0.25, 1.0, 0.0, 0.5], &[0.5, 0.5, 0.75, 0.5], &[0.0, 0.5], &[0.5, 0.5]];
    let mut samples = Vec::new();
    for (group, rewards) in rewards.iter().enumerate() {
        for (at, reward) in rewards.iter().enumerate() {
            let completion = vec![20 + group as u32, 30 + at as u32, 40];
            let logprobs = completion.iter().map(|id| -(*id as f32) / 50.0).collect();
            let (group, prompt) = (format!("g{group}"), vec![5, 9, 12 + group as u32]);
            let old_logprobs = Some(logprobs);
            samples.push(Sample { group, prompt, completion, reward: *reward, old_logprobs, base_logprobs: None });
        }
    }
    samples
}

#[test]
fn the_reference_trainer_chooses_the_samples_that_taod_chooses() {
    let Some(python) = harness::readers() else { return };
    let folder = tempfile::tempdir().unwrap();
    let model = Model::load(&tiny_model().display().to_string()).unwrap();
    let script = harness::root().join("tests/tools/trainer_contract.py");
    for method in Method::ALL.into_iter().filter(|method| *method != Method::Dapo) {
        let out = folder.path().join(method.to_string());
        let command = [&python, &script, &fixture("tiny-llama-lora")].map(|path| path.display().to_string()).to_vec();
        let settings = Settings { method, command, rank: 4, max_kl: 100.0, min_reward: 0.1, ..Settings::default() };
        let outcome = tune(&model, &made_up(), None, &settings, 7, &out, &Progress::silent()).unwrap();
        let chosen: Vec<Vec<(Vec<u32>, f64, f64)>> =
            serde_json::from_slice(&std::fs::read(out.join("chosen.json")).unwrap()).unwrap();
        let samples: usize = chosen.iter().map(Vec::len).sum();
        assert_eq!((chosen.len(), samples), (outcome.groups_used, outcome.samples_used), "{method}");
        let rewards: Vec<f64> = chosen[0].iter().map(|(_, reward, _)| *reward).collect();
        let best: &[f64] = match method {
            Method::Raft => &[1.0, 0.5],
            Method::Rest => &[1.0, 0.5, 0.25],
            Method::Dpo | Method::RcDpo | Method::Rpo | Method::Rebel => &[1.0, 0.0, 0.5, 0.25],
            _ => &[0.25, 1.0, 0.0, 0.5],
        };
        assert_eq!(rewards, best, "{method}");
        let sum: f64 = chosen[0].iter().map(|(_, _, advantage)| advantage).sum();
        let is_centred = matches!(method, Method::Rloo | Method::Grpo | Method::DrGrpo | Method::Gspo);
        assert!(!is_centred || sum.abs() < 1e-9, "{method}: advantages of siblings add up to {sum}");
    }
}

#[test]
fn the_reference_trainer_refuses_a_dataset_that_was_changed() {
    let Some(python) = harness::readers() else { return };
    let folder = tempfile::tempdir().unwrap();
    let model = Model::load(&tiny_model().display().to_string()).unwrap();
    let check = harness::root().join("tests/tools/trainer_contract.py");
    let (python, check, adapter) = (python.display(), check.display(), fixture("tiny-llama-lora"));
    let text = format!(
        "sed -i 's/\"seed\"/\"sown\"/' \"$1/settings.json\"; {python} {check} {} \"$@\" 2> \"$2/../said\"",
        adapter.display()
    );
    let command = ["sh", "-c", &text, "trainer"].map(str::to_owned).to_vec();
    let settings = Settings { command, ..Settings::default() };
    let error = tune(&model, &made_up(), None, &settings, 7, folder.path(), &Progress::silent()).unwrap_err();
    assert!(error.to_string().contains("sh ended with exit status: 1"), "{error}");
    let said = std::fs::read_to_string(folder.path().join("said")).unwrap();
    assert!(said.contains("settings.json has another hash than its manifest says"), "{said}");
}

/// Returns the Python that has Ray, TRL and PEFT, where this machine has it.
fn ray() -> Option<PathBuf> {
    let python = harness::cache().join("ray/bin/python");
    harness::has("ray", python.is_file(), "run `make test-ray` (6 GB)").then_some(python)
}

/// Runs a script of the repository and returns what it wrote to standard output.
fn python(python: &Path, script: &str, arguments: &[&Path]) -> String {
    let script = harness::root().join(script);
    let output = Command::new(python).arg(script).args(arguments).stderr(Stdio::inherit()).output().unwrap();
    assert!(output.status.success());
    String::from_utf8(output.stdout).unwrap()
}

#[test]
#[ignore = "needs PyTorch; run `make test-ray`"]
fn the_losses_of_the_reference_trainer_are_those_of_the_golden_file() {
    let Some(ray) = ray() else { return };
    let checked = python(&ray, "tests/tools/trainer_losses.py", &[]);
    assert_eq!(checked.split_whitespace().count(), Method::ALL.len() - 1, "all but dapo: {checked}");
}

/// Returns answers of the model to two questions, six each, with made-up rewards and the sampler's log-probs.
fn drawn(model: &Model) -> Vec<Sample> {
    let questions = ["Name three colours of the sky.", "Why do cats sleep so much?"];
    let group = |(id, text): (usize, &&str)| Group {
        id: id as u64,
        prompt: model.prompt_ids(&[Message::text("user", *text)], None).unwrap(),
        seeds: (0..6).map(|sample| derive_seed(11, &[&id.to_string(), &sample.to_string()])).collect(),
        sampling: SamplingSettings { temperature: 1.0, max_tokens: 12, ..SamplingSettings::default() },
    };
    let groups: Vec<Group> = questions.iter().enumerate().map(group).collect();
    let policy = Policy::new(model, None, WeightForm::F32).unwrap();
    let answers = generate(&policy, groups.clone(), &BatchLimits::default(), &mut |_, _, _| {}).unwrap();
    let mut samples = Vec::new();
    for (group, answers) in groups.iter().zip(answers) {
        for (at, answer) in answers.into_iter().enumerate() {
            let item = ScoreItem { prompt: &group.prompt, completion: &answer.token_ids };
            let told = logprobs(model, None, &[item]).unwrap().remove(0);
            samples.push(Sample {
                group: format!("g{}", group.id),
                prompt: group.prompt.clone(),
                completion: answer.token_ids,
                reward: [1.0, 0.0, 0.75, 0.25, 0.5, 0.125][at],
                old_logprobs: Some(told.clone()),
                base_logprobs: Some(told),
            });
        }
    }
    samples
}

/// The log-probs of all samples under an adapter, one after the other.
fn scores(model: &Model, adapter: Option<&Path>, samples: &[Sample]) -> Vec<f32> {
    let adapter = adapter.map(|folder| Adapter::load(folder, model).unwrap());
    let item = |s: &Sample| (s.prompt.clone(), s.completion.clone());
    let pairs: Vec<(Vec<u32>, Vec<u32>)> = samples.iter().map(item).collect();
    let items: Vec<ScoreItem> = pairs.iter().map(|(prompt, completion)| ScoreItem { prompt, completion }).collect();
    logprobs(model, adapter.as_ref(), &items).unwrap().concat()
}

fn distance(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).sum::<f32>() / a.len() as f32
}

/// Lets taod and the reference trainer, on two workers, train the same answers, and compares the adapters. Both begin from the
/// same matrices and see all answers in each step, so that they do the same sums in other kernels and processes.
fn expect_the_same_adapter(ray: &Path, base: &Path, folder: &Path, method: Method, learning_rate: f64) {
    let model = &Model::load(&base.display().to_string()).unwrap();
    let samples = drawn(model);
    let (seed, precision) = (7, Precision::F32);
    let ours = Settings {
        method,
        precision,
        learning_rate,
        epochs: 5,
        batch_samples: 100,
        warmup_steps: 1,
        max_kl: 100.0,
        rank: 8,
        ..Settings::default()
    };
    let own = folder.join(format!("own-{method}"));
    let own = tune(model, &samples, None, &ours, seed, &own, &Progress::silent()).unwrap();
    let mine = scores(model, Some(&own.adapter_dir), &samples);

    // What taod's own training begins from.
    let start = folder.join("start");
    let lora = LoraMatrices::fresh(model.config(), &ours.lora(), derive_seed(seed, &["lora"]));
    save_peft(&start.join(ADAPTER), model.identity(), &ours.lora(), &lora.tensors().unwrap()).unwrap();
    let submit = harness::root().join("tools/trainers/ray_submit.py");
    let [ray, submit, base] = [ray, &submit, base].map(|path| path.display().to_string());
    let words = [ray.as_str(), &submit, "--workers", "2", "--model", &base];
    let settings = Settings { command: words.map(str::to_owned).to_vec(), ..ours };
    let out = folder.join(format!("ray-{method}"));
    let outcome = tune(model, &samples, Some(&start), &settings, seed, &out, &Progress::silent()).unwrap();
    let theirs = scores(model, Some(&outcome.adapter_dir), &samples);
    let (apart, moved) = (distance(&mine, &theirs), distance(&mine, &scores(model, None, &samples)));
    println!("{method}: moved {moved:.4} nats a token, Ray's {apart:.6} from ours, KL {:.4}", outcome.kl_sample);
    assert!(moved > 0.02 && apart < moved / 20.0, "{method}: moved {moved}, apart {apart}");
}

#[test]
#[ignore = "needs Ray and PyTorch; run `make test-ray`"]
fn on_ray_the_reference_trainer_makes_the_adapter_that_taod_makes() {
    let Some(ray) = ray() else { return };
    let folder = tempfile::tempdir().unwrap();
    for method in [Method::Raft, Method::Grpo, Method::Rloo, Method::Dpo, Method::Oapl] {
        expect_the_same_adapter(&ray, &tiny_model(), folder.path(), method, 0.01);
    }
}

#[test]
#[ignore = "needs Ray and PyTorch; run `make test-ray`"]
fn on_ray_smollm2_becomes_what_taod_makes_of_it() {
    let (Some(ray), Some(models)) = (ray(), harness::models()) else { return };
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("base");
    python(&ray, "tools/reference/gguf_to_hf.py", &[&models.join("SmolLM2-135M-Instruct.Q4_1.gguf"), &base]);
    for method in [Method::Raft, Method::Grpo] {
        expect_the_same_adapter(&ray, &base, folder.path(), method, 5e-4);
    }
}

/// Without an adapter to go on from, and through the whole program.
#[test]
#[ignore = "needs Ray and PyTorch; run `make test-ray`"]
fn a_fresh_adapter_of_the_reference_trainer_is_accepted_and_learns() {
    let Some(ray) = ray() else { return };
    let folder = tempfile::tempdir().unwrap();
    let submit = harness::root().join("tools/trainers/ray_submit.py");
    let (ray, submit, base) = (ray.display(), submit.display(), tiny_model());
    script(folder.path(), &format!("exec {ray} {submit} --model {} \"$@\"\n", base.display()));
    let words = arguments();
    let words: Vec<&str> = words.iter().map(String::as_str).chain(["--json"]).collect();
    let rate = ("TAOD__TUNING__LEARNING_RATE", "0.01");
    let outcome = harness::taod_in(folder.path(), &words, &[rate, ("TAOD__TUNING__EPOCHS", "6")]).code(0);
    let told: Value = serde_json::from_str(&outcome.out).unwrap();
    assert!(told["kl_sample"].as_f64().unwrap() > 0.0, "{told}");
    let losses = outcome.err.lines().find_map(|line| line.strip_prefix("ray_train: trained ")).unwrap();
    let losses: Value = serde_json::from_str(losses).unwrap();
    let losses: Vec<f64> = losses["losses"].as_array().unwrap().iter().map(|loss| loss.as_f64().unwrap()).collect();
    assert!(losses.len() == 6 && losses[5] < losses[0], "{losses:?}");
}

#[test]
#[ignore = "needs Ray and PyTorch; run `make test-ray`"]
fn a_job_on_ray_does_not_outlive_the_taod_that_wanted_it() {
    let (Some(ray), Some(models)) = (ray(), harness::models()) else { return };
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("base");
    python(&ray, "tools/reference/gguf_to_hf.py", &[&models.join("SmolLM2-135M-Instruct.Q4_1.gguf"), &base]);
    let model = Model::load(&base.display().to_string()).unwrap();
    // A trainer that does nothing leaves the frozen dataset.
    let settings = Settings { command: vec!["true".into()], ..Settings::default() };
    tune(&model, &drawn(&model), None, &settings, 7, folder.path(), &Progress::silent()).unwrap_err();
    let out = folder.path().join("made");
    std::fs::create_dir(&out).unwrap();
    let seen = python(&ray, "tests/tools/ray_jobs.py", &[&base, &folder.path().join("dataset"), &out]);
    assert_eq!(
        seen.split_whitespace().collect::<Vec<_>>(),
        ["orphaned", "taken-over", "closed", "terminated", "trained"]
    );
    Adapter::load(&out, &model).unwrap();
}
