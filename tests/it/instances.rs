//! Two daemons beside one endpoint and over one log, each for a workload: what one does, the other does not notice.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use taod::table::Name;

use crate::harness::night::{Night, bytes_below, calls, marker, model, register_scaled};
use crate::harness::site::{Running, port, wait_for};
use crate::harness::{Outcome, taod_in};

/// The keeper of the log, whose own nights are of no interest, a server, and two daemons that read the log.
struct Stage {
    keeper: Night,
    url: String,
    port: u16,
    server: Option<Running>,
}

impl Stage {
    fn new() -> Stage {
        let (keeper, port) = (Night::new(&calls(180)), port());
        let mut stage = Stage { keeper, url: format!("http://127.0.0.1:{port}"), port, server: None };
        for name in ["vowel", "short"] {
            std::fs::write(stage.config(name), stage.text_for(name)).unwrap();
        }
        stage.restart_server();
        stage
    }

    fn folder(&self) -> PathBuf {
        self.keeper.config().parent().unwrap().to_path_buf()
    }

    fn config(&self, name: &str) -> PathBuf {
        self.folder().join(format!("{name}.toml"))
    }

    fn state(&self, name: &str) -> PathBuf {
        self.folder().join(name)
    }

    fn text_for(&self, name: &str) -> String {
        let text = std::fs::read_to_string(self.keeper.config()).unwrap();
        let dir = format!("dir = {:?}", self.keeper.state());
        let log = format!("dir = {:?}\nlog = {:?}", self.state(name), self.keeper.state().join("tables"));
        let filter = format!("[dataset]\nfilter = \"workload = '{name}'\"");
        let more = format!(
            "[registry]\nname_prefix = \"{name}\"\n[endpoint]\nurls = [\"{}\"]\nstable_name = \"for-{name}\"\n\
             retire_after_seconds = 0\nretries = 0\n[endpoint.proof]\ntolerance = 0.002\nmax_tokens = 12\n\
             [admin]\nlisten = \"127.0.0.1:0\"\n[schedule]\ncron = \"0 0 1 1 *\"\n",
            self.url
        );
        format!(
            "{more}\n{}",
            text.replace(&dir, &log)
                .replace("[dataset]", &filter)
                .replace("min_train_prompts = 8", "min_train_prompts = 4")
        )
    }

    fn restart_server(&mut self) {
        self.server = None;
        let mut command = Command::new(env!("CARGO_BIN_EXE_taod"));
        command.arg("serve").arg("--model").arg(model()).args(["--listen", &format!("127.0.0.1:{}", self.port)]);
        command.env("TAOD__SERVE__ADAPTER_ROOT", self.folder()).env("TAOD__SERVE__BASE_MODEL", "base");
        let log = self.folder().join("serve.log");
        self.server = Some(Running::start(&mut command, &log));
        wait_for(self.port, &log);
    }

    fn taod(&self, name: &str, arguments: &[&str]) -> Outcome {
        let config = self.config(name).display().to_string();
        taod_in(&self.folder(), &[arguments, &["--config", &config]].concat(), &[("USER", "tester")])
    }

    /// Registers the fixture's adapter under a scale.
    fn register(&self, name: &str, alpha: u32) -> String {
        register_scaled(&self.folder(), alpha, |arguments| self.taod(name, &[&["adapters"], arguments].concat()))
    }

    fn promote(&self, name: &str, version: &str) {
        self.taod(name, &["adapters", "promote", version, "--reason", "a test"]).code(0);
    }

    /// Returns where the stable names lead, and which adapters are loaded.
    fn served(&self) -> (Vec<(String, String)>, Vec<String>) {
        let get = |route: &str| -> Value { serde_json::from_str(&get(&format!("{}{route}", self.url))).unwrap() };
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let aliases = get("/v1/aliases")["data"].as_array().unwrap().clone();
        let aliases = aliases.iter().map(|alias| (text(&alias["name"]), text(&alias["target"]))).collect();
        let models = get("/v1/models")["data"].as_array().unwrap().clone();
        let mut loaded: Vec<String> =
            models.iter().filter(|model| !model["parent"].is_null()).map(|model| text(&model["id"])).collect();
        loaded.sort();
        (aliases, loaded)
    }
}

