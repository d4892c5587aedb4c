//! Promotions into servers of other makings: the real llama.cpp and the real mistral.rs, each with proof by log-probs.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::routing::post;
use serde_json::Value;
use taod::engine::train::LoraMatrices;
use taod::engine::{Linear, LoraSpec, Model, save_peft};

use crate::harness::site::port;
use crate::harness::{self, Outcome, taod_in};

const SMOLLM2: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";

/// Returns the Python of an environment that has a server, and the folder of models.
fn engine(part: &str, environment: &str, remedy: &str) -> Option<(PathBuf, PathBuf)> {
    let models = harness::models()?;
    let python = harness::cache().join(environment).join("bin/python");
    harness::has(part, python.is_file(), remedy).then_some((python, models))
}

/// A child that goes with this.
struct Running(Child);

impl Running {
    /// Starts a script, waits until it says `ready`, and returns what stands after that. Its engine may say more before.
    fn start(python: &Path, script: &str, arguments: &[&Path]) -> (Running, String) {
        let mut command = Command::new(python);
        command.arg(harness::root().join("tests/tools").join(script)).args(arguments);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        while !line.starts_with("ready") {
            line.clear();
            assert!(output.read_line(&mut line).unwrap() > 0, "{script} ended before it was ready");
        }
        // What it says later is read, so that it never waits for a reader.
        std::thread::spawn(move || output.read_to_end(&mut Vec::new()));
        (Running(child), line.trim_start_matches("ready").trim().to_owned())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// Writes an adapter that changes the model clearly, another one for each seed.
fn adapter(model: &Model, folder: &Path, seed: u64) -> PathBuf {
    let spec =
        LoraSpec { rank: 8, alpha: 16.0, targets: vec![Linear::Q, Linear::K], use_rslora: true, ..LoraSpec::default() };
    let mut lora = LoraMatrices::fresh(model.config(), &spec, seed);
    for (at, value) in lora.values.iter_mut().skip(1).step_by(2).flatten().enumerate() {
        *value = (((at + seed as usize) * 7919 % 1013) as f32 / 1013.0 - 0.5) * 0.4;
    }
    let peft = folder.join(format!("peft-{seed}"));
    save_peft(&peft, model.identity(), &spec, &lora.tensors().unwrap()).unwrap();
    peft
}

/// A state and a config in a folder of their own.
struct Stage(tempfile::TempDir);

impl Stage {
    fn new(model: &Path, endpoint: &str) -> Stage {
        let stage = Stage(tempfile::tempdir().unwrap());
        stage.configure(model, endpoint);
        stage
    }

    fn configure(&self, model: &Path, endpoint: &str) {
        let (state, model) = (self.0.path().join("state"), model.display().to_string());
        let config = format!("[state]\ndir = {state:?}\n[model]\npath = {model:?}\n[endpoint]\n{endpoint}");
        std::fs::write(self.0.path().join("taod.toml"), config).unwrap();
    }

    fn adapters(&self, arguments: &[&str]) -> Outcome {
        self.taod(&[&["adapters"], arguments].concat())
    }

    fn taod(&self, arguments: &[&str]) -> Outcome {
        let arguments = [&["--config", "taod.toml"], arguments].concat();
        taod_in(self.0.path(), &arguments, &[("USER", "tester")])
    }

    fn register(&self, folder: &Path) -> String {
        let import = ["import", folder.to_str().unwrap(), "--register-only", "--reason", "a test"];
        self.adapters(&import).code(0).out.split(' ').next().unwrap().to_owned()
    }

    fn promote(&self, version: &str) -> Outcome {
        let promoted = self.adapters(&["promote", version, "--reason", "a test"]);
        println!("{}{}", promoted.out, promoted.err);
        promoted
    }
}

/// Keeps llama.cpp running and restarts it with every file of the folder when it is told to.
async fn hook(python: PathBuf, model: PathBuf, folder: PathBuf, port: u16) -> (String, Arc<Mutex<Option<Running>>>) {
    let server = Arc::new(Mutex::new(None));
    let (kept, port) = (server.clone(), PathBuf::from(port.to_string()));
    let restart = async move || {
        let (kept, arguments) = (kept.clone(), [model.clone(), folder.clone(), port.clone()]);
        let python = python.clone();
        let work = move || {
            let mut kept = kept.lock().unwrap();
            drop(kept.take());
            let arguments = arguments.each_ref().map(PathBuf::as_path);
            let (running, said) = Running::start(&python, "llama_cpp_server.py", &arguments);
            assert_eq!(said, "");
            *kept = Some(running);
        };
        tokio::task::spawn_blocking(work).await.unwrap();
    };
    restart.clone()().await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, Router::new().route("/", post(restart))).await.unwrap() });
    (url, server)
}

