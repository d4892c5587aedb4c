//! Servers in vLLM's dialect that a test can start, ask, and kill: a real vLLM, and `taod serve` in its place.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

use crate::harness;

/// What serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// `taod serve`, on the tiny model: fast enough for every run of the tests.
    Ours,
    /// vLLM on the CPU, on SmolLM2.
    Vllm,
}

/// The name of the base model at every server.
pub(crate) const BASE: &str = "smol";
/// Adapters that vLLM keeps in memory; one that fell out is read from its folder again.
pub(crate) const KEPT: usize = 3;

/// A server's process and all that it started; they are killed when this is dropped.
pub(crate) struct Server {
    process: Child,
    pub url: String,
}

impl Server {
    /// Starts a server of the model in `model`, which may load adapters below `adapters`, and waits until it serves.
    pub(crate) fn start(kind: Kind, model: &Path, adapters: &Path) -> Self {
        match kind {
            Kind::Ours => {
                let mut command = Command::new(env!("CARGO_BIN_EXE_taod"));
                command.args(["serve", "--listen", "127.0.0.1:0", "--model"]).arg(model);
                command
                    .env("TAOD__SERVE__ADAPTER_ROOT", adapters)
                    .env("TAOD__SERVE__BASE_MODEL", BASE)
                    .env("TAOD__SERVE__MAX_LORA_RANK", "16");
                Server::wait(command, |line| {
                    let (_, rest) = line.split_once("address=")?;
                    rest.split_whitespace().next().map(str::to_owned)
                })
            }
            Kind::Vllm => {
                let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
                let command = vllm(model, port);
                let address = format!("127.0.0.1:{port}");
                Server::wait(command, move |line| line.contains("startup complete").then(|| address.clone()))
            }
        }
    }

    /// Starts it in a group of its own, and waits for the line of standard error that tells its address.
    fn wait(mut command: Command, address: impl Fn(&str) -> Option<String>) -> Self {
        command.process_group(0).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut server = Server { process: command.spawn().unwrap(), url: String::new() };
        let mut lines = BufReader::new(server.process.stderr.take().unwrap());
        let mut said = String::new();
        while server.url.is_empty() {
            let from = said.len();
            assert!(lines.read_line(&mut said).unwrap() > 0, "the server ended before it served:\n{said}");
            let found = address(&said[from..]);
            server.url = found.map_or_else(String::new, |found| format!("http://{}", found.trim_end()));
        }
        // What nobody reads would stop it.
        std::thread::spawn(move || drop(lines.read_to_end(&mut Vec::new())));
        server
    }

    /// Kills it and all that it started, as a crash would.
    pub(crate) fn kill(&mut self) {
        let group = format!("-{}", self.process.id());
        Command::new("kill").args(["-s", "KILL", "--", &group]).stderr(Stdio::null()).status().unwrap();
        self.process.wait().unwrap();
    }

    /// Sends a request and returns status and answer.
    pub(crate) fn call(&self, path: &str, body: Option<&Value>) -> (u16, Value) {
        call(&format!("{}{path}", self.url), body)
    }

    /// Returns the names of what it serves.
    pub(crate) fn names(&self) -> Vec<String> {
        let (status, list) = self.call("/v1/models", None);
        assert_eq!(status, 200, "{list}");
        list["data"].as_array().unwrap().iter().map(|card| card["id"].as_str().unwrap().to_owned()).collect()
    }

    /// Asks `model` greedily; returns the ids and the log-probs of its answer.
    pub(crate) fn ask(&self, model: &str, question: &str) -> Result<(Vec<u32>, Vec<f32>), (u16, Value)> {
        let body = json!({"model": model, "messages": [{"role": "user", "content": question}], "max_tokens": 16,
            "temperature": 0.0, "logprobs": true, "return_token_ids": true});
        let (status, answer) = self.call("/v1/chat/completions", Some(&body));
        if status != 200 {
            return Err((status, answer));
        }
        let choice = &answer["choices"][0];
        let ids = serde_json::from_value(choice["token_ids"].clone()).unwrap();
        let content = choice["logprobs"]["content"].as_array().unwrap();
        Ok((ids, content.iter().map(|token| token["logprob"].as_f64().unwrap() as f32).collect()))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

fn call(url: &str, body: Option<&Value>) -> (u16, Value) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let client = reqwest::Client::new();
        let request = body.map_or_else(|| client.get(url), |body| client.post(url).json(body));
        let response = request.send().await.unwrap();
        let (status, text) = (response.status().as_u16(), response.text().await.unwrap());
        (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
    })
}

/// Returns the Python that has vLLM, where this machine has it.
pub(crate) fn python() -> Option<PathBuf> {
    let python = harness::cache().join("vllm/bin/python");
    harness::has("vllm", python.is_file(), "run `make test-vllm` (6 GB)").then_some(python)
}

fn vllm(model: &Path, port: u16) -> Command {
    let mut command = Command::new(harness::cache().join("vllm/bin/python"));
    command.args([
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--dtype",
        "float32",
        "--enforce-eager",
        "--enable-lora",
    ]);
    command.args(["--max-model-len", "512", "--max-lora-rank", "16", "--max-loras", "1", "--host", "127.0.0.1"]);
    command.args(["--served-model-name", BASE, "--max-cpu-loras", &KEPT.to_string(), "--port", &port.to_string()]);
    command.arg("--model").arg(model);
    command.envs([("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1"), ("VLLM_CPU_KVCACHE_SPACE", "1")]);
    // Nothing is fetched and nothing is told to anybody.
    command.envs([("VLLM_NO_USAGE_STATS", "1"), ("DO_NOT_TRACK", "1"), ("HF_HUB_OFFLINE", "1")]);
    command
}
