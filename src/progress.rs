//! How far a long step has come: for a person at a terminal, for a log without one, and for the daemon's page.
//!
//! A stage reports counts; it does not know who looks. One [`Progress`] is handed down by argument.

use std::sync::Arc;

/// Receives what a long step reports. Implementations must be cheap: steps report after every chunk.
pub trait Observer: Send + Sync {
    /// A step begins: its name, how many units it has (0 = unknown) and what a unit is (`tokens`, `prompts`).
    fn begin(&self, step: &str, total: u64, unit: &str);
    /// The step has done `done` units so far; `note` is one short line (a loss, a rate), or empty.
    fn advance(&self, step: &str, done: u64, note: &str);
    /// The step is over.
    fn end(&self, step: &str, note: &str);
}

/// A handle to an [`Observer`], or to nobody.
#[derive(Clone, Default)]
pub struct Progress(Option<Arc<dyn Observer>>);

impl Progress {
    /// Reports to `observer`.
    pub fn to(observer: Arc<dyn Observer>) -> Self {
        Progress(Some(observer))
    }

    /// Reports to nobody (tests, library use).
    pub fn silent() -> Self {
        Progress(None)
    }

    /// Begins a step; drop of the returned [`Step`] ends it.
    pub fn step(&self, name: impl Into<String>, total: u64, unit: &str) -> Step {
        let step = Step { progress: self.clone(), name: name.into(), done: 0, note: String::new() };
        if let Some(observer) = &self.0 {
            observer.begin(&step.name, total, unit);
        }
        step
    }
}

/// One long step under way.
pub struct Step {
    progress: Progress,
    name: String,
    done: u64,
    note: String,
}

impl Step {
    /// Adds `units` done, with one short note (may be empty).
    pub fn advance(&mut self, units: u64, note: impl Into<String>) {
        self.done += units;
        self.note = note.into();
        if let Some(observer) = &self.progress.0 {
            observer.advance(&self.name, self.done, &self.note);
        }
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        if let Some(observer) = &self.progress.0 {
            observer.end(&self.name, &self.note);
        }
    }
}
