//! What an operator trusts at night: a round that ends or pauses within its limits, one that hangs, a reload, a backup.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rdkafka::ClientConfig;
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use serde_json::{Value, json};
use taod::query_log::embedded::EmbeddedBroker;
use taod::table::Name;

use crate::harness::night::{Night, bytes_below, calls};
use crate::harness::{taod_in, text};

/// Exit code of a round that was paused.
const PAUSED: i32 = 75;
/// How long a test waits for what another process does; a night of an unoptimised build on a busy machine takes minutes.
const PATIENCE: Duration = Duration::from_secs(600);

/// Returns the names of what a folder of the first round holds.
fn names(night: &Night, folder: &str) -> Vec<String> {
    bytes_below(&night.round().join(folder)).into_iter().map(|(name, _)| name).collect()
}

#[test]
fn a_round_that_may_cost_little_ends_early_with_an_adapter_that_the_gate_judges() {
    let night = Night::new(&calls(120));
    // Less than the first of three chunks takes: the least there is.
    let outcome = night.worker(&[], &[("TAOD__ROUND__MAX_TOKENS", "10")]);
    assert!([0, 2, 3].contains(&outcome.code), "{}", outcome.err);
    let manifest = night.json("pass-1/candidates/manifest.json");
    assert_eq!(manifest["chunks"], 1);
    let (prompts, cut) = (manifest["prompts"].as_u64().unwrap(), manifest["cut"].as_u64().unwrap());
    assert_eq!(cut, prompts - 16, "one chunk of 16 prompts was drawn");
    assert!(!night.round().join("pass-2").exists(), "no further pass was begun");
    let outcome = night.json("outcome.json");
    let trial = outcome["outcome"]["trial"].as_str();
    assert!(trial.is_some(), "the gate judged what there was: {outcome}");
    assert!(night.rows(Name::GateSteps).len() >= 16, "and asked its prompts");
}

#[test]
fn a_paused_round_goes_on_to_the_same_bytes_as_one_that_was_not() {
    let (whole, night) = (Night::new(&calls(120)), Night::new(&calls(120)));
    whole.worker(&[], &[]);
    // The time is over before it begins: it ends its first piece, and the second start finds nothing that it may do.
    for _ in 0..2 {
        night.worker(&["--until", "2026-01-01T00:00:00Z"], &[]).code(PAUSED);
    }
    assert!(names(&night, "pass-1/candidates").len() < names(&whole, "pass-1/candidates").len());
    assert!(!night.round().join("outcome.json").exists());
    night.worker(&[], &[]);
    assert!(night.adapters() == whole.adapters(), "the adapter has other bytes");
    assert_eq!(night.rows(Name::GateSteps).len(), whole.rows(Name::GateSteps).len());
}

#[test]
fn a_round_of_a_closed_window_is_put_off_and_one_by_hand_is_not() {
    let night = Night::new(&calls(0));
    // A window of one minute, six hours from now.
    let start = chrono::Utc::now() + chrono::TimeDelta::hours(6);
    let end = start + chrono::TimeDelta::minutes(1);
    night.set(&format!("[schedule]\nwindow = \"{}-{}\"\n", start.format("%H:%M"), end.format("%H:%M")));
    let config = night.config();
    let run = |more: &[&str]| {
        let arguments = [&["round", "--once", "--config", config.to_str().unwrap()], more].concat();
        taod_in(config.parent().unwrap(), &arguments, &[])
    };
    run(&["--in-window"]).code(PAUSED);
    assert!(!night.round().exists());
    assert!(run(&[]).code(0).out.contains("skipped"));
}

#[test]
fn a_state_of_a_newer_taod_is_refused_and_one_of_the_version_before_goes_on() {
    let night = Night::new(&calls(0));
    night.worker(&[], &[]).code(0);
    let stamp = night.state().join("layout.json");
    std::fs::remove_file(&stamp).unwrap();
    night.worker(&[], &[]).code(0);
    assert!(stamp.is_file() && night.state().join("rounds/round-00002/outcome.json").is_file());
    std::fs::write(&stamp, json!({ "layout": 99, "taod": "9.0.0" }).to_string()).unwrap();
    let config = night.config();
    for command in [&["round", "--once"][..], &["run"], &["ingest"], &["table", "check"]] {
        let arguments = [command, &["--config", config.to_str().unwrap()]].concat();
        let outcome = taod_in(config.parent().unwrap(), &arguments, &[]);
        assert_eq!(outcome.code, 1, "{command:?}: {}", outcome.err);
        assert!(outcome.err.contains("was written by a newer taod (9.0.0"), "{command:?}: {}", outcome.err);
    }
    assert!(!night.state().join("rounds/round-00003").exists());
}

