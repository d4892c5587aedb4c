//! The process boundary of a round: sampling and training happen in a child, so that a crash or an out-of-memory kill
//! there cannot stop ingestion.
//!
//! The child is the same binary under a hidden sub-command. It inherits standard error (progress), writes its verdict
//! into the round's folder, and ends when its standard input closes: a parent that dies, however it dies, takes its
//! round along, and the next one resumes it.

use std::io::Read;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};

use tokio::process::Command;

use super::{Control, RoundError};

/// How a child is to run.
#[derive(Debug, Clone, Default)]
pub struct Launch {
    /// The configuration file, as the parent read it; without one the defaults and the environment hold.
    pub config: Option<PathBuf>,
    pub control: Option<Control>,
    /// Only go on with an unfinished round.
    pub resume: bool,
    pub allow_drift: bool,
}

/// The allocator's variable for how long it keeps free memory, in milliseconds; -1 for ever.
const PURGE_DELAY: &str = "MIMALLOC_PURGE_DELAY";

/// Runs one night in a child process and returns how it ended; dropping the future kills the child.
pub async fn run(launch: &Launch) -> Result<ExitStatus, RoundError> {
    let program = std::env::current_exe().map_err(RoundError::Spawn)?;
    let mut command = Command::new(program);
    command.arg("round-worker");
    // It takes the same memory again within milliseconds; to give it back meanwhile and have it cleared took a tenth of the
    // time. The process ends with the night.
    if std::env::var_os(PURGE_DELAY).is_none() {
        command.env(PURGE_DELAY, "-1");
    }
    if let Some(config) = &launch.config {
        command.arg("--config").arg(config);
    }
    if let Some(control) = launch.control {
        let name = clap::ValueEnum::to_possible_value(&control).map(|v| v.get_name().to_string()).unwrap_or_default();
        command.arg("--control").arg(name);
    }
    if launch.resume {
        command.arg("--resume");
    }
    if launch.allow_drift {
        command.arg("--allow-drift");
    }
    let mut child = command.stdin(Stdio::piped()).kill_on_drop(true).spawn().map_err(RoundError::Spawn)?;
    // Taken out and held: `wait` would close it at once and so tell the child that its parent is gone.
    let lifeline = child.stdin.take();
    let status = child.wait().await.map_err(RoundError::Spawn);
    drop(lifeline);
    status
}

/// Ends this process when standard input closes, that is, when the parent is gone. Called first in the child.
pub fn end_with_parent() {
    std::thread::spawn(|| {
        let mut byte = [0u8; 1];
        while matches!(std::io::stdin().read(&mut byte), Ok(n) if n > 0) {}
        std::process::exit(1);
    });
}
