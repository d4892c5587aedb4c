//! Places at which taod can be killed or stopped on purpose, so that what a crash or a hang leaves there can be tested.
//!
//! `TAOD_STOP_AT` names places likewise, at which the process stops itself (SIGSTOP) and so hangs until it is ended.
//!
//! `TAOD_CRASH_AT=name[:nth]`, or several with commas between them, names them. At the nth time (the first, where none is
//! said) that a process comes to such a place it sends itself SIGKILL: no destructor runs, nothing is flushed. A kill from
//! outside would land wherever the scheduler lets it. Without the variable a point costs one atomic load.

use std::future::Future;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Name of the variable that arms crash points.
pub const CRASH_AT: &str = "TAOD_CRASH_AT";
/// Name of the variable that arms the points of a round for a hang.
pub const STOP_AT: &str = "TAOD_STOP_AT";

/// The points on the way of a record into its table and out of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Point {
    /// Records were handed over by the log; nothing was done with them.
    AfterPoll,
    /// An epoch is closed; nothing of it is written.
    AfterSeal,
    /// A data file is half-way into the store.
    DuringUpload,
    /// A data file is in the store; no commit names it.
    AfterUpload,
    /// The store has the log entry and said so; taod has not acted on the reply.
    AfterPut,
    /// A checkpoint is being written.
    DuringCheckpoint,
    /// The dead letters of an epoch are committed; its rows and offsets are not.
    BetweenLettersAndRows,
    /// Small files are joined in the store, and no commit names the result; or one does, and its reply was not acted on.
    DuringCompaction,
    /// Rows are on their way out: the list of the erased names them; their files' successors are in the store; or the
    /// commit that replaces those is made, and the old bytes are still there.
    DuringErasure,
    /// A change of what is served: after the intent, each load, each move of the alias, each step, and `current`.
    DuringPromotion,
}

impl Point {
    /// The points that an ingestion comes by.
    pub const OF_INGESTION: [Point; 7] = [
        Point::AfterPoll,
        Point::AfterSeal,
        Point::DuringUpload,
        Point::AfterUpload,
        Point::AfterPut,
        Point::DuringCheckpoint,
        Point::BetweenLettersAndRows,
    ];

    /// Returns the name by which the variable arms it.
    pub fn name(self) -> &'static str {
        match self {
            Point::AfterPoll => "after_poll",
            Point::AfterSeal => "after_seal",
            Point::DuringUpload => "during_upload",
            Point::AfterUpload => "after_upload",
            Point::AfterPut => "after_put",
            Point::DuringCheckpoint => "during_checkpoint",
            Point::BetweenLettersAndRows => "between_letters_and_rows",
            Point::DuringCompaction => "during_compaction",
            Point::DuringErasure => "during_erasure",
            Point::DuringPromotion => "during_promotion",
        }
    }
}

/// Kills this process where the variable names `point`.
pub fn point(point: Point) {
    at(point.name());
}

/// Kills this process where the variable names the point `name`; for the points of a round, which carry a number.
pub fn at(name: &str) {
    if armed().due(name) {
        kill();
    }
    if stopping().due(name) {
        stop();
    }
}

/// Does `work`, and kills this process in the midst of it where the variable names `point`.
pub async fn during<T>(point: Point, work: impl Future<Output = T>) -> T {
    if !armed().due(point.name()) {
        return work.await;
    }
    tokio::select! {
        biased;
        // Work that is over so soon is a crash right after it.
        _ = work => {}
        () = tokio::time::sleep(Duration::from_millis(1)) => {}
    }
    kill()
}

/// One point of the variable: how often it still has to be come by, this time included.
struct Armed {
    name: String,
    left: AtomicU64,
}

struct Points(Vec<Armed>);

impl Points {
    fn parse(text: &str) -> Self {
        let points = text.split(',').filter(|item| !item.is_empty()).map(|item| {
            let (name, nth) = item.split_once(':').unwrap_or((item, "1"));
            Armed { name: name.to_owned(), left: AtomicU64::new(nth.parse().unwrap_or(1)) }
        });
        Points(points.collect())
    }

    /// Counts one coming by; true at the one that was asked for.
    fn due(&self, name: &str) -> bool {
        self.0.iter().any(|armed| armed.name == name && armed.left.fetch_sub(1, Ordering::Relaxed) == 1)
    }
}

fn stopping() -> &'static Points {
    static STOPPING: OnceLock<Points> = OnceLock::new();
    STOPPING.get_or_init(|| Points::parse(&std::env::var(STOP_AT).unwrap_or_default()))
}

#[expect(unsafe_code, reason = "only the system call stops every thread at once")]
fn stop() {
    // SAFETY: `kill` and `getpid` take and return plain numbers.
    unsafe { libc::kill(libc::getpid(), libc::SIGSTOP) };
}

fn armed() -> &'static Points {
    static ARMED: OnceLock<Points> = OnceLock::new();
    ARMED.get_or_init(|| Points::parse(&std::env::var(CRASH_AT).unwrap_or_default()))
}

#[expect(
    unsafe_code,
    reason = "only the system call kills at once; the program `kill` would leave time for the work to end"
)]
fn kill() -> ! {
    // SAFETY: `kill` and `getpid` take and return plain numbers.
    unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
    // The signal has been sent to this very thread's process: nothing runs here any more.
    std::process::abort()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_point_is_due_once_at_its_count() {
        let points = Points::parse("after_put:3,after_poll");
        let due: Vec<bool> = (0..5).map(|_| points.due("after_put")).collect();
        assert_eq!(due, [false, false, true, false, false]);
        assert!(points.due("after_poll") && !points.due("after_poll") && !points.due("after"));
        assert!(!Points::parse("").due(""));
    }

    #[test]
    fn names_are_told_apart() {
        let mut names: std::collections::BTreeSet<_> = Point::OF_INGESTION.map(Point::name).into();
        names.extend([Point::DuringCompaction, Point::DuringErasure, Point::DuringPromotion].map(Point::name));
        assert_eq!(names.len(), Point::OF_INGESTION.len() + 3);
    }
}
