//! A night on a small log: a state folder with synthetic calls in its table, a config for a tiny random model, and the
//! round's real process on them.

use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value, json};
use taod::record::{Message, derive_seed, prompt_hash};
use taod::table::{Name, Tables};

use super::{Outcome, root};

/// What a child that ended by SIGKILL is said to have ended with.
pub(crate) const KILLED: i32 = -9;

/// Workloads whose rules a random model passes now and then, one without rules, and everything as small as it goes. The
/// gate looks three times or more and never gives up early, so that a night has several blocks.
const CONFIG: &str = r#"
[round]
seed = 7

[dataset]
train_below = 40
gate_below = 80
min_train_prompts = 8

[candidates]
samples_per_prompt = 4
max_tokens = 12
chunk_prompts = 16

[decoding]
max_tokens = 12

[rewards]
train = ["rules"]
gate = ["rules"]

[tuning]
rank = 4
alpha = 8.0
learning_rate = 0.01
warmup_steps = 1
epochs = 1
checkpoint_steps = 2
max_kl = 100.0
min_entropy = 0.0

[gate]
block_size = 16
futility = -50.0
futility_alpha = 1e-12
alpha = 0.001

[[workload]]
name = "vowel"
rules = [{ kind = "regex_must", pattern = "[aeiou]" }]

[[workload]]
name = "no-digit"
house_rules = "Use no digits."
rules = [{ kind = "regex_must_not", pattern = "[0-9]" }]

[[workload]]
name = "short"
rules = [{ kind = "length", unit = "characters", max = 14 }]

[[workload]]
name = "free"
"#;

/// A section by which prompts are made: a random model ends a text of its own now and then.
pub(crate) const MAKING: &str = r#"
[dataset.synthetic]
below = 22
examples = 1
waves = 2
max_tokens = 200
"#;

/// An environment under which the gate lets an adapter pass that a random model learns something from ([`promotable`]).
pub(crate) const GENEROUS: [(&str, &str); 22] = [
    ("TAOD__CANDIDATES__SAMPLES_PER_PROMPT", "8"),
    ("TAOD__TUNING__LEARNING_RATE", "0.1"),
    ("TAOD__TUNING__EPOCHS", "10"),
    ("TAOD__TUNING__RANK", "16"),
    ("TAOD__TUNING__ITERATIONS", "3"),
    ("TAOD__TUNING__MAX_KL", "10000"),
    ("TAOD__GATE__SAMPLES", "8"),
    ("TAOD__GATE__ALPHA", "0.5"),
    ("TAOD__GATE__CHALLENGERS", "1"),
    ("TAOD__GATE__MAX_NIGHTS", "1"),
    ("TAOD__GATE__GUARDRAILS__MIN_PROMPTS", "8"),
    ("TAOD__GATE__GUARDRAILS__LENGTH_RATIO_MIN", "0.13"),
    ("TAOD__GATE__GUARDRAILS__LENGTH_RATIO_MAX", "7.9"),
    ("TAOD__GATE__GUARDRAILS__KL_MEAN_MAX", "900"),
    ("TAOD__GATE__GUARDRAILS__KL_TOKEN_LIMIT", "900"),
    ("TAOD__GATE__GUARDRAILS__KL_ROUND_MAX", "900"),
    ("TAOD__GATE__GUARDRAILS__COST_RATIO_MAX", "7.9"),
    ("TAOD__GATE__GUARDRAILS__BEHAVIOUR_TOLERANCE", "0.99"),
    ("TAOD__GATE__GUARDRAILS__QUALITY_TOLERANCE", "900"),
    ("TAOD__GATE__GUARDRAILS__QUALITY_RANGE", "1000"),
    ("TAOD__GATE__GUARDRAILS__WORKLOAD_TOLERANCE", "0.99"),
    ("TAOD__GATE__GUARDRAILS__WORKLOAD_MIN_PROMPTS", "1"),
];

/// One call of the log.
#[derive(Debug, Clone)]
pub(crate) struct Call {
    pub workload: Option<String>,
    pub text: String,
    /// A picture stands beside the text, which no chat template of a text model writes.
    pub has_image: bool,
}

impl Call {
    /// Returns a call of a workload.
    pub(crate) fn new(workload: &str, text: impl Into<String>) -> Self {
        Call { workload: Some(workload.to_string()), text: text.into(), has_image: false }
    }

