//! Maintenance of the tables beside the daemon: a child process with its own memory limit, on its own schedule.
//!
//! The limit is `RLIMIT_DATA` of the child, which every kernel enforces for every user; a cgroup of our own would need the
//! service manager to delegate one. It counts private writable memory, so the allocator is told not to commit the large
//! arenas that it reserves. Past the limit an allocation fails and the child ends; no task minds, and the daemon goes on.

use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use tokio::io::AsyncReadExt;
use tokio::process::Command;
use tokio::sync::watch as channel;

use super::{Daemon, lease};
use crate::metrics::{Label, MaintenanceOutcome, MaintenanceTask, Metrics, Part};
use crate::table::maintain::{Report, Settings, Task};

/// How soon after this process became the owner of the lease it maintains for the first time, at most: an erasure that was
/// interrupted should not wait, and daemons that restart often would never come to it after a whole interval.
const SOON: Duration = Duration::from_secs(60);

/// What the child process did.
#[derive(Debug, Serialize, Deserialize)]
pub struct Maintained {
    /// Why an interrupted erasure could not be finished, where there was one.
    pub erasure: Option<String>,
    pub reports: Vec<Report>,
}

impl Maintained {
    /// Returns true where something failed.
    pub fn failed(&self) -> bool {
        self.erasure.is_some() || self.reports.iter().any(Report::failed)
    }
}

/// Maintains all tables in a child process and returns what it did; dropping the future kills the child.
pub async fn in_child(config: Option<&Path>) -> Result<Maintained> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("table-worker");
    if let Some(config) = config {
        command.arg("--config").arg(config);
    }
    command.env("MIMALLOC_ARENA_EAGER_COMMIT", "0");
    let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true).spawn();
    let mut child = child.context("cannot start the maintenance process")?;
    // Held open: its end tells the child that its parent is gone.
    let lifeline = child.stdin.take();
    let mut text = Vec::new();
    if let Some(mut out) = child.stdout.take() {
        out.read_to_end(&mut text).await?;
    }
    let status = child.wait().await?;
    drop(lifeline);
    ensure!(
        status.success(),
        "the maintenance process ended with {status}; if it ran out of memory, raise maintenance.memory_mib"
    );
    serde_json::from_slice(&text).context("the maintenance process gave no report")
}

/// Limits the memory of this process, the child.
#[expect(unsafe_code, reason = "the standard library has no call for resource limits")]
pub fn limit_memory(settings: &Settings) -> Result<()> {
    let bytes = settings.memory_mib << 20;
    let limit = libc::rlimit { rlim_cur: bytes, rlim_max: bytes };
    // SAFETY: the pointer is to a live, initialised struct that the call only reads.
    let set = unsafe { libc::setrlimit(libc::RLIMIT_DATA, &limit) };
    ensure!(set == 0, "cannot limit memory to {bytes} bytes: {}", std::io::Error::last_os_error());
    Ok(())
}

/// Maintains the tables on schedule while this process owns the lease.
pub(super) async fn keep(daemon: Arc<Daemon>, mut owner: lease::Owner, mut stop: channel::Receiver<bool>) {
    let mut wait = SOON;
    loop {
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            _ = stop.wait_for(|stop| *stop) => return,
        }
        wait = SOON;
        if !owner.holds() {
            continue;
        }
        let done = tokio::select! {
            done = in_child(daemon.config_file.as_deref()) => done,
            () = owner.lost() => continue,
            _ = stop.wait_for(|stop| *stop) => return,
        };
        wait = Duration::from_secs(daemon.config().maintenance.interval_minutes * 60);
        match done {
            Ok(done) => {
                if done.erasure.is_some() {
                    // The child said why.
                    daemon.metrics.daemon.errors.get(Part::Maintenance).inc();
                }
                daemon.health.ready("maintenance");
                measure(&daemon.metrics, &done.reports);
            }
            Err(error) => {
                daemon.metrics.daemon.errors.get(Part::Maintenance).inc();
                tracing::error!(error = format!("{error:#}"), "maintenance failed; the next one starts over");
            }
        }
    }
}

fn measure(metrics: &Metrics, reports: &[Report]) {
    let m = &metrics.maintenance;
    m.files.set(reports.iter().map(|r| r.files as i64).sum());
    m.log_entries.set(reports.iter().map(|r| r.log_entries as i64).max().unwrap_or_default());
    for task in MaintenanceTask::ALL {
        m.seconds.get(*task).set(0.0);
    }
    for done in reports.iter().flat_map(|report| &report.tasks) {
        if let Some(task) = MaintenanceTask::from_name(done.task.as_str()) {
            let seconds = m.seconds.get(task);
            seconds.set(seconds.get() + done.seconds);
        }
        if let Some(outcome) = MaintenanceOutcome::from_name(done.outcome.as_str()) {
            m.tasks.get(outcome).inc();
        }
        match done.task {
            Task::Compact => m.rewritten.inc_by(done.bytes),
            Task::Vacuum | Task::Sweep => m.removed.inc_by(done.files),
            Task::Retain | Task::Checkpoint | Task::Clean => {}
        }
    }
}
