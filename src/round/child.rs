//! The process boundary of a round: sampling and training happen in a child, so that a crash or an out-of-memory kill
//! there cannot stop ingestion.
//!
//! The child is the same binary under a hidden sub-command. It inherits standard error (progress), tells the numbers that
//! metrics show on standard output, a line of JSON each, writes its verdict into the round's folder, and ends when its
//! standard input closes: a parent that dies, however it dies, takes its round along, and the next one resumes it.

use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::Command;

use super::{Control, RoundError};
use crate::progress::{Measure, Observer, Progress};

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

/// How long the last lines of a child that ended are waited for; a program that it left behind may hold its output open.
const LAST_LINES: Duration = Duration::from_secs(1);

/// Runs one night in a child process and returns how it ended; dropping the future kills the child. `measured` gets the
/// numbers that the child tells while it runs.
pub async fn run(launch: &Launch, measured: &(dyn Fn(&Measure) + Sync)) -> Result<ExitStatus, RoundError> {
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
    let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true).spawn();
    let mut child = child.map_err(RoundError::Spawn)?;
    // Taken out and held: `wait` would close it at once and so tell the child that its parent is gone.
    let lifeline = child.stdin.take();
    let listening = listen(child.stdout.take(), measured);
    tokio::pin!(listening);
    let status = tokio::select! {
        status = child.wait() => {
            drop(tokio::time::timeout(LAST_LINES, listening).await);
            status
        }
        () = &mut listening => child.wait().await,
    };
    drop(lifeline);
    status.map_err(RoundError::Spawn)
}

/// Hands over what a child tells until it tells no more. Lines that are no numbers for metrics are not for us.
async fn listen(told: Option<impl AsyncRead + Unpin>, measured: &(dyn Fn(&Measure) + Sync)) {
    let Some(told) = told else { return };
    let mut lines = BufReader::new(told).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        if let Ok(measure) = serde_json::from_str(&line) {
            measured(&measure);
        }
    }
}

/// Returns a handle that reports as `progress` does and tells numbers for metrics to the parent. Called in the child.
pub fn telling(progress: &Progress) -> Progress {
    progress.also(Arc::new(Teller))
}

/// Writes numbers for metrics to standard output.
struct Teller;

impl Observer for Teller {
    fn begin(&self, _: &str, _: u64, _: &str) {}
    fn advance(&self, _: &str, _: u64, _: &str) {}
    fn end(&self, _: &str, _: &str) {}

    fn measured(&self, measure: &Measure) {
        let Ok(line) = serde_json::to_string(measure) else { return };
        // Metrics that nobody takes are no reason to stop the work.
        drop(writeln!(std::io::stdout().lock(), "{line}"));
    }
}

/// Ends this process when standard input closes, that is, when the parent is gone. Called first in the child.
pub fn end_with_parent() {
    std::thread::spawn(|| {
        let mut byte = [0u8; 1];
        while matches!(std::io::stdin().read(&mut byte), Ok(n) if n > 0) {}
        std::process::exit(1);
    });
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[tokio::test]
    async fn numbers_are_handed_over_and_other_lines_are_not() {
        let measure = |tokens| Measure::Step {
            tokens,
            samples: 2,
            loss: 0.5,
            kl: 0.1,
            entropy: 1.5,
            ratio: 1.0,
            clipped: 0.25,
            grad_norm: 3.0,
            learning_rate: 1e-4,
            effective: 0.9,
        };
        let line = |tokens| serde_json::to_string(&measure(tokens)).unwrap();
        let told = format!("{}\nhello\n{{\"measure\":\"other\"}}\n{}", line(7), line(8));
        let heard = Mutex::new(Vec::new());
        listen(Some(told.as_bytes()), &|measure| heard.lock().unwrap().push(*measure)).await;
        assert_eq!(*heard.lock().unwrap(), [measure(7), measure(8)]);
    }
}