    /// Returns the call's messages.
    pub(crate) fn messages(&self) -> Vec<Message> {
        let mut message = Message::text("user", &self.text);
        if self.has_image {
            let image = json!({"type": "image_url", "image_url": {"url": "https://example.com/cat.png"}});
            let parts = json!([{"type": "text", "text": self.text}, image]);
            message.content = serde_json::from_value(parts).unwrap();
        }
        vec![message]
    }
}

/// Returns `n` calls over the workloads with rules; every text holds a marker of its own ([`marker`]).
pub(crate) fn calls(n: usize) -> Vec<Call> {
    let workloads = ["vowel", "no-digit", "short"];
    let text = |i: usize| format!("Compare {} with {:012x}.", marker(i), derive_seed(2, &[&i.to_string()]) >> 16);
    (0..n).map(|i| Call::new(workloads[i % workloads.len()], text(i))).collect()
}

/// Returns the string that only call `i` of [`calls`] holds.
pub(crate) fn marker(i: usize) -> String {
    format!("canary{:012x}", derive_seed(1, &[&i.to_string()]) >> 16)
}

/// A state folder and a config; both go with it.
pub(crate) struct Night {
    folder: tempfile::TempDir,
}

impl Night {
    /// Makes a state whose table `queries` holds these calls.
    pub(crate) fn new(calls: &[Call]) -> Self {
        let night = Night { folder: tempfile::tempdir().unwrap() };
        let paths = format!("[state]\ndir = {:?}\n[model]\npath = {:?}\n", night.state(), model());
        std::fs::write(night.config(), paths + CONFIG).unwrap();
        night.append(calls);
        night
    }

    /// Adds sections to the config.
    pub(crate) fn set(&self, more: &str) {
        let text = std::fs::read_to_string(self.config()).unwrap();
        std::fs::write(self.config(), format!("{more}\n{text}")).unwrap();
    }

    /// Returns the folder that holds all that a round leaves.
    pub(crate) fn state(&self) -> PathBuf {
        self.folder.path().join("state")
    }

    /// Returns the config file.
    pub(crate) fn config(&self) -> PathBuf {
        self.folder.path().join("taod.toml")
    }

    fn append(&self, calls: &[Call]) {
        let rows: Vec<Value> = calls.iter().enumerate().map(|(offset, call)| row(offset, call)).collect();
        let tables = self.tables();
        block_on(async {
            let mut queries = tables.open_one(Name::Queries).await.unwrap();
            if !rows.is_empty() {
                queries.append_rows(&rows, &[]).await.unwrap();
            }
        });
    }

    /// Returns the tables of the state.
    pub(crate) fn tables(&self) -> Tables {
        Tables::open(&self.state().join("tables")).unwrap()
    }