/// Returns the body that an address answers with.
fn get(url: &str) -> String {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { reqwest::get(url).await.unwrap().text().await.unwrap() })
}

fn holds(folder: &Path, needle: &str) -> Vec<String> {
    let holds = |(_, bytes): &(String, Vec<u8>)| bytes.windows(needle.len()).any(|window| window == needle.as_bytes());
    bytes_below(folder).into_iter().filter(holds).map(|(path, _)| path).collect()
}

#[test]
fn two_daemons_over_one_log_promote_at_one_endpoint_and_neither_touches_the_others() {
    let mut stage = Stage::new();
    let log = || stage.keeper.tables();
    let version = |name| {
        tokio::runtime::Runtime::new().unwrap().block_on(async { log().open_one(name).await.unwrap().version() })
    };
    let before = version(Name::Queries);
    // A night each, on its own traffic, in its own tables.
    for name in ["vowel", "short"] {
        let night = stage.taod(name, &["round", "--once"]);
        assert!([0, 2, 3].contains(&night.code), "{}: {}", night.code, night.err);
        let dataset = stage.state(name).join("rounds/round-00001/dataset");
        let mut prompts = 0;
        for split in ["train", "gate", "audit"] {
            let text = std::fs::read_to_string(dataset.join(format!("{split}.jsonl"))).unwrap();
            for line in text.lines() {
                let prompt: Value = serde_json::from_str(line).unwrap();
                assert_eq!(prompt["workload"], name, "{split}");
                prompts += 1;
            }
        }
        assert!(prompts > 30, "{name} has {prompts} prompts of 60");
        assert!(stage.state(name).join("tables/rounds").exists() && !stage.state(name).join("tables/queries").exists());
    }
    assert_eq!(version(Name::Queries), before, "nobody but its keeper writes the log");
    // The same weights in both registries are two names, each promoted under its own stable name.
    let [vowel, short] = ["vowel", "short"].map(|name| stage.register(name, 8));
    assert!(vowel.starts_with("vowel-") && short.starts_with("short-"));
    stage.promote("vowel", &vowel);
    stage.promote("short", &short);
    let next = stage.register("vowel", 32);
    stage.promote("vowel", &next);
    stage.taod("vowel", &["adapters", "settle"]).code(0);
    stage.taod("short", &["adapters", "settle"]).code(0);
    let names = |vowel: &str, short: &str| {
        vec![("for-short".to_owned(), short.to_owned()), ("for-vowel".to_owned(), vowel.to_owned())]
    };
    // The former version of the one is unloaded, the other one's stays though its own daemon would call it old.
    let mut loaded = vec![next.clone(), short.clone()];
    loaded.sort();
    assert_eq!(stage.served(), (names(&next, &short), loaded.clone()));
    // After a restart each puts back its own and nothing else.
    stage.restart_server();
    stage.taod("short", &["adapters", "settle"]).code(0);
    assert_eq!(stage.served().1, std::slice::from_ref(&short));
    stage.taod("vowel", &["adapters", "settle"]).code(0);
    assert_eq!(stage.served(), (names(&next, &short), loaded));
    stage.taod("vowel", &["adapters", "rollback", "--reason", "a test"]).code(0);
    assert_eq!(stage.served().0, names(&vowel, &short));
    let current = stage.taod("short", &["adapters", "list"]).code(0).out;
    assert!(current.contains(&format!("{short}  served")) && !current.contains("vowel-"), "{current}");
}