#[tokio::test(flavor = "multi_thread")]
async fn llama_cpp_gets_a_file_of_ours_and_its_scales_are_the_alias() {
    let Some((python, models)) = engine("llamacpp", "servers", "run `tools/setup.sh test`") else { return };
    let gguf = models.join(SMOLLM2);
    let published = tempfile::tempdir().unwrap();
    let port = port();
    let (hook, _server) = hook(python, gguf.clone(), published.path().to_owned(), port).await;
    let endpoint = format!(
        "kind = \"llamacpp\"\nalias = \"native\"\nurls = [\"http://127.0.0.1:{port}\"]\nhook = {hook:?}\n\
         load_timeout_seconds = 60\n[endpoint.publish]\nfolder = {:?}\n[endpoint.proof]\nprompts = 4\nmax_tokens = 12\n",
        published.path()
    );
    let stage = Stage::new(&gguf, &endpoint);
    let model = Model::load(&gguf.display().to_string()).unwrap();
    let (first, second) = (adapter(&model, stage.0.path(), 3), adapter(&model, stage.0.path(), 4));
    let (first, second) = (stage.register(&first), stage.register(&second));
    for version in [&first, &second] {
        let said = stage.promote(version).code(0).out;
        assert!(said.contains(&format!("answers as {version}")), "{said}");
    }
    let scales: Vec<Value> =
        reqwest::get(format!("http://127.0.0.1:{port}/lora-adapters")).await.unwrap().json().await.unwrap();
    let on: Vec<&Value> = scales.iter().filter(|one| one["scale"] == 1.0).collect();
    assert!(scales.len() == 2 && on.len() == 1, "{scales:?}");
    assert!(on[0]["path"].as_str().unwrap().contains(&second), "{scales:?}");
    let said = stage.adapters(&["rollback", "--reason", "a test"]).code(0).out;
    assert!(said.contains(&format!("answers as {first}")), "{said}");
    let said = stage.taod(&["doctor", "--only", "endpoint"]).code(0).out;
    assert!(said.contains("remembers no prompts"), "{said}");
}

#[test]
fn the_doctor_finds_out_that_llama_cpp_remembers_prompts() {
    let Some((python, models)) = engine("llamacpp", "servers", "run `tools/setup.sh test`") else { return };
    let (gguf, folder) = (models.join(SMOLLM2), tempfile::tempdir().unwrap());
    for (memory, code, says) in [("all", 1, "also under another adapter"), ("ram", 0, "asks with `cache_prompt`")] {
        let port = PathBuf::from(port().to_string());
        let _server = Running::start(&python, "llama_cpp_server.py", &[&gguf, folder.path(), &port, Path::new(memory)]);
        let endpoint = format!(
            "kind = \"llamacpp\"\nalias = \"native\"\nurls = [\"http://127.0.0.1:{}\"]\n[endpoint.publish]\nfolder = {:?}\n",
            port.display(),
            folder.path()
        );
        let said = Stage::new(&gguf, &endpoint).taod(&["doctor", "--only", "endpoint"]).code(code).out;
        assert!(said.contains(says) && said.contains("--no-cache-prompt --cache-ram 0"), "{said}");
    }
}

#[test]
#[ignore = "needs mistral.rs, minutes of it: `make test-full`"]
fn mistral_rs_replaces_a_name_by_compare_and_set() {
    let Some((python, models)) = engine("peft", "reference", "run `tools/setup.sh full` (6 GB)") else { return };
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("base");
    let script = harness::root().join("tools/reference/gguf_to_hf.py");
    assert!(Command::new(&python).arg(script).arg(models.join(SMOLLM2)).arg(&base).status().unwrap().success());
    let (_server, port) = Running::start(&python, "mistralrs_server.py", &[&base]);
    let endpoint = format!(
        "kind = \"mistralrs\"\nalias = \"inplace\"\nbase_model = \"default\"\nurls = [\"http://127.0.0.1:{port}\"]\n\
         [endpoint.proof]\nprompts = 2\nmax_tokens = 12\n"
    );
    let stage = Stage::new(&base, &endpoint);
    let model = Model::load(&base.display().to_string()).unwrap();
    let versions = [3, 4].map(|seed| stage.register(&adapter(&model, stage.0.path(), seed)));
    for version in &versions {
        let said = stage.promote(version).code(0).out;
        assert!(said.contains(&format!("answers as {version}")), "{said}");
    }
    let said = stage.adapters(&["rollback", "--reason", "a test"]).code(0).out;
    assert!(said.contains(&format!("answers as {}", versions[0])), "{said}");
    assert_eq!(stage.adapters(&["settle"]).code(0).out, "nothing was to be done\n");
}
