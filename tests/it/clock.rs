//! A clock that is set back under a running daemon, by an hour and by a day: libfaketime stands in for the clock on the wall, and
//! the steady one goes on, as in the kernel. Ingestion cannot be looked at so: under libfaketime Kafka's client gets no record at all,
//! wherever the clock stands.

use std::path::{Path, PathBuf};
use std::process::Command;

use chrono::{DateTime, DurationRound, TimeDelta, Timelike, Utc};
use serde_json::Value;
use taod::query_log::embedded::EmbeddedBroker;
use taod::registry::Registry;
use taod::table::Name;

use crate::harness::site::port;
use crate::harness::{has, night::Night};
use crate::operations::{Running, live, until};

/// The clock of a process and of those below it.
struct Clock {
    library: PathBuf,
    file: PathBuf,
}

impl Clock {
    /// Returns one, or nothing where the library is not here.
    fn new(folder: &Path) -> Option<Self> {
        let below = std::fs::read_dir("/usr/lib").into_iter().flatten().flatten();
        let library = below.map(|entry| entry.path().join("faketime/libfaketimeMT.so.1")).find(|path| path.is_file());
        has("faketime", library.is_some(), "install Debian's package faketime").then_some(())?;
        Some(Clock { library: library?, file: folder.join("clock") })
    }

    /// Sets it so that it shows `time` now.
    fn set(&self, time: DateTime<Utc>) {
        let offset = (time - Utc::now()).as_seconds_f64();
        let beside = self.file.with_extension("new");
        std::fs::write(&beside, format!("{offset:+.3}\n")).unwrap();
        std::fs::rename(beside, &self.file).unwrap();
    }

    fn give(&self, command: &mut Command) {
        command.env("LD_PRELOAD", &self.library).env("FAKETIME_TIMESTAMP_FILE", &self.file);
        command.env("FAKETIME_CACHE_DURATION", "1").env("FAKETIME_DONT_FAKE_MONOTONIC", "1").env("NO_FAKE_STAT", "1");
    }
}

/// A daemon whose clock can be set, with a round each day at `night`.
struct Stage {
    clock: Clock,
    night: Night,
    _broker: EmbeddedBroker,
    _daemon: Running,
    log: PathBuf,
    page: u16,
}

impl Stage {
    /// Starts it ten minutes before its first night.
    fn start(first: DateTime<Utc>, folder: &Path) -> Option<Self> {
        let clock = Clock::new(folder)?;
        clock.set(first - TimeDelta::minutes(10));
        let broker = EmbeddedBroker::start("live", 1).unwrap();
        let (night, page) = (live(&broker), port());
        let config = std::fs::read_to_string(night.config()).unwrap();
        let config = config.replace("127.0.0.1:0", &format!("127.0.0.1:{page}"));
        let cron = format!("{} {} * * *", first.minute(), first.hour());
        std::fs::write(night.config(), format!("[schedule]\ncron = \"{cron}\"\n{config}")).unwrap();
        let log = night.config().with_extension("log");
        let mut command = Command::new(env!("CARGO_BIN_EXE_taod"));
        command.args(["run", "--log", "info,taod::daemon=debug", "--config"]).arg(night.config());
        clock.give(&mut command);
        let daemon = Running::spawn(&mut command, &log);
        Some(Stage { clock, night, _broker: broker, _daemon: daemon, log, page })
    }

    /// Returns how often the daemon said something.
    fn said(&self, words: &str) -> usize {
        std::fs::read_to_string(&self.log).unwrap().matches(words).count()
    }

    /// Waits until the daemon has said something more often than before.
    fn says_again(&self, words: &str, before: usize) {
        until(words, &self.log, || (self.said(words) > before).then_some(()));
    }

    /// Sets the clock, and waits until the daemon has looked at its schedule again.
    fn set(&self, time: DateTime<Utc>) {
        let before = self.said(WAITING);
        self.clock.set(time);
        self.says_again(WAITING, before);
    }