/// A running daemon; it ends with the value.
pub(crate) struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // A child that is gone already cannot be killed, and need not be.
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

impl Running {
    pub(crate) fn start(night: &Night, log: &Path, environment: &[(&str, &str)]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_taod"));
        Running::spawn(command.arg("run").arg("--config").arg(night.config()).envs(environment.iter().copied()), log)
    }

    /// Starts a daemon by another command; what it says goes to a file.
    pub(crate) fn spawn(command: &mut Command, log: &Path) -> Self {
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(std::fs::File::create(log).unwrap());
        Running(command.spawn().unwrap())
    }

    /// Returns the number of the process.
    pub(crate) fn id(&self) -> u32 {
        self.0.id()
    }

    /// Waits for its end and returns the exit code; `None` after a signal.
    pub(crate) fn ended(&mut self) -> Option<i32> {
        self.0.wait().unwrap().code()
    }

    pub(crate) fn signal(&self, name: &str) {
        let sent = Command::new("kill").args(["-s", name, &self.0.id().to_string()]).status().unwrap();
        assert!(sent.success());
    }
}

/// Looks until there is something, at most [`PATIENCE`].
pub(crate) fn until<T>(what: &str, log: &Path, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        let told = std::fs::read_to_string(log).unwrap_or_default();
        assert!(Instant::now() < deadline, "{what} did not come; the log says\n{told}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

pub(crate) fn says(log: &Path, part: &str) -> Option<()> {
    std::fs::read_to_string(log).is_ok_and(|text| text.contains(part)).then_some(())
}

pub(crate) fn log_call(broker: &EmbeddedBroker, text: &str) {
    let mut config = ClientConfig::new();
    let producer: BaseProducer = config.set("bootstrap.servers", broker.brokers()).create().unwrap();
    let call = json!({
        "request": { "model": "m", "messages": [{ "role": "user", "content": text }] },
        "response": { "choices": [{ "message": { "role": "assistant", "content": "hi" } }] },
    });
    let payload = call.to_string();
    let record = BaseRecord::<(), str>::to("live").partition(0).payload(&payload);
    producer.send(record).map_err(|(error, _)| error).unwrap();
    producer.flush(Duration::from_secs(10)).unwrap();
}

/// Returns a night whose daemon reads this broker, and owes a round since long ago.
pub(crate) fn live(broker: &EmbeddedBroker) -> Night {
    let night = Night::new(&calls(120));
    night.set(&format!(
        "[ingest.kafka]\nbrokers = \"{}\"\ntopic = \"live\"\n[admin]\nlisten = \"127.0.0.1:0\"\n[endpoint]\nurls = \
         [\"http://127.0.0.1:1\"]\nretries = 0\n",
        broker.brokers()
    ));
    night
}

/// Puts the start of a round far into the past, so that the next one is owed.
pub(crate) fn age(night: &Night, round: &str) {
    let folder = night.state().join("rounds").join(round);
    let mut plan: Value = serde_json::from_slice(&std::fs::read(folder.join("plan.json")).unwrap()).unwrap();
    plan["created_us"] = json!(1_000_000);
    std::fs::write(folder.join("plan.json"), plan.to_string()).unwrap();
}

#[test]
fn a_round_that_hangs_is_ended_by_its_watchdog_and_ingestion_goes_on_all_the_while() {
    let broker = EmbeddedBroker::start("live", 1).unwrap();
    let night = live(&broker);
    // A round of long ago that had nothing to do, so that another one is owed.
    night.worker(&[], &[("TAOD__REGISTRY__PROMOTION", "frozen")]).code(0);
    age(&night, "round-00001");
    let log = night.config().with_extension("log");
    let rows = |n: usize| (night.rows(Name::Queries).len() >= n).then_some(());
    let daemon = Running::start(&night, &log, &[("TAOD_STOP_AT", "dataset"), ("TAOD__ROUND__STALL_SECONDS", "15")]);
    let hung = night.state().join("rounds/round-00002/dataset/manifest.json");
    until("the round that was missed", &log, || hung.exists().then_some(()));
    log_call(&broker, "while it hangs");
    until("a row during the hang", &log, || rows(121));
    until("the watchdog", &log, || says(&log, "finished no piece of work for 15 s and was ended"));
    log_call(&broker, "after it was ended");
    until("a row after the hang", &log, || rows(122));
    assert!(!night.state().join("rounds/round-00002/outcome.json").exists(), "it is to be resumed");
    daemon.signal("TERM");
    until("the end of the daemon", &log, || says(&log, "stopping"));
}

#[test]
fn a_reload_takes_what_can_change_names_what_cannot_and_outlives_a_config_that_is_wrong() {
    let broker = EmbeddedBroker::start("live", 1).unwrap();
    let night = live(&broker);
    let log = night.config().with_extension("log");
    let daemon = Running::start(&night, &log, &[]);
    let in_force = night.state().join("config.toml");
    until("the config in force", &log, || in_force.exists().then_some(()));
    log_call(&broker, "hello");
    until("ingestion", &log, || (night.rows(Name::Queries).len() > 120).then_some(()));
    let config = std::fs::read_to_string(night.config()).unwrap();
    std::fs::write(night.config(), "[schedule]\ncron = 'never'\n").unwrap();
    daemon.signal("HUP");
    until("the refusal", &log, || says(&log, "the config was not reloaded"));
    let changed = config.replace("topic = \"live\"", "topic = \"other\"") + "[schedule]\nwindow = \"22:00-06:00\"\n";
    std::fs::write(night.config(), changed).unwrap();
    daemon.signal("HUP");
    until("the reload", &log, || says(&log, "the config was reloaded"));
    let told = std::fs::read_to_string(&log).unwrap();
    assert!(told.contains("ingest.kafka.topic") && told.contains("cannot change while the daemon runs"), "{told}");
    assert!(told.contains("schedule.window"), "{told}");
    let now: toml::Value = toml::from_str(&std::fs::read_to_string(&in_force).unwrap()).unwrap();
    assert_eq!(now["schedule"]["window"].as_str(), Some("22:00-06:00"));
    assert_eq!(now["ingest"]["kafka"]["topic"].as_str(), Some("live"));
}

/// Returns the shell blocks of a document.
fn blocks(document: &str) -> Vec<String> {
    document.split("```sh\n").skip(1).filter_map(|rest| rest.split("```").next()).map(str::to_owned).collect()
}

#[test]
fn the_runbook_of_a_restore_is_followed_word_for_word() {
    let night = Night::new(&calls(120));
    let outcome = night.worker(&[], &[]);
    assert!([0, 2, 3].contains(&outcome.code), "{}", outcome.err);
    let folder = night.config().parent().unwrap().to_path_buf();
    let programs = folder.join("bin");
    std::fs::create_dir(&programs).unwrap();
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_taod"), programs.join("taod")).unwrap();
    // There is no service manager here to stop and start what does not run.
    std::fs::write(programs.join("systemctl"), "#!/bin/sh\nexit 0\n").unwrap();
    std::fs::set_permissions(programs.join("systemctl"), std::fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", programs.display(), std::env::var("PATH").unwrap());
    let run = |script: &str| {
        let mut command = Command::new("bash");
        command.args(["-euo", "pipefail", "-c", script]).current_dir(&folder).env("PATH", &path);
        command.env("STATE", night.state()).env("BACKUP", folder.join("backup")).env("CONFIG", night.config());
        let output = command.output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{script}\n{said}");
        said
    };
    let scripts = blocks(&text("docs/runbooks/restore.md"));
    let [variables, backup, restore] = scripts.as_slice() else { panic!("{scripts:?}") };
    let before = bytes_below(&night.state());
    run(&format!("{variables}{backup}"));
    std::fs::remove_dir_all(night.state().join("registry")).unwrap();
    std::fs::write(night.state().join("tables/queries/_delta_log/00000000000000000001.json"), "damaged").unwrap();
    let said = run(&format!("{variables}{restore}"));
    assert!(said.contains("nothing is wrong"), "{said}");
    let after = bytes_below(&night.state());
    assert!(before == after, "the state is not what was backed up");
    // And it is a state that a night goes on with.
    let outcome = night.worker(&[], &[]);
    assert!([0, 2, 3].contains(&outcome.code), "{}", outcome.err);
    assert!(night.state().join("rounds/round-00002/outcome.json").exists());
}
