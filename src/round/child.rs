//! The process boundary of a round: sampling and training happen in a child, so that a crash or an out-of-memory kill
//! there cannot stop ingestion.
//!
//! The child is the same binary under a hidden sub-command. It inherits standard error (progress), tells the numbers that
//! metrics show on standard output, a line of JSON each, writes its verdict into the round's folder, and ends when its
//! standard input closes: a parent that dies, however it dies, takes its round along, and the next one resumes it.

use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use chrono::{DateTime, Utc};
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::Command;
use tokio::time::Instant;

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
    /// When the round leaves off, to be gone on with later.
    pub until: Option<DateTime<Utc>>,
    /// How long the child may finish no piece of work before it is taken to hang and is ended; `None`: for ever.
    pub stall: Option<Duration>,
}

/// Exit code of a child that left off because it was asked to.
pub const PAUSED: u8 = 75;

/// The allocator's variable for how long it keeps free memory, in milliseconds; -1 for ever.
const PURGE_DELAY: &str = "MIMALLOC_PURGE_DELAY";

/// The child's `oom_score_adj`, as `taod-round.service` has it.
const GIVES_WAY: i32 = 500;

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
    if let Some(until) = launch.until {
        command.arg("--until").arg(until.to_rfc3339());
    }
    let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true).spawn();
    let mut child = child.map_err(RoundError::Spawn)?;
    // Taken out and held: `wait` would close it at once and so tell the child that its parent is gone.
    let lifeline = child.stdin.take();
    let heard = Heard::default();
    let listening = listen(child.stdout.take(), measured, &heard);
    tokio::pin!(listening);
    let status = tokio::select! {
        status = child.wait() => {
            drop(tokio::time::timeout(LAST_LINES, listening).await);
            status
        }
        () = &mut listening => child.wait().await,
        seconds = heard.silence(launch.stall) => {
            // SIGKILL ends a stopped process, and one that waits for a disk as soon as that answers.
            drop(child.kill().await);
            return Err(RoundError::Stalled { seconds });
        }
    };
    drop(lifeline);
    let status = status.map_err(RoundError::Spawn)?;
    match status.code() {
        Some(code) if code == i32::from(PAUSED) => Err(RoundError::Paused { round: "the round".into() }),
        _ => Ok(status),
    }
}

/// When a child was last heard of.
struct Heard(Mutex<Instant>);

impl Default for Heard {
    fn default() -> Self {
        Heard(Mutex::new(Instant::now()))
    }
}

impl Heard {
    fn last(&self) -> MutexGuard<'_, Instant> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until nothing was heard for as long as `stall`, and returns that time in seconds.
    async fn silence(&self, stall: Option<Duration>) -> u64 {
        let Some(stall) = stall else { return std::future::pending().await };
        loop {
            let due = *self.last() + stall;
            if Instant::now() >= due {
                return stall.as_secs();
            }
            tokio::time::sleep_until(due).await;
        }
    }
}

/// Hands over what a child tells until it tells no more. Every line is a sign of life; most are nothing else.
async fn listen(told: Option<impl AsyncRead + Unpin>, measured: &(dyn Fn(&Measure) + Sync), heard: &Heard) {
    let Some(told) = told else { return };
    let mut lines = BufReader::new(told).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        *heard.last() = Instant::now();
        if let Ok(measure) = serde_json::from_str(&line) {
            measured(&measure);
        }
    }
}

/// Returns a handle that reports as `progress` does and tells numbers for metrics to the parent. Called in the child.
pub fn telling(progress: &Progress) -> Progress {
    progress.also(Arc::new(Teller))
}

/// Writes numbers for metrics to standard output, and an empty line for each piece of work, by which the parent knows that the
/// child does not hang.
struct Teller;

impl Observer for Teller {
    fn begin(&self, _: &str, _: u64, _: &str) {
        alive();
    }

    fn advance(&self, _: &str, _: u64, _: &str) {
        alive();
    }

    fn end(&self, _: &str, _: &str) {
        alive();
    }

    fn measured(&self, measure: &Measure) {
        let Ok(line) = serde_json::to_string(measure) else { return };
        // Metrics that nobody takes are no reason to stop the work.
        drop(writeln!(std::io::stdout().lock(), "{line}"));
    }
}

fn alive() {
    // A parent that is gone ends this process by other means.
    drop(writeln!(std::io::stdout().lock()));
}

/// Ends this process when standard input closes, that is, when the parent is gone. Called first in the child.
pub fn end_with_parent() {
    std::thread::spawn(|| {
        let mut byte = [0u8; 1];
        while matches!(std::io::stdin().read(&mut byte), Ok(n) if n > 0) {}
        std::process::exit(1);
    });
}

/// Tells the kernel to take this process first where memory runs out, before the daemon that ingests. Called in the child.
pub fn give_way() {
    let path = "/proc/self/oom_score_adj";
    let now = std::fs::read_to_string(path).ok().and_then(|text| text.trim().parse::<i32>().ok());
    if now.is_some_and(|now| now < GIVES_WAY)
        && let Err(error) = std::fs::write(path, GIVES_WAY.to_string())
    {
        tracing::debug!(%error, "the kernel may end the daemon before the round where memory runs out");
    }
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
        listen(Some(told.as_bytes()), &|measure| heard.lock().unwrap().push(*measure), &Heard::default()).await;
        assert_eq!(*heard.lock().unwrap(), [measure(7), measure(8)]);
    }

    #[tokio::test]
    async fn silence_is_counted_from_the_last_line_and_without_a_limit_nobody_is_ended() {
        let heard = Heard::default();
        let long_ago = Instant::now().checked_sub(Duration::from_secs(61)).unwrap();
        *heard.last() = long_ago;
        assert_eq!(heard.silence(Some(Duration::from_secs(60))).await, 60);
        listen(Some("\n".as_bytes()), &|_| (), &heard).await;
        assert!(*heard.last() > long_ago, "an empty line is a sign of life");
        for limit in [Some(Duration::from_secs(60)), None] {
            assert!(futures::FutureExt::now_or_never(heard.silence(limit)).is_none());
        }
    }
}
