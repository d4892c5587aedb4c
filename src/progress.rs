//! How far a long step has come: for a person at a terminal, for a log without one, and for the daemon's page.
//!
//! A stage reports counts; it does not know who looks. One [`Progress`] is handed down by argument.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// Receives what a long step reports. Implementations must be cheap: steps report after every chunk.
pub trait Observer: Send + Sync {
    /// A step begins: its name, how many units it has (0 = unknown) and what a unit is (`tokens`, `prompts`).
    fn begin(&self, step: &str, total: u64, unit: &str);
    /// The step has done `done` units so far; `note` is one short line (a loss, a rate), or empty.
    fn advance(&self, step: &str, done: u64, note: &str);
    /// The step is over.
    fn end(&self, step: &str, note: &str);
    /// Numbers were found that a metric shows. Most observers have no use for them.
    fn measured(&self, _: &Measure) {}
    /// Says, after a piece of work is safe, whether another one may begin. Most observers only look on.
    fn asks(&self) -> Ask {
        Ask::GoOn
    }
}

/// What a long step is asked between two pieces.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Ask {
    GoOn,
    /// End the step here, with what is done so far.
    Enough,
    /// Leave off here; the same step goes on later.
    Pause,
}

/// Numbers for metrics, which a process without metrics tells the one that has them.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "measure", rename_all = "snake_case")]
pub enum Measure {
    /// One optimizer step of training.
    Step {
        /// Completion tokens.
        tokens: u64,
        samples: u64,
        /// A token, in nats, like the next two.
        loss: f32,
        kl: f32,
        entropy: f32,
        /// Mean ratio of the policy to the one that training began from.
        ratio: f32,
        /// Share of the tokens whose ratio was clipped.
        clipped: f32,
        /// Before clipping.
        grad_norm: f32,
        learning_rate: f32,
        /// Effective sample size of the run as a share of its samples; 1 where the method weighs none.
        effective: f32,
    },
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

    /// Reports to `other` too.
    pub fn also(&self, other: Arc<dyn Observer>) -> Self {
        match &self.0 {
            Some(first) => Progress::to(Arc::new(Both(first.clone(), other))),
            None => Progress::to(other),
        }
    }

    /// Returns what is asked of a step between two pieces.
    pub fn asks(&self) -> Ask {
        self.0.as_ref().map_or(Ask::GoOn, |observer| observer.asks())
    }

    /// Tells numbers for metrics.
    pub fn measured(&self, measure: &Measure) {
        if let Some(observer) = &self.0 {
            observer.measured(measure);
        }
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

/// Two observers in place of one.
struct Both(Arc<dyn Observer>, Arc<dyn Observer>);

impl Observer for Both {
    fn begin(&self, step: &str, total: u64, unit: &str) {
        [&self.0, &self.1].into_iter().for_each(|observer| observer.begin(step, total, unit));
    }

    fn advance(&self, step: &str, done: u64, note: &str) {
        [&self.0, &self.1].into_iter().for_each(|observer| observer.advance(step, done, note));
    }

    fn end(&self, step: &str, note: &str) {
        [&self.0, &self.1].into_iter().for_each(|observer| observer.end(step, note));
    }

    fn measured(&self, measure: &Measure) {
        [&self.0, &self.1].into_iter().for_each(|observer| observer.measured(measure));
    }

    fn asks(&self) -> Ask {
        self.0.asks().max(self.1.asks())
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