    /// Runs the round's process to its end; a parent, this one, holds its standard input open.
    pub(crate) fn worker(&self, arguments: &[&str], environment: &[(&str, &str)]) -> Outcome {
        let inherited = std::env::vars_os().filter(|(name, _)| !name.to_string_lossy().starts_with("TAOD_"));
        let mut child = Command::new(env!("CARGO_BIN_EXE_taod"))
            .arg("round-worker")
            .args(arguments)
            .arg("--config")
            .arg(self.config())
            .current_dir(self.folder.path())
            .env_clear()
            .envs(inherited)
            .envs(environment.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // Taken out and held: waiting would close it and so tell the child that its parent is gone.
        let lifeline = child.stdin.take();
        let output = child.wait_with_output().unwrap();
        drop(lifeline);
        Outcome {
            code: output.status.code().or(output.status.signal().map(|signal| -signal)).unwrap(),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// Runs a round until it is killed at a crash point.
    pub(crate) fn kill_at(&self, point: &str, arguments: &[&str]) {
        self.worker(arguments, &[("TAOD_CRASH_AT", point)]).code(KILLED);
    }

    /// Returns all rows of a table.
    pub(crate) fn rows(&self, name: Name) -> Vec<Value> {
        let tables = self.tables();
        block_on(async { tables.open_one(name).await.unwrap().rows(None).await.unwrap() })
    }

    /// Returns a JSON file of the first round.
    pub(crate) fn json(&self, path: &str) -> Value {
        let path = self.round().join(path);
        let text = std::fs::read(&path).unwrap_or_else(|e| panic!("cannot read {}: {e}", path.display()));
        serde_json::from_slice(&text).unwrap()
    }

    /// Returns the prompts of a split of the first round.
    pub(crate) fn prompts(&self, split: &str) -> Vec<taod::dataset::Prompt> {
        let text = std::fs::read_to_string(self.round().join(format!("dataset/{split}.jsonl"))).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// Returns the folder of the first round.
    pub(crate) fn round(&self) -> PathBuf {
        self.state().join("rounds/round-00001")
    }

    /// Returns the bytes of all registered adapters by their path; not their manifests, which hold the time.
    pub(crate) fn adapters(&self) -> Vec<(String, Vec<u8>)> {
        let mut files = bytes_below(&self.state().join("registry/adapters"));
        files.retain(|(path, _)| !path.ends_with("manifest.json"));
        files
    }
}

/// Returns a night on what a random model learns at all, fewer digits: it promotes under [`GENEROUS`].
pub(crate) fn promotable() -> Night {
    let mut calls = calls(300);
    calls
        .iter_mut()
        .filter(|c| c.workload.as_deref() == Some("vowel"))
        .for_each(|c| c.workload = Some("no-digit".into()));
    let night = Night::new(&calls);
    // Where rules bound the length, the guardrail asks for nothing else: by how much random answers shrink is chance. All keep
    // these bounds.
    let bound = "{ kind = \"length\", unit = \"characters\", max = 1000 }";
    let mut config = std::fs::read_to_string(night.config()).unwrap();
    for (from, to) in [
        ("pattern = \"[0-9]\" }]", format!("pattern = \"[0-9]\" }}, {bound}]")),
        ("max = 14", "max = 1000".to_string()),
        ("name = \"free\"\n", format!("name = \"free\"\nrules = [{bound}]\n")),
    ] {
        assert!(config.contains(from), "{from} is not in {config}");
        config = config.replace(from, &to);
    }
    std::fs::write(night.config(), config).unwrap();
    night
}

/// Returns the folder of the tiny random model; its context is 512 tokens.
pub(crate) fn model() -> PathBuf {
    root().join("tests/fixtures/models/tiny-llama")
}

/// Registers the tiny model's adapter under another scale, which is another adapter, and returns its version. `adapters` runs
/// `taod adapters` with these arguments; `folder` gets the adapter's files.
pub(crate) fn register_scaled(folder: &Path, alpha: u32, adapters: impl Fn(&[&str]) -> Outcome) -> String {
    let (from, folder) = (root().join("tests/fixtures/models/tiny-llama-lora"), folder.join(format!("alpha-{alpha}")));
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::copy(from.join("adapter_model.safetensors"), folder.join("adapter_model.safetensors")).unwrap();
    let text = std::fs::read_to_string(from.join("adapter_config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    config["lora_alpha"] = json!(alpha);
    std::fs::write(folder.join("adapter_config.json"), config.to_string()).unwrap();
    let import = ["import", folder.to_str().unwrap(), "--register-only", "--reason", "a test"];
    adapters(&import).code(0).out.split(' ').next().unwrap().to_owned()
}

/// Returns all files below a folder with their bytes, sorted by their path in it.
pub(crate) fn bytes_below(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap().map(Result::unwrap) {
        let name = entry.file_name().into_string().unwrap();
        match entry.path().is_dir() {
            true => files.extend(bytes_below(&entry.path()).into_iter().map(|(n, b)| (format!("{name}/{n}"), b))),
            false => files.push((name, std::fs::read(entry.path()).unwrap())),
        }
    }
    files.sort();
    files
}

fn row(offset: usize, call: &Call) -> Value {
    let messages = call.messages();
    json!({
        "topic": "calls", "partition": 0, "offset": offset, "record_index": 0,
        "event_time": "2026-05-01T12:00:00Z", "ingest_date": "2026-05-01", "kind": "call",
        "workload": call.workload, "status": 200, "messages": messages, "params": {}, "response": "fine",
        "prompt_hash": prompt_hash(&messages, None), "format": "openai", "redacted": false, "train_ok": true,
        "sample_weight": 1.0, "truncated": false, "taod_version": "0", "config_hash": "none", "extra": {},
    })
}

fn block_on<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap().block_on(work)
}
