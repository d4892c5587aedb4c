//! What goes wrong with a round at night, beside a daemon that has to go on: it is killed, the daemon is told to stop, it is
//! paused in the midst of its trial.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use taod::query_log::embedded::EmbeddedBroker;
use taod::table::Name;

use crate::harness::has;
use crate::harness::night::{KILLED, Night, calls};
use crate::operations::{Running, age, live, log_call, says, until};

/// The unit's TimeoutStopSec, of which a stop may take a fraction.
const STOP_WITHIN: Duration = Duration::from_secs(30);

/// Returns the state and the parent of a process.
fn state(id: u32) -> Option<(String, u32)> {
    let text = std::fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
    // They come after the name in brackets.
    let (_, rest) = text.rsplit_once(") ")?;
    let mut words = rest.split(' ');
    Some((words.next()?.to_owned(), words.next()?.parse().ok()?))
}

/// Returns the children of a process that have not ended.
pub(crate) fn children(parent: u32) -> Vec<u32> {
    let all = std::fs::read_dir("/proc").unwrap().flatten();
    let ids = all.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    ids.filter(|id| state(*id).is_some_and(|(state, of)| of == parent && state != "Z")).collect()
}

/// Returns the child of a process that has stopped itself, as it does at a point of `TAOD_STOP_AT`.
fn stopped_child(parent: u32) -> Option<u32> {
    children(parent).into_iter().find(|id| state(*id).is_some_and(|(state, _)| state == "T"))
}

pub(crate) fn is_running(id: u32) -> bool {
    // A child that nobody has waited for is gone, too.
    state(id).is_some_and(|(state, _)| state != "Z")
}

pub(crate) fn signal(id: u32, name: &str) {
    assert!(Command::new("kill").args(["-s", name, &id.to_string()]).status().unwrap().success());
}

/// Returns a night whose daemon owes a round: one of long ago had nothing to do.
fn owing(broker: &EmbeddedBroker) -> Night {
    let night = live(broker);
    night.worker(&[], &[("TAOD__REGISTRY__PROMOTION", "frozen")]).code(0);
    age(&night, "round-00001");
    night
}

#[test]
fn a_daemon_that_is_told_to_stop_ends_in_time_in_whatever_stage_its_round_is() {
    let broker = EmbeddedBroker::start("live", 1).unwrap();
    let night = owing(&broker);
    let log = night.config().with_extension("log");
    // A round that hangs there is the worst that a stop can meet. Each start goes on with what the one before left.
    for (at, stage) in
        ["dataset", "candidates-chunk", "adapter-checkpoint", "registered", "gate-block"].iter().enumerate()
    {
        let mut daemon = Running::start(&night, &log, &[("TAOD_STOP_AT", stage)]);
        let child = until(&format!("the round at {stage}"), &log, || stopped_child(daemon.id()));
        log_call(&broker, stage);
        until("a row meanwhile", &log, || (night.rows(Name::Queries).len() > 120 + at).then_some(()));
        let told = Instant::now();
        daemon.signal("TERM");
        assert_eq!(daemon.ended(), Some(0), "at {stage}: {}", std::fs::read_to_string(&log).unwrap());
        assert!(told.elapsed() < STOP_WITHIN, "at {stage} the stop took {:?}", told.elapsed());
        until("the end of the round's process", &log, || (!is_running(child)).then_some(()));
        assert!(!night.state().join("rounds/round-00002/outcome.json").exists(), "{stage}");
        age(&night, "round-00002");
    }
    let outcome = night.worker(&["--resume"], &[]);
    assert!([0, 2, 3].contains(&outcome.code), "{}", outcome.err);
}

#[test]
fn a_round_that_is_killed_as_for_memory_leaves_the_daemon_ingesting_and_is_resumed() {
    let broker = EmbeddedBroker::start("live", 1).unwrap();
    let night = owing(&broker);
    let log = night.config().with_extension("log");
    let mut daemon = Running::start(&night, &log, &[("TAOD_STOP_AT", "candidates-chunk")]);
    let child = until("the round", &log, || stopped_child(daemon.id()));
    // The kernel's killer sends the same signal, at no better moment.
    signal(child, "KILL");
    until("the failure", &log, || says(&log, "the round failed; the next one resumes it"));
    log_call(&broker, "after the kill");
    until("a row after the kill", &log, || (night.rows(Name::Queries).len() > 120).then_some(()));
    daemon.signal("TERM");
    assert_eq!(daemon.ended(), Some(0));
    let outcome = night.worker(&["--resume"], &[]);
    assert!([0, 2, 3].contains(&outcome.code), "{}", outcome.err);
    assert!(night.state().join("rounds/round-00002/outcome.json").exists());
}

/// A control group of its own that bounds memory, as the service manager makes one for a unit; it goes with the value.
struct MemoryGroup {
    folder: PathBuf,
    /// The files of its limit and of what it holds: version 2's names, or version 1's.
    names: Names,
}