    fn get(&self, path: &str) -> String {
        let url = format!("http://127.0.0.1:{}{path}", self.page);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async { reqwest::get(url).await.unwrap().error_for_status().unwrap().text().await.unwrap() })
    }

    /// Returns when the next round is due, as the metrics tell it.
    fn next(&self) -> i64 {
        let metrics = self.get("/metrics");
        let told = metrics.lines().find_map(|line| line.strip_prefix("taod_round_next_timestamp_seconds "));
        told.unwrap().parse::<f64>().unwrap() as i64
    }

    fn rounds(&self) -> Vec<String> {
        let rounds = std::fs::read_dir(self.night.state().join("rounds")).unwrap().flatten();
        let mut names: Vec<String> = rounds.map(|entry| entry.file_name().into_string().unwrap()).collect();
        names.retain(|name| name.starts_with("round-"));
        names.sort();
        names
    }

    /// Runs a command of taod's by the same clock.
    fn run(&self, arguments: &[&str]) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_taod"));
        self.clock.give(command.args(arguments).arg("--config").arg(self.night.config()));
        let ran = command.output().unwrap();
        assert!(ran.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&ran.stderr));
    }
}

const WAITING: &str = "waiting for the next round";
const ENDED: &str = "the round ended";
const DAY: TimeDelta = TimeDelta::days(1);

#[test]
fn a_clock_that_is_set_back_brings_no_second_round_loses_no_lease_and_changes_no_order() {
    let folder = tempfile::tempdir().unwrap();
    let first = Utc::now().duration_trunc(TimeDelta::minutes(1)).unwrap() + TimeDelta::hours(2);
    let Some(stage) = Stage::start(first, folder.path()) else { return };
    until("the schedule", &stage.log, || (stage.said(WAITING) > 0).then_some(()));
    assert_eq!(stage.next(), first.timestamp());
    // A jump costs the lease for some seconds, and a new daemon catches up with nothing.
    stage.clock.set(first - TimeDelta::seconds(20));
    stage.says_again(ENDED, 0);

    // An hour, and a day: the night that was had does not come again.
    let second = first + DAY;
    stage.set(first - TimeDelta::minutes(55));
    assert_eq!(stage.next(), second.timestamp());
    stage.set(first - DAY + TimeDelta::minutes(5));
    assert_eq!(stage.next(), second.timestamp());
    // What people decide under that clock is later all the same.
    for command in ["freeze", "thaw"] {
        stage.run(&["gate", command, "--reason", "a test", "--by", "olga"]);
    }
    decisions_are_in_order(&stage);

    // The second night comes when it is time, once.
    let before = stage.said(ENDED);
    stage.clock.set(second - TimeDelta::seconds(20));
    stage.says_again(ENDED, before);
    assert_eq!(stage.rounds(), ["round-00001", "round-00002"]);

    no_duration_is_negative(&stage);
    // The daemon is killed: under libfaketime Kafka's client does not come to an end, either.
}

fn decisions_are_in_order(stage: &Stage) {
    let registry = Registry::open(&stage.night.state().join("registry"), &Default::default()).unwrap();
    let times: Vec<i64> = registry.history().unwrap().iter().map(|event| event.time_us).collect();
    assert!(times.len() >= 3 && !times.is_sorted(), "the clock was not set back between decisions: {times:?}");
    let told: Value = serde_json::from_str(&stage.get("/api/v1/decisions")).unwrap();
    let list = told["items"].as_array().unwrap_or_else(|| panic!("{told}"));
    let kinds: Vec<&str> = list.iter().map(|decision| decision["kind"].as_str().unwrap()).collect();
    assert_eq!(kinds.first_chunk::<3>(), Some(&["thawed", "frozen", "registered"]), "{told}");
}

fn no_duration_is_negative(stage: &Stage) {
    let metrics = stage.get("/metrics");
    let samples = metrics.lines().filter(|line| !line.starts_with('#') && line.contains("_seconds"));
    let negative: Vec<&str> = samples.filter(|line| line.rsplit(' ').next().unwrap().starts_with('-')).collect();
    assert!(negative.is_empty(), "{negative:?}");
    for row in stage.night.rows(Name::Rounds) {
        let stages: Value = match row["stages"].as_str() {
            Some(text) => serde_json::from_str(text).unwrap(),
            None => row["stages"].clone(),
        };
        let seconds = stages.as_array().into_iter().flatten().filter_map(|stage| stage["seconds"].as_f64());
        assert!(seconds.clone().all(|seconds| seconds >= 0.0), "{stages}");
    }
}
