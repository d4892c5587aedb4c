//! What goes wrong with a round at night, beside a daemon that has to go on: it is killed, the daemon is told to stop, it is
//! paused in the midst of its trial.

use std::time::{Duration, Instant};

use taod::query_log::embedded::EmbeddedBroker;
use taod::table::Name;

use crate::harness::night::{KILLED, Night, calls};
use crate::operations::{Running, age, live, log_call, says, until};

/// The unit's TimeoutStopSec, of which a stop may take a fraction.
const STOP_WITHIN: Duration = Duration::from_secs(30);

/// Returns the child of a process that has stopped itself, as it does at a point of `TAOD_STOP_AT`.
fn stopped_child(parent: u32) -> Option<u32> {
    let stat = |id: u32| std::fs::read_to_string(format!("/proc/{id}/stat")).ok();
    let all = std::fs::read_dir("/proc").unwrap().flatten();
    all.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).find(|id| {
        // After the name in brackets: the state, then the parent.
        let text = stat(*id).unwrap_or_default();
        let rest: Vec<&str> = text.rsplit_once(") ").map_or(Vec::new(), |(_, rest)| rest.split(' ').take(2).collect());
        rest == ["T", &parent.to_string()]
    })
}

fn is_running(id: u32) -> bool {
    // A child that nobody has waited for is gone, too.
    std::fs::read_to_string(format!("/proc/{id}/stat")).is_ok_and(|text| !text.contains(") Z "))
}

fn kill(id: u32) {
    assert!(std::process::Command::new("kill").args(["-s", "KILL", &id.to_string()]).status().unwrap().success());
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
    kill(child);
    until("the failure", &log, || says(&log, "the round failed; the next one resumes it"));
    log_call(&broker, "after the kill");
    until("a row after the kill", &log, || (night.rows(Name::Queries).len() > 120).then_some(()));
    daemon.signal("TERM");
    assert_eq!(daemon.ended(), Some(0));
    let outcome = night.worker(&["--resume"], &[]);
    assert!([0, 2, 3].contains(&outcome.code), "{}", outcome.err);
    assert!(night.state().join("rounds/round-00002/outcome.json").exists());
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
