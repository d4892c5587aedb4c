//! Promotions by the real program into two real servers, killed at every step of the way.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};
use taod::crash::{CRASH_AT, Point};
use taod::registry::Registry;
use taod::table::{Name, Tables};

use crate::harness::night::register_scaled;
use crate::harness::{Outcome, root, taod_in};

/// What a promotion comes by: the intent; two loads and their step; the first proofs; the rehearsal; two moves and their step;
/// the second proofs; `current`, its step, the row, and the intent's end.
const POINTS: usize = 14;
/// Those of them after the first move: from there it goes forward.
const FORWARD: usize = 8;

fn fixture(name: &str) -> PathBuf {
    root().join("tests/fixtures/models").join(name)
}

/// `taod serve` on a port of its own.
struct Server {
    process: Child,
    url: String,
}

impl Server {
    fn start(adapters: &Path) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_taod"));
        command.arg("serve").arg("--model").arg(fixture("tiny-llama")).args(["--listen", "127.0.0.1:0"]);
        command.env("TAOD__SERVE__ADAPTER_ROOT", adapters).env("TAOD__SERVE__BASE_MODEL", "base");
        let mut process = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(process.stderr.take().unwrap()).lines();
        let address = |line: String| Some(line.split_once("address=")?.1.split_whitespace().next()?.to_owned());
        let url = lines.map_while(Result::ok).find_map(address).expect("the server says where it serves");
        Server { process, url: format!("http://{url}") }
    }

    /// Returns the greedy answer of `model`, or the status where there is none.
    async fn answer(&self, model: &str) -> Result<String, u16> {
        let messages = [json!({"role": "user", "content": "What makes a good question?"})];
        let body = json!({"model": model, "messages": messages, "max_tokens": 16, "temperature": 0.0});
        let request = reqwest::Client::new().post(format!("{}/v1/chat/completions", self.url)).json(&body);
        let response = request.send().await.unwrap();
        let status = response.status().as_u16();
        let body: Value = response.json().await.unwrap();
        body["choices"][0]["message"]["content"].as_str().map(str::to_owned).ok_or(status)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

/// Two servers and a state in one folder, with two versions registered and the first of them served.
struct Stage {
    folder: tempfile::TempDir,
    servers: [Server; 2],
    versions: [String; 2],
}

impl Stage {
    fn new(alias: &str) -> Stage {
        let folder = tempfile::tempdir().unwrap();
        let servers = [(); 2].map(|()| Server::start(folder.path()));
        let kind = if alias == "native" { "serve" } else { "vllm" };
        let config = format!(
            "[state]\ndir = {:?}\n[model]\npath = {:?}\n[endpoint]\nkind = \"{kind}\"\nalias = \"{alias}\"\n\
             urls = [{:?}, {:?}]\nretries = 0\n[endpoint.proof]\ntolerance = 0.002\nmax_tokens = 12\n",
            folder.path().join("state"),
            fixture("tiny-llama"),
            servers[0].url,
            servers[1].url
        );
        std::fs::write(folder.path().join("taod.toml"), config).unwrap();
        let mut stage = Stage { folder, servers, versions: Default::default() };
        stage.versions = [8, 32].map(|alpha| stage.register(alpha));
        stage.promote(0, "").code(0);
        stage
    }

    fn taod(&self, arguments: &[&str], crash_at: &str) -> Outcome {
        let arguments = [&["--config", "taod.toml"], arguments].concat();
        taod_in(self.folder.path(), &arguments, &[(CRASH_AT, crash_at), ("USER", "tester")])
    }

    /// Registers the fixture's adapter under another scale, which is another adapter.
    fn register(&self, alpha: u32) -> String {
        register_scaled(self.folder.path(), alpha, |arguments| self.taod(&[&["adapters"], arguments].concat(), ""))
    }

    fn promote(&self, version: usize, crash_at: &str) -> Outcome {
        self.taod(&["adapters", "promote", &self.versions[version], "--reason", "a test"], crash_at)
    }

    fn current(&self) -> String {
        let registry = Registry::open(&self.folder.path().join("state/registry"), &Default::default()).unwrap();
        assert_eq!(registry.intent().unwrap(), None);
        registry.current().unwrap().version
    }

    async fn rows(&self) -> usize {
        let tables = Tables::open(&self.folder.path().join("state/tables")).unwrap();
        let rows: Vec<Value> = tables.open_one(Name::Promotions).await.unwrap().rows(None).await.unwrap();
        rows.len()
    }

    /// Returns what clients get from each server.
    async fn served(&self) -> [Result<String, u16>; 2] {
        [self.servers[0].answer("production").await, self.servers[1].answer("production").await]
    }
}

/// Kills a promotion at each point it comes by. Clients get the old or the new version then, and what the next run makes
/// of it is what the registry and the table say.
async fn killed_everywhere(alias: &str, gap: bool) {
    let stage = Stage::new(alias);
    let old = stage.servers[0].answer(&stage.versions[0]).await.unwrap();
    stage.promote(1, "").code(0);
    let new = stage.servers[0].answer(&stage.versions[1]).await.unwrap();
    assert_ne!(old, new);
    stage.promote(0, "").code(0);
    let mut outcomes = Vec::new();
    for nth in 1.. {
        let rows = stage.rows().await;
        let point = format!("{}:{nth}", Point::DuringPromotion.name());
        let outcome = stage.promote(1, &point);
        if outcome.code != KILLED_BY_SIGNAL {
            outcome.code(0);
            break;
        }
        for got in stage.served().await {
            let is_gap = gap && got == Err(404);
            assert!(is_gap || got.as_ref() == Ok(&old) || got.as_ref() == Ok(&new), "{alias}, {point}: {got:?}");
        }
        stage.taod(&["adapters", "settle"], "").code(0);
        let current = stage.current();
        let (expected, version) = if current == stage.versions[1] { (&new, 1) } else { (&old, 0) };
        assert_eq!(current, stage.versions[version]);
        assert_eq!(stage.served().await, [Ok(expected.clone()), Ok(expected.clone())], "{alias}, {point}");
        assert_eq!(stage.rows().await - rows, version, "{alias}, {point}");
        assert_eq!(stage.taod(&["adapters", "settle"], "").code(0).out, "nothing was to be done\n", "{alias}, {point}");
        outcomes.push(version);
        if version == 1 {
            stage.promote(0, "").code(0);
        }
    }
    let forward = outcomes.iter().filter(|version| **version == 1).count();
    assert_eq!(outcomes.len(), POINTS, "{alias}: {outcomes:?}");
    assert!(outcomes.is_sorted() && forward == FORWARD, "{alias}: {outcomes:?}");
}

/// The harness' word for a child without an exit code.
const KILLED_BY_SIGNAL: i32 = -1;

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn a_promotion_killed_at_any_step_leaves_the_old_or_the_new_version_and_is_settled() {
    let runs = [("native", false), ("inplace", false), ("reload", true)];
    for run in runs.map(|(alias, gap)| tokio::spawn(killed_everywhere(alias, gap))) {
        run.await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_restarts_gets_the_served_version_back() {
    let mut stage = Stage::new("native");
    let served = stage.served().await;
    let url = stage.servers[1].url.clone();
    // The restarted server is another one behind the same address; here the address is what changes.
    stage.servers[1] = Server::start(stage.folder.path());
    assert_eq!(stage.servers[1].answer("production").await, Err(404));
    let config = stage.folder.path().join("taod.toml");
    let text = std::fs::read_to_string(&config).unwrap().replace(&url, &stage.servers[1].url);
    std::fs::write(&config, text).unwrap();
    let said = stage.taod(&["adapters", "settle"], "").code(0).out;
    assert_eq!(said, format!("{} has the served version again\n", stage.servers[1].url));
    assert_eq!(stage.served().await, served);
}