#[test]
fn a_daemon_that_finds_anothers_version_under_its_stable_name_leaves_it_and_says_so() {
    let stage = Stage::new();
    let vowel = stage.register("vowel", 8);
    stage.promote("vowel", &vowel);
    let [first, second] = [8, 32].map(|alpha| stage.register("short", alpha));
    stage.promote("short", &first);
    // The mistake: from now on both have one name.
    let text = std::fs::read_to_string(stage.config("short")).unwrap();
    std::fs::write(stage.config("short"), text.replace("\"for-short\"", "\"for-vowel\"")).unwrap();
    let says = [&vowel, "which this registry never made", "endpoint.stable_name", "--take-over"];
    stage.taod("short", &["adapters", "settle"]).refused(&says);
    stage.taod("short", &["adapters", "promote", &second, "--reason", "a test"]).refused(&says);
    let doctor = stage.taod("short", &["doctor", "--only", "endpoint"]).code(1).out;
    assert!(doctor.contains(&format!("leads to {vowel}, which this registry never made")), "{doctor}");
    let target = |stage: &Stage| stage.served().0.into_iter().find(|(name, _)| name == "for-vowel").unwrap().1;
    assert_eq!(target(&stage), vowel);
    // After an operator's word it is the other one that finds a stranger.
    stage.taod("short", &["adapters", "settle", "--take-over"]).code(0);
    assert_eq!(target(&stage), first);
    stage.taod("vowel", &["adapters", "settle"]).refused(&[&first, "which this registry never made"]);
    assert_eq!(target(&stage), first);
}

#[test]
fn the_log_is_its_keepers_to_change_and_readers_follow_its_erasures() {
    let stage = Stage::new();
    let night = stage.taod("vowel", &["round", "--once"]);
    assert!([0, 2, 3].contains(&night.code), "{}: {}", night.code, night.err);
    for (arguments, says) in [(&["ingest", "--until-idle"][..], "state.log"), (&["replay"], "state.log")] {
        let refused = stage.taod("vowel", arguments).code(64);
        assert!(refused.err.contains(says), "{}", refused.err);
    }
    stage.taod("vowel", &["table", "erase", "--where", "offset = 0"]).refused(&["state.log is another daemon's log"]);
    let maintained = stage.taod("vowel", &["table", "maintain", "--json"]).code(0).out;
    let reports: Value = serde_json::from_str(&maintained).unwrap();
    let tables: Vec<&str> =
        reports.as_array().unwrap().iter().map(|report| report["table"].as_str().unwrap()).collect();
    assert!(tables.contains(&"candidates") && !tables.contains(&"queries"), "{tables:?}");

    // Call 0 is of this workload.
    let rounds = stage.state("vowel").join("rounds");
    assert!(!holds(&rounds, &marker(0)).is_empty() && !holds(&rounds, &marker(3)).is_empty());
    let keeper = stage.keeper.config().display().to_string();
    let erased =
        taod_in(&stage.folder(), &["table", "erase", "--where", "offset = 0", "--json", "--config", &keeper], &[]);
    let receipt: Value = serde_json::from_str(erased.code(0).out.trim()).unwrap();
    assert_eq!(receipt["tables"]["queries"]["rows"], 1);
    assert!(!holds(&rounds, &marker(0)).is_empty(), "until the reader follows");
    stage.taod("vowel", &["table", "maintain"]).code(0);
    assert_eq!(holds(&rounds, &marker(0)), [""; 0]);
    assert!(!holds(&rounds, &marker(3)).is_empty(), "other prompts stay");
    let followed = std::fs::read_to_string(stage.state("vowel").join("erasures/followed.json")).unwrap();
    assert!(followed.contains(receipt["id"].as_str().unwrap()), "{followed}");
}

#[test]
fn a_daemon_that_reads_anothers_log_runs_without_a_broker() {
    let stage = Stage::new();
    let page = port();
    let text = std::fs::read_to_string(stage.config("vowel")).unwrap();
    std::fs::write(stage.config("vowel"), text.replace("127.0.0.1:0\"", &format!("127.0.0.1:{page}\""))).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_taod"));
    command.arg("run").arg("--config").arg(stage.config("vowel"));
    let log = stage.folder().join("run.log");
    let _daemon = Running::start(&mut command, &log);
    wait_for(page, &log);
    let said = || std::fs::read_to_string(&log).unwrap();
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    // It owns its lease and looks after the endpoint, where its stable name did not exist.
    while stage.served().0 != [("for-vowel".to_owned(), "base".to_owned())] {
        assert!(std::time::Instant::now() < deadline, "{}", said());
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    assert_eq!(get(&format!("http://127.0.0.1:{page}/readyz")), "ok\n", "{}", said());
    assert!(said().contains("another daemon stores the log"));
}