struct Names {
    limit: &'static str,
    anonymous: &'static str,
    kills: &'static str,
}

const UNIFIED: Names = Names { limit: "memory.max", anonymous: "anon ", kills: "memory.events" };
const FIRST: Names = Names { limit: "memory.limit_in_bytes", anonymous: "total_rss ", kills: "memory.oom_control" };

impl MemoryGroup {
    /// Makes one, or returns nothing where this machine lets nobody.
    fn new() -> Option<Self> {
        let old = Path::new("/sys/fs/cgroup/memory");
        let (above, names) = if old.is_dir() { (old, FIRST) } else { (Path::new("/sys/fs/cgroup"), UNIFIED) };
        let folder = above.join(format!("taod-test-{}", std::process::id()));
        let group = std::fs::create_dir(&folder).ok().map(|()| MemoryGroup { folder, names });
        let group = group.filter(|group| group.folder.join(group.names.limit).exists());
        has("memory-cgroup", group.is_some(), "run as root where the control groups of memory may be written")
            .then_some(())?;
        group
    }

    fn procs(&self) -> PathBuf {
        self.folder.join("cgroup.procs")
    }

    /// Returns the number behind a name in one of its files.
    fn number(&self, file: &str, name: &str) -> u64 {
        let text = std::fs::read_to_string(self.folder.join(file)).unwrap();
        text.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().parse().unwrap()
    }

    /// Leaves so much room above what is held now; the page cache is given up first.
    fn leave(&self, bytes: u64) {
        let limit = self.number("memory.stat", self.names.anonymous) + bytes;
        std::fs::write(self.folder.join(self.names.limit), limit.to_string()).unwrap();
    }

    /// Returns how many processes the kernel has killed in it for memory.
    fn kills(&self) -> u64 {
        self.number(self.names.kills, "oom_kill ")
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        // Killed processes leave a moment later; an empty group that stays costs nothing.
        let deadline = Instant::now() + Duration::from_secs(10);
        while std::fs::remove_dir(&self.folder).is_err() && Instant::now() < deadline {
            std::thread::yield_now();
        }
    }
}

#[test]
fn a_round_that_runs_out_of_its_units_memory_is_what_the_kernel_kills_and_ingestion_goes_on() {
    let Some(group) = MemoryGroup::new() else { return };
    let broker = EmbeddedBroker::start("live", 1).unwrap();
    let night = owing(&broker);
    let log = night.config().with_extension("log");
    // The daemon and its round in one group, as in one unit.
    let mut command = Command::new("sh");
    let script = format!("echo $$ > {:?} && exec \"$0\" run --config \"$1\"", group.procs());
    command.args(["-c", &script, env!("CARGO_BIN_EXE_taod")]).arg(night.config());
    command.env("TAOD_STOP_AT", "candidates-chunk");
    let mut daemon = Running::spawn(&mut command, &log);
    let child = until("the round", &log, || stopped_child(daemon.id()));
    group.leave(4 << 20);
    assert_eq!(group.kills(), 0);
    // It goes on, and what it takes now is more than there is.
    signal(child, "CONT");
    until("the failure", &log, || says(&log, "the round failed; the next one resumes it"));
    let said = std::fs::read_to_string(&log).unwrap();
    assert!(said.contains("signal: 9 (SIGKILL)"), "{said}");
    assert_eq!(group.kills(), 1);
    log_call(&broker, "after the kill");
    until("a row after the kill", &log, || (night.rows(Name::Queries).len() > 120).then_some(()));
    daemon.signal("TERM");
    assert_eq!(daemon.ended(), Some(0), "{}", std::fs::read_to_string(&log).unwrap());
    let outcome = night.worker(&["--resume"], &[]);
    assert!([0, 2, 3].contains(&outcome.code), "{}", outcome.err);
}

#[test]
fn a_round_that_is_paused_in_the_midst_of_its_trial_judges_each_prompt_once() {
    let (whole, night) = (Night::new(&calls(120)), Night::new(&calls(120)));
    whole.worker(&[], &[]);
    night.worker(&[], &[("TAOD_CRASH_AT", "gate-block")]).code(KILLED);
    let judged = night.rows(Name::GateSteps).len();
    assert!(judged > 0 && judged < whole.rows(Name::GateSteps).len(), "{judged} prompts: not in the midst of it");
    night.worker(&["--until", "2026-01-01T00:00:00Z"], &[]).code(75);
    assert!(!night.round().join("outcome.json").exists());
    night.worker(&["--resume"], &[]);
    let clusters = |night: &Night| {
        let mut clusters: Vec<String> =
            night.rows(Name::GateSteps).iter().map(|row| row["cluster"].to_string()).collect();
        clusters.sort();
        clusters
    };
    assert_eq!(clusters(&night), clusters(&whole));
    assert_eq!(night.json("outcome.json")["outcome"], whole.json("outcome.json")["outcome"]);
}
