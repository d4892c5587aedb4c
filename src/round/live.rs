//! How far the running step of a round is, in a small file for the daemon's page: the round is another process.
//!
//! The file is no part of the round. It is replaced at most twice a second, not fsynced, and goes with the step; a reader that
//! finds none, or one that is old, knows nothing and says so.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Paths;
use crate::durable;
use crate::progress::Observer;

/// The shortest time between two writes.
const EVERY: Duration = Duration::from_millis(500);

/// How far a step is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Live {
    /// Name of the step, such as `tuning`.
    pub step: String,
    /// Units done.
    pub done: u64,
    /// Units that there are; 0 where that is not known.
    pub total: u64,
    /// What a unit is.
    pub unit: String,
    /// One short line, such as a loss or a rate.
    pub note: String,
    pub begun: DateTime<Utc>,
    /// When this was written.
    pub at: DateTime<Utc>,
}

/// Reads how far the running step is; nothing where none runs.
pub fn read(paths: &Paths) -> Option<Live> {
    durable::read_json(&paths.live()).ok()
}

/// Writes what a round reports into its file.
pub struct Writer {
    path: PathBuf,
    now: Mutex<Option<(Live, Option<Instant>)>>,
}

impl Writer {
    /// Writes below the state folder of `paths`.
    pub fn new(paths: &Paths) -> Self {
        Writer { path: paths.live(), now: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Option<(Live, Option<Instant>)>> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Observer for Writer {
    fn begin(&self, step: &str, total: u64, unit: &str) {
        let (begun, at) = (Utc::now(), Utc::now());
        let (step, unit) = (step.to_string(), unit.to_string());
        let live = Live { step, done: 0, total, unit, note: String::new(), begun, at };
        replace(&self.path, &live);
        *self.lock() = Some((live, Some(Instant::now())));
    }

    fn advance(&self, step: &str, done: u64, note: &str) {
        let mut now = self.lock();
        let Some((live, written)) = now.as_mut().filter(|(live, _)| live.step == step) else { return };
        (live.done, live.note, live.at) = (done, note.to_string(), Utc::now());
        if written.is_none_or(|written| written.elapsed() >= EVERY) {
            replace(&self.path, live);
            *written = Some(Instant::now());
        }
    }

    fn end(&self, step: &str, _note: &str) {
        let mut now = self.lock();
        if now.as_ref().is_some_and(|(live, _)| live.step == step) {
            *now = None;
            drop(std::fs::remove_file(&self.path));
        }
    }
}

/// Replaces the file. What cannot be written is not shown: no round ends for it.
fn replace(path: &Path, live: &Live) {
    let beside = path.with_extension("tmp");
    let written =
        serde_json::to_vec(live).map_err(std::io::Error::other).and_then(|text| std::fs::write(&beside, text));
    if let Err(error) = written.and_then(|()| std::fs::rename(&beside, path)) {
        tracing::debug!(%error, path = %path.display(), "cannot say how far the round is");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::Progress;

    #[test]
    fn a_running_step_can_be_read_and_a_finished_one_is_gone() {
        let root = tempfile::tempdir().unwrap();
        let paths = Paths::new(root.path());
        assert_eq!(read(&paths), None);
        let progress = Progress::silent().also(std::sync::Arc::new(Writer::new(&paths)));
        let mut step = progress.step("tuning", 10, "tokens");
        let begun = read(&paths).unwrap();
        assert_eq!((begun.step.as_str(), begun.done, begun.total, begun.unit.as_str()), ("tuning", 0, 10, "tokens"));
        step.advance(4, "loss 0.5");
        // At most two writes a second: the first of them stands at once only where that time has passed.
        assert!(read(&paths).unwrap().done <= 4);
        drop(step);
        assert_eq!(read(&paths), None);
    }
}
